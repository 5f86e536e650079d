"""What zero tokens by number do to a dense probe (beside Fig 8)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from vitregs.data.images import Images
from vitregs.errors import InputError
from vitregs.measure import remedies
from vitregs.models import capture
from vitregs.models.backbone import Backbone
from vitregs.probes import dense


def segments_by_dose(
    backbone: Backbone,
    images: Images,
    *,
    doses: Sequence[float] = remedies.DOSES,
    layer: int = -1,
    final_norm: bool = True,
    steps: int = dense.STEPS,
    seed: int = 0,
    batch: int = 32,
) -> xr.Dataset:
    """Linear segmentation from the patch tokens, for each number of zero tokens; class 0 is no truth.

    Args:
        backbone: A network without registers.
        images: Those with a mask count: the first two thirds train, the others are scored.
        doses: Numbers of tokens, 0 for the network as it is.
        layer: Whose tokens are probed.
        final_norm: Whether they pass the final norm first.
        steps: Of the probe's training.
        seed: Of the probe's training.
        batch: Images at a time.

    Returns:
        [dose]: miou in [0, 1] with low and high (95 % over test images), chance (always the most frequent class) and n; counts
        [dose, image, side, class] of the test images, as `dense.miou` takes them, for paired differences.

    Raises:
        InputError: For images without masks, and as `dense.segment` does.
    """
    masks = [mask for part in images.batches(batch) for mask in part.masks]
    there = [i for i, mask in enumerate(masks) if mask is not None]
    if len(there) < 4:
        raise InputError(f"{len(there)} images of {images.name} have a mask: too few to train a probe and score it")
    kept = [np.asarray(masks[i]) for i in there]
    how: dict[str, Any] = {
        "classes": int(max(mask.max() for mask in kept)) + 1,
        "ignore": 0,
        "steps": steps,
        "seed": seed,
    }
    found = []
    for network in remedies.dosed(backbone, doses).values():
        what: dict[str, Any] = {"layer": layer, "kinds": "patch", "final_norm": final_norm, "batch": batch}
        states = capture.tokens(network, images, **what).isel(image=there)
        scored = dense.segment(states, kept, device=backbone.device, **how)
        counts = dense.counts(scored["confusion"].values).astype(np.int32)
        found.append(scored[["miou", "low", "high", "chance", "n"]].assign(counts=(("image", "side", "class"), counts)))
    joined = xr.concat(found, "dose", data_vars="all")
    return joined.assign_coords(dose=list(doses), model=backbone.name).drop_vars("image", errors="ignore")
