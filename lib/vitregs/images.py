"""Pixels with names, labels, boxes and masks from scenes, a folder of pictures, or a Hugging Face `datasets` source.

Pictures are decoded one batch at a time. Grey, palette, RGBA and 16-bit pictures become RGB, EXIF rotation is applied,
and what cannot be decoded is skipped, counted and said aloud.
"""

import hashlib
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from vitregs import scenes
from vitregs.problems import Problem, extra, hub

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SPLITS = ("validation", "valid", "val", "test", "train")  # the first that exists is the default
PICTURES = ("image", "img", "webp", "jpg")  # columns, as data sets name them; the last two are those of webdataset
LABELS, BOXES, MASKS = ("label", "fine_label", "labels", "cls", "npy"), ("boxes", "box"), ("mask", "annotation")
FIRST_SCENE = 2**41  # far behind every scene that a training run sees
SHUFFLE = 1000  # pictures in the shuffle buffer of a source that can only be streamed


@dataclass
class Batch:
    """Some pictures of one size: pixels (n, 3, H, W) in [0, 1] and, for each, what is known of it."""

    pixels: Tensor
    names: list[str]
    labels: list[Any]  # class index or name; None where unknown
    boxes: list[np.ndarray]  # (objects, 4) y0, x0, y1, x1 in pixels of this batch
    masks: list[np.ndarray | None]  # (H, W) class per pixel, 0 unlabelled
    truth: scenes.Scenes | None = None


@dataclass
class Item:
    """One encoded picture of a source."""

    name: str
    data: bytes | Path
    label: Any = None
    boxes: Any = None  # x0, y0, x1, y1 in pixels of the original, as data sets have them
    mask: Any = None


class Source(Protocol):
    """A list of encoded pictures that is read lazily."""

    fingerprint: str

    def items(self, count: int | None, seed: int) -> Iterator[Item]:
        """Yield pictures in the order drawn by the seed, at most `count`."""
        ...


@dataclass
class Folder:
    """Pictures below a folder; a picture's label is the name of its subfolder."""

    root: Path

    def __post_init__(self) -> None:
        if self.root.is_file():  # one image
            self.root, self.files = self.root.parent, [self.root]
        else:
            self.files = sorted(p for p in self.root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not self.files:
            raise Problem(f"no pictures in {self.root} (looked for {', '.join(SUFFIXES)} and .parquet)")
        listing = [(str(p.relative_to(self.root)), p.stat().st_size) for p in self.files]
        self.fingerprint = hashlib.sha256(repr(listing).encode()).hexdigest()[:12]

    def items(self, count: int | None, seed: int) -> Iterator[Item]:
        """Yield pictures in the order drawn by the seed."""
        for i in np.random.default_rng(seed).permutation(len(self.files))[:count]:
            file = self.files[i]
            nested = file.parent != self.root
            yield Item(str(file.relative_to(self.root)), file, file.parent.name if nested else None)


class Hub:
    """A `datasets` source: local parquet files (random access on disk) or a hub name (streamed)."""

    def __init__(self, name: str, split: str | None) -> None:
        """Open a source: a parquet file, a folder of them or a hub name, and its split (None: the first of SPLITS)."""
        with extra("hub", "reading parquet files and hub data sets"):
            import datasets
        self.name = name
        path = Path(name)
        files = [path] if path.is_file() else sorted(path.glob("*.parquet")) if path.is_dir() else []
        try:
            self.rows, self.split = self._local(files, split) if files else self._remote(split)
        except Problem:
            raise
        except Exception as error:  # hub clients and parquet readers raise many kinds
            what = "it is not parquet, or damaged" if files else "nothing of that name here, and the hub gives no data "
            what += "" if files else "set of that name (no network, or no such name)"
            raise Problem(f"cannot load pictures from {name!r}: {what}") from error
        columns = list(self.rows.features or {})
        found = next((c for c in PICTURES if c in columns), None)
        if found is None:
            raise Problem(f"{name} has no image column, only {', '.join(columns)}")
        self.column = found
        for key in [self.column, *(m for m in MASKS if m in columns)]:
            self.rows = self.rows.cast_column(key, datasets.Image(decode=False))
        self.keys = [next((k for k in options if k in columns), None) for options in (LABELS, BOXES, MASKS)]
        names = getattr((self.rows.features or {}).get(self.keys[0]), "names", None)
        self.classes: list[str] = list(names or [])  # in the order of integer labels; empty where none are named
        facts: list[object] = [(f.name, f.stat().st_size) for f in files] or [name]
        self.fingerprint = hashlib.sha256(repr([facts, self.split]).encode()).hexdigest()[:12]

    def _local(self, files: list[Path], split: str | None) -> tuple[Any, str]:
        import datasets

        groups: dict[str, list[str]] = {}
        for file in files:
            groups.setdefault(file.name.split("-")[0].removesuffix(".parquet"), []).append(str(file))
        chosen = _split(split, list(groups), self.name)
        datasets.disable_progress_bars()
        return datasets.Dataset.from_parquet(groups[chosen]), chosen  # load_dataset would report to the hub

    def _remote(self, split: str | None) -> tuple[Any, str]:
        import datasets

        with hub():
            chosen = _split(split, datasets.get_dataset_split_names(self.name), self.name)
            return datasets.load_dataset(self.name, split=chosen, streaming=True), chosen

    def items(self, count: int | None, seed: int) -> Iterator[Item]:
        """Yield pictures in the order drawn by the seed."""
        if hasattr(self.rows, "select"):
            rows: Any = self.rows.select(np.random.default_rng(seed).permutation(len(self.rows))[:count])
        else:
            rows = islice(self.rows.shuffle(seed=seed, buffer_size=SHUFFLE), count)
        label, boxes, mask = self.keys
        for i, row in enumerate(rows):
            cell = row[self.column] or {}
            data = cell.get("bytes") or Path(cell.get("path") or "missing")
            name = str(row.get("name") or cell.get("path") or f"{self.split} {i}")
            yield Item(name, data, *(row[k] if k else None for k in (label, boxes, mask)))


def _split(wanted: str | None, there: Sequence[str], name: str) -> str:
    if wanted is not None and wanted not in there:
        raise Problem(f"{name} has no split {wanted!r}, only {', '.join(there)}")
    return wanted or next((s for s in SPLITS if s in there), there[0])


@dataclass
class Images:
    """A stream of pictures of one size; `skipped` fills while it is read."""

    name: str
    size: tuple[int, int]
    count: int | None
    seed: int
    crop: float
    source: Source | None  # None: scenes
    difficulty: scenes.Difficulty = field(default_factory=scenes.Difficulty)
    skipped: list[str] = field(default_factory=list)

    @property
    def key(self) -> dict[str, Any]:
        """What decides the pixels, for the key of a stored result."""
        found = "scenes" if self.source is None else self.source.fingerprint
        facts = {"images": found, "size": self.size, "count": self.count, "seed": self.seed, "crop": self.crop}
        return facts | ({"difficulty": repr(self.difficulty)} if self.source is None else {})

    def pixels(self, batch: int = 32) -> Iterator[Tensor]:
        """Yield pixels (n, 3, H, W) in [0, 1], at most `batch` pictures at a time."""
        for part in self.batches(batch):
            yield part.pixels

    def batches(self, batch: int = 32) -> Iterator[Batch]:
        """Yield pictures with what is known of them, at most `batch` at a time.

        Raises Problem if not one can be decoded; warns at the end if some could not.
        """
        if batch < 1:
            raise Problem(f"batch must be 1 or more, not {batch}")
        if self.source is None:
            yield from self._scenes(batch)
            return
        self.skipped.clear()
        done, rows = 0, self.source.items(self.count, self.seed)
        while chunk := list(islice(rows, batch)):
            good = [item for item in map(self._decode, chunk) if item is not None]
            done += len(good)
            if good:
                names, pixels, labels, boxes, masks = map(list, zip(*good, strict=True))
                yield Batch(torch.stack(pixels), names, labels, boxes, masks)
        if not done:
            raise Problem(f"not one picture of {self.name} can be decoded ({len(self.skipped)} tried)")
        if self.skipped:
            warnings.warn(
                f"skipped {len(self.skipped)} of {done + len(self.skipped)} pictures of {self.name} that cannot be "
                f"decoded: {', '.join(self.skipped[:3])}{' …' if len(self.skipped) > 3 else ''}",
                stacklevel=2,
            )

    def background(self, grid: tuple[int, int]) -> np.ndarray | None:
        """Share of background (mask 0) in every patch of a grid (rows, columns): → (pictures, patches) in [0, 1], or None if not
        all pictures have masks."""
        (rows, columns), (height, width) = grid, self.size
        shares = []
        for batch in self.batches():
            for mask in batch.masks:
                if mask is None:
                    return None
                cut = (mask == 0).reshape(rows, height // rows, columns, width // columns)
                shares.append(cut.mean((1, 3)).ravel())
        return np.stack(shares)

    def _scenes(self, batch: int) -> Iterator[Batch]:
        total = self.count or 1000
        for first in range(0, total, batch):
            n = min(batch, total - first)
            truth = scenes.render(n, self.size, seed=self.seed, first=FIRST_SCENE + first, difficulty=self.difficulty)
            boxes = [b[b.isfinite().all(1)].numpy() for b in truth.boxes]
            names = [f"scene {i}" for i in range(first, first + n)]
            yield Batch(truth.pixels, names, truth.label.tolist(), boxes, list(truth.semantic.numpy()), truth)

    def _decode(self, item: Item) -> tuple[str, Tensor, Any, np.ndarray, np.ndarray | None] | None:
        try:
            picture = decode(item.data)
            mask = None if not item.mask else _open(item.mask.get("bytes") or Path(item.mask["path"]))
            boxes = np.asarray(item.boxes if item.boxes is not None else [], np.float32).reshape(-1, 4)
            if mask is not None and (mask.size != picture.size or len(mask.getbands()) > 1):
                raise ValueError("the mask is not one class per pixel of the picture")
        except (OSError, ValueError, TypeError):
            self.skipped.append(item.name)
            return None
        pixels, scale, corner = fit(picture, self.size, self.crop, Image.Resampling.BICUBIC)
        array = torch.from_numpy(np.asarray(pixels, np.float32) / 255).permute(2, 0, 1)
        labels = None if mask is None else np.asarray(fit(mask, self.size, self.crop, Image.Resampling.NEAREST)[0])
        moved = boxes[:, [1, 0, 3, 2]] * np.tile(scale, 2) - np.tile(corner, 2)
        moved = np.clip(moved, 0, np.tile(self.size, 2)).astype(np.float32)
        moved = moved[(moved[:, 2] > moved[:, 0]) & (moved[:, 3] > moved[:, 1])]
        return item.name, array, item.label, moved, labels


def _open(data: bytes | Path) -> Image.Image:
    try:
        picture = Image.open(io.BytesIO(data if isinstance(data, bytes) else data.read_bytes()))
        picture.load()
        return ImageOps.exif_transpose(picture)
    except Exception as error:  # the decoders of damaged data raise many kinds
        raise OSError("not a picture, or a damaged one") from error


def decode(data: bytes | Path) -> Image.Image:
    """Decode a picture to upright RGB: bytes or path → image. Raises OSError for damaged data.

    Greys of 16 bits are scaled to 8; transparency is dropped.
    """
    picture = _open(data)
    if picture.mode.startswith("I"):  # 16 bits of grey, in 16 or 32
        grey = np.asarray(picture, np.float64) / 257
        picture = Image.fromarray(grey.clip(0, 255).round().astype(np.uint8))
    elif picture.mode == "F":  # floats of unknown range: 0 to 1, 255 or 65535
        grey = np.nan_to_num(np.asarray(picture, np.float64))
        top = next((t for t in (1.0, 255.0) if grey.max() <= t), 65535.0)
        picture = Image.fromarray((grey / top * 255).clip(0, 255).round().astype(np.uint8))
    return picture.convert("RGBA").convert("RGB") if picture.mode == "P" else picture.convert("RGB")


def fit(
    picture: Image.Image, size: tuple[int, int], crop: float, how: Image.Resampling
) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """Resize and crop the centre as timm's evaluation does: picture, (height, width), share kept, resampling → picture,
    scale (y, x) and corner (y, x) of the crop in resized pixels."""
    height, width = size
    factor = max(int(height / crop) / picture.height, int(width / crop) / picture.width)
    tall, wide = max(height, int(picture.height * factor + 1e-6)), max(width, int(picture.width * factor + 1e-6))
    resized = picture.resize((wide, tall), how)
    top, left = round((tall - height) / 2), round((wide - width) / 2)
    scale = np.array([tall / picture.height, wide / picture.width], np.float32)
    return resized.crop((left, top, left + width, top + height)), scale, np.array([top, left], np.float32)


def load(
    source: str,
    *,
    size: int | tuple[int, int],
    count: int | None = None,
    seed: int = 0,
    split: str | None = None,
    crop: float = 1.0,
) -> Images:
    """Open a source of pictures: "scenes", an image, a folder, a parquet file or folder of them, or a hub name → Images.

    `size` in pixels (side or (height, width)); `count` limits the pictures; `seed` draws which. Raises Problem for
    sources that do not exist or hold no pictures, and for sizes, counts, splits and crops that make no sense.
    """
    shape = (size, size) if isinstance(size, int) else size
    if min(shape) < 1:
        raise Problem(f"size must be 1 pixel or more, not {shape[0]}x{shape[1]}")
    if count is not None and count < 1:
        raise Problem(f"count must be 1 or more, not {count}")
    if not 0 < crop <= 1:
        raise Problem(f"crop must be a share above 0 and up to 1, not {crop}")
    found: Source | None = None
    if source != "scenes":
        path = Path(source).expanduser()
        if (path.is_dir() and not any(path.glob("*.parquet"))) or (path.suffix.lower() in SUFFIXES and path.is_file()):
            found = Folder(path)
        elif path.suffix == ".parquet" and not path.is_file():
            raise Problem(f"no file {path}")
        elif source.startswith(("/", "./", "../", "~")) and not path.exists():
            raise Problem(f"no folder or file {path}")
        else:
            found = Hub(source if "://" in source else str(path), split)
    return Images(source, shape, count, seed, crop, found)
