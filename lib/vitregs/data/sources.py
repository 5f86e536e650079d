"""Where images lie: a file, a folder, parquet files, installed packages or a hub name; read lazily, keyed on content."""

import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from vitregs.cache import file_hash
from vitregs.data import decoding, photographs
from vitregs.errors import InputError, extra
from vitregs.hub import hub

NAMED = ("scenes", "photographs")  # sources by a name of ours, which go before files of that name
SPLITS = ("validation", "valid", "val", "test", "train")  # the first that exists is the default
WORDS = (*SPLITS, "dev", "testing", "training")  # what names of files and folders call a split

# endings of files that users keep beside images and nobody takes for some: passed over without a warning
NOTES = {
    ".txt",
    ".md",
    ".rst",
    ".json",
    ".jsonl",
    ".csv",
    ".tsv",
    ".xml",
    ".yaml",
    ".yml",
    ".html",
    ".py",
    ".ipynb",
    ".log",
    "",
}
ONE = "all"  # the set of files that name no split
IMAGES = (
    "image",
    "img",
    "webp",
    "jpg",
    "png",
)  # columns, as data sets name them; the last three are those of webdataset
LABELS = ("label", "fine_label", "labels", "cls", "npy")
BOXES, MASKS = ("boxes", "box", "bboxes", "bbox"), ("mask", "annotation")
SHUFFLE = 1000  # images in the shuffle buffer of a source that can only be streamed


@dataclass
class Item:
    """One encoded image of a source."""

    name: str
    data: bytes | Path
    label: Any = None
    boxes: Any = None  # in pixels of the original, as the data set has them
    mask: Any = None


class Source(Protocol):
    """A list of encoded images that is read lazily."""

    passed: list[str]  # what lies there and is not used
    others: list[str]  # splits that are not used
    classes: list[str]  # names in the order of integer labels; empty where none are named

    def fingerprint(self, count: int | None, seed: int) -> str:
        """Hash the content of what `items` yields."""
        ...

    def items(self, count: int | None, seed: int) -> Iterator[Item]:
        """Yield images in the order drawn by the seed, at most `count`."""
        ...


def content(file: Path) -> str:
    """Hash a file's content: path → SHA-256 as 64 hexadecimal digits; a file that did not change is read once a process."""
    try:
        found = file.stat()
        return _content(file, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    except OSError:
        return "cannot be read"


@cache
def _content(file: Path, *_state: int) -> str:
    return file_hash(file)


def _digest(facts: object) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def walk(root: Path) -> list[Path]:
    """Files below a folder, in order; links to folders are followed, hidden files and folders are left out."""
    found: list[Path] = []

    def enter(folder: Path, above: frozenset[Path]) -> None:
        real = folder.resolve()
        if real in above:  # a link back to where we come from
            return
        try:
            inside = sorted(folder.iterdir())
        except OSError as error:
            raise InputError(f"cannot read the folder {folder}: {error.strerror}") from error
        for path in inside:
            if path.name.startswith(".") or path.name == "__MACOSX":
                continue
            if path.is_dir():
                enter(path, above | {real})
            elif path.is_file():
                found.append(path)

    enter(root, frozenset())
    return found


def split_of(file: Path) -> str:
    """Split that a path names, the file before its folders: relative path → the word, what stands before a shard's number
    (NAME-00000-of-00002), or ONE."""
    for part in (file.name, *reversed(file.parts[:-1])):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in WORDS:
                return word
    sharded = re.match(r"(.+?)-\d+-of-\d+", file.name)
    return sharded[1] if sharded else ONE


def choose(wanted: str | None, there: Sequence[str], name: str) -> str:
    """Choose a split: asked for (None: the first of SPLITS), those that exist, the source → split. Raises InputError if it is not
    there."""
    if wanted is not None and wanted not in there:
        if set(there) <= {ONE}:
            raise InputError(f"{name} has no splits, so no {wanted!r}: leave the split away")
        raise InputError(f"{name} has no split {wanted!r}, only {', '.join(sorted(set(there) - {ONE}))}")
    return wanted or next((s for s in SPLITS if s in there), there[0])


def listed(names: Sequence[str], most: int = 3) -> str:
    """Name the first few: → "a, b, c …"."""
    return ", ".join(names[:most]) + (" …" if len(names) > most else "")


class Folder:
    """Images below a folder, or one file; an image's label is the name of its subfolder.

    A folder that holds nothing but folders named like splits has splits.
    """

    def __init__(self, root: Path, split: str | None = None, files: Sequence[Path] | None = None) -> None:
        """Open a folder or an image: path, split, its files where they are known.

        Raises InputError for no images, or no such split.
        """
        files = walk(root) if files is None else files
        self.root, self.classes = root, list[str]()
        used = [p for p in files if p.suffix.lower() in decoding.suffixes()]
        self.passed = [str(p.relative_to(root)) for p in files if p.suffix.lower() not in decoding.suffixes()]
        if not used:
            raise _empty(root, files, str(root))
        if root.is_file():
            self.root = root.parent
        folders = _split_folders(self.root, used)
        self.split = choose(split, sorted(folders) or [ONE], str(root))
        self.others = sorted(folders.keys() - {self.split})
        self.root = folders.get(self.split, self.root)
        self.files = [p for p in used if p.is_relative_to(self.root)]

    def _drawn(self, count: int | None, seed: int) -> list[Path]:
        return [self.files[i] for i in np.random.default_rng(seed).permutation(len(self.files))[:count]]

    def fingerprint(self, count: int | None, seed: int) -> str:
        """Hash names and content of the images drawn."""
        return _digest(sorted((str(p.relative_to(self.root)), content(p)) for p in self._drawn(count, seed)))

    def items(self, count: int | None, seed: int) -> Iterator[Item]:
        """Yield images in the order drawn by the seed."""
        for file in self._drawn(count, seed):
            nested = file.parent != self.root
            yield Item(str(file.relative_to(self.root)), file, file.parent.name if nested else None)


class Opened:
    """Images that are open already, in their own order whatever the seed."""

    def __init__(self, images: Sequence[Image.Image]) -> None:
        """Take images. Raises InputError for an empty list and for what is no image of PIL."""
        if not images:
            raise InputError("the list of images is empty")
        for image in images:
            if not isinstance(image, Image.Image):
                raise InputError(f"a list of images holds PIL images, not {type(image).__name__}")
        self.images = images
        self.passed, self.others, self.classes = list[str](), list[str](), list[str]()

    def fingerprint(self, count: int | None, seed: int) -> str:
        """Hash the pixels of the images."""
        return _digest([hashlib.sha256(item.data).hexdigest() for item in self.items(count, seed)])  # type: ignore[arg-type]

    def items(self, count: int | None, seed: int) -> Iterator[Item]:
        """Yield the first images, encoded without loss."""
        for i, image in enumerate(self.images[:count]):
            plain = image if image.mode in ("1", "L", "P", "RGB", "RGBA", "I", "I;16", "F") else image.convert("RGB")
            file = io.BytesIO()
            plain.save(file, format="TIFF" if plain.mode == "F" else "PNG")
            yield Item(f"image {i}", file.getvalue())


class Photographs:
    """The photographs that installed packages ship; those drawn by the seed come in the order of their table."""

    def __init__(self) -> None:
        """Find them. Raises InputError for packages that lack one of them, or are missing."""
        self.files, self.split = photographs.files(), ONE
        self.passed, self.others, self.classes = list[str](), list[str](), list[str]()

    def _drawn(self, count: int | None, seed: int) -> list[tuple[str, Path]]:
        known = list(self.files.items())
        return [known[i] for i in sorted(np.random.default_rng(seed).permutation(len(known))[:count])]

    def fingerprint(self, count: int | None, seed: int) -> str:
        """Hash names and content of the photographs drawn."""
        return _digest([(name, content(file)) for name, file in self._drawn(count, seed)])

    def items(self, count: int | None, seed: int) -> Iterator[Item]:
        """Yield the photographs drawn by the seed."""
        for name, file in self._drawn(count, seed):
            yield Item(name, file)


class Chain:
    """Sources one after the other, as a training part and a test part: each with how many of its images are drawn."""

    def __init__(self, parts: Sequence[tuple[Source, int | None]]) -> None:
        """Take (source, count) in order; a count of None stands for all."""
        self.parts = parts
        self.passed = [name for source, _ in parts for name in source.passed]
        self.others, self.classes = list[str](), parts[0][0].classes

    def fingerprint(self, count: int | None, seed: int) -> str:
        """Hash the content of the parts, and how many images are drawn of each."""
        return _digest([(source.fingerprint(number, seed), number) for source, number in self.parts])

    def items(self, count: int | None, seed: int) -> Iterator[Item]:
        """Yield the images of each part in the order drawn by the seed, at most `count` in all."""
        drawn = (item for source, number in self.parts for item in source.items(number, seed))
        return islice(drawn, count)


def _split_folders(root: Path, images: Sequence[Path]) -> dict[str, Path]:
    """Folders that are splits: root, its images → {split: folder}; empty unless all images lie in such."""
    tops = {root / p.relative_to(root).parts[0] for p in images}
    splits = {top.name.lower().removeprefix("split="): top for top in sorted(tops) if top.is_dir()}
    return splits if len(splits) == len(tops) and splits.keys() <= set(WORDS) else {}


class Hub:
    """A `datasets` source: local parquet files (random access on disk) or a hub name (streamed)."""

    def __init__(self, name: str, split: str | None, column: str | None = None, files: Sequence[Path] = ()) -> None:
        """Open a source: a path or a hub name, split (None: the first of SPLITS), column with the images (None: found by its
        type), its parquet files."""
        with extra("hub", "reading parquet files and hub data sets"):
            import datasets  # noqa: F401
        self.name, self.passed, self.others = name, list[str](), list[str]()
        self.files: list[Path] = []  # those of the split
        self.revision: str | None = None  # commit of a data set on the hub, where it tells it
        try:
            self.rows, self.split = self._local(files, split) if files else self._remote(split)
        except InputError:
            raise
        except Exception as error:  # hub clients and parquet readers raise many kinds
            what = "it is not parquet, or damaged" if files else "nothing of that name here, and the hub gives no data "
            what += "" if files else "set of that name (no network, or no such name)"
            raise InputError(f"cannot load images from {name!r}: {what}") from error
        self._columns(column)

    def _columns(self, column: str | None) -> None:
        import datasets

        features = dict(self.rows.features or {})
        fit = {key: _rank(key, kind) for key, kind in features.items() if _holds_images(kind)}
        if column is not None and column not in fit:
            other = f"its image columns are {', '.join(fit)}" if fit else f"it has only {', '.join(features)}"
            raise InputError(f"{self.name} has no image column {column!r}: {other}")
        if not fit:
            raise InputError(
                f"{self.name} has no image column, only {', '.join(features)} (an Image, or the bytes of image files)"
            )
        self.column = column or self._best(sorted(fit, key=lambda key: fit[key]), features)
        fits = (lambda _kind: True, _holds_numbers, _holds_images)
        self.keys = [
            next((k for k in names if k in features and k != self.column and test(features[k])), None)
            for names, test in zip((LABELS, BOXES, MASKS), fits, strict=True)
        ]
        for key in (self.column, self.keys[2]):
            if key and isinstance(features[key], datasets.Image):
                self.rows = self.rows.cast_column(key, datasets.Image(decode=False))
        self.classes: list[str] = list(getattr(features.get(self.keys[0]), "names", None) or [])

    def _best(self, names: list[str], features: dict[str, Any]) -> str:
        """The first column that is an Image, or of bytes those that decode in the first rows."""
        import datasets

        if len(names) == 1 or isinstance(features[names[0]], datasets.Image):
            return names[0]
        rows = list(islice(self.rows, 4))
        return next((n for n in names if any(_decodes(row[n]) for row in rows)), names[0])

    def _local(self, files: Sequence[Path], split: str | None) -> tuple[Any, str]:
        import datasets

        root, groups = Path(self.name), dict[str, list[Path]]()
        for file in files:
            groups.setdefault(split_of(file.relative_to(root) if root.is_dir() else Path(file.name)), []).append(file)
        chosen = choose(split, list(groups), self.name)
        if split is None and ONE in groups and len(groups) > 1:  # beside named splits, a file without one is no set
            self.passed = [str(f.relative_to(root)) for f in groups.pop(ONE)]
            chosen = choose(split, list(groups), self.name)
        self.files = groups[chosen]
        datasets.disable_progress_bars()
        # Its own cache knows a file by path and time alone, and gives old rows for one exchanged under the same time
        cache = Path(datasets.config.HF_DATASETS_CACHE) / _digest([content(f) for f in self.files])
        names = [str(f) for f in self.files]
        return datasets.Dataset.from_parquet(
            names, cache_dir=str(cache)
        ), chosen  # load_dataset would report to the hub

    def _remote(self, split: str | None) -> tuple[Any, str]:
        import datasets
        from huggingface_hub import HfApi

        with hub() as alive:
            chosen = choose(split, datasets.get_dataset_split_names(self.name), self.name)
            if alive:
                self.revision = HfApi().dataset_info(self.name).sha
            rows = datasets.load_dataset(self.name, split=chosen, streaming=True, revision=self.revision)
            return rows, chosen

    def fingerprint(self, count: int | None, seed: int) -> str:
        """Hash the content of the split's files, or the name and commit of a data set on the hub."""
        facts: list[object] = [(f.name, content(f)) for f in self.files] or [self.name, self.revision]
        return _digest([facts, self.split, self.column])

    def items(self, count: int | None, seed: int) -> Iterator[Item]:
        """Yield images in the order drawn by the seed."""
        if hasattr(self.rows, "select"):
            rows: Any = self.rows.select(np.random.default_rng(seed).permutation(len(self.rows))[:count])
        else:
            rows = islice(self.rows.shuffle(seed=seed, buffer_size=SHUFFLE), count)
        label, boxes, mask = self.keys
        for i, row in enumerate(rows):
            cell = row[self.column]
            name = row.get("name") or (cell or {}).get("path") if isinstance(cell, dict) else row.get("name")
            named = str(name or f"{self.split} {i}")
            yield Item(named, encoded(cell) or Path("missing"), *(row[k] if k else None for k in (label, boxes, mask)))


def encoded(cell: Any) -> bytes | Path | None:
    """What a cell holds of an image: bytes, or {bytes, path} → bytes or path; None if nothing."""
    if isinstance(cell, dict):
        return cell.get("bytes") or (Path(cell["path"]) if cell.get("path") else None)
    return cell if isinstance(cell, bytes) else None


def _decodes(cell: Any) -> bool:
    try:
        data = encoded(cell)
        return data is not None and bool(decoding.read(data))
    except OSError:
        return False


def _holds_images(kind: Any) -> bool:
    """Whether a column can hold images by its type: an Image, bytes, or a struct with bytes."""
    import datasets

    if isinstance(kind, dict):
        return "bytes" in kind and _holds_images(kind["bytes"])
    return isinstance(kind, datasets.Image) or getattr(kind, "dtype", "") in ("binary", "large_binary")


def _holds_numbers(kind: Any) -> bool:
    while not isinstance(kind, dict) and (inner := getattr(kind, "feature", None)) is not None:
        kind = inner
    return not isinstance(kind, dict) and getattr(kind, "dtype", "").startswith(("float", "int", "uint", "double"))


def _rank(name: str, kind: Any) -> tuple[bool, bool, int]:
    """Order among columns that can hold images: those typed so first, then no masks, then usual names."""
    import datasets

    usual = name.lower()
    return (
        not isinstance(kind, datasets.Image),
        usual in MASKS,
        IMAGES.index(usual) if usual in IMAGES else len(IMAGES),
    )


def open_source(name: str, split: str | None = None, column: str | None = None) -> Folder | Hub | Photographs:
    """Open a source: "photographs", an image, a folder, a parquet file or folder of them, or a hub name; split; image column
    → Folder, Hub or Photographs.

    Raises InputError for sources that do not exist or hold no images, and splits and columns that are not there.
    """
    if name == "photographs":
        if split is not None or column is not None:
            raise InputError(f"photographs have no splits and no columns, so no {split or column!r}: leave it away")
        return Photographs()
    check(name)
    path = Path(name).expanduser()
    if path.is_dir():
        files = walk(path)
        parquet = [f for f in files if f.suffix.lower() == ".parquet"]
        images = [f for f in files if f.suffix.lower() in decoding.suffixes()]
        useful = [f for f in parquet if _has_images(f)]
        if parquet and (useful or not images):
            source = Hub(str(path), split, column, useful or parquet)
            source.passed += [str(f.relative_to(path)) for f in files if useful and f not in useful]
            return source
        return _plain(path, split, column, files)
    if path.is_file():
        if path.suffix.lower() in decoding.suffixes():
            return _plain(path, split, column, [path])
        return Hub(str(path), split, column, [path])
    return Hub(name, split, column)


def check(name: str) -> None:
    """Raise InputError for a path that does not exist, a folder without images, an address; names of data sets pass unasked.

    For photographs, raise it for packages that lack one of them.
    """
    if name == "photographs":
        photographs.files()
        return
    if "://" in name:
        raise InputError(f"{name} is an address: give a local folder or file, or a data set's name on the hub")
    path = Path(name).expanduser()
    if path.is_dir():
        files = walk(path)
        if not any(f.suffix.lower() in decoding.suffixes() or f.suffix.lower() == ".parquet" for f in files):
            raise _empty(path, files, name)
    elif not path.exists() and (path.suffix == ".parquet" or name.startswith(("/", "./", "../", "~"))):
        raise InputError(f"no folder or file {name}")


def _empty(root: Path, files: Sequence[Path], name: str) -> InputError:
    also = f", only {listed([str(f.relative_to(root)) for f in files])}" if files else ""
    return InputError(f"no images in {name}{also} (looked for .jpg, .png, .parquet and what else Pillow reads)")


def split_names(path: Path) -> list[str]:
    """Splits that a local source has: path → names, in the order in which one is taken by default; empty for none."""
    files = walk(path) if path.is_dir() else [path]
    images = [f for f in files if f.suffix.lower() in decoding.suffixes()]
    parquet = [f for f in files if f.suffix.lower() == ".parquet" and _has_images(f)]
    root = path if path.is_dir() else path.parent
    found = {split_of(f.relative_to(root)) for f in parquet} - {ONE} if parquet else set(_split_folders(root, images))
    return sorted(found, key=lambda s: (SPLITS.index(s) if s in SPLITS else len(SPLITS), s))


def _plain(path: Path, split: str | None, column: str | None, files: Sequence[Path]) -> Folder:
    if column is not None:
        raise InputError(f"{path} holds image files, which have no columns: leave the image column away")
    return Folder(path, split, files)


def _has_images(file: Path) -> bool:
    """Whether a parquet file may have an image column; one that is damaged may."""
    with extra("hub", "reading parquet files and hub data sets"):
        import datasets
        import pyarrow.parquet

    try:
        features = datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(file))
    except Exception:  # damaged, or of types that datasets does not know: opening it will say so
        return True
    return any(map(_holds_images, features.values()))
