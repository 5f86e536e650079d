"""Remedies at test time, zero tokens by number and moved neurons (beside Fig 8): tables and figures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vitregs import arrays
from vitregs.data import published
from vitregs.measure import remedies
from vitregs.probes import transfer
from vitregs.report.format import cell
from vitregs.report.lost import frame
from vitregs.report.style import PALETTE, axes_grid, blank, plot_images
from vitregs.report.transfer import FIG_8

# Quantity of a measured data set → what it is called, its factor, its digits; largest is a median over images, others are means
QUANTITIES: Mapping[str, tuple[str, float, int]] = {
    "share": ("patches above {ratio:g} x the median, %", 100, 2),
    "above": ("patches above the cut-off, %", 100, 2),
    "largest": ("largest / median norm", 1, 2),
    "cls": ("CLS attention, largest, fair shares", 1, 1),
    "sink": ("attention sink, fair shares", 1, 1),
    "register": ("norm of the token", 1, 1),
    "right": ("top-1, %", 100, 1),
    "agrees": ("agrees with the untouched network, %", 100, 1),
    "hit": ("CorLoc, %", 100, 1),
    "miou": ("segmentation, mIoU %", 100, 1),
}


def _title(data: xr.Dataset, name: str) -> str:
    return QUANTITIES[name][0].format(ratio=float(data.attrs.get("ratio", np.nan)))


def _interval(data: xr.Dataset, name: str, at: dict[str, Any]) -> tuple[float, float, float]:
    """One quantity of one variant, in the unit of the table: value, low, high; nan where no image tells it."""
    factor = QUANTITIES[name][1]
    one = data.sel(at)
    if "low" in one and name == "miou":
        return factor * float(one["miou"]), factor * float(one["low"]), factor * float(one["high"])
    values = one[name].values.astype(float)
    there = values[np.isfinite(values)]
    if not len(there):
        return np.nan, np.nan, np.nan
    return arrays.bootstrap_interval(factor * there, of=np.median if name == "largest" else np.mean)


def _against(data: xr.Dataset, name: str, one: dict[str, Any], two: dict[str, Any]) -> tuple[float, float, float]:
    """A quantity of one variant minus that of another, on the same images: value, low, high; largest norms are divided."""
    if name == "miou":
        paired = np.stack([data["counts"].sel(at).values.astype(float) for at in (two, one)], 1)
        there = (paired.sum((2, 3)) > 0).all(1)
        if not there.any():
            return np.nan, np.nan, np.nan
        value, low, high = arrays.bootstrap_interval(paired[there], draws=1000, of=transfer._gain)
        return 100 * value, 100 * low, 100 * high
    first, second = (data[name].sel(at, drop=True).values.astype(float) for at in (one, two))
    ratio = name == "largest"
    gap = np.log(first / second) if ratio else first - second
    there = gap[np.isfinite(gap)]
    if not len(there):
        return np.nan, np.nan, np.nan
    found = arrays.bootstrap_interval(there if ratio else QUANTITIES[name][1] * there)
    value, low, high = np.exp(found).tolist() if ratio else found
    return value, low, high


def _contrasted(data: xr.Dataset, dim: str, one: Any, two: Any) -> dict[str, str]:
    """A row of the table: every quantity of one variant minus that of another."""
    row = {}
    for name in [q for q in QUANTITIES if q in data and q not in ("agrees", "register")]:
        found = _against(data, name, {dim: one}, {dim: two})
        sign, mark = ("", "x ") if name == "largest" else ("+", "")
        row[_title(data, name)] = "–" if np.isnan(found[0]) else mark + cell(found, QUANTITIES[name][2], sign)
    return row


def table(*found: xr.Dataset, contrasts: Sequence[tuple[Any, Any]] = ()) -> pd.DataFrame:
    """Every quantity of every variant with 95 % intervals over images.

    Beside CorLoc stands the median share of the image that boxes cover, and CorLoc of a box around the whole image, which must
    be read together.

    Args:
        found: data sets of `measure.remedies` and `probes.remedies` of one network, on whatever images.
        contrasts: pairs of doses or changes.

    Returns:
        A row a dose or a change; then a row a contrast, the first minus the second on the same images, where the largest norms
        are divided (geometric mean).
    """
    dim = "dose" if "dose" in found[0].dims else "change"
    rows: dict[Any, dict[str, str]] = {_label(label): {} for label in found[0][dim].values}
    for data in found:
        for label in data[dim].values:
            row = rows.setdefault(_label(label), {})
            for name in [q for q in QUANTITIES if q in data]:
                row[_title(data, name)] = cell(_interval(data, name, {dim: label}), QUANTITIES[name][2])
            if "covered" in data:
                row["covered, %"] = f"{100 * float(data['covered'].sel({dim: label}).median()):.0f}"
                there = data["whole"].values[data["whole"].notnull().values]
                row["whole image, %"] = f"{100 * there.mean():.1f}" if len(there) else "–"
    for one, two in contrasts:
        row = rows.setdefault(f"{_label(one)} minus {_label(two)}", {})
        for data in found:
            row |= _contrasted(data, dim, one, two)
    frame = pd.DataFrame.from_dict(rows, orient="index").fillna("–")
    frame = frame.loc[:, (frame != "–").any()]
    return frame.rename_axis("tokens" if dim == "dose" else "")


def _label(label: Any) -> str:
    return label if isinstance(label, str) else f"{label:g}"


def flips(answers: xr.Dataset) -> pd.DataFrame:
    """Where a change in accuracy comes from: `answers_by_dose` or `interventions` → a row a variant: answers lost and won in per
    cent of the images, and the margin that they had before."""
    dim = "dose" if "dose" in answers.dims else "change"
    found = remedies.flips(answers, dim)
    rows = {}
    for label in found[dim].values[1:]:
        one = found.sel({dim: label})
        rows[f"{label:g}" if dim == "dose" else label] = {
            "lost, %": f"{100 * float(one['lost']):.1f}",
            "won, %": f"{100 * float(one['won']):.1f}",
            "margin of those lost, before": _plain(one["margin_lost"]),
            "margin of those kept, before": _plain(one["margin_kept"]),
            "mean change of the margin": _plain(one["shift"], "+"),
        }
    return pd.DataFrame(rows).T.rename_axis("tokens" if dim == "dose" else "")


def _plain(value: xr.DataArray, sign: str = "") -> str:
    return "–" if bool(value.isnull()) else f"{float(value):{sign}.2f}"


def curves(*found: xr.Dataset) -> pd.DataFrame:
    """Quantities over the number of zero tokens, and the paper's Fig 8 over the number of trained registers: data sets of one
    network → rows source, panel, tokens, value, low, high (nan for values read off a plot), baseline (of a box around the whole
    image, of the most frequent class; nan where there is none)."""
    rows: list[dict[str, Any]] = []
    paper = published.table("tables")
    for panel, quantity in FIG_8.items():
        for _, r in paper[(paper["table"] == "fig_8") & (paper["quantity"] == quantity)].iterrows():
            row = {"source": "paper", "panel": panel, "tokens": float(r["registers"]), "value": float(r["value"])}
            rows.append(row | dict.fromkeys(("low", "high", "baseline"), np.nan))
    for data in found:
        for name in [q for q in QUANTITIES if q in data and q not in ("above", "agrees")]:
            for dose in data["dose"].values:
                row = {"source": "ours", "panel": _title(data, name), "tokens": float(dose)}
                row["baseline"] = _baseline(data, name, dose)
                rows.append(
                    row | dict(zip(("value", "low", "high"), _interval(data, name, {"dose": dose}), strict=True))
                )
        for dose in data["dose"].values if "covered" in data else ():
            ends = arrays.bootstrap_interval(100 * data["covered"].sel(dose=dose).values, of=np.median)
            row = {"source": "ours", "panel": "image that the box covers, %", "tokens": float(dose), "baseline": np.nan}
            rows.append(row | dict(zip(("value", "low", "high"), ends, strict=True)))
    return pd.DataFrame(rows).dropna(subset="value")


def _baseline(data: xr.Dataset, name: str, dose: float) -> float:
    """What an answer scores that looks at nothing: a box around the whole image, the most frequent class; nan if none."""
    if name == "hit":
        return 100 * float(data["whole"].mean())
    return 100 * float(data["chance"].sel(dose=dose)) if name == "miou" and "chance" in data else np.nan


def plot_doses(curve_table: pd.DataFrame) -> Figure:
    """Quantities over the number of tokens: rows of `curves` → Figure, the paper's panels (Fig 8, trained registers) first, then
    ours (zero tokens); bands are 95 % intervals over images, dotted lines baselines. Where ours have more tokens than the paper,
    a line tells where its range ends."""
    panels = list(dict.fromkeys(zip(curve_table["source"], curve_table["panel"], strict=True)))
    columns, most = 3, curve_table.loc[curve_table["source"] == "paper", "tokens"].max()
    lines = -(-len(panels) // columns)
    figure, axes = axes_grid(lines, columns, 2.9 * columns, 2.2 * lines)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    handles: list[Line2D] = []
    for axis, (source, panel) in zip(axes.flat, panels, strict=False):
        part = curve_table[(curve_table["source"] == source) & (curve_table["panel"] == panel)].sort_values("tokens")
        at, colour = np.arange(len(part)), PALETTE[1 if source == "paper" else 0]
        axis.plot(at, part["value"], "o-", ms=4, color=colour)
        axis.fill_between(at, part["low"], part["high"], color=colour, alpha=0.2, lw=0)
        if part["baseline"].notna().all():
            axis.plot(at, part["baseline"], ":", color="grey")
        inside = int((part["tokens"] <= most).sum())
        if 0 < inside < len(part):  # the paper has no more tokens than these
            end = axis.axvline(inside - 0.5, color="grey", ls="--", lw=0.8, label=f"the paper's range ends at {most:g}")
            handles = [end]
        if not part["value"].any():  # shares that are zero throughout have no scale of their own
            axis.set_ylim(0, 1)
        axis.set(xticks=at, xticklabels=[f"{n:g}" for n in part["tokens"]])
        axis.set_title(f"{panel} (paper)" if source == "paper" else panel, fontsize=8)
        axis.set_xlabel("trained registers" if source == "paper" else "zero tokens", fontsize=8)
    if handles:
        figure.legend(handles=handles, loc="outside lower center")
    return figure


def plot_before_and_after(
    images: np.ndarray, found: Mapping[str, xr.DataArray], label: str, colours: str = "viridis"
) -> Figure:
    """Maps of a network and of its variants on one scale, so that what is gone can be seen: images (n, H, W, 3), {variant: maps
    [image, y, x]}, what they show → Figure with a row an image."""
    maps = {name: a.transpose("image", "y", "x").values for name, a in found.items()}
    low, high = min(m.min() for m in maps.values()), max(m.max() for m in maps.values())
    limits = {name: (float(low), float(high)) for name in maps}
    return plot_images(images, maps, limits=limits, colours=colours, label=label)


def plot_cure(
    images: np.ndarray, norms: tuple[np.ndarray, np.ndarray], attention: tuple[np.ndarray, np.ndarray]
) -> Figure:
    """Photographs with their norm and CLS attention maps before and after a remedy (Fig 1, 2): images (n, H, W, 3), two maps
    (n, rows, columns) of each → Figure with a row an image; norms have one scale, attention maps each its own."""
    names = ["image", "norm", "norm, cured", "CLS attention", "CLS attention, cured"]
    figure, axes = axes_grid(len(images), len(names), 1.6 * len(names), 1.6 * len(images) + 0.3, layout="compressed")
    limits = {"vmin": min(m.min() for m in norms), "vmax": max(m.max() for m in norms), "cmap": "inferno"}
    for i, line in enumerate(axes):
        line[0].imshow(images[i])
        for axis, maps in zip(line[1:3], norms, strict=True):
            axis.imshow(maps[i], interpolation="nearest", **limits)
        for axis, maps in zip(line[3:], attention, strict=True):
            axis.imshow(maps[i], interpolation="nearest", cmap="viridis")
        for axis in line:
            blank(axis)
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name, fontsize=10)
    return figure


def plot_boxes(
    images: np.ndarray, found: Mapping[str, xr.DataArray], truth: Mapping[int, np.ndarray] | None = None
) -> Figure:
    """Boxes that LOST finds with each variant: images (n, H, W, 3), {variant: boxes [image, side] in pixels}, {number of an
    image: true boxes (objects, 4)} → Figure with a row a variant; true boxes are dashed."""
    figure, axes = axes_grid(len(found), len(images), 1.5 * len(images), 1.6 * len(found) + 0.2, layout="compressed")
    for line, (name, boxes) in zip(axes, found.items(), strict=True):
        for i, (axis, image) in enumerate(zip(line, images, strict=True)):
            axis.imshow(image, extent=(0, image.shape[1], image.shape[0], 0))
            blank(axis)
            for box in (truth or {}).get(i, ()):
                frame(axis, box, PALETTE[2], "--")
            frame(axis, boxes.transpose("image", "side").values[i], PALETTE[3])
        line[0].set_ylabel(name, fontsize=8)
    return figure
