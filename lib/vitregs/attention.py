"""Where CLS looks: attention maps of a network on images, reduced to what is drawn or counted."""

import xarray as xr

from vitregs import artifacts, capture
from vitregs.backbones import Backbone
from vitregs.images import Images


def peaks(backbone: Backbone, images: Images) -> xr.DataArray:
    """Part of the attention of CLS to the patches that the most attended patch takes, at every block.

    Args:
        backbone: a network with a CLS token.
        images: what it sees.

    Returns:
        [image, layer], in [0, 1].

    Raises:
        Problem: for a network without CLS.
    """
    blocks = range(1, backbone.depth + 1)
    return artifacts.peak_share(capture.attention(backbone, images, layers=blocks, queries=["cls"])).isel(query=0)


def of_cls(backbone: Backbone, images: Images) -> xr.DataArray:
    """Attention to the patches in the last block, mean over heads (Fig 1, 8): of CLS, or of the first patch without one.

    Args:
        backbone: a network.
        images: what it sees.

    Returns:
        [image, token], not summing to 1.
    """
    queries = ["cls"] if backbone.has_cls else [0]
    return artifacts.patches(capture.attention(backbone, images, queries=queries).mean("head").isel(layer=0, query=0))


def first_maps(backbone: Backbone, images: Images, *, count: int) -> xr.DataArray:
    """Attention of CLS in the last block for the first images, mean over heads (Fig 19).

    Args:
        backbone: a network with a CLS token.
        images: their first are used.
        count: how many.

    Returns:
        [image, layer, query, token], with one layer and one query.

    Raises:
        Problem: for a network without CLS.
    """
    return capture.attention(backbone, next(images.pixels(count)), queries=["cls"]).mean("head")
