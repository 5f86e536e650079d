"""Labelled arrays: dimensions, the token index, patch maps, and bootstrap intervals over images."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike
from scipy.stats import DegenerateDataWarning, bootstrap

from vitregs.errors import InputError, unknown

KINDS = ("cls", "register", "patch", "distillation", "summary")
NUMBERED = ("register", "summary")  # kinds of which a model has several


def token_coords(kinds: Sequence[str], grid: tuple[int, int], dim: str = "token") -> dict[str, tuple[str, Any]]:
    """Label a token axis: kinds of all tokens, (rows, columns) of the patch grid → coordinates for xarray.

    Raises InputError for unknown kinds and if the number of patches is not rows × columns.
    """
    kind = np.asarray(kinds, np.str_)
    for name in set(kinds) - set(KINDS):
        raise unknown("kind of token", name, KINDS)
    patch = kind == "patch"
    if patch.sum() != grid[0] * grid[1]:
        raise InputError(f"{patch.sum()} patch tokens do not fill a grid of {grid[0]}x{grid[1]}")
    y, x = np.full(len(kind), -1), np.full(len(kind), -1)
    y[patch], x[patch] = np.divmod(np.arange(patch.sum()), grid[1])
    rank = {k: np.cumsum(kind == k) - 1 for k in KINDS}
    short = {"register": "reg", "distillation": "dist"}
    label = [
        f"{y[i]},{x[i]}" if k == "patch" else f"{short.get(k, k)}{rank[k][i] if k in NUMBERED or rank[k][i] else ''}"
        for i, k in enumerate(kind)
    ]
    return {"kind": (dim, kind), "label": (dim, label), "y": (dim, y), "x": (dim, x)}


def patch_maps(array: xr.DataArray) -> xr.DataArray:
    """Fold the patch tokens of an array (…, token) into maps (…, y, x); other kinds are dropped.

    Raises InputError unless the patches are all there, row after row.
    """
    patches = array.isel(token=np.flatnonzero(array["kind"] == "patch"))
    y, x = patches["y"].values, patches["x"].values
    rows, columns = (int(v.max(initial=-1)) + 1 for v in (y, x))
    if not len(y) or not np.array_equal(y * columns + x, np.arange(rows * columns)):
        raise InputError(f"{len(y)} patch tokens do not fill a grid of {rows}x{columns} row after row")
    lead = [d for d in patches.dims if d != "token"]
    values = patches.transpose(*lead, "token").values
    folded = values.reshape(*values.shape[:-1], rows, columns)
    coords = {k: v for k, v in patches.coords.items() if "token" not in v.dims}
    return xr.DataArray(folded, dims=[*lead, "y", "x"], coords=coords, attrs=array.attrs, name=array.name)


def patches(array: xr.DataArray) -> xr.DataArray:
    """Keep the patch tokens of an array with a token dimension."""
    return array.isel(token=np.flatnonzero(array["kind"] == "patch"))


def bootstrap_ratio(sums: ArrayLike, counts: ArrayLike, *, draws: int = 1000) -> tuple[float, float, float]:
    """Sum over count with a 95 % percentile bootstrap over images.

    Args:
        sums: One sum an image.
        counts: How many things each sum is over; resamples that count nothing are left out.
        draws: Resamples.

    Returns:
        Value, lower and upper end; nan where nothing is counted.
    """
    sums, counts = np.asarray(sums, float), np.asarray(counts, float)
    if not counts.sum():
        return np.nan, np.nan, np.nan

    def share(index: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return sums[index].sum(-1) / counts[index].sum(-1)

    return _percentile(share, len(sums), draws)


def bootstrap_interval(
    values: ArrayLike, *, draws: int = 2000, of: Callable[..., Any] = np.mean
) -> tuple[float, float, float]:
    """Mean (or `of`) of per-image values with a 95 % percentile bootstrap over images.

    Args:
        values: (images, …), what is known of each image.
        draws: Resamples.
        of: A statistic that takes an axis, as `np.median`.

    Returns:
        Value, lower and upper end; all the same where there is one image.

    Example:
        >>> bootstrap_interval([1.0, 1.0, 1.0])
        (1.0, 1.0, 1.0)
    """
    values = np.asarray(values, float)
    return _percentile(lambda index: of(values[index], axis=index.ndim - 1), len(values), draws)


def _percentile(statistic: Callable[[np.ndarray], Any], count: int, draws: int) -> tuple[float, float, float]:
    """A statistic of drawn images: function of their indices (…, images) → value, 95 % interval of its resamples."""
    index = np.arange(count)
    value = float(statistic(index))
    if count < 2:
        return value, value, value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # where all images agree, so do the ends
        found = bootstrap(
            (index,),
            lambda drawn, axis: statistic(np.moveaxis(drawn, axis, -1)),
            n_resamples=draws,
            method="percentile",
            vectorized=True,
            rng=np.random.default_rng(0),
        )
    low, high = np.nanquantile(found.bootstrap_distribution, [0.025, 0.975])
    return value, float(low), float(high)
