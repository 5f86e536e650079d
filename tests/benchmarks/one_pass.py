"""Whole commands against timm's plain forward pass on the same images: `python -m tests.benchmarks.one_pass`.

ViT-S/14 at 518 px, random weights, noise for images. Each piece of work runs in a process of its own, once to warm up on one
batch and once measured; the pieces alternate over rounds, and ratios are medians over rounds. `--former FOLDER` adds the same
work by another checkout of this repository. Prints a markdown table. The search for register neurons, as it is wanted:
`--tasks neurons --side 224 --count 256 --batch 16`.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

MODEL = "vit_small_patch14_dinov2.lvd142m"  # architecture only: random weights
ROOT = Path(__file__).parents[2]
WANTED = {"diagnose": "≤ 1.25, memory ≤ 1.15", "study": "≤ 1.5", "probe": "≤ 1.5 + fits", "neurons": "≤ 1.5"}


def paint(folder: Path, count: int, side: int) -> None:
    """Write images of noise with structure."""
    for n in range(count):
        small = np.random.default_rng(n).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(small).resize((side, side)).save(folder / f"{n:03d}.png")


def library() -> tuple[Callable[..., Any], ...]:
    """What is timed, of the checkout at hand: → open images, random backbone, diagnosis, LOST, local probes.

    Before 2026-11-28 the same functions stood in other modules.
    """
    try:
        from vitregs.data.images import open_images
        from vitregs.measure.diagnose import diagnose
        from vitregs.measure.lost import evaluate
        from vitregs.models.registry import random
        from vitregs.probes.local import probe
    except ModuleNotFoundError:
        from importlib import import_module

        names = ("images.load", "backbones.random", "diagnose.diagnose", "discovery.study", "probes.local.probe")
        parts = (name.rpartition(".") for name in names)
        return tuple(getattr(import_module(f"vitregs.{module}"), name) for module, _, name in parts)
    return open_images, random, diagnose, evaluate, probe


def work(what: str, folder: str, side: int, batch: int) -> None:
    """Do one thing once and print seconds and peak memory in MiB."""
    open_images, random, diagnose, evaluate, probe = library()
    backbone = random(MODEL, img_size=side)

    def plain(source: Any) -> None:
        net: Any = backbone.net
        with torch.no_grad():
            for pixels in source.pixels(batch):
                net.forward_features(backbone.prepare(pixels))

    tasks: dict[str, Callable[[Any], object]] = {
        "plain": plain,
        "diagnose": lambda source: diagnose(backbone, source, batch=batch),
        "study": lambda source: evaluate(backbone, source),
        "probe": lambda source: probe(backbone, source, batch=batch),
    }
    if what == "neurons":
        from vitregs import arrays
        from vitregs.measure import neurons
        from vitregs.models import capture

        first = capture.norms(backbone, next(iter(open_images(folder, size=side).pixels(batch))), layers=[-1])
        cutoff = float(np.quantile(arrays.patches(first).values, 0.96))  # marks as many as outliers are
        tasks["neurons"] = lambda source: neurons.search(backbone, source, cutoff=cutoff, batch=batch)
    plain(open_images(folder, size=side, count=1))
    start = time.perf_counter()
    tasks[what](open_images(folder, size=side))
    print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def apart(what: str, folder: str, side: int, batch: int, checkout: Path) -> tuple[float, float]:
    """The same in a fresh process that imports a checkout: → seconds, MiB."""
    message = [
        sys.executable,
        str(Path(__file__)),
        "--do",
        what,
        "--folder",
        folder,
        "--side",
        str(side),
        "--batch",
        str(batch),
    ]
    paths = os.environ | {"PYTHONPATH": str(checkout / "lib")}
    done = subprocess.run(message, capture_output=True, text=True, check=True, env=paths)
    seconds, memory = done.stdout.split()[-2:]
    return float(seconds), float(memory)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--do", choices=["plain", *WANTED])
    parser.add_argument("--folder", default="")
    parser.add_argument("--side", type=int, default=518)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", default=["diagnose", "study", "probe"], choices=list(WANTED))
    parser.add_argument("--former", type=Path, help="another checkout to compare with")
    given = parser.parse_args()
    if given.do:
        work(given.do, given.folder, given.side, given.batch)
        return
    checkouts = {"now": ROOT} | ({"former": given.former.resolve()} if given.former else {})
    rows = [("plain", "now"), *((task, name) for task in given.tasks for name in checkouts)]
    found: dict[tuple[str, str], list[tuple[float, float]]] = {row: [] for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        paint(Path(folder), given.count, given.side)
        for _ in range(given.rounds):
            for task, name in rows:
                found[task, name].append(apart(task, folder, given.side, given.batch, checkouts[name]))
    base = found["plain", "now"]
    print(f"ViT-S/14, {given.side} px, {given.count} images, batch {given.batch}, {torch.get_num_threads()} threads\n")
    print("| work | code | seconds | time / plain forward | peak memory / plain | wanted |\n|---|---|---|---|---|---|")
    for (task, name), measured in found.items():
        ratios = [median(a[k] / b[k] for a, b in zip(measured, base, strict=True)) for k in (0, 1)]
        seconds = median(m[0] for m in measured)
        print(f"| {task} | {name} | {seconds:.1f} | {ratios[0]:.2f} | {ratios[1]:.2f} | {WANTED.get(task, '')} |")


if __name__ == "__main__":
    main()
