"""The ledger of claims: complete, readable, and judged by its rules; evidence on planted arrays."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from vitregs import arrays, cache, cli, paths
from vitregs.book import chapter, parameters
from vitregs.claims import eligible, ledger, measures, scoreboard
from vitregs.claims.ledger import MEASURES, NEEDS, VERDICTS, Claim, Judgement
from vitregs.claims.measures import Condition, Measured
from vitregs.data import images
from vitregs.errors import InputError
from vitregs.models import registry
from vitregs.train import evaluation, loop


@pytest.fixture(scope="module")
def board() -> pd.DataFrame:
    return scoreboard.table()


def claim(**changes: str) -> Claim:
    facts = dict.fromkeys(Claim.__dataclass_fields__, "") | {
        "id": "x",
        "measure": "planted",
        "rule": "low > 0",
        "ruled": "before",
    }
    return Claim(**(facts | changes))


# --- the ledger


def test_the_ledger_is_complete() -> None:
    found = ledger.ledger()
    assert len(found) >= 25
    assert len({c.id for c in found}) == len(found)
    assert [c.id for c in found if c.chapter not in parameters.names()] == []
    assert [c.id for c in found if not c.scale or not c.statement or not c.where] == []
    assert [c.id for c in found if c.measure and not (c.rule and c.quantity)] == []
    # a row is read alone, in a box or a listing
    leaning = re.compile(r"…|(and|such|so|the same|with them|without them)\b", re.IGNORECASE)
    assert [c.id for c in found if leaning.match(c.statement)] == []
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
    ("rule", "ends", "holds"),
    [
        ("low > 0", (1, 3), True),
        ("low > 0", (-1, 3), None),
        ("low > 0", (-3, 0), False),
        ("high < 0", (-3, -1), True),
        ("high < 0", (-3, 1), None),
        ("high < 0", (0, 2), False),
        ("value >= 2", (2, 3), True),  # a rule on a value with an interval is decided by the interval
        ("value >= 2", (1, 3), None),
        ("value >= 2", (1, 1.9), False),
        ("value >= 2 and value < 9", (3, 8), True),
        ("value >= 2 and value < 9", (3, 10), None),
        ("value >= 2 and value < 9", (9, 10), False),
        ("low > -6 and high > 0", (-8, 3), None),  # Table 5 as the zoo has it
        ("low > -6 and high > 0", (-5, 3), True),
        ("low > -6 and high > 0", (-5, -1), False),
        ("high > 0", (-5, 3), True),  # it may be above: an interval always tells
        ("low < 0", (1, 3), False),
        ("value > 1", (2, 2), True),  # exact numbers leave nothing open
        ("value > 1", (1, 1), False),
        ("value >= 1", (1, 1), True),
    ],
)
def test_rules_are_decided_by_the_whole_interval(rule: str, ends: tuple[float, float], holds: bool | None) -> None:
    assert ledger.decide(rule, Measured(sum(ends) / 2, *ends, 9, "")) is holds


@pytest.mark.parametrize("sign", [">", ">=", "<", "<="])
@pytest.mark.parametrize("end", ["value", "low", "high"])
def test_a_rule_and_its_opposite_never_hold_together(end: str, sign: str) -> None:
    """Mirrored on zero, a rule on the near end or the value has the mirrored answer, and no answer if the interval holds both."""
    mirror = {">": "<", "<": ">", ">=": "<=", "<=": ">="}
    other = {"value": "value", "low": "high", "high": "low"}[end]
    for low, high in ((-3, -1), (-1, 2), (1, 3)):
        one = ledger.decide(f"{end} {sign} 0", Measured((low + high) / 2, low, high, 9, ""))
        two = ledger.decide(f"{other} {mirror[sign]} 0", Measured(-(low + high) / 2, -high, -low, 9, ""))
        assert one is two


@pytest.mark.parametrize("rule", ["", "mean > 0", "value == 1", "low > 0 or high < 1", "__import__('os')"])
def test_other_rules_are_mistakes(rule: str) -> None:
    with pytest.raises(InputError, match="cannot read the rule"):
        ledger.decide(rule, Measured(0, 0, 0, 1, ""))


def test_verdicts_follow_from_measure_rule_and_condition(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(MEASURES, "planted", lambda _: Measured(1, 0.5, 2, 9, "things"))
    monkeypatch.setitem(NEEDS, "never", lambda *_: Condition(False, "for a reason"))
    monkeypatch.setitem(NEEDS, "always", lambda *_: Condition(True))
    for changes, verdict in (
        ({}, "reproduced"),
        ({"rule": "high < 1"}, "inconclusive"),
        ({"rule": "high < 0"}, "not reproduced"),
        ({"needs": "always"}, "reproduced"),
        ({"needs": "never"}, "not testable here"),
        ({"measure": ""}, "not testable here"),
    ):
        assert ledger.judge(claim(**changes), tmp_path).verdict == verdict
    assert ledger.judge(claim(needs="never"), tmp_path).why == "for a reason"
    assert ledger.judge(claim(measure="", scale="elsewhere"), tmp_path) == Judgement(None, VERDICTS[4], "elsewhere")


def test_a_weak_artifact_makes_a_mild_verdict(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The strength is the fingerprint's, or the measure's own; the condition needs a fingerprint that says "artifacts"."""

    def planted(strength: float | None = None) -> None:
        found = Measured(1, 0.5, 2, 9, "things", ("vit", "vit+tt1"), strength)
        monkeypatch.setitem(MEASURES, "planted", lambda _: found)

    def fingerprint(network: str, verdict: str, strength: float) -> None:
        data = xr.Dataset(attrs={"verdict": verdict, "strength": strength})
        cache.save_dataset(data, tmp_path / "published" / network / "fingerprint.nc")

    planted()
    asked = claim(needs="artifact")
    assert ledger.judge(asked, tmp_path).verdict == "not testable here"
    assert ledger.judge(asked, tmp_path).why == "no artifact by a stored fingerprint: vit, vit+tt1"
    fingerprint("vit+tt1", "none", 1.0)
    for verdict in ("content", "none", "inconclusive"):
        fingerprint("vit", verdict, 9.0)
        assert ledger.judge(asked, tmp_path).verdict == "not testable here"
    for strength, expected in ((2.0, "reproduced, mild"), (3.99, "reproduced, mild"), (4.0, "reproduced")):
        fingerprint("vit", "artifacts", strength)
        assert measures.artifact(tmp_path, "vit") == (True, strength)
        assert ledger.judge(asked, tmp_path).verdict == expected
    assert ledger.judge(claim(), tmp_path).verdict == "reproduced"
    planted(2.0)
    assert ledger.judge(claim(), tmp_path).verdict == "reproduced, mild"
    assert ledger.judge(claim(needs="artifact", rule="high < 0"), tmp_path).verdict == "not reproduced"
    fingerprint("vit", "artefacts", 2.0)
    with pytest.raises(InputError, match="is no fingerprint: its verdict is 'artefacts'"):
        ledger.judge(asked, tmp_path)


def test_networks_that_have_learned_nothing_decide_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whichever arrays a measure reads, it rests on their networks."""
    keep(tmp_path, "x", "y", "dino-pico", xr.DataArray([1.0]))
    keep(tmp_path, "x", "y", "clip-pico", xr.DataArray([1.0]))

    def rests_on(*names: str) -> ledger.Judgement:
        def planted(folder: Path) -> Measured:
            return measures.mean(sum(measures.read(folder, "x", "y", n)["value"].values for n in names), "both")

        with monkeypatch.context() as patch:
            patch.setattr(measures, "MEASURES", MEASURES)
            patch.setitem(MEASURES, "planted", measures.measure(planted))
            try:
                return ledger.judge(claim(), tmp_path)
            finally:
                MEASURES.pop("planted")

    assert rests_on("clip-pico").verdict == "reproduced"
    assert rests_on("clip-pico").found.networks == ("clip-pico",)  # type: ignore[union-attr]
    assert rests_on("clip-pico", "dino-pico").verdict == "not testable here"
    assert rests_on("dino-pico").why == "dino-pico clears its untrained twin in 1 of 3 scores"


def test_who_is_barred_follows_from_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    barred = {n for n in registry.zoo() if eligible.barred(n)}
    assert {"dino-pico", "dinov2-pico"} <= barred
    assert not {"supervised-pico", "clip-pico", "hunt-pico"} & barred
    assert eligible.barred("deit_tiny_patch16_224") == ""
    assert eligible.IMAGES["accuracy"] == (loop.SCORED, loop.QUERIES)
    assert eligible.IMAGES["knn"] == (loop.QUERIES, loop.QUERIES)
    assert evaluation.PROBED // 3 == eligible.LINEAR
    card = registry.card("dino-pico")
    better = card | {"linear": {"colour": 0.6, "shape": 0.3}}  # two of three
    monkeypatch.setattr(eligible.registry, "card", lambda _: better)
    assert eligible.barred.__wrapped__("dino-pico") == ""
    monkeypatch.setattr(eligible.registry, "card", lambda _: card | {"linear": {"colour": 0.34, "shape": 0.22}})
    assert eligible.barred.__wrapped__("dino-pico").endswith("in 0 of 3 scores")


def test_the_difference_of_two_shares_has_newcombes_interval() -> None:
    """The example of Newcombe (1998, table II, method 10): 56 of 70 against 48 of 80."""
    assert eligible.difference(56 / 70, 48 / 80, 70, 80) == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_a_measure_of_nothing_does_not_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """nan satisfies no rule, whichever way it points, and no opposite."""
    nothing = Measured(np.nan, np.nan, np.nan, 0, "")
    rules = ("low > 0", "high < 0", "value >= 0", "value <= 0", "high > 0")
    assert [ledger.decide(r, nothing) for r in rules] == [None] * 5
    monkeypatch.setitem(MEASURES, "planted", lambda _: nothing)
    assert ledger.judge(claim(), tmp_path).verdict == "not testable here"


def test_unknown_names_in_the_ledger_are_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    row = dict.fromkeys(Claim.__dataclass_fields__, "x") | {"ruled": "after"}
    for change, message in (
        ({"measure": "any_mod"}, "unknown measure of claim x 'any_mod': did you mean 'any_mode'"),
        ({"measure": "any_mode", "needs": "modes"}, "unknown condition of claim x 'modes': did you mean 'mode'"),
        ({"measure": "any_mode", "needs": "mode", "rule": "big"}, "cannot read the rule 'big'"),
        ({"measure": "any_mode", "needs": "mode", "ruled": "afte"}, "unknown time of the rule .* did you mean 'after'"),
    ):
        monkeypatch.setattr(ledger.published, "table", lambda _, c=change: pd.DataFrame([row | c]))
        with pytest.raises(InputError, match=message):
            ledger.ledger()


def test_missing_results_are_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read results"):
        scoreboard.table(tmp_path)


def test_a_damaged_result_costs_its_claims_alone(tmp_path: Path) -> None:
    chapter, broken = "12_feature_maps", "mae_beyond"
    shutil.copytree(ledger.RESULTS, tmp_path / "results")
    for file in (tmp_path / "results" / chapter).glob("*.mae-pico.nc"):
        file.write_bytes(file.read_bytes()[:-100])
    whole, less = (scoreboard.table(f, chapter).set_index("id") for f in (ledger.RESULTS, tmp_path / "results"))
    (name,) = [c.id for c in ledger.ledger() if c.measure == broken]
    assert (less.loc[name, "verdict"], less.loc[name, "of"]) == ("not testable here", "")
    assert less.loc[name, "why"].startswith("cannot read results ")
    others = whole.index.drop(name)
    pd.testing.assert_frame_equal(less.loc[others], whole.loc[others])


def test_the_scoreboard_is_shown(
    board: pd.DataFrame, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(board) == len(ledger.ledger())
    assert set(board["verdict"]) <= set(VERDICTS)
    page = scoreboard.page(board)
    assert page.startswith("# Scoreboard\n")
    chapters = board["chapter"].nunique()
    assert page.count("* - ") == len(board) + chapters  # a head for each
    assert page.count("\n## Chapter ") == chapters
    assert all(f"`{label}`" in page or f"table <{label}>`" in page for label in board["figure"])
    written = board["ruled"].value_counts()
    assert f"{written['after']} of these rules were written *after*" in page
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


def test_claims_on_when_outliers_appear_need_outliers() -> None:
    conditions = {
        c.id: c.needs for c in ledger.ledger() if c.where.startswith("Fig 4") and c.scale == "the zoo, on scenes"
    }
    assert conditions == dict.fromkeys(("middle", "late", "size"), "artifact")


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
        assert measures.has_mode(tmp_path, measures.any_mode(tmp_path)).met
        assert measures.any_mode(tmp_path).value == pytest.approx(100 * place.mean(), rel=0.05)
        assert measures.any_mode(tmp_path).n == 48
        assert measures.largest_mode(tmp_path).value == pytest.approx(10, rel=0.1)
        assert measures.placed(tmp_path)["clip-pico"] == on_background
        assert not measures.placed(tmp_path)["hunt-long"]
        assert "dino-pico" not in measures.placed(tmp_path)  # barred
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
    learned = measures.eligible_pairs(ledger.RESULTS, "08_no_regression", "transfer")
    assert set(learned) == {p for p in five if not any(map(eligible.barred, p))}
    assert learned
    where = (ledger.RESULTS, "09_how_many_registers", "transfer")
    assert measures.sweep(*where) == {0: "clip-pico"} | {n: f"clip-pico-reg{n}" for n in (1, 2, 4, 8, 16)}
    with pytest.raises(InputError, match=r"no pair without and with registers of \['mae'\]"):
        measures.pairs(ledger.RESULTS, "10_object_discovery", "lost", ["mae"])
    with pytest.raises(InputError, match="there are none"):
        measures.stored(ledger.RESULTS, "08_no_regression", "nothing")


# --- the box that opens a chapter


def test_a_box_is_about_the_books_results_and_says_so(monkeypatch: pytest.MonkeyPatch, board: pd.DataFrame) -> None:
    monkeypatch.setattr(scoreboard, "table", lambda _, name: board[board["chapter"] == name])
    rows = board[board["chapter"] == "05_local_information"]
    plain = chapter.Run("05_local_information").results()
    assert plain.board.equals(rows)
    assert [row["verdict"].upper() in repr(plain) for _, row in rows.iterrows()] == [True] * len(rows)
    assert all(f'href="#{label}"' in plain._repr_html_() for label in rows["figure"])
    assert "not about this run" not in repr(plain)
    other = chapter.Run("05_local_information", count=9, device="cpu").results()
    assert "They are not about this run, which differs in count." in other._repr_html_()
    assert other.board.equals(rows)
    assert "No claim" in repr(chapter.Run("17_what_moves_outliers").results())


def test_a_box_without_results_says_what_is_missing(tmp_path: Path) -> None:
    found = scoreboard.box("05_local_information", tmp_path)
    assert repr(found).startswith("No verdict yet: cannot read ")
    assert "<table" not in found._repr_html_()


def test_boxes_are_brought_up_to_date(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of chapters that were executed at their defaults, and nothing else in them."""
    name, told = "05_local_information.ipynb", scoreboard.Box(pd.DataFrame(), ("told anew",))
    old = (parameters.NOTEBOOKS / name).read_text("utf-8")
    for kind in ("default", "other"):
        book = json.loads(old)
        if kind == "other":
            book["cells"][1]["metadata"]["tags"] = ["injected-parameters"]
        (tmp_path / kind).mkdir()
        (tmp_path / kind / name).write_text(
            json.dumps(book, indent=1, ensure_ascii=False, sort_keys=True) + "\n", "utf-8"
        )
    monkeypatch.setattr(scoreboard, "box", lambda _: told)
    for kind in ("other", "default", "default"):
        assert cli.main(["scoreboard", "--boxes", str(tmp_path / kind)]) == 0
    assert capsys.readouterr().out == f"verdicts brought up to date: {tmp_path / 'default' / name}\n"
    first, second = (json.loads(t)["cells"] for t in (old, (tmp_path / "default" / name).read_text("utf-8")))
    changed = [(a, b) for a, b in zip(first, second, strict=True) if a != b]
    assert [b["source"] for _, b in changed] == [["run.results()"]]
    assert "".join(changed[0][1]["outputs"][0]["data"]["text/html"]) == told._repr_html_()
    assert cli.main(["scoreboard", "--boxes", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"vitregs: {tmp_path} holds no chapters")
    assert cli.main(["scoreboard", "--boxes", str(tmp_path / "default"), "--markdown"]) == 2
    assert "leave out --results and --markdown" in capsys.readouterr().err
