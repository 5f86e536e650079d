"""One flat, resumable training loop for every objective, on one device or several.

Every step is a function of the recipe and the step number alone (images, learning rate, random state), so that a run
that was killed ends in the same weights, bit for bit, on the same CPU. Several processes are started by `torchrun`.
Behind the last step the network is rounded to half precision, in which it is kept, and then scored.
"""

import dataclasses
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from copy import deepcopy
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import xarray as xr
from torch import nn

from vitregs import cache
from vitregs.data.preparation import Preparation
from vitregs.errors import InputError, Interrupted
from vitregs.measure import mixture
from vitregs.models import registry
from vitregs.models.backbone import Backbone
from vitregs.train import data, evaluation, export, learners, monitor, precision, recipes, schedules, start, throughput
from vitregs.train.config import Recipe

# Held-out images: whose norms are watched; that a head is scored on at the end, and on the way; that k-NN knows
WATCHED, SCORED, QUERIES, BANK = 64, 512, 128, 256
CHECKED = 50  # steps between two looks at the loss: each waits for the device
IN_TIME = 1.0  # why a run stops: its minutes are over; else the number of a signal, which is larger


def _advises(run: Callable[..., Path | None]) -> Callable[..., Path | None]:
    """Turn a lack of device memory into advice."""

    @wraps(run)
    def train(recipe: Recipe, **more: Any) -> Path | None:
        try:
            return run(recipe, **more)
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"the device has too little memory for {recipe.name}: lower batch ({recipe.batch}), or size ({recipe.size})"
            ) from error

    return train


@_advises
def train(
    recipe: Recipe,
    *,
    out: Path,
    device: str = "auto",
    images: str | None = None,
    count: int | None = None,
    read: data.ImageFeed | None = None,
    weights: str | Path | None = None,
    resume: bool = True,
    compiled: bool | None = None,
    every: int | None = None,
    minutes: float | None = None,
    final: bool = True,
    report: Callable[[str], None] = print,
    follow: Callable[[xr.Dataset], None] | None = None,
) -> Path | None:
    """Train a recipe: where to keep checkpoints and the result, device → folder with weights, recipe, history and card.

    `images` names the images to train on in place of `recipe.data`, `count` how many of them are used, `read` images that lie
    in memory already, `weights` a file with the weights of `recipe.init`. `report` hears a line and `follow` sees the history
    whenever the network is looked at. With `minutes` the run stops in time, with a checkpoint, and gives None, as do all
    processes but the first. `final` adds linear scores at the end; what cannot be scored is left out, and the card says why.
    Raises InputError for a checkpoint of another recipe or other images, too little memory on the device, data or a network
    to start from that do not fit, or a disk that cannot be written; the last checkpoint survives. Ctrl-C and SIGTERM stop the
    run behind the step at work, with a checkpoint, and raise Interrupted; a second one stops it at once.
    """
    begun = time.monotonic()
    recipe = recipe.override(data=images) if images else recipe  # the card names what was seen
    rank, world, target = _place(device)
    origin = cache.provenance(device=_named(target))  # of the code that runs, not of what it may become meanwhile
    begin = start.load(recipe, weights)
    feed = data.make(recipe, target, count=count, read=read)
    cache.check_writable(out)
    data.rows(recipe.batch, rank, world)
    recipe.objective.check(dataclasses.replace(recipe, batch=recipe.batch // world))
    learner = learners.learner(recipe, feed, begin).to(target)
    optimizer = schedules.optimiser(learner, recipe)
    file, stamp = out / "checkpoint.pt", _stamp(recipe, feed, world, begin)
    first, records, spent, before, seen = _resume(stamp, file, learner, optimizer) if resume else (0, [], 0.0, 0.0, 0)

    def loss_of(module: nn.Module, batch: data.Batch) -> torch.Tensor:
        with precision.computed(target, recipe.precision):
            return module(batch)

    few = feed.held(4)
    flop = throughput.operations(
        learner, lambda twin: loss_of(twin, few), len(few)
    )  # by all processes: losses may gather
    peak = world * throughput.peak(target, torch.bfloat16 if recipe.precision == "bf16" else torch.float32)
    every = every or max(500, recipe.steps // 12)
    limit = torch._dynamo.config.recompile_limit  # type: ignore[attr-defined]
    torch._dynamo.config.recompile_limit = max(limit, 4 * len(learner.vit.blocks))  # type: ignore[attr-defined]
    if target.type == "cuda" if compiled is None else compiled:  # small ViTs gain nothing from it on a CPU
        for net in (learner.vit, getattr(learner, "teacher", None)):
            for block in net.blocks if net else ():
                block.compile(dynamic=False)  # one block's code serves all that drop paths at the same rate
    run: nn.Module = nn.parallel.DistributedDataParallel(learner) if world > 1 else learner
    watch = _Watch(recipe, feed, learner) if rank == 0 else None
    bar = throughput.Bar(recipe.name, first, recipe.steps, recipe.batch, flop, peak, rank == 0)
    clock, total = time.monotonic() - spent, torch.tensor(before, device=target)
    signals = _Signals()
    try:
        for step in range(first, recipe.steps + 1):
            late = step > first and minutes is not None and time.monotonic() - begun > minutes * 60
            stop = float(signals.number or late)
            if world > 1:  # all must stop at the same step, and asking costs
                stop = _most(stop, target) if step > first and step % CHECKED == 0 else 0.0
            if monitor.due(step, recipe.steps, every) and not (records and records[-1]["step"] == step):
                mean = _sum(total) / seen / world if seen else math.nan  # nothing is learned from before step 0
                _finite(mean if seen else 0.0, recipe, step)
                bar.pause()
                if step == recipe.steps:
                    # before the last look: it and all final scores are of the weights that are kept
                    export.halve(learner.published)  # what a student is compared with stays as it is
                if watch:
                    looked = watch(step, mean)
                    records.append({**looked, "seconds": time.monotonic() - clock})
                    _save(stamp, file, learner, optimizer, step, records, time.monotonic() - clock, 0.0, 0)
                    report(line(recipe, records, bar.utilisation()))
                    if follow:
                        follow(monitor.dataset(records))
                else:
                    records.append({"step": step})
                bar.go()
                total.zero_()
                seen = 0
            if step == recipe.steps:
                break
            if stop:
                sofar = _sum(total) / world
                if rank == 0:
                    _save(stamp, file, learner, optimizer, step, records, time.monotonic() - clock, sofar, seen)
                    if stop == IN_TIME:
                        report(f"{recipe.name} stopped in time at step {step}: the same command goes on from here")
                break
            torch.manual_seed(recipe.seed * 1_000_003 + step * world + rank)
            batch = feed.take(step, rank=rank, world=world, captions=learner.captions)
            schedules.apply(optimizer, recipe, step)
            learner.step = step
            loss = loss_of(run, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(learner.parameters(), recipe.clip)
            _call(learner, "before_update")
            optimizer.step()
            _call(learner, "after_update")
            optimizer.zero_grad(set_to_none=True)
            total += loss.detach()
            seen += 1
            if step % CHECKED == 0:
                _finite(total.item(), recipe, step)
                bar.advance(total.item() / seen)
            else:
                bar.advance()
    finally:
        signals.close()
        bar.close()
    done = None
    if rank == 0 and step == recipe.steps:
        facts = _facts(recipe, feed, learner, records, flop, peak)
        facts["command"] = recipes.command(recipe, count=count, weights=weights)
        if final:
            facts |= _scored(recipe, feed, learner, target, begin)
        words = learner.eval().text_side() if hasattr(learner, "text_side") else None
        done = export.export(recipe, learner.published, records, out, origin, facts, words)
    if world > 1:
        dist.barrier()  # a process that left early would bring the others down
        dist.destroy_process_group()
    if step < recipe.steps and stop != IN_TIME:
        raise Interrupted(
            f"{recipe.name} stopped at step {step} of {recipe.steps}, kept in {file}: the same command goes on from here",
            128 + int(stop),
        )
    return done


def _facts(
    recipe: Recipe, feed: data.Feed, learner: Any, records: list[dict[str, Any]], flop: float, peak: float
) -> dict[str, Any]:
    """What the card says of a finished run beside its scores."""
    spent = records[-1]["seconds"] - sum(r["watching"] for r in records)
    rate = recipe.steps * recipe.batch / max(spent, 1e-9)  # of the whole run, however often it was interrupted
    facts: dict[str, Any] = {
        "images_per_second": rate,
        "utilisation": rate * flop / peak,
        "gflop_per_image": flop / 1e9,
    }
    if isinstance(feed, data.ImageFeed):
        facts["images"] = {"trained": feed.trained, "fingerprint": feed.fingerprint}
    return facts


def _scored(
    recipe: Recipe, feed: data.Feed, learner: Any, target: torch.device, begin: start.Start | None
) -> dict[str, Any]:
    """Scores that a finished network may have, trained and as it was before the first step; why some are left out."""
    fresh = learners.learner(recipe, feed, begin).to(target)
    facts: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name, net in (("linear", learner.published), ("linear_untrained", fresh.published)):
        facts[name], why = evaluation.final(snapshot(recipe, net.eval()), feed)
        missing |= why
    for score in missing:  # a trained score says little without its untrained one
        for name in ("linear", "linear_untrained"):
            facts[name].pop(score, None)
    return facts | ({"left_out": missing} if missing else {})


class _Signals:
    """Ctrl-C and SIGTERM as a wish that the loop reads between steps; a second one acts at once."""

    def __init__(self) -> None:
        self.number = 0  # of the signal that came, 0 before
        there = threading.current_thread() is threading.main_thread()  # Python hears signals nowhere else
        self.former = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM) if there}
        for n in self.former:
            signal.signal(n, self._hear)

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        self.number = number
        self.close()

    def close(self) -> None:
        """Give the signals back."""
        for n, former in self.former.items():
            signal.signal(n, former if former is not None else signal.SIG_DFL)
        self.former = {}


class _Watch:
    """Looks at a network in training, on the same held-out images every time."""

    def __init__(self, recipe: Recipe, feed: data.Feed, learner: Any) -> None:
        self.recipe, self.learner = recipe, learner
        self.scored, bank = feed.held(SCORED + BANK).split(SCORED / (SCORED + BANK))
        self.bank, self.queries = bank, self.scored.split(QUERIES / SCORED)[0]
        enough = min(WATCHED, len(self.scored)) * recipe.patches >= mixture.LEAST_DATA
        self.judged = recipe.judged and enough  # few images of few patches have no fingerprint

    def __call__(self, step: int, loss: float) -> dict[str, Any]:
        begun = time.monotonic()
        self.learner.eval()
        backbone = snapshot(self.recipe, self.learner.published)
        score = getattr(self.learner, "score", None)
        agreement = getattr(self.learner, "agreement", None)
        whole = step == self.recipe.steps or bool(self.recipe.init)
        found = {
            "step": step,
            "loss": loss,
            "accuracy": score(self.scored if whole else self.queries) if score else math.nan,
            **({"agreement": agreement(self.scored)} if agreement else {}),
            "knn": evaluation.knn(backbone, self.bank, self.queries),
            **monitor.measure(backbone, self.scored.pixels[:WATCHED]),
            **(monitor.fingerprint(backbone, self.scored.pixels[:WATCHED]) if self.judged else {}),
        }
        self.learner.train()
        return {**found, "watching": time.monotonic() - begun}


def snapshot(recipe: Recipe, net: Any) -> Backbone:
    """Freeze a copy of a network in training: → Backbone to measure."""
    size = (recipe.image_size, recipe.image_size)
    return Backbone(
        recipe.name, deepcopy(net), net.pixel_mean, net.pixel_std, size, Preparation(), "training", "training"
    )


def line(recipe: Recipe, records: list[dict[str, Any]], used: float = math.nan) -> str:
    """Say how a run stands, in one line: recipe, records, utilisation → text."""
    now = records[-1]
    strongest = max(range(1, len(now["top1"])), key=now["top1"].__getitem__)
    known = {"loss": 4, "accuracy": 3, "knn": 3}  # digits; there is no loss before the first step
    scores = "".join(f"  {k} {now[k]:.{digits}f}" for k, digits in known.items() if now[k] == now[k])
    text = (
        f"{recipe.name} step {now['step']}/{recipe.steps}{scores}  "
        f"top-1% ratio {now['top1'][strongest]:.2f} (layer {strongest})"
    )
    if len(records) < 2:
        return text
    spent = now["seconds"] - records[-2]["seconds"] - now["watching"]  # a look at the network is no training
    rate = (now["step"] - records[-2]["step"]) / max(spent, 1e-9)
    used_text = f"  utilisation {100 * used:.0f} %" if used == used else ""
    return f"{text}  {rate * recipe.batch:.0f} images/s{used_text}  {(recipe.steps - now['step']) / rate / 60:.0f} min left"


def _stamp(recipe: Recipe, feed: data.Feed, world: int, begin: start.Start | None) -> str:
    """All that decides the weights, as text: what a checkpoint must agree with."""
    known = {**recipe.facts(), "data": feed.fingerprint, "images": getattr(feed, "trained", None), "processes": world}
    return json.dumps(known | ({"start": begin.key} if begin else {}), sort_keys=True)


def _call(learner: Any, name: str) -> None:
    if hasattr(learner, name):
        getattr(learner, name)()


def _finite(total: float, recipe: Recipe, step: int) -> None:
    if not math.isfinite(total):
        raise InputError(f"the loss of {recipe.name} is not finite at step {step}: lower lr ({recipe.lr})")


def _place(device: str) -> tuple[int, int, torch.device]:
    """Where this process runs: device → rank, number of processes, device; `torchrun` tells by its environment."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return 0, 1, registry.pick_device(device)
    if device.startswith("cuda:"):
        raise InputError("torchrun chooses the GPUs: use --device cuda")
    cuda = device in ("auto", "cuda") and torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda and torch.cuda.device_count() <= local:
        raise InputError(f"there are {torch.cuda.device_count()} GPUs for {world} processes: lower --nproc-per-node")
    target = torch.device("cuda", local) if cuda else registry.pick_device(device)
    if not dist.is_initialized():
        if cuda:
            torch.cuda.set_device(target)
        dist.init_process_group("nccl" if cuda else "gloo")
    return dist.get_rank(), world, target


def _named(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _most(value: float, device: torch.device) -> float:
    """The largest of a number over all processes."""
    shared = torch.tensor(value, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return shared.item()


def _sum(value: torch.Tensor) -> float:
    """Add a number up over all processes."""
    value = value.clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value)
    return value.item()


def _save(
    stamp: str, file: Path, learner: nn.Module, optimizer: Any, step: int, records: list[Any], seconds: float,
    total: float, seen: int,
) -> None:  # fmt: skip
    state = {
        "recipe": stamp,
        "learner": learner.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "records": records,
        "seconds": seconds,
        "total": total,  # of the losses since the last look
        "seen": seen,
    }
    cache.write_whole(file, lambda spare: torch.save(state, spare))


_Progress = tuple[
    int, list[Any], float, float, int
]  # step, records, seconds, sum of losses since the last look, their number


def _differences(kept: dict[str, Any], wanted: dict[str, Any]) -> str:
    """How two stamps differ, in words."""
    names = [k for k in sorted(kept.keys() | wanted.keys()) if kept.get(k) != wanted.get(k)]
    parts = [
        f"other {'number of ' if k == 'images' else ''}images"
        if k in ("data", "images")
        else f"{k} {kept.get(k)}, not {wanted.get(k)}"
        for k in sorted(names, key=lambda k: (k == "name", k))
    ]
    return "; ".join(parts[:3]) + ("; …" if len(parts) > 3 else "")


def _resume(stamp: str, file: Path, learner: nn.Module, optimizer: Any) -> _Progress:
    if not file.exists():
        return 0, [], 0.0, 0.0, 0
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        if state["recipe"] != stamp:
            what = _differences(json.loads(state["recipe"]), json.loads(stamp))
            raise InputError(
                f"{file} belongs to another recipe ({what}): choose another folder, or start anew with --restart"
            )
        learner.load_state_dict(state["learner"])
        optimizer.load_state_dict(state["optimizer"])
        return state["step"], state["records"], state["seconds"], state["total"], state["seen"]
    except InputError:
        raise
    except Exception as error:  # archives, unpicklers and tables that do not fit raise many kinds
        raise InputError(f"{file} is damaged or no checkpoint of a training run: delete it to start anew") from error
