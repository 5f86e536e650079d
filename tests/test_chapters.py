"""Chapters as programs: parameters read and checked, names completed, measurements kept for what they depend on."""

import json
from functools import partial
from pathlib import Path

import nbformat
import numpy as np
import pytest
import timm
import xarray as xr

from vitregs import cache, paths
from vitregs.book import chapter, execute, parameters
from vitregs.book.chapter import Run
from vitregs.book.parameters import Parameter
from vitregs.claims import networks
from vitregs.data import images, scenes
from vitregs.data.images import Images
from vitregs.data.preparation import Preparation
from vitregs.errors import InputError
from vitregs.measure.norms import norms_at
from vitregs.models import capture, registry
from vitregs.models.backbone import Backbone

PICO, PICO4 = "supervised-pico", "supervised-pico-reg4"


def problem(call, *args: object, **kw: object) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **kw)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(folder: Path, name: str, text: str) -> None:
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cell = nbformat.v4.new_code_cell(text, metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel}), folder / f"{name}.ipynb")


# --- names


@pytest.mark.parametrize(
    "name", ["2", "02", "norms", "02_norms", "02_norms.ipynb", "notebooks/02_norms.ipynb", "./notebooks/02_norms.ipynb"]
)
def test_names_are_completed(name: str) -> None:
    assert parameters.find(name) == "02_norms"


def test_every_chapter_has_three_names() -> None:
    for name in parameters.names():
        number, _, rest = name.partition("_")
        assert {parameters.find(n) for n in (name, number, rest, str(int(number)))} == {name}


@pytest.mark.parametrize("name", ["", "0", "77", "nroms", "02_", "norms_"])
def test_names_of_no_chapter(name: str) -> None:
    message = problem(parameters.find, name)
    assert f"unknown chapter {name!r}" in message
    assert "02_norms" in message


def test_chapters_are_in_order_and_half_written_ones_are_none(tmp_path: Path, monkeypatch) -> None:
    for name in ("10_b", "02_a", ".02_a.ipynb.x", "draft"):
        write(tmp_path, name, "")
    (tmp_path / "03_notes.md").write_text("")
    monkeypatch.setattr(parameters, "NOTEBOOKS", tmp_path)
    assert parameters.names() == ["02_a", "10_b"]
    assert parameters.find("10") == "10_b"


# --- parameters


def test_parameters_are_read_from_the_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = """\
names: list = ["a", "b"]  # some names
count: int = -3  # how many [-5, 100000]
share: float = (
    0.02  # of all [0.001, 0.2]
)
kind: str = "cosine"  # which {cosine, linear}
loud: bool = False  # whether to print
"""
    write(tmp_path, "01_a", lines)
    monkeypatch.setattr(parameters, "NOTEBOOKS", tmp_path)
    found = parameters.chapter_parameters("01_a")
    assert [(p.name, p.type, p.default, p.help) for p in found.values()] == [
        ("names", list, ["a", "b"], "some names"),
        ("count", int, -3, "how many [-5, 100000]"),
        ("share", float, 0.02, "of all [0.001, 0.2]"),
        ("kind", str, "cosine", "which {cosine, linear}"),
        ("loud", bool, False, "whether to print"),
    ]
    assert list(found) == [p.name for p in found.values()]
    assert found["count"].limits == (-5, 100000)
    assert found["share"].limits == (0.001, 0.2)
    assert found["names"].limits is None
    assert found["kind"].choices == ["cosine", "linear"]
    assert found["names"].choices == []
    assert parameters.check("01_a", {"count": 7}) == {
        "names": ["a", "b"],
        "count": 7,
        "share": 0.02,
        "kind": "cosine",
        "loud": False,
    }
    assert "did you mean 'count'" in problem(parameters.check, "01_a", {"cuont": 1})


@pytest.mark.parametrize(
    ("kind", "help_", "value", "message"),
    [
        (int, "", 1.0, "x takes int, not 1.0"),
        (int, "", True, "x takes int, not True"),
        (int, "", "3", "x takes int, not '3'"),
        (int, "[1, 4]", 5, "x must lie within 1 to 4, not 5"),
        (int, "[1, 4]", 0, "x must lie within 1 to 4, not 0"),
        (float, "", "0.1", "x takes float, not '0.1'"),
        (float, "", False, "x takes float, not False"),
        (float, "[0.5, 2]", 2.5, "x must lie within 0.5 to 2, not 2.5"),
        (float, "[0.5, 2]", float("nan"), "x must lie within 0.5 to 2, not nan"),
        (float, "[-1, 2]", float("inf"), "x must lie within -1 to 2, not inf"),
        (bool, "", 1, "x takes bool, not 1"),
        (str, "", None, "x takes str, not None"),
        (str, "{red, green}", "gren", "unknown x 'gren': did you mean 'green'"),
        (list, "", "a", "x takes list, not 'a'"),
        (list, "", "(1, 2)", "x takes list, not '(1, 2)': papermill turns a tuple into text, give it a list"),
        (list, "", "('a',)", "papermill turns a tuple into text"),
    ],
)
def test_values_that_do_not_fit(kind: type, help_: str, value: object, message: str) -> None:
    assert message in problem(Parameter("x", kind, None, help_).check, value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modles": [PICO]}, "unknown parameter of 02_norms 'modles': did you mean 'models'"),
        ({"count": 0}, "count must lie within 1 to 100000"),
        ({"count": "4"}, "count takes int, not '4'"),
        ({"models": PICO}, "models takes list"),
        ({"models": []}, "models must name at least one model"),
        ({"models": [3]}, "models takes a list of names, not of 3"),
        ({"models": ["supervised-pika"]}, "did you mean 'supervised-pico'"),
        ({"models": ["resnet50"]}, "resnet50 is not a plain ViT"),
        ({"models": [PICO, PICO]}, "models names supervised-pico twice"),
        ({"models": [PICO], "weights": ["a", "b"]}, "2 weight files for 1 models"),
        ({"models": [PICO, PICO4], "weights": ["", "nowhere"]}, "no weight file at nowhere"),
        ({"weights": [1, 2]}, "weights takes a list of names, not of 1"),
        ({"images": "~/nowhere/at/all"}, "no folder or file ~/nowhere/at/all"),
        ({"images": "/nowhere.parquet"}, "no folder or file /nowhere.parquet"),
        ({"device": "gpu"}, "device 'gpu' is not available"),
    ],
)
def test_parameters_are_checked(values: dict, message: str) -> None:
    assert message in problem(parameters.check, "02_norms", values)


def test_right_parameters_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in parameters.names():
        assert parameters.check(name, {}) == {k: p.default for k, p in parameters.chapter_parameters(name).items()}
    weights = registry.ZOO / PICO / "weights.safetensors"
    (tmp_path / "w.safetensors").write_bytes(weights.read_bytes())
    (tmp_path / "a.PNG").write_bytes(b"any")
    monkeypatch.setenv("HOME", str(tmp_path))
    values = {
        "models": [PICO, "vit_tiny_patch16_224"],
        "weights": ["", "~/w.safetensors"],
        "images": "~",
        "device": "cpu",
    }
    full = parameters.check("02_norms", values)
    assert {k: full[k] for k in values} == values
    assert parameters.check("02_norms", {"images": "owner/dataset-of-the-hub"})["images"] == "owner/dataset-of-the-hub"


# --- tidy


def test_tidy_keeps_what_is_read_and_drops_the_rest() -> None:
    raw = {
        "cells": [
            {
                "cell_type": "code",
                "id": "02-05",
                "execution_count": 3,
                "metadata": {
                    "tags": [],
                    "papermill": {"duration": 1.0},
                    "execution": {"iopub.execute_input": "2020-01-01"},
                    "mystnb": {"figure": {"name": "fig-a"}},
                },
                "outputs": [{"output_type": "stream", "name": "stdout", "text": ["µ 1\n"]}],
                "source": ["print('µ 1')"],
            },
            {"cell_type": "markdown", "id": "02-06", "metadata": {"tags": ["exercise"]}, "source": ["# a\n", "b"]},
        ],
        "metadata": {
            "kernelspec": {"name": "python3"},
            "language_info": {"name": "python", "version": "3.11.7"},
            "papermill": {"output_path": "somewhere/secret"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    text = execute.tidy(json.dumps(raw))
    book = json.loads(text)
    assert "µ" in text
    assert text.endswith("}\n")
    assert book["metadata"] == {"kernelspec": {"name": "python3"}, "language_info": {"name": "python"}}
    code, words = book["cells"]
    assert code["metadata"] == {"mystnb": {"figure": {"name": "fig-a"}}}
    assert {k: v for k, v in code.items() if k != "metadata"} == {
        k: v for k, v in raw["cells"][0].items() if k != "metadata"
    }
    assert words == raw["cells"][1]
    assert execute.tidy(text) == text


# --- what the book says of its own networks


def test_what_differs_from_the_book() -> None:
    known = {n: p.default for n, p in parameters.chapter_parameters("14_train_your_own").items()}
    assert parameters.changed("14_train_your_own", known) == []
    assert parameters.changed("14_train_your_own", known | {"device": "cpu", "out": "kept"}) == []
    assert parameters.changed("14_train_your_own", {"layer": 3, "images": "folder", "every": known["every"]}) == [
        "layer",
        "images",
    ]


def test_text_on_the_book_s_own_networks_is_left_out_of_another_run() -> None:
    cells = [
        nbformat.v4.new_markdown_cell("# A chapter\n\nSays what to look for."),
        nbformat.v4.new_markdown_cell(
            "## What came out\n\n**Agrees.** `mae-pico`\n\n### More\n\nOurs.", metadata={"tags": ["defaults"]}
        ),
        nbformat.v4.new_code_cell("ours = 1", metadata={"tags": ["defaults"]}),
        nbformat.v4.new_markdown_cell("Ours are small.", metadata={"tags": ["solution", "defaults"]}),
    ]
    text = execute.tidy(nbformat.writes(nbformat.v4.new_notebook(cells=cells)))
    assert execute.without_defaults(text, []) == text
    left = nbformat.reads(execute.without_defaults(text, ["models", "count"]), as_version=4)
    nbformat.validate(left)
    line = (
        "*What the book says here is about its own networks and images. This run differs in `models`, `count`, "
        "so it is left out.*"
    )
    assert [c.source for c in left.cells] == [
        cells[0].source,
        f"## What came out\n\n### More\n\n{line}",
        "ours = 1",
        line,
    ]
    again = execute.without_defaults(nbformat.writes(left), ["models", "count"])
    assert [c.source for c in nbformat.reads(again, as_version=4).cells] == [c.source for c in left.cells]


# --- plain papermill


@pytest.fixture
def papermill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run the first cells of chapter 2, up to its check of the parameters, through papermill itself."""
    import papermill

    book = nbformat.read(parameters.NOTEBOOKS / "02_norms.ipynb", as_version=4)
    code = [c for c in book.cells if c.cell_type == "code"][:2]
    code[1].source = code[1].source.split("norms = run.measure")[0] + "print('went on')"
    nbformat.write(nbformat.v4.new_notebook(cells=code, metadata=book.metadata), tmp_path / "in.ipynb")
    monkeypatch.setenv("VITREGS_RESULTS", str(tmp_path / "results"))

    def run(**values: object) -> list:
        made = papermill.execute_notebook(
            str(tmp_path / "in.ipynb"), None, values, kernel_name="python3", progress_bar=False
        )
        return [o for c in made.cells for o in c.outputs]

    def fails(**values: object) -> str:
        with pytest.raises(papermill.PapermillExecutionError) as caught:
            run(**values)
        assert caught.value.ename == "InputError"
        return caught.value.evalue

    return run, fails


def test_plain_papermill_says_that_this_is_another_run(papermill) -> None:
    run, _ = papermill
    note, predicted = run(count=2, device="cpu")
    assert note["data"]["text/markdown"] == note["data"]["text/plain"]
    assert note["data"]["text/plain"].startswith("**Not the run of the book**: it differs in `count`.")
    assert predicted["text"] == "went on\n"
    (predicted,) = run(device="cpu")  # at the defaults a page holds what it always held
    assert predicted["text"] == "went on\n"


def test_plain_papermill_refuses_names_that_nobody_reads(papermill) -> None:
    _, fails = papermill
    assert fails(cuont=32) == "unknown parameter of 02_norms 'cuont': did you mean 'count'?"
    assert "papermill turns a tuple into text, give it a list" in fails(models=(PICO, PICO4))


# --- a chapter at work


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the measurements of this test go."""
    monkeypatch.setenv("VITREGS_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


MADE: list[str] = []  # models that were measured, one after the other


def watched(backbone: Backbone, images: Images, *, layers: list[int] | None = None, times: float = 1.0) -> xr.DataArray:
    """Norms, and a note that they were measured."""
    MADE.append(backbone.name)
    return times * capture.norms(backbone, images, layers=layers)


@pytest.fixture(autouse=True)
def nothing_made() -> None:
    MADE.clear()


def test_measured_once_for_the_same_question(stored: Path) -> None:
    values = {"models": [PICO, PICO4], "count": 2, "device": "cpu"}
    first = Run("02_norms", **values).measure("norms", watched)
    again = Run("02_norms", **values, shown=2).measure(
        "norms", watched
    )  # what is drawn does not decide what is measured
    assert MADE == list(first) == [PICO, PICO4]
    assert first[PICO].sizes["image"] == 2
    for name, array in first.items():
        xr.testing.assert_identical(array.drop_attrs(), again[name].drop_attrs())
    assert sorted(p.name for p in (stored / "02_norms").iterdir()) == [f"norms.{PICO4}.nc", f"norms.{PICO}.nc"]
    kept = cache.load_dataset(stored / "02_norms" / f"norms.{PICO}.nc").attrs
    assert kept["code"] == cache.code_hash(__name__) == json.loads(kept["key"])["code"]
    assert json.loads(kept["key"])["function"] == "watched"
    Run("02_norms", **values | {"count": 3}).measure("norms", watched)
    Run("02_norms", **values | {"count": 3, "seed": 1}).measure("norms", watched)
    Run("02_norms", **values | {"count": 3, "seed": 1, "size": 64}).measure("norms", watched)
    assert MADE == [PICO, PICO4] * 4


def test_measured_anew_for_other_keywords(stored: Path) -> None:
    """A keyword that changes is another question: it must not be answered with the former's norms."""
    run = Run("02_norms", models=[PICO], count=2, device="cpu")
    norms = [run.measure("norms", watched, layers=[n])[PICO] for n in (-1, 3, -1, -1)]
    assert [int(a.layer[0]) for a in norms] == [8, 3, 8, 8]
    xr.testing.assert_equal(norms[0], norms[2])
    assert len(MADE) == 3
    found = [run.measure("norms", watched, times=level)[PICO] for level in (1.0, 2.0)]
    assert np.allclose(found[1], 2 * found[0])


def test_measured_anew_by_another_function_or_code(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run("02_norms", models=[PICO], count=2, device="cpu")
    one = run.measure("norms", capture.norms)[PICO]
    two = run.measure("norms", norms_at)[PICO]
    assert (one.dims, two.dims) == (("image", "layer", "token"), ("image", "token"))
    run.measure("norms", watched)
    run.measure("norms", watched)
    monkeypatch.setattr(cache, "code_hash", lambda module=None: f"other code of {module}")
    run.measure("norms", watched)
    assert len(MADE) == 2


def test_only_named_functions_measure(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run("02_norms", models=[PICO], count=2, device="cpu")
    level = 2.0

    def closed(backbone: Backbone, images: Images) -> xr.DataArray:
        return level * capture.norms(backbone, images)

    for function, name in (
        (lambda b, p: level * capture.norms(b, p), "<lambda>"),
        (closed, "closed"),
    ):
        message = problem(run.measure, "norms", function)
        assert f"measure takes a function of a module, not {name}," in message
        assert "put it into a file of the library, and pass what varies as keywords of measure" in message
    for function, name in (
        (partial(watched, times=2.0), "partial"),
        (Counted().norms, "Counted.norms"),
        (Counted, "Counted"),
        (len, "len"),
    ):
        message = problem(run.measure, "norms", function)
        assert f"measure takes a function of a module, not {name}:" in message
        assert "pass what it is bound to as keywords of measure" in message
    assert "not plain, which other values can change unseen" in problem(run.measure, "norms", Counted.plain)
    monkeypatch.setattr(watched, "__module__", "__main__")
    assert "measure takes a function of a module, not watched" in problem(run.measure, "norms", watched)
    assert not stored.exists()


class Counted:
    """Holds functions that are none of a module."""

    def norms(self, backbone: Backbone, images: Images) -> xr.DataArray:
        return capture.norms(backbone, images)

    @staticmethod
    def plain(backbone: Backbone, images: Images) -> xr.DataArray:
        return capture.norms(backbone, images)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"layers": range(2)}, "layers of watched must be plain, so that results can be kept by it"),
        ({"layers": [np.int64(1)]}, "layers of watched must be plain"),
        ({"times": {1: 2}}, "times of watched must be plain"),
        ({"times": lambda: 1}, "times of watched must be plain"),
        ({"tims": 1}, "watched of tests.test_chapters: got an unexpected keyword argument 'tims'"),
    ],
)
def test_only_plain_keywords_that_fit(stored: Path, keywords: dict, message: str) -> None:
    run = Run("02_norms", models=[PICO], count=2, device="cpu")
    assert message in problem(run.measure, "norms", watched, **keywords)
    assert MADE == []


def test_measured_anew_with_other_weights(stored: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(registry.ZOO / PICO / "weights.safetensors")
    save_file({**state, "cls_token": state["cls_token"] + 1}, tmp_path / "w.safetensors")
    values = {"models": [PICO], "count": 2, "device": "cpu"}
    one = Run("02_norms", **values).measure("norms", watched)[PICO]
    two = Run("02_norms", **values, weights=[str(tmp_path / "w.safetensors")]).measure("norms", watched)[PICO]
    assert not np.allclose(one, two)
    assert MADE == [PICO, PICO]


def test_images_of_a_chapter(stored: Path) -> None:
    run = Run("04_redundant_patches", models=[PICO], count=3, size=64, seed=5, device="cpu")
    backbone = run.backbones[PICO]
    truth = scenes.render(3, 64, seed=5, first=2**41)
    shown = run.preview(backbone, 2)
    assert shown.shape == (2, 64, 64, 3)
    assert np.array_equal(shown, truth.pixels[:2].permute(0, 2, 3, 1).numpy())
    share = run.background(backbone)
    corners = [(y, x) for y in range(0, 64, 8) for x in range(0, 64, 8)]
    by_hand = [[(m[y : y + 8, x : x + 8] == 0).float().mean() for y, x in corners] for m in truth.semantic]
    assert np.allclose(share, by_hand)
    message = problem(Run("02_norms", models=[PICO], size=100, device="cpu").measure, "norms", watched)
    assert "the nearest that fits is 96x96" in message


def test_photographs_are_prepared_for_the_published_network() -> None:
    """As its own evaluation does, which keeps 0.9 of the side, though nothing of its weights is at hand."""
    run = Run("16_test_time_registers", published=["deit_tiny_patch16_224+tt1"])
    prepared = Preparation(crop=0.9, interpolation="bicubic")
    shown = images.open_images("photographs", size=224, preparation=prepared)
    expected = next(shown.pixels(2)).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(run.photographs(2), expected)


def test_images_without_masks_have_no_background(stored: Path, tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "images").mkdir()
    Image.new("RGB", (96, 96)).save(tmp_path / "images" / "a.png")
    run = Run("04_redundant_patches", models=[PICO], images=str(tmp_path / "images"), device="cpu")
    assert run.background(run.backbones[PICO]) is None


def test_provenance_tells_of_everything(stored: Path) -> None:
    run = Run("02_norms", models=[PICO], count=2, device="cpu")
    page = run.provenance()
    weights = json.loads((registry.ZOO / PICO / "recipe.json").read_text())["weights"]
    assert weights[:16] in page.facts[f"weights of {PICO}"]
    assert page.facts["device"] == "cpu"
    assert page.facts["parameter count"] == "2"
    assert {"code", "commit", "date", "torch", "timm"} <= page.facts.keys()
    assert page._repr_html_().startswith('<details class="provenance">')
    assert all(f"<th>{k}</th>" in page._repr_html_() for k in page.facts)
    assert "<b>" not in chapter.Provenance({"<b>": "<b>"})._repr_html_()
    assert f"code: {cache.code_hash()}" in repr(page)


def test_results_go_to_build_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VITREGS_RESULTS", raising=False)
    assert Run("02_norms", device="cpu").folder == paths.ROOT / "build" / "results" / "02_norms"


def test_colours_of_patches_are_those_of_the_scenes() -> None:
    run = Run("03_when_outliers_appear", models=[PICO], count=3, size=64, seed=5, device="cpu")
    found = run.colours(run.backbones[PICO])
    truth = scenes.render(3, 64, seed=5, first=2**41)
    assert found.shape == (3, 64)
    for i in range(3):
        for p in range(64):
            y, x = divmod(p, 8)
            ranks = truth.instances[i, y * 8 : y * 8 + 8, x * 8 : x * 8 + 8].flatten().long().bincount(minlength=7)
            rank = int(ranks.argmax())
            assert found[i, p] == (-1 if rank == 0 else int(truth.objects[i, rank - 1, 1]))


@pytest.mark.parametrize("chapter", parameters.names())
def test_papermill_lists_every_parameter(chapter: str) -> None:
    """It leaves out what has an equals sign in its comment or default, and then calls it unknown."""
    import papermill

    seen = papermill.inspect_notebook(str(paths.ROOT / "notebooks" / f"{chapter}.ipynb"))
    assert set(seen) == set(parameters.chapter_parameters(chapter))


def test_some_published_networks_and_the_photographs_they_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run("10_object_discovery", models=[PICO], published=["deit_tiny_patch16_224", "deit_tiny_patch16_224+tt1"])
    monkeypatch.setattr(networks, "read", lambda network, name, **_: f"{name} of {network}")
    assert list(run.published("corloc")) == run.values["published"]
    assert run.published("corloc", of=["deit_tiny_patch16_224"]) == {
        "deit_tiny_patch16_224": "corloc of deit_tiny_patch16_224"
    }
    network = registry.wrap(timm.create_model("deit_tiny_patch16_224", pretrained=False))
    seen = next(networks.open_set("photographs", network, "").pixels(2)).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(run.photographs(2), seen)
    with pytest.raises(InputError, match="timm knows no mae-pico"):
        networks.photographs("mae-pico", 1)
