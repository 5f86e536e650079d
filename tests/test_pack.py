"""Many runs by one command: a pack is written, runs without an installation, and what comes back is filed."""

import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from vitregs import cache
from vitregs.errors import InputError
from vitregs.train import export, pack
from vitregs.train.recipes import recipe

DEIT, SCRATCH = "regrow-kept-reg1", "tinyimagenet-tiny-reg1-steps6-warmup1"
LOG = "# Log\n\n## 2020-01-01: older\n\nWords.\n\n## Waiting for a GPU\n\nThe runs.\n"


def problem(call, *args: object, **more: object) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def encoded(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Images of two classes, a file to train on and one that is none, and weights in DeiT-Tiny's shape."""
    folder = tmp_path_factory.mktemp("sources")
    images = [{"bytes": encoded(i), "path": None} for i in range(160)]
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"):
        pq.write_table(pa.table({"image": images, "label": [i % 2 for i in range(160)]}), folder / f"{name}.parquet")
    net = timm.create_model("deit_tiny_patch16_224", pretrained=False)
    save_file({k: v.half() for k, v in net.state_dict().items()}, folder / "deit.safetensors")
    return {"images": str(folder), "weights": str(folder / "deit.safetensors")}


@pytest.fixture(scope="module")
def packed(sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    arms = [DEIT, "tinyimagenet-tiny-reg1 steps=fit"]
    return pack.pack(**sources, arms=arms, out=tmp_path_factory.mktemp("pack") / ".gpu")


def execute(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script of a pack in a process that knows nothing of this checkout."""
    known = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"} | environment
    call = [sys.executable, str(folder / "run.py"), *words]
    return subprocess.run(call, capture_output=True, text=True, check=False, env=known, cwd=folder.parent, timeout=600)


@pytest.fixture(scope="module")
def back(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a rehearsal leaves."""
    out = tmp_path_factory.mktemp("back")
    words = ["--minutes", "6", "--rehearse", "--device", "cpu", "--weights-of", "tinyimagenet-tiny-reg1"]
    done = execute(packed, "--out", str(out), *words)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith(f"{DEIT}: ")
    for name, steps in ((DEIT, 4), (SCRATCH, 6)):
        assert sum(line.startswith(f"{name} step {steps}/{steps}  loss") for line in lines) == 1
    assert sum("images read at" in line for line in lines) == 2  # once for each side, though four runs saw them
    return out


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data" / "results").mkdir(parents=True)
    (tmp_path / "data" / "results" / "LOG.md").write_text(LOG)
    return tmp_path / "data"


def test_what_travels(packed: Path, sources: dict[str, str]) -> None:
    files = {p.relative_to(packed).as_posix(): p for p in packed.rglob("*") if p.is_file()}
    assert files.keys() == {
        "code.zip",
        "run.py",
        "plan.json",
        "deit.safetensors",
        "images/train-00000-of-00002.parquet",
    }
    assert files["deit.safetensors"].read_bytes() == Path(sources["weights"]).read_bytes()
    inside = zipfile.ZipFile(files["code.zip"]).namelist()
    assert {"lib/vitregs/cli.py", "lib/vitregs/_files/data/paper/claims.csv", "site/kornia/__init__.py"} <= {*inside}
    assert [n for n in inside if "zoo" in n or "/results/" in n or n.endswith(".pyc")] == []
    assert files["code.zip"].stat().st_size < 5e6  # so that 45 MB of images and DeiT-Tiny fit beside it


def test_a_rehearsal_leaves_all_that_a_run_does(back: Path) -> None:
    weights = f"{SCRATCH}.weights.safetensors"
    assert {p.name for p in back.iterdir()} == {pack.HISTORIES, pack.RATES, weights}
    rates = json.loads((back / pack.RATES).read_text())
    assert rates["arms"].keys() == {DEIT, SCRATCH}
    assert all(arm["images_per_second"] > 0 and arm["steps"] == arm["of"] for arm in rates["arms"].values())
    found = rates["rates"]
    assert found["matrix"] > 1e9
    assert found["femto"]["ratio"] == pytest.approx(
        found["femto"]["images_per_second"] / found["femto"]["timm_images_per_second"]
    )
    with zipfile.ZipFile(back / pack.HISTORIES) as archive:
        card = json.loads(archive.read(f"{SCRATCH}/recipe.json"))
    assert card["recipe"]["data"] == "zh-plus/tiny-imagenet"
    assert card["images"]["trained"] == 96
    assert card["weights"] == cache.file_hash(back / weights)


def test_merging(back: Path, data: Path) -> None:
    lines = pack.merge(back, data)
    assert len(lines) == 3
    log = cache.load_dataset(data / "results" / "regrowth" / f"{DEIT}.nc")
    assert log["step"].values.tolist() == [0, 4]
    assert json.loads(log.attrs["recipe"])["init"] == "deit_tiny_patch16_224"
    assert log["registers"].sizes["register"] == 1
    entry = data / "zoo" / SCRATCH
    assert {p.name for p in entry.iterdir()} == {"README.md", "history.nc", "recipe.json", "weights.safetensors"}
    card = json.loads((entry / "recipe.json").read_text())
    assert (entry / "README.md").read_text() == export.describe(card, cache.load_dataset(entry / "history.nc"))
    assert card["provenance"]["commit"] == cache.provenance()["commit"]  # though no repository was there
    text = (data / "results" / "LOG.md").read_text()
    section = text.removeprefix(LOG.split("## Waiting")[0]).removesuffix("## Waiting for a GPU\n\nThe runs.\n")
    assert section.startswith(f"## {card['provenance']['date']}: 2 arms on cpu\n")
    rows = {r.split("|")[1].strip(): r.count("|") for r in section.splitlines() if r.startswith("| ")}
    assert rows[f"`{DEIT}`"] == rows[f"`{SCRATCH}`"] == rows["arm"]
    before = sorted(p.stat().st_mtime_ns for p in data.rglob("*"))
    assert "is there already: move it away" in problem(pack.merge, back, data)
    assert sorted(p.stat().st_mtime_ns for p in data.rglob("*")) == before


def test_an_arm_that_runs_out_of_time(
    packed: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was seen until then is kept and filed, its weights are not; and one that cannot run costs no other."""
    words = [
        "run",
        "--pack",
        str(packed),
        "--out",
        str(tmp_path / "out"),
        "--minutes",
        "0",
        "--rehearse",
        "--device",
        "cpu",
    ]
    arms = ["regrow-zeroed", "hunt-tiny"]  # whose neurons are of other weights
    assert pack.main([*words, "--arms", *arms, "--weights-of", "hunt-tiny"]) == 1
    out = capsys.readouterr().out
    assert "regrow-zeroed failed: InputError: the neuron list" in out
    assert "hunt-tiny has no weights: its steps did not fit into its time" in out
    assert "no time left for the rates" in out
    assert pack.main(["merge", str(tmp_path / "out"), "--data", str(data)]) == 0
    log = cache.load_dataset(data / "results" / "regrowth" / "hunt-tiny.nc")
    assert log["step"].values.tolist() == [0]
    assert log.attrs["commit"] == cache.provenance()["commit"]
    assert not (data / "zoo").exists()
    assert "| `hunt-tiny` | 0 of 4 × 4 |" in (data / "results" / "LOG.md").read_text()


def test_derived_weights_are_never_kept(
    packed: Path, back: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "--pack", str(packed), "--out", str(tmp_path / "out"), "--rehearse", "--weights-of", DEIT]
    assert pack.main(words) == 2
    assert capsys.readouterr().err == (
        f"vitregs: weights of {DEIT} are derived from those of deit_tiny_patch16_224, and are not kept: its history is\n"
    )
    assert not (tmp_path / "out").exists()
    shutil.copytree(back, tmp_path / "back")
    shutil.copy(back / f"{SCRATCH}.weights.safetensors", tmp_path / "back" / f"{DEIT}.weights.safetensors")
    assert "are derived from those of deit_tiny_patch16_224" in problem(pack.merge, tmp_path / "back", data)
    assert [p.name for p in data.rglob("*") if p.is_file()] == ["LOG.md"]


def test_what_came_back_is_checked(back: Path, data: Path, tmp_path: Path) -> None:
    assert "is not what a run leaves (rates.json, histories.zip)" in problem(pack.merge, tmp_path / "none", data)
    other = tmp_path / "back"
    shutil.copytree(back, other)
    file = other / f"{SCRATCH}.weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    assert f"weights of {SCRATCH} are not those of its card" in problem(pack.merge, other, data)
    file.rename(other / "else.weights.safetensors")
    assert "belongs to no arm" in problem(pack.merge, other, data)
    (other / "else.weights.safetensors").unlink()
    rates = json.loads((other / pack.RATES).read_text())
    (other / pack.RATES).write_text(json.dumps({**rates, "arms": {"../../LOG": {}}}))
    assert "names an arm '../../LOG'" in problem(pack.merge, other, data)
    assert (data / "results" / "LOG.md").read_text() == LOG


def test_a_machine_without_packages(packed: Path, tmp_path: Path) -> None:
    """Some are hidden, those that travel along too."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('timm', 'sklearn', 'h5netcdf', 'datasets', 'kornia'):\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Hide())\n"
    )
    done = execute(packed, "--out", str(tmp_path / "out"), PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "vitregs: missing here: timm, sklearn, h5netcdf, datasets, kornia; carry them along as wheels, or install them"
    ]
    assert not (tmp_path / "out").exists()


def test_mistakes_in_packing(sources: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / ".gpu"
    small = {**sources, "arms": [DEIT], "out": out}
    assert "did you mean 'regrow-zeroed'" in problem(pack.pack, **{**small, "arms": ["regrow-zerod"]})
    assert "no weight file" in problem(pack.pack, **{**small, "weights": str(tmp_path / "none")})
    assert "no parquet file in" in problem(pack.pack, **{**small, "images": str(tmp_path)})
    monkeypatch.setattr(pack, "LIMIT", 2**20)
    assert "MiB, more than 1: images 0." in problem(pack.pack, **small)
    assert not out.exists()
    out.mkdir()
    (out / "mine").touch()
    monkeypatch.undo()
    assert "holds something else than a pack" in problem(pack.pack, **small)
    assert (out / "mine").exists()


def test_no_more_files_than_may_come_back() -> None:
    chosen = [pack.Arm(recipe("tinyimagenet-tiny").override(size="small", name=str(i)), False) for i in range(3)]
    pack._check_kept(chosen[:1], [])
    assert "files would come back, more than 8" in problem(pack._check_kept, chosen, [c.recipe for c in chosen])
    assert "which is no arm" in problem(pack._check_kept, chosen, [recipe("hunt-tiny")])
