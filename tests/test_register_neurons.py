"""Register neurons as a user meets them: the command, its list, and figures, on planted networks and on one of the zoo."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from PIL import Image

import vitregs as vr
from tests import planted
from vitregs import arrays, report
from vitregs.cli import main
from vitregs.measure import neurons, outliers
from vitregs.measure.diagnose import diagnose
from vitregs.models import capture, test_time

LAYER = planted.BLOCK


@pytest.fixture(scope="module")
def found() -> xr.Dataset:
    vit = planted.network("artifacts", 3.0)
    return neurons.search(vit, planted.images(32), layer=LAYER)


def test_the_planted_neuron_heads_the_table(found: xr.Dataset) -> None:
    table = report.neurons.table(found)
    first = table.iloc[0]
    assert first["neuron"] == f"{planted.BLOCK}:{planted.NEURON}"
    assert first["share, %"] > 50
    assert first["on marked"] > first["on others"]
    assert list(table["share, %"]) == sorted(table["share, %"], reverse=True)
    assert len(report.neurons.table(found, count=1)) == 1
    said = report.neurons.summary(found)
    assert said.startswith(f"{len(table)} register neuron")
    assert f"1 of {found.share.size} neurons [1, 1] write half of the shift" in said


def test_without_register_neurons_the_table_is_empty(found: xr.Dataset) -> None:
    nothing = found.assign(share=found.share * 0, half=np.nan)
    assert report.neurons.table(nothing).empty
    assert report.neurons.summary(nothing).startswith("0 register neurons; all MLP neurons write 0 % of the shift")


def test_spreads_are_those_of_the_activations(found: xr.Dataset) -> None:
    vit = planted.network("artifacts", 3.0)
    unit = {planted.BLOCK: [planted.NEURON]}
    seen = capture.capture(vit, planted.images(32), norms=[LAYER], neurons=unit, kinds="patch")
    marked = seen["norms"].isel(layer=0).values > found.attrs["cutoff"]
    fired = seen["neurons"].values[..., 0]
    at = found.sel(block=planted.BLOCK, neuron=planted.NEURON)
    assert float(at.on) == pytest.approx(fired[marked].mean(), rel=1e-3)
    # spreads are of a sample, four patches an image of either kind
    assert float(at.on_spread) == pytest.approx(fired[marked].std(), rel=0.3)
    assert float(at.off_spread) == pytest.approx(fired[~marked].std(), rel=0.3, abs=0.05)


def test_map_of_blocks_circles_register_neurons(found: xr.Dataset) -> None:
    figure = vr.plot.neurons(found)
    axis, bars = figure.axes[:2]
    chosen = neurons.register_neurons(found)
    circled = {int(line.get_ydata()[0]): len(line.get_xdata()) for line in axis.lines if len(line.get_xdata())}
    assert circled == {b: len(n) for b, n in chosen.items()}
    shares = 100 * found.share.sum("neuron").values
    heights = [bar.get_width() for bar in bars.containers[0]]
    np.testing.assert_allclose(heights, shares, rtol=1e-5, atol=1e-5)
    with pytest.raises(vr.InputError, match=r"what measure\.neurons\.search gives"):
        vr.plot.neurons(found[["auc"]])


def test_cumulative_share(found: xr.Dataset) -> None:
    axis = report.neurons.plot_cumulative({"planted": found}).axes[0]
    line = axis.lines[0].get_ydata()
    assert line[0] == pytest.approx(100 * float(found.share.max()))
    assert line[-1] == pytest.approx(100 * float(found.share.sum()), rel=1e-5)
    assert axis.lines[1].get_xdata()[0] == float(found.half)


def test_networks_beside_each_other(found: xr.Dataset) -> None:
    nothing = found.assign(share=found.share * 0, half=np.nan)
    table = report.neurons.overview({"planted": found, "other": nothing})
    assert table.loc["planted", "write half"] == "1 [1, 1]"
    assert table.loc["planted", "of"] == found.share.size
    assert float(table.loc["planted", "their AUC"]) > 0.9
    assert list(table.loc["other", ["write half", "register neurons", "in blocks"]]) == ["none", 0, "none"]


def test_answers_of_the_fingerprint() -> None:
    given = diagnose(planted.network("content", 4.0), planted.images(32), quick=True).fingerprint.dataset()
    row = report.neurons.answers({"planted": given}).loc["planted"]
    assert list(row.index) == ["mode", "place", "attention", "neurons", "cause", "verdict"]
    assert list(row[["mode", "place", "neurons", "verdict"]]) == ["for", "against", "not measured", "content"]


def test_what_a_chapter_measures_is_what_a_search_gives() -> None:
    vit, pixels = planted.network("artifacts", 3.0), planted.images(32)
    found = neurons.of_network(vit, pixels)
    xr.testing.assert_identical(found.drop_attrs(), neurons.search(vit, pixels).drop_attrs())
    assert found.attrs["rule"].startswith("cut-off")
    seen = neurons.maps(vit, pixels, top=2, shown=3)
    assert str(seen["neuron"].values[0]) == f"{planted.BLOCK}:{planted.NEURON}"
    assert dict(seen["activation"].sizes) == {"image": 3, "token": 144, "neuron": 2}
    assert ((seen["norm"] > found.attrs["cutoff"]).sum("token") > 0).all()
    brightness = seen["pixels"].values / 255 - pixels.permute(0, 2, 3, 1).numpy()[seen["image"].values]
    assert abs(brightness).max() < 0.01
    bare = neurons.maps(vit, pixels, top=2, shown=3, pixels=False)
    xr.testing.assert_identical(bare, seen.drop_vars("pixels"))
    left = neurons.dose(vit, pixels, counts=[0, 1])["share"].mean("image")
    before, without = left.sel(which="ranked").values
    assert without < 0.1 * before
    assert left.sel(which="random").values[1] > 0.9 * before


def test_the_cut_off_is_found_on_as_many_images_as_asked() -> None:
    vit, pixels = planted.network("artifacts", 3.0), planted.images(48)
    norms = capture.norms(vit, pixels, layers=[-1]).isel(layer=0)
    for count in (32, 48):
        cutoff = outliers.find_cutoff(norms.isel(image=slice(count))).value
        assert neurons.of_network(vit, pixels, calibration=count).attrs["cutoff"] == pytest.approx(cutoff, rel=1e-4)
        left = neurons.dose(vit, pixels, counts=[0, 1], calibration=count)["share"].sel(which="ranked").values[0]
        above = (arrays.patches(norms) > cutoff).mean("token")
        np.testing.assert_allclose(left, above, atol=1e-3)


def test_a_network_without_a_mode_has_stand_ins() -> None:
    vit, pixels = planted.network("nothing", 1.0), planted.images(32)
    found = neurons.of_network(vit, pixels, missing=0.05)
    assert found.attrs["rule"] == "no second mode: the largest 5 % of norms stand in"
    assert found.attrs["marked"] == pytest.approx(0.05 * 32 * 144, rel=0.1)


def test_suppression_figure() -> None:
    share = np.zeros((2, 3, 4), np.float32)
    share[0], share[1] = [[0.2] * 4, [0.1] * 4, [0.0] * 4], 0.2
    data = {k: (("which", "count", "image"), v) for k, v in (("share", share), ("largest", 1 + share))}
    left = xr.Dataset(data, {"which": ["ranked", "random"], "count": [0, 1, 8]})
    ranked, random = report.neurons.plot_suppression({"planted": left}).axes[0].lines
    np.testing.assert_allclose(ranked.get_ydata(), [20, 10, 0], atol=1e-5)
    np.testing.assert_allclose(random.get_ydata(), [20, 20, 20], atol=1e-5)
    ranked, _ = report.neurons.plot_suppression({"planted": left}, "largest").axes[0].lines
    np.testing.assert_allclose(ranked.get_ydata(), [1.2, 1.1, 1.0], rtol=1e-5)


def test_maps_stand_beside_their_images() -> None:
    vit, pixels = planted.network("artifacts", 3.0), planted.images(2)
    unit = {planted.BLOCK: [planted.NEURON, planted.NEURON + 1]}
    seen = capture.capture(vit, pixels, norms=[LAYER], neurons=unit, kinds="patch")
    images = pixels.permute(0, 2, 3, 1).numpy()
    figure = report.neurons.plot_maps(images, seen["norms"].isel(layer=0), seen["neurons"])
    shown = [axis for axis in figure.axes if axis.images]
    assert len(shown) == 2 * 4
    fired = seen["neurons"].sel(neuron=f"{planted.BLOCK}:{planted.NEURON}")
    np.testing.assert_allclose(shown[2].images[0].get_array(), fired.values[0].reshape(12, 12))
    assert shown[2].get_title() == f"neuron\n{planted.BLOCK}:{planted.NEURON}"
    assert shown[2].images[0].get_clim() == shown[6].images[0].get_clim()


def test_a_diagnosis_shows_images_that_have_marks() -> None:
    """The first images are bare; those with marks come later, and are the ones shown."""
    vit = planted.network("content", 4.0)
    pixels = planted.images(32)
    pixels[:6] = 0.3
    found = diagnose(vit, pixels, quick=True, queries=None)
    marks = found.marked.values.sum(1)
    assert marks[:6].sum() == 0
    assert len(found.shown_at) == 2
    assert min(marks[found.shown_at]) == np.sort(marks[:16])[-2] > 0
    np.testing.assert_allclose(found.shown, pixels[found.shown_at].permute(0, 2, 3, 1).numpy())
    seen = capture.capture(vit, pixels, received=True, queries=None, attention=["cls"], kinds="patch")
    each = seen["received"].isel(received_layer=-1).values
    cls = seen["attention"].isel(attention_layer=-1, query=0).mean("head").values * (planted.SIDE // planted.PATCH) ** 2
    for query, values, rtol in (("all", each, 1e-3), ("cls", cls, 0.02)):  # of CLS, a fair share is of all tokens
        received = found.attention.sel(query=query, block=planted.DEPTH)
        for which, there in (("marked", found.marked.values), ("others", ~found.marked.values)):
            assert float(received.sel(which=which)) == pytest.approx(values[there].mean(), rel=rtol)


# --- the command


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_neurons_prints_a_table_and_writes_a_list(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["neurons", "hunt-pico", "--count", "8", "--cutoff", "120", "--device", "cpu"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert list(folder.iterdir()) == []
    assert main([*words, "--out", "deep/list.json"]) == 0
    assert capsys.readouterr().out == printed
    assert printed.split()[:2] == ["neuron", "share,"]
    assert "hunt-pico (zoo, supervised) on scenes: " in printed
    assert "above 120 at layer 8" in printed
    listed = test_time.read_list(folder / "deep" / "list.json")
    number = sum(map(len, listed.neurons.values()))
    assert f"{number} register neurons in blocks" in printed
    assert f"and {number - 40} more with smaller shares" in printed
    first = printed.splitlines()[1].split()[0].split(":")
    assert int(first[1]) in listed.neurons[int(first[0])]
    assert json.loads((folder / "deep" / "list.json").read_text())["found"]["layer"] == 8
    cured = vr.load("hunt-pico+tt1:deep/list.json", device="cpu")
    assert cured.registers == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "the following arguments are required: model (see vitregs neurons --help)"),
        ("hunt-pico --out list.txt", "--out writes .json, not '.txt'"),
        ("hunt-pico --out file/list.json", "cannot write file/list.json: file is no folder"),
        ("hunt-pico --layr 3", "unknown argument '--layr': did you mean '--layer'?"),
        ("hunt-pico --size 1 2 3", "--size takes a side, or height and width, not 3 numbers"),
        ("hunt-pico --layer 9 --count 2", "neurons write at layers 1 to 8 of hunt-pico, not at layer 9"),
        ("hunt-pico --cutoff 1e6 --count 2", "no patch of hunt-pico has a norm above 1e+06 at layer 8"),
        ("supervised-pico --count 16", "mark at another layer (layer=…, --layer)"),
    ],
)
def test_mistakes_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    (folder / "file").write_text("in the way")
    assert main(["neurons", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert [p.name for p in folder.iterdir()] == ["file"]


def test_a_folder_of_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = (255 * planted.images(4)).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    (folder / "images").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / "images" / f"{i}.png")
    assert main(["neurons", "hunt-pico", "--images", "images", "--cutoff", "45", "--device", "cpu"]) == 0
    assert "of 4 images above 45" in capsys.readouterr().out
