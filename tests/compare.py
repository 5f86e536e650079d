"""Compare an executed chapter, and the arrays behind its figures, with what is stored in the repository.

Two right runs on two processors do not print the same digits: float32 sums of another order differ in the sixth digit, and
what is chosen by them (the largest score, the nearest neighbour, the class with the highest logit) now and then turns out
otherwise for an image. So text is compared as text and numbers as numbers. An output is cut into a skeleton, its text with
`#` for each number, and the numbers. The skeletons must be equal to the letter. A number printed with decimals may differ
by one unit of its last digit and one part in a thousand; a whole number not at all. A cell whose numbers hang on choices
says so in its metadata, with the reason:

    "vitregs": {"tolerance": {"decimals": 1.25, "counts": 2, "because": "two images of 160 may be classed otherwise"}}

`decimals` and `relative` (of the number) are added to what a number with decimals may differ by, `counts` is what a whole
number may. Images must be
there; the arrays behind them are compared by `arrays`, under the rules of `CHOSEN`.

The same comparison serves the build's own execution (`tests/test_notebooks.py`, where nothing is run again), other
arithmetics (`tests/portable.py`), and nbval, as a plugin: `pytest -p tests.compare --nbval notebooks/02_norms.ipynb`.
"""

import configparser
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import xarray as xr

from vitregs import paths
from vitregs.cache import load_dataset

CONFIG = Path(__file__).parent / "nbval.cfg"
RELATIVE = 1e-3  # of a printed number, and of an array's largest value
NUMBER = re.compile(r"(?<![\w.])[-−+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?(?!\w|\.\d)", re.ASCII)


# --- printed numbers


@dataclass(frozen=True)
class Tolerance:
    """What the numbers of a cell may differ by beyond the default, and why."""

    decimals: float = 0.0
    relative: float = 0.0
    counts: int = 0
    because: str = ""


def tolerance(cell: Mapping[str, Any]) -> Tolerance:
    """Read the tolerance that a cell states in its metadata: cell → Tolerance."""
    return Tolerance(**cell["metadata"].get("vitregs", {}).get("tolerance", {}))


@cache
def _rules() -> tuple[tuple[re.Pattern[str], str], ...]:
    config = configparser.ConfigParser()
    config.read(CONFIG)
    return tuple((re.compile(config[s]["regex"]), config[s]["replace"]) for s in config.sections())


def clean(text: str) -> str:
    """Replace what may always differ (dates, addresses, durations), by the rules of nbval.cfg: text → text."""
    for pattern, replace in _rules():
        text = pattern.sub(replace, text)
    return text


def skeleton(text: str) -> tuple[str, list[str]]:
    """Cut a text into words and numbers: text → text with `#` for each number and one space for each gap, numbers."""
    text = clean(text)
    # NumPy and pandas pad numbers, so that a longer one moves the others
    message = re.sub(r"([\[(]) ", r"\1", re.sub(r"\s+", " ", NUMBER.sub("#", text))).strip()
    return message, NUMBER.findall(text)


def _unit(number: str) -> float:
    """The unit of the last digit of a number as printed: "0.25" → 0.01."""
    digits, _, power = number.partition("e")
    return 10.0 ** (int(power or 0) - len(digits.partition(".")[2]))


def numbers_differ(old: str, new: str, allowed: Tolerance) -> bool:
    """Whether two printed numbers differ by more than allowed: stored, new, Tolerance → yes or no."""
    first, second = (float(n.replace("−", "-")) for n in (old, new))
    whole = not any(mark in old + new for mark in ".e")
    if whole:
        return abs(first - second) > allowed.counts
    limit = min(_unit(old), _unit(new)) + (RELATIVE + allowed.relative) * abs(first) + allowed.decimals
    return abs(first - second) > limit * (1 + 1e-9)


def texts(old: str, new: str, allowed: Tolerance = Tolerance()) -> list[str]:
    """Compare two texts: stored, new, Tolerance → one line for each difference."""
    (old_words, old_numbers), (new_words, new_numbers) = skeleton(old), skeleton(new)
    if old_words != new_words:
        at = next((i for i, (a, b) in enumerate(zip(old_words, new_words, strict=False)) if a != b), -1)
        at = at if at >= 0 else min(len(old_words), len(new_words))
        cut = slice(max(0, at - 40), at + 40)
        return [f"other words: {new_words[cut]!r} for {old_words[cut]!r}"]
    pairs = zip(old_numbers, new_numbers, strict=True)
    return [f"{b} for {a}" for a, b in pairs if numbers_differ(a, b, allowed)]


def _joined(text: Any) -> str:
    return text if isinstance(text, str) else "".join(text) if isinstance(text, list) else repr(text)


def _parts(outputs: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What is compared of a cell's outputs, in order: (kind, text); the text of an image is empty."""
    parts: list[tuple[str, str]] = []
    for output in outputs:
        kind = output["output_type"]
        if kind == "stream":
            kind, text = f"stream {output['name']}", _joined(output["text"])
            if parts and parts[-1][0] == kind:  # it arrives in pieces of any length
                text = parts.pop()[1] + text
            parts.append((kind, text))
        elif kind == "error":
            parts.append((kind, f"{output['ename']}: {output['evalue']}"))
        else:
            data = dict(output["data"])
            if "text/html" in data:  # the same table, but not wrapped at the width of a terminal
                data.pop("text/plain", None)
            elif any(k.startswith("image/") for k in data):
                data.pop("text/plain", None)  # the size of the figure in pixels
            parts += [(f"{kind} {k}", "" if k.startswith("image/") else _joined(v)) for k, v in sorted(data.items())]
    return parts


def outputs(old: Iterable[Mapping[str, Any]], new: Iterable[Mapping[str, Any]], allowed: Tolerance) -> list[str]:
    """Compare the outputs of a cell: stored, new, Tolerance → one line for each difference. An error is always one."""
    first, second = _parts(old), _parts(new)
    found = [text for kind, text in second if kind == "error"]
    if [k for k, _ in first] != [k for k, _ in second]:
        return [*found, f"other outputs: {[k for k, _ in second]} for {[k for k, _ in first]}"]
    return found + [line for (_, a), (_, b) in zip(first, second, strict=True) for line in texts(a, b, allowed)]


def ignored(cell: Mapping[str, Any]) -> bool:
    """Whether a cell says that its outputs differ at each run: cell → yes or no."""
    return "nbval-ignore-output" in cell["metadata"].get("tags", [])


def notebooks(old: Path, new: Path) -> list[str]:
    """Compare an executed chapter with the stored one: two notebooks → one line for each difference, with its cell."""
    first, second = (nbformat.read(path, as_version=4).cells for path in (old, new))
    if [(c.id, c.source) for c in first] != [(c.id, c.source) for c in second]:
        return [f"{new} was not executed from {old}"]
    found = []
    for a, b in zip(first, second, strict=True):
        if a.cell_type == "code":
            kept = [] if ignored(a) else a.outputs
            there = [o for o in b.outputs if not ignored(a) or o.output_type == "error"]
            found += [f"[{a.id}] {line}" for line in outputs(kept, there, tolerance(a))]
    return found


def pytest_configure(config: pytest.Config) -> None:
    """Let nbval compare in this way, where this module is named as a plugin."""
    from nbval.plugin import IPyNbCell

    def compare_outputs(self: Any, test: Any, ref: Any, skip_compare: Any = None) -> bool:
        self.comparison_traceback = outputs(ref, test, tolerance(self.cell))
        return not self.comparison_traceback

    IPyNbCell.compare_outputs = compare_outputs


# --- arrays


@dataclass(frozen=True)
class Chosen:
    """An array whose values hang on choices, and how many of them may turn out otherwise."""

    names: str  # pattern of chapter/file/variable
    why: str
    images: float = 0.0  # share of the images at which any value may be another
    within: float = 0.0  # or: what each value may differ by, in its own unit,
    at: str = ".*"  # where the first coordinate matches this pattern


CHOSEN = (
    Chosen(
        "05_local_information/local/(score|low|high)",
        "a token is put at the place of the largest logit; two such places of some hundred tokens may change",
        within=0.01,
        at="top1",
    ),
    Chosen(
        "06_global_information/tokens/(score|low|high|std)",
        "an image is given the class of the largest logit: two of 160 may change",
        within=0.0125,
    ),
    Chosen(
        "0[89]_[a-z_]+/transfer/(score|low|high)",
        "the strength of a penalty is chosen by a few held-out images; another choice changes up to three of 112 in sum",
        within=0.027,
        at="colour|shape|colour and shape|zero-shot.*",
    ),
    Chosen(
        "0[89]_[a-z_]+/transfer/(each|counts)", "as above: 16 of 336 images changed sides, in both directions", 0.06
    ),
    Chosen(
        "10_object_discovery/lost/score",
        "a score of LOST is the count of patches of positive similarity: one similarity may be zero but for rounding",
        within=1,
    ),
    Chosen(
        "10_object_discovery/lost/(similarity|expansion|mask|box|seed|hit|swept)",
        "two patches may score alike: another seed, so another box",
        images=0.02,
    ),
    Chosen(
        "11_register_attention/(scores|blocks)/(iou|ari|same)(_chance|_by_chance)?",
        "a patch goes to the query or the cluster of the largest value, and a mask ends where the mass is reached",
        images=0.05,
    ),
)


def rule(name: str) -> Chosen | None:
    """The rule for an array: "chapter/file/variable" → Chosen, None where every value must come out again."""
    return next((r for r in CHOSEN if re.fullmatch(r.names, name)), None)


def arrays(old: Path, new: Path) -> list[str]:
    """Compare the arrays behind a chapter's figures with the stored ones: two folders → one line for each difference.

    Scenes and weights are the same bits everywhere; sums of float32 in another order (threads, vector width) differ by
    about 1e-6 each and a few 1e-5 after eight blocks. One part in a thousand of the largest value is far above that and
    far below anything that can be seen in a figure. Names, sizes and coordinates must be equal.
    """
    first, second = ({p.name: p for p in folder.glob("*.nc")} for folder in (old, new))
    found = [
        f"{name} is {'missing' if name in first else 'new, or left by an older build'}"
        for name in sorted(first.keys() ^ second.keys())
    ]
    for name in sorted(first.keys() & second.keys()):
        a, b = load_dataset(first[name]), load_dataset(second[name])
        try:
            xr.testing.assert_equal(a.coords.to_dataset(), b.coords.to_dataset())
            assert {k: (v.dims, v.dtype) for k, v in a.items()} == {k: (v.dims, v.dtype) for k, v in b.items()}
        except AssertionError as error:
            found.append(f"{name}: {error}")
            continue
        for key in a:
            what = f"{old.name}/{name.split('.')[0]}/{key}"
            found += [f"{name}, {key}: {line}" for line in values(a[key], b[key], rule(what))]
    return found


def values(old: xr.DataArray, new: xr.DataArray, chosen: Chosen | None = None) -> list[str]:
    """Compare the values of two arrays of one shape: stored, new, rule → a line, if they differ."""
    if not np.issubdtype(old.dtype, np.number) and old.dtype != bool:
        return [] if old.equals(new) else ["other text"]
    if not old.size:
        return []
    a, b = old.astype(float), new.astype(float)
    scale = float(np.nanmax(np.abs(a))) if a.notnull().any() else 1.0
    exact = old.dtype.kind in "biu"
    limit = xr.zeros_like(a) + (0 if exact else RELATIVE * scale)
    if chosen and chosen.within:
        names = a[a.dims[0]].values if a.dims[0] in a.coords else [""] * a.shape[0]
        free = xr.DataArray([bool(re.fullmatch(chosen.at, str(n))) for n in names], dims=a.dims[0])
        limit = limit + chosen.within * free
    same = (np.abs(a - b) <= limit + (0 if exact else RELATIVE) * np.abs(a)) | (a.isnull() & b.isnull())
    if chosen and chosen.images:
        each = same.all([d for d in same.dims if d not in ("image", "drawn")])
        lost, many = int((~each).sum()), max(1, int(chosen.images * each.size))
        return [f"{lost} of {each.size} images differ, {many} may"] if lost > many else []
    if bool(same.all()):
        return []
    worst = float(np.abs(a - b).where(~same).max())
    return [f"{int((~same).sum())} of {same.size} values differ, by up to {worst:.3g}"]


def chapter(name: str, book: Path, measured: Path) -> list[str]:
    """Compare one execution of a chapter with what is stored: name, notebook, results folder → lines, none if equal."""
    return notebooks(paths.ROOT / "notebooks" / f"{name}.ipynb", book) + arrays(
        paths.ROOT / "data" / "results" / name, measured / name
    )
