"""Policies with a memory: networks, rollouts and updates of them, and collectors on walks."""

import dataclasses
import functools
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from environments import ACTIONS, OBSERVATIONS, VECTOR, Walk, WalkVector

from fastppo import TrainConfig
from fastppo.core.acting import act_recurrent, collect
from fastppo.core.contracts import Normalization, obs_of
from fastppo.core.recurrence import STEPS
from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.envs.device import TorchVectorEnv
from fastppo.policy.make_network import make_network
from fastppo.policy.spaces import action_spec, obs_spec
from fastppo.rollout.collector import start_collector
from fastppo.rollout.device_collector import DeviceCollector
from fastppo.rollout.env_step import env_step_of, pack
from fastppo.rollout.step_collector import HostCollector, TensorCollector
from fastppo.rollout.storage import RnnState, allocate_rollout
from support.programs import OFF
from support.tensor_envs import TensorTwin

CPU = torch.device("cpu")


KINDS = pytest.mark.parametrize("kind", ["lstm", "gru"])


USERS = pytest.mark.parametrize("users", [1, 2])


LAYERS = pytest.mark.parametrize("layers", [1, 2])


def make_policy(kind="lstm", users=2, layers=1, hidden=8, observation=VECTOR, action=ACTIONS["discrete"]):
    """(network, what it observes, what it does), as the trainer makes them."""
    act_spec = action_spec(action, False)
    spec = obs_spec(observation, None, act_spec)
    settings = {"rnn": kind, "rnn_hidden_size": hidden, "rnn_layers": layers, "rnn_shared": users == 1}
    return make_network(spec, act_spec, TrainConfig(hidden_sizes=(8,), cnn_size=8, **settings)), spec, act_spec


def make_params(policy, seed=0):
    """Weights and biases away from 0, so that what is remembered, and what was forgotten, shows."""
    generator = torch.Generator().manual_seed(seed)
    return policy.init(generator) + 0.3 * torch.randn(policy.num_params, generator=generator)


def sampled(spec, space, shape, seed=0):
    """Observations (*shape, ...) drawn from the space, by key."""
    space.seed(seed)
    rows = [space.sample() for _ in range(int(np.prod(shape)))]
    stacked = {leaf.key: torch.stack([torch.as_tensor(leaf.find(row)).to(leaf.dtype) for row in rows]) for leaf in spec}
    return {key: x.unflatten(0, shape) for key, x in stacked.items()}


@dataclasses.dataclass(frozen=True)
class TensorWalk:
    """Walk as functions on tensors: lengths of 1 to 7 steps, both ways to end, obs[1] is 0 at an episode's start."""

    max_episode_steps: ClassVar[None] = None
    num_random: ClassVar[int] = 3
    observation_space: ClassVar[gym.Space] = Walk.observation_space
    action_space: ClassVar[gym.Space] = Walk.action_space

    def reset(self, random):
        elapsed = torch.zeros_like(random[:, 0])
        state = (2.0 * random[:, 0] - 1.0, elapsed, 1.0 + (7.0 * random[:, 1]).floor(), random[:, 2] < 0.5)
        return state, self._obs(state)

    def step(self, state, action, random):
        position, elapsed, length, truncates = state
        state = (0.9 * position + 0.3 * (action - 1), elapsed + 1.0, length, truncates)
        ended = state[1] == length
        return state, self._obs(state), 1.0 + state[0], ended & ~truncates, ended & truncates

    def _obs(self, state):
        return torch.stack((state[0], state[1] / 8, state[2] / 8), 1)


ENGINES = [
    ("arrays", "NextStep"),
    ("arrays", "SameStep"),
    ("arrays", "Disabled"),
    ("tensors", "NextStep"),
    ("tensors", "SameStep"),
    ("tensors", "Disabled"),
    ("device", "NextStep"),
]


EVERY_ENGINE = pytest.mark.parametrize(("engine", "mode"), ENGINES)


class Watched:
    """A policy whose every step is noted: what `act` returned as its memory."""

    def __init__(self, policy):
        self.policy, self.memories = policy, []

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def step(self, weights, obs, rnn_state):
        dist, rnn_state = self.policy.step(weights, obs, rnn_state)
        self.memories.append(rnn_state.clone())
        return dist, rnn_state


class Bench:
    """A collector with a memory, as the loop makes it, and a policy on N walks."""

    def __init__(self, engine, mode="NextStep", num_steps=7, num_envs=4, kind="lstm", users=2, layers=1, seed=3):
        vector = {
            "arrays": lambda: WalkVector(num_envs, mode),
            "tensors": lambda: TensorTwin(num_envs, mode),
            "device": lambda: TorchVectorEnv(TensorWalk(), num_envs),
        }[engine]()
        policy, self.obs, self.action = make_policy(kind, users, layers, observation=Walk.observation_space)
        self.policy = Watched(policy)
        self.params = make_params(policy)
        policy.weights(self.params)["actor.head.bias"].zero_()  # no action is the likeliest whatever is seen
        policy.weights(self.params)["actor.head.weight"].mul_(3.0)
        self.envs = AutoresetEnvs(vector)
        self.keeps_final_obs = self.envs.keeps_final_obs
        shape = (num_steps, num_envs, self.obs, self.action, self.keeps_final_obs, CPU)
        self.rollout = allocate_rollout(*shape, remembers=True)
        self.start = torch.zeros(num_envs, policy.rnn_state_size)
        self.collector = start_collector(self.envs, self.rollout, self.obs, self.action, seed, RnnState(self.start))
        kinds = {"arrays": HostCollector, "tensors": TensorCollector, "device": DeviceCollector}
        assert type(self.collector) is kinds[engine]
        weights = policy.weights(self.params)
        self.act = functools.partial(act_recurrent, self.policy, weights, OFF)
        if engine == "device":
            step = env_step_of(vector, self.action)
            self.act = functools.partial(functools.partial(collect, policy=self.policy, env_step=step), self.params, OFF)
        self.generator = torch.Generator().manual_seed(seed)
        self.noise_shape = self.action.noise_shape(num_steps, num_envs)

    def collect(self, greedy=False, cut=False):
        """The next rollout, copied, with `rnn_state`; and what `act` remembered after each step, (T, N, S)."""
        noise = self.action.distribution.noise(self.noise_shape, self.generator)
        self.policy.memories.clear()
        self.collector.collect(self.act, torch.zeros_like(noise) if greedy else noise, cut)
        rollout = {key: value.clone() for key, value in self.rollout.items()} | {"rnn_state": self.start.clone()}
        return rollout, torch.stack(self.policy.memories)

    def running(self):
        """What `collect` carries from step to step, of environments on the device."""
        episode_start = self.rollout["episode_start"][-1].clone()
        return (*pack(self.collector.envs.running), self.collector.rnn_state.now, episode_start)

    def from_nothing(self, obs):
        """The rnn_state (R, S) after an episode's first observation, (R, ...)."""
        empty = torch.zeros(len(obs), self.policy.rnn_state_size)
        return self.policy.policy.step(self.policy.weights(self.params), obs, empty)[1]

    def unroll(self, rollout):
        """As `learn` does it."""
        weights = self.policy.weights(self.params)
        return self.policy.unroll(weights, obs_of(rollout), rollout["episode_start"], rollout["rnn_state"], STEPS)


SPACES = {
    "discrete": (VECTOR, ACTIONS["discrete"]),
    "continuous": (VECTOR, ACTIONS["box"]),
    "multi-discrete": (VECTOR, ACTIONS["multi-discrete"]),
    "masked": (OBSERVATIONS["masked"], ACTIONS["multi-discrete"]),
    "dict": (OBSERVATIONS["nested"], ACTIONS["discrete"]),
    "image": (OBSERVATIONS["image (H, W)"], ACTIONS["discrete"]),
}


def make_rollout(policy, spec, action, params, space=VECTOR, num_steps=12, num_envs=4, seed=1, normalization=OFF):
    """A rollout as next-step autoreset leaves it, acted out by the policy from a memory that is not empty.

    Environment 1 begins with a row that resets; what lies in rows that reset, and in row T, is another's.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (num_steps + 1, num_envs)
    obs = sampled(spec, space, shape, seed)
    chance = torch.rand(shape, generator=generator)
    terminated, truncated = chance < 0.12, (chance > 0.1) & (chance < 0.25)
    terminated[0, 1:2] = truncated[0, 1:2] = False
    for t in range(1, num_steps + 1):
        resetting = (terminated | truncated)[t - 1]
        terminated[t] &= ~resetting
        truncated[t] &= ~resetting
    valid = torch.cat((torch.arange(num_envs)[None] != 1, ~(terminated | truncated)[:-1]))
    episode_start = torch.cat((torch.arange(num_envs)[None] == 2, ~valid[:-1]))
    rnn_state = torch.randn(num_envs, policy.rnn_state_size, generator=generator)
    noise = action.distribution.noise(action.noise_shape(*shape), generator)
    rollout = {
        **obs,
        "terminated": terminated,
        "truncated": truncated,
        "valid": valid,
        "episode_start": episode_start,
        "rnn_state": rnn_state,
    }
    rollout["reward"] = torch.where(valid, torch.randn(shape, generator=generator), 100.0)
    weights, actions, now = policy.weights(params), [], rnn_state
    seen = obs_of(obs)
    for t in range(num_steps + 1):
        row = seen[t] if isinstance(seen, torch.Tensor) else {key: x[t] for key, x in seen.items()}
        chosen, now = act_recurrent(policy, weights, normalization, row, noise[t], now, episode_start[t])
        actions.append(chosen)
    return rollout | {"action": torch.stack(actions)}


def setting(spaces="discrete", kind="lstm", users=2, num_steps=12, num_envs=4, seed=1, **options):
    """(policy, params, rollout)."""
    space, act_space = SPACES[spaces]
    policy, spec, action = make_policy(kind, users, observation=space, action=act_space, **options)
    params = make_params(policy)
    return policy, params, make_rollout(policy, spec, action, params, space, num_steps, num_envs, seed)


NORMALIZED = Normalization(
    {"obs": torch.tensor([0.5, -0.5, 0.0])}, {"obs": torch.tensor([2.0, 0.5, 1.0])}, None, torch.tensor(3.0), torch.tensor(2.0)
)


SMALL = {"rnn_hidden_size": 8, "hidden_sizes": (8,)}
