"""torch's global settings around fastppo's own computations. Knows nothing of what is computed.

An environment, a callback or the caller of `train` may have set another default dtype or device, autocast or inference mode.
Their code keeps these settings. fastppo's code runs under `plain`, and gives dtype and device for each tensor that it makes.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

AUTOCAST_DEVICES = ("cpu", "cuda")
_NOTHING = contextlib.nullcontext()  # can be entered repeatedly
P = ParamSpec("P")
R = TypeVar("R")


class Settings(NamedTuple):
    """torch's defaults for calls that do not say otherwise."""

    dtype: torch.dtype
    device: torch.device | None
    autocast: tuple[torch.dtype | None, ...]  # one for each of AUTOCAST_DEVICES; None: off


CPU = torch.device("cpu")
PLAIN = Settings(torch.float32, CPU, (None,) * len(AUTOCAST_DEVICES))
_outside: ContextVar[Settings | None] = ContextVar("outside", default=None)


def settings() -> Settings:
    """The current settings."""
    autocast = (torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in AUTOCAST_DEVICES)
    return Settings(torch.get_default_dtype(), _default_device(), tuple(autocast))


def _default_device() -> torch.device | None:
    """The default device; None if it does not exist, in which case torch does not name it."""
    try:
        return torch.empty(0).device  # 1 us where torch.get_default_device takes 4
    except Exception:  # a driver may raise anything
        return None


def is_plain() -> bool:
    """Whether `plain` would change nothing."""
    return (
        torch.get_default_dtype() is torch.float32
        and _default_device() == CPU
        and not torch.is_inference_mode_enabled()
        and not any(map(torch.is_autocast_enabled, AUTOCAST_DEVICES))
    )


def plain() -> AbstractContextManager[None]:
    """float32, the CPU, no autocast and no inference mode: what fastppo's programs are written for."""
    return _NOTHING if is_plain() else _plain()


def theirs() -> AbstractContextManager[None]:
    """Within `plain`, for calls of user code: the settings from before `plain`."""
    outside = _outside.get()
    return _NOTHING if outside is None else _set(outside)


def ours(function: Callable[P, R]) -> Callable[P, R]:
    """`function` under `plain` and without gradients, so that it returns ordinary tensors under any settings."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with plain(), torch.no_grad():
            return function(*args, **kwargs)

    return call


def bound(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under `plain`; unwrapped, and so without overhead, if the current settings are plain already."""
    return function if is_plain() else under(plain, function)


def under(mode: Callable[[], AbstractContextManager[Any]], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with each call in a fresh `mode()`."""

    def call(*args: Any) -> Any:
        with mode():
            return function(*args)

    return call


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """Matrix products of float32 in TF32 on a GPU; afterwards as before. Convolutions are so by PyTorch's default.

    `allow_tf32` keeps PyTorch's older setting equal to the newer one: Inductor reads both, and they must not differ.
    """
    matmul = torch.backends.cuda.matmul
    before: str = matmul.fp32_precision
    was_allowed: bool = before == "tf32"
    if was_allowed:
        yield
        return
    matmul.allow_tf32 = True
    try:
        yield
    finally:
        matmul.allow_tf32 = False
        matmul.fp32_precision = before


@contextlib.contextmanager
def _plain() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        token = _outside.set(_outside.get() or settings())
        stack.callback(_outside.reset, token)
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(_set(PLAIN))
        yield


@contextlib.contextmanager
def _set(wanted: Settings) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        now = settings()
        if wanted.dtype != now.dtype:
            stack.callback(torch.set_default_dtype, now.dtype)
            torch.set_default_dtype(wanted.dtype)
        if wanted.device is not None and wanted.device != now.device:
            stack.enter_context(wanted.device)
        for kind, dtype, before in zip(AUTOCAST_DEVICES, wanted.autocast, now.autocast, strict=True):
            if dtype != before:
                stack.enter_context(torch.autocast(kind, dtype, enabled=dtype is not None))
        yield
