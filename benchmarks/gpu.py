"""What a GPU gives, in at most ten minutes: `scripts/gpu.sh`, for the first person with a card.

First the tests marked `gpu`. Then each workload with eager programs, with programs captured as CUDA graphs, and with steps
that are compiled before they are captured. A run is a whole training run in a process of its own. It gives transitions a second
after a warm-up and, by torch.profiler in two more iterations, the time of kernels, of copies, and between them. Runs that the
time does not allow are skipped, and the table says so. The last line of the output is one JSON object.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from sps import WORKLOADS, Workload

ROOT = Path(__file__).resolve().parent.parent
FORMS: Mapping[str, str] = {"eager": "off", "captured": "auto", "compiled": "on"}  # the value of --compile
GPU_WORKLOADS: Mapping[str, Workload] = {
    **{name: WORKLOADS[name] for name in ("cartpole8", "cartpole1024", "device1024")},
    "device65536": replace(WORKLOADS["device1024"], num_envs=65_536, num_steps=32),
    "halfcheetah64-envpool": replace(WORKLOADS["halfcheetah8-envpool"], num_envs=64),
    "breakout128-envpool": replace(WORKLOADS["breakout8-envpool"], num_envs=128),
}
WARMUP_ITERATIONS = 3
PROFILED_ITERATIONS = 2
TEST_SECONDS = 240.0
RUN_SECONDS = 90.0  # at most, with imports, compiling and the profile
LEAST_SECONDS = 20.0  # a run is not begun with less


@dataclass(frozen=True)
class GpuConfig:
    """Measure the forms of fastppo's programs on a GPU; the last line of the output is one JSON object."""

    budget: float = 570.0
    """Seconds for everything."""
    seconds: float = 4.0
    """Measured seconds of each run."""
    device: str = "cuda"
    """As fastppo.train's. cpu tries this script itself."""
    tests: bool = True
    """Run the tests marked gpu first."""
    workloads: tuple[str, ...] = tuple(GPU_WORKLOADS)
    """Which workloads."""
    one: tuple[str, Literal["eager", "captured", "compiled"]] | None = None
    """One workload in one form in this process."""


Interval = tuple[float, float]


def busy_time(intervals: Iterable[Interval]) -> float:
    """Time in which at least one of the intervals lasts."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(end - max(start, until), 0.0)
        until = max(until, end)
    return total


def device_times(events: Sequence[tuple[str, float, float]], wall: float) -> dict[str, float]:
    """What a profile says of one iteration, in ms. events: (name, start, end) on the device, in us; wall: of all, in us."""
    copies = [(start, end) for name, start, end in events if name.startswith(("Memcpy", "Memset"))]
    kernels = [(start, end) for name, start, end in events if not name.startswith(("Memcpy", "Memset"))]
    scale = 1e-3 / PROFILED_ITERATIONS
    return {
        "kernel_ms": busy_time(kernels) * scale,
        "copy_ms": busy_time(copies) * scale,
        "gap_ms": (wall - busy_time([*kernels, *copies])) * scale,
        "iteration_ms": wall * scale,
        "kernels": len(kernels) / PROFILED_ITERATIONS,
    }


def run_one(name: str, form: str, config: GpuConfig) -> dict[str, Any]:
    """One training run in this process: sps after the warm-up, then the profile."""
    import torch
    from torch.autograd import DeviceType

    from fastppo import TrainConfig, train
    from fastppo.callbacks import Callback, View

    workload, activity = GPU_WORKLOADS[name], torch.profiler.ProfilerActivity
    found: dict[str, Any] = {}
    profile = torch.profiler.profile(activities=[activity.CPU, activity.CUDA] if config.device != "cpu" else [activity.CPU])

    class Measure(Callback):
        """The clock of the run; ends it."""

        started = profiled_from = 0.0
        first_step = last = 0

        def on_iteration(self, run: View) -> bool:
            now = time.perf_counter()
            if run.iteration == WARMUP_ITERATIONS:
                self.started, self.first_step = now, run.global_step
            elif run.iteration > WARMUP_ITERATIONS and not self.last and now - self.started >= config.seconds:
                found["sps"] = (run.global_step - self.first_step) / (now - self.started)
                self.last = run.iteration + PROFILED_ITERATIONS
                profile.start()
                self.profiled_from = time.perf_counter()
            elif self.last and run.iteration == self.last:
                wall = (now - self.profiled_from) * 1e6
                profile.stop()
                on_device = [one for one in profile.events() or [] if one.device_type == DeviceType.CUDA]
                found.update(device_times([(one.name, one.time_range.start, one.time_range.end) for one in on_device], wall))
                return True
            return False

    with tempfile.TemporaryDirectory() as directory:
        settings: dict[str, Any] = {"clip_reward": True, "clip_coef": 0.1, "learning_rate": 2.5e-4} if workload.is_atari else {}
        result = train(
            TrainConfig(
                env_id=workload.env_id,
                backend=workload.backend,
                num_envs=workload.num_envs,
                num_steps=workload.num_steps,
                num_minibatches=workload.num_minibatches,
                update_epochs=workload.update_epochs,
                norm_obs=workload.normalized,
                norm_reward=workload.normalized,
                total_timesteps=10**12,
                compile=FORMS[form],
                device=config.device,
                eval_episodes=0,
                plain=True,
                run_dir=str(Path(directory, "run")),
                **settings,
            ),
            callbacks=[Measure()],
        )
    memory = torch.cuda.max_memory_allocated() / 2**20 if config.device != "cpu" else None
    kept = {key: result.summary[key] for key in ("tier", "compile_seconds", "first_update_seconds", "deviations")}
    return {"workload": name, "form": form, **found, "gpu_memory_mib": memory, **kept}


def run_in_process(name: str, form: str, config: GpuConfig, limit: float) -> dict[str, Any]:
    """`run_one` in a fresh process of at most `limit` seconds; a reason where it brings nothing."""
    words = ["--one", name, form, "--device", config.device, "--seconds", str(config.seconds)]
    try:
        done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"workload": name, "form": form, "failed": f"not done after {limit:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode == 0 and lines:
        result: dict[str, Any] = json.loads(lines[-1])
        return result | {"notes": [line for line in lines if line.startswith("programs: ")]}
    said = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
    return {"workload": name, "form": form, "failed": said[-1][:300]}


def run_tests(limit: float) -> dict[str, Any]:
    """The tests marked gpu: how many passed, failed, and the names of those that failed."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "--config-file",
        "pyproject.toml",
        "--confcutdir",
        "tests",
        "-m",
        "gpu",
        "-q",
    ]
    command += ["-m", "gpu", "-v", "-rf", "tests/test_cuda.py"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else late.stdout or ""
        return {word.lower(): said.count(word) for word in ("PASSED", "FAILED")} | {"unfinished": f"after {limit:.0f} s"}
    return {**count_tests(done.stdout), "exit_code": done.returncode}


def count_tests(output: str) -> dict[str, Any]:
    """What pytest's last lines say."""
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", output)}
    return {**counts, "failures": re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)}


def table_of(results: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each run."""
    table = Table(title="steps per second; ms of an iteration")
    for column in ("workload", "form", "in use", "sps", "kernels", "kernel ms", "copy ms", "gap ms", "start s"):
        table.add_column(column, justify="left" if column in ("workload", "form", "in use") else "right")
    for one in results:
        if "failed" in one:
            table.add_row(one["workload"], one["form"], one["failed"])
            continue
        numbers = [f"{one[key]:,.1f}" for key in ("kernel_ms", "copy_ms", "gap_ms", "first_update_seconds")]
        table.add_row(one["workload"], one["form"], one["tier"], f"{one['sps']:,.0f}", f"{one['kernels']:,.0f}", *numbers)
    return table


def about(device: str) -> dict[str, Any]:
    """The card and the versions. Raises UsageError where there is no card."""
    import torch

    from fastppo.system.devices import choose_device

    found = choose_device(device)
    card = torch.cuda.get_device_name(found) if found.type == "cuda" else "none"
    return {"device": device, "card": card, "torch": torch.__version__, "cuda": torch.version.cuda, "cpus": os.cpu_count()}


def main(config: GpuConfig) -> None:
    """Everything, within the budget."""
    if config.one is not None:
        print(json.dumps(run_one(*config.one, config)))
        return
    started, console = time.monotonic(), Console()

    def left() -> float:
        return config.budget - (time.monotonic() - started)

    report: dict[str, Any] = about(config.device)
    console.print(report)
    if config.tests:
        report["tests"] = run_tests(min(TEST_SECONDS, left()))
        console.print("tests:", report["tests"])
    results = []
    for form in FORMS:  # all workloads eagerly first: what time does not allow is then the slowest to start
        for name in config.workloads:
            limit = min(RUN_SECONDS, left())
            skipped = {"workload": name, "form": form, "failed": "skipped: no time left"}
            results.append(skipped if limit < LEAST_SECONDS else run_in_process(name, form, config, limit))
            console.print(results[-1])
    results.sort(key=lambda one: config.workloads.index(one["workload"]))
    console.print(table_of(results))
    settings = {key: value for key, value in asdict(config).items() if key != "one"}
    print(json.dumps({**report, "settings": settings, "seconds": round(time.monotonic() - started), "results": results}))


if __name__ == "__main__":
    from fastppo.errors import UsageError

    try:
        main(tyro.cli(GpuConfig))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
