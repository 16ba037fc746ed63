"""Compare a fast form of a program with its eager form, on the user's machine, when a run first uses it.

The eager form is right by definition. The two sum in different orders, so their results differ by rounding. In a long update
such differences grow, since they decide whether a ratio near its bound is clipped. So updates are compared by their first
minibatches. Rounding gives deviations of 1e-6 to 1e-3 there, a wrong term of the gradient 0.3 and more.

With --bf16 or --tf32 (`rounded`) products have 8 or 11 bits. Adam's step is as large as the learning rate even where a gradient
is all rounding, so single parameters may go the other way. Updates are then compared as a whole, and less strictly: rounding to
8 bits gives up to 0.09 with minibatches of 16 rows and 0.04 with 128, a missing term or a step of another size 0.3 and more.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastppo.compile.compile_errors import CompileError
from fastppo.core.contracts import CollectResult, LearnResult
from fastppo.core.ppo import SUMMARY

TOLERANCE = 0.1  # the largest deviation that counts as rounding
FEW_MINIBATCHES = 8
FEW_STEPS = 4

Deviation = Callable[..., float]  # (result, eager result, arguments, rounded=False) -> at most TOLERANCE if right


def deviation_of_learn(result: LearnResult, eager: LearnResult, args: Sequence[Any], rounded: bool = False) -> float:
    """The largest difference of parameters relative to the largest step of one, or of a metric of the first minibatches.

    In an update of many minibatches, a difference of the parameters counts only if it is as large as the step itself.

    args: of `learn`, the old parameters first. All may have an axis of seeds.
    """
    old: Tensor = args[0]
    metrics, eager_metrics = (x.minibatch_metrics[..., :FEW_MINIBATCHES, :] for x in (result, eager))
    of_numbers = max(
        _difference(metrics, eager_metrics, eager_metrics.abs().clamp(min=1.0)),
        _difference(result.explained_variance, eager.explained_variance, eager.explained_variance.abs().clamp(min=1.0)),
    )
    if rounded:
        if not torch.equal(result.params.isfinite(), eager.params.isfinite()):
            return math.inf
        apart, moved = (result.params - eager.params).norm(dim=-1), (eager.params - old).norm(dim=-1)
        return max(_difference(apart, torch.zeros_like(apart), moved), of_numbers) / 2
    step = (eager.params - old).abs().amax()
    if eager.minibatch_metrics.shape[-2] > 4 * FEW_MINIBATCHES:
        step = step / TOLERANCE
    return max(_difference(result.params - old, eager.params - old, step), of_numbers)


def deviation_of_act(result: Any, eager: Any, _args: Sequence[Any], rounded: bool = False) -> float:
    """The share of numbers that differ, in actions (N, ...) or, of a policy with memory, in those and its memory."""
    pairs = zip(result, eager, strict=True) if isinstance(result, tuple) else [(result, eager)]
    return max(_share_of_others(x, y, rounded) for x, y in pairs)


def deviation_of_collect(result: CollectResult, eager: CollectResult, _args: Sequence[Any], rounded: bool = False) -> float:
    """The share of numbers that differ in the first steps; later ones may, since trajectories part at a rounding."""
    return max(_share_of_others(x, y, rounded) for x, y in zip(_first_steps(result), _first_steps(eager), strict=True))


def _first_steps(result: CollectResult) -> list[Tensor]:
    axis = result.reward.ndim - 2  # steps are the second last axis: (T, N), or (S, T, N)
    return [x.narrow(axis, 0, min(FEW_STEPS, x.shape[axis])) for x in (result.obs, result.action, result.reward)]


def _share_of_others(x: Tensor, y: Tensor, rounded: bool = False) -> float:
    """The share of numbers in x that are not those of y; floats may differ by rounding. rounded: one number is let pass."""
    rtol, atol = (0.05, 0.05) if rounded else (1e-3, 1e-4)
    same = torch.isclose(x, y, rtol=rtol, atol=atol, equal_nan=True) if y.is_floating_point() else x == y
    others = (~same).sum() - int(rounded)
    return float(others.clamp(min=0).double() / same.numel())


def _difference(x: Tensor, y: Tensor, scale: Tensor) -> float:
    """max |x - y| / scale; 0 where both are not finite in the same places, inf where only one is."""
    finite = y.isfinite()
    if not torch.equal(x.isfinite(), finite):
        return float("inf")
    difference = torch.where(finite, (x - y).abs(), 0.0)
    ratio = torch.where(difference > 0, difference / scale.nan_to_num().clamp(min=1e-9), 0.0)
    return float(ratio.amax()) if ratio.numel() else 0.0


def first_minibatches(units: int, args: Sequence[Any]) -> Sequence[Any]:
    """The arguments of a `learn` of the first minibatches only, of at least two epochs where there are so many.

    What --recompute-advantage does before each epoch is then done again before the second one. units: of a minibatch.
    """
    permutation: Tensor = args[3]  # (E, B), or (S, E, B)
    epochs = min(permutation.shape[-2], max(2, FEW_MINIBATCHES * units // permutation.shape[-1]))
    few = permutation[..., :epochs, : FEW_MINIBATCHES // epochs * units].contiguous()
    return (*args[:3], few, *args[4:])


def overflows(result: Any) -> bool:
    """Whether it is of an update with numbers that are not finite: whoever adds these up in another order has others."""
    return isinstance(result, LearnResult) and not result.summary[..., SUMMARY.index("finite")].all()


class Verified:
    """A fast form of a program that is compared with the eager form at its first call, and replaced by it if they differ."""

    def __init__(
        self,
        fast: Callable[..., Any],
        eager: Callable[..., Any],
        deviation: Deviation,
        report: Callable[[float], None],
        shorten: Callable[[Sequence[Any]], Sequence[Any]] | None = None,
    ) -> None:
        """report: gets the deviation. shorten: makes arguments for the comparison, which cost less than those of the call."""
        self._fast, self._eager, self._deviation, self._report = fast, eager, deviation, report
        self._shorten = shorten
        self._chosen: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> Any:
        """The result of the fast form, or of the eager one."""
        if self._chosen is not None:
            return self._chosen(*args)
        given = args if self._shorten is None else self._shorten(args)
        eager = self._eager(*given)
        if overflows(eager):  # the run ends with a fault, or the next update is compared
            return eager if given is args else self._eager(*args)
        try:
            result = self._fast(*given)
            deviation = self._deviation(result, eager, given)
        except (ValueError, CompileError):  # it refuses its arguments
            result, deviation = eager, math.inf
        self._chosen = self._fast if deviation <= TOLERANCE else self._eager
        self._report(deviation)
        if self._shorten is not None:
            return self._chosen(*args)
        return result if self._chosen is self._fast else eager
