"""What frozen features know: classes, positions, pixels, segments, depth, words."""
