"""The notebooks: their form, their stored outputs against a fresh run, and other models through papermill."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests import compare, kernels
from vitregs import paths
from vitregs.book import execute, parameters
from vitregs.cache import file_hash, load_dataset
from vitregs.models import registry

CHAPTERS = parameters.names()
MEASURING = ("models", "weights", "images", "count", "size", "seed", "device")  # what a chapter on models can be told
TRAINING = ("settings", "images", "device")  # and one that trains
DRAWING = ("published", "afresh", "device")  # and one that only draws what was measured on published networks

MODELS = [c for c in CHAPTERS if "models" in parameters.chapter_parameters(c)]
each = pytest.mark.parametrize("chapter", CHAPTERS)
each_on_models = pytest.mark.parametrize("chapter", MODELS)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Kernels of one thread each: tests beside this one use the other cores, and waiting threads cost the most."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture
def warm_kernels(one_thread: None) -> Iterator[None]:
    """Kernels that need not import torch first. The build and plain papermill start theirs cold."""
    with kernels.warm():
        yield


@cache
def read(chapter: str) -> Any:
    return nbformat.read(parameters.NOTEBOOKS / f"{chapter}.ipynb", as_version=4)


def tags(cell: Any) -> list[str]:
    return cell.metadata.get("tags", [])


def code(chapter: str) -> list[Any]:
    return [c for c in read(chapter).cells if c.cell_type == "code"]


def executed(chapter: str) -> bool:
    return any(c.execution_count is not None or c.outputs for c in code(chapter))


def needs_outputs(chapter: str) -> None:
    if not executed(chapter):
        pytest.skip(f"{chapter} has no stored outputs yet: make notebooks")


def last(source: str) -> str:
    """The last statement of a cell."""
    return ast.unparse(ast.parse(source).body[-1])


# --- form


def test_there_are_chapters() -> None:
    assert len(CHAPTERS) >= 4
    numbers = [int(name.split("_")[0]) for name in CHAPTERS]
    assert len(set(numbers)) == len(numbers)  # some chapters are still to come
    assert all(len(name.split("_")[0]) == 2 for name in CHAPTERS)


@each
def test_a_notebook_is_valid_and_small(chapter: str) -> None:
    book = read(chapter)
    nbformat.validate(book)
    assert book.metadata.kernelspec.name == "python3"
    assert book.metadata.kernelspec.language == "python"
    assert (parameters.NOTEBOOKS / f"{chapter}.ipynb").stat().st_size < 1e6
    assert len({c.id for c in book.cells}) == len(book.cells)
    assert "papermill" not in book.metadata
    assert [c.id for c in book.cells if {"papermill", "execution"} & c.metadata.keys()] == []
    assert [c.id for c in book.cells if "injected-parameters" in tags(c)] == []
    assert len([c for c in code(chapter) if "solution" not in tags(c)]) <= 14


@each
def test_a_notebook_has_one_title_and_says_what_to_look_for(chapter: str) -> None:
    book = read(chapter)
    assert [c.id for c in book.cells if c.cell_type == "markdown" and re.search(r"^# ", c.source, re.MULTILINE)] == [
        book.cells[0].id
    ]
    first = book.cells[0].source
    assert len(re.findall(r"^# ", first, re.MULTILINE)) == 1
    assert first.startswith("# ")
    assert "**The claim**" in first
    assert "Look for" in first


@each
def test_parameters_are_typed_literals_with_help(chapter: str) -> None:
    cells = [c for c in code(chapter) if "parameters" in tags(c)]
    assert len(cells) == 1
    assert cells[0].id == code(chapter)[0].id
    lines = ast.parse(cells[0].source).body
    assert all(isinstance(line, ast.AnnAssign) for line in lines)
    written = {line.target.id: ast.literal_eval(line.value) for line in lines}
    types = {line.target.id: ast.unparse(line.annotation) for line in lines}
    found = parameters.chapter_parameters(chapter)
    assert {n: p.default for n, p in found.items()} == written
    assert {n: p.type.__name__ for n, p in found.items()} == types
    assert {n for n, p in found.items() if len(p.help) < 4} == set()
    assert [n for n, p in found.items() if p.type in (int, float) and p.limits is None] == []
    trains = bool({"recipe", "recipes"} & found.keys())
    assert set(MEASURING if chapter in MODELS else TRAINING if trains else DRAWING) <= found.keys()
    # each one reaches the check inside the notebook
    call = next(n for n in ast.walk(ast.parse(code(chapter)[1].source)) if isinstance(n, ast.Call) and _is_run(n))
    assert ast.literal_eval(call.args[0]) == chapter
    assert {k.arg: ast.unparse(k.value) for k in call.keywords} == {n: n for n in found}


def _is_run(call: ast.Call) -> bool:
    return ast.unparse(call.func) == "chapter.Run"


@each
def test_figures_have_captions_and_words(chapter: str) -> None:
    drawing = [
        c
        for c in code(chapter)
        if re.search(r"\.plot_\w+\(|\bvr\.plot\.", last(c.source)) and "solution" not in tags(c)
    ]
    figures = [c for c in code(chapter) if "mystnb" in c.metadata]
    assert drawing
    assert [c.id for c in figures] == [c.id for c in drawing]
    for cell in figures:
        assert re.fullmatch(r"fig-[a-z0-9-]+", cell.metadata.mystnb.figure.name), cell.id
        assert len(cell.metadata.mystnb.figure.caption) > 40, cell.id
        assert len(cell.metadata.mystnb.image.alt) > 40, cell.id


def test_names_of_figures_and_exercises_are_unique() -> None:
    names = [c.metadata.mystnb.figure.name for n in CHAPTERS for c in code(n) if "mystnb" in c.metadata]
    names += re.findall(r"^:name: (\S+)$", "\n".join(c.source for n in CHAPTERS for c in read(n).cells), re.MULTILINE)
    assert len(names) == len(set(names))


@each
def test_exercises_have_separable_solutions(chapter: str) -> None:
    cells = read(chapter).cells
    kinds = ["exercise" if "exercise" in tags(c) else "solution" if "solution" in tags(c) else "" for c in cells]
    assert kinds.count("exercise") >= 1
    for i, kind in enumerate(kinds):
        if kind == "exercise":
            assert cells[i].cell_type == "markdown"
            assert ":class: exercise" in cells[i].source
            assert kinds[i + 1] == "solution"
        if kind == "solution" and cells[i].cell_type == "code":
            assert "hide-cell" in tags(cells[i])
        elif kind == "solution":
            assert ":class: dropdown" in cells[i].source
        else:
            assert ":class: dropdown" not in cells[i].source
    # what stays when solutions are stripped does not need them
    made = {n.id for c in code(chapter) if "solution" in tags(c) for n in ast.walk(ast.parse(c.source)) if _made(n)}
    kept = [c for c in code(chapter) if "solution" not in tags(c)]
    first = {n.id for c in kept for n in ast.walk(ast.parse(c.source)) if _made(n)}
    used = {n.id for c in kept for n in ast.walk(ast.parse(c.source)) if isinstance(n, ast.Name) and not _made(n)}
    assert (made - first) & used == set()


def _made(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)


@each
def test_provenance_comes_last(chapter: str) -> None:
    cell = read(chapter).cells[-1]
    assert cell.source == "run.provenance()"
    assert {"remove-input", "nbval-ignore-output"} <= set(tags(cell))


@each
def test_no_plumbing(chapter: str) -> None:
    for cell in code(chapter):
        nodes = list(ast.walk(ast.parse(cell.source)))
        assert not [n for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)], cell.id
        names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
        allowed = {"numpy", "pandas", "vitregs"} | ({"torch"} if "solution" in tags(cell) else set())
        assert {n.split(".")[0] for n in names} <= allowed, cell.id
        assert "hook" not in cell.source
        assert not cell.source.startswith(("%", "!"))


@each
def test_text_on_our_own_networks_is_marked(chapter: str) -> None:
    """Runs on other networks leave it out; exercises are asked of any network, and may name one of ours."""
    names = re.compile(
        r"`(" + "|".join(map(re.escape, registry.zoo())) + r")`|neither of ours|none of ours|\b[Oo]f ours\b"
    )
    marked = [c for c in read(chapter).cells if "defaults" in tags(c)]
    plain = [c for c in read(chapter).cells if c.cell_type == "markdown" and "defaults" not in tags(c)]
    assert marked
    assert [c.id for c in marked if c.cell_type != "markdown"] == []
    assert [c.id for c in plain if names.search(c.source) and not {"exercise", "solution"} & set(tags(c))] == []
    assert [c.id for c in plain if re.search(r"\*\*(Seen|Not seen|Weak|Surprises)\.", c.source)] == []


@each
def test_measurements_are_named(chapter: str) -> None:
    """A stored result is kept by the name of a function: `run.measure("name", module.function, …)`."""
    calls = [n for c in code(chapter) for n in ast.walk(ast.parse(c.source)) if isinstance(n, ast.Call)]
    calls = [n for n in calls if ast.unparse(n.func) == "run.measure"]
    assert bool(calls) == (chapter in MODELS)
    for call in calls:
        assert re.fullmatch(r"[a-z_]+", ast.literal_eval(call.args[0]))
        assert re.fullmatch(r"[a-z_]+(\.[a-z_]+)*", ast.unparse(call.args[1]))
        assert len(call.args) == 2
    names = [ast.literal_eval(call.args[0]) for call in calls]
    assert len(set(names)) == len(names)


# --- stored outputs


@each
def test_stored_outputs_are_those_of_one_whole_run(chapter: str) -> None:
    needs_outputs(chapter)
    assert [c.execution_count for c in code(chapter)] == list(range(1, len(code(chapter)) + 1))
    outputs = [(c.id, o) for c in code(chapter) for o in c.outputs]
    assert [i for i, o in outputs if o.output_type == "error"] == []
    assert [i for i, o in outputs if o.output_type == "stream" and o.name == "stderr"] == []
    assert [i for i, o in outputs if "application/vnd.jupyter.widget-view+json" in o.get("data", {})] == []
    for cell in code(chapter):
        if "mystnb" in cell.metadata:
            assert [o for o in cell.outputs if "image/png" in o.get("data", {})], f"{cell.id} has no image"
    assert 'class="provenance"' in code(chapter)[-1].outputs[0].data["text/html"]
    text = "\n".join(c.source for c in read(chapter).cells if c.cell_type == "markdown")
    assert re.findall(r"^\W*(?:AGREES|TODO|TBD|FIXME|XXX)\b.*", text, re.MULTILINE) == []


def built(chapter: str) -> tuple[Path, Path]:
    """A chapter as the build has executed it, or executed now where that is older than its sources: → notebook, results."""
    book, folder = paths.ROOT / "build" / "notebooks" / f"{chapter}.ipynb", paths.ROOT / "build" / "results"
    sources = [parameters.NOTEBOOKS / f"{chapter}.ipynb", *(paths.ROOT / "lib" / "vitregs").rglob("*.py")]
    sources += [p for name in ("paper", "zoo") for p in (paths.ROOT / "data" / name).rglob("*") if p.is_file()]
    if not book.is_file() or book.stat().st_mtime < max(p.stat().st_mtime for p in sources):
        execute.run_chapter(chapter, {}, book, folder)
    return book, folder


@each
def test_stored_outputs_and_figure_data_come_out_again(chapter: str) -> None:
    """The build has executed each chapter once: that execution is held against the stored one."""
    needs_outputs(chapter)
    book, folder = built(chapter)
    assert compare.chapter(chapter, book, folder) == []
    assert list((folder / chapter).glob("*.nc")) or chapter not in MODELS, "nothing was measured"


@pytest.mark.nightly
@each
def test_nbval_agrees(chapter: str, tmp_path: Path) -> None:
    """Every cell as nbval runs it, without papermill and with everything measured anew."""
    needs_outputs(chapter)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    message = ["-m", "pytest", "-p", "tests.compare", "--nbval", "--nbval-current-env", "--nbval-cell-timeout=3600"]
    done = subprocess.run(
        [sys.executable, *message, str(parameters.NOTEBOOKS / f"{chapter}.ipynb")],
        cwd=paths.ROOT,
        env=environment | {"VITREGS_RESULTS": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert re.search(rf"\b{len(code(chapter))} passed", done.stdout), done.stdout[-2000:]


# --- other models, other images


def outputs(file: Path) -> list[Any]:
    return [o for c in nbformat.read(file, as_version=4).cells if c.cell_type == "code" for o in c.outputs]


# what a chapter needs of real images, where it is not four of Imagenette
REAL = {
    "05_local_information": ("imagenette-224", 9),
    "06_global_information": ("imagenette-224", 60),
    "08_no_regression": ("coco-256", 24),
    "09_how_many_registers": ("imagenette-224", 24),
    "10_object_discovery": ("coco-256", 12),
    "11_register_attention": ("coco-256", 4),
}


@pytest.mark.usefixtures("warm_kernels")
@each_on_models
def test_a_published_model_on_real_images(chapter: str, shared_data: Path, tmp_path: Path) -> None:
    name = "deit_tiny_patch16_224"
    folder, number = REAL.get(chapter, ("imagenette-224", 4))
    values = {
        "models": [name],
        "weights": [str(shared_data / "deit-tiny" / f"{name}.safetensors")],
        "images": str(next((shared_data / folder).glob("validation*.parquet"))),
        "count": number,
        "device": "cpu",
    }
    made = execute.run_chapter(chapter, values, tmp_path / "out.ipynb", tmp_path / "results")
    found = outputs(made)
    ours = [c.source for c in nbformat.read(made, as_version=4).cells if "defaults" in tags(c)]
    assert ours
    assert [text for text in ours if "This run differs in `models`, `weights`, `images`, `count`" not in text] == []
    assert [o for o in found if o.output_type == "error"] == []
    assert [o.text for o in found if o.output_type == "stream" and o.name == "stderr"] == []
    assert sum("image/png" in o.get("data", {}) for o in found) == sum("mystnb" in c.metadata for c in code(chapter))
    assert file_hash(Path(values["weights"][0]))[:16] in found[-1].data["text/plain"]
    arrays = [load_dataset(p) for p in (tmp_path / "results" / chapter).glob("*.nc")]
    assert {str(a["model"].item()) for a in arrays} == {name}
    assert max(a.sizes.get("image", 0) for a in arrays) <= number


@pytest.mark.usefixtures("warm_kernels")
def test_training_chapters_on_real_images(shared_data: Path, tmp_path: Path) -> None:
    source = str(next((shared_data / "cifar10").glob("test*.parquet")))
    small = ["size=femto", "image_size=32", "batch=8"]
    for chapter, values in {
        "13": {"recipes": ["mae-pico", "supervised-pico"], "steps": 3, "settings": small},
        "14": {"recipe": "tinyimagenet-pico-reg2", "settings": [*small, "steps=4", "warmup=2"], "every": 2},
    }.items():
        made = execute.run_chapter(
            parameters.find(chapter), {**values, "images": source, "device": "cpu"}, tmp_path / "out.ipynb", tmp_path
        )
        found = outputs(made)
        assert [o for o in found if o.output_type == "error"] == []
        assert [o.text for o in found if o.output_type == "stream" and o.name == "stderr"] == []


@pytest.mark.usefixtures("warm_kernels")
def test_a_run_that_is_kept_goes_on(tmp_path: Path) -> None:
    values = {"settings": ["size=femto", "image_size=32", "steps=4", "warmup=2"], "device": "cpu", "every": 2}
    values |= {"recipe": "hunt-femto", "keep": str(tmp_path / "kept")}
    execute.run_chapter("14_train_your_own", values, tmp_path / "out.ipynb", tmp_path)
    first = (tmp_path / "kept" / "weights.safetensors").stat().st_mtime
    execute.run_chapter("14_train_your_own", values, tmp_path / "again.ipynb", tmp_path)
    assert (tmp_path / "kept" / "weights.safetensors").stat().st_mtime >= first
    assert {"README.md", "checkpoint.pt"} <= {p.name for p in (tmp_path / "kept").iterdir()}


def test_plain_papermill_works_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import papermill

    monkeypatch.setenv("VITREGS_RESULTS", str(tmp_path / "results"))
    book = papermill.execute_notebook(
        str(parameters.NOTEBOOKS / "02_norms.ipynb"),
        str(tmp_path / "out.ipynb"),
        {"models": ["supervised-pico-reg4"], "count": 4},
        kernel_name="python3",
        progress_bar=False,
    )
    assert [c.source.splitlines()[1:] for c in book.cells if "injected-parameters" in tags(c)] == [
        ['models = ["supervised-pico-reg4"]', "count = 4"]
    ]
    assert [o for o in outputs(tmp_path / "out.ipynb") if o.output_type == "error"] == []
    norms = load_dataset(tmp_path / "results" / "02_norms" / "norms.supervised-pico-reg4.nc")["value"]
    assert dict(norms.sizes) == {"image": 4, "layer": 9, "token": 149}


def test_plain_papermill_is_checked_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cell behind the parameters checks them: cells before the measurement are all that runs."""
    import papermill

    monkeypatch.setenv("VITREGS_RESULTS", str(tmp_path / "results"))
    book = read("02_norms")
    short = nbformat.v4.new_notebook(cells=book.cells[:3], metadata=book.metadata)
    nbformat.write(short, tmp_path / "in.ipynb")
    with pytest.raises(papermill.PapermillExecutionError) as caught:
        papermill.execute_notebook(
            str(tmp_path / "in.ipynb"), None, {"models": ["supervised-pika"]}, kernel_name="python3", progress_bar=False
        )
    assert caught.value.ename == "InputError"
    assert caught.value.evalue == "unknown model 'supervised-pika': did you mean 'supervised-pico'?"
    assert not (tmp_path / "results").exists()
