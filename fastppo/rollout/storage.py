"""The tensors of a rollout, its outcomes, and the check for numbers that are not finite. Knows nothing of losses.

The rollout is one TensorDict of batch [T+1, N], allocated once and written in place. Row t < T is step t of every environment.
Row T holds the observation after the last step, for the bootstrap, and becomes row 0 of the next rollout. The rollout of S
seeds is [S, T+1, N]; collectors write to its view [T+1, S, N] (`by_step`). A shape (N, ...) of a collector is then (S, N, ...).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastppo.errors import TrainingFault
from fastppo.policy.spaces import ActionSpec, ObsSpec
from fastppo.system.tensordicts import TensorDict

STEP_KEYS = ("reward", "terminated", "truncated", "valid")  # the results of a step besides the observation


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
    """Allocate a rollout of zeros, locked. The one list of its keys, shapes and dtypes. All are (T+1, N, ...):

    obs (*obs_shape) float32, or the space's own integer dtype; for a Dict or Tuple its leaves, `obs.name` each.
    action_mask (A,) bool, if the environments have masks.
    action (*action_shape) int64 or float32, as sampled; for a Dict or Tuple the numbers of all its leaves (policy/spaces.py).
    reward () float32, raw.
    terminated, truncated () bool.
    valid () bool: false if the step only reset the environment.
    final_obs as obs, only for environments that reset within the step.
    episode_start () bool, only with `remembers` (a recurrent policy): the observation is an episode's first.
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
    """The rollout for collectors, steps first: views [T+1, S, N] of a rollout [S, T+1, N]; a rollout [T+1, N] itself."""
    if rollout.ndim == 2:
        return rollout
    steps_first = {key: x.transpose(0, 1) for key, x in rollout.items()}
    seeds, rows, envs = rollout.shape
    return TensorDict(steps_first, batch_size=[rows, seeds, envs], device=rollout.device).lock_()


class RnnState:
    """The recurrent state of each environment, (N, S), or (S', N, S) for S' seeds."""

    def __init__(self, start: Tensor) -> None:
        """start: the state before row 0. Each rollout writes to it, and `learn` unrolls the policy from it."""
        self.start = start
        self.now = start.clone()  # after row T-1, between two rollouts

    def begin(self) -> Tensor:
        """The state before row 0 of the next rollout."""
        self.start.copy_(self.now)
        return self.start


@dataclass
class Phases:
    """Seconds spent in the environments and in choosing actions."""

    env: float = 0.0
    act: float = 0.0


class Outcomes(NamedTuple):
    """Rewards and ends of the T steps of a rollout, for episode statistics: numpy arrays (T, N) on the host."""

    reward: NDArray[Any]
    terminated: NDArray[Any]
    truncated: NDArray[Any]
    valid: NDArray[Any]
    episode_end: NDArray[Any]  # bool: end of a whole episode, with all lives of a game and all agents of an environment
    cut: NDArray[Any]  # (N,) bool: the collector's `cut` ended the episode in row T-1
    reward_parts: NDArray[Any] | None = None  # (K, T, N), if the rewards are weighted sums
    infos: Mapping[str, NDArray[Any]] = MappingProxyType({})  # (T, N) by name of a number in the infos; nan: none


# In the functions below `rows` are arrays or tensors (T+1, N, ...) by key of the rollout.


def outcomes_of(
    rows: Mapping[str, Any],
    cut: Any = None,
    game_over: NDArray[Any] | None = None,
    reward_parts: NDArray[Any] | None = None,
    infos: Mapping[str, Any] | None = None,
) -> Outcomes:
    """The outcomes of a rollout.

    Args:
        cut: the result of `cut_episodes`.
        game_over: (T, N), which ends are those of whole episodes, if there are others too: of lives or agents.
        reward_parts: (K, T, N), if the rewards are weighted sums.
        infos: (T, N) by name of a number in the environments' infos.
    """
    reward, terminated, truncated, valid = (_to_array(rows[key][:-1]) for key in STEP_KEYS)  # sync: once
    cut_rows = np.zeros_like(valid[-1]) if cut is None else _to_array(cut)
    episode_end = terminated | truncated
    if game_over is not None:
        if cut is not None:  # so is a game that has just lost a life
            cut_rows = cut_rows | (episode_end & ~game_over)[-1]
        episode_end &= game_over
        episode_end[-1] |= cut_rows
    numbers = {name: _to_array(x) for name, x in (infos or {}).items()}
    return Outcomes(reward, terminated, truncated, valid, episode_end, cut_rows, reward_parts, numbers)


def cut_episodes(rows: Mapping[str, Any]) -> Any:
    """Truncate the episodes that have not ended by row T-1. Returns which these are, (N,) bool."""
    under_way = rows["valid"][-2] & ~rows["terminated"][-2] & ~rows["truncated"][-2]
    rows["truncated"][-2] |= under_way
    return under_way


def on_cpu(rows: Mapping[str, Any]) -> dict[str, Tensor]:
    """The rows as tensors on the CPU. Rows on the CPU are not copied."""
    return {key: torch.as_tensor(x).cpu() for key, x in rows.items()}


def check_finite(rows: Mapping[str, Any], first: int = 0) -> None:
    """Raise TrainingFault if an environment returned a number that is not finite: names its key, environment and step.

    first: number of the first environment.
    """
    floats = {key: x for key, x in rows.items() if key != "action" and "float" in str(x.dtype)}
    if isinstance(rows["reward"], Tensor):
        if torch.stack([x.isfinite().all() for x in floats.values()]).all():  # sync: once per rollout
            return
        rows, floats = ({key: x.cpu().numpy() for key, x in part.items()} for part in (rows, floats))
    for key, array in floats.items():
        if np.isfinite(array).all():
            continue
        step, *where = np.argwhere(~np.isfinite(array))[0][: rows["reward"].ndim]
        made_by = step - 1 if key.startswith("obs") else step  # step t-1 returned obs[t]
        who = f"environment {first + where[-1]}" + (f" of seed {where[0] + 1} of {array.shape[1]}" if len(where) > 1 else "")
        value = np.ravel(array[(step, *where)])
        value = value[~np.isfinite(value)][0]
        how = "not finite" if np.isnan(value) else "infinite or too large for float32"  # an overflow to float32 looks the same
        what = f"{key} of {who} is {how} ({value})"
        if made_by < 0:
            raise TrainingFault(f"{what} after a reset; the update was not made")
        action = rows["action"][(made_by, *where)]
        raise TrainingFault(f"{what} after step {made_by} of the rollout, action {action}; the update was not made")


def _to_array(x: Any) -> NDArray[Any]:
    return np.asarray(x.cpu() if isinstance(x, Tensor) else x)
