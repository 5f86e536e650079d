"""The command `vitregs`: diagnose a model, find its neurons, run a chapter, train, list and measure models, scoreboard.

Words are read by Cyclopts from the types of the functions below; a chapter's options are made from its `parameters` cell.
What takes seconds to import is imported inside the commands, so that help and mistakes come at once.
"""

import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from inspect import Parameter as Argument
from inspect import Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, Parameter, Token
from cyclopts.annotations import get_hint_name
from cyclopts.exceptions import (
    CoercionError,
    MissingArgumentError,
    RepeatArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
    ValidationError,
)

from vitregs.errors import InputError, Interrupted, unknown

if TYPE_CHECKING:
    from vitregs.book import parameters


COMMANDS = ("diagnose", "neurons", "run", "train", "models", "measure", "scoreboard")
ROWS = 40  # neurons that are printed, at most
PLOTS = (".png", ".svg", ".pdf")


def _whole(_type: Any, tokens: Sequence[Token]) -> int:
    """A whole number; Cyclopts by itself would round 2.5."""
    return int(tokens[0].value)


def _truth(_type: Any, tokens: Sequence[Token]) -> bool:
    """True or false, as a word of its own."""
    word = tokens[0].value.lower()
    if word not in ("true", "false"):
        raise ValueError(word)
    return word == "true"


def _several(_type: Any, tokens: Sequence[Token]) -> list[str]:
    """Several words, or one with commas; a file whose name has a comma stays whole, NAME@FILE too."""
    words = [token.value for token in tokens]

    def whole(word: str) -> bool:
        return any(part and Path(part).expanduser().exists() for part in (word, word.partition("@")[2]))

    return [w for word in words for w in ([word] if whole(word) else word.split(","))]


def _wholes(_type: Any, tokens: Sequence[Token]) -> list[int]:
    return [int(token.value) for token in tokens]


def _least(least: int) -> Callable[[Any, int | None], None]:
    def check(_type: Any, value: int | None) -> None:
        if value is not None and value < least:
            raise ValueError(f"must be {least} or more, not {value}")

    return check


def _number(help_: str, least: int) -> Parameter:
    return Parameter(help=help_, converter=_whole, validator=_least(least))


def _flag(help_: str, name: str | None = None) -> Parameter:
    return Parameter(name=name, help=help_, show_default=False)


def _show_warning(message: object, *_rest: object, **_more: object) -> None:
    print(f"vitregs: {message}", file=sys.stderr)


def _app() -> App:
    """The commands with their options: → App, which raises what is wrong instead of printing it."""
    app = App(
        name="vitregs",
        help="Diagnose a model, find its neurons, run a chapter, train a recipe, list or measure models, show the scoreboard.",
        version=lambda: version("vitregs"),
        help_format="plaintext",
        help_formatter="plain",
        default_parameter=Parameter(negative="", json_list=False, json_dict=False),
        print_error=False,
        exit_on_error=False,
        suppress_keyboard_interrupt=False,
        result_action="return_value",
    )
    for command in (diagnose, neurons, train, models, measure, scoreboard):
        app.command(command)
    app["models"].usage = "Usage: vitregs models [PART]"
    app["train"].usage = "Usage: vitregs train [RECIPE [SETTING=VALUE …]] [OPTIONS]"
    app.command(_run_app())
    return app


def _run_app() -> App:
    """The command `run` before a chapter is named."""
    run = App(
        name="run",
        help="Execute a chapter with other models, images or settings.",
        usage="Usage: vitregs run CHAPTER [--out FILE] [--results FOLDER] [--PARAMETER VALUE …]",
    )
    run.default(_list_chapters)
    return run


def _list_chapters() -> None:
    from vitregs.book import parameters

    print("Usage: vitregs run CHAPTER [--out FILE] [--results FOLDER] [--PARAMETER VALUE …]\n\nchapters:")
    print("\n".join(f"  {name}" for name in parameters.names()))


def diagnose(
    model: Annotated[str, Parameter(help="a zoo name or any timm ViT (see `vitregs models`)")],
    /,
    *,
    weights: Annotated[
        str | None, Parameter(help="local .safetensors (or PyTorch checkpoint) instead of the hub's weights")
    ] = None,
    images: Annotated[
        str, Parameter(help="scenes, photographs, an image, a folder, a parquet file or folder of them, or a hub name")
    ] = "scenes",
    split: Annotated[str | None, Parameter(help="split of a data set")] = None,
    count: Annotated[int, _number("how many images", 1)] = 64,
    seed: Annotated[int, _number("which images are drawn", 0)] = 0,
    image_column: Annotated[
        str | None, Parameter(help="column that holds the images (default: found by its type)")
    ] = None,
    full_scale: Annotated[
        float | None, Parameter(help="value of white in images of more than 8 bits (default: by type and metadata)")
    ] = None,
    size: Annotated[
        list[int] | None,
        Parameter(
            help="side, or height and width, in pixels (default: the model's)", consume_multiple=True, converter=_wholes
        ),
    ] = None,
    cutoff: Annotated[
        float | None, Parameter(help="fixed outlier cut-off on norms instead of the statistical rule")
    ] = None,
    device: Annotated[str, Parameter(help="auto, cpu, cuda, …")] = "auto",
    batch: Annotated[int, _number("images at a time", 1)] = 16,
    precision: Annotated[str, Parameter(help="float32, or bfloat16 (faster where the processor has it)")] = "float32",
    quick: Annotated[bool, _flag("norms, place and attention only: no neurons, nothing suppressed")] = False,
    exact: Annotated[
        bool, _flag("attention sinks from all queries, not from a random few: several times slower")
    ] = False,
    as_json: Annotated[bool, _flag("print JSON", "--json")] = False,
    plot: Annotated[
        Path | None, Parameter(help=f"draw images, norms, neurons and attention ({', '.join(PLOTS)})")
    ] = None,
) -> None:
    """Does this ViT have artifacts?"""
    if plot and plot.suffix not in PLOTS:
        raise InputError(f"--plot writes {', '.join(PLOTS[:-1])} or {PLOTS[-1]}, not {plot.suffix or plot.name!r}")
    if plot:
        _check_can_write(plot)
    from vitregs.measure.diagnose import diagnose
    from vitregs.models import capture

    backbone, source = _opened(
        model,
        weights,
        device,
        images,
        size,
        count=count,
        seed=seed,
        split=split,
        image_column=image_column,
        full_scale=full_scale,
    )
    queries = None if exact else capture.QUERIES
    found = diagnose(backbone, source, cut=cutoff, quick=quick, queries=queries, batch=batch, precision=precision)
    print(json.dumps(found.facts(), indent=1) if as_json else found.text(), flush=True)
    if cutoff is not None:
        low = found.layers.loc[found.layers["median"] > cutoff, "layer"].tolist()
        if low:
            warnings.warn(
                f"--cutoff {cutoff:g} lies below the median norm of {'layer' if len(low) == 1 else 'layers'} "
                f"{', '.join(map(str, low))}: most patches count as outliers there",
                stacklevel=1,
            )
    if plot:  # last: a disk that is full must not cost the report
        from vitregs import report
        from vitregs.cache import write_whole

        figure = report.norms.plot_diagnosis(found)
        write_whole(plot, lambda spare: figure.savefig(spare, format=plot.suffix[1:], dpi=150))


def neurons(
    model: Annotated[str, Parameter(help="a zoo name or any timm ViT (see `vitregs models`)")],
    /,
    *,
    weights: Annotated[
        str | None, Parameter(help="local .safetensors (or PyTorch checkpoint) instead of the hub's weights")
    ] = None,
    images: Annotated[
        str, Parameter(help="scenes, photographs, an image, a folder, a parquet file or folder of them, or a hub name")
    ] = "scenes",
    split: Annotated[str | None, Parameter(help="split of a data set")] = None,
    count: Annotated[int, _number("how many images", 1)] = 256,
    seed: Annotated[int, _number("which images are drawn", 0)] = 0,
    size: Annotated[
        list[int] | None,
        Parameter(
            help="side, or height and width, in pixels (default: the model's)", consume_multiple=True, converter=_wholes
        ),
    ] = None,
    cutoff: Annotated[
        float | None, Parameter(help="norm above which a patch is marked (default: by the statistical rule)")
    ] = None,
    layer: Annotated[
        int, Parameter(help="layer at which patches are marked; negative ones count from the end", converter=_whole)
    ] = -1,
    device: Annotated[str, Parameter(help="auto, cpu, cuda, …")] = "auto",
    batch: Annotated[int, _number("images at a time", 1)] = 16,
    precision: Annotated[str, Parameter(help="float32, or bfloat16 (faster where the processor has it)")] = "float32",
    out: Annotated[Path | None, Parameter(help="write the list to this file (.json), for MODEL+tt1:FILE")] = None,
) -> None:
    """Which MLP neurons write the large norms of this ViT?"""
    if out and out.suffix != ".json":
        raise InputError(f"--out writes .json, not {out.suffix or out.name!r}")
    if out:
        _check_can_write(out)
    from vitregs import report
    from vitregs.measure.neurons import as_list, search

    backbone, source = _opened(model, weights, device, images, size, count=count, seed=seed, split=split)
    found = search(backbone, source, cutoff=cutoff, layer=layer, batch=batch, precision=precision)
    table = report.neurons.table(found)
    if len(table):
        print(table[:ROWS].to_string(index=False))
        print(f"and {len(table) - ROWS} more with smaller shares\n" if len(table) > ROWS else "")
    print(f"{backbone.name} ({backbone.source}) on {source.name}: {report.neurons.summary(found)}", flush=True)
    if out:
        as_list(backbone, source, found).write(out)


def _opened(
    model: str, weights: str | None, device: str, images: str, size: list[int] | None, **more: Any
) -> tuple[Any, Any]:
    """Load a model and open images for it: words of the command line → Backbone, Images."""
    if size is not None and len(size) not in (1, 2):
        raise InputError(f"--size takes a side, or height and width, not {len(size)} numbers")
    from vitregs.data.images import open_images
    from vitregs.models import registry

    backbone = registry.load(model, weights=weights, device=device)
    shape = (size[0], size[-1]) if size else backbone.size
    backbone.grid(shape)
    return backbone, open_images(images, size=shape, preparation=backbone.preparation, **more)


def _check_can_write(file: Path) -> None:
    """Raise InputError for a file that cannot be written, before work is done for it; nothing is made."""
    there = next(p for p in (file.absolute().parent, *file.absolute().parents) if p.exists())
    if file.is_dir():
        raise InputError(f"cannot write {file}: it is a folder")
    if not there.is_dir():
        raise InputError(f"cannot write {file}: {there.name} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {file}: no right to write in {there}")


def _chapter(name: str) -> Callable[..., None]:
    """Make the command that runs a chapter: its name → function with an option for each of its parameters."""
    from vitregs.book import parameters

    known = parameters.chapter_parameters(name)

    def run(**given: Any) -> None:
        from vitregs import paths
        from vitregs.book.execute import run_chapter

        out = given.pop("out", None) or paths.BUILD / "runs" / f"{name}.ipynb"
        if out.suffix != ".ipynb":
            raise InputError(f"--out must end in .ipynb, not {out}")
        stored = given.pop("results", None) or paths.BUILD / "results"
        print(run_chapter(name, given, out, stored))

    def option(word: str, kind: Any, default: Any, how: Parameter) -> Argument:
        return Argument(word, Argument.KEYWORD_ONLY, default=default, annotation=Annotated[kind, how])

    files = [
        option("out", Path | None, None, Parameter(help=f"output notebook (default: build/runs/{name}.ipynb)")),
        option("results", Path | None, None, Parameter(help="folder for measured results (default: build/results)")),
    ]
    options = [option(p.name, *_option(p)) for p in known.values()]
    run.__signature__ = Signature([*options, *files])  # type: ignore[attr-defined]
    return run


def _option(parameter: "parameters.Parameter") -> tuple[Any, Any, Parameter]:
    """The option for a chapter's parameter: → type, default, how it is read. Ranges and choices are checked by the chapter."""
    named = Parameter(
        name=f"--{parameter.name}",
        alias=f"--{parameter.name.replace('_', '-')}",
        help=parameter.help,
        show_default=repr,
    )
    kind, how = parameter.type, Parameter()
    if kind is list:
        kind, how = list[str], Parameter(consume_multiple=True, converter=_several)
    elif kind is bool:  # a word, not a flag, since some are true by default
        kind, how = str, Parameter(converter=_truth, metavar="BOOL")
    elif kind is int:
        how = Parameter(converter=_whole)
    return kind, parameter.default, Parameter.combine(named, how)


def train(
    recipe: Annotated[str | None, Parameter(help="a recipe's name; none lists them")] = None,
    /,
    *settings: Annotated[str, Parameter(help="overrides, as steps=1000 lr=5e-4")],
    out: Annotated[Path | None, Parameter(help="folder (default: runs/RECIPE)")] = None,
    device: Annotated[str, Parameter(help="auto, cpu, cuda, …")] = "auto",
    wanted: Annotated[bool, _flag("list the runs still wanted, most informative first", "--list")] = False,
    images: Annotated[
        str | None, Parameter(help="where the recipe's images lie: a folder, parquet files (default: the hub)")
    ] = None,
    count: Annotated[int | None, _number("how many of these images are used (default: all)", 1)] = None,
    weights: Annotated[
        str | None, Parameter(help="file with the weights of the network that a recipe starts from (default: the hub)")
    ] = None,
    minutes: Annotated[
        float | None, Parameter(help="stop in time, with a checkpoint; the same command goes on")
    ] = None,
    eager: Annotated[bool, _flag("do not compile, where there is no C compiler")] = False,
    restart: Annotated[bool, _flag("start anew instead of resuming")] = False,
) -> None:
    """Train a small ViT."""
    from tqdm import tqdm

    from vitregs.train import recipes
    from vitregs.train.config import parse

    if wanted:
        print("\n".join(_wanted()))
        return
    if not recipe:
        print("\n".join(f"{r.name:<24} {r.about}" for r in recipes.RECIPES.values()))
        print(
            '\nAny of them with registers or another seed: "-reg4", "-seed1" behind the name. Runs still wanted: --list'
        )
        return
    chosen = parse(recipes.recipe(recipe), settings)
    from vitregs.train import loop

    done = loop.train(
        chosen,
        out=out or Path("runs") / chosen.name,
        device=device,
        images=images,
        count=count,
        weights=weights,
        resume=not restart,
        minutes=minutes,
        compiled=False if eager else None,
        report=tqdm.write,
    )
    if done:
        print(done)


def _wanted() -> list[str]:
    """The runs still wanted, most informative first, and how far each is."""
    from vitregs.models import registry
    from vitregs.train import recipes

    lines = []
    for run in recipes.WANTED:
        name, folder = run.recipe.name, Path("runs") / run.recipe.name
        state = (
            "in the zoo"
            if name in registry.zoo()
            else "done"
            if (folder / "recipe.json").exists()
            else "begun"
            if (folder / "checkpoint.pt").exists()
            else "wanted"
        )
        lines += [
            f"{state:<10} vitregs train {' '.join(run.words)} --device {run.device}",
            f"{'':<10} {run.price}: {run.why}",
        ]
    return lines


def models(
    part: Annotated[str, Parameter(help="show only names that contain this", show_default=False)] = "", /
) -> None:
    """List the models that can be named."""
    from vitregs.models import registry

    ours, theirs = ([n for n in names if part in n] for names in (registry.zoo(), registry.published()))
    print("\n".join(["trained here (data/zoo):", *(f"  {n}" for n in ours), "from timm:", *(f"  {n}" for n in theirs)]))
    print(
        "\n`vitregs models PART` shows names that contain PART. A name of timm may carry the tag of its weights (.lvd142m), and\n"
        "any name an ending: +tt1 (its register neurons moved to an added token), +zero8 (eight added tokens of zeros)."
    )


def _folder(what: str) -> Parameter:
    return Parameter(help=f"folder of parquet files: {what}", show_default=False)


def measure(
    network: Annotated[str, Parameter(help="any name that `vitregs models` lists")],
    /,
    *,
    weights: Annotated[str | None, Parameter(help="local weight file instead of the hub's weights")] = None,
    coco: Annotated[str | None, _folder("COCO images with boxes and masks")] = None,
    imagenette: Annotated[str | None, _folder("Imagenette, with labels")] = None,
    tiny_imagenet: Annotated[str | None, _folder("Tiny-ImageNet, with labels")] = None,
    cifar10: Annotated[str | None, _folder("CIFAR-10, with labels")] = None,
    only: Annotated[
        list[str] | None,
        Parameter(
            help="names of arrays (default: all whose images are given)", consume_multiple=True, converter=_several
        ),
    ] = None,
    out: Annotated[
        Path | None, Parameter(help="folder that gets a folder for the network (default: data/results/published)")
    ] = None,
    device: Annotated[str, Parameter(help="auto, cpu, cuda, …")] = "auto",
) -> None:
    """Store what chapters draw of a published network.

    It is measured once, on photographs and on the image sets that are given.
    """
    from time import perf_counter

    from vitregs import cache
    from vitregs.claims import networks
    from vitregs.models import registry

    folder = out or networks.FOLDER
    for name in only or []:
        networks.entry(name)
    registry.check(network)
    cache.check_writable(folder)
    given = {"coco": coco, "imagenette": imagenette, "tiny-imagenet": tiny_imagenet, "cifar10": cifar10}
    places = {name: place for name, place in given.items() if place is not None}
    backbone = registry.load(network, weights=weights, device=device)
    start = perf_counter()
    for name, file in networks.measure_all(backbone, places, only=only or [], folder=folder):
        size, now = file.stat().st_size / 1e6, perf_counter()
        print(f"{name:<32}{now - start:7.1f} s {size:7.3f} MB  {file}", flush=True)
        start = now


def scoreboard(
    *,
    results: Annotated[Path | None, Parameter(help="folder of stored results (default: data/results)")] = None,
    markdown: Annotated[bool, _flag("print the page of the book")] = False,
    boxes: Annotated[
        Path | None,
        Parameter(help="put the verdicts into the executed chapters of this folder instead", show_default=False),
    ] = None,
) -> None:
    """Show every claim of the paper, our number and the verdict."""
    from vitregs.claims import ledger
    from vitregs.claims.scoreboard import listing, page, table

    if boxes is not None:
        _refresh(boxes, results, markdown)
        return
    board = table(results or ledger.RESULTS)
    print(page(board) if markdown else listing(board))


def _refresh(folder: Path, results: Path | None, markdown: bool) -> None:
    """Bring the result boxes of executed chapters up to date. Raises InputError for a folder without any."""
    from vitregs.book import execute

    if results is not None or markdown:
        raise InputError("--boxes shows the book's own results: leave out --results and --markdown")
    if not list(folder.glob("[0-9]*.ipynb")):
        raise InputError(f"{folder} holds no chapters: name a folder as notebooks")
    for path in execute.refresh_boxes(folder):
        print(f"verdicts brought up to date: {path}")


def _kind(argument: Any) -> str:
    """The type of an option, in the words of its help: int, float, bool …"""
    hint = argument.parameter.metavar or get_hint_name(argument.hint)
    return hint.lower().removesuffix("|none").removeprefix("list[").removesuffix("]")


def _problem(error: CycloptsError) -> InputError:
    """Say in our words what Cyclopts found wrong."""
    chain = list(error.command_chain or ())
    command, name = " ".join(["vitregs", *chain]), error.argument.name if error.argument else ""
    in_chapter = len(chain) == 2  # run CHAPTER
    match error:
        case UnknownCommandError():
            word = (error.unused_tokens or [""])[0]
            if word.startswith("-"):
                return InputError(f"unknown argument {word!r}: see vitregs --help")
            return unknown("command", word, COMMANDS)
        case UnknownOptionError() if chain == ["run"]:
            return InputError("name the chapter first: vitregs run CHAPTER --name value")
        case UnknownOptionError():
            known = [n for a in error.argument_collection for n in a.names if n.startswith("--")]
            word = (error.token.keyword or error.token.value).partition("=")[0]
            if in_chapter:
                wrong = word.lstrip("-").replace("-", "_")
                return unknown(f"parameter of {chain[1]}", wrong, {n[2:].replace("-", "_") for n in known})
            return unknown("argument", word, known)
        case UnusedCliTokensError() if in_chapter:
            return InputError(f"{(error.unused_tokens or [''])[0]!r} stands alone: give parameters as --name value")
        case UnusedCliTokensError():
            return InputError(f"unknown argument {(error.unused_tokens or [''])[0]!r}: see {command} --help")
        case CoercionError() if error.argument:
            given = [error.token] if error.token else error.argument.tokens
            return InputError(f"{name} takes {_kind(error.argument)}, not {' '.join(t.value for t in given)!r}")
        case MissingArgumentError() if name.startswith("-"):
            return InputError(f"{name} takes one value, not 0")
        case MissingArgumentError():
            return InputError(f"the following arguments are required: {name.lower()} (see {command} --help)")
        case RepeatArgumentError():
            return InputError(f"{error.token.keyword} is given twice")
        case ValidationError():
            return InputError(f"{name} {error.exception_message}")
    return InputError(str(error))


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line: words (default sys.argv) → exit code; a mistake in the input is one line and code 2."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.showwarning = _show_warning
    words = list(sys.argv[1:] if words is None else words)
    try:
        if not words:
            raise InputError(
                f"the following arguments are required: command ({', '.join(COMMANDS)}; see vitregs --help)"
            )
        app = _app()
        if words[0] == "run" and words[1:2] in (["-h"], ["--help"]):
            del words[1:]
        if words[0] == "run" and words[1:] and not words[1].startswith("-"):
            from vitregs.book import parameters

            words[1] = parameters.find(words[1])
            app["run"].command(_chapter(words[1]), name=words[1], help=f"Execute {words[1]}.")
        try:
            app(words, verbose=False)
        except CycloptsError as error:
            raise _problem(error) from error
    except InputError as problem:
        print(f"vitregs: {problem}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"vitregs: {stop}", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print("vitregs: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
