"""How outliers behave when the input or the network is changed: their share, their number, and their places.

An outlier here is a patch whose norm in the last block is above `ratio` times the median patch of its image (1.6 by default,
below the statistical cut-off, so that networks with a weak artifact are measured too). Changes of a network are made on a
copy that shares its weights.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn
from torch.nn import functional as F

from vitregs import arrays
from vitregs.errors import InputError, unknown
from vitregs.models.backbone import Backbone
from vitregs.models.capture import capture, opened
from vitregs.models.test_time import changed, twin, without_tokens

SIDES = (64, 96, 112, 160, 224, 320, 448)  # pixels
SHIFT = 8  # pixels
PARTS = ("all", "photograph", "bars")
Made = tuple[Any, ...]  # a network and its images, and which patches are hidden, bool (images, patches), if any
Change = Callable[[Backbone, Tensor, np.ndarray, torch.Generator], Made]


# --- changes of the input: pixels (n, 3, height, width) in [0, 1] → the same shape
def _grid_patches(pixels: Tensor, patch: tuple[int, int]) -> Tensor:
    """Cut images into patches: → (n, rows, columns, 3, height, width) of patches."""
    n, c, h, w = pixels.shape
    return pixels.reshape(n, c, h // patch[0], patch[0], w // patch[1], patch[1]).permute(0, 2, 4, 1, 3, 5)


def _assemble(cut: Tensor) -> Tensor:
    n, rows, columns, c, h, w = cut.shape
    return cut.permute(0, 3, 1, 4, 2, 5).reshape(n, c, rows * h, columns * w)


def tiled(pixels: Tensor, patch: tuple[int, int]) -> Tensor:
    """Fill each image with its central patch: pixels (n, 3, height, width), size of a patch → the same shape."""
    cut = _grid_patches(pixels, patch)
    rows, columns = cut.shape[1:3]
    return _assemble(cut[:, rows // 2, columns // 2][:, None, None].expand_as(cut))


def shuffled(pixels: Tensor, patch: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Put the patches of each image in random order: pixels, size of a patch, generator → the same shape."""
    cut = _grid_patches(pixels, patch)
    flat = cut.flatten(1, 2)
    mixed = [image[torch.randperm(len(image), generator=generator)] for image in flat]
    return _assemble(torch.stack(mixed).view_as(cut))


def bar_rows(rows: int) -> int:
    """Rows of patches of each of the two bars of a letterbox: rows of the grid → a quarter of them, 1 or more: 3 of 14, as a
    photograph of 16:9 has them in a square. Raises InputError for grids of fewer than 3 rows."""
    if rows < 3:
        raise InputError(f"a letterbox needs 3 rows of patches or more, not {rows}: take larger images")
    return max(1, rows // 4)


def letterbox(pixels: Tensor, height: int, *, mirrored: bool = False) -> Tensor:
    """Resize the whole of each image to lie between two bars, above and below.

    Args:
        pixels: (n, 3, height, width) in [0, 1].
        height: Of each bar, in pixels, at most a third of the image.
        mirrored: Whether the bars repeat the photograph, mirrored at its edge, instead of being black.

    Returns:
        The same shape.
    """
    between = (pixels.shape[-2] - 2 * height, pixels.shape[-1])
    inside = F.interpolate(pixels, between, mode="bicubic", antialias=True).clamp(0, 1)
    if not mirrored:
        return F.pad(inside, (0, 0, height, height))
    return torch.cat([inside[:, :, :height].flip(2), inside, inside[:, :, -height:].flip(2)], 2)


def shifted(pixels: Tensor, by: int) -> Tensor:
    """Move each image to the right, repeating its left edge: pixels, how many pixels → the same shape."""
    return F.pad(pixels, (by, 0, 0, 0), mode="replicate")[..., : pixels.shape[-1]]


# --- changes of the network: a copy, known by a name and a key of its own
def without_positions(backbone: Backbone) -> Backbone:
    """Set absolute position embeddings to zero: network → a copy that shares its other weights.

    Raises InputError for networks without a table of absolute positions.
    """
    if getattr(backbone.net, "pos_embed", None) is None:
        raise InputError(f"{backbone.name} has no absolute position embeddings")
    net = twin(backbone.net)
    net.pos_embed = nn.Parameter(torch.zeros_like(net.pos_embed), requires_grad=False)
    made = changed(backbone, net, "+nopositions", [])
    # at any other size too
    made._tables = {k: torch.zeros_like(v) if k == "pos_embed" else v for k, v in backbone._tables.items()}
    return made


def quantised(backbone: Backbone) -> Backbone:
    """Quantise all linear layers to int8, activations as they come: network on a CPU → a changed copy.

    Raises InputError for networks elsewhere.
    """
    if backbone.device.type != "cpu":
        raise InputError(
            f"dynamic int8 runs on a CPU, {backbone.name} is on {backbone.device}: load it with device='cpu'"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the successor of this interface
        net = torch.ao.quantization.quantize_dynamic(backbone.net, {nn.Linear}, dtype=torch.qint8)
    return changed(backbone, net, "+int8", [])


def _dropped(backbone: Backbone, patches: np.ndarray) -> Backbone:
    """Hide patches, bool (images, patches)."""
    mask = torch.from_numpy(patches)
    return without_tokens(backbone, F.pad(mask, (backbone.prefix, 0)))


def _half(b: Backbone, x: Tensor, marks: np.ndarray, g: torch.Generator) -> Made:
    drawn = torch.rand(marks.shape, generator=g).argsort(1) < marks.shape[1] // 2
    return _dropped(b, drawn.numpy()), x, drawn.numpy()


def _no_cls(b: Backbone, x: Tensor, marks: np.ndarray, g: torch.Generator) -> Made:
    kinds = np.array(b.kinds(b.grid((x.shape[-2], x.shape[-1]))))
    if "cls" not in kinds:
        raise InputError(f"{b.name} has no CLS token to remove")
    return without_tokens(b, torch.from_numpy(kinds == "cls")[None]), x


def _bars(b: Backbone, x: Tensor, mirrored: bool) -> Tensor:
    return letterbox(x, bar_rows(b.grid((x.shape[-2], x.shape[-1]))[0]) * b.patch_size[0], mirrored=mirrored)


# --- the table
@dataclass(frozen=True)
class Intervention:
    """A change of the input or of the network.

    Attributes:
        done: What is done, in words.
        means: What it tells a user who meets it, in a sentence.
        change: Network, pixels, marks of the untouched network, generator → changed network and pixels.
        places: How places compare with the untouched network's: "" not at all, "same" at the same place, "flip" mirrored.
        parted: Whether bars and photograph are counted apart.
        precision: Of the forward pass.
    """

    done: str
    means: str
    change: Change
    places: str = ""
    parted: bool = False
    precision: str = "float32"


INTERVENTIONS: Mapping[str, Intervention] = {
    "untouched": Intervention(
        "nothing", "What every other row is compared with.", lambda b, x, m, g: (b, x), places="same"
    ),
    "no CLS": Intervention(
        "the CLS token is hidden from all patches",
        "Outliers can hang on CLS: a network without one need not have any.",
        _no_cls,
    ),
    "grey": Intervention(
        "every pixel is middle grey",
        "A blank image cannot show whether a network has outliers.",
        lambda b, x, m, g: (b, torch.full_like(x, 0.5)),
    ),
    "noise": Intervention(
        "every pixel is Gaussian noise, mean 0.5, standard deviation 0.25",
        "Noise is no neutral image: do not calibrate a cut-off on it.",
        lambda b, x, m, g: (b, (0.5 + 0.25 * torch.randn(x.shape, generator=g)).clamp(0, 1).to(x)),
    ),
    "letterbox": Intervention(
        "the image is resized to lie between black bars, a quarter of the rows each",
        "Bars can draw outliers away from the photograph: crop instead, or judge without bars.",
        lambda b, x, m, g: (b, _bars(b, x, False)),
        parted=True,
    ),
    "mirrored bars": Intervention(
        "the same, with bars that repeat the photograph, mirrored",
        "Padding that looks like the photograph leaves its outliers where they are.",
        lambda b, x, m, g: (b, _bars(b, x, True)),
        parted=True,
    ),
    "tiled": Intervention(
        "the central patch is everywhere",
        "Redundancy alone does not make outliers: a repeated pattern is no test image.",
        lambda b, x, m, g: (b, tiled(x, b.patch_size)),
    ),
    "shuffled": Intervention(
        "patches in random order under fixed positions",
        "Outliers need no sensible image, so crops and collages have them too.",
        lambda b, x, m, g: (b, shuffled(x, b.patch_size, g)),
    ),
    "no positions": Intervention(
        "position embeddings are zero",
        "Outliers can do without positions: other position embeddings are no cure.",
        lambda b, x, m, g: (without_positions(b), x),
    ),
    "outliers removed": Intervention(
        "the untouched network's outlier patches are hidden",
        "Others can take the place of dropped outliers: look again after pruning.",
        lambda b, x, m, g: (_dropped(b, m), x, m),
    ),
    "half removed": Intervention(
        "half of the patches, drawn at random, are hidden",
        "Dropping random tokens saves time and is no cure.",
        _half,
    ),
    "flip": Intervention(
        "images are mirrored, left to right",
        "Some outliers do not move with the image: averaging over flips dampens them.",
        lambda b, x, m, g: (b, x.flip(-1)),
        places="flip",
    ),
    "shift": Intervention(
        f"images move {SHIFT} px to the right",
        "Which patches are outliers hangs on the crop: mark them on the very crop that is used.",
        lambda b, x, m, g: (b, shifted(x, SHIFT)),
        places="same",
    ),
    "half brightness": Intervention(
        "pixels are halved",
        "Exposure moves outliers: prepare images as in use.",
        lambda b, x, m, g: (b, x / 2),
        places="same",
    ),
    "bfloat16": Intervention(
        "the network runs in bfloat16",
        "Marks made in bfloat16 serve for the full precision.",
        lambda b, x, m, g: (b, x),
        places="same",
        precision="bfloat16",
    ),
    "int8": Intervention(
        "linear layers are quantised to int8",
        "A quantised network can have its outliers elsewhere: mark them anew, do not carry them over.",
        lambda b, x, m, g: (quantised(b), x),
        places="same",
    ),
}


# --- measuring
def _norms(backbone: Backbone, pixels: Tensor, precision: str) -> np.ndarray:
    """Patch norms in the last block: → (images, patches)."""
    seen = capture(backbone, pixels, norms=[-1], kinds="patch", batch=len(pixels), precision=precision)
    return np.asarray(seen["norms"].isel(layer=0).values)


def ratios(norms: np.ndarray, hidden: np.ndarray | None = None) -> np.ndarray:
    """Norms over the median of their image: (images, patches), which are left out → the same, nan for those."""
    left = norms if hidden is None else np.where(hidden, np.nan, norms)
    found: np.ndarray = left / np.nanmedian(left, 1, keepdims=True)
    return found


def _counts(ratio: np.ndarray, least: float) -> np.ndarray:
    """Outliers, patches, and largest ratio of each image: → (3, images)."""
    return np.stack([(ratio > least).sum(-1), np.isfinite(ratio).sum(-1), np.nanmax(ratio, -1)]).astype(float)


@contextmanager
def _size_kept(backbone: Backbone) -> Iterator[None]:
    """Give a network back at the size that it has now."""
    grid: Any = backbone.net.patch_embed.grid_size  # type: ignore[union-attr]
    size = grid[0] * backbone.patch_size[0], grid[1] * backbone.patch_size[1]
    try:
        yield
    finally:
        backbone.fit(size)


def _pixels(backbone: Backbone, images: Any, batch: int, first: int | None) -> Iterator[Tensor]:
    """Batches of pixels of the first images, or of all."""
    if first is not None and first < 1:
        raise InputError(f"first must be 1 or more images, or None for all, not {first}")
    source = opened(backbone, images)
    left = first
    for pixels in torch.split(source, batch) if isinstance(source, Tensor) else source.pixels(batch):
        yield pixels[:left]
        if left is not None and (left := left - len(pixels)) <= 0:
            return


def _one(
    item: Intervention, backbone: Backbone, pixels: Tensor, marks: np.ndarray, least: float, generator: torch.Generator
) -> dict[str, np.ndarray]:
    """One intervention on one batch: → numbers of each image by name, those of PARTS (images, parts)."""
    network, x, *hidden = item.change(backbone, pixels, marks, generator)
    norms = _norms(network, x, item.precision)
    ratio = ratios(norms, *hidden)
    rows, columns = backbone.grid((x.shape[-2], x.shape[-1]))
    parts = np.full((3, len(PARTS), len(norms)), np.nan)
    parts[:, 0] = _counts(ratio, least)
    own = np.full((len(PARTS), len(norms)), np.nan)
    if item.parted:
        bars = bar_rows(rows)
        inside = np.zeros((rows, columns), bool)
        inside[bars:-bars] = True
        part = np.stack([np.ones(rows * columns, bool), inside.ravel(), ~inside.ravel()])
        parts[:, 1:] = np.stack([_counts(ratio[:, p], least) for p in part[1:]], 1)
        over = norms / np.median(norms[:, part[1]], 1, keepdims=True)
        own[:] = [(over[:, p] > least).sum(1) for p in part]
    found = dict(zip(("outliers", "patches", "largest", "own"), [*parts, own], strict=True))
    now = ratio > least
    if item.places == "flip":
        now = now.reshape(-1, rows, columns)[:, :, ::-1].reshape(len(now), -1)
    both, either = ((now & marks).sum(1), (now | marks).sum(1)) if item.places else (np.full(len(now), np.nan),) * 2
    return {name: v.T for name, v in found.items()} | {"shared": both, "joined": either}


def interventions(
    backbone: Backbone,
    images: Any,
    *,
    names: list[str] | None = None,
    first: int | None = None,
    ratio: float = 1.6,
    seed: int = 0,
    batch: int = 32,
) -> xr.Dataset:
    """Count outliers in the last block while the input or the network is changed, and see where they are.

    Args:
        backbone: A network; what is done to it happens on copies.
        images: As `capture` takes them.
        names: Of INTERVENTIONS, all that the network allows by default; the untouched network is always measured.
        first: How many images, the first; all by default.
        ratio: An outlier's norm is above this many times the median patch of its image.
        seed: Of everything drawn.
        batch: Images at a time.

    Returns:
        outliers, patches and largest (over median) [intervention, part, image], part "all", and for bars "photograph" and
        "bars"; own, the same outliers counted against the median of the photograph's patches alone; shared and joined
        [intervention, image], the patches that are outliers in both or in either of the untouched and the changed network,
        nan where places do not compare; where [image, y, x], bool, of the untouched network. The attribute "left out" says
        what the network does not allow, and why.

    Raises:
        InputError: For unknown names, and changes named that this network does not allow.

    Example:
        >>> import vitregs as vr
        >>> vit = vr.load("supervised-pico")
        >>> found = interventions(vit, vr.open_images("scenes", size=vit.size, count=2), names=["grey"])
        >>> dict(found.outliers.sizes)
        {'intervention': 2, 'part': 3, 'image': 2}
    """
    for name in names or ():
        if name not in INTERVENTIONS:
            raise unknown("intervention", name, INTERVENTIONS)
    chosen = ["untouched", *(n for n in INTERVENTIONS if n != "untouched" and n in (names or INTERVENTIONS))]
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in chosen}
    places, left = [], {}
    with _size_kept(backbone):
        for pixels in _pixels(backbone, images, batch, first):
            backbone.fit((pixels.shape[-2], pixels.shape[-1]))
            marks = ratios(_norms(backbone, pixels, "float32")) > ratio
            places.append(marks.reshape(-1, *backbone.grid((pixels.shape[-2], pixels.shape[-1]))))
            for name in list(found):
                try:
                    found[name].append(_one(INTERVENTIONS[name], backbone, pixels, marks, ratio, generator))
                except InputError as error:
                    if names is not None:
                        raise
                    left[name] = str(error)
                    del found[name]
    data: dict[str, Any] = {}
    for key in ("outliers", "patches", "largest", "own", "shared", "joined"):
        values = np.stack([np.concatenate([part[key] for part in parts]) for parts in found.values()])
        by_part = values.ndim == 3
        dims = ("intervention", "part", "image") if by_part else ("intervention", "image")
        data[key] = (dims, values.swapaxes(1, 2) if by_part else values)
    data["where"] = (("image", "y", "x"), np.concatenate(places))
    coords = {"intervention": list(found), "part": list(PARTS), "model": backbone.name}
    attrs = {"ratio": ratio, "left out": "; ".join(f"{name}: {why}" for name, why in left.items())}
    return xr.Dataset(data, coords=coords, attrs=attrs)


def resolutions(
    backbone: Backbone,
    images: Any,
    *,
    sides: list[int] | None = None,
    first: int | None = None,
    ratio: float = 1.6,
    batch: int = 16,
) -> xr.Dataset:
    """Count outliers at several sizes of the input: images are resized (bicubic, with anti-aliasing), positions too.

    Args:
        backbone: A network that takes other sizes than its own; it is at its former size afterwards.
        images: As `capture` takes them.
        sides: Pixels per side, multiples of the patch size; those of SIDES that are by default.
        first: How many images, the first; all by default.
        ratio: As for `interventions`.
        batch: Images at a time.

    Returns:
        outliers, patches and largest (over median) [side, image]. The attribute "native" is the network's own side.

    Raises:
        InputError: For sizes the network does not take.
    """
    across, down = backbone.patch_size
    chosen = [side for side in SIDES if not side % across and not side % down] if sides is None else list(sides)
    for side in chosen:
        backbone.grid((side, side))
    if not chosen:
        raise InputError(f"name sides that are multiples of the patch size {across} of {backbone.name}")
    found: list[list[np.ndarray]] = [[] for _ in chosen]
    with _size_kept(backbone):
        for pixels in _pixels(backbone, images, batch, first):
            for side, kept in zip(chosen, found, strict=True):
                resized = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
                kept.append(_counts(ratios(_norms(backbone, resized, "float32")), ratio))
    values = np.stack([np.concatenate(kept, 1) for kept in found], 1)
    data = {key: (("side", "image"), v) for key, v in zip(("outliers", "patches", "largest"), values, strict=True)}
    attrs = {"ratio": ratio, "native": backbone.size[0]}
    return xr.Dataset(data, coords={"side": chosen, "model": backbone.name}, attrs=attrs)


def shares(found: xr.Dataset) -> xr.Dataset:
    """Shares of outliers with 95 % intervals over images: of `interventions` or `resolutions` → share [..., end], end in
    "value", "low", "high"; where there are bars, own, against the photograph's median."""
    data = {"share": _intervals(found["outliers"], found["patches"])}
    if "own" in found:
        data["own"] = _intervals(found["own"], found["patches"])
    return xr.Dataset(data)


def factors(found: xr.Dataset) -> xr.DataArray:
    """Shares of outliers over the untouched network's, on the same images: of `interventions` → [intervention, part, end] with
    95 % intervals over images; nan where the untouched network has none."""
    base = found[["outliers", "patches"]].sel(intervention="untouched", part="all", drop=True)
    counts = xr.concat(
        [found["outliers"], found["patches"], *(base[k].broadcast_like(found["outliers"]) for k in base)], "of"
    )

    def ends(values: np.ndarray) -> np.ndarray:
        if not np.isfinite(values).all() or not values[2].sum():
            return np.full(3, np.nan)
        return np.array(arrays.bootstrap_interval(values.T, of=_over))

    return _reduced(ends, [["of", "image"]], counts)


def _over(values: np.ndarray, axis: int) -> np.ndarray:
    """A share over another: (…, images, outliers and patches of both) → (…)."""
    total = values.sum(axis)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio: np.ndarray = total[..., 0] * total[..., 3] / (total[..., 1] * total[..., 2])
    return ratio


def overlaps(found: xr.Dataset) -> xr.Dataset:
    """Places against the untouched network's with 95 % intervals over images: of `interventions` → iou and again (share of
    the untouched network's outliers found again) [intervention, end]."""
    before = found["shared"].sel(intervention="untouched", drop=True)
    return xr.Dataset(
        {
            "iou": _intervals(found["shared"], found["joined"]),
            "again": _intervals(found["shared"], before.broadcast_like(found["shared"])),
        }
    )


def _intervals(sums: xr.DataArray, counts: xr.DataArray) -> xr.DataArray:
    def ends(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        there = np.isfinite(a) & np.isfinite(b)
        return np.array(arrays.bootstrap_ratio(a[there], b[there]))

    return _reduced(ends, [["image"], ["image"]], sums, counts)


def _reduced(ends: Callable[..., np.ndarray], core: list[list[str]], *given: xr.DataArray) -> xr.DataArray:
    """Value and interval over the core dimensions: → [..., end]."""
    made: xr.DataArray = xr.apply_ufunc(ends, *given, input_core_dims=core, output_core_dims=[["end"]], vectorize=True)
    return made.assign_coords(end=["value", "low", "high"])


def border(found: xr.Dataset) -> tuple[tuple[float, float, float], float]:
    """Share of outliers on the border ring: of `interventions` → (share, low, high) over images, and the ring's share of all
    patches, which is chance."""
    where = found["where"].values
    ring = np.ones(where.shape[1:], bool)
    ring[1:-1, 1:-1] = False
    return arrays.bootstrap_ratio((where & ring).sum((1, 2)), where.sum((1, 2))), float(ring.mean())


def position_correlation(found: xr.Dataset, *, splits: int = 200, seed: int = 0) -> tuple[float, float, float]:
    """Pearson correlation over places of how often two halves of the images have an outlier there: of `interventions` → mean
    over random halves, and the ends that hold 95 % of these."""
    where = found["where"].values.reshape(found.sizes["image"], -1).astype(float)
    rng = np.random.default_rng(seed)
    half = len(where) // 2
    drawn = [rng.permutation(len(where)) for _ in range(splits)]
    pairs = [(where[i[:half]].mean(0), where[i[half:]].mean(0)) for i in drawn]
    values = [np.corrcoef(a, b)[0, 1] for a, b in pairs if half and a.std() and b.std()] or [np.nan]
    low, high = np.quantile(values, [0.025, 0.975])
    return float(np.mean(values)), float(low), float(high)


def cosines(
    backbone: Backbone, images: Any, *, first: int | None = None, ratio: float = 1.6, batch: int = 32
) -> xr.Dataset:
    """Cosine between final states of patches of different images: of the largest outlier, and of the patch of median norm.

    Args:
        backbone: A network.
        images: As `capture` takes them.
        first: How many images, the first; all by default.
        ratio: As for `interventions`.
        batch: Images at a time.

    Returns:
        outlier and normal [image], each image that has an outlier with the next that has one, before the final norm; nan for
        the other images, and where there are no two.
    """
    with _size_kept(backbone):
        parts = [
            capture(backbone, pixels, tokens=[-1], kinds="patch", batch=batch)["tokens"].values[:, 0]
            for pixels in _pixels(backbone, images, batch, first)
        ]
    states = np.concatenate(parts)
    norms = np.linalg.norm(states, axis=-1)
    has = np.flatnonzero(ratios(norms).max(1) > ratio)
    order = norms.argsort(1)
    data = {}
    for name, at in {"outlier": order[:, -1], "normal": order[:, order.shape[1] // 2]}.items():
        values = np.full(len(states), np.nan)
        if len(has) > 1:
            x = states[has, at[has]]
            x = x / np.linalg.norm(x, axis=-1, keepdims=True)
            values[has] = (x * np.roll(x, -1, 0)).sum(-1)
        data[name] = ("image", values)
    return xr.Dataset(data, coords={"model": backbone.name}, attrs={"ratio": ratio})
