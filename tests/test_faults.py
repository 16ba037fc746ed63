"""Kills, full disks, failing loggers, numbers that are none: at most what came after the last checkpoint is lost."""

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastppo import TrainConfig, TrainingFault, UsageError, load_policy, train
from fastppo.run import directory as directory_module
from fastppo.run.checkpoint_file import load_checkpoint
from fastppo.run.directory import RunDirectory
from fastppo.run.loggers import Loggers
from fastppo.run.metrics_file import MetricsFile, read_rows
from fastppo.train import console
from support.resume import differing, result_of


def tiny(run_dir, **settings):
    """A run of a moment with a checkpoint an iteration, exact where environments are on the device."""
    settings = {"num_envs": 2, "num_steps": 16, "num_iterations": 4, "eval_episodes": 0, "backend": "torch"} | settings
    return TrainConfig(run_dir=str(run_dir), compile="off", plain=True, **{"checkpoint_iterations": 1} | settings)


# --- kills


def killed(job, after):
    """Run `job` in a process that kills itself in its `after`-th write to a file; whether it came to its end before."""
    child = os.fork()
    if child == 0:
        left = after

        def counted(function):
            def call(*args, **kwargs):
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        def half_written(self):
            half = len(self._unwritten) // 2
            if self._file is not None:
                self._file.write(self._unwritten[:half])
                self._unwritten = self._unwritten[half:]
            counted(flush)(self)

        flush = MetricsFile._flush
        MetricsFile._flush = half_written
        for module, name in (
            (os, "fsync"),
            (os, "link"),
            (Path, "replace"),
            (Path, "rename"),
            (Path, "unlink"),
            (Path, "mkdir"),
        ):
            setattr(module, name, counted(getattr(module, name)))
        code = 1
        try:
            job()
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "failed, instead of being killed or coming to its end"
    return not os.WIFSIGNALED(status)


@pytest.mark.long
def test_killed_in_every_write(tmp_path):
    """A run that is killed in each of its writes in turn, and resumed, ends with the bits of one that was not.

    At every moment there is no run directory yet, or one that can be gone on with: a loadable checkpoint and whole settings.
    """
    train(tiny(tmp_path / "whole"))
    config = tiny(tmp_path / "killed")
    run_dir, kills, randomly = tmp_path / "killed", 0, random.Random(0)
    while True:
        goes_on = run_dir.exists()
        if goes_on:
            RunDirectory(run_dir).newest(kept_only=False)
            assert TrainConfig.from_json(run_dir / "config.json").num_iterations == 4
        job = replace(config, resume=str(run_dir)) if goes_on else config
        if killed(lambda job=job: train(job), after=kills if not goes_on else randomly.randint(1, 14)):
            break
        kills += 1
    assert kills > 10
    assert differing(result_of(tmp_path / "whole"), result_of(run_dir)) == []


def test_nothing_half_made(tmp_path):
    """Killed before it is complete, a new run's directory is not there at all, and its name is free."""
    for after in range(6):
        assert not killed(lambda: train(tiny(tmp_path / "run")), after)
        assert not (tmp_path / "run").exists()
    train(tiny(tmp_path / "run"))


@pytest.mark.slow
def test_thirty_kills(tmp_path):
    """kill -9 at thirty random moments of real processes: each leaves a loadable checkpoint, and the end is that of no kill."""
    settings = ["--backend", "torch", "--num-iterations", "400", "--checkpoint-seconds", "0", "--compile", "off", "--plain"]
    command = [sys.executable, "-m", "fastppo.train", *settings, "--eval-episodes", "0", "--num-threads", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run_dir, moments = tmp_path / "killed", random.Random(1)
    for kill in range(30):
        how = ["--resume", str(run_dir)] if run_dir.exists() else ["--run-dir", str(run_dir)]
        process = subprocess.Popen([*command, *how], env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()  # the run directory is there
        time.sleep(moments.uniform(0.0, 0.5))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"kill {kill}: the run was over"
        RunDirectory(run_dir).newest(kept_only=False)
        load_policy(run_dir, "last")
    subprocess.run([*command, "--resume", str(run_dir)], env=environment, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*command, "--run-dir", "whole"], env=environment, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    assert differing(result_of(tmp_path / "whole"), result_of(run_dir)) == []


# --- signals


def signalled(monkeypatch, *numbers):
    """The run gets these signals, one after the other, in its second iteration."""
    log = Loggers.log

    def interrupted(self, row):
        log(self, row)
        for number in numbers if row["iteration"] == 2 else ():
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Loggers, "log", interrupted)


def test_a_terminal_that_is_closed(tmp_path, monkeypatch, capsys, request):
    """SIGHUP ends the run in order, as SIGTERM does."""
    signalled(monkeypatch, signal.SIGHUP)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup before the tests leaves it ignored
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, before))
    with pytest.raises(SystemExit) as end:
        train(tiny(tmp_path / "run"))
    assert end.value.code == 128 + signal.SIGHUP
    assert f"stopped by SIGHUP; go on with: python -m fastppo.train --resume {tmp_path / 'run'}" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["iteration"] == 2
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_nohup(tmp_path, monkeypatch):
    """Where SIGHUP is ignored, it stays so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signalled(monkeypatch, signal.SIGHUP)
        train(tiny(tmp_path / "run"))
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_stops_at_once(tmp_path, monkeypatch, capsys, request):
    """The iteration is not finished; the last checkpoint is there, and the way to go on is said."""
    signalled(monkeypatch, signal.SIGINT, signal.SIGINT)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has none
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    assert console(["--backend", "torch", "--num-envs", "2", "--num-steps", "16", "--run-dir", str(tmp_path / "run")]) == 130
    captured = capsys.readouterr()
    assert captured.err == "interrupted\n"
    assert "stopped at once; iterations up to 0 are kept" in captured.out
    assert f"--resume {tmp_path / 'run'}" in captured.out
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["iteration"] == 0


# --- full and unwritable disks


@pytest.fixture
def disk(monkeypatch):
    """A disk that is full while `disk.full` is set, for all that a run writes itself."""

    class Disk:
        full = False

        def write(self, function):
            def call(*args):
                if self.full:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return function(*args)

            return call

    disk = Disk()
    monkeypatch.setattr(directory_module.os, "fsync", disk.write(os.fsync))
    monkeypatch.setattr(MetricsFile, "_flush", disk.write(MetricsFile._flush))
    return disk


def during(monkeypatch, change):
    """Call `change(iteration)` before each row is logged."""
    log = Loggers.log

    def changed(self, row):
        change(row["iteration"])
        log(self, row)

    monkeypatch.setattr(Loggers, "log", changed)


def test_a_disk_that_is_full_for_a_while(disk, tmp_path, monkeypatch, capsys):
    """Training goes on, once told; the last checkpoint stays; with room again no row and no bit is missing."""
    train(tiny(tmp_path / "whole"))
    during(monkeypatch, lambda iteration: setattr(disk, "full", iteration in (2, 3)))
    train(tiny(tmp_path / "run"))
    told = capsys.readouterr().out
    assert told.count("No space left on device") == 2
    assert (
        "metrics.csv cannot be written (No space left on device): its rows are kept in memory until it can; training continues"
        in told
    )
    assert "no checkpoint of iteration 2: No space left on device; that of iteration 1 stays, and training goes on" in told
    assert "metrics.csv can be written again: no row is missing" in told
    assert "checkpoints can be written again" in told
    assert differing(result_of(tmp_path / "whole"), result_of(tmp_path / "run")) == []
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_disk_that_takes_a_row_in_pieces(tmp_path):
    """What was written of a row before the disk was full is not written again, and nothing of it is lost."""

    class Narrow:
        def __init__(self, file):
            self.file, self.calls, self.close = file, 0, file.close

        def write(self, content):
            self.calls += 1
            if self.calls % 3 == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(content[:2])

    metrics = MetricsFile(tmp_path / "metrics.csv")
    metrics.write({"iteration": 1, "global_step": 32})
    metrics._file = Narrow(metrics._file)
    for iteration in (2, 3):
        with pytest.raises(OSError, match="No space"):
            metrics.write({"iteration": iteration, "global_step": 32 * iteration})
    with pytest.raises(OSError, match="No space"):
        metrics.write({"iteration": 4, "global_step": 1234567890123456})
    metrics._file = metrics._file.file
    metrics.close()
    assert [row["global_step"] for row in read_rows(tmp_path / "metrics.csv")] == ["32", "64", "96", "1234567890123456"]


def test_a_disk_that_stays_full(disk, tmp_path, monkeypatch, capsys):
    """Exit code 3, what is kept and how to go on; once there is room, going on gives what no full disk would have."""
    train(tiny(tmp_path / "whole"))
    run_dir = tmp_path / "run"
    flags = ["--num-envs", "2", "--num-steps", "16", "--num-iterations", "4", "--eval-episodes", "0", "--backend", "torch"]
    flags += ["--compile", "off", "--checkpoint-iterations", "1"]
    with monkeypatch.context() as patched:
        during(patched, lambda iteration: setattr(disk, "full", iteration >= 2))
        assert console([*flags, "--run-dir", str(run_dir)]) == 3
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 2
    assert "iteration 4, the last one, could not be kept: No space left on device" in error
    assert f"that of iteration 1 is; once it can be written to, go on with: python -m fastppo.train --resume {run_dir}" in error
    disk.full = False
    assert console(["--resume", str(run_dir)]) == 0
    assert differing(result_of(tmp_path / "whole"), result_of(run_dir)) == []


def test_a_disk_that_is_full_from_the_start(disk, tmp_path, capsys):
    """Wrong use: nothing is left of the attempt."""
    disk.full = True
    assert console(["--run-dir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == (
        f"error: --run-dir {tmp_path / 'run'} cannot be written: No space left on device; choose another\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_cannot_be_written_to_is_not_resumed(disk, tmp_path, capsys):
    """Said before training, not after."""
    train(tiny(tmp_path / "run"))
    disk.full = True
    capsys.readouterr()
    assert console(["--resume", str(tmp_path / "run"), "--num-iterations", "5"]) == 2
    assert f"--resume {tmp_path / 'run'} cannot be written: No space left on device" in capsys.readouterr().err


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 450 KiB, where one may be made."""
    path = tmp_path / "small"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=450k", "tmpfs", str(path)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no permission to mount a file system")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.long
def test_a_real_full_disk(small_disk, tmp_path):
    """With everything on it that a run writes, TensorBoard's events and its output too: no traceback, the state kept."""
    run_dir, flags = small_disk / "run", ["--num-envs", "2", "--num-steps", "8", "--num-minibatches", "1", "--compile", "off"]
    flags += ["--update-epochs", "1", "--num-iterations", "400", "--checkpoint-iterations", "20"]
    command = [sys.executable, "-m", "fastppo.train", *flags]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with (small_disk / "output.txt").open("w") as output:
        done = subprocess.run(
            [*command, "--run-dir", str(run_dir)],
            env=environment,
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
    assert done.returncode == 3, done.stderr
    assert len(done.stderr.splitlines()) <= 2
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr + (small_disk / "output.txt").read_text(errors="replace")
    _, kept, _ = RunDirectory(run_dir).newest(kept_only=False)
    assert kept["iteration"] > 0
    load_policy(run_dir, "last")


@pytest.mark.long
def test_output_that_has_no_room(tmp_path):
    """A run whose output goes to a full disk finishes all the same."""
    flags = ["--num-envs", "2", "--num-steps", "16", "--num-iterations", "2", "--eval-episodes", "0", "--compile", "off"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "fastppo.train", *flags, "--run-dir", str(tmp_path / "run")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "run" / "summary.json").exists()


# --- two runs, one directory


def test_a_directory_in_use(tmp_path, capsys):
    """Another run's directory is refused for as long as that one lives, however it is asked for."""
    train(tiny(tmp_path / "run"))
    other = RunDirectory(tmp_path / "run")
    other.lock()
    capsys.readouterr()
    assert console(["--resume", str(tmp_path / "run"), "--num-iterations", "5"]) == 2
    assert "another run is writing to it" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    one = RunDirectory(tmp_path / "empty")
    one.lock()
    with pytest.raises(UsageError, match="another run is writing to it"):
        train(tiny(tmp_path / "empty"))
    one.unlock()
    other.unlock()
    train(tiny(tmp_path / "empty"))
    assert console(["--resume", str(tmp_path / "run"), "--num-iterations", "5"]) == 0


def test_runs_started_at_once_get_directories_of_their_own(tmp_path, monkeypatch):
    """A dozen of them within a second, as a sweep starts them: twelve names, nothing lost."""
    monkeypatch.chdir(tmp_path)
    made, together = [], threading.Barrier(12)

    def slow(directory):
        directory.write_text(directory.config, "{}")
        time.sleep(0.05)

    def make():
        together.wait(timeout=600)
        made.append(RunDirectory.create(None, "CartPole-v1", 1, slow).path)

    threads = [threading.Thread(target=make) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 12


# --- loggers


def test_a_logger_that_fails(tmp_path, monkeypatch, capsys):
    """TensorBoard's writer fails in its thread, or at once: one line, no traceback, training and metrics.csv go on."""
    hook = threading.excepthook

    def fail(*args, **kwargs):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for name, broken in (
        ("thread", "tensorboard.summary.writer.record_writer.RecordWriter.write"),
        ("at once", "fastppo.run.loggers.SummaryWriter.__init__"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(broken, fail)
            train(tiny(tmp_path / name))
        captured = capsys.readouterr()
        assert captured.out.count("TensorBoard failed and gets no more rows (OSError: [Errno 5] Input/output error)") == 1
        assert captured.err == ""
        assert len(read_rows(tmp_path / name / "metrics.csv")) == 4
    assert threading.excepthook is hook


def test_a_picture_that_cannot_be_drawn(tmp_path, monkeypatch, capsys):
    """A broken matplotlib costs the picture, not the run."""
    monkeypatch.setattr("fastppo.training.results.plot_curves", lambda *_: 1 / 0)
    train(tiny(tmp_path / "run"))
    assert "curves.png could not be drawn (ZeroDivisionError: division by zero)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    ["", "\0\0\0", "iteration\n1\n", 'iteration,global_step,loss\n1,32,0.5\n2,64,"', "a,b\n1,2\n", "x" * 200_000],
    ids=["empty", "NUL", "a column", "half a row", "others", "one long line"],
)
def test_metrics_that_are_damaged(content, tmp_path, capsys):
    """What is whole is kept, the rest is made again or lost: resuming never fails for it."""
    config = tiny(tmp_path / "run", num_iterations=2)
    train(config)
    (tmp_path / "run" / "metrics.csv").write_text(content)
    train(replace(config, resume=config.run_dir, num_iterations=4))
    rows = read_rows(tmp_path / "run" / "metrics.csv")
    assert [int(row["iteration"]) for row in rows][-2:] == [3, 4]


# --- numbers that are none


def test_the_rollout_of_a_fault_is_kept(tmp_path):
    """fault.pt has the number where the message says it is, and loads as data."""
    marker = tmp_path / "marker"
    marker.touch()
    kwargs = {"kind": "reward", "index": 1, "at": 20, "marker": str(marker)}
    config = tiny(tmp_path / "run", backend="auto", env_id="environments:FaultyVector-v0", env_kwargs=kwargs, check_env=False)
    with pytest.raises(
        TrainingFault, match=r"(?s)iteration 2: reward of environment 1 .*after step 4 .*fault\.txt and fault\.pt"
    ):
        train(config)
    report = torch.load(tmp_path / "run" / "fault.pt", weights_only=True)
    assert report["stage"] == "iteration 2"
    assert torch.argwhere(report["rollout"]["reward"].isnan()).tolist() == [[4, 1]]
    assert report["rollout"]["obs"].shape == (17, 2, 3)
    assert "reward of environment 1 is not finite" in (tmp_path / "run" / "fault.txt").read_text()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"learning_rate": 1e30}, "value_loss is not finite in minibatch"),
        ({"learning_rate": 1e38, "num_minibatches": 1, "update_epochs": 1}, "a parameter is not finite after the update"),
        ({"vf_coef": 1e25, "num_minibatches": 1, "update_epochs": 1}, "grad_norm is not finite in minibatch 0"),
    ],
    ids=["losses", "parameters", "squares of the gradient"],
)
def test_an_update_that_would_spoil_the_weights_is_not_applied(settings, named, tmp_path):
    """Parameters and Adam stay those of the iteration before: finite, and what a run with other settings could start from."""
    config = tiny(tmp_path / "run", max_grad_norm=float("inf"), **settings)
    with pytest.raises(TrainingFault, match=named):
        train(config)
    kept = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    assert all(weight.isfinite().all() for weight in kept["policy"]["weights"].values())
    assert all(moment.isfinite().all() for moment in kept["adam"].values())
    assert np.isfinite(load_policy(tmp_path / "run", "last").params.numpy()).all()
