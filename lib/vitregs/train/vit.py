"""timm's ViT as training needs it: made from a recipe, fed with masked or partial sequences."""

from collections.abc import Callable
from functools import cache
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vitregs.train.config import Recipe

MEAN, STD = (0.42, 0.42, 0.42), (0.25, 0.25, 0.25)


def build(recipe: Recipe, classes: int = 0) -> nn.Module:
    """Make the network with fresh weights: recipe, classes of its head (0: none) → timm ViT.

    Networks that differ in their registers alone start from the same weights elsewhere.
    """
    torch.manual_seed(recipe.seed)
    more: Any = {"num_classes": classes, "drop_path_rate": recipe.drop_path}
    plain: Any = timm.models.VisionTransformer(**{**recipe.vit(), "reg_tokens": 0}, **more)
    if not recipe.registers:
        return plain
    with torch.random.fork_rng(devices=[]):  # timm draws registers first, which would change all that follows
        net: Any = timm.models.VisionTransformer(**recipe.vit(), **more)
    net.load_state_dict(plain.state_dict(), strict=False)
    draw = torch.Generator().manual_seed(recipe.seed)
    with torch.no_grad():
        net.reg_token.copy_(torch.randn(net.reg_token.shape, generator=draw) * recipe.register_init)
    return net


def normalise(pixels: Tensor) -> Tensor:
    """Shift and scale pixels (…, 3, H, W) in [0, 1] → network input."""
    mean, std = _stats(pixels.device, pixels.dtype)
    return (pixels - mean) / std


@cache
def _stats(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation on a device, made once: a copy in every step would wait for it."""
    mean, std = (torch.tensor(v, device=device, dtype=dtype).view(3, 1, 1) for v in (MEAN, STD))
    return mean, std


def encode(
    net: Any, pixels: Tensor, change: Callable[[Tensor], Tensor] | None = None, keep: Tensor | None = None
) -> Tensor:
    """Run a ViT on changed or partial sequences: pixels (n, 3, H, W) in [0, 1] → tokens (n, prefix + kept, d), final norm on.

    `change` acts on the patch embeddings (n, patches, d) before positions are added (iBOT's masks); `keep` (n, kept)
    names the patches that enter the blocks (MAE). CLS and registers always do.
    """
    x = net.patch_embed(normalise(pixels))
    x = net._pos_embed(x if change is None else change(x))
    if keep is not None:
        prefix = net.num_prefix_tokens
        patches = x[:, prefix:].gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([x[:, :prefix], patches], 1)
    return net.norm(net.blocks(net.norm_pre(x)))


def resized(net: Any, pixels: Tensor) -> Tensor:
    """CLS tokens of images of another size (small crops), positions resized: (n, 3, h, w) in [0, 1] → (n, d)."""
    from timm.layers import resample_abs_pos_embed

    x = net.patch_embed.proj(normalise(pixels)).flatten(2).transpose(1, 2)
    side = pixels.shape[-1] // net.patch_embed.patch_size[0]
    position = resample_abs_pos_embed(
        net.pos_embed,
        new_size=[side, side],
        old_size=list(net.patch_embed.grid_size),
        num_prefix_tokens=0,
        antialias=True,
    )
    prefix = [t.expand(len(x), -1, -1) for t in (net.cls_token, net.reg_token) if t is not None]
    x = torch.cat([*prefix, net.patch_embed.norm(x) + position], 1)
    return net.norm(net.blocks(net.norm_pre(x)))[:, 0]
