"""Pixels with names, labels, boxes and masks from scenes, photographs, files, a folder, or a Hugging Face `datasets` source.

Images are decoded one batch at a time. Grey, palette, RGBA and 16-bit images become RGB, EXIF rotation is applied,
and what cannot be decoded or is not used is counted and reported.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitregs.data import decoding, scenes
from vitregs.data.preparation import Preparation
from vitregs.data.sources import NOTES, Chain, Item, Opened, Source, encoded, listed, open_source
from vitregs.errors import InputError, unknown

FIRST_SCENE = 2**41  # far behind every scene that a training run sees
BOX_FORMATS = ("xyxy", "xywh")  # corners, or the corner with width and height as COCO has it
SCANNED = 32  # images that tell the range of a source of more than 8 bits
DARK = 0.1  # share of the range below which a source is said to be dark


@dataclass
class Batch:
    """Some images of one size: pixels (n, 3, H, W) in [0, 1] and, for each, what is known of it."""

    pixels: Tensor
    names: list[str]
    labels: list[Any]  # class index or name; None where unknown
    boxes: list[np.ndarray]  # (objects, 4) y0, x0, y1, x1 in pixels of this batch
    masks: list[np.ndarray | None]  # (H, W) class per pixel, 0 unlabelled
    truth: scenes.Scenes | None = None


@dataclass
class Images:
    """A stream of images of one size, read as often as wanted.

    Attributes:
        name: The source, as it was given.
        size: Height and width in pixels.
        count: The most images that are drawn, None for all.
        seed: Draws which.
        preparation: How an image is resized and cropped.
        source: Where encoded images come from, None for scenes.
        difficulty: Of scenes.
        box_format: What four numbers of a box mean, "xyxy" or "xywh".
        full_scale: The value that is white in images of more than 8 bits, None to go by type and metadata.
        last_object: The highest class of a mask that is an object, None if all are; those above it are background.
        skipped: Names of images that could not be decoded, as of the last reading.
        unused: Names of images whose mask or boxes could not be used.
    """

    name: str
    size: tuple[int, int]
    count: int | None
    seed: int
    preparation: Preparation
    source: Source | None
    difficulty: scenes.Difficulty = field(default_factory=scenes.Difficulty)
    box_format: str = "xyxy"
    full_scale: float | None = None
    last_object: int | None = None
    skipped: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Nothing is read yet."""
        self._white: dict[str, float] = {}
        self._peak: float | None = None  # brightest value of the images of more than 8 bits, as a share of their range

    @property
    def fingerprint(self) -> str:
        """A hash of the content of the images drawn, 12 hexadecimal digits, or "scenes"."""
        return "scenes" if self.source is None else self.source.fingerprint(self.count, self.seed)

    @property
    def passed(self) -> list[str]:
        """Names of what lies in the source and is not used."""
        return [] if self.source is None else self.source.passed

    @property
    def key(self) -> dict[str, Any]:
        """What decides the pixels and what is known of them, for the key of a stored result."""
        facts: dict[str, Any] = {"images": self.fingerprint, "size": self.size, "count": self.count, "seed": self.seed}
        if self.source is None:
            return facts | {"difficulty": repr(self.difficulty)}
        more: dict[str, Any] = {
            "preparation": self.preparation,
            "box_format": self.box_format,
            "full_scale": self.full_scale,
        }
        if self.last_object is not None:
            more["last_object"] = self.last_object
        return facts | {k: repr(v) for k, v in more.items()}

    def pixels(self, batch: int = 32) -> Iterator[Tensor]:
        """Read the images as pixels.

        Args:
            batch: The most images at a time.

        Yields:
            (n, 3, height, width) in [0, 1].

        Raises:
            InputError: As `batches` does.
        """
        for part in self.batches(batch):
            yield part.pixels

    def batches(self, batch: int = 32) -> Iterator[Batch]:
        """Read the images with what is known of them; a warning tells at the end what could not be used.

        Args:
            batch: The most images at a time.

        Yields:
            Batches with pixels (n, 3, height, width) in [0, 1], names, labels, boxes and masks.

        Raises:
            InputError: Not one image can be decoded, or boxes are of another format.
        """
        if batch < 1:
            raise InputError(f"batch must be 1 or more, not {batch}")
        if self.source is None:
            yield from self._scenes(batch)
            return
        self.skipped.clear()
        self.unused.clear()
        self._peak = None
        done, rows = 0, self.source.items(self.count, self.seed)
        while chunk := list(islice(rows, batch)):
            good = [item for item in map(self._prepare, chunk) if item is not None]
            done += len(good)
            if good:
                names, pixels, labels, boxes, masks = map(list, zip(*good, strict=True))
                yield Batch(torch.stack(pixels), names, labels, boxes, masks)
        if not done:
            raise InputError(f"not one image of {self.name} can be decoded ({len(self.skipped)} tried)")
        self._tell(done)

    def _tell(self, done: int) -> None:
        """Warn of what a reading could not use."""
        total = done + len(self.skipped)
        if self.skipped:
            what = f"skipped {len(self.skipped)} of {total} images of {self.name} that cannot be decoded"
            warnings.warn(f"{what}: {listed(self.skipped)}", stacklevel=3)
        if self.unused:
            what = f"{len(self.unused)} of {total} images of {self.name} have a mask or boxes that do not fit them"
            warnings.warn(f"{what}, which are left away: {listed(self.unused)}", stacklevel=3)
        if self._peak is not None and self._peak < DARK:
            tops = ", ".join(f"{v:g}" for v in self._white.values())
            warnings.warn(
                f"the images of {self.name} are nearly black: their brightest value is {100 * self._peak:.1f} % of {tops}; "
                "if another value is white (4095 in data of 12 bits), give it as full_scale",
                stacklevel=3,
            )

    def background(self, grid: tuple[int, int]) -> np.ndarray | None:
        """Measure the share of background (mask 0) in every patch of a grid.

        Args:
            grid: Rows and columns of patches.

        Returns:
            (images, patches) in [0, 1], nan for an image without a mask; None if no image has one.
        """
        shares = []
        for batch in self.batches():
            for mask in batch.masks:
                if mask is None:
                    shares.append(np.full(grid[0] * grid[1], np.nan))
                    continue
                shares.append(background_share(mask, grid))
        found = np.stack(shares)
        return None if np.isnan(found).all() else found

    def first(self, count: int) -> "Images":
        """The same source with fewer images: at most so many, the first of this order."""
        fewer = count if self.count is None else min(count, self.count)
        return replace(self, count=fewer, skipped=[], unused=[])

    def whole(self) -> Iterator[tuple[Item, Image.Image]]:
        """Yield items with their images as they are, upright RGB of 8 bits; those that cannot be decoded are left out."""
        for item in self.source.items(self.count, self.seed) if self.source else ():
            try:
                yield item, self.decode(item)
            except OSError:
                continue

    def decode(self, item: Item) -> Image.Image:
        """Decode an image in the range of its source: → upright RGB of 8 bits. Raises OSError for damaged data."""
        found = decoding.read(item.data)
        most = Image.MAX_IMAGE_PIXELS or np.inf
        if found.image.width * found.image.height > most:
            size = f"{found.image.width} x {found.image.height}"
            warnings.warn(f"{item.name} of {self.name} is very large ({size} pixels): make it smaller", stacklevel=2)
        if found.kind == "byte":
            return found.rgb()
        if found.kind not in self._white:
            scanned = self.source.items(SCANNED, 0) if self.source else iter(())  # the same for every seed
            first = decoding.white((other.data for other in scanned), found.kind)
            self._white[found.kind] = self.full_scale or first
        white = self._white[found.kind]
        self._peak = max(self._peak or 0.0, float(found.values().max()) / white)
        return found.rgb(white)

    def true_boxes(self, item: Item, size: tuple[int, int]) -> np.ndarray:
        """Boxes of an item: item, (width, height) of the original → (objects, 4) x0, y0, x1, y1 in its pixels.

        Raises InputError for boxes that cannot be of the format, ValueError for what is no list of boxes.
        """
        if item.boxes is None or not np.size(item.boxes):
            return np.zeros((0, 4), np.float32)
        boxes = np.asarray(item.boxes, np.float32).reshape(-1, 4)
        other = next(f for f in BOX_FORMATS if f != self.box_format)
        edge = np.tile(np.array(size, np.float32), 2)
        wrong = ~np.isfinite(boxes).all(1)
        if self.box_format == "xywh":
            wrong |= (boxes[:, 2:] < 0).any(1)
            boxes = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
            wrong |= (boxes > 1.02 * edge + 2).any(1)
        wrong |= (boxes[:, 2:] < boxes[:, :2]).any(1)
        if wrong.any():
            shown = ", ".join(f"{v:g}" for v in np.asarray(item.boxes, np.float32).reshape(-1, 4)[wrong][0])
            raise InputError(
                f"boxes of {self.name} are not {self.box_format}: {item.name} of {size[0]} x {size[1]} pixels has ({shown}); "
                f"try box_format={other!r}"
            )
        if len(boxes) and boxes.max() <= 1 and min(size) > 2:
            raise InputError(f"boxes of {self.name} are shares of the image ({item.name}): give them in pixels")
        return boxes

    def _scenes(self, batch: int) -> Iterator[Batch]:
        total = self.count or 1000
        for first in range(0, total, batch):
            n = min(batch, total - first)
            truth = scenes.render(n, self.size, seed=self.seed, first=FIRST_SCENE + first, difficulty=self.difficulty)
            boxes = [b[b.isfinite().all(1)].numpy() for b in truth.boxes]
            names = [f"scene {i}" for i in range(first, first + n)]
            yield Batch(truth.pixels, names, truth.label.tolist(), boxes, list(truth.semantic.numpy()), truth)

    def _prepare(self, item: Item) -> tuple[str, Tensor, Any, np.ndarray, np.ndarray | None] | None:
        try:
            image = self.decode(item)
        except OSError as error:
            self.skipped.append(f"{item.name} ({error})" if "million" in str(error) else item.name)
            return None
        pixels, scale, corner = self.preparation.apply(image, self.size)
        array = torch.from_numpy(np.asarray(pixels, np.float32) / 255).permute(2, 0, 1)
        labels, boxes = self._mask(item, image.size), np.zeros((0, 4), np.float32)
        try:
            boxes = self.true_boxes(item, image.size)
        except (ValueError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            self._leave(item)
        moved = boxes[:, [1, 0, 3, 2]] * np.tile(scale, 2) - np.tile(corner, 2)
        moved = np.clip(moved, 0, np.tile(self.size, 2)).astype(np.float32)
        moved = moved[(moved[:, 2] > moved[:, 0]) & (moved[:, 3] > moved[:, 1])]
        return item.name, array, item.label, moved, labels

    def _mask(self, item: Item, size: tuple[int, int]) -> np.ndarray | None:
        """The mask of an item at the size of the stream; None if it has none or one that does not fit."""
        if (data := encoded(item.mask)) is None:
            return None
        try:
            mask = decoding.read(data).image
        except OSError:
            self._leave(item)
            return None
        if mask.size != size or len(mask.getbands()) > 1:  # one class per pixel
            self._leave(item)
            return None
        classes = np.asarray(self.preparation.apply(mask, self.size, labels=True)[0])
        return classes if self.last_object is None else np.where(classes > self.last_object, 0, classes)

    def _leave(self, item: Item) -> None:
        if item.name not in self.unused:
            self.unused.append(item.name)


def background_share(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Share of background (mask 0) in every patch of a grid (rows, columns): mask (H, W) → (patches,) in [0, 1]."""
    (rows, columns), (height, width) = grid, mask.shape
    cells = (mask == 0).reshape(rows, height // rows, columns, width // columns)
    return np.asarray(cells.mean((1, 3))).ravel()


def open_images(
    source: str | Path | Sequence[Image.Image],
    *,
    size: int | tuple[int, int],
    count: int | None = None,
    seed: int = 0,
    split: str | None = None,
    preparation: Preparation | None = None,
    image_column: str | None = None,
    box_format: str = "xyxy",
    full_scale: float | None = None,
    last_object: int | None = None,
) -> Images:
    """Open a source of images: nothing is decoded yet.

    Args:
        source: "scenes", "photographs" (seven that installed packages ship, see `vitregs.data.photographs.table`), an
            image, a folder, a parquet file or folder of them, a data set's name on the hub, or images that are open
            already.
        size: Side or (height, width) in pixels.
        count: The most images that are drawn, None for all.
        seed: Draws which.
        split: Part of the source, None for the first of validation, valid, val, test and train.
        preparation: How images are resized and cropped, None for the centre with bicubic interpolation.
        image_column: Column that holds the images, None to find it by its type.
        box_format: "xyxy" (corners) or "xywh" (corner, width and height), in pixels of the original.
        full_scale: The value that is white in images of more than 8 bits, None to go by type and metadata.
        last_object: The highest class of a mask that is an object (91 in COCO, whose other classes are sky, grass, walls
            and the like), None if all are; pixels of higher classes become background, 0.

    Returns:
        The images, to be read as often as wanted.

    Raises:
        InputError: For sources that do not exist or hold no images, and for values that make no sense.

    Example:
        >>> import vitregs as vr
        >>> vr.open_images("scenes", size=(64, 96), count=2).size
        (64, 96)
    """
    shape = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(shape) != 2 or not all(isinstance(n, Integral) for n in shape):
        raise InputError(f"size is a side, or (height, width), in whole pixels, not {size!r}")
    if min(shape) < 1:
        raise InputError(f"size must be 1 pixel or more, not {shape[0]}x{shape[1]}")
    if count is not None and (not isinstance(count, Integral) or count < 1):
        raise InputError(f"count must be a whole number, 1 or more, not {count!r}")
    if box_format not in BOX_FORMATS:
        raise unknown("box format", box_format, BOX_FORMATS)
    if full_scale is not None and not full_scale > 0:
        raise InputError(f"full_scale must be above 0, not {full_scale}")
    if not isinstance(source, str | Path | list | tuple):
        raise InputError(f"a source is a folder, a name or a list of PIL images, not {type(source).__name__}")
    if not isinstance(source, str | Path):
        return Images("images in memory", shape, count, seed, preparation or Preparation(), Opened(list(source)))
    source = str(source)
    if not source:
        raise InputError("the source of images has an empty name: give a folder, or scenes")
    if source == "scenes":
        if split is not None:
            raise InputError(f"scenes have no splits, so no {split!r}: leave the split away")
        return Images(source, shape, count, seed, preparation or Preparation(), None)
    found = open_source(source, split, image_column)
    odd = [name for name in found.passed if Path(name).suffix.lower() not in NOTES]
    if odd:
        what = "1 file" if len(odd) == 1 else f"{len(odd)} files"
        warnings.warn(f"passed over {what} in {source} that cannot be used as images: {listed(odd)}", stacklevel=2)
    if split is None and found.others:
        warnings.warn(
            f"{source} has splits: {found.split} is taken, not {', '.join(found.others)} (choose with split)",
            stacklevel=2,
        )
    options: dict[str, Any] = {"box_format": box_format, "full_scale": full_scale, "last_object": last_object}
    return Images(source, shape, count, seed, preparation or Preparation(), found, **options)


def chain(parts: Sequence[Images]) -> Images:
    """Put streams one after the other: a training part before its test part, for probes that train on the first images.

    Args:
        parts: Streams of images of one size, prepared in the same way and drawn by the same seed.

    Returns:
        One stream; its background, boxes and masks are those of the parts.

    Raises:
        InputError: For scenes, whose number alone says which they are, and parts of different sizes or preparations.
    """
    first = parts[0]
    sources = [(p.source, p.count) for p in parts if p.source is not None]
    if len(sources) < len(parts):
        raise InputError("scenes are one stream: ask for more of them instead of joining some")
    bare = [replace(p, name="", count=None, source=None, skipped=[], unused=[]) for p in parts]
    if any(p != bare[0] for p in bare):
        raise InputError(f"parts of {first.name} differ in more than their images: open them with the same options")
    counts = [p.count for p in parts]
    total = None if None in counts else sum(c for c in counts if c is not None)
    return replace(first, source=Chain(sources), count=total, skipped=[], unused=[])
