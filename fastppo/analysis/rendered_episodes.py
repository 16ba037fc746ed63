"""Episodes of a run's policy in a window or in video files."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastppo.analysis.evaluation import EvaluationPlan, EvaluationResult, most_steps, time_limit
from fastppo.analysis.video import check_display, play, record, window
from fastppo.config import TrainConfig
from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.envs.deadline import Deadline
from fastppo.envs.render import frames_per_second, make_render_env
from fastppo.policy.agent import Agent
from fastppo.random_streams import Stream, environment_seed, seed_of


@contextlib.contextmanager
def _rendered_envs(config: TrainConfig) -> Iterator[AutoresetEnvs]:
    """One environment of the run, which can be rendered; raises UsageError if it cannot."""
    with (
        contextlib.closing(Deadline(config.env_timeout)) as deadline,
        contextlib.closing(make_render_env(config.env_config, deadline)) as envs,
    ):
        yield envs


def show_episodes(agent: Agent, config: TrainConfig, plan: EvaluationPlan) -> dict[str, Any]:
    """`evaluate_config` in a window, one episode after another. Raises UsageError if there is no display.

    plan.max_steps: of each episode.
    """
    check_display()
    agent.seed(seed_of(plan.seed, Stream.EVALUATION_ACTIONS))
    with _rendered_envs(config) as envs, window(config.env_id, frames_per_second(envs)) as show:
        seeds = [environment_seed(plan.seed, Stream.EVALUATION_ENVIRONMENTS), *[None] * (plan.episodes - 1)]
        most = plan.max_steps or _most_steps(config, plan)
        played = [play(agent, envs, show, seed, plan.deterministic, most) for seed in seeds]
    ended = [total for total, steps in played if steps < most]
    steps, reward = sum(steps for _, steps in played), sum(total for total, _ in played)
    result = EvaluationResult(ended, plan.episodes, steps, reward)
    if result.remark is not None:
        print(result.remark)
    return result.report


def record_episodes(agent: Agent, config: TrainConfig, name: Path, suffix: str, plan: EvaluationPlan) -> list[Path]:
    """Write the videos `name`-episode-0`suffix` and so on, and print a line on each.

    Raises:
        UsageError: the environment cannot be rendered, or a video cannot be written.
    """
    paths = [name.with_name(f"{name.name}-episode-{index}{suffix}") for index in range(plan.episodes)]
    agent.seed(seed_of(plan.seed, Stream.VIDEO_ACTIONS))
    seeds = [environment_seed(plan.seed, Stream.VIDEO_ENVIRONMENT), *[None] * (plan.episodes - 1)]
    most = _most_steps(config, plan)
    with _rendered_envs(config) as envs:
        for path, seed in zip(paths, seeds, strict=True):
            total, steps = record(agent, envs, path, seed, plan.deterministic, most)
            print(f"{path}: return {total:.4g} in {steps} steps" + (", where it is cut off" if steps == most else ""))
    return paths


def _most_steps(config: TrainConfig, plan: EvaluationPlan) -> int:
    """Largest number of steps of one episode: one more than it may have to end by itself."""
    return most_steps(plan.trained_steps, 1, time_limit(config)) + 1
