"""The public interface: its names, what it takes for images and for networks, and its errors of one line."""

import subprocess
import sys
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import xarray as xr
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import vitregs as vr
from vitregs.measure import outliers
from vitregs.models import registry

NAME = "hunt-pico"


@pytest.fixture(scope="module")
def vit() -> Any:
    return vr.load(NAME, device="cpu")


@pytest.fixture(scope="module")
def scenes(vit: Any) -> Any:
    return vr.open_images("scenes", size=vit.size, count=8)


@pytest.fixture(scope="module")
def seen(vit: Any, scenes: Any) -> xr.Dataset:
    return vr.capture(vit, scenes, norms=True, attention=["cls"], qkv=["value"])


@pytest.fixture(scope="module")
def folder(scenes: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scenes as files."""
    path = tmp_path_factory.mktemp("photos")
    for i, image in enumerate(as_pil(scenes)):
        image.save(path / f"{i}.png")
    return path


def as_pil(scenes: Any) -> list[Image.Image]:
    pixels = torch.cat(list(scenes.pixels())).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.uint8(255 * image + 0.5)) for image in pixels]


# --- names


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_every_name_is_there() -> None:
    assert sorted(vr.__all__) == vr.__all__
    assert set(vr.__all__) <= set(dir(vr))
    assert [name for name in vr.__all__ if getattr(vr, name, None) is None] == []
    assert {n for n in vr.plot.__all__ if callable(getattr(vr.plot, n))} == {
        "attention",
        "diagnosis",
        "neurons",
        "norms",
    }
    assert vr.__version__[0].isdigit()
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        vr.nonsense  # noqa: B018
    assert (
        run("from vitregs import *; print(sorted(n for n in dir() if n[0] != '_'))")
        == f"{vr.__all__[:4] + vr.__all__[5:]}\n"
    )


def test_names_are_loaded_when_they_are_asked_for() -> None:
    code = (
        "import sys, vitregs as vr; print([n for n in ('torch', 'timm', 'matplotlib', 'xarray') if n in sys.modules])"
    )
    assert run(code) == "[]\n"
    assert run(code + "; vr.load; print('torch' in sys.modules)") == "[]\nTrue\n"


# --- images


def test_all_kinds_of_images_give_the_same(vit: Any, scenes: Any, folder: Path, seen: xr.Dataset) -> None:
    """A folder, its path, PIL images and pixels: the same numbers, up to the rounding to bytes in files."""
    exact = vr.capture(vit, torch.cat(list(scenes.pixels())), norms=True)
    np.testing.assert_allclose(exact["norms"], seen["norms"], rtol=1e-5)
    files = vr.open_images(folder, size=vit.size)
    pixels = torch.cat(list(files.pixels()))
    like = vr.capture(vit, pixels, norms=True)["norms"]
    for images in (str(folder), folder, files):
        found = vr.capture(vit, images, norms=True)["norms"]
        np.testing.assert_allclose(found, like, rtol=1e-5)
    opened = vr.capture(vit, as_pil(scenes), norms=True)["norms"]
    in_order = vr.capture(vit, torch.cat(list(vr.open_images(as_pil(scenes), size=vit.size).pixels())), norms=True)
    np.testing.assert_allclose(opened, in_order["norms"], rtol=1e-5)
    np.testing.assert_allclose(np.sort(opened, axis=None), np.sort(like, axis=None), rtol=1e-5)
    for images in (folder, as_pil(scenes), pixels, scenes):
        assert vr.diagnose(vit, images).image_count == 8


def test_tokens_are_selected_by_kind(vit: Any, seen: xr.Dataset) -> None:
    patches = seen.norms.sel(layer=8, token="patch")
    assert dict(patches.sizes) == {"image": 8, "token": 64}
    assert dict(seen.norms.sel(token="cls").sizes) == {"image": 8, "layer": vit.depth + 1}
    assert set(patches["kind"].values) == {"patch"}


def test_outliers_of_a_layer(seen: xr.Dataset) -> None:
    found = vr.find_outliers(seen)
    assert found.dtype == bool
    assert found.dims == ("image", "token")
    assert found.attrs["share"] == pytest.approx(float(found.sel(token="patch").mean()))
    last = seen.norms.sel(layer=8)
    assert found.attrs["cutoff"] == outliers.find_cutoff(last).value
    xr.testing.assert_equal(found, (last > found.attrs["cutoff"]).rename("outlier"))
    xr.testing.assert_equal(vr.find_outliers(seen.norms, layer=8), found)
    high = vr.find_outliers(seen, layer=8, cutoff=1e6)
    assert not high.any()
    assert (high.attrs["cutoff"], high.attrs["share"]) == (1e6, 0)


# --- networks


def test_wrap_is_load_of_the_same_network(vit: Any, scenes: Any, seen: xr.Dataset) -> None:
    again = vr.wrap(deepcopy(vit.net))
    for fact in ("name", "mean", "std", "size", "preparation", "depth", "width", "patch_size", "registers"):
        assert getattr(again, fact) == getattr(vit, fact), fact
    assert again.kinds((2, 2)) == vit.kinds((2, 2))
    xr.testing.assert_equal(vr.capture(again, scenes, norms=True, attention=["cls"], qkv=["value"]), seen)


def test_wrap_is_load_of_a_published_network(shared_data: Path) -> None:
    name = "deit_tiny_patch16_224"
    file = shared_data / "deit-tiny" / f"{name}.safetensors"
    loaded = vr.load(name, weights=file, device="cpu")
    net = timm.create_model(name, checkpoint_path=str(file))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    wrapped = vr.wrap(net)
    assert wrapped.net is net
    for fact in ("name", "mean", "std", "size", "preparation", "facts"):
        assert getattr(wrapped, fact) == getattr(loaded, fact), fact
    images = str(shared_data / "coco-256")
    found = [
        vr.capture(
            b, vr.open_images(images, size=b.size, count=2, preparation=b.preparation), norms=True, received=True
        )
        for b in (wrapped, loaded)
    ]
    xr.testing.assert_equal(*found)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_wrap_freezes_and_names() -> None:
    net = timm.create_model("vit_tiny_patch16_224", img_size=(32, 64), depth=2, reg_tokens=3).train()
    wrapped = vr.wrap(net, "mine")
    assert (wrapped.name, wrapped.size, wrapped.registers) == ("mine", (32, 64), 3)
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())
    assert vr.wrap(deepcopy(net)).name == "vit_tiny_patch16_224"
    other = deepcopy(net)
    other.cls_token.add_(1)
    assert wrapped.weights == vr.wrap(deepcopy(net)).weights != vr.wrap(other).weights


@pytest.mark.parametrize(
    "name",
    [
        "swin_tiny_patch4_window7_224",
        "xcit_nano_12_p16_224",
        "cait_xxs24_224",
        "convit_tiny",
        "vit_tiny_r_s16_p8_224",  # a ViT on a convolutional network
        "resnet18",
        "naflexvit_base_patch16_gap",
    ],
)
def test_wrap_refuses_what_is_no_plain_vit(name: str) -> None:
    with torch.device("meta"):
        net = timm.create_model(name)
    with pytest.raises(vr.InputError, match=r"no plain ViT of timm|not cut from pixels"):
        vr.wrap(net)


# --- errors


def mistakes() -> dict[str, tuple[Any, str]]:
    """What goes wrong, by the words of its error."""
    pixels = torch.rand(2, 3, 64, 64)

    def capture(images: Any, **what: Any) -> Any:
        return lambda vit, seen: vr.capture(vit, images, **(what or {"norms": True}))

    def draw(name: str, *args: Any, **how: Any) -> Any:
        return lambda vit, seen: getattr(vr.plot, name)(*args, **how)

    return {
        "a name for a network": (
            lambda vit, seen: vr.capture(NAME, pixels, norms=True),
            "not its name: load('hunt-pico')",
        ),
        "a module for a network": (lambda vit, seen: vr.diagnose(vit.net, pixels), "what load or wrap gives, not Vis"),
        "no network": (lambda vit, seen: vr.diagnose(None, pixels), "what load or wrap gives, not NoneType"),
        "load nothing": (lambda vit, seen: vr.load(None), "loaded by its name, not by NoneType"),
        "load a typo": (lambda vit, seen: vr.load("hunt-piko"), "did you mean 'hunt-pico'?"),
        "wrap a name": (lambda vit, seen: vr.wrap(NAME), "load('hunt-pico') takes a name"),
        "wrap twice": (lambda vit, seen: vr.wrap(vit), "hunt-pico is wrapped already"),
        "wrap a layer": (lambda vit, seen: vr.wrap(nn.Linear(2, 2)), "Linear is no plain ViT of timm"),
        "an empty list": (capture([]), "the list of images is empty"),
        "a list of names": (capture(["a.png"]), "holds PIL images, not str"),
        "an array": (capture(np.zeros((2, 3, 64, 64))), "a tensor or open images, not ndarray"),
        "no images": (capture(None), "not NoneType"),
        "an empty tensor": (capture(pixels[:0]), "there are no images to measure"),
        "an empty name": (capture(""), "empty name"),
        "no such folder": (capture("/nonexistent/photos"), "no folder or file /nonexistent/photos"),
        "bytes": (capture((255 * pixels).byte()), "pixels lie in [0, 1], before any normalisation"),
        "normalised pixels": (capture(4 * pixels - 2), "pixels lie in [0, 1], before any normalisation, not from -"),
        "one image without its batch": (capture(pixels[0]), "(n, 3, height, width), not (3, 64, 64)"),
        "nothing asked": (capture(pixels, norms=False), "nothing is asked for"),
        "a bare layer": (capture(pixels, norms=8), "layers are given as a list, [8]"),
        "a layer too deep": (capture(pixels, norms=[9]), "layer 9 does not exist"),
        "attention of all": (capture(pixels, attention=True), "['cls'] for CLS"),
        "a projection": (capture(pixels, qkv="values"), "did you mean 'value'?"),
        "open nothing": (lambda vit, seen: vr.open_images(None, size=8), "not NoneType"),
        "open without images": (lambda vit, seen: vr.open_images([], size=8), "the list of images is empty"),
        "a size in words": (lambda vit, seen: vr.open_images("scenes", size="big"), "in whole pixels, not 'big'"),
        "a size of three": (lambda vit, seen: vr.open_images("scenes", size=(2, 3, 4)), "not (2, 3, 4)"),
        "half an image": (lambda vit, seen: vr.open_images("scenes", size=8, count=0.5), "1 or more, not 0.5"),
        "too few norms": (lambda vit, seen: vr.diagnose(vit, pixels[:1]), "too few to look for an outlier mode"),
        "outliers of nothing": (lambda vit, seen: vr.find_outliers(None), "capture(…, norms=True) first"),
        "a layer by name": (lambda vit, seen: vr.find_outliers(seen, layer="last"), "a whole number, not 'last'"),
        "a layer not captured": (lambda vit, seen: vr.find_outliers(seen, layer=99), "layer 99 was not captured"),
        "a cut-off below 0": (lambda vit, seen: vr.find_outliers(seen, cutoff=-1), "must be positive"),
        "norms of nothing": (draw("norms", None), "capture(…, norms=True)"),
        "attention of nothing": (draw("attention", xr.Dataset()), 'capture(…, attention=["cls"])'),
        "a diagnosis of nothing": (draw("diagnosis", xr.Dataset()), "what diagnose gives, not Dataset"),
        "a layer not drawn": (
            lambda vit, seen: vr.plot.attention(seen, layer=3),
            "layer 3 was not captured: there are 8",
        ),
        "no such query": (lambda vit, seen: vr.plot.attention(seen, query=1), "there is no query 1"),
        "images of one plane": (
            lambda vit, seen: vr.plot.attention(seen, np.zeros((8, 64, 64))),
            "what open_images gives",
        ),
    }


@pytest.mark.parametrize("case", mistakes())
def test_mistakes_are_one_line(case: str, vit: Any, seen: xr.Dataset) -> None:
    call, words = mistakes()[case]
    with pytest.raises(vr.InputError) as caught:
        call(vit, seen)
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


# --- what is shown


class Tree(HTMLParser):
    """Reads HTML and keeps what is open, its words, and every tag that was met."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_a_diagnosis_shows_itself(vit: Any, scenes: Any) -> None:
    found = vr.diagnose(vr.wrap(deepcopy(vit.net), "<b>mine</b> & co"), scenes)
    page = Tree(found._repr_html_())
    assert page.open == []
    assert page.tags.count("tr") == 1 + len(found.layers) + len(found.fingerprint.parts)
    assert "b" not in page.tags
    assert "<b>mine</b> & co" in page.words
    assert found.verdict in page.words
    assert found.evidence in page.words
    assert "nan" not in page.words.lower()
    assert repr(found) == found.text()
    assert found.facts()["layers"][0]["sink"] is None


def test_figures(vit: Any, scenes: Any, seen: xr.Dataset) -> None:
    figures = [
        vr.plot.norms(seen),
        vr.plot.norms(seen, layer=3, cutoff=50),
        vr.plot.diagnosis(vr.diagnose(vit, scenes)),
    ]
    assert all(isinstance(f, Figure) for f in figures)
    titles = [f.axes[1].get_title() for f in figures]
    assert [t.partition(":")[0] for t in titles] == ["layer 8", "layer 3", "norms over layers"]
    assert figures[1].axes[1].lines[0].get_xdata()[0] == 50


def test_attention_stands_beside_its_image(scenes: Any, seen: xr.Dataset) -> None:
    pixels = torch.cat(list(scenes.pixels()))
    for images in (scenes, pixels, pixels.permute(0, 2, 3, 1).numpy()):
        axes = vr.plot.attention(seen, images, count=2).axes
        assert len(axes) == 4
        np.testing.assert_allclose(axes[2].images[0].get_array(), pixels[1].permute(1, 2, 0), atol=1e-6)
    rows = seen.attention.sel(attention_layer=8, query="cls", token="patch").mean("head")
    np.testing.assert_allclose(axes[3].images[0].get_array(), rows.values[1].reshape(8, 8), rtol=1e-6)
    assert len(vr.plot.attention(seen, count=3).axes) == 3
    assert "hunt-pico: CLS attention, layer 8" in vr.plot.attention(seen)._suptitle.get_text()


def test_the_zoo_says_how_its_images_are_prepared() -> None:
    """So that a module of it, taken out and wrapped again, is fed as before."""
    for name in registry.zoo():
        loaded = vr.load(name, device="cpu")
        again = vr.wrap(loaded.net)
        assert (again.mean, again.std, again.size, again.preparation) == (
            loaded.mean,
            loaded.std,
            loaded.size,
            loaded.preparation,
        ), name
