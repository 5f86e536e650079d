"""Many runs by one command on a machine that is there for minutes: packed here, run there without a network, merged here.

`make gpu-pack` writes a folder with the library, images, weights, a plan and a script; `python FOLDER/run.py` trains the arms of
the plan one after the other and measures rates; `make gpu-merge` files what came back. What is imported at the top is
in Python itself, so that the machine is first asked for the packages that it lacks.
"""

import argparse
import importlib
import io
import json
import re
import shlex
import shutil
import sys
import tempfile
import time
import traceback
import types
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitregs import paths
from vitregs.errors import InputError

if TYPE_CHECKING:
    import torch

    from vitregs.train.config import Recipe
    from vitregs.train.data import ImageFeed

LIMIT = 64 * 2**20  # bytes that may travel
PIECE, PIECES = 16 * 2**20, 8  # largest file that comes back, and how many may
HISTORIES, RATES = "histories.zip", "rates.json"
FIT = "steps=fit"  # as many steps as fit into an arm's share of the time
ARMS = (
    "regrow-dead batch=256 steps=1000 warmup=100",
    "regrow-dead-reg4 batch=256 steps=1000 warmup=100",
    "regrow-kept-reg4 batch=256 steps=1000 warmup=100",
    "regrow-fresh batch=256 steps=1500 warmup=150",
    "regrow-fresh-reg4 batch=256 steps=1500 warmup=150",
    "tinyimagenet-tiny steps=fit",
    "tinyimagenet-tiny-reg4 steps=fit",
)
# What arms of any objective but DINO's and CLIP's import, and what of it travels along where it is plain Python
NEEDED = (
    "torch",
    "timm",
    "numpy",
    "pandas",
    "scipy",
    "sklearn",
    "PIL",
    "safetensors",
    "huggingface_hub",
    "xarray",
    "h5py",
    "h5netcdf",
    "pyarrow",
    "datasets",
    "kornia",
    "tqdm",
)
CARRIED = ("h5netcdf", "datasets", "dill", "multiprocess", "kornia")
FOLDERS = ("lib/vitregs", "data/paper", "data/neurons")
RESERVED = 0.25  # share of the time that is kept for rates
SCRIPT = '''"""Train the arms of this pack: python run.py --out FOLDER [--minutes 6] [--arms ARM …] (see --help)."""

import sys
import tempfile
import zipfile
from pathlib import Path

here = Path(__file__).resolve().parent
with tempfile.TemporaryDirectory() as folder:
    zipfile.ZipFile(here / "code.zip").extractall(folder)
    sys.path.insert(0, f"{folder}/lib")
    sys.path.append(f"{folder}/site")  # behind the machine's own packages
    from vitregs.train.pack import main

    code = main(["run", "--pack", str(here), *sys.argv[1:]])
sys.exit(code)
'''


# --- here, before


def pack(images: str, weights: str, arms: Sequence[str], out: Path) -> Path:
    """Write the folder that travels.

    Args:
        images: A parquet file of labelled images, or a folder of them, whose first training file is taken.
        weights: File with the weights of the network that arms start from.
        arms: Recipes, each with its settings in one text.
        out: The folder; a former pack in it is replaced.

    Returns:
        The folder.

    Raises:
        InputError: For arms that are no recipes, files that are not there, another folder in place of a pack, or more than LIMIT.
    """
    from vitregs.cache import provenance

    chosen = [arm(text) for text in arms]
    parquet, start = _training_file(Path(images).expanduser()), Path(weights).expanduser()
    if not start.is_file():
        raise InputError(f"no weight file {start}: give WEIGHTS=file")
    if out.exists() and not (out / "plan.json").is_file() and any(out.iterdir()):
        raise InputError(f"{out} holds something else than a pack: name another folder")
    origin = provenance()
    code = _code()
    plan = {"arms": list(arms), "weights": start.name, "commit": origin["commit"], "code": origin["code"]}
    total = len(code) + len(SCRIPT) + sum(p.stat().st_size for p in (parquet, start))
    if total > LIMIT:
        raise InputError(
            f"the pack would have {total / 2**20:.1f} MiB, more than {LIMIT / 2**20:.0f}: "
            f"images {parquet.stat().st_size / 2**20:.1f}, weights {start.stat().st_size / 2**20:.1f}, "
            f"code {len(code) / 2**20:.1f}"
        )
    if out.exists():
        shutil.rmtree(out)
    (out / "images").mkdir(parents=True)
    shutil.copyfile(parquet, out / "images" / parquet.name)
    shutil.copyfile(start, out / start.name)
    (out / "code.zip").write_bytes(code)
    (out / "run.py").write_text(SCRIPT)
    (out / "plan.json").write_text(json.dumps(plan, indent=1) + "\n")
    print(f"{out}: {total / 2**20:.1f} of {LIMIT / 2**20:.0f} MiB, {len(chosen)} arms; {parquet.name}, {start.name}")
    if origin["commit"].endswith("+changes"):
        print("what is packed differs from its commit: results that are kept must come from a committed state")
    return out


def _training_file(place: Path) -> Path:
    """The first parquet file with training images of a folder, or the file itself."""
    from vitregs.data.sources import split_of

    if place.is_file():
        return place
    there = sorted(p for p in place.rglob("*.parquet")) if place.is_dir() else []
    found = [p for p in there if split_of(p.relative_to(place)) in ("train", "training")] or there
    if not found:
        raise InputError(f"no parquet file in {place}: give IMAGES=folder")
    return found[0]


def _code() -> bytes:
    """The library with the data it reads, and packages of plain Python that may be missing elsewhere, as a zip archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in FOLDERS:
            base = paths.PACKAGE if name == "lib/vitregs" else paths.ROOT / name
            for file in sorted(base.rglob("*")):
                if file.is_file() and not {"__pycache__", "_files"} & {*file.parts}:
                    # where the library looks outside a checkout
                    top = name if name == "lib/vitregs" else f"lib/vitregs/_files/{name}"
                    archive.write(file, f"{top}/{file.relative_to(base).as_posix()}")
        for name in CARRIED:
            try:
                files = distribution(name).files or []
            except PackageNotFoundError:
                continue  # the machine may have it
            for part in files:
                if part.parts[0] != ".." and part.suffix not in (".pyc", ".so", ".pyd") and "tests" not in part.parts:
                    archive.write(str(part.locate()), f"site/{part.as_posix()}")
    return buffer.getvalue()


# --- there


@dataclass
class Arm:
    """A run of a plan: its recipe, and whether its steps are those that fit."""

    recipe: "Recipe"
    fit: bool


def arm(text: str) -> Arm:
    """Read an arm: "tinyimagenet-tiny steps=fit", a recipe with settings → Arm. Raises InputError for what is none."""
    from vitregs.train.config import parse
    from vitregs.train.recipes import recipe

    name, *settings = shlex.split(text) or [""]
    rest = [s for s in settings if s != FIT]
    return Arm(parse(recipe(name), rest), len(rest) < len(settings))


@dataclass
class Job:
    """What all arms share: where things lie, the device, and the images, read once for each side."""

    folder: Path
    plan: dict[str, Any]
    out: Path
    work: Path
    device: "torch.device"
    rehearse: bool
    compiled: bool | None
    started: float
    minutes: float
    feeds: dict[int, "ImageFeed"] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)  # what goes into rates.json

    @property
    def trial(self) -> int:
        """Steps of a run that only tells the rate."""
        return 4 if self.rehearse else 48

    def left(self, until: float = 1.0) -> float:
        """Seconds left until a share of the time is over."""
        return self.minutes * 60 * until - (time.monotonic() - self.started)

    def weights(self, recipe: "Recipe") -> Path | None:
        """The file that a recipe starts from."""
        return self.folder / self.plan["weights"] if recipe.init else None

    def feed(self, recipe: "Recipe") -> "ImageFeed | None":
        """The images of a recipe, None for scenes."""
        from vitregs.train import data

        if recipe.data == "scenes":
            return None
        side = recipe.image_size
        if side not in self.feeds:
            begun = time.monotonic()
            few = 160 if self.rehearse else None
            self.feeds[side] = data.ImageFeed(recipe, self.device, str(self.folder / "images"), few)
            say(f"{len(self.feeds[side].pixels):,} images read at {side} px in {time.monotonic() - begun:.0f} s")
        return self.feeds[side]

    def train(self, recipe: "Recipe", out: Path, **more: Any) -> Path | None:
        """Train a recipe with what is shared."""
        from vitregs.train import loop

        given = {"out": out, "device": str(self.device), "read": self.feed(recipe), "weights": self.weights(recipe)}
        return loop.train(recipe, **given, compiled=self.compiled, resume=False, **more)


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


def run(
    folder: Path,
    out: Path,
    *,
    minutes: float,
    arms: Sequence[str] = (),
    weights_of: Sequence[str] = (),
    device: str = "auto",
    rehearse: bool = False,
    eager: bool = False,
) -> int:
    """Train the arms of a pack one after the other and measure rates.

    Each arm gets an equal part of the time that is left; one that fails costs no other. After each, OUT has all that is known.

    Args:
        folder: The pack.
        out: Where results go: HISTORIES, RATES, and weights.
        minutes: In all.
        arms: In place of those of the plan.
        weights_of: Arms, of those, whose weights are kept.
        device: "auto", "cpu", "cuda".
        rehearse: Tiny sizes, to see that everything works.
        eager: Do not compile.

    Returns:
        0, or 1 if an arm failed.

    Raises:
        InputError: For missing packages, arms that are no recipes, weights that may not be kept, or too many files.
    """
    started = time.monotonic()
    _check_packages()
    from vitregs import cache
    from vitregs.models import registry

    plan = json.loads((folder / "plan.json").read_text())
    chosen = [arm(text) for text in arms or plan["arms"]]
    kept = [arm(text).recipe for text in weights_of]
    _check_kept(chosen, kept)
    cache.check_writable(out)
    target = registry.pick_device(device)
    compiler = any(map(shutil.which, ("cc", "gcc", "clang")))
    if target.type == "cuda" and not eager and not compiler:
        say("no C compiler here: nothing is compiled")
    compiled = False if eager or not compiler or rehearse else None
    failed = False
    with tempfile.TemporaryDirectory() as work, _small(rehearse):
        job = Job(folder, plan, out, Path(work), target, rehearse, compiled, started, minutes)
        job.found = {**cache.provenance(device=_named(target)), "commit": plan["commit"], "arms": {}}
        for i, one in enumerate(chosen):
            seconds = job.left(1 - RESERVED) / (len(chosen) - i)
            say(f"{one.recipe.name}: {seconds:.0f} s")
            try:
                _arm(job, one, seconds, one.recipe in kept)
            except Exception as error:  # the time is lent: no arm may cost another
                failed = True
                say(f"{one.recipe.name} failed: {_first_line(error)}")
                if not isinstance(error, InputError):
                    traceback.print_exc()
            _collect(job)
        _rates(job)
        _collect(job)
    say(f"{out}: {', '.join(f'{p.name} {p.stat().st_size / 1e6:.1f} MB' for p in sorted(out.iterdir()))}")
    return int(failed)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _check_packages() -> None:
    """Raise InputError with the packages that cannot be imported; kornia's reader of files, which no arm uses, may be missing."""
    try:
        importlib.import_module("kornia_rs")
    except ImportError:
        empty: Any = types.ModuleType("kornia_rs")
        empty.io = types.ModuleType("kornia_rs.io")
        sys.modules.update({"kornia_rs": empty, "kornia_rs.io": empty.io})
    missing = []
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError as error:
            missing.append(name if error.name in (None, name) else f"{name} (for want of {error.name})")
    if missing:
        raise InputError(f"missing here: {', '.join(missing)}; carry them along as wheels, or install them")


def _check_kept(chosen: Sequence[Arm], kept: Sequence["Recipe"]) -> None:
    """Raise InputError for weights that are of no arm, derived from published ones, or too many files."""
    from vitregs.train import vit

    files = 2
    for one in kept:
        if one not in [a.recipe for a in chosen]:
            raise InputError(
                f"weights of {one.name} are asked for, which is no arm: {', '.join(a.recipe.name for a in chosen)}"
            )
        _refuse_derived(one.name, one.init)
        numbers = sum(p.numel() for p in vit.build(one.override(registers=max(one.registers, 1)), 1000).parameters())
        files += -(-2 * numbers // 15_000_000)  # half precision, in pieces that a tensor may leave unfilled
    if files > PIECES:
        raise InputError(f"{files} files would come back, more than {PIECES}: keep the weights of fewer arms")


def _refuse_derived(name: str, init: str) -> None:
    if init:
        raise InputError(f"weights of {name} are derived from those of {init}, and are not kept: its history is")


class _small:
    """Fewer images to look at while it lasts, if asked for."""

    def __init__(self, wanted: bool) -> None:
        self.wanted, self.former = wanted, dict[tuple[Any, str], int]()

    def __enter__(self) -> None:
        from vitregs.train import evaluation, loop

        if self.wanted:
            sizes = {(loop, name): 16 for name in ("WATCHED", "SCORED", "QUERIES", "BANK")} | {
                (evaluation, "PROBED"): 48
            }
            self.former = {key: getattr(*key) for key in sizes}
            for (home, name), value in sizes.items():
                setattr(home, name, value)

    def __exit__(self, *_error: object) -> None:
        for (home, name), value in self.former.items():
            setattr(home, name, value)


def _named(device: "torch.device") -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _rehearsed(recipe: "Recipe") -> "Recipe":
    """A recipe in tiny sizes, of the same name."""
    smaller = {} if recipe.init else {"size": "femto"}
    return recipe.override(batch=4, steps=4, warmup=2, precision="fp32", **smaller)


def _trial(job: Job, recipe: "Recipe") -> tuple[float, float, float]:
    """Train some steps to see how fast they are: → images/s between the last two looks, seconds of a look, of everything else."""
    begun, looks = time.monotonic(), list[Any]()
    short = recipe.override(steps=job.trial, warmup=1)
    with tempfile.TemporaryDirectory() as folder:
        job.train(short, Path(folder), every=job.trial // 2, final=False, report=lambda _: None, follow=looks.append)
    last = looks[-1].isel(step=slice(-2, None))
    look = float(last["watching"][-1])
    steps, seconds = (float(last[name][-1] - last[name][0]) for name in ("step", "seconds"))
    rate = steps * recipe.batch / max(seconds - look, 1e-9)
    return rate, look, time.monotonic() - begun - job.trial * recipe.batch / rate


def _arm(job: Job, one: Arm, seconds: float, keep: bool) -> None:
    """Train an arm for so many seconds at most; its folder gets history and card, OUT its weights."""
    from vitregs import cache

    begun = time.monotonic()
    recipe = _rehearsed(one.recipe) if job.rehearse else one.recipe
    recipe = _fitted(job, recipe, seconds) if one.fit else recipe
    out, looks = job.work / recipe.name, list[Any]()
    minutes = max(seconds - (time.monotonic() - begun), 0.0) / 60
    done = job.train(recipe, out, minutes=minutes, final=not recipe.init, report=say, follow=looks.append)
    log = cache.load_dataset(out / "history.nc") if done else looks[-1]
    steps = int(log["step"][-1])
    if done:
        card = json.loads((out / "recipe.json").read_text())
    else:  # what was seen until then is kept
        origin = {k: v for k, v in job.found.items() if isinstance(v, str)}
        log.attrs.update(origin, recipe=json.dumps(recipe.facts(), sort_keys=True))
        card = {"recipe": recipe.facts(), "provenance": origin, "stopped": steps}
    for facts in (log.attrs, card["provenance"]):
        facts["commit"] = job.plan["commit"]  # there is no repository here to ask
    cache.save_dataset(log, out / "history.nc")
    cache.write_whole(out / "recipe.json", lambda spare: spare.write_text(_json(card)))
    if keep and done:
        for file in sorted(out.glob("*.safetensors")):
            shutil.copyfile(file, job.out / f"{recipe.name}.{file.name}")
    elif keep:
        say(f"{recipe.name} has no weights: its steps did not fit into its time")
    trained = float(log["seconds"][-1] - log["watching"].sum())
    job.found["arms"][recipe.name] = {
        "steps": steps,
        "of": recipe.steps,
        "batch": recipe.batch,
        "seconds": time.monotonic() - begun,
        "images_per_second": steps * recipe.batch / max(trained, 1e-9),
        "utilisation": card.get("utilisation"),
    }


def _json(facts: Any) -> str:
    return json.dumps(facts, indent=1, sort_keys=True) + "\n"


def _fitted(job: Job, recipe: "Recipe", seconds: float) -> "Recipe":
    """A recipe with as many steps as fit into so many seconds, looks and final scores included; its name says how many."""
    from vitregs.train.config import parse

    rate, look, rest = _trial(job, recipe)
    looks = 24  # at powers of two, and twelve times besides
    steps = int((0.9 * seconds - 2 * rest - looks * look) * rate / recipe.batch) // 10 * 10
    steps = 6 if job.rehearse else max(job.trial, steps)
    say(f"{recipe.name}: {rate:,.0f} images/s, so {steps:,} steps")
    return parse(recipe, [f"steps={steps}", f"warmup={min(recipe.warmup, max(1, steps // 10))}"])


def _collect(job: Job) -> None:
    """Write what is known so far where it comes back from. Raises InputError for a file that is too large."""
    from vitregs.cache import write_whole

    def archive(spare: Path) -> None:
        with zipfile.ZipFile(spare, "w", zipfile.ZIP_DEFLATED) as found:
            for name in job.found["arms"]:
                for file in ("history.nc", "recipe.json"):
                    found.write(job.work / name / file, f"{name}/{file}")

    write_whole(job.out / HISTORIES, archive)
    write_whole(job.out / RATES, lambda spare: spare.write_text(_json(job.found)))
    for file in job.out.iterdir():
        if file.stat().st_size > PIECE:
            raise InputError(
                f"{file.name} has {file.stat().st_size / 2**20:.1f} MiB, more than comes back: give fewer arms"
            )


def _rates(job: Job) -> None:
    """Measure, as far as the time goes: the device's matrix rate, scenes, and our loop beside timm's on the same networks."""
    import torch

    from vitregs.data import scenes
    from vitregs.train import throughput

    kind = torch.bfloat16 if job.device.type == "cuda" else torch.float32
    rates: dict[str, Any] = {"matrix": throughput.matrix_rate(job.device, kind), "matrix_type": str(kind)}
    job.found["rates"] = rates
    count = 64 if job.rehearse else 20_000
    for seed in range(2):  # the first one warms up
        begun = time.perf_counter()
        float(scenes.render(count, 64, seed=seed, device=job.device).pixels.sum())
        rates["scenes_per_second"] = count / (time.perf_counter() - begun)
    say(f"{rates['scenes_per_second']:,.0f} scenes/s, matrix products at {rates['matrix'] / 1e12:,.1f} TFLOP/s")
    for size in ("femto",) if job.rehearse else ("tiny", "small"):
        if job.left() < (0 if job.rehearse else 40):
            say(f"no time left for the rates of size {size}")
            continue
        try:
            rates[size] = _beside(job, size, rates["matrix"])
        except Exception as error:  # arms are what the time was for
            say(f"the rates of size {size} failed: {_first_line(error)}")
        _collect(job)


def _beside(job: Job, size: str, matrix: float) -> dict[str, Any]:
    """Our loop and timm's on the same network, batch and device: size of the network, the device's matrix rate → rates."""
    from vitregs.train import learners, throughput, vit
    from vitregs.train.recipes import recipe

    chosen = recipe("tinyimagenet-tiny").override(size=size)
    chosen = _rehearsed(chosen) if job.rehearse else chosen
    ours = _trial(job, chosen)[0]
    feed = job.feed(chosen)
    assert feed is not None
    few = feed.again(chosen).held(4)
    learner = learners.learner(chosen, feed).to(job.device)
    flop = throughput.operations(learner, lambda twin: twin(few), len(few))
    source: Any = feed.images.source
    seconds, workers = (0.5, 0) if job.rehearse else (5, 4)
    theirs = throughput.timm_loop(
        vit.build(chosen, len(feed.classes)),
        list(source.items(feed.trained, 0)),
        batch=chosen.batch,
        device=job.device,
        low=chosen.precision == "bf16",
        seconds=seconds,
        workers=workers,
    )
    part = ours * flop / matrix
    say(f"size {size}: {ours:,.0f} images/s, timm's loop {theirs:,.0f}; {part:.0%} of the matrix rate")
    return {
        "batch": chosen.batch,
        "images_per_second": ours,
        "timm_images_per_second": theirs,
        "ratio": ours / theirs,
        "gflop_per_image": flop / 1e9,
        "part_of_matrix_rate": part,
    }


# --- here, after


def merge(source: Path, data: Path | None = None) -> list[str]:
    """File what came back: histories, weights of networks from scratch with their cards, and a section of the log.

    Args:
        source: The folder that came back.
        data: Where results, zoo and log lie, by default those of the book.

    Returns:
        What was written, a line each.

    Raises:
        InputError: For a folder that no run left, weights that are derived from published ones or not those of
            their card, and what is there already; nothing is written then.
    """
    from vitregs import cache
    from vitregs.train import export

    data = data or paths.ROOT / "data"
    rates, cards, logs = _came_back(source)
    pieces: dict[str, list[Path]] = {}
    for file in sorted(source.glob("*.safetensors")):
        name = next((n for n in cards if re.fullmatch(re.escape(n) + r"\.(weights|words)[\w.-]*", file.name)), None)
        if name is None:
            raise InputError(f"{file.name} belongs to no arm that came back: move it away")
        pieces.setdefault(name, []).append(file)
    for name, files in pieces.items():
        _refuse_derived(name, cards[name]["recipe"].get("init", ""))
        if cards[name].get("weights") != cache.file_hash(*[f for f in files if f".{export.WORDS}" not in f.name]):
            raise InputError(f"weights of {name} are not those of its card: fetch the folder again")
    places = {
        n: data / "zoo" / n / "history.nc" if n in pieces else data / "results" / "regrowth" / f"{n}.nc" for n in logs
    }
    there = [p for p in places.values() if p.exists()]
    if there:
        raise InputError(f"{there[0]} is there already: move it away, or name the arm otherwise")
    book = data / "results" / "LOG.md"
    text, mark = book.read_text(), "\n## Waiting for a GPU\n"
    if mark not in text:
        raise InputError(f"{book} has no section 'Waiting for a GPU' to write before")
    for name, place in places.items():
        cache.save_dataset(logs[name], place)
        for file in pieces.get(name, ()):
            shutil.copyfile(file, place.parent / file.name.removeprefix(f"{name}."))
        if name in pieces:
            facts = _json(cards[name])
            (place.parent / "recipe.json").write_text(facts)
            (place.parent / "README.md").write_text(export.describe(json.loads(facts), logs[name]))
    section = _section(rates, logs)
    cache.write_whole(book, lambda spare: spare.write_text(text.replace(mark, f"\n{section}{mark}", 1)))
    return [*(str(p) for p in places.values()), f"{book}: {section.splitlines()[0].removeprefix('## ')}"]


def _came_back(source: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Read what a run left: folder → RATES, cards and histories by arm."""
    from vitregs import cache

    cards, logs = dict[str, Any](), dict[str, Any]()
    try:
        rates = json.loads((source / RATES).read_text())
        with zipfile.ZipFile(source / HISTORIES) as found, tempfile.TemporaryDirectory() as spare:
            for name in rates["arms"]:
                if not re.fullmatch(r"\w[\w.+=-]*", name):
                    raise InputError(f"{source / RATES} names an arm {name!r}: that is none")
                cards[name] = json.loads(found.read(f"{name}/recipe.json"))
                file = Path(spare) / "history.nc"
                file.write_bytes(found.read(f"{name}/history.nc"))
                logs[name] = cache.load_dataset(file)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise InputError(f"{source} is not what a run leaves ({RATES}, {HISTORIES}): {error}") from error
    return rates, cards, logs


def _section(rates: dict[str, Any], logs: dict[str, Any]) -> str:
    """A section of the log in Markdown."""
    rows = [_row(name, rates["arms"][name], log) for name, log in logs.items()]
    lines = [
        f"## {rates['date']}: {len(logs)} arms on {rates['device']}",
        "",
        "*Above* is the share of patches with more than 1.6 times the median norm of their image in the last layer, before the",
        "first step and at the last look; *registers* is their mean norm there over the median of patches.",
        "",
        "| " + " | ".join(rows[0]) + " |",
        "|---" * len(rows[0]) + "|",
        *("| " + " | ".join(row.values()) + " |" for row in rows),
    ]
    known = rates.get("rates", {})
    if known:
        lines += [
            "",
            f"Matrix products ({known['matrix_type']}) at {known['matrix'] / 1e12:,.1f} TFLOP/s, scenes of 64 px at "
            f"{known['scenes_per_second']:,.0f}/s.",
        ]
    beside = [
        f"| {size} | {v['batch']} | {v['images_per_second']:,.0f} | {v['timm_images_per_second']:,.0f} | {v['ratio']:.1f} | "
        f"{v['part_of_matrix_rate']:.0%} |"
        for size, v in known.items()
        if isinstance(v, dict)
    ]
    if beside:
        head = "| size, 256 tokens | batch | images/s | timm's loop | ratio | part of the matrix rate |"
        lines += ["", head, "|---|---|---|---|---|---|", *beside]
    return "\n".join(lines) + "\n"


def _row(name: str, arm: dict[str, Any], log: Any) -> dict[str, str]:
    """A row of the log's table: name of an arm, what RATES says of it, its history → column: text."""
    last, above = log.isel(step=-1, layer=-1), log["above"].isel(layer=-1).values
    of = f" of {arm['of']:,}" if arm["steps"] < arm["of"] else ""
    return {
        "arm": f"`{name}`",
        "steps": f"{arm['steps']:,}{of} × {arm['batch']}",
        "images/s": f"{arm['images_per_second']:,.0f}",
        "utilisation": _cell(arm["utilisation"], ".0%"),
        "above": f"{_cell(above[0], '.3f')} → {_cell(above[-1], '.3f')}",
        "fingerprint": str(last["verdict"].values) if "verdict" in log else "",
        "registers": _cell(last["registers"].mean() / last["median"] if "registers" in log else None, ".2f"),
        "agreement": _cell(last["agreement"] if "agreement" in log else None, ".3f"),
        "accuracy": _cell(last["accuracy"], ".3f"),
    }


def _cell(value: Any, how: str) -> str:
    return "" if value is None or float(value) != float(value) else format(float(value), how)


def main(words: Sequence[str] | None = None) -> int:
    """Run `pack`, `run` or `merge` by words of a command line: → exit code; a mistake in the input is one line and code 2."""
    parser = argparse.ArgumentParser(prog="python -m vitregs.train.pack", description=(__doc__ or "").split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("pack", help="write the folder that travels")
    one.add_argument(
        "--images", required=True, help="folder of parquet files, the first training file of which is taken"
    )
    one.add_argument("--weights", required=True, help="weights of the network that arms start from")
    one.add_argument("--out", type=Path, default=Path(".gpu"))
    two = verbs.add_parser("run", help="train the arms of a pack")
    two.add_argument("--pack", type=Path, required=True, help=argparse.SUPPRESS)
    two.add_argument("--out", type=Path, required=True, help="where results go")
    two.add_argument("--minutes", type=float, default=6, help="in all (default 6)")
    two.add_argument("--weights-of", nargs="+", default=[], metavar="ARM", help="arms whose weights are kept")
    two.add_argument("--device", default="auto")
    two.add_argument("--rehearse", action="store_true", help="tiny sizes, to see that everything works")
    two.add_argument("--eager", action="store_true", help="do not compile")
    for each in (one, two):
        each.add_argument(
            "--arms",
            nargs="+",
            default=[],
            metavar="ARM",
            help='recipes, with settings as "tinyimagenet-tiny steps=fit"',
        )
    three = verbs.add_parser("merge", help="file what came back")
    three.add_argument("source", type=Path)
    three.add_argument("--data", type=Path, help="folder with results and zoo (default: the book's)")
    given = vars(parser.parse_args(words))
    act: dict[str, Callable[[], Any]] = {
        "pack": lambda: pack(given["images"], given["weights"], given["arms"] or ARMS, given["out"]),
        "run": lambda: run(given.pop("pack"), given.pop("out"), **given),
        "merge": lambda: print("\n".join(merge(given["source"], given["data"]))),
    }
    verb = given.pop("verb")
    try:
        done = act[verb]()
    except InputError as problem:
        print(f"vitregs: {problem}", file=sys.stderr)
        return 2
    return done if verb == "run" else 0


if __name__ == "__main__":
    sys.exit(main())
