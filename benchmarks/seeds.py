"""Speed of many seeds in one process: `python benchmarks/seeds.py --workload device8`.

Steps per second of all seeds together, by number of seeds. Each run is the user's own command in a fresh process, and steps are
counted as in sps.py. Rounds are interleaved: 1, 2, 5, ... seeds, then all again. The last line of the output is a JSON object.
"""

import json
import statistics
from dataclasses import dataclass, replace

import tyro
from rich.console import Console
from rich.table import Table
from sps import WORKLOADS, WorkloadName, run_fastppo


@dataclass(frozen=True)
class SeedsConfig:
    """Steps per second of all seeds together; the last line of the output is one JSON object."""

    workload: WorkloadName = "device8"
    """What to run."""
    num_seeds: tuple[int, ...] = (1, 2, 5, 10, 20)
    """Seeds in one process."""
    total_timesteps: int = 100_000
    """Steps of each seed."""
    rounds: int = 3
    """Runs of each."""
    num_threads: int | None = None
    """As fastppo.train's."""


def main(config: SeedsConfig) -> None:
    """Run, print a table and the JSON line."""
    workload = replace(WORKLOADS[config.workload], total_timesteps=config.total_timesteps)
    speeds: dict[int, list[float]] = {number: [] for number in config.num_seeds}
    for round_ in range(config.rounds + 1):
        for number, found in speeds.items():
            run = run_fastppo(workload, "on", config.num_threads, num_seeds=number)
            if round_ > 0:  # the first round compiles programs that are not in the cache
                found.append(run["sps"])
    alone = statistics.median(speeds[config.num_seeds[0]])
    table = Table(title=f"{config.workload}: {workload}")
    for column in ("seeds", "steps/s of all, median", "least", "most", f"times that of {config.num_seeds[0]}"):
        table.add_column(column, justify="right")
    for number, found in speeds.items():
        middle = statistics.median(found)
        table.add_row(str(number), f"{middle:,.0f}", f"{min(found):,.0f}", f"{max(found):,.0f}", f"{middle / alone:.2f}")
    Console(width=120).print(table)
    medians = {number: statistics.median(found) for number, found in speeds.items()}
    print(json.dumps({"workload": config.workload, "sps": medians, "spread": {n: [min(f), max(f)] for n, f in speeds.items()}}))


if __name__ == "__main__":
    main(tyro.cli(SeedsConfig))
