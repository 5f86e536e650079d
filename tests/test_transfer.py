"""All of Table 2 from one pass: planted scenes, images that tell little, paired differences, tables and figures."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from PIL import Image

from vitregs import arrays, report
from vitregs.data import ground_truth, images, published, scenes
from vitregs.errors import InputError
from vitregs.models import capture, registry
from vitregs.models.backbone import Backbone
from vitregs.probes import dense, transfer

QUICK: dict[str, Any] = {"steps": 20, "bins": 8}
COUNT = 30


def tiny(registers: int = 0) -> Backbone:
    options = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
    return registry.random("vit_tiny_patch16_224", reg_tokens=registers, **options)


def some(registers: int = 0, seed: int = 0, **more: Any) -> xr.Dataset:
    source = images.open_images("scenes", size=(32, 48), count=COUNT, seed=seed)
    return transfer.measure(tiny(registers), source, **QUICK, **more)


@pytest.fixture(scope="module")
def found() -> dict[str, xr.Dataset]:
    return {"clip-pico": some(), "clip-pico-reg2": some(2), "mae-pico": some(3)}


def test_everything_known_of_scenes_is_asked(found: dict[str, xr.Dataset]) -> None:
    data = found["clip-pico"]
    requested = [*transfer.LARGEST_OBJECT_TASKS, "shape mIoU", "colour mIoU", "depth rmse"]
    assert data["metric"].values.tolist() == requested
    assert data["n"].values.tolist() == [10] * 6
    assert ((data["low"] <= data["score"]) & (data["score"] <= data["high"])).all()
    assert int(found["clip-pico-reg2"]["registers"]) == 2
    assert data["floor"].isnull().all()
    assert data.sizes["image"] == COUNT
    assert np.isnan(data["each"].values[:, :20]).all()
    assert (data["counts"].values[:, :20] == 0).all()


def test_what_images_add_gives_the_scores_again(found: dict[str, xr.Dataset]) -> None:
    data = found["clip-pico"]
    for metric in data["mean"].values:
        assert float(data["each"].sel(mean=metric).mean()) == pytest.approx(
            float(data["score"].sel(metric=metric)), rel=1e-5
        )
    for metric in data["segments"].values:
        again = dense.miou(data["counts"].sel(segments=metric).values)
        assert float(again) == pytest.approx(float(data["score"].sel(metric=metric)))


def test_one_pass_agrees_with_the_probes_by_themselves(found: dict[str, xr.Dataset]) -> None:
    source = images.open_images("scenes", size=(32, 48), count=COUNT)
    states = capture.tokens(tiny(), source, kinds=("cls", "patch"), final_norm=True)
    truth = next(source.batches(COUNT)).truth
    assert truth is not None
    s = dense.segment(arrays.patches(states), truth.semantic.numpy(), classes=9, steps=20)
    assert float(s.miou) == pytest.approx(float(found["clip-pico"]["score"].sel(metric="shape mIoU")), abs=1e-6)
    d = dense.estimate_depth(
        arrays.patches(states), truth.depth.numpy(), low=1, high=4, cls=states.isel(token=[0]), **QUICK
    )
    assert float(d.rmse) == pytest.approx(float(found["clip-pico"]["score"].sel(metric="depth rmse")), rel=1e-4)


def test_colours_of_pixels_against_a_loop() -> None:
    truth = scenes.render(3, (16, 24), seed=4)
    found = ground_truth.colour_masks(truth)
    for i, y, x in np.ndindex(found.shape):
        rank = int(truth.instances[i, y, x])
        assert found[i, y, x] == (0 if not rank else 1 + int(truth.objects[i, rank - 1, 1]))
    np.testing.assert_array_equal(found == 0, truth.semantic.numpy() == 0)


def test_an_untrained_network_of_the_same_shape() -> None:
    backbone = registry.load("clip-pico-reg4", device="cpu")
    twin = transfer.untrained(backbone)
    assert (twin.registers, twin.width, twin.depth, twin.prefix) == (0, backbone.width, backbone.depth, 1)
    assert twin.size == backbone.size
    same = transfer.untrained(backbone)
    first, second = (b.net.state_dict() for b in (twin, same))
    assert all(bool((first[k] == second[k]).all()) for k in first)
    trained = backbone.net.state_dict()
    assert bool((first["blocks.0.attn.qkv.weight"] != trained["blocks.0.attn.qkv.weight"]).any())


def test_the_floor_is_shared_by_models_of_one_shape() -> None:
    transfer.FLOORS.clear()
    data = []
    for name in ("mae-pico", "mae-pico-reg4"):
        source = images.open_images("scenes", size=64, count=12)
        data.append(transfer.measure(registry.load(name, device="cpu"), source, floor=True, **QUICK))
    assert len(transfer.FLOORS) == 1
    np.testing.assert_array_equal(data[0]["floor"].values, data[1]["floor"].values)
    assert data[0]["floor"].notnull().all()
    assert (data[0]["floor"] != data[0]["score"]).any()


def test_clip_models_are_asked_for_words_as_well() -> None:
    source = images.open_images("scenes", size=64, count=12)
    backbone = registry.load("clip-pico", device="cpu")
    requested = transfer.measure(backbone, source, **QUICK)["metric"].values.tolist()
    assert requested[-2:] == ["zero-shot", "zero-shot, largest"]
    inside = transfer.measure(backbone, source, layer=4, **QUICK)["metric"].values.tolist()
    assert inside == requested[:-2]


def photographs(folder: Path, labels: bool) -> None:
    rng = np.random.default_rng(0)
    for i in range(9):
        place = folder / f"class{i % 2}" if labels else folder
        place.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(place / f"{i}.png")


def test_images_with_labels_alone_are_asked_for_labels(tmp_path: Path) -> None:
    photographs(tmp_path, labels=True)
    data = transfer.measure(tiny(), images.open_images(str(tmp_path), size=(32, 48)), **QUICK)
    assert data["metric"].values.tolist() == ["label"]
    assert "counts" not in data
    assert report.transfer.differences({"clip-pico": data}).empty
    assert "label" in report.transfer.scores({"clip-pico": data}).columns


def test_images_that_tell_nothing(tmp_path: Path) -> None:
    photographs(tmp_path, labels=False)
    with pytest.raises(InputError, match="neither labels nor masks nor depth"):
        transfer.measure(tiny(), images.open_images(str(tmp_path), size=(32, 48)), **QUICK)


def test_a_difference_is_paired(found: dict[str, xr.Dataset]) -> None:
    a, b = found["clip-pico"], found["mae-pico"]
    for metric in a["metric"].values:
        value, low, high = transfer.difference(a, b, metric)
        gap = float(b["score"].sel(metric=metric) - a["score"].sel(metric=metric))
        assert value == pytest.approx(gap, abs=1e-6)
        assert low <= value <= high
        assert transfer.difference(a, a, metric) == (0, 0, 0)
        back = transfer.difference(b, a, metric)
        assert back[0] == pytest.approx(-value)
        assert back[1:] == pytest.approx((-high, -low), abs=1e-9)
    better = a.copy(deep=True)
    better["each"] = better["each"] - 0.1  # every image by the same: no variation, however much images differ
    assert transfer.difference(a, better, "depth rmse") == pytest.approx((-0.1, -0.1, -0.1), abs=1e-6)
    with pytest.raises(InputError, match="measured on 30 and 12 images"):
        transfer.difference(a, b.isel(image=slice(12)), "colour")


def test_only_models_of_one_recipe_are_compared(found: dict[str, xr.Dataset]) -> None:
    assert set(report.transfer.differences(dict(reversed(found.items())))["pair"]) == {"clip-pico"}
    neighbours = {"mae-pico": found["clip-pico"], "clip-pico-reg2": found["clip-pico-reg2"]}
    assert report.transfer.differences(neighbours).empty
    several = {**found, "clip-pico-reg4": found["clip-pico-reg2"]}
    assert list(dict.fromkeys(report.transfer.differences(several)["pair"])) == ["clip-pico-reg2", "clip-pico-reg4"]


def test_tables_say_the_numbers_in_their_units(found: dict[str, xr.Dataset]) -> None:
    table = report.transfer.scores(found)
    assert table.index.tolist() == ["clip-pico", "clip-pico-reg2", "mae-pico", "chance", "images"]
    colour, depth = (float(found["clip-pico"]["score"].sel(metric=m)) for m in ("colour", "depth rmse"))
    assert table.loc["clip-pico", "colour"].startswith(f"{100 * colour:.0f} [")
    assert table.loc["clip-pico", "depth rmse"].startswith(f"{depth:.2f} [")
    assert table.loc["images", "colour"] == "10"
    gaps = report.transfer.differences(found)
    assert set(gaps["pair"]) == {"clip-pico"}
    assert len(gaps) == 6
    assert gaps["significant"].tolist() == [
        bool(low > 0 or high < 0) for low, high in zip(gaps["low"], gaps["high"], strict=True)
    ]
    row = gaps.set_index("metric").loc["depth rmse"]
    assert row["better"] == (row["difference"] < 0)
    assert "of 6 differences" in report.transfer.count_significant(gaps)
    assert "no pair" in report.transfer.count_significant(gaps.iloc[:0])


def test_the_papers_table() -> None:
    table = report.transfer.published_scores()
    assert table.loc[("DINOv2 ViT-L/14", "difference"), "ADE20k, mIoU %"] == "+1.3"
    assert table.loc[("DeiT-III ViT-B/16", "with"), "NYUd, rmse"] == "0.512"
    assert table.loc[("OpenCLIP ViT-B/16", "without"), "zero-shot, %"] == "59.9"
    assert table.loc[("DINOv2 ViT-L/14", "with"), "zero-shot, %"] == "–"


def test_curves_hold_the_papers_numbers_and_ours(found: dict[str, xr.Dataset]) -> None:
    table = report.transfer.curves(found, {"colour, %": "colour", "depth": "depth rmse"})
    paper = table[table["source"] == "paper"]
    assert len(paper) == 18
    best = paper[(paper["panel"] == "depth, rmse") & (paper["registers"] == 8)]["score"].item()
    assert best == published.value("tables", table="fig_8", registers=8, quantity="mean_rmse")
    ours = table[table["source"] == "ours"].set_index(["panel", "registers"])
    assert ours.loc[("colour, %", 2), "score"] == pytest.approx(100 * float(found["clip-pico-reg2"]["score"][0]))
    gaps = report.transfer.against_none(found, ["colour", "depth rmse"])
    assert gaps.index.tolist() == ["clip-pico-reg2"]  # a network of another recipe is not compared, wherever it stands
    assert gaps["registers"].tolist() == [2]
    assert report.transfer.against_none({"clip-pico": found["clip-pico"]}, ["colour"]).empty


def test_what_is_asked_is_said_in_words(found: dict[str, xr.Dataset]) -> None:
    text = report.transfer.measured_metrics(found).splitlines()
    assert text[:2] == ["classes: colour, shape, colour and shape", "segments: shape mIoU, colour mIoU"]
    assert text[2:] == ["depth: depth rmse", "words: no network here has a text side that fits these images"]
    few = {"clip-pico": found["clip-pico"].isel(metric=[0])}
    assert report.transfer.measured_metrics(few).splitlines()[1] == "segments: no truth in these images"
    drawn = {"shape, %": "shape", "colour, mIoU %": "colour mIoU", "depth, rmse": "depth rmse"}
    assert report.transfer.panels(found, "shape", "colour") == drawn
    real = {"clip-pico": xr.Dataset(coords={"metric": ["label", "mask mIoU"]})}
    assert report.transfer.panels(real, "colour", "colour") == {"label, %": "label", "mask, mIoU %": "mask mIoU"}


def test_traces_find_a_planted_peak() -> None:
    maps = np.ones((8, 10))
    maps[:, 3] = 11
    ratios = np.ones((8, 3))
    ratios[:, 0], ratios[:, 2] = 90, 5
    a = xr.DataArray(maps, dims=("image", "token"))
    r = xr.DataArray(ratios, dims=("image", "layer"), coords={"layer": [0, 1, 2]})
    row = report.transfer.traces({"m": a}, {"m": r}, {"m": 4}, {"m": None}).loc["m"]
    assert row.tolist() == [4, "55 [55, 55]", "5.00 [5.00, 5.00]", 2]
    background = np.zeros((8, 10))
    background[:, 3:5] = 1
    row = report.transfer.traces({"m": a}, {"m": r}, {"m": 4}, {"m": background}).loc["m"]
    assert row["on objects, %"] == "40 [40, 40]"  # eight of twenty shares
    assert row["peak on background, %"] == "100 [100, 100]"


def test_figures_are_drawn(found: dict[str, xr.Dataset]) -> None:
    gaps = report.transfer.differences(found)
    figure = report.transfer.plot_differences(gaps)
    assert [a.get_title() for a in figure.axes[:6]] == gaps["metric"].tolist()
    assert len(report.transfer.plot_differences(gaps.iloc[:0]).axes) == 1
    table = report.transfer.curves({**found, "again": found["mae-pico"]}, {"colour, %": "colour"})
    assert len(report.transfer.plot_over_registers(table).axes) == 6
    from vitregs.measure import cost

    tables = {"ViT-L/14": cost.increase(cost.PUBLISHED["ViT-L/14"])}
    paper = published.table("fig12")
    assert len(report.transfer.plot_costs(tables, paper[paper["model"] == "ViT-L/14"]).axes) == 2
    assert isinstance(gaps, pd.DataFrame)
