"""Slot Attention on frozen patch states: groups of patches found without attention maps or labels, to compare with.

Slot Attention is Locatello et al. 2020 (NeurIPS, algorithm 1); reconstructing frozen features instead of pixels,
with a decoder that gives every slot its own image and a mask, is DINOSAUR (Seitzer et al. 2023, ICLR).
"""

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor, nn

from vitregs.arrays import patch_maps
from vitregs.errors import InputError

RATE, WARMUP, CLIP = 5e-3, 0.1, 1.0  # peak learning rate, share of steps that rise to it, largest gradient norm
SHARP = 3.0  # factor on the first logits: slots begin as a soft k-means that already decides


def ramps(grid: tuple[int, int]) -> Tensor:
    """Where each patch is, as numbers: (rows, columns) → (patches, 6): y and x from -1 to 1, and sine and cosine of a
    quarter turn of each."""
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, n) for n in grid), indexing="ij")
    turned = [turn(torch.pi / 2 * side) for side in (y, x) for turn in (torch.sin, torch.cos)]
    return torch.stack([y, x, *turned], -1).flatten(0, 1)


class SlotAttention(nn.Module):
    """Slots that compete for tokens; another order of slots goes in and comes out."""

    def __init__(self, width: int, iterations: int = 3) -> None:
        super().__init__()
        self.iterations = iterations
        self.norm, self.slot_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.update = nn.GRUCell(width, width)
        last = nn.Linear(2 * width, width)
        self.think = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.ReLU(), last)
        # the latter is log
        self.mean, self.log_std = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        # a soft k-means to begin with: without it slots take some thousand steps to part
        with torch.no_grad():
            for linear, factor in ((self.query, SHARP**0.5), (self.key, SHARP**0.5), (self.value, 1.0)):
                linear.weight.copy_(torch.eye(width) * factor)
            self.update.weight_ih[2 * width :] = torch.eye(width)
            self.update.weight_hh[2 * width :] *= 0.1
            self.update.bias_ih[width : 2 * width] = -1.0  # the gate that keeps the old slot is half shut
            last.weight.zero_()

    def forward(self, tokens: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Group tokens: (n, tokens, width), standard noise (n, slots, width) → slots (n, slots, width), attention (n,
        slots, tokens), which sums to 1 over slots."""
        tokens = self.norm(tokens)
        keys, values = self.key(tokens), self.value(tokens)
        slots, weights = self.mean + self.log_std.exp() * noise, keys[:0]
        for _ in range(self.iterations):
            logits = self.query(self.slot_norm(slots)) @ keys.transpose(1, 2) * keys.shape[-1] ** -0.5
            weights = logits.softmax(1)  # over slots: they compete
            share = weights + 1e-8
            found = (share / share.sum(-1, keepdim=True)) @ values
            slots = self.update(found.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
            slots = slots + self.think(slots)
        return slots, weights


class AutoEncoder(nn.Module):
    """Features to slots and back: every slot is spread over all places, decoded there, and mixed by masks."""

    def __init__(self, grid: tuple[int, int], channels: int, width: int = 48) -> None:
        super().__init__()
        self.width = width
        self.at: Tensor
        self.register_buffer("at", ramps(grid))
        first = nn.Linear(channels, width)
        self.read = nn.Sequential(nn.LayerNorm(channels), first)
        self.place_in, self.place_out = (nn.Linear(self.at.shape[1], width) for _ in range(2))
        self.slots = SlotAttention(width)
        self.decode = nn.Sequential(
            nn.Linear(width, 2 * width),
            nn.ReLU(),
            nn.Linear(2 * width, 2 * width),
            nn.ReLU(),
            nn.Linear(2 * width, channels + 1),
        )
        nn.init.orthogonal_(first.weight)
        with torch.no_grad():
            self.place_out.weight *= 2

    def forward(self, features: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rebuild features: (n, tokens, channels), standard noise (n, slots, width) → the same rebuilt; the decoder's masks
        and the slots' attention (n, slots, tokens), both of which sum to 1 over slots."""
        slots, weights = self.slots(self.read(features) + self.place_in(self.at), noise)
        out = self.decode(slots[:, :, None] + self.place_out(self.at))
        masks = out[..., -1].softmax(1)
        return torch.einsum("nkt,nktc->ntc", masks, out[..., :-1]), masks, weights


def discover(states: xr.DataArray, *, slots: int = 7, steps: int = 200, batch: int = 16, seed: int = 0) -> xr.Dataset:
    """Train Slot Attention on frozen states and group their patches: [image, token, channel], number of slots, steps,
    images a step, seed → the decoder's `mask` and the slots' `attention` [image, query, y, x], both summing to 1 over
    queries, and `loss` [step] before and after.

    The loss is the mean squared error of the states, each channel standardised over all images and patches; training
    sees the images that are grouped afterwards, but no label. Raises InputError for fewer than 2 slots, steps below 0,
    batches below 1 and no images.
    """
    maps = patch_maps(states).transpose("image", "y", "x", "channel")
    n, rows, columns, channels = maps.shape
    if slots < 2 or steps < 0 or batch < 1 or n < 1:
        raise InputError(f"cannot train {slots} slots for {steps} steps on batches of {batch} from {n} images")
    x = torch.from_numpy(maps.values.reshape(n, rows * columns, channels).astype(np.float32))
    x = (x - x.mean((0, 1))) / x.std((0, 1), correction=0).clamp(min=1e-6)
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = AutoEncoder((rows, columns), channels)
    fixed = torch.randn(n, slots, net.width, generator=draw)
    before, *_ = _evaluate(net, x, fixed)
    _train(net, x, slots, steps, min(batch, n), draw)
    after, *found = _evaluate(net, x, fixed)
    dims, shape = ("image", "query", "y", "x"), (n, slots, rows, columns)
    mask, attention = ((dims, part.view(shape).numpy()) for part in found)
    return xr.Dataset(
        {"mask": mask, "attention": attention, "loss": ("step", [before, after])},
        coords={"query": [f"slot{k}" for k in range(slots)], "step": [0, steps]},
    )


def _evaluate(net: AutoEncoder, x: Tensor, noise: Tensor) -> tuple[float, Tensor, Tensor]:
    with torch.no_grad():
        parts = [net(a, b) for a, b in zip(x.split(64), noise.split(64), strict=True)]
    rebuilt, masks, weights = (torch.cat(p) for p in zip(*parts, strict=True))
    return float(F.mse_loss(rebuilt, x)), masks, weights


def _train(net: AutoEncoder, x: Tensor, slots: int, steps: int, batch: int, draw: torch.Generator) -> None:
    optimiser = torch.optim.Adam(net.parameters(), lr=RATE)
    rise = max(1, round(WARMUP * steps))
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(x), generator=draw)
        now, order = order[:batch], order[batch:]
        for group in optimiser.param_groups:
            group["lr"] = RATE * min((step + 1) / rise, (steps - step) / max(1, steps - rise))
        rebuilt, *_ = net(x[now], torch.randn(len(now), slots, net.width, generator=draw))
        optimiser.zero_grad()
        F.mse_loss(rebuilt, x[now]).backward()
        nn.utils.clip_grad_norm_(net.parameters(), CLIP)
        optimiser.step()
