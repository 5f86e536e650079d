"""A chapter's parameters: read from its notebook, checked.

What a check needs is imported when values are checked, so that the list of chapters and their help come at once.
"""

import ast
import io
import json
import re
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitregs import paths
from vitregs.errors import InputError, unknown

NOTEBOOKS = paths.ROOT / "notebooks"
TYPES: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool, "list": list}


@dataclass(frozen=True)
class Parameter:
    """One line of a `parameters` cell."""

    name: str
    type: Any  # str, int, float, bool or list
    default: Any
    help: str

    @property
    def limits(self) -> tuple[float, float] | None:
        """The range [low, high] that the help text states."""
        found = re.search(r"\[\s*(-?[\d.]+)\s*,\s*(-?[\d.]+)\s*\]", self.help)
        return (float(found[1]), float(found[2])) if found else None

    @property
    def choices(self) -> list[str]:
        """The choices {a, b} that the help text states."""
        found = re.search(r"\{([^}]*)\}", self.help)
        return [c.strip() for c in found[1].split(",")] if found else []

    def check(self, value: Any) -> Any:
        """Check a value of this parameter: → the value in its type. Raises InputError for a wrong type, range or choice."""
        wrong = InputError(f"{self.name} takes {self.type.__name__}, not {value!r}")
        if self.type is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if self.type is list and isinstance(value, str) and re.fullmatch(r"\(.*\)", value.strip()):
            raise InputError(
                f"{self.name} takes list, not {value!r}: papermill turns a tuple into text, give it a list"
            )
        if not isinstance(value, self.type) or (self.type is int and isinstance(value, bool)):
            raise wrong
        if self.limits and not self.limits[0] <= float(value) <= self.limits[1]:
            low, high = (f"{n:g}" for n in self.limits)
            raise InputError(f"{self.name} must lie within {low} to {high}, not {value}")
        if self.choices and value not in self.choices:
            raise unknown(self.name, value, self.choices)
        return value


def names() -> list[str]:
    """Names of all chapters, in order."""
    return sorted(p.stem for p in NOTEBOOKS.glob("[0-9]*.ipynb"))


def find(name: str) -> str:
    """Complete a chapter's name: "2", "02" or "norms" for "02_norms". Raises InputError naming the nearest."""
    there = names()
    word = name.removesuffix(".ipynb").split("/")[-1]
    padded = word.zfill(2) if word.isdigit() else word
    found = [c for c in there if c == word or c.split("_")[0] == padded or c.split("_", 1)[-1] == word]
    if len(found) != 1:
        raise unknown("chapter", name, there)
    return found[0]


def chapter_parameters(chapter: str) -> dict[str, Parameter]:
    """Read the parameters of a chapter: name → {parameter name: Parameter}."""
    book = json.loads((NOTEBOOKS / f"{chapter}.ipynb").read_text("utf-8"))
    cells = [c for c in book["cells"] if "parameters" in c["metadata"].get("tags", [])]
    text = "".join(cells[0]["source"]) if cells else ""
    words = tokenize.generate_tokens(io.StringIO(text).readline)
    notes = {w.start[0]: w.string.lstrip("# ") for w in words if w.type == tokenize.COMMENT}
    found = {}
    for line in ast.parse(text).body:  # a formatter may have broken one over several lines
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.value:
            name, kind = line.target.id, TYPES[ast.unparse(line.annotation).split("[")[0]]
            help_ = " ".join(notes[n] for n in range(line.lineno, (line.end_lineno or line.lineno) + 1) if n in notes)
            found[name] = Parameter(name, kind, ast.literal_eval(line.value), help_)
    return found


def changed(chapter: str, values: Mapping[str, Any]) -> list[str]:
    """Name what makes a run another one than the book's: chapter, values → parameters that differ from their defaults.

    A device and a folder to write to change no result and are left out.
    """
    known = chapter_parameters(chapter)
    return [n for n, v in values.items() if n not in ("device", "out") and v != known[n].default]


def check(chapter: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Check values against a chapter's parameters: → all parameters, defaults filled in.

    Raises InputError for unknown names, wrong types, values out of range, unknown models and recipes, files and
    folders that do not exist, folders without images, and a device that is not there.
    """
    from vitregs.claims import networks
    from vitregs.data import sources
    from vitregs.models import registry, weights
    from vitregs.train import recipes
    from vitregs.train.config import parse

    known = chapter_parameters(chapter)
    for name in values:
        if name not in known:
            raise unknown(f"parameter of {chapter}", name, known)
    full = {n: p.check(values.get(n, p.default)) for n, p in known.items()}
    models, files = full.get("models", []), full.get("weights", [])
    for name in ("models", "weights", "published", "afresh"):
        for word in full.get(name, []):
            if not isinstance(word, str):
                raise InputError(f"{name} takes a list of names, not of {word!r}")
    if "models" in full and not models:
        raise InputError("models must name at least one model")
    for model in models:
        registry.check(model)
        if models.count(model) > 1:
            raise InputError(f"models names {model} twice: results are kept by name")
    for network in full.get("published", []):
        registry.check(network)
    weight_file, _ = networks.places(full.get("afresh", []))
    if weight_file:
        weights.files(Path(weight_file))
    if files and len(files) != len(models):
        raise InputError(f"{len(files)} weight files for {len(models)} models: give one for each, '' for zoo or hub")
    for file in filter(None, files):
        weights.files(Path(file))
    for name in [*full.get("recipes", []), *([full["recipe"]] if "recipe" in full else [])]:
        parse(recipes.recipe(name), full.get("settings", []))
    if full.get("images", "scenes") != "scenes":
        sources.check(full["images"])
    if "device" in full:
        registry.pick_device(full["device"])
    return full
