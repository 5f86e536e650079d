"""What happens inside a ViT: token norms, token states, attention rows, queries, keys and values.

The only file with hooks. Reductions run inside the hook, so that no full state or attention map outlives its layer;
fused attention stays on, and only the query rows asked for are computed again. Layer 0 is the input of block 1, layer
L the output of the last block, before the final norm. Torch ends here: what leaves is a labelled array.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitregs.backbones import Backbone
from vitregs.problems import Problem, unknown
from vitregs.results import KINDS, token_coords

Reduce = Callable[[Tensor], None]
Look = Callable[[int, Tensor, Tensor, Tensor, Tensor | None, float], None]  # layer, q, k, v, mask, scale


class Pictures(Protocol):
    """Anything that gives batches of pixels (n, 3, H, W) in [0, 1]."""

    def pixels(self, batch: int) -> Iterator[Tensor]:
        """Yield batches of at most that many pictures."""
        ...


@contextmanager
def tap(net: nn.Module, sites: Mapping[int, Reduce]) -> Iterator[None]:
    """Watch token states while the net runs: net, {layer: function of the state (n, tokens, channels)}.

    The hooks come off however the block ends. Raises Problem for layers that do not exist.
    """
    blocks: Any = net.blocks
    hooks: list[Any] = []
    if wrong := [n for n in sites if not 0 <= n <= len(blocks)]:
        raise Problem(f"layer {wrong[0]} does not exist: the network has layers 0 to {len(blocks)}")
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


class _Attention(TorchFunctionMode):
    """Look at the arguments of fused attention while chosen blocks run, and let it run as it is."""

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
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for hook in self.hooks:
            hook.remove()
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.block is not None:
            named = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
            q, k, v, mask = named["query"], named["key"], named["value"], named.get("attn_mask")
            scale = named.get("scale") or q.shape[-1] ** -0.5
            self.look(self.block + 1, q, k, v, mask, scale)
        return func(*args, **kwargs)


def _layers(backbone: Backbone, layers: Sequence[int] | None, first: int) -> list[int]:
    chosen = list(range(first, backbone.depth + 1)) if layers is None else [int(n) for n in layers]
    if not chosen:
        raise Problem(f"no layers are asked for: {backbone.name} has layers {first} to {backbone.depth}")
    fixed = [n + backbone.depth + 1 if n < 0 else n for n in chosen]
    for given, n in zip(chosen, fixed, strict=True):
        if not first <= n <= backbone.depth:
            raise Problem(f"layer {given} does not exist: {backbone.name} has layers {first} to {backbone.depth}")
    return fixed


def _batches(images: Pictures | Tensor, batch: int) -> Iterator[Tensor]:
    if batch < 1:
        raise Problem(f"batch must be 1 or more, not {batch}")
    empty = True
    for pixels in images.split(batch) if isinstance(images, Tensor) else images.pixels(batch):
        if len(pixels):
            empty = False
            yield pixels
    if empty:
        raise Problem("there are no pictures to measure")


def _kinds(backbone: Backbone, kinds: str | Iterable[str], least: int = 1) -> set[str]:
    """Check kinds of tokens: those asked for → those the model has. Raises Problem if these are less than `least`."""
    asked = [kinds] if isinstance(kinds, str) else list(kinds)
    for kind in asked:
        if kind not in KINDS:
            raise unknown("kind of token", kind, KINDS)
    there = set(asked) & set(backbone.kinds((1, 1)))
    if len(there) < least:
        raise Problem(f"{backbone.name} has no {' or '.join(asked) or 'such'} token to ask for")
    return there


def _check(values: Tensor, backbone: Backbone) -> Tensor:
    if not values.isfinite().all():
        raise Problem(f"{backbone.name} gives values that are not finite: its weights or the pixels are broken")
    return values


def _run(backbone: Backbone, images: Pictures | Tensor, batch: int) -> Iterator[tuple[int, int]]:
    """Push every batch through the network: yields the patch grid after each."""
    for pixels in _batches(images, batch):
        x = backbone.prepare(pixels)
        forward: Any = backbone.net.forward_features
        with torch.no_grad():
            forward(x)
        yield backbone.grid((pixels.shape[-2], pixels.shape[-1]))


def _label(
    values: np.ndarray, dims: Sequence[str], backbone: Backbone, grid: tuple[int, int], **coords: Any
) -> xr.DataArray:
    return xr.DataArray(
        values,
        dims=dims,
        coords={"model": backbone.name, **token_coords(backbone.kinds(grid), grid), **coords},
    )


def norms(
    backbone: Backbone, images: Pictures | Tensor, *, layers: Sequence[int] | None = None, batch: int = 32
) -> xr.DataArray:
    """L2 norms over channels of all token states: pictures, layers (default all) → [image, layer, token].

    States are those of the residual stream, before the final norm (section 2.1, Fig 3, 4a, 7, 15). Raises Problem for
    layers that do not exist, no pictures, and values that are not finite.
    """
    chosen = _layers(backbone, layers, 0)
    parts: list[Tensor] = []
    found: dict[int, Tensor] = {}
    grid = (0, 0)

    def reduce(layer: int) -> Reduce:
        return lambda state: found.__setitem__(layer, torch.linalg.vector_norm(state, dim=-1, dtype=torch.float32))

    with tap(backbone.net, {n: reduce(n) for n in chosen}):
        for grid in _run(backbone, images, batch):  # noqa: B007
            parts.append(_check(torch.stack([found[n] for n in chosen], 1), backbone).cpu())
    return _label(torch.cat(parts).numpy(), ("image", "layer", "token"), backbone, grid, layer=chosen).rename("norm")


def tokens(
    backbone: Backbone,
    images: Pictures | Tensor,
    *,
    layer: int = -1,
    kinds: Sequence[str] = ("patch",),
    final_norm: bool = False,
    batch: int = 32,
) -> xr.DataArray:
    """Token states at one layer: pictures, layer, kinds, whether to apply the final norm → [image, token, channel].

    Raises Problem for a layer, kinds of tokens or a final norm that the model lacks, no pictures, and values that are
    not finite.
    """
    (chosen,) = _layers(backbone, [layer], 0)
    wanted = _kinds(backbone, kinds)
    parts: list[Tensor] = []
    found: list[Tensor] = []
    keep: list[int] = []
    grid = (0, 0)
    norm = backbone.final_norm() if final_norm else None
    with tap(backbone.net, {chosen: lambda state: found.append(state)}):
        for grid in _run(backbone, images, batch):
            state = found.pop()
            keep = [i for i, k in enumerate(backbone.kinds(grid)) if k in wanted]
            with torch.no_grad():
                state = state[:, keep] if norm is None else norm(state)[:, keep]
            parts.append(_check(state, backbone).float().cpu())
    labels = token_coords(backbone.kinds(grid), grid)
    kept = {k: (d, np.asarray(v)[keep]) for k, (d, v) in labels.items()}
    return xr.DataArray(
        torch.cat(parts).numpy(),
        dims=("image", "token", "channel"),
        coords={"model": backbone.name, "layer": chosen, **kept},
        name="state",
    )


def register_means(backbone: Backbone, images: Pictures | Tensor, *, batch: int = 32) -> xr.DataArray:
    """Mean over pictures of the register tokens at every layer: pictures → [layer, token, channel]; empty without registers."""
    first, last = backbone.prefix - backbone.registers, backbone.prefix
    sites = range(backbone.depth + 1)
    found: dict[int, list[Tensor]] = {n: [] for n in sites}
    grid = (0, 0)

    def reduce(layer: int) -> Reduce:
        return lambda state: found[layer].append(state[:, first:last].clone())

    with tap(backbone.net, {n: reduce(n) for n in sites}):
        for grid in _run(backbone, images, batch):  # noqa: B007
            pass
    labels = {k: (d, np.asarray(v)[first:last]) for k, (d, v) in token_coords(backbone.kinds(grid), grid).items()}
    values = torch.stack([_check(torch.cat(found[n]).mean(0), backbone) for n in sites]).float().cpu().numpy()
    coords = {"model": backbone.name, "layer": list(sites), **labels}
    return xr.DataArray(values, dims=("layer", "token", "channel"), coords=coords, name="mean")


def stem(backbone: Backbone, images: Pictures | Tensor, *, batch: int = 32) -> xr.DataArray:
    """Patch embeddings before positions are added: pictures → [image, token, channel] (Fig 5a).

    Raises Problem for no pictures and for values that are not finite.
    """
    parts: list[Tensor] = []
    grid = (0, 0)
    for pixels in _batches(images, batch):
        x = backbone.prepare(pixels)
        grid = backbone.grid((pixels.shape[-2], pixels.shape[-1]))
        embed: Any = backbone.net.patch_embed
        with torch.no_grad():
            parts.append(_check(embed(x), backbone).reshape(len(x), grid[0] * grid[1], -1).float().cpu())
    return xr.DataArray(
        torch.cat(parts).numpy(),
        dims=("image", "token", "channel"),
        coords={"model": backbone.name, **token_coords(["patch"] * (grid[0] * grid[1]), grid)},
        name="stem",
    )


def _watch(
    backbone: Backbone,
    images: Pictures | Tensor,
    chosen: Sequence[int],
    take: Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor],
    batch: int,
) -> tuple[Tensor, tuple[int, int]]:
    """Collect take(q, k, v, mask, scale) at the chosen layers: → (image, layer, …) and the grid."""
    found: dict[int, Tensor] = {}
    parts: list[Tensor] = []
    grid = (0, 0)

    def look(layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> None:
        if layer in chosen:
            if layer in found:
                raise Problem(f"block {layer} of {backbone.name} has more than one attention map")
            found[layer] = take(q, k, v, mask, scale)

    with _Attention(backbone.net, look):
        for grid in _run(backbone, images, batch):  # noqa: B007
            if silent := set(chosen) - set(found):
                raise Problem(
                    f"block {min(silent)} of {backbone.name} does not use fused attention: unset TIMM_FUSED_ATTN"
                )
            parts.append(_check(torch.stack([found[n] for n in chosen], 1), backbone).cpu())
            found.clear()
    return torch.cat(parts), grid


def rows(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, which: Sequence[int]) -> Tensor:
    """Attention rows of some queries: q, k (n, heads, tokens, d), a mask to add or boolean → (n, heads, rows, tokens)."""
    logits = (q[:, :, list(which)] * scale) @ k.transpose(-1, -2)
    if mask is not None:
        part = mask.expand(*q.shape[:-1], k.shape[-2])[:, :, list(which)]
        logits = logits.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else logits + part
    return logits.float().softmax(-1)


def attention(
    backbone: Backbone,
    images: Pictures | Tensor,
    *,
    layers: Sequence[int] = (-1,),
    queries: Iterable[str | int] = ("cls", "register"),
    batch: int = 32,
) -> xr.DataArray:
    """Attention probabilities of chosen queries to all tokens, rows summing to 1 (Fig 1, 2, 9, 16, 18, 19).

    Pictures, layers ≥ 1, kinds of queries or positions in the patch grid (row-major) → [image, layer, head, query,
    token], kinds before positions. Raises Problem for layers or queries that the model lacks and values not finite.
    """
    chosen = _layers(backbone, layers, 1)
    asked = [queries] if isinstance(queries, str) else list(queries)
    places = [int(w) for w in asked if not isinstance(w, str)]
    names = [w for w in asked if isinstance(w, str)]
    wanted = _kinds(backbone, names, least=0 if places else 1)
    which: list[int] = []

    def take(q: Tensor, k: Tensor, _v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        patches = q.shape[-2] - backbone.prefix
        for place in places:
            if not 0 <= place < patches:
                raise Problem(f"there is no patch {place}: the picture has patches 0 to {patches - 1}")
        kinds = backbone.kinds((1, patches))
        which[:] = [i for i, kind in enumerate(kinds) if kind in wanted] + [backbone.prefix + p for p in places]
        return rows(q, k, mask, scale, which)

    values, grid = _watch(backbone, images, chosen, take, batch)
    labels = token_coords(backbone.kinds(grid), grid)
    name, kind = (np.asarray(labels[k][1])[which] for k in ("label", "kind"))
    query = {"query": name, "query_kind": ("query", kind)}
    dims = ("image", "layer", "head", "query", "token")
    return _label(values.numpy(), dims, backbone, grid, layer=list(chosen), **query).rename("attention")


def concentration(
    backbone: Backbone, images: Pictures | Tensor, *, layers: Sequence[int] | None = None, batch: int = 16
) -> xr.DataArray:
    """Share of all attention that each token receives, times the number of tokens (1 is fair): → [image, layer, token].

    Mean over queries, largest over heads: what marks an attention sink. Raises Problem as `attention` does.
    """
    chosen = _layers(backbone, layers, 1)

    def take(q: Tensor, k: Tensor, _v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        n = q.shape[-2]
        total = torch.zeros(*k.shape[:-1], device=k.device)
        for start in range(0, n, 256):  # blocks of queries bound the memory
            part = list(range(start, min(start + 256, n)))
            total += rows(q, k, mask, scale, part).sum(2)
        return total.amax(1)  # the mean over n queries times n tokens

    values, grid = _watch(backbone, images, chosen, take, batch)
    array = _label(values.numpy(), ("image", "layer", "token"), backbone, grid, layer=list(chosen))
    return array.rename("concentration")


def projections(
    backbone: Backbone, images: Pictures | Tensor, *, which: str, layer: int = -1, batch: int = 32
) -> xr.DataArray:
    """Queries, keys or values of a block, heads side by side: "query", "key" or "value" → [image, token, channel].

    What enters the product of attention, after any norm or rotation the model applies to it (Fig 13, 14). Raises Problem
    for other names, layers that do not exist and values that are not finite.
    """
    place = {"query": 0, "key": 1, "value": 2}
    if which not in place:
        raise Problem(f"which must be query, key or value, not {which!r}")
    (chosen,) = _layers(backbone, [layer], 1)

    def take(q: Tensor, k: Tensor, v: Tensor, _mask: Tensor | None, _scale: float) -> Tensor:
        return (q, k, v)[place[which]].transpose(1, 2).flatten(2).float()

    values, grid = _watch(backbone, images, [chosen], take, batch)
    array = _label(values[:, 0].numpy(), ("image", "token", "channel"), backbone, grid, layer=chosen)
    return array.rename(which)


def hooks(net: nn.Module) -> int:
    """Count the hooks on a network and all its parts: what a test watches."""
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, t)) for m in net.modules() for t in tables)


__all__ = ["KINDS", "attention", "concentration", "hooks", "norms", "projections", "rows", "stem", "tap", "tokens"]
