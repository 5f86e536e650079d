"""Measured once: arrays kept with what they depend on and where they come from, written whole or not at all."""

import ast
import hashlib
import importlib.util
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import xarray as xr
from safetensors import SafetensorError

from vitregs import paths
from vitregs.errors import Damaged, InputError


def _says(node: Any) -> Any:
    """What a syntax tree says: no positions, comments or docstrings, and nothing that versions of Python tell otherwise."""
    if isinstance(node, ast.Constant):
        return ["Constant", repr(node.value)]
    if isinstance(node, list):
        return [_says(part) for part in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = {name: value for name, value in ast.iter_fields(node) if value is not None and value != []}
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
        fields["body"] = fields["body"][1:]
    if isinstance(node, ast.JoinedStr):  # 3.12 and others cut an f-string into pieces of their own
        texts = [part.value if isinstance(part, ast.Constant) else part for part in node.values]
        runs = [(kind, list(run)) for kind, run in groupby(texts, lambda part: isinstance(part, str))]
        fields["values"] = [
            part for kind, run in runs for part in (["".join(map(str, run))] if kind else run) if part != ""
        ]
    return [type(node).__name__, {name: _says(value) for name, value in fields.items()}]


@cache
def source_hash(text: str) -> str:
    """Hash what a source does, not how it is written.

    Comments, docstrings, blank lines and the breaking of lines do not count, and the hash is the same on every version of
    Python that can read the source.

    Args:
        text: a Python source.

    Returns:
        64 hexadecimal digits.
    """
    return hashlib.sha256(json.dumps(_says(ast.parse(text)), sort_keys=True).encode()).hexdigest()


@cache
def _file_of(module: str) -> Path | None:
    """The source of a module, found without importing it; None for what is none, as a name inside a module."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if spec is None or not (spec.origin or "").endswith(".py"):
        return None
    first = Path(str(spec.origin))
    inner = first.parent.joinpath(*rest)
    tries = (inner.with_name(f"{inner.name}.py"), inner / "__init__.py") if rest else (first,)
    return next((file for file in tries if file.is_file()), None)


def _imports(module: str, file: Path, inside: set[str]) -> set[str]:
    """Modules of the packages `inside` that a source takes something from, wherever in it the import stands.

    A package counts where a name is taken from it; what Python runs on the way to a module inside it does not.
    """
    found: set[str] = set()
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            at = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            origin = ".".join(filter(None, (at, node.module)))
            parts = [f"{origin}.{alias.name}" for alias in node.names]
            found |= {part if _file_of(part) else origin for part in parts if part.split(".")[0] in inside}
    return {name for name in found if name.split(".")[0] in inside and _file_of(name)}


@cache
def code_hash(module: str | None = None) -> str:
    """Hash what runs when something is measured.

    It covers the source of a module and of every module of the library that it imports, directly or not, and is the same
    wherever the same code lies. Sources are read as `source_hash` reads them.

    Args:
        module: where the measuring function is defined; by default all of the library counts.

    Returns:
        12 hexadecimal digits.

    Raises:
        InputError: for a module without a Python source.
    """
    home = __name__.split(".")[0]
    start = _file_of(module or home)
    if start is None:
        raise InputError(f"module {module} has no source to tell measurements apart by: put the function into a file")
    if module is None:
        files = set(start.parent.rglob("*.py"))
    else:
        seen: dict[str, Path] = {}
        ahead = {module}
        while ahead:
            name = ahead.pop()
            seen[name] = _file_of(name) or start
            ahead |= _imports(name, seen[name], {home, module.split(".")[0]}) - seen.keys()
        files = set(seen.values()) - {start}
    parts = sorted(source_hash(file.read_text("utf-8")) for file in files)
    first = "" if module is None else source_hash(start.read_text("utf-8"))
    return hashlib.sha256(json.dumps([first, parts]).encode()).hexdigest()[:12]


def file_hash(*paths: Path) -> str:
    """Hash files one after the other, as if they were one: paths → SHA-256 as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()


@cache
def _commit() -> str:
    def git(*words: str) -> str:
        if not paths.CHECKOUT:  # a repository around the installed package is somebody else's
            return ""
        try:
            done = subprocess.run(["git", "-C", str(paths.ROOT), *words], capture_output=True, text=True, check=False)
        except OSError:  # no git here
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    head = git("rev-parse", "--short=12", "HEAD")
    changed = head and git("status", "--porcelain", "--", "lib", "data/paper", "data/zoo")
    return head + ("+changes" if changed else "") or "unknown"


def provenance(**more: object) -> dict[str, str]:
    """Say where a result comes from: further facts → names and values as text (code, commit, date, versions)."""
    facts: dict[str, object] = {
        "code": code_hash(),
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": version("torch"),
        "timm": version("timm"),
        "machine": platform.machine(),
        **more,
    }
    return {k: v if isinstance(v, str) else json.dumps(v, sort_keys=True, default=str) for k, v in facts.items()}


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file whole or not at all: final path, a function that writes to the path it is given.

    Raises InputError for a full disk or a folder that cannot be written; the former file then stays as it was.
    """
    spare: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
        spare = Path(name)
        spare.chmod(0o644)
        write(spare)
        os.replace(spare, path)
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # torch's writer and safetensors' have errors of their own
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise InputError(f"cannot write {path}: {reason}") from error
    finally:
        if spare is not None:
            spare.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Make a folder and see that files can be written in it: a long run must not fail at its end. Raises InputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"cannot write results in {folder}: {error.strerror}") from error


def save_dataset(data: xr.Dataset, path: Path) -> None:
    """Keep a labelled data set as netCDF, compressed: written whole or not at all."""

    def write(spare: Path) -> None:
        packed = {str(k): {"zlib": True, "complevel": 6} for k, v in data.data_vars.items() if v.dtype.kind in "fiub"}
        spare.write_bytes(data.to_netcdf(engine="h5netcdf", encoding=packed))

    write_whole(path, write)


def load_dataset(path: Path) -> xr.Dataset:
    """Read what `save` wrote: path → Dataset. Raises InputError for a missing file, Damaged for a broken one."""
    try:
        with xr.open_dataset(path, engine="h5netcdf") as data:
            return data.load()
    except FileNotFoundError as error:
        raise InputError(f"cannot read results {path}: {error}") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:  # HDF5 raises all of them, by where the damage is
        raise Damaged(f"cannot read results {path}: {error}") from error


def stored(
    path: Path, compute: Callable[[], xr.Dataset], *, key: Mapping[str, object], code: str = "", refresh: bool = False
) -> xr.Dataset:
    """Measure once, redraw anywhere.

    The file is used only if it was written for the same key by the same code; its attributes carry the provenance.

    Args:
        path: the file, netCDF.
        compute: measures.
        key: what the measurement depends on, as plain values.
        code: hash of the code that measures, as `code_hash` gives it; by default that of the whole library.
        refresh: measure in any case.

    Returns:
        The data set, from the file or new.

    Raises:
        InputError: if it cannot be written.
    """
    facts = {"code": code or code_hash()}
    stamp = json.dumps({**key, **facts}, sort_keys=True, default=str)
    if not refresh and path.exists():
        try:
            kept = load_dataset(path)
        except InputError:
            kept = xr.Dataset()  # a broken file is measured anew
        if kept.attrs.get("key") == stamp:
            return kept
    fresh = compute()
    fresh.attrs.update(provenance(**facts), key=stamp)
    save_dataset(fresh, path)
    return fresh
