"""The cut-off between ordinary tokens and outliers: a statistical rule that is able to answer "none".

The upper half of the log norms is fitted twice: by one bulk with a tail as heavy as the data want (Student-t), and by
such a bulk plus a second, log-normal mode. A second mode is accepted only if it (1) explains the data far better,
(2) is a mode, with a valley before it, (3) stands apart and (4) holds enough tokens. The cut-off is the bottom of the
valley. All thresholds were fixed on simulated draws before any network was looked at; `tests/test_cutoffs.py` holds the error
rates. How far the mode lies from the median is its strength, no condition: about ten in the paper's networks, two in
DeiT-Tiny. Known limit: of three modes, the furthest can be missed, or both counted as one.
"""

from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from scipy.optimize import minimize
from scipy.special import digamma, expit, gammaln, log_ndtr, stdtr

from vitregs.errors import InputError

LEAST_GAIN = 12.0  # log-likelihood that the second mode must gain for its three parameters
_SEARCH_RATIO = 1.5  # of a norm to the median, where the search for it begins
LEAST_SEPARATION = 3.0  # Ashman's D: distance of the centres over the root mean square of the two standard deviations
LEAST_TOKENS = 10
DEEPEST_VALLEY = 0.7  # density at the bottom of the valley over the density at the second mode, at most
LEAST_DATA = 196  # one image of 224 pixels in patches of 16
_BINS = 600  # over 8 standard deviations of the bulk
_LEAST_SCALE = 0.01  # of the bulk in log norm: nothing finer is looked at
_PLACES = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)  # of a second mode, as quantiles of all that it could hold
_TRIES = 4
_LIGHT, _HEAVY = 3.0, -5.0  # where the search for the tail begins: 191 and 3.3 degrees of freedom, as free numbers


@dataclass(frozen=True)
class Cutoff:
    """A cut-off on norms with the rule that gave it; `value` is None where there is no outlier mode."""

    value: float | None
    rule: str
    separation: float = 0.0  # Ashman's D of the two modes
    share: float = 0.0  # of tokens above the cut-off
    ratio: float = 0.0  # centre of the second mode over the median norm
    gain: float = 0.0  # log-likelihood gained by the second mode

    def __str__(self) -> str:
        if self.value is None:
            return f"no outlier mode (rule: {self.rule})"
        return f"cut-off {self.value:.3g} ({self.rule}), {100 * self.share:.2f} % of tokens above"


def _read(p: np.ndarray) -> tuple[float, float, float]:
    """Parameters of the bulk: free numbers → centre, scale, degrees of freedom in (2, 200)."""
    return float(p[0]), float(np.exp(p[1])), float(2 + 198 * expit(p[2]))


def _student(u: np.ndarray | float, freedom: float) -> np.ndarray:
    """Log density of Student's t."""
    constant = gammaln((freedom + 1) / 2) - gammaln(freedom / 2) - np.log(freedom * np.pi) / 2
    return constant - (freedom + 1) / 2 * np.log1p(np.square(u) / freedom)


def _bulk(z: np.ndarray, centre: float, scale: float, freedom: float) -> tuple[np.ndarray, np.ndarray]:
    """Log density of the bulk on z ≥ 0, normalised there: z (n,) → (n,), and its slopes (3, n) in centre, log scale
    and degrees of freedom."""
    u, edge, v = (z - centre) / scale, centre / scale, freedom
    inside = stdtr(v, edge)
    pull, pole = (v + 1) * u / (v + u * u), np.exp(_student(edge, v)) / inside
    by_freedom = (digamma((v + 1) / 2) - digamma(v / 2) - 1 / v - np.log1p(u * u / v) + u * pull / v) / 2
    by_freedom -= np.log(stdtr(v * 1.001, edge) / stdtr(v * 0.999, edge)) / (v * 0.002)
    slopes = np.stack([(pull - pole) / scale, pull * u - 1 + pole * edge, by_freedom])
    return _student(u, v) - np.log(scale * inside), slopes


def _upper(z: np.ndarray, centre: float, std: float) -> tuple[np.ndarray, np.ndarray]:
    """Log density of the second mode on z ≥ 0, normalised there: z (n,) → (n,), and its slopes (2, n) in centre and log
    standard deviation."""
    u, edge = (z - centre) / std, centre / std
    inside = log_ndtr(edge)
    pole = np.exp(-edge * edge / 2 - inside) / np.sqrt(2 * np.pi)
    slopes = np.stack([(u - pole) / std, u * u - 1 + pole * edge])
    return -u * u / 2 - np.log(std * np.sqrt(2 * np.pi)) - inside, slopes


def _mixture(z: np.ndarray, p: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Log density of the bulk alone (3 parameters) or with the second mode (6): z (n,) → (n,), and its slopes."""
    bulk, slopes = _bulk(z, *_read(p))
    slopes[2] *= 198 * expit(p[2]) * expit(-p[2])
    if len(p) == 3:
        return bulk, slopes
    odds = float(expit(p[3]))
    share = 0.5 * odds  # the second mode never holds more than half of the upper half
    upper, more = _upper(z, least + np.exp(p[4]), np.exp(p[5]))
    more[0] *= np.exp(p[4])
    both = np.logaddexp(np.log1p(-share) + bulk, np.log(share) + upper)
    mine = np.exp(np.log(share) + upper - both)
    by_share = (mine - (1 - mine) * share / (1 - share)) * (1 - odds)
    return both, np.concatenate([slopes * (1 - mine), by_share[None], more * mine])


def _fit(
    z: np.ndarray, count: np.ndarray, starts: list[list[float]], least: float, scale: float
) -> tuple[float, np.ndarray]:
    """Maximise the binned likelihood from each start: → the largest log-likelihood and its free parameters."""
    weight = count / count.sum()

    def cost(p: np.ndarray) -> tuple[float, np.ndarray]:
        density, slopes = _mixture(z, p, least)
        return -float(weight @ density), -(slopes @ weight)

    largest_log_scale = max(3.0, float(np.log(0.5 / scale)))
    bounds = [(-3, 3), (-4, 3), (-6, 6), (-12, 8), (-7, 7), (-4, largest_log_scale)]
    tries = [  # TNC, since the linear algebra under L-BFGS-B starts threads and is ten times slower on a busy machine
        minimize(cost, np.array(s), jac=True, method="TNC", bounds=bounds[: len(s)], options={"maxfun": 300})
        for s in starts
    ]
    best = min(tries, key=lambda done: float(done.fun))
    return -float(best.fun) * float(count.sum()), best.x


def find(norms: np.ndarray) -> Cutoff:
    """Look for an outlier mode in the norms of patch tokens: any shape → Cutoff.

    Raises InputError for fewer than LEAST_DATA norms or for values that are not finite.
    """
    values = np.asarray(norms, np.float64).ravel()
    if len(values) < LEAST_DATA:
        raise InputError(
            f"{len(values)} norms are too few to look for an outlier mode: at least {LEAST_DATA} are needed, "
            "from more images or larger ones"
        )
    if not np.isfinite(values).all() or (values < 0).any():
        raise InputError("norms must be finite and not negative")
    key = sha256(values.tobytes()).digest()  # the scoreboard asks of the same norms ten times
    if key not in _FOUND:
        _FOUND[key] = _find(values, "two modes in log norm")
    return _FOUND[key]


_FOUND: dict[bytes, Cutoff] = {}


def _find(values: np.ndarray, rule: str) -> Cutoff:
    """The search itself, on norms that are in order."""
    median = float(np.median(values))
    if median == 0:  # no token to compare with
        return Cutoff(None, rule)
    upper = np.log(values[values >= median] / median)
    # one standard deviation, were the bulk Gaussian
    scale = max(float(np.quantile(upper, 0.6827)), _LEAST_SCALE)
    if (upper > np.log(_SEARCH_RATIO)).sum() < LEAST_TOKENS:
        return Cutoff(None, rule)
    # far tokens share the last bins: log-spaced beyond 8 standard deviations
    z = upper / scale
    edges = np.concatenate([np.linspace(0, 8, _BINS), np.geomspace(8, max(9, z.max() * 1.001), _BINS // 3)[1:]])
    count = np.histogram(z, edges)[0].astype(float)
    keep = count > 0
    mid, count = ((edges[1:] + edges[:-1]) / 2)[keep], count[keep]
    plain, _ = _fit(mid, count, [[0.0, 0.0, f] for f in (_LIGHT, -2.0)], 0.0, scale)
    least = np.log(_SEARCH_RATIO) / scale
    both, p = _fit(mid, count, _starts(z, mid, count, least), least, scale)
    return _judge(values, median, scale, p, both - plain, least, rule)


def _starts(z: np.ndarray, mid: np.ndarray, count: np.ndarray, least: float) -> list[list[float]]:
    """Where to begin the search for a second mode: the most likely of many places before any fit."""
    far = np.sort(z[z > least])
    starts = []
    for centre in np.unique(np.round(np.quantile(far, _PLACES), 2)):
        weight = np.log(max(2 * float((z > centre * 0.8).mean()), 1e-5))
        starts += [
            [0.0, 0.0, _LIGHT, weight, float(np.log(max(centre - least, 0.05))), float(np.log(max(s * centre, 0.2)))]
            for s in (0.05, 0.15)
        ]
    likely = [float(count @ _mixture(mid, np.array(s), least)[0]) for s in starts]
    best = [starts[i] for i in np.argsort(likely)[::-1][:_TRIES]]
    # Two tails: from a light one alone, the sixth digit of the norms decides whether the search finds a heavy one.
    return best + [[*s[:2], _HEAVY, *s[3:]] for s in best[:2]]


def _judge(
    values: np.ndarray, median: float, scale: float, p: np.ndarray, gain: float, least: float, rule: str
) -> Cutoff:
    """Apply the four conditions to the fitted second mode."""
    centre, std = least + np.exp(p[4]), np.exp(p[5])
    low, low_std, _ = _read(p)
    line = np.linspace(max(low, 0.0), centre, 800)
    density = np.exp(_mixture(line, p, least)[0])
    bottom = int(density.argmin())
    value = float(median * np.exp(scale * line[bottom]))
    above = float((values > value).mean())
    separation = float((centre - low) / np.sqrt((std**2 + low_std**2) / 2))
    ratio = float(np.exp(scale * centre))
    mode = (
        gain >= LEAST_GAIN
        and density[bottom] <= DEEPEST_VALLEY * density[-1]
        and separation >= LEAST_SEPARATION
        and above * len(values) >= LEAST_TOKENS
        and ratio > _SEARCH_RATIO * 1.02  # not pinned to the edge of the search
    )
    if not mode:
        return Cutoff(None, rule, gain=gain)
    return Cutoff(value, rule, separation, above, ratio, gain)


def fixed(norms: np.ndarray, value: float, rule: str) -> Cutoff:
    """Name a cut-off by hand: norms, value, where it comes from → Cutoff."""
    if not 0 < value < np.inf:
        raise InputError(f"a cut-off must be positive and finite, not {value}")
    values = np.asarray(norms, np.float64)
    if not values.size or not np.isfinite(values).all():
        raise InputError("norms must be finite, and there must be some")
    above, median = values > value, np.median(values)
    ratio = float(np.median(values[above]) / median) if above.any() and median > 0 else 0.0
    return Cutoff(float(value), rule, share=float(above.mean()), ratio=ratio)
