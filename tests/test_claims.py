"""The ledger of claims: complete, readable, and judged by its rules; evidence on planted arrays."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from vitregs import arrays, cache, cli, paths
from vitregs.book import parameters
from vitregs.claims import ledger, measures, scoreboard
from vitregs.claims.ledger import MEASURES, NEEDS, VERDICTS, Claim
from vitregs.claims.measures import Measured
from vitregs.data import images
from vitregs.errors import InputError


@pytest.fixture(scope="module")
def board() -> pd.DataFrame:
    return scoreboard.table()


def claim(**changes: str) -> Claim:
    facts = dict.fromkeys(Claim.__dataclass_fields__, "") | {"id": "x", "measure": "planted", "rule": "low > 0"}
    return Claim(**(facts | changes))


# --- the ledger


def test_the_ledger_is_complete() -> None:
    found = ledger.ledger()
    assert len(found) >= 25
    assert len({c.id for c in found}) == len(found)
    assert [c.id for c in found if c.chapter not in parameters.names()] == []
    assert [c.id for c in found if not c.scale or not c.statement or not c.where] == []
    assert [c.id for c in found if c.measure and not (c.rule and c.quantity)] == []
    places = " ".join(c.where for c in found)
    # a schematic (6) and two rows of images (19, 21) that say what Fig 1 and 7 say already make no claim of their own
    figures = set(range(1, 22)) - {6, 13, 19, 21}
    assert {n for n in figures if not re.search(rf"Fig [\d, ]*\b{n}[ab]?\b", places)} == set()
    assert {n for n in range(1, 6) if f"Table {n}" not in places} == set()


def test_every_measure_is_used_and_every_figure_has_a_row_in_the_front_page() -> None:
    assert set(MEASURES) == {c.measure for c in ledger.ledger() if c.measure}
    page = (paths.ROOT / "README.md").read_text()
    rows = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    named = {int(n) for part in re.findall(r"Fig ([\d, ab]+)", rows) for n in re.findall(r"\d+", part)}
    assert named == set(range(1, 22))
    tables = {int(n) for part in re.findall(r"Tables? ([\d, ab]+)", rows) for n in re.findall(r"\d+", part)}
    assert tables == set(range(1, 7))


def test_tensions_of_the_paper_are_rows(board: pd.DataFrame) -> None:
    assert board["where"].str.contains("tension").sum() + board["statement"].str.startswith("Tension").sum() >= 4
    assert board.loc[board["id"] == "lost-clip-worse", "verdict"].item() in VERDICTS


# --- verdicts


@pytest.mark.parametrize(
    ("rule", "holds"),
    [
        ("low > 0", True),
        ("high < 3", False),
        ("value >= 2", True),
        ("value >= 2 and high < 3.5", True),
        ("value >= 2 and low > 1.5", False),
        ("low > -1", True),
    ],
)
def test_rules_are_read(rule: str, holds: bool) -> None:
    assert ledger.holds(rule, Measured(2.0, 1.0, 3.0, 9, "")) == holds


@pytest.mark.parametrize("rule", ["", "mean > 0", "value == 1", "low > 0 or high < 1", "__import__('os')"])
def test_other_rules_are_mistakes(rule: str) -> None:
    with pytest.raises(InputError, match="cannot read the rule"):
        ledger.holds(rule, Measured(0, 0, 0, 1, ""))


def test_verdicts_follow_from_measure_rule_and_condition(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(MEASURES, "planted", lambda _: Measured(1, 0.5, 2, 9, "things"))
    monkeypatch.setitem(NEEDS, "never", lambda _: False)
    monkeypatch.setitem(NEEDS, "always", lambda _: True)
    assert ledger.judge(claim(), tmp_path)[1] == "reproduced"
    assert ledger.judge(claim(rule="high < 1"), tmp_path)[1] == "not reproduced"
    assert ledger.judge(claim(needs="always"), tmp_path)[1] == "reproduced"
    assert ledger.judge(claim(needs="never"), tmp_path)[1] == "not testable at this scale"
    assert ledger.judge(claim(measure=""), tmp_path) == (None, "not testable at this scale")


def test_a_measure_of_nothing_does_not_pass() -> None:
    """nan satisfies no rule, whichever way it points."""
    nothing = Measured(np.nan, np.nan, np.nan, 0, "")
    assert not any(ledger.holds(r, nothing) for r in ("low > 0", "high < 0", "value >= 0", "value <= 0"))


def test_unknown_names_in_the_ledger_are_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    row = dict.fromkeys(Claim.__dataclass_fields__, "x")
    for change, message in (
        ({"measure": "any_mod"}, "unknown measure of claim x 'any_mod': did you mean 'any_mode'"),
        ({"measure": "any_mode", "needs": "modes"}, "unknown condition of claim x 'modes': did you mean 'mode'"),
        ({"measure": "any_mode", "needs": "mode", "rule": "big"}, "cannot read the rule 'big'"),
    ):
        monkeypatch.setattr(ledger.published, "table", lambda _, c=change: pd.DataFrame([row | c]))
        with pytest.raises(InputError, match=message):
            ledger.ledger()


def test_missing_results_are_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read results"):
        scoreboard.table(tmp_path)


def test_the_scoreboard_is_shown(
    board: pd.DataFrame, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(board) == len(ledger.ledger())
    assert set(board["verdict"]) <= set(VERDICTS)
    page = scoreboard.page(board)
    assert page.startswith("# Scoreboard\n")
    assert page.count("* - ") == len(board) + 1
    assert all(
        (parameters.NOTEBOOKS / f"{name}.ipynb").exists() for name in re.findall(r"notebooks/(\w+)\.ipynb", page)
    )
    text = scoreboard.listing(board)
    assert text.endswith(f"{len(board)} claims: {scoreboard.counts(board)}")
    with monkeypatch.context() as patch:  # judged once is enough
        patch.setattr(scoreboard, "table", lambda folder: board if folder == ledger.RESULTS else None)
        assert cli.main(["scoreboard", "--markdown"]) == 0
    assert capsys.readouterr().out.strip() == page.strip()
    assert cli.main(["scoreboard", "--results", "nowhere/at/all"]) == 2
    assert capsys.readouterr().err.startswith("vitregs: cannot read results nowhere/at/all/")


# --- evidence on planted arrays


def keep(folder: Path, chapter: str, name: str, model: str, data: xr.Dataset | xr.DataArray) -> None:
    whole = data if isinstance(data, xr.Dataset) else data.to_dataset(name="value")
    cache.save_dataset(whole, folder / chapter / f"{name}.{model}.nc")


def test_differences_carry_both_intervals(tmp_path: Path) -> None:
    cells = {"score": [0.5, 0.2, 0.3], "low": [0.46, 0.17, 0.26], "high": [0.53, 0.24, 0.34]}
    data = xr.Dataset(
        {k: (("quantity", "group"), [v]) for k, v in cells.items()} | {"tokens": ("group", [9, 5, 7])},
        coords={"quantity": ["top1"], "group": ["normal", "outlier", "normal on objects"]},
        attrs={"positions": 36},
    )
    keep(tmp_path, "05_local_information", "local", "hunt-pico", data)
    found = measures.position(tmp_path)
    assert found.value == pytest.approx(-30)
    assert found.low == pytest.approx(-30 - 100 * np.hypot(0.03, 0.03))
    assert found.high == pytest.approx(-30 + 100 * np.hypot(0.04, 0.04))
    assert found.n == 5
    assert measures.position_controlled(tmp_path).value == pytest.approx(-10)
    assert measures.position_above_chance(tmp_path).value == pytest.approx(20 - 100 / 36)


def test_gaps_between_tokens_are_over_questions(tmp_path: Path) -> None:
    data = xr.Dataset(
        {"score": (("task", "token"), [[0.9, 0.5, 0.7, 0.8], [0.8, 0.4, 0.4, 0.6]])},
        coords={"task": ["a", "b"], "token": ["cls", "normal", "outlier", "register"]},
    )
    for model in ("hunt-pico", "clip-pico-reg4"):
        keep(tmp_path, "06_global_information", "tokens", model, data)
    assert measures.outlier_knows(tmp_path).value == pytest.approx(10)
    assert measures.outlier_and_cls(tmp_path).value == pytest.approx(-30)
    assert measures.register_knows(tmp_path).value == pytest.approx(25)
    assert measures.outlier_knows(tmp_path).low == pytest.approx(0)


PLAIN = ("supervised-pico", "clip-pico", "mae-pico", "dino-pico", "dinov2-pico")


def test_planted_outliers_are_a_mode_and_an_artifact_only_on_the_background(tmp_path: Path) -> None:
    """The same outliers, once on plain background and once on objects: only the first is the paper's artifact."""
    rng = np.random.default_rng(0)
    coords = arrays.token_coords(["patch"] * 64, (8, 8))
    plain = xr.DataArray(
        rng.lognormal(3, 0.1, (48, 9, 64)), dims=("image", "layer", "token"), coords={**coords, "layer": range(9)}
    )
    truth = xr.DataArray(rng.choice([0, 0.5, 1], (48, 64), p=[0.4, 0.2, 0.4]), dims=("image", "patch"))
    for on_background in (True, False):
        planted = plain.copy(deep=True)
        place = (truth.values == (1 if on_background else 0)) & (rng.random(truth.shape) < 0.15)
        planted.values[:, 5:][np.broadcast_to(place[:, None], planted.values[:, 5:].shape)] *= 10
        for model in (*PLAIN, "hunt-pico", "hunt-long"):
            chapter = "03_when_outliers_appear" if model.startswith("hunt") else "07_registers"
            chosen = planted if model in ("clip-pico", "hunt-pico") else plain
            keep(tmp_path, chapter, "norms", model, xr.Dataset({"value": chosen, "background": truth}))
        assert measures.has_mode(tmp_path)
        assert measures.any_mode(tmp_path).value == pytest.approx(100 * place.mean(), rel=0.05)
        assert measures.any_mode(tmp_path).n == 48
        assert measures.largest_mode(tmp_path).value == pytest.approx(10, rel=0.1)
        assert measures.has_artifacts(tmp_path) == on_background
        assert measures.placed(tmp_path)["clip-pico"] == on_background
        assert not measures.placed(tmp_path)["dino-pico"]
        assert measures.artifact_exists(tmp_path).value == float(on_background)
        assert measures.first_layer(tmp_path).value == pytest.approx(5 / 8)
        assert measures.dino_mode(tmp_path).value == 0
    keep(tmp_path, "07_registers", "norms", "clip-pico", planted)  # images without masks tell nothing on where
    assert measures.placed(tmp_path)["clip-pico"] is None


def test_stored_norms_have_the_truth_of_their_scenes() -> None:
    """Evidence asks the stored arrays alone: the scenes of a chapter, drawn again, have the background that is kept."""
    for model in ("hunt-pico", "mae-pico"):
        data = measures.kept(ledger.RESULTS, model)
        found = images.open_images("scenes", size=64, count=data.sizes["image"]).background((8, 8))
        np.testing.assert_array_equal(data["background"].values, found.astype(np.float32))


def test_pairs_and_sweeps_come_from_what_is_stored() -> None:
    five = measures.pairs(ledger.RESULTS, "08_no_regression", "transfer")
    assert sorted(five) == sorted((name, f"{name}-reg4") for name in PLAIN)
    where = (ledger.RESULTS, "09_how_many_registers", "transfer")
    assert measures.sweep(*where) == {0: "clip-pico"} | {n: f"clip-pico-reg{n}" for n in (1, 2, 4, 8, 16)}
    with pytest.raises(InputError, match=r"no pair without and with registers of \['mae'\]"):
        measures.pairs(ledger.RESULTS, "10_object_discovery", "lost", ["mae"])
    with pytest.raises(InputError, match="there are none"):
        measures.stored(ledger.RESULTS, "08_no_regression", "nothing")
