"""Policies that remember: what acts is what learns, over episode ends and over rollouts, however environments reset.

The cells themselves are held against torch.nn in tests/test_recurrence.py.
"""

import dataclasses
import functools
import itertools
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from environments import ACTIONS, OBSERVATIONS, VECTOR, Walk, WalkVector
from test_compilation import SETTINGS, assert_same
from test_programs import (
    OFF,
    HostSyncs,
    assert_same_bits,
    assert_together,
    column,
    make_permutation,
    to_meta,
    update,
    updates_of,
)
from test_tensor_envs import TensorTwin
from torchrl.objectives.value.functional import generalized_advantage_estimate

from fastppo import TrainConfig
from fastppo.compile import inductor
from fastppo.compile.inductor import compile_program
from fastppo.core.acting import act_recurrent, act_recurrent_from_params, collect
from fastppo.core.adam import init_adam
from fastppo.core.contracts import Normalization, Schedule, normalize_obs, obs_of
from fastppo.core.gradient import functional_grad_and_aux, grad_and_aux
from fastppo.core.ppo import MINIBATCH_METRICS, learn
from fastppo.core.recurrence import STEPS
from fastppo.core.seed_axis import Seeds, of_seed, stack
from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.envs.device import TorchVectorEnv
from fastppo.policy.agent import Agent
from fastppo.policy.make_network import make_network
from fastppo.policy.rnn import RecurrentActorCritic, Rnn
from fastppo.policy.spaces import action_spec, obs_spec
from fastppo.rollout.collector import start_collector
from fastppo.rollout.device_collector import DeviceCollector
from fastppo.rollout.env_step import env_step_of, pack
from fastppo.rollout.step_collector import HostCollector, TensorCollector
from fastppo.rollout.storage import RnnState, allocate_rollout

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


# --- weights


@KINDS
@USERS
@LAYERS
def test_initial_weights(kind, users, layers):
    """Orthogonal matrices for each user, all their own, and zero biases; the same generator, the same weights."""
    rnn = Rnn(kind, 5, 8, layers, users)
    weights = rnn.weights(rnn.init(torch.Generator().manual_seed(0)))
    gates = {"lstm": 4, "gru": 3}[kind]
    matrices = {name: weight for name, weight in weights.items() if name.endswith(".weight")}
    assert len(matrices) == 2 * layers
    for name, weight in matrices.items():
        rows = 5 if name == "rnn.0.input.weight" else 8
        assert weight.shape == (users, rows, gates * 8), name
        for matrix in weight:  # wider than high: orthonormal rows
            torch.testing.assert_close(matrix @ matrix.mT, torch.eye(rows), rtol=0, atol=1e-5)
        assert users == 1 or (weight[0] - weight[1]).abs().max() > 0.1
    biases = [weight for name, weight in weights.items() if name.endswith(".bias")]
    assert len(biases) == layers * (1 if kind == "lstm" else 2)
    assert not any(bias.any() for bias in biases)
    assert torch.equal(rnn.init(torch.Generator().manual_seed(0)), rnn.init(torch.Generator().manual_seed(0)))


@KINDS
@USERS
def test_flatten_is_the_inverse_of_weights(kind, users):
    """Of the whole network, to the bit; a weight that is missing or of another shape is an error."""
    policy, *_ = make_policy(kind, users, layers=2)
    params = make_params(policy)
    weights = policy.weights(params)
    assert torch.equal(policy.flatten(weights), params)
    assert sum(weight.numel() for weight in weights.values()) == policy.num_params
    with pytest.raises(ValueError, match=r"rnn\.1\.hidden\.weight"):
        policy.flatten(weights | {"rnn.1.hidden.weight": weights["rnn.1.hidden.weight"].mT})
    with pytest.raises(KeyError, match=r"rnn\.0\.input\.bias"):
        policy.flatten({name: weight for name, weight in weights.items() if name != "rnn.0.input.bias"})


@KINDS
@pytest.mark.parametrize("settings", [{"rnn_shared": True}, {"share_backbone": True}, {}], ids=["rnn", "backbone", "apart"])
def test_who_has_a_memory(kind, settings):
    """One for both where memory or layers are shared, else one each: S = users x layers x parts x H."""
    config = TrainConfig(rnn=kind, rnn_hidden_size=8, rnn_layers=2, hidden_sizes=(8,), **settings)
    spec = action_spec(ACTIONS["discrete"], False)
    policy = make_network(obs_spec(VECTOR), spec, config)
    users, parts = (1 if settings else 2), {"lstm": 2, "gru": 1}[kind]
    assert policy.rnn_state_size == users * 2 * parts * 8
    assert policy.actor_size == 2 * parts * 8


# --- step by step and at once


@KINDS
@USERS
@LAYERS
@pytest.mark.parametrize("hidden", [5, 8])
def test_step_by_step_is_replay(kind, users, layers, hidden):
    """dist, value and memory after every step, with episodes that begin in the middle, from a memory that is not empty.

    Of the actor's part of the memory alone acting is the same.
    """
    policy, *_ = make_policy(kind, users, layers, hidden)
    params, steps, number = make_params(policy), 7, 3
    weights = policy.weights(params)
    generator = torch.Generator().manual_seed(1)
    obs = torch.randn(steps, number, 3, generator=generator)
    rnn_state = torch.randn(number, policy.rnn_state_size, generator=generator)
    episode_start = torch.zeros(steps, number, dtype=torch.bool)
    episode_start[0, 0] = episode_start[3, 1] = episode_start[4, 1] = episode_start[6, 2] = True
    dist, value, after = policy.unroll(weights, obs, episode_start, rnn_state, STEPS)
    assert after.shape == (steps, number, policy.rnn_state_size)
    own = rnn_state[:, : policy.actor_size]
    for t in range(steps):
        rnn_state, own = (x.masked_fill(episode_start[t].unsqueeze(1), 0.0) for x in (rnn_state, own))
        judged = policy.value_from_state(weights, obs[t], rnn_state)
        (step_dist, rnn_state), (own_dist, own) = (policy.step(weights, obs[t], x) for x in (rnn_state, own))
        torch.testing.assert_close(dist[t], step_dist, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(value[t], judged, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(after[t], rnn_state, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(own_dist, step_dist, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(own, rnn_state[:, : policy.actor_size], rtol=1e-5, atol=1e-6)
    forgotten = policy.unroll(weights, obs, torch.ones_like(episode_start), rnn_state, STEPS)[0]
    assert (forgotten - dist).abs().amax((1, 2)).min() > 1e-4  # what is remembered matters in every step


@KINDS
def test_judging_many_rows_at_once(kind):
    """V of (T, n, ...) after memories (T, n, S) is V of each by itself, and leaves them as they are."""
    policy, *_ = make_policy(kind)
    weights = policy.weights(make_params(policy))
    obs, rnn_state = torch.randn(4, 3, 3), torch.randn(4, 3, policy.rnn_state_size)
    before = rnn_state.clone()
    value = policy.value_from_state(weights, obs, rnn_state)
    assert value.shape == (4, 3)
    for t, n in itertools.product(range(4), range(3)):
        one = policy.value_from_state(weights, obs[t, n : n + 1], rnn_state[t, n : n + 1])
        torch.testing.assert_close(value[t, n], one[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(rnn_state, before)


def test_without_a_memory_there_is_no_acting():
    """The ways in of a policy without memory are closed: nobody acts as if every step were an episode's first one."""
    policy, *_ = make_policy()
    weights = policy.weights(make_params(policy))
    for way in (policy.actor, policy.critic, policy.actor_critic):
        with pytest.raises(NotImplementedError):
            way(weights, torch.zeros(2, 3))


# --- through the collectors


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


@EVERY_ENGINE
@pytest.mark.parametrize(("kind", "users", "layers"), [("lstm", 2, 1), ("gru", 1, 2)])
def test_replayed_states_are_those_acted_with(engine, mode, kind, users, layers):
    """Step for step, over episode ends and over ten rollouts; and `episode_start` is true at starts of episodes, nowhere else.

    A rollout ends, and another begins, with every kind of row: one under way, one that has just ended, one that resets.
    """
    bench = Bench(engine, mode, kind=kind, users=users, layers=layers)
    before, starts, borders = None, 0, set()
    for _ in range(10):
        rollout, acted = bench.collect()
        _, _, replayed = bench.unroll(rollout)
        torch.testing.assert_close(replayed[:-1], acted, rtol=1e-5, atol=1e-5)
        if before is not None:
            assert torch.equal(rollout["rnn_state"], before)
        before = acted[-1]
        assert torch.equal(rollout["episode_start"], rollout["obs"][..., 1] == 0.0)  # the walk says how old it is
        episode_start = rollout["episode_start"][:-1]
        torch.testing.assert_close(
            acted[episode_start], bench.from_nothing(rollout["obs"][:-1][episode_start]), rtol=1e-5, atol=1e-5
        )
        starts += int(episode_start.sum())
        borders |= set(zip(rollout["valid"][-1].tolist(), rollout["episode_start"][-1].tolist(), strict=True))
    assert starts > 40
    under_way, begins, resets = (True, False), (True, True), (False, False)
    assert borders == {under_way, begins, resets} - ({resets} if bench.keeps_final_obs else set())
    bench.envs.close()


@EVERY_ENGINE
def test_a_reset_between_rollouts_forgets(engine, mode):
    """What was remembered of episodes that were broken off has no part in the next ones, whatever row they broke off in."""
    bench = Bench(engine, mode)
    for number in range(5):
        bench.collect(cut=True)
        bench.collector.reset(None)
        rollout, acted = bench.collect()
        assert rollout["episode_start"][0].all(), number
        assert rollout["valid"][0].all(), number
        torch.testing.assert_close(acted[0], bench.from_nothing(rollout["obs"][0]), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(bench.unroll(rollout)[2][:-1], acted, rtol=1e-5, atol=1e-5)
    assert rollout["rnn_state"].any()  # and there was something to forget
    bench.envs.close()


@EVERY_ENGINE
@KINDS
def test_a_truncated_episode_is_bootstrapped_with_its_own_memory(engine, mode, kind):
    """Against the policy stepped by hand through that episode alone, from nothing, and judging what the last action led to.

    With gae_lambda 0 the value's target is r + gamma V'; with one row that counts, the loss is (V - r - gamma V')^2. A cut
    episode is one too, and so is one that goes on after the rollout.
    """
    bench = Bench(engine, mode, kind=kind)
    weights, network = bench.policy.weights(bench.params), bench.policy.policy
    alone = torch.zeros(4, bench.policy.rnn_state_size)  # of the episodes under way, by hand
    options = {"gae_lambda": 0.0, "gamma": 0.5, "norm_adv": False, "clip_vloss": False, "minibatch_size": 28}
    kinds = {"terminated": 0, "truncated": 0, "cut": 0, "under way": 0}
    for number in range(4):
        rollout, _ = bench.collect(cut=number == 3)
        ended = rollout["terminated"] | rollout["truncated"]
        for t, n in itertools.product(range(7), range(4)):
            obs = rollout["obs"][t, n : n + 1]
            if obs[0, 1] == 0.0:
                alone[n] = 0.0
            if not rollout["valid"][t, n]:
                continue
            value = network.value_from_state(weights, obs, alone[n : n + 1])
            _, alone[n : n + 1] = network.step(weights, obs, alone[n : n + 1])
            led_to = (rollout["final_obs"] if bench.keeps_final_obs else rollout["obs"].roll(-1, 0))[t, n : n + 1]
            if not (ended[t, n] or t == 6):
                continue
            bootstrap = network.value_from_state(weights, led_to, alone[n : n + 1]).item()
            if rollout["terminated"][t, n]:
                bootstrap, what = 0.0, "terminated"
            elif ended[t, n]:
                what = "cut" if number == 3 and t == 6 else "truncated"
            else:
                what = "under way"
            kinds[what] += 1
            counted = torch.zeros_like(rollout["valid"])
            counted[t, n] = True
            learned = update(network, bench.params, rollout | {"valid": counted}, torch.arange(4)[None], **options)
            expected = (value.item() - rollout["reward"][t, n].item() - 0.5 * bootstrap) ** 2
            assert column(learned, "value_loss")[0] == pytest.approx(expected, rel=1e-4, abs=1e-5), (number, t, n, what)
    assert min(kinds.values()) > 0, kinds
    bench.envs.close()


def transitions(rollouts, n):
    """Of one environment: observation, action, reward and ends of every valid row."""
    return [
        tuple(rollout[key][t, n].tolist() for key in ("obs", "action", "reward", "terminated", "truncated"))
        for rollout in rollouts
        for t in range(len(rollout["valid"]) - 1)
        if rollout["valid"][t, n]
    ]


@KINDS
@pytest.mark.parametrize("seed", [0, 1])
def test_every_mode_gives_the_same_transitions_and_the_same_update(kind, seed):
    """A policy with memory walks the same way however its environments reset, and learns the same from the same 24 steps.

    One environment; those that reset in a step of their own get as many steps more as there are resets.
    """
    rollouts = {}
    for mode in ("SameStep", "Disabled"):
        rollouts[mode], _ = Bench("arrays", mode, 24, 1, kind=kind, seed=seed).collect(greedy=True)
    resets = int((rollouts["SameStep"]["terminated"] | rollouts["SameStep"]["truncated"])[:23].sum())
    assert resets > 2
    bench = Bench("arrays", "NextStep", 24 + resets, 1, kind=kind, seed=seed)
    rollouts["NextStep"], _ = bench.collect(greedy=True)
    same_step, disabled, next_step = (transitions([rollouts[mode]], 0) for mode in ("SameStep", "Disabled", "NextStep"))
    assert same_step == disabled == next_step
    assert len({action for _, action, *_ in same_step}) > 1

    learned, permutation = {}, torch.zeros(3, 1, dtype=torch.int64)
    for mode, rollout in rollouts.items():
        size = len(rollout["valid"]) - 1
        learned[mode] = update(bench.policy.policy, bench.params, rollout, permutation, minibatch_size=size)
    assert (learned["SameStep"].params - bench.params).abs().max() > 1e-3
    for mode in ("Disabled", "NextStep"):
        torch.testing.assert_close(learned[mode].params, learned["SameStep"].params, rtol=0, atol=2e-5)
        metrics = learned[mode].minibatch_metrics, learned["SameStep"].minibatch_metrics
        torch.testing.assert_close(*metrics, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("engine", ["arrays", "tensors", "device"])
def test_the_ignored_rows_action_changes_nothing(engine):
    """Any action in a row that only resets, and any reward: not one bit of the update changes."""
    bench = Bench(engine)
    bench.collect()
    rollout, _ = bench.collect()
    ignored = ~rollout["valid"]
    assert ignored[:-1].sum() > 2
    other = rollout | {
        "action": torch.where(ignored, (rollout["action"] + 1) % 3, rollout["action"]),
        "reward": torch.where(ignored, 1e6, rollout["reward"]),
    }
    one, two = (
        update(bench.policy.policy, bench.params, x, torch.tensor([[2, 0, 1, 3]] * 2), minibatch_size=14)
        for x in (rollout, other)
    )
    assert torch.equal(one.params, two.params)
    assert torch.equal(one.minibatch_metrics, two.minibatch_metrics)


# --- learn


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


@KINDS
@pytest.mark.parametrize("spaces", list(SPACES))
@pytest.mark.parametrize("normalized", [False, True], ids=["raw", "normalised"])
def test_first_minibatch_has_ratio_one(kind, spaces, normalized):
    """Learning sees what acting saw, whatever is observed and done: before anything has moved every ratio is 1, then not."""
    space, act_space = SPACES[spaces]
    policy, spec, action = make_policy(kind, observation=space, action=act_space)
    params, normalization = make_params(policy), OFF
    if normalized:
        leaves = {leaf.key: leaf.shape for leaf in spec.normalized}
        mean, scale = ({key: torch.full(shape, x) for key, shape in leaves.items()} for x in (0.3, 0.7))
        normalization = Normalization(mean, scale, torch.tensor(0.25), torch.zeros(()), torch.ones(()))
    rollout = make_rollout(policy, spec, action, params, space, normalization=normalization)
    permutation = torch.tensor([[3, 1, 0, 2], [2, 3, 1, 0]])  # none in a place of its own
    learned = update(policy, params, rollout, permutation, normalization, minibatch_size=24)
    deviation, clipfrac = column(learned, "ratio_deviation"), column(learned, "clipfrac")
    assert deviation[0] <= 1e-5
    assert clipfrac[0] == 0.0
    assert abs(column(learned, "approx_kl")[0]) < 1e-6
    assert min(deviation[1:]) > 1e-3
    assert learned.minibatch_metrics.isfinite().all()


@KINDS
def test_statistics_are_those_of_the_rollout_normalised_beforehand(kind):
    """Observations, the final ones among them, and rewards under frozen statistics: to the bit what normalising first gives."""
    policy, params, rollout = setting(kind=kind)
    rollout["reward"] = rollout["reward"].clamp(-30.0, 30.0)
    rollout["final_obs"] = rollout["obs"].flip(0)
    offset, scale = torch.tensor([-1.0, 1.0, 0.0]), torch.tensor([0.5, 0.25, 1.0])
    normalization = Normalization({"obs": offset}, {"obs": scale}, torch.tensor(0.25), torch.zeros(()), torch.ones(()))
    by_hand = rollout | {key: normalize_obs(rollout[key], normalization) for key in ("obs", "final_obs")}
    by_hand["reward"] = rollout["reward"] / 4
    one, two, raw = (
        update(policy, params, rows, make_permutation(2, 4), under, minibatch_size=24)
        for rows, under in ((rollout, normalization), (by_hand, OFF), (rollout, OFF))
    )
    assert_same_bits(one, two)
    assert not torch.equal(one.params, raw.params)


@pytest.mark.parametrize("spaces", ["discrete", "continuous", "masked"])
@pytest.mark.parametrize("estimator", ["gae", "monte-carlo"])
@KINDS
def test_rows_that_are_no_transitions_have_no_influence(kind, spaces, estimator):
    """Any reward and any action in a row that resets, and anything but the observation in row T: not one bit changes."""
    policy, params, rollout = setting(spaces, kind)
    permutation = make_permutation(2, 4)
    options = {"minibatch_size": 24, "advantage_estimator": estimator, "norm_returns": estimator == "monte-carlo"}
    before = update(policy, params, rollout, permutation, **options)
    other = {name: x.clone() for name, x in rollout.items()}
    resetting = ~rollout["valid"]
    assert resetting[:-1].sum() > 3
    resetting[-1] = True
    other["reward"][resetting] = -1e5
    other["action"][resetting] = 1e6 if spaces == "continuous" else 0
    other["terminated"][-1] = other["truncated"][-1] = True
    other["valid"][-1] = ~other["valid"][-1]
    after = update(policy, params, other, permutation, **options)
    assert_same_bits(before, after)
    for name in ("minibatch_metrics", "explained_variance", "return_mean", "return_std"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name
    step, env = (int(x) for x in torch.nonzero(rollout["valid"][:-1])[-1])  # while that of a transition does
    other["reward"][step, env] += 1.0
    assert not torch.equal(update(policy, params, other, permutation, **options).params, before.params)


@pytest.mark.parametrize("estimator", ["gae", "monte-carlo"])
@pytest.mark.parametrize("spaces", ["discrete", "continuous"])
@KINDS
def test_what_a_terminated_episode_led_to_has_no_influence(kind, spaces, estimator):
    """The observation of a row that only resets is the one that the episode ended with. After a terminal state not one bit

    hangs on it, neither through what is remembered nor through a value; after a truncation it is the bootstrap's.
    """
    policy, params, rollout = setting(spaces, kind)
    options = {"minibatch_size": 24, "advantage_estimator": estimator, "norm_returns": estimator == "monte-carlo"}
    before = update(policy, params, rollout, make_permutation(2, 4), **options)
    truncated_only = (rollout["truncated"] & ~rollout["terminated"])[:-1]
    led_to = ~rollout["valid"]
    bootstraps = led_to & torch.cat((torch.zeros_like(led_to[:1]), truncated_only))
    assert (led_to & ~bootstraps)[:-1].sum() > 1
    other = 3.0 * torch.randn(rollout["obs"].shape, generator=torch.Generator().manual_seed(9))
    for rows, same in ((led_to & ~bootstraps, True), (bootstraps, False)):
        changed = rollout | {"obs": torch.where(rows.unsqueeze(-1), other, rollout["obs"])}
        after = update(policy, params, changed, make_permutation(2, 4), **options)
        assert torch.equal(before.params, after.params) == same
        assert torch.equal(before.minibatch_metrics, after.minibatch_metrics) == same
        assert torch.equal(before.explained_variance, after.explained_variance) == same


@KINDS
def test_what_happened_before_an_episode_has_no_influence(kind):
    """Where rows begin an episode, neither the memory at the rollout's start nor an earlier row's observation reaches them."""
    policy, params, rollout = setting(kind=kind)
    rollout["terminated"][:], rollout["truncated"][:], rollout["valid"][:] = False, False, True
    rollout["episode_start"][:] = False
    rollout["episode_start"][5] = rollout["terminated"][4] = True
    rollout["valid"][:5] = False  # what remains are the episodes from row 5 on
    other = rollout | {"rnn_state": torch.randn(rollout["rnn_state"].shape), "obs": rollout["obs"].clone()}
    other["obs"][:5] = torch.randn(5, 4, 3)
    one, two = (update(policy, params, rows, make_permutation(2, 4), minibatch_size=24) for rows in (rollout, other))
    torch.testing.assert_close(one.params, two.params, rtol=0, atol=1e-6)
    rollout["episode_start"][5] = False  # and without the start they do
    assert (update(policy, params, rollout, make_permutation(2, 4), minibatch_size=24).params - one.params).abs().max() > 1e-3


class Stepping(RecurrentActorCritic):
    """The same network whose `replay` is a loop of `step` and `judge`: an oracle whose gradient is autograd's."""

    def unroll(self, weights, obs, episode_start, rnn_state, cells):
        dists, values, memories = [], [], []
        for t in range(episode_start.shape[0]):
            rnn_state = torch.where(episode_start[t][:, None], 0.0, rnn_state)
            values.append(self.value_from_state(weights, obs[t], rnn_state))
            dist, rnn_state = self.step(weights, obs[t], rnn_state)
            dists.append(dist)
            memories.append(rnn_state)
        several = isinstance(dists[0], tuple)
        dist = tuple(torch.stack(parts) for parts in zip(*dists, strict=True)) if several else torch.stack(dists)
        return dist, torch.stack(values), torch.stack(memories)


@KINDS
@USERS
@LAYERS
@pytest.mark.parametrize("spaces", ["discrete", "continuous"])
@pytest.mark.parametrize("final_obs", [False, True], ids=["next step", "final_obs"])
def test_learning_is_that_of_stepping_with_autograd(kind, users, layers, spaces, final_obs):
    """All that `learn` returns, with every term of the loss: the written-out gradient, the values, the bootstraps."""
    policy, params, rollout = setting(spaces, kind, users, num_steps=6, layers=layers)
    if final_obs:
        rollout["final_obs"] = rollout["obs"].flip(0)
    alike = Stepping(policy.encoder, policy.rnn, policy.mlp)
    one, two = (update(each, params, rollout, make_permutation(2, 4), minibatch_size=12) for each in (policy, alike))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert (one.params - params).abs().max() > 1e-3


def by_torch(policy, params, obs, episode_start, rnn_state):
    """Actor's and critic's output (T, N, ...) from torch.nn.LSTM or GRU, which goes through each episode by itself.

    A gradient to the flat buffer params goes through torch's own backward.
    """
    weights, rnn, (steps, number) = policy.weights(params), policy.rnn, episode_start.shape
    module = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[rnn.kind](rnn.input_size, rnn.hidden_size, rnn.num_layers).double()
    parts, outs = {"lstm": 2, "gru": 1}[rnn.kind], []
    states = rnn_state.view(number, rnn.num_users, rnn.num_layers, parts, rnn.hidden_size)
    for user in range(rnn.num_users):
        named = {}
        for layer in range(rnn.num_layers):
            own = {name: weights[f"rnn.{layer}.{name}"][user] for name in ("input.weight", "input.bias", "hidden.weight")}
            hidden_bias = torch.zeros_like(own["input.bias"])  # torch has two, which an LSTM adds up
            if rnn.kind == "gru":
                of_n = weights[f"rnn.{layer}.hidden.bias"][user]
                hidden_bias = torch.cat((hidden_bias[: -rnn.hidden_size], of_n))
            named |= {f"weight_ih_l{layer}": own["input.weight"].mT, f"weight_hh_l{layer}": own["hidden.weight"].mT}
            named |= {f"bias_ih_l{layer}": own["input.bias"], f"bias_hh_l{layer}": hidden_bias}
        sequences = []
        for n in range(number):
            starts = [0, *(t for t in range(1, steps) if episode_start[t, n]), steps]
            pieces = []
            for begin, end in itertools.pairwise(starts):
                before = tuple(states[n, user].transpose(0, 1).contiguous())  # h and c, (L, H) each
                if begin > 0 or episode_start[0, n]:
                    before = tuple(torch.zeros_like(part) for part in before)
                state = before if rnn.kind == "lstm" else before[0]
                pieces.append(torch.func.functional_call(module, named, (obs[begin:end, n], state))[0])
            sequences.append(torch.cat(pieces))
        outs.append(torch.stack(sequences, 1))  # (T, N, H)
    heads = []
    for name, x in (("actor", outs[0]), ("critic", outs[-1])):
        for layer in ("0", "head"):
            x = torch.nn.functional.linear(x, weights[f"{name}.{layer}.weight"].mT, weights[f"{name}.{layer}.bias"])
            x = x.tanh() if layer == "0" else x
        heads.append(x)
    return heads[0], heads[1].squeeze(-1)


@KINDS
@USERS
@LAYERS
@pytest.mark.parametrize("spaces", ["discrete", "continuous"])
def test_the_first_gradient_is_that_of_torch_on_split_sequences(kind, users, layers, spaces):
    """torch.nn run on each episode alone, torchrl's advantages, torch's distributions and autograd down to the flat buffer.

    Where no parameter has moved the ratio is 1: the policy's gradient is that of -A log pi. The first moment of a fresh Adam is
    a tenth of the gradient. Over ends of both kinds and rows that only reset; theirs in double.
    """
    policy, own_params, own_rollout = setting(spaces, kind, users, layers=layers, hidden=5)
    rollout = {key: x.double() if x.is_floating_point() else x for key, x in own_rollout.items()}
    params = own_params.double().requires_grad_()
    action, valid = rollout["action"][:12], rollout["valid"][:12]
    terminated, truncated = rollout["terminated"][:12], rollout["truncated"][:12]
    assert (terminated & ~truncated & valid).any()
    assert (truncated & ~terminated & valid).any()
    out, value = by_torch(policy, params, rollout["obs"], rollout["episode_start"], rollout["rnn_state"])
    judged = value.detach().unsqueeze(-1)
    ends = ((terminated | truncated).unsqueeze(-1), terminated.unsqueeze(-1))
    advantage, target = generalized_advantage_estimate(
        127 / 128, 61 / 64, judged[:-1], judged[1:], rollout["reward"][:12].unsqueeze(-1), *ends, time_dim=0
    )
    if spaces == "discrete":
        dist = torch.distributions.Categorical(logits=out[:12])
    else:
        normal = torch.distributions.Normal(out[:12], policy.weights(params)["actor.log_std"].exp())
        dist = torch.distributions.Independent(normal, 1)
    advantage = advantage.squeeze(-1)[valid]
    advantage = (advantage - advantage.mean()) / advantage.std()
    policy_loss = -(advantage * dist.log_prob(action)[valid]).mean()
    value_loss = torch.nn.functional.mse_loss(value[:12][valid], target.squeeze(-1)[valid])
    (expected,) = torch.autograd.grad(policy_loss + 0.5 * value_loss - 0.02 * dist.entropy()[valid].mean(), params)

    permutation = torch.tensor([[2, 0, 3, 1]])
    learned = update(policy, own_params, own_rollout, permutation, minibatch_size=48, max_grad_norm=1e9)
    assert column(learned, "ratio_deviation")[0] < 1e-5
    for name, gradient in policy.weights(10.0 * learned.adam.exp_avg).items():
        theirs = policy.weights(expected)[name].float()
        scale = theirs.abs().max().item()
        assert scale > 1e-4, name  # every weight has one
        torch.testing.assert_close(gradient, theirs, rtol=0, atol=1e-4 * scale, msg=lambda text, name=name: f"{name}: {text}")
    assert column(learned, "value_loss")[0] == pytest.approx(value_loss.item(), rel=1e-5)


@KINDS
@USERS
@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_an_episode_that_begins_in_the_middle_equals_the_halves_apart(kind, users, end):
    """10 rows of 3 environments, all of whose episodes end at row 4, give the losses and the gradient of 5 rows of 6.

    The first moment of a fresh Adam is a tenth of the gradient.
    """
    policy, params, rollout = setting(kind=kind, users=users, num_steps=10, num_envs=3)
    off = torch.zeros(11, 3, dtype=torch.bool)
    episode_start, ended = off.clone(), off.clone()
    episode_start[5] = ended[4] = True
    rollout |= {"terminated": off, "truncated": off, "valid": ~off, "episode_start": episode_start} | {end: ended}
    rollout["final_obs"] = torch.randn(rollout["obs"].shape, generator=torch.Generator().manual_seed(4))
    halves = {key: torch.cat((x[:6], x[5:]), 1) for key, x in rollout.items() if key != "rnn_state"}
    halves["rnn_state"] = torch.cat((rollout["rnn_state"], torch.zeros_like(rollout["rnn_state"])))
    options = {"minibatch_size": 30, "max_grad_norm": 1e9}
    whole = update(policy, params, rollout, torch.arange(3)[None], **options)
    apart = update(policy, params, halves, torch.arange(6)[None], **options)
    torch.testing.assert_close(whole.adam.exp_avg, apart.adam.exp_avg, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(whole.minibatch_metrics, apart.minibatch_metrics, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.explained_variance, apart.explained_variance, rtol=1e-4, atol=1e-5)
    for name, gradient in policy.weights(whole.adam.exp_avg).items():
        assert gradient.abs().max() > 1e-6, name  # every weight was compared, the recurrent ones too
    # without the start in the middle it is another gradient
    through = update(policy, params, rollout | {"episode_start": off}, torch.arange(3)[None], **options)
    assert (through.adam.exp_avg - whole.adam.exp_avg).abs().max() > 1e-4


class CountingPolicy:
    """A policy that notes which sequences it was shown. An observation is its row's number, as is its action."""

    rnn_state_size = 1

    def __init__(self):
        self.seen, self.episode_starts, self.memories, self.actions = [], [], [], []

    def weights(self, params):
        return {"w": params}

    def unroll(self, weights, obs, episode_start, rnn_state, cells):
        number = obs.squeeze(-1)
        self.seen.append(number.long())
        self.episode_starts.append(episode_start)
        self.memories.append(rnn_state)
        return number * weights["w"], number * weights["w"], rnn_state.expand(len(obs), *rnn_state.shape)

    def log_prob(self, dist, action):
        self.actions.append(action)
        return -0.001 * dist

    def entropy(self, dist):
        return dist


def test_every_environment_is_gathered_exactly_once_an_epoch():
    """Minibatches are the permutation's environments in order, each with all its rows in theirs, its own actions, episode

    starts and memory; each epoch shows each once, and never the bootstrap row T.
    """
    num_steps, num_envs, epochs = 6, 4, 3
    number = torch.arange((num_steps + 1) * num_envs).reshape(num_steps + 1, num_envs)
    off = torch.zeros_like(number, dtype=torch.bool)
    rollout = {"obs": number[..., None].float(), "action": number, "reward": torch.zeros_like(number, dtype=torch.float32)}
    rollout |= {"terminated": off, "truncated": off, "valid": ~off, "episode_start": number % 5 == 0}
    rollout["rnn_state"] = torch.arange(num_envs)[:, None].float()
    permutation = make_permutation(epochs, num_envs)
    policy = CountingPolicy()
    update(policy, torch.ones(1), rollout, permutation, minibatch_size=2 * num_steps)
    assert torch.equal(policy.seen[0], number)  # one pass over all T+1 rows
    assert torch.equal(policy.episode_starts[0], rollout["episode_start"])
    assert len(policy.seen) == 1 + 2 * epochs
    shown = zip(policy.seen[1:], policy.episode_starts[1:], policy.memories[1:], policy.actions[1:], strict=True)
    for environments, (seen, episode_start, rnn_state, action) in zip(permutation.reshape(-1, 2), shown, strict=True):
        assert torch.equal(seen, number[:num_steps, environments])
        assert torch.equal(action, seen)
        assert torch.equal(episode_start, seen % 5 == 0)
        assert torch.equal(rnn_state.squeeze(1), environments.float())
    for epoch in range(epochs):
        memories = torch.cat(policy.memories[1 + 2 * epoch : 3 + 2 * epoch])
        assert memories.flatten().sort().values.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("spaces", ["continuous", "masked"])
@pytest.mark.parametrize("microbatch_size", [1, 12, 26, 1000])
@KINDS
def test_parts_of_a_minibatch_add_up_to_it(kind, spaces, microbatch_size):
    """Working it off in parts, of environments when learning and of steps when judging, changes neither update nor metrics."""
    policy, params, rollout = setting(spaces, kind, num_steps=11)
    rollout |= {"final_" + key: x.flip(0) for key, x in rollout.items() if key.partition(".")[0] == "obs"}
    for options in ({"target_kl": 0.05}, {"advantage_estimator": "monte-carlo", "norm_adv": False, "clip_vloss": False}):
        options = {"minibatch_size": 22, **options}
        whole = update(policy, params, rollout, make_permutation(2, 4), **options)
        parts = update(policy, params, rollout, make_permutation(2, 4), microbatch_size=microbatch_size, **options)
        torch.testing.assert_close(parts.params, whole.params, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(parts.minibatch_metrics, whole.minibatch_metrics, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(parts.explained_variance, whole.explained_variance, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"target_kl": 0.05},
        {"advantage_estimator": "monte-carlo", "norm_returns": True, "microbatch_size": 6},
        {"norm_adv": False, "final_obs": True},
    ],
    ids=["gae", "monte-carlo", "final_obs"],
)
@KINDS
def test_workers_together_make_the_update_of_one(kind, options):
    """Each has its own environments, the memory at the start of them included."""
    options = dict(options)
    policy, params, rollout = setting(kind=kind, num_steps=6, num_envs=8)
    if options.pop("final_obs", False):
        rollout["final_obs"] = rollout["obs"].flip(0)
    options, permutation = {"minibatch_size": 24, **options}, make_permutation(3, 8)
    expected = update(policy, params, rollout, permutation, **options)
    assert_together(updates_of(2, policy, params, rollout, permutation, **options), expected)


def test_workers_collect_their_own_part():
    """Two calls of `collect`, each with half of the environments, walk as one call does with all; memory included."""
    bench, noise = Bench("device"), torch.randn(7, 4, 3, generator=torch.Generator().manual_seed(0))
    bench.collect()
    running = bench.running()
    arguments = (bench.params, OFF, running, noise, torch.rand(7, 4, 3))
    settings = {"policy": bench.policy.policy, "env_step": bench.collector.env_step}
    whole = collect(*arguments, **settings)
    parts = [collect(*arguments, torch.tensor([number, 0]), num_workers=2, **settings) for number in range(2)]
    assert len(whole.running) == len(running)
    for index, x in enumerate(whole.running):
        torch.testing.assert_close(torch.cat([part.running[index] for part in parts]), x)
    for name in ("obs", "action", "reward", "valid"):
        torch.testing.assert_close(torch.cat([getattr(part, name) for part in parts], 1), getattr(whole, name))


@KINDS
@USERS
def test_both_gradients_agree(kind, users):
    """The eager gradient and torch.func's, through the cells' own backward, give the same update and metrics."""
    policy, params, rollout = setting(kind=kind, users=users)
    one, two = (
        update(policy, params, rollout, make_permutation(2, 4), minibatch_size=24, grad_and_aux=function)
        for function in (grad_and_aux, functional_grad_and_aux)
    )
    torch.testing.assert_close(one.params, two.params, rtol=0, atol=1e-6)
    torch.testing.assert_close(one.minibatch_metrics, two.minibatch_metrics, rtol=1e-4, atol=1e-6)


@KINDS
def test_learn_writes_nothing_in_place(kind):
    """The rollout, its memory among the rest, and the parameters are as before."""
    policy, params, rollout = setting(kind=kind)
    tensors = [params, *rollout.values()]
    copies = [x.clone() for x in tensors]
    learned = update(policy, params, rollout, make_permutation(2, 4), minibatch_size=24)
    assert all(torch.equal(x, y) for x, y in zip(tensors, copies, strict=True))
    assert not learned.params.requires_grad


@KINDS
def test_learn_works_under_vmap_over_seeds(kind):
    """Two seeds in one call equal two calls."""
    policy, *_ = make_policy(kind)
    seeds = []
    for seed in (0, 1):
        _, _, rollout = setting(kind=kind, seed=seed + 5)
        seeds.append((make_params(policy, seed), rollout, make_permutation(2, 4, seed)))

    def one(params, rollout, permutation):
        options = {"minibatch_size": 24, "grad_and_aux": functional_grad_and_aux}
        learned = update(policy, params, rollout, permutation, **options)
        return learned.params, learned.minibatch_metrics

    params, metrics = torch.func.vmap(one)(*torch.utils._pytree.tree_map(lambda *x: torch.stack(x), *seeds))
    for index, arguments in enumerate(seeds):
        expected_params, expected_metrics = one(*arguments)
        torch.testing.assert_close(params[index], expected_params, rtol=0, atol=1e-5)
        torch.testing.assert_close(metrics[index], expected_metrics, rtol=1e-3, atol=1e-5)


@KINDS
@pytest.mark.parametrize("gradient", [grad_and_aux, functional_grad_and_aux])
def test_programs_run_without_data(kind, gradient):
    """On the meta device there is no value to ask for: a host sync or a shape that depends on data would raise."""
    policy, params, rollout = setting("masked", kind, layers=2)
    rollout |= {"final_" + key: x for key, x in rollout.items() if key.partition(".")[0] == "obs"}
    params, rollout, permutation, normalization = to_meta((params, rollout, make_permutation(2, 4), OFF))
    options = {"minibatch_size": 24, "target_kl": 0.01, "microbatch_size": 12, "grad_and_aux": gradient}
    learned = update(policy, params, rollout, permutation, normalization, **options)
    assert learned.minibatch_metrics.shape == (4, len(MINIBATCH_METRICS))
    assert all(x.is_meta for x in (learned.params, *learned.adam, *learned[2:]))
    row = {key: x[0] for key, x in obs_of(rollout).items()}
    noise = torch.zeros(4, 5, device="meta")
    episode_start = rollout["episode_start"][0]
    action, rnn_state = act_recurrent(
        policy, policy.weights(params), normalization, row, noise, rollout["rnn_state"], episode_start
    )
    assert action.shape == (4, 2)
    assert rnn_state.shape == rollout["rnn_state"].shape


@KINDS
def test_programs_never_ask_the_host(kind):
    """No `.item()`, no `bool(tensor)`, no masked selection inside `learn`, `act` or `collect`, with every option on."""
    policy, params, rollout = setting(kind=kind)
    rollout["final_obs"] = rollout["obs"]
    bench = Bench("device", kind=kind)
    running = bench.running()
    draws = torch.randn(7, 4, 3), torch.rand(7, 4, 3)
    with HostSyncs() as probe:
        bool(rollout["episode_start"].any())
    assert probe.found == ["_local_scalar_dense"]  # the probe sees it
    with HostSyncs() as syncs:
        update(policy, params, rollout, make_permutation(2, 4), minibatch_size=24, target_kl=0.01, microbatch_size=12)
        weights, episode_start = policy.weights(params), rollout["episode_start"][0]
        act_recurrent(policy, weights, OFF, rollout["obs"][0], torch.zeros(4, 3), rollout["rnn_state"], episode_start)
        bench.act(running, *draws)
    assert syncs.found == []


# --- the agent


def make_agent(kind="lstm", spaces="discrete", normalization=OFF, **options):
    """(agent, network, params) as load_policy makes it."""
    space, act_space = SPACES[spaces]
    network, spec, action = make_policy(kind, observation=space, action=act_space, **options)
    params = make_params(network)
    return Agent(space, spec, action, network, params, normalization), network, params


NORMALIZED = Normalization(
    {"obs": torch.tensor([0.5, -0.5, 0.0])}, {"obs": torch.tensor([2.0, 0.5, 1.0])}, None, torch.tensor(3.0), torch.tensor(2.0)
)


@KINDS
@USERS
def test_an_agent_goes_on_from_call_to_call(kind, users):
    """Actions and values of three episodes side by side, told of each end by a mask, are those that `learn` replays.

    The value is asked for before the action, twice, and moves nothing; it is in the environment's units.
    """
    agent, network, params = make_agent(kind, "continuous", NORMALIZED, users=users)
    obs = torch.randn(8, 3, 3, generator=torch.Generator().manual_seed(0))
    episode_start = torch.zeros(8, 3, dtype=torch.bool)
    episode_start[0] = episode_start[3, 1] = episode_start[5, 0] = episode_start[6, 0] = True
    nothing = torch.zeros(3, network.rnn_state_size)
    seen = normalize_obs(obs, NORMALIZED)
    (mean, _), value, rnn_state = network.unroll(network.weights(params), seen, episode_start, nothing, STEPS)
    for t in range(8):
        if t:
            agent.reset(episode_start[t].numpy() if t % 2 else episode_start[t])
        values = agent.value(obs[t]), agent.value(obs[t])
        assert torch.equal(*values)
        torch.testing.assert_close(values[0], value[t] * 2.0 + 3.0, rtol=1e-5, atol=1e-5)
        low, high = (torch.from_numpy(bound) for bound in (agent.action.space.low, agent.action.space.high))
        torch.testing.assert_close(agent.act(obs[t]), mean[t].clamp(low, high), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(agent.rnn_state, rnn_state[t], rtol=1e-5, atol=1e-5)
    agent.reset()
    torch.testing.assert_close(agent.value(obs[0]), value[0] * 2.0 + 3.0, rtol=1e-5, atol=1e-5)


@KINDS
def test_an_agent_of_one_environment(kind):
    """Observations without a batch axis are those of one environment, which a single True resets."""
    one, *_ = make_agent(kind)
    many, *_ = make_agent(kind)
    obs = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    for t in range(6):
        if t == 4:
            one.reset(True)
            many.reset([True])
        value = one.value(obs[t])
        assert value.shape == ()
        np.testing.assert_allclose(value, many.value(obs[t : t + 1])[0], rtol=1e-5, atol=1e-6)
        action = one.act(obs[t])
        assert one.action.space.contains(action)
        assert action == many.act(obs[t : t + 1])[0]
        assert torch.equal(one.rnn_state, many.rnn_state)
    fresh, *_ = make_agent(kind)
    fresh.act(obs[4])
    fresh.act(obs[5])
    torch.testing.assert_close(fresh.rnn_state, one.rnn_state, rtol=1e-5, atol=1e-6)


def test_an_agent_of_other_environments_is_told_so():
    """Another number of observations, or a mask of another number, than is remembered: an error, and nothing is forgotten."""
    agent, network, _ = make_agent()
    agent.reset(np.ones(4, bool))  # nothing to forget yet, of however many
    obs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    agent.act(obs[:3])
    before = agent.rnn_state.clone()
    for call in (agent.act, agent.value):
        with pytest.raises(ValueError, match=r"5 observations; this policy remembers 3 environments: reset\(\) it first"):
            call(obs)
        with pytest.raises(ValueError, match="1 observations"):
            call(obs[0])
    for mask in (np.ones(2, bool), True):
        with pytest.raises(ValueError, match="this policy remembers 3"):
            agent.reset(mask)
    with pytest.raises(ValueError, match="shape"):
        agent.act(obs[:3, :2])
    assert torch.equal(agent.rnn_state, before)
    agent.reset()
    agent.act(obs)
    assert agent.rnn_state.shape == (5, network.rnn_state_size)


def test_an_agents_masks_and_samples():
    """A structured observation with a mask: sampled actions are legal, seeded, and what is remembered does not hang on them."""
    agent, *_ = make_agent("gru", "masked")
    space = OBSERVATIONS["masked"]
    space.seed(0)
    sampled_obs = [space.sample() for _ in range(12)]
    batch = {key: np.stack([obs[key] for obs in sampled_obs]) for key in space.spaces}
    batch["action_mask"] = np.tile(np.array([0, 1, 1, 0, 1], np.int8), (12, 1))
    taken, memories = [], []
    for seed in (1, 1, 2):
        agent.reset()
        agent.seed(seed)
        taken.append(np.stack([agent.act(batch, deterministic=False) for _ in range(4)]))
        memories.append(agent.rnn_state.clone())
    np.testing.assert_array_equal(taken[0], taken[1])
    assert (taken[0] != taken[2]).any()
    assert torch.equal(memories[0], memories[2])
    assert set(taken[0][..., 0].flatten()) == {1}
    assert set(taken[0][..., 1].flatten()) == {0, 2}


# --- compiled


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    cache_dir = tmp_path_factory.mktemp("cache")
    cache_dir.chmod(0o700)
    return cache_dir


def learn_job(kind, spaces="discrete", seed=0, users=2, layers=1, hidden=5, num_envs=6, per_minibatch=3, **settings):
    """(learn, arguments): 12 steps, minibatches of whole environments, two epochs."""
    options = {"users": users, "layers": layers, "hidden": hidden}
    policy, _, rollout = setting(spaces, kind, num_envs=num_envs, seed=seed + 1, **options)
    params = make_params(policy, seed)
    if settings.pop("final_obs", False):
        rollout |= {"final_" + key: x.flip(0) for key, x in rollout.items() if key.partition(".")[0] == "obs"}
    schedule = Schedule(torch.tensor(1e-3), torch.tensor(0.2), torch.tensor(0.01))
    settings = SETTINGS | {"minibatch_size": 12 * per_minibatch} | settings
    arguments = (params, init_adam(params), rollout, make_permutation(2, num_envs, seed), schedule, OFF)
    return functools.partial(learn, policy=policy, **settings), arguments


def assert_compiled(job, cache_dir, **shared):
    """Compiled for one seed's arguments, equal to eager for those of three."""
    program, arguments = job(seed=0)
    compiled = compile_program(functools.partial(program, **shared), arguments, cache_dir)
    for seed in range(3):
        _, arguments = job(seed=seed)
        assert_same(compiled(*arguments), program(*arguments))


@pytest.mark.usefixtures("needs_compiler")
def test_compiled_learn_equals_eager(cache_dir):
    """Parameters, Adam's state and every metric, of two users of an LSTM whose sizes fill no vector of the processor."""
    assert_compiled(functools.partial(learn_job, "lstm", target_kl=0.5), cache_dir)


@pytest.mark.usefixtures("needs_compiler")
@pytest.mark.slow  # most of a minute of compiling each
@pytest.mark.parametrize(
    ("kind", "options", "shared"),
    [
        ("gru", {"num_envs": 7, "per_minibatch": 1}, {}),
        ("gru", {"users": 1, "layers": 2, "hidden": 16, "num_envs": 8, "per_minibatch": 4}, {}),
        ("gru", {"spaces": "continuous", "num_envs": 14, "per_minibatch": 14, "final_obs": True}, {"num_workers": 2}),
        ("lstm", {"users": 1, "num_envs": 7, "per_minibatch": 7, "final_obs": True}, {}),
        ("lstm", {"spaces": "continuous", "layers": 2, "hidden": 17, "num_envs": 4, "per_minibatch": 1}, {}),
        ("lstm", {"num_envs": 12, "per_minibatch": 6}, {"num_workers": 2, "microbatch_size": 12}),
        ("lstm", {"spaces": "masked", "num_envs": 4, "per_minibatch": 4}, {"microbatch_size": 24}),
        ("lstm", {"advantage_estimator": "monte-carlo", "norm_returns": True, "num_envs": 2, "per_minibatch": 2}, {}),
        # of 73,000 gradients some are as small as their rounding, which Adam divides by itself: not so with this eps
        ("gru", {"spaces": "image", "num_envs": 3, "per_minibatch": 3, "adam_eps": 1e-3}, {"microbatch_size": 24}),
    ],
    ids=lambda value: " ".join(f"{key}={x}" for key, x in value.items()) if isinstance(value, dict) else value,
)
def test_compiled_learn_equals_eager_for(kind, options, shared, cache_dir):
    """Cells side by side and in layers, 1 to 14 environments at once, workers, parts, final observations, structures."""
    assert_compiled(functools.partial(learn_job, kind, **options), cache_dir, **shared)


@KINDS
@USERS
def test_traced_learn_has_the_cells_of_the_library(kind, users):
    """What the compiler is given goes through the library's loops, forward and backward, and not through a step at a time."""
    program, arguments = learn_job(kind, users=users, layers=2)
    graph, _ = inductor._trace(program, arguments)
    graphs = [module.graph for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
    called = {str(node.target) for one in graphs for node in one.nodes}
    assert {f"fastppo.{kind}.default", f"fastppo.{kind}_backward.default"} <= called


def act_job(kind, number, seed=0, num_seeds=None, **options):
    """(act, arguments) of `number` environments, some of which begin an episode; of many seeds with those first."""
    policy, *_ = make_policy(kind, observation=VECTOR, **options)
    generator = torch.Generator().manual_seed(seed)
    lead = () if num_seeds is None else (num_seeds,)
    params = [make_params(policy, seed + index) for index in range(num_seeds or 1)]
    shape = (*lead, number)
    noise = torch.randn(*shape, 3, generator=generator)
    obs = torch.randn(*shape, 3, generator=generator)
    rnn_state = torch.randn(*shape, policy.rnn_state_size, generator=generator)
    episode_start = torch.rand(shape, generator=generator) < 0.3
    normalization = OFF if num_seeds is None else Normalization(None, None, None, torch.zeros(lead), torch.ones(lead))
    arguments = (torch.stack(params) if lead else params[0], normalization, obs, noise, rnn_state, episode_start)
    return functools.partial(act_recurrent_from_params, policy=policy), arguments


def assert_acts_alike(result, expected):
    torch.testing.assert_close(result[1], expected[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(result[0], expected[0])


@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["traced", "compiled"])
def test_compiled_act_equals_eager(compiles, cache_dir, request):
    """Action and memory of 7 environments, step after step; what was remembered at an episode's start is dropped."""
    act, arguments = act_job("lstm", 7, hidden=5)
    if compiles:
        request.getfixturevalue("needs_compiler")
        compiled = compile_program(act, arguments, cache_dir)
    else:
        graph, _ = inductor._trace(act, arguments)
        compiled = lambda *given: graph(*inductor._tensors(given))  # noqa: E731
    rnn_state = arguments[4]
    for seed in range(6):
        params, normalization, obs, noise, _, episode_start = act_job("lstm", 7, seed, hidden=5)[1]
        expected = act(params, normalization, obs, noise, rnn_state, episode_start)
        result = compiled(params, normalization, obs, noise, rnn_state, episode_start)
        assert_acts_alike(result, expected)
        rnn_state = result[1]


@pytest.mark.usefixtures("needs_compiler")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "number", "options"),
    [("gru", 1, {}), ("gru", 3, {"users": 1, "layers": 2}), ("lstm", 4, {"layers": 2}), ("lstm", 1, {"users": 1, "hidden": 5})],
)
def test_compiled_act_equals_eager_for(kind, number, options, cache_dir):
    """Shared, in layers, one environment."""
    compiled = compile_program(*act_job(kind, number, **options), cache_dir)
    for seed in range(4):
        act, arguments = act_job(kind, number, seed, **options)
        assert_acts_alike(compiled(*arguments), act(*arguments))


@pytest.mark.usefixtures("needs_compiler")
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "per_call"), [("lstm", 1), ("lstm", 2), ("gru", 3)])
def test_compiled_act_of_seeds_equals_each_alone(kind, per_call, cache_dir):
    """Mapped over all seeds, two at a time and one by one."""
    act, arguments = act_job(kind, 3, num_seeds=3)
    compiled = compile_program(act, arguments, cache_dir, Seeds(3, per_call, 1))
    action, rnn_state = compiled(*arguments)
    for seed in range(3):
        assert_acts_alike((action[seed], rnn_state[seed]), act(*of_seed(arguments, seed)))


def collect_job(kind, num_seeds=None, num_envs=4, **options):
    """(collect, arguments) of walks under way."""
    each = []
    for seed in range(num_seeds or 1):
        bench = Bench("device", kind=kind, num_envs=num_envs, seed=seed, **options)
        bench.collect()
        draws = torch.Generator().manual_seed(seed)
        noise, random = torch.randn(7, num_envs, 3, generator=draws), torch.rand(7, num_envs, 3, generator=draws)
        each.append((make_params(bench.policy.policy, seed), OFF, bench.running(), noise, random))
    settings = {"policy": bench.policy.policy, "env_step": bench.collector.env_step}
    return functools.partial(collect, **settings), each[0] if num_seeds is None else stack(each)


def assert_collected_alike(result, expected):
    for key in ("action", "terminated", "truncated", "valid", "finite"):
        assert torch.equal(getattr(result, key), getattr(expected, key)), key
    for key in ("obs", "reward", "running"):
        torch.testing.assert_close(getattr(result, key), getattr(expected, key), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("needs_compiler")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "workers"), [("lstm", {}, 2), ("gru", {"users": 1, "layers": 2}, 1)], ids=["lstm", "gru"]
)
def test_compiled_collect_equals_eager(kind, options, workers, cache_dir):
    """Every row, and what is carried on: the environments, what is remembered of them, and which begin an episode."""
    program, arguments = collect_job(kind, num_envs=6, **options)
    compiled = compile_program(functools.partial(program, num_workers=workers), arguments, cache_dir)
    ended = 0
    for _ in range(4):
        expected = program(*arguments)
        assert_collected_alike(compiled(*arguments), expected)
        ended += int((expected.terminated | expected.truncated).sum())
        arguments = (*arguments[:2], expected.running, *arguments[3:])
    assert ended > 12


@pytest.mark.usefixtures("needs_compiler")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "seeds"), [("gru", Seeds(3, 1, 2)), ("lstm", Seeds(3, 2, 1)), ("gru", Seeds(3, 3, 1))], ids=str
)
def test_compiled_collect_of_seeds_equals_each_alone(kind, seeds, cache_dir):
    """One by one on two threads, two at a time, and all at once."""
    program, arguments = collect_job(kind, 3)
    collected = compile_program(program, arguments, cache_dir, seeds)(*arguments)
    for seed in range(3):
        assert_collected_alike(of_seed(collected, seed), program(*of_seed(arguments, seed)))


@pytest.mark.usefixtures("needs_compiler")
@pytest.mark.slow
@pytest.mark.parametrize("seeds", [Seeds(3, 1, 2), Seeds(3, 2, 1)], ids=str)
def test_compiled_learn_of_seeds_equals_each_alone(seeds, cache_dir):
    """Seed by seed on two threads, as runs of many seeds do it, and mapped."""
    examples = [learn_job("lstm", seed=seed) for seed in range(3)]
    stacked = stack([arguments for _, arguments in examples])
    learned = compile_program(examples[0][0], stacked, cache_dir, seeds)(*stacked)
    for seed, (program, arguments) in enumerate(examples):
        assert_same(of_seed(learned, seed), program(*arguments))
