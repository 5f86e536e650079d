"""What frozen features know: classes, positions, pixels, segments, depth, words."""

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
