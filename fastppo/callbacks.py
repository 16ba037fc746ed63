"""Callbacks: user code that watches training and may stop it. Without callbacks they cost no time.

class Milestone(Callback):
    def on_iteration(self, run: View) -> bool | None:
        return run.metrics["episodic_return_mean"] >= 450  # True: that is enough

train(config, callbacks=[Milestone()])
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastppo.config import TrainConfig

if TYPE_CHECKING:
    from fastppo.policy.agent import Agent


@dataclass(frozen=True)
class View:
    """A run between two iterations, read-only."""

    config: TrainConfig
    run_dir: Path
    iteration: int  # completed so far
    global_step: int  # transitions so far
    progress: float  # completed share of the run, in [0, 1]
    metrics: Mapping[str, int | float]  # the iteration's row of metrics.csv
    policy: "Callable[[], Agent]"
    """Returns a copy of the current policy: parameters and statistics, 0.3 ms for 10,000 parameters."""


class Callback:
    """Override the methods you need. An exception ends the run like a fault, with a checkpoint of the iteration."""

    def on_iteration(self, run: View) -> bool | None:
        """After every iteration. Return True to end training normally, with checkpoint, evaluation and summary.

        1 and true scalars of NumPy or torch count as True. With any other value training continues.
        """

    def on_checkpoint(self, run: View) -> None:
        """After a checkpoint was written to run_dir/checkpoints/last.pt."""

    def on_end(self, run: View) -> None:
        """After the last iteration's checkpoint, before evaluation; not after a fault."""


def is_yes(answer: Any) -> bool:
    """Whether a callback returned True: a bool, a number or a scalar of NumPy or torch that equals 1.

    Raises an exception for an array or tensor of several values, as `bool` does.
    """
    if hasattr(answer, "item"):
        answer = answer.item()
    return isinstance(answer, bool | int | float) and answer == 1
