"""What single tokens are and know (Fig 5, 10, 11, Tables 1, 5, 6): tables and figures."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.figure import Figure

from vitregs import arrays, report
from vitregs.data import published
from vitregs.measure import redundancy
from vitregs.report.format import cell
from vitregs.report.style import PALETTE, axes_grid, blank, note

GROUPS = ("background", "object", "border")
Mark = tuple[xr.DataArray, str]


def similarity(found: Mapping[str, xr.DataArray], marks: Mapping[str, Mark]) -> pd.DataFrame:
    """Neighbour similarity of marked and other patches: {model: [image, token]}, {model: (marks, what they are)} → a row for
    each patch (Fig 5a)."""
    parts = []
    for name, (marked, what) in marks.items():
        is_outlier = arrays.patches(marked).values
        for group, chosen in ((what, is_outlier), ("other patches", ~is_outlier)):
            parts.append(pd.DataFrame({"model": name, "group": group, "similarity": found[name].values[chosen]}))
    return pd.concat(parts)


def summary(similar: pd.DataFrame) -> pd.DataFrame:
    """Sum up neighbour similarity: a row for each patch → a row for each model and group."""
    groups = similar.groupby(["model", "group"], sort=False)["similarity"]
    return pd.DataFrame(
        {"patches": groups.size(), "median": groups.median(), "above 0.9": groups.agg(lambda s: (s > 0.9).mean())}
    ).reset_index()


def shares(marks: Mapping[str, Mark], backgrounds: Mapping[str, np.ndarray | None]) -> pd.DataFrame:
    """Share of marked patches on pure background, pure object and border: {model: (marks, what)}, {model: background share
    (images, patches) or None} → rows with 95 % intervals; empty without masks."""
    parts = []
    for name, (marked, what) in marks.items():
        background = backgrounds[name]
        if background is not None:
            group = np.select([np.isnan(background), background == 1, background == 0], [-1, 0, 1], 2)
            parts.append(redundancy.share_by_group(marked, group, GROUPS).assign(model=f"{name}: {what}"))
    return pd.concat(parts).set_index("model").reset_index() if parts else pd.DataFrame()


def plot_similarity(table: pd.DataFrame) -> Figure:
    """Densities of neighbour similarity for each group of patches (Fig 5a): rows model, group, similarity → Figure."""
    models = list(dict.fromkeys(table["model"]))
    figure, axes = axes_grid(1, len(models), 3.9 * len(models), 2.9, sharey=True)
    for axis, model in zip(axes[0], models, strict=True):
        part = table[table["model"] == model]
        for (group, rows), colour in zip(part.groupby("group", sort=False), cycle(PALETTE), strict=False):
            values = rows["similarity"].to_numpy()
            if len(values) > 1 and values.std() > 0:
                sns.kdeplot(x=values, bw_adjust=0.6, clip=(-1, 1), cut=0, color=colour, label=str(group), ax=axis)
        axis.set(title=model, xlabel="cosine similarity to the 4 neighbours", ylabel="density")
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    return figure


def plot_positions(maps: Mapping[str, xr.DataArray]) -> Figure:
    """Share of images in which each position is marked (Fig 10): {title: [y, x]} → Figure."""
    figure, axes = axes_grid(1, len(maps), 3.0 * len(maps), 2.7)
    for axis, (title, values) in zip(axes[0], maps.items(), strict=True):
        shown = axis.imshow(100 * values, cmap="viridis", vmin=0)
        figure.colorbar(shown, ax=axis, label="% of images", shrink=0.8)
        axis.set_title(title.replace(": ", ":\n"))
        blank(axis)
    return figure


def plot_gradients(vectors: Mapping[str, np.ndarray]) -> Figure:
    """Gradients of a resize in two dimensions (Fig 11): {title: 1-D gradient} → Figure of their outer products."""
    figure, axes = axes_grid(1, len(vectors), 2.9 * len(vectors), 2.7)
    top = max(np.outer(v, v).max() for v in vectors.values())
    for axis, (title, g) in zip(axes[0], vectors.items(), strict=True):
        shown = axis.imshow(np.outer(g, g), cmap="coolwarm", vmin=-top, vmax=top)
        axis.set_title(title)
        blank(axis)
    figure.colorbar(shown, ax=axes[0, :], label="gradient", shrink=0.8)
    return figure


def plot_shares(table: pd.DataFrame, *, label: str) -> Figure:
    """Shares with intervals for groups of patches: rows model, group, share, low, high → Figure."""
    if table.empty:
        return note("not all of these images have masks of objects")
    figure, axes = axes_grid(1, 1, 6.2, 2.9)
    axis = axes[0, 0]
    models, groups = list(dict.fromkeys(table["model"])), list(dict.fromkeys(table["group"]))
    bar_width = 0.8 / len(groups)
    for g, (group, colour) in enumerate(zip(groups, cycle(PALETTE), strict=False)):
        rows = table[table["group"] == group].set_index("model").reindex(models)
        error = np.abs(rows[["low", "high"]].to_numpy().T - rows["share"].to_numpy()) * 100
        at = np.arange(len(models)) + (g - (len(groups) - 1) / 2) * bar_width
        axis.bar(at, 100 * rows["share"], bar_width * 0.92, yerr=error, color=colour, label=str(group), capsize=2)
    axis.set(xticks=range(len(models)), xticklabels=[m.replace(": ", ":\n") for m in models], ylabel=label)
    axis.grid(axis="x", visible=False)
    axis.legend()
    return figure


LOCAL = {  # our quantity → unit shown, the paper's name for it
    "top1": ("position, % right", "position_top1"),
    "distance": ("position, patches off", "position_distance"),
    "l2": ("pixels, L2", "reconstruction"),
    "mean_patch": ("L2 of the mean patch", ""),
    "r2": ("pixels, R²", ""),
}
TABLE_1 = "DINOv2 ViT-g/14 (paper)"


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
                row[shown] = report.format.cell((times * float(one[k]) for k in ("score", "low", "high")), digits)
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
    """The paper's Tables 1 and 6: → a row a kind of token, a column a data set, in per cent with the standard
    deviation over draws."""
    table = published.table("tables")
    part = table[table["table"] == "table_6"]
    text = [
        f"{v:.1f}" + ("" if np.isnan(s) else f" ± {s:.1f}") for v, s in zip(part["value"], part["std"], strict=True)
    ]
    return (
        part.assign(text=text).pivot(index="token", columns="dataset", values="text").loc[["cls", "normal", "outlier"]]
    )


def tokens(found: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """One token an image: {model: Dataset[task, token]} → rows by task and model, a column a kind of token in per cent with
    the standard deviation over draws, chance and n (Tables 1, 6)."""
    rows: list[dict[str, Any]] = []
    for name, data in found.items():
        for task in data["task"].values:
            at = data.sel(task=task)
            row = {"task": task, "model": name}
            for token in data["token"].values:
                value, std = (100 * float(at[k].sel(token=token)) for k in ("score", "std"))
                row[str(token)] = f"{value:.1f}" + ("" if np.isnan(std) else f" ± {std:.1f}")
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
                text = report.format.cell(arrays.bootstrap_interval(gap), 1)
                row[f"outlier wins against {other}"] = f"{int((gap > 0).sum())} of {len(gap)}"
            row[f"outlier − {other}"] = text
        text = "–"
        if {"register", "normal"} <= set(score):
            text = report.format.cell(arrays.bootstrap_interval((score["register"] - score["normal"]).dropna()), 1)
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
                t: report.format.cell((100 * float(at[k].sel(token=t)) for k in ("score", "low", "high")), 1)
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


MARKS = {"cls": ("s", 7), "normal": ("o", 0), "outlier": ("D", 3), "register": ("^", 2)}  # shape, place in the palette


def plot_token_scores(table: pd.DataFrame) -> Figure:
    """Scores of one token an image, task by task (Table 1): rows model, task, token, score, low, high, chance in per cent →
    Figure, one panel a model; a grey tick is chance, a line the 95 % interval."""
    models, tasks = list(dict.fromkeys(table["model"])), list(dict.fromkeys(table["task"]))
    figure, axes = axes_grid(1, len(models), 1.6 + 2.3 * len(models), 0.9 + 0.34 * len(tasks), sharey=True, sharex=True)
    for axis, model in zip(axes[0], models, strict=True):
        part = table[table["model"] == model]
        kinds = [k for k in MARKS if k in set(part["token"])]
        for j, kind in enumerate(kinds):
            rows = part[part["token"] == kind].set_index("task").reindex(tasks)
            y = np.arange(len(tasks)) + (j - (len(kinds) - 1) / 2) * 0.18
            shape, colour = MARKS[kind]
            axis.hlines(y, rows["low"], rows["high"], color=PALETTE[colour], lw=1.2, alpha=0.6)
            axis.plot(rows["score"], y, shape, ms=4, color=PALETTE[colour], label="CLS" if kind == "cls" else kind)
        chance = part.groupby("task")["chance"].first().reindex(tasks)
        axis.plot(chance, np.arange(len(tasks)), "|", color="grey", ms=13, label="chance")
        axis.set(title=model, xlabel="score, %", xlim=(0, 100))
    axes[0, 0].set(yticks=np.arange(len(tasks)), yticklabels=tasks, ylim=(len(tasks) - 0.5, -0.5))
    named = max((axis.get_legend_handles_labels() for axis in axes[0]), key=lambda found: len(found[1]))
    figure.legend(*named, loc="outside lower center", ncols=5)
    return figure


def places(
    marks: Mapping[str, Mark], similar: Mapping[str, xr.DataArray], backgrounds: Mapping[str, xr.DataArray]
) -> pd.DataFrame:
    """Where outliers sit (Fig 5a, 10): {network: marks}, {network: similarity to neighbours [image, token]}, {network: share of
    background [image, token]} → rows by network and quantity, marked and other patches with 95 % intervals over images."""
    rows = []
    for name, (marked, _) in marks.items():
        patch = arrays.patches(marked).transpose("image", "token")
        which = patch.values
        y, x = patch["y"].values, patch["x"].values
        edge = np.broadcast_to((y == 0) | (x == 0) | (y == y.max()) | (x == x.max()), which.shape)
        known = backgrounds[name].transpose("image", "token").values
        near = similar[name].transpose("image", "token").values
        for quantity, values, there in (
            ("cosine to the neighbours", near, np.ones_like(which)),
            ("pure background, %", 100.0 * (known == 1), np.isfinite(known)),
            ("on the border, %", 100.0 * edge, np.ones_like(which)),
        ):
            cells = {}
            for label, group in (("outliers", which & there), ("other patches", ~which & there)):
                cells[label] = cell(arrays.bootstrap_ratio((values * group).sum(1), group.sum(1)))
            rows.append({"network": name, "quantity": quantity, **cells})
    return pd.DataFrame(rows).set_index(["network", "quantity"])


def real_tokens(found: Sequence[Mapping[str, xr.Dataset]]) -> pd.DataFrame:
    """What one token tells on real data sets (Tables 1, 4): one {network: what `classification.classify` gives} for each set →
    rows by data set and network, top-1 in per cent with its 95 % interval over images for each kind of token."""
    rows = []
    for part in found:
        for name, data in part.items():
            for task in data["task"].values:
                at = data.sel(task=task)
                ends = {
                    str(t): [100 * float(at[k].sel(token=t)) for k in ("score", "low", "high")]
                    for t in at["token"].values
                }
                rows.append({"data set": str(task), "network": name} | {t: cell(v) for t, v in ends.items()})
    return pd.DataFrame(rows).fillna("–").set_index(["data set", "network"])
