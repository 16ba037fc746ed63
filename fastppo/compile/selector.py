"""Choose the form of `act` and `learn` that ends the run soonest: fused, compiled or eager.

Fused programs are written by hand in C++ for networks that can be foreseen (fastppo/fused). They are built once per machine in
some seconds, for all shapes and settings. Inductor can compile all other programs: that takes up to a minute on one core, and a
program in the cache loads in milliseconds. With `--compile auto`, a run starts with what is there and does the rest eagerly. It
takes up fused programs once they are built. After the first iterations it estimates the time left. If that is long enough,
another process compiles the other programs, and the run switches to them between two iterations. Each form is compared with the
eager one when it is first used (compile/verification.py). Knows nothing of what the programs compute.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from fastppo.compile import library_cache, native
from fastppo.compile.background import BackgroundCompile
from fastppo.compile.compile_errors import CompileError
from fastppo.compile.compiled_program import CompiledProgram, load_program
from fastppo.compile.cuda_graph import GraphedProgram, has_loops
from fastppo.compile.inductor import compile_program
from fastppo.compile.verification import TOLERANCE, Deviation, Verified
from fastppo.core.contracts import LearnResult, Normalization
from fastppo.core.seed_axis import Seeds
from fastppo.ranks import ALONE, Ranks
from fastppo.system.cpus import available_cores
from fastppo.system.modes import bound
from fastppo.system.text import duration

BUILD_SECONDS = 45.0  # for both programs on a busy core; measured 25 to 60 s (benchmarks/LOG.md)
# Programs are built in the background if the eager run would take at least this multiple of BUILD_SECONDS. `collect`, which
# includes the environments, is 15 times as fast when compiled; `act` and `learn` are 2 to 3 times (benchmarks/README.md).
WORTH_BUILDING = {"collect": 1.2, "act": 2.0, "learn": 2.0}
COMPILED_GRAPH = "compiled-cuda-graph"
TIERS = ("fused", "compiled", COMPILED_GRAPH, "cuda-graph", "eager")
TRIAL_ITERATIONS = 3  # eager iterations before the estimate, since the first one is slow


class Kernels(Protocol):
    """The functions that fused programs call."""

    def ready(self, wait: bool = False) -> bool:
        """Whether they are loaded. wait: until they are. Raises CompileError if they cannot be."""
        ...


@dataclass(frozen=True)
class ProgramSpec:
    """One program of a run, in all its forms."""

    eager: Callable[..., Any]
    program: "partial[Any]"  # the same function with the settings for compilation
    example: tuple[Any, ...]  # arguments, with a leading axis of seeds if there are several
    deviation: Deviation  # of a fast form's result from that of the eager one
    seeds: Seeds | None = None
    fused: Callable[[], Any] | None = None  # makes the fused form, once the kernels are loaded
    shorten: Callable[[Sequence[Any]], Sequence[Any]] | None = None  # arguments of a comparison that the fused form can do
    mode: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext  # of torch, while it is captured for a GPU


class ProgramSelector:
    """The programs of one run. `learn` and `act` are the current ones. `update` may change them between iterations."""

    def __init__(
        self,
        mode: str,
        specs: Mapping[str, ProgramSpec],
        num_threads: int,
        note: Callable[[str], None],
        ranks: Ranks = ALONE,
        kernels: Kernels | None = None,
    ) -> None:
        """Take the programs that are there. With mode "on" or "inductor", build the others now.

        Args:
            mode: off, auto, on or inductor, the value of --compile.
            specs: by name: "learn", and "act" or "collect". Parameters are the first argument, except of an eager act.
            num_threads: torch's threads for compiled programs, set when the first of them is used.
            note: receives lines on what was chosen and why.
            ranks: processes that share an update. All use a fused or compiled program only if all have it. With "on", one
                process of each machine builds them. Several processes build nothing in the background.
            kernels: for the specs with a fused form; None: there is none.
        """
        self._ranks, self._kernels = ranks, kernels
        self.compile_seconds = 0.0
        self.deviations: dict[str, float] = {}  # of each program that has been compared with its eager form
        self._specs, self._num_threads, self._note = specs, num_threads, note
        self._forms: dict[str, Any] = {}  # by name: the form in use, where it is not the eager one
        self._tiers = dict.fromkeys(specs, "eager")
        self._rungs: dict[str, list[str]] = {}  # on a GPU, by name: forms that are taken in their order if those before fail
        fuses = kernels is not None and mode in ("auto", "on")
        self._to_fuse = [name for name, spec in specs.items() if fuses and spec.fused is not None]
        self._waiting: list[str] = []  # programs still to be compiled
        self._building: dict[str, BackgroundCompile] = {}
        self._started = time.perf_counter()
        self._decided = mode != "auto"
        if mode == "off":
            note("programs: eager (--compile off)")
            return
        if not os.environ.get("XDG_CACHE_HOME") and library_cache.home_cache() is None:
            note(f"no writable home directory: compiled programs are kept in {library_cache.cache_dir()}")
        self._take(build=mode in ("on", "inductor"))

    @property
    def name(self) -> str:
        """The forms in use: fused, compiled, compiled-cuda-graph, cuda-graph or eager, or several of them."""
        return " + ".join(sorted(set(self._tiers.values()), key=TIERS.index))

    @property
    def on_gpu(self) -> bool:
        """Whether programs run on a GPU: they are then captured."""
        params: torch.Tensor = self._specs["learn"].example[0]
        return params.is_cuda

    @property
    def tiers(self) -> dict[str, str]:
        """The form in use of each program."""
        return dict(self._tiers)

    @property
    def may_change(self) -> bool:
        """Whether `update` may still change to another form of a program."""
        return bool(self._waiting or self._building or self._to_fuse)

    @property
    def learn(self) -> Callable[..., LearnResult]:
        """core.ppo.learn with its settings, for one seed or all seeds."""
        eager = self._specs["learn"].eager
        form = self._forms.get("learn")
        return eager if form is None else self._verified("learn", form, eager)

    def act(self, normalization: Normalization) -> Callable[..., Any]:
        """The program with the current parameters: `(obs, noise) -> action`, or `(running, noise, random) -> Collected`."""
        name = "collect" if "collect" in self._specs else "act"
        spec, form = self._specs[name], self._forms.get(name)
        params, _, *rest = spec.example
        eager = partial(spec.eager, params, normalization) if name == "collect" else partial(spec.eager, normalization)
        if form is None:
            return bound(eager)
        binds = name == "act"  # it is called in every step
        fast = form.bind((params, normalization), tuple(rest)) if binds else partial(form, params, normalization)
        return bound(self._verified(name, fast, eager))

    def update(self, iterations: int, seconds_left: float) -> None:
        """Between iterations: take up programs that are ready, decide whether to compile others.

        iterations: number done by this process. seconds_left: time left at the present speed.
        """
        try:
            if self._to_fuse:
                self._fuse_now()
                return
            if not self._decided and iterations >= TRIAL_ITERATIONS:
                self._decide(seconds_left)
            while self._decided and self._waiting and len(self._building) < min(available_cores(), 2):
                name = self._waiting.pop(0)
                self._building[name] = self._start(name)
            for name, build in list(self._building.items()):
                with _threads(self._num_threads):
                    program = build.poll()
                if program is not None:
                    del self._building[name]
                    self._adopt(name, program, "compiled")
                    self.compile_seconds = time.perf_counter() - self._started
                    self._note(f"programs: {name} is compiled now, after {self.compile_seconds:.0f} s")
        except CompileError as reason:
            self.close()
            self._give_up(reason)

    def close(self) -> None:
        """Stop the builds in progress, if any."""
        for build in self._building.values():
            build.stop()
        self._building.clear()

    def _take(self, build: bool) -> None:
        """Take up what is there: fused programs, captured ones on a GPU, compiled ones in the cache. build: make the rest."""
        failed = unfused = None
        several = self._ranks.size > 1
        if self.on_gpu:
            self._to_fuse.clear()
        if self._to_fuse:
            unfused = self._fuse(wait=build or several)
        try:
            if self.on_gpu:
                self._capture(build)
            else:
                self._load(build=build and self._ranks.local_rank == 0)
        except CompileError as reason:
            failed = reason
        if several:
            failed = self._agree(failed)
        if unfused is not None and str(unfused) not in (str(failed), native.NO_COMPILER):  # those are said below
            self._note(f"programs: no fused ones: {unfused}")
        if failed is not None:
            self._give_up(failed)
            return
        self.compile_seconds = time.perf_counter() - self._started
        if self._waiting and not native.has_compiler():
            self._waiting.clear()
            self._decided = True
            self._note(f"programs: {self.name}; {native.NO_COMPILER}")
        elif self._to_fuse:
            self._note("programs: eager for some seconds, while the C++ compiler builds the fused ones, once for this machine")
        elif self._waiting:
            self._note(f"programs: {self.name}; the cache has no compiled {' and '.join(self._waiting)} yet")
        else:
            self._decided = True
            self._note(f"programs: {self.name}, ready after {self.compile_seconds:.2f} s")

    def _fuse(self, wait: bool) -> CompileError | None:
        """Take up the fused programs if their kernels are ready. Returns the reason if these cannot be had."""
        assert self._kernels is not None
        try:
            if not self._kernels.ready(wait):
                return None
        except CompileError as reason:
            self._to_fuse.clear()
            return reason
        for name in self._to_fuse:
            fused = self._specs[name].fused
            assert fused is not None
            self._adopt(name, fused(), "fused")
        self._to_fuse.clear()
        return None

    def _fuse_now(self) -> None:
        """Between iterations: the same. If the kernels cannot be had, Inductor may have compiled the programs, or may do so."""
        reason = self._fuse(wait=False)
        if reason is not None:
            self._note(f"programs: no fused ones: {reason}")
            self._load(build=False)
        elif not self._to_fuse:
            self.compile_seconds = time.perf_counter() - self._started
            self._note(f"programs: {self.name} now, after {self.compile_seconds:.0f} s")

    def _decide(self, seconds_left: float) -> None:
        self._decided = True
        if not self._waiting:
            return
        if seconds_left < min(WORTH_BUILDING[name] for name in self._waiting) * BUILD_SECONDS:
            self._note(
                f"programs: {self.name} until the end, {seconds_left:.0f} s left; compiling would take {BUILD_SECONDS:.0f} s "
                "(--compile on compiles anyway; later runs load the result)"
            )
            self._waiting.clear()
        else:
            names = " and ".join(self._waiting)
            self._note(f"programs: compiling {names} in the background, {duration(seconds_left)} left")
            self._started = time.perf_counter()

    def _load(self, build: bool) -> None:
        """Use the programs in the cache. Build the others, or put them on the list of programs to build."""
        self._waiting.clear()
        for name, spec in self._specs.items():
            if name in self._forms or name in self._to_fuse:
                continue
            with _threads(self._num_threads):
                loaded = load_program(spec.program, spec.example, library_cache.cache_dir(), spec.seeds, self._ranks)
            if loaded is not None:
                self._adopt(name, loaded, "compiled")
            else:
                self._waiting.append(name)
        if build and self._waiting:
            self._build()

    def _build(self) -> None:
        """Compile the programs that are waiting: one here, and the other in a process at the same time if there is a core."""
        names = " and ".join(self._waiting)
        self._note(f"compiling {names} (once: later runs load the result from {library_cache.cache_dir()})")
        try:
            if self._ranks.size == 1 and native.has_compiler() and available_cores() > 1:
                for name in self._waiting[1:]:
                    with contextlib.suppress(CompileError):  # a class of the script itself: then it is compiled here
                        self._building[name] = self._start(name)
            while self._waiting:
                self._adopt(self._waiting[0], self._built(self._waiting[0]), "compiled")
                del self._waiting[0]
        finally:
            self.close()

    def _built(self, name: str) -> CompiledProgram:
        """The program, when it is compiled. Raises CompileError."""
        spec = self._specs[name]
        with _threads(self._num_threads):
            if name in self._building:
                with contextlib.suppress(CompileError):
                    program = self._building[name].wait()
                    del self._building[name]
                    return program
            return compile_program(spec.program, spec.example, library_cache.cache_dir(), spec.seeds, self._ranks)

    def _start(self, name: str) -> BackgroundCompile:
        """Compile the program in another process. Raises CompileError."""
        spec = self._specs[name]
        with _threads(self._num_threads):
            return BackgroundCompile(spec.program, spec.example, library_cache.cache_dir(), spec.seeds)

    def _agree(self, failed: CompileError | None) -> CompileError | None:
        """Use the fused or compiled form of a program only if all processes have it. Returns the reason if one has not."""
        self._ranks.barrier()
        if self._waiting and failed is None:  # another process of this machine may have built them by now
            try:
                self._load(build=False)
            except CompileError as reason:
                failed = reason
        lacks, fails = self._ranks.highest(len(self._waiting), failed is not None)
        numbers = [TIERS.index(tier) for tier in self._tiers.values()]
        highest, lowest = self._ranks.highest(*numbers), self._ranks.highest(*(-number for number in numbers))
        differing = [name for name, high, low in zip(self._specs, highest, lowest, strict=True) if high != -low]
        for name in differing:
            self._forms.pop(name, None)
            self._tiers[name] = "eager"
        if fails:
            return failed or CompileError("it failed in another rank")
        cure = "--compile on builds them first" if native.has_compiler() else native.NO_COMPILER
        if lacks or differing:
            return CompileError(f"not all ranks have the compiled programs in their caches ({cure})")
        return None

    def _capture(self, compiles: bool) -> None:
        """On a GPU: capture all programs as CUDA graphs. That takes one or two seconds, and nothing is cached on disk.

        compiles: compile the steps of their loops first, which takes longer. Exchanges of several processes are not compiled.
        """
        for name, spec in self._specs.items():
            compiled = compiles and has_loops(spec.program) and self._ranks.size == 1
            self._rungs[name] = [COMPILED_GRAPH, "cuda-graph"] if compiled else ["cuda-graph"]
            self._take_rung(name)

    def _take_rung(self, name: str) -> None:
        """Take up the next form of a program that can be captured, in all processes; the eager one if there is none."""
        spec = self._specs[name]
        self._forms.pop(name, None)
        self._tiers[name] = "eager"
        while self._rungs[name]:
            tier = self._rungs[name].pop(0)
            form, reason = None, CompileError("it failed in another rank")
            if tier == COMPILED_GRAPH:
                self._note(f"programs: compiling the steps of {name} for the GPU")
            try:
                with spec.mode():
                    form = GraphedProgram(spec.program, spec.example, spec.seeds, tier == COMPILED_GRAPH)
            except CompileError as error:
                reason = error
            (fails,) = self._ranks.highest(form is None)
            if not fails:
                self._adopt(name, form, tier)
                return
            self._note(f"programs: {name} is no {tier}: {reason}")

    def _adopt(self, name: str, form: Any, tier: str) -> None:
        if tier == "compiled":
            torch.set_num_threads(self._num_threads)
        self._forms[name], self._tiers[name] = form, tier

    def _verified(self, name: str, fast: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
        """The fast form of a program, compared with the eager form once in a run."""
        if name in self.deviations:
            return fast
        spec = self._specs[name]
        shorten = spec.shorten if self._tiers[name] == "fused" else None
        return Verified(fast, eager, partial(self._worst, spec.deviation), partial(self._judge, name), shorten)

    def _worst(self, deviation: Deviation, *compared: Any) -> float:
        """The largest deviation; on GPUs that of all processes, so that all of them take the same next form together."""
        own = deviation(*compared)
        if self._ranks.size == 1 or not self._rungs:
            return own
        (worst,) = self._ranks.highest(math.inf if math.isnan(own) else own)
        return worst

    def _judge(self, name: str, deviation: float) -> None:
        tier = self._tiers[name]
        if deviation <= TOLERANCE:
            self.deviations[name] = deviation
            return
        differs = f"the {tier} one differs from it by {deviation:.2g}; please report this"  # nan too
        if self._rungs.get(name):
            self._take_rung(name)
        else:
            self.deviations[name] = deviation
            self._forms.pop(name, None)
            self._tiers[name] = "eager"
        stays = "stays eager" if self._tiers[name] == "eager" else f"is {self._tiers[name]} and compared with eager again"
        self._note(f"programs: {name} {stays}: {differs}")

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
