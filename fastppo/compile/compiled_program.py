"""Load a compiled program from the cache and call it with the signature of the original function.

Does not import the compiler, so loading takes milliseconds.
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
    """A loaded library with the signature of its program."""

    def __init__(
        self, library: Path, program: Program, layout: Layout, seeds: Seeds | None = None, exchange: Exchange | None = None
    ) -> None:
        """Load the library. Raises OSError, RuntimeError or AttributeError (missing function) if that fails.

        Args:
            layout: shapes, strides and dtypes of the arguments.
            seeds: how many seeds the program has, and how many the library computes per call.
            exchange: all-reduce over processes, for a program with `num_ranks` above 1.
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
        """Run the program. Raises CompileError if tensor layouts or the number of threads differ from those at compilation."""
        tensors = flat_tensors(args)
        if self._seeds is not None:
            return self._traits.result(self._of_all_seeds(tensors, self._seeds))
        self._check(tensors)
        if self._pool is None:
            return self._traits.result(self._runner.run(tensors))
        results = self._pool.run([[*tensors, worker] for worker in self._pool.workers])
        return self._traits.join([self._traits.result(part) for part in results])

    def _of_all_seeds(self, tensors: list[Tensor], seeds: Seeds) -> list[Tensor]:
        """Call the library for C of S seeds at a time. If C does not divide S, the last call repeats some seeds."""
        number, per_call, _ = seeds
        starts = [min(start, number - per_call) for start in range(0, number, per_call)]
        calls = [[x[start] if per_call == 1 else x[start : start + per_call] for x in tensors] for start in starts]
        self._check(calls[0])
        results = [self._runner.run(call) for call in calls] if self._pool is None else self._pool.run(calls)
        if per_call == 1:
            return [torch.stack(parts) for parts in zip(*results, strict=True)]
        fresh = number - (len(starts) - 1) * per_call  # new seeds in the last call
        return [torch.cat((*parts[:-1], parts[-1][per_call - fresh :])) for parts in zip(*results, strict=True)]

    def bind(self, fixed: Example, rest: Example) -> Callable[..., Any]:
        """Return `program(*fixed, *given)` as a function of `given`, for a program that runs in every environment step.

        Arguments are checked once, with `rest` as the example. Later arguments must have the same shapes, strides and dtypes.
        A call takes 28 us instead of the 42 us of a checked call (8 environments).
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
        # The library checks nothing. Wrong shapes, or more threads than it has partial sums for, would access memory out of
        # bounds.
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
    """The compiled program from the cache, or None. Does not import the compiler. Removes a library that does not load.

    With `num_workers` above 1, that many threads share each call (compile/workers.py). With `num_ranks` above 1, each process
    calls its own copy, and they sum their results through `exchange`. With `seeds`, all arguments and results have a leading
    axis of S seeds.

    Raises CompileError if the directory is unsafe (see `check_cache_dir`).
    """
    with contextlib.suppress(LoadError):
        return load(program, example, cache_dir, cache_key(program, example, seeds), seeds, exchange)
    return None


def load(
    program: Program, example: Example, cache_dir: Path, key: str, seeds: Seeds | None, exchange: Exchange | None
) -> CompiledProgram | None:
    """The program under `key`, or None. Removes a library that does not load and raises LoadError."""
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
