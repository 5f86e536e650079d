"""The examples of docstrings, of the page on the public interface, and of the README run as they stand."""

import doctest
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

import vitregs as vr
from vitregs import paths

LIBRARY = Path(vr.__file__).parent
WITH_EXAMPLES = [
    ".".join(file.relative_to(LIBRARY.parent).with_suffix("").parts).removesuffix(".__init__")
    for file in sorted(LIBRARY.rglob("*.py"))
    if ">>> " in file.read_text("utf-8")
]
PUBLISHED = "deit_tiny_patch16_224"  # what the pages name; an example runs on a network that is at hand instead


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_of_docstrings(module: str) -> None:
    found = doctest.testmod(import_module(module), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert found.attempted, f"{module} shows examples that doctest does not see"
    assert not found.failed


def test_each_public_name_has_an_example() -> None:
    shown = {name for name in vr.__all__ if ">>> " in (getattr(vr, name).__doc__ or "")}
    functions = {"capture", "diagnose", "find_outliers", "load", "open_images", "wrap"}
    assert functions <= shown
    assert [name for name in vr.plot.__all__ if ">>> " not in getattr(vr.plot, name).__doc__] == []


def code(page: str) -> list[str]:
    """Python of a Markdown page: its fenced blocks."""
    return re.findall(r"```python\n(.*?)```", (paths.ROOT / page).read_text("utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", ["book/api.md", "README.md"])
def test_pages_run(page: str, tmp_path: Path) -> None:
    """As they stand, with a network of the book in place of the published one, on a folder of that name."""
    (tmp_path / "photos").mkdir()
    for i in range(8):
        Image.effect_noise((80, 70), 40 + i).convert("RGB").save(tmp_path / "photos" / f"{i}.png")
    blocks = code(page)
    assert PUBLISHED in blocks[0]
    ours = "".join(blocks).replace(PUBLISHED, "hunt-pico").replace("layer=12", "layer=8")
    done = subprocess.run([sys.executable, "-c", ours], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
