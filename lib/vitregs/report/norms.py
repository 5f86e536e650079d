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
from vitregs.claims import real
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


def without_and_with(norms: Mapping[str, xr.DataArray]) -> pd.DataFrame:
    """What registers do to the norms of the last layer (Fig 7, 15): {model: [image, layer, token]}, the one without registers
    first → a row a model with 95 % intervals over images.

    Patches are counted above the cut-off of the first model. A register's variation is its coefficient of variation over
    images as a share of that of patch norms.
    """
    plain = next(iter(norms.values())).isel(layer=-1)
    cut = outliers.find_cutoff(plain)
    before = patches(outliers.mark_outliers(plain, cut)).mean("token").values
    highest = np.log(outliers.largest_ratio(plain).values)
    rows = []
    for name, a in norms.items():
        at = a.isel(layer=-1)
        marked = patches(outliers.mark_outliers(at, cut)).mean("token").values
        ratios = outliers.largest_ratio(at)
        row = {"model": name, "above the cut-off, %": cell(arrays.bootstrap_interval(100 * marked))}
        if before.any():
            row["of the first's, %"] = cell((100 * v for v in arrays.bootstrap_ratio(marked, before)), 1)
        row["largest / median"] = cell(arrays.bootstrap_interval(ratios))
        row["over the first's"] = cell(np.exp(arrays.bootstrap_interval(np.log(ratios.values) - highest)))
        register, patch = (at.transpose("image", "token").values[:, at["kind"] == k] for k in ("register", "patch"))
        if register.size:
            row["register / median"] = cell(arrays.bootstrap_interval(register.max(1) / np.median(patch, 1)))
            row["its variation"] = cell(real.variation(register, patch))
        rows.append(row)
    return pd.DataFrame(rows).fillna("–")


def plot_without_and_with(norms: Mapping[str, xr.DataArray]) -> Figure:
    """Norms without and with registers (Fig 4a, 7, 15): {model: [image, layer, token]}, the one without first → Figure.

    On the left densities of patch norms in the last layer, the cut-off of the first model dashed and the mean norm of
    registers dotted; then how patch norms spread over the layers of each, with the mean norm of each register as a line.
    """
    figure, axes = axes_grid(1, 1 + len(norms), 3.6 * (1 + len(norms)), 3.2)
    values = {k: patches(a).transpose("layer", "image", "token").values for k, a in norms.items()}
    registers = {k: a.isel(token=np.flatnonzero(a["kind"] == "register")).mean("image") for k, a in norms.items()}
    registers = {k: a.where(a > 0) for k, a in registers.items()}  # an appended zero token enters with no norm
    first = axes[0, 0]
    bins = np.linspace(0, 1.05 * max(v[-1].max() for v in values.values()), 80)
    for (name, v), colour in zip(values.items(), cycle(PALETTE), strict=False):
        first.hist(v[-1].ravel(), bins, density=True, log=True, histtype="step", lw=1.5, color=colour, label=name)
        for norm in registers[name].isel(layer=-1).values:
            first.axvline(norm, color=colour, ls=":", lw=1.5)
    cut = outliers.find_cutoff(next(iter(norms.values())).isel(layer=-1)).value
    if cut is not None:
        first.axvline(cut, color="black", ls="--", lw=1)
    first.set(xlabel="L2 norm of patch tokens, last layer", ylabel="density (log scale)")
    first.legend(loc="upper right", fontsize=7)
    first.set_ylim(top=10 * first.get_ylim()[1])
    edges = norm_edges(*values.values(), *(r.values[np.isfinite(r.values)] for r in registers.values() if r.size))
    for axis, (name, v) in zip(axes[0, 1:], values.items(), strict=True):
        share = np.stack([np.histogram(layer, edges)[0] / layer.size for layer in v])
        norm_histogram(figure, axis, np.asarray(norms[name]["layer"]), edges, share)
        for token in registers[name].transpose("token", "layer"):
            axis.plot(token.values, "o-", ms=3, lw=1.2, color=PALETTE[3], label=str(token["label"].values))
        if registers[name].size:
            axis.legend()
        axis.set(xlabel="layer", ylabel="L2 norm of patch tokens")
        axis.set_title(name, fontsize=8)
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
