"""Environments on the device: each held to gymnasium's step by step; the autoreset rule; purity; wrapper; how they are made."""

import sys
from dataclasses import dataclass
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from gymnasium.vector import AutoresetMode, VectorWrapper
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves, tree_map

from fastppo import TrainingFault, train
from fastppo.envs.classic import CLASSIC, CartPole, Pendulum, PendulumState
from fastppo.envs.device import Running, TorchVectorEnv, autoreset_step, start
from fastppo.envs.factory import EnvConfig, make_device_envs
from fastppo.errors import UsageError
from support.runs import tiny

IDS = sorted(CLASSIC)
VARIANTS = [
    *((env_id, {}) for env_id in IDS),
    ("CartPole-v1", {"sutton_barto_reward": True}),
    ("MountainCar-v0", {"goal_velocity": 0.03}),
    ("MountainCarContinuous-v0", {"goal_velocity": 0.02}),
    ("Pendulum-v1", {"g": 9.81}),
]
VARIANT_NAMES = [" ".join([env_id, *map(str, kwargs)]) for env_id, kwargs in VARIANTS]

# How far one float32 step may be from gymnasium's float64 step out of the same state: (state and observation in 99 % of the
# states, in all of them, reward). Two to four times what was seen. Pendulum's angle goes to 70 rad, where one unit in the last
# place is 8e-6. Acrobot's worst are at its highest speeds, where its Runge-Kutta step multiplies any rounding; typical is 2e-7.
FLOAT32_TOLERANCE = {
    "Acrobot-v1": (1e-4, 1e-2, 0.0),
    "CartPole-v0": (1e-6, 1e-6, 0.0),
    "CartPole-v1": (1e-6, 1e-6, 0.0),
    "MountainCar-v0": (3e-7, 3e-7, 0.0),
    "MountainCarContinuous-v0": (3e-7, 3e-7, 1e-5),
    "Pendulum-v1": (1e-5, 1e-5, 1e-4),
}


def reference(env_id, kwargs):
    """Gymnasium's environment without its wrappers."""
    return gym.make(env_id, **kwargs).unwrapped


def put(env, env_id, row):
    """Give gymnasium's environment the state `row`, (S,) float64."""
    env.state = tuple(row) if env_id == "MountainCar-v0" else np.array(row, np.float64)
    if env_id.startswith("CartPole"):
        env.steps_beyond_terminated = None


def table(state):
    """The tensors of a state, as rows (N, S) of those that gymnasium's `state` holds."""
    tensors = state[:2] if isinstance(state, PendulumState) else state
    return torch.stack(tuple(tensors), -1)


def from_table(env, rows):
    """The state of `env` with these rows, (N, S)."""
    kind = type(env.reset(torch.zeros(1, env.num_random))[0])
    columns = list(rows.unbind(-1))
    return kind(*columns, *[torch.zeros_like(columns[0])] * (len(kind._fields) - len(columns)))


def some_actions(env, generator, *shape, dtype=torch.float32):
    """Random actions, those of a Box half as large again as its bounds."""
    if isinstance(env.action_space, Discrete):
        return torch.randint(int(env.action_space.n), shape, generator=generator)
    high = torch.from_numpy(env.action_space.high).to(dtype)
    return 1.5 * high * (2 * torch.rand((*shape, *high.shape), generator=generator, dtype=dtype) - 1)


def some_states(env_id, generator, count):
    """States all over where the environment goes, (count, S) float32, every kind of edge among them."""
    low, high = {
        "Acrobot-v1": ([-3.1415925, -3.1415925, -12.566, -28.274], [3.1415925, 3.1415925, 12.566, 28.274]),
        "CartPole": ([-2.45, -4, -0.22, -4], [2.45, 4, 0.22, 4]),
        "MountainCar-v0": ([-1.2, -0.07], [0.6, 0.07]),
        "MountainCarContinuous-v0": ([-1.2, -0.07], [0.6, 0.07]),
        "Pendulum-v1": ([-70.0, -8.0], [70.0, 8.0]),
    }["CartPole" if env_id.startswith("CartPole") else env_id]
    low, high = torch.tensor(low), torch.tensor(high)
    states = low + (high - low) * torch.rand((count, len(low)), generator=generator)
    on_the_edge = torch.rand(states.shape, generator=generator)
    states = torch.where(on_the_edge < 0.05, low, torch.where(on_the_edge > 0.95, high, states))
    calm = torch.rand((count, 1), generator=generator) < 0.2  # slow, near the middle: where episodes begin
    return torch.where(calm, 0.05 * states, states)


def gym_step(env, env_id, row, action):
    """One step of gymnasium's environment out of `row`: state after it, observation, reward, terminated."""
    put(env, env_id, row)
    obs, reward, terminated, truncated, _ = env.step(int(action) if action.ndim == 0 else action.numpy())
    assert not truncated
    return np.array(env.state, np.float64), obs, reward, terminated


def wrapped_difference(env_id, ours, theirs):
    """|ours - theirs| of states, with Acrobot's angles compared around the circle."""
    difference = np.abs(ours - theirs)
    if env_id == "Acrobot-v1":
        difference[..., :2] = np.minimum(difference[..., :2], 2 * np.pi - difference[..., :2])
    return difference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("env_id", "kwargs"), VARIANTS, ids=VARIANT_NAMES)
def test_one_step_equals_gymnasiums(env_id, kwargs, dtype):
    """Three thousand transitions from states everywhere, each begun afresh, so that no drift excuses an error.

    In float64 the same functions agree to the last digits: what float32 differs by is rounding, and no term is missing.
    """
    generator = torch.Generator().manual_seed(1)
    env, theirs = CLASSIC[env_id](**kwargs), reference(env_id, kwargs)
    rows, action = some_states(env_id, generator, 3000), some_actions(env, generator, 3000)
    action = action.to(dtype) if action.is_floating_point() else action
    expected = [gym_step(theirs, env_id, row, one) for row, one in zip(rows.double().numpy(), action, strict=True)]
    their_state, their_obs, their_reward, their_end = (np.array(column) for column in zip(*expected, strict=True))
    state, obs, reward, terminated, truncated = env.step(
        from_table(env, rows.to(dtype)), action, torch.zeros(3000, 4, dtype=dtype)
    )
    assert obs.dtype == reward.dtype == dtype
    assert not truncated.any()
    assert terminated.any() == (env_id != "Pendulum-v1")
    most, worst, in_reward = FLOAT32_TOLERANCE[env_id]
    if dtype == torch.float64:  # gymnasium's MountainCarContinuous rounds its own state to float32
        most = worst = {"MountainCarContinuous-v0": 1e-7}.get(env_id, 1e-10)
        in_reward = 1e-12
    difference = wrapped_difference(env_id, table(state).double().numpy(), their_state).max(1)
    if env_id == "Acrobot-v1":
        assert table(state)[:, :2].abs().max() < np.pi + 1e-6
    assert np.quantile(difference, 0.99) < most
    assert difference.max() < worst
    assert obs.double().numpy() == pytest.approx(their_obs, abs=worst, rel=1e-7)
    same_end = terminated.numpy() == their_end
    assert same_end.all() if dtype == torch.float64 else same_end.mean() > 0.999  # either answer is right within rounding
    assert np.abs(reward.double().numpy() - their_reward)[same_end].max() <= in_reward


@pytest.mark.parametrize(("env_id", "kwargs"), VARIANTS, ids=VARIANT_NAMES)
def test_whole_episodes_equal_gymnasiums(env_id, kwargs):
    """In float64 the same functions stay with gymnasium to the end of whole episodes, though Acrobot is chaotic."""
    generator = torch.Generator().manual_seed(2)
    env, theirs = CLASSIC[env_id](**kwargs), reference(env_id, kwargs)
    tolerance = {"Acrobot-v1": 1e-3, "MountainCarContinuous-v0": 1e-4}.get(env_id, 1e-9)
    ended = []
    for episode in range(3):
        random = torch.rand((1, env.num_random), generator=generator, dtype=torch.float64)
        state, obs = env.reset(random)
        put(theirs, env_id, table(state)[0].numpy())
        for t in range(gym.spec(env_id).max_episode_steps):
            action = steered(env_id, obs[0], some_actions(env, generator, 1, dtype=torch.float64), episode)
            discrete = isinstance(env.action_space, Discrete)
            told = theirs.step(int(action) if discrete else action[0].numpy())
            state, obs, reward, terminated, _ = env.step(state, action, random)
            difference = wrapped_difference(env_id, table(state)[0].numpy(), np.array(theirs.state, np.float64))
            assert difference.max() < tolerance, (episode, t)
            assert obs[0].numpy() == pytest.approx(told[0], abs=max(tolerance, 1e-6)), (episode, t)
            assert reward.item() == pytest.approx(told[1], abs=1e-9), (episode, t)
            assert terminated.item() == told[2], (episode, t)
            if told[2]:
                break
        ended.append((told[2], t))
    if env_id == "Pendulum-v1":
        assert not any(end for end, _ in ended)
    elif env_id.startswith("CartPole"):
        assert ended[2][1] > 5 * max(ended[0][1], ended[1][1])  # balanced
    elif not kwargs:
        assert ended[2][0]  # got to the goal


def steered(env_id, obs, random_action, episode):
    """Random actions in the first two episodes; in the third a policy that does what the environment is about."""
    if episode < 2 or env_id == "Pendulum-v1":
        return random_action
    if env_id.startswith("CartPole"):
        return (obs[2] + 0.3 * obs[3] + 0.02 * obs[0] + 0.05 * obs[1] > 0).long()[None]
    with_the_motion = (obs[5 if env_id == "Acrobot-v1" else 1] >= 0).long()[None]
    return 2 * with_the_motion[:, None].to(obs.dtype) - 1 if env_id == "MountainCarContinuous-v0" else 2 * with_the_motion


def test_the_wall_stops_the_car():
    """At the left bound a car that drives into it stands, and one that leaves it does not, as in gymnasium."""
    for env_id in ("MountainCar-v0", "MountainCarContinuous-v0"):
        env, theirs = CLASSIC[env_id](), reference(env_id, {})
        rows = torch.tensor([[-1.2, -0.07], [-1.19, -0.05], [-1.2, 0.0], [-1.2, 0.03], [-1.15, -0.07]])
        action = torch.zeros(5, dtype=torch.int64) if env_id == "MountainCar-v0" else -torch.ones(5, 1)
        state = env.step(from_table(env, rows), action, torch.zeros(5, 1))[0]
        assert state.velocity[:2].tolist() == [0.0, 0.0]
        assert state.position[:2].tolist() == [pytest.approx(-1.2)] * 2
        for row, one, new in zip(rows.double().numpy(), action, table(state).numpy(), strict=True):
            assert new == pytest.approx(gym_step(theirs, env_id, row, one)[0], abs=5e-7)


def test_the_goal_wants_its_velocity():
    """`goal_velocity` is compared after the step; the continuous car is paid 100 there and -0.1 action^2 unclipped."""
    env = CLASSIC["MountainCarContinuous-v0"](goal_velocity=0.02)
    state = from_table(env, torch.tensor([[0.44, 0.03], [0.44, 0.012], [0.30, 0.05]]))
    reward, terminated = env.step(state, torch.full((3, 1), 2.0), torch.zeros(3, 1))[2:4]
    assert terminated.tolist() == [True, False, False]
    assert reward.tolist() == pytest.approx([99.6, -0.4, -0.4], abs=1e-5)


def ks_statistic(a, b):
    """The two-sample Kolmogorov-Smirnov statistic: the largest distance of the two empirical distribution functions."""
    points = np.concatenate([a, b])
    below_a = np.searchsorted(np.sort(a), points, side="right") / len(a)
    below_b = np.searchsorted(np.sort(b), points, side="right") / len(b)
    return np.abs(below_a - below_b).max()


@pytest.mark.parametrize("env_id", IDS)
def test_first_states_are_distributed_as_gymnasiums(env_id):
    """Each component of the state: two-sample Kolmogorov-Smirnov at the level 0.001 and the bounds; components independent."""
    count = 3000
    envs = make_device_envs(EnvConfig(env_id, count), "cpu")
    obs, _ = envs.reset(seed=3)
    ours = table(envs.running.state).double().numpy()
    theirs = reference(env_id, {})
    theirs.reset(seed=4)
    rows = []
    for _ in range(count):
        their_obs, _ = theirs.reset()
        rows.append(np.array(theirs.state, np.float64))
    rows = np.array(rows)
    assert obs.shape[1:] == their_obs.shape
    for column in range(ours.shape[1]):
        assert ks_statistic(ours[:, column], rows[:, column]) < 1.95 * np.sqrt(2 / count), column
        bounds = [(values[:, column].min(), values[:, column].max()) for values in (ours, rows)]
        assert bounds[0] == pytest.approx(bounds[1], abs=0.01 * np.ptp(rows[:, column])), column
    moving = ours[:, ours.std(0) > 0]
    if moving.shape[1] > 1:
        assert np.abs(np.corrcoef(moving.T) - np.eye(moving.shape[1])).max() < 0.08


@pytest.mark.parametrize("env_id", IDS)
def test_the_first_observation_is_that_of_the_first_state(env_id):
    """reset's observation is what gymnasium says of the same state."""
    envs = make_device_envs(EnvConfig(env_id, 5), "cpu")
    obs, info = envs.reset(seed=5)
    assert info == {}
    theirs = reference(env_id, {})
    for row, seen in zip(table(envs.running.state).double().numpy(), obs, strict=True):
        put(theirs, env_id, row)
        told = theirs._get_ob() if env_id == "Acrobot-v1" else theirs._get_obs() if env_id == "Pendulum-v1" else row
        assert seen.numpy() == pytest.approx(told, abs=1e-6)


@pytest.mark.parametrize("env_id", IDS)
def test_spaces_and_time_limits_are_the_registered_ones(env_id):
    """What a policy is built for, and when an episode is cut, come from the table as from gymnasium's registry."""
    envs, theirs = make_device_envs(EnvConfig(env_id, 3), "cpu"), gym.make_vec(env_id, 3, vectorization_mode="sync")
    assert envs.single_observation_space == theirs.single_observation_space
    assert envs.single_action_space == theirs.single_action_space
    assert envs.observation_space == theirs.observation_space
    assert envs.action_space == theirs.action_space
    assert envs.env.max_episode_steps == gym.spec(env_id).max_episode_steps
    assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert envs.metadata["render_fps"] == theirs.envs[0].metadata["render_fps"]
    assert env_id in repr(envs)
    theirs.close()


def test_the_table_is_all_of_classic_control():
    """A classic-control environment that gymnasium adds shows up here."""
    entry = "gymnasium.envs.classic_control"
    assert sorted(CLASSIC) == sorted(name for name, spec in gym.registry.items() if str(spec.entry_point).startswith(entry))


@pytest.mark.parametrize("env_id", IDS)
def test_episodes_end_and_begin_as_under_gymnasiums_own_rule(env_id):
    """Beside SyncVectorEnv, started from the same states at every reset, whatever action comes on the resetting row."""
    generator = torch.Generator().manual_seed(6)
    limit = 15
    envs = make_device_envs(EnvConfig(env_id, 4, env_kwargs={"max_episode_steps": limit}), "cpu")
    theirs = gym.make_vec(env_id, 4, vectorization_mode="sync", max_episode_steps=limit)
    assert theirs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    obs, _ = envs.reset(seed=7)
    theirs.reset(seed=0)
    fresh = torch.ones(4, dtype=torch.bool)
    ends, resets = 0, 0
    for _ in range(80):
        for index in torch.nonzero(fresh).flatten().tolist():
            put(theirs.envs[index].unwrapped, env_id, table(envs.running.state)[index].double().numpy())
        action = some_actions(envs.env, generator, 4)
        if env_id.startswith("CartPole"):
            action = torch.tensor([1, 0, int(obs[2, 2] > 0), int(action[3])])
        before = envs.running.done
        obs, reward, terminated, truncated, info = envs.step(action)
        told = theirs.step(action.numpy())
        assert info == {}
        assert torch.equal(terminated, torch.from_numpy(told[2]))
        assert torch.equal(truncated, torch.from_numpy(told[3]))
        assert reward.numpy() == pytest.approx(told[1], abs=1e-4)
        assert obs[~before].numpy() == pytest.approx(told[0][~before.numpy()], abs=1e-3)
        assert (reward[before] == 0).all()
        assert (envs.running.elapsed[before] == 0).all()
        assert torch.equal(envs.running.done, terminated | truncated)
        assert torch.equal(envs.running.obs, obs)
        fresh = before
        ends, resets = ends + int((terminated | truncated).sum()), resets + int(before.sum())
    assert ends >= 4 * (80 // (limit + 1))
    assert ends - 4 <= resets <= ends
    theirs.close()


def test_a_resetting_row_ignores_its_action():
    """Two different actions, one not even a number, on a row that resets give the same bits."""
    env = Pendulum()
    random = torch.rand((2, 2), generator=torch.Generator().manual_seed(8))
    running = start(env, random)._replace(done=torch.tensor([True, False]))
    a, told_a = autoreset_step(env, running, torch.tensor([[1.0], [0.5]]), random)
    b, told_b = autoreset_step(env, running, torch.tensor([[float("nan")], [0.5]]), random)
    assert all(torch.equal(x, y) for x, y in zip(tree_leaves((a, told_a)), tree_leaves((b, told_b)), strict=True))
    assert torch.equal(told_a.obs[0], env.reset(random)[1][0])
    assert a.elapsed.tolist() == [0, 1]


def test_a_limit_of_one_step_and_none():
    """Every step ends an episode, every other row resets; without a limit nothing is ever truncated."""
    envs = TorchVectorEnv(Pendulum(max_episode_steps=1), 2)
    envs.reset(seed=0)
    assert [envs.step(torch.zeros(2, 1))[3].all().item() for _ in range(4)] == [True, False, True, False]
    envs = TorchVectorEnv(Pendulum(max_episode_steps=None), 2)
    envs.reset(seed=0)
    assert not any(envs.step(torch.zeros(2, 1))[3].any() for _ in range(300))


def first_moment(env, count, seed=9, device="cpu"):
    """Running environments, one of them about to reset, an action and random numbers for the next step."""
    generator = torch.Generator().manual_seed(seed)
    running = start(env, torch.rand((count, env.num_random), generator=generator))
    running = running._replace(done=torch.arange(count) % 3 == 1)
    action, random = some_actions(env, generator, count), torch.rand((count, env.num_random), generator=generator)
    return tree_map(lambda tensor: tensor.to(device), (running, action, random))


@pytest.mark.parametrize("env_id", IDS)
def test_nothing_is_written_or_shared(env_id):
    """Inputs keep their bits; what is kept for the next step is contiguous and shares no memory, also not with inputs."""
    env = CLASSIC[env_id]()
    inputs = first_moment(env, 6)
    kept = tree_map(torch.clone, inputs)
    versions = [tensor._version for tensor in tree_leaves(inputs)]
    running, result = autoreset_step(env, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(inputs), tree_leaves(kept), strict=True))
    assert versions == [tensor._version for tensor in tree_leaves(inputs)]
    for moment in (start(env, inputs[2]), running):
        tensors = tree_leaves((moment, inputs))
        assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)
        assert all(tensor.is_contiguous() for tensor in tree_leaves(moment))
    assert [tensor.dtype for tensor in tree_leaves(running)] == [tensor.dtype for tensor in tree_leaves(inputs[0])]
    assert [tensor.dtype for tensor in result] == [torch.float32, torch.float32, torch.bool, torch.bool]


@pytest.mark.parametrize("env_id", IDS)
def test_it_runs_on_the_meta_device(env_id):
    """reset, step and the autoreset rule ask the host for no value and bring no host tensor along: meta raises on both."""
    env = CLASSIC[env_id]()
    on_meta = first_moment(env, 6, device="meta")
    started = start(env, torch.rand((6, env.num_random), device="meta"))
    for moment, like in ((started, first_moment(env, 6)[0]), (autoreset_step(env, *on_meta)[0], on_meta[0])):
        described = [[(t.shape, t.dtype) for t in tree_leaves(tree)] for tree in (moment, like)]
        assert described[0] == described[1]
        assert all(tensor.is_meta for tensor in tree_leaves(moment))


@pytest.mark.parametrize("env_id", IDS)
def test_it_runs_under_vmap(env_id):
    """A leading axis of seeds gives what a loop over the seeds gives."""
    env = CLASSIC[env_id]()
    seeds = [first_moment(env, 4, seed) for seed in range(3)]
    stacked = tree_map(lambda *tensors: torch.stack(tensors), *seeds)
    outcome = torch.func.vmap(lambda running, action, random: autoreset_step(env, running, action, random))(*stacked)
    started = torch.func.vmap(lambda random: start(env, random))(stacked[2])
    for index, inputs in enumerate(seeds):
        expected = (autoreset_step(env, *inputs), start(env, inputs[2]))
        for got, tensor in zip(tree_leaves((outcome, started)), tree_leaves(expected), strict=True):
            torch.testing.assert_close(got[index], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("env_id", IDS)
def test_it_can_be_traced(env_id):
    """make_fx records one straight program, which gives on other inputs what the function gives."""
    env = CLASSIC[env_id]()
    program = make_fx(lambda *inputs: autoreset_step(env, *inputs), tracing_mode="fake")(*first_moment(env, 5, 1))
    inputs = first_moment(env, 5, 2)
    pairs = zip(tree_leaves(program(*inputs)), tree_leaves(autoreset_step(env, *inputs)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("env_id", IDS)
def test_the_same_seed_gives_the_same_bits(env_id):
    """One seed is one run; another seed another; without a seed the generator goes on, and begins somewhere new."""

    def run(seed):
        envs = make_device_envs(EnvConfig(env_id, 3, env_kwargs={"max_episode_steps": 5}), "cpu")
        generator = torch.Generator().manual_seed(0)
        obs = [envs.reset(seed=seed)[0]]
        obs += [envs.step(some_actions(envs.env, generator, 3))[0] for _ in range(12)]
        return torch.stack([*obs, envs.reset()[0]])

    assert torch.equal(run(11), run(11))
    assert not torch.equal(run(11), run(12))
    assert not torch.equal(run(None), run(None))
    assert not torch.equal(run(11)[0], run(11)[-1])


class ToNumpy(VectorWrapper):
    """What outside code that knows numpy only puts around it."""

    def reset(self, *, seed=None, options=None):
        obs, info = self.env.reset(seed=seed, options=options)
        return obs.numpy(), info

    def step(self, actions):
        *tensors, info = self.env.step(actions)
        return *(tensor.numpy() for tensor in tensors), info


def array_conversion(envs):
    """The same by gymnasium's own wrapper, which needs a package that gymnasium does not."""
    pytest.importorskip("array_api_compat")
    return gym.wrappers.vector.ArrayConversion(envs, env_xp=torch, target_xp=np)


@pytest.mark.parametrize("to_numpy", [ToNumpy, array_conversion])
def test_outside_code_runs_it(to_numpy):
    """As numpy it goes through gymnasium's statistics of episodes, on actions sampled from its action space."""
    envs = to_numpy(make_device_envs(EnvConfig("CartPole-v1", 3, env_kwargs={"max_episode_steps": 30}), "cpu"))
    envs = RecordEpisodeStatistics(envs)
    envs.reset(seed=1)
    envs.action_space.seed(1)
    episodes, total = 0, np.zeros(3)
    for _ in range(100):
        obs, reward, terminated, truncated, info = envs.step(envs.action_space.sample())
        assert all(isinstance(array, np.ndarray) for array in (obs, reward, terminated, truncated))
        assert envs.observation_space.contains(obs)
        total += reward
        for index in np.flatnonzero(terminated | truncated):
            assert info["episode"]["r"][index] == info["episode"]["l"][index] == total[index]
            total[index] = 0
            episodes += 1
    assert episodes > 5
    envs.close()


def test_running_can_be_taken_and_put_back():
    """A program that steps the environments itself gives the rows that the wrapper gives: draw, autoreset_step, put back."""
    envs, by_hand = (
        make_device_envs(EnvConfig("CartPole-v1", 3, env_kwargs={"max_episode_steps": 4}), "cpu") for _ in range(2)
    )
    for each in (envs, by_hand):
        each.reset(seed=2)
    action = torch.tensor([0, 1, 1])
    rows = [envs.step(action)[0] for _ in range(9)]
    running, told = by_hand.running, []
    for random in torch.stack([by_hand.draw() for _ in range(8)]):
        running, result = autoreset_step(by_hand.env, running, action, random)
        told.append(result.obs)
    by_hand.running = running
    told.append(by_hand.step(action.numpy())[0])
    assert torch.equal(torch.stack(rows), torch.stack(told))
    assert by_hand.draw(2, 7).shape == (2, 7, 3, 4)


def test_wrong_use_is_told():
    """What a caller can get wrong is named: before reset, shapes of actions, options, numbers, render modes."""
    envs = TorchVectorEnv(CartPole(), 3)
    with pytest.raises(gym.error.ResetNeeded):
        envs.step(torch.zeros(3, dtype=torch.int64))
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=r"shape \(3,\), not \(3, 1\)"):
        envs.step(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="no reset options: low"):
        envs.reset(options={"low": 0})
    with pytest.raises(ValueError, match="num_envs"):
        TorchVectorEnv(CartPole(), 0)
    with pytest.raises(ValueError, match="max_episode_steps"):
        TorchVectorEnv(CartPole(max_episode_steps=0), 1)
    with pytest.raises(ValueError, match="CartPole has no render mode 'human'; it has only 'rgb_array'"):
        TorchVectorEnv(CartPole(), 1, render_mode="human")
    with pytest.raises(ValueError, match="Reach has no render mode 'rgb_array'; it has none"):
        TorchVectorEnv(Reach(), 1, render_mode="rgb_array")


@dataclass(frozen=True)
class Reach:
    """A point on a line that is pushed to the goal. `breaks` says which part of the contract it does not keep."""

    goal: float = 1.0
    breaks: str = ""
    max_episode_steps: int | None = 50

    num_random: ClassVar[int] = 1
    observation_space: ClassVar[gym.Space] = Box(-np.inf, np.inf, (1,), np.float32)
    action_space: ClassVar[gym.Space] = Box(0.1, 1.0, (1,), np.float32)

    def reset(self, random):
        return {"position": random[:, 0], "pushes": torch.zeros_like(random)}, random

    def step(self, state, action, random):
        position = state["position"] + 0.1 * action[:, 0]
        reached = position > self.goal
        new = {"position": position, "pushes": state["pushes"] + 1}
        reward = reached.float()
        if self.breaks == "reward":
            reward = reward[:, None]
        elif self.breaks == "terminated":
            return new, position[:, None], reward, reward, torch.zeros_like(reached)
        elif self.breaks == "state":
            new = {"position": position}
        elif self.breaks == "dtype":
            new["pushes"] = new["pushes"].double()
        elif self.breaks == "obs":
            return new, position, reward, reached, torch.zeros_like(reached)
        return new, position[:, None], reward, reached, torch.zeros_like(reached)


@pytest.fixture
def _reach():
    """Reach-v0 registered the way README says, with a registered limit; and one that is no TorchVectorEnv."""
    make = lambda num_envs, **kwargs: TorchVectorEnv(Reach(**kwargs), num_envs)  # noqa: E731 (as README has it)
    gym.register("Reach-v0", vector_entry_point=make, max_episode_steps=7, kwargs={"goal": 2.0})
    yield
    del gym.registry["Reach-v0"]


@pytest.mark.usefixtures("_reach")
def test_a_registered_environment_of_ones_own():
    """By gymnasium's make_vec and by ours; registered arguments and limit arrive, the user's win; a state may be a dict."""
    made = gym.make_vec("Reach-v0", num_envs=3)
    assert isinstance(made, TorchVectorEnv)
    assert made.env == Reach(goal=2.0, max_episode_steps=7)
    envs = make_device_envs(EnvConfig("Reach-v0", 3, env_kwargs={"goal": 0.5, "max_episode_steps": 4}), "cpu")
    assert envs.env == Reach(goal=0.5, max_episode_steps=4)
    assert envs.num_envs == 3
    assert "Reach-v0" in repr(envs)
    envs.reset(seed=0)
    pushes = []
    for _ in range(12):
        obs, *_ = envs.step(np.full((3, 1), 0.1))
        pushes.append(envs.running.state["pushes"].max().item())
        assert torch.equal(obs[:, 0], envs.running.state["position"])
    assert max(pushes) == 4.0
    with pytest.raises(UsageError, match=r"--env-kwargs do not fit Reach-v0: .*gaol"):
        make_device_envs(EnvConfig("Reach-v0", 3, env_kwargs={"gaol": 1}), "cpu")
    with pytest.raises(UsageError, match=r"--backend torch has no Reech-v0; it has: .*; nearest: Reach-v0"):
        make_device_envs(EnvConfig("Reech-v0", 3), "cpu")


@pytest.mark.parametrize(
    ("breaks", "told"),
    [
        ("reward", r"Reach.step: reward must be a tensor \(3,\) torch.float32, not \(3, 1\) torch.float32"),
        ("terminated", "Reach.step: terminated must be .* torch.bool, not .* torch.float32"),
        ("state", "Reach.step: state must have the structure"),
        ("dtype", "Reach.step: a tensor of the state must be .* torch.float32, not .* torch.float64"),
        ("obs", r"Reach.step: obs must be a tensor \(3, 1\) torch.float32, not \(3,\)"),
    ],
)
def test_a_broken_contract_is_named(breaks, told):
    """An environment that returns what it should not is refused before training, with what and how."""
    with pytest.raises(ValueError, match=told):
        TorchVectorEnv(Reach(breaks=breaks), 3)


def test_spaces_that_are_no_tensor_are_refused():
    """A dictionary of observations has no place in one tensor."""

    class Nested(Reach):
        observation_space = Dict(position=Box(-1.0, 1.0, (1,), np.float32))

    with pytest.raises(ValueError, match=r"Nested.observation_space is Dict"):
        TorchVectorEnv(Nested(), 3)


@pytest.mark.parametrize(
    ("env_id", "kwargs", "told"),
    [
        ("CartPole-v9", {}, r"--backend torch has no CartPole-v9; it has: Acrobot-v1, CartPole-v0, .*environments.md"),
        ("environments:Walk-v0", {}, "--backend torch has no Walk-v0"),
        ("environments:WalkVector-v0", {}, "--backend torch has no WalkVector-v0"),
        ("nowhere.to.be.found:Reach-v0", {}, "--env-id nowhere.to.be.found:Reach-v0: module .* cannot be imported"),
        ("CartPole-v1", {"gravity": 3}, r"--env-kwargs do not fit CartPole-v1: .*gravity"),
        ("Pendulum-v1", {"g": "fast"}, "--env-kwargs do not fit Pendulum-v1"),
        ("MountainCar-v0", {"max_episode_steps": -1}, r"--env-id MountainCar-v0: .*max_episode_steps"),
    ],
)
def test_what_cannot_be_made_is_told(env_id, kwargs, told):
    """Unknown ids, environments that are not on the device and wrong arguments: one line that names the flag."""
    with pytest.raises(UsageError, match=told) as caught:
        make_device_envs(EnvConfig(env_id, 2, env_kwargs=kwargs), "cpu")
    assert "\n" not in str(caught.value)


def test_an_id_in_a_module():
    """module:Id imports the module first; arguments reach the constructor, also over a version's own limit."""
    envs = make_device_envs(
        EnvConfig("environments:CartPole-v0", 2, env_kwargs={"sutton_barto_reward": True, "max_episode_steps": 9}), "cpu"
    )
    assert envs.env == CartPole(sutton_barto_reward=True, max_episode_steps=9)


@pytest.mark.parametrize("env_id", IDS)
def test_frames_are_gymnasiums(env_id):
    """One frame per environment, pixel for pixel what gymnasium draws of the same state, an action's arrow included."""
    pytest.importorskip("pygame")
    generator = torch.Generator().manual_seed(10)
    envs = make_device_envs(EnvConfig(env_id, 2), "cpu", render_mode="rgb_array")
    theirs = gym.make("CartPole-v1" if env_id == "CartPole-v0" else env_id, render_mode="rgb_array").unwrapped
    theirs.reset(seed=0)
    envs.reset(seed=1)
    first = envs.render()
    for _ in range(8):
        action = some_actions(envs.env, generator, 2)
        envs.step(action)
    frames = envs.render()
    assert len(frames) == 2
    assert all(frame.ndim == 3 and frame.shape[2] == 3 and frame.dtype == np.uint8 for frame in frames)
    assert not np.array_equal(first[0], frames[0])
    for row, one, frame in zip(table(envs.running.state).double().numpy(), action, frames, strict=True):
        put(theirs, env_id, row)
        if env_id == "Pendulum-v1":
            theirs.last_u = float(one.clamp(-2, 2))
        assert np.array_equal(theirs.render(), frame)
    theirs.close()  # quits pygame
    assert np.array_equal(envs.render()[0], frames[0])


def test_without_pygame_or_a_render_mode(monkeypatch):
    """A missing package is named with what installs it; without a render mode there is no picture."""
    envs = make_device_envs(EnvConfig("CartPole-v1", 1), "cpu", render_mode="rgb_array")
    envs.reset(seed=0)
    monkeypatch.setitem(sys.modules, "pygame", None)
    with pytest.raises(UsageError, match=r'needs pygame: pip install "gymnasium\[classic-control\]"'):
        envs.render()
    plain = make_device_envs(EnvConfig("CartPole-v1", 1), "cpu")
    plain.reset(seed=0)
    with pytest.warns(UserWarning, match="without a render mode"):
        assert plain.render() is None
    with pytest.raises(UsageError, match="no render mode 'human'"):
        make_device_envs(EnvConfig("CartPole-v1", 1), "cpu", render_mode="human")


def test_running_is_a_tree():
    """Running is what a compiled loop carries: a tree of tensors, nothing else in it."""
    envs = make_device_envs(EnvConfig("Pendulum-v1", 2), "cpu")
    envs.reset(seed=0)
    assert isinstance(envs.running, Running)
    assert all(isinstance(leaf, torch.Tensor) and leaf.shape[0] == 2 for leaf in tree_leaves(envs.running))


@dataclass(frozen=True)
class Typed:
    """Ends after four steps; says of which type an action was, and fails where it is told to."""

    action_space: gym.Space
    fails: bool = False
    max_episode_steps: int | None = 4
    num_random: ClassVar[int] = 1
    observation_space: ClassVar[gym.Space] = Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, random):
        return random, random

    def step(self, state, action, random):
        assert action.dtype == torch.from_numpy(np.empty(0, self.action_space.dtype)).dtype
        if self.fails:
            torch.randn(1)  # refused under vmap
        ends = torch.zeros(len(random), dtype=torch.bool)
        return random, random, torch.ones(len(random)), ends, ends.clone()


@pytest.mark.parametrize(
    "space",
    [Discrete(3, start=4, dtype=np.int32), Discrete(2, dtype=np.uint8), Box(-1.0, 1.0, (2,), np.float64)],
    ids=["int32", "uint8", "float64"],
)
def test_actions_have_the_spaces_own_dtype(space, tmp_path):
    """In the wrapper's trial, in its steps and in training alike."""
    envs = TorchVectorEnv(Typed(space), 4)
    envs.reset(seed=0)
    envs.step(envs.action_space.sample())
    train(tiny(tmp_path / "run", num_envs=4), envs=envs)


def test_what_raises_in_a_rollout_is_a_fault(tmp_path):
    """With many seeds, which run under vmap: the environment's file and line, not a bare traceback."""
    gym.register("Typed-v0", vector_entry_point=lambda num_envs: TorchVectorEnv(Typed(Discrete(2), fails=True), num_envs))
    try:
        with pytest.raises(TrainingFault, match=r"failed in the rollout: RuntimeError.*\(test_device_envs.py:\d+\)"):
            train(tiny(tmp_path / "run", env_id="Typed-v0", num_seeds=2))
    finally:
        del gym.registry["Typed-v0"]
