"""Settings that an environment's spaces choose where they are left open, as `--preset general` leaves them.

Chosen on environments outside the presets: benchmarks/untuned.py.
"""

from typing import Any

from fastppo.config import TrainConfig
from fastppo.policy.spaces import ActionSpec, ObsSpec

PICTURES = {"learning_rate": 2.5e-4, "update_epochs": 4}  # of the PPO paper's Atari runs (Schulman et al., 2017)
VECTORS = {"learning_rate": 1e-3, "update_epochs": 10}


def by_spaces(config: TrainConfig, obs: ObsSpec, action: ActionSpec) -> tuple[dict[str, Any], list[str]]:
    """The settings that are None in `config` and must not be, and a line for the user that says which and why."""
    chosen = {**(PICTURES if obs.has_images else VECTORS), "ent_coef": 0.01 if action.num_logits else 0.0}
    chosen = {name: value for name, value in chosen.items() if getattr(config, name) is None}
    if not chosen:
        return {}, []
    kinds = {leaf.kind for leaf in obs.observed}
    seen = "picture" if obs.has_images else "discrete" if kinds == {"categories"} else "vector"
    done = "continuous" if not action.num_logits else "discrete" if action.num_logits == action.size else "mixed"
    return chosen, [f"settings for: {seen} observations, {done} actions"]
