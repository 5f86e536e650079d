"""The ledger as tables: for a terminal, as a page of the book, and as the box that opens a chapter. All show the same rows."""

from dataclasses import dataclass
from html import escape
from pathlib import Path

import pandas as pd

from vitregs.claims.ledger import (
    INCONCLUSIVE,
    MILD,
    NOT_REPRODUCED,
    NOT_TESTABLE,
    REPRODUCED,
    RESULTS,
    VERDICTS,
    judge,
    ledger,
)
from vitregs.errors import InputError

MARKS = {REPRODUCED: "✔", MILD: "✔", INCONCLUSIVE: "?", NOT_REPRODUCED: "✘", NOT_TESTABLE: "–"}


def table(folder: Path = RESULTS, chapter: str = "") -> pd.DataFrame:
    """Claims with their verdicts.

    Args:
        folder: of stored results.
        chapter: whose claims alone are wanted; empty for all.

    Returns:
        A row a claim: id, where, statement, published, quantity, ours, of, rule, ruled, verdict, why, scale, chapter, figure.

    Raises:
        InputError: for results that are missing.
    """
    names = ("id", "where", "statement", "published", "quantity", "rule", "ruled", "scale", "chapter", "figure")
    rows = []
    for claim in ledger():
        if chapter in ("", claim.chapter):
            judged = judge(claim, folder)
            ours, of = ("–", "") if judged.found is None else (judged.found.text(), judged.found.what)
            row = {k: getattr(claim, k) for k in names}
            rows.append(row | {"ours": ours, "of": of, "verdict": judged.verdict, "why": judged.why})
    return pd.DataFrame(rows, columns=[*names, "ours", "of", "verdict", "why"])


def counts(board: pd.DataFrame) -> str:
    """How many claims have which verdict, in one line: scoreboard → text."""
    found = board["verdict"].value_counts()
    return "; ".join(f"{int(found.get(v, 0))} {v}" for v in VERDICTS)


def listing(board: pd.DataFrame) -> str:
    """The scoreboard as lines for a terminal: scoreboard → text, a chapter after the other, and a count."""
    lines = []
    for chapter, rows in board.groupby("chapter"):
        lines += [str(chapter), ""]
        for _, row in rows.iterrows():
            lines.append(f"{row['verdict'].upper():<19}{row['where']}: {row['statement']}")
            lines.append(f"{'':<19}paper: {row['published'] or '–'}")
            if row["of"]:
                lines.append(f"{'':<19}here:  {row['ours']}, {row['quantity']} ({row['of']}); rule: {row['rule']}")
            if row["why"]:
                lines.append(f"{'':<19}why:   {row['why']}")
            lines.append("")
    return "\n".join([*lines, f"{len(board)} claims: {counts(board)}"])


def page(board: pd.DataFrame) -> str:
    """The scoreboard as a page of the book, in Markdown: scoreboard → text, grouped by chapter, a link to the figure or table of
    each claim."""
    after = int((board["ruled"] == "after").sum())
    before = int((board["ruled"] == "before").sum())
    lines = [
        "# Scoreboard",
        "",
        f"{len(board)} claims of the paper and what this project finds on each: **{counts(board)}**. A verdict is computed from "
        "stored results (`vitregs scoreboard`), never typed in: a quantity is measured, with a 95 % interval where it has one, "
        "and a rule decides.",
        "",
        "- *Reproduced*: the rule holds wherever in its interval the truth lies. *Reproduced, mild*: it does, of an artifact "
        "that is less than four times as high as the median norm.",
        "- *Not reproduced*: the opposite holds wherever in the interval the truth lies.",
        "- *Inconclusive*: the interval holds both answers; more images or more networks would be needed.",
        "- *Not testable here*: nothing here measures it; or the condition of the claim is not met, mostly that the network has "
        "the artifact at all; or the network is barred, because fewer than half of its scores clear those of its untrained "
        "twin; or a stored result is damaged.",
        "",
        f"**When the rules were written.** {after} of these rules were written *after* the results that they judge were known to "
        f"whoever wrote them, {before} *before*. The old ones were written down in one go when the chapters had been run, and "
        "some of them, and most conditions, were changed later; the {doc}`log </book/log>` says which. So a verdict by an old "
        "rule is a description in one form for all, not a prediction that was put to the test. The rules are in "
        "`data/paper/claims.csv`, each with its time.",
        "",
        "A claim that is not reproduced may well hold of the networks it was made for; the command in its chapter runs the same "
        "measurement on them.",
    ]
    for chapter, rows in board.groupby("chapter"):
        lines += [
            "",
            f"## Chapter {int(str(chapter)[:2])}",
            "",
            f"[](../notebooks/{chapter}.ipynb)",
            "",
            "```{list-table}",
            ":header-rows: 1",
            ":widths: 7 26 13 34 13 7",
            ":class: scoreboard",
            "",
            *("* - where", "  - claim", "  - published", "  - ours", "  - verdict", "  - shown in"),
        ]
        for _, row in rows.iterrows():
            rule = f"rule ({row['ruled']}): {row['rule']}"
            ours = f"**{row['ours']}**, {row['quantity']} ({row['of']}); {rule}" if row["of"] else "not measured"
            kind = "numref" if row["figure"].startswith("fig-") else "ref"
            label = row["figure"] if kind == "numref" else f"table <{row['figure']}>"
            why = f": {row['why']}" if row["why"] else ""
            lines += [
                f"* - {row['where']}",
                f"  - {row['statement']}",
                f"  - {row['published'] or '–'}",
                f"  - {ours}",
                f"  - {MARKS[row['verdict']]} {row['verdict']}{why}",
                f"  - {{{kind}}}`{label}`",
            ]
        lines.append("```")
    return "\n".join([*lines, ""])


@dataclass(frozen=True)
class Box:
    """The claims of a chapter with their verdicts, as a notebook or a terminal shows them.

    Attributes:
        board: rows of `table`.
        notes: sentences that stand above them.
    """

    board: pd.DataFrame
    notes: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        heads = "".join(f"<th>{name}</th>" for name in ("claim", "paper", "ours", "verdict", "shown in"))
        rows = []
        for _, row in self.board.iterrows():
            ours = f"<strong>{escape(row['ours'])}</strong> {escape(row['quantity'])} ({escape(row['of'])})"
            why = f"<br><small>{escape(row['why'])}</small>" if row["why"] else ""
            kind = "figure" if row["figure"].startswith("fig-") else "table"
            cells = (
                f"{escape(row['where'])}: {escape(row['statement'])}",
                escape(row["published"] or "–"),
                ours if row["of"] else "not measured",
                f"{MARKS[row['verdict']]} {row['verdict']}{why}",
                f'<a href="#{row["figure"]}">{kind}</a>',
            )
            rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        body = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>" if rows else ""
        return f'<div class="results">{notes}{body}</div>'

    def __repr__(self) -> str:
        lines = [*self.notes]
        for _, row in self.board.iterrows():
            ours = f"here {row['ours']}, {row['quantity']} ({row['of']})" if row["of"] else "not measured"
            why = f" ({row['why']})" if row["why"] else ""
            lines.append(f"{row['verdict'].upper()}{why}: {row['where']}, {row['statement']}")
            lines.append(f"    paper {row['published'] or '–'}; {ours}")
        return "\n".join(lines)


def box(chapter: str, folder: Path = RESULTS, differs: tuple[str, ...] = ()) -> Box:
    """The claims that a chapter bears on, from stored results: chapter, their folder, parameters in which a run differs from the
    book's → Box. Results that are not there yet are said, not raised: a chapter may be about to make them."""
    try:
        board = table(folder, chapter)
    except InputError as error:
        return Box(pd.DataFrame(), (f"No verdict yet: {error}.",))
    if board.empty:
        return Box(board, ("No claim on the scoreboard is decided by this chapter.",))
    notes = ["The claims of this chapter, as on the scoreboard, from the book's stored results."]
    if differs:
        notes.append(f"They are not about this run, which differs in {', '.join(differs)}.")
    return Box(board, tuple(notes))
