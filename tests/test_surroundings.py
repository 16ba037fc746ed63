"""What surrounds a run goes wrong: Ctrl-C, full disks, no home, letters that cannot be printed, no working directory."""

import ctypes
import errno
import io
import json
import os
import pwd
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from fastppo import TrainConfig, UsageError, load_policy, train
from fastppo.cli import run
from fastppo.compile import workers as workers_module
from fastppo.compile.compile_errors import explain
from fastppo.compile.library_cache import cache_dir
from fastppo.compile.selector import ProgramSelector
from fastppo.compile.workers import LINE, WorkerPool
from fastppo.config import read_run_config
from fastppo.evaluate import console as evaluate
from fastppo.run.display import encodable
from fastppo.run.loggers import Loggers
from fastppo.run.metrics_file import read_rows
from fastppo.system import paths
from fastppo.train import console


def tiny(run_dir, **settings):
    """A run of a moment."""
    settings = {"num_envs": 2, "num_steps": 16, "num_iterations": 2, "eval_episodes": 0, "backend": "torch"} | settings
    return TrainConfig(run_dir=str(run_dir), compile="off", **settings)


FLAGS = ["--num-envs", "2", "--num-steps", "16", "--num-iterations", "2", "--compile", "off", "--backend", "torch"]


# --- Ctrl-C


class Library:
    """A compiled library as Team calls it: what a worker does is `act(team, number)`."""

    def __init__(self):
        self.team, self.number, self.act = None, 0, None

    def AOTInductorModelContainerCreateWithDevice(self, container, *_):  # noqa: N802
        return 0

    def AOTInductorModelContainerGetNumOutputs(self, container, number):  # noqa: N802
        return 0

    def AOTInductorModelContainerRun(self, container, inputs, *_):  # noqa: N802
        return self.act(self.team)


@pytest.fixture
def workers(monkeypatch):
    """A team of three, and its library."""
    library = Library()
    monkeypatch.setattr(ctypes, "CDLL", lambda path: library)
    library.team = WorkerPool(Path("library.so"), 3)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has none
    yield library
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("when", ["while it computes", "while it waits"])
def test_an_interrupt_between_workers(when, workers):
    """Ctrl-C in a program of several threads is a KeyboardInterrupt, and the threads have stopped when it arrives."""
    at_work = []

    def act(team):
        if threading.current_thread() is threading.main_thread():
            while len(at_work) < 2:
                time.sleep(0.001)
            if when == "while it computes":
                signal.raise_signal(signal.SIGINT)
            return 0
        at_work.append("started")
        if when == "while it waits" and len(at_work) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        while not team._shared[-LINE]:  # as native.cpp waits for the others
            time.sleep(0.001)
        at_work.append("stopped")
        return 1

    workers.act = act
    with pytest.raises(KeyboardInterrupt):
        workers.team.run([[torch.zeros(1)]] * 3)
    assert sorted(at_work) == ["started", "started", "stopped", "stopped"]


def test_a_worker_that_fails(workers):
    """It is an error of the program, and nobody waits for it."""
    workers.act = lambda team: 1
    with pytest.raises(RuntimeError, match="a worker of the compiled program failed") as failed:
        workers.team.run([[torch.zeros(1)]] * 3)
    assert "returned error 1" in str(failed.value.__cause__)


def test_a_thread_that_does_not_stop_is_not_waited_for(workers, monkeypatch):
    """Ctrl-C ends the run all the same."""
    monkeypatch.setattr(workers_module, "END_SECONDS", 0.01)
    over = []

    def act(team):
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        while not over:
            time.sleep(0.001)
        return 0

    workers.act = act
    with pytest.raises(KeyboardInterrupt):
        workers.team.run([[torch.zeros(1)]] * 3)
    over.append(True)


def test_an_interrupt_during_the_last_evaluation(tmp_path, monkeypatch, capsys):
    """Training is over and kept, which is said, with the command that evaluates."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastppo.training.results.evaluate_config", interrupted)
    assert console([*FLAGS, "--run-dir", str(tmp_path / "run")]) == 130
    captured = capsys.readouterr()
    assert "training is over and kept; only its evaluation was interrupted, do it with" in captured.out
    assert f": python -m fastppo.evaluate {tmp_path / 'run'}" in captured.out
    assert captured.err == "interrupted\n"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["iterations"] == 2


# --- the compiler's disks


def failed(*lines):
    """A command that said that on stderr."""
    return subprocess.CalledProcessError(1, ["g++", "native.cpp"], stderr="\n".join(lines))


def from_inductor(text):
    """An error as Inductor raises it, with the compiler's words in its middle."""
    error = RuntimeError(f"C++ compile error\n\nCommand:\ng++ /cache/x.cpp -o /cache/x.so\n\nOutput:\n{text}")
    error.__cause__ = failed("")
    return error


ROOM = "there is no room left in "


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "{cache}/build-1/x"), ROOM + "{cache} (XDG_CACHE_HOME names another"),
        (failed("{tmp}/a.s: Assembler messages:", "{tmp}/a.s: Fatal error: can't write 9 bytes: 'No space left on device'"),
         ROOM + "{tmp}, which the compiler uses (TMPDIR names another directory)"),
        (from_inductor("cc1plus: fatal error: error writing to {tmp}/b.s: No space left on device"), ROOM + "{tmp}, which"),
        (failed("/usr/bin/ld: final link failed: No space left on device"), ROOM + "{cache} and {tmp}, which are on one disk"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "{cache}/x"), "your quota is used up in {cache} (XDG_CACHE_HOME"),
        (failed("as: can't create {tmp}/c.o: Disk quota exceeded"), "your quota is used up in {tmp}, which"),
        (failed("/usr/bin/ld: cannot open output file {cache}/n.so: Read-only file system"), "the file system is read-only in"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "{cache}"), "no permission to write in {cache}"),
        (failed("Cannot create temporary file in /nowhere/: No such file or directory"), "there is no directory for"),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/x']"), "there is no directory for"),
        (from_inductor("fatal error: 'omp.h' file not found"), "the C++ compiler has no OpenMP: install it"),
        (failed("In file included from x.cpp:1:", "x.cpp:3:1: error: expected ';'"),
         "native.cpp does not compile: x.cpp:3:1: error: expected ';'"),
        (KeyError("nothing"), "KeyError: 'nothing'"),
    ],
)  # fmt: skip
def test_why_nothing_was_compiled(error, told, tmp_path, monkeypatch):
    """The directory that is full, over quota or not to be written, and the variable that moves it; else the first error."""
    cache, temporary = tmp_path / "cache", tmp_path / "tmp"
    cache.mkdir()
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))

    def filled(text):
        return text.replace("{cache}", str(cache)).replace("{tmp}", str(temporary))

    if isinstance(error, subprocess.CalledProcessError):
        error = failed(filled(error.stderr))
    elif isinstance(error, OSError) and error.filename:
        error = type(error)(error.errno, error.strerror, filled(error.filename))
    else:
        cause, error = error.__cause__, type(error)(*(filled(part) if isinstance(part, str) else part for part in error.args))
        error.__cause__ = cause
    reason = explain(error, cache)
    assert reason.startswith(filled(told))
    assert len(reason.splitlines()) == 1


def test_a_full_disk_of_the_compiler_costs_a_line(tmp_path, monkeypatch, capsys):
    """The run is trained eagerly, with --compile on too, and nothing is left in the cache."""
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\necho "$0: error writing to $TMPDIR/x.s: No space left on device" >&2\nexit 1\n')
    compiler.chmod(0o755)
    for name, value in (("CXX", str(compiler)), ("TMPDIR", str(tmp_path)), ("XDG_CACHE_HOME", str(tmp_path / "cache"))):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    train(TrainConfig(run_dir=str(tmp_path / "run"), num_envs=2, num_steps=16, num_iterations=2, eval_episodes=0, compile="on"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("programs: ")]
    assert line == (
        f"programs: eager, since compiling failed: there is no room left in {tmp_path}, which the compiler uses "
        "(TMPDIR names another directory)"
    )
    assert list((tmp_path / "cache" / "fastppo").iterdir()) == []


def test_a_cache_without_room_for_a_directory(tmp_path, monkeypatch, capsys):
    """The first thing that is made there fails: a line too."""

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), kwargs["dir"])

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "true")
    monkeypatch.setattr("tempfile.TemporaryDirectory", full)
    train(TrainConfig(run_dir=str(tmp_path / "run"), num_envs=2, num_steps=16, num_iterations=2, eval_episodes=0, compile="on"))
    assert f"since compiling failed: there is no room left in {tmp_path / 'fastppo'} (XDG_CACHE_HOME" in capsys.readouterr().out


def test_no_process_for_the_compiler(tmp_path, monkeypatch, capsys):
    """Where no process can be started any more, training goes on eagerly."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("fastppo.compile.selector.WORTH_BUILDING", {"learn": 0.0, "act": 0.0})

    def refused(*_, **__):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr("fastppo.compile.background.subprocess.Popen", refused)
    train(TrainConfig(run_dir=str(tmp_path / "run"), num_envs=2, num_steps=16, num_iterations=5, eval_episodes=0))
    assert (
        "since compiling failed: no process could be started for it: Resource temporarily unavailable"
        in capsys.readouterr().out
    )


# --- homes


def nobody(number):
    raise KeyError(f"getpwuid(): uid not found: {number}")


@pytest.mark.parametrize("home", ["none", "unwritable"])
def test_a_user_without_a_home(home, tmp_path, monkeypatch, capsys):
    """As with docker run --user 1234: compiled programs are kept among the temporary files, and a line says so."""
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("XDG_CACHE_HOME", "HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if home == "unwritable":
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    cache = tmp_path / f"fastppo-{os.getuid()}"
    assert cache_dir() == cache
    train(TrainConfig(run_dir=str(tmp_path / "run"), num_envs=2, num_steps=16, num_iterations=2, eval_episodes=0))
    line = f"no writable home directory: compiled programs are kept in {cache}"
    assert capsys.readouterr().out.splitlines().count(line) == 1
    assert cache.stat().st_mode & 0o777 == 0o700


def test_a_home_is_where_programs_are_kept(tmp_path, monkeypatch):
    """$XDG_CACHE_HOME first, then ~/.cache, whether it is there already or not."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == tmp_path / ".cache" / "fastppo"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine" / "fastppo"


def test_no_line_on_homes_without_compiling(monkeypatch):
    """--compile off keeps nothing."""
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    notes = []
    ProgramSelector("off", {}, 1, notes.append)
    assert notes == ["programs: eager (--compile off)"]


# --- letters


class Terminal(io.TextIOWrapper):
    """A terminal with that encoding; where `gone` is set, nobody reads it any more."""

    def __init__(self, encoding):
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)
        self.gone = False

    def isatty(self):
        return True

    def write(self, text):
        if self.gone:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().write(text)

    @property
    def shown(self):
        return self.buffer.getvalue().decode(self.encoding)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
@pytest.mark.parametrize("plain", [False, True])
def test_a_terminal_that_has_not_all_letters(encoding, plain, tmp_path, monkeypatch):
    """Lines where it cannot show the panel; a directory's name with letters of its own ends no run."""
    terminal = Terminal(encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    train(tiny(tmp_path / "\u65e5-\u00e9-\u00b7", plain=plain))
    assert "results in" in terminal.shown.replace("\n", " ")
    assert ("\u2501" in terminal.shown) is (encoding == "utf-8" and not plain)


def test_a_terminal_that_is_gone(tmp_path, monkeypatch):
    """With nohup a run outlives its terminal: the panel is not drawn any more, and training goes on to its end."""
    terminal = Terminal("utf-8")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    log = Loggers.log

    def hangs_up(self, row):
        terminal.gone = True
        log(self, row)

    monkeypatch.setattr(Loggers, "log", hangs_up)
    train(tiny(tmp_path / "run", num_iterations=4))
    assert len(read_rows(tmp_path / "run" / "metrics.csv")) == 4


@pytest.mark.parametrize(
    ("encoding", "text", "shown"),
    [
        ("utf-8", "caf\u00e9 \u00b7 \u00b1", "caf\u00e9 \u00b7 \u00b1"),
        ("ascii", "caf\u00e9 \u00b7 \u00b1", "caf? - +-"),
        ("cp1252", "caf\u00e9 \u00b7 \u65e5", "caf\u00e9 \u00b7 ?"),
        ("utf-8", "a\udcff", "a?"),
        ("ascii", "a\udcff", "a?"),
        ("latin-1", "a\udcff", "a\u00ff"),
    ],
)
def test_letters_that_an_encoding_has_not(encoding, text, shown):
    """ASCII in their place, or a question mark; the others stay."""
    assert encodable(text, Terminal(encoding)) == shown


def test_every_verb_prints_any_letter(monkeypatch):
    """None of them fails for a letter; the bytes of a file's name are what they were, so that the command printed works."""
    for encoding in ("ascii", "cp1252"):
        terminal = Terminal(encoding)
        for name in ("stdout", "__stdout__"):
            monkeypatch.setattr(sys, name, terminal)
        assert run(lambda args: print("\u65e5 \u2192 caf\udcc3\udca9"), []) == 0
        assert terminal.buffer.getvalue() == b"? -> caf\xc3\xa9\n"


def test_a_directory_whose_name_is_no_utf8(tmp_path, capsys):
    """Its bytes are a name as others are: trained in, resumed, evaluated, with TensorBoard's events in it."""
    name = os.fsencode(tmp_path) + b"/r\xff\xc3\xa9"
    path = os.fsdecode(name)
    assert console([*FLAGS, "--eval-episodes", "0", "--run-dir", path]) == 0
    assert console(["--resume", path, "--num-iterations", "3"]) == 0
    assert evaluate([path, "--episodes", "2"]) == 0
    assert "gets no more rows" not in capsys.readouterr().out
    assert read_run_config(Path(path)).run_dir == path
    load_policy(path, "last")
    assert {b"config.json", b"metrics.csv", b"summary.json"} <= set(os.listdir(name))
    assert any(file.startswith(b"events.out") for file in os.listdir(name))


# --- output that goes nowhere


@pytest.mark.parametrize(("needs_output", "code"), [(True, 3), (False, 0)])
def test_output_without_room(needs_output, code, monkeypatch, capfd):
    """What only prints has failed then, in one line; a run, whose results are in its directory, has not."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run(lambda args: print("result"), [], needs_output=needs_output) == code
    told = "fault: the output could not be written: No space left on device\n" if needs_output else ""
    assert capfd.readouterr().err == told


def test_a_line_that_has_no_room_at_once(monkeypatch, capsys):
    """Printed and flushed in the middle of a verb: the same line, not a traceback."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run(lambda args: print("result", flush=True), []) == 3
    assert capsys.readouterr().err == "fault: the output could not be written: No space left on device\n"


def test_a_closed_stdout_is_no_file(tmp_path):
    """Where stdout is closed, no file of a run takes its number, and what other programs print does not get into one."""
    script = "import os, sys; from fastppo.cli import run\n"
    script += "run(lambda args: print(os.open('x', os.O_CREAT), file=sys.stderr), [])"
    done = subprocess.run(
        ["sh", "-c", 'exec "$0" -c "$1" >&-', sys.executable, script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        encoding="utf-8",
    )
    assert int(done.stderr) > 2


# --- a working directory that is gone


@pytest.fixture
def deleted(tmp_path, monkeypatch):
    """The working directory does not exist any more."""
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    monkeypatch.setattr(paths, "_deleted", False)
    gone.rmdir()
    yield tmp_path
    os.chdir(tmp_path)  # for monkeypatch, which asks where it is


@pytest.mark.parametrize("run_dir", [["--run-dir", "run"], []])
def test_a_deleted_working_directory(run_dir, deleted, capsys):
    """A relative path, --run-dir's default for one, is refused in a line."""
    assert console([*FLAGS, *run_dir]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("the working directory has been deleted; change to another one, or give an absolute path")


def test_whole_paths_need_no_working_directory(deleted):
    """Training and evaluation work where every path is a whole one."""
    assert console([*FLAGS, "--eval-episodes", "0", "--run-dir", str(deleted / "run")]) == 0
    assert evaluate([str(deleted / "run"), "--episodes", "2"]) == 0


def test_absolute(deleted, monkeypatch):
    """From the root on; refused where there is nothing to start from; letters that the locale has not become UTF-8's bytes."""
    assert paths.absolute("/a/b", "--run-dir", None) == Path("/a/b")
    assert paths.current_directory() is None
    with pytest.raises(UsageError, match="--run-dir a/b: the working directory has been deleted"):
        paths.absolute("a/b", "--run-dir", None)
    os.chdir(deleted)
    assert paths.absolute(Path("a/b"), "--run-dir", paths.current_directory()) == deleted / "a" / "b"

    def ascii_only(path):
        return str(path).encode("ascii", "surrogateescape")

    monkeypatch.setattr(os, "fsencode", ascii_only)
    cafe = paths.absolute("/caf\u00e9", "--run-dir", None)
    assert str(cafe) == "/caf\u00e9".encode().decode(sys.getfilesystemencoding(), "surrogateescape")
