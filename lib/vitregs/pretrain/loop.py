"""One flat, resumable training loop.

Every step is a function of the recipe and the step number alone (scenes, learning rate, random state), so that a run
that was killed ends in the same weights, bit for bit, on the same CPU.
"""

import json
import math
import shutil
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitregs import backbones, results, scenes
from vitregs.backbones import Backbone
from vitregs.pretrain import history, supervised
from vitregs.pretrain.recipe import Recipe
from vitregs.problems import Problem

HELD_OUT = 2**40  # first scene of the held-out part: far behind anything a run can reach
WATCHED, SCORED = 64, 512  # held-out scenes whose norms are watched and whose classes are scored


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine to 1 % of the peak: recipe, step → learning rate."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    part = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, part))))


def optimiser(net: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only: biases, norms, tokens and positions are exempt (paper, section 3.1)."""
    free = [p for n, p in net.named_parameters() if p.ndim < 2 or "token" in n or "pos_embed" in n]
    exempt = {id(p) for p in free}
    groups = [
        {"params": [p for p in net.parameters() if id(p) not in exempt], "weight_decay": recipe.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=True)


def train(
    recipe: Recipe,
    *,
    out: Path,
    device: str = "auto",
    resume: bool = True,
    compiled: bool | None = None,
    every: int = 500,
    report: Callable[[str], None] = print,
) -> Path:
    """Train a recipe: where to keep checkpoints and the result, device → folder with weights, recipe and history.

    Raises Problem for a checkpoint of another recipe or a disk that cannot be written; the last checkpoint survives.
    """
    target = backbones.pick_device(device)
    origin = results.provenance(device=str(target))  # of the code that runs, not of what it may become meanwhile
    net = supervised.build(recipe).to(target)
    optimizer = optimiser(net, recipe)
    file = out / "checkpoint.pt"
    start, records, spent = _resume(recipe, file, net, optimizer) if resume else (0, [], 0.0)
    compiled = shutil.which("c++") is not None if compiled is None else compiled
    run: Any = torch.compile(net) if compiled else net
    kind = target.type
    low = torch.autocast(kind, torch.bfloat16, enabled=recipe.precision == "bf16")
    size, hard = recipe.image_size, recipe.difficulty
    held = scenes.render(SCORED, size, seed=recipe.seed, first=HELD_OUT, device=target, difficulty=hard)
    begun, total, seen = time.monotonic() - spent, 0.0, 0

    for step in range(start, recipe.steps + 1):
        if history.due(step, recipe.steps, every) and not (records and records[-1]["step"] == step):
            mean = total / seen if seen else math.nan  # nothing is learned from before step 0
            record = {"step": step, "loss": mean, "seconds": time.monotonic() - begun}
            net.eval()
            record["accuracy"] = supervised.score(net, held)
            record.update(history.look(snapshot(recipe, net), held.pixels[:WATCHED]))
            net.train()
            records.append(record)
            total, seen = 0.0, 0
            _save(recipe, file, net, optimizer, step, records, record["seconds"])
            report(line(recipe, records))
        if step == recipe.steps:
            break
        torch.manual_seed(recipe.seed * 1_000_003 + step)
        batch = scenes.render(
            recipe.batch, size, seed=recipe.seed, first=step * recipe.batch, device=target, difficulty=hard
        )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        with low:
            loss = supervised.loss(run, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        total, seen = total + loss.item(), seen + 1
        if not math.isfinite(total):
            raise Problem(f"the loss of {recipe.name} is not finite at step {step}: lower lr ({recipe.lr})")
    return _publish(recipe, net, records, out, origin)


def snapshot(recipe: Recipe, net: nn.Module) -> Backbone:
    """Freeze a copy of a network in training: → Backbone to measure."""
    size = (recipe.image_size, recipe.image_size)
    return Backbone(recipe.name, deepcopy(net), supervised.MEAN, supervised.STD, size, 1.0, "training", "training")


def line(recipe: Recipe, records: list[dict[str, Any]]) -> str:
    """Say how a run stands, in one line."""
    now = records[-1]
    strongest = max(range(len(now["top1"])), key=now["top1"].__getitem__)
    text = (
        f"{recipe.name} step {now['step']}/{recipe.steps}  loss {now['loss']:.4f}  accuracy {now['accuracy']:.3f}  "
        f"top-1% ratio {now['top1'][strongest]:.2f} (layer {strongest})"
    )
    if len(records) < 2:
        return text
    rate = (now["step"] - records[-2]["step"]) / max(now["seconds"] - records[-2]["seconds"], 1e-9)
    return f"{text}  {rate * recipe.batch:.0f} images/s  {(recipe.steps - now['step']) / rate / 60:.0f} min left"


def _save(
    recipe: Recipe, file: Path, net: nn.Module, optimizer: Any, step: int, records: list[Any], seconds: float
) -> None:
    state = {
        "recipe": json.dumps(recipe.facts(), sort_keys=True),
        "net": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "records": records,
        "seconds": seconds,
    }
    results.write_whole(file, lambda spare: torch.save(state, spare))


def _resume(recipe: Recipe, file: Path, net: nn.Module, optimizer: Any) -> tuple[int, list[Any], float]:
    if not file.exists():
        return 0, [], 0.0
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        if state["recipe"] != json.dumps(recipe.facts(), sort_keys=True):
            raise Problem(f"{file} belongs to another recipe: choose another folder, or delete it to start anew")
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
        return state["step"], state["records"], state["seconds"]
    except Problem:
        raise
    except Exception as error:  # archives, unpicklers and tables that do not fit raise many kinds
        raise Problem(f"{file} is damaged or no checkpoint of a training run: delete it to start anew") from error


def _publish(recipe: Recipe, net: nn.Module, records: list[Any], out: Path, origin: dict[str, str]) -> Path:
    """Write what a zoo entry holds: weights in safetensors, the recipe with hashes, the history."""
    from safetensors.torch import save

    weights = out / "weights.safetensors"
    state = {k: v.detach().cpu().contiguous() for k, v in net.state_dict().items()}
    results.write_whole(weights, lambda spare: spare.write_bytes(save(state)))  # save_file would hide it from others
    log = history.dataset(records)
    log.attrs.update(origin, recipe=json.dumps(recipe.facts(), sort_keys=True))
    results.save(log, out / "history.nc")
    card = {
        "recipe": recipe.facts(),
        "vit": {**recipe.vit(), "num_classes": len(scenes.CLASSES)},
        "mean": supervised.MEAN,
        "std": supervised.STD,
        "weights": results.file_hash(weights),
        "accuracy": records[-1]["accuracy"],
        "minutes": records[-1]["seconds"] / 60,
        "provenance": origin,
    }
    text = json.dumps(card, indent=1, sort_keys=True) + "\n"
    results.write_whole(out / "recipe.json", lambda spare: spare.write_text(text))
    return out
