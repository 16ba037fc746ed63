"""Estimate how many ranks pay off: `python benchmarks/scaling.py` measures the cost of one rank and computes that of many.

Measured on this machine: the seconds of an iteration of one rank, by number of environments and width of the network. They come
from the run's metrics.csv, separately for collecting and learning (`python -m fastppo.train` in a fresh process, eager and
compiled). Also measured: the seconds of a sum over 2 and 4 ranks of this machine (gloo over the loopback), by its size.

Computed: K ranks with N / K environments each. Together they equal one process with N. The time of an iteration is

    collect(N / K) + learn(N / K) + rest + (updates + STATISTICS) * latency + updates * transfer

The times of a rank are as measured. If N / K was not measured, they are interpolated linearly between the nearest numbers of
environments, never below the smallest. A sum is a ring all-reduce: latency = 2 (K - 1) hops, transfer = 2 (K - 1) / K * bytes /
bandwidth (Patarasuk and Yuan, 2009). The estimate ignores ranks that wait for the slowest, other traffic on the network, and
cores that the ranks of one machine share. Prints tables and, as the last line, one JSON object. Knows nothing of how fastppo
trains.
"""

import contextlib
import csv
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import torch.multiprocessing
import tyro
from rich.console import Console
from rich.table import Table

import fastppo
from fastppo.ranks import start_ranks

STATISTICS = 5  # small exchanges before the first minibatch: counts, explained variance, advantages
METRICS = 6  # numbers that are summed with the gradient, and one more for each rank
WARMUP_ITERATIONS = 3
WARMUP_SUMS = 5


@dataclass(frozen=True)
class ScalingConfig:
    """What one rank costs, measured, and what many would, computed; the last line is one JSON object."""

    env_id: str = "CartPole-v1"
    """Environment of the runs."""
    backend: str = "torch"
    """As fastppo.train's."""
    num_envs: tuple[int, ...] = (16, 64, 256, 1024, 4096)
    """Environments of one rank that are measured."""
    widths: tuple[int, ...] = (64, 256)
    """Two hidden layers of this width, actor and critic apart."""
    num_steps: int = 64
    """Steps of a rollout."""
    num_minibatches: int = 4
    """Minibatches an epoch, whatever the number of environments."""
    update_epochs: int = 4
    """Epochs an iteration."""
    iterations: int = 30
    """Of each run, of which the first are left out."""
    tiers: tuple[Literal["off", "on"], ...] = ("off", "on")
    """--compile of the runs: off is eager, on is compiled."""
    local_ranks: tuple[int, ...] = (2, 4)
    """Numbers of ranks between which sums are measured on this machine; none: not measured."""
    sum_sizes: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)
    """Float32 numbers in such a sum."""
    sums: int = 50
    """Sums of each size."""
    ranks: tuple[int, ...] = (2, 8, 64)
    """Numbers of ranks that are computed."""
    gbits: tuple[float, ...] = (1.0, 10.0, 100.0)
    """Bandwidths of the network that are computed, in Gbit/s."""
    hop_us: float = 20.0
    """Latency of one message between two machines, in microseconds: an assumption. Ethernet with TCP has 10 to 50."""


@dataclass(frozen=True)
class Cost:
    """Measured seconds of an iteration of one rank, medians."""

    collect: float
    learn: float
    rest: float  # metrics, logs and checkpoints
    params: int


@dataclass(frozen=True)
class Prediction:
    """Computed seconds of an iteration of K ranks together, and `speedup` over the measured single process."""

    tier: str
    width: int
    num_envs: int  # of all ranks together
    ranks: int
    gbits: float
    own: float  # seconds without exchanges
    interpolated: bool  # N / K was not measured
    exchange: float
    speedup: float


def measure_run(config: ScalingConfig, num_envs: int, width: int, compile: str) -> Cost:
    """One run of the user's own command in a fresh process."""
    with tempfile.TemporaryDirectory() as directory:
        run_dir = Path(directory, "run")
        flags = {
            "--preset": "none",
            "--env-id": config.env_id,
            "--backend": config.backend,
            "--num-envs": num_envs,
            "--num-steps": config.num_steps,
            "--num-minibatches": config.num_minibatches,
            "--update-epochs": config.update_epochs,
            "--num-iterations": config.iterations + WARMUP_ITERATIONS,
            "--compile": compile,
            "--eval-episodes": 0,
            "--num-threads": 1,
            "--run-dir": run_dir,
        }
        words = [str(word) for pair in flags.items() for word in pair] + ["--hidden-sizes", str(width), str(width)]
        subprocess.run([sys.executable, "-m", "fastppo.train", "--plain", *words], check=True, stdout=subprocess.DEVNULL)
        with (run_dir / "metrics.csv").open(newline="") as file:
            rows = [{key: float(value or "nan") for key, value in row.items()} for row in csv.DictReader(file)]
        params = fastppo.load_policy(run_dir).network.num_params
    timed = [(row["seconds"] - before["seconds"], row) for before, row in pairwise(rows[WARMUP_ITERATIONS - 1 :])]
    collect = statistics.median(seconds * (row["env_share"] + row["act_share"]) for seconds, row in timed)
    learn = statistics.median(seconds * row["learn_share"] for seconds, row in timed)
    return Cost(collect, learn, max(statistics.median(seconds for seconds, _ in timed) - collect - learn, 0.0), params)


def measure_sums(sizes: Sequence[int], repeats: int, ranks: int) -> dict[int, float]:
    """Median seconds of one sum over `ranks` processes of this machine, by size."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "sums.json")
        torch.multiprocessing.spawn(_sum_with_others, (ranks, port, sizes, repeats, path), nprocs=ranks)
        return {int(size): seconds for size, seconds in json.loads(path.read_text()).items()}


def _sum_with_others(rank: int, ranks: int, port: int, sizes: Sequence[int], repeats: int, path: Path) -> None:
    os.environ |= {
        "WORLD_SIZE": str(ranks),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    group = start_ranks(torch.device("cpu"), timeout=60.0)
    torch.set_num_threads(1)
    median = {}
    for size in sizes:
        x, seconds = torch.ones(size), []
        for _ in range(WARMUP_SUMS + repeats):
            started = time.perf_counter()
            group.all_reduce(x)
            seconds.append(time.perf_counter() - started)
        median[size] = statistics.median(seconds[WARMUP_SUMS:])
    if group.is_main:
        path.write_text(json.dumps(median))
    group.barrier()
    group.close()


def own_seconds(costs: Mapping[int, Cost], num_envs: float) -> float:
    """Seconds of an iteration of one rank, interpolated linearly between the nearest measured numbers of environments."""
    known = sorted((envs, cost.collect + cost.learn + cost.rest) for envs, cost in costs.items())
    below = max((point for point in known if point[0] <= num_envs), default=known[0])
    above = min((point for point in known if point[0] >= num_envs), default=known[-1])
    if below[0] == above[0]:
        return below[1]
    return below[1] + (above[1] - below[1]) * (num_envs - below[0]) / (above[0] - below[0])


def exchange_seconds(updates: int, params: int, ranks: int, gbits: float, hop_seconds: float) -> float:
    """Seconds of all exchanges of K ranks in an iteration, in a ring (see the top of this file); 0 for one rank."""
    size = 4.0 * (params + METRICS + ranks)  # bytes
    latency = 2 * (ranks - 1) * hop_seconds
    transfer = 2 * (ranks - 1) / ranks * size / (gbits * 1e9 / 8)
    return (updates + STATISTICS) * latency + updates * transfer


def predict(config: ScalingConfig, tier: str, width: int, costs: Mapping[int, Cost]) -> list[Prediction]:
    """A prediction for each number of environments, ranks and bandwidth. Skips parts N / K below the smallest measured."""
    updates, params = config.update_epochs * config.num_minibatches, next(iter(costs.values())).params
    found = []
    for num_envs in sorted(costs):
        alone = own_seconds(costs, num_envs)
        for ranks in config.ranks:
            if num_envs % ranks or num_envs // ranks < min(costs):
                continue
            own = own_seconds(costs, num_envs / ranks)
            for gbits in config.gbits:
                exchange = exchange_seconds(updates, params, ranks, gbits, config.hop_us * 1e-6)
                speedup = alone / (own + exchange)
                interpolated = num_envs // ranks not in costs
                found.append(Prediction(tier, width, num_envs, ranks, gbits, own, interpolated, exchange, speedup))
    return found


def best_ranks(config: ScalingConfig, costs: Mapping[int, Cost], num_envs: int, gbits: float) -> int:
    """The number of ranks, of 1, 2, 4, ..., with the shortest iteration."""
    updates, params = config.update_epochs * config.num_minibatches, next(iter(costs.values())).params
    choices = [2**k for k in range(11) if num_envs % 2**k == 0 and num_envs // 2**k >= min(costs)]

    def seconds(ranks: int) -> float:
        exchange = exchange_seconds(updates, params, ranks, gbits, config.hop_us * 1e-6) if ranks > 1 else 0.0
        return own_seconds(costs, num_envs / ranks) + exchange

    return min(choices, key=seconds)


def table_of(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of text, with numbers aligned to the right."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _processor() -> str:
    """Name of the processor, if /proc/cpuinfo has it."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor()


def main(config: ScalingConfig) -> None:
    """Measure, compute, print tables and the JSON line."""
    console = Console(width=120)
    measured: dict[tuple[str, int], dict[int, Cost]] = {}
    for tier in config.tiers:
        for width in config.widths:
            costs = {num_envs: measure_run(config, num_envs, width, tier) for num_envs in sorted(config.num_envs)}
            measured[tier, width] = costs
    name = {"off": "eager", "on": "compiled"}
    rows = [
        [name[tier], str(width), f"{cost.params:,}", str(num_envs)]
        + [f"{1e3 * seconds:.2f}" for seconds in (cost.collect, cost.learn, cost.rest)]
        for (tier, width), costs in measured.items()
        for num_envs, cost in costs.items()
    ]
    columns = ("programs", "width", "parameters", "N", "collect, ms", "learn, ms", "rest, ms")
    console.print(table_of("measured: an iteration of one rank on one thread", columns, rows))

    sums = {ranks: measure_sums(config.sum_sizes, config.sums, ranks) for ranks in config.local_ranks}
    rows = [
        [str(ranks), f"{size:,}", f"{1e6 * seconds:.0f}", f"{8e-9 * 4 * size / seconds:.2f}"]
        for ranks, by_size in sums.items()
        for size, seconds in by_size.items()
    ]
    console.print(table_of("measured: a sum over ranks of this machine", ("K", "float32", "us", "Gbit/s"), rows))

    predicted = [found for (tier, width), costs in measured.items() for found in predict(config, tier, width, costs)]
    rows = [
        [
            *(name[one.tier], str(one.width), str(one.num_envs), str(one.ranks), f"{one.gbits:g}"),
            *(f"{1e3 * one.own:.2f}{'~' if one.interpolated else ''}", f"{1e3 * one.exchange:.2f}"),
            *(f"{one.speedup:.2f}", f"{one.speedup / one.ranks:.0%}"),
        ]
        for one in predicted
    ]
    columns = ("programs", "width", "N of all", "K", "Gbit/s", "own, ms", "exchange, ms", "speed-up", "efficiency")
    title = f"computed: K ranks, {config.hop_us:g} us a hop (assumed); own as measured, ~ between two measurements"
    console.print(table_of(title, columns, rows))

    best = [
        {
            "tier": tier,
            "width": width,
            "num_envs": num_envs,
            "gbits": gbits,
            "ranks": best_ranks(config, costs, num_envs, gbits),
        }
        for (tier, width), costs in measured.items()
        for num_envs in costs
        for gbits in config.gbits
    ]
    rows = [[name[str(one["tier"])], *(str(one[key]) for key in ("width", "num_envs", "gbits", "ranks"))] for one in best]
    title = f"computed: the number of ranks with the shortest iteration, at least {min(config.num_envs)} environments each"
    console.print(table_of(title, ("programs", "width", "N of all", "Gbit/s", "K"), rows))
    result: dict[str, Any] = {
        "config": asdict(config),
        "measured": {
            "machine": {"processor": _processor(), "cores": os.cpu_count(), "torch": torch.__version__},
            "iteration": [
                {"tier": tier, "width": width, "num_envs": num_envs, **asdict(cost)}
                for (tier, width), costs in measured.items()
                for num_envs, cost in costs.items()
            ],
            "sum_seconds": {str(ranks): by_size for ranks, by_size in sums.items()},
        },
        "computed": {"ranks": [asdict(one) for one in predicted], "best": best},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(tyro.cli(ScalingConfig))
