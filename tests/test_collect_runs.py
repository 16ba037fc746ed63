"""Runs on environments on the device: resumed, evaluated, refused, faulty, and with an environment of one's own."""

import csv
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from environments import TAXI

from fastppo import TrainConfig, train
from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.envs.factory import EnvConfig, make_envs
from fastppo.evaluate import console as evaluate_console
from fastppo.rollout.collector import start_collector
from fastppo.rollout.step_collector import TensorCollector
from fastppo.train import console
from support.device_envs import CPU, N, Spoilt, setup
from support.pages import command_in, python_in, section

TINY = ["--num-envs", "4", "--num-steps", "32", "--num-iterations", "3", "--eval-episodes", "4", "--plain"]
ON_DEVICE = [*TINY, "--backend", "torch", "--compile", "off"]
TIMES = {"seconds", "sps", "env_share", "act_share", "learn_share"}


def rows_of(run_dir):
    with (Path(run_dir) / "metrics.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(file)]


def summary_of(run_dir):
    return json.loads((Path(run_dir) / "summary.json").read_text())


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
@pytest.mark.long
def test_a_run_resumed_and_evaluated(env_id, tmp_path, capsys):
    """From the command line: what the run says of itself, two equal runs, its continuation, its evaluation."""
    runs = [tmp_path / "one", tmp_path / "two"]
    for run_dir in runs:
        assert console([*ON_DEVICE, "--env-id", env_id, "--run-dir", str(run_dir)]) == 0
        assert f"{env_id}: 4 environments, torch (as --backend torch asks)" in capsys.readouterr().out
    assert rows_of(runs[0]) == rows_of(runs[1])
    summary = summary_of(runs[0])
    assert (summary["backend"], summary["tier"]) == ("torch", "eager")
    assert summary["eval_episodes"] == 4
    assert summary["global_step"] == int(rows_of(runs[0])[-1]["global_step"])

    assert console(["--resume", str(runs[0]), "--num-iterations", "5"]) == 0
    assert "the environments continue where they were" in capsys.readouterr().out
    rows = rows_of(runs[0])
    assert [row["iteration"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert rows[:3] == rows_of(runs[1])
    assert evaluate_console([str(runs[0]), "--episodes", "3"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["episodes"] == 3


def test_both_engines_make_the_same_run(tmp_path):
    """An environment registered as a TorchVectorEnv: --backend auto collects on the device, gymnasium steps it from Python.

    Equal metrics, episode statistics included: the collectors differ in speed only.
    """
    settings = {"env_id": "Pushed-v0", "env_kwargs": {"max_episode_steps": 20}, "num_envs": 4, "num_steps": 32}
    settings |= {
        "num_iterations": 3,
        "eval_episodes": 2,
        "compile": "off",
        "plain": True,
        "norm_obs": True,
        "norm_reward": True,
    }
    runs = {}
    for backend in ("auto", "torch", "gymnasium"):
        result = train(TrainConfig(backend=backend, run_dir=str(tmp_path / backend), **settings))
        runs[backend] = (rows_of(result.run_dir), result.summary["eval_return_mean"])
        assert result.summary["backend"] == ("gymnasium/entry-point" if backend == "gymnasium" else "torch")
    assert runs["auto"] == runs["torch"] == runs["gymnasium"]


def test_gymnasiums_engine_steps_from_python():
    """--backend gymnasium gives a TensorCollector even for a class that could be collected on the device."""
    envs = AutoresetEnvs(make_envs(EnvConfig("Pushed-v0", N, backend="gymnasium"), CPU))
    ours = setup(Spoilt())
    assert isinstance(start_collector(envs, ours.rollout(), ours.obs, ours.spec, seed=0), TensorCollector)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--backend", "torch", "--env-id", "CartPole-v9"], ["--env-id 'CartPole-v9'", "CartPole-v1"]),
        (["--backend", "torch", "--env-id", "Taxi-v9"], ["--env-id 'Taxi-v9'", TAXI]),
        (["--backend", "torch", "--env-id", TAXI], [f"--backend torch has no {TAXI}", "CartPole-v1", "environments.md"]),
        (
            ["--backend", "torch", "--env-id", "LunarLander-v3"],
            ["--backend torch has no LunarLander-v3", "CartPole-v1", "environments.md"],
        ),
        (["--backend", "nonsense"], ["--backend", "nonsense", "auto", "gymnasium", "torch"]),
        (["--backend", "torch", "--vectorization", "sync"], ["--vectorization sync", "--backend gymnasium"]),
        (["--backend", "torch", "--env-kwargs", "gravity=3"], ["--env-kwargs", "gravity"]),
        (["--backend", "torch", "--env-kwargs", "max_episode_steps=0"], ["max_episode_steps", "from 1 on"]),
    ],
    ids=lambda value: " ".join(value[1:]) if value[0].startswith("--") else "",
)
def test_wrong_use(flags, named, tmp_path, monkeypatch, capsys):
    """Exit code 2, one or two lines with the flag and the right values, nothing written."""
    monkeypatch.chdir(tmp_path)
    assert console(flags) == 2
    error = capsys.readouterr().err
    assert 1 <= len(error.splitlines()) <= 2, error
    for word in named:
        assert word in error, error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["reward", "obs"])
def test_a_number_that_is_not_finite_ends_the_run(what, tmp_path, capsys):
    """Exit code 3; key, environment and step (the 41st is step 8 of the second rollout of 32), and the checkpoint before it."""
    run_dir = tmp_path / "run"
    flags = ["--env-id", "Faulty-v0", "--env-kwargs", f"what={what}", "--run-dir", str(run_dir)]
    assert console([*ON_DEVICE, *flags]) == 3
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 2, error
    how = {"reward": "not finite (nan)", "obs": "infinite or too large for float32 (inf)"}[what]
    assert error.startswith(f"fault: iteration 2: {what} of environment 2 is {how} after step 8 of the rollout"), error
    assert "after step 8 of the rollout, action " in error
    assert f"--resume {run_dir}" in error
    assert torch.load(run_dir / "checkpoints" / "last.pt", weights_only=True)["iteration"] == 1


@pytest.mark.long
def test_the_pages_environment_learns(tmp_path):
    """The example of docs/environments.md: under 40 lines, run by the command given, better within a few seconds."""
    text = section("docs/environments.md", "Your own environment on the device")
    module, command = python_in(text), shlex.split(command_in(text))
    assert len(module.splitlines()) < 40
    assert command[1:3] == ["-m", "fastppo.train"]
    (tmp_path / "reach.py").write_text(module)
    command = [sys.executable, *command[1:], "--total-timesteps", "40000", "--compile", "off", "--eval-episodes", "0"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, "--run-dir", "run"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert summary_of(tmp_path / "run")["backend"] == "torch"
    returns = [float(row["episodic_return_mean"]) for row in rows_of(tmp_path / "run")]
    assert returns[-1] > 0.5 * returns[1]  # both negative; the first rollout has seen the end of short episodes only
