"""Recipes: everything that decides a training run, as frozen values that state their price and their result."""

import dataclasses
import math
from collections.abc import Sequence
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
OBJECTIVES = ("supervised",)


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
        for what, name, there in (("objective", self.objective, OBJECTIVES), ("model size", self.size, SIZES)):
            if name not in there:
                raise unknown(what, name, there)
        for name in ("image_size", "patch_size", "steps", "batch", "lr", "warmup", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise Problem(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("registers", "weight_decay", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise Problem(f"{name} must be 0 or more, not {getattr(self, name)}")
        if self.layer_scale is not None and not 0 < self.layer_scale < math.inf:
            raise Problem(f"layer_scale must be positive or none, not {self.layer_scale}")
        if self.image_size % self.patch_size:
            raise Problem(f"image size {self.image_size} is not a multiple of the patch size {self.patch_size}")
        if self.precision not in ("bf16", "fp32"):
            raise Problem(f"precision must be bf16 or fp32, not {self.precision!r}")

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
        *_pair(
            "supervised-pico",
            "144 tokens; about an hour on one CPU core with bf16; accuracy 0.74 to 0.77 on held-out scenes",
        ),
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


def parse(base: Recipe, settings: Sequence[str]) -> Recipe:
    """Apply overrides given as words, "steps=1000": → new Recipe. Raises Problem for names or values that do not fit."""
    types = {f.name: f.type for f in dataclasses.fields(base)}
    changes: dict[str, Any] = {}
    for word in settings:
        name, _, text = word.partition("=")
        if name not in types or name in ("name", "about", "difficulty"):
            raise unknown("recipe setting", name, [n for n in types if n not in ("name", "about", "difficulty")])
        kind: Any = types[name] if types[name] in (int, float, str) else float
        try:
            changes[name] = None if text == "none" and name == "layer_scale" else kind(text)
        except ValueError:
            raise Problem(f"{name} takes {kind.__name__}, not {text!r}") from None
    return base.override(**changes)
