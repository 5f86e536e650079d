"""Artifact or content? Five parts of evidence on outliers, each with an interval over images and a control.

Large norms alone do not make an artifact: a network may as well write what a patch shows into its norm. So five questions are
asked. *Mode*: do patch norms have a second mode? *Place*: do its patches repeat their neighbours, and does what they show fail
to tell them from others? *Attention*: do they draw it? *Neurons*: do few MLP neurons write them? *Cause*: does the mode go when
these are suppressed? The verdict follows from the answers by `judge`; the limits were fixed on simulated and planted networks
and on DeiT-Tiny, before the networks of this book were looked at (data/results/LOG.md, 2026-11-28).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from scipy.sparse.csgraph import connected_components
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import average_precision_score

from vitregs import arrays
from vitregs.measure import redundancy
from vitregs.measure.neurons import ranked, register_neurons, selectivity

VERDICTS = ("artifacts", "content", "none", "inconclusive")
PARTS = ("mode", "place", "attention", "neurons", "cause")
STRONG = 4.0  # strength from which artifacts are strong, not mild
RISEN = 1.1  # mean norm of marked patches over that of others, from which they have risen
QUIET = 4.0  # without a mode, and with largest / median below this everywhere, there are none
MANY = 32  # images from which "none" is said without a warning: of fewer, a mild mode is missed now and then
LEAST_IMAGES = 8  # without a mode, for "none": of 4 random images one draw in four misses DeiT-Tiny's, of 1 five in six
CONTENT = 0.5  # average precision from which what a patch shows tells whether it is marked
SINK = 2.0  # fair shares of attention that a marked patch receives at least
FEW = 0.01  # of all neurons, that write half of the shift at most
SELECTIVE = 0.9  # AUC that these have at least, in the median
CAUSE = 0.5  # of the marks, that go with the neurons at least
COPY = 0.02  # squared distance of the patch embeddings of copies, over the sum of their squares, at most
CROP = 15_000  # patches that a classifier learns the marks from, at most
_DRAWS = 200


@dataclass(frozen=True)
class Part:
    """One part of the evidence.

    Attributes:
        name: One of PARTS.
        answer: "for" an artifact, "against" it, "open", or "not measured".
        sentence: Why, in words.
        value: The number that decides, with the ends of its 95 % interval over images; nan if it is not known.
        low: Lower end.
        high: Upper end.
        control: The same where no artifact can be: of other patches, of random neurons; nan if there is none.
        more: Further numbers by name.
    """

    name: str
    answer: str
    sentence: str
    value: float = np.nan
    low: float = np.nan
    high: float = np.nan
    control: float = np.nan
    more: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Fingerprint:
    """The verdict on a network, and the parts it follows from.

    Attributes:
        verdict: One of VERDICTS.
        layer: The layer with the strongest mode, or with the largest norms where there is none.
        strength: Typical norm of marked patches over the median norm; nan without a mode.
        sentence: Why, in words.
        parts: By name, in the order of PARTS.
        neurons: Register neurons: block → numbers; empty if none are found or they were not looked for.
    """

    verdict: str
    layer: int
    strength: float
    sentence: str
    parts: dict[str, Part]
    neurons: dict[int, list[int]] = field(default_factory=dict)

    @property
    def word(self) -> str:
        """The verdict with its strength: "artifacts, mild"."""
        if self.verdict != "artifacts":
            return self.verdict
        return f"artifacts, {'strong' if self.strength >= STRONG else 'mild'}"

    def facts(self) -> dict[str, Any]:
        """Give all of it as plain values for JSON, None for what is not known."""

        def plain(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {str(k): plain(v) for k, v in value.items()}
            return None if isinstance(value, float) and not np.isfinite(value) else value

        found: dict[str, Any] = plain(asdict(self) | {"word": self.word})
        return found

    def dataset(self) -> xr.Dataset:
        """Give the numbers as a Dataset, to be stored: value, low, high and control [part], the rest in attributes."""
        rows = [self.parts.get(name, Part(name, "not measured", "there is no mode to ask of")) for name in PARTS]
        data = {
            k: ("part", np.array([getattr(p, k) for p in rows], float)) for k in ("value", "low", "high", "control")
        }
        more = {f"{p.name}: {k}": float(v) for p in rows for k, v in p.more.items()}
        attrs = {
            "verdict": self.verdict,
            "word": self.word,
            "layer": self.layer,
            "strength": self.strength,
            "sentence": self.sentence,
            **more,
            **{f"{p.name}: sentence": p.sentence for p in rows},
            "neurons": " ".join(f"{b}:{j}" for b, numbers in self.neurons.items() for j in numbers),
        }
        coords = {"part": list(PARTS), "answer": ("part", [p.answer for p in rows])}
        return xr.Dataset(data, coords=coords, attrs=attrs)


def _interval(low: float, high: float, form: str = ".2f") -> str:
    return f"[{low:{form}}, {high:{form}}]"


def _span(what: str, first: int, last: int) -> str:
    return f"{what} {first}" if first == last else f"{what}s {first} to {last}"


def _number(count: int, what: str) -> str:
    return f"{count or 'no'} {what}{'' if count == 1 else 's'}"


def _three(values: Any) -> tuple[float, float, float]:
    """A value and what it is in resamples: the value first → value, 95 % interval."""
    low, high = np.nanquantile(values[1:], [0.025, 0.975]) if np.isfinite(values[1:]).any() else (np.nan, np.nan)
    return float(values[0]), float(low), float(high)


def strongest_mode(layers: pd.DataFrame) -> pd.Series | None:
    """The row of `layer_evidence`'s table whose mode is furthest from the median, None if none has one; layer 0, the patch
    embedding, is left out: bright or busy patches are not yet the network's doing."""
    moded = layers[(layers.layer > 0) & layers["cutoff"].notna() & (layers["share"] > 0)]
    return moded.loc[moded.ratio.idxmax()] if len(moded) else None


def mode(norms: xr.DataArray, layers: pd.DataFrame, fixed: float | None = None) -> Part:
    """Is there a second mode of patch norms?

    Args:
        norms: [image, layer, token].
        layers: `outliers.layer_evidence` of them.
        fixed: The cut-off that was named in place of the rule; the answer is then "open", since no rule was applied.

    Returns:
        The strength (typical norm of marked patches over the median norm), with the share of patches in `more`.
    """
    best = strongest_mode(layers)
    if best is None:
        deep = layers[layers.layer > 0]
        row = deep.loc[deep.largest.idxmax()]
        count = norms.sizes["image"]
        if fixed is not None:
            said = f"no patch above the fixed cut-off {fixed:g} at any layer; no rule was applied"
            return Part("mode", "open", said, more={"largest": float(row.largest)})
        answer = "against" if row.largest < QUIET and count >= LEAST_IMAGES else "open"
        doubt = "" if count >= MANY else f"; {_number(count, 'image')} may hide a mild one: look at {MANY} or more"
        return Part(
            "mode",
            answer,
            f"no second mode at any layer; the largest norm is {row.largest:.1f} x the median in a typical image{doubt}",
            more={"largest": float(row.largest)},
        )
    at = arrays.patches(norms.sel(layer=int(best.layer))).transpose("image", "token").values.astype(float)
    marked = at > best.cutoff
    strength, low, high = _strength(at, marked)
    share = arrays.bootstrap_ratio(marked.sum(1), np.full(len(marked), marked.shape[1]))
    moded = layers[(layers.layer > 0) & layers["cutoff"].notna()].layer
    rise = _rise(norms, marked, int(best.layer))
    held = f"{100 * share[0]:.1f} % of the patches {_interval(100 * share[1], 100 * share[2], '.1f')}"
    sentence = (
        f"a second mode at {strength:.2f} x the median norm {_interval(low, high)} holds {held}; a mode at "
        f"{_span('layer', moded.min(), moded.max())}, these patches above the others from layer {rise}"
        if fixed is None
        else f"{held} lie above the fixed cut-off {fixed:g}, at {strength:.2f} x the median norm {_interval(low, high)}; "
        "no rule was applied that tells whether they are a mode"
    )
    more = {
        "share": share[0],
        "share_low": share[1],
        "share_high": share[2],
        "first_layer": float(moded.min()),
        "rise": rise,
    }
    more["separation"] = float(best.separation)
    answer = "for" if fixed is None else "open"
    return Part("mode", answer, sentence, strength, low, high, 1.0, more | {"cutoff": float(best.cutoff)})


def _rise(norms: xr.DataArray, marked: np.ndarray, layer: int) -> int:
    """From which layer on to the one where they are marked the mean norm of marked patches stays RISEN times the others'."""
    ratio = []
    for number in range(1, layer + 1):
        at = arrays.patches(norms.sel(layer=number)).transpose("image", "token").values
        ratio.append(float(at[marked].mean() / at[~marked].mean()) if not marked.all() else np.nan)
    low = [i + 1 for i, r in enumerate(ratio) if not r >= RISEN]
    return min(layer, max(low, default=0) + 1)


def _strength(norms: np.ndarray, marked: np.ndarray) -> tuple[float, float, float]:
    """Median norm of marked patches over that of all, with a bootstrap over images: (image, patch) → value, low, high."""

    def of(index: np.ndarray) -> float:
        there = norms[index][marked[index]]
        return float(np.median(there) / np.median(norms[index])) if len(there) else np.nan

    draw = np.random.default_rng(0).integers(0, len(norms), (_DRAWS, len(norms)))
    return _three([of(index) for index in (np.arange(len(norms)), *draw)])


def content_precision(embeddings: np.ndarray, marked: np.ndarray) -> tuple[float, float, float]:
    """How well what a patch shows tells whether it is marked.

    Boosted trees learn the marks from the patch embeddings of one half of the images and tell those of the other half, then the
    other way round. Copies of an image are in the same half.

    Args:
        embeddings: Patch embeddings before positions are added, (images, patches, channels).
        marked: Which are marked, (images, patches).

    Returns:
        Average precision, by chance the share of marked patches, with a 95 % interval over images; nan where a half has no
        marks.
    """
    nothing = (np.nan, np.nan, np.nan)
    kept = max(4, CROP // marked.shape[1])
    embeddings, marked = embeddings[:kept], marked[:kept]
    fold = _groups(embeddings) % 2  # copies in both halves would be known by heart
    if len(marked) < 4 or any(not 1 < marked[fold == f].sum() < marked[fold == f].size for f in (0, 1)):
        return nothing
    score = np.zeros(marked.shape)
    for f in (0, 1):
        trees = HistGradientBoostingClassifier(max_iter=60, early_stopping=False, random_state=0)
        trees.fit(embeddings[fold != f].reshape(-1, embeddings.shape[-1]), marked[fold != f].ravel())
        there = trees.predict_proba(embeddings[fold == f].reshape(-1, embeddings.shape[-1]))[:, 1]
        score[fold == f] = there.reshape(marked[fold == f].shape)
    score = score.round(6)  # near ties are ties on every machine
    draw = np.random.default_rng(0)
    found = []
    for index in [np.arange(len(marked)), *draw.integers(0, len(marked), (_DRAWS, len(marked)))]:
        truth = marked[index].ravel()
        found.append(average_precision_score(truth, score[index].ravel()) if truth.any() else np.nan)
    return _three(found)


def _groups(embeddings: np.ndarray) -> np.ndarray:
    """Number images so that copies of one share a number: (images, patches, channels) → (images), 0, 1, … by first appearance."""
    flat = embeddings.reshape(len(embeddings), -1).astype(np.float32)
    flat = flat - flat.mean(0)
    product = flat @ flat.T
    square = np.diag(product)
    apart = square[:, None] + square - 2 * product
    _, label = connected_components(apart <= COPY * (square[:, None] + square) + 1e-9, directed=False)
    result: np.ndarray = label
    return result


def place(embeddings: xr.DataArray, marked: np.ndarray, background: np.ndarray | None = None) -> Part:
    """Do marked patches repeat their neighbours, and does what they show fail to tell them from others? (Fig 5a)

    Args:
        embeddings: Patch embeddings before positions are added [image, token, channel], patches alone.
        marked: (images, patches).
        background: Share of background in every patch, (images, patches), nan where it is not known.

    Returns:
        The mean cosine of marked patches to their neighbours, the others' as control; `more` has the interval of the difference,
        the average precision of `content_precision`, and the share of pure background among marked and other patches.
    """
    similar = redundancy.neighbour_similarity(embeddings).transpose("image", "token").values
    value, low, high = arrays.bootstrap_ratio((similar * marked).sum(1), marked.sum(1))
    control = float(similar[~marked].mean()) if (~marked).any() else np.nan
    gap = _gap(similar, marked)
    tells = content_precision(embeddings.transpose("image", "token", "channel").values, marked)
    more = {"gap": gap[0], "gap_low": gap[1], "gap_high": gap[2], "chance": float(marked.mean())}
    more |= dict(zip(("content", "content_low", "content_high"), tells, strict=True))
    words = f"marked patches resemble their neighbours by a cosine of {value:.2f} {_interval(low, high)}, others by {control:.2f}"
    words += (
        f"; what a patch shows tells its mark with an average precision of {tells[0]:.2f} {_interval(*tells[1:])}, "
        f"{more['chance']:.2f} by chance"
        if np.isfinite(tells[0])
        else "; too few marks to see whether what a patch shows tells them"
    )
    if background is not None and np.isfinite(background).any():
        known = np.isfinite(background)
        shares = [
            arrays.bootstrap_ratio(((background == 1) & m & known).sum(1), (m & known).sum(1))
            for m in (marked, ~marked)
        ]
        more |= {"background": shares[0][0], "background_low": shares[0][1], "background_high": shares[0][2]}
        more |= {"background_others": shares[1][0]}
        ends = _interval(100 * shares[0][1], 100 * shares[0][2], ".0f")
        words += (
            f"; {100 * shares[0][0]:.0f} % of them {ends} are pure background, {100 * shares[1][0]:.0f} % of the others"
        )
    answer = "open"
    if tells[1] > CONTENT or gap[2] < 0:
        answer = "against"
    elif gap[1] > 0 and tells[2] < CONTENT:
        answer = "for"
    return Part("place", answer, words, value, low, high, control, more)


def _gap(values: np.ndarray, marked: np.ndarray) -> tuple[float, float, float]:
    """Mean of marked less mean of other patches, with a bootstrap over images: (image, patch), bool → value, low, high."""
    sums = np.stack([(values * marked).sum(1), marked.sum(1), (values * ~marked).sum(1), (~marked).sum(1)])
    draw = np.random.default_rng(0).integers(0, len(values), (1000, len(values)))
    with np.errstate(invalid="ignore"):

        def of(s: np.ndarray) -> np.ndarray:
            result: np.ndarray = s[0] / s[1] - s[2] / s[3]
            return result

        return _three(np.concatenate([[of(sums.sum(-1))], of(sums[:, draw].sum(-1))]))


def attention(received: xr.DataArray, cls: xr.DataArray | None, marked: np.ndarray) -> Part:
    """Do marked patches draw attention, of all queries and of CLS? (Fig 1, 2)

    Args:
        received: Attention that patches receive of all queries, in fair shares [image, received_layer, token]; nan in
            blocks that cannot be watched.
        cls: That of CLS, in fair shares [image, attention_layer, token], None without CLS.
        marked: (images, patches).

    Returns:
        What marked patches receive of all queries in the block where they receive most; others there as control.
    """

    def means(values: xr.DataArray, name: str, which: np.ndarray) -> np.ndarray:
        array = values.transpose("image", name, "token").values
        with np.errstate(invalid="ignore"):
            result: np.ndarray = (array * which[:, None]).sum((0, 2)) / which.sum()
        return result

    each = means(received, "received_layer", marked)
    if not np.isfinite(each).any():
        return Part("attention", "not measured", "no block's attention can be watched")
    best = int(np.nanargmax(each))
    at = received.isel(received_layer=best).transpose("image", "token").values
    value, low, high = arrays.bootstrap_ratio((at * marked).sum(1), marked.sum(1))
    control = float(means(received, "received_layer", ~marked)[best])
    gap = _gap(at, marked)
    block = int(received["received_layer"].values[best])
    more = {"block": float(block), "gap_low": gap[1], "gap_high": gap[2]}
    words = (
        f"marked patches receive {value:.1f} fair shares of the attention of all queries {_interval(low, high, '.1f')} in block "
        f"{block}, others {control:.1f}"
    )
    if cls is not None:
        seen = means(cls, "attention_layer", marked)
        other = means(cls, "attention_layer", ~marked)
        top = int(np.nanargmax(seen))
        more |= {"cls": float(seen[top]), "cls_others": float(other[top])}
        more |= {"cls_block": float(cls["attention_layer"].values[top])}
        words += f"; of CLS {seen[top]:.1f} in block {cls['attention_layer'].values[top]}, others {other[top]:.1f}"
    answer = "for" if low > SINK and gap[1] > 0 else "against" if high < SINK or gap[2] < 0 else "open"
    return Part("attention", answer, words, value, low, high, control, more)


def neurons(found: xr.Dataset) -> Part:
    """Do few MLP neurons write what marks the patches?

    Args:
        found: What `neurons.search` gives.

    Returns:
        The least number of neurons that write half of the shift; as control, the number of all. `more` has the median AUC of
        these neurons (0.5 by chance) and the share that all MLPs write.
    """
    total = int(np.isfinite(found["share"].values).sum())
    half, low, high = (float(found[k]) for k in ("half", "half_low", "half_high"))
    chosen = register_neurons(found)
    number = sum(map(len, chosen.values()))
    all_mlp = float(found["share"].sum())
    more = {"register_neurons": number, "mlp": all_mlp, "total": total}
    if not np.isfinite(half):
        words = f"the MLP neurons write {100 * all_mlp:.0f} % of the shift together, and no number of them half of it"
        return Part("neurons", "against", words, control=total, more=more)
    top = ranked(found, int(half))
    auc = selectivity(found, top)
    more |= {"auc": auc}
    blocks = sorted({b for b, _ in top})
    words = (
        f"{half:.0f} of {total} MLP neurons {_interval(low, high, '.0f')} write half of the shift, in "
        f"{_span('block', blocks[0], blocks[-1])}, with a median AUC of {auc:.2f} for marked patches; "
        f"{_number(number, 'register neuron')} in all"
    )
    few = half <= max(1.0, FEW * total) and auc >= SELECTIVE and number > 0
    many = (low > FEW * total and low > 1) or auc < SELECTIVE or not number
    return Part("neurons", "for" if few else "against" if many else "open", words, half, low, high, total, more)


def cause(left: xr.Dataset) -> Part:
    """Does the mode go with its neurons?

    Args:
        left: What `neurons.suppression` gives for 0 and for all register neurons.

    Returns:
        The part of the marks that goes when they are suppressed; as control, when as many random neurons are.
    """
    share = left["share"].transpose("which", "count", "image").values
    base, ours, random = share[0, 0], share[0, -1], share[1, -1]
    number = int(left["count"].values[-1])
    value, low, high = arrays.bootstrap_ratio(base - ours, base)
    control, c_low, c_high = arrays.bootstrap_ratio(base - random, base)
    gap = arrays.bootstrap_ratio(random - ours, base)
    more = {"control_low": c_low, "control_high": c_high, "gap_low": gap[1], "gap_high": gap[2], "neurons": number}
    ends, c_ends = _interval(100 * low, 100 * high, ".0f"), _interval(100 * c_low, 100 * c_high, ".0f")
    words = (
        f"with {_number(number, 'register neuron')} suppressed {100 * value:.0f} % of the marks go {ends}, with as many random "
        f"ones {100 * control:.0f} % {c_ends}"
    )
    yes, no = low > CAUSE and gap[1] > 0, high < CAUSE or gap[2] < 0
    return Part("cause", "for" if yes else "against" if no else "open", words, value, low, high, control, more)


def judge(parts: Mapping[str, Part]) -> tuple[str, str]:
    """Decide from the parts.

    Without a mode: "none", or "inconclusive" where single norms are large, the images few, or the cut-off fixed. With one:
    "content" where place is against an artifact; "artifacts" where place is for it, and so is attention, or neurons and cause
    together; else "inconclusive".

    Args:
        parts: By name; those that are missing were not measured.

    Returns:
        One of VERDICTS, and why.
    """
    answers = {name: parts[name].answer if name in parts else "not measured" for name in PARTS}
    if answers["mode"] == "against":
        return "none", parts["mode"].sentence
    if answers["mode"] != "for":
        return "inconclusive", parts["mode"].sentence
    mechanism = [n for n in ("attention",) if answers[n] == "for"]
    if answers["neurons"] == answers["cause"] == "for":
        mechanism += ["neurons", "cause"]
    if answers["place"] == "against":
        return "content", f"{parts['mode'].sentence}, but {parts['place'].sentence}"
    if answers["place"] == "for" and mechanism:
        return "artifacts", f"{parts['mode'].sentence}; {', '.join(['place', *mechanism])} agree"
    unsure = ", ".join(f"{n} {answers[n]}" for n in PARTS[1:])
    return "inconclusive", f"{parts['mode'].sentence}; is it an artifact? {unsure}"


def suppressed_order(found: xr.Dataset) -> tuple[list[tuple[int, int]], Sequence[int]]:
    """The register neurons of a search in order of their share, and the numbers of them that `cause` asks to suppress."""
    chosen = register_neurons(found)
    order = [(b, j) for b, j in ranked(found) if j in chosen.get(b, [])]
    return order, [0, len(order)]
