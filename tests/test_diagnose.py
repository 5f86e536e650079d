"""The diagnosis of a ViT whose large norms were planted by hand on flat patches, and of the same ViT without them."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitregs import arrays
from vitregs.data import images
from vitregs.errors import InputError
from vitregs.measure import outliers
from vitregs.measure.diagnose import Diagnosis, diagnose
from vitregs.measure.fingerprint import STRONG
from vitregs.models import registry
from vitregs.models.backbone import Backbone

SIDE, IMAGES, LAYER = 96, 60, 2
COLUMNS = ["layer", "median", "largest", "top1", "cutoff", "share", "separation", "ratio", "sink", "sink_error"]


def small(name: str = "vit_tiny_patch16_224", **options: object) -> Backbone:
    return registry.random(name, depth=4, img_size=SIDE, **options)


def plant(backbone: Backbone, norm: float = 80.0) -> Backbone:
    """Give a random ViT register neurons that write a large vector on flat patches, in block 2 alone.

    The patch embedding answers to contrast only (filters without mean), but for channel 0, which is constant: after the
    layer norm that channel is large where nothing else is. Hidden neurons that fire beyond a threshold then write to
    channel 1; block 3 reads channel 1 and takes the vector away again, so that the last layer hides what happened.
    """
    net = backbone.net
    with torch.no_grad():
        filters = net.patch_embed.proj.weight
        filters -= filters.mean((2, 3), keepdim=True)
        filters *= 1.2 / filters.flatten(1).norm(dim=1).mean()
        filters[0] = 0
        net.patch_embed.proj.bias.zero_()
        net.patch_embed.proj.bias[0] = 3
        net.pos_embed.mul_(0.1)
        for block, channel, threshold, height in ((1, 0, 9.0, norm), (2, 1, 7.0, -norm)):
            mlp = net.blocks[block].mlp
            mlp.fc1.weight[:4] = 0
            mlp.fc1.weight[:4, channel] = 1
            mlp.fc1.bias[:4] = -threshold
            mlp.fc2.weight[:, :4] = 0
            mlp.fc2.weight[1, :4] = height / 4 / (math.sqrt(backbone.width - 1) - threshold)
    return backbone


def paint(folder: Path, size: tuple[int, int] = (SIDE, SIDE), flat: int = 2, seed: int = 0) -> float:
    """Images of noise with `flat` flat patches each, at random: → share of flat patches."""
    rng = np.random.default_rng(seed)
    rows, columns = size[0] // 16, size[1] // 16
    for n in range(IMAGES):
        image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        for place in rng.choice(rows * columns, flat, replace=False):
            y, x = divmod(int(place), columns)
            image[16 * y : 16 * y + 16, 16 * x : 16 * x + 16] = rng.integers(0, 256, 3)
        Image.fromarray(image).save(folder / f"{n:02d}.png")
    return flat / (rows * columns)


@dataclass
class Case:
    folder: Path
    share: float
    found: Diagnosis


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("flat")
    share = paint(folder)
    return Case(folder, share, diagnose(plant(small()), images.open_images(str(folder), size=SIDE)))


def test_planted_norms_are_found_at_their_layer_with_their_share(planted: Case):
    found = planted.found
    assert (found.verdict, found.layer) == ("content", LAYER)  # flat or not: what a patch shows tells its mark
    row = found.layers.set_index("layer").loc[LAYER]
    assert row["share"] == pytest.approx(planted.share, rel=0.1)
    assert row["ratio"] > STRONG
    assert f"holds {100 * row['share']:.1f} % of the patches" in found.evidence
    assert "what a patch shows tells its mark with an average precision of 1.00" in found.evidence


def test_the_other_layers_show_little_of_it(planted: Case):
    """Nothing before the block that writes; behind the block that takes the norm away again a small rest is left."""
    table = planted.found.layers.set_index("layer")
    assert table.loc[:1, "cutoff"].isna().all()
    assert (table.loc[3:, "ratio"] < table.loc[LAYER, "ratio"] / 2).all()
    mode = planted.found.fingerprint.parts["mode"]
    assert (mode.more["first_layer"], mode.more["rise"]) == (LAYER, LAYER)


def test_the_right_tokens_are_the_outliers(planted: Case):
    norms = planted.found.norms.sel(layer=LAYER)
    marked = arrays.patches(outliers.mark_outliers(norms, outliers.find_cutoff(norms)))
    files = [planted.folder / name for name in sorted(p.name for p in planted.folder.iterdir())]
    order = np.random.default_rng(0).permutation(len(files))  # as images draws them
    for row, i in zip(marked.values, order, strict=True):
        pixels = np.asarray(Image.open(files[i])).reshape(6, 16, 6, 16, 3).transpose(0, 2, 1, 3, 4).reshape(36, -1, 3)
        np.testing.assert_array_equal(row, (np.ptp(pixels, axis=1) == 0).all(1))


def test_the_unaltered_model_has_none(planted: Case):
    found = diagnose(small(), images.open_images(str(planted.folder), size=SIDE))
    assert found.verdict != "artifacts"
    assert found.layers["cutoff"].isna().all()


def test_without_flat_patches_the_planted_neurons_are_silent(tmp_path: Path):
    assert paint(tmp_path, flat=0) == 0
    assert diagnose(plant(small()), images.open_images(str(tmp_path), size=SIDE)).verdict == "none"


def test_registers_do_not_count(planted: Case):
    backbone = small("vit_small_patch14_reg4_dinov2.lvd142m", patch_size=16, embed_dim=192, num_heads=3)
    assert backbone.registers == 4
    with torch.no_grad():
        backbone.net.reg_token.mul_(1e4)
    found = diagnose(backbone, images.open_images(str(planted.folder), size=SIDE, count=20))
    assert found.verdict != "artifacts"
    assert set(found.norms["kind"].values) == {"patch"}


def test_what_was_looked_at_is_said(planted: Case):
    found = planted.found
    assert found.model == "vit_tiny_patch16_224"
    assert found.weights == "random weights"
    assert (found.image_count, found.size, found.skipped) == (IMAGES, (SIDE, SIDE), [])
    assert list(found.layers.columns) == COLUMNS
    assert found.norms.sizes == {"image": IMAGES, "layer": 5, "token": 36}
    assert found.layers["sink"].isna().tolist() == [True, False, False, False, False]
    assert (found.layers["sink"][1:] >= 0.9).all()  # the most attended patch gets at least about a fair share


def test_a_fixed_cutoff(planted: Case):
    found = diagnose(plant(small()), images.open_images(str(planted.folder), size=SIDE), cut=30.0)
    assert (found.verdict, found.layer) == ("inconclusive", LAYER)  # no rule was applied
    part = found.fingerprint.parts["mode"]
    assert part.answer == "open"
    assert f"{100 * planted.share:.1f} % of the patches" in part.sentence
    assert "lie above the fixed cut-off 30, at " in part.sentence
    assert "second mode" not in found.text()
    assert "above %" in found.text()
    assert found.fingerprint.parts["place"].answer == "against"
    assert found.rule == "fixed at 30"
    assert (found.layers["cutoff"] == 30).all()
    assert found.layers["share"][LAYER] == pytest.approx(planted.share)
    assert "cut-off: fixed at 30" in found.text()


def test_a_fixed_cutoff_above_all_norms(planted: Case):
    found = diagnose(plant(small()), images.open_images(str(planted.folder), size=SIDE, count=20), cut=1e4)
    assert found.verdict == "inconclusive"
    assert found.evidence == "no patch above the fixed cut-off 10000 at any layer; no rule was applied"
    assert (found.layers["share"] == 0).all()


def test_a_cutoff_that_makes_no_sense_is_a_problem(planted: Case):
    with pytest.raises(InputError, match="positive"):
        diagnose(small(), images.open_images(str(planted.folder), size=SIDE, count=2), cut=-1.0)


@pytest.mark.parametrize("size", [(64, 128), (128, 48)])
def test_images_that_are_not_square(tmp_path: Path, size: tuple[int, int]):
    share = paint(tmp_path, size, flat=1)
    found = diagnose(plant(small()), images.open_images(str(tmp_path), size=size))
    assert (found.verdict, found.layer, found.size) == ("content", LAYER, size)
    assert found.layers["share"][LAYER] == pytest.approx(share, rel=0.1)
    patch = arrays.patches(found.norms)
    assert (int(patch.y.max()) + 1, int(patch.x.max()) + 1) == (size[0] // 16, size[1] // 16)
    assert f"at {size[0]}x{size[1]}" in found.text()


@pytest.mark.filterwarnings("ignore:skipped")
@pytest.mark.parametrize("broken", ["00.png", "59.png", "30.png"])
def test_all_skipped_images_are_reported(tmp_path: Path, broken: str):
    """Wherever they come in the order."""
    paint(tmp_path)
    (tmp_path / broken).write_bytes(b"no picture")
    found = diagnose(small(), images.open_images(str(tmp_path), size=SIDE), batch=4)
    assert found.skipped == [broken]
    assert found.image_count == IMAGES - 1
    assert found.facts()["skipped"] == [broken]


def test_too_few_images_are_a_problem(planted: Case):
    with pytest.raises(InputError, match="72 norms are too few"):
        diagnose(small(), images.open_images(str(planted.folder), size=SIDE, count=2))


def test_the_batch_does_not_matter(planted: Case):
    source = images.open_images(str(planted.folder), size=SIDE)
    again = diagnose(plant(small()), source, batch=7)
    assert (again.verdict, again.layer) == (planted.found.verdict, planted.found.layer)
    np.testing.assert_allclose(
        again.layers.drop(columns="separation"), planted.found.layers.drop(columns="separation"), rtol=1e-2
    )
    assert planted.found.sinks == "exact"  # 37 tokens: there is nothing to save


def test_scenes_are_diagnosed():
    found = diagnose(small(), images.open_images("scenes", size=SIDE, count=8))
    assert (found.images, found.image_count) == ("scenes", 8)
    assert found.verdict != "artifacts"


def strict(text: str) -> object:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_facts_are_json(planted: Case):
    facts = planted.found.facts()
    again = strict(json.dumps(facts, allow_nan=False))
    assert isinstance(again, dict)
    assert set(again) == {
        "model",
        "weights",
        "images",
        "image_count",
        "size",
        "verdict",
        "layer",
        "evidence",
        "rule",
        "skipped",
        "sinks",
        "notes",
        "layers",
        "fingerprint",
    }
    assert again["verdict"] == again["fingerprint"]["verdict"] == "content"
    assert list(again["fingerprint"]["parts"]) == ["mode", "place", "attention", "neurons", "cause"]
    assert [row["layer"] for row in again["layers"]] == [0, 1, 2, 3, 4]
    assert all(isinstance(row["layer"], int) for row in again["layers"])
    assert again["layers"][0]["sink"] is None
    assert again["layers"][0]["cutoff"] is None
    assert again["layers"][LAYER]["cutoff"] == planted.found.layers["cutoff"][LAYER]


def test_facts_are_json_whatever_was_measured(planted: Case):
    layers = planted.found.layers.copy()
    layers.loc[1, "largest"] = math.inf
    again = strict(json.dumps(replace(planted.found, layers=layers).facts(), allow_nan=False))
    assert isinstance(again, dict)
    assert again["layers"][1]["largest"] is None


def test_the_report_is_stable(planted: Case):
    again = diagnose(plant(small()), images.open_images(str(planted.folder), size=SIDE))
    assert again.text() == planted.found.text()


def test_the_report_in_words(planted: Case):
    found = planted.found
    text = found.text()
    lines = text.split("\n")
    assert lines[0] == f"vit_tiny_patch16_224 (random weights) on 60 images of {planted.folder} at 96x96"
    header = lines[2]
    for title in ("layer", "median norm", "largest/median", "top 1%/median", "cut-off", "2nd mode %", "its ratio"):
        assert title in header
    cells = [line.split() for line in lines[3:8]]
    assert [row[0] for row in cells] == ["0", "1", "2", "3", "4"]
    assert cells[0][4:] == ["none", "-", "-", "-", "-"]
    row = found.layers.set_index("layer").loc[LAYER]
    assert cells[LAYER][4] == f"{row['cutoff']:.1f}"
    assert cells[LAYER][5] == f"{100 * row['share']:.2f}"
    assert cells[LAYER][7] == f"{row['ratio']:.1f}"
    assert cells[LAYER][8].endswith("x")
    assert " ".join(text.split("\n\n")[-1].split()) == f"verdict: content (layer 2): {found.evidence}"
    assert max(map(len, lines[1:])) <= 100
    for name, part in found.fingerprint.parts.items():
        assert f"\n{name:<10} {part.answer:<13}" in text
    assert "nan" not in text
