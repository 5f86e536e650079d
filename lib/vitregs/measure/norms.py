"""Norms and what follows from them, measured on a network (Fig 3, 4, 5a)."""

import xarray as xr

from vitregs.data.images import Images
from vitregs.measure import outliers, redundancy
from vitregs.models import capture
from vitregs.models.backbone import Backbone


def norms_at(backbone: Backbone, images: Images, *, layer: int = -1) -> xr.DataArray:
    """L2 norms of all tokens at one layer, before the final norm (section 2.1).

    Args:
        backbone: a network.
        images: what it sees.
        layer: 0 enters the first block, -1 leaves the last.

    Returns:
        [image, token].

    Raises:
        InputError: for a layer that does not exist.
    """
    return capture.norms(backbone, images, layers=[layer]).isel(layer=0)


def largest_ratios(backbone: Backbone, images: Images) -> xr.DataArray:
    """Largest over median patch norm in each image, at every layer.

    Args:
        backbone: a network.
        images: what it sees.

    Returns:
        [image, layer], at least 1.
    """
    return outliers.largest_ratio(capture.norms(backbone, images))


def neighbour_similarity(backbone: Backbone, images: Images) -> xr.DataArray:
    """Mean cosine similarity of each patch embedding to its four neighbours, before positions are added (Fig 5a).

    Args:
        backbone: a network.
        images: what it sees.

    Returns:
        [image, token], in [-1, 1].
    """
    return redundancy.neighbour_similarity(capture.patch_embeddings(backbone, images))
