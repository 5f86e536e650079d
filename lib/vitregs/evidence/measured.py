"""A measured value, the registry of measures that claims can name, and stored results read back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from vitregs import artifacts, backbones, results
from vitregs.pairs import register_pairs
from vitregs.problems import Problem

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
    return _load(folder / chapter / f"{name}.{model}.nc", *written(folder / chapter / f"{name}.{model}.nc"))


def written(path: Path) -> tuple[int, int]:
    """Which version of a file is there: path → inode and time, zeros without a file."""
    if not path.exists():
        return 0, 0
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


@lru_cache(maxsize=64)  # many claims ask the same arrays
def _load(path: Path, _inode: int, _time: int) -> xr.Dataset:
    return results.load(path)


def stored(folder: Path, chapter: str, name: str) -> list[str]:
    """Models of which a chapter keeps a result: folder, chapter, name → their names. Raises Problem if there are none."""
    found = sorted(p.name.removeprefix(f"{name}.").removesuffix(".nc") for p in (folder / chapter).glob(f"{name}.*.nc"))
    if not found:
        raise Problem(f"cannot read results {folder / chapter}/{name}.*.nc: there are none")
    return found


def pairs(folder: Path, chapter: str, name: str, objectives: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Pairs of a chapter without and with four registers, of the first seed: folder, chapter, name, objectives (none: all) →
    (without, with). Raises Problem for an objective that has no such pair."""
    found = {_recipe(b)["objective"]: (a, b) for a, b in _pairs(folder, chapter, name) if _recipe(b)["registers"] == 4}
    missing = [o for o in objectives if o not in found]
    if missing or not found:
        raise Problem(f"no pair without and with registers of {missing or 'any objective'} in {folder / chapter}")
    return [found[o] for o in objectives or found]


def sweep(folder: Path, chapter: str, name: str) -> dict[int, str]:
    """The most numbers of registers that a chapter keeps of one recipe, 0 among them: → {registers: model}."""
    every = _pairs(folder, chapter, name)
    plain = max((a for a, _ in every), key=[a for a, _ in every].count, default="")
    found = {0: plain} | {int(_recipe(b)["registers"]): b for a, b in every if a == plain}
    return dict(sorted(found.items()))


def _pairs(folder: Path, chapter: str, name: str) -> list[tuple[str, str]]:
    return [(a, b) for a, b in register_pairs(stored(folder, chapter, name)) if _recipe(a)["seed"] == 0]


def _recipe(model: str) -> dict[str, Any]:
    return backbones.card(model)["recipe"]


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
