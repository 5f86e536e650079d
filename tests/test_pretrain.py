"""Training: recipes, schedule and first step against formulas, resumption bit for bit, faults, and the zoo it filled."""

import contextlib
import errno
import json
import math
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from vitregs import cache
from vitregs.data import images, scenes
from vitregs.errors import InputError
from vitregs.models import registry
from vitregs.train import data, evaluation, export, learners, loop, monitor, precision, schedules, vit
from vitregs.train.config import OBJECTIVES, Mae, Recipe, parse
from vitregs.train.recipes import RECIPES, WANTED, command, recipe

TINY = recipe("supervised-pico").override(
    name="tiny", steps=12, batch=2, image_size=32, patch_size=8, precision="fp32", warmup=3
)
FEW = {"WATCHED": 8, "SCORED": 16, "QUERIES": 16, "BANK": 16}
WATCHED = FEW["WATCHED"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def little_to_watch() -> Iterator[None]:
    """Fewer held-out scenes, so that a look at the network takes no time."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in FEW.items():
            patch.setattr(loop, name, value)
        patch.setattr(evaluation, "PROBED", 48)
        yield


def silent(_line: str) -> None:
    return


def train(chosen: Recipe, out: Path, report: Callable[[str], None] = silent, every: int = 4, **more) -> Path:
    return loop.train(chosen, out=out, device="cpu", compiled=False, every=every, report=report, **more)


def problem(call, *args: object, **kw: object) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **kw)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "weights.safetensors")


def moments(out: Path) -> torch.Tensor:
    """What the optimiser remembers at the end of a run, which is not rounded as the weights are."""
    state = torch.load(out / "checkpoint.pt", weights_only=True)["optimizer"]["state"]
    return torch.cat([v.flatten() for part in state.values() for v in part.values()])


def log(out: Path) -> xr.Dataset:
    """The history of a run, without the clock."""
    return cache.load_dataset(out / "history.nc").drop_vars(["seconds", "watching"]).drop_attrs()


def same(one: Path, two: Path) -> None:
    a, b = weights(one), weights(two)
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []
    assert torch.equal(moments(one), moments(two))
    xr.testing.assert_identical(log(one), log(two))
    clock = ("minutes", "provenance", "images_per_second", "utilisation")
    first, second = (json.loads((p / "recipe.json").read_text()) for p in (one, two))
    assert {k: v for k, v in first.items() if k not in clock} == {k: v for k, v in second.items() if k not in clock}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that nothing interrupted, by precision."""
    folder = tmp_path_factory.mktemp("whole")
    return {p: train(TINY.override(precision=p), folder / p) for p in ("fp32", "bf16")}


# --- recipes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": "pica"}, "did you mean 'pico'"),
        ({"objective": "supervized"}, "did you mean 'supervised'"),
        ({"objective": "mae", "masked": 1.0}, "masked must leave some of 16 patches visible"),
        ({"objective": "mae", "masked": 0.0}, "masked must leave some of 16 patches visible"),
        ({"objective": "mae", "decoder_width": 63}, "decoder_width 63 is not a multiple of decoder_heads 2"),
        ({"objective": "clip", "batch": 1}, "clip needs a batch of 2 or more"),
        ({"objective": "clip", "text_width": 65}, "text_width 65 is not a multiple"),
        ({"objective": "dino", "local_size": 20}, "local size 20 is not a multiple of the patch size 8"),
        ({"objective": "dino", "local_size": 40}, "local size 40 is larger than the image (32)"),
        ({"objective": "dino", "local_crops": -1}, "local_crops must be 0 or more"),
        ({"objective": "dino", "momentum": 1.5}, "momentum must lie within 0 to 1, not 1.5"),
        ({"objective": "dino", "teacher_temp": 0.0}, "teacher_temp must be positive"),
        ({"objective": "dino", "masked": 0.5}, "unknown recipe setting 'masked'"),
        ({"objective": "dinov2", "image_size": 16, "local_size": 8}, "of 4 patches is none"),
        ({"objective": "dinov2", "masked_least": 0.6}, "masked_least 0.6 is above masked_most 0.5"),
        ({"objective": "dinov2", "batch": 1, "masked_pictures": 0.1}, "leaves no masked image"),
        ({"objective": "clip", "pool": "avg"}, "clip reads the CLS token"),
        ({"loss": "mse"}, "unknown loss 'mse'"),
        ({"beta2": 1.0}, "beta2 must be below 1"),
        ({"seed": 2**40}, "seed below 2^40"),
        ({"objective": "mae", "masked": math.nan}, "masked must lie within 0 to 1"),
        ({"objective": "mae", "decoder_width": 66}, "not a multiple of decoder_heads 2 and 4"),
        ({"objective": "dinov2", "koleo": math.nan}, "koleo must be 0 or more"),
        ({"objective": "dino", "patch_size": 2, "local_size": 4}, "too small to be blurred"),
        ({"pool": "max"}, "pool must be token or avg"),
        ({"drop_path": 2.0}, "drop_path must lie within 0 to 1"),
        ({"image_size": 33}, "image size 33 is not a multiple of the patch size 8"),
        ({"patch_size": 0}, "patch_size must be positive, not 0"),
        ({"precision": "fp16"}, "precision must be bf16 or fp32"),
        ({"steps": 0}, "steps must be positive"),
        ({"batch": -1}, "batch must be positive"),
        ({"lr": math.nan}, "lr must be positive, not nan"),
        ({"lr": math.inf}, "lr must be positive, not inf"),
        ({"clip": -1.0}, "clip must be positive"),
        ({"weight_decay": -0.1}, "weight_decay must be 0 or more"),
        ({"registers": -1}, "registers must be 0 or more"),
        ({"seed": -1}, "seed must be 0 or more"),
        ({"layer_scale": 0.0}, "layer_scale must be positive or none"),
        ({"step": 3}, "unknown recipe setting 'step': did you mean 'steps'"),
    ],
)
def test_recipes_that_make_no_sense(change: dict, message: str) -> None:
    assert message in problem(TINY.override, **change)


def test_settings_in_words() -> None:
    message = ["steps=7", "lr=5e-4", "precision=bf16", "layer_scale=1e-4", "registers=2"]
    made = parse(TINY, message)
    assert made.name == "tiny-steps7-lr0.0005-precisionbf16-layer_scale0.0001-reg2"  # a folder of its own
    assert (made.steps, made.lr, made.precision, made.layer_scale, made.registers) == (7, 5e-4, "bf16", 1e-4, 2)
    assert parse(made, ["layer_scale=none"]).layer_scale is None
    assert parse(TINY, []) == TINY
    assert parse(TINY, ["steps=12"]) == TINY
    assert parse(TINY, ["patch_norm=true"]).patch_norm is True
    assert "patch_norm takes bool, not 'yes'" in problem(parse, TINY, ["patch_norm=yes"])
    assert parse(TINY.override(objective="mae"), ["masked=0.5"]).objective == Mae(masked=0.5)
    assert "steps takes int, not '1e3'" in problem(parse, TINY, ["steps=1e3"])
    assert "steps takes int, not ''" in problem(parse, TINY, ["steps"])
    assert "lr takes float, not 'fast'" in problem(parse, TINY, ["lr=fast"])
    for word in ("name=x", "about=x", "difficulty=1", "objective=mae", "stepz=3", "masked=0.5"):
        assert "unknown recipe setting" in problem(parse, TINY, [word])


def test_known_recipes() -> None:
    assert "did you mean 'supervised-pico'" in problem(recipe, "supervised-pic")
    for name, found in RECIPES.items():
        assert found.name == name
        assert recipe(name) == found
        assert len(found.about) > 20
        assert "about" not in found.facts()
        assert json.loads(json.dumps(found.facts()))["difficulty"]["objects"] == list(found.difficulty.objects)
    assert {r.objective.name for r in RECIPES.values()} == set(OBJECTIVES)
    assert (recipe("mae-pico-reg16-seed3").registers, recipe("mae-pico-reg16-seed3").seed) == (16, 3)
    assert recipe("mae-pico-seed3") == recipe("mae-pico").override(name="mae-pico-seed3", seed=3)


def test_wanted_runs_are_recipes() -> None:
    names = [run.recipe.name for run in WANTED]
    assert len(set(names)) == len(names)
    assert names[0] == "tinyimagenet-tiny"
    assert all(len(run.why) > 5 for run in WANTED)
    assert all(
        ("GPU" in run.price, "CPU" in run.price) == (run.device == "cuda", run.device == "cpu") for run in WANTED
    )


@pytest.mark.parametrize("name", list(RECIPES))
def test_pairs_differ_in_their_registers_alone(name: str) -> None:
    plain, with_registers = recipe(name), recipe(f"{name}-reg4")
    differ = {k for k, v in plain.facts().items() if with_registers.facts()[k] != v}
    assert differ == {"name", "registers"}
    assert (plain.registers, with_registers.registers) == (0, 4)
    nets = [vit.build(r.override(size="femto")).state_dict() for r in (plain, with_registers)]
    assert nets[1].pop("reg_token").shape == (1, 4, 32)
    assert nets[0].keys() == nets[1].keys()
    assert [k for k in nets[0] if not torch.equal(nets[0][k], nets[1][k])] == []


# --- schedule and optimiser


def test_learning_rate_against_the_curve() -> None:
    long = TINY.override(steps=1000, warmup=100, lr=0.5)
    rate = [schedules.learning_rate(long, s) for s in range(1001)]
    assert rate[0] == pytest.approx(0.005)
    assert np.allclose(np.diff(rate[:100]), 0.005)
    assert rate[99] == rate[100] == pytest.approx(0.5)
    assert rate[550] == pytest.approx(0.5 * (0.01 + 0.99 / 2))
    assert rate[1000] == pytest.approx(0.005)
    assert (np.diff(rate[100:]) < 0).all()
    quarter = 0.5 * (0.01 + 0.99 * (2 + math.sqrt(2)) / 4)
    assert rate[325] == pytest.approx(quarter)


@given(steps=st.integers(1, 300), warmup=st.integers(1, 400), part=st.floats(0, 1))
def test_learning_rate_is_always_usable(steps: int, warmup: int, part: float) -> None:
    chosen = TINY.override(steps=steps, warmup=warmup)
    assert 0 < schedules.learning_rate(chosen, int(part * steps)) <= chosen.lr * (1 + 1e-9)


def test_weight_decay_is_for_matrices() -> None:
    net = vit.build(TINY.override(registers=2, layer_scale=1e-4), 64)
    decaying, free = schedules.optimiser(net, TINY).param_groups
    name = {id(p): n for n, p in net.named_parameters()}
    kinds = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    matrices = {f"blocks.{i}.{k}.weight" for i in range(8) for k in kinds}
    assert {name[id(p)] for p in decaying["params"]} == matrices | {"patch_embed.proj.weight", "head.weight"}
    assert {name[id(p)] for p in free["params"]} == set(name.values()) - {name[id(p)] for p in decaying["params"]}
    assert {"cls_token", "reg_token", "pos_embed", "norm.bias", "blocks.0.ls1.gamma"} <= {
        name[id(p)] for p in free["params"]
    }
    assert (decaying["weight_decay"], free["weight_decay"]) == (TINY.weight_decay, 0.0)


def test_first_step_is_adamw_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "halve", lambda _net: None)
    chosen = TINY.override(steps=1, weight_decay=0.5, registers=2, clip=0.05)
    learner = learners.learner(chosen, data.make(chosen, CPU))
    net = learner.vit
    before = {k: v.detach().double() for k, v in net.named_parameters()}
    seen = scenes.render(2, 32, seed=0, first=0, difficulty=chosen.difficulty)
    batch = data.Batch(seen.pixels, seen.label, seen.labels)
    x = net((seen.pixels - 0.42) / 0.25)
    entropy = x.clamp(min=0) - x * seen.labels + torch.log1p(torch.exp(-x.abs()))  # written out
    loss = learner(batch)
    assert entropy.mean().item() == pytest.approx(loss.item(), rel=1e-6)
    loss.backward()
    slope = {k: p.grad.double() for k, p in net.named_parameters()}
    total = math.sqrt(sum(float((g**2).sum()) for g in slope.values()))
    assert total > chosen.clip  # else clipping is not tested
    lr, after = chosen.lr / chosen.warmup, weights(train(chosen, tmp_path / "run"))
    for name, p in before.items():
        g = slope[name] * chosen.clip / (total + 1e-6)
        mean, square = 0.1 * g / (1 - 0.9), 0.05 * g**2 / (1 - 0.95)  # bias is corrected at step 1
        decay = 0.5 if p.ndim > 1 and name not in ("cls_token", "reg_token", "pos_embed") else 0.0
        wanted = p * (1 - lr * decay) - lr * mean / (square.sqrt() + 1e-8)
        assert float((after[name] - wanted).abs().max()) < 2e-7, name
        assert not torch.equal(after[name].double(), p), name


def test_loss_falls(tmp_path: Path) -> None:
    out = train(TINY.override(size="femto", steps=32, batch=8, warmup=4, lr=4e-3), tmp_path / "run", every=8)
    loss = log(out)["loss"].values
    assert np.isnan(loss[0])  # nothing was learned from yet
    assert np.isfinite(loss[1:]).all()
    assert loss[-1] < 0.7 * loss[1]


def test_when_it_looks() -> None:
    assert [s for s in range(101) if monitor.due(s, 100, 40)] == [0, 16, 32, 40, 64, 80, 100]
    assert monitor.due(3, 3, 500)


# --- resumption


def stop(call: Callable, at: int) -> Callable:
    """A function that is interrupted at its nth call."""
    left = [at]

    def run(*args: object, **kw: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return call(*args, **kw)

    return run


@pytest.mark.parametrize(
    ("precision", "place"),
    [("fp32", p) for p in ("step 0", "step 1", "step 4", "step 11", "report 1", "report 3", "save 2")]
    + [("bf16", p) for p in ("step 5", "save 2")],
)
def test_interrupted_training_ends_in_the_same_weights(
    whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, place: str
) -> None:
    what, _, at = place.partition(" ")
    chosen = TINY.override(precision=precision)
    owner, name = {"step": (schedules, "apply"), "save": (torch, "save"), "report": (loop, "line")}[what]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop(getattr(owner, name), int(at)))
        with pytest.raises(KeyboardInterrupt):
            train(chosen, tmp_path / "run")
    assert not (tmp_path / "run" / "weights.safetensors").exists()
    lines: list[str] = []
    same(train(chosen, tmp_path / "run", lines.append), whole[precision])
    assert len(lines) < 4  # it went on, and did not start anew


def test_interrupted_twice_and_finished_twice(whole: dict[str, Path], tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(schedules, "apply", stop(schedules.apply, 6))
            with pytest.raises(KeyboardInterrupt):
                train(TINY, tmp_path / "run")
    same(train(TINY, tmp_path / "run"), whole["fp32"])
    before = (tmp_path / "run" / "weights.safetensors").read_bytes()
    lines: list[str] = []
    same(train(TINY, tmp_path / "run", lines.append), whole["fp32"])
    assert lines == []  # nothing was left to do
    assert (tmp_path / "run" / "weights.safetensors").read_bytes() == before


def test_precision_matters_and_the_seed_too(whole: dict[str, Path], tmp_path: Path) -> None:
    """Else the comparisons above compare nothing."""
    other = weights(train(TINY.override(seed=1), tmp_path / "run"))
    assert not torch.equal(weights(whole["fp32"])["head.weight"], weights(whole["bf16"])["head.weight"])
    assert not torch.equal(weights(whole["fp32"])["head.weight"], other["head.weight"])


def test_restart_forgets_the_checkpoint(whole: dict[str, Path], tmp_path: Path) -> None:
    train(TINY.override(seed=1), tmp_path / "run")
    same(train(TINY, tmp_path / "run", resume=False), whole["fp32"])


CHILD = """
import sys, torch
from pathlib import Path
torch.set_num_threads(int(sys.argv[2]))
from vitregs.train import evaluation, loop, recipes
loop.WATCHED, loop.SCORED, loop.QUERIES, loop.BANK, evaluation.PROBED = 8, 16, 16, 16, 48
chosen = recipes.recipe("supervised-pico").override(
    name="tiny", steps=12, batch=2, image_size=32, patch_size=8, precision="fp32", warmup=3)
loop.train(chosen, out=Path(sys.argv[1]), device="cpu", compiled=False, every=4, report=lambda t: print(t, flush=True))
"""


@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.nightly)])
def test_a_training_that_is_killed_ends_in_the_same_weights(whole: dict[str, Path], tmp_path: Path, kills: int) -> None:
    """Real kills of a real process, each within a step or a save of a random moment; then it may finish."""
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(tmp_path / "run"), str(torch.get_num_threads())]
    moments = [(random.randint(0, 2), random.uniform(0, 0.1)) for _ in range(kills)]
    killed = 0
    for lines, late in moments:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
            for _ in range(lines):
                if not child.stdout.readline():
                    break
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(late)
            child.kill()
            child.communicate()
        killed += child.returncode != 0
        if child.returncode == 0:  # it was done already: once more from the start
            shutil.rmtree(tmp_path / "run")
    assert killed, moments
    same(train(TINY, tmp_path / "run"), whole["fp32"])


def test_a_run_that_is_stopped_in_time(whole: dict[str, Path], tmp_path: Path) -> None:
    lines: list[str] = []
    assert train(TINY, tmp_path / "run", lines.append, minutes=1e-9) is None
    assert "stopped in time at step 1" in lines[-1]
    assert not (tmp_path / "run" / "weights.safetensors").exists()
    for step in (2, 3, 4):  # a step each time
        assert train(TINY, tmp_path / "run", lines.append, minutes=1e-9) is None
        assert f"stopped in time at step {step}" in lines[-1]
    same(train(TINY, tmp_path / "run"), whole["fp32"])


ASKED = """
import sys, torch
torch.set_num_threads(int(sys.argv[2]))
from vitregs import cli
from vitregs.train import evaluation, loop, monitor, recipes, schedules
loop.WATCHED, loop.SCORED, loop.QUERIES, loop.BANK, evaluation.PROBED = 8, 16, 16, 16, 48
recipes.RECIPES["tiny"] = recipes.recipe("supervised-pico").override(
    name="tiny", steps=12, batch=2, image_size=32, patch_size=8, precision="fp32", warmup=3)
monitor.due = lambda step, steps, every: step % 4 == 0
real = schedules.apply
def apply(optimizer, recipe, step):
    if step == 6:
        print("at step 6", flush=True)
        sys.stdin.readline()  # the signal comes meanwhile
    real(optimizer, recipe, step)
schedules.apply = apply
sys.exit(cli.main(["train", "tiny", "--out", sys.argv[1], "--device", "cpu", "--eager"]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_what_was_learned(
    whole: dict[str, Path], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """A real signal within step 6, between two looks: the step is finished and kept, and one line says how to go on."""
    out = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", ASKED, str(out), str(torch.get_num_threads())],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        for message in child.stdout:
            if message.startswith("at step 6"):
                break
        child.send_signal(number)
        _, errors = child.communicate("\n")
    assert child.returncode == code, errors
    predicted = [message for message in errors.splitlines() if message.startswith("vitregs:")]
    assert len(predicted) == 1
    assert "tiny stopped at step 7 of 12" in predicted[0]
    assert "the same command goes on" in predicted[0]
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == 7
    assert not (out / "weights.safetensors").exists()
    same(train(TINY, out), whole["fp32"])


def test_signals_are_given_back(tmp_path: Path) -> None:
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    train(TINY.override(steps=1), tmp_path / "run")
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


# --- faults


def test_a_checkpoint_of_another_recipe_is_left_alone(tmp_path: Path) -> None:
    train(TINY.override(steps=1), tmp_path / "run")
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    assert "belongs to another recipe (steps 1, not 12)" in problem(train, TINY, tmp_path / "run")
    other = TINY.override(steps=1, lr=0.5, name="other")
    assert f"(lr {TINY.lr}, not 0.5; name tiny, not other)" in problem(train, other, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_checkpoints(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "sprung",)

    train(TINY.override(steps=1), tmp_path / "run")
    file = tmp_path / "run" / "checkpoint.pt"
    good = file.read_bytes()
    state = torch.load(file, weights_only=True)
    for damage in (good[: len(good) // 2], b"", b"PK\x03\x04 nothing"):
        file.write_bytes(damage)
        assert "is damaged or no checkpoint" in problem(train, TINY.override(steps=1), tmp_path / "run")
        assert file.read_bytes() == damage
    for other in ([1, 2], {"learner": {}}, {**state, "learner": {}}, {**state, "optimizer": {}}, Trap()):
        torch.save(other, file)
        assert "is damaged or no checkpoint" in problem(train, TINY.override(steps=1), tmp_path / "run")
    assert not (tmp_path / "sprung").exists()


def test_a_full_disk_keeps_the_last_checkpoint(
    whole: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = torch.save, []

    def save(state: dict, file: Path) -> None:
        calls.append(state["step"])
        if state["step"] == 8:
            file.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        assert "checkpoint.pt: No space left on device" in problem(train, TINY, tmp_path / "run")
    assert calls == [0, 4, 8]
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["checkpoint.pt"]
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 4
    same(train(TINY, tmp_path / "run"), whole["fp32"])


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file size are POSIX")
def test_a_disk_that_really_refuses(tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        message = problem(train, TINY, tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot write" in message
    assert list((tmp_path / "run").iterdir()) == []


def test_a_loss_that_explodes(tmp_path: Path) -> None:
    message = problem(train, TINY.override(lr=1e30, warmup=1), tmp_path / "run")
    assert "not finite" in message
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 0
    assert not (tmp_path / "run" / "weights.safetensors").exists()


def test_too_little_memory_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = schedules.apply, [5]

    def apply(*args: object) -> None:
        left[0] -= 1
        if not left[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")
        real(*args)

    monkeypatch.setattr(schedules, "apply", apply)
    message = problem(train, TINY, tmp_path / "run")
    assert message == "the device has too little memory for tiny: lower batch (2), or size (pico)"
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 4


def test_a_folder_that_cannot_be_written_is_seen_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(loop.learners, "learner", lambda *_: pytest.fail("work was begun"))
    assert "cannot write results in" in problem(train, TINY, tmp_path / "file" / "run")


# --- images of one's own


def own_images(folder: Path, count: int = 100, side: int = 16) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return folder


@pytest.mark.parametrize("nested", [False, True])
def test_images_without_labels_still_give_weights(tmp_path: Path, nested: bool) -> None:
    """Alone in a folder they have no label, in a single subfolder all the same one: neither can be scored, both are learned."""
    root = tmp_path / "mine"
    own_images(root / "all" if nested else root)
    chosen = recipe("mae-pico").override(
        name="mine", size="femto", image_size=16, batch=4, steps=2, warmup=1, precision="fp32", decoder_depth=1
    )
    out = train(chosen, tmp_path / "run", images=str(root))
    assert (out / "weights.safetensors").exists()
    card = json.loads((out / "recipe.json").read_text())
    assert card["linear"] == card["linear_untrained"] == {}
    assert card["knn"] is None
    why = "all images have the same label" if nested else "held-out images have a label"
    assert why in card["left_out"]["label"]
    page = (out / "README.md").read_text()
    assert f"There is no linear score of label: {card['left_out']['label']}" in page
    assert "Nor is there a k-NN score" in page


def test_a_score_that_fails_costs_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")

    monkeypatch.setattr(evaluation, "linear", full)
    out = train(TINY.override(steps=1), tmp_path / "run")
    card = json.loads((out / "recipe.json").read_text())
    assert card["left_out"] == dict.fromkeys(("colour", "shape"), "CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert (out / "weights.safetensors").exists()


def test_the_card_names_the_images_and_the_command(tmp_path: Path) -> None:
    mine, message = own_images(tmp_path / "my images"), ["size=femto", "image_size=16", "batch=4", "steps=1"]
    chosen = parse(recipe("mae-pico-reg2"), message)
    out = train(chosen, tmp_path / "run", images=str(mine))
    card = json.loads((out / "recipe.json").read_text())
    assert card["command"] == f"vitregs train mae-pico-reg2 {' '.join(message)} --images '{mine}'"
    assert card["recipe"]["data"] == mine.name
    assert card["images"] == {"trained": 36, "fingerprint": images.open_images(str(mine), size=16).fingerprint}
    page = (out / "README.md").read_text()
    assert f"`{card['command']}`" in page
    assert f"| data | {mine.name} |" in page
    assert card["images"]["fingerprint"] in page
    assert "scenes" not in page
    others = own_images(tmp_path / "others", side=24)
    lines = problem(train, chosen, tmp_path / "run", images=str(others))
    assert "belongs to another recipe (other images)" in lines
    mine.rename(tmp_path / "moved")  # the same images at another place: the run is done already
    train(chosen, tmp_path / "run", images=str(tmp_path / "moved"))


def test_commands_give_the_recipe_back() -> None:
    for name in ("mae-pico", "clip-pico-reg4-seed1"):
        assert command(recipe(name)) == f"vitregs train {name}"
    chosen = parse(recipe("dino-pico"), ["steps=7", "lr=1e-05", "layer_scale=1e-4", "patch_norm=true", "momentum=0.9"])
    message = command(chosen).split()
    assert message[:3] == ["vitregs", "train", "dino-pico"]
    assert parse(recipe(message[2]), message[3:]) == chosen
    assert command(TINY) is None  # its name is no recipe's
    assert command(recipe("mae-pico").override(data="a b")) == "vitregs train mae-pico --images 'a b'"


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    assert "device 'cuda:99' is not available" in problem(loop.train, TINY, out=tmp_path / "run", device="cuda:99")
    assert not (tmp_path / "run").exists()


# --- what a run leaves


def test_history(whole: dict[str, Path]) -> None:
    found = cache.load_dataset(whole["fp32"] / "history.nc")
    assert dict(found.sizes) == {"step": 4, "layer": 9, "bin": 200, "block": 8, "kind": 3}
    assert found["step"].values.tolist() == [0, 4, 8, 12]
    assert found["layer"].values.tolist() == list(range(9))
    assert found["block"].values.tolist() == list(range(1, 9))
    assert found["kind"].values.tolist() == ["cls", "register", "patch"]
    plain = ("loss", "accuracy", "knn", "seconds", "watching")
    assert {k: v.dims for k, v in found.data_vars.items() if k not in plain} == {
        "hist": ("step", "layer", "bin"),
        **dict.fromkeys(monitor.BY_LAYER, ("step", "layer")),
        "sink": ("step", "block", "kind"),
    }
    assert (found["hist"].sum("bin") == 16 * WATCHED).all()
    peak = found["bin"].values[found["hist"].argmax("bin").values]
    assert (np.abs(np.log(peak / found["median"])) < 0.7).all()  # the histogram and the median tell of the same norms
    assert (found["largest"] >= found["top1"]).all()
    assert found["sink"].sel(kind="register").isnull().all()
    assert (found["sink"].sel(kind=["cls", "patch"]) > 0).all()
    assert (np.diff(found["seconds"]) > 0).all()
    assert {"code", "commit", "date", "device", "recipe"} <= found.attrs.keys()


def test_a_published_run_loads_as_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = TINY.override(name="tiny-reg", registers=3, steps=2)
    out = train(chosen, tmp_path / "zoo" / chosen.name)
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "checkpoint.pt",
        "history.nc",
        "recipe.json",
        "weights.safetensors",
    ]
    assert {p.stat().st_mode & 0o777 for p in out.iterdir()} == {0o644}  # for others too
    monkeypatch.setattr(registry, "ZOO", tmp_path / "zoo")
    assert registry.zoo() == ["tiny-reg"]
    loaded = registry.load("tiny-reg", device="cpu")
    assert (loaded.registers, loaded.has_cls, loaded.size, loaded.patch_size) == (3, True, (32, 32), (8, 8))
    assert registry.history("tiny-reg").sizes["step"] == 2
    net = vit.build(chosen, 64)
    state = torch.load(out / "checkpoint.pt", weights_only=True)["learner"]
    net.load_state_dict({k.removeprefix("vit."): v for k, v in state.items()})
    net.eval()
    pixels = scenes.render(5, 32, seed=3).pixels
    with torch.no_grad():
        assert torch.equal(loaded.logits(pixels), net((pixels - 0.42) / 0.25))


def test_what_is_kept_is_what_was_scored(tmp_path: Path) -> None:
    """The weights lie in half precision, and last look, card and checkpoint are of those very numbers."""
    out = train(TINY, tmp_path / "run")
    kept = weights(out)
    assert {v.dtype for v in kept.values()} == {torch.float16}
    card = json.loads((out / "recipe.json").read_text())
    assert card["precision"] == "half"
    assert "| weights, precision | half |" in (out / "README.md").read_text()
    loaded = registry.load(str(out), device="cpu")
    assert {v.dtype for v in loaded.net.state_dict().values()} == {torch.float32}
    feed = data.make(TINY, CPU)
    held = feed.held(FEW["SCORED"] + FEW["BANK"])
    scored, bank = held.split(0.5)
    assert card["knn"] == evaluation.knn(loaded, bank, scored)
    assert card["linear"] == evaluation.final(loaded, feed)[0]
    named = loaded.logits(scored.pixels).argmax(1)
    assert card["accuracy"] == evaluation.right(scored, named)
    last = log(out).isel(step=-1)
    found = monitor.dataset([{**monitor.measure(loaded, scored.pixels[:WATCHED]), **dict.fromkeys(PLAIN, 0.0)}])
    for name in ("hist", "median", "top1", "kurtosis", "sink"):
        np.testing.assert_array_equal(last[name], found[name][0])
    state = torch.load(out / "checkpoint.pt", weights_only=True)["learner"]
    assert all(torch.equal(state[f"vit.{k}"], v.float()) for k, v in kept.items())


PLAIN = ("step", "loss", "accuracy", "knn", "seconds", "watching")


@given(st.floats(-65504, 65504, width=32), st.floats(2.0**17, 2.0**99, width=32))
def test_rounding_to_half_precision(near: float, far: float) -> None:
    """To the nearest number of half precision, but for a tensor with one too large for it."""
    net = torch.nn.ParameterDict({"near": torch.tensor([near, 1.0]), "far": torch.tensor([far, 0.1])})
    net.register_buffer("count", torch.tensor(70_001))
    export.halve(net)
    assert net["near"].tolist() == [float(np.float16(near)), 1.0]
    assert net["far"].tolist() == [far, float(np.float32(0.1))]
    assert net.count == 70_001
    once = {k: v.clone() for k, v in net.state_dict().items()}
    export.halve(net)
    assert all(torch.equal(v, once[k]) for k, v in net.state_dict().items())


def test_only_what_half_precision_holds_is_kept_in_it(tmp_path: Path) -> None:
    out = train(TINY, tmp_path / "run")
    net = vit.build(TINY, 64)
    export.halve(net)
    with torch.no_grad():
        net.norm.weight[0] = 1e6
        net.norm.bias[0] = 0.1
    records = torch.load(out / "checkpoint.pt", weights_only=True)["records"]
    export.export(TINY, net, records, tmp_path / "other", {}, {"linear": {}, "linear_untrained": {}})
    kept = weights(tmp_path / "other")
    assert {k for k, v in kept.items() if v.dtype == torch.float32} == {"norm.weight", "norm.bias"}
    assert json.loads((tmp_path / "other" / "recipe.json").read_text())["precision"] == "half and single"
    loaded = registry.load(str(tmp_path / "other"), device="cpu").net.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in net.state_dict().items())


def test_score_counts_any_class_in_view() -> None:
    seen = scenes.render(70, 32, seed=5)
    chosen = TINY.override(size="femto")
    learner = learners.learner(chosen, data.make(chosen, CPU))
    right, wrong = seen.labels.int().argmax(1), (~seen.labels).int().argmax(1)
    predicted = F.one_hot(torch.where(torch.arange(70) < 35, right, wrong), 64).float()
    given = iter(predicted.split(64))
    learner.vit.forward = lambda _x: next(given)  # names a class in view for the first half, another for the rest
    shown = seen.labels.any(1)[:35].sum()
    found = learner.score(data.Batch(seen.pixels, seen.label, seen.labels))
    assert found == pytest.approx(float(shown) / 70)


def test_the_report_says_how_it_stands() -> None:
    first = {"step": 0, "loss": math.nan, "accuracy": 0.1, "knn": math.nan, "seconds": 3.0, "watching": 0.5}
    first["top1"] = [9.0, 2.5, 2.0]
    then = {**first, "step": 6, "loss": 0.5, "seconds": 5.5}  # half a second of it looked at the network
    assert loop.line(TINY, [first]).endswith("top-1% ratio 2.50 (layer 1)")
    assert "tiny step 6/12  loss 0.5000  accuracy 0.100" in loop.line(TINY, [first, then])
    assert loop.line(TINY, [first, then]).endswith("6 images/s  0 min left")
    assert "  utilisation 41 %  " in loop.line(TINY, [first, then], 0.41)
    assert "images/s" in loop.line(TINY, [first, {**then, "seconds": 3.0}])  # a clock that stands still
    assert "loss" not in loop.line(TINY, [{**first, "loss": math.nan}])  # none before the first step


# --- the zoo


@pytest.mark.parametrize("name", registry.zoo())
def test_a_zoo_entry_is_what_its_card_says(name: str) -> None:
    folder = registry.ZOO / name
    rest = {p.name for p in folder.iterdir()} - {p.name for p in export.files(folder)}
    assert rest - {export.WORDS} == {"README.md", "history.nc", "recipe.json"}
    assert max(p.stat().st_size for p in export.files(folder)) <= 16e6
    card = json.loads((folder / "recipe.json").read_text())
    assert card["weights"] == cache.file_hash(*export.files(folder))
    assert card["precision"] == export.precision({k: v for p in export.files(folder) for k, v in load_file(p).items()})
    facts = json.loads(json.dumps(recipe(name).facts()))
    assert card["recipe"] == {k: facts[k] for k in card["recipe"]}  # settings that came later have their old meaning
    assert (folder / "README.md").read_text() == export.describe(card, cache.load_dataset(folder / "history.nc"))
    backbone = registry.load(name, device="cpu")
    assert (backbone.registers, backbone.size) == (recipe(name).registers, (recipe(name).image_size,) * 2)
    if card["recipe"]["objective"] == "supervised" and recipe(name).data == "scenes":
        held = scenes.render(
            512, backbone.size, seed=recipe(name).seed, first=2**40, difficulty=recipe(name).difficulty
        )
        best = torch.cat([backbone.logits(part) for part in held.pixels.split(64)]).argmax(1)
        accuracy = float(held.labels[torch.arange(512), best].float().mean())
        assert accuracy == pytest.approx(card["accuracy"], abs=0.005)


@pytest.mark.parametrize("name", registry.zoo())
def test_a_zoo_entry_has_its_history(name: str) -> None:
    found, chosen = registry.history(name), recipe(name)
    patches = (chosen.image_size // chosen.patch_size) ** 2
    assert (found["hist"].sum("bin") == patches * 64).all()
    assert found["step"].values[0] == 0
    assert (np.diff(found["step"]) > 0).all()
    assert found["step"].values[-1] <= chosen.steps
    card = json.loads((registry.ZOO / name / "recipe.json").read_text())
    for name in ("accuracy", "knn"):
        value = card.get(name)  # the first pair was not asked for k-NN
        if value is None:
            assert name not in found or found[name].isnull().all()
        else:
            assert float(found[name][-1]) == pytest.approx(value)
    assert json.loads(found.attrs["recipe"]) == card["recipe"]


def test_the_zoo_is_small() -> None:
    assert len(registry.zoo()) >= 2
    assert sum(p.stat().st_size for p in registry.ZOO.rglob("*") if p.is_file()) < 40e6


def test_attention_is_computed_in_single_precision_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = TINY.override(precision="bf16")
    feed = data.make(chosen, CPU)
    learner, heard = learners.learner(chosen, feed), []
    attention = F.scaled_dot_product_attention

    def gradients(precise: str) -> torch.Tensor:
        with precision.computed(CPU, precise):
            loss = learner(feed.take(0))
        loss.backward()
        found = torch.cat([p.grad.flatten() for p in learner.parameters() if p.grad is not None])
        learner.zero_grad(set_to_none=True)
        return found

    single = gradients("fp32")

    class Listen(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is attention:
                heard.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    with Listen():
        half = gradients("bf16")
    assert heard
    assert set(heard) == {torch.float32}
    assert 1e-6 < float((half - single).norm() / single.norm()) < 0.05  # matrices are in half precision
