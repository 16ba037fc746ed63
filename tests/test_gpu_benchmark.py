"""benchmarks/gpu.py: what it computes from a profile, by hand, and what it makes of runs that fail. No card is needed."""

import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def test_time_of_the_device_by_hand(benchmark_script):
    """Two iterations in 10 ms. Kernels from 0 to 2 and 1 to 3 ms overlap: 3 ms; one copy of 1 ms. Nothing runs in 6 ms."""
    events = [("gemm", 0.0, 2000.0), ("relu", 1000.0, 3000.0), ("Memcpy DtoH (Device -> Pageable)", 5000.0, 6000.0)]
    found = benchmark_script.device_times(events, 10_000.0)
    assert found == {"kernel_ms": 1.5, "copy_ms": 0.5, "gap_ms": 3.0, "iteration_ms": 5.0, "kernels": 1.0}


def test_time_of_no_device(benchmark_script):
    """All of it is a gap."""
    assert benchmark_script.device_times([], 2_000.0)["gap_ms"] == 1.0


def test_what_pytest_says(benchmark_script):
    """Counts and names."""
    output = "..F\nFAILED tests/test_cuda.py::test_one - AssertionError: no\n1 failed, 12 passed, 3 deselected in 9.1s\n"
    assert benchmark_script.count_tests(output) == {"failed": 1, "passed": 12, "failures": ["tests/test_cuda.py::test_one"]}


def test_runs_that_bring_nothing_are_rows(benchmark_script, monkeypatch, capsys):
    """A run that is too slow, one that fails and one that works: a table, and the last line is JSON with a reason for each."""

    def run(command, **_):
        name = command[3]
        if name == "cartpole8":
            raise benchmark_script.subprocess.TimeoutExpired(command, 1)
        works = {
            "workload": name,
            "form": command[4],
            "tier": "cuda-graph",
            "sps": 9.0,
            "kernel_ms": 1.0,
            "copy_ms": 0.0,
            "gap_ms": 2.0,
            "kernels": 700.0,
            "first_update_seconds": 5.0,
        }
        said = json.dumps(works) if name == "device1024" else ""
        output = f"programs: cuda-graph, ready after 1.00 s\n{said}\n"
        return benchmark_script.subprocess.CompletedProcess(command, 0 if said else 3, output, "Traceback\nerror: no EnvPool\n")

    monkeypatch.setattr(benchmark_script.subprocess, "run", run)
    names = ("cartpole8", "device1024", "halfcheetah64-envpool")
    benchmark_script.main(benchmark_script.GpuConfig(device="cpu", tests=False, workloads=names))
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [one["workload"] for one in report["results"]] == [name for name in names for _ in range(3)]
    assert {one["failed"] for one in report["results"] if "failed" in one} == {"not done after 90 s", "error: no EnvPool"}
    assert [one["notes"] for one in report["results"] if "sps" in one] == [["programs: cuda-graph, ready after 1.00 s"]] * 3


def test_no_time_left_is_said(benchmark_script, capsys):
    """Nothing is started."""
    benchmark_script.main(benchmark_script.GpuConfig(device="cpu", tests=False, budget=10.0, workloads=("cartpole8",)))
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {one["failed"] for one in report["results"]} == {"skipped: no time left"}


@pytest.mark.long
def test_a_run_is_measured(benchmark_script, monkeypatch):
    """One eager run on the CPU, in this process: a speed, and two profiled iterations."""
    monkeypatch.setattr(sys, "stdout", sys.stderr)
    config = benchmark_script.GpuConfig(device="cpu", seconds=0.01)
    found = benchmark_script.run_one("cartpole8", "eager", config)
    assert found["sps"] > 0
    assert (found["tier"], found["kernels"]) == ("eager", 0.0)
    assert found["gap_ms"] == pytest.approx(found["iteration_ms"])
