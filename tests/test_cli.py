"""The command line: what it prints, and how it says no. Every mistake is one line, exit code 2, nothing written."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import vitregs
from vitregs import cache, paths, report
from vitregs.book import execute, parameters
from vitregs.cli import main
from vitregs.measure.fingerprint import VERDICTS
from vitregs.models import registry
from vitregs.train import evaluation, loop, schedules

PICO = "supervised-pico"
WEIGHTS = registry.ZOO / PICO / "weights.safetensors"

Fails = Callable[..., str]


def tree(folder: Path) -> dict[str, bytes | None]:
    """All that lies in a folder, with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fails(here: Path, capfd: pytest.CaptureFixture[str]) -> Fails:
    """Run a command that must fail: words, folders that a failed run may make → what it says."""

    def run(*words: str | Path, made: tuple[str, ...] = ()) -> str:
        before = {k: v for k, v in tree(here).items() if k not in made}
        capfd.readouterr()
        assert main([str(w) for w in words]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith("vitregs: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1, err
        assert {k: v for k, v in tree(here).items() if k not in made} == before
        return err

    return run


# --- words


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "required: command"),
        ("rnu 2", "unknown command 'rnu': did you mean 'run'?"),
        ("diagnose", "required: model"),
        ("diagnose supervised-pico --imags x", "unknown argument '--imags': did you mean '--images'?"),
        ("diagnose supervised-pico --imag x", "unknown argument '--imag': did you mean '--images'?"),
        ("train supervised-pico --devise cpu", "unknown argument '--devise': did you mean '--device'?"),
        ("--jsn", "unknown argument '--jsn'"),
        ("diagnose supervised-pico --count 2 --count 3", "--count is given twice"),
        ("diagnose supervised-pico --json=maybe", "--json takes bool, not 'maybe'"),
        ("models a b", "unknown argument 'b'"),
        ("run nroms", "did you mean '02_norms'?"),
        ("run 77", "unknown chapter '77'"),
        ("run --count 3 2", "name the chapter first"),
        ("run 2 --modls supervised-pico", "unknown parameter of 02_norms 'modls': did you mean 'models'?"),
        ("run 2 --res x", "unknown parameter of 02_norms 'res'"),
        ("run 2 4", "'4' stands alone"),
        ("run 2 --count ten", "count takes int, not 'ten'"),
        ("run 2 --count 2.5", "count takes int, not '2.5'"),
        ("run 2 --count", "count takes one value, not 0"),
        ("run 2 --count 3 4", "'4' stands alone"),
        ("run 2 --count=", "count takes int, not ''"),
        ("run 2 --count 1e2", "count takes int, not '1e2'"),
        ("run 2 --count 0", "count must lie within 1 to 100000, not 0"),
        ("run 2 --count=-3", "count must lie within 1 to 100000, not -3"),
        ("run 2 --models", "models must name at least one model"),
        ("run 2 --models supervised-pika", "did you mean 'supervised-pico'?"),
        ("run 2 --models vit_smal_patch16_224", "did you mean 'vit_small_patch16_224'?"),
        ("run 2 --models vit_small_patch16_224.dinoo", "did you mean 'vit_small_patch16_224.dino'?"),
        ("run 2 --models resnet50", "resnet50 is not a plain ViT"),
        ("run 2 --models supervised-pico resnet50", "resnet50 is not a plain ViT"),
        ("run 2 --models supervised-pico,supervised-pico", "names supervised-pico twice"),
        ("run 2 --models supervised-pico --weights a b", "2 weight files for 1 models"),
        ("run 2 --models supervised-pico --weights nowhere.pth", "no weight file at nowhere.pth"),
        ("run 2 --images ./nowhere", "no folder or file ./nowhere"),
        ("run 2 --device cdua", "device 'cdua' is not available"),
        ("run 2 --out result.html", "--out must end in .ipynb, not result.html"),
        ("diagnose vit_smal_patch16_224", "did you mean 'vit_small_patch16_224'?"),
        ("diagnose resnet50", "resnet50 is not a plain ViT"),
        ("diagnose supervised-pico+zero8+tt1", "a name takes one ending only, not +zero8+tt1"),
        ("diagnose deit_tiny_patch16_224+tt1+zero8", "a name takes one ending only, not +tt1+zero8"),
        ("diagnose supervised-pico --size 100", "the nearest that fits is 96x96"),
        ("diagnose supervised-pico --size 96 100", "not a multiple of the patch size 8"),
        ("diagnose supervised-pico --size 1 2 3", "--size takes a side, or height and width"),
        ("diagnose supervised-pico --size 0", "not a multiple of the patch size"),
        ("diagnose supervised-pico --count 0", "--count must be 1 or more"),
        ("diagnose supervised-pico --count many", "--count takes int, not 'many'"),
        ("diagnose supervised-pico --count 2.5", "--count takes int, not '2.5'"),
        ("diagnose supervised-pico --cutoff x", "--cutoff takes float, not 'x'"),
        ("diagnose supervised-pico --size 96 x", "--size takes int, not '96 x'"),
        ("diagnose supervised-pico --seed -1", "--seed must be 0 or more"),
        ("diagnose supervised-pico --batch 0", "--batch must be 1 or more"),
        ("diagnose supervised-pico --plot norms.doc", "--plot writes .png, .svg or .pdf, not '.doc'"),
        ("diagnose supervised-pico --images ./nowhere", "no folder or file ./nowhere"),
        ("diagnose supervised-pico --images x.parquet", "no folder or file x.parquet"),
        ("diagnose supervised-pico --weights nowhere.safetensors", "no weight file at nowhere.safetensors"),
        ("diagnose supervised-pico --count 1", "144 norms are too few"),
        ("diagnose supervised-pico --count 2 --cutoff=-3", "a cut-off must be positive"),
        ("train supervised-pika", "did you mean 'supervised-pico'?"),
        ("train supervised-pico stepz=3", "did you mean 'steps'?"),
        ("train supervised-pico steps=many", "steps takes int, not 'many'"),
        ("train supervised-pico image_size=33", "image size 33 is not a multiple of the patch size 8"),
        ("train clip-pico images=x", "unknown recipe setting 'images'"),
        ("train clip-pico --images ./nowhere", "no folder or file ./nowhere"),
        ("train dinov2-pico image_size=16 local_size=8", "of 4 patches is none"),
        ("train mae-pico masked=1", "masked must leave some of 64 patches visible"),
        ("train mae-pico-reg", "did you mean 'mae-pico'?"),
        ("train mae-pico --minutes many", "--minutes takes float, not 'many'"),
        ("train supervised-pico steps=1 --device cdua", "device 'cdua' is not available"),
    ],
)
def test_wrong_words(fails: Fails, monkeypatch: pytest.MonkeyPatch, words: str, message: str) -> None:
    monkeypatch.setattr(execute, "run_chapter", checked(parameters.check))
    assert message in fails(*words.split())


def checked(check: Callable) -> Callable:
    """A run that ends when all is checked, so that a mistake that slips through costs no time."""

    def execute(chapter: str, values: dict, *_rest: Path) -> None:
        check(chapter, values)
        pytest.fail("nothing was found wrong")

    return execute


def test_help_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["diagnose", "--help"], ["train", "-h"], ["run", "2", "-h"]):
        assert main(words) == 0
        assert capsys.readouterr().out.startswith("Usage: vitregs")
    for words in (["run"], ["run", "-h"], ["run", "--help"]):
        assert main(words) == 0
        out = capsys.readouterr().out
        assert all(name in out for name in parameters.names())
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == vitregs.__version__


@pytest.mark.parametrize("chapter", parameters.names())
def test_help_of_a_chapter_lists_its_parameters(chapter: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", chapter, "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "--out PATH: " in out
    for p in parameters.chapter_parameters(chapter).values():  # the help of a parameter states its range or choices
        kind = "STR..." if p.type is list else p.type.__name__.upper()
        names = f"--{p.name}" + (f", --{p.name.replace('_', '-')}" if "_" in p.name else "")
        assert f"{names} {kind}: {' '.join(p.help.split())} [default: {p.default!r}]" in out


def test_help_and_mistakes_come_without_torch() -> None:
    code = """
import sys
import tempfile
from vitregs.cli import main
given = ["", "--help", "diagnose -h", "rnu", "diagnose a --count 0", "run", "run norms --help", "run norms --cout 3"]
codes = [main(words.split()) for words in given]
print(codes, sorted({"torch", "timm", "numpy", "pandas"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[2, 0, 0, 2, 2, 0, 0, 2] []\n")


def test_models_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    words = capsys.readouterr().out.split()
    assert {PICO, "supervised-pico-reg4", "vit_large_patch14_reg4_dinov2", "deit3_small_patch16_224"} <= set(words)
    assert "resnet50" not in words
    assert main(["models", "reg4_dinov2"]) == 0
    listed = [line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert len(listed) >= 4
    assert all("reg4_dinov2" in name for name in listed)
    assert main(["models", "no such name"]) == 0
    footer = capsys.readouterr().out
    assert all(word in footer for word in ("vitregs models PART", ".lvd142m", "+tt1", "+zero8"))


def test_summaries_of_commands_are_whole_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "  measure: Store what chapters draw of a published network." in lines


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line][:2] == [PICO, "clip-pico"]
    assert "--list" in lines[-1]


def test_a_reader_who_has_seen_enough() -> None:
    """As with `vitregs models | head -0`: the command ends in silence."""
    code = """
import os, sys
from vitregs.models import registry
from vitregs.cli import main
registry.published = lambda: tuple("vit" * 30 for _ in range(3000))  # more than a pipe holds
os.write(1, b"ready")
sys.exit(main(["models"]))
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout.read(5) == b"ready"
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 0


# --- diagnose


def test_diagnose(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[object] = []
    real = report.norms.plot_diagnosis
    monkeypatch.setattr(report.norms, "plot_diagnosis", lambda found: drawn.append(found) or real(found))
    assert main(["diagnose", PICO, "--count", "4", "--device", "cpu", "--plot", "deep/norms.png", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["model"] == PICO
    assert facts["image_count"] == 4
    assert facts["size"] == [96, 96]
    assert [row["layer"] for row in facts["layers"]] == list(range(9))
    assert facts["verdict"] in VERDICTS
    with Image.open(here / "deep" / "norms.png") as image:
        assert min(image.size) > 300
    assert [p.name for p in (here / "deep").iterdir()] == ["norms.png"]
    assert drawn[0].facts() == {**facts, "size": (96, 96)}
    assert main(["diagnose", PICO, "--count", "2", "--size", "64", "96", "--device", "cpu", "--cutoff", "1e6"]) == 0
    text = capsys.readouterr().out
    assert f"{PICO} (zoo, supervised) on 2 images of scenes at 64x96" in text
    assert "verdict: " in text
    assert "fixed at 1e+06" in text


def test_weights_that_cannot_be_used(here: Path, fails: Fails) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return Path.touch, (here / "sprung",)

    def ask(name: str) -> str:
        return fails("diagnose", PICO, "--count", "2", "--device", "cpu", "--weights", name)

    state = load_file(WEIGHTS)
    (here / "cut.safetensors").write_bytes(WEIGHTS.read_bytes()[:-1000])
    assert "the file is damaged" in ask("cut.safetensors")
    torch.save(state, here / "cut.pth")
    (here / "cut.pth").write_bytes((here / "cut.pth").read_bytes()[:-1000])
    assert "the file is damaged" in ask("cut.pth")
    save_file({**state, "cls_token": torch.zeros(1, 1, 95)}, here / "wide.safetensors")
    assert "'cls_token' has shape (1, 1, 95), not (1, 1, 96)" in ask("wide.safetensors")
    save_file({k: v for k, v in state.items() if "blocks.7" not in k}, here / "short.safetensors")
    assert "12 tensors are missing, 'blocks.7.attn.proj.bias' first" in ask("short.safetensors")
    assert "does not fit" in ask(str(registry.ZOO / f"{PICO}-reg4" / "weights.safetensors"))
    torch.save({"model": Trap()}, here / "trap.pth")
    assert "holds code besides tensors, which is never run" in ask("trap.pth")
    assert not (here / "sprung").exists()
    bad = state["blocks.3.mlp.fc1.weight"].clone()
    bad[0, 0] = torch.nan
    save_file({**state, "blocks.3.mlp.fc1.weight": bad}, here / "nan.safetensors")
    assert "gives values that are not finite" in ask("nan.safetensors")


def test_no_network(fails: Fails, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here / "hub"))
    message = fails("diagnose", "test_vit.r160_in1k", "--device", "cpu")
    assert "cannot fetch the weights of test_vit.r160_in1k from the hub (no network" in message
    assert "--weights" in message
    message = fails("diagnose", PICO, "--device", "cpu", "--images", "some/pictures")
    assert "cannot load images from 'some/pictures'" in message


@pytest.mark.filterwarnings("default:skipped")
def test_images_that_cannot_be_used(here: Path, fails: Fails, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "empty").mkdir()
    (here / "notes").mkdir()
    (here / "notes" / "a.txt").write_text("no image")
    for folder in ("empty", "notes"):
        assert f"no images in {folder}" in fails("diagnose", PICO, "--device", "cpu", "--images", folder)
        assert f"no images in ./{folder}" in fails("run", "2", "--images", f"./{folder}")
        assert f"no images in {folder}" in fails("run", "2", "--images", folder)
    (here / "mixed").mkdir()
    (here / "mixed" / "bad.png").write_bytes(b"\x89PNG not really")
    assert "not one image of mixed can be decoded (1 tried)" in fails("diagnose", PICO, "--images", "mixed")
    for i in range(2):
        noise = np.random.default_rng(i).integers(0, 255, (96, 96, 3), np.uint8)
        Image.fromarray(noise).save(here / "mixed" / f"{i}.png")
    assert main(["diagnose", PICO, "--device", "cpu", "--images", "mixed", "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["skipped"] == ["bad.png"]
    assert json.loads(out)["image_count"] == 2
    assert err.startswith("vitregs: skipped 1 of 3 images of mixed that cannot be decoded: bad.png")
    assert err.count("\n") == 1


def test_a_plot_that_cannot_be_written_is_found_before_the_work(
    here: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "file").write_text("in the way")
    (here / "folder.png").mkdir()
    words = ("diagnose", PICO, "--count", "2", "--device", "cpu", "--plot")
    with monkeypatch.context() as patch:
        patch.setattr(registry, "load", lambda *_, **__: pytest.fail("work was begun"))
        assert "cannot write file/norms.png: file is no folder" in fails(*words, "file/norms.png")
        assert "cannot write file/a/b/norms.png: file is no folder" in fails(*words, "file/a/b/norms.png")
        assert "cannot write folder.png: it is a folder" in fails(*words, "folder.png")
        patch.setattr(os, "access", lambda *_: False)
        assert "cannot write deep/norms.png: no right to write in" in fails(*words, "deep/norms.png")


def test_a_plot_that_fails_leaves_the_report(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "old.png").write_bytes(b"the old plot")

    class Figure:
        def savefig(self, spare: Path, **_how: object) -> None:
            Path(spare).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(report.norms, "plot_diagnosis", lambda _found: Figure())
    assert main(["diagnose", PICO, "--count", "2", "--device", "cpu", "--json", "--plot", "old.png"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["model"] == PICO
    assert err == "vitregs: cannot write old.png: No space left on device\n"
    assert tree(here) == {"old.png": b"the old plot"}


@pytest.mark.filterwarnings("default:--cutoff")
def test_a_cutoff_below_the_median_is_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["diagnose", PICO, "--count", "2", "--device", "cpu", "--json", "--cutoff"]
    assert main([*words, "1e6"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    medians = [row["median"] for row in json.loads(out)["layers"]]
    middle = sorted(medians)[4]
    assert main([*words, repr(middle)]) == 0
    err = capsys.readouterr().err
    above = ", ".join(str(i) for i, m in enumerate(medians) if m > middle)
    assert err == (
        f"vitregs: --cutoff {middle:g} lies below the median norm of layers {above}: "
        "most patches count as outliers there\n"
    )


def test_one_image(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (200, 150, 3), np.uint8)
    for name in ("photo.PNG", "other.png"):
        Image.fromarray(noise).save(here / name)
    assert main(["diagnose", PICO, "--images", "photo.PNG", "--size", "192", "--device", "cpu", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["image_count"] == 1
    assert facts["images"] == "photo.PNG"


def test_an_address_keeps_its_slashes(fails: Fails, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    assert "s3://bucket/images is an address" in fails(
        "diagnose", PICO, "--device", "cpu", "--images", "s3://bucket/images"
    )


# --- train


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Words for a training of two steps."""
    for name, value in {"WATCHED": 4, "SCORED": 8, "QUERIES": 8, "BANK": 8}.items():
        monkeypatch.setattr(loop, name, value)
    monkeypatch.setattr(evaluation, "PROBED", 24)
    return ("train", PICO, "steps=2", "batch=2", "image_size=32", "--device", "cpu", "--out", "net")


def test_train(here: Path, quick: tuple[str, ...], fails: Fails, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(quick) == 0
    out = capfd.readouterr().out.splitlines()
    name = f"{PICO}-steps2-batch2-image_size32"
    assert [line.split("  ")[0] for line in out] == [f"{name} step 0/2", f"{name} step 2/2", "net"]
    assert "belongs to another recipe" in fails(*quick, "lr=1e-4")
    assert main(["train", "--restart", *quick[1:], "lr=1e-4"]) == 0
    assert json.loads((here / "net" / "recipe.json").read_text())["recipe"]["lr"] == 1e-4


def test_train_stops_in_time_and_goes_on(here: Path, quick: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*quick, "--minutes", "1e-9"]) == 0
    assert "stopped in time at step 1" in capfd.readouterr().out.splitlines()[-1]
    assert not (here / "net" / "weights.safetensors").exists()
    assert main(quick) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "net"


def test_the_list_of_wanted_runs(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--list"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "wanted     vitregs train tinyimagenet-tiny --device cuda"
    (here / "runs" / "tinyimagenet-tiny").mkdir(parents=True)
    (here / "runs" / "tinyimagenet-tiny" / "checkpoint.pt").touch()
    assert main(["train", "--list"]) == 0
    assert capfd.readouterr().out.splitlines()[0].startswith("begun ")
    (here / "runs" / "tinyimagenet-tiny" / "recipe.json").touch()
    assert main(["train", "--list"]) == 0
    assert capfd.readouterr().out.splitlines()[0].startswith("done ")


def test_training_that_cannot_go_on(
    here: Path, quick: tuple[str, ...], fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "net").mkdir()
    (here / "net" / "checkpoint.pt").write_bytes(b"PK\x03\x04 half")
    assert "is damaged or no checkpoint" in fails(*quick)
    (here / "net" / "checkpoint.pt").unlink()
    (here / "file").write_text("in the way")
    assert "cannot write results in file/net" in fails(*quick[:-1], "file/net")
    monkeypatch.setattr(loop, "line", lambda *_: pytest.fail("nothing was to be reported"))

    def full(_state: object, spare: Path) -> None:
        spare.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert "cannot write net/checkpoint.pt: No space left on device" in fails(*quick)


def test_ctrl_c(here: Path, quick: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    def press(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(schedules, "apply", press)
    assert main(quick) == 130
    assert capsys.readouterr().err == "vitregs: stopped\n"
    assert [p.name for p in (here / "net").iterdir()] == ["checkpoint.pt"]


def test_settings_before_and_behind_options(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple] = []
    monkeypatch.setattr(loop, "train", lambda chosen, **how: seen.append((chosen.steps, chosen.lr, how["minutes"])))
    for words in (
        ["mae-pico", "steps=3", "lr=1e-4", "--minutes", "5"],
        ["--minutes", "5", "mae-pico", "steps=3", "lr=1e-4"],
        ["mae-pico", "steps=3", "--minutes=5", "--eager", "lr=1e-4"],
    ):
        assert main(["train", *words]) == 0
    assert seen == [(3, 1e-4, 5.0)] * 3


# --- run: a chapter that can be told to fail, to be killed, or to wait


FAKE = {
    "parameters": """\
count: int = 2  # numbers [1, 9]
part_of_it: float = 0.5  # of no use [0.25, 0.75]
loud: bool = False  # of no use either
how: str = "well"  # what happens {well, problem, error, death, wait}
images: str = "scenes"  # images
names: list = []  # of no use
""",
    "work": """\
import os, time
from pathlib import Path
import xarray as xr
from vitregs import cache
from vitregs.errors import InputError
folder = Path(os.environ["VITREGS_RESULTS"]) / "07_fake"

def slowly():
    (folder / "kernel").write_text(str(os.getpid()))
    time.sleep(600 if how == "wait" else 0)
    return xr.Dataset({"a": ("x", [1.0] * count)})

cache.stored(folder / "first.nc", lambda: xr.Dataset({"a": ("x", [1.0] * count)}), key={"count": count})
if how == "problem":
    raise InputError("the images\\n are wrong")
if how == "error":
    1 / 0
if how == "death":
    os._exit(9)
print(float(cache.stored(folder / "second.nc", slowly, key={"count": count})["a"].sum()))
""",
}


@pytest.fixture
def fake(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one chapter that needs no model: → the folder."""
    book = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    )
    for name, text in FAKE.items():
        cell = nbformat.v4.new_code_cell(text, id=name)
        cell.metadata["tags"] = ["parameters"] if name == "parameters" else []
        book.cells.append(cell)
    folder = tmp_path_factory.mktemp("notebooks")
    nbformat.write(book, folder / "07_fake.ipynb")
    monkeypatch.setattr(parameters, "NOTEBOOKS", folder)
    return folder


RUN = ("run", "fake", "--out", "made/out.ipynb", "--results", "kept")


def test_run(here: Path, fake: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = (fake / "07_fake.ipynb").read_bytes()
    environment = dict(os.environ)
    assert main([*RUN, "--count", "3", "--part-of-it=0.25", "--loud", "true"]) == 0
    out, err = capfd.readouterr()
    assert out == "made/out.ipynb\n"
    assert err == ""
    book = nbformat.read(here / "made" / "out.ipynb", as_version=4)
    nbformat.validate(book)
    assert [c.id for c in book.cells if c.id in FAKE] == ["parameters", "work"]
    assert book.cells[-1].outputs[0].text == "3.0\n"
    assert {"count = 3", "part_of_it = 0.25", "loud = True"} <= set(book.cells[1].source.splitlines())
    assert "papermill" not in book.metadata
    assert sorted(p.name for p in (here / "kept" / "07_fake").iterdir()) == ["first.nc", "kernel", "second.nc"]
    assert [p.name for p in (here / "made").iterdir()] == ["out.ipynb"]
    assert (fake / "07_fake.ipynb").read_bytes() == given
    assert dict(os.environ) == environment


@pytest.mark.parametrize(
    ("words", "given"),
    [
        (["--count", "007"], {"count": 7}),
        (["--count=3"], {"count": 3}),
        (["--part-of-it", "1e-2"], {"part_of_it": 0.01}),
        (["--part_of_it", "3"], {"part_of_it": 3.0}),
        (["--loud", "true"], {"loud": True}),
        (["--loud=False"], {"loud": False}),
        (["--how", "12"], {"how": "12"}),
        (["--names", "a", "b"], {"names": ["a", "b"]}),
        (["--names", "a,b", "c"], {"names": ["a", "b", "c"]}),
        (["--names", "a", "--names", "b"], {"names": ["a", "b"]}),
        (["--names", "f", ""], {"names": ["f", ""]}),
        (["--names", "[1]"], {"names": ["[1]"]}),
        (["--names"], {"names": []}),
        (["--names", "one, file.pth", "f,g"], {"names": ["one, file.pth", "f", "g"]}),
        (["--names", "a@one, file.pth", "b@"], {"names": ["a@one, file.pth", "b@"]}),
        (["--count", "-3", "--how", "true"], {"count": -3, "how": "true"}),
        ([], {}),
    ],
)
def test_words_become_values(
    here: Path, fake: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], given: dict
) -> None:
    (here / "one, file.pth").touch()
    seen: list[tuple] = []
    monkeypatch.setattr(execute, "run_chapter", lambda *facts: seen.append(facts))
    assert main(["run", "fake", *words]) == 0
    assert seen == [("07_fake", given, paths.BUILD / "runs" / "07_fake.ipynb", paths.BUILD / "results")]
    assert [type(v) for v in seen[0][1].values()] == [type(v) for v in given.values()]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--part-of-it 0.8", "part_of_it must lie within 0.25 to 0.75, not 0.8"),
        ("--part_of_it nan", "part_of_it must lie within"),
        ("--part_of_it x", "part_of_it takes float, not 'x'"),
        ("--loud 1", "loud takes bool, not '1'"),
        ("--loud", "loud takes one value, not 0"),
        ("--part_of_it much", "part_of_it takes float, not 'much'"),
        ("--count 1.0", "count takes int, not '1.0'"),
        ("--how wel", "unknown how 'wel': did you mean 'well'?"),
        ("--count 2 --part 0.5", "unknown parameter of 07_fake 'part'"),
    ],
)
def test_wrong_values(fake: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch, words: str, message: str) -> None:
    monkeypatch.setattr(execute, "run_chapter", checked(parameters.check))
    assert message in fails(*RUN, *words.split())


def test_a_cell_that_fails_leaves_the_old_notebook(here: Path, fake: Path, fails: Fails) -> None:
    (here / "made").mkdir()
    (here / "made" / "out.ipynb").write_text("the old notebook")
    made = ("kept", "kept/07_fake", "kept/07_fake/first.nc")  # measured before the failure, and whole
    assert fails(*RUN, "--how", "problem", made=made) == "vitregs: 07_fake stopped: the images are wrong\n"
    message = fails(*RUN, "--how", "error", made=made)
    assert message == "vitregs: 07_fake stopped: ZeroDivisionError: division by zero\n"
    message = fails(*RUN, "--how", "death", made=made)
    assert message == "vitregs: 07_fake stopped: its kernel was killed, perhaps for want of memory\n"


def test_folders_that_cannot_be_written(here: Path, fake: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "file").write_text("in the way")
    assert "cannot write results in file" in fails(*RUN[:-1], "file")
    assert "cannot write file/out.ipynb" in fails(*RUN[:3], "file/out.ipynb", *RUN[4:], made=("kept",))

    def deny(**_where: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(cache.tempfile, "TemporaryFile", deny)
        assert "cannot write results in kept: Read-only file system" in fails(*RUN)


def test_a_disk_that_fills_keeps_the_old_notebook(
    here: Path, fake: Path, fails: Fails, monkeypatch: pytest.MonkeyPatch
) -> None:
    import papermill

    def full(_source: str, out: str, *_args: object, **_kw: object) -> None:
        Path(out).write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    (here / "made").mkdir()
    (here / "made" / "out.ipynb").write_text("the old notebook")
    monkeypatch.setattr(papermill, "execute_notebook", full)
    assert "cannot write made/out.ipynb: No space left on device" in fails(*RUN, made=("kept",))


def wait_for(condition: Callable[[], object], seconds: float = 500) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def alive(process: int) -> bool:
    """Whether a process runs; one that nobody has collected yet does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="processes are watched in /proc")
def test_a_killed_run_leaves_what_was_there(here: Path, fake: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(list(RUN)) == 0
    old, marker = tree(here), here / "kept" / "07_fake" / "kernel"
    marker.unlink()
    code = (
        "import sys; from pathlib import Path; from vitregs import cli\n"
        "from vitregs.book import parameters\n"
        "parameters.NOTEBOOKS = Path(sys.argv[1]); sys.exit(cli.main(sys.argv[2:]))"
    )
    words = [*RUN, "--count", "5", "--how", "wait"]
    with subprocess.Popen([sys.executable, "-c", code, str(fake), *words], cwd=here) as child:
        try:
            began = wait_for(lambda: child.poll() is not None or (marker.exists() and marker.read_text()))
        finally:
            child.send_signal(signal.SIGKILL)
    assert began, "the chapter never came to its work"
    assert child.returncode == -signal.SIGKILL
    kernel = int(marker.read_text())
    assert wait_for(lambda: not alive(kernel)), "the kernel outlives its run"
    now = {k: v for k, v in tree(here).items() if not Path(k).name.startswith(".")}
    same = ("made/out.ipynb", "kept/07_fake/second.nc")
    assert {k: now[k] for k in same} == {k: old[k] for k in same}
    assert now.keys() == old.keys()
    assert cache.load_dataset(here / "kept" / "07_fake" / "first.nc").sizes["x"] == 5  # of the new run, and whole
    assert main([*RUN, "--count", "5"]) == 0
    book = nbformat.read(here / "made" / "out.ipynb", as_version=4)
    assert book.cells[-1].outputs[0].text == "5.0\n"
