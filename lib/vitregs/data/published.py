"""The numbers the paper and later projects published, as checked tables. No torch here."""

from pathlib import Path

import pandas as pd

from vitregs.errors import InputError, unknown
from vitregs.paths import ROOT

FOLDER = ROOT / "data" / "paper"
EVIDENCE = ("paper", "slides", "notes", "code", "inference", "plot", "recalled")


def names(folder: Path = FOLDER) -> tuple[str, ...]:
    """List the published tables: folder → names that `table` reads, in alphabetical order."""
    return tuple(sorted(path.stem for path in folder.glob("*.csv")))


def table(name: str, folder: Path = FOLDER) -> pd.DataFrame:
    """Read a published table: name → DataFrame in tidy form; empty cells are missing values.

    Raises InputError for an unknown name, a row without source or known evidence, and a row that occurs twice.
    """
    if name not in names(folder):
        raise unknown("published table", name, names(folder))
    frame = pd.read_csv(folder / f"{name}.csv", keep_default_na=False, na_values=[""])
    for column in ("source", "evidence"):
        if column not in frame or frame[column].isna().any():
            raise InputError(f"published table {name!r} has rows without {column}")
    for evidence in frame["evidence"].unique():
        if evidence not in EVIDENCE:
            raise unknown(f"evidence in published table {name!r}", evidence, EVIDENCE)
    if frame.duplicated().any():
        raise InputError(f"published table {name!r} says row {int(frame.duplicated().argmax()) + 1} twice")
    return frame


def value(name: str, /, column: str = "value", **where: object) -> float:
    """Look up one published number: table, column that holds it, column=cell to match (None: empty) → float.

    Raises InputError for an unknown column, for no or several matching rows, and for an empty cell.
    """
    rows = table(name)
    for key in (column, *where):
        if key not in rows:
            raise unknown(f"column of published table {name!r}", key, map(str, rows.columns))
    for key, cell in where.items():
        kept = rows[rows[key].isna() if cell is None else rows[key] == cell]
        if kept.empty:
            raise unknown(f"{key} in these rows of published table {name!r}", cell, map(str, rows[key].unique()))
        rows = kept
    if len(rows) > 1:
        open_ = [str(k) for k in rows if k not in {column, *where} and rows[k].nunique(dropna=False) > 1]
        raise InputError(f"{len(rows)} rows of published table {name!r} match: give also one of {', '.join(open_)}")
    number = pd.to_numeric(rows[column], errors="coerce").iloc[0]
    if pd.isna(number):
        raise InputError(f"published table {name!r} gives no number in column {column!r} of that row")
    return float(number)
