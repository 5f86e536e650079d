"""The paper's claims as data, and what this project found on each: the ledger, the verdicts, the scoreboard.

A claim is a row of `data/paper/claims.csv`: what is said, where, the published value, the name of a function in `evidence` that
measures the same on stored results, a rule that decides, and a condition without which the question does not arise. Verdicts are
computed, never typed in.
"""

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from vitregs import published, results
from vitregs.evidence import knowledge, norms, remedy  # noqa: F401  they enter their measures in the registry
from vitregs.evidence.measured import MEASURES, NEEDS, Measured
from vitregs.problems import Problem, unknown

RESULTS = results.ROOT / "data" / "results"
VERDICTS = ("reproduced", "not reproduced", "not testable at this scale")
SIGNS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
RULE = re.compile(r"(value|low|high) (<=|>=|<|>) (-?\d+(?:\.\d+)?)")


@dataclass(frozen=True)
class Claim:
    """One statement of the paper, as a row of the ledger."""

    id: str
    where: str  # figure, table or section
    statement: str
    published: str  # the paper's value, as text
    quantity: str  # what is measured here, with its unit
    measure: str  # name of a function in `evidence/`; empty where nothing of it can be measured here
    rule: str  # what the measured value, or an end of its interval, must satisfy
    needs: str  # condition in `NEEDS` under which the question arises; empty: always
    scale: str  # where it can be tested, in words
    chapter: str


def ledger() -> list[Claim]:
    """All claims in the order of the paper. Raises Problem for unknown measures and conditions, and rules that cannot be read."""
    table = published.table("claims").fillna("")
    found = [Claim(**{k: str(row[k]) for k in Claim.__dataclass_fields__}) for _, row in table.iterrows()]
    for claim in found:
        if claim.measure and claim.measure not in MEASURES:
            raise unknown(f"measure of claim {claim.id}", claim.measure, MEASURES)
        if claim.needs and claim.needs not in NEEDS:
            raise unknown(f"condition of claim {claim.id}", claim.needs, NEEDS)
        if claim.measure:
            holds(claim.rule, Measured(0.0, 0.0, 0.0, 1, ""))
    return found


def holds(rule: str, found: Measured) -> bool:
    """Whether a measured value satisfies a rule, as "low > 0" or "value >= 2 and high < 9". Raises Problem for other rules."""
    answers = []
    for part in rule.split(" and "):
        match = RULE.fullmatch(part.strip())
        if match is None:
            raise Problem(f"cannot read the rule {rule!r}: it must say value, low or high, a sign, and a number")
        end, sign, number = match.groups()
        answers.append(SIGNS[sign](getattr(found, end), float(number)))
    return all(answers)


def judge(claim: Claim, folder: Path = RESULTS, met: Mapping[str, bool] | None = None) -> tuple[Measured | None, str]:
    """Measure a claim on stored results: claim, their folder, conditions worked out before → what was found (None: nothing), one
    of VERDICTS.

    What does not meet its condition, or has no measure, is not testable here. Raises Problem for results that are missing.
    """
    if not claim.measure:
        return None, VERDICTS[2]
    found = MEASURES[claim.measure](folder)
    if claim.needs and not (NEEDS[claim.needs](folder) if met is None else met[claim.needs]):
        return found, VERDICTS[2]
    return found, VERDICTS[0] if holds(claim.rule, found) else VERDICTS[1]


def scoreboard(folder: Path = RESULTS) -> pd.DataFrame:
    """Every claim with its verdict: folder of stored results → rows id, where, statement, published, ours, of, rule, verdict,
    scale, chapter."""
    rows, claims = [], ledger()
    met = {
        name: NEEDS[name](folder) for name in dict.fromkeys(c.needs for c in claims if c.needs)
    }  # many claims share them
    for claim in claims:
        found, verdict = judge(claim, folder, met)
        ours = "–" if found is None else found.text()
        rows.append(
            {
                "id": claim.id,
                "where": claim.where,
                "statement": claim.statement,
                "published": claim.published,
                "quantity": claim.quantity,
                "ours": ours,
                "of": "" if found is None else found.what,
                "rule": claim.rule,
                "verdict": verdict,
                "scale": claim.scale,
                "chapter": claim.chapter,
            }
        )
    return pd.DataFrame(rows)


def counts(board: pd.DataFrame) -> str:
    """How many claims have which verdict, in one line: scoreboard → text."""
    found = board["verdict"].value_counts()
    return ", ".join(f"{int(found.get(v, 0))} {v}" for v in VERDICTS)


def listing(board: pd.DataFrame) -> str:
    """The scoreboard as lines for a terminal: scoreboard → text, three lines a claim and a count."""
    lines = []
    for _, row in board.iterrows():
        lines.append(f"{row['verdict'].upper():<27}{row['where']}: {row['statement']}")
        lines.append(f"{'':<27}paper: {row['published'] or '–'}")
        if row["of"]:
            lines.append(f"{'':<27}here:  {row['ours']}, {row['quantity']} ({row['of']}); rule: {row['rule']}")
        else:
            lines.append(f"{'':<27}here:  not measured: {row['scale']}")
        lines.append("")
    return "\n".join([*lines, f"{len(board)} claims: {counts(board)}"])


def page(board: pd.DataFrame) -> str:
    """The scoreboard as a page of the book, in Markdown: scoreboard → text with a link to each chapter."""
    marks = {VERDICTS[0]: "✔", VERDICTS[1]: "✘", VERDICTS[2]: "–"}
    lines = [
        "# Scoreboard",
        "",
        f"{len(board)} claims of the paper and what this project finds on each: **{counts(board)}**. Every verdict is computed "
        "from the stored results of the chapters (`vitregs scoreboard`): a quantity is measured, and a rule that was written "
        "down with the claim decides. *Not testable at this scale* means that the condition of a claim does not hold for any "
        "network we could run (mostly: that outliers on redundant background exist at all), or that nothing here measures "
        "it. A claim that is not reproduced may well hold of the networks it was made for; the command in its chapter runs "
        "the same measurement on them.",
        "",
        "```{list-table}",
        ":header-rows: 1",
        ":widths: 7 27 13 34 13 6",
        ":class: scoreboard",
        "",
        *("* - where", "  - claim", "  - published", "  - ours", "  - verdict", "  - chapter"),
    ]
    for _, row in board.iterrows():
        link = f"[{row['chapter'][:2]}](../notebooks/{row['chapter']}.ipynb)" if row["chapter"] else "–"
        ours = f"**{row['ours']}**, {row['quantity']} ({row['of']}); rule: {row['rule']}" if row["of"] else row["scale"]
        lines += [
            f"* - {row['where']}",
            f"  - {row['statement']}",
            f"  - {row['published'] or '–'}",
            f"  - {ours}",
            f"  - {marks[row['verdict']]} {row['verdict']}",
            f"  - {link}",
        ]
    return "\n".join([*lines, "```", ""])
