"""The gradient of a resize against torch's autograd and against the published figure."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vitregs.data import published
from vitregs.measure.position_gradient import gradient


def autograd(old: int, new: int, antialias: bool, scale: float | None) -> np.ndarray:
    """Gradient of the sum of F.interpolate's output, (old, old), in double precision."""
    table = torch.zeros(1, 1, old, old, dtype=torch.float64, requires_grad=True)
    where = {"size": (new, new)} if scale is None else {"scale_factor": (scale, scale)}
    out = F.interpolate(table, mode="bicubic", align_corners=False, antialias=antialias, **where)
    assert out.shape[-1] == new
    out.sum().backward()
    assert table.grad is not None
    return table.grad[0, 0].numpy()


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("old", "new"), [(16, 7), (37, 16), (37, 7), (14, 14), (7, 16), (16, 37), (5, 4), (3, 1)])
def test_a_named_size_is_torchs_autograd(old: int, new: int, antialias: bool):
    g = gradient(old, new, antialias=antialias)
    assert g.shape == (old,)
    np.testing.assert_allclose(np.outer(g, g), autograd(old, new, antialias, None), atol=1e-5)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("old", "new"), [(16, 7), (37, 16), (37, 7), (16, 20)])
def test_a_named_factor_is_torchs_autograd(old: int, new: int, antialias: bool):
    scale = (new + 0.1) / old
    g = gradient(old, new, antialias=antialias, scale=scale)
    np.testing.assert_allclose(np.outer(g, g), autograd(old, new, antialias, scale), atol=1e-5)


@pytest.mark.parametrize(
    ("variant", "antialias", "scale"),
    [
        ("no_antialias_size", False, None),
        ("no_antialias_scale", False, 7.1 / 16),
        ("antialias_size", True, None),
    ],
)
def test_the_published_figure(variant: str, antialias: bool, scale: float | None):
    rows = published.table("fig11")
    rows = rows[rows["variant"] == variant].sort_values("index")
    assert list(rows["index"]) == list(range(16))
    ours = gradient(16, 7, antialias=antialias, scale=scale)
    np.testing.assert_allclose(ours, rows["value"].to_numpy(float), atol=5.1e-4)


@pytest.mark.parametrize("antialias", [False, True])
def test_the_gradient_sums_to_the_size_of_the_output(antialias: bool):
    assert gradient(16, 7, antialias=antialias).sum() == pytest.approx(7)


def test_anti_aliasing_evens_the_gradient_out():
    with_, without = (gradient(16, 7, antialias=a)[3:-3] for a in (True, False))
    assert np.ptp(with_) < 0.02
    assert np.ptp(without) > 1
