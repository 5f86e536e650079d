"""Evidence on outliers themselves: norms, layers, training, attention, redundancy, positions (Fig 1 to 5, 7, 10, 11, 15)."""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from vitregs import artifacts, backbones, published, resize
from vitregs.evidence.measured import NEEDS, PAPERS, Measured, exact, mean, measure, pairs, read, stored, written

CHAPTERS = ("03_when_outliers_appear", "07_registers")  # which keep norms at all layers


def kept(folder: Path, model: str) -> xr.Dataset:
    """Norms of a model at all layers with the truth of their images: → `value` [image, layer, token], `background` [image,
    patch] where there are masks."""
    return read(folder, _chapter(folder, model), "norms", model)


def _chapter(folder: Path, model: str) -> str:
    return next((c for c in CHAPTERS if (folder / c / f"norms.{model}.nc").exists()), CHAPTERS[-1])


def layers(folder: Path, model: str) -> pd.DataFrame:
    """Evidence at every layer of a model: → the table of `artifacts.by_layer`, which takes a second to make."""
    return _layers(folder, model, *written(folder / _chapter(folder, model) / f"norms.{model}.nc"))


@lru_cache(maxsize=64)
def _layers(folder: Path, model: str, _inode: int, _time: int) -> pd.DataFrame:
    return artifacts.by_layer(norms(folder, model))


def norms(folder: Path, model: str) -> xr.DataArray:
    """Norms of a model at all layers: → [image, layer, token]."""
    return kept(folder, model)["value"]


def bare(folder: Path) -> list[str]:
    """Networks without registers whose norms are kept at all layers."""
    names = [m for c in CHAPTERS for m in stored(folder, c, "norms")]
    return [m for m in names if not (norms(folder, m)["kind"] == "register").any()]


def modes(folder: Path, models: Iterable[str]) -> dict[str, float]:
    """Share of patches in an outlier mode at the strongest layer of each model, 0 without one."""
    found = {}
    for model in models:
        best = artifacts.strongest(layers(folder, model))
        found[model] = float(best.share) if np.isfinite(best.cutoff) else 0.0
    return found


@measure
def any_mode(folder: Path) -> Measured:
    """Largest share of patches, in per cent, that form an outlier mode in a network without registers."""
    found = modes(folder, bare(folder))
    best = max(found, key=lambda m: found[m])
    return exact(100 * found[best], norms(folder, best).sizes["image"], best)


@measure
def largest_mode(folder: Path) -> Measured:
    """Centre of the outlier mode over the median norm, at its strongest."""
    rows = {m: artifacts.strongest(layers(folder, m)) for m in bare(folder)}
    best = max((m for m in rows if np.isfinite(rows[m].cutoff)), key=lambda m: rows[m].ratio, default="")
    if not best:
        return exact(0.0, 0, "no model has a mode")
    return exact(float(rows[best].ratio), norms(folder, best).sizes["image"], best)


@measure
def dino_mode(folder: Path) -> Measured:
    """Per cent of patches in an outlier mode of DINO."""
    found = norms(folder, "dino-pico").sizes["image"]
    return exact(100 * modes(folder, ["dino-pico"])["dino-pico"], found, "dino-pico")


@measure
def first_layer(folder: Path) -> Measured:
    """First layer with an outlier mode, as a share of the depth."""
    found = norms(folder, "hunt-pico")
    table = layers(folder, "hunt-pico")
    there = table[(table["layer"] > 0) & table["cutoff"].notna()]
    depth = int(table["layer"].max())
    return exact(float(there["layer"].min()) / depth if len(there) else 1.0, found.sizes["image"], "hunt-pico")


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
        artifacts.top_ratio(norms(folder, m)).sel(layer=int(artifacts.strongest(layers(folder, m)).layer)).values
        for m in ("hunt-pico", "hunt-femto")
    ]
    return mean(ends[0] - ends[1], "hunt-pico − hunt-femto")


@measure
def artifact_ratio(folder: Path) -> Measured:
    """Largest over median patch norm in the last layer, register model over plain model, mean over the pairs of the paper."""
    logs = [
        np.log(artifacts.largest_ratio(norms(folder, with_)).isel(layer=-1).values)
        - np.log(artifacts.largest_ratio(norms(folder, plain)).isel(layer=-1).values)
        for plain, with_ in pairs(folder, CHAPTERS[-1], "norms", PAPERS)
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
    where = (folder, "01_attention_artifacts", "cls_attention")
    (pair,) = pairs(*where, ["supervised"])
    peaks = [artifacts.peak_share(read(*where, m)["value"]).isel(layer=-1, query=0) for m in pair]
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
    off = [np.abs(table[table["variant"] == k].sort_values("index")["value"].to_numpy() - g) for k, g in ways.items()]
    return exact(float(np.max(off)), int(np.size(off)), f"{len(off)} variants")


# --- conditions


def has_mode(folder: Path) -> bool:
    """Some network without registers has an outlier mode, whatever it sits on."""
    return any_mode(folder).value > 0


def placed(folder: Path) -> dict[str, bool | None]:
    """Whether each network without registers has outliers that prefer plain background, the paper's artifact by the rule of the
    hunt: → {model: whether, None where outliers are there and no masks tell on what}."""
    found = {m: kept(folder, m) for m in bare(folder)}
    truth = {m: d["background"].values if "background" in d else None for m, d in found.items()}
    return {m: artifacts.hunt(d["value"], truth[m], layers(folder, m)).artifact for m, d in found.items()}


def has_artifacts(folder: Path) -> bool:
    """Some network without registers has the paper's artifact."""
    return any(v is True for v in placed(folder).values())


@measure
def artifact_exists(folder: Path) -> Measured:
    """1 if some network without registers has the paper's artifact, else 0."""
    found = placed(folder)
    return exact(float(any(v is True for v in found.values())), len(found), f"{len(found)} networks without registers")


NEEDS |= {"mode": has_mode, "artifacts": has_artifacts}
