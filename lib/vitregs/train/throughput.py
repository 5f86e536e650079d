"""How fast a run goes: operations of a step, the device's peak, timm's own loop beside it, and the progress bar."""

import sys
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from vitregs.data import decoding
from vitregs.data.sources import Item

# Dense bf16 peaks in FLOP/s by the vendors' data sheets, the first name that fits; other devices are measured.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
}


def operations(learner: nn.Module, loss: Callable[[nn.Module], torch.Tensor], images: int) -> float:
    """Operations of a forward and backward pass for one image: learner, its loss on a few → FLOP (2 per multiply-add).

    Counted on a copy, so that neither weights nor averages move.
    """
    twin = deepcopy(learner)
    counter = FlopCounterMode(display=False)
    with counter:
        loss(twin).backward()
    return counter.get_total_flops() / images


def peak(device: torch.device, dtype: torch.dtype) -> float:
    """Fastest rate of the device: from a table for known GPUs, else that of a matrix product here → FLOP/s."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if dtype == torch.bfloat16 and (known := next((v for k, v in PEAKS.items() if k in name), None)):
            return known
    return matrix_rate(device, dtype)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Rate of a large matrix product here, the best of four → FLOP/s."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device).to(dtype)
    best = 0.0
    for _ in range(4):
        _wait(device)
        start = time.perf_counter()
        a @ a
        _wait(device)
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Encoded(Dataset[Any]):
    """Encoded images that are decoded when they are drawn, as a training script reads files."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.transform: Any = None  # timm's loader sets it

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        item = self.items[index]
        return self.transform(decoding.read(item.data).rgb()), int(item.label)


def timm_loop(
    net: nn.Module,
    items: Sequence[Item],
    *,
    batch: int,
    device: torch.device,
    low: bool,
    seconds: float,
    workers: int = 4,
) -> float:
    """Train a network as timm's training script does, with its defaults, and see how fast that is.

    timm's loader decodes and augments in processes of its own, batches are moved while the last one is at work (on CUDA), and
    the step is not compiled.

    Args:
        net: A classifier; its weights change.
        items: Encoded images with numbers as labels.
        batch: Images of a step.
        device: Where it is trained.
        low: Whether the step runs in bf16.
        seconds: How long to measure, behind five steps that do not count.
        workers: Processes that decode; the script's default is 4.

    Returns:
        Images per second.
    """
    from timm.data import create_loader
    from timm.optim import create_optimizer_v2

    side: int = net.patch_embed.img_size[0]  # type: ignore[union-attr, index, assignment]
    images: Any = _Encoded(items)
    loader: Any = create_loader(
        images,
        input_size=(3, side, side),
        batch_size=batch,
        is_training=True,
        use_prefetcher=device.type == "cuda",
        no_aug=False,
        color_jitter=0.4,
        num_workers=workers,
        persistent_workers=workers > 0,
        device=device,
    )
    net = net.to(device).train()
    optimizer = create_optimizer_v2(net, opt="adamw", lr=1e-3, weight_decay=0.05)
    loss_of, seen, begun = nn.CrossEntropyLoss(), 0, 0.0
    while True:
        for pixels, label in loader:
            pixels, label = pixels.to(device), label.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=low):
                loss = loss_of(net(pixels), label)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen += 1
            if seen == 5:
                _wait(device)
                begun = time.perf_counter()
            elif seen > 5 and time.perf_counter() - begun > seconds:
                _wait(device)
                return (seen - 5) * batch / (time.perf_counter() - begun)


class Bar:
    """A progress bar with images per second, loss, utilisation and time left; silent where nobody watches."""

    def __init__(self, name: str, start: int, steps: int, batch: int, flop: float, peak: float, show: bool) -> None:
        self.batch, self.flop, self.peak = batch, flop, peak
        hidden = not show or not sys.stderr.isatty()
        self.bar: Any = tqdm(total=steps, initial=start, desc=name, unit="step", disable=hidden, dynamic_ncols=True)
        self.steps, self.seconds = 0, 0.0
        self.since: float | None = time.perf_counter()  # None while the clock stands still

    def pause(self) -> None:
        """Stop the clock: a look at the network is no training."""
        self.seconds, self.since = self._spent(), None

    def _spent(self) -> float:
        return self.seconds + (0.0 if self.since is None else time.perf_counter() - self.since)

    def go(self) -> None:
        """Start the clock again."""
        self.since = time.perf_counter()

    def advance(self, loss: float | None = None) -> None:
        """Count a step; now and then with a loss to show."""
        self.steps += 1
        if loss is not None:
            self.bar.set_postfix_str(
                f"{self.rate():,.0f} images/s, loss {loss:.4f}, utilisation {100 * self.utilisation():.0f} %"
            )
        self.bar.update()

    def rate(self) -> float:
        """Images per second of training, looks left out."""
        return self.steps * self.batch / max(self._spent(), 1e-9)

    def utilisation(self) -> float:
        """Model operations per second over the device's peak."""
        return self.rate() * self.flop / self.peak if self.peak else float("nan")

    def close(self) -> None:
        """Take the bar off the screen."""
        self.bar.close()
