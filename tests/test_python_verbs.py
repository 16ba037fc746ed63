"""evaluate, plot and export as functions of the package, and what an interrupted call of `train` leaves."""

import importlib
import json
import os
import shutil
import signal
import sys
from functools import partial
from types import FunctionType, ModuleType

import gymnasium as gym
import numpy as np
import pytest

import fastppo
from fastppo import TrainConfig, UsageError, View, evaluate, export, load_policy, load_preset, plot, preset_for, train
from fastppo.analysis.report_page import report_page
from fastppo.errors import Interrupted
from fastppo.evaluate import console as evaluate_console
from fastppo.run.checkpoint_file import load_checkpoint
from fastppo.sb3.archive import read_model
from support.pages import python_in, section

SHORT = {"num_iterations": 3, "num_steps": 32, "num_envs": 2, "eval_episodes": 0, "compile": "off", "check_env": False}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A short run."""
    return train(TrainConfig(), run_dir=str(tmp_path_factory.mktemp("functions") / "run"), **SHORT)


def test_evaluate(result, capsys):
    """The numbers are those of the verb; a run is named by its directory or by what train returned."""
    played = evaluate(result, 3, seed=5)
    assert "evaluating for 3 episodes" in capsys.readouterr().out
    assert evaluate_console([str(result.run_dir), "--episodes", "3", "--seed", "5"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == played
    assert evaluate(str(result.run_dir), 3, seed=5, verbose=False) == played
    assert capsys.readouterr().out == ""
    env = gym.make("CartPole-v1", max_episode_steps=2)
    assert evaluate(result, 3, envs=[env], verbose=False)["return_mean"] == 2.0
    assert evaluate(result, 3, envs=lambda: gym.make("CartPole-v1", max_episode_steps=3), verbose=False)["return_mean"] == 3.0
    assert env.reset()[0].shape == (4,)  # left open


def test_the_pages_example(result, tmp_path, monkeypatch):
    """The figure is shown by notebooks, and written where a file is named."""
    monkeypatch.chdir(tmp_path)
    names = {"result": result}
    exec(python_in(section("docs/python.md", "Evaluate, plot, export")), names)
    assert names["played"]["episodes"] == 10
    assert len(names["figure"].axes) == 2
    assert names["figure"]._repr_png_().startswith(b"\x89PNG")
    assert (tmp_path / "entropy.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda run: evaluate("nowhere"), "nowhere"),
        (lambda run: evaluate(run, 0), "episodes must be at least 1"),
        (lambda run: evaluate(run, 2.5), "episodes and --seed must be whole numbers, got 2.5 and 0"),
        (lambda run: evaluate(run, "3"), "must be whole numbers, got '3' and 0"),
        (lambda run: evaluate(run, True), "must be whole numbers, got True and 0"),
        (lambda run: evaluate(run, seed=1.5), "must be whole numbers, got 20 and 1.5"),
        (lambda run: evaluate(5), "RUN_DIR must be a path, got 5"),
        (lambda run: plot([]), "runs is an empty list"),
        (lambda run: load_policy(run.run_dir, device="foo"), r"device 'foo': RuntimeError: Expected one of .*nearest: cpu"),
        (lambda run: load_policy(run.run_dir, device="meta"), "device meta: policies run on cpu, cuda, mps and xpu"),
        (lambda run: load_policy(5), "run_dir must be a path, got 5"),
        (lambda run: train(env_id=5), "env-id must be a text, got 5"),
        (lambda run: preset_for(preset=5), "preset must be a text, got 5"),
        (lambda run: train(resume=5), "resume must be a path, got 5"),
        (lambda run: train(env_fn="CartPole-v1"), "env_fn must be a function that makes an environment, got 'CartPole-v1'"),
        (lambda run: evaluate(run, checkpoint="first"), 'checkpoint must be "best" or "last"'),
        (lambda run: plot("nowhere"), "nowhere"),
        (lambda run: plot(run, metric="entropi"), "metric entropi is no column of metrics.csv; nearest: entropy"),
        (lambda run: plot(run, output="nowhere/a.png"), "output nowhere/a.png: there is no directory nowhere"),
        (lambda run: plot(run, output="."), "output . is a directory; nearest: --output curves.png"),
        (lambda run: plot(run, output="a.xyz"), "output a.xyz cannot be written: .*png"),
        (lambda run: export(run, "a.onnx", "torch"), "format torch writes a .pt2 file"),
        (lambda run: export(run, format="keras"), "format must be"),
        (lambda run: evaluate(), "which run"),
    ],
)
def test_wrong_use(call, says, result, tmp_path, monkeypatch):
    """One line that names the argument."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=says):
        call(result)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="Windows has other rights")
def test_a_run_of_somebody_else(result, tmp_path):
    """What may not be read is said in a line that names it, whoever asks."""
    shutil.copytree(result.run_dir, tmp_path / "private/run")
    run = tmp_path / "private/run"
    calls = [load_policy, evaluate, plot, load_preset, read_model, partial(report_page, setting_texts={})]
    calls.append(lambda run: load_checkpoint(run / "checkpoints/best.pt"))
    me = os.geteuid()
    run.parent.chmod(0)
    os.seteuid(me or 65534)  # root may read all
    try:
        for call in calls:
            with pytest.raises(UsageError, match=rf"{run}.* cannot be read.*Permission denied"):
                call(run)
    finally:
        os.seteuid(me)
        run.parent.chmod(0o700)


def test_a_picture_is_replaced_in_one_step(result, tmp_path):
    """As the command line does it: a link is replaced, not followed, so an old picture is there until the new one is."""
    (tmp_path / "mine").write_text("kept")
    (tmp_path / "a.png").symlink_to("mine")
    plot(result, output=tmp_path / "a")  # without an ending: .png
    assert (tmp_path / "mine").read_text() == "kept"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_names_stay_functions():
    """Importing the module of a verb does not put it in the place of the function; its own names can be imported."""
    for name in ("evaluate", "export", "plot", "train"):
        assert isinstance(importlib.import_module(f"fastppo.{name}"), ModuleType)
        assert isinstance(getattr(fastppo, name), FunctionType)
    assert all(hasattr(fastppo, name) for name in fastppo.__all__)


def interrupt(run: View) -> None:
    if run.iteration == 2:
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("has_prompt", [True, False])
def test_an_interrupted_call(has_prompt, tmp_path, monkeypatch):
    """At a prompt or in a notebook it returns what was trained; a script ends, and finds that in the exception."""
    monkeypatch.delattr(sys, "ps1", raising=False)
    settings = SHORT | {"num_iterations": 50, "callbacks": [interrupt], "run_dir": str(tmp_path / "run")}
    if has_prompt:
        monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
        result = train(TrainConfig(), **settings)
    else:
        with pytest.raises(KeyboardInterrupt) as caught:
            train(TrainConfig(), **settings)
        assert isinstance(caught.value, Interrupted)
        result = caught.value.result
    assert (result.summary["iterations"], result.summary["stopped_by"]) == (2, "SIGINT")
    obs = np.zeros((1, 4), np.float32)
    np.testing.assert_array_equal(result.policy.act(obs), load_policy(result.run_dir).act(obs))


def test_resume_takes_the_runs_settings(result, tmp_path):
    """train(resume=...) goes on with what the run was trained with, as --resume does; environments may be others that fit."""
    run = tmp_path / "run"
    shutil.copytree(result.run_dir, run)
    resumed = train(resume=run, num_iterations=4, learning_rate=1e-4)  # 2 environments and 32 steps are the run's
    config = TrainConfig.from_json(run / "config.json")
    assert (resumed.summary["iterations"], config.num_envs, config.num_steps, config.learning_rate) == (4, 2, 32, 1e-4)
    short = train("CartPole-v0", resume=run, num_iterations=5)
    assert (short.summary["iterations"], TrainConfig.from_json(run / "config.json").env_id) == (5, "CartPole-v0")
    given = train(resume=run, num_iterations=6, envs=[gym.make("CartPole-v1")])
    assert given.summary["iterations"] == 6
    for settings, says in (
        ({"resume": run, "hidden_sizes": (8,)}, "its network was made with it"),
        ({"resume": "nowhere"}, "resume nowhere: there is no such directory"),
        ({"resume": run, "env_id": "Acrobot-v1"}, "so its network does not fit"),
    ):
        with pytest.raises(UsageError, match=says):
            train(**settings)
