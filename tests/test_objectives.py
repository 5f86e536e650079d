"""The five objectives against formulas written out, and the schedules that act on them."""

import math
import random

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from vitregs.data import scenes
from vitregs.models import registry
from vitregs.train import augment, data, learners, schedules, text, vit
from vitregs.train.config import Clip, Dino, DinoV2, Mae, Recipe, Supervised
from vitregs.train.objectives import clip, dino, dinov2, mae, supervised

CPU = torch.device("cpu")
SMALL = {"size": "femto", "image_size": 32, "patch_size": 8, "steps": 10, "batch": 4, "warmup": 2, "precision": "fp32"}
OWN = {
    "supervised": Supervised(),
    "clip": Clip(text_width=32, text_depth=1, embed=16),
    "mae": Mae(decoder_width=32, decoder_depth=1),
    "dino": Dino(local_crops=2, local_size=16, prototypes=32, hidden=32, bottleneck=16),
    "dinov2": DinoV2(local_crops=2, local_size=16, prototypes=32, patch_prototypes=24, hidden=32, bottleneck=16),
}


def made(name: str, **changes: object) -> tuple[Recipe, data.Feed, object]:
    chosen = Recipe(name, "for a test", OWN[name], **SMALL).override(**changes)
    feed = data.make(chosen, CPU)
    return chosen, feed, learners.learner(chosen, feed)


def close(one: torch.Tensor | float, two: torch.Tensor | float, tolerance: float = 1e-5) -> bool:
    return bool(torch.allclose(torch.as_tensor(one), torch.as_tensor(two), rtol=tolerance, atol=tolerance))


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


# --- the network


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("patch_norm", [False, True])
def test_encode_is_timm(registers: int, patch_norm: bool) -> None:
    net = vit.build(Recipe("x", "", **SMALL, registers=registers, patch_norm=patch_norm)).eval()
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert close(vit.encode(net, pixels), net.forward_features((pixels - 0.42) / 0.25), 1e-6)


def test_small_crops_are_timms_own_resizing() -> None:
    chosen = Recipe("x", "", **SMALL, registers=2)
    net = vit.build(chosen).eval()
    nn.init.normal_(net.pos_embed)
    other = timm.models.VisionTransformer(**chosen.vit(), num_classes=0, dynamic_img_size=True).eval()
    other.load_state_dict(net.state_dict())
    pixels = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        assert close(vit.resized(net, pixels), other.forward_features((pixels - 0.42) / 0.25)[:, 0])


def test_kept_patches_are_the_only_ones_that_enter() -> None:
    net = vit.build(Recipe("x", "", **SMALL, registers=1)).eval()
    pixels = torch.rand(1, 3, 32, 32)
    keep = torch.tensor([[5, 0, 10]])
    other = pixels.clone()
    other[:, :, 24:, 24:] += 1  # patch 15
    everything = torch.arange(16)[None]
    with torch.no_grad():
        assert close(vit.encode(net, pixels, keep=everything), vit.encode(net, pixels), 1e-6)
        one, two = (vit.encode(net, p, keep=keep) for p in (pixels, other))
        assert torch.equal(one, two)
        assert one.shape == (1, 2 + 3, 32)
        assert not torch.equal(vit.encode(net, pixels), vit.encode(net, other))


def test_registers_leave_the_rest_as_it_was_and_start_apart() -> None:
    nets = [vit.build(Recipe("x", "", **SMALL, registers=n)).state_dict() for n in (0, 4, 8)]
    tokens = nets[1].pop("reg_token")[0]
    assert tokens.std() == pytest.approx(0.02, rel=0.3)
    assert (F.cosine_similarity(tokens[:1], tokens[1:]).abs() < 0.7).all()
    nets[2].pop("reg_token")
    for other in nets[1:]:
        assert nets[0].keys() == other.keys()
        assert [k for k in other if not torch.equal(nets[0][k], other[k])] == []


# --- supervised


def test_cutmix_moves_a_box_to_the_next_image() -> None:
    pixels = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 16, 16)
    kept = []
    for seed in range(40):
        torch.manual_seed(seed)
        mixed, share = augment.cutmix(pixels)
        foreign = mixed != pixels
        assert float(foreign.float().mean()) == pytest.approx(1 - share)
        assert torch.equal(foreign, foreign[:1].expand_as(foreign))  # the same box everywhere
        assert torch.equal(mixed[foreign], pixels.roll(1, 0)[foreign])
        where = foreign[0, 0].nonzero()
        if len(where):
            sides = where.amax(0) - where.amin(0) + 1
            assert int(sides.prod()) == len(where)  # a rectangle
        kept.append(share)
    assert min(kept) < 0.3
    assert max(kept) > 0.95


@pytest.mark.parametrize("kind", ["bce", "ce"])
def test_cutmix_mixes_losses_by_area(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = data.make(Recipe("x", "", **SMALL), torch.device("cpu"))
    batch = feed.take(0)
    plain = learners.learner(Recipe("x", "", Supervised(kind), **SMALL), feed)
    mixing = learners.learner(Recipe("x", "", Supervised(kind, cutmix=1.0), **SMALL), feed)
    monkeypatch.setattr(supervised, "cutmix", lambda pixels: (pixels, 0.75))
    other = data.Batch(batch.pixels, batch.label.roll(1), batch.labels.roll(1, 0))
    with torch.no_grad():
        wanted = 0.75 * plain(batch) + 0.25 * plain(other)
        assert float(mixing(batch)) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["bce", "ce"])
def test_supervised_loss_by_hand(kind: str, smoothing: float) -> None:
    chosen = Recipe("x", "", Supervised(kind, smoothing), **SMALL)
    feed = data.make(chosen, CPU)
    learner = supervised.Learner(chosen, feed).eval()
    batch = feed.take(0)
    with torch.no_grad():
        x = learner.vit((batch.pixels - 0.42) / 0.25).double().numpy()
        found = float(learner(batch))
    if kind == "ce":
        wanted = np.full(x.shape, smoothing / 64)
        wanted[np.arange(4), batch.label] += 1 - smoothing
        by_hand = -(wanted * log_softmax(x)).sum(1).mean()
    else:
        wanted = batch.labels.numpy() * (1 - smoothing) + smoothing / 64
        by_hand = (np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0) - x * wanted).mean()
    assert found == pytest.approx(by_hand, rel=1e-5)


# --- clip


def test_clip_loss_by_hand() -> None:
    _, feed, learner = made("clip")
    batch = feed.take(0, captions=True)
    with torch.no_grad():
        a = learner.images(batch.pixels).double().numpy()
        b = learner.sentences(learner.words.encode(batch.captions)).double().numpy()
        found = float(learner(batch))
    assert np.allclose(np.linalg.norm(a, axis=1), 1)
    logits = a @ b.T / 0.07
    by_hand = -(np.diag(log_softmax(logits)) + np.diag(log_softmax(logits.T))).mean() / 2
    assert found == pytest.approx(by_hand, rel=1e-5)


def test_the_temperature_is_learned_and_clamped() -> None:
    _, feed, learner = made("clip")
    assert float(learner.scale.detach().exp()) == pytest.approx(1 / 0.07)
    batch = feed.take(0, captions=True)
    learner(batch).backward()
    assert learner.scale.grad.abs() > 0
    with torch.no_grad():
        learner.scale.fill_(math.log(100))
        hot = float(learner(batch))
        learner.scale.fill_(math.log(5000))
        assert float(learner(batch)) == pytest.approx(hot)


def test_the_text_tower_reads_at_the_end_sign() -> None:
    _, _, learner = made("clip")
    numbers = learner.words.encode(["a red disc", "a red disc"])
    numbers[1, 20:] = 7  # words behind the end are never seen
    with torch.no_grad():
        one, two = learner.sentences(numbers)
        three = learner.sentences(learner.words.encode(["a red star"]))[0]
    assert close(one, two, 1e-6)
    assert not close(one, three, 1e-3)


def test_every_scene_caption_is_known_and_fits() -> None:
    message = text.Vocabulary([])
    found = scenes.render(200, 32, seed=3, difficulty=scenes.Difficulty(objects=(6, 6))).captions()
    numbers = message.encode(found)
    assert not (numbers == text.UNKNOWN).any()
    assert (numbers == message.end).sum(1).tolist() == [1] * 200
    assert (numbers.argmax(1) == (numbers == message.end).int().argmax(1)).all()
    assert len({tuple(n) for n in numbers.tolist()}) == len(set(found))


# --- mae


def test_patches_round_trip() -> None:
    _, _, learner = made("mae")
    pixels = torch.rand(2, 3, 32, 32)
    patches = learner.patchify(pixels)
    assert torch.equal(learner.unpatchify(patches), pixels)
    assert torch.equal(patches[1, 6].view(3, 8, 8), pixels[1, :, 8:16, 16:24])  # row 1, column 2


def test_mae_loss_by_hand_and_what_it_sees() -> None:
    _, feed, learner = made("mae", registers=2)
    learner.eval()
    pixels = feed.take(0).pixels
    torch.manual_seed(5)
    order, hidden = learner.draw(4, CPU)
    assert hidden.sum(1).tolist() == [12] * 4
    assert not hidden.gather(1, order[:, : learner.kept]).any()
    torch.manual_seed(5)
    with torch.no_grad():
        found = float(learner(feed.take(0)))
        painted = learner.predict(pixels, order)
        occluded = pixels.clone()  # without its hidden patches
        for i in range(4):
            for p in hidden[i].nonzero()[:, 0].tolist():
                y, x = divmod(p, 4)
                occluded[i, :, y * 8 : y * 8 + 8, x * 8 : x * 8 + 8] = 0.5
        assert close(learner.predict(occluded, order), painted, 1e-6)
    errors = []
    for i in range(4):
        for p in hidden[i].nonzero()[:, 0].tolist():
            y, x = divmod(p, 4)
            patch = pixels[i, :, y * 8 : y * 8 + 8, x * 8 : x * 8 + 8].double().numpy().ravel()
            wanted = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
            errors.append(((painted[i, p].double().numpy() - wanted) ** 2).mean())
    assert found == pytest.approx(np.mean(errors), rel=1e-4)


def test_the_decoder_puts_patches_where_they_were() -> None:
    """With a decoder that only copies, each visible patch comes out at its own place."""
    _, feed, learner = made("mae")
    learner.decoder, learner.norm, learner.paint = nn.Identity(), nn.Identity(), nn.Identity()
    learner.place.zero_()
    pixels = feed.take(0).pixels
    order, hidden = learner.draw(4, CPU)
    with torch.no_grad():
        out = learner.predict(pixels, order)
        tokens = learner.enter(vit.encode(learner.vit, pixels, keep=order[:, : learner.kept]))[:, 1:]
    for i in range(4):
        for j, place in enumerate(order[i, : learner.kept].tolist()):
            assert torch.equal(out[i, place], tokens[i, j])
        assert close(out[i][hidden[i]], learner.mask_token[0].expand(12, -1).detach(), 0)


# --- dino and dinov2


def fixed_views(learner: object, pixels: torch.Tensor) -> None:
    """Let the crops be the same at every call."""
    torch.manual_seed(3)
    views = learner.crops(pixels)

    class Fixed(nn.Module):
        def forward(self, _pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            return views

    learner.crops = Fixed()


def dino_by_hand(targets: np.ndarray, predicted: np.ndarray, centre: np.ndarray, hot: float) -> float:
    """Mean over pairs of different views: target (2, n, K), predicted (views, n, K)."""
    target = np.exp(log_softmax((targets - centre) / hot))
    terms = [
        -(target[t] * log_softmax(predicted[s] / 0.1)).sum(-1).mean()
        for t in range(len(targets))
        for s in range(len(predicted))
        if s != t
    ]
    return float(np.mean(terms))


@pytest.mark.parametrize("name", ["dino", "dinov2"])
def test_dino_losses_by_hand(name: str) -> None:
    _, feed, learner = made(name)
    batch = feed.take(0)
    fixed_views(learner, batch.pixels)
    with torch.no_grad():  # a student that has moved on, and a centre that is not zero
        for p in [*learner.vit.parameters(), *learner.head.parameters()]:
            p.add_(torch.randn_like(p) * 0.02)
        learner.loss.center.normal_(0, 0.1)
    learner.step = 1
    hot = learner.temperature()
    centre = learner.loss.center[0].double().numpy()
    large, small = learner.crops(batch.pixels)
    with torch.no_grad():
        tokens = [vit.encode(learner.teacher, v) for v in large]
        target = np.stack([learner.teacher_head(t[:, 0]).double().numpy() for t in tokens])
        masks = torch.zeros(8, 4, 4, dtype=torch.bool)
        if name == "dinov2":
            masks[1, 1:3, 0:2] = masks[6, 0, :3] = True
            learner.masks = lambda _count, _device: masks
        hidden = masks.flatten(1).view(2, 4, 16)
        token = getattr(learner, "mask_token", torch.zeros(1, 1, 32))
        seen = [
            vit.encode(learner.vit, v, lambda x, m=m: x * ~m[..., None] + token * m[..., None])
            for v, m in zip(large, hidden, strict=True)
        ]
        cls = [t[:, 0] for t in seen] + [vit.resized(learner.vit, v) for v in small]
        predicted = np.stack([learner.head(c).double().numpy() for c in cls])
        found = float(learner(batch))
    wanted = dino_by_hand(target, predicted, centre, hot)
    if name == "dinov2":
        total = 0.0
        for v in range(2):
            for i in range(4):
                if not hidden[v, i].any():
                    continue
                with torch.no_grad():
                    t = learner.teacher_patch_head(tokens[v][i, 1:][hidden[v, i]]).double().numpy()
                    s = learner.patch_head(seen[v][i, 1:][hidden[v, i]]).double().numpy()
                total += -(np.exp(log_softmax(t / hot)) * log_softmax(s / 0.1)).sum(-1).mean()
        wanted += total / 8  # crops without a mask count as zero
        for v in range(2):
            x = seen[v][:, 0].double().numpy()
            x /= np.linalg.norm(x, axis=1, keepdims=True)
            far = np.linalg.norm(x[:, None] - x[None], axis=-1) + np.eye(4) * 9
            wanted += 0.1 * -np.log(far.min(1)).mean()
    assert found == pytest.approx(wanted, rel=2e-4)
    assert np.allclose(learner.loss.center[0].numpy(), 0.9 * centre + 0.1 * target.mean((0, 1)), atol=1e-5)


@pytest.mark.parametrize("name", ["dino", "dinov2"])
def test_the_teacher_follows_by_its_momentum_and_learns_nothing_itself(name: str) -> None:
    _, feed, learner = made(name)
    parts = [("vit", "teacher"), ("head", "teacher_head")]
    parts += [("patch_head", "teacher_patch_head")] if name == "dinov2" else []
    for student, teacher in parts:
        one, two = getattr(learner, student), getattr(learner, teacher)
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
        assert not any(p.requires_grad for p in two.parameters())
    assert not learner.teacher.training
    learner(feed.take(0)).backward()
    with torch.no_grad():
        for p in learner.parameters():
            if p.requires_grad:
                p.add_(1.0)
    before = {t: [p.clone() for p in getattr(learner, t).parameters()] for _, t in parts}
    learner.step = 5  # half way
    momentum = 1 - (1 - learner.own.momentum) / 2
    assert learner.momentum() == pytest.approx(momentum)
    learner.after_update()
    for student, teacher in parts:
        for s, t, old in zip(
            getattr(learner, student).parameters(), getattr(learner, teacher).parameters(), before[teacher], strict=True
        ):
            assert close(t, momentum * old + (1 - momentum) * s, 1e-6)
    learner.step = 10
    assert learner.momentum() == 1.0


@pytest.mark.parametrize("name", ["dino", "dinov2"])
def test_prototypes_stand_still_at_first_and_keep_their_length(name: str) -> None:
    chosen, feed, learner = made(name, steps=100)  # freeze_last 0.02: two steps
    optimizer = schedules.optimiser(learner, chosen)
    heads = [learner.head] + ([learner.patch_head] if name == "dinov2" else [])
    moved = []
    for step in range(4):
        before = [h.last_layer.weight.detach().clone() for h in heads]
        learner.step = step
        torch.manual_seed(step)
        learner(feed.take(step)).backward()
        learner.before_update()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        moved.append([not torch.equal(h.last_layer.weight, b) for h, b in zip(heads, before, strict=True)])
        for h in heads:
            assert close(h.last_layer.weight.norm(dim=1), torch.ones(len(h.last_layer.weight)), 1e-5)
    assert moved == [[False] * len(heads)] * 2 + [[True] * len(heads)] * 2


def test_the_teachers_temperature_rises() -> None:
    _, _, learner = made("dinov2", steps=100)
    found = []
    for step in (0, 15, 30, 99):
        learner.step = step
        found.append(learner.temperature())
    assert found == pytest.approx([0.04, 0.055, 0.07, 0.07])


def test_masks_are_blocks_on_some_crops() -> None:
    _, _, learner = made("dinov2", image_size=64, local_size=16)
    torch.manual_seed(0)
    random.seed(9)
    masks = learner.masks(40, CPU)
    torch.manual_seed(0)
    random.seed(1)
    assert torch.equal(masks, learner.masks(40, CPU))  # torch's seed decides
    share = masks.flatten(1).float().mean(1)
    assert (share > 0).sum() == 20
    assert share.max() <= 0.5
    assert share[share > 0].mean() == pytest.approx(0.3, abs=0.07)
    one = masks[share.argmax()].float()
    pairs = (one[1:] * one[:-1]).sum() + (one[:, 1:] * one[:, :-1]).sum()
    assert pairs > one.sum()  # blocks, not salt and pepper


@pytest.mark.parametrize("side", [4, 5, 6])
def test_masks_of_small_grids(side: int) -> None:
    """lightly asks for four patches a block, which such a grid may not have."""
    _, _, learner = made("dinov2", image_size=8 * side, local_size=8)
    masks = learner.masks(16, CPU)
    assert masks.shape == (16, side, side)
    assert masks.flatten(1).any(1).sum() == 8


def test_untied_heads() -> None:
    _, _, learner = made("dinov2")
    assert learner.head.last_layer.weight.shape[0] == 32
    assert learner.patch_head.last_layer.weight.shape[0] == 24
    shared = {id(p) for p in learner.head.parameters()} & {id(p) for p in learner.patch_head.parameters()}
    assert not shared


# --- augmentation


@pytest.mark.parametrize("kind", ["crop", "three", "large", "small"])
def test_each_image_has_draws_of_its_own(kind: str) -> None:
    pixels = scenes.render(1, 32, seed=2).pixels.repeat(8, 1, 1, 1)
    torch.manual_seed(0)
    multi = augment.MultiCrop(32, OWN["dino"])
    if kind in ("large", "small"):
        large, small = multi(pixels)
        out = large[0] if kind == "large" else small[0]
        assert large.shape == (2, 8, 3, 32, 32)
        assert small.shape == (2, 8, 3, 16, 16)
    else:
        out = (augment.CropFlip(32, (0.2, 1.0)) if kind == "crop" else augment.ThreeAugment(32))(pixels)
    assert ((out >= 0) & (out <= 1.0001)).all()
    flat = out.flatten(1)
    assert (torch.cdist(flat, flat) + torch.eye(8) * 9 > 1e-3).all()


def test_kornia_does_what_torchvision_does() -> None:
    """One of kornia's two colour jitters adds to the brightness, so that crops come out black or white; ours multiplies."""
    import kornia.augmentation as K
    from torchvision.transforms.v2 import functional as V

    x = scenes.render(2, 32, seed=4).pixels
    jitter = type(augment.ThreeAugment(32).jitter)
    by_hand = [
        V.adjust_brightness(x, 1.3),
        V.adjust_contrast(x, 0.7),
        V.adjust_saturation(x, 1.4),
        V.adjust_hue(x, 0.05),
    ]
    settings = [((1.3, 1.3), 0, 0, 0), (0, (0.7, 0.7), 0, 0), (0, 0, (1.4, 1.4), 0), (0, 0, 0, (0.05, 0.05))]
    for wanted, setting in zip(by_hand, settings, strict=True):
        assert close(jitter(*setting, p=1.0)(x), wanted, 1e-3)
    assert close(K.RandomGrayscale(p=1.0)(x), V.rgb_to_grayscale(x, 3), 2e-3)
    assert close(K.RandomSolarize(0.0, 0.0, p=1.0)(x), V.solarize(x, 0.5), 1e-3)
    jitters = [m for m in augment.MultiCrop(32, OWN["dino"]).modules() if isinstance(m, K.ColorJitter | K.ColorJiggle)]
    assert {type(m) for m in jitters} == {jitter}


def test_three_augment_is_one_of_three() -> None:
    """Without its crop and jitter, each image is greyed, solarised or blurred, about a third each."""
    pixels = scenes.render(90, 32, seed=2).pixels
    three = augment.ThreeAugment(32)
    three.place, three.jitter = nn.Identity(), nn.Identity()
    torch.manual_seed(0)
    out = three(pixels)
    grey = (out.std(1) < 1e-4).flatten(1).all(1)
    solar = torch.isclose(out, torch.where(pixels >= 0.5, 1 - pixels, pixels), atol=1e-4).flatten(1).all(1)
    blurred = ~grey & ~solar
    assert 15 < grey.sum() < 45
    assert 15 < solar.sum() < 45
    rough = (pixels - F.avg_pool2d(pixels, 3, 1, 1)).abs().mean((1, 2, 3))
    smooth = (out - F.avg_pool2d(out, 3, 1, 1)).abs().mean((1, 2, 3))
    assert (smooth[blurred] <= rough[blurred] * 1.01).all()


# --- schedules


def test_cosine_and_ramp() -> None:
    assert [schedules.cosine(s, 10, 1, 3) for s in (-1, 0, 5, 10, 12)] == pytest.approx([1, 1, 2, 3, 3])
    assert schedules.cosine(2.5, 10, 0, 1) == pytest.approx((1 - math.sqrt(0.5)) / 2)
    assert [schedules.ramp(s, 10, 1, 3) for s in (0, 5, 10, 12)] == pytest.approx([1, 2, 3, 3])
    assert schedules.ramp(0, 0, 1, 3) == schedules.cosine(0, 0, 1, 3) == 3


def test_schedules_reach_the_optimiser() -> None:
    chosen = Recipe(
        "x", "", **{**SMALL, "steps": 100, "warmup": 10, "lr": 0.5}, weight_decay=0.04, weight_decay_end=0.4
    )
    net = vit.build(chosen)
    optimizer = schedules.optimiser(net, chosen)
    seen = []
    for step in (0, 10, 50, 100):
        schedules.apply(optimizer, chosen, step)
        decaying, free = optimizer.param_groups
        assert decaying["lr"] == free["lr"]
        assert free["weight_decay"] == 0
        seen.append((decaying["lr"], decaying["weight_decay"]))
    assert seen[0] == pytest.approx((0.05, 0.04))
    assert seen[1][0] == pytest.approx(0.5)
    assert seen[2][1] == pytest.approx(0.22)
    assert seen[3] == pytest.approx((0.005, 0.4))
    assert schedules.weight_decay(chosen.override(weight_decay_end=None), 70) == 0.04


@pytest.mark.parametrize("name", list(OWN))
def test_tokens_and_positions_do_not_decay(name: str) -> None:
    chosen, _, learner = made(name, registers=2)
    decaying, free = schedules.optimiser(learner, chosen).param_groups
    named = {id(p): n for n, p in learner.named_parameters()}
    held = {named[id(p)] for p in decaying["params"]}
    loose = {named[id(p)] for p in free["params"]}
    assert {n for n, p in learner.named_parameters() if p.requires_grad} == held | loose
    assert {"vit.cls_token", "vit.reg_token", "vit.pos_embed", "vit.norm.bias"} <= loose
    assert [n for n in held if "token" in n or "pos" in n or n.endswith("bias")] == []
    assert not any(n.startswith("teacher") for n in held | loose)


assert {m.__name__.split(".")[-1] for m in (supervised, clip, mae, dino, dinov2)} == set(OWN)


def test_the_text_side_of_clip_is_enough_for_zero_shot() -> None:
    _, feed, learner = made("clip")
    batch = feed.held(24)
    side = learner.text_side()
    cls = vit.encode(learner.vit, batch.pixels)[:, 0]
    predicted = (F.normalize(cls @ side["project"].T, dim=1) @ side["prompts"].T).argmax(1)
    assert learner.score(batch) == pytest.approx(float(batch.labels.gather(1, predicted[:, None]).float().mean()))


def test_the_zoo_keeps_the_text_side_of_clip_alone() -> None:
    for name in registry.zoo():
        side = registry.words(name)
        assert (side is not None) == (registry.card(name)["recipe"]["objective"] == "clip"), name
        if side is not None:
            assert side["prompts"].shape == (len(scenes.CLASSES), side["project"].shape[0])
            assert close(side["prompts"].norm(dim=1), torch.ones(len(scenes.CLASSES)))
