"""Quantities of published networks: arrays of `data/results/published` become the numbers that claims name.

The network is DeiT-Tiny; where the paper compares without and with registers, it is DeiT-Tiny with a test-time register, which
stands for a trained pair and is named as what it is. Images are COCO's, labels Imagenette's, Tiny-ImageNet's and CIFAR-10's.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import xarray as xr

from vitregs import arrays
from vitregs.claims.measures import Measured, _load, apart, exact, mean, measure, rests_on, written
from vitregs.measure import attention, outliers
from vitregs.probes import transfer

PLAIN = "deit_tiny_patch16_224"
CURED = f"{PLAIN}+tt1"  # register neurons moved to one appended token
PAIR = "DeiT-Tiny with and without a test-time register"
SETS = ("imagenette", "tiny_imagenet", "cifar10")
SETTING = ("value", "length 1, centred")  # of LOST, whose boxes stay smaller than the image


def real(folder: Path, network: str, name: str) -> xr.Dataset:
    """One stored array of a published network: folder of results, network, name → Dataset, half precision widened. Raises
    InputError if it is missing."""
    rests_on(network.partition("+")[0])  # the artifact is that of the untouched network
    rests_on(network)
    path = folder / "published" / network / f"{name}.nc"
    data = _load(path, *written(path))
    return data.map(lambda v: v.astype(np.float32) if v.dtype == np.float16 else v, keep_attrs=True)


def _measured(ends: Iterable[float], n: int, what: str) -> Measured:
    """A value with its interval: (value, low, high), how many, of what."""
    value, low, high = ends
    return Measured(value, low, high, n, what)


def _part(folder: Path, part: str) -> tuple[float, float, float, float]:
    """A part of the stored fingerprint: → value, low, high, control."""
    data = real(folder, PLAIN, "fingerprint")
    at = data.sel(part=part)
    return tuple(float(at[k]) for k in ("value", "low", "high", "control"))  # type: ignore[return-value]


def _fact(folder: Path, name: str) -> float:
    return float(real(folder, PLAIN, "fingerprint").attrs[name])


def _last(folder: Path, network: str) -> xr.DataArray:
    """Norms at the last layer: → [image, token]."""
    return real(folder, network, "norms")["value"].isel(layer=-1)


def _marked(folder: Path) -> np.ndarray:
    """Outliers of the untouched network at its last layer: → (images, patches)."""
    at = _last(folder, PLAIN)
    return arrays.patches(outliers.mark_outliers(at, outliers.find_cutoff(at))).transpose("image", "token").values


# --- the artifact
@measure
def real_mode(folder: Path) -> Measured:
    """Per cent of patches in the mode."""
    low, high = _fact(folder, "mode: share_low"), _fact(folder, "mode: share_high")
    return Measured(100 * _fact(folder, "mode: share"), 100 * low, 100 * high, 1, "DeiT-Tiny on COCO")


@measure
def real_strength(folder: Path) -> Measured:
    """Typical norm of the mode over the median norm."""
    value, low, high, _ = _part(folder, "mode")
    return Measured(value, low, high, 1, "DeiT-Tiny on COCO")


@measure
def real_rise(folder: Path) -> Measured:
    """First layer from which marked patches lie above the others, as a share of the depth."""
    depth = int(real(folder, PLAIN, "norms")["layer"].max())
    return exact(_fact(folder, "mode: rise") / depth, 1, "DeiT-Tiny on COCO")


@measure
def real_similarity(folder: Path) -> Measured:
    """Cosine to the neighbours at the patch embedding: marked minus other patches."""
    found = [_fact(folder, f"place: {k}") for k in ("gap", "gap_low", "gap_high")]
    return _measured(found, 1, "DeiT-Tiny on COCO")


@measure
def real_background(folder: Path) -> Measured:
    """Share of pure background among marked patches, in per cent, minus that among the others."""
    names = ("background", "background_low", "background_high")
    others = _fact(folder, "place: background_others")
    value, low, high = (100 * (_fact(folder, f"place: {k}") - others) for k in names)
    return Measured(value, low, high, 1, "DeiT-Tiny on COCO")


@measure
def real_sink(folder: Path) -> Measured:
    """Attention of all queries that marked patches receive, in fair shares."""
    value, low, high, _ = _part(folder, "attention")
    return Measured(value, low, high, 1, "DeiT-Tiny on COCO")


@measure
def real_half(folder: Path) -> Measured:
    """Least number of MLP neurons that write half of the shift, in per cent of all."""
    value, low, high, total = _part(folder, "neurons")
    return _measured((100 * v / total for v in (value, low, high)), int(total), "DeiT-Tiny on COCO")


@measure
def real_border(folder: Path) -> Measured:
    """Share of marked patches on border cells over these cells' share of all."""
    marked = _marked(folder)
    patch = arrays.patches(_last(folder, PLAIN))
    y, x = patch["y"].values, patch["x"].values
    edge = (y == 0) | (x == 0) | (y == y.max()) | (x == x.max())
    found = arrays.bootstrap_ratio(marked[:, edge].sum(1), marked.sum(1))
    return _measured((v / edge.mean() for v in found), len(marked), "DeiT-Tiny on COCO")


# --- attention
def _peaks(folder: Path, network: str) -> xr.DataArray:
    return real(folder, network, "cls_attention")["value"]


@measure
def real_peak(folder: Path) -> Measured:
    """Part of the CLS attention to patches that falls on one, in per cent: without minus with a test-time register."""
    peaks = [attention.peak_share(_peaks(folder, n)).isel(layer=-1, query=0).values for n in (PLAIN, CURED)]
    return mean(100 * (peaks[0] - peaks[1]), PAIR)


@measure
def real_heads(folder: Path) -> Measured:
    """Fair shares of CLS attention on marked patches in the head that attends to them least."""
    rows = arrays.patches(_peaks(folder, PLAIN)).isel(layer=-1, query=0).transpose("image", "head", "token").values
    marked = _marked(folder)
    part = rows / rows.sum(-1, keepdims=True) * rows.shape[-1]
    each = [arrays.bootstrap_ratio((part[:, h] * marked).sum(1), marked.sum(1)) for h in range(rows.shape[1])]
    least = min(each)
    return _measured(least, len(rows), f"DeiT-Tiny on COCO, the least of {len(each)} heads")


# --- what tokens know
def _local(folder: Path, quantity: str, one: str, two: str, times: float) -> Measured:
    data = real(folder, PLAIN, "local").sel(quantity=quantity)
    n = int(data["tokens"].sel(group=one))
    return apart(data.sel(group=one), data.sel(group=two), times, n, f"DeiT-Tiny on COCO, {one} − {two}")


@measure
def real_position(folder: Path) -> Measured:
    """Positions named right, in points: outliers minus normal patches."""
    return _local(folder, "top1", "outlier", "normal", 100)


@measure
def real_position_left(folder: Path) -> Measured:
    """Positions of outliers named right, in points above chance."""
    data = real(folder, PLAIN, "local")
    at = data.sel(quantity="top1", group="outlier")
    chance = 100 / int(data.attrs["positions"])
    value, low, high = (100 * float(at[k]) - chance for k in ("score", "low", "high"))
    return Measured(value, low, high, int(at["tokens"]), "DeiT-Tiny on COCO")


@measure
def real_pixels(folder: Path) -> Measured:
    """Error of reconstructed pixels (L2): outliers minus normal patches."""
    return _local(folder, "l2", "outlier", "normal", 1)


@measure
def real_position_kept(folder: Path) -> Measured:
    """Positions of normal patches named right with a test-time register, in per cent of those without.

    In per cent, since DeiT-Tiny names few: a loss of all of them would be less than the points that the paper's networks vary by.
    """
    with_, plain = (real(folder, n, "local").sel(quantity="top1", group="normal") for n in (CURED, PLAIN))
    gap, base = apart(with_, plain, 100, int(with_["tokens"]), PAIR), float(plain["score"])
    return _measured((100 + v / base for v in (gap.value, gap.low, gap.high)), gap.n, PAIR)


def _tokens(folder: Path, name: str, one: tuple[str, str], two: tuple[str, str]) -> Measured:
    """Top-1 of one token less that of another, (network, token) each, in points."""
    a, b = (real(folder, n, f"tokens_on_{name}").isel(task=0).sel(token=t) for n, t in (one, two))
    return apart(a, b, 100, int(a["n"]), f"DeiT-Tiny, {name.replace('_', '-')}")


def _mean_of_sets(folder: Path, one: tuple[str, str], two: tuple[str, str], what: str) -> Measured:
    """Mean over the data sets, whose intervals add as independent errors do."""
    found = [_tokens(folder, name, one, two) for name in SETS]
    value, low, high = (np.array([getattr(f, k) for f in found]) for k in ("value", "low", "high"))
    down, up = (float(np.sqrt(np.square(d).sum()) / len(found)) for d in (value - low, high - value))
    middle = float(value.mean())
    return Measured(middle, middle - down, middle + up, sum(f.n for f in found), what)


@measure
def real_outlier_knows(folder: Path) -> Measured:
    """Top-1 of one outlier minus that of one normal patch, in points, mean over three data sets."""
    return _mean_of_sets(folder, (PLAIN, "outlier"), (PLAIN, "normal"), "DeiT-Tiny, three data sets")


@measure
def real_outlier_and_cls(folder: Path) -> Measured:
    """Top-1 of one outlier minus that of CLS, in points, mean over three data sets."""
    return _mean_of_sets(folder, (PLAIN, "outlier"), (PLAIN, "cls"), "DeiT-Tiny, three data sets")


@measure
def real_register_knows(folder: Path) -> Measured:
    """Top-1 of the test-time register minus that of one normal patch, in points, mean over three data sets."""
    return _mean_of_sets(folder, (CURED, "register"), (CURED, "normal"), "DeiT-Tiny+tt1, three data sets")


# --- with and without a register
def _ratio(folder: Path, network: str) -> np.ndarray:
    return np.log(outliers.largest_ratio(real(folder, network, "norms")["value"]).isel(layer=-1).values)


@measure
def real_tails(folder: Path) -> Measured:
    """Largest over median patch norm in the last layer: with over without a test-time register."""
    found = mean(_ratio(folder, CURED) - _ratio(folder, PLAIN), PAIR)
    value, low, high = np.exp([found.value, found.low, found.high]).tolist()
    return Measured(value, low, high, found.n, PAIR)


@measure
def real_vanish(folder: Path) -> Measured:
    """Per cent of patches above the untouched network's cut-off that are left with a test-time register."""
    cut = outliers.find_cutoff(_last(folder, PLAIN))
    left = arrays.patches(outliers.mark_outliers(_last(folder, CURED), cut)).mean("token").values
    before = _marked(folder).mean(1)
    value, low, high = arrays.bootstrap_ratio(left, before)
    return Measured(100 * value, 100 * low, 100 * high, len(left), PAIR)


def _registers(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    at = _last(folder, CURED).transpose("image", "token")
    kind = np.asarray(at["kind"])
    return at.values[:, kind == "register"], at.values[:, kind == "patch"]


@measure
def real_register_height(folder: Path) -> Measured:
    """Register norm over the median patch norm, mean over images."""
    register, patch = _registers(folder)
    return mean(register.max(1) / np.median(patch, 1), "DeiT-Tiny+tt1 on COCO")


def variation(register: np.ndarray, patch: np.ndarray) -> tuple[float, float, float]:
    """Variation of registers' norms over images, as a share of that of patch norms (coefficients of variation): (images,
    registers), (images, patches) → value, low, high (95 %, a bootstrap over images)."""
    draw = np.random.default_rng(0)

    def of(index: np.ndarray) -> float:
        r, p = register[index], patch[index]
        return float((r.std(0) / r.mean(0)).mean() / (p.std() / p.mean()))

    found = [of(draw.integers(0, len(register), len(register))) for _ in range(200)]
    low, high = np.quantile(found, [0.025, 0.975])
    return of(np.arange(len(register))), float(low), float(high)


@measure
def real_register_bands(folder: Path) -> Measured:
    """Variation of the register's norm over images, as a share of that of patch norms (coefficients of variation)."""
    register, patch = _registers(folder)
    return _measured(variation(register, patch), len(register), "DeiT-Tiny+tt1 on COCO")


def _gain(folder: Path, name: str, metric: str) -> Measured:
    first, second = (real(folder, n, name) for n in (PLAIN, CURED))
    value, low, high = (100 * v for v in transfer.difference(first, second, metric))
    return Measured(value, low, high, int(first["n"].sel(metric=metric)), PAIR)


@measure
def real_linear(folder: Path) -> Measured:
    """Linear classification on Imagenette, points: with minus without a test-time register."""
    return _gain(folder, "transfer_on_imagenette", "label")


@measure
def real_segmentation(folder: Path) -> Measured:
    """Linear segmentation on COCO, points of mIoU: with minus without a test-time register."""
    return _gain(folder, "transfer", "mask mIoU")


def _changed(folder: Path, name: str, what: str, one: str, two: str) -> np.ndarray:
    """One quantity of two rows of the table of interventions, in each image: the first less the second."""
    data = real(folder, PLAIN, name)[what]
    return (data.sel(change=one) - data.sel(change=two)).values


@measure
def real_top1(folder: Path) -> Measured:
    """Top-1 of the trained head on Imagenette, points: with minus without a test-time register."""
    return mean(100 * _changed(folder, "interventions_on_imagenette", "right", "+tt1", "untouched"), PAIR)


def _dose(folder: Path, name: str, what: str, dose: float) -> np.ndarray:
    data = real(folder, PLAIN, name)[what]
    return (data.sel(dose=dose) - data.sel(dose=0)).values


@measure
def real_one_zero(folder: Path) -> Measured:
    """Largest over median norm: one zero token over none."""
    data = real(folder, PLAIN, "artifact_by_dose")["largest"]
    found = mean(np.log((data.sel(dose=1) / data.sel(dose=0)).values), "DeiT-Tiny on COCO, zero tokens")
    value, low, high = np.exp([found.value, found.low, found.high]).tolist()
    return Measured(value, low, high, found.n, found.what)


@measure
def real_eight_zeros(folder: Path) -> Measured:
    """Per cent of patches above 1.6 x the median: eight zero tokens minus none."""
    return mean(100 * _dose(folder, "artifact_by_dose", "share", 8), "DeiT-Tiny on COCO, zero tokens")


@measure
def real_zero_price(folder: Path) -> Measured:
    """Top-1 of the trained head, points: eight zero tokens minus none."""
    return mean(100 * _dose(folder, "answers_by_dose", "right", 8), "DeiT-Tiny on Imagenette, zero tokens")


@measure
def real_zero_lost(folder: Path) -> Measured:
    """CorLoc of LOST, points: eight zero tokens minus none."""
    return mean(100 * _dose(folder, "lost_by_dose", "hit", 8), "DeiT-Tiny on COCO, zero tokens")


@measure
def real_zero_dense(folder: Path) -> Measured:
    """Linear segmentation, points of mIoU: eight zero tokens minus none."""
    data = real(folder, PLAIN, "segments_by_dose")
    pair = np.stack([data["counts"].sel(dose=d).values.astype(float) for d in (0, 8)], 1)
    there = (pair.sum((2, 3)) > 0).all(1)
    value, low, high = arrays.bootstrap_interval(pair[there], draws=1000, of=transfer._gain)
    return Measured(100 * value, 100 * low, 100 * high, int(there.sum()), "DeiT-Tiny on COCO, zero tokens")


def _hits(folder: Path, network: str) -> np.ndarray:
    data = real(folder, network, "corloc")["hit"]
    return 100 * data.sel(projection=SETTING[0], setting=SETTING[1]).values


@measure
def real_lost(folder: Path) -> Measured:
    """CorLoc of LOST on values of length 1, centred bias, points: with minus without a test-time register."""
    return mean(_hits(folder, CURED) - _hits(folder, PLAIN), PAIR)


@measure
def real_value_ratio(folder: Path) -> Measured:
    """Length of the values of the largest norms over that of the others."""
    at = real(folder, PLAIN, "lengths").sel(projection="value")
    return _measured((float(at[k]) for k in ("ratio", "low", "high")), int(at["n"]), "DeiT-Tiny on COCO")


def areas(maps: xr.DataArray) -> np.ndarray:
    """Patches that the mean map of each query covers, the exponential of its entropy: [image, query, y, x] → (queries,)."""
    mean_ = maps.transpose("image", "query", "y", "x").values.astype(float).mean(0).reshape(maps.sizes["query"], -1)
    part = mean_ / mean_.sum(1, keepdims=True)
    return np.exp(-(part * np.log(np.maximum(part, 1e-12))).sum(1))


def breadth(maps: xr.DataArray, draws: int = 200) -> tuple[float, float, float]:
    """Patches that the mean maps of CLS and registers cover over those of patches' own: [image, query, y, x] → value, low, high
    (95 %, a bootstrap over images)."""
    own = maps["query_kind"].values == "patch"
    rng = np.random.default_rng(0)
    count = maps.sizes["image"]

    def ratio(rows: np.ndarray) -> float:
        found = areas(maps.isel(image=rows))
        return float(found[~own].mean() / found[own].mean())

    low, high = np.quantile([ratio(rng.choice(count, count)) for _ in range(draws)], [0.025, 0.975])
    return ratio(np.arange(count)), float(low), float(high)


@measure
def real_wide_maps(folder: Path) -> Measured:
    """Patches that the mean maps of CLS and the register cover (exponential of their entropy) over those of a patch's own."""
    maps = real(folder, CURED, "maps")["value"]
    return _measured(breadth(maps), maps.sizes["image"], "DeiT-Tiny+tt1 on COCO")


def _beyond(folder: Path, network: str) -> np.ndarray:
    first = real(folder, network, "components")["maps"].isel(component=0).values
    return 100 * (np.abs(first) > 3).mean((1, 2))


@measure
def real_smooth(folder: Path) -> Measured:
    """Per cent of patches beyond 3 standard deviations of the first component: without minus with a test-time register."""
    return mean(_beyond(folder, PLAIN) - _beyond(folder, CURED), PAIR)


# --- interventions: the neurons moved or silenced, against as many random ones
@measure
def moved_outliers(folder: Path) -> Measured:
    """Per cent of patches above 1.6 x the median: register neurons moved minus random neurons moved."""
    return mean(100 * _changed(folder, "interventions", "share", "+tt1", "+random1"), "DeiT-Tiny on COCO")


@measure
def silenced_outliers(folder: Path) -> Measured:
    """The same: register neurons silenced, no token, minus untouched."""
    return mean(100 * _changed(folder, "interventions", "share", "+suppressed", "untouched"), "DeiT-Tiny on COCO")


@measure
def moved_sink(folder: Path) -> Measured:
    """Fair shares of attention that the most attended patch receives: moved minus random."""
    return mean(_changed(folder, "interventions", "sink", "+tt1", "+random1"), "DeiT-Tiny on COCO")


@measure
def moved_cls(folder: Path) -> Measured:
    """Fair shares of CLS attention on the most attended patch: moved minus random."""
    return mean(_changed(folder, "interventions", "cls", "+tt1", "+random1"), "DeiT-Tiny on COCO")


@measure
def moved_top1(folder: Path) -> Measured:
    """Top-1 of the trained head, points: moved minus random."""
    return mean(
        100 * _changed(folder, "interventions_on_imagenette", "right", "+tt1", "+random1"), "DeiT-Tiny on Imagenette"
    )


@measure
def moved_global(folder: Path) -> Measured:
    """Top-1 of the patch with the largest norm on Imagenette, points: with minus without a test-time register."""
    return _tokens(folder, "imagenette", (CURED, "outlier"), (PLAIN, "outlier"))


@measure
def moved_lost(folder: Path) -> Measured:
    """CorLoc of LOST, points: register neurons moved minus random neurons moved."""
    return mean(_hits(folder, CURED) - _hits(folder, f"{PLAIN}+random1"), "DeiT-Tiny on COCO")


@measure
def moved_values(folder: Path) -> Measured:
    """Length of the values of the largest norms over that of the others, with a test-time register."""
    at = real(folder, CURED, "lengths").sel(projection="value")
    return _measured((float(at[k]) for k in ("ratio", "low", "high")), int(at["n"]), "DeiT-Tiny+tt1 on COCO")
