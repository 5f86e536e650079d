"""One token an image: CLS, a normal patch, an outlier, or a register, drawn so that batches do not matter."""

from collections.abc import Sequence

import numpy as np
import xarray as xr

from vitregs.errors import InputError, unknown

TOKENS = ("cls", "normal", "outlier", "register")


def eligible(marked: xr.DataArray, token: str) -> np.ndarray:
    """Which tokens may be drawn: marks of outliers [image, token] with kinds, one of TOKENS → bool (images, tokens)."""
    if token not in TOKENS:
        raise unknown("token", token, TOKENS)
    is_outlier, kind = marked.transpose("image", "token").values, np.asarray(marked["kind"])
    if token in ("cls", "register"):
        return np.broadcast_to(kind == token, is_outlier.shape)
    return (kind == "patch") & (is_outlier if token == "outlier" else ~is_outlier)


def draw_tokens(marked: xr.DataArray, token: str, *, seeds: Sequence[int] = (0,), first: int = 0) -> np.ndarray:
    """Draw one token in every image: marks [image, token], which, seeds, number of the first image → (seeds, images),
    -1 where an image has none (section 2.4).

    What is drawn in an image depends on the seed, the image's number and its own tokens alone.
    """
    allowed = eligible(marked, token)
    count = allowed.sum(1)
    found = np.full((len(seeds), len(allowed)), -1)
    for row, seed in zip(found, seeds, strict=True):
        chance = np.random.default_rng(seed).random(first + len(allowed))[first:]
        for i in np.flatnonzero(count):
            row[i] = np.flatnonzero(allowed[i])[int(chance[i] * count[i])]
    return found


def check_marks(marked: xr.DataArray) -> None:
    """Raise InputError unless some patch is an outlier and some patch is not."""
    is_outlier = eligible(marked, "outlier")
    if not is_outlier.any():
        raise InputError("no patch is an outlier in any image: let the largest norms stand in (missing=largest)")
    if not eligible(marked, "normal").any():
        raise InputError("every patch of every image is an outlier: the cut-off lies below all norms")
