"""Test-time registers against a forward pass written out by hand, image by image; and what they leave behind: nothing."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from vitregs.cache import file_hash
from vitregs.data import images
from vitregs.errors import InputError
from vitregs.measure import lost
from vitregs.models import capture, registry, test_time
from vitregs.models.backbone import Backbone
from vitregs.models.capture import hooks
from vitregs.models.pairs import comparable, register_pairs
from vitregs.probes import transfer

SMALL = {"depth": 3, "embed_dim": 48, "num_heads": 3, "num_classes": 7}
FAMILIES = {  # name: side of the image it is made for
    "vit_tiny_patch16_224": 64,
    "vit_base_patch16_gap_224": 64,  # no CLS, mean over patches
    "vit_base_patch16_clip_224": 64,  # a norm before the blocks
    "deit3_small_patch16_224": 64,  # LayerScale, CLS without position
    "deit_tiny_distilled_patch16_224": 64,
    "vit_giant_patch14_dinov2": 56,  # gated MLP in one projection
    "eva02_tiny_patch14_224": 56,  # rotary positions, gated MLP with a norm
    "vit_small_patch16_rope_224": 64,  # rotary positions alone
    "vit_small_patch16_rope_mixed_224": 64,  # rotary positions of each block
}
GATED = ("vit_giant_patch14_dinov2", "eva02_tiny_patch14_224")
MOVED = {1: [0, 5], 3: [2, 7, 40]}


def make(name: str, **options: Any) -> Backbone:
    """A small net in double precision, with weights large enough that tokens differ and attention is not flat."""
    bare = registry.random(name, img_size=FAMILIES.get(name, 64), **{**SMALL, **options})
    draw = torch.Generator().manual_seed(0)
    bare.net.double()
    for key, value in bare.net.named_parameters():
        if "norm" not in key:
            value.copy_(torch.randn(value.shape, generator=draw) * (1.5 / max(1, value[0].numel()) ** 0.5))
    net = bare.net
    return Backbone(name, net, bare.mean, bare.std, bare.size, bare.preparation, "random", "none", bare.facts)


def pixels(bare: Backbone, rows: int = 4, columns: int = 4, count: int = 2) -> Tensor:
    p = bare.patch_size[0]
    return torch.rand(count, 3, rows * p, columns * p, generator=torch.Generator().manual_seed(1))


def features(backbone: Backbone, x: Tensor) -> Tensor:
    """States behind the last block: (n, tokens, channels)."""
    kept: list[Tensor] = []
    with capture.tap(backbone.net, {backbone.depth: kept.append}), torch.no_grad():
        backbone.net.forward_features(backbone.prepare(x).double())  # type: ignore[operator]
    return kept[0]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Backbone:
    return make(request.param)


# --- the slow version: one image, plain products
def start(net: Any, image: Tensor) -> tuple[Tensor, Any]:
    """What enters block 1, without any token appended: image (3, H, W) → (tokens, channels), rotations of each block."""
    p = net.patch_embed.patch_size[0]
    weight, bias = net.patch_embed.proj.weight.flatten(1), net.patch_embed.proj.bias
    cut = image.unfold(1, p, p).unfold(2, p, p).permute(1, 2, 0, 3, 4).flatten(2).flatten(0, 1)
    x = cut @ weight.T + (0 if bias is None else bias)
    lead = [getattr(net, n) for n in ("cls_token", "dist_token") if getattr(net, n, None) is not None]
    table = None if net.pos_embed is None else net.pos_embed[0]
    if table is not None and len(table) == len(x):
        x, table = x + table, None
    x = torch.cat([*(token[0] for token in lead), x])
    if table is not None:
        x = x + table
    rope: Any = [None] * len(net.blocks)
    if getattr(net, "rope", None) is not None:
        found = net.rope.get_embed(shape=net.patch_embed.grid_size)
        rope = list(found) if net.rope_mixed else [found] * len(net.blocks)
    return net.norm_pre(x[None])[0], rope


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn pairs of neighbouring channels: one head's patches (patches, d), angles (patches, 2d)."""
    sine, cosine = rope.chunk(2, -1)
    turned = x * cosine
    turned[:, 0::2] -= x[:, 1::2] * sine[:, 0::2]
    turned[:, 1::2] += x[:, 0::2] * sine[:, 1::2]
    return turned


def attend(attn: Any, x: Tensor, rope: Tensor | None, prefix: int, extra: Tensor) -> Tensor:
    """Attention of one image, head by head: (tokens, channels), tokens without rotation, what is added to their logits."""
    if getattr(attn, "q_proj", None) is not None:
        q, k, v = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    else:
        bias = attn.qkv.bias
        if getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
        q, k, v = (x @ attn.qkv.weight.T + (0 if bias is None else bias)).chunk(3, -1)
    d = q.shape[-1] // attn.num_heads
    heads = []
    for h in range(attn.num_heads):
        a, b, c = (t[:, h * d : (h + 1) * d] for t in (q, k, v))
        if rope is not None:
            mine = rope[h] if rope.ndim == 3 else rope
            a, b = (torch.cat([t[:prefix], rotate(t[prefix:], mine)]) for t in (a, b))
        logits = a @ b.T / math.sqrt(d) + extra
        weight = logits.exp() / logits.exp().sum(1, keepdim=True)
        heads.append(weight @ c)
    return attn.proj(attn.norm(torch.cat(heads, 1)))


def neurons(mlp: Any, x: Tensor) -> Tensor:
    """Activations that enter the output projection of an MLP."""
    if hasattr(mlp, "fc1_g"):
        y = torch.nn.functional.silu(mlp.fc1_g(x)) * mlp.fc1_x(x)
    elif hasattr(mlp, "gate_last"):
        first, second = mlp.fc1(x).chunk(2, -1)
        y = first * mlp.act(second) if mlp.gate_last else mlp.act(first) * second
    else:
        y = mlp.act(mlp.fc1(x))
    return mlp.norm(y)


@torch.no_grad()
def slow(bare: Backbone, x: Tensor, count: int, moved: dict[int, list[int]], log: float = 0.0) -> Tensor:
    """States behind the last block with tokens appended and neurons moved: → (n, tokens, channels)."""
    net: Any = bare.net
    made = []
    for image in bare.prepare(x).double():
        state, ropes = start(net, image)
        at, end = bare.prefix, bare.prefix + count
        state = torch.cat([state[:at], torch.zeros(count, bare.width).double(), state[at:]])
        extra = torch.zeros(len(state)).double()
        extra[at:end] = log
        for number, (block, rope) in enumerate(zip(net.blocks, ropes, strict=True), start=1):
            scale = [getattr(block, f"gamma_{i}", None) for i in (1, 2)]
            if hasattr(block, "ls1"):
                scale = [getattr(ls, "gamma", None) for ls in (block.ls1, block.ls2)]
            one, two = (1 if s is None else s for s in scale)
            state = state + one * attend(block.attn, block.norm1(state), rope, end, extra)
            active = neurons(block.mlp, block.norm2(state))
            for j in moved.get(number, []):
                signed = hasattr(block.mlp, "fc1_g") or hasattr(block.mlp, "gate_last")
                fired = [float(active[t, j]) for t in range(end, len(active))]
                largest = max(fired, key=abs) if signed else max(fired)
                for t in range(at, len(active)):
                    active[t, j] = largest if t < end else 0.0
            state = state + two * (active @ block.mlp.fc2.weight.T + block.mlp.fc2.bias)
        made.append(state)
    return torch.stack(made)


@pytest.mark.parametrize(("count", "moved"), [(1, {}), (3, {}), (1, MOVED), (2, MOVED)])
def test_it_equals_the_slow_version(family: Backbone, count: int, moved: dict[int, list[int]]) -> None:
    x = pixels(family)
    assert torch.allclose(features(family, x), slow(family, x, 0, {}), atol=1e-9)  # the slow version is the network
    made = test_time.append(family, count, neurons=moved)
    expected = slow(family, x, count, moved)
    assert torch.allclose(features(made, x), expected, atol=1e-9)
    assert (expected[:, family.prefix + count :] - features(family, x)[:, family.prefix :]).abs().max() > 1e-3


def test_many_zero_tokens_equal_one_of_their_weight(family: Backbone) -> None:
    x = pixels(family)
    for count in (2, 8):
        many, one = (test_time.append(family, **how) for how in ({"count": count}, {"weight": float(count)}))
        first, second = features(many, x), features(one, x)
        patch = family.prefix + 1
        assert torch.allclose(first[:, patch + count - 1 :], second[:, patch:], atol=1e-5)
        assert torch.allclose(many.net(many.prepare(x).double()), one.net(one.prepare(x).double()), atol=1e-5)
        assert torch.allclose(first[:, family.prefix], first[:, patch + count - 2], atol=1e-9)  # they stay the same
    half = test_time.append(family, weight=2.5)
    assert torch.allclose(features(half, x), slow(family, x, 1, {}, math.log(2.5)), atol=1e-9)


@pytest.mark.parametrize("name", ["vit_base_patch16_xp_224", "vit_small_patch16_18x2_224"])
def test_a_weight_reaches_every_kind_of_attention(name: str) -> None:
    bare = make(name)
    x = pixels(bare)
    many, one = test_time.append(bare, 4), test_time.append(bare, weight=4.0)
    assert torch.allclose(features(many, x)[:, bare.prefix + 4 :], features(one, x)[:, bare.prefix + 1 :], atol=1e-5)


def test_the_appended_tokens_start_where_they_are_told() -> None:
    bare = make("vit_base_patch16_clip_224")
    x = pixels(bare)
    first = torch.arange(2.0)[:, None].expand(2, bare.width)
    seen = capture.capture(test_time.append(bare, 2, start=first), x, tokens=[0], kinds="register")
    np.testing.assert_allclose(seen.tokens.values[:, 0], np.broadcast_to(first, (2, 2, bare.width)))
    same = test_time.append(bare, 2, start=torch.zeros(bare.width))
    assert torch.equal(features(same, x), features(test_time.append(bare, 2), x))
    assert same.weights != test_time.append(bare, 2, start=first).weights


# --- what is moved
def test_moved_neurons_are_zero_on_patches_and_the_largest_on_the_token(family: Backbone) -> None:
    family.net.float()
    x = pixels(family)
    made = test_time.append(family, 2, neurons={1: [3, 3, 9]})  # named twice, moved once
    before = capture.capture(test_time.append(family, 2), x, neurons={1: [3, 9, 10]}).neurons
    after = capture.capture(made, x, neurons={1: [3, 9, 10]}).neurons
    moved, patch = ["1:3", "1:9"], before.sel(token="patch")
    assert not after.sel(token="patch", neuron=moved).values.any()
    largest = patch.sel(neuron=moved).max("token").values
    if family.name in GATED:
        least = patch.sel(neuron=moved).min("token").values
        largest = np.where(-least > largest, least, largest)
    np.testing.assert_allclose(
        after.sel(token="register", neuron=moved).values, np.stack([largest] * 2, 1), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(after.sel(neuron="1:10"), before.sel(neuron="1:10"), rtol=1e-5, atol=1e-6)
    if family.has_cls:
        np.testing.assert_allclose(after.sel(token="cls"), before.sel(token="cls"), rtol=1e-5, atol=1e-6)


def test_suppressed_neurons_are_zero_on_all_tokens(family: Backbone) -> None:
    x = pixels(family)
    made = test_time.suppress(family, MOVED)
    expected = copy.deepcopy(family.net)
    for block, numbers in MOVED.items():
        expected.blocks[block - 1].mlp.fc2.weight[:, numbers] = 0  # type: ignore[index,union-attr,operator]
    other = Backbone("", expected, family.mean, family.std, family.size, family.preparation, "", "", family.facts)
    assert torch.allclose(features(made, x), features(other, x), atol=1e-9)
    assert not capture.capture(made, x, neurons=MOVED).neurons.values.any()
    assert made.registers == 0
    assert made.prefix == family.prefix


def test_relative_positions_can_be_suppressed_but_not_extended() -> None:
    bare = make("beit_base_patch16_224")
    made = test_time.suppress(bare, {2: [1]})
    assert torch.isfinite(features(made, pixels(bare, 5, 3))).all()
    assert "keeps a table of relative positions" in problem(test_time.append, bare)


def test_random_neurons_are_as_many_and_others() -> None:
    bare = make("vit_tiny_patch16_224")
    found = test_time.random_neurons(bare, MOVED)
    assert {b: len(n) for b, n in found.items()} == {b: len(n) for b, n in MOVED.items()}
    assert not any(set(found[b]) & set(MOVED[b]) for b in MOVED)
    assert found == test_time.random_neurons(bare, MOVED)
    assert found != test_time.random_neurons(bare, MOVED, seed=1)
    width = test_time.projection(bare, 1).in_features
    assert "too few other neurons" in problem(test_time.random_neurons, bare, {1: list(range(width // 2 + 1))})


# --- what is left behind, and what fits in
def test_nothing_is_left_on_the_wrapped_network(family: Backbone) -> None:
    """Nor on a sister, whichever of them is shown other sizes."""
    small, large = pixels(family), pixels(family, 5, 6)
    before = {n: v.clone() for n, v in family.net.state_dict().items()}
    outputs = [features(family, x) for x in (small, large, small)]
    prefix = family.net.num_prefix_tokens
    made = [test_time.append(family, 2, neurons=MOVED), test_time.append(family, weight=3.0)]
    made.append(test_time.suppress(family, MOVED))
    first = [features(m, small) for m in made]
    wide = [features(m, large) for m in made]  # the others have moved to another size, the network has not
    assert torch.equal(features(family, small), outputs[0])
    assert torch.equal(features(family, large), outputs[1])
    assert all(torch.equal(features(m, small), f) for m, f in zip(made, first, strict=True))
    assert torch.equal(features(family, large), outputs[1])
    assert all(torch.equal(features(m, large), w) for m, w in zip(made, wide, strict=True))
    assert torch.equal(features(family, small), outputs[2])
    assert hooks(family.net) == 0
    assert family.net.num_prefix_tokens == prefix
    assert {type(m).__name__ for m in family.net.modules()} == {
        type(m).__name__ for m in copy.deepcopy(family.net).modules()
    }
    after = family.net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert made[0].net.patch_embed.proj.weight is family.net.patch_embed.proj.weight  # weights are not copied


def test_positions_at_other_sizes_are_the_plain_networks(family: Backbone) -> None:
    made = test_time.append(family, 2)
    for rows, columns in ((5, 6), (3, 4), (4, 4)):
        x = pixels(family, rows, columns)
        expected = slow(family, x, 2, {})
        assert torch.allclose(features(made, x), expected, atol=1e-9)
        tables = [b.net.pos_embed for b in (family, made)]
        assert tables[0] is None or torch.equal(*tables)
    assert made.notes == family.notes
    again = test_time.append(family, 2)  # of a network that stands at another size
    assert torch.allclose(features(again, pixels(family)), slow(family, pixels(family), 2, {}), atol=1e-9)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_a_network_that_resizes_its_positions_itself(name: str) -> None:
    bare = make(name, dynamic_img_size=True)
    x = pixels(bare)
    made = test_time.append(bare, 2, neurons=MOVED)
    assert torch.allclose(features(made, x), slow(bare, x, 2, MOVED), atol=1e-9)
    net: Any = made.net
    wide = bare.normalise(pixels(bare, 5, 3)).double()  # the size that it was not set to
    with torch.no_grad():
        assert net.forward_features(wide).shape[1] == bare.prefix + 2 + 15


def test_the_appended_tokens_are_registers_by_kind(family: Backbone) -> None:
    made = test_time.append(family, 3)
    kinds = family.kinds((1, 2))
    assert made.kinds((1, 2)) == [*kinds[: family.prefix], *["register"] * 3, "patch", "patch"]
    assert (made.registers, made.prefix) == (3, family.prefix + 3)
    assert (made.depth, made.width, made.size, made.has_cls) == (
        family.depth,
        family.width,
        family.size,
        family.has_cls,
    )
    assert made.name == f"{family.name}+zero3"


@pytest.mark.parametrize("pool", ["token", "avg", "avgmax"])
def test_pooling_leaves_the_appended_tokens_out(pool: str) -> None:
    bare = make("vit_tiny_patch16_224") if pool == "token" else make("vit_base_patch16_gap_224", global_pool=pool)
    made = test_time.append(bare, 2)
    x = pixels(bare)
    state = made.net.norm(features(made, x))
    own = torch.cat([state[:, : bare.prefix], state[:, bare.prefix + 2 :]], 1)
    expected = bare.net.forward_head(own)
    assert torch.allclose(made.net(made.prepare(x).double()), expected, atol=1e-9)
    made.net.float()  # shared: both
    assert made.logits(x).shape == (2, 7)


def test_attention_pooling_leaves_the_appended_tokens_out() -> None:
    bare = make("vit_pe_core_tiny_patch16_384")  # it pools CLS too
    made = test_time.append(bare, 2)
    x = pixels(bare)
    state = made.net.norm(features(made, x))
    own = torch.cat([state[:, : bare.prefix], state[:, bare.prefix + 2 :]], 1)
    assert torch.allclose(made.net(made.prepare(x).double()), bare.net.forward_head(own), atol=1e-9)


def test_changes_stand_on_one_another() -> None:
    bare = make("vit_tiny_patch16_224")
    x = pixels(bare)
    both = test_time.append(test_time.suppress(bare, {2: [4]}), 1, neurons=MOVED)
    expected = copy.deepcopy(bare.net)
    expected.blocks[1].mlp.fc2.weight[:, 4] = 0  # type: ignore[index,union-attr,operator]
    other = Backbone("", expected, bare.mean, bare.std, bare.size, bare.preparation, "", "", bare.facts)
    assert torch.allclose(features(both, x), slow(other, x, 1, MOVED), atol=1e-9)
    assert both.name == "vit_tiny_patch16_224+suppressed+tt1"


def test_keys_tell_changes_apart() -> None:
    bare = make("vit_tiny_patch16_224")
    made = [
        bare,
        test_time.append(bare),
        test_time.append(bare, 2),
        test_time.append(bare, weight=2.0),
        test_time.append(bare, neurons=MOVED),
        test_time.append(bare, neurons={1: [0]}),
        test_time.append(bare, neurons=MOVED, name="+zero1"),
        test_time.suppress(bare, MOVED),
        test_time.suppress(bare, {1: [0]}),
    ]
    assert len({m.weights for m in made}) == len(made)
    assert (
        test_time.append(bare, neurons=MOVED).weights
        == test_time.append(bare, neurons={3: [40, 7, 2], 1: [5, 0]}).weights
    )


# --- what runs on it
@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_half_precision(weight: float) -> None:
    bare = make("vit_tiny_patch16_224")
    bare.net.float()
    made = test_time.append(bare, weight=weight, neurons=MOVED)
    x = pixels(bare)
    full, half = (
        capture.capture(made, x, norms=[3], attention=["cls"], precision=p).norms for p in ("float32", "bfloat16")
    )
    np.testing.assert_allclose(half, full, rtol=0.1)
    made.net.bfloat16()
    assert torch.isfinite(made.net(made.prepare(x).bfloat16())).all()


def test_everything_else_takes_it_like_any_other_network() -> None:
    made = registry.load("supervised-pico+zero2", device="cpu")
    source = images.open_images("scenes", size=made.size, count=12)
    seen = capture.capture(made, source, norms=True, attention=["cls", "register"], received=True, qkv=["key"])
    assert seen.norms.sel(token="register").shape[-1] == 2
    assert not seen.norms.sel(layer=0, token="register").values.any()
    np.testing.assert_allclose(seen.attention.sum("token"), 1, rtol=1e-5)
    assert list(seen["query_kind"].values) == ["cls", "register", "register"]
    assert lost.evaluate(made, source, biases=[-0.5, -0.3], shown=1)["hit"].sizes["image"] == 12
    found = transfer.measure(made, source, floor=True, steps=2, bins=4, head="softmax")
    assert int(found["registers"]) == 2
    assert np.isfinite(found["floor"]).any()


def test_an_untrained_twin_has_no_test_time_registers() -> None:
    bare = make("vit_tiny_patch16_224")
    assert transfer.untrained(test_time.append(bare)).registers == 0
    assert registry.random("vit_tiny_patch16_224+zero2", img_size=32).registers == 0


def test_words_stay() -> None:
    assert registry.words("clip-pico+zero4") is not None
    assert registry.words("supervised-pico+zero4") is None


# --- names
@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A list of three neurons of supervised-pico."""
    bare = registry.load("supervised-pico", device="cpu")
    neurons = {4: [12, 7], 5: [0]}
    path = tmp_path / "list.json"
    test_time.NeuronList(bare.name, neurons, test_time.lengths(bare, neurons), {"layer": 8}).write(path)
    return path


def problem(call: Any, *args: object, **kw: object) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **kw)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_list_comes_back_as_it_was_written(planted: Path) -> None:
    found = test_time.read_list(planted)
    assert found.network == "supervised-pico"
    assert found.neurons == {4: [12, 7], 5: [0]}
    assert found.found == {"layer": 8}
    bare = registry.load("supervised-pico", device="cpu")
    for block, numbers in found.neurons.items():
        weight = bare.net.blocks[block - 1].mlp.fc2.weight  # type: ignore[index,union-attr]
        np.testing.assert_allclose(found.lengths[block], [float(weight[:, j].norm()) for j in numbers], rtol=1e-4)
    test_time.check_list(bare, found, planted)


@pytest.mark.parametrize("ending", ["+tt1", "+tt3", "+random1", "+suppressed"])
def test_names_with_a_list(planted: Path, ending: str) -> None:
    name = f"supervised-pico{ending}:{planted}"
    registry.check(name)
    made, bare = registry.load(name, device="cpu"), registry.load("supervised-pico", device="cpu")
    assert made.name == f"supervised-pico{ending}"
    x = torch.rand(2, 3, *bare.size)
    neurons = {4: [7, 12], 5: [0]}
    how = {"+suppressed": lambda: test_time.suppress(bare, neurons)}
    count = int(ending[-1]) if ending[-1].isdigit() else 0
    moved = test_time.random_neurons(bare, neurons) if "random" in ending else neurons
    expected = how.get(ending, lambda: test_time.append(bare, count, neurons=moved))()
    assert torch.equal(made.logits(x), expected.logits(x))
    assert made.registers == count
    assert registry.absolute(name) == name


def test_names_without_a_list() -> None:
    x = None
    for name, count in (("+zero1", 1), ("+zero8", 8), ("+zero2.5", 1), ("+zero0.5", 1)):
        registry.check(f"supervised-pico{name}")
        made = registry.load(f"supervised-pico{name}", device="cpu")
        assert (made.name, made.registers) == (f"supervised-pico{name}", count)
        x = torch.rand(1, 3, *made.size) if x is None else x
        made.logits(x)
    assert test_time.split("a+b") == ("a+b", "")
    assert test_time.split("a@/x/y.pth+tt1:/z/b.json") == ("a@/x/y.pth", "+tt1:/z/b.json")
    assert [test_time.appended(e) for e in ("+zero8", "+tt2:f", "+zero2.5", "+suppressed", "")] == [8, 2, 1, 0, 0]


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("+tt0", "+tt0 must append a whole number of tokens, 1 or more"),
        ("+tt1.5", "+tt1.5 must append a whole number of tokens, 1 or more"),
        ("+zero0", "+zero0 appends nothing: name supervised-pico itself"),
        ("+zero0.0", "appends nothing"),
        ("+zero8:list.json", "+zero8:list.json moves no neurons: leave out the list"),
        ("+tt1", "no register neurons of supervised-pico are stored"),
        ("+random1", "vitregs neurons supervised-pico --out FILE and name supervised-pico+random1:FILE"),
        ("+suppressed", "no register neurons of supervised-pico are stored"),
        ("+tt1:/no/such.json", "cannot read the neuron list /no/such.json: there is no such file"),
        ("+suppressed:/no/such.json", "cannot read the neuron list /no/such.json"),
        ("+tt", "unknown model 'supervised-pico+tt'"),
        ("+zero-1", "unknown model 'supervised-pico+zero-1'"),
    ],
)
def test_endings_that_say_nothing(ending: str, message: str) -> None:
    for call in (registry.check, registry.load):
        assert message in problem(call, f"supervised-pico{ending}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no list of register neurons: make one with vitregs neurons"),
        ("[1, 2]", "is no list of register neurons: make one"),
        ("\xff", "is no list of register neurons: make one"),
        ('{"network": "a"}', "is no list of register neurons: make one"),
        (
            '{"network": "a", "neurons": {"x": [1]}, "lengths": {"x": [1]}, "found": {}}',
            "is no list of register neurons",
        ),
        ('{"network": "a", "neurons": {"1": [1]}, "lengths": {"1": []}, "found": {}}', "differ in number"),
        ('{"network": "a", "neurons": {"1": []}, "lengths": {"1": []}, "found": {}}', "names no neurons"),
        ('{"network": "a", "neurons": {}, "lengths": {}, "found": {}}', "names no neurons"),
    ],
)
def test_broken_lists(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "list.json"
    path.write_text(text, encoding="latin-1")
    assert message in problem(registry.load, f"supervised-pico+tt1:{path}")


@pytest.mark.parametrize(
    "change",
    [
        {"lengths": {"4": [9.0, 9.0], "5": [9.0]}},
        {"lengths": {"4": [float("nan")] * 2, "5": [1.0]}},
        {"neurons": {"4": [12, 100000], "5": [0]}},
        {"neurons": {"4": [12, -1], "5": [0]}},
        {"neurons": {"4": [12, 7], "0": [0]}, "lengths": {"4": [1, 1], "0": [1]}},
        {"neurons": {"4": [12, 7], "99": [0]}, "lengths": {"4": [1, 1], "99": [1]}},
    ],
)
def test_lists_of_other_weights(planted: Path, change: dict[str, Any]) -> None:
    planted.write_text(json.dumps(json.loads(planted.read_text()) | change))
    message = problem(registry.load, f"supervised-pico+tt1:{planted}")
    assert "belongs to other weights than these of supervised-pico: find this network's with vitregs neurons" in message


def test_a_list_of_another_network(planted: Path) -> None:
    assert "belongs to other weights" in problem(registry.load, f"clip-pico+tt1:{planted}")


def test_a_folder_that_was_trained_is_named_by_its_last_word(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.json").write_text("{}")
    assert "no register neurons of mine are stored" in problem(test_time.list_of, str(tmp_path / "mine"), "+tt1")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"count": 0}, "1 or more tokens are appended, not 0"),
        ({"count": 1.0}, "1 or more tokens are appended, not 1.0"),
        ({"weight": 0.0}, "the weight of a token is a positive number"),
        ({"weight": math.inf}, "the weight of a token is a positive number"),
        ({"weight": math.nan}, "the weight of a token is a positive number"),
        ({"count": 2, "weight": 2.0}, "append one token, or give none"),
        ({"neurons": {0: [1]}}, "block 0 does not exist: vit_tiny_patch16_224 has blocks 1 to 3"),
        ({"neurons": {4: [1]}}, "block 4 does not exist"),
        ({"neurons": {1: [192]}}, "neuron 192 does not exist: block 1 of vit_tiny_patch16_224 has neurons 0 to 191"),
        ({"neurons": {1: [-1]}}, "neuron -1 does not exist"),
        ({"count": 3, "start": torch.zeros(2, 48)}, "start holds one token or 3, not 2"),
    ],
)
def test_what_cannot_be_appended(how: dict[str, Any], message: str) -> None:
    assert message in problem(test_time.append, make("vit_tiny_patch16_224"), **how)


def test_networks_that_take_no_test_time_registers() -> None:
    registers = registry.load("supervised-pico-reg4", device="cpu")
    assert "supervised-pico-reg4 has 4 registers" in problem(test_time.append, registers)
    assert "has 4 registers" in problem(registry.load, "supervised-pico-reg4+zero1")
    once = registry.load("supervised-pico+zero1")
    assert "has 1 register:" in problem(test_time.append, once)
    assert "has no MLP of known form" in problem(test_time.append, make("vit_base_patch16_xp_224"), neurons={1: [0]})
    assert "has no MLP of known form" in problem(test_time.suppress, make("vit_small_patch16_18x2_224"), {1: [0]})
    relative = registry.random("vit_relpos_small_patch16_224", img_size=64, **SMALL)
    assert "relative positions" in problem(test_time.append, relative)


def test_a_network_and_itself_with_a_token_are_a_pair() -> None:
    names = ["deit_tiny_patch16_224", "deit_tiny_patch16_224+tt1", "deit_tiny_patch16_224+suppressed", "a@b", "a@b+tt1"]
    assert register_pairs(names) == [(names[0], names[1]), (names[3], names[4])]
    zoo = ["clip-pico", "clip-pico-reg4", "clip-pico+zero8", "mae-pico+zero1"]
    assert register_pairs(zoo) == [("clip-pico", "clip-pico-reg4"), ("clip-pico", "clip-pico+zero8")]
    assert comparable("clip-pico", ["clip-pico+zero8", "mae-pico+zero8"]) == ["clip-pico+zero8"]


def test_a_module_in_memory() -> None:
    """A wrapped module can be changed too, and the module stays as it is."""
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
    bare = registry.wrap(net)
    x = torch.rand(1, 3, 32, 32)
    before = bare.logits(x)
    made = test_time.append(bare, 2, neurons={1: [0]})
    assert not torch.equal(made.logits(x), before)
    assert torch.equal(net(bare.normalise(x)), before)
    assert hooks(net) == 0


def test_the_real_network(shared_data: Path) -> None:
    """Zero tokens take the outliers of DeiT-Tiny, by number."""
    weights = shared_data / "deit-tiny" / "deit_tiny_patch16_224.safetensors"
    shares = []
    for ending in ("", "+zero1", "+zero8"):
        vit = registry.load(f"deit_tiny_patch16_224{ending}", weights=weights, device="cpu")
        assert vit.weights.startswith(file_hash(weights))
        coco = images.open_images(str(shared_data / "coco-256"), split="train", size=vit.size, count=16)
        norms = capture.norms(vit, coco, layers=[12]).isel(layer=0)
        patch = norms[:, norms["kind"].values == "patch"]
        shares.append(float((patch > 1.6 * patch.median("token")).mean()))
    assert 0.025 < shares[0] < 0.055
    assert shares[2] < 0.2 * shares[0] < shares[1] < 0.85 * shares[0]


@pytest.mark.parametrize("name", GATED[:1])
def test_the_sign_of_a_gated_neuron_does_not_matter(name: str) -> None:
    """The same function, written with a neuron's product and its output weights reversed."""
    bare, other = make(name), make(name)
    x = pixels(bare)
    mlp = other.net.blocks[0].mlp  # type: ignore[index,union-attr]
    for part in (mlp.fc1.weight, mlp.fc1.bias):
        half = len(part) // 2
        part[half:] *= -1  # what the gate multiplies
    mlp.fc2.weight *= -1
    assert torch.allclose(features(bare, x), features(other, x), atol=1e-9)
    cured, same = (test_time.append(b, neurons={1: list(range(40))}) for b in (bare, other))
    assert torch.allclose(features(cured, x), features(same, x), atol=1e-9)


def test_a_list_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "list.json").write_text("{}")
    assert test_time.list_of("supervised-pico", "+tt1:~/list.json") == tmp_path / "list.json"


def test_more_tokens_than_memory_holds_are_refused() -> None:
    bare = registry.load("supervised-pico", device="cpu")
    assert "append 4096 at most" in problem(test_time.append, bare, 1_000_000)
    assert test_time.append(bare, weight=1_000_000.0).registers == 1
