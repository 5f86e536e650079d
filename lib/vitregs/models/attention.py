"""Attention with a remedy against sinks built in: a gate, a softmax with one more logit, a learnable key and value.

Subclasses of timm's `Attention` that keep the names of its parameters, so that weights of plain networks fit.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

PLAIN = "plain"
OPEN = 2.0  # what a gate's sigmoid is given before training: it lets 0.88 through and still has a gradient


class Gated(Attention):
    """A sigmoid gate on the output of attention, one for each head and channel, from the block's normalised input.

    timm's own switch `gated`, whose gates start at sigmoid(OPEN) for every token (Qiu et al. 2025).
    """

    added: ClassVar[tuple[str, ...]] = ("gate.weight", "gate.bias")
    gate: nn.Linear

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, gated=True)  # type: ignore[misc]
        if self.gate.bias is None:  # timm gives the gate one only where queries have one
            self.gate.bias = nn.Parameter(torch.zeros(self.attn_dim))
        self.init_weights()

    def init_weights(self) -> None:
        """Set the gate to what it is before training; timm calls this behind its own initialisation."""
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, OPEN)


class OffByOne(Attention):
    """Softmax with an extra logit of zero, exp(x) / (1 + sum of exp(x)): a head may attend to nothing (Miller 2023).

    The same as a further key and value of zeros. It stands behind the tokens' own.
    """

    added: ClassVar[tuple[str, ...]] = ()

    def extra(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The further key and value: keys of the tokens (n, heads, tokens, d) → each (n, heads, 1, d)."""
        zero = like.new_zeros(*like.shape[:2], 1, like.shape[3])
        return zero, zero

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend: tokens (n, tokens, d), a mask over the tokens' keys to add or boolean → (n, tokens, d)."""
        assert not is_causal  # which of the tokens would see the further key?
        count, tokens, _ = x.shape
        heads = self.qkv(x).reshape(count, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = heads.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        key, value = self.extra(k)
        k, v = torch.cat([k, key.to(k.dtype)], 2), torch.cat([v, value.to(v.dtype)], 2)
        if attn_mask is not None:  # the further key is never hidden
            attn_mask = F.pad(attn_mask, (0, 1), value=attn_mask.dtype == torch.bool)
        drop = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=drop)
        x = self.norm(x.transpose(1, 2).reshape(count, tokens, self.attn_dim))
        out: Tensor = self.proj_drop(self.proj(x))
        return out


class Biased(OffByOne):
    """A learnable key and value for each head, behind those of the tokens (Sun et al. 2024, "Massive Activations").

    Both start at zero, where this is `OffByOne`. Named as in torch's `MultiheadAttention`.
    """

    added: ClassVar[tuple[str, ...]] = ("bias_k", "bias_v")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # of one dimension, as all biases, so that weight decay leaves them alone
        self.bias_k = nn.Parameter(torch.zeros(self.attn_dim))
        self.bias_v = nn.Parameter(torch.zeros(self.attn_dim))

    def init_weights(self) -> None:
        """Set key and value to what they are before training."""
        nn.init.zeros_(self.bias_k)
        nn.init.zeros_(self.bias_v)

    def extra(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The further key and value: keys of the tokens (n, heads, tokens, d) → each (n, heads, 1, d)."""
        shape = (1, self.num_heads, 1, self.head_dim)
        return tuple(p.view(shape).expand(len(like), -1, -1, -1) for p in (self.bias_k, self.bias_v))  # type: ignore[return-value]


KINDS: dict[str, type[Gated | OffByOne]] = {"gated": Gated, "off-by-one": OffByOne, "bias": Biased}


def fitted(state: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Make weights of a plain network those of one with another attention, as near as that comes before training.

    A gate that is open to a share takes its inverse into the projection behind it, which keeps the function of the network.
    The two with a further key have a function of their own from the start.

    Args:
        state: Weights by name.
        kind: A name of KINDS, or PLAIN.

    Returns:
        The weights, without those that the other attention adds.
    """
    if kind != "gated":
        return dict(state)
    share = 1 / (1 + math.exp(-OPEN))
    return {k: v / share if k.endswith("attn.proj.weight") else v for k, v in state.items()}
