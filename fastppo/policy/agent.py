"""A trained policy as a user holds it: observations in, actions out, normalisation and bounds included."""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Protocol

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastppo.core.contracts import Normalization, Obs, normalize_obs
from fastppo.errors import UsageError
from fastppo.policy.distributions import DIAGONAL_NORMAL, choices, mask_logits
from fastppo.policy.networks import ActorCritic, Encoder, MLPActorCritic, ModuleFactory, ModulePolicy, Network
from fastppo.policy.normalization import RunningMoments, make_normalization
from fastppo.policy.rnn import RecurrentActorCritic, Rnn
from fastppo.policy.spaces import ActionSpec, ObsLeaf, ObsSpec, action_spec, obs_spec, space_from_data, space_to_data
from fastppo.system.modes import ours


class NetworkConfig(Protocol):
    """The settings that shape the network; TrainConfig has them."""

    @property
    def hidden_sizes(self) -> tuple[int, ...] | None: ...
    @property
    def activation(self) -> str: ...
    @property
    def cnn_size(self) -> int: ...
    @property
    def cnn_activation(self) -> str: ...
    @property
    def share_backbone(self) -> bool: ...
    @property
    def rnn(self) -> Literal["lstm", "gru"] | None: ...
    @property
    def rnn_hidden_size(self) -> int: ...
    @property
    def rnn_layers(self) -> int: ...
    @property
    def rnn_shared(self) -> bool: ...
    @property
    def log_std_init(self) -> float: ...
    @property
    def squash_actions(self) -> bool: ...


def make_network(
    obs: ObsSpec, action: ActionSpec, config: NetworkConfig, policy: ModuleFactory | None = None, seed: int = 0
) -> Network:
    """The network for these spaces; policy: somebody's own instead, seed: of its first weights (see `ModulePolicy`)."""
    if policy is not None:
        if config.rnn is not None:
            raise UsageError(f"--rnn {config.rnn} is a part of our networks, and policy= is a whole one of yours: leave it off")
        return ModulePolicy(policy, obs, action, config.log_std_init, seed)
    sizes = config.hidden_sizes
    if sizes is None:
        sizes = () if obs.has_images else (64, 64)
    encoder = Encoder(obs.leaves, config.cnn_size, config.cnn_activation)
    mlp = MLPActorCritic(
        encoder.size if config.rnn is None else config.rnn_hidden_size,
        action.size,
        action.distribution,
        sizes,
        config.activation,
        config.share_backbone,
        config.log_std_init,
    )
    if config.rnn is not None:
        users = 1 if config.rnn_shared or config.share_backbone else 2
        rnn = Rnn(config.rnn, encoder.size, config.rnn_hidden_size, config.rnn_layers, users)
        return RecurrentActorCritic(encoder, rnn, mlp)
    return mlp if obs.is_plain else ActorCritic(encoder, mlp)


class Agent:
    """Acts and judges with frozen parameters and statistics. Made by `fastppo.load_policy` or `fastppo.train`."""

    def __init__(
        self,
        obs_space: gym.Space[Any],
        obs: ObsSpec,
        action: ActionSpec,
        network: Network,
        params: Tensor,
        normalization: Normalization,
    ) -> None:
        """params: flat (P,), copied: training may go on."""
        self.obs_space = obs_space
        self.obs = obs
        self.action = action.to(params.device)
        self.network = network
        self.params = params.detach().clone()
        self.weights = network.weights(self.params)
        self.normalization = normalization
        self.generator = torch.Generator(self.params.device)
        self.generator.seed()  # of the system's entropy: by itself every Generator draws the same
        self.rnn_state: Tensor | None = None  # (R, S) of R environments; None: nothing is remembered

    @ours
    def reset(self, done_mask: Any = None) -> None:
        """Forget, where the policy has a memory: all, or of each environment whose next observation is an episode's first one.

        done_mask: (N,) bool, or one for a single observation; None: all, whose number may then be another.
        """
        if self.rnn_state is None:
            return
        if done_mask is None:
            self.rnn_state = None
            return
        done = torch.as_tensor(done_mask, device=self.params.device).reshape(-1) != 0
        if len(done) != len(self.rnn_state):
            raise ValueError(f"done_mask of {len(done)} environments; this policy remembers {len(self.rnn_state)}")
        self.rnn_state = torch.where(done.unsqueeze(1), 0.0, self.rnn_state)

    def _remembered(self, network: RecurrentActorCritic, rows: int) -> Tensor:
        if self.rnn_state is None:
            return self.params.new_zeros(rows, network.rnn_state_size)
        if len(self.rnn_state) != rows:
            raise ValueError(f"{rows} observations; this policy remembers {len(self.rnn_state)} environments: reset() it first")
        return self.rnn_state

    @ours
    def act(self, obs: Any, deterministic: bool = True, action_mask: Any = None) -> Any:
        """Actions as the environment takes them, for one observation or a batch of them.

        A policy with memory (--rnn) remembers what it is shown: call it once a step, always with the same environments in the
        same order, and `reset` where an episode has ended.

        Args:
            obs: as the environment gives it, with or without a leading batch axis: array, tensor, or dict or tuple of these.
            deterministic: the likeliest action; otherwise one sampled from the policy.
            action_mask: which actions are legal, as the environment tells it in its info or by `action_masks()`; None: all. A
                tuple of arrays is taken for one observation. Applied even where the policy was trained without masks.

        Returns:
            Arrays for arrays; for tensors, tensors on their device.

        Raises:
            ValueError: an observation or a mask of another shape, or of other environments than are remembered.
        """
        batch, kind = self._batch(obs, action_mask)
        rows = _rows_of(batch)
        seen = normalize_obs(batch, self.normalization)
        if isinstance(self.network, RecurrentActorCritic):
            dist, rnn_state = self.network.step(self.weights, seen, self._remembered(self.network, rows))
            self.rnn_state = rnn_state if kind.rows else self.rnn_state
        else:
            dist = self.network.actor(self.weights, seen)
        if action_mask is not None and self.obs.info_mask is None:
            dist = mask_logits(dist, self._mask(action_mask, kind.rows), choices(self.action.distribution, self.action.size))
        if deterministic:
            action = self.action.distribution.mode(dist)
        else:
            action = self.network.sample(dist, self.action.distribution.noise(self.action.noise_shape(rows), self.generator))
        return kind.unbatch(self.action.to_env(action))

    @ours
    def value(self, obs: Any) -> Any:
        """Expected discounted return in units of the environment's own reward, of its sign with --clip-reward.

        () for one observation, (N,) for a batch. A policy with memory judges obs after what `act` has been shown, without
        remembering it: ask before `act`.
        """
        batch, kind = self._batch(obs, None)
        seen = normalize_obs(batch, self.normalization)
        if isinstance(self.network, RecurrentActorCritic):
            value = self.network.value_from_state(self.weights, seen, self._remembered(self.network, _rows_of(batch)))
        else:
            value = self.network.critic(self.weights, seen)
        value = value * self.normalization.return_std + self.normalization.return_mean
        if self.normalization.reward_scale is not None:
            value = value / self.normalization.reward_scale
        return kind.unbatch(value)

    def seed(self, seed: int) -> None:
        """Seed the sampling of `act(deterministic=False)`; without it, it is another in each policy."""
        self.generator.manual_seed(seed)

    def _batch(self, obs: Any, action_mask: Any) -> tuple[Obs, "_Kind"]:
        """Observations with a leading axis, as the networks take them, and how they were given."""
        leaves: dict[str, Tensor] = {}
        lead: tuple[int, ...] | None = None  # () or (N,)
        kind = _Kind(True, None, 1)
        for leaf in self.obs.observed:
            name = "observation" if leaf.key == "obs" else leaf.key
            given = _found(leaf, obs)
            x = to_tensor(given, self.params.device).to(leaf.dtype)
            own = tuple(x.shape[: max(x.ndim - len(leaf.shape), 0)])
            if len(own) > 1 or x.shape != (*own, *leaf.shape):
                raise ValueError(f"{name} of shape {tuple(x.shape)}; this policy takes {leaf.shape} or a batch")
            if lead is None:
                lead, kind = own, _Kind(not own, given.device if isinstance(given, Tensor) else None, math.prod(own))
            if own != lead:
                raise ValueError(f"{name} of shape {tuple(x.shape)}; another part of the observation has {lead} before its own")
            leaves[leaf.key] = x.reshape(kind.rows, *leaf.shape)
        for leaf in self.obs:
            if leaf.kind == "mask":
                leaves[leaf.key] = self._mask(_found(leaf, obs) if leaf.path else action_mask, kind.rows)
        if kind.rows == 0:  # networks, one of somebody's own too, need not know of empty batches: a row that is not returned
            leaves = {key: x.new_zeros(1, *x.shape[1:]) for key, x in leaves.items()}
        return self.obs.join(leaves), kind

    def _mask(self, given: Any, rows: int) -> Tensor:
        """(N, A) bool of a mask as somebody gave it; None: all actions are legal."""
        size = self.action.size
        if self.action.distribution is DIAGONAL_NORMAL:
            raise ValueError("action_mask for a policy of continuous actions: leave it out")
        if given is None:
            return torch.ones(rows, size, dtype=torch.bool, device=self.params.device)
        if isinstance(given, tuple):
            given = np.concatenate([np.ravel(part) for part in tree_leaves(given)])
        mask = to_tensor(given, self.params.device) != 0
        if mask.numel() != rows * size:
            raise ValueError(f"action_mask of shape {tuple(mask.shape)}; this policy takes ({size},) an observation")
        return mask.reshape(rows, size)


def to_tensor(given: Any, device: torch.device) -> Tensor:
    """A tensor of an array as numpy has them, of whatever strides and byte order, or of numbers or arrays in lists."""
    if isinstance(given, Tensor):
        return given.to(device)
    array = np.asarray(given)
    dtype = np.dtype(np.float64) if array.dtype == np.longdouble else array.dtype.newbyteorder("=")
    native = array.astype(dtype, copy=not array.flags.writeable)
    return torch.as_tensor(np.ascontiguousarray(native).reshape(array.shape), device=device)


def _rows_of(batch: Obs) -> int:
    return len(batch if isinstance(batch, Tensor) else next(iter(batch.values())))


def _found(leaf: ObsLeaf, obs: Any) -> Any:
    """The leaf's part of an observation as somebody gave it."""
    try:
        return leaf.find(obs)
    except (KeyError, IndexError, TypeError):
        where = ".".join(map(str, leaf.path))
        raise ValueError(f"the observation has no {where}; this policy takes what the environment gives") from None


class _Kind(NamedTuple):
    """How an observation was given, and so how an answer is returned."""

    single: bool
    device: torch.device | None  # of a tensor; None: an array
    rows: int  # observations

    def unbatch(self, batch: Tensor) -> Any:
        answer = batch.cpu().numpy() if self.device is None else batch.to(self.device)
        return answer[0] if self.single else answer[: self.rows]


def policy_state(
    network: Network,
    params: Tensor,
    obs_space: gym.Space[Any],
    obs: ObsSpec,
    action_space: gym.Space[Any],
    obs_moments: Mapping[str, RunningMoments] | None,
    normalization: Normalization,
) -> dict[str, Any]:
    """All of a policy but its network settings, as plain data on the CPU that torch.load(weights_only=True) reads."""
    moments = None if obs_moments is None else {key: [x.cpu().clone() for x in kept] for key, kept in obs_moments.items()}
    return {
        "module": _module_name(network),
        "fixed": _copies(network.fixed) if isinstance(network, ModulePolicy) else {},
        "weights": _copies(network.weights(params)),
        "obs_space": space_to_data(obs_space),
        "info_mask_size": None if obs.info_mask is None else obs.info_mask.size,
        "action_space": space_to_data(action_space),
        "obs_moments": moments,
        "reward_scale": None if normalization.reward_scale is None else normalization.reward_scale.cpu().clone(),
        "return_mean": normalization.return_mean.cpu().clone(),
        "return_std": normalization.return_std.cpu().clone(),
    }


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def _module_name(network: Network) -> str | None:
    """The class of a network of somebody's own; None for one of ours."""
    return type(network.module).__qualname__ if isinstance(network, ModulePolicy) else None


def weights_from_state(state: Mapping[str, Any], network: Network) -> Tensor:
    """`policy_state`'s weights as a flat buffer (P,); what a network of your own keeps beside them is put into it.

    Raises UsageError for weights of another kind of network, KeyError or ValueError where names, shapes, types or numbers are
    not a network's. Takes memory only once the shapes are known to be those of `state`.
    """
    kept, given = state["module"], _module_name(network)
    if kept != given:
        wanted = (
            "ours: leave policy= out"
            if kept is None
            else f"a {str(kept)[:100]} of your own: give what made it as policy=... in Python"
        )
        made = "" if given is None else f", and policy= makes a {given}"
        raise UsageError(f"this run's network is {wanted}, as train and load_policy take it{made}")
    if isinstance(network, ModulePolicy):
        for name, tensor in network.fixed.items():
            kept = state["fixed"][name]
            if not isinstance(kept, Tensor) or kept.dtype != tensor.dtype or kept.shape != tensor.shape:
                raise ValueError(f"{name} is not {tensor.dtype} of {tuple(tensor.shape)}")
            tensor.copy_(kept)
    if not isinstance(state["weights"], Mapping):
        raise ValueError("the weights are not named")
    weights = {name: checked(weight, f"weight {name}", torch.float32) for name, weight in state["weights"].items()}
    params = network.flatten(weights)
    if len(params) != sum(weight.numel() for weight in weights.values()):
        raise ValueError(f"there are more weights than the {len(params)} numbers of the network")
    return params


def checked(x: Any, name: str, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> Tensor:
    """x, a tensor of a checkpoint; raises ValueError for one of another type or, where given, shape, or not finite."""
    if not isinstance(x, Tensor) or x.layout != torch.strided or x.is_meta or x.dtype != dtype:
        got = f"of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise ValueError(f"{name} is {got}, not a dense tensor of {dtype}")
    if shape is not None and x.shape != shape:
        raise ValueError(f"{name} is {tuple(x.shape)}, not {shape}")
    if not x.isfinite().all():
        raise ValueError(f"{name} is not finite")
    return x


def moments_from_state(state: Mapping[str, Any] | None, device: torch.device | str) -> dict[str, RunningMoments] | None:
    """`policy_state`'s obs_moments, back on a device; raises ValueError for what are no moments."""
    if state is None:
        return None
    if not isinstance(state, Mapping) or not all(isinstance(kept, list) and len(kept) == 3 for kept in state.values()):
        raise ValueError("obs_moments are not three of each part of the observation")
    moments = {}
    for key, (mean, var, count) in state.items():
        mean = checked(mean, f"obs_moments of {key}", torch.float64)
        var = checked(var, f"obs_moments of {key}", torch.float64, mean.shape)
        count = checked(count, f"obs_moments of {key}", torch.float64, ())
        if (var < 0).any() or count < 0:
            raise ValueError(f"obs_moments of {key} are negative")
        moments[key] = RunningMoments(mean.to(device), var.to(device), count.to(device))
    return moments


def agent_from_state(
    state: Mapping[str, Any], config: NetworkConfig, device: torch.device | str = "cpu", policy: ModuleFactory | None = None
) -> Agent:
    """The inverse of `policy_state`; raises UsageError, KeyError or ValueError when the two do not fit.

    Safe with data from anybody that `load_checkpoint` has read: what is in it is checked before it is used.
    """
    obs_space = space_from_data(state["obs_space"])
    action = action_spec(space_from_data(state["action_space"]), config.squash_actions)
    mask_size = state["info_mask_size"]
    if mask_size is not None and type(mask_size) is not int:
        raise ValueError(f"info_mask_size is a {type(mask_size).__name__}, not a number")
    obs = obs_spec(obs_space, mask_size, action, normalize=state["obs_moments"] is not None)
    network = make_network(obs, action, config, policy)
    scales = {name: state[name] for name in ("reward_scale", "return_mean", "return_std")}
    scales = {
        name: None if scale is None and name == "reward_scale" else checked(scale, name, torch.float32, ()).to(device)
        for name, scale in scales.items()
    }
    moments = moments_from_state(state["obs_moments"], device)
    shapes = {leaf.key: leaf.shape for leaf in obs.normalized}
    if moments is not None and {key: tuple(kept.mean.shape) for key, kept in moments.items()} != shapes:
        raise ValueError("obs_moments are not those of the observation")
    normalization = make_normalization(moments, **scales, wide=obs.wide)
    params = weights_from_state(state, network).to(device)
    return Agent(obs_space, obs, action, network, params, normalization)
