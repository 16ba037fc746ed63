"""Programs compiled by another process while this one trains eagerly."""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastppo.compile import library_cache
from fastppo.compile.compile_errors import CompileError, first_line
from fastppo.compile.compiled_program import CompiledProgram, load
from fastppo.compile.inductor import compile_program
from fastppo.compile.key import cache_key
from fastppo.compile.program import Example, Program
from fastppo.core.seed_axis import Seeds
from fastppo.system.platforms import end_group, lower_priority, own_group


class BackgroundCompile:
    """`compile_program` in a child process while this one trains eagerly. A thread would compete with training for the GIL."""

    def __init__(
        self,
        program: Program,
        example: Example,
        cache_dir: Path,
        seeds: Seeds | None = None,
    ) -> None:
        """Start the child process.

        Raises CompileError if the directory is unsafe, the program cannot be sent to a child process, or the cache says that an
        earlier build was refused.
        """
        library_cache.check_cache_dir(cache_dir)
        self._program, self._example, self._cache_dir, self._seeds = program, example, cache_dir, seeds
        self._key = cache_key(program, example, seeds)
        with contextlib.suppress(OSError, UnicodeDecodeError):
            raise CompileError(library_cache.refusal(cache_dir, self._key).read_text(encoding="utf-8"))
        try:
            job = pack(program, example, seeds)
            same = cache_key(*unpack(job)) == self._key
        except Exception as error:  # pickling a user's class can raise anything
            raise CompileError(_unreachable(error)) from error
        if not same:
            raise CompileError(_DIFFERS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import serve; serve()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},  # the child imports the same modules
                **own_group(),  # Ctrl-C goes to the training process only, which then stops the child and its C++ compiler
            )
        except OSError as error:
            raise CompileError(f"no process could be started for it: {error.strerror}") from error
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # poll reports a child that died
            self._process.stdin.write(pickle.dumps((job, self._key, cache_dir, torch.get_num_threads())))
            self._process.stdin.close()

    def poll(self) -> CompiledProgram | None:
        """The program, or None while it is still being built. Raises CompileError if the build failed."""
        if self._process.poll() is None:
            return None
        assert self._process.stdout is not None
        with self._process.stdout as stdout:
            reason = "" if stdout.closed else stdout.read().decode(errors="replace").strip()
        loaded = load(self._program, self._example, self._cache_dir, self._key, self._seeds, None)
        if loaded is None:
            raise CompileError(reason or f"the compiler's process ended with code {self._process.returncode}")
        return loaded

    def wait(self) -> CompiledProgram:
        """The program, when it is built. Raises CompileError if the build failed."""
        self._process.wait()
        program = self.poll()
        assert program is not None
        return program

    def stop(self) -> None:
        """Stop the build. Safe to call at any time and more than once."""
        if self._process.poll() is None:
            end_group(self._process)
        self._process.wait()


def serve() -> None:
    """Entry point of the child process: read a job from stdin, write the reason for a failure to stdout."""
    lower_priority()  # training has priority
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # exit through `with`, so that the build directory is removed
    job, key, cache_dir, num_threads = pickle.loads(sys.stdin.buffer.read())
    torch.set_num_threads(num_threads)
    try:
        program, example, seeds = unpack(job)
    except Exception as error:  # a class defined in a script, or a module that cannot be imported twice
        _send_reason(_unreachable(error))
        return
    try:
        if cache_key(program, example, seeds) != key:  # no process would look under this key
            library_cache.refuse(cache_dir, key, _DIFFERS)
            _send_reason(_DIFFERS)
        else:
            compile_program(program, example, cache_dir, seeds)
    except CompileError as error:
        _send_reason(str(error))


def _send_reason(reason: str) -> None:
    """Send the reason to the parent process, independently of the encoding of stdout."""
    sys.stdout.buffer.write(reason.encode(errors="replace"))
    sys.stdout.flush()


_DIFFERS = "the compiling process got a different program; --compile on compiles in the training process"


def _unreachable(error: Exception) -> str:
    return (
        f"the compiling process cannot load this program ({first_line(error)}): put your classes in a module, or --compile on"
    )


class _Outline(NamedTuple):
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def pack(program: Program, example: Example, seeds: Seeds | None) -> bytes:
    """Pickle the program and its example, without the values of the tensors. Errors of pickle are not caught."""
    outline = pytree.tree_map_only(Tensor, lambda x: _Outline(tuple(x.shape), x.stride(), x.dtype), example)
    return pickle.dumps((program, outline, seeds))


def unpack(job: bytes) -> tuple[Program, Example, Seeds | None]:
    """(program, example, seeds) from the result of `pack`. The example's tensors are zeros of the original layout."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # pytree warns when one of its specs is unpickled
        program, outline, seeds = pickle.loads(job)
    return program, pytree.tree_map_only(_Outline, _zeros, outline, is_leaf=lambda x: isinstance(x, _Outline)), seeds


def _zeros(outline: _Outline) -> Tensor:
    """Zeros with the shape, stride and dtype of the outline."""
    last = sum((size - 1) * stride for size, stride in zip(outline.shape, outline.stride, strict=True))
    return torch.zeros(max(last + 1, 0), dtype=outline.dtype).as_strided(outline.shape, outline.stride)
