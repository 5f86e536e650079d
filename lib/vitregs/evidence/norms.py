"""Evidence on outliers themselves: norms, layers, training, attention, redundancy, positions (Fig 1 to 5, 7, 10, 11, 15)."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xarray as xr

from vitregs import artifacts, backbones, images, published, resize, tables
from vitregs.evidence.measured import NEEDS, PAIRS, Measured, exact, mean, measure, read


def norms(folder: Path, model: str) -> xr.DataArray:
    """Norms at all layers of a zoo model: → [image, layer, token]."""
    chapter = "03_when_outliers_appear" if model.startswith("hunt") else "07_registers"
    return read(folder, chapter, "norms", model)["value"]


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
    return exact(100 * found[best], 64, best)


@measure
def largest_mode(folder: Path) -> Measured:
    """Centre of the outlier mode over the median norm, at its strongest."""
    rows = {m: artifacts.strongest(artifacts.by_layer(norms(folder, m))) for m in (*PAIRS, "hunt-pico")}
    best = max((m for m in rows if np.isfinite(rows[m].cutoff)), key=lambda m: rows[m].ratio, default="")
    return exact(float(rows[best].ratio) if best else 0.0, 64, best or "no model has a mode")


@measure
def dino_mode(folder: Path) -> Measured:
    """Per cent of patches in an outlier mode of DINO."""
    return exact(100 * modes(folder, ["dino-pico"])["dino-pico"], 64, "dino-pico")


@measure
def first_layer(folder: Path) -> Measured:
    """First layer with an outlier mode, as a share of the depth."""
    table = artifacts.by_layer(norms(folder, "hunt-pico"))
    there = table[(table["layer"] > 0) & table["cutoff"].notna()]
    depth = int(table["layer"].max())
    return exact(float(there["layer"].min()) / depth if len(there) else 1.0, 64, "hunt-pico")


@measure
def onset(folder: Path) -> Measured:
    """First look at which the rule of emergence holds, as a share of the training; 1 if it never does."""
    log = backbones.history("hunt-pico")
    assert log is not None
    top, far = (log[k].isel(layer=slice(1, None)) for k in ("top1", "separation"))
    held = ((top >= artifacts.EMERGED_TOP1) & (far >= artifacts.EMERGED_SEPARATION)).any("layer").values
    steps = log["step"].values
    return exact(float(steps[held][0] / steps[-1]) if held.any() else 1.0, 1, "hunt-pico, its history")


@measure
def widest_only(folder: Path) -> Measured:
    """Top-1-% over median norm of the widest network, minus that of the narrowest, at their strongest layers."""
    ends = [
        artifacts.top_ratio(a).sel(layer=int(artifacts.strongest(artifacts.by_layer(a)).layer)).values
        for a in (norms(folder, m) for m in ("hunt-pico", "hunt-femto"))
    ]
    return mean(ends[0] - ends[1], "hunt-pico − hunt-femto")


@measure
def artifact_ratio(folder: Path) -> Measured:
    """Largest over median patch norm in the last layer, register model over plain model, mean over the pairs of the paper."""
    logs = [
        np.log(artifacts.largest_ratio(norms(folder, f"{m}-reg4")).isel(layer=-1).values)
        - np.log(artifacts.largest_ratio(norms(folder, m)).isel(layer=-1).values)
        for m in ("supervised-pico", "clip-pico", "dinov2-pico")
    ]
    found = mean(np.mean(logs, 0), "three pairs")
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
    return mean(register.max(1) / np.median(patch, 1), "dinov2-pico-reg4")


@measure
def register_height_clip(folder: Path) -> Measured:
    """The same of CLIP."""
    register, patch = _registers(folder, "clip-pico-reg4")
    return mean(register.max(1) / np.median(patch, 1), "clip-pico-reg4")


@measure
def register_spread(folder: Path) -> Measured:
    """Largest over smallest mean norm of the four registers."""
    register, _ = _registers(folder, "dinov2-pico-reg4")
    mean = register.mean(0)
    return exact(float(mean.max() / mean.min()), len(register), "dinov2-pico-reg4")


@measure
def register_bands(folder: Path) -> Measured:
    """Variation of a register's norm over pictures, as a share of that of patch norms (coefficients of variation)."""
    register, patch = _registers(folder, "dinov2-pico-reg4")
    band = (register.std(0) / register.mean(0)).mean()
    return exact(float(band / (patch.std() / patch.mean())), len(register), "dinov2-pico-reg4")


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
    return mean(100 * (peaks[0].values - peaks[1].values), "supervised pair")


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
    return mean(_similar(folder, "04_redundant_patches", "supervised-pico", 0.02), "supervised-pico")


@measure
def similarity_deit(folder: Path) -> Measured:
    """The same of a published network on photographs."""
    base = folder / "deit_tiny_on_coco"
    model = "deit_tiny_patch16_224"
    return mean(_similar(base, "04_redundant_patches", model, 0.04), "DeiT-Tiny on COCO")


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
    return exact(worst, 48, "three variants")


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
    return exact(float(has_artifacts(folder)), 64, "five networks without registers")


NEEDS |= {"mode": has_mode, "artifacts": has_artifacts}
