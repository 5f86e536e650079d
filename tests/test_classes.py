"""Classes from frozen features: planted answers found where they are and nowhere else, metrics by hand, named mistakes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from vitregs import arrays
from vitregs.arrays import token_coords
from vitregs.data import datasets, images
from vitregs.errors import InputError
from vitregs.measure import outliers
from vitregs.models import registry
from vitregs.models.backbone import Backbone
from vitregs.probes import classification, sampling

GRID = (3, 4)
KINDS = ["cls", "register", "register", *["patch"] * 12]


def tokens(values: np.ndarray, name: str = "marked") -> xr.DataArray:
    dims = ("image", "token", "channel")[: values.ndim]
    return xr.DataArray(values, dims=dims, coords=token_coords(KINDS, GRID), name=name)


def marks(n: int, seed: int = 0) -> xr.DataArray:
    """Two outliers among the patches of each image."""
    rng = np.random.default_rng(seed)
    hot = np.zeros((n, 15), bool)
    for row in hot:
        row[3 + rng.permutation(12)[:2]] = True
    return tokens(hot)


# --- one token an image


@pytest.mark.parametrize("token", sampling.TOKENS)
def test_only_the_right_tokens_are_drawn(token: str) -> None:
    marked = marks(50)
    drawn = sampling.draw_tokens(marked, token, seeds=(0, 1, 2, 3))
    allowed = {
        "cls": lambda i: {0},
        "register": lambda i: {1, 2},
        "outlier": lambda i: set(np.flatnonzero(marked.values[i])),
        "normal": lambda i: set(range(3, 15)) - set(np.flatnonzero(marked.values[i])),
    }[token]
    assert all(set(drawn[:, i].tolist()) <= {int(n) for n in allowed(i)} for i in range(50))


def test_all_eligible_tokens_are_drawn_alike() -> None:
    drawn = sampling.draw_tokens(marks(3000), "normal")[0]
    counts = np.bincount(drawn - 3, minlength=12)
    assert counts.min() > 250 * 0.7  # 250 each on average, standard deviation 15
    assert counts.max() < 250 * 1.3


def test_batches_do_not_change_what_is_drawn() -> None:
    marked = marks(40)
    whole = sampling.draw_tokens(marked, "outlier", seeds=(0, 1))
    parts = [
        sampling.draw_tokens(marked.isel(image=slice(a, a + 7)), "outlier", seeds=(0, 1), first=a)
        for a in range(0, 40, 7)
    ]
    np.testing.assert_array_equal(np.concatenate(parts, 1), whole)


def test_images_without_such_a_token_are_reported() -> None:
    marked = marks(4)
    marked.values[2] = False
    assert sampling.draw_tokens(marked, "outlier")[0, 2] == -1
    assert (sampling.draw_tokens(marked, "outlier")[0, [0, 1, 3]] >= 3).all()


def test_no_outlier_and_nothing_but_outliers_are_mistakes() -> None:
    with pytest.raises(InputError, match=r"no patch is an outlier in any image: let the largest norms stand in"):
        sampling.check_marks(tokens(np.zeros((2, 15), bool)))
    with pytest.raises(InputError, match="every patch of every image is an outlier: the cut-off lies below all norms"):
        sampling.check_marks(tokens(np.ones((2, 15), bool)))
    with pytest.raises(InputError, match="unknown token 'patch'"):
        sampling.draw_tokens(marks(2), "patch")


def test_the_largest_norm_stands_in_where_there_is_no_outlier() -> None:
    rng = np.random.default_rng(0)
    norms = tokens(rng.uniform(1, 2, (4, 15)))
    norms.values[:, 0] = 99  # CLS does not count
    norms.values[1, 7] = 50
    cut = outliers.find_cutoff(norms, 10.0)
    marked, message = outliers.mark_per_image(norms, cut, "largest")
    assert arrays.patches(marked).sum("token").values.tolist() == [1, 1, 1, 1]
    assert int(arrays.patches(marked).values[0].argmax()) == int(norms.values[0, 3:].argmax())
    assert message == "outliers; in 75 % of the images, which have none, the largest norm"
    dropped, message = outliers.mark_per_image(norms, cut, "drop")
    assert arrays.patches(dropped).sum("token").values.tolist() == [0, 1, 0, 0]
    assert message == "outliers"
    with pytest.raises(InputError, match="missing must be largest or drop, not 'keep'"):
        outliers.mark_per_image(norms, cut, "keep")


# --- one score


def planted(n: int, k: int, d: int = 12, seed: int = 0, noise: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = rng.integers(0, k, n)
    return rng.normal(size=(k, d))[y] + noise * rng.normal(size=(n, d)), y


@pytest.mark.parametrize("method", ["logistic", "knn"])
def test_what_is_encoded_is_found(method: str) -> None:
    x, y = planted(240, 5)
    found = classification.score(x, y, method=method)
    assert float(found["score"]) == 1.0
    assert int(found["n"]) == 80
    assert float(found["chance"]) < 0.4
    assert bool(found["right"].all())


@pytest.mark.parametrize("method", ["logistic", "knn"])
def test_shuffled_labels_are_chance(method: str) -> None:
    x, y = planted(900, 4)
    found = classification.score(x, np.random.default_rng(1).permutation(y), method=method)
    assert 0.15 < float(found["score"]) < 0.36  # a quarter, four standard errors of 300 images
    assert float(found["low"]) < 0.25 + 0.05 < float(found["high"]) + 0.1


def test_marks_are_scored_by_mean_average_precision() -> None:
    x, y = planted(300, 5)
    marked = np.stack([y == 0, y > 2, y == 1], 1)
    found = classification.score(x, marked, metric="mAP")
    assert float(found["score"]) == pytest.approx(1.0)
    shuffled = classification.score(x, marked[np.random.default_rng(0).permutation(300)], metric="mAP")
    assert float(shuffled["score"]) < 0.6


def test_average_precision_by_hand() -> None:
    """Ranked true, false, true: precision 1 up to recall 0.5, then 2/3: 6 of 11 recalls at 1, 5 at 2/3."""
    found = classification.average_precision(
        np.array([[3.0, 0], [2, 0], [1, 0]]), np.array([[True, False], [False, False], [True, False]])
    )
    assert found[0] == pytest.approx((6 + 5 * 2 / 3) / 11)
    assert np.isnan(found[1])


def test_average_precision_is_that_of_its_definition() -> None:
    rng = np.random.default_rng(0)
    scores, true = rng.normal(size=(40, 6)), rng.random((40, 6)) < 0.3
    for k, found in enumerate(classification.average_precision(scores, true)):
        order = np.argsort(-scores[:, k])
        hits = true[order, k]
        precision, recall = np.cumsum(hits) / np.arange(1, 41), np.cumsum(hits) / hits.sum()
        slow = np.mean([max(precision[recall >= r / 10 - 1e-12]) for r in range(11)])
        assert found == pytest.approx(slow)


def test_the_mean_over_classes_weighs_them_alike() -> None:
    scores = np.eye(2)[[0, 0, 0, 0, 0]]
    assert classification._measure(scores, np.array([0, 0, 0, 0, 1]), "mean per class")[0] == 0.5
    assert classification._measure(scores, np.array([0, 0, 0, 0, 1]), "top1")[0] == 0.8


def test_the_vote_is_that_of_its_formula() -> None:
    rng = np.random.default_rng(0)
    bank, queries, y = rng.normal(size=(30, 6)), rng.normal(size=(4, 6)), rng.integers(0, 3, 30)
    found = classification.vote(
        torch.from_numpy(bank), torch.nn.functional.one_hot(torch.from_numpy(y), 3), torch.from_numpy(queries), 5
    )
    for q, votes in zip(queries, found, strict=True):
        cosine = bank @ q / np.linalg.norm(bank, axis=1) / np.linalg.norm(q)
        near = np.argsort(-cosine)[:5]
        slow = [np.exp((cosine[near][y[near] == k] - 1) / 0.07).sum() for k in range(3)]
        np.testing.assert_allclose(votes, slow, rtol=1e-5)


def test_unlabelled_images_are_left_out() -> None:
    x, y = planted(240, 3)
    some = y.copy()
    some[::4] = -1
    assert int(classification.score(x, some)["n"]) == int((some[160:] >= 0).sum())


def test_a_class_that_was_never_trained_is_never_right() -> None:
    x, y = planted(120, 3)
    y[:80] %= 2
    found = classification.score(x, y)
    assert not found["right"].values[y[80:] == 2].any()


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (np.zeros((4, 2)), np.array([0, 1, 0]), {}, "there are 3 labels for 4 images"),
        (np.zeros((9, 2)), np.full(9, -1), {}, "not one image has a label"),
        (np.zeros((2, 2)), np.array([0, 1]), {}, "2 labelled images are too few to train on some and test on others"),
        (np.zeros((9, 2)), np.ones(9, int), {}, "all images have the same label"),
        (np.zeros((9, 2)), np.arange(9) % 2, {"metric": "auc"}, "unknown metric 'auc'"),
        (np.zeros((9, 2)), np.arange(9) % 2, {"method": "svm"}, "unknown method 'svm'"),
    ],
)
def test_mistakes_are_named(x: np.ndarray, y: np.ndarray, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        classification.score(x, y, **options)


# --- one token an image, through a network


@pytest.fixture
def planted_network(monkeypatch: pytest.MonkeyPatch) -> tuple[Backbone, images.Images]:
    """A network whose outliers alone know the colour of the largest object: states and norms are put in by hand."""
    backbone = registry.random(
        "vit_tiny_patch16_224", img_size=(32, 48), embed_dim=24, depth=1, num_heads=2, reg_tokens=1, num_classes=0
    )
    source = images.open_images("scenes", size=(32, 48), count=240)
    colour = datasets.labels([source], ["colour"])["colour"]
    labels = token_coords(backbone.kinds((2, 3)), (2, 3))
    rng = np.random.default_rng(0)
    hot = 2 + rng.integers(0, 6, len(colour))  # behind CLS and register

    def norms(_backbone: Any, _images: Any, **_options: Any) -> xr.DataArray:
        values = rng.normal(10, 0.5, (len(colour), 1, 8))
        values[np.arange(len(colour)), 0, hot] = rng.normal(100, 5, len(colour))
        return xr.DataArray(values, dims=("image", "layer", "token"), coords={**labels, "layer": [1]})

    code = rng.normal(size=(8, 24))
    states = rng.normal(size=(len(colour), 8, 24))
    states[np.arange(len(colour)), hot] = code[colour] + 0.05 * rng.normal(size=(len(colour), 24))
    seen = 0

    def state(_backbone: Any, pixels: Any, **_options: Any) -> xr.DataArray:
        nonlocal seen
        part = states[seen : seen + len(pixels)]
        seen += len(pixels)
        return xr.DataArray(part, dims=("image", "token", "channel"), coords=labels)

    monkeypatch.setattr(classification.capture, "norms", norms)
    monkeypatch.setattr(classification.capture, "tokens", state)
    return backbone, source


def test_a_class_in_the_outliers_alone_is_found_there_and_nowhere_else(
    planted_network: tuple[Backbone, images.Images],
) -> None:
    found = classification.classify(*planted_network, tasks=["colour"], missing="drop")
    score = found["score"].sel(task="colour")
    assert found["token"].values.tolist() == ["cls", "normal", "outlier", "register"]
    assert float(score.sel(token="outlier")) == 1.0
    for token in ("cls", "normal", "register"):
        assert float(score.sel(token=token)) < 0.3, token  # an eighth is chance, 80 images are scored
    assert found.attrs["marked"] == "outliers"
    assert np.isnan(found["std"].sel(token="cls", task="colour"))
    assert float(found["std"].sel(token="outlier", task="colour")) == 0.0


def test_nothing_depends_on_the_batch() -> None:
    backbone = registry.load("clip-pico-reg4", device="cpu")
    source = images.open_images("scenes", size=backbone.size, count=36)
    one, other = (
        classification.classify(backbone, source, tasks=["colour", "count", "colours in view"], seeds=(0, 1), batch=b)
        for b in (7, 36)
    )
    xr.testing.assert_allclose(one, other, atol=1e-6)


def test_without_outliers_dropping_is_a_mistake() -> None:
    backbone = registry.load("clip-pico", device="cpu")
    source = images.open_images("scenes", size=backbone.size, count=24)
    with pytest.raises(InputError, match="no patch is an outlier in any image"):
        classification.classify(backbone, source, missing="drop")


def test_a_published_model_tells_real_classes(shared_data: Any) -> None:
    """DeiT-Tiny saw these ten classes in training: its CLS must be far above a random patch token."""
    backbone = registry.load(
        "deit_tiny_patch16_224", weights=shared_data / "deit-tiny" / "deit_tiny_patch16_224.safetensors", device="cpu"
    )
    train, test = datasets.open_set(
        "Imagenette",
        size=(224, 224),
        preparation=backbone.preparation,
        train_count=120,
        test_count=80,
        folder=str(shared_data / "imagenette-224"),
    )  # fmt: skip
    found = classification.classify(backbone, train, test, tasks=["Imagenette"], seeds=(0,))
    score = found["score"].sel(task="Imagenette")
    assert float(score.sel(token="cls")) > 0.85
    assert float(score.sel(token="cls")) > float(score.sel(token="normal")) > 0.3
    assert int(found["n"].sel(token="cls", task="Imagenette")) == 80


def test_real_sets_by_name(shared_data: Path, tmp_path: Path) -> None:
    (tmp_path / "CIFAR-10").symlink_to(shared_data / "cifar10")
    backbone = registry.load("clip-pico", device="cpu")
    how = {"folder": str(tmp_path), "train_count": 60, "test_count": 40, "seeds": [0], "strengths": [1e-2, 1.0]}
    found = classification.classify_sets(backbone, ["CIFAR-10"], **how)
    prints = datasets.fingerprints(["CIFAR-10"], str(tmp_path))
    assert prints == datasets.fingerprints(["CIFAR-10"], f"{tmp_path}/")
    own = images.open_images(
        "scenes", size=96, count=2
    )  # a stored result names its images, but here the set's take their place
    xr.testing.assert_identical(classification.classify_real(backbone, own, prints=prints, **how), found)
    (tmp_path / "CIFAR-10").unlink()
    (tmp_path / "CIFAR-10").symlink_to(shared_data / "imagenette-224")
    assert datasets.fingerprints(["CIFAR-10"], str(tmp_path)) != prints
    assert found["task"].values.tolist() == ["CIFAR-10"]
    assert int(found["n"].sel(token="cls").item()) == 40
