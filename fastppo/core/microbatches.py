"""Split many rows into passes of one bounded size. Knows nothing of what is done with them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


def split_evenly(number: int, most: int) -> tuple[int, int]:
    """(passes, size): `number` items in passes of one size, at most `most`, with few empty places in the last pass.

    passes * size >= number, and fewer than `size` places are empty. There are as few passes as possible, or one more
    if that leaves fewer empty places. A `most` below 1 counts as 1.
    """
    fewest = -(-number // max(most, 1))
    sizes = [-(-number // passes) for passes in (fewest, fewest + 1)]
    size = min(sizes, key=lambda size: -number % size)  # at a tie the larger size
    return -(-number // size), size


def pad(x: Tensor, dim: int, number: int, repeat: bool) -> Tensor:
    """`x` with `number` more entries at the end of `dim`: copies of the last one, or zeros. `x` itself if `number` is 0."""
    if number == 0:
        return x
    last = x.narrow(dim, x.shape[dim] - 1, 1)
    more = last if repeat else torch.zeros_like(last)
    return torch.cat((x, more.expand(*x.shape[:dim], number, *x.shape[dim + 1 :])), dim)


def scan_in_passes(
    scan: Callable[..., Any], body: Callable[[Any, Any], tuple[Any, Tensor]], carry: Any, items: Any, most: int
) -> Tensor:
    """Call `carry, out = body(carry, part)` for parts of `items`, in order, and join the outs.

    Args:
        scan: `core.scan.scan`, or the compiler's. carry: a tree of tensors.
        items: a tree of tensors (number, ...). The body gets the same tree with at most `most` items. The last part is
            filled up with copies of the last item.

    Returns:
        (C, number, ...), of outs (C, size, ...).
    """
    leaves, spec = tree_flatten(items)
    number = leaves[0].shape[0]
    num_passes, size = split_evenly(number, most)
    parts = [pad(x, 0, num_passes * size - number, repeat=True).unflatten(0, (num_passes, size)) for x in leaves]

    def one_pass(carry: Any, part: tuple[Tensor, ...]) -> tuple[Any, tuple[Tensor]]:
        carry, out = body(carry, tree_unflatten(part, spec))
        return carry, (out,)

    _, (out,) = scan(one_pass, carry, tuple(parts))  # (passes, C, size, ...)
    joined: Tensor = out.movedim(1, 0).flatten(1, 2)[:, :number]
    return joined
