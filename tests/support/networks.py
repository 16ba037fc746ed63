"""Small networks of a user's own, and `learn` for any space of environments.py."""

import functools
from dataclasses import replace

import torch
from environments import OBSERVATIONS
from torch import nn

from fastppo import TrainConfig
from fastppo.core.adam import init_adam
from fastppo.core.ppo import learn
from fastppo.policy.distributions import CATEGORICAL
from fastppo.policy.make_network import make_network
from fastppo.policy.mlp import MLPActorCritic
from fastppo.policy.spaces import action_spec, obs_spec
from support.programs import N, T, job


class Small(nn.Module):
    """One hidden layer for both heads, with a constant tensor of its own."""

    activation = staticmethod(torch.tanh)

    def __init__(self, inputs, num_outputs, shift=0.0):
        super().__init__()
        self.body = nn.Linear(*inputs, 16)
        self.actor, self.critic = nn.Linear(16, num_outputs), nn.Linear(16, 1)
        self.register_buffer("shift", torch.full((16,), shift))

    def forward(self, obs):
        x = self.activation(self.body(obs)) + self.shift
        return self.actor(x), self.critic(x)


class Relu(Small):
    """The same shapes and names, another function."""

    activation = staticmethod(torch.relu)


def structured_job(observation, action_space, policy=None, seed=0, network_seed=0, distribution="normal", **settings):
    """`job` for a space of environments.py: (learn, arguments)."""
    action = action_spec(action_space, False, distribution)
    space = OBSERVATIONS[observation]
    spec = obs_spec(space, None, action)
    network = make_network(spec, action, TrainConfig(hidden_sizes=(16,), cnn_size=16), policy, network_seed)
    action = replace(action, distribution=network.distribution)
    learn_eagerly, (_, _, rollout, *rest) = job(MLPActorCritic(1, action.size, CATEGORICAL), seed, **settings)
    space.seed(seed)
    rows = [space.sample() for _ in range((T + 1) * N)]
    del rollout["obs"]
    for leaf in spec:
        stacked = torch.stack([torch.as_tensor(leaf.find(row)).to(leaf.dtype) for row in rows])
        rollout[leaf.key] = stacked.unflatten(0, (T + 1, N))
    generator = torch.Generator().manual_seed(seed)
    params = network.init(generator)
    obs = {leaf.key: rollout[leaf.key] for leaf in spec}
    dist = network.actor(network.weights(params), obs if len(obs) > 1 else rollout["obs"])
    noise = action.distribution.noise(action.noise_shape(T + 1, N), generator)
    rollout["action"] = network.sample(dist, noise)
    program = functools.partial(learn, **{**learn_eagerly.keywords, "policy": network})
    return program, (params, init_adam(params), rollout, *rest)
