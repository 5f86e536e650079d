"""A name becomes a Backbone: the zoo, any timm ViT, or a weight file."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import cache, partial
from pathlib import Path
from threading import RLock
from typing import Any

import timm
import torch
import xarray as xr
from timm.models import get_arch_pretrained_cfgs, is_model_in_modules
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from vitregs import paths
from vitregs.cache import file_hash, load_dataset
from vitregs.data.preparation import Preparation
from vitregs.errors import InputError, unknown
from vitregs.hub import hub
from vitregs.models import attention, test_time
from vitregs.models.backbone import FACTS, Backbone, Facts
from vitregs.models.weights import Convert, files, fill, patch_size, position_grid, read

ZOO = paths.ROOT / "data" / "zoo"

# timm's files whose models keep one grid of patch tokens
VIT_MODULES = {"vision_transformer", "vision_transformer_relpos", "deit", "eva", "beit"}

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


def zoo() -> list[str]:
    """Names of our own trained models."""
    return sorted(p.parent.name for p in ZOO.glob("*/recipe.json"))


@cache
def published() -> tuple[str, ...]:
    """Names of every timm ViT that `load` can take, without the tags of their weights."""
    return tuple(n for n in timm.list_models() if is_model_in_modules(n, VIT_MODULES))


def split(name: str) -> tuple[str, Path | None]:
    """Split the name of a model: NAME@FILE → NAME and the file; a training folder → its last word and the folder.

    Other names come back whole, with None. Raises InputError for a file or a folder that holds no weights.
    """
    if name in zoo():
        return name, None
    if name and _is_training(folder := Path(name).expanduser()):
        return folder.resolve().name, folder
    bare, at, file = name.partition("@")
    if not at:
        return name, None
    path = Path(file).expanduser()
    files(path)
    return bare, path


def _is_training(path: Path | None) -> bool:
    """Whether a path is a folder that `train` wrote."""
    return path is not None and (path / "recipe.json").is_file()


def absolute(name: str) -> str:
    """Make a model's name hold in every folder: the paths in NAME@FILE, NAME+tt1:FILE and of training folders become absolute."""
    network, ending = test_time.split(name)
    if ending:
        how, colon, file = ending.partition(":")
        return f"{absolute(network)}{how}{colon}{Path(file).expanduser().resolve() if file else ''}"
    bare, path = split(name)
    if path is None:
        return name
    return f"{bare}@{path.resolve()}" if "@" in name else str(path.resolve())


def check(name: str) -> None:
    """Raise InputError unless `load` knows the name and it belongs to a ViT; nothing is loaded.

    Names are those of `zoo` and of timm with or without a tag, NAME@FILE for weights from a file, and training folders;
    each may end in "+tt1", "+zero8" and what else `test_time.apply` knows.
    """
    network, ending = test_time.split(name)
    if ending:
        inner, other = test_time.split(network)
        if other:
            raise InputError(f"a name takes one ending only, not {other}{ending}: {inner}{other} or {inner}{ending}")
        check(network)
        test_time.check_ending(network, ending)
        return
    name, path = split(name)
    if name in zoo() or _is_training(path):
        return
    bare = name.split(".")[0]
    if not timm.is_model(bare):
        if theirs := same_network(name):
            raise InputError(f"unknown model {name!r}: the same network is {theirs!r} here, as timm names it")
        longer = [n for n in published() if n.startswith(f"{name}_")]
        raise unknown("model", name, longer[:1] or [*zoo(), *published()])
    if not is_model_in_modules(bare, VIT_MODULES):
        raise InputError(f"{name} is not a plain ViT: it has no single grid of patch tokens to measure")
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
    """Turn "auto", "cpu", "cuda", … into a device. Raises InputError if this machine has no such device."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {device!r} is not available here: use auto or cpu") from error


def history(name: str) -> xr.Dataset | None:
    """What was watched while a zoo model trained: name → Dataset, or None for a model of others."""
    return load_dataset(ZOO / name / "history.nc") if name in zoo() else None


def card(name: str) -> dict[str, Any]:
    """What a zoo model's card says of its training: name → recipe, scores, provenance. Raises InputError for a broken card."""
    return _recipe(ZOO / name)


def _recipe(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "recipe.json").read_text())
        return {**found}
    except (OSError, ValueError, TypeError) as error:
        raise _broken(folder) from error


def _broken(folder: Path) -> InputError:
    again = "fetch the repository's data again" if folder.parent == ZOO else "train it again"
    return InputError(f"{folder / 'recipe.json'} is not a recipe of the zoo: {again}")


def words(name: str) -> dict[str, Tensor] | None:
    """The text side of a zoo model for zero-shot classification: name → project (embed, width) and prompts (classes, embed), unit
    vectors in the order of scenes.CLASSES; None for a model without."""
    network, _ = test_time.split(name)  # appended tokens leave words as they are
    file = ZOO / network / "words.safetensors"
    return read(file)[0] if network in zoo() and file.exists() else None


def load(name: str, *, weights: str | Path | None = None, device: str = "auto") -> Backbone:
    """Load a ViT by its name.

    Args:
        name: A name of this book's networks or of timm (`vitregs models` lists both), `NAME@FILE` for timm's network with
            weights from a file, or a folder that `vitregs train` wrote. An ending changes the network: "+tt1" is with a
            test-time register, "+zero8" with 8 tokens of zeros (`models.test_time.apply`).
        weights: A file, an index of shards or a folder with weights, in place of the published ones.
        device: "auto", "cpu", "cuda", …

    Returns:
        The model, frozen; its size is that of the grid its positions were trained on, its `notes` tell what was
        converted. Weights that a name brings along are told in its own: `NAME@FILE-HASH`.

    Raises:
        InputError: For unknown names, models that are not ViTs, unreadable or unfitting weights, no network, and a
            device that is not there.

    Example:
        >>> import vitregs as vr
        >>> vit = vr.load("supervised-pico-reg4")
        >>> vit.registers, vit.depth, vit.size
        (4, 8, (96, 96))
    """
    if not isinstance(name, str):
        raise InputError(f"a model is loaded by its name, not by {type(name).__name__}")
    check(name)
    network, ending = test_time.split(name)
    if ending:
        return test_time.apply(load(network, weights=weights, device=device), network, ending)
    target = pick_device(device)
    bare, path = split(name)
    given = None if weights is None else Path(weights).expanduser()
    if path is not None and _is_training(path):
        backbone = _from_folder(path, bare, given)
    else:
        if path and given:
            raise InputError(f"{name} brings weights along: give no others")
        backbone = _from_folder(ZOO / bare, bare, given or path) if bare in zoo() else _from_timm(bare, given or path)
    if path is not None:
        backbone.name = _label(bare, path, backbone.weights)
    backbone.net.to(target)
    return backbone


def _label(bare: str, path: Path, found: str) -> str:
    """Name a model by its weights too: name, file or folder, SHA-256 → a name that is safe as part of a file name."""
    whole = path.resolve()
    word = re.sub(r"[^\w.+-]+", "_", whole.stem if path.is_file() else whole.name)
    return f"{bare}@{found[:6]}" if word == bare else f"{bare}@{word}-{found[:6]}"


def random(name: str, *, seed: int = 0, **options: Any) -> Backbone:
    """Make a timm ViT with random weights, for tests and for chance levels: name, seed, timm's options → Backbone.

    The weights that a name brings along (NAME@…) do not matter, nor does what changes a network (NAME+tt1).
    """
    name = test_time.split(name)[0].partition("@")[0]
    check(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net, convert = _build(name, **options)
    return _described(_wrap(name, net, "random weights", f"random, seed {seed}"), convert)


def wrap(net: nn.Module, name: str = "") -> Backbone:
    """Take a timm ViT that is loaded already.

    Args:
        net: A module of timm's ViT family: ViT, DeiT, EVA, BEiT, with or without registers.
        name: What it is called in tables; by default timm's name of its architecture.

    Returns:
        The same module on its device, frozen and in evaluation mode, with the facts needed to feed it and to name its
        tokens; mean, standard deviation, size and preparation follow timm's data config of the module. Its weights stay
        as they are, but for the positions, which are resized to the images that it is shown.

    Raises:
        InputError: For a module of another kind.

    Example:
        >>> import timm
        >>> import vitregs as vr
        >>> vr.wrap(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)).depth
        2
    """
    if isinstance(net, Backbone):
        raise InputError(f"{net.name} is wrapped already: use it as it is")
    if isinstance(net, str | Path):
        raise InputError(f"wrap takes a module: load({str(net)!r}) takes a name")
    kind = type(net).__name__
    homes = {c.__module__.removeprefix("timm.models.") for c in type(net).__mro__}
    if not homes & VIT_MODULES:
        raise InputError(f"{kind} is no plain ViT of timm: it has no single grid of patch tokens to measure")
    embed: Any = net.patch_embed
    if any(n * p != side for n, p, side in zip(embed.grid_size, embed.patch_size, embed.img_size, strict=True)):
        raise InputError(f"the patches of this {kind} are not cut from pixels: networks with a stem cannot be measured")
    if not len(net.blocks):  # type: ignore[arg-type]
        raise InputError(f"this {kind} has no blocks")
    config: Any = getattr(net, "pretrained_cfg", None) or {}
    known = str(config.get("architecture") or type(net).__name__)
    return _wrap(name or known, net, "a module in memory", f"in memory, {_state_hash(net)}")


def _state_hash(net: nn.Module) -> str:
    """Hash the weights of a module: → 12 hexadecimal digits."""
    digest = hashlib.sha256()
    for key, value in net.state_dict().items():
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def _wrap(name: str, net: nn.Module, source: str, weights: str) -> Backbone:
    data = timm.data.resolve_model_data_config(net)  # type: ignore[no-untyped-call]
    facts = next((f for pattern, f in FACTS.items() if fnmatch(name, pattern)), Facts())
    embed: Any = net.patch_embed
    # timm's config does not follow the option img_size; a table that is cropped is made for all sizes
    size = tuple(data["input_size"][1:] if facts.cropped else embed.img_size or data["input_size"][1:])
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


def _build(name: str, *, fetch: bool = False, **options: Any) -> tuple[Any, Convert]:
    """Build a network by timm's own entry, with its published weights or random ones: → network, filter bound to it."""
    with _watched(fetch) as heard:
        net = timm.create_model(name, pretrained=True, **options)
    return net, heard[-1]


def _filled(net: Any, convert: Convert, file: Path, name: str) -> list[str]:
    """Fill a network from a file at the size its positions were trained at: → what was converted."""
    state, notes = read(file)
    patch: tuple[int, int] = tuple(net.patch_embed.patch_size)
    found = patch_size(state) or patch
    if found != patch:
        other = name.replace(f"patch{patch[0]}", f"patch{found[0]}").split(".")[0]
        hint = f": try {other}" if other != name and other in published() else ""
        raise InputError(
            f"{file} does not fit {name}: its patches are {found[0]}x{found[1]} pixels, not {patch[0]}x{patch[1]}{hint}"
        )
    try:
        if (grid := position_grid(state, net)) and grid != tuple(net.patch_embed.grid_size):
            if not hasattr(net, "set_input_size"):
                raise InputError(f"its positions are of {grid[0]}x{grid[1]} patches, and the model's size is fixed")
            net.set_input_size(img_size=[n * p for n, p in zip(grid, patch, strict=True)])
            notes.append(f"positions of {grid[0]}x{grid[1]} patches kept as they are in the file")
        return notes + fill(net, state, convert)
    except InputError as problem:
        heard = f" (read with: {'; '.join(notes)})" if notes else ""
        raise InputError(f"{file} does not fit {name}: {problem}{heard}") from problem


def _from_timm(name: str, file: Path | None) -> Backbone:
    if file is None:
        try:
            with hub():
                net, convert = _build(name, fetch=True)
        except Exception as error:  # hub clients raise many kinds, and all mean the same to the user
            raise InputError(
                f"cannot fetch the weights of {name} from the hub (no network, or none are published): "
                "give a local file with --weights"
            ) from error
        return _described(_wrap(name, net, "hub", str(net.pretrained_cfg.get("hf_hub_id") or name)), convert)
    found = files(file)
    net, convert = _build(name)
    notes = _filled(net, convert, file, name)
    backbone = _described(_wrap(name, net, file.name, file_hash(*found)), convert)
    (rows, columns), (height, width) = net.patch_embed.grid_size, backbone.patch_size
    if not backbone.facts.cropped:  # such a table is made for all sizes
        backbone.size = rows * height, columns * width
    mean, std = (", ".join(f"{v:.3f}" for v in values) for values in (backbone.mean, backbone.std))
    backbone.loaded = [*notes, f"mean ({mean}) and standard deviation ({std}) of pixels as timm has them for {name}"]
    return backbone


def build(facts: Mapping[str, Any], **more: Any) -> Any:
    """Make the network of a card with random weights.

    Args:
        facts: What a card says of its ViT: arguments of timm's VisionTransformer, or `architecture` (a name that timm knows)
            and what of it is changed; `attention` is a name of `attention.KINDS`, if it is not timm's plain one.
        more: Further arguments, which no card keeps.

    Returns:
        timm's ViT.
    """
    changes = {k: v for k, v in facts.items() if k not in ("architecture", "attention")}
    if kind := facts.get("attention"):
        changes["attn_layer"] = attention.KINDS[kind]
    if name := facts.get("architecture"):
        return timm.create_model(name, pretrained=False, **changes, **more)
    return timm.models.VisionTransformer(**changes, **more)


def _from_folder(folder: Path, name: str, given: Path | None) -> Backbone:
    """Load a model trained here from its folder: folder, name, weights in place of its own → Backbone."""
    try:
        facts = _recipe(folder)
        net = build(facts["vit"])
        mean, std = tuple(facts["mean"]), tuple(facts["std"])
        wanted, source = facts["weights"], f"zoo, {facts['recipe']['objective']}"
    except InputError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise _broken(folder) from error
    if given is None and not any(folder.glob("weights*.safetensors")):
        raise InputError(f"no weight file at {folder / 'weights.safetensors'}")
    found = files(given or folder)
    if given is None and file_hash(*found) != wanted:
        again = "fetch the repository's data again" if folder.parent == ZOO else "train it again"
        raise InputError(f"{found[0]} does not have the hash in its recipe: {again}")
    convert: Any = checkpoint_filter_fn
    notes = _filled(net, convert, given or folder, name)
    (rows, columns), (height, width) = net.patch_embed.grid_size, net.patch_embed.patch_size
    source = given.name if given else source if folder.parent == ZOO else str(folder)
    native = (rows * height, columns * width)
    net.pretrained_cfg = {"architecture": name, "input_size": (3, *native), "mean": mean, "std": std, "crop_pct": 1.0}
    return Backbone(
        name,
        net,
        mean,
        std,
        native,
        Preparation(),
        source,
        file_hash(*found),
        loaded=notes,
        card=facts,
    )
