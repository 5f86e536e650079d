"""Object discovery (Table 3, Fig 13, 14): tables and figures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from vitregs import arrays
from vitregs.data import published
from vitregs.measure import lost
from vitregs.models.pairs import register_pairs
from vitregs.report.format import cell
from vitregs.report.style import PALETTE, axes_grid, blank, note

SETS = ("VOC2007", "VOC2012", "COCO20k")
RULES = dict(zip(lost.RULES, ("bias 0", "centred", "best bias"), strict=True))


def _cell(values: np.ndarray, sign: str = "") -> str:
    """Mean of per-image values in per cent with its 95 % interval, as text; images without true boxes do not count."""
    there = 100 * np.asarray(values)[np.isfinite(values)]
    if not len(there):
        return "no boxes"
    return cell(arrays.bootstrap_interval(there), 1, sign)


def _used(data: xr.Dataset) -> xr.Dataset:
    """The projection that counts in the table."""
    return data.sel(projection=str(data["used"].values))


def published_corloc() -> pd.DataFrame:
    """The paper's Table 3: → CorLoc in per cent by model and registers, a column a data set."""
    table = published.table("tables")
    part = table[table["table"] == "table_3"]
    return part.pivot(index=["model", "registers"], columns="dataset", values="value")[list(SETS)]


def scores(found: Mapping[str, xr.Dataset], chance: xr.DataArray) -> pd.DataFrame:
    """CorLoc in per cent: {model: study}, hits of baselines [rule, image] → a row a model with 95 % intervals over images, the
    paper's first (Table 3; VOC 2007 / VOC 2012 / COCO 20k), then boxes that look at nothing."""
    rows = []
    for (model, registers), line in published_corloc().iterrows():
        row = {"model": f"{model}, {registers:.0f} registers (paper)", "feature": "key" if "DINO" in model else "value"}
        rows.append(row | {"best bias": " / ".join(f"{v:.1f}" for v in line)})
    for rule in chance["rule"].values:
        there = int(chance.sel(rule=rule).notnull().sum())
        rows.append({"model": f"{rule} (no model)", "bias 0": _cell(chance.sel(rule=rule).values), "n": str(there)})
    for name, data in found.items():
        hit = _used(data)["hit"]
        text = {RULES[rule]: _cell(hit.sel(rule=rule).values) for rule in RULES}
        n, bias = hit.notnull().sum("image"), float(_used(data)["chosen"])
        text |= {"at": "–" if np.isnan(bias) else f"{bias:.2f}"}
        text |= {"n": f"{int(n.sel(rule='zero'))}, best {int(n.sel(rule='best'))}"}
        rows.append({"model": name, "feature": str(data["used"].values), **text})
    return pd.DataFrame(rows, columns=["model", "feature", *RULES.values(), "at", "n"]).fillna("–")


def differences(found: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """CorLoc with registers minus without, in points: {model: study} → a row a pair with 95 % intervals, a bootstrap over the
    same images, the paper's first (Table 3). Both of a pair choose from the same biases on the same half."""
    rows = []
    table = published_corloc()
    for model in table.index.unique("model"):
        gap = table.loc[(model, 4)] - table.loc[(model, 0)]
        rows.append({"pair": f"{model} (paper)", "best bias": " / ".join(f"{v:+.1f}" for v in gap)})
    for without, with_ in register_pairs(found):
        gap = _used(found[with_])["hit"].drop_vars("model") - _used(found[without])["hit"].drop_vars("model")
        text = {RULES[rule]: _cell(gap.sel(rule=rule).values, "+") for rule in RULES}
        rows.append({"pair": f"{with_} − {without}", "feature": str(found[with_]["used"].values), **text})
    return pd.DataFrame(rows, columns=["pair", "feature", *RULES.values()]).fillna("–")


def curves(found: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """CorLoc over biases, all images: {model: study} → rows pair, model, bias, score, low, high in per cent; empty without true
    boxes."""
    plain = {with_: without for without, with_ in register_pairs(found)}
    rows = []
    for name, data in found.items():
        swept = _used(data)["swept"].transpose("bias", "image")
        for bias, values in zip(swept["bias"].values, swept.values, strict=True):
            there = values[np.isfinite(values)]
            if len(there):
                score, low, high = arrays.bootstrap_interval(100 * there)
                row = {"bias": float(bias), "score": score, "low": low, "high": high}
                rows.append({"pair": plain.get(name, name), "model": name, **row})
    return pd.DataFrame(rows, columns=["pair", "model", "bias", "score", "low", "high"])


def lengths(found: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """Length of the projections of marked patches over that of the others: {model: projection_norms(…)} → a row a model with 95 %
    intervals over images (Fig 14)."""
    rows = []
    for name, data in found.items():
        row: dict[str, object] = {"model": name, "marked": str(data["marked"].values)}
        for which in lost.PROJECTIONS:
            row[which] = cell(float(data[k].sel(projection=which)) for k in ("ratio", "low", "high"))
        rows.append(row | {"images": int(data["n"].max())})
    return pd.DataFrame(rows)


def settings(found: Mapping[str, xr.Dataset], projection: str = "value") -> pd.DataFrame:
    """CorLoc under every setting, with what a score alone hides: {model: by_setting(…)}, the one without registers first, the
    features → a row a setting with 95 % intervals over images, in per cent (Table 3).

    Beside each score stands the median share of the image that the boxes cover; each model after the first has its
    difference to the first, in points, and each after the second the second's to it, as a control. The last row is a box
    around the whole image.
    """
    first, second, *_ = [*found.values(), *found.values()]
    rows: dict[str, dict[tuple[str, str], str]] = {str(s): {} for s in first["setting"].values}
    whole = 100 * first["baseline"].sel(rule="whole image").values
    rows["whole image (no model)"] = {}
    for name, data in found.items():
        at = data.sel(projection=projection)
        for setting in data["setting"].values:
            one, row = at.sel(setting=setting), rows[str(setting)]
            row[name, "CorLoc"] = _cell(one["hit"].values)
            if data is not first:
                row[name, "− first"] = _cell(one["hit"].values - _hit(first, projection, setting), "+")
            if data is not first and data is not second:
                row[name, "second − it"] = _cell(_hit(second, projection, setting) - one["hit"].values, "+")
            row[name, "covered"] = f"{100 * float(one['covered'].median()):.0f}"
        there = whole[np.isfinite(whole)]
        rows["whole image (no model)"] |= {(name, "CorLoc"): f"{there.mean():.1f}", (name, "covered"): "100"}
    table = pd.DataFrame.from_dict(rows, orient="index").fillna("–")
    table.columns = pd.MultiIndex.from_tuples(table.columns)
    return table.reindex(columns=[c for n in found for c in table.columns if c[0] == n]).rename_axis("setting")


def _hit(data: xr.Dataset, projection: str, setting: str) -> np.ndarray:
    return data["hit"].sel(projection=projection, setting=setting).values


STEPS = {"score": "LOST score", "similarity": "similarity to seed", "expansion": "seed expansion"}


def frame(axis: Axes, box: np.ndarray, colour: Any, line: str = "-") -> None:
    """A box (y0, x0, y1, x1) in pixels; axes end outside it, so that a box around the whole image can be seen."""
    y0, x0, y1, x1 = (float(v) for v in box)
    axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=colour, lw=1.6, ls=line, clip_on=False))


def _map(axis: Axes, found: xr.Dataset, step: str, size: Sequence[int]) -> None:
    """One map of one image over its pixels: signed ones in colours around 0, where the object ends."""
    values = found[step].transpose("y", "x").values
    extent = (0, size[1], size[0], 0)
    if step == "score":
        axis.imshow(values, cmap="inferno", interpolation="nearest", extent=extent)
        y, x = np.divmod(int(found["seed"]), values.shape[1])
        place = (x + 0.5) * size[1] / values.shape[1], (y + 0.5) * size[0] / values.shape[0]
        axis.plot(*place, "o", ms=4, mfc=PALETTE[9], mec="black", mew=0.8)
    else:
        top = max(float(np.abs(values).max()), 1e-12)
        axis.imshow(values, cmap="coolwarm", vmin=-top, vmax=top, interpolation="nearest", extent=extent)
        frame(axis, found["box"].values, "black")


def _image(axis: Axes, image: np.ndarray, truth: np.ndarray) -> None:
    axis.imshow(image, extent=(0, image.shape[1], image.shape[0], 0))
    axis.set_title("image", fontsize=8)
    for box in truth:
        frame(axis, box, PALETTE[2], "--")


def _title(name: str) -> str:
    """Break a model's name so that it fits above a small map."""
    return name.replace("-pico", "-\npico", 1) if "-pico" in name else name.replace("_patch", "\n_patch", 1)


def plot_steps(
    image: np.ndarray, truth: np.ndarray, found: Mapping[str, xr.Dataset], sizes: Mapping[str, Sequence[int]]
) -> Figure:
    """What LOST does to one image (Fig 13): (H, W, 3), true boxes (objects, 4), {model: Dataset of maps [y, x] and box}, sizes
    (height, width) in pixels → Figure: a column a model, rows score (a dot is the seed), similarity to the seed, expansion."""
    figure, axes = axes_grid(3, 1 + len(found), 1.15 * (1 + len(found)) + 0.3, 4.1, layout="compressed")
    for axis in axes.flat:
        blank(axis)
    _image(axes[0, 0], image, truth)
    for j, (name, data) in enumerate(found.items(), start=1):
        for i, step in enumerate(STEPS):
            _map(axes[i, j], data, step, sizes[name])
        axes[0, j].set_title(_title(name), fontsize=7)
    for i, label in enumerate(STEPS.values()):
        axes[i, 1].set_ylabel(label, fontsize=8)
    return figure


def plot_projections(
    image: np.ndarray, truth: np.ndarray, found: Mapping[str, xr.Dataset], sizes: Mapping[str, Sequence[int]]
) -> Figure:
    """Seed expansion from keys, queries and values (Fig 14): (H, W, 3), true boxes (objects, 4), {model: Dataset of maps
    [projection, y, x]}, sizes (height, width) in pixels → Figure with a row a model."""
    names = [str(p) for p in next(iter(found.values()))["projection"].values]
    figure, axes = axes_grid(
        len(found), 1 + len(names), 1.5 * (1 + len(names)), 1.5 * len(found) + 0.3, layout="compressed"
    )
    for axis in axes.flat:
        blank(axis)
    _image(axes[0, 0], image, truth)
    for i, (name, data) in enumerate(found.items()):
        for j, which in enumerate(names, start=1):
            _map(axes[i, j], data.sel(projection=which), "expansion", sizes[name])
            if i == 0:
                axes[i, j].set_title(f"{which[:-1]}ies" if which == "query" else f"{which}s", fontsize=8)
        axes[i, 1].set_ylabel(name, fontsize=7)
    return figure


def plot_bias_curves(table: pd.DataFrame, chance: float) -> Figure:
    """CorLoc over biases: rows pair, model, bias, score, low, high in per cent, score of the best box that looks at nothing →
    Figure, one panel a pair; bands are 95 % intervals over images."""
    if table.empty:
        return note("these images come without boxes of their objects: there is nothing to score")
    pairs = list(dict.fromkeys(table["pair"]))
    figure, axes = axes_grid(1, len(pairs), 0.6 + 2.35 * len(pairs), 2.7, sharey=True)
    for axis, pair in zip(axes[0], pairs, strict=True):
        part = table[table["pair"] == pair]
        for (name, rows), colour in zip(part.groupby("model", sort=False), PALETTE, strict=False):
            label = "without registers" if name == pair else "with registers"
            axis.plot(rows["bias"], rows["score"], marker="o", ms=2.5, lw=1.2, color=colour, label=label)
            axis.fill_between(rows["bias"], rows["low"], rows["high"], color=colour, alpha=0.2, lw=0)
        axis.axhline(chance, color="grey", ls=":", lw=1, label="best box without a model")
        axis.set(xlabel="bias on cosines", ylim=(0, 100))
        axis.set_title(pair, fontsize=9)
    axes[0, 0].set_ylabel("CorLoc, %")
    named = max((axis.get_legend_handles_labels() for axis in axes[0]), key=lambda found: len(found[1]))
    figure.legend(*named, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure
