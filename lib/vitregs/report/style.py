"""What all figures share: their style, empty axes, and two-dimensional histograms of norms."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

PALETTE = sns.color_palette("colorblind")
MARKED, OTHERS = PALETTE[3], PALETTE[0]  # marked patches and the others, wherever both are drawn
STYLE: Any = {
    "figure.dpi": 110,
    "savefig.facecolor": "white",
    "figure.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
}


def axes_grid(rows: int, columns: int, width: float, height: float, **more: Any) -> tuple[Figure, np.ndarray]:
    """Make empty axes in the book's style: rows, columns, inches, further options → Figure, (rows, columns) of Axes."""
    with mpl.rc_context(STYLE):
        more = {"layout": "constrained", **more}
        figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, **more)
    plt.close(figure)  # the caller shows it once
    return figure, axes


def blank(axis: Axes) -> None:
    """Take ticks, grid and frame off axes that show an image."""
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    for side in axis.spines.values():
        side.set_visible(False)


def note(text: str) -> Figure:
    """A sentence where a figure cannot be drawn: text → Figure."""
    figure, axes = axes_grid(1, 1, 5.6, 0.6)
    blank(axes[0, 0])
    axes[0, 0].text(0.5, 0.5, text, ha="center", va="center", transform=axes[0, 0].transAxes)
    return figure


def norm_edges(*values: np.ndarray) -> np.ndarray:
    """Edges of 69 bins, evenly spaced in log norm, that hold all but the lowest norms."""
    high = max(v.max() for v in values) * 1.1
    low = min(np.quantile(v, 0.0005) for v in values) / 1.1
    return np.geomspace(max(low, high * 1e-6), high, 70)


def norm_histogram(
    axis: Axes, x: np.ndarray, edges: np.ndarray, share: np.ndarray, colours: str = "viridis", *, true: bool = False
) -> QuadMesh:
    """Draw a two-dimensional histogram with a column for each x, all equally wide, or from midway to midway on a true axis of
    x: → what `share_bar` needs."""
    middle = (x[1:] + x[:-1]) / 2
    true = true and len(x) > 1
    sides = np.concatenate([x[:1], middle, x[-1:]]) if true else np.arange(len(x) + 1) - 0.5
    mesh = axis.pcolormesh(
        sides, edges, np.where(share > 0, share, np.nan).T, cmap=colours, norm=LogNorm(1e-5, 1), rasterized=True
    )
    step = -(-len(x) // 9)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    if not true:
        axis.set(xticks=np.arange(len(x))[::step], xticklabels=[f"{v:g}" for v in x[::step]])
    axis.grid(False)
    return mesh


def share_bar(figure: Figure, mesh: QuadMesh, axes: Sequence[Axes]) -> None:
    """Add the one colour bar of norm histograms that stand in a row: all have the same colours."""
    bar = figure.colorbar(mesh, ax=axes, aspect=20, pad=0.02)
    bar.set_label("share of tokens", size=8)
    bar.ax.tick_params(labelsize=8)


def plot_images(
    images: np.ndarray,
    columns: Mapping[str, np.ndarray],
    *,
    limits: Mapping[str, tuple[float, float]] | None = None,
    colours: str = "inferno",
    label: str = "",
) -> Figure:
    """Images beside maps of them (Fig 1, 2, 3, 19, 21): (n, H, W, 3), {title: (n, rows, columns)} → Figure.

    Each map has its own colour range, or the one named for its column, which then gets a colour bar with the label.
    """
    n = len(images)
    size = 1.5 * (1 + len(columns)), 1.5 * n + 0.4 + 0.4 * (limits is not None)
    figure, axes = axes_grid(n, 1 + len(columns), *size, layout="compressed")
    for i in range(n):
        axes[i, 0].imshow(images[i])
        for j, (title, maps) in enumerate(columns.items(), start=1):
            low, high = (None, None) if limits is None else limits[title]
            shown = axes[i, j].imshow(maps[i], cmap=colours, vmin=low, vmax=high, interpolation="nearest")
            if i == 0:
                axes[0, j].set_title(_narrow(title))
            if limits is not None and i == n - 1:
                figure.colorbar(shown, ax=axes[:, j], shrink=0.8, label=label, location="bottom", aspect=14)
    axes[0, 0].set_title("image")
    for axis in axes.flat:
        blank(axis)
    return figure


def plot_maps(maps: np.ndarray, colours: str = "inferno") -> Figure:
    """Maps in a row, each with its own colour range: (n, rows, columns) → Figure."""
    figure, axes = axes_grid(1, len(maps), 1.5 * len(maps), 1.6, layout="compressed")
    for axis, values in zip(axes[0], maps, strict=True):
        axis.imshow(values, cmap=colours, interpolation="nearest")
        blank(axis)
    return figure


def _narrow(title: str) -> str:
    """Break a long model name so that it fits above a small map."""
    return (
        title if len(title) < 16 else "-\n".join(title.rsplit("-", 1)) if "-" in title else title.replace("_", "_\n", 1)
    )


def plot_lines(
    table: pd.DataFrame, x: str, y: str, group: str, *, labels: tuple[str, str], log: bool = False
) -> Figure:
    """Lines of y over x for each group, with a band where the table has low and high: → Figure."""
    figure, axes = axes_grid(1, 1, 5.6, 3.1)
    axis = axes[0, 0]
    for (name, rows), colour in zip(table.groupby(group, sort=False), cycle(PALETTE), strict=False):
        axis.plot(rows[x], rows[y], marker="o", ms=3, color=colour, label=str(name))
        if {"low", "high"} <= set(rows):
            axis.fill_between(rows[x], rows["low"], rows["high"], color=colour, alpha=0.2, lw=0)
    axis.set(xlabel=labels[0], ylabel=labels[1], yscale="log" if log else "linear")
    axis.legend()
    return figure
