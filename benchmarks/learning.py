"""Returns of the presets beside published figures: `python benchmarks/learning.py --env-id Hopper-v5 --seeds 1 2 3`.

Each run is the user's own command in a fresh process; its result is the evaluation of its best model (summary.json). Flags
after `--` are passed to every run: `python benchmarks/learning.py --env-id Acrobot-v1 -- --total-timesteps 100000`. Prints a
table for benchmarks/README.md and, as the last line, one JSON object. If a run fails, its name is printed, the others continue,
and the exit code is 1. With --results runs are not repeated that the file holds already. Knows nothing of how fastppo learns.
"""

import csv
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import run_queue
import tyro

from fastppo.analysis.statistics import bootstrap_interval, interquartile_mean

# Published mean returns of PPO, with their steps. RL Zoo: one agent each, evaluated deterministically (Atari:
# sampled), MuJoCo v3, LunarLander v2: https://github.com/DLR-RM/rl-baselines3-zoo/blob/22e3ff2/benchmark.md
ZOO: Mapping[str, tuple[float, str]] = {
    "CartPole": (500.0, "100k"),
    "Acrobot": (-73.5, "1M"),
    "MountainCar": (-110.4, "1M"),
    "MountainCarContinuous": (88.3, "20k"),
    "Pendulum": (-172.2, "100k"),
    "LunarLander": (242.1, "1M"),
    "LunarLanderContinuous": (270.9, "1M"),
    "BipedalWalker": (287.9, "5M"),
    "BipedalWalkerHardcore": (122.4, "100M"),
    "HalfCheetah": (5819.1, "1M"),
    "Hopper": (2410.4, "1M"),
    "Walker2d": (3478.8, "1M"),
    "Ant": (1327.2, "1M"),
    "Swimmer": (281.6, "1M"),
    "Pong": (20.99, "10M"),
    "Breakout": (398.0, "10M"),
    "CartPoleNoVel": (500.0, "100k"),  # these two: ppo_lstm
    "PendulumNoVel": (-217.9, "100k"),
    "MiniGrid-MultiRoom-N4-S5": (0.0, "10M"),
}
# CleanRL: training returns, mean of three seeds, MuJoCo v4: docs/rl-algorithms/ppo.md and
# docs/benchmark/ppo_continuous_action.md of https://github.com/vwxyzjn/cleanrl at fe8d8a03
CLEANRL: Mapping[str, tuple[float, str]] = {
    "CartPole": (490.0, "500k"),
    "Acrobot": (-86.4, "500k"),
    "MountainCar": (-200.0, "500k"),
    "HalfCheetah": (1442.6, "1M"),
    "Hopper": (2382.9, "1M"),
    "Walker2d": (2288.0, "1M"),
    "InvertedPendulum": (963.1, "1M"),
    "Humanoid": (716.1, "1M"),
    "Pusher": (-40.4, "1M"),
    "Pong": (20.4, "10M"),
    "Breakout": (414.7, "10M"),
}
# tianshou: best evaluation of each of ten seeds, MuJoCo v3, mean: examples/mujoco/README.md of
# https://github.com/thu-ml/tianshou at f2402056
TIANSHOU: Mapping[str, tuple[float, str]] = {
    "Ant": (3258.4, "1M"),
    "HalfCheetah": (5783.9, "1M"),
    "Hopper": (2609.3, "1M"),
    "Walker2d": (3588.5, "1M"),
    "Swimmer": (66.7, "1M"),
    "Humanoid": (787.1, "1M"),
    "Reacher": (-4.1, "1M"),
    "InvertedPendulum": (1000.0, "1M"),
    "InvertedDoublePendulum": (9231.3, "1M"),
}
# OpenAI baselines: training returns, from CleanRL's ppo.md
BASELINES: Mapping[str, tuple[float, str]] = {
    "CartPole": (497.5, "500k"),
    "Acrobot": (-81.8, "500k"),
    "MountainCar": (-200.0, "500k"),
    "Pong": (20.5, "10M"),
    "Breakout": (406.6, "10M"),
}
PUBLISHED = {"zoo": ZOO, "tianshou": TIANSHOU, "CleanRL": CLEANRL, "baselines": BASELINES}


NAMES = ("env_id", "seed", "eval_episodes", "flags")  # of a run, in the results file


@dataclass(frozen=True)
class LearningConfig:
    """Train on environments with several seeds; flags after `--` go to every run. The last line is one JSON object."""

    env_id: tuple[str, ...]
    """What to train on: a row of the table each."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """One run each."""
    eval_episodes: int = 20
    """Episodes of each run's evaluation."""
    jobs: int = 1
    """Runs at once; with more than one each gets one thread."""
    results: Path | None = None
    """A file with a line for each finished run, to which new ones are added; default: none is kept."""
    run_dir: str | None = None
    """Keep the runs in this directory, as ENV__SEED; default: they are deleted."""


def run(env_id: str, seed: int, run_dir: Path, eval_episodes: int, flags: Sequence[str]) -> dict[str, Any]:
    """One run in a fresh process. Raises RuntimeError with the end of its stderr if it fails."""
    settings = {"--env-id": env_id, "--seed": seed, "--run-dir": run_dir, "--eval-episodes": eval_episodes}
    words = [*(str(word) for pair in settings.items() for word in pair), *flags]
    command = [sys.executable, "-m", "fastppo.train", "--plain", *words]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode}: {' '.join(done.stderr.splitlines()[-2:])}")
    summary = json.loads((run_dir / "summary.json").read_text())
    if not math.isfinite(summary["eval_return_mean"]):
        raise RuntimeError("it was not evaluated: leave --eval-episodes to this script")
    with (run_dir / "metrics.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    return {
        "preset": json.loads((run_dir / "config.json").read_text())["preset"],
        "evaluation": summary["eval_return_mean"],
        "training": float(last["episodic_return_mean"]),
        **{key: summary[key] for key in ("global_step", "seconds", "sps")},
    }


def summarize(env_id: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One environment's figures from its finished runs, at least one."""
    evaluations = [result["evaluation"] for result in runs]
    return {
        "env_id": env_id,
        "preset": runs[0]["preset"],
        "steps": max(result["global_step"] for result in runs),
        "seeds": [result["seed"] for result in runs],
        "evaluations": evaluations,
        "mean": statistics.fmean(evaluations),
        "std": statistics.stdev(evaluations) if len(runs) > 1 else 0.0,  # over seeds, with n - 1
        "iqm": float(interquartile_mean(evaluations)),
        "interval": tuple(map(float, bootstrap_interval(evaluations))),
        "trainings": [result["training"] for result in runs],
        "training_mean": statistics.fmean(result["training"] for result in runs),
        "seconds": statistics.median(result["seconds"] for result in runs),
        "sps": statistics.median(result["sps"] for result in runs),
        "published": published(env_id),
    }


def published(env_id: str) -> dict[str, tuple[float, str]]:
    """Published (mean return, steps) for any version of the environment: Pong for ALE/Pong-v5 and PongNoFrameskip-v4."""
    name = env_id.rpartition(":")[2].rpartition("/")[2].rpartition("-v")[0].removesuffix("NoFrameskip")
    return {source: figures[name] for source, figures in PUBLISHED.items() if name in figures}


def table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """The table in Markdown."""
    lines = [
        "| environment | preset | steps | evaluation of each seed | mean ± std | IQM (95 %) | last 100 training returns "
        "| seconds | steps/s | published |",
        "|" + "---|" * 10,
    ]
    for row in summaries:
        digits = 2 if max(map(abs, row["evaluations"])) <= 1 else 1  # these are shares of episodes solved
        each = ", ".join(f"{value:.{digits}f}" for value in row["evaluations"])
        others = "; ".join(f"{source} {mean:g} ({steps})" for source, (mean, steps) in row["published"].items())
        lines.append(
            f"| {row['env_id']} | {row['preset']} | {row['steps']:,} | {each} "
            f"| {row['mean']:.{digits}f} ± {row['std']:.{digits}f} "
            f"| {row['iqm']:.{digits}f} ({row['interval'][0]:.{digits}f} to {row['interval'][1]:.{digits}f}) "
            f"| {row['training_mean']:.{digits}f} "
            f"| {row['seconds']:.0f} | {row['sps']:,.0f} | {others} |"
        )
    return "\n".join(lines)


def main(config: LearningConfig, flags: Sequence[str]) -> int:
    """Train, print, and return the exit code."""
    flags = [*(("--num-threads", "1") if config.jobs > 1 else ()), *flags]
    settings = (config.eval_episodes, " ".join(flags))
    with tempfile.TemporaryDirectory() as temporary:
        root, results = Path(config.run_dir or temporary), config.results or Path(temporary, "results.jsonl")
        root.mkdir(parents=True, exist_ok=True)

        def run_one(env_id: str, seed: int, *_: Any) -> dict[str, Any]:
            place = root / f"{env_id.replace('/', '_').replace(':', '_')}__{seed}"
            return run(env_id, seed, place, config.eval_episodes, flags)

        wanted = [(env_id, seed, *settings) for env_id in config.env_id for seed in config.seeds]
        failed = run_queue.run_missing(results, NAMES, wanted, run_one, config.jobs)
        lines = run_queue.finished(results, NAMES)
    summaries = []
    for env_id in config.env_id:
        runs = [lines[name] for name in wanted if name[0] == env_id and name in lines]
        if runs:
            summaries.append(summarize(env_id, runs))
    print(f"\n{table(summaries)}\n")
    print(json.dumps({"environments": summaries, "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    own, flags = run_queue.split_flags(sys.argv[1:])
    sys.exit(main(tyro.cli(LearningConfig, args=own), flags))
