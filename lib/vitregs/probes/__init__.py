"""What frozen features know: classes, positions, pixels, segments, depth, words."""

from vitregs.probes.classes import classify, score
from vitregs.probes.local import locate, reconstruct

__all__ = ["classify", "locate", "reconstruct", "score"]
