"""Lines on settings that were given and change nothing in this run, or less than they say. Knows nothing of training."""

from collections.abc import Iterator

import torch

from fastppo.bounds import flag
from fastppo.config import TrainConfig
from fastppo.policy.mlp import NORM
from fastppo.policy.module_policy import ModulePolicy
from fastppo.policy.network import Network
from fastppo.policy.spaces import ActionSpec, ObsSpec
from fastppo.presets import PRESETS

OURS = ("hidden_sizes", "activation", "layer_norm", "cnn", "cnn_size", "cnn_activation", "share_backbone")
OF_PICTURES = ("cnn", "cnn_size", "cnn_activation")
OF_MEMORY = ("rnn_hidden_size", "rnn_layers", "rnn_shared")


def unused_settings(config: TrainConfig, network: Network, obs: ObsSpec, action: ActionSpec, device: torch.device) -> list[str]:
    """One line for each reason. A setting of the run's preset counts as given only where the run has another value."""
    names_by_reason: dict[str, list[str]] = {}
    for name, reason in _unused(config, network, obs, action):
        if _is_given(name, config):
            names_by_reason.setdefault(reason, []).append(flag(name))
    lines = []
    for reason, flags in names_by_reason.items():
        change = "changes nothing" if len(flags) == 1 else "change nothing"
        lines.append(f"{' and '.join(flags)} {change}: {reason}")
    precision = _precision(config, device)
    return lines if precision is None else [*lines, precision]


def _unused(config: TrainConfig, network: Network, obs: ObsSpec, action: ActionSpec) -> Iterator[tuple[str, str]]:
    """Settings that this run does not read, each with the reason."""
    is_yours = isinstance(network, ModulePolicy)
    if is_yours:
        yield from dict.fromkeys(OURS, "your network replaces ours").items()
    elif not obs.has_images:
        yield from dict.fromkeys(OF_PICTURES, "the observations have no pictures").items()
    if not is_yours and config.layer_norm and not _has_norms(network):
        yield "layer_norm", "this network has no hidden layers to normalise (--hidden-sizes 64)"
    if config.rnn is None:
        yield from dict.fromkeys(OF_MEMORY, "the network has no memory (--rnn lstm, or gru)").items()
    if action.num_logits == action.size:
        yield "log_std_init", "there are no continuous actions"
    elif config.action_distribution == "beta":
        yield "log_std_init", "--action-distribution beta has no standard deviation"
    if config.advantage == "monte-carlo":
        yield "gae_lambda", "it is for --advantage gae"


def _has_norms(network: Network) -> bool:
    return any(name.endswith(NORM) for name in network.weights(torch.empty(network.num_params, device="cpu")))


def _is_given(name: str, config: TrainConfig) -> bool:
    """Whether the value is neither the default nor the preset's."""
    preset = PRESETS.get(config.preset)
    usual = {} if preset is None else preset.settings
    return getattr(config, name) not in (getattr(TrainConfig, name), usual.get(name, getattr(TrainConfig, name)))


def _precision(config: TrainConfig, device: torch.device) -> str | None:
    """A line where --tf32 or --bf16 does not make this device faster."""
    if device.type == "cuda" or not (config.tf32 or config.bf16):
        return None
    if config.bf16:
        return f"--bf16 is for GPUs: on {device} networks are rounded to bfloat16, and there are no fused programs"
    return f"--tf32 is for NVIDIA GPUs: on {device} it changes nothing"
