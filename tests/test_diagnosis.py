"""What a run says when it does not learn for a reason that its metrics show."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from fastppo import TrainConfig, train
from fastppo.policy.spaces import action_spec
from fastppo.training.diagnosis import PATIENCE, Diagnosis, share_at_bounds

ROW = {
    "episodic_return_mean": 10.0,
    "value_loss": 1.0,
    "grad_norm": 0.4,
    "approx_kl": 1e-3,
    "entropy": 0.6,
}
SHOWN = {  # metrics that show a reason, and the flag in the line
    "starved": ({"value_loss": 6000.0, "grad_norm": 600.0}, "--norm-reward"),
    "still": ({"approx_kl": 1e-9}, "--learning-rate"),
    "gone": ({"entropy": 1e-4}, "--ent-coef"),
}


def said(rows, progress=0.1, is_discrete=True, at_bounds=0.0, **settings):
    """The lines for a run whose first row is ROW."""
    watch = Diagnosis(TrainConfig(**settings), is_discrete)
    return [line for row in [ROW, *rows] for line in watch.update(row, progress, at_bounds)]


@pytest.mark.parametrize("name", SHOWN)
def test_a_reason_is_told_once(name):
    """After ten iterations in a row, with the flag that helps; not before, and not again."""
    shown, flag = SHOWN[name]
    row = {**ROW, **shown}
    assert said([row] * (PATIENCE - 1)) == []
    (line,) = said([row] * (3 * PATIENCE))
    assert line.startswith("not learning? ")
    assert flag in line
    assert said([row, ROW] * PATIENCE) == []  # not in a row
    assert said([{**row, "episodic_return_mean": 11.0}] * (2 * PATIENCE)) == []  # it learns all the same


def test_what_is_no_reason():
    """A run as it should be, a learning rate near 0 at the end, normalised rewards, the entropy of a Gaussian."""
    assert said([ROW] * 50) == []
    assert said([{**ROW, **SHOWN["still"][0]}] * 50, progress=0.9) == []
    assert said([{**ROW, **SHOWN["starved"][0]}] * 50, norm_reward=True) == []
    assert said([{**ROW, **SHOWN["starved"][0]}] * 50, max_grad_norm=float("inf")) == []
    assert said([{**ROW, **SHOWN["gone"][0]}] * 50, is_discrete=False) == []
    assert said([ROW] * 50, at_bounds=0.5) == []
    assert "95% of the actions are clipped to their bounds" in said([ROW] * 50, at_bounds=0.95)[0]


def test_the_share_at_the_bounds_by_hand():
    """Of four numbers one is below and one above; squashed actions and choices have none."""
    stored = torch.tensor([[[-3.0, 0.0], [1.0, 9.0]]])
    box = Box(-2.0, 2.0, (2,))
    assert share_at_bounds(action_spec(box, False), stored) == 0.5
    assert share_at_bounds(action_spec(box, True), stored) == 0.0
    assert share_at_bounds(action_spec(Discrete(3), False), torch.ones(4, dtype=torch.int64)) == 0.0


class Corner(gym.Env):
    """Pays for actions near 256, of 0 to 512: a Gaussian of deviation 1 stays in the corner."""

    observation_space, action_space = Box(-1.0, 1.0, (1,)), Box(0.0, 512.0, (2,))
    steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.zeros(1, np.float32), -float(abs(action - 256).sum()), self.steps == 20, False, {}


def test_a_run_says_it(tmp_path, capsys):
    """Rewards that are too large for the settings; and the default for wide bounds, which keeps the actions inside them."""
    settings = {"num_envs": 2, "num_steps": 16, "num_iterations": 25, "eval_episodes": 0, "compile": "off", "check_env": False}
    settings |= {"update_epochs": 1, "num_minibatches": 4}
    train(envs=Corner, preset="none", rescale_action=False, run_dir=str(tmp_path / "raw"), **settings)
    raw = capsys.readouterr().out
    assert "not learning? a value loss of" in raw
    result = train(envs=Corner, run_dir=str(tmp_path / "general"), **settings)
    general = capsys.readouterr().out
    assert "settings for: vector observations, continuous actions" in general
    assert "actions of 0 to 512 are learned as -1 to 1" in general
    assert "not learning?" not in general
    action = result.policy.act(np.zeros(1, np.float32))
    assert (np.abs(action) <= 1.0).all()
