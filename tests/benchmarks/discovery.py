"""LOST in batches against one image at a time, side by side in one run: `python -m tests.benchmarks.discovery`.

The plain version is an independent transcription of the protocol, with torch's products and scipy's components. Every
row is the median over alternating rounds, which cancels the drift of the machine; both give the same boxes, or it stops.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import torch
import xarray as xr
from scipy import ndimage

from vitregs.arrays import token_coords
from vitregs.measure import lost
from vitregs.models.registry import pick_device

PATCH = (14, 14)


def one_by_one(features: torch.Tensor, shape: tuple[int, int]) -> list[list[int]]:
    """Boxes of images (n, patches, channels), one after the other, as the protocol reads."""
    boxes = []
    for x in features:
        gram = x @ x.T
        positive = gram.clone()
        positive.fill_diagonal_(0)
        positive[positive < 0] = 0
        positive = positive + positive.T
        score = -(positive > 0).sum(1).float()
        ranked = torch.argsort(score, descending=True, stable=True)
        seed, best = ranked[0], ranked[:100]
        kept = best[gram[seed, best] > 0]
        expansion = gram[kept].sum(0).reshape(shape).cpu().numpy()
        labels, _ = ndimage.label(expansion > 0)
        y, x_ = np.nonzero(labels == labels.flat[int(seed)])
        boxes.append([y.min() * PATCH[0], x_.min() * PATCH[1], (y.max() + 1) * PATCH[0], (x_.max() + 1) * PATCH[1]])
    return boxes


def features(n: int, shape: tuple[int, int], channels: int) -> xr.DataArray:
    """Smooth random features, rounded so that both versions have the same signs."""
    noise = np.random.default_rng(0).standard_normal((n, *shape, channels))
    smooth = np.round(16 * ndimage.gaussian_filter(noise, (0, 2, 2, 0))) / 8
    flat = smooth.reshape(n, -1, channels).astype(np.float32)
    kinds = ["patch"] * flat.shape[1]
    return xr.DataArray(flat, dims=("image", "token", "channel"), coords=token_coords(kinds, shape))


def seconds(run: Callable[[], object], device: str) -> float:
    """Time of one call, with the device's queue empty at both ends."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def row(n: int, shape: tuple[int, int], channels: int, device: str, rounds: int) -> str:
    """Measure one size of image: → a row of the table, in milliseconds an image."""
    given = features(n, shape, channels)
    x = torch.from_numpy(given.values).to(device)
    found = lost.lost(given, patch_size=PATCH, device=device)
    if found["box"].values.tolist() != one_by_one(x, shape):
        raise SystemExit("the two versions disagree: the times mean nothing")
    tasks = (
        lambda: one_by_one(x, shape),
        lambda: lost.lost(given, patch_size=PATCH, device=device),
        lambda: [a @ a.T for a in x],
    )
    times = np.array([[seconds(task, device) for task in tasks] for _ in range(rounds)]) / n * 1000
    plain, ours, product = (median(column) for column in times.T)
    ratio = median(times[:, 1] / times[:, 0])
    tokens = shape[0] * shape[1]
    return f"| {tokens} | {channels} | {n} | {plain:.2f} | {ours:.2f} | {product:.2f} | {ratio:.2f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    device = str(pick_device(parser.parse_args().device))
    print(f"LOST on {device}, {torch.get_num_threads()} threads, torch {torch.__version__}; milliseconds an image\n")
    print("| tokens | width | images | one by one | batched | Gram products alone | batched / one by one |")
    print("|---|---|---|---|---|---|---|")
    for n, shape, channels in ((64, (8, 8), 192), (64, (14, 14), 384), (16, (37, 37), 384)):
        print(row(n, shape, channels, device, rounds=9))


if __name__ == "__main__":
    main()
