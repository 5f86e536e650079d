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
