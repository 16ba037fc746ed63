"""Settings: every flag once, read by the command line and by Python alike, refused where they cannot be."""

import os
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest

from fastppo import TrainConfig, UsageError
from fastppo.bounds import flag
from fastppo.cli import parse_train
from fastppo.find_preset import load_preset
from fastppo.presets import PRESETS
from fastppo.train import console


def test_help_lists_every_flag_once(capsys):
    """Each setting is a flag with a help text under its own name."""
    with pytest.raises(SystemExit) as exit_:
        console(["--help"])
    assert not exit_.value.code
    text = capsys.readouterr().out
    words = text.replace("|", " ").replace(",", " ").split()
    for spec in fields(TrainConfig):
        listed = [word for word in words if word == flag(spec.name)]
        assert listed, spec.name


HEAVY = {"torch", "tensordict", "torchrl", "matplotlib", "tensorboard", "optuna", "onnx", "scipy", "pandas"}


def test_errors_do_not_wait_for_torch(tmp_path):
    """A wrong flag, environment or directory is answered at once: nothing heavy is imported for it."""
    code = (
        "import sys\n"
        "from fastppo.train import console\n"
        "assert console(['--num-envs', 'x']) == 2\n"
        "assert console(['--env-id', 'CartPol-v1']) == 2\n"
        "assert console(['--resume', 'nowhere']) == 2\n"
        f"heavy = {HEAVY} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment, capture_output=True)


def test_help_does_not_wait_for_torch(tmp_path):
    """The same of --help as it is asked for, from the first import to the last: Python's own list of them."""
    command = [sys.executable, "-X", "importtime", "-m", "fastppo.train", "--help"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, check=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"fastppo", "tyro"} <= imported  # the list is there
    assert not HEAVY & imported


def test_flags_reach_the_settings():
    """Each kind of flag: number, switch and its opposite, choice, several values, KEY=VALUE, nothing for the rest."""
    config = parse_train(
        [
            "--preset",
            "none",
            "--env-id",
            "Pendulum-v1",
            "--num-envs",
            "4",
            "--gamma",
            "0.9",
            "--norm-obs",
            "--no-anneal-lr",
            "--advantage",
            "monte-carlo",
            "--hidden-sizes",
            "32",
            "16",
            "--target-kl",
            "0.02",
            "--env-kwargs",
            "g=9.81",
            "render=None",
            "fast=True",
            "name=abc",
            "shape=[1,2]",
        ]
    )
    assert config == TrainConfig(
        preset="none",
        env_id="Pendulum-v1",
        num_envs=4,
        gamma=0.9,
        norm_obs=True,
        anneal_lr=False,
        advantage="monte-carlo",
        hidden_sizes=(32, 16),
        target_kl=0.02,
        env_kwargs={"g": 9.81, "render": None, "fast": True, "name": "abc", "shape": [1, 2]},
    )
    assert parse_train(["--preset", "none"]) == TrainConfig()
    assert parse_train(["--num_envs=4"]).num_envs == 4


def test_the_articles_values():
    """ARTICLE.md's table, value by value: --preset article is that system."""
    config = PRESETS["article"].config()
    assert (config.num_envs, config.num_steps, config.num_iterations) == (8, 128, 100)
    assert (config.clip_coef, config.update_epochs, config.rows_per_minibatch) == (0.1, 3, 256)
    assert (config.learning_rate, config.gamma, config.vf_coef, config.ent_coef) == (2.5e-4, 0.99, 1.0, 0.01)
    assert (config.seed, config.eval_episodes) == (0, 5)
    assert (config.hidden_sizes, config.activation) == ((100, 100), "relu")
    assert (config.advantage, config.norm_returns) == ("monte-carlo", True)
    assert (config.anneal_lr, config.anneal_clip) == (True, True)


def test_scalars_of_numpy_are_numbers():
    """A setting that was computed with NumPy is kept as Python's own number; True is still no number, and 1 not True."""
    given = {"num_envs": np.int64(4), "learning_rate": np.float32(0.5), "norm_obs": np.True_, "hidden_sizes": [np.int32(8)]}
    plain = TrainConfig(num_envs=4, learning_rate=0.5, norm_obs=True, hidden_sizes=(8,))
    assert TrainConfig(**given) == plain
    assert TrainConfig(**given).to_json() == plain.to_json()
    for wrong in ({"num_envs": np.True_}, {"num_envs": np.float64(4)}, {"num_envs": np.array([4])}, {"norm_obs": np.int64(1)}):
        with pytest.raises(UsageError):
            TrainConfig(**wrong)


def test_steps_replace_a_presets_iterations():
    """--total-timesteps on a preset that counts iterations counts steps, and --minibatch-size replaces the number of them."""
    config = parse_train(["--preset", "article", "--total-timesteps", "5000"])
    assert (config.total_timesteps, config.num_iterations) == (5000, None)
    config = parse_train(["--preset", "article", "--minibatch-size", "128"])
    assert (config.rows_per_minibatch, config.minibatches_per_epoch) == (128, 8)


def test_derived_values():
    """B, M and B / M, by hand."""
    config = TrainConfig(num_envs=3, num_steps=20, num_minibatches=4)
    assert (config.batch_size, config.minibatches_per_epoch, config.rows_per_minibatch) == (60, 4, 15)
    config = TrainConfig(num_envs=3, num_steps=20, minibatch_size=20)
    assert (config.batch_size, config.minibatches_per_epoch, config.rows_per_minibatch) == (60, 3, 20)


def test_settings_are_frozen():
    """No part of the program can change them on the way."""
    with pytest.raises(FrozenInstanceError):
        TrainConfig().num_envs = 3


@pytest.mark.parametrize("name", list(PRESETS))
def test_json_and_back(name, tmp_path):
    """config.json holds all of it: tuples, infinities and mappings too."""
    config = replace(
        PRESETS[name].config(), env_kwargs={"g": 9.8, "names": ["a"]}, hidden_sizes=(7,), max_grad_norm=float("inf")
    )
    (tmp_path / "config.json").write_text(config.to_json())
    assert TrainConfig.from_json(tmp_path / "config.json") == config


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_envs": 0}, "--num-envs"),
        ({"num_envs": 2.5}, "--num-envs"),
        ({"num_envs": True}, "--num-envs"),
        ({"num_steps": float("nan")}, "--num-steps"),
        ({"gae_lambda": -0.1}, "--gae-lambda"),
        ({"clip_coef": 0.0}, "--clip-coef"),
        ({"max_grad_norm": 0.0}, "--max-grad-norm"),
        ({"target_kl": -1.0}, "--target-kl"),
        ({"vf_coef": "much"}, "--vf-coef"),
        ({"activation": "swish"}, "--activation"),
        ({"compile": "maybe"}, "--compile"),
        ({"hidden_sizes": (64, 0)}, "--hidden-sizes"),
        ({"device": "gpu"}, "--device"),
        ({"desired_kl": 0.01}, "--desired-kl and --anneal-lr"),
        ({"clip_reward": True, "norm_reward": True}, "--clip-reward and --norm-reward"),
        ({"num_minibatches": 7}, r"--num-minibatches 7 .*4 or 8"),
        ({"minibatch_size": 5000}, r"--minibatch-size 5000 .*1024"),
        ({"num_envs": 1, "num_steps": 4}, "--norm-adv"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_refused_from_python(settings, named):
    """The same bounds hold for keyword arguments: a bad value fails at construction and names the flag."""
    with pytest.raises(UsageError, match=named):
        TrainConfig(**settings)


def test_settings_that_look_odd_but_are_meant():
    """Legal extremes are not refused."""
    TrainConfig(gamma=1.0, gae_lambda=0.0, ent_coef=0.0, max_grad_norm=float("inf"), eval_episodes=0, seed=0)
    TrainConfig(hidden_sizes=(), num_envs=1, num_steps=1, num_minibatches=1, norm_adv=False)


def test_the_old_name_of_a_setting(tmp_path):
    """The old flag still works, and files of an older version are read."""
    for given in ("--minibatch-strata 4", "--minibatch-strata=4", "--minibatch_strata 4", "--minibatch-shards 4"):
        assert parse_train(["--preset", "none", *given.split()]) == TrainConfig(minibatch_shards=4)
    old = TrainConfig(minibatch_shards=4).to_json().replace("minibatch_shards", "minibatch_strata")
    (tmp_path / "config.json").write_text(old)
    assert TrainConfig.from_json(tmp_path / "config.json") == TrainConfig(minibatch_shards=4)
    (tmp_path / "preset.json").write_text('{"settings": {"minibatch_strata": 4}}')
    assert load_preset(tmp_path / "preset.json").minibatch_shards == 4
