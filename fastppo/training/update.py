"""What one iteration goes by and what it changes: the frozen inputs of its programs, its metrics, the statistics.

Knows nothing of files, logs or how a rollout is collected.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastppo.config import TrainConfig
from fastppo.core.contracts import Coefficients, LearnResult, Normalization
from fastppo.core.losses import Total, alone
from fastppo.core.ppo import MINIBATCH_METRICS, SUMMARY
from fastppo.errors import TrainingFault
from fastppo.policy.normalization import discounted_return, update_moments
from fastppo.run.metrics import METRICS
from fastppo.system.modes import ours
from fastppo.training.state import TrainState, normalization_of


class FrozenInputs(NamedTuple):
    """What programs read beside parameters and rollout. It does not change within an iteration."""

    normalization: Normalization
    coefficients: Coefficients


def frozen_inputs(state: TrainState, progress: float, config: TrainConfig) -> FrozenInputs:
    """The inputs of the iteration that starts at `progress`."""
    return FrozenInputs(normalization_of(state), coefficients_at(progress, config, state.params.device))


def coefficients_at(progress: float, config: TrainConfig, device: torch.device) -> Coefficients:
    """The numbers of the iteration that starts at `progress`, a share of the run: learning rate and clip range annealed."""
    values: dict[str, float] = {name: getattr(config, name) for name in Coefficients._fields}
    if config.anneal_lr:
        values["learning_rate"] *= 1.0 - progress
    if config.anneal_clip:
        values["clip_coef"] *= 1.0 - progress
    if config.target_kl is None:
        values["target_kl"] = math.inf
    return Coefficients(*torch.tensor(list(values.values()), dtype=torch.float32, device=device).unbind())


def read_metrics(result: LearnResult) -> dict[str, float]:
    """Means over the minibatches that moved the parameters. Raises TrainingFault where one is not finite."""
    summary = dict(zip(SUMMARY, result.summary.tolist(), strict=True))  # sync: once per iteration, for the log
    if not summary["finite"]:
        rows = result.minibatch_metrics.cpu().numpy()  # (E * B / M, K)
        found = np.argwhere(~np.isfinite(rows))
        if len(found):
            index, key = found[0]
            raise TrainingFault(
                f"{MINIBATCH_METRICS[key]} is not finite in minibatch {index} of the update, which was not applied"
            )
        raise TrainingFault("a parameter is not finite after the update, which was not applied")
    return {**{name: summary[name] for name in METRICS if name in summary}, "updates": int(summary["updates"])}


@ours
def update_return_moments(state: TrainState, steps: Mapping[str, Tensor], gamma: float) -> None:
    """Add a rollout's discounted returns to their statistics, where the state has any.

    steps: (T, N) `reward terminated truncated valid` of all processes.
    """
    if state.return_moments is not None:
        reward, valid = steps["reward"], steps["valid"]
        done = steps["terminated"] | steps["truncated"]
        running, state.return_carry = discounted_return(reward, done, valid, state.return_carry, gamma)
        state.return_moments = update_moments(state.return_moments, running.flatten(), valid.flatten())


@ours
def update_obs_moments(state: TrainState, rollout: Mapping[str, Tensor], total: Total = alone) -> None:
    """Add the observations of a rollout's valid rows to their statistics, where the state has any.

    rollout: (T+1, N / K, ...) of this process. total: adds up the sums of all processes.
    """
    if state.obs_moments is not None:
        valid = rollout["valid"][:-1].flatten()
        state.obs_moments = {
            key: update_moments(moments, rollout[key][:-1].flatten(0, 1), valid, total)
            for key, moments in state.obs_moments.items()
        }
