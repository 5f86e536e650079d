"""Objects in attention: how well maps match the true objects of each picture, beside chance and k-means. No torch.

Maps are [image, query, y, x]; things are a Dataset whose `region` [image, object, y, x] marks the patches of each
object. Everything here works on patches: an object that fills no patch does not count.
"""

from itertools import combinations

import numpy as np
import pandas as pd
import xarray as xr
from scipy.ndimage import gaussian_filter
from sklearn.cluster import KMeans

from vitregs import artifacts, capture
from vitregs.backbones import Backbone
from vitregs.images import Batch, Images
from vitregs.problems import Problem, unknown
from vitregs.results import KINDS, grid

RULES = ("mass", "oracle", "argmax")  # how a map becomes a mask
SCALES = ("mean", "place", "none")  # what a map is divided by before maps compete for patches
PROPERTIES = ("colour", "shape", "depth")  # of an object, in scenes
NOISE = ("white", "smooth")
SEEDS = 4  # starts of k-means, the best of which counts


def queries(backbone: Backbone, images: Images) -> tuple[str | int, ...]:
    """Queries whose attention is asked for: CLS, the registers and the number of the middle patch."""
    rows, columns = backbone.grid(images.size)
    return "cls", "register", rows // 2 * columns + columns // 2


def attention_maps(backbone: Backbone, images: Images, *, layer: int = -1) -> xr.DataArray:
    """Attention probabilities of CLS, each register and the middle patch to the patches, mean over heads: backbone,
    pictures, layer → [image, query, y, x], not summing to 1 (Fig 9, 16)."""
    kept = capture.attention(backbone, images, layers=[layer], queries=queries(backbone, images))
    return grid(kept.isel(layer=0).mean("head")).rename("attention")


def mean_maps(maps: xr.DataArray) -> xr.DataArray:
    """Mean over pictures of raw attention probabilities: [image, query, y, x] → [query, y, x] (Fig 16)."""
    return maps.mean("image")


def of_kind(maps: xr.DataArray, *kinds: str) -> xr.DataArray:
    """Keep the maps whose query is of these kinds: [image, query, y, x] → the same, fewer queries.

    Raises Problem for unknown kinds and if no query is left.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise unknown("kind of token", kind, KINDS)
    kept = maps.isel(query=np.flatnonzero(np.isin(maps["query_kind"], kinds)))
    if not kept.sizes["query"]:
        raise Problem(f"there is no attention of a {' or '.join(kinds)} token, only of {', '.join(KINDS)} asked for")
    return kept


def patch_instances(instances: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """The instance that fills most of each patch, 0 where more than half is background: (n, H, W) of 0 for background and
    1, 2, … for instances, (rows, columns) → (n, rows, columns). Raises Problem unless patches tile the picture."""
    n, height, width = instances.shape
    rows, columns = grid
    if height % rows or width % columns:
        raise Problem(f"masks of {height}x{width} pixels cannot be cut into {rows}x{columns} patches")
    cut = instances.reshape(n, rows, height // rows, columns, width // columns)
    share = np.stack([(cut == k).mean((2, 4)) for k in range(int(instances.max(initial=0)) + 1)], -1)
    if share.shape[-1] == 1:
        return np.zeros((n, rows, columns), int)
    return np.where(share[..., 0] > 0.5, 0, 1 + share[..., 1:].argmax(-1))


def box_regions(boxes: np.ndarray, size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """Patches whose centre lies in a box: (objects, 4) y0, x0, y1, x1 in pixels, (height, width), (rows, columns) → bool
    (objects, rows, columns)."""
    y, x = ((np.arange(n) + 0.5) * side / n for n, side in zip(grid, size, strict=True))
    y0, x0, y1, x1 = boxes.reshape(-1, 4).T[..., None]
    return ((y >= y0) & (y < y1))[:, :, None] & ((x >= x0) & (x < x1))[:, None, :]


def things(images: Images, grid: tuple[int, int]) -> xr.Dataset:
    """Objects of pictures as patches: pictures, (rows, columns) → `region` [image, object, y, x] bool and `placed` [image],
    how many objects there are; of scenes also `colour`, `shape`, `depth` [image, object], -1 where there is no object.

    The attribute `of` says what regions are: "masks" of instances (scenes), "boxes", which may overlap, or "nothing".
    """
    parts: list[np.ndarray] = []
    placed: list[int] = []
    facts: list[np.ndarray] = []
    of = "nothing"
    for batch in images.batches():
        found = _instances(batch, grid) if batch.truth else [box_regions(b, images.size, grid) for b in batch.boxes]
        parts += found
        if batch.truth is not None:
            of = "masks"
            looks = batch.truth.objects.numpy()
            depth = np.where(looks[..., 0] >= 0, np.arange(looks.shape[1]), -1)
            facts.append(np.stack([looks[..., 1], looks[..., 0], depth], -1))
            placed += (looks[..., 0] >= 0).sum(1).tolist()
        else:
            of = "boxes" if of == "boxes" or any(map(len, batch.boxes)) else "nothing"
            placed += [len(b) for b in batch.boxes]
    most = max(1, *(len(p) for p in parts))
    region = np.stack([np.pad(p, ((0, most - len(p)), (0, 0), (0, 0))) for p in parts])
    data = {"region": (("image", "object", "y", "x"), region), "placed": ("image", placed)}
    if facts:
        data |= {
            k: (("image", "object"), v)
            for k, v in zip(PROPERTIES, np.concatenate(facts).transpose(2, 0, 1), strict=True)
        }
    return xr.Dataset(data, attrs={"of": of})


def of_network(backbone: Backbone, images: Images) -> xr.Dataset:
    """Objects of images as patches of a network.

    Args:
        backbone: its grid is used.
        images: what it would see.

    Returns:
        What `things` gives, with the name of the network.
    """
    return things(images, backbone.grid(images.size)).assign_coords(model=backbone.name)


def in_view(seen: xr.Dataset) -> xr.DataArray:
    """Objects that fill at least one patch: things → [image, object] bool."""
    return seen["region"].any(("y", "x")).rename("in view")


def labelled(seen: xr.Dataset) -> xr.DataArray:
    """Which object owns each patch, for a drawing: things → [image, y, x], 0 for none, 1, 2, … by depth rank."""
    number = xr.DataArray(np.arange(1, seen.sizes["object"] + 1), dims="object")
    return (seen["region"] * number).max("object")


def some(maps: xr.DataArray, count: int) -> list[int]:
    """Places of the first `count` queries that are no patch, and of the patches: […, query, …] → indices, in order."""
    patch = maps["query_kind"].values == "patch"
    return sorted([*np.flatnonzero(~patch)[:count].tolist(), *np.flatnonzero(patch).tolist()])


def _instances(batch: Batch, grid: tuple[int, int]) -> list[np.ndarray]:
    assert batch.truth is not None
    most = batch.truth.objects.shape[1]
    which = patch_instances(batch.truth.instances.numpy(), grid)
    return list(which[:, None] == np.arange(1, most + 1)[:, None, None])


def _regions(maps: xr.DataArray, seen: xr.Dataset) -> np.ndarray:
    """Regions that fit the maps: → bool (image, object, patches). Raises Problem if they do not, or if there is none."""
    region = seen["region"].transpose("image", "object", "y", "x")
    for name, sizes in (("pictures", ("image",)), ("patches", ("y", "x"))):
        ours, theirs = (tuple(a.sizes[d] for d in sizes) for a in (maps, region))
        if ours != theirs:
            raise Problem(
                f"maps and objects differ in {name}: {'x'.join(map(str, ours))}, {'x'.join(map(str, theirs))}"
            )
    if not region.values.any():
        raise Problem("no object fills a patch in any of these pictures: there is nothing to match")
    return region.values.reshape(*region.shape[:2], -1)


def _flat(maps: xr.DataArray) -> np.ndarray:
    values = maps.transpose("image", "query", "y", "x").values
    return values.reshape(*values.shape[:2], -1)


def match(maps: xr.DataArray, seen: xr.Dataset, *, rule: str = "mass", keep: float = 0.6, shift: int = 0) -> xr.Dataset:
    """Best match of every object: [image, query, y, x], things → `iou` [image, object], the largest intersection over union
    with a map's mask, and `query`, the index of that map; nan and -1 where there is no object.

    A map's mask is the fewest patches that hold the share `keep` of its mass ("mass"), as many of its highest patches as
    the object has ("oracle": this one knows the truth), or the patches where it is the highest of all maps ("argmax",
    meant for maps that share the patches out). `shift` holds the maps against the objects of a picture that many further
    on: what chance gives. Raises Problem for other rules, sizes that differ and no object anywhere.
    """
    if rule not in RULES:
        raise unknown("rule", rule, RULES)
    region, values = np.roll(_regions(maps, seen), -shift, 0), _flat(maps)
    size = region.sum(-1)
    if rule == "oracle":
        rank = np.argsort(np.argsort(-values, -1, kind="stable"), -1)
        chosen = rank[:, None] < size[..., None, None]  # (image, object, query, patches)
        inter = (chosen & region[:, :, None]).sum(-1)
        union = 2 * size[..., None] - inter
    else:
        if rule == "mass":
            mask = artifacts.mass_mask(values, keep)
        else:
            mask = values.argmax(1)[:, None] == np.arange(values.shape[1])[:, None]
        inter = np.einsum("iop,iqp->ioq", region.astype(np.float32), mask.astype(np.float32))
        union = size[..., None] + mask.sum(-1)[:, None] - inter
    iou = inter / np.maximum(union, 1)
    there = size > 0
    found = {"iou": np.where(there, iou.max(-1), np.nan), "query": np.where(there, iou.argmax(-1), -1)}
    return xr.Dataset({k: (("image", "object"), v) for k, v in found.items()})


def scaled(maps: xr.DataArray, scale: str = "mean") -> xr.DataArray:
    """Make maps comparable before they compete: divide each query's maps by their mean over pictures and patches ("mean"),
    or by their mean over pictures at each patch, which takes fixed positions away ("place"), or not ("none")."""
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    if scale == "none":
        return maps
    return maps / maps.mean("image" if scale == "place" else ("image", "y", "x"))


def grouping(maps: xr.DataArray, seen: xr.Dataset, *, scale: str = "mean", shift: int = 0) -> xr.DataArray:
    """Adjusted Rand index of "which map is the highest here" against the true objects, on the patches of objects alone, as
    for Slot Attention: [image, query, y, x], things → [image]; nan for pictures with fewer than 2 objects.

    `scale` is that of `scaled`, `shift` that of `match`. Raises Problem for fewer than 2 maps, for boxes, which may
    overlap, for sizes that differ and no object anywhere.
    """
    if maps.sizes["query"] < 2:
        raise Problem(f"{maps.sizes['query']} map cannot share out the patches: an adjusted Rand index needs 2 or more")
    region = np.roll(_regions(maps, seen), -shift, 0)
    if (region.sum(1) > 1).any():
        raise Problem("objects overlap, as boxes do: an adjusted Rand index needs one object a patch")
    best = _flat(scaled(maps, scale)).argmax(1)
    mine = best[:, None] == np.arange(maps.sizes["query"])[:, None]
    index = rand_index(np.einsum("iop,iqp->ioq", region.astype(float), mine.astype(float)))
    enough = region.any(-1).sum(-1) >= 2
    return xr.DataArray(np.where(enough, index, np.nan), dims="image", name="ari")


def rand_index(counts: np.ndarray) -> np.ndarray:
    """Adjusted Rand index of tables that count members by true and found group: (…, true, found) → (…); 1 where both
    groupings are trivial in the same way. For all pictures at once, where scikit-learn takes one."""

    def pairs(n: np.ndarray) -> np.ndarray:
        return n * (n - 1) / 2

    both, all_ = pairs(counts).sum((-1, -2)), pairs(counts.sum((-1, -2)))
    true, found = pairs(counts.sum(-1)).sum(-1), pairs(counts.sum(-2)).sum(-1)
    chance, most = true * found / np.maximum(all_, 1), (true + found) / 2
    return np.where(most == chance, 1.0, (both - chance) / np.where(most == chance, 1.0, most - chance))


def one_hot(groups: xr.DataArray) -> xr.DataArray:
    """Maps of a grouping, 1 where a patch belongs to the group and 0 elsewhere: [image, y, x] → [image, query, y, x]."""
    which = np.arange(int(groups.max()) + 1)
    values = (groups.transpose("image", "y", "x").values[:, None] == which[:, None, None]).astype(np.float32)
    return xr.DataArray(values, dims=("image", "query", "y", "x"), coords={"query": [f"group{k}" for k in which]})


def kmeans(states: xr.DataArray, clusters: int, *, seed: int = 0) -> xr.DataArray:
    """Group the patches of each picture by k-means on their states, every channel divided by its spread over all pictures:
    [image, token, channel], number of groups → [image, y, x] of 0, 1, …

    Raises Problem for fewer than 2 groups and for fewer patches than groups.
    """
    maps = grid(states).transpose("image", "y", "x", "channel")
    rows, columns = maps.sizes["y"], maps.sizes["x"]
    if not 2 <= clusters <= rows * columns:
        raise Problem(
            f"{rows * columns} patches cannot be put into {clusters} groups: 2 or more, one patch each at least"
        )
    values = maps.values.astype(float)
    values = (values / np.maximum(values.std((0, 1, 2)), 1e-12)).reshape(len(values), rows * columns, -1)
    found = [_kmeans(v, clusters, seed).reshape(rows, columns) for v in values]
    return xr.DataArray(np.stack(found), dims=("image", "y", "x"), name="group")


def _kmeans(values: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    different = min(clusters, len(np.unique(values, axis=0)))  # more centres than points would end in a warning
    return KMeans(different, n_init=SEEDS, random_state=seed).fit_predict(values)


def places(images: int, grid: tuple[int, int], clusters: int) -> xr.DataArray:
    """Group patches by where they are and nothing else (k-means on y, x): pictures, (rows, columns), number of groups →
    [image, y, x], the same in every picture."""
    at = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, 2).astype(float)
    found = np.broadcast_to(_kmeans(at, min(clusters, len(at)), 0).reshape(grid), (images, *grid))
    return xr.DataArray(found, dims=("image", "y", "x"), name="group")


def noise(images: int, queries: int, grid: tuple[int, int], *, kind: str = "white", seed: int = 0) -> xr.DataArray:
    """Maps of nothing, softmax of Gaussian noise, each patch by itself ("white") or blurred over a sixth of the grid
    ("smooth"): pictures, maps, (rows, columns) → [image, query, y, x], each summing to 1."""
    if kind not in NOISE:
        raise unknown("noise", kind, NOISE)
    values = np.random.default_rng(seed).standard_normal((images, queries, *grid))
    if kind == "smooth":
        values = gaussian_filter(values, (0, 0, *(n / 6 for n in grid)))
        values /= values.std((2, 3), keepdims=True)
    values = np.exp(values)
    values /= values.sum((2, 3), keepdims=True)
    return xr.DataArray(
        values, dims=("image", "query", "y", "x"), coords={"query": [f"noise{k}" for k in range(queries)]}
    )


def similarity(maps: xr.DataArray) -> xr.DataArray:
    """How alike two queries' maps are: correlation over the patches of a picture, mean over pictures: [image, query, y, x]
    → [query, other]."""
    values = _flat(maps).astype(float)
    values = values - values.mean(-1, keepdims=True)
    values = values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-12)
    alike = np.einsum("iqp,irp->qr", values, values) / len(values)
    names = maps["query"].values
    return xr.DataArray(alike, dims=("query", "other"), coords={"query": names, "other": names}, name="similarity")


def farthest(alike: xr.DataArray, count: int) -> list[str]:
    """The queries that differ most from one another: [query, other], how many → names, in order; of all choices the one
    with the smallest mean similarity of two (all of them where there are no more)."""
    n = alike.sizes["query"]
    pairs = alike.values
    sets = [list(c) for c in combinations(range(n), min(count, n))]
    best = min(sets, key=lambda c: pairs[np.ix_(c, c)].sum() - pairs[c, c].sum())
    return [str(alike["query"].values[k]) for k in best]


def attended(maps: xr.DataArray, seen: xr.Dataset) -> xr.DataArray:
    """Mean attention to a patch of each object, over the picture's mean: [image, query, y, x], things → [image, query,
    object]; nan where there is no object. Raises Problem for sizes that differ and no object anywhere."""
    region = _regions(maps, seen).astype(float)
    values = _flat(maps)
    size = region.sum(-1)[:, None]
    on = np.einsum("iqp,iop->iqo", values, region) / np.maximum(size, 1) / values.mean(-1, keepdims=True)
    coords = {"query": maps["query"].values} if "query" in maps.coords else {}
    return xr.DataArray(np.where(size > 0, on, np.nan), dims=("image", "query", "object"), coords=coords)


def variety(maps: xr.DataArray, seen: xr.Dataset) -> xr.Dataset:
    """Whether queries prefer different objects of a picture: [image, query, y, x], things → four shares by [image], nan for
    pictures with fewer than 2 objects.

    A query's favourite is the object with the most attention to a patch. `same`: pairs of queries with one favourite;
    `covered`: objects that are somebody's favourite; `same_by_chance`, `covered_by_chance`: if each chose one blindly.
    Raises Problem for fewer than 2 queries and as `attended` does.
    """
    count = maps.sizes["query"]
    if count < 2:
        raise Problem(f"{count} query cannot differ from others: 2 or more are needed")
    on = attended(maps, seen).values
    there = np.isfinite(on[:, 0])
    number = there.sum(-1)
    pick = np.where(there[:, None], on, -np.inf).argmax(-1)
    votes = (pick[..., None] == np.arange(on.shape[-1])).sum(1)
    m = np.maximum(number, 1)
    found = {
        "same": (votes * (votes - 1)).sum(-1) / (count * (count - 1)),
        "covered": (votes > 0).sum(-1) / m,
        "same_by_chance": 1 / m,
        "covered_by_chance": 1 - (1 - 1 / m) ** count,
    }
    return xr.Dataset({k: ("image", np.where(number >= 2, v, np.nan)) for k, v in found.items()})


def preferences(maps: xr.DataArray, seen: xr.Dataset) -> pd.DataFrame:
    """What decides how much of a query's attention an object gets: [image, query, y, x], things of scenes → a row a query:
    share of variance of log attention over all objects that is explained by `place` (what the object's patches get in
    all other pictures), `colour`, `shape` and `depth` rank, each alone.

    Shares are adjusted for the number of groups, so that blind guesses give 0 on average. Raises Problem for pictures
    without these facts, a single picture, and as `attended` does.
    """
    if lacking := [p for p in PROPERTIES if p not in seen]:
        raise Problem(f"nothing is known of the {lacking[0]} of these objects: only scenes tell")
    if maps.sizes["image"] < 2:
        raise Problem("one picture cannot tell places from objects: 2 or more are needed")
    n = maps.sizes["image"]
    others = (maps.sum("image") - maps) / (n - 1)
    on, usual = (np.log(np.maximum(attended(m, seen).values, 1e-9)) for m in (maps, others))
    there = np.isfinite(on[:, 0])
    rows = []
    for q, name in enumerate(maps["query"].values):
        y, x = on[:, q][there], usual[:, q][there]
        row: dict[str, object] = {"query": str(name), "place": _adjusted(np.corrcoef(x, y)[0, 1] ** 2, len(y), 1)}
        for key in PROPERTIES:
            group = np.unique(seen[key].values[there], return_inverse=True)[1]
            total = np.bincount(group, y - y.mean())
            between = (total**2 / np.bincount(group)).sum() / ((y - y.mean()) ** 2).sum()
            row[key] = _adjusted(between, len(y), group.max())
        rows.append(row)
    return pd.DataFrame(rows)


def _adjusted(share: float, n: int, freedom: int) -> float:
    return float(1 - (1 - share) * (n - 1) / (n - freedom - 1)) if n > freedom + 1 else np.nan
