"""A policy of Stable-Baselines3's PPO as ours: settings, spaces, weights, statistics. Reads data only.

Its networks are those of stable_baselines3/common/policies.py and torch_layers.py: two multi-layer perceptrons over the flat
observation or over the features of the Nature CNN. What ours cannot hold is refused.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import torch
from gymnasium.spaces import Box, MultiBinary
from torch import Tensor

from fastppo.config import TrainConfig
from fastppo.errors import UsageError, brief
from fastppo.policy.codec import checked
from fastppo.policy.encoder import NATURE_CNN, channels_first
from fastppo.policy.make_network import make_network
from fastppo.policy.network import Network
from fastppo.policy.normalization import RunningMoments
from fastppo.policy.spaces import ActionSpec, ObsLeaf, ObsSpec, action_spec, obs_spec
from fastppo.sb3.archive import SavedModel
from fastppo.sb3.saved_spaces import read_space
from fastppo.sb3.vec_normalize import Statistics
from fastppo.sb3_settings import ACTIVATIONS, Translation, class_name

# attributes of a model that are arguments of PPO which we have settings for
ARGUMENTS = (
    *("n_envs", "n_steps", "batch_size", "n_epochs", "gamma", "gae_lambda", "ent_coef", "vf_coef", "max_grad_norm"),
    *("target_kl", "normalize_advantage", "seed", "use_sde", "sde_sample_freq"),
)
EXTRACTORS = ("features_extractor", "pi_features_extractor", "vf_features_extractor")  # of one policy: the same tensors
PLAIN_EXTRACTORS = ("NatureCNN", "FlattenExtractor")

Spaces = tuple[gym.Space[Any], gym.Space[Any]]  # of observations and actions


@dataclass(frozen=True)
class ImportedPolicy:
    """A policy of Stable-Baselines3 as ours."""

    config: TrainConfig
    network: Network
    params: Tensor  # (P,)
    obs_space: gym.Space[Any]
    obs: ObsSpec
    action: ActionSpec
    obs_moments: dict[str, RunningMoments] | None
    return_moments: RunningMoments | None
    steps: int  # of its training


def import_policy(
    model: SavedModel,
    env_id: str,
    spaces_of: Callable[[TrainConfig], Spaces] | None = None,
    statistics: Statistics | None = None,
) -> ImportedPolicy:
    """The model as a policy of ours.

    Args:
        env_id: the environment of the new run.
        spaces_of: makes the environment of these settings and returns its spaces. None: those of the file are taken.
        statistics: of VecNormalize, if there was one that normalised observations.

    Raises:
        UsageError: the model is not of PPO, or has something that ours has not, or does not fit the environment.
    """
    _refuse_others(model)
    kwargs = _kwargs(model)
    rewards = None if statistics is None else statistics.rewards
    try:
        settings = Translation(_arguments(model.data)).settings | _network_settings(model, kwargs)
        settings |= {"norm_obs": statistics is not None, "norm_reward": rewards is not None}
        config = TrainConfig(**settings, env_id=env_id)
    except UsageError as error:
        raise model.refuse(str(error)) from None
    own = _own_spaces(model)
    obs_space, action_space = own if spaces_of is None else spaces_of(config)
    action = action_spec(action_space, False, config.action_distribution)
    obs = obs_spec(obs_space, None, action, normalize=config.norm_obs)
    _check_spaces(model, own, (obs_space, action_space), obs)
    leaf = obs.leaves[0]
    has_cnn = any(name.startswith("features_extractor.cnn.") for name in model.weights)
    if has_cnn != obs.has_images or (obs.has_images and kwargs.get("normalize_images", True) is not True):
        raise model.refuse("here pictures, and nothing else, go through a CNN, divided by 255")
    network = make_network(obs, action, config)
    try:
        params = network.flatten(_weights(model.weights, leaf, action_space, config))
        obs_moments = None if statistics is None else {"obs": _fitting(statistics.obs, leaf)}
    except (KeyError, ValueError, RuntimeError) as error:
        raise model.refuse(f"its weights are not those of its spaces and settings ({brief(error)})") from None
    steps = model.data.get("num_timesteps")
    steps = steps if type(steps) is int and 0 <= steps < 2**62 else 0
    return ImportedPolicy(config, network, params, obs_space, obs, action, obs_moments, rewards, steps)


def _refuse_others(model: SavedModel) -> None:
    """Raise UsageError for a model that is not of PPO or MaskablePPO."""
    if any("lstm" in name for name in model.weights):
        raise model.refuse("it is recurrent, and its memory has another form than --rnn")
    if not {"n_epochs", "clip_range", "gae_lambda", "policy_class", "observation_space", "action_space"} <= model.data.keys():
        raise model.refuse("it is no model of PPO")


def _kwargs(model: SavedModel) -> dict[str, Any]:
    """The readable part of policy_kwargs. Raises UsageError for what changes the actions and has no counterpart."""
    kwargs = model.data.get("policy_kwargs")
    kwargs = kwargs if isinstance(kwargs, dict) else {}
    activation, extractor = kwargs.get("activation_fn", "nn.Tanh"), kwargs.get("features_extractor_class", "NatureCNN")
    if class_name(activation) not in ACTIVATIONS:
        raise model.refuse(f"activation {str(activation)[:100]!r} is not one of {', '.join(ACTIVATIONS)}")
    if class_name(extractor) not in PLAIN_EXTRACTORS:
        raise model.refuse(f"it has a features extractor of its own, {str(extractor)[:100]!r}")
    if kwargs.get("squash_output") is True:
        raise model.refuse("its actions are squashed (squash_output)")
    if kwargs.get("full_std") is False or kwargs.get("use_expln") is True:
        raise model.refuse("its noise has another form (full_std, use_expln)")
    return kwargs


def _arguments(data: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of PPO in a model's attributes; a schedule that is not constant is left out."""
    arguments = {name: data[name] for name in ARGUMENTS if isinstance(data.get(name), int | float)}
    total = data.get("_total_timesteps")
    if isinstance(total, int | float) and total >= 1:
        arguments["n_timesteps"] = total
    for name in ("learning_rate", "clip_range"):
        value = data.get(name)
        text = value.get("value_schedule") if isinstance(value, dict) else value
        constant = re.fullmatch(r"(?:ConstantSchedule\(val=)?([-+.e\d]+)\)?", str(text))
        if constant:
            arguments[name] = constant[1]
    return arguments


def _network_settings(model: SavedModel, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a network with these weights. Raises UsageError where ours has no such form."""
    actor, critic = (_widths(model.weights, trunk) for trunk in ("policy_net", "value_net"))
    if actor != critic:
        shown = (" ".join(map(str, sizes)) or "none" for sizes in (actor, critic))
        raise model.refuse("its actor has layers of {} and its critic of {}: here both have the same".format(*shown))
    settings = {"hidden_sizes": actor, "activation": ACTIVATIONS[class_name(kwargs.get("activation_fn", "nn.Tanh"))]}
    features = model.weights.get("features_extractor.linear.0.bias")
    return settings | ({"cnn_size": features.numel()} if isinstance(features, Tensor) else {})


def _widths(weights: Mapping[str, Any], trunk: str) -> tuple[int, ...]:
    """The widths of the hidden layers of one network."""
    biases = (weights.get(f"mlp_extractor.{trunk}.{2 * layer}.bias") for layer in range(len(weights)))
    return tuple(bias.numel() for bias in biases if isinstance(bias, Tensor))


def _own_spaces(model: SavedModel) -> Spaces:
    """The spaces that the file describes. Raises UsageError."""
    spaces = []
    for name in ("observation_space", "action_space"):
        try:
            spaces.append(read_space(model.data[name]))
        except (KeyError, ValueError, TypeError, OverflowError, AssertionError) as error:
            raise model.refuse(f"its {name} cannot be read as text ({brief(error)})") from None
    return spaces[0], spaces[1]


def _check_spaces(model: SavedModel, own: Spaces, given: Spaces, obs: ObsSpec) -> None:
    """Raise UsageError if an environment has other spaces than the model. Bounds may differ in their last digits."""
    for what, there, here in zip(("observations", "actions"), own, given, strict=True):
        if isinstance(there, Box) and isinstance(here, Box):
            shapes = [there.shape]
            if what == "observations" and obs.has_images and len(there.shape) == 3:
                shapes.append((*there.shape[1:], there.shape[0]))  # it has seen transposed pictures
            same = here.shape in shapes and there.dtype == here.dtype
        else:
            same = there == here
        if not same:
            raise model.refuse(f"it was trained on {what} {_shown(there)}, and --env-id has {_shown(here)}")


def _shown(space: gym.Space[Any]) -> str:
    """A space in part of a line."""
    return " ".join(str(space).split())[:150]


def _weights(given: Mapping[str, Any], leaf: ObsLeaf, action_space: gym.Space[Any], config: TrainConfig) -> dict[str, Tensor]:
    """Our weights by name, from the `state_dict` of a policy. Raises KeyError or ValueError if it has others."""
    unread = set(given)

    def read(name: str) -> Tensor:
        unread.discard(name)
        return checked(given[name], name, torch.float32)

    weights: dict[str, Tensor] = {}
    if leaf.kind == "image":
        weights |= _cnn(given, leaf, read)
    for trunk, theirs in (("actor", "policy_net"), ("critic", "value_net")):
        for layer in range(len(config.hidden_sizes or ())):
            name = f"mlp_extractor.{theirs}.{2 * layer}"
            weights[f"{trunk}.{layer}.weight"] = read(f"{name}.weight").mT * (_input_scale(leaf) if layer == 0 else 1.0)
            weights[f"{trunk}.{layer}.bias"] = read(f"{name}.bias")
    scale = 1.0 if config.hidden_sizes else _input_scale(leaf)
    for head, theirs in (("actor", "action_net"), ("critic", "value_net")):
        weight, bias = read(f"{theirs}.weight") * scale, read(f"{theirs}.bias")
        if head == "actor" and isinstance(action_space, MultiBinary):  # a logit of 1 against 0
            weight, bias = (torch.stack((torch.zeros_like(x), x), 1).flatten(0, 1) for x in (weight, bias))
        weights |= {f"{head}.head.weight": weight.mT, f"{head}.head.bias": bias}
    if "log_std" in given:
        weights["actor.log_std"] = read("log_std")
    if unread:
        raise ValueError(f"it has {min(unread)[:100]} too")
    return weights


def _cnn(given: Mapping[str, Any], leaf: ObsLeaf, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The weights of the Nature CNN, which actor and critic share. Raises ValueError if they do not."""
    copies = [name for name in EXTRACTORS if f"{name}.linear.0.bias" in given]
    weights: dict[str, Tensor] = {}
    layers = len(NATURE_CNN)
    for layer, name in enumerate([*(f"cnn.{2 * number}" for number in range(layers)), "linear.0"]):
        for part in ("weight", "bias"):
            weight, *others = (read(f"{copy}.{name}.{part}") for copy in copies)
            if not all(torch.equal(weight, other) for other in others):
                raise ValueError("actor and critic have a CNN each (share_features_extractor), here they share one")
            weights[f"cnn.{leaf.key}.{layer}.{part}"] = weight
    _, height, width = channels_first(leaf.shape)
    for _, kernel, stride in NATURE_CNN:
        height, width = (height - kernel) // stride + 1, (width - kernel) // stride + 1
    last, (filters, _, _) = f"cnn.{leaf.key}.{layers}.weight", NATURE_CNN[-1]
    pixels = weights[last].reshape(-1, filters, height, width)  # our features have the channels last
    weights[last] = pixels.permute(0, 2, 3, 1).flatten(1).mT
    return weights


def _input_scale(leaf: ObsLeaf) -> float:
    """What to multiply the first weights by: bytes are divided by 255 here, and there only those of three dimensions."""
    return 255.0 if leaf.kind == "vector" and leaf.scale != 1.0 and len(leaf.shape) != 3 else 1.0


def _fitting(moments: RunningMoments, leaf: ObsLeaf) -> RunningMoments:
    """The statistics of an observation. Raises ValueError if they are of another one."""
    if leaf.kind != "vector" or moments.mean.shape != leaf.shape:
        raise ValueError(f"statistics of shape {tuple(moments.mean.shape)} and observations of shape {leaf.shape}")
    return moments
