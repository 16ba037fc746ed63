"""An environment that crashes or hangs is named by index and step, whatever runs it; what was learned is kept."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from environments import Failing

from fastppo.envs import grouped
from fastppo.random_streams import Stream
from fastppo.random_streams import environment_seed as seed_of_environments
from fastppo.train import console
from fastppo.training.setup import environment_seed

NUM_ENVS, NUM_STEPS = 4, 8
VECTORIZATIONS = ["sync", "grouped", "async"]  # one process, environments 2 and 3 in another one, one each
FLAGS = ["--num-envs", str(NUM_ENVS), "--num-steps", str(NUM_STEPS), "--num-iterations", "3", "--eval-episodes", "0"]
FLAGS += ["--compile", "off", "--no-check-env"]  # the check would meet them first


@pytest.fixture(autouse=True)
def _left_as_it_was(monkeypatch):
    """Two cores to share out to; afterwards no process is left, and SIGALRM is whoever's it was."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    monkeypatch.setattr("fastppo.system.cpus.cpu_quota", lambda root: 2.0)
    monkeypatch.delenv("OMP_NUM_THREADS")
    before = signal.getsignal(signal.SIGALRM)
    yield
    assert multiprocessing.active_children() == []
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


LIMIT = 1.0  # of what hangs, in seconds: a busy machine still starts a process within it
HANGS = 600.0  # how long that would take


def flags_of(run_dir, vectorization, index, at, how, timeout=None):
    """A run in which environment `index` fails, in its step `at`; only what hangs has a limit that it may reach."""
    if timeout is None:
        timeout = LIMIT if how.startswith("hang") else HANGS
    kwargs = [f"seed={environment_seed(1, 0) + index}", f"at={at}", f"how={how}"]
    flags = [*FLAGS, "--env-id", "environments:Failing-v0", "--vectorization", vectorization, "--env-timeout", f"{timeout:g}"]
    return [*flags, "--run-dir", str(run_dir), "--env-kwargs", *kwargs]


def fault_of(flags, capfd):
    """The first line of what a run says that ends with a fault, for which it has two, whoever prints."""
    started = time.monotonic()
    assert console(flags) == 3
    assert time.monotonic() - started < HANGS / 2
    first, second = capfd.readouterr().err.splitlines()
    told = (
        r"iterations up to \d+ are kept, details in .*/fault.txt and fault.pt; go on with: python -m fastppo.train --resume .*"
    )
    assert re.fullmatch(told, second)
    return first


@pytest.mark.parametrize("vectorization", VECTORIZATIONS)
@pytest.mark.parametrize(
    ("how", "message"),
    [("raise", "ValueError: the wheel came off"), ("hang", "no answer for 1 s (--env-timeout)"), ("exit", "SystemExit: 7")],
)
@pytest.mark.parametrize(("at", "iteration", "when"), [(11, 2, "in step 3 of the rollout"), (-1, 1, "to reset")])
def test_a_fault_is_named(tmp_path, capfd, vectorization, how, message, at, iteration, when):
    """Iteration, step, index, error; the code it came from in fault.txt; and the run goes on from where it was."""
    flags = flags_of(tmp_path / "run", vectorization, 2, at, how)
    first = fault_of(flags, capfd)
    assert first.startswith(f"fault: iteration {iteration}: an environment failed {when}: environment 2: {message}")
    assert re.search(r"[( ]environments.py:\d+\)?$", first)  # the place
    details = (tmp_path / "run" / "fault.txt").read_text()
    assert "in _fail" in details
    assert "environments.py" in details
    assert how != "raise" or "and another line" in details
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)
    assert last["iteration"] == iteration - 1
    if (how, at) == ("hang", 11):  # with other seeds, and no faults
        assert console(["--resume", str(tmp_path / "run"), "--num-iterations", "2", "--env-timeout", "9"]) == 0


@pytest.mark.parametrize("how", ["raise", "hang", "raise-twice", "hang-twice"])
def test_in_the_group_of_this_process(tmp_path, capfd, how):
    """While the other one has done its part."""
    assert ": environment 1: " in fault_of(flags_of(tmp_path / "run", "grouped", 1, 3, how), capfd)


@pytest.mark.parametrize("vectorization", VECTORIZATIONS)
@pytest.mark.parametrize("how", ["raise-twice", "hang-twice", "hang-stubbornly"])
def test_it_does_not_close_either(tmp_path, capfd, vectorization, how):
    """The first error is the one that is told, and it is told soon: what hangs is left alone, or ended with its process."""
    first = fault_of(flags_of(tmp_path / "run", vectorization, 3, 2, how), capfd)
    assert first.startswith("fault: iteration 1: an environment failed in step 2 of the rollout: environment 3: ")


@pytest.mark.parametrize(("vectorization", "named"), [("grouped", "environments 2 to 3"), ("async", "environment 3")])
@pytest.mark.long
def test_a_process_that_cannot_say_anything(tmp_path, capfd, vectorization, named):
    """One that dies, and one that does not come back to Python: by the numbers of its environments."""
    first = fault_of(flags_of(tmp_path / "died", vectorization, 3, 2, "die"), capfd)
    assert first.endswith(f"an environment failed in step 2 of the rollout: {named}: the process was killed by signal 9")
    started = time.monotonic()
    first = fault_of(flags_of(tmp_path / "hung", vectorization, 3, 2, "hang-in-c"), capfd)
    assert first.endswith(f"an environment failed in step 2 of the rollout: {named}: no answer for 1 s (--env-timeout)")
    assert time.monotonic() - started > LIMIT + grouped.NAME_SECONDS


def test_a_vector_class_of_somebody_else(tmp_path, capfd):
    """The step is known, and which environment it was is not."""
    (tmp_path / "marker").touch()
    flags = [*FLAGS, "--env-id", "environments:FaultyVector-v0", "--env-timeout", "1", "--run-dir", str(tmp_path / "run")]
    flags += ["--env-kwargs", "kind=hang", "index=0", "at=11", f"marker={tmp_path / 'marker'}"]
    assert fault_of(flags, capfd).startswith(
        "fault: iteration 2: the environments failed in step 3 of the rollout: no answer for 1 s (--env-timeout), at env"
    )
    short = [*flags, "--run-dir", str(tmp_path / "short"), "--num-iterations", "1", "--eval-episodes", "40"]
    assert console(short) == 3
    assert capfd.readouterr().err.startswith(
        "fault: the environments failed during evaluation: no answer for 1 s (--env-timeout), at environments.py:"
    )


@pytest.mark.parametrize("vectorization", VECTORIZATIONS)
@pytest.mark.parametrize("how", ["hang", "exit"])
def test_one_that_cannot_be_made(tmp_path, capfd, vectorization, how):
    """Exit code 2, and nothing written."""
    assert console(flags_of(tmp_path / "run", vectorization, 0, -2, how)) == 2
    said = {"hang": "environment 0: no answer for 1 s (--env-timeout)", "exit": "SystemExit: 7"}[how]
    error = capfd.readouterr().err
    assert error.startswith(f"error: --env-id environments:Failing-v0 cannot be made: {said}")
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_fault_in_evaluation(tmp_path, capfd):
    """After training: the line, and all that was learned."""
    index = seed_of_environments(1, Stream.EVALUATION_ENVIRONMENTS) - environment_seed(1, 0) + 2
    flags = [*flags_of(tmp_path / "run", "grouped", index, 5, "hang"), "--eval-episodes", "4"]
    assert console(flags) == 3
    assert capfd.readouterr().err.startswith(
        "fault: an environment failed during evaluation: environment 2: no answer for 1 s (--env-timeout), at env"
    )
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.pt", weights_only=True)["iteration"] == 3


def test_no_limit(tmp_path):
    """0: for ever, and no signal is taken."""
    before = signal.getsignal(signal.SIGALRM)
    handlers = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Failing, "close", lambda self: handlers.append(signal.getsignal(signal.SIGALRM)))
        assert console(flags_of(tmp_path / "run", "sync", 9, 0, "raise", timeout=0)) == 0
    assert handlers == [before] * NUM_ENVS


@pytest.mark.parametrize("vectorization", VECTORIZATIONS)
def test_slow_is_not_hung(tmp_path, monkeypatch, vectorization):
    """Steps below the limit, and a rollout above it, are nobody's fault."""
    step, one_after_another = Failing.step, {"sync": NUM_ENVS, "grouped": 2, "async": 1}[vectorization]
    seconds = 0.05 / one_after_another
    monkeypatch.setattr(Failing, "step", lambda self, action: (time.sleep(seconds), step(self, action))[1])
    started = time.monotonic()
    assert console(flags_of(tmp_path / "run", vectorization, 9, 0, "raise", LIMIT)) == 0
    assert time.monotonic() - started > 0.05 * 3 * NUM_STEPS > LIMIT


@pytest.mark.parametrize(
    "vectorization", ["grouped", pytest.param("sync", marks=pytest.mark.slow), pytest.param("async", marks=pytest.mark.slow)]
)
@pytest.mark.long
def test_as_the_user_sees_it(tmp_path, vectorization):
    """In a process of its own: exit code 3, and two lines on stderr, in which nobody else has written."""
    flags = flags_of(tmp_path / "run", vectorization, 2, 11, "raise-twice")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-m", "fastppo.train", *flags], capture_output=True, env=environment, timeout=120)
    assert done.returncode == 3
    first, second = done.stderr.decode().splitlines()
    assert first.startswith(
        "fault: iteration 2: an environment failed in step 3 of the rollout: environment 2: ValueError: the wheel came off (env"
    )
    assert second.endswith(f"--resume {tmp_path / 'run'}")
