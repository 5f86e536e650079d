"""Attention with a remedy built in: against attention written out and torch's own, in training, capture and on disk."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.layers import Attention
from torch import Tensor, nn

from vitregs.data.preparation import Preparation
from vitregs.errors import InputError
from vitregs.models import attention, capture, registry, test_time
from vitregs.models.attention import KINDS, PLAIN, Biased, Gated, OffByOne
from vitregs.models.backbone import Backbone
from vitregs.train import data, evaluation, learners, loop, start, vit
from vitregs.train.config import Recipe, parse
from vitregs.train.recipes import RECIPES, command, recipe

FEMTO = {"size": "femto", "image_size": 32, "batch": 2, "steps": 1, "warmup": 1, "precision": "fp32"}
DIM, HEADS = 12, 3


def filled(net: nn.Module, seed: int = 0, scale: float = 1.5) -> nn.Module:
    """Give all but the norms weights large enough that attention is not flat."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in net.named_parameters():
            if "norm" not in key:
                value.copy_(torch.randn(value.shape, generator=generator) * scale / max(1, value[0].numel()) ** 0.5)
    return net.eval()


def tokens(count: int = 2, length: int = 7, seed: int = 1) -> Tensor:
    return torch.randn(count, length, DIM, generator=torch.Generator().manual_seed(seed))


def weights_of(attn: Attention, x: Tensor, mask: Tensor | None = None) -> np.ndarray:
    """Attention with its further logit, if there is one, in the last column, written out for one query at a time."""
    count, length, _ = x.shape
    size = attn.head_dim
    q, k, _ = projected(attn, x)
    found = np.zeros((count, attn.num_heads, length, length + 1))
    for n, h, i in np.ndindex(count, attn.num_heads, length):
        logits = k[n, h] @ q[n, h, i] / size**0.5
        if mask is not None and mask.dtype == torch.bool:
            logits[~mask.expand(count, 1, length, length)[n, 0, i].numpy()] = -np.inf
        elif mask is not None:
            logits = logits + mask.expand(count, 1, length, length)[n, 0, i].numpy()
        more = -np.inf
        if isinstance(attn, Biased):
            more = float(attn.bias_k.detach().double().numpy()[h * size : (h + 1) * size] @ q[n, h, i]) / size**0.5
        elif isinstance(attn, OffByOne):
            more = 0.0
        total = np.exp(logits).sum() + np.exp(more)
        found[n, h, i] = [*np.exp(logits) / total, np.exp(more) / total]
    return found


def projected(attn: Attention, x: Tensor) -> tuple[np.ndarray, ...]:
    """Queries, keys and values (n, heads, tokens, d) in double precision."""
    weight, bias = (p.detach().double().numpy() for p in (attn.qkv.weight, attn.qkv.bias))
    whole = x.detach().double().numpy() @ weight.T + bias
    return tuple(
        np.stack(np.split(part, attn.num_heads, -1), 1) for part in np.split(whole, 3, -1)
    )  # heads side by side


def written_out(attn: Attention, x: Tensor, mask: Tensor | None = None) -> np.ndarray:
    """What attention hands on, in double precision."""
    count, length, _ = x.shape
    weights, (_, _, v) = weights_of(attn, x, mask), projected(attn, x)
    out = weights[..., :-1] @ v
    if isinstance(attn, Biased):
        value = attn.bias_v.detach().double().numpy().reshape(attn.num_heads, 1, attn.head_dim)
        out = out + weights[..., -1:] * value
    out = out.swapaxes(1, 2).reshape(count, length, -1)
    if isinstance(attn, Gated):
        gate, bias = (p.detach().double().numpy() for p in (attn.gate.weight, attn.gate.bias))
        out = out / (1 + np.exp(-(x.double().numpy() @ gate.T + bias)))
    weight, bias = (p.detach().double().numpy() for p in (attn.proj.weight, attn.proj.bias))
    return out @ weight.T + bias


def close(ours: object, theirs: object, tolerance: float = 1e-5) -> None:
    one, two = (np.asarray(v.detach() if isinstance(v, Tensor) else v, np.float64) for v in (ours, theirs))
    assert one.shape == two.shape
    assert np.abs(one - two).max() <= tolerance * max(1.0, np.abs(two).max())


def different(one: Tensor, two: Tensor) -> None:
    assert float((one - two).abs().max()) > 1e-3


def problem(call, *args: object, **kw: object) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **kw)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the modules


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_attention_is_that_written_out(kind: str) -> None:
    attn = filled(KINDS[kind](DIM, num_heads=HEADS, qkv_bias=True))
    x = tokens()
    generator = torch.Generator().manual_seed(2)
    seen = torch.rand(2, 1, 7, 7, generator=generator) > 0.4
    for mask in (None, torch.randn(1, 1, 1, 7, generator=generator), seen | torch.eye(7, dtype=torch.bool)):
        close(attn(x, attn_mask=mask), written_out(attn, x, mask))
    plain = Attention(DIM, num_heads=HEADS, qkv_bias=True).eval()
    missing, odd = plain.load_state_dict(attn.state_dict(), strict=False)
    assert (missing, sorted(odd)) == ([], sorted(KINDS[kind].added))  # the names of timm, and what is added
    different(attn(x), plain(x))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["off-by-one", "bias"])
def test_further_keys_are_those_of_torch(kind: str) -> None:
    attn = filled(KINDS[kind](DIM, num_heads=HEADS, qkv_bias=True))
    theirs = nn.MultiheadAttention(
        DIM, HEADS, add_zero_attn=kind == "off-by-one", add_bias_kv=kind == "bias", batch_first=True
    ).eval()
    theirs.in_proj_weight.copy_(attn.qkv.weight)
    theirs.in_proj_bias.copy_(attn.qkv.bias)
    theirs.out_proj.load_state_dict(attn.proj.state_dict())
    if isinstance(attn, Biased):
        theirs.bias_k.copy_(attn.bias_k.view(1, 1, -1))
        theirs.bias_v.copy_(attn.bias_v.view(1, 1, -1))
    x = tokens()
    close(attn(x), theirs(x, x, x, need_weights=False)[0])


@torch.no_grad()
def test_off_by_one_is_a_further_token_of_zero_key_and_value() -> None:
    attn = filled(OffByOne(DIM, num_heads=HEADS, qkv_bias=True))
    attn.qkv.bias[DIM:] = 0  # of keys and values, so that a token of zeros has neither
    plain = Attention(DIM, num_heads=HEADS, qkv_bias=True).eval()
    plain.load_state_dict(attn.state_dict())
    x = tokens()
    close(attn(x), plain(torch.cat([x, torch.zeros(2, 1, DIM)], 1))[:, :-1])


@torch.no_grad()
def test_neutral_parameters_are_plain_attention() -> None:
    x = tokens()
    plain = filled(Attention(DIM, num_heads=HEADS, qkv_bias=True))
    gated, biased, zero = (
        KINDS[k](DIM, num_heads=HEADS, qkv_bias=True).eval() for k in ("gated", "bias", "off-by-one")
    )
    for net in (gated, biased, zero):
        net.load_state_dict(plain.state_dict(), strict=False)
    close(biased(x), zero(x))  # key and value of zero, as it starts
    gated.gate.bias.fill_(40)
    close(gated(x), plain(x))
    # a key that turns from every query, which share a large bias; the tokens' keys are small
    for net in (plain, biased, zero):
        net.qkv.bias[:DIM] = 30
        net.qkv.weight[DIM : 2 * DIM] *= 0.01
        net.qkv.bias[DIM : 2 * DIM] *= 0.01
    biased.bias_k.fill_(-30)
    close(biased(x), plain(x))
    different(zero(x), biased(x))


def test_a_gate_has_a_bias_where_queries_have_none() -> None:
    attn = Gated(DIM, num_heads=HEADS)
    assert attn.qkv.bias is None
    assert torch.equal(attn.gate.bias, torch.full((DIM,), attention.OPEN))
    assert not attn.gate.weight.any()


# --- networks


@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_networks_differ_in_their_attention_alone(kind: str, registers: int) -> None:
    plain, other = (
        vit.build(Recipe("x", "", **FEMTO, registers=registers, attention=k), classes=5) for k in (PLAIN, kind)
    )
    assert all(type(block.attn) is KINDS[kind] for block in other.blocks)
    mine = other.state_dict()
    assert [k for k, v in plain.state_dict().items() if not torch.equal(v, mine[k])] == []
    new = sorted(mine.keys() - plain.state_dict().keys())
    assert new == sorted(f"blocks.{i}.attn.{name}" for i in range(8) for name in KINDS[kind].added)


@pytest.mark.parametrize("name", ["supervised", "clip", "mae", "dino", "dinov2"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_what_is_added(kind: str, name: str) -> None:
    small = {"local_size": 16} if name.startswith("dino") else {}
    chosen = recipe(f"{name}-pico").override(**FEMTO, **small, registers=1, attention=kind)
    feed = data.make(chosen, torch.device("cpu"))
    learner = learners.learner(chosen, feed)
    learner.step = 0
    learner(feed.take(0, captions=learner.captions)).backward()
    added = [p.grad for k, p in learner.vit.named_parameters() if k.endswith(KINDS[kind].added or "qkv.weight")]
    assert len(added) == 8 * max(1, len(KINDS[kind].added))
    assert all(g is not None and bool(g.any()) and bool(g.isfinite().all()) for g in added)


# --- capture


def backbone(kind: str, registers: int = 0) -> Backbone:
    net = filled(vit.build(Recipe("x", "", **FEMTO, registers=registers, attention=kind)), scale=2.0)
    return Backbone("x", net, (0.4,) * 3, (0.2,) * 3, (32, 32), Preparation(), "", "")


@torch.no_grad()
def maps(bare: Backbone, x: Tensor) -> tuple[dict[int, np.ndarray], dict[int, Tensor]]:
    """Attention written out in every block, with the further logit, and what each block's attention was given."""
    given: dict[int, Tensor] = {}
    places = [
        block.attn.register_forward_pre_hook(lambda _m, a, n=n: given.__setitem__(n, a[0]))
        for n, block in enumerate(bare.net.blocks, 1)
    ]
    bare.net.forward_features(bare.prepare(x))
    for place in places:
        place.remove()
    return {n: weights_of(bare.net.blocks[n - 1].attn, y) for n, y in given.items()}, given


@torch.no_grad()
@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_capture_sees_attention_as_it_is(kind: str, registers: int) -> None:
    bare = backbone(kind, registers)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected, given = maps(bare, x)
    length, prefix = 16 + 1 + registers, 1 + registers
    kinds = ["cls", "patch"] if not registers else ["cls", "register", "patch"]
    layers = list(range(1, 9))
    seen = capture.capture(bare, x, attention=kinds, attention_layers=layers, qkv=capture.PROJECTIONS, received=True)
    assert (seen.sizes["token"], seen.sizes["query"]) == (length, length)
    for layer in layers:
        rows = expected[layer][..., :-1]
        close(seen.attention.sel(attention_layer=layer).values, rows, 1e-4)
        taken = 1 - seen.attention.sel(attention_layer=layer).sum("token").values
        close(taken, expected[layer][..., -1], 1e-4)  # what the further logit takes
        got = rows.sum(2).max(1)  # fair shares of all that is given
        close(seen.received.sel(received_layer=layer).values, got, 1e-4)
        close(seen.sink.sel(received_layer=layer).values, got[:, prefix:].max(1), 1e-4)
    if kind != "gated":
        assert float(np.stack([m[..., -1] for m in expected.values()]).max()) > 0.1  # the comparison means something
    q, k, v = (part.swapaxes(1, 2).reshape(2, length, -1) for part in projected(bare.net.blocks[-1].attn, given[8]))
    close(seen["qkv"].isel(qkv_layer=0).values, np.stack([q, k, v], 1), 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_attention_received_is_estimated_without_the_further_logit(kind: str) -> None:
    bare = backbone(kind)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    exact = capture.capture(bare, x, received=True)
    draws = [capture.capture(bare, x, received=True, queries=16, seed=s) for s in range(20)]
    assert draws[0].received.shape == exact.received.shape
    mean = sum(d.received for d in draws) / len(draws)
    assert float(abs(mean - exact.received).mean()) < 0.1 * float(exact.received.mean())


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_remedies_at_test_time_take_these_networks(kind: str) -> None:
    bare = backbone(kind)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    one, two = (test_time.append(bare, 1, weight=2.0), test_time.append(bare, 2))
    a, b = (capture.tokens(net, x, kinds="patch").values for net in (one, two))
    close(a, b, 1e-4)  # a token of weight 2 is two tokens, mask or not
    hidden = torch.zeros(1, 17, dtype=torch.bool)
    hidden[:, 5] = True
    gone = capture.attention(test_time.without_tokens(bare, hidden), x, layers=[3], queries=("cls",))
    assert not gone.values[..., 5].any()
    assert float(gone.values.sum(-1).min()) > 0


# --- from a trained network


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of DeiT-Tiny's shape, random."""
    net = filled(registry.random("deit_tiny_patch16_224").net, scale=1.0)
    file = tmp_path_factory.mktemp("weights") / "deit.safetensors"
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, file)
    return file


def begun(name: str, file: Path, **changes: object) -> nn.Module:
    chosen = recipe(name).override(image_size=64, **changes)
    return vit.build(chosen, 1000, start.load(chosen, file)).eval()


@torch.no_grad()
def test_the_remedies_start_from_the_network(published: Path) -> None:
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    kept = begun("regrow-kept", published)
    gated = begun("remedy-gated", published)
    close(vit.encode(gated, x), vit.encode(kept, x), 1e-4)
    zero, biased = begun("remedy-off-by-one", published), begun("remedy-bias", published)
    close(vit.encode(zero, x), vit.encode(biased, x))
    different(vit.encode(zero, x), vit.encode(kept, x))
    other = {k: v for k, v in zero.state_dict().items() if not torch.equal(v, kept.state_dict()[k])}
    assert other == {}
    fresh = begun("remedy-gated", published, fresh_from=9)
    assert not torch.equal(fresh.blocks[8].attn.proj.weight, gated.blocks[8].attn.proj.weight)


@torch.no_grad()
@pytest.mark.parametrize("registers", [0, 4])
def test_layer_norm_before_the_first_block(published: Path, registers: int) -> None:
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    kept, normed = (begun(n, published, registers=registers) for n in ("regrow-kept", "remedy-patch-norm"))
    assert torch.equal(normed.norm_pre.weight, torch.ones(192))
    assert not normed.norm_pre.bias.any()
    state = kept._pos_embed(kept.patch_embed(vit.normalise(kept, x)))  # with the bias of the patch embedding
    centred = state - state.mean(-1, keepdim=True)
    state = centred / (centred.square().mean(-1, keepdim=True) + normed.norm_pre.eps).sqrt()
    close(vit.encode(normed, x), kept.norm(kept.blocks(state)), 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n in RECIPES if n.startswith("remedy-")])
def test_with_registers(published: Path, name: str) -> None:
    net = begun(f"{name}-reg4", published)
    x = torch.rand(1, 3, 64, 64)
    assert vit.encode(net, x).shape == (1, 1 + 4 + 16, 192)
    again = registry.build(net.facts)
    again.load_state_dict(net.state_dict())
    close(again.eval()(x), net(x), 1e-6)


def test_an_attention_that_is_not_known() -> None:
    assert problem(Recipe, "x", "", attention="gate") == "unknown attention 'gate': did you mean 'gated'?"
    assert "choose from bias, gated, off-by-one, plain" in problem(parse, recipe("hunt-pico"), ["attention=none"])


# --- recipes and folders


def test_recipes_without_it_are_as_they_were() -> None:
    with_it = {n for n, r in RECIPES.items() if "attention" in r.facts() or "attention" in r.vit()}
    assert with_it == {"remedy-gated", "remedy-off-by-one", "remedy-bias"}
    control = recipe("regrow-kept").facts()
    for name, change in (
        ("gated", {"attention": "gated"}),
        ("off-by-one", {"attention": "off-by-one"}),
        ("bias", {"attention": "bias"}),
        ("patch-norm", {"patch_norm": True}),
    ):
        assert recipe(f"remedy-{name}").facts() == {**control, **change, "name": f"remedy-{name}"}


def test_commands_tell_the_attention() -> None:
    for base, words in (
        ("hunt-tiny", ["attention=gated"]),
        ("remedy-gated", ["attention=plain"]),
        ("remedy-bias-reg4", []),
    ):
        chosen = parse(recipe(base), words)
        assert command(chosen) == " ".join(["vitregs train", base, *words])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Short runs from random weights, by attention."""
    where = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"WATCHED": 8, "SCORED": 16, "QUERIES": 16, "BANK": 16}.items():
            patch.setattr(loop, name, value)
        patch.setattr(evaluation, "PROBED", 48)
        out: dict[str, Path] = {}
        more = {k: {"attention": k} for k in (PLAIN, *KINDS)} | {"patch-norm": {"patch_norm": True}}
        for kind, change in more.items():
            chosen = recipe("supervised-pico").override(name=kind, **FEMTO, registers=1, lr=0.05, **change)
            out[kind] = loop.train(
                chosen, out=where / kind, device="cpu", compiled=False, final=False, report=lambda _line: None
            )
        yield out


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_loaded_as_it_was_trained(folders: dict[str, Path], kind: str) -> None:
    card = json.loads((folders[kind] / "recipe.json").read_text())
    assert card["recipe"]["attention"] == card["vit"]["attention"] == kind
    assert "attention" not in (folders[PLAIN] / "recipe.json").read_text()
    loaded = registry.load(str(folders[kind]), device="cpu")
    assert all(type(block.attn) is KINDS[kind] for block in loaded.net.blocks)
    state = torch.load(folders[kind] / "checkpoint.pt", weights_only=True)["learner"]
    trained = {k.removeprefix("vit."): v for k, v in state.items() if k.startswith("vit.")}
    mine = loaded.net.state_dict()
    assert mine.keys() == trained.keys()
    close(mine["blocks.0.attn.proj.weight"], trained["blocks.0.attn.proj.weight"].half())
    if KINDS[kind].added:
        moved = mine[f"blocks.0.attn.{KINDS[kind].added[-1]}"]
        assert float(moved.std()) > 0  # trained, and kept


@pytest.mark.parametrize("kind", KINDS)
def test_runs_go_on_from_a_folder(folders: dict[str, Path], kind: str) -> None:
    again = Recipe("again", "", **FEMTO, registers=1, init=str(folders[kind]), attention=kind)
    net = vit.build(again, 0, start.load(again))
    theirs = registry.load(str(folders[kind]), device="cpu").net.state_dict()
    assert [k for k, v in net.state_dict().items() if not torch.equal(v, theirs[k])] == []
    wrong = again.override(attention=PLAIN)
    assert f"has attention={kind}: give attention={kind}, not plain" in problem(start.load, wrong)
    first = again.override(init=str(folders[PLAIN]))
    assert type(vit.build(first, 0, start.load(first)).blocks[0].attn) is KINDS[kind]


def test_a_network_has_one_layer_norm_before_its_blocks(folders: dict[str, Path]) -> None:
    again = Recipe("again", "", **FEMTO, registers=1, init=str(folders["patch-norm"]))
    assert type(vit.build(again, 0, start.load(again)).norm_pre).__name__ == "LayerNorm"
    wrong = again.override(patch_norm=True)
    assert "has a LayerNorm before its first block: leave patch_norm out" in problem(start.load, wrong)
