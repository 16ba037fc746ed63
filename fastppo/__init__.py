"""fastppo: a fast, correct, readable PPO trainer for any Gymnasium environment.

from fastppo import load_policy, train
result = train("CartPole-v1", total_timesteps=100_000)
action = load_policy(result.run_dir).act(obs)
"""

from typing import TYPE_CHECKING, Any

from fastppo.callbacks import Callback, StepView, View
from fastppo.config import TrainConfig
from fastppo.errors import TrainingFault, UsageError

if TYPE_CHECKING:
    from fastppo.analysis.loading import load_policy
    from fastppo.presets import load_preset, preset_for
    from fastppo.training.loop import train
    from fastppo.training.results import TrainResult

__all__ = [
    "Callback",
    "StepView",
    "TrainConfig",
    "TrainResult",
    "TrainingFault",
    "UsageError",
    "View",
    "load_policy",
    "load_preset",
    "preset_for",
    "train",
]


def __getattr__(name: str) -> Any:
    """The names that need torch or gymnasium, imported when first asked for."""
    if name == "train":
        from fastppo.training.loop import train

        return train
    if name == "TrainResult":
        from fastppo.training.results import TrainResult

        return TrainResult
    if name == "load_policy":
        from fastppo.analysis.loading import load_policy

        return load_policy
    if name in ("load_preset", "preset_for"):
        from fastppo import presets

        return getattr(presets, name)
    raise AttributeError(f"module 'fastppo' has no attribute {name!r}")
