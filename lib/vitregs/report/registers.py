"""Registers: their norms and what they attend to (Fig 9, 15, 16): tables and figures."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from vitregs import arrays
from vitregs.claims import real
from vitregs.data import ground_truth, published
from vitregs.measure import object_attention
from vitregs.report.format import cell, variants
from vitregs.report.style import PALETTE, axes_grid, blank, note


def norms_of_means(means: Mapping[str, xr.DataArray]) -> dict[str, pd.DataFrame]:
    """Norm of the mean register tokens: {model: [layer, token, channel]} → {title: rows block, register, norm}; first the
    published DINOv2 models, as the massive-activations project measured them."""
    table = published.table("register_norms").rename(columns={"norm_of_mean": "norm"})
    table["register"] = "reg" + table["register"].astype(str)
    panels = {str(name): part for name, part in table.groupby("model", sort=False)}
    for name, mean in means.items():
        if mean.sizes["token"]:
            norm = ((mean**2).sum("channel") ** 0.5).to_dataframe("norm").reset_index()
            panels[f"{name} (ours)"] = norm.rename(columns={"label": "register", "layer": "block"})
    return panels


def plot_norms(panels: Mapping[str, pd.DataFrame]) -> Figure:
    """Norm of each register over blocks: {title: rows with block, register, norm} → Figure, one panel a model."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = axes_grid(rows, columns, 3.1 * columns, 2.4 * rows, sharey=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, table) in zip(axes.flat, panels.items(), strict=False):
        for (name, part), colour in zip(table.groupby("register", sort=False), cycle(PALETTE), strict=False):
            axis.plot(part["block"], part["norm"], color=colour, marker="o", ms=2.5, lw=1.2, label=str(name))
        axis.set(title=title, yscale="log", xlabel="layer", ylabel="norm")
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        for level in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            level("{x:g}")
    named = max((axis.get_legend_handles_labels() for axis in axes.flat), key=lambda found: len(found[1]))
    figure.legend(*named, loc="outside lower center", ncols=8)
    return figure


def blocks(found: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """Means with 95 % intervals at every block: {model: what `by_block` gives} → rows model, block, quantity, mean, low, high,
    chance; scores that do not exist are left out."""
    rows = []
    for model, data in found.items():
        for quantity, title, by_chance, factor in (
            ("iou", object_attention.QUANTITIES["iou"], "iou_chance", 1),
            ("same", "pairs with one top object, %", "same_by_chance", 100),
        ):
            for block in data["block"].values:
                at = data.sel(block=block)
                values = factor * at[quantity].values
                there = np.isfinite(values)
                if there.any():
                    mean, low, high = arrays.bootstrap_interval(values[there])
                    row = {
                        "model": model,
                        "block": int(block),
                        "quantity": title,
                        "mean": mean,
                        "low": low,
                        "high": high,
                    }
                    usual = factor * at[by_chance].values
                    rows.append(row | {"chance": float(np.nanmean(usual)) if np.isfinite(usual).any() else np.nan})
    return pd.DataFrame(rows, columns=["model", "block", "quantity", "mean", "low", "high", "chance"])


def scores(found: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """Means with 95 % intervals over images: {model: what `compare` gives} → rows model, method, maps, quantity, mean, low,
    high, chance, images; scores that do not exist are left out."""
    rows = []
    for model, data in found.items():
        for k, method in enumerate(data["way"].values):
            at = data.isel(way=k)
            for quantity, title in object_attention.QUANTITIES.items():
                values = at[quantity].values
                there = np.isfinite(values)
                if there.any():
                    mean, low, high = arrays.bootstrap_interval(values[there])
                    by_chance = at[f"{quantity}_chance"].values
                    row = {"model": model, "method": str(method), "maps": int(at["maps"]), "quantity": title}
                    row |= {"mean": mean, "low": low, "high": high, "images": int(there.sum())}
                    row["chance"] = float(np.nanmean(by_chance)) if np.isfinite(by_chance).any() else np.nan
                    rows.append(row)
    names = ["model", "method", "maps", "quantity", "mean", "low", "high", "chance", "images"]
    return pd.DataFrame(rows, columns=names)


def pivot(table: pd.DataFrame, quantity: str, methods: Sequence[str]) -> pd.DataFrame:
    """One score as a table to read: what `scores` gives, a title of QUANTITIES, the methods to show → a row a model, a column
    a method, cells "mean [low, high]"; empty where no score exists."""
    part = table[(table["quantity"] == quantity) & table["method"].isin(list(methods))]
    numbers = zip(part["mean"], part["low"], part["high"], strict=True)
    shown = part.assign(cell=list(map(cell, numbers)))
    shown = shown.pivot(index="model", columns="method", values="cell").fillna("")
    order = [m for m in methods if m in shown.columns]
    return shown.reindex(index=part["model"].unique(), columns=order).rename_axis(None, axis=1)


def variety(maps: Mapping[str, xr.DataArray], seen: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """Whether the registers of each model differ: {model: [image, query, y, x]}, {model: objects} → a row a model with two or
    more registers: smallest correlation of two mean-over-images, per cent of pairs with the same top-attended object and
    of objects that are some query's top-attended object, both with 95 % intervals and what random choice gives."""
    rows = []
    for name, a in maps.items():
        chosen = a.isel(query=np.flatnonzero(a["query_kind"] == "register"))
        if chosen.sizes["query"] > 1:
            row = {"model": name, "registers": chosen.sizes["query"]}
            row["least correlation"] = f"{float(object_attention.similarity(chosen).min()):.2f}"
            if seen[name]["region"].values.any():
                data = object_attention.variety(chosen, seen[name]).dropna("image")
                for key, title in (("same", "same top object, %"), ("covered", "objects covered, %")):
                    if data.sizes["image"]:
                        row[title] = cell(arrays.bootstrap_interval(100 * data[key].values), 0)
                        row[f"{key}, by chance"] = f"{100 * float(data[f'{key}_by_chance'].mean()):.0f}"
            rows.append(row)
    return pd.DataFrame(rows)


def preferences(maps: Mapping[str, xr.DataArray], seen: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """What decides how much attention an object gets: {model: [image, query, y, x]}, {model: objects} → rows by model and query
    ("registers" is their mean), columns place, colour, shape, depth; empty where nothing is known of the objects."""
    parts = []
    for name, a in maps.items():
        if (
            not set(ground_truth.PROPERTIES) - set(seen[name])
            and a.sizes["image"] > 1
            and seen[name]["region"].values.any()
        ):
            table = object_attention.preferences(a, seen[name])
            kind = a["query_kind"].values
            table["query"] = np.select([kind == "cls", kind == "register"], ["CLS", "registers"], "a patch")
            parts.append(table.groupby("query", sort=False).mean().assign(model=name))
    return pd.concat(parts).reset_index().set_index(["model", "query"]) if parts else pd.DataFrame()


def plot_mean_maps(maps: Mapping[str, xr.DataArray]) -> Figure:
    """Mean attention of each query (Fig 16), a row a model: {model: [query, y, x]} → Figure; each map has its own colours."""
    columns = max(a.sizes["query"] for a in maps.values())
    figure, axes = axes_grid(len(maps), columns, 1.15 * columns + 0.4, 1.32 * len(maps), layout="compressed")
    for axis in axes.flat:
        blank(axis)
    for line, (name, values) in zip(axes, maps.items(), strict=True):
        for axis, query in zip(line, values["query"].values, strict=False):
            axis.imshow(values.sel(query=query), cmap="viridis", interpolation="nearest")
            axis.set_title("CLS" if query == "cls" else f"patch {query}" if "," in query else str(query), fontsize=8)
        line[0].set_ylabel("-\n".join(name.rsplit("-", 1)), fontsize=7)
    return figure


def plot_breadth(maps: Mapping[str, xr.DataArray], images: np.ndarray, seen: Mapping[str, xr.DataArray]) -> Figure:
    """How widely queries look (Fig 9, 16): {model: [image, query, y, x]} for the means, photographs (n, H, W, 3), {model: maps of
    these photographs} → Figure: mean maps above, titled with the patches that they cover, then a row a photograph.

    What a map covers is the exponential of its entropy: all patches if it is even, one if it is a spot. Each map has its own
    colours.
    """
    columns = [(name, q) for name, a in maps.items() for q in range(a.sizes["query"])]
    size = 1.35 * (1 + len(columns)), 1.35 * (1 + len(images)) + 0.7
    figure, axes = axes_grid(1 + len(images), 1 + len(columns), *size, layout="compressed")
    for axis in axes.flat:
        blank(axis)
    short, count = variants(maps), next(iter(maps.values())).isel(image=0, query=0).size
    axes[0, 0].text(
        0.5,
        0.5,
        f"mean of all\nimages: covers\nof {count} patches",
        fontsize=8,
        ha="center",
        va="center",
        transform=axes[0, 0].transAxes,
    )
    for i, image in enumerate(images, start=1):
        axes[i, 0].imshow(image)
    for j, (name, q) in enumerate(columns, start=1):
        one = maps[name].isel(query=q)
        query = str(one["query"].values)
        title = "CLS" if query == "cls" else f"patch {query}" if "," in query else query
        covered = real.areas(maps[name])[q]
        axes[0, j].set_title(f"{short[name]}\n{title}: {covered:.0f}", fontsize=8)
        shown = [one.mean("image"), *seen[name].isel(query=q, image=slice(len(images)))]
        for axis, values in zip(axes[:, j], shown, strict=True):
            axis.imshow(values.transpose("y", "x").values, cmap="viridis", interpolation="nearest")
    told = [f"{short[name]} {cell(real.breadth(a))}" for name, a in maps.items()]
    figure.suptitle("patches covered, CLS and registers / a patch: " + ", ".join(told), fontsize=9)
    return figure


def plot_similarity(matrices: Mapping[str, xr.DataArray]) -> Figure:
    """How alike queries' maps are: {model: [query, other]} of correlations → Figure, one matrix a model, on one scale."""
    matrices = {name: m for name, m in matrices.items() if m.sizes["query"] > 1}
    if not matrices:
        return note("there is one query here: nothing to compare")
    figure, axes = axes_grid(1, len(matrices), 2.1 * len(matrices) + 0.6, 2.5)
    low = min(float(m.min()) for m in matrices.values())
    for axis, (name, values) in zip(axes[0], matrices.items(), strict=True):
        shown = axis.imshow(values, cmap="viridis", vmin=min(low, 0.9), vmax=1, interpolation="nearest")
        step = -(-values.sizes["query"] // 9)
        names = ["CLS" if q == "cls" else str(q) for q in values["query"].values]
        axis.set_xticks(range(0, len(names), step), names[::step], rotation=90, fontsize=7)
        axis.set_yticks(range(0, len(names), step), names[::step], fontsize=7)
        axis.set_title(name, fontsize=8)
        axis.grid(False)
    figure.colorbar(shown, ax=axes[0, :], label="correlation", shrink=0.75)
    return figure


def plot_scores(table: pd.DataFrame) -> Figure:
    """Scores with intervals and what chance gives (a black bar): what `report.registers.scores` gives → Figure, a panel a
    quantity, a row a model."""
    if table.empty:
        return note("nothing is known of the objects in these images: there is nothing to score")
    quantities, models = list(dict.fromkeys(table["quantity"])), list(dict.fromkeys(table["model"]))
    methods = list(dict.fromkeys(table["method"]))
    colours = dict(zip(methods, cycle(PALETTE), strict=False))
    figure, axes = axes_grid(len(quantities), 1, 8.4, 2.5 * len(quantities) + 0.5)
    bar_width = 0.84 / len(methods)
    for axis, quantity in zip(axes[:, 0], quantities, strict=True):
        part = table[table["quantity"] == quantity]
        for k, method in enumerate(methods):
            rows = part[part["method"] == method].set_index("model").reindex(models)
            at = np.arange(len(models)) + (k - (len(methods) - 1) / 2) * bar_width
            error = np.abs(rows[["low", "high"]].to_numpy(float).T - rows["mean"].to_numpy(float))
            axis.bar(
                at, rows["mean"], bar_width * 0.9, yerr=error, color=colours[method], label=method, error_kw={"lw": 0.8}
            )
            axis.hlines(rows["chance"], at - bar_width * 0.45, at + bar_width * 0.45, color="black", lw=1.6)
        axis.set(xticks=range(len(models)), ylabel=quantity)
        axis.set_xticklabels(models, fontsize=7)
        axis.grid(axis="x", visible=False)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8, frameon=False
    )
    return figure


def plot_blocks(table: pd.DataFrame) -> Figure:
    """Scores over blocks with 95 % bands, dotted what chance gives: what `report.registers.blocks` gives → Figure, a panel a
    quantity."""
    if table.empty:
        return note("nothing is known of the objects in these images: there is nothing to score")
    quantities, models = list(dict.fromkeys(table["quantity"])), list(dict.fromkeys(table["model"]))
    figure, axes = axes_grid(1, len(quantities), 4.3 * len(quantities), 3.3)
    for axis, quantity in zip(axes[0], quantities, strict=True):
        for model, colour in zip(models, cycle(PALETTE), strict=False):
            rows = table[(table["quantity"] == quantity) & (table["model"] == model)]
            if len(rows):
                axis.plot(rows["block"], rows["mean"], marker="o", ms=3, color=colour, label=model)
                axis.fill_between(rows["block"], rows["low"], rows["high"], color=colour, alpha=0.15, lw=0)
                axis.plot(rows["block"], rows["chance"], ls=":", lw=1.2, color=colour)
        axis.set(xlabel="block", ylabel=quantity, ylim=(0, None))
        axis.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    return figure
