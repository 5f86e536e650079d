"""Which networks may decide a claim: those that have learned something, by the scores that their cards keep.

A network of the zoo is barred if fewer than half of its scores clear those of its untrained twin: accuracy in its own task, k
nearest neighbours, and a linear classifier for each thing that labels tell. A score clears if the 95 % interval of the difference
of the two shares lies above zero. What is not in the zoo was trained by others and is not barred.
"""

from functools import lru_cache

import numpy as np
from scipy.stats import binomtest

from vitregs.models import registry

LINEAR = 1024  # images that score a linear classifier (`evaluation.PROBED`, a third)
# images that score the others (`loop.SCORED`, `loop.QUERIES`): trained, untrained
IMAGES = {"accuracy": (512, 128), "knn": (128, 128)}


def difference(one: float, two: float, n_one: int, n_two: int) -> tuple[float, float]:
    """95 % interval of the difference of two shares (Newcombe's, from Wilson's intervals): shares, their numbers of images →
    lower and upper end.

    Example:
        >>> [round(end, 2) for end in difference(0.5, 0.25, 100, 100)]
        [0.12, 0.37]
    """
    (low, high), (low_two, high_two) = (
        binomtest(round(p * n), n).proportion_ci(method="wilson") for p, n in ((one, n_one), (two, n_two))
    )
    gap = one - two
    return gap - float(np.hypot(one - low, high_two - two)), gap + float(np.hypot(high - one, two - low_two))


def scores(name: str) -> dict[str, tuple[float, float, float]]:
    """Scores of a zoo network beside its untrained twin's: name → {score: (trained, untrained, lower end of the difference)}."""
    card, history = registry.card(name), registry.history(name)
    assert history is not None
    known = {"knn": (card.get("knn"), card.get("knn_untrained"))}
    known["accuracy"] = (card.get("accuracy"), float(history["accuracy"][0]) if "accuracy" in history else None)
    known |= {k: (v, card["linear_untrained"][k]) for k, v in card.get("linear", {}).items()}
    return {
        k: (one, two, difference(one, two, *IMAGES.get(k, (LINEAR, LINEAR)))[0])
        for k, (one, two) in known.items()
        if one is not None and two is not None and np.isfinite([one, two]).all()
    }


@lru_cache
def barred(name: str) -> str:
    """Why a network may decide no claim: name → a sentence, empty if it may."""
    if name not in registry.zoo():
        return ""
    found = scores(name)
    clear = [k for k, (_, _, low) in found.items() if low > 0]
    if found and 2 * len(clear) >= len(found):
        return ""
    return f"{name} clears its untrained twin in {len(clear)} of {len(found)} scores"
