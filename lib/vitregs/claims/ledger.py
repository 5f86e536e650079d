"""The paper's claims as data, and what this project found on each: the ledger and the verdicts.

A claim is a row of `data/paper/claims.csv`: what is said, where, the published value, the name of a function in `measures` that
measures the same on stored results, a rule that decides, and a condition without which the question does not arise. Verdicts are
computed, never typed in:

- *reproduced*: the rule holds, whatever the truth is within the interval. *reproduced, mild*: it does, of an artifact less than
  STRONG times as high as the median norm.
- *not reproduced*: the opposite of the rule holds, whatever the truth is within the interval.
- *inconclusive*: neither; the interval holds both answers.
- *not testable here*: nothing measures it, its condition is not met, the network is barred (`eligible`), or a stored result is
  damaged.
"""

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isnan
from pathlib import Path

from vitregs import paths
from vitregs.claims import (
    eligible,
    real,  # noqa: F401 (it enters its measures)
)
from vitregs.claims.measures import MEASURES, NEEDS, Condition, Measured
from vitregs.data import published
from vitregs.errors import Damaged, InputError, unknown

RESULTS = paths.ROOT / "data" / "results"
REPRODUCED, MILD, INCONCLUSIVE = "reproduced", "reproduced, mild", "inconclusive"
NOT_REPRODUCED, NOT_TESTABLE = "not reproduced", "not testable here"
VERDICTS = (REPRODUCED, MILD, INCONCLUSIVE, NOT_REPRODUCED, NOT_TESTABLE)
STRONG = 4.0  # times the median norm: below it an artifact is mild
RULED = ("before", "after")  # the results that a rule judges were known
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
    ruled: (
        str  # whether the rule was written before or after its results were known, one of `RULED`; empty without a rule
    )
    needs: str  # condition in `NEEDS` under which the question arises; empty: always
    scale: str  # where it can be tested, in words
    chapter: str
    figure: str  # label of a figure of that chapter (fig-…), or of the text before a table (tab-…)


@dataclass(frozen=True)
class Judgement:
    """What was found on a claim: the measured value (None: nothing), one of VERDICTS, and why it is not testable."""

    found: Measured | None
    verdict: str
    why: str = ""


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
        if claim.measure and claim.ruled not in RULED:
            raise unknown(f"time of the rule of claim {claim.id}", claim.ruled, RULED)
        if claim.measure:
            decide(claim.rule, Measured(0.0, 0.0, 0.0, 1, ""))
    return found


def decide(rule: str, found: Measured) -> bool | None:
    """Whether a measured value satisfies a rule, as "low > 0" or "value >= 2 and high < 9".

    A part on the near end (`low > c`, `high < c`) or on the `value` says that the truth lies on one side of c: it holds if the
    whole interval does, fails if the interval lies on the other side, and is open if c is within. A part on the far end
    (`high > c`, `low < c`) says only that the truth *may* lie on that side, which an interval always decides. The rule holds
    if all its parts do, and fails if one of them does. A number without an interval leaves nothing open.

    Args:
        rule: parts joined by " and ": value, low or high, a sign, a number.
        found: value and interval; nan decides nothing.

    Returns:
        True if it holds, False if its opposite does, None if the interval holds both answers.

    Raises:
        InputError: for other rules.

    Example:
        >>> [decide("low > 0", Measured(1, low, high, 9, "")) for low, high in ((0.5, 2), (-1, 2), (-2, -1))]
        [True, None, False]
    """
    answers: list[bool | None] = []
    for part in rule.split(" and "):
        match = RULE.fullmatch(part.strip())
        if match is None:
            raise InputError(f"cannot read the rule {rule!r}: it must say value, low or high, a sign, and a number")
        end, sign, number = match.groups()
        ends = {"near": found.low, "far": found.high} if ">" in sign else {"near": found.high, "far": found.low}
        may_only = (end, sign[0]) in (("high", ">"), ("low", "<"))
        holds, possible = (SIGNS[sign](ends[k], float(number)) for k in ("near", "far"))
        if any(map(isnan, ends.values())):
            answers.append(None)
        elif may_only:
            answers.append(possible)
        else:
            answers.append(True if holds else None if possible else False)
    return False if False in answers else None if None in answers else True


def judge(claim: Claim, folder: Path = RESULTS) -> Judgement:
    """Measure a claim on stored results and apply its rule: claim, folder of results → Judgement.

    Raises InputError for results that are missing; those that are damaged leave their claims not testable.
    """
    if not claim.measure:
        return Judgement(None, NOT_TESTABLE, claim.scale)
    try:
        found = MEASURES[claim.measure](folder)
        condition = NEEDS[claim.needs](folder, found) if claim.needs else Condition(True)
    except Damaged as problem:
        return Judgement(None, NOT_TESTABLE, str(problem))
    why = "; ".join(filter(None, map(eligible.barred, found.networks))) or ("" if condition.met else condition.why)
    if not why and isnan(found.value):
        why = "nothing was there to count"
    if why:
        return Judgement(found, NOT_TESTABLE, why)
    strength = condition.strength if found.strength is None else found.strength
    yes = MILD if strength is not None and strength < STRONG else REPRODUCED
    return Judgement(found, {True: yes, False: NOT_REPRODUCED, None: INCONCLUSIVE}[decide(claim.rule, found)])
