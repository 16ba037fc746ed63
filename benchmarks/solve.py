"""Wall-clock from process start, imports and compiling included, until CartPole-v1 is solved: the last 100 returns average 475.

`python benchmarks/solve.py --seeds 1 2 3 4 5` prints a line for each seed and, last, one JSON object with the median.
"""

import csv
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

SOLVED = 475.0
FLAGS = ("--env-id", "CartPole-v1", "--num-envs", "8", "--eval-episodes", "0", "--plain")


@dataclass(frozen=True)
class SolveConfig:
    """Seconds until CartPole-v1 is solved."""

    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """One run each."""
    compile: str = "auto"
    """As fastppo.train's: auto takes compiled programs where the cache has them, the second run's case."""
    backend: str = "gymnasium"
    """As fastppo.train's."""
    total_timesteps: int = 300_000
    """Longest run; the learning rate falls to 0 over it."""
    learning_rate: float = 2.5e-3
    """As fastppo.train's."""


def solve_seconds(seed: int, config: SolveConfig) -> tuple[float, int]:
    """(seconds from process start, transitions) until solved; inf if it is never solved."""
    with tempfile.TemporaryDirectory() as directory:
        run_dir = Path(directory, "run")
        settings = {"--compile": config.compile, "--total-timesteps": config.total_timesteps, "--seed": seed}
        settings |= {"--learning-rate": config.learning_rate, "--backend": config.backend, "--run-dir": run_dir}
        words = [*FLAGS, *(str(word) for pair in settings.items() for word in pair)]
        subprocess.run([sys.executable, "-m", "fastppo.train", *words], check=True, stdout=subprocess.DEVNULL)
        summary = json.loads((run_dir / "summary.json").read_text())
        with (run_dir / "metrics.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                if int(row["episodes"]) >= 100 and float(row["episodic_return_mean"]) >= SOLVED:
                    return summary["start_seconds"] + float(row["seconds"]), int(row["global_step"])
    return float("inf"), -1


def main(config: SolveConfig) -> None:
    """Solve with each seed."""
    results = []
    for seed in config.seeds:
        seconds, steps = solve_seconds(seed, config)
        results.append(seconds)
        print(f"seed {seed}: {seconds:.1f} s, {steps:,} steps", flush=True)
    print(json.dumps({"median_seconds": statistics.median(results), "seconds": results}))


if __name__ == "__main__":
    main(tyro.cli(SolveConfig))
