"""Figures of what registers attend to: mean maps, how alike they are, and scores against true objects."""

from collections.abc import Mapping
from itertools import cycle

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vitregs.canvas import PALETTE, axes_grid, blank, note


def mean_maps(maps: Mapping[str, xr.DataArray]) -> Figure:
    """Mean attention of each query (Fig 16), a row a model: {model: [query, y, x]} → Figure; each map has its own colours."""
    columns = max(a.sizes["query"] for a in maps.values())
    figure, axes = axes_grid(len(maps), columns, 1.15 * columns + 0.4, 1.32 * len(maps), layout="compressed")
    for axis in axes.flat:
        blank(axis)
    for line, (name, values) in zip(axes, maps.items(), strict=True):
        for axis, query in zip(line, values["query"].values, strict=False):
            axis.imshow(values.sel(query=query), cmap="viridis", interpolation="nearest")
            axis.set_title("CLS" if query == "cls" else f"patch {query}" if "," in query else str(query), fontsize=8)
        line[0].set_ylabel("-\n".join(name.rsplit("-", 1)), fontsize=7)
    return figure


def alike(matrices: Mapping[str, xr.DataArray]) -> Figure:
    """How alike queries' maps are: {model: [query, other]} of correlations → Figure, one matrix a model, on one scale."""
    matrices = {name: m for name, m in matrices.items() if m.sizes["query"] > 1}
    if not matrices:
        return note("there is one query here: nothing to compare")
    figure, axes = axes_grid(1, len(matrices), 2.1 * len(matrices) + 0.6, 2.5)
    low = min(float(m.min()) for m in matrices.values())
    for axis, (name, values) in zip(axes[0], matrices.items(), strict=True):
        shown = axis.imshow(values, cmap="viridis", vmin=min(low, 0.9), vmax=1, interpolation="nearest")
        step = -(-values.sizes["query"] // 9)
        names = ["CLS" if q == "cls" else str(q) for q in values["query"].values]
        axis.set_xticks(range(0, len(names), step), names[::step], rotation=90, fontsize=7)
        axis.set_yticks(range(0, len(names), step), names[::step], fontsize=7)
        axis.set_title(name, fontsize=8)
        axis.grid(False)
    figure.colorbar(shown, ax=axes[0, :], label="correlation", shrink=0.75)
    return figure


def scores(table: pd.DataFrame) -> Figure:
    """Scores with intervals and what chance gives (a black bar): what `tables_objects.scores` gives → Figure, a panel a
    quantity, a row a model."""
    if table.empty:
        return note("nothing is known of the objects in these pictures: there is nothing to score")
    quantities, models = list(dict.fromkeys(table["quantity"])), list(dict.fromkeys(table["model"]))
    methods = list(dict.fromkeys(table["method"]))
    colours = dict(zip(methods, cycle(PALETTE), strict=False))
    figure, axes = axes_grid(len(quantities), 1, 8.4, 2.5 * len(quantities) + 0.5)
    wide = 0.84 / len(methods)
    for axis, quantity in zip(axes[:, 0], quantities, strict=True):
        part = table[table["quantity"] == quantity]
        for k, method in enumerate(methods):
            rows = part[part["method"] == method].set_index("model").reindex(models)
            at = np.arange(len(models)) + (k - (len(methods) - 1) / 2) * wide
            error = np.abs(rows[["low", "high"]].to_numpy(float).T - rows["mean"].to_numpy(float))
            axis.bar(
                at, rows["mean"], wide * 0.9, yerr=error, color=colours[method], label=method, error_kw={"lw": 0.8}
            )
            axis.hlines(rows["chance"], at - wide * 0.45, at + wide * 0.45, color="black", lw=1.6)
        axis.set(xticks=range(len(models)), ylabel=quantity)
        axis.set_xticklabels(models, fontsize=7)
        axis.grid(axis="x", visible=False)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8, frameon=False
    )
    return figure


def blocks(table: pd.DataFrame) -> Figure:
    """Scores over blocks with 95 % bands, dotted what chance gives: what `tables_objects.blocks` gives → Figure, a panel a
    quantity."""
    if table.empty:
        return note("nothing is known of the objects in these pictures: there is nothing to score")
    quantities, models = list(dict.fromkeys(table["quantity"])), list(dict.fromkeys(table["model"]))
    figure, axes = axes_grid(1, len(quantities), 4.3 * len(quantities), 3.3)
    for axis, quantity in zip(axes[0], quantities, strict=True):
        for model, colour in zip(models, cycle(PALETTE), strict=False):
            rows = table[(table["quantity"] == quantity) & (table["model"] == model)]
            if len(rows):
                axis.plot(rows["block"], rows["mean"], marker="o", ms=3, color=colour, label=model)
                axis.fill_between(rows["block"], rows["low"], rows["high"], color=colour, alpha=0.15, lw=0)
                axis.plot(rows["block"], rows["chance"], ls=":", lw=1.2, color=colour)
        axis.set(xlabel="block", ylabel=quantity, ylim=(0, None))
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    return figure
