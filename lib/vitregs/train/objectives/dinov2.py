"""DINOv2: DINO, plus masked patches that the student must name as the teacher does, plus features spread apart.

iBOT's masks and loss under a head of their own ("untied"), KoLeo on the CLS tokens of each large crop, centred targets
as in the published short recipe; heads, losses and masks are lightly's. (Oquab et al. 2024, section 4; Zhou et al. 2022.)
"""

import random

import torch
from torch import Tensor, nn

from vitregs.errors import extra
from vitregs.train import vit
from vitregs.train.config import DinoV2, Recipe
from vitregs.train.data import Batch, Feed
from vitregs.train.objectives import dino
from vitregs.train.start import Start

with extra("train", "training"):
    from lightly.loss import IBOTPatchLoss, KoLeoLoss
    from lightly.models.utils import random_block_mask, update_momentum


class Learner(dino.Learner):
    """DINO's student and teacher with a second pair of heads, for patches."""

    own: DinoV2

    def __init__(self, recipe: Recipe, feed: Feed, start: Start | None = None) -> None:
        super().__init__(recipe, feed, start)
        width: int = self.vit.embed_dim  # type: ignore[assignment]
        self.patch_head = dino.head(width, self.own, self.own.patch_prototypes)
        self.teacher_patch_head = dino.frozen(self.patch_head)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_loss = IBOTPatchLoss(self.own.patch_prototypes, student_temp=self.own.student_temp)
        self.koleo_loss = KoLeoLoss()
        self.grid = recipe.image_size // recipe.patch_size

    def masks(self, count: int, device: torch.device) -> Tensor:
        """Draw block masks: crops → (n, rows, columns) bool, some crops without any."""
        random.seed(int(torch.randint(2**31, ())))  # lightly draws with Python's own generator
        least = min(4, int(self.own.masked_least * self.grid**2))  # patches in a block, as many as small grids have
        drawn = random_block_mask(
            (count, self.grid, self.grid), self.own.masked_pictures, self.own.masked_least, self.own.masked_most,
            min_num_masks_per_block=least,
        )  # fmt: skip
        return drawn.to(device)

    def forward(self, batch: Batch) -> Tensor:
        """Loss of a batch → scalar: DINO + ibot × iBOT + koleo × KoLeo."""
        large, small = self.crops(batch.pixels)
        crops, temperature = large.flatten(0, 1), self.temperature()
        masks = self.masks(len(crops), crops.device)
        hidden, prefix = masks.flatten(1), self.vit.num_prefix_tokens
        with torch.no_grad():
            tokens = vit.encode(self.teacher, crops)
            target = self.teacher_head(tokens[:, 0]).float()
            target_patches = self.teacher_patch_head(tokens[:, prefix:][hidden]).float()
        tokens = vit.encode(self.vit, crops, lambda x: torch.where(hidden[..., None], self.mask_token.to(x.dtype), x))
        seen = [tokens[:, 0]] + ([] if small is None else [vit.resized(self.vit, small.flatten(0, 1))])
        predicted = self.head(torch.cat(seen)).float()
        views = len(predicted) // len(batch)
        predicted_patches = self.patch_head(tokens[:, prefix:][hidden]).float()
        with torch.autocast(predicted.device.type, enabled=False):
            loss = self.loss(list(target.chunk(2)), list(predicted.chunk(views)), teacher_temp=temperature)
            loss = loss + self.own.ibot * self.patch_loss(
                target_patches, predicted_patches, masks, teacher_temp=temperature
            )
            return loss + self.own.koleo * sum(self.koleo_loss(part.float()) for part in tokens[:, 0].chunk(2))

    def before_update(self) -> None:
        """Hold both sets of prototypes still at the beginning."""
        super().before_update()
        if self.step < self.own.freeze_last * self.steps:
            for parameter in self.patch_head.last_layer.parameters():  # type: ignore[union-attr]
                parameter.grad = None

    def after_update(self) -> None:
        """Let the teacher follow."""
        super().after_update()
        update_momentum(self.patch_head, self.teacher_patch_head, self.momentum())
