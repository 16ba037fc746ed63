"""Choose between the GPU and the CPU for `--device auto`: train a few iterations of the run on each, and take the faster.

Small networks are often faster on the CPU, since each operation on a GPU has to be started. The trial makes environments and a
policy of its own, writes to a temporary directory, and leaves nothing behind. Without a usable GPU there is none.
"""

import gc
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from fastppo.callbacks import CallbackFunction, View
from fastppo.config import TrainConfig
from fastppo.errors import TrainingFault

ITERATIONS = 5  # on each device; the fastest counts, since the first ones compile, capture and compare programs
TRIAL_SECONDS = 10.0  # no further iteration starts on a device after this time
WORTH_TRYING = 50  # iterations of a run; the GPU is taken for shorter ones
NEVER = 1e9  # seconds between checkpoints

Train = Callable[[TrainConfig, CallbackFunction], None]


@dataclass(frozen=True)
class DeviceTrial:
    """The result: seconds of an iteration, by device; infinity where training failed."""

    seconds: dict[str, float]

    @property
    def chosen(self) -> str:
        """The faster device."""
        return min(self.seconds, key=self.seconds.__getitem__)

    @property
    def note(self) -> str:
        """A line for the user."""
        (other,) = (device for device in self.seconds if device != self.chosen)
        each = ", ".join(f"{device} {duration(self.seconds[device])}" for device in (self.chosen, other))
        return f"device {self.chosen}, the faster one in a trial: {each} (--device {other} takes the other)"

    @property
    def summary(self) -> dict[str, float | None]:
        """For summary.json: None where training failed."""
        return {device: taken if math.isfinite(taken) else None for device, taken in self.seconds.items()}


def duration(seconds: float) -> str:
    """As '12.3 ms an iteration', or 'failed'."""
    return f"{1e3 * seconds:.3g} ms an iteration" if math.isfinite(seconds) else "failed"


def try_devices(config: TrainConfig, is_alone: bool, train: Train) -> DeviceTrial | None:
    """The trial for this run; None if --device, --resume or the machine leaves nothing to choose.

    Args:
        is_alone: one process trains, in environments made from the settings.
        train: trains with the given settings and callback, and writes no results. Raises TrainingFault.
    """
    if config.device != "auto" or config.resume is not None or not is_alone or not torch.cuda.is_available():
        return None
    if not is_worth_trying(config):
        return None
    trial = DeviceTrial({device: seconds_of(replace(config, device=device), train) for device in ("cuda", "cpu")})
    # where both fail, the run itself says why
    return trial if math.isfinite(trial.seconds[trial.chosen]) else None


def is_worth_trying(config: TrainConfig) -> bool:
    """Whether the run is so much longer than a trial."""
    return (config.num_iterations or config.total_timesteps / config.batch_size) >= WORTH_TRYING


def seconds_of(config: TrainConfig, train: Train) -> float:
    """Seconds of an iteration with these settings; infinity where training fails."""
    ends = {0: 0.0}  # seconds since training began, by iteration; the same for all seeds

    def watch(run: View) -> bool:
        ends[run.iteration] = run.metrics["seconds"]
        return ends[run.iteration] > TRIAL_SECONDS

    try:
        with tempfile.TemporaryDirectory(prefix="fastppo-", ignore_cleanup_errors=True) as directory:
            train(short(config, directory), watch)
    except (TrainingFault, RuntimeError):  # torch's errors are RuntimeErrors; what is no matter of the device comes again
        return math.inf
    finally:
        gc.collect()  # frees what the trial held on the GPU
    return min((after - before for before, after in pairwise(ends.values())), default=math.inf)


def short(config: TrainConfig, directory: str) -> TrainConfig:
    """The run as a trial of ITERATIONS, without evaluation, videos, trackers, checkpoints and long compilations."""
    return replace(
        config,
        run_dir=f"{directory}/run",
        num_iterations=ITERATIONS,
        stop_at_return=None,
        compile="off" if config.compile == "off" else "auto",
        check_env=False,
        eval_episodes=0,
        eval_every=None,
        checkpoint_seconds=NEVER,
        checkpoint_iterations=None,
        exact_resume=False,
        record_every=None,
        track=None,
        verbose=0,
    )
