"""Evidence on what registers look at, cost and bring (Fig 8, 9, 12, 14, 16, Tables 2, 3).

Differences are register model minus plain model, with a 95 % bootstrap over the same pictures.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xarray as xr

from vitregs import costs, objects
from vitregs.evidence.measured import PAPERS, Measured, exact, mean, measure, pairs, read, sweep
from vitregs.probes import transfer


@measure
def registers_part(folder: Path) -> Measured:
    """Pairs of registers that share a favourite object, in points below what blind choice gives; the 16-register model."""
    maps, seen = (read(folder, "11_register_attention", k, "clip-pico-reg16") for k in ("maps", "things"))
    attention = maps["value"]
    found = objects.variety(attention.isel(query=attention["query_kind"].values == "register"), seen)
    return mean(100 * (found["same_by_chance"] - found["same"]).values, "clip-pico-reg16")


@measure
def wide_maps(folder: Path) -> Measured:
    """Patches that the mean map of CLS and registers covers (exponential of its entropy), over those of a patch's mean map."""
    maps = read(folder, "11_register_attention", "maps", "dinov2-pico-reg4")["value"]
    flat = maps.values.reshape(*maps.shape[:2], -1)
    own = maps["query_kind"].values == "patch"

    def ratio(rows: np.ndarray) -> float:
        mean = flat[rows].mean(0)
        part = mean / mean.sum(1, keepdims=True)
        area = np.exp(-(part * np.log(part)).sum(1))
        return float(area[~own].mean() / area[own].mean())

    every = np.arange(len(flat))
    rng = np.random.default_rng(0)
    drawn = [ratio(rng.choice(every, len(every))) for _ in range(200)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Measured(ratio(every), float(low), float(high), len(every), "dinov2-pico-reg4")


def _change(folder: Path, metric: str, objectives: Sequence[str], times: float) -> Measured:
    """Register model minus plain model, mean over the pairs of some objectives (none: all), whose paired intervals add as
    independent errors do."""
    found = []
    names = pairs(folder, "08_no_regression", "transfer", objectives)
    for pair in names:
        a, b = (read(folder, "08_no_regression", "transfer", m) for m in pair)
        found.append([times * v for v in transfer.difference(a, b, metric)])
    value, low, high = np.array(found).T
    down, up = (np.sqrt(np.square(d).sum()) / len(found) for d in (value - low, high - value))
    n = int(a["n"].sel(metric=metric))
    what = f"{names[0][0]} pair" if len(names) == 1 else f"{len(names)} pairs"
    return Measured(value.mean(), value.mean() - down, value.mean() + up, n, what)


@measure
def linear_change(folder: Path) -> Measured:
    """Colour of the largest object by a linear classifier, in points."""
    return _change(folder, "colour", (), 100)


@measure
def segmentation_change(folder: Path) -> Measured:
    """Segmentation of shapes by a linear head, in points of mIoU."""
    return _change(folder, "shape mIoU", (), 100)


@measure
def depth_change(folder: Path) -> Measured:
    """Depth by a linear head, rmse."""
    return _change(folder, "depth rmse", (), 1)


@measure
def depth_change_supervised(folder: Path) -> Measured:
    """The same of the supervised pair alone."""
    return _change(folder, "depth rmse", ["supervised"], 1)


@measure
def zero_shot_change(folder: Path) -> Measured:
    """Zero-shot accuracy of the CLIP pair, in points."""
    return _change(folder, "zero-shot", ["clip"], 100)


def _gain(folder: Path, metric: str, times: float) -> Measured:
    """Networks with registers minus the one without, mean over their numbers: the paired intervals are taken as one, since all
    share the network without."""
    where = (folder, "09_how_many_registers", "transfer")
    plain, *others = (read(*where, m) for m in sweep(*where).values())
    found = times * np.array([transfer.difference(plain, other, metric) for other in others])
    value, low, high = found.mean(0)
    return Measured(value, low, high, int(plain["n"].sel(metric=metric)), f"CLIP, 1 to {max(sweep(*where))} registers")


@measure
def dense_gain(folder: Path) -> Measured:
    """Segmentation of shapes, points of mIoU."""
    return _gain(folder, "shape mIoU", 100)


@measure
def dense_gain_depth(folder: Path) -> Measured:
    """Depth, rmse."""
    return _gain(folder, "depth rmse", 1)


@measure
def classification_slope(folder: Path) -> Measured:
    """Points of linear classification that each doubling of the registers brings."""
    where = (folder, "09_how_many_registers", "transfer")
    right = {n: read(*where, m)["each"].sel(mean="colour").values for n, m in sweep(*where).items()}
    x = np.log2(np.array(list(right)) + 1.0)
    weight = (x - x.mean()) / np.square(x - x.mean()).sum()
    return mean(100 * weight @ np.stack(list(right.values())), f"CLIP, 0 to {max(right)} registers")


@measure
def one_register(folder: Path) -> Measured:
    """Largest over median norm at the last layer: one register over none."""
    where = (folder, "09_how_many_registers", "ratio")
    names = sweep(*where)
    one, none = (np.log(read(*where, names[n])["value"].isel(layer=-1).values) for n in (1, 0))
    found = mean(one - none, "CLIP")
    value, low, high = np.exp([found.value, found.low, found.high]).tolist()
    return Measured(value, low, high, found.n, found.what)


def _cost(registers: int) -> Measured:
    table = costs.increase(costs.PUBLISHED["ViT-L/14"], [registers])
    return exact(float(table["flops"].iloc[0]), 1, "ViT-L/14, counted")


@measure
def cost_of_four(_folder: Path) -> Measured:
    """Per cent of multiply-adds that four registers add to ViT-L/14 at 224 pixels."""
    return _cost(4)


@measure
def cost_of_sixteen(_folder: Path) -> Measured:
    """The same of sixteen."""
    return _cost(16)


# --- objects found


def _hits(folder: Path, model: str) -> np.ndarray:
    """Hits of LOST at the bias chosen on the other half of the pictures, in per cent: → (pictures,), nan for the first half."""
    data = read(folder, "10_object_discovery", "lost", model)
    return 100 * data["hit"].sel(projection=str(data["used"].values), rule="best").values


def _corloc(folder: Path, objective: str) -> Measured:
    ((plain, with_),) = pairs(folder, "10_object_discovery", "lost", [objective])
    return mean(_hits(folder, with_) - _hits(folder, plain), f"{plain} pair, best bias")


@measure
def lost_dinov2(folder: Path) -> Measured:
    """CorLoc of LOST, in points."""
    return _corloc(folder, "dinov2")


@measure
def lost_supervised(folder: Path) -> Measured:
    """CorLoc of LOST, in points."""
    return _corloc(folder, "supervised")


@measure
def lost_clip(folder: Path) -> Measured:
    """CorLoc of LOST, in points."""
    return _corloc(folder, "clip")


@measure
def lost_dino_best(folder: Path) -> Measured:
    """CorLoc of DINO minus the mean of the other networks without registers, in points."""
    others = np.mean([_hits(folder, m) for m, _ in pairs(folder, "10_object_discovery", "lost", PAPERS)], 0)
    return mean(_hits(folder, "dino-pico") - others, "dino-pico − three others, best bias")


def _value(data: xr.Dataset, what: str) -> Measured:
    at = data.sel(projection="value")
    return Measured(*(float(at[k]) for k in ("ratio", "low", "high")), int(at["n"]), what)  # type: ignore[call-arg, arg-type]


@measure
def value_ratio(folder: Path) -> Measured:
    """Length of the value projection of the largest norms over that of the others."""
    return _value(read(folder, "10_object_discovery", "lengths", "clip-pico"), "clip-pico")


@measure
def value_ratio_deit(folder: Path) -> Measured:
    """The same of a published network on photographs."""
    found = read(folder / "deit_tiny_on_coco", "10_object_discovery", "lengths", "deit_tiny_patch16_224")
    return _value(found, "DeiT-Tiny on COCO, top 2 % of norms")
