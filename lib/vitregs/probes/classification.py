"""Classification with frozen features: k-nearest neighbours, logistic regression, and both on one token an image."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor

from vitregs import arrays
from vitregs.data import datasets
from vitregs.data.images import Images
from vitregs.errors import InputError, unknown
from vitregs.measure import outliers
from vitregs.models import capture
from vitregs.models.backbone import Backbone
from vitregs.probes import logistic, sampling

METRICS = ("top1", "mean per class", "mAP")
NEIGHBOURS, HEAT = 20, 0.07
TRAIN_SHARE = 2 / 3  # of the images, where a source has no split of its own
FEW = tuple(10.0**k for k in range(-5, 1))  # a short grid, where hundreds of fits are asked for


def vote(bank: Tensor, labels: Tensor, queries: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """Votes of the nearest in a bank, by exp(cosine / 0.07): (n, d), marks (n, k), (m, d) → (m, k) (DINO, appendix F.1)."""
    alike = F.normalize(queries, dim=-1) @ F.normalize(bank, dim=-1).T
    near, at = alike.topk(min(neighbours, len(bank)))
    return (labels[at].to(near) * ((near - 1) / HEAT).exp()[..., None]).sum(1)


def answers(
    x: Tensor, y: Tensor, test: Tensor, *, method: str = "logistic", strengths: Sequence[float] = FEW, seed: int = 0
) -> Tensor:
    """Scores of the classes for images that were not seen: (n, d), labels as in `logistic.check`, (m, d) → (m, k).

    Logistic: the strength is chosen on a random tenth of the training part, then all of it is fitted (section 2.4).
    """
    classes = logistic.check(x, y)
    if method == "knn":
        return vote(x, y if y.ndim == 2 else F.one_hot(y, classes), test)
    if method != "logistic":
        raise unknown("method", method, ("logistic", "knn"))
    best = strengths[0]
    if len(strengths) > 1:
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x))).to(x.device)
        held, kept = order.tensor_split([max(1, round(logistic.HELD * len(x)))])
        grid = logistic.path(x[kept], y[kept], strengths).logits(x[held])
        kind = "mAP" if y.ndim == 2 else "top1"
        marks = y[held].cpu().numpy()
        right = [_measure(scores.cpu().numpy(), marks, kind)[0] for scores in grid]
        best = strengths[int(np.argmax(right))]  # the strongest penalty among equals
    return logistic.path(x, y, [best]).logits(test)[0]


def average_precision(scores: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Precision averaged at the 11 recalls 0, 0.1, … 1 (PASCAL VOC 2007): (m, k), bool (m, k) → (k,) in [0, 1], nan where none is
    true."""
    hits = np.take_along_axis(true, np.argsort(-scores, 0, kind="stable"), 0)
    found, total = np.cumsum(hits, 0), hits.sum(0)
    precision = np.maximum.accumulate((found / np.arange(1, len(hits) + 1)[:, None])[::-1])[::-1]  # best from here on
    # the first rank that reaches a recall of r tenths
    first = np.stack([(10 * found >= r * total).argmax(0) for r in range(11)])
    return np.where(total > 0, np.take_along_axis(precision, first, 0).mean(0), np.nan)


def _measure(scores: np.ndarray, y: np.ndarray, metric: str, draws: int = 0) -> tuple[float, float, float]:
    """A metric with a 95 % bootstrap over images: scores (m, k), labels → value, low, high."""
    if metric == "top1":
        right = scores.argmax(1) == y
        return arrays.bootstrap_interval(right, draws=draws) if draws else (float(right.mean()), np.nan, np.nan)

    def value(rows: Any) -> float:
        if metric == "mAP":
            return float(np.nanmean(average_precision(scores[rows], y[rows])))
        right, known = scores[rows].argmax(1) == y[rows], y[rows]
        return float(np.mean([right[known == k].mean() for k in np.unique(known)]))

    estimate = value(slice(None))
    if not draws:
        return estimate, np.nan, np.nan
    rng = np.random.default_rng(0)
    drawn = np.array([value(rng.integers(0, len(y), len(y))) for _ in range(min(draws, 200))])  # costly, so fewer
    low, high = np.quantile(drawn, [0.025, 0.975]) + estimate - drawn.mean()  # images drawn twice flatter these metrics
    return estimate, float(low), float(high)


def score(
    features: np.ndarray,
    labels: np.ndarray,
    *,
    metric: str = "top1",
    train_count: int | None = None,
    method: str = "logistic",
    strengths: Sequence[float] = FEW,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> xr.Dataset:
    """Train on the first images, test on the rest: (n, d), classes (n,) (-1 unknown: left out) or marks (n, k), number
    of training images (default two thirds) → Dataset score, low, high, chance, n; and for top-1 right (n,) for paired
    comparisons.

    `chance` is the score of always naming the most frequent class. Raises InputError for one class only, fewer than two images on
    either side, an unknown metric or method, and labels of another number.
    """
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    if len(features) != len(labels):
        raise InputError(f"there are {len(labels)} labels for {len(features)} images")
    train = np.arange(len(labels)) < (round(TRAIN_SHARE * len(labels)) if train_count is None else train_count)
    known = np.ones(len(labels), bool) if labels.ndim == 2 else labels >= 0
    if not known.any():
        raise InputError("not one image has a label")
    known &= np.isfinite(features).all(1)
    first, rest = known & train, known & ~train
    if first.sum() < 2 or rest.sum() < 2:
        raise InputError(f"{known.sum()} labelled images are too few to train on some and test on others")
    x, test = (torch.from_numpy(np.asarray(features[i], np.float32)).to(device) for i in (first, rest))
    y = torch.from_numpy(labels[first]).to(device)
    scores = answers(x, y, test, method=method, strengths=strengths, seed=seed).cpu().numpy()
    true = labels[rest]
    # a class that was not in the training set cannot be predicted
    if labels.ndim == 1 and scores.shape[1] <= true.max():
        scores = np.pad(scores, ((0, 0), (0, int(true.max()) + 1 - scores.shape[1])), constant_values=-np.inf)
    value, low, high = _measure(scores, true, metric, draws=1000)
    usual = labels[first].mean(0) if labels.ndim == 2 else np.bincount(labels[first], minlength=scores.shape[1])
    chance = _measure(np.broadcast_to(usual, scores.shape), true, metric)[0]
    found = {"score": value, "low": low, "high": high, "chance": chance, "n": int(rest.sum())}
    right = {"right": ("image", scores.argmax(1) == true)} if metric == "top1" else {}
    return xr.Dataset({k: ((), v) for k, v in found.items()} | right)


def collect(
    backbone: Backbone,
    images: Images,
    marked: xr.DataArray,
    *,
    seeds: Sequence[int],
    first: int = 0,
    layer: int = -1,
    final_norm: bool = True,
    batch: int = 32,
) -> dict[str, np.ndarray]:
    """States of one drawn token an image: backbone, images, marks [image, token], of which the first belongs to the image of
    that number → {token: (seeds or 1, images, channels)}.

    Nothing else of the states is kept. nan where an image has no such token; kinds that the model lacks are left out.
    """
    there = set(np.asarray(marked["kind"]).tolist())
    wanted = [t for t in sampling.TOKENS if t in there or t in ("normal", "outlier")]
    parts: dict[str, list[np.ndarray]] = {t: [] for t in wanted}
    options: Any = {"layer": layer, "kinds": sorted(there), "final_norm": final_norm, "batch": batch}
    for pixels in images.pixels(batch):
        states = capture.tokens(backbone, pixels, **options).values
        here = marked.isel(image=slice(first, first + len(pixels)))
        for token in wanted:
            drawn = sampling.draw_tokens(here, token, seeds=seeds[:1] if token == "cls" else seeds, first=first)
            taken = np.stack([states[np.arange(len(states)), row] for row in drawn])
            parts[token].append(np.where((drawn >= 0)[..., None], taken, np.nan))
        first += len(pixels)
    return {t: np.concatenate(p, 1) for t, p in parts.items()}


def classify(
    backbone: Backbone,
    images: Images,
    test: Images | None = None,
    *,
    tasks: Sequence[str] = (),
    missing: str = "largest",
    seeds: Sequence[int] = (0, 1, 2),
    layer: int = -1,
    final_norm: bool = True,
    method: str = "logistic",
    strengths: Sequence[float] = FEW,
    batch: int = 32,
) -> xr.Dataset:
    """How well one token an image tells what the image is (Tables 1, 4, 6): backbone, labelled images (without `test` the
    first two thirds train), tasks (default all they can answer; the name of a data set for its metric) → Dataset[task, token].

    score, low, high (95 % over images), std over the draws of a token, chance, n; the attribute `marked` says what stands for
    outliers. An image is scored in a row if it has such a token; `missing` is that of `outliers.mark_per_image`.
    Raises InputError for images without labels, no outlier anywhere, outliers everywhere, and too few images.
    """
    sources = [images] if test is None else [images, test]
    labels = datasets.labels(sources, tasks)
    parts = [capture.norms(backbone, s, layers=[layer], batch=batch).isel(layer=0) for s in sources]
    norms = xr.concat(parts, "image")
    marked, words = outliers.mark_per_image(norms, outliers.find_cutoff(norms), missing)
    sampling.check_marks(marked)
    starts = [0, parts[0].sizes["image"]]
    drawn = [
        collect(backbone, s, marked, seeds=seeds, first=n, layer=layer, final_norm=final_norm, batch=batch)
        for s, n in zip(sources, starts, strict=False)
    ]
    states = {t: np.concatenate([d[t] for d in drawn], 1) for t in drawn[0]}
    options: Any = {"method": method, "strengths": strengths, "device": backbone.device}
    options["train_count"] = None if test is None else starts[1]
    found = {
        (task, token): [score(x, y, metric=datasets.metric(task), **options) for x in draws]
        for task, y in labels.items()
        for token, draws in states.items()
    }
    table = _fold(found, list(labels), list(states))
    return table.assign_coords(model=backbone.name).assign_attrs(marked=words)


def classify_sets(
    backbone: Backbone,
    names: Sequence[str],
    *,
    folder: str = "",
    train_count: int,
    test_count: int,
    seed: int = 0,
    **options: Any,
) -> xr.Dataset:
    """`classify` on real data sets: backbone, names in `datasets.SETS`, a folder that holds a folder for each instead of the hub,
    numbers of training and test images, options of `classify` → Dataset[task, token]."""
    found = []
    for name in names:
        place = str(Path(folder).expanduser() / name) if folder else ""
        pair = datasets.open_set(
            name,
            size=backbone.size,
            preparation=backbone.preparation,
            train_count=train_count,
            test_count=test_count,
            seed=seed,
            folder=place,
        )
        found.append(classify(backbone, *pair, tasks=[name], **options))
    return xr.concat(found, "task", combine_attrs="drop_conflicts")


def classify_real(
    backbone: Backbone,
    _images: Images,
    *,
    prints: Mapping[str, str],
    folder: str = "",
    train_count: int,
    test_count: int,
    seed: int = 0,
    **options: Any,
) -> xr.Dataset:
    """`classify_sets` for a stored result: the images of the real data sets take the place of those given.

    Args:
        backbone: a network.
        _images: not looked at.
        prints: names in `datasets.SETS`, each with what `datasets.fingerprints` says of its content.
        folder: holds a folder for each set; empty for the hub.
        train_count: number of images to train with.
        test_count: number of images to test on.
        seed: which images.
        options: of `classify`.

    Returns:
        Dataset[task, token] of `classify`.
    """
    return classify_sets(
        backbone, list(prints), folder=folder, train_count=train_count, test_count=test_count, seed=seed, **options
    )


def _fold(found: Mapping[tuple[str, str], list[xr.Dataset]], tasks: list[str], tokens: list[str]) -> xr.Dataset:
    """Average over the draws of a token: → Dataset[task, token]; the interval is that of the mean of the draws' ends."""
    out = {}
    for name in ("score", "low", "high", "chance", "n"):
        cells = [[np.mean([float(d[name]) for d in found[a, t]]) for t in tokens] for a in tasks]
        out[name] = (("task", "token"), np.array(cells))
    std = [
        [np.std([float(d["score"]) for d in found[a, t]], ddof=1) if len(found[a, t]) > 1 else np.nan for t in tokens]
        for a in tasks
    ]
    out["std"] = (("task", "token"), np.array(std))
    return xr.Dataset(out, coords={"task": tasks, "token": tokens})
