"""Signals, readers that leave, and faults: a run ends in order and keeps what it reached."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from fastppo import TrainingFault, load_policy, train
from fastppo.train import console
from support.runs import checkpoint, rows_of, short_run

# --- signals


def start_endless_run(run_dir):
    """`python -m fastppo.train` with both streams in pipes."""
    flags = ["--num-envs", "4", "--num-steps", "32", "--total-timesteps", "100000000", "--run-dir", str(run_dir), "--plain"]
    return subprocess.Popen(
        [sys.executable, "-m", "fastppo.train", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=run_dir.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def assert_ended_in_order(run_dir):
    """The last iteration logged is the one in the checkpoint and the summary, and everything is whole."""
    last = checkpoint(run_dir)
    assert last["iteration"] == int(rows_of(run_dir)[-1]["iteration"])
    assert json.loads((run_dir / "summary.json").read_text())["iterations"] == last["iteration"]
    assert load_policy(run_dir, "last").act(np.zeros(4, np.float32)) in (0, 1)
    assert not list(run_dir.rglob("*.tmp"))


@pytest.mark.long
def test_a_signal_ends_the_run_in_order(tmp_path):
    """The iteration is finished, a checkpoint and the summary are written, the way to go on is said; 128 + the signal.

    SIGTERM and SIGHUP do the same in tests/test_resume.py and tests/test_faults.py, within this process.
    """
    run_dir = tmp_path / "run"
    process = start_endless_run(run_dir)
    try:
        deadline = time.monotonic() + 600
        while not (run_dir / "metrics.csv").exists() or len(rows_of(run_dir)) < 2:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGINT, errors
    assert f"--resume {run_dir}" in output
    assert "Traceback" not in output + errors
    assert_ended_in_order(run_dir)


@pytest.mark.long
def test_a_reader_that_leaves_ends_the_run_in_order(tmp_path):
    """`| head -3`: as after SIGTERM, with the code of SIGPIPE and not a word on stderr."""
    process = start_endless_run(tmp_path / "run")
    try:
        assert process.stdout.readline() == f"run directory {tmp_path / 'run'}\n"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=600) == 128 + signal.SIGPIPE
    finally:
        process.kill()
    assert_ended_in_order(tmp_path / "run")


@pytest.mark.parametrize("module", ["train", "evaluate"])
def test_help_for_a_reader_that_leaves(module):
    """`--help | head -1`: nothing on stderr either."""
    here, there = os.pipe()
    os.close(here)
    command = [sys.executable, "-m", f"fastppo.{module}", "--help"]
    done = subprocess.run(command, stdout=there, stderr=subprocess.PIPE, text=True, timeout=600)
    os.close(there)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


# --- a fault


@pytest.mark.parametrize("kind", ["obs", "reward", "raise"])
def test_a_fault_keeps_what_was_reached(tmp_path, kind):
    """Iterations before the fault are in a whole checkpoint; the update with the bad number was not made."""
    marker = tmp_path / "marker"
    marker.touch()
    settings = {"env_kwargs": {"kind": kind, "index": 2, "at": 70, "marker": str(marker)}, "norm_obs": True}
    with pytest.raises(TrainingFault):
        train(short_run(tmp_path / "run", env_id="environments:FaultyVector-v0", check_env=False, **settings))
    last = checkpoint(tmp_path / "run")
    assert last["iteration"] == 2
    assert len(rows_of(tmp_path / "run")) == 2
    assert all(weight.isfinite().all() for weight in last["policy"]["weights"].values())
    assert all(moment.isfinite().all() for moment in last["policy"]["obs_moments"]["obs"])
    assert "Traceback" in (tmp_path / "run" / "fault.txt").read_text()
    assert load_policy(tmp_path / "run", "last").act(np.zeros(3, np.float32)) in (0, 1, 2)

    marker.unlink()  # the environment is mended
    assert console(["--resume", str(tmp_path / "run")]) == 0
    assert [int(row["iteration"]) for row in rows_of(tmp_path / "run")] == [1, 2, 3]
