"""Settings that change nothing in a run are told, in one line before training."""

import pytest
import torch
from environments import ACTIONS
from gymnasium.spaces import Box, Discrete

from fastppo import TrainConfig
from fastppo.find_preset import preset_for
from fastppo.policy.make_network import make_network
from fastppo.policy.spaces import action_spec, obs_spec
from fastppo.training.unused_settings import unused_settings
from support.networks import Small

VECTOR, PICTURE = Box(-1, 1, (3,)), Box(0, 255, (84, 84, 4), "uint8")


def told(config, policy=None, observations=VECTOR, actions=ACTIONS["box"]):
    """The lines for a run of that network."""
    obs = obs_spec(observations)
    action = action_spec(actions, config.squash_actions, config.action_distribution)
    network = make_network(obs, action, config, policy)
    return unused_settings(config, network, obs, action, torch.device("cpu"))


@pytest.mark.parametrize(
    ("settings", "policy", "lines"),
    [
        (
            {"action_distribution": "beta", "log_std_init": -2.0},
            None,
            ["--log-std-init changes nothing: --action-distribution beta has no standard deviation"],
        ),
        (
            {"layer_norm": True, "hidden_sizes": ()},
            None,
            ["--layer-norm changes nothing: this network has no hidden layers to normalise (--hidden-sizes 64)"],
        ),
        ({"layer_norm": True}, Small, ["--layer-norm changes nothing: your network replaces ours"]),
        (
            {"activation": "relu", "share_backbone": True},
            Small,
            ["--activation and --share-backbone change nothing: your network replaces ours"],
        ),
        ({"cnn": "impala"}, None, ["--cnn changes nothing: the observations have no pictures"]),
        ({"rnn_hidden_size": 32}, None, ["--rnn-hidden-size changes nothing: the network has no memory (--rnn lstm, or gru)"]),
        (
            {"advantage": "monte-carlo", "gae_lambda": 0.9},
            None,
            ["--gae-lambda changes nothing: it is for --advantage gae"],
        ),
        (
            {"bf16": True},
            None,
            ["--bf16 is for GPUs: on cpu networks are rounded to bfloat16, and there are no fused programs"],
        ),
        ({"tf32": True}, None, ["--tf32 is for NVIDIA GPUs: on cpu it changes nothing"]),
        ({"layer_norm": True, "rnn": "lstm", "rnn_layers": 2}, None, []),
        ({"action_distribution": "gsde", "log_std_init": -2.0, "hidden_sizes": (8,), "activation": "elu"}, None, []),
        ({}, Small, []),
    ],
)
def test_a_setting_that_changes_nothing_is_told(settings, policy, lines):
    """With its flag and the reason; a setting that this run reads is not."""
    assert told(TrainConfig(num_minibatches=1, **settings), policy) == lines


def test_settings_of_pictures_and_of_continuous_actions():
    """Told where there are none, and not where there are."""
    config = TrainConfig(num_minibatches=1, cnn="impala", cnn_size=64, log_std_init=-1.0)
    assert told(config, actions=Discrete(2)) == [
        "--cnn and --cnn-size change nothing: the observations have no pictures",
        "--log-std-init changes nothing: there are no continuous actions",
    ]
    assert told(config, observations=PICTURE) == []


def test_what_a_preset_brings_is_not_told():
    """A preset is for many environments and networks; what is given beside it is told."""
    assert told(preset_for("Humanoid-v5"), Small) == []  # its hidden_sizes, activation
    assert told(preset_for("Humanoid-v5", activation="elu"), Small) == [
        "--activation changes nothing: your network replaces ours"
    ]
