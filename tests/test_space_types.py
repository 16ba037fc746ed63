"""Spaces of every dtype, start and size: what an environment and a user get is in the space; what they give is taken."""

from functools import partial
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from gymnasium.vector import SyncVectorEnv
from gymnasium.vector.utils import iterate
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastppo import TrainConfig, UsageError, load_policy, train
from fastppo.core.contracts import Normalization
from fastppo.envs import check, check_trial
from fastppo.policy.agent import Agent
from fastppo.policy.codec import space_from_data, space_to_data
from fastppo.policy.make_network import make_network
from fastppo.policy.spaces import action_spec, obs_spec
from support.runs import tiny

OFF = Normalization(None, None, None, torch.zeros(()), torch.ones(()))
VECTOR = Box(-1.0, 1.0, (3,), np.float32)
INTEGERS = [np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)]
FLOATS = [np.float16, np.float32, np.float64]


class Strict(gym.Env):
    """Five steps in spaces that are given; an action of another type or outside its space is refused."""

    given: ClassVar[list] = []  # observation and action space

    def __init__(self):
        self.observation_space, self.action_space = self.given

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        self.elapsed = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        assert_in(self.action_space, action)
        self.elapsed += 1
        return self.observation_space.sample(), 1.0, self.elapsed == 5, False, {}


gym.register("Strict-v0", entry_point=Strict)


def assert_in(space, action):
    """As an environment asserts it, and of the space's own type."""
    assert space.contains(action if isinstance(space, Discrete) else np.asarray(action)), (space, action)
    assert action.dtype == space.dtype
    assert action.shape == space.shape


def agent_of(observation, action, **config):
    """A policy with its first weights."""
    act = action_spec(action, False)
    obs = obs_spec(observation, None, act)
    network = make_network(obs, act, TrainConfig(hidden_sizes=(4,), **config), None)
    return Agent(observation, obs, act, network, network.init(torch.Generator().manual_seed(0)), OFF)


# --- actions


@st.composite
def choices(draw):
    """A space of choices of any integer type, as far as gymnasium makes it."""
    dtype = draw(st.sampled_from(INTEGERS))
    limits = np.iinfo(dtype)
    number, shape = draw(st.integers(1, 5)), draw(hnp.array_shapes(max_dims=2, max_side=3))
    start = draw(st.integers(max(limits.min, -(2**40)), min(limits.max, 2**40) - 2 * number))
    if draw(st.booleans()):
        return Discrete(number, start=start, dtype=dtype)
    return MultiDiscrete(np.full(shape, number, dtype), dtype=dtype, start=np.full(shape, start, dtype))


@st.composite
def boxes(draw):
    """A box of floats, of bounds of any size or none."""
    dtype = draw(st.sampled_from(FLOATS))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=2, max_side=3))
    bound = st.floats(width=np.dtype(dtype).itemsize * 8, allow_nan=False, allow_infinity=False)
    low, high = sorted([draw(bound), draw(bound)])
    low, high = draw(st.sampled_from([low, -np.inf])), draw(st.sampled_from([high, np.inf]))
    return Box(low, high, shape, dtype)


@settings(deadline=None, max_examples=200)
@given(space=choices() | boxes() | st.builds(MultiBinary, st.integers(1, 4)), data=st.data())
def test_actions_are_in_their_space(space, data):
    """What reaches each environment is in its space and of its type, from arrays as from tensors, after a checkpoint too."""
    for spec in (action_spec(space, False), action_spec(space_from_data(space_to_data(space)), False)):
        if isinstance(space, Box):
            size = 2 * spec.size
            stored = torch.tensor(data.draw(st.lists(st.floats(-9, 9, width=32), min_size=size, max_size=size)))
        else:
            number = 2 if isinstance(space, MultiBinary) else int(np.ravel(getattr(space, "nvec", getattr(space, "n", 0)))[0])
            stored = torch.randint(number, (2, *spec.shape), generator=torch.Generator().manual_seed(0))
        stored = stored.reshape(2, *spec.shape)
        array, tensor = spec.to_env_array(stored), spec.to_env(stored)
        np.testing.assert_array_equal(array, tensor.numpy())
        assert array.dtype == tensor.numpy().dtype == space.dtype
        for action in iterate(gym.vector.utils.batch_space(space, 2), array):
            assert_in(space, action)


@pytest.mark.parametrize(
    "space",
    [
        Discrete(3, dtype=np.uint8, start=250),
        Discrete(3, dtype=np.int32, start=-1),
        MultiDiscrete([3, 2], dtype=np.uint16, start=[4, 0]),
        Box(0.0, 1.0, (2,), np.float16),
    ],
    ids=str,
)
def test_training_and_the_policy_act_in_the_space(space, tmp_path, monkeypatch):
    """From the first step to the loaded policy, for one observation and several."""
    monkeypatch.setattr(Strict, "given", [VECTOR, space])
    config = tiny(tmp_path / "run", env_id="Strict-v0", vectorization="sync", num_iterations=2, eval_episodes=2)
    agent = load_policy(train(config).run_dir)
    obs = np.zeros((2, 3), np.float32)
    for deterministic in (True, False):
        assert_in(space, agent.act(obs[0], deterministic))
        batch = agent.act(obs, deterministic)
        assert batch.dtype == space.dtype
        assert all(space.contains(action) for action in batch)


@pytest.mark.parametrize("dtype", ["float32", "bool", "uint8 of 300"])
def test_a_discrete_space_of_a_checkpoint_is_looked_at(dtype):
    """A type that no Discrete has, or that its numbers do not fit."""
    name, _, number = dtype.partition(" of ")
    with pytest.raises(ValueError, match="of dtype"):
        space_from_data({"type": "Discrete", "n": int(number or 2), "start": 0, "dtype": name})


@pytest.mark.parametrize("space", [Box(0, 1, (2,), np.longdouble), Box(0, 5, (2,), np.int64)], ids=str)
def test_other_boxes_are_refused(space):
    """In one line, which says what is supported."""
    with pytest.raises(UsageError, match="Box of float16, float32 or float64"):
        action_spec(space, False)


# --- bounds that are as good as none

LARGEST = float(np.finfo(np.float64).max)
HUGE = {
    "float64": Box(-LARGEST, LARGEST, (2,), np.float64),
    "half": Box(np.array([-LARGEST, 0.0]), np.array([1.0, LARGEST]), dtype=np.float64),
    "float32": Box(-np.finfo(np.float32).max, np.finfo(np.float32).max, (2,), np.float32),
    "1e300": Box(-1e300, 1e300, (2,), np.float64),
}


@pytest.mark.parametrize("which", HUGE)
def test_bounds_of_the_largest_numbers(which, tmp_path, monkeypatch):
    """Gymnasium cannot sample some of them: the check does not blame the environment, and training goes."""
    monkeypatch.setattr(Strict, "given", [VECTOR, HUGE[which]])
    envs = SyncVectorEnv([Strict] * 2)
    assert check.find(envs, "given") == []
    found = check.try_copy(partial(gym.make, "Strict-v0"), 2).findings
    assert [finding for finding in found if finding.is_error or "Overflow" in finding.line] == []
    agent = train(tiny(tmp_path / "run", num_iterations=2), envs=envs).policy
    assert np.abs(agent.act(np.zeros(3, np.float32))).max() < 10.0
    with pytest.raises(UsageError, match="--squash-actions needs finite action bounds"):
        action_spec(HUGE[which], True)


def test_what_counts_as_no_bound():
    """The same in the check, which samples, and where actions are squashed; a large bound is one, and nothing overflows."""
    for space in (Box(-1e30, 1e30, (1,), np.float32), Box(-60_000, 60_000, (1,), np.float16)):
        assert check_trial.sampled_space(space) == space
        spec = action_spec(space, True)
        ends = spec.to_env_array(torch.tensor([[-50.0], [0.0], [50.0]]))
        np.testing.assert_array_equal(ends.ravel(), np.array([space.low[0], 0.0, space.high[0]], space.dtype))
    sampled = check_trial.sampled_space(HUGE["half"])
    np.testing.assert_array_equal(sampled.low, [-np.inf, 0.0])
    np.testing.assert_array_equal(sampled.high, [1.0, np.inf])


# --- parts of no numbers

NOTHING = Box(-1.0, 1.0, (0,), np.float32)
PARTS = {
    "dict": Dict(a=NOTHING, b=VECTOR),
    "tuple": Tuple([VECTOR, Box(0, 3, (2, 0), np.int32)]),
    "empty dict": Dict(a=Dict({}), b=Discrete(3), c=Tuple(())),
}


@pytest.mark.parametrize("which", PARTS)
@pytest.mark.parametrize("more", [{}, {"norm_obs": True}, {"rnn": "gru", "rnn_hidden_size": 4, "num_minibatches": 2}], ids=str)
def test_parts_of_no_numbers_are_left_out(which, more, tmp_path, monkeypatch):
    """Trained, evaluated and loaded as if they were not there."""
    monkeypatch.setattr(Strict, "given", [PARTS[which], Discrete(2)])
    config = tiny(tmp_path / "run", env_id="Strict-v0", vectorization="sync", num_iterations=2, eval_episodes=2, **more)
    agent = load_policy(train(config).run_dir)
    assert agent.act(PARTS[which].sample()) in (0, 1)


@pytest.mark.parametrize("space", [NOTHING, Dict(a=NOTHING), Tuple([NOTHING, Dict({})]), Tuple(())], ids=str)
def test_nothing_to_observe_is_refused(space, tmp_path, monkeypatch):
    """Before anything is written, in one line."""
    monkeypatch.setattr(Strict, "given", [space, Discrete(2)])
    with pytest.raises(UsageError, match="has nothing to observe"):
        train(tiny(tmp_path / "run", env_id="Strict-v0", vectorization="sync"))
    assert not (tmp_path / "run").exists()


def test_nothing_to_choose_is_refused():
    """An action of no numbers, of each kind that gymnasium makes."""
    for space in (NOTHING, Box(-1.0, 1.0, (2, 0), np.float32), MultiBinary((2, 0)) if _makes_empty() else NOTHING):
        with pytest.raises(UsageError, match="leaves nothing to choose"):
            action_spec(space, False)


def _makes_empty():
    try:
        MultiBinary((2, 0))
    except Exception:
        return False
    return True


# --- what a policy is given

OBSERVED = {
    "vector": (VECTOR, Discrete(3)),
    "matrix": (Box(-1, 1, (2, 3), np.float64), MultiDiscrete([2, 3])),
    "number": (Box(-1, 1, (), np.float32), Box(-1, 1, (2,), np.float64)),
    "categories": (Discrete(4, start=-2), Discrete(2, dtype=np.int32)),
    "bits": (MultiBinary((2, 2)), MultiBinary(2)),
    "image": (Box(0, 255, (36, 40), np.uint8), Discrete(2)),
    "structure": (Dict(a=Discrete(3), b=Tuple([VECTOR, MultiDiscrete([2, 2])])), Discrete(2)),
}
AGENTS = {name: agent_of(*both, cnn_size=4) for name, both in OBSERVED.items()}


def mapped(change, obs):
    """Each array of a structure, changed."""
    if isinstance(obs, dict):
        return {name: mapped(change, part) for name, part in obs.items()}
    return tuple(mapped(change, part) for part in obs) if isinstance(obs, tuple) else change(obs)


def backwards(x):
    """The same numbers, lying in memory from the last to the first."""
    index = (slice(None, None, -1),) * x.ndim
    return np.array(x[index], order="C")[index]


def read_only(x):
    """The same, not to be written to."""
    copy = np.array(x)
    copy.flags.writeable = False
    return copy


def strided(x):
    """Every second number of a larger array."""
    wide = np.zeros((*x.shape, 2), x.dtype)
    wide[..., 0] = x
    return wide[..., 0]


FORMS = {
    "negative strides": backwards,
    "another byte order": lambda x: x.astype(x.dtype.newbyteorder()),
    "read-only": read_only,
    "strided": strided,
    "Fortran order": lambda x: np.array(x, order="F"),
    "a list": lambda x: x.tolist(),
    "float64": lambda x: x.astype(np.float64),
    "long double": lambda x: x.astype(np.longdouble),
    "a tensor": lambda x: torch.from_numpy(np.array(x)),
}


@pytest.mark.filterwarnings("error")
@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(AGENTS)), form=st.sampled_from(sorted(FORMS)), rows=st.integers(0, 3), seed=st.integers(0, 99)
)
def test_a_policy_takes_arrays_of_every_form(name, form, rows, seed):
    """One observation (rows 0) or several: the same actions and values as for plain arrays, nothing is written to."""
    space, agent = OBSERVED[name][0], AGENTS[name]
    space.seed(seed)
    samples = [space.sample() for _ in range(rows or 1)]
    if rows:
        plain = gym.vector.utils.concatenate(space, samples, gym.vector.utils.create_empty_array(space, rows))
    else:
        plain = mapped(np.asarray, samples[0])
    changed = mapped(FORMS[form], plain)
    for answer in (agent.act, agent.value):
        expected, found = answer(plain), answer(changed)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
        assert np.asarray(found).dtype == np.asarray(expected).dtype


@pytest.mark.parametrize("name", OBSERVED)
def test_a_policy_takes_an_empty_batch(name):
    """No observation: no action and no value, of the usual type and shape."""
    (space, action), agent = OBSERVED[name], AGENTS[name]
    empty = mapped(lambda x: x[:0], gym.vector.utils.create_empty_array(space, 1))
    for deterministic in (True, False):
        actions = agent.act(empty, deterministic)
        assert actions.shape == (0, *action.shape)
        assert actions.dtype == action.dtype
    assert agent.value(empty).shape == (0,)


def test_a_policy_with_memory_takes_an_empty_batch():
    """And remembers nothing of it."""
    agent = agent_of(VECTOR, Discrete(2), rnn="lstm", rnn_hidden_size=4, num_envs=4)
    assert agent.act(np.zeros((0, 3), np.float32)).shape == (0,)
    agent.reset()
    assert agent.act(np.zeros((2, 3), np.float32)).shape == (2,)


@pytest.mark.parametrize("form", ["negative strides", "another byte order", "read-only", "a list"])
def test_masks_of_every_form(form):
    """An action_mask is taken as an observation is."""
    mask = np.array([[0, 1, 0], [0, 0, 1]], np.int16)
    assert AGENTS["vector"].act(np.zeros((2, 3), np.float32), action_mask=FORMS[form](mask)).tolist() == [1, 2]
