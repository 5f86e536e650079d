"""The supervised objective after DeiT-III: CLS read-out, pre-norm, binary cross-entropy over all classes.

Scenes never repeat within a run, so no augmentation is applied. (Touvron et al. 2022; paper section 3.1.)
"""

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitregs.pretrain.recipe import Recipe
from vitregs.scenes import CLASSES, Scenes

MEAN, STD = (0.42, 0.42, 0.42), (0.25, 0.25, 0.25)


def build(recipe: Recipe) -> nn.Module:
    """Make the network with fresh weights: recipe → timm ViT with one logit per class."""
    torch.manual_seed(recipe.seed)
    return timm.models.VisionTransformer(**recipe.vit(), num_classes=len(CLASSES))


def normalise(pixels: Tensor) -> Tensor:
    """Shift and scale pixels (n, 3, H, W) in [0, 1] → network input."""
    return (pixels - pixels.new_tensor(MEAN).view(1, 3, 1, 1)) / pixels.new_tensor(STD).view(1, 3, 1, 1)


def loss(net: nn.Module, scenes: Scenes) -> Tensor:
    """Binary cross-entropy of the classes in view, mean over classes and scenes → scalar."""
    logits = net(normalise(scenes.pixels))
    return F.binary_cross_entropy_with_logits(logits.float(), scenes.labels.float())


@torch.no_grad()
def score(net: nn.Module, scenes: Scenes) -> float:
    """Accuracy: share of scenes whose highest logit is a class in view (chance is about 4 %)."""
    hits = [
        part_labels.gather(1, net(normalise(part)).argmax(1, keepdim=True))
        for part, part_labels in zip(scenes.pixels.split(64), scenes.labels.split(64), strict=True)
    ]
    return torch.cat(hits).float().mean().item()
