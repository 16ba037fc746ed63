"""Steps per second of whole training runs: `python benchmarks/sps.py --workload cartpole8`.

Each run is the user's own command in a fresh process, with logging and checkpoints. Transitions count, autoreset steps do not.
Warm-up (the first iterations, and the time until compiled programs are used) is left out and reported separately. `--compare`
alternates with runs of the yardstick, round by round, and prints the ratio of medians. `--against W` does the same with another
workload of fastppo. The last line of the output is one JSON object.
"""

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from yardstick import fastest_sps

WARMUP_ITERATIONS = 3


@dataclass(frozen=True)
class Workload:
    """One benchmark, with the same settings for fastppo, the yardstick and the peers (two hidden layers of 64 tanh, actor and
    critic separate; a Nature CNN for Atari)."""

    env_id: str
    num_envs: int
    num_steps: int
    num_minibatches: int
    update_epochs: int
    total_timesteps: int
    yardstick_timesteps: int
    backend: str = "gymnasium"  # of fastppo; yardstick and peers step the environments of gymnasium
    normalized: bool = False  # observations and rewards, by running statistics; not in the yardstick
    recurrent: bool = False  # actor and critic have an LSTM of 64 each; not in the yardstick

    @property
    def batch_size(self) -> int:
        """B, rows of one rollout."""
        return self.num_envs * self.num_steps

    @property
    def is_atari(self) -> bool:
        """Whether it is a game of ALE, which needs a Nature CNN."""
        return self.env_id.startswith("ALE/")

    @property
    def minibatch_size(self) -> int:
        """M."""
        return self.batch_size // self.num_minibatches


WorkloadName = Literal[
    *("cartpole8", "cartpole1024", "pendulum8", "device8", "device1024"),
    *("halfcheetah8", "halfcheetah8-envpool", "breakout8", "breakout8-envpool", "recurrent8"),
]
WORKLOADS: Mapping[str, Workload] = {
    "cartpole8": Workload("CartPole-v1", 8, 128, 4, 4, 200_000, 50_000),
    "cartpole1024": Workload("CartPole-v1", 1024, 64, 8, 4, 3_000_000, 1_000_000),
    "pendulum8": Workload("Pendulum-v1", 8, 256, 32, 10, 100_000, 20_000),
    "device8": Workload("CartPole-v1", 8, 128, 4, 4, 1_000_000, 50_000, "torch"),
    "device1024": Workload("CartPole-v1", 1024, 64, 8, 4, 4_000_000, 1_000_000, "torch"),
    "halfcheetah8": Workload("HalfCheetah-v5", 8, 256, 32, 10, 100_000, 20_000, normalized=True),
    "halfcheetah8-envpool": Workload("HalfCheetah-v5", 8, 256, 32, 10, 200_000, 20_000, "envpool", normalized=True),
    "breakout8": Workload("ALE/Breakout-v5", 8, 128, 4, 4, 12_000, 0),
    "breakout8-envpool": Workload("ALE/Breakout-v5", 8, 128, 4, 4, 12_000, 0, "envpool"),
    "recurrent8": Workload("CartPole-v1", 8, 128, 4, 4, 100_000, 0, recurrent=True),
}


@dataclass(frozen=True)
class SpsConfig:
    """Steps per second of a workload; the last line of the output is one JSON object."""

    workload: WorkloadName = "cartpole8"
    """What to run."""
    compare: bool = False
    """Run the yardstick too, interleaved, and give the ratio of medians."""
    against: WorkloadName | None = None
    """Run this workload of fastppo too, interleaved, and give the ratio of medians: cartpole8 is recurrent8 without memory."""
    rounds: int = 3
    """Runs of each."""
    compile: Literal["off", "auto", "on", "inductor"] = "on"
    """As fastppo.train's; on and inductor: the programs are built before the first step, once a machine."""
    empty_cache: bool = False
    """Each run finds an empty cache of programs, as the first run on a machine does. With --compile auto."""
    num_threads: int | None = None
    """As fastppo.train's; the yardstick runs on one thread, its best, unless this says otherwise."""
    json: bool = False
    """Print the JSON object only."""


def run_fastppo(
    workload: Workload,
    compile: str = "on",
    num_threads: int | None = None,
    launcher: Sequence[str] = ("-m", "fastppo.train"),
    num_seeds: int = 1,
    empty_cache: bool = False,
) -> dict[str, Any]:
    """One run in a fresh process: sps of all seeds over all iterations after the warm-up, fastest_sps of the fastest iteration.

    launcher: arguments of Python before the flags. empty_cache: let it find no compiled programs.
    """
    with tempfile.TemporaryDirectory() as directory:
        run_dir = Path(directory, "run")
        flags = {
            "--preset": "none",
            "--env-id": workload.env_id,
            "--backend": workload.backend,
            "--num-envs": workload.num_envs,
            "--num-steps": workload.num_steps,
            "--num-minibatches": workload.num_minibatches,
            "--update-epochs": workload.update_epochs,
            "--total-timesteps": workload.total_timesteps,
            "--compile": compile,
            "--eval-episodes": 0,
            "--num-seeds": num_seeds,
            "--run-dir": run_dir,
        } | ({} if num_threads is None else {"--num-threads": num_threads})
        words = [str(word) for pair in flags.items() for word in pair]
        words += ["--norm-obs", "--norm-reward"] * workload.normalized
        words += ["--rnn", "lstm", "--rnn-hidden-size", "64"] * workload.recurrent
        words += ["--clip-reward", "--clip-coef", "0.1", "--learning-rate", "2.5e-4"] * workload.is_atari
        env = {**os.environ, "XDG_CACHE_HOME": directory} if empty_cache else None
        subprocess.run([sys.executable, *launcher, "--plain", *words], check=True, stdout=subprocess.DEVNULL, env=env)
        summary = json.loads((run_dir / "summary.json").read_text())
        seeds = []
        for path in run_dir.glob("metrics.csv" if num_seeds == 1 else "seed-*/metrics.csv"):
            with path.open(newline="") as file:
                seeds.append(list(csv.DictReader(file)))
    rows = min(seeds, key=len)  # of the seed that has all its steps first
    last, measured = len(rows) - 1, rows[WARMUP_ITERATIONS:]
    env_steps = sum(int(own[last]["global_step"]) - int(own[WARMUP_ITERATIONS - 1]["global_step"]) for own in seeds)
    seconds = float(rows[last]["seconds"]) - float(rows[WARMUP_ITERATIONS - 1]["seconds"])
    clock = [float(row["seconds"]) for row in rows[WARMUP_ITERATIONS - 1 :]]
    steps = [int(row["global_step"]) for row in rows[WARMUP_ITERATIONS - 1 :]]
    shares = {key: statistics.median(float(row[key]) for row in measured) for key in ("env_share", "act_share", "learn_share")}
    return {
        "sps": env_steps / seconds,
        "fastest_sps": fastest_sps(clock, steps),
        "env_steps": env_steps,
        "seconds": seconds,
        **{key: summary[key] for key in ("compile_seconds", "first_update_seconds", "tier", "peak_memory_mib")},
        **shares,
    }


def run_yardstick(workload: Workload, num_threads: int | None = None) -> dict[str, Any]:
    """One run of yardstick.py in a fresh process."""
    settings = {
        "--env-id": workload.env_id,
        "--num-envs": workload.num_envs,
        "--num-steps": workload.num_steps,
        "--num-minibatches": workload.num_minibatches,
        "--update-epochs": workload.update_epochs,
        "--total-timesteps": workload.yardstick_timesteps,
        "--num-threads": num_threads or 1,
    }
    words = [str(word) for pair in settings.items() for word in pair]
    script = str(Path(__file__).with_name("yardstick.py"))
    done = subprocess.run([sys.executable, script, *words], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(workload: Workload, other: Workload | None, config: SpsConfig) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rounds of the workload, interleaved with runs of the other workload or of the yardstick."""
    ours, theirs = [], []
    for _ in range(config.rounds):
        theirs.append(run_as(config, other) if other else run_yardstick(workload, config.num_threads))
        ours.append(run_as(config, workload))
    return ours, theirs


def run_as(config: SpsConfig, workload: Workload) -> dict[str, Any]:
    """`run_fastppo` as the flags say."""
    return run_fastppo(workload, config.compile, config.num_threads, empty_cache=config.empty_cache)


def main(config: SpsConfig) -> None:
    """Run, print a table and the JSON line."""
    workload = WORKLOADS[config.workload]
    if config.compare and not workload.yardstick_timesteps:
        sys.exit("--compare: the yardstick has no convolutions and no memory; peers.py compares with Stable-Baselines3")
    if config.compare and config.against:
        sys.exit("--compare is with the yardstick, --against with a workload: one of the two")
    other = WORKLOADS[config.against] if config.against else None
    if config.empty_cache and config.compile != "auto":
        sys.exit("--empty-cache is for --compile auto: with on and inductor the programs are built before the first step")
    if config.compile in ("on", "inductor"):
        for each in (workload, other) if other else (workload,):
            run_fastppo(each, config.compile, config.num_threads)  # compile programs that are not in the cache; not measured
    theirs: list[dict[str, Any]] = []
    if config.compare or other:
        ours, theirs = compare(workload, other, config)
    else:
        ours = [run_as(config, workload) for _ in range(config.rounds)]
    speeds = sorted(run["sps"] for run in ours)
    middle = sorted(ours, key=lambda run: run["sps"])[len(ours) // 2]
    result: dict[str, Any] = {"workload": config.workload, **middle, "sps_spread": [speeds[0], speeds[-1]]}
    table = Table(title=f"{config.workload}: {workload}")
    for column in ("", "steps/s, median", "least", "most", "env", "act", "learn", "first update"):
        table.add_column(column, justify="right")
    shares = [f"{middle[key]:.0%}" for key in ("env_share", "act_share", "learn_share")]
    first = f"{middle['first_update_seconds']:.1f} s"
    table.add_row(
        f"fastppo, {middle['tier']}", f"{middle['sps']:,.0f}", f"{speeds[0]:,.0f}", f"{speeds[-1]:,.0f}", *shares, first
    )
    if theirs:
        name = config.against or "yardstick"
        others = sorted(run["sps"] for run in theirs)
        median = statistics.median(others)
        table.add_row(name, f"{median:,.0f}", f"{others[0]:,.0f}", f"{others[-1]:,.0f}")
        ratios = sorted(one["sps"] / other["sps"] for one, other in zip(ours, theirs, strict=True))
        result |= {
            f"{name}_sps": median,
            "ratio": statistics.median(speeds) / median,
            "ratio_spread": [ratios[0], ratios[-1]],
        }
        table.caption = (
            f"{result['ratio']:.2f} times {config.against or 'the yardstick'} ({ratios[0]:.2f} to {ratios[-1]:.2f} by round)"
        )
    if not config.json:
        Console(width=120).print(table)
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(SpsConfig))
