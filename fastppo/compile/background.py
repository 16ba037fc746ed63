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
    """`compile_program` in a process of its own while this one trains eagerly; a thread would fight it for the interpreter."""

    def __init__(
        self,
        program: Program,
        example: Example,
        cache_dir: Path,
        seeds: Seeds | None = None,
    ) -> None:
        """Start it.

        Raises CompileError when the directory is not to be trusted, the program cannot be told to a process, or it is known
        that another process cannot build it.
        """
        library_cache.check_cache_dir(cache_dir)
        self._program, self._example, self._cache_dir, self._seeds = program, example, cache_dir, seeds
        self._key = cache_key(program, example, seeds)
        with contextlib.suppress(OSError, UnicodeDecodeError):
            raise CompileError(library_cache.refusal(cache_dir, self._key).read_text(encoding="utf-8"))
        try:
            job = pack(program, example, seeds)
            same = cache_key(*unpack(job)) == self._key
        except Exception as error:  # whatever the pickling of somebody's class may raise
            raise CompileError(_unreachable(error)) from error
        if not same:
            raise CompileError(_DIFFERS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import serve; serve()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},  # modules are found where this process finds them
                **own_group(),  # Ctrl-C is for the training process, which stops this one and its C++ compiler together
            )
        except OSError as error:
            raise CompileError(f"no process could be started for it: {error.strerror}") from error
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a child that died is reported by poll
            self._process.stdin.write(pickle.dumps((job, self._key, cache_dir, torch.get_num_threads())))
            self._process.stdin.close()

    def poll(self) -> CompiledProgram | None:
        """The program once it is there, None until then. Raises CompileError when the compiler gave up."""
        if self._process.poll() is None:
            return None
        assert self._process.stdout is not None
        with self._process.stdout as stdout:
            reason = "" if stdout.closed else stdout.read().decode(errors="replace").strip()
        loaded = load(self._program, self._example, self._cache_dir, self._key, self._seeds, None)
        if loaded is None:
            raise CompileError(reason or f"the compiler's process ended with code {self._process.returncode}")
        return loaded

    def stop(self) -> None:
        """Give up. Safe to call at any time, twice too."""
        if self._process.poll() is None:
            end_group(self._process)
        self._process.wait()


def serve() -> None:
    """What the other process runs: a job on stdin, the reason of a failure on stdout."""
    lower_priority()  # training comes first
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through the exits of `with`, so that no build directory is left
    job, key, cache_dir, num_threads = pickle.loads(sys.stdin.buffer.read())
    torch.set_num_threads(num_threads)
    try:
        program, example, seeds = unpack(job)
    except Exception as error:  # a class of a script, or a module that raises when it is imported again
        _tell(_unreachable(error))
        return
    try:
        if cache_key(program, example, seeds) != key:  # it would be kept where nobody looks for it
            library_cache.refuse(cache_dir, key, _DIFFERS)
            _tell(_DIFFERS)
        else:
            compile_program(program, example, cache_dir, seeds)
    except CompileError as error:
        _tell(str(error))


def _tell(reason: str) -> None:
    """To the other process, whatever the encoding of this one's stdout is."""
    sys.stdout.buffer.write(reason.encode(errors="replace"))
    sys.stdout.flush()


_DIFFERS = "the compiling process got a different program; --compile on compiles in the training process"


def _unreachable(error: Exception) -> str:
    return (
        f"the compiling process cannot load this program ({first_line(error)}): put your classes in a module, or --compile on"
    )


class _Outline(NamedTuple):
    """A tensor but for its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def pack(program: Program, example: Example, seeds: Seeds | None) -> bytes:
    """What another process needs to compile the program: all but the values of `example`. Raises what pickling it raises."""
    outline = pytree.tree_map_only(Tensor, lambda x: _Outline(tuple(x.shape), x.stride(), x.dtype), example)
    return pickle.dumps((program, outline, seeds))


def unpack(job: bytes) -> tuple[Program, Example, Seeds | None]:
    """(program, example, seeds) from `pack`; zeros in the example, laid out as its tensors were."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of pytree's own, when one of its descriptions is unpickled
        program, outline, seeds = pickle.loads(job)
    return program, pytree.tree_map_only(_Outline, _zeros, outline, is_leaf=lambda x: isinstance(x, _Outline)), seeds


def _zeros(outline: _Outline) -> Tensor:
    """A tensor like the one that `outline` is of."""
    last = sum((size - 1) * stride for size, stride in zip(outline.shape, outline.stride, strict=True))
    return torch.zeros(max(last + 1, 0), dtype=outline.dtype).as_strided(outline.shape, outline.stride)
