"""The C++ functions of the fused programs, built once for a session of tests."""

import contextlib
import os
import time
from pathlib import Path

from fastppo.compile import library_cache, native
from fastppo.fused import kernels


def share_kernels(shared: Path) -> None:
    """Put the library into this process's cache. The first of several processes that come here builds it in `shared`."""
    if not native.has_compiler():
        return
    lock = shared / "building"
    with contextlib.suppress(FileExistsError):
        lock.mkdir()
        before = os.environ["XDG_CACHE_HOME"]
        os.environ["XDG_CACHE_HOME"] = str(shared)
        try:
            built = kernels.Kernels()
            built.ready(wait=True)
        finally:
            os.environ["XDG_CACHE_HOME"] = before
    until = time.monotonic() + 300.0
    while (library := next((shared / "fastppo").glob("fused-*.so"), None)) is None:
        assert time.monotonic() < until, "the process that builds the kernels has failed"
        time.sleep(0.1)
    own = library_cache.cache_dir()
    library_cache.check_cache_dir(own)
    with contextlib.suppress(FileExistsError):
        os.link(library, own / library.name)
