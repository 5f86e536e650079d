"""Everything from one reading and one forward pass: counted, equal to slow versions, and what cannot be had is said."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from tests.test_capture import close, make, pixels, states, unfused
from vitregs import arrays
from vitregs.data import images
from vitregs.errors import InputError
from vitregs.measure import lost
from vitregs.measure.diagnose import Diagnosis, diagnose
from vitregs.models import capture, registry
from vitregs.models.backbone import Backbone
from vitregs.models.capture import hooks
from vitregs.probes import local

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:timm.layers", "ignore:Using a non-tuple sequence")


def test_all_measures_together_are_those_of_timm() -> None:
    bare = make("vit_small_patch14_reg4_dinov2")
    x = pixels(bare, 4, 6)
    seen = capture.capture(
        bare, x, norms=True, tokens=[1, 3], attention=["cls", 5], qkv=["value", "key"], received=True, embeddings=True,
        batch=2,
    )  # fmt: skip
    expected, maps = states(bare, x), unfused(bare, x)
    close(seen.norms.sel(layer=slice(1, None)).values, expected.norm(dim=-1).transpose(0, 1))
    close(seen.tokens.values, expected[[0, 2]].transpose(0, 1))
    close(seen.attention.sel(attention_layer=3).values, maps[3][:, :, [0, 5 + 5]])
    for layer in (1, 2, 3):
        close(seen.received.sel(received_layer=layer).values, maps[layer].sum(2).amax(1))
        close(seen.sink.sel(received_layer=layer).values, maps[layer].sum(2).amax(1)[:, 5:].amax(1))
    for name in ("key", "value"):
        alone = capture.projections(bare, x, which=name)
        np.testing.assert_allclose(seen.qkv.sel(projection=name).isel(qkv_layer=0), alone, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(
        arrays.patch_maps(seen.embeddings), arrays.patch_maps(capture.patch_embeddings(bare, x, batch=2))
    )
    assert seen.embeddings.isel(token=seen["kind"] != "patch").isnull().all()
    assert hooks(bare.net) == 0


def test_tokens_are_selected_by_kind() -> None:
    bare = make("vit_small_patch14_reg4_dinov2")
    seen = capture.capture(bare, pixels(bare), norms=True, attention=["cls"], qkv="value")
    assert seen.norms.sel(layer=3, token="patch").shape == (3, 24)
    assert seen.norms.sel(token="register").shape == (3, 4, 4)
    assert seen.qkv.sel(projection="value", token="patch").shape == (3, 1, 24, 96)
    patches = capture.capture(bare, pixels(bare), norms=True, kinds="patch").norms
    np.testing.assert_array_equal(patches, seen.norms.sel(token="patch"))


def counted(bare: Backbone, source: images.Images, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count readings of the images and forward passes."""
    count = {"readings": 0, "passes": 0}
    forward, batches = bare.net.forward_features, images.Images.batches

    def run(x: torch.Tensor) -> torch.Tensor:
        count["passes"] += 1
        return forward(x)

    def read(self: images.Images, batch: int = 32) -> Iterator[images.Batch]:
        count["readings"] += 1
        return batches(self, batch)

    monkeypatch.setattr(bare.net, "forward_features", run)
    monkeypatch.setattr(images.Images, "batches", read)
    return count


@pytest.mark.parametrize(
    ("work", "batch"),
    [
        (lambda b, s: diagnose(b, s, batch=8), 8),
        (lambda b, s: lost.evaluate(b, s, biases=(-0.5,)), 32),
        (lambda b, s: lost.projection_norms(b, s), 32),
        (lambda b, s: local.probe(b, s, batch=8), 8),
        (lambda b, s: capture.capture(b, s, norms=True, attention=["cls"], qkv=["key"], received=True, batch=8), 8),
    ],
)
def test_one_reading_and_one_forward_pass(work: Callable, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = registry.load("dinov2-pico-reg4", device="cpu")
    source = images.open_images("scenes", size=64, count=40)
    count = counted(bare, source, monkeypatch)
    work(bare, source)
    assert count == {"readings": 1, "passes": -(-40 // batch)}
    assert hooks(bare.net) == 0


def test_blocks_behind_the_deepest_layer_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = make("vit_small_patch14_dinov2")
    ran: list[int] = []
    for n, block in enumerate(bare.net.blocks, 1):
        block.register_forward_pre_hook(lambda _m, _x, n=n: ran.append(n))
    capture.patch_embeddings(bare, pixels(bare))
    capture.tokens(bare, pixels(bare), layer=2)
    assert [n for n in ran if n > 2] == []
    assert 2 in ran


def planted_sink(share: float = 0.05) -> Backbone:
    """A network in whose second block every token gives one bright patch about as much attention as asked for."""
    bare = make("vit_small_patch14_dinov2")
    attn = bare.net.blocks[1].attn

    def forward(x: torch.Tensor, **_kw: object) -> torch.Tensor:
        n, tokens, width = x.shape
        q, k, v = attn.qkv(x).reshape(n, tokens, 3, 3, -1).permute(2, 0, 3, 1, 4)
        q, k = 0.3 * q, k.clone()
        q[..., 0] = 1
        k[..., 0] = 0
        k[..., 77, 0] = np.log(share * tokens / (1 - share)) / attn.scale
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width)

    attn.forward = forward
    return bare


def test_a_planted_sink_is_estimated_without_bias_and_with_its_error() -> None:
    bare = planted_sink()
    x = pixels(bare, 16, 24, count=6)
    exact = capture.capture(bare, x, received=[2]).isel(received_layer=0)
    assert exact.received.isel(token=77).min() > 10  # fair shares
    assert exact.attrs["received"] == "exact"
    assert "received_error" not in exact
    draws = [capture.capture(bare, x, received=[2], queries=128, seed=s).isel(received_layer=0) for s in range(8)]
    for drawn in draws:
        assert drawn.attrs["received"] == "estimated from 128 random queries an image"
        assert (np.abs(drawn.sink / exact.sink - 1) < 0.1).all()
        assert set(drawn.received.argmax("token").values) == {77}
    sinks, errors = (np.stack([d[k].values for d in draws]) for k in ("sink", "sink_error"))
    z = (sinks - exact.sink.values) / errors
    assert abs(z.mean()) < 0.6  # 48 draws: 4 standard errors
    assert 0.6 < z.std() < 1.5
    biased = np.stack([d.received.values for d in draws]) - exact.received.values
    assert biased.mean() < 0.02  # a wrong choice of the head lowers, never raises
    again = capture.capture(bare, x, received=[2], queries=128, batch=4).isel(received_layer=0)
    np.testing.assert_allclose(again.sink, draws[0].sink, rtol=1e-4)  # the draw belongs to the image, not to the batch


def test_as_many_queries_as_tokens_are_exact() -> None:
    bare = make("vit_small_patch14_reg4_dinov2")
    x = pixels(bare)
    all_ = capture.capture(bare, x, received=True, queries=29)
    assert all_.attrs["received"] == "exact"
    np.testing.assert_array_equal(all_.received, capture.attention_received(bare, x))
    with pytest.raises(InputError, match="estimated from 4 queries or more, not 2"):
        capture.capture(bare, x, received=True, queries=2)


def words(found: Diagnosis) -> str:
    """The report without its line breaks."""
    return " ".join(found.text().split())


def test_a_diagnosis_without_attention_keeps_its_norms() -> None:
    """Differential attention has two maps a block; the sink column is empty and the report says why."""
    bare = registry.random("vit_dwee_patch16_reg1_gap_256", depth=3)
    found = diagnose(bare, images.open_images("scenes", size=128, count=8), progress=False)
    assert found.norms.sizes["layer"] == 4
    assert found.layers["sink"].isna().all()
    assert "each of blocks 1 to 3 has more than one attention map" in words(found)
    assert found.attention is None
    bare = make("vit_small_patch14_dinov2")
    bare.net.blocks[1].attn.fused_attn = False
    found = diagnose(bare, images.open_images("scenes", size=84, count=8))
    assert found.layers["sink"].isna().tolist() == [True, False, True, False]
    assert "block 2 does not use fused attention" in found.sinks


def test_a_diagnosis_says_how_sinks_were_estimated() -> None:
    bare = make("vit_small_patch14_dinov2")
    bare.loaded = ["the position table was resized"]
    source = images.open_images("scenes", size=14 * 13, count=4)
    found = diagnose(bare, source)
    assert found.facts()["sinks"] == "estimated from 128 random queries an image"
    assert (found.layers["sink_error"][1:] > 0).all()
    assert "attention sink: estimated from 128 random queries an image (standard error at most" in words(found)
    assert "note: the position table was resized" in words(found)
    exact = diagnose(bare, source, queries=None)
    assert exact.sinks == "exact"
    assert exact.layers["sink_error"].isna().all()


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_too_little_memory_is_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = make("vit_small_patch14_dinov2")

    def fail(_x: torch.Tensor) -> torch.Tensor:
        raise error

    monkeypatch.setattr(bare.net, "forward_features", fail)
    with pytest.raises(InputError, match="out of memory with 3 images of 56x84 at a time: lower --batch or --size"):
        capture.norms(bare, pixels(bare))


def test_norms_of_half_precision_do_not_overflow() -> None:
    """In float16 the square of 256 is infinite."""
    bare = make("vit_small_patch14_dinov2")
    bare.net.patch_embed.proj.bias.mul_(400 / bare.net.patch_embed.proj.bias.norm())
    x = pixels(bare)
    whole = capture.norms(bare, x)
    assert whole.median() > 300
    brief = capture.capture(bare, x, norms=True, precision="bfloat16").norms
    assert np.abs(brief / whole - 1).max() < 0.02
    assert np.abs(brief / whole - 1).mean() < 0.005
    assert np.abs(brief / whole - 1).max() > 0  # another arithmetic, indeed
    bare.net.half()
    assert np.abs(capture.norms(bare, x) / whole - 1).max() < 0.01
    with pytest.raises(InputError, match="unknown precision 'bfloat'"):
        capture.capture(bare, x, norms=True, precision="bfloat")


def test_nothing_asked_for_is_a_problem() -> None:
    bare = make("vit_small_patch14_dinov2")
    with pytest.raises(InputError, match="nothing is asked for"):
        capture.capture(bare, pixels(bare))
