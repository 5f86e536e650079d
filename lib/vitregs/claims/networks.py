"""Published networks measured once, drawn anywhere: what is measured on which images, where it lies, and how it is read.

Arrays lie in `data/results/published/NETWORK/NAME.nc`, so that a chapter and the scoreboard show a real network where
neither its weights nor its images are at hand. What is measured is one table, ENTRIES: the very functions that chapters
measure with, so that the arrays feed the same tables and figures.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import xarray as xr

from vitregs import cache, paths
from vitregs.data import datasets, images
from vitregs.data.images import Images
from vitregs.data.preparation import Preparation
from vitregs.errors import InputError, unknown
from vitregs.measure import (
    attention,
    behaviour,
    diagnose,
    lost,
    neurons,
    norms,
    object_attention,
    pca,
    remedies,
)
from vitregs.models import capture, test_time
from vitregs.models.backbone import Backbone
from vitregs.probes import classification, local, transfer
from vitregs.probes import remedies as probes_of_remedies

FOLDER = paths.ROOT / "data" / "results" / "published"
Measured = xr.DataArray | xr.Dataset
LARGEST = float(np.finfo(np.float16).max)
LAST_OBJECT = 91  # of COCO's classes; behind it stand sky, grass, walls and the like


# --- image sets: at the network's size, prepared as its own evaluation does, the training part first
def _coco(backbone: Backbone, folder: str) -> Images:
    """256 images with boxes and, most of them, masks of objects."""
    options: Any = {"size": backbone.size, "preparation": backbone.preparation, "last_object": LAST_OBJECT}
    return images.chain(datasets.open_parts(folder, ("train", "validation"), counts=(128, 128), **options))


def _labelled(name: str, test: int, backbone: Backbone, folder: str) -> Images:
    """A data set of Table 1: twice as many images of the training part as of the other, which is where probes divide them."""
    options: Any = {"size": backbone.size, "preparation": backbone.preparation, "folder": folder}
    return images.chain(datasets.open_set(name, train_count=2 * test, test_count=test, **options))


def _photographs(backbone: Backbone, _place: str) -> Images:
    """Photographs that installed packages ship: the only ones that may be shown."""
    return images.open_images("photographs", size=backbone.size, preparation=backbone.preparation)


IMAGE_SETS: Mapping[str, Callable[[Backbone, str], Images]] = {
    "photographs": _photographs,
    "coco": _coco,
    "imagenette": partial(_labelled, "Imagenette", 500),
    "tiny-imagenet": partial(_labelled, "Tiny-ImageNet", 1000),
    "cifar10": partial(_labelled, "CIFAR-10", 500),
}
HERE = "photographs"  # the set that needs no folder


def photographs(network: str, count: int) -> np.ndarray:
    """Photographs as a network sees them, without its weights: a name that timm knows, a test-time register may be appended, how
    many → (count, H, W, 3) in [0, 1].

    Raises:
        InputError: for names that timm does not know.
    """
    bare = test_time.split(network)[0]
    config = timm.get_pretrained_cfg(bare, allow_unregistered=False) if timm.is_model(bare) else None
    if config is None:
        raise InputError(f"timm knows no {bare}: how it prepares photographs is not known without its weights")
    found = timm.data.resolve_data_config(pretrained_cfg=config.to_dict())
    size = found["input_size"][1:]
    shown = images.open_images("photographs", size=size, preparation=Preparation.of(found))
    return next(shown.pixels(count)).permute(0, 2, 3, 1).numpy()


# --- what is measured
@dataclass(frozen=True)
class Entry:
    """One array of a published network.

    Attributes:
        function: of a module, as `book.chapter.Run.measure` takes it.
        images: one of IMAGE_SETS.
        keywords: of the function, plain values.
        bare: whether it is asked of networks without registers alone, as what appending tokens to them does.
        half: whether numbers are kept in half precision (3 digits), read as float32: long arrays that are drawn or ranked.
    """

    function: Callable[..., Measured]
    images: str
    keywords: Mapping[str, Any] = field(default_factory=dict)
    half: bool = False
    bare: bool = False


def _tokens(task: str) -> dict[str, Any]:
    """Keywords of `classification.classify` as chapter 6 has them."""
    return {"tasks": [task], "missing": "largest", "seeds": [0, 1, 2], "method": "logistic"}


TRANSFER = {"layer": -1, "final_norm": True, "steps": 400, "bins": 16, "head": "softmax"}  # as chapter 8 has them
CLS = {"queries": ["cls"]}
HEAD = {"classes": list(datasets.IMAGENETTE), "skip": 1000}  # the part that was not trained on, as the head names it
EVERY = {"calibration": 256}  # of COCO's images: the cut-off is that of the fingerprint
ENTRIES: Mapping[str, Entry] = {
    # pictures: photographs
    "norms_on_photographs": Entry(capture.norms, "photographs", half=True),
    "cls_attention_on_photographs": Entry(capture.attention, "photographs", CLS, half=True),
    "components_on_photographs": Entry(pca.of_patches, "photographs", half=True),
    "maps_on_photographs": Entry(object_attention.attention_maps, "photographs", half=True),
    "lost_on_photographs": Entry(lost.evaluate, "photographs", {"shown": 12}),
    "neuron_maps_on_photographs": Entry(
        neurons.maps, "photographs", {"shown": 7, "pixels": False}, half=True, bare=True
    ),
    "doses_on_photographs": Entry(remedies.pictures_by_dose, "photographs", {"count": 7}, bare=True),
    "interventions_on_photographs": Entry(remedies.pictures_by_change, "photographs", {"count": 7}, bare=True),
    # tables and histograms: COCO
    "background": Entry(object_attention.background_shares, "coco", half=True),
    "norms": Entry(capture.norms, "coco", half=True),
    "register_means": Entry(capture.register_means, "coco"),
    "similarity": Entry(norms.neighbour_similarity, "coco", half=True),
    "cls_attention": Entry(capture.attention, "coco", CLS, half=True),
    "peak": Entry(attention.peaks, "coco"),
    "received": Entry(capture.attention_received, "coco", half=True),
    "maps": Entry(object_attention.attention_maps, "coco", half=True),
    "things": Entry(object_attention.of_network, "coco"),
    "lengths": Entry(lost.projection_norms, "coco"),
    "lost": Entry(lost.evaluate, "coco"),
    "corloc": Entry(lost.by_setting, "coco"),
    "components": Entry(pca.of_patches, "coco", half=True),
    "local": Entry(local.probe, "coco"),
    "transfer": Entry(transfer.measure, "coco", TRANSFER),
    # the artifact, its neurons, and what is done about it
    "fingerprint": Entry(diagnose.fingerprints, "coco"),
    "neurons": Entry(neurons.of_network, "coco", EVERY, bare=True),
    "suppression": Entry(neurons.dose, "coco", {"counts": [0, 1, 4, 16, 64], **EVERY}, bare=True),
    "interventions": Entry(remedies.interventions, "coco", bare=True),
    "artifact_by_dose": Entry(remedies.artifact_by_dose, "coco", bare=True),
    "lost_by_dose": Entry(remedies.lost_by_dose, "coco", bare=True),
    "segments_by_dose": Entry(probes_of_remedies.segments_by_dose, "coco", bare=True),
    "behaviour": Entry(behaviour.interventions, "coco", {"first": 128}, bare=True),
    "behaviour_resolutions": Entry(behaviour.resolutions, "coco", {"first": 64}, bare=True),
    "behaviour_cosines": Entry(behaviour.cosines, "coco", {"first": 128}, bare=True),
    "interventions_on_imagenette": Entry(remedies.interventions, "imagenette", HEAD, bare=True),
    "answers_by_dose": Entry(remedies.answers_by_dose, "imagenette", HEAD, bare=True),
    # what tokens know of the whole image
    "transfer_on_imagenette": Entry(transfer.measure, "imagenette", TRANSFER),
    "tokens_on_imagenette": Entry(classification.classify, "imagenette", _tokens("Imagenette")),
    "tokens_on_tiny_imagenet": Entry(classification.classify, "tiny-imagenet", _tokens("Tiny-ImageNet")),
    "tokens_on_cifar10": Entry(classification.classify, "cifar10", _tokens("CIFAR-10")),
}


def entry(name: str) -> Entry:
    """Find a row of the table: name → Entry. Raises InputError for a name that is not in it."""
    if name not in ENTRIES:
        raise unknown("array of published networks", name, ENTRIES)
    return ENTRIES[name]


def _request(name: str, network: str) -> dict[str, Any]:
    """What an array is, whatever weights and images it was measured with: plain values, part of its key."""
    asked = entry(name)
    return {
        "what": name,
        "network": network,
        "function": f"{asked.function.__module__}.{asked.function.__qualname__}",
        "keywords": dict(asked.keywords),
        "set": asked.images,
    }


# --- measuring
def open_set(name: str, backbone: Backbone, place: str) -> Images:
    """Open an image set for a network.

    Args:
        name: one of IMAGE_SETS.
        backbone: decides size and preparation.
        place: a folder of parquet files; not looked at for photographs.

    Returns:
        The images, the training part first.

    Raises:
        InputError: for unknown sets, and folders that do not exist or lack a part.
    """
    if name not in IMAGE_SETS:
        raise unknown("image set", name, IMAGE_SETS)
    if name != HERE and not Path(place).expanduser().is_dir():
        raise InputError(f"no folder {place} with {name}")
    return IMAGE_SETS[name](backbone, place)


def measure(name: str, backbone: Backbone, source: Images, *, folder: Path = FOLDER) -> Measured:
    """Measure one array of a published network, or reload it.

    It is reloaded only if function, keywords, code, weights and images are the same, as `cache.stored` decides.

    Args:
        name: a row of ENTRIES.
        backbone: a network.
        source: its image set, of `open_set`.
        folder: holds a folder for each network.

    Returns:
        What the function of the row gives; half precision is widened to float32.

    Raises:
        InputError: as the function does, and for a folder that cannot be written.
    """
    asked = entry(name)
    key = {**_request(name, backbone.name), "weights": backbone.weights, **source.key}

    def compute() -> xr.Dataset:
        found = asked.function(backbone, source, **asked.keywords)
        data = found.to_dataset(name="value") if isinstance(found, xr.DataArray) else found
        return data.map(_narrow, keep_attrs=True) if asked.half else data

    code = cache.code_hash(asked.function.__module__)
    return _widen(cache.stored(path(backbone.name, name, folder), compute, key=key, code=code))


def _narrow(values: xr.DataArray) -> xr.DataArray:
    """Half precision, where the numbers fit into it."""
    fits = values.dtype.kind == "f" and not (abs(values) > LARGEST).any()
    return values.astype(np.float16) if fits else values


def _widen(data: xr.Dataset) -> Measured:
    """What a stored array holds, as its function gave it: squares of half precision overflow at 256."""
    for name, values in data.data_vars.items():
        if values.dtype == np.float16:
            data[name] = values.astype(np.float32)
    return data["value"] if set(data.data_vars) == {"value"} else data


def measure_all(
    backbone: Backbone, places: Mapping[str, str], *, only: Sequence[str] = (), folder: Path = FOLDER
) -> Iterator[tuple[str, Path]]:
    """Measure everything in the table whose images are at hand.

    Args:
        backbone: a network.
        places: {image set: its folder}; photographs are always at hand.
        only: rows of ENTRIES, empty for all.
        folder: holds a folder for each network.

    Yields:
        Name and file of each array, when it is there.

    Raises:
        InputError: for unknown names, rows whose images are not given or that this network cannot be asked, and arrays of
            other weights in the network's folder.
    """
    places = {HERE: "", **places}
    sources = {name: open_set(name, backbone, place) for name, place in places.items() if name != HERE or not only}
    for name in only:
        if entry(name).images == HERE:
            sources[HERE] = open_set(HERE, backbone, "")
        elif entry(name).images not in sources:
            raise InputError(f"{name} is measured on {entry(name).images}: give its folder")
    if backbone.registers and (bare := [name for name in only if entry(name).bare]):
        raise InputError(
            f"{bare[0]} is measured on networks without registers: {backbone.name} has {backbone.registers}"
        )
    for file in sorted((folder / backbone.name).glob("*.nc")):
        try:
            found = _key(cache.load_dataset(file)).get("weights")
        except InputError:  # a broken file is measured anew when its turn comes
            continue
        if found != backbone.weights:
            raise InputError(
                f"{file} was measured with other weights ({str(found)[:12]}, these are {backbone.weights[:12]}): "
                "delete it, or choose another folder"
            )
    for name in only or ENTRIES:
        if entry(name).images in sources and not (entry(name).bare and backbone.registers):
            measure(name, backbone, sources[entry(name).images], folder=folder)
            yield name, path(backbone.name, name, folder)


def places(words: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """Read where weights and images lie: words NAME=PLACE, as "weights=FILE" and "coco=FOLDER" → weights (None: the hub's),
    {image set: folder}. Raises InputError for other words and unknown names."""
    found: dict[str, str] = {}
    for word in words:
        name, _, place = word.partition("=")
        if not place:
            raise InputError(
                f"{word!r} names no place: give weights=FILE, and a folder for an image set, as coco=FOLDER"
            )
        if name not in (known := ("weights", *(n for n in IMAGE_SETS if n != HERE))):
            raise unknown("image set", name, known)
        found[name] = place
    return found.pop("weights", None), found


# --- reading
def path(network: str, name: str, folder: Path = FOLDER) -> Path:
    """Where an array lies: network, row of ENTRIES, folder of all networks → file."""
    return folder / network / f"{name}.nc"


def origin(network: str, folder: Path = FOLDER) -> str:
    """Say where a network's arrays come from: network, folder of all networks → weights, commits and versions of torch."""
    kept = [cache.load_dataset(file) for file in sorted((folder / network).glob("*.nc"))]
    facts = {
        "weights": {str(_key(data).get("weights"))[:16] for data in kept},
        "commit": {str(data.attrs.get("commit")) for data in kept},
        "torch": {str(data.attrs.get("torch")) for data in kept},
    }
    return "; ".join(f"{name} {', '.join(sorted(values))}" for name, values in facts.items() if values) or "none"


def _key(data: xr.Dataset) -> dict[str, Any]:
    """What a stored data set depends on; empty where it does not say so."""
    try:
        return {**json.loads(data.attrs["key"])}
    except (KeyError, ValueError, TypeError):
        return {}


def read(network: str, name: str, *, weights: str | None = None, folder: Path = FOLDER) -> Measured:
    """Read what was measured on a published network: neither weights nor images are needed.

    Args:
        network: a name as `registry.load` takes it.
        name: a row of ENTRIES.
        weights: SHA-256 of the weights it must have been measured with, None for any.
        folder: holds a folder for each network.

    Returns:
        What the function of the row gave, with the provenance in the attributes of its data set.

    Raises:
        InputError: for a missing file, one of other weights, and one that another table than today's asked for.

    Example:
        ``networks.read("deit_tiny_patch16_224", "norms")``
    """
    asked, file = _request(name, network), path(network, name, folder)
    option = "" if asked["set"] == HERE else f" --{asked['set']} FOLDER"
    again = f"vitregs measure {network} --only {name}{option}"
    if not file.is_file():
        raise InputError(f"nothing stored of {name} of {network} in {folder}: measure it with {again}")
    data = cache.load_dataset(file)
    key = _key(data)
    if differs := [k for k, v in asked.items() if key.get(k) != v]:
        raise InputError(f"{file} was measured with another {' and '.join(differs)} than today's: {again}")
    if weights is not None and key.get("weights") != weights:
        raise InputError(f"{file} was measured with other weights than these ({weights[:12]}): {again}")
    return _widen(data)
