"""How outliers behave when the input or the network is changed: their share, their number, and their places.

An outlier here is a patch whose norm in the last block is above `ratio` times the median patch of its image (1.6 by default,
below the statistical cut-off, so that networks with a weak artifact are measured too). Changes of a network are made on a
copy that shares its weights.
"""

import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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
from vitregs.models.test_time import _twin

SIDES = (64, 96, 112, 160, 224, 320, 448)  # pixels
SHIFT = 8  # pixels
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
    """Rows of patches that a letterbox covers above the photograph, and below: rows of the grid → a quarter, 1 or more."""
    return max(1, rows // 4)


def letterbox(pixels: Tensor, height: int, *, mirrored: bool = False) -> Tensor:
    """Cover the top and the bottom of each image, the photograph between them staying in its place.

    Args:
        pixels: (n, 3, height, width) in [0, 1].
        height: Of each of the two bars, in pixels, at most a third of the image.
        mirrored: Whether the bars repeat the photograph, mirrored at their edge, instead of being black.

    Returns:
        The same shape.
    """
    inside = pixels[:, :, height:-height]
    return F.pad(inside, (0, 0, height, height), mode="reflect" if mirrored else "constant")


def shifted(pixels: Tensor, by: int) -> Tensor:
    """Move each image to the right, repeating its left edge: pixels, how many pixels → the same shape."""
    return F.pad(pixels, (by, 0, 0, 0), mode="replicate")[..., : pixels.shape[-1]]


# --- changes of the network: a copy that shares its weights
def without_tokens(backbone: Backbone, removed: Tensor) -> Backbone:
    """Hide tokens from all others, which then run as if these were not in the sequence.

    Args:
        backbone: A network whose attention takes a mask.
        removed: bool (images or 1, tokens); the batch that runs must have as many images.

    Returns:
        A network that shares its weights with the one given, which is left as it is. States of the hidden tokens themselves
        mean nothing.

    Raises:
        InputError: A block's attention takes no mask.
    """
    net = _twin(backbone.net)
    seen = ~removed[:, None, None].to(backbone.device)

    def hide(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, kwargs | {"attn_mask": seen}

    for number, block in enumerate(net.blocks, 1):
        attention = getattr(block, "attn", None)
        if attention is None or "attn_mask" not in inspect.signature(attention.forward).parameters:
            raise InputError(
                f"block {number} of {backbone.name} takes no attention mask: no token can be hidden from it"
            )
        attention.register_forward_pre_hook(hide, with_kwargs=True)
    return _as(backbone, net)


def _as(backbone: Backbone, net: nn.Module) -> Backbone:
    made = replace(backbone, net=net)
    made._tables, made._native = backbone._tables, backbone._native
    return made


def without_positions(backbone: Backbone) -> Backbone:
    """Set absolute position embeddings to zero at the size the network is at: network → a copy that shares its weights.

    Raises InputError for networks without a table of absolute positions.
    """
    if getattr(backbone.net, "pos_embed", None) is None:
        raise InputError(f"{backbone.name} has no absolute position embeddings")
    net = _twin(backbone.net)
    net.pos_embed = nn.Parameter(torch.zeros_like(net.pos_embed), requires_grad=False)
    return _as(backbone, net)


def quantised(backbone: Backbone) -> Backbone:
    """Quantise all linear layers to int8, activations as they come: network on a CPU → a changed copy."""
    if backbone.device.type != "cpu":
        raise InputError(
            f"dynamic int8 runs on a CPU, {backbone.name} is on {backbone.device}: load it with device='cpu'"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the successor of this interface
        net = torch.ao.quantization.quantize_dynamic(backbone.net.eval(), {nn.Linear}, dtype=torch.qint8)
    return _as(backbone, net)


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
        change: Network, pixels, marks of the untouched network, generator → changed network and pixels.
        places: How places compare with the untouched network's: "" not at all, "same" at the same place, "flip" mirrored.
        parted: Whether bars and photograph are counted apart.
        precision: Of the forward pass.
    """

    done: str
    change: Change
    places: str = ""
    parted: bool = False
    precision: str = "float32"


INTERVENTIONS: Mapping[str, Intervention] = {
    "untouched": Intervention("nothing", lambda b, x, m, g: (b, x), "same"),
    "no CLS": Intervention("the CLS token is hidden from all patches", _no_cls),
    "grey": Intervention("every pixel is middle grey", lambda b, x, m, g: (b, torch.full_like(x, 0.5))),
    "noise": Intervention(
        "every pixel is Gaussian noise, mean 0.5, standard deviation 0.25",
        lambda b, x, m, g: (b, (0.5 + 0.25 * torch.randn(x.shape, generator=g)).clamp(0, 1)),
    ),
    "letterbox": Intervention(
        "black bars cover the top and the bottom quarter", lambda b, x, m, g: (b, _bars(b, x, False)), parted=True
    ),
    "mirrored bars": Intervention(
        "the same bars repeat the photograph, mirrored", lambda b, x, m, g: (b, _bars(b, x, True)), parted=True
    ),
    "tiled": Intervention("the central patch is everywhere", lambda b, x, m, g: (b, tiled(x, b.patch_size))),
    "shuffled": Intervention(
        "patches in random order under fixed positions", lambda b, x, m, g: (b, shuffled(x, b.patch_size, g))
    ),
    "no positions": Intervention("position embeddings are zero", lambda b, x, m, g: (without_positions(b), x)),
    "outliers removed": Intervention(
        "the untouched network's outlier patches are hidden", lambda b, x, m, g: (_dropped(b, m), x, m)
    ),
    "half removed": Intervention("half of the patches, drawn at random, are hidden", _half),
    "flip": Intervention("images are mirrored, left to right", lambda b, x, m, g: (b, x.flip(-1)), "flip"),
    "shift": Intervention(f"images move {SHIFT} px to the right", lambda b, x, m, g: (b, shifted(x, SHIFT)), "same"),
    "half brightness": Intervention("pixels are halved", lambda b, x, m, g: (b, x / 2), "same"),
    "bfloat16": Intervention("the network runs in bfloat16", lambda b, x, m, g: (b, x), "same", precision="bfloat16"),
    "int8": Intervention("linear layers are quantised to int8", lambda b, x, m, g: (quantised(b), x), "same"),
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


def _counts(ratio: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outliers, patches, and largest ratio of each image."""
    return (ratio > least).sum(-1), np.isfinite(ratio).sum(-1), np.nanmax(ratio, -1)


def _one(
    item: Intervention, backbone: Backbone, pixels: Tensor, marks: np.ndarray, least: float, generator: torch.Generator
) -> tuple[np.ndarray, ...]:
    """One intervention on one batch: → outliers, patches, largest ratio, each (images, 3 parts), shared and joined places."""
    changed, x, *hidden = item.change(backbone, pixels, marks, generator)
    ratio = ratios(_norms(changed, x, item.precision), *hidden)
    rows, columns = backbone.grid((x.shape[-2], x.shape[-1]))
    inside = np.zeros((rows, columns), bool)
    bars = bar_rows(rows)
    inside[bars:-bars] = True
    parts = [np.ones(rows * columns, bool), *((inside.ravel(), ~inside.ravel()) if item.parted else ())]
    found = [np.stack(_counts(ratio[:, part], least)).astype(float) for part in parts]
    found += [np.full_like(found[0], np.nan)] * (3 - len(found))
    now = ratio > least
    if item.places == "flip":
        now = now.reshape(-1, rows, columns)[:, :, ::-1].reshape(len(now), -1)
    both, either = ((now & marks).sum(1), (now | marks).sum(1)) if item.places else (np.full(len(now), np.nan),) * 2
    return *np.stack(found, -1), both, either


def interventions(
    backbone: Backbone,
    images: Any,
    *,
    names: list[str] | None = None,
    ratio: float = 1.6,
    seed: int = 0,
    batch: int = 32,
) -> xr.Dataset:
    """Count outliers in the last block while the input or the network is changed, and see where they are.

    Args:
        backbone: A network; what is done to it happens on copies.
        images: As `capture` takes them.
        names: Of INTERVENTIONS, all by default; the untouched network is always measured.
        ratio: An outlier's norm is above this many times the median patch of its image.
        seed: Of everything drawn.
        batch: Images at a time.

    Returns:
        outliers, patches and largest (over median) [intervention, part, image], part "all", and for bars "photograph" and
        "bars"; shared and joined [intervention, image], the patches that are outliers in both or in either of the untouched
        and the changed network, nan where places do not compare; where [image, y, x], bool, of the untouched network.

    Raises:
        InputError: For unknown names, and changes that this network does not allow.

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
    found: dict[str, list[Any]] = {name: [] for name in chosen}
    places = []
    for pixels in _pixels(backbone, images, batch):
        backbone.fit((pixels.shape[-2], pixels.shape[-1]))
        marks = ratios(_norms(backbone, pixels, "float32")) > ratio
        places.append(marks.reshape(-1, *backbone.grid((pixels.shape[-2], pixels.shape[-1]))))
        for name in chosen:
            found[name].append(_one(INTERVENTIONS[name], backbone, pixels, marks, ratio, generator))
    every = [[np.concatenate(part) for part in zip(*found[name], strict=True)] for name in chosen]
    data: dict[str, Any] = {
        key: (("intervention", "part", "image"), np.stack([e[i].T for e in every]))
        for i, key in enumerate(("outliers", "patches", "largest"))
    }
    data |= {
        key: (("intervention", "image"), np.stack([e[i] for e in every])) for i, key in ((3, "shared"), (4, "joined"))
    }
    data["where"] = (("image", "y", "x"), np.concatenate(places))
    coords = {"intervention": chosen, "part": ["all", "photograph", "bars"], "model": backbone.name}
    return xr.Dataset(data, coords=coords, attrs={"ratio": ratio})


def _pixels(backbone: Backbone, images: Any, batch: int) -> Any:
    """Batches of pixels."""
    source = opened(backbone, images)
    return torch.split(source, batch) if isinstance(source, Tensor) else source.pixels(batch)


def resolutions(
    backbone: Backbone, images: Any, *, sides: list[int] | None = None, ratio: float = 1.6, batch: int = 16
) -> xr.Dataset:
    """Count outliers at several sizes of the input: images are resized (bicubic, with anti-aliasing), positions too.

    Args:
        backbone: A network that takes other sizes than its own; it is at its former size afterwards.
        images: As `capture` takes them.
        sides: Pixels per side, multiples of the patch size; SIDES by default.
        ratio: As for `interventions`.
        batch: Images at a time.

    Returns:
        outliers, patches and largest (over median) [side, image].

    Raises:
        InputError: For sizes the network does not take.
    """
    before = tuple(n * p for n, p in zip(backbone.net.patch_embed.grid_size, backbone.patch_size, strict=True))  # type: ignore
    found = []
    for side in sides or SIDES:
        at = []
        for pixels in _pixels(backbone, images, batch):
            resized = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
            at.append(np.stack(_counts(ratios(_norms(backbone, resized, "float32")), ratio)))
        found.append(np.concatenate(at, 1))
    backbone.fit(before)  # type: ignore[arg-type]
    data = {
        key: (("side", "image"), np.stack([f[i] for f in found]))
        for i, key in enumerate(("outliers", "patches", "largest"))
    }
    coords = {"side": list(sides or SIDES), "model": backbone.name}
    return xr.Dataset(data, coords=coords, attrs={"ratio": ratio})


def shares(found: xr.Dataset) -> xr.Dataset:
    """Shares of outliers with 95 % intervals over images: outliers and patches [..., image] → share [..., end], end in
    "value", "low", "high"."""
    return xr.Dataset({"share": _intervals(found["outliers"], found["patches"])})


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

    core = {"input_core_dims": [["image"], ["image"]], "output_core_dims": [["end"]], "vectorize": True}
    made: xr.DataArray = xr.apply_ufunc(ends, sums, counts, **core)
    return made.assign_coords(end=["value", "low", "high"])


def border(found: xr.Dataset) -> tuple[tuple[float, float, float], float]:
    """Share of outliers on the border ring: of `interventions` → (share, low, high) over images, and the ring's share of all
    patches, which is chance."""
    where = found["where"].values
    ring = np.ones(where.shape[1:], bool)
    ring[1:-1, 1:-1] = False
    return arrays.bootstrap_ratio((where & ring).sum((1, 2)), where.sum((1, 2))), float(ring.mean())


def position_correlation(found: xr.Dataset, *, splits: int = 200, seed: int = 0) -> float:
    """Pearson correlation over places of how often two halves of the images have an outlier there, mean over random halves:
    of `interventions` → correlation."""
    where = found["where"].values.reshape(found.sizes["image"], -1).astype(float)
    rng = np.random.default_rng(seed)
    half = len(where) // 2
    drawn = [rng.permutation(len(where)) for _ in range(splits)]
    pairs = [(where[i[:half]].mean(0), where[i[half:]].mean(0)) for i in drawn]
    return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs if a.std() and b.std()] or [np.nan]))


def cosines(backbone: Backbone, images: Any, *, ratio: float = 1.6, batch: int = 32) -> xr.Dataset:
    """Cosine between final states of patches of different images: of the largest outlier, and of the patch of median norm.

    Args:
        backbone: A network.
        images: As `capture` takes them.
        ratio: As for `interventions`; images without an outlier are left out.
        batch: Images at a time.

    Returns:
        outlier and normal [image], each image with the next that has an outlier, before the final norm.

    Raises:
        InputError: Fewer than two images have an outlier.
    """
    states = capture(backbone, opened(backbone, images), tokens=[-1], kinds="patch", batch=batch)["tokens"].values[:, 0]
    norms = np.linalg.norm(states, axis=-1)
    has = ratios(norms).max(1) > ratio
    if has.sum() < 2:
        raise InputError("fewer than two images have an outlier: there is no pair to compare")
    order = norms.argsort(1)
    picked = {"outlier": order[:, -1], "normal": order[:, order.shape[1] // 2]}
    data = {}
    for name, at in picked.items():
        x = states[np.arange(len(states)), at][has]
        x = x / np.linalg.norm(x, axis=-1, keepdims=True)
        data[name] = ("image", (x * np.roll(x, -1, 0)).sum(-1))
    return xr.Dataset(data, coords={"model": backbone.name}, attrs={"ratio": ratio})
