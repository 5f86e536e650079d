"""The cut-off rule on simulated norms, where the truth is known: error rates first, then what must always hold."""

import math
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import approx_fprime
from scipy.stats import norm as gauss
from scipy.stats import t as student

from tests import NIGHTLY
from vitregs import arrays, paths
from vitregs.cache import load_dataset
from vitregs.errors import InputError
from vitregs.measure.mixture import (
    LEAST_GAIN,
    LEAST_SEPARATION,
    LEAST_TOKENS,
    Cutoff,
    _bulk,
    _mixture,
    _upper,
    find,
    fixed,
)

N = 10_000
DRAWS = 250 if NIGHTLY else 25  # of each of the four families
PLANTED = 1000 if NIGHTLY else 100
FAMILIES: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "gaussian": lambda r: np.abs(r.uniform(5, 50) + r.uniform(0.3, 10) * r.standard_normal(N)),
    "log-normal": lambda r: np.exp(r.uniform(0, 5) + r.uniform(0.02, 0.6) * r.standard_normal(N)),
    "gamma": lambda r: r.gamma(r.uniform(0.7, 60), 1, N),
    "student-5": lambda r: np.abs(r.uniform(5, 50) + r.uniform(0.2, 5) * r.standard_t(5, N)),
}


def mixture(
    rng: np.random.Generator, share: float, ratio: float, bulk: float, std: float, count: int = N
) -> np.ndarray:
    """Log-normal norms of which a share lies around `ratio` times the centre of the bulk."""
    log = bulk * rng.standard_normal(count)
    many = round(share * count)
    log[:many] = math.log(ratio) + std * rng.standard_normal(many)
    return np.exp(3 + log)


def between(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(math.log(low), math.log(high))))


@cache
def unimodal(family: str) -> tuple[Cutoff, ...]:
    rng = np.random.default_rng([7, list(FAMILIES).index(family)])
    return tuple(find(FAMILIES[family](rng)) for _ in range(DRAWS))


@pytest.mark.slow
def test_at_most_one_percent_of_unimodal_draws_get_a_cutoff():
    hits = {family: sum(c.value is not None for c in unimodal(family)) for family in FAMILIES}
    assert sum(hits.values()) <= 0.01 * DRAWS * len(FAMILIES), hits


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_unimodal_draws_of_each_family_get_no_cutoff(family: str):
    assert sum(c.value is not None for c in unimodal(family)) <= 0.01 * DRAWS
    assert all((c.share > 0) == (c.value is not None) for c in unimodal(family))


@pytest.mark.slow
def test_at_least_99_percent_of_planted_modes_are_found_with_their_share():
    """Share 0.5 to 10 %, ratio 3 to 12 (both log-uniform), bulk standard deviation 0.03 to 0.25, outlier standard
    deviation 0.03 to 0.15.

    The standard deviation of the outliers is bounded because a mixture need not have two modes: at share 0.5 %, ratio 3 and both
    standard deviations 0.25 the density of norms falls monotonically, and above the bottom of the shallow valley that is left in
    log norm lie 28 % fewer tokens than were planted (`test_the_bound_on_spread`). At a standard deviation of 0.15 it is 3 %.
    """
    rng = np.random.default_rng(8)
    good = 0
    for _ in range(PLANTED):
        share, ratio = between(rng, 0.005, 0.1), between(rng, 3, 12)
        found = find(mixture(rng, share, ratio, rng.uniform(0.03, 0.25), rng.uniform(0.03, 0.15)))
        exact = round(share * N) / N
        good += found.value is not None and abs(found.share / exact - 1) <= 0.1
    assert good >= 0.99 * PLANTED


@pytest.mark.slow
@pytest.mark.parametrize("std", [0.05, 0.1])
def test_the_hardest_corner_is_found(std: float):
    """Fewest outliers, nearest, beside the widest bulk: found in 99 of 100, with the share right on average.

    There 10 % of the share is 5 tokens, while by chance 2 or 3 of the bulk's 9,950 lie beyond the best cut-off.
    """
    rng = np.random.default_rng(9)
    found = [find(mixture(rng, 0.005, 3, 0.25, std)) for _ in range(100)]
    assert sum(c.value is not None for c in found) >= 99
    shares = np.array([c.share for c in found if c.value is not None])
    assert shares.mean() == pytest.approx(0.005, rel=0.05)
    assert (np.abs(shares / 0.005 - 1) <= 0.1).mean() >= 0.9


@pytest.mark.parametrize(("std", "valley", "above"), [(0.15, 0.58, 0.97), (0.25, 0.97, 0.72)])
def test_the_bound_on_standard_deviation(std: float, valley: float, above: float):
    """No fit here, only the planted density: depth of its valley, and share beyond it over the planted share."""
    z = np.linspace(0.5, math.log(3), 4000)
    density = 0.995 * gauss.pdf(z, 0, 0.25) + 0.005 * gauss.pdf(z, math.log(3), std)
    bottom = z[density.argmin()]
    beyond = 0.995 * gauss.sf(bottom, 0, 0.25) + 0.005 * gauss.sf(bottom, math.log(3), std)
    assert density.min() / density[density.argmin() :].max() == pytest.approx(valley, abs=0.01)
    assert beyond / 0.005 == pytest.approx(above, abs=0.01)
    assert (np.diff(density / np.exp(z)) < 0).all() == (std == 0.25)


@pytest.mark.parametrize(("ratio", "share"), [(1.8, 0.05), (2.0, 0.03), (2.2, 0.01)])
def test_a_mode_near_the_bulk_has_a_cutoff_too(ratio: float, share: float):
    found = find(mixture(np.random.default_rng(1), share, ratio, 0.1, 0.08))
    assert found.value is not None
    assert math.exp(3) * 1.2 < found.value < math.exp(3) * ratio
    assert found.share == pytest.approx(share, rel=0.1)
    assert found.ratio == pytest.approx(ratio, rel=0.03)
    assert found.separation > LEAST_SEPARATION
    assert str(found).endswith(f"(two modes in log norm), {100 * found.share:.2f} % of tokens above")


def test_what_is_found_describes_what_was_planted():
    found = find(mixture(np.random.default_rng(2), 0.02, 6, 0.1, 0.1))
    assert found.value is not None
    assert math.exp(3) * 1.5 < found.value < math.exp(3) * 5
    assert found.ratio == pytest.approx(6, rel=0.03)
    assert found.separation == pytest.approx(math.log(6) / 0.1, rel=0.15)  # Ashman's D of equal standard deviations
    assert found.gain > LEAST_GAIN
    assert str(found) == f"cut-off {found.value:.3g} (two modes in log norm), 2.00 % of tokens above"


@settings(max_examples=30)
@given(seed=st.integers(0, 50), factor=st.sampled_from([1e-3, 0.3, 7.0, 1e4]))
def test_scale_and_order_do_not_matter(seed: int, factor: float):
    rng = np.random.default_rng(seed)
    norms = mixture(rng, 0.03, 5, 0.15, 0.1, 2000)
    found, scaled = find(norms), find(factor * norms)
    mixed = find(rng.permutation(norms).reshape(20, 100))
    assert found.value is not None
    assert scaled.value == pytest.approx(factor * found.value, rel=1e-2)
    assert scaled.share == found.share == mixed.share
    assert mixed == found


def test_seven_times_the_norms_give_seven_times_the_cutoff():
    norms = mixture(np.random.default_rng(3), 0.02, 5, 0.2, 0.1)
    found, scaled = find(norms), find(7 * norms)
    assert found.value is not None
    assert scaled.value == pytest.approx(7 * found.value, rel=1e-3)
    assert scaled.share == found.share


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_precision_of_the_norms_does_not_matter(dtype: type):
    norms = mixture(np.random.default_rng(4), 0.02, 5, 0.2, 0.1)
    assert find(norms.astype(dtype)).share == pytest.approx(find(norms).share, rel=0.03)


@pytest.mark.parametrize("value", [0.0, 1.0, 3e4])
def test_constant_norms_have_no_outliers(value: float):
    assert find(np.full(1000, value)).value is None


def test_a_bulk_without_standard_deviation_hides_no_outliers():
    norms = np.ones(N)
    norms[:100] = 8 + np.random.default_rng(5).random(100)
    found = find(norms)
    assert found.value is not None
    assert 1 < found.value < 8
    assert found.share == 0.01


def test_a_few_far_tokens_are_no_mode():
    norms = mixture(np.random.default_rng(6), 0, 1, 0.1, 0.1)
    norms[: LEAST_TOKENS - 1] *= 20
    assert find(norms).value is None


def test_a_very_broad_mode_and_a_large_one_are_found():
    rng = np.random.default_rng(7)
    broad = np.exp(0.1 * rng.standard_normal(N))
    broad[:300] *= 8 + 92 * rng.random(300)
    large = mixture(rng, 0.3, 8, 0.1, 0.1)
    assert find(broad).share == pytest.approx(0.03, rel=0.05)
    assert find(large).share == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize(
    ("norms", "message"),
    [
        (np.ones(195), "195 norms are too few to look for an outlier mode: at least 196 are needed, from more images"),
        (np.ones(0), "0 norms are too few"),
        (np.append(np.ones(300), np.nan), "finite"),
        (np.append(np.ones(300), np.inf), "finite"),
        (np.append(np.ones(300), -1), "not negative"),
    ],
)
def test_norms_that_cannot_be_judged_are_a_problem(norms: np.ndarray, message: str):
    with pytest.raises(InputError, match=message):
        find(norms)


def test_a_cutoff_can_be_named():
    norms = np.array([1.0, 2.0, 3.0, 10.0, 30.0])
    cut = fixed(norms, 5.0, "section 2.1")
    assert cut == Cutoff(5.0, "section 2.1", share=0.4, ratio=20 / 3)
    assert str(cut) == "cut-off 5 (section 2.1), 40.00 % of tokens above"
    assert fixed(norms, 100.0, "by hand") == Cutoff(100.0, "by hand")
    assert fixed(np.array([0.0, 0.0, 9.0]), 5.0, "by hand").ratio == 0


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_named_cutoff_must_make_sense(value: float):
    with pytest.raises(InputError, match="positive and finite"):
        fixed(np.ones(3), value, "by hand")


@pytest.mark.parametrize("norms", [np.ones(0), np.array([1.0, np.nan])])
def test_a_named_cutoff_needs_norms(norms: np.ndarray):
    with pytest.raises(InputError, match="finite"):
        fixed(norms, 2.0, "by hand")


def test_no_mode_in_words():
    assert str(Cutoff(None, "two modes in log norm")) == "no outlier mode (rule: two modes in log norm)"


def test_the_densities_are_those_of_scipy():
    z = np.linspace(0, 9, 60)
    bulk = student.logpdf(z, 5, 0.3, 0.7) - student.logsf(0, 5, 0.3, 0.7)
    upper = gauss.logpdf(z, 3, 0.7) - gauss.logsf(0, 3, 0.7)
    np.testing.assert_allclose(_bulk(z, 0.3, 0.7, 5)[0], bulk, atol=1e-12)
    np.testing.assert_allclose(_upper(z, 3, 0.7)[0], upper, atol=1e-12)


@pytest.mark.parametrize("parameters", [3, 6])
@pytest.mark.parametrize("seed", range(4))
def test_the_slopes_are_those_of_finite_differences(parameters: int, seed: int):
    rng = np.random.default_rng(seed)
    z, p = 6 * rng.random(40), rng.normal(size=parameters)
    slopes = _mixture(z, p, 1.0)[1].mean(1)
    near = approx_fprime(p, lambda q: float(_mixture(z, q, 1.0)[0].mean()), 1e-6)
    np.testing.assert_allclose(slopes, near, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("model", "layer"), [("supervised-pico-reg4", 2), ("mae-pico", 8), ("mae-pico-reg4", 6)])
def test_the_sixth_digit_of_the_norms_decides_nothing(model: str, layer: int):
    """Norms of real networks, changed as another order of summation changes them, give the same second mode."""
    norms = load_dataset(paths.ROOT / "data" / "results" / "07_registers" / f"norms.{model}.nc")["value"]
    values = arrays.patches(norms.sel(layer=layer)).values
    rng = np.random.default_rng(0)
    found = [find(values * (1 + 1e-6 * rng.standard_normal(values.shape))) for _ in range(6)]
    assert min(c.share for c in found) > 0
    for name in ("separation", "share", "ratio"):
        each = [getattr(c, name) for c in found]
        assert max(each) - min(each) < 0.03 * max(each), (name, each)
