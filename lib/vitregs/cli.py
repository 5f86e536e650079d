"""The command `vitregs`: diagnose a model, run a chapter, train a recipe, list the models, show the scoreboard."""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from vitregs.problems import Interrupted, Problem, unknown

COMMANDS = ("diagnose", "run", "train", "models", "scoreboard")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise Problem(message)


def _show_warning(message: object, *_rest: object, **_more: object) -> None:
    print(f"vitregs: {message}", file=sys.stderr)


def _parser() -> _Parser:
    parser = _Parser(prog="vitregs", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    look = commands.add_parser("diagnose", help="does this ViT have artifacts?")
    look.add_argument("model", help="a zoo name or any timm ViT (see `vitregs models`)")
    look.add_argument("--weights", help="local .safetensors (or PyTorch checkpoint) instead of the hub's weights")
    look.add_argument("--images", default="scenes", help="scenes, a folder, a parquet file or folder, or a hub name")
    look.add_argument("--split", help="split of a data set")
    look.add_argument("--count", type=int, default=64, help="how many pictures (default 64)")
    look.add_argument("--size", type=int, nargs="+", help="side, or height and width, in pixels (default: the model's)")
    look.add_argument("--seed", type=int, default=0, help="which pictures are drawn (default 0)")
    look.add_argument("--cutoff", type=float, help="fixed outlier cut-off on norms instead of the statistical rule")
    look.add_argument("--device", default="auto", help="auto, cpu, cuda, … (default auto)")
    look.add_argument("--batch", type=int, default=16, help="pictures at a time (default 16)")
    look.add_argument("--json", action="store_true", help="print JSON")
    look.add_argument("--plot", type=Path, help="write a picture of the norms to this file (.png, .svg or .pdf)")

    run = commands.add_parser(
        "run",
        help="execute a chapter with other models, pictures or settings",
        add_help=False,
        allow_abbrev=False,
        description="Give parameters as --name value; `vitregs run CHAPTER --help` lists them.",
    )
    run.add_argument("chapter", nargs="?")
    run.add_argument("--out", type=Path, help="output notebook (default build/runs/CHAPTER.ipynb)")
    run.add_argument("--results", type=Path, help="folder for measured results (default build/results)")

    train = commands.add_parser("train", help="train a small ViT")
    train.add_argument("recipe", nargs="?", help="a recipe's name; none lists them")
    train.add_argument("settings", nargs="*", help="overrides, as steps=1000 lr=5e-4")
    train.add_argument("--out", type=Path, help="folder (default runs/RECIPE)")
    train.add_argument("--device", default="auto", help="auto, cpu, cuda, … (default auto)")
    train.add_argument("--list", action="store_true", help="list the runs still wanted, most informative first")
    train.add_argument("--images", help="where the recipe's pictures lie: a folder, parquet files (default: the hub)")
    train.add_argument("--minutes", type=float, help="stop in time, with a checkpoint; the same command goes on")
    train.add_argument("--eager", action="store_true", help="do not compile, where there is no C compiler")
    train.add_argument("--restart", action="store_true", help="start anew instead of resuming")

    listing = commands.add_parser("models", help="list the models that can be named")
    listing.add_argument("part", nargs="?", default="", help="show only names that contain this")

    board = commands.add_parser("scoreboard", help="every claim of the paper, our number and the verdict")
    board.add_argument("--results", type=Path, help="folder of stored results (default data/results)")
    board.add_argument("--markdown", action="store_true", help="print the page of the book")
    return parser


def _diagnose(words: argparse.Namespace) -> None:
    from vitregs import backbones, images
    from vitregs.diagnose import diagnose

    if words.size and len(words.size) > 2:
        raise Problem(f"--size takes a side, or height and width, not {len(words.size)} numbers")
    if words.plot and words.plot.suffix not in (".png", ".svg", ".pdf"):
        raise Problem(f"--plot writes .png, .svg or .pdf, not {words.plot.suffix or words.plot.name!r}")
    for name, least in (("batch", 1), ("count", 1), ("seed", 0)):
        if getattr(words, name) < least:
            raise Problem(f"--{name} must be {least} or more, not {getattr(words, name)}")
    backbone = backbones.load(words.model, weights=words.weights, device=words.device)
    size = (words.size[0], words.size[-1]) if words.size else backbone.size
    backbone.grid(size)
    source = images.load(
        words.images, size=size, count=words.count, seed=words.seed, split=words.split, preparation=backbone.preparation
    )
    found = diagnose(backbone, source, cut=words.cutoff, batch=words.batch)
    if words.plot:
        from vitregs import draw
        from vitregs.results import write_whole

        figure = draw.diagnosis(found)
        write_whole(words.plot, lambda spare: figure.savefig(spare, format=words.plot.suffix[1:], dpi=150))
    print(json.dumps(found.facts(), indent=1) if words.json else found.text())


def _run(words: argparse.Namespace, rest: Sequence[str]) -> None:
    from vitregs import chapters, results

    if words.chapter is None:
        print("usage: vitregs run CHAPTER [--out FILE] [--results FOLDER] [--PARAMETER VALUE …]\n\nchapters:")
        print("\n".join(f"  {name}" for name in chapters.names()))
        return
    chapter = chapters.find(words.chapter)
    known = chapters.parameters(chapter)
    if "--help" in rest or "-h" in rest:
        print(f"usage: vitregs run {chapter} [--out FILE] [--results FOLDER] [--PARAMETER VALUE …]\n")
        for p in known.values():
            print(f"  --{p.name:<12} {p.type.__name__:<6} {p.help}\n{'':<22}default: {p.default!r}")
        return
    values, name = {}, ""
    given: dict[str, list[str]] = {}
    for word in rest:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            name = name.replace("-", "_")
            if name not in known:
                raise unknown(f"parameter of {chapter}", name, known)
            given[name] = [value] if value else []
        elif name:
            given[name].append(word)
        else:
            raise Problem(f"{word!r} stands alone: give parameters as --name value")
    values = {n: known[n].parse(v) for n, v in given.items()}
    build = results.ROOT / "build"
    out = words.out or build / "runs" / f"{chapter}.ipynb"
    if out.suffix != ".ipynb":
        raise Problem(f"--out must end in .ipynb, not {out}")
    print(chapters.execute(chapter, values, out, words.results or build / "results"))


def _train(words: argparse.Namespace) -> None:
    from tqdm import tqdm

    from vitregs.pretrain import loop, recipe, recipes

    if words.list:
        print("\n".join(_wanted()))
        return
    if not words.recipe:
        print("\n".join(f"{r.name:<24} {r.about}" for r in recipes.RECIPES.values()))
        print(
            '\nAny of them with registers or another seed: "-reg4", "-seed1" behind the name. Runs still wanted: --list'
        )
        return
    chosen = recipe.parse(recipes.recipe(words.recipe), words.settings)
    out = words.out or Path("runs") / chosen.name
    done = loop.train(
        chosen,
        out=out,
        device=words.device,
        images=words.images,
        resume=not words.restart,
        minutes=words.minutes,
        compiled=False if words.eager else None,
        report=tqdm.write,
    )
    if done:
        print(done)


def _wanted() -> list[str]:
    """The runs still wanted, most informative first, and how far each is."""
    from vitregs import backbones
    from vitregs.pretrain import recipes

    lines = []
    for run in recipes.WANTED:
        name, folder = run.recipe.name, Path("runs") / run.recipe.name
        state = (
            "in the zoo"
            if name in backbones.zoo()
            else "done"
            if (folder / "recipe.json").exists()
            else "begun"
            if (folder / "checkpoint.pt").exists()
            else "wanted"
        )
        lines += [f"{state:<10} vitregs train {' '.join(run.words)} --device cuda", f"{'':<10} {run.price}: {run.why}"]
    return lines


def _models(words: argparse.Namespace) -> None:
    from vitregs import backbones

    ours, theirs = ([n for n in names if words.part in n] for names in (backbones.zoo(), backbones.published()))
    print("\n".join(["trained here (data/zoo):", *(f"  {n}" for n in ours), "from timm:", *(f"  {n}" for n in theirs)]))


def _scoreboard(words: argparse.Namespace) -> None:
    from vitregs import claims

    board = claims.scoreboard(words.results or claims.RESULTS)
    print(claims.page(board) if words.markdown else claims.listing(board))


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line: words (default sys.argv) → exit code; a mistake in the input is one line and code 2."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.showwarning = _show_warning
    words = list(sys.argv[1:] if words is None else words)
    try:
        if words and not words[0].startswith("-") and words[0] not in COMMANDS:
            raise unknown("command", words[0], COMMANDS)
        if words[:1] == ["run"] and words[1:] and words[1].startswith("-") and words[1] not in ("-h", "--help"):
            raise Problem("name the chapter first: vitregs run CHAPTER --name value")
        known, rest = _parser().parse_known_args(words)
        if known.command == "train":  # argparse takes no settings behind options
            known.settings += [w for w in rest if not w.startswith("-")]
            rest = [w for w in rest if w.startswith("-")]
            if not known.recipe and known.settings:
                known.recipe = known.settings.pop(0)
        if rest and known.command != "run":
            raise Problem(f"unknown argument {rest[0]!r}: see vitregs {known.command} --help")
        if known.command == "run":
            _run(known, rest)
        else:
            commands = {"diagnose": _diagnose, "train": _train, "models": _models, "scoreboard": _scoreboard}
            commands[known.command](known)
    except Problem as problem:
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
