"""Which form of `act` and `learn` a run uses: eager, or compiled once that ends the whole run sooner.

Compiled programs lie in a cache between runs and are loaded in milliseconds; building them takes the better part of a minute
of one core. So `--compile auto` starts with what the cache has, and otherwise eagerly; after the first iterations it knows how
long the run would last, and has the programs built by another process if they can be ready long before the end. The run
changes over at an iteration's boundary. Knows nothing of what the programs compute.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fastppo.compile import library_cache, native
from fastppo.compile.background import BackgroundCompile
from fastppo.compile.compile_errors import CompileError
from fastppo.compile.compiled_program import CompiledProgram, load_program
from fastppo.compile.cuda_graph import GraphedProgram
from fastppo.compile.inductor import compile_program
from fastppo.core.contracts import LearnResult, Normalization
from fastppo.core.seed_axis import Seeds, one_by_one, over_seeds
from fastppo.ranks import ALONE, Ranks
from fastppo.system.modes import bound
from fastppo.system.text import duration

BUILD_SECONDS = 45.0  # both programs on a busy core; measured 25 to 60 (benchmarks/LOG.md)
# Compiled programs are built in the background if the eager run would take so many times as long. Where the environments are
# in them too they are 15 times as fast, else 2 to 3 times (benchmarks/README.md).
WORTH_BUILDING = {"collect": 1.2, "act": 2.0}
TRIAL_ITERATIONS = 3  # eager iterations before the estimate: the first one is slow


@dataclass(frozen=True)
class ProgramSpec:
    """One program of a run, in both forms."""

    eager: Callable[..., Any]
    program: "partial[Any]"  # for the compiler: the same function with the settings that suit a compiled one
    example: tuple[Any, ...]  # arguments as it will get them, with a leading axis where there are several seeds
    seeds: Seeds | None = None


class ProgramSelector:
    """The programs of one run. `learn` and `act` are what to call now; `update` may change them between iterations."""

    def __init__(
        self, mode: str, jobs: Mapping[str, ProgramSpec], num_threads: int, note: Callable[[str], None], ranks: Ranks = ALONE
    ) -> None:
        """Load what the cache has; with mode "on", build the rest now.

        Args:
            mode: off, auto or on, as --compile says.
            jobs: by name: "learn", and "act" or "collect"; all but an eager act take the parameters first.
            num_threads: torch's threads for compiled programs, set once the first of them is in use.
            note: where a line goes that says what was chosen and why.
            ranks: processes that share an update, which all have to take the same form of it: what all find in the cache, or
                with "on" have built, one of them for each machine. Nothing is built in the background for several.
        """
        self._ranks = ranks
        self.compile_seconds = 0.0
        self.name = "eager"
        self._jobs, self._num_threads, self._note = jobs, num_threads, note
        self._compiled: dict[str, CompiledProgram | GraphedProgram] = {}
        self._waiting: list[str] = []  # programs still to be built
        self._building: tuple[str, BackgroundCompile] | None = None
        self._started = 0.0
        self._decided = mode != "auto"
        if mode == "off":
            note("programs: eager (--compile off)")
            return
        if not os.environ.get("XDG_CACHE_HOME") and library_cache.home_cache() is None:
            note(f"no writable home directory: compiled programs are kept in {library_cache.cache_dir()}")
        started = time.perf_counter()
        failed: CompileError | None = None
        try:
            if jobs["learn"].example[0].is_cuda:
                self._capture()
            else:
                self._load(build=mode == "on" and ranks.local_rank == 0)
        except CompileError as reason:
            failed = reason
        if ranks.size > 1:
            failed = self._agree(failed)
        if failed is not None:
            self._give_up(failed)
            return
        self.compile_seconds = time.perf_counter() - started
        if self._waiting and not native.has_compiler():
            self._waiting.clear()
            self._decided = True
            note(f"programs: {self.name}; {native.NO_COMPILER}")
        elif self._waiting:
            note("programs: eager; the cache has no compiled ones yet")
        else:
            self._decided = True
            note(f"programs: {self.name}, ready after {self.compile_seconds:.2f} s")

    @property
    def may_change(self) -> bool:
        """Whether `update` may still change to another form of a program."""
        return bool(self._waiting or self._building)

    @property
    def learn(self) -> Callable[..., LearnResult]:
        """core.ppo.learn with its settings, or that over seeds."""
        return self._compiled.get("learn") or self._jobs["learn"].eager

    def act(self, normalization: Normalization) -> Callable[..., Any]:
        """Under the parameters as they stand: `(obs, noise) -> action`, or `(running, noise, random) -> Collected`."""
        if "collect" in self._jobs:
            job = self._jobs["collect"]
            return bound(partial(self._compiled.get("collect") or job.eager, job.example[0], normalization))
        compiled, job = self._compiled.get("act"), self._jobs["act"]
        if compiled is not None:
            params, _, *rest = job.example
            return bound(compiled.bind((params, normalization), tuple(rest)))
        return bound(partial(job.eager, normalization))

    def update(self, iterations: int, seconds_left: float) -> None:
        """Between iterations: decide whether to build, and take up what has been built.

        iterations: done by this process; seconds_left: at the present speed.
        """
        try:
            if not self._decided and iterations >= TRIAL_ITERATIONS:
                self._decided = True
                if seconds_left < WORTH_BUILDING["collect" if "collect" in self._jobs else "act"] * BUILD_SECONDS:
                    self._note(
                        f"programs: eager until the end, {seconds_left:.0f} s left; compiling would take {BUILD_SECONDS:.0f} s "
                        "(--compile on compiles anyway; later runs load the result)"
                    )
                    self._waiting.clear()
                else:
                    self._note(f"programs: compiling in the background, {duration(seconds_left)} left")
                    self._started = time.perf_counter()
            if self._decided and self._building is None and self._waiting:
                name = self._waiting.pop(0)
                job = self._jobs[name]
                with _threads(self._num_threads):
                    self._building = (name, BackgroundCompile(job.program, job.example, library_cache.cache_dir(), job.seeds))
            elif self._building is not None:
                name, build = self._building
                with _threads(self._num_threads):
                    program = build.poll()
                if program is not None:
                    self._building = None
                    self._adopt(name, program)
                    self.compile_seconds = time.perf_counter() - self._started
                    self._note(f"programs: {name} is compiled now, after {self.compile_seconds:.0f} s")
        except CompileError as reason:
            self._building = None
            self._give_up(reason)

    def close(self) -> None:
        """Stop a build under way."""
        if self._building is not None:
            self._building[1].stop()
            self._building = None

    def _load(self, build: bool) -> None:
        """Take up what the cache has; build or put on the list what it has not."""
        for name, job in self._jobs.items():
            with _threads(self._num_threads):
                loaded = load_program(job.program, job.example, library_cache.cache_dir(), job.seeds, self._ranks)
                if loaded is None and build:
                    self._note(f"compiling {name} (once: later runs load it from {library_cache.cache_dir()})")
                    loaded = compile_program(job.program, job.example, library_cache.cache_dir(), job.seeds, self._ranks)
            if loaded is None:
                self._waiting.append(name)
            else:
                self._adopt(name, loaded)

    def _agree(self, failed: CompileError | None) -> CompileError | None:
        """With the other processes: what they cannot all have, none has."""
        self._ranks.barrier()
        if self._waiting and failed is None:  # another process of this machine may have built it by now
            self._waiting.clear()
            try:
                self._load(build=False)
            except CompileError as reason:
                failed = reason
        lacks, fails = self._ranks.highest(len(self._waiting), failed is not None)
        if lacks or fails:
            self._compiled.clear()
            self.name = "eager"
        if fails:
            return failed or CompileError("it failed in another rank")
        cure = "--compile on builds them first" if native.has_compiler() else native.NO_COMPILER
        return CompileError(f"not all ranks have the compiled programs in their caches ({cure})") if lacks else None

    def _capture(self) -> None:
        """On a GPU all programs become CUDA graphs at once: that takes a second or two, and nothing is kept on disk."""
        for name, job in self._jobs.items():
            program: Callable[..., Any] = job.program
            if job.seeds is not None:
                number, at_once, _ = job.seeds
                program = over_seeds(job.program) if at_once > 1 else one_by_one(job.program, number)
            self._compiled[name] = GraphedProgram(program, job.example)
        self.name = "cuda-graph"

    def _adopt(self, name: str, program: CompiledProgram) -> None:
        torch.set_num_threads(self._num_threads)
        self._compiled[name] = program
        self.name = "compiled"

    def _give_up(self, reason: CompileError) -> None:
        self._waiting.clear()
        self._decided = True
        self._note(f"programs: {self.name}, since compiling failed: {reason}")


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
