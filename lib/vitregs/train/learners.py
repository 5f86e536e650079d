"""An objective's name becomes a learner: a module with a loss, the ViT inside it, and what happens around an update."""

from typing import Any

import torch

from vitregs.train.config import Recipe
from vitregs.train.data import Feed
from vitregs.train.objectives import clip, dino, dinov2, mae, supervised

LEARNERS: dict[str, Any] = {
    "supervised": supervised.Learner,
    "clip": clip.Learner,
    "mae": mae.Learner,
    "dino": dino.Learner,
    "dinov2": dinov2.Learner,
}


def learner(recipe: Recipe, feed: Feed) -> Any:
    """Make the learner of a recipe with fresh weights, the same for the same seed: recipe, its data → module."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return LEARNERS[recipe.objective.name](recipe, feed).train()  # a teacher turns itself to evaluation
