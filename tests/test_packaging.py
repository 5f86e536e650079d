"""Packaging: one list of dependencies, pinned once; modules that import one way; nothing of one machine in the tree."""

import ast
import json
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import entry_points, version
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import vitregs
from vitregs import chapters, results

ROOT = results.ROOT
LIBRARY = ROOT / "lib" / "vitregs"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = [
    "problems",
    "results",
    "shapes",
    "scenes",
    "images",
    "backbones",
    "capture",
    "cutoffs",
    "artifacts",
    "resize",
    "published",
    "diagnose",
    "components",
    "probes.logistic",
    "probes.pick",
    "probes.tasks",
    "probes.classes",
    "probes.local",
    "probes.dense",
    "probes.zero",
    "probes.transfer",
    "discovery",
    "objects",
    "slots",
    "costs",
    "tables",
    "tables_probes",
    "tables_dense",
    "tables_discovery",
    "tables_objects",
    "evidence.measured",
    "evidence.norms",
    "evidence.knowledge",
    "evidence.remedy",
    "claims",
    "canvas",
    "draw",
    "draw_training",
    "draw_probes",
    "draw_dense",
    "draw_discovery",
    "draw_objects",
    "pretrain.recipe",
    "pretrain.recipes",
    "pretrain.feeds",
    "pretrain.augment",
    "pretrain.text",
    "pretrain.vits",
    "pretrain.schedules",
    "pretrain.scores",
    "pretrain.supervised",
    "pretrain.clip",
    "pretrain.mae",
    "pretrain.dino",
    "pretrain.dinov2",
    "pretrain.objectives",
    "pretrain.history",
    "pretrain.meter",
    "pretrain.cards",
    "pretrain.loop",
    "pretrain.lessons",
    "chapters",
    "cli",
]
PACKAGE = r"## The rooms of `([a-z]+)/`"
EXTRAS = ("book", "test")


def requirements(*extras: str) -> list[Requirement]:
    project = PROJECT["project"]
    lines = [*project["dependencies"], *(line for e in extras for line in project["optional-dependencies"][e])]
    return [Requirement(line) for line in lines]


@cache
def pins() -> dict[str, str]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    found = [re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.+!]+)", line) for line in lines if line]
    assert None not in found, "a line of constraints.txt is not name==version"
    return {canonicalize_name(m[1]): m[2] for m in found}


# --- dependencies


def test_conda_wraps_pip_and_nothing_else() -> None:
    made = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert made.keys() == {"name", "channels", "dependencies"}
    assert made["name"] == PROJECT["project"]["name"]
    assert made["channels"] == ["conda-forge"]
    python, pip, rest = made["dependencies"]
    assert python == f"python{PROJECT['project']['requires-python']}"
    assert pip == "pip"
    assert rest == {"pip": ["-c constraints.txt", f"-e .[{','.join(EXTRAS)}]"]}
    assert set(PROJECT["project"]["optional-dependencies"]) == set(EXTRAS)


def test_every_way_to_install_is_the_same() -> None:
    """Make and conda install the same extras under the same pins."""
    assert (
        f'pip install --disable-pip-version-check -c constraints.txt -e ".[{",".join(EXTRAS)}]"'
        in (ROOT / "Makefile").read_text()
    )


def test_every_dependency_is_pinned_within_its_bounds() -> None:
    for wanted in requirements(*EXTRAS):
        name = canonicalize_name(wanted.name)
        assert name in pins(), f"constraints.txt does not pin {wanted.name}"
        assert wanted.specifier.contains(pins()[name]), f"{wanted} is pinned to {pins()[name]}"


def test_pins_hold_no_addresses_and_no_copy_of_ourselves() -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"://|@|\bfile:|^\s*-", text, re.MULTILINE)
    assert "vitregs" not in pins()
    assert len(pins()) == len([line for line in text.splitlines() if line.partition("#")[0].strip()])


@pytest.mark.parametrize("wanted", requirements(*EXTRAS), ids=str)
def test_what_is_installed_fits(wanted: Requirement) -> None:
    assert wanted.specifier.contains(version(wanted.name), prereleases=True)
    assert wanted.specifier, f"{wanted.name} has no bound"


def test_every_import_of_the_library_is_a_dependency() -> None:
    known = {canonicalize_name(r.name) for r in requirements()}
    known |= {
        "jupyter-client",
        "nbclient",
        "huggingface-hub",
    }  # of papermill, timm and datasets, whose errors are named
    names = {"PIL": "pillow", "open_clip": "open-clip-torch", "IPython": "ipykernel", "sklearn": "scikit-learn"}
    used = {n.split(".")[0] for f in LIBRARY.rglob("*.py") for n in imports(f)[0] if n.split(".")[0] != "vitregs"}
    missing = {n for n in used if n not in sys.stdlib_module_names and canonicalize_name(names.get(n, n)) not in known}
    assert missing == set()


def test_the_command_is_installed() -> None:
    (command,) = entry_points(group="console_scripts", name="vitregs")
    assert command.value == PROJECT["project"]["scripts"]["vitregs"] == "vitregs.cli:main"
    assert command.load().__module__ == "vitregs.cli"
    assert version("vitregs") == PROJECT["project"]["version"]
    assert sys.version_info >= (3, 11)
    assert Path(vitregs.__file__).parent == LIBRARY, "the tests run another copy of the library"


# --- rooms


def imports(file: Path) -> tuple[set[str], set[str]]:
    """Modules a file imports: → all of them, and those that are imported with the file itself (not in functions)."""
    tree = ast.parse(file.read_text("utf-8"))
    late = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    every: set[str] = set()
    early: set[str] = set()
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} has a relative import"
            module = node.module or ""
            inside = ROOT / "lib" / module.replace(".", "/")
            names = [f"{module}.{a.name}" if inside.is_dir() else module for a in node.names]
        every.update(names)
        early.update(n for n in names if id(node) not in late)
    return every, early


def room(file: Path) -> str:
    return ".".join(file.relative_to(LIBRARY).with_suffix("").parts)


@cache
def modules() -> dict[str, Path]:
    return {room(f): f for f in sorted(LIBRARY.rglob("*.py")) if f.name != "__init__.py"}


def test_every_module_has_its_room() -> None:
    assert modules().keys() == set(ROOMS)
    for file in LIBRARY.rglob("__init__.py"):  # a package may show what its own rooms hold, and no more
        own = f"vitregs.{file.parent.name}."
        assert not [n for n in imports(file)[0] if n.startswith("vitregs") and not n.startswith(own)]


@pytest.mark.parametrize("name", ROOMS)
def test_imports_go_one_way(name: str) -> None:
    above = ROOMS[: ROOMS.index(name)]
    used = {n.removeprefix("vitregs.") for n in imports(modules()[name])[0] if n.startswith("vitregs.")}
    assert used <= set(above)


def test_the_map_shows_the_rooms_in_order() -> None:
    page = (ROOT / "ARCHITECTURE.md").read_text()
    shown = {}
    for title, part in zip(["", *re.findall(PACKAGE, page)], re.split(PACKAGE.replace("(", "(?:"), page), strict=True):
        rows = re.findall(r"^\| (`[^|]*) \|", part, re.MULTILINE)
        shown[title] = [name.rstrip("/") for row in rows for name in re.findall(r"`([a-z_0-9/]+)`", row)]
    assert shown.pop("") == list(dict.fromkeys(name.split(".")[0] for name in ROOMS))
    inner: dict[str, list[str]] = {}
    for name in ROOMS:
        if "." in name:
            inner.setdefault(name.split(".")[0], []).append(name.split(".")[1])
    assert shown == inner


def test_rooms_without_torch() -> None:
    names = ("problems", "results", "artifacts", "cutoffs", "resize", "published")
    for name in names:
        assert not {n for n in imports(modules()[name])[0] if n.split(".")[0] in ("torch", "timm", "torchvision")}
    code = f"import sys; from vitregs import {', '.join(names)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_command_line_starts_without_torch() -> None:
    assert imports(modules()["cli"])[1] & {n for n in imports(modules()["cli"])[0] if n.startswith("vitregs")} == {
        "vitregs.problems"
    }


def test_one_room_has_hooks() -> None:
    hooked = [n for n, f in modules().items() if re.search(r"register_\w*hook|TorchFunctionMode", f.read_text("utf-8"))]
    assert hooked == ["capture"]


@pytest.mark.parametrize("name", ROOMS)
def test_a_module_says_what_it_is_for(name: str) -> None:
    assert ast.get_docstring(ast.parse(modules()[name].read_text("utf-8")))


# --- the tree


@cache
def tracked() -> list[Path]:
    try:
        words = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        done = subprocess.run(words, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git checkout: the list of its files is not known")
    names = [n for n in done.stdout.decode().split("\0") if n]
    return [ROOT / n for n in names if (ROOT / n).is_file()]


def texts() -> list[tuple[str, str]]:
    found = []
    for file in tracked():
        data = file.read_bytes()
        if b"\0" not in data[:8000]:
            found.append((str(file.relative_to(ROOT)), data.decode("utf-8")))
    return found


def matches(pattern: str) -> list[tuple[str, str]]:
    return [(name, m[0]) for name, text in texts() for m in re.finditer(pattern, text)]


def test_no_package_index_is_named() -> None:
    slash = "/"
    index = rf"https?:{slash}{slash}[^\s\"'<>)]*(?:{'py'}pi\.|{slash}simple\b|{slash}whl{slash}|download\.py{'torch'})"
    assert matches(rf"{index}[^\s\"']*|--(?:extra-)?{'index'}-url|--{'find'}-links|--trusted-{'host'}") == []


def test_no_path_of_one_machine() -> None:
    places = "|".join(("work", "root", "home", "Users", "mnt"))
    assert matches(rf"(?<![\w.~$}}*\])-])/(?:{places})/[\w.-]+") == []


def test_nothing_large_or_foreign_is_tracked() -> None:
    assert [(str(f), f.stat().st_size) for f in tracked() if f.stat().st_size > 20e6] == []
    foreign = (".pt", ".pth", ".pkl", ".pyc", ".parquet", ".ipynb_checkpoints")
    assert [str(f) for f in tracked() if f.suffix in foreign] == []
    assert [str(f) for f in tracked() if f.name.startswith(".") and f.suffix == ".part"] == []


# --- hooks


def hooks() -> dict[str, dict]:
    made = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [r["repo"] for r in made["repos"]] == ["local"]
    return {h["id"]: h for h in made["repos"][0]["hooks"]}


def test_hooks_run_what_is_installed() -> None:
    found = hooks()
    assert {h["language"] for h in found.values()} == {"system"}
    assert {h["entry"].split()[0] for h in found.values()} == {"ruff", "mypy", "nbstripout"}
    assert found["ruff-check"]["entry"].startswith("ruff check")
    assert "--check" in found["ruff-format"]["entry"]
    listed = {canonicalize_name(r.name) for r in requirements("test")}
    assert {"ruff", "mypy", "nbstripout", "pre-commit"} <= listed


def test_the_notebook_hook_sees_traces_of_a_run(tmp_path: Path) -> None:
    entry = shlex.split(hooks()["notebook-metadata"]["entry"])
    code = "import sys; from nbstripout import main; sys.argv[0] = 'nbstripout'; sys.exit(main())"

    def verdict(book: nbformat.NotebookNode) -> int:
        file = tmp_path / "a.ipynb"
        nbformat.write(book, file)
        before = file.read_bytes()
        done = subprocess.run([sys.executable, "-c", code, *entry[1:], str(file)], capture_output=True, check=False)
        assert file.read_bytes() == before
        return done.returncode

    cell = nbformat.v4.new_code_cell("1", id="a-1", execution_count=1)
    cell.outputs = [nbformat.v4.new_output("execute_result", {"text/plain": "1"}, execution_count=1)]
    book = nbformat.v4.new_notebook(cells=[cell])
    assert verdict(book) == 0
    book.cells[0].metadata["papermill"] = {"duration": 1.0}
    assert verdict(book) == 1
    assert verdict(nbformat.from_dict(json.loads(chapters.tidy(nbformat.writes(book))))) == 0
