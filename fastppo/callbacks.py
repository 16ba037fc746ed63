"""What somebody may do during training: look on, stop it. Costs the loop nothing where there are none.

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
    """A run between two iterations, to read."""

    config: TrainConfig
    run_dir: Path
    iteration: int  # done so far
    global_step: int  # transitions so far
    progress: float  # share of the run that is done, in [0, 1]
    metrics: Mapping[str, int | float]  # the iteration's row of metrics.csv
    policy: "Callable[[], Agent]"
    """The policy as it stands, parameters and statistics copied: 0.3 ms for 10,000 parameters."""


class Callback:
    """Override what is wanted. An exception ends the run like a fault: a checkpoint of the iteration is kept."""

    def on_iteration(self, run: View) -> bool | None:
        """After every iteration. True ends training, with all that follows it: checkpoint, evaluation, summary.

        1 and true scalars of NumPy or torch are True too. Any other answer lets training go on.
        """

    def on_checkpoint(self, run: View) -> None:
        """After a checkpoint was written, run_dir/checkpoints/last.pt."""

    def on_end(self, run: View) -> None:
        """After the last iteration's checkpoint, before evaluation; not after a fault."""


def is_yes(answer: Any) -> bool:
    """Whether a callback's answer is True: a bool, a number, or a scalar of NumPy or torch, that equals 1.

    Raises an exception for an array or a tensor of several values, as `bool` does.
    """
    if hasattr(answer, "item"):
        answer = answer.item()
    return isinstance(answer, bool | int | float) and answer == 1
