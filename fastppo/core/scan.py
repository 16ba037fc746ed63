"""The one loop construct of the core: a carry threaded through a body. Knows nothing of what the body computes."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Carry = TypeVar("Carry")
Slice = TypeVar("Slice")


def scan(body: Callable[[Carry, Tensor], tuple[Carry, Tensor]], carry: Carry, xs: Tensor) -> tuple[Carry, Tensor]:
    """Fold `body` over the first axis of `xs`, eagerly: a Python loop.

    Args:
        body: `(carry, x) -> (carry, y)`; pure, the carry keeps its structure, shapes and dtypes.
        carry: any tree of tensors.
        xs: (L, ...), L >= 1; the body sees (...) slices in order.

    Returns:
        The last carry and the stacked ys, (L, ...).
    """
    ys = []
    for x in xs.unbind(0):
        carry, y = body(carry, x)
        ys.append(y)
    return carry, torch.stack(ys)
