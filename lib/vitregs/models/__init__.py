"""Vision transformers: a name becomes a backbone, and what happens inside it is captured."""
