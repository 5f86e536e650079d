"""Draw the picture of the front page and the README from stored arrays: python book/cover.py

Photographs of public domain or CC0, their norm maps and attention maps in DeiT-Tiny, before and after a test-time register.
"""

from pathlib import Path

import numpy as np

from vitregs import arrays, report
from vitregs.claims import networks
from vitregs.data.preparation import Preparation
from vitregs.models import registry

SHOWN = (0, 2, 3)  # astronaut, coffee, rocket
FILE = Path(__file__).parent / "_static" / "cure.png"


def main() -> None:
    """Write the picture."""
    import timm

    from vitregs.data.images import open_images

    network = "deit_tiny_patch16_224"
    pair = (network, f"{network}+tt1")
    registry.check(network)
    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(network).to_dict())
    source = open_images("photographs", size=(224, 224), preparation=Preparation.of(config))
    pixels = np.concatenate([part.permute(0, 2, 3, 1).numpy() for part in source.pixels(7)])
    norms = [networks.read(n, "norms_on_photographs").isel(layer=-1) for n in pair]
    rows = [networks.read(n, "cls_attention_on_photographs").isel(layer=-1, query=0).mean("head") for n in pair]
    chosen = list(SHOWN)
    first, second = (arrays.patch_maps(a).values[chosen] for a in norms)
    third, fourth = (arrays.patch_maps(a).values[chosen] for a in rows)
    figure = report.remedies.plot_cure(pixels[chosen], (first, second), (third, fourth))
    figure.savefig(FILE, dpi=110)


if __name__ == "__main__":
    main()
