"""Seven photographs that installed packages ship, each with author and licence: real images without a download."""

from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pandas as pd

from vitregs.cache import file_hash
from vitregs.errors import InputError

VERSIONS = {"scikit-image": "0.26.0", "scikit-learn": "1.9.1"}  # whose files and notes were read for the table below


@dataclass(frozen=True)
class Photograph:
    """A photograph inside an installed package, and what the package says of it."""

    name: str
    shows: str
    author: str
    licence: str
    source: str
    package: str
    file: str
    sha256: str


PHOTOGRAPHS = (
    Photograph(
        "astronaut",
        "Eileen Collins, astronaut, before a flag and a model of the Space Shuttle",
        "NASA",
        "no known copyright restrictions, released into the public domain",
        "https://flic.kr/p/r9qvLn",
        "scikit-image",
        "skimage/data/astronaut.png",
        "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
    ),
    Photograph(
        "chelsea",
        "the face of a tabby cat",
        "Stefan van der Walt",
        "CC0",
        "https://scikit-image.org/docs/stable/api/skimage.data.html#skimage.data.chelsea",
        "scikit-image",
        "skimage/data/chelsea.png",
        "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
    ),
    Photograph(
        "coffee",
        "a cup of coffee on a wooden table (courtesy of Pikolo Espresso Bar)",
        "Rachel Michetti",
        "CC0",
        "https://scikit-image.org/docs/stable/api/skimage.data.html#skimage.data.coffee",
        "scikit-image",
        "skimage/data/coffee.png",
        "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
    ),
    Photograph(
        "rocket",
        "a Falcon 9 on its launch pad at dusk",
        "SpaceX",
        "released in the public domain",
        "https://www.flickr.com/photos/spacexphotos/16511594820/in/photostream/",
        "scikit-image",
        "skimage/data/rocket.jpg",
        "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
    ),
    Photograph(
        "motorcycle",
        "a motorcycle in a garage, the left image of a stereo pair",
        "N. Nesic, P. Westling, X. Wang, Y. Kitajima, G. Krathwohl and D. Scharstein, Middlebury College",
        "none stated (Middlebury 2014 stereo benchmark; Scharstein et al., GCPR 2014)",
        "http://vision.middlebury.edu/stereo/data/scenes2014/",
        "scikit-image",
        "skimage/data/motorcycle_left.png",
        "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179",
    ),
    Photograph(
        "china",
        "a pavilion of many storeys above a lake",
        "danielbuechele",
        "CC BY 2.0",
        "https://www.flickr.com/photos/danielbuechele/6061409035/sizes/z/in/photostream/",
        "scikit-learn",
        "sklearn/datasets/images/china.jpg",
        "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29",
    ),
    Photograph(
        "flower",
        "a dahlia before leaves",
        "vultilion (by the source; the package's note names danielbuechele)",
        "CC BY 2.0",
        "https://www.flickr.com/photos/vultilion/6056698931/sizes/z/in/photostream/",
        "scikit-learn",
        "sklearn/datasets/images/flower.jpg",
        "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638",
    ),
)


def table() -> pd.DataFrame:
    """List the photographs in their order, with author and licence as the packages state them.

    Returns:
        A row for each: name, what it shows, author, licence, source (an address), package, file in it, SHA-256 of the file.

    Example:
        >>> from vitregs.data import photographs
        >>> photographs.table().set_index("name").loc["china", ["author", "licence"]].tolist()
        ['danielbuechele', 'CC BY 2.0']
    """
    return pd.DataFrame([asdict(photograph) for photograph in PHOTOGRAPHS])


def files() -> dict[str, Path]:
    """Find the photographs in the installed packages; nothing is downloaded.

    Returns:
        Paths by name, in the order of the table.

    Raises:
        InputError: A package is not installed, or its version lacks a file or has another one of the same name.
    """
    return {photograph.name: _find(photograph) for photograph in PHOTOGRAPHS}


def _find(wanted: Photograph) -> Path:
    fix = f"pip install {wanted.package}=={VERSIONS[wanted.package]}"
    try:
        package = distribution(wanted.package)
    except PackageNotFoundError as error:
        raise InputError(f"photographs are files of {wanted.package}, which is not installed: {fix}") from error
    path = Path(str(package.locate_file(wanted.file)))
    here = f"{wanted.package} {package.version}"
    if not path.is_file():
        raise InputError(f"{here} does not ship the photograph {wanted.name} ({path.name}): {fix}")
    if file_hash(path) != wanted.sha256:
        raise InputError(f"{here} ships another file as {path.name}, so {wanted.name} is another image: {fix}")
    return path
