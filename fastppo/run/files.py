"""Files replaced in one step, and directories locked by one process. Knows nothing of what is in them."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from fastppo.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows: two writers to one directory are not detected
    fcntl = None  # type: ignore[assignment]


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Write `path`. After a kill, a crash or a full disk it has its old content or the new one, never a part.

    If `path` or the temporary file is a link, the link is replaced, not followed. Raises OSError.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def file_name(text: str) -> str:
    """`text`, for example an environment id, as a name that is legal on every file system."""
    return re.sub(r"[^\w.-]+", "-", text)


@contextlib.contextmanager
def utf8_name(path: Path) -> Iterator[str]:
    """A name of an existing file or directory for libraries that encode names as UTF-8, as torch does.

    It is an alias in /dev/fd if Python could not decode the real name: bytes that are not UTF-8, or any non-ASCII letter in the
    locale C. Raises OSError.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            yield f"/dev/fd/{descriptor}"
        finally:
            os.close(descriptor)
    else:
        yield str(path)


def is_inside(path: Path, directory: Path) -> bool:
    """Whether the path, with links followed, lies in the directory."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(directory))


def lock_directory(path: Path, taken: str) -> int | None:
    """Lock a directory until the returned descriptor is closed, or this process ends.

    Returns None if the system has no such locks. Raises UsageError with the message `taken` if another process has locked it.
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UsageError(taken) from None
    except OSError:  # a file system without locks
        os.close(descriptor)
        return None
    return descriptor
