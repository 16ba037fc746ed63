"""A trained policy for users: observations in, actions out, with normalisation and action bounds."""

import math
from collections.abc import Collection
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastppo.core.action_masks import flat_mask
from fastppo.core.contracts import Normalization, Obs, normalize_obs
from fastppo.policy.actor_critic import ActorCritic
from fastppo.policy.distributions import masked
from fastppo.policy.network import Network
from fastppo.policy.rnn import RecurrentActorCritic
from fastppo.policy.spaces import ActionSpec, ObsLeaf, ObsSpec
from fastppo.system.modes import ours


class Memory:
    """What a policy with memory (--rnn) remembers of one client's environments; `act` writes to it.

    Made by `Agent.new_memory`. A copy (`copy.copy`) remembers the same and goes its own way from then on.
    """

    def __init__(self) -> None:
        self.rnn_state: Tensor | None = None  # (R, S) of R environments; None: before the first step

    @ours
    def reset(self, done_mask: Any = None) -> None:
        """Reset the recurrent state of all environments, or of those whose episode has ended. No state: no effect.

        done_mask: (N,) bool, or one bool for a single observation. None: reset all; the next `act` may have another number.
        """
        if self.rnn_state is None:
            return
        if done_mask is None:
            self.rnn_state = None
            return
        done = torch.as_tensor(done_mask, device=self.rnn_state.device).reshape(-1) != 0
        if len(done) != len(self.rnn_state):
            raise ValueError(f"done_mask of {len(done)} environments; this policy remembers {len(self.rnn_state)}")
        self.rnn_state = torch.where(done.unsqueeze(1), 0.0, self.rnn_state)

    def current(self, rows: int, size: int, like: Tensor) -> Tensor:
        """The state (R, S) of so many environments: zeros before the first step. Raises ValueError for another number."""
        if self.rnn_state is None:
            return like.new_zeros(rows, size)
        if len(self.rnn_state) != rows:
            raise ValueError(f"{rows} observations; this policy remembers {len(self.rnn_state)} environments: reset() it first")
        return self.rnn_state


class Agent(Memory):
    """Actions and values from frozen parameters and statistics. Made by `fastppo.load_policy` or `fastppo.train`."""

    def __init__(
        self,
        obs_space: gym.Space[Any],
        obs: ObsSpec,
        action: ActionSpec,
        network: Network,
        params: Tensor,
        normalization: Normalization,
    ) -> None:
        """params: flat (P,), copied."""
        self.obs_space = obs_space
        self.obs = obs
        self.action = action.to(params.device)
        self.network = network
        self.params = params.detach().clone()
        self.weights = network.weights(self.params)
        self.normalization = normalization
        self.generator = torch.Generator(self.params.device)
        self.generator.seed()  # from the system's entropy: a new Generator always has the same seed
        super().__init__()  # its own memory, where the caller gives none

    def new_memory(self) -> Memory:
        """An empty memory, for one of several clients of this policy: `act(obs, memory=memory)`, `memory.reset(done_mask)`."""
        return Memory()

    @ours
    def act(self, obs: Any, deterministic: bool = True, action_mask: Any = None, memory: Memory | None = None) -> Any:
        """Actions in the format of the environment, for one observation or a batch.

        A recurrent policy (--rnn) keeps a state for each environment. Call it once a step, with the same environments in the
        same order, and `reset` those whose episode has ended. Several clients of one policy have a `memory` each.

        Args:
            obs: as the environment returns it, with or without a batch axis: array, tensor, or dict or tuple of these.
            deterministic: take the likeliest action; otherwise sample from the policy.
            action_mask: the legal actions, as in the environment's info or its `action_masks()`; None: all. A dict or tuple
                of arrays is the mask of one observation. The mask is applied even if the policy was trained without masks.
            memory: what to remember the step in, instead of the policy itself. Without effect if the policy has no memory.

        Returns:
            Arrays for arrays; for tensors, tensors on their device. Of a Dict or Tuple action space a dict or tuple of these.

        Raises:
            ValueError: an observation or a mask has another shape, or the number of environments changed without a `reset`.
        """
        batch, kind = self._batch(obs, action_mask, unseen_by_actor(self.network))
        rows = _rows_of(batch)
        normalized = normalize_obs(batch, self.normalization)
        if isinstance(self.network, RecurrentActorCritic):
            memory = self if memory is None else memory
            before = memory.current(rows, self.network.rnn_state_size, self.params)
            dist, rnn_state = self.network.step(self.weights, normalized, before)
            memory.rnn_state = rnn_state if kind.rows else memory.rnn_state
        else:
            dist = self.network.actor(self.weights, normalized)
        if action_mask is not None and self.obs.info_mask is None:
            dist = masked(dist, self._mask(action_mask, kind.rows), self.action.distribution)
        if deterministic:
            action = self.action.distribution.mode(dist)
        else:
            action = self.network.sample(dist, self.action.distribution.noise(self.action.noise_shape(rows), self.generator))
        return tree_map(kind.unbatch, self.action.to_env(action))

    @ours
    def value(self, obs: Any, memory: Memory | None = None) -> Any:
        """Expected discounted return in units of the environment's reward; with --clip-reward, of the sign of the reward.

        () for one observation, (N,) for a batch. A recurrent policy uses the state of the last `act` and
        does not change it: call this before `act`.
        """
        batch, kind = self._batch(obs, None)
        normalized = normalize_obs(batch, self.normalization)
        if isinstance(self.network, RecurrentActorCritic):
            memory = self if memory is None else memory
            rnn_state = memory.current(_rows_of(batch), self.network.rnn_state_size, self.params)
            value = self.network.value_from_state(self.weights, normalized, rnn_state)
        else:
            value = self.network.critic(self.weights, normalized)
        value = value * self.normalization.return_std + self.normalization.return_mean
        if self.normalization.reward_scale is not None:
            value = value / self.normalization.reward_scale
        return kind.unbatch(value)

    def seed(self, seed: int) -> None:
        """Seed the sampling of `act(deterministic=False)`. Unseeded, each policy samples differently."""
        self.generator.manual_seed(seed)

    def _batch(self, obs: Any, action_mask: Any, unseen: Collection[str] = ()) -> tuple[Obs, "_Kind"]:
        """The observations with a batch axis, for the networks, and the form of the caller's observations.

        unseen: keys of leaves that are zero, given or not.
        """
        leaves: dict[str, Tensor] = {}
        lead: tuple[int, ...] | None = None  # () or (N,)
        kind = _Kind(True, None, 1)
        for leaf in self.obs.observed:
            if leaf.key in unseen:
                continue
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
            elif leaf.key in unseen:
                leaves[leaf.key] = torch.zeros(kind.rows, *leaf.shape, dtype=leaf.dtype, device=self.params.device)
        if kind.rows == 0:  # networks need not handle empty batches: they get one row, which is not returned
            leaves = {key: x.new_zeros(1, *x.shape[1:]) for key, x in leaves.items()}
        return self.obs.join(leaves), kind

    def _mask(self, given: Any, rows: int) -> Tensor:
        """(N, A) bool from the caller's mask; None: all actions are legal."""
        size = self.action.num_logits
        if not size:
            raise ValueError("action_mask for a policy of continuous actions: leave it out")
        if given is None:
            return torch.ones(rows, size, dtype=torch.bool, device=self.params.device)
        if isinstance(given, dict | tuple):
            given = flat_mask(given, self.action.space)
        mask = to_tensor(given, self.params.device) != 0
        if mask.numel() != rows * size:
            raise ValueError(f"action_mask of shape {tuple(mask.shape)}; this policy takes ({size},) an observation")
        return mask.reshape(rows, size)


def unseen_by_actor(network: Network) -> tuple[str, ...]:
    """Keys of the leaves that only the critic reads."""
    return network.critic_only if isinstance(network, ActorCritic) else ()


def to_tensor(given: Any, device: torch.device) -> Tensor:
    """A tensor from a tensor, an array of any strides and byte order, or nested lists."""
    if isinstance(given, Tensor):
        return given.to(device)
    array = np.asarray(given)
    dtype = np.dtype(np.float64) if array.dtype == np.longdouble else array.dtype.newbyteorder("=")
    native = array.astype(dtype, copy=not array.flags.writeable)
    return torch.as_tensor(np.ascontiguousarray(native).reshape(array.shape), device=device)


def _rows_of(batch: Obs) -> int:
    return len(batch if isinstance(batch, Tensor) else next(iter(batch.values())))


def _found(leaf: ObsLeaf, obs: Any) -> Any:
    """This leaf of the caller's observation. Raises ValueError if it is missing."""
    try:
        return leaf.find(obs)
    except (KeyError, IndexError, TypeError):
        where = ".".join(map(str, leaf.path))
        raise ValueError(f"the observation has no {where}; this policy takes what the environment gives") from None


class _Kind(NamedTuple):
    """The form of the caller's observations; the result gets the same form."""

    single: bool
    device: torch.device | None  # of a tensor; None: it is an array
    rows: int  # number of observations

    def unbatch(self, batch: Tensor) -> Any:
        answer = batch.cpu().numpy() if self.device is None else batch.to(self.device)
        return answer[0] if self.single else answer[: self.rows]
