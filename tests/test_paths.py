"""Relative paths are those of the directory in which a command was started, wherever the code of an environment goes."""

import os
import sys
from pathlib import Path

import gymnasium as gym
import pytest
from environments import Wandering

from fastppo import Callback, TrainConfig, UsageError, train
from fastppo.compile.library_cache import cache_dir
from fastppo.evaluate import console as evaluate
from fastppo.given_settings import default_runs, with_absolute_paths
from fastppo.sweep import console as sweep
from fastppo.system.paths import absolute
from fastppo.train import console

FLAGS = ["--num-envs", "2", "--num-steps", "16", "--num-iterations", "2", "--eval-episodes", "1", "--compile", "off", "--plain"]
MODULE = """
import os
from pathlib import Path
import gymnasium as gym
from environments import Wandering
os.chdir(Path(__file__).parent / "elsewhere")
gym.register("Wandering-v0", entry_point=Wandering, kwargs={"to": None})
"""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The current directory is `tmp_path`, and there is another to go to."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "elsewhere"


@pytest.fixture
def wanders_at_import(elsewhere, monkeypatch):
    """A module that goes elsewhere when it is imported, as it is again after each call of this."""
    (elsewhere.parent / "wandering_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(elsewhere.parent)

    def start_anew():
        os.chdir(elsewhere.parent)
        sys.modules.pop("wandering_module", None)
        gym.registry.pop("Wandering-v0", None)

    yield start_anew
    start_anew()


@pytest.mark.long
def test_the_command_line(wanders_at_import, elsewhere):
    """--run-dir, its default, --resume, RUN_DIR of evaluate and videos; the module goes elsewhere when it is imported."""
    env = ["--env-id", "wandering_module:Wandering-v0"]
    for verb, args in (
        (console, [*env, *FLAGS, "--run-dir", "out/run"]),
        (console, [*env, *FLAGS]),
        (console, ["--resume", "out/run", "--num-iterations", "3"]),
        (console, ["--resume=./out/run", "--run-dir=out/run", "--num-iterations", "4"]),
        (evaluate, ["out/run", "--episodes", "1", "--video", "gif"]),
    ):
        wanders_at_import()
        assert verb(args) == 0
        assert Path.cwd() == elsewhere  # theirs to choose
    assert list(elsewhere.iterdir()) == []
    run = elsewhere.parent / "out" / "run"
    assert TrainConfig.from_json(run / "config.json").run_dir == str(run)
    assert len(list((run / "videos").iterdir())) == 1
    (unnamed,) = (elsewhere.parent / "runs").iterdir()
    assert (unnamed / "summary.json").exists()


def test_a_sweep(wanders_at_import, elsewhere, monkeypatch):
    """Its study lies where it was started, and its trials start there too: that is where they find the module."""

    class Started(Exception):
        pass

    def process(module, args, output, place):
        raise Started(output, place)

    monkeypatch.setattr("fastppo.analysis.sweep_trial.TrainingProcess", process)
    wanders_at_import()
    with pytest.raises(Started) as started:
        sweep(["--env-id", "wandering_module:Wandering-v0", "--steps", "64", "--trials", "1"])
    output, place = started.value.args
    assert place == elsewhere.parent
    assert output.is_relative_to(elsewhere.parent / "sweeps")
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("settings", [{}, {"num_seeds": 2}])
@pytest.mark.parametrize("run_dir", [None, "out"])
def test_from_python(elsewhere, run_dir, settings):
    """The environment goes elsewhere when it is made and in each of its calls, a callback too; one and several seeds."""

    class Wanders(Callback):
        def on_iteration(self, run):
            os.chdir(elsewhere)
            assert run.run_dir.is_absolute()

    gym.register("WanderingAlways-v0", entry_point=Wandering)
    try:
        config = TrainConfig(
            env_id="WanderingAlways-v0",
            env_kwargs={"to": str(elsewhere)},
            run_dir=run_dir,
            num_envs=2,
            num_steps=16,
            num_iterations=2,
            eval_episodes=1,
            compile="off",
            plain=True,
            **settings,
        )
        result = train(config, callbacks=[Wanders()])
    finally:
        del gym.registry["WanderingAlways-v0"]
    assert result.run_dir.parent == elsewhere.parent / ("runs" if run_dir is None else "")
    assert (result.run_dir / "summary.json").exists()
    assert list(elsewhere.iterdir()) == []


def test_a_current_directory_that_has_been_deleted(tmp_path, monkeypatch):
    """One line where a path is relative; absolute ones are as they were."""
    named = TrainConfig(run_dir=str(tmp_path / "run"))
    assert with_absolute_paths(named, None) == named
    assert absolute(tmp_path, "--run-dir", None) == tmp_path
    default_runs(named, None)
    for config in (TrainConfig(), TrainConfig(run_dir="run"), TrainConfig(resume="run")):
        with pytest.raises(
            UsageError,
            match=r"^--(run-dir|resume) runs?: the working directory has been deleted; change to another one, or give an abs",
        ):
            default_runs(with_absolute_paths(config, None), None)


def test_a_cache_that_is_not_absolute(tmp_path, monkeypatch):
    """The standard behind XDG_CACHE_HOME has relative paths ignored: environments change what they are relative to."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert cache_dir() == tmp_path / ".cache" / "fastppo"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_dir() == tmp_path / "cache" / "fastppo"
