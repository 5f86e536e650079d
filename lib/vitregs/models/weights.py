"""Weight files, read without running code in them and filled in as timm itself does."""

import argparse
import json
import math
import pathlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vitregs.errors import InputError

Tensors = dict[str, Tensor]
Convert = Callable[[Tensors, nn.Module], Tensors]  # timm's filter, bound as the model's entry binds it
FOLDER = (  # what a folder of weights may hold, the first that is there
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "weights*.safetensors",
)

# where a checkpoint may keep its weights, the first that is there: averaged ones before those of the last step
CONTAINERS = (
    "teacher",
    "state_dict_ema",
    "model_ema",
    "state_dict",
    "model",
    "module",
    "encoder",
    "student",
)
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # anywhere in a name
PREFIXES = ("module.", "teacher.", "model_ema.", "model.", "backbone.", "encoder.", "student.")
HUGGING_FACE = ("vit.", "deit.", "dinov2.", "dinov2_with_registers.", "dinov3_vit.", "beit.", "vision_model.")
HF_HEADS = (
    "classifier.",
    "cls_classifier.",
    "distillation_classifier.",
    "visual_projection.",
)  # outside those prefixes

# the patch embedding and the positions in each layout that timm's filters or the table below convert
HF_PATCHES = (
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embeddings.weight",
    "embeddings.patch_embedding.weight",
)
PATCHES = (
    "patch_embed.proj.weight",
    "visual.conv1.weight",
    "conv1.weight",
    "visual.trunk.patch_embed.proj.weight",
    "visual.patch_embed.proj.weight",
    "vision_encoder.patch_embed.proj.weight",
    "preprocessor.patchifier.proj.weight",
    "patch_embed.projection.weight",
    "beit3.vision_embed.proj.weight",
    "radio_model.model.patch_generator.embedder.weight",
)
POSITIONS = (
    "pos_embed",
    "visual.positional_embedding",
    "positional_embedding",
    "visual.trunk.pos_embed",
    "visual.pos_embed",
    "vision_encoder.pos_embed",
    "preprocessor.pos_embed",
    "beit3.encoder.embed_positions.A.weight",
    "radio_model.model.patch_generator.pos_embed",
)
RELATIVE = "relative_position_bias_table"
HEADS = ("head", "fc_norm.")  # parts that no measurement inside the network needs
UNUSED = (*HEADS, "norm.", "mask_token", "decoder", "lm_head", "attn_pool.")  # what a network may leave aside

# Key names of Hugging Face's ViT, DeiT, MAE, DINOv2, DINOv3, BEiT and CLIP vision models → timm's or the authors' own
HF_NAMES = (
    (r"^embeddings\.(?:cls_token|class_embedding)$", "cls_token"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.(mask_token|register_tokens)$", r"\1"),
    (r"^embeddings\.position_embeddings?(\.weight)?$", "pos_embed"),
    (r"^embeddings\.patch_embeddings?\.(?:projection\.)?", "patch_embed.proj."),
    (r"^(?:encoder\.|model\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.attention\.relative_position_bias\.", ".attn."),
    (r"\.attention\.attention\.([qkv])(?:uery|ey|alue)\.", r".attn.\1."),
    (r"\.(?:self_attn|attention)\.([qkv])_proj\.", r".attn.\1."),
    (r"\.(?:attention\.output\.dense|self_attn\.out_proj|attention\.o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.(?:layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(?:layernorm_after|layer_norm2)\.", ".norm2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.lambda_(\d)$", r".gamma_\1"),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.weights_out\.", ".mlp.w3."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^(?:post_layernorm|layernorm)\.", "norm."),
    (r"^pooler\.layernorm\.", "fc_norm."),
    (r"^(?:cls_)?classifier\.", "head."),
    (r"^distillation_classifier\.", "head_dist."),
    (r"^visual_projection\.", "head."),
)
HF_UNUSED = re.compile(r"^pooler\.dense\.|position_ids$|relative_position_index$")
NUMPY: list[Any] = [v.__reduce__()[0] for v in (np.float64(0), np.zeros(1))]  # how it makes scalars and arrays again

# Types besides tensors that a checkpoint may hold: they keep values, and no call of theirs runs anything of the file's
HARMLESS: list[Any] = [
    argparse.Namespace,
    np.dtype,
    np.ndarray,
    *{type(np.dtype(c)) for c in "?bBhHiIlLqQefdFDUS"},
    *((f, f"numpy.{core}.multiarray.{f.__name__}") for core in ("core", "_core") for f in NUMPY),
    *((pathlib.PurePosixPath, f"pathlib{m}.{n}Path") for m in ("", "._local") for n in ("Posix", "PurePosix")),
    *((pathlib.PureWindowsPath, f"pathlib{m}.{n}Path") for m in ("", "._local") for n in ("Windows", "PureWindows")),
]  # fmt: skip


def files(path: Path) -> list[Path]:
    """Find the weight files that a path stands for.

    Args:
        path: A file, an index of shards (`model.safetensors.index.json`), or a folder that holds one of `FOLDER`.

    Returns:
        The files in order, all of which exist.

    Raises:
        InputError: If there is none, or if the index is broken or names files that are not there.
    """
    path = path.expanduser()
    if path.is_dir():
        for pattern in FOLDER:
            if found := sorted(path.glob(pattern)):
                return [f for first in found for f in files(first)]
        raise InputError(f"no weight file in {path}: looked for {', '.join(FOLDER)}")
    if not path.is_file():
        raise InputError(f"no weight file at {path}")
    if not path.name.endswith(".index.json"):
        return [path]
    try:
        shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no index of weight files: it needs a table 'weight_map'") from error
    if not shards or any(not isinstance(s, str) or Path(s).name != s for s in shards):
        raise InputError(f"{path} is no index of weight files: it must name files beside it")
    return [f for s in shards for f in files(path.parent / s)]


def read(path: Path) -> tuple[Tensors, list[str]]:
    """Read a table of tensors, without running any code in the file.

    Args:
        path: What `files` takes.

    Returns:
        The tensors under names that timm's filters know, and what was converted, a sentence each.

    Raises:
        InputError: For a missing, truncated or unsafe file, and for one without a table of tensors.
    """
    state: Tensors = {}
    notes: list[str] = []
    for file in files(path):
        part, told = _unwrapped(_load(file), file)
        state |= part
        notes += [n for n in told if n not in notes]
    state, told = _stripped(state)
    notes += told
    if any(k in state for k in HF_PATCHES):
        state = _from_hugging_face(state)
        notes.append("key names of Hugging Face mapped to timm's")
    return state, notes


def _load(file: Path) -> Any:
    if file.suffix == ".npz":
        raise InputError(f"cannot read weights from {file}: convert JAX weights (.npz) to safetensors first")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, zipfile and unpickler errors have no common parent
        code = re.search(r"Unsupported (?:global|class)\W+(?:GLOBAL )?([\w.]+)", str(error))
        what = f"holds code besides tensors, which is never run ({code[1]})" if code else "is damaged"
        raise InputError(f"cannot read weights from {file}: the file {what}") from error


def _unwrapped(found: Any, file: Path) -> tuple[Tensors, list[str]]:
    """Take the table of tensors out of a checkpoint's containers."""
    path, others = [], []
    while isinstance(found, Mapping):
        there = [k for k in CONTAINERS if isinstance(found.get(k), Mapping) and found[k]]
        if not there:
            break
        path.append(there[0])
        others += there[1:]
        found = found[there[0]]
    state = {k: v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, Mapping) else {}
    if not state:
        raise InputError(f"cannot read weights from {file}: it holds no table of tensors")
    instead = f", not {', '.join(map(repr, others))}" if others else ""
    return state, [f"weights taken from {'/'.join(path)!r}{instead}"] if path else []


def _stripped(state: Tensors) -> tuple[Tensors, list[str]]:
    """Take off the names of wrappers, again and again, until the names are those of a layout."""
    notes = []
    for word in WRAPPERS:
        if any(word in k for k in state):
            state = {k.replace(word, ""): v for k, v in state.items()}
            notes.append(f"{word!r} removed from the names")
    while not any(k in state for k in (*PATCHES, *HF_PATCHES)):
        for word in (*PREFIXES, *HUGGING_FACE):
            inner = {k.removeprefix(word): v for k, v in state.items() if k.startswith(word)}
            if any(k.endswith((*PATCHES, *HF_PATCHES)) for k in inner):
                break
        else:
            return state, notes
        if word in HUGGING_FACE:
            inner |= {k: v for k, v in state.items() if k.startswith(HF_HEADS)}
        notes.append(f"prefix {word!r} removed" + _without(len(state) - len(inner)))
        state = inner
    chunked = re.compile(r"^blocks\.\d+\.(\d+)\.")  # DINOv2's own training keeps blocks in chunks
    if any(chunked.match(k) for k in state):
        state = {chunked.sub(r"blocks.\1.", k): v for k, v in state.items()}
        notes.append("chunks of blocks joined")
    return state, notes


def _without(count: int) -> str:
    return f", {count} other tensors left out" if count else ""


def _from_hugging_face(state: Tensors) -> Tensors:
    """Rename the tensors of Hugging Face's vision transformers and join query, key and value."""
    out: Tensors = {}
    for name, value in state.items():
        if HF_UNUSED.search(name):
            continue
        for old, new in HF_NAMES:
            name = re.sub(old, new, name)
        if name == "pos_embed" and value.ndim == 2:
            value = value[None]
        out[name] = value.reshape(1, 1, -1) if name == "cls_token" else value
    if any(".attn.k_proj." in k or ".mlp.up_proj." in k for k in out):  # DINOv3, to its authors' names
        gated = any(".mlp.gate_proj." in k for k in out)
        names = {"gate_proj": "w1", "up_proj": "w2" if gated else "fc1", "down_proj": "w3" if gated else "fc2"}
        out = {re.sub(r"(?<=\.mlp\.)(\w+_proj)", lambda m: names[m[1]], k): v for k, v in out.items()}
        out["storage_tokens"] = out.pop("register_tokens")
    if "register_tokens" in out:
        out.setdefault("mask_token", torch.zeros(1))  # by which timm knows the layout of DINOv2
    if "visual_projection.weight" in state and "classifier.weight" not in state:
        out["head.bias"] = torch.zeros(len(out["head.weight"]))
    return _joined(out)


def _joined(state: Tensors) -> Tensors:
    """Join `attn.q`, `attn.k`, `attn.v` to timm's `attn.qkv`; BEiT keeps the biases of queries and values apart."""
    out = {k: v for k, v in state.items() if not re.search(r"\.attn\.[qkv]\.", k)}
    for name in [k for k in state if k.endswith((".attn.q.weight", ".attn.q.bias"))]:
        q, k, v = (state.get(name.replace(".attn.q.", f".attn.{c}.")) for c in "qkv")
        if q is None or v is None:
            continue  # filling will find what is missing
        if k is None and "storage_tokens" not in state:
            block = name.removesuffix("q.bias")
            out[f"{block}q_bias"], out[f"{block}v_bias"] = q, v
        else:
            out[name.replace(".q.", ".qkv.")] = torch.cat([q, torch.zeros_like(q) if k is None else k, v])
    return out


def patch_size(state: Tensors) -> tuple[int, int] | None:
    """Read the patch size from a table of tensors: rows and columns in pixels, or None where no layout is known."""
    for name in PATCHES:
        if (weight := state.get(name)) is not None and weight.ndim in (2, 4):
            side = math.isqrt(weight.shape[-1] // 3)
            return (side, side) if weight.ndim == 2 else (weight.shape[-2], weight.shape[-1])
    return None


def position_grid(state: Tensors, net: Any) -> tuple[int, int] | None:
    """Read the grid of patches that positions were trained on.

    Args:
        state: A table of tensors in a layout that timm knows.
        net: The network it is meant for, at any size.

    Returns:
        Rows and columns, the network's own where they account for every row of the table; None without positions.

    Raises:
        InputError: If no grid is as large as the table, with a sentence that goes on after "does not fit NAME:".
    """
    own: tuple[int, int] = tuple(net.patch_embed.grid_size)
    key = next((k for k in POSITIONS if k in state), "")
    table = state.get(key)
    if table is not None and getattr(net, "pos_embed", None) is not None:
        rows, prefix = table.shape[-2], net.pos_embed.shape[1] - own[0] * own[1]
        if rows - prefix == own[0] * own[1]:
            return own
        # DINOv2 keeps a row for CLS where timm does not, BEiT-3 two that are never used
        for less in (prefix, 3 if key.startswith("beit3.") else 1):
            if rows > less and (side := math.isqrt(rows - less)) ** 2 == rows - less:
                return side, side
        raise InputError(f"its position table of {rows} rows is no square grid")
    for name, module in net.named_modules():
        key, bias = f"{name}.{RELATIVE}", getattr(module, RELATIVE, None)
        if bias is None or key not in state:
            continue
        window: tuple[int, int] = tuple(module.window_size)
        less = len(bias) - (2 * window[0] - 1) * (2 * window[1] - 1)
        if len(bias) == len(state[key]):
            return own
        span = math.isqrt(len(state[key]) - less)
        if span**2 == len(state[key]) - less and span % 2:
            return (span + 1) // 2, (span + 1) // 2
        raise InputError(f"its table of relative positions of {len(state[key])} rows is no square grid")
    return None


def fill(net: Any, state: Tensors, convert: Convert) -> list[str]:
    """Put a table of tensors into a network, converted by timm's filter.

    A network whose head is not in the table, or has other classes, loses it: one with random weights would answer.

    Args:
        net: The network, changed in place; float32.
        state: What `read` gives.
        convert: timm's filter for this network, bound as timm's own entry binds it.

    Returns:
        What was left out, a sentence each.

    Raises:
        InputError: If tensors are missing, have no place or another shape, with a sentence that goes on after "does not
            fit NAME:".
    """
    wanted: Tensors = net.state_dict()
    given = list(state)
    try:
        state = convert(dict(state), net)
    except Exception as error:  # timm's filters take the right names for granted
        raise InputError(f"its tensors are those of another model ({_names(given)})") from error
    notes = []
    for k in [k for k in wanted if k.startswith("head") and k in state and state[k].shape != wanted[k].shape]:
        if state[k].shape[1:] == wanted[k].shape[1:] and k.endswith("weight"):
            notes.append(f"{k.split('.')[0]} left out: {len(state[k])} classes in the file, {len(wanted[k])} expected")
        if state[k].shape[1:] == wanted[k].shape[1:]:
            del state[k]
    lost = [k for k in wanted if k not in state and k.startswith(HEADS)]
    missing = sorted(set(wanted) - set(state) - set(lost))
    if missing:
        raise InputError(f"{len(missing)} tensors are missing, {missing[0]!r} first ({_names(given)})")
    idle = sorted(set(state) - set(wanted))
    homeless = [k for k in idle if not k.startswith(UNUSED)]
    if homeless:
        raise InputError(f"{len(homeless)} tensors have no place in it, {homeless[0]!r} first")
    for k, v in wanted.items():
        if k in state and state[k].shape != v.shape:
            raise InputError(f"{k!r} has shape {tuple(state[k].shape)}, not {tuple(v.shape)}")
    net.load_state_dict({k: v.float() for k, v in state.items() if k in wanted}, strict=False)
    if idle:
        notes.append("left out: " + ", ".join(dict.fromkeys(k.split(".")[0] for k in idle)))
    if lost:
        net.reset_classifier(0)
        if any(k.startswith("fc_norm.") for k in lost):
            net.fc_norm = nn.Identity()
        if not notes or "classes in the file" not in notes[0]:
            notes.append("no head in the file")
    return notes


def _names(given: list[str]) -> str:
    """Say how a file names its tensors, by their common prefix or the first of them."""
    low, high = min(given), max(given)
    same = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    prefix = low[: low.rfind(".", 0, same) + 1]
    return f"all its names begin with {prefix!r}" if prefix else f"its first name is {low!r}"
