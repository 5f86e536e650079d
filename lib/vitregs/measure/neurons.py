"""Register neurons: the few MLP neurons that write the large norm of outliers, found in one pass (Jiang et al. 2025).

Every block adds to a token's state, so the shift of the mean state from ordinary to marked patches, at the layer where they are
marked, is a sum over neurons: (mean activation on marked patches − mean on others) times what the neuron's output weights
write along that shift. A neuron's share of the sum ranks it. A register neuron has a share worth naming and is selective:
its activation on marked patches stands far outside that on others, above it or, in a gated MLP, whose product has no sign of
its own, below.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from scipy.stats import rankdata
from torch import Tensor

from vitregs import arrays
from vitregs.cache import provenance
from vitregs.errors import InputError
from vitregs.measure import outliers
from vitregs.models import capture, test_time
from vitregs.models.backbone import Backbone

# Fixed on DeiT-Tiny and planted networks (data/results/LOG.md, 2026-11-28)
LEAST_SHARE = 0.005  # of the shift, that a register neuron writes
LEAST_CONTRAST = 4.0  # its mean on marked patches, in standard deviations of the others from theirs
CALIBRATION = 32  # images that a cut-off is found on where none is named
_KEPT = 1000  # marked and other patches each that spreads and AUCs are computed from, at most
_EACH = 4  # of either kind in an image, so that no image decides alone
_RANKED = 256  # neurons of the largest shares whose AUC is computed
_DRAWS = 200


class _Sums:
    """What is added up over the images: activations and states, of marked patches and of the others."""

    def __init__(self, backbone: Backbone, blocks: Sequence[int], seed: int) -> None:
        self.backbone, self.blocks = backbone, blocks
        self.sums: dict[int, list[Tensor]] = {b: [] for b in blocks}  # (n, 2, neurons) a batch
        self.states: list[Tensor] = []  # (n, 2, channels) a batch
        self.counts: list[Tensor] = []  # (n, 2) a batch
        self.sample: dict[int, list[Tensor]] = {b: [] for b in blocks}
        self.sampled: list[Tensor] = []
        self.taken = [0, 0]
        self.seed, self.seen = seed, 0

    def add(self, held: dict[int, Tensor], state: Tensor, cutoff: float) -> None:
        """Add a batch: {block: activations (n, tokens, neurons)}, states (n, tokens, channels) at the layer, cut-off."""
        first = self.backbone.prefix
        state = state[:, first:].float()
        marked = state.norm(dim=-1) > cutoff
        parts = torch.stack([marked, ~marked], 1).float()
        self.counts.append(parts.sum(-1).cpu())
        self.states.append((parts @ state).cpu())
        picked = self.pick(marked)
        self.sampled.append(marked.flatten()[picked].cpu())
        for block, whole in held.items():
            here = whole[:, first:].float()
            self.sums[block].append((parts @ here).cpu())
            self.sample[block].append(here.flatten(0, 1)[picked].half().cpu())

    def pick(self, marked: Tensor) -> Tensor:
        """Draw the patches whose activations are kept, up to _EACH of either kind in an image, by draws of its own so that
        batches do not matter: → their numbers in the batch."""
        here, patches = marked.cpu(), marked.shape[1]
        numbers = range(self.seen, self.seen + len(here))
        self.seen += len(here)
        lot = torch.from_numpy(np.stack([np.random.default_rng([self.seed, i]).random(patches) for i in numbers]))
        found = []
        for i, kind in enumerate((here, ~here)):
            order = lot.where(kind, torch.inf).argsort(1)[:, :_EACH]
            at = torch.arange(len(here))[:, None] * patches + order
            some = at[kind.gather(1, order)][: _KEPT - self.taken[i]]
            self.taken[i] += len(some)
            found.append(some)
        return torch.cat(found).to(marked.device)


def _written(backbone: Backbone, block: int) -> Tensor:
    """What each neuron of a block adds to the residual stream for an activation of 1: → (channels, neurons).

    Raises InputError where something stands between them that is no scale.
    """
    blocks: Any = backbone.net.blocks
    part = blocks[block - 1]
    weight = test_time.projection(backbone, block).weight.float()
    if type(part).__name__ not in ("Block", "EvaBlock"):
        raise InputError(
            f"block {block} of {backbone.name} ({type(part).__name__}) does not add its MLP to the tokens as it is: its "
            "neurons' shares cannot be told"
        )
    scale = getattr(getattr(part, "ls2", None), "gamma", None)
    scale = getattr(part, "gamma_2", None) if scale is None else scale
    return weight if scale is None else weight * scale.float()[:, None]


def search(
    backbone: Backbone,
    images: Any,
    *,
    cutoff: float | None = None,
    layer: int = -1,
    seed: int = 0,
    batch: int = 16,
    precision: str = "float32",
) -> xr.Dataset:
    """Find what each MLP neuron contributes to the large norms of marked patches, in one pass.

    Args:
        backbone: The network.
        images: As `capture` takes them.
        cutoff: The norm above which a patch is marked; None finds one on the first images, which are then read twice.
        layer: The layer at which patches are marked, 1 to L; negative ones count from the end.
        seed: Of the patches that AUCs are computed from.
        batch: Images at a time.
        precision: Of the forward pass, as in `capture`.

    Returns:
        For [block, neuron], from block 1 to the layer: share of the shift of the mean state (all shares, those of attention
        and of biases among them, sum to 1), contrast (difference of the means in standard deviations over other patches), on
        and off (mean activation on marked and other patches) with on_spread and off_spread (standard deviations of a
        sample), auc (of marked against other patches; nan but for the largest
        shares). `half` with half_low and half_high is the least number of neurons whose shares sum to a half, with its 95 %
        interval over images, nan where they never do. Attributes: layer, cutoff, marked (patches), images.

    Raises:
        InputError: No patch is marked, a block's MLP has no known form, and as `capture` does.

    Example:
        >>> import vitregs as vr
        >>> vit = vr.load("supervised-pico")
        >>> found = search(vit, vr.open_images("scenes", size=vit.size, count=16), layer=1, cutoff=7.5)
        >>> found.share.dims
        ('block', 'neuron')
    """
    images = capture.opened(backbone, images)
    layer = layer + backbone.depth + 1 if layer < 0 else layer
    if not 1 <= layer <= backbone.depth:
        raise InputError(f"neurons write at layers 1 to {backbone.depth} of {backbone.name}, not at layer {layer}")
    if cutoff is None:
        first = images[:CALIBRATION] if isinstance(images, Tensor) else next(iter(images.pixels(CALIBRATION)))
        norms = capture.norms(backbone, first, layers=[layer], batch=batch).isel(layer=0)
        found = outliers.find_cutoff(norms)
        if found.value is None:
            raise InputError(
                f"no patch of {backbone.name} is marked at layer {layer}: {found}; mark at another layer (layer=…, --layer) "
                "or above a cut-off that you name (cutoff=…, --cutoff)"
            )
        cutoff = found.value
    blocks = range(1, layer + 1)
    written = {b: _written(backbone, b) for b in blocks}
    sums = _Sums(backbone, blocks, seed)
    for held, state in capture.neuron_states(
        backbone, images, blocks=blocks, layer=layer, batch=batch, precision=precision
    ):
        sums.add(held, state, cutoff)
    return _reduced(sums, written, layer, cutoff)


def _reduced(sums: _Sums, written: dict[int, Tensor], layer: int, cutoff: float) -> xr.Dataset:
    """Turn sums over images into shares, contrasts and AUCs."""
    backbone, blocks = sums.backbone, list(sums.blocks)
    counts, states = torch.cat(sums.counts).double(), torch.cat(sums.states).double()
    if not counts[:, 0].sum() or not counts[:, 1].sum():
        what = "no" if not counts[:, 0].sum() else "every"
        raise InputError(f"{what} patch of {backbone.name} has a norm above {cutoff:.3g} at layer {layer}")
    activations = [torch.cat(sums.sums[b]).double() for b in blocks]
    draw = np.random.default_rng(0)
    weights = torch.cat(
        [
            torch.ones(1, len(counts)),
            torch.from_numpy(draw.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), _DRAWS)),
        ]
    ).double()
    total = weights @ counts  # (draws, 2)
    weights, total = weights[(total > 0).all(1)], total[(total > 0).all(1)]

    def shift(values: Tensor) -> Tensor:
        both = torch.einsum("di,ikh->dkh", weights, values) / total[..., None]
        return both[:, 0] - both[:, 1]

    direction = shift(states)
    length = direction.norm(dim=1, keepdim=True)
    share = [
        shift(a) * ((direction / length) @ written[b].double().cpu()) / length
        for b, a in zip(blocks, activations, strict=True)
    ]
    half = [_half(torch.cat([s[i] for s in share]).numpy()) for i in range(len(weights))]
    low, high = np.nanquantile(half[1:], [0.025, 0.975]) if np.isfinite(half[1:]).any() else (np.nan, np.nan)
    on, off = ([a[:, i].sum(0) / total[0, i] for a in activations] for i in (0, 1))
    marked = torch.cat(sums.sampled)
    sample = [torch.cat(sums.sample[b]) for b in blocks]
    spread, spread_on = ([part[m].float().std(0, correction=0).double() for part in sample] for m in (~marked, marked))
    least = torch.cat([s[0] for s in share]).sort(descending=True).values[_RANKED - 1 :][:1]
    auc = [_auc(p, marked, s[0] >= least if len(least) else s[0] == s[0]) for p, s in zip(sample, share, strict=True)]
    width = max(len(o) for o in on)

    def table(rows: Sequence[Any]) -> tuple[tuple[str, str], np.ndarray]:
        cells = [np.pad(np.asarray(r, np.float32), (0, width - len(r)), constant_values=np.nan) for r in rows]
        return ("block", "neuron"), np.stack(cells)

    data = {
        "share": table([s[0] for s in share]),
        "contrast": table([(a - b) / s.clamp(min=1e-12) for a, b, s in zip(on, off, spread, strict=True)]),
        "on": table(on),
        "off": table(off),
        "on_spread": table(spread_on),
        "off_spread": table(spread),
        "auc": table(auc),
        "half": half[0],
        "half_low": low,
        "half_high": high,
    }
    attrs = {"layer": layer, "cutoff": float(cutoff), "marked": int(total[0, 0]), "images": len(counts)}
    coords = {"model": backbone.name, "block": blocks, "neuron": range(width)}
    return xr.Dataset(data, coords=coords, attrs=attrs)


def _half(share: np.ndarray) -> float:
    """The least number of shares that sum to a half, nan if they never do."""
    total = np.cumsum(np.sort(share)[::-1])
    return float(np.argmax(total >= 0.5) + 1) if total.max() >= 0.5 else np.nan  # the sum falls again at last


def _auc(values: Tensor, marked: Tensor, which: Tensor) -> np.ndarray:
    """Area under the ROC curve of some columns: (tokens, neurons), bool (tokens), bool (neurons) → (neurons), nan for the
    others; ties count half."""
    result = np.full(values.shape[1], np.nan)
    ranks = rankdata(values[:, which].float().numpy(), axis=0)
    ones, zeros = int(marked.sum()), int((~marked).sum())
    result[which.numpy()] = (ranks[marked.numpy()].sum(0) - ones * (ones + 1) / 2) / (ones * zeros)
    return result


def ranked(found: xr.Dataset, count: int | None = None) -> list[tuple[int, int]]:
    """Order neurons by their share.

    Args:
        found: What `search` gives.
        count: How many; None for all.

    Returns:
        (block, neuron) of each, the largest share first.
    """
    share = np.nan_to_num(found["share"].values, nan=-np.inf)
    order = np.argsort(-share, axis=None, kind="stable")[:count]
    at = np.unravel_index(order[np.isfinite(share.ravel()[order])], share.shape)
    return [(int(found["block"].values[b]), int(j)) for b, j in zip(*at, strict=True)]


def selectivity(found: xr.Dataset, neurons: Sequence[tuple[int, int]]) -> float:
    """How well neurons tell marked patches from others: what `search` gives, (block, neuron) of each → median AUC, of the
    reversed activation where a neuron fires the lower on marked patches; nan without any."""
    each = [float(found["auc"].sel(block=b, neuron=j)) for b, j in neurons]
    return float(np.median([max(a, 1 - a) for a in each])) if each else np.nan


def by_block(neurons: Sequence[tuple[int, int]]) -> dict[int, list[int]]:
    """Group neurons by their block: (block, neuron) of each → {block: neurons}."""
    found: dict[int, list[int]] = {}
    for block, number in sorted(neurons):
        found.setdefault(block, []).append(number)
    return found


def register_neurons(
    found: xr.Dataset, *, share: float = LEAST_SHARE, contrast: float = LEAST_CONTRAST
) -> dict[int, list[int]]:
    """Choose the register neurons among all.

    Args:
        found: What `search` gives.
        share: Least share of the shift.
        contrast: Least contrast, of either sign.

    Returns:
        Number of a block, from 1 → numbers of its neurons, from 0; empty if none is both.
    """
    chosen = (found["share"] >= share) & (abs(found["contrast"]) >= contrast)
    blocks, numbers = np.nonzero(chosen.values)
    return by_block([(int(found["block"].values[b]), int(j)) for b, j in zip(blocks, numbers, strict=True)])


def make_list(backbone: Backbone, images: Any, **how: Any) -> test_time.NeuronList:
    """Find the register neurons of a network and keep what is needed to move them.

    Args:
        backbone: The network.
        images: As `search` takes them.
        how: Keywords of `search`.

    Returns:
        Their list, for `test_time.append` and for names that end in +tt1.

    Raises:
        InputError: There are none, and as `search` does.
    """
    images = capture.opened(backbone, images)
    return as_list(backbone, images, search(backbone, images, **how))


def as_list(backbone: Backbone, images: Any, found: xr.Dataset) -> test_time.NeuronList:
    """Make the list of a search: the network, its images, and what `search` gave → as `make_list`, with its errors."""
    chosen = register_neurons(found)
    if not chosen:
        raise InputError(
            f"{backbone.name} has no register neurons on these images: none is selective for the {found.attrs['marked']} "
            f"patches above {found.attrs['cutoff']:.3g} at layer {found.attrs['layer']}"
        )
    facts = {k: v for k, v in provenance().items() if k in ("commit", "torch", "timm")}
    source = "a tensor" if isinstance(images, Tensor) else images.name
    facts |= {**found.attrs, "cutoff": round(found.attrs["cutoff"], 4), "source": source, "weights": backbone.weights}
    return test_time.NeuronList(
        backbone.name.partition("@")[0].split(".")[0], chosen, test_time.lengths(backbone, chosen), facts
    )


def suppression(
    backbone: Backbone,
    images: Any,
    *,
    neurons: Sequence[Sequence[int]],
    counts: Sequence[int],
    cutoff: float,
    layer: int = -1,
    seed: int = 0,
    batch: int = 16,
    precision: str = "float32",
) -> xr.Dataset:
    """Suppress more and more neurons, and as many random ones in the same blocks, and count what stays above the cut-off.

    Args:
        backbone: The network.
        images: As `capture` takes them.
        neurons: (block, neuron) of each, the most important first, as `ranked` gives them.
        counts: How many of them are suppressed, 0 among them for the network as it is.
        cutoff: The norm above which a patch is marked.
        layer: The layer at which patches are marked.
        seed: Of the random neurons.
        batch: Images at a time.
        precision: Of the forward pass, as in `capture`.

    Returns:
        [which ("ranked", "random"), count, image]: share of its patches above the cut-off, largest (over the median), in the
        network with these neurons suppressed on all tokens.

    Raises:
        InputError: As `test_time.suppress` and `capture` do.
    """
    images = capture.opened(backbone, images)
    rows: dict[str, list[list[np.ndarray]]] = {"share": [], "largest": []}
    plain: tuple[np.ndarray, np.ndarray] | None = None
    for which in ("ranked", "random"):
        cells: dict[str, list[np.ndarray]] = {"share": [], "largest": []}
        for count in counts:
            chosen = by_block([(int(b), int(j)) for b, j in neurons[:count]])
            if which == "random":
                chosen = test_time.random_neurons(backbone, chosen, seed=seed)
            if (count and chosen) or plain is None:
                net = test_time.suppress(backbone, chosen) if chosen else backbone
                seen = capture.capture(net, images, norms=[layer], kinds="patch", batch=batch, precision=precision)
                patch = seen["norms"].isel(layer=0)
                found = (patch > cutoff).mean("token").values, (patch.max("token") / patch.median("token")).values
                plain = found if not chosen else plain
            else:
                found = plain
            cells["share"].append(found[0])
            cells["largest"].append(found[1])
        for name, value in cells.items():
            rows[name].append(value)
    data = {name: (("which", "count", "image"), np.asarray(value, np.float32)) for name, value in rows.items()}
    return xr.Dataset(data, coords={"model": backbone.name, "which": ["ranked", "random"], "count": list(counts)})


# --- what a chapter measures
def _cutoff(
    backbone: Backbone, images: Any, layer: int, missing: float, batch: int, count: int = CALIBRATION
) -> tuple[float, str]:
    """The cut-off at a layer and the rule it comes from; without a mode the norm that a share of the patches exceeds."""
    first = images[:count] if isinstance(images, Tensor) else next(iter(images.pixels(count)))
    norms = capture.norms(backbone, first, layers=[layer], batch=batch).isel(layer=0)
    found = outliers.find_cutoff(norms)
    if found.value is not None:
        return found.value, str(found)
    stand_in = float(arrays.patches(norms).quantile(1 - missing))
    return stand_in, f"no second mode: the largest {100 * missing:g} % of norms stand in"


def of_network(
    backbone: Backbone,
    images: Any,
    *,
    layer: int = -1,
    missing: float = 0.02,
    calibration: int = CALIBRATION,
    batch: int = 16,
) -> xr.Dataset:
    """Search the neurons of any network, also of one without a mode.

    Args:
        backbone: The network.
        images: As `capture` takes them.
        layer: As in `search`.
        missing: Share of patches with the largest norms that stand in for marked ones where there is no mode.
        calibration: How many images, the first, the cut-off is found on.
        batch: Images at a time.

    Returns:
        What `search` gives, with the attribute rule: what decided on the cut-off, in words.

    Raises:
        InputError: As `search` does.
    """
    images = capture.opened(backbone, images)
    cutoff, rule = _cutoff(backbone, images, layer, missing, batch, calibration)
    found = search(backbone, images, cutoff=cutoff, layer=layer, batch=batch)
    return found.assign_attrs(rule=rule)


def maps(
    backbone: Backbone,
    images: Any,
    *,
    layer: int = -1,
    missing: float = 0.02,
    top: int = 4,
    shown: int = 4,
    pixels: bool = True,
    batch: int = 16,
) -> xr.Dataset:
    """Norms and activations of the strongest neurons on images that have marked patches.

    Args:
        backbone: The network.
        images: As `capture` takes them.
        layer: As in `of_network`.
        missing: As in `of_network`.
        top: How many neurons.
        shown: How many images, those with most marked patches among the first 16.
        pixels: Whether the images themselves are kept; photographs that packages ship need not be.
        batch: Images at a time.

    Returns:
        norm [image, token] by the number of the image; activation [image, token, neuron], neurons named "block:number";
        pixels [image, y_pixel, x_pixel, colour] of 0 to 255, if they are kept; patches alone.

    Raises:
        InputError: As `search` does.
    """
    images = capture.opened(backbone, images)
    found = of_network(backbone, images, layer=layer, missing=missing, batch=batch)
    first = images[:16] if isinstance(images, Tensor) else next(iter(images.pixels(16)))
    chosen = ranked(found, top)
    at = found.attrs["layer"]
    seen = capture.capture(backbone, first, norms=[at], neurons=by_block(chosen), kinds="patch", batch=batch)
    norm = seen["norms"].isel(layer=0)
    number = (norm.transpose("image", "token").values > found.attrs["cutoff"]).sum(1)
    best = np.sort(np.argsort(-number, kind="stable")[:shown])
    activation = seen["neurons"].sel(neuron=[f"{b}:{j}" for b, j in chosen])
    data = xr.Dataset({"norm": norm, "activation": activation}).isel(image=best).assign_coords(image=best)
    if pixels:
        shape = ("image", "y_pixel", "x_pixel", "colour")
        data["pixels"] = (shape, (255 * first[best]).round().permute(0, 2, 3, 1).cpu().numpy().astype(np.uint8))
    return data.assign_attrs(found.attrs)


def dose(
    backbone: Backbone,
    images: Any,
    *,
    counts: Sequence[int],
    layer: int = -1,
    missing: float = 0.02,
    calibration: int = CALIBRATION,
    batch: int = 16,
) -> xr.Dataset:
    """Suppress more and more of a network's strongest neurons, and as many random ones.

    Args:
        backbone: The network.
        images: As `capture` takes them.
        counts: As in `suppression`.
        layer: As in `of_network`.
        missing: As in `of_network`.
        calibration: As in `of_network`.
        batch: Images at a time.

    Returns:
        What `suppression` gives for the neurons of the largest shares.

    Raises:
        InputError: As `search` and `suppression` do.
    """
    images = capture.opened(backbone, images)
    how: dict[str, Any] = {"layer": layer, "missing": missing, "calibration": calibration, "batch": batch}
    found = of_network(backbone, images, **how)
    order, cutoff = ranked(found, max(counts)), found.attrs["cutoff"]
    return suppression(backbone, images, neurons=order, counts=counts, cutoff=cutoff, layer=layer, batch=batch)
