"""What frozen features know: classes, positions, pixels, segments, depth, words."""

from vitregs.probes.classes import classify, classify_real, classify_sets, score
from vitregs.probes.dense import estimate_depth, segment
from vitregs.probes.local import locate, probe, reconstruct
from vitregs.probes.tasks import fingerprints
from vitregs.probes.zero import zero_shot

__all__ = [
    "classify",
    "classify_real",
    "classify_sets",
    "estimate_depth",
    "fingerprints",
    "locate",
    "probe",
    "reconstruct",
    "score",
    "segment",
    "zero_shot",
]
