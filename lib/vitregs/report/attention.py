"""Attention maps (Fig 1, 2, 18): tables and figures."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

from vitregs import arrays
from vitregs.measure import outliers
from vitregs.measure.attention import attention_on, peak_share
from vitregs.report.format import cell
from vitregs.report.style import axes_grid, blank


def attention(maps: Mapping[str, xr.DataArray], backgrounds: Mapping[str, np.ndarray | None]) -> pd.DataFrame:
    """How concentrated the CLS attention of the last block is, and on what: {model: [image, layer, head, query, token]},
    {model: background share (images, patches) or None} → rows with mean and 95 % interval (Fig 1, 2)."""
    rows: list[tuple[str, str, float, float, float]] = []
    for name, a in maps.items():
        count = int((a["kind"] == "patch").sum())
        peak = peak_share(a).isel(layer=-1, query=0)
        rows.append((name, "peak, in fair shares", *arrays.bootstrap_interval(peak * count)))
        background = backgrounds[name]
        if background is not None:
            there = np.flatnonzero(np.isfinite(background).all(1))  # images with a mask
            on = attention_on(a.isel(layer=-1, query=0, image=there).mean("head"), 1 - background[there])
            rows.append((name, "attention on objects", *arrays.bootstrap_interval(on)))
            rows.append((name, "area of objects", *arrays.bootstrap_interval((1 - background[there]).mean(1))))
    return pd.DataFrame(rows, columns=["model", "quantity", "mean", "low", "high"])


def peaks(found: Mapping[str, xr.DataArray]) -> pd.DataFrame:
    """Per cent of the CLS attention on one patch, at every block: {model: [image, layer]} → rows with mean, low, high."""
    return pd.concat(
        pd.DataFrame(
            [arrays.bootstrap_interval(100 * p.sel(layer=n)) for n in p["layer"]], columns=["mean", "low", "high"]
        ).assign(model=name, block=p["layer"].values)
        for name, p in found.items()
    )


def plot_heads(image: np.ndarray, maps: np.ndarray, masked: np.ndarray) -> Figure:
    """An image, a map for each head, and the same maps masked (Fig 18): (H, W, 3), (heads, rows, columns) twice → Figure."""
    columns = 1 + min(8, len(maps))
    panels = [(image, "image"), *((m, f"head {h + 1}") for h, m in enumerate(maps))]
    panels += [(None, "")] * (-len(panels) % columns)
    panels += [(None, ""), *((m, f"head {h + 1}, 60 %") for h, m in enumerate(masked))]
    rows = -(-len(panels) // columns)
    figure, axes = axes_grid(rows, columns, 1.55 * columns, 1.75 * rows, layout="compressed")
    for axis in axes.flat:
        blank(axis)
    for axis, (values, title) in zip(axes.flat, panels, strict=False):
        if values is not None:
            axis.imshow(values, cmap="inferno", interpolation="nearest")
            axis.set_title(title)
    return figure


def on_marked(
    maps: Mapping[str, xr.DataArray], norms: Mapping[str, xr.DataArray], received: Mapping[str, xr.DataArray]
) -> pd.DataFrame:
    """What outliers receive in the last block: of all queries, of CLS head by head (Fig 18), and the peak of the map (Fig 1, 2).

    Args:
        maps: {network: CLS attention [image, layer, head, query, token]}.
        norms: {network: norms [image, layer, token]}; patches are marked in the first network for all.
        received: {network: attention received of all queries, in fair shares [image, layer, token]}.

    Returns:
        Rows by network: mean fair shares of all queries on marked and on other patches; of CLS on marked patches in the least and
        the most attentive head, and on the others; the part of the CLS attention to patches that falls on one, in per cent with
        its 95 % interval over images.
    """
    first = next(iter(norms.values())).isel(layer=-1)
    found = arrays.patches(outliers.mark_outliers(first, outliers.find_cutoff(first)))
    marked = found.transpose("image", "token").values
    rows = []
    for name, a in maps.items():
        drawn = arrays.patches(received[name]).isel(layer=-1).transpose("image", "token").values
        last = arrays.patches(a).isel(layer=-1, query=0).transpose("image", "head", "token").values
        share = last / last.sum(-1, keepdims=True) * last.shape[-1]
        heads = [share[:, h][marked].mean() for h in range(share.shape[1])]
        peak = peak_share(a).isel(layer=-1, query=0).values
        rows.append(
            {
                "network": name,
                "all queries, marked": drawn[marked].mean(),
                "all queries, others": drawn[~marked].mean(),
                "CLS, marked, least head": min(heads),
                "CLS, marked, most head": max(heads),
                "CLS, others": share.transpose(0, 2, 1)[~marked].mean(),
                "peak, %": cell(arrays.bootstrap_interval(100 * peak)),
            }
        )
    return pd.DataFrame(rows).set_index("network")
