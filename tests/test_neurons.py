"""Register neurons: equal to plain loops, planted ones are found, and nothing stays on the network."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from sklearn.metrics import roc_auc_score
from torch import Tensor

from tests import planted
from tests.test_capture import pixels, states
from vitregs.errors import InputError
from vitregs.measure import neurons
from vitregs.models import capture, registry, test_time
from vitregs.models.backbone import Backbone

pytestmark = pytest.mark.filterwarnings(
    "error::RuntimeWarning", "ignore::UserWarning:timm.layers", "ignore:Using a non-tuple sequence"
)
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("vit_tiny_patch16_224", {}),
    "LayerScale": ("vit_small_patch14_reg4_dinov2", {"embed_dim": 96, "num_heads": 3}),
    "SwiGLU": ("eva02_tiny_patch14_224", {}),
    "no CLS": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
}


def make(form: str) -> Backbone:
    """A random network of three blocks whose layer scales, where it has any, differ from channel to channel."""
    name, options = FORMS[form]
    bare = registry.random(name, depth=3, **options)
    with torch.no_grad():
        for key, value in bare.net.named_parameters():
            if key.endswith(("ls1.gamma", "ls2.gamma", "gamma_1", "gamma_2")):
                value.copy_(torch.rand(value.shape, generator=torch.Generator().manual_seed(3)) + 0.2)
    return bare


class Looked:
    """Activations of all neurons and what attention adds, kept by hooks of our own, and the states by timm's method."""

    def __init__(self, bare: Backbone, x: Tensor) -> None:
        self.fired: dict[int, Tensor] = {}
        self.attended: dict[int, Tensor] = {}
        self.start: list[Tensor] = []
        places = [bare.net.blocks[0].register_forward_pre_hook(lambda _m, a: self.start.append(a[0]))]
        for b, block in enumerate(bare.net.blocks, 1):
            places.append(block.mlp.fc2.register_forward_pre_hook(lambda _m, a, b=b: self.fired.__setitem__(b, a[0])))
            places.append(block.attn.register_forward_hook(lambda _m, _a, y, b=b: self.attended.__setitem__(b, y)))
        self.states = states(bare, x)
        for place in places:
            place.remove()


def scale(block: Any, which: str) -> Tensor:
    """What a branch of a block is multiplied by."""
    for found in (getattr(getattr(block, f"ls{which}", None), "gamma", None), getattr(block, f"gamma_{which}", None)):
        if found is not None:
            return found.detach()
    return torch.ones(())


@pytest.mark.parametrize("layer", [2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_shares_are_those_of_plain_loops(form: str, layer: int) -> None:
    bare = make(form)
    x = pixels(bare, count=5)
    seen = Looked(bare, x)
    first = bare.prefix
    state = seen.states[layer - 1][:, first:].double()
    norm = state.norm(dim=-1)
    cutoff = float(norm.quantile(0.8))
    marked = norm > cutoff
    found = neurons.search(bare, x, cutoff=cutoff, layer=layer, batch=2)
    assert found["block"].values.tolist() == list(range(1, layer + 1))
    assert found.attrs == {"layer": layer, "cutoff": cutoff, "marked": int(marked.sum()), "images": 5}

    def shift(values: Tensor) -> Tensor:
        on, off = [], []
        for image in range(len(x)):
            for patch in range(marked.shape[1]):
                (on if marked[image, patch] else off).append(values[image, first + patch].double())
        return torch.stack(on).mean(0) - torch.stack(off).mean(0)

    way = shift(seen.states[layer - 1])
    total = 0.0
    for b in range(1, layer + 1):
        block = bare.net.blocks[b - 1]
        moved = shift(seen.fired[b])
        weight = block.mlp.fc2.weight.detach()
        for j in range(0, len(moved), 7):  # every seventh: what the neuron alone writes
            alone = moved[j] * weight[:, j].double() * scale(block, "2").double()
            expected = float(alone @ way / (way @ way))
            assert float(found["share"].sel(block=b, neuron=j)) == pytest.approx(expected, rel=1e-3, abs=1e-6)
        total += float((shift(seen.attended[b]) * scale(block, "1").double()) @ way / (way @ way))
    total += float(shift(seen.start[0]) @ way / (way @ way))
    assert float(found["share"].sum()) + total == pytest.approx(1, abs=1e-4)
    kept = (marked, ~marked)
    for b, j in neurons.ranked(found, 5):
        fired = seen.fired[b][:, first:, j]
        for name, which in zip(("on", "off"), kept, strict=True):
            assert float(found[name].sel(block=b, neuron=j)) == pytest.approx(float(fired[which].mean()), abs=1e-5)


def test_the_auc_is_that_of_scikit_learn() -> None:
    bare = make("ViT")
    x = pixels(bare, count=2)
    seen = Looked(bare, x)
    norm = seen.states[2][:, bare.prefix :].norm(dim=-1)
    cutoff = float(norm.median())
    found = neurons.search(bare, x, cutoff=cutoff)
    marked = norm > cutoff
    picked = neurons._Sums(bare, [3], 0).pick(marked)  # of the same seed
    for b, j in neurons.ranked(found, 8):
        fired = seen.fired[b][:, bare.prefix :, j].half().flatten()
        expected = roc_auc_score(marked.flatten()[picked], fired[picked].detach())
        assert float(found["auc"].sel(block=b, neuron=j)) == pytest.approx(expected, abs=2e-3)
    values, truth = torch.randn(50, 3).round(decimals=1), torch.rand(50) > 0.6
    auc = neurons._auc(values, truth, torch.tensor([True, False, True]))
    assert auc[[0, 2]] == pytest.approx([roc_auc_score(truth, values[:, k]) for k in (0, 2)])
    assert np.isnan(auc[1])


@pytest.mark.parametrize("strength", [1.8, 10.0])
def test_a_planted_neuron_writes_what_was_planted(strength: float) -> None:
    bare, x = planted.network("artifacts", strength), planted.images(32, 7)
    found = neurons.search(bare, x, layer=planted.BLOCK)
    assert neurons.ranked(found, 1) == [(planted.BLOCK, planted.NEURON)]
    top = found.sel(block=planted.BLOCK, neuron=planted.NEURON)
    assert float(top["share"]) == pytest.approx(1, abs=0.25)
    assert float(top["auc"]) > 0.95
    assert float(top["on"]) > float(top["off"]) + 1
    assert (float(found["half"]), float(found["half_low"]), float(found["half_high"])) == (1, 1, 1)
    assert neurons.register_neurons(found)[planted.BLOCK] == [planted.NEURON]


def table(share: np.ndarray, contrast: np.ndarray) -> xr.Dataset:
    dims = ("block", "neuron")
    return xr.Dataset(
        {"share": (dims, share), "contrast": (dims, contrast)},
        coords={"block": [1, 2], "neuron": range(share.shape[1])},
    )


def test_what_counts_as_a_register_neuron() -> None:
    share = np.array([[0.5, 0.004, 0.2], [0.1, np.nan, 0.3]])
    contrast = np.array([[9.0, 9.0, 1.0], [4.0, np.nan, 3.9]])
    found = table(share, contrast)
    assert neurons.register_neurons(found) == {1: [0], 2: [0]}
    assert neurons.register_neurons(found, share=0.001) == {1: [0, 1], 2: [0]}
    assert neurons.register_neurons(found, contrast=0) == {1: [0, 2], 2: [0, 2]}
    assert neurons.register_neurons(found, share=0.9) == {}
    assert neurons.ranked(found) == [(1, 0), (2, 2), (1, 2), (2, 0), (1, 1)]
    assert neurons.ranked(found, 2) == [(1, 0), (2, 2)]
    assert neurons.by_block([(2, 5), (1, 3), (2, 1)]) == {1: [3], 2: [1, 5]}
    assert neurons.by_block([]) == {}


def test_half_is_the_least_number() -> None:
    assert neurons._half(np.array([0.1, 0.3, 0.25, -0.2])) == 2
    assert neurons._half(np.array([0.6, -0.5])) == 1
    assert np.isnan(neurons._half(np.array([0.2, 0.2])))
    share = np.random.default_rng(0).dirichlet(np.ones(40))
    halves = [neurons._half(share * f) for f in (1.0, 0.9, 0.8, 0.7, 0.6)]
    assert halves == sorted(halves)


def test_the_seed_and_the_batch_leave_the_shares() -> None:
    bare, x = planted.network("artifacts", 3.0), planted.images(24, 7)
    one = neurons.search(bare, x, layer=4, cutoff=14.0, batch=5)
    two = neurons.search(bare, x, layer=4, cutoff=14.0, batch=24, seed=4)
    np.testing.assert_allclose(one["share"], two["share"], atol=1e-5)
    assert float(one["half"]) == float(two["half"])


def test_the_sample_is_the_same_for_every_batch() -> None:
    """Up to four patches of either kind in an image, whatever comes before it in its batch."""
    marked = torch.rand(20, 30, generator=torch.Generator().manual_seed(1)) < 0.1

    def drawn(batch: int, seed: int = 0) -> set[int]:
        sums = neurons._Sums(planted.network("nothing", 1.0), [1], seed)
        parts = [(start, sums.pick(part)) for start, part in zip(range(0, 20, batch), marked.split(batch), strict=True)]
        return {int(number) + 30 * start for start, part in parts for number in part}

    one = drawn(20)
    assert one == drawn(1) == drawn(7)
    assert one != drawn(20, seed=1)
    kind = marked.flatten()
    for image in range(20):
        here = [bool(kind[n]) for n in one if n // 30 == image]
        assert sum(here) == min(4, int(marked[image].sum()))
        assert len(here) - sum(here) == 4


def test_spreads_and_contrasts_do_not_depend_on_the_batch() -> None:
    bare, x = planted.network("artifacts", 3.0), planted.images(24, 7)
    one, two = (neurons.search(bare, x, layer=4, cutoff=14.0, batch=batch) for batch in (5, 24))
    for name in ("on_spread", "off_spread", "contrast", "auc"):
        np.testing.assert_allclose(one[name], two[name], rtol=0.01, atol=0.01, err_msg=name)


def test_suppression_runs_in_the_precision_that_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    bare, x, asked = planted.network("artifacts", 3.0), planted.images(8, 7), []
    real = capture.capture

    def listen(*given: Any, **how: Any) -> xr.Dataset:
        asked.append(how["precision"])
        return real(*given, **how)

    monkeypatch.setattr(capture, "capture", listen)
    neurons.suppression(
        bare, x, neurons=[(planted.BLOCK, planted.NEURON)], counts=[1], cutoff=14.0, precision="bfloat16"
    )
    assert set(asked) == {"bfloat16"}


def test_suppression_counts_what_is_left() -> None:
    bare, x = planted.network("artifacts", 3.0), planted.images(24, 7)
    found = neurons.search(bare, x, layer=planted.BLOCK)
    cutoff = found.attrs["cutoff"]
    order = neurons.ranked(found, 2)
    left = neurons.suppression(bare, x, neurons=order, counts=[0, 1, 2], cutoff=cutoff, layer=planted.BLOCK)
    norms = capture.norms(bare, x, layers=[planted.BLOCK]).isel(layer=0)
    plain = (norms.isel(token=norms["kind"] == "patch") > cutoff).mean("token").values
    for which in ("ranked", "random"):
        np.testing.assert_allclose(left["share"].sel(which=which, count=0), plain, rtol=1e-6)
    assert plain.mean() > 0.03
    assert float(left["share"].sel(which="ranked", count=1).mean()) < 0.1 * plain.mean()
    assert float(left["share"].sel(which="random", count=2).mean()) > 0.8 * plain.mean()
    assert capture.hooks(bare.net) == 0


def test_a_list_belongs_to_its_weights(tmp_path: Path) -> None:
    bare, x = planted.network("artifacts", 3.0), planted.images(24, 7)
    made = neurons.make_list(bare, x, layer=planted.BLOCK)
    assert planted.NEURON in made.neurons[planted.BLOCK]
    assert made.found["layer"] == planted.BLOCK
    file = tmp_path / "list.json"
    made.write(file)
    again = test_time.read_list(file)
    assert (again.network, again.neurons) == (made.network, made.neurons)
    assert again.lengths[planted.BLOCK] == pytest.approx(made.lengths[planted.BLOCK], abs=1e-4)
    test_time.check_list(bare, again, file)
    with pytest.raises(InputError, match=r"list\.json belongs to other weights"):
        test_time.check_list(planted.network("artifacts", 10.0, seed=3), again, file)


# --- what cannot be had is one line
def test_problems_are_one_line() -> None:
    bare = make("ViT")
    x = pixels(bare, count=4)
    other = registry.random("vit_tiny_patch16_224", depth=2)
    other.net.blocks[1].mlp.fc2 = torch.nn.Identity()
    asked: dict[str, tuple[Backbone, dict[str, Any]]] = {
        "no patch of .* has a norm above 1e": (bare, {"cutoff": 1e6}),
        "every patch of .* has a norm above 1e-06": (bare, {"cutoff": 1e-6}),
        "neurons write at layers 1 to 3 of .*, not at layer 0": (bare, {"cutoff": 1.0, "layer": 0}),
        "neurons write at layers 1 to 3 of .*, not at layer 4": (bare, {"cutoff": 1.0, "layer": 4}),
        "neurons write at layers 1 to 3 of .*, not at layer -1": (bare, {"cutoff": 1.0, "layer": -5}),
        "96 norms are too few": (bare, {}),
        "has no MLP of known form": (other, {"cutoff": 1.0}),
    }
    for message, (network, how) in asked.items():
        with pytest.raises(InputError, match=message) as problem:
            neurons.search(network, x, **how)
        assert "\n" not in str(problem.value)
        assert capture.hooks(network.net) == 0
    quiet = make("ViT")
    norms = capture.norms(quiet, x, layers=[-1])
    cutoff = float(np.quantile(norms.values[..., quiet.prefix :], 0.8))
    if neurons.register_neurons(neurons.search(quiet, x, cutoff=cutoff)) == {}:
        with pytest.raises(InputError, match="has no register neurons on these images"):
            neurons.make_list(quiet, x, cutoff=cutoff)


def test_no_mode_to_mark_by_is_a_problem() -> None:
    with pytest.raises(
        InputError, match=r"is marked at layer 6: no outlier mode .*; mark at another layer .*--layer.*--cutoff"
    ):
        neurons.search(planted.network("nothing", 1.0), planted.images(24, 7))


def test_no_hook_survives_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = make("ViT")

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(neurons._Sums, "add", fail)
    with pytest.raises(ZeroDivisionError):
        neurons.search(bare, pixels(bare), cutoff=1.0)
    monkeypatch.undo()
    monkeypatch.setattr(bare.net.blocks[2].mlp.act, "forward", fail)
    with pytest.raises(ZeroDivisionError):
        neurons.search(bare, pixels(bare), cutoff=1.0)
    assert capture.hooks(bare.net) == 0


def test_memory_holds_sums_and_a_sample_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept of an image does not grow with its patches."""
    kept: dict[int, int] = {}
    real = neurons._reduced
    bare = make("ViT")

    def look(sums: Any, *rest: Any) -> xr.Dataset:
        parts = [*sums.states, *sums.counts, *(t for b in sums.blocks for t in sums.sums[b])]
        kept[side] = sum(t.numel() for t in parts)
        assert max(sums.taken) <= neurons._KEPT
        return real(sums, *rest)

    monkeypatch.setattr(neurons, "_reduced", look)
    for side in (4, 10):
        x = pixels(bare, side, side, count=4)
        norms = capture.norms(bare, x, layers=[-1]).values[..., bare.prefix :]
        neurons.search(bare, x, cutoff=float(np.median(norms)), batch=2)
    assert kept[4] == kept[10]


def test_the_sign_of_a_gated_neuron_does_not_matter() -> None:
    """The same function, written with the products of all neurons and their output weights reversed."""
    bare, other = (
        registry.random("vit_giant_patch14_dinov2", depth=2, embed_dim=96, num_heads=3, img_size=56) for _ in "12"
    )
    for block in other.net.blocks:
        for part in (block.mlp.fc1.weight, block.mlp.fc1.bias):
            part[len(part) // 2 :] *= -1  # what the gate multiplies
        block.mlp.fc2.weight *= -1
    x = pixels(bare, count=4)
    cutoff = float(states(bare, x)[1][:, bare.prefix :].norm(dim=-1).quantile(0.9))
    one, two = (neurons.search(b, x, cutoff=cutoff) for b in (bare, other))
    np.testing.assert_allclose(one["share"], two["share"], atol=1e-5)
    np.testing.assert_allclose(one["contrast"], -two["contrast"], rtol=1e-2, atol=1e-2)
    limits = {"share": float(one["share"].quantile(0.8)), "contrast": float(abs(one["contrast"]).quantile(0.5))}
    chosen = neurons.register_neurons(one, **limits)
    assert sum(map(len, chosen.values())) > 10
    same = neurons.register_neurons(two, **limits)
    shared = sum(len({*chosen[b]} & {*same[b]}) for b in chosen)
    assert shared > 0.95 * sum(
        len({*chosen.get(b, [])} | {*same.get(b, [])}) for b in (1, 2)
    )  # but for those at a limit
    top = neurons.ranked(one, 9)
    assert neurons.selectivity(one, top) == pytest.approx(neurons.selectivity(two, top), abs=0.01)
    assert neurons.selectivity(one, top) >= 0.5


def test_images_without_pixels_are_a_mistake() -> None:
    with pytest.raises(InputError, match="0x96 is not a multiple of the patch size"):
        capture.norms(planted.network("nothing", 1.0), torch.rand(2, 3, 0, 96))
