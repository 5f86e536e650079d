"""What stored results say on each claim: one short function a quantity, from the arrays in `data/results`."""
