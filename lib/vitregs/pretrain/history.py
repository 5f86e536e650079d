"""What is watched while a network trains: loss, accuracy and, at every layer, norms and attention sinks."""

from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from vitregs import artifacts, capture
from vitregs.backbones import Backbone

EDGES = np.logspace(-1, 4, 201)  # of the norm histograms
KINDS = ("cls", "register", "patch")


def due(step: int, steps: int, every: int) -> bool:
    """Whether to look after this many steps: at powers of two from 16, at every multiple of `every`, at the end."""
    return step in (0, steps) or step % every == 0 or (step >= 16 and step & (step - 1) == 0)


def look(backbone: Backbone, pixels: Tensor) -> dict[str, Any]:
    """Measure a network on fixed pictures: → per-layer numbers as lists, so that a checkpoint can hold them.

    `hist` (layer, bin) counts patch norms; `largest` and `top1` are medians over pictures of largest / median and
    top-1-% mean / median norm; `sink` (block, kind) is the largest concentration of attention on one token.
    """
    norms = capture.norms(backbone, pixels)
    patch = norms.isel(token=np.flatnonzero(norms.kind == "patch"))
    hist = np.stack([np.histogram(patch.isel(layer=i), EDGES)[0] for i in range(patch.sizes["layer"])])
    taken = capture.concentration(backbone, pixels[:32])
    sink = [
        [float(part.max("token").mean("image")) if part.sizes["token"] else float("nan") for part in kinds]
        for kinds in (
            [taken.isel(layer=i, token=np.flatnonzero(taken.kind == k)) for k in KINDS]
            for i in range(taken.sizes["layer"])
        )
    ]
    return {
        "hist": torch.from_numpy(hist),
        "median": patch.median(("image", "token")).values.tolist(),
        "largest": artifacts.largest_ratio(norms).median("image").values.tolist(),
        "top1": artifacts.top_ratio(norms).median("image").values.tolist(),
        "sink": sink,
    }


def dataset(records: list[dict[str, Any]]) -> xr.Dataset:
    """Turn the records of a run into a labelled data set with dims step, layer, block, bin, kind."""
    layers = len(records[0]["median"])
    return xr.Dataset(
        {
            "loss": ("step", [r["loss"] for r in records]),
            "accuracy": ("step", [r["accuracy"] for r in records]),
            "seconds": ("step", [r["seconds"] for r in records]),
            "hist": (("step", "layer", "bin"), np.stack([r["hist"].numpy() for r in records]).astype(np.int32)),
            **{
                k: (("step", "layer"), np.array([r[k] for r in records], np.float32))
                for k in ("median", "largest", "top1")
            },
            "sink": (("step", "block", "kind"), np.array([r["sink"] for r in records], np.float32)),
        },
        coords={
            "step": [r["step"] for r in records],
            "layer": np.arange(layers),
            "block": np.arange(1, layers),
            "bin": np.sqrt(EDGES[1:] * EDGES[:-1]),
            "kind": list(KINDS),
        },
    )
