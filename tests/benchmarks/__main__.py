"""Costs, as ratios measured side by side in one run: `make benchmarks` prints them and writes README.md here.

Rows: norms at all layers, and attention rows of the last block, against timm's plain forward pass on the same batch;
scenes per second, and rendering against a training step. Each ratio of times is the median over alternating rounds,
which cancels the drift of the machine.
"""

import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from vitregs.data import scenes
from vitregs.models import capture, registry
from vitregs.models.backbone import Backbone
from vitregs.train import data, learners, recipes, schedules

HERE = Path(__file__).parent
MODEL = "vit_small_patch14_reg4_dinov2.lvd142m"  # architecture only: random weights


def alternate(plain: Callable[[], object], ours: Callable[[], object], rounds: int) -> float:
    """Median over rounds of time(ours) / time(plain), the two run in turn."""
    plain(), ours()
    ratios = []
    for _ in range(rounds):
        spent = []
        for run in (plain, ours):
            start = time.perf_counter()
            run()
            spent.append(time.perf_counter() - start)
        ratios.append(spent[1] / spent[0])
    return median(ratios)


def peak(what: str, side: int, batch: int) -> float:
    """Peak resident memory, in MiB, of a fresh process that does one thing."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", what, str(side), str(batch)],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])


def work(what: str, side: int, batch: int) -> Callable[[], object]:
    """Prepare one measured piece of work: plain forward, norms or attention rows."""
    backbone = registry.random(MODEL, img_size=side)
    pixels = torch.rand(batch, 3, side, side)
    backbone.fit((side, side))
    tasks: dict[str, Callable[[], object]] = {
        "plain": lambda: plain(backbone, pixels),
        "norms": lambda: capture.norms(backbone, pixels, batch=batch),
        "attention": lambda: capture.attention(backbone, pixels, batch=batch),
    }
    return tasks[what]


def rendering() -> float:
    """Time to render one batch over the time of a whole training step without it (eager, bf16), median of ten each."""
    chosen = recipes.recipe("supervised-pico")
    feed = data.make(chosen, torch.device("cpu"))
    learner = learners.learner(chosen, feed)
    optimizer = schedules.optimiser(learner, chosen)
    times: list[list[float]] = [[], []]
    for i in range(10):
        start = time.perf_counter()
        batch = feed.take(i)
        middle = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = learner(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times[0].append(middle - start)
        times[1].append(time.perf_counter() - middle)
    return median(times[0]) / median(times[1])


@torch.no_grad()
def plain(backbone: Backbone, pixels: torch.Tensor) -> torch.Tensor:
    """timm's own forward pass on the same normalised batch."""
    return backbone.net.forward_features(backbone.normalise(pixels))  # type: ignore[operator]


def main() -> None:
    """Measure everything and write the table."""
    rows = []
    for side, batch, rounds in ((224, 8, 15), (518, 2, 9)):
        base = work("plain", side, batch)
        for what, bound in (("norms", 1.10), ("attention", 1.10)):
            ratio = alternate(base, work(what, side, batch), rounds)
            rows.append(
                (f"{what}, ViT-S/14 reg4, {side} px, batch {batch}: time / plain forward", f"{ratio:.3f}", f"≤ {bound}")
            )
        memory = [peak(w, side, batch) for w in ("plain", "norms")]
        rows.append(
            (f"norms, {side} px, batch {batch}: peak memory / plain forward", f"{memory[1] / memory[0]:.3f}", "≤ 1.15")
        )
    for side in (64, 96):
        rates = []
        for seed in range(5):
            start = time.perf_counter()
            scenes.render(1000, side, seed=seed)
            rates.append(1000 / (time.perf_counter() - start))
        rows.append((f"scenes at {side} px, per second", f"{median(rates):.0f}", "≥ 1000 at 64 px"))
    rows.append(("rendering a batch of supervised-pico / its training step", f"{rendering():.3f}", "≤ 0.1"))
    threads = torch.get_num_threads()
    machine = f"{platform.machine()}, {threads} threads, torch {torch.__version__}"
    table = "\n".join(f"| {a} | {b} | {c} |" for a, b, c in rows)
    text = f"# Costs\n\nWritten by `make benchmarks` ({machine}).\n\n| what | measured | wanted |\n|---|---|---|\n{table}\n"
    (HERE / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    else:
        main()
