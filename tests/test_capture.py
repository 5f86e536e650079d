"""Capture against timm's own intermediates and against attention written out, over every family of ViT."""

import weakref
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vitregs import arrays
from vitregs.data import images
from vitregs.data.preparation import Preparation
from vitregs.errors import InputError
from vitregs.models import capture, registry
from vitregs.models.backbone import Backbone
from vitregs.models.capture import hooks
from vitregs.train.config import Recipe

SMALL = {"depth": 3, "embed_dim": 96, "num_heads": 3}
FAMILIES = {  # name: options that make it small
    "vit_small_patch16_224.dino": SMALL,
    "vit_small_patch14_dinov2": SMALL,
    "vit_small_patch14_reg4_dinov2": SMALL,
    "deit3_small_patch16_224": SMALL,
    "deit_tiny_distilled_patch16_224": SMALL,
    "vit_base_patch16_clip_224": SMALL,
    "vit_base_patch16_siglip_224": SMALL,
    "eva02_tiny_patch14_224": SMALL,
    "beit_base_patch16_224": SMALL,
    "vit_medium_patch16_reg4_gap_256": SMALL,
    "vit_relpos_small_patch16_224": SMALL,
    "vit_small_patch16_dinov3": SMALL,
    "test_vit3": {},
    "pico-registers": {},
}


def make(name: str, *, seed: int = 0, **options: object) -> Backbone:
    """A small net with weights large enough that tokens differ and attention is not flat."""
    if name == "pico-registers":
        torch.manual_seed(seed)
        net = timm.models.VisionTransformer(**Recipe(name, "", registers=4, layer_scale=1e-4).vit(), num_classes=0)
        bare = Backbone(name, net, (0.4,) * 3, (0.2,) * 3, (96, 96), Preparation(), "", "")
    else:
        bare = registry.random(name, seed=seed, **{**FAMILIES.get(name, {}), **options})
    generator = torch.Generator().manual_seed(seed)
    for key, value in bare.net.named_parameters():
        if "norm" not in key and key.endswith(("weight", "bias", "gamma", "gamma_1", "gamma_2", "table", "token")):
            value.copy_(torch.randn(value.shape, generator=generator) * (1.5 / value[0].numel() ** 0.5))
    again = Backbone(name, bare.net, bare.mean, bare.std, bare.size, bare.preparation, bare.source, bare.weights)
    return again


def pixels(bare: Backbone, rows: int = 4, columns: int = 6, count: int = 3, seed: int = 0) -> Tensor:
    p = bare.patch_size[0]
    return torch.rand(count, 3, rows * p, columns * p, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Backbone:
    return make(request.param)


@torch.no_grad()
def states(bare: Backbone, x: Tensor) -> Tensor:
    """Token states after every block by timm's own method: → (layers, n, tokens, channels), prefix first."""
    bare.fit((x.shape[-2], x.shape[-1]))
    prefix = {"return_prefix_tokens": True} if bare.prefix else {}
    found = bare.net.forward_intermediates(
        bare.normalise(x), norm=False, output_fmt="NLC", intermediates_only=True, **prefix
    )
    if not bare.prefix:
        return torch.stack(found)
    return torch.stack([torch.cat([lead, patches], 1) for patches, lead in found])


# timm resizes the tables of BEiT by a way that torch no longer likes
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:timm.layers", "ignore:Using a non-tuple sequence")


class Slow(TorchFunctionMode):
    """Refuse fused attention."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        raise AssertionError("fused attention was to be off")


@torch.no_grad()
def unfused(bare: Backbone, x: Tensor) -> dict[int, Tensor]:
    """Attention maps at all layers by timm's own unfused branch: what enters `attn_drop`."""
    maps: dict[int, Tensor] = {}
    places = []
    for n, block in enumerate(bare.net.blocks, 1):
        assert block.attn.fused_attn
        block.attn.fused_attn = False
        places.append(block.attn.attn_drop.register_forward_pre_hook(lambda _m, a, n=n: maps.__setitem__(n, a[0])))
    try:
        with Slow():
            bare.net.forward_features(bare.prepare(x))
    finally:
        for block, place in zip(bare.net.blocks, places, strict=True):
            block.attn.fused_attn = True
            place.remove()
    assert len(maps) == bare.depth
    return maps


def close(ours: np.ndarray, theirs: Tensor, tolerance: float = 1e-5) -> None:
    theirs = theirs.numpy()
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * max(1.0, np.abs(theirs).max())


# --- equal to timm


def test_tokens_and_norms_are_timms(family: Backbone) -> None:
    x = pixels(family)
    expected = states(family, x)
    norms = capture.norms(family, x, batch=2)
    assert norms.dims == ("image", "layer", "token")
    assert norms["layer"].values.tolist() == list(range(family.depth + 1))
    close(norms.sel(layer=slice(1, None)).values, torch.linalg.vector_norm(expected, dim=-1).transpose(0, 1))
    for layer in range(1, family.depth + 1):
        got = capture.tokens(family, x, layer=layer, kinds=arrays.KINDS, batch=2)
        close(got.values, expected[layer - 1])
        assert int(got["layer"]) == layer
    assert np.std(norms.isel(layer=-1).values) > 1e-3  # the comparison means something
    assert hooks(family.net) == 0


@torch.no_grad()
def test_layer_0_enters_block_1(family: Backbone) -> None:
    x = pixels(family, 3, 5)
    seen: list[Tensor] = []
    forward = family.net.blocks[0].forward
    family.net.blocks[0].forward = lambda y, *a, **k: seen.append(y) or forward(y, *a, **k)
    family.net.forward_features(family.prepare(x))
    del family.net.blocks[0].forward
    got = capture.tokens(family, x, layer=0, kinds=arrays.KINDS)
    close(got.values, seen[0])
    close(capture.norms(family, x, layers=[0]).values[:, 0], seen[0].norm(dim=-1))


def test_attention_is_timms_unfused(family: Backbone) -> None:
    x = pixels(family, 4, 6)
    expected = unfused(family, x)
    layers = list(range(1, family.depth + 1))
    kinds = [k for k in arrays.KINDS if k in family.kinds((4, 6))]
    got = capture.attention(family, x, layers=layers, queries=kinds, batch=2)
    assert got.dims == ("image", "layer", "head", "query", "token")
    for layer in layers:
        close(got.sel(layer=layer).values, expected[layer])
        assert np.abs(got.sel(layer=layer).sum("token") - 1).max() < 1e-5
    std = got.std("token").mean() * got.sizes["token"]
    assert std > 0.05  # not flat: the comparison means something
    sink = capture.attention_received(family, x, batch=1)
    assert sink["layer"].values.tolist() == layers
    for layer in layers:
        close(sink.sel(layer=layer).values, expected[layer].sum(2).amax(1))
    assert hooks(family.net) == 0


@torch.no_grad()
def test_projections_give_attention_and_output(family: Backbone) -> None:
    """Queries and keys give the map, and the map times the values gives what attention hands on."""
    x = pixels(family, 4, 5)
    layer = 2
    attn = family.net.blocks[layer - 1].attn
    maps = unfused(family, x)[layer]
    n, heads, tokens, _ = maps.shape
    handed: list[Tensor] = []
    inner = getattr(attn, "norm", None)
    watch = attn.proj if inner is None or isinstance(inner, torch.nn.Identity) else inner
    place = watch.register_forward_pre_hook(lambda _m, y: handed.append(y[0]))
    family.net.forward_features(family.prepare(x))
    place.remove()
    q, k, v = (
        torch.from_numpy(capture.projections(family, x, which=w, layer=layer).values)
        .view(n, tokens, heads, -1)
        .transpose(1, 2)
        for w in ("query", "key", "value")
    )
    close((maps @ v).transpose(1, 2).reshape(n, tokens, -1).numpy(), handed[0].reshape(n, tokens, -1))
    if not hasattr(attn, "rel_pos") and getattr(attn, "relative_position_bias_table", None) is None:
        close(((q @ k.transpose(-1, -2)) * attn.scale).softmax(-1).numpy(), maps)


@torch.no_grad()
def test_projections_are_the_linear_layer() -> None:
    bare = make("deit3_small_patch16_224")
    x = pixels(bare)
    states_before = torch.from_numpy(capture.tokens(bare, x, layer=1, kinds=arrays.KINDS).values)
    block = bare.net.blocks[1]
    for which, expected in zip(
        ("query", "key", "value"), block.attn.qkv(block.norm1(states_before)).chunk(3, -1), strict=True
    ):
        got = capture.projections(bare, x, which=which, layer=2)
        assert got.name == which
        assert got.dims == ("image", "token", "channel")
        close(got.values, expected)


@torch.no_grad()
def test_patch_embedding_comes_before_positions(family: Backbone) -> None:
    x = pixels(family, 3, 5)
    got = capture.patch_embeddings(family, x, batch=2)
    assert got.dims == ("image", "token", "channel")
    assert set(got["kind"].values) == {"patch"}
    family.fit((x.shape[-2], x.shape[-1]))
    proj = family.net.patch_embed.proj
    p = family.patch_size[0]
    patches = F.unfold(family.normalise(x), p, stride=p).transpose(1, 2)
    linear = patches @ proj.weight.flatten(1).T + (0 if proj.bias is None else proj.bias)
    close(got.values, family.net.patch_embed.norm(linear))


def test_final_norm() -> None:
    bare = make("vit_small_patch14_reg4_dinov2")
    x = pixels(bare)
    with torch.no_grad():
        expected = bare.net.forward_features(bare.prepare(x))
    got = capture.tokens(bare, x, kinds=("cls", "register", "patch"), final_norm=True)
    close(got.values, expected)
    assert np.abs(got.values - capture.tokens(bare, x, kinds=arrays.KINDS).values).max() > 0.1


def test_register_means(family: Backbone) -> None:
    x = pixels(family, 3, 5, count=5)
    means = capture.register_means(family, x, batch=2)
    assert means.dims == ("layer", "token", "channel")
    assert means.shape == (family.depth + 1, family.registers, family.width)
    if family.registers:
        assert means["label"].values.tolist() == [f"reg{n}" for n in range(family.registers)]
        for layer in range(family.depth + 1):
            whole = capture.tokens(family, x, layer=layer, kinds=("register",))
            close(means.sel(layer=layer).values, torch.from_numpy(whole.values).mean(0))
    assert hooks(family.net) == 0


# --- labels


def test_labels_name_the_tokens() -> None:
    bare = make("vit_small_patch14_reg4_dinov2")
    norms = capture.norms(bare, pixels(bare, 2, 3))
    assert norms["kind"].values.tolist() == ["cls"] + ["register"] * 4 + ["patch"] * 6
    expected = ["cls", "reg0", "reg1", "reg2", "reg3", "0,0", "0,1", "0,2", "1,0", "1,1", "1,2"]
    assert norms["label"].values.tolist() == expected
    assert norms["model"].item() == bare.name
    got = capture.attention(bare, pixels(bare, 2, 3), queries=("register", 4, 0), layers=(-1, 1))
    assert got["query"].values.tolist() == ["reg0", "reg1", "reg2", "reg3", "1,1", "0,0"]
    assert got["query_kind"].values.tolist() == ["register"] * 4 + ["patch"] * 2
    assert got["layer"].values.tolist() == [3, 1]
    every = capture.attention(bare, pixels(bare, 2, 3), queries="patch", layers=(1,))
    assert np.allclose(every.sel(layer=1).isel(query=[4, 0]), got.sel(layer=1).isel(query=[4, 5]), atol=1e-6)
    some = capture.tokens(bare, pixels(bare, 2, 3), kinds=("register", "cls"))
    assert some["label"].values.tolist() == expected[:5]
    assert np.array_equal(capture.tokens(bare, pixels(bare, 2, 3), kinds="cls").values, some.values[:, :1])


def test_grids_keep_rows_and_columns() -> None:
    """A bright patch at a known place is found there, through labels alone."""
    bare = make("vit_small_patch14_reg4_dinov2")
    x = torch.zeros(1, 3, 14 * 3, 14 * 5)
    x[:, :, 14 * 2 : 14 * 3, 14 * 1 : 14 * 2] = 1
    maps = arrays.patch_maps(capture.patch_embeddings(bare, x))
    assert dict(maps.sizes) == {"image": 1, "channel": 96, "y": 3, "x": 5}
    away = np.abs(maps - maps.isel(y=0, x=0)).sum("channel")[0]
    assert np.argwhere(away.values > 1e-3).tolist() == [[2, 1]]
    norms = capture.norms(bare, x)
    folded = arrays.patch_maps(norms)
    assert np.array_equal(folded.values.reshape(1, 4, 15), norms.isel(token=norms["kind"] == "patch").values)
    for y, x_ in np.ndindex(3, 5):
        here = norms.isel(token=np.flatnonzero((norms["y"] == y) & (norms["x"] == x_)))
        assert np.array_equal(folded.values[..., y, x_], here.values[..., 0])


# --- batches, order, sources


def test_batch_size_and_order_do_not_matter(family: Backbone) -> None:
    x = pixels(family, 3, 4, count=5)
    order = [3, 0, 4, 1, 2]
    queries = ("cls", "register", 2)
    measures = [
        lambda y, b: capture.norms(family, y, batch=b),
        lambda y, b: capture.tokens(family, y, batch=b),
        lambda y, b: capture.patch_embeddings(family, y, batch=b),
        lambda y, b: capture.attention(family, y, queries=queries, batch=b),
        lambda y, b: capture.attention_received(family, y, batch=b),
        lambda y, b: capture.projections(family, y, which="key", batch=b),
    ]
    for measure in measures:
        whole = measure(x, 5)
        assert whole.sizes["image"] == 5
        scale = max(1.0, float(np.abs(whole).max()))
        assert np.abs(measure(x, 2).values - whole.values).max() <= 2e-5 * scale
        assert np.abs(measure(x[order], 3).values - whole.values[order]).max() <= 2e-5 * scale


def test_images_and_tensors_agree() -> None:
    bare = make("pico-registers")
    stream = images.open_images("scenes", size=(24, 40), count=5)
    x = torch.cat(list(stream.pixels()))
    assert np.allclose(capture.norms(bare, stream, batch=2), capture.norms(bare, x), rtol=1e-5)


def test_the_size_before_does_not_matter() -> None:
    bare = make("vit_small_patch14_dinov2")
    first = capture.norms(bare, pixels(bare, 4, 6))
    capture.norms(bare, pixels(bare, 9, 2))
    assert np.array_equal(capture.norms(bare, pixels(bare, 4, 6)), first)


# --- hooks and fused attention


class Stop(Exception):
    pass


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("where", ["reduce", "forward", "block", "success"])
def test_no_hook_survives(error: type[BaseException], where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = make("vit_small_patch14_reg4_dinov2")
    x = pixels(bare)
    mine = bare.net.blocks[0].register_forward_hook(lambda *_: None)  # a reader's own hook stays
    during: list[int] = []

    def fail(*_args: object, **_kw: object) -> None:
        during.append(hooks(bare.net))
        raise error

    if where == "reduce":
        monkeypatch.setattr(torch.linalg, "vector_norm", fail)
        monkeypatch.setattr(capture, "rows", fail)
    elif where == "forward":
        monkeypatch.setattr(bare.net, "forward_features", fail)
    elif where == "block":
        monkeypatch.setattr(bare.net.blocks[1], "forward", fail)
    measures = [
        lambda: capture.norms(bare, x),
        lambda: capture.attention(bare, x),
        lambda: capture.attention_received(bare, x),
    ]
    if where in ("forward", "block"):
        measures += [lambda: capture.tokens(bare, x), lambda: capture.projections(bare, x, which="query")]
    for measure in measures:
        if where == "success":
            measure()
        else:
            with pytest.raises(InputError if error is MemoryError else error):
                measure()
        assert hooks(bare.net) == 1
    assert where == "success" or (len(during) == len(measures) and min(during) > 1)  # hooks were on when it failed
    monkeypatch.undo()
    assert torch.overrides._get_current_function_mode() is None  # nor does the watch on attention
    mine.remove()
    assert capture.norms(bare, x).sizes["image"] == 3


def test_tap_takes_its_hooks_off() -> None:
    bare = make("test_vit3")
    seen: dict[int, Tensor] = {}

    def look() -> None:
        with capture.tap(bare.net, {n: lambda s, n=n: seen.__setitem__(n, s) for n in (0, 2)}):
            assert hooks(bare.net) == 2
            bare.net.forward_features(bare.prepare(pixels(bare)))
            raise Stop

    with pytest.raises(Stop):
        look()
    assert hooks(bare.net) == 0
    assert set(seen) == {0, 2}
    for wrong in (-1, bare.depth + 1):
        with (
            pytest.raises(InputError, match=f"layer {wrong} does not exist"),
            capture.tap(bare.net, {wrong: lambda _: None}),
        ):
            pass


def test_hooks_are_counted() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Sequential(torch.nn.ReLU()))
    assert hooks(net) == 0
    places = [
        net[0].register_forward_hook(print),
        net[1][0].register_forward_pre_hook(print),
        net.register_full_backward_hook(print),
    ]
    assert hooks(net) == 3
    places[1].remove()
    assert hooks(net) == 2


def test_fused_attention_stays_on(family: Backbone) -> None:
    """What runs is fused attention, once per block and batch, and the output does not change by being watched."""
    calls: list[int] = []

    class Count(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.scaled_dot_product_attention:
                calls.append(1)
            return func(*args, **(kwargs or {}))

    x = pixels(family, count=4)
    with torch.no_grad():
        before = family.net.forward_features(family.prepare(x))
    with Count(), torch.profiler.profile() as profile:
        capture.attention(family, x, queries=(0,), batch=2)
    assert len(calls) == 2 * family.depth
    assert any("scaled_dot_product" in e.key for e in profile.key_averages())
    assert all(b.attn.fused_attn for b in family.net.blocks)
    with torch.no_grad():
        assert torch.equal(family.net.forward_features(family.prepare(x)), before)


def test_states_do_not_pile_up() -> None:
    """Reductions run inside the hook: of a block's states nothing but the norms is alive when the next one runs."""
    bare = make("vit_small_patch14_reg4_dinov2")
    alive: list[weakref.ref] = []
    counts: list[int] = []

    def note(_module: object, _inputs: object, output: Tensor) -> None:
        counts.append(sum(r() is not None for r in alive))
        alive.append(weakref.ref(output))

    places = [b.register_forward_hook(note) for b in bare.net.blocks]
    capture.norms(bare, pixels(bare))
    for place in places:
        place.remove()
    assert len(counts) == 3
    assert max(counts) <= 1  # the input of the block that runs


# --- attention, written out


def test_rows_with_masks() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 7, 4, generator=generator) for _ in range(2))
    which = [5, 0]
    plain = torch.einsum("nhqd,nhkd->nhqk", q, k) * 0.3
    for mask in (None, torch.randn(7, 7, generator=generator), torch.rand(2, 1, 7, 7, generator=generator) > 0.4):
        expected = plain.clone()
        if mask is not None and mask.dtype == torch.bool:
            mask[..., 0] = True
            expected[~mask.expand_as(expected)] = -torch.inf
        elif mask is not None:
            expected = expected + mask
        exp = expected.double().exp()
        theirs = (exp / exp.sum(-1, keepdim=True))[:, :, which]
        got = capture.rows(q, k, mask, 0.3, which)
        assert torch.allclose(got.double(), theirs, atol=1e-6)
        assert torch.allclose(got.sum(-1), torch.ones(2, 3, 2))


@torch.no_grad()
@pytest.mark.parametrize("positional", [False, True])
def test_scale_and_mask_of_the_call_are_used(positional: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = make("vit_small_patch14_dinov2")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 25, 32, generator=generator) for _ in range(3))
    mask = torch.randn(25, 25, generator=generator)

    def forward(_x: Tensor, **_kw: object) -> Tensor:
        if positional:
            out = F.scaled_dot_product_attention(q, k, v, mask, 0.0, False, scale=0.03)
        else:
            out = F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=mask, scale=0.03)
        return out.transpose(1, 2).flatten(2)

    monkeypatch.setattr(bare.net.blocks[1].attn, "forward", forward)
    got = capture.attention(bare, pixels(bare, count=2), layers=(2,), queries=("cls", "patch"))
    close(got.values[:, 0], (q @ k.transpose(-1, -2) * 0.03 + mask).softmax(-1))


def test_concentration_knows_sinks() -> None:
    """Flat attention gives 1 everywhere; a token that all look at gets as much as there are tokens."""
    bare = make("vit_small_patch14_dinov2")
    attn = bare.net.blocks[0].attn
    attn.qkv.weight.zero_()
    attn.qkv.bias.zero_()
    assert np.allclose(capture.attention_received(bare, pixels(bare), layers=[1]), 1, atol=1e-5)
    sink = capture.attention_received(bare, pixels(bare, 20, 30, count=1))  # more than one block of queries
    tokens = 20 * 30 + 1
    assert sink.sizes["token"] == tokens
    whole = capture.attention(bare, pixels(bare, 20, 30, count=1), layers=(2,), queries=("cls", "patch"))
    assert np.allclose(sink.sel(layer=2), whole.sel(layer=2).sum("query").max("head"), rtol=1e-4)
    assert (capture.attention_received(bare, pixels(bare)).max() < 25).item()


# --- what goes wrong


def test_broken_weights_are_a_problem() -> None:
    bare = make("vit_small_patch14_reg4_dinov2")
    x = pixels(bare)
    measures = [
        lambda y: capture.norms(bare, y),
        lambda y: capture.tokens(bare, y),
        lambda y: capture.patch_embeddings(bare, y),
        lambda y: capture.attention(bare, y),
        lambda y: capture.attention_received(bare, y),
        lambda y: capture.projections(bare, y, which="value"),
    ]
    broken = x.clone()
    broken[1, 0, 3, 3] = torch.nan
    for measure in measures:
        with pytest.raises(InputError, match="gives values that are not finite"):
            measure(broken)
    bare.net.patch_embed.proj.weight[0, 0, 0, 0] = torch.inf
    for measure in measures:
        with pytest.raises(InputError) as caught:
            measure(x)
        assert "\n" not in str(caught.value)
        assert hooks(bare.net) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b, x: capture.norms(b, x, layers=[4]), "layer 4 does not exist: .* has layers 0 to 3"),
        (lambda b, x: capture.norms(b, x, layers=[-5]), "layer -5 does not exist"),
        (lambda b, x: capture.norms(b, x, layers=[]), "no layers are asked for"),
        (lambda b, x: capture.tokens(b, x, layer=9), "layer 9 does not exist"),
        (lambda b, x: capture.tokens(b, x, kinds=("patches",)), "did you mean 'patch'"),
        (lambda b, x: capture.tokens(b, x, kinds=()), "has no such token"),
        (lambda b, x: capture.tokens(b, x, kinds=("register",)), "has no register token"),
        (lambda b, x: capture.attention(b, x, layers=(0,)), "layer 0 does not exist: .* has layers 1 to 3"),
        (lambda b, x: capture.attention(b, x, queries=()), "has no such token"),
        (lambda b, x: capture.attention(b, x, queries=("register",)), "has no register token to ask for"),
        (lambda b, x: capture.attention(b, x, queries=("cls", "clss")), "did you mean 'cls'"),
        (lambda b, x: capture.attention(b, x, queries=(24,)), "no patch 24: the image has patches 0 to 23"),
        (lambda b, x: capture.attention(b, x, queries=(-1,)), "no patch -1"),
        (lambda b, x: capture.projections(b, x, which="keys"), "unknown projection 'keys': did you mean 'key'"),
        (lambda b, x: capture.projections(b, x, which="key", layer=0), "layer 0 does not exist"),
        (lambda b, x: capture.attention_received(b, x, layers=[0]), "layer 0 does not exist"),
        (lambda b, x: capture.norms(b, x, batch=0), "batch must be 1 or more"),
        (lambda b, x: capture.norms(b, x[:0]), "there are no images to measure"),
        (lambda b, x: capture.patch_embeddings(b, x[:0]), "there are no images to measure"),
        (lambda b, x: capture.attention(b, x[:0]), "there are no images to measure"),
        (lambda b, x: capture.norms(b, x[0]), "pixels must have the shape"),
        (lambda b, x: capture.norms(b, x[..., :-1]), "is not a multiple of the patch size 14"),
    ],
)
def test_bad_input_is_a_problem_of_one_line(call, message: str) -> None:
    bare = make("vit_small_patch14_dinov2")
    with pytest.raises(InputError, match=message) as caught:
        call(bare, pixels(bare))
    assert "\n" not in str(caught.value)
    assert hooks(bare.net) == 0


def test_unfused_attention_is_a_problem() -> None:
    bare = make("vit_small_patch14_dinov2")
    bare.net.blocks[1].attn.fused_attn = False
    with pytest.raises(InputError, match=r"block 2 of .* does not use fused attention"):
        capture.attention_received(bare, pixels(bare))
    assert capture.attention_received(bare, pixels(bare), layers=[1, 3]).sizes["layer"] == 2


def test_blocks_with_two_maps_are_a_problem() -> None:
    """Differential attention subtracts one map from another: neither alone is what the model does."""
    bare = registry.random("vit_dwee_patch16_reg1_gap_256", depth=2)
    with pytest.raises(InputError, match=r"block 2 of .* has more than one attention map"):
        capture.attention(bare, pixels(bare))
    assert capture.norms(bare, pixels(bare)).sizes["layer"] == 3
    assert hooks(bare.net) == 0


# --- a real published ViT


def test_deit_tiny_has_no_artifacts(shared_data: Path) -> None:
    """The published norms of the data's README: median 13.9 at the last block, 1.3 at block 3, none far out."""
    file = shared_data / "deit-tiny" / "deit_tiny_patch16_224.safetensors"
    deit = registry.load("deit_tiny_patch16_224", weights=file)
    source = shared_data / "imagenette-224" / "validation-00000-of-00001.parquet"
    norms = capture.norms(deit, images.open_images(str(source), size=224, count=24))
    patches = norms.isel(token=norms["kind"] == "patch")
    last = patches.sel(layer=12)
    assert float(last.median()) == pytest.approx(13.9, abs=0.5)
    assert float((last.max("token") / last.median("token")).median()) == pytest.approx(2.2, abs=0.3)
