"""Lessons: what is shown is what the learners get, short runs are short, and the live figure is one figure."""

from pathlib import Path

import numpy as np
import pytest

from vitregs import cache
from vitregs.book import demos
from vitregs.errors import InputError
from vitregs.train.recipes import recipe

SMALL = ["size=femto", "image_size=32", "batch=8", "precision=fp32"]


pytestmark = pytest.mark.usefixtures("little_to_watch")


def test_short_runs_warm_up_in_time() -> None:
    made = demos.short("mae-pico", 24, ["batch=8"])
    assert (made.steps, made.warmup, made.batch) == (24, 6, 8)
    assert demos.short("mae-pico", 5000).warmup == demos.SHORT_WARMUP
    assert demos.short("mae-pico", 1).warmup == 1


def test_a_taste() -> None:
    found = demos.taste(["supervised-pico", "mae-pico"], steps=3, words=SMALL, device="cpu")
    table = demos.progress(found)
    assert table["recipe"].tolist() == ["supervised-pico", "mae-pico"]
    assert table["steps"].tolist() == [3, 3]
    assert np.isfinite(table[["loss at first", "loss at last"]].to_numpy(float)).all()


@pytest.mark.parametrize("name", ["supervised-pico", "clip-pico", "mae-pico", "dino-pico", "dinov2-pico"])
def test_the_first_loss_is_near_that_of_chance(name: str) -> None:
    import torch

    from vitregs.train import data, learners

    chosen = demos.short(name, 4, ["size=femto", "batch=16", "precision=fp32"])
    feed = data.make(chosen, torch.device("cpu"))
    learner = learners.learner(chosen, feed)
    torch.manual_seed(0)
    assert float(learner(feed.take(0, captions=learner.captions)).detach()) == pytest.approx(
        demos.chance(chosen), rel=0.45
    )


def test_what_mae_sees() -> None:
    rows = demos.masked("mae-pico", count=3)
    image, seen, wanted = rows.values()
    assert {r.shape for r in rows.values()} == {(3, 64, 64, 3)}
    patches = [
        r.reshape(3, 8, 8, 8, 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(3, 64, -1) for r in (image, seen, wanted)
    ]
    hidden = (patches[1] == 0.5).all(-1)
    assert hidden.sum(1).tolist() == [48] * 3
    np.testing.assert_array_equal(patches[0][~hidden], patches[1][~hidden])
    assert (patches[2][~hidden] == 1).all()
    assert np.abs(patches[2][hidden].mean() - 0.5) < 0.05


def test_what_dino_sees() -> None:
    plain, masked = demos.crops("dino-pico", count=2), demos.crops("dinov2-pico", count=4)
    assert list(plain) == ["image", "large crop 1", "large crop 2", "small crop 1", "small crop 2"]
    assert plain["small crop 1"].shape == (2, 32, 32, 3)
    assert list(masked)[-1] == "masked for iBOT"
    grey = (masked["masked for iBOT"] == 0.5).all(-1)
    np.testing.assert_array_equal(masked["masked for iBOT"][~grey], masked["large crop 1"][~grey])


def test_captions(tmp_path: Path) -> None:
    found = demos.captions("clip-pico", count=3)["caption"]
    assert len(found) == 3
    assert all("background" in c for c in found)
    from PIL import Image

    for i in range(100):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(tmp_path / f"{i}.png")
    with pytest.raises(InputError, match="clip needs captions"):
        demos.captions("clip-pico", images=str(tmp_path))


def test_a_run_that_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []

    class Handle:
        def update(self, figure: object) -> None:
            shown.append(("again", figure))

    def display(figure: object, **_more: object) -> Handle:
        shown.append(("first", figure))
        return Handle()

    monkeypatch.setattr("IPython.display.display", display)
    chosen = recipe("hunt-femto").override(name="own", image_size=32, steps=6, warmup=2)
    log = demos.follow(chosen, every=2, device="cpu", out=str(tmp_path / "run"))
    assert [how for how, _ in shown] == ["first", *["again"] * 3]
    assert log["step"].values.tolist() == [0, 2, 4, 6]
    assert cache.load_dataset(tmp_path / "run" / "history.nc").equals(log)
    assert demos.follow(chosen, every=3, device="cpu")["step"].values.tolist() == [0, 3, 6]
