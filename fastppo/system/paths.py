"""The user's paths, relative to the working directory in which a command was started."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from fastppo.errors import UsageError

MAX_LETTERS = 250  # of a name that is quoted in an error

_deleted = False  # whether `leave_deleted_directory` has left the working directory


def current_directory() -> Path | None:
    """The working directory; None if it has been deleted. Read it early: an environment's code may change it."""
    try:
        return None if _deleted else Path.cwd()
    except FileNotFoundError:
        return None


def path_of(given: object, name: str) -> str:
    """A path as text. Raises UsageError that starts with `name` for what is neither a text nor a path."""
    if not isinstance(given, str | os.PathLike):
        raise UsageError(f"{name} must be a path, got {given!r:.99}")
    return str(os.fspath(given))


def absolute(path: str | Path, name: str, place: Path | None) -> Path:
    """`path` relative to `place`, a result of `current_directory`.

    Letters that the locale's encoding lacks, for example in the locale C, become UTF-8 bytes, as on a command line.

    Args:
        name: the flag that `path` was given with.

    Raises:
        UsageError: the path is relative, and the working directory has been deleted.
    """
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        path = os.fsdecode(str(path).encode("utf-8", "surrogateescape"))
    if place is None and not Path(path).is_absolute():
        raise UsageError(
            f"{name} {path}: the working directory has been deleted; change to another one, or give an absolute path"
        )
    return (place or Path()) / path


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Context, or decorator of a function, that reads what the user named: raises an OSError as a UsageError with the file."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise UsageError(f"{str(error.filename)[:MAX_LETTERS]} cannot be read: {error.strerror}") from None


def leave_deleted_directory() -> None:
    """Change to the root directory if the working directory has been deleted: without one MKL ends the process.

    `current_directory` then returns None.
    """
    global _deleted
    try:
        os.getcwd()
    except FileNotFoundError:
        os.chdir(os.path.abspath(os.sep))
        _deleted = True


@contextlib.contextmanager
def importable(place: Path | None) -> Iterator[None]:
    """Context in which modules of the folder `place` can be imported, after all that are installed."""
    added = None if place is None or str(place) in sys.path else str(place)
    if added is not None:
        sys.path.append(added)
    try:
        yield
    finally:
        if added is not None and added in sys.path:
            sys.path.remove(added)
