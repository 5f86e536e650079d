"""What remedies at test time do: zero tokens by number (beside Fig 8), and neurons that are moved or silenced, with controls.

A number of equal tokens is measured as one token of that weight (`models.test_time.append`). Every function reads the images once
and shows each batch to all variants of the network, so that differences are paired image by image.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from vitregs import arrays
from vitregs.data.images import Batch, Images
from vitregs.errors import InputError, unknown
from vitregs.measure import attention, lost, outliers
from vitregs.models import capture, test_time
from vitregs.models.backbone import Backbone

DOSES = (0, 1, 2, 4, 8, 16, 32)
RATIO = 1.6  # of a patch's norm to the median of its image: outliers of DeiT-Tiny lie above
SIGNS = ("share", "above", "largest", "sink", "cls", "register")
Variants = Mapping[Any, Backbone]  # label → network
Look = Callable[[Any, Backbone, Batch], dict[str, np.ndarray]]  # label, network, batch → (images,) by name


# --- variants of a network
def dosed(backbone: Backbone, doses: Sequence[float] = DOSES) -> dict[float, Backbone]:
    """Append zero tokens by number.

    Args:
        backbone: A network without registers.
        doses: How many, any numbers of 0 and more; 0 is the network as it is.

    Returns:
        {dose: network}; a number of tokens is one token of that weight.

    Raises:
        InputError: No doses, the same twice, a negative one, and as `test_time.append` does.
    """
    if not len(doses):
        raise InputError("name at least one dose")
    if len(set(doses)) < len(doses) or not all(np.isfinite(k) and k >= 0 for k in doses):
        raise InputError(f"doses are different numbers, 0 or more, not {list(doses)}")
    return {k: test_time.append(backbone, weight=float(k)) if k else backbone for k in doses}


def treated(backbone: Backbone, neurons: Mapping[str, Sequence[int]] | None = None) -> dict[str, Backbone]:
    """Make the variants of the table of interventions.

    Args:
        backbone: A network without registers.
        neurons: Number of a block, from 1 → its register neurons, from 0; None for the list stored of this network.

    Returns:
        "untouched", and with "+zero1" (a token alone), "+random1" (as many random neurons moved to it), "+tt1" (the register
        neurons), and "+suppressed" (these silenced, no token).

    Raises:
        InputError: As `test_time.append` does, for a list of no neurons, and a network of which none is stored.
    """
    if neurons is None:
        path = test_time.list_of(backbone.name, "+tt1")
        found = test_time.read_list(path)
        test_time.check_list(backbone, found, path)
        blocks = found.neurons
    else:
        blocks = {int(b): list(n) for b, n in neurons.items()}
    if not any(blocks.values()):
        raise InputError("there are no neurons to move: name some")
    others = test_time.random_neurons(backbone, blocks)
    return {
        "untouched": backbone,
        "+zero1": test_time.append(backbone),
        "+random1": test_time.append(backbone, neurons=others, name="+random1"),
        "+tt1": test_time.append(backbone, neurons=blocks),
        "+suppressed": test_time.suppress(backbone, blocks),
    }


def _batches(images: Images, batch: int, skip: int) -> Iterator[Batch]:
    """Read images without the first ones. Raises InputError where none are left."""
    seen = 0
    for part in images.batches(batch):
        first = min(max(skip - seen, 0), len(part.pixels))
        seen += len(part.pixels)
        if first < len(part.pixels):
            yield Batch(
                part.pixels[first:], part.names[first:], part.labels[first:], part.boxes[first:], part.masks[first:]
            )
    if skip < 0 or seen <= skip:
        raise InputError(f"skip leaves out images at the beginning, 0 to {seen - 1} of {seen}, not {skip}")


def _each(variants: Variants, images: Images, dim: str, look: Look, batch: int, skip: int = 0) -> xr.Dataset:
    """Show each batch to all variants: → Dataset [dim, image] of what is found."""
    parts: dict[Any, list[dict[str, Any]]] = {label: [] for label in variants}
    for part in _batches(images, batch, skip):
        for label, network in variants.items():
            parts[label].append(look(label, network, part))
    data = {
        name: ((dim, "image"), np.stack([np.concatenate([p[name] for p in found]) for found in parts.values()]))
        for name in next(iter(parts.values()))[0]
    }
    return xr.Dataset(data, coords={dim: list(variants)})


# --- the artifact
def _signs(network: Backbone, part: Batch, layer: int, ratio: float) -> dict[str, np.ndarray]:
    """What a batch shows of the artifact, (images,) each; and the norms of its patches under "norms", (images, patches)."""
    what: dict[str, Any] = {"norms": [layer], "received": [layer]}
    if network.has_cls:
        what |= {"attention": ["cls"], "attention_layers": [layer]}
    seen = capture.capture(network, part.pixels, batch=len(part.pixels), **what)
    norms = seen["norms"].isel(layer=0)
    patch = arrays.patches(norms).values
    middle = np.median(patch, axis=1, keepdims=True)
    nothing = np.full(len(patch), np.nan, np.float32)
    found = {
        "share": (patch > ratio * middle).mean(1),
        "largest": (patch.max(1) / middle[:, 0]),
        "sink": seen["sink"].isel(received_layer=0).values,
        "cls": nothing,
        "register": norms.values[:, norms["kind"].values == "register"].mean(1) if network.registers else nothing,
    }
    if network.has_cls:
        rows = seen["attention"].isel(attention_layer=0, query=0)
        found["cls"] = attention.peak_share(rows).values * patch.shape[1]
    return {k: v.astype(np.float32) for k, v in found.items()} | {"norms": patch}


def _artifact(
    variants: Variants,
    images: Images,
    dim: str,
    *,
    layer: int,
    ratio: float,
    cutoff: float | None,
    batch: int,
    skip: int = 0,
    more: Look | None = None,
) -> xr.Dataset:
    """Signs of the artifact in all variants, and what else is looked at; the first decides on the cut-off if none is named."""
    if not ratio > 1:
        raise InputError(f"an outlier lies above the median: ratio must be above 1, not {ratio}")
    norms: dict[Any, list[np.ndarray]] = {label: [] for label in variants}

    def look(label: Any, network: Backbone, part: Batch) -> dict[str, np.ndarray]:
        found = _signs(network, part, layer, ratio)
        norms[label].append(found.pop("norms"))
        return found | (more(label, network, part) if more else {})

    data = _each(variants, images, dim, look, batch, skip)
    whole = [np.concatenate(parts) for parts in norms.values()]
    kind = ("token", ["patch"] * whole[0].shape[1])
    first = xr.DataArray(whole[0], dims=("image", "token"), coords={"kind": kind})
    value = outliers.find_cutoff(first, cutoff).value
    above = np.stack([np.full(len(n), np.nan) if value is None else (n > value).mean(1) for n in whole])
    facts = {"above": ((dim, "image"), above.astype(np.float32)), "cutoff": np.nan if value is None else value}
    return data.assign(facts).assign_attrs(ratio=ratio)


def artifact_by_dose(
    backbone: Backbone,
    images: Images,
    *,
    doses: Sequence[float] = DOSES,
    layer: int = -1,
    ratio: float = RATIO,
    cutoff: float | None = None,
    batch: int = 16,
) -> xr.Dataset:
    """What zero tokens by number do to the artifact (beside Fig 7, 8).

    Args:
        backbone: A network without registers.
        images: What it sees.
        doses: Numbers of tokens, 0 for the network as it is.
        layer: The layer and block that are looked at.
        ratio: A patch whose norm is this many times the median of its image counts as an outlier.
        cutoff: A norm above which patches count as outliers too; None for the one that the rule finds in the first dose.
        batch: Images at a time.

    Returns:
        [dose, image]: share and above (of the patches, above the ratio and above the cut-off; nan where there is none), largest
        (norm over median), sink (attention received by the patch that receives most, of all queries, largest over heads, in
        fair shares) and cls (of the attention of CLS to patches, what the most attended one takes, mean over heads, in fair
        shares of the patches; nan without CLS); register (mean norm of the token, nan without one). cutoff is a norm.

    Raises:
        InputError: As `dosed` and `capture` do.
    """
    variants = dosed(backbone, doses)
    found = _artifact(variants, images, "dose", layer=layer, ratio=ratio, cutoff=cutoff, batch=batch)
    return found.assign_coords(model=backbone.name)


# --- answers of the trained head
def _answers(network: Backbone, part: Batch, classes: Sequence[int] | None) -> dict[str, np.ndarray]:
    """The class named, whether it is right, and by how much: (images,) each, nan where the right one is not known."""
    logits = network.logits(part.pixels).float().cpu()
    named = logits.argmax(1)
    right, margin = np.full(len(named), np.nan, np.float32), np.full(len(named), np.nan, np.float32)
    known = [i for i, label in enumerate(part.labels) if isinstance(label, int | np.integer) and label >= 0]
    if known:
        true = torch.tensor([int(part.labels[i]) if classes is None else classes[int(part.labels[i])] for i in known])
        if int(true.max()) >= logits.shape[1]:
            raise InputError(f"{network.name} names {logits.shape[1]} classes: there is no class {int(true.max())}")
        scores = logits[known]
        mine = scores.gather(1, true[:, None])[:, 0]
        others = scores.scatter(1, true[:, None], -torch.inf).amax(1)
        right[known], margin[known] = (named[known] == true).numpy(), (mine - others).numpy()
    return {"named": named.numpy().astype(np.int32), "right": right, "margin": margin}


def _agree(data: xr.Dataset, dim: str) -> xr.Dataset:
    """Add whether a variant names the same class as the first."""
    first = data["named"].isel({dim: 0}, drop=True)
    return data.assign(agrees=(data["named"] == first).astype(np.float32))


def answers_by_dose(
    backbone: Backbone,
    images: Images,
    *,
    doses: Sequence[float] = DOSES,
    classes: Sequence[int] | None = None,
    skip: int = 0,
    batch: int = 32,
) -> xr.Dataset:
    """What zero tokens by number do to the answers of the trained head (beside Fig 8).

    Args:
        backbone: A network with a trained head.
        images: With labels, numbers; without them nothing is right or wrong.
        doses: Numbers of tokens, 0 for the network as it is.
        classes: The head's class for each label (`datasets.IMAGENETTE`), None where labels are the head's own.
        skip: Images at the beginning that are left out, as a part that the network was trained on.
        batch: Images at a time.

    Returns:
        [dose, image]: named (the class), right (0 or 1), margin (logit of the right class minus the largest other), both nan
        without a label, and agrees (1 where the first dose names the same class).

    Raises:
        InputError: For a network without a head, labels that it has no class for, and a skip that leaves no image.
    """
    found = _each(dosed(backbone, doses), images, "dose", lambda _, n, p: _answers(n, p, classes), batch, skip)
    return _agree(found, "dose").assign_coords(model=backbone.name)


def flips(answers: xr.Dataset, dim: str = "dose") -> xr.Dataset:
    """Say where a change in accuracy comes from: images that were right and are not any more, and the other way round.

    Args:
        answers: What `answers_by_dose` or `interventions` gives; the first variant is compared with.
        dim: "dose" or "change".

    Returns:
        [dim]: accuracy; lost and won (shares of the images whose answer was right first, and is right now); margin_lost and
        margin_kept, medians over the images of the margin under the first variant, of those lost and of those right in both; and
        shift, the mean change of the margin over all images. nan where there are none.
    """
    known = answers["right"].isel({dim: 0}).notnull().values
    right = answers["right"].transpose(dim, "image").values[:, known] == 1
    margin = answers["margin"].transpose(dim, "image").values[:, known]
    rows = []
    for mine, here in zip(right, margin, strict=True):
        gone, kept = right[0] & ~mine, right[0] & mine
        rows.append(
            {
                "accuracy": mine.mean(),
                "lost": gone.mean(),
                "won": (mine & ~right[0]).mean(),
                "margin_lost": np.median(margin[0][gone]) if gone.any() else np.nan,
                "margin_kept": np.median(margin[0][kept]) if kept.any() else np.nan,
                "shift": (here - margin[0]).mean(),
            }
        )
    return xr.Dataset({k: (dim, [float(row[k]) for row in rows]) for k in rows[0]}, coords={dim: answers[dim]})


# --- object discovery
def lost_by_dose(
    backbone: Backbone,
    images: Images,
    *,
    doses: Sequence[float] = DOSES,
    projection: str = "auto",
    bias: float | str = "centre",
    normalise: bool = True,
    batch: int = 32,
) -> xr.Dataset:
    """What zero tokens by number do to object discovery (Table 3).

    Args:
        backbone: A network without registers.
        images: With true boxes; without them hits are nan.
        doses: Numbers of tokens, 0 for the network as it is.
        projection: "key", "query", "value", or "auto" for the paper's choice.
        bias: Of `lost.lost`; a bias near 0 lets boxes grow to the whole image, which is why `covered` stands beside hits.
        normalise: Whether features are brought to length 1.
        batch: Images at a time.

    Returns:
        [dose, image]: hit (1 where the box overlaps a true one by half, nan without one), covered (share of the image), and
        whole [image], hits of a box around the whole image.

    Raises:
        InputError: As `lost.lost` does.
    """
    which = lost.preferred(backbone) if projection == "auto" else projection
    truth: list[np.ndarray] = []

    def look(label: Any, network: Backbone, part: Batch) -> dict[str, np.ndarray]:
        if label == doses[0]:
            truth.extend(part.boxes)
        features = capture.projections(network, part.pixels, which=which)
        how: dict[str, Any] = {"bias": bias, "normalise": normalise, "device": str(network.device)}
        box = lost.lost(features, patch_size=network.patch_size, **how)["box"].transpose("image", "side")
        best = lost.overlap(box.values, part.boxes)
        hit = np.where(np.isnan(best), np.nan, best >= lost.OVERLAP)
        covered = lost.covered(box, images.size).values
        return {"hit": hit.astype(np.float32), "covered": covered.astype(np.float32)}

    data = _each(dosed(backbone, doses), images, "dose", look, batch)
    whole = lost.baselines(truth, images.size).sel(rule="whole image", drop=True)
    found = data.assign(whole=whole).assign_attrs(projection=which, bias=str(bias), normalise=int(normalise))
    return found.assign_coords(model=backbone.name)


# --- interventions
def interventions(
    backbone: Backbone,
    images: Images,
    *,
    neurons: Mapping[str, Sequence[int]] | None = None,
    classes: Sequence[int] | None = None,
    skip: int = 0,
    layer: int = -1,
    ratio: float = RATIO,
    cutoff: float | None = None,
    batch: int = 16,
) -> xr.Dataset:
    """Move and silence register neurons, beside a token alone and random neurons.

    Args:
        backbone: A network without registers.
        images: What it sees.
        neurons: Number of a block, from 1 → its register neurons, from 0; None for the list stored of this network.
        classes: The head's class for each label, as in `answers_by_dose`.
        skip: Images at the beginning that are left out, as there.
        layer: The layer and block that are looked at.
        ratio: As in `artifact_by_dose`.
        cutoff: As in `artifact_by_dose`.
        batch: Images at a time.

    Returns:
        [change, image]: all of `artifact_by_dose`, and of `answers_by_dose` where the network has a trained head; the changes
        are those of `treated`.

    Raises:
        InputError: As `treated` and `capture` do.
    """
    variants = treated(backbone, neurons)
    how: dict[str, Any] = {"layer": layer, "ratio": ratio, "cutoff": cutoff, "batch": batch, "skip": skip}
    if backbone.net.num_classes:
        how["more"] = lambda _, n, p: _answers(n, p, classes)
    found = _artifact(variants, images, "change", **how)
    found = _agree(found, "change") if "named" in found else found
    return found.assign_coords(model=backbone.name)


# --- what can be looked at
def _pictures(variants: Variants, images: Images, dim: str, projection: str, count: int) -> xr.Dataset:
    """Norms, CLS attention and boxes of the first images with all variants."""
    first = next(images.batches(count))
    found = []
    for network in variants.values():
        what: dict[str, Any] = {"norms": [-1], "qkv": projection, "batch": len(first.pixels)}
        seen = capture.capture(network, first.pixels, **what | ({"attention": ["cls"]} if network.has_cls else {}))
        maps = {"norm": arrays.patch_maps(seen["norms"].isel(layer=0, drop=True))}
        if network.has_cls:
            rows = seen["attention"].isel(attention_layer=0, query=0, drop=True).mean("head")
            maps["attention"] = arrays.patch_maps(rows)
        features = seen["qkv"].isel(qkv_layer=0, projection=0, drop=True).rename(qkv_channel="channel")
        how: dict[str, Any] = {"bias": "centre", "normalise": True, "device": str(network.device)}
        maps["box"] = lost.lost(features, patch_size=network.patch_size, **how)["box"]
        found.append(xr.Dataset({k: v.drop_vars(["model", "token"], errors="ignore") for k, v in maps.items()}))
    return xr.concat(found, dim).assign_coords({dim: list(variants)}).assign_attrs(projection=projection)


def pictures_by_dose(
    backbone: Backbone, images: Images, *, doses: Sequence[float] = (0, 8), projection: str = "auto", count: int = 4
) -> xr.Dataset:
    """The first images as networks with zero tokens see them, to draw.

    Args:
        backbone: A network without registers.
        images: Their first are used.
        doses: Numbers of tokens, 0 for the network as it is.
        projection: Features of LOST, "auto" for the paper's choice.
        count: How many images.

    Returns:
        norm and attention [dose, image, y, x], of the last layer, of CLS and the mean over heads (without CLS there is none), and
        box [dose, image, side] of LOST in pixels, on features of length 1 with a centred bias.

    Raises:
        InputError: As `dosed` and `lost.lost` do.
    """
    which = lost.preferred(backbone) if projection == "auto" else projection
    return _pictures(dosed(backbone, doses), images, "dose", which, count).assign_coords(model=backbone.name)


def pictures_by_change(
    backbone: Backbone,
    images: Images,
    *,
    neurons: Mapping[str, Sequence[int]] | None = None,
    changes: Sequence[str] = ("untouched", "+zero1", "+tt1"),
    projection: str = "auto",
    count: int = 4,
) -> xr.Dataset:
    """The first images as networks with moved neurons see them, to draw.

    Args:
        backbone: A network without registers.
        images: Their first are used.
        neurons: As in `interventions`.
        changes: Those of `treated` that are wanted.
        projection: As in `pictures_by_dose`.
        count: How many images.

    Returns:
        As `pictures_by_dose`, [change, image, …].

    Raises:
        InputError: As `treated` does, and for an unknown change.
    """
    known = treated(backbone, neurons)
    for change in changes:
        if change not in known:
            raise unknown("change", change, known)
    which = lost.preferred(backbone) if projection == "auto" else projection
    wanted = {change: known[change] for change in changes}
    return _pictures(wanted, images, "change", which, count).assign_coords(model=backbone.name)
