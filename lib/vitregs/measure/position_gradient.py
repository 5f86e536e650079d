"""What a bicubic resize of a position table does to its gradient (Fig 11), independent of torch."""

import numpy as np


def gradient(old: int, new: int, *, antialias: bool, scale: float | None = None) -> np.ndarray:
    """Gradient of the summed output of a bicubic resize with respect to its input, in one dimension: sizes → (old,)
    (Fig 11; `scale` gives the factor instead of the size, as DINOv2's first code did).

    Independent of torch: Keys' cubic kernel with A = -0.75, or -0.5 and a widened support with anti-aliasing.
    """
    a = -0.5 if antialias else -0.75
    step = old / new if scale is None else 1 / scale
    support = max(step, 1.0) if antialias else 1.0

    def kernel(x: np.ndarray) -> np.ndarray:
        x = np.abs(x)
        inner = (a + 2) * x**3 - (a + 3) * x**2 + 1
        outer = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
        return np.where(x <= 1, inner, np.where(x < 2, outer, 0.0))

    gradient = np.zeros(old)
    for i in range(new):
        centre = (i + 0.5) * step - 0.5
        if antialias:
            taps = np.arange(old)
            weight = kernel((taps - centre) / support)
            weight = weight / weight.sum()
        else:
            taps = np.floor(centre).astype(int) + np.arange(-1, 3)
            weight = kernel(taps - centre)
            taps = taps.clip(0, old - 1)
        np.add.at(gradient, taps, weight)
    return gradient
