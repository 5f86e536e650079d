"""Figures of training: norms over steps and sizes, losses and scores, what a network is shown, what goes in and out."""

from collections.abc import Mapping
from itertools import cycle

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from vitregs.artifacts import patches
from vitregs.canvas import PALETTE, axes_grid, blank, norm_edges, note, spread
from vitregs.results import KINDS

SCORES = {"accuracy": "accuracy", "knn": "k-NN"}


def training(histories: Mapping[str, xr.Dataset], layer: int) -> Figure:
    """Patch norms of one layer over training, with scores below (Fig 4b): {name: history}, layer (-1: the last) → Figure."""
    if not histories:
        return note("no training history: only models of our zoo have one")
    layer = int(next(iter(histories.values()))["layer"][layer])
    wide = max(2.6, 4.4 - 0.45 * len(histories)) * len(histories)
    figure, axes = axes_grid(2, len(histories), wide, 4.6, height_ratios=[2.2, 1], sharey="row")
    for column, (title, log) in zip(axes.T, histories.items(), strict=True):
        even = log.isel(step=_evenly(log["step"].values, 24))
        hist = even["hist"].sel(layer=layer).values
        centre = log["bin"].values
        ratio = centre[1] / centre[0]
        used = np.flatnonzero(hist.sum(0))
        keep = slice(max(0, used.min() - 2), used.max() + 3)
        edges = np.append(centre[keep] / ratio**0.5, centre[keep][-1] * ratio**0.5)
        spread(figure, column[0], even["step"].values, edges, (hist / hist.sum(1, keepdims=True))[:, keep])
        column[0].set(title=f"{title}, layer {layer}")
        column[0].tick_params(axis="x", rotation=45)
        for (name, label), colour in zip(SCORES.items(), (PALETTE[0], PALETTE[2]), strict=True):
            if name in log and log[name].notnull().any():
                column[1].plot(log["step"], log[name], color=colour, label=label)
        column[1].plot(
            log["step"], log["largest"].sel(layer=layer) / 10, color=PALETTE[1], label="largest / median ÷ 10"
        )
        column[1].set(xlabel="training step")
        column[1].legend(framealpha=0.5, fontsize=7)
    axes[1, 0].set_ylim(0, None)  # once all are drawn: the row shares its scale
    axes[0, 0].set_ylabel("L2 norm of patch tokens")
    return figure


def _evenly(steps: np.ndarray, count: int) -> np.ndarray:
    """Indices of about `count` steps that lie evenly."""
    return np.unique(np.abs(steps[:, None] - np.linspace(0, steps.max(), count)).argmin(0))


def sizes(norms: Mapping[str, xr.DataArray]) -> Figure:
    """Patch norms of one layer for models of several sizes (Fig 4c): {label: [image, token]} → Figure, a column a model."""
    values = [patches(a).values.ravel() for a in norms.values()]
    edges = norm_edges(*values)
    figure, axes = axes_grid(1, 1, max(4.2, 1.3 * len(values) + 1.6), 3.3)
    share = np.stack([np.histogram(v, edges)[0] / len(v) for v in values])
    spread(figure, axes[0, 0], np.arange(len(values)), edges, share)
    axes[0, 0].set(ylabel="L2 norm of patch tokens, last layer", xticks=range(len(values)), xticklabels=list(norms))
    return figure


def losses(groups: Mapping[str, Mapping[str, xr.Dataset]]) -> Figure:
    """Loss and scores over training: {panel: {label: history}} → Figure, losses above, scores below."""
    if not groups:
        return note("no training history: only models of our zoo have one")
    figure, axes = axes_grid(2, len(groups), 2.5 * len(groups), 4.2, sharex="col")
    for column, (title, logs) in zip(axes.T, groups.items(), strict=True):
        for (label, log), colour in zip(logs.items(), cycle(PALETTE), strict=False):
            column[0].plot(log["step"], log["loss"], color=colour, label=label)
            for (name, _), dash in zip(SCORES.items(), ("-", ":"), strict=True):
                if name in log and log[name].notnull().any():
                    column[1].plot(log["step"], log[name], color=colour, ls=dash)
        column[0].set(title=title)
        column[1].set(xlabel="training step", ylim=(0, None))
        column[0].legend()
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("accuracy (line), k-NN (dots)")
    return figure


def gallery(rows: Mapping[str, np.ndarray]) -> Figure:
    """Rows of pictures with a label each: {label: (n, H, W, 3) in [0, 1]} → Figure; n may differ."""
    columns = max(len(p) for p in rows.values())
    figure, axes = axes_grid(len(rows), columns, 1.25 * columns + 1.1, 1.3 * len(rows))
    for line, (label, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, pictures, strict=False):
            axis.imshow(np.clip(picture, 0, 1), interpolation="nearest")
        for axis in line:
            blank(axis)
        line[0].set_ylabel(label.replace(", ", "\n"), rotation=0, ha="right", va="center", fontsize=8)
    return figure


def sequences(kinds: Mapping[str, list[str]]) -> Figure:
    """What goes into a network and what is kept of it (Fig 6): {model: kinds of its tokens} → Figure; patches are cut short."""
    shown = 12
    figure, axes = axes_grid(len(kinds), 1, 6.4, 1.15 * len(kinds) + 0.3)
    for axis, (name, sequence) in zip(axes[:, 0], kinds.items(), strict=True):
        line = [k for k in sequence if k != "patch"] + ["patch"] * shown
        for i, kind in enumerate(line):
            colour = PALETTE[KINDS.index(kind)]
            axis.add_patch(Rectangle((i, 0), 0.86, 0.8, color=colour))
            if kind != "register":
                axis.add_patch(Rectangle((i, 1.5), 0.86, 0.8, color=colour))
            axis.annotate(
                "", (i + 0.43, 1.45), (i + 0.43, 0.85), arrowprops={"arrowstyle": "-", "color": "grey", "lw": 0.7}
            )
        axis.text(len(line) + 0.2, 0.25, f"… in: {len(sequence)} tokens", fontsize=8)
        kept = len(sequence) - sequence.count("register")
        axis.text(len(line) + 0.2, 1.75, f"… kept: {kept}", fontsize=8)
        axis.set(xlim=(0, len(line) + 6), ylim=(-0.1, 2.4))
        axis.set_title(name, loc="left", fontsize=9)
        blank(axis)
    there = [k for k in KINDS if any(k in sequence for sequence in kinds.values())]
    handles = [Rectangle((0, 0), 1, 1, color=PALETTE[KINDS.index(k)]) for k in there]
    figure.legend(handles, there, loc="outside lower center", ncols=len(there))
    return figure
