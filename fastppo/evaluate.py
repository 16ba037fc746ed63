"""Play episodes with a trained policy and report their returns: `python -m fastppo.evaluate RUN_DIR --episodes K`."""

import contextlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro
from numpy.typing import NDArray
from tyro.constructors import PrimitiveConstructorSpec

from fastppo.cli import parse, run
from fastppo.config import TrainConfig, read_run_config
from fastppo.envs.atari import atari_settings
from fastppo.envs.autoreset import AutoresetEnvs, is_tensor
from fastppo.envs.deadline import Deadline
from fastppo.errors import ENVIRONMENT_ERRORS, UsageError, environment_fault
from fastppo.paths import absolute, current_directory
from fastppo.random_streams import Stream, environment_seed, seed_of

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv

    from fastppo.policy.agent import Agent

EPISODE_LIMIT = 100_000

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

    def __post_init__(self) -> None:
        if self.video not in (None, "auto", "mp4", "gif"):
            raise UsageError(f"--video takes mp4, gif or nothing, got {self.video[:100]!r}")
        if self.video_episodes < 1:
            raise UsageError(f"--video-episodes must be at least 1, got {self.video_episodes}")
        if self.episodes < 1 or self.seed < 0:
            raise UsageError(f"--episodes must be at least 1 and --seed at least 0, got {self.episodes} and {self.seed}")


def evaluate(agent: "Agent", envs: AutoresetEnvs, episodes: int, seed: int, deterministic: bool = True) -> list[float]:
    """True returns of `episodes` episodes.

    Each environment plays a number of episodes fixed beforehand: taking the first to finish would favour short ones. An episode
    that goes on for EPISODE_LIMIT steps counts as it stands, so that an environment without an end does not hang.
    """
    quota = np.full(envs.num_envs, episodes // envs.num_envs)
    quota[: episodes % envs.num_envs] += 1
    returns: list[list[float]] = [[] for _ in range(envs.num_envs)]
    running, length = np.zeros(envs.num_envs), np.zeros(envs.num_envs, np.int64)
    valid = np.ones(envs.num_envs, bool)
    agent.seed(seed_of(seed, Stream.EVALUATION_ACTIONS))
    agent.reset()
    obs, mask = envs.reset_and_mask(environment_seed(seed, Stream.EVALUATION_ENVIRONMENTS))
    while any(len(played) < wanted for played, wanted in zip(returns, quota, strict=True)):
        step = envs.step(agent.act(obs, deterministic, mask))
        obs, mask = step.obs, step.action_mask
        reward, terminated, truncated = map(_to_host, (step.reward, step.terminated, step.truncated))
        running += np.where(valid, reward, 0.0)
        length += valid
        done = np.logical_or(terminated, truncated) & valid
        over = done if step.game_over is None else done & _to_host(step.game_over)
        for index in np.flatnonzero(over | (length >= EPISODE_LIMIT)):
            returns[index].append(float(running[index]))
            running[index], length[index] = 0.0, 0
        agent.reset(done if envs.keeps_final_obs else ~valid)  # whose next observation is a first one
        valid = ~done if not envs.keeps_final_obs else valid
    agent.reset()
    return [value for played, wanted in zip(returns, quota, strict=True) for value in played[:wanted]]


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
) -> dict[str, Any]:
    """Evaluate: `return_mean return_std episodes`. envs: left open; None: fresh ones, made as training's were."""
    with contextlib.closing(Deadline(config.env_timeout)) as deadline:
        playing = AutoresetEnvs(_made_for(config, episodes, deadline) if envs is None else envs, deadline)
        try:
            returns = evaluate(agent, playing, episodes, seed, deterministic)
        except UsageError:
            raise
        except ENVIRONMENT_ERRORS as error:
            raise environment_fault(error, "during evaluation") from error
        finally:
            if envs is None:
                playing.close()
    return _report(returns)


def _report(returns: Sequence[float]) -> dict[str, Any]:
    return {"return_mean": float(np.mean(returns)), "return_std": float(np.std(returns)), "episodes": len(returns)}


def _made_for(config: TrainConfig, episodes: int, deadline: Deadline) -> "VectorEnv[Any, Any, Any]":
    from fastppo.envs.backends import make_envs  # here, so that --help and wrong flags do not wait for torch

    return make_envs(
        config.env_id,
        min(episodes, 8),
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
    from fastppo.envs.drawn import make_drawn

    with contextlib.closing(Deadline(config.env_timeout)) as deadline:
        atari = atari_settings(config)
        with contextlib.closing(make_drawn(config.env_id, config.backend, config.env_kwargs, atari, deadline)) as envs:
            yield envs


def show_episodes(agent: "Agent", config: TrainConfig, episodes: int, seed: int, deterministic: bool = True) -> dict[str, Any]:
    """`evaluate_config` in a window, one episode after another. Raises UsageError where there is no display."""
    from fastppo.envs.drawn import frames_per_second
    from fastppo.video import check_display, play, window

    check_display()
    agent.seed(seed_of(seed, Stream.EVALUATION_ACTIONS))
    with _drawn(config) as envs, window(config.env_id, frames_per_second(envs)) as show:
        seeds = [environment_seed(seed, Stream.EVALUATION_ENVIRONMENTS), *[None] * (episodes - 1)]
        returns = [play(agent, envs, show, first, deterministic, EPISODE_LIMIT)[0] for first in seeds]
    return _report(returns)


def record_episodes(
    agent: "Agent", config: TrainConfig, name: Path, suffix: str, episodes: int, seed: int, deterministic: bool = True
) -> list[Path]:
    """Videos `name`-episode-0`suffix` and so on, and a printed line on each; raises UsageError for what cannot be drawn."""
    from fastppo.video import record

    paths = [name.with_name(f"{name.name}-episode-{index}{suffix}") for index in range(episodes)]
    agent.seed(seed_of(seed, Stream.VIDEO_ACTIONS))
    seeds = [environment_seed(seed, Stream.VIDEO_ENVIRONMENT), *[None] * (episodes - 1)]
    with _drawn(config) as envs:
        for path, first in zip(paths, seeds, strict=True):
            total, steps = record(agent, envs, path, first, deterministic, EPISODE_LIMIT)
            print(f"{path}: return {total:.4g} in {steps} steps")
    return paths


def _main(args: Sequence[str]) -> None:
    settings = parse(EvaluateConfig, args, prog="python -m fastppo.evaluate")
    # the environment's code may change the working directory
    directory = absolute(settings.run_dir, "RUN_DIR", current_directory())
    config = read_run_config(directory)
    import torch  # here, so that --help and wrong flags do not wait for it

    from fastppo.loading import agent_from_checkpoint
    from fastppo.run.checkpoint import load_checkpoint

    torch.set_num_threads(1)  # a few rows at a time: a second thread costs more than it gives
    path = directory / "checkpoints" / f"{settings.checkpoint}.pt"
    checkpoint = load_checkpoint(path)
    agent = agent_from_checkpoint(checkpoint, config, path)
    how = (settings.seed, settings.deterministic)
    videos = []
    if settings.video is not None:
        from fastppo.video import choose_suffix

        suffix, remark = choose_suffix(settings.video)
        if remark is not None:
            print(remark)
        name = directory / "videos" / f"eval-step-{checkpoint['global_step']}"
        videos = record_episodes(agent, config, name, suffix, settings.video_episodes, *how)
    played = evaluate_config if settings.render is None else show_episodes
    result = played(agent, config, settings.episodes, *how)
    spread = result["return_std"] / math.sqrt(result["episodes"])
    print(
        f"{config.env_id}: return {result['return_mean']:.2f} +- {spread:.2f} (standard error of {result['episodes']} episodes)"
    )
    print(json.dumps({**result, "video": str(videos[0])} if videos else result))


def console(args: Sequence[str] | None = None) -> int:
    """Entry point: the exit code."""
    return run(_main, sys.argv[1:] if args is None else args)


if __name__ == "__main__":
    sys.exit(console())
