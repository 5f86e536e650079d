"""Figures of one captured network: norms, attention, and a diagnosis."""

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from torch import Tensor

from vitregs import report
from vitregs.arrays import patch_maps
from vitregs.data.images import Images
from vitregs.errors import InputError
from vitregs.measure.diagnose import Diagnosis
from vitregs.measure.outliers import find_outliers

__all__ = ["attention", "diagnosis", "neurons", "norms"]


def _variable(seen: xr.Dataset, name: str, asked: str) -> xr.DataArray:
    if not isinstance(seen, xr.Dataset) or name not in seen:
        raise InputError(f"there is no {name} to draw: give what capture(…, {asked}) gives")
    return seen[name]


def norms(seen: xr.Dataset, *, layer: int = -1, cutoff: float | None = None) -> Figure:
    """Draw how token norms are distributed over layers, and their density at one layer (Fig 3, 4a).

    Args:
        seen: What `capture(…, norms=True)` gives: `norms` [image, layer, token].
        layer: Number of the layer whose density is drawn, 0 to L; negative ones count from the end.
        cutoff: A norm above which tokens are outliers; None for the statistical rule, as in `find_outliers`.

    Returns:
        Two panels, a two-dimensional histogram, whose colour is the share of patch tokens, and a density with the cut-off
        as a dashed line, or the words that there is none.

    Raises:
        InputError: There are no norms, or too few, and as `find_outliers` does.

    Example:
        >>> import vitregs as vr
        >>> vit = vr.load("hunt-pico")
        >>> seen = vr.capture(vit, vr.open_images("scenes", size=vit.size, count=16), norms=True)
        >>> vr.plot.norms(seen).axes[0].get_xlabel()
        'layer'
    """
    found = _variable(seen, "norms", "norms=True")
    marked = find_outliers(seen, layer=layer, cutoff=cutoff)
    facts = marked.attrs
    name = str(found["model"].values)
    return report.norms.plot_layers_and_density(name, found, int(marked["layer"]), facts["cutoff"], facts["rule"])


def _shown(images: Any, count: int) -> np.ndarray:
    """The first images, (n, height, width, 3) in [0, 1]."""
    if isinstance(images, Images):
        images = next(images.pixels(count))
    array = images.cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    array = array.transpose(0, 2, 3, 1) if array.ndim == 4 and array.shape[1] == 3 else array
    if array.ndim != 4 or array.shape[-1] != 3:
        raise InputError("images to draw are what open_images gives, or an array (n, 3, height, width) in [0, 1]")
    return array[:count]


def attention(seen: xr.Dataset, images: Any = None, *, layer: int = -1, query: int = 0, count: int = 4) -> Figure:
    """Draw the attention of a captured query as maps, mean over heads (Fig 1, 2).

    Args:
        seen: What `capture(…, attention=["cls"])` gives: `attention` [image, attention_layer, head, query, token].
        images: What was captured, to stand beside the maps: open images, or pixels (n, 3, height, width) in [0, 1]; None
            for maps alone.
        layer: Number of the layer among those captured, 1 to L; negative ones count from the end.
        query: Position of the query among those captured.
        count: The most images that are drawn.

    Returns:
        Maps in a row, or each beside its image; every map has its own range of colours.

    Raises:
        InputError: There is no attention, no such layer or query, or images are of another kind.

    Example:
        >>> import vitregs as vr
        >>> vit = vr.load("hunt-pico")
        >>> images = vr.open_images("scenes", size=vit.size, count=3)
        >>> seen = vr.capture(vit, images, attention=["cls"])
        >>> len(vr.plot.attention(seen, images).axes)
        6
    """
    found = _variable(seen, "attention", 'attention=["cls"]')
    layers, queries = list(found["attention_layer"].values), list(found["query"].values)
    number = layers[layer] if -len(layers) <= layer < 0 else layer
    if number not in layers:
        raise InputError(f"attention of layer {layer} was not captured: there are {', '.join(map(str, layers))}")
    if not -len(queries) <= query < len(queries):
        raise InputError(f"there is no query {query}: {len(queries)} were captured, counted from 0")
    if count < 1:
        raise InputError(f"count must be 1 or more, not {count}")
    chosen = found.isel(query=query, attention_layer=layers.index(number), image=slice(count)).mean("head")
    maps, word = patch_maps(chosen).values, str(queries[query])
    title = f"{'CLS' if word == 'cls' else word} attention\nlayer {number}"
    if images is None:
        figure = report.style.plot_maps(maps)
        figure.suptitle(f"{found['model'].values}: {title.replace(chr(10), ', ')}", fontsize=9)
        return figure
    shown = _shown(images, count)
    return report.style.plot_images(shown[: len(maps)], {title: maps[: len(shown)]})


def diagnosis(found: Diagnosis) -> Figure:
    """Draw a diagnosis: marked patches on images, norms over layers, register neurons, and attention.

    Args:
        found: What `diagnose` gives.

    Returns:
        The figure of four panels that `vitregs diagnose --plot` writes; where no neurons were looked for, the density of
        norms takes their place.

    Raises:
        InputError: It is no diagnosis.

    Example:
        >>> import vitregs as vr
        >>> vit = vr.load("hunt-pico")
        >>> found = vr.diagnose(vit, vr.open_images("scenes", size=vit.size, count=16), quick=True)
        >>> vr.plot.diagnosis(found).axes[1].get_title()
        'norms over layers'
    """
    if not isinstance(found, Diagnosis):
        raise InputError(f"a diagnosis is what diagnose gives, not {type(found).__name__}")
    return report.norms.plot_diagnosis(found)


def neurons(found: xr.Dataset) -> Figure:
    """Draw in which blocks MLP neurons write the norms of marked patches (Jiang et al. 2025).

    Args:
        found: What `measure.neurons.search` gives.

    Returns:
        The largest shares of every block, register neurons circled, beside what each block's neurons write together.

    Raises:
        InputError: It is no such search.

    Example:
        >>> import vitregs as vr
        >>> from vitregs.measure.neurons import search
        >>> vit = vr.load("hunt-pico")
        >>> found = search(vit, vr.open_images("scenes", size=vit.size, count=8), cutoff=100.0)
        >>> vr.plot.neurons(found).axes[0].get_ylabel()
        'block'
    """
    if not isinstance(found, xr.Dataset) or not {"share", "contrast"} <= set(found):
        raise InputError("neurons are drawn from what measure.neurons.search gives")
    return report.neurons.plot_blocks(found)
