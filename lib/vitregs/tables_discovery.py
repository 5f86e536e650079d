"""What the chapter on object discovery prints and draws: measured data sets of several models in, data frames out."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr

from vitregs import artifacts, discovery, published
from vitregs.pairs import register_pairs

SETS = ("VOC2007", "VOC2012", "COCO20k")
RULES = dict(zip(discovery.RULES, ("bias 0", "centred", "best bias"), strict=True))


def _cell(values: np.ndarray, sign: str = "") -> str:
    """Mean of per-picture values in per cent with its 95 % interval, as text; pictures without true boxes do not count."""
    there = 100 * np.asarray(values)[np.isfinite(values)]
    if not len(there):
        return "no boxes"
    mean, low, high = artifacts.interval(there)
    return f"{mean:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def _used(data: xr.Dataset) -> xr.Dataset:
    """The projection that counts in the table."""
    return data.sel(projection=str(data["used"].values))


def paper() -> pd.DataFrame:
    """The paper's Table 3: → CorLoc in per cent by model and registers, a column a data set."""
    table = published.table("tables")
    part = table[table["table"] == "table_3"]
    return part.pivot(index=["model", "registers"], columns="dataset", values="value")[list(SETS)]


def scores(found: Mapping[str, xr.Dataset], chance: xr.DataArray) -> pd.DataFrame:
    """CorLoc in per cent: {model: study}, hits of baselines [rule, image] → a row a model with 95 % intervals over pictures, the
    paper's first (Table 3; VOC 2007 / VOC 2012 / COCO 20k), then boxes that look at nothing."""
    rows = []
    for (model, registers), line in paper().iterrows():
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
    same pictures, the paper's first (Table 3). Both of a pair choose from the same biases on the same half."""
    rows = []
    table = paper()
    for model in table.index.unique("model"):
        gap = table.loc[(model, 4)] - table.loc[(model, 0)]
        rows.append({"pair": f"{model} (paper)", "best bias": " / ".join(f"{v:+.1f}" for v in gap)})
    for without, with_ in register_pairs(found):
        gap = _used(found[with_])["hit"].drop_vars("model") - _used(found[without])["hit"].drop_vars("model")
        text = {RULES[rule]: _cell(gap.sel(rule=rule).values, "+") for rule in RULES}
        rows.append({"pair": f"{with_} − {without}", "feature": str(found[with_]["used"].values), **text})
    return pd.DataFrame(rows, columns=["pair", "feature", *RULES.values()]).fillna("–")


def curves(found: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """CorLoc over biases, all pictures: {model: study} → rows pair, model, bias, score, low, high in per cent; empty without true
    boxes."""
    plain = {with_: without for without, with_ in register_pairs(found)}
    rows = []
    for name, data in found.items():
        swept = _used(data)["swept"].transpose("bias", "image")
        for bias, values in zip(swept["bias"].values, swept.values, strict=True):
            there = values[np.isfinite(values)]
            if len(there):
                score, low, high = artifacts.interval(100 * there)
                row = {"bias": float(bias), "score": score, "low": low, "high": high}
                rows.append({"pair": plain.get(name, name), "model": name, **row})
    return pd.DataFrame(rows, columns=["pair", "model", "bias", "score", "low", "high"])


def lengths(found: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """Length of the projections of marked patches over that of the others: {model: projection_norms(…)} → a row a model with 95 %
    intervals over pictures (Fig 14)."""
    rows = []
    for name, data in found.items():
        row: dict[str, object] = {"model": name, "marked": str(data["marked"].values)}
        for which in discovery.PROJECTIONS:
            value, low, high = (float(data[k].sel(projection=which)) for k in ("ratio", "low", "high"))
            row[which] = "–" if np.isnan(value) else f"{value:.2f} [{low:.2f}, {high:.2f}]"
        rows.append(row | {"pictures": int(data["n"].max())})
    return pd.DataFrame(rows)
