"""Training of small register ViTs."""
