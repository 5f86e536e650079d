"""The comparison of executed chapters: what two right runs may differ by passes, and every planted change is found."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import xarray as xr

from tests import compare
from tests.compare import CHOSEN, Chosen, Tolerance
from vitregs import cache, paths
from vitregs.book import parameters

TABLE = """<table><tr><th>model</th><th>verdict</th><th>share, %</th><th>wins</th></tr>
<tr><td>clip-pico</td><td>artifacts</td><td>14.2 [11.6, 17.0]</td><td>9 of 14</td></tr>
<tr><td>mae-pico-reg4</td><td>none</td><td>-0.03 [-0.10, 0.04]</td><td>11 of 14</td></tr></table>"""


def html(text: str) -> dict[str, Any]:
    return {"output_type": "execute_result", "data": {"text/html": text, "text/plain": "a table"}}


def stream(text: str, name: str = "stdout") -> dict[str, Any]:
    return {"output_type": "stream", "name": name, "text": text}


PICTURE = {"output_type": "display_data", "data": {"image/png": "abc", "text/plain": "<Figure size 640x480>"}}
ERROR = {"output_type": "error", "ename": "InputError", "evalue": "no such model", "traceback": []}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("14.2", "14.3"),  # one unit of the last digit
        ("[11.6,", "[11.5,"),
        ("-0.03", "-0.02"),
        ("share, %", "share,   %"),  # padding
    ],
)
def test_what_rounding_does_passes(old: str, new: str) -> None:
    assert compare.outputs([html(TABLE)], [html(TABLE.replace(old, new))], Tolerance()) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("14.2", "14.4"),
        ("-0.03", "0.03"),
        ("9 of 14", "10 of 14"),  # a count
        ("reg4", "reg5"),  # part of a name
        ("artifacts", "inconclusive"),  # a verdict
        ("14.2 [11.6, 17.0]", "–"),
        ("14.2 [11.6, 17.0]", "14.2"),
        (TABLE.splitlines()[2], ""),  # a row is gone
        ("</table>", TABLE.splitlines()[2] + "</table>"),
        (TABLE, "\n".join([TABLE.splitlines()[0], TABLE.splitlines()[2], TABLE.splitlines()[1]])),  # swapped
        ("14.2", "nan"),
    ],
)
def test_a_changed_table_is_found(old: str, new: str) -> None:
    assert old in TABLE
    assert compare.outputs([html(TABLE)], [html(TABLE.replace(old, new))], Tolerance()) != []


def test_other_outputs_are_found() -> None:
    one = [stream("a 1\n"), html(TABLE), PICTURE]
    assert compare.outputs(one, one, Tolerance()) == []
    pieces = [stream("a "), stream("1\n"), html(TABLE), {**PICTURE, "data": {"image/png": "x", "text/plain": "y"}}]
    assert compare.outputs(one, pieces, Tolerance()) == []
    for other in (
        one[:-1],
        [*one, stream("more")],
        [*one, stream("a warning", "stderr")],
        [one[1], one[0], one[2]],
        [*one, ERROR],
        [],
    ):
        assert compare.outputs(one, other, Tolerance()) != []
    assert compare.outputs([ERROR], [ERROR], Tolerance()) == ["InputError: no such model"]


def test_a_tolerance_widens_what_it_names_and_nothing_else() -> None:
    def found(old: str, new: str, **allowed: float) -> bool:
        return compare.texts(old, new, Tolerance(**allowed, because="a test")) != []

    assert not found("52.5 of 160", "53.7 of 160", decimals=1.25)
    assert found("52.5 of 160", "54.0 of 160", decimals=1.25)
    assert found("52.5 of 160", "52.5 of 161", decimals=1.25)
    assert not found("64 %", "66 %", counts=2)
    assert found("64 %", "67 %", counts=2)
    assert not found("200.0", "205.0", relative=0.05)
    assert found("2.00", "2.13", relative=0.05)


def test_numbers_and_words() -> None:
    assert compare.skeleton("clip-pico-reg4  1.50 [−0.2,  3e-05] 3x") == (
        "clip-pico-reg4 # [#, #] 3x",
        ["1.50", "−0.2", "3e-05"],
    )
    assert compare.texts("[ 0.5 -0.25]", "[0.5 -0.249]") == []
    assert compare.texts("made 2026-11-21 in 3.2 s", "made 2027-01-02 in 14 s") == []
    kept = ["Figure size 640x480", "12.34 %", "model 0.25 [0.20, 0.31]", "8 layers, 64 images", "2.5 x the median"]
    assert [t for t in kept if compare.clean(t) != t] == []
    assert compare.clean("<a at 0x7f07cf359d00>") == compare.clean("<a at 0x55aa12345678>")


def test_every_wide_tolerance_has_its_reason() -> None:
    stated = 0
    for name in parameters.names():
        for cell in nbformat.read(parameters.NOTEBOOKS / f"{name}.ipynb", as_version=4).cells:
            assert set(cell.metadata.get("vitregs", {})) <= {"tolerance"}, cell.id
            if "vitregs" in cell.metadata:
                allowed = compare.tolerance(cell)
                assert len(allowed.because) > 20, cell.id
                assert max(allowed.decimals, allowed.relative, allowed.counts) > 0, cell.id
                assert allowed.relative <= 0.05, cell.id
                stated += 1
    assert stated
    assert [r.names for r in CHOSEN if len(r.why) < 20 or bool(r.images) == bool(r.within) or r.images > 0.1] == []


def test_every_rule_for_arrays_is_used() -> None:
    names = {
        f"{file.parent.name}/{file.name.split('.')[0]}/{key}"
        for file in {
            (p.parent, p.name.split(".")[0]): p for p in (paths.ROOT / "data" / "results").glob("[01]*/*.nc")
        }.values()
        for key in cache.load_dataset(file)
    }
    assert [r.names for r in CHOSEN if not any(re.fullmatch(r.names, n) for n in names)] == []
    assert compare.rule("02_norms/norms/value") is None


# --- arrays


def numbers(values: Any, *dims: str, **coords: Any) -> xr.DataArray:
    return xr.DataArray(np.asarray(values), dims=dims, coords=coords)


def test_arrays_may_differ_by_a_thousandth() -> None:
    old = numbers([1.0, -100.0, np.nan], "token")
    assert compare.values(old, old * (1 + 9e-4)) == []
    assert compare.values(old, old + numbers([0.0, 0.5, 0.0], "token")) != []
    assert compare.values(old, old.fillna(0.0)) != []
    assert compare.values(old, old.where(old > 0)) != []
    whole = numbers([4, 5], "image")
    assert compare.values(whole, whole + numbers([0, 1], "image")) != []
    mask = numbers([True, False], "image")
    assert compare.values(mask, ~mask) != []


def test_a_share_of_the_images_may_choose_otherwise() -> None:
    rule = Chosen("x", "a test", images=0.02)
    old = numbers(np.zeros((2, 100), int), "rule", "image")
    new = old.copy()
    new[:, :2] = 7
    assert compare.values(old, new, rule) == []
    new[1, 5] = 7
    assert compare.values(old, new, rule) == ["3 of 100 images differ, 2 may"]
    few = numbers(np.zeros((4, 3), bool), "drawn", "y")
    assert compare.values(few, few | (few["drawn"] == 1), rule) == []
    assert compare.values(few, few | (few["drawn"] >= 2), rule) != []


def test_a_value_may_differ_where_the_rule_says() -> None:
    rule = Chosen("x", "a test", within=0.02, at="colour|shape")
    old = numbers([0.5, 0.5], "metric", metric=["colour", "depth rmse"])
    assert compare.values(old, old + numbers([0.02, 0.0], "metric"), rule) == []
    assert compare.values(old, old + numbers([0.03, 0.0], "metric"), rule) != []
    assert compare.values(old, old + numbers([0.0, 0.02], "metric"), rule) != []


def test_folders_of_arrays(tmp_path: Path) -> None:
    a, b = tmp_path / "a" / "02_norms", tmp_path / "b" / "02_norms"
    data = numbers([1.0, 2.0], "layer", layer=[0, 1]).to_dataset(name="value")
    for folder in (a, b):
        cache.save_dataset(data, folder / "norms.one.nc")
    assert compare.arrays(a, b) == []
    cache.save_dataset(data.assign_coords(layer=[0, 2]), b / "norms.one.nc")
    assert len(compare.arrays(a, b)) == 1
    cache.save_dataset(data, a / "norms.two.nc")
    (b / "norms.one.nc").unlink()
    assert compare.arrays(a, b) == ["norms.one.nc is missing", "norms.two.nc is missing"]
    cache.save_dataset(data, b / "norms.three.nc")
    assert "norms.three.nc is new, or left by an older build" in compare.arrays(a, b)


# --- notebooks


def book(file: Path, *cells: tuple[str, list[Any], dict[str, Any]]) -> Path:
    made = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    for i, (source, predicted, about) in enumerate(cells):
        cell = nbformat.v4.new_code_cell(source, outputs=predicted, metadata=about, execution_count=i + 1)
        cell["id"] = f"cell-{i}"
        made.cells.append(cell)
    nbformat.write(made, file)
    return file


def predicted(text: str) -> list[Any]:
    return [nbformat.v4.new_output("stream", name="stdout", text=text)]


def test_notebooks_are_compared_cell_by_cell(tmp_path: Path) -> None:
    loose = {"vitregs": {"tolerance": {"decimals": 1.0, "because": "a test"}}}
    always = {"tags": ["nbval-ignore-output"]}
    old = book(
        tmp_path / "old.ipynb",
        ("a", predicted("1.0"), {}),
        ("b", predicted("1.0"), loose),
        ("c", predicted("x"), always),
    )
    new = book(
        tmp_path / "new.ipynb",
        ("a", predicted("1.0"), {}),
        ("b", predicted("1.9"), loose),
        ("c", predicted("y"), always),
    )
    assert compare.notebooks(old, new) == []
    new = book(
        tmp_path / "new.ipynb",
        ("a", predicted("1.9"), {}),
        ("b", predicted("1.9"), loose),
        ("c", predicted("y"), always),
    )
    assert compare.notebooks(old, new) == ["[cell-0] 1.9 for 1.0"]
    error = [nbformat.v4.new_output("error", ename="E", evalue="e", traceback=[])]
    new = book(
        tmp_path / "new.ipynb", ("a", predicted("1.0"), {}), ("b", predicted("1.9"), loose), ("c", error, always)
    )
    assert len(compare.notebooks(old, new)) > 0
    new = book(
        tmp_path / "new.ipynb",
        ("a", predicted("1.0"), {}),
        ("other", predicted("1.9"), loose),
        ("c", predicted("y"), always),
    )
    assert "was not executed from" in compare.notebooks(old, new)[0]


def test_nbval_compares_in_this_way(tmp_path: Path) -> None:
    loose = {"vitregs": {"tolerance": {"decimals": 1.0, "because": "a test"}}}
    cells = [("1.26", predicted("1.25\n"), {}), ("1.5", predicted("1.0\n"), loose), ("2.5", predicted("1.0\n"), loose)]
    file = book(tmp_path / "small.ipynb", *((f"print({n})", o, m) for n, o, m in cells))
    message = ["-m", "pytest", "-p", "tests.compare", "--nbval", "--nbval-current-env", "-o", "addopts=", str(file)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    done = subprocess.run([sys.executable, *message], cwd=paths.ROOT, env=environment, capture_output=True, text=True)
    assert "2 passed" in done.stdout, done.stdout + done.stderr
    assert "1 failed" in done.stdout
    assert "2.5 for 1.0" in done.stdout
