"""The laboratory log and the chapters quote only what stored runs say."""

import re

import numpy as np
import pytest

from vitregs import arrays, cache, paths
from vitregs.book import chapter
from vitregs.claims import networks
from vitregs.data import scenes
from vitregs.measure import fingerprint, outliers, redundancy
from vitregs.models import registry
from vitregs.train import monitor

DEIT = "deit_tiny_patch16_224"


def test_deit_tiny_has_a_mode_at_twice_the_median() -> None:
    norms = networks.read(DEIT, "norms")
    assert norms.sizes["image"] == 256
    table = outliers.layer_evidence(norms)
    found = fingerprint.mode(norms, table)
    assert (found.answer, found.more["rise"]) == ("for", 6)
    assert 1.9 < found.low < found.value < found.high < 2.1
    assert found.more["share"] == pytest.approx(0.037, abs=0.005)
    assert outliers.largest_ratio(norms).sel(layer=12).median() == pytest.approx(2.3, abs=0.05)
    stored = networks.read(DEIT, "fingerprint").attrs
    assert (stored["word"], stored["strength"]) == ("artifacts, mild", pytest.approx(found.value, abs=0.01))
    assert networks.read(f"{DEIT}+tt1", "fingerprint").attrs["verdict"] == "none"


def test_its_large_norms_sit_on_redundant_patches() -> None:
    norms = networks.read(DEIT, "norms").isel(layer=-1)
    similar = arrays.patches(networks.read(DEIT, "similarity")).values
    hot = arrays.patches(outliers.mark_outliers(norms, outliers.find_cutoff(norms))).values
    assert np.median(similar[hot]) > np.median(similar[~hot]) + 0.25


@pytest.mark.parametrize(("step", "share"), [(3000, 0.016), (5000, 0.012), (10_000, 0.002), (14_000, 0), (20_000, 0)])
def test_the_upper_branch_of_the_register_model_comes_and_goes(step: int, share: float) -> None:
    log = registry.history("supervised-pico-reg4")
    assert log is not None
    then = log.sel(step=step).isel(layer=-1)
    counts = then["hist"].values
    above = counts[then["bin"].values > 2.5 * float(then["median"])].sum() / counts.sum()
    assert above == pytest.approx(share, abs=0.0006)


PAIRS = [f"{o}-pico{r}" for o in ("clip", "mae", "dino", "dinov2") for r in ("", "-reg4")]


@pytest.mark.parametrize("name", PAIRS)
def test_each_objective_has_learned_colours(name: str) -> None:
    card = registry.card(name)
    assert card["linear"]["colour"] > card["linear_untrained"]["colour"] + 0.15


@pytest.mark.parametrize("name", [n for n in registry.zoo() if n not in ("mae-pico", "mae-pico-reg4")])
def test_outliers_have_not_emerged(name: str) -> None:
    log = registry.history(name)
    assert log is not None
    assert not monitor.emerged(log)


@pytest.mark.parametrize("name", ["mae-pico", "mae-pico-reg4"])
def test_mae_meets_the_rule_with_its_objects(name: str) -> None:
    """The first half of the rule, and the table of chapter 7: hardly an outlier on plain background."""
    log = registry.history(name)
    assert log is not None
    assert monitor.emerged(log)
    data = cache.load_dataset(paths.ROOT / "data" / "results" / "07_registers" / f"norms.{name}.nc")
    found = outliers.judge_emergence(data["value"], data["background"].values)
    assert found.emerged
    assert found.artifact is False
    assert found.background[0] < 0.01
    assert found.rest[0] > 0.8


@pytest.mark.parametrize(("name", "ratio"), [("hunt-femto", 3.9), ("hunt-nano", 3.6), ("hunt-pico", 2.2)])
def test_wider_networks_have_smaller_ratios(name: str, ratio: float) -> None:
    log = registry.history(name)
    assert log is not None
    assert monitor.strongest(log)["top1"] == pytest.approx(ratio, abs=0.06)


@pytest.mark.parametrize("name", ["hunt-femto", "hunt-nano", "hunt-pico", "hunt-long", "clip-pico"])
def test_sinks_come_first(name: str) -> None:
    """More than ten fair shares on one patch within the first thousand steps."""
    log = registry.history(name)
    assert log is not None
    assert float(log["sink"].sel(kind="patch").max("block").sel(step=slice(0, 1100)).max()) > 10


def test_clips_mode_tells_images_apart() -> None:
    """2.7 % of the patches at 2.1 x the median, in 8 of 64 images, up to 35 patches of one."""
    norms = cache.load_dataset(paths.ROOT / "data" / "results" / "07_registers" / "norms.clip-pico.nc")["value"]
    at = norms.sel(layer=4)
    cut = outliers.find_cutoff(at)
    assert (cut.share, cut.ratio) == pytest.approx((0.027, 2.1), abs=0.05)
    marked = outliers.mark_outliers(at, cut)
    count = arrays.patches(marked).values.sum(1)
    assert (len(count), (count > 0).sum(), count.max()) == (64, 8, 35)


def test_hunt_pico_marks_two_colours() -> None:
    """The mode of its last block on the scenes of chapter 3: 98 % of orange, 91 % of red, no other colour, no background."""
    norms = cache.load_dataset(paths.ROOT / "data" / "results" / "03_when_outliers_appear" / "norms.hunt-pico.nc")[
        "value"
    ]
    at = norms.isel(layer=-1)
    marked = outliers.mark_outliers(at, outliers.find_cutoff(at))
    run = chapter.Run("03_when_outliers_appear", models=["hunt-pico"], device="cpu")
    colours = run.colours(run.backbones["hunt-pico"])
    assert colours is not None
    share = redundancy.share_by_group(marked, colours, scenes.COLOUR_NAMES).set_index("group")["share"]
    assert share["orange"] == pytest.approx(0.98, abs=0.01)
    assert share["red"] == pytest.approx(0.905, abs=0.01)
    assert share.drop(["orange", "red"]).max() < 0.02


def test_the_register_sweep_is_that_of_the_cards() -> None:
    part = (
        (paths.ROOT / "data" / "results" / "LOG.md")
        .read_text()
        .split("how many registers, and what a seed is worth")[1]
    )
    rows = dict(re.findall(r"^\| `(clip-pico[\w-]*)` \|(.*)\|$", part, re.MULTILINE))
    assert {"clip-pico", *(f"clip-pico-reg{n}" for n in (1, 2, 4, 8, 16)), "clip-pico-seed1"} <= rows.keys()
    for name, row in rows.items():
        registers, seed, minutes, accuracy, colour, shape = (float(v) for v in row.split("|"))
        card = registry.card(name)
        assert (registers, seed) == (card["recipe"]["registers"], card["recipe"]["seed"])
        assert minutes == pytest.approx(card["minutes"], abs=0.6)
        found = (card["accuracy"], card["linear"]["colour"], card["linear"]["shape"])
        # the log has what was read before the weights were rounded, which moves no score by more than three images
        assert (accuracy, colour, shape) == pytest.approx(found, abs=3.5e-3)


def test_values_of_deit_tinys_largest_norms_are_short() -> None:
    lengths = networks.read(DEIT, "lengths")
    assert lengths["ratio"].sel(projection=["value", "key", "query"]).values == pytest.approx(
        [0.43, 0.86, 0.77], abs=0.03
    )
