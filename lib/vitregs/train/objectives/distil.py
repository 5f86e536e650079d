"""Distillation: a student says what a network that is held still says, its logits or its tokens.

The teacher is the network that the run starts from, as it is or with a test-time register. Logits are compared by the
Kullback-Leibler divergence (Hinton et al. 2015), tokens behind the final norm by their mean squared difference.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitregs.errors import InputError
from vitregs.models import test_time
from vitregs.train import vit
from vitregs.train.augment import CropFlip
from vitregs.train.config import Distil, Recipe
from vitregs.train.data import Batch, Feed, imagenet_numbers
from vitregs.train.evaluation import right
from vitregs.train.start import Start


class Learner(nn.Module):
    """A student, and its teacher."""

    captions = False

    def __init__(self, recipe: Recipe, feed: Feed, start: Start | None = None) -> None:
        super().__init__()
        assert isinstance(recipe.objective, Distil)
        assert start is not None
        self.own = recipe.objective
        untouched = start.backbone
        classes = int(untouched.net.num_classes)  # type: ignore[arg-type]
        if not classes and self.own.target == "logits":
            raise InputError(f"{untouched.name} has no head to distil: give target=features")
        numbers = imagenet_numbers(feed.classes) if classes == 1000 else None
        if self.own.labels and numbers is None:
            raise InputError(f"labels need classes that the head of {untouched.name} knows: those of ImageNet-1k")
        self.numbers = numbers  # of the data's classes, as the head counts them
        self.vit = vit.build(recipe, classes, start)
        name = untouched.name.partition("@")[0]
        taught = test_time.apply(untouched, name, self.own.teacher) if self.own.teacher else untouched
        self.teacher, self.teacher_prefix = taught.net, taught.prefix
        self.untouched = untouched.net
        self.augment = CropFlip(recipe.image_size, (0.35, 1.0)) if recipe.augment else nn.Identity()

    def train(self, mode: bool = True) -> "Learner":
        """Set training mode; the teacher never drops anything."""
        super().train(mode)
        self.teacher.eval()
        self.untouched.eval()
        return self

    @property
    def published(self) -> nn.Module:
        """The network that is measured and kept."""
        return self.vit

    def forward(self, batch: Batch) -> Tensor:
        """Loss of a batch → scalar."""
        x = vit.normalise(self.vit, self.augment(batch.pixels))
        if self.own.target == "logits":
            with torch.no_grad():
                wanted = self.teacher(x).float()
            logits = self.vit(x).float()
            loss = F.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True)
        else:
            with torch.no_grad():
                wanted = _features(self.teacher, x, self.teacher_prefix)
            tokens = self.vit.forward_features(x)  # type: ignore[operator]
            loss = F.mse_loss(_without_registers(tokens, self.vit.num_prefix_tokens).float(), wanted.float())  # type: ignore[arg-type]
            logits = self.vit.forward_head(tokens).float() if self.own.labels else None  # type: ignore[operator]
        if self.own.labels:
            assert self.numbers is not None
            assert logits is not None
            number = torch.tensor(self.numbers, device=x.device)[batch.label]
            loss = loss + self.own.labels * F.cross_entropy(logits, number)
        return loss

    @torch.no_grad()
    def score(self, batch: Batch) -> float:
        """Accuracy: share of labelled images whose class is named among all of the head's, nan where it does not know them."""
        if self.numbers is None:
            return float("nan")
        named = torch.zeros(len(batch), int(self.vit.num_classes), dtype=torch.bool, device=batch.pixels.device)  # type: ignore[arg-type]
        named[:, self.numbers] = batch.labels
        best = [self.vit(vit.normalise(self.vit, part)).argmax(1) for part in batch.pixels.split(64)]
        return right(Batch(batch.pixels, batch.label, named), torch.cat(best))

    @torch.no_grad()
    def agreement(self, batch: Batch) -> float:
        """Share of images of which the student says what the untouched network says: nan without a head."""
        if not self.vit.num_classes:
            return float("nan")
        parts = [vit.normalise(self.vit, part) for part in batch.pixels.split(64)]
        return float(torch.cat([self.vit(p).argmax(1) == self.untouched(p).argmax(1) for p in parts]).float().mean())


def _without_registers(tokens: Tensor, prefix: int) -> Tensor:
    """CLS and patches: tokens (n, prefix + patches, d), tokens before the patches → (n, 1 + patches, d)."""
    return torch.cat([tokens[:, :1], tokens[:, prefix:]], 1)


def _features(net: nn.Module, x: Tensor, prefix: int) -> Tensor:
    return _without_registers(net.forward_features(x), prefix)  # type: ignore[operator]
