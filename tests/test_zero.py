"""Zero-shot classification: planted embeddings, a slow count, inputs that do not fit."""

import numpy as np
import pytest
import torch

from vitregs.errors import InputError
from vitregs.probes.zero_shot import zero_shot

rng = np.random.default_rng(0)
CLASSES, EMBED, WIDTH, COUNT = 7, 5, 9, 60
PROJECT = torch.from_numpy(rng.standard_normal((EMBED, WIDTH))).float()
PROMPTS = torch.nn.functional.normalize(torch.from_numpy(rng.standard_normal((CLASSES, EMBED))).float(), dim=1)
LABEL = rng.integers(0, CLASSES, COUNT)


def images(label: np.ndarray) -> np.ndarray:
    """CLS tokens of any length whose projection is the prompt of the label."""
    back = np.linalg.pinv(PROJECT.numpy())
    return (PROMPTS.numpy()[label] @ back.T * rng.uniform(0.1, 30, (len(label), 1))).astype(np.float32)


def test_images_that_lie_on_their_prompt_are_all_right() -> None:
    found = zero_shot(images(LABEL), PROJECT, PROMPTS, LABEL)
    assert (found.score, found.low, found.high, found.n) == (1, 1, 1, COUNT)
    assert found["right"].dims == ("image",)
    assert float(found.chance) == np.bincount(LABEL).max() / COUNT


def test_any_class_in_view_counts_and_a_slow_count_agrees() -> None:
    x = rng.standard_normal((COUNT, WIDTH)).astype(np.float32)
    marks = rng.random((COUNT, CLASSES)) < 0.3
    marks[np.arange(COUNT), LABEL] = True
    found = zero_shot(x, PROJECT, PROMPTS, marks)
    right = []
    for one, row in zip(x, marks, strict=True):
        e = PROJECT.numpy() @ one
        cosines = [float(e @ p) / np.linalg.norm(e) / np.linalg.norm(p) for p in PROMPTS.numpy()]
        right.append(bool(row[int(np.argmax(cosines))]))
    assert found["right"].values.tolist() == right
    assert float(found.score) == pytest.approx(np.mean(right))
    assert float(found.low) < float(found.score) < float(found.high)
    assert float(zero_shot(x, PROJECT, PROMPTS, LABEL).score) <= float(found.score)


def test_neither_the_order_nor_the_length_of_images_matters() -> None:
    x, order = rng.standard_normal((COUNT, WIDTH)).astype(np.float32), rng.permutation(COUNT)
    first = zero_shot(x, PROJECT, PROMPTS, LABEL)
    second = zero_shot(7 * x[order], PROJECT, 3 * PROMPTS, LABEL[order])
    np.testing.assert_array_equal(first["right"].values[order], second["right"].values)


def test_inputs_that_do_not_fit() -> None:
    x = images(LABEL)
    with pytest.raises(InputError, match="the words belong to another model"):
        zero_shot(x[:, :-1], PROJECT, PROMPTS, LABEL)
    with pytest.raises(InputError, match="the words belong to another model"):
        zero_shot(x, PROJECT, PROMPTS[:, :-1], LABEL)
    with pytest.raises(InputError, match="there are 59 labels for 60 images"):
        zero_shot(x, PROJECT, PROMPTS, LABEL[:-1])
    with pytest.raises(InputError, match="do not belong to 7 prompts"):
        zero_shot(x, PROJECT, PROMPTS, LABEL + 1)
    with pytest.raises(InputError, match="marks of 3 classes for 7 prompts"):
        zero_shot(x, PROJECT, PROMPTS, np.ones((COUNT, 3), bool))
    with pytest.raises(InputError, match="1 of 60 images have no class in view"):
        zero_shot(x, PROJECT, PROMPTS, np.arange(COUNT)[:, None] > np.zeros(CLASSES))
