"""Does a vision transformer have artifacts, and what do registers change? The public interface of the library.

Example:
    >>> import vitregs as vr
    >>> vit = vr.load("supervised-pico")  # or vr.wrap(my_timm_module)
    >>> images = vr.open_images("scenes", size=vit.size, count=16)
    >>> seen = vr.capture(vit, images, norms=True, attention=["cls"], qkv=["value"])
    >>> dict(seen.norms.sel(layer=8, token="patch").sizes)
    {'image': 16, 'token': 144}
    >>> vr.diagnose(vit, images).verdict
    'content'
    >>> len(vr.plot.norms(seen).axes)
    3
"""

import warnings
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitregs import plot
    from vitregs.data.images import Images, open_images
    from vitregs.errors import InputError
    from vitregs.measure.diagnose import Diagnosis, diagnose
    from vitregs.measure.outliers import find_outliers
    from vitregs.models.backbone import Backbone
    from vitregs.models.capture import capture
    from vitregs.models.registry import load, wrap

__all__ = [
    "Backbone",
    "Diagnosis",
    "Images",
    "InputError",
    "__version__",
    "capture",
    "diagnose",
    "find_outliers",
    "load",
    "open_images",
    "plot",
    "wrap",
]

try:
    __version__ = version("vitregs")
except PackageNotFoundError:  # the sources without an installation
    __version__ = "0+unknown"

# tqdm looks for notebook widgets when `datasets` and hub clients import it; plain bars serve as well
warnings.filterwarnings("ignore", message="IProgress not found")

# Names come from their modules when they are first asked for, so that the command line starts without torch.
_HOMES = {
    "Backbone": "models.backbone",
    "Diagnosis": "measure.diagnose",
    "Images": "data.images",
    "InputError": "errors",
    "capture": "models.capture",
    "diagnose": "measure.diagnose",
    "find_outliers": "measure.outliers",
    "load": "models.registry",
    "open_images": "data.images",
    "wrap": "models.registry",
}


def __getattr__(name: str) -> Any:
    if name == "plot":
        return import_module("vitregs.plot")
    if name not in _HOMES:
        raise AttributeError(f"module 'vitregs' has no attribute {name!r}")
    return getattr(import_module(f"vitregs.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
