"""Feature maps (Fig 17, 20): tables and colours."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr
from scipy.stats import kurtosis

from vitregs import arrays
from vitregs.errors import InputError
from vitregs.report.format import cell


def colours(maps: xr.DataArray, limit: float = 2.3) -> np.ndarray:
    """The first three components as red, green and blue, clipped at a number of standard deviations: [image,
    component, y, x] → (n, y, x, 3) in [0, 1] (Fig 17)."""
    if maps.sizes["component"] < 3:
        raise InputError("three components make colours: ask principal for count=3")
    first = maps.isel(component=slice(3)).transpose("image", "y", "x", "component").values
    return np.clip(first / (2 * limit) + 0.5, 0, 1)


def summary(
    found: Mapping[str, xr.Dataset],
    norms: Mapping[str, xr.DataArray],
    backgrounds: Mapping[str, np.ndarray | None],
) -> pd.DataFrame:
    """What the first component shows: {model: principal(…)}, norms [image, token], {model: background share (images, patches)
    or None} → a row a model with means and 95 % intervals over images (Fig 20, 21).

    variance: its share; beyond: per cent of patches beyond 3 standard deviations (0.3 for a normal law); kurtosis (3
    for a normal law); norm and background: absolute rank correlation of the map with the norm and with the share of
    background.
    """
    rows = []
    for name, data in found.items():
        first = data["maps"].isel(component=0)
        flat = first.values.reshape(first.sizes["image"], -1)
        lengths = arrays.patches(norms[name]).transpose("image", "token").values
        background = backgrounds[name]
        quantities = {
            "variance, %": 100 * data["variance"].isel(component=0).values,
            "beyond 3σ, %": 100 * (np.abs(flat) > 3).mean(1),
            "kurtosis": kurtosis(flat, axis=1, fisher=False),
            "with norm": _alike(flat, lengths),
            "with background": None if background is None else _alike(flat, background),
        }
        row = {"model": name}
        for key, values in quantities.items():
            if values is None:
                row[key] = "no masks"
                continue
            row[key] = cell(arrays.bootstrap_interval(values[np.isfinite(values)]))
        rows.append(row)
    return pd.DataFrame(rows)


def beyond(found: Mapping[str, xr.Dataset], limit: float = 3) -> pd.DataFrame:
    """Patches that lie far out in the first component: {model: principal(…)}, the one without registers first, standard
    deviations → a row a model with 95 % intervals over images, in per cent, and the first minus each in points (Fig 20)."""
    shares = {
        name: 100 * (np.abs(data["maps"].isel(component=0).values) > limit).mean((1, 2)) for name, data in found.items()
    }
    first = next(iter(shares.values()))
    return pd.DataFrame(
        {
            "model": name,
            f"beyond {limit:g}σ, %": cell(arrays.bootstrap_interval(share), 3),
            "the first minus it, points": "–"
            if share is first
            else cell(arrays.bootstrap_interval(first - share), 3, "+"),
        }
        for name, share in shares.items()
    )


def _alike(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Absolute rank correlation in each image: (n, patches) twice → (n,), nan where a side is constant."""
    ranks = [pd.DataFrame(v).rank(axis=1).to_numpy() for v in (one, two)]
    a, b = (r - r.mean(1, keepdims=True) for r in ranks)
    with np.errstate(invalid="ignore"):
        return np.abs((a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1)))
