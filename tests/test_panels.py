"""What chapters print and draw of published networks, on planted arrays."""

import numpy as np
import xarray as xr

from vitregs import report
from vitregs.arrays import token_coords

GRID, IMAGES, LAYERS, HEADS = (6, 6), 12, 3, 2
KINDS = ["cls"] + ["patch"] * 36
HOT = np.zeros((IMAGES, 36), bool)
HOT[np.arange(IMAGES), np.arange(IMAGES) % 36] = True
HOT[np.arange(IMAGES), 35 - np.arange(IMAGES) % 36] = True


def coords() -> dict[str, object]:
    return token_coords(KINDS, GRID)


def norms() -> xr.DataArray:
    """Ones with a little noise; marked patches 5 times as long in the last layer, as long as the others before."""
    values = 1 + 0.03 * np.random.default_rng(0).standard_normal((IMAGES, LAYERS, 37))
    values[:, -1, 1:][HOT] *= 5
    return xr.DataArray(values, dims=("image", "layer", "token"), coords={"layer": range(LAYERS), **coords()})


def test_attention_on_marked_patches_is_told_head_by_head() -> None:
    rows = np.ones((IMAGES, 1, HEADS, 1, 37))
    rows[:, 0, 1, 0, 1:][HOT] = 18.0  # of 34 + 2 x 18 = 70: 18 / 70 x 36 fair shares
    maps = xr.DataArray(rows, dims=("image", "layer", "head", "query", "token"), coords=coords())
    drawn = np.where(HOT, 7.0, 0.5)[:, None]
    drawn = np.concatenate([np.full((IMAGES, 1, 1), 90.0), drawn], -1)  # CLS is no patch
    received = xr.DataArray(drawn, dims=("image", "layer", "token"), coords=coords())
    table = report.attention.on_marked(
        {"net": maps, "other": maps}, {"net": norms()}, {"net": received, "other": 2 * received}
    )
    row = table.loc["net"]
    np.testing.assert_allclose([row["CLS, marked, least head"], row["CLS, marked, most head"]], [1, 18 / 70 * 36])
    np.testing.assert_allclose(table["all queries, marked"], [7, 14])
    np.testing.assert_allclose(table["all queries, others"], [0.5, 1])
    assert row["peak, %"].startswith(f"{100 * 9.5 / (34 + 2 * 9.5):.2f} [")
    assert list(table.index) == ["net", "other"]


def test_marked_patches_are_followed_through_the_layers() -> None:
    figure = report.norms.plot_marked({"net": norms()})
    others, marked = figure.axes[0].lines
    np.testing.assert_allclose(others.get_ydata(), 1, atol=0.05)
    np.testing.assert_allclose(marked.get_ydata(), [1, 1, 5], atol=0.2)


def test_fingerprints_as_a_table() -> None:
    parts = {"part": ["mode", "cause"], "answer": ("part", ["for", "not measured"])}
    data = {k: ("part", [v, np.nan]) for k, v in (("value", 2.0), ("low", 1.9), ("high", 2.1), ("control", 1.0))}
    table = report.norms.fingerprints({"net": xr.Dataset(data, parts, {"word": "artifacts, mild"})})
    assert table.loc[("net: artifacts, mild", "mode")].tolist()[:3] == ["for", "2.00 [1.90, 2.10]", "1"]
    assert table.loc[("net: artifacts, mild", "cause")].tolist()[:3] == ["not measured", "–", "–"]


def test_pandas_cuts_no_sentence_of_the_fingerprints() -> None:
    parts = {"part": list(report.norms.MEANT)[:2], "answer": ("part", ["for", "for"])}
    data = {k: ("part", [2.0, 0.5]) for k in ("value", "low", "high", "control")}
    facts = {"place: content": 0.23, "place: content_low": 0.16, "place: content_high": 0.3, "place: chance": 0.04}
    table = report.norms.fingerprints({"net": xr.Dataset(data, parts, {"word": "artifacts, mild"} | facts)})
    assert len(table) == 3
    assert "..." not in table.to_html()
    assert all(len(said) < 50 for both in report.norms.MEANT.values() for said in both)


def test_places_of_marked_patches() -> None:
    patch = {k: (d, np.asarray(v)[1:]) for k, (d, v) in coords().items()}
    background = HOT.astype(float)
    background[0] = np.nan  # an image without a mask is left out
    given = {k: xr.DataArray(v, dims=("image", "token"), coords=patch) for k, v in (("m", HOT), ("b", background))}
    similar = xr.DataArray(np.where(HOT, 0.9, 0.5), dims=("image", "token"), coords=patch)
    table = report.tokens.places({"net": (given["m"], "outliers")}, {"net": similar}, {"net": given["b"]})
    assert table.loc[("net", "cosine to the neighbours")].tolist() == ["0.90 [0.90, 0.90]", "0.50 [0.50, 0.50]"]
    assert table.loc[("net", "pure background, %")].tolist() == ["100.00 [100.00, 100.00]", "0.00 [0.00, 0.00]"]
    edge = (
        100
        * np.array([[y in (0, 5) or x in (0, 5) for x in range(6)] for y in range(6)]).ravel()[HOT.nonzero()[1]].mean()
    )
    assert table.loc[("net", "on the border, %"), "outliers"].startswith(f"{edge:.2f} [")


def test_scores_of_single_tokens_on_real_data() -> None:
    def part(task: str, tokens: list[str]) -> xr.Dataset:
        data = {k: (("task", "token"), [[v] * len(tokens)]) for k, v in (("score", 0.5), ("low", 0.4), ("high", 0.6))}
        return xr.Dataset(data, {"task": [task], "token": tokens})

    table = report.tokens.real_tokens([{"a": part("X", ["cls"]), "b": part("X", ["cls", "register"])}])
    assert table.loc[("X", "a")].tolist() == ["50.00 [40.00, 60.00]", "–"]
    assert table.loc[("X", "b"), "register"] == "50.00 [40.00, 60.00]"


def test_the_picture_of_the_cure_has_one_scale_of_norms() -> None:
    images, maps = np.zeros((2, 12, 12, 3)), np.arange(72.0).reshape(2, 6, 6)
    figure = report.remedies.plot_cure(images, (maps, maps / 2), (maps, maps * 9))
    assert len(figure.axes) == 10
    limits = [axis.images[0].get_clim() for axis in figure.axes]
    assert limits[1] == limits[2] == limits[6] == limits[7] == (0, 71)
    assert limits[3] == (0, 35)


def test_a_fingerprint_tells_content_beside_place() -> None:
    parts = {"part": ["place"], "answer": ("part", ["for"])}
    data = {k: ("part", [v]) for k, v in (("value", 0.9), ("low", 0.8), ("high", 1.0), ("control", 0.6))}
    facts = {"place: content": 0.23, "place: content_low": 0.16, "place: content_high": 0.3, "place: chance": 0.04}
    table = report.norms.fingerprints({"net": xr.Dataset(data, parts, {"word": "artifacts, mild"} | facts)})
    assert table.loc[("net: artifacts, mild", "place, by content")].tolist()[:3] == ["for", "0.23 [0.16, 0.30]", "0.04"]
