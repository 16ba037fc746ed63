"""Simulators of tensors: recognised by their signatures, stepped without numpy, their ends told apart."""

import numpy as np
import pytest
import torch

from fastppo import TrainConfig, train
from fastppo.__main__ import console
from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.envs.factory import EnvConfig, make_envs
from fastppo.envs.simulators import as_vector_env
from fastppo.run.metrics_file import read_rows
from support.runs import tiny
from support.simulators import Genesis, IsaacLab, RslRl, install_maniskill, make_maniskill

MODULE = "support.simulators"
OWN_FINAL_OBS = ("make_base", "make_maniskill")  # ManiSkill's, which returns the final observation
ALL = ["make_isaac", "make_wrapped", "RslRl", "Genesis", *OWN_FINAL_OBS]


@pytest.fixture(autouse=True)
def _maniskill(monkeypatch):
    install_maniskill(monkeypatch)


@pytest.mark.parametrize("name", ALL)
def test_steps_by_hand(name):
    """Environment 0 goes beyond 1 in step 3, environment 1 stands still until its time is over in step 5."""
    envs = AutoresetEnvs(make_envs(EnvConfig(f"{MODULE}:{name}", 2)))
    assert isinstance(envs.reset(1), torch.Tensor)
    action = torch.tensor([[0.375], [0.0]])
    seen = []
    for _ in range(5):
        step = envs.step(action)
        seen.append((step.obs.tolist(), step.reward.tolist(), step.terminated.tolist(), step.truncated.tolist()))
        finals = step.final_obs.tolist()
        if step.terminated[0]:
            assert seen[-1] == ([[0.0, 0.0], [0.0, 3.0]], [1.0, 0.0], [True, False], [False, False])
    obs, reward, terminated, truncated = seen[-1]
    assert (obs, reward, terminated, truncated) == ([[0.75, 2.0], [0.0, 0.0]], [0.0, 0.0], [False, False], [False, True])
    assert finals[1] == ([0.0, 5.0] if name in OWN_FINAL_OBS else [0.0, 4.0])  # else what was acted on, as rsl_rl bootstraps


@pytest.mark.parametrize("name", ALL)
def test_they_train(name, tmp_path, monkeypatch):
    """Tensors are not turned into arrays of the environment's; episodes of at most 5 steps; it is found again by evaluate."""
    result = train(tiny(tmp_path / "run", env_id=f"{MODULE}:{name}", num_envs=4, num_iterations=3, eval_episodes=4))
    row = read_rows(result.run_dir / "metrics.csv")[-1]
    assert 1 <= float(row["episodic_length_mean"]) <= 5
    assert int(row["terminations"]) + int(row["truncations"]) > 0
    assert int(row["global_step"]) == 3 * 4 * 16  # no row only resets
    assert result.summary["eval_episodes"] == 4
    assert TrainConfig.from_json(result.run_dir / "config.json").autoreset == "auto"


@pytest.mark.parametrize("make", [IsaacLab, RslRl, Genesis, make_maniskill])
def test_from_python(make, tmp_path):
    """By env_fn, and as an object of one's own, which is left open."""
    train(tiny(tmp_path / "fn", num_envs=4, num_iterations=1), env_fn=lambda num_envs: make(num_envs))
    own = make(4)
    result = train(tiny(tmp_path / "own", num_envs=4, num_iterations=2, eval_episodes=2), envs=own)
    assert result.summary["eval_episodes"] == 2
    assert not getattr(own, "closed", False)


def test_going_up_is_learned(tmp_path):
    """What is paid is at the top: nearly all episodes end there."""
    settings = {"env_id": f"{MODULE}:Uphill", "num_envs": 16, "num_steps": 16, "num_iterations": 20, "learning_rate": 0.003}
    settings |= {"num_minibatches": 4, "update_epochs": 2}
    train(tiny(tmp_path / "run", **settings))
    rows = read_rows(tmp_path / "run" / "metrics.csv")
    first, last = (
        int(row["terminations"]) / (int(row["terminations"]) + int(row["truncations"])) for row in (rows[0], rows[-1])
    )
    assert last > 0.9 > first


def test_what_reaches_the_simulator():
    """The seed, and the end."""
    isaac = IsaacLab(2)
    envs = as_vector_env(isaac)
    envs.reset(seed=7)
    assert isaac.seeded == 7
    envs.close()
    assert isaac.world.closed
    genesis = Genesis(2)
    genesis.seed = lambda seed: setattr(genesis, "seeded", seed)
    as_vector_env(genesis).reset(seed=8)
    assert genesis.seeded == 8


def test_without_time_outs_every_end_terminates():
    """rsl_rl's key is left out for tasks that really end with their time."""
    envs = AutoresetEnvs(as_vector_env(RslRl(1, time_outs=False)))
    envs.reset(None)
    for _ in range(5):
        step = envs.step(torch.zeros(1, 1))
    assert (step.terminated.tolist(), step.truncated.tolist()) == ([True], [False])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("make_of_four", "it returned 4 environments at once: give the function an argument num_envs"),
        ("make_groups", "its observations are groups (camera, proprioception): the one to train on has to be called policy"),
        ("make_maniskill --env-kwargs auto_reset=false", "ManiSkillVectorEnv was made with auto_reset=False"),
        ("World", "it returned a support.simulators.World, not a gymnasium VectorEnv"),
    ],
)
def test_mistakes(name, message, tmp_path, capsys):
    """One line, exit code 2, nothing written."""
    flags = ["--env-id", *f"{MODULE}:{name}".split(), "--run-dir", str(tmp_path / "run"), "--plain"]
    assert console(["train", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()


def test_others_stay_as_they_are():
    """Objects that are no simulators."""
    for other in (None, 3, np.zeros(2)):
        assert as_vector_env(other) is other
