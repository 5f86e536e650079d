"""Logistic regression over DINOv2's grid of 45 strengths against scikit-learn: `python -m tests.benchmarks.probes`.

10,000 features of width 384 around 10 class centres. scikit-learn fits one strength at a time, with its own defaults for the
tolerance and 1,000 iterations; every fifth strength is timed and stands for five. Prints a table and the largest difference in
loss at the same strengths, in this project's favour where it is negative.
"""

import argparse
import time
import warnings

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from vitregs.probes import logistic

COUNT, WIDTH, CLASSES, EVERY = 10_000, 384, 10, 5


def features() -> tuple[np.ndarray, np.ndarray]:
    """Features whose directions differ in standard deviation by a factor of ten, as those of a ViT do, and their classes."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, CLASSES, COUNT)
    centre = 0.3 * rng.normal(size=(CLASSES, WIDTH))
    x = (rng.normal(size=(COUNT, WIDTH)) + centre[y]) * np.geomspace(1, 0.1, WIDTH)
    return x.astype(np.float32), y


def loss(x: np.ndarray, y: np.ndarray, weight: np.ndarray, bias: np.ndarray, strength: float) -> float:
    """Mean loss with penalty, in float64."""
    scores = x.astype(np.float64) @ weight + bias
    scores -= scores.max(1, keepdims=True)
    each = np.log(np.exp(scores).sum(1)) - scores[np.arange(len(y)), y]
    return float(each.mean() + np.square(weight).sum() / (2 * strength * len(y)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    warnings.filterwarnings("ignore", message="lbfgs failed to converge")
    x, y = features()
    a, b = torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)
    logistic.path(a[:500], b[:500], [1.0])  # warm up
    start = time.perf_counter()
    found = logistic.path(a, b)
    ours = float("nan") if not found.loss.isfinite().all() else time.perf_counter() - start
    theirs, worst = 0.0, -np.inf
    for i in range(0, len(logistic.GRID), EVERY):
        start = time.perf_counter()
        fitted = LogisticRegression(C=logistic.GRID[i], max_iter=1000).fit(x, y)
        theirs += EVERY * (time.perf_counter() - start)
        mine = loss(
            x, y, found.weight[i].double().cpu().numpy(), found.bias[i].double().cpu().numpy(), logistic.GRID[i]
        )
        worst = max(worst, mine - loss(x, y, fitted.coef_.T, fitted.intercept_, logistic.GRID[i]))
    print(f"| grid of {len(logistic.GRID)} strengths, {COUNT:,} x {WIDTH}, {CLASSES} classes | {device} |\n|---|---|")
    print(f"| scikit-learn, {torch.get_num_threads()} threads | {theirs:.1f} s |")
    print(f"| `probes.logistic.path`, {found.steps} steps | {ours:.1f} s |")
    print(f"| ratio | {ours / theirs:.3f} |\n| largest difference in loss, ours − theirs | {worst:.1e} |")


if __name__ == "__main__":
    main()
