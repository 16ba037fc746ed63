"""fastppo: a fast, correct, readable PPO trainer for any Gymnasium environment.

from fastppo import TrainConfig, load_policy, train
result = train(TrainConfig(env_id="CartPole-v1", total_timesteps=100_000))
action = load_policy(result.run_dir).act(obs)
"""

from typing import TYPE_CHECKING, Any

from fastppo.callbacks import Callback, View
from fastppo.config import TrainConfig
from fastppo.errors import TrainingFault, UsageError

if TYPE_CHECKING:
    from fastppo.agent_run import TrainResult
    from fastppo.loading import load_policy
    from fastppo.loop import train
    from fastppo.presets import load_preset, preset_for

__all__ = [
    "Callback",
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
        from fastppo.loop import train

        return train
    if name == "TrainResult":
        from fastppo.agent_run import TrainResult

        return TrainResult
    if name == "load_policy":
        from fastppo.loading import load_policy

        return load_policy
    if name in ("load_preset", "preset_for"):
        from fastppo import presets

        return getattr(presets, name)
    raise AttributeError(f"module 'fastppo' has no attribute {name!r}")
