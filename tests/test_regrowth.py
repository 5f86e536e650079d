"""Regrowth: the rule of the log on planted histories, the tables that the chapters show, and the runs that are stored."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from vitregs.cache import load_dataset
from vitregs.errors import InputError
from vitregs.report import regrowth
from vitregs.train import monitor
from vitregs.train.recipes import recipe

STEPS = [0, 16, 32, 64]


def history(above: list[float], *, marked: bool, registers: float | None = None, neurons: str = "") -> xr.Dataset:
    """A run of two layers whose share of outliers in the last one is known."""
    count = len(STEPS)
    data = xr.Dataset(
        {
            "above": (("step", "layer"), np.stack([np.zeros(count), above], 1)),
            "median": (("step", "layer"), np.full((count, 2), 10.0)),
            "marked": ("step", [np.nan] * (count - 1) + [0.04 if marked else np.nan]),
            "neurons": ("step", [""] * (count - 1) + [neurons]),
            "verdict": ("step", ["none"] * (count - 1) + ["artifacts" if marked else "none"]),
            "agreement": ("step", np.linspace(1, 0.5, count)),
            "accuracy": ("step", np.full(count, 0.25)),
            "sink": (("step", "block", "kind"), np.full((count, 1, 1), 7.0)),
        },
        coords={"step": STEPS, "layer": [0, 1], "block": [1], "kind": ["patch"]},
        attrs={"recipe": json.dumps(recipe("regrow-kept" if registers is None else "regrow-kept-reg4").facts())},
    )
    if registers is not None:
        data["registers"] = (("step", "layer", "register"), np.full((count, 2, 4), registers))
    return data


KEPT = history([0.04, 0.04, 0.04, 0.04], marked=True)


@pytest.mark.parametrize(
    ("end", "marked", "answer"),
    [(0.02, True, True), (0.0199, True, None), (0.02, False, None), (0.01, False, None), (0.0099, True, False)],
)
def test_the_rule_of_the_log(end: float, marked: bool, answer: bool | None) -> None:
    assert monitor.outliers_present(history([0, 0, 0, end], marked=marked), 0.04) is answer


def test_a_table_of_arms() -> None:
    runs = {
        "regrow-kept": KEPT,
        "regrow-zeroed": history([0, 0, 0, 0.001], marked=False),
        "regrow-zeroed-seed1": history([0, 0, 0, 0.03], marked=True),
        "regrow-asked-reg4": history([0, 0.01, 0.03, 0.04], marked=True, registers=16, neurons="5:114 6:96 6:1"),
    }
    table = regrowth.outcomes(runs).set_index("arm")
    assert table.loc["regrow-kept", ["seeds", "present", "since step"]].tolist() == [1, "yes", "start"]
    assert table.loc["regrow-zeroed", ["seeds", "present"]].tolist() == [2, "inconclusive"]
    assert table.loc["regrow-zeroed", "at the end, %"] == "1.6 (0.1 to 3.0)"
    assert table.loc["regrow-zeroed", "since step"] == "never, 64"
    row = table.loc["regrow-asked-reg4"]
    assert row[["present", "since step", "registers / patches", "old neurons"]].tolist() == [
        "yes",
        "32",
        "1.60",
        "2 of 3",
    ]
    assert row[["agreement, %", "accuracy, %"]].tolist() == ["50", "25.0"]


def test_runs_are_compared_with_their_partner_of_the_same_seed() -> None:
    plain, given = history([0, 0, 0, 0.01], marked=False), history([0, 0, 0, 0.03], marked=False, registers=16)
    runs = {"regrow-zeroed": KEPT, "regrow-zeroed-seed1": plain, "regrow-zeroed-reg4-seed1": given, "cure-reg1": given}
    found = regrowth.saved(runs)
    assert found.run.tolist() == ["regrow-zeroed-reg4-seed1"]
    assert found.loc[0, "outliers"] == pytest.approx(2)


def test_what_remedies_cost_is_counted() -> None:
    runs = {"regrow-kept": KEPT, "regrow-kept-reg4": history([0] * 4, marked=False, registers=16)}
    table = regrowth.remedies(runs).set_index("arm")
    assert table.loc["regrow-kept", "parameters, + %"] == "0.00"
    width, total = 192, 5_689_192
    added = 4 * width * 2  # tokens, and their rows in a table that has one for CLS
    assert table.loc["regrow-kept-reg4", "parameters, + %"] == f"{100 * added / total:.2f}"
    assert table.loc["regrow-kept-reg4", ["present", "verdict"]].tolist() == ["no", "none"]


def test_without_the_untouched_run_there_is_nothing_to_compare_with() -> None:
    with pytest.raises(InputError, match="regrow-kept"):
        regrowth.outcomes({"regrow-dead": KEPT})


def test_figures_draw_every_run() -> None:
    runs = {"regrow-kept": KEPT, "regrow-kept-reg4": history([0] * 4, marked=False, registers=16)}
    figure = regrowth.plot_runs(runs)
    without, given, registers, agreement = figure.axes[:4]
    assert (len(without.lines), len(given.lines), len(registers.lines), len(agreement.lines)) == (3, 2, 2, 2)
    np.testing.assert_allclose(given.lines[1].get_ydata(), 0)
    assert regrowth.plot_runs({}).axes


@pytest.mark.parametrize("path", sorted(regrowth.FOLDER.glob("*.nc")), ids=lambda p: p.stem)
def test_stored_runs_are_of_their_recipes_and_of_committed_states(path: Path) -> None:
    log = load_dataset(path)
    stored = json.loads(log.attrs["recipe"])
    assert stored["name"] == path.stem
    assert int(log["step"][-1]) == stored["steps"]
    if not re.search(r"-(steps|batch)\d", path.stem):  # a recipe as it is
        wanted = json.loads(json.dumps(recipe(path.stem).facts()))
        differs = {k for k in wanted.keys() & stored.keys() if wanted[k] != stored[k]}
        assert differs <= {"data"}  # a copy of it in a folder
    assert "+changes" not in log.attrs["commit"]
    assert "/" not in stored["data"].replace("zh-plus/", "")
