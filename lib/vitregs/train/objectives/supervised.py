"""DeiT-III: name the classes in view from the CLS token.

Binary cross-entropy over all classes, or cross-entropy; 3-Augment where images repeat, and CutMix if asked for. (Touvron
et al. 2022; paper section 3.1.)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitregs.train import vit
from vitregs.train.augment import ThreeAugment, cutmix
from vitregs.train.config import Recipe, Supervised
from vitregs.train.data import Batch, Feed
from vitregs.train.evaluation import right
from vitregs.train.start import Start


class Learner(nn.Module):
    """A ViT with a linear head on CLS (or on the mean patch)."""

    captions = False

    def __init__(self, recipe: Recipe, feed: Feed, start: Start | None = None) -> None:
        super().__init__()
        assert isinstance(recipe.objective, Supervised)
        self.own = recipe.objective
        self.vit = vit.build(recipe, len(feed.classes), start)
        self.augment = ThreeAugment(recipe.image_size) if recipe.augment else nn.Identity()

    @property
    def published(self) -> nn.Module:
        """The network that is measured and kept."""
        return self.vit

    def forward(self, batch: Batch) -> Tensor:
        """Loss of a batch → scalar."""
        pixels, kept = self.augment(batch.pixels), 1.0
        if self.own.cutmix and float(torch.rand(())) < self.own.cutmix:
            pixels, kept = cutmix(pixels)
        logits = self.vit(vit.normalise(self.vit, pixels)).float()
        loss = self._loss(logits, batch.label, batch.labels)
        return (
            loss
            if kept == 1
            else kept * loss + (1 - kept) * self._loss(logits, batch.label.roll(1, 0), batch.labels.roll(1, 0))
        )

    def _loss(self, logits: Tensor, label: Tensor, labels: Tensor) -> Tensor:
        """Loss of the answers to some images: (n, classes), (n,), (n, classes) → scalar."""
        if self.own.loss == "ce":
            return F.cross_entropy(logits, label, label_smoothing=self.own.smoothing)
        wanted = labels.float() * (1 - self.own.smoothing) + self.own.smoothing / logits.shape[1]
        return F.binary_cross_entropy_with_logits(logits, wanted)

    @torch.no_grad()
    def score(self, batch: Batch) -> float:
        """Accuracy: share of images whose highest logit is a class in view."""
        best = [self.vit(vit.normalise(self.vit, part)).argmax(1) for part in batch.pixels.split(64)]
        return right(batch, torch.cat(best))
