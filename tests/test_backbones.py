"""Backbones: names, weight files and their faults, prefix tokens, and position tables against timm's own."""

import json
import pickle
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from vitregs import cache, hub
from vitregs.data import images
from vitregs.data.preparation import Preparation
from vitregs.errors import InputError
from vitregs.models import registry
from vitregs.models.backbone import FACTS, Backbone
from vitregs.train.config import Recipe

IMAGENETTE = [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]  # its ten classes among the 1000 of ImageNet
PICO = Recipe("pico-test", "made by a test", registers=2, image_size=32)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:timm.layers", "ignore:Detected pickle protocol")


def problem(call, *args: object, **kw: object) -> str:
    with pytest.raises(InputError) as caught:
        call(*args, **kw)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def state(backbone: Backbone) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in backbone.net.state_dict().items()}


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo of one small model, laid out as `train.export` lays it out it."""
    folder = tmp_path / "zoo" / PICO.name
    folder.mkdir(parents=True)
    vit = {**PICO.vit(), "num_classes": 64}
    torch.manual_seed(1)
    save_file(timm.models.VisionTransformer(**vit).state_dict(), folder / "weights.safetensors")
    card = {
        "recipe": PICO.facts(),
        "vit": vit,
        "mean": [0.4, 0.4, 0.4],
        "std": [0.2, 0.2, 0.2],
        "weights": cache.file_hash(folder / "weights.safetensors"),
        "accuracy": 0.5,
        "minutes": 1.0,
        "provenance": {},
    }
    (folder / "recipe.json").write_text(json.dumps(card))
    monkeypatch.setattr(registry, "ZOO", folder.parent)
    return folder


# --- names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_smal_patch16_224", "did you mean 'vit_small_patch16_224'"),
        ("vit_base_patch14_dinov2_reg4", "did you mean"),
        ("deit3_smal_patch16_224", "did you mean 'deit3_small_patch16_224'"),
        ("nonsense", "unknown model 'nonsense'"),
        ("", "unknown model ''"),
        ("vit_small_patch16_224.dinoo", "did you mean 'vit_small_patch16_224.dino'"),
        ("resnet50", "resnet50 is not a plain ViT"),
        ("resnet50.a1_in1k", "is not a plain ViT"),
        ("swin_tiny_patch4_window7_224", "is not a plain ViT"),
        ("vit_small_r26_s32_224", "is not a plain ViT"),
    ],
)
def test_names_that_cannot_be_loaded(name: str, message: str) -> None:
    for call in (registry.load, registry.check, registry.random):
        assert message in problem(call, name)


def test_a_misspelt_zoo_name_finds_the_zoo(zoo: Path) -> None:
    assert "did you mean 'pico-test'" in problem(registry.load, "pico-tets")
    assert registry.zoo() == ["pico-test"]


def test_published_names_are_vits_of_timm() -> None:
    names = registry.published()
    assert len(names) > 200
    assert {"vit_large_patch14_dinov2", "vit_large_patch14_reg4_dinov2", "deit3_base_patch16_224"} <= set(names)
    assert {"eva02_tiny_patch14_224", "beit_base_patch16_224", "vit_relpos_small_patch16_224"} <= set(names)
    assert not {"resnet50", "swin_tiny_patch4_window7_224"} & set(names)
    for name in names[::40]:
        registry.check(name)


# --- what is read from the model


@pytest.mark.parametrize(
    ("name", "prefix", "registers", "patch", "depth", "width"),
    [
        ("vit_small_patch14_dinov2.lvd142m", 1, 0, 14, 2, 384),
        ("vit_small_patch14_reg4_dinov2.lvd142m", 5, 4, 14, 2, 384),
        ("deit_tiny_distilled_patch16_224", 2, 0, 16, 2, 192),
        ("vit_medium_patch16_reg4_gap_256", 4, 4, 16, 2, 512),
        ("vit_wee_patch16_reg1_gap_256", 1, 1, 16, 2, 256),
        ("vit_base_patch16_siglip_224", 0, 0, 16, 2, 768),
        ("vit_small_patch16_dinov3", 5, 4, 16, 2, 384),
        ("eva02_tiny_patch14_224", 1, 0, 14, 2, 192),
        ("vit_relpos_small_patch16_224", 0, 0, 16, 2, 384),
    ],
)
def test_facts_are_read_from_the_model(
    name: str, prefix: int, registers: int, patch: int, depth: int, width: int
) -> None:
    bare = registry.random(name, depth=2)
    assert (bare.prefix, bare.registers, bare.patch_size) == (prefix, registers, (patch, patch))
    assert (bare.depth, bare.width) == (depth, width)
    assert bare.has_cls == (prefix > registers)
    kinds = bare.kinds((2, 3))
    assert kinds.count("register") == registers
    assert kinds[prefix - registers :] == ["register"] * registers + ["patch"] * 6
    assert kinds.count("cls") == (prefix > registers)
    seen = bare.net.forward_features(bare.prepare(torch.rand(1, 3, 2 * patch, 3 * patch)))
    assert seen.shape == (1, prefix + 6, width)
    assert not bare.net.training
    assert not any(p.requires_grad for p in bare.net.parameters())
    data = timm.data.resolve_model_data_config(bare.net)
    assert (bare.mean, bare.std, bare.preparation) == (data["mean"], data["std"], Preparation.of(data))
    assert bare.size == data["input_size"][1:]


def test_normalise() -> None:
    bare = registry.random("test_vit")
    pixels = torch.rand(2, 3, 4, 5)
    for c in range(3):
        assert torch.allclose(bare.normalise(pixels)[:, c], (pixels[:, c] - bare.mean[c]) / bare.std[c])


def test_random_weights_follow_the_seed_and_leave_the_global_one() -> None:
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    one, two, other = (registry.random("test_vit", seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.rand(1), before)
    pixels = torch.rand(1, 3, 160, 160)
    assert torch.equal(one.logits(pixels), two.logits(pixels))
    assert not torch.equal(one.logits(pixels), other.logits(pixels))


# --- the zoo


def test_zoo_model(zoo: Path) -> None:
    ours = registry.load("pico-test", device="cpu")
    assert (ours.registers, ours.prefix, ours.depth, ours.width) == (2, 3, 8, 96)
    assert (ours.size, ours.patch_size, ours.mean, ours.std) == ((32, 32), (8, 8), (0.4,) * 3, (0.2,) * 3)
    assert ours.weights == cache.file_hash(zoo / "weights.safetensors")
    assert "zoo" in ours.source
    torch.manual_seed(1)
    net = timm.models.VisionTransformer(**PICO.vit(), num_classes=64).eval()
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours.logits(pixels), net((pixels - 0.4) / 0.2))
    assert ours.logits(torch.rand(1, 3, 40, 24)).shape == (1, 64)


def test_zoo_model_with_other_weights(zoo: Path, tmp_path: Path) -> None:
    other = {k: v + 1 for k, v in state(registry.load("pico-test")).items()}
    save_file(other, tmp_path / "other.safetensors")
    ours = registry.load("pico-test", weights=tmp_path / "other.safetensors", device="cpu")
    assert all(torch.equal(v, other[k]) for k, v in state(ours).items())
    assert ours.source == "other.safetensors"
    assert ours.weights == cache.file_hash(tmp_path / "other.safetensors")


def test_damaged_zoo(zoo: Path) -> None:
    card = json.loads((zoo / "recipe.json").read_text())
    for text in ("{", "{}", json.dumps({**card, "vit": {"colour": 3}}), json.dumps({**card, "mean": 3})):
        (zoo / "recipe.json").write_text(text)
        assert "is not a recipe of the zoo" in problem(registry.load, "pico-test")
    (zoo / "recipe.json").write_text(json.dumps(card))
    changed = {k: v + 1 for k, v in state(registry.load("pico-test")).items()}
    save_file(changed, zoo / "weights.safetensors")
    assert "does not have the hash" in problem(registry.load, "pico-test")
    (zoo / "weights.safetensors").unlink()
    assert "no weight file" in problem(registry.load, "pico-test")


# --- weight files


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return registry.random("test_vit", seed=3)


@pytest.mark.parametrize("wrap", [None, "model", "state_dict", "teacher"])
@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_weights_from_a_file(tiny: Backbone, tmp_path: Path, kind: str, wrap: str | None) -> None:
    file = tmp_path / f"w.{kind}"
    if kind == "safetensors":
        save_file({k: v.half() for k, v in state(tiny).items()}, file)
    else:
        torch.save({wrap: state(tiny), "epoch": 3} if wrap else state(tiny), file)
    ours = registry.load("test_vit", weights=file, device="cpu")
    exact = kind != "safetensors"
    for k, v in state(ours).items():
        assert v.dtype == torch.float32
        assert torch.equal(v, tiny.net.state_dict()[k] if exact else tiny.net.state_dict()[k].half().float())
    assert ours.weights == cache.file_hash(file)
    assert registry.load("test_vit", weights=str(file), device="cpu").weights == ours.weights


class _Payload:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self):
        return open, (self.target, "w")


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_never_runs(tmp_path: Path, legacy: bool) -> None:
    bait, file = tmp_path / "it-ran", tmp_path / "w.pth"
    torch.save({"model": _Payload(str(bait))}, file, _use_new_zipfile_serialization=not legacy)
    assert "holds code besides tensors, which is never run" in problem(registry.load, "test_vit", weights=file)
    file.write_bytes(pickle.dumps(_Payload(str(bait))))
    assert "cannot read weights" in problem(registry.load, "test_vit", weights=file)
    assert not bait.exists()
    with open(file, "rb") as opened:
        pickle.load(opened).close()  # noqa: S301 - the bait does work
    assert bait.exists()


def test_unreadable_files(tiny: Backbone, tmp_path: Path) -> None:
    load = lambda name: problem(registry.load, "test_vit", weights=tmp_path / name)  # noqa: E731
    assert "no weight file" in load("gone.safetensors")
    assert "no weight file in" in problem(registry.load, "test_vit", weights=tmp_path)
    save_file(state(tiny), tmp_path / "w.safetensors")
    torch.save(state(tiny), tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        whole = (tmp_path / name).read_bytes()
        for share in (0.0, 0.001, 0.5, 0.99):
            (tmp_path / f"cut-{name}").write_bytes(whole[: int(share * len(whole))])
            assert "is damaged" in load(f"cut-{name}")
    for name in ("words.pth", "words.safetensors"):
        (tmp_path / name).write_text("these are words, and not weights\n" * 9)
        assert "is damaged" in load(name)
    torch.save([1, 2], tmp_path / "list.pth")
    assert "no table of tensors" in load("list.pth")
    torch.save({"model": {"a": 1}}, tmp_path / "numbers.pth")
    assert "no table of tensors" in load("numbers.pth")


def test_files_that_do_not_fit(tiny: Backbone, tmp_path: Path) -> None:
    def load(some: dict[str, torch.Tensor], name: str = "test_vit") -> str:
        save_file(some, tmp_path / "w.safetensors")
        return problem(registry.load, name, weights=tmp_path / "w.safetensors")

    whole = state(tiny)
    assert "1 tensors are missing, 'norm.bias' first" in load({k: v for k, v in whole.items() if k != "norm.bias"})
    assert "tensors are missing" in load({"weight": torch.zeros(2)})
    assert "has shape (64, 9), not (64,)" in load({**whole, "norm.weight": torch.zeros(64, 9)})
    wrong = {**whole, "patch_embed.proj.weight": torch.zeros(3), "extra": torch.zeros(1)}
    assert "does not fit test_vit" in load(wrong)
    assert "1 tensors have no place in it, 'colour' first" in load({**whole, "colour": torch.zeros(1)})
    assert "does not fit" in load(whole, "vit_tiny_patch16_224")


def test_registers_are_not_dropped_in_silence(tmp_path: Path) -> None:
    """The weights of the model with registers fill the one without but for the registers themselves."""

    def load(state: dict[str, torch.Tensor]) -> str:
        save_file(state, tmp_path / "reg.safetensors")
        net, convert = registry._build("vit_small_patch14_dinov2", depth=2)
        return problem(registry._filled, net, convert, tmp_path / "reg.safetensors", "the one without")

    message = load(state(registry.random("vit_small_patch14_reg4_dinov2", depth=2)))
    assert "does not fit the one without" in message
    deeper = registry.random("vit_small_patch14_dinov2", depth=3)
    assert "have no place in it, 'blocks.2" in load(state(deeper))


def test_a_missing_head_does_not_answer(tiny: Backbone, tmp_path: Path) -> None:
    body = {k: v for k, v in state(tiny).items() if not k.startswith("head.")}
    save_file(body, tmp_path / "w.safetensors")
    ours = registry.load("test_vit", weights=tmp_path / "w.safetensors", device="cpu")
    assert all(torch.equal(v, body[k]) for k, v in state(ours).items())
    assert "has no trained head" in problem(ours.logits, torch.rand(1, 3, 160, 160))
    dino = registry.random("vit_small_patch14_dinov2", depth=1)
    assert "has no trained head" in problem(dino.logits, torch.rand(1, 3, 28, 28))


# --- the hub


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine where the hub's name cannot be looked up, with an empty cache: → the cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_no_network_fails_without_waiting(away: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)  # between tries
    message = problem(registry.load, "test_vit.r160_in1k")
    assert "cannot fetch the weights of test_vit.r160_in1k from the hub" in message
    assert "--weights" in message
    assert sum(waits) < 8


def test_a_model_without_published_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_answers", lambda *_: True)
    assert "none are published" in problem(registry.load, "test_vit4")


def test_cached_weights_need_no_network(away: Path, tiny: Backbone) -> None:
    repo = away / "models--timm--test_vit.r160_in1k"
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    save_file(state(tiny), repo / "snapshots" / "abc" / "model.safetensors")
    ours = registry.load("test_vit.r160_in1k", device="cpu")
    assert all(torch.equal(v, tiny.net.state_dict()[k]) for k, v in state(ours).items())
    assert (ours.source, ours.weights) == ("hub", "timm/test_vit.r160_in1k")


# --- devices


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert registry.pick_device("cpu") == torch.device("cpu")
    assert "device 'abacus' is not available here" in problem(registry.pick_device, "abacus")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert registry.pick_device("auto") == torch.device("cpu")


def test_cuda_where_absent() -> None:
    name = "cuda:99" if torch.cuda.is_available() else "cuda"
    assert f"device '{name}' is not available here: use auto or cpu" in problem(
        registry.load, "test_vit", weights="unread", device=name
    )


# --- image sizes and position tables


@pytest.mark.parametrize("size", [(30, 32), (32, 30), (0, 16), (5, 5)])
def test_sizes_that_do_not_fit(tiny: Backbone, size: tuple[int, int]) -> None:
    message = problem(tiny.grid, size)
    assert f"image size {size[0]}x{size[1]} is not a multiple of the patch size 16" in message
    nearest = tuple(int(n) for n in message.rsplit(" ", 1)[1].split("x"))
    assert all(n % 16 == 0 and n > 0 and abs(n - s) <= 16 for n, s in zip(nearest, size, strict=True))
    if min(size):
        assert message == problem(tiny.prepare, torch.rand(1, 3, *size))


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (2, 4, 32, 32), (32,)])
def test_shapes_that_are_not_images(tiny: Backbone, shape: tuple[int, ...]) -> None:
    assert "pixels must have the shape (n, 3, height, width)" in problem(tiny.prepare, torch.rand(shape))


def test_grid(tiny: Backbone) -> None:
    assert tiny.grid((32, 80)) == (2, 5)


ROUND = {
    "test_vit": {},
    "vit_small_patch14_reg4_dinov2": {"depth": 2},
    "vit_small_patch14_dinov2": {"depth": 2},
    "deit_tiny_distilled_patch16_224": {"depth": 2},
    "deit3_small_patch16_224": {"depth": 2},
    "vit_wee_patch16_reg1_gap_256": {"depth": 2},
    "vit_base_patch16_siglip_224": {"depth": 1, "embed_dim": 96, "num_heads": 3},
    "beit_base_patch16_224": {"depth": 2, "embed_dim": 96, "num_heads": 3},
    "eva02_tiny_patch14_224": {"depth": 2},
    "vit_small_patch16_dinov3": {"depth": 2},
    "vit_relpos_small_patch16_224": {"depth": 2, "embed_dim": 96, "num_heads": 3},
}


@torch.no_grad()
@pytest.mark.parametrize("name", ROUND)
def test_there_and_back_is_exact(name: str) -> None:
    bare = registry.random(name, img_size=112, **ROUND[name])
    for k, v in bare.net.named_parameters():
        if "relative" in k or "gamma" in k or "ls" in k.split("."):
            torch.nn.init.normal_(v)  # what timm starts at zero or nearly so would hide a fault
    again = Backbone("again", bare.net, bare.mean, bare.std, bare.size, Preparation(), "", "")
    p = bare.patch_size[0]
    assert 112 % p == 0
    pixels = torch.rand(1, 3, 112, 112)
    before, first = again.net.forward_features(again.prepare(pixels)), state(again)
    shapes = {}
    for size in ((p * 3, p * 9), (p * 2, p * 2), (p * 11, p * 4), (p * 3, p * 9)):
        x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
        out = again.net.forward_features(again.prepare(x))
        assert out.shape[1] == again.prefix + (size[0] // p) * (size[1] // p)
        assert torch.equal(out, shapes.setdefault(size, out))  # the same by another way
        assert not any(q.requires_grad for q in again.net.parameters())
    assert torch.equal(again.net.forward_features(again.prepare(pixels)), before)
    assert all(torch.equal(v, first[k]) for k, v in state(again).items())


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_vit", "deit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
@pytest.mark.parametrize("grid", [(3, 7), (12, 5), (20, 22)])
def test_resizing_is_timms_own(name: str, grid: tuple[int, int]) -> None:
    options = {} if name == "test_vit" else {"depth": 2, "img_size": 112}
    ours = registry.random(name, **options)
    theirs = registry.random(name, dynamic_img_size=True, **options).net
    p = ours.patch_size[0]
    x = torch.randn(1, 3, grid[0] * p, grid[1] * p)
    ours.fit((grid[0] * p, grid[1] * p))
    assert torch.allclose(ours.net.forward_features(x), theirs.forward_features(x), atol=1e-5)


def test_dinov2_without_registers_is_resized_without_antialiasing() -> None:
    def table(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        bare = registry.random(name, depth=1)
        original = bare.net.pos_embed.clone()
        bare.fit((14 * 5, 14 * 8))
        return original, bare.net.pos_embed

    for name, prefix, antialias in (
        ("vit_small_patch14_dinov2.lvd142m", 1, False),
        ("vit_small_patch14_reg4_dinov2.lvd142m", 0, True),
    ):
        original, resized = table(name)
        square = original[:, prefix:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
        expected, other = (
            torch.nn.functional.interpolate(square, (5, 8), mode="bicubic", antialias=a).flatten(2).transpose(1, 2)
            for a in (antialias, not antialias)
        )
        assert torch.equal(resized[:, :prefix], original[:, :prefix])
        assert torch.allclose(resized[:, prefix:], expected, atol=1e-6)
        assert not torch.allclose(resized[:, prefix:], other, atol=1e-3)


def test_facts_of_published_models() -> None:
    giant = next(f for p, f in FACTS.items() if fnmatch("vit_giant_patch14_dinov2.lvd142m", p))
    assert giant.cutoff == 150.0
    assert giant.cutoff_source
    assert registry.random("vit_small_patch16_224.dino", depth=1).facts.cutoff is None


# --- a real published ViT


@pytest.mark.slow
def test_deit_tiny_classifies_imagenette(shared_data: Path) -> None:
    file = shared_data / "deit-tiny" / "deit_tiny_patch16_224.safetensors"
    deit = registry.load("deit_tiny_patch16_224", weights=file)
    source = shared_data / "imagenette-224" / "validation-00000-of-00001.parquet"
    hits = total = 0
    for part in images.open_images(str(source), size=deit.size, preparation=deit.preparation).batches(50):
        answer = deit.logits(part.pixels).argmax(1).tolist()
        hits += sum(a == IMAGENETTE[label] for a, label in zip(answer, part.labels, strict=True))
        total += len(answer)
    assert total == 500
    assert 0.70 <= hits / total <= 0.72
