"""Everything that Table 2 measures on a network, from one pass over the images: classes, segmentation, depth, zero-shot."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import timm
import torch
import xarray as xr

from vitregs import arrays
from vitregs.data import datasets, ground_truth, scenes
from vitregs.data.images import Batch, Images
from vitregs.errors import InputError
from vitregs.models import capture, registry
from vitregs.models.backbone import Backbone
from vitregs.probes import classification, dense, zero_shot

LARGEST_OBJECT_TASKS = ("colour", "shape", "colour and shape")  # of the object with the largest area
STRENGTHS = (0.1, 1.0, 10.0)  # of the classifier: near the best for all our networks, so that the choice is hardly luck
BACKGROUND = scenes.BACKGROUND_DEPTH
FLOORS: dict[str, xr.Dataset] = {}  # scores of untrained networks: several models of a chapter share one


def _truth(batches: Sequence[Batch], name: str) -> ground_truth.Truth:
    """Collect what is known of images, whatever it is: batches, name of their source → Truth."""
    found = [b.truth for b in batches if b.truth is not None]
    if found:
        labels = {k: np.concatenate([datasets.SCENES[k](t) for t in found]) for k in LARGEST_OBJECT_TASKS}
        shape = list(np.concatenate([t.semantic.numpy() for t in found]))
        colour = list(np.concatenate([ground_truth.colour_masks(t) for t in found]))
        return ground_truth.Truth(
            labels,
            {"shape": (shape, len(scenes.SHAPE_NAMES) + 1, None), "colour": (colour, len(scenes.COLOURS) + 1, None)},
            depth=np.concatenate([t.depth.numpy() for t in found]),
            marks=np.concatenate([t.labels.numpy() for t in found]),
            label=labels["colour and shape"],
        )
    labels_given = [label for b in batches for label in b.labels]
    masks = [m for b in batches for m in b.masks]
    known_masks = [m for m in masks if m is not None]
    return ground_truth.Truth(
        {} if any(s is None for s in labels_given) else {"label": datasets.number(labels_given, name)},
        {"mask": (masks, int(max(m.max() for m in known_masks)) + 1, 0)} if len(known_masks) > 3 else {},
    )


def untrained(backbone: Backbone, seed: int = 0) -> Backbone:
    """The same network before training, without registers where that is known how: backbone, seed → Backbone."""
    if not backbone.card:
        return replace(registry.random(backbone.name, seed=seed), name=f"{backbone.name}, untrained")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = timm.models.VisionTransformer(**_plain(backbone))
    net.to(backbone.device)
    name, weights = f"{backbone.name}, untrained", f"random, seed {seed}"
    return replace(backbone, net=net, name=name, source="random weights", weights=weights)


def _plain(backbone: Backbone) -> dict[str, Any]:
    """Shape of a model trained here, as timm builds it, without registers and head."""
    return {**backbone.card["vit"], "reg_tokens": 0, "num_classes": 0}


def _per_image(values: np.ndarray, at: np.ndarray, count: int) -> np.ndarray:
    """Values of some images among all: (m,), their indices → (count,), nan for the others."""
    full = np.full(count, np.nan)
    full[at] = values
    return full


def probe(
    states: xr.DataArray, truth: ground_truth.Truth, *, text: dict[str, torch.Tensor] | None = None, **how: Any
) -> xr.Dataset:
    """Probe frozen features for all that is known of their images: [image, token, channel] with CLS (if any) and
    patches, Truth, the text side of a CLIP model, options of the dense probes (steps, bins, head, seed) →
    Dataset[metric] (Table 2).

    score, low, high, chance, n; each[mean, image], what an image adds to a mean (nan: it was trained on);
    counts[segments, image, side, class], what it adds to an mIoU. What images do not tell is left out. Raises
    InputError if they tell nothing.
    """
    count, patch = states.sizes["image"], arrays.patches(states)
    cls = states.isel(token=np.flatnonzero(states["kind"] == "cls")[:1])
    train_count = round(dense.SHARE * count)
    both = np.concatenate([part.mean("token").values for part in (cls, patch) if part.sizes["token"]], 1)
    both = (both - both[:train_count].mean(0)) / (both[:train_count].std(0) + 1e-6)
    rows: dict[str, tuple[float, ...]] = {}
    per_image: dict[str, np.ndarray] = {}
    counts: dict[str, np.ndarray] = {}
    for name, y in truth.labels.items():
        s = classification.score(both, y, train_count=train_count, strengths=STRENGTHS, seed=how.get("seed", 0))
        rows[name] = _numbers(s, "score")
        per_image[name] = _per_image(
            s["right"].values, np.flatnonzero((np.arange(count) >= train_count) & (y >= 0)), count
        )
    options = {k: v for k, v in how.items() if k not in ("bins", "head")}
    for name, (masks, kinds, ignore) in truth.masks.items():
        at = np.array([i for i, m in enumerate(masks) if m is not None])
        s = dense.segment(patch.isel(image=at), [masks[i] for i in at], classes=kinds, ignore=ignore, **options)
        rows[f"{name} mIoU"] = _numbers(s, "miou")
        full = np.zeros((count, 2, kinds))
        full[at[s["image"].values]] = dense.counts(s["confusion"].values)
        counts[f"{name} mIoU"] = full
    if truth.depth is not None:
        beside = cls if cls.sizes["token"] else None
        s = dense.estimate_depth(patch, truth.depth, low=1, high=BACKGROUND, cls=beside, **how)
        rows["depth rmse"] = tuple(float(s[k]) for k in ("rmse", "low_rmse", "high_rmse", "constant", "n"))
        per_image["depth rmse"] = _per_image(s["error"].values, s["image"].values, count)
    if text is not None and truth.marks is not None and truth.label is not None:
        for name, y in (("zero-shot", truth.marks), ("zero-shot, largest", truth.label)):
            s = zero_shot.zero_shot(cls.values[:, 0], text["project"], text["prompts"], y)
            rows[name], per_image[name] = _numbers(s, "score"), s["right"].values.astype(float)
    if not rows:
        raise InputError("these images have neither labels nor masks nor depth: there is nothing to ask for")
    return _fold(rows, per_image, counts)


def _numbers(found: xr.Dataset, score: str) -> tuple[float, ...]:
    return tuple(float(found[k]) for k in (score, "low", "high", "chance", "n"))


def _fold(
    rows: dict[str, tuple[float, ...]], per_image: dict[str, np.ndarray], counts: dict[str, np.ndarray]
) -> xr.Dataset:
    names = ("score", "low", "high", "chance", "n")
    data: dict[str, Any] = {k: ("metric", [r[i] for r in rows.values()]) for i, k in enumerate(names)}
    coords: dict[str, Any] = {"metric": list(rows)}
    if per_image:
        data["each"] = (("mean", "image"), np.stack(list(per_image.values())).astype(np.float32))
        coords["mean"] = list(per_image)
    if counts:
        data["counts"] = (("segments", "image", "side", "class"), np.stack(list(counts.values())).astype(np.int32))
        coords["segments"] = list(counts)
    return xr.Dataset(data, coords=coords)


def measure(
    backbone: Backbone,
    images: Images,
    *,
    layer: int = -1,
    final_norm: bool = True,
    floor: bool = False,
    batch: int = 32,
    **how: Any,
) -> xr.Dataset:
    """All of Table 2 for one network: backbone, images, layer and whether its final norm is applied, whether an untrained
    network of the same shape is asked too, options of `probe` → Dataset[metric] of `probe`, registers, floor[metric] (or nan).

    Zero-shot needs the last layer and its norm. Raises InputError as `probe` does.
    """
    options: Any = {"layer": layer, "kinds": ("cls", "patch"), "final_norm": final_norm}
    what: Any = {"tokens": [layer], "kinds": ("cls", "patch"), "final_norm": final_norm}
    parts, known = [], []
    for part, seen in capture.stream(backbone, images, batch=batch, **what):
        parts.append(seen)
        known.append(replace(part, pixels=part.pixels[:0]))
    states = capture.join(parts)["tokens"].isel(tokens_layer=0)
    truth = _truth(known, images.name)
    words = registry.words(backbone.name) if final_norm and layer in (-1, backbone.depth) else None
    found = probe(states, truth, text=words, **how)
    lowest = np.full(found.sizes["metric"], np.nan)
    if floor:
        shape = _plain(backbone) if backbone.card else backbone.name
        key = json.dumps([shape, images.key, options, how, backbone.mean, backbone.std], default=str)
        if key not in FLOORS:
            blank = capture.tokens(untrained(backbone), images, batch=batch, **options)
            FLOORS[key] = probe(blank, truth, **how)
        lowest = FLOORS[key]["score"].reindex(metric=found["metric"].values).values
    facts = {"floor": ("metric", lowest), "registers": ((), backbone.registers)}
    return found.assign(facts).assign_coords(model=backbone.name)


def difference(first: xr.Dataset, second: xr.Dataset, metric: str) -> tuple[float, float, float]:
    """How much the second network scores above the first on the same images: two data sets of `measure`, a metric of both →
    value, low, high (95 %, a paired bootstrap over images).

    Raises InputError for other images.
    """
    name = "segments" if metric in first.get("segments", ()) else "mean"
    a, b = (
        d["counts" if name == "segments" else "each"].sel({name: metric}).values.astype(float) for d in (first, second)
    )
    if a.shape != b.shape:
        raise InputError(f"{metric} was measured on {len(a)} and {len(b)} images: only the same ones can be compared")
    if name == "segments":
        there = a.any((1, 2)) & b.any((1, 2))
        paired = np.stack([a, b], 1)[there]
        return arrays.bootstrap_interval(paired, draws=1000, of=_gain)
    gap = b - a
    return arrays.bootstrap_interval(gap[np.isfinite(gap)])


def _gain(paired: np.ndarray, axis: int = 0) -> np.ndarray:
    """Second mIoU minus first: counts (…, image, 2 networks, side, class), the axis of the images → (…)."""
    one, other = (dense.miou(np.take(paired, i, axis + 1), axis) for i in (0, 1))
    return other - one
