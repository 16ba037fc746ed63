"""benchmarks/soak.py: its verdict by hand-made figures, each kind of growth found, and a run of seconds from end to end."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "soak.py"
pytestmark = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")


@pytest.fixture(scope="module")
def soak(benchmark_script):
    """The script as a module."""
    return benchmark_script


def samples_of(soak, count=100, **growth):
    """A sample a second of a run that makes 1000 steps in each, on one core; its figures grow by so much a sample."""
    flat = {"memory": 300 * 2**20, "files": 7, "threads": 4, "processes": 1}
    made = []
    for number in range(count):
        figures = {name: value + int(growth.get(name, 0) * number) for name, value in flat.items()}
        seconds = float(number)
        cpu_seconds = seconds * (1.0 + growth.get("cpu", 0.0) * seconds)
        made.append(soak.Sample(seconds, *figures.values(), cpu_seconds, 1000 * number, seconds, 200 * number, 100 * number))
    return made


@pytest.mark.parametrize(
    ("growth", "found"),
    [
        ({}, []),
        ({"memory": 0.1 * 2**20}, []),  # 9 MiB from the middle of the first tenth to that of the last
        ({"memory": 0.3 * 2**20}, ["memory"]),  # 27 MiB
        ({"files": 0.1}, ["files"]),
        ({"threads": 0.02}, ["threads"]),  # a single one after 50 samples
        ({"processes": 0.02}, ["processes"]),
        ({"cpu": 0.0004}, []),  # 1.004 s of CPU a second in the first tenth, 1.076 in the last: 6.7 % fewer steps each
        ({"cpu": 0.001}, ["steps per CPU second"]),  # 1.01 and 1.188: 15 %
        ({"files": 0.1, "memory": 2**20}, ["memory", "files"]),
        ({"memory": -(2**20), "files": -0.05, "threads": -0.02, "cpu": -0.001}, []),  # less is no fault
    ],
    ids=str,
)
def test_verdict(soak, growth, found):
    failures = soak.verdict(*soak.tenths(samples_of(soak, **growth)), max_growth_mib=16.0)
    assert len(failures) == len(found), failures
    assert all(failure.startswith(word) for failure, word in zip(failures, found, strict=True)), failures


def test_what_flickers_is_no_growth(soak):
    """A file open while a checkpoint is written, in a sample of the last tenth: the median does not see it, a leak it does."""
    samples = samples_of(soak)
    samples[-3] = replace(samples[-3], files=8, threads=5)
    assert soak.verdict(*soak.tenths(samples), 16.0) == []
    leaking = [replace(sample, files=8) if sample.seconds >= 60 else sample for sample in samples]
    assert soak.verdict(*soak.tenths(leaking), 16.0) == ["files grew from 7 to 8"]


def test_rates_and_sizes(soak):
    """1000 steps a second; 200 and 100 bytes a second are 0.687 and 0.343 MiB an hour."""
    samples = samples_of(soak)
    first, last = soak.tenths(samples)
    assert (first.sps, last.sps) == (1000.0, 1000.0)
    assert soak.mib_per_hour(samples) == pytest.approx((0.6866, 0.3433), abs=1e-4)
    assert "0.7, 0.3" in soak.table(first, last, samples, 16.0)


def test_no_row_meanwhile_is_no_rate(soak):
    """On a busy machine no iteration may end within a tenth: the rate is 0, and a fall from it is none."""
    same = [replace(sample, steps=0, row_seconds=0.0, cpu_seconds=1.0) for sample in samples_of(soak, 20)]
    first, last = soak.tenths(same)
    assert (first.sps, first.steps_per_cpu_second) == (0.0, 0.0)
    assert soak.verdict(first, last, 16.0) == []


def test_half_a_row_is_none(soak, tmp_path):
    """metrics.csv is read while it is written: the last whole row counts, however long the file."""
    path = tmp_path / "metrics.csv"
    assert soak.last_row(path) is None
    path.write_text("iteration,global_step,seconds\n")
    assert soak.last_row(path) is None
    path.write_text("iteration,global_step,seconds\n" + "1,128,0.5\n" * 1000 + "2,256,0.75\n3,38")
    assert soak.last_row(path) == (256, 0.75)


def test_children_are_seen(soak):
    """A process with a child that holds a file open: two processes, and their files and memory together."""
    child = "print(flush=True); input()"  # the line says that it has started: just after the fork it has hardly any memory
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], stdin=sys.stdin)"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        try:
            parent.stdout.readline()
            both = [soak.usage(pid) for pid in soak.process_tree(parent.pid)]
        finally:
            parent.communicate(b"\n")
    assert len(both) == 2
    assert all(memory > 2**20 and files >= 3 and threads == 1 for memory, files, threads, _ in both)


@pytest.mark.long
def test_a_run_of_seconds(tmp_path):
    """The whole script: a table, a picture, the JSON line; the bounds are for hours, so the verdict is not looked at."""
    plot = tmp_path / "soak.png"
    words = ["--minutes", "0.05", "--warm-up", "0.5", "--every", "0.1", "--plot", str(plot), "--", "--compile", "off"]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode in (0, 1), done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["passed"] == (result["failures"] == []) == (done.returncode == 0)
    assert result["minutes"] >= 0.05
    assert result["first"]["memory_mib"] > 100
    assert result["first"]["processes"] == 1
    assert "| resident memory, MiB |" in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["soak.png"]


def test_a_run_that_fails_is_told(tmp_path):
    """With the end of what it said, not with a table."""
    words = ["--minutes", "1", "--warm-up", "0", "--", "--num-envs", "eight"]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 1
    result = json.loads(done.stdout.splitlines()[-1])
    assert not result["passed"]
    assert "exit code 2" in result["failures"][0]
    assert "--num-envs" in result["failures"][0]
