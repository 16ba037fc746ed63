"""Checkpoints whose contents are wrong: a policy or a state that no run has written is refused."""

import tracemalloc

import gymnasium as gym
import pytest
import torch

from fastppo import TrainConfig, UsageError, load_policy
from fastppo.policy.codec import space_from_data, space_to_data
from fastppo.run.checkpoint_file import FORMAT, load_checkpoint
from fastppo.train import console
from support.hostile import JSON, TINY, WEIGHT, digest, put, refused

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


def box(**changes):
    data = {"type": "Box", "low": torch.zeros(4), "high": torch.ones(4), "dtype": "float32"}
    return put({**data, **changes}, "obs_space")


def nested_space(levels, kind):
    data = {"type": "Discrete", "n": 2, "start": 0}
    for _ in range(levels):
        data = {"type": kind, "spaces": [data] if kind == "Tuple" else {"a": data}}
    return put(data, "obs_space")


DISCRETE = {"type": "Discrete", "n": 2, "start": 0}
WRONG = {
    # weights
    "no weights": (put(KeyError, "weights"), "weights"),
    "weights are a list": (put([], "weights"), "not named"),
    "one is missing": (put(KeyError, *WEIGHT), "actor.0.weight"),
    "one too many": (put(torch.zeros(3), "weights", "extra"), "more weights"),
    "text": (put("text", *WEIGHT), "a str"),
    "none": (put(None, *WEIGHT), "NoneType"),
    "float64": (put(lambda x: x.double(), *WEIGHT), "float64"),
    "complex": (put(lambda x: x.to(torch.complex64), *WEIGHT), "complex64"),
    "integers": (put(lambda x: x.long(), *WEIGHT), "int64"),
    "transposed": (put(lambda x: x.mT.contiguous(), *WEIGHT), "(8, 4)"),
    "empty": (put(torch.zeros(0), *WEIGHT), "(0,)"),
    "nan": (put(lambda x: x * float("nan"), *WEIGHT), "not finite"),
    "infinite": (put(lambda x: x + float("inf"), *WEIGHT), "not finite"),
    # statistics
    "no moments": (put(KeyError, "obs_moments"), "obs_moments"),
    "moments are text": (put("text", "obs_moments"), "obs_moments"),
    "moments of nothing": (put({}, "obs_moments"), "obs_moments"),
    "moments of another part": (put(lambda x: {"other": x["obs"]}, "obs_moments"), "obs_moments"),
    "two moments": (put(lambda x: x[:2], "obs_moments", "obs"), "obs_moments"),
    "moments in float32": (put(lambda x: [part.float() for part in x], "obs_moments", "obs"), "float32"),
    "moments of another size": (put(lambda x: [x[0][:2], x[1][:2], x[2]], "obs_moments", "obs"), "obs_moments"),
    "negative variance": (put(lambda x: [x[0], -x[1], x[2]], "obs_moments", "obs"), "negative"),
    "infinite mean": (put(lambda x: [x[0] / 0.0, x[1], x[2]], "obs_moments", "obs"), "not finite"),
    "scale is a number": (put(1.0, "reward_scale"), "a float"),
    "mean of returns missing": (put(None, "return_mean"), "return_mean"),
    "mean of returns of a batch": (put(torch.zeros(3), "return_mean"), "return_mean"),
    "nan of returns": (put(torch.tensor(float("nan")), "return_std"), "return_std"),
    "a mask of text": (put("5", "info_mask_size"), "info_mask_size"),
    "a mask of many": (put(10**15, "info_mask_size"), "action_mask"),
    "a module": (put("Stranger", "module"), "Stranger"),
    "a module of another kind": (put([1] * 1000, "module"), "your own"),
    # spaces
    "no space": (put(KeyError, "obs_space"), "obs_space"),
    "space is text": (put("Box", "obs_space"), "a str"),
    "space without a type": (put({}, "obs_space"), "type"),
    "unknown space": (put({"type": "Graph"}, "obs_space"), "Graph"),
    "type is a list": (put({"type": [1] * 1000}, "obs_space"), "unknown space"),
    "larger box": (box(low=torch.zeros(5), high=torch.ones(5)), "obs_moments"),
    "bounds that differ": (box(low=torch.zeros(5)), "bounds"),
    "bounds of text": (box(low="0"), "bounds"),
    "bounds upside down": (box(low=torch.ones(4), high=torch.zeros(4)), "bounds"),
    "bounds of nan": (box(low=torch.full((4,), float("nan"))), "bounds"),
    "complex bounds": (box(low=torch.zeros(4, dtype=torch.complex64)), "bounds"),
    "box of objects": (box(dtype="O"), "dtype"),
    "box of records": (box(dtype="V1000000000"), "dtype"),
    "dtype is a list": (box(dtype=["float32"]), "dtype"),
    "box of nothing": (box(low=torch.zeros(0), high=torch.zeros(0)), "best.pt"),
    "many choices": (put({**DISCRETE, "n": 10**15}, "obs_space"), "1000000000000000"),
    "no choice": (put({**DISCRETE, "n": 0}, "obs_space"), "at least 1"),
    "half a choice": (put({**DISCRETE, "n": 2.0}, "obs_space"), "at least 1"),
    "true choices": (put({**DISCRETE, "n": True}, "obs_space"), "at least 1"),
    "a start far out": (put({**DISCRETE, "start": 2**63 - 1}, "obs_space"), "starts"),
    "a start of text": (put({**DISCRETE, "start": "0"}, "obs_space"), "starts"),
    "many actions": (put({**DISCRETE, "n": 10**7}, "action_space"), "actor.head"),
    "many bits": (put({"type": "MultiBinary", "shape": [10**12]}, "action_space"), "1000000000000"),
    "many dimensions": (put({"type": "MultiBinary", "shape": [1] * 10_000}, "action_space"), "MultiBinary"),
    "many bits in two": (put({"type": "MultiBinary", "shape": [10**6, 10**6]}, "action_space"), "numbers"),
    "bits of text": (put({"type": "MultiBinary", "shape": "4"}, "action_space"), "MultiBinary"),
    "categories that add up": (
        put(
            {"type": "MultiDiscrete", "nvec": torch.full((9,), 2**23), "start": torch.zeros(9).long(), "dtype": "int64"},
            "action_space",
        ),
        "at most",
    ),
    "categories of floats": (
        put({"type": "MultiDiscrete", "nvec": torch.ones(2), "start": torch.zeros(2), "dtype": "int64"}, "action_space"),
        "whole numbers",
    ),
    "nested in tuples": (nested_space(14, "Tuple"), "best.pt"),
    "nested in dicts": (nested_space(12, "Dict"), "best.pt"),
    "nested deep": (nested_space(17, "Tuple"), "best.pt"),
    "many parts": (put({"type": "Tuple", "spaces": [DISCRETE.copy() for _ in range(2000)]}, "obs_space"), "parts"),
    "parts are text": (put({"type": "Tuple", "spaces": "abc"}, "obs_space"), "unknown space"),
    "parts are a number": (put({"type": "Dict", "spaces": 5}, "obs_space"), "best.pt"),
    "no parts": (put({"type": "Dict", "spaces": {}}, "obs_space"), "nothing to observe"),
}


@pytest.mark.parametrize(("change", "word"), WRONG.values(), ids=WRONG)
def test_a_policy_that_is_none(change, word, run_dir):
    """What is in a checkpoint is checked before it is used: a line that names the file and what is wrong, in little memory."""
    path = run_dir / "checkpoints" / "best.pt"
    state = torch.load(path)
    change(state["policy"])
    torch.save(state, path)
    tracemalloc.start()
    refused(lambda: load_policy(run_dir), str(path), word)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


@pytest.mark.parametrize("policy", [None, [], "policy", 5, {}])
def test_a_checkpoint_without_a_policy(policy, run_dir):
    """The same where there is nothing to look into."""
    path = run_dir / "checkpoints" / "best.pt"
    torch.save({"format": FORMAT, "policy": policy}, path)
    refused(lambda: load_policy(run_dir), str(path))
    torch.save({"format": FORMAT}, path)
    refused(lambda: load_policy(run_dir), str(path), "policy")


STATE = {
    "a scalar for a weight": put(torch.zeros(()), "policy", *WEIGHT),
    "infinite weights": put(lambda x: x / 0.0, "policy", *WEIGHT),
    "weights are a list": put([], "policy", "weights"),
    "moments are text": put("text", "policy", "obs_moments"),
    "no moments": put(None, "policy", "obs_moments"),
    "moments of another size": put(lambda x: [x[0][:2], x[1][:2], x[2]], "policy", "obs_moments", "obs"),
    "mean of returns is text": put("text", "policy", "return_mean"),
    "moments of returns are text": put("text", "return_moments"),
    "moments of returns missing": put(None, "return_moments"),
    "adam is text": put("text", "adam"),
    "adam is empty": put({}, "adam"),
    "adam of another size": put(lambda x: {name: torch.zeros(3) for name in x}, "adam"),
    "adam of text": put(lambda x: dict.fromkeys(x, "text"), "adam"),
    "generators of text": put(lambda x: dict.fromkeys(x, "text"), "generators"),
    "generators of another size": put(lambda x: dict.fromkeys(x, torch.zeros(3, dtype=torch.uint8)), "generators"),
    "no generators": put(None, "generators"),
    "episodes are text": put("text", "episodes"),
    "returns are text": put(["text"], "episodes", "returns"),
    "returns are a number": put(5, "episodes", "returns"),
    "iteration is text": put("2", "iteration"),
    "iteration is negative": put(-2, "iteration"),
    "steps are missing": put(KeyError, "global_step"),
    "steps are half": put(0.5, "global_step"),
    "seconds are none": put(None, "seconds"),
    "best is a list": put([], "best_return"),
}


@pytest.mark.parametrize("change", STATE.values(), ids=STATE)
def test_resuming_from_what_is_no_state(change, run_dir, capsys):
    """--resume checks all that it takes up: exit code 2, a line, nothing written."""
    path = run_dir / "checkpoints" / "last.pt"
    state = torch.load(path)
    change(state)
    torch.save(state, path)
    before = digest(run_dir)
    assert console(["--resume", str(run_dir), "--num-iterations", "3"]) == 2
    error = capsys.readouterr().err
    assert "last.pt" in error
    assert len(error.splitlines()) <= 2
    assert digest(run_dir) == before


@pytest.mark.parametrize(
    "space",
    [
        gym.spaces.Box(-1.0, 1.0, (2, 3)),
        gym.spaces.Box(0, 255, (4, 84, 84), "uint8"),
        gym.spaces.Box(-float("inf"), float("inf"), (3,), "float64"),
        gym.spaces.Box(-5, 5, (), "int16"),
        gym.spaces.Discrete(5, start=-3),
        gym.spaces.MultiDiscrete([[2, 3], [4, 5]], start=[[1, 0], [0, -1]]),
        gym.spaces.MultiBinary([2, 3]),
        gym.spaces.Dict({"a": gym.spaces.Tuple([gym.spaces.Discrete(2)] * 3), "b": gym.spaces.MultiBinary([4])}),
    ],
    ids=lambda space: type(space).__name__,
)
def test_spaces_that_are_meant(space, tmp_path):
    """The checks let pass what a run writes, through a file and back."""
    torch.save({"format": FORMAT, "space": space_to_data(space)}, tmp_path / "checkpoint.pt")
    assert space_from_data(load_checkpoint(tmp_path / "checkpoint.pt")["space"]) == space


@hypothesis.settings(max_examples=100, deadline=None, database=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_any_value_anywhere_in_a_policy(original, data):
    """One place of a policy replaced by any plain value: a UsageError, or a policy that acts."""
    state, path = original[1]["policy"], original[2]
    places = [(key,) for key in state] + [(key, part) for key in state if isinstance(state[key], dict) for part in state[key]]
    place = data.draw(st.sampled_from(places))
    tensors = st.sampled_from([torch.zeros(()), torch.ones(4), torch.zeros(4, 8), torch.tensor([1, 2])])
    value = data.draw(JSON | tensors)
    changed = {key: dict(part) if isinstance(part, dict) else part for key, part in state.items()}
    put(value, *place)(changed)
    torch.save({"format": FORMAT, "policy": changed}, path)
    config = TrainConfig(hidden_sizes=(8,))
    from fastppo.analysis.loading import agent_from_checkpoint

    try:
        agent = agent_from_checkpoint(load_checkpoint(path), config, path)
    except UsageError:
        return
    agent.act(agent.obs_space.sample())


@pytest.mark.parametrize(
    "change",
    [
        put("text", "environments"),
        put({}, "environments"),
        put([], "environments", "running"),
        put(lambda x: x[:-1], "environments", "running"),
        put(lambda x: [part[:1] for part in x], "environments", "running"),
        put(lambda x: [part.double() for part in x], "environments", "running"),
        put(lambda x: torch.zeros_like(x) + 255, "environments", "generator"),
        put(torch.zeros(3, dtype=torch.uint8), "environments", "generator"),
        put("text", "made_with"),
        put({"device": 5}, "made_with"),
    ],
)
def test_resuming_environments_that_are_none(change, tmp_path, capsys):
    """Environments on the device go on where they were, if that is where such environments can be."""
    run_dir = tmp_path / "run"
    assert console([*TINY, "--backend", "torch", "--run-dir", str(run_dir), "--checkpoint-iterations", "5"]) == 0
    path = run_dir / "checkpoints" / "last.pt"
    state = torch.load(path)
    change(state)
    torch.save(state, path)
    before = digest(run_dir)
    capsys.readouterr()
    assert console(["--resume", str(run_dir), "--num-iterations", "3"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "does not fit the run's config.json" in error
    assert digest(run_dir) == before
