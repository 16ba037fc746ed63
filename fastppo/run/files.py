"""How a file is written so that it is whole or not there. Costs no torch, and knows nothing of what is in it."""

import contextlib
import os
from pathlib import Path


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
