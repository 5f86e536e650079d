"""Artifacts taken from a trained network, and what comes back while it is trained further (beside Fig 4b): tables and figures."""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vitregs import paths
from vitregs.cache import load_dataset
from vitregs.errors import InputError
from vitregs.models import registry, test_time
from vitregs.report.style import PALETTE, axes_grid, note
from vitregs.train import monitor

FOLDER = paths.ROOT / "data" / "results" / "regrowth"  # the history of a run in each file
ANSWERS = {True: "yes", False: "no", None: "inconclusive"}
SEEDED = re.compile(r"(?P<arm>.+?)(?:-seed\d+)?")
WITH = re.compile(r"(?P<start>.+?)(?:-reg(?P<registers>\d+))?")


def histories(*beginnings: str, folder: Path = FOLDER) -> dict[str, xr.Dataset]:
    """Read what was watched in the runs that start from a trained network.

    Args:
        beginnings: Of the names of runs; without any, all runs are read.
        folder: Holds a file for each.

    Returns:
        {name of the run: history}, in the order of the beginnings.
    """
    files = sorted(folder.glob("*.nc"))
    chosen = [f for b in beginnings or ("",) for f in files if f.stem.startswith(b)]
    return {path.stem: load_dataset(path) for path in dict.fromkeys(chosen)}


def arms(runs: Mapping[str, xr.Dataset]) -> dict[str, list[xr.Dataset]]:
    """Put the seeds of a recipe together: {run: history} → {recipe: its histories}."""
    found: dict[str, list[xr.Dataset]] = {}
    for name, log in runs.items():
        match = SEEDED.fullmatch(name)
        assert match
        found.setdefault(match["arm"], []).append(log)
    return found


def untouched(runs: Mapping[str, xr.Dataset]) -> float:
    """Share of outliers before anything is changed: the first look of `regrow-kept`, whose network is as published.

    Raises InputError if no such run is there.
    """
    if "regrow-kept" not in runs:
        raise InputError(
            "the share of outliers of the untouched network is that of the run regrow-kept, which is not here"
        )
    return float(runs["regrow-kept"]["above"].isel(step=0, layer=-1))


def _answer(logs: Sequence[xr.Dataset], before: float) -> str:
    """What all seeds say, else "inconclusive"."""
    said = {monitor.outliers_present(log, before) for log in logs}
    return ANSWERS[said.pop()] if len(said) == 1 else ANSWERS[None]


def _over(values: Sequence[float], digits: int) -> str:
    """Mean over seeds, and their ends: numbers → text."""
    low, high = min(values), max(values)
    text = f"{np.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({low:.{digits}f} to {high:.{digits}f})"


def _since(log: xr.Dataset, before: float) -> str:
    """The first step at which outliers are back, after looks without them."""
    here = log["above"].isel(layer=-1).values >= monitor.BACK * before
    late = np.flatnonzero(here)
    return "start" if here[0] else str(int(log["step"][late[0]])) if len(late) else "never"


def _old(log: xr.Dataset, known: Mapping[int, Sequence[int]]) -> str:
    """How many register neurons of the last look were register neurons of the published network."""
    found = str(log["neurons"].values[-1]).split()
    listed = {f"{b}:{j}" for b, numbers in known.items() for j in numbers}
    return f"{len(listed & set(found))} of {len(found)}" if found else "–"


def ratios(log: xr.Dataset) -> np.ndarray:
    """Mean norm of registers over the median patch norm in the last layer: history → one number a look, nan without registers."""
    if "registers" not in log:
        return np.full(log.sizes["step"], np.nan)
    result: np.ndarray = (log["registers"].isel(layer=-1).mean("register") / log["median"].isel(layer=-1)).values
    return result


def outcomes(runs: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """How every arm ended.

    Args:
        runs: History of every run, by name.

    Returns:
        A row for each arm: seeds, steps, outliers in per cent of the patches at the start and at the end (mean over seeds and
        their range), whether they are present at the end by the rule of data/results/LOG.md, since which step, the norm of
        registers over the patches' median, register neurons that are the published network's, agreement with the untouched
        network and accuracy, in per cent of the images.
    """
    before, rows = untouched(runs), []
    known = test_time.read_list(test_time.LISTS / "deit_tiny_patch16_224.json").neurons
    for name, logs in arms(runs).items():
        ends = [log.isel(step=-1) for log in logs]
        above = [100 * log["above"].isel(layer=-1).values for log in logs]
        rows.append(
            {
                "arm": name,
                "seeds": len(logs),
                "steps": int(ends[0]["step"]),
                "outliers at the start, %": _over([a[0] for a in above], 1),
                "at the end, %": _over([a[-1] for a in above], 1),
                "present": _answer(logs, before),
                "since step": ", ".join(_since(log, before) for log in logs),
                "registers / patches": "–" if "registers" not in ends[0] else _over([ratios(x)[-1] for x in logs], 2),
                "old neurons": ", ".join(_old(log, known) for log in logs),
                "agreement, %": _over([100 * float(e["agreement"]) for e in ends], 0),
                "accuracy, %": _over([100 * float(e["accuracy"]) for e in ends], 1),
            }
        )
    return pd.DataFrame(rows)


def _parameters(log: xr.Dataset) -> int:
    """Count the parameters of a run's network: its history → number."""
    chosen = json.loads(log.attrs["recipe"])
    facts: dict[str, Any] = {"architecture": chosen["init"], "num_classes": 1000, "reg_tokens": chosen["registers"]}
    facts |= {"img_size": chosen["image_size"], "pre_norm": chosen["patch_norm"]}
    net = registry.build(facts | ({"attention": chosen["attention"]} if "attention" in chosen else {}))
    return sum(p.numel() for p in net.parameters())


def remedies(runs: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """What remedies that are trained do to the same network.

    Args:
        runs: History of every run, by name.

    Returns:
        A row for each arm, mean over seeds and their range: parameters that are added in per cent, outliers in per cent of the
        patches at the start and at the end, whether they are present at the end, the largest attention sink on a patch in fair
        shares at the start and at the end, the fingerprint's verdict, agreement with the untouched network, and accuracy, in
        per cent of the images.
    """
    before, rows = untouched(runs), []
    plain = _parameters(runs["regrow-kept"])
    for name, logs in arms(runs).items():
        above = [100 * log["above"].isel(layer=-1).values for log in logs]
        sinks = [log["sink"].sel(kind="patch").max("block").values for log in logs]
        ends = [log.isel(step=-1) for log in logs]
        rows.append(
            {
                "arm": name,
                "seeds": len(logs),
                "parameters, + %": f"{100 * (_parameters(logs[0]) / plain - 1):.2f}",
                "outliers at the start, %": _over([a[0] for a in above], 1),
                "at the end, %": _over([a[-1] for a in above], 1),
                "present": _answer(logs, before),
                "sink at the start": _over([s[0] for s in sinks], 1),
                "sink at the end": _over([s[-1] for s in sinks], 1),
                "verdict": ", ".join(dict.fromkeys(str(e["verdict"].values) for e in ends)),
                "agreement, %": _over([100 * float(e["agreement"]) for e in ends], 0),
                "accuracy, %": _over([100 * float(e["accuracy"]) for e in ends], 1),
            }
        )
    return pd.DataFrame(rows)


def saved(runs: Mapping[str, xr.Dataset]) -> pd.DataFrame:
    """What registers change at the end of training: {run: history} → a row for each run that has a partner without registers of
    the same seed: difference of outliers, agreement and accuracy, in points."""
    rows = []
    for name, log in runs.items():
        match = WITH.fullmatch(SEEDED.fullmatch(name)["arm"])  # type: ignore[index]
        if not match or not match["registers"]:
            continue
        partner = runs.get(name.replace(f"-reg{match['registers']}", ""))
        if partner is None:
            continue
        one, two = log.isel(step=-1), partner.isel(step=-1)
        rows.append(
            {
                "run": name,
                "outliers": 100 * float(one["above"].isel(layer=-1) - two["above"].isel(layer=-1)),
                "agreement": 100 * float(one["agreement"] - two["agreement"]),
                "accuracy": 100 * float(one["accuracy"] - two["accuracy"]),
            }
        )
    return pd.DataFrame(rows, columns=["run", "outliers", "agreement", "accuracy"])


def _curves(
    axis: Axes, groups: Mapping[str, Sequence[xr.Dataset]], colours: Mapping[str, tuple[float, float, float]]
) -> None:
    """Outliers in the last layer over steps, a line a seed."""
    for name, logs in groups.items():
        for i, log in enumerate(logs):
            value = 100 * log["above"].isel(layer=-1)
            axis.plot(log["step"], value, color=colours[name], label=None if i else name, lw=1.4, alpha=0.85)


def _steps(axis: Axes, last: int) -> None:
    """Steps that double, and 0."""
    axis.set_xscale("symlog", base=2, linthresh=16)
    ticks = [0, *(2**k for k in range(4, 20, 2) if 2**k < 0.8 * last), last]
    axis.set(xticks=ticks, xticklabels=[f"{t:,}" for t in ticks], xlabel="training step", xlim=(-1, 1.1 * last))
    axis.minorticks_off()


def plot_runs(runs: Mapping[str, xr.Dataset]) -> Figure:
    """What comes back over training (beside Fig 4b): {run: history} → Figure of four panels: outliers without and with registers,
    norms of registers, agreement with the untouched network; a line a seed."""
    if not runs:
        return note("no run starts from a trained network")
    groups, before = arms(runs), untouched(runs)
    starts = list(dict.fromkeys(WITH.fullmatch(name)["start"] for name in groups))  # type: ignore[index]
    shades = dict(zip(starts, cycle(PALETTE), strict=False))
    colours = {name: shades[WITH.fullmatch(name)["start"]] for name in groups}  # type: ignore[index]
    figure, axes = axes_grid(2, 2, 8.4, 6.2)
    bare = {n: g for n, g in groups.items() if "registers" not in g[0]}
    given = {n: g for n, g in groups.items() if n not in bare}
    top = 1.08 * 100 * max(before, max(float(log["above"].isel(layer=-1).max()) for log in runs.values()))
    for axis, part, title in ((axes[0, 0], bare, "without registers"), (axes[0, 1], given, "with registers")):
        axis.axhline(100 * before, color="grey", ls=":", lw=1)
        _curves(axis, part, colours)
        axis.set(title=title, ylabel="outliers, % of patches", ylim=(-0.02 * top, top))
    for name, logs in given.items():
        for log in logs:
            axes[1, 0].plot(log["step"], ratios(log), color=colours[name], lw=1.4, alpha=0.85)
    axes[1, 0].axhline(monitor.LARGE, color="grey", ls=":", lw=1)
    axes[1, 0].set(title="norms of registers", ylabel="mean norm / median of patches")
    for name, logs in groups.items():
        for log in logs:
            dash = "--" if name in given else "-"
            axes[1, 1].plot(log["step"], 100 * log["agreement"], color=colours[name], ls=dash, lw=1.2, alpha=0.85)
    axes[1, 1].set(title="agreement with the untouched network", ylabel="% of images", ylim=(0, 100))
    last = max(int(log["step"][-1]) for log in runs.values())
    for axis in axes.flat:
        _steps(axis, last)
    handles = [axes[0, 0].plot([], [], color=shades[s])[0] for s in starts]
    figure.legend(handles, starts, loc="outside lower center", ncols=min(4, len(starts)))
    return figure
