"""--critic-only: parts of the observation that the critic sees and the actor does not, in training, acting and export."""

from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete

from fastppo import TrainConfig, load_policy, train
from fastppo.errors import UsageError
from fastppo.export import console as export
from fastppo.policy.make_network import make_network
from fastppo.policy.spaces import action_spec, obs_spec
from support.resume import differing
from support.runs import checkpoint

SPACE = Dict(seen=Box(-1, 1, (2,)), hidden=Dict(a=Box(-1, 1, (3,)), b=Discrete(4)))


class Coin(gym.Env):
    """One step: the reward is +1 or -1, whatever is done. The hidden part of the observation says which."""

    observation_space = Dict(seen=Box(-1, 1, (2,)), hidden=Box(-1, 1, (1,)))
    action_space = Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.reward = self.np_random.choice([-1.0, 1.0])
        return {"seen": np.zeros(2, np.float32), "hidden": np.array([self.reward], np.float32)}, {}

    def step(self, action):
        return {"seen": np.zeros(2, np.float32), "hidden": np.zeros(1, np.float32)}, self.reward, True, False, {}


def test_the_actor_sees_nothing_of_it():
    """The distribution is the same whatever the hidden parts hold, and has no gradient there; the value is not."""
    spec = obs_spec(SPACE)
    network = make_network(spec, action_spec(Discrete(3), False), TrainConfig(critic_only=("hidden",)))
    generator = torch.Generator().manual_seed(0)
    params = network.init(generator) + 0.1 * torch.randn(network.num_params, generator=generator)
    weights = network.weights(params)
    assert set(network.critic_only) == {"obs.hidden.a", "obs.hidden.b"}
    obs = {"obs.seen": torch.randn(2, 5, 2), "obs.hidden.a": torch.randn(2, 5, 3), "obs.hidden.b": torch.randint(4, (2, 5))}
    other = obs | {"obs.hidden.a": torch.randn(2, 5, 3), "obs.hidden.b": torch.randint(4, (2, 5))}
    logits, value = network.actor_critic(weights, obs)
    assert (logits.shape, value.shape) == ((2, 5, 3), (2, 5))
    torch.testing.assert_close(network.actor(weights, obs), logits)
    torch.testing.assert_close(network.critic(weights, obs), value)
    others, other_value = network.actor_critic(weights, other)
    assert torch.equal(others, logits)
    assert (other_value - value).abs().max() > 1e-3
    seen = network.actor(weights, obs | {"obs.seen": torch.randn(2, 5, 2)})
    assert (seen - logits).abs().max() > 1e-4


@pytest.mark.long
def test_the_critic_knows_what_the_actor_cannot(tmp_path):
    """A reward that only the hidden part tells: the critic learns it; the policy acts without that part, and goes on."""
    settings = {"critic_only": ("hidden",), "num_iterations": 25, "num_envs": 8, "num_steps": 32, "learning_rate": 1e-2}
    result = train(env_fn=Coin, run_dir=str(tmp_path / "run"), eval_episodes=0, preset="none", compile="off", **settings)
    policy = load_policy(result.run_dir)
    seen, hidden = np.zeros((2, 2), np.float32), np.array([[1.0], [-1.0]], np.float32)
    assert policy.value({"seen": seen, "hidden": hidden}) == pytest.approx([1.0, -1.0], abs=0.2)
    assert (policy.act({"seen": seen}) == policy.act({"seen": seen, "hidden": hidden})).all()
    assert policy.act({"seen": seen[0]}).shape == ()
    with pytest.raises(ValueError, match="the observation has no hidden"):
        policy.value({"seen": seen})
    with pytest.raises(ValueError, match="the observation has no seen"):
        policy.act({"hidden": hidden})
    before = checkpoint(result.run_dir)["policy"]["weights"]
    again = replace(TrainConfig.from_json(result.run_dir / "config.json"), resume=str(result.run_dir), run_dir=None)
    train(replace(again, num_iterations=26), env_fn=Coin)
    assert differing(before, checkpoint(result.run_dir)["policy"]["weights"])
    session = pytest.importorskip("onnxruntime")
    assert export([str(result.run_dir)]) == 0
    model = session.InferenceSession(result.run_dir / "policy.onnx")
    assert [given.name for given in model.get_inputs()] == ["obs.seen"]


@pytest.mark.parametrize(
    ("space", "settings", "says"),
    [
        (SPACE, {"critic_only": ("hiden",)}, "--critic-only hiden is no part of the observation; nearest: hidden"),
        (SPACE, {"critic_only": ("xyz",)}, "--critic-only xyz is no part of the observation; its parts: hidden, hidden.a"),
        (Box(-1, 1, (3,)), {"critic_only": ("hidden",)}, "no part of the observation, which is no Dict"),
        (SPACE, {"critic_only": ("hidden", "seen")}, "leaves the actor nothing to observe"),
        (SPACE, {"critic_only": ("hidden",), "share_backbone": True}, "leave --share-backbone off"),
        (SPACE, {"critic_only": ("hidden",), "rnn": "gru"}, "leave --rnn gru off"),
    ],
)
def test_what_cannot_be_hidden(space, settings, says):
    """One line with the flag and the nearest part."""
    with pytest.raises(UsageError, match=says):
        make_network(obs_spec(space), action_spec(Discrete(2), False), TrainConfig(**settings))
