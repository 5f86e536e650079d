"""Scores of attention and of other groupings side by side: a model and pictures in, or measured arrays, tables out."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import xarray as xr

from vitregs import artifacts, capture, objects
from vitregs.backbones import Backbone
from vitregs.images import Images
from vitregs.results import grid

SHIFTS = 8  # later pictures whose objects the same maps are held against: what chance gives
QUANTITIES = {"iou": "best-match IoU", "ari": "adjusted Rand index"}


def compare(backbone: Backbone, images: Images, *, clusters: int, seed: int = 0) -> xr.Dataset:
    """Score the attention of CLS and registers, and four groupings that know nothing of attention, picture by picture:
    backbone, pictures, number of groups, seed → `iou`, `iou_chance`, `ari`, `ari_chance` [way, image], nan where a
    score does not exist, and `maps` [way], how many compete.

    k-means groups the states that enter the last block, which are what its attention looks at.
    """
    seen = objects.things(images, backbone.grid(images.size))
    look = capture.capture(backbone, images, attention=objects.queries(backbone, images), tokens=[-2], kinds="patch")
    maps = grid(look["attention"].isel(attention_layer=0).mean("head")).rename("attention")
    states = look["tokens"].isel(tokens_layer=0)
    n, side = maps.sizes["image"], backbone.grid(images.size)
    found = {"CLS": (objects.of_kind(maps, "cls"), "mass"), "CLS, size known": (objects.of_kind(maps, "cls"), "oracle")}
    if backbone.registers:
        registers = objects.of_kind(maps, "register")
        found |= {"registers": (registers, "mass"), "registers, size known": (registers, "oracle")}
    found["k-means"] = (objects.one_hot(objects.kmeans(states, clusters, seed=seed)), "argmax")
    found["places"] = (objects.one_hot(objects.places(n, side, clusters)), "argmax")
    for kind in objects.NOISE:
        noise = objects.noise(n, max(1, backbone.registers), side, kind=kind, seed=seed)
        found[f"{kind} noise"] = (noise, "mass")
    parts = [score(m, seen, rule=rule) for m, rule in found.values()]
    return _joined(list(found), parts).assign_coords(model=backbone.name).assign_attrs(of=seen.attrs["of"])


def by_block(backbone: Backbone, images: Images) -> xr.Dataset:
    """Whether registers differ and match objects, block by block: backbone, pictures → `iou`, `iou_chance`, `same`,
    `same_by_chance` [block, image] of the registers, or of CLS where there are none; nan where a score does not exist."""
    seen = objects.things(images, backbone.grid(images.size))
    kind = "register" if backbone.registers else "cls"
    blocks = list(range(1, backbone.depth + 1))
    maps = grid(capture.attention(backbone, images, layers=blocks, queries=(kind,)).mean("head"))
    parts = []
    for k in range(len(blocks)):
        at = maps.isel(layer=k)
        found = score(at, seen, rule="mass")[["iou", "iou_chance"]]
        if seen["region"].values.any() and at.sizes["query"] > 1:
            found = found.merge(objects.variety(at, seen)[["same", "same_by_chance"]])
        else:
            found = found.assign(same=np.nan * found["iou"], same_by_chance=np.nan * found["iou"])
        parts.append(found)
    joined = xr.concat(parts, xr.DataArray(blocks, dims="block", name="block"))
    return joined.assign_coords(model=backbone.name)


def blocks(found: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """Means with 95 % intervals at every block: {model: what `by_block` gives} → rows model, block, quantity, mean, low, high,
    chance; scores that do not exist are left out."""
    rows = []
    for model, data in found.items():
        for quantity, title, by_chance, factor in (
            ("iou", QUANTITIES["iou"], "iou_chance", 1),
            ("same", "pairs with one favourite, %", "same_by_chance", 100),
        ):
            for block in data["block"].values:
                at = data.sel(block=block)
                values = factor * at[quantity].values
                there = np.isfinite(values)
                if there.any():
                    mean, low, high = artifacts.interval(values[there])
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


def slot_scores(found: xr.Dataset, seen: xr.Dataset) -> xr.Dataset:
    """Score what `slots.discover` gives, the decoder's masks and the slots' attention: → as `compare`; the losses stand in
    the method's name."""
    before, after = found["loss"].values
    names = {"attention": f"slots (loss {before:.2f} to {after:.2f})", "mask": "slots' masks"}
    parts = [score(found[k], seen, rule="argmax") for k in names]
    return _joined(list(names.values()), parts)


def _joined(names: Sequence[str], parts: Sequence[xr.Dataset]) -> xr.Dataset:
    return xr.concat(parts, xr.DataArray(np.array(names), dims="way", name="way"), data_vars="all")


def score(maps: xr.DataArray, seen: xr.Dataset, *, rule: str) -> xr.Dataset:
    """Score maps picture by picture: [image, query, y, x], things, a rule of `objects.match` → `iou`, `iou_chance`, `ari`,
    `ari_chance` [image], and `maps`, their number.

    The IoU of a picture is the mean over its objects. Chance is the mean over the objects of the next 8 pictures. Where
    there is no object, or where objects overlap or one map is alone, scores are nan.
    """
    n = maps.sizes["image"]
    shifts = range(1, min(SHIFTS, n - 1) + 1)
    nothing = np.full(n, np.nan)
    found = dict.fromkeys(("iou", "iou_chance", "ari", "ari_chance"), nothing)
    jobs: dict[str, Callable[[int], xr.DataArray]] = {}
    if seen["region"].values.any():
        jobs["iou"] = lambda k: objects.match(maps, seen, rule=rule, shift=k)["iou"].mean("object")
        if seen.attrs["of"] == "masks" and maps.sizes["query"] > 1 and rule != "oracle":
            scale = "none" if rule == "argmax" else "mean"
            jobs["ari"] = lambda k: objects.grouping(maps, seen, scale=scale, shift=k)
    for name, job in jobs.items():
        found[name] = job(0).values
        if shifts:
            found[f"{name}_chance"] = xr.concat([job(k) for k in shifts], "shift").mean("shift").values
    data = {k: ("image", v) for k, v in found.items()}
    return xr.Dataset({**data, "maps": maps.sizes["query"]})


def scores(found: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """Means with 95 % intervals over pictures: {model: what `compare` gives} → rows model, method, maps, quantity, mean, low,
    high, chance, pictures; scores that do not exist are left out."""
    rows = []
    for model, data in found.items():
        for k, method in enumerate(data["way"].values):
            at = data.isel(way=k)
            for quantity, title in QUANTITIES.items():
                values = at[quantity].values
                there = np.isfinite(values)
                if there.any():
                    mean, low, high = artifacts.interval(values[there])
                    by_chance = at[f"{quantity}_chance"].values
                    row = {"model": model, "method": str(method), "maps": int(at["maps"]), "quantity": title}
                    row |= {"mean": mean, "low": low, "high": high, "pictures": int(there.sum())}
                    row["chance"] = float(np.nanmean(by_chance)) if np.isfinite(by_chance).any() else np.nan
                    rows.append(row)
    names = ["model", "method", "maps", "quantity", "mean", "low", "high", "chance", "pictures"]
    return pd.DataFrame(rows, columns=names)


def wide(table: pd.DataFrame, quantity: str, methods: Sequence[str]) -> pd.DataFrame:
    """One score as a table to read: what `scores` gives, a title of QUANTITIES, the methods to show → a row a model, a column
    a method, cells "mean [low, high]"; empty where no score exists."""
    part = table[(table["quantity"] == quantity) & table["method"].isin(list(methods))]
    numbers = zip(part["mean"], part["low"], part["high"], strict=True)
    shown = part.assign(cell=[f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in numbers])
    shown = shown.pivot(index="model", columns="method", values="cell").fillna("")
    order = [m for m in methods if m in shown.columns]
    return shown.reindex(index=part["model"].unique(), columns=order).rename_axis(None, axis=1)


def variety(maps: Mapping[str, xr.DataArray], seen: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """Whether the registers of each model differ: {model: [image, query, y, x]}, {model: things} → a row a model with two or
    more registers: smallest correlation of two mean-over-pictures, per cent of pairs with the same favourite object and
    of objects that are somebody's favourite, both with 95 % intervals and what blind choice gives."""
    rows = []
    for name, a in maps.items():
        chosen = a.isel(query=np.flatnonzero(a["query_kind"] == "register"))
        if chosen.sizes["query"] > 1:
            row = {"model": name, "registers": chosen.sizes["query"]}
            row["least correlation"] = f"{float(objects.similarity(chosen).min()):.2f}"
            if seen[name]["region"].values.any():
                data = objects.variety(chosen, seen[name]).dropna("image")
                for key, title in (("same", "same favourite, %"), ("covered", "objects covered, %")):
                    if data.sizes["image"]:
                        mean, low, high = artifacts.interval(100 * data[key].values)
                        row[title] = f"{mean:.0f} [{low:.0f}, {high:.0f}]"
                        row[f"{key}, blind"] = f"{100 * float(data[f'{key}_by_chance'].mean()):.0f}"
            rows.append(row)
    return pd.DataFrame(rows)


def preferences(maps: Mapping[str, xr.DataArray], seen: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """What decides how much attention an object gets: {model: [image, query, y, x]}, {model: things} → rows by model and query
    ("registers" is their mean), columns place, colour, shape, depth; empty where nothing is known of the objects."""
    parts = []
    for name, a in maps.items():
        if not set(objects.PROPERTIES) - set(seen[name]) and a.sizes["image"] > 1 and seen[name]["region"].values.any():
            table = objects.preferences(a, seen[name])
            kind = a["query_kind"].values
            table["query"] = np.select([kind == "cls", kind == "register"], ["CLS", "registers"], "a patch")
            parts.append(table.groupby("query", sort=False).mean().assign(model=name))
    return pd.concat(parts).reset_index().set_index(["model", "query"]) if parts else pd.DataFrame()
