"""Returns on environments that have no preset: `python benchmarks/untuned.py --seeds 1 2 3 --results untuned.jsonl`.

Trainers: `general`, what fastppo does by itself; `none`, CartPole's settings; `sb3`, Stable-Baselines3's PPO with its defaults.
Each trains for 100,000 steps with one thread, and its last policy plays 20 episodes, taking the likeliest actions. Runs that
the results file holds already are not repeated. Flags after `--` are passed to fastppo's runs, to try other settings. Prints a
table and, as the last line, one JSON object.

Needs: pip install swig; pip install stable-baselines3 minigrid flappy-bird-gymnasium gymnasium-robotics gym-pusht
'gymnasium[box2d,mujoco]'
"""

import concurrent.futures
import functools
import importlib
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import tyro
from gymnasium.wrappers import TransformReward
from run_queue import Name, finished, run_missing, split_flags
from sb3_defaults import sb3_return

from fastppo.analysis.statistics import bootstrap_interval, interquartile_mean

Trainer = Literal["general", "none", "sb3"]
Make = Callable[..., gym.Env[Any, Any]]
HERE = Path(__file__).parent
NAMES = ("trainer", "environment", "seed", "steps", "flags")  # of a run, in the results file


class Untuned(NamedTuple):
    """An environment, and the returns that count as 0 and 1: of random actions, and the highest that any trainer had reached
    after 100,000 steps when this list was made, on 2026-11-29."""

    make: Make
    random: float
    best: float


def known(env_id: str, package: str | None = None, **settings: Any) -> Make:
    """A function that makes a registered environment under a name that no preset has."""

    def make(**kwargs: Any) -> gym.Env[Any, Any]:
        if package is not None:
            gym.register_envs(importlib.import_module(package))
        return gym.make(env_id, **settings, **kwargs)

    return make


def grid(env_id: str) -> Make:
    """A MiniGrid environment whose observation is the picture of 7 x 7 cells alone."""

    def make(**kwargs: Any) -> gym.Env[Any, Any]:
        import minigrid.wrappers

        return minigrid.wrappers.ImgObsWrapper(gym.make(env_id, **kwargs))

    return make


def thousand(make: Make) -> Make:
    """The same with rewards that are a thousand times as large."""
    return lambda **kwargs: TransformReward(make(**kwargs), lambda reward: 1000.0 * reward)


UNTUNED = {
    "pendulum": Untuned(known("Pendulum-v1"), -1221, -150),
    "pendulum_thousand": Untuned(thousand(known("Pendulum-v1")), -1221e3, -150e3),
    "taxi": Untuned(known("Taxi-v4"), -781, 8),
    "cliff": Untuned(known("CliffWalking-v1", max_episode_steps=200), -1973, -13),
    "frozen_lake": Untuned(known("FrozenLake8x8-v1"), 0, 0.8),
    "flappy_bird": Untuned(known("FlappyBird-v0", "flappy_bird_gymnasium", use_lidar=False), -7.8, 30),
    "lander": Untuned(known("LunarLander-v3"), -215, 240),
    "acrobot": Untuned(known("Acrobot-v1"), -500, -75),
    "cheetah": Untuned(known("HalfCheetah-v5"), -270, 1500),
    "hopper": Untuned(known("Hopper-v5"), 18, 1500),
    "walker": Untuned(known("BipedalWalker-v3"), -100, 250),
    "point_maze": Untuned(known("PointMaze_UMazeDense-v3", "gymnasium_robotics"), 67, 210),
    "push_t": Untuned(known("gym_pusht/PushT-v0", "gym_pusht"), 10, 60),
    "empty_grid": Untuned(grid("MiniGrid-Empty-5x5-v0"), 0, 0.96),
    "door_key": Untuned(grid("MiniGrid-DoorKey-5x5-v0"), 0.01, 0.97),
}


def __getattr__(name: str) -> Make:
    """`untuned:taxi`, for --env-id."""
    if name in UNTUNED:
        return UNTUNED[name].make
    raise AttributeError(name)


@dataclass(frozen=True)
class UntunedConfig:
    """Train on environments without a preset; the last line is one JSON object."""

    results: Path
    """A file with a line for each finished run, to which new ones are added."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """One run each."""
    trainers: tuple[Trainer, ...] = ("general", "none", "sb3")
    """Whose settings."""
    environments: tuple[str, ...] = tuple(UNTUNED)
    """Which of them."""
    steps: int = 100_000
    """Of training."""
    episodes: int = 20
    """Of the evaluation."""
    jobs: int = 1
    """Runs at once."""


def run_fastppo(name: str, seed: int, preset: str, flags: str, config: UntunedConfig) -> float:
    """The mean return of the last policy of one run, in fresh processes. Raises CalledProcessError."""
    with tempfile.TemporaryDirectory() as place:
        run_dir = str(Path(place, "run"))
        settings = {"--env-id": f"untuned:{name}", "--seed": seed, "--preset": preset, "--total-timesteps": config.steps}
        settings |= {"--run-dir": run_dir, "--num-threads": 1, "--eval-episodes": 0}
        words = [*(str(word) for pair in settings.items() for word in pair), *shlex.split(flags)]
        command = [sys.executable, "-m", "fastppo"]
        run = functools.partial(subprocess.run, cwd=HERE, check=True, capture_output=True, text=True)
        run([*command, "train", "--plain", *words])
        evaluate = ["evaluate", run_dir, "--checkpoint", "last", "--seed", "7", "--episodes", str(config.episodes)]
        return float(json.loads(run([*command, *evaluate]).stdout.splitlines()[-1])["return_mean"])


def run_sb3(name: str, seed: int, config: UntunedConfig) -> float:
    """The same for Stable-Baselines3's PPO with its defaults, in this process."""
    return sb3_return(UNTUNED[name].make, seed, config.steps, config.episodes)


def run(trainer: str, name: str, seed: int, steps: int, flags: str, config: UntunedConfig) -> dict[str, float]:
    """One run in a process of its own."""
    if trainer != "sb3":
        return {"evaluation": run_fastppo(name, seed, trainer, flags, config)}
    with concurrent.futures.ProcessPoolExecutor(1) as process:
        return {"evaluation": process.submit(run_sb3, name, seed, config).result()}


def table(config: UntunedConfig, returns: Mapping[Name, float]) -> tuple[str, dict[str, Any]]:
    """The table in Markdown, and each trainer's interquartile mean over environments, normalised, with its interval."""
    lines = ["| environment (random) | " + " | ".join(config.trainers) + " |", "|---" * (len(config.trainers) + 1) + "|"]
    shares: dict[str, list[float]] = {trainer: [] for trainer in config.trainers}
    for name in config.environments:
        cells, (_, random, best) = [], UNTUNED[name]
        for trainer in config.trainers:
            values = [returns[trainer, name, seed] for seed in config.seeds if (trainer, name, seed) in returns]
            cells.append(f"{statistics.fmean(values):.4g} ({', '.join(f'{value:.4g}' for value in values)})" if values else "")
            shares[trainer] += [statistics.fmean((value - random) / (best - random) for value in values)] if values else []
        lines.append(f"| {name} ({random:g}) | " + " | ".join(cells) + " |")
    means = {trainer: float(interquartile_mean(values)) for trainer, values in shares.items() if values}
    bounds = {trainer: tuple(map(float, bootstrap_interval(shares[trainer]))) for trainer in means}
    summed = (f"{means[name]:.2f} ({bounds[name][0]:.2f} to {bounds[name][1]:.2f})" for name in means)
    lines.append("| normalised, interquartile mean (95 %) | " + " | ".join(summed) + " |")
    return "\n".join(lines), {"means": means, "intervals": bounds}


def main(config: UntunedConfig, flags: str) -> int:
    """Train what is missing, print, and return the exit code."""
    wanted = [
        (trainer, name, seed, config.steps, "" if trainer == "sb3" else flags)
        for seed in config.seeds
        for trainer in config.trainers
        for name in config.environments
    ]
    failed = run_missing(config.results, NAMES, wanted, functools.partial(run, config=config), config.jobs)
    lines = finished(config.results, NAMES)
    returns = {name[:3]: lines[name]["evaluation"] for name in wanted if name in lines}
    text, summary = table(config, returns)
    print(f"\n{text}\n")
    print(json.dumps({**summary, "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    own, flags = split_flags(sys.argv[1:])
    sys.exit(main(tyro.cli(UntunedConfig, args=own), shlex.join(flags)))
