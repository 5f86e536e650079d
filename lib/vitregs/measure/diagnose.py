"""Does my ViT have artifacts? Evidence at every layer, and a verdict that can be "none" or "inconclusive"."""

from dataclasses import asdict, dataclass, field
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from torch import Tensor

from vitregs import arrays
from vitregs.measure import outliers
from vitregs.models import capture
from vitregs.models.backbone import Backbone

_SHOWN = 3  # images in the plot
_EXACT = "exact"


@dataclass(repr=False)
class Diagnosis:
    """What `diagnose` found in one model on some images; it shows itself in a terminal and in a notebook.

    Attributes:
        model: Its name.
        weights: Where they come from, in words.
        images: Their source.
        image_count: How many were measured.
        size: (height, width) of an image in pixels.
        verdict: "artifacts", "none" or "inconclusive".
        layer: The layer with the strongest evidence.
        evidence: Why, in words.
        rule: What decided on a cut-off, in words.
        layers: A row for each layer, as `facts` describes it.
        skipped: Names of images that could not be decoded.
        norms: [image, layer, token], L2 over channels.
        shown: The first images, (n, height, width, 3) in [0, 1].
        attention: Their mean CLS attention (n, rows, columns), None without a CLS token.
        sinks: How attention sinks were measured, and what could not be, in words.
        notes: What was done to the model on the way from its file, a sentence each.
    """

    model: str
    weights: str
    images: str
    image_count: int
    size: tuple[int, int]
    verdict: str
    layer: int
    evidence: str
    rule: str
    layers: pd.DataFrame
    skipped: list[str] = field(default_factory=list)
    norms: xr.DataArray | None = None
    shown: np.ndarray | None = None
    attention: np.ndarray | None = None
    sinks: str = _EXACT
    notes: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        """The report, as a terminal shows it."""
        return self.text()

    def _repr_html_(self) -> str:
        """The report, as a notebook shows it: verdict, evidence, and a table of layers to unfold."""
        below = "<br>".join(escape(line) for line in self._legend())
        return (
            f"<p><strong>{escape(self.verdict)}</strong> (layer {self.layer}): {escape(self.evidence)}</p>"
            f"<p>{escape(self._head())}</p>"
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
        plain = {k: v for k, v in asdict(self).items() if k not in ("layers", "norms", "shown", "attention")}
        rows = self.layers.astype(object).where(np.isfinite(self.layers), None)
        return plain | {"layers": rows.to_dict("records")}

    def _table(self) -> pd.DataFrame:
        """The table of layers in words, since pandas writes NaN without asking a formatter."""
        shown = (
            self.layers.assign(share=100 * self.layers["share"])
            .drop(columns="sink_error")
            .rename(
                columns={
                    "median": "median norm",
                    "largest": "largest/median",
                    "top1": "top 1%/median",
                    "cutoff": "cut-off",
                    "share": "second mode %",
                    "ratio": "its ratio",
                    "sink": "attention sink",
                }
            )
        )
        words = {
            "median norm": "{:.1f}".format,
            "largest/median": "{:.2f}".format,
            "top 1%/median": "{:.2f}".format,
            "cut-off": lambda v: "none" if np.isnan(v) else f"{v:.1f}",
            "second mode %": lambda v: "-" if not v else f"{v:.2f}",
            "its ratio": lambda v: "-" if not v else f"{v:.1f}",
            "separation": lambda v: "-" if not v else f"{v:.1f}",
            "attention sink": lambda v: "-" if np.isnan(v) else f"{v:.1f}x",
        }
        return shown.assign(**{k: shown[k].map(f) for k, f in words.items()})

    def _head(self) -> str:
        size = f"{self.size[0]}x{self.size[1]}"
        return f"{self.model} ({self.weights}) on {self.image_count} images of {self.images} at {size}"

    def _legend(self) -> list[str]:
        return [
            "layer 0 enters block 1, the last layer is before the final norm; norms are L2 over channels, patch tokens only;",
            "largest and top 1 % are medians over images; attention sink: share of attention on the most-attended patch,",
            f"1x is fair; cut-off: {self.rule}",
            *(f"note: {note}" for note in self.notes),
            *([] if self.sinks == _EXACT else [self._of_sinks()]),
        ]

    def text(self) -> str:
        """Write the report for a person, as `vitregs diagnose` prints it.

        Returns:
            Lines of text with a table of layers, what its columns mean, and the verdict.
        """
        table, legend = self._table().to_string(index=False), "\n".join(self._legend())
        verdict = f"verdict: {self.verdict} (layer {self.layer}): {self.evidence}"
        return f"{self._head()}\n\n{table}\n\n{legend}\n\n{verdict}"

    def _of_sinks(self) -> str:
        """How the sinks were measured, with the largest error in the table."""
        error = self.layers["sink_error"].max()
        return f"attention sink: {self.sinks}" + (
            "" if np.isnan(error) else f" (standard error at most {error:.2g}x; weak sinks read low)"
        )


def diagnose(
    backbone: Backbone,
    images: Any,
    *,
    cut: float | None = None,
    queries: int | None = capture.QUERIES,
    batch: int = 16,
    precision: str = "float32",
    progress: bool | None = None,
) -> Diagnosis:
    """Look for artifacts, from one reading of the images and one forward pass.

    The layer with the strongest evidence decides, since in small ViTs middle blocks show what the last one hides. The
    attention sink of a layer is the mean over images of `sink` of `capture`; where the attention of a block cannot be
    watched, it is nan and the report says why.

    Args:
        backbone: The network.
        images: Open images, pixels (n, 3, height, width) in [0, 1], a folder or a data set's name, or a list of PIL images.
        cut: A fixed cut-off on norms instead of the statistical rule.
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
        'none'
    """
    images = capture.opened(backbone, images)
    pixels = isinstance(images, Tensor)
    parts: list[xr.Dataset] = []
    shown: list[np.ndarray] = []
    maps: list[np.ndarray] = []
    what: dict[str, Any] = {"norms": True, "received": True, "queries": queries, "partial": True}
    if backbone.has_cls:
        what["attention"] = ["cls"]
    how: dict[str, Any] = {"batch": batch, "precision": precision, "progress": progress}
    for part, seen in capture.stream(backbone, images, **what, **how):
        if (left := _SHOWN - sum(map(len, shown))) > 0:
            shown.append(part.pixels[:left].permute(0, 2, 3, 1).numpy().copy())
            if "attention" in seen:
                rows = seen["attention"].isel(attention_layer=0, query=0, image=slice(left)).mean("head")
                maps.append(arrays.patch_maps(rows).values)
        parts.append(seen.drop_vars(["received", "received_error", "attention"], errors="ignore"))
    joined = capture.join(parts)
    norms = joined["norms"].drop_vars("token").rename("norm")
    layers = outliers.layer_evidence(norms, cut)
    layers["sink"] = [np.nan, *joined["sink"].mean("image").values]  # of the block that reads this state's predecessor
    layers["sink_error"] = np.nan
    if "sink_error" in joined:  # of a mean over images
        layers.loc[1:, "sink_error"] = np.sqrt((joined["sink_error"].values ** 2).sum(0)) / joined.sizes["image"]
    word, layer, why = outliers.verdict(layers)
    rule = "two modes in log norm" if cut is None else f"fixed at {cut:g}"
    unwatched = joined.attrs.get("unwatched")
    return Diagnosis(
        backbone.name,
        backbone.source,
        "a tensor" if pixels else images.name,
        int(norms.sizes["image"]),
        tuple(images.shape[-2:]) if pixels else images.size,
        word,
        layer,
        why,
        rule,
        layers,
        [] if pixels else list(images.skipped),
        norms,
        np.concatenate(shown),
        np.concatenate(maps) if maps else None,
        joined.attrs["received"] + (f"; unknown where it cannot be watched: {unwatched}" if unwatched else ""),
        backbone.notes,
    )
