"""Training with several processes, end to end: real ranks over gloo on this machine, and torchrun itself.

Most ranks are forked from a process that has torch already, with the environment that torchrun would give them and a store in
this process, where torchrun has its own.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastppo.cli import parse_train, run
from fastppo.training.loop import train
from fastppo.training.setup import environment_seed
from support.processes import Started, assert_same_run, last_of, rows_of
from support.resume import differing

COMMON = ["--num-envs", "8", "--num-steps", "16", "--compile", "off", "--plain", "--eval-episodes", "0", "--no-anneal-lr"]
COMMON += ["--no-check-env"]
CASES = {
    "host": ["--env-id", "CartPole-v1", "--backend", "gymnasium", "--norm-obs", "--norm-reward", "--compile", "on"],
    "device": ["--env-id", "CartPole-v1", "--backend", "torch", "--norm-obs", "--norm-reward", "--rnd-coef", "0.5"],
    "agents": ["--env-id", "support.parallel_envs", "--norm-obs", "--norm-reward", "--vectorization", "sync"],
}
FOR_EVER = ["--num-iterations", "100000", "--checkpoint-iterations", "2"]
FAULT, TERMINATED = 3, 128 + signal.SIGTERM
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds processes in /proc")


def train_until_seen(args):
    """A callback of one's own, which every process is given."""

    class Enough:
        def on_iteration(self, view):
            print(f"seen {view.iteration}")
            return view.iteration == 3

        def on_checkpoint(self, view):
            print(f"kept {view.iteration}")

        def on_end(self, view):
            print(f"end {view.iteration}")

    return run(lambda args: train(parse_train(args), callbacks=[Enough()]), args)


def wait_for_row(run_dir, number, seconds=600):
    """Until that many iterations are logged."""
    end, path = time.monotonic() + seconds, run_dir / "metrics.csv"
    while not path.exists() or path.read_text().count("\n") <= number:
        assert time.monotonic() < end, "no such iteration"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Six iterations of a case by 1, 2 or 4 processes, run once: (run directory, what was said)."""
    done = {}

    def run(case, size):
        if (case, size) not in done:
            folder = tmp_path_factory.mktemp(f"{case}-{size}")
            flags = [*COMMON, *CASES[case], "--minibatch-shards", "4", "--num-iterations", "6"]
            started = Started(folder / "said", size, [*flags, "--run-dir", str(folder / "run")], draws=True)
            assert started.wait() == [0] * size, started.said("err")
            done[case, size] = folder / "run", started
        return done[case, size]

    return run


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.long
def test_ranks_train_as_one_process_does(trained, case, size):
    """K processes with N / K environments each are one with N: environments, noise, minibatches, statistics, episodes.

    Of gymnasium's environments with fused programs, which sum over the processes themselves; on the device eagerly.
    """
    for number in (size, 1):
        summary = json.loads((trained(case, number)[0] / "summary.json").read_text())
        assert summary["tier"] == ("fused" if case == "host" else "eager")
    assert_same_run(trained(case, size)[0], trained(case, 1)[0])


@pytest.mark.long
def test_only_rank_0_writes_and_speaks(trained):
    """Files and lines are those of one run; the others say nothing at all."""
    run_dir, started = trained("device", 4)
    alone, started_alone = trained("device", 1)
    first, *others = started.said("out")
    assert others == ["", "", ""]
    assert first.count("run directory") == 1
    notes, notes_alone = (
        [line for line in said.splitlines() if not re.match(r" *\d+% ", line)] for said in (first, *started_alone.said("out"))
    )
    assert len(notes) == len(notes_alone) > 5
    assert "4 x 2 environments" in first

    def names(directory):
        return sorted(path.name.split(".")[0] for path in directory.rglob("*") if path.is_file())

    assert names(run_dir) == names(alone)


@pytest.mark.long
def test_other_numbers_of_processes_go_on(trained, tmp_path):
    """2, then 1, then 4: environments on the device go on where they were, and all is as if nothing had happened."""
    run_dir, flags = tmp_path / "run", [*COMMON, *CASES["device"], "--minibatch-shards", "4"]
    assert Started(tmp_path, 2, [*flags, "--run-dir", str(run_dir), "--num-iterations", "2"]).wait() == [0, 0]
    for size, iterations in ((1, "4"), (4, "6")):
        started = Started(tmp_path, size, ["--resume", str(run_dir), "--num-iterations", iterations])
        assert started.wait() == [0] * size, started.said("err")
        assert "the environments continue where they were" in started.said("out")[0]
    assert_same_run(run_dir, trained("device", 1)[0])


def test_groups_that_do_not_fit_are_made_anew(tmp_path):
    """A run of 2 processes goes on with 4, and says that its minibatches are others."""
    run_dir = tmp_path / "run"
    started = Started(tmp_path, 2, [*COMMON, *CASES["device"], "--run-dir", str(run_dir), "--num-iterations", "2"])
    assert started.wait() == [0, 0], started.said("err")
    started = Started(tmp_path, 4, ["--resume", str(run_dir), "--num-iterations", "3"])
    assert started.wait() == [0] * 4, started.said("err")
    assert "minibatches have equal shares of 4 groups of environments from here on; before: of 2" in started.said("out")[0]
    assert [row["iteration"] for row in rows_of(run_dir)] == [1, 2, 3]


@pytest.mark.parametrize(("size", "lost"), [(2, 0), (4, 3)])
def test_a_rank_that_is_killed(size, lost, tmp_path):
    """The others end within seconds and one of them says why, and how to go on from the checkpoint that is there."""
    run_dir = tmp_path / "run"
    started = Started(tmp_path, size, [*COMMON, *CASES["device"], *FOR_EVER, "--run-dir", str(run_dir)])
    wait_for_row(run_dir, 4)
    started.kill(signal.SIGKILL, lost)
    since = time.monotonic()
    assert started.wait() == [-signal.SIGKILL if rank == lost else FAULT for rank in range(size)]
    assert time.monotonic() - since < 150.0  # a rank that waits for the lost one waits for minutes
    said = "".join(started.said("err"))
    assert said.count("another rank has gone") == 1, said
    assert "Traceback" not in said
    assert said.rstrip().endswith(f"go on with: torchrun --nproc-per-node {size} -m fastppo.train --resume {run_dir}")
    kept = last_of(run_dir)["iteration"]
    assert f"iterations up to {kept} are kept" in said
    assert kept >= 2
    again = Started(tmp_path, 1, ["--resume", str(run_dir), "--num-iterations", str(kept + 1)])
    assert again.wait() == [0], again.said("err")
    assert f"resuming from iteration {kept}," in again.said("out")[0]
    assert rows_of(run_dir)[-1]["iteration"] == kept + 1


@pytest.mark.slow  # torchrun itself, and two processes twice
def test_torchrun_restarts_and_goes_on(tmp_path):
    """torchrun --max-restarts gives the same command again, which goes on from the checkpoint of the directory it names."""
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    flags = [*COMMON, *CASES["device"], "--num-iterations", "60", "--checkpoint-iterations", "2", "--run-dir", str(run_dir)]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [*command, "-m", "fastppo.train", *flags], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as torchrun:
        try:
            wait_for_row(run_dir, 4)
            children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
            ranks = [int(pid) for pid in children if b"fastppo.train" in Path(f"/proc/{pid}/cmdline").read_bytes()]
            assert len(ranks) == 2
            os.kill(ranks[1], signal.SIGKILL)
            out, err = torchrun.communicate(timeout=120)
        finally:
            torchrun.kill()
    assert torchrun.returncode == 0, err
    assert err.count("another rank has gone") == 1
    assert "resuming from iteration" in out
    assert [row["iteration"] for row in rows_of(run_dir)] == list(range(1, 61))


def test_an_environment_that_fails_on_one_rank(tmp_path):
    """Is everyone's fault: all end, one says what happened, and what came before is kept."""
    run_dir = tmp_path / "run"
    kwargs = [f"seed={environment_seed(1, 0) + 5}", "at=40", "how=raise"]  # the sixth environment, in the third iteration
    flags = [
        "--env-id",
        "environments:Failing-v0",
        "--vectorization",
        "sync",
        "--num-iterations",
        "5",
        "--run-dir",
        str(run_dir),
    ]
    started = Started(tmp_path, 2, [*COMMON, *flags, "--env-kwargs", *kwargs])
    assert started.wait() == [FAULT, FAULT]
    first, second = started.said("err")
    assert second == ""
    assert "iteration 3: " in first
    assert first.count("the wheel came off") == 1
    assert "iterations up to 2 are kept" in first
    assert "the wheel came off" in (run_dir / "fault.txt").read_text()
    assert last_of(run_dir)["iteration"] == 2


@pytest.mark.parametrize("stopped", [(1,), (0, 1)], ids=["one", "all"])
@pytest.mark.long
def test_a_signal_stops_all(stopped, tmp_path):
    """Wherever it arrives: the iteration is finished by all and kept, and what goes on has the same bits."""
    run_dir, flags = tmp_path / "run", [*COMMON, *CASES["device"], "--checkpoint-seconds", "1000"]
    started = Started(tmp_path, 2, [*flags, "--num-iterations", "100000", "--run-dir", str(run_dir)])
    wait_for_row(run_dir, 2)
    started.kill(signal.SIGTERM, *stopped)
    assert started.wait() == [TERMINATED, TERMINATED]
    said = "".join(started.said("out"))
    assert said.count("stopped by SIGTERM; go on with: torchrun --nproc-per-node 2") == 1
    assert json.loads((run_dir / "summary.json").read_text())["stopped_by"] == "SIGTERM"
    total = str(last_of(run_dir)["iteration"] + 2)
    assert Started(tmp_path, 2, ["--resume", str(run_dir), "--num-iterations", total]).wait() == [0, 0]
    whole = tmp_path / "whole"
    assert Started(tmp_path, 2, [*flags, "--num-iterations", total, "--run-dir", str(whole)]).wait() == [0, 0]
    assert rows_of(run_dir) == rows_of(whole)
    assert differing(last_of(run_dir), last_of(whole)) == []


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--num-envs", "9"], "--num-envs 9 does not fall into equal parts for 2 ranks; nearest that do: 8 or 10"),
        (["--num-minibatches", "128", "--no-norm-adv"], "minibatches of 1 rows do not fall into equal parts for 2 ranks"),
        (["--num-seeds", "2"], "--num-seeds 2 is for one process, and torchrun has started 2"),
        (["--run-dir", "/proc/nothing"], "--run-dir /proc/nothing cannot be written"),
        (["--gama", "0.9"], "--gama"),
    ],
    ids=lambda value: value[0].lstrip("-") if isinstance(value, list) else "",
)
def test_wrong_use_is_told_once(flags, says, tmp_path, monkeypatch):
    """Whoever finds it: all leave with the same code, nobody waits for ever, nothing is written."""
    monkeypatch.chdir(tmp_path)
    started = Started(tmp_path / "said", 2, [*COMMON, *CASES["device"], "--num-iterations", "2", *flags])
    assert started.wait() == [2, 2]
    assert "".join(started.said("out")) == ""
    first, second = started.said("err")
    assert second == ""
    assert says in first
    assert first.count("error:") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["said"]


@pytest.mark.parametrize(
    ("of_rank_1", "says"),
    [
        (["--gamma", "0.9"], "rank 1 was started with --gamma 0.9, rank 0 with 0.99"),
        (["--env-kwargs", "size=1"], "rank 1 was started with --env-kwargs"),
    ],
    ids=["gamma", "env-kwargs"],
)
def test_other_settings_on_another_rank_are_refused(of_rank_1, says, tmp_path):
    """As on two machines that were given different commands: not trained with, and not waited for."""
    flags = [*COMMON, *CASES["device"], "--run-dir", str(tmp_path / "run")]
    started = Started(tmp_path, 2, flags, args_of=lambda rank: of_rank_1 if rank == 1 else [])
    assert started.wait() == [2, 2]
    first, second = started.said("err")
    assert (says in first, second) == (True, "")
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_enough_is_enough_for_all(tmp_path):
    """--stop-at-return, which all ranks see, and a callback, which is called on rank 0 alone: every process ends well."""
    flags = [*COMMON, "--env-id", "environments:Walk-v0", "--vectorization", "sync", "--num-iterations", "50"]
    started = Started(tmp_path, 2, [*flags, "--stop-at-return", "-100", "--run-dir", str(tmp_path / "solved")])
    assert started.wait() == [0, 0], started.said("err")
    assert "as --stop-at-return asks" in started.said("out")[0]
    assert 1 < len(rows_of(tmp_path / "solved")) < 50

    flags += ["--checkpoint-iterations", "2", "--run-dir", str(tmp_path / "seen")]
    started = Started(tmp_path, 2, flags, train_until_seen)
    assert started.wait() == [0, 0], started.said("err")
    first, second = started.said("out")
    told = [line for line in first.splitlines() if line.startswith(("seen", "kept", "end"))]
    assert told == ["seen 1", "seen 2", "kept 2", "seen 3", "end 3"]
    assert second == ""
    assert len(rows_of(tmp_path / "seen")) == 3


@pytest.mark.parametrize(("restarts", "goes_on"), [(None, False), ("0", False), ("3", True)])
def test_the_same_command_goes_on_under_max_restarts(restarts, goes_on, trained, monkeypatch):
    """And nowhere else: whoever names a directory that is taken is told so. A machine that has joined again counts from 0."""
    run_dir = str(trained("device", 1)[0])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.delenv("TORCHELASTIC_MAX_RESTARTS", raising=False)
    if restarts is not None:
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    assert parse_train(["--run-dir", run_dir]).resume == (run_dir if goes_on else None)
    assert parse_train(["--run-dir", f"{run_dir}-new"]).resume is None
