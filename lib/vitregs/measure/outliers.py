"""From token norms to outliers: ratios, cut-offs, marks, evidence at every layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from vitregs import arrays
from vitregs.errors import InputError
from vitregs.measure import mixture, redundancy
from vitregs.measure.mixture import Cutoff


def largest_ratio(norms: xr.DataArray) -> xr.DataArray:
    """Largest over median patch norm in each image: [image, layer, token] → [image, layer]."""
    patch = arrays.patches(norms)
    return patch.max("token") / patch.median("token")


def top_ratio(norms: xr.DataArray, share: float = 0.01) -> xr.DataArray:
    """Mean of the top share of patch norms over the median, in each image: [image, layer, token] → [image, layer]."""
    patch = arrays.patches(norms)
    count = max(1, round(share * patch.sizes["token"]))
    axis = patch.get_axis_num("token")
    top = np.sort(patch.values, axis)[(slice(None),) * axis + (slice(-count, None),)]
    return patch.median("token").copy(data=top.mean(axis) / np.median(patch.values, axis))


def find_cutoff(norms: xr.DataArray, value: float | None = None, source: str = "named by hand") -> Cutoff:
    """Find where outliers begin among the patch norms of one layer, or take a named value: [image, token] → Cutoff.

    The statistical rule can answer "none"; the paper's 150 holds for DINOv2 ViT-g alone (section 2.1).
    """
    if "layer" in norms.dims:
        raise InputError("a cut-off belongs to one layer: select it first")
    values = arrays.patches(norms).values
    return mixture.find(values) if value is None else mixture.fixed(values, value, source)


def mark_outliers(norms: xr.DataArray, cut: Cutoff) -> xr.DataArray:
    """Mark tokens whose norm is above the cut-off; where there is no cut-off, none is: same dims, bool."""
    return (norms > (np.inf if cut.value is None else cut.value)).rename("outlier")


def find_outliers(seen: xr.Dataset | xr.DataArray, *, layer: int = -1, cutoff: float | None = None) -> xr.DataArray:
    """Mark outlier tokens at one layer, by the statistical rule or above a named cut-off (section 2.1, Fig 3).

    Args:
        seen: What `capture(…, norms=True)` gives, or its `norms` [image, layer, token].
        layer: Number of the layer, 0 to L; negative ones count from the end.
        cutoff: A norm above which tokens are outliers; None for the rule, which can find that there are none.

    Returns:
        bool [image, token]. Its attributes are cutoff (a norm, nan if there is none), share (of patches above it), ratio
        (of the outliers' typical norm to the median), and rule, in words.

    Raises:
        InputError: For a layer that was not captured, and a cut-off that is not positive.

    Example:
        >>> import vitregs as vr
        >>> vit = vr.load("hunt-pico")
        >>> seen = vr.capture(vit, vr.open_images("scenes", size=vit.size, count=32), norms=True)
        >>> 0.01 < vr.find_outliers(seen).attrs["share"] < 0.2
        True
    """
    norms = seen.get("norms") if isinstance(seen, xr.Dataset) else seen
    if not isinstance(norms, xr.DataArray) or "layer" not in norms.dims:
        raise InputError("outliers are found among norms of layers: capture(…, norms=True) first")
    layers = norms["layer"].values
    if not isinstance(layer, int | np.integer):
        raise InputError(f"a layer is a whole number, not {layer!r}")
    number = layers[layer] if -len(layers) <= layer < 0 else layer
    if number not in layers:
        raise InputError(f"layer {layer} was not captured: there are {', '.join(map(str, layers))}")
    at = norms.sel(layer=number)
    cut = find_cutoff(at, cutoff)
    value = np.nan if cut.value is None else cut.value
    return mark_outliers(at, cut).assign_attrs(cutoff=value, share=cut.share, ratio=cut.ratio, rule=str(cut))


def layer_evidence(norms: xr.DataArray, fixed: float | None = None) -> pd.DataFrame:
    """Evidence for artifacts at every layer: [image, layer, token], a fixed cut-off if one is named → a row per layer.

    Columns: median norm, largest (median over images of largest / median), top1 (of top-1-% mean / median); and of the
    second mode, if there is one: cutoff, share of tokens, separation, ratio to the median.
    """
    rows = []
    large, top = largest_ratio(norms).median("image"), top_ratio(norms).median("image")
    for layer in norms["layer"].values:
        at = norms.sel(layer=layer)
        cut = find_cutoff(at, fixed)
        rows.append(
            {
                "layer": int(layer),
                "median": float(arrays.patches(at).median()),
                "largest": float(large.sel(layer=layer)),
                "top1": float(top.sel(layer=layer)),
                "cutoff": np.nan if cut.value is None else cut.value,
                "share": cut.share,
                "separation": cut.separation,
                "ratio": cut.ratio,
            }
        )
    return pd.DataFrame(rows)


# The emergence rule, fixed before any run was made (data/results/LOG.md, 2026-11-25)
EMERGED_TOP1, EMERGED_SEPARATION = 4.0, 3.0


def strongest_layer(layers: pd.DataFrame) -> pd.Series:
    """The row of `layer_evidence`'s table that comes nearest to the emergence rule; the patch embedding (layer 0) is left out."""
    deep = layers[layers.layer > 0]
    near = np.minimum(deep.top1 / EMERGED_TOP1, deep.separation.fillna(0) / EMERGED_SEPARATION)
    return deep.loc[near.idxmax() if near.max() > 0 else deep.top1.idxmax()]


def has_emerged(row: Mapping[Any, Any] | pd.Series) -> bool:
    """Whether outliers have emerged, by the emergence rule: a row of `layer_evidence`'s table → bool."""
    return bool(row["top1"] >= EMERGED_TOP1 and row["separation"] >= EMERGED_SEPARATION)


def mark_or_top(norms: xr.DataArray, cut: Cutoff, share: float) -> tuple[xr.DataArray, str]:
    """Mark outliers, or a stand-in where there are none: [image, token], its Cutoff, share of the stand-in → bool
    [image, token] and what is marked, in words. The stand-in is the given share of patches with the largest norms.
    """
    if cut.value is not None:
        return mark_outliers(norms, cut), "outliers"
    top = float(np.quantile(arrays.patches(norms).values, 1 - share))
    return (norms > top).rename("stand-in"), f"top {100 * share:g} % of norms"


def mark_per_image(norms: xr.DataArray, cut: Cutoff, missing: str = "largest") -> tuple[xr.DataArray, str]:
    """Mark outliers in every image: [image, token], its Cutoff, what happens to images without → bool [image, token] and
    what is marked, in words.

    "largest": the patch of the largest norm stands in; "drop": such images have no mark. (Section 2.4 leaves it open.)
    """
    if missing not in ("largest", "drop"):
        raise InputError(f"missing must be largest or drop, not {missing!r}")
    marked = mark_outliers(norms, cut)
    bare = ~arrays.patches(marked).any("token")
    text = "outliers" if cut.value is not None else "no outlier mode"
    if missing == "drop" or not bool(bare.any()):
        return marked, text
    at = arrays.patches(norms).values.argmax(arrays.patches(norms).get_axis_num("token"))
    first = int(np.flatnonzero(norms["kind"] == "patch")[0])
    top = xr.DataArray(np.arange(norms.sizes["token"]) == (first + at)[:, None], dims=("image", "token"))
    text = (
        "the largest norm of each image" if cut.value is None else f"outliers; in {100 * float(bare.mean()):.0f} % of "
    )
    text += "" if cut.value is None else "the images, which have none, the largest norm"
    return (marked | (top & bare)).transpose(*norms.dims), text


@dataclass(frozen=True)
class EmergenceVerdict:
    """A network by the emergence rule, in numbers: its strongest layer, and where the second mode sits there."""

    layer: int
    depth: int
    top1: tuple[float, float, float]  # top-1-% over median norm, median over images with its 95 % interval
    separation: float
    share: float  # of the patches, in the second mode
    emerged: bool
    background: tuple[float, float, float] | None  # share of pure background in the mode with its 95 % interval
    rest: tuple[float, float, float] | None  # the same of all other patches; None without a mode or without masks
    artifact: (
        bool | None
    )  # emerged, and on background first; None where outliers have emerged and nothing tells on what


def judge_emergence(
    norms: xr.DataArray, background: np.ndarray | None, layers: pd.DataFrame | None = None
) -> EmergenceVerdict:
    """Judge a network by the emergence rule: norms [image, layer, token], share of background in every patch (images, patches)
    or None, `layer_evidence`'s table if it is at hand → EmergenceVerdict (Fig 3, 5a, 7)."""
    best = strongest_layer(layer_evidence(norms) if layers is None else layers)
    layer, there = int(best.layer), has_emerged(best)
    parts: list[tuple[float, float, float] | None] = [None, None]
    artifact = None if there else False
    if best.share > 0 and background is not None:
        at = norms.sel(layer=layer)
        marked, _ = mark_or_top(at, find_cutoff(at), float(best.share))
        where = np.select([np.isnan(background), background == 1], [-1, 0], 1)  # images without a mask are left out
        part = redundancy.share_by_group(marked, where, ("background", "rest")).set_index("group")
        cells = part[["share", "low", "high"]].astype(float)
        parts = [(float(s), float(low), float(high)) for s, low, high in cells.loc[["background", "rest"]].values]
        artifact = there and bool(cells.loc["background", "low"] > cells.loc["rest", "high"])
    return EmergenceVerdict(
        layer=layer,
        depth=int(norms["layer"].max()),
        top1=arrays.bootstrap_interval(top_ratio(norms).sel(layer=layer), of=np.median),
        separation=float(best.separation),
        share=float(best.share),
        emerged=there,
        background=parts[0],
        rest=parts[1],
        artifact=artifact,
    )
