"""When a run's checkpoints are written, what happens when one cannot be, and the report of a fault.

A checkpoint that cannot be written costs a line, not the run: the one before stays, and the next is tried in its turn. With
`exact` environments restart at every checkpoint, so only those at their fixed iterations are kept to be resumed from.
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
    """The checkpoints of one run, from its start or from where it goes on."""

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
        """Nothing is written yet.

        Args:
            exact: the environments restart at checkpoints.
            data_of: a state, or the policy of one, as plain data.
            iteration: of the checkpoint that is there already.
            note: takes a line.
            resumed: what --resume would be given, if not the directory itself.
            launcher: what starts the run again, before "-m fastppo.train".
        """
        self._resumed, self._launcher = resumed or directory.path, launcher
        self.best: PolicySnapshot | None = None  # the best policy, where it is not yet on disk
        self.iteration = iteration  # that a resumed run would go on from
        self._directory, self._config, self._exact, self._data_of, self._note = directory, config, exact, data_of, note
        self._last = time.monotonic()
        self._failing = False

    def restarts_at(self, iteration: int) -> bool:
        """Whether the environments restart between this iteration, counted from 1, and the next one."""
        return self._exact and iteration % (self._config.iterations_per_checkpoint or 1) == 0

    def due(self, iteration: int) -> bool:
        """Whether it is time for one, after this iteration."""
        every = self._config.iterations_per_checkpoint
        if every is None:
            return time.monotonic() - self._last >= self._config.checkpoint_seconds
        return iteration % every == 0

    def update(self, state: TrainState) -> bool:
        """Write one between two iterations, and say whether it could be. state.environments says how they stand."""
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
        """The last checkpoint of this process; state.environments says how they stand.

        Raises TrainingFault where it cannot be written.
        """
        try:
            self._write(state)
        except OSError as error:
            raise TrainingFault(
                f"iteration {state.iteration}, the last one, could not be kept: {_reason(error)}\n"
                f"that of iteration {self.iteration} is; once it can be written to, {self.go_on}"
            ) from None

    def report(self, fault: TrainingFault, stage: str, state: TrainState, rollout: Mapping[str, Tensor]) -> TrainingFault:
        """Keep what was reached and what went wrong; the fault as the user is told it.

        Args:
            stage: when it happened, as "iteration 3".
            state: as it was before that.
            rollout: the last one, as far as it came.
        """
        if isinstance(fault, RankLost):  # nobody has the whole state any more, and the reason lies with the one that is gone
            kept = max(self._directory.kept(), default=self.iteration)  # the one that writes may have gone before it had
            return RankLost(f"{stage}: {fault}\niterations up to {kept} are kept; {self.go_on}", fault.is_told)
        with contextlib.suppress(TrainingFault):  # what is kept is told below
            self.finish(state)
        told = ""
        try:
            self._directory.write_text(self._directory.fault, f"{stage}\n{''.join(traceback.format_exception(fault))}")
            told = f", details in {self._directory.fault}"
            self._directory.save(self._directory.fault_data, {"stage": stage, "fault": str(fault), "rollout": dict(rollout)})
            told += f" and {self._directory.fault_data.name}"
        except OSError as error:
            told += f" ({_reason(error)})"
        return TrainingFault(f"{stage}: {fault}\niterations up to {self.iteration} are kept{told}; {self.go_on}")

    @property
    def go_on(self) -> str:
        """What to type."""
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
