"""Published networks measured once: stored, read without weights, held to a fresh measurement, refused where they do not fit."""

import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from vitregs import cache
from vitregs.claims import networks
from vitregs.cli import main
from vitregs.errors import InputError
from vitregs.models import capture, registry

DEIT = "deit_tiny_patch16_224"
STORED = sorted(networks.FOLDER.glob("*/*.nc"))


def measured(folder: Path, name: str = "norms_on_photographs") -> Path:
    vit = registry.load("supervised-pico", device="cpu")
    ((found, path),) = networks.measure_all(vit, {}, only=[name], folder=folder)
    assert found == name
    return path


def test_what_is_measured_is_read_without_the_network(tmp_path: Path) -> None:
    path = measured(tmp_path)
    vit = registry.load("supervised-pico", device="cpu")
    fresh = capture.norms(vit, networks.open_set("photographs", vit, ""))
    read = networks.read("supervised-pico", "norms_on_photographs", folder=tmp_path)
    assert read.dtype == np.float32
    np.testing.assert_allclose(read.values, fresh.values, rtol=2e-3)
    assert xr.open_dataset(path, engine="h5netcdf")["value"].dtype == np.float16
    before = path.read_bytes()
    measured(tmp_path)  # nothing to do
    assert path.read_bytes() == before


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    path = measured(tmp_path)
    with pytest.raises(
        InputError, match=r"nothing stored of peak of supervised-pico in .*vitregs measure supervised-pico"
    ):
        networks.read("supervised-pico", "peak", folder=tmp_path)
    with pytest.raises(InputError, match="unknown array of published networks 'normes'"):
        networks.read("supervised-pico", "normes", folder=tmp_path)
    with pytest.raises(InputError, match="was measured with other weights"):
        networks.read("supervised-pico", "norms_on_photographs", weights="0" * 64, folder=tmp_path)
    other = registry.random("vit_tiny_patch16_224", depth=2, img_size=32)
    other.name = "supervised-pico"
    with pytest.raises(InputError, match="was measured with other weights"):
        list(networks.measure_all(other, {}, only=["norms_on_photographs"], folder=tmp_path))
    with pytest.raises(InputError, match="peak is measured on coco: give its folder"):
        list(networks.measure_all(other, {}, only=["peak"], folder=tmp_path))
    data = cache.load_dataset(path)
    key = json.loads(data.attrs["key"]) | {"function": "another.module"}
    cache.save_dataset(data.assign_attrs(key=json.dumps(key)), path)
    with pytest.raises(InputError, match="was measured with another function than today's"):
        networks.read("supervised-pico", "norms_on_photographs", folder=tmp_path)


def test_the_command_tells_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["measure", "supervised-pico", "--only", "normes", "--out", str(tmp_path)]) == 2
    assert main(["measure", "supervised-pico", "--coco", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "unknown array of published networks 'normes'" in said[0]


@pytest.mark.parametrize("path", STORED, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_stored_arrays_are_read_and_name_a_clean_commit(path: Path) -> None:
    networks.read(path.parent.name, path.stem)
    commit = cache.load_dataset(path).attrs["commit"]
    assert commit
    assert "+" not in commit


def test_stored_arrays_are_light() -> None:
    assert STORED
    assert sum(p.stat().st_size for p in STORED) < 30e6


@pytest.mark.parametrize("ending", ["", "+tt1"])
def test_a_fresh_measurement_is_what_is_stored(ending: str, shared_data: Path) -> None:
    weights = shared_data / "deit-tiny" / f"{DEIT}.safetensors"
    vit = registry.load(f"{DEIT}{ending}", weights=weights, device="cpu")
    pixels = next(networks.open_set("coco", vit, str(shared_data / "coco-256")).pixels(8))
    stored = networks.read(vit.name, "norms", weights=vit.weights).isel(image=slice(8))
    fresh = capture.norms(vit, pixels)
    np.testing.assert_allclose(fresh.values, stored.values, rtol=3e-3)
