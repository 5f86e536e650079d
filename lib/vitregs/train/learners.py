"""An objective's name becomes a learner: a module with a loss, the ViT inside it, and what happens around an update."""

from typing import Any

import torch

from vitregs.train.config import Recipe
from vitregs.train.data import Feed
from vitregs.train.objectives import clip, dino, dinov2, distil, mae, supervised
from vitregs.train.start import Start

LEARNERS: dict[str, Any] = {
    "supervised": supervised.Learner,
    "clip": clip.Learner,
    "mae": mae.Learner,
    "dino": dino.Learner,
    "dinov2": dinov2.Learner,
    "distil": distil.Learner,
}


def learner(recipe: Recipe, feed: Feed, start: Start | None = None) -> Any:
    """Make the learner of a recipe as it is before the first step, the same for the same seed.

    Args:
        recipe: What is trained.
        feed: Its images.
        start: Where its weights come from, None for random ones.

    Returns:
        The module.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return LEARNERS[recipe.objective.name](recipe, feed, start).train()  # a teacher turns itself to evaluation
