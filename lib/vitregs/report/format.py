"""Numbers as text."""

from collections.abc import Iterable

import numpy as np


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
