"""Watch an hour of training for leaks: `python benchmarks/soak.py --minutes 60`; flags after `--` are passed to the run.

The run is the user's own command in its own process. It is watched from outside through /proc (Linux): resident memory, open
files, threads, processes and CPU seconds, its children included. Steps are those of its metrics.csv. The time starts after the
first rows and a warm-up; at its end the run gets SIGTERM. The first tenth of the time is compared with the last: memory may
grow by --max-growth-mib; open files, threads and processes may not grow; steps per CPU second may fall by a tenth. Steps per
second of wall time are shown but not judged, since other processes may use the machine. metrics.csv and TensorBoard's events
grow by design, by a row an iteration and at most ten events a second. The table shows by how much.

Prints a table and, as the last line, one JSON object; `--plot FILE` draws the samples. The exit code is 1 if something grew,
slowed down or failed. Knows nothing of how fastppo trains.
"""

import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from run_queue import split_flags

FLAGS = ("--env-id", "CartPole-v1", "--num-envs", "8", "--compile", "on", "--total-timesteps", str(10**15), "--plain")
MIB = 2**20
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
STOP_SECONDS = 120.0  # for the last checkpoint
MAX_FALL = 0.1  # of steps per CPU second


@dataclass(frozen=True)
class SoakConfig:
    """Watch a long run for anything that grows; flags after `--` go to it. The last line is one JSON object."""

    minutes: float = 60.0
    """Minutes watched, from the end of the warm-up."""
    warm_up: float = 60.0
    """Seconds of training that are not looked at: caches fill, the allocator finds its size."""
    every: float = 5.0
    """Seconds between two samples."""
    max_growth_mib: float = 16.0
    """Resident memory may grow by this many MiB from the first tenth to the last."""
    plot: Path | None = None
    """PNG to write."""


@dataclass(frozen=True)
class Sample:
    """The measured values of the run at one moment, its children included."""

    seconds: float  # since the first sample
    memory: int  # bytes
    files: int  # open ones
    threads: int
    processes: int
    cpu_seconds: float
    steps: int  # in the last whole row of metrics.csv
    row_seconds: float  # in that row, by the run's own clock
    metrics_bytes: int
    events_bytes: int


@dataclass(frozen=True)
class Tenth:
    """A tenth of the time: medians of the counted values, and rates from its first sample to its last."""

    memory_mib: float
    files: float
    threads: float
    processes: float
    sps: float
    steps_per_cpu_second: float


def process_tree(pid: int) -> list[int]:
    """The process and all its descendants. Raises OSError if it has ended."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            try:
                found += process_tree(int(child))
            except OSError:  # it has just ended
                continue
    return found


def usage(pid: int) -> tuple[int, int, int, float]:
    """(resident bytes, open files, threads, CPU seconds) of one process, CPU including its ended children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # from the third on, see man 5 proc
    ticks = sum(int(field) for field in fields[11:15])
    return (
        int(fields[21]) * os.sysconf("SC_PAGE_SIZE"),
        len(os.listdir(f"/proc/{pid}/fd")),
        int(fields[17]),
        ticks / CLOCK_TICKS,
    )


def last_row(metrics: Path) -> tuple[int, float] | None:
    """(steps, seconds) of the last whole row; None if there is none yet."""
    try:
        with metrics.open("rb") as file:
            columns = file.readline().decode().strip().split(",")
            start = file.tell()
            file.seek(max(start, metrics.stat().st_size - 4096))
            lines = file.read().decode().split("\n")[:-1]  # the text after the last line end is a partial row
    except OSError:
        return None
    rows = [row for row in csv.reader(lines) if len(row) == len(columns)]
    if not rows:
        return None
    row = dict(zip(columns, rows[-1], strict=True))
    return int(row["global_step"]), float(row["seconds"])


def take_sample(pid: int, run_dir: Path, started: float) -> Sample | None:
    """One sample; None if the run has ended or has no row yet."""
    row = last_row(run_dir / "metrics.csv")
    if row is None:
        return None
    usages = []
    try:
        pids = process_tree(pid)
        usages.append(usage(pid))
    except OSError:
        return None
    for child in pids[1:]:
        try:
            usages.append(usage(child))
        except OSError:  # it has just ended
            continue
    memory, files, threads, cpu_seconds = (sum(column) for column in zip(*usages, strict=True))
    events = sum(path.stat().st_size for path in run_dir.glob("events.out.tfevents.*"))
    metrics = (run_dir / "metrics.csv").stat().st_size
    seconds = time.monotonic() - started
    return Sample(seconds, int(memory), int(files), int(threads), len(usages), cpu_seconds, *row, metrics, events)


def watch(config: SoakConfig, run_dir: Path, flags: Sequence[str]) -> list[Sample]:
    """Train and sample, at least ten samples. Raises RuntimeError with the end of its stderr if the run fails."""
    command = [sys.executable, "-m", "fastppo.train", *FLAGS, "--run-dir", str(run_dir), *flags]
    samples: list[Sample] = []
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            while process.poll() is None and last_row(run_dir / "metrics.csv") is None:
                time.sleep(0.1)
            time.sleep(config.warm_up)
            started = time.monotonic()
            while process.poll() is None and (not samples or samples[-1].seconds < 60.0 * config.minutes):
                sample = take_sample(process.pid, run_dir, started)
                if sample is not None:
                    samples.append(sample)
                    time.sleep(max(started + len(samples) * config.every - time.monotonic(), 0.01))
            ended = process.poll()
            if ended is None:
                process.send_signal(signal.SIGTERM)
                ended = process.wait(STOP_SECONDS)
                ended = 0 if ended == 128 + signal.SIGTERM else ended or -1
            if ended != 0 or len(samples) < 10:
                errors.seek(0)
                last = " ".join(errors.read().splitlines()[-2:])
                raise RuntimeError(f"the run ended with exit code {ended} after {len(samples)} samples: {last}")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    return samples


def tenth_of(samples: Sequence[Sample]) -> Tenth:
    """Medians and rates of at least two samples."""
    first, last = samples[0], samples[-1]
    steps = last.steps - first.steps
    return Tenth(
        statistics.median(sample.memory for sample in samples) / MIB,
        statistics.median(sample.files for sample in samples),
        statistics.median(sample.threads for sample in samples),
        statistics.median(sample.processes for sample in samples),
        _rate(steps, last.row_seconds - first.row_seconds),
        _rate(steps, last.cpu_seconds - first.cpu_seconds),
    )


def _rate(steps: int, seconds: float) -> float:
    """Steps per second; 0 if no row was written, which happens on a busy machine."""
    return steps / seconds if seconds > 0 else 0.0


def tenths(samples: Sequence[Sample]) -> tuple[Tenth, Tenth]:
    """The first and the last tenth of the samples, each with the sample after or before it: a rate needs two."""
    count = max(len(samples) // 10, 1) + 1
    return tenth_of(samples[:count]), tenth_of(samples[-count:])


def verdict(first: Tenth, last: Tenth, max_growth_mib: float) -> list[str]:
    """A line for each value that grew or fell too much; [] if there is none."""
    found = []
    growth = last.memory_mib - first.memory_mib
    if growth > max_growth_mib:
        found.append(f"memory grew by {growth:.1f} MiB, more than {max_growth_mib:g}")
    for name in ("files", "threads", "processes"):
        before, after = getattr(first, name), getattr(last, name)
        if after > before:
            found.append(f"{name} grew from {before:g} to {after:g}")
    speed_ratio = last.steps_per_cpu_second / first.steps_per_cpu_second if first.steps_per_cpu_second else 1.0
    if speed_ratio < 1.0 - MAX_FALL:
        found.append(f"steps per CPU second fell by {1.0 - speed_ratio:.0%}, more than {MAX_FALL:.0%}")
    return found


def table(first: Tenth, last: Tenth, samples: Sequence[Sample], max_growth_mib: float) -> str:
    """The table in Markdown."""
    rows = [
        ("resident memory, MiB", first.memory_mib, last.memory_mib, f"grows by at most {max_growth_mib:g}", ".1f"),
        ("open files", first.files, last.files, "does not grow", "g"),
        ("threads", first.threads, last.threads, "does not grow", "g"),
        ("processes", first.processes, last.processes, "does not grow", "g"),
        (
            "steps per CPU second",
            first.steps_per_cpu_second,
            last.steps_per_cpu_second,
            f"falls by at most {MAX_FALL:.0%}",
            ",.0f",
        ),
        ("steps per second", first.sps, last.sps, "not judged", ",.0f"),
    ]
    lines = ["| | first tenth | last tenth | change | bound |", "|---|---|---|---|---|"]
    for name, before, after, bound, form in rows:
        change = f"{after / before - 1.0:+.1%}" if form == ",.0f" else f"{after - before:+{form}}"
        lines.append(f"| {name} | {before:{form}} | {after:{form}} | {change} | {bound} |")
    metrics, events = mib_per_hour(samples)
    lines.append(f"| metrics.csv, events: MiB an hour | | | {metrics:.1f}, {events:.1f} | grow by design |")
    return "\n".join(lines)


def mib_per_hour(samples: Sequence[Sample]) -> tuple[float, float]:
    """Growth of metrics.csv and of TensorBoard's events, in MiB per hour."""
    first, last = samples[0], samples[-1]
    hours = (last.seconds - first.seconds) / 3600.0
    return (
        (last.metrics_bytes - first.metrics_bytes) / MIB / hours,
        (last.events_bytes - first.events_bytes) / MIB / hours,
    )


def draw(samples: Sequence[Sample], title: str, path: Path) -> None:
    """Draw memory, the counted values, and steps per CPU second over time."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    FigureCanvasAgg(figure)
    memory, counts, speed = figure.subplots(3, sharex=True)
    minutes = [sample.seconds / 60.0 for sample in samples]
    memory.plot(minutes, [sample.memory / MIB for sample in samples], color="C0")
    memory.set_ylabel("resident, MiB")
    memory.set_title(title, fontsize=10)
    for name in ("files", "threads", "processes"):
        counts.plot(minutes, [getattr(sample, name) for sample in samples], label=name, drawstyle="steps-post")
    counts.set_ylabel("open or running")
    counts.legend(frameon=False, fontsize=8, ncols=3)
    moments, rates = [], []
    for before, after in pairwise(samples):
        if after.cpu_seconds > before.cpu_seconds:
            moments.append(after.seconds / 60.0)
            rates.append((after.steps - before.steps) / (after.cpu_seconds - before.cpu_seconds))
    speed.plot(moments, rates, ".-", color="C3", linewidth=0.6, markersize=3)
    speed.set_ylabel("steps per CPU second")
    speed.yaxis.set_major_formatter(lambda value, _: f"{value / 1000:g} k")
    speed.set_xlabel("minutes")
    for axes in (memory, counts, speed):
        axes.set_ylim(0, axes.get_ylim()[1] * 1.1)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main(config: SoakConfig, flags: Sequence[str]) -> int:
    """Watch, print, and return the exit code."""
    with tempfile.TemporaryDirectory() as temporary:
        try:
            samples = watch(config, Path(temporary, "run"), flags)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            print(f"FAILED: {error}", flush=True)
            print(json.dumps({"passed": False, "failures": [str(error)]}))
            return 1
    first, last = tenths(samples)
    failures = verdict(first, last, config.max_growth_mib)
    minutes = samples[-1].seconds / 60.0
    print(f"{minutes:.1f} minutes, {len(samples)} samples, {samples[-1].steps - samples[0].steps:,} steps\n")
    print(f"{table(first, last, samples, config.max_growth_mib)}\n")
    print("\n".join(f"FAILED: {failure}" for failure in failures) or "passed: nothing grew, nothing slowed down")
    if config.plot:
        draw(samples, " ".join(("python -m fastppo.train", *FLAGS[:6], *flags)), config.plot)
    metrics, events = mib_per_hour(samples)
    result = {"passed": not failures, "failures": failures, "minutes": minutes, "first": asdict(first), "last": asdict(last)}
    print(json.dumps(result | {"metrics_mib_per_hour": metrics, "events_mib_per_hour": events}))
    return 1 if failures else 0


if __name__ == "__main__":
    own, flags = split_flags(sys.argv[1:])
    sys.exit(main(tyro.cli(SoakConfig, args=own), flags))
