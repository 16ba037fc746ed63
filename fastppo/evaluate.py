"""Play episodes with a trained policy and report their returns: `python -m fastppo.evaluate RUN_DIR --episodes K`."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import gymnasium as gym
import numpy as np
import tyro
from numpy.typing import NDArray
from tyro.constructors import PrimitiveConstructorSpec

from fastppo.cli import parse, run
from fastppo.config import TrainConfig, read_run_config
from fastppo.envs.atari import atari_settings
from fastppo.envs.autoreset import AutoresetEnvs, is_tensor
from fastppo.envs.deadline import Deadline
from fastppo.errors import ENVIRONMENT_ERRORS, ForkHangs, UsageError, environment_fault
from fastppo.random_streams import Stream, environment_seed, seed_of
from fastppo.system.paths import absolute, current_directory

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv

    from fastppo.policy.agent import Agent

Note = Callable[[str], None]  # takes a line for people

EPISODE_STEPS = 1_000  # for each episode that is asked for, where less was trained
EPISODE_LIMIT = 100_000  # for each of them, however much was trained
TELL_SECONDS = 5.0  # between lines on how far it has come

VideoFormat = Annotated[
    str | None,
    PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar="[mp4|gif]",
        instance_from_str=lambda given: given[0] if given else "auto",
        is_instance=lambda instance: instance is None or isinstance(instance, str),
        str_from_instance=lambda video: ["None" if video is None else video],
    ),
]


@dataclass(frozen=True)
class EvaluateConfig:
    """Play episodes with a run's policy; the last line of the output is one JSON object."""

    run_dir: Annotated[str, tyro.conf.Positional]
    """Directory of the run."""
    episodes: int = 20
    """Episodes to play."""
    checkpoint: Literal["best", "last"] = "best"
    """Which policy: the one whose training episodes returned most, or the one at the end."""
    deterministic: bool = True
    """Take the likeliest action; otherwise sample."""
    seed: int = 0
    """Seed of the environments and of sampling."""
    render: Literal["human"] | None = None
    """human: play the episodes one after another in a window, at their natural speed."""
    video: VideoFormat = None
    """Keep videos in the run directory, of further episodes; mp4 where there is ffmpeg, else gif."""
    video_episodes: int = 1
    """Episodes that --video keeps."""
    max_steps: int | None = None
    """Most steps of all episodes together. Default: as many as were trained, but 1,000 to 100,000 an episode."""

    def __post_init__(self) -> None:
        if self.video not in (None, "auto", "mp4", "gif"):
            raise UsageError(f"--video takes mp4, gif or nothing, got {self.video[:100]!r}")
        if self.video_episodes < 1:
            raise UsageError(f"--video-episodes must be at least 1, got {self.video_episodes}")
        if self.max_steps is not None and self.max_steps < 1:
            raise UsageError(f"--max-steps must be at least 1, got {self.max_steps}")
        if self.episodes < 1 or self.seed < 0:
            raise UsageError(f"--episodes must be at least 1 and --seed at least 0, got {self.episodes} and {self.seed}")


@dataclass(frozen=True)
class Played:
    """What an evaluation came to."""

    returns: list[float]  # of the episodes that ended
    wanted: int  # episodes
    steps: int  # of all environments that had episodes left to play
    reward: float  # the sum of all of these steps

    @property
    def report(self) -> dict[str, Any]:
        """`return_mean return_std episodes`; nan where no episode ended, as JSON null."""
        mean, std = (float(np.mean(self.returns)), float(np.std(self.returns))) if self.returns else (math.nan, math.nan)
        return {"return_mean": mean, "return_std": std, "episodes": len(self.returns)}

    @property
    def remark(self) -> str | None:
        """A line where not all episodes ended."""
        if len(self.returns) == self.wanted:
            return None
        if not self.returns:
            mean = self.reward / max(self.steps, 1)
            return f"no episode ended in the {self.steps:,} steps of the evaluation, so there is no return ({mean:.4g} a step)"
        return (
            f"only {len(self.returns)} of {self.wanted} episodes ended in the {self.steps:,} steps of the evaluation: "
            "the mean is over these, and leaves out the longest"
        )


def most_steps(trained: int, episodes: int, longest: int | None) -> int:
    """Steps that an evaluation may take: as many as were trained, but 1,000 to 100,000 an episode, or the time limit's number.

    Args:
        trained: steps. longest: of an episode, where the environment has a time limit.
    """
    least = max(EPISODE_STEPS, min(longest or 0, EPISODE_LIMIT))
    return min(max(trained, least * episodes), EPISODE_LIMIT * episodes)


def evaluate(agent: "Agent", envs: AutoresetEnvs, episodes: int, seed: int, deterministic: bool = True) -> list[float]:
    """True returns of `episodes` episodes, played as by `play_episodes`."""
    return play_episodes(agent, envs, episodes, seed, deterministic).returns


def play_episodes(
    agent: "Agent",
    envs: AutoresetEnvs,
    episodes: int,
    seed: int,
    deterministic: bool = True,
    max_steps: int | None = None,
    note: Note | None = None,
) -> Played:
    """Play `episodes` episodes.

    Each environment plays a number of episodes fixed beforehand: taking the first to finish would favour short ones. After
    `max_steps` steps (default: EPISODE_LIMIT an episode) those under way are given up, since there may be no end. note: gets a
    line now and then on how far it has come.
    """
    quota = np.full(envs.num_envs, episodes // envs.num_envs)
    quota[: episodes % envs.num_envs] += 1
    returns: list[list[float]] = [[] for _ in range(envs.num_envs)]
    running, left = np.zeros(envs.num_envs), quota.copy()
    most = EPISODE_LIMIT * episodes if max_steps is None else max_steps
    steps, reward_sum, told = 0, 0.0, time.monotonic()
    valid = np.ones(envs.num_envs, bool)
    agent.seed(seed_of(seed, Stream.EVALUATION_ACTIONS))
    agent.reset()
    obs, mask = envs.reset_and_mask(environment_seed(seed, Stream.EVALUATION_ENVIRONMENTS))
    while left.any() and steps < most:
        step = envs.step(agent.act(obs, deterministic, mask))
        obs, mask = step.obs, step.action_mask
        reward, terminated, truncated = map(_to_host, (step.reward, step.terminated, step.truncated))
        counted = valid & (left > 0)
        running += np.where(counted, reward, 0.0)
        steps, reward_sum = steps + int(counted.sum()), reward_sum + float(reward[counted].sum())
        done = np.logical_or(terminated, truncated) & valid
        over = done if step.game_over is None else done & _to_host(step.game_over)
        for index in np.flatnonzero(over & (left > 0)):
            returns[index].append(float(running[index]))
            running[index], left[index] = 0.0, left[index] - 1
        agent.reset(done if envs.keeps_final_obs else ~valid)  # whose next observation is a first one
        valid = ~done if not envs.keeps_final_obs else valid
        if note is not None and time.monotonic() - told >= TELL_SECONDS:
            note(f"evaluating: {episodes - left.sum()} of {episodes} episodes, {steps:,} of at most {most:,} steps")
            told = time.monotonic()
    agent.reset()
    return Played([value for played in returns for value in played], episodes, steps, reward_sum)


def _to_host(batch: Any) -> NDArray[Any]:
    """An array of one step's results, whatever device they are on."""
    return np.asarray(batch.detach().cpu() if is_tensor(batch) else batch)


def evaluate_config(
    agent: "Agent",
    config: TrainConfig,
    episodes: int,
    seed: int,
    deterministic: bool = True,
    envs: "VectorEnv[Any, Any, Any] | None" = None,
    *,
    trained: int = 0,
    max_steps: int | None = None,
    note: Note = print,
) -> dict[str, Any]:
    """Evaluate: `return_mean return_std episodes`, nan and 0 where no episode ended.

    Args:
        envs: left open; None: fresh ones, made as training's were.
        trained, max_steps: steps of training; most steps, by default as `most_steps` says.
        note: takes lines for people: what is played, how far it has come, and what did not end.
    """
    most = most_steps(trained, episodes, time_limit(config, envs)) if max_steps is None else max_steps
    note(f"evaluating for {episodes} episodes, {most:,} steps at most")

    def played(config: TrainConfig) -> Played:
        made = _made_for(config, episodes, deadline) if envs is None else envs
        playing = AutoresetEnvs(made, deadline)
        try:
            return play_episodes(agent, playing, episodes, seed, deterministic, most, note)
        finally:
            if envs is None:
                playing.close()

    with contextlib.closing(Deadline(config.env_timeout)) as deadline:
        try:
            try:
                result = played(config)
            except ForkHangs as error:
                note(f"the evaluation starts again in one process: {error}")
                result = played(replace(config, vectorization="sync"))
        except UsageError:
            raise
        except ENVIRONMENT_ERRORS as error:
            raise environment_fault(error, "during evaluation") from error
    if result.remark is not None:
        note(result.remark)
    return result.report


def time_limit(config: TrainConfig, envs: "VectorEnv[Any, Any, Any] | None" = None) -> int | None:
    """Most steps of an episode, where the environment says so."""
    spec = getattr(envs, "spec", None) or gym.registry.get(config.env_id.rpartition(":")[2])
    limit = config.env_kwargs.get("max_episode_steps") or getattr(spec, "max_episode_steps", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _made_for(config: TrainConfig, episodes: int, deadline: Deadline) -> "VectorEnv[Any, Any, Any]":
    from fastppo.envs.backends import make_envs  # here, so that --help and wrong flags do not wait for torch

    return make_envs(
        config.env_id,
        min(episodes, 8, config.num_envs),  # there may be no more of them than training had
        config.backend,
        config.vectorization,
        config.env_kwargs,
        "cpu",
        atari_settings(config),
        config.num_threads,
        deadline,
    )


@contextlib.contextmanager
def _drawn(config: TrainConfig) -> Iterator[AutoresetEnvs]:
    """The run's environment, one that can be looked at. Raises UsageError where there is none."""
    from fastppo.envs.render import make_drawn

    with contextlib.closing(Deadline(config.env_timeout)) as deadline:
        atari = atari_settings(config)
        with contextlib.closing(make_drawn(config.env_id, config.backend, config.env_kwargs, atari, deadline)) as envs:
            yield envs


def show_episodes(
    agent: "Agent",
    config: TrainConfig,
    episodes: int,
    seed: int,
    deterministic: bool = True,
    *,
    trained: int = 0,
    max_steps: int | None = None,
) -> dict[str, Any]:
    """`evaluate_config` in a window, one episode after another. Raises UsageError where there is no display."""
    from fastppo.analysis.video import check_display, play, window
    from fastppo.envs.render import frames_per_second

    check_display()
    agent.seed(seed_of(seed, Stream.EVALUATION_ACTIONS))
    with _drawn(config) as envs, window(config.env_id, frames_per_second(envs)) as show:
        seeds = [environment_seed(seed, Stream.EVALUATION_ENVIRONMENTS), *[None] * (episodes - 1)]
        most = max_steps or most_steps(trained, 1, time_limit(config)) + 1
        played = [play(agent, envs, show, first, deterministic, most) for first in seeds]
    ended = [total for total, steps in played if steps < most]
    result = Played(ended, episodes, sum(steps for _, steps in played), sum(total for total, _ in played))
    if result.remark is not None:
        print(result.remark)
    return result.report


def record_episodes(
    agent: "Agent",
    config: TrainConfig,
    name: Path,
    suffix: str,
    episodes: int,
    seed: int,
    deterministic: bool = True,
    trained: int = 0,
) -> list[Path]:
    """Videos `name`-episode-0`suffix` and so on, and a printed line on each; raises UsageError for what cannot be drawn."""
    from fastppo.analysis.video import record

    paths = [name.with_name(f"{name.name}-episode-{index}{suffix}") for index in range(episodes)]
    agent.seed(seed_of(seed, Stream.VIDEO_ACTIONS))
    seeds = [environment_seed(seed, Stream.VIDEO_ENVIRONMENT), *[None] * (episodes - 1)]
    most = most_steps(trained, 1, time_limit(config)) + 1
    with _drawn(config) as envs:
        for path, first in zip(paths, seeds, strict=True):
            total, steps = record(agent, envs, path, first, deterministic, most)
            print(f"{path}: return {total:.4g} in {steps} steps" + (", where it is cut off" if steps == most else ""))
    return paths


def _main(args: Sequence[str]) -> None:
    settings = parse(EvaluateConfig, args, prog="python -m fastppo.evaluate")
    # the environment's code may change the working directory
    directory = absolute(settings.run_dir, "RUN_DIR", current_directory())
    config = read_run_config(directory)
    import torch  # here, so that --help and wrong flags do not wait for it

    from fastppo.analysis.loading import agent_from_checkpoint
    from fastppo.run.checkpoint_file import load_checkpoint

    torch.set_num_threads(1)  # a few rows at a time: a second thread costs more than it gives
    path = directory / "checkpoints" / f"{settings.checkpoint}.pt"
    checkpoint = load_checkpoint(path)
    agent = agent_from_checkpoint(checkpoint, config, path)
    how, trained = (settings.seed, settings.deterministic), int(checkpoint["global_step"])
    videos = []
    if settings.video is not None:
        from fastppo.analysis.video import choose_suffix

        suffix, remark = choose_suffix(settings.video)
        if remark is not None:
            print(remark)
        name = directory / "videos" / f"eval-step-{checkpoint['global_step']}"
        videos = record_episodes(agent, config, name, suffix, settings.video_episodes, *how, trained)
    played = evaluate_config if settings.render is None else show_episodes
    result = played(agent, config, settings.episodes, *how, trained=trained, max_steps=settings.max_steps)
    if result["episodes"]:
        mean, spread = result["return_mean"], result["return_std"] / math.sqrt(result["episodes"])
        error = (
            f" +- {spread:.2f} (standard error of {result['episodes']} episodes)" if result["episodes"] > 1 else " in 1 episode"
        )
        print(f"{config.env_id}: return {mean:.2f}{error}")
    else:
        print(f"{config.env_id}: no return; --max-steps allows more steps")
        result = {**result, "return_mean": None, "return_std": None}
    print(json.dumps({**result, "video": str(videos[0])} if videos else result))


def console(args: Sequence[str] | None = None) -> int:
    """Entry point: the exit code."""
    return run(_main, sys.argv[1:] if args is None else args)


if __name__ == "__main__":
    sys.exit(console())
