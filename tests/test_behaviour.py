"""What moves outliers: changes of the input and of the network do what they say, and leave no trace."""

import numpy as np
import torch

from vitregs.measure import behaviour
from vitregs.models import capture, registry


def test_a_hidden_patch_is_as_good_as_absent_and_nothing_stays() -> None:
    vit = registry.random(
        "vit_tiny_patch16_224", img_size=(32, 32), patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=0
    )
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = capture.norms(vit, pixels).values
    hidden = torch.zeros(1, 17, dtype=torch.bool)
    hidden[0, 5] = True
    masked = capture.norms(behaviour.without_tokens(vit, hidden), pixels, layers=[-1]).values[:, 0]
    net = vit.net
    with torch.no_grad():
        x = net._pos_embed(net.patch_embed(vit.normalise(pixels)))  # type: ignore[operator]
        x = net.blocks(net.norm_pre(x[:, ~hidden[0]]))  # type: ignore[operator]
    np.testing.assert_allclose(masked[:, ~hidden[0].numpy()], x.norm(dim=-1).numpy(), rtol=1e-4)
    assert np.array_equal(capture.norms(vit, pixels).values, before)


def test_changes_of_the_input() -> None:
    x = torch.rand(2, 3, 32, 32)
    mixed = behaviour.shuffled(x, (8, 8), torch.Generator().manual_seed(0))
    assert torch.equal(mixed.flatten().sort().values, x.flatten().sort().values)
    boxed = behaviour.letterbox(x, 8)
    assert not boxed[:, :, :8].any()
    assert torch.equal(boxed[:, :, 8:24], x[:, :, 8:24])
    assert torch.equal(behaviour.shifted(x, 8)[..., 8:], x[..., :-8])
    assert torch.equal(behaviour.tiled(x, (8, 8))[..., :8, :8], x[..., 16:24, 16:24])
