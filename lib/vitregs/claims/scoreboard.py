"""The ledger as a table: for a terminal, and as a page of the book."""

from pathlib import Path

import pandas as pd

from vitregs.claims.ledger import RESULTS, VERDICTS, judge, ledger
from vitregs.claims.measures import NEEDS


def table(folder: Path = RESULTS) -> pd.DataFrame:
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
