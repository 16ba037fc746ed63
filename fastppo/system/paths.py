"""The user's paths, as seen from the working directory in which a command was started."""

import os
from pathlib import Path

from fastppo.errors import UsageError

_deleted = False  # the working directory, before `leave_deleted_directory`


def current_directory() -> Path | None:
    """The working directory, to be remembered before the code of an environment changes it; None where it has been deleted."""
    try:
        return None if _deleted else Path.cwd()
    except FileNotFoundError:
        return None


def absolute(path: str | Path, name: str, place: Path | None) -> Path:
    """`path` as seen from `place`, a result of `current_directory`.

    Letters that the locale's encoding does not have, for example in the locale C, become the bytes of UTF-8, as they are on a
    command line.

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


def leave_deleted_directory() -> None:
    """Go to the root directory where the working directory has been deleted: without one MKL ends the process.

    `current_directory` is None from then on.
    """
    global _deleted
    try:
        os.getcwd()
    except FileNotFoundError:
        os.chdir(os.path.abspath(os.sep))
        _deleted = True
