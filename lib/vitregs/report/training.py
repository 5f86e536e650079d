"""Networks in training, and how training ended (Fig 4b, section 3): tables and figures."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from vitregs.arrays import KINDS
from vitregs.measure import outliers
from vitregs.models import registry
from vitregs.models.pairs import register_pairs
from vitregs.report.format import cell, per_cent, yes
from vitregs.report.style import PALETTE, axes_grid, blank, norm_histogram, note, share_bar


def _four(names: Sequence[str]) -> dict[str, str]:
    """Partners in the zoo with four registers: names → {name: partner}."""
    found = {a: b for a, b in register_pairs(registry.zoo()) if registry.card(b)["recipe"]["registers"] == 4}
    return {name: found[name] for name in names if name in found}


def training(histories: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """How training ended: {model: history} → accuracy, top-1-% ratio of the strongest layer, largest attention sink on a patch;
    the patch embedding (layer 0) is left out (Fig 4b)."""
    rows = []
    for name, h in histories.items():
        end = h.isel(step=-1)
        top = h["top1"].isel(layer=slice(1, None))
        sink = float(end["sink"].sel(kind="patch").max())
        rows.append((name, int(end["step"]), float(end["accuracy"]), float(top.isel(step=-1).max()), sink))
    return pd.DataFrame(rows, columns=["model", "steps", "accuracy", "top-1% ratio", "attention sink"])


def emergence_verdicts(norms: Mapping[str, xr.DataArray], backgrounds: Mapping[str, np.ndarray | None]) -> pd.DataFrame:
    """Every model by the emergence rule: {model: [image, layer, token]}, {model: background share (images, patches) or
    None} → rows: strongest layer, its top-1-% ratio with a 95 % interval, separation (D) and size of its second mode, whether
    outliers have emerged, the mode in per cent of the patches on plain background and of all others, and whether this is the
    paper's artifact (Fig 7).
    """
    rows = []
    for name, a in norms.items():
        found = outliers.judge_emergence(a, backgrounds[name])
        rows.append(
            {
                "model": name,
                "layer": f"{found.layer} of {found.depth}",
                "top-1% ratio": cell(found.top1),
                "D": round(found.separation, 1),
                "mode, %": round(100 * found.share, 1),
                "emerged": yes(found.emerged),
                "background, %": per_cent(found.background),
                "rest, %": per_cent(found.rest),
                "artifact": yes(found.artifact),
            }
        )
    return pd.DataFrame(rows)


def emergence(histories: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """Largest top-1-% ratio over training and when, at any layer but the patch embedding: {model: history} → a row a
    model (Fig 4b)."""
    rows = []
    for name, h in histories.items():
        top = h["top1"].isel(layer=slice(1, None)).max("layer")
        peak = int(top.argmax("step"))
        sink = h["sink"].sel(kind="patch").max("block")
        early = sink["step"].values[(sink >= 10).values]
        rows.append(
            {
                "model": name,
                "steps": int(h["step"][-1]),
                "largest top-1% ratio": float(top[peak]),
                "at step": int(h["step"][peak]),
                "at the end": float(top[-1]),
                "first sink of 10 shares": int(early[0]) if len(early) else "never",
            }
        )
    return pd.DataFrame(rows)


def pairs(names: Sequence[str]) -> dict[str, dict[str, xr.Dataset]]:
    """Histories of zoo models and of the same with four registers: names → {name: {label: history}}; absent ones are left out."""
    partner, found = _four(names), {}
    for name in names:
        logs = {"no registers": registry.history(name), "4 registers": registry.history(partner.get(name, ""))}
        there = {k: v for k, v in logs.items() if v is not None}
        if there:
            found[name] = there
    return found


def zoo(names: Sequence[str]) -> pd.DataFrame:
    """Scores of zoo models and of the same with four registers, from their cards: names → a row a model (Table 2, in small).

    Linear scores are trained / untrained; a dash where a card has none.
    """
    rows, partner = [], _four(names)
    for name in [full for n in names for full in (n, partner.get(n, ""))]:
        if name in registry.zoo():
            card = registry.card(name)
            linear = {k: f"{v:.2f} / {card['linear_untrained'][k]:.2f}" for k, v in card.get("linear", {}).items()}
            accuracy = card["accuracy"]
            rows.append(
                {
                    "model": name,
                    "registers": card["recipe"]["registers"],
                    "minutes": round(card["minutes"]),
                    "head or zero-shot": "–" if accuracy is None else f"{accuracy:.2f}",
                    **{f"linear, {k}": v for k, v in linear.items()},
                }
            )
    return pd.DataFrame(rows).fillna("–")


def settings(facts: Mapping[str, object]) -> pd.DataFrame:
    """A recipe as a table: its facts → a row a setting."""
    shown = {k: v for k, v in facts.items() if not isinstance(v, dict)}
    return pd.DataFrame({"setting": list(shown), "value": [str(v) for v in shown.values()]})


SCORES = {"accuracy": "accuracy", "knn": "k-NN"}


def plot_training(histories: Mapping[str, xr.Dataset], layer: int) -> Figure:
    """Patch norms of one layer over training, with scores below (Fig 4b): {name: history}, layer (-1: the last) → Figure."""
    if not histories:
        return note("no training history: only models of our zoo have one")
    layer = int(next(iter(histories.values()))["layer"][layer])
    figure_width = max(2.6, 4.4 - 0.45 * len(histories)) * len(histories)
    figure, axes = axes_grid(2, len(histories), figure_width, 4.6, height_ratios=[2.2, 1], sharex="col", sharey="row")
    for column, (title, log) in zip(axes.T, histories.items(), strict=True):
        even = log.isel(step=_evenly(log["step"].values, 24))
        hist = even["hist"].sel(layer=layer).values
        centre = log["bin"].values
        ratio = centre[1] / centre[0]
        used = np.flatnonzero(hist.sum(0))
        keep = slice(max(0, used.min() - 2), used.max() + 3)
        edges = np.append(centre[keep] / ratio**0.5, centre[keep][-1] * ratio**0.5)
        share = (hist / hist.sum(1, keepdims=True))[:, keep]
        mesh = norm_histogram(column[0], even["step"].values, edges, share, true=True)
        column[0].set(title=f"{title}, layer {layer}")
        for (name, label), colour in zip(SCORES.items(), (PALETTE[0], PALETTE[2]), strict=True):
            if name in log and log[name].notnull().any():
                column[1].plot(log["step"], log[name], color=colour, label=label)
        column[1].plot(
            log["step"], log["largest"].sel(layer=layer) / 10, color=PALETTE[1], label="largest / median ÷ 10"
        )
        column[1].set(xlabel="training step")
        column[1].xaxis.set_major_locator(MaxNLocator(4))
    share_bar(figure, mesh, list(axes[0]))
    named = max((axis.get_legend_handles_labels() for axis in axes[1]), key=lambda found: len(found[1]))
    figure.legend(*named, loc="outside lower center", ncols=3)  # below all: inside it would cover the curves
    axes[1, 0].set_ylim(0, None)  # once all are drawn: the row shares its scale
    axes[0, 0].set_ylabel("L2 norm of patch tokens")
    return figure


def _evenly(steps: np.ndarray, count: int) -> np.ndarray:
    """Indices of about `count` steps that lie evenly."""
    return np.unique(np.abs(steps[:, None] - np.linspace(0, steps.max(), count)).argmin(0))


def plot_losses(groups: Mapping[str, Mapping[str, xr.Dataset]]) -> Figure:
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


def plot_gallery(rows: Mapping[str, np.ndarray]) -> Figure:
    """Rows of images with a label each: {label: (n, H, W, 3) in [0, 1]} → Figure; n may differ."""
    columns = max(len(p) for p in rows.values())
    figure, axes = axes_grid(len(rows), columns, 1.25 * columns + 1.1, 1.3 * len(rows))
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=False):
            axis.imshow(np.clip(image, 0, 1), interpolation="nearest")
        for axis in line:
            blank(axis)
        line[0].set_ylabel(label.replace(", ", "\n"), rotation=0, ha="right", va="center", fontsize=8)
    return figure


def plot_sequences(kinds: Mapping[str, list[str]]) -> Figure:
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
