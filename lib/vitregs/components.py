"""Principal components of feature maps: what varies most from patch to patch (Fig 17, 20)."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr
from scipy.stats import kurtosis

from vitregs import artifacts, capture
from vitregs.backbones import Backbone
from vitregs.images import Images
from vitregs.problems import Problem
from vitregs.results import grid


def principal(states: xr.DataArray, *, count: int = 3, joint: bool = False) -> xr.Dataset:
    """First principal components of the patches of each picture, or of all together: [image, token, channel] → Dataset with
    maps [image, component, y, x], whitened (mean 0, spread 1 over the patches analysed), and variance [image, component], the
    share of the variance that each holds.

    The sign is that of a positive skew, so that few bright patches stand out of many dark ones. The paper whitens, and does not
    say whether pictures are analysed apart. Raises Problem for more components than patches or channels.
    """
    patch = artifacts.patches(states).transpose("image", "token", "channel")
    x = patch.values.astype(np.float64)
    images, tokens, channels = x.shape
    rows = x.reshape(1, images * tokens, channels) if joint else x
    most = min(rows.shape[1] - 1, channels)
    if not 1 <= count <= most:
        raise Problem(f"there are 1 to {most} components of these {rows.shape[1]} patches, not {count}")
    left, size, _ = np.linalg.svd(rows - rows.mean(1, keepdims=True), full_matrices=False)
    scores = left[..., :count] * np.sqrt(rows.shape[1])
    scores *= np.where((scores**3).mean(1, keepdims=True) < 0, -1, 1)
    share = size**2 / np.maximum((size**2).sum(1, keepdims=True), 1e-30)
    share = np.broadcast_to(share[:, :count], (images, count))
    labels = {k: v for k, v in patch.coords.items() if "channel" not in v.dims}
    maps = xr.DataArray(scores.reshape(images, tokens, count), dims=("image", "token", "component"), coords=labels)
    return xr.Dataset(
        {
            "maps": grid(maps.transpose("image", "component", "token")),
            "variance": (("image", "component"), share),
        }
    ).assign_coords(component=range(1, count + 1))


def of_patches(backbone: Backbone, images: Images, *, final_norm: bool = True, joint: bool = False) -> xr.Dataset:
    """First principal components of what leaves the last block of a network (Fig 17, 20).

    Args:
        backbone: a network.
        images: what it sees.
        final_norm: whether its final norm is applied first.
        joint: one analysis of all images together, or one for each.

    Returns:
        What `principal` gives.
    """
    return principal(capture.tokens(backbone, images, final_norm=final_norm), joint=joint)


def colours(maps: xr.DataArray, limit: float = 2.3) -> np.ndarray:
    """The first three components as red, green and blue, clipped at a number of spreads: [image, component, y, x] → (n, y, x, 3)
    in [0, 1] (Fig 17)."""
    if maps.sizes["component"] < 3:
        raise Problem("three components make colours: ask principal for count=3")
    first = maps.isel(component=slice(3)).transpose("image", "y", "x", "component").values
    return np.clip(first / (2 * limit) + 0.5, 0, 1)


def summary(
    found: Mapping[str, xr.Dataset],
    norms: Mapping[str, xr.DataArray],
    grounds: Mapping[str, np.ndarray | None],
) -> pd.DataFrame:
    """What the first component shows: {model: principal(…)}, norms [image, token], {model: background share (pictures, patches)
    or None} → a row a model with means and 95 % intervals over pictures (Fig 20, 21).

    variance: its share; beyond: per cent of patches beyond 3 spreads (0.3 for a normal law); kurtosis (3 for a normal law); norm
    and background: absolute rank correlation of the map with the norm and with the share of background.
    """
    rows = []
    for name, data in found.items():
        first = data["maps"].isel(component=0)
        flat = first.values.reshape(first.sizes["image"], -1)
        lengths = artifacts.patches(norms[name]).transpose("image", "token").values
        ground = grounds[name]
        quantities = {
            "variance, %": 100 * data["variance"].isel(component=0).values,
            "beyond 3σ, %": 100 * (np.abs(flat) > 3).mean(1),
            "kurtosis": kurtosis(flat, axis=1, fisher=False),
            "with norm": _alike(flat, lengths),
            "with background": None if ground is None else _alike(flat, ground),
        }
        row = {"model": name}
        for key, values in quantities.items():
            if values is None:
                row[key] = "no masks"
                continue
            mean, low, high = artifacts.interval(values[np.isfinite(values)])
            row[key] = f"{mean:.2f} [{low:.2f}, {high:.2f}]"
        rows.append(row)
    return pd.DataFrame(rows)


def _alike(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Absolute rank correlation in each picture: (n, patches) twice → (n,), nan where a side is constant."""
    ranks = [pd.DataFrame(v).rank(axis=1).to_numpy() for v in (one, two)]
    a, b = (r - r.mean(1, keepdims=True) for r in ranks)
    with np.errstate(invalid="ignore"):
        return np.abs((a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1)))
