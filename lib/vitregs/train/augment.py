"""Batched augmentation on the training device, each image with draws of its own; kornia does the work.

DeiT-III's 3-Augment (paper section 3.1; Touvron et al. 2022, section 3.2) and DINO's multi-crop (Caron et al. 2021,
appendix C).
"""

from typing import Any

import torch
from torch import Tensor, nn

from vitregs.errors import extra
from vitregs.train.config import Dino

with extra("train", "training"):
    import kornia.augmentation as K


BLUR = (7, 7)  # kernel in pixels, with a standard deviation of 0.1 to 2.0 as published


def _crop(size: int, scale: tuple[float, float]) -> nn.Module:
    return K.RandomResizedCrop((size, size), scale=scale, ratio=(3 / 4, 4 / 3), cropping_mode="resample")


class _Augment(nn.Module):
    """Without gradients and in full precision: half precision would move the sampling."""

    def __call__(self, pixels: Tensor) -> Any:
        with torch.no_grad(), torch.autocast(pixels.device.type, enabled=False):
            return super().__call__(pixels)


class CropFlip(_Augment):
    """A random part of each image, flipped half of the time (MAE: scale 0.2 to 1; OpenCLIP: 0.9 to 1)."""

    def __init__(self, size: int, scale: tuple[float, float]) -> None:
        super().__init__()
        self.steps = nn.Sequential(_crop(size, scale), K.RandomHorizontalFlip(p=0.5))

    def forward(self, pixels: Tensor) -> Tensor:
        """(n, 3, H, W) in [0, 1] → (n, 3, size, size)."""
        return self.steps(pixels)


class ThreeAugment(_Augment):
    """Simple random crop, flip, one of grey, solarise and blur for each image, colour jitter 0.3."""

    def __init__(self, size: int) -> None:
        super().__init__()
        pad = max(1, size // 16)  # 4 pixels at 64; DeiT-III pads 4 at 224
        self.place = nn.Sequential(
            K.RandomCrop((size, size), padding=pad, padding_mode="reflect", cropping_mode="slice"),
            K.RandomHorizontalFlip(p=0.5),
        )
        self.three = nn.ModuleList(
            [K.RandomGrayscale(p=1.0), K.RandomSolarize(0.0, 0.0, p=1.0), K.RandomGaussianBlur(BLUR, (0.1, 2.0), p=1.0)]
        )
        self.jitter = K.ColorJitter(0.3, 0.3, 0.3, p=1.0)

    def forward(self, pixels: Tensor) -> Tensor:
        """(n, 3, H, W) in [0, 1] → the same shape."""
        placed = self.place(pixels)
        which = torch.randint(len(self.three), (len(placed),), device=placed.device).view(-1, 1, 1, 1)
        out = placed
        for i, step in enumerate(self.three):
            out = torch.where(which == i, step(placed), out)
        return self.jitter(out)


def cutmix(pixels: Tensor) -> tuple[Tensor, float]:
    """Paste a box of each image into the next one of the batch (CutMix, Yun et al. 2019).

    The box lies anywhere, is cut off at the edge, and has an area drawn evenly; it is the same for all images of a batch.

    Args:
        pixels: (n, 3, H, W).

    Returns:
        Mixed images of the same shape, and the share of each that is still its own; the rest is of image i - 1.
    """
    height, width = pixels.shape[-2:]
    part, down, right = torch.rand(3).tolist()
    tall, wide = round(height * part**0.5), round(width * part**0.5)
    top, left = round(height * down - tall / 2), round(width * right - wide / 2)
    rows, columns = slice(max(top, 0), min(top + tall, height)), slice(max(left, 0), min(left + wide, width))
    mixed = pixels.clone()
    mixed[..., rows, columns] = pixels.roll(1, 0)[..., rows, columns]
    return mixed, 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)


class MultiCrop(_Augment):
    """Two large views of each image and several small ones, with DINO's distortions."""

    def __init__(self, size: int, crops: Dino) -> None:
        super().__init__()

        def view(side: int, scale: tuple[float, float], blur: float, solarise: float) -> nn.Module:
            return nn.Sequential(
                _crop(side, scale),
                K.RandomHorizontalFlip(p=0.5),
                K.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
                K.RandomGrayscale(p=0.2),
                K.RandomGaussianBlur(BLUR, (0.1, 2.0), p=blur),
                *([K.RandomSolarize(0.0, 0.0, p=solarise)] if solarise else []),
            )

        self.count = crops.local_crops
        self.first = view(size, crops.global_scale, 1.0, 0.0)
        self.second = view(size, crops.global_scale, 0.1, 0.2)
        self.small = view(crops.local_size, crops.local_scale, 0.5, 0.0)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """(n, 3, H, W) in [0, 1] → large views (2, n, 3, size, size), small ones (crops, n, 3, local, local) or None."""
        large = torch.stack([self.first(pixels), self.second(pixels)])
        if not self.count:
            return large, None
        repeated = pixels.repeat(self.count, 1, 1, 1)
        small = self.small(repeated)
        return large, small.view(self.count, len(pixels), *small.shape[1:])
