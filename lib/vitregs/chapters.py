"""Chapters as programs: their parameters, checked; their run through papermill; their measurements, stored.

A chapter's parameters are the typed lines of its `parameters` cell. The comment behind a line is its help text; a range
`[low, high]` or choices `{a, b}` in it are enforced. The notebook is the only place where they are written.
"""

import ast
import inspect
import io
import json
import os
import re
import sys
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from vitregs import backbones, results, scenes, sources, weights
from vitregs import images as pictures
from vitregs.backbones import Backbone
from vitregs.images import Images
from vitregs.pretrain import recipes
from vitregs.pretrain.recipe import parse
from vitregs.problems import Problem, extra, unknown

NOTEBOOKS = results.ROOT / "notebooks"
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
        """Check a value of this parameter: → the value in its type. Raises Problem for a wrong type, range or choice."""
        wrong = Problem(f"{self.name} takes {self.type.__name__}, not {value!r}")
        if self.type is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if self.type is list and isinstance(value, str) and re.fullmatch(r"\(.*\)", value.strip()):
            raise Problem(f"{self.name} takes list, not {value!r}: papermill turns a tuple into text, give it a list")
        if not isinstance(value, self.type) or (self.type is int and isinstance(value, bool)):
            raise wrong
        if self.limits and not self.limits[0] <= float(value) <= self.limits[1]:
            low, high = (f"{n:g}" for n in self.limits)
            raise Problem(f"{self.name} must lie within {low} to {high}, not {value}")
        if self.choices and value not in self.choices:
            raise unknown(self.name, value, self.choices)
        return value


def names() -> list[str]:
    """Names of all chapters, in order."""
    return sorted(p.stem for p in NOTEBOOKS.glob("[0-9]*.ipynb"))


def find(name: str) -> str:
    """Complete a chapter's name: "2", "02" or "norms" for "02_norms". Raises Problem naming the nearest."""
    there = names()
    word = name.removesuffix(".ipynb").split("/")[-1]
    padded = word.zfill(2) if word.isdigit() else word
    found = [c for c in there if c == word or c.split("_")[0] == padded or c.split("_", 1)[-1] == word]
    if len(found) != 1:
        raise unknown("chapter", name, there)
    return found[0]


def parameters(chapter: str) -> dict[str, Parameter]:
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
    known = parameters(chapter)
    return [n for n, v in values.items() if n not in ("device", "out") and v != known[n].default]


def check(chapter: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Check values against a chapter's parameters: → all parameters, defaults filled in.

    Raises Problem for unknown names, wrong types, values out of range, unknown models and recipes, files and folders that do not
    exist, folders without pictures, and a device that is not there.
    """
    known = parameters(chapter)
    for name in values:
        if name not in known:
            raise unknown(f"parameter of {chapter}", name, known)
    full = {n: p.check(values.get(n, p.default)) for n, p in known.items()}
    models, files = full.get("models", []), full.get("weights", [])
    for name in ("models", "weights"):
        for word in full.get(name, []):
            if not isinstance(word, str):
                raise Problem(f"{name} takes a list of names, not of {word!r}")
    if "models" in full and not models:
        raise Problem("models must name at least one model")
    for model in models:
        backbones.check(model)
        if models.count(model) > 1:
            raise Problem(f"models names {model} twice: results are kept by name")
    if files and len(files) != len(models):
        raise Problem(f"{len(files)} weight files for {len(models)} models: give one for each, '' for zoo or hub")
    for file in filter(None, files):
        weights.files(Path(file))
    for name in [*full.get("recipes", []), *([full["recipe"]] if "recipe" in full else [])]:
        parse(recipes.recipe(name), full.get("settings", []))
    if full.get("images", "scenes") != "scenes":
        sources.check(full["images"])
    if "device" in full:
        backbones.pick_device(full["device"])
    return full


def _check_injected(chapter: str) -> None:
    """Raise Problem for a parameter that papermill put into this notebook and no cell reads: it only warns of it."""
    cells = getattr(sys.modules["__main__"], "In", [])  # the cells that have run here, in a kernel
    injected = [cell for cell in cells if cell.startswith("# Parameters\n")]
    known = parameters(chapter)
    for line in ast.parse(injected[-1]).body if injected else []:
        for target in line.targets if isinstance(line, ast.Assign) else []:
            if isinstance(target, ast.Name) and target.id not in known:
                raise unknown(f"parameter of {chapter}", target.id, known)


def execute(chapter: str, values: Mapping[str, Any], out: Path, stored: Path) -> Path:
    """Run a chapter through papermill: name, values, output notebook, results folder → the notebook written.

    Everything is checked first. Raises Problem if a check or a cell fails; the output is then not touched.
    """
    with extra("book", "running a chapter"):
        import papermill
        from jupyter_client.kernelspec import NoSuchKernel
        from nbclient.exceptions import DeadKernelError

    full, known = check(chapter, values), parameters(chapter)
    if full.get("images", "scenes") != "scenes" and Path(full["images"]).expanduser().exists():
        full["images"] = str(Path(full["images"]).expanduser().resolve())  # the kernel runs in another folder
    if full.get("models"):
        full["models"] = [backbones.absolute(m) for m in full["models"]]
    if full.get("keep"):
        full["keep"] = str(Path(full["keep"]).expanduser().resolve())
    if full.get("weights"):
        full["weights"] = [str(Path(f).expanduser().resolve()) if f else "" for f in full["weights"]]
    given = {k: v for k, v in full.items() if v != known[k].default}
    results.check_writable(stored)

    def write(spare: Path) -> None:
        named = spare.with_suffix(".ipynb")  # papermill chooses its format by the suffix
        try:
            papermill.execute_notebook(
                str(NOTEBOOKS / f"{chapter}.ipynb"), str(named), given, cwd=str(NOTEBOOKS), kernel_name="python3",
                progress_bar={"leave": False, "disable": None},  # none where nobody watches
                extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # it would tell how it talks and when it is stopped
            )  # fmt: skip
            named.write_text(without_defaults(tidy(named.read_text()), changed(chapter, given)))
            named.replace(spare)
        except papermill.PapermillExecutionError as error:
            what = error.evalue if error.ename == "Problem" else f"{error.ename}: {error.evalue}"
            raise Problem(f"{chapter} stopped: {what}") from error
        except DeadKernelError as error:
            raise Problem(f"{chapter} stopped: its kernel was killed, perhaps for want of memory") from error
        except NoSuchKernel as error:
            raise Problem("there is no Jupyter kernel python3 here: pip install ipykernel") from error
        finally:
            named.unlink(missing_ok=True)

    with _environment(VITREGS_RESULTS=str(stored.resolve()), PYDEVD_DISABLE_FILE_VALIDATION="1"):
        results.write_whole(out, write)
    return out


@contextmanager
def _environment(**names: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def tidy(text: str) -> str:
    """Drop what a run adds and nobody reads (time stamps, paths, empty tags): notebook JSON → notebook JSON."""
    book = json.loads(text)
    book["metadata"].pop("papermill", None)
    book["metadata"].get("language_info", {}).pop("version", None)
    for cell in book["cells"]:
        for key in ("papermill", "execution"):
            cell["metadata"].pop(key, None)
        if not cell["metadata"].get("tags", True):
            del cell["metadata"]["tags"]
    return json.dumps(book, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def without_defaults(text: str, differs: Sequence[str]) -> str:
    """Take out what a chapter says of its own networks and images.

    Args:
        text: a notebook, JSON. Its markdown cells with the tag `defaults` speak of a run at the defaults.
        differs: parameters of this run that are not at their defaults; if there are none, nothing is taken out.

    Returns:
        The notebook, JSON. Of each such cell the headings are left, and one line that says where the text is.
    """
    if not differs:
        return text
    book = json.loads(text)
    names = ", ".join(f"`{name}`" for name in differs)
    line = f"*What the book says here is about its own networks and images. This run differs in {names}, so it is left out.*"
    for cell in book["cells"]:
        if cell["cell_type"] == "markdown" and "defaults" in cell["metadata"].get("tags", []):
            heads = re.findall(r"^#+ .*$", "".join(cell["source"]), re.MULTILINE)
            cell["source"] = "\n\n".join([*heads, line]).splitlines(keepends=True)
    return json.dumps(book, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


Measured = xr.DataArray | xr.Dataset


def _kept(measure: Callable[[], Measured], backbone: Backbone, source: Images) -> xr.Dataset:
    """What was measured, with the truth of its patches (share of background) beside it where there are masks."""
    found = measure()
    if isinstance(found, xr.Dataset):
        return found
    data = found.to_dataset(name="value")
    if {"image", "token"} <= set(found.dims):
        ground = source.background(backbone.grid(source.size))
        if ground is not None and len(ground) == found.sizes["image"]:  # some chapters keep the first images alone
            data["background"] = (("image", "patch"), ground.astype(np.float32))
    return data


def _check_function(function: Callable[..., Any], keywords: Mapping[str, Any]) -> None:
    """Raise Problem unless the name of a function and its keywords say all that it does: no lambda, closure or partial."""
    name, module = str(getattr(function, "__qualname__", "")), str(getattr(function, "__module__", ""))
    if not inspect.isfunction(function):
        what = name or type(function).__name__
        raise Problem(
            f"measure takes a function of a module, not {what}: pass what it is bound to as keywords of measure"
        )
    if module == "__main__" or getattr(sys.modules.get(module), name, None) is not function:
        raise Problem(
            f"measure takes a function of a module, not {name.split('.')[-1]}, which other values can change unseen: "
            "put it into a file of the library, and pass what varies as keywords of measure"
        )
    for word, value in keywords.items():
        if not _plain(value):
            kinds = "text, numbers, true or false, None, and lists and dictionaries of these"
            raise Problem(f"{word} of {name} must be plain, so that results can be kept by it ({kinds}), not {value!r}")
    try:
        inspect.signature(function).bind(None, None, **keywords)
    except TypeError as error:
        raise Problem(f"{name} of {module}: {error}") from None


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_plain, value.values()))
    return value is None or isinstance(value, str | int | float)


class Run:
    """A chapter at work: its checked parameters, its models and pictures, and its stored measurements."""

    def __init__(self, chapter: str, **values: Any) -> None:
        _check_injected(chapter)
        self.chapter = chapter
        self.values = check(chapter, values)
        self._tell_differences()
        self.folder = Path(os.environ.get("VITREGS_RESULTS") or results.BUILD / "results") / chapter

    @cached_property
    def backbones(self) -> dict[str, Backbone]:
        """The models of the chapter, loaded, by the names given for them."""
        files = self.values.get("weights") or [""] * len(self.values["models"])
        device = self.values.get("device", "auto")
        return {
            name: backbones.load(name, weights=file or None, device=device)
            for name, file in zip(self.values["models"], files, strict=True)
        }

    def pictures(self, backbone: Backbone) -> Images:
        """The pictures of the chapter at the size asked for (0: the model's own): backbone → Images."""
        side = self.values.get("size", 0)
        size = (side, side) if side else backbone.size
        backbone.grid(size)
        return pictures.load(
            self.values["images"],
            size=size,
            count=self.values["count"],
            seed=self.values["seed"],
            preparation=backbone.preparation,
        )

    def _tell_differences(self) -> None:
        """Show in a notebook which parameters make this run another one than the book's; nothing if none do."""
        differs = changed(self.chapter, self.values)
        shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
        if differs and shell:
            names = ", ".join(f"`{name}`" for name in differs)
            text = f"**Not the run of the book**: it differs in {names}. What the text says of results is not about this run."
            sys.modules["IPython"].display.display({"text/markdown": text, "text/plain": text}, raw=True)

    def measure(self, name: str, function: Callable[..., Measured], /, **keywords: Any) -> dict[str, Any]:
        """Measure every model on the chapter's images, or reload what was measured.

        A stored array is used only for the same function and keywords, the same code (`results.code_hash` of the function's
        module), weights and images. Versions of torch and timm do not count; they stand in the array's attributes.

        Args:
            name: of the file.
            function: of a module, so that its name says what it does: takes a Backbone, Images and the keywords, gives a
                DataArray or a Dataset.
            keywords: everything else that it depends on, as plain values.

        Returns:
            What the function gives, by the name of the model.

        Raises:
            Problem: for lambdas, functions of the notebook, bound functions, keywords that are not plain or do not fit.

        Example:
            ``run.measure("norms", capture.norms, layers=[3])``
        """
        _check_function(function, keywords)
        code = results.code_hash(function.__module__)
        asked = {"what": name, "function": function.__qualname__, "keywords": keywords}
        found = {}
        for model, backbone in self.backbones.items():
            source = self.pictures(backbone)
            key = {**asked, "weights": backbone.weights, **source.key}
            compute = partial(_kept, partial(function, backbone, source, **keywords), backbone, source)
            path = self.folder / f"{name}.{backbone.name}.nc"
            data = results.stored(path, compute, key=key, code=code)
            found[model] = data["value"] if set(data.data_vars) <= {"value", "background"} else data
        return found

    def preview(self, backbone: Backbone, count: int) -> np.ndarray:
        """The first pictures of the chapter, to draw: → (count, H, W, 3) in [0, 1]."""
        first = next(self.pictures(backbone).pixels(count))
        return first.permute(0, 2, 3, 1).numpy()

    def background(self, backbone: Backbone) -> np.ndarray | None:
        """Share of background (mask 0) in every patch: → (pictures, patches) in [0, 1], or None without masks."""
        source = self.pictures(backbone)
        return source.background(backbone.grid(source.size))

    def colours(self, backbone: Backbone) -> np.ndarray | None:
        """Colour of the object that fills most of each patch: → (pictures, patches) index into scenes.COLOUR_NAMES, -1 for
        background, or None where the pictures are no scenes."""
        source = self.pictures(backbone)
        rows, columns = backbone.grid(source.size)
        height, width = backbone.patch_size
        found = []
        for batch in source.batches():
            if batch.truth is None:
                return None
            ranks = batch.truth.instances.numpy()
            cut = ranks.reshape(len(ranks), rows, height, columns, width)
            count = np.stack([(cut == k).sum((2, 4)) for k in range(scenes.MOST_OBJECTS + 1)], -1)
            which = count.reshape(len(ranks), rows * columns, -1).argmax(-1)
            colour = np.pad(batch.truth.objects[..., 1].numpy(), ((0, 0), (1, 0)), constant_values=-1)
            found.append(np.take_along_axis(colour, which, 1))
        return np.concatenate(found)

    def provenance(self) -> "Provenance":
        """Where this page's numbers come from, as a fold-out."""
        facts = results.provenance(**{f"parameter {k}": v for k, v in self.values.items()})
        if "models" in self.values:
            facts |= {f"weights of {n}": f"{b.source}, {b.weights[:16]}" for n, b in self.backbones.items()}
            facts["device"] = str(next(iter(self.backbones.values())).device)
        return Provenance(facts)


@dataclass(frozen=True)
class Provenance:
    """A table of facts that a notebook shows as a fold-out."""

    facts: Mapping[str, str]

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in self.facts.items())
        return f'<details class="provenance"><summary>Where these numbers come from</summary><table>{rows}</table></details>'

    def __repr__(self) -> str:
        return "\n".join(f"{k}: {v}" for k, v in self.facts.items())
