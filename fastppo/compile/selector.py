"""Choose the eager or the compiled form of `act` and `learn`, whichever ends the run sooner.

Compiled programs are cached between runs and load in milliseconds. Building them takes up to a minute on one core. With
`--compile auto`, a run starts with the programs in the cache and runs the others eagerly. After the first iterations it
estimates the time left. If that is long enough, another process builds the programs, and the run switches to them between two
iterations. Knows nothing of what the programs compute.
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

BUILD_SECONDS = 45.0  # for both programs on a busy core; measured 25 to 60 s (benchmarks/LOG.md)
# Programs are built in the background if the eager run would take at least this multiple of BUILD_SECONDS. `collect`, which
# includes the environments, is 15 times as fast when compiled; `act` and `learn` are 2 to 3 times (benchmarks/README.md).
WORTH_BUILDING = {"collect": 1.2, "act": 2.0}
TRIAL_ITERATIONS = 3  # eager iterations before the estimate, since the first one is slow


@dataclass(frozen=True)
class ProgramSpec:
    """One program of a run, in both forms."""

    eager: Callable[..., Any]
    program: "partial[Any]"  # the same function with the settings for compilation
    example: tuple[Any, ...]  # arguments, with a leading axis of seeds if there are several
    seeds: Seeds | None = None


class ProgramSelector:
    """The programs of one run. `learn` and `act` are the current ones. `update` may change them between iterations."""

    def __init__(
        self, mode: str, specs: Mapping[str, ProgramSpec], num_threads: int, note: Callable[[str], None], ranks: Ranks = ALONE
    ) -> None:
        """Load the programs in the cache. With mode "on", build the others now.

        Args:
            mode: off, auto or on, the value of --compile.
            specs: by name: "learn", and "act" or "collect". Parameters are the first argument, except of an eager act.
            num_threads: torch's threads for compiled programs, set when the first of them is used.
            note: receives lines on what was chosen and why.
            ranks: processes that share an update. All use compiled programs only if all have them in their caches. With "on",
                one process of each machine builds them. Several processes build nothing in the background.
        """
        self._ranks = ranks
        self.compile_seconds = 0.0
        self.name = "eager"
        self._specs, self._num_threads, self._note = specs, num_threads, note
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
            if specs["learn"].example[0].is_cuda:
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
        """core.ppo.learn with its settings, for one seed or all seeds."""
        return self._compiled.get("learn") or self._specs["learn"].eager

    def act(self, normalization: Normalization) -> Callable[..., Any]:
        """The program with the current parameters: `(obs, noise) -> action`, or `(running, noise, random) -> Collected`."""
        if "collect" in self._specs:
            spec = self._specs["collect"]
            return bound(partial(self._compiled.get("collect") or spec.eager, spec.example[0], normalization))
        compiled, spec = self._compiled.get("act"), self._specs["act"]
        if compiled is not None:
            params, _, *rest = spec.example
            return bound(compiled.bind((params, normalization), tuple(rest)))
        return bound(partial(spec.eager, normalization))

    def update(self, iterations: int, seconds_left: float) -> None:
        """Between iterations: decide whether to build, and switch to programs that are ready.

        iterations: number done by this process. seconds_left: time left at the present speed.
        """
        try:
            if not self._decided and iterations >= TRIAL_ITERATIONS:
                self._decided = True
                if seconds_left < WORTH_BUILDING["collect" if "collect" in self._specs else "act"] * BUILD_SECONDS:
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
                spec = self._specs[name]
                with _threads(self._num_threads):
                    build = BackgroundCompile(spec.program, spec.example, library_cache.cache_dir(), spec.seeds)
                    self._building = (name, build)
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
        """Stop the build in progress, if any."""
        if self._building is not None:
            self._building[1].stop()
            self._building = None

    def _load(self, build: bool) -> None:
        """Use the programs in the cache. Build the others, or put them on the list of programs to build."""
        for name, spec in self._specs.items():
            with _threads(self._num_threads):
                loaded = load_program(spec.program, spec.example, library_cache.cache_dir(), spec.seeds, self._ranks)
                if loaded is None and build:
                    self._note(f"compiling {name} (once: later runs load it from {library_cache.cache_dir()})")
                    loaded = compile_program(spec.program, spec.example, library_cache.cache_dir(), spec.seeds, self._ranks)
            if loaded is None:
                self._waiting.append(name)
            else:
                self._adopt(name, loaded)

    def _agree(self, failed: CompileError | None) -> CompileError | None:
        """Use compiled programs only if all processes have them. Returns the reason if they do not."""
        self._ranks.barrier()
        if self._waiting and failed is None:  # another process of this machine may have built them by now
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
        """Capture all programs as CUDA graphs. That takes one or two seconds, and nothing is cached on disk."""
        for name, spec in self._specs.items():
            program: Callable[..., Any] = spec.program
            if spec.seeds is not None:
                number, at_once, _ = spec.seeds
                program = over_seeds(spec.program) if at_once > 1 else one_by_one(spec.program, number)
            self._compiled[name] = GraphedProgram(program, spec.example)
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
