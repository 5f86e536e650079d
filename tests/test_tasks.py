"""Questions on images: the right answers from the truth of a scene, worked out once more; real sets on local copies."""

from pathlib import Path

import numpy as np
import pytest

from vitregs.data import datasets, images, scenes
from vitregs.errors import InputError

COUNT = 60


@pytest.fixture(scope="module")
def truth() -> scenes.Scenes:
    return scenes.render(COUNT, (48, 64), seed=0, first=images.FIRST_SCENE)


@pytest.fixture(scope="module")
def answers() -> dict[str, np.ndarray]:
    return datasets.labels([images.open_images("scenes", size=(48, 64), count=COUNT)])


def test_there_are_as_many_tasks_as_data_sets_in_the_table() -> None:
    assert len(datasets.SCENES) == 14
    named = [n for n in datasets.SETS if n not in ("Imagenette", "Tiny-ImageNet")]
    assert len(named) == 14


def test_answers_agree_with_the_truth_one_scene_at_a_time(truth: scenes.Scenes, answers: dict[str, np.ndarray]) -> None:
    for i in range(COUNT):
        box = truth.boxes[i].numpy()
        seen = [k for k in range(6) if np.isfinite(box[k, 0])]
        area = {k: int((truth.instances[i] == k + 1).sum()) for k in seen}
        if not seen:
            continue
        big, near = max(seen, key=lambda k: (area[k], -k)), seen[0]
        shape, colour, texture = truth.objects[i].numpy().T
        assert answers["colour"][i] == colour[big]
        assert answers["shape"][i] == shape[big]
        assert answers["texture"][i] == texture[big]
        assert answers["colour and shape"][i] == shape[big] * 8 + colour[big]
        assert answers["nearest colour"][i] == colour[near]
        assert answers["nearest shape"][i] == shape[near]
        assert answers["count"][i] == len(seen) - 1
        middle = {k: ((box[k, 0] + box[k, 2]) / 96, (box[k, 1] + box[k, 3]) / 128) for k in seen}
        assert answers["quadrant"][i] == 2 * (middle[big][0] >= 0.5) + (middle[big][1] >= 0.5)
        if len(seen) > 1:
            assert answers["left or right"][i] == (middle[seen[0]][1] < middle[seen[1]][1])
            assert answers["above or below"][i] == (middle[seen[0]][0] < middle[seen[1]][0])
        else:
            assert answers["left or right"][i] == answers["above or below"][i] == -1
        assert answers["a colour twice"][i] == (len({colour[k] for k in seen}) < len(seen))
        assert set(np.flatnonzero(answers["colours in view"][i])) == {colour[k] for k in seen}
        assert set(np.flatnonzero(answers["shapes in view"][i])) == {shape[k] for k in seen}
    np.testing.assert_array_equal(answers["background"], truth.background)
    assert datasets.metric("colours in view") == "mAP"
    assert datasets.metric("colour") == "top1"
    assert datasets.metric("Pets") == "mean per class"


def test_every_task_has_more_than_one_answer(answers: dict[str, np.ndarray]) -> None:
    assert [n for n, y in answers.items() if len(np.unique(y[y >= 0] if y.ndim == 1 else y)) < 2] == []


def test_labels_are_numbered_by_name_or_index() -> None:
    assert datasets.number(["b", "a", "b"], "x").tolist() == [1, 0, 1]
    assert datasets.number([5, 2, 2], "x").tolist() == [1, 0, 0]
    assert datasets.number([[0, 2], [2], [0]], "x").tolist() == [[True, True], [False, True], [True, False]]
    assert datasets.number([[0, 1, 1], [1, 0, 0]], "x").tolist() == [[False, True, True], [True, False, False]]
    with pytest.raises(InputError, match="1 of 2 images of x have no label to ask for"):
        datasets.number([None, 1], "x")


def test_images_without_labels_have_no_task(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"1 of 1 images of .* have no label to ask for"):
        datasets.labels([images.open_images(str(tmp_path), size=32)])


def test_names_are_checked() -> None:
    with pytest.raises(InputError, match="unknown task on scenes 'color': did you mean 'colour'"):
        datasets.labels([images.open_images("scenes", size=32, count=2)], ["color"])
    with pytest.raises(InputError, match="unknown data set 'CIFAR10': did you mean 'CIFAR-10'"):
        datasets.open_set("CIFAR10", size=(32, 32))
    with pytest.raises(InputError, match="no copy of Places205 on the hub is known: give a folder"):
        datasets.open_set("Places205", size=(32, 32))
    with pytest.raises(InputError, match="no folder nowhere/at/all with DTD"):
        datasets.open_set("DTD", size=(32, 32), folder="nowhere/at/all")


@pytest.mark.parametrize(
    ("name", "folder", "classes"),
    [("CIFAR-10", "cifar10", 10), ("Imagenette", "imagenette-224", 10), ("Tiny-ImageNet", "tiny-imagenet", 200)],
)
def test_local_copies_open(name: str, folder: str, classes: int, shared_data: Path) -> None:
    train, test = datasets.open_set(
        name, size=(32, 48), train_count=50, test_count=30, folder=str(shared_data / folder)
    )
    found = datasets.labels([train, test], [name])[name]
    assert found.shape == (80,)
    assert len(np.unique(found)) <= classes
    assert next(test.pixels(4)).shape == (4, 3, 32, 48)
    assert train.source is not None
    assert train.source.fingerprint != test.source.fingerprint  # type: ignore[union-attr]
