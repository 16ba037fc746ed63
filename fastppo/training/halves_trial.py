"""Choose what `--env-halves auto` means on a GPU: train a few iterations of the run with and without, and take the faster.

On a CPU acting and stepping share the cores, and there is no trial: halves are rarely faster there (benchmarks/LOG.md).
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from fastppo.config import TrainConfig
from fastppo.errors import UsageError
from fastppo.training.device_trial import Train, duration, is_worth_trying, seconds_of

BETTER = 0.9  # halves are taken at this share, or less, of the time without


@dataclass(frozen=True)
class HalvesTrial:
    """The result: seconds of an iteration in halves and without; infinity where training failed."""

    on: float
    off: float

    @property
    def chosen(self) -> Literal["on", "off"]:
        """The value of --env-halves."""
        return "on" if self.on <= BETTER * self.off and math.isfinite(self.on) else "off"

    @property
    def note(self) -> str:
        """A line for the user."""
        other = {"on": "off", "off": "on"}[self.chosen]
        return (
            f"--env-halves {self.chosen}, after a trial: {duration(self.on)} in halves, {duration(self.off)} without "
            f"(--env-halves {other} takes the other)"
        )

    @property
    def summary(self) -> dict[str, float | None]:
        """For summary.json: None where training failed."""
        return {name: taken if math.isfinite(taken) else None for name, taken in (("on", self.on), ("off", self.off))}


def try_halves(config: TrainConfig, is_alone: bool, train: Train, without: float | None) -> HalvesTrial | None:
    """The trial for this run; None if the settings, the environments or the machine leave nothing to choose.

    Args:
        is_alone: one process trains, in environments made from the settings, whose steps no callback watches.
        train: as `try_devices` takes it.
        without: seconds of an iteration on the GPU without halves, if they are known.
    """
    on_gpu = torch.cuda.is_available() and config.device.startswith(("cuda", "auto"))
    if config.env_halves != "auto" or config.resume is not None or not is_alone or not on_gpu or not is_worth_trying(config):
        return None
    try:
        on = seconds_of(replace(config, env_halves="on"), train)
    except UsageError:  # not for these environments
        return None
    return HalvesTrial(on, seconds_of(replace(config, env_halves="off"), train) if without is None else without)
