"""Weight files: every layout against timm's own loading, checkpoints as they lie about, Hugging Face's names by hand."""

import argparse
import json
import math
import pathlib
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from vitregs import cache
from vitregs.errors import InputError
from vitregs.models import capture, registry, weights

State = dict[str, Tensor]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:timm.layers", "ignore:Detected pickle protocol")


def problem(call: Callable[..., object], *args: object, **kw: object) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **kw)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make timm build every model with these options, here and in the library."""
    create = timm.create_model

    def use(**options: Any) -> None:
        monkeypatch.setattr(timm, "create_model", lambda name, **kw: create(name, **{**options, **kw}))

    return use


def drawn(name: str, seed: int = 0, **options: Any) -> Any:
    """A network of which no tensor is at its start: timm begins some at zero, which would hide a fault."""
    torch.manual_seed(seed)
    net = timm.create_model(name, **options).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net


def copy(net: Any) -> State:
    return {k: v.clone() for k, v in net.state_dict().items()}


# --- every family's layout, against timm loading the same file


def renamed(state: State, **message: str) -> State:
    out = {}
    for k, v in state.items():
        for old, new in message.items():
            k = k.replace(old.replace("__", "."), new)
        out[k] = v
    return out


def plain(state: State) -> State:
    return state


def deit3(state: State) -> State:
    return renamed(state, ls1__gamma="gamma_1", ls2__gamma="gamma_2")


def dinov2_registers(state: State) -> State:
    out = {k: v for k, v in state.items() if k != "reg_token"}
    cls = torch.full_like(out["cls_token"], 0.25)
    out["pos_embed"] = torch.cat([cls, out["pos_embed"]], 1)
    return {**out, "register_tokens": state["reg_token"], "mask_token": torch.zeros(1, cls.shape[-1])}


def radio(state: State) -> State:
    out = {k.replace("blocks.", "radio_model.model.blocks."): v for k, v in state.items() if "blocks" in k}
    start = "radio_model.model.patch_generator."
    out[f"{start}embedder.weight"] = state["patch_embed.proj.weight"].flatten(1)
    out[f"{start}pos_embed"] = state["pos_embed"]
    out[f"{start}cls_token.token"] = torch.cat([state["cls_token"], state["reg_token"]], 1)[0]
    return {**out, "radio_model.summary_idxs": torch.arange(2), "input_conditioner.norm_mean": torch.zeros(3, 1, 1)}


def openai_clip(state: State) -> State:
    out = renamed(
        {k: v for k, v in state.items() if k != "head.bias"},
        blocks__="transformer.resblocks.", norm_pre="ln_pre", norm1="ln_1", norm2="ln_2", attn__proj="attn.out_proj",
        attn__qkv__="attn.in_proj_", mlp__fc1="mlp.c_fc", mlp__fc2="mlp.c_proj", patch_embed__proj="conv1",
        pos_embed="positional_embedding", cls_token="class_embedding",
    )  # fmt: skip
    out = {("ln_post" + k[4:] if k.startswith("norm.") else k): v for k, v in out.items()}
    out["proj"] = out.pop("head.weight").T
    out["class_embedding"], out["positional_embedding"] = out["class_embedding"][0, 0], out["positional_embedding"][0]
    text = {"positional_embedding": torch.zeros(77, 8), "token_embedding.weight": torch.zeros(9, 8)}
    return {**text, **{f"visual.{k}": v for k, v in out.items()}}


def open_clip(state: State) -> State:
    return {"logit_scale": torch.zeros(1), **{f"visual.trunk.{k}": v for k, v in state.items()}}


def dinov3(state: State) -> State:
    out = renamed(state, reg_token="storage_tokens", gamma_1="ls1.gamma", gamma_2="ls2.gamma")
    bias = {k.replace("weight", "bias"): torch.zeros(len(v)) for k, v in out.items() if k.endswith("qkv.weight")}
    return {**out, **bias, "mask_token": torch.zeros(1, 1), "rope_embed.periods": torch.ones(4)}


def aimv2(state: State) -> State:
    out = renamed(
        state, norm1="norm_1", norm2="norm_2", patch_embed__="preprocessor.patchifier.",
        pos_embed="preprocessor.pos_embed", blocks__="trunk.blocks.", mlp__fc1_g="mlp.fc1", mlp__fc1_x="mlp.fc3",
    )  # fmt: skip
    return {(f"trunk.post_trunk_{k}" if k.startswith("norm.") else k): v for k, v in out.items()}


def beit(state: State) -> State:
    index = {f"{k[:-5]}relative_position_index": torch.zeros(2) for k in state if k.endswith("table")}
    return {**state, **index}


NARROW = {"depth": 1, "embed_dim": 96, "num_heads": 3}
FAMILIES: dict[str, tuple[Callable[[State], State], dict[str, Any], int]] = {  # layout, options, grid in the file
    "vit_small_patch16_224": (plain, NARROW, 9),
    "vit_medium_patch16_reg4_gap_256": (plain, NARROW, 9),
    "flexivit_small": (plain, NARROW, 24),
    "deit3_small_patch16_224": (deit3, NARROW, 9),
    "deit_tiny_distilled_patch16_224": (plain, NARROW, 9),
    "vit_small_patch14_reg4_dinov2": (dinov2_registers, NARROW, 9),
    "vit_base_patch16_radio_v3": (radio, NARROW, 40),
    "vit_large_patch16_radio_v3": (radio, NARROW, 40),
    "vit_base_patch16_clip_quickgelu_224": (openai_clip, NARROW, 9),
    "vit_base_patch16_siglip_224": (open_clip, NARROW, 9),
    "vit_small_patch16_dinov3": (dinov3, NARROW, 16),
    "aimv2_large_patch14_224": (aimv2, NARROW, 9),
    "eva02_tiny_patch14_224": (plain, NARROW, 9),
    "beit_base_patch16_224": (beit, NARROW, 9),
    "vit_relpos_small_patch16_224": (plain, NARROW, 14),
    "vit_relpos_base_patch32_plus_rpn_256": (plain, NARROW, 8),
    "test_vit_relpos": (plain, {}, 10),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_is_loaded_as_timm_loads_it(name: str, small: Callable[..., None], tmp_path: Path) -> None:
    """Parameter by parameter, and in its features, in the layout of the model's authors and at another grid."""
    layout, options, side = FAMILIES[name]
    small(**options)
    patch = timm.create_model(name).patch_embed.patch_size[0]
    torch.save(layout(copy(drawn(name, img_size=side * patch))), tmp_path / "w.pth")
    ours = registry.load(name, weights=tmp_path / "w.pth", device="cpu")
    overlay = {"file": str(tmp_path / "w.pth")}
    if "radio" not in name:
        assert ours.size == (side * patch, side * patch)
    for size in (None, (side * patch, side * patch)):
        theirs = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, **{"img_size": size} if size else {}
        )
        theirs.eval()
        size = tuple(n * patch for n in theirs.patch_embed.grid_size)
        ours.fit(size)
        found, wanted = ours.net.state_dict(), theirs.state_dict()
        assert found.keys() == wanted.keys()
        for k, v in wanted.items():
            assert torch.allclose(found[k], v, atol=1e-5), k
        x = torch.rand(1, 3, *size)
        assert torch.allclose(ours.net.forward_features(x), theirs.forward_features(x), atol=1e-4, rtol=1e-4)


def test_every_binding_of_timm_is_among_these() -> None:
    def kind(name: str) -> tuple[object, ...]:
        sparse = {"num_kv_heads": (None,)} if "sapiens2" in name else {}
        with torch.device("meta"):
            _, convert = registry._build(name, depth=1, **sparse)
        bound = convert if isinstance(convert, partial) else partial(convert)
        return bound.func.__module__, *sorted(bound.keywords.items())

    assert {kind(n) for n in registry.published()} == {kind(n) for n in FAMILIES}


@torch.no_grad()
def test_radio_at_a_size_that_is_not_square(small: Callable[..., None], tmp_path: Path) -> None:
    """Positions are resized to a square and cut, as RADIO does and timm when it loads at that size."""
    small(**NARROW)
    name = "vit_base_patch16_radio_v3"
    torch.save(radio(copy(drawn(name, img_size=320))), tmp_path / "w.pth")
    ours = registry.load(name, weights=tmp_path / "w.pth", device="cpu")
    overlay = {"file": str(tmp_path / "w.pth")}
    theirs = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, img_size=(96, 160))
    ours.fit((96, 160))
    assert torch.allclose(ours.net.pos_embed, theirs.pos_embed, atol=1e-6)
    assert ours.size == (512, 512)


# --- positions are resized once


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    ["vit_small_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224"],
)
def test_a_file_keeps_its_own_size(name: str, small: Callable[..., None], tmp_path: Path) -> None:
    small(**{**NARROW, "depth": 2})
    side = 24 * timm.create_model(name).patch_embed.patch_size[0]
    net = drawn(name, img_size=side)
    headless = {k: v for k, v in copy(net).items() if not k.startswith("head")}
    save_file(headless, tmp_path / "w.safetensors")
    ours = registry.load(name, weights=tmp_path / "w.safetensors", device="cpu")
    assert ours.size == (side, side)
    pixels = torch.rand(1, 3, side, side)
    norms = capture.norms(ours, pixels, layers=[-1])
    state = {}
    net.blocks[-1].register_forward_hook(lambda _m, _x, y: state.update(last=y))
    net.forward_features(ours.normalise(pixels))
    assert np.allclose(norms.values[:, 0], state["last"].norm(dim=-1).numpy(), rtol=1e-4)
    assert "positions of 24x24 patches kept as they are in the file" in ours.notes
    before = copy(ours.net)
    ours.fit((side // 2, side // 2))
    assert ours.notes[-1] == "positions resized from 24x24 to 12x12"
    ours.fit((side, side))
    assert all(torch.equal(v, before[k]) for k, v in ours.net.state_dict().items())


def test_a_grid_that_is_not_square(tmp_path: Path) -> None:
    save_file(copy(drawn("test_vit", img_size=(32, 80))), tmp_path / "w.safetensors")
    message = problem(registry.load, "test_vit", weights=tmp_path / "w.safetensors")
    assert "does not fit test_vit: its position table of 11 rows is no square grid" in message


def test_another_patch_size_is_refused(small: Callable[..., None], tmp_path: Path) -> None:
    small(**NARROW)
    save_file(copy(drawn("vit_small_patch8_224", img_size=64)), tmp_path / "w.safetensors")
    message = problem(registry.load, "vit_small_patch16_224", weights=tmp_path / "w.safetensors")
    assert "its patches are 8x8 pixels, not 16x16: try vit_small_patch8_224" in message
    ours = registry.load("vit_small_patch8_224", weights=tmp_path / "w.safetensors", device="cpu")
    assert ours.patch_size == (8, 8)


def test_notes_tell_mean_and_standard_deviation(tmp_path: Path) -> None:
    save_file(copy(drawn("test_vit")), tmp_path / "w.safetensors")
    ours = registry.load("test_vit", weights=tmp_path / "w.safetensors")
    assert ours.notes == [
        "mean (0.500, 0.500, 0.500) and standard deviation (0.500, 0.500, 0.500) of pixels as timm has them for test_vit"
    ]


# --- kinds of tokens and the final norm


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("deit_tiny_distilled_patch16_224", ["cls", "dist"]),
        ("vit_base_patch16_radio_v3", ["cls", *(f"summary{i}" for i in range(3)), *(f"reg{i}" for i in range(4))]),
        ("vit_so400m_patch16_radio_v4", ["cls", "summary0", "summary1", *(f"reg{i}" for i in range(7))]),
        ("eva02_tiny_patch14_224", ["cls"]),
        ("vit_small_patch16_dinov3", ["cls", *(f"reg{i}" for i in range(4))]),
    ],
)
def test_cls_is_cls(name: str, labels: list[str]) -> None:
    from vitregs.probes import sampling

    ours = registry.random(name, **NARROW, img_size=112)
    p = ours.patch_size[0]
    norms = capture.norms(ours, torch.rand(2, 3, 2 * p, 2 * p), layers=[-1]).isel(layer=0)
    assert norms["label"].values.tolist()[: len(labels)] == labels
    marks = norms > norms.median()
    for seed in range(8):
        assert (sampling.draw_tokens(marks, "cls", seeds=[seed]) == 0).all()
    if "reg0" in labels:
        drawn_ = sampling.draw_tokens(marks, "register", seeds=range(50))
        assert set(np.unique(drawn_)) == {i for i, label in enumerate(labels) if label.startswith("reg")}


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    ["vit_small_patch16_224", "vit_medium_patch16_reg4_gap_256", "beit_base_patch16_224", "eva02_tiny_patch14_224",
     "eva02_base_patch16_clip_224", "vit_relpos_small_patch16_224", "vit_relpos_base_patch16_cls_224", "test_vit2"],
)  # fmt: skip
def test_the_final_norm_is_the_models_own(
    name: str, small: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the head gets of one token alone: timm's own forward pass with all other tokens like it."""
    options = {} if name == "test_vit2" else {**NARROW, "img_size": 56 if "14" in name else 64}
    net = drawn(name, **options)
    ours = registry.random(name, **options)
    ours.net.load_state_dict(net.state_dict())
    pixels = torch.rand(1, 3, *ours.size if not options else (options["img_size"],) * 2)
    kinds = sorted(set(ours.kinds((1, 1))))
    raw = capture.tokens(ours, pixels, kinds=kinds).values
    got = capture.tokens(ours, pixels, kinds=kinds, final_norm=True).values
    assert np.abs(got - raw).max() > 0.1
    for i in range(3):
        alike = torch.from_numpy(raw[:, i : i + 1]).expand(-1, raw.shape[1], -1)
        wanted = net.forward_head(net.norm(alike), pre_logits=True)
        assert np.allclose(got[:, i], wanted.numpy(), atol=1e-4)


@pytest.mark.parametrize("name", ["vit_base_patch16_radio_v3", "vit_pe_spatial_small_patch16_512"])
def test_a_final_norm_that_is_not_there(name: str) -> None:
    ours = registry.random(name, depth=1, img_size=64)
    x = torch.rand(1, 3, 64, 64)
    assert "has no final norm to apply" in problem(capture.tokens, ours, x, final_norm=True)
    assert capture.tokens(ours, x).sizes["token"] == 16


def test_a_final_norm_that_the_file_lacks(small: Callable[..., None], tmp_path: Path) -> None:
    small(**NARROW, img_size=64)
    own = {k: v for k, v in copy(drawn("vit_medium_patch16_reg4_gap_256")).items() if not k.startswith("fc_norm")}
    save_file(own, tmp_path / "w.safetensors")
    ours = registry.load("vit_medium_patch16_reg4_gap_256", weights=tmp_path / "w.safetensors")
    assert "has no final norm" in problem(ours.final_norm)
    assert "no trained head" in problem(ours.logits, torch.rand(1, 3, 64, 64))


# --- checkpoints as they lie about


def prefixed(*message: str) -> Callable[[State], dict[str, Any]]:
    return lambda s: {"".join(message) + k: v for k, v in s.items()}


CHECKPOINTS: dict[str, tuple[Callable[[State], Any], str]] = {  # how, and what the notes tell
    "parallel": (prefixed("module."), "prefix 'module.' removed"),
    "lightning": (lambda s: {"state_dict": prefixed("model.")(s), "epoch": 3}, "prefix 'model.' removed"),
    "compiled": (prefixed("_orig_mod."), "'_orig_mod.' removed"),
    "compiled inside": (lambda s: {k.replace("blocks.0.", "blocks.0._orig_mod."): v for k, v in s.items()}, "'_orig_mod.'"),
    "twice": (prefixed("module.", "model."), "prefix 'model.' removed"),
    "dino": (
        lambda s: {"student": prefixed("module.", "backbone.")({k: v + 1 for k, v in s.items()}),
                   "teacher": {**prefixed("backbone.")(s), "head.mlp.0.weight": torch.zeros(3, 3)}},
        "weights taken from 'teacher', not 'student'",
    ),
    "dinov2": (
        lambda s: {"model": {**prefixed("teacher.backbone.")(s),
                             **prefixed("student.backbone.")({k: v + 1 for k, v in s.items()})}},
        "prefix 'teacher.' removed",
    ),
    "average": (lambda s: {"model": {k: v + 1 for k, v in s.items()}, "model_ema": s}, "taken from 'model_ema', not 'model'"),
    "encoder": (prefixed("encoder."), "prefix 'encoder.' removed"),
    "chunks": (lambda s: {k.replace("blocks.", "blocks.0."): v for k, v in s.items()}, "chunks of blocks joined"),
    "arguments": (
        lambda s: {"model": s, "args": argparse.Namespace(lr=1e-3, out=pathlib.Path("a/b"), best=np.float64(0.5)),
                   "table": np.arange(3), "time": np.int64(4), "kept": OrderedDict(a=np.float32(1))},
        "weights taken from 'model'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_everyday_checkpoints(kind: str, tmp_path: Path) -> None:
    make, printed = CHECKPOINTS[kind]
    own = copy(drawn("test_vit"))
    torch.save(make(own), tmp_path / "w.pth")
    ours = registry.load("test_vit", weights=tmp_path / "w.pth", device="cpu")
    found = ours.net.state_dict()
    body = {k: v for k, v in own.items() if k in found}
    assert found.keys() == body.keys()
    assert len(own) - len(body) in (0, 2)  # a head in some
    assert all(torch.equal(found[k], v) for k, v in body.items())
    assert any(printed in n for n in ours.notes), ours.notes


class Stranger:
    """A type that no list allows."""


def test_types_that_are_not_harmless_are_named(tmp_path: Path) -> None:
    torch.save({"model": copy(drawn("test_vit")), "args": Stranger()}, tmp_path / "w.pth")
    message = problem(registry.load, "test_vit", weights=tmp_path / "w.pth")
    assert "holds code besides tensors, which is never run (tests.test_weights.Stranger)" in message


def test_harmless_types_run_nothing() -> None:
    for entry in weights.HARMLESS:
        kind = entry[0] if isinstance(entry, tuple) else entry
        module = kind.__module__.split(".")[0]
        assert module in ("argparse", "numpy", "pathlib"), entry
        assert (
            issubclass(kind, argparse.Namespace | np.dtype | np.ndarray | pathlib.PurePath)
            if isinstance(kind, type)
            else (kind.__name__ in ("scalar", "_reconstruct"))
        )


def test_shards_and_folders(tmp_path: Path) -> None:
    own = copy(drawn("test_vit"))
    names = sorted(own)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in parts.items():
        save_file({k: own[k] for k in keys}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {k: f for f, keys in parts.items() for k in keys}}))
    for path in (index, tmp_path):
        ours = registry.load("test_vit", weights=path, device="cpu")
        assert all(torch.equal(v, own[k]) for k, v in ours.net.state_dict().items())
        assert ours.weights == cache.file_hash(*(tmp_path / f for f in parts))
    (tmp_path / "bin").mkdir()
    torch.save(own, tmp_path / "bin" / "pytorch_model.bin")
    assert registry.load("test_vit", weights=tmp_path / "bin").weights == cache.file_hash(*(tmp_path / "bin").iterdir())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "no weight file at" in problem(registry.load, "test_vit", weights=index)
    for text in (
        "{",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": {"a": "../secret"}}',
        '{"weight_map": {"a": 3}}',
    ):
        index.write_text(text)
        assert "is no index of weight files" in problem(registry.load, "test_vit", weights=index)


def test_a_head_of_other_classes_is_left_out(tmp_path: Path) -> None:
    own = copy(drawn("test_vit", num_classes=10))
    save_file(own, tmp_path / "w.safetensors")
    ours = registry.load("test_vit", weights=tmp_path / "w.safetensors", device="cpu")
    assert "head left out: 10 classes in the file, 1000 expected" in ours.notes
    assert all(torch.equal(v, own[k]) for k, v in ours.net.state_dict().items())
    assert "no trained head" in problem(ours.logits, torch.rand(1, 3, 160, 160))
    save_file(copy(drawn("deit_tiny_distilled_patch16_224", depth=12, num_classes=10)), tmp_path / "d.safetensors")
    ours = registry.load("deit_tiny_distilled_patch16_224", weights=tmp_path / "d.safetensors", device="cpu")
    assert ours.net.num_classes == 0


def test_an_error_names_the_prefix_seen(tmp_path: Path) -> None:
    save_file(prefixed("detector.trunk.")(copy(drawn("test_vit"))), tmp_path / "w.safetensors")
    message = problem(registry.load, "test_vit", weights=tmp_path / "w.safetensors")
    assert "tensors are missing" in message
    assert "all its names begin with 'detector.trunk.'" in message
    (tmp_path / "w.npz").write_bytes(b"")
    assert "convert JAX weights" in problem(registry.load, "test_vit", weights=tmp_path / "w.npz")


# --- Hugging Face's names, each model computed by hand from its own tensors

D, HEADS, PATCHES = 96, 3, 3 * 3
FORMS: dict[str, dict[str, Any]] = {
    "vit": {
        "name": "deit_tiny_patch16_224", "prefix": "vit.", "layer": "encoder.layer.0.", "tokens": ["cls_token"],
        "q": "attention.attention.{}.", "qkv": ("query", "key", "value"), "out": "attention.output.dense.",
        "norms": ("layernorm_before.", "layernorm_after."), "mlp": ("intermediate.dense.", "output.dense."),
        "norm": "layernorm.", "head": "classifier.", "patch": "patch_embeddings.projection.",
    },
    "dinov2": {
        "name": "vit_small_patch14_reg4_dinov2", "prefix": "", "layer": "encoder.layer.0.",
        "tokens": ["cls_token", "register_tokens"],
        "q": "attention.attention.{}.", "qkv": ("query", "key", "value"), "out": "attention.output.dense.",
        "norms": ("norm1.", "norm2."), "mlp": ("mlp.fc1.", "mlp.fc2."), "norm": "layernorm.", "scale": True,
        "patch": "patch_embeddings.projection.",
    },
    "clip": {
        "name": "vit_base_patch16_clip_quickgelu_224", "prefix": "vision_model.", "layer": "encoder.layers.0.",
        "tokens": ["class_embedding"], "q": "self_attn.{}.", "qkv": ("q_proj", "k_proj", "v_proj"),
        "out": "self_attn.out_proj.", "norms": ("layer_norm1.", "layer_norm2."), "mlp": ("mlp.fc1.", "mlp.fc2."),
        "norm": "post_layernorm.", "pre": "pre_layrnorm.", "patch": "patch_embedding.", "quick": True,
        "project": "visual_projection.",
    },
}  # fmt: skip


def hugging_face(form: dict[str, Any], patch: int) -> State:
    """Random tensors under the names of a Hugging Face model."""
    draw = lambda *shape: 0.3 * torch.randn(*shape, generator=source)  # noqa: E731
    source = torch.Generator().manual_seed(1)
    linear = lambda name, o, i: {f"{name}weight": draw(o, i), f"{name}bias": draw(o)}  # noqa: E731
    norm = lambda name: {f"{name}weight": 1 + draw(D), f"{name}bias": draw(D)}  # noqa: E731
    clip, layer = "pre" in form, form["layer"]
    state = {"embeddings." + form["patch"] + "weight": draw(D, 3, patch, patch)}
    if not clip:
        state |= {f"embeddings.{form['patch']}bias": draw(D), "embeddings.mask_token": draw(1, D)}
        state |= {f"embeddings.{t}": draw(1, 4 if "register" in t else 1, D) for t in form["tokens"]}
        state |= {"embeddings.position_embeddings": draw(1, PATCHES + 1, D)}
    else:
        state |= {"embeddings.class_embedding": draw(D), "embeddings.position_ids": torch.arange(PATCHES + 1)[None]}
        state |= {"embeddings.position_embedding.weight": draw(PATCHES + 1, D), **norm(form["pre"])}
    for part in form["qkv"]:
        state |= linear(layer + form["q"].format(part), D, D)
    state |= linear(layer + form["out"], D, D) | norm(layer + form["norms"][0]) | norm(layer + form["norms"][1])
    state |= linear(layer + form["mlp"][0], 4 * D, D) | linear(layer + form["mlp"][1], D, 4 * D) | norm(form["norm"])
    if form.get("scale"):
        state |= {f"{layer}layer_scale{i}.lambda1": draw(D) for i in (1, 2)}
    state = {form["prefix"] + k: v for k, v in state.items()}
    if "head" in form:
        state |= linear(form["head"], 1000, D)
    if "project" in form:
        state |= {form["project"] + "weight": draw(512, D), "logit_scale": torch.zeros(()), "text_model.x": draw(3)}
    return state


def by_hand(form: dict[str, Any], state: State, x: Tensor) -> Tensor:
    """Token states behind the final norm, from the tensors of a Hugging Face model: (n, 3, H, W) → (n, tokens, D)."""
    get = lambda name: state[form["prefix"] + name]  # noqa: E731
    apply = lambda name, y: F.linear(y, get(f"{name}weight"), get(f"{name}bias"))  # noqa: E731
    eps = 1e-5 if "pre" in form else 1e-6
    norm = lambda name, y: F.layer_norm(y, (D,), get(f"{name}weight"), get(f"{name}bias"), eps)  # noqa: E731
    weight = get(f"embeddings.{form['patch']}weight")
    bias = None if "pre" in form else get(f"embeddings.{form['patch']}bias")
    y = F.conv2d(x, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    table = get("embeddings.position_embedding" + (".weight" if "pre" in form else "s")).reshape(1, -1, D)
    y = torch.cat([get(f"embeddings.{form['tokens'][0]}").reshape(1, 1, D).expand(len(x), -1, -1), y], 1) + table
    if "register_tokens" in form["tokens"]:
        y = torch.cat([y[:, :1], get("embeddings.register_tokens").expand(len(x), -1, -1), y[:, 1:]], 1)
    if "pre" in form:
        y = norm(form["pre"], y)
    layer = form["layer"]
    one, two = (get(f"{layer}layer_scale{i}.lambda1") if form.get("scale") else 1 for i in (1, 2))
    z = norm(layer + form["norms"][0], y)
    q, k, v = (apply(layer + form["q"].format(p), z).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in form["qkv"])
    attention = (q @ k.transpose(-1, -2) / math.sqrt(D // HEADS)).softmax(-1)
    y = y + one * apply(layer + form["out"], (attention @ v).transpose(1, 2).flatten(2))
    z = apply(layer + form["mlp"][0], norm(layer + form["norms"][1], y))
    z = z * torch.sigmoid(1.702 * z) if form.get("quick") else F.gelu(z)
    return norm(form["norm"], y + two * apply(layer + form["mlp"][1], z))


@torch.no_grad()
@pytest.mark.parametrize("kind", FORMS)
def test_names_of_hugging_face(kind: str, small: Callable[..., None], tmp_path: Path) -> None:
    form = FORMS[kind]
    small(**NARROW)
    patch = timm.create_model(form["name"]).patch_embed.patch_size[0]
    state = hugging_face(form, patch)
    save_file(state, tmp_path / "model.safetensors")
    ours = registry.load(form["name"], weights=tmp_path, device="cpu")
    assert ours.size == (3 * patch, 3 * patch)
    pixels = torch.rand(2, 3, *ours.size)
    wanted = by_hand(form, state, ours.normalise(pixels))
    assert torch.allclose(ours.net.forward_features(ours.prepare(pixels)), wanted, atol=2e-4)
    if "head" in form:
        scores = F.linear(wanted[:, 0], state["classifier.weight"], state["classifier.bias"])
        assert torch.allclose(ours.logits(pixels), scores, atol=1e-3)
    if "project" in form:
        assert torch.allclose(ours.logits(pixels), F.linear(wanted[:, 0], state["visual_projection.weight"]), atol=1e-3)
    assert "key names of Hugging Face mapped to timm's" in ours.notes


def test_names_of_hugging_face_without_a_bias_of_keys(small: Callable[..., None], tmp_path: Path) -> None:
    """BEiT has no bias of keys, and tables of relative positions; DINOv3 has its own names for all."""
    small(**NARROW)
    net = drawn("beit_base_patch16_224", img_size=64)
    own = copy(net)
    q, k, v = own["blocks.0.attn.qkv.weight"].chunk(3)
    at = "beit.encoder.layer.0."
    state = {
        "beit.embeddings.cls_token": own["cls_token"],
        "beit.embeddings.mask_token": torch.zeros(1, 1, D),
        "beit.pooler.layernorm.weight": own["fc_norm.weight"],
        "beit.pooler.layernorm.bias": own["fc_norm.bias"],
        "classifier.weight": own["head.weight"],
        "classifier.bias": own["head.bias"],
        f"{at}attention.attention.query.weight": q,
        f"{at}attention.attention.key.weight": k,
        f"{at}attention.attention.value.weight": v,
        f"{at}attention.attention.query.bias": own["blocks.0.attn.q_bias"],
        f"{at}attention.attention.value.bias": own["blocks.0.attn.v_bias"],
        f"{at}attention.attention.relative_position_bias.relative_position_bias_table": own[
            "blocks.0.attn.relative_position_bias_table"
        ],
        f"{at}attention.attention.relative_position_bias.relative_position_index": torch.zeros(3),
        f"{at}lambda_1": own["blocks.0.gamma_1"],
        f"{at}lambda_2": own["blocks.0.gamma_2"],
    }
    for theirs, name in (
        ("beit.embeddings.patch_embeddings.projection", "patch_embed.proj"),
        (f"{at}attention.output.dense", "blocks.0.attn.proj"),
        (f"{at}intermediate.dense", "blocks.0.mlp.fc1"),
        (f"{at}output.dense", "blocks.0.mlp.fc2"),
        (f"{at}layernorm_before", "blocks.0.norm1"),
        (f"{at}layernorm_after", "blocks.0.norm2"),
    ):
        state |= {f"{theirs}.{part}": own[f"{name}.{part}"] for part in ("weight", "bias")}
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "w.safetensors")
    ours = registry.load("beit_base_patch16_224", weights=tmp_path / "w.safetensors", device="cpu")
    assert ours.size == (64, 64)
    assert all(torch.equal(v, own[k]) for k, v in ours.net.state_dict().items())


def test_names_of_hugging_faces_dinov3(small: Callable[..., None], tmp_path: Path) -> None:
    small(**NARROW)
    own = copy(drawn("vit_small_patch16_dinov3_qkvb"))
    parts = dict(zip("qkv", own["blocks.0.attn.qkv.weight"].chunk(3), strict=True))
    state = {
        "embeddings.cls_token": own["cls_token"],
        "embeddings.register_tokens": own["reg_token"],
        "embeddings.mask_token": torch.zeros(1, 1, D),
        "layer.0.attention.q_proj.bias": own["blocks.0.attn.q_bias"],
        "layer.0.attention.v_proj.bias": own["blocks.0.attn.v_bias"],
        "layer.0.layer_scale1.lambda1": own["blocks.0.gamma_1"],
        "layer.0.layer_scale2.lambda1": own["blocks.0.gamma_2"],
        **{f"layer.0.attention.{c}_proj.weight": v for c, v in parts.items()},
    }
    for theirs, name in (
        ("embeddings.patch_embeddings", "patch_embed.proj"),
        ("layer.0.attention.o_proj", "blocks.0.attn.proj"),
        ("layer.0.mlp.up_proj", "blocks.0.mlp.fc1"),
        ("layer.0.mlp.down_proj", "blocks.0.mlp.fc2"),
        ("layer.0.norm1", "blocks.0.norm1"),
        ("layer.0.norm2", "blocks.0.norm2"),
        ("norm", "norm"),
    ):
        state |= {f"{theirs}.{part}": own[f"{name}.{part}"] for part in ("weight", "bias")}
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "w.safetensors")
    ours = registry.load("vit_small_patch16_dinov3_qkvb", weights=tmp_path / "w.safetensors", device="cpu")
    assert all(torch.equal(v, own[k]) for k, v in ours.net.state_dict().items())


# --- names


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("dinov2_vits14", "vit_small_patch14_dinov2.lvd142m"),
        ("dinov2_vitg14_reg", "vit_giant_patch14_reg4_dinov2.lvd142m"),
        ("facebook/dinov2-small", "vit_small_patch14_dinov2.lvd142m"),
        ("facebook/dinov2-with-registers-base", "vit_base_patch14_reg4_dinov2.lvd142m"),
        ("facebook/dino-vits16", "vit_small_patch16_224.dino"),
        ("dino_vitb8", "vit_base_patch8_224.dino"),
        ("dinov3_vith16plus", "vit_huge_plus_patch16_dinov3"),
        ("facebook/dinov3-vits16-pretrain-lvd1689m", "vit_small_patch16_dinov3"),
        ("facebook/deit-base-distilled-patch16-384", "deit_base_distilled_patch16_384"),
        ("openai/clip-vit-base-patch32", "vit_base_patch32_clip_quickgelu_224.openai"),
        ("openai/clip-vit-large-patch14-336", "vit_large_patch14_clip_quickgelu_336.openai"),
        ("google/vit-base-patch16-224-in21k", "vit_base_patch16_224"),
        ("facebook/vit-mae-huge", "vit_huge_patch14_224.mae"),
        ("microsoft/beit-base-patch16-224-pt22k-ft22k", "beit_base_patch16_224"),
        ("hf-hub:timm/vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_dinov2.lvd142m"),
        ("vit_base_patch16_clip", "vit_base_patch16_clip_224"),
    ],
)
def test_names_of_other_hubs(name: str, theirs: str) -> None:
    assert f"{theirs!r}" in problem(registry.check, name)
    registry.check(theirs)


def test_two_checkpoints_of_one_architecture(tmp_path: Path) -> None:
    for i, folder in enumerate(("a b", "c")):
        (tmp_path / folder).mkdir()
        save_file(copy(drawn("test_vit", seed=i)), tmp_path / folder / "last one.safetensors")
    names = [f"test_vit@{tmp_path / folder / 'last one.safetensors'}" for folder in ("a b", "c")]
    for name in names:
        registry.check(name)
        assert registry.absolute(name) == name
    ours = [registry.load(name, device="cpu") for name in names]
    assert [b.name for b in ours] == [f"test_vit@last_one-{b.weights[:6]}" for b in ours]
    assert ours[0].name != ours[1].name
    assert registry.random(ours[0].name).depth == ours[0].depth
    assert "no weight file" in problem(registry.check, "test_vit@nowhere")
    assert "did you mean" in problem(registry.check, names[0].replace("test_vit@", "test_vitt@"))
    assert "give no others" in problem(registry.load, names[0], weights=tmp_path / "c" / "last one.safetensors")


def test_a_training_folder_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vitregs.probes import transfer
    from vitregs.train.config import Recipe

    recipe = Recipe("own-run", "made by a test", registers=2, image_size=32)
    folder = tmp_path / "runs" / "own-run"
    folder.mkdir(parents=True)
    vit = {**recipe.vit(), "num_classes": 8}
    save_file(timm.models.VisionTransformer(**vit).state_dict(), folder / "weights.safetensors")
    found = cache.file_hash(folder / "weights.safetensors")
    card = {"recipe": recipe.facts(), "vit": vit, "mean": [0.4] * 3, "std": [0.2] * 3, "weights": found}
    (folder / "recipe.json").write_text(json.dumps(card))
    monkeypatch.chdir(tmp_path)
    registry.check("runs/own-run")
    assert registry.absolute("runs/own-run") == str(folder)
    for name in ("runs/own-run", str(folder)):
        ours = registry.load(name, device="cpu")
        assert (ours.name, ours.registers, ours.size, ours.mean) == (f"own-run@{found[:6]}", 2, (32, 32), (0.4,) * 3)
    assert transfer.untrained(ours).registers == 0
    (folder / "weights.safetensors").unlink()
    assert "no weight file at" in problem(registry.load, "runs/own-run")
    (folder / "recipe.json").write_text("[]")
    assert "is not a recipe of the zoo: train it again" in problem(registry.load, "runs/own-run")
