"""A loop of a program that torch.func.vmap maps over seeds: the same loop with the axis of seeds in its tensors."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

Scan = Callable[..., tuple[Any, tuple[Tensor, ...]]]


def on_whole_tensors(
    scan: Scan, body: Callable[..., Any], carry: Any, xs: tuple[Tensor, ...]
) -> tuple[Any, tuple[Tensor, ...]]:
    """`scan(body, carry, xs)`. Under vmap, scan gets whole tensors: a carry (S, ...), and xs (L, S, ...).

    PyTorch's own rule for its scan operator puts the axis of seeds last, which does not suit matrix products.
    """
    seeds = _vmap()
    if seeds is None:
        return scan(body, carry, xs)
    leaves, spec = pytree.tree_flatten(carry)

    def whole(x: Tensor) -> Tensor:  # (S, ...); the body sees (...)
        return torch._C._functorch._remove_batch_dim(x, seeds.level(), seeds.batch_size(), 0).contiguous()

    def mapped(x: Tensor, dim: int = 0) -> Tensor:
        return torch._C._functorch._add_batch_dim(x, dim, seeds.level())

    def whole_body(carry: list[Tensor], x: tuple[Tensor, ...]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        after, ys = body(pytree.tree_unflatten(map(mapped, carry), spec), tuple(map(mapped, x)))
        return list(map(whole, pytree.tree_leaves(after))), tuple(map(whole, ys))

    steps_first = tuple(whole(x).movedim(1, 0).contiguous() for x in xs)  # (L, S, ...)
    last, ys = scan(whole_body, list(map(whole, leaves)), steps_first)
    return pytree.tree_unflatten(map(mapped, last), spec), tuple(mapped(y, 1) for y in ys)


def below_seeds() -> contextlib.AbstractContextManager[Any]:
    """Operations within it are not mapped."""
    seeds = _vmap()
    return contextlib.nullcontext() if seeds is None else seeds.lower()


def _vmap() -> Any:
    """The vmap that is under way; None: there is none."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return None
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

    return retrieve_current_functorch_interpreter()
