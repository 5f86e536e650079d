"""One token a picture: CLS, a normal patch, an outlier, or a register, drawn so that batches do not matter."""

from collections.abc import Sequence

import numpy as np
import xarray as xr

from vitregs.problems import Problem, unknown

TOKENS = ("cls", "normal", "outlier", "register")


def eligible(marked: xr.DataArray, token: str) -> np.ndarray:
    """Which tokens may be drawn: marks of outliers [image, token] with kinds, one of TOKENS → bool (images, tokens)."""
    if token not in TOKENS:
        raise unknown("token", token, TOKENS)
    hot, kind = marked.transpose("image", "token").values, np.asarray(marked["kind"])
    if token in ("cls", "register"):
        return np.broadcast_to(kind == token, hot.shape)
    return (kind == "patch") & (hot if token == "outlier" else ~hot)


def draw(marked: xr.DataArray, token: str, *, seeds: Sequence[int] = (0,), first: int = 0) -> np.ndarray:
    """Draw one token in every picture: marks [image, token], which, seeds, number of the first picture → (seeds, images),
    -1 where a picture has none (section 2.4).

    What is drawn in a picture depends on the seed, the picture's number and its own tokens alone.
    """
    allowed = eligible(marked, token)
    count = allowed.sum(1)
    found = np.full((len(seeds), len(allowed)), -1)
    for row, seed in zip(found, seeds, strict=True):
        chance = np.random.default_rng(seed).random(first + len(allowed))[first:]
        for i in np.flatnonzero(count):
            row[i] = np.flatnonzero(allowed[i])[int(chance[i] * count[i])]
    return found


def ready(marked: xr.DataArray) -> None:
    """Raise Problem unless some patch is an outlier and some patch is not."""
    hot = eligible(marked, "outlier")
    if not hot.any():
        raise Problem("no patch is an outlier in any picture: let the largest norms stand in (missing=largest)")
    if not eligible(marked, "normal").any():
        raise Problem("every patch of every picture is an outlier: the cut-off lies below all norms")
