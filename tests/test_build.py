"""The build: two at once take turns, and one that fails or is killed leaves the next one a whole book to make."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vitregs import paths

ROOT = paths.ROOT
PAGES = 20
# stands in for jupyter-book: slow page after slow page, each with the sidebar of what it was given
FAKE = """\
import pathlib, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--path-output") + 1]) / "_build" / "html"
out.mkdir(parents=True)
source = pathlib.Path(sys.argv[2])
for i in range({pages}):
    time.sleep({pause})
    sidebar = (source / "book" / "scoreboard.md").read_text() + (source / "book" / "index.md").read_text()
    (out / ("index.html" if i == 0 else f"{{i}}.html")).write_text(sidebar)
sys.exit({status})
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A small tree with the real Makefile and lock, an environment of stand-ins, and one chapter."""
    for name in ("Makefile", "book/lock.py", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("notebooks/01_one.ipynb", "data/results/LOG.md", "data/paper/x", "data/zoo/x", "lib/vitregs/x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x\n")
    (tmp_path / "book" / "index.md").write_text("first\n")
    commands = tmp_path / ".venv" / "bin"
    commands.mkdir(parents=True)
    write = 'if [ "$1" = scoreboard ]; then echo scoreboard; else echo "$2" >> ran; echo x > "$4"; fi\n'
    (commands / "vitregs").write_text(f"#!/bin/sh\nmkdir -p build/notebooks\n{write}")
    (commands / "vitregs").chmod(0o755)
    (tmp_path / ".venv" / "ready").touch()
    return tmp_path


def start(folder: Path, pause: float = 0.0, status: int = 0) -> subprocess.Popen[str]:
    """Start `make book` with the stand-in, in a process group of its own."""
    (folder / f"fake{pause}{status}.py").write_text(FAKE.format(pages=PAGES, pause=pause, status=status))
    message = ["make", "book", f"PYTHON={sys.executable}", f"JUPYTER_BOOK={sys.executable} fake{pause}{status}.py"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    return subprocess.Popen(
        message, cwd=folder, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def pages(folder: Path) -> list[str]:
    return sorted(p.read_text() for p in (folder / "build" / "html").glob("*.html"))


def begun(folder: Path, running: subprocess.Popen[str]) -> None:
    """Wait until the stand-in has written a page."""
    while not list((folder / "build").glob("jb/_build/html/*.html")):
        assert running.poll() is None
        time.sleep(0.01)


def whole(folder: Path, text: str = "first\n") -> None:
    done = start(folder)
    assert done.wait() == 0, done.communicate()[0]
    assert pages(folder) == [f"scoreboard\n{text}"] * PAGES


def test_a_second_build_has_nothing_to_do(copy: Path) -> None:
    whole(copy)
    before = (copy / "build" / "html" / "1.html").stat().st_mtime_ns
    whole(copy)
    assert (copy / "build" / "html" / "1.html").stat().st_mtime_ns == before
    assert (copy / "ran").read_text() == "01_one\n"


def test_a_failed_build_leaves_the_old_book_and_the_next_one_is_whole(copy: Path) -> None:
    whole(copy)
    (copy / "book" / "index.md").write_text("second\n")
    assert start(copy, status=1).wait() != 0
    assert pages(copy) == ["scoreboard\nfirst\n"] * PAGES
    whole(copy, "second\n")


def test_a_killed_build_leaves_the_next_one_whole(copy: Path) -> None:
    running = start(copy, pause=0.2)
    begun(copy, running)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert pages(copy) == []
    whole(copy)


def test_two_builds_take_turns(copy: Path) -> None:
    first = start(copy, pause=0.05)
    begun(copy, first)
    second = start(copy, pause=0.05)
    message = [p.communicate()[0] for p in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), message
    assert "another make is at work here: waiting" in message[1]
    assert "waiting" not in message[0]
    assert pages(copy) == ["scoreboard\nfirst\n"] * PAGES
    assert (copy / "ran").read_text() == "01_one\n"


def test_what_changes_during_a_build_is_built_next(copy: Path) -> None:
    running = start(copy, pause=0.05)
    begun(copy, running)
    (copy / "book" / "index.md").write_text("second\n")
    assert running.wait() == 0
    assert set(pages(copy)) == {"scoreboard\nfirst\n"}
    whole(copy, "second\n")
