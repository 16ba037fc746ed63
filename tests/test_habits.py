"""What people type first: no directory, 1e5 steps, another trainer's flags, a run as a preset, a run that is complete."""

import csv
import os
import shutil
from dataclasses import fields

import pytest

from fastppo import train
from fastppo.__main__ import console
from fastppo.bounds import flag
from fastppo.cli import parse_train
from fastppo.config import TrainConfig
from fastppo.errors import UsageError
from fastppo.given_settings import HABITS
from fastppo.system.text import whole_number

TINY = ["--num-envs", "2", "--num-steps", "16", "--num-minibatches", "2", "--hidden-sizes", "8", "--eval-episodes", "0"]
TINY += ["--compile", "off", "--plain"]


@pytest.fixture(scope="module")
def trained_runs(tmp_path_factory):
    """A directory with runs/old and runs/new; it must not be changed."""
    place = tmp_path_factory.mktemp("habits")
    for name, seed in (("old", "3"), ("new", "4")):
        run_dir = str(place / "runs" / name)
        assert console(["train", "--total-timesteps", "64", "--seed", seed, "--run-dir", run_dir, *TINY]) == 0
    os.utime(place / "runs" / "old" / "config.json", (1e9, 1e9))
    return place


@pytest.fixture
def here(trained_runs, tmp_path, monkeypatch):
    """A copy of it as the working directory."""
    shutil.copytree(trained_runs / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def columns(run_dir):
    """metrics.csv without the columns that hold times."""
    with (run_dir / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows
    timed = ("seconds", "sps", "env_share", "act_share", "learn_share")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def test_a_flag_of_three_answers():
    """--rescale-action and --no-rescale-action need no value, and take one."""
    for args, value in (
        ([], None),
        (["--rescale-action"], True),
        (["--no-rescale-action", "--seed", "3"], False),
        (["--rescale_action", "--seed", "3"], True),
        (["--rescale-action", "None"], None),
        (["--rescale-action=False"], False),
    ):
        assert parse_train(["--env-id", "Pendulum-v1", *args]).rescale_action is value


@pytest.mark.parametrize(
    ("verb", "made"),
    [
        (["evaluate", "--episodes", "1"], None),
        (["report"], "runs/new/report.html"),
        (["plot"], "curves-CartPole-v1.png"),
        (["export", "--format", "torch"], "runs/new/policy.pt2"),
    ],
)
@pytest.mark.long
def test_without_a_directory_the_newest_run_is_taken(here, capsys, verb, made):
    """Of those in runs/, and it is named."""
    assert console(verb) == 0
    assert f"the newest run: {os.path.join('runs', 'new')}\n" in capsys.readouterr().out
    assert made is None or (here / made).stat().st_size > 0
    assert not (here / "runs/old/report.html").exists()


@pytest.mark.parametrize("verb", ["evaluate", "report", "plot", "export"])
def test_without_any_run(verb, tmp_path, monkeypatch, capsys):
    """One line that says where it looked; nothing is written."""
    monkeypatch.chdir(tmp_path)
    assert console([verb]) == 2
    assert capsys.readouterr().err == "error: which run? There is none in runs/ here: give RUN_DIR\n"
    assert list(tmp_path.iterdir()) == []


def test_resume_without_a_directory(here, monkeypatch, capsys):
    """The newest run goes on; the last line tells the speed of this process apart from the steps of the run."""
    monkeypatch.setattr("fastppo.training.ends.shows_windows", lambda: True)
    assert console(["train", "--resume", "--total-timesteps", "128"]) == 0
    out = capsys.readouterr().out
    assert "the newest run: " in out
    assert "steps/s since it was resumed; results in" in out.splitlines()[-2]
    assert out.splitlines()[-1] == f"to watch it: python -m fastppo.evaluate {here / 'runs/new'} --render human"
    assert int(columns(here / "runs/new")[-1]["global_step"]) >= 128
    assert int(columns(here / "runs/old")[-1]["global_step"]) < 128


@pytest.mark.parametrize(
    ("flags", "least", "most"), [(["--quiet"], 0, 0), (["--verbose", "0"], 0, 0), ([], 5, 9), (["--verbose"], 7, 11)], ids=str
)
def test_how_much_is_printed(flags, least, most, tmp_path, capsys):
    """Nothing, at most five lines before the first iteration, or also what can be reproduced."""
    assert console(["train", *TINY, "--num-iterations", "1", "--run-dir", str(tmp_path / "run"), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert least <= len(lines) <= most, lines
    before = lines[: next((number for number, line in enumerate(lines) if " it 1 " in line), 0)]
    assert len(before) <= (5 if flags != ["--verbose"] else 7)
    assert any(line.startswith("same seed: ") for line in lines) is (flags == ["--verbose"])


def test_a_complete_run_says_so(here, capsys):
    """Instead of "0 steps/s"; a run that was not resumed never says it."""
    assert console(["train", "--resume", "runs/old"]) == 0
    last = capsys.readouterr().out.splitlines()[-2]
    steps = columns(here / "runs/old")[-1]["global_step"]
    assert last.startswith(f"nothing left to train: the run has all its {steps} steps (--total-timesteps")
    assert "steps/s" not in last


@pytest.mark.parametrize("preset", ["runs/old", "runs/old/config.json"])
def test_a_run_is_a_preset_that_repeats_it(here, preset):
    """The same numbers in a new directory; other flags override its settings."""
    assert console(["train", "--preset", preset, "--run-dir", "again"]) == 0
    assert columns(here / "again") == columns(here / "runs/old")
    before, after = (TrainConfig.from_json(here / name / "config.json") for name in ("runs/old", "again"))
    assert (after.seed, after.num_steps, after.preset) == (before.seed, before.num_steps, preset)
    assert console(["train", "--preset", preset, "--run-dir", "other", "--seed", "5"]) == 0
    assert columns(here / "other") != columns(here / "runs/old")


@pytest.mark.parametrize(
    ("preset", "words"),
    [
        ("runs/older", "runs/older cannot be read"),
        ("runs", "config.json cannot be read"),
        ("runz", "--preset must be a name, a .json or .yml file or a run"),
    ],
)
def test_a_run_that_is_none(here, capsys, preset, words):
    """One line, exit code 2."""
    assert console(["train", "--preset", preset]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("100000", 100_000),
        ("1e5", 100_000),
        ("100_000", 100_000),
        ("100k", 100_000),
        ("0.1M", 100_000),
        ("1.5e3", 1500),
        ("10M", 10_000_000),
        ("2G", 2_000_000_000),
        ("2b", 2_000_000_000),
        ("-3", -3),
        ("0", 0),
        ("12345678901234567891", 12345678901234567891),
    ],
)
def test_whole_numbers(text, number):
    """As people write them, exactly."""
    assert whole_number(text) == number


@pytest.mark.parametrize(
    "text", ["", "k", "1.5", "1e-3", "0.0001k", "1__0", "1 000", "1,000", "1e", "x", "1e999", "nan", "٣", "_1", "1kk"]
)
def test_no_whole_numbers(text):
    """Each is refused in words."""
    with pytest.raises(ValueError, match="is not a whole number"):
        whole_number(text)


def test_flags_take_such_numbers(tmp_path, capsys):
    """All flags for whole numbers; a wrong one names the flag."""
    assert console(["train", "--total-timesteps", "0.06k", "--run-dir", str(tmp_path / "a"), *TINY]) == 0
    assert TrainConfig.from_json(tmp_path / "a" / "config.json").total_timesteps == 60
    assert console(["train", "--total-timesteps", "4x", *TINY]) == 2
    error = capsys.readouterr().err
    assert "--total-timesteps: '4x' is not a whole number such as 100000, 1e5, 100k or 10M" in error


@pytest.mark.parametrize(
    ("flags", "ours"),
    [
        (["--env", "CartPole-v1"], "--env-id"),
        (["--gym_id=CartPole-v1"], "--env-id"),
        (["--lr", "1e-3"], "--learning-rate"),
        (["--n_steps", "5"], "--num-steps"),
        (["--n-epochs", "5"], "--update-epochs"),
        (["--batch-size", "5"], "--minibatch-size"),
        (["--use-sde"], "--action-distribution"),
    ],
)
def test_flags_of_other_trainers(flags, ours, capsys):
    """The hint is the flag that means the same here, not the one that is spelled alike."""
    assert console(["train", *flags]) == 2
    error = capsys.readouterr().err
    assert f"here it is {ours} " in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--track", "wandb", "--cnn-sise", "5"],  # a flag that is ours, beside a wrong one
        ["train", "--run-dir", "--lr"],  # a value
        ["evaluate", "runs/a", "--env", "CartPole-v1"],  # a verb without such a flag
    ],
)
def test_other_words_are_no_habits(command, capsys):
    """The hint is for a flag that is not known, and names one that the verb has."""
    assert console(command) == 2
    assert "here it is" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["train", "CartPole-v1"], "Unrecognized options: CartPole-v1; an environment is given as --env-id CartPole-v1 ("),
        (["train", "--learning-rate", "lin_0.001"], "--learning-rate: 'lin_0.001' is not a number ("),
        (["train", "--hidden-sizes", "64,64"], "--hidden-sizes: '64,64': write whole numbers as 64 64 ("),
        (["train", "--env-id", "Pendulum"], "--env-id 'Pendulum' is not registered; nearest: Pendulum-v1\n"),
        (["evaluate", "runs/old/checkpoints/last.pt"], "last.pt is a file: give the directory of its run\n"),
        (["export", "runs/old", "policy.onnx"], "Unrecognized options: policy.onnx; a file is given as --output policy.onnx ("),
        (["train", "--ent", "0.1"], "Unrecognized options: --ent, 0.1; nearest: --ent-coef"),
        (["train", "--checkpoint-every=5"], "; nearest: --checkpoint-seconds, --checkpoint-iterations ("),
        (["train", "--num_epoch", "5"], "; nearest: --num-steps, --update-epochs ("),
        (["import-sb3", "a.zip", "--run-dir", "b"], "Unrecognized options: --run-dir, b; here it is --output-dir ("),
    ],
)
def test_what_to_type_instead(here, command, told, capsys):
    """An environment without a flag, a schedule of the zoo, a checkpoint's file: one line."""
    assert console(command) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("name", "ours"), [("lr", "learning_rate"), ("n_steps", "num_steps"), ("clip_range", "clip_coef")])
def test_arguments_of_other_trainers(name, ours):
    """In Python the hint is the argument that means the same."""
    with pytest.raises(UsageError, match=f"there is no setting '{name}'; here it is {ours}$"):
        train("CartPole-v1", **{name: 0.1})


def test_a_whole_number_that_is_a_float():
    """total_timesteps=1e5, as other trainers take it: what to write is said."""
    with pytest.raises(UsageError, match=r"--total-timesteps must be a whole number .*, got 100000\.0: write 100000$"):
        train("CartPole-v1", total_timesteps=1e5)


def test_hints_are_flags():
    """Each hint is a flag of training, and no flag is explained by another one."""
    flags = {flag(spec.name) for spec in fields(TrainConfig)}
    assert set(HABITS.values()) <= flags
    assert not flags & set(HABITS)


def test_version(capsys):
    """That of the installed package."""
    assert console(["--version"]) == 0
    assert capsys.readouterr().out.startswith("fastppo 0.")
