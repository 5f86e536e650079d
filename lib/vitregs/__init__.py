"""The library behind an executable companion to "Vision Transformers Need Registers"."""

import warnings
from importlib.metadata import version

__version__ = version("vitregs")

# tqdm looks for notebook widgets when `datasets` and hub clients import it; plain bars serve as well
warnings.filterwarnings("ignore", message="IProgress not found")
