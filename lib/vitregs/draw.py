"""Labelled arrays in, figures out; no arithmetic beyond colour limits and histograms."""

import textwrap
from collections.abc import Mapping
from itertools import cycle

import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from vitregs.artifacts import patches
from vitregs.canvas import PALETTE, axes_grid, blank, norm_edges, note, spread
from vitregs.cutoffs import Cutoff
from vitregs.diagnose import Diagnosis
from vitregs.results import KINDS, grid


def picture_grid(
    pictures: np.ndarray,
    columns: Mapping[str, np.ndarray],
    *,
    limits: Mapping[str, tuple[float, float]] | None = None,
    colours: str = "inferno",
    label: str = "",
) -> Figure:
    """Pictures beside maps of them (Fig 1, 2, 3, 19, 21): (n, H, W, 3), {title: (n, rows, columns)} → Figure.

    Each map has its own colour range, or the one named for its column, which then gets a colour bar with the label.
    """
    n = len(pictures)
    size = 1.5 * (1 + len(columns)), 1.5 * n + 0.4 + 0.4 * (limits is not None)
    figure, axes = axes_grid(n, 1 + len(columns), *size, layout="compressed")
    for i in range(n):
        axes[i, 0].imshow(pictures[i])
        for j, (title, maps) in enumerate(columns.items(), start=1):
            low, high = (None, None) if limits is None else limits[title]
            shown = axes[i, j].imshow(maps[i], cmap=colours, vmin=low, vmax=high, interpolation="nearest")
            if i == 0:
                axes[0, j].set_title(_narrow(title))
            if limits is not None and i == n - 1:
                figure.colorbar(shown, ax=axes[:, j], shrink=0.8, label=label, location="bottom", aspect=14)
    axes[0, 0].set_title("picture")
    for axis in axes.flat:
        blank(axis)
    return figure


def _narrow(title: str) -> str:
    """Break a long model name so that it fits above a small map."""
    return (
        title if len(title) < 16 else "-\n".join(title.rsplit("-", 1)) if "-" in title else title.replace("_", "_\n", 1)
    )


def norm_density(norms: Mapping[str, np.ndarray], cuts: Mapping[str, Cutoff]) -> Figure:
    """Densities of patch norms on a log scale, with the cut-off or its absence in words (Fig 3, 7): {name: norms} → Figure."""
    figure, axes = axes_grid(1, len(norms), 3.8 * len(norms), 3.0, sharey=True)
    for axis, (name, values), colour in zip(axes[0], norms.items(), cycle(PALETTE), strict=False):
        axis.hist(values.ravel(), bins=80, density=True, log=True, color=colour, alpha=0.8)
        cut = cuts[name]
        if cut.value is not None:
            axis.axvline(cut.value, color="black", ls="--", lw=1)
        axis.set(xlabel="L2 norm of patch tokens, last layer", xlim=(0, None))
        axis.set_title(f"{name}\n{_wrap(str(cut))}", fontsize=8)
    axes[0, 0].set_ylabel("density (log scale)")
    return figure


def _wrap(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 52))


def norm_growth(norms: Mapping[str, xr.DataArray]) -> Figure:
    """How patch norms spread over layers (Fig 4a): {name: [image, layer, token]} → Figure; colour is the share of tokens."""
    figure, axes = axes_grid(1, len(norms), max(3.0, 4.6 - 0.4 * len(norms)) * len(norms), 3.1, sharey=True)
    values = {k: patches(v).transpose("layer", "image", "token").values for k, v in norms.items()}
    edges = norm_edges(*values.values())
    for axis, (name, v) in zip(axes[0], values.items(), strict=True):
        share = np.stack([np.histogram(layer, edges)[0] / layer.size for layer in v])
        spread(figure, axis, np.asarray(norms[name]["layer"]), edges, share)
        axis.set(title=name, xlabel="layer")
    axes[0, 0].set_ylabel("L2 norm of patch tokens")
    return figure


def lines(table: pd.DataFrame, x: str, y: str, group: str, *, labels: tuple[str, str], log: bool = False) -> Figure:
    """Lines of y over x for each group, with a band where the table has low and high: → Figure."""
    figure, axes = axes_grid(1, 1, 5.6, 3.1)
    axis = axes[0, 0]
    for (name, rows), colour in zip(table.groupby(group, sort=False), cycle(PALETTE), strict=False):
        axis.plot(rows[x], rows[y], marker="o", ms=3, color=colour, label=str(name))
        if {"low", "high"} <= set(rows):
            axis.fill_between(rows[x], rows["low"], rows["high"], color=colour, alpha=0.2, lw=0)
    axis.set(xlabel=labels[0], ylabel=labels[1], yscale="log" if log else "linear")
    axis.legend()
    return figure


def register_norms(panels: Mapping[str, pd.DataFrame]) -> Figure:
    """Norm of each register over blocks: {title: rows with block, register, norm} → Figure, one panel a model."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = axes_grid(rows, columns, 3.1 * columns, 2.4 * rows)
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


def similarity(table: pd.DataFrame) -> Figure:
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


def occupancy(maps: Mapping[str, xr.DataArray]) -> Figure:
    """Share of pictures in which each position is marked (Fig 10): {title: [y, x]} → Figure."""
    figure, axes = axes_grid(1, len(maps), 3.0 * len(maps), 2.7)
    for axis, (title, values) in zip(axes[0], maps.items(), strict=True):
        shown = axis.imshow(100 * values, cmap="viridis", vmin=0)
        figure.colorbar(shown, ax=axis, label="% of pictures", shrink=0.8)
        axis.set_title(title.replace(": ", ":\n"))
        blank(axis)
    return figure


def gradients(vectors: Mapping[str, np.ndarray]) -> Figure:
    """Gradients of a resize in two dimensions (Fig 11): {title: 1-D gradient} → Figure of their outer products."""
    figure, axes = axes_grid(1, len(vectors), 2.9 * len(vectors), 2.7)
    top = max(np.outer(v, v).max() for v in vectors.values())
    for axis, (title, g) in zip(axes[0], vectors.items(), strict=True):
        shown = axis.imshow(np.outer(g, g), cmap="coolwarm", vmin=-top, vmax=top)
        axis.set_title(title)
        blank(axis)
    figure.colorbar(shown, ax=axes[0, :], label="gradient", shrink=0.8)
    return figure


def shares(table: pd.DataFrame, *, label: str) -> Figure:
    """Shares with intervals for groups of patches: rows model, group, share, low, high → Figure."""
    if table.empty:
        return note("not all of these pictures have masks of objects")
    figure, axes = axes_grid(1, 1, 6.2, 2.9)
    axis = axes[0, 0]
    models, groups = list(dict.fromkeys(table["model"])), list(dict.fromkeys(table["group"]))
    wide = 0.8 / len(groups)
    for g, (group, colour) in enumerate(zip(groups, cycle(PALETTE), strict=False)):
        rows = table[table["group"] == group].set_index("model").reindex(models)
        error = np.abs(rows[["low", "high"]].to_numpy().T - rows["share"].to_numpy()) * 100
        at = np.arange(len(models)) + (g - (len(groups) - 1) / 2) * wide
        axis.bar(at, 100 * rows["share"], wide * 0.92, yerr=error, color=colour, label=str(group), capsize=2)
    axis.set(xticks=range(len(models)), xticklabels=[m.replace(": ", ":\n") for m in models], ylabel=label)
    axis.grid(axis="x", visible=False)
    axis.legend()
    return figure


def token_strip(norms: Mapping[str, xr.DataArray]) -> Figure:
    """Norms by kind of token at one layer (Fig 7, 15): {name: [image, token]} → Figure; two models a row share their scale."""
    columns = min(2, len(norms))
    rows = -(-len(norms) // columns)
    figure, axes = axes_grid(rows, columns, 3.9 * columns, 2.6 * rows + 0.3, sharey="row")
    for axis in axes.flat[len(norms) :]:
        axis.set_visible(False)
    for axis, (name, values) in zip(axes.flat, norms.items(), strict=False):
        label = np.where(values["kind"] == "patch", "patch", values["label"])
        groups = list(dict.fromkeys(label))
        rng = np.random.default_rng(0)
        for i, group in enumerate(groups):
            v = values.values[:, label == group].ravel()
            v = v[:: max(1, len(v) // 2000)]
            kind = KINDS.index(str(np.asarray(values["kind"])[label == group][0]))
            axis.plot(
                i + rng.uniform(-0.3, 0.3, len(v)), v, ".", ms=1.5, alpha=0.4, color=PALETTE[kind], rasterized=True
            )
        axis.set(title=name, xticks=range(len(groups)), xticklabels=groups)
    for line in axes:
        line[0].set_ylabel("L2 norm")
    return figure


def diagnosis(found: Diagnosis) -> Figure:
    """Norms over layers, their density at the deciding layer, and maps of the first pictures: a Diagnosis → Figure."""
    assert found.norms is not None
    figure, axes = axes_grid(1, 2, 9.4, 3.2)
    norms, at = found.norms, found.norms.sel(layer=found.layer)
    values = patches(norms).transpose("layer", "image", "token").values
    edges = norm_edges(values)
    share = np.stack([np.histogram(v, edges)[0] / v.size for v in values])
    spread(figure, axes[0, 0], np.asarray(norms["layer"]), edges, share)
    axes[0, 0].set(title=found.model, xlabel="layer", ylabel="L2 norm of patch tokens")
    axis = axes[0, 1]
    axis.hist(patches(at).values.ravel(), bins=80, density=True, log=True, color=PALETTE[0])
    cut = found.layers.set_index("layer").loc[found.layer, "cutoff"]
    if np.isfinite(cut):
        axis.axvline(cut, color="black", ls="--", lw=1)
    axis.set(
        title=f"layer {found.layer}: {found.verdict}", xlabel="L2 norm of patch tokens", ylabel="density (log scale)"
    )
    if found.shown is not None:
        _add_maps(figure, found, grid(at.isel(image=slice(len(found.shown)))).values)
    return figure


def _add_maps(figure: Figure, found: Diagnosis, norms: np.ndarray) -> None:
    """Add a strip of pictures below, each with its norm map and its CLS attention."""
    assert found.shown is not None
    kinds: list[tuple[str, np.ndarray, str | None]] = [("picture", found.shown, None)]
    kinds.append((f"norm, layer {found.layer}", norms, "inferno"))
    if found.attention is not None:
        kinds.append(("CLS attention", found.attention, "viridis"))
    figure.set_figheight(3.2 + 1.35)
    outer = figure.add_gridspec(2, 1, height_ratios=[3.2, 1.35])
    above = outer[0].subgridspec(1, 2)
    for i in range(2):
        figure.axes[i].set_subplotspec(above[i])
    strip = outer[1].subgridspec(1, len(kinds) * len(found.shown))
    for i in range(len(found.shown)):
        for j, (title, maps, colours) in enumerate(kinds):
            axis = figure.add_subplot(strip[i * len(kinds) + j])
            axis.imshow(maps[i], cmap=colours, interpolation="nearest")
            axis.set_title(title, fontsize=8)
            blank(axis)


def heads(picture: np.ndarray, maps: np.ndarray, masked: np.ndarray) -> Figure:
    """A picture, a map for each head, and the same maps masked (Fig 18): (H, W, 3), (heads, rows, columns) twice → Figure."""
    columns = 1 + min(8, len(maps))
    panels = [(picture, "picture"), *((m, f"head {h + 1}") for h, m in enumerate(maps))]
    panels += [(None, "")] * (-len(panels) % columns)
    panels += [(None, ""), *((m, f"head {h + 1}, 60 %") for h, m in enumerate(masked))]
    rows = -(-len(panels) // columns)
    figure, axes = axes_grid(rows, columns, 1.55 * columns, 1.75 * rows, layout="compressed")
    for axis in axes.flat:
        blank(axis)
    for axis, (values, title) in zip(axes.flat, panels, strict=False):
        if values is not None:
            axis.imshow(values, cmap="inferno", interpolation="nearest")
            axis.set_title(title)
    return figure
