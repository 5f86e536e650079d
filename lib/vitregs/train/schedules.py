"""What changes while a network trains: learning rate, weight decay, temperatures, momenta; and the optimiser they act on."""

import math

import torch
from torch import nn

from vitregs.train.config import Recipe


def cosine(step: float, steps: float, start: float, end: float) -> float:
    """Half a cosine from start to end over the steps; constant behind them."""
    part = min(1.0, max(0.0, step / steps)) if steps > 0 else 1.0
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * part))


def ramp(step: float, steps: float, start: float, end: float) -> float:
    """A line from start to end over the steps; constant behind them."""
    return end if step >= steps else start + (end - start) * step / steps


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine to 1 % of the peak: recipe, step → learning rate."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    return cosine(step - recipe.warmup, max(1, recipe.steps - recipe.warmup), recipe.lr, 0.01 * recipe.lr)


def weight_decay(recipe: Recipe, step: int) -> float:
    """Constant, or a cosine to `weight_decay_end`: recipe, step → weight decay."""
    end = recipe.weight_decay if recipe.weight_decay_end is None else recipe.weight_decay_end
    return cosine(step, recipe.steps, recipe.weight_decay, end)


def optimiser(net: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices: biases, norms, tokens (words too) and positions are exempt (paper, section 3.1)."""
    named = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
    free = [p for n, p in named if p.ndim < 2 or "token" in n or "pos" in n]
    exempt = {id(p) for p in free}
    groups = [
        {"params": [p for _, p in named if id(p) not in exempt], "weight_decay": recipe.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, recipe.beta2), fused=True)


def apply(optimizer: torch.optim.Optimizer, recipe: Recipe, step: int) -> None:
    """Set learning rate and weight decay of a step."""
    rate, decay = learning_rate(recipe, step), weight_decay(recipe, step)
    for i, group in enumerate(optimizer.param_groups):
        group["lr"] = rate
        group["weight_decay"] = decay if i == 0 else 0.0
