"""Wrong use ends with exit code 2 and a fault while training with 3: one or two lines that help, and nothing half-written."""

import importlib
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastppo import TrainConfig, UsageError, train
from fastppo.evaluate import console as evaluate_console
from fastppo.train import console

TINY = ["--num-envs", "4", "--num-steps", "32", "--num-iterations", "3", "--eval-episodes", "0"]
UNCHECKED = [*TINY, "--no-check-env"]  # for environments whose fault the check would find before training does


def lines_of(capsys):
    """What went to stderr: one or two lines, and no traceback in either stream."""
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out + captured.err
    lines = captured.err.splitlines()
    assert 1 <= len(lines) <= 2, captured.err
    assert all(len(line) < 400 for line in lines), captured.err
    return captured.err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        # unknown environments: the nearest ids
        (["--env-id", "CartPol-v1"], ["--env-id", "CartPol-v1", "CartPole-v1"]),
        (["--env-id", "cartpole-v1"], ["--env-id", "CartPole-v1"]),
        (["--env-id", "Pendulum-v9"], ["--env-id", "Pendulum-v1"]),
        (["--env-id", "Pendulum"], ["--env-id", "Pendulum-v1"]),  # no version
        (["--env-id", "environments:Wlak-v1"], ["--env-id", "Walk-v1"]),
        (["--env-id", "no/such:thing"], ["--env-id"]),
        (["--env-id", ""], ["--env-id"]),
        (["--env-id", ":foo"], ["--env-id :foo: write module:NAME, such as my_module:foo"]),
        (["--env-id", 1000 * "x"], ["--env-id"]),
        # modules
        (["--env-id", "no_such_module:Walk-v0"], ["--env-id", "no_such_module"]),
        (["--env-id", "broken_module:Walk-v0"], ["--env-id", "broken_module"]),
        (["--env-id", "unparsable_module:Walk-v0"], ["--env-id", "unparsable_module"]),
        (["--env-id", "crashing_module:Walk-v0"], ["--env-id", "crashing_module"]),
        (["--env-id", "exiting_module:Walk-v0"], ["--env-id", "exiting_module", "SystemExit"]),
        # arguments of the environment
        (["--env-id", "Pendulum-v1", "--env-kwargs", "gravity=9"], ["--env-kwargs", "gravity"]),
        (["--env-id", "environments:Fragile-v0"], ["--env-kwargs", "where"]),
        (["--env-kwargs", "gravity"], ["--env-kwargs", "KEY=VALUE"]),
        (["--env-kwargs", "gravity=" + 5000 * "["], ["--env-kwargs gravity", "nested"]),
        (["--env-id", "environments:Walk-v0", "--vectorization", "entry-point"], ["--vectorization", "sync"]),
        # spaces: the one found, and those supported
        (["--env-id", "environments:Spaces-v0", "--env-kwargs", "which=action"], ["Text", "MultiDiscrete", "Box"]),
        (["--env-id", "environments:Spaces-v0", "--env-kwargs", "which=integer-action"], ["int64", "Discrete", "Box"]),
        (["--env-id", "environments:Spaces-v0", "--env-kwargs", "which=text-obs"], ["Text", "Box", "Dict"]),
        (["--env-id", "environments:Spaces-v0", "--env-kwargs", "which=nested-obs"], ["Graph", "inner.0", "Box"]),
        (["--squash-actions"], ["--squash-actions", "Discrete"]),
        # a batch that does not divide: the nearest values that do
        (["--num-envs", "8", "--num-steps", "100", "--num-minibatches", "7"], ["--num-minibatches 7", "800", "5 or 8"]),
        (["--num-envs", "8", "--num-steps", "128", "--minibatch-size", "250"], ["--minibatch-size 250", "1024", "128 or 256"]),
        (["--num-envs", "1", "--num-steps", "4", "--num-minibatches", "4"], ["--norm-adv", "--num-minibatches"]),
        (["--num-minibatches", "4", "--minibatch-size", "64"], ["--num-minibatches", "--minibatch-size"]),
        # how long
        (["--total-timesteps", "1000", "--num-iterations", "10"], ["--total-timesteps", "--num-iterations"]),
        # unknown flags and bad values
        (["--num-env", "8"], ["--num-env", "--num-envs"]),
        (["--frobnicate"], ["--frobnicate"]),
        (["--num-envs", "eight"], ["--num-envs", "eight"]),
        (["--num-envs", 1000 * "8"], ["--num-envs", "888"]),
        (["--norm-obs", ""], ["options: ''"]),
        (["", "--norm-obs", ""], ["options: ''"]),
        (["--num-envs", "0"], ["--num-envs", "at least 1"]),
        (["--num-envs"], ["--num-envs"]),
        (["--gamma", "1.5"], ["--gamma", "between 0 and 1"]),
        (["--learning-rate", "nan"], ["--learning-rate", "above 0"]),
        (["--learning-rate", "-1"], ["--learning-rate", "above 0"]),
        (["--ent-coef", "inf"], ["--ent-coef"]),
        (["--env-timeout", "-1"], ["--env-timeout", "at least 0"]),
        (["--env-timeout", "inf"], ["--env-timeout", "at least 0"]),
        (["--seed", "-1"], ["--seed"]),
        (["--hidden-sizes", "64", "0"], ["--hidden-sizes"]),
        (["--hidden-sizes", "64", str(2**40)], ["--hidden-sizes", "65536"]),  # what no memory holds
        (["--cnn-size", str(2**40)], ["--cnn-size", "65536"]),
        (["--update-epochs", str(2**40)], ["--update-epochs", "2097151"]),
        (["--num-threads", str(2**40)], ["--num-threads", "4096"]),
        (["--log-std-init", "1e308"], ["--log-std-init", "-20 and 20"]),
        (["--advantage", "gea"], ["--advantage", "gae", "monte-carlo"]),
        (["--desired-kl", "0.01", "--anneal-lr"], ["--desired-kl", "--no-anneal-lr"]),
        (["--activation", "swish"], ["--activation", "silu"]),
        (["--activation", 1000 * "x"], ["--activation", "silu"]),
        (["--preset", "defalt"], ["--preset", "default", "article", "continuous"]),
        (["--device", "tpu"], ["--device", "cpu"]),
        (["--device", "cuda:99"], ["--device", "cuda:99", "cpu"]),
        (["--device", "cuda:²"], ["--device", "cuda:N"]),  # a digit, says Python
        (["--device", "cuda:01"], ["--device", "cuda:N"]),
        (["--device", "cuda:99999999999999999999"], ["--device", "cuda:N"]),
        # directories
        (["--resume", "nowhere"], ["--resume nowhere: there is no such directory"]),
        (["--resume", 300 * "x"], ["--resume xxx", "too long"]),
        (["--run-dir", ""], ["--run-dir", "name of a directory"]),  # as a shell's unset variable gives it
        (["--run-dir", "\ud800"], ["--run-dir", "name of a directory"]),  # half a letter
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_wrong_use(flags, named, tmp_path, monkeypatch, capsys):
    """Exit code 2, the flag and the nearest right values in one or two lines, and the working directory as it was."""
    modules, cwd = tmp_path / "modules", tmp_path / "cwd"
    modules.mkdir()
    cwd.mkdir()
    (modules / "broken_module.py").write_text("import no_such_dependency\n")
    (modules / "unparsable_module.py").write_text("def :\n")
    (modules / "crashing_module.py").write_text("1 / 0\n")
    (modules / "exiting_module.py").write_text("raise SystemExit(0)\n")
    monkeypatch.syspath_prepend(str(modules))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.chdir(cwd)
    assert console(flags) == 2
    error = lines_of(capsys)
    for word in named:
        assert word in error, error
    assert list(cwd.iterdir()) == []


def test_wrong_use_from_python(tmp_path, monkeypatch):
    """train() raises UsageError with the same message, and TrainConfig refuses before anything runs."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"--env-id 'CartPol-v1'.*CartPole-v1"):
        train(TrainConfig(env_id="CartPol-v1"))
    with pytest.raises(UsageError, match=r"--num-minibatches 7 does not divide.*5 or 8"):
        TrainConfig(num_envs=8, num_steps=100, num_minibatches=7)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("run_dir", ["file", "file/below", "file/far/below", "/proc/fastppo"])
def test_a_directory_that_cannot_be_written(run_dir, tmp_path, monkeypatch, capsys):
    """A file where the directory should be, or one above it, or a place where nothing can be made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert console([*TINY, "--run-dir", run_dir]) == 2
    error = lines_of(capsys)
    assert f"--run-dir {tmp_path / run_dir}" in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_directory_that_is_taken(tmp_path, capsys):
    """A directory that holds anything is refused, whatever it holds, and --resume is pointed out."""
    (tmp_path / "notes.txt").write_text("mine")
    assert console([*TINY, "--run-dir", str(tmp_path)]) == 2
    error = lines_of(capsys)
    assert f"--run-dir {tmp_path}" in error
    assert "--resume" in error
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# --- resuming


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run to copy and damage."""
    run_dir = tmp_path_factory.mktemp("errors") / "run"
    assert console([*TINY, "--run-dir", str(run_dir)]) == 0
    return run_dir


def checkpoints_of(run_dir):
    """All that a run could go on from."""
    return [run_dir / "checkpoints" / "last.pt", *(run_dir / "checkpoints").glob("iteration-*.pt")]


def each_checkpoint(damage):
    """Damage that leaves no other checkpoint to go on from."""

    def of_all(run_dir):
        for path in checkpoints_of(run_dir):
            damage(path)

    return of_all


def contents(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--cnn-size", "32"], ["--cnn-size", "32", "512", "its network was made with it"]),
        (["--hidden-sizes", "32"], ["--hidden-sizes"]),
        (["--env-id", "Acrobot-v1"], ["the observation is", "(6,)", "(4,)"]),
        (["--seed", "2"], ["--seed 2"]),
        (["--norm-obs"], ["--norm-obs"]),
        (["--preset", "article"], ["--preset"]),
        (["--run-dir", "elsewhere"], ["--run-dir"]),
        (["--num-minibatches", "3"], ["--num-minibatches 3"]),
        (["--frobnicate"], ["--frobnicate"]),
    ],
    ids=lambda value: value[0],
)
def test_resume_refuses_what_changes_the_run(flags, named, finished, capsys):
    """A flag that shapes what is learned cannot change half-way; it is named with the value that the run has."""
    before = contents(finished)
    assert console(["--resume", str(finished), *flags]) == 2
    error = lines_of(capsys)
    for word in named:
        assert word in error, error
    assert contents(finished) == before


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (each_checkpoint(Path.unlink), "last.pt"),
        (each_checkpoint(lambda path: path.write_bytes(b"")), "last.pt"),
        (each_checkpoint(lambda path: path.write_bytes(b"no checkpoint")), "last.pt"),
        (each_checkpoint(lambda path: os.truncate(path, 2000)), "last.pt"),
        (each_checkpoint(lambda path: torch.save([1, 2], path)), "last.pt"),
        (each_checkpoint(lambda path: torch.save({"format": 2}, path)), "last.pt"),
        (lambda run: (run / "config.json").unlink(), "config.json"),
        (lambda run: (run / "config.json").write_text("{"), "config.json"),
        (lambda run: (run / "config.json").write_text("[1]"), "config.json"),
        (lambda run: (run / "config.json").write_text('{"warp_factor": 9}'), "config.json"),
    ],
    ids=[
        "missing",
        "empty",
        "garbage",
        "cut",
        "list",
        "other-keys",
        "no-config",
        "cut-config",
        "list-config",
        "other-config",
    ],
)
def test_a_damaged_run_is_not_resumed(damage, named, finished, tmp_path, capsys):
    """The damaged file is named in one line, and nothing in the directory is touched."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    damage(run_dir)
    before = contents(run_dir)
    assert console(["--resume", str(run_dir), "--num-iterations", "5"]) == 2
    error = lines_of(capsys)
    assert named in error
    assert "--resume" in error or named == "last.pt"
    assert contents(run_dir) == before


class _Foreign:
    """Something whose unpickling runs code."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_nothing_in_a_checkpoint_is_executed(finished, tmp_path, monkeypatch, capsys):
    """A run directory from somebody else is data: what would run on unpickling is refused, by resuming and by evaluating."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, "run")
    for path in Path("run/checkpoints").iterdir():
        torch.save({"format": 2, "policy": _Foreign()}, path)
    assert console(["--resume", "run"]) == 2
    assert "last.pt" in lines_of(capsys)
    assert evaluate_console(["run"]) == 2
    assert "best.pt" in lines_of(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_resume_of_an_empty_directory(tmp_path, capsys):
    """Nothing to go on from: said so, nothing made."""
    assert console(["--resume", str(tmp_path)]) == 2
    assert f"--resume {tmp_path}" in lines_of(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags", [["nowhere"], [], ["nowhere", "--episodes", "0"], ["nowhere", "--episodes", "x"], ["nowhere", "--frobnicate"]]
)
def test_evaluating_wrongly(flags, tmp_path, monkeypatch, capsys):
    """The same manners for the other verb."""
    monkeypatch.chdir(tmp_path)
    assert evaluate_console(flags) == 2
    lines_of(capsys)
    assert list(tmp_path.iterdir()) == []


LONG = 300 * "x"


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", LONG],
        ["report", LONG],
        ["plot", LONG],
        ["export", LONG],
        ["import_sb3", LONG],
        ["import_sb3", "model.zip", "--output-dir", LONG],
        ["push", LONG, "owner/name"],
        ["train", "--preset", f"{LONG}/"],
        ["train", "--init-from", LONG, "--no-check-env", "--compile", "off"],
    ],
    ids=lambda words: " ".join(words).replace(LONG, "LONG"),
)
def test_a_name_that_is_too_long(words, tmp_path, monkeypatch, capsys):
    """A line and exit code 2 wherever a file or directory is named, no traceback."""
    monkeypatch.chdir(tmp_path)
    verb = importlib.import_module(f"fastppo.{words[0]}")
    assert verb.console(words[1:]) == 2
    assert LONG[:100] in lines_of(capsys)
    assert list(tmp_path.iterdir()) == []


# --- faults while training


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("obs", ["obs", "environment 2", "iteration 3", "step 6 "]),
        ("reward", ["reward", "environment 2", "iteration 3", "step 6 "]),
        ("raise", ["RuntimeError", "the wheel came off", "iteration 3", "step 6 "]),
    ],
)
def test_a_fault_in_an_environment(kind, named, tmp_path, capsys):
    """Exit code 3; key, environment and step of the fault (vector step 70 is step 6 of the third rollout of 32), and how to

    go on.
    """
    marker, run_dir = tmp_path / "marker", tmp_path / "run"
    marker.touch()
    kwargs = [f"kind={kind}", "index=2", "at=70", f"marker={marker}"]
    flags = [*UNCHECKED, "--env-id", "environments:FaultyVector-v0", "--run-dir", str(run_dir)]
    assert console([*flags, "--env-kwargs", *kwargs]) == 3
    error = lines_of(capsys)
    for word in named:
        assert word in error, error
    assert f"--resume {run_dir}" in error
    assert (run_dir / "fault.txt").exists()
    assert torch.load(run_dir / "checkpoints" / "last.pt", weights_only=True)["iteration"] == 2


def test_a_fault_of_many_lines(tmp_path, capsys):
    """An exception whose message has many lines is still told in one or two; all of it is in fault.txt."""
    marker, run_dir = tmp_path / "marker", tmp_path / "run"
    marker.touch()
    kwargs = ["kind=raise", "index=0", "at=3", f"marker={marker}", "lines=9"]
    flags = [*UNCHECKED, "--env-id", "environments:FaultyVector-v0", "--run-dir", str(run_dir)]
    assert console([*flags, "--env-kwargs", *kwargs]) == 3
    assert "the wheel came off" in lines_of(capsys)
    assert (run_dir / "fault.txt").read_text().count("and another line") >= 8


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize(("where", "named"), [("reset", "the wheel came off"), ("nan", "obs")])
@pytest.mark.parametrize(("flags", "code"), [(TINY, 2), (UNCHECKED, 3)], ids=["checked", "not checked"])
def test_a_fault_at_the_first_reset(flags, code, where, named, vectorization, tmp_path, capsys):
    """An environment that cannot even start is wrong use; a fault where nobody looked before. A line, no traceback."""
    flags = [*flags, "--env-id", "environments:Fragile-v0", "--env-kwargs", f"where={where}", "--vectorization", vectorization]
    assert console([*flags, "--run-dir", str(tmp_path / "run")]) == code
    error = lines_of(capsys)
    assert named in error
    assert "step -1" not in error
    assert (tmp_path / "run").exists() == (code == 3)


def test_numbers_that_run_away(tmp_path, capsys):
    """A step size that makes parameters or losses infinite is a fault, named, and the last checkpoint is finite."""
    run_dir = tmp_path / "run"
    assert console([*TINY, "--learning-rate", "1e30", "--max-grad-norm", "inf", "--run-dir", str(run_dir)]) == 3
    assert "not finite" in lines_of(capsys)
    weights = torch.load(run_dir / "checkpoints" / "last.pt", weights_only=True)["policy"]["weights"]
    assert all(weight.isfinite().all() for weight in weights.values())


# --- as a user sees it


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--env-id", "CartPol-v1"], 2),
        (["--num-minibatches", "7"], 2),
        ([*UNCHECKED, "--env-id", "environments:Fragile-v0", "--env-kwargs", "where=step"], 3),
    ],
    ids=["unknown environment", "batch", "fault"],
)
@pytest.mark.long
def test_in_a_process_of_its_own(flags, code, tmp_path):
    """The real exit code, and a real stderr of one or two lines with nothing from libraries in it."""
    done = subprocess.run(
        [sys.executable, "-m", "fastppo.train", *flags],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
    )
    assert done.returncode == code, done.stderr
    assert 1 <= len(done.stderr.splitlines()) <= 2, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert code != 2 or list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [["--num-env", "8"], ["--num-envs", "eight"]], ids=" ".join)
def test_on_a_terminal(flags, tmp_path):
    """Where most people see it, with colours and frames to be had: still one or two plain lines with the flag's name."""
    here, there = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "fastppo.train", *flags]
    process = subprocess.Popen(command, stdin=there, stdout=there, stderr=there, cwd=tmp_path, env=environment)
    os.close(there)
    shown = b""
    while True:
        try:
            part = os.read(here, 4096)
        except OSError:  # Linux's way of saying that the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(here)
    assert process.wait(timeout=600) == 2
    text = shown.decode()
    assert "--num-envs" in text
    assert 1 <= len(text.splitlines()) <= 2, text
    assert len(text) < 300, text
    assert "\x1b[" not in text
