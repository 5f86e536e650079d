"""Does my ViT have artifacts? Evidence at every layer, and a verdict that can be "none" or "inconclusive"."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from vitregs import artifacts, capture, results
from vitregs.backbones import Backbone
from vitregs.images import Images

_SHOWN = 3  # pictures in the plot
_SINK_PICTURES = 32  # attention of all queries is costly: a few pictures tell


@dataclass
class Diagnosis:
    """What was found in one model on some pictures."""

    model: str
    weights: str
    images: str
    pictures: int
    size: tuple[int, int]
    verdict: str
    layer: int
    evidence: str
    rule: str
    layers: pd.DataFrame
    skipped: list[str] = field(default_factory=list)
    norms: xr.DataArray | None = None
    shown: np.ndarray | None = None  # the first pictures, (n, H, W, 3), and their mean CLS attention (n, rows, columns)
    attention: np.ndarray | None = None

    def facts(self) -> dict[str, Any]:
        """Everything but arrays, as plain values for JSON."""
        plain = {k: v for k, v in asdict(self).items() if k not in ("layers", "norms", "shown", "attention")}
        rows = self.layers.astype(object).where(np.isfinite(self.layers), None)
        return plain | {"layers": rows.to_dict("records")}

    def text(self) -> str:
        """The report for a person."""
        shown = self.layers.assign(share=100 * self.layers["share"]).rename(
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
        # as text already, since pandas writes NaN without asking a formatter
        table = shown.assign(**{k: shown[k].map(f) for k, f in words.items()}).to_string(index=False)
        head = f"{self.model} ({self.weights}) on {self.pictures} pictures of {self.images} at {self.size[0]}x{self.size[1]}"
        legend = (
            "layer 0 enters block 1, the last layer is before the final norm; norms are L2 over channels, patch tokens only;\n"
            "largest and top 1 % are medians over pictures; attention sink: share of attention on the most-attended patch,\n"
            f"1x is fair; cut-off: {self.rule}"
        )
        return f"{head}\n\n{table}\n\n{legend}\n\nverdict: {self.verdict} (layer {self.layer}): {self.evidence}"


def diagnose(backbone: Backbone, images: Images, *, cut: float | None = None, batch: int = 16) -> Diagnosis:
    """Look for artifacts: model, pictures, a fixed cut-off instead of the statistical rule → Diagnosis.

    The layer with the strongest evidence decides, since in small ViTs middle blocks show what the last one hides.
    """
    norms = capture.norms(backbone, images, batch=batch)
    skipped = list(images.skipped)  # the next reading of the pictures begins a new list
    layers = artifacts.by_layer(norms, cut)
    few = next(images.pixels(min(_SINK_PICTURES, norms.sizes["image"])))
    sinks = artifacts.patches(capture.concentration(backbone, few, batch=batch)).max("token").mean("image")
    layers["sink"] = [np.nan, *sinks.values]  # of the block that reads this state's predecessor
    word, layer, why = artifacts.verdict(layers)
    shown, attention = few[:_SHOWN], None
    if backbone.has_cls:
        rows = capture.attention(backbone, shown, queries=["cls"]).isel(layer=0, query=0).mean("head")
        attention = results.grid(rows).values
    rule = "two modes in log norm" if cut is None else f"fixed at {cut:g}"
    return Diagnosis(
        backbone.name,
        backbone.source,
        images.name,
        int(norms.sizes["image"]),
        images.size,
        word,
        layer,
        why,
        rule,
        layers,
        skipped,
        norms,
        shown.permute(0, 2, 3, 1).numpy(),
        attention,
    )
