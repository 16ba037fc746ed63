"""Processes that train together, real and pretended, and whether a process still runs."""

import csv
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch

from fastppo import cli
from fastppo.ranks import Ranks
from fastppo.train import console
from support.runs import spare_pictures


@dataclass(frozen=True)
class PretendedRanks(Ranks):
    """The second of two processes; the other one has found the same."""

    def all_reduce(self, x):
        return x + x

    def gather(self, x, dim=0):
        return torch.cat([x, x], dim)

    def highest(self, *numbers):
        return list(numbers)

    def check(self, error):
        if error is not None:
            raise error

    def agree(self, value):
        return value


def is_running(pid):
    """Not ended, and no zombie that nobody has waited for."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


TIMES = ("seconds", "sps", "env_share", "act_share", "learn_share")
# What the server of forks imports, once for all tests of a process: the first test that starts one decides.
PRELOADED = ["fastppo.train", "pytest", "tensorboard.backend.event_processing.event_accumulator", "matplotlib.pyplot"]
PRELOADED += ["fastppo.training.loop", "torch.utils.tensorboard"]


def be_a_rank(environment, said, draws, call, args):
    """What a forked process does: `call(args)`, with its output in files `said`.out and `said`.err.

    No torchrun ends it once another one has exited, so the other one is not waited for. draws: whether runs have a picture.
    """
    cli.SPEAK_SECONDS = 0.0
    if not draws:
        spare_pictures(setattr)
    os.environ.update(environment)
    for number, ending in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{said}.{ending}", os.O_WRONLY | os.O_CREAT), number)
    sys.exit(call(args))


class Started:
    """`size` processes that train together, with their output in `folder`; of size 1 without torchrun."""

    def __init__(self, folder, size, args, call=console, args_of=None, draws=False):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.size = folder, size
        self.store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        common = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.store.port}
        common |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0, "GROUP_RANK": 0}
        common |= {"OMP_NUM_THREADS": 1, "GLOO_SOCKET_IFNAME": "lo"}
        self.tag = f"{time.monotonic_ns()}"
        self.processes = []
        for rank in range(size):
            environment = (common | {"RANK": rank, "LOCAL_RANK": rank}) if size > 1 else {"OMP_NUM_THREADS": 1}
            environment = {key: str(value) for key, value in environment.items()}
            own = [*args, *(args_of(rank) if args_of else [])]
            target = (environment, str(folder / f"{self.tag}-{rank}"), draws, call, own)
            self.processes.append(context.Process(target=be_a_rank, args=target))
            self.processes[-1].start()

    def wait(self, seconds=600):
        """Their exit codes; none is left behind."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(end - time.monotonic(), 0.0))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        assert None not in codes, (codes, self.said("out"), self.said("err"))
        return codes

    def said(self, ending):
        """What each of them printed: "out" or "err"."""
        return [(self.folder / f"{self.tag}-{rank}.{ending}").read_text() for rank in range(self.size)]

    def kill(self, number, *ranks):
        for rank in ranks:
            os.kill(self.processes[rank].pid, number)


def last_of(run_dir):
    return torch.load(run_dir / "checkpoints" / "last.pt", weights_only=True)


def assert_same_run(one, other):
    """Metrics, parameters and optimiser within float32 tolerance, and what is counted exactly."""
    ours, theirs = rows_of(one), rows_of(other)
    assert len(ours) == len(theirs) > 0
    for row, expected in zip(ours, theirs, strict=True):
        for key in ("iteration", "global_step", "episodes", "terminations", "truncations", "episodic_return_mean", "updates"):
            np.testing.assert_equal(row[key], expected[key])
        for key, value in row.items():
            np.testing.assert_allclose(value, expected[key], rtol=2e-3, atol=1e-5, err_msg=key)
    ours, theirs = last_of(one), last_of(other)
    names = [name for name in theirs if name not in ("seconds", "made_with")]
    assert ours.keys() == theirs.keys()
    for name in names:
        pairs = zip(*(torch.utils._pytree.tree_leaves(kept[name]) for kept in (ours, theirs)), strict=True)
        for left, right in pairs:
            if isinstance(left, torch.Tensor):
                torch.testing.assert_close(
                    left, right, rtol=1e-3, atol=1e-5, equal_nan=True, msg=lambda text, at=name: f"{at}: {text}"
                )


def rows_of(run_dir):
    """metrics.csv as numbers, without what a clock has a part in."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items() if key not in TIMES} for row in csv.DictReader(file)]


def in_a_process(script, folder, *args):
    """stdout of a Python process that starts in `folder`."""
    command = [sys.executable, "-c", script, *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout
