"""Signed distances of the scene shapes, made of +, -, *, / and square root only.

These five operations are exact to the last bit on every IEEE machine; sine, logarithm or bicubic kernels are not.
Coordinates are in units of the object's radius; a distance is negative inside.
"""

from collections.abc import Callable

import torch
from torch import Tensor

HALF_ROOT_3 = 0.8660254037844386


def _disc(x: Tensor, y: Tensor) -> Tensor:
    return (x * x + y * y).sqrt() - 1.0


def _box(x: Tensor, y: Tensor, width: float, height: float) -> Tensor:
    return torch.maximum(x.abs() - width, y.abs() - height)


def _square(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, 0.82, 0.82)


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs() * HALF_ROOT_3 - y * 0.5, y) - 0.5


def _ring(x: Tensor, y: Tensor) -> Tensor:
    return (_disc(x, y) + 0.25).abs() - 0.22


def _cross(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_box(x, y, 0.3, 0.95), _box(x, y, 0.95, 0.3))


def _star(x: Tensor, y: Tensor) -> Tensor:
    return torch.minimum(_triangle(x, y), _triangle(x, -y))


def _crescent(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(_disc(x, y), 0.78 - ((x - 0.5) * (x - 0.5) + y * y).sqrt())


def _bar(x: Tensor, y: Tensor) -> Tensor:
    return _box(x, y, 0.98, 0.3)


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disc": _disc,
    "square": _square,
    "triangle": _triangle,
    "ring": _ring,
    "cross": _cross,
    "star": _star,
    "crescent": _crescent,
    "bar": _bar,
}


def _wave(x: Tensor) -> Tensor:
    """A triangle wave of period 1 between 0 and 1."""
    return (x - x.floor() - 0.5).abs() * 2.0


def _edge(x: Tensor) -> Tensor:
    """A soft step at 0.5, two fifths wide, so that patterns stay free of aliasing."""
    return ((x - 0.5) * 2.5 + 0.5).clamp(0.0, 1.0)


def stripes(x: Tensor, y: Tensor) -> Tensor:
    """Stripe pattern: coordinates in periods → darkness in [0, 1]."""
    return _edge(_wave(x))


def checker(x: Tensor, y: Tensor) -> Tensor:
    """Checker pattern: coordinates in periods → darkness in [0, 1]."""
    a, b = _edge(_wave(x)), _edge(_wave(y))
    return a + b - a * b * 2.0


def dots(x: Tensor, y: Tensor) -> Tensor:
    """Dot pattern: coordinates in periods → darkness in [0, 1]."""
    u, v = _wave(x), _wave(y)
    return _edge(1.15 - (u * u + v * v).sqrt())
