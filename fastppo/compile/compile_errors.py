"""One line for the user on why compilation failed. Knows only the error messages of the system and the compilers."""

import errno
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path


class CompileError(RuntimeError):
    """This program cannot be compiled or loaded on this machine. The message is one line. Training continues eagerly."""


class LoadError(CompileError):
    """A library in the cache does not load. It was removed, so the next build replaces it."""


# By error number: the message for the user, with the directory in place of {}.
_DISK = {
    errno.ENOSPC: "there is no room left in {}",
    errno.EDQUOT: "your quota is used up in {}",
    errno.EROFS: "the file system is read-only in {}",
    errno.EACCES: "no permission to write in {}",
}
_CACHE, _TEMPORARY = "XDG_CACHE_HOME", "TMPDIR"  # environment variables that set the two directories


def explain(error: BaseException, cache_dir: Path) -> str:
    """One line: the directory that is full or not writable, with the variable that sets it; or the compiler's first error.

    Args:
        error: the exception that the build raised. cache_dir: the directory of compiled programs.
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
    # only our own C++ files are compiled by a subprocess of ours
    command = error.cmd if isinstance(error, subprocess.CalledProcessError) else []
    file = next((Path(word).name for word in command if str(word).endswith(".cpp")), None)
    name = f"{type(error).__name__}: " if file is None else f"{file} does not compile: "
    return (first if first.startswith(name) else name + first)[:300]


def first_line(error: BaseException) -> str:
    """The first non-empty line of the error's message, at most 300 characters."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")[:300]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, its cause or context, and so on. Each appears once."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _text(error: BaseException) -> str:
    """The message of the error; for a failed command, the command's output."""
    if isinstance(error, subprocess.CalledProcessError):
        printed = (error.stderr, error.stdout)
        output = "\n".join(part if isinstance(part, str) else part.decode(errors="replace") for part in printed if part)
        return output or str(error)
    return str(error)


def _directory(messages: list[str], cache_dir: Path) -> str:
    """The directory that caused the error, the cache or the temporary directory, and the variable that sets it.

    messages: lines or paths of the error. If they name neither directory, the result is the one with less free space, or both
        if they are on one disk.
    """
    cache = f"{cache_dir} ({_CACHE} names another place for it)"
    try:
        temporary_dir = tempfile.gettempdir()
    except OSError:
        return cache
    temporary = f"{temporary_dir}, which the compiler uses ({_TEMPORARY} names another directory)"
    if any(str(cache_dir) in line for line in messages):
        return cache
    if any(temporary_dir in line for line in messages):
        return temporary
    if _device(cache_dir) == _device(Path(temporary_dir)):
        return f"{cache_dir} and {temporary_dir}, which are on one disk ({_CACHE} and {_TEMPORARY} name others)"
    return cache if shutil.disk_usage(_existing(cache_dir)).free < shutil.disk_usage(temporary_dir).free else temporary


def _device(path: Path) -> int:
    return _existing(path).stat().st_dev


def _existing(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    return next(place for place in (path, *path.parents) if place.exists())
