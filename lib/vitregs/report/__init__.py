"""What chapters print and draw: a module a subject holds its tables and its figures (`plot_…`)."""

from vitregs.report import (
    attention,
    behaviour,
    features,
    format,
    lost,
    neurons,
    norms,
    registers,
    regrowth,
    remedies,
    style,
    tokens,
    training,
    transfer,
)

__all__ = [
    "attention",
    "behaviour",
    "features",
    "format",
    "lost",
    "neurons",
    "norms",
    "registers",
    "regrowth",
    "remedies",
    "style",
    "tokens",
    "training",
    "transfer",
]
