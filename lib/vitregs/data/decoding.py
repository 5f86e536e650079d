"""Encoded images become upright RGB of 8 bits; what their numbers mean is told by type and metadata, not by guessing.

Images of more than 8 bits have one range for the whole source (see `white`).
"""

import importlib
import importlib.util
import io
import struct
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# formats of PIL that hold no image by themselves, or are read by another program
OTHERS = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS", "PDF"}
RANGES = {"int": (65535.0, 2.0**31 - 1), "float": (1.0, 255.0, 65535.0)}  # of deep images, the first that fits is taken
SLACK = 1.5  # a float may pass its range so much: resampling overshoots


@cache
def formats() -> tuple[str, ...]:
    """Formats that can be read here, by PIL's names; HEIC where pillow_heif is installed."""
    if importlib.util.find_spec("pillow_heif"):
        importlib.import_module("pillow_heif").register_heif_opener()
    Image.init()
    return tuple(sorted(set(Image.OPEN) - OTHERS))


@cache
def suffixes() -> frozenset[str]:
    """Endings of files that can be read here, in small letters with the dot."""
    return frozenset(end for end, kind in Image.registered_extensions().items() if kind in formats())


@dataclass
class Decoded:
    """An upright image as it is stored: `kind` says whether its numbers are bytes, or deep int or float."""

    image: Image.Image
    kind: str  # byte, int, float
    bits: int = 8  # that the file says are significant
    wide: int = 1  # what a unit of `image` is worth: PIL halves the bits of deep colours

    def values(self) -> np.ndarray:
        """Numbers of a deep image in the file's own unit: → (height, width) or (height, width, 3) float64; nan becomes 0."""
        image = self.image.convert("RGB") if self.wide > 1 else self.image
        return np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0) * self.wide

    def rgb(self, white: float = 0) -> Image.Image:
        """Make RGB of 8 bits: value that becomes white in a deep image (0: by its own type and metadata) → image."""
        image = self.image
        if self.kind != "byte":
            values = self.values()
            scaled = values / (white or _white([(float(values.max()), self.bits)], self.kind)) * 255
            image = Image.fromarray(scaled.clip(0, 255).round().astype(np.uint8))
        return image.convert("RGBA").convert("RGB") if image.mode == "P" else image.convert("RGB")


def read(data: bytes | Path) -> Decoded:
    """Decode an image and turn it upright: bytes or path → Decoded. Raises OSError for damaged data, and for images so large
    that PIL holds them for an attack."""
    try:
        encoded = data if isinstance(data, bytes) else data.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the caller knows its name
            image = Image.open(io.BytesIO(encoded), formats=formats())
        bits, deep = _depth(image, encoded)
        image.load()
        kind = {"F": "float", "I": "int"}.get(image.mode.partition(";")[0], "int" if deep else "byte")
        colour = kind == "int" and not image.mode.startswith("I")
        return Decoded(ImageOps.exif_transpose(image), kind, bits if kind == "int" else 8, 257 if colour else 1)
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise OSError(f"of more than {most} million pixels: make it smaller") from error
    except Exception as error:  # the decoders of damaged data raise many kinds
        raise OSError("not an image, or a damaged one") from error


def decode(data: bytes | Path, white: float = 0) -> Image.Image:
    """Decode an image to upright RGB of 8 bits: bytes or path, value that becomes white in an image of more than 8 bits (0: by
    its type and metadata) → image. Transparency is dropped. Raises OSError for damaged data."""
    return read(data).rgb(white)


def white(files: Iterable[bytes | Path], kind: str) -> float:
    """The value that is white in the deep images of a source: some of its files, int or float → the top of their range.

    Integers have the range of their type, or of the bits that the file says are significant where no value passes them;
    floats the first of 1, 255 and 65535 that fits all.
    """
    found = []
    for file in files:
        try:
            one = read(file)
        except OSError:
            continue
        if one.kind == kind:
            found.append((float(one.values().max()), one.bits))
    return _white(found, kind)


def _white(found: list[tuple[float, int]], kind: str) -> float:
    top = max((top for top, _ in found), default=0.0)
    bits = max((bits for _, bits in found), default=16)
    if kind == "int" and bits < 16 and top < 2**bits:
        return 2.0**bits - 1
    slack = SLACK if kind == "float" else 1
    return next((r for r in RANGES[kind] if top <= slack * r), RANGES[kind][-1])


def _depth(image: Image.Image, encoded: bytes) -> tuple[int, bool]:
    """Significant bits of an image that is open and not yet loaded, and whether it has more than 8: image, its file → both."""
    deep = any(";16" in str(part) for tile in getattr(image, "tile", ()) for part in _flat(tile[3]))
    if image.format == "PNG" and (at := encoded.find(b"sBIT", 0, encoded.find(b"IDAT"))) > 0:
        length = struct.unpack(">I", encoded[at - 4 : at])[0]
        return max(encoded[at + 4 : at + 4 + min(length, 3)]), deep
    told = getattr(image, "tag_v2", {}).get(258, (16,))  # BitsPerSample of a TIFF
    return int(max(told if isinstance(told, tuple) else (told,))), deep


def _flat(args: object) -> tuple[object, ...]:
    return args if isinstance(args, tuple) else (args,)
