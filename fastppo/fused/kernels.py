"""Find the C++ functions of the fused programs: in the package, in the cache, or from the compiler in the background.

An installed package brings them for some kinds of processors (setup.py). Elsewhere they are built once per machine.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from fastppo.compile import library_cache, native
from fastppo.compile.compile_errors import CompileError, explain, first_line
from fastppo.compile.key import library_key
from fastppo.fused import operators, sources
from fastppo.system.platforms import end_group, own_group

WAIT_SECONDS = 120.0  # for another process that builds them


def key() -> str:
    """The cache key: the source files, their build command, the machine."""
    return library_key("fused", [*sources.files(), Path(sources.__file__)])


def packaged() -> Path | None:
    """The library in the package for this processor; None if there is none. It may be of older sources."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    name = capability if capability in sources.processors() else "generic"
    library = sources.FOLDER / f"kernels_{name}.bin"
    return library if library.exists() else None


class Kernels:
    """The functions of the fused programs. The compiler takes some seconds in the background where they are not there."""

    def __init__(self, builds: bool = True) -> None:
        """Load them if they are there, else start the compiler. Raises nothing: `ready` reports errors.

        builds: False where another process of this machine starts the compiler.
        """
        self._process: subprocess.Popen[bytes] | None = None
        self._build_dir: tempfile.TemporaryDirectory[str] | None = None
        self._error: CompileError | None = None
        self._waits = False
        try:
            if not self._load():
                self._waits = not builds
                if builds:
                    self._start()
        except CompileError as error:
            self._error = error

    def ready(self, wait: bool = False) -> bool:
        """Whether they are loaded. wait: until the compiler ends. Raises CompileError, at each call, if they cannot be."""
        if self._error is not None:
            raise self._error
        until = time.monotonic() + (WAIT_SECONDS if wait else 0.0)
        while self._waits and not self._load():
            if time.monotonic() >= until:
                return False
            time.sleep(0.1)
        self._waits = False
        if self._process is None:
            return True
        if wait:
            self._process.wait()
        if self._process.poll() is None:
            return False
        try:
            self._keep(self._process)
        except CompileError as error:
            self._error = error
            raise
        finally:
            self.close()
        return True

    def close(self) -> None:
        """Stop the compiler if it runs. Safe to call more than once."""
        if self._process is not None:
            if self._process.poll() is None:
                end_group(self._process)
                self._error = CompileError("the compiler was stopped")
            self._process.wait()
            self._process = None
        if self._build_dir is not None:
            self._build_dir.cleanup()
            self._build_dir = None

    def _load(self) -> bool:
        """Load the library from the package or the cache, if it is there. Raises CompileError if it does not load."""
        try:
            library = packaged()
            if library is not None and operators.load(library, sources.digest()):
                return True
        except (OSError, AttributeError):  # it was built for another system
            pass
        cache_dir = library_cache.cache_dir()
        library_cache.check_cache_dir(cache_dir)
        library = library_cache.find(cache_dir, key())
        if library is None:
            return False
        try:
            operators.load(library, sources.digest())
        except (OSError, AttributeError) as error:
            library_cache.remove(library)
            raise CompileError(f"the fused programs do not load: {first_line(error)}") from error
        library_cache.touch(library)
        return True

    def _start(self) -> None:
        if sys.platform == "win32":
            raise CompileError("fused programs are for Linux and macOS")
        if "avx2" in sources.processors() and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
            raise CompileError("this processor has no AVX2, without which eager programs are faster")
        if not native.has_compiler():
            raise CompileError(native.NO_COMPILER)
        cache_dir = library_cache.cache_dir()
        with contextlib.suppress(OSError, UnicodeDecodeError):
            raise CompileError(library_cache.refusal(cache_dir, key()).read_text(encoding="utf-8"))
        try:
            self._build_dir = tempfile.TemporaryDirectory(prefix="build-", dir=cache_dir, ignore_cleanup_errors=True)
            library = Path(self._build_dir.name, "fused.so")
            with Path(self._build_dir.name, "errors").open("wb") as errors:
                self._process = subprocess.Popen(
                    native.command(sources.MAIN, library, *sources.FLAGS, f'-DFASTPPO_SOURCES="{sources.digest()}"'),
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    env={**os.environ, "LC_ALL": "C"},  # errors in English
                    **own_group(),
                )
        except OSError as error:
            self.close()
            raise CompileError(explain(error, cache_dir)) from error

    def _keep(self, process: "subprocess.Popen[bytes]") -> None:
        """Move the new library into the cache and load it. Raises CompileError."""
        assert self._build_dir is not None
        cache_dir, folder = library_cache.cache_dir(), Path(self._build_dir.name)
        try:
            if process.returncode != 0:
                errors = (folder / "errors").read_text(encoding="utf-8", errors="replace")
                raise subprocess.CalledProcessError(process.returncode, process.args, stderr=errors)
            about = {"program": "learn and act of multi-layer perceptrons, of any size", "torch": ""}
            library_cache.keep(folder / "fused.so", cache_dir, key(), about)
        except (OSError, subprocess.SubprocessError) as error:
            raise CompileError(explain(error, cache_dir)) from error
        try:
            found = self._load()
        except CompileError as error:  # it was just built here, so building it again would not help
            library_cache.refuse(cache_dir, key(), str(error))
            raise
        if not found:
            raise CompileError(f"the fused programs vanished from {cache_dir} while they were being built")
