"""Register neurons (Jiang et al. 2025): their table, and what they do on images, in which blocks, and to norms."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from vitregs import arrays
from vitregs.measure.neurons import LEAST_CONTRAST, ranked, register_neurons, selectivity
from vitregs.report.style import MARKED, OTHERS, PALETTE, STYLE, axes_grid, plot_images


def table(found: xr.Dataset, count: int | None = None) -> pd.DataFrame:
    """The register neurons of a search, the largest share first.

    Args:
        found: What `measure.neurons.search` gives.
        count: The most rows; None for all.

    Returns:
        A row each: neuron ("block:number"), share of the shift in %, contrast, mean activation on marked and on other patches,
        AUC; without rows if there are none.
    """
    chosen = register_neurons(found)
    rows = []
    for block, number in [(b, j) for b, j in ranked(found) if j in chosen.get(b, [])][:count]:
        at = found.sel(block=block, neuron=number)
        rows.append(
            (name(block, number), 100 * at.share.item(), *(at[k].item() for k in ("contrast", "on", "off", "auc")))
        )
    columns = ["neuron", "share, %", "contrast", "on marked", "on others", "AUC"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.round({"share, %": 1, "contrast": 1, "on marked": 2, "on others": 2, "AUC": 3})


def summary(found: xr.Dataset) -> str:
    """What a search found, in a sentence or two: how many register neurons, and how many write half of the shift."""
    chosen, facts = register_neurons(found), found.attrs
    number = sum(map(len, chosen.values()))
    blocks = f" in block{'s' if len(chosen) > 1 else ''} {', '.join(map(str, chosen))}" if chosen else ""
    half, low, high = (float(found[k]) for k in ("half", "half_low", "half_high"))
    written = (
        f"{half:.0f} of {int(np.isfinite(found.share).sum())} neurons [{low:.0f}, {high:.0f}] write half of the shift"
        if np.isfinite(half)
        else f"all MLP neurons write {100 * float(found.share.sum()):.0f} % of the shift, and no number of them half"
    )
    return (
        f"{number} register neuron{'' if number == 1 else 's'}{blocks}; {written} of {facts['marked']} patches of "
        f"{facts['images']} images above {facts['cutoff']:.3g} at layer {facts['layer']}"
    )


def overview(found: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """Networks beside each other: {network: what `measure.neurons.search` gives} → how many neurons write half of the shift, of
    how many, what all MLPs write in %, register neurons and their blocks, and the median AUC of those that write half."""
    rows = []
    for network, data in found.items():
        chosen = register_neurons(data)
        half = float(data["half"])
        known = np.isfinite(half)
        auc = selectivity(data, ranked(data, int(half))) if known else np.nan
        rows.append(
            {
                "model": network,
                "write half": f"{half:.0f} [{float(data.half_low):.0f}, {float(data.half_high):.0f}]"
                if known
                else "none",
                "of": int(np.isfinite(data.share).sum()),
                "all write, %": round(100 * float(data.share.sum())),
                "their AUC": f"{auc:.2f}" if known else "none",
                "register neurons": sum(map(len, chosen.values())),
                "in blocks": ", ".join(map(str, chosen)) or "none",
            }
        )
    return pd.DataFrame(rows).set_index("model")


def answers(found: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """What the parts of the fingerprint answer: {network: what `measure.diagnose.fingerprints` gives} → a row a network."""
    rows = {
        network: dict(zip(data["part"].values, data["answer"].values, strict=True)) | {"verdict": data.attrs["word"]}
        for network, data in found.items()
    }
    return pd.DataFrame(rows).T.rename_axis("model")


def name(block: int, number: int) -> str:
    """A neuron in words: block, number → "block:number"."""
    return f"{block}:{number}"


def draw_activations(axis: Axes, found: xr.Dataset, neurons: Sequence[tuple[int, int]]) -> None:
    """Draw mean activations on marked and on other patches, with a standard deviation either way: axes, what `search` gives,
    (block, neuron) of each."""
    for which, key, colour, aside in (("marked", "on", MARKED, -0.12), ("other", "off", OTHERS, 0.12)):
        mean = [float(found[key].sel(block=b, neuron=j)) for b, j in neurons]
        spread = [float(found[f"{key}_spread"].sel(block=b, neuron=j)) for b, j in neurons]
        x = np.arange(len(neurons)) + aside
        axis.errorbar(x, mean, spread, fmt="o", ms=4, lw=1.5, capsize=2, color=colour, label=f"on {which} patches")
    axis.set(xticks=range(len(neurons)), xticklabels=[name(b, j) for b, j in neurons])
    axis.set(xlabel="block:neuron", ylabel="activation, ± 1 standard deviation")
    axis.legend()


def plot_activations(found: xr.Dataset, count: int = 8) -> Figure:
    """Activations of the neurons of the largest shares on marked and on other patches: what `search` gives → Figure."""
    figure, axes = axes_grid(1, 1, 6.4, 3.1)
    with mpl.rc_context(STYLE):
        draw_activations(axes[0, 0], found, ranked(found, count))
    return figure


def plot_maps(images: np.ndarray, norms: xr.DataArray, activations: xr.DataArray) -> Figure:
    """Images beside their norms and the activations of neurons.

    Args:
        images: (n, height, width, 3) in [0, 1].
        norms: Of patches at the layer where they are marked [image, token].
        activations: [image, token, neuron] as `capture(…, neurons=…)` gives them; each neuron has one range of
            colours for all images.

    Returns:
        A row for each image.
    """
    columns = {f"norm,\nlayer {int(norms['layer'])}": norms}
    columns |= {f"neuron\n{called}": activations.sel(neuron=called) for called in activations["neuron"].values}
    maps = {title: arrays.patch_maps(a).values[: len(images)] for title, a in columns.items()}
    limits = {title: (float(min(0, m.min())), float(m.max())) for title, m in maps.items()}
    return plot_images(images, maps, limits=limits, colours="viridis")


def plot_blocks(found: xr.Dataset, count: int = 40) -> Figure:
    """In which blocks the shift is written: what `search` gives → Figure; the largest shares of every block, in order, and
    what all neurons of the block write together. Register neurons are outlined."""
    figure, axes = axes_grid(1, 2, 9.4, 3.2, width_ratios=[3, 1], sharey=True)
    share = np.nan_to_num(found["share"].transpose("block", "neuron").values)
    contrast = np.nan_to_num(found["contrast"].transpose("block", "neuron").values)
    order = np.argsort(-share, axis=1, kind="stable")[:, :count]
    top, blocks = 100 * np.take_along_axis(share, order, 1), found["block"].values
    edges = np.arange(top.shape[1] + 1) + 0.5, np.arange(len(blocks) + 1) + blocks[0] - 0.5
    shown = axes[0, 0].pcolormesh(*edges, np.where(top > 0, top, np.nan), cmap="viridis", norm=LogNorm(0.01, 100))
    chosen = register_neurons(found)
    with mpl.rc_context(STYLE):
        for i, block in enumerate(blocks):
            at = np.flatnonzero(np.isin(order[i], chosen.get(int(block), [])))
            axes[0, 0].plot(at + 1, np.full(len(at), block), "o", ms=5, mfc="none", mec=MARKED, mew=1.2)
        axes[0, 0].set(xlabel="neurons of a block by their share", ylabel="block", yticks=blocks)
        axes[0, 0].set_title(f"circles: register neurons, contrast {LEAST_CONTRAST:g} or more")
        axes[0, 0].grid(False)
        bar = figure.colorbar(shown, ax=axes[0, 0])
        bar.set_label("share of the shift, %", size=8)
        bar.ax.yaxis.set_label_position("left")  # on the right it would name the next panel
        axes[0, 1].barh(blocks, 100 * share.sum(1), color=PALETTE[7], label="all neurons")
        own = np.where(abs(contrast) >= LEAST_CONTRAST, share, 0)
        registers = [own[i, chosen.get(int(b), [])].sum() * 100 for i, b in enumerate(blocks)]
        axes[0, 1].barh(blocks, registers, color=MARKED, height=0.4, label="register neurons")
        axes[0, 1].set(xlabel="share of the shift, %")
        axes[0, 1].legend()
    return figure


def plot_cumulative(found: Mapping[str, xr.Dataset]) -> Figure:
    """How much of the shift the first neurons write: {network: what `search` gives} → Figure; a line a network."""
    figure, axes = axes_grid(1, 1, 5.6, 3.1)
    axis = axes[0, 0]
    with mpl.rc_context(STYLE):
        for (network, data), colour in zip(found.items(), PALETTE, strict=False):
            values = data["share"].values
            total = np.cumsum(np.sort(values[np.isfinite(values)])[::-1])
            axis.plot(np.arange(1, len(total) + 1), 100 * total, color=colour, label=network)
            if np.isfinite(half := float(data["half"])):
                axis.plot(half, 100 * total[int(half) - 1], "o", color=colour)
        axis.axhline(50, color="grey", lw=0.8, ls=":")
        axis.set(xscale="log", xlabel="neurons, the largest share first", ylabel="share of the shift, %")
        axis.legend()
    return figure


def plot_suppression(left: Mapping[str, xr.Dataset], what: str = "share") -> Figure:
    """What stays when more and more neurons are suppressed, beside as many random ones.

    Args:
        left: {network: what `measure.neurons.suppression` gives}.
        what: "share" of patches above the cut-off, or "largest" norm over the median.

    Returns:
        A panel a network, with 95 % intervals over images.
    """
    figure, axes = axes_grid(1, len(left), max(5.6, 4.4 * len(left)), 3.1)
    scale = 100 if what == "share" else 1
    with mpl.rc_context(STYLE):
        for axis, (network, data) in zip(axes[0], left.items(), strict=True):
            for which, colour, label in (("ranked", MARKED, "strongest neurons"), ("random", OTHERS, "random neurons")):
                rows = data[what].sel(which=which).transpose("count", "image").values
                middle, low, high = np.transpose([arrays.bootstrap_interval(scale * row) for row in rows])
                x = np.arange(len(rows))
                axis.plot(x, middle, "o-", ms=3, color=colour, label=label)
                axis.fill_between(x, low, high, color=colour, alpha=0.2, lw=0)
            axis.set(xticks=range(data.sizes["count"]), xticklabels=data["count"].values, ylim=(0, None))
            axis.set(xlabel="suppressed neurons", title=network)
        axes[0, 0].set_ylabel("% of patches above the cut-off" if what == "share" else "largest / median norm")
        axes[0, 0].legend()
    return figure
