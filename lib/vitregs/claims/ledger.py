"""The paper's claims as data, and what this project found on each: the ledger, the verdicts, the scoreboard.

A claim is a row of `data/paper/claims.csv`: what is said, where, the published value, the name of a function in `measures` that
measures the same on stored results, a rule that decides, and a condition without which the question does not arise. Verdicts are
computed, never typed in.
"""

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vitregs import paths
from vitregs.claims.measures import MEASURES, NEEDS, Measured
from vitregs.data import published
from vitregs.errors import InputError, unknown

RESULTS = paths.ROOT / "data" / "results"
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
    measure: str  # name of a function in `measures`; empty where nothing of it can be measured here
    rule: str  # what the measured value, or an end of its interval, must satisfy
    needs: str  # condition in `NEEDS` under which the question arises; empty: always
    scale: str  # where it can be tested, in words
    chapter: str


def ledger() -> list[Claim]:
    """All claims in the order of the paper. Raises InputError for unknown measures and conditions, and rules that
    cannot be read."""
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
    """Whether a measured value satisfies a rule, as "low > 0" or "value >= 2 and high < 9". Raises InputError for other rules."""
    answers = []
    for part in rule.split(" and "):
        match = RULE.fullmatch(part.strip())
        if match is None:
            raise InputError(f"cannot read the rule {rule!r}: it must say value, low or high, a sign, and a number")
        end, sign, number = match.groups()
        answers.append(SIGNS[sign](getattr(found, end), float(number)))
    return all(answers)


def judge(claim: Claim, folder: Path = RESULTS, met: Mapping[str, bool] | None = None) -> tuple[Measured | None, str]:
    """Measure a claim on stored results: claim, their folder, conditions worked out before → what was found (None: nothing), one
    of VERDICTS.

    What does not meet its condition, or has no measure, is not testable here. Raises InputError for results that are missing.
    """
    if not claim.measure:
        return None, VERDICTS[2]
    found = MEASURES[claim.measure](folder)
    if claim.needs and not (NEEDS[claim.needs](folder) if met is None else met[claim.needs]):
        return found, VERDICTS[2]
    return found, VERDICTS[0] if holds(claim.rule, found) else VERDICTS[1]
