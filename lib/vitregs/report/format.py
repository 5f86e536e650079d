"""Numbers as text."""

from collections.abc import Iterable

import numpy as np


def cell(interval: Iterable[float], digits: int = 2) -> str:
    """A number with its interval, as text: value, low, high → "value [low, high]", a dash for nan."""
    value, low, high = interval
    return "–" if np.isnan(value) else f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
