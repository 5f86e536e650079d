"""Packaging: one list of dependencies, pinned once; a wheel that works anywhere; nothing of one machine in the tree."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points, version
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import vitregs
from vitregs import cli, errors, paths
from vitregs.book import execute, parameters
from vitregs.claims import ledger, scoreboard

ROOT = paths.ROOT
LIBRARY = ROOT / "lib" / "vitregs"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TRAINING = ("vitregs.train", "vitregs.book.demos")  # modules that may need the packages of the extra `train`
EXTRAS = ("book", "train", "hub", "test")


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


def imported(file: Path) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(file.read_text("utf-8"))))
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    return names | {str(n.module) for n in nodes if isinstance(n, ast.ImportFrom)}


def test_every_import_of_the_library_is_a_dependency() -> None:
    known = {canonicalize_name(r.name) for r in requirements("book", "train", "hub")}
    known |= {"jupyter-client", "nbclient"}  # of papermill, whose errors are named
    names = {"PIL": "pillow", "open_clip": "open-clip-torch", "IPython": "ipykernel", "sklearn": "scikit-learn"}
    used = {n.split(".")[0] for f in LIBRARY.rglob("*.py") for n in imported(f)} - {"vitregs"}
    missing = {n for n in used if n not in sys.stdlib_module_names and canonicalize_name(names.get(n, n)) not in known}
    assert missing == set()


def test_the_command_is_installed() -> None:
    (command,) = entry_points(group="console_scripts", name="vitregs")
    assert command.value == PROJECT["project"]["scripts"]["vitregs"] == "vitregs.cli:main"
    assert command.load().__module__ == "vitregs.cli"
    assert version("vitregs") == PROJECT["project"]["version"]
    assert sys.version_info >= (3, 11)
    assert Path(vitregs.__file__).parent == LIBRARY, "the tests run another copy of the library"


# --- what the library needs, and what it says where something is missing


def test_errors_name_the_extras_of_the_package() -> None:
    listed = PROJECT["project"]["optional-dependencies"]
    assert set(errors.EXTRAS) == set(EXTRAS) - {"test"}
    brought = {"jupyter-client", "nbclient", "ipython"}  # by papermill and ipykernel
    for name, packages in errors.EXTRAS.items():
        names = {canonicalize_name({"open_clip": "open_clip_torch"}.get(p, p)) for p in packages}
        assert names - brought <= {canonicalize_name(Requirement(line).name) for line in listed[name]}


ALONE = """
import importlib, json, pkgutil, sys
blocked = sys.argv[1].split(",")
sys.modules.update(dict.fromkeys(blocked))  # as if they were not installed
import vitregs
said = {}
for found in pkgutil.walk_packages(vitregs.__path__, "vitregs."):
    try:
        importlib.import_module(found.name)
    except ValueError as error:
        said[found.name] = f"{type(error).__name__}: {error}"
from vitregs import cli
for words in (["train", "mae-pico"], ["run", "2", "--count", "2"], ["diagnose", "mae-pico", "--images", sys.argv[2]]):
    said[words[0]] = cli.main(words)
print(json.dumps([said, [n for n in blocked if sys.modules[n]]]))
"""


def test_the_core_imports_without_extras(tmp_path: Path) -> None:
    """With the packages of all extras hidden: every module but those that train; commands name the extra in one line."""
    brought = [p for packages in errors.EXTRAS.values() for p in packages]
    hidden = [*brought, "nbformat", "jupyter_book"]
    (tmp_path / "a.parquet").touch()
    command = [sys.executable, "-c", ALONE, ",".join(hidden), "a.parquet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    predicted, loaded = json.loads(done.stdout.splitlines()[-1])
    assert loaded == []
    codes = [predicted.pop(name) for name in ("train", "run", "diagnose")]
    assert codes == [2, 2, 2]
    assert predicted
    assert set(predicted.values()) == {"InputError: training needs more packages: pip install 'vitregs[train]'"}
    assert not [name for name in predicted if not name.startswith(TRAINING)], (
        "a module outside training needs its packages"
    )
    assert done.stderr.splitlines() == [
        "vitregs: training needs more packages: pip install 'vitregs[train]'",
        "vitregs: running a chapter needs more packages: pip install 'vitregs[book]'",
        "vitregs: reading parquet files and hub data sets needs more packages: pip install 'vitregs[hub]'",
    ]


# --- the wheel


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder into which the wheel of this checkout was installed, without network: → the folder."""
    where = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(where), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, cwd=where)
    (wheel,) = where.glob("vitregs-*.whl")
    place = [*pip, "install", "--no-deps", "--no-index", "--target", str(where / "site"), str(wheel)]
    subprocess.run(place, check=True, capture_output=True, cwd=where)
    wheel.unlink()
    yield where / "site"
    shutil.rmtree(where)  # 170 MB


def outside(installed: Path, cwd: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run code with the installed wheel, away from the checkout."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    environment.pop("VITREGS_RESULTS", None)
    start = f"import vitregs; assert vitregs.__file__.startswith({str(installed)!r}), vitregs.__file__\n"
    command = [sys.executable, "-P", "-c", start + code]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)


def test_a_wheel_works_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    code = """
import vitregs as vr
from vitregs import cache, paths
from vitregs.book import parameters
from vitregs.claims import ledger
from vitregs.cli import main
net = vr.load("supervised-pico", device="cpu")
print(net.source, len(ledger.ledger()), parameters.names(), cache.provenance()["commit"], paths.BUILD, sep="|")
assert [main(["models", "mae"]), main(["scoreboard"]), main(["--version"]), main(["run", "2", "--help"])] == [0] * 4
"""
    done = outside(installed, tmp_path, code)
    assert (done.returncode, done.stderr) == (0, "")
    first = done.stdout.splitlines()[0].split("|")
    assert first == ["zoo, supervised", str(len(ledger.ledger())), str(parameters.names()), "unknown", "build"]
    assert "  mae-pico-reg4\n" in done.stdout
    assert scoreboard.listing(scoreboard.table(ledger.RESULTS)) in done.stdout
    assert (installed / "vitregs" / "py.typed").is_file()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.nightly
def test_a_wheel_runs_its_chapters(installed: Path, tmp_path: Path) -> None:
    done = outside(installed, tmp_path, "from vitregs.cli import main; assert main(['run', '2', '--count', '4']) == 0")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "build/runs/02_norms.ipynb\n"
    found = nbformat.read(tmp_path / "build" / "runs" / "02_norms.ipynb", as_version=4)
    assert "count = 4" in "".join(c.source for c in found.cells)
    assert list((tmp_path / "build" / "results" / "02_norms").glob("*.nc"))


# --- what the project says of itself


def test_versions_of_python_agree() -> None:
    project = PROJECT["project"]
    named = [c.rpartition(" ")[2] for c in project["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert named == sorted(named, key=lambda v: int(v.split(".")[1]))
    assert project["requires-python"] == f">={named[0]}"
    matrix = workflows()["test"]["jobs"]["test"]["strategy"]["matrix"]
    assert matrix == {"os": ["ubuntu-latest", "macos-latest"], "python": named}
    others = [s["with"]["python-version"] for s in steps() if "python-version" in s.get("with", {})]
    assert {v for v in others if not v.startswith("$")} <= set(named)
    assert PROJECT["tool"]["mypy"]["python_version"] == named[0]


def workflows() -> dict[str, dict]:
    return {f.stem: yaml.safe_load(f.read_text()) for f in (ROOT / ".github" / "workflows").glob("*.yml")}


def steps() -> list[dict]:
    return [step for flow in workflows().values() for job in flow["jobs"].values() for step in job["steps"]]


def test_workflows_and_guide_use_what_is_there() -> None:
    assert workflows().keys() == {"test", "nightly"}
    assert all(True in flow for flow in workflows().values())  # YAML reads the key `on` as true
    assert all(("run" in s) != ("uses" in s) for s in steps())
    there = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    guide = [*(ROOT / n for n in ("CONTRIBUTING.md", ".github/pull_request_template.md"))]
    texts_ = [s.get("run", "") for s in steps()] + [f.read_text() for f in guide]
    named = {n for text in texts_ for n in re.findall(r"\bmake ([a-z]+)", text)}
    assert {"test", "book", "notebooks"} <= named <= there
    message = [
        c for text in texts_ for c in re.findall(r"\bvitregs ([a-z]+)", text.replace("clone ADDRESS vitregs", ""))
    ]
    assert message
    assert set(message) <= set(cli.COMMANDS)


@pytest.mark.parametrize("form", ["bug", "my_vit", "chapter"])
def test_issue_forms(form: str) -> None:
    made = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{form}.yml").read_text())
    assert {"name", "description", "body"} <= made.keys()
    fields = [f for f in made["body"] if f["type"] != "markdown"]
    assert len({f["id"] for f in fields}) == len(fields) > 0
    assert all(f["type"] in ("input", "textarea", "dropdown") and f["attributes"]["label"] for f in fields)


def test_citation_and_changelog_name_this_version() -> None:
    made = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = PROJECT["project"]
    assert {"cff-version", "message", "title", "authors"} <= made.keys()
    assert made["cff-version"] == "1.2.0"
    assert (made["version"], made["license"]) == (project["version"], project["license"])
    assert [a["name"] for a in made["authors"]] == [a["name"] for a in project["authors"]]
    (paper,) = made["references"]
    assert [a["family-names"] for a in paper["authors"]] == ["Darcet", "Oquab", "Mairal", "Bojanowski"]
    assert paper["url"].endswith("2309.16588")
    heads = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heads[0] == ("Unreleased", "")
    assert heads[1] == (made["version"], made["date-released"])


# --- the tree


@cache
def tracked() -> list[Path]:
    try:
        message = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        done = subprocess.run(message, capture_output=True, check=True)
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
    assert sum(f.stat().st_size for f in tracked()) < 70e6  # half of it is the zoo, in half precision
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
    assert verdict(nbformat.from_dict(json.loads(execute.tidy(nbformat.writes(book))))) == 0
