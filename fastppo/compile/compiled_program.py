"""A compiled program: its library loaded from the cache, and called like the function it was made from.

Imports nothing of the compiler: loading takes milliseconds.
"""

import contextlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastppo.compile import library_cache, native
from fastppo.compile.compile_errors import CompileError, LoadError, first_line
from fastppo.compile.key import cache_key, native_key
from fastppo.compile.program import (
    Example,
    Layout,
    Program,
    flat_tensors,
    is_shared,
    layout_of,
    num_ranks_of,
    num_workers_of,
    of_one_call,
)
from fastppo.compile.workers import Exchange, WorkerPool
from fastppo.core.compilable import traits_of
from fastppo.core.seed_axis import Seeds


class CompiledProgram:
    """A loaded library behind the signature of the program it was made from."""

    def __init__(
        self, library: Path, program: Program, layout: Layout, seeds: Seeds | None = None, exchange: Exchange | None = None
    ) -> None:
        """Load it. Raises OSError, RuntimeError or AttributeError (a function is missing) when it does not load.

        Args:
            layout: shapes, strides and dtypes that the library was compiled for.
            seeds: how it takes several seeds.
            exchange: between the processes of a program with `num_ranks` above 1.
        """
        self._layout = layout
        self._library = library
        self._num_threads = torch.get_num_threads()
        self._traits = traits_of(program.func)
        self._seeds = seeds
        num_workers = num_workers_of(program) if seeds is None else seeds.num_threads
        self._pool: WorkerPool | None = None
        self._exchange = exchange
        self._num_ranks = num_ranks_of(program)
        if is_shared(program) or num_workers > 1:
            self._pool = WorkerPool(library, num_workers, exchange if self._num_ranks > 1 else None)
        else:
            self._runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(library), 1)

    def __call__(self, *args: Any) -> Any:
        """What the program returns. Raises CompileError for tensors, or a number of threads, it was not compiled for."""
        tensors = flat_tensors(args)
        if self._seeds is not None:
            return self._traits.result(self._of_all_seeds(tensors, self._seeds))
        self._check(tensors)
        if self._pool is None:
            return self._traits.result(self._runner.run(tensors))
        results = self._pool.run([[*tensors, worker] for worker in self._pool.workers])
        return self._traits.join([self._traits.result(part) for part in results])

    def _of_all_seeds(self, tensors: list[Tensor], seeds: Seeds) -> list[Tensor]:
        """Call the library for C seeds at a time; the last call takes seeds of the one before too where S is no multiple."""
        number, per_call, _ = seeds
        starts = [min(start, number - per_call) for start in range(0, number, per_call)]
        calls = [[x[start] if per_call == 1 else x[start : start + per_call] for x in tensors] for start in starts]
        self._check(calls[0])
        results = [self._runner.run(call) for call in calls] if self._pool is None else self._pool.run(calls)
        if per_call == 1:
            return [torch.stack(parts) for parts in zip(*results, strict=True)]
        fresh = number - (len(starts) - 1) * per_call  # of the last call
        return [torch.cat((*parts[:-1], parts[-1][per_call - fresh :])) for parts in zip(*results, strict=True)]

    def bind(self, fixed: Example, rest: Example) -> Callable[..., Any]:
        """`program(*fixed, *given)` as a function of `given`, for a program of tensors that is called every step.

        Checked once, with `rest` as an example: what is given later must have the same shapes, strides and types. Between an
        environment's steps this takes 28 us where the checked call takes 42 (8 environments).
        """
        if self._seeds is not None and self._seeds.per_call < self._seeds.number:
            return lambda *given: self(*fixed, *given)
        bound = flat_tensors(fixed)
        self._check([*bound, *flat_tensors(rest)])
        run = self._runner.run
        if all(isinstance(part, Tensor) for part in rest):
            return lambda *given: self._traits.result(run([*bound, *given]))
        return lambda *given: self._traits.result(run([*bound, *flat_tensors(given)]))

    def _check(self, tensors: list[Tensor]) -> None:
        if self._num_ranks > 1 and self._exchange is None:
            raise CompileError(
                f"the compiled program is one of {self._num_ranks} processes, and has no exchange with the others"
            )
        # The library trusts its caller: wrong shapes, or more threads than its partial sums have room for, would be read and
        # written out of bounds.
        if len(tensors) != len(self._layout) or any(
            tensor.shape != shape or tensor.stride() != stride or tensor.dtype != dtype
            for tensor, (shape, stride, dtype) in zip(tensors, self._layout, strict=True)
        ):
            raise CompileError("the compiled program was made for tensors of other shapes, strides or types")
        if torch.get_num_threads() != self._num_threads:
            raise CompileError(f"the compiled program was made for torch.set_num_threads({self._num_threads})")


def load_program(
    program: Program,
    example: Example,
    cache_dir: Path,
    seeds: Seeds | None = None,
    exchange: Exchange | None = None,
) -> CompiledProgram | None:
    """The compiled program from the cache, or None. Imports nothing of the compiler. One that does not load is removed.

    With a setting `num_workers` above 1 a call of it is shared out among so many threads (compile/workers.py); with `num_ranks`
    above 1 among processes, of which each calls its own, and `exchange` is between them. With `seeds` all tensors of `example`,
    and of a call, have a leading axis of S seeds, and so has all that is returned.

    Raises CompileError when the directory is not to be trusted (see `check_cache_dir`).
    """
    with contextlib.suppress(LoadError):
        return load(program, example, cache_dir, cache_key(program, example, seeds), seeds, exchange)
    return None


def load(
    program: Program, example: Example, cache_dir: Path, key: str, seeds: Seeds | None, exchange: Exchange | None
) -> CompiledProgram | None:
    """The program under `key`, or None. Raises LoadError, once it has removed what does not load."""
    if sys.platform == "win32":
        raise CompileError("compiled programs are for Linux and macOS")
    library_cache.check_cache_dir(cache_dir)
    helpers, library = library_cache.find(cache_dir, native_key()), library_cache.find(cache_dir, key)
    if helpers is None or library is None:
        return None
    loading = helpers
    try:
        native.load(helpers)
        loading = library
        loaded = CompiledProgram(library, program, layout_of(flat_tensors(of_one_call(example, seeds))), seeds, exchange)
    except (OSError, RuntimeError, AttributeError) as error:
        library_cache.remove(loading)
        what = "the compiled helpers do" if loading is helpers else "the compiled program does"
        raise LoadError(f"{what} not load: {first_line(error)}") from error
    library_cache.touch(helpers)
    library_cache.touch(library)
    return loaded
