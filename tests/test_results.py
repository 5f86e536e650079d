"""Results: measured once, kept whole or not at all, and labelled so that nobody needs an integer offset."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from vitregs import arrays, cache, paths
from vitregs.errors import InputError, unknown

KEY = {"model": "pico", "images": 4}


def dataset(value: float = 1.5) -> xr.Dataset:
    kinds = ["cls", "register"] + ["patch"] * 6
    norms = np.full((2, 8), value, np.float32)
    norms[0, 0] = np.nan
    return xr.Dataset(
        {
            "norm": (("image", "token"), norms),
            "count": ("image", np.arange(2)),
            "seen": ("image", [True, False]),
            "single": 3.25,
        },
        coords={"image": ["a", "b"], **arrays.token_coords(kinds, (2, 3))},
        attrs={"note": "of a test", "share": 0.5},
    )


class Counter:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> xr.Dataset:
        self.calls += 1
        return dataset(self.calls)


def problem(call, *args: object, **kw: object) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **kw)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- labels


def test_token_coords() -> None:
    coords = arrays.token_coords(["cls", "distillation", "register", "register", *["patch"] * 6], (2, 3))
    assert {d for d, _ in coords.values()} == {"token"}
    get = {k: list(v) for k, (_, v) in coords.items()}
    assert get["kind"] == ["cls", "distillation"] + ["register"] * 2 + ["patch"] * 6
    assert get["label"] == ["cls", "dist", "reg0", "reg1", "0,0", "0,1", "0,2", "1,0", "1,1", "1,2"]
    assert get["y"] == [-1] * 4 + [0, 0, 0, 1, 1, 1]
    assert get["x"] == [-1] * 4 + [0, 1, 2, 0, 1, 2]
    assert arrays.token_coords(["patch"], (1, 1), "query")["kind"][0] == "query"


def test_token_coords_that_do_not_fit() -> None:
    assert "5 patch tokens do not fill a grid of 2x3" in problem(arrays.token_coords, ["patch"] * 5, (2, 3))
    assert "0 patch tokens do not fill a grid of 1x1" in problem(arrays.token_coords, [], (1, 1))
    assert "did you mean 'register'" in problem(arrays.token_coords, ["registers", "patch"], (1, 1))
    many = arrays.token_coords(["cls"] * 4 + ["patch"], (1, 1))
    assert len(set(many["label"][1])) == 5


@given(rows=st.integers(1, 5), columns=st.integers(1, 5), prefix=st.integers(0, 3), lead=st.integers(1, 3))
def test_grid_round_trip(rows: int, columns: int, prefix: int, lead: int) -> None:
    kinds = ["cls"] * min(prefix, 1) + ["register"] * max(0, prefix - 1) + ["patch"] * (rows * columns)
    values = np.random.default_rng(0).random((lead, len(kinds), 2))
    array = xr.DataArray(
        values,
        dims=("image", "token", "channel"),
        coords={"image": np.arange(lead) + 7, "model": "m", **arrays.token_coords(kinds, (rows, columns))},
        attrs={"unit": "none"},
        name="state",
    )
    maps = arrays.patch_maps(array)
    assert maps.dims == ("image", "channel", "y", "x")
    assert maps.attrs == array.attrs
    assert maps.name == "state"
    assert maps["image"].values.tolist() == array["image"].values.tolist()
    assert maps["model"].item() == "m"
    back = maps.stack(token=("y", "x")).transpose("image", "token", "channel").values
    assert np.array_equal(back, values[:, prefix:])
    for y in range(rows):
        for x in range(columns):
            here = array.isel(token=int(np.flatnonzero(array["label"] == f"{y},{x}")[0]))
            assert np.array_equal(maps.isel(y=y, x=x), here)


def test_grid_of_what_is_none() -> None:
    norms = dataset()["norm"]
    assert "0 patch tokens do not fill" in problem(arrays.patch_maps, norms.isel(token=[0, 1]))
    assert "5 patch tokens do not fill a grid of 2x3" in problem(arrays.patch_maps, norms.isel(token=[2, 3, 4, 5, 7]))
    assert "row after row" in problem(arrays.patch_maps, norms.isel(token=[3, 2, 4, 5, 6, 7]))


# --- memory


def test_measured_once(tmp_path: Path) -> None:
    count, file = Counter(), tmp_path / "deep" / "er" / "r.nc"
    first = cache.stored(file, count, key=KEY)
    second = cache.stored(file, count, key=KEY)
    assert count.calls == 1
    xr.testing.assert_identical(first, second)
    assert {k: v.dtype.kind for k, v in second.variables.items()} == {
        k: v.dtype.kind for k, v in first.variables.items()
    }
    assert np.isnan(second["norm"].values[0, 0])
    assert second["label"].values[2] == "0,0"
    cache.stored(file, count, key=dict(reversed(KEY.items())))
    assert count.calls == 1  # the order of the key says nothing


def test_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, file = Counter(), tmp_path / "r.nc"
    cache.stored(file, count, key=KEY)
    assert float(cache.stored(file, count, key={**KEY, "images": 5})["norm"].max()) == 2
    assert float(cache.stored(file, count, key={**KEY, "images": 5})["norm"].max()) == 2
    assert float(cache.stored(file, count, key=KEY)["norm"].max()) == 3
    assert float(cache.stored(file, count, key=KEY, refresh=True)["norm"].max()) == 4
    assert float(cache.stored(file, count, key=KEY, code="of other code")["norm"].max()) == 5
    assert cache.stored(file, count, key=KEY, code="of other code").attrs["code"] == "of other code"
    assert count.calls == 5
    monkeypatch.setattr(cache, "code_hash", lambda: "of other code")
    assert float(cache.stored(file, count, key=KEY)["norm"].max()) == 5  # unless told, all of the library counts


@pytest.mark.parametrize("damage", ["empty", "words", "cut", "flipped", "other netCDF"])
def test_a_broken_file_is_measured_anew(tmp_path: Path, damage: str) -> None:
    count, file = Counter(), tmp_path / "r.nc"
    cache.stored(file, count, key=KEY)
    whole = file.read_bytes()
    file.write_bytes({"empty": b"", "words": b"not netCDF\n" * 99, "cut": whole[: len(whole) // 2]}.get(damage, whole))
    if damage == "flipped":
        file.write_bytes(bytes(b ^ 255 for b in whole))
    if damage == "other netCDF":
        cache.save_dataset(xr.Dataset({"a": 1}), file)
    else:
        assert "cannot read results" in problem(cache.load_dataset, file)
    assert float(cache.stored(file, count, key=KEY)["norm"].max()) == 2
    assert float(cache.stored(file, count, key=KEY)["norm"].max()) == 2


def test_provenance(tmp_path: Path) -> None:
    kept = cache.stored(tmp_path / "r.nc", Counter(), key={**KEY, "weights": Path("w"), "size": (3, 4)})
    attrs = cache.load_dataset(tmp_path / "r.nc").attrs
    assert attrs == kept.attrs
    for name in ("code", "commit", "date", "python", "torch", "timm", "machine"):
        assert attrs[name]
    assert attrs["code"] == cache.code_hash()
    assert json.loads(attrs["key"])["size"] == [3, 4]
    assert attrs["note"] == "of a test"
    more = cache.provenance(n=3, device="cpu", pair=(1, 2))
    assert (more["n"], more["device"], more["pair"]) == ("3", "cpu", "[1, 2]")


def test_provenance_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_args: object, **_kw: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", gone)
    cache._commit.cache_clear()
    try:
        assert cache.provenance()["commit"] == "unknown"
    finally:
        cache._commit.cache_clear()


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert cache.file_hash(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert len(cache.code_hash()) == 12


def copy_of_the_library(folder: Path) -> Path:
    package = folder / "vitregs"
    for file in Path(cache.__file__).parent.rglob("*.py"):
        target = package / file.relative_to(Path(cache.__file__).parent)
        target.parent.mkdir(exist_ok=True, parents=True)
        target.write_bytes(file.read_bytes())
    return package


def hashes_of(folder: Path, *names: str) -> dict[str, str]:
    """Hashes of modules as a program finds them whose library is that folder; "" stands for all of the library."""
    code = (
        "import sys; from vitregs import cache as r; print(r.__file__, *(r.code_hash(n or None) for n in sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, *names]
    env = {**os.environ, "PYTHONPATH": str(folder)}
    where, *found = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.split()
    assert Path(where).is_relative_to(folder)
    return dict(zip(names, found, strict=True))


PARTS = ("vitregs.models.capture", "vitregs.probes.local", "vitregs.measure.lost", "vitregs.report.norms", "")


@pytest.mark.parametrize(
    ("file", "old", "new", "changed"),
    [
        ("report/norms.py", "", "COLOUR = 'teal'", {"vitregs.report.norms", ""}),
        ("report/training.py", "", "WIDTH = 3", {""}),
        ("probes/local.py", "", "MORE = 1", {"vitregs.probes.local", ""}),
        (
            "measure/mixture.py",
            "LEAST_GAIN = 12.0",
            "LEAST_GAIN = 13.0",
            {"vitregs.probes.local", "vitregs.measure.lost", "vitregs.report.norms", ""},
        ),
        ("data/shapes.py", "", "MORE = 1", set(PARTS)),  # far away
        ("data/shapes.py", "", "# a remark", set()),
        ("models/capture.py", '"""', '"""Reworded. ', set()),
    ],
)
def test_code_hash_follows_what_measures(tmp_path: Path, file: str, old: str, new: str, changed: set[str]) -> None:
    """A copy of the library elsewhere has the same hashes; a change is seen where it is imported, and nowhere else."""
    package = copy_of_the_library(tmp_path)
    first = {name: cache.code_hash(name or None) for name in PARTS}
    text = (package / file).read_text()
    assert old in text
    (package / file).write_text(text.replace(old, new, 1) if old else f"{text}\n{new}\n")
    second = hashes_of(tmp_path, *PARTS)
    assert {name for name in PARTS if first[name] != second[name]} == changed


def test_code_hash_follows_imports_of_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "__init__.py": "from house.loud import shout",  # runs on the way to any part, and is no part of it
        "a.py": "from house import b\nfrom house.c import x\nimport house.d\n"
        "def f():\n    from .e import y\n    import house.g as g",
        "b.py": "from . import rooms",
        "c.py": "x = 1",
        "d.py": "import house.a",  # in a circle
        "e.py": "from .rooms.inner import z",
        "g.py": "import json, numpy",
        "loud.py": "shout = 1",
        "rooms/__init__.py": "from house.rooms.other import v",
        "rooms/inner.py": "z = 1",
        "rooms/other.py": "v = 1",
        "h.py": "from house import shout",
    }
    for name, text in files.items():
        (tmp_path / "house" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "house" / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))

    def ask(module: str) -> str:
        for cached in (cache.code_hash, cache._file_of, cache.source_hash):
            cached.cache_clear()
        return cache.code_hash(module)

    first = {m: ask(m) for m in ("house.a", "house.h", "house.c")}
    moved = {}
    for name, text in files.items():
        (tmp_path / "house" / name).write_text(text + "\nnew = 2\n")
        moved[name] = {m for m in first if ask(m) != first[m]}
        (tmp_path / "house" / name).write_text(text)
    everything = {"b.py", "d.py", "e.py", "g.py", "rooms/__init__.py", "rooms/inner.py", "rooms/other.py", "a.py"}
    assert {n for n, m in moved.items() if "house.a" in m} == everything | {"c.py"}
    assert {n for n, m in moved.items() if "house.h" in m} == {"h.py", "__init__.py", "loud.py"}
    assert {n for n, m in moved.items() if "house.c" in m} == {"c.py"}
    assert "module house.none has no source" in problem(ask, "house.none")
    assert "has no source" in problem(ask, "math")


ONE = '''
"""Says what it does."""
import a
class C(B, metaclass=M):
    "and again"
    x: int = 1
    def f(self, a, /, b=1, *c, d, e=2, **g) -> None:
        """one"""
        return f"{a=} {b!r:>{e}}{{}} é{d:%Y}{g:}" "tail" + 'x' if not c else None
async def h():
    async with a as b, c: yield [i async for i in b if i]
    match b:
        case {"k": [1, *_]} | None: return
try: 1j, b"x", ...
except* E: raise
'''
OTHER = '''# a remark
import a


class C(B,
        metaclass=M):
    x: int = 1  # how many

    def f(self, a, /, b=1, *c, d, e=2, **g) -> None:
        return (
            f"{a=} {b!r:>{e}}{{}} é{d:%Y}{g:}tail" + "x" if not c else None)


async def h():
    """other"""
    async with a as b, c:
        yield [i async for i in b if i]
    match b:
        case {'k': [1, *_]} | None:
            return
try:
    1j, b'x', ...
except* E:
    raise
'''


def test_source_hash_is_of_what_the_code_does() -> None:
    """The number is pinned: every version of Python must find it, or results stored on one are measured anew on another."""
    assert cache.source_hash(ONE) == cache.source_hash(OTHER)
    assert cache.source_hash(ONE)[:12] == "5c487a18b0e1"
    others = [ONE.replace(*p) for p in (("b=1", "b=2"), ("é", "e"), ("tail", "tale"), ("None:", "0:"), ("/, ", ""))]
    assert len({cache.source_hash(text) for text in [ONE, *others]}) == 6
    for a, b in (("f(x=None)", "f(x=False)"), ("x = 1", "x = 1.0"), ("x = '1'", "x = 1"), ("a\nb", "b\na")):
        assert cache.source_hash(a) != cache.source_hash(b)


# --- what the repository holds


@pytest.mark.parametrize("folder", sorted(p.name for p in (paths.ROOT / "data" / "results").iterdir() if p.is_dir()))
def test_stored_results_come_from_a_committed_state(folder: str) -> None:
    """Each names a commit without further changes, which is one of this history: make notebooks."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", "-C", str(paths.ROOT), *words], capture_output=True, text=True, check=False)

    files = sorted((paths.ROOT / "data" / "results" / folder).rglob("*.nc"))
    assert files
    commits = {p.relative_to(paths.ROOT).as_posix(): cache.load_dataset(p).attrs["commit"] for p in files}
    assert {n: c for n, c in commits.items() if not re.fullmatch("[0-9a-f]{12}", c)} == {}
    if git("rev-parse", "--is-shallow-repository").stdout.strip() == "false":  # else the history is not all here
        known = {c for c in set(commits.values()) if git("merge-base", "--is-ancestor", c, "HEAD").returncode == 0}
        assert {n: c for n, c in commits.items() if c not in known} == {}


@pytest.mark.parametrize("change", ["lib/vitregs/new.py", "data/zoo/x", "data/paper/claims.csv", "notebooks/a.ipynb"])
def test_a_changed_tree_is_reported(tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What measures counts; notebooks are written one after the other while their results are stored."""

    def git(*words: str) -> None:
        names = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *names, *words], cwd=tmp_path, check=True, capture_output=True)

    def printed() -> str:
        cache._commit.cache_clear()
        return cache.provenance()["commit"]

    for folder in ("lib/vitregs", "data/zoo", "data/paper", "notebooks"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "kept").write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    try:
        assert re.fullmatch("[0-9a-f]{12}", printed())
        (tmp_path / change).write_text("2")
        assert printed().endswith("+changes") != change.startswith("notebooks")
    finally:
        cache._commit.cache_clear()


def test_make_notebooks_asks_for_a_committed_state(tmp_path: Path) -> None:
    """The rule of the Makefile stops before the first chapter, in one line that names what differs."""
    (tmp_path / "Makefile").write_text((paths.ROOT / "Makefile").read_text())
    for folder in ("book", "lib/vitregs", "notebooks", "data/paper", "data/zoo", ".venv"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "book" / "lock.py").write_text((paths.ROOT / "book" / "lock.py").read_text())
    for name in ("pyproject.toml", "constraints.txt", "notebooks/01_a.ipynb"):
        (tmp_path / name).write_text("")
    (tmp_path / ".venv" / "ready").write_text("")

    def make() -> tuple[int, list[str]]:
        command = ["make", "--no-print-directory", "notebooks"]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "GIT_"))}
        environment["GIT_CEILING_DIRECTORIES"] = str(tmp_path.parent)
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout.splitlines()

    status, message = make()
    assert status != 0
    assert message == ["make notebooks needs the git repository of the book"]
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    status, message = make()
    assert status != 0
    assert message == [
        "Commit or stash first: stored results must come from a committed state, and these differ: ?? notebooks/"
    ]
    subprocess.run(["git", "add", "notebooks"], cwd=tmp_path, check=True)
    names = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *names, "commit", "-q", "-m", "first"], cwd=tmp_path, check=True)
    assert "Refreshing 01_a" in make()[1]  # and fails there, as there is no program


# --- whole or not at all


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def full(*_args: object, **_kw: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", ["write_bytes", "chmod", "replace", "mkstemp"])
def test_a_full_disk_keeps_the_old_file(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    count, file = Counter(), tmp_path / "r.nc"
    cache.stored(file, count, key=KEY)
    before = file.read_bytes()
    with monkeypatch.context() as patch:
        owner = {"replace": cache.os, "mkstemp": cache.tempfile}.get(place, Path)
        patch.setattr(owner, place, full)
        message = problem(cache.stored, file, count, key=KEY, refresh=True)
    assert "No space left on device" in message
    assert "r.nc" in message
    assert count.calls == 2
    assert file.read_bytes() == before
    assert leftovers(tmp_path) == ["r.nc"]
    assert float(cache.stored(file, count, key=KEY)["norm"].max()) == 1


def test_half_a_file_never_shows(tmp_path: Path) -> None:
    file = tmp_path / "r.txt"

    def write(spare: Path) -> None:
        assert spare != file
        assert spare.parent == tmp_path
        spare.write_text("half")
        assert not file.exists()
        full()

    assert "No space left" in problem(cache.write_whole, file, write)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    (tmp_path / "r.txt").write_text("old")

    def write(spare: Path) -> None:
        spare.write_text("half")
        raise error

    with pytest.raises(error):
        cache.write_whole(tmp_path / "r.txt", write)
    assert (tmp_path / "r.txt").read_text() == "old"
    assert leftovers(tmp_path) == ["r.txt"]


def test_a_failed_measurement_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> xr.Dataset:
        raise InputError("it cannot be measured")

    assert "it cannot be measured" in problem(cache.stored, tmp_path / "r.nc", fail, key=KEY)
    assert leftovers(tmp_path) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_args: object, **_kw: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:  # root may write anywhere, so that a read-only folder proves nothing
        patch.setattr(cache.tempfile, "mkstemp", deny)
        assert "Permission denied" in problem(cache.save_dataset, dataset(), tmp_path / "r.nc")
    (tmp_path / "file").write_text("in the way")
    assert "cannot write" in problem(cache.save_dataset, dataset(), tmp_path / "file" / "r.nc")
    (tmp_path / "folder.nc").mkdir()
    assert "cannot write" in problem(cache.save_dataset, dataset(), tmp_path / "folder.nc")
    assert leftovers(tmp_path) == ["file", "folder.nc"]


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file size are POSIX")
@pytest.mark.parametrize("writer", ["netCDF", "torch", "safetensors"])
def test_real_writers_on_a_disk_that_fills(tmp_path: Path, writer: str) -> None:
    """The operating system refuses what goes beyond 20 kB, as a full disk does."""
    code = """
import resource, sys
from pathlib import Path
import numpy as np, torch, xarray as xr
from safetensors.torch import save_file
from vitregs import cache
from vitregs.errors import InputError
file, writer = Path(sys.argv[1]), sys.argv[2]
noise = torch.rand(100_000)
def write():
    if writer == "netCDF":
        cache.save_dataset(xr.Dataset({"a": ("x", noise.numpy())}), file)
    elif writer == "torch":
        cache.write_whole(file, lambda spare: torch.save({"a": noise}, spare))
    else:
        cache.write_whole(file, lambda spare: save_file({"a": noise}, spare))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    write()
except InputError as error:
    print("InputError:", error)
"""
    file = tmp_path / "r"
    file.write_text("old")
    command = [sys.executable, "-W", "ignore", "-c", code, str(file), writer]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("InputError: cannot write"), done.stderr[-2000:]
    assert done.stdout.count("\n") == 1
    assert file.read_text() == "old"
    assert leftovers(tmp_path) == ["r"]


def test_the_new_file_can_be_read_by_all(tmp_path: Path) -> None:
    cache.write_whole(tmp_path / "r.txt", lambda spare: spare.write_text("new"))
    assert (tmp_path / "r.txt").read_text() == "new"
    assert (tmp_path / "r.txt").stat().st_mode & 0o777 == 0o644


def test_missing_file(tmp_path: Path) -> None:
    assert "cannot read results" in problem(cache.load_dataset, tmp_path / "gone.nc")


# --- problems


def test_a_problem_is_one_line() -> None:
    assert str(InputError("first\n  second\tthird")) == "first second third"
    assert isinstance(InputError("x"), ValueError)


def test_unknown_names() -> None:
    assert str(unknown("fruit", "aple", ["pear", "apple"])) == "unknown fruit 'aple': did you mean 'apple'?"
    assert str(unknown("fruit", 3, ["pear", "apple"])) == "unknown fruit '3': choose from apple, pear"
    assert str(unknown("n", "?", map(str, range(30)))).endswith(", …")
