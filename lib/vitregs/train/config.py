"""What a training run is: frozen values that decide every weight, checked when they are made.

The named recipes are in `recipes`. What belongs to one objective alone (masks, crops, temperatures) is a small frozen
class of its own here, so that a recipe shows only what takes effect.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, get_args, get_type_hints

from vitregs.data.scenes import Difficulty
from vitregs.errors import InputError, unknown
from vitregs.models.attention import KINDS, PLAIN

SIZES = {  # width, depth, heads
    "femto": (32, 8, 1),
    "nano": (64, 8, 2),
    "pico": (96, 8, 3),
    "half": (96, 12, 3),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
START = ("init", "zeroed", "dead", "fresh_from")  # settings of a recipe that starts from a trained network


def _positive(settings: Any, *names: str) -> None:
    for name in names:
        if not 0 < getattr(settings, name) < math.inf:
            raise InputError(f"{name} must be positive, not {getattr(settings, name)}")


def _share(settings: Any, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(settings, name) <= 1:
            raise InputError(f"{name} must lie within 0 to 1, not {getattr(settings, name)}")


@dataclass(frozen=True)
class Supervised:
    """DeiT-III (paper section 3.1): classes in view from the CLS token."""

    name: ClassVar[str] = "supervised"
    loss: str = "bce"  # over all classes, as DeiT-III on ImageNet-1k; "ce" for one class an image, as on 21k
    smoothing: float = 0.0
    cutmix: float = 0.0  # share of the steps in which a box of each image is another's

    def check(self, recipe: "Recipe") -> None:
        """Raise InputError for values that make no sense."""
        if self.loss not in ("bce", "ce"):
            raise unknown("loss", self.loss, ("bce", "ce"))
        _share(self, "smoothing", "cutmix")


@dataclass(frozen=True)
class Clip:
    """OpenCLIP: images and captions in one space."""

    name: ClassVar[str] = "clip"
    text_width: int = 64
    text_depth: int = 2
    text_heads: int = 2
    embed: int = 64  # of the common space

    def check(self, recipe: "Recipe") -> None:
        """Raise InputError for values that make no sense."""
        _positive(self, "text_width", "text_depth", "text_heads", "embed")
        if self.text_width % self.text_heads:
            raise InputError(f"text_width {self.text_width} is not a multiple of text_heads {self.text_heads}")
        if recipe.batch < 2:
            raise InputError("clip needs a batch of 2 or more: it tells captions apart")


@dataclass(frozen=True)
class Mae:
    """MAE: masked patches from visible ones."""

    name: ClassVar[str] = "mae"
    masked: float = 0.75
    decoder_width: int = 64
    decoder_depth: int = 2
    decoder_heads: int = 2

    def check(self, recipe: "Recipe") -> None:
        """Raise InputError for values that make no sense."""
        _positive(self, "decoder_width", "decoder_depth", "decoder_heads")
        _share(self, "masked")
        if self.decoder_width % self.decoder_heads or self.decoder_width % 4:
            raise InputError(
                f"decoder_width {self.decoder_width} is not a multiple of decoder_heads {self.decoder_heads} and 4"
            )
        if not 1 <= round(recipe.patches * (1 - self.masked)) < recipe.patches:
            raise InputError(
                f"masked must leave some of {recipe.patches} patches visible and hide some, not {self.masked}"
            )


@dataclass(frozen=True)
class Dino:
    """DINO: crops of an image agree with what a moving average of the network says of the whole."""

    name: ClassVar[str] = "dino"
    local_crops: int = 4
    local_size: int = 32
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.4)
    prototypes: int = 1024
    hidden: int = 256
    bottleneck: int = 64
    momentum: float = 0.996  # of the teacher at the start; a cosine takes it to 1
    student_temp: float = 0.1
    teacher_temp: float = 0.04
    teacher_temp_first: float = 0.04  # at step 0
    temp_warmup: float = 0.3  # share of training in which the temperature rises
    freeze_last: float = 0.02  # share of training in which the prototypes stand still

    def check(self, recipe: "Recipe") -> None:
        """Raise InputError for values that make no sense."""
        _positive(self, "prototypes", "hidden", "bottleneck", "student_temp", "teacher_temp", "teacher_temp_first")
        _share(self, "momentum", "temp_warmup", "freeze_last")
        if self.local_crops < 0:
            raise InputError(f"local_crops must be 0 or more, not {self.local_crops}")
        if self.local_crops and (self.local_size < 1 or self.local_size % recipe.patch_size):
            raise InputError(f"local size {self.local_size} is not a multiple of the patch size {recipe.patch_size}")
        if self.local_crops and self.local_size < 8:
            raise InputError(f"local size {self.local_size} is too small to be blurred: 8 pixels at least")
        if self.local_crops and self.local_size > recipe.image_size:
            raise InputError(f"local size {self.local_size} is larger than the image ({recipe.image_size})")


@dataclass(frozen=True)
class DinoV2(Dino):
    """DINOv2: DINO, masked patches (iBOT) under a head of their own, and features spread apart (KoLeo)."""

    name: ClassVar[str] = "dinov2"
    momentum: float = 0.994
    teacher_temp: float = 0.07
    patch_prototypes: int = 1024
    masked_pictures: float = 0.5  # share of the global crops that are masked
    masked_least: float = 0.1  # share of patches masked in them: evenly from this …
    masked_most: float = 0.5  # … to this
    ibot: float = 1.0  # weights of the two further losses
    koleo: float = 0.1

    def check(self, recipe: "Recipe") -> None:
        """Raise InputError for values that make no sense."""
        super().check(recipe)
        _positive(self, "patch_prototypes")
        _share(self, "masked_pictures", "masked_least", "masked_most")
        for name in ("ibot", "koleo"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be 0 or more, not {getattr(self, name)}")
        if self.masked_least > self.masked_most:
            raise InputError(f"masked_least {self.masked_least} is above masked_most {self.masked_most}")
        if int(self.masked_least * recipe.patches) < 1:  # lightly cannot mask less than one patch
            raise InputError(
                f"masked_least {self.masked_least} of {recipe.patches} patches is none: raise it, or image_size"
            )
        if int(2 * recipe.batch * self.masked_pictures) < 1:
            raise InputError(f"a batch of {recipe.batch} leaves no masked image for dinov2: raise batch")


@dataclass(frozen=True)
class Distil:
    """Distillation: agree with a network that is held still, the one that the run starts from (Hinton et al. 2015)."""

    name: ClassVar[str] = "distil"
    teacher: str = (
        ""  # what changes the teacher, as the ending of a network's name does: "+tt1" adds a test-time register
    )
    target: str = (
        "logits"  # what is agreed on: "logits" of the head, or "features", CLS and patches behind the final norm
    )
    labels: float = 0.0  # weight of the cross-entropy with the images' labels, which the network's head must know

    def check(self, recipe: "Recipe") -> None:
        """Raise InputError for values that make no sense."""
        if not recipe.init:
            raise InputError("distil needs a network to agree with: name it, as init=deit_tiny_patch16_224")
        if self.target not in ("logits", "features"):
            raise unknown("target", self.target, ("logits", "features"))
        if self.teacher and not self.teacher.startswith("+"):
            raise InputError(f"teacher is the ending of a network's name, as +tt1, not {self.teacher!r}")
        if not 0 <= self.labels < math.inf:
            raise InputError(f"labels must be 0 or more, not {self.labels}")


Objective = Supervised | Clip | Mae | Dino | DinoV2 | Distil
OBJECTIVES: dict[str, type[Objective]] = {o.name: o for o in get_args(Objective)}


@dataclass(frozen=True)
class Recipe:
    """A training run; the same recipe gives the same weights, bit for bit, on the same kind of CPU."""

    name: str
    about: str  # price and expected score
    objective: Objective = field(default_factory=Supervised)
    size: str = "pico"
    image_size: int = 64
    patch_size: int = 8
    registers: int = 0
    # initial standard deviation; at 1e-6, as published, registers stay copies in a short run
    register_init: float = 0.02
    layer_scale: float | None = None  # DeiT-III: 1e-4; None leaves it out
    patch_norm: bool = False  # LayerNorm before the first block, as OpenCLIP has
    attention: str = PLAIN  # timm's, or with a remedy built in: "gated", "off-by-one", "bias" (models/attention)
    pool: str = "token"  # what a classifier reads: "token" (CLS) or "avg" (mean patch, no CLS)
    drop_path: float = 0.0
    data: str = "scenes"  # or the name of a data set; `images` of `train` says where it lies
    augment: bool = False  # scenes never repeat and need none
    steps: int = 20_000
    batch: int = 16
    lr: float = 1e-3
    warmup: int = 500
    weight_decay: float = 0.2
    weight_decay_end: float | None = None  # reached by a cosine, as in DINO; None keeps it constant
    beta2: float = 0.95
    clip: float = 3.0
    seed: int = 0
    precision: str = "bf16"  # of autocast; "fp32" turns it off
    difficulty: Difficulty = field(default_factory=lambda: Difficulty(objects=(1, 4)))
    init: str = ""  # a trained network that the run starts from, by its name; "" for random weights
    zeroed: str = (
        "none"  # MLP neurons whose output weights start at zero: "register", "random" (as many), or a list's file
    )
    dead: bool = False  # whether these lose their input weights too, so that no gradient ever reaches them
    fresh_from: int = 0  # the first block that starts from random weights nevertheless, 0 for none

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise unknown("model size", self.size, SIZES)
        if self.attention not in (PLAIN, *KINDS):
            raise unknown("attention", self.attention, (PLAIN, *KINDS))
        _positive(self, "image_size", "patch_size", "steps", "batch", "lr", "warmup", "clip")
        for name in ("registers", "register_init", "weight_decay", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be 0 or more, not {getattr(self, name)}")
        for name in ("layer_scale", "weight_decay_end"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} must be positive or none, not {value}")
        if self.image_size % self.patch_size:
            raise InputError(f"image size {self.image_size} is not a multiple of the patch size {self.patch_size}")
        _share(self, "drop_path", "beta2")
        if self.beta2 == 1 or self.seed >= 2**40:
            raise InputError(f"beta2 must be below 1 and seed below 2^40, not {self.beta2} and {self.seed}")
        for name, allowed in (("precision", ("bf16", "fp32")), ("pool", ("token", "avg"))):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} must be {' or '.join(allowed)}, not {getattr(self, name)!r}")
        if self.pool == "avg" and not isinstance(self.objective, Supervised):
            raise InputError(f"{self.objective.name} reads the CLS token: pool must be token")
        if self.init:
            for name, of_network in (("layer_scale", None), ("pool", "token")):
                if getattr(self, name) != of_network:
                    raise InputError(f"{name} is that of {self.init}: leave it out")
        elif self.zeroed != "none" or self.fresh_from:
            raise InputError("zeroed and fresh_from change a trained network: name it, as init=deit_tiny_patch16_224")
        if self.dead and self.zeroed == "none":
            raise InputError("dead is of zeroed neurons: zeroed=register")
        if not 0 <= self.fresh_from <= SIZES[self.size][1]:
            raise InputError(f"fresh_from must be 0 or one of blocks 1 to {SIZES[self.size][1]}, not {self.fresh_from}")
        self.objective.check(self)

    @property
    def patches(self) -> int:
        """Patch tokens of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def judged(self) -> bool:
        """Whether the fingerprint is taken at every look: in networks large enough that it costs little beside their steps."""
        return bool(self.init) or SIZES[self.size][1] >= SIZES["tiny"][1]

    def vit(self) -> dict[str, Any]:
        """Arguments for `registry.build`, head left out."""
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
            "pre_norm": self.patch_norm,
            "class_token": self.pool == "token",
            "global_pool": self.pool,
            **self._attention(),
        }

    def _attention(self) -> dict[str, str]:
        """The setting where it is not the default, which the first cards do not tell."""
        return {} if self.attention == PLAIN else {"attention": self.attention}

    def facts(self) -> dict[str, Any]:
        """What decides the weights, as flat plain values for JSON (not the prose).

        Of files and folders the last part of their names is told; checkpoints and cards know them by content.
        """
        left_out = ("about", "objective", "attention", *(() if self.init else START))
        own = {k: v for k, v in asdict(self).items() if k not in left_out}
        if self.init:
            own |= {"init": re.sub(r"@.*[/\\]", "@", self.init), "zeroed": Path(self.zeroed).name}
        if Path(self.data).expanduser().exists():
            own["data"] = Path(self.data).name
        return {"objective": self.objective.name, **own, **self._attention(), **asdict(self.objective)}

    def override(self, **changes: Any) -> "Recipe":
        """Change settings by name, the objective's too: → new Recipe. Raises InputError for names that do not exist."""
        objective = changes.pop("objective", None)
        base: Objective = self.objective
        if isinstance(objective, str):
            if objective not in OBJECTIVES:
                raise unknown("objective", objective, OBJECTIVES)
            base = base if base.name == objective else OBJECTIVES[objective]()
        elif objective is not None:
            base = objective
        inner = {f.name for f in dataclasses.fields(base)}
        outer = {f.name for f in dataclasses.fields(self)}
        for key in changes:
            if key not in inner | outer:
                raise unknown("recipe setting", key, inner | outer)
        base = dataclasses.replace(base, **{k: v for k, v in changes.items() if k in inner})
        return dataclasses.replace(self, objective=base, **{k: v for k, v in changes.items() if k in outer})


def parse(base: Recipe, settings: Sequence[str]) -> Recipe:
    """Apply overrides given as words, "steps=1000": → new Recipe. Raises InputError for names or values that do not fit.

    The new recipe's name tells the overrides, so that its runs have a folder of their own.
    """
    kinds = {k: v for k, v in get_type_hints(Recipe).items() if k not in ("name", "about", "difficulty", "objective")}
    kinds |= {k: v for k, v in get_type_hints(type(base.objective)).items() if k != "name"}
    kinds = {k: v for k, v in kinds.items() if v in (int, float, str, bool, float | None)}
    changes: dict[str, Any] = {}
    for word in settings:
        name, _, text = word.partition("=")
        if name not in kinds:
            raise unknown("recipe setting", name, kinds)
        changes[name] = _value(name, kinds[name], text)
    known = asdict(base) | asdict(base.objective)
    names = "".join(suffix(k, v) for k, v in changes.items() if v != known[k])
    return base.override(**changes, name=base.name + names)


def suffix(name: str, value: Any) -> str:
    """What a changed setting adds to the name of a recipe: name of the setting, its value → text."""
    return f"-{_SHORT.get(name, name)}{str(value).replace('/', '_')}"


_SHORT = {"registers": "reg"}


def _value(name: str, kind: Any, text: str) -> Any:
    if kind == (float | None):
        if text == "none":
            return None
        kind = float
    if kind is bool and text in ("true", "false"):
        return text == "true"
    try:
        return text if kind is str else kind(text) if kind is not bool else _never(text)
    except ValueError:
        raise InputError(f"{name} takes {kind.__name__}, not {text!r}") from None


def _never(text: str) -> bool:
    raise ValueError(text)
