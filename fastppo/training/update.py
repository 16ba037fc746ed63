"""What one iteration goes by, and its metrics: the frozen inputs of its programs, annealing, what an update returned.

Knows nothing of files, logs or how a rollout is collected.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from fastppo.config import TrainConfig
from fastppo.core.contracts import Coefficients, LearnResult, Normalization
from fastppo.core.ppo import MINIBATCH_METRICS, SUMMARY
from fastppo.errors import TrainingFault
from fastppo.run.metrics import METRICS
from fastppo.training.state import TrainState, normalization_of

LOWEST_RATE, HIGHEST_RATE = 1e-5, 1e-2  # of --desired-kl


class FrozenInputs(NamedTuple):
    """What programs read beside parameters and rollout. It does not change within an iteration."""

    normalization: Normalization
    coefficients: Coefficients


def frozen_inputs(state: TrainState, progress: float, config: TrainConfig) -> FrozenInputs:
    """The inputs of the iteration that starts at `progress`."""
    return FrozenInputs(
        normalization_of(state), coefficients_at(progress, config, state.params.device, state.learning_rate_factor)
    )


def coefficients_at(progress: float, config: TrainConfig, device: torch.device, learning_rate_factor: float) -> Coefficients:
    """The numbers of the iteration that starts at `progress`, a share of the run, some of them annealed.

    learning_rate_factor: see `adapted_factor`.
    """
    values: dict[str, float] = {name: getattr(config, name) for name in Coefficients._fields}
    values["learning_rate"] *= 1.0 - progress if config.anneal_lr else learning_rate_factor
    if config.ent_coef_end is not None:
        values["ent_coef"] += (config.ent_coef_end - values["ent_coef"]) * min(progress, 1.0)
    if config.anneal_clip:
        values["clip_coef"] *= 1.0 - progress
    if config.target_kl is None:
        values["target_kl"] = math.inf
    return Coefficients(*torch.tensor(list(values.values()), dtype=torch.float32, device=device).unbind())


def adapted_factor(factor: float, approx_kl: float, config: TrainConfig) -> float:
    """The factor of the learning rate after an iteration with that KL estimate, where --desired-kl is on.

        rate / 1.5  where  approx_kl > 2 desired_kl,       rate * 1.5  where  0 < approx_kl < desired_kl / 2

    within 1e-5 and 1e-2, unless it starts outside. rsl_rl's schedule "adaptive" (Rudin et al., 2022, arXiv 2109.11978) does the
    same after each minibatch.
    """
    start, desired = config.learning_rate, config.desired_kl
    if start is None or desired is None:
        return factor
    rate = start * factor
    if approx_kl > 2.0 * desired:
        rate = max(rate / 1.5, min(LOWEST_RATE, rate))
    elif 0.0 < approx_kl < desired / 2.0:
        rate = min(rate * 1.5, max(HIGHEST_RATE, rate))
    return rate / start


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
