"""What all figures share: their style, empty axes, and two-dimensional histograms of norms."""

from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

PALETTE = sns.color_palette("colorblind")
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
    """Take ticks, grid and frame off axes that show a picture."""
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


def spread(figure: Figure, axis: Axes, x: np.ndarray, edges: np.ndarray, share: np.ndarray) -> None:
    """One two-dimensional histogram with a column for each x; columns are drawn equally wide."""
    sides = np.arange(len(x) + 1) - 0.5
    mesh = axis.pcolormesh(
        sides, edges, np.where(share > 0, share, np.nan).T, cmap="viridis", norm=LogNorm(1e-5, 1), rasterized=True
    )
    step = -(-len(x) // 9)
    axis.set(yscale="log", xticks=np.arange(len(x))[::step], xticklabels=[f"{v:g}" for v in x[::step]])
    axis.grid(False)
    bar = figure.colorbar(mesh, ax=axis)
    bar.set_label("share of tokens", size=8)
    bar.ax.tick_params(labelsize=7)
