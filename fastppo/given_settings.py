"""Settings as a user gives them, in the place of others. Costs no torch."""

import reprlib
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from typing import Any

from fastppo.bounds import flag
from fastppo.config import TrainConfig
from fastppo.errors import UsageError, nearest

_NAMES = [field.name for field in fields(TrainConfig)]


def with_settings(config: TrainConfig, settings: Mapping[str, Any]) -> TrainConfig:
    """`config` with other values. Raises UsageError for an unknown name, an illegal value, or two that set the same thing."""
    unknown = next((name for name in settings if name not in _NAMES), None)
    if unknown is not None:
        raise UsageError(f"there is no setting {reprlib.repr(unknown)}{nearest(unknown[:100], _NAMES)}")
    return replace(without_rivals(config, [name for name, value in settings.items() if value is not False]), **settings)


def without_rivals(config: TrainConfig, given: Collection[str]) -> TrainConfig:
    """`config` without the settings that a given one replaces. Raises UsageError if both of a pair are given."""
    for one, other in (("total_timesteps", "num_iterations"), ("num_minibatches", "minibatch_size")):
        if one in given and other in given:
            raise UsageError(f"{flag(one)} and {flag(other)} set the same thing: give only one of them")
        if one in given:
            config = replace(config, **{other: None})  # type: ignore[arg-type]  # both are "int | None"
    if "clip_reward" in given and "norm_reward" not in given:
        config = replace(config, norm_reward=False)
    if "desired_kl" in given and "anneal_lr" not in given:
        config = replace(config, anneal_lr=False)
    return config
