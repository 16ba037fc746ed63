"""The loop of a sweep: start trials, watch them, print how each ended and, at the end, the best settings.

Optuna chooses the settings of trials and which trials to stop early. Each trial trains in its own processes, so a failure ends
only that trial.
"""

import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from rich.table import Table

from fastppo.analysis.sweep_study import completed, finished, record_outcome
from fastppo.analysis.sweep_trial import PARTS, Outcome, RunningTrial, SweepPlan, advance, begin
from fastppo.errors import TrainingFault, UsageError
from fastppo.run.panel import number
from fastppo.run.signals import StopSignals
from fastppo.system.text import duration

if TYPE_CHECKING:
    import optuna

POLL_SECONDS = 0.25
SHOWN = 5  # trials in the table at the end
MIN_FOR_IMPORTANCE = 10  # completed trials; with fewer the importance of settings means nothing


@dataclass(frozen=True)
class SweepLimits:
    """The limits of a sweep."""

    trials: int  # in all, including those of earlier sweeps
    jobs: int  # trials at once
    timeout: float | None  # seconds after which no trial starts


class Search:
    """A running study, and its lines and bars in the terminal."""

    def __init__(self, study: "optuna.Study", plan: SweepPlan, limits: SweepLimits) -> None:
        self.study, self.plan, self.limits = study, plan, limits
        self.running: list[RunningTrial] = []
        terminal = sys.stdout.isatty()
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[note]}"))
        self._screen = Progress(*columns, console=Console(), disable=not terminal, transient=True)
        self._say = _printer(self._screen.console if terminal else None)
        self._bars: dict[int, TaskID] = {}  # by the number of the trial

    def run(self, stop: StopSignals) -> None:
        """Run trials until there are enough, the time limit is reached, or a signal arrives."""
        plan, before = self.plan, len(finished(self.study))
        deadline = math.inf if self.limits.timeout is None else time.monotonic() + self.limits.timeout
        with self._screen:
            left = f"{before} of {self.limits.trials} trials are there already; " if before else ""
            self._say(f"{left}studying {', '.join(plan.space)}: {plan.steps:,} steps a trial, seeds 1 to {plan.seeds}")
            try:
                while not stop.received:
                    while self._has_room() and time.monotonic() < deadline:
                        self._begin()
                    if not self.running:
                        break
                    time.sleep(POLL_SECONDS)
                    for trial in tuple(self.running):
                        self._watch(trial)
            finally:
                self._abandon()

    def _has_room(self) -> bool:
        """Whether another trial may start."""
        started = len(finished(self.study)) + len(self.running)
        return len(self.running) < self.limits.jobs and started < self.limits.trials

    def _begin(self) -> None:
        """Start a trial. If its settings contradict each other it ends at once."""
        trial = self.study.ask()
        try:
            self.running.append(begin(self.plan, trial))
        except UsageError as error:
            self._end(trial, Outcome("failed", None, str(error)), 0.0)

    def _watch(self, running: RunningTrial) -> None:
        """Advance a trial and end it if it has an outcome."""
        outcome = advance(self.plan, running)
        index = running.trial.number
        if index not in self._bars:
            self._bars[index] = self._screen.add_task(f"trial {index}", total=self.plan.seeds * PARTS, note="")
        parts = len(running.values) * PARTS + running.reported
        self._screen.update(self._bars[index], completed=parts, note=f"seed {running.seed}")
        if outcome is not None:
            self.running.remove(running)
            self._screen.remove_task(self._bars.pop(index))
            self._end(running.trial, outcome, time.monotonic() - running.started)

    def _end(self, trial: "optuna.Trial", outcome: Outcome, seconds: float) -> None:
        """Store the outcome of a trial and print it."""
        is_best = record_outcome(self.study, self.plan, trial, outcome)
        remark = "the best so far" if is_best else outcome.remark
        found = ", ".join(_setting(name, value) for name, value in trial.user_attrs["found"].items())
        value = "-" if outcome.value is None else number(outcome.value)
        head = f"trial {trial.number:3}  {outcome.state:8} {value:>8}  {duration(seconds):>7}"
        self._say(f"{head}  {f'({remark}) ' if remark else ''}{found}")

    def _abandon(self) -> None:
        """Stop the processes of running trials. The trials fail without an outcome, and the next sweep replaces them."""
        from optuna.trial import TrialState

        processes = [running.process for running in self.running if running.process is not None]
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
        for running in self.running:
            self.study.tell(running.trial, state=TrialState.FAIL)


def _printer(console: Console | None) -> Callable[[str], None]:
    """A function that prints a line: above the bars in a terminal, else to stdout."""
    if console is None:
        return lambda line: print(line, flush=True)
    return lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)


def print_best(study: "optuna.Study", plan: SweepPlan) -> None:
    """Print the best trials, the importance of settings, and the command that trains with the best ones.

    Raises:
        TrainingFault: no trial has a value.
    """
    best = completed(study)
    if not best:
        last = finished(study)[-1:]
        raise TrainingFault(f"no trial came to its end: see {plan.directory}" + (f"/trial-{last[0].number:04}" if last else ""))
    importance: dict[str, float] = {}
    if len(best) >= MIN_FOR_IMPORTANCE:
        from optuna.importance import get_param_importances

        importance = get_param_importances(study)
    Console().print(_table(best[:SHOWN], plan, importance))
    path = plan.directory / "best.json"
    print(f"best settings: {path}; to train with them:\nfastppo train --preset {shlex.quote(str(path))}")


def _table(best: "Sequence[optuna.trial.FrozenTrial]", plan: SweepPlan, importance: dict[str, float]) -> Table:
    """A table with a column for each trial and a row for each setting, the most important first.

    importance: by setting; {}: no column for it.
    """
    table = Table(box=None, header_style="dim")
    table.add_column("trial")
    for trial in best:
        table.add_column(str(trial.number), justify="right")
    if importance:
        table.add_column("importance", justify="right")
    table.add_row("value", *(number(trial.value or 0.0) for trial in best), style="bold green")
    for name in sorted(plan.space, key=lambda name: -importance.get(name, 0.0)):
        cells = [_value(trial.user_attrs["found"][name]) for trial in best]
        table.add_row(name, *cells, *([f"{importance.get(name, 0.0):.0%}"] if importance else []))
    return table


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _setting(name: str, value: Any) -> str:
    """'gamma 0.99', 'norm_obs' or 'no norm_obs'."""
    if isinstance(value, bool):
        return name if value else f"no {name}"
    return f"{name} {_value(value)}"
