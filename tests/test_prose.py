"""Chapters claim nothing that no run keeps: verdicts come from the scoreboard, numbers from stored outputs or publications."""

import html
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests import compare
from vitregs import paths
from vitregs.book import execute, parameters
from vitregs.claims import scoreboard
from vitregs.data import published
from vitregs.models import registry

CHAPTERS = parameters.names()
each = pytest.mark.parametrize("chapter", CHAPTERS)
# In a chapter or a report these words are the scoreboard's alone ("inconclusive" is a diagnosis of a network as well)
WORDS = re.compile(r"\*\*(agrees|does not)\b|\bwhat agrees\b|\breproduced\b|not testable|[✔✘✓✗]", re.IGNORECASE)

# --- numbers
DIGITS = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?![\w])")
KIND = r"(?:figures?|tables?|sections?|exercises?|chapters?|blocks?|layers?|steps?|registers?|appendix|Fig|VOC|COCO)"
NOT_RESULTS = re.compile(
    r"```.*?```|95 %|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)|^:.*?$|^\([\w-]+\)=$|^:::.*?$|https?://\S+"
    rf"|\b{KIND}\.? \d+[a-z]?(?:\.\d+)?(?:(?:,| and| to|, and| or)* \d+[a-z]?(?:\.\d+)?)*\b|\d+ ?(?:by|x|×) ?\d+",
    re.DOTALL | re.MULTILINE | re.IGNORECASE,
)

OTHERS = re.compile(r"\bpapers?\b|\bpublished\b|\b[Oo]thers report\b|\{cite|DINOv2 ViT-g")


def read(chapter: str) -> list[Any]:
    return json.loads((parameters.NOTEBOOKS / f"{chapter}.ipynb").read_text("utf-8"))["cells"]


def source(cell: Any) -> str:
    return "".join(cell["source"])


def typed(sentence: str) -> list[str]:
    """Numbers of a sentence that may be results: with decimals, or of two digits and more."""
    return [n for n in DIGITS.findall(sentence) if "." in n or len(n) > 1]


def decimals(number: str) -> int:
    return len(number.partition(".")[2])


def rounds_to(number: str, printed: set[str]) -> bool:
    """Whether one of the printed numbers, which must have as many digits at least, is this one when it is rounded."""
    digits, value = decimals(number), float(number.replace(",", ""))
    return any(decimals(p) >= digits and abs(float(p.replace(",", "")) - value) <= 0.501 * 10**-digits for p in printed)


@cache
def of_publications() -> frozenset[str]:
    frames = [published.table(name) for name in published.names()]
    return frozenset(
        n for f in frames for c in f.columns for v in f[c].dropna().unique() for n in DIGITS.findall(str(v))
    )


def outputs(cells: list[Any]) -> set[str]:
    """Numbers that a notebook's outputs print: cells → numbers as printed, without those of its provenance."""
    found: set[str] = set()
    for cell in cells:
        for output in [] if compare.ignored(cell) else cell.get("outputs", []):
            data = output.get("data", {})
            image = any(k.startswith("image/") for k in data)
            texts = [output.get("text", []), data.get("text/html", [] if image else data.get("text/plain", []))]
            for text in texts:
                found |= set(DIGITS.findall(html.unescape(re.sub(r"<[^>]*>", " ", "".join(text)))))
    return found


@cache
def of_recipes() -> frozenset[str]:
    """Settings of the networks of the zoo, without what was measured on them."""
    cards = [registry.card(name) for name in registry.zoo()]
    return frozenset(n for c in cards for n in DIGITS.findall(json.dumps([c["recipe"], c["vit"]])))


def unsourced(cells: list[Any]) -> list[str]:
    """Numbers of the prose that no output and no code of the notebook holds, no recipe of the zoo and, in sentences about the
    work of others, no published table: cells → "cell: number"."""
    own = outputs(cells) | of_recipes()
    own |= {n for c in cells if c["cell_type"] == "code" for n in DIGITS.findall(source(c))}
    return [
        f"{c['id']}: {n}"
        for c in cells
        if c["cell_type"] == "markdown"
        for sentence in re.split(r"(?<=[.;!?])\s+", NOT_RESULTS.sub(" ", source(c)))
        for n in typed(sentence)
        if not rounds_to(n, own | of_publications() if OTHERS.search(sentence) else own)
    ]


@each
def test_numbers_in_prose_come_from_somewhere(chapter: str) -> None:
    assert unsourced(read(chapter)) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The values are 0.41 as long, in 15.6 % of the images.", ["15.6"]),  # 0.412 is printed
        (
            "CorLoc is 39.8 %, and in the paper's table 3 it is 55.4 %.",
            ["39.8"],
        ),  # one sentence on others: theirs count
        ("CorLoc is 55.4 % here.", ["55.4"]),  # a published number is no result of ours
        ("Figure 5b, table 12, blocks 13 to 17, `--count 360`, $12Nd^2$ and 16 by 16 cells.", []),
        ("With 61 images of two kinds", ["61"]),
    ],
)
def test_typed_results_are_found(text: str, found: list[str]) -> None:
    shown = {"output_type": "stream", "name": "stdout", "text": ["ratio 0.412, 3 of 7\n"]}
    code = {"cell_type": "code", "id": "b", "metadata": {}, "source": ["run()"], "outputs": [shown]}
    prose = {"cell_type": "markdown", "id": "a", "metadata": {}, "source": [text]}
    assert unsourced([prose, code]) == [f"a: {n}" for n in found]


# --- verdicts


@each
def test_no_chapter_has_verdicts_of_its_own(chapter: str) -> None:
    """Neither prose nor code nor outputs use the scoreboard's words; the result box alone does."""
    cells = read(chapter)
    assert [c["id"] for c in cells if WORDS.search(source(c))] == []
    for cell in cells:
        if cell["cell_type"] == "code" and source(cell) != execute.BOX:
            texts = [o.get("text", []) for o in cell["outputs"]]
            texts += [v for o in cell["outputs"] for k, v in o.get("data", {}).items() if k.startswith("text/")]
            assert [t for t in texts if WORDS.search("".join(t))] == [], cell["id"]


@pytest.mark.parametrize("file", sorted((paths.ROOT / "lib" / "vitregs" / "report").glob("*.py")), ids=lambda p: p.stem)
def test_no_report_computes_a_verdict(file: Path) -> None:
    assert WORDS.findall(file.read_text("utf-8")) == []


@pytest.fixture(scope="module")
def board() -> pd.DataFrame:
    return scoreboard.table()


@each
def test_a_chapter_opens_with_the_rows_of_the_scoreboard(chapter: str, board: pd.DataFrame) -> None:
    cells = read(chapter)
    codes = [c for c in cells if c["cell_type"] == "code"]
    boxes = [c for c in codes if source(c) == execute.BOX]
    assert len(boxes) == 1
    assert "hide-input" in boxes[0]["metadata"]["tags"]
    assert next(c for c in codes if c["outputs"]) is boxes[0]  # nothing is shown before it
    stored = "".join(boxes[0]["outputs"][0]["data"]["text/html"])
    rows = board[board["chapter"] == chapter]
    fresh = scoreboard.box(chapter)._repr_html_()
    assert compare.texts(fresh, stored) == []  # the same words, and numbers to the last digit but one
    verdicts = re.findall(r"<td>[✔✘?–] ([a-z, ]+)<", stored)
    assert verdicts == rows["verdict"].tolist()


@each
def test_every_claim_links_to_what_shows_it(chapter: str, board: pd.DataFrame) -> None:
    """A label of a figure of the chapter, or one that stands before a cell that prints a table."""
    cells = read(chapter)
    figures = {c["metadata"]["mystnb"]["figure"]["name"] for c in cells if "mystnb" in c["metadata"]}
    tables = {
        label[1]
        for i, c in enumerate(cells)
        if c["cell_type"] == "markdown" and (label := re.search(r"^\((tab-[a-z-]+)\)=$", source(c), re.MULTILINE))
        for shown in [next(d for d in cells[i:] if d["cell_type"] == "code")]
        if "mystnb" not in shown["metadata"] and shown["outputs"]
    }
    wanted = set(board.loc[board["chapter"] == chapter, "figure"])
    assert wanted <= figures | tables
    pages = [p.read_text("utf-8") for p in paths.ROOT.glob("book/*.md")] + [source(c) for c in cells]
    linked = {t for t in tables if any(f"<{t}>`" in page for page in pages)}
    assert tables <= wanted | linked  # a label that nobody links to is left over
