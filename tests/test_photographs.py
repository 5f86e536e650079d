"""The photographs of installed packages: the very files, with authors and licences, found without a download."""

import re
import socket
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.test_images import everything, problem
from tests.test_packaging import PROJECT, pins
from vitregs import paths
from vitregs.book import parameters
from vitregs.cache import file_hash
from vitregs.data import images, photographs, sources
from vitregs.data.preparation import Preparation
from vitregs.errors import InputError
from vitregs.train.data import ImageFeed
from vitregs.train.recipes import recipe

ORDER = ["astronaut", "chelsea", "coffee", "rocket", "motorcycle", "china", "flower"]


def names(**kw: object) -> list[str]:
    return everything(images.open_images("photographs", size=32, **kw)).names


def installed(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Packages that lie in another folder, in the versions that are here."""

    def found(package: str) -> SimpleNamespace:
        return SimpleNamespace(version=metadata.version(package), locate_file=lambda file: root / file)

    monkeypatch.setattr(photographs, "distribution", found)


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The photographs in packages whose files can be changed."""
    made = {}
    for photograph, file in zip(photographs.PHOTOGRAPHS, photographs.files().values(), strict=True):
        made[photograph.name] = tmp_path / photograph.file
        made[photograph.name].parent.mkdir(parents=True, exist_ok=True)
        made[photograph.name].write_bytes(file.read_bytes())
    installed(monkeypatch, tmp_path)
    return made


def test_all_seven_in_their_order_without_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kw: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert names() == names(count=7) == names(count=64, seed=3) == ORDER
    assert list(photographs.files()) == photographs.table()["name"].tolist() == ORDER


def test_each_is_the_image_of_its_file_prepared_as_any_other() -> None:
    shown = images.open_images("photographs", size=(48, 64), preparation=Preparation(0.9))
    folder = {
        n: images.open_images(str(f), size=(48, 64), preparation=Preparation(0.9))
        for n, f in photographs.files().items()
    }
    batch = everything(shown)
    for name, pixels in zip(batch.names, batch.pixels, strict=True):
        assert np.array_equal(pixels, everything(folder[name]).pixels[0])
    assert not batch.boxes[0].size
    assert batch.labels == batch.masks == [None] * 7
    sizes = {name: Image.open(file).size for name, file in photographs.files().items()}
    assert sizes["astronaut"] == (512, 512)
    assert sizes["china"] == (640, 427)


def test_seed_and_count_draw_in_the_order_of_the_table() -> None:
    drawn = [names(count=3, seed=seed) for seed in range(12)]
    assert all(len(found) == 3 and found == sorted(found, key=ORDER.index) for found in drawn)
    assert {name for found in drawn for name in found} == set(ORDER)
    assert names(count=3, seed=5) == drawn[5]


def test_the_key_is_of_the_photographs_drawn(copies: dict[str, Path]) -> None:
    key = images.open_images("photographs", size=16).fingerprint
    assert re.fullmatch("[0-9a-f]{12}", key)
    assert images.open_images("photographs", size=16, count=7, seed=4).fingerprint == key
    part = images.open_images("photographs", size=16, count=3)
    before, drawn = part.fingerprint, everything(part).names
    assert before != key
    other = next(name for name in ORDER if name not in drawn)
    copies[other].write_bytes(b"another")
    assert part.fingerprint == before
    copies[drawn[0]].write_bytes(b"another")
    assert part.fingerprint != before


def test_another_file_of_the_same_name_is_refused(copies: dict[str, Path]) -> None:
    assert names() == ORDER
    Image.open(copies["coffee"]).rotate(1).save(copies["coffee"])
    said = problem("photographs")
    assert re.fullmatch(
        r"scikit-image \S+ ships another file as coffee.png, so coffee is another image: pip install scikit-image==\S+",
        said,
    )
    with pytest.raises(InputError, match=r"another file as coffee\.png"):
        parameters.check("02_norms", {"images": "photographs"})  # before anything is computed
    copies["coffee"].unlink()
    assert "does not ship the photograph coffee (coffee.png): pip install scikit-image==" in problem("photographs")


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = photographs.distribution

    def found(package: str) -> metadata.Distribution:
        if package == "scikit-learn":
            raise metadata.PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(photographs, "distribution", found)
    assert problem("photographs").startswith(
        "photographs are files of scikit-learn, which is not installed: pip install"
    )


@pytest.mark.parametrize("wrong", [{"split": "train"}, {"image_column": "image"}], ids=str)
def test_no_splits_and_no_columns(wrong: dict) -> None:
    (value,) = wrong.values()
    assert (
        problem("photographs", **wrong) == f"photographs have no splits and no columns, so no {value!r}: leave it away"
    )


def test_the_name_goes_before_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photographs").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "photographs" / "mine.png")
    monkeypatch.chdir(tmp_path)
    assert names() == ORDER
    assert everything(images.open_images("./photographs", size=8)).names == ["mine.png"]


def test_seven_are_too_few_to_train_on() -> None:
    with pytest.raises(InputError, match="photographs has 7 images: too few for a batch of"):
        ImageFeed(recipe("supervised-pico"), "cpu", "photographs")


def test_the_table_is_whole_and_true() -> None:
    frame = photographs.table()
    assert not frame.isna().any().any()
    assert (frame.map(str.strip) == frame).all().all()
    assert (frame != "").all().all()
    assert frame["sha256"].tolist() == [file_hash(file) for file in photographs.files().values()]
    assert frame["source"].str.match(r"https?://\S+$").all()
    assert not frame.duplicated("sha256").any()


def test_the_packages_are_dependencies_at_the_versions_that_were_read() -> None:
    needed = {re.split("[>=<]", line)[0] for line in PROJECT["project"]["dependencies"]}
    assert set(photographs.table()["package"]) == set(photographs.VERSIONS) <= needed
    assert {name: pins()[name] for name in photographs.VERSIONS} == photographs.VERSIONS


def test_the_packages_say_so_themselves() -> None:
    """Authors and licences stand in the packages' own notes."""
    notes = {
        "scikit-image": (Path(str(metadata.distribution("scikit-image").locate_file("skimage/data/_fetchers.py")))),
        "scikit-learn": photographs.files()["china"].parent / "README.txt",
    }
    text = {name: " ".join(file.read_text("utf-8").split()) for name, file in notes.items()}
    for row in photographs.PHOTOGRAPHS:
        address = "" if "scikit-image.org" in row.source else row.source
        assert address.rsplit("://")[-1] in text[row.package], row.name
        for word in re.findall(r"CC0|public domain|Middlebury|\w+ restrictions", row.licence):
            assert word.lower() in text[row.package].lower(), (row.name, word)
    assert "CC0 by the photographer (Stefan van der Walt)" in text["scikit-image"]
    assert "CC0 by the photographer (Rachel Michetti)" in text["scikit-image"]
    assert text["scikit-learn"].count("https://creativecommons.org/licenses/by/2.0/") == 2


def test_the_page_shows_the_table() -> None:
    page = (paths.ROOT / "book" / "reproduce.md").read_text("utf-8")
    for p in photographs.PHOTOGRAPHS:
        assert f"| {p.name} | {p.shows} | {p.author} | {p.licence} | [source]({p.source}) | {p.package} |" in page
    assert all(f"| `{name}` |" in page for name in sources.NAMED)
