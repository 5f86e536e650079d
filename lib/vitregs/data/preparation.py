"""How an image is brought to a network's size: resized and cropped as timm's evaluation of the model does."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vitregs.errors import InputError, unknown

MODES = ("center", "squash", "border")
INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
THIN = 8  # an image that would be resized to so many times the pixels that are kept is cropped first


@dataclass(frozen=True)
class Preparation:
    """Resizing and cropping of an evaluation, as timm's data config names it.

    Args:
        crop: Share of the resized image's side that is kept, above 0 and up to 1 (timm: crop_pct).
        mode: "center" keeps the aspect ratio and cuts the ends off, "squash" scales each side by itself, "border" keeps
            the whole image and pads (timm: crop_mode).
        interpolation: One of INTERPOLATIONS.
        fill: Red, green and blue of the padding, 0 to 255.

    Raises:
        InputError: for values that make no sense.
    """

    crop: float = 1.0
    mode: str = "center"
    interpolation: str = "bicubic"
    fill: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        """Check all values."""
        if not 0 < self.crop <= 1:
            raise InputError(f"crop must be a share above 0 and up to 1, not {self.crop}")
        if self.mode not in MODES:
            raise unknown("crop mode", self.mode, MODES)
        if self.interpolation not in INTERPOLATIONS:
            raise unknown("interpolation", self.interpolation, INTERPOLATIONS)

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Preparation":
        """Read timm's data config (`timm.data.resolve_data_config`): → Preparation."""
        red, green, blue = (round(255 * v) for v in config["mean"])
        mode = config["crop_mode"] or "center"
        return cls(
            config["crop_pct"], mode, config["interpolation"], (red, green, blue) if mode == "border" else (0, 0, 0)
        )

    def resized(self, image: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
        """Size before the crop: (height, width) of the image and of the result → (height, width) in pixels."""
        (height, width), (new_height, new_width) = image, (math.floor(side / self.crop) for side in size)
        if self.mode == "squash":
            return new_height, new_width
        ratios = height / new_height, width / new_width
        if self.mode == "border":
            return max(1, round(height / max(ratios))), max(1, round(width / max(ratios)))
        if new_height != new_width:
            return round(height / min(ratios)), round(width / min(ratios))
        return (
            (new_height, int(new_height * width / height))
            if height <= width
            else (int(new_height * height / width), new_height)
        )

    def apply(
        self, image: Image.Image, size: tuple[int, int], *, labels: bool = False
    ) -> tuple[Image.Image, np.ndarray, np.ndarray]:
        """Resize and crop an image as timm's evaluation transform does.

        Args:
            image: An image, or class labels of its pixels.
            size: Height and width of the result in pixels.
            labels: Whether pixels are labels, which are never mixed and are padded with 0.

        Returns:
            The image; scale (y, x) from the original to resized pixels; corner (y, x) of the crop in resized pixels,
            negative where the image is padded.
        """
        height, width = size
        new_height, new_width = self.resized((image.height, image.width), size)
        how = Image.Resampling.NEAREST if labels else Image.Resampling[self.interpolation.upper()]
        top, before_y = _place(new_height, height)
        left, before_x = _place(new_width, width)
        scale = np.array([new_height / image.height, new_width / image.width], np.float32)
        kept = left, top, min(left + width, new_width), min(top + height, new_height)
        if new_height * new_width > THIN * height * width / self.crop**2:
            box = kept[0] / scale[1], kept[1] / scale[0], kept[2] / scale[1], kept[3] / scale[0]
            inside = [min(max(float(v), 0.0), edge) for v, edge in zip(box, 2 * image.size, strict=True)]
            part = image.resize((kept[2] - left, kept[3] - top), how, box=(inside[0], inside[1], inside[2], inside[3]))
        else:
            part = image.resize((new_width, new_height), how).crop(kept)
        if part.size != (width, height):
            whole = Image.new(part.mode, (width, height), 0 if labels else self.fill)
            whole.paste(part, (before_x, before_y))
            part = whole
        return part, scale, np.array([top - before_y, left - before_x], np.float32)


def _place(side: int, wanted: int) -> tuple[int, int]:
    """Where a side is cut and what is put before it: resized and wanted length → first pixel kept, padding before it."""
    return (round((side - wanted) / 2), 0) if side >= wanted else (0, (wanted - side) // 2)
