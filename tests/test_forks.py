"""Processes that are forked from one whose OpenMP threads have worked: these are gone, and nobody may wait for them."""

import subprocess
import sys

import pytest

SCRIPT = """
import multiprocessing, signal, sys, torch
from fastppo import TrainConfig, train

torch.set_num_threads(2)
torch.linalg.qr(torch.randn(256, 256))  # from here on there is a second thread

def run(name, **more):
    signal.alarm(220)  # one that waits forever is no orphan either
    settings = {"num_envs": 2, "num_steps": 128, "num_minibatches": 1, "hidden_sizes": (256, 256), **more}  # two threads pay
    train(TrainConfig(run_dir=f"{sys.argv[1]}/{name}", num_iterations=1, eval_episodes=0, compile="off", **settings))
    assert torch.get_num_threads() == 2

for name, more in {"one": {"num_threads": 1}, "auto": {"vectorization": "async"}}.items():
    process = multiprocessing.get_context("fork").Process(target=run, args=(name,), kwargs=more)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(process.exitcode)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks are the rule on Linux only")
@pytest.mark.long
def test_training_in_a_forked_process(tmp_path):
    """With --num-threads 1, and by itself, it computes with one thread from its first operation on. It used to hang."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "one" / "summary.json").exists()
    assert (tmp_path / "auto" / "summary.json").exists()
