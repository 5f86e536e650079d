"""Figures by their data: what the artists hold is what went in, for one model and several, on maps that are not square."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection, QuadMesh
from matplotlib.figure import Figure
from matplotlib.text import Text
from scipy.integrate import trapezoid

from vitregs import arrays, report
from vitregs.measure.diagnose import Diagnosis
from vitregs.measure.fingerprint import Fingerprint
from vitregs.measure.mixture import Cutoff

ROWS, COLUMNS = 3, 5
RNG = np.random.default_rng(0)


def panels(figure: Figure) -> list[Axes]:
    """The axes of a figure but for its colour bars."""
    assert isinstance(figure, Figure)
    figure.canvas.draw()  # whatever cannot be drawn fails here
    return [axis for axis in figure.axes if axis.get_label() != "<colorbar>" and axis.get_visible()]


def bars(figure: Figure) -> list[Axes]:
    return [axis for axis in figure.axes if axis.get_label() == "<colorbar>"]


def image(axis: Axes) -> np.ndarray:
    (shown,) = axis.get_images()
    return np.asarray(shown.get_array())


def labels(axis: Axes) -> list[str]:
    legend = axis.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def ticks(axis: Axes) -> list[str]:
    return [label.get_text() for label in axis.get_xticklabels()]


def mesh(axis: Axes) -> np.ndarray:
    (found,) = [c for c in axis.collections if isinstance(c, QuadMesh)]
    return np.ma.filled(found.get_array(), np.nan)


def norms(layers: Sequence[int] = (0, 1, 2), registers: int = 2, seed: int = 0) -> xr.DataArray:
    kinds = ["cls", *["register"] * registers, *["patch"] * (ROWS * COLUMNS)]
    values = np.random.default_rng(seed).lognormal(2, 0.3, (6, len(layers), len(kinds)))
    coords = {**arrays.token_coords(kinds, (ROWS, COLUMNS)), "layer": list(layers)}
    return xr.DataArray(values, dims=("image", "layer", "token"), coords=coords, name="norm")


@pytest.mark.parametrize("names", [["attention"], ["one", "two", "three"]])
@pytest.mark.parametrize("n", [1, 3])
def test_image_grid(names: list[str], n: int):
    images = RNG.random((n, 9, 15, 3))
    maps = {name: RNG.random((n, ROWS, COLUMNS)) for name in names}
    figure = report.style.plot_images(images, maps)
    axes = panels(figure)
    assert len(axes) == n * (1 + len(names))
    for i in range(n):
        row = axes[i * (1 + len(names)) :]
        np.testing.assert_array_equal(image(row[0]), images[i])
        for axis, name in zip(row[1:], names, strict=False):
            np.testing.assert_array_equal(image(axis), maps[name][i])
    assert [axis.get_title() for axis in axes[: 1 + len(names)]] == ["image", *names]
    assert not bars(figure)


def test_image_grid_with_common_colours():
    maps = {"a": RNG.random((2, ROWS, COLUMNS)), "b": 9 * RNG.random((2, ROWS, COLUMNS))}
    figure = report.style.plot_images(RNG.random((2, 9, 15, 3)), maps, limits={"a": (0, 1), "b": (0, 9)}, label="norm")
    limits = [axis.get_images()[0].get_clim() for axis in panels(figure)]
    assert limits[1::3] == [(0, 1)] * 2
    assert limits[2::3] == [(0, 9)] * 2
    assert [bar.get_xlabel() for bar in bars(figure)] == ["norm", "norm"]


def test_image_grid_breaks_long_names():
    figure = report.style.plot_images(np.zeros((1, 4, 4, 3)), {"supervised-pico-reg4": np.zeros((1, 2, 2))})
    assert panels(figure)[1].get_title() == "supervised-pico-\nreg4"


@pytest.mark.parametrize("count", [1, 2, 12])
def test_norm_density(count: int):
    values = {f"model {i}": RNG.lognormal(2, 0.3, (4, 30)) for i in range(count)}
    cuts = {name: Cutoff(20.0 + i, "by hand", share=0.1) for i, name in enumerate(values)}
    cuts["model 0"] = Cutoff(None, "two modes in log norm")
    axes = panels(report.norms.plot_density(values, cuts))
    assert len(axes) == count
    for i, (axis, (name, v)) in enumerate(zip(axes, values.items(), strict=True)):
        heights, edges = np.histogram(v, 80, density=True)
        np.testing.assert_allclose([bar.get_height() for bar in axis.patches], heights)
        np.testing.assert_allclose([bar.get_x() for bar in axis.patches], edges[:-1])
        assert axis.get_title().startswith(name)
        assert axis.get_yscale() == "log"
        cut = [line.get_xdata()[0] for line in axis.lines]
        assert cut == ([] if i == 0 else [20.0 + i])
    assert "no outlier mode" in axes[0].get_title()


def test_norm_densities_share_their_range_where_they_can():
    tail, cured, far = (np.linspace(8, end, 60).reshape(2, 30) for end in (35.0, 27.0, 400.0))
    none = Cutoff(None, "two modes in log norm")
    with_tail, without = panels(report.norms.plot_density({"a": tail, "b": cured}, {"a": none, "b": none}))
    assert with_tail.get_xlim() == without.get_xlim() == (0, 1.05 * 35)
    near, other = panels(report.norms.plot_density({"a": tail, "b": far}, {"a": none, "b": none}))
    assert near.get_xlim()[1] < 40 < 400 < other.get_xlim()[1]


@pytest.mark.parametrize("count", [1, 3])
def test_norm_growth(count: int):
    given = {f"model {i}": norms(range(i + 2), seed=i) for i in range(count)}
    figure = report.norms.plot_layers(given)
    axes = panels(figure)
    assert [axis.get_title() for axis in axes] == list(given)
    assert len(bars(figure)) == 1
    for axis, a in zip(axes, given.values(), strict=True):
        shares = mesh(axis)
        assert shares.shape == (69, a.sizes["layer"])
        edges = axis.collections[0].get_coordinates()[:, 0, 1]
        for i, layer in enumerate(a["layer"].values):
            v = arrays.patches(a.sel(layer=layer)).values
            expected = np.histogram(v, edges)[0] / v.size
            np.testing.assert_allclose(np.nan_to_num(shares[:, i]), expected)
            assert expected.sum() > 0.98  # all but the lowest
        assert ticks(axis) == [f"{n}" for n in a["layer"].values]
        assert axis.get_yscale() == "log"


def test_norm_growth_with_silent_patches():
    silent = norms()
    silent.values[:, 0] = 0
    (axis,) = panels(report.norms.plot_layers({"model": silent}))
    assert np.isnan(mesh(axis)[:, 0]).all()
    assert np.nansum(mesh(axis)[:, 1]) == pytest.approx(1)


def history(steps: int = 40, seed: int = 0) -> xr.Dataset:
    rng = np.random.default_rng(seed)
    layers, bins = [0, 1, 2], np.geomspace(0.1, 1000, 50)
    counts = np.zeros((steps, 3, 50))
    counts[:, :, 20:30] = rng.integers(1, 9, (steps, 3, 10))
    return xr.Dataset(
        {
            "hist": (("step", "layer", "bin"), counts),
            "accuracy": ("step", rng.random(steps)),
            "largest": (("step", "layer"), 1 + rng.random((steps, 3))),
        },
        coords={"step": np.arange(steps) * 100, "layer": layers, "bin": bins},
    )


@pytest.mark.parametrize(("count", "layer", "named"), [(1, -1, 2), (2, 1, 1)])
def test_training(count: int, layer: int, named: int):
    logs = {f"model {i}": history(seed=i) for i in range(count)}
    figure = report.training.plot_training(logs, layer)
    axes = panels(figure)
    assert len(axes) == 2 * count
    for top, below, (name, log) in zip(axes[:count], axes[count:], logs.items(), strict=True):
        assert top.get_title() == f"{name}, layer {named}"
        accuracy, largest = below.lines
        np.testing.assert_array_equal(accuracy.get_ydata(), log["accuracy"])
        np.testing.assert_array_equal(accuracy.get_xdata(), log["step"])
        np.testing.assert_allclose(largest.get_ydata(), log["largest"].sel(layer=named) / 10)
        assert not labels(below)  # a legend inside would cover the curves
        shares = np.nan_to_num(mesh(top))
        assert shares.shape == (14, 24)  # ten bins that are used, and two on either side
        np.testing.assert_allclose(shares.sum(0), 1)
        first = log["hist"].values[0, named, 20:30]
        np.testing.assert_allclose(shares[2:12, 0], first / first.sum())
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["accuracy", "largest / median ÷ 10"]
    assert len(bars(figure)) == 1


@pytest.mark.parametrize("groups", [1, 13])
def test_lines(groups: int):
    table = pd.DataFrame(
        [{"block": b, "mean": 10 * g + b, "model": f"m{g}"} for g in range(groups) for b in (1, 2, 3)]
    ).assign(low=lambda t: t["mean"] - 1, high=lambda t: t["mean"] + 2)
    (axis,) = panels(
        report.style.plot_lines(table, "block", "mean", "model", labels=("block", "share"), log=groups == 1)
    )
    assert len(axis.lines) == groups
    for g, line in enumerate(axis.lines):
        np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3])
        np.testing.assert_array_equal(line.get_ydata(), 10 * g + np.arange(1, 4))
    bands = [c for c in axis.collections if isinstance(c, PolyCollection)]
    assert len(bands) == groups
    corners = bands[0].get_paths()[0].vertices
    assert (corners[:, 1].min(), corners[:, 1].max()) == (0, 5)
    assert labels(axis) == [f"m{g}" for g in range(groups)]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("block", "share")
    assert axis.get_yscale() == ("log" if groups == 1 else "linear")


def test_lines_without_a_band():
    table = pd.DataFrame({"x": [1, 2], "y": [3, 4], "g": ["a", "a"]})
    (axis,) = panels(report.style.plot_lines(table, "x", "y", "g", labels=("", "")))
    assert not axis.collections


@pytest.mark.parametrize("registers", [[4], [16], [1, 16, 4, 2]])
def test_register_norms(registers: list[int]):
    given = {
        f"{count} registers": pd.DataFrame(
            [{"block": b, "register": f"reg{r}", "norm": 1.0 + r + b} for r in range(count) for b in range(5)]
        )
        for count in registers
    }
    figure = report.registers.plot_norms(given)
    axes = panels(figure)
    assert [axis.get_title() for axis in axes] == list(given)
    assert len({axis.get_ylim() for axis in axes}) == 1
    for axis, count in zip(axes, registers, strict=True):
        assert len(axis.lines) == count  # also where there are more registers than colours
        for r, line in enumerate(axis.lines):
            np.testing.assert_array_equal(line.get_ydata(), 1.0 + r + np.arange(5))
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [f"reg{r}" for r in range(max(registers))]


@pytest.mark.parametrize("models", [["a"], ["a", "b"]])
def test_similarity(models: list[str]):
    rng = np.random.default_rng(1)
    table = pd.concat(
        pd.DataFrame({"model": m, "group": g, "similarity": (0.2 + 0.4 * i + 0.05 * rng.standard_normal(300))})
        for m in models
        for i, g in enumerate(["ordinary", "outliers"])
    )
    axes = panels(report.tokens.plot_similarity(table))
    assert [axis.get_title() for axis in axes] == models
    for axis in axes:
        assert labels(axis) == ["ordinary", "outliers"]
        for i, line in enumerate(axis.lines):
            x, y = line.get_xdata(), line.get_ydata()
            assert x[y.argmax()] == pytest.approx(0.2 + 0.4 * i, abs=0.03)
            assert trapezoid(y, x) == pytest.approx(1, abs=0.02)
            assert -1 <= x.min() <= x.max() <= 1


def test_similarity_where_no_density_can_be_drawn():
    table = pd.DataFrame({"model": "a", "group": ["one", "flat", "flat"], "similarity": [0.5, 1, 1]})
    (axis,) = panels(report.tokens.plot_similarity(table))
    assert not axis.lines
    assert labels(axis) == []


@pytest.mark.parametrize("count", [1, 3])
def test_occupancy(count: int):
    maps = {f"m{i}": xr.DataArray(RNG.random((ROWS, COLUMNS)), dims=("y", "x")) for i in range(count)}
    figure = report.tokens.plot_positions(maps)
    for axis, (name, values) in zip(panels(figure), maps.items(), strict=True):
        np.testing.assert_allclose(image(axis), 100 * values)
        assert axis.get_title() == name
    assert [bar.get_ylabel() for bar in bars(figure)] == ["% of images"] * count


@pytest.mark.parametrize("count", [1, 3])
def test_gradients(count: int):
    vectors = {f"kind {i}": RNG.standard_normal(4 + i) for i in range(count)}
    figure = report.tokens.plot_gradients(vectors)
    top = max(np.outer(v, v).max() for v in vectors.values())
    for axis, (name, v) in zip(panels(figure), vectors.items(), strict=True):
        np.testing.assert_allclose(image(axis), np.outer(v, v))
        assert axis.get_images()[0].get_clim() == (-top, top)
        assert axis.get_title() == name
    assert len(bars(figure)) == 1


def heights(axis: Axes) -> list[list[float]]:
    return [[bar.get_height() for bar in group.patches] for group in axis.containers if hasattr(group, "patches")]


@pytest.mark.parametrize("models", [["a"], ["a", "b", "c"]])
def test_shares(models: list[str]):
    rows = [
        {"model": m, "group": g, "share": 0.1 * i + 0.02 * j, "low": 0.1 * i, "high": 0.1 * i + 0.05 * j}
        for i, m in enumerate(models, start=1)
        for j, g in enumerate(["object", "background"], start=1)
    ]
    (axis,) = panels(report.tokens.plot_shares(pd.DataFrame(rows), label="% marked"))
    expected = [[100 * (0.1 * i + 0.02 * j) for i in range(1, len(models) + 1)] for j in (1, 2)]
    np.testing.assert_allclose(heights(axis), expected)
    assert ticks(axis) == models
    assert labels(axis) == ["object", "background"]
    segments = axis.collections[0].get_segments()  # error bars of the first group
    np.testing.assert_allclose(segments[0][:, 1], [10, 15])
    assert axis.get_ylabel() == "% marked"


def test_shares_leaves_out_what_was_not_measured():
    table = pd.DataFrame(
        {
            "model": ["a", "b", "a"],
            "group": ["x", "x", "y"],
            "share": [0.1, np.nan, 0.3],
            "low": [0.1, np.nan, 0.2],
            "high": [0.2, np.nan, 0.4],
        }
    )
    (axis,) = panels(report.tokens.plot_shares(table, label=""))
    np.testing.assert_allclose(heights(axis), [[10, np.nan], [30, np.nan]])


@pytest.mark.parametrize("registers", [[0], [2], [0, 4]])
def test_token_strip(registers: list[int]):
    given = {f"{n} registers": norms(registers=n).sel(layer=2) for n in registers}
    axes = panels(report.norms.plot_token_strip(given))
    for axis, (name, values), n in zip(axes, given.items(), registers, strict=True):
        groups = ["cls", *(f"reg{i}" for i in range(n)), "patch"]
        assert axis.get_title() == name
        assert ticks(axis) == groups
        for i, (line, group) in enumerate(zip(axis.lines, groups, strict=True)):
            part = values.values[:, values["label"] == group] if group != "patch" else arrays.patches(values).values
            np.testing.assert_array_equal(line.get_ydata(), part.ravel())
            assert (np.abs(line.get_xdata() - i) <= 0.3).all()
        assert len({line.get_color() for line in axis.lines}) == (3 if n else 2)


def diagnosis(cut: float, searched: xr.Dataset | None = None, attention: bool = True) -> Diagnosis:
    """Of planted arrays: 6 images of 3 by 5 patches, three layers, the second of which decides."""
    a = norms()
    layers = pd.DataFrame({"layer": [0, 1, 2], "cutoff": [np.nan, cut, np.nan], "share": [0, 0.1, 0], "ratio": 3.0})
    layers["sink"] = [np.nan, 1.5, 2.5]
    verdict = Fingerprint("content", 1, 3.0, "why", {}, {2: [1]} if searched is not None else {})
    images = np.random.default_rng(0).random((2, 48, 80, 3))
    found = Diagnosis(
        "model", "random", "scenes", 6, (48, 80), verdict, "rule", layers, [], searched, a, images, shown_at=[1, 4]
    )
    if attention:
        given = np.arange(8.0).reshape(2, 2, 2)
        coords = {"query": ["all", "cls"], "which": ["marked", "others"], "block": [1, 2]}
        found.attention = xr.DataArray(given, coords, ("query", "which", "block"))
    return found


def test_diagnosis_shows_marked_patches_and_their_norms():
    cut = float(np.quantile(arrays.patches(norms().sel(layer=1)), 0.9))
    found = diagnosis(cut)
    figure = report.norms.plot_diagnosis(found)
    images = [axis for axis in figure.axes if axis.images]
    v = arrays.patches(norms()).transpose("layer", "image", "token").values
    for axis, shown, i in zip(images, found.shown, found.shown_at, strict=True):
        np.testing.assert_array_equal(axis.images[0].get_array(), shown)
        corners = {(p.get_x() + 0.5, p.get_y() + 0.5) for p in axis.patches}
        assert corners == {(16 * (t % 5), 16 * (t // 5)) for t in np.flatnonzero(v[1, i] > cut)}
    (growth,) = [axis for axis in figure.axes if axis.get_title() == "norms over layers"]
    assert mesh(growth).shape == (69, 3)
    np.testing.assert_allclose(growth.lines[0].get_ydata(), [np.median(layer[v[1] > cut]) for layer in v])
    (density,) = [axis for axis in figure.axes if axis.get_title() == "norms at layer 1"]
    np.testing.assert_allclose(
        [bar.get_height() for bar in density.patches], np.histogram(v[1].ravel(), 80, density=True)[0]
    )
    assert density.lines[0].get_xdata()[0] == cut
    (received,) = [axis for axis in figure.axes if axis.get_title() == "attention received"]
    lines = {line.get_label(): list(line.get_ydata()) for line in received.lines}
    assert lines["marked, of all queries"] == [0, 1]
    assert lines["others, of CLS"] == [6, 7]


def test_diagnosis_without_marks():
    figure = report.norms.plot_diagnosis(diagnosis(np.nan, attention=False))
    titles = [axis.get_title() for axis in figure.axes]
    assert "no patch of these images is marked" in titles
    assert "norms at layer 1: no cut-off" in titles
    (sink,) = [axis for axis in figure.axes if axis.get_title() == "attention on the most attended patch"]
    assert list(sink.lines[1].get_ydata()) == [1.5, 2.5]
    assert [p for axis in figure.axes if axis.images for p in axis.patches] == []


def test_diagnosis_with_neurons():
    share = np.array([[0.0, 0.1, 0.0], [0.0, 0.5, 0.2]])
    data = {k: (("block", "neuron"), share * (i + 1)) for i, k in enumerate(("share", "on", "off", "on_spread"))}
    searched = xr.Dataset(data, {"block": [1, 2], "neuron": [0, 1, 2]}).assign(off_spread=("neuron", [1.0, 2.0, 3.0]))
    searched["off_spread"] = searched["off_spread"].broadcast_like(searched["on"])
    figure = report.norms.plot_diagnosis(diagnosis(30.0, searched))
    (axis,) = [axis for axis in figure.axes if axis.get_title() == "activation of 1 of 1 register neurons"]
    assert ticks(axis) == ["2:1"]
    assert [bar.lines[0].get_ydata()[0] for bar in axis.containers] == [1.0, 1.5]


def texts(figure: Figure) -> list[Text]:
    return [t for t in figure.findobj(Text) if t.get_text() and t.get_visible()]


def test_words_of_a_diagnosis_can_be_read():
    figure = report.norms.plot_diagnosis(diagnosis(30.0))
    assert min(t.get_fontsize() for t in texts(figure)) >= 8
    assert figure.get_figwidth() <= 9.5


def test_note():
    (axis,) = panels(report.style.note("no registers here"))
    assert [text.get_text() for text in axis.texts] == ["no registers here"]


@pytest.mark.parametrize("count", [1, 6, 12])
def test_heads(count: int):
    shown_image, maps = RNG.random((9, 15, 3)), RNG.random((count, ROWS, COLUMNS))
    masked = np.where(maps > 0.5, maps, 0)
    axes = [axis for axis in panels(report.attention.plot_heads(shown_image, maps, masked)) if axis.get_images()]
    titles = [axis.get_title() for axis in axes]
    names = [f"head {h + 1}" for h in range(count)]
    assert titles == ["image", *names, *(f"{name}, 60 %" for name in names)]
    np.testing.assert_array_equal(image(axes[0]), shown_image)
    for axis, values in zip(axes[1:], [*maps, *masked], strict=True):
        np.testing.assert_array_equal(image(axis), values)


def test_figures_are_closed():
    """A figure that stays open would be shown twice in a notebook."""
    before = plt.get_fignums()
    report.style.note("once")
    report.tokens.plot_positions({"m": xr.DataArray(np.zeros((ROWS, COLUMNS)), dims=("y", "x"))})
    assert plt.get_fignums() == before


def test_style_stays_inside():
    before = dict(plt.rcParams)
    report.style.note("once")
    assert dict(plt.rcParams) == before


def test_norms_without_and_with_a_register() -> None:
    pair = {"net": norms(registers=0), "net+tt1": norms(registers=1)}
    pair = {name: xr.concat([a + i / 100 for i in range(3)], "image") for name, a in pair.items()}
    start = pair["net+tt1"]["layer"] == 0
    pair["net+tt1"] = pair["net+tt1"].where(~(start & (pair["net+tt1"]["kind"] == "register")), 0)
    density, *spread = panels(report.norms.plot_without_and_with(pair))
    assert labels(density) == list(pair)
    for axis, (name, a) in zip(spread, pair.items(), strict=True):
        v = arrays.patches(a).transpose("layer", "image", "token").values
        assert axis.get_title() == name
        np.testing.assert_allclose(np.nansum(mesh(axis), 0), 1, atol=0.03)  # the lowest norms may be left out
        assert mesh(axis).shape[1] == len(v)
    assert not spread[0].lines
    (line,) = spread[1].lines
    register = pair["net+tt1"].isel(token=[1]).mean("image").values.ravel()
    np.testing.assert_allclose(line.get_ydata()[1:], register[1:])
    assert np.isnan(line.get_ydata()[0])  # it enters as zeros, which a log axis cannot show


def test_breadth_of_maps() -> None:
    spot = np.full((4, 3, ROWS, COLUMNS), 1e-9)
    spot[:, :2] = 1  # CLS and the register look everywhere, the patch at one place
    spot[:, 2, 1, 2] = 1
    coords = {"query": ["cls", "reg0", "1,2"], "query_kind": ("query", ["cls", "register", "patch"])}
    maps = xr.DataArray(spot, dims=("image", "query", "y", "x"), coords=coords)
    pixels = RNG.random((2, 6, 10, 3))
    figure = report.registers.plot_breadth(
        {"net": maps.isel(query=[0, 2]), "net+tt1": maps}, pixels, {"net": maps.isel(query=[0, 2]), "net+tt1": maps}
    )
    axes = np.array(panels(figure)).reshape(3, 6)
    assert [a.get_title() for a in axes[0, 1:]] == [
        "untouched\nCLS: 15",
        "untouched\npatch 1,2: 1",
        "+tt1\nCLS: 15",
        "+tt1\nreg0: 15",
        "+tt1\npatch 1,2: 1",
    ]
    np.testing.assert_array_equal(image(axes[1, 0]), pixels[0])
    np.testing.assert_array_equal(image(axes[2, 5]), spot[1, 2])
    assert "+tt1 15.00 [15.00, 15.00]" in figure.get_suptitle()
