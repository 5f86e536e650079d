"""A frozen ViT with the facts needed to feed it pixels and to name its tokens."""

from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from vitregs.data.preparation import Preparation
from vitregs.errors import InputError


@dataclass(frozen=True)
class Facts:
    """What is known of a published family and cannot be read from its weights."""

    cutoff: float | None = None  # outlier cut-off on last-layer norms that a publication names
    cutoff_source: str = ""
    antialias: bool = True  # how its authors resize the position table
    cropped: bool = False  # whether they resize it to a square and keep its upper left part
    summaries: int = (
        0  # tokens behind CLS that each sum up the image for one more teacher; timm counts them as registers
    )


# Matched by pattern, the first that fits. DINOv2 without registers was trained and released without anti-aliasing.
# C-RADIO has one CLS token for each teacher: v3 learns from DFN CLIP, SigLIP2, DINOv2 and SAM, v4 from SigLIP2, DINOv3
# and SAM3 (its model cards); the others of its 8 and 10 tokens are registers.
FACTS: dict[str, Facts] = {
    "vit_giant_patch14_dinov2*": Facts(150.0, "Darcet et al., section 2.1", antialias=False),
    "vit_large_patch14_dinov2*": Facts(antialias=False),
    "vit_base_patch14_dinov2*": Facts(antialias=False),
    "vit_small_patch14_dinov2*": Facts(antialias=False),
    "vit_*_radio_v3*": Facts(antialias=False, cropped=True, summaries=3),
    "vit_*_radio_v4*": Facts(antialias=False, cropped=True, summaries=2),
}


@dataclass
class Backbone:
    """A frozen ViT with the facts needed to feed it pixels and to name its tokens.

    Attributes:
        name: What it is called in tables.
        net: The module of timm.
        mean: Mean of the pixels it was trained on, of red, green and blue in [0, 1].
        std: Their standard deviation.
        size: Native (height, width) of an image in pixels.
        preparation: How the model's own evaluation resizes and crops images.
        source: Where the weights come from, in words.
        weights: SHA-256 of the weight file, or what else tells the weights from others.
        depth: Number of blocks; layers are counted from 0 to it.
        width: Channels of a token.
        patch_size: (height, width) of a patch in pixels.
        registers: Number of register tokens.
        prefix: Number of all tokens that stand before the patches.

    Example:
        >>> import vitregs as vr
        >>> vit = vr.load("supervised-pico-reg4")
        >>> vit.grid((64, 96))
        (8, 12)
        >>> vit.kinds((1, 2))
        ['cls', 'register', 'register', 'register', 'register', 'patch', 'patch']
    """

    name: str
    net: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]
    preparation: Preparation
    source: str
    weights: str
    facts: Facts = field(default_factory=Facts)
    loaded: list[str] = field(default_factory=list)  # what was converted to load the weights, a sentence each
    resampling: dict[str, Any] = field(default_factory=dict)  # how timm resizes this family's positions
    card: dict[str, Any] = field(default_factory=dict)  # the recipe of a model trained here

    def __post_init__(self) -> None:
        """Freeze the network and read its facts."""
        self.net.eval().requires_grad_(False)
        embed: Any = self.net.patch_embed
        self.patch_size: tuple[int, int] = tuple(embed.patch_size)
        counted = int(getattr(self.net, "num_reg_tokens", 0) or _count(getattr(self.net, "reg_token", None)))
        self.summaries = min(self.facts.summaries, counted)
        self.registers = counted - self.summaries
        self.prefix = int(self.net.num_prefix_tokens)  # type: ignore[arg-type]
        self.depth = len(self.net.blocks)  # type: ignore[arg-type]
        self.width = int(self.net.embed_dim)  # type: ignore[arg-type]
        state = self.net.state_dict()
        self._tables = {k: v.clone() for k, v in state.items() if k == "pos_embed" or "relative_position_bias" in k}
        self._native: tuple[int, int] = tuple(embed.grid_size)

    @property
    def device(self) -> torch.device:
        """The device that holds the weights."""
        return next(self.net.parameters()).device

    @property
    def has_cls(self) -> bool:
        """Whether the model carries a class token."""
        return "cls" in self.kinds((0, 0))

    @property
    def notes(self) -> list[str]:
        """A sentence for each conversion between the weight file and the numbers, with the size now in use."""
        embed: Any = self.net.patch_embed
        now: tuple[int, int] = tuple(embed.grid_size)
        return self.loaded + [f"positions resized from {self._native[0]}x{self._native[1]} to {now[0]}x{now[1]}"] * (
            now != self._native and bool(self._tables)
        )

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Count the patches of an image.

        Args:
            size: (height, width) in pixels.

        Returns:
            (rows, columns) of patches.

        Raises:
            InputError: The size is not a multiple of the patch size.
        """
        (height, width), (p, q) = size, self.patch_size
        if height % p or width % q or not height or not width:
            fits = max(1, round(height / p)) * p, max(1, round(width / q)) * q
            raise InputError(
                f"image size {height}x{width} is not a multiple of the patch size {p} of {self.name}: "
                f"the nearest that fits is {fits[0]}x{fits[1]}"
            )
        return height // p, width // q

    def kinds(self, grid: tuple[int, int]) -> list[str]:
        """Name the kinds of all tokens, in the order of the sequence.

        Models have at most one CLS token: DeiT's distillation token and RADIO's tokens for further teachers have
        kinds of their own.

        Args:
            grid: (rows, columns) of patches.

        Returns:
            For each token, "cls", "distillation", "summary", "register" or "patch".
        """
        rows, columns = grid
        counts = {
            "distillation": _count(getattr(self.net, "dist_token", None)),
            "summary": self.summaries,
            "register": self.registers,
        }
        return [
            *["cls"] * (self.prefix - sum(counts.values())),
            *(kind for kind, count in counts.items() for _ in range(count)),
            *["patch"] * (rows * columns),
        ]

    def final_norm(self) -> nn.Module:
        """Find the norm that the model applies to the last layer.

        Returns:
            Its module `norm`, or `fc_norm` where the norm stands behind the pooling.

        Raises:
            InputError: The model has none, or applies it to what its attention pooling gives.
        """
        net: Any = self.net
        pooled = getattr(net, "attn_pool", None) is not None
        for norm in (getattr(net, "norm", None), None if pooled else getattr(net, "fc_norm", None)):
            if isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity):
                return norm
        raise InputError(
            f"{self.name} has no final norm to apply to its tokens: ask for them without (final_norm=False)"
        )

    def normalise(self, pixels: Tensor) -> Tensor:
        """Shift and scale pixels as in training.

        Args:
            pixels: (n, 3, height, width) in [0, 1].

        Returns:
            The same shape, on the model's device, with mean 0 and standard deviation 1 over the training images.
        """
        pixels = pixels.to(self.device)
        mean, std = (pixels.new_tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (pixels - mean) / std

    def fit(self, size: tuple[int, int]) -> None:
        """Set the model to an image size; position tables are resized from the original.

        As timm's own loading at that size does (bicubic with anti-aliasing, for some families bilinear without), but
        for DINOv2, which its authors resize without anti-aliasing.

        Args:
            size: (height, width) in pixels.

        Raises:
            InputError: The size is not a multiple of the patch size, or the model takes no other than its own.
        """
        grid = self.grid(size)
        embed: Any = self.net.patch_embed
        if tuple(embed.grid_size) == grid:
            return
        if not hasattr(self.net, "set_input_size"):
            raise InputError(f"{self.name} takes images of {self.size[0]}x{self.size[1]} pixels only")
        net: Any = self.net
        if tuple(embed.grid_size) != self._native:  # from the original, so that no resizing adds to another
            net.set_input_size(img_size=[n * p for n, p in zip(self._native, self.patch_size, strict=True)])
            net.load_state_dict(self._tables, strict=False)
        if grid != self._native:
            net.set_input_size(img_size=size)
            if (table := self._tables.get("pos_embed")) is not None:
                net.pos_embed = nn.Parameter(self._resized(table.to(self.device), grid))
        net.requires_grad_(False)

    def _resized(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        """Resize the absolute positions: (1, n, channels), (rows, columns) → the same for that grid."""
        (rows, columns), side = self._native, max(grid)
        prefix = table.shape[1] - rows * columns
        table = resample_abs_pos_embed(
            table,
            new_size=[side, side] if self.facts.cropped else list(grid),
            old_size=list(self._native),
            num_prefix_tokens=prefix,
            **{"antialias": self.facts.antialias, **self.resampling},
        )
        if self.facts.cropped and grid != (side, side):
            square = table[:, prefix:].reshape(len(table), side, side, -1)[:, : grid[0], : grid[1]].flatten(1, 2)
            table = torch.cat([table[:, :prefix], square], 1)
        return table

    def prepare(self, pixels: Tensor) -> Tensor:
        """Fit the model to the size of some pixels, and normalise them.

        Args:
            pixels: (n, 3, height, width) in [0, 1].

        Returns:
            What `net` takes.

        Raises:
            InputError: For other shapes, and sizes that are not a multiple of the patch size.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise InputError(f"pixels must have the shape (n, 3, height, width), not {tuple(pixels.shape)}")
        self.fit((pixels.shape[-2], pixels.shape[-1]))
        return self.normalise(pixels)

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> Tensor:
        """Score the classes of the trained head.

        Args:
            pixels: (n, 3, height, width) in [0, 1].

        Returns:
            (n, classes), before the softmax.

        Raises:
            InputError: The model has no trained head, and as `prepare` does.
        """
        if not self.net.num_classes:
            raise InputError(f"{self.name} has no trained head: it names no classes")
        scores: Tensor = self.net(self.prepare(pixels))
        return scores


def _count(token: Tensor | None) -> int:
    return 0 if token is None else int(token.shape[1])
