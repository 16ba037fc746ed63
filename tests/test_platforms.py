"""Machines that lack what Linux has: macOS, Windows, containers. On Linux, with the missing parts taken away."""

import ast
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
from environments import Walk

import fastppo
from fastppo import TrainConfig, load_policy, train
from fastppo.compile import compiled_program, native
from fastppo.compile.compile_errors import CompileError
from fastppo.compile.compiled_program import load_program
from fastppo.envs.grouped import GroupedVectorEnv
from fastppo.run import files
from fastppo.run.metrics_file import read_rows
from fastppo.run.signals import StopSignals
from fastppo.system import platforms

ROOT = Path(fastppo.__file__).parent


def tiny(run_dir, **settings):
    """A run of a moment."""
    settings = {"num_envs": 2, "num_steps": 16, "num_iterations": 2, "eval_episodes": 0, "checkpoint_iterations": 1} | settings
    return TrainConfig(run_dir=str(run_dir), compile="off", plain=True, **settings)


# --- all of it, in a process without what Windows and macOS lack

TAKEN_AWAY = """
import multiprocessing, os, select, signal, sys, time
multiprocessing.set_start_method("spawn")
sys.modules["resource"] = sys.modules["fcntl"] = None
for module, names in {
    select: ["poll", "epoll"],
    os: ["fork", "forkpty", "sched_getaffinity", "sched_setaffinity", "nice", "killpg", "geteuid", "sysconf"],
    signal: ["SIGHUP", "SIGPIPE", "SIGALRM", "setitimer", "pthread_sigmask"],
    time: ["clock_gettime", "CLOCK_BOOTTIME"],
}.items():
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
"""

RUNS = """
import importlib, os, pkgutil, signal, sys

if __name__ == "__main__":  # spawned processes import this file
    import fastppo
    for module in pkgutil.walk_packages(fastppo.__path__, "fastppo."):
        if not module.name.startswith("fastppo.envs.jax"):  # needs an extra
            importlib.import_module(module.name)
    from fastppo.fused import kernels
    kernels.packaged = lambda: None  # installed without a compiler
    from fastppo.evaluate import console as evaluate
    from fastppo.train import console as train
    from fastppo.run.loggers import Loggers

    ACCENT = os.fsdecode(b"-caf\\xc3\\xa9")  # as it comes from a command line
    flags = ["--env-id", "environments:Walk-v0", "--num-envs", "2", "--num-steps", "16", "--num-iterations", "3"]
    flags += ["--num-threads", "2", "--num-minibatches", "1", "--update-epochs", "1", "--no-check-env"]
    for how in ("sync", "grouped", "async"):
        ways = ["--vectorization", how, "--run-dir", how + ACCENT, "--compile", "on" if how == "sync" else "off"]
        print("train", how, train([*flags, *ways, "--eval-episodes", "2" if how == "sync" else "0"]), flush=True)
    print("evaluate", evaluate(["grouped" + ACCENT, "--episodes", "2"]), flush=True)
    log = Loggers.log

    def interrupted(self, row):
        log(self, row)
        os.kill(os.getpid(), signal.SIGINT)

    Loggers.log = interrupted
    flags += ["--eval-episodes", "0", "--vectorization", "grouped", "--run-dir", "stopped"]
    print("interrupted", train(flags), flush=True)
    Loggers.log = log
    print("resumed", train(["--resume", "stopped"]), flush=True)
"""


@pytest.fixture(scope="module")
def told_elsewhere(tmp_path_factory):
    """What RUNS prints in a fresh process from which that was taken away, on stdout and stderr, and its directory.

    The machine is poor besides: no C++ compiler, TMPDIR names nothing, and the locale is C.
    """
    place = tmp_path_factory.mktemp("elsewhere")
    (place / "sitecustomize.py").write_text(TAKEN_AWAY)  # Python imports it, in spawned processes too
    (place / "runs.py").write_text(RUNS, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(place), str(Path(__file__).parent), *sys.path])}
    environment |= {"TMPDIR": str(place / "gone"), "CXX": "no-such-compiler"}
    environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "runs.py"], cwd=place, env=environment, capture_output=True, encoding="utf-8", errors="replace"
    )
    return done.stdout, done.stderr, place


@pytest.mark.parametrize(
    "line",
    ["train sync 0", "train grouped 0", "train async 0", "evaluate 0", "interrupted 130", "resumed 0"],
)
@pytest.mark.long
def test_runs_without_what_other_systems_lack(line, told_elsewhere):
    """Every module is imported, all ways to run environments train, evaluation, Ctrl-C and --resume work."""
    stdout, stderr, _ = told_elsewhere
    assert line in stdout.splitlines(), stdout + stderr
    assert "Traceback" not in stdout + stderr


@pytest.mark.long
def test_what_is_said_where_much_is_missing(told_elsewhere):
    """No compiler is one line; Ctrl-C says how to go on; the locale C spoils no text."""
    stdout, stderr, place = told_elsewhere
    assert "programs: eager, since compiling failed: there is no C++ compiler" in stdout
    assert f"stopped by SIGINT; go on with: python -m fastppo.train --resume {place / 'stopped'}" in stdout
    assert stderr == "interrupted\n"
    assert len(read_rows(place / "stopped" / "metrics.csv")) == 3
    assert list((place / "grouped-caf\u00e9").glob("events.out.tfevents.*"))


# --- one by one


def test_memory_is_told_in_the_system_s_own_unit(monkeypatch):
    """Linux counts KiB, macOS bytes, and Windows has no such module."""
    used = types.SimpleNamespace(ru_maxrss=3 * 2**20)
    monkeypatch.setattr(platforms, "resource", types.SimpleNamespace(RUSAGE_SELF=0, getrusage=lambda who: used))
    monkeypatch.setattr(sys, "platform", "linux")
    assert platforms.peak_memory_mib() == 3 * 2**10
    monkeypatch.setattr(sys, "platform", "darwin")
    assert platforms.peak_memory_mib() == 3
    monkeypatch.setattr(platforms, "resource", None)
    assert np.isnan(platforms.peak_memory_mib())


def test_signals_that_this_system_has_not():
    """A pipe that is closed ends a run on Windows too, where there is no SIGPIPE."""
    assert platforms.signal_name(signal.SIGINT) == "SIGINT"
    assert platforms.signal_name(999) == "signal 999"
    stop = StopSignals()
    stop.received = 999
    stop.restore()
    assert (stop.name, stop.exception().code) == ("signal 999", 128 + 999)


def test_windows_trains_eagerly(monkeypatch, tmp_path):
    """One line, before the cache is looked for."""
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(compiled_program, "cache_key", lambda *_: "key")
    with pytest.raises(CompileError, match="compiled programs are for Linux and macOS"):
        load_program(None, (), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("machine", "flag"), [("x86_64", "-march=native"), ("arm64", "-mcpu=native")])
def test_flags_of_the_compiler(machine, flag, monkeypatch, tmp_path):
    """clang for ARM, which macOS has, calls this processor by another name."""
    commands = []
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))
    native.build(tmp_path / "native.so")
    assert [part for part in commands[0] if part.endswith("=native")] == [flag]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("clang++") is None, reason="there is no clang++")
def test_clang_compiles_the_helpers(monkeypatch, tmp_path):
    """It is the compiler of macOS."""
    monkeypatch.setenv("CXX", "clang++")
    native.build(tmp_path / "native.so")
    assert (tmp_path / "native.so").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("clang++") is None, reason="there is no clang++")
def test_clang_compiles_a_run(monkeypatch, tmp_path, capsys):
    """With OpenMP the programs are compiled; without it one line says what to install."""
    monkeypatch.setenv("CXX", "clang++")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    train(
        TrainConfig(
            run_dir=str(tmp_path / "run"), num_envs=2, num_steps=16, num_iterations=2, eval_episodes=0, compile="inductor"
        )
    )
    told = capsys.readouterr().out
    assert "programs: compiled, ready" in told or "the C++ compiler has no OpenMP: install it" in told


@pytest.fixture
def files_as_on_windows(monkeypatch):
    """A file that this process has open, or mapped, can be neither renamed nor replaced nor deleted."""

    def refusing(function):
        def call(*paths, **kwargs):
            for path in map(os.path.realpath, paths):
                mapped = any(line.rstrip().endswith(path) for line in Path("/proc/self/maps").read_text().splitlines())
                for number in os.listdir("/proc/self/fd"):
                    link = f"/proc/self/fd/{number}"
                    mapped = mapped or (os.path.lexists(link) and os.path.realpath(link) == path)
                if mapped:
                    raise PermissionError(13, "The process cannot access the file because it is being used", path)
            return function(*paths, **kwargs)

        return call

    for name in ("replace", "rename", "unlink"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    monkeypatch.setattr(files, "fcntl", None)


def test_no_open_file_is_renamed(files_as_on_windows, tmp_path, capsys):
    """Windows refuses that: a run is trained, resumed and loaded, and loses no row and no checkpoint."""
    train(tiny(tmp_path / "run"))
    train(tiny(tmp_path / "run", num_iterations=4, resume=str(tmp_path / "run")))
    load_policy(tmp_path / "run", "last")
    told = capsys.readouterr().out
    assert "cannot be written" not in told
    assert "no checkpoint" not in told
    assert [row["iteration"] for row in read_rows(tmp_path / "run" / "metrics.csv")] == ["1", "2", "3", "4"]


# --- signals to all processes


class Signalling(Walk):
    """In its 20th step, in a process of its own, signals go to that process and to its parent."""

    def __init__(self, number):
        self.number, self.steps, self.home = number, 0, os.getpid()

    def step(self, action):
        self.steps += 1
        if self.steps == 20 and os.getpid() != PARENT:
            os.kill(os.getppid(), self.number)
            os.kill(os.getpid(), self.number)
        return super().step(action)


PARENT = os.getpid()


@pytest.mark.parametrize(("name", "iterations"), [("SIGTERM", 1), ("SIGHUP", 2)])
def test_a_signal_to_all_processes(name, iterations, tmp_path, capsys, request):
    """A batch system's SIGTERM, or a terminal that is closed, reaches the environments' processes too: no fault of theirs."""
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)  # nohup before the tests leaves SIGHUP ignored
    request.addfinalizer(lambda: signal.signal(number, before))
    envs = GroupedVectorEnv([lambda: Signalling(number)] * 2, 2)
    with pytest.raises(SystemExit) as end:
        train(tiny(tmp_path / "run", num_iterations=5, check_env=False), envs=envs)
    envs.close()
    assert end.value.code == 128 + number
    told = capsys.readouterr().out
    assert f"stopped by {name}" in told
    assert f"go on with: python -m fastppo.train --resume {tmp_path / 'run'}" in told
    assert len(read_rows(tmp_path / "run" / "metrics.csv")) == iterations
    assert not multiprocessing.active_children()


def test_interrupts_are_held_while_a_process_starts():
    """Ctrl-C is not lost, and a process that starts meanwhile shows no traceback of its own."""
    before, seen = signal.signal(signal.SIGINT, lambda *_: seen.append("interrupt")), []
    try:
        with platforms.interrupts_held():
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
            seen.append("started")
        assert seen == ["started", "interrupt"]
    finally:
        signal.signal(signal.SIGINT, before)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


# --- the source

SPECIAL = {
    *("resource", "fcntl", "select.poll", "os.fork", "os.nice", "os.killpg", "os.getuid", "os.geteuid", "os.sysconf"),
    *("os.uname", "os.sched_getaffinity", "os.mkfifo", "signal.SIGHUP", "signal.SIGPIPE", "signal.SIGALRM", "signal.setitimer"),
    *("signal.pthread_sigmask", "time.clock_gettime"),
}
LOOKED_AT = {"system/platforms.py", "system/cpus.py", "envs/deadline.py", "run/files.py", "run/signals.py"}


def dotted(tree):
    """Every name that is imported or spelled out with its module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_needs_linux(path):
    """What not every system has is used in five modules, which look whether it is there; text is read and written as UTF-8."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if path.relative_to(ROOT).as_posix() not in LOOKED_AT:
        assert SPECIAL & {name for name in dotted(tree)} == set()
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name, named = ast.unparse(call.func), {keyword.arg for keyword in call.keywords}
        binary = any(isinstance(arg, ast.Constant) and "b" in str(arg.value) for arg in call.args)
        if (name == "open" or name.endswith((".open", ".read_text"))) and name not in ("os.open", "Image.open") and not binary:
            assert "encoding" in named, ast.unparse(call)
        if name.startswith("subprocess."):
            assert not named & {"text", "universal_newlines"}, ast.unparse(call)
