"""Which device --device means, with its index. Use `resolved` before comparing two devices."""

import contextlib
import os
import re
from collections.abc import Iterator

import torch

from fastppo.errors import TrainingFault, UsageError, brief

WITH_FAST_PROGRAMS = ("cpu", "cuda")  # on other devices programs are eager


def resolved(device: torch.device | str) -> torch.device:
    """`device` with its index: "cuda" becomes the current GPU, normally "cuda:0". The CPU has none."""
    device = torch.device(device)
    if device.type == "cpu" or device.index is not None:
        return device
    return torch.device(device.type, torch.cuda.current_device() if device.type == "cuda" else 0)


def choose_device(wanted: torch.device | str) -> torch.device:
    """The device for --device, or for an argument `device`. Raises UsageError for one that cannot be used.

    "auto" is the GPU if there is one; where there is a choice, training/device_trial.py has made it before.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = None
    try:
        device = torch.device(wanted)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"--device {wanted!r:.99}: {brief(error)}; nearest: cpu") from None
    if device.type == "cuda":
        reason = _why_not(device)
    elif device.type == "mps" and not torch.backends.mps.is_available():
        reason = "PyTorch finds no GPU of Apple's here: it needs macOS on Apple silicon"
    elif device.type == "xpu" and not torch.xpu.is_available():
        reason = "PyTorch finds no GPU of Intel's here: it needs its driver and a PyTorch for XPU"
    elif device.type not in ("cpu", "mps", "xpu"):
        reason = "policies run on cpu, cuda, mps and xpu"
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
