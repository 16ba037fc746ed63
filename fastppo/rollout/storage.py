"""The rollout's tensors, and what is read from them after it: outcomes, faulty numbers. Knows nothing of policies or losses.

The rollout is one TensorDict of batch [T+1, N], allocated once and written in place. Row t < T is step t of every environment.
Row T holds the observation after the last step, for the bootstrap, and becomes row 0 of the next rollout. The rollout of S
seeds is [S, T+1, N]; collectors write its view [T+1, S, N] (`by_step`). Where they say N, it is then S, N.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor

from fastppo.errors import TrainingFault
from fastppo.policy.spaces import ActionSpec, ObsSpec

STEP_KEYS = ("reward", "terminated", "truncated", "valid")  # what a step brings, by its key in the rollout


def allocate_rollout(
    num_steps: int,
    num_envs: int,
    obs: ObsSpec,
    action: ActionSpec,
    keeps_final_obs: bool,
    device: torch.device,
    num_seeds: int | None = None,
    remembers: bool = False,
) -> TensorDict:
    """The one list of keys, shapes and dtypes of a rollout; locked, all zeros.

    obs (T+1, N, *obs_shape) float32, or the space's own integer type; of a Dict or Tuple its leaves, `obs.name` each;
    action_mask (T+1, N, A) bool, where there is one; action (T+1, N, *action_shape) as sampled, int64 or float32; reward
    (T+1, N) float32, raw; terminated, truncated (T+1, N) bool; valid (T+1, N) bool: false where the step only reset the
    environment; final_obs as obs, only for environments that reset within the step; episode_start (T+1, N) bool, only for
    a policy with memory: the observation is an episode's first one.
    """

    batch = ((num_seeds,) if num_seeds is not None else ()) + (num_steps + 1, num_envs)

    def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros((*batch, *shape), dtype=dtype, device=device)

    rollout = {
        **{leaf.key: zeros(leaf.shape, leaf.dtype) for leaf in obs},
        "action": zeros(action.shape, action.dtype),
        "reward": zeros((), torch.float32),
        "terminated": zeros((), torch.bool),
        "truncated": zeros((), torch.bool),
        "valid": zeros((), torch.bool),
    }
    if remembers:
        rollout["episode_start"] = zeros((), torch.bool)
    if keeps_final_obs:
        rollout |= {f"final_{leaf.key}": zeros(leaf.shape, leaf.dtype) for leaf in obs if leaf.kind != "mask"}
    return TensorDict(rollout, batch_size=batch, device=device).lock_()


def by_step(rollout: TensorDict) -> TensorDict:
    """A rollout as collectors see it: that of many seeds with the steps first, as views."""
    if rollout.ndim == 2:
        return rollout
    steps_first = {key: x.transpose(0, 1) for key, x in rollout.items()}
    seeds, rows, envs = rollout.shape
    return TensorDict(steps_first, batch_size=[rows, seeds, envs], device=rollout.device).lock_()


class RnnState:
    """What a policy remembers of each environment, (N, S); of S' seeds (S', N, S)."""

    def __init__(self, start: Tensor) -> None:
        """start: written in each rollout with what is remembered before row 0; `learn` goes through the rows from there."""
        self.start = start
        self.now = start.clone()  # between two rollouts: after row T-1

    def begin(self) -> Tensor:
        """Before row 0."""
        self.start.copy_(self.now)
        return self.start


@dataclass
class Phases:
    """Seconds spent in the environments and in choosing actions."""

    env: float = 0.0
    act: float = 0.0


class Outcomes(NamedTuple):
    """What the T steps of a rollout brought, for the account: numpy arrays (T, N) on the host."""

    reward: NDArray[Any]
    terminated: NDArray[Any]
    truncated: NDArray[Any]
    valid: NDArray[Any]
    episode_end: NDArray[Any]  # bool: of a whole game, where an episode is one life of it
    cut: NDArray[Any]  # (N,) bool: in row T-1 the caller's cut ended the episode, see Collector.collect


def outcomes_of(rows: Mapping[str, Any], cut: Any, game_over: NDArray[Any] | None = None) -> Outcomes:
    """rows: arrays or tensors by key of the rollout; cut: `_cut`'s result, or None; game_over: (T, N), where an episode is one

    life of a game.
    """
    parts = (rows[key][:-1] for key in STEP_KEYS)
    reward, terminated, truncated, valid = (x.cpu().numpy() if isinstance(x, Tensor) else x for x in parts)  # sync: once
    over = terminated if game_over is None else terminated & game_over
    cut_rows = np.zeros_like(valid[-1]) if cut is None else np.asarray(cut.cpu() if isinstance(cut, Tensor) else cut)
    return Outcomes(reward, terminated, truncated, valid, over | truncated, cut_rows)


def cut_episodes(rows: Mapping[str, Any]) -> Any:
    """Truncate the episodes under way after row T-1, and say which those are, (N,) bool.

    rows: arrays or tensors by key of the rollout, (T+1, N, ...).
    """
    under_way = rows["valid"][-2] & ~rows["terminated"][-2] & ~rows["truncated"][-2]
    rows["truncated"][-2] |= under_way
    return under_way


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.cpu() for key, tensor in tensors.items()}


def comes_from_envs(key: str, dtype: Any) -> bool:
    """Whether an environment may have put a number there that is none."""
    is_float = dtype.is_floating_point if isinstance(dtype, torch.dtype) else np.issubdtype(dtype, np.floating)
    return is_float and key != "action"


def check_finite(arrays: Mapping[str, NDArray[Any]]) -> None:
    """Raise TrainingFault naming key, environment and step of the first number that is not finite.

    arrays: by key of the rollout, (T+1, N, ...).
    """
    for key, array in arrays.items():
        if not comes_from_envs(key, array.dtype) or np.isfinite(array).all():
            continue
        step, *where = np.argwhere(~np.isfinite(array))[0][: arrays["reward"].ndim]
        made_by = step - 1 if key.startswith("obs") else step  # obs[t] came out of step t-1
        who = f"environment {where[-1]}" + (f" of seed {where[0] + 1} of {array.shape[1]}" if len(where) > 1 else "")
        value = np.ravel(array[(step, *where)])
        value = value[~np.isfinite(value)][0]
        how = "not finite" if np.isnan(value) else "infinite or too large for float32"  # which of the two is not known here
        what = f"{key} of {who} is {how} ({value})"
        if made_by < 0:
            raise TrainingFault(f"{what} after a reset; the update was not made")
        action = arrays["action"][(made_by, *where)]
        raise TrainingFault(f"{what} after step {made_by} of the rollout, action {action}; the update was not made")


def check_tensors(tensors: Mapping[str, Tensor]) -> None:
    check_finite({key: tensor.cpu().numpy() for key, tensor in tensors.items()})
