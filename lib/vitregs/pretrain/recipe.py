"""Recipes: everything that decides a training run, as frozen values that state their price and their result."""

import dataclasses
from dataclasses import asdict, dataclass, field
from typing import Any

from vitregs.problems import Problem, unknown
from vitregs.scenes import Difficulty

SIZES = {  # width, depth, heads
    "pico": (96, 8, 3),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
}


@dataclass(frozen=True)
class Recipe:
    """A training run; the same recipe gives the same weights, bit for bit, on the same kind of CPU."""

    name: str
    about: str  # price and expected score
    objective: str = "supervised"
    size: str = "pico"
    image_size: int = 96
    patch_size: int = 8
    registers: int = 0
    layer_scale: float | None = None  # DeiT-III: 1e-4; None leaves it out
    steps: int = 20_000
    batch: int = 16
    lr: float = 1e-3
    warmup: int = 500
    weight_decay: float = 0.2
    clip: float = 3.0
    seed: int = 0
    precision: str = "bf16"  # of autocast; "fp32" turns it off
    difficulty: Difficulty = field(default_factory=lambda: Difficulty(objects=(1, 4)))

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise unknown("model size", self.size, SIZES)
        if self.image_size % self.patch_size:
            raise Problem(f"image size {self.image_size} is not a multiple of the patch size {self.patch_size}")
        if self.precision not in ("bf16", "fp32"):
            raise Problem(f"precision must be bf16 or fp32, not {self.precision!r}")
        for name in ("steps", "batch", "warmup", "lr"):
            if getattr(self, name) <= 0:
                raise Problem(f"{name} must be positive, not {getattr(self, name)}")
        if self.registers < 0:
            raise Problem(f"registers must be 0 or more, not {self.registers}")

    def vit(self) -> dict[str, Any]:
        """Arguments for timm's VisionTransformer, head left out."""
        width, depth, heads = SIZES[self.size]
        return {
            "img_size": self.image_size,
            "patch_size": self.patch_size,
            "embed_dim": width,
            "depth": depth,
            "num_heads": heads,
            "reg_tokens": self.registers,
            "no_embed_class": True,  # registers and CLS carry no position, as in DINOv2 and DeiT-III
            "init_values": self.layer_scale,
        }

    def facts(self) -> dict[str, Any]:
        """What decides the weights, as plain values for JSON (not the prose)."""
        return {k: v for k, v in asdict(self).items() if k != "about"}

    def override(self, **changes: Any) -> "Recipe":
        """Change fields by name: → new Recipe. Raises Problem for names that do not exist."""
        names = [f.name for f in dataclasses.fields(self)]
        for key in changes:
            if key not in names:
                raise unknown("recipe setting", key, names)
        return dataclasses.replace(self, **changes)


def _pair(name: str, about: str, **settings: Any) -> list[Recipe]:
    return [
        Recipe(name, about, **settings),
        Recipe(f"{name}-reg4", about, **{**settings, "registers": 4}),
    ]


RECIPES = {
    r.name: r
    for r in [
        *_pair("supervised-pico", "144 tokens; an hour on one CPU core with bf16; score in data/zoo"),
        *_pair(
            "supervised-tiny",
            "one GPU, never run yet: 256 tokens, depth 12, 20k steps",
            size="tiny",
            image_size=64,
            patch_size=4,
            batch=256,
        ),
    ]
}


def recipe(name: str) -> Recipe:
    """Look a recipe up by name. Raises Problem naming the nearest one."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]
