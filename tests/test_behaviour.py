"""What moves outliers: changes of the input and of the network do what they say and leave no trace; on a real network they
move outliers as the book says."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from matplotlib.figure import Figure

from vitregs import report
from vitregs.claims import networks
from vitregs.data.images import Images
from vitregs.errors import InputError
from vitregs.measure import behaviour
from vitregs.models import capture, registry, test_time
from vitregs.models.backbone import Backbone


def tiny(name: str = "vit_tiny_patch16_224", **more: object) -> Backbone:
    settings = {"img_size": (32, 32), "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 0}
    torch.manual_seed(0)
    return registry.random(name, **settings | more)


def pixels(count: int = 2, side: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def problem(call, *args: object, **kw: object) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **kw)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- changes of the network


def hidden(*which: int, tokens: int = 17) -> torch.Tensor:
    mask = torch.zeros(1, tokens, dtype=torch.bool)
    mask[0, list(which)] = True
    return mask


def test_a_hidden_patch_is_as_good_as_absent_and_nothing_stays() -> None:
    vit, x = tiny(), pixels()
    before = capture.norms(vit, x).values
    away = hidden(5)
    masked = capture.norms(test_time.without_tokens(vit, away), x, layers=[-1]).values[:, 0]
    net = vit.net
    with torch.no_grad():
        states = net._pos_embed(net.patch_embed(vit.normalise(x)))  # type: ignore[operator]
        states = net.blocks(net.norm_pre(states[:, ~away[0]]))  # type: ignore[operator]
    np.testing.assert_allclose(masked[:, ~away[0].numpy()], states.norm(dim=-1).numpy(), rtol=1e-4)
    assert np.array_equal(capture.norms(vit, x).values, before)


@pytest.mark.parametrize("kept", ["bool", "float"])
def test_hiding_adds_to_a_mask_that_is_there(kept: str) -> None:
    """Hidden one after the other, or beside a token of a weight, as both at once."""
    vit, x = tiny(), pixels()
    if kept == "bool":
        twice = test_time.without_tokens(test_time.without_tokens(vit, hidden(5)), hidden(9))
        wanted = test_time.without_tokens(vit, hidden(5, 9))
    else:
        twice = test_time.without_tokens(test_time.append(vit, weight=3.0), hidden(6, tokens=18))
        wanted = test_time.without_tokens(test_time.append(vit, 3), hidden(8, tokens=20))
    states = [torch.tensor(capture.tokens(n, x, kinds="patch").values[:, [0, 1, 2, 6]]) for n in (twice, wanted)]
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-4)


def test_changed_networks_are_others_and_leave_no_trace() -> None:
    vit, x = tiny(), pixels()
    state = {k: v.clone() for k, v in vit.net.state_dict().items()}
    before = capture.tokens(vit, x, kinds="patch").values
    made = [
        test_time.without_tokens(vit, hidden(5)),
        test_time.without_tokens(vit, hidden(6)),
        behaviour.without_positions(vit),
        behaviour.quantised(vit),
    ]
    found = [capture.tokens(net, x, kinds="patch").values for net in made]
    for i, one in enumerate(found):
        for other in [before, *found[:i]]:
            assert not np.allclose(one, other)
    assert len({vit.weights, *(net.weights for net in made)}) == 5
    assert [net.name.removeprefix(vit.name) for net in made] == ["+hidden", "+hidden", "+nopositions", "+int8"]
    assert np.array_equal(capture.tokens(vit, x, kinds="patch").values, before)
    after = vit.net.state_dict()
    assert all(torch.equal(after[k], v) for k, v in state.items())
    assert list(after) == list(state)


def test_without_positions_patches_are_a_set_at_any_size() -> None:
    """With no positions, shuffled patches have shuffled norms."""
    vit = behaviour.without_positions(tiny())
    for side in (32, 48):
        x = pixels(side=side)
        mixed = behaviour.shuffled(x, (8, 8), torch.Generator().manual_seed(1))
        norms = [capture.norms(vit, y, layers=[-1]).values[:, 0, 1:] for y in (x, mixed)]
        np.testing.assert_allclose(*(np.sort(n, 1) for n in norms), rtol=1e-4)


def test_what_a_network_does_not_allow() -> None:
    vit, x = tiny(), pixels()
    assert "every token of an image is hidden" in problem(
        test_time.without_tokens, vit, torch.ones(1, 17, dtype=torch.bool)
    )
    bare = tiny(class_token=False, global_pool="avg")
    assert "has no CLS token to remove" in problem(behaviour.interventions, bare, x, names=["no CLS"])
    wide = torch.rand(2, 3, 16, 32)
    assert "3 rows of patches or more, not 2" in problem(behaviour.interventions, vit, wide, names=["letterbox"])
    assert "unknown intervention 'gray'" in problem(behaviour.interventions, vit, x, names=["gray"])
    assert "first must be 1 or more" in problem(behaviour.interventions, vit, x, first=0)
    assert "not a multiple of the patch size" in problem(behaviour.resolutions, vit, x, sides=[31])
    assert "takes no attention mask" in problem(
        test_time.without_tokens,
        registry.random("beit_base_patch16_224", img_size=(32, 32), embed_dim=48, depth=1, num_heads=3),
        hidden(2, tokens=5),
    )


def test_what_is_not_allowed_is_left_out_and_said() -> None:
    bare = tiny(class_token=False, global_pool="avg")
    found = behaviour.interventions(bare, torch.rand(2, 3, 16, 32))
    assert set(behaviour.INTERVENTIONS) - set(found.intervention.values) == {"no CLS", "letterbox", "mirrored bars"}
    assert "no CLS: " in found.attrs["left out"]
    assert "letterbox needs 3 rows" in found.attrs["left out"]


def test_the_size_of_a_network_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    vit = tiny()
    behaviour.resolutions(vit, pixels(), sides=[24, 48])
    behaviour.interventions(vit, pixels(side=48), names=["grey"])
    behaviour.cosines(vit, pixels(side=48))
    assert vit.net.patch_embed.grid_size == (4, 4)  # type: ignore[union-attr]

    def fails(*_: object) -> np.ndarray:
        raise MemoryError

    monkeypatch.setattr(behaviour, "_counts", fails)
    for function in (behaviour.resolutions, behaviour.interventions):
        with pytest.raises(MemoryError):
            function(vit, pixels(side=48))
        assert vit.net.patch_embed.grid_size == (4, 4)  # type: ignore[union-attr]


# --- changes of the input


def test_changes_of_the_input() -> None:
    x = pixels()
    mixed = behaviour.shuffled(x, (8, 8), torch.Generator().manual_seed(0))
    assert torch.equal(mixed.flatten().sort().values, x.flatten().sort().values)
    assert torch.equal(behaviour.shifted(x, 8)[..., 8:], x[..., :-8])
    assert torch.equal(behaviour.tiled(x, (8, 8))[..., :8, :8], x[..., 16:24, 16:24])


@pytest.mark.parametrize("rows", [3, 4, 14, 16])
def test_a_letterbox_holds_the_whole_image(rows: int) -> None:
    side, bar = 8 * rows, 8 * behaviour.bar_rows(rows)
    x = torch.linspace(0, 1, side)[:, None].expand(1, 3, side, side)  # dark above, light below
    boxed, mirrored = (behaviour.letterbox(x, bar, mirrored=m) for m in (False, True))
    assert not boxed[:, :, :bar].any()
    assert not boxed[:, :, -bar:].any()
    inside = boxed[:, :, bar:-bar]
    assert inside.mean().item() == pytest.approx(x.mean().item(), abs=0.02)
    assert inside[:, :, 0].max() < 0.1
    assert inside[:, :, -1].min() > 0.9
    assert torch.equal(mirrored[:, :, bar:-bar], inside)
    assert torch.equal(mirrored[:, :, :bar], inside[:, :, :bar].flip(2))
    assert torch.equal(mirrored[:, :, -bar:], inside[:, :, -bar:].flip(2))
    assert behaviour.bar_rows(14) == 3


# --- counting


def test_the_first_images_are_the_same_as_a_shorter_tensor() -> None:
    vit, x = tiny(), pixels(5)
    names = ["grey", "flip", "letterbox"]
    one = behaviour.interventions(vit, x, names=names, first=3, batch=2, ratio=1.02)
    xr.testing.assert_equal(one, behaviour.interventions(vit, x[:3], names=names, batch=2, ratio=1.02))
    assert one.sizes["image"] == 3
    assert behaviour.resolutions(vit, x, sides=[32], first=2).sizes["image"] == 2
    assert behaviour.cosines(vit, x, first=4).sizes["image"] == 4


def test_the_parts_of_a_letterbox_sum_up() -> None:
    found = behaviour.interventions(tiny(), pixels(3), names=["letterbox"], ratio=1.02).sel(intervention="letterbox")
    for name in ("outliers", "patches", "own"):
        parts = found[name].sel(part=["photograph", "bars"]).sum("part")
        np.testing.assert_array_equal(parts, found[name].sel(part="all"))
    assert found.patches.sel(part="bars").values.tolist() == [8, 8, 8]
    np.testing.assert_allclose(
        found.largest.sel(part=["photograph", "bars"]).max("part"), found.largest.sel(part="all")
    )


def planted() -> xr.Dataset:
    """Four images of 10 patches: 2 outliers each; "int8" has twice as many, half of the old ones among them; "letterbox" 1 of 6
    in the photograph, 2 by its own median, and 4 of 4 in the bars."""
    names = ["untouched", "letterbox", "int8"]
    shape = (3, 3, 4)
    outliers, patches, own = (np.full(shape, np.nan) for _ in range(3))
    outliers[:, 0], patches[:, 0] = np.array([2, 5, 4])[:, None], 10
    outliers[1, 1:], patches[1, 1:], own[1] = [[1] * 4, [4] * 4], [[6] * 4, [4] * 4], [[6] * 4, [2] * 4, [4] * 4]
    shared, joined = (np.array(v)[:, None] * np.ones(4) for v in ([2, np.nan, 1], [2, np.nan, 5]))
    where = np.zeros((4, 5, 2), bool)
    where[:, 0, :] = True
    parts, whole = ("intervention", "part", "image"), ("intervention", "image")
    return xr.Dataset(
        {
            "outliers": (parts, outliers),
            "patches": (parts, patches),
            "largest": (parts, np.ones(shape)),
            "own": (parts, own),
            "shared": (whole, shared),
            "joined": (whole, joined),
            "where": (("image", "y", "x"), where),
        },
        coords={"intervention": names, "part": list(behaviour.PARTS), "model": "planted"},
        attrs={"ratio": 1.6, "left out": ""},
    )


def test_planted_counts_come_out() -> None:
    data = planted()
    shares, factors, overlaps = behaviour.shares(data), behaviour.factors(data), behaviour.overlaps(data)
    assert shares.share.sel(intervention="untouched", part="all").values.tolist() == pytest.approx([0.2] * 3)
    assert factors.sel(intervention="int8", part="all").values.tolist() == pytest.approx([2] * 3)
    assert factors.sel(intervention="letterbox", part="photograph").values.tolist() == pytest.approx([1 / 6 / 0.2] * 3)
    assert shares.own.sel(intervention="letterbox", part="photograph", end="value") == pytest.approx(2 / 6)
    assert overlaps.iou.sel(intervention="int8").values.tolist() == pytest.approx([0.2] * 3)
    assert overlaps.again.sel(intervention="int8").values.tolist() == pytest.approx([0.5] * 3)
    assert behaviour.border(data) == ((1.0, 1.0, 1.0), 1.0)
    assert behaviour.position_correlation(data) == pytest.approx((1, 1, 1))
    data["outliers"].loc[{"intervention": "untouched"}] = 0
    assert np.isnan(behaviour.factors(data).sel(part="all")).all()


def test_the_table_says_what_was_planted() -> None:
    table = report.behaviour.table(planted())
    assert list(table.index) == ["untouched", "letterbox: photograph", "letterbox: bars", "int8"]
    row = table.loc["letterbox: photograph"]
    assert row["patches above 1.6 x the median, %"] == "16.67 [16.67, 16.67]"
    assert row["above 1.6 x the median of the photograph, %"] == "33.33 [33.33, 33.33]"
    assert row["factor"] == "0.83 [0.83, 0.83]"
    assert table.loc["int8", ["overlap", "found again, %"]].tolist() == ["0.20 [0.20, 0.20]", "50 [50, 50]"]
    assert table.loc["untouched", "factor"] == "–"
    assert table["what it means"].tolist()[-1] == behaviour.INTERVENTIONS["int8"].means


def test_the_other_tables_and_the_figure() -> None:
    resolved = xr.Dataset(
        {n: (("side", "image"), np.array([[v] * 4, [4 * v] * 4])) for n, v in (("outliers", 2.0), ("patches", 50.0))}
        | {"largest": (("side", "image"), np.full((2, 4), 1.5))},
        coords={"side": [112, 224]},
        attrs={"ratio": 1.6, "native": 224},
    )
    sizes = report.behaviour.sizes(resolved)
    assert sizes["outliers an image"].tolist() == ["2.0", "8.0"]
    assert set(sizes["patches above 1.6 x the median, %"]) == {"4.00 [4.00, 4.00]"}
    cosines = xr.Dataset({"outlier": ("image", [0.5, 0.5, np.nan]), "normal": ("image", [np.nan] * 3)})
    places = report.behaviour.places(planted(), cosines)
    assert places["found"].tolist()[-1] == "0.50 [0.50, 0.50]"
    assert places["to compare with"].tolist()[-1] == "– of median patches"
    figure = report.behaviour.plot_shares({"a": planted(), "b": planted()}, {"a": resolved})
    assert isinstance(figure, Figure)
    figure.canvas.draw()
    left, right = figure.axes
    assert [t.get_text() for t in left.get_yticklabels()] == list(report.behaviour.table(planted()).index)
    np.testing.assert_allclose(left.lines[0].get_xdata(), [20, 100 / 6, 100, 40])
    np.testing.assert_allclose(right.lines[0].get_ydata(), [4, 4])
    assert left.get_xlabel().endswith("(linear to 2, logarithmic above)")
    assert left.xaxis.get_transform().linthresh == 2


def test_cosines_of_planted_outliers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outliers of one direction, ordinary patches of random ones; an image without an outlier has no pair."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(3, 1, 16, 48))
    states[:2, 0, 7] = 100
    monkeypatch.setattr(behaviour, "capture", lambda *_, **__: {"tokens": xr.DataArray(states)})
    found = behaviour.cosines(tiny(), pixels(3))
    np.testing.assert_allclose(found["outlier"], [1, 1, np.nan])
    assert abs(found["normal"].values[:2]).max() < 0.6
    states[:2, 0, 7] = states[:2, 0, 6]
    assert np.isnan(behaviour.cosines(tiny(), pixels(3))["outlier"]).all()


# --- the words


def test_every_change_is_told_in_words() -> None:
    table = pd.DataFrame([(n, i.done, i.means) for n, i in behaviour.INTERVENTIONS.items()])
    assert table.map(len).gt(2).all().all()
    assert not table[[1, 2]].apply(lambda c: c.duplicated()).any().any()
    assert table[2].str.endswith(".").all()
    assert not table[2].str.contains(r"\d %").any()  # what was found stands in the numbers


def test_the_rows_of_published_networks() -> None:
    rows = [networks.ENTRIES[n] for n in ("behaviour", "behaviour_resolutions", "behaviour_cosines")]
    assert [(r.images, r.bare) for r in rows] == [("coco", True)] * 3


# --- a real network


@pytest.fixture(scope="module")
def real(shared_data: Path) -> tuple[Backbone, Images]:
    weights = shared_data / "deit-tiny" / "deit_tiny_patch16_224.safetensors"
    vit = registry.load("deit_tiny_patch16_224", weights=str(weights), device="cpu")
    return vit, networks.open_set("coco", vit, str(shared_data / "coco-256"))


def share(found: xr.Dataset, name: str, part: str = "all") -> float:
    at = {"intervention": name, "part": part}
    return float(found.outliers.sel(at).sum() / found.patches.sel(at).sum())


def test_outliers_of_a_real_network_move_as_the_book_says(real: tuple[Backbone, Images]) -> None:
    names = ["no CLS", "grey", "noise", "letterbox", "bfloat16", "int8"]
    found = behaviour.interventions(*real, names=names, first=16)
    base = share(found, "untouched")
    assert 0.02 < base < 0.06
    assert share(found, "no CLS") < base / 10
    assert share(found, "grey") == 0
    assert share(found, "noise") > base
    assert share(found, "letterbox", "photograph") < 0.01
    assert float(found.own.sel(intervention="letterbox", part="photograph").sum()) / (16 * 8 * 14) < base / 2
    assert share(found, "letterbox", "bars") > base
    assert 0.7 < share(found, "int8") / base < 1.6
    iou = behaviour.overlaps(found).iou.sel(end="value")
    assert iou.sel(intervention="bfloat16") > 0.8
    assert iou.sel(intervention="int8") < 0.8


@pytest.mark.nightly
def test_the_whole_table_of_a_real_network(real: tuple[Backbone, Images]) -> None:
    found = behaviour.interventions(*real, first=64)
    assert list(found.intervention.values) == list(behaviour.INTERVENTIONS)
    factor = behaviour.factors(found).sel(part="all", end="high")
    for name in ("tiled", "outliers removed"):
        assert factor.sel(intervention=name) < 1, name
    iou = behaviour.overlaps(found).iou.sel(end="value")
    assert iou.sel(intervention="shift") < iou.sel(intervention="flip") < iou.sel(intervention="bfloat16")
    sized = behaviour.resolutions(*real, first=32)
    shares = behaviour.shares(sized).share.sel(end="value")
    assert ((shares > 0.01) & (shares < 0.07)).all()  # a share, while their number grows
    number = sized.outliers.mean("image")
    assert number.sel(side=320) > 2 * number.sel(side=160)
    near = behaviour.cosines(*real, first=64).mean()
    assert near.outlier > near.normal + 0.3
