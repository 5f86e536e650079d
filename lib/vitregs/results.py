"""The dictionary of the project and its memory: dimension names, token kinds, labelled arrays kept with provenance.

Dimensions: `model image layer head query token channel y x`. A token axis carries the coordinates `kind` (one of
KINDS), `label` (cls, reg0, …, "3,5") and, for patches, `y` and `x` (row before column). No torch here.
"""

import hashlib
import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from safetensors import SafetensorError

from vitregs.problems import Problem, unknown

KINDS = ("cls", "register", "patch")
PACKAGE = Path(str(files("vitregs"))).resolve()
CHECKOUT = all((PACKAGE.parents[1] / name).is_dir() for name in ("data/paper", "notebooks"))
ROOT = PACKAGE.parents[1] if CHECKOUT else PACKAGE / "_files"  # where data/ and notebooks/ lie
BUILD = ROOT / "build" if CHECKOUT else Path("build")  # where results go that nobody gave a place


def token_coords(kinds: Sequence[str], grid: tuple[int, int], dim: str = "token") -> dict[str, tuple[str, Any]]:
    """Label a token axis: kinds of all tokens, (rows, columns) of the patch grid → coordinates for xarray.

    Raises Problem for unknown kinds and if the number of patches is not rows × columns.
    """
    kind = np.asarray(kinds, np.str_)
    for name in set(kinds) - set(KINDS):
        raise unknown("kind of token", name, KINDS)
    patch = kind == "patch"
    if patch.sum() != grid[0] * grid[1]:
        raise Problem(f"{patch.sum()} patch tokens do not fill a grid of {grid[0]}x{grid[1]}")
    y, x = np.full(len(kind), -1), np.full(len(kind), -1)
    y[patch], x[patch] = np.divmod(np.arange(patch.sum()), grid[1])
    rank = {k: np.cumsum(kind == k) - 1 for k in KINDS}
    cls = ("cls", "dist", *(f"cls{n}" for n in range(2, len(kind))))
    label = [
        f"{y[i]},{x[i]}" if k == "patch" else f"reg{rank[k][i]}" if k == "register" else cls[rank[k][i]]
        for i, k in enumerate(kind)
    ]
    return {"kind": (dim, kind), "label": (dim, label), "y": (dim, y), "x": (dim, x)}


def grid(array: xr.DataArray) -> xr.DataArray:
    """Fold the patch tokens of an array (…, token) into maps (…, y, x); other kinds are dropped.

    Raises Problem unless the patches are all there, row after row.
    """
    patches = array.isel(token=np.flatnonzero(array["kind"] == "patch"))
    y, x = patches["y"].values, patches["x"].values
    rows, columns = (int(v.max(initial=-1)) + 1 for v in (y, x))
    if not len(y) or not np.array_equal(y * columns + x, np.arange(rows * columns)):
        raise Problem(f"{len(y)} patch tokens do not fill a grid of {rows}x{columns} row after row")
    lead = [d for d in patches.dims if d != "token"]
    values = patches.transpose(*lead, "token").values
    folded = values.reshape(*values.shape[:-1], rows, columns)
    coords = {k: v for k, v in patches.coords.items() if "token" not in v.dims}
    return xr.DataArray(folded, dims=[*lead, "y", "x"], coords=coords, attrs=array.attrs, name=array.name)


@cache
def code_hash() -> str:
    """Hash the library's sources: → 12 hexadecimal digits, the same wherever the same code lies."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


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
        if not CHECKOUT:  # a repository around the installed package is somebody else's
            return ""
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
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

    Raises Problem for a full disk or a folder that cannot be written; the former file then stays as it was.
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
        raise Problem(f"cannot write {path}: {reason}") from error
    finally:
        if spare is not None:
            spare.unlink(missing_ok=True)


def save(data: xr.Dataset, path: Path) -> None:
    """Keep a labelled data set as netCDF, compressed: written whole or not at all."""

    def write(spare: Path) -> None:
        packed = {str(k): {"zlib": True, "complevel": 6} for k, v in data.data_vars.items() if v.dtype.kind in "fiub"}
        spare.write_bytes(data.to_netcdf(engine="h5netcdf", encoding=packed))

    write_whole(path, write)


def load(path: Path) -> xr.Dataset:
    """Read what `save` wrote: path → Dataset. Raises Problem for a missing or broken file."""
    try:
        with xr.open_dataset(path, engine="h5netcdf") as data:
            return data.load()
    except (OSError, ValueError, KeyError) as error:
        raise Problem(f"cannot read results {path}: {error}") from error


def stored(
    path: Path, compute: Callable[[], xr.Dataset], *, key: Mapping[str, object], refresh: bool = False
) -> xr.Dataset:
    """Measure once, redraw anywhere: path, how to measure, what the measurement depends on → Dataset.

    The file is used only if it was written for the same key by the same code; its attributes carry the provenance.
    Raises Problem if it cannot be written.
    """
    stamp = json.dumps({**key, "code": code_hash()}, sort_keys=True, default=str)
    if not refresh and path.exists():
        try:
            kept = load(path)
        except Problem:
            kept = xr.Dataset()  # a broken file is measured anew
        if kept.attrs.get("key") == stamp:
            return kept
    fresh = compute()
    fresh.attrs.update(provenance(), key=stamp)
    save(fresh, path)
    return fresh
