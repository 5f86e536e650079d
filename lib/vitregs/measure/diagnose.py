"""Does my ViT have artifacts? Evidence at every layer, the fingerprint, and a verdict that can be "none" or "content"."""

import re
import textwrap
import warnings
from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from torch import Tensor

from vitregs import arrays
from vitregs.errors import InputError
from vitregs.measure import fingerprint, neurons, outliers
from vitregs.measure.fingerprint import Fingerprint
from vitregs.models import capture
from vitregs.models.backbone import Backbone

_SHOWN = 2  # images in the plot, of the first
_FIRST = 16  # that are kept until it is known which of their patches are marked
_EXACT = "exact"
_RULE = "two modes in log norm"
_NAMED = 60  # register neurons, at most
SEARCHED = 256  # images that register neurons are looked for in, at most


@dataclass(repr=False)
class Diagnosis:
    """What `diagnose` found in one model on some images; it shows itself in a terminal and in a notebook.

    Attributes:
        model: Its name.
        weights: Where they come from, in words.
        images: Their source.
        image_count: How many were measured.
        size: (height, width) of an image in pixels.
        fingerprint: The verdict, its layer, and the parts of the evidence.
        rule: What decided on a cut-off, in words.
        layers: A row for each layer, as `facts` describes it.
        skipped: Names of images that could not be decoded.
        searched: What `neurons.search` found, None where neurons were not looked for.
        norms: [image, layer, token], L2 over channels.
        shown: Images of the plot, (n, height, width, 3) in [0, 1]: of the first, those with most marked patches.
        shown_at: Their positions among all.
        attention: What marked and other patches receive on average, in fair shares [query ("all", "cls"), which
            ("marked", "others"), block]; None where no patch is marked.
        sinks: How attention sinks were measured, and what could not be, in words.
        notes: What was done to the model on the way from its file, a sentence each.
    """

    model: str
    weights: str
    images: str
    image_count: int
    size: tuple[int, int]
    fingerprint: Fingerprint
    rule: str
    layers: pd.DataFrame
    skipped: list[str] = field(default_factory=list)
    searched: xr.Dataset | None = None
    norms: xr.DataArray | None = None
    shown: np.ndarray | None = None
    shown_at: list[int] = field(default_factory=list)
    attention: xr.DataArray | None = None
    sinks: str = _EXACT
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        """ "artifacts", "content", "none" or "inconclusive"."""
        return self.fingerprint.verdict

    @property
    def layer(self) -> int:
        """The layer with the strongest mode."""
        return self.fingerprint.layer

    @property
    def evidence(self) -> str:
        """Why, in words."""
        return self.fingerprint.sentence

    @property
    def marked(self) -> xr.DataArray | None:
        """Which patches are marked at the deciding layer [image, token], None without a mode."""
        best = fingerprint.strongest_mode(self.layers)
        if best is None or self.norms is None:
            return None
        found: xr.DataArray = arrays.patches(self.norms.sel(layer=self.layer)).transpose("image", "token") > best.cutoff
        return found

    def __repr__(self) -> str:
        """The report, as a terminal shows it."""
        return self.text()

    def _repr_html_(self) -> str:
        """The report, as a notebook shows it: verdict, evidence, and a table of layers to unfold."""
        below = "<br>".join(escape(line) for line in self._legend())
        return (
            f"<p><strong>{escape(self.fingerprint.word)}</strong> (layer {self.layer}): {escape(self.evidence)}</p>"
            f"<p>{escape(self._head())}</p>"
            f"<table>{self._parts_html()}</table>"
            f"<details><summary>Every layer</summary>{self._table().to_html(index=False, border=0)}"
            f"<p><small>{below}</small></p></details>"
        )

    def facts(self) -> dict[str, Any]:
        """Give everything but arrays, as plain values for JSON.

        Returns:
            The fields of this object by name; `layers` as a list with a dictionary for each layer, which holds the median
            norm; largest and top1, ratios to the median; cutoff, share, separation and ratio of the second mode; sink and
            sink_error in fair shares. None stands where a value is not known.
        """
        left_out = ("layers", "norms", "shown", "shown_at", "attention", "searched", "fingerprint")
        plain = {k: v for k, v in asdict(self).items() if k not in left_out}
        rows = self.layers.astype(object).where(np.isfinite(self.layers), None)
        words = {"verdict": self.verdict, "layer": self.layer, "evidence": self.evidence}
        return plain | words | {"fingerprint": self.fingerprint.facts(), "layers": rows.to_dict("records")}

    def _parts(self) -> list[tuple[str, str, str]]:
        """Name, answer and sentence of each part that was asked."""
        return [(p.name, p.answer, p.sentence) for p in self.fingerprint.parts.values()]

    def _parts_html(self) -> str:
        return "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in self._parts())

    def _neurons(self) -> list[str]:
        """The register neurons in a line, or in which blocks they are where there are many."""
        number = sum(map(len, self.fingerprint.neurons.values()))
        if number > _NAMED:
            return [f"register neurons  {number} in blocks {', '.join(map(str, self.fingerprint.neurons))}"]
        named = [f"{b}:{', '.join(map(str, numbers))}" for b, numbers in self.fingerprint.neurons.items()]
        return [f"register neurons (block:numbers)  {'; '.join(named)}"] if named else []

    def _table(self) -> pd.DataFrame:
        """The table of layers in words, since pandas writes NaN without asking a formatter."""
        beyond = "2nd mode %" if self.rule == _RULE else "above %"
        shown = (
            self.layers.assign(share=100 * self.layers["share"])
            .drop(columns="sink_error")
            .rename(
                columns={
                    "median": "median norm",
                    "largest": "largest/median",
                    "top1": "top 1%/median",
                    "cutoff": "cut-off",
                    "share": beyond,
                    "ratio": "its ratio",
                }
            )
        )
        words = {
            "median norm": "{:.1f}".format,
            "largest/median": "{:.2f}".format,
            "top 1%/median": "{:.2f}".format,
            "cut-off": lambda v: "none" if np.isnan(v) else f"{v:.1f}",
            beyond: lambda v: "-" if not v else f"{v:.2f}",
            "its ratio": lambda v: "-" if not v else f"{v:.1f}",
            "separation": lambda v: "-" if not v else f"{v:.1f}",
            "sink": lambda v: "-" if np.isnan(v) else f"{v:.1f}x",
        }
        return shown.assign(**{k: shown[k].map(f) for k, f in words.items()})

    def _head(self) -> str:
        size = f"{self.size[0]}x{self.size[1]}"
        return f"{self.model} ({self.weights}) on {self.image_count} images of {self.images} at {size}"

    def _legend(self) -> list[str]:
        return [
            "layer 0 enters block 1, the last layer is before the final norm; norms are L2 over channels, patch tokens only; "
            "largest and top 1 % are medians over images; sink: share of attention on the most-attended patch, "
            f"1x is fair; cut-off: {self.rule}",
            *(f"note: {note}" for note in self.notes),
            *([] if self.sinks == _EXACT else [self._of_sinks()]),
        ]

    def text(self) -> str:
        """Write the report for a person, as `vitregs diagnose` prints it.

        Returns:
            Lines of text with a table of layers, what its columns mean, and the verdict.
        """
        table, legend = self._table().to_string(index=False), "\n".join(_fill(line) for line in self._legend())
        parts = [_fill(f"{name:<10} {answer:<13}{said}", 24) for name, answer, said in self._parts()]
        parts += [_fill(line, 24) for line in self._neurons()]
        verdict = f"verdict: {self.fingerprint.word} (layer {self.layer}): {self.evidence}"
        return "\n\n".join([self._head(), table, legend, "\n".join(parts), _fill(verdict)])

    def _of_sinks(self) -> str:
        """How the sinks were measured, with the largest error in the table."""
        error = self.layers["sink_error"].max()
        return f"attention sink: {self.sinks}" + (
            "" if np.isnan(error) else f" (standard error at most {error:.2g}x; weak sinks read low)"
        )


def _fill(line: str, indent: int = 0) -> str:
    """Break a line, but neither within an interval nor between a number and its unit."""
    whole = re.sub(r"(\[[^][]*,) ", "\\1\xa0", line)
    whole = re.sub(r"(?<=\d) (?=[%x]( |$))", "\xa0", whole)
    return textwrap.fill(whole, 100, subsequent_indent=" " * indent, break_on_hyphens=False).replace("\xa0", " ")


@dataclass
class _Seen:
    """What the first pass gives, labelled, and the first images."""

    whole: xr.Dataset
    first: np.ndarray


def _look(backbone: Backbone, images: Any, queries: int | None, how: dict[str, Any]) -> _Seen:
    """Read the images once: norms, patch embeddings, attention received and that of CLS at every layer."""
    first: list[np.ndarray] = []
    parts: list[xr.Dataset] = []
    what: dict[str, Any] = {"norms": True, "received": True, "embeddings": True, "queries": queries, "partial": True}
    if backbone.has_cls:
        what |= {"attention": ["cls"], "attention_layers": range(1, backbone.depth + 1)}
    for part, seen in capture.stream(backbone, images, kinds="patch", **what, **how):
        if "attention" in seen:
            seen["attention"] = seen["attention"].mean("head").isel(query=0)
        if (left := _FIRST - sum(map(len, first))) > 0:
            first.append(part.pixels[:left].permute(0, 2, 3, 1).cpu().numpy().copy())
        parts.append(seen.drop_vars("received_error", errors="ignore"))
    return _Seen(capture.join(parts), np.concatenate(first))


def _received(backbone: Backbone, seen: _Seen, marked: np.ndarray) -> xr.DataArray:
    """What marked and other patches receive of all queries and of CLS: → fair shares [query, which, block]."""
    whole, rows = seen.whole, {}
    rows["all"] = whole["received"].transpose("image", "received_layer", "token").values
    if "attention" in whole:
        tokens = backbone.prefix + marked.shape[1]
        rows["cls"] = whole["attention"].transpose("image", "attention_layer", "token").values * tokens
    means = [
        [(values * which[:, None]).sum((0, 2)) / max(1, which.sum()) for which in (marked, ~marked)]
        for values in rows.values()
    ]
    coords = {"query": list(rows), "which": ["marked", "others"], "block": whole["received_layer"].values}
    return xr.DataArray(np.asarray(means), coords, ("query", "which", "block"))


def _judge(
    backbone: Backbone,
    images: Any,
    seen: _Seen,
    layers: pd.DataFrame,
    cut: float | None,
    quick: bool,
    how: dict[str, Any],
) -> tuple[Fingerprint, xr.Dataset | None]:
    """Ask the five questions: what the first pass gave, its layers → fingerprint, what was found of the neurons."""
    norms = seen.whole["norms"].drop_vars("token")
    parts = {"mode": fingerprint.mode(norms, layers, cut)}
    best = fingerprint.strongest_mode(layers)
    deep = layers[layers.layer > 0]
    layer = int((deep.loc[deep.largest.idxmax()] if best is None else best).layer)
    found: xr.Dataset | None = None
    chosen: dict[int, list[int]] = {}
    if best is not None:
        marked = norms.sel(layer=layer).transpose("image", "token").values > best.cutoff
        cls = None
        if "attention" in seen.whole:
            tokens = backbone.prefix + marked.shape[1]
            cls = seen.whole["attention"] * tokens  # in fair shares
        masks = None if isinstance(images, Tensor) else images.background(backbone.grid(images.size))
        parts["place"] = fingerprint.place(seen.whole["embeddings"], marked, masks)
        parts["attention"] = fingerprint.attention(seen.whole["received"], cls, marked)
        if quick:
            parts |= {n: fingerprint.Part(n, "not measured", "left out (quick)") for n in ("neurons", "cause")}
        else:
            found, chosen = _mechanism(backbone, images, float(best.cutoff), layer, parts, how)
    verdict, why = fingerprint.judge(parts)
    return Fingerprint(verdict, layer, parts["mode"].value, why, parts, chosen), found


def _mechanism(
    backbone: Backbone, images: Any, cutoff: float, layer: int, parts: dict[str, fingerprint.Part], how: dict[str, Any]
) -> tuple[xr.Dataset | None, dict[int, list[int]]]:
    """Look for the neurons behind the mode, and suppress them."""
    some = images[:SEARCHED] if isinstance(images, Tensor) else images.first(SEARCHED)
    same: dict[str, Any] = {"cutoff": cutoff, "layer": layer, "batch": how["batch"], "precision": how["precision"]}
    try:
        found = neurons.search(backbone, some, **same)
    except InputError as problem:
        if "out of memory" in str(problem):
            raise
        for name in ("neurons", "cause"):
            parts[name] = fingerprint.Part(name, "not measured", str(problem))
        return None, {}
    parts["neurons"] = fingerprint.neurons(found)
    order, counts = fingerprint.suppressed_order(found)
    if not order:
        parts["cause"] = fingerprint.Part("cause", "not measured", "there are no register neurons to suppress")
        return found, {}
    left = neurons.suppression(backbone, some, neurons=order, counts=counts, **same)
    parts["cause"] = fingerprint.cause(left)
    return found, neurons.by_block(order)


def fingerprints(backbone: Backbone, images: Any, *, quick: bool = False, batch: int = 16) -> xr.Dataset:
    """The fingerprint of a network as a Dataset that can be stored.

    Args:
        backbone: The network.
        images: As `diagnose` takes them.
        quick: Whether neurons and cause are left out.
        batch: Images at a time.

    Returns:
        value, low, high and control of every part; verdict, strength, layer and sentences as attributes.

    Raises:
        InputError: As `diagnose` does.
    """
    found = diagnose(backbone, images, quick=quick, batch=batch, progress=False).fingerprint.dataset()
    return found.assign_coords(model=backbone.name)


def diagnose(
    backbone: Backbone,
    images: Any,
    *,
    cut: float | None = None,
    quick: bool = False,
    queries: int | None = capture.QUERIES,
    batch: int = 16,
    precision: str = "float32",
    progress: bool | None = None,
) -> Diagnosis:
    """Look for artifacts: norms, place and attention from one forward pass, then neurons and cause where there is a mode.

    The layer with the strongest mode decides, since in small ViTs middle blocks show what the last one hides. Neurons take
    another pass and cause three more, over SEARCHED images at most; networks without a mode take one. The attention sink of a
    layer is the mean over images of `sink` of `capture`; where the attention of a block cannot be watched, it is nan and the
    report says why.

    Args:
        backbone: The network.
        images: Open images, pixels (n, 3, height, width) in [0, 1], a folder or a data set's name, or a list of PIL images.
        cut: A fixed cut-off on norms instead of the statistical rule: the other parts are asked of the patches above it, but
            whether these are a mode stays open, and with it the verdict.
        quick: Whether neurons and cause are left out.
        queries: Random queries of each image that attention sinks are estimated from; None for all, which takes several
            times as long.
        batch: Images at a time.
        precision: Of the forward pass, as in `capture`.
        progress: Whether to show a bar with images per second; None: if standard error is a terminal.

    Returns:
        Verdict, evidence and a table of layers; it shows itself in a notebook.

    Raises:
        InputError: For too few images, a cut-off that is not positive, broken weights, and too little memory.

    Example:
        >>> import vitregs as vr
        >>> vit = vr.load("supervised-pico")
        >>> vr.diagnose(vit, vr.open_images("scenes", size=vit.size, count=16)).verdict
        'content'
    """
    images = capture.opened(backbone, images)
    pixels = isinstance(images, Tensor)
    how: dict[str, Any] = {"batch": batch, "precision": precision, "progress": progress}
    seen = _look(backbone, images, queries, how)
    norms = seen.whole["norms"].drop_vars("token").rename("norm")
    layers = outliers.layer_evidence(norms, cut)
    layers["sink"] = [
        np.nan,
        *seen.whole["sink"].mean("image").values,
    ]  # of the block that reads this state's predecessor
    layers["sink_error"] = np.nan
    if "sink_error" in seen.whole:  # of a mean over images
        error = np.sqrt((seen.whole["sink_error"].values ** 2).sum(0)) / seen.whole.sizes["image"]
        layers.loc[1:, "sink_error"] = error
    skipped = [] if pixels else list(images.skipped)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", r"(skipped \d+ of )?(\d+ of )?(the )?(\d+ )?images of "
        )  # the first pass has said it
        verdict, found = _judge(backbone, images, seen, layers, cut, quick, how)
    unwatched = seen.whole.attrs.get("unwatched")
    result = Diagnosis(
        backbone.name,
        backbone.source,
        "a tensor" if pixels else images.name,
        int(norms.sizes["image"]),
        tuple(images.shape[-2:]) if pixels else images.size,
        verdict,
        _RULE if cut is None else f"fixed at {cut:g}",
        layers,
        skipped,
        found,
        norms,
        sinks=seen.whole.attrs["received"]
        + (f"; unknown where it cannot be watched: {unwatched}" if unwatched else ""),
        notes=backbone.notes,
    )
    marked = result.marked
    number = np.zeros(len(seen.first)) if marked is None else marked.values[: len(seen.first)].sum(1)
    result.shown_at = sorted(np.argsort(-number, kind="stable")[:_SHOWN].tolist())
    result.shown = seen.first[result.shown_at]
    if marked is not None:
        result.attention = _received(backbone, seen, marked.values)
    return result
