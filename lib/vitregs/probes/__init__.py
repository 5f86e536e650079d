"""What frozen features know: classes, positions, pixels, segments, depth, words."""

from vitregs.probes.classes import classify, classify_sets, score
from vitregs.probes.local import locate, probe, reconstruct

__all__ = ["classify", "classify_sets", "locate", "probe", "reconstruct", "score"]
