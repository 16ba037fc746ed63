"""The C++ functions of the fused programs, built once for a session of tests."""

import contextlib
import os
import time
from pathlib import Path

from fastppo.compile import library_cache, native
from fastppo.fused import kernels, operators, sources


def shared_library(shared: Path) -> Path | None:
    """The package's library if it is of these sources, else one in `shared`; None without a compiler.

    The first of several processes that come here builds it.
    """
    packaged = kernels.packaged()
    if packaged is not None and operators.load(packaged, sources.digest()):
        return packaged
    if not native.has_compiler():
        return None
    with contextlib.suppress(FileExistsError):
        (shared / "building").mkdir()
        before = os.environ["XDG_CACHE_HOME"]
        os.environ["XDG_CACHE_HOME"] = str(shared)
        try:
            kernels.Kernels().ready(wait=True)
        finally:
            os.environ["XDG_CACHE_HOME"] = before
    until = time.monotonic() + 300.0
    while (library := next((shared / "fastppo").glob("fused-*.so"), None)) is None:
        assert time.monotonic() < until, "the process that builds the kernels has failed"
        time.sleep(0.1)
    return library


def share_kernels(shared: Path) -> None:
    """Put the library into this process's cache, where the package does not bring it."""
    library = shared_library(shared)
    if library is not None and library.name.startswith("fused-"):
        own = library_cache.cache_dir()
        library_cache.check_cache_dir(own)
        with contextlib.suppress(FileExistsError):
            os.link(library, own / library.name)
