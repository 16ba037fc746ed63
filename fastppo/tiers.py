"""Which form of `act` and `learn` a run uses: eager, or compiled once that ends the whole run sooner.

Compiled programs lie in a cache between runs and are loaded in milliseconds; building them takes the better part of a minute
of one core. So `--compile auto` starts with what the cache has, and otherwise eagerly; after the first iterations it knows how
long the run would last, and has the programs built by another process if they can be ready long before the end. The run
changes over at an iteration's boundary. Knows nothing of what the programs compute.
"""

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fastppo.core import programs
from fastppo.core.compilation import (
    BackgroundCompile,
    CompiledProgram,
    CompileError,
    GraphedProgram,
    compile_program,
    load_program,
)
from fastppo.core.programs import Learned, Normalization, Policy

BUILD_SECONDS = 45.0  # both programs on a busy core; measured 25 to 60 (benchmarks/LOG.md)
TRIAL_ITERATIONS = 3  # eager iterations before the estimate: the first one is slow

Act = Callable[[Tensor, Tensor], Tensor]
Learn = Callable[..., Learned]


class Tiers:
    """The programs of one run. `act` and `learn` are what to call now; `update` may change them between iterations."""

    def __init__(
        self,
        mode: str,
        policy: Policy,
        params: Tensor,
        learn: "partial[Learned]",
        learn_in_parts: "partial[Learned]",
        learn_example: tuple[Any, ...],
        act_example: tuple[Any, ...],
        note: Callable[[str], None],
    ) -> None:
        """Load what the cache has; with mode "on", build the rest now.

        Args:
            mode: off, auto or on, as --compile says.
            learn: the eager program; learn_in_parts: the same with the rows_per_pass that suits compiled programs.
            learn_example, act_example: arguments as `learn` and `act_from_params` will get them.
            note: where a line goes that says what was chosen and why.
        """
        self.learn: Learn = learn
        self._eager_learn = learn
        self.compile_seconds = 0.0
        self._params, self._policy, self._note = params, policy, note
        self._weights = policy.weights(params)
        self._compiled_act: CompiledProgram | GraphedProgram | None = None
        self._jobs: dict[str, tuple[partial[Any], tuple[Any, ...]]] = {
            "learn": (learn_in_parts, learn_example),
            "act": (partial(programs.act_from_params, policy=policy), act_example),
        }
        self._waiting: list[str] = []  # programs still to be built
        self._building: tuple[str, BackgroundCompile] | None = None
        self._started = 0.0
        self._decided = mode != "auto"
        self.name = "eager"
        if mode == "off":
            note("programs: eager, as --compile off asks")
            return
        started = time.perf_counter()
        if params.is_cuda:
            self._capture()
            self.compile_seconds = time.perf_counter() - started
            return
        try:
            for name, (program, example) in self._jobs.items():
                loaded = load_program(program, example, cache_dir())
                if loaded is None and mode == "on":
                    note(f"compiling {name} (once: later runs load it from {cache_dir()})")
                    loaded = compile_program(program, example, cache_dir())
                if loaded is None:
                    self._waiting.append(name)
                else:
                    self._adopt(name, loaded)
        except CompileError as reason:
            self._give_up(reason)
            return
        self.compile_seconds = time.perf_counter() - started
        if self._waiting:
            note("programs: eager at first; compiled ones are not in the cache")
        else:
            self._decided = True
            note(f"programs: compiled, ready after {self.compile_seconds:.2f} s")

    def act(self, normalization: Normalization) -> Act:
        """`(obs, noise) -> action` under the parameters as they stand."""
        if self._compiled_act is not None:
            return self._compiled_act.bind((self._params, normalization), self._jobs["act"][1][2:])
        return partial(programs.act, self._policy, self._weights, normalization)

    def update(self, iterations: int, seconds_left: float) -> None:
        """Between iterations: decide whether to build, and take up what has been built.

        iterations: done by this process; seconds_left: at the present speed.
        """
        try:
            if not self._decided and iterations >= TRIAL_ITERATIONS:
                self._decided = True
                if seconds_left < 2 * BUILD_SECONDS:
                    self._note(
                        f"programs: eager to the end, {seconds_left:.0f} s away; compiling takes {BUILD_SECONDS:.0f} s "
                        "(--compile on does it all the same, and later runs load the result)"
                    )
                    self._waiting.clear()
                else:
                    self._note(f"programs: {seconds_left:.0f} s to go, so they are compiled in the background")
                    self._started = time.perf_counter()
            if self._decided and self._building is None and self._waiting:
                name = self._waiting.pop(0)
                self._building = (name, BackgroundCompile(*self._jobs[name], cache_dir()))
            elif self._building is not None:
                name, job = self._building
                program = job.poll()
                if program is not None:
                    self._building = None
                    self._adopt(name, program)
                    self.compile_seconds = time.perf_counter() - self._started
                    self._note(f"programs: {name} compiled from here on, {self.compile_seconds:.0f} s after its start")
        except CompileError as reason:
            self._building = None
            self._give_up(reason)

    def close(self) -> None:
        """Stop a build under way."""
        if self._building is not None:
            self._building[1].stop()
            self._building = None

    def _capture(self) -> None:
        """On a GPU both programs become CUDA graphs at once: that takes a second or two, and nothing is kept on disk."""
        self._decided = True
        try:
            program, example = self._jobs["act"]
            act = GraphedProgram(program, example)
            self.learn = GraphedProgram(self._eager_learn, self._jobs["learn"][1])
            self._compiled_act = act
        except CompileError as reason:
            self._give_up(reason)
            return
        self.name = "cuda-graph"
        self._note("programs: captured as CUDA graphs")

    def _adopt(self, name: str, program: CompiledProgram) -> None:
        if name == "learn":
            self.learn = program
        else:
            self._compiled_act = program
        self.name = "compiled"

    def _give_up(self, reason: CompileError) -> None:
        self._waiting.clear()
        self._decided = True
        self._note(f"programs: {self.name}, since compiling failed: {reason}")


def cache_dir() -> Path:
    """Where compiled programs are kept: $XDG_CACHE_HOME/fastppo, or ~/.cache/fastppo."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastppo"
