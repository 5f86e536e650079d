"""In which precision a step is computed: half precision for matrices, and what is faster or safer in single precision."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class _SingleAttention(TorchFunctionMode):
    """Attention of half-precision queries, keys and values in single precision."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or args[0].dtype is not torch.bfloat16:
            return func(*args, **kwargs)
        single = [a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        with torch.autocast(args[0].device.type, enabled=False):
            return func(*single, **kwargs).to(args[0].dtype)


@contextmanager
def computed(device: torch.device, precision: str) -> Iterator[None]:
    """Compute what follows as a recipe says.

    On a CPU the gradient of torch's attention takes two to three times as long in bf16 as in single precision, and most of a
    step; matrix products are several times faster in it where the processor has it. So attention is computed in single
    precision there (`python -m tests.benchmarks.training`).

    Args:
        device: Where.
        precision: "bf16" or "fp32".
    """
    half = precision == "bf16"
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        if half and device.type == "cpu":
            with _SingleAttention():
                yield
        else:
            yield
