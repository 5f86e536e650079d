"""Downstream scores without and with registers, and their cost (Table 2, Fig 8, 12): tables and figures."""

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from vitregs import arrays
from vitregs.data import published
from vitregs.models import test_time
from vitregs.models.pairs import comparable, register_pairs
from vitregs.probes import transfer
from vitregs.report.format import cell
from vitregs.report.style import PALETTE, axes_grid, note

PAPER = {  # Table 2: column of ours → data set, quantity
    "ImageNet, %": ("table_2a", "ImageNet-1k", "top1"),
    "ADE20k, mIoU %": ("table_2a", "ADE20k", "miou"),
    "NYUd, rmse": ("table_2a", "NYUd", "rmse"),
    "zero-shot, %": ("table_2b", "ImageNet-1k", "zero_shot_top1"),
}
FIG_8 = {"ImageNet, %": "top1", "segmentation, mIoU %": "mean_miou", "depth, rmse": "mean_rmse"}


def unit(metric: str) -> float:
    """Factor to the unit in which a metric is shown: per cent, but for depth."""
    return 1.0 if metric.endswith("rmse") else 100.0


def _cell(interval: Iterable[float], metric: str, sign: str = "") -> str:
    """value, low, high → "value [low, high]" in the unit of the metric."""
    digits = 2 if unit(metric) == 1 else 1 if sign else 0
    return cell((unit(metric) * v for v in interval), digits, sign)


def published_scores() -> pd.DataFrame:
    """The paper's Tables 2a and 2b: → a row a model without and with registers, and their difference."""
    table = published.table("tables")
    found: dict[tuple[str, str], dict[str, str]] = {}
    for column, (name, data, quantity) in PAPER.items():
        part = table[(table["table"] == name) & (table["dataset"] == data) & (table["quantity"] == quantity)]
        for model, rows in part.groupby("model", sort=False):
            values = rows.sort_values("registers")["value"].tolist()
            digits = 3 if "rmse" in column else 1
            words = [f"{v:.{digits}f}" for v in values] + [f"{values[1] - values[0]:+.{digits}f}"]
            for kind, text in zip(("without", "with", "difference"), words, strict=True):
                found.setdefault((str(model), kind), {})[column] = text
    frame = pd.DataFrame(found).T.fillna("–")
    return frame.rename_axis(["model", "registers"])[list(PAPER)]


def beside_paper(
    classes: Mapping[str, xr.Dataset], segments: Mapping[str, xr.Dataset], answers: xr.Dataset
) -> pd.DataFrame:
    """Downstream scores of one network without and with a test-time register, beside the paper's largest pair (Table 2a).

    Args:
        classes: {model: transfer of labels}, the one without first, then the one with.
        segments: {model: transfer of masks}, the same two.
        answers: interventions on the network's trained head: right [change, image].

    Returns:
        A row a score, per cent with 95 % intervals over images; the difference in points, paired over the same images.
    """
    without, with_ = classes
    paper = published_scores().loc["DINOv2 ViT-L/14"]
    rows = []
    for what, column, found, metric in (
        ("classes, linear", "ImageNet, %", classes, "label"),
        ("segmentation, linear, mIoU", "ADE20k, mIoU %", segments, "mask mIoU"),
    ):
        one, other = (found[name].sel(metric=metric) for name in (without, with_))
        cells = [cell((100 * float(d[k]) for k in ("score", "low", "high")), 1) for d in (one, other)]
        gap = transfer.difference(found[without], found[with_], metric)
        rows.append([what, *paper[column], *cells, cell((100 * v for v in gap), 1, "+"), f"{int(one['n'])}"])
    changes = ["untouched", test_time.split(with_)[1]]
    right = [100 * answers["right"].sel(change=c).values.astype(float) for c in changes]
    cells = [cell(arrays.bootstrap_interval(v), 1) for v in right]
    change = cell(arrays.bootstrap_interval(right[1] - right[0]), 1, "+")
    rows.append(["classes, trained head", *paper["ImageNet, %"], *cells, change, f"{len(right[0])}"])
    kinds = ("without", "with", "difference")
    names = [
        ("", "score"),
        *(("DINOv2 ViT-L (paper)", k) for k in kinds),
        *(("here", k) for k in kinds),
        ("", "images"),
    ]
    return pd.DataFrame(rows, columns=pd.MultiIndex.from_tuples(names))


def measured_metrics(found: Mapping[str, xr.Dataset]) -> str:
    """What could be measured on the images of a chapter, in words: {model: Dataset[metric]} → lines, with what they
    do not tell."""
    metrics = list(dict.fromkeys(str(m) for d in found.values() for m in d["metric"].values))
    kinds = {"segments": " mIoU", "depth": " rmse", "words": "zero-shot"}
    by_kind = {k: [m for m in metrics if part in m] for k, part in kinds.items()}
    by_kind = {"classes": [m for m in metrics if not any(part in m for part in kinds.values())], **by_kind}
    missing = {"words": "no network here has a text side that fits these images"}
    return "\n".join(f"{k}: {', '.join(v) or missing.get(k, 'no truth in these images')}" for k, v in by_kind.items())


def panels(found: Mapping[str, xr.Dataset], classes: str, segments: str) -> dict[str, str]:
    """Metrics to draw over the number of registers: {model: Dataset[metric]}, wanted classes and segments → {panel: metric} of
    those that were measured; images that are no scenes have their label and their mask instead."""
    there = {str(m) for d in found.values() for m in d["metric"].values}
    wanted = {f"{classes}, %": classes, "label, %": "label", f"{segments}, mIoU %": f"{segments} mIoU"}
    wanted |= {"mask, mIoU %": "mask mIoU", "depth, rmse": "depth rmse"}
    return {k: v for k, v in wanted.items() if v in there}


def scores(found: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """Every metric with 95 % intervals over images: {model: Dataset[metric]} → a row a model, then what networks of the same
    shapes give untrained, chance, and how many images are scored (Table 2, in small)."""
    metrics = list(dict.fromkeys(m for d in found.values() for m in d["metric"].values))
    rows: dict[str, dict[str, str]] = {}
    for name, data in found.items():
        cells = {m: data.sel(metric=m) for m in data["metric"].values}
        rows[name] = {m: _cell((float(c[k]) for k in ("score", "low", "high")), m) for m, c in cells.items()}
    for name, data in found.items():
        rows[f"{name}, untrained"] = _plain(data, "floor")
    rows = {
        k: v for i, (k, v) in enumerate(rows.items()) if v not in list(rows.values())[:i] and set(v.values()) != {"–"}
    }
    fullest = max(found.values(), key=lambda d: d.sizes["metric"])
    rows |= {"chance": _plain(fullest, "chance"), "images": _plain(fullest, "n")}
    return pd.DataFrame(rows).T.fillna("–")[metrics].rename_axis("model")


def _plain(data: xr.Dataset, key: str) -> dict[str, str]:
    """One column of a data set as text in the units of its metrics; a dash for nan."""
    values = {str(m): float(data[key].sel(metric=m)) for m in data["metric"].values}
    shown = {m: v if key == "n" else unit(m) * v for m, v in values.items()}
    digits = {m: 2 if unit(m) == 1 and key != "n" else 0 for m in values}
    return {m: "–" if np.isnan(v) else f"{v:.{digits[m]}f}" for m, v in shown.items()}


def differences(found: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """What registers change in every pair, with paired 95 % intervals over images: {model: Dataset[metric]} → rows pair,
    metric, difference, low, high (points; the unit of depth), text, significant (the interval leaves out 0), better (with them).

    A pair is named by its network without registers; by that with them, where one without has several partners."""
    rows = []
    pairs = register_pairs(found)
    plain = [first for first, _ in pairs]
    for first, second in pairs:
        a, b = found[first], found[second]
        for metric in [m for m in a["metric"].values if m in b["metric"].values]:
            value, low, high = transfer.difference(a, b, metric)
            significant = low > 0 or high < 0
            name = first if plain.count(first) == 1 else second
            row = {
                "pair": name,
                "metric": metric,
                "text": _cell((value, low, high), metric, "+"),
                "significant": significant,
            }
            row |= {k: unit(metric) * v for k, v in (("difference", value), ("low", low), ("high", high))}
            rows.append(row | {"better": (value < 0) if unit(metric) == 1 else (value > 0)})
    columns = ["pair", "metric", "difference", "low", "high", "text", "significant", "better"]
    return pd.DataFrame(rows, columns=columns)


def count_significant(table: pd.DataFrame) -> str:
    """Count what `differences` shows: → a sentence, with how many would be significant by chance alone."""
    if table.empty:
        return "there is no pair without and with registers here"
    significant = table[table["significant"]]
    return (
        f"of {len(table)} differences {len(significant)} are significant, chance alone makes about {0.05 * len(table):.1f}: "
        f"registers are better in {int(significant['better'].sum())}, worse in {int((~significant['better'].astype(bool)).sum())}"
    )


def curves(found: Mapping[str, xr.Dataset], metrics: Mapping[str, str]) -> pd.DataFrame:
    """Scores over the number of registers, ours and the paper's Fig 8: {model: Dataset[metric]}, {panel: metric} → rows source,
    model, panel, registers, score, low, high (nan for values read off a plot)."""
    table = published.table("tables")
    part = table[table["table"] == "fig_8"]
    rows = []
    for panel, quantity in FIG_8.items():
        for _, r in part[part["quantity"] == quantity].iterrows():
            row = {"panel": panel, "registers": int(r["registers"]), "score": float(r["value"])}
            rows.append({"source": "paper", "model": r["model"], **row, "low": np.nan, "high": np.nan})
    for name, data in found.items():
        for panel, metric in metrics.items():
            if metric in data["metric"].values:
                at = unit(metric) * data[["score", "low", "high"]].sel(metric=metric)
                row = {k: float(at[k]) for k in ("score", "low", "high")}
                rows.append(
                    {"source": "ours", "model": name, "panel": panel, "registers": int(data["registers"]), **row}
                )
    return pd.DataFrame(rows)


def against_none(found: Mapping[str, xr.Dataset], metrics: Iterable[str]) -> pd.DataFrame:
    """Differences to the first model, which has no registers: {model: Dataset[metric]}, metrics → a row for each that
    differs from it in registers and seed alone, with paired 95 % intervals over images; empty without any."""
    first = next(iter(found))
    rows = {}
    for name in comparable(first, found):
        there = [m for m in metrics if m in found[name]["metric"].values and m in found[first]["metric"].values]
        gaps = {m: _cell(transfer.difference(found[first], found[name], m), m, "+") for m in there}
        rows[name] = {"registers": int(found[name]["registers"]), **gaps}
    return pd.DataFrame(rows).T


def traces(
    maps: Mapping[str, xr.DataArray],
    ratios: Mapping[str, xr.DataArray],
    registers: Mapping[str, int],
    backgrounds: Mapping[str, np.ndarray | None],
) -> pd.DataFrame:
    """Traces of artifacts by the number of registers: {model: CLS attention [image, token] to patches}, {model: largest over
    median norm [image, layer]}, {model: registers}, {model: background share (images, patches) or None} → a row a model.

    Attention on the most attended patch and on objects, how often that patch is all background, the largest norm ratio at any
    layer but the patch embedding; with 95 % intervals over images (Fig 8, top)."""
    rows: dict[str, dict[str, object]] = {}
    for name, a in maps.items():
        part = (a / a.sum("token")).transpose("image", "token").values
        intervals = {"on one patch, %": arrays.bootstrap_interval(100 * part.max(1))}
        background = backgrounds[name]
        if background is not None:
            there = np.flatnonzero(np.isfinite(background).all(1))  # images with a mask
            intervals["on objects, %"] = arrays.bootstrap_interval(100 * (part * (1 - background))[there].sum(1))
            intervals["peak on background, %"] = arrays.bootstrap_interval(
                100 * (background[there, part[there].argmax(1)] == 1)
            )
        deep = ratios[name].isel(layer=slice(1, None))
        layer = deep.median("image").idxmax()
        intervals["largest / median norm"] = arrays.bootstrap_interval(deep.sel(layer=layer), of=np.median)
        digits = {"largest / median norm": 2}
        cells = {k: cell(v, digits.get(k, 0)) for k, v in intervals.items()}
        rows[name] = {"registers": registers[name], **cells, "at layer": int(layer)}
    return pd.DataFrame(rows).T


def plot_differences(table: pd.DataFrame) -> Figure:
    """What registers change, metric by metric: rows pair, metric, difference, low, high, significant → Figure; a filled mark is
    significant, the green side is the better one."""
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
        y, significant = np.arange(len(names)), part["significant"].fillna(False).to_numpy(bool)
        axis.axvline(0, color="black", lw=0.8)
        axis.hlines(y, part["low"], part["high"], color=PALETTE[0], lw=1.4)
        axis.plot(part["difference"], y, "o", ms=5, color=PALETTE[0], mfc="white")
        axis.plot(part["difference"][significant], y[significant], "o", ms=5, color=PALETTE[0])
        most = 1.1 * np.nanmax(np.abs(part[["low", "high"]].to_numpy())) or 1
        depth = metric.endswith("rmse")
        axis.axvspan(*((-most, 0) if depth else (0, most)), color=PALETTE[2], alpha=0.08, lw=0)
        axis.set(title=metric, xlim=(-most, most), xlabel="depth units" if depth else "points")
        axis.set(yticks=y, yticklabels=names, ylim=(len(names) - 0.5, -0.5))
        axis.grid(axis="y", visible=False)
    return figure


def plot_over_registers(table: pd.DataFrame) -> Figure:
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


def plot_costs(tables: Mapping[str, pd.DataFrame], paper: pd.DataFrame) -> Figure:
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
