"""fastppo: a fast, correct, readable PPO trainer for any Gymnasium environment.

from fastppo import load_policy, train
result = train("CartPole-v1", total_timesteps=100_000)
action = load_policy(result.run_dir).act(obs)
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fastppo.callbacks import Callback, StepView, View
from fastppo.config import TrainConfig
from fastppo.errors import TrainingFault, UsageError
from fastppo.system.requirements import check_gymnasium

if TYPE_CHECKING:
    from fastppo.analysis.loading import load_policy
    from fastppo.find_preset import load_preset, preset_for
    from fastppo.training.loop import train
    from fastppo.training.results import TrainResult
    from fastppo.verbs import evaluate, export, plot

__all__ = [
    "Callback",
    "StepView",
    "TrainConfig",
    "TrainResult",
    "TrainingFault",
    "UsageError",
    "View",
    "evaluate",
    "export",
    "load_policy",
    "load_preset",
    "plot",
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
    if name in ("evaluate", "export", "plot"):
        from fastppo import verbs

        return getattr(verbs, name)
    if name in ("load_preset", "preset_for"):
        from fastppo import find_preset

        return getattr(find_preset, name)
    raise AttributeError(f"module 'fastppo' has no attribute {name!r}")


class _Package(ModuleType):
    """Keeps these names functions: importing fastppo.evaluate, the verb's module, would put the module in its place."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
check_gymnasium()  # before a module imports what an older one lacks
