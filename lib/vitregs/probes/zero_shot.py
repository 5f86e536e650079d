"""Zero-shot classification: images against the embeddings of words, without any training (Table 2b)."""

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor

from vitregs import arrays
from vitregs.errors import InputError


def zero_shot(cls: np.ndarray, project: Tensor, prompts: Tensor, labels: np.ndarray) -> xr.Dataset:
    """Name the class whose prompt is nearest by cosine: CLS after the final norm (n, width), projection (embed, width), prompts
    (classes, embed), the right class (n,) or marks of all that are in view (n, classes) → Dataset (section 2.8, Table 2b).

    score: share of images whose named class is right, or in view, with low, high (95 % over images), chance (the class
    that is right most often), n, right[image]. Raises InputError for other widths and numbers, and images without a label.
    """
    if cls.ndim != 2 or cls.shape[1] != project.shape[1] or project.shape[0] != prompts.shape[1]:
        shapes = f"{tuple(cls.shape)}, {tuple(project.shape)} and {tuple(prompts.shape)}"
        raise InputError(f"features, projection and prompts of {shapes} do not fit: the words belong to another model")
    if len(cls) != len(labels) or not len(labels):
        raise InputError(f"there are {len(labels)} labels for {len(cls)} images")
    if labels.ndim == 1:
        if labels.min() < 0 or labels.max() >= len(prompts):
            raise InputError(f"labels of {labels.min()} to {labels.max()} do not belong to {len(prompts)} prompts")
        labels = np.eye(len(prompts), dtype=bool)[labels]
    if labels.shape[1] != len(prompts):
        raise InputError(f"there are marks of {labels.shape[1]} classes for {len(prompts)} prompts")
    if not labels.any(1).all():
        raise InputError(f"{int((~labels.any(1)).sum())} of {len(labels)} images have no class in view")
    embedded = F.normalize(torch.from_numpy(cls).to(project) @ project.T, dim=-1)
    predicted = (embedded @ F.normalize(prompts, dim=-1).T).argmax(1).cpu().numpy()
    right = labels[np.arange(len(predicted)), predicted]
    value, low, high = arrays.bootstrap_interval(right)
    numbers = {"score": value, "low": low, "high": high, "chance": float(labels.mean(0).max())}
    return xr.Dataset({k: ((), v) for k, v in numbers.items()} | {"n": ((), len(predicted)), "right": ("image", right)})
