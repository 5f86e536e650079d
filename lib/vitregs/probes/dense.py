"""Dense probes: what the patch tokens tell of every pixel, by one linear layer (Table 2a, Fig 8).

The head is a batch normalisation and a 1x1 convolution (sections 2.6, 2.7). Both are linear, so they act on patches, and
what they say is interpolated to the pixels. Each step sees some images and some pixels of each, which leaves the mean
of the loss as it is and its cost small. The statistics of the normalisation are those of all training tokens.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor, nn

from vitregs import arrays
from vitregs.errors import InputError, unknown

SHARE = 2 / 3  # of the images are trained on, the first ones
STEPS, BATCH = 400, 16  # the paper's heads see 40,000 steps of 16 images
POINTS = 64  # pixels that a step draws in each image
RATE, DECAY, WARM = 3e-2, 1e-4, 0.04  # of AdamW: largest rate, weight decay, part of the steps in which the rate rises
HEADS = ("relu", "softmax")  # of depth
LIMIT = 2**21  # numbers in one block of interpolated scores: bounds the memory, and stays near the cache
Loss = Callable[[Tensor, Tensor], Tensor]


def _train_mask(count: int, share: float) -> np.ndarray:
    """Which images are trained on: the first ones. Raises InputError for fewer than two on either side."""
    if not 0 < share < 1:
        raise InputError(f"the share of training images must lie between 0 and 1, not {share}")
    train = np.arange(count) < round(share * count)
    if min(train.sum(), (~train).sum()) < 2:
        raise InputError(f"{count} images are too few to train on some and test on others")
    return train


def _maps(features: xr.DataArray) -> np.ndarray:
    """Patch tokens folded into maps: [image, token, channel] → (images, rows, columns, channels). Raises InputError
    for others."""
    if bool((features["kind"] != "patch").any()):
        raise InputError("dense probes take patch tokens only: leave CLS and registers out")
    rows, columns = int(features["y"].max()) + 1, int(features["x"].max()) + 1
    values = features.transpose("image", "token", "channel").values
    if not np.isfinite(values).all():
        raise InputError("the features are not finite: the weights or the pixels are broken")
    return values.reshape(len(values), rows, columns, -1)


def _truth(maps: np.ndarray, given: Sequence[np.ndarray | None] | np.ndarray, what: str) -> np.ndarray:
    """Check masks or depths against maps (images, rows, columns, channels): → (images, H, W)."""
    missing = sum(g is None for g in given)
    if missing:
        raise InputError(f"{missing} of {len(given)} images have no {what}: keep those that have one")
    if len(given) != len(maps):
        raise InputError(f"there are {what}s of {len(given)} images for features of {len(maps)}")
    sizes = {np.asarray(g).shape for g in given}
    rows, columns = maps.shape[1:3]
    for size in sizes:
        if len(sizes) > 1 or len(size) != 2 or size[0] % rows or size[1] % columns:
            shown = " and ".join("x".join(map(str, s)) for s in sorted(sizes)[:2])
            raise InputError(f"a {what} of {shown} pixels does not fit a grid of {rows}x{columns} patches")
    return np.stack([np.asarray(g) for g in given])


def _along(cells: int, pixels: int) -> Tensor:
    """Weights of cells in pixels along one side, as torch interpolates: → (pixels, cells), rows summing to 1."""
    return F.interpolate(torch.eye(cells)[None], size=pixels, mode="linear", align_corners=False)[0].T


class _Head(nn.Module):
    """Normalisation with the statistics of all x, and a linear layer behind it: (…, channels) → (…, outputs)."""

    def __init__(self, x: Tensor, outputs: int, rng: np.random.Generator) -> None:
        super().__init__()
        flat = x.flatten(0, -2)
        self.mean, self.scale = flat.mean(0), 1 / (flat.std(0) + 1e-6)
        first = 0.01 * rng.standard_normal((outputs, x.shape[-1]))
        self.weight = nn.Parameter(torch.from_numpy(first).to(x))
        self.bias = nn.Parameter(torch.zeros(outputs).to(x))

    def normalise(self, x: Tensor) -> Tensor:
        return (x - self.mean) * self.scale

    def forward(self, normal: Tensor) -> Tensor:
        return F.linear(normal, self.weight, self.bias)


def _fit(x: Tensor, truth: Tensor, outputs: int, loss: Loss, *, steps: int, seed: int) -> _Head:
    """Train a head by AdamW: maps (n, rows, columns, channels), truth (n, H, W), loss of scores (b, pixels, outputs) and truth →
    _Head. Raises InputError for no steps."""
    if steps < 1:
        raise InputError(f"steps must be 1 or more, not {steps}")
    (n, rows, columns, _), (height, width) = x.shape, truth.shape[1:]
    down, across = (_along(*s).to(x.device) for s in ((rows, height), (columns, width)))
    rng = np.random.default_rng(seed)
    head = _Head(x, outputs, rng)
    normal = head.normalise(x)  # once, not at every step
    optimiser = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=DECAY)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = RATE * min((step + 1) / (WARM * steps), 1 - step / steps)
        pick = torch.from_numpy(rng.permutation(n)[:BATCH]).to(x.device)
        y, z = (torch.from_numpy(rng.integers(0, s, (len(pick), POINTS))).to(x.device) for s in (height, width))
        weights = (down[y][..., :, None] * across[z][..., None, :]).flatten(2)
        predicted = weights @ head(normal[pick]).flatten(1, 2)
        optimiser.zero_grad()
        loss(predicted, truth[pick[:, None], y, z]).backward()
        optimiser.step()
    return head.requires_grad_(False)


def _everywhere(head: _Head, x: Tensor, size: tuple[int, int], reduce: Callable[[Tensor], Tensor]) -> np.ndarray:
    """What a head says at every pixel: maps (n, rows, columns, channels), reduce of (b, H, W, outputs) → (n, H, W)."""
    down, across = (_along(*s).to(x.device) for s in zip(x.shape[1:3], size, strict=True))
    parts = []
    for part in x.split(max(1, LIMIT // (len(head.bias) * size[0] * size[1]))):
        tall = torch.einsum("hr,brck->bhck", down, head(head.normalise(part)))
        parts.append(reduce(across @ tall).cpu())
    return torch.cat(parts).numpy()


def miou(counts: np.ndarray, axis: int = 0) -> np.ndarray:
    """Mean intersection over union of the classes that occur in truth or prediction: counts (…, 2, classes) of pixels that agree
    and of both sides together, summed over an axis of images first → (…)."""
    total = counts.sum(axis)
    both, union = total[..., 0, :], total[..., 1, :] - total[..., 0, :]
    share = np.divide(both, union, out=np.zeros(both.shape), where=union > 0)
    return share.sum(-1) / np.maximum((union > 0).sum(-1), 1)


def counts(confusion: np.ndarray) -> np.ndarray:
    """What `miou` needs of confusion matrices: (images, truth, predicted) → (images, 2, classes)."""
    return np.stack([np.diagonal(confusion, axis1=1, axis2=2), confusion.sum(1) + confusion.sum(2)], 1).astype(float)


def _confusion(true: np.ndarray, predicted: np.ndarray, valid: np.ndarray, classes: int) -> np.ndarray:
    """Pixels by true and by predicted class, for every image: (n, H, W) each → (n, truth, predicted)."""
    pair = true.astype(np.int64) * classes + predicted
    found = [np.bincount(p[v], minlength=classes**2) for p, v in zip(pair, valid, strict=True)]
    return np.stack(found).reshape(-1, classes, classes).astype(np.int32)


def from_shares(masks: np.ndarray, grid: tuple[int, int], classes: int) -> np.ndarray:
    """Masks again, from no more than the share of each class in every patch, interpolated: (n, H, W), (rows, columns) → (n, H, W)
    classes. Their score shows what is lost to the size of the patches; a trained head can be a little better."""
    (rows, columns), (n, height, width) = grid, masks.shape
    cut = masks.reshape(n, rows, height // rows, columns, width // columns)
    share = np.stack([(cut == k).mean((2, 4), dtype=np.float32) for k in range(classes)], 1)
    predicted = [
        F.interpolate(s[None], size=(height, width), mode="bilinear", align_corners=False)[0].argmax(0)
        for s in torch.from_numpy(share)
    ]
    return torch.stack(predicted).numpy()


def segment(
    features: xr.DataArray,
    masks: Sequence[np.ndarray | None] | np.ndarray,
    *,
    classes: int,
    ignore: int | None = None,
    share: float = SHARE,
    seed: int = 0,
    steps: int = STEPS,
    device: str | torch.device = "cpu",
) -> xr.Dataset:
    """Linear segmentation with frozen features: patch tokens [image, token, channel], masks (images, H, W) of class indices,
    how many classes, a class that is no truth, share of training images → Dataset (section 2.6, Table 2a).

    miou in [0, 1] over the pixels of the test images, low, high (95 % over images, drawn with all their pixels),
    iou[class] (nan where absent), chance (always the most frequent class), shares (the masks of `from_shares`), n, and confusion
    [image, truth, predicted] in pixels. Raises InputError for masks that are missing, of another size than the grid
    allows or with classes that do not exist, one class only, too few images, and features that are not finite.
    """
    maps = _maps(features)
    true = _truth(maps, masks, "mask").astype(np.int64)
    valid = np.ones(true.shape, bool) if ignore is None else true != ignore
    train = _train_mask(len(maps), share)
    kinds = np.unique(true[valid])
    if len(kinds) and not 0 <= kinds[0] <= kinds[-1] < classes:
        raise InputError(
            f"a mask holds class {kinds[-1] if kinds[-1] >= classes else kinds[0]}: there are {classes} classes"
        )
    usual = np.bincount(true[train][valid[train]], minlength=classes)
    if (usual > 0).sum() < 2 or not valid[~train].any():
        raise InputError("the masks show one class only, or none: there is nothing to tell apart")
    x, y = torch.from_numpy(maps).float().to(device), torch.from_numpy(np.where(valid, true, -1)).to(device)
    shut = torch.from_numpy(np.where(np.arange(classes) == ignore, -torch.inf, 0.0)).float().to(device)

    def loss(predicted: Tensor, here: Tensor) -> Tensor:
        total = F.cross_entropy((predicted + shut).flatten(0, 1), here.flatten(), ignore_index=-1, reduction="sum")
        return total / (here >= 0).sum().clamp(min=1)

    head = _fit(x[train], y[train], classes, loss, steps=steps, seed=seed)
    predicted = _everywhere(head, x[~train], true.shape[1:], lambda s: (s + shut).argmax(-1))
    confusion = _confusion(true[~train], predicted, valid[~train], classes)
    value, low, high = arrays.bootstrap_interval(counts(confusion), draws=1000, of=miou)
    always = np.full_like(predicted, usual.argmax())
    best = from_shares(np.where(valid, true, classes)[~train], maps.shape[1:3], classes)
    baselines = [miou(counts(_confusion(true[~train], s, valid[~train], classes))) for s in (always, best)]
    summed = confusion.sum(0, dtype=np.int64)
    union = summed.sum(0) + summed.sum(1) - np.diagonal(summed)
    numbers = {"miou": value, "low": low, "high": high, "chance": float(baselines[0]), "shares": float(baselines[1])}
    return xr.Dataset(
        {k: ((), v) for k, v in numbers.items()}
        | {
            "n": ((), len(predicted)),
            "iou": ("class", np.where(union > 0, np.diagonal(summed) / np.maximum(union, 1), np.nan)),
            "confusion": (("image", "truth", "predicted"), confusion),
        },
        coords={"image": np.flatnonzero(~train)},
    )


def _expect(predicted: Tensor, centres: Tensor) -> Tensor:
    """Depth from scores (…, bins), which it spoils: bins weighted by relu + 0.1, normalised linearly (section 2.7)."""
    sums = predicted.relu_() @ torch.stack([centres, torch.ones_like(centres)], 1)
    return (sums[..., 0] + 0.1 * centres.sum()) / (sums[..., 1] + 0.1 * len(centres))


def scale_invariant(predicted: Tensor, true: Tensor) -> Tensor:
    """Scale-invariant logarithmic loss of depths, of any shape: sqrt(var(g) + 0.15 mean(g)²), g = log(said / true) (section
    2.7; its warm-up and the gradient term of weight 0.5, which needs neighbouring pixels, are left out)."""
    g = predicted.log() - true.log()
    return (g.var() + 0.15 * g.mean().square() + 1e-8).sqrt()


def _two_bins(predicted: Tensor, true: Tensor, low: float, high: float) -> Tensor:
    """Cross-entropy of depths shared out between the two nearest bins: scores (…, bins), depths (…) → mean."""
    place = (true - low) / (high - low) * (predicted.shape[-1] - 1)
    first = place.floor().long().clamp(max=predicted.shape[-1] - 2)
    part = (place - first)[..., None]
    logs = predicted.log_softmax(-1)
    near, far = (logs.gather(-1, first[..., None] + i) for i in (0, 1))
    return -((1 - part) * near + part * far).mean()


def estimate_depth(
    features: xr.DataArray,
    depth: Sequence[np.ndarray | None] | np.ndarray,
    *,
    low: float,
    high: float,
    bins: int = 256,
    cls: xr.DataArray | None = None,
    head: str = "relu",
    share: float = SHARE,
    seed: int = 0,
    steps: int = STEPS,
    device: str | torch.device = "cpu",
) -> xr.Dataset:
    """Linear depth with frozen features: patch tokens [image, token, channel], depths (images, H, W) within low to high, number
    of bins, CLS [image, token, channel] to stand beside each patch token, kind of head → Dataset (section 2.7, Table 2a).

    The head "relu" is the paper's: bins weighted by relu + 0.1, and a scale-invariant loss. "softmax" weighs them by a softmax
    and learns by cross-entropy, which is convex: short trainings end in the same place, where those of "relu" differ by several
    per cent. rmse in the unit of the depths: mean over test images of the root mean square over their pixels, with
    low_rmse and high_rmse (95 % over images), error[image], n; constant and position: the same for the mean depth of the
    training images, and for their mean at each pixel. Raises InputError as `segment` does, for depths outside low to
    high, and for an unknown head.
    """
    if head not in HEADS:
        raise unknown("head", head, HEADS)
    maps = _maps(features)
    true = _truth(maps, depth, "depth map").astype(np.float32)
    train = _train_mask(len(maps), share)
    if not 0 < low < high or bins < 2:
        raise InputError(f"depths need two bins or more and 0 < low < high, not {bins} bins from {low} to {high}")
    if not (np.isfinite(true).all() and low <= true.min() and true.max() <= high):
        raise InputError(f"depths of {true.min():g} to {true.max():g} lie outside the bins from {low:g} to {high:g}")
    if cls is not None:
        if cls.sizes["image"] != len(maps):
            raise InputError(f"there are CLS tokens of {cls.sizes['image']} images for features of {len(maps)}")
        token = cls.transpose("image", "token", "channel").values[:, :1, None]
        maps = np.concatenate([maps, np.broadcast_to(token, (*maps.shape[:3], token.shape[-1]))], -1)
    x, y = torch.from_numpy(maps).float().to(device), torch.from_numpy(true).to(device)
    centres = torch.linspace(low, high, bins, device=device)

    def expect(predicted: Tensor) -> Tensor:
        return _expect(predicted, centres) if head == "relu" else predicted.softmax(-1) @ centres

    def loss(predicted: Tensor, here: Tensor) -> Tensor:
        return scale_invariant(expect(predicted), here) if head == "relu" else _two_bins(predicted, here, low, high)

    def image_rmse(guess: np.ndarray) -> np.ndarray:
        return np.sqrt(np.square(guess - true[~train], dtype=np.float64).mean((1, 2)))

    trained = _fit(x[train], y[train], bins, loss, steps=steps, seed=seed)
    error = image_rmse(_everywhere(trained, x[~train], true.shape[1:], expect))
    value, least, most = arrays.bootstrap_interval(error)
    numbers = {"rmse": value, "low_rmse": least, "high_rmse": most}
    numbers |= {"constant": image_rmse(true[train].mean()).mean(), "position": image_rmse(true[train].mean(0)).mean()}
    return xr.Dataset(
        {k: ((), float(v)) for k, v in numbers.items()} | {"n": ((), len(error)), "error": ("image", error)},
        coords={"image": np.flatnonzero(~train)},
    )
