"""ViTs whose large norms are planted: by register neurons on redundant patches, or by what a patch shows.

Channels of the residual stream with a job: 0 carries the large norm, 1 says how textured a patch is (0 if flat), 2 marks some
positions, 3 how red a patch is, 4 to 9 are high-frequency filters; channels 95 to 86 are their negatives, so that the mean of the
channels, which LayerNorm takes away, stays zero. All others are random. The neuron of block 3 that writes
channel 0 fires on flat patches at marked positions ("artifacts"), or on red patches wherever they are ("content"). From block 4
on, tokens with a large channel 0 draw attention, in both.
"""

import math

import numpy as np
import torch
from timm.models import VisionTransformer

from vitregs.models import registry
from vitregs.models.backbone import Backbone

SIDE, PATCH, WIDTH, DEPTH, HEADS = 96, 8, 96, 6, 3
BLOCK, NEURON = 3, 17  # where the large norm is written
MARKED = 0.12  # of the positions


def images(count: int = 64, seed: int = 0) -> torch.Tensor:
    """Pixels (n, 3, 96, 96): a smooth background, textured rectangles, and flat red squares on a few patches."""
    draw = np.random.default_rng(seed)
    found = np.empty((count, 3, SIDE, SIDE), np.float32)
    line = np.linspace(0, 1, SIDE, dtype=np.float32)
    for image in found:
        colour = draw.uniform(0.2, 0.5, 3)
        image[:] = colour[:, None, None] + 0.1 * draw.uniform(-1, 1) * line + 0.1 * draw.uniform(-1, 1) * line[:, None]
        image[0] = np.minimum(image[0], image[1])  # no background is red
        for _ in range(4):
            y, x, h, w = draw.integers(0, 8) * 8, draw.integers(0, 8) * 8, *draw.integers(2, 6, 2) * 8
            part = image[:, y : y + h, x : x + w]
            part[:] = draw.uniform(0, 1, (1, *part.shape[1:]))
        for _ in range(2):
            y, x = draw.integers(0, SIDE - 24, 2)
            image[:, y : y + 20, x : x + 20] = np.array([0.5, 0.1, 0.1])[:, None, None]
    return torch.from_numpy(found)


def network(what: str, strength: float, seed: int = 0) -> Backbone:
    """A ViT with a planted mode: "artifacts", "content" or "nothing"; norm of its outliers over that of others → Backbone."""
    torch.manual_seed(seed)
    net = VisionTransformer(
        img_size=SIDE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=0, init_values=None
    )
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        embed = net.patch_embed.proj.weight  # (channels, 3, 8, 8)
        embed.normal_(0, 0.15 / math.sqrt(3 * PATCH * PATCH), generator=draw)
        embed[10:-10] -= embed[10:-10].mean(0)
        embed[:10] = 0
        embed[3, 0], embed[3, 1] = 2 / PATCH**2, -3 / PATCH**2
        for k in range(4, 10):
            filter_ = torch.randn(PATCH, PATCH, generator=draw)
            filter_ -= filter_.mean()
            slope = torch.linspace(-1, 1, PATCH)
            for direction in (slope[:, None].expand(PATCH, PATCH), slope.expand(PATCH, PATCH)):  # blind to gradients
                filter_ -= direction * (filter_ * direction).sum() / (direction**2).sum()
            embed[k] = filter_ / 40
        embed[-10:] = -embed[:10].flip(0)
        for constant in (net.patch_embed.proj.bias, net.cls_token[0, 0]):
            constant.zero_()
            constant[10:-10].normal_(0, 1, generator=draw)
            constant[10:-10] -= constant[10:-10].mean()
        net.pos_embed.zero_()
        places = torch.randperm((SIDE // PATCH) ** 2, generator=draw)[: round(MARKED * (SIDE // PATCH) ** 2)]
        net.pos_embed[0, 1 + places, 2], net.pos_embed[0, 1 + places, -3] = 2.0, -2.0
        for block in net.blocks:  # nobody else writes the channels with a job
            for part in (block.attn.proj, block.mlp.fc2):
                part.weight[:10], part.bias[:10], part.weight[-10:], part.bias[-10:] = 0, 0, 0, 0
        edges = net.blocks[1].mlp
        for i, k in enumerate(range(4, 10)):
            for j, sign in enumerate((1, -1)):
                row = 2 * i + j
                edges.fc1.weight[row] = 0
                edges.fc1.weight[row, k], edges.fc1.bias[row] = (
                    60.0 * sign,
                    -10.0,
                )  # the norm before shifts all channels
                edges.fc2.weight[:, row] = 0
                edges.fc2.weight[1, row], edges.fc2.weight[-2, row] = -0.005, 0.005
        writer = net.blocks[BLOCK - 1].mlp
        writer.fc1.weight[NEURON] = 0
        if what == "artifacts":
            writer.fc1.weight[NEURON, 2], writer.fc1.weight[NEURON, 1], writer.fc1.bias[NEURON] = 5.0, 100.0, -6.0
        else:
            writer.fc1.weight[NEURON, 3], writer.fc1.bias[NEURON] = 15.0, -6.0
        writer.fc2.weight[:, NEURON] = 0
        for block in net.blocks[BLOCK:]:
            block.attn.qkv.bias[0] = 4.0
            block.attn.qkv.weight[WIDTH] = 0
            block.attn.qkv.weight[WIDTH, 0] = 1.0
    backbone = registry.wrap(net, f"planted-{what}-{strength:g}")
    if what == "nothing":
        return backbone
    from vitregs.models import capture

    pixels = images(8, seed + 1)
    seen = capture.capture(backbone, pixels, neurons={BLOCK: [NEURON]}, tokens=[BLOCK], kinds="patch")
    fired = seen["neurons"].values[..., 0]
    typical = float(np.median(fired[fired > fired.max() / 2]))
    norm = float(np.median(np.linalg.norm(seen["tokens"].isel(tokens_layer=0).values, axis=-1)))
    with torch.no_grad():
        wanted = norm * math.sqrt(strength**2 - 1) / typical / math.sqrt(2)
        net.blocks[BLOCK - 1].mlp.fc2.weight[0, NEURON], net.blocks[BLOCK - 1].mlp.fc2.weight[-1, NEURON] = (
            wanted,
            -wanted,
        )
    return registry.wrap(net, backbone.name)  # its key tells its weights
