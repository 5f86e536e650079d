"""Tables and figures of the chapters on probes: planted scores come out where they belong, the paper's numbers stand first."""

import numpy as np
import pytest
import xarray as xr

from vitregs import report


def tokens(**scores: list[float]) -> xr.Dataset:
    """Scores of two tasks for each kind of token, 10 points apart from their ends; CLS is drawn once."""
    values = np.array(list(scores.values())).T
    std = np.where(np.array(list(scores)) == "cls", np.nan, 0.02)
    data = {"score": values, "low": values - 0.1, "high": values + 0.1, "chance": values * 0 + 0.25}
    data |= {"n": values * 0 + 40, "std": np.broadcast_to(std, values.shape)}
    return xr.Dataset(
        {k: (("task", "token"), v) for k, v in data.items()},
        coords={"task": ["colour", "count"], "token": list(scores)},
    )


@pytest.fixture
def found() -> dict[str, xr.Dataset]:
    return {
        "plain": tokens(cls=[0.9, 0.8], normal=[0.3, 0.4], outlier=[0.7, 0.5]),
        "with registers": tokens(cls=[0.9, 0.8], normal=[0.3, 0.4], outlier=[0.2, 0.5], register=[0.8, 0.7]),
    }


def test_gaps_are_means_over_tasks(found: dict[str, xr.Dataset]) -> None:
    table = report.tokens.gaps(found).set_index("model")
    assert table.loc["plain", "outlier − normal"].startswith("25.0 [10.0, 40.0]")
    assert table.loc["plain", "outlier − cls"].startswith("-25.0 [-30.0, -20.0]")
    assert table.loc["plain", "outlier wins against normal"] == "2 of 2"
    assert table.loc["with registers", "outlier wins against normal"] == "1 of 2"
    assert table.loc["with registers", "register − normal"].startswith("40.0")
    assert table.loc["plain", "register − normal"] == "–"


def test_the_papers_gap_is_worked_out_from_its_table(found: dict[str, xr.Dataset]) -> None:
    """Mean over its 14 data sets of outlier minus normal, added up by hand from Table 1: 434.6 / 14."""
    table = report.tokens.gaps(found)
    assert table.loc[0, "model"] == report.tokens.TABLE_1
    outlier = [69.0, 55.1, 79.1, 99.3, 93.7, 84.9, 97.6, 85.2, 84.9, 99.6, 93.5, 94.1, 78.5, 89.7]
    normal = [65.8, 53.1, 17.1, 97.1, 81.3, 18.6, 73.2, 10.8, 63.1, 59.5, 74.2, 47.8, 37.7, 70.8]
    assert table.loc[0, "outlier − normal"].startswith(f"{np.mean(np.subtract(outlier, normal)):.1f} [")
    assert table.loc[0, "outlier wins against normal"] == "14 of 14"


def test_single_tokens_keep_the_order_of_the_tasks(found: dict[str, xr.Dataset]) -> None:
    table = report.tokens.tokens(found)
    assert table.index.tolist() == [
        ("colour", "plain"), ("colour", "with registers"), ("count", "plain"), ("count", "with registers"),
    ]  # fmt: skip
    assert table.loc[("colour", "plain"), "outlier"] == "70.0 ± 2.0"
    assert table.loc[("colour", "plain"), "cls"] == "90.0"
    assert table.loc[("colour", "plain"), "register"] == "–"
    assert table.loc[("count", "plain"), "chance"] == "25.0"


def test_registers_beside_the_papers_table_4(found: dict[str, xr.Dataset]) -> None:
    table = report.tokens.registers_know(found, "colour")
    assert table["register"].tolist() == ["–", "71.1", "–", "80.0 [70.0, 90.0]"]
    assert table["outlier"].tolist()[:2] == ["73.3", "–"]
    assert len(report.tokens.registers_know(found, "no such task")) == 2


def test_the_papers_tables_1_and_6_are_whole() -> None:
    table = report.tokens.paper_tokens()
    assert table.shape == (3, 14)
    assert table.loc["outlier", "Aircraft"] == "79.1 ± 0.5"
    assert table.loc["cls", "Aircraft"] == "87.3"


def test_local_scores_come_after_the_papers() -> None:
    quantities, groups = (
        ["top1", "distance", "l2", "mean_patch", "r2"],
        ["all", "normal", "outlier", "normal on objects"],
    )
    score = np.arange(20, dtype=float).reshape(5, 4) / 10
    data = xr.Dataset(
        {k: (("quantity", "group"), score + d) for k, d in (("score", 0), ("low", -0.1), ("high", 0.1))}
        | {"tokens": ("group", [9, 5, 4, 2])},
        coords={"quantity": quantities, "group": groups},
    )
    data["score"].loc[{"group": "outlier", "quantity": "r2"}] = np.nan
    table = report.tokens.local({"ours": data})
    assert table["model"].str.endswith("(paper)").tolist() == [True] * 4 + [False] * 3
    assert table["position, % right"].tolist()[:2] == ["41.7", "22.8"]
    assert table.loc[4, "position, % right"] == "10.0 [0.0, 20.0]"
    assert table.loc[5, "pixels, R²"] == "–"
    assert table["tokens"].tolist()[4:] == ["5", "4", "2"]
    drawn = report.tokens.groups({"ours": data}, "distance")
    assert drawn["share"].tolist() == pytest.approx([0.5, 0.6, 0.7])


def test_scores_are_drawn_where_they_are(found: dict[str, xr.Dataset]) -> None:
    figure = report.tokens.plot_token_scores(report.tokens.score_rows(found))
    axes = figure.axes
    assert [a.get_title() for a in axes] == ["plain", "with registers"]
    lines = {line.get_label(): line for line in axes[1].lines}
    assert list(lines) == ["CLS", "normal", "outlier", "register", "chance"]
    assert lines["register"].get_xdata().tolist() == pytest.approx([80, 70])
    assert lines["chance"].get_xdata().tolist() == pytest.approx([25, 25])
    assert [t.get_text() for t in axes[0].get_yticklabels()] == ["colour", "count"]
    assert axes[0].get_ylim()[0] > axes[0].get_ylim()[1]  # the first task is on top
