"""Tables of the chapters: known answers from planted arrays, non-square grids."""

import numpy as np
import pytest
import xarray as xr

from vitregs import report
from vitregs.arrays import token_coords

GRID = (3, 5)
KINDS = ["cls", "register", *["patch"] * 15]


def array(values: np.ndarray, dims: tuple[str, ...], **coords: object) -> xr.DataArray:
    return xr.DataArray(values, dims=dims, coords={**token_coords(KINDS, GRID), **coords})


def test_attention_counts_objects_and_peak() -> None:
    rows = np.zeros((2, 1, 1, 1, 17))
    rows[..., 0] = 0.5  # CLS to itself: not part of the attention to patches
    rows[0, ..., 2:6] = 0.125  # four patches share the rest
    rows[1, ..., 2] = 0.5  # one patch has it all
    a = array(rows, ("image", "layer", "head", "query", "token"))
    background = np.ones((2, 15))
    background[:, 0] = 0  # the first patch is object
    found = report.attention.attention({"m": a}, {"m": background}).set_index("quantity")["mean"]
    assert found["peak, in fair shares"] == pytest.approx(15 * (0.25 + 1) / 2)
    assert found["attention on objects"] == pytest.approx((0.25 + 1) / 2)
    assert found["area of objects"] == pytest.approx(1 / 15)
    assert set(report.attention.attention({"m": a}, {"m": None})["quantity"]) == {"peak, in fair shares"}


def test_peaks_are_per_cent_by_block() -> None:
    p = xr.DataArray([[0.1, 0.2], [0.3, 0.2]], dims=("image", "layer"), coords={"layer": [1, 2]})
    table = report.attention.peaks({"m": p})
    assert table["block"].tolist() == [1, 2]
    assert table["mean"].tolist() == pytest.approx([20, 20])
    assert table["low"].iloc[1] == pytest.approx(20)
    assert table["low"].iloc[0] < 20 < table["high"].iloc[0]


def planted(count: int = 80) -> xr.DataArray:
    """Norms of 3 layers around 10; at layer 1 the first patch of every second image has ten times that."""
    rng = np.random.default_rng(0)
    norms = 10 * np.exp(0.1 * rng.standard_normal((count, 3, 17)))
    norms[::2, 1, 2] = 100 * np.exp(0.05 * rng.standard_normal(count // 2))
    return array(norms, ("image", "layer", "token"), layer=[0, 1, 2])


def test_verdicts_and_layers_find_the_planted_layer() -> None:
    table = report.norms.verdicts({"m": planted()})
    assert table.iloc[0]["outliers, %"] == "2.37"
    row = table.iloc[1]
    assert (row["second mode"], row["layer"]) == ("yes", "1 of 2")
    assert float(row["outliers, %"].split()[0]) == pytest.approx(100 / 30, abs=0.01)
    layers = report.norms.layers({"m": planted()})
    assert layers.loc[("m", 1), "2nd mode, %"] == pytest.approx(100 / 30, abs=0.01)
    assert (layers["cut-off"] == "none").tolist() == [True, False, True]
    assert 12 < float(layers.loc[("m", 1), "cut-off"]) < 90
    text = report.norms.findings({"m": planted(), "n": planted().isel(layer=[0, 2])})
    assert text.startswith("m (layer 1): a second mode at ")
    assert "\nn (layer 2): no second mode at any layer" in text
    assert max(map(len, text.splitlines())) <= 78


def test_similarity_and_shares_split_by_marks() -> None:
    norms = planted().sel(layer=1)
    marked = norms > 50
    similar = array(np.tile(np.linspace(0, 1, 17), (80, 1)), ("image", "token")).isel(token=slice(2, None))
    rows = report.tokens.similarity({"m": similar}, {"m": (marked, "outliers")})
    groups = report.tokens.summary(rows).set_index("group")
    assert groups.loc["outliers", "patches"] == 40
    assert groups.loc["other patches", "patches"] == 80 * 15 - 40
    assert groups.loc["outliers", "median"] == pytest.approx(2 / 16)
    background = np.ones((80, 15))
    background[:, 0], background[:, 1] = 0, 0.5
    where = report.tokens.shares({"m": (marked, "outliers")}, {"m": background}).set_index("group")["share"]
    assert where["object"] == pytest.approx(0.5)
    assert where["background"] == where["border"] == 0
    assert report.tokens.shares({"m": (marked, "outliers")}, {"m": None}).empty


def test_registers_set_ours_beside_the_published() -> None:
    mean = xr.DataArray(
        np.full((4, 2, 9), 2.0),
        dims=("layer", "token", "channel"),
        coords={"layer": range(4), "label": ("token", ["reg0", "reg1"])},
    )
    panels = report.registers.norms_of_means({"pair": mean, "none": mean.isel(token=slice(0, 0))})
    assert set(panels) == {f"DINOv2+reg {s}" for s in ("small", "base", "large", "giant")} | {"pair (ours)"}
    assert panels["pair (ours)"]["norm"].tolist() == pytest.approx([6.0] * 8)
    small = panels["DINOv2+reg small"]
    assert small[(small.block == 5) & (small.register == "reg1")]["norm"].item() == pytest.approx(99.15)


def test_training_reports_the_end_without_the_patch_embedding() -> None:
    log = xr.Dataset(
        {
            "accuracy": ("step", [0.1, 0.7]),
            "top1": (("step", "layer"), [[9.0, 1.0], [9.0, 1.5]]),
            "sink": (("step", "block", "kind"), [[[1.0, 2.0]], [[5.0, 7.0]]]),
        },
        coords={"step": [0, 10], "kind": ["cls", "patch"]},
    )
    row = report.training.training({"m": log}).iloc[0]
    assert (row["steps"], row["accuracy"], row["top-1% ratio"], row["attention sink"]) == (10, 0.7, 1.5, 7.0)


def test_the_hunt_says_where_outliers_sit() -> None:
    """The same planted outliers, on background or on objects: emerged both times, the paper's artifact once."""
    a = planted(120).isel(layer=[0, 1])
    back, front = np.zeros((120, 15)), np.ones((120, 15))
    back[:, 0], front[:, 0] = 1, 0  # the first patch is the only background, or the only object
    back[:, 5:8], front[:, 5:8] = 1, 0
    found = report.training.emergence_verdicts({"b": a, "o": a, "u": a}, {"b": back, "o": front, "u": None}).set_index(
        "model"
    )
    assert found["emerged"].tolist() == ["yes"] * 3
    assert found["layer"].tolist() == ["1 of 1"] * 3
    assert found["artifact"].tolist() == ["yes", "no", "?"]
    assert found.loc["b", "background, %"].startswith("12.5 [")
    assert found.loc["b", "rest, %"] == "0.0 [0.0, 0.0]"
    quiet = report.training.emergence_verdicts(
        {"q": a.isel(layer=[0, 0]).assign_coords(layer=[0, 1])}, {"q": back}
    ).iloc[0]
    assert (quiet["emerged"], quiet["artifact"], quiet["background, %"]) == ("no", "no", "")


def test_emergence_over_training() -> None:
    sink = np.ones((4, 2, 3))
    sink[2:, 1, 2] = 12
    log = xr.Dataset(
        {
            "top1": (("step", "layer"), [[9, 1, 1], [9, 2, 5], [9, 3, 1], [9, 2, 2]]),
            "sink": (("step", "block", "kind"), sink),
        },
        coords={"step": [0, 16, 32, 64], "layer": [0, 1, 2], "block": [1, 2], "kind": ["cls", "register", "patch"]},
    )
    row = report.training.emergence({"m": log}).iloc[0]
    assert row.tolist() == ["m", 64, 5.0, 16, 2.0, 32]
    quiet = log.assign(sink=log["sink"] * 0)
    assert report.training.emergence({"m": quiet}).iloc[0]["first sink of 10 shares"] == "never"


def test_sizes_are_in_order() -> None:
    a = planted(4)
    assert list(report.norms.sizes({"big": a, "small": a}, {"big": 2_000_000, "small": 150_000})) == [
        "small\n0.15 M",
        "big\n2.00 M",
    ]


def test_the_zoo_in_a_table() -> None:
    found = report.training.zoo(["mae-pico", "nothing-pico"]).set_index("model")
    assert found.index.tolist() == ["mae-pico", "mae-pico-reg4"]
    assert found["registers"].tolist() == [0, 4]
    assert found["head or zero-shot"].tolist() == ["–", "–"]
    assert all(" / " in cell for cell in found["linear, colour"])
    assert report.training.pairs(["mae-pico", "nothing-pico"]).keys() == {"mae-pico"}
    assert list(report.training.pairs(["mae-pico"])["mae-pico"]) == ["no registers", "4 registers"]


def test_a_recipe_in_a_table() -> None:
    found = report.training.settings({"lr": 0.1, "difficulty": {"objects": 1}, "layer_scale": None})
    assert found.to_dict("list") == {"setting": ["lr", "layer_scale"], "value": ["0.1", "None"]}


def with_register(norms: np.ndarray) -> xr.DataArray:
    """[image, layer, token] of CLS, one register and 15 patches."""
    return array(norms, ("image", "layer", "token"), layer=list(range(norms.shape[1])))


def planted_pair(count: int = 60) -> dict[str, xr.DataArray]:
    """Two outliers in each image without a register, one in every tenth image with one, whose norm is always 40."""
    rng = np.random.default_rng(1)
    plain = 10 * np.exp(0.05 * rng.standard_normal((count, 2, 17)))
    cured = plain.copy()
    plain[:, 1, 2:4] = 100 * np.exp(0.05 * rng.standard_normal((count, 2)))
    cured[::10, 1, 2] = 100
    cured[:, 0, 1], cured[:, 1, 1] = 0, 40  # a zero token enters
    without = with_register(plain).isel(token=[0, *range(2, 17)])
    return {"net": without, "net+tt1": with_register(cured)}


def test_what_a_register_leaves_of_the_norms() -> None:
    table = report.norms.without_and_with(planted_pair()).set_index("model")
    first = {c: [v.split()[0] for v in table[c]] for c in table.columns}
    assert first["above the cut-off, %"] == ["13.33", "0.67"]  # 2 of 15 patches; 6 of 900
    assert first["of the first's, %"] == ["100.0", "5.0"]
    assert float(first["largest / median"][0]) == pytest.approx(10.4, abs=0.3)
    assert float(first["over the first's"][1]) == pytest.approx(0.13, abs=0.02)
    assert first["register / median"][0] == "–"
    assert float(first["register / median"][1]) == pytest.approx(4, abs=0.05)
    assert first["its variation"][1] == "0.00"
    alone = report.norms.without_and_with({"net": planted_pair()["net"].isel(layer=[0])})
    assert "of the first's, %" not in alone  # no cut-off: nothing is left of nothing


def planted_boxes(hits: list[float], covered: float) -> xr.Dataset:
    """CorLoc of four images, the last without a true box, at one setting."""
    at = ("projection", "setting", "image")
    return xr.Dataset(
        {
            "hit": (at, np.array([[[*hits, np.nan]]])),
            "covered": (at, np.full((1, 1, 4), covered)),
            "baseline": (("rule", "image"), [[1.0, 1.0, 0.0, np.nan]]),
        },
        coords={"projection": ["value"], "setting": ["bias 0"], "rule": ["whole image"]},
    )


def test_a_score_stands_beside_what_its_boxes_cover_and_its_control() -> None:
    found = {
        "a": planted_boxes([0, 0, 1], 0.2),
        "b": planted_boxes([1, 1, 1], 0.95),
        "c": planted_boxes([0, 1, 1], 0.5),
    }
    table = report.lost.settings(found)
    row = {k: v.split()[0] for k, v in table.loc["bias 0"].items()}
    assert row["a", "CorLoc"] == "33.3"
    assert (row["b", "CorLoc"], row["b", "− first"], row["b", "covered"]) == ("100.0", "+66.7", "95")
    assert (row["c", "− first"], row["c", "second − it"]) == ("+33.3", "+33.3")
    assert ("a", "− first") not in row
    assert ("b", "second − it") not in row
    assert table.loc["whole image (no model)", ("b", "CorLoc")] == "66.7"


def test_components_far_out_are_counted_and_compared() -> None:
    maps = np.zeros((2, 1, 2, 5))
    smooth = xr.Dataset({"maps": (("image", "component", "y", "x"), maps.copy())})
    maps[:, 0, 0, 0] = [4, -4]
    spots = xr.Dataset({"maps": (("image", "component", "y", "x"), maps)})
    table = report.features.beyond({"spots": spots, "smooth": smooth})
    assert table["beyond 3σ, %"].tolist() == ["10.000 [10.000, 10.000]", "0.000 [0.000, 0.000]"]
    assert table["the first minus it, points"].tolist() == ["–", "+10.000 [+10.000, +10.000]"]


def planted_scores(right: list[float], overlap: int) -> tuple[xr.Dataset, xr.Dataset]:
    """Classes of four images; masks of two, of whose ten pixels of one class so many agree."""
    each = np.array([right])
    score = each.mean()
    facts = {k: ("metric", [score]) for k in ("score", "low", "high")} | {"n": ("metric", [4])}
    classes = xr.Dataset({**facts, "each": (("mean", "image"), each)}, coords={"metric": ["label"], "mean": ["label"]})
    counts = np.tile(np.array([[overlap], [20]]), (1, 2, 1, 1))
    of = overlap / (20 - overlap)
    facts = {k: ("metric", [of]) for k in ("score", "low", "high")} | {"n": ("metric", [2])}
    segments = xr.Dataset(
        {**facts, "counts": (("segments", "image", "side", "class"), counts)},
        coords={"metric": ["mask mIoU"], "segments": ["mask mIoU"]},
    )
    return classes, segments


def test_scores_without_and_with_a_register_stand_beside_the_papers() -> None:
    (c0, s0), (c1, s1) = planted_scores([1, 1, 0, 0], 10), planted_scores([1, 1, 1, 0], 10)
    right = np.array([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]], float)
    answers = xr.Dataset({"right": (("change", "image"), right)}, coords={"change": ["untouched", "+zero1", "+tt1"]})
    table = report.transfer.beside_paper({"n": c0, "n+tt1": c1}, {"n": s0, "n+tt1": s1}, answers)
    assert table["DINOv2 ViT-L (paper)", "difference"].tolist() == ["+0.5", "+1.3", "+0.5"]
    here = table["here"].map(lambda v: v.split()[0])
    assert here["without"].tolist() == ["50.0", "100.0", "25.0"]
    assert here["difference"].tolist() == ["+25.0", "+0.0", "+25.0"]
    assert table["", "images"].tolist() == ["4", "2", "4"]


def test_names_of_one_network_become_what_was_done_to_it() -> None:
    assert report.format.variants(["net", "net+tt1"]) == {"net": "untouched", "net+tt1": "+tt1"}
    assert report.format.variants(["net", "other+tt1"]) == {"net": "net", "other+tt1": "other+tt1"}
    assert report.format.variants(["net"]) == {"net": "net"}
