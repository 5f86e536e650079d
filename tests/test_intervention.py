"""A ViT with planted register neurons has a second mode of norms, at the layer and with the share that was planted.

Three neurons of one MLP, found in published networks too (Jiang et al. 2025), are set to fire on flat dark patches and to write a
long vector. Everything else keeps its random weights, so that without the neurons there is nothing to find.
"""

from typing import Any

import numpy as np
import pytest
import torch

from vitregs.measure import fingerprint, outliers
from vitregs.models import capture, registry
from vitregs.models.backbone import Backbone
from vitregs.probes import sampling

GRID = (6, 8)
SIDE = 8  # pixels of a patch
BLOCK = 2  # whose MLP is changed: its output is layer BLOCK + 1
COUNT = 40


def images(share: float) -> tuple[torch.Tensor, np.ndarray]:
    """Noise, in which a share of the patches is flat and dark: → pixels and which patches (images, patches)."""
    rng = np.random.default_rng(0)
    flat = rng.random((COUNT, GRID[0] * GRID[1])) < share
    pixels = rng.uniform(0.4, 1.0, (COUNT, 3, GRID[0] * SIDE, GRID[1] * SIDE))
    mask = flat.reshape(COUNT, *GRID).repeat(SIDE, 1).repeat(SIDE, 2)
    pixels = np.where(mask[:, None], 0.02, pixels)
    return torch.from_numpy(pixels.astype(np.float32)), flat


def network() -> Backbone:
    return registry.random(
        "vit_tiny_patch16_224", img_size=(48, 64), patch_size=SIDE, embed_dim=48, depth=5, num_heads=3, num_classes=0
    )


def plant(backbone: Backbone, pixels: torch.Tensor, flat: np.ndarray, length: float) -> None:
    """Let three neurons of one block fire on the marked patches and write a vector of some length."""
    block: Any = backbone.net.blocks[BLOCK]  # type: ignore[index]
    seen: list[torch.Tensor] = []
    hook = block.norm2.register_forward_hook(lambda _m, _x, y: seen.append(y))
    with torch.no_grad():
        backbone.net.forward_features(backbone.prepare(pixels))  # type: ignore[operator]
    hook.remove()
    x = seen[0][:, backbone.prefix :]
    marked = torch.from_numpy(flat)
    way = x[marked].mean(0) - x[~marked].mean(0)
    low, high = (x[~marked] @ way).max(), (x[marked] @ way).min()
    assert low < high, "the planted patches cannot be told by one neuron"
    gain = 10 / (high - low)  # from silent to 5 within the gap
    with torch.no_grad():
        rows = slice(0, 3)
        block.mlp.fc1.weight[rows] = gain * way
        block.mlp.fc1.bias[rows] = -gain * (low + high) / 2
        target = torch.nn.functional.normalize(torch.randn(48, 3, generator=torch.Generator().manual_seed(1)), dim=0)
        block.mlp.fc2.weight[:, rows] = target * length / 15


@pytest.mark.parametrize("share", [0.02, 0.05])
def test_planted_neurons_are_found_with_their_share(share: float) -> None:
    pixels, flat = images(share)
    backbone = network()
    before = outliers.layer_evidence(capture.norms(backbone, pixels))
    assert before["ratio"].max() < 2.5  # dark patches differ a little by themselves
    plain = float(capture.norms(backbone, pixels, layers=[BLOCK + 1]).median())
    plant(backbone, pixels, flat, 20 * plain)
    norms = capture.norms(backbone, pixels)
    layers = outliers.layer_evidence(norms)
    found = fingerprint.mode(norms, layers)
    assert found.answer == "for"
    assert fingerprint.strongest_mode(layers).layer > BLOCK
    assert found.low > fingerprint.STRONG
    table = layers.set_index("layer")
    assert table.loc[:BLOCK, "ratio"].max() < 2.5  # nothing before the block that writes
    assert table.loc[BLOCK + 1, "share"] == pytest.approx(flat.mean(), rel=0.02)
    for at in range(BLOCK + 1, backbone.depth + 1):
        here = norms.sel(layer=at)
        marked = outliers.mark_outliers(here, outliers.find_cutoff(here))
        np.testing.assert_array_equal(sampling.eligible(marked, "outlier")[:, backbone.prefix :], flat)


def test_silent_neurons_change_nothing() -> None:
    """The same neurons on images without such patches: still none."""
    pixels, flat = images(0.03)
    backbone = network()
    plain = float(capture.norms(backbone, pixels, layers=[BLOCK + 1]).median())
    plant(backbone, pixels, flat, 20 * plain)
    busy, _ = images(0.0)
    norms = capture.norms(backbone, busy)
    assert fingerprint.mode(norms, outliers.layer_evidence(norms)).answer == "against"
