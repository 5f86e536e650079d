"""What registers cost: multiply-adds and parameters of a ViT, counted from its shape (Fig 12)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from vitregs.errors import InputError
from vitregs.models.backbone import Backbone


@dataclass(frozen=True)
class Shape:
    """A plain ViT without registers: channels, blocks, patches of an image, pixels of a patch, CLS and other tokens without a
    patch, width of the MLP in channels, rows of the position table (default: one for every token)."""

    width: int
    depth: int
    patches: int
    patch: tuple[int, int] = (14, 14)
    prefix: int = 1
    mlp: float = 4.0
    positions: int | None = None

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.patches, *self.patch) < 1 or self.prefix < 0 or self.mlp <= 0:
            raise InputError(f"a network of width {self.width}, {self.depth} blocks and {self.patches} patches is none")


TABLE = 37 * 37 + 1  # positions in the released DINOv2 models, which end their training at 518 pixels
PUBLISHED = {  # the networks of data/paper/fig12.csv, at 224 pixels
    "ViT-S/14": Shape(width=384, depth=12, patches=256, positions=TABLE),
    "ViT-B/14": Shape(width=768, depth=12, patches=256, positions=TABLE),
    "ViT-L/14": Shape(width=1024, depth=24, patches=256, positions=TABLE),
    "ViT-g/14": Shape(width=1536, depth=40, patches=256, positions=TABLE),
}


def operations(shape: Shape, registers: int = 0) -> int:
    """Multiply-adds of one image: shape, registers → number. Matrix products alone: in every block 4 N d² for queries, keys,
    values and output, 2 N² d for attention, 2 r N d² for the MLP of width r d, and the patch embedding (Fig 12)."""
    if registers < 0:
        raise InputError(f"registers must be 0 or more, not {registers}")
    n, d = shape.patches + shape.prefix + registers, shape.width
    block = 4 * n * d**2 + 2 * n**2 * d + 2 * n * d * round(shape.mlp * d)
    return shape.depth * block + shape.patches * 3 * shape.patch[0] * shape.patch[1] * d


def parameters(shape: Shape, registers: int = 0) -> int:
    """Weights of a plain ViT without a head: shape, registers → number; with biases, two norms a block and one at the end, and no
    position for a register (Fig 12)."""
    d, hidden = shape.width, round(shape.mlp * shape.width)
    block = 4 * d * d + 4 * d + 2 * d * hidden + hidden + d + 4 * d
    embedding = (3 * shape.patch[0] * shape.patch[1] + 1) * d
    table = shape.patches + shape.prefix if shape.positions is None else shape.positions
    return shape.depth * block + embedding + (table + shape.prefix + registers + 2) * d


def increase(shape: Shape, registers: Sequence[int] = (1, 2, 4, 8, 16)) -> pd.DataFrame:
    """What registers add, in per cent of the network without: shape, numbers of registers → rows registers, flops, parameters
    (Fig 12)."""
    rows = []
    for n in registers:
        flops, weights = (100 * (count(shape, n) / count(shape) - 1) for count in (operations, parameters))
        rows.append({"registers": n, "flops": flops, "parameters": weights})
    return pd.DataFrame(rows)


def shape_of(backbone: Backbone, size: tuple[int, int]) -> Shape:
    """The shape of a ViT without its registers: backbone, image size (height, width) in pixels → Shape."""
    net: Any = backbone.net
    rows, columns = backbone.grid(size)
    products = sum(w.numel() for w in net.blocks[0].mlp.parameters() if w.ndim == 2)  # gated ones have three
    positions = 0 if net.pos_embed is None else int(net.pos_embed.shape[1])
    return Shape(
        width=backbone.width,
        depth=backbone.depth,
        patches=rows * columns,
        patch=backbone.patch_size,
        prefix=backbone.prefix - backbone.registers,
        mlp=products / (2 * backbone.width**2),
        positions=positions,
    )
