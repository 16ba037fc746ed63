"""Exceptions: wrong use, faults of a run, faults of environments. Costs no torch."""

import contextlib
import difflib
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from typing import Any

_FLAG = re.compile(
    r"-m fastppo.*|torchrun -.*|`[^`]*`|(?<![^\s(\[])--(no-)?([a-z][a-z0-9]*(?:-[a-z0-9]+)*)"
)  # commands stay as they are
_reader_types_flags = False


@contextlib.contextmanager
def naming_flags(does: bool = True) -> Iterator[None]:
    """Context of the command line, in which messages keep their flags: --learning-rate. Elsewhere they name arguments."""
    global _reader_types_flags
    before, _reader_types_flags = _reader_types_flags, does
    try:
        yield
    finally:
        _reader_types_flags = before


def with_arguments(message: str) -> str:
    """A message with arguments of Python for flags: '--num-envs 8' is 'num_envs 8', '--no-norm-adv' is 'norm_adv=False'."""

    def argument(match: re.Match[str]) -> str:
        negated, name = match.groups()
        if name is None:
            return match[0]
        return name.replace("-", "_") + ("=False" if negated else "")

    return _FLAG.sub(argument, message)


class MessageForUsers(Exception):
    """An error whose message is written with flags. It names arguments instead where Python code is the caller."""

    def __init__(self, message: str) -> None:
        super().__init__(message if _reader_types_flags else with_arguments(message))


class UsageError(MessageForUsers):
    """The caller asked for something impossible. One or two lines name the flag (in Python: the argument) and the nearest
    legal value.

    The command line prints the message and exits with 2. Nothing has been written.
    """


class TrainingFault(MessageForUsers):
    """Training cannot continue: an environment failed or a number is not finite. The last checkpoint holds the state.

    The command line prints the message and exits with 3.
    """


class Interrupted(KeyboardInterrupt):
    """Training was interrupted. `result` is the TrainResult of what was trained until then."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self.result = result


class RankLost(TrainingFault):
    """Another process that trains the same agent has ended. Progress since the last checkpoint is lost."""

    def __init__(self, message: str, is_told: bool = False) -> None:
        """is_told: another process of this machine prints the message."""
        super().__init__(message)
        self.is_told = is_told


class EnvironmentFailed(Exception):
    """An environment raised, or its process died: "environment 3: ValueError: ...". A note has another process's traceback."""


class ForkHangs(EnvironmentFailed):
    """A forked environment process hangs, waiting for something that only its parent has. The message names the alternative."""


class NoAnswer(BaseException):
    """Environments took longer than --env-timeout, which the message says.

    Not an Exception, so that an environment that catches exceptions and tries again does not catch it.
    """


# What an environment's code may raise. SystemExit: it may call sys.exit().
ENVIRONMENT_ERRORS = (Exception, SystemExit, NoAnswer)


def environment_fault(error: BaseException, when: str) -> TrainingFault:
    """The fault to raise for one of ENVIRONMENT_ERRORS. A third-party vector environment does not say which one failed."""
    who = "an environment" if isinstance(error, EnvironmentFailed) else "the environments"
    return TrainingFault(f"{who} failed {when}: {located(error)}")


@contextlib.contextmanager
def resetting() -> Iterator[None]:
    """Raise what environments raise while they reset as a TrainingFault."""
    try:
        yield
    except ENVIRONMENT_ERRORS as error:
        raise environment_fault(error, "to reset") from error


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """'; nearest: a, b' for an error message, or '' when nothing known resembles `word`."""
    matches = difflib.get_close_matches(word, list(known), n=count, cutoff=0.5)
    return f"; nearest: {', '.join(matches)}" if matches else ""


def brief(error: BaseException) -> str:
    """'ValueError: the first line of its message', cut at 200 letters, to quote another error in one of ours.

    For EnvironmentFailed and NoAnswer the whole message.
    """
    if isinstance(error, EnvironmentFailed | NoAnswer):
        return str(error)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def located(error: BaseException) -> str:
    """`brief` with a place: 'ValueError: the first line of its message (file.py:12)'.

    The place is the innermost line outside Python, numpy, torch and fastppo. If the error has no message, the line is quoted.
    """
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_library(frame.filename)]
    if isinstance(error, EnvironmentFailed) or not frames:
        return brief(error)
    place = shown_place(frames[-1].filename, frames[-1].lineno)
    if isinstance(error, NoAnswer):
        return f"{error}, at {place}"
    quoted = "" if str(error).strip() else f": {frames[-1].line}"
    return f"{brief(error)}{quoted} ({place})"


def shown_place(filename: str, line: int | None) -> str:
    """'gymnasium/core.py:344': the file relative to a folder of sys.path, if it is in one."""
    folders = [os.path.join(folder, "") for folder in sys.path if os.path.isabs(folder)]
    longest = max((folder for folder in folders if filename.startswith(folder)), key=len, default="")
    return f"{filename[len(longest) :]}:{line}"


def _is_library(filename: str) -> bool:
    paths = sysconfig.get_paths()
    packages = [os.path.join(paths[name], "") for name in ("purelib", "platlib")]
    own = [
        os.path.join(os.path.dirname(__file__), ""),
        *(folder + name for folder in packages for name in ("numpy/", "torch/")),
    ]
    if filename.startswith(("<", *own)):
        return True
    return filename.startswith(os.path.join(paths["stdlib"], "")) and not filename.startswith(tuple(packages))
