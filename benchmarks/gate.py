"""The throughput gate of CI: the speed of fastppo relative to the yardstick must not fall below a floor.

`python benchmarks/gate.py` exits with 1 if a workload is below its floor. Both sides run on this machine in interleaved runs,
and the gate compares the ratio of their speeds, never an absolute speed. It takes the fastest iteration of each side: other
processes on a shared core slow the two sides down at different times and by different amounts, and ratios of medians ranged
from 16 to 22 on one day. sps.py shows slowdowns of single iterations.

The ratio also depends on the processor: on Zen 5 the yardstick gains more than compiled programs do. So each processor has its
own floors. A processor without measurements gets the lowest known floors. `--planted 0.3` makes every iteration of fastppo take
30 % longer, to show that the gate detects it. `--repeat 20` runs the gate 20 times, to show that it raises no false alarm.
"""

import dataclasses
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from sps import WORKLOADS, Workload, run_fastppo, run_yardstick

# Lowest ratios by processor, (vendor, family) of /proc/cpuinfo. They lie between the ratios of recorded runs and the ratios of
# a slowdown of 30 % (benchmarks/README.md).
FLOORS = {
    ("AuthenticAMD", 25): {"cartpole8": 5.1, "device8": 17.5, "device1024": 4.6},  # Zen 3
    ("AuthenticAMD", 26): {"cartpole8": 6.1, "device8": 13.7, "device1024": 4.6},  # Zen 5
}
# of fastppo, of the yardstick
TIMESTEPS = {"cartpole8": (60_000, 15_000), "device8": (300_000, 15_000), "device1024": (2_000_000, 1_000_000)}

PLANTED = """
import time, sys, fastppo.train as train
from fastppo.rollout.device_collector import DeviceCollector
from fastppo.rollout.step_collector import HostCollector
ended = []
def slowed(collect):
    def slow_collect(self, *args, **kwargs):
        now = time.perf_counter()
        while ended and time.perf_counter() < now + {share} * (now - ended[0]):
            pass
        ended[:] = [time.perf_counter()]
        return collect(self, *args, **kwargs)
    return slow_collect
for collector in (HostCollector, DeviceCollector):
    collector.collect = slowed(collector.collect)
sys.exit(train.console(sys.argv[1:]))
"""


@dataclass(frozen=True)
class GateConfig:
    """Exit code 0 when fastppo is at least the floor times as fast as the yardstick on every workload, else 1."""

    workloads: tuple[Literal["cartpole8", "device8", "device1024"], ...] = ("cartpole8", "device8", "device1024")
    """What to run."""
    rounds: int = 3
    """Interleaved runs of each."""
    attempts: int = 4
    """Measure again, at most this often in all, before calling it a failure: the machine may have been busy."""
    planted: float = 0.0
    """Share by which to slow down every iteration of fastppo on purpose."""
    repeat: int = 1
    """How often to run the whole gate."""


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> tuple[str, int] | None:
    """Vendor and family of the first processor; None if the system does not report them."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
        entries = dict(map(str.strip, line.partition(":")[::2]) for line in lines)
        return entries["vendor_id"], int(entries["cpu family"])
    except (OSError, KeyError, ValueError):
        return None


def floor_of(name: str, who: tuple[str, int] | None) -> float:
    """The floor of a workload on a processor; the lowest known floor if the processor was not measured."""
    return FLOORS[who][name] if who in FLOORS else min(floors[name] for floors in FLOORS.values())


def passes(name: str, config: GateConfig) -> bool:
    """Whether a workload reaches its floor. A further attempt adds its runs to those before, on both sides."""
    ours_timesteps, theirs_timesteps = TIMESTEPS[name]
    workload = dataclasses.replace(WORKLOADS[name], total_timesteps=ours_timesteps, yardstick_timesteps=theirs_timesteps)
    launcher = ["-c", PLANTED.format(share=config.planted)] if config.planted else ["-m", "fastppo.train"]
    floor = floor_of(name, processor())
    ours = theirs = 0.0
    for attempt in range(1, config.attempts + 1):
        for _ in range(config.rounds):
            theirs = max(theirs, run_yardstick(workload)["fastest_sps"])
            ours = max(ours, run_fastppo(workload, compile_mode(workload), launcher=launcher)["fastest_sps"])
        ratio = ours / theirs
        verdict = "passed" if ratio >= floor else "FAILED" if attempt == config.attempts else "measured again"
        print(f"throughput gate, {name}: {ratio:.2f} times the yardstick, floor {floor}: {verdict}", flush=True)
        if ratio >= floor:
            return True
    return False


def compile_mode(workload: Workload) -> str:
    """--compile of a run: the user's default where programs are fused; on the device `collect` has to be compiled first."""
    return "on" if workload.backend == "torch" else "auto"


def main(config: GateConfig) -> int:
    """Run the gate, with an empty cache of programs, and return the exit code."""
    failures = 0
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        for name in config.workloads:
            workload = WORKLOADS[name]
            if compile_mode(workload) == "on":  # compile the program that the runs will load
                run_fastppo(dataclasses.replace(workload, total_timesteps=5 * workload.batch_size))
        for _ in range(config.repeat):
            failures += not all([passes(name, config) for name in config.workloads])
    if config.repeat > 1:
        print(f"{failures} of {config.repeat} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(GateConfig)))
