"""Write a run's checkpoints, handle failed writes, and report faults.

If a checkpoint cannot be written, the run prints a line and continues. The previous checkpoint stays, and the next one is
written as planned. With `exact`, environments restart at every checkpoint, so only checkpoints at the planned iterations are
kept for resuming.
"""

import contextlib
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastppo.config import TrainConfig
from fastppo.errors import RankLost, TrainingFault
from fastppo.run.directory import RunDirectory
from fastppo.training.state import PolicySnapshot, TrainState


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(
        self,
        directory: RunDirectory,
        config: TrainConfig,
        exact: bool,
        data_of: Callable[[TrainState | PolicySnapshot], dict[str, Any]],
        iteration: int,
        note: Callable[[str], None],
        resumed: Path | None = None,
        launcher: str = "python",
    ) -> None:
        """Writes nothing yet.

        Args:
            exact: environments restart at checkpoints.
            data_of: converts a state or a policy snapshot to plain data.
            iteration: iteration of the latest checkpoint on disk.
            note: prints a line.
            resumed: the path for --resume, if it is not the directory itself.
            launcher: the command before "-m fastppo.train" that starts the run.
        """
        self._resumed, self._launcher = resumed or directory.path, launcher
        self.best: PolicySnapshot | None = None  # the best policy, if it is not yet on disk
        self.iteration = iteration  # a resumed run continues after this one
        self._directory, self._config, self._exact, self._data_of, self._note = directory, config, exact, data_of, note
        self._last = time.monotonic()
        self._failing = False

    def restarts_at(self, iteration: int) -> bool:
        """Whether the environments restart between this iteration, counted from 1, and the next one."""
        return self._exact and iteration % (self._config.iterations_per_checkpoint or 1) == 0

    def due(self, iteration: int) -> bool:
        """Whether a checkpoint is due after this iteration."""
        every = self._config.iterations_per_checkpoint
        if every is None:
            return time.monotonic() - self._last >= self._config.checkpoint_seconds
        return iteration % every == 0

    def update(self, state: TrainState) -> bool:
        """Write a checkpoint between two iterations. Returns whether that succeeded.

        state: with the environments' current state in state.environments.
        """
        self._last = time.monotonic()
        try:
            self._write(state)
            if self._failing:
                self._note(f"checkpoints can be written again: {self._directory.last} is of iteration {state.iteration}")
            self._failing = False
            return True
        except OSError as error:
            if not self._failing:
                self._note(
                    f"no checkpoint of iteration {state.iteration}: {_reason(error)}; that of iteration {self.iteration} "
                    "stays, and training goes on"
                )
            self._failing = True
            return False

    def finish(self, state: TrainState) -> None:
        """Write the last checkpoint of this process.

        state: with the environments' current state in state.environments.

        Raises TrainingFault if it cannot be written.
        """
        try:
            self._write(state)
        except OSError as error:
            raise TrainingFault(
                f"iteration {state.iteration}, the last one, could not be kept: {_reason(error)}\n"
                f"that of iteration {self.iteration} is; once it can be written to, {self.go_on}"
            ) from None

    def report(self, fault: TrainingFault, stage: str, state: TrainState, rollout: Mapping[str, Tensor]) -> TrainingFault:
        """Write the last state and the details of the fault. Returns the fault with a message for the user.

        Args:
            stage: when the fault happened, for example "iteration 3".
            state: the state before the fault.
            rollout: the last rollout, possibly incomplete.
        """
        if isinstance(fault, RankLost):  # no rank has the whole state, and the lost rank knows the reason
            saved = max(self._directory.kept(), default=self.iteration)  # rank 0 may have been lost before it wrote
            return RankLost(f"{stage}: {fault}\niterations up to {saved} are kept; {self.go_on}", fault.is_told)
        with contextlib.suppress(TrainingFault):  # the message below names the last saved iteration
            self.finish(state)
        details = ""
        try:
            self._directory.write_text(self._directory.fault, f"{stage}\n{''.join(traceback.format_exception(fault))}")
            details = f", details in {self._directory.fault}"
            self._directory.save(self._directory.fault_data, {"stage": stage, "fault": str(fault), "rollout": dict(rollout)})
            details += f" and {self._directory.fault_data.name}"
        except OSError as error:
            details += f" ({_reason(error)})"
        return TrainingFault(f"{stage}: {fault}\niterations up to {self.iteration} are kept{details}; {self.go_on}")

    @property
    def go_on(self) -> str:
        """The command that resumes the run."""
        return f"go on with: {self._launcher} -m fastppo.train --resume {self._resumed}"

    def _write(self, state: TrainState) -> None:
        if self.best is not None:
            self._directory.save(self._directory.best, {**self._data_of(self.best), "best_return": state.best_return})
            self.best = None
        if self._exact and not self.restarts_at(state.iteration):
            self._directory.save(self._directory.last, self._data_of(state))
        elif state.iteration != self.iteration or not self._directory.last.exists():
            self._directory.keep(state.iteration, self._data_of(state), self._config.keep_checkpoints)
            self.iteration = state.iteration


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__
