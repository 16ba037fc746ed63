"""Every space the trainer claims: what is stored, what the environment gets, what a user's policy takes, whole runs."""

import itertools

import gymnasium as gym
import numpy as np
import pytest
import torch
from environments import ACTIONS, OBSERVATIONS, AnySpaces
from environments import any_spaces as made
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from gymnasium.vector import SyncVectorEnv, VectorEnv

from fastppo import TrainConfig, UsageError, load_policy, train
from fastppo.core.space_rules import is_image_shape
from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.evaluate import console as evaluate_console
from fastppo.policy.codec import space_from_data, space_to_data
from fastppo.policy.encoder import channels_first
from fastppo.policy.spaces import action_spec, obs_spec
from fastppo.rollout.collector import start_collector
from fastppo.rollout.step_collector import HostCollector, TensorCollector
from fastppo.rollout.storage import allocate_rollout
from support.runs import rows_of, trained

CPU = torch.device("cpu")
MODES = ("NextStep", "SameStep", "Disabled")
STRUCTURES = ("nested", "tuple", "masked")


def started(vector, num_steps, info_mask_size=None, seed=3):
    """A collector as the loop starts it, and its rollout."""
    envs, action = AutoresetEnvs(vector), action_spec(vector.single_action_space, False)
    obs = obs_spec(vector.single_observation_space, info_mask_size, action)
    rollout = allocate_rollout(num_steps, vector.num_envs, obs, action, envs.keeps_final_obs, CPU)
    return start_collector(envs, rollout, obs, action, seed), rollout, obs, action


def actor(action, obs_spec):
    """Legal actions that follow from the observation alone: the same episode sees the same ones wherever its rows lie."""

    def act(obs, noise):
        leaves = [obs] if isinstance(obs, torch.Tensor) else list(obs.values())
        number = sum(leaf.double().nan_to_num().flatten(1).sum(1) if leaf.ndim > 1 else leaf.double() for leaf in leaves)
        legal = obs["action_mask"] if isinstance(obs, dict) and "action_mask" in obs else torch.ones(len(noise), action.size)
        legal = legal.double() * (1.0 + (number[:, None] * 7 + torch.arange(action.size)) % 5)
        if action.dtype is torch.float32:
            return (legal - 3.0).float()
        return action.distribution.mode(torch.where(legal > 0, legal, -1e8))

    return act


def equal(stored, told):
    """Bit for bit what the environment told, of the rollout's type."""
    return np.array_equal(
        np.asarray(stored), np.asarray(told).astype(np.asarray(stored).dtype).reshape(np.asarray(stored).shape)
    )


# --- what is stored


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_the_rollout_holds_what_the_environment_told(name):
    """Every leaf of every row is the environment's observation: integers of their own type, uint8 never a float."""
    action = "multi-discrete" if name == "masked" else "discrete"
    vector = made(3, observation=name, action=action)
    collector, rollout, obs, spec = started(vector, 9)
    noise = torch.zeros(9, *spec.noise_shape(3))
    logged = 0
    for _ in range(3):
        collector.collect(actor(spec, obs), noise)
        for index, env in enumerate(vector.envs):
            for leaf in obs:
                told = [leaf.find(one) for one in env.observed[logged : logged + 10]]
                assert equal(rollout[leaf.key][:, index], np.stack(told)), leaf.key
        logged += 9
    for leaf in obs:
        stored, told = rollout[leaf.key].dtype, leaf.find(vector.envs[0].observed[0])
        if isinstance(told, np.ndarray) and told.dtype != np.float16 and leaf.kind in ("image", "vector"):
            whole = {np.dtype(np.float64): torch.float32, np.dtype(np.int8): torch.bool}  # doubles; MultiBinary
            assert stored is whole.get(told.dtype, torch.from_numpy(told).dtype)
    assert set(rollout.keys()) == {leaf.key for leaf in obs} | {"action", "reward", "terminated", "truncated", "valid"}


def test_a_structure_is_taken_apart_under_names_of_its_own():
    """Unsorted, odd and repeated names: a dot, "obs", a number; keys are sorted, paths lead to the parts."""
    found = {leaf.key: (leaf.path, leaf.shape, leaf.kind) for leaf in obs_spec(OBSERVATIONS["nested"])}
    assert found == {
        "obs.a.0": (("a", 0), (), "categories"),
        "obs.a.1.7": (("a", 1, "7"), (2,), "vector"),
        "obs.a.1.obs": (("a", 1, "obs"), (2,), "vector"),
        "obs.obs": (("obs",), (2, 2), "vector"),
        "obs.with.dot": (("with.dot",), (), "categories"),
        "obs.z": (("z",), (3,), "vector"),
    }
    assert list(found) == sorted(found)


@pytest.mark.parametrize(
    "space",
    [
        Dict({"a.b": Discrete(2), "a": Dict({"b": Discrete(3)})}),
        Dict({"a.0": Discrete(2), "a": Tuple([Discrete(3)])}),
    ],
)
def test_two_parts_of_one_name_are_refused(space):
    """One would be written over the other, without a word."""
    with pytest.raises(UsageError, match=r"two parts of the observation are called obs\.a\."):
        obs_spec(space)


@pytest.mark.parametrize(
    ("shape", "first"),
    [
        ((4, 84, 84), (4, 84, 84)),
        ((84, 84, 4), (4, 84, 84)),
        ((210, 160, 3), (3, 210, 160)),
        ((36, 99), (1, 36, 99)),
        ((1, 36, 36), (1, 36, 36)),
        ((36, 36, 36), (36, 36, 36)),
        ((64, 64, 1), (1, 64, 64)),
    ],
)
def test_images_by_their_shape(shape, first):
    """Channels are the smallest of three axes; where all are alike, the first."""
    assert is_image_shape(shape)
    assert channels_first(shape) == first


@pytest.mark.parametrize("shape", [(3, 35, 84), (35, 84), (84,), (84, 4, 84), (4, 4, 84, 84), ()])
def test_what_is_no_image(shape):
    """Too small for three convolutions, or of another rank."""
    assert not is_image_shape(shape)


def test_only_bytes_of_the_whole_range_are_pixels():
    """Bytes 0 to 255 are divided by 255, small or large, but not where they are normalised; other integers are as they are."""
    space = Dict(whole=Box(0, 255, (3,), np.uint8), half=Box(0, 127, (3,), np.uint8), floats=Box(0, 255, (3, 40, 40)))
    spec = obs_spec(space)
    assert {leaf.key: (leaf.kind, leaf.scale) for leaf in spec} == {
        "obs.floats": ("vector", 1.0),
        "obs.half": ("vector", 1.0),
        "obs.whole": ("vector", 1 / 255),
    }
    assert [leaf.key for leaf in spec.normalized] == ["obs.floats", "obs.half"]
    spec = obs_spec(space, normalize=True)
    assert {(leaf.key, leaf.scale) for leaf in spec.normalized} == {("obs.floats", 1.0), ("obs.half", 1.0), ("obs.whole", 1.0)}
    older = obs_spec(space, normalize=["obs.floats", "obs.half"])  # a checkpoint that has no statistics of the bytes
    assert [leaf.scale for leaf in older] == [1.0, 1.0, 1 / 255]
    picture = obs_spec(Box(0, 255, (84, 84, 4), np.uint8), normalize=True)
    assert [(leaf.kind, leaf.scale) for leaf in picture] == [("image", 1 / 255)]
    assert not picture.normalized


@pytest.mark.parametrize("space", [*OBSERVATIONS.values(), *ACTIONS.values()], ids=str)
def test_a_space_survives_a_checkpoint(space, tmp_path):
    """Plain data that torch.load(weights_only=True) reads, and back: the same members, bounds, type and order."""
    torch.save(space_to_data(space), tmp_path / "space.pt")
    again = space_from_data(torch.load(tmp_path / "space.pt", weights_only=True))
    if isinstance(space, MultiBinary):
        assert again.shape == space.shape  # its n is the shape itself, or a number
    elif not isinstance(space, Dict | Tuple):
        assert again == space
    assert again.contains(space.sample())
    assert str(obs_spec(again) if space in OBSERVATIONS.values() else action_spec(again, False)) == str(
        obs_spec(space) if space in OBSERVATIONS.values() else action_spec(space, False)
    ).replace(str(space), str(again))


# --- what the environment gets


def sampled(name, squash=False, scale=3.0, rows=4000):
    """Actions of a policy without prejudice, as environments take them."""
    space = ACTIONS[name]
    spec = action_spec(space, squash)
    generator = torch.Generator().manual_seed(0)
    noise = spec.distribution.noise(spec.noise_shape(rows), generator)
    logits = torch.zeros(rows, spec.size)
    dist = (logits, torch.full_like(logits, float(np.log(scale)))) if isinstance(space, Box) else logits
    action = spec.distribution.sample(dist, noise)
    assert action.shape == (rows, *spec.shape)
    assert action.dtype is spec.dtype
    actions, stored = spec.to_env(action).numpy(), action.clone()
    array = spec.to_env_array(action)  # as environments of arrays get them
    assert array.dtype == actions.dtype
    np.testing.assert_array_equal(array, actions)
    array.fill(1)  # its own memory
    assert torch.equal(action, stored)
    return space, actions


@pytest.mark.parametrize("name", ACTIONS)
def test_every_action_is_in_the_space(name):
    """4000 samples, bounds hit often: gymnasium's own `contains`, exact shape and type; each value of each choice comes up."""
    space, actions = sampled(name)
    assert actions.shape == (4000, *space.shape)
    assert actions.dtype == space.dtype
    assert all(
        space.contains(np.asarray(action) if space.shape == () and isinstance(space, Box) else action) for action in actions
    )
    if isinstance(space, Discrete | MultiDiscrete | MultiBinary):
        start = np.ravel(getattr(space, "start", 0))
        numbers = np.ravel(getattr(space, "nvec", 2 if isinstance(space, MultiBinary) else getattr(space, "n", 0)))
        columns = actions.reshape(4000, -1)
        start, numbers = (np.broadcast_to(x, columns.shape[1]) for x in (start, numbers))
        for column, first, number in zip(columns.T, start, numbers, strict=True):
            assert sorted(set(column.tolist())) == list(range(first, first + number))


@pytest.mark.parametrize("name", [name for name, space in ACTIONS.items() if isinstance(space, Box) and space.is_bounded()])
def test_squashed_actions_are_in_the_space_too(name):
    """tanh reaches 1 in floats: the bound itself, not what rounding puts beside it."""
    space, actions = sampled(name, squash=True, scale=30.0)
    assert all(space.contains(np.asarray(action)) for action in actions)
    columns = actions.reshape(4000, -1)
    assert (columns.min(0) == np.ravel(space.low)).all()
    assert (columns.max(0) == np.ravel(space.high)).all()


def test_components_of_a_matrix_keep_their_places():
    """nvec [[2, 3, 1], [4, 2, 2]], start [[0, 5, -1], [0, -3, 1]]: row by row, each with its own first value."""
    spec = action_spec(ACTIONS["multi-discrete 2-D"], False)
    assert spec.to_env(torch.tensor([[1, 2, 0, 3, 0, 1]])).tolist() == [[[1, 7, -1], [3, -3, 2]]]


# --- autoreset modes


def transitions(vector, obs, rollouts, env):
    """The valid transitions of one environment in order: leaves, action, reward, ends and what the action led to."""
    listed = []
    for rollout in rollouts:
        for t in torch.nonzero(rollout["valid"][:-1, env]).flatten().tolist():
            done = rollout["terminated"][t, env] or rollout["truncated"][t, env]
            final = "final_obs" in rollout or any(key.startswith("final_") for key in rollout)
            led_to = [
                rollout[f"final_{leaf.key}"][t, env] if done and final else rollout[leaf.key][t + 1, env]
                for leaf in obs.observed
            ]
            row = [
                rollout[key][t, env].tolist()
                for key in (*(leaf.key for leaf in obs), "action", "reward", "terminated", "truncated")
            ]
            listed.append((row, [x.tolist() for x in led_to]))
    return listed


@pytest.mark.parametrize("name", [*STRUCTURES, "discrete", "image (H, W, C)"])
def test_every_mode_gives_the_same_transitions_of_structures(name):
    """As tests/test_autoreset.py has it for vectors, leaf by leaf, what the actions led to included."""
    by_mode = []
    for mode in MODES:
        vector = made(3, mode, observation=name, action="multi-discrete" if name == "masked" else "discrete")
        collector, rollout, obs, spec = started(vector, 7)
        rollouts = []
        for _ in range(6):
            collector.collect(actor(spec, obs), torch.zeros(7, *spec.noise_shape(3)))
            rollouts.append({key: value.clone() for key, value in rollout.items()})
        by_mode.append((vector, obs, rollouts))
    for env in range(3):
        next_step, same_step, disabled = (transitions(*one, env) for one in by_mode)
        assert same_step == disabled
        assert len(same_step) == 7 * 6
        assert 20 < len(next_step) < len(same_step)
        assert next_step == same_step[: len(next_step)]
        assert any(row[-1] for row, _ in next_step)
        assert any(row[-2] for row, _ in next_step)


def tensors_of(obs):
    """A copy of the structure in tensors."""
    if isinstance(obs, dict):
        return {key: tensors_of(part) for key, part in obs.items()}
    return tuple(map(tensors_of, obs)) if isinstance(obs, tuple) else torch.from_numpy(np.array(obs))


class TensorTwin(VectorEnv):
    """AnySpaces in tensors: it returns its own buffers, written to by every call. dense: final observations of all at once."""

    def __init__(self, num_envs, mode, dense, **kwargs):
        self.inner, self.dense = made(num_envs, mode, **kwargs), dense
        self.num_envs, self.metadata = num_envs, self.inner.metadata
        self.single_observation_space, self.single_action_space = (
            self.inner.single_observation_space,
            self.inner.single_action_space,
        )
        self.buffers = None

    def overwrite(self, buffer, value):
        if isinstance(buffer, torch.Tensor):
            return buffer.copy_(value)
        for name in buffer if isinstance(buffer, dict) else range(len(buffer)):
            self.overwrite(buffer[name], value[name])
        return buffer

    def told(self, obs, info):
        self.buffers = tensors_of(obs) if self.buffers is None else self.overwrite(self.buffers, tensors_of(obs))
        masks = {}
        if "action_mask" in info:
            mask, told = info["action_mask"], info["_action_mask"]
            masks["action_mask"] = torch.from_numpy(np.where(told.reshape(-1, *[1] * (mask.ndim - 1)), mask, 1))
        return self.buffers, masks

    def reset(self, *, seed=None, options=None):
        options = None if options is None else {"reset_mask": options["reset_mask"].numpy()}
        return self.told(*self.inner.reset(seed=seed, options=options))

    def step(self, actions):
        assert isinstance(actions, torch.Tensor)
        obs, reward, terminated, truncated, info = self.inner.step(actions.numpy())
        buffers, masks = self.told(obs, info)
        if "final_obs" in info:
            rows = [None if row is None else tensors_of(row) for row in info["final_obs"]]
            masks["final_obs"] = self.stacked(rows, buffers) if self.dense else rows
        return buffers, *map(torch.from_numpy, (reward, terminated, truncated)), masks

    def stacked(self, rows, like):
        """As one structure, with absurd numbers where no episode ended."""
        if isinstance(like, torch.Tensor):
            return torch.stack([torch.full_like(like[0], 99) if row is None else row for row in rows])
        keys = like.keys() if isinstance(like, dict) else range(len(like))
        parts = {key: self.stacked([None if row is None else row[key] for row in rows], like[key]) for key in keys}
        return parts if isinstance(like, dict) else tuple(parts.values())


@pytest.mark.parametrize("name", ["nested", "tuple", "masked", "info mask", "nested, info mask"])
@pytest.mark.parametrize(("mode", "dense"), [("NextStep", True), ("SameStep", True), ("SameStep", False), ("Disabled", True)])
def test_tensors_of_a_structure_equal_arrays(name, mode, dense):
    """TensorCollector and HostCollector: every row of every key, bit for bit, masks of either kind included."""
    space = name.partition(", ")[0]
    kwargs = {"observation": "float32" if space == "info mask" else space, "mask": "info" if "info mask" in name else None}
    kwargs["action"] = "multi-discrete"
    size = 5 if kwargs["mask"] else None
    tensors, tensor_rollout, obs, spec = started(TensorTwin(3, mode, dense, **kwargs), 7, size)
    arrays, array_rollout, _, _ = started(made(3, mode, **kwargs), 7, size)
    assert isinstance(tensors, TensorCollector)
    assert isinstance(arrays, HostCollector)
    for _ in range(4):
        for collector in (tensors, arrays):
            collector.collect(actor(spec, obs), torch.zeros(7, *spec.noise_shape(3)))
        assert set(tensor_rollout.keys()) == set(array_rollout.keys())
        done = array_rollout["terminated"] | array_rollout["truncated"]
        for key, rows in array_rollout.items():
            same = tensor_rollout[key][:-1] == rows[:-1] if key.startswith("final") else tensor_rollout[key] == rows
            relevant = done[:-1].reshape(*done[:-1].shape, *[1] * (same.ndim - 2)) if key.startswith("final") else True
            assert (same | ~torch.as_tensor(relevant)).all(), key


# --- whole runs

RUNS = list(
    itertools.zip_longest([name for name in OBSERVATIONS if name != "masked"], ACTIONS, fillvalue="discrete")
)  # every space once


@pytest.mark.parametrize(("observation", "action"), [*RUNS, ("masked", "multi-discrete")])
def test_a_run_trains_and_its_policy_acts(tmp_path, observation, action):
    """Two iterations, evaluation included, on an environment that raises for any action of another type, shape or range.

    The policy takes one observation and a batch, in arrays and in tensors, and gives the same answer four times.
    """
    result = trained(tmp_path, observation, action, norm_obs=True)
    assert all(np.isfinite(float(row["value_loss"])) for row in rows_of(result.run_dir))
    policy = load_policy(result.run_dir)
    assert torch.equal(policy.params, load_policy(result.run_dir, "best").params)
    vector = made(3, observation=observation, action=action)
    batch, _ = vector.reset(seed=1)
    actions, values = policy.act(batch), policy.value(batch)
    assert actions.dtype == vector.single_action_space.dtype
    assert all(map(vector.single_action_space.contains, map(np.asarray, actions))) or isinstance(
        vector.single_action_space, Discrete
    )
    assert values.shape == (3,)
    assert torch.equal(policy.act(tensors_of(batch)), torch.from_numpy(actions))
    for index, env in enumerate(vector.envs):
        alone = policy.act(env.observed[0])
        assert np.shape(alone) == vector.single_action_space.shape
        # one row and three round differently: by less than a discrete action, or half of a float16
        np.testing.assert_allclose(alone, actions[index], rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(policy.value(env.observed[0]), values[index], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("observation", "action"), [("nested", "box float64"), ("image (H, W, C)", "multi-discrete 2-D")])
def test_such_a_run_goes_on_and_is_evaluated(tmp_path, capsys, observation, action):
    """--resume and the evaluation's command line, on a structure with normalised leaves and on images."""
    result = trained(tmp_path, observation, action, norm_obs=True)
    config = TrainConfig.from_json(result.run_dir / "config.json")
    before = [float(row["value_loss"]) for row in rows_of(result.run_dir)]
    again = train(TrainConfig(**{**vars(config), "resume": str(result.run_dir), "run_dir": None, "num_iterations": 3}))
    assert again.summary["iterations"] == 3
    assert [float(row["value_loss"]) for row in rows_of(result.run_dir)][:2] == before
    assert evaluate_console([str(result.run_dir), "--episodes", "3", "--no-deterministic"]) == 0
    assert '"episodes": 3' in capsys.readouterr().out.splitlines()[-1]


def test_a_policy_refuses_what_it_was_not_trained_on(tmp_path):
    """Wrong shape, a missing part, parts of different batches, a list where a dict belongs: one line that says which."""
    policy = trained(tmp_path, "nested", "discrete").policy
    obs = OBSERVATIONS["nested"].sample()
    policy.act(obs)
    two = tensors_of(SyncVectorEnv([lambda: AnySpaces("nested")] * 2).reset()[0])
    for wrong, message in [
        ({**obs, "z": np.zeros(4, np.float32)}, r"obs\.z of shape \(4,\); this policy takes \(3,\)"),
        ({**obs, "z": np.zeros((2, 2, 3), np.float32)}, r"obs\.z of shape \(2, 2, 3\)"),
        ({key: part for key, part in obs.items() if key != "z"}, "the observation has no z"),
        ({**obs, "a": obs["a"][:1]}, r"the observation has no a\.1\.7"),
        (np.zeros(3, np.float32), r"the observation has no a\.0"),
        ({**two, "z": obs["z"]}, r"obs\.z of shape \(3,\); another part"),
        ({**two, "z": np.zeros((5, 3), np.float32)}, r"obs\.z of shape \(5, 3\); another part"),
    ]:
        for ask in (policy.act, policy.value):
            with pytest.raises(ValueError, match=message):
                ask(wrong)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (Dict({}), "nothing to observe"),
        (Dict(action_mask=MultiBinary(3)), "nothing to observe"),
        (Dict(a=Discrete(2), action_mask=Tuple([MultiBinary(3)])), "supported: MultiBinary"),
        (Dict(a=Discrete(2), action_mask=MultiBinary(4)), "an action_mask of 4 numbers does not fit .* which has 3 choices"),
        (
            Dict(a=gym.spaces.Sequence(Discrete(2))),
            r"\(at a\) is not supported; .* pad it to a Box with a gymnasium\.ObservationW",
        ),
        (
            Dict(mission=gym.spaces.Text(3), image=Box(0, 255, (7, 7, 3), np.uint8), direction=Discrete(4)),
            r"""\(at mission\) .*; leave it out: --wrapper gymnasium\.wrappers:FilterObservation """
            r"""'filter_keys=\["image","direction"\]', or pad it to a Box""",
        ),
        (Tuple([gym.spaces.Text(3), Discrete(4)]), r"'filter_keys=\[1\]', or pad it to a Box"),
        (gym.spaces.Text(3), r"of these; pad it to a Box"),
        (gym.spaces.Graph(Box(0, 1, (2,)), None), r"not supported; .* pad it to a Box"),
    ],
)
def test_spaces_that_are_refused(space, message):
    """One line that names what is wrong."""
    with pytest.raises(UsageError, match=message) as caught:
        obs_spec(space, None, action_spec(Discrete(3), False))
    assert "\n" not in str(caught.value)
