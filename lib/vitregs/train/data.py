"""What a step sees: scenes rendered on the training device, or images held there as bytes.

Every batch is a function of seed and step alone. With several processes each takes its own rows of the same batch.
"""

from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from timm.data import ImageNetInfo
from torch import Tensor

from vitregs.data import images, scenes, sources
from vitregs.data.scenes import CLASSES, COLOUR_NAMES, Scenes
from vitregs.errors import InputError
from vitregs.train.config import Recipe

HELD_OUT = 2**40  # first scene of the held-out part: far behind anything a run can reach
LEAST = 64  # images that a held-out part must have


@dataclass
class Batch:
    """Some images and what is known of them."""

    pixels: Tensor  # (n, 3, H, W) in [0, 1]
    label: Tensor  # (n,) int64; -1 unknown
    labels: Tensor  # (n, classes) bool: all classes in view
    captions: list[str] | None = None

    def __len__(self) -> int:
        return len(self.pixels)

    def split(self, share: float) -> "tuple[Batch, Batch]":
        """Cut in two: share of the first part → two batches."""
        at = round(share * len(self))
        parts = ((self.pixels[i], self.label[i], self.labels[i]) for i in (slice(at), slice(at, None)))
        one, two = (Batch(*part) for part in parts)
        return one, two


class Feed(Protocol):
    """A source of training images."""

    classes: list[str]  # names; empty where nothing is known
    fingerprint: str

    def take(self, step: int, *, rank: int = 0, world: int = 1, captions: bool = False) -> Batch:
        """The rows of a process of the batch of a step."""
        ...

    def held(self, count: int) -> Batch:
        """Images that no step sees, at most `count`."""
        ...

    def prompts(self) -> list[str]:
        """One sentence for each class, for zero-shot classification."""
        ...

    def asks(self, batch: Batch) -> dict[str, Tensor]:
        """What a linear classifier predicts of images: {name: classes (n,)}."""
        ...


def rows(batch: int, rank: int, world: int) -> slice:
    """Rows of a process: batch, rank, processes → slice. Raises InputError unless the batch divides evenly."""
    if batch % world:
        raise InputError(f"batch {batch} is not a multiple of the {world} processes")
    per_process = batch // world
    return slice(rank * per_process, (rank + 1) * per_process)


class SceneFeed:
    """Procedural scenes; no two steps see the same one."""

    fingerprint = "scenes"

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device, self.classes = recipe, device, list(CLASSES)

    def _render(self, first: int, count: int) -> Scenes:
        recipe = self.recipe
        return scenes.render(
            count, recipe.image_size, seed=recipe.seed, first=first, device=self.device, difficulty=recipe.difficulty
        )

    def take(self, step: int, *, rank: int = 0, world: int = 1, captions: bool = False) -> Batch:
        """Render the rows of a process of the batch of a step."""
        mine = rows(self.recipe.batch, rank, world)
        return _batch(self._render(step * self.recipe.batch + mine.start, mine.stop - mine.start), captions)

    def held(self, count: int) -> Batch:
        """Render scenes far behind those of any step."""
        return _batch(self._render(HELD_OUT, count), True)

    def prompts(self) -> list[str]:
        """One sentence for each pair of colour and shape."""
        return [f"a {name}" for name in CLASSES]

    def asks(self, batch: Batch) -> dict[str, Tensor]:
        """Colour and shape of the object with the largest area."""
        return {"colour": batch.label % len(COLOUR_NAMES), "shape": batch.label // len(COLOUR_NAMES)}


def _batch(found: Scenes, captions: bool) -> Batch:
    return Batch(found.pixels, found.label, found.labels, found.captions() if captions else None)


class ImageFeed:
    """Images of a data set, all of them in the device's memory as bytes; shuffled anew in every epoch."""

    def __init__(self, recipe: Recipe, device: torch.device, source: str, count: int | None = None) -> None:
        """Read a source of images (see `images.open_images`), at most `count` to train on.

        Raises InputError for sources with too few images.
        """
        self.recipe, self.device = recipe, device
        found = images.open_images(source, size=recipe.image_size, count=count, split=_split(source))
        self.fingerprint = found.fingerprint
        pixels, named = _read(found)
        order = torch.randperm(
            len(pixels), generator=torch.Generator().manual_seed(0)
        ).tolist()  # a stream may be sorted
        pixels, named = pixels[order], [named[i] for i in order]
        self.classes, label = _classes(named, list(getattr(found.source, "classes", [])))
        self.source, self.images = source, found
        self.trained = len(pixels) - max(LEAST, len(pixels) // 10)  # the last are held out, the same for every seed
        self._check(len(pixels))
        self.pixels, self.label = pixels.to(device), torch.tensor(label, device=device)
        self.named = [str(c).replace("_", " ") for c in self.classes]

    def _check(self, there: int) -> None:
        if self.trained < self.recipe.batch:
            raise InputError(
                f"{self.source} has {there} images: too few for a batch of {self.recipe.batch} "
                f"and {there - self.trained} held out"
            )

    def again(self, recipe: Recipe) -> "ImageFeed":
        """The same images in memory for another recipe, of images of the same side.

        Raises InputError for another side, or too few images.
        """
        if recipe.image_size != self.recipe.image_size:
            raise InputError(f"images were read at {self.recipe.image_size} pixels, not {recipe.image_size}")
        other = copy(self)
        other.recipe = recipe
        other._check(len(self.pixels))
        return other

    def _pick(self, index: Tensor, captions: bool) -> Batch:
        index = index.to(self.device)
        label = self.label[index]
        labels = torch.zeros(len(index), max(1, len(self.classes)), dtype=torch.bool, device=self.device)
        labels.scatter_(1, label.clamp(min=0)[:, None], (label >= 0)[:, None])
        words = [f"a photo of a {self.named[i]}" for i in label.tolist()] if captions and self._captioned() else None
        return Batch(self.pixels[index].float() / 255, label, labels, words)

    def _captioned(self) -> bool:
        return len(self.classes) > 1 and bool((self.label >= 0).all())

    def take(self, step: int, *, rank: int = 0, world: int = 1, captions: bool = False) -> Batch:
        """Pick the rows of a process of the batch of a step."""
        batch = self.recipe.batch
        epoch, place = divmod(step, self.trained // batch)
        draw = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + epoch)
        order = torch.randperm(self.trained, generator=draw)[place * batch : (place + 1) * batch]
        return self._pick(order[rows(batch, rank, world)], captions)

    def held(self, count: int) -> Batch:
        """Pick images that no step sees; fewer than `count` if there are no more."""
        return self._pick(torch.arange(self.trained, min(self.trained + count, len(self.pixels))), True)

    def prompts(self) -> list[str]:
        """One sentence for each class."""
        return [f"a photo of a {name}" for name in self.named]

    def asks(self, batch: Batch) -> dict[str, Tensor]:
        """The label."""
        return {"label": batch.label}


def _split(source: str) -> str | None:
    """Training images come from the split `train`, where the source has splits."""
    if source in sources.NAMED:
        return None
    path = Path(source).expanduser()
    there = sources.split_names(path) if path.exists() else ["train"]
    return next((name for name in ("train", "training") if name in there), None)


def _read(found: images.Images) -> tuple[Tensor, list[object]]:
    parts, named = [], []
    for batch in found.batches(256):
        parts.append((batch.pixels * 255).round().to(torch.uint8))
        named += batch.labels
    return torch.cat(parts), named


def _classes(named: list[object], known: list[str]) -> tuple[list[str], list[int]]:
    """Number labels: integers, names or None, and class names where known → class names, numbers (-1 unknown)."""
    there = {n for n in named if n is not None}
    if known and all(isinstance(n, int) for n in there):
        return known, [n if isinstance(n, int) and 0 <= n < len(known) else -1 for n in named]
    names: list[object] = sorted(there, key=lambda n: (str(type(n)), n))  # type: ignore[type-var, return-value]
    index = {n: i for i, n in enumerate(names)}
    return [str(n) for n in names], [-1 if n is None else index[n] for n in named]


def imagenet_numbers(classes: list[str]) -> list[int] | None:
    """Number classes as a head trained on ImageNet-1k counts them.

    Args:
        classes: Synsets ("n01440764"), or the first words of their descriptions ("tench").

    Returns:
        Number of each, None where one of them is no class of ImageNet-1k, or the name of two.
    """
    info = ImageNetInfo("imagenet-1k")
    synsets = {name: i for i, name in enumerate(info.label_names())}
    first = [info.index_to_description(i).split(",")[0].lower() for i in range(len(synsets))]
    known = synsets | {word: i for i, word in enumerate(first) if first.count(word) == 1}
    found = [known.get(name, known.get(name.replace("_", " ").lower(), -1)) for name in classes]
    return found if found and min(found) >= 0 else None


def make(
    recipe: Recipe,
    device: torch.device,
    source: str | None = None,
    count: int | None = None,
    read: ImageFeed | None = None,
) -> Feed:
    """Open what a recipe trains on: recipe, device, where its images lie (None: by its own name), how many to use, images that
    were read already → Feed.

    Raises InputError for sources that do not exist or hold too few images, and for objectives that miss labels or captions.
    """
    source, objective = source or recipe.data, recipe.objective.name
    if source == "scenes" and count is not None:
        raise InputError("scenes are drawn anew in every step: leave out count, or name a folder of images")
    feed: Feed
    if source == "scenes":
        feed = SceneFeed(recipe, device)
    else:
        feed = read.again(recipe) if read else ImageFeed(recipe, device, source, count)
    if objective == "clip" and feed.held(1).captions is None:
        raise InputError(f"clip needs captions: {source} has neither captions nor class names for all images")
    asked = objective == "supervised" or getattr(recipe.objective, "labels", False)
    if asked and isinstance(feed, ImageFeed):
        bare = int((feed.label < 0).sum())
        if bare:
            raise InputError(
                f"{objective} training needs labels: {bare} of {len(feed.label)} images of {source} have none"
            )
        if len(feed.label.unique()) < 2:
            raise InputError(f"{objective} training needs two classes or more: all images of {source} have one label")
    return feed
