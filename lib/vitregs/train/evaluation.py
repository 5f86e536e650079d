"""What frozen features know: k-nearest neighbours while a network trains, a linear classifier when it is done."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vitregs.models.backbone import Backbone
from vitregs.probes import logistic
from vitregs.probes.classification import vote
from vitregs.train.data import Batch, Feed

NEIGHBOURS = 10
PROBED = 3072  # held-out images of the final score; a third of them is scored, the classifier is trained on the rest
DECAY = 1e-3  # of the classifier's weights


@torch.no_grad()
def features(backbone: Backbone, pixels: Tensor, batch: int = 64) -> Tensor:
    """CLS and mean patch after the final norm, side by side: (n, 3, H, W) in [0, 1] → unit vectors (n, 2·d or d)."""
    parts = []
    for part in pixels.split(batch):
        tokens = backbone.net.forward_features(backbone.prepare(part))  # type: ignore[operator]
        patches = tokens[:, backbone.prefix :].mean(1)
        parts.append(torch.cat([tokens[:, 0], patches], 1) if backbone.has_cls else patches)
    return F.normalize(torch.cat(parts).float(), dim=-1)


def knn(backbone: Backbone, bank: Batch, queries: Batch, neighbours: int = NEIGHBOURS) -> float:
    """Share of queries whose neighbours vote for a class in view: labelled bank, queries → in [0, 1], nan with fewer
    than two labels.

    The vote is weighted by exp(similarity / 0.07) as in DINO (Caron et al. 2021, appendix F.1).
    """
    known = bank.label >= 0
    if len(bank.label[known].unique()) < 2:  # nothing to vote on
        return float("nan")
    marks = F.one_hot(bank.label[known], bank.labels.shape[1])
    votes = vote(features(backbone, bank.pixels[known]), marks, features(backbone, queries.pixels), neighbours)
    return right(queries, votes.argmax(1))


def right(batch: Batch, predicted: Tensor) -> float:
    """Share of labelled images for which a class in view was named: images, classes (n,) → in [0, 1], nan without labels."""
    return float(batch.labels.gather(1, predicted[:, None])[batch.labels.any(1)].float().mean())


def linear(train: Tensor, label: Tensor, test: Tensor) -> Tensor:
    """Logistic regression to convergence on standardised features: (n, d), classes (n,), (m, d) → classes (m,)."""
    mean, std = train.mean(0), train.std(0) + 1e-6
    strength = 1 / (2 * DECAY * len(train))
    return logistic.path((train - mean) / std, label, [strength]).logits((test - mean) / std)[0].argmax(1)


def final(backbone: Backbone, feed: Feed) -> tuple[dict[str, float], dict[str, str]]:
    """Accuracy of a linear classifier for each thing that labels tell: network, its data → {name: in [0, 1]}, {name: why there
    is none}.

    Scenes: colour and shape of the object with the largest area, chance 1/8 each. Images: the label. A score is optional: what
    cannot be scored is left out, and never costs a finished training its weights.
    """
    held = feed.held(PROBED)
    known, tasks = held.label >= 0, feed.asks(held)
    if int(known.sum()) < 3:
        return {}, dict.fromkeys(tasks, f"{int(known.sum())} of {len(held)} held-out images have a label")
    right: dict[str, float] = {}
    missing: dict[str, str] = {}
    cut = int(known.sum()) // 3
    for name, label in tasks.items():
        try:
            found, true = features(backbone, held.pixels[known]), label[known]
            right[name] = float((linear(found[cut:], true[cut:], found[:cut]) == true[:cut]).float().mean())
        except (ValueError, RuntimeError) as error:  # labels that tell nothing apart, memory, a solver that fails
            missing[name] = str(error).split("\n")[0]
    return right, missing
