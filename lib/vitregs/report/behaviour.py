"""What moves outliers, changes of the input and of the network (not in the paper): tables and figures."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure

from vitregs import arrays
from vitregs.measure import behaviour
from vitregs.report.format import cell
from vitregs.report.style import PALETTE, axes_grid

_LINEAR = 2  # per cent up to which the axis of shares is linear, so that it has a 0


def _rows(data: xr.Dataset) -> list[tuple[str, str, str]]:
    """What the table has a row for: → intervention, part, label; of images with bars the two parts, of others the whole."""
    rows = []
    for name in data["intervention"].values:
        parts = ("photograph", "bars") if behaviour.INTERVENTIONS[name].parted else ("all",)
        rows += [(name, part, name if part == "all" else f"{name}: {part}") for part in parts]
    return rows


def table(found: xr.Dataset) -> pd.DataFrame:
    """Every change with the share of outliers that it leaves: `measure.behaviour.interventions` of one network → a row a
    change, of letterboxes one for the photograph and one for the bars.

    Shares are per cent of the patches that are left, factors are over the untouched network on the same images, both with 95 %
    intervals over images. Norms are over the median patch of the image; that of a letterbox holds bars as well, so a column
    tells the same over the median of the photograph's patches. Overlap is the intersection over union of the patches
    that are outliers in the changed and in the untouched network, where a patch shows the same in both.
    """
    shares, factors, overlaps = behaviour.shares(found), behaviour.factors(found), behaviour.overlaps(found)
    above = f"above {found.attrs['ratio']:g} x the median"
    rows = {}
    for name, part, label in _rows(found):
        item, at = behaviour.INTERVENTIONS[name], {"intervention": name, "part": part}
        base = name == "untouched"
        rows[label] = {
            "what is done": item.done,
            f"patches {above}, %": cell(100 * shares["share"].sel(at).values, 2),
            "factor": "–" if base else cell(factors.sel(at).values, 2),
            f"{above} of the photograph, %": cell(100 * shares["own"].sel(at).values, 2),
            "overlap": "–" if base else cell(overlaps["iou"].sel(intervention=name).values, 2),
            "found again, %": "–" if base else cell(100 * overlaps["again"].sel(intervention=name).values, 0),
            "what it means": item.means,
        }
    frame = pd.DataFrame.from_dict(rows, orient="index").rename_axis("change")
    return frame.loc[:, (frame != "–").any()]


def sizes(found: xr.Dataset) -> pd.DataFrame:
    """Outliers by the size of the input: `measure.behaviour.resolutions` → a row a side, with 95 % intervals over images."""
    shares = behaviour.shares(found)["share"]
    rows = {}
    for side in found["side"].values:
        one = found.sel(side=side)
        rows[int(side)] = {
            "patches": f"{float(one['patches'].mean()):.0f}",
            f"patches above {found.attrs['ratio']:g} x the median, %": cell(100 * shares.sel(side=side).values, 2),
            "outliers an image": f"{float(one['outliers'].mean()):.1f}",
            "largest / median, typical image": f"{float(one['largest'].median()):.2f}",
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("side, px")


def places(found: xr.Dataset, cosines: xr.Dataset) -> pd.DataFrame:
    """Where outliers of the untouched network sit and what they are: `measure.behaviour.interventions` and `cosines` → a row a
    question, with 95 % intervals over images (of the correlation: the ends that hold 95 % of random halves)."""
    ring, chance = behaviour.border(found)
    pairs = {}
    for name in ("outlier", "normal"):
        values = cosines[name].dropna("image").values
        pairs[name] = cell(arrays.bootstrap_interval(values), 2) if len(values) else "–"
    rows = {
        "outliers on the outermost ring of patches, %": (cell((100 * v for v in ring), 1), f"{100 * chance:.1f}"),
        "how often a place has an outlier, correlation of two halves of the images": (
            cell(behaviour.position_correlation(found), 2),
            "0",
        ),
        "final states of outliers of two images, cosine": (pairs["outlier"], f"{pairs['normal']} of median patches"),
    }
    return pd.DataFrame.from_dict(rows, orient="index", columns=["found", "to compare with"])


def plot_shares(found: Mapping[str, xr.Dataset], resolved: Mapping[str, xr.Dataset]) -> Figure:
    """Shares of outliers under every change, and by the size of the input.

    Args:
        found: {network: `measure.behaviour.interventions`}.
        resolved: {network: `measure.behaviour.resolutions`}.

    Returns:
        Figure; bars and bands are 95 % intervals over images, dashed lines the networks as they are.
    """
    labels = list(dict.fromkeys(label for data in found.values() for _, _, label in _rows(data)))
    figure, axes = axes_grid(1, 2, 9.2, 0.25 * len(labels) + 0.9, width_ratios=(1.4, 1))
    left, right = axes[0]
    for i, (network, data) in enumerate(found.items()):
        shares, rows = behaviour.shares(data)["share"], _rows(data)
        ends = np.array([100 * shares.sel(intervention=name, part=part).values for name, part, _ in rows])
        at = np.array([labels.index(label) for *_, label in rows]) + 0.3 * (i - (len(found) - 1) / 2)
        spread = np.abs(ends[:, 1:] - ends[:, :1]).T
        left.errorbar(ends[:, 0], at, xerr=spread, fmt="o", ms=4, color=PALETTE[i], label=network)
        left.axvline(ends[0, 0], color=PALETTE[i], ls="--", lw=0.8)
    left.set(yticks=range(len(labels)), yticklabels=labels, xlim=(-0.05, 100))
    left.set_xscale("symlog", linthresh=_LINEAR)
    left.set(xticks=[0, 1, 3, 10, 30, 100], xticklabels=["0", "1", "3", "10", "30", "100"])
    left.invert_yaxis()
    ratio = next(iter(found.values())).attrs["ratio"]
    left.set_xlabel(f"patches above {ratio:g} x the median, % (linear to {_LINEAR}, logarithmic above)")
    for i, (network, data) in enumerate(resolved.items()):
        ends = 100 * behaviour.shares(data)["share"].values
        side = data["side"].values
        right.plot(side, ends[:, 0], "o-", ms=4, color=PALETTE[i], label=network)
        right.fill_between(side, ends[:, 1], ends[:, 2], color=PALETTE[i], alpha=0.2, lw=0)
        right.axvline(data.attrs["native"], color=PALETTE[i], ls="--", lw=0.8)
    right.set(xlabel="side of the image, px", ylabel=f"patches above {ratio:g} x the median, %", ylim=(0, None))
    right.legend()
    return figure
