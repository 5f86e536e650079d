"""From token norms to outliers."""

import numpy as np
import xarray as xr


def patches(array: xr.DataArray) -> xr.DataArray:
    """Keep the patch tokens of an array with a token dimension."""
    return array.isel(token=np.flatnonzero(array["kind"] == "patch"))


def largest_ratio(norms: xr.DataArray) -> xr.DataArray:
    """Largest over median patch norm in each picture: [image, layer, token] → [image, layer]."""
    patch = patches(norms)
    return patch.max("token") / patch.median("token")


def top_ratio(norms: xr.DataArray, share: float = 0.01) -> xr.DataArray:
    """Mean of the top share of patch norms over the median, in each picture: [image, layer, token] → [image, layer]."""
    patch = patches(norms)
    count = max(1, round(share * patch.sizes["token"]))
    axis = patch.get_axis_num("token")
    top = np.sort(patch.values, axis)[(slice(None),) * axis + (slice(-count, None),)]
    return patch.median("token").copy(data=top.mean(axis) / np.median(patch.values, axis))
