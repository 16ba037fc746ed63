"""Policies that remember: what acts is what learns, over episode ends and over rollouts, however environments reset.

The cells themselves are held against torch.nn in tests/test_recurrence.py.
"""

import copy
import itertools

import numpy as np
import pytest
import torch
from environments import ACTIONS, OBSERVATIONS, VECTOR

from fastppo import TrainConfig
from fastppo.core.contracts import normalize_obs
from fastppo.core.recurrence import STEPS
from fastppo.policy.agent import Agent
from fastppo.policy.make_network import make_network
from fastppo.policy.rnn import Rnn
from fastppo.policy.spaces import action_spec, obs_spec
from support.programs import OFF
from support.recurrent import KINDS, LAYERS, NORMALIZED, SPACES, USERS, make_params, make_policy

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


# --- the agent


def make_agent(kind="lstm", spaces="discrete", normalization=OFF, **options):
    """(agent, network, params) as load_policy makes it."""
    space, act_space = SPACES[spaces]
    network, spec, action = make_policy(kind, observation=space, action=act_space, **options)
    params = make_params(network)
    return Agent(space, spec, action, network, params, normalization), network, params


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


def test_two_clients_of_one_agent():
    """Each with a memory of its own acts as with a policy of its own; the policy's own memory does not move."""
    served, *_ = make_agent()
    apart = [make_agent()[0] for _ in range(2)]
    clients = [served.new_memory() for _ in range(2)]
    obs = np.random.default_rng(0).normal(size=(5, 2, 3, 3)).astype(np.float32)
    for t in range(5):
        for client, memory, alone in zip(range(2), clients, apart, strict=True):
            if t == 3 and client == 1:
                memory.reset([True, False, False])
                alone.reset([True, False, False])
            value = served.value(obs[t, client], memory=memory)
            np.testing.assert_array_equal(value, alone.value(obs[t, client]))
            np.testing.assert_array_equal(served.act(obs[t, client], memory=memory), alone.act(obs[t, client]))
            assert torch.equal(memory.rnn_state, alone.rnn_state)
    assert served.rnn_state is None
    copied = copy.copy(apart[0])  # it remembers the same and goes its own way
    assert torch.equal(copied.rnn_state, apart[0].rnn_state)
    copied.reset()
    assert apart[0].rnn_state is not None
    before, kept = copy.copy(clients[0]), clients[0].rnn_state.clone()
    served.act(obs[0, 0], memory=clients[0])
    assert torch.equal(before.rnn_state, kept)
    assert not torch.equal(clients[0].rnn_state, kept)
    with pytest.raises(ValueError, match="1 observations; this policy remembers 3"):
        served.act(obs[0, 0, 0], memory=clients[0])


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
