"""--init-from: a new run that starts with the policy of another one. Reads data only. Knows nothing of the loop.

Weights and statistics of observations and rewards are taken over; the optimiser, the counters and the environments start anew.
The critic keeps its values: its units become those of the new run.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastppo.bounds import flag
from fastppo.config import TrainConfig, read_run_config
from fastppo.errors import UsageError, brief
from fastppo.policy.codec import checked, difference_of_spaces, moments_from_state, weights_from_state
from fastppo.policy.network import Network
from fastppo.policy.spaces import ActionSpec, ObsSpec
from fastppo.ranks import Ranks
from fastppo.ranks import checked as checked_on_all
from fastppo.run.best import BestPolicy
from fastppo.run.checkpoint_file import load_checkpoint
from fastppo.run.directory import RunDirectory
from fastppo.system.paths import reading
from fastppo.training.state import TrainState, snapshot

# settings of the built-in networks, which must be those of the other run
NETWORK = (
    *("share_backbone", "rnn", "rnn_hidden_size", "rnn_layers", "rnn_shared"),
    *("hidden_sizes", "activation", "layer_norm", "cnn", "cnn_size", "cnn_activation"),
    *("action_distribution", "squash_actions"),
)


@dataclass(frozen=True)
class Source:
    """A policy to start from."""

    path: Path  # of the checkpoint
    checkpoint: dict[str, Any]
    config: TrainConfig | None  # of its run; None for a checkpoint that is not in a run directory

    def refuse(self, why: str) -> UsageError:
        """The error to raise where its policy does not fit this run."""
        return UsageError(f"--init-from {self.path}: {why}")


def read_source(name: str, ranks: Ranks) -> Source:
    """The policy in a run directory, best.pt or else last.pt, or in a checkpoint; of rank 0 in all ranks. Raises UsageError."""
    source: Source | None = None
    with checked_on_all(ranks):
        if ranks.is_main:
            try:
                source = _read(Path(name))
            except UsageError as error:
                raise UsageError(f"--init-from: {error}") from None
    source = ranks.agree(source)
    assert source is not None
    return source


@reading()
def _read(path: Path) -> Source:
    if not path.exists():
        raise UsageError(f"{path} does not exist: name a run directory or a checkpoint in it")
    if path.is_dir():
        own_config, directory = read_run_config(path), RunDirectory(path)
        path = directory.best if directory.best.exists() else directory.last
        return Source(path, load_checkpoint(path), own_config)
    run_dir = path.parent.parent
    config = read_run_config(run_dir) if (run_dir / "config.json").is_file() else None
    return Source(path, load_checkpoint(path), config)


def start_from(
    config: TrainConfig, network: Network, obs: ObsSpec, action: ActionSpec, states: list[TrainState], ranks: Ranks
) -> str | None:
    """Put the policy that --init-from names into the fresh states of all seeds; nothing on --resume, where it is in them.

    Args:
        network: of the new run; a module of the user's own gets the source's buffers.
        obs, action: of the new run.

    Returns:
        A line on it for people; None without --init-from.

    Raises:
        UsageError: spaces or network differ; names what differs.
    """
    if config.init_from is None or config.resume is not None:
        return None
    source = read_source(config.init_from, ranks)
    checkpoint = source.checkpoint
    device = states[0].params.device
    try:
        policy = checkpoint["policy"]
        difference = difference_of_spaces(policy, obs, action)
        if difference is not None:
            raise source.refuse(difference)
        _check_network(source, policy, config, obs)
        params = weights_from_state(policy, network)
        obs_moments = moments_from_state(policy["obs_moments"], device)
        shapes = {leaf.key: leaf.shape for leaf in obs.normalized} if config.norm_obs else None
        if shapes != (None if obs_moments is None else {key: tuple(x.mean.shape) for key, x in obs_moments.items()}):
            raise ValueError("obs_moments are not those of the observation")
        returns = checkpoint.get("return_moments")  # older versions kept them in last.pt only
        moments = None if returns is None else moments_from_state({"reward": returns}, device)
        mean, std = (checked(policy[name], name, torch.float32, ()).to(device) for name in ("return_mean", "return_std"))
        if policy["reward_scale"] is not None and not config.norm_reward:  # the critic's units are those of the reward again
            mean, std = (x / checked(policy["reward_scale"], "reward_scale", torch.float32, ()).to(device) for x in (mean, std))
        where = f"iteration {int(checkpoint['iteration'])}, step {int(checkpoint['global_step']):,}"
    except UsageError as error:
        if str(error).startswith("--init-from"):
            raise
        raise source.refuse(str(error)) from None
    except Exception as error:  # gymnasium and torch raise anything for data that passes the checks
        raise source.refuse(f"its network is not that of this run ({brief(error)})") from None
    for state in states:
        state.params.copy_(params)
        state.obs_moments = obs_moments
        if config.norm_reward and moments is not None:
            state.return_moments = moments["reward"]
        if config.norm_returns:
            state.return_mean, state.return_std = mean, std
        elif policy["module"] is None:
            _fold_units(network.weights(state.params), mean, std)
        state.best = BestPolicy(config.num_envs, snapshot(state))
    anew = " (it has no reward statistics: these start anew)" if config.norm_reward and moments is None else ""
    if not config.norm_returns and policy["module"] is not None and (float(mean), float(std)) != (0.0, 1.0):
        anew += " (its critic's values are in other units, of --norm-returns or --norm-reward: they are learned anew)"
    return f"starts with the policy of {source.path}, of {where}{anew}"


def _fold_units(weights: Mapping[str, Tensor], mean: Tensor, std: Tensor) -> None:
    """Change the critic's last layer so that its output v becomes v * std + mean."""
    weights["critic.head.weight"].mul_(std)
    weights["critic.head.bias"].mul_(std).add_(mean)


def _check_network(source: Source, policy: dict[str, Any], config: TrainConfig, obs: ObsSpec) -> None:
    """Raise UsageError naming the first setting of the network that differs, and the value to give."""
    if (policy["obs_moments"] is not None) != config.norm_obs:
        how = "without --norm-obs: leave it off" if config.norm_obs else "with --norm-obs: give it too"
        raise source.refuse(f"that policy was trained {how}")
    if source.config is None or policy["module"] is not None:
        return
    for name in NETWORK:
        there, here = (_resolved(name, getattr(one, name), obs) for one in (source.config, config))
        if there != here:
            value, other = (" ".join(map(str, x)) if isinstance(x, tuple) else x for x in (there, here))
            give = flag(name if there else f"no_{name}") if isinstance(there, bool) else f"{flag(name)} {value}"
            raise source.refuse(f"its network has {name} {value}, this run's {other}: give {give}")


def _resolved(name: str, value: Any, obs: ObsSpec) -> Any:
    """The value of a setting, with the default of hidden_sizes as make_network reads it."""
    return (() if obs.has_images else (64, 64)) if name == "hidden_sizes" and value is None else value
