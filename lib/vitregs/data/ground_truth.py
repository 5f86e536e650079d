"""What is known of an image: objects, background and colours in every patch."""

from dataclasses import dataclass

import numpy as np
import xarray as xr

from vitregs.data import scenes
from vitregs.data.images import Batch, Images
from vitregs.errors import InputError

PROPERTIES = ("colour", "shape", "depth")  # of an object, in scenes


def patch_instances(instances: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The instance that fills most of each patch, 0 where more than half is background: (n, H, W) of 0 for background and
    1, 2, … for instances, (rows, columns) → (n, rows, columns). Raises InputError unless patches tile the image."""
    n, height, width = instances.shape
    rows, columns = grid
    if height % rows or width % columns:
        raise InputError(f"masks of {height}x{width} pixels cannot be cut into {rows}x{columns} patches")
    cut = instances.reshape(n, rows, height // rows, columns, width // columns)
    share = np.stack([(cut == k).mean((2, 4)) for k in range(int(instances.max(initial=0)) + 1)], -1)
    if share.shape[-1] == 1:
        return np.zeros((n, rows, columns), int)
    return np.where(share[..., 0] > 0.5, 0, 1 + share[..., 1:].argmax(-1))


def box_regions(boxes: np.ndarray, size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """Patches whose centre lies in a box: (objects, 4) y0, x0, y1, x1 in pixels, (height, width), (rows, columns) → bool
    (objects, rows, columns)."""
    y, x = ((np.arange(n) + 0.5) * side / n for n, side in zip(grid, size, strict=True))
    y0, x0, y1, x1 = boxes.reshape(-1, 4).T[..., None]
    return ((y >= y0) & (y < y1))[:, :, None] & ((x >= x0) & (x < x1))[:, None, :]


def object_truth(images: Images, grid: tuple[int, int]) -> xr.Dataset:
    """Objects of images as patches: images, (rows, columns) → `region` [image, object, y, x] bool and `placed` [image],
    how many objects there are; of scenes also `colour`, `shape`, `depth` [image, object], -1 where there is no object.

    The attribute `of` says what regions are: "masks" of instances (scenes), "boxes", which may overlap, or "nothing".
    """
    parts: list[np.ndarray] = []
    placed: list[int] = []
    facts: list[np.ndarray] = []
    of = "nothing"
    for batch in images.batches():
        found = _instances(batch, grid) if batch.truth else [box_regions(b, images.size, grid) for b in batch.boxes]
        parts += found
        if batch.truth is not None:
            of = "masks"
            attributes = batch.truth.objects.numpy()
            depth = np.where(attributes[..., 0] >= 0, np.arange(attributes.shape[1]), -1)
            facts.append(np.stack([attributes[..., 1], attributes[..., 0], depth], -1))
            placed += (attributes[..., 0] >= 0).sum(1).tolist()
        else:
            of = "boxes" if of == "boxes" or any(map(len, batch.boxes)) else "nothing"
            placed += [len(b) for b in batch.boxes]
    most = max(1, *(len(p) for p in parts))
    region = np.stack([np.pad(p, ((0, most - len(p)), (0, 0), (0, 0))) for p in parts])
    data = {"region": (("image", "object", "y", "x"), region), "placed": ("image", placed)}
    if facts:
        data |= {
            k: (("image", "object"), v)
            for k, v in zip(PROPERTIES, np.concatenate(facts).transpose(2, 0, 1), strict=True)
        }
    return xr.Dataset(data, attrs={"of": of})


def in_view(seen: xr.Dataset) -> xr.DataArray:
    """Objects that fill at least one patch: objects → [image, object] bool."""
    return seen["region"].any(("y", "x")).rename("in view")


def properties_known(seen: xr.Dataset) -> xr.DataArray:
    """Which object owns each patch, for a drawing: objects → [image, y, x], 0 for none, 1, 2, … by depth rank."""
    number = xr.DataArray(np.arange(1, seen.sizes["object"] + 1), dims="object")
    return (seen["region"] * number).max("object")


def _instances(batch: Batch, grid: tuple[int, int]) -> list[np.ndarray]:
    assert batch.truth is not None
    most = batch.truth.objects.shape[1]
    which = patch_instances(batch.truth.instances.numpy(), grid)
    return list(which[:, None] == np.arange(1, most + 1)[:, None, None])


@dataclass
class Truth:
    """What is known of images: classes, masks with their number of classes and a class to ignore, depth, classes in view."""

    labels: dict[str, np.ndarray]
    masks: dict[str, tuple[list[np.ndarray | None], int, int | None]]
    depth: np.ndarray | None = None
    marks: np.ndarray | None = None
    label: np.ndarray | None = None


def colour_masks(truth: scenes.Scenes) -> np.ndarray:
    """Colour of every pixel of scenes: → (n, H, W), 0 background, 1 + index into scenes.COLOUR_NAMES."""
    named = np.pad(truth.objects[..., 1].numpy() + 1, ((0, 0), (1, 0)))
    ranks = truth.instances.numpy().astype(np.int64)
    return np.take_along_axis(named, ranks.reshape(len(ranks), -1), 1).reshape(ranks.shape).astype(np.uint8)
