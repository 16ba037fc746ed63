"""The C++ functions of the fused programs and the helpers of compiled ones, built once for a session of tests."""

import contextlib
import os
import shutil
import time
from pathlib import Path

from fastppo.compile import library_cache, native
from fastppo.compile.key import native_key
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
    if is_first(shared / "building"):
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
    return once_built(shared / "fastppo", "fused-*.so")


def is_first(mark: Path) -> bool:
    """Whether no other process has come here before."""
    try:
        mark.mkdir()
    except FileExistsError:
        return False
    return True


def once_built(directory: Path, pattern: str) -> Path:
    """The library of that name, which one of several processes builds."""
    until = time.monotonic() + 300.0
    while (library := next(directory.glob(pattern), None)) is None:
        assert time.monotonic() < until, "the process that builds it has failed"
        time.sleep(0.1)
    return library


def share_helpers(shared: Path, cache_dir: Path) -> Path:
    """Copy the helpers of compiled programs into `cache_dir`, where `compile_program` would build them; returns the copy."""
    if is_first(shared / "building helpers"):
        native.build(shared / "native.so")
        library_cache.keep(shared / "native.so", shared, native_key(), {"program": "", "torch": ""})
    library = once_built(shared, f"{native_key()}-*.so")
    return Path(shutil.copy(library, cache_dir))


def share_kernels(shared: Path) -> None:
    """Put the library into this process's cache, where tests look for it: for them the package brings none."""
    kernels.packaged = lambda: None
    library = shared_library(shared)
    if library is not None:
        own = library_cache.cache_dir()
        library_cache.check_cache_dir(own)
        with contextlib.suppress(FileExistsError):
            os.link(library, own / library.name)
