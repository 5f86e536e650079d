"""Figures of the chapters on probes: tables in, figures out."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from vitregs.canvas import PALETTE, axes_grid

MARKS = {"cls": ("s", 7), "normal": ("o", 0), "outlier": ("D", 3), "register": ("^", 2)}  # shape, place in the palette


def token_scores(table: pd.DataFrame) -> Figure:
    """Scores of one token a picture, task by task (Table 1): rows model, task, token, score, low, high, chance in per cent →
    Figure, one panel a model; a grey tick is chance, a line the 95 % interval."""
    models, tasks = list(dict.fromkeys(table["model"])), list(dict.fromkeys(table["task"]))
    figure, axes = axes_grid(1, len(models), 1.6 + 2.3 * len(models), 0.9 + 0.34 * len(tasks), sharey=True, sharex=True)
    for axis, model in zip(axes[0], models, strict=True):
        part = table[table["model"] == model]
        kinds = [k for k in MARKS if k in set(part["token"])]
        for j, kind in enumerate(kinds):
            rows = part[part["token"] == kind].set_index("task").reindex(tasks)
            y = np.arange(len(tasks)) + (j - (len(kinds) - 1) / 2) * 0.18
            shape, colour = MARKS[kind]
            axis.hlines(y, rows["low"], rows["high"], color=PALETTE[colour], lw=1.2, alpha=0.6)
            axis.plot(rows["score"], y, shape, ms=4, color=PALETTE[colour], label="CLS" if kind == "cls" else kind)
        chance = part.groupby("task")["chance"].first().reindex(tasks)
        axis.plot(chance, np.arange(len(tasks)), "|", color="grey", ms=13, label="chance")
        axis.set(title=model, xlabel="score, %", xlim=(0, 100))
    axes[0, 0].set(yticks=np.arange(len(tasks)), yticklabels=tasks, ylim=(len(tasks) - 0.5, -0.5))
    named = max((axis.get_legend_handles_labels() for axis in axes[0]), key=lambda found: len(found[1]))
    figure.legend(*named, loc="outside lower center", ncols=5)
    return figure
