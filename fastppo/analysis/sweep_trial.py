"""One trial of a sweep: settings drawn from the search space, then a training process for each seed, one after the other.

Reads the learning curve of a run from metrics.csv and reports it to Optuna's pruner. The value of a trial is the mean of
`episodic_return_mean` over the last quarter of the run's steps, averaged over seeds; with --eval-every after -- the mean of its
evaluations there. Does not import torch.
"""

import contextlib
import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastppo.analysis.search_space import Space, to_settings
from fastppo.analysis.training_process import TrainingProcess
from fastppo.config import TrainConfig
from fastppo.run.files import replace_file
from fastppo.run.metrics import EVALUATION
from fastppo.run.metrics_file import read_rows
from fastppo.run.panel import number

if TYPE_CHECKING:
    import optuna

TRAIN = "fastppo.train"  # the module that trains
PARTS = 20  # a seed's steps in equal parts: the pruner compares trials at the end of each
TAIL = 0.25  # share of the steps whose returns count

RETURN = "episodic_return_mean"
Curve = list[tuple[int, float]]  # (global_step, return), nan before the first episode has ended


@dataclass(frozen=True)
class SweepPlan:
    """The settings that all trials of a sweep share."""

    directory: Path
    env_id: str
    base: TrainConfig  # settings of a trial that are not searched
    space: Space
    steps: int  # of each seed
    seeds: int
    num_threads: int | None  # of each process; None: that of `base`
    place: Path  # working directory of the processes, from which the environment's module is imported


class Outcome(NamedTuple):
    """How a trial ended."""

    state: str  # "complete", "pruned" or "failed"
    value: float | None  # of a complete trial
    remark: str = ""


@dataclass
class RunningTrial:
    """A trial whose processes are running."""

    trial: "optuna.Trial"
    path: Path
    started: float  # time.monotonic()
    process: TrainingProcess | None = None  # of the current seed
    values: list[float] = field(default_factory=list)  # of the finished seeds
    reported: int = 0  # parts of the current seed

    @property
    def seed(self) -> int:
        """The current seed, from 1."""
        return len(self.values) + 1


def read_curve(run_dir: Path, metric: str = RETURN) -> Curve:
    """A learning curve of a finished or running run, without rows that have no value; [] before the first."""
    curve = []
    for row in read_rows(run_dir / "metrics.csv"):
        with contextlib.suppress(KeyError, ValueError):
            curve.append((int(row["global_step"]), float(row[metric])))
    return curve


def score(curve: Curve, steps: int) -> float:
    """Mean return over the last quarter of the steps; nan if no episode ended."""
    tail = [value for step, value in curve if step > (1.0 - TAIL) * steps and math.isfinite(value)]
    return sum(tail) / len(tail) if tail else math.nan


def at_parts(curve: Curve, steps: int) -> list[float]:
    """The return at the end of each finished part; a whole run has PARTS. nan before the first episode has ended."""
    ends = [[value for step, value in curve if step * PARTS >= part * steps] for part in range(1, PARTS + 1)]
    return [values[0] for values in ends if values]


def begin(plan: SweepPlan, trial: "optuna.Trial") -> RunningTrial:
    """Draw the settings of a trial and start its first seed. Raises UsageError if the settings contradict each other."""
    found = {name: dimension.suggest(trial) for name, dimension in plan.space.items()}
    trial.set_user_attr("found", found)
    settings = to_settings(plan.base, found)
    trial.set_user_attr("found", {name: settings[name] for name in found})  # with a minibatch size that divides the batch
    trial.set_user_attr("settings", settings)
    running = RunningTrial(trial, plan.directory / f"trial-{trial.number:04}", time.monotonic())
    running.path.mkdir(parents=True, exist_ok=True)
    source = f"trial {trial.number} of the sweep in {plan.directory}"
    write_preset(running.path / "preset.json", plan.env_id, settings, source)
    _start_seed(plan, running)
    return running


def _start_seed(plan: SweepPlan, running: RunningTrial) -> None:
    """Start the training process of the current seed."""
    run_dir = running.path / f"seed-{running.seed}"
    args = ["--plain", "--preset", str(running.path / "preset.json")]
    args += ["--run-dir", str(run_dir), "--seed", str(running.seed)]
    args += ["--total-timesteps", str(plan.steps)]
    args += ["--eval-episodes", str(plan.base.eval_episodes if plan.base.eval_every else 0)]
    if plan.num_threads is not None:
        args += ["--num-threads", str(plan.num_threads)]
    running.process, running.reported = TrainingProcess(TRAIN, args, run_dir.with_suffix(".txt"), plan.place), 0


def advance(plan: SweepPlan, running: RunningTrial) -> Outcome | None:
    """Report the curve of a trial to the pruner, and start the next seed if one has ended. None while the trial runs."""
    process, seed = running.process, running.seed
    assert process is not None
    code = process.poll()  # before the curve is read, so that the curve of an ended process is complete
    curve = read_curve(running.path / f"seed-{seed}", RETURN if plan.base.eval_every is None else EVALUATION)
    if code:
        return Outcome("failed", None, process.error_line() or f"exit code {code}")
    returns = at_parts(curve, plan.steps)
    for part in range(running.reported, len(returns)):
        running.reported = part + 1
        if not math.isfinite(returns[part]):
            continue
        running.trial.report(returns[part], (seed - 1) * PARTS + part + 1)
        finished = code is not None and seed == plan.seeds
        if not finished and running.trial.should_prune():
            process.terminate()
            process.wait()
            return Outcome("pruned", None, f"at {(part + 1) / PARTS:.0%} of seed {seed}, return {number(returns[part])}")
    if code is None:
        return None
    value = score(curve, plan.steps)
    if not math.isfinite(value):
        remark = f"no episode of seed {seed} ended in the last quarter of its steps: give it more --steps"
        return Outcome("failed", None, remark)
    running.values.append(value)
    if len(running.values) < plan.seeds:
        _start_seed(plan, running)
        return None
    return Outcome("complete", sum(running.values) / plan.seeds)


def write_preset(path: Path, env_id: str, settings: dict[str, Any], source: str) -> None:
    """Write settings as a file for --preset. source: their origin."""
    preset = {"settings": settings, "env_id": env_id, "source": source[:500]}
    replace_file(path, (json.dumps(preset, indent=2) + "\n").encode())
