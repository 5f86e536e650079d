"""Principal components: scikit-learn's, planted directions, fixed signs, grids that are not square, named mistakes."""

import numpy as np
import pytest
import xarray as xr
from scipy.stats import spearmanr
from sklearn.decomposition import PCA

from vitregs import report
from vitregs.arrays import token_coords
from vitregs.errors import InputError
from vitregs.measure import pca

GRID = (3, 5)


def states(n: int = 4, d: int = 6, seed: int = 0) -> xr.DataArray:
    kinds = ["cls", "register", *["patch"] * 15]
    values = np.random.default_rng(seed).gamma(1.0, size=(n, 17, d))
    values[:, :2] = 1e6  # tokens that are no patches must not count
    return xr.DataArray(values, dims=("image", "token", "channel"), coords=token_coords(kinds, GRID))


def test_maps_are_those_of_scikit_learn() -> None:
    x = states()
    found = pca.principal(x, count=3)
    assert found["maps"].shape == (4, 3, 3, 5)
    for i in range(4):
        theirs = PCA(3, whiten=True)
        scores = theirs.fit_transform(x.values[i, 2:]) * np.sqrt(15 / 14)  # it divides by n - 1
        scores *= np.sign((scores**3).mean(0))
        np.testing.assert_allclose(found["maps"].values[i].reshape(3, 15).T, scores, atol=1e-8)
        np.testing.assert_allclose(found["variance"].values[i], theirs.explained_variance_ratio_, atol=1e-10)


def test_maps_are_white_and_skewed_to_the_right() -> None:
    maps = pca.principal(states(), count=3)["maps"].values.reshape(4, 3, 15)
    np.testing.assert_allclose(maps.mean(-1), 0, atol=1e-9)
    np.testing.assert_allclose(maps.std(-1), 1, atol=1e-9)
    assert ((maps**3).mean(-1) >= 0).all()


def test_a_planted_direction_is_the_first_component() -> None:
    x = states(seed=1)
    pattern = np.zeros(15)
    pattern[[4, 9]] = 100.0
    x.values[:, 2:] += pattern[:, None] * np.ones(6)
    found = pca.principal(x, count=1)
    assert (found["variance"].values > 0.98).all()
    for row in found["maps"].values.reshape(4, 15):
        assert set(np.argsort(-row)[:2]) == {4, 9}


def test_together_they_share_one_analysis() -> None:
    x = states()
    both = pca.principal(x, count=2, joint=True)
    theirs = PCA(2, whiten=True).fit_transform(x.values[:, 2:].reshape(60, 6)) * np.sqrt(60 / 59)
    theirs *= np.sign((theirs**3).mean(0))
    np.testing.assert_allclose(both["maps"].values.transpose(0, 2, 3, 1).reshape(60, 2), theirs, atol=1e-8)
    assert (both["variance"].values == both["variance"].values[0]).all()


def test_the_order_of_images_does_not_matter() -> None:
    x = states()
    order = [2, 0, 3, 1]
    np.testing.assert_allclose(
        pca.principal(x[order])["maps"].values, pca.principal(x)["maps"].values[order], atol=1e-9
    )


def test_colours_lie_within_range() -> None:
    maps = pca.principal(states(), count=3)["maps"]
    found = report.features.colours(maps)
    assert found.shape == (4, 3, 5, 3)
    assert found.min() >= 0
    assert found.max() <= 1
    np.testing.assert_allclose(found[0, 1, 2], np.clip(maps.values[0, :, 1, 2] / 4.6 + 0.5, 0, 1))


def test_the_summary_finds_a_map_that_is_the_norm() -> None:
    x = states(seed=1)
    x.values[:, 2:] += np.linspace(0, 50, 15)[:, None]
    norms = xr.DataArray(
        np.linalg.norm(x.values, axis=-1), dims=("image", "token"), coords={k: x[k] for k in ("kind",)}
    )
    background = np.tile(np.linspace(1, 0, 15), (4, 1))
    table = report.features.summary({"a": pca.principal(x)}, {"a": norms}, {"a": background}).iloc[0]
    assert table["with norm"].startswith(("1.00", "0.99"))
    assert table["with background"].startswith(("1.00", "0.99"))
    without = report.features.summary({"a": pca.principal(x)}, {"a": norms}, {"a": None}).iloc[0]
    assert without["with background"] == "no masks"


def test_rank_correlation_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, (3, 20)), rng.normal(size=(3, 20))
    slow = [abs(spearmanr(p, q).statistic) for p, q in zip(a, b, strict=True)]
    np.testing.assert_allclose(report.features._alike(a, b), slow)


def test_mistakes_are_named() -> None:
    with pytest.raises(InputError, match="there are 1 to 6 components of these 15 patches, not 7"):
        pca.principal(states(), count=7)
    with pytest.raises(InputError, match="three components make colours: ask principal for count=3"):
        report.features.colours(pca.principal(states(), count=2)["maps"])
