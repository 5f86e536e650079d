"""What the chapters print and draw as tables: measured arrays of several models in, data frames out."""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import xarray as xr

from vitregs import artifacts, backbones, published
from vitregs.pairs import register_pairs

GROUPS = ("background", "object", "border")
Mark = tuple[xr.DataArray, str]


def attention(maps: Mapping[str, xr.DataArray], grounds: Mapping[str, np.ndarray | None]) -> pd.DataFrame:
    """How concentrated the CLS attention of the last block is, and on what: {model: [image, layer, head, query, token]},
    {model: background share (pictures, patches) or None} → rows with mean and 95 % interval (Fig 1, 2)."""
    rows: list[tuple[str, str, float, float, float]] = []
    for name, a in maps.items():
        count = int((a["kind"] == "patch").sum())
        peak = artifacts.peak_share(a).isel(layer=-1, query=0)
        rows.append((name, "peak, in fair shares", *artifacts.interval(peak * count)))
        ground = grounds[name]
        if ground is not None:
            there = np.flatnonzero(np.isfinite(ground).all(1))  # images with a mask
            on = artifacts.attention_on(a.isel(layer=-1, query=0, image=there).mean("head"), 1 - ground[there])
            rows.append((name, "attention on objects", *artifacts.interval(on)))
            rows.append((name, "area of objects", *artifacts.interval((1 - ground[there]).mean(1))))
    return pd.DataFrame(rows, columns=["model", "quantity", "mean", "low", "high"])


def peaks(found: Mapping[str, xr.DataArray]) -> pd.DataFrame:
    """Per cent of the CLS attention on one patch, at every block: {model: [image, layer]} → rows with mean, low, high."""
    return pd.concat(
        pd.DataFrame(
            [artifacts.interval(100 * p.sel(layer=n)) for n in p["layer"]], columns=["mean", "low", "high"]
        ).assign(model=name, block=p["layer"].values)
        for name, p in found.items()
    )


def verdicts(norms: Mapping[str, xr.DataArray]) -> pd.DataFrame:
    """The paper's numbers, then ours: {model: [image, layer, token]} → verdict, strongest layer, outliers and largest ratio
    there with 95 % intervals over pictures (Fig 3)."""
    share, times = (
        published.value("norms", figure="fig_3", quantity=q) for q in ("share_above_cutoff", "outlier_over_normal_norm")
    )
    rows: list[tuple[str, ...]] = [
        ("DINOv2 ViT-g/14 (paper)", "artifacts", "40 of 40", f"{share:.2f}", f"about {times:.0f}")
    ]
    for name, a in norms.items():
        word, layer, _ = artifacts.verdict(artifacts.by_layer(a))
        at = a.sel(layer=layer)
        marked = artifacts.patches(artifacts.outliers(at, artifacts.cutoff(at))).mean("token")
        numbers = (
            f"{mean:.2f} [{low:.2f}, {high:.2f}]"
            for mean, low, high in map(artifacts.interval, (100 * marked, artifacts.largest_ratio(a).sel(layer=layer)))
        )
        rows.append((name, word, f"{layer} of {int(a['layer'].max())}", *numbers))
    return pd.DataFrame(rows, columns=["model", "verdict", "layer", "outliers, %", "largest / median norm"])


def findings(norms: Mapping[str, xr.DataArray]) -> str:
    """The verdict on every model and its evidence, as lines of text: {model: [image, layer, token]} → text."""
    said = []
    for name, a in norms.items():
        word, layer, why = artifacts.verdict(artifacts.by_layer(a))
        said.append(textwrap.fill(f"{name}: {word} (layer {layer}): {why}", 78, subsequent_indent="    "))
    return "\n".join(said)


def layers(norms: Mapping[str, xr.DataArray]) -> pd.DataFrame:
    """Evidence at every layer: {model: [image, layer, token]} → rows by model and layer (Fig 4a)."""
    parts = [artifacts.by_layer(a).assign(model=name) for name, a in norms.items()]
    table = pd.concat(parts).set_index(["model", "layer"])
    table["share"] *= 100
    table["cutoff"] = ["none" if np.isnan(v) else f"{v:.1f}" for v in table["cutoff"]]
    return table.rename(columns={"cutoff": "cut-off", "share": "2nd mode, %", "ratio": "its ratio"})


def training(histories: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """How training ended: {model: history} → accuracy, top-1-% ratio of the strongest layer, largest attention sink on a patch;
    the stem (layer 0) is left out (Fig 4b)."""
    rows = []
    for name, h in histories.items():
        end = h.isel(step=-1)
        top = h["top1"].isel(layer=slice(1, None))
        sink = float(end["sink"].sel(kind="patch").max())
        rows.append((name, int(end["step"]), float(end["accuracy"]), float(top.isel(step=-1).max()), sink))
    return pd.DataFrame(rows, columns=["model", "steps", "accuracy", "top-1% ratio", "attention sink"])


def hunt(norms: Mapping[str, xr.DataArray], grounds: Mapping[str, np.ndarray | None]) -> pd.DataFrame:
    """Every model by the rule of the hunt: {model: [image, layer, token]}, {model: background share (pictures, patches) or
    None} → rows: strongest layer, its top-1-% ratio with a 95 % interval, separation (D) and size of its second mode, whether
    outliers have emerged, the mode in per cent of the patches on plain wall and of all others, and whether this is the
    paper's artifact (Fig 7).
    """
    rows = []
    for name, a in norms.items():
        found = artifacts.hunt(a, grounds[name])
        middle, low, high = found.top1
        rows.append(
            {
                "model": name,
                "layer": f"{found.layer} of {found.depth}",
                "top-1% ratio": f"{middle:.2f} [{low:.2f}, {high:.2f}]",
                "D": round(found.separation, 1),
                "mode, %": round(100 * found.share, 1),
                "emerged": _yes(found.emerged),
                "wall, %": _per_cent(found.background),
                "rest, %": _per_cent(found.rest),
                "artifact": _yes(found.artifact),
            }
        )
    return pd.DataFrame(rows)


def _yes(value: bool | None) -> str:
    return {True: "yes", False: "no", None: "?"}[value]


def _per_cent(interval: tuple[float, float, float] | None) -> str:
    return "" if interval is None else "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * v for v in interval))


def sizes(norms: Mapping[str, xr.DataArray], weights: Mapping[str, int]) -> dict[str, xr.DataArray]:
    """Label models by their size, smallest first: {model: [image, layer, token]}, {model: weights} → {label: last layer}."""
    order = sorted(norms, key=lambda name: weights[name])
    return {f"{name}\n{weights[name] / 1e6:.2f} M": norms[name].isel(layer=-1) for name in order}


def emergence(histories: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """Largest top-1-% ratio over training and when, at any layer but the stem: {model: history} → a row a model (Fig 4b)."""
    rows = []
    for name, h in histories.items():
        top = h["top1"].isel(layer=slice(1, None)).max("layer")
        peak = int(top.argmax("step"))
        sink = h["sink"].sel(kind="patch").max("block")
        early = sink["step"].values[(sink >= 10).values]
        rows.append(
            {
                "model": name,
                "steps": int(h["step"][-1]),
                "largest top-1% ratio": float(top[peak]),
                "at step": int(h["step"][peak]),
                "at the end": float(top[-1]),
                "first sink of 10 shares": int(early[0]) if len(early) else "never",
            }
        )
    return pd.DataFrame(rows)


def similarity(found: Mapping[str, xr.DataArray], marks: Mapping[str, Mark]) -> pd.DataFrame:
    """Neighbour similarity of marked and other patches: {model: [image, token]}, {model: (marks, what they are)} → a row for
    each patch (Fig 5a)."""
    parts = []
    for name, (marked, what) in marks.items():
        hot = artifacts.patches(marked).values
        for group, chosen in ((what, hot), ("other patches", ~hot)):
            parts.append(pd.DataFrame({"model": name, "group": group, "similarity": found[name].values[chosen]}))
    return pd.concat(parts)


def summary(similar: pd.DataFrame) -> pd.DataFrame:
    """Sum up neighbour similarity: a row for each patch → a row for each model and group."""
    groups = similar.groupby(["model", "group"], sort=False)["similarity"]
    return pd.DataFrame(
        {"patches": groups.size(), "median": groups.median(), "above 0.9": groups.agg(lambda s: (s > 0.9).mean())}
    ).reset_index()


def shares(marks: Mapping[str, Mark], grounds: Mapping[str, np.ndarray | None]) -> pd.DataFrame:
    """Share of marked patches on pure background, pure object and border: {model: (marks, what)}, {model: background share
    (pictures, patches) or None} → rows with 95 % intervals; empty without masks."""
    parts = []
    for name, (marked, what) in marks.items():
        ground = grounds[name]
        if ground is not None:
            group = np.select([np.isnan(ground), ground == 1, ground == 0], [-1, 0, 1], 2)
            parts.append(artifacts.share_by_group(marked, group, GROUPS).assign(model=f"{name}: {what}"))
    return pd.concat(parts).set_index("model").reset_index() if parts else pd.DataFrame()


def registers(means: Mapping[str, xr.DataArray]) -> dict[str, pd.DataFrame]:
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


def _four(names: Sequence[str]) -> dict[str, str]:
    """Partners in the zoo with four registers: names → {name: partner}."""
    found = {a: b for a, b in register_pairs(backbones.zoo()) if backbones.card(b)["recipe"]["registers"] == 4}
    return {name: found[name] for name in names if name in found}


def pairs(names: Sequence[str]) -> dict[str, dict[str, xr.Dataset]]:
    """Histories of zoo models and of the same with four registers: names → {name: {label: history}}; absent ones are left out."""
    partner, found = _four(names), {}
    for name in names:
        logs = {"no registers": backbones.history(name), "4 registers": backbones.history(partner.get(name, ""))}
        there = {k: v for k, v in logs.items() if v is not None}
        if there:
            found[name] = there
    return found


def zoo(names: Sequence[str]) -> pd.DataFrame:
    """Scores of zoo models and of the same with four registers, from their cards: names → a row a model (Table 2, in small).

    Linear scores are trained / untrained; a dash where a card has none.
    """
    rows, partner = [], _four(names)
    for name in [full for n in names for full in (n, partner.get(n, ""))]:
        if name in backbones.zoo():
            card = backbones.card(name)
            asked = {k: f"{v:.2f} / {card['linear_untrained'][k]:.2f}" for k, v in card.get("linear", {}).items()}
            accuracy = card["accuracy"]
            rows.append(
                {
                    "model": name,
                    "registers": card["recipe"]["registers"],
                    "minutes": round(card["minutes"]),
                    "head or zero-shot": "–" if accuracy is None else f"{accuracy:.2f}",
                    **{f"linear, {k}": v for k, v in asked.items()},
                }
            )
    return pd.DataFrame(rows).fillna("–")


def settings(facts: Mapping[str, object]) -> pd.DataFrame:
    """A recipe as a table: its facts → a row a setting."""
    shown = {k: v for k, v in facts.items() if not isinstance(v, dict)}
    return pd.DataFrame({"setting": list(shown), "value": [str(v) for v in shown.values()]})
