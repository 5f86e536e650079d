"""Artifact or content: planted networks, planted arrays, and a real network that has the artifact."""

import itertools
import json
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from PIL import Image
from scipy.special import erfinv
from timm.models.vision_transformer import ParallelThingsBlock

from tests import planted
from vitregs import arrays
from vitregs import cache as store
from vitregs.data import images
from vitregs.measure import diagnose as diagnosis
from vitregs.measure import fingerprint, outliers
from vitregs.measure.diagnose import Diagnosis, diagnose
from vitregs.measure.fingerprint import CAUSE, FEW, PARTS, SINK, Fingerprint, Part
from vitregs.models import capture, registry, test_time
from vitregs.models.backbone import Backbone

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning", "ignore::UserWarning:timm.layers")
SIDE = (3, 4)  # rows and columns of planted arrays


# --- planted networks
@cache
def found(what: str, strength: float, seed: int = 0) -> Diagnosis:
    return diagnose(planted.network(what, strength, seed), planted.images(48, seed + 5), progress=False)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("strength", [1.8, 3.0, 10.0])
@pytest.mark.parametrize("what", ["artifacts", "content"])
def test_planted_modes_are_told_apart_at_any_strength(what: str, strength: float, seed: int) -> None:
    mark = found(what, strength, seed).fingerprint
    assert mark.verdict == what
    assert mark.strength == pytest.approx(strength, rel=0.2)
    assert mark.parts["mode"].low <= mark.strength <= mark.parts["mode"].high
    assert mark.layer >= planted.BLOCK
    assert mark.word == (what if what == "content" else f"artifacts, {'strong' if strength > 4 else 'mild'}")
    assert [p.answer for p in mark.parts.values()] == ["for", "for" if what == "artifacts" else "against", *["for"] * 3]
    assert planted.NEURON in mark.neurons[planted.BLOCK]


@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_planted_is_none(seed: int) -> None:
    mark = found("nothing", 1.0, seed).fingerprint
    assert (mark.word, mark.neurons, list(mark.parts)) == ("none", {}, ["mode"])
    assert np.isnan(mark.strength)


def test_the_cure_leaves_none() -> None:
    sick, pixels = planted.network("artifacts", 3.0), planted.images(48, 5)
    neurons = found("artifacts", 3.0).fingerprint.neurons
    for cured in (test_time.append(sick, neurons=neurons), test_time.suppress(sick, neurons)):
        assert diagnose(cured, pixels, quick=True, progress=False).verdict == "none"


def test_quick_asks_for_neither_neurons_nor_cause() -> None:
    quick = diagnose(planted.network("artifacts", 3.0), planted.images(48, 5), quick=True, progress=False)
    answers = {n: p.answer for n, p in quick.fingerprint.parts.items()}
    assert (answers.pop("neurons"), answers.pop("cause"), set(answers.values())) == (*["not measured"] * 2, {"for"})
    assert (quick.verdict, quick.fingerprint.neurons, quick.searched) == ("artifacts", {}, None)
    assert "\nneurons    not measured left out (quick)\ncause      not measured left out (quick)" in quick.text()
    assert "(quick)" not in found("artifacts", 3.0).text()


def test_blocks_of_unknown_form_leave_the_rest_of_the_report() -> None:
    """Parallel blocks have no MLP whose neurons could be told."""
    bare = registry.random("vit_tiny_patch16_224", depth=2, img_size=96, block_fn=ParallelThingsBlock)
    source = images.open_images("scenes", size=96, count=16)
    seen = diagnose(bare, source, cut=_typical(bare), progress=False)
    parts = seen.fingerprint.parts
    assert [parts[n].answer for n in ("mode", "neurons", "cause")] == ["open", "not measured", "not measured"]
    assert parts["neurons"].sentence.endswith(
        "(ParallelThingsBlock) has no MLP of known form: its neurons cannot be told"
    )
    assert parts["place"].answer != "not measured"
    assert "\nneurons    not measured block" in seen.text()


# --- the verdict
def part(name: str, answer: str, **values: float) -> Part:
    return Part(name, answer, f"the sentence of {name}", **values)


def judged(*answers: str) -> str:
    return fingerprint.judge({n: part(n, a) for n, a in zip(PARTS, answers, strict=False)})[0]


def test_the_verdict_follows_from_the_answers() -> None:
    """All combinations, by the rule of the log in other words."""
    options = ("for", "against", "open", "not measured")
    for mode, place, attention, neurons, cause in itertools.product(options, repeat=5):
        if mode != "for":
            wanted = "none" if mode == "against" else "inconclusive"
        elif place == "against":
            wanted = "content"
        elif place == "for" and (attention == "for" or (neurons, cause) == ("for", "for")):
            wanted = "artifacts"
        else:
            wanted = "inconclusive"
        assert judged(mode, place, attention, neurons, cause) == wanted, (mode, place, attention, neurons, cause)
    assert judged("against") == "none"
    assert judged("for", "for", "for") == "artifacts"  # quick
    assert judged("for", "for", "open") == "inconclusive"


def test_the_verdict_says_why() -> None:
    say = lambda *answers: fingerprint.judge({n: part(n, a) for n, a in zip(PARTS, answers, strict=False)})[1]  # noqa: E731
    assert say("against") == "the sentence of mode"
    assert say("for", "against") == "the sentence of mode, but the sentence of place"
    assert say("for", "for", "against", "for", "for").endswith("; place, neurons, cause agree")
    assert "place open, attention for, neurons not measured" in say("for", "open", "for")


# --- the parts, on planted arrays
def tokens(values: np.ndarray, dims: tuple[str, ...], **coords: object) -> xr.DataArray:
    return xr.DataArray(
        values, dims=dims, coords={**arrays.token_coords(["patch"] * (SIDE[0] * SIDE[1]), SIDE), **coords}
    )


def marks(images: int = 40, share: float = 0.2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((images, SIDE[0] * SIDE[1])) < share


def test_the_mode_in_numbers() -> None:
    marked, rng = marks(60, 0.1), np.random.default_rng(1)
    values = np.exp(2 + 0.1 * rng.standard_normal((60, 4, 12)))
    values[:, 2][marked] *= 3
    values[:, 3][marked] *= 4
    norms = tokens(values, ("image", "layer", "token"), layer=range(4))
    seen = fingerprint.mode(norms, outliers.layer_evidence(norms))
    assert seen.answer == "for"
    assert seen.low <= seen.value <= seen.high
    assert seen.value == pytest.approx(4, rel=0.05)
    assert seen.more["share"] == pytest.approx(marked.mean())
    assert seen.more["share_low"] < marked.mean() < seen.more["share_high"]
    assert (seen.more["first_layer"], seen.more["rise"]) == (2, 2)


@pytest.mark.parametrize(("raised", "rise"), [([1, 2, 3], 1), ([2, 3], 2), ([1, 3], 3), ([3], 3), ([], 3)])
def test_the_rise_is_where_marked_patches_stay_above(raised: list[int], rise: int) -> None:
    marked = marks()
    values = np.ones((40, 4, 12))
    for layer in raised:
        values[:, layer][marked] = 1.2
    norms = tokens(values, ("image", "layer", "token"), layer=range(4))
    assert fingerprint._rise(norms, marked, 3) == rise


def test_the_strength_covers_the_truth() -> None:
    rng, covered = np.random.default_rng(0), 0
    for _ in range(60):
        marked = rng.random((30, 12)) < 0.3
        norms = np.where(marked, 3, 1) * np.exp(0.2 * rng.standard_normal((30, 12)))
        truth = 3 / np.exp(0.2 * np.sqrt(2) * _quantile_of_bulk())
        value, low, high = fingerprint._strength(norms, marked)
        assert low <= value <= high
        covered += low <= truth <= high
    assert covered >= 50


def _quantile_of_bulk() -> float:
    """The median of all lies at 0.5 / 0.7 of the bulk: erfinv of it."""
    return float(erfinv(2 * 0.5 / 0.7 - 1))


def embeddings(marked: np.ndarray, tell: bool, seed: int = 0) -> xr.DataArray:
    """Random patch embeddings whose first channel tells the mark, or does not."""
    values = np.random.default_rng(seed).standard_normal((*marked.shape, 6)) + 1
    if tell:
        values[..., 0] += 40 * marked
    return tokens(values, ("image", "token", "channel"))


def test_content_is_told_and_position_is_not() -> None:
    marked = marks(60)
    value, low, high = fingerprint.content_precision(embeddings(marked, True).values, marked)
    assert (value, low, high) == pytest.approx((1, 1, 1), abs=0.01)
    value, low, high = fingerprint.content_precision(embeddings(marked, False).values, marked)
    assert value == pytest.approx(marked.mean(), abs=0.1)
    assert low < value < high < fingerprint.CONTENT


def test_few_images_do_not_prove_that_there_is_no_mode() -> None:
    bare = planted.network("nothing", 1.0)
    few = diagnose(bare, planted.images(4), quick=True)
    assert few.verdict == "inconclusive"
    assert few.evidence.endswith("; 4 images may hide a mild one: look at 32 or more")
    assert diagnose(bare, planted.images(8), quick=True).verdict == "none"


def test_copies_of_images_are_not_known_by_heart() -> None:
    """Marks that nothing in a patch tells, on images each of which is there twice."""
    draw = np.random.default_rng(0)
    values = draw.normal(size=(12, 64, 8)).astype(np.float32)
    marked = draw.random((12, 64)) < 0.1
    apart = fingerprint.content_precision(values, marked)
    twice = fingerprint.content_precision(
        values.repeat(2, 0) + draw.normal(size=(24, 64, 8)) * 1e-3, marked.repeat(2, 0)
    )
    assert apart[0] < 0.3
    assert twice[0] < 0.3
    assert fingerprint._groups(values).tolist() == list(range(12))
    assert fingerprint._groups(np.zeros((3, 4, 2))).tolist() == [0, 0, 0]


def test_the_answers_of_place() -> None:
    marked = marks(60)
    against = fingerprint.place(embeddings(marked, True), marked)
    assert against.answer == "against"
    assert against.more["content_low"] > fingerprint.CONTENT
    nothing = fingerprint.place(embeddings(marked, False), marked)
    assert nothing.answer == "open"  # no patch resembles its neighbours more than others
    assert nothing.more["gap_low"] < 0 < nothing.more["gap_high"]
    assert nothing.more["chance"] == pytest.approx(marked.mean())
    rare, like = np.zeros((60, 12), bool), embeddings(marked, False)
    for image, at in enumerate(np.random.default_rng(4).choice([5, 6], 60)):  # an inner patch, and the like around it
        rare[image, at] = True
        like.values[image, [at - 4, at - 1, at + 1, at + 4]] = like.values[image, at]
    artifact = fingerprint.place(like, rare)
    assert artifact.answer == "for"
    assert artifact.value == pytest.approx(1)
    assert artifact.control < 0.8
    assert artifact.more["content_high"] < fingerprint.CONTENT


def test_the_background_is_counted_where_it_is_known() -> None:
    marked = marks(20)
    background = np.where(marked, 1.0, 0.3)
    background[10:] = np.nan
    seen = fingerprint.place(embeddings(marked, True), marked, background)
    assert (seen.more["background"], seen.more["background_others"]) == (1, 0)
    assert "100 % of them [100, 100] are pure background, 0 % of the others" in seen.sentence
    unknown = fingerprint.place(embeddings(marked, True), marked, np.full(marked.shape, np.nan))
    assert "background" not in unknown.more


@pytest.mark.parametrize(("level", "answer"), [(5.0, "for"), (0.2, "against"), (1.5, "against"), (2.0, "open")])
def test_the_answers_of_attention(level: float, answer: str) -> None:
    marked = marks(40)
    values = np.ones((40, 2, 12)) + 0.3 * np.random.default_rng(2).standard_normal((40, 2, 12))
    values[:, 0] = np.nan  # cannot be watched
    values[:, 1][marked] += level - 1
    received = tokens(values, ("image", "received_layer", "token"), received_layer=[3, 4])
    cls = received.rename(received_layer="attention_layer").assign_coords(attention_layer=[3, 4])
    seen = fingerprint.attention(received, cls, marked)
    assert seen.answer == answer
    assert seen.value == pytest.approx(level, abs=0.1)
    assert seen.control == pytest.approx(1, abs=0.1)
    assert seen.low < seen.value < seen.high
    assert (seen.more["block"], seen.more["cls_block"]) == (4, 4)
    assert (seen.low > SINK) == (answer == "for")
    assert "cls" not in fingerprint.attention(received, None, marked).more
    blind = fingerprint.attention(received.isel(received_layer=[0]), None, marked)
    assert (blind.answer, blind.sentence) == ("not measured", "no block's attention can be watched")


def searched(
    share: np.ndarray, auc: float = 0.99, contrast: float = 9.0, ends: tuple[float, float] = (2, 2)
) -> xr.Dataset:
    total = np.cumsum(np.sort(share.ravel())[::-1])
    half = float(np.searchsorted(total, 0.5) + 1) if total.max() >= 0.5 else np.nan
    data = {k: (("block", "neuron"), v) for k, v in {
        "share": share, "contrast": np.full(share.shape, contrast), "auc": np.full(share.shape, auc)
    }.items()}  # fmt: skip
    data |= {"half": half, "half_low": ends[0], "half_high": ends[1]}
    return xr.Dataset(data, coords={"block": [1, 2], "neuron": range(share.shape[1])})


def test_the_answers_of_neurons() -> None:
    few = np.zeros((2, 200))
    few[0, 3], few[1, 7] = 0.4, 0.3
    seen = fingerprint.neurons(searched(few))
    assert (seen.answer, seen.value, seen.control) == ("for", 2, 400)
    assert seen.more["register_neurons"] == 2
    assert "in blocks 1 to 2" in seen.sentence
    assert fingerprint.neurons(searched(few, auc=0.6)).answer == "against"
    assert fingerprint.neurons(searched(few, contrast=1.0)).answer == "against"
    many = np.full((2, 200), 1 / 400)
    assert fingerprint.neurons(searched(many, ends=(190, 210))).answer == "against"
    assert FEW * 400 < 200
    wide = np.zeros((2, 200))
    wide.ravel()[:10] = 0.1
    assert fingerprint.neurons(searched(wide, ends=(3, 12))).answer == "open"
    never = fingerprint.neurons(searched(few / 10))
    assert (never.answer, never.sentence.endswith("no number of them half of it")) == ("against", True)
    assert "write 7 % of the shift together" in never.sentence


@pytest.mark.parametrize(("left", "random", "answer"), [(0.0, 1.0, "for"), (0.9, 1.0, "against"), (0.0, 0.0, "open")])
def test_the_answers_of_cause(left: float, random: float, answer: str) -> None:
    base = np.random.default_rng(3).uniform(0.05, 0.15, 30)
    share = np.stack([[base, left * base], [base, random * base]])
    data = xr.Dataset(
        {"share": (("which", "count", "image"), share)}, coords={"which": ["ranked", "random"], "count": [0, 5]}
    )
    seen = fingerprint.cause(data)
    assert seen.answer == answer
    assert (seen.value, seen.control) == pytest.approx((1 - left, 1 - random))
    assert (seen.low > CAUSE) == (left == 0)
    assert seen.more["neurons"] == 5


# --- what could go wrong
def test_edges_give_no_warning() -> None:
    """No marks, all marked, marks in one half alone: answers are open, and nothing is divided by zero aloud."""
    shape = (10, 12)
    one_half = np.zeros(shape, bool)
    one_half[::2, :3] = True
    cases: dict[str, np.ndarray] = {"none": np.zeros(shape, bool), "all": np.ones(shape, bool), "half": one_half}
    for name, marked in cases.items():
        seen = fingerprint.place(embeddings(marked, False), marked)
        assert np.isnan(seen.more["content"]), name
        assert "too few marks" in seen.sentence
        received = tokens(np.ones((10, 1, 12)), ("image", "received_layer", "token"), received_layer=[1])
        assert fingerprint.attention(received, None, marked).answer in ("against", "open", "not measured"), name
    norms = tokens(np.full((20, 2, 12), 3.0), ("image", "layer", "token"), layer=[0, 1])
    seen = fingerprint.mode(norms, outliers.layer_evidence(norms, 1.0))  # a named cut-off below all norms
    assert seen.more["share"] == 1


def test_a_fingerprint_can_be_stored(tmp_path: Path) -> None:
    mark = found("artifacts", 3.0).fingerprint
    facts = json.loads(json.dumps(mark.facts(), allow_nan=False))
    assert (facts["word"], facts["verdict"], facts["layer"]) == (mark.word, mark.verdict, mark.layer)
    assert facts["parts"]["cause"]["value"] == mark.parts["cause"].value
    assert facts["neurons"] == {str(b): n for b, n in mark.neurons.items()}
    mark.dataset().to_netcdf(tmp_path / "mark.nc")
    again = store.load_dataset(tmp_path / "mark.nc")
    assert again.attrs["word"] == mark.word
    assert again.attrs["strength"] == pytest.approx(mark.strength)
    assert again["value"].sel(part="mode") == mark.strength
    assert [str(a) for a in again["answer"].values] == [p.answer for p in mark.parts.values()]
    assert f"{planted.BLOCK}:{planted.NEURON}" in again.attrs["neurons"].split()


@pytest.mark.parametrize("make", [lambda: found("nothing", 1.0).fingerprint, lambda: _quick()])
def test_what_was_not_asked_is_stored_as_unknown(make: Callable[[], Fingerprint]) -> None:
    mark = make()
    table = mark.dataset()
    for name in PARTS:
        asked = name in mark.parts
        assert str(table["answer"].sel(part=name).item()) == (mark.parts[name].answer if asked else "not measured")
        if not asked:
            assert np.isnan(table["value"].sel(part=name))
    json.dumps(mark.facts(), allow_nan=False)


def _quick() -> Fingerprint:
    return diagnose(planted.network("content", 3.0), planted.images(48, 5), quick=True, progress=False).fingerprint


def test_neurons_are_looked_for_in_the_first_images_only(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = registry.random("vit_tiny_patch16_224", depth=1, img_size=96)
    source = images.open_images("scenes", size=96, count=12)
    monkeypatch.setattr(diagnosis, "SEARCHED", 5)
    for some in (source, torch.cat(list(source.pixels()))):
        seen = diagnose(bare, some, cut=_typical(bare), progress=False)
        assert (seen.image_count, seen.searched.attrs["images"]) == (12, 5)
    assert (source.count, source.first(20).count) == (12, 12)


@pytest.mark.parametrize("cut", [None, 1.0])
def test_what_cannot_be_read_is_said_once(tmp_path: Path, cut: float | None) -> None:
    """Whether or not neurons take further passes."""
    for i in range(8):
        noise = np.random.default_rng(i).integers(0, 255, (96, 96, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    bare = registry.random("vit_tiny_patch16_224", depth=1, img_size=96)
    source = images.open_images(str(tmp_path), size=96)
    cut = cut and _typical(bare)
    with pytest.warns(UserWarning, match="skipped 1 of 9 images") as said:
        seen = diagnose(bare, source, cut=cut, progress=False)
    assert len(said) == 1
    assert seen.skipped == ["bad.png"]


# --- networks of other kinds
def test_a_network_without_cls_has_no_attention_of_cls() -> None:
    bare = registry.random("vit_tiny_patch16_224", depth=3, img_size=96, class_token=False, global_pool="avg")
    assert not bare.has_cls
    seen = diagnose(bare, images.open_images("scenes", size=96, count=16), cut=_typical(bare), progress=False)
    assert "of CLS" not in seen.fingerprint.parts["attention"].sentence
    assert set(seen.fingerprint.parts) == set(PARTS)


def _typical(bare: Backbone) -> float:
    """A cut-off that marks a tenth of the patches at the last layer."""
    norms = capture.norms(bare, images.open_images("scenes", size=96, count=16), layers=[-1])
    return float(np.quantile(arrays.patches(norms).values, 0.9))


def test_attention_that_cannot_be_watched_is_not_measured() -> None:
    bare = registry.random("vit_dwee_patch16_reg1_gap_256", depth=2)
    source = images.open_images("scenes", size=128, count=8)
    norms = arrays.patches(capture.norms(bare, source, layers=[-1])).values
    seen = diagnose(bare, source, cut=float(np.quantile(norms, 0.9)), quick=True, progress=False)
    assert seen.fingerprint.parts["attention"].answer == "not measured"


# --- a real network
def test_deit_tiny_has_mild_artifacts(shared_data: Path) -> None:
    deit = registry.load(
        "deit_tiny_patch16_224", weights=shared_data / "deit-tiny" / "deit_tiny_patch16_224.safetensors"
    )
    source = images.open_images(str(shared_data / "coco-256"), size=224, count=32)
    mark = diagnose(deit, source, progress=False).fingerprint
    assert mark.word == "artifacts, mild"
    assert 1.9 < mark.strength < 2.1
    assert 0.025 < mark.parts["mode"].more["share"] < 0.05
    assert mark.parts["mode"].more["rise"] in (6, 7)
    named = {(b, j) for b, numbers in mark.neurons.items() for j in numbers}
    assert {(9, 238), (9, 15), (10, 599), (10, 370)} <= named
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for cured in (test_time.append(deit, neurons=mark.neurons), test_time.suppress(deit, mark.neurons)):
            assert diagnose(cured, source, quick=True, progress=False).verdict == "none"
