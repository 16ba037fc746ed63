"""--rnd-coef, random network distillation: the predictor against torch.nn and torch.optim, the bonus, and runs with it."""

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete

from fastppo import TrainConfig, train
from fastppo.core.adam import init_adam
from fastppo.core.contracts import Normalization
from fastppo.core.distillation import LEARNING_RATE, distill, novelty
from fastppo.policy.normalization import inverse_std
from fastppo.policy.spaces import action_spec, obs_spec
from fastppo.ranks import ALONE
from fastppo.training.novelty import init_novelty, next_obs
from support.resume import differing
from support.runs import checkpoint, tiny
from support.seeds import rows_of

CPU = torch.device("cpu")
OFF = Normalization(None, None, None, torch.tensor(0.0), torch.tensor(1.0))


def test_the_predictor_learns_as_torchs_would():
    """Oracle: two torch.nn networks with the same weights, torch.nn.functional.mse_loss over the rows that count, Adam."""
    config = TrainConfig(num_envs=3)
    start = init_novelty(config, obs_spec(Box(-1, 1, (5,))), CPU)
    obs, weight = torch.randn(8, 3, 5), (torch.rand(8, 3) < 0.7).float()
    modules = []
    for params in (start.target, start.predictor):
        weights = start.network.weights(params)
        layers = [("backbone.0", 5, 128), ("backbone.1", 128, 128), ("actor.head", 128, 64)]
        module = torch.nn.Sequential()
        for name, inputs, outputs in layers:
            layer = torch.nn.Linear(inputs, outputs)
            layer.weight.data, layer.bias.data = weights[f"{name}.weight"].T.clone(), weights[f"{name}.bias"].clone()
            module.append(layer).append(torch.nn.ReLU())
        modules.append(module[:-1])
    target, predictor = modules
    optimizer = torch.optim.Adam(predictor.parameters(), lr=LEARNING_RATE, eps=1e-5)
    for first in range(4):
        rows, counts = obs[first::4].flatten(0, 1), weight[first::4].flatten() > 0
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(predictor(rows[counts]), target(rows[counts]).detach()).backward()
        optimizer.step()
    adam = init_adam(start.predictor)
    learned, _ = distill(start.features, start.predictor, start.target, adam, obs, weight, 4)
    found = start.network.weights(learned)
    for name, layer in (("backbone.0", predictor[0]), ("backbone.1", predictor[2]), ("actor.head", predictor[4])):
        torch.testing.assert_close(found[f"{name}.weight"], layer.weight.data.T, rtol=0, atol=2e-6)
        torch.testing.assert_close(found[f"{name}.bias"], layer.bias.data, rtol=0, atol=2e-6)
    assert (learned - start.predictor).abs().max() > 1e-3


def rollout_of(obs, **ends):
    """T steps of N environments that only observe."""
    shape = obs.shape[:2]
    off = torch.zeros(shape, dtype=torch.bool)
    return {"obs": obs, "terminated": off, "truncated": off, **ends}


def test_the_bonus_falls_where_much_was_seen():
    """On observations that come again and again; elsewhere it stays. Rows that are no transitions get none."""
    config = TrainConfig(num_envs=4, rnd_coef=0.5)
    networks = init_novelty(config, obs_spec(Box(-1, 1, (3,))), CPU)
    seen, other = torch.rand(17, 4, 3), -torch.rand(17, 4, 3)
    valid = torch.ones(16, 4, dtype=torch.bool)
    valid[5] = False
    for iteration in range(60):
        networks, bonus = networks.added_to(rollout_of(seen), valid, OFF, config, ALONE)
        if iteration == 0:
            error = networks.carry.sum()
            assert (bonus[valid] > 0).all()
            assert (bonus[~valid] == 0).all()
    errors = [novelty(networks.features, networks.predictor, networks.target, x.flatten(0, 1)) for x in (seen, other)]
    assert error > 0
    assert errors[0].mean() < 0.1 * errors[1].mean()
    _, bonus = networks.added_to(rollout_of(seen), valid, OFF, config, ALONE)
    expected = 0.5 * errors[0].view(17, 4)[1:]
    scale = inverse_std(networks.moments)
    assert torch.allclose(bonus[valid], (expected * scale)[valid], rtol=0.1)


def test_what_a_step_led_to():
    """The next row's observation; at an end with its own final observation, that one, not the next episode's."""
    obs = torch.arange(4.0).view(4, 1, 1)
    final, ended = obs + 100, torch.tensor([False, True, False, False]).view(4, 1)
    assert next_obs(rollout_of(obs), OFF).flatten().tolist() == [1, 2, 3]
    assert next_obs(rollout_of(obs, truncated=ended), OFF).flatten().tolist() == [1, 2, 3]
    assert next_obs(rollout_of(obs, truncated=ended, final_obs=final), OFF).flatten().tolist() == [1, 101, 3]


def test_structured_observations_and_masks():
    """A Dict with an image, a category and an action mask: the mask is no input."""
    space = Dict(action_mask=Box(0, 1, (3,), np.int8), image=Box(0, 255, (36, 36, 1), np.uint8), kind=Discrete(4))
    spec = obs_spec(space, action=action_spec(Discrete(3), False))
    assert {leaf.kind for leaf in spec.leaves} == {"mask", "image", "categories"}
    networks = init_novelty(TrainConfig(num_envs=2), spec, CPU)
    obs = {leaf.key: torch.zeros(5, *leaf.shape, dtype=leaf.dtype) for leaf in spec.leaves}
    assert networks.features(networks.target, obs).shape == (5, 64)
    other = obs | {"action_mask": torch.ones_like(obs["action_mask"])}
    assert torch.equal(networks.features(networks.target, other), networks.features(networks.target, obs))


class Chain(gym.Env):
    """Seventeen places in a row: one action goes on, the other back to the start. The last place pays 1 and ends the episode.

    Which action goes on depends on the place. Random actions get through once in 65,536 times.
    """

    observation_space, action_space = Discrete(17), Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.steps = 0, 0
        return 0, {}

    def step(self, action):
        goes_on = action == (self.place * 7 % 3 == 0)
        self.place, self.steps = (self.place + 1 if goes_on else 0), self.steps + 1
        return self.place, float(self.place == 16), self.place == 16, self.steps >= 34, {}


@pytest.mark.slow
def test_it_finds_what_random_actions_do_not(tmp_path):
    """Of four seeds at least two find the end of the chain with the bonus and learn the way; without it none."""
    settings = {"num_iterations": 80, "num_envs": 8, "num_steps": 128, "ent_coef": 0.01, "norm_reward": True}
    settings |= {"preset": "none", "eval_episodes": 0}
    found = {0.0: 0, 0.3: 0}
    for seed in (1, 2, 3, 4):
        for coef in found:
            result = train(env_fn=Chain, run_dir=str(tmp_path / f"{coef}-{seed}"), rnd_coef=coef, seed=seed, **settings)
            found[coef] += float(rows_of(result.run_dir)[-1]["episodic_return_mean"]) > 0.9
    assert found[0.0] == 0
    assert found[0.3] >= 2


def resumed(run_dir, **settings):
    """The run goes on, with other settings."""
    kept = TrainConfig.from_json(run_dir / "config.json")
    return train(replace(kept, resume=str(run_dir), run_dir=None, **settings))


def test_a_run_with_it(tmp_path):
    """Its networks are in the checkpoint, and a resumed run is an uninterrupted one."""
    settings = {"backend": "torch", "env_id": "Pendulum-v1", "norm_obs": True, "norm_reward": True, "num_steps": 40}
    settings |= {"anneal_lr": False, "rnd_coef": 0.5}
    whole = train(tiny(tmp_path / "whole", num_iterations=6, **settings))
    train(tiny(tmp_path / "parts", num_iterations=3, **settings))
    parts = resumed(tmp_path / "parts", num_iterations=6)
    assert differing(checkpoint(whole.run_dir)["novelty"], checkpoint(parts.run_dir)["novelty"]) == []
    assert differing(checkpoint(whole.run_dir)["policy"]["weights"], checkpoint(parts.run_dir)["policy"]["weights"]) == []
    plain = train(tiny(tmp_path / "plain", num_iterations=6, **settings | {"rnd_coef": 0.0}))
    assert differing(checkpoint(plain.run_dir)["policy"]["weights"], checkpoint(whole.run_dir)["policy"]["weights"])
    assert checkpoint(plain.run_dir)["novelty"] is None


@pytest.mark.parametrize("backend", ["gymnasium", "torch"])
def test_returns_are_logged_without_it(backend, tmp_path):
    """CartPole pays 1 a step, so the returns of a run are the lengths of its episodes, whatever the bonus is."""
    result = train(tiny(tmp_path / "run", num_iterations=3, num_steps=64, backend=backend, rnd_coef=5.0))
    rows = [row for row in rows_of(result.run_dir) if int(row["episodes"])]
    assert rows
    for row in rows:
        assert float(row["episodic_return_mean"]) == pytest.approx(float(row["episodic_length_mean"]))
        assert float(row["charts/rnd_bonus"]) > 0.0


def test_rewards_are_clipped_before_it_is_added(tmp_path):
    """A reward of 10 that is clipped is a reward of 1 with the same bonus, to the bit: not the sign of their sum."""
    settings = {"rnd_coef": 0.5, "num_iterations": 3, "vectorization": "sync"}
    tens = train(
        tiny(tmp_path / "tens", clip_reward=True, **settings),
        env_fn=lambda: gym.wrappers.TransformReward(gym.make("CartPole-v1"), lambda reward: 10.0 * reward),
    )
    ones = train(tiny(tmp_path / "ones", **settings), env_fn=lambda: gym.make("CartPole-v1"))
    weights = [checkpoint(result.run_dir)["policy"]["weights"] for result in (tens, ones)]
    assert differing(*weights) == []


def test_more_environments_on_resume(tmp_path):
    """The discounted sums of errors are by environment: they start anew, and the networks go on."""
    settings = {"env_id": "CartPole-v1", "norm_obs": True, "rnd_coef": 0.5}
    train(tiny(tmp_path / "run", num_iterations=2, **settings))
    before = checkpoint(tmp_path / "run")["novelty"]
    resumed(tmp_path / "run", num_iterations=3, num_envs=6)
    after = checkpoint(tmp_path / "run")["novelty"]
    assert len(after["carry"]) == 6
    assert torch.equal(before["target"], after["target"])
    assert not torch.equal(before["predictor"], after["predictor"])
