"""The throughput gate of CI: fastppo must stay FLOOR times as fast as the yardstick, both run now, on this machine.

`python benchmarks/gate.py` exits with 1 below the floor. The ratio of medians of interleaved runs is compared, never an
absolute speed. `--planted 0.3` makes every iteration of fastppo take 30 % longer, to show that the gate sees it; `--repeat 20`
runs the gate as often, to show that it does not cry wolf.
"""

import dataclasses
import statistics
import sys
from dataclasses import dataclass

import tyro
from sps import WORKLOADS, run_fastppo, run_yardstick

# Recorded in 20 runs on two cores: 5.4 to 5.6 (benchmarks/README.md); a slowdown of 30 % gives 4.2.
FLOOR = 4.6

PLANTED = """
import time, sys, fastppo.rollout as rollout, fastppo.train as train
collect, ended = rollout.HostCollector.collect, []
def slow_collect(self, *args, **kwargs):
    now = time.perf_counter()
    while ended and time.perf_counter() < now + {share} * (now - ended[0]):
        pass
    ended[:] = [time.perf_counter()]
    return collect(self, *args, **kwargs)
rollout.HostCollector.collect = slow_collect
sys.exit(train.console(sys.argv[1:]))
"""


@dataclass(frozen=True)
class GateConfig:
    """Exit code 0 when fastppo is at least FLOOR times as fast as the yardstick, else 1."""

    rounds: int = 3
    """Interleaved runs of each."""
    attempts: int = 3
    """Measure again, at most this often in all, before calling it a failure: the machine may have been busy."""
    planted: float = 0.0
    """Share by which to slow down every iteration of fastppo on purpose."""
    repeat: int = 1
    """How often to run the whole gate."""


def gate(config: GateConfig) -> float:
    """The ratio of medians."""
    workload = dataclasses.replace(WORKLOADS["cartpole8"], total_timesteps=60_000, yardstick_timesteps=15_000)
    launcher = ["-c", PLANTED.format(share=config.planted)] if config.planted else ["-m", "fastppo.train"]
    ours, theirs = [], []
    for _ in range(config.rounds):
        theirs.append(run_yardstick(workload)["sps"])
        ours.append(run_fastppo(workload, launcher=launcher)["sps"])
    return statistics.median(ours) / statistics.median(theirs)


def main(config: GateConfig) -> int:
    """Run the gate; the exit code."""
    run_fastppo(WORKLOADS["cartpole8"])  # compiles where the cache has nothing
    failures = 0
    for _ in range(config.repeat):
        for attempt in range(1, config.attempts + 1):
            ratio = gate(config)
            verdict = "passed" if ratio >= FLOOR else "FAILED" if attempt == config.attempts else "measured again"
            print(f"throughput gate: {ratio:.2f} times the yardstick, floor {FLOOR}: {verdict}", flush=True)
            if ratio >= FLOOR:
                break
        failures += ratio < FLOOR
    if config.repeat > 1:
        print(f"{failures} of {config.repeat} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(GateConfig)))
