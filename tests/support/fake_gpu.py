"""A machine with two GPUs, pretended: tensors of FakeTensorMode, which have shapes, dtypes and devices and no numbers.

What a program does on a GPU is then seen on a machine without one: an operation on tensors of two devices raises, and results
say where they are. Gradients are replaced by zeros: PyTorch's engine asks the real CUDA for its streams.
"""

import contextlib
import ctypes
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor

CUDA, META = 1, 14  # c10::DeviceType
REGISTRY = "_ZN3c104impl26device_guard_impl_registryE"  # c10::impl::device_guard_impl_registry
REAL_GENERATOR = torch.Generator


class GeneratorOfDevice(torch.Generator):
    """A CPU generator that says it is another device's."""

    wanted = torch.device("cpu")

    @property
    def device(self):
        return self.wanted


def generator(device="cpu"):
    """torch.Generator(device)."""
    made = GeneratorOfDevice()
    made.wanted = torch.device(device)
    if made.wanted.type == "cuda" and made.wanted.index is None:
        made.wanted = torch.device("cuda", torch.cuda.current_device())
    return made


def gradient(value, leaves, *args, **kwargs):
    """torch.autograd.grad, as far as shapes and devices go."""
    return tuple(torch.zeros_like(leaf) for leaf in (leaves if isinstance(leaves, (tuple, list)) else [leaves]))


@contextlib.contextmanager
def no_op_guard():
    """The device guard that a PyTorch without CUDA lacks: that of meta tensors, which does nothing, in its place."""
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    if sys.platform != "linux" or not library.exists():
        pytest.skip("reaches into PyTorch's library as Linux has it")
    registry = (ctypes.c_void_p * (META + 1)).in_dll(ctypes.CDLL(str(library)), REGISTRY)
    before = registry[CUDA]
    registry[CUDA] = before or registry[META]
    try:
        yield
    finally:
        registry[CUDA] = before


@contextlib.contextmanager
def fake_gpus(current=0):
    """Two GPUs, `current` the one that is; yields a list of all that were made the current one."""
    chosen = [current]
    with pytest.MonkeyPatch.context() as patch, no_op_guard(), FakeTensorMode():
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "init", lambda: None)
        patch.setattr(torch.backends.cuda, "is_built", lambda: True)
        patch.setattr(torch.cuda, "current_device", lambda: chosen[-1])
        patch.setattr(torch.cuda, "set_device", lambda device: chosen.append(_index(device)))
        patch.setattr(torch, "Generator", generator)
        patch.setattr(torch.autograd, "grad", gradient)
        patch.setattr(FakeTensor, "__bool__", lambda self: True, raising=False)
        yield chosen


def _index(device):
    return device if isinstance(device, int) else torch.device(device).index
