"""Pre-training of small ViTs, without and with registers."""
