"""Evidence on what tokens and feature maps hold (Fig 5b, 17, 20, Tables 1, 4, 5)."""

from pathlib import Path

import numpy as np

from vitregs import artifacts
from vitregs.evidence.measured import PAPERS, Measured, apart, mean, measure, pairs, read


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
    return Measured(*artifacts.interval(gap), len(gap), f"{model}, over {len(gap)} questions")


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
    """Per cent of patches beyond 3 spreads of the first component of MAE."""
    return mean(_beyond(folder, "mae-pico"), "mae-pico")


@measure
def smoother(folder: Path) -> Measured:
    """Per cent of patches beyond 3 spreads of the first component: plain minus register models, three pairs."""
    names = pairs(folder, "12_feature_maps", "components", PAPERS)
    return mean(np.mean([_beyond(folder, plain) - _beyond(folder, with_) for plain, with_ in names], 0), "three pairs")


def _beyond(folder: Path, model: str) -> np.ndarray:
    """Per cent of the patches of each image beyond 3 standard deviations of the first component."""
    first = read(folder, "12_feature_maps", "components", model)["maps"].isel(component=0).values
    return 100 * (np.abs(first) > 3).mean((1, 2))
