"""A program as the compiler takes it: a function of tensors with its settings, and arguments as a flat list of tensors."""

import functools
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastppo.core.contracts import EAGER, Execution
from fastppo.core.seed_axis import Seeds, of_seed

Program = functools.partial[Any]  # of a function, all its settings by keyword
Example = tuple[Any, ...]  # its positional arguments; the compiled program takes tensors of the same shapes, strides and dtypes
Layout = tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]  # shape, stride and dtype of each tensor


def flat_tensors(value: Any) -> list[Tensor]:
    """All tensors in it, in the order of `pytree.tree_leaves(plain(args))`, in 3 us where that takes 12."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value if item is not None for tensor in flat_tensors(item)]
    return [value[key] for key in sorted(value.keys())]


def plain(args: Example) -> list[Any]:
    """The arguments in a form that pytree can walk: a mapping or TensorDict becomes a dict in the order of its keys."""
    return [{key: arg[key] for key in sorted(arg.keys())} if hasattr(arg, "keys") else arg for arg in args]


def layout_of(tensors: list[Tensor]) -> Layout:
    """Shape, stride and dtype of each."""
    return tuple((tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in tensors)


def of_one_call(example: Example, seeds: Seeds | None) -> Example:
    """The part of the arguments that one call of the library takes: one seed, or C of them."""
    if seeds is None:
        return example
    if seeds.per_call == 1:
        return of_seed(example, 0)
    return pytree.tree_map_only(Tensor, lambda x: x[: seeds.per_call], example)


def execution_of(program: Program) -> Execution:
    """How it runs on the machine: the setting of that name, or the default."""
    execution: Execution = program.keywords.get("execution", EAGER)
    return execution


def num_workers_of(program: Program) -> int:
    """Threads that share a call."""
    return execution_of(program).num_workers


def num_ranks_of(program: Program) -> int:
    """Processes that share a call."""
    return execution_of(program).num_ranks


def is_shared(program: Program) -> bool:
    """Whether its last argument is a `worker`, which says which part of the work a call does."""
    return num_workers_of(program) * num_ranks_of(program) > 1
