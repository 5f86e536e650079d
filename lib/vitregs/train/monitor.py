"""What is watched while a network trains: loss, scores and, at every layer, norms, channels and attention sinks."""

import math
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor

from vitregs import arrays
from vitregs.measure import diagnose, mixture, outliers
from vitregs.models import capture
from vitregs.models.backbone import Backbone

EDGES = np.logspace(-1, 4, 201)  # of the norm histograms
KINDS = ("cls", "register", "patch")
BY_LAYER = ("median", "largest", "top1", "kurtosis", "above", "share", "separation", "ratio")
LARGE = 1.6  # times the median norm of an image: what lies above is counted without any rule
BACK, AWAY = (
    0.5,
    0.25,
)  # of the untouched network's share of outliers, from which they are back, and below which they are gone
JUDGED = {  # numbers kept of the fingerprint → part, attribute
    "strength": ("mode", "value"),
    "place": ("place", "value"),
    "others": ("place", "control"),
    "received": ("attention", "value"),
    "half": ("neurons", "value"),
    "gone": ("cause", "value"),
}


def due(step: int, steps: int, every: int) -> bool:
    """Whether to look after this many steps: at powers of two from 16, at every multiple of `every`, at the end."""
    return step in (0, steps) or step % every == 0 or (step >= 16 and step & (step - 1) == 0)


def measure(backbone: Backbone, pixels: Tensor) -> dict[str, Any]:
    """Measure a network on fixed images: → per-layer numbers as lists, so that a checkpoint can hold them.

    `hist` (layer, bin) counts patch norms; `largest` and `top1` are medians over images of largest / median and
    top-1-% mean / median norm; `kurtosis` is that of the channels of patch tokens, each standardised over tokens (3 for a
    Gaussian); `share`, `separation` and `ratio` describe the second mode that the cut-off rule sees (0 where it sees
    none, nan with too few tokens); `sink` (block, kind) is the largest concentration of attention on one token.
    """
    kurtosis: list[float] = [0.0] * (backbone.depth + 1)
    alike = float("nan")

    def peaked(layer: int) -> capture.Reduce:
        def reduce(state: Tensor) -> None:
            nonlocal alike
            if layer == backbone.depth and backbone.registers > 1:
                alike = _likeness(state[:, backbone.prefix - backbone.registers : backbone.prefix].float())
            z = state[:, backbone.prefix :].float().flatten(0, 1)
            z = (z - z.mean(0)) / (z.std(0) + 1e-6)
            kurtosis[layer] = float((z**4).mean())

        return reduce

    with capture.tap(backbone.net, {n: peaked(n) for n in range(backbone.depth + 1)}):
        norms = capture.norms(backbone, pixels, batch=len(pixels))
    patch = arrays.patches(norms)
    registers = norms.isel(token=np.flatnonzero(norms.kind == "register")).mean("image").transpose("layer", "token")
    hist = np.stack([np.histogram(patch.isel(layer=i), EDGES)[0] for i in range(patch.sizes["layer"])])
    enough = patch.isel(layer=0).size >= mixture.LEAST_DATA
    modes = [outliers.find_cutoff(norms.isel(layer=i)) for i in range(patch.sizes["layer"])] if enough else []
    taken = capture.attention_received(backbone, pixels[:32])
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
        "largest": outliers.largest_ratio(norms).median("image").values.tolist(),
        "top1": outliers.top_ratio(norms).median("image").values.tolist(),
        "kurtosis": kurtosis,
        "above": (patch > LARGE * patch.median("token")).mean(("image", "token")).values.tolist(),
        **({"registers": registers.values.tolist(), "alike": alike} if backbone.registers else {}),
        **{
            k: [float(getattr(m, k)) for m in modes] or [float("nan")] * patch.sizes["layer"]
            for k in ("share", "separation", "ratio")
        },
        "sink": sink,
    }


def _likeness(tokens: Tensor) -> float:
    """Mean cosine between the tokens of an image: (n, tokens, d) → scalar."""
    unit = F.normalize(tokens, dim=-1)
    cosine = unit @ unit.transpose(1, 2)
    count = cosine.shape[-1]
    return float((cosine.sum((1, 2)) - count).mean() / (count * (count - 1)))


def fingerprint(backbone: Backbone, pixels: Tensor) -> dict[str, Any]:
    """Judge a network on fixed images: → verdict, and the numbers of the fingerprint that are not of one layer, as plain values.

    `marked` is the share of marked patches, `strength` their typical norm over the median, `place` and `others` the mean cosine
    of marked and other patches to their neighbours, `received` the fair shares of attention that marked patches receive, `half`
    the least number of MLP neurons that write half of the shift, `gone` the part of the marks that goes with the register
    neurons; nan where it was not asked for. `neurons` names register neurons, "5:114 6:96".
    """
    found = diagnose.diagnose(backbone, pixels, progress=False, batch=32).fingerprint
    parts = found.parts
    numbers = {k: getattr(parts[name], key) if name in parts else math.nan for k, (name, key) in JUDGED.items()}
    return {
        "verdict": found.verdict,
        "marked": float(parts["mode"].more.get("share", math.nan)),
        **numbers,
        "neurons": " ".join(f"{b}:{j}" for b, numbers in found.neurons.items() for j in numbers),
    }


def dataset(records: list[dict[str, Any]]) -> xr.Dataset:
    """Turn the records of a run into a labelled data set with dims step, layer, block, bin, kind and, if it has any, register."""
    layers = len(records[0]["median"])
    first = records[0]
    scalars = ("loss", "accuracy", "knn", "seconds", "watching", "agreement", "alike", "marked", *JUDGED)
    if "registers" in first:
        more: dict[str, Any] = {
            "registers": (("step", "layer", "register"), np.array([r["registers"] for r in records], np.float32))
        }
    else:
        more = {}
    more |= {k: ("step", [r[k] for r in records]) for k in ("verdict", "neurons") if k in first}
    return xr.Dataset(
        {
            **{k: ("step", [r[k] for r in records]) for k in scalars if k in first},
            **more,
            "hist": (("step", "layer", "bin"), np.stack([r["hist"].numpy() for r in records]).astype(np.int32)),
            **{k: (("step", "layer"), np.array([r[k] for r in records], np.float32)) for k in BY_LAYER},
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


def strongest(log: xr.Dataset, step: int = -1) -> pd.Series:
    """The layer that comes nearest to the emergence rule at one look (default the last): → layer, top1, separation, share."""
    at = log.isel(step=step)
    missing = np.full(at.sizes["layer"], np.nan)  # the first runs kept less
    names = ("top1", "separation", "share")
    return outliers.strongest_layer(
        pd.DataFrame({"layer": at["layer"].values, **{k: at[k].values if k in at else missing for k in names}})
    )


def outliers_present(log: xr.Dataset, before: float) -> bool | None:
    """Whether outliers are present at the end of a run that started from a network which had them.

    They are when the share of patches above LARGE in the last layer is BACK times that of the untouched network or more, and the
    fingerprint finds a mode; they are not when the share is below AWAY times that. (data/results/LOG.md, 2026-11-28)

    Args:
        log: History of the run.
        before: Share in the untouched network.

    Returns:
        None in between.
    """
    end = log.isel(step=-1)
    share = float(end["above"].isel(layer=-1))
    if share < AWAY * before:
        return False
    return True if share >= BACK * before and bool(np.isfinite(end["marked"])) else None


def emerged(log: xr.Dataset, step: int = -1) -> bool:
    """Whether outliers have emerged in a run, by the emergence rule, at one look (default the last)."""
    return outliers.has_emerged(strongest(log, step))
