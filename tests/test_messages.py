"""Messages of errors: they name flags on the command line and arguments in Python."""

from dataclasses import fields

import pytest

from fastppo import TrainConfig, TrainingFault, UsageError, load_policy, load_preset, preset_for, train
from fastppo.envs.factory import EnvConfig, make_envs
from fastppo.errors import naming_flags, with_arguments
from fastppo.train import console


@pytest.fixture(autouse=True)
def as_in_python():
    """As in a program of the user's, which does not come through the command line."""
    with naming_flags(False):
        yield


@pytest.mark.parametrize(
    ("message", "argument"),
    [
        ("--num-minibatches 7 does not divide (--num-envs 8 x --num-steps 128)", None),
        ("lower --num-minibatches or set --no-norm-adv", "lower num_minibatches or set norm_adv=False"),
        ("--env-id: no module (--no-check-env trains all the same)", "env_id: no module (check_env=False trains all the same)"),
        ("go on: python -m fastppo.train --resume a --seed 3", "go on: python -m fastppo.train --resume a --seed 3"),
        ("runs/a--b and '--gamma' are quoted", "runs/a--b and '--gamma' are quoted"),
        ("start with torchrun --nproc-per-node 2, or so", "start with torchrun --nproc-per-node 2, or so"),
        ("with torchrun use --device cpu", "with torchrun use device cpu"),
        ("`hf download a/b --local-dir DIR` and --resume", "`hf download a/b --local-dir DIR` and resume"),
        ("fixed after --: leave it out", "fixed after --: leave it out"),
    ],
)  # fmt: skip
def test_flags_become_arguments(message, argument):
    """Flags are named as arguments; values, quotations and commands stay."""
    argument = argument or "num_minibatches 7 does not divide (num_envs 8 x num_steps 128)"
    assert with_arguments(message) == argument
    assert with_arguments(argument) == argument  # a message may be quoted in another one
    for kind in (UsageError, TrainingFault):
        assert str(kind(message)) == argument
        with naming_flags():
            assert str(kind(message)) == message


def test_every_bound_names_the_argument():
    """A value of a wrong type, for each setting; and numbers out of bounds."""
    numbers = ("learning_rate", "gamma", "num_envs", "eval_every", "num_seeds", "rnn_layers", "log_std_init", "cnn_size")
    wrong = {spec.name: object() for spec in fields(TrainConfig)} | dict.fromkeys(numbers, -100)
    for name, value in wrong.items():
        with pytest.raises(UsageError) as caught:
            TrainConfig(**{name: value})
        assert str(caught.value).startswith(f"{name} must be "), name
        assert "--" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"clip_reward": True, "norm_reward": True}, "clip_reward and norm_reward both set"),
        ({"desired_kl": 0.01}, "desired_kl and anneal_lr both change"),
        ({"backend": "torch", "vectorization": "sync"}, "vectorization sync is for backend gymnasium"),
        ({"backend": "torch", "frame_stack": 2}, "frame_stack wraps environments one by one"),
        (
            {"max_episode_steps": 5, "env_kwargs": {"max_episode_steps": 5}},
            "max_episode_steps and env_kwargs max_episode_steps",
        ),
        ({"eval_every": 2, "eval_episodes": 0}, "eval_every 2 plays eval_episodes"),
        ({"policy": "a:B", "rnn": "gru"}, "rnn gru is a part of our networks"),
        ({"num_seeds": 2, "track": "wandb"}, "track wandb follows one run: with num_seeds 2"),
        ({"num_seeds": 2, "exact_resume": True}, "exact_resume is for one seed"),
        ({"num_minibatches": 7}, "num_minibatches 7 does not divide"),
        ({"num_envs": 1, "num_steps": 4}, "set norm_adv=False"),
        ({"rnn": "gru", "num_minibatches": 16}, "num_minibatches 16: rnn gru learns"),
    ],
)
def test_combinations_name_the_arguments(settings, says):
    """Settings that are legal alone and not together."""
    with pytest.raises(UsageError, match=says) as caught:
        TrainConfig(**settings)
    assert " --" not in str(caught.value)


def test_calls_name_the_arguments(tmp_path, monkeypatch):
    """What functions raise, also of environments and files; nothing is written."""
    monkeypatch.chdir(tmp_path)
    for call, says in (
        (lambda: train("CartPole-v1", learning_rate=-1), "^learning_rate must be a number above 0, got -1$"),
        (lambda: train("CartPol-v1"), "^env_id 'CartPol-v1'.*nearest: CartPole-v1"),
        (lambda: train("CartPole-v1", resume="nowhere"), "nowhere"),
        (lambda: train("CartPole-v1", "MlpPolicy"), "^policy must be a class or function .*, got 'MlpPolicy'$"),
        (lambda: preset_for(preset="LunarLandr"), "^preset must be .*nearest: LunarLander"),
        (lambda: preset_for("CartPole-v1", num_iterations=1, total_timesteps=1), "^total_timesteps and num_iterations set"),
        (lambda: load_preset("none.json"), "preset takes a name"),
        (lambda: load_policy("nowhere"), "nowhere"),
        (lambda: make_envs(EnvConfig("CartPole-v1", env_kwargs={"gravity": 1})), "^env_kwargs do not fit CartPole-v1"),
    ):
        with pytest.raises(UsageError, match=says) as caught:
            call()
        assert " --" not in f" {caught.value}"
    assert not list(tmp_path.iterdir())


def test_the_command_line_names_flags(tmp_path, monkeypatch, capsys):
    """Also where a function raises that Python calls too; afterwards messages are for Python again."""
    monkeypatch.chdir(tmp_path)
    for args, says in (
        (["--learning-rate", "-1"], "error: --learning-rate must be"),
        (["--env-id", "CartPol-v1"], "error: --env-id 'CartPol-v1'"),
        (["--num-minibatches", "7"], "error: --num-minibatches 7 does not divide the batch of 1024 (--num-envs 8"),
    ):
        assert console(args) == 2
        assert says in capsys.readouterr().err
    assert str(UsageError("--gamma")) == "gamma"
