"""Logistic regression: scikit-learn's optimum for every strength, planted answers, named mistakes."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from vitregs.errors import InputError
from vitregs.probes import logistic


def features(n: int, d: int, k: int, seed: int = 0, far: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Correlated features around class centres, off the origin."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(d, d)) * (np.arange(1, d + 1) ** -0.7)
    y = rng.integers(0, k, n)
    centre = far * rng.normal(size=(k, d))
    return ((rng.normal(size=(n, d)) + centre[y]) @ mix.T + 3).astype(np.float32), y


def loss(x: np.ndarray, y: np.ndarray, weight: np.ndarray, bias: np.ndarray, strength: float) -> float:
    """Mean loss with penalty, written once more in float64."""
    scores = x.astype(np.float64) @ weight + bias
    scores -= scores.max(1, keepdims=True)
    each = np.log(np.exp(scores).sum(1)) - scores[np.arange(len(y)), y]
    return float(each.mean() + np.square(weight).sum() / (2 * strength * len(y)))


@pytest.mark.filterwarnings("ignore:lbfgs failed")  # scikit-learn, at its limit of evaluations
@pytest.mark.parametrize(("n", "d", "k", "far"), [(300, 20, 3, 0.3), (400, 12, 7, 1.0), (150, 40, 2, 2.0)])
def test_the_optimum_is_that_of_scikit_learn(n: int, d: int, k: int, far: float) -> None:
    x, y = features(n, d, k, far=far)
    strengths = [1e-5, 1e-2, 1.0, 1e2, 1e4]
    found = logistic.path(torch.from_numpy(x), torch.from_numpy(y), strengths)
    for i, c in enumerate(strengths):
        # with two classes scikit-learn keeps one column, which pays twice the penalty of a pair of half its size
        theirs = LogisticRegression(C=2 * c if k == 2 else c, max_iter=20000, tol=1e-8).fit(x.astype(np.float64), y)
        weight, bias = theirs.coef_.T, theirs.intercept_
        if k == 2:
            weight, bias = np.concatenate([-weight, weight], 1) / 2, np.concatenate([-bias, bias]) / 2
        ours = loss(x, y, found.weight[i].double().numpy(), found.bias[i].double().numpy(), c)
        assert ours == pytest.approx(loss(x, y, weight, bias, c), abs=1e-4)
        assert ours == pytest.approx(float(found.loss[i]), abs=1e-5)


def test_marks_are_one_regression_each() -> None:
    x, y = features(200, 8, 4)
    marks = np.stack([y == 1, (y == 2) | (y == 1)], 1)
    found = logistic.path(torch.from_numpy(x), torch.from_numpy(marks), [1.0])
    for k in range(2):
        theirs = LogisticRegression(C=1.0, max_iter=20000, tol=1e-8).fit(x.astype(np.float64), marks[:, k])
        np.testing.assert_allclose(found.weight[0, :, k], theirs.coef_[0], atol=3e-3)
        np.testing.assert_allclose(found.bias[0, k], theirs.intercept_[0], atol=3e-2)


def test_problems_of_a_grid_do_not_disturb_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = features(200, 10, 4)
    both = logistic.path(torch.from_numpy(x), torch.from_numpy(y), [1e-3, 10.0])
    for i, c in enumerate((1e-3, 10.0)):
        alone = logistic.path(torch.from_numpy(x), torch.from_numpy(y), [c])
        torch.testing.assert_close(alone.loss[0], both.loss[i], atol=2e-5, rtol=0)
    monkeypatch.setattr(logistic, "LARGEST", 1)  # one image a block
    blocks = logistic.path(torch.from_numpy(x), torch.from_numpy(y), [1e-3, 10.0])
    torch.testing.assert_close(blocks.loss, both.loss, atol=2e-5, rtol=0)


def test_shifts_and_the_order_of_images_do_not_matter() -> None:
    x, y = features(200, 10, 4)
    order = np.random.default_rng(1).permutation(len(x))
    first = logistic.path(torch.from_numpy(x), torch.from_numpy(y), [1.0])
    turned = logistic.path(torch.from_numpy(x[order]), torch.from_numpy(y[order]), [1.0])
    moved = logistic.path(torch.from_numpy(x + 5), torch.from_numpy(y), [1.0])
    for other, shift in ((turned, 0), (moved, 5)):
        torch.testing.assert_close(
            first.logits(torch.from_numpy(x))[0].softmax(-1),
            other.logits(torch.from_numpy(x + np.float32(shift)))[0].softmax(-1),
            atol=5e-3,
            rtol=0,
        )


def test_the_slope_is_that_of_the_loss() -> None:
    """Autograd as the independent version, for classes and for marks."""
    x, y = features(60, 5, 3)
    for labels in (torch.from_numpy(y), torch.from_numpy(np.stack([y == 0, y == 2], 1))):
        k = 3 if labels.ndim == 1 else 2
        task = logistic._Task(torch.from_numpy(x), labels, torch.tensor([0.1, 0.01]), k)
        w = torch.randn(2, 6, k, generator=torch.Generator().manual_seed(0), requires_grad=True)
        value, slope = task(w.detach(), torch.arange(2))
        logits = torch.einsum("nd,gdk->gnk", task.z, w)
        for g, penalty in enumerate((0.1, 0.01)):
            if labels.ndim == 1:
                mean = torch.nn.functional.cross_entropy(logits[g], labels)
            else:
                target = labels.float()
                mean = torch.nn.functional.binary_cross_entropy_with_logits(logits[g], target) * k
            full = mean + 0.5 * penalty * w[g, :-1].square().sum()
            assert float(value[g]) == pytest.approx(float(full.detach()), rel=1e-5)
            (expected,) = torch.autograd.grad(full, w, retain_graph=True)
            torch.testing.assert_close(slope[g], expected[g], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(4, 2), torch.tensor([0, 1, 0]), "there are 3 labels for 4 images"),
        (torch.zeros(3, 2), torch.tensor([0, -1, 1]), "1 of 3 images have no label"),
        (
            torch.zeros(3, 2),
            torch.tensor([1, 1, 1]),
            "all images have the same label: there is nothing to tell apart",
        ),
        (
            torch.zeros(2, 2),
            torch.tensor([[True, False], [True, False]]),
            "no label is true for some images and false for others: there is nothing to tell apart",
        ),
        (torch.full((2, 2), torch.nan), torch.tensor([0, 1]), "the features are not finite"),
    ],
)
def test_what_cannot_be_fitted_is_said(x: torch.Tensor, y: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        logistic.path(x, y)


def test_strengths_are_positive() -> None:
    x, y = features(20, 2, 2)
    with pytest.raises(InputError, match="strengths must be positive"):
        logistic.path(torch.from_numpy(x), torch.from_numpy(y), [1.0, 0.0])


def test_features_without_standard_deviation_give_the_frequencies() -> None:
    y = torch.tensor([0, 0, 0, 1])
    found = logistic.path(torch.ones(4, 3), y, [1.0])
    odds = found.logits(torch.ones(1, 3))[0, 0].softmax(0)
    torch.testing.assert_close(odds, torch.tensor([0.75, 0.25]), atol=1e-3, rtol=0)
