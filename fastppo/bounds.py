"""What a value of a setting may be: its type and its bound, checked and put into words. Knows nothing of the settings."""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin


@dataclass(frozen=True)
class Bound:
    """The legal values of a setting, beyond its type. Stands beside the type: Annotated[float, POSITIVE]."""

    holds: Callable[[Any], object]
    words: str
    """What the value must be, as an error message says it."""


def at_least(low: int) -> Bound:
    """For whole numbers."""
    return Bound(lambda x: x >= low, f"a whole number of at least {low}")


def between(low: int, high: int) -> Bound:
    """For whole numbers, both ends included."""
    return Bound(lambda x: low <= x <= high, f"a whole number between {low} and {high}")


def within(low: float, high: float) -> Bound:
    """For numbers, both ends included."""
    return Bound(lambda x: low <= x <= high, f"between {low} and {high}")


FINITE = Bound(math.isfinite, "a number")
POSITIVE = Bound(lambda x: math.isfinite(x) and x > 0, "a number above 0")
POSITIVE_OR_INFINITE = Bound(lambda x: x > 0, "above 0")
NOT_NEGATIVE = Bound(lambda x: math.isfinite(x) and x >= 0, "a number of at least 0")
FRACTION = within(0, 1)
MAX_WIDTH = 2**16  # two such layers have 16 GiB of weights
WIDTH = between(1, MAX_WIDTH)  # of a layer
WIDTHS = Bound(lambda sizes: all(1 <= size <= MAX_WIDTH for size in sizes), f"whole numbers between 1 and {MAX_WIDTH}")
MAX_PIXELS = 4096
PIXELS = Bound(
    lambda sizes: sizes == (0,) or (len(sizes) in (1, 2) and all(1 <= size <= MAX_PIXELS for size in sizes)),
    f"0, or one or two whole numbers between 1 and {MAX_PIXELS}",
)  # height and width
WEIGHTS = Bound(lambda weights: weights and all(map(math.isfinite, weights)), "one or more numbers")
DEVICE = Bound(lambda x: re.fullmatch("auto|cpu|mps|xpu|cuda(:(0|[1-9][0-9]?))?", x), "auto, cpu, cuda, cuda:N, mps or xpu")
NAMES = Bound(lambda names: all(name.strip() and name.isprintable() for name in names), "names in a list")
DIRECTORY = Bound(str.strip, "the name of a directory")


def flag(name: str) -> str:
    """'num_envs' -> '--num-envs'."""
    return "--" + name.replace("_", "-")


def plain(value: Any) -> Any:
    """A setting as Python callers may pass it, as plain Python: lists become tuples, NumPy's scalars numbers, paths texts."""
    if isinstance(value, list | tuple):
        return tuple(map(plain, value))
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return plain_number(value)


def plain_number(value: Any) -> Any:
    """A scalar of NumPy as a number of Python; anything else as it is."""
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0 else value


def is_of_type(kind: Any, value: Any) -> bool:
    """Whether a value is of the type that a setting is annotated with. True is not a number, and 8.0 not a whole one."""
    if get_origin(kind) in (Union, UnionType):  # Union where a Literal is among the parts
        return any(is_of_type(part, value) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(is_of_type(get_args(kind)[0], part) for part in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and is_json(value)
    if kind in (int, float):
        number = isinstance(value, int | kind) and not isinstance(value, bool)
        return number and (isinstance(value, float) or abs(value) < 2**63)
    return _is_text(value) if kind is str else isinstance(value, kind)


def _is_text(value: Any) -> bool:
    """Whether files can hold the text. Bytes of a file's name that Python could not decode are allowed."""
    return isinstance(value, str) and "\0" not in value and not re.search("[\ud800-\udc7f\udd00-\udfff]", value)


def is_json(value: Any, depth: int = 16) -> bool:
    """Whether config.json can hold the value and give it back, a tuple as a list."""
    if isinstance(value, dict):
        return depth > 0 and all(isinstance(key, str) and is_json(part, depth - 1) for key, part in value.items())
    if isinstance(value, list | tuple):
        return depth > 0 and all(is_json(part, depth - 1) for part in value)
    return value is None or isinstance(value, str | bool | int | float)


def described(kind: Any) -> str:
    """What a setting of that type must be, in words."""
    if get_origin(kind) in (Union, UnionType):
        return f"{described(get_args(kind)[0])}, or nothing"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if kind is bool:
        return "true or false"
    if get_origin(kind) is dict:
        return "names with values that JSON has, nested at most 16 deep"
    return {int: "a whole number", float: "a number"}.get(kind, "a text")
