"""Images from every source: planted answers, every odd file, and nothing decoded before it is needed."""

import io
import socket
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import settings as prove
from hypothesis import strategies as st
from PIL import Image
from timm.data import create_transform

from vitregs import hub
from vitregs.data import decoding, images, scenes, sources
from vitregs.data.preparation import Preparation
from vitregs.errors import InputError

FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP", "tif": "TIFF"}


def noise(height: int = 20, width: int = 30, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encode(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def planted(height: int, width: int, box: tuple[int, int, int, int]) -> np.ndarray:
    """A white rectangle y0, x0, y1, x1 on black."""
    image = np.zeros((height, width, 3), np.uint8)
    image[box[0] : box[2], box[1] : box[3]] = 255
    return image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(7):
        (tmp_path / "images" / ("cat", "dog")[i % 2]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / ("cat", "dog")[i % 2] / f"{i}.png").write_bytes(encode(noise(seed=i)))
    return tmp_path / "images"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def parquet(file: Path, images: list[bytes], **columns: list) -> Path:
    """Write what a hub data set looks like on disk."""
    features = datasets.Features(
        {
            "image": datasets.Image(),
            **({"mask": datasets.Image()} if "mask" in columns else {}),
            **({"boxes": datasets.List(datasets.List(datasets.Value("float32")))} if "boxes" in columns else {}),
            **({"label": datasets.ClassLabel(names=["cat", "dog"])} if "label" in columns else {}),
            **({"name": datasets.Value("string")} if "name" in columns else {}),
        }
    )
    cells = {"image": [{"bytes": p, "path": None} for p in images], **columns}
    if "mask" in columns:
        cells["mask"] = [None if m is None else {"bytes": m, "path": None} for m in columns["mask"]]
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(cells, features=features).to_parquet(file)
    return file


def everything(source: images.Images, batch: int = 4) -> images.Batch:
    parts = list(source.batches(batch))
    joined = {k: [x for p in parts for x in getattr(p, k)] for k in ("names", "labels", "boxes", "masks")}
    return images.Batch(torch.cat([p.pixels for p in parts]), **joined)


# --- sources


def test_scenes_are_the_scenes() -> None:
    got = everything(images.open_images("scenes", size=(16, 24), count=7, seed=3), 3)
    truth = scenes.render(7, (16, 24), seed=3, first=images.FIRST_SCENE)
    assert torch.equal(got.pixels, truth.pixels)
    assert got.labels == truth.label.tolist()
    assert got.names == [f"scene {i}" for i in range(7)]
    for i in range(7):
        assert (got.masks[i] == truth.semantic[i].numpy()).all()
        seen = truth.boxes[i][truth.boxes[i].isfinite().all(1)].numpy()
        assert (got.boxes[i] == seen).all()
    assert next(images.open_images("scenes", size=16, count=2).batches()).truth is not None


def test_folder_names_and_labels(folder: Path) -> None:
    got = everything(images.open_images(str(folder), size=(20, 30)))
    assert sorted(got.names) == sorted(str(Path(("cat", "dog")[i % 2]) / f"{i}.png") for i in range(7))
    for name, label, pixels in zip(got.names, got.labels, got.pixels, strict=True):
        assert label == Path(name).parent.name
        expected = noise(seed=int(Path(name).stem)).astype(np.float32) / 255
        assert np.array_equal(pixels.permute(1, 2, 0).numpy(), expected)


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.jpg").write_bytes(encode(noise(), "JPEG"))
    got = everything(images.open_images(str(tmp_path / "flat"), size=8))
    assert (got.labels, got.names) == ([None], ["a.jpg"])


@pytest.mark.parametrize("as_folder", [False, True])
def test_parquet_carries_all(tmp_path: Path, as_folder: bool) -> None:
    truth = [(5, 8, 15, 24), (0, 0, 10, 30), (12, 3, 18, 9)]
    shown_images = [encode(planted(20, 30, b)) for b in truth]
    masks = [encode((planted(20, 30, b)[..., 0] // 255 * 3).astype(np.uint8)) for b in truth]
    boxes = [[[b[1], b[0], b[3], b[2]]] for b in truth]  # data sets say x first
    file = tmp_path / "set" / "validation-00000-of-00001.parquet"
    parquet(file, shown_images, mask=[masks[0], None, masks[2]], boxes=boxes, label=[0, 1, 1], name=["a", "b", "c"])
    parquet(tmp_path / "set" / "train-00000-of-00001.parquet", [encode(noise())], label=[0])
    source = images.open_images(str(file.parent if as_folder else file), size=(20, 30))
    got = everything(source)
    assert sorted(got.names) == ["a", "b", "c"]
    for name, label, box, mask, pixels in zip(got.names, got.labels, got.boxes, got.masks, got.pixels, strict=True):
        i = "abc".index(name)
        assert label == (0, 1, 1)[i]
        assert box.tolist() == [list(truth[i])]
        assert np.array_equal(pixels[0].numpy(), planted(20, 30, truth[i])[..., 0] / 255)
        if i == 1:
            assert mask is None
        else:
            assert np.array_equal(mask == 3, pixels[0].numpy() == 1)


def test_splits(tmp_path: Path) -> None:
    for name, height in (("train", 10), ("test", 14)):
        parquet(tmp_path / "set" / f"{name}-00000-of-00001.parquet", [encode(noise(height, 12))])
    lone = str(tmp_path / "set")
    assert images.open_images(lone, size=8).source.split == "test"  # held-out images come before those of training
    assert images.open_images(lone, size=8, split="train").source.split == "train"
    with pytest.raises(InputError, match=r"has no split 'dev', only test, train$"):
        images.open_images(lone, size=8, split="dev")


def test_seed_and_count_draw(folder: Path, tmp_path: Path) -> None:
    file = parquet(tmp_path / "p.parquet", [encode(noise(seed=i)) for i in range(7)], name=[str(i) for i in range(7)])
    for source in (str(folder), str(file)):
        draw = lambda **kw: everything(images.open_images(source, size=8, **kw)).names  # noqa: B023, E731
        assert draw(seed=1) == draw(seed=1)
        assert draw(seed=1) != draw(seed=2)
        assert sorted(draw(seed=1)) == sorted(draw(seed=2))
        assert draw(seed=1, count=3) == draw(seed=1)[:3]
        assert len(draw(count=100)) == 7


def test_key_follows_the_pixels(folder: Path) -> None:
    def key(source: str = str(folder), **kw: object) -> dict:
        return images.open_images(source, **{"size": 8, **kw}).key

    assert key() == key()
    others = [
        key(size=9),
        key(seed=1),
        key(count=2),
        key(preparation=Preparation(0.9)),
        key(full_scale=4095),
        key(box_format="xywh"),
        key("scenes"),
        key("scenes", seed=4),
    ]
    (folder / "cat" / "new.png").write_bytes(encode(noise()))
    assert len({repr(k) for k in [key(), *others]}) == 9
    assert all(key() != k for k in others)


@pytest.mark.parametrize("kind", ["scenes", "folder", "parquet"])
@pytest.mark.parametrize("batch", [1, 3, 50])
def test_batch_size_does_not_change_pixels(folder: Path, tmp_path: Path, kind: str, batch: int) -> None:
    source = {"scenes": "scenes", "folder": str(folder), "parquet": str(tmp_path / "p.parquet")}[kind]
    if kind == "parquet":
        parquet(Path(source), [encode(noise(seed=i)) for i in range(7)])
    load = lambda: images.open_images(source, size=(12, 16), count=7, preparation=Preparation(0.8))  # noqa: E731
    whole, parts = everything(load(), 7), list(load().pixels(batch))
    assert torch.equal(torch.cat(parts), whole.pixels)
    assert max(map(len, parts)) == min(batch, 7)
    assert whole.pixels.shape == (7, 3, 12, 16)
    assert whole.pixels.dtype == torch.float32


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_decoding_is_lazy(folder: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = folder if kind == "folder" else parquet(tmp_path / "p.parquet", [encode(noise(seed=i)) for i in range(7)])
    decoded, real = [], decoding.read
    monkeypatch.setattr(decoding, "read", lambda data: decoded.append(1) or real(data))
    stream = images.open_images(str(source), size=8).batches(2)
    assert len(decoded) == 0
    next(stream)
    assert len(decoded) == 2
    next(stream)
    assert len(decoded) == 4


def test_reading_is_lazy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the encoded bytes of a data set are held: rows are read from disk one batch at a time."""
    file = parquet(tmp_path / "p.parquet", [encode(noise(seed=i)) for i in range(40)])
    source = images.open_images(str(file), size=8)
    rows = source.source.items(None, 0)
    taken, real = [], sources.Item
    monkeypatch.setattr(sources, "Item", lambda *a: taken.append(1) or real(*a))
    next(rows)
    assert len(taken) == 1
    next(source.batches(3))
    assert len(taken) == 4


# --- geometry


@prove(max_examples=60)
@given(
    height=st.integers(12, 90),
    width=st.integers(12, 90),
    size=st.tuples(st.integers(8, 60), st.integers(8, 60)),
    crop=st.sampled_from([1.0, 0.9, 0.875]),
    data=st.data(),
)
def test_a_planted_rectangle_stays_in_its_box(height, width, size, crop, data) -> None:
    y0, x0 = data.draw(st.integers(0, height - 6)), data.draw(st.integers(0, width - 6))
    y1, x1 = data.draw(st.integers(y0 + 4, height)), data.draw(st.integers(x0 + 4, width))
    image = planted(height, width, (y0, x0, y1, x1))
    source = images.Images("x", size, None, 0, Preparation(crop), None)
    mask = {"bytes": encode((image[..., 0] // 255 * 7).astype(np.uint8))}
    done = source._prepare(images.Item("a", encode(image), boxes=[[x0, y0, x1, y1]], mask=mask))
    assert done is not None
    _, pixels, _, boxes, labels = done
    assert pixels.shape == (3, *size)
    assert set(np.unique(labels)) <= {0, 7}
    scale = max(size[0] / height, size[1] / width) / crop
    slack = max(1.0, scale) * 0.51 + 0.6  # half a pixel of the coarser grid, and rounding
    white = np.argwhere(labels == 7)
    if len(boxes) == 0:
        assert len(white) == 0 or min(np.ptp(white, 0)) <= 1
        return
    (box,) = boxes
    assert (box >= 0).all()
    assert (box[2:] <= size).all()
    if len(white):
        tight = np.array([*white.min(0), *(white.max(0) + 1)])
        assert abs(tight - box).max() <= slack
    bright = np.argwhere(pixels[0].numpy() > 0.7)
    if len(bright):
        assert (bright >= box[:2] - slack).all()
        assert (bright + 1 <= box[2:] + slack).all()


def test_boxes_outside_the_crop_vanish() -> None:
    image = planted(20, 60, (2, 0, 18, 6))
    source = images.Images("x", (20, 20), None, 0, Preparation(), None)
    _, pixels, _, boxes, _ = source._prepare(images.Item("a", encode(image), boxes=[[0, 2, 6, 18], [25, 2, 55, 18]]))
    assert pixels.max() == 0
    assert boxes.tolist() == [[2, 5, 18, 20]]


@pytest.mark.parametrize("crop", [1.0, 0.95, 0.9, 0.875])
@pytest.mark.parametrize(("height", "width"), [(90, 90), (100, 133), (75, 50), (64, 201)])
def test_square_crops_are_those_of_timm(height: int, width: int, crop: float) -> None:
    image = Image.fromarray(noise(height, width))
    theirs = create_transform((3, 56, 56), is_training=False, interpolation="bicubic", crop_pct=crop, mean=0, std=1)
    ours = np.asarray(Preparation(crop).apply(image, (56, 56))[0], np.float32) / 255
    assert np.array_equal(ours, theirs(image).permute(1, 2, 0).numpy())


# --- odd and broken files


def test_grey_palette_alpha_and_the_like() -> None:
    rgb = noise()
    grey = Image.fromarray(rgb).convert("L")
    assert np.array_equal(np.asarray(decoding.decode(encode(grey))), np.stack([np.asarray(grey)] * 3, -1))
    alpha = Image.fromarray(np.dstack([rgb, np.full(rgb.shape[:2], 99, np.uint8)]))
    assert np.array_equal(np.asarray(decoding.decode(encode(alpha))), rgb)
    palette = Image.fromarray(rgb // 64 * 64).quantize(64)
    assert np.array_equal(np.asarray(decoding.decode(encode(palette))), np.asarray(palette.convert("RGB")))
    clear = encode(palette, transparency=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(np.asarray(decoding.decode(clear)), np.asarray(palette.convert("RGB")))
    bilevel = grey.convert("1")
    assert np.array_equal(np.asarray(decoding.decode(encode(bilevel)))[..., 0] > 0, np.asarray(bilevel))
    cmyk = Image.fromarray(np.full((4, 4, 3), (200, 30, 30), np.uint8)).convert("CMYK")
    assert np.asarray(decoding.decode(encode(cmyk, "TIFF"))).mean((0, 1)) == pytest.approx((200, 30, 30), abs=2)


@pytest.mark.parametrize("top", [200, 65535])
def test_16_bits(top: int) -> None:
    """The dark image is as dark as it says: 200 of 65535 is black."""
    grey = np.linspace(0, top, 600).reshape(20, 30).astype(np.uint16)
    got = np.asarray(decoding.decode(encode(Image.fromarray(grey))))
    assert got.shape == (20, 30, 3)
    assert np.abs(got[..., 1] - grey / 257.0).max() <= 0.5001
    wide = np.asarray(decoding.decode(encode(Image.fromarray(grey.astype(np.int32)), "TIFF")))
    assert np.array_equal(wide, got)


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0])
def test_floats(top: float) -> None:
    grey = np.linspace(0, top, 600, dtype=np.float32).reshape(20, 30)
    got = np.asarray(decoding.decode(encode(Image.fromarray(grey), "TIFF")))
    assert np.abs(got[..., 0] / 255 - grey / top).max() < 0.003
    grey[3, 3] = np.nan
    assert np.asarray(decoding.decode(encode(Image.fromarray(grey), "TIFF")))[3, 3, 0] == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation: int) -> None:
    upright = planted(24, 40, (0, 0, 8, 8))  # the bright corner is at the top left
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = encode(np.ascontiguousarray(undo(upright)), "JPEG", quality=95, exif=exif)
    got = np.asarray(decoding.decode(stored), float)
    assert got.shape == upright.shape
    assert np.abs(got - upright).max() < 60  # JPEG
    assert got[:7, :7].mean() > 240


@prove(max_examples=150)
@given(
    kind=st.sampled_from(sorted(FORMATS.values())),
    cut=st.floats(0, 1),
    flips=st.lists(st.integers(0, 10**6), max_size=6),
)
def test_damage_is_always_the_same_error(kind: str, cut: float, flips: list[int]) -> None:
    """Whatever is wrong with a file, the decoder says OSError: no other error stops a run."""
    data = bytearray(encode(noise(), kind))
    for place in flips:
        data[place % len(data)] ^= 1 << place % 8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert decoding.decode(bytes(data[: int(cut * len(data))])).mode == "RGB"
        except OSError:
            return


@pytest.mark.parametrize("kind", [k for k in FORMATS.values() if k != "GIF"])
def test_truncated_files_are_refused(kind: str) -> None:
    data = encode(noise(80, 80), kind)
    with pytest.raises(OSError, match="damaged"):
        decoding.decode(data[: len(data) // 2])


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_broken_images_are_skipped_and_counted_aloud(tmp_path: Path, kind: str) -> None:
    good, bad = [encode(noise(seed=i)) for i in range(5)], [b"", b"no picture", encode(noise(80, 80), "JPEG")[:900]]
    if kind == "folder":
        source = tmp_path / "set"
        source.mkdir()
        for i, data in enumerate(good + bad):
            (source / f"{i}.png").write_bytes(data)
    else:
        source = parquet(tmp_path / "p.parquet", good + bad, name=[f"{i}.png" for i in range(8)])
    stream = images.open_images(str(source), size=(20, 30))
    for _ in range(2):  # a second reading counts anew
        with pytest.warns(UserWarning, match=r"skipped 3 of 8 images of .* that cannot be decoded: \d.png") as heard:
            got = everything(stream, 3)
        assert len(heard) == 1
        assert "\n" not in str(heard[0].message)
        assert sorted(got.names) == [f"{i}.png" for i in range(5)]
        assert sorted(stream.skipped) == ["5.png", "6.png", "7.png"]
        assert len(got.pixels) == len(got.labels) == len(got.boxes) == len(got.masks) == 5


def test_masks_that_do_not_fit_are_left_away(tmp_path: Path) -> None:
    """What stands beside an image never costs the image."""
    plain = np.ones((20, 30), np.uint8)
    masks = [encode(plain), encode(plain[:, :20]), b"broken", encode(noise())]
    file = parquet(tmp_path / "p.parquet", [encode(noise())] * 4, mask=masks, name=list("abcd"))
    stream = images.open_images(str(file), size=(20, 30))
    with pytest.warns(UserWarning, match="3 of 4 images of .* have a mask or boxes that do not fit"):
        got = everything(stream)
    assert sorted(got.names) == list("abcd")
    found = dict(zip(got.names, got.masks, strict=True))
    assert np.array_equal(found.pop("a"), plain)
    assert set(found.values()) == {None}
    with pytest.warns(UserWarning, match="3 of 4"):
        share = stream.background((2, 3))
    assert share.shape == (4, 6)
    assert np.isnan(share).all(1).sum() == 3


def test_a_missing_image_in_a_row_is_skipped(tmp_path: Path) -> None:
    rows = [{"bytes": encode(noise()), "path": None}, None, {"bytes": None, "path": "gone.png"}]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(rows, kind)}), tmp_path / "p.parquet")
    with pytest.warns(UserWarning, match="skipped 2 of 3"):
        assert len(everything(images.open_images(str(tmp_path / "p.parquet"), size=8)).pixels) == 1


def test_no_warning_without_cause(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(everything(images.open_images(str(folder), size=8)).names) == 7


def test_all_broken(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"not one image of .* can be decoded \(3 tried\)$"):
        list(images.open_images(str(tmp_path), size=8).batches())


def problem(source: str | Path, **kw: object) -> str:
    with pytest.raises(InputError) as caught:
        images.open_images(str(source), **{"size": 16, **kw})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_local_files_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kw: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: requested.append(_) or refuse())
    requested: list[object] = []
    file = parquet(tmp_path / "p.parquet", [encode(noise())])
    assert len(everything(images.open_images(str(file), size=8)).names) == 1
    assert not requested


def test_bad_sources(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "no images in" in problem(tmp_path / "empty")
    assert "no folder or file" in problem("gone.parquet")
    assert "no folder or file" in problem(tmp_path / "gone")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but no more")
    assert "not parquet, or damaged" in problem(tmp_path / "broken.parquet")
    whole = parquet(tmp_path / "whole.parquet", [encode(noise(seed=i)) for i in range(5)]).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    assert "not parquet, or damaged" in problem(tmp_path / "cut.parquet")
    (tmp_path / "notes.txt").write_text("words")
    assert "not parquet, or damaged" in problem(tmp_path / "notes.txt")
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "text.parquet")
    assert "has no image column, only text" in problem(tmp_path / "text.parquet")


@pytest.mark.parametrize(
    "wrong",
    [{"size": 0}, {"size": (8, -1)}, {"count": 0}, {"box_format": "corners"}, {"full_scale": 0.0}, {"split": "train"}],
    ids=str,
)
def test_bad_numbers(wrong: dict) -> None:
    assert next(iter(wrong)).split("_")[0] in problem("scenes", **wrong)
    with pytest.raises(InputError, match="crop must be a share"):
        Preparation(1.5)
    with pytest.raises(InputError, match="unknown crop mode 'centre': did you mean 'center'"):
        Preparation(mode="centre")


def test_bad_batch(folder: Path) -> None:
    for source in ("scenes", str(folder)):
        with pytest.raises(InputError, match="batch must be 1 or more"):
            next(images.open_images(source, size=8).batches(0))


# --- the hub


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where no name can be looked up, whatever the network of this one."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "https://hub.invalid")


@pytest.mark.usefixtures("away")
def test_no_network_fails_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)  # between tries
    assert "no network, or no such name" in problem("nobody/nothing-of-this-name")
    assert sum(waits) < 8
    assert not datasets.config.HF_HUB_OFFLINE  # the next try may find the network back


def test_a_hub_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants, utils

    asked_long_enough, answered = threading.Event(), threading.Event()

    class Silent:
        def head(self, *_args: object, **_kw: object) -> None:
            asked_long_enough.wait(60)
            answered.set()

    monkeypatch.setattr(utils, "get_session", Silent)
    with hub.hub(0.2) as alive:
        assert not alive
        assert constants.HF_HUB_OFFLINE
        assert datasets.config.HF_HUB_OFFLINE
    assert not answered.is_set()
    asked_long_enough.set()
    assert not constants.HF_HUB_OFFLINE


def test_a_hub_that_answers_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(hub, "_answers", lambda *_: True)
    with hub.hub() as alive:
        assert alive
        assert not constants.HF_HUB_OFFLINE
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # as a user's HF_HUB_OFFLINE=1 does
    with hub.hub() as alive:
        assert not alive
    assert constants.HF_HUB_OFFLINE


def test_no_such_name_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset {name}\ndoesn't exist")

    monkeypatch.setattr(hub, "_answers", lambda *_: True)
    monkeypatch.setattr(datasets, "get_dataset_split_names", refuse)
    assert "no such name" in problem("nobody/nothing")


def test_hub_names_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = parquet(tmp_path / "p.parquet", [encode(noise(seed=i)) for i in range(9)], name=[str(i) for i in range(9)])
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    requested = []

    def load(name: str, split: str, streaming: bool, revision: str | None) -> datasets.IterableDataset:
        requested.append((name, split, streaming, revision))
        return real("parquet", data_files=str(file), split="train", streaming=True)

    real = datasets.load_dataset
    monkeypatch.setattr(hub, "_answers", lambda *_: True)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda _name: ["train", "validation"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    commit = ["abc"]
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda _self, _name: SimpleNamespace(sha=commit[0]))
    stream = images.open_images("someone/pictures", size=8, count=5, seed=1)
    assert requested == [("someone/pictures", "validation", True, "abc")]
    names = everything(stream).names
    assert len(set(names)) == 5
    assert everything(stream).names == names
    assert names != everything(images.open_images("someone/pictures", size=8, count=5, seed=2)).names
    with pytest.raises(InputError, match="no split 'test', only train, validation"):
        images.open_images("someone/pictures", size=8, split="test")
    commit[0] = "def"  # a data set that was changed on the hub is another one
    assert images.open_images("someone/pictures", size=8, count=5, seed=1).key != stream.key


# --- real images


def test_real_sets(shared_data: Path) -> None:
    coco = images.open_images(str(shared_data / "coco-256"), size=(96, 128), count=12)
    got = everything(coco)
    assert got.pixels.shape == (12, 3, 96, 128)
    assert 0 <= got.pixels.min() < 0.1
    assert 0.9 < got.pixels.max() <= 1
    assert sum(len(b) for b in got.boxes) > 12
    assert sum(m is not None for m in got.masks) > 3
    for boxes, mask in zip(got.boxes, got.masks, strict=True):
        assert (boxes[:, :2] < boxes[:, 2:]).all()
        assert mask is None or mask.shape == (96, 128)
    tiny = everything(images.open_images(str(shared_data / "tiny-imagenet"), size=64, count=6))
    assert all(0 <= label < 200 and len(b) == 1 for label, b in zip(tiny.labels, tiny.boxes, strict=True))
