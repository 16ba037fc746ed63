"""The leading axis of S seeds: S agents that share nothing but the call. Knows nothing of what programs compute.

`SeedAxis` joins and separates the tensors of seeds and maps a program over them. A single seed has no axis: its tensors and
programs stay as they are.

`over_seeds` maps a program with torch.func.vmap: one operation for all seeds, so that small ones cost what one costs.
`one_by_one` calls it S times, for programs whose operations are large by themselves, or do not map well: convolutions with
weights of their own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
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


def stack(values: list[Any], dim: int = 0) -> Any:
    """S trees of tensors as one, with an axis of S at `dim`."""
    return tree_map(lambda first, *rest: None if first is None else torch.stack((first, *rest), dim), *values)


def of_seed(tree: Any, seed: int, dim: int = 0) -> Any:
    """One seed's part of a tree of tensors or arrays with an axis of S at `dim`: views."""
    return tree_map_only((Tensor, np.ndarray), lambda x: x[(slice(None),) * (dim % x.ndim) + (seed,)], tree)


@dataclass(frozen=True)
class SeedAxis:
    """The axis of `size` seeds in tensors that hold all of them; with one seed there is none."""

    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """What it adds to the shape of one seed's tensor: (S,), or () for a single seed."""
        return () if self.size == 1 else (self.size,)

    def stack(self, values: list[Any], dim: int = 0) -> Any:
        """S trees of tensors as one; of a single seed its own tree."""
        return values[0] if self.size == 1 else stack(values, dim)

    def unstack(self, tree: Any, dim: int = 0) -> list[Any]:
        """Each seed's part of a tree of tensors or arrays: views."""
        return [tree] if self.size == 1 else [of_seed(tree, seed, dim) for seed in range(self.size)]

    def calls(self, per_call: int, num_threads: int) -> Seeds | None:
        """How a compiled program takes the seeds; None for a single one."""
        return Seeds(self.size, per_call, num_threads) if self.shape else None

    def map(self, program: Callable[..., Any], at_once: bool) -> Callable[..., Any]:
        """`program` of one seed as one of all seeds: with vmap `at_once`, else one seed after another."""
        if self.size == 1:
            return program
        return over_seeds(program) if at_once else one_by_one(program, self.size)
