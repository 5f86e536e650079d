"""timm's ViT as training needs it: made from a recipe, fed with masked or partial sequences."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from vitregs.models import registry
from vitregs.models.attention import PLAIN
from vitregs.train.config import Recipe
from vitregs.train.start import Start

MEAN, STD = (0.42, 0.42, 0.42), (0.25, 0.25, 0.25)


def build(recipe: Recipe, classes: int = 0, start: Start | None = None) -> nn.Module:
    """Make the network as it is before the first step.

    Networks that differ in their registers or their attention alone start from the same weights elsewhere. It carries
    `pixel_mean` and `pixel_std`, by which `normalise` feeds it, and `facts`, by which `registry.build` makes it again.

    Args:
        recipe: What is trained.
        classes: Of its head, 0 for none.
        start: Where its weights come from, None for random ones.

    Returns:
        timm's ViT.
    """
    torch.manual_seed(recipe.seed)
    net = start.network(recipe, classes) if start else _fresh(recipe, classes)
    net.pixel_mean, net.pixel_std = (start.backbone.mean, start.backbone.std) if start else (MEAN, STD)
    net.facts = start.facts(recipe, classes) if start else {**recipe.vit(), "num_classes": classes}
    return net


def _fresh(recipe: Recipe, classes: int) -> Any:
    """timm's ViT of a recipe with random weights."""
    more: Any = {"num_classes": classes, "drop_path_rate": recipe.drop_path}
    plain = registry.build(recipe.override(registers=0, attention=PLAIN).vit(), **more)
    if not recipe.registers and recipe.attention == PLAIN:
        return plain
    with torch.random.fork_rng(devices=[]):  # timm draws registers first, which would change all that follows
        net = registry.build(recipe.vit(), **more)
    net.load_state_dict(plain.state_dict(), strict=False)
    if not recipe.registers:
        return net
    draw = torch.Generator().manual_seed(recipe.seed)
    with torch.no_grad():
        net.reg_token.copy_(torch.randn(net.reg_token.shape, generator=draw) * recipe.register_init)
    return net


def normalise(net: Any, pixels: Tensor) -> Tensor:
    """Shift and scale pixels (…, 3, H, W) in [0, 1] → input of a network that `build` made."""
    mean, std = (_on(tuple(v), pixels.device, pixels.dtype) for v in (net.pixel_mean, net.pixel_std))
    return (pixels - mean) / std


@cache
def _on(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Values of three channels on a device, made once: a copy in every step would wait for it."""
    return torch.tensor(values, device=device, dtype=dtype).view(3, 1, 1)


def encode(
    net: Any, pixels: Tensor, change: Callable[[Tensor], Tensor] | None = None, keep: Tensor | None = None
) -> Tensor:
    """Run a ViT on changed or partial sequences: pixels (n, 3, H, W) in [0, 1] → tokens (n, prefix + kept, d), final norm on.

    `change` acts on the patch embeddings (n, patches, d) before positions are added (iBOT's masks); `keep` (n, kept)
    names the patches that enter the blocks (MAE). CLS and registers always do.
    """
    x = net.patch_embed(normalise(net, pixels))
    x = net._pos_embed(x if change is None else change(x))
    if keep is not None:
        prefix = net.num_prefix_tokens
        patches = x[:, prefix:].gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([x[:, :prefix], patches], 1)
    return net.norm(net.blocks(net.norm_pre(x)))


def resized(net: Any, pixels: Tensor) -> Tensor:
    """CLS tokens of images of another size (small crops), positions resized: (n, 3, h, w) in [0, 1] → (n, d)."""
    from timm.layers import resample_abs_pos_embed

    x = net.patch_embed.proj(normalise(net, pixels)).flatten(2).transpose(1, 2)
    side = pixels.shape[-1] // net.patch_embed.patch_size[0]
    prefix = [t.expand(len(x), -1, -1) for t in (net.cls_token, net.reg_token) if t is not None]
    with_position = 0 if net.no_embed_class else net.num_prefix_tokens
    position = resample_abs_pos_embed(
        net.pos_embed,
        new_size=[side, side],
        old_size=list(net.patch_embed.grid_size),
        num_prefix_tokens=with_position,
        antialias=True,
    )
    x = net.patch_embed.norm(x)
    x = torch.cat([*prefix, x], 1) + position if with_position else torch.cat([*prefix, x + position], 1)
    return net.norm(net.blocks(net.norm_pre(x)))[:, 0]
