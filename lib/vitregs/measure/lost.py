"""Object discovery without labels (LOST): seed, expansion and box from the similarities of patch features (Table 3, Fig 13, 14).

The protocol is that of section 2.9: the Gram matrix of queries, keys or values of the last block, plus a bias. Images
go through in chunks, all of a chunk at once; nothing loops over images. Torch ends here: labelled arrays leave.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from vitregs import arrays
from vitregs.arrays import patch_maps
from vitregs.data.images import Images
from vitregs.errors import InputError, unknown
from vitregs.measure import outliers
from vitregs.models import capture
from vitregs.models.backbone import Backbone
from vitregs.models.registry import pick_device

PROJECTIONS = ("key", "query", "value")
RULES = ("zero", "centre", "best")  # of a bias; the last is chosen on the first half of the images
SIDES = ("y0", "x0", "y1", "x1")
BIASES = tuple(np.round(np.linspace(-1, 0, 21), 2))  # on features of length 1, where -1 keeps nothing
UNIT_BIASES = (0.0, -0.05, -0.1, -0.2, -0.3, -0.5)  # the few of `by_setting`
OVERLAP = 0.5  # intersection over union that makes a hit
CACHE, MEMORY = 2**21, 2**28  # numbers in the Gram matrices of a chunk: on a CPU, near its cache; on a GPU


def preferred(backbone: Backbone) -> str:
    """The projection the paper takes for a model: value for supervised models and CLIP, key for the self-supervised ones
    (appendix C)."""
    words = f"{backbone.name} {backbone.source}".lower()
    return "key" if any(w in words for w in ("dino", "mae", "ibot")) else "value"


def lost(
    features: xr.DataArray,
    *,
    patch_size: tuple[int, int],
    size: tuple[int, int] | None = None,
    bias: float | str = 0.0,
    normalise: bool = False,
    candidates: int = 100,
    device: str = "cpu",
) -> xr.Dataset:
    """Find one object in each image: [image, token, channel] → Dataset with score (minus the degree), similarity (to the seed),
    expansion and mask [image, y, x], seed [image] (index of a patch), box [image, side] (y0, x0, y1, x1 in pixels).

    The bias is added to the Gram matrix before everything else: a number in the units of squared features, or "centre", minus the
    mean off the diagonal of each image's own matrix. `normalise` brings features to length 1, so that biases of all models mean
    the same. `size` clips boxes to images (height, width) that were padded to full patches. Among equal scores the patch that
    comes first, row by row, wins. Where no candidate resembles the seed, not even itself, the seed alone is the object. Raises
    InputError for grids without two rows and two columns, features or biases that are not finite, and candidates below 1.
    """
    like = patch_maps(features.isel(channel=0, drop=True)).transpose("image", "y", "x")
    rows, columns = like.sizes["y"], like.sizes["x"]
    if min(rows, columns) < 2:
        raise InputError(f"LOST needs a grid of at least 2x2 patches, not {rows}x{columns}")
    if candidates < 1:
        raise InputError(f"candidates must be 1 or more, not {candidates}")
    if isinstance(bias, str) and bias != "centre":
        raise unknown("bias", bias, ("centre", "or a number"))
    if not (isinstance(bias, str) or np.isfinite(bias)):
        raise InputError(f"a bias must be finite, not {bias}")
    place, tokens = pick_device(device), rows * columns
    x = torch.from_numpy(features.transpose("image", "token", "channel").values)
    patch = torch.from_numpy(np.flatnonzero(features["kind"] == "patch"))
    step = max(1, (CACHE if place.type == "cpu" else MEMORY) // tokens**2)
    parts = [
        _chunk(part[:, patch].float().to(place), (rows, columns), bias, normalise, min(candidates, tokens))
        for part in x.split(step)
    ]
    score, similarity, expansion, mask, seed, box = (torch.cat(p).cpu().numpy() for p in zip(*parts, strict=True))
    maps = {"score": score, "similarity": similarity, "expansion": expansion, "mask": mask}
    image_size = size or (rows * patch_size[0], columns * patch_size[1])
    pixels = np.minimum(box * np.tile(patch_size, 2), np.tile(image_size, 2))
    return xr.Dataset(
        {k: like.copy(data=v.reshape(like.shape)) for k, v in maps.items()}
        | {"seed": ("image", seed), "box": (("image", "side"), pixels)},
        coords={"side": list(SIDES)},
    )


def _chunk(
    x: Tensor, shape: tuple[int, int], bias: float | str, normalise: bool, candidates: int
) -> tuple[Tensor, ...]:
    """One chunk of images at once: features (n, patches, channels) → score, similarity, expansion, mask, seed and box (in
    patches)."""
    n, tokens, _ = x.shape
    if not x.sum().isfinite():  # as good as testing each, and many times faster
        raise InputError("features must be finite")
    if normalise:
        x = torch.nn.functional.normalize(x, dim=-1)
    if isinstance(bias, str):  # mean of all pairs but those of a patch with itself, from sums over features
        y = x.double()
        shift = -(y.sum(1).square().sum(-1) - y.square().sum((1, 2))) / (tokens * (tokens - 1))
        b = shift.float()[:, None]
    else:
        b = x.new_full((n, 1), bias)
    gram = x @ x.mT
    # a + b > 0 exactly where a > -b; in place and as float, as counting bools takes many times as long
    degree = gram.gt_(-b[..., None])
    degree.diagonal(dim1=1, dim2=2).zero_()
    score = degree.sum(-1)
    order = torch.arange(tokens, device=x.device)
    best = (score.long() * tokens + order).topk(candidates, largest=False).indices  # distinct keys: no ties are left
    seed = best[:, :1]
    similarity = (x @ x.gather(1, seed[..., None].expand(-1, -1, x.shape[-1])).mT)[..., 0] + b
    kept = torch.zeros_like(similarity).scatter_(1, best, (similarity.gather(1, best) > 0).float())
    # the sum of rows of a product is the product of the sum
    expansion = (x @ (kept[:, None] @ x).mT)[..., 0] + b * kept.sum(1, keepdim=True)
    mask = _component((expansion > 0).scatter_(1, seed, True).view(n, *shape), order == seed)
    sides = [side for axis in (2, 1) for side in _span(mask.any(axis))]
    box = torch.stack([sides[0], sides[2], sides[1], sides[3]], -1)
    return -score, similarity, expansion, mask, seed[:, 0], box


def _span(line: Tensor) -> tuple[Tensor, Tensor]:
    """First place that is True, and one behind the last: (n, length) bool → (n,) twice."""
    place = torch.arange(line.shape[1], device=line.device)
    return torch.where(line, place, line.shape[1]).amin(1), torch.where(line, place + 1, 0).amax(1)


def _component(mask: Tensor, seed: Tensor) -> Tensor:
    """Cells joined to the seed through sides (4-connected): masks (n, rows, columns), seeds (n, patches) bool → like masks.

    Whole runs are filled at a time, along rows and columns in turn, in all images: as many rounds as the most winding
    object has corners.
    """
    runs = []
    for axis in (2, 1):
        start = ~mask
        start.select(axis, 0).fill_(True)
        turned = start.transpose(axis, 2)
        number = turned.flatten().cumsum(0).view_as(turned).transpose(axis, 2)
        runs.append(number.flatten())
    free, reached = mask.flatten(), seed.flatten()
    count = reached.sum()
    while True:
        for number in runs:
            hit = torch.zeros(len(free) + 1, dtype=torch.bool, device=free.device)
            hit[number[reached]] = True
            reached = hit[number] & free
        if (now := reached.sum()) == count:
            return reached.view_as(mask)
        count = now


def overlap(boxes: np.ndarray, truth: Sequence[np.ndarray]) -> np.ndarray:
    """Largest intersection over union with any true box: boxes (images, 4), a list of (objects, 4) → (images,), nan where an
    image has no true box."""
    most = max(1, *(len(t) for t in truth)) if len(truth) else 1
    true = np.full((len(boxes), most, 4), np.nan)
    for i, t in enumerate(truth):
        true[i, : len(t)] = t
    mine = np.asarray(boxes, float)[:, None]
    inner = np.minimum(mine[..., 2:], true[..., 2:]) - np.maximum(mine[..., :2], true[..., :2])
    both = inner.clip(min=0).prod(-1)
    areas = [(b[..., 2:] - b[..., :2]).prod(-1) for b in (mine, true)]
    return np.fmax.reduce(both / (areas[0] + areas[1] - both), 1)


def corloc(boxes: xr.DataArray, truth: Sequence[np.ndarray], *, size: tuple[int, int]) -> xr.Dataset:
    """Score boxes: [image, side], true boxes (objects, 4) of each image, image (height, width) in pixels → Dataset with hit
    [image] (1 if the overlap with any true box reaches 0.5, nan without one) and corloc, low, high (%, 95 % over images), n.

    Raises InputError for boxes outside the image or without area, lists that do not fit, and if no image has a true box.
    """
    values = boxes.transpose("image", "side").values
    if len(truth) != len(values):
        raise InputError(f"{len(values)} boxes do not fit the true boxes of {len(truth)} images")
    for what, given in (("boxes", values), ("true boxes", np.concatenate([np.empty((0, 4)), *truth]))):
        if not ((given[:, :2] >= 0) & (given[:, :2] < given[:, 2:]) & (given[:, 2:] <= size)).all():
            raise InputError(f"{what} must have an area and lie inside the image of {size[0]}x{size[1]} pixels")
    best = overlap(values, truth)
    return _score(xr.DataArray(np.where(np.isnan(best), np.nan, best >= OVERLAP), dims="image", name="hit"))


def _score(hit: xr.DataArray) -> xr.Dataset:
    """Mean of hits in per cent with its interval: [image] → Dataset."""
    there = hit.values[np.isfinite(hit.values)]
    if not len(there):
        raise InputError("no image has a true box: CorLoc needs images with boxes of their objects")
    mean, low, high = arrays.bootstrap_interval(100 * there)
    return xr.Dataset({"hit": hit, "corloc": mean, "low": low, "high": high, "n": len(there)})


def sweep(
    features: xr.DataArray,
    truth: Sequence[np.ndarray],
    *,
    patch_size: tuple[int, int],
    biases: Sequence[float] = BIASES,
    candidates: int = 100,
    device: str = "cpu",
) -> xr.Dataset:
    """CorLoc over a grid of biases: features [image, token, channel], true boxes → Dataset with hit [bias, image] and corloc,
    low, high, n [bias].

    Features are brought to length 1 first, so that a grid means the same for every model. Raises InputError as
    `lost`, `corloc` do.
    """
    if not len(biases):
        raise InputError("a sweep needs at least one bias")
    like = patch_maps(features.isel(channel=0, drop=True))
    size = (like.sizes["y"] * patch_size[0], like.sizes["x"] * patch_size[1])
    found = []
    for bias in biases:
        made = lost(features, patch_size=patch_size, bias=bias, normalise=True, candidates=candidates, device=device)
        found.append(corloc(made["box"], truth, size=size))
    return xr.concat(found, "bias").assign_coords(bias=np.asarray(biases, float))


def choose_bias(hits: xr.DataArray) -> xr.Dataset:
    """Choose a bias on the first half of the images and score it on the second: [bias, image] → Dataset with bias and, of the
    second half, hit [image] (nan for the first), corloc, low, high, n.

    Of equally good biases the one nearest to 0 is taken. Raises InputError where a half has no true box.
    """
    n = hits.sizes["image"]
    train = np.arange(n) < n // 2
    first = hits.transpose("bias", "image").values[:, train]
    seen = np.isfinite(first).all(0)
    if not seen.any():
        raise InputError(f"no bias can be chosen: the first half of {n} images has no true box")
    score = first[:, seen].mean(1)
    biases = hits["bias"].values
    chosen = min(biases[score == score.max()], key=abs)
    scored = hits.sel(bias=chosen).where(xr.DataArray(~train, dims="image"))
    return _score(scored.drop_vars("bias")).assign(bias=float(chosen))


def baselines(truth: Sequence[np.ndarray], size: tuple[int, int], *, draws: int = 200, seed: int = 0) -> xr.DataArray:
    """What boxes score that look at nothing: true boxes, image (height, width) → hits [rule, image], nan without true boxes.

    Rules: a box around the whole image, one of half its sides in the middle, and boxes between two random points, whose
    chance of a hit is the mean over draws.
    """
    ends = np.random.default_rng(seed).random((draws, 2, 2)) * size
    boxes = {
        "whole image": np.array([[0, 0, *size]], float),
        "half its sides, centred": np.array([[size[0] / 4, size[1] / 4, 3 * size[0] / 4, 3 * size[1] / 4]]),
        "random box": np.concatenate([ends.min(1), ends.max(1)], 1),
    }
    hits = []
    for rule_boxes in boxes.values():
        over = np.stack([overlap(np.broadcast_to(b, (len(truth), 4)), truth) for b in rule_boxes])
        hits.append(np.where(np.isnan(over), np.nan, over >= OVERLAP).mean(0))
    return xr.DataArray(np.stack(hits), dims=("rule", "image"), coords={"rule": list(boxes)}, name="hit")


def covered(boxes: xr.DataArray, size: tuple[int, int]) -> xr.DataArray:
    """Share of the image that a box covers: boxes [..., side], image (height, width) in pixels → [...] in [0, 1]."""
    y0, x0, y1, x1 = (boxes.sel(side=s, drop=True) for s in SIDES)
    return ((y1 - y0) * (x1 - x0) / (size[0] * size[1])).rename("covered")


def ground_truth_boxes(images: Images) -> list[np.ndarray]:
    """True boxes of every image: → a list of (objects, 4), y0, x0, y1, x1 in pixels; empty where none are known."""
    return [boxes for batch in images.batches() for boxes in batch.boxes]


def evaluate(
    backbone: Backbone,
    images: Images,
    *,
    projection: str = "auto",
    layer: int = -1,
    biases: Sequence[float] = BIASES,
    candidates: int = 100,
    shown: int = 4,
) -> xr.Dataset:
    """LOST with keys, queries and values: backbone, images, projection for the table (auto: the paper's for this model) →
    Dataset with hit, box and seed [projection, rule, image], chosen [projection] (the best bias, of the first half of the
    images), swept [projection, bias, image] and score, similarity, expansion, mask [projection, rule, drawn, y, x] of the
    first images; the coordinate `used` names the projection for the table.

    The best bias is one on features of length 1, and its hits are nan on the images that chose it. Without true boxes hits
    are nan, and "best" falls back on "zero". Raises InputError for other projections.
    """
    if projection not in ("auto", *PROJECTIONS):
        raise unknown("projection", projection, ("auto", *PROJECTIONS))
    if not len(biases):
        raise InputError("a sweep needs at least one bias")
    truth: list[np.ndarray] = []
    given: dict[str, Any] = {
        "patch_size": backbone.patch_size,
        "candidates": candidates,
        "device": str(backbone.device),
    }
    ways: list[dict[str, Any]] = [{"bias": 0.0}, {"bias": "centre"}, *({"bias": b, "normalise": True} for b in biases)]
    boxes: dict[str, list[list[xr.Dataset]]] = {which: [[] for _ in ways] for which in PROJECTIONS}
    drawn: dict[str, list[xr.DataArray]] = {which: [] for which in PROJECTIONS}
    for part, seen in capture.stream(backbone, images, qkv=PROJECTIONS, qkv_layers=[layer], kinds="patch"):
        for which in PROJECTIONS:
            features = seen["qkv"].isel(qkv_layer=0).sel(projection=which, drop=True).rename(qkv_channel="channel")
            for kept, way in zip(boxes[which], ways, strict=True):
                kept.append(lost(features, **given, **way)[["box", "seed"]])
            if len(truth) < shown:
                drawn[which].append(features.isel(image=slice(shown - len(truth))))
        truth += part.boxes
    there = [any(len(t) for t in half) for half in (truth[: len(truth) // 2], truth[len(truth) // 2 :])]
    parts = []
    for which in PROJECTIONS:
        found = [xr.concat(kept, "image") for kept in boxes[which]]
        nothing = xr.DataArray(np.full(len(truth), np.nan), dims="image", name="hit")
        hits = [corloc(f["box"], truth, size=images.size)["hit"] if any(there) else nothing for f in found]
        swept = xr.concat(hits[2:], "bias").assign_coords(bias=np.asarray(biases, float))
        picked = choose_bias(swept) if all(there) else xr.Dataset({"bias": np.nan, "hit": nothing})
        last = 2 + list(biases).index(float(picked["bias"])) if all(there) else 0
        first = xr.concat(drawn[which], "image")
        rules = []
        for rule, k in zip(RULES, (0, 1, last), strict=True):
            maps = lost(first, **given, **ways[k])[["score", "similarity", "expansion", "mask"]]
            hit = picked["hit"] if rule == "best" else hits[k]
            rules.append(maps.rename(image="drawn").assign(box=found[k]["box"], seed=found[k]["seed"], hit=hit))
        joined = xr.concat(rules, "rule").assign_coords(rule=list(RULES))
        parts.append(joined.assign(swept=swept, chosen=picked["bias"]))
    used = preferred(backbone) if projection == "auto" else projection
    joined = xr.concat(parts, "projection", coords="minimal", compat="override")
    return joined.assign_coords(projection=list(PROJECTIONS), used=used)


def by_setting(
    backbone: Backbone,
    images: Images,
    *,
    layer: int = -1,
    biases: Sequence[float] = UNIT_BIASES,
    candidates: int = 100,
) -> xr.Dataset:
    """LOST under every setting, with what a score alone hides: how much of the image its box covers, and what boxes score
    that look at nothing.

    A bias near 0 lets a network whose features all agree answer with the whole image, which is right on many a photograph.

    Args:
        backbone: a network.
        images: with boxes of their objects.
        layer: block whose queries, keys and values are features.
        biases: on features of length 1.
        candidates: patches that may join the seed.

    Returns:
        hit and covered [projection, setting, image], of the settings "bias 0" and "centred" on features as they are, and
        "length 1, centred" and "length 1, bias B" on features of length 1; baseline [rule, image], hits of `baselines`.
        Hits are nan for images without a true box.

    Raises:
        InputError: if no image has a true box, and as `lost` does.
    """
    ways: dict[str, dict[str, Any]] = {"bias 0": {"bias": 0.0}, "centred": {"bias": "centre"}}
    ways["length 1, centred"] = {"bias": "centre", "normalise": True}
    ways |= {f"length 1, bias {b:g}": {"bias": b, "normalise": True} for b in biases}
    given: Any = {"patch_size": backbone.patch_size, "candidates": candidates, "device": str(backbone.device)}
    truth: list[np.ndarray] = []
    boxes: list[xr.DataArray] = []
    for part, seen in capture.stream(backbone, images, qkv=PROJECTIONS, qkv_layers=[layer], kinds="patch"):
        truth += part.boxes
        features = seen["qkv"].isel(qkv_layer=0).rename(qkv_channel="channel")
        found = [
            xr.concat(
                [lost(features.sel(projection=p, drop=True), **given, **way)["box"] for way in ways.values()], "setting"
            )
            for p in PROJECTIONS
        ]
        boxes.append(xr.concat(found, "projection"))
    box = xr.concat(boxes, "image").assign_coords(projection=list(PROJECTIONS), setting=list(ways))
    hit = [
        xr.concat([corloc(box.sel(projection=p, setting=w), truth, size=images.size)["hit"] for w in ways], "setting")
        for p in PROJECTIONS
    ]
    return xr.Dataset(
        {
            "hit": xr.concat(hit, "projection", coords="minimal", compat="override"),
            "covered": covered(box, images.size).astype(np.float32),
            "baseline": baselines(truth, images.size),
        },
        coords={"model": backbone.name, "projection": list(PROJECTIONS), "setting": list(ways)},
    )


def evaluate_full_size(
    backbone: Backbone, images: Images, *, projection: str = "auto", bias: float | str = 0.0, normalise: bool = False
) -> xr.Dataset:
    """CorLoc by the published protocol: images whole and in their own size, one at a time, padded to full patches on the right
    and below with the mean colour: backbone, image files (size and crop are not used) → Dataset as of `corloc`.

    Images that cannot be decoded are left out. Raises InputError for scenes, which have no size of their own, and if no image
    has a true box.
    """
    if images.source is None:
        raise InputError("scenes have no size of their own: give images with boxes")
    which = preferred(backbone) if projection == "auto" else projection
    (p, q), hits = backbone.patch_size, []
    for item, image in images.whole():
        shown_image = np.asarray(image, np.float32) / 255
        height, width, _ = shown_image.shape
        pixels = torch.tensor(backbone.mean).repeat(-(-height // p) * p, -(-width // q) * q, 1)
        pixels[:height, :width] = torch.from_numpy(shown_image)
        features = capture.projections(backbone, pixels.permute(2, 0, 1)[None], which=which)
        given: dict[str, Any] = {"patch_size": (p, q), "size": (height, width), "device": str(backbone.device)}
        found = lost(features, bias=bias, normalise=normalise, **given)
        true = images.true_boxes(item, image.size)[:, [1, 0, 3, 2]]
        over = overlap(found["box"].values, [true])[0]
        hits.append(np.nan if np.isnan(over) else float(over >= OVERLAP))
    return _score(xr.DataArray(hits, dims="image", name="hit"))


def projection_norms(backbone: Backbone, images: Images, *, layer: int = -1, share: float = 0.02) -> xr.Dataset:
    """How long queries, keys and values of outliers are: backbone, images, block, share of a stand-in → Dataset with ratio,
    low, high, n [projection]; the coordinate `marked` says in words what counts as an outlier (Fig 14).

    In each image that has both, the median length over patches that leave the block as outliers, by that over all others;
    then the median over these images with its 95 % interval. Lengths are those of W LN(x) + bias, as attention sees them.
    Where no outlier mode exists the patches of the largest norms stand in.
    """
    lengths: list[np.ndarray] = []
    kept: list[xr.Dataset] = []
    for _, seen in capture.stream(backbone, images, norms=[layer], qkv=PROJECTIONS, qkv_layers=[layer], kinds="patch"):
        lengths.append(np.linalg.norm(seen["qkv"].isel(qkv_layer=0).values, axis=-1))  # (images, projection, patch)
        kept.append(seen[["norms"]])
    norms = capture.join(kept)["norms"].isel(layer=0)
    marked, what = outliers.mark_or_top(norms, outliers.find_cutoff(norms), share)
    is_outlier = marked.transpose("image", "token").values
    rows = [ratio_of_medians(length, is_outlier) for length in np.concatenate(lengths).swapaxes(0, 1)]
    data = {name: ("projection", [row[i] for row in rows]) for i, name in enumerate(("ratio", "low", "high", "n"))}
    coords = {"projection": list(PROJECTIONS), "marked": what, "model": backbone.name}
    return xr.Dataset(data, coords=coords)


def ratio_of_medians(length: np.ndarray, is_outlier: np.ndarray) -> tuple[float, float, float, int]:
    """Median over marked patches by that over the others: lengths and marks (images, patches) → median over the images that
    have both, its 95 % interval, and how many these are; nan where there are none."""
    groups = [np.where(g, length, np.nan) for g in (is_outlier, ~is_outlier)]
    both = is_outlier.any(1) & ~is_outlier.all(1)
    if not both.any():
        return np.nan, np.nan, np.nan, 0
    inside, outside = (np.nanmedian(g[both], axis=1) for g in groups)
    return *arrays.bootstrap_interval(inside / outside, of=np.median), int(both.sum())
