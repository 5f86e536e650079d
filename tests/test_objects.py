"""Maps against true objects: planted maps, slow independent versions, chance, and inputs that cannot be matched."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from sklearn.metrics import adjusted_rand_score

from vitregs import arrays, cache, report
from vitregs.data import ground_truth, images, scenes
from vitregs.errors import InputError
from vitregs.measure import object_attention, slot_attention
from vitregs.models import backbone, registry

GRID = (5, 7)


def as_maps(values: np.ndarray, kinds: list[str] | None = None) -> xr.DataArray:
    kinds = kinds or ["register"] * values.shape[1]
    names = [f"{k}{i}" for i, k in enumerate(kinds)]
    coords = {"query": names, "query_kind": ("query", kinds)}
    return xr.DataArray(values, dims=("image", "query", "y", "x"), coords=coords)


def as_objects(region: np.ndarray, **more: np.ndarray) -> xr.Dataset:
    data = {"region": (("image", "object", "y", "x"), region), "placed": ("image", region.any((2, 3)).sum(1))}
    return xr.Dataset(data | {k: (("image", "object"), v) for k, v in more.items()}, attrs={"of": "masks"})


def planted(n: int = 12, most: int = 3, seed: int = 0) -> np.ndarray:
    """Objects that are rectangles without overlap, 1 to `most` an image: bool (n, most, rows, columns)."""
    rng = np.random.default_rng(seed)
    region = np.zeros((n, most, *GRID), bool)
    for i in range(n):
        for k in range(rng.integers(1, most + 1)):
            top, left = rng.integers(0, 3), 2 * k + rng.integers(0, 2)
            region[i, k, top : top + rng.integers(1, 3), left : left + 1 + (rng.random() < 0.4)] = True
        taken = np.cumsum(region[i], 0) - region[i]
        region[i] &= taken == 0
    return region


def noisy(n: int = 12, queries: int = 4, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).random((n, queries, *GRID)) ** 3


@pytest.fixture(scope="module")
def model() -> backbone.Backbone:
    return registry.load("mae-pico-reg4", device="cpu")


# --- what the objects are


def test_a_patch_belongs_to_what_fills_most_of_it():
    image = np.zeros((1, 4, 12), int)
    image[0, :2, :4] = 1  # half of the first patch: not more than half is background
    image[0, 0, 4:8] = 2  # a quarter of the second
    image[0, :, 8:10], image[0, :3, 10:] = 3, 5  # a half, and three eighths
    np.testing.assert_array_equal(ground_truth.patch_instances(image, (1, 3)), [[[1, 0, 3]]])
    np.testing.assert_array_equal(ground_truth.patch_instances(0 * image, (2, 3)), np.zeros((1, 2, 3)))


def test_patches_of_scenes_against_a_loop():
    source = images.open_images("scenes", size=(32, 48), count=9, seed=3)
    seen = ground_truth.object_truth(source, (4, 6))
    truth = next(source.batches(9)).truth
    assert truth is not None
    assert seen.attrs["of"] == "masks"
    assert dict(seen.sizes) == {"image": 9, "object": scenes.MOST_OBJECTS, "y": 4, "x": 6}
    for i in range(9):
        for y in range(4):
            for x in range(6):
                part = truth.instances[i, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].flatten().tolist()
                count = [part.count(k) for k in range(scenes.MOST_OBJECTS + 1)]
                owner = 0 if count[0] > 32 else 1 + max(range(scenes.MOST_OBJECTS), key=lambda k: count[k + 1])
                assert [bool(v) for v in seen["region"].values[i, :, y, x]] == [k + 1 == owner for k in range(6)]
    np.testing.assert_array_equal(seen["colour"], truth.objects[..., 1])
    np.testing.assert_array_equal(seen["shape"], truth.objects[..., 0])
    there = truth.objects[..., 0].numpy() >= 0
    np.testing.assert_array_equal(seen["placed"], there.sum(1))
    np.testing.assert_array_equal(seen["depth"], np.where(there, np.arange(6), -1))
    assert not (ground_truth.in_view(seen).values & ~there).any()


def test_a_patch_is_in_a_box_with_its_centre():
    boxes = np.array([[0.0, 0.0, 10.0, 10.0], [4.9, 4.9, 15.1, 25.1], [6.0, 6.0, 14.0, 14.0]], np.float32)
    found = ground_truth.box_regions(boxes, (20, 30), (2, 3))  # patches of 10 x 10 pixels, centres at 5, 15, 25
    np.testing.assert_array_equal(found[0], [[1, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(found[1], [[1, 1, 1], [1, 1, 1]])
    assert not found[2].any()  # between all centres
    assert ground_truth.box_regions(np.zeros((0, 4)), (20, 30), (2, 3)).shape == (0, 2, 3)


def test_photographs_have_boxes_or_nothing(tmp_path: Path, shared_data: Path):
    coco = images.open_images(str(shared_data / "coco-256"), size=(32, 64), count=6, split="validation")
    seen = ground_truth.object_truth(coco, (4, 8))
    assert seen.attrs["of"] == "boxes"
    assert not set(ground_truth.PROPERTIES) & set(seen.data_vars)
    boxes = [b for batch in coco.batches() for b in batch.boxes]
    assert seen["placed"].values.tolist() == [len(b) for b in boxes]
    assert seen.sizes["object"] == max(map(len, boxes))
    bare = images.open_images(str(shared_data / "imagenette-224"), size=32, count=3, split="validation")
    nothing = ground_truth.object_truth(bare, (4, 4))
    assert nothing.attrs["of"] == "nothing"
    assert not nothing["region"].values.any()
    cache.save_dataset(nothing, tmp_path / "kept.nc")
    xr.testing.assert_identical(cache.load_dataset(tmp_path / "kept.nc"), nothing)


# --- how well maps match them


@pytest.mark.parametrize("rule", ["mass", "oracle"])
def test_maps_that_are_the_masks_match_them(rule: str):
    region = planted()
    maps = as_maps(region.astype(float) + 1e-6)
    found = object_attention.match(maps, as_objects(region), rule=rule, keep=0.999)
    there = region.any((2, 3))
    np.testing.assert_array_equal(found["iou"].values[there], 1)
    np.testing.assert_array_equal(found["query"].values[there], np.nonzero(there)[1])
    assert np.isnan(found["iou"].values[~there]).all()
    assert (found["query"].values[~there] == -1).all()


def test_maps_that_share_the_patches_out_match_them():
    region = planted()
    background = ~region.any(1, keepdims=True)
    maps = as_maps(np.concatenate([background, region], 1).astype(float))
    found = object_attention.match(maps, as_objects(region), rule="argmax")
    np.testing.assert_array_equal(found["iou"].values[region.any((2, 3))], 1)
    ari = object_attention.grouping(maps, as_objects(region), scale="none")
    enough = region.any((2, 3)).sum(1) >= 2
    assert 2 < enough.sum() < len(region)
    np.testing.assert_array_equal(ari.values[enough], 1)
    assert np.isnan(ari.values[~enough]).all()


@pytest.mark.parametrize("rule", object_attention.RULES)
def test_matches_against_a_loop(rule: str):
    region, values = planted(seed=4), noisy()
    found = object_attention.match(as_maps(values), as_objects(region), rule=rule, keep=0.4)
    for i in range(len(region)):
        for k in range(region.shape[1]):
            part = {tuple(c) for c in np.argwhere(region[i, k])}
            best = []
            for q in range(values.shape[1]):
                cells = sorted(np.ndindex(*GRID), key=lambda c: -values[i, q][c])
                if rule == "oracle":
                    mask = set(cells[: len(part)])
                elif rule == "mass":
                    held = np.cumsum([values[i, q][c] for c in cells]) / values[i, q].sum()
                    mask = set(cells[: int((held < 0.4).sum()) + 1])
                else:
                    mask = {c for c in cells if values[i, q][c] == max(values[i, :, c[0], c[1]])}
                best.append(len(mask & part) / len(mask | part) if mask | part else 0)
            if part:
                assert found["iou"].values[i, k] == pytest.approx(max(best))
                assert best[int(found["query"].values[i, k])] == pytest.approx(max(best))


def counted(true: np.ndarray, found: np.ndarray) -> float:
    """The adjusted Rand index by counting pairs, one after the other."""
    pairs = list(combinations(range(len(true)), 2))
    a = sum(true[i] == true[j] and found[i] == found[j] for i, j in pairs)
    b, c = (sum(g[i] == g[j] for i, j in pairs) for g in (true, found))
    chance, most = b * c / len(pairs), (b + c) / 2
    return 1.0 if most == chance else (a - chance) / (most - chance)


@pytest.mark.parametrize("scale", object_attention.SCALES)
def test_grouping_against_pairs_and_scikit_learn(scale: str):
    region, values = planted(seed=2), noisy(seed=5)
    found = object_attention.grouping(as_maps(values), as_objects(region), scale=scale)
    by = {"none": 1, "mean": values.mean((0, 2, 3))[:, None, None], "place": values.mean(0)}[scale]
    best = (values / by).argmax(1)
    for i, index in enumerate(found.values):
        front = region[i].any(0)
        true, mine = region[i].argmax(0)[front], best[i][front]
        if region[i].any((1, 2)).sum() < 2:
            assert np.isnan(index)
        else:
            assert index == pytest.approx(counted(true, mine))
            assert index == pytest.approx(adjusted_rand_score(true, mine))


def test_maps_that_are_all_equal_group_nothing():
    region = planted()
    maps = as_maps(np.repeat(noisy(queries=1), 4, 1))
    for scale in object_attention.SCALES:
        assert np.nanmax(np.abs(object_attention.grouping(maps, as_objects(region), scale=scale))) == 0


def test_random_maps_do_what_chance_gives():
    region, values = planted(n=300), noisy(n=300)
    seen, maps = as_objects(region), as_maps(values)
    rng = np.random.default_rng(0)
    shuffled = as_maps(rng.permuted(values.reshape(300, 4, -1), axis=-1).reshape(values.shape))
    for rule in ("mass", "oracle"):
        plain, other, far = (
            float(object_attention.match(m, seen, rule=rule, shift=s)["iou"].mean())
            for m, s in ((maps, 0), (shuffled, 0), (maps, 7))
        )
        assert plain == pytest.approx(other, abs=0.015)
        assert plain == pytest.approx(far, abs=0.015)
    assert abs(float(object_attention.grouping(maps, seen).mean())) < 0.06


def test_a_shift_takes_the_objects_of_later_images():
    region = planted()
    maps = as_maps(np.roll(region, -2, 0).astype(float) + 1e-6)
    found = object_attention.match(maps, as_objects(region), rule="oracle", shift=2)
    there = np.roll(region, -2, 0).any((2, 3))
    np.testing.assert_array_equal(np.isfinite(found["iou"].values), there)
    np.testing.assert_array_equal(found["iou"].values[there], 1)


def test_the_order_of_queries_and_of_images_does_not_matter():
    region, values = planted(), noisy()
    order, moved = [2, 0, 3, 1], np.random.default_rng(3).permutation(len(region))
    a = (as_maps(values), as_objects(region))
    b = (as_maps(values[:, order]).transpose("y", "image", "x", "query"), as_objects(region))
    c = (as_maps(values[moved]), as_objects(region[moved]))
    for rule in object_attention.RULES:
        first = object_attention.match(*a, rule=rule)["iou"].values
        np.testing.assert_array_equal(object_attention.match(*b, rule=rule)["iou"].values, first)
        np.testing.assert_array_equal(object_attention.match(*c, rule=rule)["iou"].values, first[moved])
    first = object_attention.grouping(*a).values
    np.testing.assert_allclose(object_attention.grouping(*b).values, first)
    np.testing.assert_allclose(object_attention.grouping(*c).values, first[moved])
    assert set(object_attention.variety(*b)["same"].values[np.isfinite(first)]) <= set(
        object_attention.variety(*a)["same"].values
    )


# --- whether queries differ


def test_maps_that_are_alike_and_maps_that_are_not():
    values = noisy(queries=3)
    values[:, 1] = 5 * values[:, 0] + 2
    values[:, 2] = -values[:, 0]
    found = object_attention.similarity(as_maps(values))
    np.testing.assert_allclose(found, [[1, 1, -1], [1, 1, -1], [-1, -1, 1]], atol=1e-9)
    values = noisy()
    by_hand = np.mean([np.corrcoef(v.reshape(4, -1)) for v in values], 0)
    np.testing.assert_allclose(object_attention.similarity(as_maps(values)), by_hand, atol=1e-9)


def test_the_farthest_are_those_that_differ():
    rng = np.random.default_rng(0)
    base = rng.random((6, 3, *GRID))
    values = np.concatenate([base[:, [0]], base[:, [0]], base[:, [1]], base[:, [1]], base[:, [2]]], 1)
    values += 0.01 * rng.random(values.shape)
    found = object_attention.farthest(object_attention.similarity(as_maps(values)), 3)
    assert [int(n[-1]) // 2 for n in found] == [0, 1, 2]
    assert object_attention.farthest(object_attention.similarity(as_maps(values)), 9) == list(
        as_maps(values)["query"].values
    )


def test_top_objects_that_are_planted():
    region = np.zeros((3, 2, *GRID), bool)
    region[:, 0, 0, :2], region[:2, 1, 3, 3:] = True, True  # the third image has one object
    values = np.full((3, 2, *GRID), 0.1)
    values[0, 0, 0, :2], values[0, 1, 3, 3:] = 2, 3  # different ones in the first image
    values[1, :, 0, :2] = 2  # the same in the second
    found = object_attention.variety(as_maps(values), as_objects(region))
    np.testing.assert_array_equal(found["same"], [0, 1, np.nan])
    np.testing.assert_array_equal(found["covered"], [1, 0.5, np.nan])
    np.testing.assert_array_equal(found["same_by_chance"], [0.5, 0.5, np.nan])
    np.testing.assert_array_equal(found["covered_by_chance"], [0.75, 0.75, np.nan])
    on = object_attention.attended(as_maps(values), as_objects(region))
    assert float(on[0, 0, 0]) == pytest.approx(2 / values[0, 0].mean())
    assert np.isnan(on[2, :, 1]).all()


def test_random_choices_do_what_chance_gives():
    found = object_attention.variety(as_maps(noisy(n=400, queries=5)), as_objects(np.repeat(planted(40), 10, 0))).mean()
    assert float(found["same"]) == pytest.approx(float(found["same_by_chance"]), abs=0.06)
    assert float(found["covered"]) == pytest.approx(float(found["covered_by_chance"]), abs=0.06)


def test_preferences_that_are_planted():
    n, rng = 150, np.random.default_rng(0)
    region = planted(n)
    there = region.any((2, 3))
    colour, shape, depth = (np.where(there, rng.integers(0, k, there.shape), -1) for k in (4, 3, 3))
    by_colour = np.where(region, np.exp(0.4 * colour)[..., None, None], 0).sum(1) + ~region.any(1)
    by_place = np.broadcast_to(np.exp(np.linspace(0, 3, GRID[1])), (n, *GRID))
    maps = as_maps(np.stack([by_colour, by_place, rng.random((n, *GRID))], 1))
    table = object_attention.preferences(maps, as_objects(region, colour=colour, shape=shape, depth=depth))
    assert table["query"].tolist() == ["register0", "register1", "register2"]
    assert table["colour"][0] > 0.5
    assert table["place"][1] > 0.95
    assert table[["shape"]].abs().max().item() < 0.1
    assert table.loc[2, ["place", "colour", "shape"]].abs().max() < 0.1


# --- baselines


def test_k_means_finds_planted_groups():
    region = planted(8)
    group = np.where(region.any(1), 1 + region.argmax(1), 0).reshape(8, -1)
    rng = np.random.default_rng(0)
    values = rng.standard_normal((4, 10))[group] * 5 + 0.1 * rng.standard_normal((*group.shape, 10))
    coords = arrays.token_coords(["patch"] * group.shape[1], GRID)
    states = xr.DataArray(values, dims=("image", "token", "channel"), coords=coords)
    full = region.any((2, 3)).all(1)
    found = object_attention.kmeans(states[full], 4)
    assert full.sum() > 1
    assert found.shape[1:] == GRID
    for a, b in zip(found.values, group[full], strict=True):
        assert adjusted_rand_score(a.ravel(), b) == 1
    xr.testing.assert_equal(found, object_attention.kmeans(states[full].transpose("token", "channel", "image"), 4))
    ari = object_attention.grouping(object_attention.one_hot(found), as_objects(region[full]), scale="none")
    assert (ari == 1).all()
    flat = xr.DataArray(np.ones((2, GRID[0] * GRID[1], 3)), dims=states.dims, coords=coords)
    assert not object_attention.kmeans(flat, 4).values.any()  # one group where all is alike, and no warning


def test_groups_of_places_are_the_same_everywhere_and_touch_all():
    found = object_attention.places(3, GRID, 4)
    assert found.shape == (3, *GRID)
    assert (found == found[0]).all()
    assert set(np.unique(found)) == {0, 1, 2, 3}
    hot = object_attention.one_hot(found)
    np.testing.assert_array_equal(hot.sum("query"), 1)


@pytest.mark.parametrize("kind", object_attention.NOISE)
def test_noise_is_a_distribution_and_seeded(kind: str):
    found = object_attention.noise_maps(6, 3, GRID, kind=kind, seed=2)
    np.testing.assert_allclose(found.sum(("y", "x")), 1)
    xr.testing.assert_equal(found, object_attention.noise_maps(6, 3, GRID, kind=kind, seed=2))
    assert not np.allclose(found, object_attention.noise_maps(6, 3, GRID, kind=kind, seed=3))
    values = np.log(found.values)
    near = np.corrcoef(values[..., 1:].ravel(), values[..., :-1].ravel())[0, 1]
    assert near > 0.5 if kind == "smooth" else abs(near) < 0.2


# --- a real network


def test_maps_are_raw_attention_of_each_query(model: backbone.Backbone):
    pixels = images.open_images("scenes", size=(32, 48), count=5, seed=1)
    found = object_attention.attention_maps(model, pixels)
    assert list(found["query"].values) == ["cls", "reg0", "reg1", "reg2", "reg3", "2,3"]
    assert dict(found.sizes) == {"image": 5, "query": 6, "y": 4, "x": 6}
    seen: list[torch.Tensor] = []
    whole = model.net.blocks[-1].attn.register_forward_pre_hook(lambda _m, x: seen.append(x[0]))
    with torch.no_grad():
        model.net.forward_features(model.prepare(next(pixels.pixels(5))))
    whole.remove()
    attn = model.net.blocks[-1].attn
    with torch.no_grad():
        q, k, _ = attn.qkv(seen[0]).reshape(5, 29, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        full = (attn.q_norm(q) * attn.scale @ attn.k_norm(k).transpose(-1, -2)).softmax(-1).mean(1)
    wanted = full[:, [0, 1, 2, 3, 4, 5 + 2 * 6 + 3], 5:].reshape(5, 6, 4, 6)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    np.testing.assert_allclose(object_attention.mean_maps(found), wanted.mean(0), atol=1e-6)
    assert object_attention.of_kind(found, "cls").sizes["query"] == 1
    assert object_attention.of_kind(found, "register", "cls").sizes["query"] == 5


# --- tables and figures


@pytest.fixture(scope="module")
def compared(model: backbone.Backbone) -> xr.Dataset:
    return object_attention.compare(model, images.open_images("scenes", size=(48, 32), count=6, seed=1), clusters=5)


def test_scores_of_a_real_network(model: backbone.Backbone, compared: xr.Dataset):
    assert compared.sizes["image"] == 6
    assert compared["maps"].sel(way=["CLS", "registers", "k-means", "places"]).values.tolist() == [1, 4, 5, 5]
    assert compared["ari"].sel(way=["CLS", "registers, size known"]).isnull().all()
    source = images.open_images("scenes", size=(48, 32), count=6, seed=1)
    seen, maps = (
        ground_truth.object_truth(source, (6, 4)),
        object_attention.of_kind(object_attention.attention_maps(model, source), "register"),
    )
    iou = object_attention.match(maps, seen)["iou"].mean("object")
    np.testing.assert_allclose(compared["iou"].sel(way="registers"), iou, atol=1e-6)
    far = np.nanmean([object_attention.match(maps, seen, shift=k)["iou"].mean("object") for k in range(1, 6)], 0)
    np.testing.assert_allclose(compared["iou_chance"].sel(way="registers"), far, atol=1e-6)
    table = report.registers.scores({model.name: compared})
    row = table[(table.method == "registers") & (table["quantity"] == "best-match IoU")].iloc[0]
    assert row["mean"] == pytest.approx(float(iou.mean()))
    assert row.low <= row["mean"] <= row.high
    assert row.images == np.isfinite(iou).sum()
    wide = report.registers.pivot(table, "best-match IoU", ["registers", "CLS"])
    assert wide.columns.tolist() == ["registers", "CLS"]
    assert wide.loc[model.name, "registers"].startswith(f"{row['mean']:.2f} [")


def test_blocks_end_with_the_last(model: backbone.Backbone, compared: xr.Dataset):
    source = images.open_images("scenes", size=(48, 32), count=6, seed=1)
    found = object_attention.by_block(model, source)
    assert found["block"].values.tolist() == list(range(1, model.depth + 1))
    np.testing.assert_allclose(found["iou"].isel(block=-1), compared["iou"].sel(way="registers"), atol=1e-6)
    plain = object_attention.by_block(registry.load("clip-pico", device="cpu"), source)
    assert plain["same"].isnull().all()
    assert set(report.registers.blocks({"a": plain})["quantity"]) == {"best-match IoU"}


def test_registers_that_share_and_prefer():
    region = planted(40)
    seen = as_objects(region, **{p: np.where(region.any((2, 3)), 1, -1) for p in ground_truth.PROPERTIES})
    equal = as_maps(np.repeat(noisy(40, 1), 3, 1), ["cls", "register", "register"])
    found = report.registers.variety({"m": equal, "none": equal.isel(query=[0, 1])}, {"m": seen, "none": seen})
    assert found["model"].tolist() == ["m"]
    assert found.loc[0, "same top object, %"] == "100 [100, 100]"
    assert found.loc[0, "least correlation"] == "1.00"
    table = report.registers.preferences({"m": equal}, {"m": seen})
    assert table.index.tolist() == [("m", "CLS"), ("m", "registers")]
    np.testing.assert_allclose(table.loc[("m", "CLS")], table.loc[("m", "registers")])


def test_scores_of_slots_are_named_by_their_loss():
    region = planted()
    background = ~region.any(1, keepdims=True)
    maps = as_maps(np.concatenate([background, region], 1).astype(float)).drop_vars("query_kind")
    found = xr.Dataset({"mask": maps, "attention": maps, "loss": ("step", [1.0, 0.25])})
    scored = object_attention.slot_scores(found, as_objects(region))
    assert scored["way"].values.tolist() == ["slots (loss 1.00 to 0.25)", "slots' masks"]
    assert (scored["iou"] == 1).all()
    assert set(slot_attention.discover.__kwdefaults__) == {"slots", "steps", "batch", "seed"}


def test_without_objects_there_is_a_sentence(model: backbone.Backbone):
    nothing = as_objects(np.zeros_like(planted()))
    scored = object_attention.score(as_maps(noisy()), nothing, rule="mass")
    assert scored["iou"].isnull().all()
    lonely = object_attention.score(as_maps(noisy(1)), as_objects(planted(1)), rule="mass")
    assert lonely["iou_chance"].isnull().all()
    assert lonely["iou"].notnull().all()
    empty = report.registers.scores({"m": scored.expand_dims(way=["CLS"])})
    for figure in (
        report.registers.plot_scores(empty),
        report.registers.plot_blocks(empty),
        report.registers.plot_similarity({}),
    ):
        assert len(figure.axes[0].texts) == 1
    assert report.registers.preferences({"m": as_maps(noisy())}, {"m": nothing}).empty


def test_figures_show_what_they_are_given(model: backbone.Backbone, compared: xr.Dataset):
    maps = as_maps(noisy(), ["cls", "register", "register", "patch"])
    assert object_attention.first_queries(maps, 2) == [0, 1, 3]
    figure = report.registers.plot_mean_maps(
        {"a-b": object_attention.mean_maps(maps), "b": object_attention.mean_maps(maps.isel(query=[0]))}
    )
    shown = [a for a in figure.axes if a.images]
    assert len(shown) == 5
    np.testing.assert_allclose(shown[1].images[0].get_array(), maps.values[:, 1].mean(0))
    figure = report.registers.plot_similarity({"m": object_attention.similarity(maps)})
    np.testing.assert_allclose(figure.axes[0].images[0].get_array(), object_attention.similarity(maps))
    table = report.registers.scores({"m": compared})
    figure = report.registers.plot_scores(table)
    heights = [p.get_height() for p in figure.axes[0].patches]
    assert heights == pytest.approx(table[table["quantity"] == "best-match IoU"]["mean"].tolist())
    seen = as_objects(planted())
    owner = ground_truth.properties_known(seen).values
    np.testing.assert_array_equal(owner > 0, seen["region"].values.any(1))


# --- bad inputs


def test_bad_inputs_are_named():
    region, maps = planted(), as_maps(noisy())
    seen = as_objects(region)
    with pytest.raises(InputError, match="maps and objects differ in patches: 4x7, 5x7"):
        object_attention.match(maps.isel(y=slice(4)), seen)
    with pytest.raises(InputError, match="differ in images: 3, 12"):
        object_attention.grouping(maps.isel(image=slice(3)), seen)
    for job in (object_attention.match, object_attention.grouping, object_attention.variety, object_attention.attended):
        with pytest.raises(InputError, match="no object fills a patch"):
            job(maps, as_objects(np.zeros_like(region)))
    with pytest.raises(InputError, match="no attention of a cls token"):
        object_attention.of_kind(maps, "cls")
    with pytest.raises(InputError, match="did you mean 'register'"):
        object_attention.of_kind(maps, "registers")
    with pytest.raises(InputError, match="1 map cannot share out"):
        object_attention.grouping(maps.isel(query=[0]), seen)
    with pytest.raises(InputError, match="1 query cannot differ"):
        object_attention.variety(maps.isel(query=[0]), seen)
    with pytest.raises(InputError, match="objects overlap"):
        object_attention.grouping(maps, as_objects(np.repeat(region[:, :1], 2, 1)))
    with pytest.raises(InputError, match="unknown rule 'mas'"):
        object_attention.match(maps, seen, rule="mas")
    with pytest.raises(InputError, match="unknown scale"):
        object_attention.grouping(maps, seen, scale="max")
    with pytest.raises(InputError, match="unknown noise"):
        object_attention.noise_maps(2, 2, GRID, kind="pink")
    with pytest.raises(InputError, match="only scenes tell"):
        object_attention.preferences(maps, seen)
    with pytest.raises(InputError, match="cannot be cut into 3x7"):
        ground_truth.patch_instances(np.zeros((1, 10, 14), int), (3, 7))
    states = xr.DataArray(np.ones((1, 6, 2)), dims=("image", "token", "channel"))
    states = states.assign_coords(arrays.token_coords(["patch"] * 6, (2, 3)))
    for clusters in (1, 7):
        with pytest.raises(InputError, match=f"into {clusters} groups"):
            object_attention.kmeans(states, clusters)
    known = as_objects(region[:1], **{p: np.zeros((1, 3)) for p in ground_truth.PROPERTIES})
    with pytest.raises(InputError, match="one image cannot tell"):
        object_attention.preferences(maps.isel(image=[0]), known)
