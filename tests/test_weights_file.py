"""A policy as a safetensors file: whoever reads it can compute the same actions."""

import json

import gymnasium as gym
import numpy as np
import pytest
import torch

from fastppo import TrainConfig, UsageError, load_policy
from fastppo.__main__ import console
from fastppo.export import export_weights
from fastppo.policy.agent import Agent
from fastppo.policy.make_network import make_network
from fastppo.policy.normalization import make_normalization
from fastppo.policy.spaces import action_spec, obs_spec

safetensors = pytest.importorskip("safetensors")


def test_the_file_is_the_policy(run_dir, capsys):
    """With numpy alone, from names and shapes: normalised, two layers of tanh, the largest logit. The settings are there."""
    assert console(["export", str(run_dir), "--format", "safetensors"]) == 0
    path = run_dir / "policy.safetensors"
    assert str(path) in capsys.readouterr().out
    with safetensors.safe_open(path, "numpy") as file:
        x = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
        header = file.metadata()
    assert header["env_id"] == "CartPole-v1"
    assert json.loads(header["settings"])["hidden_sizes"] == [8]
    assert header["action_space"] == "Discrete(2)"
    obs = np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32)
    hidden = np.clip((obs - x["obs_mean.obs"]) * x["obs_scale.obs"], -10.0, 10.0)
    hidden = np.tanh(hidden @ x["actor.0.weight"] + x["actor.0.bias"])
    logits = hidden @ x["actor.head.weight"] + x["actor.head.bias"]
    np.testing.assert_array_equal(logits.argmax(1), load_policy(run_dir).act(obs))


def test_bounds_and_wrong_paths(tmp_path):
    """The bounds of continuous actions are in it; a wrong name is refused."""
    env = gym.make("Pendulum-v1")
    action, obs = action_spec(env.action_space, False), obs_spec(env.observation_space)
    network = make_network(obs, action, TrainConfig(hidden_sizes=(4,)))
    params, none = network.init(torch.Generator()), make_normalization(None, None, torch.zeros(()), torch.ones(()))
    policy = Agent(env.observation_space, obs, action, network, params, none)
    export_weights(policy, tmp_path / "policy.safetensors")
    with safetensors.safe_open(tmp_path / "policy.safetensors", "numpy") as file:
        assert (file.get_tensor("action.low"), file.get_tensor("action.high")) == ([-2.0], [2.0])
        assert file.get_tensor("actor.log_std").shape == (1,)
    with pytest.raises(UsageError, match=r"writes a \.safetensors file"):
        export_weights(policy, tmp_path / "policy.pt")
