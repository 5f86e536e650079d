"""One short function a quantity: stored arrays become the number that a claim names."""

from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from vitregs import arrays, cache
from vitregs.claims import eligible
from vitregs.data import published
from vitregs.errors import InputError
from vitregs.measure import attention, cost, object_attention, outliers, position_gradient
from vitregs.models import registry
from vitregs.models.pairs import register_pairs
from vitregs.probes import transfer

PAPERS = ("supervised", "clip", "dinov2")  # objectives of the networks that the paper trains with and without registers
Evidence = Callable[[Path], "Measured"]


@dataclass(frozen=True)
class Measured:
    """A measured value with its 95 % interval, how many things it rests on, and of what it is."""

    value: float
    low: float
    high: float
    n: int
    what: str
    networks: tuple[str, ...] = ()  # it rests on; those whose arrays were read, unless the measure names them
    strength: float | None = None  # of the artifact of the network tested, where the measure knows it

    def text(self) -> str:
        """The value with its interval, if it has one."""
        if self.low == self.high == self.value:
            return f"{self.value:.3g}"
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


MEASURES: dict[str, Evidence] = {}
_RESTS_ON: ContextVar[dict[str, None]] = ContextVar("rests_on")  # networks read while a measure runs, in order


def measure(function: Evidence) -> Evidence:
    """Enter a function of the results folder among the measures that a claim can name; what it gives names the networks whose
    arrays it has read."""

    @wraps(function)
    def recorded(folder: Path) -> Measured:
        token = _RESTS_ON.set({})
        try:
            found = function(folder)
            return found if found.networks else replace(found, networks=tuple(_RESTS_ON.get()))
        finally:
            _RESTS_ON.reset(token)

    MEASURES[function.__name__] = recorded  # type: ignore[attr-defined]
    return recorded


def rests_on(model: str) -> None:
    """Note that the measure at work rests on a network, whoever reads its arrays."""
    _RESTS_ON.get({})[model] = None


def read(folder: Path, chapter: str, name: str, model: str) -> xr.Dataset:
    """One stored result: folder, chapter, name, model → Dataset. Raises InputError if it is missing."""
    rests_on(model)
    return _load(folder / chapter / f"{name}.{model}.nc", *written(folder / chapter / f"{name}.{model}.nc"))


def written(path: Path) -> tuple[int, int]:
    """Which version of a file is there: path → inode and time, zeros without a file."""
    if not path.exists():
        return 0, 0
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


@lru_cache(maxsize=64)  # many claims ask the same arrays
def _load(path: Path, _inode: int, _time: int) -> xr.Dataset:
    return cache.load_dataset(path)


def stored(folder: Path, chapter: str, name: str) -> list[str]:
    """Models of which a chapter keeps a result: folder, chapter, name → their names. Raises InputError if there are none."""
    found = sorted(p.name.removeprefix(f"{name}.").removesuffix(".nc") for p in (folder / chapter).glob(f"{name}.*.nc"))
    if not found:
        raise InputError(f"cannot read results {folder / chapter}/{name}.*.nc: there are none")
    return found


def pairs(folder: Path, chapter: str, name: str, objectives: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Pairs of a chapter without and with four registers, of the first seed: folder, chapter, name, objectives (none: all) →
    (without, with). Raises InputError for an objective that has no such pair."""
    found = {_recipe(b)["objective"]: (a, b) for a, b in _pairs(folder, chapter, name) if _recipe(b)["registers"] == 4}
    missing = [o for o in objectives if o not in found]
    if missing or not found:
        raise InputError(f"no pair without and with registers of {missing or 'any objective'} in {folder / chapter}")
    return [found[o] for o in objectives or found]


def eligible_pairs(folder: Path, chapter: str, name: str, objectives: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Those of `pairs` in which both networks may decide a claim, to take a mean over. Raises InputError if there are none."""
    found = [p for p in pairs(folder, chapter, name, objectives) if not any(map(eligible.barred, p))]
    if not found:
        raise InputError(f"no pair in {folder / chapter} clears its untrained twin")
    return found


def sweep(folder: Path, chapter: str, name: str) -> dict[int, str]:
    """The most numbers of registers that a chapter keeps of one recipe, 0 among them: → {registers: model}."""
    every = _pairs(folder, chapter, name)
    plain = max((a for a, _ in every), key=[a for a, _ in every].count, default="")
    found = {0: plain} | {int(_recipe(b)["registers"]): b for a, b in every if a == plain}
    return dict(sorted(found.items()))


def _pairs(folder: Path, chapter: str, name: str) -> list[tuple[str, str]]:
    return [(a, b) for a, b in register_pairs(stored(folder, chapter, name)) if _recipe(a)["seed"] == 0]


def _recipe(model: str) -> dict[str, Any]:
    return registry.card(model)["recipe"]


def exact(value: float, n: int, what: str) -> Measured:
    """A number without an interval."""
    return Measured(value, value, value, n, what)


def mean(values: np.ndarray, what: str) -> Measured:
    """Mean of per-image values."""
    kept = np.asarray(values, float)
    kept = kept[np.isfinite(kept)]
    return Measured(*arrays.bootstrap_interval(kept), len(kept), what)


def apart(one: xr.Dataset, two: xr.Dataset, times: float, n: int, what: str) -> Measured:
    """Difference of two scores with their own intervals: the half-widths add as independent errors do."""
    (a, la, ha), (b, lb, hb) = ([float(d[k]) for k in ("score", "low", "high")] for d in (one, two))
    down, up = np.hypot(a - la, hb - b), np.hypot(ha - a, b - lb)
    return Measured(times * (a - b), times * (a - b - down), times * (a - b + up), n, what)


CHAPTERS = ("03_when_outliers_appear", "07_registers")  # which keep norms at all layers


def kept(folder: Path, model: str) -> xr.Dataset:
    """Norms of a model at all layers with the truth of their images: → `value` [image, layer, token], `background` [image,
    patch] where there are masks."""
    return read(folder, _chapter(folder, model), "norms", model)


def _chapter(folder: Path, model: str) -> str:
    return next((c for c in CHAPTERS if (folder / c / f"norms.{model}.nc").exists()), CHAPTERS[-1])


def layers(folder: Path, model: str) -> pd.DataFrame:
    """Evidence at every layer of a model: → the table of `outliers.layer_evidence`, which takes a second to make."""
    rests_on(model)
    return _layers(folder, model, *written(folder / _chapter(folder, model) / f"norms.{model}.nc"))


@lru_cache(maxsize=64)
def _layers(folder: Path, model: str, _inode: int, _time: int) -> pd.DataFrame:
    return outliers.layer_evidence(norms(folder, model))


def norms(folder: Path, model: str) -> xr.DataArray:
    """Norms of a model at all layers: → [image, layer, token]."""
    return kept(folder, model)["value"]


def bare(folder: Path) -> list[str]:
    """Networks without registers whose norms are kept at all layers, and which may decide a claim."""
    names = [m for c in CHAPTERS for m in stored(folder, c, "norms") if not eligible.barred(m)]
    return [m for m in names if not (norms(folder, m)["kind"] == "register").any()]


def modes(folder: Path, models: Iterable[str]) -> dict[str, float]:
    """Share of patches in an outlier mode at the strongest layer of each model, 0 without one."""
    found = {}
    for model in models:
        best = outliers.strongest_layer(layers(folder, model))
        found[model] = float(best.share) if np.isfinite(best.cutoff) else 0.0
    return found


@measure
def any_mode(folder: Path) -> Measured:
    """Largest share of patches, in per cent, that form an outlier mode in a network without registers."""
    found = modes(folder, bare(folder))
    best = max(found, key=lambda m: found[m])
    return exact(100 * found[best], norms(folder, best).sizes["image"], best)


@measure
def largest_mode(folder: Path) -> Measured:
    """Centre of the outlier mode over the median norm, at its strongest."""
    rows = {m: outliers.strongest_layer(layers(folder, m)) for m in bare(folder)}
    best = max((m for m in rows if np.isfinite(rows[m].cutoff)), key=lambda m: rows[m].ratio, default="")
    if not best:
        return exact(0.0, 0, "no model has a mode")
    return exact(float(rows[best].ratio), norms(folder, best).sizes["image"], best)


@measure
def dino_mode(folder: Path) -> Measured:
    """Per cent of patches in an outlier mode of DINO."""
    found = norms(folder, "dino-pico").sizes["image"]
    return exact(100 * modes(folder, ["dino-pico"])["dino-pico"], found, "dino-pico")


@measure
def first_layer(folder: Path) -> Measured:
    """First layer with an outlier mode, as a share of the depth."""
    found = norms(folder, "hunt-pico")
    table = layers(folder, "hunt-pico")
    there = table[(table["layer"] > 0) & table["cutoff"].notna()]
    depth = int(table["layer"].max())
    return exact(float(there["layer"].min()) / depth if len(there) else 1.0, found.sizes["image"], "hunt-pico")


@measure
def onset(folder: Path) -> Measured:
    """First look at which the emergence rule holds, as a share of the training; 1 if it never does."""
    rests_on("hunt-pico")
    log = registry.history("hunt-pico")
    assert log is not None
    top, far = (log[k].isel(layer=slice(1, None)) for k in ("top1", "separation"))
    held = ((top >= outliers.EMERGED_TOP1) & (far >= outliers.EMERGED_SEPARATION)).any("layer").values
    steps = log["step"].values
    return exact(float(steps[held][0] / steps[-1]) if held.any() else 1.0, 1, "hunt-pico, its history")


@measure
def widest_only(folder: Path) -> Measured:
    """Top-1-% over median norm of the widest network, minus that of the narrowest, at their strongest layers."""
    ends = [
        outliers.top_ratio(norms(folder, m)).sel(layer=int(outliers.strongest_layer(layers(folder, m)).layer)).values
        for m in ("hunt-pico", "hunt-femto")
    ]
    return mean(ends[0] - ends[1], "hunt-pico − hunt-femto")


@measure
def artifact_ratio(folder: Path) -> Measured:
    """Largest over median patch norm in the last layer, register model over plain model, mean over the pairs of the paper."""
    names = eligible_pairs(folder, CHAPTERS[-1], "norms", PAPERS)
    logs = [
        np.log(outliers.largest_ratio(norms(folder, with_)).isel(layer=-1).values)
        - np.log(outliers.largest_ratio(norms(folder, plain)).isel(layer=-1).values)
        for plain, with_ in names
    ]
    found = mean(np.mean(logs, 0), _of(names))
    value, low, high = np.exp([found.value, found.low, found.high]).tolist()
    return Measured(value, low, high, found.n, found.what)


def _of(names: Sequence[tuple[str, str]]) -> str:
    """Pairs as text, by their networks without registers."""
    return f"{names[0][0]} pair" if len(names) == 1 else f"pairs of {', '.join(plain for plain, _ in names)}"


def _registers(folder: Path, model: str) -> tuple[np.ndarray, np.ndarray]:
    """Norms in the last layer: registers (images, registers) and patches (images, patches)."""
    last = norms(folder, model).isel(layer=-1).transpose("image", "token")
    kind = np.asarray(last["kind"])
    return last.values[:, kind == "register"], last.values[:, kind == "patch"]


@measure
def register_height(folder: Path) -> Measured:
    """Largest register norm over the median patch norm, mean over images."""
    register, patch = _registers(folder, "dinov2-pico-reg4")
    return mean(register.max(1) / np.median(patch, 1), "dinov2-pico-reg4")


@measure
def register_height_clip(folder: Path) -> Measured:
    """The same of CLIP."""
    register, patch = _registers(folder, "clip-pico-reg4")
    return mean(register.max(1) / np.median(patch, 1), "clip-pico-reg4")


@measure
def register_spread(folder: Path) -> Measured:
    """Largest over smallest mean norm of the four registers."""
    register, _ = _registers(folder, "dinov2-pico-reg4")
    mean = register.mean(0)
    return exact(float(mean.max() / mean.min()), len(register), "dinov2-pico-reg4")


@measure
def register_bands(folder: Path) -> Measured:
    """Variation of a register's norm over images, as a share of that of patch norms (coefficients of variation)."""
    register, patch = _registers(folder, "dinov2-pico-reg4")
    band = (register.std(0) / register.mean(0)).mean()
    return exact(float(band / (patch.std() / patch.mean())), len(register), "dinov2-pico-reg4")


# --- attention and redundancy
@measure
def attention_peak(folder: Path) -> Measured:
    """Part of the CLS attention that falls on one patch, in per cent: plain model minus register model."""
    where = (folder, "01_attention_artifacts", "cls_attention")
    (pair,) = pairs(*where, ["supervised"])
    peaks = [attention.peak_share(read(*where, m)["value"]).isel(layer=-1, query=0) for m in pair]
    return mean(100 * (peaks[0].values - peaks[1].values), "supervised pair")


def _similar(folder: Path, chapter: str, model: str, share: float) -> np.ndarray:
    """Neighbour similarity of marked patches minus that of the others, in each image that has both."""
    at = read(folder, chapter, "norms", model)["value"]
    if "layer" in at.dims:
        at = at.isel(layer=-1)
    marked, _ = outliers.mark_or_top(at, outliers.find_cutoff(at), share)
    is_outlier = arrays.patches(marked).transpose("image", "token").values
    found = read(folder, chapter, "similarity", model)["value"].transpose("image", "token").values
    with np.errstate(invalid="ignore"):
        inside = np.where(is_outlier, found, 0).sum(1) / is_outlier.sum(1)
        outside = np.where(is_outlier, 0, found).sum(1) / (~is_outlier).sum(1)
    return inside - outside


@measure
def similarity(folder: Path) -> Measured:
    """Cosine similarity to the neighbours of the top 2 % of norms, minus that of other patches."""
    return mean(_similar(folder, "04_redundant_patches", "supervised-pico", 0.02), "supervised-pico")


@measure
def border(folder: Path) -> Measured:
    """Share of the top 2 % of norms on border cells over their share of all cells."""
    at = read(folder, "04_redundant_patches", "norms", "supervised-pico")["value"]
    marked, _ = outliers.mark_or_top(at, outliers.find_cutoff(at), 0.02)
    patch = arrays.patches(marked).transpose("image", "token")
    y, x = patch["y"].values, patch["x"].values
    edge = (y == 0) | (x == 0) | (y == y.max()) | (x == x.max())
    value, low, high = arrays.bootstrap_ratio(patch.values[:, edge].sum(1), patch.values.sum(1))
    return Measured(value / edge.mean(), low / edge.mean(), high / edge.mean(), len(patch), "supervised-pico")


@measure
def stripes(_folder: Path) -> Measured:
    """Largest deviation of the gradient worked out here from the published vectors, all three variants."""
    ways = {
        "no_antialias_size": position_gradient.gradient(16, 7, antialias=False),
        "no_antialias_scale": position_gradient.gradient(16, 7, antialias=False, scale=7.1 / 16),
        "antialias_size": position_gradient.gradient(16, 7, antialias=True),
    }
    table = published.table("fig11")
    off = [np.abs(table[table["variant"] == k].sort_values("index")["value"].to_numpy() - g) for k, g in ways.items()]
    return exact(float(np.max(off)), int(np.size(off)), f"{len(off)} variants")


# --- conditions
@dataclass(frozen=True)
class Condition:
    """Whether a question arises of what was measured; if not, why; and how strong the artifact is that it is about."""

    met: bool
    why: str = ""
    strength: float | None = None


def has_mode(folder: Path, _found: Measured) -> Condition:
    """Some network without registers has an outlier mode, whatever it sits on."""
    return Condition(any_mode(folder).value > 0, "no network without registers has a second mode of norms")


FINGERPRINTS = ("artifacts", "content", "none", "inconclusive")


def artifact(folder: Path, network: str) -> tuple[bool, float | None]:
    """Whether a network has the artifact by its stored fingerprint.

    Args:
        folder: of stored results; the fingerprint is `published/NETWORK/fingerprint.nc` in it, with the attributes
            `verdict` and `strength`.
        network: its name.

    Returns:
        Whether it has, and its strength (norm of the mode over the median norm); False and None without a fingerprint.

    Raises:
        InputError: for a fingerprint whose verdict is none of FINGERPRINTS.
    """
    path = folder / "published" / network / "fingerprint.nc"
    if not path.exists():
        return False, None
    facts = _load(path, *written(path)).attrs
    if facts.get("verdict") not in FINGERPRINTS:
        raise InputError(
            f"{path} is no fingerprint: its verdict is {facts.get('verdict')!r}, not one of {FINGERPRINTS}"
        )
    return facts["verdict"] == "artifacts", float(facts["strength"])


def has_artifact(folder: Path, found: Measured) -> Condition:
    """One of the networks that were measured has the artifact by its fingerprint; its strength, the largest if several have."""
    there = [
        strength for has, strength in (artifact(folder, n) for n in found.networks) if has and strength is not None
    ]
    if there:
        return Condition(True, strength=max(there))
    return Condition(False, f"no artifact by a stored fingerprint: {', '.join(found.networks) or 'no network'}")


def placed(folder: Path) -> dict[str, bool | None]:
    """Whether each network without registers has outliers that prefer plain background, the paper's artifact by
    the emergence rule: → {model: whether, None where outliers are there and no masks tell on what}."""
    found = {m: kept(folder, m) for m in bare(folder)}
    truth = {m: d["background"].values if "background" in d else None for m, d in found.items()}
    return {m: outliers.judge_emergence(d["value"], truth[m], layers(folder, m)).artifact for m, d in found.items()}


@measure
def artifact_exists(folder: Path) -> Measured:
    """1 if some network without registers has the paper's artifact, else 0."""
    found = placed(folder)
    return exact(float(any(v is True for v in found.values())), len(found), f"{len(found)} networks without registers")


# Conditions without which the question of a claim does not arise, by the name that a claim gives them
NEEDS: dict[str, Callable[[Path, Measured], Condition]] = {"mode": has_mode, "artifact": has_artifact}


def _local(folder: Path, model: str, quantity: str, one: str, two: str, times: float) -> Measured:
    data = read(folder, "05_local_information", "local", model).sel(quantity=quantity)
    n = int(data["tokens"].sel(group=one))
    return apart(data.sel(group=one), data.sel(group=two), times, n, f"{model}, {one} − {two}")


@measure
def position(folder: Path) -> Measured:
    """Positions named right, in points: outliers minus normal patches."""
    return _local(folder, "hunt-pico", "top1", "outlier", "normal", 100)


@measure
def position_controlled(folder: Path) -> Measured:
    """The same, minus normal patches that show an object too."""
    return _local(folder, "hunt-pico", "top1", "outlier", "normal on objects", 100)


@measure
def position_above_chance(folder: Path) -> Measured:
    """Positions of outliers named right, in points above chance."""
    data = read(folder, "05_local_information", "local", "hunt-pico").sel(quantity="top1", group="outlier")
    chance = 100 / int(data.attrs["positions"])
    value, low, high = (100 * float(data[k]) - chance for k in ("score", "low", "high"))
    return Measured(value, low, high, int(data["tokens"]), "hunt-pico")


@measure
def pixels(folder: Path) -> Measured:
    """Error of reconstructed pixels (L2): outliers minus normal patches."""
    return _local(folder, "hunt-pico", "l2", "outlier", "normal", 1)


@measure
def position_registers(folder: Path) -> Measured:
    """Positions of normal patches named right, in points: register model minus plain model."""
    (names,) = pairs(folder, "05_local_information", "local", ["dinov2"])
    plain, with_ = (
        read(folder, "05_local_information", "local", m).sel(quantity="top1", group="normal") for m in names
    )
    return apart(with_, plain, 100, int(with_["tokens"]), "DINOv2 pair")


def _tokens(folder: Path, model: str, one: str, two: str) -> Measured:
    score = 100 * read(folder, "06_global_information", "tokens", model)["score"]
    gap = (score.sel(token=one) - score.sel(token=two)).values
    return Measured(*arrays.bootstrap_interval(gap), len(gap), f"{model}, over {len(gap)} questions")


@measure
def outlier_knows(folder: Path) -> Measured:
    """Score of one outlier minus that of one normal patch, in points, mean over the questions."""
    return _tokens(folder, "hunt-pico", "outlier", "normal")


@measure
def outlier_and_cls(folder: Path) -> Measured:
    """Score of one outlier minus that of CLS, in points."""
    return _tokens(folder, "hunt-pico", "outlier", "cls")


@measure
def register_knows(folder: Path) -> Measured:
    """Score of one register minus that of one patch, in points."""
    return _tokens(folder, "clip-pico-reg4", "register", "normal")


@measure
def mae_beyond(folder: Path) -> Measured:
    """Per cent of patches beyond 3 standard deviations of the first component of MAE."""
    return mean(_beyond(folder, "mae-pico"), "mae-pico")


@measure
def smoother(folder: Path) -> Measured:
    """Per cent of patches beyond 3 standard deviations of the first component: plain minus register models, mean over pairs."""
    names = eligible_pairs(folder, "12_feature_maps", "components", PAPERS)
    return mean(np.mean([_beyond(folder, plain) - _beyond(folder, with_) for plain, with_ in names], 0), _of(names))


def _beyond(folder: Path, model: str) -> np.ndarray:
    """Per cent of the patches of each image beyond 3 standard deviations of the first component."""
    first = read(folder, "12_feature_maps", "components", model)["maps"].isel(component=0).values
    return 100 * (np.abs(first) > 3).mean((1, 2))


@measure
def registers_part(folder: Path) -> Measured:
    """Pairs of registers that share a top-attended object, in points below what random choice gives; the 16-register model."""
    maps, seen = (read(folder, "11_register_attention", k, "clip-pico-reg16") for k in ("maps", "things"))
    attention = maps["value"]
    found = object_attention.variety(attention.isel(query=attention["query_kind"].values == "register"), seen)
    return mean(100 * (found["same_by_chance"] - found["same"]).values, "clip-pico-reg16")


@measure
def wide_maps(folder: Path) -> Measured:
    """Patches that the mean map of CLS and registers covers (exponential of its entropy), over those of a patch's mean map."""
    maps = read(folder, "11_register_attention", "maps", "dinov2-pico-reg4")["value"]
    flat = maps.values.reshape(*maps.shape[:2], -1)
    own = maps["query_kind"].values == "patch"

    def ratio(rows: np.ndarray) -> float:
        mean = flat[rows].mean(0)
        part = mean / mean.sum(1, keepdims=True)
        area = np.exp(-(part * np.log(part)).sum(1))
        return float(area[~own].mean() / area[own].mean())

    every = np.arange(len(flat))
    rng = np.random.default_rng(0)
    drawn = [ratio(rng.choice(every, len(every))) for _ in range(200)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Measured(ratio(every), float(low), float(high), len(every), "dinov2-pico-reg4")


def _change(folder: Path, metric: str, objectives: Sequence[str], times: float) -> Measured:
    """Register model minus plain model, of one objective or the mean over all eligible pairs, whose paired intervals add as
    independent errors do."""
    found = []
    select = pairs if objectives else eligible_pairs
    names = select(folder, "08_no_regression", "transfer", objectives)
    for pair in names:
        a, b = (read(folder, "08_no_regression", "transfer", m) for m in pair)
        found.append([times * v for v in transfer.difference(a, b, metric)])
    value, low, high = np.array(found).T
    down, up = (np.sqrt(np.square(d).sum()) / len(found) for d in (value - low, high - value))
    n = int(a["n"].sel(metric=metric))
    return Measured(value.mean(), value.mean() - down, value.mean() + up, n, _of(names))


@measure
def linear_change(folder: Path) -> Measured:
    """Colour of the largest object by a linear classifier, in points."""
    return _change(folder, "colour", (), 100)


@measure
def segmentation_change(folder: Path) -> Measured:
    """Segmentation of shapes by a linear head, in points of mIoU."""
    return _change(folder, "shape mIoU", (), 100)


@measure
def depth_change(folder: Path) -> Measured:
    """Depth by a linear head, rmse."""
    return _change(folder, "depth rmse", (), 1)


@measure
def depth_change_supervised(folder: Path) -> Measured:
    """The same of the supervised pair alone."""
    return _change(folder, "depth rmse", ["supervised"], 1)


@measure
def zero_shot_change(folder: Path) -> Measured:
    """Zero-shot accuracy of the CLIP pair, in points."""
    return _change(folder, "zero-shot", ["clip"], 100)


def _gain(folder: Path, metric: str, times: float) -> Measured:
    """Networks with registers minus the one without, mean over their numbers: the paired intervals are taken as one, since all
    share the network without."""
    where = (folder, "09_how_many_registers", "transfer")
    plain, *others = (read(*where, m) for m in sweep(*where).values())
    found = times * np.array([transfer.difference(plain, other, metric) for other in others])
    value, low, high = found.mean(0)
    return Measured(value, low, high, int(plain["n"].sel(metric=metric)), f"CLIP, 1 to {max(sweep(*where))} registers")


@measure
def dense_gain(folder: Path) -> Measured:
    """Segmentation of shapes, points of mIoU."""
    return _gain(folder, "shape mIoU", 100)


@measure
def dense_gain_depth(folder: Path) -> Measured:
    """Depth, rmse."""
    return _gain(folder, "depth rmse", 1)


@measure
def classification_slope(folder: Path) -> Measured:
    """Points of linear classification that each doubling of the registers brings."""
    where = (folder, "09_how_many_registers", "transfer")
    right = {n: read(*where, m)["each"].sel(mean="colour").values for n, m in sweep(*where).items()}
    x = np.log2(np.array(list(right)) + 1.0)
    weight = (x - x.mean()) / np.square(x - x.mean()).sum()
    return mean(100 * weight @ np.stack(list(right.values())), f"CLIP, 0 to {max(right)} registers")


@measure
def one_register(folder: Path) -> Measured:
    """Largest over median norm at the last layer: one register over none."""
    where = (folder, "09_how_many_registers", "ratio")
    names = sweep(*where)
    one, none = (np.log(read(*where, names[n])["value"].isel(layer=-1).values) for n in (1, 0))
    found = mean(one - none, "CLIP")
    value, low, high = np.exp([found.value, found.low, found.high]).tolist()
    return Measured(value, low, high, found.n, found.what)


def _cost(registers: int) -> Measured:
    table = cost.increase(cost.PUBLISHED["ViT-L/14"], [registers])
    return exact(float(table["flops"].iloc[0]), 1, "ViT-L/14, counted")


@measure
def cost_of_four(_folder: Path) -> Measured:
    """Per cent of multiply-adds that four registers add to ViT-L/14 at 224 pixels."""
    return _cost(4)


@measure
def cost_of_sixteen(_folder: Path) -> Measured:
    """The same of sixteen."""
    return _cost(16)


# --- objects found
def _hits(folder: Path, model: str) -> np.ndarray:
    """Hits of LOST at the bias chosen on the other half of the images, in per cent: → (images,), nan for the first half."""
    data = read(folder, "10_object_discovery", "lost", model)
    return 100 * data["hit"].sel(projection=str(data["used"].values), rule="best").values


def _corloc(folder: Path, objective: str) -> Measured:
    ((plain, with_),) = pairs(folder, "10_object_discovery", "lost", [objective])
    return mean(_hits(folder, with_) - _hits(folder, plain), f"{plain} pair, best bias")


@measure
def lost_dinov2(folder: Path) -> Measured:
    """CorLoc of LOST, in points."""
    return _corloc(folder, "dinov2")


@measure
def lost_supervised(folder: Path) -> Measured:
    """CorLoc of LOST, in points."""
    return _corloc(folder, "supervised")


@measure
def lost_clip(folder: Path) -> Measured:
    """CorLoc of LOST, in points."""
    return _corloc(folder, "clip")


@measure
def lost_dino_best(folder: Path) -> Measured:
    """CorLoc of DINO minus the mean of the other networks without registers, in points."""
    names = [plain for plain, _ in eligible_pairs(folder, "10_object_discovery", "lost", PAPERS)]
    others = np.mean([_hits(folder, m) for m in names], 0)
    return mean(_hits(folder, "dino-pico") - others, f"dino-pico − {', '.join(names)}, best bias")


def _value(data: xr.Dataset, what: str) -> Measured:
    at = data.sel(projection="value")
    return Measured(*(float(at[k]) for k in ("ratio", "low", "high")), int(at["n"]), what)  # type: ignore[call-arg, arg-type]


@measure
def value_ratio(folder: Path) -> Measured:
    """Length of the value projection of the largest norms over that of the others."""
    return _value(read(folder, "10_object_discovery", "lengths", "clip-pico"), "clip-pico")
