"""What a step sees: images held as bytes, shuffled by epoch, never those that are held out; captions; wrong sources."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitregs import cache
from vitregs.data import images
from vitregs.errors import InputError
from vitregs.train import data, loop
from vitregs.train.config import Recipe
from vitregs.train.recipes import recipe

CPU = torch.device("cpu")
CHOSEN = recipe("tinyimagenet-pico").override(image_size=16, patch_size=8, batch=8, size="femto")


def problem(call, *args: object, **more: object) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of 60 images, each of one colour of its own."""
    for c, name in enumerate(("cat_fish", "dog", "owl")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(60):
            colour = (60 * c + 10, 4 * i, 100)
            Image.new("RGB", (20, 20), colour).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


def test_images_of_a_folder(folder: Path) -> None:
    feed = data.ImageFeed(CHOSEN, CPU, str(folder))
    assert feed.classes == ["cat_fish", "dog", "owl"]
    assert feed.trained == 180 - 64
    batch = feed.take(0, captions=True)
    assert batch.pixels.shape == (8, 3, 16, 16)
    red = (batch.pixels[:, 0].mean((1, 2)) * 255).round().int()
    assert torch.equal(batch.label, (red - 10) // 60)
    assert batch.labels.int().argmax(1).tolist() == batch.label.tolist()
    assert batch.labels.sum(1).tolist() == [1] * 8
    assert batch.captions == [f"a photo of a {['cat fish', 'dog', 'owl'][i]}" for i in batch.label.tolist()]
    assert feed.prompts()[0] == "a photo of a cat fish"
    assert feed.take(0).captions is None


def test_images_that_were_read_serve_other_recipes(folder: Path) -> None:
    first = data.make(CHOSEN, CPU, str(folder))
    changed = CHOSEN.override(batch=4, seed=1)
    again, anew = data.make(changed, CPU, read=first), data.make(changed, CPU, str(folder))
    assert again.pixels is first.pixels
    assert torch.equal(again.take(3).pixels, anew.take(3).pixels)
    assert (first.recipe, again.fingerprint) == (CHOSEN, anew.fingerprint)
    assert "were read at 16 pixels, not 32" in problem(data.make, CHOSEN.override(image_size=32), CPU, read=first)
    assert "too few for a batch of 5000" in problem(data.make, CHOSEN.override(batch=5000), CPU, read=first)


def seen(pixels: torch.Tensor) -> list[tuple[int, int]]:
    return [tuple(p) for p in (pixels.mean((2, 3))[:, :2] * 255).round().int().tolist()]


def test_an_epoch_sees_each_image_once_and_none_held_out(folder: Path) -> None:
    feed = data.ImageFeed(CHOSEN, CPU, str(folder))
    steps = feed.trained // 8
    first, second = ([v for s in range(e * steps, (e + 1) * steps) for v in seen(feed.take(s).pixels)] for e in (0, 1))
    assert len(set(first)) == len(first) == steps * 8
    assert first != second
    held = seen(feed.held(1000).pixels)
    assert len(held) == 64
    assert not set(held) & (set(first) | set(second))
    again = data.ImageFeed(CHOSEN, CPU, str(folder))
    assert torch.equal(again.take(17).pixels, feed.take(17).pixels)
    other = data.ImageFeed(CHOSEN.override(seed=1), CPU, str(folder))
    assert not torch.equal(other.take(0).pixels, feed.take(0).pixels)
    assert torch.equal(other.held(9).pixels, feed.held(9).pixels)  # what is held out does not depend on the seed


def test_wrong_sources(folder: Path, tmp_path: Path) -> None:
    make = data.make
    assert "has 20 images: too few for a batch of 8 and 64 held out" in problem(make, CHOSEN, CPU, str(folder), 20)
    assert "no folder or file" in problem(make, CHOSEN, CPU, "./nowhere")
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(100):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(flat / f"{i}.png")
    assert "supervised training needs labels" in problem(make, CHOSEN, CPU, str(flat))
    (tmp_path / "one").mkdir()
    flat.rename(tmp_path / "one" / "flat")  # a single subfolder gives all images the same label
    assert "all images of" in problem(make, CHOSEN, CPU, str(tmp_path / "one"))
    flat = tmp_path / "one" / "flat"
    clip = recipe("clip-pico").override(image_size=16, batch=8, data="somebody/pictures")
    assert "clip needs captions" in problem(make, clip, CPU, str(flat))
    assert make(clip, CPU, str(folder)).held(1).captions
    mae = recipe("mae-pico").override(image_size=16, batch=8)
    assert make(mae, CPU, str(flat)).take(0).label.tolist() == [-1] * 8  # labels are of no use to it


@pytest.mark.parametrize("name", ["cifar10", "tiny-imagenet", "imagenette-224"])
def test_real_images(name: str, shared_data: Path) -> None:
    feed = data.make(CHOSEN.override(image_size=32), CPU, str(shared_data / name), 400)
    assert len(feed.classes) == {"cifar10": 10, "tiny-imagenet": 200, "imagenette-224": 10}[name]
    batch = feed.take(0, captions=True)
    assert 0 < float(batch.pixels.std()) < 0.5
    assert batch.captions[0] == f"a photo of a {feed.classes[batch.label[0]].replace('_', ' ')}"


def test_training_on_real_images(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for what, value in {"WATCHED": 16, "SCORED": 16, "QUERIES": 16, "BANK": 16}.items():
        monkeypatch.setattr(loop, what, value)
    chosen = recipe("tinyimagenet-pico").override(size="femto", image_size=32, batch=8, steps=6, warmup=2, name="real")
    (tmp_path / "my images").symlink_to(shared_data / "tiny-imagenet")
    source = str(tmp_path / "my images")
    out = loop.train(chosen, out=tmp_path / "run", device="cpu", images=source, count=200, report=lambda _l: None)
    card = json.loads((out / "recipe.json").read_text())
    assert card["images"] == {
        "trained": 136,
        "fingerprint": images.open_images(source, size=32, count=200, split="train").fingerprint,
    }
    assert card["recipe"]["data"] == "my images"  # what was seen, not what the recipe would have fetched
    assert "| data | my images |" in (out / "README.md").read_text()
    assert card["linear"].keys() == {"label"}
    assert cache.load_dataset(out / "history.nc")["accuracy"].notnull().all()
    other = {"images": str(shared_data / "cifar10"), "count": 200, "device": "cpu"}
    assert "belongs to another recipe (other images)" in problem(loop.train, chosen, out=tmp_path / "run", **other)


def test_class_names_come_from_the_data_set(shared_data: Path) -> None:
    found = images.open_images(str(shared_data / "imagenette-224"), size=32, count=1)
    assert found.source.classes[0] == "tench"
    assert np.ndim(next(found.batches()).labels[0]) == 0


def test_labels_of_every_kind() -> None:
    assert data._classes([3, 1, 12, None, 1], []) == (["1", "3", "12"], [1, 0, 2, -1, 0])  # numbers in their order
    assert data._classes(["b", None, "a"], []) == (["a", "b"], [1, -1, 0])
    assert data._classes([1, 0, -1, 7], ["x", "y"]) == (["x", "y"], [1, 0, -1, -1])
    assert data._classes([None], []) == ([], [-1])


def test_a_image_without_a_label_is_not_trained_on_in_silence(folder: Path) -> None:
    for i in range(30):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(folder / f"{i}.png")
    assert "30 of 210 images" in problem(data.make, CHOSEN, CPU, str(folder))


def test_sources_in_order_are_shuffled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream may come class by class; what is held out must not be the last class."""
    real = data._read

    def sorted_read(found: images.Images) -> tuple[torch.Tensor, list[object]]:
        pixels, named = real(found)
        order = sorted(range(len(named)), key=lambda i: str(named[i]))
        return pixels[order], [named[i] for i in order]

    monkeypatch.setattr(data, "_read", sorted_read)
    assert len(set(data.ImageFeed(CHOSEN, CPU, str(folder)).held(64).label.tolist())) == 3


def test_a_recipe_of_scenes_needs_no_source() -> None:
    assert isinstance(data.make(Recipe("x", "", batch=2), CPU), data.SceneFeed)
