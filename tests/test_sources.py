"""Which images are used, and what names them: content keys, splits, links, columns by type, brightness, boxes, thin images."""

import os
import struct
import warnings
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xarray as xr
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import get_arch_pretrained_cfgs

from tests.test_images import encode, everything, noise, planted, problem
from vitregs import arrays, report
from vitregs.cache import file_hash, stored
from vitregs.data import decoding, images, sources
from vitregs.data.preparation import Preparation
from vitregs.errors import InputError
from vitregs.models import registry
from vitregs.train import loop
from vitregs.train.recipes import recipe


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def shard(file: Path, count: int, seed: int = 0) -> None:
    """A parquet file of images, as the hub has it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    cells = {"image": [{"bytes": encode(noise(seed=seed + i)), "path": None} for i in range(count)]}
    datasets.Dataset.from_dict(cells, features=datasets.Features({"image": datasets.Image()})).to_parquet(file)


def draw(folder: Path, *names: str, kind: str = "PNG") -> Path:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encode(noise(seed=i), kind))
    return folder


def names(source: Path, **kw: object) -> list[str]:
    return sorted(everything(images.open_images(str(source), size=8, **kw)).names)


# --- keys


@pytest.fixture(params=["folder", "parquet"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """Two sources of the same names and sizes; the second is a darkened copy."""
    rng = np.random.default_rng(0)
    found = tmp_path / "A", tmp_path / "B"
    for source, light in zip(found, (1.0, 0.6), strict=True):
        source.mkdir()
        cells = [
            encode((np.full((16, 16, 3), rng.integers(99, 200)) * light).astype(np.uint8), "BMP") for _ in range(90)
        ]
        if request.param == "folder":
            for i, cell in enumerate(cells):
                (source / f"tile_{i:03}.bmp").write_bytes(cell)
        else:
            table = pa.table({"image": cells})
            pq.write_table(
                table, source / "train.parquet", use_dictionary=False, compression="none", write_statistics=False
            )
    sizes = [[f.stat().st_size for f in sorted(s.iterdir())] for s in found]
    assert sizes[0] == sizes[1]
    return found


def test_a_folder_never_gets_the_numbers_of_another(pair: tuple[Path, Path], tmp_path: Path) -> None:
    def median(folder: Path) -> float:
        source = images.open_images(str(folder), size=16, count=9)
        how = lambda: xr.Dataset({"v": float(np.median([p.median() for p in source.pixels()]))})  # noqa: E731
        return float(stored(tmp_path / "kept.nc", how, key=source.key)["v"])

    light, dark = map(median, pair)
    assert dark < 0.7 * light
    assert median(pair[0]) == light


def test_the_key_is_of_content_and_not_of_place(pair: tuple[Path, Path], tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    before = images.open_images(str(pair[0]), size=16).key
    pair[0].rename(moved)
    assert images.open_images(str(moved), size=16).key == before
    file = sorted(moved.iterdir())[0]
    data, stat = bytearray(file.read_bytes()), file.stat()
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a copy that keeps times
    assert images.open_images(str(moved), size=16).key != before


def test_a_parquet_file_exchanged_under_the_same_time_is_read_anew(tmp_path: Path) -> None:
    """The cache of `datasets` knows files by path and time alone."""
    file = tmp_path / "set" / "a.parquet"
    shard(file, 3, seed=0)
    stat, old = file.stat(), images.open_images(str(file), size=8)
    first, key = next(old.pixels(8)), old.fingerprint
    shard(file, 5, seed=50)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    new = images.open_images(str(file), size=8)
    second = next(new.pixels(8))
    assert new.fingerprint != key
    assert len(second) == 5
    assert not np.array_equal(second[:3], first)


def test_only_what_is_drawn_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "set", *(f"{i}.png" for i in range(9)))
    read, real = [], file_hash
    monkeypatch.setattr(sources, "file_hash", lambda file: read.append(file) or real(file))
    source = images.open_images(str(tmp_path / "set"), size=8, count=3)
    assert not read
    first = source.key
    assert len(read) == 3
    assert images.open_images(str(tmp_path / "set"), size=8, count=3).key == first
    assert len(read) == 3  # files that did not change are read once


def test_training_does_not_go_on_with_another_folder(pair: tuple[Path, Path], tmp_path: Path, monkeypatch) -> None:
    for what in ("WATCHED", "SCORED", "QUERIES", "BANK"):
        monkeypatch.setattr(loop, what, 8)
    chosen = recipe("mae-pico").override(
        size="femto", image_size=16, patch_size=8, batch=8, steps=2, warmup=1, name="t"
    )
    options = {"out": tmp_path / "run", "device": "cpu", "compiled": False, "report": lambda _line: None}
    loop.train(chosen, images=str(pair[0]), **options)
    with pytest.raises(InputError, match="belongs to another recipe"):
        loop.train(chosen, images=str(pair[1]), **options)


# --- which images are used


@pytest.mark.parametrize(
    ("files", "split", "expected"),
    [
        (["0000.parquet", "0001.parquet", "0002.parquet"], None, 12),
        (["shard_00000.parquet", "shard_00001.parquet"], None, 8),
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-0.parquet"], "train", 8),
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-0.parquet"], None, 4),
        (["split=validation/0.parquet", "split=train/0.parquet", "split=train/1.parquet"], None, 4),
        (["split=validation/0.parquet", "split=train/0.parquet", "split=train/1.parquet"], "train", 8),
        (["my_train_images.parquet", "my_val_images.parquet"], "val", 4),
        (["birds-00000-of-00002.parquet", "birds-00001-of-00002.parquet"], "birds", 8),
    ],
)
def test_shards(tmp_path: Path, files: list[str], split: str | None, expected: int) -> None:
    for i, file in enumerate(files):
        shard(tmp_path / "set" / file, 4, seed=10 * i)
    got = everything(images.open_images(str(tmp_path / "set"), size=8, split=split))
    assert len(got.pixels) == expected
    assert f"has no split{'s, so no' * (not sources.split_names(tmp_path / 'set'))} 'nosuch'" in problem(
        tmp_path / "set", split="nosuch"
    )


def test_every_format_that_can_be_read(tmp_path: Path) -> None:
    kinds = {"a.avif": "AVIF", "b.jp2": "JPEG2000", "c.jfif": "JPEG", "d.ppm": "PPM", "e.pgm": "PPM", "f.webp": "WEBP"}
    (tmp_path / "set").mkdir()
    for name, kind in kinds.items():
        image = Image.fromarray(noise())
        (tmp_path / "set" / name).write_bytes(encode(image.convert("L") if name == "e.pgm" else image, kind))
    assert names(tmp_path / "set") == sorted(kinds)


def test_links_are_followed_and_hidden_files_are_not_used(tmp_path: Path) -> None:
    draw(tmp_path / "store", "cat/1.png", "dog/2.png")
    root = draw(tmp_path / "set", ".ipynb_checkpoints/1.png", "__MACOSX/cat/1.png", ".hidden.png")
    for name in ("cat", "dog"):
        (root / name).symlink_to(tmp_path / "store" / name)
    (tmp_path / "store" / "cat" / "loop").symlink_to(root)
    got = everything(images.open_images(str(root), size=8))
    assert sorted(zip(got.names, got.labels, strict=True)) == [("cat/1.png", "cat"), ("dog/2.png", "dog")]


def test_what_is_passed_over_is_named(tmp_path: Path) -> None:
    draw(tmp_path / "set", "a.png")
    for name in ("clip.mp4", "raw.nef", "notes.txt"):
        (tmp_path / "set" / name).write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"passed over 2 files in .* cannot be used as images: clip.mp4, raw.nef$"):
        found = images.open_images(str(tmp_path / "set"), size=8)
    assert found.passed == ["clip.mp4", "notes.txt", "raw.nef"]
    (tmp_path / "set" / "a.png").unlink()
    assert "no images in" in problem(tmp_path / "set")


def test_splits_of_a_folder(tmp_path: Path) -> None:
    root = draw(tmp_path / "set", "train/cat/1.png", "train/dog/2.png", "val/cat/3.png")
    got = everything(images.open_images(str(root), size=8, split="train"))
    assert sorted(zip(got.names, got.labels, strict=True)) == [("cat/1.png", "cat"), ("dog/2.png", "dog")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images.open_images(str(root), size=8, split="val")
    with pytest.warns(UserWarning, match="has splits: val is taken, not train"):
        assert len(images.open_images(str(root), size=8).source.files) == 1
    assert "has no split 'test', only train, val" in problem(root, split="test")
    assert sources.split_names(root) == ["val", "train"]
    draw(root, "birds/4.png")  # now these are classes
    assert len(names(root)) == 4
    assert "has no splits, so no 'train'" in problem(root, split="train")


def test_one_file_is_one_image(tmp_path: Path) -> None:
    draw(tmp_path, "photo.jpg", kind="JPEG")
    assert names(tmp_path / "photo.jpg") == ["photo.jpg"]
    assert everything(images.open_images(str(tmp_path / "photo.jpg"), size=8)).labels == [None]


def test_an_address_keeps_its_slashes() -> None:
    assert "s3://bucket/images is an address" in problem("s3://bucket/images")


# --- columns


def table(file: Path, **columns: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file)
    return file


@pytest.mark.parametrize("column", ["pixel_values", "photo", "Image"])
@pytest.mark.parametrize("struct_", [False, True])
def test_images_are_found_by_type(tmp_path: Path, column: str, struct_: bool) -> None:
    cells = [encode(noise(seed=i)) for i in range(3)]
    printed = [{"bytes": c, "path": None} for c in cells] if struct_ else cells
    file = table(tmp_path / "p.parquet", blob=[b"no image"] * 3, annotation=["a cat"] * 3, **{column: printed})
    source = images.open_images(str(file), size=(20, 30))
    got = everything(source)
    assert source.source.column == column
    assert len(got.pixels) == 3
    assert got.masks == [None] * 3
    assert "no image column 'annotation': its image columns are" in problem(file, image_column="annotation")
    with pytest.raises(InputError, match="not one image"):
        everything(images.open_images(str(file), size=8, image_column="blob"))


def test_images_beside_a_table(tmp_path: Path) -> None:
    draw(tmp_path / "set", "1.jpg", "2.jpg", kind="JPEG")
    table(tmp_path / "set" / "metadata.parquet", file_name=["1.jpg", "2.jpg"], text=["a", "b"])
    with pytest.warns(UserWarning, match="passed over 1 file .*metadata.parquet"):
        assert names(tmp_path / "set") == ["1.jpg", "2.jpg"]


# --- brightness


def png16(values: np.ndarray, bits: int | None = None) -> bytes:
    """A PNG of 16 bits, grey or RGB, which may say how many are significant."""
    depth = 1 if values.ndim == 2 else 3
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 0 if depth == 1 else 2, 0, 0, 0)
    printed = chunk(b"sBIT", bytes([bits] * depth)) if bits else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + printed
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def brightest(folder: Path, **kw: object) -> dict[str, float]:
    got = everything(images.open_images(str(folder), size=(20, 30), **kw))
    return {name: float(pixels.max()) for name, pixels in zip(got.names, got.pixels, strict=True)}


@pytest.mark.parametrize("colour", [False, True])
def test_12_bits_in_16(tmp_path: Path, colour: bool) -> None:
    ramp = np.linspace(0, 4095, 600).reshape(20, 30)
    ramp = np.stack([ramp] * 3, -1) if colour else ramp
    (tmp_path / "a.png").write_bytes(png16(ramp))
    (tmp_path / "b.png").write_bytes(png16(ramp / 2))
    with pytest.warns(UserWarning, match=r"nearly black: .* [56].\d % of 65535; .* full_scale"):
        assert max(brightest(tmp_path).values()) < 0.07
    fixed = brightest(tmp_path, full_scale=4095)
    assert fixed == pytest.approx({"a.png": 1, "b.png": 0.5}, abs=0.07)
    if not colour:
        (tmp_path / "a.png").write_bytes(png16(ramp, 12))  # the file says it
        (tmp_path / "b.png").write_bytes(png16(ramp / 2, 12))
        assert brightest(tmp_path) == pytest.approx({"a.png": 1, "b.png": 0.5}, abs=0.01)
        (tmp_path / "a.png").write_bytes(png16(ramp * 16, 12))  # scaled to 16 bits, as the PNG specification wants it
        assert brightest(tmp_path)["a.png"] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("top", [1.0, 1.01, 1.2])
def test_floats_have_one_range(tmp_path: Path, top: float) -> None:
    """An image whose maximum is 1.01 is no image of 255 levels, and a dark one no brighter than it is."""
    for name, share in (("a.tif", 1.0), ("b.tif", 0.5)):
        ramp = np.linspace(0, top * share, 600, dtype=np.float32).reshape(20, 30)
        (tmp_path / name).write_bytes(encode(Image.fromarray(ramp), "TIFF"))
    assert brightest(tmp_path) == pytest.approx({"a.tif": 1, "b.tif": top / 2}, abs=0.005)
    for name, share in (("a.tif", 255), ("b.tif", 0.9)):  # the second is nearly black beside the first
        Image.fromarray(np.full((20, 30), share, np.float32)).save(tmp_path / name)
    assert brightest(tmp_path) == pytest.approx({"a.tif": 1, "b.tif": 1 / 255}, abs=0.005)


# --- boxes


def boxed(file: Path, boxes: list[list[float]]) -> Path:
    features = datasets.Features(
        {"image": datasets.Image(), "bbox": datasets.List(datasets.List(datasets.Value("float32")))}
    )
    cells = {"image": [{"bytes": encode(planted(20, 30, (5, 8, 15, 24))), "path": None}], "bbox": [boxes]}
    datasets.Dataset.from_dict(cells, features=features).to_parquet(file)
    return file


def test_box_formats(tmp_path: Path) -> None:
    corners, coco = boxed(tmp_path / "a.parquet", [[8, 5, 28, 15]]), boxed(tmp_path / "b.parquet", [[20, 5, 10, 15]])
    assert everything(images.open_images(str(corners), size=(20, 30))).boxes[0].tolist() == [[5, 8, 15, 28]]
    assert everything(images.open_images(str(coco), size=(20, 30), box_format="xywh")).boxes[0].tolist() == [
        [5, 20, 20, 30]
    ]
    with pytest.raises(InputError, match=r"are not xyxy: .* has \(20, 5, 10, 15\); try box_format='xywh'"):
        everything(images.open_images(str(coco), size=(20, 30)))
    with pytest.raises(InputError, match=r"are not xywh: .* try box_format='xyxy'"):
        everything(images.open_images(str(corners), size=(20, 30), box_format="xywh"))
    with pytest.raises(InputError, match="shares of the image"):
        everything(images.open_images(str(boxed(tmp_path / "c.parquet", [[0.1, 0.1, 0.5, 0.5]])), size=(20, 30)))


def test_real_boxes_are_corners(shared_data: Path) -> None:
    coco = shared_data / "coco-256"
    assert sum(map(len, everything(images.open_images(str(coco), size=64)).boxes)) > 128
    with pytest.raises(InputError, match="try box_format='xyxy'"):
        everything(images.open_images(str(coco), size=64, box_format="xywh"))


# --- preparation


def configs() -> list[dict]:
    found = {}
    for name in registry.published():
        for cfg in get_arch_pretrained_cfgs(name).values():
            config = resolve_data_config(pretrained_cfg=cfg.to_dict())
            found[tuple(config[k] for k in ("crop_mode", "interpolation", "crop_pct", "input_size"))] = config
    return list(found.values())


def test_images_are_prepared_as_timm_does() -> None:
    """Over every distinct config of the names that are accepted, to one grey level."""
    every = configs()
    assert len(every) >= 25
    assert {c["crop_mode"] for c in every} >= {"center", "squash"}
    images = [Image.fromarray(noise(*shape)) for shape in ((301, 417), (520, 133))]
    border = [{**c, "crop_mode": "border", "interpolation": i} for c in every[:3] for i in ("bicubic", "bilinear")]
    for config in every + border:
        theirs = create_transform(**config, is_training=False, normalize=False)
        for image in images:
            ours = np.asarray(Preparation.of(config).apply(image, config["input_size"][1:])[0], int)
            gap = np.abs(ours.transpose(2, 0, 1) - theirs(image).numpy().astype(int)).max()
            assert gap <= 1, (config, image.size)


def test_a_model_carries_its_preparation() -> None:
    squashed = registry.random("vit_small_patch16_lingbot.robbyant")
    assert squashed.preparation == Preparation(1.0, "squash", "bilinear")
    assert squashed.size == (512, 512)
    assert registry.random("vit_tiny_patch16_224", img_size=384).size == (384, 384)  # timm's config still says 224


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
def test_masks_and_boxes_follow(mode: str, shape: tuple[int, int]) -> None:
    height, width = shape
    box = (height // 4, width // 4, height // 2, 3 * width // 4)
    image = planted(height, width, box)
    mask = {"bytes": encode((image[..., 0] // 255 * 7).astype(np.uint8))}
    source = images.Images("x", (48, 64), None, 0, Preparation(0.9, mode, "bilinear", (9, 9, 9)), None)
    item = sources.Item("a", encode(image), boxes=[[box[1], box[0], box[3], box[2]]], mask=mask)
    _, pixels, _, boxes, labels = source._prepare(item)
    seen = np.argwhere(labels == 7)
    assert np.abs(np.array([*seen.min(0), *(seen.max(0) + 1)]) - boxes[0]).max() <= 1.6
    bright = np.argwhere(pixels[0].numpy() > 0.5)
    assert np.abs(np.array([*bright.min(0), *(bright.max(0) + 1)]) - boxes[0]).max() <= 1.6


@pytest.mark.parametrize("shape", [(1, 30000), (30000, 1), (40, 900)])
@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_thin_images_are_cropped_first(shape: tuple[int, int], mode: str) -> None:
    how = Preparation(0.9, mode)
    image = Image.fromarray(noise(*shape))
    got = how.apply(image, (64, 64))[0]
    assert got.size == (64, 64)
    if min(shape) > 1 and mode == "center":  # still what timm makes of it
        theirs = create_transform(
            (3, 64, 64), is_training=False, interpolation="bicubic", crop_pct=0.9, normalize=False
        )
        gap = np.asarray(got, int).transpose(2, 0, 1) - theirs(image).numpy().astype(int)
        assert np.abs(gap).max() <= 1


def test_thin_images_need_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *a, **k: made.append(size) or real(self, size, *a, **k)
    )
    Preparation().apply(Image.fromarray(noise(1, 30000)), (224, 224))
    assert made == [(224, 224)]


def test_large_images_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "set", "small.png")
    (tmp_path / "set" / "large.png").write_bytes(encode(noise(60, 60)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.warns(UserWarning, match=r"large.png of .* is very large \(60 x 60 pixels\)"):
        assert len(names(tmp_path / "set")) == 2
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.warns(UserWarning, match=r"skipped 1 of 2 images .* large.png \(of more than"):
        assert names(tmp_path / "set") == ["small.png"]
    assert decoding.decode(tmp_path / "set" / "small.png").size == (30, 20)


# --- images without masks


def test_images_without_masks_leave_the_others_theirs() -> None:
    """A table of parts is the same as without the images that have no mask."""
    rng = np.random.default_rng(0)
    kinds = arrays.token_coords(["cls"] + ["patch"] * 6, (2, 3))
    a = xr.DataArray(rng.random((8, 1, 2, 1, 7)), dims=("image", "layer", "head", "query", "token"), coords=kinds)
    background = rng.choice([0, 0.5, 1], (8, 6))
    background[[1, 4]] = np.nan
    there = np.isfinite(background).all(1)
    whole, part = (
        report.attention.attention({"m": x}, {"m": g}) for x, g in ((a, background), (a[there], background[there]))
    )
    assert whole[1:].equals(part[1:])
    assert whole["mean"].notna().all()
    marked = (a[:, 0, 0, 0] > 0.5).drop_vars("layer", errors="ignore")
    whole, part = (
        report.tokens.shares({"m": (x, "")}, {"m": g})
        for x, g in ((marked, background), (marked[there], background[there]))
    )
    assert whole["share"].equals(part["share"])
    assert whole["tokens"].sum() == there.sum() * 6
