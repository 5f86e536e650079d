"""LOST against a slow version written from the protocol, planted objects, properties, and what users get wrong."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from PIL import Image
from scipy import ndimage

from vitregs import arrays, report
from vitregs.arrays import token_coords
from vitregs.data import decoding, images, published
from vitregs.errors import InputError
from vitregs.measure import lost
from vitregs.models import capture, registry

PATCH = (8, 4)  # pixels, rows before columns


def slow_lost(features, shape, patch, bias, candidates=100, normalise=False):
    """One image, step by step from the protocol: (patches, channels) → seed, box in pixels, score, row, expansion, mask."""
    f = features.astype(np.float64)
    if normalise:
        f = f / np.linalg.norm(f, axis=1, keepdims=True)
    n = len(f)
    gram = np.array([[f[i] @ f[j] for j in range(n)] for i in range(n)])
    if bias == "centre":
        bias = -np.mean([gram[i, j] for i in range(n) for j in range(n) if i != j])
    gram = gram + bias
    clipped = gram.copy()
    np.fill_diagonal(clipped, 0)
    clipped[clipped < 0] = 0
    clipped = (clipped + clipped.T) / 2
    score = np.array([-sum(1 for v in row if v > 0) for row in clipped])
    ranked = sorted(range(n), key=lambda i: (-score[i], i))  # ties: the first patch, row by row
    seed = ranked[0]
    kept = [i for i in ranked[:candidates] if gram[seed, i] > 0]
    expansion = sum((gram[i] for i in kept), np.zeros(n))
    positive = (expansion > 0).reshape(shape)
    positive.flat[seed] = True  # if nothing resembles the seed, not even itself
    labels, _ = ndimage.label(positive)
    mask = labels == labels.flat[seed]
    y, x = np.nonzero(mask)
    box = [y.min() * patch[0], x.min() * patch[1], (y.max() + 1) * patch[0], (x.max() + 1) * patch[1]]
    return seed, box, score.reshape(shape), gram[seed].reshape(shape), expansion.reshape(shape), mask


def labelled(values: np.ndarray, shape: tuple[int, int], registers: int = 0, cls: bool = False) -> xr.DataArray:
    kinds = ["cls"] * cls + ["register"] * registers + ["patch"] * (shape[0] * shape[1])
    return xr.DataArray(values, dims=("image", "token", "channel"), coords=token_coords(kinds, shape))


def exact(values: np.ndarray, steps: int = 8) -> np.ndarray:
    """Rounded so that sums of products are exact in float32, in whatever order they are made."""
    return (np.round(np.asarray(values) * steps) / steps).astype(np.float32)


def random_features(n: int, shape: tuple[int, int], channels: int = 12, seed: int = 0, steps: int = 8) -> np.ndarray:
    """Features with a drift across the grid, so that components are neither dust nor everything."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((n, *shape, channels))
    smooth = (
        ndimage.gaussian_filter(noise, (0, 1.2, 1.2, 0)) * 3
        + 0.3 * noise
        + rng.standard_normal((n, 1, 1, channels)) / 3
    )
    return exact(smooth.reshape(n, -1, channels), steps)


def compare(features: xr.DataArray, shape: tuple[int, int], patch=PATCH, **options) -> None:
    found = lost.lost(features, patch_size=patch, **options)
    plain = arrays.patches(features).values
    for i, one in enumerate(plain):
        seed, box, score, similarity, expansion, mask = slow_lost(one, shape, patch, **{"bias": 0.0, **options})
        assert int(found["seed"][i]) == seed
        assert found["box"][i].values.tolist() == box
        np.testing.assert_array_equal(found["score"][i], score)
        np.testing.assert_array_equal(found["mask"][i], mask)
        scale = np.abs(expansion).max() + 1
        np.testing.assert_allclose(found["similarity"][i], similarity, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(found["expansion"][i], expansion, rtol=1e-4, atol=1e-5 * scale)


# --- the protocol


@pytest.mark.parametrize("shape", [(5, 9), (8, 8), (11, 4), (2, 7)])
@pytest.mark.parametrize("bias", [0.0, "centre", -2.25, 1.5])
def test_random_features_box_for_box(shape, bias):
    values = random_features(12, shape, seed=shape[0])
    compare(labelled(values, shape), shape, bias=bias)
    compare(labelled(values, shape), shape, bias=bias, candidates=7)


@pytest.mark.parametrize("bias", [-0.6, -0.25, 0.0, "centre"])
def test_normalised_features_box_for_box(bias):
    values = random_features(8, (6, 9), steps=2**16)  # on a coarse grid products are exactly 0, which no division keeps
    compare(labelled(values, (6, 9)), (6, 9), bias=bias, normalise=True)


def test_ties_go_to_the_first_patch_row_by_row():
    signs = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], (20, 35, 3)).astype(np.float32)  # zeros and equal degrees
    compare(labelled(signs, (5, 7)), (5, 7), bias=0.0)
    compare(labelled(signs, (5, 7)), (5, 7), bias=-1.0, candidates=5)
    same = labelled(np.ones((1, 35, 3), np.float32), (5, 7))
    assert int(lost.lost(same, patch_size=PATCH)["seed"][0]) == 0
    assert lost.lost(same, patch_size=PATCH)["box"].values.tolist() == [[0, 0, 40, 28]]


def test_a_seed_without_friends_is_the_object():
    features = labelled(random_features(3, (5, 6)), (5, 6))
    found = lost.lost(features, patch_size=PATCH, bias=-1e6)
    assert found["mask"].sum(("y", "x")).values.tolist() == [1, 1, 1]
    assert found["box"].values.tolist() == [[0, 0, 8, 4]] * 3  # all degrees are 0
    compare(features, (5, 6), bias=-1e6)


def test_zoo_models_box_for_box():
    for name in ("dinov2-pico-reg4", "supervised-pico"):
        backbone = registry.load(name, device="cpu")
        source = images.open_images("scenes", size=(64, 96), count=6)
        for which in lost.PROJECTIONS:
            raw = capture.projections(backbone, source, which=which)
            shape = backbone.grid(source.size)
            for bias in (0.0, "centre"):
                compare(raw.copy(data=exact(raw, 16)), shape, backbone.patch_size, bias=bias)


def test_a_published_model_on_photographs_box_for_box(shared_data: Path):
    weights = str(shared_data / "deit-tiny" / "deit_tiny_patch16_224.safetensors")
    backbone = registry.load("deit_tiny_patch16_224", weights=weights, device="cpu")
    source = images.open_images(str(shared_data / "coco-256"), size=(160, 224), count=8)
    for which in lost.PROJECTIONS:
        raw = capture.projections(backbone, source, which=which)
        for bias in (0.0, "centre"):
            compare(raw, (10, 14), backbone.patch_size, bias=bias)


@pytest.mark.parametrize("shape", [(6, 11), (9, 5), (2, 2)])
def test_components_against_scipy(shape):
    rng = np.random.default_rng(1)
    masks = rng.random((300, *shape)) < rng.uniform(0.3, 0.9, (300, 1, 1))
    seeds = rng.integers(0, shape[0] * shape[1], 300)
    masks.reshape(300, -1)[np.arange(300), seeds] = True
    at = np.arange(shape[0] * shape[1]) == seeds[:, None]
    found = lost._component(torch.from_numpy(masks), torch.from_numpy(at)).numpy()
    for mask, seed, mine in zip(masks, seeds, found, strict=True):
        labels, _ = ndimage.label(mask)
        np.testing.assert_array_equal(mine, labels == labels.flat[seed])


def test_a_component_may_wind():
    spiral = np.array(
        [[1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 0, 1], [1, 0, 0, 1, 0, 1], [1, 0, 1, 1, 0, 1], [1, 0, 0, 0, 0, 1],
         [1, 1, 1, 1, 1, 1]], bool,
    )  # fmt: skip
    start = torch.zeros(1, spiral.size, dtype=torch.bool)
    start[0, 0] = True
    found = lost._component(torch.from_numpy(spiral[None]), start)
    np.testing.assert_array_equal(found[0], spiral)


# --- properties


def test_order_and_batch_do_not_matter(monkeypatch):
    features = labelled(random_features(9, (6, 7)), (6, 7))
    whole = lost.lost(features, patch_size=PATCH, bias="centre")
    turn = np.random.default_rng(0).permutation(9)
    xr.testing.assert_identical(whole.isel(image=turn), lost.lost(features[turn], patch_size=PATCH, bias="centre"))
    monkeypatch.setattr(lost, "CACHE", 2 * 42**2)  # two images at a time
    xr.testing.assert_identical(whole, lost.lost(features, patch_size=PATCH, bias="centre"))


@pytest.mark.parametrize("registers", [0, 1, 4, 16])
def test_registers_and_cls_never_matter(registers):
    values = random_features(4, (5, 8))
    extra = 100 * np.random.default_rng(1).standard_normal((4, registers + 1, values.shape[-1])).astype(np.float32)
    with_prefix = labelled(np.concatenate([extra, values], 1), (5, 8), registers=registers, cls=True)
    found = lost.lost(with_prefix, patch_size=PATCH)
    xr.testing.assert_equal(found, lost.lost(labelled(values, (5, 8)), patch_size=PATCH))


def test_length_and_rotation_of_features_do_not_matter():
    values = random_features(5, (6, 5))
    turned = values[..., ::-1] * np.float32(4)
    one, two = (lost.lost(labelled(v, (6, 5)), patch_size=PATCH) for v in (values, turned))
    xr.testing.assert_equal(one["box"], two["box"])
    xr.testing.assert_equal(one["mask"], two["mask"])


def test_boxes_end_where_a_padded_image_ends():
    same = labelled(np.ones((1, 30, 3), np.float32), (5, 6))
    assert lost.lost(same, patch_size=PATCH, size=(37, 22))["box"].values.tolist() == [[0, 0, 37, 22]]


# --- scores


def planted(n: int = 30, shape: tuple[int, int] = (7, 10)) -> tuple[xr.DataArray, list[np.ndarray]]:
    """A small rectangle of one direction on a ground of another, negatively related: LOST must find it."""
    rng = np.random.default_rng(3)
    values, truth = np.empty((n, *shape, 4), np.float32), []
    for i in range(n):
        h, w = rng.integers(1, 4, 2)
        y, x = rng.integers(0, shape[0] - h), rng.integers(0, shape[1] - w)
        values[i] = [1, -1, 0, 0]
        values[i, y : y + h, x : x + w] = [-1, 1, 0.25, 0]
        box = np.array([y * 8, x * 4, (y + h) * 8, (x + w) * 4], float)
        truth.append(np.stack([np.array([0, 0, 1, 1.0]), box]))  # another true box, which nobody can find
    return labelled(values.reshape(n, -1, 4), shape), truth


def test_planted_objects_are_found():
    features, truth = planted()
    found = lost.lost(features, patch_size=PATCH)
    np.testing.assert_array_equal(found["box"], [t[1] for t in truth])
    scored = lost.corloc(found["box"], truth, size=(56, 40))
    assert (float(scored["corloc"]), float(scored["low"]), float(scored["high"]), int(scored["n"])) == (
        100,
        100,
        100,
        30,
    )


def boxes(*rows) -> xr.DataArray:
    return xr.DataArray(np.array(rows, float), dims=("image", "side"))


def test_overlap_against_pixels():
    rng, grow = np.random.default_rng(0), np.array([0, 0, 1, 1])
    mine = np.sort(rng.integers(0, 20, (40, 2, 2)), 1).reshape(40, 4) + grow
    truth = [np.sort(rng.integers(0, 20, (k, 2, 2)), 1).reshape(k, 4) + grow for k in rng.integers(0, 4, 40)]
    found = lost.overlap(mine, truth)
    for box, true, value in zip(mine, truth, found, strict=True):
        painted = []
        for y0, x0, y1, x1 in [box, *true]:
            canvas = np.zeros((21, 21), bool)
            canvas[y0:y1, x0:x1] = True
            painted.append(canvas)
        each = [(painted[0] & p).sum() / (painted[0] | p).sum() for p in painted[1:]]
        assert value == pytest.approx(max(each)) if each else np.isnan(value)


def test_a_half_overlap_is_a_hit_and_less_is_not():
    truth = [np.array([[0, 0, 10, 10.0]])] * 2 + [np.empty((0, 4))]
    scored = lost.corloc(boxes([0, 0, 10, 5], [0, 0, 10, 4.9], [0, 0, 1, 1]), truth, size=(10, 20))
    np.testing.assert_array_equal(scored["hit"], [1, 0, np.nan])
    assert float(scored["corloc"]) == 50
    assert int(scored["n"]) == 2


def test_a_sweep_is_lost_at_each_bias():
    features, truth = planted(12)
    features = features + np.float32(1.5)  # not centred: at 0 all patches are alike
    swept = lost.sweep(features, truth, patch_size=PATCH, biases=(-1.0, -0.95, -0.8, 0.0))
    for bias in (-1.0, -0.95, -0.8, 0.0):
        found = lost.lost(features, patch_size=PATCH, bias=bias, normalise=True)
        one = lost.corloc(found["box"], truth, size=(56, 40))
        np.testing.assert_array_equal(swept["hit"].sel(bias=bias), one["hit"])
        assert float(swept["corloc"].sel(bias=bias)) == float(one["corloc"])
    assert float(swept["corloc"].max()) == 100
    assert float(swept["corloc"].sel(bias=0)) < 50


def test_a_bias_is_chosen_on_one_half_and_scored_on_the_other():
    hits = xr.DataArray(
        [[1, 1, 0, 0, 0, 0.0], [1, 0, np.nan, 1, 1, np.nan], [1, 1, 0, 1, 0, 1]],
        dims=("bias", "image"),
        coords={"bias": [-0.5, 0.0, -0.25]},
    )
    chosen = lost.choose_bias(hits)
    assert float(chosen["bias"]) == -0.25  # as good as -0.5 on the first half, and nearer to 0
    np.testing.assert_array_equal(chosen["hit"], [np.nan, np.nan, np.nan, 1, 0, 1])
    assert float(chosen["corloc"]) == pytest.approx(200 / 3)
    assert int(chosen["n"]) == 3


def test_baselines_of_known_images():
    whole, middle = np.array([[0, 0, 20, 40.0]]), np.array([[5, 10, 15, 30.0]])
    found = lost.baselines([whole, middle, np.empty((0, 4))], (20, 40), draws=2000)
    np.testing.assert_array_equal(found.sel(rule="whole image"), [1, 0, np.nan])
    np.testing.assert_array_equal(found.sel(rule="half its sides, centred"), [0, 1, np.nan])
    wanted = []  # shares of the sides are those of two uniform points: density 2 (1 - s)
    side = (np.arange(2000) + 0.5) / 2000
    for s in side[::10]:
        t = 0.5 / s
        wanted.append(2 * (1 - s) * (1 - t) ** 2 if t < 1 else 0)
    assert float(found.sel(rule="random box")[0]) == pytest.approx(np.mean(wanted), abs=0.03)


def test_ratio_of_medians_of_a_known_answer():
    length, hot = np.ones((5, 12)), np.zeros((5, 12), bool)
    hot[:4, 2:5] = True
    length[hot] = 0.25
    assert lost.ratio_of_medians(length, hot) == (0.25, 0.25, 0.25, 4)
    assert lost.ratio_of_medians(length, hot & False)[3] == 0


def test_projection_norms_of_a_value_map_that_is_insensitive_to_outliers():
    backbone = registry.load("supervised-pico", device="cpu")
    source = images.open_images("scenes", size=(64, 64), count=8)
    found = lost.projection_norms(backbone, source)
    assert list(found["projection"].values) == list(lost.PROJECTIONS)
    attention = backbone.net.blocks[-1].attn  # nothing but the bias is left of the values
    attention.qkv.weight.data[2 * backbone.width :] = 0
    attention.qkv.bias.data[2 * backbone.width :] = 1
    found = lost.projection_norms(backbone, source)
    assert float(found["ratio"].sel(projection="value")) == pytest.approx(1)
    assert (found["low"] <= found["ratio"]).all()


def test_preferred_projections():
    wanted = {"dinov2-pico": "key", "dino-pico-reg4": "key", "supervised-pico": "value", "clip-pico": "value"}
    assert {n: lost.preferred(registry.load(n, device="cpu")) for n in wanted} == wanted


def test_whole_images_are_padded_and_boxes_clipped(tmp_path: Path):
    """Images of two sizes, one of full patches and one to be padded; LOST of each is asked by hand."""
    import datasets

    backbone = registry.load("dinov2-pico", device="cpu")
    drawn = next(images.open_images("scenes", size=(64, 88), count=2).batches())
    rows = {"image": [], "boxes": []}
    for pixels, boxes_, side in zip(drawn.pixels, drawn.boxes, ((64, 88), (61, 83)), strict=True):
        buffer = io.BytesIO()
        image = (pixels.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)[: side[0], : side[1]]
        Image.fromarray(image).save(buffer, "png")
        rows["image"].append({"bytes": buffer.getvalue(), "path": None})
        rows["boxes"].append(boxes_[:, [1, 0, 3, 2]].tolist())  # as data sets have them
    kinds = datasets.Features(
        {"image": datasets.Image(), "boxes": datasets.List(datasets.List(datasets.Value("float32")))}
    )
    datasets.Dataset.from_dict(rows, features=kinds).to_parquet(tmp_path / "validation.parquet")
    source = images.open_images(str(tmp_path), size=64)
    found = lost.evaluate_full_size(backbone, source, bias=-0.3, normalise=True)
    wanted = []
    for item in source.source.items(None, 0):
        x = torch.from_numpy(np.asarray(decoding.decode(item.data), np.float32) / 255).permute(2, 0, 1)
        size = x.shape[1:]
        padded = torch.tensor(backbone.mean)[:, None, None].expand(3, 64, 88).clone()
        padded[:, : size[0], : size[1]] = x
        features = capture.projections(backbone, padded[None], which="key")
        one = lost.lost(features, patch_size=(8, 8), size=tuple(size), bias=-0.3, normalise=True)
        assert (one["box"].values <= [*size, *size]).all()
        wanted.append(lost.overlap(one["box"].values, [np.array(item.boxes)[:, [1, 0, 3, 2]]])[0] >= 0.5)
    np.testing.assert_array_equal(found["hit"], np.array(wanted, float))
    with pytest.raises(InputError, match="scenes have no size of their own"):
        lost.evaluate_full_size(backbone, images.open_images("scenes", size=64, count=2))


# --- a whole study, its tables and figures


def studied(known: bool = True, n: int = 12) -> dict[str, xr.Dataset]:
    """Studies of a pair whose hits are planted: the second finds 25 % more at bias 0 and all with the best bias."""
    found = {}
    for k, name in enumerate(("dino-pico", "dino-pico-reg4")):
        hit = np.zeros((3, 3, n))
        hit[:, 0, : n // 4 * (k + 1)] = 1
        hit[:, 2] = [[np.nan] * (n // 2) + [k] * (n // 2)] * 3
        swept = np.tile([[0.0], [k]], (3, 1, n))
        maps = np.random.default_rng(k).standard_normal((3, 3, 2, 5, 8))
        data = {
            "hit": (("projection", "rule", "image"), hit if known else hit * np.nan),
            "swept": (("projection", "bias", "image"), swept if known else swept * np.nan),
            "chosen": ("projection", np.full(3, -0.5 if known else np.nan)),
            "seed": (("projection", "rule", "image"), np.full((3, 3, n), 9)),
            "box": (("projection", "rule", "image", "side"), np.tile([0, 8, 16, 32], (3, 3, n, 1))),
        }
        data |= dict.fromkeys(report.lost.STEPS, (("projection", "rule", "drawn", "y", "x"), maps))
        coords = {"projection": list(lost.PROJECTIONS), "rule": list(lost.RULES), "bias": [-1.0, -0.5]}
        found[name] = xr.Dataset(data, coords=coords | {"used": "key", "model": name})
    return found


def test_a_study_is_made_of_its_parts():
    backbone = registry.load("dinov2-pico", device="cpu")
    source = images.open_images("scenes", size=(64, 80), count=10)
    found = lost.evaluate(backbone, source, biases=(-0.5, -0.2), candidates=20, shown=3)
    assert str(found["used"].values) == "key"
    assert found.sizes["drawn"] == 3
    truth, features = lost.ground_truth_boxes(source), capture.projections(backbone, source, which="value")
    given = {"patch_size": backbone.patch_size, "candidates": 20}
    swept = lost.sweep(features, truth, biases=(-0.5, -0.2), **given)
    picked = lost.choose_bias(swept["hit"])
    at = found.sel(projection="value")
    np.testing.assert_array_equal(at["swept"], swept["hit"])
    np.testing.assert_array_equal(at["hit"].sel(rule="best"), picked["hit"])
    assert float(at["chosen"]) == float(picked["bias"])
    settings = ({"bias": 0.0}, {"bias": "centre"}, {"bias": float(picked["bias"]), "normalise": True})
    for rule, setting in zip(lost.RULES, settings, strict=True):
        one = lost.lost(features, **given, **setting)
        np.testing.assert_array_equal(at["box"].sel(rule=rule), one["box"])
        np.testing.assert_array_equal(at["expansion"].sel(rule=rule), one["expansion"][:3])
        if rule != "best":
            scored = lost.corloc(one["box"], truth, size=source.size)
            np.testing.assert_array_equal(at["hit"].sel(rule=rule), scored["hit"])


def test_a_study_of_images_without_boxes_scores_nothing(tmp_path: Path):
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    backbone = registry.load("clip-pico-reg4", device="cpu")
    found = lost.evaluate(backbone, images.open_images(str(tmp_path), size=64), biases=(-0.5, 0.0))
    assert found["hit"].isnull().all()
    assert found["swept"].isnull().all()
    assert found["chosen"].isnull().all()
    assert (found["box"] >= 0).all()
    assert found["box"].shape == (3, 3, 3, 4)


def test_the_papers_third_table_is_whole():
    table = report.lost.published_corloc()
    assert table.shape == (6, 3)
    assert table.notna().all(axis=None)
    wanted = published.value("tables", table="table_3", model="DINOv2 ViT-L/14", registers=4, dataset="VOC2007")
    assert table.loc[("DINOv2 ViT-L/14", 4), "VOC2007"] == wanted


def test_tables_of_a_known_study():
    chance = lost.baselines([np.array([[0, 0, 40, 32.0]])] * 12, (40, 32))
    table = report.lost.scores(studied(), chance).set_index("model")
    assert table.loc["whole image (no model)", "bias 0"] == "100.0 [100.0, 100.0]"
    assert table.loc["dino-pico", "bias 0"].startswith("25.0 [")
    assert table.loc["dino-pico-reg4", "best bias"] == "100.0 [100.0, 100.0]"
    assert table.loc["dino-pico-reg4", ["feature", "at", "n"]].tolist() == ["key", "-0.50", "12, best 6"]
    gaps = report.lost.differences(studied()).set_index("pair").loc["dino-pico-reg4 − dino-pico"]
    assert gaps["bias 0"].startswith("+25.0 [+")
    assert gaps["best bias"] == "+100.0 [+100.0, +100.0]"
    curves = report.lost.curves(studied())
    assert curves["score"].tolist() == [0, 0, 0, 100]
    assert set(curves["pair"]) == {"dino-pico"}


def test_tables_and_figures_without_boxes_say_so():
    chance = lost.baselines([np.empty((0, 4))] * 12, (40, 32))
    table = report.lost.scores(studied(known=False), chance).set_index("model")
    assert table.loc["dino-pico", ["bias 0", "centred", "best bias", "at"]].tolist() == ["no boxes"] * 3 + ["–"]
    assert report.lost.differences(studied(known=False))["bias 0"].iloc[-1] == "no boxes"
    curves = report.lost.curves(studied(known=False))
    assert curves.empty
    assert "without boxes" in report.lost.plot_bias_curves(curves, np.nan).axes[0].texts[0].get_text()


def test_figures_show_boxes_where_they_are():
    found = {name: a.sel(rule="zero").isel(drawn=0, image=0) for name, a in studied().items()}
    sizes = dict.fromkeys(found, (40, 32))
    image, truth = np.zeros((40, 32, 3)), np.array([[4, 8, 20, 30.0]])
    used = {name: a.sel(projection="key") for name, a in found.items()}
    figure = report.lost.plot_steps(image, truth, used, sizes)
    assert len(figure.axes) == 9
    (true,) = figure.axes[0].patches
    assert (true.get_xy(), true.get_width(), true.get_height()) == ((8, 4), 22, 16)
    (mine,) = figure.axes[7].patches
    assert (mine.get_xy(), mine.get_width(), mine.get_height()) == ((8, 0), 24, 16)
    (dot,) = figure.axes[1].lines  # patch 9 of a grid of 5 x 8: row 1, column 1
    assert dot.get_xydata().tolist() == [[6, 12]]
    figure = report.lost.plot_projections(image, truth, found, sizes)
    assert [a.get_title() for a in figure.axes[:4]] == ["image", "keys", "queries", "values"]
    assert len(report.lost.plot_bias_curves(report.lost.curves(studied()), 3.0).axes[0].lines) == 3


# --- what users get wrong


def wrong(message: str, *given, **options) -> None:
    with pytest.raises(InputError, match=message):
        lost.lost(*given, **{"patch_size": PATCH, **options})


def test_mistakes_in_lost():
    good = labelled(random_features(2, (4, 5)), (4, 5))
    wrong("candidates must be 1 or more, not 0", good, candidates=0)
    wrong("unknown bias 'center'.*centre", good, bias="center")
    wrong("a bias must be finite, not nan", good, bias=np.nan)
    wrong("features must be finite", good.where(good["label"] != "2,2"))
    wrong("at least 2x2 patches, not 1x6", labelled(random_features(2, (1, 6)), (1, 6)))
    wrong("at least 2x2 patches, not 6x1", labelled(random_features(2, (6, 1)), (6, 1)))
    wrong("device 'cuda:9' is not available", good, device="cuda:9")


def test_mistakes_in_scores():
    true = [np.array([[0, 0, 4, 4.0]])]
    for box in ([-1, 0, 3, 3], [0, 0, 11, 3], [3, 3, 3, 5], [0, np.nan, 2, 2]):
        with pytest.raises(InputError, match="boxes must have an area and lie inside the image of 10x8 pixels"):
            lost.corloc(boxes(box), true, size=(10, 8))
    with pytest.raises(InputError, match="true boxes must have an area"):
        lost.corloc(boxes([0, 0, 2, 2]), [np.array([[0, 0, 4, 9.0]])], size=(10, 8))
    with pytest.raises(InputError, match="1 boxes do not fit the true boxes of 2 images"):
        lost.corloc(boxes([0, 0, 2, 2]), true * 2, size=(10, 8))
    with pytest.raises(InputError, match="no image has a true box"):
        lost.corloc(boxes([0, 0, 2, 2], [0, 0, 2, 2]), [np.empty((0, 4))] * 2, size=(10, 8))


def test_mistakes_in_sweeps():
    features, truth = planted(4)
    with pytest.raises(InputError, match="at least one bias"):
        lost.sweep(features, truth, patch_size=PATCH, biases=())
    hits = xr.DataArray([[np.nan, 1.0]], dims=("bias", "image"), coords={"bias": [0.0]})
    with pytest.raises(InputError, match="the first half of 2 images has no true box"):
        lost.choose_bias(hits)
    with pytest.raises(InputError, match="no image has a true box"):
        lost.choose_bias(hits[:, ::-1])
    with pytest.raises(InputError, match=r"unknown projection 'keys'.*'key'"):
        lost.evaluate(
            registry.load("dino-pico", device="cpu"), images.open_images("scenes", size=64, count=2), projection="keys"
        )
