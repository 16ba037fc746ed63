"""Programs over a leading axis of seeds: S agents that share nothing but the call. Knows nothing of what they compute.

`over_seeds` maps a program with torch.func.vmap: one operation for all seeds, so that small ones cost what one costs.
`one_by_one` is the same in S calls, for programs whose operations are large by themselves, or do not map well: convolutions
with weights of their own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only, tree_unflatten


class Seeds(NamedTuple):
    """How a compiled program takes S seeds."""

    number: int  # S
    per_call: int  # C, of which one call of the library or graph works off so many; 1: it is the program of a single agent
    num_threads: int  # calls at once


def over_seeds(program: Callable[..., Any]) -> Callable[..., Any]:
    """`program` with a leading axis of S seeds in all its tensors (None stays None), and in all that it returns."""

    def mapped(*args: Any) -> Any:
        leaves, spec = tree_flatten(args)

        def one(*tensors: Tensor) -> Any:
            given = iter(tensors)
            return program(*tree_unflatten([None if leaf is None else next(given) for leaf in leaves], spec))

        return torch.func.vmap(one)(*(leaf for leaf in leaves if leaf is not None))

    return mapped


def one_by_one(program: Callable[..., Any], number: int) -> Callable[..., Any]:
    """The same, by `number` calls of `program`."""

    def called(*args: Any) -> Any:
        return stack([program(*of_seed(args, seed)) for seed in range(number)])

    return called


def stack(values: list[Any]) -> Any:
    """S trees of tensors as one with a leading axis of S."""
    return tree_map(lambda first, *rest: None if first is None else torch.stack((first, *rest)), *values)


def of_seed(tree: Any, seed: int) -> Any:
    """That seed's part of a tree of tensors (S, ...): views."""
    return tree_map_only(Tensor, lambda x: x[seed], tree)
