"""Why a program could not be compiled, in one line for the user. Of programs and compilers it knows their messages only."""

import errno
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path


class CompileError(RuntimeError):
    """This program cannot be compiled or loaded here. The message is one line; training continues eagerly."""


class LoadError(CompileError):
    """A library in the cache does not load. It has been removed, so that it is built again."""


# What the system says, in an exception or in a compiler's output, and what that means for the directory it is about.
_DISK = {
    errno.ENOSPC: "there is no room left in {}",
    errno.EDQUOT: "your quota is used up in {}",
    errno.EROFS: "the file system is read-only in {}",
    errno.EACCES: "no permission to write in {}",
}
_CACHE, _TEMPORARY = "XDG_CACHE_HOME", "TMPDIR"  # the variables that move the two directories that are written to


def explain(error: BaseException, cache_dir: Path) -> str:
    """One line: which directory is full or cannot be written and which variable moves it, or the compiler's first error.

    Args:
        error: what building a library raised. cache_dir: where the library was to be kept.
    """
    errors = list(_chain(error))
    lines = [line.strip() for one in errors for line in _text(one).splitlines() if line.strip()]
    numbers = {one.errno for one in errors if isinstance(one, OSError)}
    for number, what in _DISK.items():
        said = [line for line in lines if os.strerror(number).lower() in line.lower()]
        if number in numbers or said:
            files = [str(one.filename) for one in errors if isinstance(one, OSError) and one.filename]
            return what.format(_directory([*files, *said], cache_dir))
    if any(line.startswith("Cannot create temporary file in") or "usable temporary directory" in line for line in lines):
        return f"there is no directory for temporary files; {_TEMPORARY} names one"
    if any(("omp.h" in line and "not found" in line) or "omp.h: No such file" in line for line in lines):
        return "the C++ compiler has no OpenMP: install it (libomp-dev, on macOS libomp), or name another compiler in CXX"
    first = next((line for line in lines if re.search(r"\berror: ", line)), lines[0] if lines else "no reason given")
    # only the helpers of all programs are built by a command of ours
    is_ours = isinstance(error, subprocess.CalledProcessError)
    name = "native.cpp does not compile: " if is_ours else f"{type(error).__name__}: "
    return (first if first.startswith(name) else name + first)[:300]


def first_line(error: BaseException) -> str:
    """The first line of its message that is not empty, at most 300 characters."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")[:300]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those that it was raised from or during, each once."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _text(error: BaseException) -> str:
    """Its message, and of a command that failed what the command printed."""
    if isinstance(error, subprocess.CalledProcessError):
        printed = (error.stderr, error.stdout)
        told = "\n".join(part if isinstance(part, str) else part.decode(errors="replace") for part in printed if part)
        return told or str(error)
    return str(error)


def _directory(told: list[str], cache_dir: Path) -> str:
    """The directory that a message is about, and the variable that moves it: the cache, or that of temporary files.

    told: paths, or lines that may hold some. Where they name neither, the directory with less room, or both.
    """
    cache = f"{cache_dir} ({_CACHE} names another place for it)"
    try:
        temporary_dir = tempfile.gettempdir()
    except OSError:
        return cache
    temporary = f"{temporary_dir}, which the compiler uses ({_TEMPORARY} names another directory)"
    if any(str(cache_dir) in line for line in told):
        return cache
    if any(temporary_dir in line for line in told):
        return temporary
    if _device(cache_dir) == _device(Path(temporary_dir)):
        return f"{cache_dir} and {temporary_dir}, which are on one disk ({_CACHE} and {_TEMPORARY} name others)"
    return cache if shutil.disk_usage(_existing(cache_dir)).free < shutil.disk_usage(temporary_dir).free else temporary


def _device(path: Path) -> int:
    return _existing(path).stat().st_dev


def _existing(path: Path) -> Path:
    """The path, or the nearest directory above it that is there."""
    return next(place for place in (path, *path.parents) if place.exists())
