"""A chapter at work: its models, its images, its stored measurements, its provenance."""

import ast
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from vitregs import cache, paths
from vitregs.book.parameters import changed, chapter_parameters, check
from vitregs.claims import networks, scoreboard
from vitregs.data import images, scenes
from vitregs.data.images import Images
from vitregs.errors import InputError, unknown
from vitregs.models import registry
from vitregs.models.backbone import Backbone


def _check_injected(chapter: str) -> None:
    """Raise InputError for a parameter that papermill put into this notebook and no cell reads: it only warns of it."""
    cells = getattr(sys.modules["__main__"], "In", [])  # the cells that have run here, in a kernel
    injected = [cell for cell in cells if cell.startswith("# Parameters\n")]
    known = chapter_parameters(chapter)
    for line in ast.parse(injected[-1]).body if injected else []:
        for target in line.targets if isinstance(line, ast.Assign) else []:
            if isinstance(target, ast.Name) and target.id not in known:
                raise unknown(f"parameter of {chapter}", target.id, known)


Measured = xr.DataArray | xr.Dataset


def _kept(measure: Callable[[], Measured], backbone: Backbone, source: Images) -> xr.Dataset:
    """What was measured, with the truth of its patches (share of background) beside it where there are masks."""
    found = measure()
    if isinstance(found, xr.Dataset):
        return found
    data = found.to_dataset(name="value")
    if {"image", "token"} <= set(found.dims):
        background = source.background(backbone.grid(source.size))
        # some chapters keep the first images alone
        if background is not None and len(background) == found.sizes["image"]:
            data["background"] = (("image", "patch"), background.astype(np.float32))
    return data


def _check_function(function: Callable[..., Any], keywords: Mapping[str, Any]) -> None:
    """Raise InputError unless the name of a function and its keywords say all that it does: no lambda, closure or partial."""
    name, module = str(getattr(function, "__qualname__", "")), str(getattr(function, "__module__", ""))
    if not inspect.isfunction(function):
        what = name or type(function).__name__
        raise InputError(
            f"measure takes a function of a module, not {what}: pass what it is bound to as keywords of measure"
        )
    if module == "__main__" or getattr(sys.modules.get(module), name, None) is not function:
        raise InputError(
            f"measure takes a function of a module, not {name.split('.')[-1]}, which other values can change unseen: "
            "put it into a file of the library, and pass what varies as keywords of measure"
        )
    for word, value in keywords.items():
        if not _plain(value):
            kinds = "text, numbers, true or false, None, and lists and dictionaries of these"
            raise InputError(
                f"{word} of {name} must be plain, so that results can be kept by it ({kinds}), not {value!r}"
            )
    try:
        inspect.signature(function).bind(None, None, **keywords)
    except TypeError as error:
        raise InputError(f"{name} of {module}: {error}") from None


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value) and all(map(_plain, value.values()))
    return value is None or isinstance(value, str | int | float)


class Run:
    """A chapter at work: its checked parameters, its models and images, and its stored measurements."""

    def __init__(self, chapter: str, **values: Any) -> None:
        _check_injected(chapter)
        self.chapter = chapter
        self.values = check(chapter, values)
        self._tell_differences()
        self.folder = Path(os.environ.get("VITREGS_RESULTS") or paths.BUILD / "results") / chapter

    @cached_property
    def backbones(self) -> dict[str, Backbone]:
        """The models of the chapter, loaded, by the names given for them."""
        files = self.values.get("weights") or [""] * len(self.values["models"])
        device = self.values.get("device", "auto")
        return {
            name: registry.load(name, weights=file or None, device=device)
            for name, file in zip(self.values["models"], files, strict=True)
        }

    def images(self, backbone: Backbone) -> Images:
        """The images of the chapter at the size asked for (0: the model's own): backbone → Images."""
        side = self.values.get("size", 0)
        size = (side, side) if side else backbone.size
        backbone.grid(size)
        return images.open_images(
            self.values["images"],
            size=size,
            count=self.values["count"],
            seed=self.values["seed"],
            preparation=backbone.preparation,
        )

    def _tell_differences(self) -> None:
        """Show in a notebook which parameters make this run another one than the book's; nothing if none do."""
        differs = changed(self.chapter, self.values)
        shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
        if differs and shell:
            names = ", ".join(f"`{name}`" for name in differs)
            text = f"**Not the run of the book**: it differs in {names}. What the text says of results is not about this run."
            sys.modules["IPython"].display.display({"text/markdown": text, "text/plain": text}, raw=True)

    def measure(self, name: str, function: Callable[..., Measured], /, **keywords: Any) -> dict[str, Any]:
        """Measure every model on the chapter's images, or reload what was measured.

        A stored array is used only for the same function and keywords, the same code (`cache.code_hash` of the function's
        module), weights and images. Versions of torch and timm do not count; they stand in the array's attributes.

        Args:
            name: of the file.
            function: of a module, so that its name says what it does: takes a Backbone, Images and the keywords, gives a
                DataArray or a Dataset.
            keywords: everything else that it depends on, as plain values.

        Returns:
            What the function gives, by the name of the model.

        Raises:
            InputError: for lambdas, functions of the notebook, bound functions, keywords that are not plain or do not fit.

        Example:
            ``run.measure("norms", capture.norms, layers=[3])``
        """
        _check_function(function, keywords)
        code = cache.code_hash(function.__module__)
        request = {"what": name, "function": function.__qualname__, "keywords": keywords}
        found = {}
        for model, backbone in self.backbones.items():
            source = self.images(backbone)
            key = {**request, "weights": backbone.weights, **source.key}
            compute = partial(_kept, partial(function, backbone, source, **keywords), backbone, source)
            path = self.folder / f"{name}.{backbone.name}.nc"
            data = cache.stored(path, compute, key=key, code=code)
            found[model] = data["value"] if set(data.data_vars) <= {"value", "background"} else data
        return found

    @cached_property
    def _anew(self) -> dict[str, Backbone]:
        """The published networks that are measured anew, loaded; empty where the parameter `afresh` is."""
        weights, _ = networks.places(self.values["afresh"])
        device = self.values.get("device", "auto")
        if not self.values["afresh"]:
            return {}
        return {name: registry.load(name, weights=weights, device=device) for name in self.values["published"]}

    def photographs(self, count: int) -> np.ndarray:
        """The first photographs as the chapter's first published network sees them, to draw: → (count, H, W, 3) in [0, 1]."""
        return networks.photographs(self.values["published"][0], count)

    def published(self, name: str, *, of: Sequence[str] | None = None) -> dict[str, Any]:
        """What was measured on the chapter's published networks (its parameter `published`), drawn without weights or images.

        Where the parameter `afresh` tells where weights and images lie, the same is measured anew with them, and kept beside
        the chapter's other results; what its image sets do not cover is read, if it was measured with these weights.

        Args:
            name: a row of `networks.ENTRIES`.
            of: some of the chapter's published networks, None for all.

        Returns:
            What the function of that row gives, by the name of the network.

        Raises:
            InputError: as `networks.read` and `networks.measure` do.

        Example:
            ``run.published("norms")``
        """
        where = networks.entry(name).images
        given = {networks.HERE: "", **networks.places(self.values["afresh"])[1]}
        found = {}
        for network in self.values["published"] if of is None else of:
            backbone = self._anew.get(network)
            if backbone is None or where not in given:
                found[network] = networks.read(network, name, weights=backbone.weights if backbone else None)
                continue
            source = networks.open_set(where, backbone, given[where])
            found[network] = networks.measure(name, backbone, source, folder=self.folder.parent / "published")
        return found

    def preview(self, backbone: Backbone, count: int) -> np.ndarray:
        """The first images of the chapter, to draw: → (count, H, W, 3) in [0, 1]."""
        first = next(self.images(backbone).pixels(count))
        return first.permute(0, 2, 3, 1).numpy()

    def background(self, backbone: Backbone) -> np.ndarray | None:
        """Share of background (mask 0) in every patch: → (images, patches) in [0, 1], or None without masks."""
        source = self.images(backbone)
        return source.background(backbone.grid(source.size))

    def colours(self, backbone: Backbone) -> np.ndarray | None:
        """Colour of the object that fills most of each patch: → (images, patches) index into scenes.COLOUR_NAMES, -1 for
        background, or None where the images are no scenes."""
        source = self.images(backbone)
        rows, columns = backbone.grid(source.size)
        height, width = backbone.patch_size
        found = []
        for batch in source.batches():
            if batch.truth is None:
                return None
            ranks = batch.truth.instances.numpy()
            cut = ranks.reshape(len(ranks), rows, height, columns, width)
            count = np.stack([(cut == k).sum((2, 4)) for k in range(scenes.MOST_OBJECTS + 1)], -1)
            which = count.reshape(len(ranks), rows * columns, -1).argmax(-1)
            colour = np.pad(batch.truth.objects[..., 1].numpy(), ((0, 0), (1, 0)), constant_values=-1)
            found.append(np.take_along_axis(colour, which, 1))
        return np.concatenate(found)

    def results(self) -> scoreboard.Box:
        """The claims of this chapter with their verdicts, in the words of the scoreboard.

        They come from the book's stored results (`data/results`), never from what this run measures, so that the chapter and
        the scoreboard cannot differ; a run with other parameters says so. `vitregs scoreboard --boxes` brings the boxes of
        chapters that are executed already up to date.
        """
        return scoreboard.box(self.chapter, differs=tuple(changed(self.chapter, self.values)))

    def provenance(self) -> "Provenance":
        """Where this page's numbers come from, as a fold-out."""
        facts = cache.provenance(**{f"parameter {k}": v for k, v in self.values.items()})
        if "models" in self.values:
            facts |= {f"weights of {n}": f"{b.source}, {b.weights[:16]}" for n, b in self.backbones.items()}
            facts["device"] = str(next(iter(self.backbones.values())).device)
        for name in self.values.get("published", []):
            backbone = self._anew.get(name)
            told = f"{backbone.source}, {backbone.weights[:16]}" if backbone else networks.origin(name)
            facts[f"published network {name}"] = told
        return Provenance(facts)


@dataclass(frozen=True)
class Provenance:
    """A table of facts that a notebook shows as a fold-out."""

    facts: Mapping[str, str]

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in self.facts.items())
        return f'<details class="provenance"><summary>Where these numbers come from</summary><table>{rows}</table></details>'

    def __repr__(self) -> str:
        return "\n".join(f"{k}: {v}" for k, v in self.facts.items())
