"""Norms over tokens, layers and models (Fig 3, 4, 7): tables and figures."""

import textwrap
from collections.abc import Mapping
from itertools import cycle

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

from vitregs import arrays
from vitregs.arrays import KINDS, patch_maps, patches
from vitregs.data import published
from vitregs.measure import fingerprint, outliers
from vitregs.measure.diagnose import Diagnosis
from vitregs.measure.mixture import Cutoff
from vitregs.report.format import cell
from vitregs.report.style import PALETTE, axes_grid, blank, norm_edges, norm_histogram


def verdicts(norms: Mapping[str, xr.DataArray]) -> pd.DataFrame:
    """The paper's numbers, then ours: {model: [image, layer, token]} → second mode, its layer, outliers and largest ratio
    there with 95 % intervals over images (Fig 3)."""
    share, times = (
        published.value("norms", figure="fig_3", quantity=q) for q in ("share_above_cutoff", "outlier_over_normal_norm")
    )
    rows: list[tuple[str, ...]] = [("DINOv2 ViT-g/14 (paper)", "yes", "40 of 40", f"{share:.2f}", f"about {times:.0f}")]
    for name, a in norms.items():
        word, layer, _ = _mode(a)
        at = a.sel(layer=layer)
        marked = arrays.patches(outliers.mark_outliers(at, outliers.find_cutoff(at))).mean("token")
        ratios = outliers.largest_ratio(a).sel(layer=layer)
        numbers = (cell(arrays.bootstrap_interval(v)) for v in (100 * marked, ratios))
        rows.append((name, word, f"{layer} of {int(a['layer'].max())}", *numbers))
    return pd.DataFrame(rows, columns=["model", "second mode", "layer", "outliers, %", "largest / median norm"])


def findings(norms: Mapping[str, xr.DataArray]) -> str:
    """What the norms of every model say, as lines of text: {model: [image, layer, token]} → text."""
    lines = []
    for name, a in norms.items():
        _, layer, why = _mode(a)
        lines.append(textwrap.fill(f"{name} (layer {layer}): {why}", 78, subsequent_indent="    "))
    return "\n".join(lines)


def _mode(norms: xr.DataArray) -> tuple[str, int, str]:
    """Whether norms have a second mode, the layer of the strongest (of the largest norms without), and why, in words."""
    layers = outliers.layer_evidence(norms)
    best, deep = fingerprint.strongest_mode(layers), layers[layers.layer > 0]
    layer = int((deep.loc[deep.largest.idxmax()] if best is None else best).layer)
    return "no" if best is None else "yes", layer, fingerprint.mode(norms, layers).sentence


def layers(norms: Mapping[str, xr.DataArray]) -> pd.DataFrame:
    """Evidence at every layer: {model: [image, layer, token]} → rows by model and layer (Fig 4a)."""
    parts = [outliers.layer_evidence(a).assign(model=name) for name, a in norms.items()]
    table = pd.concat(parts).set_index(["model", "layer"])
    table["share"] *= 100
    table["cutoff"] = ["none" if np.isnan(v) else f"{v:.1f}" for v in table["cutoff"]]
    return table.rename(columns={"cutoff": "cut-off", "share": "2nd mode, %", "ratio": "its ratio"})


def sizes(norms: Mapping[str, xr.DataArray], weights: Mapping[str, int]) -> dict[str, xr.DataArray]:
    """Label models by their size, smallest first: {model: [image, layer, token]}, {model: weights} → {label: last layer}."""
    order = sorted(norms, key=lambda name: weights[name])
    return {f"{name}\n{weights[name] / 1e6:.2f} M": norms[name].isel(layer=-1) for name in order}


def plot_density(norms: Mapping[str, np.ndarray], cuts: Mapping[str, Cutoff]) -> Figure:
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


def plot_layers(norms: Mapping[str, xr.DataArray]) -> Figure:
    """How patch norms spread over layers (Fig 4a): {name: [image, layer, token]} → Figure; colour is the share of tokens."""
    figure, axes = axes_grid(1, len(norms), max(3.0, 4.6 - 0.4 * len(norms)) * len(norms), 3.1, sharey=True)
    values = {k: patches(v).transpose("layer", "image", "token").values for k, v in norms.items()}
    edges = norm_edges(*values.values())
    for axis, (name, v) in zip(axes[0], values.items(), strict=True):
        share = np.stack([np.histogram(layer, edges)[0] / layer.size for layer in v])
        norm_histogram(figure, axis, np.asarray(norms[name]["layer"]), edges, share)
        axis.set(title=name, xlabel="layer")
    axes[0, 0].set_ylabel("L2 norm of patch tokens")
    return figure


def plot_token_strip(norms: Mapping[str, xr.DataArray]) -> Figure:
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


def plot_layers_and_density(name: str, norms: xr.DataArray, layer: int, cut: float, says: str) -> Figure:
    """Norms over layers, and their density at one of them (Fig 3, 4a): name, [image, layer, token], the layer, its
    cut-off or nan, what is said of the layer → Figure."""
    figure, axes = axes_grid(1, 2, 9.4, 3.2)
    values = patches(norms).transpose("layer", "image", "token").values
    edges = norm_edges(values)
    share = np.stack([np.histogram(v, edges)[0] / v.size for v in values])
    norm_histogram(figure, axes[0, 0], np.asarray(norms["layer"]), edges, share)
    axes[0, 0].set(xlabel="layer", ylabel="L2 norm of patch tokens")
    axes[0, 0].set_title(name, fontsize=10)
    axis = axes[0, 1]
    axis.hist(patches(norms.sel(layer=layer)).values.ravel(), bins=80, density=True, log=True, color=PALETTE[0])
    if np.isfinite(cut):
        axis.axvline(cut, color="black", ls="--", lw=1)
    axis.set(xlabel="L2 norm of patch tokens", ylabel="density (log scale)")
    axis.set_title(_wrap(f"layer {layer}: {says}"), fontsize=10 if len(says) < 45 else 8)
    return figure


def plot_diagnosis(found: Diagnosis) -> Figure:
    """Norms over layers, their density at the deciding layer, and maps of the first images: a Diagnosis → Figure."""
    assert found.norms is not None
    cut = found.layers.set_index("layer").loc[found.layer, "cutoff"]
    figure = plot_layers_and_density(found.model, found.norms, found.layer, cut, found.verdict)
    if found.shown is not None:
        at = found.norms.sel(layer=found.layer)
        _add_maps(figure, found, patch_maps(at.isel(image=slice(len(found.shown)))).values)
    return figure


def _add_maps(figure: Figure, found: Diagnosis, norms: np.ndarray) -> None:
    """Add a strip of images below, each with its norm map and its CLS attention."""
    assert found.shown is not None
    kinds: list[tuple[str, np.ndarray, str | None]] = [("image", found.shown, None)]
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


def plot_sizes(norms: Mapping[str, xr.DataArray]) -> Figure:
    """Patch norms of one layer for models of several sizes (Fig 4c): {label: [image, token]} → Figure, a column a model."""
    values = [patches(a).values.ravel() for a in norms.values()]
    edges = norm_edges(*values)
    figure, axes = axes_grid(1, 1, max(4.2, 1.3 * len(values) + 1.6), 3.3)
    share = np.stack([np.histogram(v, edges)[0] / len(v) for v in values])
    norm_histogram(figure, axes[0, 0], np.arange(len(values)), edges, share)
    axes[0, 0].set(ylabel="L2 norm of patch tokens, last layer", xticks=range(len(values)), xticklabels=list(norms))
    return figure
