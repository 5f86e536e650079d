"""OpenCLIP: an image and its caption agree more than with the captions of the other images in the batch.

timm's ViT with a LayerNorm before its blocks, open_clip's text transformer and loss; symmetric InfoNCE with a learned
temperature. (Radford et al. 2021, section 2.3; Cherti et al. 2023.)
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vitregs.errors import extra
from vitregs.train import vit
from vitregs.train.augment import CropFlip
from vitregs.train.config import Clip, Recipe
from vitregs.train.data import Batch, Feed
from vitregs.train.evaluation import right
from vitregs.train.start import Start
from vitregs.train.text import Vocabulary

with extra("train", "training"):
    from open_clip.loss import ClipLoss
    from open_clip.transformer import TextTransformer


HOTTEST = math.log(100)  # open_clip clamps the logit scale at 100


class Learner(nn.Module):
    """An image tower, a text tower, and a temperature."""

    captions = True

    def __init__(self, recipe: Recipe, feed: Feed, start: Start | None = None) -> None:
        super().__init__()
        own = recipe.objective
        assert isinstance(own, Clip)
        self.vit = vit.build(recipe, start=start)
        self.words = Vocabulary(feed.prompts())
        self.prompts = self.words.encode(feed.prompts())
        self.text = TextTransformer(
            context_length=self.words.context, vocab_size=len(self.words), width=own.text_width, heads=own.text_heads,
            layers=own.text_depth, output_dim=own.embed,
        )  # fmt: skip
        self.project = nn.Linear(self.vit.embed_dim, own.embed, bias=False)  # type: ignore[arg-type]
        nn.init.normal_(self.project.weight, std=self.project.in_features**-0.5)
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.augment = CropFlip(recipe.image_size, (0.9, 1.0)) if recipe.augment else nn.Identity()

    @property
    def published(self) -> nn.Module:
        """The network that is measured and kept."""
        return self.vit

    def images(self, pixels: Tensor) -> Tensor:
        """Pixels (n, 3, H, W) in [0, 1] → unit vectors (n, embed)."""
        return F.normalize(self.project(vit.encode(self.vit, pixels)[:, 0]).float(), dim=-1)

    def sentences(self, numbers: Tensor) -> Tensor:
        """Numbered captions (n, context) → unit vectors (n, embed)."""
        return F.normalize(self.text(numbers).float(), dim=-1)

    def forward(self, batch: Batch) -> Tensor:
        """Loss of a batch → scalar; with several processes, over the pairs of all of them."""
        numbers = self.words.encode(batch.captions or []).to(batch.pixels.device)
        images, sentences = self.images(self.augment(batch.pixels)), self.sentences(numbers)
        many = dist.is_available() and dist.is_initialized()
        place = {"rank": dist.get_rank(), "world_size": dist.get_world_size()} if many else {}
        scale = self.scale.clamp(max=HOTTEST).exp()
        return ClipLoss(local_loss=True, gather_with_grad=True, **place)(images, sentences, scale)

    @torch.no_grad()
    def text_side(self) -> dict[str, Tensor]:
        """What zero-shot classification needs: → project (embed, width), prompts (classes, embed), which are unit vectors."""
        return {"project": self.project.weight, "prompts": self.sentences(self.prompts.to(self.scale.device))}

    @torch.no_grad()
    def score(self, batch: Batch) -> float:
        """Zero-shot accuracy: share of images whose nearest class prompt names a class in view."""
        prompts = self.sentences(self.prompts.to(batch.pixels.device))
        best = [(self.images(part) @ prompts.T).argmax(1) for part in batch.pixels.split(64)]
        return right(batch, torch.cat(best))
