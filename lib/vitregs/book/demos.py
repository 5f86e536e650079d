"""Training as a lesson: a short run of every objective, what each is shown, and a run whose norms are watched live."""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from matplotlib.figure import Figure
from torch import Tensor

from vitregs import cache, report
from vitregs.errors import InputError
from vitregs.train import data, learners, loop
from vitregs.train.config import Clip, Dino, DinoV2, Mae, Recipe, parse
from vitregs.train.recipes import recipe

SHORT_WARMUP = 10  # steps; the recipes' own would last longer than a short run


def short(name: str, steps: int, words: Sequence[str] = ()) -> Recipe:
    """A recipe cut to some steps, its warm-up with it: name, steps, overrides in words → Recipe."""
    chosen = recipe(name)
    warmup = min(chosen.warmup, max(1, min(SHORT_WARMUP, steps // 4)))
    return parse(chosen, [f"steps={steps}", f"warmup={warmup}", *words])


def taste(
    names: Sequence[str], *, steps: int, words: Sequence[str] = (), images: str = "scenes", device: str = "auto"
) -> dict[str, xr.Dataset]:
    """Train each recipe for some steps in a folder that is thrown away: names, steps, overrides → {name: history}."""
    found = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            source = None if images == "scenes" else images
            loop.train(
                short(name, steps, words),
                out=Path(folder),
                device=device,
                images=source,
                every=steps,
                report=_quiet,
                final=False,
            )
            found[name] = cache.load_dataset(Path(folder) / "history.nc")
    return found


def _quiet(_line: str) -> None:
    return


def progress(histories: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """How far short runs came: {name: history} → a row each: steps, loss at first and at last."""
    return pd.DataFrame(
        [(n, int(h["step"][-1]), float(h["loss"][1]), float(h["loss"][-1])) for n, h in histories.items()],
        columns=["recipe", "steps", "loss at first", "loss at last"],
    )


def chance(chosen: Recipe) -> float:
    """Loss of a network that knows nothing and says so: recipe → the loss of even scores; KoLeo is left out."""
    own = chosen.objective
    match own:
        case Clip():
            return math.log(chosen.batch)
        case Mae():
            return 1.0  # the variance of a normalised patch
        case DinoV2():
            return math.log(own.prototypes) + own.ibot * own.masked_pictures * math.log(own.patch_prototypes)
        case Dino():
            return math.log(own.prototypes)
        case _:
            return math.log(2)  # of every class


def _image(pixels: Tensor) -> np.ndarray:
    return pixels.detach().float().cpu().permute(0, 2, 3, 1).numpy()


def _learner(name: str, count: int, images: str) -> tuple[Any, data.Batch]:
    """A learner, and images that are held out from it."""
    chosen = recipe(name)
    feed = data.make(chosen, torch.device("cpu"), None if images == "scenes" else images)
    learner = learners.learner(chosen, feed).eval()
    torch.manual_seed(0)
    return learner, feed.held(count)


@torch.no_grad()
def masked(name: str, *, count: int = 6, images: str = "scenes") -> dict[str, np.ndarray]:
    """What an MAE recipe is shown and asked for: name, images → {row label: images}."""
    learner, batch = _learner(name, count, images)
    _, hidden = learner.draw(len(batch), batch.pixels.device)
    patches = learner.patchify(batch.pixels)
    seen = torch.where(hidden[..., None], torch.full_like(patches, 0.5), patches)
    wanted = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    target = torch.where(hidden[..., None], (wanted * 0.2 + 0.5).clamp(0, 1), torch.ones_like(patches))
    return {
        "image": _image(batch.pixels),
        "what it sees": _image(learner.unpatchify(seen)),
        "what it must, paint": _image(learner.unpatchify(target)),
    }


@torch.no_grad()
def crops(name: str, *, count: int = 6, images: str = "scenes") -> dict[str, np.ndarray]:
    """What a DINO or DINOv2 recipe is shown: name, images → {row label: images}; iBOT's masks in grey."""
    learner, batch = _learner(name, count, images)
    large, small = learner.crops(batch.pixels)
    rows = {"image": _image(batch.pixels), "large crop 1": _image(large[0]), "large crop 2": _image(large[1])}
    if small is not None:
        rows |= {f"small crop {i + 1}": _image(part) for i, part in enumerate(small)}
    if hasattr(learner, "masks"):
        hidden = learner.masks(2 * len(batch), batch.pixels.device)[: len(batch)]
        patch = large.shape[-1] // hidden.shape[-1]
        grid = hidden.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]
        rows["masked for iBOT"] = _image(torch.where(grid, torch.full_like(large[0], 0.5), large[0]))
    return rows


def captions(name: str, *, count: int = 4, images: str = "scenes") -> pd.DataFrame:
    """What a CLIP recipe reads beside its images: name, images → a caption a row."""
    _, batch = _learner(name, count, images)
    if batch.captions is None:
        raise InputError(f"{images} has no captions")
    return pd.DataFrame({"caption": batch.captions})


class Live:
    """A figure on the page that is drawn anew whenever a run has something to show."""

    def __init__(self, draw: Callable[[xr.Dataset], Figure]) -> None:
        self.draw, self.handle = draw, None

    def __call__(self, log: xr.Dataset) -> None:
        """Show a history."""
        from IPython.display import display

        figure = self.draw(log)
        if self.handle is None:
            self.handle = display(figure, display_id=True)
        else:
            self.handle.update(figure)


def follow(
    chosen: Recipe, *, every: int, layer: int = -1, images: str = "scenes", device: str = "auto", out: str = ""
) -> xr.Dataset:
    """Train a recipe and show its norms while it trains: recipe, steps between looks, layer shown → history.

    With `out` the run is kept there and goes on where it stopped; without, it is thrown away.
    """
    live = Live(lambda log: report.training.plot_training({chosen.name: log}, layer))
    with tempfile.TemporaryDirectory() as spare:
        folder = Path(out).expanduser() if out else Path(spare)
        loop.train(
            chosen, out=folder, device=device, images=None if images == "scenes" else images, every=every,
            report=_quiet, follow=live, final=bool(out),
        )  # fmt: skip
        return cache.load_dataset(folder / "history.nc")
