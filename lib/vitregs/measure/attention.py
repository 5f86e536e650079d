"""How attention is distributed over patches (Fig 1, 2, 18)."""

import numpy as np
import xarray as xr

from vitregs import arrays
from vitregs.data.images import Images
from vitregs.models import capture
from vitregs.models.backbone import Backbone


def peak_share(attention: xr.DataArray) -> xr.DataArray:
    """Part of the attention to patches that falls on the most attended one, mean over heads first:
    [image, layer, head, query, token] → [image, layer, query]."""
    mean = arrays.patches(attention).mean("head")
    return (mean.max("token") / mean.sum("token")).rename("peak")


def attention_on(attention: xr.DataArray, weight: np.ndarray) -> xr.DataArray:
    """Part of the attention to patches that falls on a region: [image, …, token], weights of the patches (image, patch)
    in [0, 1] → [image, …]."""
    patch = arrays.patches(attention)
    inside = xr.DataArray(weight, dims=("image", "token"))
    return (patch * inside).sum("token") / patch.sum("token")


def mass_mask(maps: np.ndarray, keep: float = 0.6) -> np.ndarray:
    """The fewest cells that hold a share of each map's mass: (…, cells) → bool (…, cells) (DINO's own drawing)."""
    order = np.argsort(-maps, axis=-1)
    total = np.cumsum(np.take_along_axis(maps, order, -1), -1) / maps.sum(-1, keepdims=True)
    before = np.concatenate([np.zeros_like(total[..., :1]), total[..., :-1]], -1)
    mask = np.zeros(maps.shape, bool)
    np.put_along_axis(mask, order, before < keep, -1)
    return mask


def peaks(backbone: Backbone, images: Images) -> xr.DataArray:
    """Part of the attention of CLS to the patches that the most attended patch takes, at every block.

    Args:
        backbone: a network with a CLS token.
        images: what it sees.

    Returns:
        [image, layer], in [0, 1].

    Raises:
        InputError: for a network without CLS.
    """
    blocks = range(1, backbone.depth + 1)
    return peak_share(capture.attention(backbone, images, layers=blocks, queries=["cls"])).isel(query=0)


def of_cls(backbone: Backbone, images: Images) -> xr.DataArray:
    """Attention to the patches in the last block, mean over heads (Fig 1, 8): of CLS, or of the first patch without one.

    Args:
        backbone: a network.
        images: what it sees.

    Returns:
        [image, token], not summing to 1.
    """
    queries = ["cls"] if backbone.has_cls else [0]
    return arrays.patches(capture.attention(backbone, images, queries=queries).mean("head").isel(layer=0, query=0))


def first_maps(backbone: Backbone, images: Images, *, count: int) -> xr.DataArray:
    """Attention of CLS in the last block for the first images, mean over heads (Fig 19).

    Args:
        backbone: a network with a CLS token.
        images: their first are used.
        count: how many.

    Returns:
        [image, layer, query, token], with one layer and one query.

    Raises:
        InputError: for a network without CLS.
    """
    return capture.attention(backbone, next(images.pixels(count)), queries=["cls"]).mean("head")
