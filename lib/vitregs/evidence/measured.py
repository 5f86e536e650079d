"""A measured value, the registry of measures that claims can name, and stored results read back."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr

from vitregs import artifacts, results

PAIRS = ("supervised-pico", "clip-pico", "mae-pico", "dino-pico", "dinov2-pico")
Evidence = Callable[[Path], "Measured"]


@dataclass(frozen=True)
class Measured:
    """A measured value with its 95 % interval, how many things it rests on, and of what it is."""

    value: float
    low: float
    high: float
    n: int
    what: str

    def text(self) -> str:
        """The value with its interval, if it has one."""
        if self.low == self.high == self.value:
            return f"{self.value:.3g}"
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


MEASURES: dict[str, Evidence] = {}


def measure(function: Evidence) -> Evidence:
    """Enter a function of the results folder among the measures that a claim can name."""
    MEASURES[function.__name__] = function  # type: ignore[attr-defined]
    return function


def read(folder: Path, chapter: str, name: str, model: str) -> xr.Dataset:
    """One stored result: folder, chapter, name, model → Dataset. Raises Problem if it is missing."""
    return results.load(folder / chapter / f"{name}.{model}.nc")


def exact(value: float, n: int, what: str) -> Measured:
    """A number without an interval."""
    return Measured(value, value, value, n, what)


def mean(values: np.ndarray, what: str) -> Measured:
    """Mean of per-picture values."""
    kept = np.asarray(values, float)
    kept = kept[np.isfinite(kept)]
    return Measured(*artifacts.interval(kept), len(kept), what)


def apart(one: xr.Dataset, two: xr.Dataset, times: float, n: int, what: str) -> Measured:
    """Difference of two scores with their own intervals: the half-widths add as independent errors do."""
    (a, la, ha), (b, lb, hb) = ([float(d[k]) for k in ("score", "low", "high")] for d in (one, two))
    down, up = np.hypot(a - la, hb - b), np.hypot(ha - a, b - lb)
    return Measured(times * (a - b), times * (a - b - down), times * (a - b + up), n, what)


NEEDS: dict[str, Callable[[Path], bool]] = {}
