"""Procedural scenes with their whole truth: pixels, labels, captions, masks, depth, boxes and redundant patches.

A scene holds 1 to 6 coloured, textured shapes in depth order before a background whose redundancy varies. Every random
number is drawn on the CPU from a counter-based generator, so that scene i of a seed is the same on every machine,
whatever the batch, the size or the device. Measured rates: see `tests/benchmarks/README.md`.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from vitregs.data.shapes import SHAPES, checker, dots, stripes
from vitregs.errors import InputError, unknown

SHAPE_NAMES = tuple(SHAPES)
COLOURS = {
    "red": (0.90, 0.12, 0.12),
    "orange": (0.98, 0.55, 0.05),
    "yellow": (0.97, 0.90, 0.15),
    "green": (0.10, 0.70, 0.20),
    "cyan": (0.10, 0.85, 0.88),
    "blue": (0.15, 0.25, 0.95),
    "purple": (0.65, 0.15, 0.80),
    "white": (0.98, 0.98, 0.98),
}
COLOUR_NAMES = tuple(COLOURS)
TEXTURES = ("plain", "striped", "dotted", "checkered")
BACKGROUNDS = ("flat", "gradient", "noise", "stripes", "checker")
CLASSES = tuple(f"{colour} {shape}" for shape in SHAPE_NAMES for colour in COLOUR_NAMES)
MOST_OBJECTS = 6
BACKGROUND_DEPTH = 4.0  # of the background, in the unit in which the nearest object is at 1
_LATTICE = 8  # knots of the smooth noise, per side
_SCENE, _OBJECT = 16, 12  # random numbers a scene and an object use
_DRAWS = _SCENE + _LATTICE**2 + MOST_OBJECTS * _OBJECT  # a multiple of 4: one counter step of Philox gives 4
_HIDDEN = 0.25  # an object with less than this share of itself in view is not part of the labels


@dataclass(frozen=True)
class Difficulty:
    """How hard scenes are: object count, largest object radius (share of the shorter side), kinds of background."""

    objects: tuple[int, int] = (1, 6)
    radius: float = 0.24
    backgrounds: tuple[str, ...] = BACKGROUNDS

    def __post_init__(self) -> None:
        low, high = self.objects
        if not 1 <= low <= high <= MOST_OBJECTS:
            raise InputError(f"objects must be a range within 1 to {MOST_OBJECTS}, not {self.objects}")
        if not 0.05 <= self.radius <= 0.45:
            raise InputError(f"radius must lie within 0.05 to 0.45 of the shorter side, not {self.radius}")
        for name in self.backgrounds:
            if name not in BACKGROUNDS:
                raise unknown("background", name, BACKGROUNDS)
        if not self.backgrounds:
            raise InputError(f"backgrounds must name at least one of {', '.join(BACKGROUNDS)}")


@dataclass
class Scenes:
    """A batch of scenes (n) of H×W pixels with ground truth; every field is a tensor with n first."""

    pixels: Tensor  # (n, 3, H, W) float32 in [0, 1]
    labels: Tensor  # (n, 64) bool: which colour-shape pairs are in view
    label: Tensor  # (n,) int64: the pair with the largest area in view
    instances: Tensor  # (n, H, W) uint8: 0 background, i object of depth rank i (1 is the nearest)
    semantic: Tensor  # (n, H, W) uint8: 0 background, 1 + shape index
    depth: Tensor  # (n, H, W) float32: 1 (nearest object) to 4 (background)
    boxes: Tensor  # (n, 6, 4) float32: y0, x0, y1, x1 in pixels of what is in view, by depth rank; nan if nothing is
    objects: Tensor  # (n, 6, 3) int64: shape, colour, texture by depth rank; -1 if there is none
    background: Tensor  # (n,) int64: index into BACKGROUNDS

    def __len__(self) -> int:
        return len(self.pixels)

    def to(self, device: str | torch.device) -> "Scenes":
        """Move every field: device → Scenes there."""
        return Scenes(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def background_share(self, patch: int) -> Tensor:
        """Share of background pixels in each patch: patch side in pixels → (n, H/patch, W/patch) in [0, 1]."""
        n, height, width = self.instances.shape
        if patch < 1 or height % patch or width % patch:
            raise InputError(f"patch size {patch} does not divide the scene size {height}x{width}")
        empty = (self.instances == 0).view(n, height // patch, patch, width // patch, patch)
        return empty.sum((2, 4)) / patch**2

    def captions(self) -> list[str]:
        """Describe each scene in words, the nearest object first: → n sentences."""
        seen = self.boxes[..., 0].isfinite()
        sentences = []
        for rows, view, background in zip(self.objects.tolist(), seen.tolist(), self.background.tolist(), strict=True):
            phrases = [
                f"a {TEXTURES[t]} {COLOUR_NAMES[c]} {SHAPE_NAMES[s]}"
                for (s, c, t), v in zip(rows, view, strict=True)
                if v
            ]
            adjectives = {"flat": "plain", "noise": "cloudy", "stripes": "striped", "checker": "checkered"}
            name = BACKGROUNDS[background]
            article = adjectives.get(name, "graded")
            sentences.append(" in front of ".join([*phrases, f"a {article} background"]))
        return sentences


def _uniform(count: int, seed: int, first: int) -> Tensor:
    """Draw the numbers of scenes first … first+count-1: → (count, _DRAWS) float32 in [0, 1), 24 bits each."""
    bits = np.random.Philox(key=seed).advance(first * _DRAWS // 4)
    raw = bits.random_raw(count * _DRAWS) >> np.uint64(40)
    return torch.from_numpy(raw.astype(np.float32)).mul_(2.0**-24).view(count, _DRAWS)


def _pick(u: Tensor, n: int) -> Tensor:
    return (u * n).long().clamp_(max=n - 1)


def _turn(x: Tensor, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate by the angle whose half-tangent is t: exact in rational arithmetic."""
    scale = 1.0 + t * t
    c, s = (1.0 - t * t) / scale, (t + t) / scale
    return c * x + s * y, c * y - s * x


def _backgrounds(u: Tensor, lattice: Tensor, kind: Tensor, height: int, width: int) -> Tensor:
    """Paint the backgrounds: scene draws (n, 16), lattice (n, 8, 8), kinds (n,) → (n, 3, H, W)."""
    device, short = u.device, min(height, width)
    y = (torch.arange(height, device=device) + 0.5) / short
    x = (torch.arange(width, device=device) + 0.5) / short
    one = u[:, 1:4] * 0.45 + 0.2  # muted colours: objects are vivid
    one = one * 0.6 + one.sum(1, keepdim=True) * (0.4 / 3)
    two = (one + (u[:, 4:7] - 0.5) * 0.5).clamp(0.05, 0.8)
    mix = torch.zeros(len(u), height, width, device=device)
    rows = [(kind == k).nonzero()[:, 0] for k in range(len(BACKGROUNDS))]

    def axes(i: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        part = u[i][:, :, None, None]
        a, b = _turn(x[None, None, :], y[None, :, None], part[:, 7] * 2 - 1)
        return a, b, 2.0 + part[:, 8] * 4.0

    if len(i := rows[1]):
        a, b, _ = axes(i)
        mix[i] = (a * 0.5 + b * 0.5 + u[i, 9, None, None] * 0.5).clamp(0.0, 1.0)
    if len(i := rows[2]):
        mix[i] = _smooth_noise(lattice[i], y * (short / height), x * (short / width))
    for k, pattern in ((3, stripes), (4, checker)):
        if len(i := rows[k]):
            a, b, periods = axes(i)
            mix[i] = pattern(a * periods + u[i, 9, None, None], b * periods + u[i, 10, None, None])
    return one[:, :, None, None] + mix[:, None] * (two - one)[:, :, None, None]


def _smooth_noise(lattice: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Interpolate knots (n, 8, 8) smoothly at positions y (H,), x (W,) in [0, 1] → (n, H, W)."""

    def knots(p: Tensor) -> tuple[Tensor, Tensor]:
        q = p * (_LATTICE - 1)
        low = q.floor().clamp(0, _LATTICE - 2)
        f = q - low
        return low.long(), f * f * (3.0 - (f + f))

    (j, fy), (i, fx) = knots(y), knots(x)
    rows = lattice[:, j] + (lattice[:, j + 1] - lattice[:, j]) * fy[None, :, None]
    return rows[:, :, i] + (rows[:, :, i + 1] - rows[:, :, i]) * fx


def render(
    count: int,
    size: int | tuple[int, int] = 64,
    *,
    seed: int = 0,
    first: int = 0,
    device: str | torch.device = "cpu",
    difficulty: Difficulty | None = None,
) -> Scenes:
    """Render scenes first … first+count-1 of a seed: pixels per side or (height, width) → Scenes on the device.

    Raises InputError for sizes under 8 pixels or negative counts.
    """
    difficulty = difficulty or Difficulty()
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 8 or count < 1 or first < 0 or seed < 0:
        raise InputError(f"cannot render {count} scenes of {height}x{width} pixels (seed {seed}, first {first})")
    u = _uniform(count, seed, first).to(device)
    scene, lattice = u[:, :_SCENE], u[:, _SCENE : _SCENE + _LATTICE**2].view(count, _LATTICE, _LATTICE)
    draws = u[:, _SCENE + _LATTICE**2 :].view(count, MOST_OBJECTS, _OBJECT)
    allowed = torch.tensor([BACKGROUNDS.index(b) for b in difficulty.backgrounds], device=u.device)
    kind = allowed[_pick(scene[:, 0], len(allowed))]
    low, high = difficulty.objects
    number = low + _pick(scene[:, 11], high - low + 1)
    present = torch.arange(MOST_OBJECTS, device=u.device) < number[:, None]
    attributes = torch.stack(
        [_pick(draws[..., 0], len(SHAPES)), _pick(draws[..., 1], len(COLOURS)), _pick(draws[..., 2], len(TEXTURES))], -1
    )
    # rank 0 is the nearest; absent objects sort to the back
    z = torch.where(present, 1.0 + 2.0 * draws[..., 3], BACKGROUND_DEPTH).sort(1).values
    canvas = _Canvas(_backgrounds(scene, lattice, kind, height, width))
    canvas.paint(draws, attributes, z, present, difficulty.radius)
    return canvas.scenes(torch.where(present[..., None], attributes, -1), kind)


class _Canvas:
    """Pixels and truth under construction; objects are painted from the farthest to the nearest."""

    def __init__(self, pixels: Tensor) -> None:
        n, _, self.height, self.width = pixels.shape
        self.pixels = pixels.permute(1, 0, 2, 3).reshape(3, -1)  # colour first, so that one flat index serves all
        self.instances = torch.zeros(n * self.height * self.width, dtype=torch.uint8, device=pixels.device)
        self.depth = torch.full_like(self.instances, 0, dtype=torch.float32) + BACKGROUND_DEPTH
        self.full = torch.zeros(n, MOST_OBJECTS, dtype=torch.long, device=pixels.device)  # pixels before occlusion

    def paint(self, draws: Tensor, attributes: Tensor, z: Tensor, present: Tensor, radius: float) -> None:
        """Blend all objects in: draws (n, 6, 12), looks (n, 6, 3), depths (n, 6), which exist (n, 6)."""
        short = min(self.height, self.width)
        at, rank = present.nonzero(as_tuple=True)
        t, attribute, depth = draws[at, rank], attributes[at, rank], z[at, rank]
        r = radius * short * (0.85 + 0.15 * t[:, 4]) / (0.5 + 0.5 * depth)  # nearer objects look larger
        r = r.clamp(min=2.0)
        cy, cx = (0.08 + 0.84 * t[:, 5]) * self.height, (0.08 + 0.84 * t[:, 6]) * self.width
        side = int(2 * torch.ceil(r.max() * 1.05)) + 2
        corner_y, corner_x = (cy - side / 2).floor(), (cx - side / 2).floor()
        span = torch.arange(side, device=t.device)
        row, col = corner_y.long()[:, None] + span, corner_x.long()[:, None] + span
        dy = (row + 0.5 - cy[:, None]) / r[:, None]
        dx = (col + 0.5 - cx[:, None]) / r[:, None]
        u, v = _turn(dx[:, None, :], dy[:, :, None], (t[:, 7] * 0.6 - 0.3)[:, None, None])
        distance = torch.empty_like(u)
        for k, shape in enumerate(SHAPES.values()):
            if len(i := (attribute[:, 0] == k).nonzero()[:, 0]):
                distance[i] = shape(u[i], v[i])
        alpha = (0.5 - distance * r[:, None, None]).clamp(0.0, 1.0)
        inside = ((row >= 0) & (row < self.height))[:, :, None] & ((col >= 0) & (col < self.width))[:, None, :]
        alpha = alpha * inside
        shade = self._texture(u, v, attribute[:, 2], t[:, 8]) * (1.0 + 0.12 * (t[:, 9, None, None] - 0.5) * (u + v))
        palette = torch.tensor(list(COLOURS.values()), device=t.device)
        rgb = palette[attribute[:, 1]] + (torch.stack([t[:, 9], t[:, 10], t[:, 11]], 1) - 0.5) * 0.08
        flat = (at[:, None, None] * self.height + row.clamp(0, self.height - 1)[:, :, None]) * self.width
        flat = flat + col.clamp(0, self.width - 1)[:, None, :]
        self.full[at, rank] = (alpha >= 0.5).sum((1, 2))
        for k in reversed(range(MOST_OBJECTS)):
            i = (rank == k).nonzero()[:, 0]
            if not len(i):
                continue
            touched = alpha[i] > 0
            where, a = flat[i][touched], alpha[i][touched]
            of = i[:, None, None].expand(touched.shape)[touched]
            colour = (rgb[of].T * shade[i][touched]).clamp_(0.0, 1.0)
            below = self.pixels[:, where]
            self.pixels[:, where] = below + (colour - below) * a
            solid = a >= 0.5
            self.instances[where[solid]] = k + 1
            self.depth[where[solid]] = depth[of[solid]]

    @staticmethod
    def _texture(u: Tensor, v: Tensor, kind: Tensor, phase: Tensor) -> Tensor:
        """Brightness of the surface: local coordinates (m, s, s), kinds (m,), phases (m,) → (m, s, s) in [0.5, 1]."""
        shade = torch.ones_like(u)
        for k, pattern in ((1, stripes), (2, dots), (3, checker)):
            if len(i := (kind == k).nonzero()[:, 0]):
                offset = phase[i, None, None]
                shade[i] = 1.0 - 0.5 * pattern(u[i] * 2.0 + offset, v[i] * 2.0 + offset)
        return shade

    def scenes(self, objects: Tensor, background: Tensor) -> Scenes:
        """Collect the truth: objects (n, 6, 3), background kinds (n,) → Scenes."""
        n, device = len(objects), objects.device
        instances = self.instances.view(n, self.height, self.width)
        inst = instances[:, None] == torch.arange(1, MOST_OBJECTS + 1, device=device)[None, :, None, None]
        area = inst.sum((2, 3))
        seen = (area > 0) & (area >= self.full * _HIDDEN)
        pair = (objects[..., 0] * len(COLOURS) + objects[..., 1]).clamp(min=0)
        labels = torch.zeros(n, len(CLASSES), dtype=torch.bool, device=device)
        labels[torch.arange(n, device=device)[:, None].expand_as(pair)[seen], pair[seen]] = True
        largest = (area * seen).argmax(1)
        lut = torch.cat([torch.zeros(n, 1, dtype=torch.long, device=device), objects[..., 0] + 1], 1)
        semantic = lut.gather(1, instances.view(n, -1).long()).view_as(instances).to(torch.uint8)
        return Scenes(
            pixels=self.pixels.view(3, n, self.height, self.width).permute(1, 0, 2, 3).contiguous(),
            labels=labels,
            label=pair.gather(1, largest[:, None])[:, 0],
            instances=instances,
            semantic=semantic,
            depth=self.depth.view_as(instances),
            boxes=_boxes(inst, seen),
            objects=objects,
            background=background,
        )


def _boxes(inst: Tensor, seen: Tensor) -> Tensor:
    """Tight boxes around masks: (n, 6, H, W), which count (n, 6) → (n, 6, 4) y0, x0, y1, x1, nan where none."""
    sides = []
    for hit in (inst.any(3), inst.any(2)):
        length = hit.shape[-1]
        low = hit.byte().argmax(-1)
        high = length - hit.flip(-1).byte().argmax(-1)
        sides.append((low, high))
    (y0, y1), (x0, x1) = sides
    box = torch.stack([y0, x0, y1, x1], -1).float()
    return torch.where(seen[..., None], box, torch.nan)
