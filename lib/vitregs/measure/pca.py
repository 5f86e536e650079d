"""Principal components of feature maps: what varies most from patch to patch (Fig 17, 20)."""

import numpy as np
import xarray as xr

from vitregs import arrays
from vitregs.arrays import patch_maps
from vitregs.data.images import Images
from vitregs.errors import InputError
from vitregs.models import capture
from vitregs.models.backbone import Backbone


def principal(states: xr.DataArray, *, count: int = 3, joint: bool = False) -> xr.Dataset:
    """First principal components of the patches of each image, or of all together: [image, token, channel] → Dataset with
    maps [image, component, y, x], whitened (mean 0, standard deviation 1 over the patches analysed), and variance
    [image, component], the share of the variance that each holds.

    The sign is that of a positive skew, so that few bright patches stand out of many dark ones. The paper whitens, and does not
    say whether images are analysed apart. Raises InputError for more components than patches or channels.
    """
    patch = arrays.patches(states).transpose("image", "token", "channel")
    x = patch.values.astype(np.float64)
    images, tokens, channels = x.shape
    rows = x.reshape(1, images * tokens, channels) if joint else x
    most = min(rows.shape[1] - 1, channels)
    if not 1 <= count <= most:
        raise InputError(f"there are 1 to {most} components of these {rows.shape[1]} patches, not {count}")
    left, size, _ = np.linalg.svd(rows - rows.mean(1, keepdims=True), full_matrices=False)
    scores = left[..., :count] * np.sqrt(rows.shape[1])
    scores *= np.where((scores**3).mean(1, keepdims=True) < 0, -1, 1)
    share = size**2 / np.maximum((size**2).sum(1, keepdims=True), 1e-30)
    share = np.broadcast_to(share[:, :count], (images, count))
    labels = {k: v for k, v in patch.coords.items() if "channel" not in v.dims}
    maps = xr.DataArray(scores.reshape(images, tokens, count), dims=("image", "token", "component"), coords=labels)
    return xr.Dataset(
        {
            "maps": patch_maps(maps.transpose("image", "component", "token")),
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
