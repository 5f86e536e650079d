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

from vitregs import artifacts, capture
from vitregs.backbones import Backbone
from vitregs.images import Images, background_share
from vitregs.probes import logistic
from vitregs.problems import Problem

TAUGHT = 2 / 3  # of the pictures
TOKENS = 16384  # tokens that teach, at most
STRENGTHS = (1e-2, 1.0, 1e2)
RIDGES = tuple(10.0**k for k in range(-4, 3))  # penalties, in units of the mean variance of a channel


def cut(backbone: Backbone, pixels: Tensor) -> Tensor:
    """Pixels of each patch, normalised as the model sees them: (n, 3, H, W) in [0, 1] → (n, patches, 3·p·q)."""
    (p, q), x = backbone.patch_size, backbone.normalise(pixels)
    n, channels, height, width = x.shape
    x = x.reshape(n, channels, height // p, p, width // q, q).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(n, (height // p) * (width // q), -1).cpu()


def pixels(backbone: Backbone, images: Images, batch: int = 64) -> np.ndarray:
    """Pixels of every patch of pictures: → (images, patches, 3·p·q), in units of the model's normalisation."""
    return torch.cat([cut(backbone, part) for part in images.pixels(batch)]).numpy()


def _groups(states: xr.DataArray, marked: xr.DataArray, ground: np.ndarray | None) -> dict[str, np.ndarray]:
    """Groups of patches, (images, patches) bool each: all, normal, outlier and, with the background's share, normal patches on
    objects, for outliers that are objects. Raises Problem for marks that do not fit."""
    if bool((states["kind"] != "patch").any()):
        raise Problem("local probes ask patch tokens only: leave CLS and registers out")
    hot = artifacts.patches(marked).transpose("image", "token").values
    shape = (states.sizes["image"], states.sizes["token"])
    for what, given in (("marks", hot), ("masks", ground)):
        if given is not None and given.shape != shape:
            raise Problem(f"{what} of {given.shape} tokens do not fit states of {shape}")
    groups = {"all": np.ones_like(hot), "normal": ~hot, "outlier": hot}
    return groups if ground is None else groups | {"normal on objects": ~hot & (ground < 0.5)}


def _split(count: int) -> np.ndarray:
    """Which pictures teach: the first two thirds. Raises Problem for fewer than two on either side."""
    teach = np.arange(count) < round(TAUGHT * count)
    if min(teach.sum(), (~teach).sum()) < 2:
        raise Problem(f"{count} pictures are too few to teach a probe with some and score others")
    return teach


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
    states: xr.DataArray, marked: xr.DataArray, ground: np.ndarray | None = None, *, own: bool = False, seed: int = 0
) -> xr.Dataset:
    """Predict a patch's place in the grid from its token by a linear classifier: states [image, token, channel] of patches, marks
    [image, token], share of background (images, patches), whether normal patches and outliers get a probe each →
    Dataset[quantity, group]: top1 (share of tokens) and distance (mean Euclidean, in patches, from the predicted to the true
    cell) with 95 % intervals over pictures, tokens (Fig 5b, Table 5).

    nan for a group without tokens. Raises Problem for a grid of one patch, too few pictures, and states that are not finite.
    """
    groups = _groups(states, marked, ground)
    teach = _split(states.sizes["image"])
    x = states.transpose("image", "token", "channel").values
    place = np.stack([states["y"].values, states["x"].values], 1)
    if len(place) < 2:
        raise Problem("a grid of one patch has no positions to tell apart")
    right, far = (np.zeros((int((~teach).sum()), len(place))) for _ in range(2))
    for name in ("normal", "outlier") if own else ("all",):
        chosen = groups[name] & teach[:, None]
        if len(np.unique(chosen.nonzero()[1])) < 2:  # nothing to learn from, so nothing is scored
            groups |= {g: m & ~groups[name] for g, m in groups.items()}
            continue
        image, patch = _sample(chosen, seed)
        said = _place(torch.from_numpy(x[image, patch]), torch.from_numpy(patch), torch.from_numpy(x[~teach]))
        here = groups[name][~teach]
        right[here] = (said == np.arange(len(place)))[here]
        far[here] = np.linalg.norm(place[said] - place, axis=-1)[here]
    counts = {g: int(m[~teach].sum()) for g, m in groups.items()}
    scores = {
        q: {g: artifacts.ratio((v * m[~teach]).sum(1), m[~teach].sum(1)) for g, m in groups.items()}
        for q, v in (("top1", right), ("distance", far))
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
    ground: np.ndarray | None = None,
    *,
    own: bool = False,
    seed: int = 0,
) -> xr.Dataset:
    """Predict a patch's pixels from its token by ridge regression: states [image, token, channel] of patches, pixels (images,
    patches, values) as `pixels` gives them, marks → Dataset[quantity, group] with 95 % intervals over pictures (Fig 5b, Table 5).

    l2: mean length of the residual; mean_patch: the same for the average patch; r2: share of the squared deviation explained.

    The penalty is chosen on a tenth of the teaching tokens. Raises Problem as `locate` does, and for pixels that do not fit.
    """
    groups = _groups(states, marked, ground)
    teach = _split(states.sizes["image"])
    x = states.transpose("image", "token", "channel").values
    if pixels.shape[:2] != x.shape[:2]:
        raise Problem(f"pixels of {pixels.shape[:2]} patches do not fit states of {x.shape[:2]}")
    length, total = (np.zeros((int((~teach).sum()), x.shape[1])) for _ in range(2))
    squared, deviation = length.copy(), length.copy()
    for name in ("normal", "outlier") if own else ("all",):
        chosen = groups[name] & teach[:, None]
        if chosen.sum() < 2:
            groups |= {g: m & ~groups[name] for g, m in groups.items()}
            continue
        image, patch = _sample(chosen, seed)
        mean = pixels[image, patch].mean(0)
        said = _ridge(x[image, patch], pixels[image, patch], x[~teach])
        here = groups[name][~teach]
        rest, plain = (
            np.square(pixels[~teach] - said).sum(-1),
            np.square(pixels[~teach] - mean).sum(-1),
        )
        length[here], total[here] = np.sqrt(rest)[here], np.sqrt(plain)[here]
        squared[here], deviation[here] = rest[here], plain[here]
    test = {g: m[~teach] for g, m in groups.items()}
    scores: dict[str, dict[str, tuple[float, float, float]]] = {"l2": {}, "mean_patch": {}, "r2": {}}
    for g, m in test.items():
        scores["l2"][g] = artifacts.ratio((length * m).sum(1), m.sum(1))
        scores["mean_patch"][g] = artifacts.ratio((total * m).sum(1), m.sum(1))
        value, low, high = artifacts.ratio((squared * m).sum(1), (deviation * m).sum(1))
        scores["r2"][g] = (1 - value, 1 - high, 1 - low)
    return _table(scores, {g: int(m.sum()) for g, m in test.items()})


def _ridge(x: np.ndarray, y: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Ridge regression in closed form: (n, d), (n, v), (…, d) → (…, v)."""
    shift, level = x.mean(0, dtype=np.float64), y.mean(0, dtype=np.float64)
    x, y, test = x - shift, y - level, test - shift
    held = max(1, round(logistic.HELD * len(x)))

    def solve(rows: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        spread, turn = np.linalg.eigh(x[rows].T @ x[rows] / len(x[rows]))
        return spread, turn, turn.T @ (x[rows].T @ y[rows] / len(x[rows]))

    spread, turn, load = solve(slice(held, None))
    unit = max(float(spread.mean()), 1e-12)
    errors = [np.square(y[:held] - x[:held] @ (turn @ (load / (spread + r * unit)[:, None]))).sum() for r in RIDGES]
    best = RIDGES[int(np.argmin(errors))]
    spread, turn, load = solve(slice(None))
    return test @ (turn @ (load / (spread + best * unit)[:, None])) + level


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
    """Positions and pixels from the patch tokens of pictures: backbone, pictures → Dataset[quantity, group] of `locate` and
    `reconstruct`; the attribute `marked` says what stands for outliers, which are those of `artifacts.mark_each` at the layer.
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
    marked, words = artifacts.mark_each(norms, artifacts.cutoff(norms), missing)
    bare = np.full(states.sizes["token"], np.nan)  # nan is not "on an object"
    known = any(mask is not None for mask in masks)
    ground = np.stack([bare if mask is None else mask for mask in masks]) if known else None
    places = locate(states, marked, ground, own=own)
    pictured = reconstruct(states, torch.cat(cells).numpy(), marked, ground, own=own)
    return (
        xr.concat([places, pictured], "quantity", data_vars="minimal")
        .assign_coords(model=backbone.name)
        .assign_attrs(marked=words, positions=states.sizes["token"])
    )
