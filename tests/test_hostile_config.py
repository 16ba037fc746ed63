"""config.json from somebody else: settings as a run writes them, or a refusal."""

import json
import os
import tracemalloc
from pathlib import Path

import pytest

from fastppo import TrainConfig, UsageError, load_policy
from support.hostile import JSON, directory, edit_config, fifo, linked, refused

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies


def text(content):
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, ["cannot be read"]),
        (fifo, ["not a regular file"]),
        (linked("/dev/zero"), ["not a regular file"]),
        (directory, ["not a regular file"]),
        (lambda path: os.truncate(path, 10**10), ["larger"]),
        (text(""), ["damaged"]),
        (text("{"), ["damaged"]),
        (text("[" * 100_000), ["damaged"]),
        (text('{"env_kwargs": ' + "[" * 900 + "]" * 900 + "}"), ["--env-kwargs", "nested"]),
        (text('{"a":' * 100_000), ["damaged"]),
        (text(b'{"env_id": "\xff\xfe"}'), ["damaged"]),
        (text('{"seed": 1}'.encode("utf-16")), ["damaged"]),
        (text('{"seed": ' + "9" * 10_000 + "}"), ["damaged"]),
        (text('{"seed": 1, "seed": 2}'), ["damaged", "twice"]),
        (text('{"env_kwargs": {"a": 1, "a": 2}}'), ["damaged", "twice"]),
        (text("null"), ["does not hold the settings", "None"]),
        (text("[1, 2]"), ["does not hold the settings"]),
        (text('"' + "x" * 100_000 + '"'), ["does not hold the settings"]),
        (text('{"warp_factor": 9}'), ["unknown", "warp_factor"]),
        (text('{"num_env": 9}'), ["unknown", "num_env", "nearest: num_envs"]),
        (text('{"__class__": 9}'), ["unknown", "__class__"]),
        (text('{"batch_size": 9}'), ["unknown", "batch_size"]),
        (text('{"' + "x" * 100_000 + '": 9}'), ["unknown"]),
        (text('{"\\u001b[2J": 9}'), ["unknown", r"\x1b"]),
    ],
)
def test_a_config_that_is_none(damage, words, run_dir):
    """One line that names the file, at once, and in little memory."""
    damage(run_dir / "config.json")
    tracemalloc.start()
    refused(lambda: load_policy(run_dir), str(run_dir / "config.json"), *words)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


INTEGERS = (
    "num_envs num_steps total_timesteps num_iterations num_minibatches minibatch_size update_epochs cnn_size seed num_threads"
)
FLOATS = "learning_rate adam_eps gamma gae_lambda clip_coef ent_coef vf_coef max_grad_norm target_kl log_std_init"
SWITCHES = "norm_adv norm_obs norm_reward anneal_lr share_backbone squash_actions plain atari_grayscale"
CHOICES = "vectorization backend advantage activation cnn_activation compile"
TEXTS = "env_id preset device run_dir resume"
WRONG_VALUES = {
    INTEGERS: ["4", True, 4.0, 0.5, -1, 10**30, [4], {}, float("nan"), float("inf")],
    FLOATS: ["0.5", True, [0.5], {}, float("nan"), 10**400],
    SWITCHES: [0, 1, "true", None, [], 1.0],
    CHOICES: ["no such choice", 1, None, True, ["auto"], {}],
    TEXTS: [1, True, [], {}, 1.5],
    "hidden_sizes": [64, "64", {}, [64.0], ["64"], [True], [0], [[64]], [None]],
    "env_kwargs": [None, [], "a=1", 5],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for names, values in WRONG_VALUES.items() for name in names.split() for value in values]
)
def test_a_setting_of_another_type(name, value, tmp_path):
    """Named as the flag that it is, with what it must be and the file it is in; from Python the same without the file."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({name: value}))
    flag = "--" + name.replace("_", "-")
    if value == 10**400:
        refused(lambda: TrainConfig.from_json(path), str(path), flag)
    else:
        refused(lambda: TrainConfig.from_json(path), str(path), f"{flag} must be ")
    refused(lambda: TrainConfig(**{name: value}), f"{flag} must be ")


def test_what_an_environment_cannot_be_given():
    """env_kwargs that config.json could not hold are refused before anything runs."""
    own = []
    own.append(own)
    for value in (object(), {1: 2}, {1, 2}, b"bytes", own, print):
        refused(lambda value=value: TrainConfig(env_kwargs={"key": value}), "--env-kwargs")
    TrainConfig(env_kwargs={"key": [1, (2.5, None), {"a": True}]})


def test_settings_that_an_older_version_lacked(run_dir):
    """A config.json with fewer settings has defaults for the rest, and one from an editor that marks its encoding is read.

    Large pictures are not resized in it, wide actions not rescaled, and episodes are reset in the next step, as it was then.
    """
    (run_dir / "config.json").write_bytes(b'\xef\xbb\xbf{"hidden_sizes": [8], "learning_rate": 1}')
    assert TrainConfig.from_json(run_dir / "config.json") == TrainConfig(
        hidden_sizes=(8,), learning_rate=1.0, resize=(0,), rescale_action=False, autoreset="next-step"
    )
    load_policy(run_dir)


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden_sizes": [2**16]},
        {"hidden_sizes": [2**16, 2**16, 2**16]},
        {"hidden_sizes": [1] * 100_000},
        {"hidden_sizes": None},
        {"hidden_sizes": []},
        {"share_backbone": True},
        {"squash_actions": True},
    ],
    ids=lambda settings: str(settings)[:40],
)
def test_a_config_of_another_network(settings, run_dir):
    """A network that is not the checkpoint's is refused before memory is taken for it."""
    edit_config(run_dir, **settings)
    refused(lambda: load_policy(run_dir), "best.pt")


def test_batches_of_a_size_that_nobody_has():
    """Looking for the nearest divisors of a huge batch takes no time."""
    refused(lambda: TrainConfig(num_envs=2**40, num_steps=2**20), "--num-envs", "--num-steps")
    refused(lambda: TrainConfig(num_envs=2**30 + 1, num_steps=1, num_minibatches=7), "--num-minibatches 7", "5 or 13")


@hypothesis.settings(max_examples=100, deadline=None, database=None, derandomize=True)
@hypothesis.given(settings=st.dictionaries(st.sampled_from(list(TrainConfig.__dataclass_fields__)), JSON, max_size=3))
@pytest.mark.long
def test_any_json_as_settings(settings, original):
    """config.json of any values: settings that are written as they were read, or a UsageError."""
    path = original[2].with_name("config.json")
    path.write_text(json.dumps(settings))
    try:
        config = TrainConfig.from_json(path)
    except UsageError:
        return
    path.write_text(config.to_json())
    assert TrainConfig.from_json(path).to_json() == config.to_json()
