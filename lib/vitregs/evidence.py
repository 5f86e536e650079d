"""What stored results say on each claim: one short function a quantity, from the arrays in `data/results`.

Differences are register model minus plain model, or outliers minus the rest, with a 95 % bootstrap over pictures where both
stand for the same pictures, and from the two intervals where they do not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr

from vitregs import artifacts, backbones, images, objects, published, resize, results, tables

PAIRS = ("supervised-pico", "clip-pico", "mae-pico", "dino-pico", "dinov2-pico")
Evidence = Callable[[Path], "Measured"]


@dataclass(frozen=True)
class Measured:
    """A measured value with its 95 % interval, how many things it rests on, and of what it is."""

    value: float
    low: float
    high: float
    n: int
    what: str

    def text(self) -> str:
        """The value with its interval, if it has one."""
        if self.low == self.high == self.value:
            return f"{self.value:.3g}"
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


MEASURES: dict[str, Evidence] = {}


def measure(function: Evidence) -> Evidence:
    """Enter a function of the results folder among the measures that a claim can name."""
    MEASURES[function.__name__] = function  # type: ignore[attr-defined]
    return function


def read(folder: Path, chapter: str, name: str, model: str) -> xr.Dataset:
    """One stored result: folder, chapter, name, model → Dataset. Raises Problem if it is missing."""
    return results.load(folder / chapter / f"{name}.{model}.nc")


def _exact(value: float, n: int, what: str) -> Measured:
    return Measured(value, value, value, n, what)


def _mean(values: np.ndarray, what: str) -> Measured:
    """Mean of per-picture values."""
    kept = np.asarray(values, float)
    kept = kept[np.isfinite(kept)]
    return Measured(*artifacts.interval(kept), len(kept), what)


def _apart(one: xr.Dataset, two: xr.Dataset, times: float, n: int, what: str) -> Measured:
    """Difference of two scores with their own intervals: the half-widths add as independent errors do."""
    (a, la, ha), (b, lb, hb) = ([float(d[k]) for k in ("score", "low", "high")] for d in (one, two))
    down, up = np.hypot(a - la, hb - b), np.hypot(ha - a, b - lb)
    return Measured(times * (a - b), times * (a - b - down), times * (a - b + up), n, what)


def norms(folder: Path, model: str) -> xr.DataArray:
    """Norms at all layers of a zoo model: → [image, layer, token]."""
    chapter = "03_when_outliers_appear" if model.startswith("hunt") else "07_registers"
    return read(folder, chapter, "norms", model)["value"]


# --- norms


def modes(folder: Path, models: Sequence[str]) -> dict[str, float]:
    """Share of patches in an outlier mode at the strongest layer of each model, 0 without one."""
    found = {}
    for model in models:
        best = artifacts.strongest(artifacts.by_layer(norms(folder, model)))
        found[model] = float(best.share) if np.isfinite(best.cutoff) else 0.0
    return found


@measure
def any_mode(folder: Path) -> Measured:
    """Largest share of patches, in per cent, that form an outlier mode in a network without registers."""
    found = modes(folder, [*PAIRS, "hunt-pico", "hunt-long"])
    best = max(found, key=lambda m: found[m])
    return _exact(100 * found[best], 64, best)


@measure
def largest_mode(folder: Path) -> Measured:
    """Centre of the outlier mode over the median norm, at its strongest."""
    rows = {m: artifacts.strongest(artifacts.by_layer(norms(folder, m))) for m in (*PAIRS, "hunt-pico")}
    best = max((m for m in rows if np.isfinite(rows[m].cutoff)), key=lambda m: rows[m].ratio, default="")
    return _exact(float(rows[best].ratio) if best else 0.0, 64, best or "no model has a mode")


@measure
def dino_mode(folder: Path) -> Measured:
    """Per cent of patches in an outlier mode of DINO."""
    return _exact(100 * modes(folder, ["dino-pico"])["dino-pico"], 64, "dino-pico")


@measure
def first_layer(folder: Path) -> Measured:
    """First layer with an outlier mode, as a share of the depth."""
    table = artifacts.by_layer(norms(folder, "hunt-pico"))
    there = table[(table["layer"] > 0) & table["cutoff"].notna()]
    depth = int(table["layer"].max())
    return _exact(float(there["layer"].min()) / depth if len(there) else 1.0, 64, "hunt-pico")


@measure
def onset(folder: Path) -> Measured:
    """First look at which the rule of emergence holds, as a share of the training; 1 if it never does."""
    log = backbones.history("hunt-pico")
    assert log is not None
    top, far = (log[k].isel(layer=slice(1, None)) for k in ("top1", "separation"))
    held = ((top >= artifacts.EMERGED_TOP1) & (far >= artifacts.EMERGED_SEPARATION)).any("layer").values
    steps = log["step"].values
    return _exact(float(steps[held][0] / steps[-1]) if held.any() else 1.0, 1, "hunt-pico, its history")


@measure
def widest_only(folder: Path) -> Measured:
    """Top-1-% over median norm of the widest network, minus that of the narrowest, at their strongest layers."""
    ends = [
        artifacts.top_ratio(a).sel(layer=int(artifacts.strongest(artifacts.by_layer(a)).layer)).values
        for a in (norms(folder, m) for m in ("hunt-pico", "hunt-femto"))
    ]
    return _mean(ends[0] - ends[1], "hunt-pico − hunt-femto")


@measure
def artifact_ratio(folder: Path) -> Measured:
    """Largest over median patch norm in the last layer, register model over plain model, mean over the pairs of the paper."""
    logs = [
        np.log(artifacts.largest_ratio(norms(folder, f"{m}-reg4")).isel(layer=-1).values)
        - np.log(artifacts.largest_ratio(norms(folder, m)).isel(layer=-1).values)
        for m in ("supervised-pico", "clip-pico", "dinov2-pico")
    ]
    found = _mean(np.mean(logs, 0), "three pairs")
    value, low, high = np.exp([found.value, found.low, found.high]).tolist()
    return Measured(value, low, high, found.n, found.what)


def _registers(folder: Path, model: str) -> tuple[np.ndarray, np.ndarray]:
    """Norms in the last layer: registers (pictures, registers) and patches (pictures, patches)."""
    last = norms(folder, model).isel(layer=-1).transpose("image", "token")
    kind = np.asarray(last["kind"])
    return last.values[:, kind == "register"], last.values[:, kind == "patch"]


@measure
def register_height(folder: Path) -> Measured:
    """Largest register norm over the median patch norm, mean over pictures."""
    register, patch = _registers(folder, "dinov2-pico-reg4")
    return _mean(register.max(1) / np.median(patch, 1), "dinov2-pico-reg4")


@measure
def register_height_clip(folder: Path) -> Measured:
    """The same of CLIP."""
    register, patch = _registers(folder, "clip-pico-reg4")
    return _mean(register.max(1) / np.median(patch, 1), "clip-pico-reg4")


@measure
def register_spread(folder: Path) -> Measured:
    """Largest over smallest mean norm of the four registers."""
    register, _ = _registers(folder, "dinov2-pico-reg4")
    mean = register.mean(0)
    return _exact(float(mean.max() / mean.min()), len(register), "dinov2-pico-reg4")


@measure
def register_bands(folder: Path) -> Measured:
    """Variation of a register's norm over pictures, as a share of that of patch norms (coefficients of variation)."""
    register, patch = _registers(folder, "dinov2-pico-reg4")
    band = (register.std(0) / register.mean(0)).mean()
    return _exact(float(band / (patch.std() / patch.mean())), len(register), "dinov2-pico-reg4")


# --- attention and redundancy


@measure
def attention_peak(folder: Path) -> Measured:
    """Part of the CLS attention that falls on one patch, in per cent: plain model minus register model."""
    peaks = [
        artifacts.peak_share(read(folder, "01_attention_artifacts", "cls_attention", m)["value"]).isel(
            layer=-1, query=0
        )
        for m in ("supervised-pico", "supervised-pico-reg4")
    ]
    return _mean(100 * (peaks[0].values - peaks[1].values), "supervised pair")


def _similar(folder: Path, chapter: str, model: str, share: float) -> np.ndarray:
    """Neighbour similarity of marked patches minus that of the others, in each picture that has both."""
    at = read(folder, chapter, "norms", model)["value"]
    if "layer" in at.dims:
        at = at.isel(layer=-1)
    marked, _ = artifacts.mark(at, artifacts.cutoff(at), share)
    hot = artifacts.patches(marked).transpose("image", "token").values
    found = read(folder, chapter, "similarity", model)["value"].transpose("image", "token").values
    with np.errstate(invalid="ignore"):
        inside = np.where(hot, found, 0).sum(1) / hot.sum(1)
        outside = np.where(hot, 0, found).sum(1) / (~hot).sum(1)
    return inside - outside


@measure
def similarity(folder: Path) -> Measured:
    """Cosine similarity to the neighbours of the top 2 % of norms, minus that of other patches."""
    return _mean(_similar(folder, "04_redundant_patches", "supervised-pico", 0.02), "supervised-pico")


@measure
def similarity_deit(folder: Path) -> Measured:
    """The same of a published network on photographs."""
    base = folder / "deit_tiny_on_coco"
    model = "deit_tiny_patch16_224"
    return _mean(_similar(base, "04_redundant_patches", model, 0.04), "DeiT-Tiny on COCO")


@measure
def border(folder: Path) -> Measured:
    """Share of the top 2 % of norms on border cells over their share of all cells."""
    at = read(folder, "04_redundant_patches", "norms", "supervised-pico")["value"]
    marked, _ = artifacts.mark(at, artifacts.cutoff(at), 0.02)
    patch = artifacts.patches(marked).transpose("image", "token")
    y, x = patch["y"].values, patch["x"].values
    edge = (y == 0) | (x == 0) | (y == y.max()) | (x == x.max())
    value, low, high = artifacts.ratio(patch.values[:, edge].sum(1), patch.values.sum(1))
    return Measured(value / edge.mean(), low / edge.mean(), high / edge.mean(), len(patch), "supervised-pico")


@measure
def stripes(_folder: Path) -> Measured:
    """Largest deviation of the gradient worked out here from the published vectors, all three variants."""
    ways = {
        "no_antialias_size": resize.gradient(16, 7, antialias=False),
        "no_antialias_scale": resize.gradient(16, 7, antialias=False, scale=7.1 / 16),
        "antialias_size": resize.gradient(16, 7, antialias=True),
    }
    table = published.table("fig11")
    worst = max(
        float(np.abs(table[table["variant"] == k].sort_values("index")["value"].to_numpy() - g).max())
        for k, g in ways.items()
    )
    return _exact(worst, 48, "three variants")


# --- what tokens know


def _local(folder: Path, model: str, quantity: str, one: str, two: str, times: float) -> Measured:
    data = read(folder, "05_local_information", "local", model).sel(quantity=quantity)
    n = int(data["tokens"].sel(group=one))
    return _apart(data.sel(group=one), data.sel(group=two), times, n, f"{model}, {one} − {two}")


@measure
def position(folder: Path) -> Measured:
    """Positions named right, in points: outliers minus normal patches."""
    return _local(folder, "hunt-pico", "top1", "outlier", "normal", 100)


@measure
def position_controlled(folder: Path) -> Measured:
    """The same, minus normal patches that show an object too."""
    return _local(folder, "hunt-pico", "top1", "outlier", "normal on objects", 100)


@measure
def position_above_chance(folder: Path) -> Measured:
    """Positions of outliers named right, in points above chance."""
    data = read(folder, "05_local_information", "local", "hunt-pico").sel(quantity="top1", group="outlier")
    value, low, high = (100 * float(data[k]) - 100 / 64 for k in ("score", "low", "high"))
    return Measured(value, low, high, int(data["tokens"]), "hunt-pico")


@measure
def pixels(folder: Path) -> Measured:
    """Error of reconstructed pixels (L2): outliers minus normal patches."""
    return _local(folder, "hunt-pico", "l2", "outlier", "normal", 1)


@measure
def position_registers(folder: Path) -> Measured:
    """Positions of normal patches named right, in points: register model minus plain model."""
    pair = [
        read(folder, "05_local_information", "local", m).sel(quantity="top1", group="normal")
        for m in ("dinov2-pico-reg4", "dinov2-pico")
    ]
    return _apart(pair[0], pair[1], 100, int(pair[0]["tokens"]), "DINOv2 pair")


def _tokens(folder: Path, model: str, one: str, two: str) -> Measured:
    score = 100 * read(folder, "06_global_information", "tokens", model)["score"]
    gap = (score.sel(token=one) - score.sel(token=two)).values
    return Measured(*artifacts.interval(gap), len(gap), f"{model}, over {len(gap)} questions")


@measure
def outlier_knows(folder: Path) -> Measured:
    """Score of one outlier minus that of one normal patch, in points, mean over the questions."""
    return _tokens(folder, "hunt-pico", "outlier", "normal")


@measure
def outlier_and_cls(folder: Path) -> Measured:
    """Score of one outlier minus that of CLS, in points."""
    return _tokens(folder, "hunt-pico", "outlier", "cls")


@measure
def register_knows(folder: Path) -> Measured:
    """Score of one register minus that of one patch, in points."""
    return _tokens(folder, "clip-pico-reg4", "register", "normal")


# --- feature maps


@measure
def mae_beyond(folder: Path) -> Measured:
    """Per cent of patches beyond 3 spreads of the first component of MAE."""
    first = read(folder, "12_feature_maps", "components", "mae-pico")["maps"].isel(component=0).values
    return _mean(100 * (np.abs(first) > 3).mean((1, 2)), "mae-pico")


@measure
def smoother(folder: Path) -> Measured:
    """Per cent of patches beyond 3 spreads of the first component: plain minus register models, three pairs."""
    shares = {
        m: 100
        * (np.abs(read(folder, "12_feature_maps", "components", m)["maps"].isel(component=0).values) > 3).mean((1, 2))
        for pair in ("supervised-pico", "clip-pico", "dinov2-pico")
        for m in (pair, f"{pair}-reg4")
    }
    gaps = [shares[m] - shares[f"{m}-reg4"] for m in ("supervised-pico", "clip-pico", "dinov2-pico")]
    return _mean(np.mean(gaps, 0), "three pairs")


# --- what registers look at


@measure
def registers_part(folder: Path) -> Measured:
    """Pairs of registers that share a favourite object, in points below what blind choice gives; the 16-register model."""
    maps, seen = (read(folder, "11_register_attention", k, "clip-pico-reg16") for k in ("maps", "things"))
    attention = maps["value"]
    found = objects.variety(attention.isel(query=attention["query_kind"].values == "register"), seen)
    return _mean(100 * (found["same_by_chance"] - found["same"]).values, "clip-pico-reg16")


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


# --- conditions


def has_mode(folder: Path) -> bool:
    """Some network without registers has an outlier mode, whatever it sits on."""
    return any_mode(folder).value > 0


def has_artifacts(folder: Path) -> bool:
    """Some network without registers has outliers that prefer plain background: the paper's artifact (rule of the hunt)."""
    found = {m: norms(folder, m) for m in PAIRS}
    grounds = {m: grounds_of(found[m]) for m in found}
    return bool((tables.hunt(found, grounds)["artifact"] == "yes").any())


def grounds_of(array: xr.DataArray) -> np.ndarray:
    """Share of background in every patch of the scenes that a chapter measured: norms → (pictures, patches)."""
    patch = artifacts.patches(array)
    rows, columns = int(patch["y"].max()) + 1, int(patch["x"].max()) + 1
    size = {8: 64, 12: 96}[rows]
    found = images.load("scenes", size=size, count=array.sizes["image"]).background((rows, columns))
    assert found is not None
    return found


@measure
def artifact_exists(folder: Path) -> Measured:
    """1 if some network without registers has the paper's artifact, else 0."""
    return _exact(float(has_artifacts(folder)), 64, "five networks without registers")


NEEDS: dict[str, Callable[[Path], bool]] = {"mode": has_mode, "artifacts": has_artifacts}
