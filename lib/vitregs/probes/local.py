"""What a patch token knows of its own place: its position in the grid, and its pixels (Fig 5b, Table 5).

One linear probe is trained on the tokens of all groups and scored on each (section 2.2), or, as an alternative, one probe
on each group.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from vitregs import arrays
from vitregs.data.images import Images, background_share
from vitregs.errors import InputError
from vitregs.measure import outliers
from vitregs.models import capture
from vitregs.models.backbone import Backbone
from vitregs.probes import logistic

TRAIN_SHARE = 2 / 3  # of the images
TOKENS = 16384  # training tokens, at most
STRENGTHS = (1e-2, 1.0, 1e2)
RIDGES = tuple(10.0**k for k in range(-4, 3))  # penalties, in units of the mean variance of a channel


def cut(backbone: Backbone, pixels: Tensor) -> Tensor:
    """Pixels of each patch, normalised as the model sees them: (n, 3, H, W) in [0, 1] → (n, patches, 3·p·q)."""
    (p, q), x = backbone.patch_size, backbone.normalise(pixels)
    n, channels, height, width = x.shape
    x = x.reshape(n, channels, height // p, p, width // q, q).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(n, (height // p) * (width // q), -1).cpu()


def pixels(backbone: Backbone, images: Images, batch: int = 64) -> np.ndarray:
    """Pixels of every patch of images: → (images, patches, 3·p·q), in units of the model's normalisation."""
    return torch.cat([cut(backbone, part) for part in images.pixels(batch)]).numpy()


def _groups(states: xr.DataArray, marked: xr.DataArray, background: np.ndarray | None) -> dict[str, np.ndarray]:
    """Groups of patches, (images, patches) bool each: all, normal, outlier and, with the background's share, normal patches on
    objects, for outliers that are objects. Raises InputError for marks that do not fit."""
    if bool((states["kind"] != "patch").any()):
        raise InputError("local probes take patch tokens only: leave CLS and registers out")
    is_outlier = arrays.patches(marked).transpose("image", "token").values
    shape = (states.sizes["image"], states.sizes["token"])
    for what, given in (("marks", is_outlier), ("masks", background)):
        if given is not None and given.shape != shape:
            raise InputError(f"{what} of {given.shape} tokens do not fit states of {shape}")
    groups = {"all": np.ones_like(is_outlier), "normal": ~is_outlier, "outlier": is_outlier}
    return groups if background is None else groups | {"normal on objects": ~is_outlier & (background < 0.5)}


def _split(count: int) -> np.ndarray:
    """Which images are trained on: the first two thirds. Raises InputError for fewer than two on either side."""
    train = np.arange(count) < round(TRAIN_SHARE * count)
    if min(train.sum(), (~train).sum()) < 2:
        raise InputError(f"{count} images are too few to train a probe on some and test it on others")
    return train


def _sample(chosen: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """At most TOKENS of the chosen tokens (images, patches): → their image and patch indices, in drawn order."""
    image, patch = chosen.nonzero()
    pick = np.random.default_rng(seed).permutation(len(image))[:TOKENS]
    return image[pick], patch[pick]


def _table(scores: Mapping[str, Mapping[str, tuple[float, float, float]]], counts: Mapping[str, int]) -> xr.Dataset:
    """{quantity: {group: (value, low, high)}}, scored tokens of a group → Dataset[quantity, group]."""
    groups = list(counts)
    values = np.array([[scores[q][g] for g in groups] for q in scores])
    names = ("score", "low", "high")
    data = {n: (("quantity", "group"), values[..., i]) for i, n in enumerate(names)}
    return xr.Dataset(
        data | {"tokens": ("group", [counts[g] for g in groups])}, coords={"quantity": list(scores), "group": groups}
    )


def locate(
    states: xr.DataArray,
    marked: xr.DataArray,
    background: np.ndarray | None = None,
    *,
    own: bool = False,
    seed: int = 0,
) -> xr.Dataset:
    """Predict a patch's place in the grid from its token by a linear classifier: states [image, token, channel] of patches, marks
    [image, token], share of background (images, patches), whether normal patches and outliers get a probe each →
    Dataset[quantity, group]: top1 (share of tokens) and distance (mean Euclidean, in patches, from the predicted to the true
    cell) with 95 % intervals over images, tokens (Fig 5b, Table 5).

    nan for a group without tokens. Raises InputError for a grid of one patch, too few images, and states that are not finite.
    """
    groups = _groups(states, marked, background)
    train = _split(states.sizes["image"])
    x = states.transpose("image", "token", "channel").values
    place = np.stack([states["y"].values, states["x"].values], 1)
    if len(place) < 2:
        raise InputError("a grid of one patch has no positions to tell apart")
    right, distance = (np.zeros((int((~train).sum()), len(place))) for _ in range(2))
    for name in ("normal", "outlier") if own else ("all",):
        chosen = groups[name] & train[:, None]
        if len(np.unique(chosen.nonzero()[1])) < 2:  # nothing to learn from, so nothing is scored
            groups |= {g: m & ~groups[name] for g, m in groups.items()}
            continue
        image, patch = _sample(chosen, seed)
        predicted = _place(torch.from_numpy(x[image, patch]), torch.from_numpy(patch), torch.from_numpy(x[~train]))
        here = groups[name][~train]
        right[here] = (predicted == np.arange(len(place)))[here]
        distance[here] = np.linalg.norm(place[predicted] - place, axis=-1)[here]
    counts = {g: int(m[~train].sum()) for g, m in groups.items()}
    scores = {
        q: {g: arrays.bootstrap_ratio((v * m[~train]).sum(1), m[~train].sum(1)) for g, m in groups.items()}
        for q, v in (("top1", right), ("distance", distance))
    }
    return _table(scores, counts)


def _place(x: Tensor, patch: Tensor, test: Tensor) -> np.ndarray:
    """Cells named by a softmax classifier whose strength was chosen on a tenth: (n, d), (n,), (m, t, d) → (m, t)."""
    held = max(1, round(logistic.HELD * len(x)))
    names, index = patch.unique(return_inverse=True)
    best, grid = 0, logistic.path(x[held:], index[held:], STRENGTHS)
    if held > 1:
        right = (grid.logits(x[:held]).argmax(-1) == index[:held]).float().mean(1)
        best = int(right.argmax())  # the strongest penalty among equals
    logits = test.to(grid.weight) @ grid.weight[best] + grid.bias[best]
    return names[logits.argmax(-1)].numpy()


def reconstruct(
    states: xr.DataArray,
    pixels: np.ndarray,
    marked: xr.DataArray,
    background: np.ndarray | None = None,
    *,
    own: bool = False,
    seed: int = 0,
) -> xr.Dataset:
    """Predict a patch's pixels from its token by ridge regression: states [image, token, channel] of patches, pixels (images,
    patches, values) as `pixels` gives them, marks → Dataset[quantity, group] with 95 % intervals over images (Fig 5b, Table 5).

    l2: mean length of the residual; mean_patch: the same for the average patch; r2: share of the squared deviation explained.

    The penalty is chosen on a tenth of the training tokens. Raises InputError as `locate` does, and for pixels that do not fit.
    """
    groups = _groups(states, marked, background)
    train = _split(states.sizes["image"])
    x = states.transpose("image", "token", "channel").values
    if pixels.shape[:2] != x.shape[:2]:
        raise InputError(f"pixels of {pixels.shape[:2]} patches do not fit states of {x.shape[:2]}")
    length, total = (np.zeros((int((~train).sum()), x.shape[1])) for _ in range(2))
    squared, deviation = length.copy(), length.copy()
    for name in ("normal", "outlier") if own else ("all",):
        chosen = groups[name] & train[:, None]
        if chosen.sum() < 2:
            groups |= {g: m & ~groups[name] for g, m in groups.items()}
            continue
        image, patch = _sample(chosen, seed)
        mean = pixels[image, patch].mean(0)
        predicted = _ridge(x[image, patch], pixels[image, patch], x[~train])
        here = groups[name][~train]
        residual, baseline = (
            np.square(pixels[~train] - predicted).sum(-1),
            np.square(pixels[~train] - mean).sum(-1),
        )
        length[here], total[here] = np.sqrt(residual)[here], np.sqrt(baseline)[here]
        squared[here], deviation[here] = residual[here], baseline[here]
    test = {g: m[~train] for g, m in groups.items()}
    scores: dict[str, dict[str, tuple[float, float, float]]] = {"l2": {}, "mean_patch": {}, "r2": {}}
    for g, m in test.items():
        scores["l2"][g] = arrays.bootstrap_ratio((length * m).sum(1), m.sum(1))
        scores["mean_patch"][g] = arrays.bootstrap_ratio((total * m).sum(1), m.sum(1))
        value, low, high = arrays.bootstrap_ratio((squared * m).sum(1), (deviation * m).sum(1))
        scores["r2"][g] = (1 - value, 1 - high, 1 - low)
    return _table(scores, {g: int(m.sum()) for g, m in test.items()})


def _ridge(x: np.ndarray, y: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Ridge regression in closed form: (n, d), (n, v), (…, d) → (…, v)."""
    shift, level = x.mean(0, dtype=np.float64), y.mean(0, dtype=np.float64)
    x, y, test = x - shift, y - level, test - shift
    held = max(1, round(logistic.HELD * len(x)))

    def solve(rows: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        eigenvalues, eigenvectors = np.linalg.eigh(x[rows].T @ x[rows] / len(x[rows]))
        return eigenvalues, eigenvectors, eigenvectors.T @ (x[rows].T @ y[rows] / len(x[rows]))

    eigenvalues, eigenvectors, projected = solve(slice(held, None))
    unit = max(float(eigenvalues.mean()), 1e-12)
    errors = [
        np.square(y[:held] - x[:held] @ (eigenvectors @ (projected / (eigenvalues + r * unit)[:, None]))).sum()
        for r in RIDGES
    ]
    best = RIDGES[int(np.argmin(errors))]
    eigenvalues, eigenvectors, projected = solve(slice(None))
    return test @ (eigenvectors @ (projected / (eigenvalues + best * unit)[:, None])) + level


def probe(
    backbone: Backbone,
    images: Images,
    *,
    missing: str = "largest",
    layer: int = -1,
    final_norm: bool = True,
    own: bool = False,
    batch: int = 32,
) -> xr.Dataset:
    """Positions and pixels from the patch tokens of images: backbone, images → Dataset[quantity, group] of `locate` and
    `reconstruct`; the attribute `marked` says what stands for outliers, which are those of `outliers.mark_per_image`
    at the layer.
    """
    grid = backbone.grid(images.size)
    found: list[xr.Dataset] = []
    cells: list[Tensor] = []
    masks: list[np.ndarray | None] = []
    what: Any = {"norms": [layer], "tokens": [layer], "final_norm": final_norm, "kinds": "patch"}
    for part, seen in capture.stream(backbone, images, batch=batch, **what):
        found.append(seen)
        cells.append(cut(backbone, part.pixels))
        masks += [None if mask is None else background_share(mask, grid) for mask in part.masks]
    joined = capture.join(found)
    norms, states = joined["norms"].isel(layer=0), joined["tokens"].isel(tokens_layer=0)
    marked, words = outliers.mark_per_image(norms, outliers.find_cutoff(norms), missing)
    bare = np.full(states.sizes["token"], np.nan)  # nan is not "on an object"
    known = any(mask is not None for mask in masks)
    background = np.stack([bare if mask is None else mask for mask in masks]) if known else None
    places = locate(states, marked, background, own=own)
    pixels = reconstruct(states, torch.cat(cells).numpy(), marked, background, own=own)
    return (
        xr.concat([places, pixels], "quantity", data_vars="minimal")
        .assign_coords(model=backbone.name)
        .assign_attrs(marked=words, positions=states.sizes["token"])
    )
