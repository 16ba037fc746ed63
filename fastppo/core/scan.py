"""The one loop construct of the core: a carry that each step of a body updates. Knows nothing of what the body computes."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Carry = TypeVar("Carry")


def scan(
    body: Callable[[Carry, tuple[Tensor, ...]], tuple[Carry, tuple[Tensor, ...]]], carry: Carry, xs: tuple[Tensor, ...]
) -> tuple[Carry, tuple[Tensor, ...]]:
    """Fold `body` over the first axis of the tensors `xs`, eagerly: a Python loop.

    Args:
        body: `(carry, x) -> (carry, y)`; pure, the carry keeps its structure, shapes and dtypes, y is a tuple of tensors.
        carry: any tree of tensors.
        xs: tensors (L, ...), L >= 1; the body gets the tuple of their (...) slices, in order.

    Returns:
        The last carry and the stacked ys, a tuple of (L, ...).
    """
    ys = []
    for x in zip(*(tensor.unbind(0) for tensor in xs), strict=True):
        carry, y = body(carry, x)
        ys.append(y)
    return carry, tuple(torch.stack(y) for y in zip(*ys, strict=True))
