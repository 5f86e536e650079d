"""A name becomes a Backbone: the one place that knows prefix tokens, patch sizes, normalisation, position tables."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path
from threading import RLock
from typing import Any

import timm
import torch
import xarray as xr
from timm.layers import resample_abs_pos_embed
from timm.models import get_arch_pretrained_cfgs, is_model_in_modules
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from vitregs import results, weights
from vitregs.preparation import Preparation
from vitregs.problems import Problem, hub, unknown

ZOO = results.ROOT / "data" / "zoo"
# timm's files whose models keep one grid of patch tokens
VIT_MODULES = {"vision_transformer", "vision_transformer_relpos", "deit", "eva", "beit"}


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
# Names of hubs → timm's name of the same network, the first pattern that fits
SIZES = {
    "ti": "tiny",
    "s": "small",
    "b": "base",
    "l": "large",
    "g": "giant",
    "h": "huge",
    "plus": "_plus",
}
HUBS: tuple[tuple[str, str], ...] = (
    (r"(?:hf[-_]hub:)?(?:timm/)?(.+)", r"\1"),
    (r"dinov2_vit([sblg])14(?:_lc)?", r"vit_{1}_patch14_dinov2.lvd142m"),
    (r"dinov2_vit([sblg])14_reg4?(?:_lc)?", r"vit_{1}_patch14_reg4_dinov2.lvd142m"),
    (r"dinov2-(small|base|large|giant)(?:-imagenet1k-1-layer)?", r"vit_{1}_patch14_dinov2.lvd142m"),
    (r"dinov2-with-registers-(small|base|large|giant)(?:-.*)?", r"vit_{1}_patch14_reg4_dinov2.lvd142m"),
    (r"dinov3[-_]vit(s|b|l|h|7b)16(plus)?(?:-.*)?", r"vit_{1}{2}_patch16_dinov3"),
    (r"dino[-_]vit([sb])(8|16)", r"vit_{1}_patch{2}_224.dino"),
    (r"deit-(tiny|small|base)(-distilled)?-patch16-(224|384)", r"deit_{1}{2}_patch16_{3}"),
    (r"clip-vit-(base|large)-patch(\d+)", r"vit_{1}_patch{2}_clip_quickgelu_224.openai"),
    (r"clip-vit-large-patch14-336", r"vit_large_patch14_clip_quickgelu_336.openai"),
    (r"vit-(small|base|large|huge)-patch(\d+)-(\d+)(?:-in21k)?", r"vit_{1}_patch{2}_{3}"),
    (r"vit-mae-(base|large)", r"vit_{1}_patch16_224.mae"),
    (r"vit-mae-huge", r"vit_huge_patch14_224.mae"),
    (r"beit-(base|large)-patch16-(\d+)(?:-.*)?", r"beit_{1}_patch16_{2}"),
)


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
        """Every conversion between the weight file and the numbers: a sentence each, with the size now in use."""
        embed: Any = self.net.patch_embed
        now: tuple[int, int] = tuple(embed.grid_size)
        return self.loaded + [f"positions resized from {self._native[0]}x{self._native[1]} to {now[0]}x{now[1]}"] * (
            now != self._native and bool(self._tables)
        )

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
        """Kinds of all tokens in the order of the sequence: grid → names from results.KINDS.

        Models have at most one CLS token: DeiT's distillation token and RADIO's tokens for further teachers have
        kinds of their own.
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
        """The norm that the model applies to the last layer: `norm`, or `fc_norm` where it stands behind the pooling.

        Raises Problem where the model has none, or applies it to what its attention pooling gives.
        """
        net: Any = self.net
        pooled = getattr(net, "attn_pool", None) is not None
        for norm in (getattr(net, "norm", None), None if pooled else getattr(net, "fc_norm", None)):
            if norm is not None and not isinstance(norm, nn.Identity):
                return norm
        raise Problem(f"{self.name} has no final norm to apply to its tokens: ask for them without (final_norm=False)")

    def normalise(self, pixels: Tensor) -> Tensor:
        """Shift and scale pixels as in training: (n, 3, H, W) in [0, 1] → the same shape, on the model's device."""
        pixels = pixels.to(self.device)
        mean, std = (pixels.new_tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (pixels - mean) / std

    def fit(self, size: tuple[int, int]) -> None:
        """Set the model to a picture size: (height, width) in pixels; position tables are resized from the original.

        As timm's own loading at that size does (bicubic with anti-aliasing, for some families bilinear without), but
        for DINOv2, which its authors resize without anti-aliasing. Raises Problem if the size is not a multiple of the
        patch size.
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
            square = table[:, prefix:].unflatten(1, (side, side))[:, : grid[0], : grid[1]].flatten(1, 2)
            table = torch.cat([table[:, :prefix], square], 1)
        return table

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


def split(name: str) -> tuple[str, Path | None]:
    """Split the name of a model: NAME@FILE → NAME and the file; a training folder → its last word and the folder.

    Other names come back whole, with None. Raises Problem for a file or a folder that holds no weights.
    """
    if name in zoo():
        return name, None
    if name and _is_training(folder := Path(name).expanduser()):
        return folder.resolve().name, folder
    bare, at, file = name.partition("@")
    if not at:
        return name, None
    path = Path(file).expanduser()
    weights.files(path)
    return bare, path


def _is_training(path: Path | None) -> bool:
    """Whether a path is a folder that `pretrain` wrote."""
    return path is not None and (path / "recipe.json").is_file()


def absolute(name: str) -> str:
    """Make a model's name hold in every folder: the paths of NAME@FILE and of training folders become absolute."""
    bare, path = split(name)
    if path is None:
        return name
    return f"{bare}@{path.resolve()}" if "@" in name else str(path.resolve())


def check(name: str) -> None:
    """Raise Problem unless `load` knows the name and it belongs to a ViT; nothing is loaded.

    Names are those of `zoo` and of timm with or without a tag, NAME@FILE for weights from a file, and training folders.
    """
    name, path = split(name)
    if name in zoo() or _is_training(path):
        return
    bare = name.split(".")[0]
    if not timm.is_model(bare):
        if theirs := same_network(name):
            raise Problem(f"unknown model {name!r}: the same network is {theirs!r} here, as timm names it")
        longer = [n for n in published() if n.startswith(f"{name}_")]
        raise unknown("model", name, longer[:1] or [*zoo(), *published()])
    if not is_model_in_modules(bare, VIT_MODULES):
        raise Problem(f"{name} is not a plain ViT: it has no single grid of patch tokens to measure")
    tags = get_arch_pretrained_cfgs(bare)
    if "." in name and name not in tags:
        raise unknown("weights", name, tags)


def same_network(name: str) -> str | None:
    """Find timm's name for a network that another hub names: name, with or without its owner → timm's name, or None."""
    bare = re.sub(r"^(?:(?:hf[-_]hub:)?(?:facebook|facebookresearch|google|openai|microsoft|timm)/)", "", name).lower()
    for pattern, new in HUBS:
        if found := re.fullmatch(pattern, bare):
            parts = ["" if g is None else SIZES.get(g, g.replace("-", "_")) for g in found.groups()]
            theirs = new.replace(r"\1", bare).format(None, *parts)
            arch = theirs.split(".")[0]
            if arch in published() and ("." not in theirs or theirs in get_arch_pretrained_cfgs(arch)):
                return theirs
    return None


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
    return _recipe(ZOO / name)


def _recipe(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "recipe.json").read_text())
        return {**found}
    except (OSError, ValueError, TypeError) as error:
        raise _broken(folder) from error


def _broken(folder: Path) -> Problem:
    again = "fetch the repository's data again" if folder.parent == ZOO else "train it again"
    return Problem(f"{folder / 'recipe.json'} is not a recipe of the zoo: {again}")


def words(name: str) -> dict[str, Tensor] | None:
    """The text side of a zoo model for zero-shot classification: name → project (embed, width) and prompts (classes, embed), unit
    vectors in the order of scenes.CLASSES; None for a model without."""
    file = ZOO / name / "words.safetensors"
    return weights.read(file)[0] if name in zoo() and file.exists() else None


def load(name: str, *, weights: str | Path | None = None, device: str = "auto") -> Backbone:
    """Load a ViT.

    Args:
        name: A name of `zoo` or of timm, NAME@FILE, or a training folder.
        weights: A file, an index of shards or a folder with weights, in place of the published ones.
        device: "auto", "cpu", "cuda", …

    Returns:
        The model, frozen; its size is that of the grid its positions were trained on, its `notes` tell what was
        converted. Weights that a name brings along are told in the name: NAME@STEM-HASH.

    Raises:
        Problem: For unknown names, models that are not ViTs, unreadable or unfitting weights, and no network.
    """
    check(name)
    target = pick_device(device)
    bare, path = split(name)
    given = None if weights is None else Path(weights).expanduser()
    if path is not None and _is_training(path):
        backbone = _from_folder(path, bare, given)
    else:
        if path and given:
            raise Problem(f"{name} brings weights along: give no others")
        backbone = _from_folder(ZOO / bare, bare, given or path) if bare in zoo() else _from_timm(bare, given or path)
    if path is not None:
        backbone.name = _label(bare, path, backbone.weights)
    backbone.net.to(target)
    return backbone


def _label(bare: str, path: Path, found: str) -> str:
    """Name a model by its weights too: name, file or folder, SHA-256 → a name that is safe as part of a file name."""
    stem = re.sub(r"[^\w.+-]+", "_", path.resolve().stem if path.is_file() else path.resolve().name)
    return f"{bare}@{found[:6]}" if stem == bare else f"{bare}@{stem}-{found[:6]}"


def random(name: str, *, seed: int = 0, **options: Any) -> Backbone:
    """Make a timm ViT with random weights, for tests and for chance levels: name, seed, timm's options → Backbone.

    The weights that a name brings along (NAME@…) do not matter.
    """
    name = name.partition("@")[0]
    check(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net, convert = _build(name, **options)
    return _described(_wrap(name, net, "random weights", f"random, seed {seed}"), convert)


def _wrap(name: str, net: nn.Module, source: str, weights: str) -> Backbone:
    data = timm.data.resolve_model_data_config(net)
    facts = next((f for pattern, f in FACTS.items() if fnmatch(name, pattern)), Facts())
    embed: Any = net.patch_embed
    size = tuple(embed.img_size or data["input_size"][1:])  # timm's config does not follow the option img_size
    return Backbone(name, net, data["mean"], data["std"], size, Preparation.of(data), source, weights, facts)


def _described(backbone: Backbone, convert: Any) -> Backbone:
    """Note how timm's filter resizes this family's positions; what the authors do instead goes before."""
    bound = convert.keywords if isinstance(convert, partial) else {}
    backbone.resampling = {k: v for k, v in bound.items() if k in ("interpolation", "antialias", "align_corners")}
    return backbone


_BUILDING = RLock()


@contextmanager
def _watched(fetch: bool) -> Iterator[list[Any]]:
    """Hear from timm's builder which filter an entry binds: whether to load published weights → the filters bound."""
    heard: list[Any] = []
    load = timm.models._builder.load_pretrained

    def listen(model: nn.Module, **bound: Any) -> None:
        heard.append(bound["filter_fn"])
        if fetch:
            load(model, **bound)

    builder: Any = timm.models._builder
    with _BUILDING:
        builder.load_pretrained = listen
        try:
            yield heard
        finally:
            builder.load_pretrained = load


def _build(name: str, *, fetch: bool = False, **options: Any) -> tuple[Any, weights.Convert]:
    """Build a network by timm's own entry, with its published weights or random ones: → network, filter bound to it."""
    with _watched(fetch) as heard:
        net = timm.create_model(name, pretrained=True, **options)
    return net, heard[-1]


def _filled(net: Any, convert: weights.Convert, file: Path, name: str) -> list[str]:
    """Fill a network from a file at the size its positions were trained at: → what was converted."""
    state, notes = weights.read(file)
    patch: tuple[int, int] = tuple(net.patch_embed.patch_size)
    found = weights.patch_size(state) or patch
    if found != patch:
        other = name.replace(f"patch{patch[0]}", f"patch{found[0]}").split(".")[0]
        hint = f": try {other}" if other != name and other in published() else ""
        raise Problem(
            f"{file} does not fit {name}: its patches are {found[0]}x{found[1]} pixels, not {patch[0]}x{patch[1]}{hint}"
        )
    try:
        if (grid := weights.grid(state, net)) and grid != tuple(net.patch_embed.grid_size):
            if not hasattr(net, "set_input_size"):
                raise Problem(f"its positions are of {grid[0]}x{grid[1]} patches, and the model's size is fixed")
            net.set_input_size(img_size=[n * p for n, p in zip(grid, patch, strict=True)])
            notes.append(f"positions of {grid[0]}x{grid[1]} patches kept as they are in the file")
        return notes + weights.fill(net, state, convert)
    except Problem as problem:
        heard = f" (read with: {'; '.join(notes)})" if notes else ""
        raise Problem(f"{file} does not fit {name}: {problem}{heard}") from problem


def _from_timm(name: str, file: Path | None) -> Backbone:
    if file is None:
        try:
            with hub():
                net, convert = _build(name, fetch=True)
        except Exception as error:  # hub clients raise many kinds, and all mean the same to the user
            raise Problem(
                f"cannot fetch the weights of {name} from the hub (no network, or none are published): "
                "give a local file with --weights"
            ) from error
        return _described(_wrap(name, net, "hub", str(net.pretrained_cfg.get("hf_hub_id") or name)), convert)
    found = weights.files(file)
    net, convert = _build(name)
    notes = _filled(net, convert, file, name)
    backbone = _described(_wrap(name, net, file.name, results.file_hash(*found)), convert)
    (rows, columns), (height, width) = net.patch_embed.grid_size, backbone.patch_size
    if not backbone.facts.cropped:  # such a table is made for all sizes
        backbone.size = rows * height, columns * width
    mean, std = (", ".join(f"{v:.3f}" for v in values) for values in (backbone.mean, backbone.std))
    backbone.loaded = [*notes, f"mean ({mean}) and standard deviation ({std}) of pixels as timm has them for {name}"]
    return backbone


def _from_folder(folder: Path, name: str, given: Path | None) -> Backbone:
    """Load a model trained here from its folder: folder, name, weights in place of its own → Backbone."""
    try:
        told = _recipe(folder)
        net = timm.models.VisionTransformer(**told["vit"])
        mean, std = tuple(told["mean"]), tuple(told["std"])
        wanted, source = told["weights"], f"zoo, {told['recipe']['objective']}"
    except Problem:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise _broken(folder) from error
    if given is None and not any(folder.glob("weights*.safetensors")):
        raise Problem(f"no weight file at {folder / 'weights.safetensors'}")
    found = weights.files(given or folder)
    if given is None and results.file_hash(*found) != wanted:
        again = "fetch the repository's data again" if folder.parent == ZOO else "train it again"
        raise Problem(f"{found[0]} does not have the hash in its recipe: {again}")
    convert: Any = checkpoint_filter_fn
    notes = _filled(net, convert, given or folder, name)
    (rows, columns), (height, width) = net.patch_embed.grid_size, net.patch_embed.patch_size
    source = given.name if given else source if folder.parent == ZOO else str(folder)
    return Backbone(
        name,
        net,
        mean,
        std,
        (rows * height, columns * width),
        Preparation(),
        source,
        results.file_hash(*found),
        loaded=notes,
        card=told,
    )
