"""The traits of a program that compilation needs. Each program declares them with the decorator `compilable`.

A program is a pure function of tensors. Its positional arguments are trees of tensors, the flat parameters (P,) first. If
several workers share a call, one more argument identifies the worker. Settings are keyword arguments.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from fastppo.core.contracts import Policy

Function = TypeVar("Function", bound=Callable[..., Any])


class Sourced(Protocol):
    """A setting that computes something within a program: a policy, or environments."""

    def sources(self) -> list[Path] | None:
        """The files whose text defines the computation, for the cache of compiled programs; None: not known."""
        ...


class Call(NamedTuple):
    """One call that a program makes of such a setting. If its source files are not known, the key has the graph of the call."""

    owner: Sourced
    function: Callable[..., Any]
    args: tuple[Any, ...]


def one_or_all(tensors: Sequence[Tensor]) -> Any:
    """The result of a program that returns tensors: one, or a tuple of several."""
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def first(results: Sequence[Any]) -> Any:
    """The result of workers that all return the same result."""
    return results[0]


@dataclass(frozen=True)
class Traits:
    """The traits of a program.

    Attributes:
        calls: the calls of its policy and environments for one step, `calls(*arguments, **settings)`.
        result: makes the result from its tensors, in the order of pytree.
        join: makes the result of the whole call from the results of the workers that shared it.
    """

    calls: Callable[..., list[Call]]
    result: Callable[[Sequence[Tensor]], Any] = one_or_all
    join: Callable[[Sequence[Any]], Any] = first


def compilable(
    calls: Callable[..., list[Call]],
    result: Callable[[Sequence[Tensor]], Any] = one_or_all,
    join: Callable[[Sequence[Any]], Any] = first,
) -> Callable[[Function], Function]:
    """Mark a function as a program with these `Traits`."""

    def mark(function: Function) -> Function:
        function.traits = Traits(calls, result, join)  # type: ignore[attr-defined]
        return function

    return mark


def traits_of(function: Callable[..., Any]) -> Traits:
    """The traits of a program. Raises AttributeError for a function that is not marked."""
    traits: Traits = function.traits  # type: ignore[attr-defined]
    return traits


def policy_call(policy: Policy, params: Tensor, obs: Any) -> Call:
    """Actor and critic for one observation (N, ...) of each environment."""
    return Call(policy, lambda params, obs: policy.actor_critic(policy.weights(params), obs), (params, obs))
