"""Figures of the chapters on regressions and on the number of registers: tables in, figures out."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from vitregs.canvas import PALETTE, axes_grid, note


def differences(table: pd.DataFrame) -> Figure:
    """What registers change, metric by metric: rows pair, metric, difference, low, high, clear → Figure; a filled mark is clear
    of 0, the green side is the better one."""
    if table.empty:
        return note("no model without registers is followed by one with registers")
    metrics, names = list(dict.fromkeys(table["metric"])), list(dict.fromkeys(table["pair"]))
    columns = min(4, len(metrics))
    lines = -(-len(metrics) // columns)
    figure, axes = axes_grid(lines, columns, 1.4 + 2.05 * columns, lines * (0.9 + 0.27 * len(names)), sharey=True)
    for axis in axes.flat[len(metrics) :]:
        axis.set_visible(False)
    for axis, metric in zip(axes.flat, metrics, strict=False):
        part = table[table["metric"] == metric].set_index("pair").reindex(names)
        y, clear = np.arange(len(names)), part["clear"].fillna(False).to_numpy(bool)
        axis.axvline(0, color="black", lw=0.8)
        axis.hlines(y, part["low"], part["high"], color=PALETTE[0], lw=1.4)
        axis.plot(part["difference"], y, "o", ms=5, color=PALETTE[0], mfc="white")
        axis.plot(part["difference"][clear], y[clear], "o", ms=5, color=PALETTE[0])
        most = 1.1 * np.nanmax(np.abs(part[["low", "high"]].to_numpy())) or 1
        depth = metric.endswith("rmse")
        axis.axvspan(*((-most, 0) if depth else (0, most)), color=PALETTE[2], alpha=0.08, lw=0)
        axis.set(title=metric, xlim=(-most, most), xlabel="depth units" if depth else "points")
        axis.set(yticks=y, yticklabels=names, ylim=(len(names) - 0.5, -0.5))
        axis.grid(axis="y", visible=False)
    return figure


def over_registers(table: pd.DataFrame) -> Figure:
    """Scores over the number of registers: rows source, model, panel, registers, score, low, high → Figure, the paper's three
    panels (Fig 8, bottom) above ours."""
    sources = [s for s in ("paper", "ours") if s in set(table["source"])]
    columns = max(table[table["source"] == s]["panel"].nunique() for s in sources)
    figure, axes = axes_grid(len(sources), columns, 2.9 * columns, 2.35 * len(sources))
    for line, source in zip(axes, sources, strict=True):
        part = table[table["source"] == source]
        panels = list(dict.fromkeys(part["panel"]))
        for axis in line[len(panels) :]:
            axis.set_visible(False)
        for axis, panel in zip(line, panels, strict=False):
            _curve(axis, part[part["panel"] == panel], PALETTE[1 if source == "paper" else 0])
            axis.set(title=f"{panel} ({source})")
    for axis in axes[-1]:
        axis.set_xlabel("registers")
    return figure


def _curve(axis: Axes, rows: pd.DataFrame, colour: tuple[float, float, float]) -> None:
    """One score over the number of registers, evenly spaced as in the paper; a band where there are intervals, thin points where
    a number occurs several times."""
    numbers = sorted(rows["registers"].unique())
    at = rows["registers"].map({n: i for i, n in enumerate(numbers)})
    mean = rows.groupby(at)[["score", "low", "high"]].mean()
    if mean["low"].notna().all():
        axis.fill_between(mean.index, mean["low"], mean["high"], color=colour, alpha=0.2, lw=0)
    axis.plot(mean.index, mean["score"], "o-", ms=4, color=colour)
    if len(rows) > len(numbers):
        axis.plot(at, rows["score"], "x", ms=4, color=colour, alpha=0.7)
    axis.set(xticks=range(len(numbers)), xticklabels=[f"{n:g}" for n in numbers])


def costs(tables: Mapping[str, pd.DataFrame], paper: pd.DataFrame) -> Figure:
    """Increase of operations and parameters over the number of registers (Fig 12): {network: rows registers, flops, parameters},
    the paper's rows registers, flops_increase_percent, params_increase_percent → Figure."""
    figure, axes = axes_grid(1, 2, 7.6, 2.9)
    for axis, key, title in ((axes[0, 0], "flops", "operations"), (axes[0, 1], "parameters", "parameters")):
        for i, (name, rows) in enumerate(tables.items()):
            axis.plot(rows["registers"], rows[key], "o-", ms=3, color=PALETTE[i], label=name)
        column = {"flops": "flops_increase_percent", "parameters": "params_increase_percent"}[key]
        axis.plot(paper["registers"], paper[column], "x", ms=8, color="black", label="ViT-L/14, the paper's")
        axis.set(title=title, xlabel="registers", ylabel="increase, %", xscale="log", yscale="log")
        axis.set_xticks(paper["registers"], [f"{n:g}" for n in paper["registers"]])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter("{x:g}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
