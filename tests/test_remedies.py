"""What remedies at test time do: planted networks and answers, the identity of many tokens with one, tables and figures."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from torch import Tensor

from tests.test_intervention import images as flat_images
from tests.test_intervention import network, plant
from vitregs import arrays, report
from vitregs.data import datasets, images
from vitregs.data.images import Batch, Images
from vitregs.data.preparation import Preparation
from vitregs.errors import InputError
from vitregs.measure import lost, remedies
from vitregs.models import capture, registry, test_time
from vitregs.models.backbone import Backbone
from vitregs.probes import dense
from vitregs.probes import remedies as probed

SIDE = (48, 64)
NEURONS = {"3": [0, 1, 2]}  # that `plant` writes
CLASSES = 5


def problem(call: Any, *args: object, **kw: object) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **kw)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Given(Images):
    """Images in memory, with labels, boxes and masks."""

    def __init__(self, pixels: Tensor, labels: list[Any], boxes: list[np.ndarray], masks: list[np.ndarray | None]):
        super().__init__("given", SIDE, len(pixels), 0, Preparation(), None)
        self.parts = Batch(pixels, [str(i) for i in range(len(pixels))], labels, boxes, masks)

    def batches(self, batch: int = 32) -> Iterator[Batch]:
        p = self.parts
        for i in range(0, len(p.pixels), batch):
            s = slice(i, i + batch)
            yield Batch(p.pixels[s], p.names[s], p.labels[s], p.boxes[s], p.masks[s])


@pytest.fixture(scope="module")
def vit() -> Backbone:
    """A small network with planted register neurons and a head."""
    backbone = network()
    torch.manual_seed(0)
    pixels, flat = flat_images(0.04)
    plant(backbone, pixels, flat, 20 * float(capture.norms(backbone, pixels, layers=[3]).median()))
    net: Any = backbone.net
    net.num_classes, net.head = CLASSES, torch.nn.Linear(backbone.width, CLASSES).requires_grad_(False)
    with torch.no_grad():
        net.head.weight.mul_(5)
    return backbone


@pytest.fixture(scope="module")
def source(vit: Backbone) -> Given:
    """Twelve images: the network's own answers as labels but for two, a box, a mask of two classes."""
    pixels = flat_images(0.04)[0][:12]
    labels = vit.logits(pixels).argmax(1).tolist()
    labels[0] = (labels[0] + 1) % CLASSES
    labels[1] = None
    boxes = [np.array([[0, 0, 24, 32]], np.float32)] * 11 + [np.zeros((0, 4), np.float32)]
    mask = np.ones(SIDE, np.uint8)
    mask[:, 32:] = 2
    return Given(pixels, labels, boxes, [None, *[mask] * 11])


# --- variants
def test_doses_are_tokens_of_a_weight(vit: Backbone) -> None:
    found = remedies.dosed(vit, [0, 1, 2, 2.5])
    assert found[0] is vit
    assert [n.registers for n in found.values()] == [0, 1, 1, 1]
    assert [n.name.removeprefix(vit.name) for n in found.values()] == ["", "+zero1", "+zero2", "+zero2.5"]


@pytest.mark.parametrize("doses", [[], [1, 1], [-1], [np.nan], [np.inf]])
def test_doses_that_are_none(vit: Backbone, doses: list[float]) -> None:
    assert "dose" in problem(remedies.dosed, vit, doses)


def test_the_table_of_interventions_has_its_controls(vit: Backbone) -> None:
    found = remedies.treated(vit, NEURONS)
    assert list(found) == ["untouched", "+zero1", "+random1", "+tt1", "+suppressed"]
    assert len({n.weights for n in found.values()}) == 5
    assert "no neurons to move" in problem(remedies.treated, vit, {"3": []})
    assert "no register neurons of" in problem(remedies.treated, vit)


# --- the artifact
def test_signs_are_what_capture_shows(vit: Backbone, source: Given) -> None:
    found = remedies.artifact_by_dose(vit, source, doses=[0, 4], batch=5)
    assert dict(found.sizes) == {"dose": 2, "image": 12}
    for dose, net in ((0, vit), (4, test_time.append(vit, 4))):
        seen = capture.capture(net, source.parts.pixels, norms=[5], attention=["cls"], received=[5])
        patch = arrays.patches(seen.norms.isel(layer=0)).values
        one = found.sel(dose=dose)
        middle = np.median(patch, axis=1)
        np.testing.assert_allclose(one["share"], (patch > 1.6 * middle[:, None]).mean(1), atol=1e-6)
        np.testing.assert_allclose(one["largest"], patch.max(1) / middle, rtol=1e-4)
        rows = arrays.patches(seen.attention.isel(attention_layer=0, query=0).mean("head")).values
        np.testing.assert_allclose(one["cls"], rows.max(1) / rows.sum(1) * 48, rtol=1e-4)
        if dose:
            register = seen.norms.isel(layer=0).sel(token="register").mean("token")
            np.testing.assert_allclose(one["register"], register, rtol=1e-4)
        else:
            assert one["register"].isnull().all()
            np.testing.assert_allclose(one["sink"], seen.sink.isel(received_layer=0), rtol=1e-4)


def test_the_cut_off_is_that_of_the_plain_network(vit: Backbone, source: Given) -> None:
    found = remedies.artifact_by_dose(vit, source, doses=[0, 2])
    norms = arrays.patches(capture.norms(vit, source.parts.pixels, layers=[5]).isel(layer=0)).values
    cutoff = float(found["cutoff"])
    marked = flat_images(0.04)[1][:12]
    assert norms[~marked].max() < cutoff < norms[marked].min()  # what was planted
    np.testing.assert_allclose(found["above"].sel(dose=0), marked.mean(1), atol=1e-6)
    named = remedies.artifact_by_dose(vit, source, doses=[0], cutoff=1e6)
    assert float(named["cutoff"]) == 1e6
    assert not named["above"].values.any()
    assert "ratio must be above 1" in problem(remedies.artifact_by_dose, vit, source, ratio=1.0)


def test_moving_planted_neurons_removes_what_was_planted(vit: Backbone, source: Given) -> None:
    found = remedies.interventions(vit, source, neurons=NEURONS)
    share = found["above"].mean("image")
    assert float(share.sel(change="untouched")) > 0.02
    assert float(share.sel(change="+tt1")) == float(share.sel(change="+suppressed")) == 0
    for control in ("+zero1", "+random1"):
        assert float(share.sel(change=control)) > 0.8 * float(share.sel(change="untouched"))
    moved, plain = (found["register"].sel(change=c).mean() for c in ("+tt1", "+zero1"))
    assert float(moved) > 5 * float(plain)  # the token has become what the patches were
    assert found["register"].sel(change=["untouched", "+suppressed"]).isnull().all()
    assert (found["agrees"].sel(change="untouched") == 1).all()


def test_a_network_without_cls_or_head(source: Given) -> None:
    options: Any = {"img_size": SIDE, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 0}
    bare = registry.random("vit_base_patch16_gap_224", **options)
    found = remedies.interventions(bare, source, neurons={"1": [0]})
    assert found["cls"].isnull().all()
    assert "right" not in found
    assert "has no trained head" in problem(remedies.answers_by_dose, bare, source)


# --- answers
def test_answers_are_held_against_labels(vit: Backbone, source: Given) -> None:
    found = remedies.answers_by_dose(vit, source, doses=[0, 8], batch=5)
    right = found["right"].sel(dose=0).values
    assert np.isnan(right[1])
    assert right[0] == 0
    assert (right[2:] == 1).all()
    logits = test_time.append(vit, 8).logits(source.parts.pixels).numpy()
    one = found.sel(dose=8)
    np.testing.assert_array_equal(one["named"], logits.argmax(1))
    np.testing.assert_array_equal(one["agrees"], logits.argmax(1) == found["named"].sel(dose=0).values)
    for i in (0, 5):
        true = source.parts.labels[i]
        np.testing.assert_allclose(
            one["margin"][i], logits[i, true] - np.delete(logits[i], true).max(), rtol=1e-3, atol=1e-4
        )


def test_labels_that_are_not_the_heads_own(vit: Backbone, source: Given) -> None:
    shifted = [None if label is None else (label + 1) % CLASSES for label in source.parts.labels]
    other = Given(source.parts.pixels, shifted, source.parts.boxes, source.parts.masks)
    classes = [(k - 1) % CLASSES for k in range(CLASSES)]
    a = remedies.answers_by_dose(vit, source, doses=[0])
    b = remedies.answers_by_dose(vit, other, doses=[0], classes=classes)
    xr.testing.assert_equal(a, b)
    wrong = "names 5 classes: there is no class 700"
    assert wrong in problem(remedies.answers_by_dose, vit, other, doses=[0], classes=[700] * CLASSES)
    assert len(datasets.IMAGENETTE) == 10
    assert list(datasets.IMAGENETTE) == sorted(datasets.IMAGENETTE)


@pytest.mark.parametrize("batch", [3, 5, 12, 32])
def test_images_at_the_beginning_can_be_left_out(vit: Backbone, source: Given, batch: int) -> None:
    whole = remedies.answers_by_dose(vit, source, doses=[0, 2])
    part = remedies.answers_by_dose(vit, source, doses=[0, 2], skip=5, batch=batch)
    np.testing.assert_array_equal(part["named"], whole["named"][:, 5:])
    for skip in (12, 13, -1):
        assert "skip leaves out images" in problem(remedies.answers_by_dose, vit, source, doses=[0], skip=skip)
    assert remedies.interventions(vit, source, neurons=NEURONS, skip=4).sizes["image"] == 8


def answers() -> xr.Dataset:
    """Planted: of five images with a label one is lost and one is won."""
    right = [[1, 1, 1, 0, 0, np.nan], [1, 0, 1, 1, 0, np.nan]]
    margin = [[3.0, 0.1, 2.0, -0.2, -3.0, np.nan], [2.0, -0.1, 2.0, 0.3, -3.0, np.nan]]
    data = {"right": right, "margin": margin, "agrees": [[1.0] * 6, [1, 0, 1, 0, 1, 1]]}
    found = {k: (("dose", "image"), np.array(v, np.float32)) for k, v in data.items()}
    return xr.Dataset(found, coords={"dose": [0, 8], "model": "planted"})


def test_the_cost_comes_from_where_it_was_planted() -> None:
    found = remedies.flips(answers()).sel(dose=8)
    assert float(found["accuracy"]) == pytest.approx(0.6)
    assert float(found["lost"]) == pytest.approx(0.2)
    assert float(found["won"]) == pytest.approx(0.2)
    assert float(found["margin_lost"]) == pytest.approx(0.1)
    assert float(found["margin_kept"]) == pytest.approx(2.5)
    assert float(found["shift"]) == pytest.approx((-1 - 0.2 + 0 + 0.5 + 0) / 5)
    first = remedies.flips(answers()).sel(dose=0)
    assert float(first["lost"]) == float(first["won"]) == 0
    assert np.isnan(first["margin_lost"])
    row = report.remedies.flips(answers()).loc["8"]
    assert row["lost, %"] == row["won, %"] == "20.0"
    assert row["margin of those lost, before"] == "0.10"


# --- object discovery and segmentation
def test_boxes_are_those_of_lost(vit: Backbone, source: Given) -> None:
    found = remedies.lost_by_dose(vit, source, doses=[0, 8], projection="key", batch=5)
    for dose, net in ((0, vit), (8, test_time.append(vit, 8))):
        features = capture.projections(net, source.parts.pixels, which="key")
        box = lost.lost(features, patch_size=(8, 8), bias="centre", normalise=True)["box"].values
        best = lost.overlap(box, source.parts.boxes)
        one = found.sel(dose=dose)
        np.testing.assert_array_equal(one["hit"].values[:11], best[:11] >= 0.5)
        area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) / (48 * 64)
        np.testing.assert_allclose(one["covered"], area, rtol=1e-6)
    assert found["hit"][:, 11].isnull().all()
    assert not found["whole"].values[:11].any()  # the true box covers a quarter
    whole = remedies.lost_by_dose(vit, source, doses=[0], bias=1e6, normalise=False)
    assert (whole["covered"] == 1).all()


def test_segmentation_is_that_of_the_dense_probe(vit: Backbone, source: Given) -> None:
    found = probed.segments_by_dose(vit, source, doses=[0, 8], steps=20)
    kept, masks = source.parts.pixels[1:], [np.asarray(m) for m in source.parts.masks[1:]]
    for dose, net in ((0, vit), (8, test_time.append(vit, 8))):
        states = capture.tokens(net, kept, final_norm=True)
        scored = dense.segment(states, masks, classes=3, ignore=0, steps=20)
        assert float(found["miou"].sel(dose=dose)) == pytest.approx(float(scored["miou"]), abs=0.02)
    counts = found["counts"].sel(dose=0).values.astype(float)
    assert dense.miou(counts) == pytest.approx(float(found["miou"].sel(dose=0)))
    bare = Given(source.parts.pixels, source.parts.labels, source.parts.boxes, [None] * 12)
    assert "0 images of given have a mask" in problem(probed.segments_by_dose, vit, bare)


def test_pictures_are_of_the_first_images(vit: Backbone, source: Given) -> None:
    found = remedies.pictures_by_dose(vit, source, doses=[0, 8], projection="key", count=3)
    norms = capture.norms(test_time.append(vit, 8), source.parts.pixels[:3], layers=[5]).isel(layer=0)
    np.testing.assert_allclose(found["norm"].sel(dose=8), arrays.patch_maps(norms), rtol=1e-3)
    assert found["attention"].shape == (2, 3, 6, 8)
    whole = remedies.lost_by_dose(vit, source, doses=[0, 8], projection="key")["covered"].values[:, :3]
    box = found["box"].transpose("dose", "image", "side").values
    np.testing.assert_allclose((box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1]) / (48 * 64), whole, rtol=1e-6)
    moved = remedies.pictures_by_change(vit, source, neurons=NEURONS, count=12)
    top = moved["norm"].max(("y", "x")).mean("image")
    assert float(top.sel(change="+tt1")) < 0.5 * float(top.sel(change="+zero1"))
    wrong = {"neurons": NEURONS, "changes": ["+tt2"]}
    assert "unknown change '+tt2'" in problem(remedies.pictures_by_change, vit, source, **wrong)


# --- tables and figures
def test_the_table_holds_the_planted_numbers() -> None:
    share = np.array([[0.04] * 4, [0.0] * 4], np.float32)
    signs = xr.Dataset(
        {
            "share": (("dose", "image"), share),
            "above": (("dose", "image"), share * np.nan),
            "largest": (("dose", "image"), np.array([[2, 2, 2, 9], [1, 1, 1, 1]], np.float32)),
            "cutoff": np.nan,
        },
        coords={"dose": [0, 8]},
        attrs={"ratio": 1.6},
    )
    boxes = xr.Dataset(
        {
            "hit": (("dose", "image"), np.array([[0, 1, np.nan], [1, 1, np.nan]])),
            "covered": (("dose", "image"), np.array([[0.1, 0.1, 0.4], [1.0, 1.0, 1.0]])),
            "whole": ("image", [1.0, 0.0, np.nan]),
        },
        coords={"dose": [0, 8]},
    )
    table = report.remedies.table(signs, boxes, answers(), contrasts=[(8, 0)])
    assert list(table.index) == ["0", "8", "8 minus 0"]
    last, table = table.iloc[-1], table.iloc[:-1]
    assert table["patches above 1.6 x the median, %"].tolist() == ["4.00 [4.00, 4.00]", "0.00 [0.00, 0.00]"]
    assert table["largest / median norm"].str.split().str[0].tolist() == ["2.00", "1.00"]  # a median: 9 does not count
    assert "patches above the cut-off, %" not in table  # there is none
    assert table["CorLoc, %"].str.split().str[0].tolist() == ["50.0", "100.0"]
    assert table["covered, %"].tolist() == ["10", "100"]
    assert table["whole image, %"].tolist() == ["50.0", "50.0"]
    assert table["top-1, %"].str.split().str[0].tolist() == ["60.0", "60.0"]
    assert last["patches above 1.6 x the median, %"] == "-4.00 [-4.00, -4.00]"
    assert last["largest / median norm"].startswith("x 0.34 [")  # geometric mean of 1/2, 1/2, 1/2 and 1/9
    assert last["CorLoc, %"].startswith("+50.0 [")
    assert last["top-1, %"].startswith("+0.0 [-")
    assert last["covered, %"] == last["whole image, %"] == "–"


def test_the_contrast_of_segmentations_is_that_of_their_claim() -> None:
    """Differences of mIoU are paired over images, and images without truth do not count."""
    draw = np.random.default_rng(0)
    counts = draw.integers(5, 50, (2, 6, 2, 3))
    counts[:, :, 1] += counts[:, :, 0]  # the union holds the intersection
    counts[:, 5] = 0
    data = xr.Dataset(
        {
            "miou": ("dose", [0.2, 0.3]),
            "low": ("dose", [0.1, 0.2]),
            "high": ("dose", [0.3, 0.4]),
            "counts": (("dose", "image", "side", "class"), counts),
        },
        coords={"dose": [0, 8]},
    )
    found = report.remedies.table(data, contrasts=[(8, 0)]).loc["8 minus 0", "segmentation, mIoU %"]
    one, two = (dense.miou(counts[i, :5].astype(float)) for i in (1, 0))
    assert found.split()[0] == f"{100 * float(one - two):+.1f}"


def test_curves_stand_beside_the_papers() -> None:
    table = report.remedies.curves(answers())
    paper, ours = (table[table["source"] == s] for s in ("paper", "ours"))
    assert sorted(paper["tokens"].unique()) == [0, 1, 2, 4, 8, 16]
    assert paper["panel"].nunique() == 3
    assert ours["panel"].unique().tolist() == ["top-1, %"]
    assert ours["value"].tolist() == pytest.approx([60, 60])
    figure = report.remedies.plot_doses(table)
    shown = [a for a in figure.axes if a.get_visible()]
    assert len(shown) == 4
    assert [a.get_xlabel() for a in shown] == ["trained registers"] * 3 + ["zero tokens"]
    np.testing.assert_allclose(shown[-1].lines[0].get_ydata(), [60, 60], rtol=1e-6)
    assert figure.legends == []  # no more tokens than in the paper


def test_where_the_papers_range_ends_is_marked() -> None:
    row = {"source": "ours", "panel": "p", "low": 0.0, "high": 2.0, "baseline": np.nan}
    ours = pd.DataFrame([row | {"tokens": float(n), "value": 1.0} for n in (0, 8, 16, 32)])
    paper = report.remedies.curves(answers())
    paper = paper[paper["source"] == "paper"]
    figure = report.remedies.plot_doses(pd.concat([paper, ours]))
    figure.canvas.draw()
    shown = [a for a in figure.axes if a.get_visible()]
    assert [len(a.lines) for a in shown] == [1, 1, 1, 2]
    assert shown[-1].lines[1].get_xdata()[0] == 2.5  # between 16 and 32
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["the paper's range ends at 16"]


def test_curves_of_boxes_have_what_they_cover_and_a_baseline() -> None:
    boxes = xr.Dataset(
        {
            "hit": (("dose", "image"), np.array([[0, 1, np.nan], [1, 1, np.nan]])),
            "covered": (("dose", "image"), np.array([[0.1, 0.1, 0.4], [1.0, 1.0, 1.0]])),
            "whole": ("image", [1.0, 0.0, np.nan]),
        },
        coords={"dose": [0, 8]},
    )
    table = report.remedies.curves(boxes)
    ours = table[table["source"] == "ours"].set_index("panel")
    assert ours.loc["CorLoc, %", "value"].tolist() == [50, 100]
    assert ours.loc["CorLoc, %", "baseline"].tolist() == [50, 50]
    assert ours.loc["image that the box covers, %", "value"].tolist() == pytest.approx([10, 100])
    assert ours.loc["image that the box covers, %", "baseline"].isna().all()
    figure = report.remedies.plot_doses(table)
    panels = {a.get_title(): a for a in figure.axes if a.get_visible()}
    assert panels["CorLoc, %"].lines[1].get_ydata().tolist() == [50, 50]
    assert len(panels["image that the box covers, %"].lines) == 1


def test_maps_before_and_after_share_a_scale() -> None:
    shown = np.random.default_rng(0).random((2, 16, 24, 3))
    maps = {
        k: xr.DataArray(np.full((2, 2, 3), v), dims=("image", "y", "x")) for k, v in (("plain", 1.0), ("cured", 4.0))
    }
    figure = report.remedies.plot_before_and_after(shown, maps, "norm")
    limits = {i.get_clim() for a in figure.axes for i in a.images if i.get_array().ndim == 2}
    assert (1.0, 4.0) in limits
    boxes = {k: xr.DataArray([[0, 0, 8, 8], [8, 8, 16, 24]], dims=("image", "side")) for k in maps}
    figure = report.remedies.plot_boxes(shown, boxes, {1: np.array([[0, 0, 16, 24]])})
    assert [len(a.patches) for a in figure.axes] == [1, 2, 1, 2]
    assert figure.axes[0].patches[0].get_bbox().bounds == (0, 0, 8, 8)


# --- the real network
def test_the_table_of_interventions_of_deit_tiny(shared_data: Any) -> None:
    """Neurons that were found on other images take the outliers along, random ones do not."""
    weights = shared_data / "deit-tiny" / "deit_tiny_patch16_224.safetensors"
    vit = registry.load("deit_tiny_patch16_224", weights=weights, device="cpu")
    coco = images.open_images(str(shared_data / "coco-256"), split="validation", size=224, count=12)
    neurons = {"6": [402, 96, 229], "7": [217, 371, 203, 462, 109], "8": [554, 318, 413], "9": [238, 15, 622, 183]}
    neurons |= {"10": [599, 370, 626, 640], "11": [246, 570, 750, 666]}
    found = remedies.interventions(vit, coco, neurons=neurons).mean("image")
    share, sink = found["share"], found["sink"]
    assert 0.02 < share.sel(change="untouched") < 0.06
    assert share.sel(change="+tt1") < 0.2 * share.sel(change="untouched")
    assert share.sel(change="+suppressed") < 0.2 * share.sel(change="untouched")
    assert share.sel(change="+random1") > 0.3 * share.sel(change="untouched")
    assert sink.sel(change="+tt1") < 0.7 * sink.sel(change="+random1")
