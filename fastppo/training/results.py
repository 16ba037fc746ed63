"""What a run leaves when it ends: the last checkpoint, the summary, the picture, the evaluation of its best policy.

Knows nothing of the loop.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gymnasium.vector import VectorEnv

from fastppo.analysis.curves import plot_curves
from fastppo.analysis.evaluation import EvaluationPlan, evaluate_config
from fastppo.analysis.loading import load_policy
from fastppo.errors import TrainingFault, UsageError, brief
from fastppo.policy.agent import Agent
from fastppo.policy.module_policy import ModuleFactory
from fastppo.training.setup import Task
from fastppo.training.training_run import Note, TrainingRun


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns. Of many seeds: the joint summary, the policy evaluated best, and each seed's own result."""

    run_dir: Path
    summary: Mapping[str, Any]
    policy: Agent
    seeds: tuple["TrainResult", ...] = ()


@dataclass(frozen=True)
class Ending:
    """How a job ended, for the results of all its runs."""

    about: Mapping[str, Any]  # the part of the summary on how the runs were made
    stopped_by: str | None  # a signal's name
    policy: ModuleFactory | None  # as `train` was given it
    envs: VectorEnv | None  # to evaluate in, as evaluate_config takes them
    evaluates: bool  # whether the best policies are evaluated


def finish_run(run: TrainingRun, task: Task, ending: Ending) -> TrainResult:
    """Write what a run leaves. Raises TrainingFault where that fails."""
    directory, state, config = run.directory, run.state, run.config
    run.close()  # the picture is drawn from the log
    run.checkpoints.finish(state)
    run.callbacks.on_end()
    summary = _summary(run, ending)
    if not directory.is_written:
        return TrainResult(directory.path, summary, task.agent_of(state))
    try:
        if state.best_return == -math.inf or not directory.best.exists():  # too few episodes to judge by: the last one
            directory.save(directory.best, task.data_of(state))
        directory.write_json(directory.summary, summary)  # before evaluation, which may take long, or fail
        with drawing_curves(run.note):
            plot_curves(directory.metrics, directory.curves, f"{config.env_id}, seed {config.seed}")
        agent = load_policy(directory.path, policy=ending.policy)
        if config.eval_episodes and ending.evaluates:
            evaluation = _evaluate(run, agent, ending.envs)
            summary |= {f"eval_{key}": value for key, value in evaluation.items()}
            directory.write_json(directory.summary, summary)
    except OSError as error:
        raise TrainingFault(
            f"training is over and kept, but its results could not be written ({error.strerror}); once they can be, "
            f"{run.checkpoints.go_on}"
        ) from None
    return TrainResult(directory.path, summary, agent)


def _summary(run: TrainingRun, ending: Ending) -> dict[str, Any]:
    """summary.json before the evaluation."""
    state = run.state
    return {
        "env_id": run.config.env_id,
        "seed": run.config.seed,
        "global_step": state.global_step,
        "iterations": state.iteration,
        "seconds": state.seconds,
        "sps": run.speed.mean,
        **ending.about,
        "best_return_mean": state.best_return,
        "eval_return_mean": math.nan,
        "eval_return_std": math.nan,
        "eval_episodes": 0,
        "stopped_by": ending.stopped_by or run.enough,
    }


def _evaluate(run: TrainingRun, agent: Agent, envs: VectorEnv | None) -> dict[str, Any]:
    """The result of `evaluate_config` for best.pt; nothing, and a line, where no environments can be made for it."""
    config, by_hand = run.config, f"python -m fastppo.evaluate {run.directory.path}"
    try:
        plan = EvaluationPlan(config.eval_episodes, config.seed, trained_steps=run.state.global_step)
        result = evaluate_config(agent, config, plan, envs, run.note)
    except UsageError as error:  # those that trained could be made: this one may exist only once
        run.note(f"best.pt was not evaluated: {error}; later: {by_hand}")
        return {}
    except KeyboardInterrupt:
        run.note(f"training is over and kept; only its evaluation was interrupted, do it with: {by_hand}")
        raise
    if result["episodes"]:
        mean, std = result["return_mean"], result["return_std"]
        run.note(f"best model: return {mean:.1f} +- {std:.1f} in {result['episodes']} episodes")
    return result


@contextlib.contextmanager
def drawing_curves(note: Note) -> Iterator[None]:
    """While curves.png is drawn: a picture that cannot be drawn does not end the run. Raises OSError where the disk is full."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # whatever somebody's matplotlib may raise
        note(f"curves.png could not be drawn ({brief(error)})")
