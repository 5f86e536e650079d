"""A forward pass with test-time registers against the plain one: `python -m tests.benchmarks.remedies`.

Random weights and noise, batches of 8 at 224 px. One more token has a price of its own, so each change is timed against the plain
network and against timm's own network with as many registers; ratios are medians over alternating rounds. Prints a table.
"""

import argparse
from functools import partial

import torch

from tests.benchmarks.__main__ import alternate, plain
from vitregs.models import registry, test_time
from vitregs.models.backbone import Backbone

MODELS = ("deit_tiny_patch16_224", "vit_small_patch16_224")
NEURONS = {b: [10 * b, 20 * b, 30 * b, 40 * b] for b in range(5, 12)}  # 28 in 7 blocks, as many as DeiT-Tiny has
SIDE, BATCH = 224, 8


def changes(bare: Backbone) -> dict[str, tuple[Backbone, int]]:
    """What is timed, with the number of tokens that it appends."""
    return {
        "+zero1": (test_time.append(bare), 1),
        "+tt1": (test_time.append(bare, neurons=NEURONS), 1),
        "+tt4": (test_time.append(bare, 4, neurons=NEURONS), 4),
        "+zero2.5": (test_time.append(bare, weight=2.5), 1),
        "+suppressed": (test_time.suppress(bare, NEURONS), 0),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    pixels = torch.rand(BATCH, 3, SIDE, SIDE)
    print(f"{SIDE} px, batch {BATCH}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| network | time / plain | time / as many registers of timm's | wanted |\n|---|---|---|---|")
    for model in MODELS:
        bare = registry.random(model)
        for name, (changed, count) in changes(bare).items():
            same = registry.random(model, reg_tokens=count) if count else bare
            first, second = (
                alternate(partial(plain, b, pixels), partial(plain, changed, pixels), rounds) for b in (bare, same)
            )
            print(f"| {model}{name} | {first:.3f} | {second:.3f} | {'≤ 1.02' if name == '+tt1' else ''} |", flush=True)


if __name__ == "__main__":
    main()
