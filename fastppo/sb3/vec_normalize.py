"""The statistics of Stable-Baselines3's VecNormalize, from a .npz file. Its own file is a pickle, which is never read.

The file has the arrays mean, var and count of the observations, return_var of the rewards, and the number clip_obs.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastppo.errors import UsageError, brief
from fastppo.policy.normalization import RunningMoments
from fastppo.sb3.archive import SavedModel

MAX_BYTES = 2**26
CLIP = 10.0  # standard deviations at which core.contracts.normalize_obs clips, as VecNormalize does by default
HOW = "docs/from-sb3.md has four lines that write its numbers to stats.npz in your own environment"


@dataclass(frozen=True)
class Statistics:
    """What VecNormalize has counted."""

    obs: RunningMoments
    rewards: RunningMoments | None  # None: rewards were not normalised


def read_statistics(model: SavedModel, path: str | None) -> Statistics | None:
    """The statistics in a .npz file; None for "none", or for a model that had no VecNormalize.

    Raises UsageError: the model was trained with VecNormalize and there is no file, or it is a pickle, missing or damaged.
    """
    if path is None:
        if model.data.get("_last_original_obs") is not None:
            raise UsageError(
                f"{model.name} was trained with VecNormalize: give --vecnormalize stats.npz ({HOW}), "
                "or --vecnormalize none if it normalised rewards only"
            )
        return None
    if path == "none":
        return None
    if not path.endswith(".npz"):
        raise UsageError(f"--vecnormalize {path}: a pickle can execute anything, so it is not read; {HOW}")
    try:
        if not Path(path).is_file() or Path(path).stat().st_size > MAX_BYTES:
            raise ValueError(f"it is no file, or larger than {MAX_BYTES} bytes")
        with np.load(path, allow_pickle=False) as arrays:
            mean, var, count = (_numbers(arrays[name]) for name in ("mean", "var", "count"))
            clip = float(arrays["clip_obs"]) if "clip_obs" in arrays else CLIP
            return_var = _numbers(arrays["return_var"]) if "return_var" in arrays else torch.ones((), dtype=torch.float64)
        if mean.shape != var.shape or count.shape or return_var.shape:
            raise ValueError("its numbers do not fit each other")
    except Exception as error:  # numpy raises whatever a wrong byte leads it to
        raise UsageError(f"--vecnormalize {path} cannot be read ({brief(error)}); {HOW}") from None
    if clip != CLIP:
        raise UsageError(f"--vecnormalize {path}: clip_obs is {clip:g}, and observations are clipped at {CLIP:g} here")
    rewards = None if return_var == 1.0 else RunningMoments(torch.zeros_like(return_var), return_var, count)
    return Statistics(RunningMoments(mean, var, count), rewards)


def _numbers(array: "np.ndarray[tuple[int, ...], np.dtype[np.generic]]") -> Tensor:
    """An array as a tensor. Raises ValueError if its numbers are not those of statistics."""
    numbers = torch.from_numpy(np.array(array, np.float64))
    if not numbers.isfinite().all():
        raise ValueError("a number is not finite")
    return numbers
