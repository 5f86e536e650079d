"""Run the chapters under every arithmetic that this machine can do and compare each with what is stored.

    python -m tests.portable [--setting NAME]... [--chapter NAME]...

A setting is the vector instructions that PyTorch, MKL and oneDNN may use, and a number of threads: `default-1` is the code
without vector instructions of its own on one thread, as on a processor that has none of AVX2 and AVX-512. What differs is
printed, and so is the log of a chapter that fails or is killed; then a table of settings and chapters. Exit code 1 if
anything differs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests import compare
from vitregs import paths
from vitregs.book import parameters
from vitregs.errors import unknown

ARITHMETICS: dict[str, dict[str, str]] = {
    "default": {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "native": {},
}
SETTINGS = {
    f"{name}-{threads}": {**values, "OMP_NUM_THREADS": str(threads)}
    for name, values in ARITHMETICS.items()
    for threads in (1, 2)
}
TOGETHER = 2  # as in `make book`
FREE = {name for values in SETTINGS.values() for name in values}


def check(chapter: str, setting: str) -> list[str]:
    """Run one chapter under one setting: names → what differs from the stored outputs and arrays, a line each."""
    environment = {k: v for k, v in os.environ.items() if k not in FREE} | SETTINGS[setting]
    with tempfile.TemporaryDirectory() as place:
        book, folder = Path(place) / f"{chapter}.ipynb", Path(place) / "results"
        message = [sys.executable, "-m", "vitregs.cli", "run", chapter, "--out", str(book), "--results", str(folder)]
        done = subprocess.run(message, cwd=paths.ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            return [f"ended with {done.returncode}", *(done.stdout + done.stderr).splitlines()[-40:]]
        return compare.chapter(chapter, book, folder)


def main(message: list[str]) -> int:
    """Run what the words ask for and print the table: words of the command line → 0 if nothing differs, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.portable", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--setting", action="append", help=f"one of {', '.join(SETTINGS)} (default: all)")
    parser.add_argument("--chapter", action="append", help="number or name of a chapter (default: all)")
    requested = parser.parse_args(message)
    settings = requested.setting or list(SETTINGS)
    for name in settings:
        if name not in SETTINGS:
            raise SystemExit(str(unknown("setting", name, SETTINGS)))
    wanted = [parameters.find(name) for name in requested.chapter or parameters.names()]
    pairs = [(chapter, setting) for chapter in wanted for setting in settings]
    table: dict[str, list[str]] = {}
    with ThreadPoolExecutor(TOGETHER) as pool:
        for (chapter, setting), found in zip(pairs, pool.map(check, *zip(*pairs, strict=True)), strict=True):
            table.setdefault(chapter, []).append("ok" if not found else "DIFFERS")
            for line in found:
                print(f"{chapter} under {setting}: {line}", flush=True)
    wide = max(len(name) for name in wanted)
    print(" " * wide, *(f"{name:>10}" for name in settings))
    for chapter, row in table.items():
        print(f"{chapter:<{wide}}", *(f"{word:>10}" for word in row))
    return int(any("DIFFERS" in row for row in table.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
