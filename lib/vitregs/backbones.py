"""A name becomes a Backbone: the one place that knows prefix tokens, patch sizes, normalisation, position tables."""

import json
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
import xarray as xr
from timm.layers import resample_abs_pos_embed
from timm.models import get_arch_pretrained_cfgs, is_model_in_modules
from torch import Tensor, nn

from vitregs import results
from vitregs.preparation import Preparation
from vitregs.problems import Problem, hub, unknown

ZOO = results.ROOT / "data" / "zoo"
# timm's files whose models keep one grid of patch tokens
VIT_MODULES = {"vision_transformer", "vision_transformer_relpos", "deit", "eva", "beit"}
HEADS = ("head", "fc_norm.")  # parts that no measurement inside the network needs
UNUSED = (*HEADS, "norm.", "mask_token", "decoder")  # parts of a checkpoint that a network may leave aside


@dataclass(frozen=True)
class Facts:
    """What is known of a published family and cannot be read from its weights."""

    cutoff: float | None = None  # outlier cut-off on last-layer norms that a publication names
    cutoff_source: str = ""
    antialias: bool = True  # how its authors resize the position table


# Matched by prefix, the first that fits. DINOv2 without registers was trained and released without anti-aliasing.
FACTS: dict[str, Facts] = {
    "vit_giant_patch14_dinov2": Facts(150.0, "Darcet et al., section 2.1", antialias=False),
    "vit_large_patch14_dinov2": Facts(antialias=False),
    "vit_base_patch14_dinov2": Facts(antialias=False),
    "vit_small_patch14_dinov2": Facts(antialias=False),
}


@dataclass
class Backbone:
    """A frozen ViT with the facts needed to feed it pixels and to name its tokens."""

    name: str
    net: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]  # native (height, width) in pixels
    preparation: Preparation  # how the model's own evaluation resizes and crops
    source: str  # where the weights come from, in words
    weights: str  # SHA-256 of the weight file, or "random", or the hub's name
    facts: Facts = field(default_factory=Facts)

    def __post_init__(self) -> None:
        """Freeze the network and read its facts."""
        self.net.eval().requires_grad_(False)
        embed: Any = self.net.patch_embed
        self.patch_size: tuple[int, int] = tuple(embed.patch_size)
        self.registers = int(getattr(self.net, "num_reg_tokens", 0) or _count(getattr(self.net, "reg_token", None)))
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
        return self.prefix > self.registers

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Patch grid of a picture: (height, width) in pixels → (rows, columns).

        Raises Problem if the size is not a multiple of the patch size.
        """
        (height, width), (p, q) = size, self.patch_size
        if height % p or width % q or not height or not width:
            fits = max(1, round(height / p)) * p, max(1, round(width / q)) * q
            raise Problem(
                f"image size {height}x{width} is not a multiple of the patch size {p} of {self.name}: "
                f"the nearest that fits is {fits[0]}x{fits[1]}"
            )
        return height // p, width // q

    def kinds(self, grid: tuple[int, int]) -> list[str]:
        """Kinds of all tokens in the order of the sequence: grid → names from results.KINDS."""
        rows, columns = grid
        return ["cls"] * (self.prefix - self.registers) + ["register"] * self.registers + ["patch"] * (rows * columns)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Shift and scale pixels as in training: (n, 3, H, W) in [0, 1] → the same shape, on the model's device."""
        pixels = pixels.to(self.device)
        mean, std = (pixels.new_tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (pixels - mean) / std

    def fit(self, size: tuple[int, int]) -> None:
        """Set the model to a picture size: (height, width) in pixels; position tables are resized from the original.

        Bicubic, with anti-aliasing unless the model's authors resize without (`facts.antialias`). Raises Problem if the
        size is not a multiple of the patch size.
        """
        grid = self.grid(size)
        embed: Any = self.net.patch_embed
        if tuple(embed.grid_size) == grid:
            return
        if not hasattr(self.net, "set_input_size"):
            raise Problem(f"{self.name} takes pictures of {self.size[0]}x{self.size[1]} pixels only")
        net: Any = self.net
        if tuple(embed.grid_size) != self._native:  # from the original, so that no resizing adds to another
            net.set_input_size(img_size=[n * p for n, p in zip(self._native, self.patch_size, strict=True)])
            net.load_state_dict(self._tables, strict=False)
        if grid != self._native:
            net.set_input_size(img_size=size)
            if (table := self._tables.get("pos_embed")) is not None:
                table = resample_abs_pos_embed(
                    table.to(self.device),
                    new_size=list(grid),
                    old_size=list(self._native),
                    num_prefix_tokens=table.shape[1] - self._native[0] * self._native[1],
                    antialias=self.facts.antialias,
                )
                net.pos_embed = nn.Parameter(table)
        net.requires_grad_(False)

    def prepare(self, pixels: Tensor) -> Tensor:
        """Fit the model to the pixels and normalise them: (n, 3, H, W) in [0, 1] → network input.

        Raises Problem for other shapes and for sizes that are not a multiple of the patch size.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise Problem(f"pixels must have the shape (n, 3, height, width), not {tuple(pixels.shape)}")
        self.fit((pixels.shape[-2], pixels.shape[-1]))
        return self.normalise(pixels)

    @torch.no_grad()
    def logits(self, pixels: Tensor) -> Tensor:
        """Class scores of the trained head: (n, 3, H, W) in [0, 1] → (n, classes). Raises Problem without a head."""
        if not self.net.num_classes:
            raise Problem(f"{self.name} has no trained head: it names no classes")
        return self.net(self.prepare(pixels))


def _count(token: Tensor | None) -> int:
    return 0 if token is None else int(token.shape[1])


def zoo() -> list[str]:
    """Names of our own trained models."""
    return sorted(p.parent.name for p in ZOO.glob("*/recipe.json"))


@cache
def published() -> tuple[str, ...]:
    """Names of every timm ViT that `load` can take, without the tags of their weights."""
    return tuple(n for n in timm.list_models() if is_model_in_modules(n, VIT_MODULES))


def check(name: str) -> None:
    """Raise Problem unless `load` knows the name and it belongs to a ViT; nothing is loaded."""
    if name in zoo():
        return
    bare = name.split(".")[0]
    if not timm.is_model(bare):
        raise unknown("model", name, [*zoo(), *published()])
    if not is_model_in_modules(bare, VIT_MODULES):
        raise Problem(f"{name} is not a plain ViT: it has no single grid of patch tokens to measure")
    tags = get_arch_pretrained_cfgs(bare)
    if "." in name and name not in tags:
        raise unknown("weights", name, tags)


def pick_device(device: str) -> torch.device:
    """Turn "auto", "cpu", "cuda", … into a device. Raises Problem if this machine has no such device."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise Problem(f"device {device!r} is not available here: use auto or cpu") from error


def history(name: str) -> xr.Dataset | None:
    """What was watched while a zoo model trained: name → Dataset, or None for a model of others."""
    return results.load(ZOO / name / "history.nc") if name in zoo() else None


def card(name: str) -> dict[str, Any]:
    """What a zoo model's card says of its training: name → recipe, scores, provenance. Raises Problem for a broken card."""
    try:
        return json.loads((ZOO / name / "recipe.json").read_text())
    except (OSError, ValueError) as error:
        raise Problem(
            f"{ZOO / name / 'recipe.json'} is not a recipe of the zoo: fetch the repository's data again"
        ) from error


def words(name: str) -> dict[str, Tensor] | None:
    """The text side of a zoo model for zero-shot classification: name → project (embed, width) and prompts (classes, embed), unit
    vectors in the order of scenes.CLASSES; None for a model without."""
    file = ZOO / name / "words.safetensors"
    return read_weights(file) if name in zoo() and file.exists() else None


def load(name: str, *, weights: str | Path | None = None, device: str = "auto") -> Backbone:
    """Load a ViT by name: zoo name or timm name, a weight file instead of the published one, device → Backbone.

    Raises Problem for unknown names, models that are not ViTs, unreadable or unfitting weights, and no network.
    """
    check(name)
    target = pick_device(device)
    file = None if weights is None else Path(weights).expanduser()
    backbone = _from_zoo(name, file) if name in zoo() else _from_timm(name, file)
    backbone.net.to(target)
    return backbone


def random(name: str, *, seed: int = 0, **options: Any) -> Backbone:
    """Make a timm ViT with random weights, for tests and for chance levels: name, seed, timm's options → Backbone."""
    check(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = timm.create_model(name, pretrained=False, **options)
    return _wrap(name, net, "random weights", f"random, seed {seed}")


def _wrap(name: str, net: nn.Module, source: str, weights: str) -> Backbone:
    data = timm.data.resolve_model_data_config(net)
    facts = next((f for prefix, f in FACTS.items() if name.startswith(prefix)), Facts())
    embed: Any = net.patch_embed
    size = tuple(embed.img_size or data["input_size"][1:])  # timm's config does not follow the option img_size
    return Backbone(name, net, data["mean"], data["std"], size, Preparation.of(data), source, weights, facts)


def _from_timm(name: str, file: Path | None) -> Backbone:
    if file is None:
        try:
            with hub():
                net: Any = timm.create_model(name, pretrained=True)
        except Exception as error:  # hub clients raise many kinds, and all mean the same to the user
            raise Problem(
                f"cannot fetch the weights of {name} from the hub (no network, or none are published): "
                "give a local file with --weights"
            ) from error
        return _wrap(name, net, "hub", str(net.pretrained_cfg.get("hf_hub_id") or name))
    state = read_weights(file)
    net = timm.create_model(name, pretrained=False)
    _fill(net, state, file, name)
    return _wrap(name, net, file.name, results.file_hash(file))


def _from_zoo(name: str, given: Path | None) -> Backbone:
    folder = ZOO / name
    try:
        told = card(name)
        net = timm.models.VisionTransformer(**told["vit"])
        size, mean, std = told["vit"]["img_size"], tuple(told["mean"]), tuple(told["std"])
        wanted, source = told["weights"], f"zoo, {told['recipe']['objective']}"
    except Problem:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise Problem(
            f"{folder / 'recipe.json'} is not a recipe of the zoo: fetch the repository's data again"
        ) from error
    files = [given] if given else sorted(folder.glob("weights*.safetensors")) or [folder / "weights.safetensors"]
    state = {k: v for file in files for k, v in read_weights(file).items()}  # large ones come in pieces
    found = results.file_hash(*files)
    if given is None and found != wanted:
        raise Problem(f"{files[0]} does not have the hash in its recipe: fetch the repository's data again")
    _fill(net, state, files[0], name)
    return Backbone(name, net, mean, std, (size, size), Preparation(), given.name if given else source, found)


def read_weights(file: Path) -> dict[str, Tensor]:
    """Read tensors from .safetensors or, without running any code in it, from a PyTorch checkpoint: path → state.

    Raises Problem for a missing, truncated or unsafe file.
    """
    if not file.is_file():
        raise Problem(f"no weight file at {file}")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, zipfile and unpickler errors have no common parent
        code = "Unsupported global" in str(error) or "Unsupported class" in str(error)
        what = "holds code besides tensors, which is never run" if code else "is damaged"
        raise Problem(f"cannot read weights from {file}: the file {what}") from error
    for key in ("teacher", "model", "state_dict"):
        state = state.get(key, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise Problem(f"cannot read weights from {file}: it holds no table of tensors")
    return state


def _fill(net: Any, state: dict[str, Tensor], file: Path, name: str) -> None:
    """Put a state into a network, converting the authors' own key names by timm's filter where ours do not match.

    A network whose head is not in the state loses it: a head with random weights would answer without warning.
    """
    wanted: dict[str, Tensor] = net.state_dict()
    convert: Any = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    if set(state) != set(wanted) and convert:
        try:
            state = convert(dict(state), net)
        except Exception as error:  # timm's filters take the right names for granted
            raise Problem(f"{file} does not fit {name}: its tensors are those of another model") from error
    lost = [k for k in wanted if k not in state and k.startswith(HEADS)]
    missing = sorted(set(wanted) - set(state) - set(lost))
    if missing:
        raise Problem(f"{file} does not fit {name}: {len(missing)} tensors are missing, {missing[0]!r} first")
    homeless = sorted(k for k in set(state) - set(wanted) if not k.startswith(UNUSED))
    if homeless:
        raise Problem(f"{file} does not fit {name}: {len(homeless)} tensors have no place in it, {homeless[0]!r} first")
    wrong = [k for k, v in wanted.items() if k in state and state[k].shape != v.shape]
    if wrong:
        k = wrong[0]
        raise Problem(
            f"{file} does not fit {name}: {k!r} has shape {tuple(state[k].shape)}, not {tuple(wanted[k].shape)}"
        )
    net.load_state_dict({k: v.float() for k, v in state.items() if k in wanted}, strict=False)
    if lost:
        net.reset_classifier(0)
