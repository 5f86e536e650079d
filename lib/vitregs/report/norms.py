"""Norms over tokens, layers and models (Fig 3, 4, 7): tables and figures."""

import textwrap
from collections.abc import Mapping
from itertools import cycle

import matplotlib as mpl
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from vitregs import arrays
from vitregs.arrays import KINDS, patch_maps, patches
from vitregs.claims import real
from vitregs.data import published
from vitregs.measure import fingerprint, outliers
from vitregs.measure.diagnose import Diagnosis
from vitregs.measure.mixture import Cutoff
from vitregs.measure.neurons import ranked
from vitregs.report.format import cell
from vitregs.report.neurons import draw_activations
from vitregs.report.style import MARKED, OTHERS, PALETTE, STYLE, axes_grid, blank, norm_edges, norm_histogram, share_bar

STRONGEST = 6  # neurons in a diagnosis
_ONE_RANGE = 4.0  # largest norms of panels this many times apart, at most, are drawn on one range


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
    """Draw densities of patch norms on a log scale, with the cut-off or its absence in words (Fig 3, 7): {name: norms} → Figure;
    networks whose largest norms are of one order have one range of norms, so that a tail that is gone can be seen."""
    ends = [float(values.max()) for values in norms.values()]
    alike = max(ends) <= _ONE_RANGE * min(ends)
    figure, axes = axes_grid(1, len(norms), 3.8 * len(norms), 3.0, sharex=alike, sharey=True)
    for axis, (name, values), colour in zip(axes[0], norms.items(), cycle(PALETTE), strict=False):
        axis.hist(values.ravel(), bins=80, density=True, log=True, color=colour, alpha=0.8)
        cut = cuts[name]
        if cut.value is not None:
            axis.axvline(cut.value, color="black", ls="--", lw=1)
        end = max(ends) if alike else float(values.max())
        axis.set(xlabel="L2 norm of patch tokens, last layer", xlim=(0, 1.05 * end))
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
        mesh = norm_histogram(axis, np.asarray(norms[name]["layer"]), edges, share)
        axis.set(title=name, xlabel="layer")
    share_bar(figure, mesh, list(axes[0]))
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
        mesh = norm_histogram(axis, np.asarray(norms[name]["layer"]), edges, share)
        for token in registers[name].transpose("token", "layer"):
            axis.plot(token.values, "o-", ms=3, lw=1.2, color=PALETTE[3], label=str(token["label"].values))
        if registers[name].size:
            axis.legend()
        axis.set(xlabel="layer", ylabel="L2 norm of patch tokens")
        axis.set_title(name, fontsize=8)
    share_bar(figure, mesh, list(axes[0, 1:]))
    return figure


def plot_layers_and_density(name: str, norms: xr.DataArray, layer: int, cut: float, says: str) -> Figure:
    """Norms over layers, and their density at one of them (Fig 3, 4a): name, [image, layer, token], the layer, its
    cut-off or nan, what is said of the layer → Figure."""
    figure, axes = axes_grid(1, 2, 9.4, 3.2)
    values = patches(norms).transpose("layer", "image", "token").values
    edges = norm_edges(values)
    share = np.stack([np.histogram(v, edges)[0] / v.size for v in values])
    mesh = norm_histogram(axes[0, 0], np.asarray(norms["layer"]), edges, share)
    share_bar(figure, mesh, [axes[0, 0]])
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
    """Draw a diagnosis in four panels: a Diagnosis → Figure.

    Images with marked patches outlined; norms over layers, those of marked patches apart; register neurons on marked and on
    other patches, or the density of norms where none were looked for; attention that marked and other patches receive.
    """
    figure, axes = axes_grid(2, 2, 9.4, 6.6)
    with mpl.rc_context(STYLE):
        _draw_images(figure, axes[0, 0], found)
        _draw_growth(figure, axes[0, 1], found)
        if found.searched is None:
            _draw_density(axes[1, 0], found)
        else:
            _draw_neurons(axes[1, 0], found)
        _draw_attention(axes[1, 1], found)
    figure.suptitle(f"{found.model}: {found.fingerprint.word} (layer {found.layer})", fontsize=11)
    return figure


def _draw_images(figure: Figure, panel: Axes, found: Diagnosis) -> None:
    """Images with the marked patches outlined, side by side in the place of a panel."""
    marked, shown = found.marked, found.shown
    assert shown is not None
    panel.set_axis_off()
    number = 0 if marked is None else int(marked.values[found.shown_at].sum())
    panel.set_title(f"{number} marked patches in these images" if number else "no patch of these images is marked")
    place = panel.get_subplotspec()
    assert place is not None
    strip = place.subgridspec(1, len(shown))
    for i in range(len(shown)):
        axis = figure.add_subplot(strip[i])
        axis.imshow(shown[i])
        blank(axis)
        if marked is None:
            continue
        rows = patch_maps(marked.isel(image=found.shown_at[i]).astype(float)).values
        high, wide = shown.shape[1] / rows.shape[0], shown.shape[2] / rows.shape[1]
        for colour, width in (("white", 3.0), (MARKED, 1.6)):  # seen on any background
            for y, x in np.argwhere(rows > 0):
                corner = (x * wide - 0.5, y * high - 0.5)
                axis.add_patch(Rectangle(corner, wide, high, fill=False, ec=colour, lw=width))


def _draw_growth(figure: Figure, axis: Axes, found: Diagnosis) -> None:
    """Norms over layers, with the median and the central 90 % of the marked patches."""
    assert found.norms is not None
    values = patches(found.norms).transpose("layer", "image", "token").values
    edges = norm_edges(values)
    share = np.stack([np.histogram(v, edges)[0] / v.size for v in values])
    mesh = norm_histogram(axis, np.asarray(found.norms["layer"]), edges, share, "Blues")
    share_bar(figure, mesh, [axis])
    axis.set(xlabel="layer", ylabel="L2 norm of patch tokens", title="norms over layers")
    if found.marked is not None and found.marked.any():
        low, middle, high = np.quantile(values[:, found.marked.values], [0.05, 0.5, 0.95], axis=1)
        x = np.arange(len(values))
        axis.fill_between(x, low, high, color=MARKED, alpha=0.3, lw=0)
        axis.plot(x, middle, "o-", ms=3, color=MARKED, label="marked patches: median, 90 %")
        axis.legend(loc="upper left")


def _draw_density(axis: Axes, found: Diagnosis) -> None:
    """Density of norms at the deciding layer, with the cut-off."""
    assert found.norms is not None
    axis.hist(patches(found.norms.sel(layer=found.layer)).values.ravel(), bins=80, density=True, log=True, color=OTHERS)
    cut = found.layers.set_index("layer").loc[found.layer, "cutoff"]
    if np.isfinite(cut):
        axis.axvline(cut, color=MARKED, ls="--", lw=1.5, label=f"cut-off {cut:.3g}")
        axis.legend()
    axis.set(xlabel="L2 norm of patch tokens", ylabel="density (log scale)")
    axis.set_title(f"norms at layer {found.layer}" + ("" if np.isfinite(cut) else ": no cut-off"))


def _draw_neurons(axis: Axes, found: Diagnosis) -> None:
    """The strongest register neurons, or the strongest of all where there are none, on marked and on other patches."""
    assert found.searched is not None
    chosen = [(b, j) for b, j in ranked(found.searched) if j in found.fingerprint.neurons.get(b, [])][:STRONGEST]
    title = f"activation of {len(chosen)} of {sum(map(len, found.fingerprint.neurons.values()))} register neurons"
    if not chosen:
        chosen, title = ranked(found.searched, STRONGEST), "neurons of the largest shares: none is a register neuron"
    draw_activations(axis, found.searched, chosen)
    axis.set_title(title)


def _draw_attention(axis: Axes, found: Diagnosis) -> None:
    """Attention that marked and other patches receive, or that the most attended patch does where none is marked."""
    axis.axhline(1, color="grey", lw=0.8, ls=":")
    if found.attention is None:
        rows = found.layers[found.layers.layer > 0]
        axis.plot(rows.layer, rows.sink, "o-", ms=3, color=OTHERS)
        axis.set_title("attention on the most attended patch")
    else:
        for query, style in zip(found.attention["query"].values, ("o-", "s--"), strict=False):
            for which, colour in (("marked", MARKED), ("others", OTHERS)):
                line = found.attention.sel(query=query, which=which)
                of = "all queries" if query == "all" else "CLS"
                axis.plot(line["block"], line, style, ms=3, color=colour, label=f"{which}, of {of}")
        axis.set_title("attention received")
        axis.legend(ncols=2, loc="upper left")
    axis.set(xlabel="block", ylabel="fair shares", ylim=(0, 1.3 * axis.get_ylim()[1]))  # room for the legend
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def plot_sizes(norms: Mapping[str, xr.DataArray]) -> Figure:
    """Patch norms of one layer for models of several sizes (Fig 4c): {label: [image, token]} → Figure, a column a model."""
    values = [patches(a).values.ravel() for a in norms.values()]
    edges = norm_edges(*values)
    figure, axes = axes_grid(1, 1, max(4.2, 1.3 * len(values) + 1.6), 3.3)
    share = np.stack([np.histogram(v, edges)[0] / len(v) for v in values])
    mesh = norm_histogram(axes[0, 0], np.arange(len(values)), edges, share)
    share_bar(figure, mesh, [axes[0, 0]])
    axes[0, 0].set(ylabel="L2 norm of patch tokens, last layer", xticks=range(len(values)), xticklabels=list(norms))
    return figure


MEANT = {  # the value of a part, and its control; each short enough for pandas not to cut it
    "mode": ("norm of the mode over the median", "without a mode"),
    "place": ("cosine of marked patches to their neighbours", "of other patches"),
    "place, by content": ("how well content tells marks, average precision", "by chance"),
    "attention": ("fair shares that marked patches receive", "that others receive"),
    "neurons": ("neurons that write half of the shift", "all neurons"),
    "cause": ("share of marks that goes with register neurons", "with random neurons"),
}


def fingerprints(found: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """The five parts of stored fingerprints: {network: what `diagnose.fingerprints` gives} → rows by network and part with the
    answer, the number that decides with its 95 % interval, its control, and what both are; beside place, how well what a patch
    shows tells its mark."""
    rows = []
    for name, data in found.items():
        for part in data["part"].values:
            at = data.sel(part=part)
            value, low, high, control = (float(at[k]) for k in ("value", "low", "high", "control"))
            rows.append(
                {
                    "network": f"{name}: {data.attrs['word']}",
                    "part": str(part),
                    "answer": str(at["answer"].values),
                    "value": cell((value, low, high)) if np.isfinite(value) else "–",
                    "control": "–" if np.isnan(control) else f"{control:.0f}" if control >= 100 else f"{control:.3g}",
                    "the value": MEANT[str(part)][0],
                    "the control": MEANT[str(part)][1],
                }
            )
            if part == "place" and np.isfinite(tells := data.attrs.get("place: content", np.nan)):
                ends = (tells, data.attrs["place: content_low"], data.attrs["place: content_high"])
                rows.append(
                    rows[-1]
                    | {
                        "part": "place, by content",
                        "value": cell(ends),
                        "control": f"{data.attrs['place: chance']:.3g}",
                        "the value": MEANT["place, by content"][0],
                        "the control": MEANT["place, by content"][1],
                    }
                )
    return pd.DataFrame(rows).set_index(["network", "part"])


def plot_marked(norms: Mapping[str, xr.DataArray]) -> Figure:
    """Norms of the patches that are outliers in the last layer, and of the others, at every layer (Fig 4a): {network: [image,
    layer, token]} → Figure with a panel a network; lines are medians, bands the middle nine tenths."""
    figure, axes = axes_grid(1, len(norms), 4.6 * len(norms), 3.2)
    for axis, (name, a) in zip(axes[0], norms.items(), strict=True):
        last = a.isel(layer=-1)
        marked = patches(outliers.mark_outliers(last, outliers.find_cutoff(last))).transpose("image", "token").values
        values = patches(a).transpose("layer", "image", "token").values
        layers_ = a["layer"].values
        for which, label, colour in (
            (~marked, "other patches", PALETTE[0]),
            (marked, "outliers of the last layer", PALETTE[1]),
        ):
            if not which.any():
                continue
            low, middle, high = np.quantile(values[:, which], [0.05, 0.5, 0.95], axis=1)
            axis.plot(layers_, middle, color=colour, label=label)
            axis.fill_between(layers_, low, high, color=colour, alpha=0.25, linewidth=0)
        axis.set(title=name, xlabel="layer", ylabel="L2 norm of patch tokens", ylim=(0, None))
        axis.legend(frameon=False)
    return figure
