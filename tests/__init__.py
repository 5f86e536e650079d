"""The tests. `VITREGS_NIGHTLY=1` runs those marked `nightly` too, and the simulations with more draws."""

import os

NIGHTLY = os.environ.get("VITREGS_NIGHTLY") == "1"
