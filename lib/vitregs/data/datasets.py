"""Tasks on whole images: fourteen on scenes, and the real data sets of Table 1.

The data sets are named as the hub names them; a folder with parquet files of the same columns serves as well.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitregs.data import images, scenes
from vitregs.data.images import Images
from vitregs.data.preparation import Preparation
from vitregs.data.scenes import Scenes
from vitregs.data.sources import SPLITS, split_names
from vitregs.errors import InputError, unknown

Answer = Callable[[Scenes], np.ndarray]


def _areas(truth: Scenes) -> np.ndarray:
    """Pixels of each object that counts as in view: → (n, 6)."""
    ranks = np.arange(1, scenes.MOST_OBJECTS + 1)
    area = (truth.instances.numpy()[:, None] == ranks[:, None, None]).sum((2, 3))
    return area * _seen(truth)


def _seen(truth: Scenes) -> np.ndarray:
    return truth.boxes[..., 0].isfinite().numpy()


def _of(truth: Scenes, rank: np.ndarray, what: int) -> np.ndarray:
    """Shape (0), colour (1) or texture (2) of one object a scene: depth ranks (n,) → (n,), -1 where none is in view."""
    found = np.take_along_axis(truth.objects[..., what].numpy(), rank[:, None], 1)[:, 0]
    return np.where(_seen(truth).any(1), found, -1)


def _largest(truth: Scenes) -> np.ndarray:
    return _areas(truth).argmax(1)


def _nearest(truth: Scenes) -> np.ndarray:
    return _seen(truth).argmax(1)


def _centres(truth: Scenes) -> np.ndarray:
    """Centre of each object's box: → (n, 6, 2) y, x in [0, 1], nan where it is not in view."""
    box, (height, width) = truth.boxes.numpy(), truth.instances.shape[1:]
    return np.stack([(box[..., 0] + box[..., 2]) / 2 / height, (box[..., 1] + box[..., 3]) / 2 / width], -1)


def _quadrant(truth: Scenes) -> np.ndarray:
    centre = np.take_along_axis(_centres(truth), _largest(truth)[:, None, None], 1)[:, 0]
    return np.where(np.isfinite(centre[:, 0]), 2 * (centre[:, 0] >= 0.5) + (centre[:, 1] >= 0.5), -1).astype(int)


def _before(axis: int) -> Answer:
    """Whether the nearest object lies before the second nearest along y (0) or x (1); -1 with fewer than two in view."""

    def answer(truth: Scenes) -> np.ndarray:
        order = np.argsort(~_seen(truth), axis=1, kind="stable")[:, :2]
        centre = np.take_along_axis(_centres(truth)[..., axis], order, 1)
        return np.where(np.isfinite(centre).all(1), centre[:, 0] < centre[:, 1], -1).astype(int)

    return answer


def _in_view(what: int, classes: int) -> Answer:
    """Which shapes (0) or colours (1) are in view: → (n, classes) bool."""

    def answer(truth: Scenes) -> np.ndarray:
        kinds = truth.objects[..., what].numpy()[..., None] == np.arange(classes)
        return (kinds & _seen(truth)[..., None]).any(1)

    return answer


def _twice(truth: Scenes) -> np.ndarray:
    kinds = truth.objects[..., 1].numpy()[..., None] == np.arange(len(scenes.COLOURS))
    return ((kinds & _seen(truth)[..., None]).sum(1) > 1).any(1).astype(int)


SHAPES, COLOURS = len(scenes.SHAPE_NAMES), len(scenes.COLOUR_NAMES)
SCENES: Mapping[str, Answer] = {
    "colour": lambda t: _of(t, _largest(t), 1),  # of the object with the largest area
    "shape": lambda t: _of(t, _largest(t), 0),
    "colour and shape": lambda t: t.label.numpy(),
    "texture": lambda t: _of(t, _largest(t), 2),
    "nearest colour": lambda t: _of(t, _nearest(t), 1),
    "nearest shape": lambda t: _of(t, _nearest(t), 0),
    "count": lambda t: np.where(_seen(t).any(1), _seen(t).sum(1) - 1, -1),  # class 0 is one object
    "background": lambda t: t.background.numpy(),
    "quadrant": _quadrant,  # of the largest object
    "left or right": _before(1),  # the nearest object of the second nearest
    "above or below": _before(0),
    "a colour twice": _twice,
    "colours in view": _in_view(1, COLOURS),
    "shapes in view": _in_view(0, SHAPES),
}


@dataclass(frozen=True)
class RealSet:
    """A data set of Table 1, or one near at hand: its name on the hub ("": none is known), splits and usual metric."""

    hub: str
    train: str = "train"
    test: str = "test"
    metric: str = "top1"


# Names as public code uses them; only those with a local copy could be tried. Metrics as in Kornblith et al. 2019.
SETS: Mapping[str, RealSet] = {
    "ImageNet-1k": RealSet("ILSVRC/imagenet-1k", test="validation"),
    "Places205": RealSet(""),  # superseded by Places365
    "Aircraft": RealSet("clip-benchmark/wds_fgvc_aircraft", metric="mean per class"),
    "CIFAR-10": RealSet("uoft-cs/cifar10"),
    "CIFAR-100": RealSet("uoft-cs/cifar100"),
    "CUB": RealSet("Donghyun99/CUB-200-2011"),
    "Caltech101": RealSet("dpdl-benchmark/caltech101", metric="mean per class"),
    "Cars": RealSet("tanganke/stanford_cars"),
    "DTD": RealSet("tanganke/dtd"),
    "Flowers": RealSet("dpdl-benchmark/oxford_flowers102", metric="mean per class"),
    "Food101": RealSet("ethz/food101", test="validation"),
    "Pets": RealSet("timm/oxford-iiit-pet", metric="mean per class"),
    "SUN397": RealSet("tanganke/sun397"),
    "VOC2007": RealSet("clip-benchmark/wds_voc2007_multilabel", metric="mAP"),
    "Imagenette": RealSet("frgfm/imagenette", test="validation"),
    "Tiny-ImageNet": RealSet("zh-plus/tiny-imagenet", test="valid"),
}

# Class of ImageNet-1k for each of Imagenette's labels, which are in the order of their WordNet names
IMAGENETTE = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)


def open_set(
    name: str,
    *,
    size: tuple[int, int],
    preparation: Preparation | None = None,
    train_count: int | None = None,
    test_count: int | None = None,
    seed: int = 0,
    folder: str = "",
) -> tuple[Images, Images]:
    """Open a real data set: name in SETS, image size (height, width), how images are prepared, numbers
    of training and test images, a folder with its parquet files instead of the hub → training
    images, test images.

    Raises InputError for unknown names, sets that have no home on the hub, and folders without the splits.
    """
    if name not in SETS:
        raise unknown("data set", name, SETS)
    known = SETS[name]
    if not folder and not known.hub:
        raise InputError(f"no copy of {name} on the hub is known: give a folder of parquet files with its splits")
    if folder and not Path(folder).expanduser().is_dir():
        raise InputError(f"no folder {folder} with {name}")
    return open_parts(
        folder or known.hub,
        (known.train, known.test),
        counts=(train_count, test_count),
        size=size,
        preparation=preparation,
        seed=seed,
    )


def open_parts(
    place: str,
    splits: tuple[str, str],
    *,
    counts: tuple[int | None, int | None] = (None, None),
    **options: Any,
) -> tuple[Images, Images]:
    """Open the training and the test part of a data set.

    Args:
        place: a folder of parquet files, or a name on the hub.
        splits: what the hub calls the two parts; in a folder any usual name of a held-out part will do.
        counts: how many images of each, None for all.
        options: of `images.open_images`.

    Returns:
        Training images, test images.

    Raises:
        InputError: as `images.open_images` does.
    """
    train, test = splits
    path = Path(place).expanduser()
    if path.is_dir():  # local copies may name their held-out part otherwise
        there = split_names(path)
        test = next((s for s in (test, *SPLITS[:-1]) if s in there), test)
    first, second = (
        images.open_images(place, split=s, count=n, **options) for s, n in zip((train, test), counts, strict=True)
    )
    return first, second


def fingerprints(names: Sequence[str], folder: str = "") -> dict[str, str]:
    """Tell copies of real data sets apart.

    Args:
        names: keys of SETS.
        folder: holds a folder for each set; empty for the hub.

    Returns:
        A text for each name, another where the training or the test part is another.

    Raises:
        InputError: as `open_set` does.
    """
    found = {}
    for name in names:
        parts = open_set(name, size=(1, 1), folder=str(Path(folder).expanduser() / name) if folder else "")
        found[name] = " ".join(str(part.key["images"]) for part in parts)
    return found


def metric(task: str) -> str:
    """Metric of a task or data set, as usual in the field: name → one of `classification.METRICS`."""
    return SETS[task].metric if task in SETS else "mAP" if task.endswith("in view") else "top1"


def labels(sources: Sequence[Images], tasks: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """Tasks on images and the right answers: sources, one after the other, tasks (default all they can answer) →
    {task: (n,) or (n, k)}.

    Scenes answer SCENES; others "label" or the one name given, numbered in the order of their names. Raises
    InputError for unknown tasks and images without labels.
    """
    if all(s.source is None for s in sources):
        names = list(tasks) or list(SCENES)
        for name in names:
            if name not in SCENES:
                raise unknown("task on scenes", name, SCENES)
        truths = [b.truth for s in sources for b in s.batches(256) if b.truth is not None]
        return {n: np.concatenate([SCENES[n](t) for t in truths]) for n in names}
    values = [label for s in sources for batch in s.batches(64) for label in batch.labels]
    return {(tasks[0] if tasks else "label"): number(values, sources[0].name)}


def number(values: Sequence[Any], name: str) -> np.ndarray:
    """Number labels as data sets have them: classes by index or name, or lists of several → (n,) int or (n, k) bool.

    Raises InputError if a label is missing.
    """
    missing = sum(label is None for label in values)
    if missing:
        raise InputError(f"{missing} of {len(values)} images of {name} have no label to ask for")
    if values and isinstance(values[0], list | tuple | np.ndarray):
        marks = [np.asarray(label) for label in values]
        if len({m.shape for m in marks}) == 1 and marks[0].size > 1 and all(np.isin(m, (0, 1)).all() for m in marks):
            return np.stack(marks).astype(bool)  # marks already, as webdataset keeps them
        kinds = sorted({k for label in values for k in label})
        return np.array([[k in set(label) for k in kinds] for label in values])
    names = sorted(set(values))
    return np.searchsorted(np.array(names), np.array(values)) if names else np.zeros(0, int)
