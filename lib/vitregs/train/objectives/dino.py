"""DINO: a student says of every crop what its own slow average, the teacher, says of the whole image.

Multi-crop, a teacher that follows as a moving average, centred and sharpened targets, weight-normed prototypes; head
and loss are lightly's. (Caron et al. 2021, section 3 and appendix C.)
"""

import warnings
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from vitregs.errors import extra
from vitregs.train import vit
from vitregs.train.augment import MultiCrop
from vitregs.train.config import Dino, Recipe
from vitregs.train.data import Batch, Feed
from vitregs.train.schedules import cosine, ramp
from vitregs.train.start import Start

with extra("train", "training"):
    from lightly.loss import DINOLoss
    from lightly.models.modules.heads import DINOProjectionHead
    from lightly.models.utils import update_momentum


def frozen(module: nn.Module) -> nn.Module:
    """A copy that no gradient reaches: the teacher's part."""
    return deepcopy(module).requires_grad_(False)


def head(width: int, own: Dino, prototypes: int) -> nn.Module:
    """Three layers, a unit sphere, and weight-normed prototypes: width → logits."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # lightly's weight norm is of the old kind, which cannot be copied
        made = DINOProjectionHead(width, own.hidden, own.bottleneck, prototypes)
        last = nn.utils.remove_weight_norm(made.last_layer)
    made.last_layer = nn.utils.parametrizations.weight_norm(last)
    length = made.last_layer.parametrizations.weight.original0
    length.data.fill_(1)
    length.requires_grad_(False)  # prototypes keep the length 1
    return made


class Learner(nn.Module):
    """Student and teacher, each a ViT and a head."""

    captions = False

    def __init__(self, recipe: Recipe, feed: Feed, start: Start | None = None) -> None:
        super().__init__()
        assert isinstance(recipe.objective, Dino)
        self.own, self.steps = recipe.objective, recipe.steps
        self.vit = vit.build(recipe, start=start)
        self.head = head(self.vit.embed_dim, self.own, self.own.prototypes)  # type: ignore[arg-type]
        self.teacher, self.teacher_head = frozen(self.vit), frozen(self.head)
        self.crops = MultiCrop(recipe.image_size, self.own)
        self.loss = DINOLoss(self.own.prototypes, student_temp=self.own.student_temp)
        self.step = 0

    @property
    def published(self) -> nn.Module:
        """The network that is measured and kept: the teacher, as in the paper."""
        return self.teacher

    def train(self, mode: bool = True) -> Any:
        """Set training mode; the teacher never drops anything."""
        super().train(mode)
        self.teacher.eval()
        return self

    def temperature(self) -> float:
        """Of the teacher at this step: a line up to its final value."""
        return ramp(self.step, self.own.temp_warmup * self.steps, self.own.teacher_temp_first, self.own.teacher_temp)

    def momentum(self) -> float:
        """Of the teacher at this step: a cosine to 1."""
        return cosine(self.step, self.steps, self.own.momentum, 1.0)

    def forward(self, batch: Batch) -> Tensor:
        """Loss of a batch → scalar."""
        large, small = self.crops(batch.pixels)
        with torch.no_grad():
            target = self.teacher_head(vit.encode(self.teacher, large.flatten(0, 1))[:, 0]).float()
        seen = [vit.encode(self.vit, large.flatten(0, 1))[:, 0]]
        if small is not None:
            seen.append(vit.resized(self.vit, small.flatten(0, 1)))
        predicted = self.head(torch.cat(seen)).float()
        views = len(predicted) // len(batch)
        with torch.autocast(predicted.device.type, enabled=False):
            return self.loss(list(target.chunk(2)), list(predicted.chunk(views)), teacher_temp=self.temperature())

    def before_update(self) -> None:
        """Hold the prototypes still at the beginning: called when gradients are there."""
        if self.step < self.own.freeze_last * self.steps:
            for parameter in self.head.last_layer.parameters():  # type: ignore[union-attr]
                parameter.grad = None

    def after_update(self) -> None:
        """Let the teacher follow."""
        update_momentum(self.vit, self.teacher, self.momentum())
        update_momentum(self.head, self.teacher_head, self.momentum())
