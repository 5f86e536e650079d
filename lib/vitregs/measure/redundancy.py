"""Where outliers sit: redundant patches, positions, groups of patches (Fig 4, 5a, 10)."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr

from vitregs import arrays
from vitregs.errors import InputError


def position_frequency(marked: xr.DataArray) -> xr.DataArray:
    """Share of images in which each grid position is an outlier: bool [image, token] → [y, x] (Fig 10)."""
    patch = arrays.patches(marked)
    rows, columns = int(patch.y.max()) + 1, int(patch.x.max()) + 1
    return xr.DataArray(patch.mean("image").values.reshape(rows, columns), dims=("y", "x"), name="occupancy")


def neighbour_similarity(embeddings: xr.DataArray) -> xr.DataArray:
    """Mean cosine similarity of each patch to its 4 neighbours (those that exist): [image, token, channel] → [image, token]
    (Fig 5a, on patch embeddings before positions are added)."""
    rows, columns = int(embeddings.y.max()) + 1, int(embeddings.x.max()) + 1
    e = embeddings.transpose("image", "token", "channel").values
    e = e / np.maximum(np.linalg.norm(e, axis=-1, keepdims=True), 1e-12)
    e = e.reshape(len(e), rows, columns, -1)
    total, count = np.zeros(e.shape[:3]), np.zeros((rows, columns))
    for axis in (0, 1):
        size = (rows, columns)[axis]
        near, far = [slice(None)] * 2, [slice(None)] * 2
        near[axis], far[axis] = slice(0, size - 1), slice(1, size)
        cosine = (e[:, *near] * e[:, *far]).sum(-1)
        for part in (near, far):
            total[:, *part] += cosine
            count[*part] += 1
    if not count.all():
        raise InputError("a grid of one patch has no neighbours")
    mean = (total / count).reshape(len(e), -1)
    coords = {k: v for k, v in embeddings.coords.items() if "channel" not in v.dims}
    return xr.DataArray(mean, dims=("image", "token"), coords=coords, name="similarity")


def share_by_group(marked: xr.DataArray, group: np.ndarray, names: Sequence[str], *, draws: int = 1000) -> pd.DataFrame:
    """Share of outliers among groups of patches, with a bootstrap over images: bool [image, token], group index of
    each patch (image, patch) (-1 leaves it out), names → rows with share, low, high (95 %; nan without tokens), tokens.
    """
    patch = arrays.patches(marked).transpose("image", "token").values
    rows = []
    for g, name in enumerate(names):
        here = group == g
        share, low, high = arrays.bootstrap_ratio((patch & here).sum(1), here.sum(1), draws=draws)
        rows.append({"group": name, "share": share, "low": low, "high": high, "tokens": int(here.sum())})
    return pd.DataFrame(rows)
