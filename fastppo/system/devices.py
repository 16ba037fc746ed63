"""Which device --device means, with its index. Use `resolved` before comparing two devices."""

import contextlib
import os
import re
from collections.abc import Iterator

import torch

from fastppo.errors import TrainingFault, UsageError


def resolved(device: torch.device | str) -> torch.device:
    """`device` with its index: "cuda" becomes the current GPU, normally "cuda:0". Other devices are returned as they are."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def choose_device(wanted: str) -> torch.device:
    """The device for --device; auto is the GPU if there is one, unless a trial has
    chosen before (training/device_trial.py). Raises UsageError for a GPU that cannot be used."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda":
        reason = _why_not(device)
        if reason is not None:
            raise UsageError(f"--device {wanted}: {reason}, or use --device cpu")
    return device


def _why_not(device: torch.device) -> str | None:
    """Why this GPU cannot be used, and what to do about it; None: it can."""
    if not torch.backends.cuda.is_built():
        return f"PyTorch {torch.__version__} is built without CUDA: install one with it (https://pytorch.org/get-started)"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return f"CUDA_VISIBLE_DEVICES={visible} hides all GPUs: unset it"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # no driver, or one that is older than PyTorch
        return f"the GPU cannot be used ({_sentences(error, 1)}): update the NVIDIA driver"
    number = torch.cuda.device_count()
    if number == 0:
        return "this machine has no GPU that PyTorch can use: check nvidia-smi"
    if (device.index or 0) < number:
        return None
    return "the only GPU is cuda:0: use it" if number == 1 else f"the GPUs are cuda:0 to cuda:{number - 1}: use one of them"


@contextlib.contextmanager
def enough_memory(device: torch.device, when: str) -> Iterator[None]:
    """Raise a TrainingFault where the GPU's memory is not enough. when: for the message."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TrainingFault(
            f"{device} is out of memory {when} ({_sentences(error, 2)}): fewer --num-envs or --num-steps make the rollout "
            "smaller, more --num-minibatches the update"
        ) from error


def _sentences(error: Exception, number: int) -> str:
    """The first sentences of a message, in one line."""
    text = " ".join(str(error).removeprefix("CUDA out of memory. ").split())
    return ". ".join(re.split(r"\.\s", text)[:number]).rstrip(".")[:300]
