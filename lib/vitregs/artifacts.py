"""From token norms to outliers: ratios, labels, positions, neighbours. Plain arrays with labels, no torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import ArrayLike

from vitregs import cutoffs
from vitregs.cutoffs import LEAST_RATIO, Cutoff
from vitregs.problems import Problem


def patches(array: xr.DataArray) -> xr.DataArray:
    """Keep the patch tokens of an array with a token dimension."""
    return array.isel(token=np.flatnonzero(array["kind"] == "patch"))


def largest_ratio(norms: xr.DataArray) -> xr.DataArray:
    """Largest over median patch norm in each picture: [image, layer, token] → [image, layer]."""
    patch = patches(norms)
    return patch.max("token") / patch.median("token")


def top_ratio(norms: xr.DataArray, share: float = 0.01) -> xr.DataArray:
    """Mean of the top share of patch norms over the median, in each picture: [image, layer, token] → [image, layer]."""
    patch = patches(norms)
    count = max(1, round(share * patch.sizes["token"]))
    axis = patch.get_axis_num("token")
    top = np.sort(patch.values, axis)[(slice(None),) * axis + (slice(-count, None),)]
    return patch.median("token").copy(data=top.mean(axis) / np.median(patch.values, axis))


def cutoff(norms: xr.DataArray, value: float | None = None, source: str = "named by hand") -> Cutoff:
    """Find where outliers begin among the patch norms of one layer, or take a named value: [image, token] → Cutoff.

    The statistical rule can answer "none"; the paper's 150 holds for DINOv2 ViT-g alone (section 2.1).
    """
    if "layer" in norms.dims:
        raise Problem("a cut-off belongs to one layer: select it first")
    values = patches(norms).values
    return cutoffs.find(values) if value is None else cutoffs.fixed(values, value, source)


def outliers(norms: xr.DataArray, cut: Cutoff) -> xr.DataArray:
    """Mark tokens whose norm is above the cut-off; where there is no cut-off, none is: same dims, bool."""
    return (norms > (np.inf if cut.value is None else cut.value)).rename("outlier")


def by_layer(norms: xr.DataArray, fixed: float | None = None) -> pd.DataFrame:
    """Evidence for artifacts at every layer: [image, layer, token], a fixed cut-off if one is named → a row per layer.

    Columns: median norm, largest (median over pictures of largest / median), top1 (of top-1-% mean / median); and of the
    second mode, if there is one: cutoff (nan if it is minor), share of tokens, separation, ratio to the median.
    """
    rows = []
    large, top = largest_ratio(norms).median("image"), top_ratio(norms).median("image")
    for layer in norms["layer"].values:
        at = norms.sel(layer=layer)
        cut = cutoff(at, fixed)
        rows.append(
            {
                "layer": int(layer),
                "median": float(patches(at).median()),
                "largest": float(large.sel(layer=layer)),
                "top1": float(top.sel(layer=layer)),
                "cutoff": np.nan if cut.value is None else cut.value,
                "share": cut.share,
                "separation": cut.separation,
                "ratio": cut.ratio,
            }
        )
    return pd.DataFrame(rows)


# The rule of the hunt, fixed before any run was made (data/results/LOG.md, 2026-11-25)
EMERGED_TOP1, EMERGED_SEPARATION = 4.0, 3.0


def strongest(layers: pd.DataFrame) -> pd.Series:
    """The row of `by_layer`'s table that comes nearest to the rule of emergence; the stem (layer 0) is left out."""
    deep = layers[layers.layer > 0]
    near = np.minimum(deep.top1 / EMERGED_TOP1, deep.separation.fillna(0) / EMERGED_SEPARATION)
    return deep.loc[near.idxmax() if near.max() > 0 else deep.top1.idxmax()]


def emerged(row: Mapping[Any, Any] | pd.Series) -> bool:
    """Whether outliers have emerged, by the rule of the hunt: a row of `by_layer`'s table → bool."""
    return bool(row["top1"] >= EMERGED_TOP1 and row["separation"] >= EMERGED_SEPARATION)


CERTAIN_RATIO = 4.0  # a second mode this far above the median norm is an artifact beyond doubt
QUIET_RATIO = 4.0  # without a mode, and with largest / median below this everywhere, there is none


def verdict(layers: pd.DataFrame) -> tuple[str, int, str]:
    """Decide from `by_layer`'s table: → ("artifacts" | "none" | "inconclusive", layer of the strongest evidence, why).

    The strongest layer decides, not the last: in small ViTs the middle blocks show what the last one hides.
    """
    deep = layers[layers.layer > 0]  # layer 0 is the stem: bright or busy patches, not yet the network's doing
    moded = deep[deep["cutoff"].notna() & (deep["share"] > 0)]
    if len(moded):
        best = moded.loc[moded.ratio.idxmax()]
        held = f"{100 * best.share:.2f} % of the patch tokens"
        text = (
            f"an outlier mode {best.ratio:.1f} x the median norm holds {held} (separation {best.separation:.1f})"
            if best.separation
            else f"{held} lie above the named cut-off, typically at {best.ratio:.1f} x the median norm"
        )
        return ("artifacts" if best.ratio >= CERTAIN_RATIO else "inconclusive"), int(best.layer), text
    best = deep.loc[deep.largest.idxmax()]
    text = f"no outlier mode at any layer; the largest norm is {best.largest:.1f} x the median in a typical picture"
    minor = deep[deep.share > 0]
    if len(minor):
        row = minor.loc[minor.ratio.idxmax()]
        text += (
            f"; a minor mode at {row.ratio:.1f} x, under the {LEAST_RATIO} x that the rule asks for, "
            f"holds {100 * row.share:.1f} % at layer {row.layer:.0f}"
        )
    return ("none" if best.largest < QUIET_RATIO else "inconclusive"), int(best.layer), text


def occupancy(marked: xr.DataArray) -> xr.DataArray:
    """Share of pictures in which each grid position is an outlier: bool [image, token] → [y, x] (Fig 10)."""
    patch = patches(marked)
    rows, columns = int(patch.y.max()) + 1, int(patch.x.max()) + 1
    return xr.DataArray(patch.mean("image").values.reshape(rows, columns), dims=("y", "x"), name="occupancy")


def neighbour_similarity(stem: xr.DataArray) -> xr.DataArray:
    """Mean cosine similarity of each patch to its 4 neighbours (those that exist): [image, token, channel] → [image, token]
    (Fig 5a, on patch embeddings before positions are added)."""
    rows, columns = int(stem.y.max()) + 1, int(stem.x.max()) + 1
    e = stem.transpose("image", "token", "channel").values
    e = e / np.maximum(np.linalg.norm(e, axis=-1, keepdims=True), 1e-12)
    e = e.reshape(len(e), rows, columns, -1)
    total, count = np.zeros(e.shape[:3]), np.zeros((rows, columns))
    for axis in (0, 1):
        size = (rows, columns)[axis]
        near, far = [slice(None)] * 2, [slice(None)] * 2
        near[axis], far[axis] = slice(0, size - 1), slice(1, size)
        cosine = (e[:, *near] * e[:, *far]).sum(-1)
        for part in (near, far):
            total[:, *part] += cosine
            count[*part] += 1
    if not count.all():
        raise Problem("a grid of one patch has no neighbours")
    mean = (total / count).reshape(len(e), -1)
    coords = {k: v for k, v in stem.coords.items() if "channel" not in v.dims}
    return xr.DataArray(mean, dims=("image", "token"), coords=coords, name="similarity")


def share_by_group(marked: xr.DataArray, group: np.ndarray, names: Sequence[str], *, draws: int = 1000) -> pd.DataFrame:
    """Share of outliers among groups of patches, with a bootstrap over pictures: bool [image, token], group index of
    each patch (image, patch) (-1 leaves it out), names → rows with share, low, high (95 %; nan without tokens), tokens.
    """
    patch = patches(marked).transpose("image", "token").values
    rows = []
    for g, name in enumerate(names):
        here = group == g
        share, low, high = ratio((patch & here).sum(1), here.sum(1), draws=draws)
        rows.append({"group": name, "share": share, "low": low, "high": high, "tokens": int(here.sum())})
    return pd.DataFrame(rows)


def ratio(sums: ArrayLike, counts: ArrayLike, *, draws: int = 1000) -> tuple[float, float, float]:
    """Sum over count with a 95 % bootstrap over pictures: per-picture sums and counts (pictures,) → value, low, high.

    nan where nothing is counted.
    """
    sums, counts = np.asarray(sums, float), np.asarray(counts, float)
    if not counts.sum():
        return np.nan, np.nan, np.nan
    pick = np.random.default_rng(0).integers(0, len(sums), (draws, len(sums)))
    drawn = counts[pick].sum(1)
    low, high = np.quantile(sums[pick].sum(1)[drawn > 0] / drawn[drawn > 0], [0.025, 0.975])
    return float(sums.sum() / counts.sum()), float(low), float(high)


def interval(values: ArrayLike, *, draws: int = 2000, of: Callable[..., Any] = np.mean) -> tuple[float, float, float]:
    """Mean (or `of`) of per-picture values with a 95 % bootstrap interval: (pictures,) → mean, low, high."""
    values = np.asarray(values, float)
    pick = np.random.default_rng(0).integers(0, len(values), (draws, len(values)))
    low, high = np.quantile(of(values[pick], axis=1), [0.025, 0.975])
    return float(of(values)), float(low), float(high)


def mark(norms: xr.DataArray, cut: Cutoff, share: float) -> tuple[xr.DataArray, str]:
    """Mark outliers, or a stand-in where there are none: [image, token], its Cutoff, share of the stand-in → bool
    [image, token] and what is marked, in words. The stand-in is the given share of patches with the largest norms.
    """
    if cut.value is not None:
        return outliers(norms, cut), "outliers"
    top = float(np.quantile(patches(norms).values, 1 - share))
    return (norms > top).rename("stand-in"), f"top {100 * share:g} % of norms"


def mark_each(norms: xr.DataArray, cut: Cutoff, missing: str = "largest") -> tuple[xr.DataArray, str]:
    """Mark outliers in every picture: [image, token], its Cutoff, what happens to pictures without → bool [image, token] and
    what is marked, in words.

    "largest": the patch of the largest norm stands in; "drop": such pictures have no mark. (Section 2.4 leaves it open.)
    """
    if missing not in ("largest", "drop"):
        raise Problem(f"missing must be largest or drop, not {missing!r}")
    marked = outliers(norms, cut)
    bare = ~patches(marked).any("token")
    text = "outliers" if cut.value is not None else "no outlier mode"
    if missing == "drop" or not bool(bare.any()):
        return marked, text
    at = patches(norms).values.argmax(patches(norms).get_axis_num("token"))
    first = int(np.flatnonzero(norms["kind"] == "patch")[0])
    top = xr.DataArray(np.arange(norms.sizes["token"]) == (first + at)[:, None], dims=("image", "token"))
    text = (
        "the largest norm of each picture"
        if cut.value is None
        else f"outliers; in {100 * float(bare.mean()):.0f} % of "
    )
    text += "" if cut.value is None else "the pictures, which have none, the largest norm"
    return (marked | (top & bare)).transpose(*norms.dims), text


def peak_share(attention: xr.DataArray) -> xr.DataArray:
    """Part of the attention to patches that falls on the most attended one, mean over heads first:
    [image, layer, head, query, token] → [image, layer, query]."""
    mean = patches(attention).mean("head")
    return (mean.max("token") / mean.sum("token")).rename("peak")


def attention_on(attention: xr.DataArray, weight: np.ndarray) -> xr.DataArray:
    """Part of the attention to patches that falls on a region: [image, …, token], weights of the patches (image, patch)
    in [0, 1] → [image, …]."""
    patch = patches(attention)
    inside = xr.DataArray(weight, dims=("image", "token"))
    return (patch * inside).sum("token") / patch.sum("token")


def mass_mask(maps: np.ndarray, keep: float = 0.6) -> np.ndarray:
    """The fewest cells that hold a share of each map's mass: (…, cells) → bool (…, cells) (DINO's own drawing)."""
    order = np.argsort(-maps, axis=-1)
    total = np.cumsum(np.take_along_axis(maps, order, -1), -1) / maps.sum(-1, keepdims=True)
    before = np.concatenate([np.zeros_like(total[..., :1]), total[..., :-1]], -1)
    mask = np.zeros(maps.shape, bool)
    np.put_along_axis(mask, order, before < keep, -1)
    return mask


@dataclass(frozen=True)
class Hunted:
    """A network by the rule of the hunt, in numbers: its strongest layer, and where the second mode sits there."""

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


def hunt(norms: xr.DataArray, ground: np.ndarray | None, layers: pd.DataFrame | None = None) -> Hunted:
    """Judge a network by the rule of the hunt: norms [image, layer, token], share of background in every patch (images, patches)
    or None, `by_layer`'s table if it is at hand → Hunted (Fig 3, 5a, 7)."""
    best = strongest(by_layer(norms) if layers is None else layers)
    layer, there = int(best.layer), emerged(best)
    parts: list[tuple[float, float, float] | None] = [None, None]
    artifact = None if there else False
    if best.share > 0 and ground is not None:
        at = norms.sel(layer=layer)
        marked, _ = mark(at, cutoff(at), float(best.share))
        where = np.select([np.isnan(ground), ground == 1], [-1, 0], 1)  # images without a mask are left out
        part = share_by_group(marked, where, ("background", "rest")).set_index("group")
        cells = part[["share", "low", "high"]].astype(float)
        parts = [(float(s), float(low), float(high)) for s, low, high in cells.loc[["background", "rest"]].values]
        artifact = there and bool(cells.loc["background", "low"] > cells.loc["rest", "high"])
    return Hunted(
        layer=layer,
        depth=int(norms["layer"].max()),
        top1=interval(top_ratio(norms).sel(layer=layer), of=np.median),
        separation=float(best.separation),
        share=float(best.share),
        emerged=there,
        background=parts[0],
        rest=parts[1],
        artifact=artifact,
    )
