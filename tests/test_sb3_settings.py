"""Hyperparameters in the format of Stable-Baselines3's zoo: read as data, translated, and what has no counterpart named."""

import os
from pathlib import Path

import pytest

from fastppo import TrainConfig, UsageError, preset_for, train
from fastppo.__main__ import console
from fastppo.cli import parse_train
from fastppo.find_preset import describe
from fastppo.sb3_settings import Translation, arguments_of

pytest.importorskip("yaml")

# written like hyperparams/ppo.yml of rl-baselines3-zoo
FILE = """
default:
  n_timesteps: !!float 1e6
atari:
  env_wrapper:
    - stable_baselines3.common.atari_wrappers.AtariWrapper
  frame_stack: 2
  policy: 'CnnPolicy'
  n_envs: 8
  n_steps: 128
  n_epochs: 4
  batch_size: 256
  n_timesteps: !!float 1e7
  learning_rate: lin_2.5e-4
  clip_range: lin_0.1
  vf_coef: 0.5
Mine-v1: &mine
  normalize: true
  n_envs: 4
  policy: 'MlpPolicy'
  n_steps: 512
  batch_size: 128
  gamma: 0.98
  learning_rate: 3e-5
  max_grad_norm: 0.8
  target_kl: 2e-2
  use_sde: True
  sde_sample_freq: 4
  policy_kwargs: "dict(log_std_init=-2,
                       ortho_init=False,
                       activation_fn=nn.ReLU,
                       net_arch=[dict(pi=[256, 128], vf=[256, 128])]
                       )"
Other-v4:
  <<: *mine
  normalize: "{'norm_obs': True, 'norm_reward': False, 'clip_obs': 5}"
  batch_size: 100
  use_sde: False
  policy_kwargs: "dict(net_arch=dict(pi=[8], vf=[9]))"
  callback: my.Callback
Pictures-v0:
  frame_stack: 2
  env_wrapper:
    - rl_zoo3.wrappers.FrameSkip:
        skip: 2
    - gymnasium.wrappers.resize_observation.ResizeObservation:
        shape: [64, 60]
    - gym.wrappers.gray_scale_observation.GrayScaleObservation:
        keep_dim: true
    - my_package.wrappers.Crop:
        size: 3
    - rl_zoo3.wrappers.HistoryWrapper
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory, with the file in it."""
    monkeypatch.chdir(tmp_path)
    Path("ppo.yml").write_text(FILE)


def settings(env_id):
    return preset_for(env_id, preset="ppo.yml")


@pytest.mark.usefixtures("here")
def test_settings():
    """Numbers, also where YAML reads text; schedules; normalisation; the network. Silence means Stable-Baselines3's default."""
    config = settings("Mine-v1")
    assert (config.num_envs, config.num_steps, config.num_minibatches, config.update_epochs) == (4, 512, 16, 10)
    assert (config.learning_rate, config.anneal_lr, config.clip_coef, config.anneal_clip) == (3e-5, False, 0.2, False)
    assert (config.gamma, config.gae_lambda, config.ent_coef, config.vf_coef, config.max_grad_norm) == (0.98, 0.95, 0, 0.5, 0.8)
    assert (config.norm_obs, config.norm_reward, config.log_std_init) == (True, True, -2.0)
    assert (config.hidden_sizes, config.activation, config.rescale_action) == ((256, 128), "relu", False)
    assert config.init == "torch"
    assert config.target_kl == pytest.approx(0.03)  # there an update stops at 1.5 times of target_kl
    assert (config.action_distribution, config.sde_sample_freq) == ("gsde", 4)
    other = settings("Other-v4")
    assert (other.action_distribution, other.sde_sample_freq) == ("normal", None)  # use_sde: False
    atari = settings("ALE/Pong-v5")
    assert (atari.total_timesteps, atari.learning_rate, atari.anneal_lr) == (10_000_000, 2.5e-4, True)
    assert (atari.clip_coef, atari.anneal_clip, atari.atari_frame_stack, atari.clip_reward) == (0.1, True, 2, True)
    pictures = settings("Pictures-v0")
    assert (pictures.frame_stack, pictures.frame_skip, pictures.resize, pictures.grayscale) == (2, 2, (64, 60), True)
    assert pictures.preprocessing.wrappers == [("my_package.wrappers:Crop", {"size": 3})]
    assert settings("Unknown-v0").total_timesteps == 1_000_000  # the default entry
    assert settings("Mine-v3").gamma == 0.98  # another version


@pytest.mark.usefixtures("here")
def test_what_has_no_counterpart_is_named():
    """In the line that a run prints on its preset."""
    assert describe(settings("Mine-v1")).startswith("preset ppo.yml (Mine-v1; in the zoo's format): ")
    other = describe(settings("Other-v4"))
    for words in ("normalize clip_obs", "batch_size 100: minibatches are of 128 rows", "net_arch", "callback", "norm_obs"):
        assert words in other
    assert "sde" not in other
    assert "HistoryWrapper" in describe(settings("Pictures-v0"))
    assert "norm_reward" not in other


@pytest.mark.parametrize(
    ("kwargs", "eps", "left_out"),
    [
        ("dict(optimizer_class=th.optim.Adam, optimizer_kwargs=None)", None, []),
        ("dict(optimizer_kwargs=dict(eps=1e-7, weight_decay=0.1))", 1e-7, ["optimizer_kwargs weight_decay"]),
        ("dict(optimizer_kwargs=dict(betas=(0.5, 0.9)))", 1e-8, ["optimizer_kwargs betas"]),
        (
            "dict(optimizer_class=RMSpropTFLike, optimizer_kwargs=dict(eps=1e-7))",
            None,
            ["optimizer_class 'RMSpropTFLike'", "optimizer_kwargs"],
        ),
    ],
)
def test_the_optimiser(kwargs, eps, left_out):
    """Adam's epsilon is taken over, which is torch's own with other arguments only; the rest of an optimiser is named."""
    found = Translation({"policy_kwargs": kwargs})
    assert found.settings.get("adam_eps") == eps
    assert found.left_out == [f"policy_kwargs {name}" for name in left_out]


@pytest.mark.usefixtures("here")
def test_the_command_line(capsys):
    """Flags override the file; a run trains by it, and its config.json repeats it without the file."""
    Path("one.yml").write_text("CartPole-v1: {n_envs: 2, n_steps: 16, batch_size: 8, n_epochs: 2, n_timesteps: 64}")
    config = parse_train(["--preset", "one.yml", "--gamma", "0.5"])
    assert (config.env_id, config.num_envs, config.gamma, config.preset) == ("CartPole-v1", 2, 0.5, "one.yml")
    result = train(preset_for(preset="one.yml", eval_episodes=0, run_dir="run", compile="off", verbose=0))
    assert result.summary["global_step"] >= 64
    assert TrainConfig.from_json(Path("run/config.json")).num_minibatches == 4
    assert console(["train", "--preset", "ppo.yml"]) == 2
    assert "name one with --env-id" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("CartPole-v1: {n_steps: many}", "n_steps must be a number"),
        ("CartPole-v1: {n_steps: 1.5}", "n_steps must be a whole number"),
        ("CartPole-v1: {n_envs: 1e30}", "n_steps must be at most"),
        ("CartPole-v1: {gamma: 3}", "--gamma"),
        ("CartPole-v1: {gamma: .inf}", "--gamma"),
        ("CartPole-v1: 3", "has no settings"),
        ("CartPole-v1: [", "damaged"),
        ("[" * 1000, "damaged"),
        ("", "does not hold settings"),
        ("Acrobot-v1: {}\nCartPole-v7: {}", "--env-id"),
        ('CartPole-v1: !!python/object/apply:os.mkdir ["executed"]', "damaged"),
        ("CartPole-v1: {policy_kwargs: \"__import__('os').mkdir('executed')\"}", "is not data"),
        ('CartPole-v1: {normalize: "dict(norm_obs=[].append(1))"}', "is not data"),
    ],
)
def test_one_line(text, words, capsys):
    """A file that is damaged, or more than data."""
    Path("bad.yml").write_text(text)
    assert console(["train", "--preset", "bad.yml"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1
    assert not os.path.exists("executed")


def test_arguments_are_data():
    """A name becomes its text; numbers may be negative; anything that computes is refused."""
    text = "dict(net_arch=dict(pi=[8], vf=[8]), log_std_init=-2.5, activation_fn=nn.ELU, a=None, b={'c': (1, True)})"
    assert arguments_of(text) == {
        "net_arch": {"pi": [8], "vf": [8]},
        "log_std_init": -2.5,
        "activation_fn": "nn.ELU",
        "a": None,
        "b": {"c": [1, True]},
    }
    for bad in (
        "[1]",
        "dict(a=1 * 2)",
        "dict(a=f(1))",
        "dict(1)",
        "{**{}}",
        "dict(**{})",
        "{[1]: 2}",
        "dict(a=lambda: 1)",
        "(" * 500,
    ):
        with pytest.raises(UsageError, match="is not data"):
            arguments_of(bad)


@pytest.mark.usefixtures("here")
def test_without_pyyaml(monkeypatch):
    """One line with what to install."""
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    with pytest.raises(UsageError, match=r"pip install 'fastppo\[zoo\]'"):
        settings("Mine-v1")
