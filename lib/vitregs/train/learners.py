"""An objective's name becomes a learner: a module with a loss, the ViT inside it, and what happens around an update."""

from importlib import import_module
from typing import Any

import torch

from vitregs.train.config import Recipe
from vitregs.train.data import Feed
from vitregs.train.start import Start


def learner(recipe: Recipe, feed: Feed, start: Start | None = None) -> Any:
    """Make the learner of a recipe as it is before the first step, the same for the same seed.

    The module of its objective is imported here, so that a run needs the packages of its own objective alone.

    Args:
        recipe: What is trained.
        feed: Its images.
        start: Where its weights come from, None for random ones.

    Returns:
        The module.
    """
    home = import_module(f"vitregs.train.objectives.{recipe.objective.name}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return home.Learner(recipe, feed, start).train()  # a teacher turns itself to evaluation
