"""Training that starts from a published network: the same network at first, what is changed, what is refused.

Small networks of the published layouts stand in for the real ones: timm's own entries with another width and depth, and
random weights in a file.
"""

import json
import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import _registry
from timm.models.vision_transformer import checkpoint_filter_fn

from vitregs import cache
from vitregs.cli import main
from vitregs.errors import InputError
from vitregs.measure.fingerprint import VERDICTS
from vitregs.models import registry, test_time
from vitregs.models.backbone import Backbone
from vitregs.train import data, learners, loop, start, vit
from vitregs.train.config import OBJECTIVES, Recipe
from vitregs.train.recipes import command, recipe

DEIT, DINOV2, REGISTERS = "deit_tiny_patch16_224", "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"
CLIP, MAE = "vit_base_patch16_clip_quickgelu_224.openai", "vit_base_patch16_224.mae"
LAYOUTS = (DEIT, DINOV2, REGISTERS, CLIP, MAE)
OTHERS = ("deit_tiny_distilled_patch16_224", "vit_base_patch16_siglip_224", "vit_small_patch16_224")
LITTLE = {"embed_dim": 32, "depth": 8, "num_heads": 1}  # the size "femto"
SIDE = 4  # patches
NEURONS = {3: [5, 9, 60], 6: [0]}
F5 = {"fresh_from": 5}
CPU = torch.device("cpu")
OWN: dict[str, dict[str, object]] = {
    "clip": {"text_width": 32, "text_depth": 1, "embed": 16},
    "mae": {"decoder_width": 32, "decoder_depth": 1},
    "dino": {"prototypes": 32, "hidden": 16, "bottleneck": 8},
    "dinov2": {"prototypes": 32, "patch_prototypes": 32, "hidden": 16, "bottleneck": 8},
}
CLASSES = ("tench", "English springer", "golf ball")  # 0, 217 and 574 of ImageNet-1k

pytestmark = pytest.mark.usefixtures("little_to_watch")


@pytest.fixture(scope="module", autouse=True)
def little_networks() -> Iterator[None]:
    """timm's entries of the layouts make small networks."""
    with pytest.MonkeyPatch.context() as patch:
        for name in (*LAYOUTS, *OTHERS):
            entry = name.split(".")[0]
            patch.setitem(_registry._model_entrypoints, entry, _smaller(_registry._model_entrypoints[entry]))
        patch.setattr(loop.throughput, "peak", lambda *_: 1e9)
        yield


def _smaller(real: Callable[..., Any]) -> Callable[..., Any]:
    def entry(pretrained: bool = False, **more: object) -> Any:
        return real(pretrained, **{**LITTLE, **more})

    return entry


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, little_networks: None) -> dict[str, Path]:
    """Weights of each layout in a file."""
    folder = tmp_path_factory.mktemp("published")
    return {name: written(name, folder / f"{name}.safetensors") for name in (*LAYOUTS, *OTHERS)}


def written(name: str, file: Path, seed: int = 1) -> Path:
    """Write random weights of a network, none of them small: biases, positions and LayerScale count."""
    draw = torch.Generator().manual_seed(seed)
    state = registry.random(name, seed=seed).net.state_dict()
    save_file({k: (v + 0.2 * torch.randn(v.shape, generator=draw)).contiguous() for k, v in state.items()}, file)
    return file


@pytest.fixture(scope="module")
def untouched(files: dict[str, Path]) -> dict[str, Backbone]:
    return {name: registry.load(name, weights=file, device="cpu") for name, file in files.items()}


@pytest.fixture
def listed(tmp_path: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stored register neurons of the small DeiT: → their file."""
    monkeypatch.setattr(test_time, "LISTS", tmp_path)
    return neuron_list(registry.load(DEIT, weights=files[DEIT], device="cpu"), tmp_path / f"{DEIT}.json")


def neuron_list(backbone: Backbone, file: Path, neurons: dict[int, list[int]] = NEURONS) -> Path:
    test_time.NeuronList(DEIT, neurons, test_time.lengths(backbone, neurons), {}).write(file)
    return file


@pytest.fixture
def hardly_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few images to look at that none of a network's modes is looked for."""
    monkeypatch.setattr(loop, "WATCHED", 8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of images with three of ImageNet's classes."""
    folder, draw = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(96):
        file = folder / CLASSES[i % 3] / f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8)).save(file)
    return str(folder)


def patch_of(name: str) -> int:
    return 14 if "patch14" in name else 16


def starting(name: str = DEIT, objective: str = "distil", **changes: Any) -> Recipe:
    """A recipe that starts from a network: 16 patches, 4 images a step."""
    patch = patch_of(name)
    more: dict[str, Any] = {"local_size": 2 * patch} if objective.startswith("dino") else {}
    if objective == "distil":
        more = {"target": "logits" if name == DEIT else "features"}
    own: Any = OBJECTIVES[objective](**more, **OWN.get(objective, {}))
    made = Recipe(
        "little", "", own, "femto", SIDE * patch, patch, init=name, registers=4 if name == REGISTERS else 0, steps=6,
        batch=4, warmup=1, precision="fp32",
    )  # fmt: skip
    return made.override(**changes)


def network(chosen: Recipe, file: Path, classes: int = 0) -> Any:
    return vit.build(chosen, classes, start.load(chosen, file)).eval()


def images(name: str, count: int = 3, side: int = SIDE) -> torch.Tensor:
    return torch.rand(
        count, 3, side * patch_of(name), side * patch_of(name), generator=torch.Generator().manual_seed(7)
    )


@torch.no_grad()
def tokens(net: Any, pixels: torch.Tensor) -> torch.Tensor:
    return net.forward_features(vit.normalise(net, pixels))


def problem(call: Callable[..., object], *args: object, **kw: object) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **kw)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def train(chosen: Recipe, out: Path, file: Path, **more: Any) -> Path | None:
    return loop.train(chosen, out=out, weights=file, **{"device": "cpu", "every": 3, "report": lambda _: None, **more})


def learner_of(chosen: Recipe, file: Path, photos: str | None = None) -> tuple[Any, data.Feed]:
    feed = data.make(chosen, CPU, photos)
    return learners.learner(chosen, feed, start.load(chosen, file)), feed


# --- before the first step


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_network_is_the_published_one(name: str, files: dict[str, Path]) -> None:
    chosen = starting(name)
    net = network(chosen, files[name])
    theirs: Any = timm.create_model(name.split(".")[0], img_size=chosen.image_size, num_classes=0).eval()
    own_state = {k: v for k, v in load_file(files[name]).items() if not k.startswith("head.")}
    antialias = name != DINOV2  # whose authors resized without
    theirs.load_state_dict(checkpoint_filter_fn(own_state, theirs, antialias=antialias))
    pixels = images(name)
    mean, std = (torch.tensor(theirs_of(name)[k]).view(3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        wanted = theirs.forward_features((pixels - mean) / std)
    assert torch.allclose(tokens(net, pixels), wanted, atol=1e-5)
    assert net.num_prefix_tokens == (5 if name == REGISTERS else 1)
    with torch.no_grad():
        assert torch.allclose(vit.encode(net, pixels), wanted, atol=1e-5)  # as masked objectives run it


def theirs_of(name: str) -> dict[str, Any]:
    """timm's facts of published weights."""
    return timm.get_pretrained_cfg(name).to_dict()


def test_positions_stay_as_they_are_at_the_native_size(files: dict[str, Path]) -> None:
    chosen = starting().override(image_size=224)
    net = network(chosen, files[DEIT], 1000)
    state = load_file(files[DEIT])
    assert state.keys() == net.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())


def test_real_shapes_are_sizes_of_recipes() -> None:
    with pytest.MonkeyPatch.context() as patch:
        real = (timm.models.deit.deit_tiny_patch16_224, timm.models.vision_transformer.vit_small_patch14_reg4_dinov2)
        for entry in real:
            patch.setitem(_registry._model_entrypoints, entry.__name__, entry)
        deit, dinov2 = registry.random(DEIT), registry.random(REGISTERS)
    start._check_shape(deit, recipe("regrow-kept"))
    start._check_shape(dinov2, recipe("supervised-pico").override(size="small", patch_size=14, image_size=56))


def by_hand(plain: Any, pixels: torch.Tensor, registers: torch.Tensor, class_position: bool) -> torch.Tensor:
    """Tokens of a network with registers put behind CLS without a position, from one without."""
    with torch.no_grad():
        x = plain.patch_embed(vit.normalise(plain, pixels))
        cls, place = plain.cls_token, plain.pos_embed
        if class_position:
            cls, place = cls + place[:, :1], place[:, 1:]
        x = torch.cat([cls.expand(len(x), -1, -1), registers.expand(len(x), -1, -1), x + place], 1)
        x = plain.norm_pre(x)
        for block in plain.blocks:
            x = block(x)
        return plain.norm(x)


@pytest.mark.parametrize("name", [n for n in LAYOUTS if n != REGISTERS])
def test_new_registers_stand_behind_cls_without_a_position(name: str, files: dict[str, Path]) -> None:
    plain, net = (network(starting(name, registers=r), files[name]) for r in (0, 3))
    pixels, added = images(name), net.reg_token.detach()
    assert torch.allclose(tokens(net, pixels), by_hand(plain, pixels, added, True), atol=1e-5)
    assert added.std().item() == pytest.approx(0.02, rel=0.3)
    assert torch.pdist(added[0]).min() > 0.05
    seed = network(starting(name, registers=3, seed=1), files[name]).reg_token
    assert not torch.allclose(added, seed)
    assert torch.equal(plain.pos_embed[:, 1:], net.pos_embed[:, 4:])  # of the patches
    assert torch.equal(plain.pos_embed[:, :1], net.pos_embed[:, :1])
    assert not net.pos_embed[:, 1:4].any()


@pytest.mark.parametrize("name", [n for n in LAYOUTS if n != REGISTERS])
def test_hidden_registers_change_nothing(name: str, files: dict[str, Path]) -> None:
    pixels = images(name)
    plain, more = (loop.snapshot(c := starting(name, registers=r), network(c, files[name])) for r in (0, 3))
    hidden = torch.tensor([[k == "register" for k in more.kinds((SIDE, SIDE))]])
    blind = test_time.without_tokens(more, hidden)
    assert torch.allclose(tokens(blind.net, pixels)[:, ~hidden[0]], tokens(plain.net, pixels), atol=1e-5)
    assert not torch.allclose(tokens(more.net, pixels)[:, ~hidden[0]], tokens(plain.net, pixels), atol=1e-3)


@pytest.mark.parametrize("name", [DEIT, REGISTERS, CLIP])
def test_small_crops_are_seen_as_timm_resizes(name: str, files: dict[str, Path]) -> None:
    net = network(starting(name, registers=4), files[name])
    small = images(name, side=2)
    theirs = deepcopy(net)
    theirs.set_input_size(img_size=(small.shape[-1], small.shape[-1]))
    with torch.no_grad():
        assert torch.allclose(vit.resized(net, small), tokens(theirs, small)[:, 0], atol=1e-5)


def test_the_head_is_kept_where_its_classes_agree(files: dict[str, Path]) -> None:
    kept, fresh = (network(starting(), files[DEIT], n) for n in (1000, 25))
    state = load_file(files[DEIT])
    assert torch.equal(kept.head.weight, state["head.weight"])
    assert fresh.head.weight.shape == (25, 32)
    assert torch.equal(fresh.norm.weight, state["norm.weight"])


@pytest.mark.parametrize("name", [DEIT, DINOV2])
def test_fresh_blocks_leave_the_others(name: str, files: dict[str, Path]) -> None:
    plain, fresh, again = (network(starting(name, **c), files[name]).state_dict() for c in ({}, F5, F5))
    for key, value in plain.items():
        late = key.startswith(("blocks.4", "blocks.5", "blocks.6", "blocks.7"))
        assert torch.equal(value, fresh[key]) != late, key
        assert torch.equal(again[key], fresh[key])
    seed = network(starting(name, seed=1, **F5), files[name]).state_dict()
    assert not torch.equal(seed["blocks.5.mlp.fc1.weight"], fresh["blocks.5.mlp.fc1.weight"])


# --- neurons


def test_zeroed_neurons_are_suppressed_ones(listed: Path, files: dict[str, Path]) -> None:
    chosen = starting(zeroed="register")
    net = network(chosen, files[DEIT])
    for block, numbers in NEURONS.items():
        weight = net.blocks[block - 1].mlp.fc2.weight
        assert sorted(np.flatnonzero((weight == 0).all(0).numpy())) == numbers
        assert net.blocks[block - 1].mlp.fc1.weight.ne(0).any(1).all()
    backbone = registry.load(DEIT, weights=files[DEIT], device="cpu")
    pixels = images(DEIT)
    off = test_time.suppress(backbone, NEURONS)
    with torch.no_grad():
        wanted = off.net.forward_features(off.prepare(pixels))
    assert torch.allclose(tokens(net, pixels), wanted, atol=1e-5)
    assert not torch.allclose(tokens(network(starting(), files[DEIT]), pixels), wanted, atol=1e-3)
    by_file = network(starting(zeroed=str(listed)), files[DEIT]).state_dict()
    assert all(torch.equal(v, by_file[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("dead", [False, True])
def test_dead_neurons_stay_so_and_zeroed_ones_move(dead: bool, listed: Path, files: dict[str, Path]) -> None:
    learner, feed = learner_of(starting(zeroed="register", dead=dead, weight_decay=0.3), files[DEIT])
    optimizer = loop.schedules.optimiser(learner, starting())
    for step in range(3):
        learner(feed.take(step)).backward()
        for block, numbers in NEURONS.items():
            mlp = learner.vit.blocks[block - 1].mlp
            assert bool(mlp.fc2.weight.grad[:, numbers].any()) != dead
            assert not mlp.fc1.weight.grad[numbers].any() or not dead
        optimizer.step()
        optimizer.zero_grad()
    for block, numbers in NEURONS.items():
        mlp = learner.vit.blocks[block - 1].mlp
        for part in (mlp.fc2.weight[:, numbers], mlp.fc1.weight[numbers], mlp.fc1.bias[numbers]):
            assert bool(part.any()) != dead


def test_random_neurons_are_as_many_others(listed: Path, files: dict[str, Path]) -> None:
    found = [start.load(starting(zeroed="random", seed=s), files[DEIT]).neurons for s in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    for drawn in found:
        assert {b: len(n) for b, n in drawn.items()} == {b: len(n) for b, n in NEURONS.items()}
        assert not any(set(n) & set(NEURONS[b]) for b, n in drawn.items())


# --- objectives


@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if o != "distil"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_objective_runs_from_every_layout(name: str, objective: str, files: dict[str, Path]) -> None:
    learner, feed = learner_of(starting(name, objective, registers=4), files[name])
    loss = learner(feed.take(0, captions=learner.captions))
    loss.backward()
    assert math.isfinite(loss.item())
    assert loss.item() > 0
    grads = [p.grad for p in learner.vit.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in grads)
    assert learner.vit.reg_token.grad.any()
    assert torch.equal(learner.published.patch_embed.proj.weight, load_file(files[name])["patch_embed.proj.weight"])
    if objective == "supervised":
        assert learner.vit.num_classes == len(feed.classes)


@pytest.mark.parametrize(("name", "target"), [(DEIT, "logits"), *((n, "features") for n in LAYOUTS)])
def test_a_student_agrees_with_itself(name: str, target: str, files: dict[str, Path]) -> None:
    learner, feed = learner_of(starting(name, target=target), files[name])
    assert learner(feed.take(0)).item() == pytest.approx(0, abs=1e-6)
    agreement = learner.agreement(feed.held(8))
    assert agreement == 1 if learner.vit.num_classes else math.isnan(agreement)
    assert not any(p.requires_grad for p in (*learner.teacher.parameters(), *learner.untouched.parameters()))
    changed, _ = learner_of(starting(name, target=target, registers=4, register_init=1.0, fresh_from=2), files[name])
    assert changed(feed.take(0)).item() > 1e-3
    if learner.vit.num_classes:
        assert changed.agreement(feed.held(8)) < 1


def test_logits_are_compared_by_the_divergence(files: dict[str, Path]) -> None:
    learner, feed = learner_of(starting(fresh_from=8), files[DEIT])
    x = vit.normalise(learner.vit, feed.take(0).pixels)
    with torch.no_grad():
        p, q = (net(x).double().softmax(-1) for net in (learner.untouched, learner.vit))
    assert learner(feed.take(0)).item() == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-4)


def test_features_of_a_teacher_with_a_test_time_register(listed: Path, files: dict[str, Path]) -> None:
    learner, feed = learner_of(starting(target="features", teacher="+tt1", registers=2), files[DEIT])
    pixels = feed.take(0).pixels
    taught = test_time.append(registry.load(DEIT, weights=files[DEIT], device="cpu"), neurons=NEURONS)
    with torch.no_grad():
        wanted = taught.net.forward_features(taught.prepare(pixels))[:, [0, *range(2, 18)]]
    own = tokens(learner.vit, pixels)[:, [0, *range(3, 19)]]
    assert learner(feed.take(0)).item() == pytest.approx(float((own - wanted).square().mean()), rel=1e-4)
    assert learner.untouched is not learner.teacher  # agreement is with the network as it was published
    assert learner_of(starting(target="features", teacher=f"+tt1:{listed}"), files[DEIT])[0].teacher_prefix == 2


@pytest.mark.parametrize("target", ["logits", "features"])
def test_labels_add_the_cross_entropy_of_imagenet(target: str, files: dict[str, Path], photos: str) -> None:
    asked, feed = learner_of(starting(target=target, labels=0.5, fresh_from=7), files[DEIT], photos)
    silent, _ = learner_of(starting(target=target, fresh_from=7), files[DEIT], photos)
    batch = feed.take(0)
    assert asked.numbers == [data.imagenet_numbers([c])[0] for c in feed.classes]
    number = torch.tensor(
        [{"tench": 0, "English springer": 217, "golf ball": 574}[feed.classes[i]] for i in batch.label]
    )
    with torch.no_grad():
        entropy = F.cross_entropy(asked.vit(vit.normalise(asked.vit, batch.pixels)), number)
    assert asked(batch).item() - silent(batch).item() == pytest.approx(0.5 * float(entropy), rel=1e-4)
    best = torch.zeros(len(batch), 1000).scatter(1, number[:, None], 1.0)
    best[0] = best[0].roll(1)  # one image is named wrongly
    asked.vit.forward = lambda _x: best
    assert asked.score(batch) == pytest.approx(1 - 1 / len(batch))


def test_classes_are_numbered_as_imagenet_counts() -> None:
    imagenette = {
        "n01440764": "tench", "n02102040": "English springer", "n02979186": "cassette player", "n03000684": "chain saw",
        "n03028079": "church", "n03394916": "French horn", "n03417042": "garbage_truck", "n03425413": "gas pump",
        "n03445777": "golf ball", "n03888257": "parachute",
    }  # fmt: skip
    numbers = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]
    assert data.imagenet_numbers(list(imagenette)) == data.imagenet_numbers(list(imagenette.values())) == numbers
    assert data.imagenet_numbers(["tench", "crane"]) is None  # a bird and a machine
    assert data.imagenet_numbers(["tench", "red circle"]) is None
    assert data.imagenet_numbers([]) is None


# --- the loop


def same(one: Path, two: Path) -> bool:
    """Whether two runs left the same weights and the same memory of the optimiser."""
    a, b = (load_file(p / "weights.safetensors") for p in (one, two))
    c, d = (torch.load(p / "checkpoint.pt", weights_only=True)["optimizer"]["state"] for p in (one, two))
    moments = all(torch.equal(v, d[i][k]) for i, part in c.items() for k, v in part.items())
    return moments and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.usefixtures("hardly_watched")
@pytest.mark.parametrize(
    ("name", "objective", "changes"),
    [
        (DEIT, "distil", {"registers": 2, "zeroed": "register", "dead": True, "drop_path": 0.2}),
        (DINOV2, "dino", {"registers": 1}),
    ],
)
def test_a_run_goes_on_bit_for_bit(
    name: str, objective: str, changes: dict[str, Any], files: dict[str, Path], listed: Path, tmp_path: Path
) -> None:
    chosen = starting(name, objective, steps=4, **changes)
    whole = train(chosen, tmp_path / "whole", files[name], final=False)
    assert train(chosen, tmp_path / "again", files[name], final=False, minutes=1e-9) is None
    assert train(chosen, tmp_path / "again", files[name], final=False, minutes=1e-9) is None
    assert torch.load(tmp_path / "again" / "checkpoint.pt", weights_only=True)["step"] == 2
    assert same(train(chosen, tmp_path / "again", files[name], final=False), whole)


@pytest.mark.usefixtures("hardly_watched")
def test_a_checkpoint_of_another_start_is_refused(files: dict[str, Path], listed: Path, tmp_path: Path) -> None:
    chosen, out = starting(), tmp_path / "run"
    train(chosen, out, files[DEIT], minutes=1e-9)
    other = written(DEIT, tmp_path / "other.safetensors", seed=2)
    assert "belongs to another recipe (start " in problem(train, chosen, out, other)
    more = neuron_list(registry.load(DEIT, weights=files[DEIT], device="cpu"), tmp_path / "a.json", {1: [1]})
    one = chosen.override(zeroed=str(more))
    train(one, tmp_path / "listed", files[DEIT], minutes=1e-9)
    neuron_list(registry.load(DEIT, weights=files[DEIT], device="cpu"), more, {1: [2]})  # the same file, another neuron
    assert "belongs to another recipe (start " in problem(train, one, tmp_path / "listed", files[DEIT])
    renamed = files[DEIT].rename(files[DEIT].with_name("moved.safetensors"))
    try:  # the same weights at another place
        assert train(chosen, out, renamed, final=False)
    finally:
        renamed.rename(files[DEIT])


@pytest.mark.usefixtures("hardly_watched")
@pytest.mark.parametrize(
    ("name", "registers"), [(DEIT, 0), (DEIT, 3), (DINOV2, 2), (REGISTERS, 4), (CLIP, 2), (MAE, 0)]
)
def test_what_is_kept_loads_again(name: str, registers: int, files: dict[str, Path], tmp_path: Path) -> None:
    seen: list[Any] = []
    real = loop.export.export

    def export(chosen: Recipe, net: Any, *rest: Any) -> Path:
        seen.append(net)
        return real(chosen, net, *rest)

    chosen = starting(name, target="features", registers=registers, steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.export, "export", export)
        out = train(chosen, tmp_path / "run", files[name], final=False)
    loaded, pixels = registry.load(str(out), device="cpu"), images(name)
    assert (loaded.registers, loaded.size) == (registers, (SIDE * patch_of(name),) * 2)
    with torch.no_grad():
        assert torch.equal(loaded.net.forward_features(loaded.prepare(pixels)), tokens(seen[0].eval(), pixels))
    assert loaded.net.num_classes == seen[0].num_classes
    again = start.load(chosen.override(init=str(out)))  # a run may start from it in turn
    assert torch.equal(tokens(vit.build(chosen, 0, again).eval(), pixels), tokens(seen[0], pixels))


def test_the_history_tells_of_the_start(files: dict[str, Path], listed: Path, photos: str, tmp_path: Path) -> None:
    chosen = starting(registers=2, zeroed="register", labels=1.0)
    out = train(chosen, tmp_path / "run", files[DEIT], images=photos)
    log = cache.load_dataset(out / "history.nc")
    assert log["step"].values.tolist() == [0, 3, 6]
    for name in ("agreement", "alike", "accuracy", "marked", "strength", "place", "received", "half", "gone"):
        assert log[name].dims == ("step",), name
    assert ((log["agreement"] >= 0) & (log["agreement"] <= 1)).all()
    assert (abs(log["alike"]) <= 1).all()
    assert log["registers"].dims == ("step", "layer", "register")
    assert log["registers"].shape == (3, 9, 2)
    assert (log["registers"] > 0).all()
    assert set(log["verdict"].values.tolist()) <= set(VERDICTS)
    assert log["neurons"].dims == ("step",)
    facts = json.loads(log.attrs["recipe"])
    assert (facts["init"], facts["zeroed"], facts["registers"]) == (DEIT, "register", 2)
    plain = cache.load_dataset(train(starting(), tmp_path / "plain", files[DEIT], final=False) / "history.nc")
    assert float(plain["agreement"][0]) == 1
    assert "registers" not in plain
    assert "alike" not in plain


@pytest.mark.usefixtures("hardly_watched")
def test_what_the_student_is_compared_with_is_never_rounded(files: dict[str, Path], tmp_path: Path) -> None:
    train(starting(), tmp_path / "run", files[DEIT], final=False)
    kept = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["learner"]
    state = load_file(files[DEIT])
    assert all(torch.equal(kept[f"untouched.{k}"], v) for k, v in state.items() if k != "pos_embed")
    assert torch.equal(kept["vit.norm.weight"], kept["vit.norm.weight"].half().float())


# --- the command


def test_the_command_trains_some_of_the_images_again(
    files: dict[str, Path], photos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", "regrow-kept", "size=femto", "image_size=32", "steps=2", "batch=4", "augment=false"]
    options = ["--images", photos, "--count", "80", "--weights", str(files[DEIT])]
    assert main([*words, *options, "--device", "cpu", "--out", "one"]) == 0
    card = json.loads(Path("one/recipe.json").read_text())
    assert card["images"]["trained"] == 80 - data.LEAST
    assert card["command"].split() == ["vitregs", *words, *options]
    assert f"`{card['command']}`" in Path("one/README.md").read_text()
    assert main([*card["command"].split()[1:], "--device", "cpu", "--out", "two"]) == 0
    assert same(Path("one"), Path("two"))
    log = cache.load_dataset(Path("one/history.nc"))
    assert "verdict" not in log  # 16 images of 4 patches are too few to be judged
    assert log["agreement"].dims == ("step",)


def test_commands_name_files_whole() -> None:
    chosen = recipe("regrow-zeroed")
    assert command(chosen) == "vitregs train regrow-zeroed"
    assert command(chosen, count=9, weights="my w.pt") == "vitregs train regrow-zeroed --count 9 --weights 'my w.pt'"
    listed = loop.recipes.parse(chosen, ["zeroed=lists/mine.json"])
    assert command(listed) == "vitregs train regrow-zeroed zeroed=lists/mine.json"
    from_file = loop.recipes.parse(recipe("supervised-pico"), ["init=deit_tiny_patch16_224@/a/b.pth"])
    assert "init=deit_tiny_patch16_224@/a/b.pth" in command(from_file)
    assert loop.recipes.parse(recipe("supervised-pico"), command(from_file).split()[3:]) == from_file


def test_count_is_of_images(photos: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    scenes = ["train", "supervised-pico", "--count", "80", "--out", str(tmp_path / "run")]
    assert main(scenes) == 2
    assert "scenes are drawn anew in every step: leave out count" in capsys.readouterr().err
    assert main(["train", "mae-pico", "--images", photos, "--count", "0"]) == 2
    assert "--count must be 1 or more, not 0" in capsys.readouterr().err
    assert main(["train", "mae-pico", "--images", photos, "--count", "70", "--out", str(tmp_path / "run")]) == 2
    assert "has 70 images: too few" in capsys.readouterr().err


# --- what is refused


def refused(name: str, files: dict[str, Path], **changes: Any) -> str:
    return problem(start.load, starting(name, **changes), files[name])


def test_other_registers_are_refused(files: dict[str, Path]) -> None:
    for wrong in (0, 2):
        message = refused(REGISTERS, files, registers=wrong)
        assert message == f"{REGISTERS} has 4 registers: give registers=4, not {wrong}"


def test_another_shape_is_refused(files: dict[str, Path]) -> None:
    assert refused(DEIT, files, size="nano").endswith("give size=femto patch_size=16")
    message = refused(DINOV2, files, patch_size=8)
    assert "width 32, depth 8, 1 heads and patches of 14 pixels: give size=femto patch_size=14" in message


def test_neurons_that_are_not_there_are_refused(files: dict[str, Path], listed: Path, tmp_path: Path) -> None:
    assert "no register neurons of vit_small_patch14_dinov2 are stored" in refused(DINOV2, files, zeroed="register")
    assert "zeroed=FILE" in refused(DINOV2, files, zeroed="random")
    message = refused(DEIT, files, zeroed="registers")
    assert message == "zeroed is none, register, random or the file of a neuron list: there is no 'registers'"
    wrong = tmp_path / "wrong.json"
    for neurons in ({9: [1]}, {2: [128]}, {2: [-1]}):
        test_time.NeuronList(DEIT, neurons, {b: [1.0] for b in neurons}, {}).write(wrong)
        assert "belongs to other weights" in refused(DEIT, files, zeroed=str(wrong))
    other = written(DEIT, tmp_path / "other.safetensors", seed=2)
    neuron_list(registry.load(DEIT, weights=other, device="cpu"), wrong)
    assert "belongs to other weights" in refused(DEIT, files, zeroed=str(wrong))
    wrong.write_text("[]")
    assert "is no list of register neurons" in refused(DEIT, files, zeroed=str(wrong))


def test_networks_that_cannot_be_trained_on_are_refused(files: dict[str, Path]) -> None:
    distilled, siglip = OTHERS[:2]
    assert refused(distilled, files) == (
        f"{distilled} (VisionTransformerDistilled) cannot be trained on: it is no plain ViT of timm"
    )
    assert refused(siglip, files) == f"{siglip} cannot be trained on: it has no CLS token"


def test_weights_and_names_that_do_not_fit_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    plain = starting(objective="supervised").override(init="")
    assert "--weights are of the network that a run starts from" in problem(start.load, plain, files[DEIT])
    assert start.load(plain) is None
    message = problem(start.load, starting(init=f"{DEIT}+zero1"), files[DEIT])
    assert message == f"a run starts from a network as it is: init={DEIT} (distil takes teacher=+zero1)"
    assert "does not fit" in problem(start.load, starting(), files[DINOV2])
    assert "nowhere" in problem(start.load, starting(), tmp_path / "nowhere.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_scale": 1e-4}, f"layer_scale is that of {DEIT}: leave it out"),
        ({"dead": True}, "dead is of zeroed neurons: zeroed=register"),
        ({"fresh_from": 9}, "fresh_from must be 0 or one of blocks 1 to 8, not 9"),
        ({"init": ""}, "distil needs a network to agree with: name it, as init=deit_tiny_patch16_224"),
        ({"target": "words"}, "target"),
        ({"teacher": "tt1"}, "teacher is the ending of a network's name, as +tt1, not 'tt1'"),
        ({"labels": -1.0}, "labels must be 0 or more, not -1.0"),
        ({"objective": "mae", "init": "", "fresh_from": 2}, "zeroed and fresh_from change a trained network: name it"),
        ({"objective": "mae", "init": "", "zeroed": "register"}, "zeroed and fresh_from change a trained network"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    assert message in problem(starting().override, **changes)


def test_distillation_that_cannot_be_asked(files: dict[str, Path], photos: str, tmp_path: Path) -> None:
    assert "has no head to distil: give target=features" in problem(
        learner_of, starting(DINOV2, target="logits"), files[DINOV2]
    )
    message = "labels need classes that the head of "
    assert message in problem(learner_of, starting(labels=1.0), files[DEIT])  # scenes
    assert message in problem(learner_of, starting(MAE, labels=1.0), files[MAE], photos)
    bare = tmp_path / "bare"
    bare.mkdir()
    for i in range(80):
        Image.new("RGB", (16, 16), (i, i, i)).save(bare / f"{i}.png")
    assert "distil training needs labels: 80 of 80 images" in problem(
        learner_of, starting(labels=1.0), files[DEIT], str(bare)
    )
    assert "has 4 registers" in problem(learner_of, starting(REGISTERS, teacher="+zero1"), files[REGISTERS])
