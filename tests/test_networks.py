"""Published networks: measured once on planted images, read without weights, held against a fresh measurement."""

import io
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import xarray as xr
from PIL import Image

from tests.test_chapters import problem, write
from vitregs import cache, cli, paths
from vitregs.book import parameters
from vitregs.book.chapter import Run
from vitregs.claims import networks
from vitregs.claims.networks import Entry
from vitregs.data import images, sources
from vitregs.data.datasets import open_parts
from vitregs.measure import lost
from vitregs.models import capture, registry
from vitregs.models.backbone import Backbone

PICO, OTHER, SIDE = "supervised-pico", "supervised-pico-reg4", 96
STORED = sorted((f.parent.name, f.stem) for f in networks.FOLDER.glob("*/*.nc"))


@pytest.fixture(scope="module", autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def png(values: np.ndarray) -> dict[str, object]:
    file = io.BytesIO()
    Image.fromarray(values).save(file, format="PNG")
    return {"bytes": file.getvalue(), "path": None}


def plant(folder: Path, split: str, count: int, seed: int) -> None:
    """Noise with a bright object (class 5) in the upper left quarter, and sky (class 119) in the lower half."""
    rng = np.random.default_rng(seed)
    rows: dict[str, list[object]] = {"image": [], "mask": [], "boxes": [], "name": []}
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[: SIDE // 2, : SIDE // 2], mask[SIDE // 2 :] = 5, 119
    for i in range(count):
        pixels = rng.integers(0, 128, (SIDE, SIDE, 3), np.uint8)
        pixels[mask == 5] += 100
        rows["image"].append(png(pixels))
        rows["mask"].append(png(mask))
        rows["boxes"].append([[0.0, 0.0, SIDE / 2, SIDE / 2]])
        rows["name"].append(f"{split} {i}")
    kinds = {"image": datasets.Image(), "mask": datasets.Image(), "name": datasets.Value("string")}
    kinds["boxes"] = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))
    datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).to_parquet(folder / f"{split}-0.parquet")


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coco")
    plant(folder, "train", 4, 0)
    plant(folder, "validation", 2, 1)
    return folder


@pytest.fixture(scope="module")
def vit() -> Backbone:
    return registry.load(PICO, device="cpu")


@pytest.fixture(scope="module")
def source(coco: Path, vit: Backbone) -> images.Images:
    return networks.open_set("coco", vit, str(coco))


@pytest.fixture(scope="module")
def kept(coco: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command leaves of a network on planted images."""
    out = tmp_path_factory.mktemp("published")
    words = [
        "measure",
        PICO,
        "--coco",
        str(coco),
        "--out",
        str(out),
        "--device",
        "cpu",
        "--only",
        "norms",
        "background",
    ]
    assert cli.main([*words, "corloc"]) == 0
    return out


# --- image sets


def test_the_training_part_comes_first(source: images.Images) -> None:
    names = [name for batch in source.batches() for name in batch.names]
    assert [name.split()[0] for name in names] == ["train"] * 4 + ["validation"] * 2
    assert source.count == 256


def test_what_is_no_object_is_background(source: images.Images, coco: Path, vit: Backbone) -> None:
    assert {k for batch in source.batches() for m in batch.masks if m is not None for k in np.unique(m)} == {0, 5}
    share = source.background(vit.grid(source.size))
    assert share is not None
    assert share.mean(0).tolist() == ([0.0] * 6 + [1.0] * 6) * 6 + [1.0] * 72
    plain = images.open_images(coco, size=SIDE, split="train")
    assert {k for b in plain.batches() for m in b.masks if m is not None for k in np.unique(m)} == {0, 5, 119}
    assert plain.key != replace(plain, last_object=91).key


def test_a_chain_is_its_parts(coco: Path) -> None:
    def opened(**options: object) -> list[images.Images]:
        return list(open_parts(str(coco), ("train", "test"), size=SIDE, seed=3, **options))  # type: ignore[arg-type]

    parts = opened(counts=(2, 1))
    joined = images.chain(parts)
    assert joined.count == 3
    expected = np.concatenate([next(p.pixels(9)) for p in parts])
    np.testing.assert_array_equal(next(joined.pixels(9)), expected)
    assert joined.key == images.chain(opened(counts=(2, 1))).key
    others = [images.chain(opened(counts=c)) for c in ((3, 1), (2, 2), (None, None))]
    assert len({j.fingerprint for j in [joined, *others, images.chain(parts[::-1])]}) == 5
    assert others[-1].count is None
    assert [i.name for i in sources.Chain([(parts[0].source, 2)]).items(1, 3)] == [next(parts[0].batches()).names[0]]  # type: ignore[list-item]


def test_parts_that_do_not_fit(coco: Path) -> None:
    train = images.open_images(coco, size=SIDE, split="train")
    assert "scenes are one stream" in problem(images.chain, [train, images.open_images("scenes", size=SIDE)])
    for other in (replace(train, size=(64, 64)), replace(train, seed=1), replace(train, last_object=3)):
        assert "differ in more than their images" in problem(images.chain, [train, other])


# --- measured and read


def test_what_is_read_is_what_was_measured(kept: Path, vit: Backbone, source: images.Images) -> None:
    fresh = capture.norms(vit, source)
    stored = networks.read(PICO, "norms", folder=kept)
    assert isinstance(stored, xr.DataArray)
    assert stored.dtype == np.float32  # squares of half precision overflow at 256
    assert cache.load_dataset(networks.path(PICO, "norms", kept))["value"].dtype == np.float16
    np.testing.assert_allclose(stored, fresh, rtol=1e-3)
    assert stored.dims == fresh.dims
    assert list(stored["kind"].values) == list(fresh["kind"].values)
    share = networks.read(PICO, "background", folder=kept)
    np.testing.assert_array_equal(share, source.background(vit.grid(source.size)))


def test_what_is_kept_is_not_measured_again(
    kept: Path, vit: Backbone, source: images.Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = networks.read(PICO, "norms", folder=kept)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "save_dataset", lambda *_: 1 / 0)
        assert before.equals(networks.measure("norms", vit, source, folder=kept))
    file = networks.path(PICO, "norms", kept)
    time = file.stat().st_mtime_ns
    networks.measure("norms", vit, replace(source, seed=5), folder=kept)  # other images
    assert file.stat().st_mtime_ns > time
    networks.measure("norms", vit, source, folder=kept)


def test_where_it_comes_from(kept: Path, vit: Backbone, source: images.Images, coco: Path) -> None:
    attrs = cache.load_dataset(networks.path(PICO, "norms", kept)).attrs
    key = json.loads(attrs["key"])
    assert key["weights"] == vit.weights
    assert key["images"] == source.fingerprint
    assert (key["network"], key["function"], key["set"]) == (PICO, "vitregs.models.capture.norms", "coco")
    assert key["code"] == attrs["code"] == cache.code_hash("vitregs.models.capture")
    assert {"commit", "date", "torch", "timm"} <= attrs.keys()
    assert not any(str(coco) in str(value) for value in attrs.values())
    assert vit.weights[:16] in networks.origin(PICO, kept)
    assert attrs["commit"] in networks.origin(PICO, kept)


def test_numbers_beyond_half_precision_stay_as_they_are() -> None:
    data = xr.Dataset(
        {"far": ("x", np.float32([1, 7e4])), "near": ("x", np.float32([1, np.nan])), "n": ("x", [1, 70_000])}
    )
    narrow = data.map(networks._narrow)
    assert [narrow[k].dtype for k in ("far", "near", "n")] == [np.float32, np.float16, np.int64]
    wide = networks._widen(narrow)
    np.testing.assert_array_equal(wide["far"], data["far"])
    assert wide["near"].dtype == np.float32


def test_every_row_can_be_kept_by_its_name() -> None:
    from vitregs.book.chapter import _check_function

    for name, entry in networks.ENTRIES.items():
        _check_function(entry.function, entry.keywords)
        assert entry.images in networks.IMAGE_SETS, name
        assert json.loads(json.dumps(networks._request(name, PICO))) == networks._request(name, PICO), name


# --- object discovery under every setting


def test_settings_are_those_of_the_steps(vit: Backbone, source: images.Images) -> None:
    """Equal, rule by rule, to what is measured alone; how much a box covers from its corners."""
    found = lost.by_setting(vit, source, biases=[-0.1])
    truth = lost.ground_truth_boxes(source)
    assert found["setting"].values.tolist() == ["bias 0", "centred", "length 1, centred", "length 1, bias -0.1"]
    ways = [{"bias": 0.0}, {"bias": "centre"}, {"bias": "centre", "normalise": True}, {"bias": -0.1, "normalise": True}]
    for which in lost.PROJECTIONS:
        features = capture.projections(vit, source, which=which)
        for name, way in zip(found["setting"].values, ways, strict=True):
            box = lost.lost(features, patch_size=vit.patch_size, **way)["box"]
            at = found.sel(projection=which, setting=name)
            np.testing.assert_array_equal(at["hit"], lost.corloc(box, truth, size=source.size)["hit"])
            y0, x0, y1, x1 = box.values.T
            np.testing.assert_allclose(at["covered"], (y1 - y0) * (x1 - x0) / SIDE**2, rtol=1e-6)
    np.testing.assert_array_equal(found["baseline"], lost.baselines(truth, source.size))
    assert (found["baseline"].sel(rule="whole image") == 0).all()  # the object is a quarter of it


# --- mistakes


def test_arrays_that_are_not_there(kept: Path) -> None:
    message = problem(networks.read, PICO, "similarity", folder=kept)
    assert "nothing stored of similarity" in message
    assert f"vitregs measure {PICO} --only similarity --coco FOLDER" in message
    assert "did you mean 'norms'" in problem(networks.read, PICO, "norm", folder=kept)
    assert networks.origin("nobody", kept) == "none"


def test_arrays_of_other_weights(kept: Path, coco: Path, vit: Backbone, capsys: pytest.CaptureFixture[str]) -> None:
    assert "other weights than these (abc)" in problem(networks.read, PICO, "norms", weights="abc", folder=kept)
    networks.read(PICO, "norms", weights=vit.weights, folder=kept)
    other = replace(vit, weights="f" * 64)
    message = problem(lambda: list(networks.measure_all(other, {"coco": str(coco)}, only=["norms"], folder=kept)))
    assert "was measured with other weights" in message
    assert "delete it, or choose another folder" in message


def test_arrays_of_another_table(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = networks.path(OTHER, "norms", tmp_path)
    moved.parent.mkdir()
    moved.write_bytes(networks.path(PICO, "norms", kept).read_bytes())
    assert "measured with another network than today's" in problem(networks.read, OTHER, "norms", folder=tmp_path)
    cache.save_dataset(xr.Dataset({"value": 1.0}), moved)
    assert "another what and network" in problem(networks.read, OTHER, "norms", folder=tmp_path)
    moved.write_bytes(b"not netCDF")
    assert "cannot read results" in problem(networks.read, OTHER, "norms", folder=tmp_path)
    changed = {**networks.ENTRIES, "norms": Entry(capture.norms, "coco", {"layers": [1]}, half=True)}
    monkeypatch.setattr(networks, "ENTRIES", changed)
    assert "measured with another keywords than today's" in problem(networks.read, PICO, "norms", folder=kept)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--only", "norm"], "unknown array of published networks 'norm': did you mean 'norms'?"),
        (["--only", "norms"], "norms is measured on coco: give its folder"),
        (["--coco", "nowhere"], "no folder nowhere with coco"),
        (["--coco", "{empty}", "--only", "norms"], "no images in"),
        (["--weights", "nowhere"], "nowhere"),
    ],
)
def test_what_the_command_cannot_do(
    words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    given = [w.format(empty=tmp_path / "empty") for w in words]
    assert cli.main(["measure", PICO, "--out", str(tmp_path / "out"), *given]) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == 1
    assert list((tmp_path / "out").rglob("*.nc")) == []


def test_places() -> None:
    assert networks.places(["weights=a=b", "coco=/c"]) == ("a=b", {"coco": "/c"})
    assert networks.places([]) == (None, {})
    assert "'coco' names no place" in problem(networks.places, ["coco"])
    assert "did you mean 'cifar10'" in problem(networks.places, ["cifar=x"])


# --- in a chapter


def test_a_chapter_draws_what_is_stored_or_measures_it_anew(
    kept: Path, coco: Path, vit: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "01_a", f'published: list = ["{PICO}"]\nafresh: list = []\ndevice: str = "cpu"')
    monkeypatch.setattr(parameters, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(networks.read, "__kwdefaults__", {"weights": None, "folder": kept})
    monkeypatch.setenv("VITREGS_RESULTS", str(tmp_path / "results"))
    with monkeypatch.context() as patch:
        patch.setattr(registry, "load", lambda *_a, **_k: 1 / 0)  # no weights are needed
        stored = Run("01_a").published("norms")
    assert list(stored) == [PICO]
    assert not (tmp_path / "results").exists()
    run = Run("01_a", afresh=[f"coco={coco}"])
    fresh = run.published("norms")
    assert networks.path(PICO, "norms", tmp_path / "results" / "published").is_file()
    xr.testing.assert_equal(fresh[PICO], stored[PICO])
    assert vit.weights[:16] in run.provenance().facts[f"published network {PICO}"]
    assert "names no place" in problem(Run, "01_a", afresh=["coco"])
    assert "unknown model" in problem(Run, "01_a", published=["nobody"])


# --- what the repository holds

needs_arrays = pytest.mark.skipif(not STORED, reason="no published network is stored: vitregs measure NETWORK")


@needs_arrays
def test_stored_arrays_are_those_of_the_table() -> None:
    weights: dict[str, set[str]] = {}
    for network, name in STORED:
        networks.read(network, name)
        data = cache.load_dataset(networks.path(network, name))
        weights.setdefault(network.partition("+")[0], set()).add(json.loads(data.attrs["key"])["weights"])
        for word in (tempfile.gettempdir(), str(Path.home()), str(paths.ROOT.parent)):
            assert not any(word in str(v) for v in (*data.attrs.values(), *(c.values for c in data.coords.values())))
    assert sum(networks.path(*at).stat().st_size for at in STORED) < 30e6


@needs_arrays
@pytest.mark.parametrize("network", ["deit_tiny_patch16_224", "deit_tiny_patch16_224+tt1"])
def test_a_fresh_measurement_equals_what_is_stored(network: str, shared_data: Path) -> None:
    """Eight images of COCO: norms at all layers, attention of CLS, similarity of neighbours, within half precision."""
    if (network, "norms") not in STORED:
        pytest.skip(f"nothing of {network} is stored")
    vit = registry.load(network, weights=shared_data / "deit-tiny" / "deit_tiny_patch16_224.safetensors", device="cpu")
    source = networks.open_set("coco", vit, str(shared_data / "coco-256"))
    key = json.loads(cache.load_dataset(networks.path(network, "norms")).attrs["key"])
    assert (key["weights"], key["images"]) == (vit.weights, source.fingerprint)
    few = next(source.pixels(8))
    for name in ("norms", "cls_attention", "similarity"):
        asked = networks.entry(name)
        fresh = asked.function(vit, few, **asked.keywords)
        stored = networks.read(network, name, weights=vit.weights).isel(image=slice(8))
        np.testing.assert_allclose(stored.values, fresh.values, rtol=2e-3, atol=2e-4, err_msg=name)


def test_what_cannot_be_asked_of_a_network_is_said(
    coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["measure", OTHER, "--coco", str(coco), "--out", str(tmp_path), "--device", "cpu", "--only", "neurons"]
    assert cli.main(words) == 2
    assert f"neurons is measured on networks without registers: {OTHER} has 4" in capsys.readouterr().err


def test_a_broken_array_is_measured_anew(coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = networks.path(PICO, "norms", tmp_path)
    broken.parent.mkdir()
    broken.write_bytes(b"half a file")
    words = ["measure", PICO, "--coco", str(coco), "--out", str(tmp_path), "--device", "cpu", "--only", "norms"]
    assert cli.main(words) == 0, capsys.readouterr().err
    assert networks.read(PICO, "norms", folder=tmp_path).sizes["image"] == 6


def test_a_file_damaged_inside_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*_given: object, **_more: object) -> None:
        raise RuntimeError("Unspecified error in H5DSget_num_scales (return value <0)")

    monkeypatch.setattr(cache.xr, "open_dataset", damaged)
    assert "cannot read results" in problem(cache.load_dataset, tmp_path / "norms.nc")
