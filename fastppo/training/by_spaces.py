"""Settings that an environment's spaces and the length of the run choose where they are left open, as `--preset general` does.

Chosen on environments outside the presets: benchmarks/untuned.py.
"""

import math
from typing import Any

from fastppo.config import TrainConfig
from fastppo.policy.spaces import ActionSpec, ObsSpec

PICTURES = {"learning_rate": 2.5e-4, "update_epochs": 4}  # of the PPO paper's Atari runs (Schulman et al., 2017)
VECTORS = {"update_epochs": 10}
SHORT, LONG = (100_000, 1e-3), (1_000_000, 3e-4)  # steps of a run on vectors, and the learning rate that it starts from


def rate_for(steps: int) -> float:
    """The learning rate of a run of that many steps on vectors: a straight line in logarithms from SHORT to LONG, flat beyond.

    A rate that learns most in 100,000 steps is too high for a million: HalfCheetah 1,700 with 1e-3, 5,500 with 3e-4.
    """
    (few, high), (many, low) = SHORT, LONG
    share = math.log(steps / few) / math.log(many / few)
    return float(f"{high * (low / high) ** min(max(share, 0.0), 1.0):.3g}")


def by_spaces(config: TrainConfig, obs: ObsSpec, action: ActionSpec) -> tuple[dict[str, Any], list[str]]:
    """The settings that are None in `config` and must not be, and a line for the user that says which and why."""
    iterations = config.num_iterations
    steps = config.total_timesteps if iterations is None else iterations * config.batch_size
    of_vectors = {**VECTORS, "learning_rate": rate_for(steps)}
    chosen = {**(PICTURES if obs.has_images else of_vectors), "ent_coef": 0.01 if action.num_logits else 0.0}
    chosen = {name: value for name, value in chosen.items() if getattr(config, name) is None}
    if not chosen:
        return {}, []
    kinds = {leaf.kind for leaf in obs.observed}
    seen = "picture" if obs.has_images else "discrete" if kinds == {"categories"} else "vector"
    done = "continuous" if not action.num_logits else "discrete" if action.num_logits == action.size else "mixed"
    return chosen, [f"settings for: {seen} observations, {done} actions, {steps:,} steps"]
