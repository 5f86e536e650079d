"""Figures of one captured network: norms, attention, and a diagnosis."""

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from vitregs import report
from vitregs.arrays import patch_maps
from vitregs.errors import InputError
from vitregs.measure.diagnose import Diagnosis

__all__ = ["attention", "diagnosis", "norms"]


def _variable(seen: xr.Dataset, name: str) -> xr.DataArray:
    if name not in seen:
        raise InputError(f"this Dataset holds no {name}: call capture(…, {name}=…) first")
    return seen[name]


def norms(seen: xr.Dataset) -> Figure:
    """Draw how token norms are distributed over layers (Fig 4a).

    Args:
        seen: What `capture(…, norms=True)` gives: `norms` [image, layer, token].

    Returns:
        A two-dimensional histogram; colour is the share of patch tokens.

    Raises:
        InputError: The Dataset holds no norms.
    """
    found = _variable(seen, "norms")
    return report.norms.plot_layers({str(found["model"].values): found})


def attention(seen: xr.Dataset, images: Any = None, *, layer: int = -1, count: int = 4) -> Figure:
    """Draw the attention of the first captured query as maps, mean over heads (Fig 1, 2).

    Args:
        seen: What `capture(…, attention=["cls"])` gives: `attention` [image, attention_layer, head, query, token].
        images: The images themselves, an array (images, height, width, 3) in [0, 1], to stand beside their maps.
        layer: Position among the captured layers.
        count: How many images are drawn.

    Returns:
        Maps in a row, or beside their images.

    Raises:
        InputError: The Dataset holds no attention.
    """
    found = _variable(seen, "attention")
    maps = patch_maps(found.isel(attention_layer=layer, query=0).mean("head")).values[:count]
    if images is None:
        return report.style.plot_maps(maps)
    return report.style.plot_images(np.asarray(images)[: len(maps)], {str(found["model"].values): maps})


def diagnosis(found: Diagnosis) -> Figure:
    """Draw a diagnosis: norms over layers, their density at the deciding layer, maps of the first images.

    Args:
        found: What `diagnose` gives.

    Returns:
        One figure.
    """
    return report.norms.plot_diagnosis(found)
