"""Objects in attention: how well maps match the true objects of each image, beside chance and k-means. No torch.

Maps are [image, query, y, x]; objects are a Dataset whose `region` [image, object, y, x] marks the patches of each
object. Everything here works on patches: an object that fills no patch does not count.
"""

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
import xarray as xr
from scipy.ndimage import gaussian_filter
from sklearn.cluster import KMeans

from vitregs import arrays
from vitregs.arrays import KINDS, patch_maps
from vitregs.data import ground_truth
from vitregs.data.images import Images
from vitregs.errors import InputError, unknown
from vitregs.measure import attention
from vitregs.models import capture
from vitregs.models.backbone import Backbone

RULES = ("mass", "oracle", "argmax")  # how a map becomes a mask
SCALES = ("mean", "place", "none")  # what a map is divided by before maps compete for patches
NOISE = ("white", "smooth")
SEEDS = 4  # starts of k-means, the best of which counts


def queries(backbone: Backbone, images: Images) -> tuple[str | int, ...]:
    """Queries whose attention is asked for: CLS, the registers and the number of the middle patch."""
    rows, columns = backbone.grid(images.size)
    return "cls", "register", rows // 2 * columns + columns // 2


def attention_maps(backbone: Backbone, images: Images, *, layer: int = -1) -> xr.DataArray:
    """Attention probabilities of CLS, each register and the middle patch to the patches, mean over heads: backbone,
    images, layer → [image, query, y, x], not summing to 1 (Fig 9, 16)."""
    kept = capture.attention(backbone, images, layers=[layer], queries=queries(backbone, images))
    return patch_maps(kept.isel(layer=0).mean("head")).rename("attention")


def mean_maps(maps: xr.DataArray) -> xr.DataArray:
    """Mean over images of raw attention probabilities: [image, query, y, x] → [query, y, x] (Fig 16)."""
    return maps.mean("image")


def of_kind(maps: xr.DataArray, *kinds: str) -> xr.DataArray:
    """Keep the maps whose query is of these kinds: [image, query, y, x] → the same, fewer queries.

    Raises InputError for unknown kinds and if no query is left.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise unknown("kind of token", kind, KINDS)
    kept = maps.isel(query=np.flatnonzero(np.isin(maps["query_kind"], kinds)))
    if not kept.sizes["query"]:
        raise InputError(f"there is no attention of a {' or '.join(kinds)} token, only of {', '.join(KINDS)} asked for")
    return kept


def of_network(backbone: Backbone, images: Images) -> xr.Dataset:
    """Objects of images as patches of a network.

    Args:
        backbone: its grid is used.
        images: what it would see.

    Returns:
        What `things` gives, with the name of the network.
    """
    return ground_truth.object_truth(images, backbone.grid(images.size)).assign_coords(model=backbone.name)


def background_shares(backbone: Backbone, images: Images) -> xr.DataArray:
    """Share of background (mask 0) in every patch of a network, for arrays that are drawn without their images.

    Args:
        backbone: its grid is used.
        images: what it would see.

    Returns:
        [image, token] of patches, in [0, 1], nan for an image without a mask.

    Raises:
        InputError: if no image has a mask.
    """
    grid = backbone.grid(images.size)
    found = images.background(grid)
    if found is None:
        raise InputError(f"not one image of {images.name} has a mask to tell background by")
    coords = arrays.token_coords(["patch"] * (grid[0] * grid[1]), grid)
    return xr.DataArray(found, dims=("image", "token"), coords=coords, name="background")


def first_queries(maps: xr.DataArray, count: int) -> list[int]:
    """Places of the first `count` queries that are no patch, and of the patches: […, query, …] → indices, in order."""
    patch = maps["query_kind"].values == "patch"
    return sorted([*np.flatnonzero(~patch)[:count].tolist(), *np.flatnonzero(patch).tolist()])


def _regions(maps: xr.DataArray, seen: xr.Dataset) -> np.ndarray:
    """Regions that fit the maps: → bool (image, object, patches). Raises InputError if they do not, or if there is none."""
    region = seen["region"].transpose("image", "object", "y", "x")
    for name, sizes in (("images", ("image",)), ("patches", ("y", "x"))):
        ours, theirs = (tuple(a.sizes[d] for d in sizes) for a in (maps, region))
        if ours != theirs:
            raise InputError(
                f"maps and objects differ in {name}: {'x'.join(map(str, ours))}, {'x'.join(map(str, theirs))}"
            )
    if not region.values.any():
        raise InputError("no object fills a patch in any of these images: there is nothing to match")
    return region.values.reshape(*region.shape[:2], -1)


def _flat(maps: xr.DataArray) -> np.ndarray:
    values = maps.transpose("image", "query", "y", "x").values
    return values.reshape(*values.shape[:2], -1)


def match(maps: xr.DataArray, seen: xr.Dataset, *, rule: str = "mass", keep: float = 0.6, shift: int = 0) -> xr.Dataset:
    """Best match of every object: [image, query, y, x], objects → `iou` [image, object], the largest intersection over union
    with a map's mask, and `query`, the index of that map; nan and -1 where there is no object.

    A map's mask is the fewest patches that hold the share `keep` of its mass ("mass"), as many of its highest patches as
    the object has ("oracle": this one knows the truth), or the patches where it is the highest of all maps ("argmax",
    meant for maps that share the patches out). `shift` holds the maps against the objects of an image that many further
    on: what chance gives. Raises InputError for other rules, sizes that differ and no object anywhere.
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
            mask = attention.mass_mask(values, keep)
        else:
            mask = values.argmax(1)[:, None] == np.arange(values.shape[1])[:, None]
        inter = np.einsum("iop,iqp->ioq", region.astype(np.float32), mask.astype(np.float32))
        union = size[..., None] + mask.sum(-1)[:, None] - inter
    iou = inter / np.maximum(union, 1)
    there = size > 0
    found = {"iou": np.where(there, iou.max(-1), np.nan), "query": np.where(there, iou.argmax(-1), -1)}
    return xr.Dataset({k: (("image", "object"), v) for k, v in found.items()})


def scaled(maps: xr.DataArray, scale: str = "mean") -> xr.DataArray:
    """Make maps comparable before they compete: divide each query's maps by their mean over images and patches ("mean"),
    or by their mean over images at each patch, which takes fixed positions away ("place"), or not ("none")."""
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    if scale == "none":
        return maps
    return maps / maps.mean("image" if scale == "place" else ("image", "y", "x"))


def grouping(maps: xr.DataArray, seen: xr.Dataset, *, scale: str = "mean", shift: int = 0) -> xr.DataArray:
    """Adjusted Rand index of "which map is the highest here" against the true objects, on the patches of objects alone, as
    for Slot Attention: [image, query, y, x], objects → [image]; nan for images with fewer than 2 objects.

    `scale` is that of `scaled`, `shift` that of `match`. Raises InputError for fewer than 2 maps, for boxes, which may
    overlap, for sizes that differ and no object anywhere.
    """
    if maps.sizes["query"] < 2:
        raise InputError(
            f"{maps.sizes['query']} map cannot share out the patches: an adjusted Rand index needs 2 or more"
        )
    region = np.roll(_regions(maps, seen), -shift, 0)
    if (region.sum(1) > 1).any():
        raise InputError("objects overlap, as boxes do: an adjusted Rand index needs one object a patch")
    best = _flat(scaled(maps, scale)).argmax(1)
    mine = best[:, None] == np.arange(maps.sizes["query"])[:, None]
    index = rand_index(np.einsum("iop,iqp->ioq", region.astype(float), mine.astype(float)))
    enough = region.any(-1).sum(-1) >= 2
    return xr.DataArray(np.where(enough, index, np.nan), dims="image", name="ari")


def rand_index(counts: np.ndarray) -> np.ndarray:
    """Adjusted Rand index of tables that count members by true and found group: (…, true, found) → (…); 1 where both
    groupings are trivial in the same way. For all images at once, where scikit-learn takes one."""

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
    """Group the patches of each image by k-means on their states, every channel divided by its standard deviation over
    all images: [image, token, channel], number of groups → [image, y, x] of 0, 1, …

    Raises InputError for fewer than 2 groups and for fewer patches than groups.
    """
    maps = patch_maps(states).transpose("image", "y", "x", "channel")
    rows, columns = maps.sizes["y"], maps.sizes["x"]
    if not 2 <= clusters <= rows * columns:
        raise InputError(
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
    """Group patches by where they are and nothing else (k-means on y, x): images, (rows, columns), number of groups →
    [image, y, x], the same in every image."""
    at = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, 2).astype(float)
    found = np.broadcast_to(_kmeans(at, min(clusters, len(at)), 0).reshape(grid), (images, *grid))
    return xr.DataArray(found, dims=("image", "y", "x"), name="group")


def noise_maps(images: int, queries: int, grid: tuple[int, int], *, kind: str = "white", seed: int = 0) -> xr.DataArray:
    """Maps of nothing, softmax of Gaussian noise, each patch by itself ("white") or blurred over a sixth of the grid
    ("smooth"): images, maps, (rows, columns) → [image, query, y, x], each summing to 1."""
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
    """How alike two queries' maps are: correlation over the patches of an image, mean over images: [image, query, y, x]
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
    """Mean attention to a patch of each object, over the image's mean: [image, query, y, x], objects → [image, query,
    object]; nan where there is no object. Raises InputError for sizes that differ and no object anywhere."""
    region = _regions(maps, seen).astype(float)
    values = _flat(maps)
    size = region.sum(-1)[:, None]
    on = np.einsum("iqp,iop->iqo", values, region) / np.maximum(size, 1) / values.mean(-1, keepdims=True)
    coords = {"query": maps["query"].values} if "query" in maps.coords else {}
    return xr.DataArray(np.where(size > 0, on, np.nan), dims=("image", "query", "object"), coords=coords)


def variety(maps: xr.DataArray, seen: xr.Dataset) -> xr.Dataset:
    """Whether queries prefer different objects of an image: [image, query, y, x], objects → four shares by [image], nan for
    images with fewer than 2 objects.

    A query's top-attended object is the object with the most attention to a patch. `same`: pairs of queries with one
    top-attended object; `covered`: objects that are some query's top-attended object; `same_by_chance`,
    `covered_by_chance`: if each chose one at random. Raises InputError for fewer than 2 queries and as `attended`
    does.
    """
    count = maps.sizes["query"]
    if count < 2:
        raise InputError(f"{count} query cannot differ from others: 2 or more are needed")
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
    """What decides how much of a query's attention an object gets: [image, query, y, x], objects of scenes → a row a query:
    share of variance of log attention over all objects that is explained by `place` (what the object's patches get in
    all other images), `colour`, `shape` and `depth` rank, each alone.

    Shares are adjusted for the number of groups, so that random guesses give 0 on average. Raises InputError for images
    without these facts, a single image, and as `attended` does.
    """
    if lacking := [p for p in ground_truth.PROPERTIES if p not in seen]:
        raise InputError(f"nothing is known of the {lacking[0]} of these objects: only scenes tell")
    if maps.sizes["image"] < 2:
        raise InputError("one image cannot tell places from objects: 2 or more are needed")
    n = maps.sizes["image"]
    others = (maps.sum("image") - maps) / (n - 1)
    on, usual = (np.log(np.maximum(attended(m, seen).values, 1e-9)) for m in (maps, others))
    there = np.isfinite(on[:, 0])
    rows = []
    for q, name in enumerate(maps["query"].values):
        y, x = on[:, q][there], usual[:, q][there]
        row: dict[str, object] = {"query": str(name), "place": _adjusted(np.corrcoef(x, y)[0, 1] ** 2, len(y), 1)}
        for key in ground_truth.PROPERTIES:
            group = np.unique(seen[key].values[there], return_inverse=True)[1]
            total = np.bincount(group, y - y.mean())
            between = (total**2 / np.bincount(group)).sum() / ((y - y.mean()) ** 2).sum()
            row[key] = _adjusted(between, len(y), group.max())
        rows.append(row)
    return pd.DataFrame(rows)


def _adjusted(share: float, n: int, freedom: int) -> float:
    return float(1 - (1 - share) * (n - 1) / (n - freedom - 1)) if n > freedom + 1 else np.nan


SHIFTS = 8  # later images whose objects the same maps are held against: what chance gives
QUANTITIES = {"iou": "best-match IoU", "ari": "adjusted Rand index"}


def compare(backbone: Backbone, images: Images, *, clusters: int, seed: int = 0) -> xr.Dataset:
    """Score the attention of CLS and registers, and four groupings that know nothing of attention, image by image:
    backbone, images, number of groups, seed → `iou`, `iou_chance`, `ari`, `ari_chance` [way, image], nan where a
    score does not exist, and `maps` [way], how many compete.

    k-means groups the states that enter the last block, which are what its attention looks at.
    """
    seen = ground_truth.object_truth(images, backbone.grid(images.size))
    look = capture.capture(backbone, images, attention=queries(backbone, images), tokens=[-2], kinds="patch")
    maps = patch_maps(look["attention"].isel(attention_layer=0).mean("head")).rename("attention")
    states = look["tokens"].isel(tokens_layer=0)
    n, side = maps.sizes["image"], backbone.grid(images.size)
    found = {"CLS": (of_kind(maps, "cls"), "mass"), "CLS, size known": (of_kind(maps, "cls"), "oracle")}
    if backbone.registers:
        registers = of_kind(maps, "register")
        found |= {"registers": (registers, "mass"), "registers, size known": (registers, "oracle")}
    found["k-means"] = (one_hot(kmeans(states, clusters, seed=seed)), "argmax")
    found["places"] = (one_hot(places(n, side, clusters)), "argmax")
    for kind in NOISE:
        noise = noise_maps(n, max(1, backbone.registers), side, kind=kind, seed=seed)
        found[f"{kind} noise"] = (noise, "mass")
    parts = [score(m, seen, rule=rule) for m, rule in found.values()]
    return _joined(list(found), parts).assign_coords(model=backbone.name).assign_attrs(of=seen.attrs["of"])


def by_block(backbone: Backbone, images: Images) -> xr.Dataset:
    """Whether registers differ and match objects, block by block: backbone, images → `iou`, `iou_chance`, `same`,
    `same_by_chance` [block, image] of the registers, or of CLS where there are none; nan where a score does not exist."""
    seen = ground_truth.object_truth(images, backbone.grid(images.size))
    kind = "register" if backbone.registers else "cls"
    blocks = list(range(1, backbone.depth + 1))
    maps = patch_maps(capture.attention(backbone, images, layers=blocks, queries=(kind,)).mean("head"))
    parts = []
    for k in range(len(blocks)):
        at = maps.isel(layer=k)
        found = score(at, seen, rule="mass")[["iou", "iou_chance"]]
        if seen["region"].values.any() and at.sizes["query"] > 1:
            found = found.merge(variety(at, seen)[["same", "same_by_chance"]])
        else:
            found = found.assign(same=np.nan * found["iou"], same_by_chance=np.nan * found["iou"])
        parts.append(found)
    joined = xr.concat(parts, xr.DataArray(blocks, dims="block", name="block"))
    return joined.assign_coords(model=backbone.name)


def slot_scores(found: xr.Dataset, seen: xr.Dataset) -> xr.Dataset:
    """Score what `slot_attention.discover` gives, the decoder's masks and the slots' attention: → as `compare`; the
    losses stand in the method's name."""
    before, after = found["loss"].values
    names = {"attention": f"slots (loss {before:.2f} to {after:.2f})", "mask": "slots' masks"}
    parts = [score(found[k], seen, rule="argmax") for k in names]
    return _joined(list(names.values()), parts)


def _joined(names: Sequence[str], parts: Sequence[xr.Dataset]) -> xr.Dataset:
    return xr.concat(parts, xr.DataArray(np.array(names), dims="way", name="way"), data_vars="all")


def score(maps: xr.DataArray, seen: xr.Dataset, *, rule: str) -> xr.Dataset:
    """Score maps image by image: [image, query, y, x], objects, a rule of `object_attention.match` → `iou`, `iou_chance`, `ari`,
    `ari_chance` [image], and `maps`, their number.

    The IoU of an image is the mean over its objects. Chance is the mean over the objects of the next 8 images. Where
    there is no object, or where objects overlap or one map is alone, scores are nan.
    """
    n = maps.sizes["image"]
    shifts = range(1, min(SHIFTS, n - 1) + 1)
    nothing = np.full(n, np.nan)
    found = dict.fromkeys(("iou", "iou_chance", "ari", "ari_chance"), nothing)
    jobs: dict[str, Callable[[int], xr.DataArray]] = {}
    if seen["region"].values.any():
        jobs["iou"] = lambda k: match(maps, seen, rule=rule, shift=k)["iou"].mean("object")
        if seen.attrs["of"] == "masks" and maps.sizes["query"] > 1 and rule != "oracle":
            scale = "none" if rule == "argmax" else "mean"
            jobs["ari"] = lambda k: grouping(maps, seen, scale=scale, shift=k)
    for name, job in jobs.items():
        found[name] = job(0).values
        if shifts:
            found[f"{name}_chance"] = xr.concat([job(k) for k in shifts], "shift").mean("shift").values
    data = {k: ("image", v) for k, v in found.items()}
    return xr.Dataset({**data, "maps": maps.sizes["query"]})
