"""A chapter's run through papermill."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from vitregs import cache
from vitregs.book import parameters
from vitregs.book.parameters import changed, chapter_parameters, check
from vitregs.claims import scoreboard
from vitregs.data.sources import NAMED
from vitregs.errors import InputError, extra
from vitregs.models import registry

BOX = "run.results()"  # the cell that shows a chapter's claims


def run_chapter(chapter: str, values: Mapping[str, Any], out: Path, stored: Path) -> Path:
    """Run a chapter through papermill: name, values, output notebook, results folder → the notebook written.

    Everything is checked first. Raises InputError if a check or a cell fails; the output is then not touched.
    """
    with extra("book", "running a chapter"):
        import papermill
        from jupyter_client.kernelspec import NoSuchKernel
        from nbclient.exceptions import DeadKernelError

    full, known = check(chapter, values), chapter_parameters(chapter)
    if full.get("images", "scenes") not in NAMED and Path(full["images"]).expanduser().exists():
        full["images"] = str(Path(full["images"]).expanduser().resolve())  # the kernel runs in another folder
    if full.get("models"):
        full["models"] = [registry.absolute(m) for m in full["models"]]
    if full.get("keep"):
        full["keep"] = str(Path(full["keep"]).expanduser().resolve())
    if full.get("weights"):
        full["weights"] = [str(Path(f).expanduser().resolve()) if f else "" for f in full["weights"]]
    given = {k: v for k, v in full.items() if v != known[k].default}
    cache.check_writable(stored)

    folder = parameters.NOTEBOOKS

    def write(spare: Path) -> None:
        named = spare.with_suffix(".ipynb")  # papermill chooses its format by the suffix
        try:
            papermill.execute_notebook(
                str(folder / f"{chapter}.ipynb"), str(named), given, cwd=str(folder), kernel_name="python3",
                progress_bar={"leave": False, "disable": None},  # none where nobody watches
                extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # it would tell how it talks and when it is stopped
            )  # fmt: skip
            named.write_text(without_defaults(tidy(named.read_text()), changed(chapter, given)))
            named.replace(spare)
        except papermill.PapermillExecutionError as error:
            what = error.evalue if error.ename == "InputError" else f"{error.ename}: {error.evalue}"
            raise InputError(f"{chapter} stopped: {what}") from error
        except DeadKernelError as error:
            raise InputError(f"{chapter} stopped: its kernel was killed, perhaps for want of memory") from error
        except NoSuchKernel as error:
            raise InputError("there is no Jupyter kernel python3 here: pip install ipykernel") from error
        finally:
            named.unlink(missing_ok=True)

    with _environment(VITREGS_RESULTS=str(stored.resolve()), PYDEVD_DISABLE_FILE_VALIDATION="1"):
        cache.write_whole(out, write)
    return out


@contextmanager
def _environment(**names: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def tidy(text: str) -> str:
    """Drop what a run adds and nobody reads (time stamps, paths, empty tags): notebook JSON → notebook JSON."""
    book = json.loads(text)
    book["metadata"].pop("papermill", None)
    book["metadata"].get("language_info", {}).pop("version", None)
    for cell in book["cells"]:
        for key in ("papermill", "execution"):
            cell["metadata"].pop(key, None)
        if not cell["metadata"].get("tags", True):
            del cell["metadata"]["tags"]
    return json.dumps(book, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def without_defaults(text: str, differs: Sequence[str]) -> str:
    """Take out what a chapter says of its own networks and images.

    Args:
        text: a notebook, JSON. Its markdown cells with the tag `defaults` speak of a run at the defaults.
        differs: parameters of this run that are not at their defaults; if there are none, nothing is taken out.

    Returns:
        The notebook, JSON. Of each such cell the headings are left, and one line that says where the text is.
    """
    if not differs:
        return text
    book = json.loads(text)
    names = ", ".join(f"`{name}`" for name in differs)
    line = f"*What the book says here is about its own networks and images. This run differs in {names}, so it is left out.*"
    for cell in book["cells"]:
        if cell["cell_type"] == "markdown" and "defaults" in cell["metadata"].get("tags", []):
            heads = re.findall(r"^#+ .*$", "".join(cell["source"]), re.MULTILINE)
            cell["source"] = "\n\n".join([*heads, line]).splitlines(keepends=True)
    return json.dumps(book, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def refresh_boxes(folder: Path) -> list[Path]:
    """Put the verdicts of the stored results into chapters that were executed at their defaults: folder of notebooks → those
    that changed.

    A chapter's box is made before its arrays are measured, and those of other chapters may come later still.
    """
    written = []
    for path in sorted(folder.glob("[0-9]*.ipynb")):
        text = path.read_text("utf-8")
        book = json.loads(text)
        if any("injected-parameters" in c["metadata"].get("tags", []) for c in book["cells"]):
            continue
        for cell in book["cells"]:
            if cell["cell_type"] == "code" and "".join(cell["source"]) == BOX and cell["outputs"]:
                box = scoreboard.box(path.stem)
                shown = {"text/html": box._repr_html_(), "text/plain": repr(box)}
                cell["outputs"][0]["data"] = {k: v.splitlines(keepends=True) for k, v in shown.items()}
        new = json.dumps(book, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        if new != text:
            cache.write_whole(path, partial(_write, new))
            written.append(path)
    return written


def _write(text: str, spare: Path) -> None:
    spare.write_text(text, "utf-8")
