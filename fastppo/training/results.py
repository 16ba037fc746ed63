"""Write the results at the end of a run: last checkpoint, summary, curves, evaluation of the best policy.

Knows nothing of the training loop.
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
from fastppo.errors import Interrupted, TrainingFault, UsageError, brief
from fastppo.policy.agent import Agent
from fastppo.policy.module_policy import ModuleFactory
from fastppo.training.setup import Task
from fastppo.training.training_run import Note, TrainingRun


@dataclass(frozen=True)
class TrainResult:
    """The result of `train`. Several seeds: the joint summary, the policy with the best evaluation, each seed's result."""

    run_dir: Path
    summary: Mapping[str, Any]
    policy: Agent
    seeds: tuple["TrainResult", ...] = ()


@dataclass(frozen=True)
class Ending:
    """Facts on the end of a job, for the results of its runs."""

    about: Mapping[str, Any]  # entries of the summary that are equal for all runs
    stopped_by: str | None  # name of the signal
    policy: ModuleFactory | None  # the `policy` argument of `train`
    envs: VectorEnv | None  # environments for the evaluation, see evaluate_config
    evaluates: bool  # whether to evaluate the best policies


def finish_run(run: TrainingRun, task: Task, ending: Ending) -> TrainResult:
    """Write the results of a run. Raises TrainingFault if that fails."""
    directory, state, config = run.directory, run.state, run.config
    run.close()  # flushes the log, from which curves.png is drawn
    run.checkpoints.finish(state)
    run.callbacks.on_end()
    summary = _summary(run, ending)
    if not directory.is_written:
        return TrainResult(directory.path, summary, task.agent_of(state))
    try:
        if state.best_return == -math.inf or not directory.best.exists():  # too few episodes for a score: save the last policy
            directory.save(directory.best, task.data_of(state))
        directory.write_json(directory.summary, summary)  # before the evaluation, which may take long or fail
        with drawing_curves(run.note):
            plot_curves(directory.metrics, directory.curves, f"{config.env_id}, seed {config.seed}")
        agent = load_policy(directory.path, policy=ending.policy)
        if config.eval_episodes and ending.evaluates:
            try:
                evaluation = _evaluate(run, agent, ending.envs)
            except KeyboardInterrupt:
                raise Interrupted(TrainResult(directory.path, summary, agent)) from None
            summary |= {f"eval_{key}": value for key, value in evaluation.items()}
            directory.write_json(directory.summary, summary)
    except OSError as error:
        raise TrainingFault(
            f"training is over and kept, but its results could not be written ({error.strerror}); once they can be, "
            f"{run.checkpoints.go_on}"
        ) from None
    return TrainResult(directory.path, summary, agent)


def _summary(run: TrainingRun, ending: Ending) -> dict[str, Any]:
    """The content of summary.json before the evaluation."""
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
        "best_by": "evaluation" if state.is_evaluated else "training",
        "eval_return_mean": math.nan,
        "eval_return_std": math.nan,
        "eval_episodes": 0,
        "stopped_by": ending.stopped_by or run.enough,
    }


def _evaluate(run: TrainingRun, agent: Agent, envs: VectorEnv | None) -> dict[str, Any]:
    """The result of `evaluate_config` for best.pt. {}, with a line for the user, if no environments can be made."""
    config, by_hand = run.config, f"python -m fastppo.evaluate {run.directory.path}"
    try:
        plan = EvaluationPlan(config.eval_episodes, config.seed, trained_steps=run.state.global_step)
        result = evaluate_config(agent, config, plan, envs, run.note)
    except UsageError as error:  # an environment may allow only one instance
        run.note(f"best.pt was not evaluated: {error}; later: {by_hand}")
        return {}
    except KeyboardInterrupt:
        run.note(f"training is over and kept; only its evaluation was interrupted, do it with: {by_hand}")
        raise
    if result["episodes"]:
        mean, std = result["return_mean"], result["return_std"]
        best = "best evaluated model" if run.state.is_evaluated else "best model"
        run.note(f"{best}: return {mean:.1f} +- {std:.1f} in {result['episodes']} episodes")
    return result


@contextlib.contextmanager
def drawing_curves(note: Note) -> Iterator[None]:
    """Context for drawing curves.png. A failed drawing does not end the run. An OSError (full disk) is raised."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # matplotlib can raise anything
        note(f"curves.png could not be drawn ({brief(error)})")
