"""What the chapters on probes print: measured data sets of several models in, data frames out, the paper's numbers first."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from vitregs import artifacts, published

LOCAL = {  # our quantity → unit shown, the paper's name for it
    "top1": ("position, % right", "position_top1"),
    "distance": ("position, patches off", "position_distance"),
    "l2": ("pixels, L2", "reconstruction"),
    "mean_patch": ("L2 of the mean patch", ""),
    "r2": ("pixels, R²", ""),
}
TABLE_1 = "DINOv2 ViT-g/14 (paper)"


def cell(interval: Iterable[float], digits: int = 2) -> str:
    """A number with its interval, as text: value, low, high → "value [low, high]", a dash for nan."""
    value, low, high = interval
    return "–" if np.isnan(value) else f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def local(found: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """What normal tokens and outliers know of their place: {model: Dataset[quantity, group]} → a row a model and group, the
    paper's first (Fig 5b, Table 5)."""
    table = published.table("tables")
    rows = []
    for name, where in (("fig_5b", "ViT-g/14"), ("table_5", "ViT-L/14")):
        part = table[table["table"] == name]
        for (registers, token), cells in part.groupby(["registers", "token"], sort=False):
            row = {"model": f"DINOv2 {where}, {registers:.0f} registers (paper)", "group": token, "tokens": "–"}
            for shown, key in LOCAL.values():
                value = cells.loc[cells["quantity"].str.startswith(key or "none"), "value"].tolist()
                row[shown] = f"{value[0]:g}" if value else "–"
            rows.append(row)
    for name, data in found.items():
        for group in data["group"].values[1:]:
            at = data.sel(group=group)
            row = {"model": name, "group": group, "tokens": str(int(at["tokens"]))}
            for quantity, (shown, _) in LOCAL.items():
                times, digits = (100, 1) if quantity == "top1" else (1, 2)
                one = at.sel(quantity=quantity)
                row[shown] = cell((times * float(one[k]) for k in ("score", "low", "high")), digits)
            rows.append(row)
    return pd.DataFrame(rows)


def groups(found: Mapping[str, xr.Dataset], quantity: str) -> pd.DataFrame:
    """One quantity of every model and group, to draw: {model: Dataset[quantity, group]} → rows model, group, share, low, high."""
    rows = []
    for name, data in found.items():
        for group in data["group"].values[1:]:
            at = data.sel(group=group, quantity=quantity)
            row = {"share": float(at["score"]), "low": float(at["low"]), "high": float(at["high"])}
            rows.append({"model": name, "group": group, **row})
    return pd.DataFrame(rows)


def paper_tokens() -> pd.DataFrame:
    """The paper's Tables 1 and 6: → a row a kind of token, a column a data set, in per cent with the spread over draws."""
    table = published.table("tables")
    part = table[table["table"] == "table_6"]
    text = [
        f"{v:.1f}" + ("" if np.isnan(s) else f" ± {s:.1f}") for v, s in zip(part["value"], part["std"], strict=True)
    ]
    return (
        part.assign(text=text).pivot(index="token", columns="dataset", values="text").loc[["cls", "normal", "outlier"]]
    )


def tokens(found: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """One token a picture: {model: Dataset[task, token]} → rows by task and model, a column a kind of token in per cent with the
    spread over draws, chance and n (Tables 1, 6)."""
    rows: list[dict[str, Any]] = []
    for name, data in found.items():
        for task in data["task"].values:
            at = data.sel(task=task)
            row = {"task": task, "model": name}
            for token in data["token"].values:
                value, spread = (100 * float(at[k].sel(token=token)) for k in ("score", "std"))
                row[str(token)] = f"{value:.1f}" + ("" if np.isnan(spread) else f" ± {spread:.1f}")
            row |= {"chance": f"{100 * float(at['chance'].isel(token=0)):.1f}", "n": int(at["n"].max())}
            rows.append(row)
    order = {task: i for i, task in enumerate(dict.fromkeys(r["task"] for r in rows))}
    rows.sort(key=lambda r: order[r["task"]])
    return pd.DataFrame(rows).fillna("–").set_index(["task", "model"])


def gaps(found: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """How much more outliers know than normal patches, and than CLS, in points over all tasks: {model: Dataset[task, token]} → a
    row a model with means and 95 % intervals over tasks, the paper's 14 data sets first, and on how many tasks outliers win.
    """
    table = published.table("tables")
    part = table[table["table"] == "table_1"].pivot(index="dataset", columns="token", values="value")
    scores: dict[str, pd.DataFrame] = {TABLE_1: part}
    scores |= {name: 100 * data["score"].to_pandas() for name, data in found.items()}
    rows = []
    for name, score in scores.items():
        row: dict[str, object] = {"model": name, "tasks": len(score)}
        for other in ("normal", "cls"):
            text = "–"
            if other in score:
                gap = (score["outlier"] - score[other]).dropna()
                text = cell(artifacts.interval(gap), 1)
                row[f"outlier wins against {other}"] = f"{int((gap > 0).sum())} of {len(gap)}"
            row[f"outlier − {other}"] = text
        text = "–"
        if {"register", "normal"} <= set(score):
            text = cell(artifacts.interval((score["register"] - score["normal"]).dropna()), 1)
        row["register − normal"] = text
        rows.append(row)
    order = ["model", "tasks", "outlier − normal", "outlier wins against normal", "outlier − cls", "register − normal"]
    return pd.DataFrame(rows)[order]


def registers_know(found: Mapping[str, xr.Dataset], task: str) -> pd.DataFrame:
    """The paper's Table 4 (Aircraft) and the same on one of our tasks: {model: Dataset[task, token]}, task → a row a model."""
    table = published.table("tables")
    part = table[table["table"] == "table_4"]
    rows = []
    for registers, cells in part.groupby("registers"):
        known = cells.set_index("token")["value"]
        row = {"model": f"DINOv2 ViT-L/14, {registers:.0f} registers (paper)", "task": "Aircraft"}
        rows.append(
            row | {t: f"{known[t]:.1f}" if t in known else "–" for t in ("cls", "normal", "outlier", "register")}
        )
    for name, data in found.items():
        if task in data["task"].values:
            at = data.sel(task=task)
            text = {
                t: cell((100 * float(at[k].sel(token=t)) for k in ("score", "low", "high")), 1)
                if t in data["token"].values
                else "–"
                for t in ("cls", "normal", "outlier", "register")
            }
            rows.append({"model": name, "task": task, **text})
    return pd.DataFrame(rows)


def score_rows(found: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """Scores to draw: {model: Dataset[task, token]} → rows model, task, token, score, low, high, chance in per cent."""
    parts = []
    for name, data in found.items():
        frame = (100 * data[["score", "low", "high", "chance"]]).to_dataframe().reset_index()
        parts.append(frame.assign(model=name)[["model", "task", "token", "score", "low", "high", "chance"]])
    return pd.concat(parts)
