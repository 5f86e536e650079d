"""The recipes by name, each with its price and its expected score, and the runs still wanted, most informative first."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitregs.data.scenes import Difficulty
from vitregs.errors import InputError, unknown
from vitregs.train.config import START, Clip, Dino, DinoV2, Distil, Mae, Recipe, Supervised, parse, suffix

REDUNDANT = Difficulty(objects=(1, 3), radius=0.2, backgrounds=("flat", "gradient", "noise"))  # most patches repeat
CPU = "fp32"  # bf16 costs more than it saves below width 192
FEW: Any = {"local_crops": 2, "prototypes": 256, "momentum": 0.99}  # what 1,000 steps of 16 images can bear
DEIT: Any = {  # DeiT-Tiny at half of its side (49 patches), on real images; register neurons are those of data/neurons
    "size": "tiny",
    "image_size": 112,
    "patch_size": 16,
    "init": "deit_tiny_patch16_224",
    "data": "zh-plus/tiny-imagenet",
    "augment": True,
    "weight_decay": 0.05,
    "beta2": 0.98,
}
HALF: Any = {"batch": 64, "precision": CPU}
DEIT_PRICE = "4 minutes on one CPU core with bf16, accuracy 0.12 to 0.14"
SHORT: Any = {"steps": 1000, "batch": 16, "lr": 1e-4, "warmup": 50}
_ALL = [
    # The first pair of the project. Its registers started 1e-6 apart, as published, and hardly grew apart.
    Recipe(
        "supervised-pico",
        "144 tokens; 90 minutes on one busy CPU core; accuracy 0.74 to 0.77 on held-out scenes, linear: colour 0.84, shape 0.48",
        image_size=96,
        register_init=1e-6,
    ),
    # One pair for each other objective: 64 tokens, a quarter of an hour on one CPU core.
    Recipe(
        "clip-pico",
        "16 minutes on one busy CPU core; zero-shot 0.18 to 0.20 (chance 0.04), linear: colour 0.76 to 0.79 (untrained 0.22)",
        Clip(),
        patch_norm=True,
        steps=3000,
        batch=32,
        warmup=300,
        beta2=0.98,
        precision=CPU,
    ),
    Recipe(
        "mae-pico",
        "12 to 16 minutes on one busy CPU core; linear: colour 0.58 to 0.63 (untrained 0.33)",
        Mae(),
        steps=3000,
        batch=64,
        warmup=300,
        weight_decay=0.05,
        precision=CPU,
    ),
    Recipe(
        "dino-pico",
        "8 minutes on one busy CPU core; linear: colour 0.50 to 0.55 (untrained 0.33)",
        Dino(**FEW),
        steps=1000,
        warmup=150,
        weight_decay=0.04,
        weight_decay_end=0.4,
        precision=CPU,
    ),
    Recipe(
        "dinov2-pico",
        "7 to 11 minutes on one busy CPU core; linear: colour 0.54 to 0.60 (untrained 0.33)",
        DinoV2(**FEW, patch_prototypes=256),
        steps=1000,
        warmup=150,
        weight_decay=0.04,
        weight_decay_end=0.2,
        precision=CPU,
    ),
    # The emergence search on a CPU: one shape in three widths, and one run of forty thousand steps.
    *(
        Recipe(f"hunt-{size}", about, size=size, steps=6000, batch=8, difficulty=REDUNDANT, precision=CPU)
        for size, about in (
            ("femto", "3 minutes on one busy CPU core; accuracy 0.16, linear: colour 0.79 (untrained 0.18)"),
            ("nano", "6 minutes on one busy CPU core; accuracy 0.24, linear: colour 0.84 (untrained 0.25)"),
            ("pico", "8 minutes on one busy CPU core; accuracy 0.25, linear: colour 0.83 (untrained 0.32)"),
        )
    ),
    Recipe(
        "hunt-long",
        "32 minutes on one busy CPU core; accuracy 0.49, linear: colour 0.86, shape 0.35",
        size="nano",
        steps=40_000,
        batch=8,
        lr=2e-3,
        weight_decay=0.5,
        warmup=1000,
        difficulty=REDUNDANT,
        precision=CPU,
    ),
    # Real images.
    Recipe(
        "tinyimagenet-pico",
        "10 minutes on one busy CPU core; top-1 0.041 (chance 0.005), linear 0.043 (untrained 0.034)",
        Supervised("ce", 0.1),
        data="zh-plus/tiny-imagenet",
        augment=True,
        steps=2500,
        batch=32,
        weight_decay=0.05,
        precision=CPU,
    ),
    # Regrowth: DeiT-Tiny has the artifact. It is taken away, or given registers, and what comes back is watched.
    *(
        Recipe(f"regrow-{name}", f"{what}; {DEIT_PRICE}", Distil(), **DEIT, **SHORT, **changes)
        for name, what, changes in (
            (
                "zeroed",
                "DeiT-Tiny without the output weights of its register neurons, distilled from itself",
                {"zeroed": "register"},
            ),
            (
                "dead",
                "DeiT-Tiny without all weights of its register neurons, so that others must be found",
                {"zeroed": "register", "dead": True},
            ),
            ("random", "control: as many random neurons", {"zeroed": "random"}),
            ("kept", "control: nothing zeroed; with registers, whether outliers move to them", {}),
        )
    ),
    Recipe(
        "regrow-asked",
        "control: as regrow-zeroed, but the tokens are distilled, the outliers' own among them; " + DEIT_PRICE,
        Distil(target="features"),
        **DEIT,
        **SHORT,
        zeroed="register",
    ),
    # Remedies in the architecture, from the same start; registers are `regrow-kept-reg4`, the control is `regrow-kept`.
    *(
        Recipe(
            f"remedy-{name}",
            f"DeiT-Tiny with {what}, distilled from itself; {DEIT_PRICE}",
            Distil(),
            **DEIT,
            **SHORT,
            **changes,
        )
        for name, what, changes in (
            ("gated", "a sigmoid gate on the output of attention", {"attention": "gated"}),
            ("off-by-one", "an extra zero logit in every softmax", {"attention": "off-by-one"}),
            ("bias", "a learnable key and value in every head", {"attention": "bias"}),
            ("patch-norm", "LayerNorm before the first block", {"patch_norm": True}),
        )
    ),
    Recipe(
        "cure",
        "DeiT-Tiny learns its own tokens with a test-time register; 2 minutes on one CPU core with bf16, accuracy 0.12",
        Distil("+tt1", "features"),
        **DEIT,
        steps=256,
        batch=32,
        lr=3e-5,
        warmup=20,
    ),
    Recipe(
        "regrow-fresh",
        "DeiT-Tiny with blocks 5 to 12 anew, by labels and distillation; never run yet; 15 minutes on one CPU core, by estimate",
        Distil(labels=1.0),
        **DEIT,
        fresh_from=5,
        steps=1000,
        batch=32,
        lr=1e-3,
        warmup=100,
    ),
    # For one GPU: 256 tokens, depth 12, as many steps as ten minutes hold. None has been run yet.
    *(
        Recipe(
            f"hunt-{size}",
            f"never run yet; {minutes} minutes on one H100 or H200, by estimate",
            size=size,
            patch_size=4,
            batch=256,
            warmup=1000,
            difficulty=REDUNDANT,
        )
        for size, minutes in (("tiny", 5), ("small", 15))
    ),
    # From scratch, where the artifact should emerge: DeiT-Tiny's own shape and kind of training, 256 tokens of real images.
    *(
        Recipe(
            f"tinyimagenet-{size}",
            f"never run yet; {price}, by estimate",
            Supervised("ce", 0.1, cutmix=0.5),
            size=size,
            patch_size=4,
            data="zh-plus/tiny-imagenet",
            augment=True,
            warmup=1000,
            weight_decay=0.05,
            **more,
        )
        for size, price, more in (
            ("tiny", "5 minutes on one H100 or H200", {"batch": 256}),
            ("half", "half of its width; two days on two CPU cores, to be stopped and gone on with", HALF),
        )
    ),
]
RECIPES = {r.name: r for r in _ALL}


def recipe(name: str) -> Recipe:
    """Look a recipe up: a name of RECIPES, which "-reg4" and "-seed1" may follow → Recipe. Raises InputError with the nearest."""
    found = re.fullmatch(r"(.*?)(?:-reg(\d+))?(?:-seed(\d+))?", name)
    assert found
    base, registers, seed = found.groups()
    if base not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    changes = {k: int(v) for k, v in (("registers", registers), ("seed", seed)) if v is not None}
    return RECIPES[base].override(name=name, **changes)


def command(chosen: Recipe, *, count: int | None = None, weights: str | Path | None = None) -> str | None:
    """The command that trains a recipe again, with its images and every changed setting.

    Args:
        chosen: The recipe.
        count: How many of its images were used, None for all.
        weights: The file with the weights of the network that it started from, None for the published ones.

    Returns:
        Words for a shell; None for a recipe that no command gives (made in Python, with a name or a difficulty of its own).
    """
    options = [w for k, v in (("--count", count), ("--weights", weights)) if v is not None for w in (k, str(v))]
    parts = chosen.name.split("-")
    for cut in range(len(parts), 0, -1):
        try:
            base = recipe("-".join(parts[:cut]))
        except InputError:
            continue
        known, wanted = base.facts(), chosen.facts()
        wanted |= {k: getattr(chosen, k) for k in START if k in wanted}  # files by their whole names
        back = {k: getattr(chosen, k) for k in known if k not in wanted and hasattr(chosen, k)}
        wanted |= back  # settings at their default again
        changed = [k for k in wanted if k not in ("name", "data") and known.get(k) != wanted[k]]
        changed.sort(key=lambda k: chosen.name.find(suffix(k, wanted[k])))  # their order is part of the name
        settings = [f"{k}={_word(wanted[k])}" for k in changed]
        images = [] if chosen.data == base.data else ["--images", chosen.data]
        try:
            same = parse(base, settings).override(data=chosen.data) == chosen
        except InputError:  # a setting that has no word
            return None
        return shlex.join(["vitregs", "train", base.name, *settings, *images, *options]) if same else None
    return None


def _word(value: Any) -> str:
    """A setting as `parse` reads it."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Run:
    """A run that is wanted: the words of its command and what it would tell."""

    words: tuple[str, ...]
    why: str
    price: str = "one GPU, 10 min at most (an estimate)"
    device: str = "cuda"

    @property
    def recipe(self) -> Recipe:
        """The recipe that the words mean."""
        return parse(recipe(self.words[0]), self.words[1:])


REAL = ("data=zh-plus/tiny-imagenet", "augment=true")
TINY_ON_GPU = ("size=tiny", "patch_size=4", "steps=20000", "warmup=1000", "precision=bf16", *REAL)
SELF = ("batch=128", "lr=5e-4", "prototypes=1024", "local_crops=4", "momentum=0.996")
MANY = ("batch=256", "steps=5000", "warmup=250")  # regrowth in 80 times the images of its CPU runs
DAYS = "two CPU cores, two days in the background (an estimate)"

# What is still to be learned, most informative first: real images before scenes, supervised before all, and the fingerprint
# says what emerged. DeiT-Tiny, supervised on photographs, has its outliers at twice the median: a rule of four times would
# not see them.
WANTED = (
    Run(("tinyimagenet-tiny",), "DeiT-Tiny's shape and kind of training from scratch: an artifact by the fingerprint?"),
    Run(("tinyimagenet-tiny-reg4",), "the same with four registers: the remedy, where the disease should be"),
    Run(("regrow-dead", *MANY), "DeiT-Tiny without its register neurons: does training find others?"),
    Run(("regrow-dead-reg4", *MANY), "and with registers: do the large norms move there?"),
    Run(("regrow-zeroed", *MANY), "the neurons can come back: do they?"),
    Run(("regrow-kept-reg4", *MANY), "nothing taken away: do outliers move to new registers?"),
    Run(("regrow-fresh", *MANY), "blocks 5 to 12 anew: register neurons are born at a fraction of the price"),
    Run(("regrow-fresh-reg4", *MANY), "the same with registers"),
    Run(("tinyimagenet-tiny-seed1",), "a second seed"),
    Run(("tinyimagenet-tiny-reg4-seed1",), "its pair"),
    Run(("tinyimagenet-tiny", "steps=60000"), "three times the steps", "one GPU, 20 min (an estimate)"),
    Run(("tinyimagenet-tiny", "size=small"), "does width bring it?", "one GPU, 20 min (an estimate)"),
    Run(("tinyimagenet-tiny", "weight_decay=0.3"), "more decay, which drives sinks in language models"),
    Run(("tinyimagenet-tiny", "layer_scale=1e-4"), "DeiT-III's LayerScale"),
    Run(("tinyimagenet-tiny", "patch_norm=true"), "control: LayerNorm before the first block, expected to prevent it"),
    Run(("tinyimagenet-tiny", "pool=avg"), "control: no CLS token to write to"),
    Run(("tinyimagenet-half",), "the first run at half width, where there is no GPU", DAYS, "cpu"),
    Run(("tinyimagenet-half-reg4",), "its pair", DAYS, "cpu"),
    Run(("clip-pico", *TINY_ON_GPU, "batch=256"), "class names as captions instead of classes"),
    Run(("hunt-tiny",), "scenes: the same shape where most patches repeat"),
    Run(("hunt-tiny-reg4",), "its pair"),
    Run(("hunt-small",), "scenes, twice the width", "one GPU, 20 min (an estimate)"),
    Run(
        ("dinov2-pico", *TINY_ON_GPU, *SELF, "patch_prototypes=1024"),
        "expected negative at this size",
        "one GPU, 20 min (an estimate)",
    ),
    Run(("dino-pico", *TINY_ON_GPU, *SELF), "expected negative", "one GPU, 20 min (an estimate)"),
    Run(("mae-pico", *TINY_ON_GPU, "batch=256"), "expected negative; on scenes its large norms are on objects"),
)
