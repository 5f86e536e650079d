"""Local probes: planted positions and pixels are found, others are not; slow versions agree; mistakes are named."""

import numpy as np
import pytest
import torch
import xarray as xr

from vitregs.arrays import token_coords
from vitregs.data import images
from vitregs.errors import InputError
from vitregs.models import registry
from vitregs.probes import local

GRID = (4, 6)
PLACES = 24


def states(values: np.ndarray) -> xr.DataArray:
    coords = token_coords(["patch"] * PLACES, GRID)
    return xr.DataArray(values, dims=("image", "token", "channel")[: values.ndim], coords=coords)


def marks(n: int, share: float = 0.2) -> xr.DataArray:
    return states(np.random.default_rng(5).random((n, PLACES)) < share)


def place_codes(n: int, noise: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(PLACES, 16)) + noise * rng.normal(size=(n, PLACES, 16))


def test_a_position_that_is_linearly_there_is_found() -> None:
    found = local.locate(states(place_codes(30, 0.05)), marks(30))
    assert found["score"].sel(quantity="top1").values.tolist() == [1, 1, 1]
    assert found["score"].sel(quantity="distance").values.tolist() == [0, 0, 0]
    assert int(found["tokens"].sel(group="all")) == 10 * PLACES


def test_a_position_that_is_not_there_is_chance() -> None:
    noise = np.random.default_rng(0).normal(size=(90, PLACES, 16))
    found = local.locate(states(noise), marks(90))["score"]
    assert float(found.sel(quantity="top1", group="all")) < 3 / PLACES
    cells = np.stack(np.divmod(np.arange(PLACES), 6), 1)
    uniform_guess = np.linalg.norm(cells[:, None] - cells, axis=-1).mean()  # both cells uniform
    assert float(found.sel(quantity="distance", group="all")) == pytest.approx(uniform_guess, rel=0.15)


@pytest.mark.parametrize("own", [False, True])
def test_a_position_that_outliers_lack_is_found_in_the_others(own: bool) -> None:
    """The paper's claim, planted: marked tokens hold noise instead."""
    values, marked = place_codes(60, 0.05), marks(60)
    values[marked.values] = 3 * np.random.default_rng(1).normal(size=(int(marked.sum()), 16))
    found = local.locate(states(values), marked, own=own)["score"].sel(quantity="top1")
    assert float(found.sel(group="normal")) > 0.97
    assert float(found.sel(group="outlier")) < 0.25


def test_distances_by_hand() -> None:
    """A probe trained on the mirrored columns names the mirrored column: |x - (5 - x)| on a grid of 4 by 6."""
    values = place_codes(30, 0.01)
    mirrored = values.reshape(30, 4, 6, 16)[:, :, ::-1].reshape(values.shape)
    both = np.concatenate([values[:20], mirrored[20:]])
    found = local.locate(states(both), marks(30))
    x = np.arange(6)
    assert float(found["score"].sel(quantity="distance", group="all")) == pytest.approx(np.abs(2 * x - 5).mean())


def test_pixels_that_are_linearly_there_come_back() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(30, PLACES, 20))
    marked = marks(30)
    full = pixels @ rng.normal(size=(20, 20)) + 1
    found = local.reconstruct(states(full), pixels, marked)
    assert float(found["score"].sel(quantity="r2", group="normal")) > 0.99
    assert float(found["score"].sel(quantity="l2", group="outlier")) < 0.1 * float(
        found["score"].sel(quantity="mean_patch", group="outlier")
    )
    lost = np.where(marked.values[..., None], rng.normal(size=full.shape), full)
    found = local.reconstruct(states(lost), pixels, marked)["score"].sel(quantity="r2")
    assert float(found.sel(group="normal")) > 0.7
    assert float(found.sel(group="outlier")) < 0.3
    assert (
        float(local.reconstruct(states(lost), pixels, marked, own=True)["score"].sel(quantity="r2", group="normal"))
        > 0.99
    )


def test_unrelated_states_explain_nothing() -> None:
    rng = np.random.default_rng(0)
    found = local.reconstruct(states(rng.normal(size=(60, PLACES, 8))), rng.normal(size=(60, PLACES, 5)), marks(60))
    assert abs(float(found["score"].sel(quantity="r2", group="all"))) < 0.05
    l2, plain = (float(found["score"].sel(quantity=q, group="all")) for q in ("l2", "mean_patch"))
    assert l2 == pytest.approx(plain, rel=0.03)


def test_ridge_solves_its_equations() -> None:
    """Against the normal equations, solved with the penalty that was chosen."""
    rng = np.random.default_rng(0)
    x, y, test = rng.normal(size=(80, 6)) + 2, rng.normal(size=(80, 3)), rng.normal(size=(5, 6))
    found = local._ridge(x, y, test)
    eigenvalues = np.linalg.eigvalsh(
        np.cov(x[8:].T, bias=True) if False else (x - x.mean(0))[8:].T @ (x - x.mean(0))[8:] / 72
    )
    fits = []
    for r in local.RIDGES:
        a, b = x - x.mean(0), y - y.mean(0)
        w = np.linalg.solve(a.T @ a / len(a) + r * eigenvalues.mean() * np.eye(6), a.T @ b / len(a))
        fits.append((test - x.mean(0)) @ w + y.mean(0))
    assert min(np.abs(f - found).max() for f in fits) < 1e-10


def test_a_group_without_tokens_has_no_score() -> None:
    found = local.locate(states(place_codes(30, 0.05)), states(np.zeros((30, PLACES), bool)))
    assert np.isnan(found["score"].sel(quantity="top1", group="outlier"))
    assert float(found["score"].sel(quantity="top1", group="normal")) == 1
    own = local.locate(states(place_codes(30, 0.05)), states(np.zeros((30, PLACES), bool)), own=True)
    assert np.isnan(own["score"].sel(quantity="top1", group="outlier"))
    assert float(own["score"].sel(quantity="top1", group="all")) == 1


def test_patches_are_cut_row_after_row() -> None:
    backbone = registry.random("vit_tiny_patch16_224", img_size=(32, 48), embed_dim=24, depth=1, num_heads=2)
    pixels = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    cut = local.cut(backbone, pixels)
    assert cut.shape == (2, 6, 768)
    normal = backbone.normalise(pixels)
    torch.testing.assert_close(cut[1, 4], normal[1, :, 16:32, 16:32].flatten())
    source = images.open_images("scenes", size=(32, 48), count=5)
    np.testing.assert_array_equal(local.pixels(backbone, source, 2), local.pixels(backbone, source, 5))


def test_normal_patches_on_objects_are_a_group_of_their_own() -> None:
    """A control for outliers that are objects: half of the patches are objects, and only these have lost their place."""
    values, marked = place_codes(60, 0.05), marks(60)
    background = np.tile(np.arange(PLACES) % 2, (60, 1)).astype(float)
    values[background == 0] = np.random.default_rng(2).normal(size=(60 * PLACES // 2, 16))
    found = local.locate(states(values), marked, background)
    top1 = found["score"].sel(quantity="top1")
    assert found["group"].values.tolist() == ["all", "normal", "outlier", "normal on objects"]
    assert float(top1.sel(group="normal on objects")) < 0.2
    assert float(top1.sel(group="normal")) > 0.4
    with pytest.raises(InputError, match=r"masks of \(60, 23\) tokens do not fit states of \(60, 24\)"):
        local.locate(states(values), marked, background[:, 1:])


def test_mistakes_are_named() -> None:
    good = states(place_codes(30, 0.05))
    with pytest.raises(InputError, match="3 images are too few to train a probe on some and test it on others"):
        local.locate(good[:3], marks(3))
    with pytest.raises(InputError, match=r"marks of \(29, 24\) tokens do not fit states of \(30, 24\)"):
        local.locate(good, marks(29))
    with pytest.raises(InputError, match=r"pixels of \(30, 23\) patches do not fit states of \(30, 24\)"):
        local.reconstruct(good, np.zeros((30, 23, 4)), marks(30))
    coords = token_coords(["cls", "patch", "patch"], (1, 2))
    mixed = xr.DataArray(np.zeros((9, 3, 2)), dims=("image", "token", "channel"), coords=coords)
    with pytest.raises(InputError, match="local probes take patch tokens only: leave CLS and registers out"):
        local.locate(mixed, mixed.isel(channel=0) > 0)
    one = xr.DataArray(np.zeros((9, 1, 2)), dims=("image", "token", "channel"), coords=token_coords(["patch"], (1, 1)))
    with pytest.raises(InputError, match="a grid of one patch has no positions to tell apart"):
        local.locate(one, one.isel(channel=0) > 0)
    with pytest.raises(InputError, match="not finite"):
        local.locate(states(np.full((30, PLACES, 4), np.nan)), marks(30))
