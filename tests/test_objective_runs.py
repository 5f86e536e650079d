"""Every objective through the loop, without and with registers: it learns, resumes exactly, and runs on several processes."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vitregs import cache
from vitregs.errors import InputError
from vitregs.models import registry
from vitregs.train import data, evaluation, export, learners, loop, monitor, schedules, throughput
from vitregs.train.config import Recipe, parse
from vitregs.train.recipes import recipe

CPU = torch.device("cpu")
SMALL = {"size": "femto", "image_size": 32, "steps": 12, "batch": 8, "warmup": 2, "lr": 2e-3, "precision": "fp32"}
OBJECTIVES = ("supervised", "clip", "mae", "dino", "dinov2")
OWN: dict[str, dict[str, object]] = {
    "supervised": {},
    "clip": {"text_width": 32, "text_depth": 1, "embed": 16},
    "mae": {"decoder_width": 32, "decoder_depth": 1},
    "dino": {"local_size": 16, "prototypes": 64, "hidden": 32, "bottleneck": 16, "freeze_last": 0.0},
    "dinov2": {
        "local_size": 16,
        "prototypes": 64,
        "patch_prototypes": 64,
        "hidden": 32,
        "bottleneck": 16,
        "freeze_last": 0.0,
    },
}


pytestmark = pytest.mark.usefixtures("little_to_watch")


def small(objective: str, **changes: object) -> Recipe:
    return recipe(f"{objective}-pico").override(**{**SMALL, **OWN[objective], "name": f"{objective}-small", **changes})


def train(chosen: Recipe, out: Path, **more: object) -> Path | None:
    more = {"device": "cpu", "every": 4, "report": lambda _line: None, **more}
    return loop.train(chosen, out=out, **more)


def same_weights(one: Path, two: Path) -> bool:
    a, b = (load_file(p / "weights.safetensors") for p in (one, two))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and torch.equal(moments(one), moments(two))


def moments(out: Path) -> torch.Tensor:
    """What the optimiser remembers at the end of a run, which is not rounded as the weights are."""
    state = torch.load(out / "checkpoint.pt", weights_only=True)["optimizer"]["state"]
    return torch.cat([v.flatten() for part in state.values() for v in part.values()])


# --- every objective


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_it_learns_resumes_exactly_and_loads(
    objective: str, registers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = small(objective, registers=registers)
    whole = train(chosen, tmp_path / "zoo" / chosen.name)
    real, calls = schedules.apply, []

    def apply(*args: object) -> None:
        calls.append(args[-1])
        if len(calls) == 7:
            raise KeyboardInterrupt
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(schedules, "apply", apply)
        with pytest.raises(KeyboardInterrupt):
            train(chosen, tmp_path / "again")
    assert same_weights(train(chosen, tmp_path / "again"), whole)
    log = cache.load_dataset(whole / "history.nc")
    assert np.isfinite(log["loss"].values[1:]).all()
    if objective in ("supervised", "mae"):
        assert log["loss"].values[-1] < 0.9 * log["loss"].values[1]
    assert log["knn"].notnull().all()
    assert log["accuracy"].notnull().all() == (objective in ("supervised", "clip"))
    assert log["sink"].sel(kind="register").notnull().all() == bool(registers)
    assert (log["kurtosis"] > 1).all()
    assert log["separation"].notnull().all()  # 256 tokens are enough for the rule
    monkeypatch.setattr(registry, "ZOO", tmp_path / "zoo")
    loaded = registry.load(chosen.name, device="cpu")
    assert (loaded.registers, loaded.size) == (registers, (32, 32))
    card = json.loads((whole / "recipe.json").read_text())
    assert card["recipe"]["objective"] == objective
    assert card["linear"].keys() == card["linear_untrained"].keys() == {"colour", "shape"}
    assert (whole / "README.md").read_text() == export.describe(card, log)
    assert f"| objective | {objective} |" in (whole / "README.md").read_text()


@pytest.mark.parametrize("objective", ["clip", "dino", "dinov2"])
def test_the_loss_falls_on_what_is_seen_again(objective: str) -> None:
    """On one batch with the same views; the teacher's centre and momentum stand still, so that the goal does not move."""
    chosen = small(objective)
    feed = data.make(chosen, CPU)
    learner = learners.learner(chosen, feed)
    batch = feed.take(0, captions=learner.captions)
    optimizer = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(30):
        if hasattr(learner, "loss"):
            learner.loss.center.zero_()
        torch.manual_seed(0)
        loss = learner(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bfloat16_trains_too(objective: str, tmp_path: Path) -> None:
    out = train(small(objective, precision="bf16", steps=3), tmp_path / "run")
    assert np.isfinite(cache.load_dataset(out / "history.nc")["loss"].values[1:]).all()


def test_drop_path_leaves_the_teacher_alone(tmp_path: Path) -> None:
    """Resumption with random depth: the same draws in every step, a teacher that never drops."""
    chosen = small("dino", drop_path=0.3, steps=6)
    learner = learners.learner(chosen, data.make(chosen, CPU))
    assert learner.training
    assert not learner.teacher.training
    whole = train(chosen, tmp_path / "one", every=100)
    assert train(chosen, tmp_path / "two", minutes=1e-9) is None
    assert same_weights(train(chosen, tmp_path / "two", every=100), whole)


# --- several processes

CHILD = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from vitregs.train import config, evaluation, loop, recipes
loop.WATCHED, loop.SCORED, loop.QUERIES, loop.BANK, evaluation.PROBED = 16, 16, 16, 16, 48
chosen = config.parse(recipes.recipe(sys.argv[2]), sys.argv[3:]).override(name="run")
print("gave", loop.train(chosen, out=Path(sys.argv[1]), device="cpu", every=4))
"""


@pytest.mark.parametrize("objective", ["clip", pytest.param("supervised", marks=pytest.mark.nightly)])
def test_two_processes_give_the_losses_of_one(objective: str, tmp_path: Path) -> None:
    """Same batch, cut in two; CLIP's captions are told apart across both. Sums in another order differ in the last digits."""
    message = ["size=femto", "image_size=32", "steps=4", "batch=8", "warmup=2", "precision=fp32"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    start = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    command = [sys.executable, *start, str(script), str(tmp_path / "out2"), f"{objective}-pico", *message]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("gave") == 2
    assert done.stdout.count("step 4/4") == 1  # one of them speaks
    train(parse(recipe(f"{objective}-pico"), message).override(name="run"), tmp_path / "out1")
    one, two = (cache.load_dataset(tmp_path / f"out{n}" / "history.nc") for n in (1, 2))
    np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-4)
    np.testing.assert_allclose(one["median"], two["median"], rtol=1e-3)


def test_a_batch_that_does_not_divide() -> None:
    assert data.rows(8, 1, 4) == slice(2, 4)
    with pytest.raises(InputError, match="batch 9 is not a multiple of the 2 processes"):
        data.rows(9, 0, 2)


def test_processes_share_the_batch_of_one() -> None:
    feed = data.make(small("supervised"), CPU)
    whole = feed.take(3).pixels
    assert torch.equal(torch.cat([feed.take(3, rank=r, world=4).pixels for r in range(4)]), whole)


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="torchrun chooses the GPUs"):
        train(small("mae"), tmp_path / "run", device="cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="there are 1 GPUs for 2 processes"):
        train(small("mae"), tmp_path / "run", device="cuda")


# --- measuring while training


def test_the_emergence_rule() -> None:
    """Both conditions, in one block other than the patch embedding."""

    def log(top1: list[float], separation: list[float]) -> object:
        names = {"top1": top1, "separation": separation, "share": [0.02] * len(top1)}
        import xarray as xr

        return xr.Dataset(
            {k: (("step", "layer"), np.array([v], np.float32)) for k, v in names.items()},
            coords={"layer": range(len(top1))},
        )

    assert monitor.emerged(log([1, 4.0, 1], [0, 3.0, 0]))
    assert not monitor.emerged(log([1, 3.9, 1], [0, 9, 0]))
    assert not monitor.emerged(log([1, 9, 1], [0, 2.9, 0]))
    assert not monitor.emerged(log([1, 9, 1], [0, 0, 9]))  # in different blocks
    assert not monitor.emerged(log([9, 1, 1], [9, 0, 0]))  # the patch embedding
    assert not monitor.emerged(log([1, 9, 1], [np.nan] * 3))
    assert monitor.strongest(log([9, 1.5, 1.2], [9, 0, 0]))["layer"] == 1
    assert dict(monitor.strongest(log([1, 5, 4.5], [0, 1, 4]))) == pytest.approx(
        {"layer": 2, "top1": 4.5, "separation": 4, "share": 0.02}
    )


def test_planted_outliers_are_seen_while_training() -> None:
    """A network whose third block writes a large vector on two patches of each image."""
    chosen = small("supervised", image_size=64)
    learner = learners.learner(chosen, data.make(chosen, CPU))
    backbone = loop.snapshot(chosen, learner.vit)
    pixels = data.make(chosen, CPU).held(16).pixels
    plain = monitor.measure(backbone, pixels)

    def write(_module: object, _x: object, y: torch.Tensor) -> torch.Tensor:
        y = y.clone()
        y[:, 1 + torch.tensor([3, 40]), :2] += 60
        return y

    backbone.net.blocks[2].register_forward_hook(write)
    found = monitor.measure(backbone, pixels)
    for name in ("top1", "kurtosis", "separation", "share"):
        assert found[name][:3] == plain[name][:3]
    assert min(found["top1"][3:]) > 4
    assert min(found["separation"][3:]) > 3
    assert found["share"][3] == pytest.approx(2 / 64, abs=0.005)
    assert found["kurtosis"][3] > 1.2 * plain["kurtosis"][3]  # two of 32 channels


def test_kurtosis_by_hand() -> None:
    chosen = small("supervised")
    learner = learners.learner(chosen, data.make(chosen, CPU))
    backbone = loop.snapshot(chosen, learner.vit)
    pixels = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        net = backbone.net
        x = net._pos_embed(net.patch_embed((pixels - 0.42) / 0.25))[:, 1:].flatten(0, 1).double().numpy()
    z = (x - x.mean(0)) / x.std(0, ddof=1)
    assert monitor.measure(backbone, pixels)["kurtosis"][0] == pytest.approx((z**4).mean(), rel=1e-3)


def test_knn_on_planted_features(monkeypatch: pytest.MonkeyPatch) -> None:
    held = data.make(small("supervised"), CPU).held(200)
    bank, queries = held.split(0.5)
    assert (len(bank), len(queries)) == (100, 100)
    chosen = small("supervised")
    backbone = loop.snapshot(chosen, learners.learner(chosen, data.make(chosen, CPU)).vit)
    known = {id(bank.pixels): bank.label, id(queries.pixels): queries.label}
    hot = torch.eye(64)
    monkeypatch.setattr(evaluation, "features", lambda _b, pixels: hot[known.get(id(pixels), bank.label)])
    there = torch.isin(queries.label, bank.label)
    assert evaluation.knn(backbone, bank, queries, 1) >= float(there.float().mean())
    unlabelled = data.Batch(bank.pixels, torch.full((100,), -1), torch.zeros_like(bank.labels))
    assert np.isnan(evaluation.knn(backbone, unlabelled, queries))


def test_a_linear_classifier_finds_what_is_there_and_nothing_else() -> None:
    torch.manual_seed(0)
    label = torch.arange(400) % 4
    x = torch.randn(400, 10)
    assert (evaluation.linear(x[:300], label[:300], x[300:]) == label[300:]).float().mean() < 0.45
    x[:, :4] += 6 * torch.eye(4)[label]
    assert (evaluation.linear(x[:300], label[:300], x[300:]) == label[300:]).float().mean() > 0.97


def test_operations_are_counted_on_a_copy() -> None:
    """Against the count by hand: forward and backward of all matrix products are three times the forward."""
    chosen = small("supervised")
    feed = data.make(chosen, CPU)
    learner = learners.learner(chosen, feed)
    before = {k: v.clone() for k, v in learner.state_dict().items()}
    few = feed.held(4)
    found = throughput.operations(learner, lambda twin: twin(few), 4)
    assert all(torch.equal(before[k], v) for k, v in learner.state_dict().items())
    assert all(p.grad is None for p in learner.parameters())
    tokens, width, depth = 17, 32, 8
    blocks = depth * (24 * tokens * width**2 + 4 * tokens**2 * width)
    embeddings, head = 2 * 16 * width * 3 * 64, 2 * width * 64
    assert found == pytest.approx(3 * (blocks + head) + 2 * embeddings, rel=0.05)  # pixels need no gradient


def test_the_meter() -> None:
    assert throughput.peak(CPU, torch.float32) > 1e9
    bar = throughput.Bar("x", 0, 10, 4, 2e9, 1e12, False)
    for _ in range(3):
        bar.advance(0.5)
    bar.pause()
    still = bar.rate()
    time.sleep(0.02)
    assert bar.rate() == still > 0  # a look is no training
    assert bar.utilisation() == pytest.approx(bar.rate() * 2e9 / 1e12, rel=0.5)
    bar.close()


# --- large weights come in pieces


def test_weights_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "LARGEST", "100KB")
    chosen = small("supervised", steps=1)
    out = train(chosen, tmp_path / "zoo" / chosen.name)
    pieces = export.files(out)
    assert len(pieces) > 2
    assert max(p.stat().st_size for p in pieces) < 120_000
    monkeypatch.setattr(registry, "ZOO", tmp_path / "zoo")
    loaded = registry.load(chosen.name, device="cpu").net.state_dict()
    state = torch.load(out / "checkpoint.pt", weights_only=True)["learner"]
    assert all(torch.equal(loaded[k.removeprefix("vit.")], v) for k, v in state.items())
    pieces[1].unlink()
    with pytest.raises(InputError, match="does not have the hash in its recipe"):
        registry.load(chosen.name, device="cpu")
    monkeypatch.setattr(export, "LARGEST", "16MB")
    train(chosen, out)
    assert [p.name for p in export.files(out)] == ["weights.safetensors"]
