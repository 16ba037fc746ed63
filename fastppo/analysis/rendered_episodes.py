"""Show episodes of a policy in a window or record them as videos, during and after training.

Knows nothing of video formats (video.py) or of how an environment is rendered (envs/render.py).
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastppo.analysis.evaluation import EvaluationPlan, EvaluationResult, most_steps, time_limit, to_host
from fastppo.analysis.video import Show, check_display, choose_suffix, video_file, window
from fastppo.callbacks import Callback, View
from fastppo.config import TrainConfig
from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.envs.deadline import Deadline
from fastppo.envs.render import frames_per_second, make_render_env, render_frame
from fastppo.envs.streams import untouched_streams
from fastppo.errors import ENVIRONMENT_ERRORS, UsageError, environment_fault, located
from fastppo.policy.agent import Agent
from fastppo.random_streams import Stream, environment_seed, seed_of

RECORD_STEPS = 1000  # limit of an episode that is recorded during training


def play(agent: Agent, envs: AutoresetEnvs, show: Show, seed: int | None, deterministic: bool, limit: int) -> tuple[float, int]:
    """Play one episode and show a frame for its first state and after every step. A game with lives is played to its end.

    Args:
        envs: one environment that can be rendered.
        seed: for the reset; None: the generator of the environment continues.
        limit: largest number of steps.

    Returns:
        The episode's return and its number of steps, one less than the number of frames.

    Raises:
        TrainingFault: the environment failed.
    """
    total, counts = 0.0, np.ones(envs.num_envs, bool)  # counts: which rows' next step is a transition
    for steps in range(limit + 1):
        try:
            if steps == 0:
                agent.reset()
                obs, mask = envs.reset_and_mask(seed)
                counts = counts if envs.acting is None else envs.acting
            else:
                step = envs.step(agent.act(obs, deterministic, mask))
                obs, mask = step.obs, step.action_mask
            frame = render_frame(envs)
        except UsageError:
            raise
        except ENVIRONMENT_ERRORS as error:
            raise environment_fault(error, "while it was rendered") from error
        show(frame)
        if steps > 0:
            reward, terminated, truncated = map(to_host, (step.reward, step.terminated, step.truncated))
            total += float(np.where(counts, reward, 0.0).mean())  # of several agents: the mean of their returns
            done = np.logical_or(terminated, truncated) & counts
            if (done if step.game_over is None else done & to_host(step.game_over)).any():
                break
            agent.reset(done if envs.keeps_final_obs else ~counts)  # whose next observation is the first of a new life
            if not envs.keeps_final_obs:  # the step after the end of a life only resets
                counts = ~done if envs.acting is None else envs.acting
    return total, steps


def record(
    agent: Agent, envs: AutoresetEnvs, path: Path, seed: int | None, deterministic: bool, limit: int
) -> tuple[float, int]:
    """`play` one episode into a video at `path`. Raises the errors of `play` and `video_file`."""
    with video_file(path, frames_per_second(envs)) as show:
        return play(agent, envs, show, seed, deterministic, limit)


@contextlib.contextmanager
def _rendered_envs(config: TrainConfig) -> Iterator[AutoresetEnvs]:
    """One environment of the run that can be rendered. Raises UsageError if there is none."""
    with (
        contextlib.closing(Deadline(config.env_timeout)) as deadline,
        contextlib.closing(make_render_env(config.env_config, deadline)) as envs,
    ):
        yield envs


def show_episodes(agent: Agent, config: TrainConfig, plan: EvaluationPlan) -> dict[str, Any]:
    """Like `evaluate_config`, in a window, one episode after another. Raises UsageError if there is no display.

    plan.max_steps: limit of each episode.
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
    """Largest number of steps of one episode: one more than `most_steps` allows."""
    return most_steps(plan.trained_steps, 1, time_limit(config)) + 1


class Recorder(Callback):
    """--record-every K: after every K-th iteration record an episode as a video in the run directory.

    Recording does not change training: the environment is separate, each video has its own seed, and the policy takes the
    likeliest actions, so no generator of the run is used. After a failure it prints a line and training continues.
    """

    def __init__(self, envs: AutoresetEnvs, every: int, note: Callable[[str], None]) -> None:
        """envs: one environment that can be rendered. note: prints a line on each video."""
        self.envs = envs
        self.every = every
        self.note = note
        self.suffix, remark = choose_suffix("auto")
        if remark is not None:
            note(remark)

    def on_iteration(self, run: View) -> None:
        if run.iteration % self.every:
            return
        path = run.run_dir / "videos" / f"step-{run.global_step}{self.suffix}"
        try:
            seed = environment_seed(run.config.seed, Stream.RECORDED_ENVIRONMENT)
            with untouched_streams():
                total, steps = record(run.policy(), self.envs, path, seed, True, RECORD_STEPS)
        except UsageError as error:
            self.note(f"no video of this iteration: {error}")
        except ENVIRONMENT_ERRORS as error:
            self.note(f"no video of this iteration: {located(error)}")
        else:
            self.note(f"{path}: return {total:.4g} in {steps} steps")
