"""What marks outliers in a network: norms of one layer, the largest beside the median, patches like their neighbours."""

import xarray as xr

from vitregs import artifacts, capture
from vitregs.backbones import Backbone
from vitregs.images import Images


def norms_at(backbone: Backbone, images: Images, *, layer: int = -1) -> xr.DataArray:
    """L2 norms of all tokens at one layer, before the final norm (section 2.1).

    Args:
        backbone: a network.
        images: what it sees.
        layer: 0 enters the first block, -1 leaves the last.

    Returns:
        [image, token].

    Raises:
        Problem: for a layer that does not exist.
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
    return artifacts.largest_ratio(capture.norms(backbone, images))


def neighbour_similarity(backbone: Backbone, images: Images) -> xr.DataArray:
    """Mean cosine similarity of each patch embedding to its four neighbours, before positions are added (Fig 5a).

    Args:
        backbone: a network.
        images: what it sees.

    Returns:
        [image, token], in [-1, 1].
    """
    return artifacts.neighbour_similarity(capture.stem(backbone, images))
