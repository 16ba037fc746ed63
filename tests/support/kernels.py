"""The C++ functions of the fused programs, built once for a session of tests."""

import contextlib
import os
import shutil
import time
from pathlib import Path

from fastppo.compile import library_cache, native
from fastppo.fused import kernels, operators, sources

BROUGHT = kernels.packaged


def shared_library(shared: Path) -> Path | None:
    """The library in `shared`, a copy of the package's if that is of these sources; None without it and without a compiler.

    The first of several processes that come here builds or copies it.
    """
    packaged = BROUGHT()
    usable = packaged is not None and operators.load(packaged, sources.digest())
    if not usable and not native.has_compiler():
        return None
    with contextlib.suppress(FileExistsError):
        (shared / "building").mkdir()
        before = os.environ["XDG_CACHE_HOME"]
        os.environ["XDG_CACHE_HOME"] = str(shared)
        try:
            if usable:
                library_cache.check_cache_dir(library_cache.cache_dir())
                copy = Path(shutil.copy(packaged, shared / "copy.so"))
                library_cache.keep(copy, library_cache.cache_dir(), kernels.key(), {"program": "", "torch": ""})
            else:
                kernels.Kernels().ready(wait=True)
        finally:
            os.environ["XDG_CACHE_HOME"] = before
    until = time.monotonic() + 300.0
    while (library := next((shared / "fastppo").glob("fused-*.so"), None)) is None:
        assert time.monotonic() < until, "the process that builds the kernels has failed"
        time.sleep(0.1)
    return library


def share_kernels(shared: Path) -> None:
    """Put the library into this process's cache, where tests look for it: for them the package brings none."""
    kernels.packaged = lambda: None
    library = shared_library(shared)
    if library is not None:
        own = library_cache.cache_dir()
        library_cache.check_cache_dir(own)
        with contextlib.suppress(FileExistsError):
            os.link(library, own / library.name)
