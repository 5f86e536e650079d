"""What the chapters on regressions and on the number of registers print: measured data sets in, data frames out."""

from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
import xarray as xr

from vitregs import artifacts, published
from vitregs.pairs import register_pairs
from vitregs.probes import transfer

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
    value, low, high = (unit(metric) * v for v in interval)
    return f"{value:{sign}.{digits}f} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def paper() -> pd.DataFrame:
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


def asked(found: Mapping[str, xr.Dataset]) -> str:
    """What the pictures of a chapter could be asked, in words: {model: Dataset[metric]} → lines, with what they do not tell."""
    metrics = list(dict.fromkeys(str(m) for d in found.values() for m in d["metric"].values))
    kinds = {"segments": " mIoU", "depth": " rmse", "words": "zero-shot"}
    told = {k: [m for m in metrics if part in m] for k, part in kinds.items()}
    told = {"classes": [m for m in metrics if not any(part in m for part in kinds.values())], **told}
    missing = {"words": "no network here has a text side that fits these pictures"}
    return "\n".join(f"{k}: {', '.join(v) or missing.get(k, 'no truth in these pictures')}" for k, v in told.items())


def panels(found: Mapping[str, xr.Dataset], classes: str, segments: str) -> dict[str, str]:
    """Metrics to draw over the number of registers: {model: Dataset[metric]}, wanted classes and segments → {panel: metric} of
    those that were measured; pictures that are no scenes have their label and their mask instead."""
    there = {str(m) for d in found.values() for m in d["metric"].values}
    wanted = {f"{classes}, %": classes, "label, %": "label", f"{segments}, mIoU %": f"{segments} mIoU"}
    wanted |= {"mask, mIoU %": "mask mIoU", "depth, rmse": "depth rmse"}
    return {k: v for k, v in wanted.items() if v in there}


def scores(found: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """Every metric with 95 % intervals over pictures: {model: Dataset[metric]} → a row a model, then what networks of the same
    shapes give untrained, chance, and how many pictures are scored (Table 2, in small)."""
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
    whole = max(found.values(), key=lambda d: d.sizes["metric"])
    rows |= {"chance": _plain(whole, "chance"), "pictures": _plain(whole, "n")}
    return pd.DataFrame(rows).T.fillna("–")[metrics].rename_axis("model")


def _plain(data: xr.Dataset, key: str) -> dict[str, str]:
    """One column of a data set as text in the units of its metrics; a dash for nan."""
    values = {str(m): float(data[key].sel(metric=m)) for m in data["metric"].values}
    shown = {m: v if key == "n" else unit(m) * v for m, v in values.items()}
    digits = {m: 2 if unit(m) == 1 and key != "n" else 0 for m in values}
    return {m: "–" if np.isnan(v) else f"{v:.{digits[m]}f}" for m, v in shown.items()}


def differences(found: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """What registers change in every pair, with paired 95 % intervals over images: {model: Dataset[metric]} → rows pair,
    metric, difference, low, high (points; the unit of depth), text, clear (the interval leaves out 0), better (with them).

    A pair is named by its network without registers; by that with them, where one without has several partners."""
    rows = []
    pairs = register_pairs(found)
    plain = [first for first, _ in pairs]
    for first, second in pairs:
        a, b = found[first], found[second]
        for metric in [m for m in a["metric"].values if m in b["metric"].values]:
            value, low, high = transfer.difference(a, b, metric)
            clear = low > 0 or high < 0
            name = first if plain.count(first) == 1 else second
            row = {"pair": name, "metric": metric, "text": _cell((value, low, high), metric, "+"), "clear": clear}
            row |= {k: unit(metric) * v for k, v in (("difference", value), ("low", low), ("high", high))}
            rows.append(row | {"better": (value < 0) if unit(metric) == 1 else (value > 0)})
    columns = ["pair", "metric", "difference", "low", "high", "text", "clear", "better"]
    return pd.DataFrame(rows, columns=columns)


def verdict(table: pd.DataFrame) -> str:
    """Count what `differences` shows: → a sentence, with how many would be clear by chance alone."""
    if table.empty:
        return "there is no pair without and with registers here"
    clear = table[table["clear"]]
    return (
        f"of {len(table)} differences {len(clear)} are clear of 0, where chance alone makes about {0.05 * len(table):.1f}: "
        f"registers are better in {int(clear['better'].sum())}, worse in {int((~clear['better'].astype(bool)).sum())}"
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
    """Differences to the first model, which has no registers: {model: Dataset[metric]}, metrics → a row a model, with paired 95 %
    intervals over pictures; empty with fewer than two models."""
    names = list(found)
    rows = {}
    for name in names[1:]:
        there = [m for m in metrics if m in found[name]["metric"].values and m in found[names[0]]["metric"].values]
        gaps = {m: _cell(transfer.difference(found[names[0]], found[name], m), m, "+") for m in there}
        rows[name] = {"registers": int(found[name]["registers"]), **gaps}
    return pd.DataFrame(rows).T


def traces(
    maps: Mapping[str, xr.DataArray],
    ratios: Mapping[str, xr.DataArray],
    registers: Mapping[str, int],
    grounds: Mapping[str, np.ndarray | None],
) -> pd.DataFrame:
    """Traces of artifacts by the number of registers: {model: CLS attention [image, token] to patches}, {model: largest over
    median norm [image, layer]}, {model: registers}, {model: background share (pictures, patches) or None} → a row a model.

    Attention on the most attended patch and on objects, how often that patch is all background, the largest norm ratio at any
    layer but the stem; with 95 % intervals over pictures (Fig 8, top)."""
    rows: dict[str, dict[str, object]] = {}
    for name, a in maps.items():
        part = (a / a.sum("token")).transpose("image", "token").values
        told = {"on one patch, %": artifacts.interval(100 * part.max(1))}
        ground = grounds[name]
        if ground is not None:
            there = np.flatnonzero(np.isfinite(ground).all(1))  # images with a mask
            told["on objects, %"] = artifacts.interval(100 * (part * (1 - ground))[there].sum(1))
            told["peak on wall, %"] = artifacts.interval(100 * (ground[there, part[there].argmax(1)] == 1))
        deep = ratios[name].isel(layer=slice(1, None))
        layer = deep.median("image").idxmax()
        told["largest / median norm"] = artifacts.interval(deep.sel(layer=layer), of=np.median)
        digits = {"largest / median norm": 2}
        cells = {k: "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*v, d=digits.get(k, 0)) for k, v in told.items()}
        rows[name] = {"registers": registers[name], **cells, "at layer": int(layer)}
    return pd.DataFrame(rows).T
