"""Callbacks: user code that watches training and may stop it. Without callbacks they cost no time.

def enough(run: View) -> bool:
    return run.metrics["episodic_return_mean"] >= 450  # True: that is enough

train("CartPole-v1", callbacks=[enough])  # a function is called after every iteration; a Callback at other moments too
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from fastppo.config import TrainConfig
from fastppo.errors import UsageError

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv

    from fastppo.policy.agent import Agent


@dataclass(frozen=True, repr=False)
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
    record: Callable[[str, float], None]
    """record(name, value) adds a number of yours to the next row of metrics.csv, TensorBoard and trackers: in `on_step` and
    `on_iteration` that is this iteration's row. Of several values of a name the last one counts. In TensorBoard a name with a
    slash is the tag, another one is under custom/. Raises ValueError for a name of fastppo's, or no number."""
    envs: "VectorEnv | None"
    """The environments that are trained on, N as one; None where they are on the device (--backend torch)."""

    def __repr__(self) -> str:
        where = f"iteration {self.iteration}, step {self.global_step}, {self.progress:.0%}"
        return f"<{self.run_dir.name}: {where}, return {self.metrics.get('episodic_return_mean', math.nan):.4g}>"


class StepView(NamedTuple):
    """One step of all environments, (N, ...) each, as the environments have it. Arrays are reused: copy what you keep."""

    t: int  # from 0 to T - 1
    action: Any
    obs: Any  # after the step
    reward: Any
    terminated: Any
    truncated: Any
    infos: Mapping[str, Any]  # (N,) each: is_success and the names of --log-info; nan where there is none


class Callback:
    """Override the methods you need. An exception ends the run like a fault, with a checkpoint of the iteration."""

    def on_iteration(self, run: View) -> bool | None:
        """After every iteration. Return True to end training normally, with checkpoint, evaluation and summary.

        1 and true scalars of NumPy or torch count as True. With any other value training continues.
        """

    def on_step(self, run: View, step: StepView) -> None:
        """After every step of the environments, before the update. Where no callback has it, it costs nothing.

        `run` is as after the last iteration. Not for environments on the device, nor for num_seeds above 1.
        """

    def on_checkpoint(self, run: View) -> None:
        """After a checkpoint was written to run_dir/checkpoints/last.pt."""

    def on_end(self, run: View) -> None:
        """After the last iteration's checkpoint, before evaluation; not after a fault."""


CallbackFunction = Callable[[View], bool | None]


class _Function(Callback):
    """A function as a callback."""

    def __init__(self, function: CallbackFunction) -> None:
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)

    def on_iteration(self, run: View) -> bool | None:
        return self.function(run)


def checked_callbacks(given: Iterable[Callback | CallbackFunction]) -> tuple[Callback, ...]:
    """The callbacks, with functions as callbacks of every iteration. Raises UsageError for anything else."""
    if isinstance(given, Callback) or not isinstance(given, Iterable):
        raise UsageError("callbacks must be a list: [callback]")
    callbacks: list[Callback] = []
    for one in given:
        if isinstance(one, type):
            raise UsageError(f"callbacks holds the class {one.__name__}: give an object, {one.__name__}()")
        is_callback = all(hasattr(one, moment) for moment in ("on_iteration", "on_checkpoint", "on_end"))
        if not is_callback and not callable(one):
            raise UsageError(f"callbacks holds a {type(one).__name__}: give a function, or an object of a subclass of Callback")
        callbacks.append(cast("Callback", one) if is_callback else _Function(cast("CallbackFunction", one)))
    return tuple(callbacks)


def is_yes(answer: Any) -> bool:
    """Whether a callback returned True: a bool, a number or a scalar of NumPy or torch that equals 1.

    Raises an exception for an array or tensor of several values, as `bool` does.
    """
    if hasattr(answer, "item"):
        answer = answer.item()
    return isinstance(answer, bool | int | float) and answer == 1
