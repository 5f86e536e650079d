"""Where the data and the notebooks lie, in a checkout and in an installed package."""

from importlib.resources import files
from pathlib import Path

PACKAGE = Path(str(files("vitregs"))).resolve()
CHECKOUT = all((PACKAGE.parents[1] / name).is_dir() for name in ("data/paper", "notebooks"))
ROOT = PACKAGE.parents[1] if CHECKOUT else PACKAGE / "_files"  # where data/ and notebooks/ lie
BUILD = ROOT / "build" if CHECKOUT else Path("build")  # where results go that nobody gave a place
