"""The published numbers: complete, sourced, equal to what was printed, and consistent with what can be computed."""

import numpy as np
import pandas as pd
import pytest
import torch

from vitregs.data import published
from vitregs.errors import InputError

FILES = ("claims", "fig11", "fig12", "norms", "peers", "register_norms", "small_models", "tables")
NUMBERS = {
    "claims": [],
    "tables": ["value", "std", "registers"],
    "norms": ["value", "low", "high"],
    "peers": ["value", "std"],
    "register_norms": ["block", "register", "norm_of_mean"],
    "small_models": ["without_registers", "with_4_registers"],
    "fig11": ["index", "value"],
    "fig12": ["registers", "flops_increase_percent", "params_increase_percent"],
}
G, L, B, C = "DINOv2 ViT-g/14", "DINOv2 ViT-L/14", "DeiT-III ViT-B/16", "OpenCLIP ViT-B/16"
SPOT = [
    ("tables", {"table": "table_1", "token": "cls", "dataset": "ImageNet-1k"}, 86.0),
    ("tables", {"table": "table_1", "token": "outlier", "dataset": "Caltech101"}, 97.6),
    ("tables", {"table": "table_6", "token": "normal", "dataset": "Aircraft"}, 17.1),
    ("tables", {"table": "table_6", "token": "outlier", "dataset": "CUB", "column": "std"}, 2.1),
    ("tables", {"table": "table_6", "token": "normal", "dataset": "VOC2007", "column": "std"}, 0.5),
    ("tables", {"table": "table_2a", "model": B, "registers": 4, "quantity": "rmse"}, 0.512),
    ("tables", {"table": "table_2a", "model": C, "registers": 0, "quantity": "miou"}, 26.6),
    ("tables", {"table": "table_2a", "model": L, "registers": 4, "quantity": "top1"}, 84.8),
    ("tables", {"table": "table_2b", "registers": 4}, 60.1),
    ("tables", {"table": "table_3", "model": L, "registers": 0, "dataset": "VOC2012"}, 40.2),
    ("tables", {"table": "table_3", "model": L, "registers": 4, "dataset": "COCO20k"}, 42.0),
    ("tables", {"table": "table_3", "model": C, "registers": 4, "dataset": "VOC2007"}, 37.1),
    ("tables", {"table": "table_4", "token": "register"}, 71.1),
    ("tables", {"table": "table_4", "token": "outlier"}, 73.3),
    ("tables", {"table": "table_5", "registers": 4, "quantity": "position_top1"}, 65.8),
    ("tables", {"table": "fig_5b", "token": "outlier", "quantity": "position_distance"}, 5.09),
    ("tables", {"table": "fig_5b", "token": "normal", "quantity": "reconstruction_l2"}, 18.38),
    ("tables", {"table": "fig_8", "registers": 16, "quantity": "top1"}, 84.80),
    ("tables", {"table": "fig_8", "registers": 8, "quantity": "mean_rmse"}, 2.729),
    ("tables", {"table": "lost", "model": "DINO ViT-B/16", "dataset": "VOC2012"}, 63.3),
    ("norms", {"figure": "fig_3", "quantity": "cutoff"}, 150),
    ("norms", {"figure": "fig_3", "quantity": "share_above_cutoff"}, 2.37),
    ("norms", {"quantity": "first_outlier_layer", "model": G}, 15),
    ("norms", {"quantity": "training_iterations"}, 625000),
    ("norms", {"quantity": "register_2_norm"}, 130),
    ("norms", {"figure": "fig_7", "model": B, "quantity": "outlier_norm", "column": "high"}, 1400),
    ("norms", {"figure": "fig_15", "quantity": "outlier_norm", "column": "low"}, 50),
    (
        "register_norms",
        {"model": "DINOv2+reg base", "block": 7, "register": 3, "column": "norm_of_mean"},
        17.98,
    ),
    ("small_models", {"data": "Tiny-ImageNet", "column": "with_4_registers"}, 37.86),
    ("small_models", {"data": "CUB", "token": "outlier", "column": "without_registers"}, 84.6),
    ("peers", {"model": "ViT-S/16", "condition": "none", "quantity": "max_activation", "column": "std"}, 81),
    ("peers", {"model": G, "condition": "sinder", "quantity": "miou"}, 51.11),
    ("fig12", {"model": "ViT-L/14", "registers": 16, "column": "params_increase_percent"}, 0.0054),
]


def test_the_files_are_the_ones_the_readme_describes() -> None:
    assert published.names() == FILES
    readme = (published.FOLDER / "README.md").read_text(encoding="utf-8")
    assert all(f"**{name}.csv**" in readme for name in FILES)
    assert all(f"| {word} |" in readme for word in published.EVIDENCE)


@pytest.mark.parametrize("name", FILES)
def test_rows_are_sourced_numeric_and_named_once(name: str) -> None:
    frame = published.table(name)
    assert not frame[["source", "evidence"]].isna().any(axis=None)
    assert set(frame["evidence"]) <= set(published.EVIDENCE)
    assert all(pd.api.types.is_numeric_dtype(frame[c]) for c in NUMBERS[name])
    assert all(c == c.lower() and " " not in c for c in frame.columns)
    reading = [c for c in NUMBERS[name] if c not in ("registers", "block", "register", "index")]
    assert not reading or frame[reading].notna().any(axis=1).all()  # the ledger of claims holds text
    keys = [c for c in frame.columns if c not in {*reading, "unit", "note", "evidence"}]
    assert not frame.duplicated(keys).any()


@pytest.mark.parametrize(("name", "where", "expected"), SPOT)
def test_spot_values(name: str, where: dict[str, object], expected: float) -> None:
    assert published.value(name, **where) == expected  # type: ignore[arg-type]


def test_sizes_with_outliers() -> None:
    norms = published.table("norms").query("figure == 'fig_4c'").set_index("model")["value"]
    assert norms.to_dict() == {f"DINOv2 ViT-{size}": float(size in "LHg") for size in "TSBLHg"}


def test_complete_tables() -> None:
    tables = published.table("tables")
    counts = tables["table"].value_counts()
    expected = {"table_1": 42, "table_2a": 18, "table_2b": 2, "table_3": 18, "table_4": 6, "table_5": 4, "table_6": 42}
    assert {k: counts[k] for k in expected} == expected
    assert (counts["fig_5b"], counts["fig_8"]) == (6, 18)
    wide = tables[tables["table"].isin(["table_1", "table_6"])].pivot_table(
        index=["token", "dataset"], columns="table", values="value"
    )
    assert (wide["table_1"] == wide["table_6"]).all()
    counts = published.table("register_norms").groupby("model").size()
    assert counts.to_dict() == {f"DINOv2+reg {k}": 4 * n for k, n in zip(
        ("small", "base", "large", "giant"), (12, 12, 24, 40), strict=True
    )}  # fmt: skip


def test_ranges_are_ordered_and_shares_possible() -> None:
    norms = published.table("norms").dropna(subset=["low", "high"])
    assert (norms["low"] < norms["high"]).all()
    for name in ("tables", "peers"):
        frame = published.table(name)
        assert frame.loc[frame["unit"] == "%", "value"].lt(150).all()
        assert frame["std"].dropna().ge(0).all()


def test_the_same_fact_is_the_same_in_two_files() -> None:
    where = {"source": "test-time registers (arXiv 2506.08010)", "model": L}
    for data, quantity in (("VOC2007", "corloc"), ("ADE20k", "miou")):
        for column, condition in (("without_registers", "none"), ("with_4_registers", "trained_registers")):
            twin = published.value("peers", data=data, quantity=quantity, condition=condition, **where)
            assert published.value("small_models", column, data=data, quantity=quantity, **where) == twin


@pytest.mark.parametrize(
    ("variant", "how"),
    [
        ("no_antialias_size", {"size": (7, 7)}),
        ("no_antialias_scale", {"scale_factor": (7.1 / 16, 7.1 / 16)}),
        ("antialias_size", {"size": (7, 7), "antialias": True}),
    ],
)
def test_fig11_is_what_torch_gives(variant: str, how: dict[str, object]) -> None:
    rows = published.table("fig11").query("variant == @variant")
    assert rows["index"].tolist() == list(range(16))
    vector = rows["value"].to_numpy()
    assert vector.sum() == pytest.approx(7, abs=16 * 5e-4)
    image = torch.zeros(1, 1, 16, 16, dtype=torch.float64, requires_grad=True)
    resized = torch.nn.functional.interpolate(image, mode="bicubic", align_corners=False, **how)  # type: ignore[arg-type]
    assert resized.shape[-2:] == (7, 7)
    (gradient,) = torch.autograd.grad(resized.sum(), image)
    plane = gradient[0, 0].numpy()
    np.testing.assert_allclose(plane.sum(0) / 7, vector, atol=6e-4)
    np.testing.assert_allclose(plane.sum(1) / 7, vector, atol=6e-4)
    np.testing.assert_allclose(plane, np.outer(plane.sum(1), plane.sum(0)) / 49, atol=1e-9)


def test_fig12_follows_from_the_formula() -> None:
    sizes = {"ViT-S/14": (384, 12), "ViT-B/14": (768, 12), "ViT-L/14": (1024, 24), "ViT-g/14": (1536, 40)}

    def macs(tokens: int, width: int, depth: int) -> int:
        blocks = depth * (12 * tokens * width**2 + 2 * tokens**2 * width)
        return blocks + 256 * 14 * 14 * 3 * width

    for row in published.table("fig12").to_dict("records"):
        width, depth = sizes[row["model"]]
        more = 100 * (macs(257 + row["registers"], width, depth) / macs(257, width, depth) - 1)
        assert row["flops_increase_percent"] == pytest.approx(more, abs=0.005001)
        if row["model"] == "ViT-L/14":
            more = 100 * row["registers"] * 1024 / 304e6
            assert row["params_increase_percent"] == pytest.approx(more, abs=0.000051)


def test_value_matches_empty_cells() -> None:
    where = {"table": "table_5", "quantity": "reconstruction_l2", "registers": 0}
    assert published.value("tables", dataset=None, **where) == 15.9


@pytest.mark.parametrize(
    ("name", "where", "message"),
    [
        ("table", {}, "did you mean 'tables'"),
        ("tables", {"tabel": "table_1"}, "did you mean 'table'"),
        ("tables", {"table": "table_2b", "column": "values"}, "did you mean 'value'"),
        ("tables", {"table": "table_22a"}, "unknown table"),
        ("tables", {"table": "table_4", "registers": 1, "token": "outlier"}, "unknown token"),
        ("tables", {"table": "table_2b"}, "2 rows .* give also one of registers"),
        ("norms", {"figure": "fig_3", "quantity": "valley"}, "gives no number in column 'value'"),
        ("norms", {"figure": "fig_3", "quantity": "valley", "column": "model"}, "gives no number"),
    ],
)
def test_value_says_what_is_wrong(name: str, where: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        published.value(name, **where)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("value,source\n1,here\n", "without evidence"),
        ("value,source,evidence\n1,,paper\n", "without source"),
        ("value,source,evidence\n1,here,papers\n", "did you mean 'paper'"),
        ("value,source,evidence\n1,here,paper\n1,here,paper\n", "row 2 twice"),
    ],
)
def test_table_refuses_broken_files(tmp_path, text: str, message: str) -> None:
    (tmp_path / "broken.csv").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        published.table("broken", tmp_path)
