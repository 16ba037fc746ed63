"""Files that appear whole or not at all, and directories that one process writes to. Knows nothing of what is in them."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from fastppo.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows, where two writers to one directory are not noticed
    fcntl = None  # type: ignore[assignment]


def replace_file(path: Path, content: bytes | memoryview) -> None:
    """Write `path`: a kill, a crash or a full disk at any moment leaves it as it was before, or as it is to be.

    A link in its place, or in that of the temporary file, is replaced, not followed. Raises OSError.
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
    """`text`, an environment's id for one, as a name that every file system takes."""
    return re.sub(r"[^\w.-]+", "-", text)


@contextlib.contextmanager
def utf8_name(path: Path) -> Iterator[str]:
    """A name of a file or directory that is there for libraries that encode names as UTF-8, as torch does.

    It is another than its own where Python could not decode that: bytes that are no UTF-8, or any letter in the locale C.
    Raises OSError.
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
    """Whether it lies in the directory, and is no link that leads out of it."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(directory))


def lock_directory(path: Path, taken: str) -> int | None:
    """Keep others out as long as this process lives, or until the descriptor that is returned is closed.

    None where files cannot be locked. Raises UsageError, saying `taken`, where somebody else keeps us out.
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
