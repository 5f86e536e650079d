"""Everything that Table 2 asks of a network, from one pass over the pictures: classes, segments, depth, words."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import timm
import torch
import xarray as xr

from vitregs import artifacts, backbones, capture, scenes
from vitregs.backbones import Backbone
from vitregs.images import Batch, Images
from vitregs.probes import classes, dense, tasks, zero
from vitregs.problems import Problem

ASKED = ("colour", "shape", "colour and shape")  # of the object with the largest area
STRENGTHS = (0.1, 1.0, 10.0)  # of the classifier: near the best for all our networks, so that the choice is hardly luck
WALL = scenes.WALL_DEPTH
FLOORS: dict[str, xr.Dataset] = {}  # scores of untrained networks: several models of a chapter share one


@dataclass
class Truth:
    """What is known of pictures: classes, masks with their number of classes and a class to ignore, depth, classes in view."""

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


def _truth(batches: Sequence[Batch], name: str) -> Truth:
    """Collect what is known of pictures, whatever it is: batches, name of their source → Truth."""
    found = [b.truth for b in batches if b.truth is not None]
    if found:
        labels = {k: np.concatenate([tasks.SCENES[k](t) for t in found]) for k in ASKED}
        shape = list(np.concatenate([t.semantic.numpy() for t in found]))
        colour = list(np.concatenate([colour_masks(t) for t in found]))
        return Truth(
            labels,
            {"shape": (shape, len(scenes.SHAPE_NAMES) + 1, None), "colour": (colour, len(scenes.COLOURS) + 1, None)},
            depth=np.concatenate([t.depth.numpy() for t in found]),
            marks=np.concatenate([t.labels.numpy() for t in found]),
            label=labels["colour and shape"],
        )
    said = [label for b in batches for label in b.labels]
    masks = [m for b in batches for m in b.masks]
    there = [m for m in masks if m is not None]
    return Truth(
        {} if any(s is None for s in said) else {"label": tasks.number(said, name)},
        {"mask": (masks, int(max(m.max() for m in there)) + 1, 0)} if len(there) > 3 else {},
    )


def untrained(backbone: Backbone, seed: int = 0) -> Backbone:
    """The same network before training, without registers where that is known how: backbone, seed → Backbone."""
    if not backbone.card:
        return replace(backbones.random(backbone.name, seed=seed), name=f"{backbone.name}, untrained")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = timm.models.VisionTransformer(**_plain(backbone))
    net.to(backbone.device)
    name, weights = f"{backbone.name}, untrained", f"random, seed {seed}"
    return replace(backbone, net=net, name=name, source="random weights", weights=weights)


def _plain(backbone: Backbone) -> dict[str, Any]:
    """Shape of a model trained here, as timm builds it, without registers and head."""
    return {**backbone.card["vit"], "reg_tokens": 0, "num_classes": 0}


def _each(values: np.ndarray, at: np.ndarray, count: int) -> np.ndarray:
    """Values of some pictures among all: (m,), their indices → (count,), nan for the others."""
    full = np.full(count, np.nan)
    full[at] = values
    return full


def probe(
    states: xr.DataArray, truth: Truth, *, words: dict[str, torch.Tensor] | None = None, **how: Any
) -> xr.Dataset:
    """Ask frozen features all that is known of their pictures: [image, token, channel] with CLS (if any) and patches, Truth, the
    text side of a CLIP model, options of the dense probes (steps, bins, head, seed) → Dataset[metric] (Table 2).

    score, low, high, chance, n; each[mean, image], what a picture adds to a mean (nan: it taught); counts[segments, image, side,
    class], what it adds to an mIoU. What pictures do not tell is left out. Raises Problem if they tell nothing.
    """
    count, patch = states.sizes["image"], artifacts.patches(states)
    cls = states.isel(token=np.flatnonzero(states["kind"] == "cls")[:1])
    taught = round(dense.SHARE * count)
    both = np.concatenate([part.mean("token").values for part in (cls, patch) if part.sizes["token"]], 1)
    both = (both - both[:taught].mean(0)) / (both[:taught].std(0) + 1e-6)
    rows: dict[str, tuple[float, ...]] = {}
    each: dict[str, np.ndarray] = {}
    counts: dict[str, np.ndarray] = {}
    for name, y in truth.labels.items():
        s = classes.score(both, y, taught=taught, strengths=STRENGTHS, seed=how.get("seed", 0))
        rows[name] = _numbers(s, "score")
        each[name] = _each(s["right"].values, np.flatnonzero((np.arange(count) >= taught) & (y >= 0)), count)
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
        s = dense.estimate_depth(patch, truth.depth, low=1, high=WALL, cls=beside, **how)
        rows["depth rmse"] = tuple(float(s[k]) for k in ("rmse", "low_rmse", "high_rmse", "constant", "n"))
        each["depth rmse"] = _each(s["error"].values, s["image"].values, count)
    if words is not None and truth.marks is not None and truth.label is not None:
        for name, y in (("zero-shot", truth.marks), ("zero-shot, largest", truth.label)):
            s = zero.zero_shot(cls.values[:, 0], words["project"], words["prompts"], y)
            rows[name], each[name] = _numbers(s, "score"), s["right"].values.astype(float)
    if not rows:
        raise Problem("these pictures have neither labels nor masks nor depth: there is nothing to ask for")
    return _fold(rows, each, counts)


def _numbers(found: xr.Dataset, score: str) -> tuple[float, ...]:
    return tuple(float(found[k]) for k in (score, "low", "high", "chance", "n"))


def _fold(rows: dict[str, tuple[float, ...]], each: dict[str, np.ndarray], counts: dict[str, np.ndarray]) -> xr.Dataset:
    names = ("score", "low", "high", "chance", "n")
    data: dict[str, Any] = {k: ("metric", [r[i] for r in rows.values()]) for i, k in enumerate(names)}
    coords: dict[str, Any] = {"metric": list(rows)}
    if each:
        data["each"] = (("mean", "image"), np.stack(list(each.values())).astype(np.float32))
        coords["mean"] = list(each)
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
    """All of Table 2 for one network: backbone, pictures, layer and whether its final norm is applied, whether an untrained
    network of the same shape is asked too, options of `probe` → Dataset[metric] of `probe`, registers, floor[metric] (or nan).

    Zero-shot needs the last layer and its norm. Raises Problem as `probe` does.
    """
    options: Any = {"layer": layer, "kinds": ("cls", "patch"), "final_norm": final_norm}
    what: Any = {"tokens": [layer], "kinds": ("cls", "patch"), "final_norm": final_norm}
    parts, known = [], []
    for part, seen in capture.stream(backbone, images, batch=batch, **what):
        parts.append(seen)
        known.append(replace(part, pixels=part.pixels[:0]))
    states = capture.join(parts)["tokens"].isel(tokens_layer=0)
    truth = _truth(known, images.name)
    words = backbones.words(backbone.name) if final_norm and layer in (-1, backbone.depth) else None
    found = probe(states, truth, words=words, **how)
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
    """How much the second network scores above the first on the same pictures: two data sets of `measure`, a metric of both →
    value, low, high (95 %, a paired bootstrap over pictures).

    Raises Problem for other pictures.
    """
    name = "segments" if metric in first.get("segments", ()) else "mean"
    a, b = (
        d["counts" if name == "segments" else "each"].sel({name: metric}).values.astype(float) for d in (first, second)
    )
    if a.shape != b.shape:
        raise Problem(f"{metric} was measured on {len(a)} and {len(b)} pictures: only the same ones can be compared")
    if name == "segments":
        there = a.any((1, 2)) & b.any((1, 2))
        paired = np.stack([a, b], 1)[there]
        return artifacts.interval(paired, draws=1000, of=_gain)
    gap = b - a
    return artifacts.interval(gap[np.isfinite(gap)])


def _gain(paired: np.ndarray, axis: int = 0) -> np.ndarray:
    """Second mIoU minus first: counts (…, image, 2 networks, side, class), the axis of the pictures → (…)."""
    one, other = (dense.miou(np.take(paired, i, axis + 1), axis) for i in (0, 1))
    return other - one
