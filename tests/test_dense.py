"""Dense probes: planted answers, slow versions of the scores, on grids and images that are not square."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr

from vitregs.arrays import token_coords
from vitregs.errors import InputError
from vitregs.probes import dense

ROWS, COLUMNS, CELL = 3, 5, 4
COUNT, CLASSES = 24, 4
SIZE = (ROWS * CELL, COLUMNS * CELL)


def labelled(values: np.ndarray, kinds: list[str] | None = None) -> xr.DataArray:
    coords = token_coords(kinds or ["patch"] * (ROWS * COLUMNS), (ROWS, COLUMNS))
    return xr.DataArray(values.astype(np.float32), dims=("image", "token", "channel"), coords=coords)


def upsampled(cells: np.ndarray) -> np.ndarray:
    """A value a patch, on all its pixels: (n, rows, columns) → (n, H, W)."""
    return cells.repeat(CELL, 1).repeat(CELL, 2)


def bands(seed: int = 0) -> np.ndarray:
    """Classes of patches that change along one side only, where interpolation is exact: → (n, rows, columns)."""
    rng = np.random.default_rng(seed)
    cells = np.broadcast_to(rng.integers(0, CLASSES, (COUNT, 1, COLUMNS)), (COUNT, ROWS, COLUMNS)).copy()
    cells[::2] = rng.integers(0, CLASSES, (len(cells[::2]), ROWS, 1))
    return cells


def seen(cells: np.ndarray, noise: float = 0.0) -> xr.DataArray:
    """Features that name the class of each patch, with a channel that never changes."""
    x = np.eye(CLASSES + 1)[cells.reshape(COUNT, -1)]
    return labelled(x + noise * np.random.default_rng(1).standard_normal(x.shape))


# --- segmentation


def test_features_that_name_the_class_segment_all_of_it() -> None:
    cells = bands()
    found = dense.segment(seen(cells), upsampled(cells), classes=CLASSES)
    assert found.attrs == {}
    assert float(found.shares) == 1
    assert float(found.miou) == 1
    assert (float(found.low), float(found.high), int(found.n)) == (1, 1, 8)
    assert found["image"].values.tolist() == list(range(16, 24))
    np.testing.assert_allclose(found["iou"].values, 1)


def test_where_patches_meet_at_corners_the_shares_tell_what_is_lost() -> None:
    cells = np.random.default_rng(2).integers(0, CLASSES, (COUNT, ROWS, COLUMNS))
    found = dense.segment(seen(cells), upsampled(cells), classes=CLASSES, steps=600)
    assert 0.7 < float(found.shares) < 1
    assert float(found.miou) == pytest.approx(float(found.shares), abs=0.02)


def test_features_of_other_images_tell_nothing() -> None:
    cells, other = bands(), bands(9)
    cells[np.random.default_rng(0).random(cells.shape) < 0.6] = 0  # one class is frequent
    found = dense.segment(seen(other), upsampled(cells), classes=CLASSES)
    confusion = found["confusion"].values
    right = np.trace(confusion.sum(0)) / confusion.sum()
    assert right <= np.bincount(upsampled(cells)[16:].ravel()).max() / upsampled(cells)[16:].size + 0.03
    assert float(found.miou) < float(found.chance) + 0.08


def test_confusion_and_miou_by_hand() -> None:
    cells = bands()
    x = seen(cells, noise=1.0)
    found = dense.segment(x, upsampled(cells), classes=CLASSES)
    truth, confusion = upsampled(cells)[16:], found["confusion"].values
    assert confusion.sum((1, 2)).tolist() == [SIZE[0] * SIZE[1]] * 8
    for image in range(8):
        np.testing.assert_array_equal(confusion[image].sum(1), np.bincount(truth[image].ravel(), minlength=CLASSES))
    total, shares = confusion.sum(0), []
    for k in range(CLASSES):
        shares.append(total[k, k] / (total[k].sum() + total[:, k].sum() - total[k, k]))
    np.testing.assert_allclose(found["iou"].values, shares)
    assert float(found.miou) == pytest.approx(np.mean(shares))
    assert float(found.low) < float(found.miou) < float(found.high) < 1
    usual = np.bincount(upsampled(cells)[:16].ravel()).argmax()  # of the training images
    assert float(found.chance) == pytest.approx(
        (truth == usual).mean() / CLASSES
    )  # the others are there and never said


def test_classes_that_do_not_occur_are_no_part_of_the_mean() -> None:
    confusion = np.random.default_rng(0).integers(1, 9, (5, 3, 3))
    padded = np.pad(confusion, ((0, 0), (0, 2), (0, 2)))
    assert float(dense.miou(dense.counts(padded))) == pytest.approx(float(dense.miou(dense.counts(confusion))))
    assert float(dense.miou(dense.counts(np.zeros((5, 3, 3))))) == 0


def test_an_ignored_class_is_neither_trained_nor_predicted_nor_scored() -> None:
    cells = bands()
    masks = upsampled(cells)
    x = seen(cells)
    found = dense.segment(x, masks, classes=CLASSES, ignore=0)
    confusion = found["confusion"].values
    assert confusion[:, 0].sum() == confusion[..., 0].sum() == 0
    assert confusion.sum() == (masks[16:] > 0).sum()
    assert np.isnan(found["iou"].values[0])
    assert float(found.miou) == pytest.approx(1, abs=0.01)
    far = np.where(masks == 0, 255, masks)  # the same under another number
    same = dense.segment(x, far, classes=CLASSES, ignore=255)
    assert float(same.miou) > 0.95
    assert same["confusion"].values[:, 0].sum() == 0


def test_the_order_of_scored_images_and_of_dimensions_does_not_matter() -> None:
    cells = bands()
    x, masks = seen(cells, 1.0), upsampled(cells)
    order = np.r_[np.arange(16), 16 + np.random.default_rng(0).permutation(8)]
    first = dense.segment(x, masks, classes=CLASSES)
    second = dense.segment(x.isel(image=order).transpose("channel", "token", "image"), masks[order], classes=CLASSES)
    np.testing.assert_array_equal(first["confusion"].values[order[16:] - 16], second["confusion"].values)
    assert float(first.miou) == float(second.miou)
    trained = np.r_[np.random.default_rng(0).permutation(16), np.arange(16, 24)]
    third = dense.segment(x.isel(image=trained), masks[trained], classes=CLASSES)
    assert float(third.miou) == pytest.approx(float(first.miou), abs=0.03)


def test_the_same_seed_gives_the_same_head_and_leaves_the_random_state_alone() -> None:
    cells = bands()
    x, masks = seen(cells, 1.0), upsampled(cells)
    state = torch.random.get_rng_state()
    first, second = (dense.segment(x, masks, classes=CLASSES, steps=40) for _ in range(2))
    xr.testing.assert_identical(first, second)
    other = dense.segment(x, masks, classes=CLASSES, steps=40, seed=1)
    assert (other["confusion"].values != first["confusion"].values).any()
    assert torch.equal(state, torch.random.get_rng_state())


def test_interpolation_is_that_of_torch() -> None:
    cells = torch.rand(2, 3, ROWS, COLUMNS)
    for size in (SIZE, (7, 31)):
        down, across = dense._along(ROWS, size[0]), dense._along(COLUMNS, size[1])
        mine = down @ cells @ across.T
        theirs = F.interpolate(cells, size=size, mode="bilinear", align_corners=False)
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


def test_shares_of_patches_against_a_loop() -> None:
    masks = np.random.default_rng(0).integers(0, 3, (2, *SIZE))
    share = np.zeros((2, 3, ROWS, COLUMNS), np.float32)
    for i, k, y, x in np.ndindex(share.shape):
        share[i, k, y, x] = (masks[i, y * CELL : (y + 1) * CELL, x * CELL : (x + 1) * CELL] == k).mean()
    wide = F.interpolate(torch.from_numpy(share), size=SIZE, mode="bilinear", align_corners=False)
    np.testing.assert_array_equal(dense.from_shares(masks, (ROWS, COLUMNS), 3), wide.argmax(1).numpy())


# --- depth


def hills(seed: int = 0) -> np.ndarray:
    """Depths of patches: (n, rows, columns) in 1 to 4."""
    return np.random.default_rng(seed).uniform(1, 4, (COUNT, 1, 1)) * np.ones((COUNT, ROWS, COLUMNS))


def known(cells: np.ndarray) -> xr.DataArray:
    """Features that tell the depth of a patch by soft bins."""
    return labelled(np.exp(-np.square((cells.reshape(COUNT, -1, 1) - np.linspace(1, 4, 12)) / 0.3)))


@pytest.mark.parametrize("head", dense.HEADS)
def test_features_that_tell_the_depth_give_it_back(head: str) -> None:
    cells = hills()
    found = dense.estimate_depth(known(cells), upsampled(cells), low=0.9, high=4.1, bins=24, steps=800, head=head)
    assert float(found.rmse) < 0.08
    assert float(found.constant) > 0.5
    assert float(found.low_rmse) <= float(found.rmse) <= float(found.high_rmse)


def test_depth_scores_by_hand() -> None:
    depth = np.random.default_rng(0).uniform(1, 4, (COUNT, *SIZE))
    found = dense.estimate_depth(known(hills()), depth, low=1, high=4, bins=16, steps=20)
    trained, scored = depth[:16], depth[16:]
    assert found["error"].values.mean() == pytest.approx(float(found.rmse))
    assert int(found.n) == 8
    assert float(found.constant) == pytest.approx(
        np.mean([np.sqrt(np.mean((d - trained.mean()) ** 2)) for d in scored]), rel=1e-5
    )
    assert float(found.position) == pytest.approx(
        np.mean([np.sqrt(np.mean((d - trained.mean(0)) ** 2)) for d in scored]), rel=1e-5
    )


def test_the_two_heads_of_depth() -> None:
    """The convex one ends in the same place wherever it starts, and small changes of the features stay small."""
    x, depth = known(hills()), upsampled(hills())
    x = x + 0.3 * np.random.default_rng(0).standard_normal(x.shape).astype(np.float32)
    options: dict[str, Any] = {"low": 0.9, "high": 4.1, "bins": 12, "steps": 600, "head": "softmax"}
    first, second = (dense.estimate_depth(x, depth, seed=s, **options) for s in (0, 1))
    assert float(first.rmse) < 0.5 * float(first.constant)
    assert float(second.rmse) == pytest.approx(float(first.rmse), rel=0.05)
    moved = dense.estimate_depth(x * (1 + 1e-6), depth, **options)
    np.testing.assert_allclose(moved["error"].values, first["error"].values, rtol=1e-4)
    with pytest.raises(InputError, match="unknown head 'softmx': did you mean 'softmax'"):
        dense.estimate_depth(x, depth, low=1, high=4, head="softmx")


def test_cross_entropy_between_two_bins_by_hand() -> None:
    predicted, true = torch.randn(3, 4, 5), 1 + 3 * torch.rand(3, 4)
    true[0, 0], true[0, 1] = 1, 4  # the ends
    total, logs = 0.0, predicted.log_softmax(-1)
    for i, j in np.ndindex(3, 4):
        for k, centre in enumerate(np.linspace(1, 4, 5)):
            total -= max(0.0, 1 - abs(float(true[i, j]) - centre) / 0.75) * float(logs[i, j, k])
    assert float(dense._two_bins(predicted, true, 1, 4)) == pytest.approx(total / 12, rel=1e-5)


def test_features_of_other_images_tell_no_depth() -> None:
    found = dense.estimate_depth(known(hills(5)), upsampled(hills()), low=1, high=4, bins=24)
    assert float(found.rmse) > 0.9 * float(found.constant)


def test_cls_stands_beside_every_patch() -> None:
    """Patches that say nothing and a CLS token that knows the depth of the image."""
    cells = hills()
    random_features = labelled(np.random.default_rng(3).standard_normal((COUNT, ROWS * COLUMNS, 4)))
    cls = xr.DataArray(known(cells).values[:, :1], dims=("image", "token", "channel"))
    options: dict[str, Any] = {"low": 0.9, "high": 4.1, "bins": 24, "steps": 600}
    without = dense.estimate_depth(random_features, upsampled(cells), **options)
    with_cls = dense.estimate_depth(random_features, upsampled(cells), cls=cls, **options)
    assert float(with_cls.rmse) < 0.5 * float(without.rmse)


def test_the_expectation_over_bins_by_hand() -> None:
    predicted, centres = torch.randn(2, 3, 6), torch.linspace(1, 4, 6)
    weight = predicted.clamp(min=0) + 0.1
    weight = weight / weight.sum(-1, keepdim=True)
    torch.testing.assert_close(dense._expect(predicted.clone(), centres), (weight * centres).sum(-1))


def test_the_loss_by_hand_and_its_invariance() -> None:
    predicted, true = torch.rand(50) + 0.5, torch.rand(50) + 0.5
    g = np.log(predicted.numpy()) - np.log(true.numpy())
    assert float(dense.scale_invariant(predicted, true)) == pytest.approx(
        np.sqrt(g.var(ddof=1) + 0.15 * g.mean() ** 2), rel=1e-4
    )
    assert float(dense.scale_invariant(true, true)) < 1e-3
    scaled = dense.scale_invariant(true * 2, true)  # only the mean is left of a wrong scale
    assert float(scaled) == pytest.approx(np.sqrt(0.15) * np.log(2), rel=1e-3)


# --- what can be wrong


def test_masks_that_do_not_fit() -> None:
    x, masks = seen(bands()), upsampled(bands())
    with pytest.raises(InputError, match="a mask of 12x19 pixels does not fit a grid of 3x5 patches"):
        dense.segment(x, masks[:, :, :-1], classes=CLASSES)
    with pytest.raises(InputError, match="a mask of 12x20 and 24x20 pixels does not fit"):
        dense.segment(x, [*masks[:-1], masks[-1].repeat(2, 0)], classes=CLASSES)
    with pytest.raises(InputError, match="2 of 24 images have no mask: keep those that have one"):
        dense.segment(x, [None, None, *masks[2:]], classes=CLASSES)
    with pytest.raises(InputError, match="masks of 23 images for features of 24"):
        dense.segment(x, masks[:-1], classes=CLASSES)
    with pytest.raises(InputError, match="a mask holds class 3: there are 3 classes"):
        dense.segment(x, masks, classes=3)
    with pytest.raises(InputError, match="one class only"):
        dense.segment(x, np.ones_like(masks), classes=CLASSES)
    with pytest.raises(InputError, match="one class only, or none"):
        dense.segment(x, np.zeros_like(masks), classes=CLASSES, ignore=0)


def test_images_that_are_too_few_or_not_split() -> None:
    x, masks = seen(bands()), upsampled(bands())
    with pytest.raises(InputError, match="3 images are too few to train on some and test on others"):
        dense.segment(x.isel(image=slice(3)), masks[:3], classes=CLASSES)
    with pytest.raises(InputError, match=r"must lie between 0 and 1, not 1\.5"):
        dense.segment(x, masks, classes=CLASSES, share=1.5)
    with pytest.raises(InputError, match="steps must be 1 or more, not 0"):
        dense.segment(x, masks, classes=CLASSES, steps=0)


def test_features_that_are_no_patches_or_broken() -> None:
    masks = upsampled(bands())
    values = np.zeros((COUNT, ROWS * COLUMNS + 1, 3))
    with pytest.raises(InputError, match="leave CLS and registers out"):
        dense.segment(labelled(values, ["cls", *["patch"] * (ROWS * COLUMNS)]), masks, classes=CLASSES)
    x = seen(bands())
    x[3, 2, 1] = np.nan
    with pytest.raises(InputError, match="not finite"):
        dense.segment(x, masks, classes=CLASSES)


def test_depths_that_do_not_fit() -> None:
    x, depth = known(hills()), upsampled(hills())
    with pytest.raises(InputError, match=r"depths of 1.* to 3.* lie outside the bins from 1 to 3"):
        dense.estimate_depth(x, depth, low=1, high=3)
    with pytest.raises(InputError, match="depths need two bins or more and 0 < low < high"):
        dense.estimate_depth(x, depth, low=4, high=1)
    with pytest.raises(InputError, match="depths need two bins or more"):
        dense.estimate_depth(x, depth, low=1, high=4, bins=1)
    with pytest.raises(InputError, match="1 of 24 images have no depth map"):
        dense.estimate_depth(x, [None, *depth[1:]], low=1, high=4)
    with pytest.raises(InputError, match="CLS tokens of 23 images for features of 24"):
        dense.estimate_depth(x, depth, low=1, high=4, cls=x.isel(image=slice(1, None), token=slice(0, 1)))
