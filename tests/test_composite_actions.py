"""Dict and Tuple action spaces: what is stored, what the environment gets, masks, whole runs, and that each part is learned."""

import copy
from functools import partial

import composites
import gymnasium as gym
import numpy as np
import pytest
import torch
from composites import SPACES, Parts, PartsVector, leaves
from gymnasium.spaces import Box, Dict, Discrete, OneOf, Sequence, Text, Tuple
from gymnasium.vector import SyncVectorEnv
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate

from fastppo import TrainConfig, UsageError, load_policy, train
from fastppo.analysis.evaluation import EvaluationPlan, evaluate_config
from fastppo.core.action_masks import flat_mask
from fastppo.envs import check
from fastppo.envs.wrappers import Preprocessing, wrapped
from fastppo.policy.codec import space_from_data, space_to_data
from fastppo.policy.distributions import DIAGONAL_NORMAL, Hybrid, MultiCategorical
from fastppo.policy.spaces import action_spec
from support.pages import python_in, section
from support.runs import rows_of, tiny

ROWS = 50


def sampled(spec, seed=0, scale=3.0):
    """Stored actions of a policy without prejudice, bounds of boxes hit often."""
    noise = spec.distribution.noise(spec.noise_shape(ROWS), torch.Generator().manual_seed(seed))
    if isinstance(spec.distribution, MultiCategorical):
        return spec.distribution.sample(torch.zeros(ROWS, spec.size), noise)
    normal = spec.size - spec.num_logits
    mean, log_std = torch.zeros(ROWS, normal), torch.full((ROWS, normal), float(np.log(scale)))
    dist = (mean, log_std) if spec.distribution is DIAGONAL_NORMAL else (torch.zeros(ROWS, spec.num_logits), mean, log_std)
    return spec.distribution.sample(dist, noise)


def same(one, other):
    """Equal structures, numbers and types."""
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[name], other[name]) for name in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    one, other = np.asarray(one), np.asarray(other)
    return one.dtype == other.dtype and np.array_equal(one, other)


# --- what is stored and what the environment gets


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("kind", SPACES)
def test_actions_are_batched_as_gymnasium_batches_them(kind, squash):
    """Oracle: gymnasium's batch_space, iterate and concatenate. Each row is in the space, from arrays and from tensors."""
    space = SPACES[kind]
    if squash and not any(isinstance(part, Box) for _, part, _ in leaves(space, space.sample())):
        with pytest.raises(UsageError, match="--squash-actions is for Box action spaces"):
            action_spec(space, squash)
        return
    spec = action_spec(space, squash)
    stored = sampled(spec)
    assert stored.shape == (ROWS, *spec.shape)
    assert stored.dtype is spec.dtype
    arrays, batched = spec.to_env_array(stored), batch_space(space, ROWS)
    assert batched.contains(arrays)
    rows = list(iterate(batched, arrays))
    assert len(rows) == ROWS
    assert all(space.contains(row) for row in rows)
    assert same(arrays, concatenate(space, rows, create_empty_array(space, ROWS)))
    assert same(arrays, torch.utils._pytree.tree_map(lambda x: x.numpy(), spec.to_env(stored)))


def test_a_stored_action_by_hand():
    """Choices first, those of move, aim[1] and fire, then the numbers of aim[0] and gas; clipped to -1..2 and 0..0.5."""
    spec = action_spec(SPACES["hybrid"], False)
    assert spec.distribution == Hybrid((3, 2, 3, 2, 2), 3)
    assert (spec.size, spec.num_logits, spec.shape, spec.dtype) == (15, 12, (8,), torch.float32)
    got = spec.to_env_array(torch.tensor([[2.0, 1, 2, 0, 1, -0.25, 9.0, -3.0]]))
    expected = {
        "move": np.array([1]),
        "aim": (np.array([[-0.25, 2.0]]), np.array([[[2, 1]]])),
        "fire": np.array([[0, 1]], np.int8),
        "gas": np.array([[[0.0]]], np.float16),
    }
    assert same(got, expected)


def test_a_structure_without_numbers_or_without_choices_has_the_plain_distribution():
    """So what is fast for one MultiDiscrete or one Box is fast for a Tuple of them."""
    choices, boxes = action_spec(SPACES["choices"], False), action_spec(SPACES["boxes"], False)
    assert (choices.distribution, choices.shape, choices.dtype) == (MultiCategorical((3, 2, 2, 2, 4)), (5,), torch.int64)
    assert (boxes.distribution, boxes.shape, boxes.dtype) == (DIAGONAL_NORMAL, (4,), torch.float32)


@pytest.mark.parametrize("kind", SPACES)
def test_a_structure_survives_a_checkpoint(kind, tmp_path):
    """The order of a Dict's names too: outputs of the network stand for them by their order."""
    torch.save(space_to_data(SPACES[kind]), tmp_path / "space.pt")
    again = space_from_data(torch.load(tmp_path / "space.pt", weights_only=True))
    before, after = (action_spec(space, False) for space in (SPACES[kind], again))
    assert [leaf.key for leaf in before.leaves] == [leaf.key for leaf in after.leaves]
    assert same(before.to_env_array(sampled(before)), after.to_env_array(sampled(before)))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (OneOf([Discrete(2), Discrete(3)]), "use a Tuple of a Discrete, which says which part counts"),
        (Dict(a=Discrete(2), b=Text(3)), r"\(at b\) is not supported; supported: Discrete"),
        (Tuple([Discrete(2), Sequence(Discrete(2))]), r"\(at 1\) is not supported"),
        (Tuple([Discrete(2), Box(0, 5, (1,), np.int64)]), r"\(at 1\) is not supported; .* Box of float16"),
        (Tuple([]), "is empty, which leaves nothing to choose"),
        (Dict(a=Discrete(2), b=Dict()), r"Dict\(\) \(at b\) is empty"),
        (Tuple([Discrete(2), Box(0.0, 1.0, (0,))]), r"\(at 1\) is of shape \(0,\), which leaves nothing to choose"),
        (Dict({"a.b": Discrete(2), "a": Dict(b=Discrete(3))}), r"two parts of the action are called action\.a\.b"),
    ],
)
def test_actions_that_are_refused(space, message):
    """One line that names the part and what to use instead."""
    with pytest.raises(UsageError, match=message) as caught:
        action_spec(space, False)
    assert "\n" not in str(caught.value)


def test_a_structure_that_no_checkpoint_holds_is_refused_before_training():
    """Nested 16 deep: training would end without a policy that can be loaded."""
    space = Discrete(2)
    for _ in range(15):
        space = Tuple([space])
    assert action_spec(space_from_data(space_to_data(space)), False).size == 2
    with pytest.raises(UsageError, match="the action space is nested 16 deep or deeper"):
        action_spec(Tuple([space]), False)


def test_a_checkpoint_cannot_ask_for_a_huge_action():
    """1,000 parts of 2^24 bits each, in a file of some kilobytes: refused before a list of them is made."""
    bits = {"type": "MultiBinary", "shape": [2**24]}
    with pytest.raises(ValueError, match="of more than 16777216 numbers"):
        space_from_data({"type": "Tuple", "spaces": [bits] * 1000})


def test_squashing_asks_each_box_for_bounds():
    """The box without bounds is named."""
    with pytest.raises(UsageError, match=r"finite action bounds; this environment has none \(at b\): leave it off"):
        action_spec(Dict(a=Box(-1.0, 1.0, (2,)), b=Box(-np.inf, 1.0, (1,))), True)


def test_rescaled_actions_are_those_of_the_environment():
    """-1, 0 and 1 are the lower bound, the middle and the upper bound of every box; choices are as they were."""
    env = Parts()
    rescaled = wrapped(env, Preprocessing(rescale_action=True))
    assert rescaled.action_space["aim"][0] == Box(-1.0, 1.0, (2,), np.float64)
    assert rescaled.action_space["move"] == env.action_space["move"]
    rescaled.reset(seed=0)
    for number, aim, gas in [(-1, -1.0, 0.0), (0, 0.5, 0.25), (1, 2.0, 0.5)]:
        action = rescaled.action_space.sample()
        action["aim"][0][:], action["gas"][:] = number, number
        rescaled.step(action)
        assert env.received[-1]["aim"][0] == pytest.approx([aim, aim], abs=1e-9)
        assert env.received[-1]["gas"].item() == pytest.approx(gas, abs=1e-3)  # a float16
        assert same(env.received[-1]["aim"][1], action["aim"][1])
    with pytest.raises(UsageError, match="--rescale-action needs a Box among the actions"):
        wrapped(Parts("choices"), Preprocessing(rescale_action=True))


# --- masks


def test_masks_in_parts_by_hand():
    """In the order of the space, which is not that of the mask; a missing part, None and a Box allow everything."""
    space, row = SPACES["hybrid"], np.array([1, 0, 1, 0, 1, 1, 1, 0, 1, 0, 0, 1])
    aim = (None, (np.array([0, 1]), np.array([1, 1, 0])))
    mask = {"fire": (np.array([1, 0]), np.array([0, 1])), "aim": aim, "move": np.array([1, 0, 1])}
    assert flat_mask(mask, space).astype(int).tolist() == row.tolist()
    assert flat_mask(row, space).tolist() == row.tolist()
    assert flat_mask(list(row), space).tolist() == row.tolist()
    assert flat_mask({"move": mask["move"]}, space).astype(int).tolist() == [1, 0, 1] + [1] * 9
    assert flat_mask(([True, False, True], None), SPACES["choices"]).tolist() == [1, 0, 1] + [1] * 10


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"moev": np.ones(3)}, "an action_mask has 'moev', and the action space has no such part"),
        ({"move": np.ones(4)}, r"an action_mask of 4 numbers for Discrete\(3, start=-1\), which has 3 choices"),
        ({"gas": np.ones(1)}, "an action_mask of 1 numbers for Box.*, which has 0 choices"),
        ({"aim": (None,)}, "an action_mask of 1 parts for Tuple.*, which has 2"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask, message):
    """A misspelt name would otherwise allow everything."""
    with pytest.raises(ValueError, match=message):
        flat_mask(mask, SPACES["hybrid"])


@pytest.mark.parametrize("kind", ["hybrid", "choices", "deep"])
@pytest.mark.parametrize("mask", ["info", "parts", "method", "method parts"])
def test_the_check_finds_nothing_in_a_right_environment(kind, mask):
    """Random legal actions of every part: the environment raises for any other."""
    tried = check.try_copy(partial(Parts, kind, mask), 2)
    assert tried.findings == ()
    assert tried.mask_size == action_spec(SPACES[kind], False).num_logits


def test_the_check_names_a_part_of_a_mask_that_does_not_fit():
    """Before training, not in it."""

    class Wrong(Parts):
        def told_mask(self):
            return {"moev": np.ones(3)}

    (finding,) = (one for one in check.try_copy(partial(Wrong, mask="parts"), 2).findings if one.is_error)
    assert "an action_mask has 'moev'" in finding.line


def test_the_check_sees_that_an_action_counts_after_an_end():
    """A class that resets within the step and does not declare it: an action of many parts is varied as a whole."""

    class Undeclared(PartsVector):
        def __init__(self):
            super().__init__(3, "SameStep", kind="hybrid")
            self.metadata = {key: value for key, value in self.metadata.items() if key != "autoreset_mode"}

        def step(self, actions):
            *result, _ = super().step(actions)
            return *result, {}

    assert any("the action of the step after an end changes" in one.line for one in check.find(Undeclared(), "given"))


# --- whole runs


def run(tmp_path, name, **settings):
    """A run of a moment, and its metrics without times; those of its last seed, if it has several."""
    settings = {"env_id": "composites:Parts", "vectorization": "sync", "num_envs": 3, "num_minibatches": 2, **settings}
    result = train(tiny(tmp_path / name, **settings))
    result = result.seeds[-1] if result.seeds else result
    timed = ("seconds", "sps", "env_share", "act_share", "learn_share")
    return result, [{key: value for key, value in row.items() if key not in timed} for row in rows_of(result.run_dir)]


def assert_near(some, others):
    """Metrics that differ by rounding."""
    for key in ("episodic_return_mean", "value_loss", "entropy"):
        one, other = ([float(row[key]) for row in rows] for rows in (some, others))
        np.testing.assert_allclose(one, other, rtol=1e-4, err_msg=key)


@pytest.mark.parametrize(
    ("kind", "memory"), [*((kind, {}) for kind in SPACES), ("hybrid", {"rnn": "gru", "num_minibatches": 3})], ids=str
)
def test_a_run_trains_and_its_policy_acts(tmp_path, kind, memory):
    """For one observation and a batch, arrays and tensors: dicts and tuples as the space has them, in it and of its types."""
    result, rows = run(tmp_path, "run", env_kwargs={"kind": kind}, eval_episodes=2, **memory)
    assert all(np.isfinite(float(row["value_loss"])) for row in rows)
    policy, space = load_policy(result.run_dir), SPACES[kind]
    obs = np.array([[-1.0], [1.0], [-1.0]], np.float32)
    for deterministic in (True, False):
        batch = policy.act(obs, deterministic)
        assert all(space.contains(row) for row in iterate(batch_space(space, 3), batch))
        policy.reset()
        assert space.contains(policy.act(obs[0], deterministic))
        policy.reset()
    tensors = policy.act(torch.from_numpy(obs))
    policy.reset()
    assert same(torch.utils._pytree.tree_map(lambda x: x.numpy(), tensors), policy.act(obs))
    assert all(isinstance(part, torch.Tensor) for _, _, part in leaves(space, tensors))


def test_every_way_to_step_gives_the_same_run(tmp_path):
    """Sync, groups, processes, a vector class of arrays and one of tensors, a mask in each form: the same bits."""
    alone = {"autoreset": "next-step"}  # as the vector classes; its episodes are short
    _, expected = run(tmp_path, "sync", env_kwargs={"mask": "info"}, **alone)
    for name, settings in {
        "grouped": {"vectorization": "grouped", "env_kwargs": {"mask": "parts"}, **alone},
        "async": {"vectorization": "async", "env_kwargs": {"mask": "method parts"}, **alone},
        "method": {"env_kwargs": {"mask": "method"}, **alone},
        "vector": {"env_id": "composites:PartsVector-v0", "vectorization": "auto", "env_kwargs": {"mask": "parts"}},
        "tensors": {"env_id": "composites:TensorParts-v0", "vectorization": "auto", "env_kwargs": {"mask": "method parts"}},
    }.items():
        assert run(tmp_path, name, **settings)[1] == expected, name


@pytest.mark.parametrize("mode", ["SameStep", "Disabled"])
def test_other_autoreset_modes(tmp_path, mode):
    """Both keep final observations: the same rows, masks in parts included."""
    vector = {"env_id": "composites:PartsVector-v0", "vectorization": "auto"}
    _, rows = run(tmp_path, mode, env_kwargs={"mode": mode, "mask": "parts"}, **vector)
    _, others = run(tmp_path, "other", env_kwargs={"mode": "SameStep", "mask": "method"}, **vector)
    assert rows == others


def test_seeds_train_as_if_alone(tmp_path):
    """--num-seeds 2: each seed has the metrics of a run of its own, to rounding; a run goes on where it stopped."""
    settings = {"env_kwargs": {"mask": "parts"}}
    together = run(tmp_path, "seeds", num_seeds=2, seed=5, **settings)[1]
    result, alone = run(tmp_path, "alone", seed=6, **settings)
    assert_near(together, alone)
    config = TrainConfig.from_json(result.run_dir / "config.json")
    again = train(TrainConfig(**{**vars(config), "resume": str(result.run_dir), "run_dir": None, "num_iterations": 6}))
    assert again.summary["iterations"] == 6
    assert [row["value_loss"] for row in rows_of(result.run_dir)][:4] == [row["value_loss"] for row in alone]


def test_a_mask_holds_for_the_loaded_policy(tmp_path):
    """In parts or flat, for one observation; flat for a batch; a policy that was trained without masks as well."""
    policy = run(tmp_path, "run")[0].policy
    obs = np.array([[-1.0], [1.0]], np.float32)
    one = {"move": np.array([0, 0, 1]), "aim": (None, (np.array([0, 1]), np.array([1, 0, 0])))}
    flat = flat_mask(one, SPACES["hybrid"])
    policy.seed(0)
    for deterministic in (True, False) * 10:
        alone, batch = policy.act(obs[0], deterministic, one), policy.act(obs, deterministic, np.stack([flat, flat]))
        for action in (alone, *iterate(batch_space(SPACES["hybrid"], 2), batch)):
            assert action["move"] == 1
            assert action["aim"][1].tolist() == [[2, -1]]
    with pytest.raises(ValueError, match="no such part"):
        policy.act(obs[0], action_mask={"moev": np.ones(3)})
    boxes = run(tmp_path, "boxes", env_kwargs={"kind": "boxes"})[0].policy
    with pytest.raises(ValueError, match="continuous actions"):
        boxes.act(obs[0], action_mask=np.ones(4))


def test_the_example_of_the_docs():
    """docs/environments.md: both masks are the same."""
    names = {"Dict": Dict, "Discrete": Discrete, "Tuple": Tuple, "Box": Box, "np": np}
    first, second, third = python_in(section("docs/environments.md", "Action masks")).strip().split("\n")
    exec(f"{first}\n{second}\nparts = mask\n{third}", names)
    assert flat_mask(names["parts"], names["space"]).astype(int).tolist() == names["mask"].tolist()
    assert action_spec(names["space"], False).num_logits == len(names["mask"])


# --- learning


@pytest.mark.long
def test_each_part_of_the_action_is_learned(tmp_path):
    """The right choice and the right number of every part follow from the observation; masks hide wrong ones at random."""
    settings = {"num_envs": 8, "num_iterations": 25, "num_steps": 32, "hidden_sizes": (32,), "learning_rate": 1e-2}
    settings |= {"gamma": 0.1, "log_std_init": -0.5, "rescale_action": True, "update_epochs": 4, "num_minibatches": 4}
    result, _ = run(tmp_path, "run", env_kwargs={"mask": "parts"}, **settings)
    space = wrapped(Parts(), Preprocessing(rescale_action=True)).action_space
    for obs, share in ((-1.0, 0.25), (1.0, 0.75)):
        action = result.policy.act(np.array([obs], np.float32))
        for path, part, value in leaves(space, action):
            if isinstance(part, Box):
                best = part.low * (1 - share) + part.high * share
                assert np.abs(value - best).max() < 0.12 * (part.high - part.low).max(), (path, value)
            else:
                last = np.ravel(value - getattr(part, "start", 0))
                assert last.tolist() == [0 if obs < 0 else n - 1 for n in composites.numbers_of(part)], (path, value)


# --- evaluation


def test_a_run_is_evaluated_in_its_environment(tmp_path):
    """And the environment, which raises for an illegal action, never does."""
    result, _ = run(tmp_path, "run", env_kwargs={"mask": "method parts"}, num_iterations=1)
    config = TrainConfig.from_json(result.run_dir / "config.json")
    for deterministic in (True, False):
        plan = EvaluationPlan(4, deterministic=deterministic)
        assert evaluate_config(load_policy(result.run_dir), config, plan, note=lambda _: None)["episodes"] == 4


# --- on the device and compiled


def test_environments_on_the_device_take_structures(tmp_path):
    """Collected on the device, stepped from Python, and two seeds at once: the same metrics."""
    settings = {"env_id": "composites:Kick-v0", "vectorization": "auto", "num_envs": 8}
    _, expected = run(tmp_path, "device", seed=1, **settings)
    assert run(tmp_path, "python", seed=1, backend="gymnasium", **settings)[1] == expected
    assert_near(run(tmp_path, "seeds", num_seeds=2, seed=0, **settings)[1], expected)


def test_a_device_environment_refuses_another_shape():
    """In one part."""
    envs = gym.make_vec("Kick-v0", num_envs=2, vectorization_mode="vector_entry_point")
    envs.reset(seed=0)
    action = envs.action_space.sample()
    envs.step(action)
    wrong = copy.deepcopy(action)
    wrong["way"] = np.zeros((2, 1), np.int64)
    with pytest.raises(ValueError, match=r"actions must have shape \(2,\), not \(2, 1\)"):
        envs.step(wrong)


def test_a_given_vector_environment_gets_them(tmp_path):
    """gymnasium's own class, with dicts of masks that it joins in its infos."""
    envs = SyncVectorEnv([partial(Parts, mask="parts")] * 3)
    assert train(tiny(tmp_path / "run", num_envs=3), envs=envs).summary["iterations"] == 4
    assert all(len(env.received) > 30 for env in envs.envs)
