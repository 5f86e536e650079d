"""Figures of training by their data: what the artists hold is what went in."""

import numpy as np
import pytest
import xarray as xr
from matplotlib.collections import QuadMesh

from tests.test_draw import labels, mesh, norms, panels, ticks
from vitregs import arrays, report


def history(scores: tuple[str, ...], steps: int = 5) -> xr.Dataset:
    rng = np.random.default_rng(0)
    return xr.Dataset(
        {"loss": ("step", rng.random(steps)), **{s: ("step", rng.random(steps)) for s in scores}},
        coords={"step": np.arange(steps) * 10},
    )


@pytest.mark.parametrize("count", [1, 3])
def test_sizes(count: int) -> None:
    given = {f"m{i}\n0.1 M": norms(seed=i).isel(layer=-1) for i in range(count)}
    (axis,) = panels(report.norms.plot_sizes(given))
    shares = np.nan_to_num(mesh(axis))
    assert shares.shape == (69, count)
    np.testing.assert_allclose(shares.sum(0), 1, atol=0.02)  # all but the lowest norms
    assert ticks(axis) == list(given)
    edges = report.style.norm_edges(*(arrays.patches(a).values.ravel() for a in given.values()))
    first = arrays.patches(given["m0\n0.1 M"]).values.ravel()
    np.testing.assert_allclose(shares[:, 0], np.histogram(first, edges)[0] / len(first))


def test_losses_and_scores() -> None:
    dark = history(("accuracy", "knn")).assign(accuracy=("step", np.full(5, np.nan)))
    logs = {
        "a": {"no registers": history(("accuracy", "knn")), "4 registers": history(("accuracy",))},
        "b": {"x": dark},
    }
    axes = panels(report.training.plot_losses(logs))
    assert [axis.get_title() for axis in axes[:2]] == ["a", "b"]
    assert [len(axis.lines) for axis in axes] == [2, 1, 3, 1]
    assert labels(axes[0]) == ["no registers", "4 registers"]
    np.testing.assert_array_equal(axes[0].lines[0].get_ydata(), logs["a"]["no registers"]["loss"])
    np.testing.assert_array_equal(axes[2].lines[1].get_ydata(), logs["a"]["no registers"]["knn"])
    assert axes[2].lines[0].get_color() == axes[2].lines[1].get_color()
    assert "no training history" in panels(report.training.plot_losses({}))[0].texts[0].get_text()


def test_training_with_further_scores() -> None:
    log = xr.Dataset(
        {
            "hist": (("step", "layer", "bin"), np.ones((4, 2, 20))),
            "accuracy": ("step", np.full(4, np.nan)),
            "knn": ("step", np.arange(4.0)),
            "largest": (("step", "layer"), np.ones((4, 2))),
        },
        coords={"step": [0, 1, 2, 3], "layer": [0, 1], "bin": np.geomspace(1, 10, 20)},
    )
    log = log.assign_coords(step=[0, 10, 40, 100])
    figure = report.training.plot_training({"m": log}, -1)
    above, below = panels(figure)
    assert above.get_xlim() == below.get_xlim()  # one true axis of steps
    (drawn,) = [c for c in above.collections if isinstance(c, QuadMesh)]
    np.testing.assert_array_equal(drawn.get_coordinates()[0, :, 0], [0, 5, 25, 70, 100])
    assert (
        mesh(panels(report.training.plot_training({"m": log.isel(step=[0])}, -1))[0]).shape[1] == 1
    )  # as a run begins
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["k-NN", "largest / median ÷ 10"]


def test_gallery() -> None:
    rng = np.random.default_rng(0)
    rows = {"one": rng.random((3, 4, 6, 3)), "two, lines": rng.random((2, 4, 6, 3)) * 2 - 0.5}
    axes = panels(report.training.plot_gallery(rows))
    assert len(axes) == 6
    np.testing.assert_array_equal(axes[1].get_images()[0].get_array(), rows["one"][1])
    assert axes[3].get_images()[0].get_array().max() <= 1
    assert not axes[5].get_images()
    assert axes[3].get_ylabel() == "two\nlines"


def test_sequences() -> None:
    kinds = {"with": ["cls", "register", "register", *["patch"] * 64], "without": ["patch"] * 9}
    one, two = panels(report.training.plot_sequences(kinds))
    assert len(one.patches) == 15 + 13  # registers go in and are not kept
    assert [t.get_text() for t in one.texts if "…" in t.get_text()] == ["… in: 67 tokens", "… kept: 65"]
    assert [t.get_text() for t in two.texts if "…" in t.get_text()] == ["… in: 9 tokens", "… kept: 9"]
