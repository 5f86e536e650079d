"""Training rates on one device: `python -m tests.benchmarks.training [--device cuda]` prints them and writes TRAINING.md.

Scenes per second, and for each recipe images per second and utilisation: model operations of forward and backward passes
per second over the device's peak (its data sheet's, or a matrix product's on a CPU). Looks at the network do not count.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from vitregs.data import scenes
from vitregs.models import registry
from vitregs.train import data, learners, loop, precision, schedules
from vitregs.train.recipes import recipe

ON_CPU = {  # recipe: batch, steps
    "supervised-pico": (16, 20),
    "clip-pico": (32, 20),
    "mae-pico": (64, 20),
    "dino-pico": (16, 10),
    "dinov2-pico": (16, 10),
    "hunt-nano": (8, 100),
    "hunt-small": (4, 3),
}
ON_GPU = {"hunt-tiny": (256, 300), "hunt-small": (256, 300), "clip-pico": (256, 200), "dinov2-pico": (128, 100)}


def rate(name: str, device: str, batch: int, steps: int) -> tuple[float, float, float]:
    """Train for some steps: recipe, device → images per second, utilisation, GFLOP per image."""
    chosen = recipe(name).override(batch=batch, steps=steps, warmup=1)
    with tempfile.TemporaryDirectory() as folder:
        loop.train(
            chosen, out=Path(folder), device=device, every=10**9, final=False, report=lambda _line: None
        )  # fmt: skip
        card = json.loads((Path(folder) / "recipe.json").read_text())
    return card["images_per_second"], card["utilisation"], card["gflop_per_image"]


def rendering(device: torch.device, side: int = 64) -> float:
    """Scenes per second, median of five batches."""
    count = 20_000 if device.type == "cuda" else 1000
    found = []
    for seed in range(6):
        start = time.perf_counter()
        scenes.render(count, side, seed=seed, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(count / (time.perf_counter() - start))
    return median(found[1:])


def single_attention(name: str, device: torch.device, rounds: int = 12) -> tuple[float, float]:
    """Steps with attention in half precision and in single precision by turns, on the same batch: recipe → images per second of
    each, the fastest of some rounds."""
    chosen = recipe(name)
    feed = data.make(chosen, device)
    learner = learners.learner(chosen, feed)
    optimizer, batch = schedules.optimiser(learner, chosen), feed.take(0)
    ways = (lambda: torch.autocast(device.type, torch.bfloat16), lambda: precision.computed(device, "bf16"))
    best = [float("inf")] * len(ways)
    for _ in range(rounds):
        for i, how in enumerate(ways):
            start = time.perf_counter()
            with how():
                loss = learner(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            best[i] = min(best[i], time.perf_counter() - start)
    return chosen.batch / best[0], chosen.batch / best[1]


def main() -> None:
    """Measure everything and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    device = registry.pick_device(parser.parse_args().device)
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"a CPU, {torch.get_num_threads()} threads"
    lines = [
        f"# Training on {name}",
        "",
        f"Written by `python -m tests.benchmarks.training` (torch {torch.__version__}).",
        "",
    ]
    lines += ["| what | batch | images/s | utilisation | GFLOP/image |", "|---|---|---|---|---|"]
    lines.append(f"| scenes at 64 px | | {rendering(device):,.0f} | | |")
    for recipe_name, (batch, steps) in (ON_GPU if cuda else ON_CPU).items():
        images, used, flop = rate(recipe_name, str(device), batch, steps)
        lines.append(f"| {recipe_name} | {batch} | {images:,.0f} | {100 * used:.0f} % | {flop:.2f} |")
        print(lines[-1], flush=True)
    if not cuda:
        half, single = single_attention("supervised-pico", device)
        lines += [
            "",
            "The same steps of `supervised-pico` in bf16, by turns: attention in half precision "
            f"{half:,.0f} images/s, in single precision {single:,.0f}: {single / half:.2f} x (wanted: 1.5).",
        ]
    (Path(__file__).parent / "TRAINING.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
