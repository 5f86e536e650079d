"""What happens inside a ViT: token norms and states, attention rows, queries, keys, values and neurons, in one pass.

The only file with hooks that watch. The images are read once and the network runs once a batch; reductions run inside the hooks,
so that no full state or attention map outlives its layer. Fused attention stays on, and only the query rows asked for
are computed again. Layer 0 is the input of block 1, layer L the output of the last block, before the final norm. Torch
ends here: what leaves is labelled.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from vitregs.arrays import KINDS, token_coords
from vitregs.data.images import Batch, open_images
from vitregs.errors import InputError, unknown
from vitregs.models import test_time
from vitregs.models.backbone import Backbone

Reduce = Callable[[Tensor], None]
Look = Callable[[int, Tensor, Tensor, Tensor, Tensor | None, float], None]  # layer, q, k, v, mask, scale
PROJECTIONS = ("query", "key", "value")
PRECISIONS = ("float32", "bfloat16")
# Random queries an image to estimate attention received from: on DeiT-Tiny at 448 px, sinks of 12 fair shares and more
# come out within 6 % in the mean over 8 images, sinks of 10 shares up to 17 % too low
QUERIES = 128
OVERSHOT = 0.1  # what a bicubic resize may add at edges to pixels in [0, 1]
_FULL = re.compile("out of memory|not enough memory|allocate memory|bad_alloc", re.IGNORECASE)


class ImageSource(Protocol):
    """Anything that gives batches of pixels (n, 3, H, W) in [0, 1]."""

    def pixels(self, batch: int) -> Iterator[Tensor]:
        """Yield batches of at most that many images."""
        ...


# --- hooks
@contextmanager
def tap(net: nn.Module, sites: Mapping[int, Reduce]) -> Iterator[None]:
    """Watch token states while the net runs: net, {layer: function of the state (n, tokens, channels)}.

    The hooks come off however the block ends. Raises InputError for layers that do not exist.
    """
    blocks: Any = net.blocks
    hooks: list[Any] = []
    if wrong := [n for n in sites if not 0 <= n <= len(blocks)]:
        raise InputError(f"layer {wrong[0]} does not exist: the network has layers 0 to {len(blocks)}")
    try:
        for layer, reduce in sites.items():
            if layer == 0:
                hooks.append(blocks[0].register_forward_pre_hook(lambda _m, x, f=reduce: f(x[0])))
            else:
                hooks.append(blocks[layer - 1].register_forward_hook(lambda _m, _x, y, f=reduce: f(y)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def tap_neurons(backbone: Backbone, sites: Mapping[int, Reduce]) -> Iterator[None]:
    """Watch MLP neurons while the net runs: what enters the output projection of a block's MLP, behind the activation.

    Takes the network and {number of a block, from 1: function of the activations (n, tokens, neurons)}. What a function
    keeps it must not change. The hooks come off however the block ends. Raises InputError for an MLP of unknown form.
    """
    places = {block: test_time.projection(backbone, block) for block in sites}
    hooks: list[Any] = []
    try:
        for block, reduce in sites.items():
            hooks.append(places[block].register_forward_pre_hook(lambda _m, x, f=reduce: f(x[0])))
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Attention(TorchFunctionMode):
    """Look at the arguments of fused attention while blocks run, and let it run as it is."""

    def __init__(self, net: nn.Module, look: Look) -> None:
        super().__init__()
        self.net, self.look = net, look
        self.block: int | None = None
        self.hooks: list[Any] = []

    def __enter__(self) -> "_Attention":
        blocks: Any = self.net.blocks
        for i, block in enumerate(blocks):
            self.hooks.append(block.register_forward_pre_hook(lambda _m, _x, i=i: setattr(self, "block", i)))
            self.hooks.append(block.register_forward_hook(lambda _m, _x, _y: setattr(self, "block", None)))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.block is not None:
            named = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
            q, k, v, mask = named["query"], named["key"], named["value"], named.get("attn_mask")
            scale = named.get("scale") or q.shape[-1] ** -0.5
            self.look(self.block + 1, q, k, v, mask, scale)
        return func(*args, **kwargs)


class _Enough(Exception):
    """Nothing that was asked for lies deeper: the rest of the network need not run."""


def _then_stop(reduce: Reduce | None) -> Reduce:
    def last(state: Tensor) -> None:
        if reduce is not None:
            reduce(state)
        raise _Enough

    return last


DIMS = {  # of each measure, behind the image
    "norms": ("layer", "token"),
    "tokens": ("tokens_layer", "token", "channel"),
    "attention": ("attention_layer", "head", "query", "token"),
    "qkv": ("qkv_layer", "projection", "token", "qkv_channel"),
}


def hooks(net: nn.Module) -> int:
    """Count the hooks on a network and all its parts: what a test watches."""
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, t)) for m in net.modules() for t in tables)


# --- reductions of attention
def rows(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, which: Sequence[int] | Tensor) -> Tensor:
    """Attention rows of some queries: q, k (n, heads, tokens, d), a mask to add or boolean, the same queries in all images
    or those of each (n, rows) → (n, heads, rows, tokens).

    Keys behind those of the tokens (`models.attention`) take their part of the softmax, and no column.
    """

    def pick(x: Tensor) -> Tensor:
        if not isinstance(which, Tensor):
            return x[:, :, list(which)]
        return x.gather(2, which[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[-1]))

    logits = (pick(q) * scale) @ k.transpose(-1, -2)
    if mask is not None:
        part = pick(mask.expand(*q.shape[:-1], k.shape[-2]))
        logits = logits.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else logits + part
    return logits.float().softmax(-1)[..., : q.shape[-2]]


def received_exactly(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention that each token receives of all queries, in fair shares, largest over heads: q, k (n, heads, tokens, d) →
    (n, tokens)."""
    n = q.shape[-2]
    total = torch.zeros(*q.shape[:-1], device=k.device)
    for start in range(0, n, 256):  # blocks of queries bound the memory
        total += rows(q, k, mask, scale, range(start, min(start + 256, n))).sum(2)
    return total.amax(1)  # the mean over n queries times n tokens


def received_estimated(
    q: Tensor, k: Tensor, mask: Tensor | None, scale: float, which: Tensor, prefix: int
) -> tuple[Tensor, Tensor]:
    """The same from random queries of each image (n, rows), and the largest on a patch: → (value, standard error), each
    (n, tokens + 1), of which the last is the largest.

    The largest of noisy numbers is too large. So the queries are split: one half chooses the head (and, for the largest,
    the patch), the other measures it, then the other way round. Either measures without bias what the other chose; this
    lies below the true largest where the choice was wrong, never above it on average.
    """
    halves = [rows(q, k, mask, scale, half) * q.shape[-2] for half in which.chunk(2, 1)]
    mean = torch.stack([half.mean(2) for half in halves], 1)  # (n, 2, heads, tokens)
    share = 1 - which.shape[1] / q.shape[-2]  # drawn without putting back
    # of the mean; from squares, since torch's own variance takes several times as long here
    squares = torch.stack([half.square().mean(2) for half in halves], 1) - mean.square()
    variance = squares.clamp(min=0) * (share / (halves[1].shape[2] - 1))
    safe = mean - variance.sqrt()  # a token that one query looks at is no sink
    head = safe.argmax(2, keepdim=True).flip(1)  # chosen by the other half
    value, noise = (x.gather(2, head)[:, :, 0] for x in (mean, variance))  # (n, 2, tokens)
    top = safe[..., prefix:].flatten(2).argmax(-1, keepdim=True).flip(1)
    most, most_noise = (x[..., prefix:].flatten(2).gather(2, top) for x in (mean, variance))
    value, noise = torch.cat([value, most], 2).mean(1), torch.cat([noise, most_noise], 2).sum(1)
    return value, noise.sqrt() / 2


# --- what is asked for
def _layers(backbone: Backbone, layers: Sequence[int] | None, first: int) -> list[int]:
    if isinstance(layers, int | str):
        raise InputError(f"layers are given as a list, [{layers}], not as {layers!r}")
    chosen = list(range(first, backbone.depth + 1)) if layers is None else [int(n) for n in layers]
    if not chosen:
        raise InputError(f"no layers are asked for: {backbone.name} has layers {first} to {backbone.depth}")
    fixed = [n + backbone.depth + 1 if n < 0 else n for n in chosen]
    for given, n in zip(chosen, fixed, strict=True):
        if not first <= n <= backbone.depth:
            raise InputError(f"layer {given} does not exist: {backbone.name} has layers {first} to {backbone.depth}")
    return fixed


def _check_backbone(given: Any) -> None:
    """Raise InputError for a network that is no Backbone yet."""
    if isinstance(given, str | Path):
        raise InputError(f"the first argument is a network, not its name: load({str(given)!r}) first")
    if not hasattr(given, "prepare"):
        raise InputError(f"the first argument is what load or wrap gives, not {type(given).__name__}")


def _kinds(backbone: Backbone, kinds: str | Iterable[str], least: int = 1) -> set[str]:
    """Check kinds of tokens: those asked for → those the model has. Raises InputError if these are less than `least`."""
    requested = [kinds] if isinstance(kinds, str) else list(kinds)
    for kind in requested:
        if kind not in KINDS:
            raise unknown("kind of token", kind, KINDS)
    there = set(requested) & set(backbone.kinds((1, 1)))
    if len(there) < least:
        raise InputError(f"{backbone.name} has no {' or '.join(requested) or 'such'} token to ask for")
    return there


def _check(values: Tensor, backbone: Backbone) -> Tensor:
    if not values.isfinite().all():
        raise InputError(f"{backbone.name} gives values that are not finite: its weights or the pixels are broken")
    return values


@dataclass
class _Plan:
    """What is to be measured: the arguments of `capture`, checked against the network."""

    backbone: Backbone
    norms: bool | Sequence[int] = False
    tokens: Sequence[int] | None = None
    attention: str | Iterable[str | int] | None = None
    attention_layers: Sequence[int] = (-1,)
    qkv: str | Sequence[str] | None = None
    qkv_layers: Sequence[int] = (-1,)
    received: bool | Sequence[int] = False
    queries: int | None = None
    embeddings: bool = False
    neurons: Mapping[int, Sequence[int]] | None = None
    final_norm: bool = False
    kinds: str | Iterable[str] | None = None
    partial: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _check_backbone(self.backbone)
        if isinstance(self.attention, int):  # True too
            raise InputError(
                f"attention is given as a list of kinds or patches, not as {self.attention!r}: ['cls'] for CLS"
            )

        def layers(given: bool | Sequence[int] | None, first: int) -> list[int]:
            return (
                []
                if given is None or given is False
                else _layers(self.backbone, None if given is True else given, first)
            )

        self.kept = set(KINDS) if self.kinds is None else _kinds(self.backbone, self.kinds)
        requested = [self.attention] if isinstance(self.attention, str) else list(self.attention or [])
        self.places = [int(w) for w in requested if not isinstance(w, str)]
        names = [w for w in requested if isinstance(w, str)]
        if self.attention is not None:
            self.query_kinds = _kinds(self.backbone, names, least=0 if self.places else 1)
        self.projections = [self.qkv] if isinstance(self.qkv, str) else list(self.qkv or [])
        for name in self.projections:
            if name not in PROJECTIONS:
                raise unknown("projection", name, PROJECTIONS)
        if self.queries is not None and self.queries < 4:
            raise InputError(f"attention received is estimated from 4 queries or more, not {self.queries}")
        self.sites = {
            "norms": layers(self.norms, 0),
            "tokens": layers(self.tokens, 0),
            "attention": layers(None if self.attention is None else self.attention_layers, 1),
            "qkv": layers(self.qkv_layers if self.projections else None, 1),
            "received": layers(self.received, 1),
        }
        self.units = {int(b): [int(j) for j in n] for b, n in (self.neurons or {}).items() if len(n)}
        test_time.check_neurons(self.backbone, self.units)
        if not self.embeddings and not self.units and not any(self.sites.values()):
            raise InputError(
                "nothing is asked for: name norms, tokens, attention, qkv, received, embeddings or neurons"
            )
        self.watched = {n for k in ("attention", "qkv", "received") for n in self.sites[k]}
        self.deepest = max([0, *self.units, *(n for chosen in self.sites.values() for n in chosen)])


# --- one pass
@dataclass
class _Pass:
    """One forward pass a batch, with all that a plan asks for taken in its hooks."""

    plan: _Plan
    found: dict[tuple[str, int], Any] = field(default_factory=dict)  # (measure, layer): values of the batch at hand
    blocked: dict[int, str] = field(default_factory=dict)  # block: why its attention cannot be watched
    which: list[int] = field(default_factory=list)  # queries whose attention is asked for
    coords: dict[Any, dict[str, Any]] = field(default_factory=dict)  # of each grid

    def __post_init__(self) -> None:
        self.draw = torch.Generator().manual_seed(self.plan.seed)
        self.calls: dict[int, int] = {}
        self.drawn: Tensor | None = None  # random queries of the batch at hand
        self.keep: Any = slice(None)

    def state(self, layer: int) -> Reduce:
        """What is taken of the states at a layer."""
        plan = self.plan
        norm = plan.backbone.final_norm() if plan.final_norm else None

        def reduce(state: Tensor) -> None:
            if layer in plan.sites["norms"]:  # squares of float16 overflow at a norm of 256
                self.found["norms", layer] = torch.linalg.vector_norm(state[:, self.keep].float(), dim=-1)
            if layer in plan.sites["tokens"]:
                whole = state if norm is None else norm(state)
                self.found["tokens", layer] = whole[:, self.keep].to(torch.float32, copy=True)

        return reduce

    def fire(self, block: int) -> Reduce:
        """What is taken of the neurons of a block."""
        numbers = self.plan.units[block]

        def reduce(activations: Tensor) -> None:
            self.found["neurons", block] = activations[:, self.keep][..., numbers].float()

        return reduce

    def look(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> None:
        """Take what is asked for of the attention of a block."""
        plan, sites = self.plan, self.plan.sites
        self.calls[layer] = self.calls.get(layer, 0) + 1
        if layer not in plan.watched or self.calls[layer] > 1:
            return
        q, k, v = q.float(), k.float(), v.float()
        mask = mask if mask is None or mask.dtype == torch.bool else mask.float()
        with torch.autocast(q.device.type, enabled=False):
            if layer in sites["attention"]:
                self.found["attention", layer] = rows(q, k, mask, scale, self.which)[..., self.keep]
            if layer in sites["qkv"]:
                whole = {p: x[:, :, : q.shape[2]] for p, x in zip(PROJECTIONS, (q, k, v), strict=True)}
                picked = [whole[p].transpose(1, 2).flatten(2)[:, self.keep] for p in plan.projections]
                self.found["qkv", layer] = torch.stack(picked, 1)
            if layer in sites["received"]:
                if self.drawn is None:
                    value = received_exactly(q, k, mask, scale)
                    found: tuple[Tensor, ...] = (
                        torch.cat([value, value[:, plan.backbone.prefix :].amax(1, keepdim=True)], 1),
                    )
                else:
                    found = received_estimated(q, k, mask, scale, self.drawn, plan.backbone.prefix)
                self.found["received", layer] = found

    def run(self, pixels: Tensor, precision: str) -> xr.Dataset:
        """Push a batch through the network: pixels (n, 3, H, W) → what was asked for, labelled."""
        plan, backbone = self.plan, self.plan.backbone
        x = backbone.prepare(pixels)
        grid = backbone.grid((pixels.shape[-2], pixels.shape[-1]))
        self.begin(len(x), grid)
        sites: dict[int, Reduce] = {n: self.state(n) for n in sorted({*plan.sites["norms"], *plan.sites["tokens"]})}
        if plan.deepest < backbone.depth:
            sites[plan.deepest] = _then_stop(sites.get(plan.deepest))
        net: Any = backbone.net
        watch = _Attention(net, self.look) if plan.watched else nullcontext()
        fire = tap_neurons(backbone, {b: self.fire(b) for b in plan.units})
        short = torch.autocast(x.device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()
        with torch.no_grad(), suppress(_Enough), self.embedding(), tap(net, sites), fire, watch, short:
            net.forward_features(x.to(next(net.parameters()).dtype))
        self.judge()
        return self.label(len(x), grid)

    def begin(self, count: int, grid: tuple[int, int]) -> None:
        """Forget the former batch; see which tokens are kept and which queries looked at in this one."""
        plan = self.plan
        kinds = plan.backbone.kinds(grid)
        self.found.clear()
        self.calls.clear()
        kept = [i for i, kind in enumerate(kinds) if kind in plan.kept]
        self.keep = slice(kept[0], kept[-1] + 1) if kept[-1] - kept[0] + 1 == len(kept) else kept
        if plan.attention is not None:
            patches = grid[0] * grid[1]
            for place in plan.places:
                if not 0 <= place < patches:
                    raise InputError(f"there is no patch {place}: the image has patches 0 to {patches - 1}")
            requested = [i for i, kind in enumerate(kinds) if kind in plan.query_kinds]
            self.which = requested + [plan.backbone.prefix + place for place in plan.places]
        self.drawn = None
        if plan.queries is not None and plan.queries < len(kinds):
            some = plan.queries // 2 * 2  # two halves
            drawn = [torch.randperm(len(kinds), generator=self.draw)[:some] for _ in range(count)]
            self.drawn = torch.stack(drawn).to(plan.backbone.device)

    @contextmanager
    def embedding(self) -> Iterator[None]:
        """Watch the patch embeddings, if they are asked for."""
        if not self.plan.embeddings:
            yield
            return
        embed: Any = self.plan.backbone.net.patch_embed
        hook = embed.register_forward_hook(lambda _m, _x, y: self.found.__setitem__(("embeddings", 0), y.float()))
        try:
            yield
        finally:
            hook.remove()

    def judge(self) -> None:
        """See which blocks kept their attention to themselves. Raises InputError for them, unless the plan is partial."""
        name = self.plan.backbone.name
        for layer in sorted(self.plan.watched):
            calls = self.calls.get(layer, 0)
            if calls == 1:
                continue
            why = "has more than one attention map" if calls else "does not use fused attention"
            if not self.plan.partial:
                raise InputError(f"block {layer} of {name} {why}" + ("" if calls else ": unset TIMM_FUSED_ATTN"))
            self.blocked[layer] = why
            for measure in ("attention", "qkv", "received"):
                self.found.pop((measure, layer), None)

    def labels(self, grid: tuple[int, int]) -> dict[str, Any]:
        """Coordinates of the kept tokens and of the queries."""
        if grid not in self.coords:
            whole = token_coords(self.plan.backbone.kinds(grid), grid)
            kept = {k: (dim, np.asarray(v)[self.keep]) for k, (dim, v) in whole.items()}
            coords: dict[str, Any] = {"model": self.plan.backbone.name, "token": kept["kind"], **kept}
            if self.plan.attention is not None:
                name, kind = (np.asarray(whole[k][1])[self.which] for k in ("label", "kind"))
                coords |= {"query": name, "query_kind": ("query", kind)}
            self.coords[grid] = coords
        return self.coords[grid]

    def label(self, count: int, grid: tuple[int, int]) -> xr.Dataset:
        """Name all that was found in a batch."""
        plan = self.plan
        data: dict[str, Any] = {}
        coords = dict(self.labels(grid))
        for name, dims in DIMS.items():
            if there := [n for n in plan.sites[name] if (name, n) in self.found]:
                values = _check(torch.stack([self.found[name, n] for n in there], 1), plan.backbone)
                data[name] = (("image", *dims), values.cpu().numpy())
                coords[dims[0]] = there
        if "qkv" in data:
            coords["projection"] = plan.projections
        if plan.embeddings:
            values = self.found["embeddings", 0].reshape(count, grid[0] * grid[1], -1)
            whole = F.pad(_check(values, plan.backbone), (0, 0, plan.backbone.prefix, 0), value=torch.nan)
            data["embeddings"] = (("image", "token", "channel"), whole[:, self.keep].cpu().numpy())
        if plan.units:
            values = torch.cat([self.found["neurons", b] for b in plan.units], -1)
            data["neurons"] = (("image", "token", "neuron"), _check(values, plan.backbone).cpu().numpy())
            pairs = [(b, j) for b, numbers in plan.units.items() for j in numbers]
            coords |= {"neuron": [f"{b}:{j}" for b, j in pairs], "block": ("neuron", [b for b, _ in pairs])}
        if plan.sites["received"]:
            data |= self.received(count, plan.backbone.prefix + grid[0] * grid[1])
            coords["received_layer"] = plan.sites["received"]
        return xr.Dataset(data, coords=coords, attrs=self.attrs())

    def received(self, count: int, tokens: int) -> dict[str, Any]:
        """Attention received, nan in blocks that cannot be watched."""
        nothing = torch.full((count, tokens + 1), torch.nan)
        data: dict[str, Any] = {}
        for part, ending in enumerate(("", "_error") if self.drawn is not None else ("",)):
            found = [self.found.get(("received", n)) for n in self.plan.sites["received"]]
            known = [nothing if f is None else _check(f[part], self.plan.backbone).cpu() for f in found]
            values = torch.stack(known, 1).numpy()
            each = values[..., :-1][..., self.keep]
            data["received" + ending] = (("image", "received_layer", "token"), each)
            data["sink" + ending] = (("image", "received_layer"), values[..., -1])
        return data

    def attrs(self) -> dict[str, str]:
        """How attention received was measured, and what could not be watched, in words."""
        words = {}
        if self.plan.sites["received"]:
            drawn = self.drawn
            words["received"] = "exact" if drawn is None else f"estimated from {drawn.shape[1]} random queries an image"
        reasons: dict[str, list[int]] = {}
        for layer, why in self.blocked.items():
            reasons.setdefault(why, []).append(layer)
        if reasons:
            words["unwatched"] = "; ".join(f"{_blocks(at)} {why}" for why, at in reasons.items())
        return words


def _blocks(numbers: Sequence[int]) -> str:
    """Name blocks in words: "block 3", "each of blocks 1 to 12", "each of blocks 1, 4"."""
    if len(numbers) == 1:
        return f"block {numbers[0]}"
    whole = list(numbers) == list(range(numbers[0], numbers[-1] + 1))
    return "each of blocks " + (f"{numbers[0]} to {numbers[-1]}" if whole else ", ".join(map(str, numbers)))


# --- many images
@contextmanager
def _enough_memory(count: int, size: Sequence[int]) -> Iterator[None]:
    """Turn what torch and NumPy raise for a lack of memory into an InputError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or _FULL.search(str(error)):
            raise InputError(
                f"out of memory with {count} images of {size[0]}x{size[1]} at a time: lower --batch or --size"
            ) from error
        raise


def _batches(images: ImageSource | Tensor, batch: int) -> Iterator[Batch]:
    """Read images once: yields batches, with what is known of their images where they come from a source that tells."""
    if batch < 1:
        raise InputError(f"batch must be 1 or more, not {batch}")
    empty = True
    if isinstance(images, Tensor):
        given: Iterator[Any] = iter(torch.split(images, batch))
    else:
        given = images.batches(batch) if hasattr(images, "batches") else images.pixels(batch)
    for part in given:
        known = Batch(part, [], [], [], []) if isinstance(part, Tensor) else part
        if len(known.pixels):
            empty = False
            yield known
    if empty:
        raise InputError("there are no images to measure")


def opened(backbone: Backbone, images: Any) -> ImageSource | Tensor:
    """Open what a user names as images, prepared as the model's own evaluation does it.

    Args:
        backbone: The network that decides size and preparation.
        images: A source or pixels (n, 3, height, width) in [0, 1], which stay as they are; otherwise what
            `images.open_images` takes, a folder or a list of PIL images for example.

    Raises:
        InputError: As `images.open_images` does, and for pixels that are no shares of white.
    """
    _check_backbone(backbone)
    if isinstance(images, Tensor) and images.numel():
        low, high = float(images.min()), float(images.max())
        if not images.is_floating_point() or low < -OVERSHOT or high > 1 + OVERSHOT:
            raise InputError(
                f"pixels lie in [0, 1], before any normalisation, not from {low:g} to {high:g} ({str(images.dtype)[6:]})"
            )
    if isinstance(images, str | Path | list | tuple):
        return open_images(images, size=backbone.size, preparation=backbone.preparation)
    if isinstance(images, Tensor):
        return images
    if hasattr(images, "pixels"):
        source: ImageSource = images
        return source
    raise InputError(f"images are a folder, a list of PIL images, a tensor or open images, not {type(images).__name__}")


def stream(
    backbone: Backbone,
    images: Any,
    *,
    batch: int = 32,
    precision: str = "float32",
    progress: bool | None = False,
    **what: Any,
) -> Iterator[tuple[Batch, xr.Dataset]]:
    """Measure batch after batch, for what need not be kept: as `capture`, yielding each batch and what was found in it."""
    watch = _Pass(_Plan(backbone, **what))
    images = opened(backbone, images)
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    total = len(images) if isinstance(images, Tensor) else getattr(images, "count", None)
    hidden = None if progress is None else not progress
    with tqdm(total=total, desc=backbone.name, unit="image", delay=1, leave=False, disable=hidden) as bar:
        for part in _batches(images, batch):
            with _enough_memory(len(part.pixels), part.pixels.shape[-2:]):
                found = watch.run(part.pixels, precision)
            yield part, found
            bar.update(len(part.pixels))


def neuron_states(
    backbone: Backbone,
    images: Any,
    *,
    blocks: Sequence[int],
    layer: int,
    batch: int = 16,
    precision: str = "float32",
) -> Iterator[tuple[dict[int, Tensor], Tensor]]:
    """All MLP neurons of some blocks together with the states of a layer behind them, for sums over many images.

    Args:
        backbone: The network.
        images: As `capture` takes them.
        blocks: Numbers of blocks, from 1 to the layer.
        layer: The layer whose states are wanted, behind these blocks.
        batch: Images at a time.
        precision: As in `capture`.

    Yields:
        For every batch, {block: activations (n, tokens, neurons)} and states (n, tokens, channels): the network's own
        tensors, which hold until the next batch and must not be changed.

    Raises:
        InputError: As `capture` does.
    """
    held: dict[int, Tensor] = {}
    end: list[Tensor] = []
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    sites = {layer: _then_stop(end.append)} if layer < backbone.depth else {layer: end.append}
    for part in _batches(opened(backbone, images), batch):
        with _enough_memory(len(part.pixels), part.pixels.shape[-2:]):
            x = backbone.prepare(part.pixels)
            net: Any = backbone.net
            short = torch.autocast(x.device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()
            keep: dict[int, Reduce] = {b: partial(held.__setitem__, b) for b in blocks}
            watch = tap_neurons(backbone, keep)
            with torch.no_grad(), suppress(_Enough), tap(net, sites), watch, short:
                net.forward_features(x.to(next(net.parameters()).dtype))
            yield held, _check(end.pop(), backbone)
        held.clear()


def join(parts: list[xr.Dataset]) -> xr.Dataset:
    """Put batches together along the images: what `stream` found, in order → Dataset. The list is emptied on the way, so
    that nothing lies in memory twice."""
    first, count = parts[0], sum(p.sizes["image"] for p in parts)
    data: dict[Any, Any] = {}
    for name, like in first.data_vars.items():
        whole = np.empty((count, *like.shape[1:]), like.dtype)
        start = 0
        for i, part in enumerate(parts):
            whole[start : start + part.sizes["image"]] = part[name].values
            start += part.sizes["image"]
            parts[i] = part.drop_vars(str(name)) if len(part.data_vars) > 1 else part[[]]
        data[name] = (like.dims, whole)
    return xr.Dataset(data, coords=first.coords, attrs=first.attrs)


def capture(
    backbone: Backbone,
    images: Any,
    *,
    norms: bool | Sequence[int] = False,
    tokens: Sequence[int] | None = None,
    attention: str | Iterable[str | int] | None = None,
    attention_layers: Sequence[int] = (-1,),
    qkv: str | Sequence[str] | None = None,
    qkv_layers: Sequence[int] = (-1,),
    received: bool | Sequence[int] = False,
    queries: int | None = None,
    embeddings: bool = False,
    neurons: Mapping[int, Sequence[int]] | None = None,
    final_norm: bool = False,
    kinds: str | Iterable[str] | None = None,
    partial: bool = False,
    seed: int = 0,
    batch: int = 32,
    precision: str = "float32",
    progress: bool | None = False,
) -> xr.Dataset:
    """Measure what happens inside a ViT, all from one reading of the images and one forward pass.

    The dataset holds what was asked for and nothing else. Layers are counted from 0, the input of block 1, to L, the
    output of the last block before the final norm; negative ones from the end. What concerns attention has the layers 1
    to L: those of the blocks. `token` names the kinds, so that `seen.norms.sel(token="patch")` selects the patches.

    The network runs as it is, uncompiled: on a CPU `torch.compile` takes longer to warm up than a run lasts, and saves a
    tenth of it at most.

    Args:
        backbone: The network.
        images: Open images, pixels (n, 3, height, width) in [0, 1], a folder or a data set's name, or a list of PIL images.
        norms: True for L2 norms of the token states at all layers, or the layers (section 2.1, Fig 3, 4a, 7, 15).
        tokens: Layers at which the token states themselves are kept.
        attention: Kinds of tokens, or patches by their number row after row, whose attention to all tokens is kept: rows
            of probabilities that sum to 1 over all tokens (Fig 1, 2, 9, 16, 18, 19); with an extra logit
            (`models.attention`) to less, by what it takes.
        attention_layers: Layers of `attention`, the last by default.
        qkv: Names among "query", "key" and "value": what enters the product of attention, after any norm or rotation
            that the model applies, heads side by side (Fig 13, 14).
        qkv_layers: Layers of `qkv`, the last by default.
        received: True for the attention that each token receives at all layers, or the layers: its share of the attention
            of all queries times the number of tokens, so that 1 is fair, largest over heads. What marks a sink.
        queries: How many random queries of each image `received` is estimated from; None, or as many as there are tokens,
            for all of them.
        embeddings: Whether to keep patch embeddings before positions are added (Fig 5a); nan for other tokens.
        neurons: Number of a block, from 1 → numbers of its MLP neurons, from 0, whose activations are kept: what enters the
            output projection, behind the activation function and, in a gated MLP, the product.
        final_norm: Whether the final norm is applied to `tokens`.
        kinds: Kinds of tokens that are kept along `token`, all by default.
        partial: Whether blocks whose attention cannot be watched are left out (nan in `received`) and named in the
            attribute `unwatched`, instead of raising.
        seed: Which queries are drawn for `received`.
        batch: Images at a time.
        precision: "float32", or "bfloat16" for a forward pass under autocast; norms and attention rows are computed in
            float32 from its states.
        progress: Whether to show a bar with images per second; None: if standard error is a terminal.

    Returns:
        norms [image, layer, token], tokens [image, tokens_layer, token, channel], attention [image, attention_layer, head,
        query, token], kinds of queries before places; qkv [image, qkv_layer, projection, token, qkv_channel], received
        [image, received_layer, token] and sink [image, received_layer], the largest on a patch, both in fair shares and,
        if estimated, with standard errors received_error and sink_error; embeddings [image, token, channel]; neurons
        [image, token, neuron], named "block:number".

    Raises:
        InputError: For layers, tokens or names that do not exist, no images, values that are not finite, blocks whose
            attention cannot be watched, and too little memory.

    Example:
        >>> import vitregs as vr
        >>> vit = vr.load("supervised-pico-reg4")
        >>> images = vr.open_images("scenes", size=vit.size, count=2)
        >>> seen = vr.capture(vit, images, norms=True, attention=["cls"])
        >>> dict(seen.norms.sel(layer=8, token="register").sizes)
        {'image': 2, 'token': 4}
        >>> dict(seen.attention.sizes)
        {'image': 2, 'attention_layer': 1, 'head': 3, 'query': 1, 'token': 149}
    """
    what = {k: v for k, v in locals().items() if k not in ("backbone", "images")}
    return join([found for _, found in stream(backbone, images, **what)])


# --- one measure alone
def _alone(seen: xr.Dataset, name: str, called: str) -> xr.DataArray:
    """One measure of a dataset with its own labels: dims image, layer, …, token, …"""
    array = seen[name].drop_vars("token", errors="ignore")
    names = {f"{name}_layer": "layer", "qkv_channel": "channel"}
    return array.rename({k: v for k, v in names.items() if k in array.dims}).rename(called)


def norms(
    backbone: Backbone, images: ImageSource | Tensor, *, layers: Sequence[int] | None = None, batch: int = 32
) -> xr.DataArray:
    """`capture` of norms alone, at some layers (default all): → [image, layer, token]."""
    return _alone(capture(backbone, images, norms=True if layers is None else layers, batch=batch), "norms", "norm")


def tokens(
    backbone: Backbone,
    images: ImageSource | Tensor,
    *,
    layer: int = -1,
    kinds: str | Iterable[str] = ("patch",),
    final_norm: bool = False,
    batch: int = 32,
) -> xr.DataArray:
    """`capture` of token states at one layer: → [image, token, channel]."""
    seen = capture(backbone, images, tokens=[layer], kinds=kinds, final_norm=final_norm, batch=batch)
    return _alone(seen, "tokens", "state").isel(layer=0)


def register_means(backbone: Backbone, images: ImageSource | Tensor, *, batch: int = 32) -> xr.DataArray:
    """Mean over images of the register tokens at every layer: → [layer, token, channel]; empty without registers."""
    layers = range(backbone.depth + 1)
    if not backbone.registers:
        labels = {k: (d, np.asarray(v)[:0]) for k, (d, v) in token_coords(["patch"], (1, 1)).items()}
        nothing = np.empty((len(layers), 0, backbone.width), np.float32)
        coords = {"model": backbone.name, "layer": layers, **labels}
        return xr.DataArray(nothing, dims=("layer", "token", "channel"), coords=coords, name="mean")
    seen = _alone(capture(backbone, images, tokens=layers, kinds="register", batch=batch), "tokens", "mean")
    return seen.mean("image")


def patch_embeddings(backbone: Backbone, images: ImageSource | Tensor, *, batch: int = 32) -> xr.DataArray:
    """`capture` of patch embeddings before positions are added: → [image, token, channel] of patches (Fig 5a)."""
    return _alone(capture(backbone, images, embeddings=True, kinds="patch", batch=batch), "embeddings", "embedding")


def attention(
    backbone: Backbone,
    images: ImageSource | Tensor,
    *,
    layers: Sequence[int] = (-1,),
    queries: str | Iterable[str | int] = ("cls", "register"),
    batch: int = 32,
) -> xr.DataArray:
    """`capture` of attention rows alone: → [image, layer, head, query, token]."""
    seen = capture(backbone, images, attention=queries, attention_layers=layers, batch=batch)
    return _alone(seen, "attention", "attention")


def attention_received(
    backbone: Backbone, images: ImageSource | Tensor, *, layers: Sequence[int] | None = None, batch: int = 16
) -> xr.DataArray:
    """`capture` of attention received of all queries: → [image, layer, token]."""
    seen = capture(backbone, images, received=True if layers is None else layers, batch=batch)
    return _alone(seen, "received", "concentration")


def projections(
    backbone: Backbone, images: ImageSource | Tensor, *, which: str, layer: int = -1, batch: int = 32
) -> xr.DataArray:
    """`capture` of the queries, keys or values of one block: → [image, token, channel]."""
    seen = _alone(capture(backbone, images, qkv=[which], qkv_layers=[layer], batch=batch), "qkv", which)
    return seen.isel(layer=0, projection=0).drop_vars("projection")


__all__ = [
    "PROJECTIONS",
    "attention",
    "attention_received",
    "capture",
    "hooks",
    "join",
    "neuron_states",
    "norms",
    "opened",
    "patch_embeddings",
    "projections",
    "register_means",
    "rows",
    "stream",
    "tap",
    "tap_neurons",
    "tokens",
]
