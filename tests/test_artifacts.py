"""Statistics of norms and maps, against slow loops and planted answers, on grids that are not square."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from vitregs import arrays
from vitregs.errors import InputError
from vitregs.measure import fingerprint, outliers, redundancy
from vitregs.measure.attention import attention_on, mass_mask, peak_share
from vitregs.measure.mixture import Cutoff

PREFIX = ["cls", "register", "register"]
ROWS, COLUMNS = 4, 6


def labelled(
    values: np.ndarray,
    dims: tuple[str, ...],
    prefix: list[str],
    grid: tuple[int, int] = (ROWS, COLUMNS),
    **coords: object,
) -> xr.DataArray:
    kinds = [*prefix, *["patch"] * (grid[0] * grid[1])]
    return xr.DataArray(values, dims=dims, coords={**arrays.token_coords(kinds, grid), **coords})


def some_norms(
    images: int = 5, layers: int = 3, grid: tuple[int, int] = (ROWS, COLUMNS), seed: int = 0
) -> xr.DataArray:
    """Norms whose cls and registers are far above all patches."""
    rng = np.random.default_rng(seed)
    values = np.exp(2 + 0.1 * rng.standard_normal((images, layers, len(PREFIX) + grid[0] * grid[1])))
    values[..., : len(PREFIX)] *= 100
    return labelled(values, ("image", "layer", "token"), PREFIX, grid, layer=range(layers))


def plant(norms: xr.DataArray, layer: int, each: int, factor: float) -> xr.DataArray:
    """Raise the norms of the first patches of every image at one layer."""
    norms = norms.copy()
    norms.values[:, layer, len(PREFIX) : len(PREFIX) + each] *= factor
    return norms


def test_patches_drops_cls_and_registers():
    found = arrays.patches(some_norms())
    assert found.sizes["token"] == ROWS * COLUMNS
    assert set(found["kind"].values) == {"patch"}
    assert list(found["label"].values[:2]) == ["0,0", "0,1"]
    np.testing.assert_array_equal(found.values, some_norms().values[..., len(PREFIX) :])


def test_largest_ratio_against_a_loop():
    norms = some_norms()
    found = outliers.largest_ratio(norms)
    assert found.dims == ("image", "layer")
    for i in range(5):
        for layer in range(3):
            row = sorted(norms.values[i, layer, len(PREFIX) :])
            assert found.values[i, layer] == pytest.approx(row[-1] / ((row[11] + row[12]) / 2))


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.25, 6), (1.0, 24)])
@pytest.mark.parametrize("order", [("image", "layer", "token"), ("token", "layer", "image")])
def test_top_ratio_against_a_loop(share: float, count: int, order: tuple[str, ...]):
    norms = some_norms()
    found = outliers.top_ratio(norms.transpose(*order), share).transpose("image", "layer")
    for i in range(5):
        for layer in range(3):
            row = sorted(norms.values[i, layer, len(PREFIX) :])
            assert found.values[i, layer] == pytest.approx(np.mean(row[-count:]) / np.median(row))


def test_a_cutoff_belongs_to_one_layer():
    with pytest.raises(InputError, match="select it first"):
        outliers.find_cutoff(some_norms())


def test_a_cutoff_looks_at_patches_only():
    """The cls token and the registers are a hundred times above the bulk, and no outliers for that."""
    assert outliers.find_cutoff(some_norms(images=50).sel(layer=1)).value is None


def test_a_cutoff_finds_or_takes_a_value():
    norms = plant(some_norms(images=60), 1, 1, 8).sel(layer=1)
    found = outliers.find_cutoff(norms)
    assert found.value is not None
    assert found.share == pytest.approx(1 / 24)
    assert outliers.find_cutoff(norms, 25.0) == Cutoff(
        25.0, "named by hand", share=found.share, ratio=found_ratio(norms)
    )
    assert outliers.find_cutoff(norms, 25.0, "section 2.1").rule == "section 2.1"


def found_ratio(norms: xr.DataArray) -> float:
    patch = arrays.patches(norms).values
    return float(np.median(patch[patch > 25]) / np.median(patch))


def test_outliers_are_above_the_cutoff_or_nowhere():
    norms = some_norms().sel(layer=0)
    marked = outliers.mark_outliers(norms, Cutoff(8.0, "by hand"))
    assert marked.dtype == bool
    np.testing.assert_array_equal(marked.values, norms.values > 8)
    assert not outliers.mark_outliers(norms, Cutoff(None, "two modes")).any()
    assert not outliers.mark_outliers(xr.full_like(norms, 8.0), Cutoff(8.0, "by hand")).any()


def test_by_layer_finds_the_planted_layer():
    norms = plant(some_norms(images=60, layers=4), 2, 1, 8)
    table = outliers.layer_evidence(norms)
    assert list(table["layer"]) == [0, 1, 2, 3]
    assert list(table["cutoff"].notna()) == [False, False, True, False]
    assert list(table["share"] > 0) == [False, False, True, False]
    row = table.loc[2]
    assert row["share"] == pytest.approx(1 / 24)
    assert row["ratio"] == pytest.approx(8, rel=0.1)
    at = arrays.patches(norms.sel(layer=2))
    assert row["median"] == pytest.approx(float(np.median(at.values)))
    assert row["largest"] == pytest.approx(float(np.median(outliers.largest_ratio(norms).sel(layer=2))))
    assert row["top1"] == pytest.approx(row["largest"])  # one of 24 patches
    found = fingerprint.mode(norms, table)
    assert (found.answer, found.more["first_layer"], found.more["rise"]) == ("for", 2, 2)
    assert found.value == pytest.approx(8, rel=0.05)
    assert found.more["share"] == pytest.approx(1 / 24)


def test_by_layer_with_a_named_cutoff():
    norms = plant(some_norms(images=20, layers=3), 1, 3, 8)
    table = outliers.layer_evidence(norms, 25.0)
    assert (table["cutoff"] == 25).all()
    assert list(table["share"]) == pytest.approx([0, 3 / 24, 0])
    assert fingerprint.strongest_mode(table).layer == 1
    assert "holds 12.5 % of the patches" in fingerprint.mode(norms, table).sentence


def test_by_layer_names_layers_by_label():
    table = outliers.layer_evidence(plant(some_norms(images=60), 1, 1, 8).sel(layer=[2, 1]))
    assert list(table["layer"]) == [2, 1]
    assert fingerprint.strongest_mode(table).layer == 1


def evidence(**columns: list[float]) -> pd.DataFrame:
    """A table of four layers in which nothing was found, but for the columns given."""
    quiet = {
        "layer": [0, 1, 2, 3],
        "median": [9.0] * 4,
        "largest": [1.5, 1.6, 1.7, 1.8],
        "top1": [1.4] * 4,
        "cutoff": [np.nan] * 4,
        "share": [0.0] * 4,
        "separation": [0.0] * 4,
        "ratio": [0.0] * 4,
    }
    return pd.DataFrame(quiet | columns)


def modes(ratio: list[float], share: list[float] | None = None) -> dict[str, list[float]]:
    held = share or [0.02 * (r > 0) for r in ratio]
    return {
        "cutoff": [30.0 if r else np.nan for r in ratio],
        "share": held,
        "separation": [8.0 * (r > 0) for r in ratio],
        "ratio": ratio,
    }


def test_the_strongest_mode_of_any_strength_decides():
    for ratio, layer in (([0.0, 4.5, 9.0, 5.0], 2), ([0.0, 0.0, 1.8, 2.2], 3), ([9.0, 1.7, 0.0, 0.0], 1)):
        assert fingerprint.strongest_mode(evidence(**modes(ratio))).layer == layer


def test_the_patch_embedding_and_an_empty_mode_do_not_count():
    assert fingerprint.strongest_mode(evidence(**modes([9.0, 0.0, 0.0, 0.0]))) is None
    assert fingerprint.strongest_mode(evidence(cutoff=[1e4] * 4)) is None  # named by hand, above all norms
    assert fingerprint.strongest_mode(evidence()) is None


def test_none_where_nothing_stands_out():
    assert fingerprint.mode(some_norms(), evidence()).answer == "open"  # five images are too few
    found = fingerprint.mode(some_norms(9), evidence())
    assert found.answer == "against"
    said = "no second mode at any layer; the largest norm is 1.8 x the median in a typical image"
    assert found.sentence == f"{said}; 9 images may hide a mild one: look at 32 or more"
    many = xr.concat([some_norms()] * 7, "image")
    assert fingerprint.mode(many, evidence()).sentence == said


def test_open_where_norms_are_large_without_a_mode():
    assert fingerprint.mode(some_norms(9), evidence(largest=[1.0, 2.0, 4.5, 3.0])).answer == "open"
    assert fingerprint.mode(some_norms(9), evidence(largest=[9.0, 2.0, 3.9, 3.0])).answer == "against"


def test_occupancy_of_planted_positions():
    marked = np.zeros((5, ROWS, COLUMNS), bool)
    marked[:2, 1, 4] = marked[:, 3, 0] = True
    tokens = np.concatenate([np.ones((5, len(PREFIX)), bool), marked.reshape(5, -1)], 1)
    found = redundancy.position_frequency(labelled(tokens, ("image", "token"), PREFIX))
    expected = np.zeros((ROWS, COLUMNS))
    expected[1, 4], expected[3, 0] = 0.4, 1
    assert found.dims == ("y", "x")
    np.testing.assert_allclose(found.values, expected)


@pytest.mark.parametrize("grid", [(4, 6), (1, 5), (3, 1), (2, 2)])
def test_neighbour_similarity_against_a_double_loop(grid: tuple[int, int]):
    rows, columns = grid
    values = np.random.default_rng(0).standard_normal((2, rows * columns, 7))
    embeddings = labelled(values, ("image", "token", "channel"), [], grid)
    found = redundancy.neighbour_similarity(embeddings)
    assert found.dims == ("image", "token")
    np.testing.assert_array_equal(found["y"], embeddings["y"])
    for i in range(2):
        for y in range(rows):
            for x in range(columns):
                a = values[i, y * columns + x]
                cosines = []
                for other_y, other_x in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                    if 0 <= other_y < rows and 0 <= other_x < columns:
                        b = values[i, other_y * columns + other_x]
                        cosines.append(a @ b / np.sqrt((a @ a) * (b @ b)))
                assert found.values[i, y * columns + x] == pytest.approx(np.mean(cosines))


def test_neighbour_similarity_of_equal_patches_is_one_and_of_silent_ones_zero():
    embeddings = labelled(np.ones((1, ROWS * COLUMNS, 3)), ("image", "token", "channel"), [])
    np.testing.assert_allclose(redundancy.neighbour_similarity(embeddings), 1)
    np.testing.assert_allclose(redundancy.neighbour_similarity(0 * embeddings), 0)


def test_one_patch_has_no_neighbours():
    with pytest.raises(InputError, match="no neighbours"):
        redundancy.neighbour_similarity(labelled(np.ones((1, 1, 3)), ("image", "token", "channel"), [], (1, 1)))


def test_share_by_group_of_a_known_answer():
    group = np.tile(np.arange(ROWS * COLUMNS) % 4 - 1, (10, 1))  # -1, 0, 1, 2: six patches each
    hit = np.zeros((10, ROWS * COLUMNS), bool)
    hit[:, 1], hit[:5, 2], hit[:, 0] = True, True, True  # group 0, half of the images in group 1, left out
    tokens = np.concatenate([np.ones((10, len(PREFIX)), bool), hit], 1)
    found = redundancy.share_by_group(labelled(tokens, ("image", "token"), PREFIX), group, ["a", "b", "c"])
    assert list(found["group"]) == ["a", "b", "c"]
    assert list(found["share"]) == pytest.approx([1 / 6, 0.5 / 6, 0])
    assert list(found["tokens"]) == [60, 60, 60]
    certain = found.iloc[[0, 2]]  # the same in every image
    np.testing.assert_allclose(certain["low"], certain["share"])
    np.testing.assert_allclose(certain["high"], certain["share"])
    assert 0.02 < found["low"][1] < found["share"][1] < found["high"][1] < 0.15


def test_share_by_group_says_nothing_of_an_empty_group():
    marked = labelled(np.ones((3, ROWS * COLUMNS), bool), ("image", "token"), [])
    found = redundancy.share_by_group(marked, np.zeros((3, ROWS * COLUMNS), int), ["all", "nobody"])
    assert found["share"][0] == found["low"][0] == found["high"][0] == 1
    assert found.loc[1, ["share", "low", "high"]].isna().all()
    assert found["tokens"][1] == 0


def test_share_by_group_does_not_count_draws_without_the_group():
    group = np.full((4, ROWS * COLUMNS), -1)
    group[0, :3] = 0  # in one image of four, so that a third of the draws lack it
    found = redundancy.share_by_group(labelled(np.ones((4, 24), bool), ("image", "token"), []), group, ["rare"])
    assert tuple(found.loc[0, ["share", "low", "high"]]) == (1, 1, 1)


def test_share_by_group_covers_the_truth():
    """95 % intervals over 40 images with shares of their own: 100 repetitions, binomial bounds of 99.9 %."""
    rng, covered = np.random.default_rng(0), 0
    group = np.zeros((40, ROWS * COLUMNS), int)
    for _ in range(100):
        own = rng.beta(2, 8, (40, 1))
        marked = labelled(rng.random((40, ROWS * COLUMNS)) < own, ("image", "token"), [])
        row = redundancy.share_by_group(marked, group, ["all"], draws=300).loc[0]
        covered += row["low"] <= 0.2 <= row["high"]
    assert 84 <= covered <= 99


def test_interval_covers_the_mean():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        mean, low, high = arrays.bootstrap_interval(rng.standard_normal(50) + 3, draws=400)
        assert low < mean < high
        covered += low <= 3 <= high
    assert 175 <= covered <= 199


def test_interval_of_a_known_answer():
    assert arrays.bootstrap_interval(np.full(7, 2.5)) == (2.5, 2.5, 2.5)
    mean, low, high = arrays.bootstrap_interval(np.arange(100.0))
    half = 1.96 * np.arange(100).std() / 10
    assert mean == 49.5
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.6)
    assert arrays.bootstrap_interval(np.arange(100)) == (mean, low, high)


def test_mark_outliers_where_there_are_some():
    norms = some_norms().sel(layer=0)
    marked, what = outliers.mark_or_top(norms, Cutoff(8.0, "by hand"), 0.1)
    assert what == "outliers"
    np.testing.assert_array_equal(marked.values, norms.values > 8)


def test_mark_the_largest_patches_where_there_are_none():
    norms = some_norms(images=10).sel(layer=0)
    marked, what = outliers.mark_or_top(norms, Cutoff(None, "two modes"), 0.05)
    patch = arrays.patches(marked).values
    assert what == "top 5 % of norms"
    assert patch.sum() == 12  # of 240 patches; the larger cls and registers do not count
    values = arrays.patches(norms).values
    assert values[patch].min() > values[~patch].max()


def attention(images: int = 3, heads: int = 4, queries: int = 2, seed: int = 0) -> xr.DataArray:
    tokens = len(PREFIX) + ROWS * COLUMNS
    values = np.random.default_rng(seed).dirichlet(np.full(tokens, 0.3), (images, 2, heads, queries))
    return labelled(values, ("image", "layer", "head", "query", "token"), PREFIX)


def test_peak_share_against_a_loop():
    maps = attention()
    found = peak_share(maps)
    assert found.dims == ("image", "layer", "query")
    for i in range(3):
        for layer in range(2):
            for q in range(2):
                mean = maps.values[i, layer, :, q, len(PREFIX) :].mean(0)
                assert found.values[i, layer, q] == pytest.approx(mean.max() / mean.sum())


def test_attention_on_against_a_loop():
    maps = attention()
    weight = np.random.default_rng(1).random((3, ROWS * COLUMNS))
    found = attention_on(maps, weight)
    assert found.dims == ("image", "layer", "head", "query")
    for i in range(3):
        patch = maps.values[i, 1, 2, 1, len(PREFIX) :]
        assert found.values[i, 1, 2, 1] == pytest.approx((patch * weight[i]).sum() / patch.sum())
    np.testing.assert_allclose(attention_on(maps, np.ones_like(weight)), 1)


@given(seed=st.integers(0, 10_000), keep=st.sampled_from([0.1, 0.35, 0.6, 0.9, 1.0]))
def test_mass_mask_is_the_smallest_set_that_reaches_the_mass(seed: int, keep: float):
    maps = np.random.default_rng(seed).dirichlet(np.full(15, 0.4), (2, 3))
    mask = mass_mask(maps, keep)
    assert mask.shape == maps.shape
    for values, kept in zip(maps.reshape(-1, 15), mask.reshape(-1, 15), strict=True):
        assert values[kept].sum() >= keep - 1e-9
        fewer = np.sort(values)[::-1][: kept.sum() - 1]  # no set with one cell less can hold more
        assert fewer.sum() < keep
        assert values[kept].min() >= values[~kept].max(initial=0)


def test_mass_mask_does_not_need_normalised_maps():
    maps = np.array([5.0, 1.0, 3.0, 1.0])
    np.testing.assert_array_equal(mass_mask(maps, 0.6), [True, False, True, False])
    np.testing.assert_array_equal(mass_mask(maps / 7, 0.5), [True, False, False, False])
