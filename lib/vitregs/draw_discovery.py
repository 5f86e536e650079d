"""Figures of object discovery: labelled maps and boxes in, figures out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from vitregs.canvas import PALETTE, axes_grid, blank, note

STEPS = {"score": "LOST score", "similarity": "similarity to seed", "expansion": "seed expansion"}


def _frame(axis: Axes, box: np.ndarray, colour: Any, line: str = "-") -> None:
    """A box (y0, x0, y1, x1) in pixels; axes end outside it, so that a box around the whole picture can be seen."""
    y0, x0, y1, x1 = (float(v) for v in box)
    axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=colour, lw=1.6, ls=line, clip_on=False))


def _map(axis: Axes, found: xr.Dataset, step: str, size: Sequence[int]) -> None:
    """One map of one picture over its pixels: signed ones in colours around 0, where the object ends."""
    values = found[step].transpose("y", "x").values
    extent = (0, size[1], size[0], 0)
    if step == "score":
        axis.imshow(values, cmap="inferno", interpolation="nearest", extent=extent)
        y, x = np.divmod(int(found["seed"]), values.shape[1])
        place = (x + 0.5) * size[1] / values.shape[1], (y + 0.5) * size[0] / values.shape[0]
        axis.plot(*place, "o", ms=4, mfc=PALETTE[9], mec="black", mew=0.8)
    else:
        top = max(float(np.abs(values).max()), 1e-12)
        axis.imshow(values, cmap="coolwarm", vmin=-top, vmax=top, interpolation="nearest", extent=extent)
        _frame(axis, found["box"].values, "black")


def _picture(axis: Axes, picture: np.ndarray, truth: np.ndarray) -> None:
    axis.imshow(picture, extent=(0, picture.shape[1], picture.shape[0], 0))
    axis.set_title("picture", fontsize=8)
    for box in truth:
        _frame(axis, box, PALETTE[2], "--")


def _title(name: str) -> str:
    """Break a model's name so that it fits above a small map."""
    return name.replace("-pico", "-\npico", 1) if "-pico" in name else name.replace("_patch", "\n_patch", 1)


def lost_steps(
    picture: np.ndarray, truth: np.ndarray, found: Mapping[str, xr.Dataset], sizes: Mapping[str, Sequence[int]]
) -> Figure:
    """What LOST does to one picture (Fig 13): (H, W, 3), true boxes (objects, 4), {model: Dataset of maps [y, x] and box}, sizes
    (height, width) in pixels → Figure: a column a model, rows score (a dot is the seed), similarity to the seed, expansion."""
    figure, axes = axes_grid(3, 1 + len(found), 1.15 * (1 + len(found)) + 0.3, 4.1, layout="compressed")
    for axis in axes.flat:
        blank(axis)
    _picture(axes[0, 0], picture, truth)
    for j, (name, data) in enumerate(found.items(), start=1):
        for i, step in enumerate(STEPS):
            _map(axes[i, j], data, step, sizes[name])
        axes[0, j].set_title(_title(name), fontsize=7)
    for i, label in enumerate(STEPS.values()):
        axes[i, 1].set_ylabel(label, fontsize=8)
    return figure


def projections(
    picture: np.ndarray, truth: np.ndarray, found: Mapping[str, xr.Dataset], sizes: Mapping[str, Sequence[int]]
) -> Figure:
    """Seed expansion from keys, queries and values (Fig 14): (H, W, 3), true boxes (objects, 4), {model: Dataset of maps
    [projection, y, x]}, sizes (height, width) in pixels → Figure with a row a model."""
    names = [str(p) for p in next(iter(found.values()))["projection"].values]
    figure, axes = axes_grid(
        len(found), 1 + len(names), 1.5 * (1 + len(names)), 1.5 * len(found) + 0.3, layout="compressed"
    )
    for axis in axes.flat:
        blank(axis)
    _picture(axes[0, 0], picture, truth)
    for i, (name, data) in enumerate(found.items()):
        for j, which in enumerate(names, start=1):
            _map(axes[i, j], data.sel(projection=which), "expansion", sizes[name])
            if i == 0:
                axes[i, j].set_title(f"{which[:-1]}ies" if which == "query" else f"{which}s", fontsize=8)
        axes[i, 1].set_ylabel(name, fontsize=7)
    return figure


def bias_curves(table: pd.DataFrame, chance: float) -> Figure:
    """CorLoc over biases: rows pair, model, bias, score, low, high in per cent, score of the best box that looks at nothing →
    Figure, one panel a pair; bands are 95 % intervals over pictures."""
    if table.empty:
        return note("these pictures come without boxes of their objects: there is nothing to score")
    pairs = list(dict.fromkeys(table["pair"]))
    figure, axes = axes_grid(1, len(pairs), 0.6 + 2.35 * len(pairs), 2.7, sharey=True)
    for axis, pair in zip(axes[0], pairs, strict=True):
        part = table[table["pair"] == pair]
        for (name, rows), colour in zip(part.groupby("model", sort=False), PALETTE, strict=False):
            label = "without registers" if name == pair else "with registers"
            axis.plot(rows["bias"], rows["score"], marker="o", ms=2.5, lw=1.2, color=colour, label=label)
            axis.fill_between(rows["bias"], rows["low"], rows["high"], color=colour, alpha=0.2, lw=0)
        axis.axhline(chance, color="grey", ls=":", lw=1, label="best box without a model")
        axis.set(xlabel="bias on cosines", ylim=(0, 100))
        axis.set_title(pair, fontsize=9)
    axes[0, 0].set_ylabel("CorLoc, %")
    named = max((axis.get_legend_handles_labels() for axis in axes[0]), key=lambda found: len(found[1]))
    figure.legend(*named, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure
