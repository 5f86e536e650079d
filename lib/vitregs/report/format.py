"""Numbers as text."""

from collections.abc import Iterable

import numpy as np

from vitregs.models import test_time


def cell(interval: Iterable[float], digits: int = 2, sign: str = "") -> str:
    """A number with its interval, as text: value, low, high, "+" to show signs → "value [low, high]",
    a dash for nan."""
    numbers = list(interval)
    value, low, high = (f"{v:{sign}.{digits}f}" for v in numbers)
    return "–" if np.isnan(numbers[0]) else f"{value} [{low}, {high}]"


def yes(value: bool | None) -> str:
    """An answer as a word: "yes", "no", or "?" where it is not known."""
    return {True: "yes", False: "no", None: "?"}[value]


def per_cent(interval: tuple[float, float, float] | None) -> str:
    """A share with its interval, in per cent with one decimal; empty where it is not known."""
    return "" if interval is None else cell((100 * v for v in interval), 1)


def variants(names: Iterable[str]) -> dict[str, str]:
    """Short names for figures: names → {name: "untouched" or what was done to it, as "+tt1"} where all are one network; else
    the names themselves."""
    told = {name: test_time.split(name) for name in names}
    one = len({network for network, _ in told.values()}) == 1 < len(told)
    return {name: (ending or "untouched") if one else name for name, (_, ending) in told.items()}
