"""Slot Attention: what holds for any weights, and a planted problem that it must solve."""

import numpy as np
import pytest
import torch
import xarray as xr
from sklearn.metrics import adjusted_rand_score

from vitregs import arrays
from vitregs.errors import InputError
from vitregs.measure import slot_attention

GRID = (6, 8)


def planted(n: int = 32, seed: int = 0) -> tuple[xr.DataArray, np.ndarray]:
    """Three upright strips an image, each with one of six vectors everywhere: states, (n, patches) of the strip."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((6, 12))
    cuts = np.stack([rng.integers(2, 4, n), rng.integers(5, 7, n)], 1)
    strip = (np.arange(GRID[1]) >= cuts[..., None]).sum(1)[:, None].repeat(GRID[0], 1).reshape(n, -1)
    values = np.stack([vectors[rng.permutation(6)[:3]][s] for s in strip]).astype(np.float32)
    coords = arrays.token_coords(["patch"] * strip.shape[1], GRID)
    return xr.DataArray(values, dims=("image", "token", "channel"), coords=coords), strip


def agreement(maps: xr.DataArray, truth: np.ndarray) -> float:
    best = maps.transpose("image", "query", "y", "x").values.argmax(1).reshape(len(truth), -1)
    return float(np.mean([adjusted_rand_score(a, b) for a, b in zip(truth, best, strict=True)]))


@pytest.fixture(scope="module")
def net() -> slot_attention.AutoEncoder:
    torch.manual_seed(0)
    made = slot_attention.AutoEncoder(GRID, 12)
    with torch.no_grad():
        for weight in made.parameters():  # anything but its orderly beginning
            weight += 0.05 * torch.randn_like(weight)
    return made


def test_another_order_of_slots_goes_through(net: slot_attention.AutoEncoder):
    tokens, noise = torch.randn(3, 48, net.width), torch.randn(3, 5, net.width)
    order = torch.tensor([3, 0, 4, 1, 2])
    first, second = net.slots(tokens, noise), net.slots(tokens, noise[:, order])
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a[:, order], b)
    assert not torch.allclose(first[0], second[0], atol=1e-3)


def test_another_order_of_tokens_only_moves_the_attention(net: slot_attention.AutoEncoder):
    tokens, noise = torch.randn(2, 48, net.width), torch.randn(2, 4, net.width)
    order = torch.randperm(48)
    (a, x), (b, y) = net.slots(tokens, noise), net.slots(tokens[:, order], noise)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(x[..., order], y)


def test_shares_of_a_patch_sum_to_one(net: slot_attention.AutoEncoder):
    x, noise = torch.randn(3, 48, 12), torch.randn(3, 5, net.width)
    rebuilt, masks, attention = net(x, noise)
    assert rebuilt.shape == x.shape
    for part in (masks, attention):
        assert part.shape == (3, 5, 48)
        torch.testing.assert_close(part.sum(1), torch.ones(3, 48))
        assert (part >= 0).all()


def test_one_round_of_attention_against_the_formula(net: slot_attention.AutoEncoder):
    made = net.slots
    tokens, noise = torch.randn(1, 48, net.width), torch.randn(1, 3, net.width)
    made.iterations = 1
    with torch.no_grad():
        _, attention = made(tokens, noise)
        start = made.mean + made.log_std.exp() * noise[0]
        k, q = made.key(made.norm(tokens[0])), made.query(made.slot_norm(start))
    made.iterations = 3
    wanted = torch.empty(3, 48)
    for j in range(48):
        e = [float((q[i] * k[j]).sum()) / net.width**0.5 for i in range(3)]
        wanted[:, j] = torch.tensor(np.exp(e) / np.exp(e).sum())
    torch.testing.assert_close(attention[0], wanted, atol=1e-5, rtol=1e-4)


def test_places_tell_patches_apart():
    at = slot_attention.ramps(GRID)
    assert at.shape == (48, 6)
    assert len({tuple(row) for row in at.tolist()}) == 48
    torch.testing.assert_close(at[:8, 0], -torch.ones(8))  # rows before columns
    torch.testing.assert_close(at[::8, 1], -torch.ones(6))


def test_planted_regions_are_found():
    states, truth = planted()
    found = slot_attention.discover(states, slots=3, steps=400, seed=0)
    assert dict(found.sizes) == {"image": 32, "query": 3, "y": 6, "x": 8, "step": 2}
    assert agreement(found["mask"], truth) > 0.9
    before, after = found["loss"].values
    assert 0.9 < before < 1.2  # standardised states are rebuilt as nothing
    assert after < 0.1 * before
    np.testing.assert_allclose(found["mask"].sum("query"), 1, atol=1e-5)
    np.testing.assert_allclose(found["attention"].sum("query"), 1, atol=1e-5)


def test_a_seed_gives_the_same_slots_and_leaves_the_dice_alone():
    states, _ = planted(8)
    torch.manual_seed(5)
    first = slot_attention.discover(states, slots=3, steps=4, batch=3, seed=1)
    dice = torch.rand(1)
    torch.manual_seed(6)
    again = slot_attention.discover(states.transpose("channel", "image", "token"), slots=3, steps=4, batch=3, seed=1)
    xr.testing.assert_identical(first, again)
    torch.manual_seed(5)
    assert torch.rand(1) == dice
    other = slot_attention.discover(states, slots=3, steps=4, batch=3, seed=2)
    assert not np.allclose(first["mask"], other["mask"], atol=1e-4)


def test_no_steps_change_nothing():
    states, _ = planted(4)
    found = slot_attention.discover(states, slots=2, steps=0)
    assert found["loss"][0] == found["loss"][1]


@pytest.mark.parametrize("wrong", [{"slots": 1}, {"steps": -1}, {"batch": 0}])
def test_bad_inputs_are_named(wrong: dict[str, int]):
    states, _ = planted(2)
    with pytest.raises(InputError, match="cannot train"):
        slot_attention.discover(states, **wrong)
    with pytest.raises(InputError, match="from 0 images"):
        slot_attention.discover(states[:0])
