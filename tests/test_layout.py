"""The layout: packages by subject, imports one way, and a map in ARCHITECTURE.md that is true."""

import ast
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

from vitregs import paths

LIBRARY = Path(paths.__file__).parent
MAP = paths.ROOT / "ARCHITECTURE.md"
# From the bottom up. A module may import from its own package and from those before it.
ORDER = (
    ("errors", "paths"),
    ("hub", "arrays"),
    ("cache",),
    ("data",),
    ("models",),
    ("measure",),
    ("probes",),
    ("train",),
    ("claims",),
    ("report",),
    ("book",),
    ("plot",),
    ("cli", ""),
)
RANK = {name: i for i, names in enumerate(ORDER) for name in names}
# A package that only a few others may import, whatever their rank: claims are judged from arrays, never from tables
NEVER = {("claims", "report"), ("measure", "train"), ("report", "train.loop")}


@lru_cache
def imports(file: Path) -> frozenset[str]:
    """Modules of the library that a file imports, anywhere in it: → dotted names below vitregs, "" for the package itself."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] == "vitregs"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} has a relative import"
            if (node.module or "").split(".")[0] == "vitregs":
                inside = LIBRARY.parent / (node.module or "").replace(".", "/")
                for alias in node.names:
                    part = inside / alias.name
                    is_module = part.is_dir() or part.with_suffix(".py").is_file()
                    found.add(f"{node.module}.{alias.name}" if is_module else str(node.module))
    return frozenset(name.removeprefix("vitregs").lstrip(".") for name in found)


def dotted(file: Path) -> str:
    return ".".join(file.relative_to(LIBRARY).with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = {dotted(f): f for f in sorted(LIBRARY.rglob("*.py"))}


def package(name: str) -> str:
    return name.split(".")[0]


def test_every_package_has_its_place() -> None:
    assert {package(n) for n in MODULES} <= RANK.keys()


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name: str) -> None:
    mine = package(name)
    for used in imports(MODULES[name]):
        theirs = package(used)
        assert theirs == mine or RANK[theirs] < RANK[mine], f"{name} imports {used}"
        assert not any(mine == a and (used == b or used.startswith(f"{b}.")) for a, b in NEVER), (
            f"{name} imports {used}"
        )


def test_no_two_modules_import_each_other() -> None:
    edges = {name: {u for u in imports(file) if u in MODULES and u != name} for name, file in MODULES.items()}

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            for used in edges[todo.pop()] - seen:
                seen.add(used)
                todo.append(used)
        return seen

    # a package's __init__ shows what its modules hold, so it is passed over as a stop on the way
    plain = [n for n in MODULES if MODULES[n].name != "__init__.py"]
    edges = {n: {u for u in edges[n] if u in plain} for n in plain}
    assert [n for n in plain if n in reach(n)] == []


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_is_for(name: str) -> None:
    text = ast.get_docstring(ast.parse(MODULES[name].read_text("utf-8")))
    assert text, f"{name} has no docstring"
    assert text.splitlines()[0].endswith((".", ":", "?")), f"{name}: the first line is a sentence"


def test_no_family_of_modules_shares_a_prefix() -> None:
    """Tables and figures of a subject stand in one module, not in tables_x and draw_x."""
    names = [n.rsplit(".", 1)[-1] for n in MODULES]
    assert [n for n in names if re.match(r"(tables|draw|utils?|helpers?|misc|common)(_|$)", n)] == []


def test_the_map_is_complete() -> None:
    """Each module stands in ARCHITECTURE.md once, and nothing stands there that does not exist."""
    tree = re.search(r"```text\n(.*?)```", MAP.read_text("utf-8"), re.DOTALL)
    assert tree
    shown: list[str] = []
    folders: list[tuple[int, str]] = []
    for line in tree[1].splitlines():
        found = re.match(r"^( *)([a-z_0-9]+)(/|\.py)(?=\s|$)", line)
        if not found:
            continue
        indent = len(found[1])
        folders = [(i, n) for i, n in folders if i < indent]
        path = ".".join([*(n for _, n in folders), found[2]])
        if found[3] == "/":
            folders.append((indent, found[2]))
        else:
            shown.append(path)
    assert len(shown) == len(set(shown))
    assert set(shown) == {n for n, f in MODULES.items() if f.name != "__init__.py"}


def test_where_to_add_names_files_that_exist() -> None:
    page = MAP.read_text("utf-8")
    part = page[page.index("## Where do I add") : page.index("## The tree")]
    rows = [r for r in re.findall(r"^\| (.*) \|$", part, re.MULTILINE) if "---" not in r][1:]
    assert len(rows) >= 6
    for row in rows:
        thing, files = (cell.strip() for cell in row.split(" | ")[:2])
        named = re.findall(r"`([^`]+)`", files)
        assert 1 <= len(named) <= 3, f"{thing}: {named}"
        for name in named:
            fixed = re.split(r"[A-Z]{2,}", name)[0]  # SUBJECT, NAME: to be filled in
            assert (paths.ROOT / fixed).exists() or (paths.ROOT / fixed).parent.is_dir(), name


def test_one_module_watches_and_one_changes() -> None:
    """`capture` looks at networks of others; `test_time` changes copies of its own; `precision` is about steps of training."""
    hooked = [n for n, f in MODULES.items() if re.search(r"register_\w*hook|TorchFunctionMode", f.read_text("utf-8"))]
    assert sorted(hooked) == ["models.capture", "models.test_time", "train.precision"]


def test_arrays_and_tables_do_without_torch() -> None:
    names = ("errors", "paths", "arrays", "cache", "data.published", "measure.outliers", "measure.mixture")
    code = f"import sys, importlib\nfor n in {names}: importlib.import_module('vitregs.' + n)\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
