"""torch's global settings around our own computations. Knows nothing of what is computed.

An environment, a callback or the caller of `train` may have set another default dtype or device, autocast or a mode without
gradients. Their code keeps these settings; ours runs under `plain`, and says dtype and device of the tensors that it makes.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

AUTOCAST_DEVICES = ("cpu", "cuda")
_NOTHING = contextlib.nullcontext()  # can be entered again and again
P = ParamSpec("P")
R = TypeVar("R")


class Settings(NamedTuple):
    """What torch goes by where a call does not say it."""

    dtype: torch.dtype
    device: torch.device | None
    autocast: tuple[torch.dtype | None, ...]  # by AUTOCAST_DEVICES: None where it is off


CPU = torch.device("cpu")
PLAIN = Settings(torch.float32, CPU, (None,) * len(AUTOCAST_DEVICES))
_outside: ContextVar[Settings | None] = ContextVar("outside", default=None)


def settings() -> Settings:
    """Those of now."""
    autocast = (torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in AUTOCAST_DEVICES)
    return Settings(torch.get_default_dtype(), _default_device(), tuple(autocast))


def _default_device() -> torch.device | None:
    """None: one that is not there, of which torch does not say which it is."""
    try:
        return torch.empty(0).device  # 1 us where torch.get_default_device takes 4
    except Exception:  # whatever its driver raises
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
    """float32, the CPU, no autocast and no inference mode: what our programs are written for."""
    return _NOTHING if is_plain() else _plain()


def theirs() -> AbstractContextManager[None]:
    """Within `plain`, for a call of somebody else's function: the settings from before it."""
    outside = _outside.get()
    return _NOTHING if outside is None else _set(outside)


def ours(function: Callable[P, R]) -> Callable[P, R]:
    """`function` under `plain` and without gradients: ordinary tensors leave it, whatever the caller's settings are."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with plain(), torch.no_grad():
            return function(*args, **kwargs)

    return call


def bound(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which is called many times under the settings of now: nothing around it where they are plain."""
    return function if is_plain() else under(plain, function)


def under(mode: Callable[[], AbstractContextManager[Any]], function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with each call under a mode of its own."""

    def call(*args: Any) -> Any:
        with mode():
            return function(*args)

    return call


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
