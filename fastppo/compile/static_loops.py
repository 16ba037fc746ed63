"""Loops over buffers of fixed addresses, so that one step of each can be recorded once and replayed for all steps.

Knows nothing of what records: `Recording` is the contract, compile/cuda_graph.py has CUDA's.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastppo.compile.compile_errors import CompileError
from fastppo.compile.seed_loops import below_seeds, on_whole_tensors

Body = Callable[[Any, tuple[Tensor, ...]], tuple[Any, tuple[Tensor, ...]]]
FlatStep = Callable[..., list[Tensor]]  # (*carry, *x) -> (*carry, *ys)
CompileStep = Callable[[torch.fx.GraphModule, list[Tensor]], FlatStep]


class Recording(Protocol):
    """Operations recorded between `begin` and `end`. The memory of what they make is not that of another recording."""

    def begin(self) -> None: ...
    def end(self) -> None: ...
    def replay(self) -> None: ...


@dataclass
class Repeated:
    """Recordings, and loops of such, in their order; replayed `times` times."""

    times: int
    parts: "list[Recording | Repeated]" = field(default_factory=list)

    def replay(self) -> None:
        """All of them."""
        for _ in range(self.times):
            for part in self.parts:
                part.replay()


class Loop:
    """One loop: the buffers that its steps read and write."""

    def __init__(self, num_steps: int, carry: list[Tensor]) -> None:
        """carry: of the loop's start, for shapes and dtypes."""
        self.num_steps = num_steps
        self.carry = [x.clone() for x in carry]
        self.results: list[Tensor] | None = None  # (L, ...), once the first step has said of which shapes
        self.position = torch.zeros(1, dtype=torch.int64, device=carry[0].device)
        self.has_loops = False
        self.compiled: FlatStep | None = None
        self.code = ""  # of the compiled step

    def start(self, carry: list[Tensor]) -> None:
        """Put the loop at its first step."""
        for buffer, x in zip(self.carry, carry, strict=True):
            buffer.copy_(x)
        self.position.zero_()

    def step(self, body: FlatStep, xs: tuple[Tensor, ...]) -> None:
        """One step in place. The position is on the device, so that the next replay is the next step."""
        returned = body(*self.carry, *(tensor.index_select(0, self.position).squeeze(0) for tensor in xs))
        carry, ys = returned[: len(self.carry)], returned[len(self.carry) :]
        if self.results is None:
            self.results = [y.new_zeros(self.num_steps, *y.shape) for y in ys]
        # a new carry may hold an old one under another name: all are read before any is written
        after = [new.clone() if any(_is_alias(new, old) for old in self.carry) else new for new in carry]
        for result, y in zip(self.results, ys, strict=True):
            result.index_copy_(0, self.position, y.unsqueeze(0))
        for buffer, new in zip(self.carry, after, strict=True):
            buffer.copy_(new)
        self.position.add_(1)


class StaticLoops:
    """A program in recordings: cut before and after each loop, with one step of the loop between."""

    def __init__(self, recording: Callable[[], Recording], compile_step: CompileStep | None = None) -> None:
        """recording: makes an empty one. compile_step: compiles the step of each loop that has none in it; None: none is."""
        self._recording, self._compile_step = recording, compile_step
        self._loops: list[Loop] = []  # in the order in which the program comes to them
        self._next = 0
        self._plan: list[Repeated] = []  # while it is recorded: the loops that are open, the outermost first
        self._open: Recording | None = None
        self._whole = Repeated(1)

    def warm_up(self, program: Callable[[], Any]) -> Any:
        """Run the program with one step of each loop. The first time it makes the buffers."""
        self._next = 0
        return program()

    def capture(self, program: Callable[[], Any]) -> Any:
        """Record the program. The tensors that it returns hold its results after each `replay`."""
        self._next, self._whole = 0, Repeated(1)
        self._plan = [self._whole]
        self._begin()
        try:
            return program()
        finally:
            self._end()
            self._plan = []

    def replay(self) -> None:
        """Run the recorded program, every step of its loops."""
        self._whole.replay()

    def scan(self, body: Body, carry: Any, xs: tuple[Tensor, ...]) -> tuple[Any, tuple[Tensor, ...]]:
        """`core.scan.scan`, of which one step is run or recorded."""
        if xs[0].shape[0] == 1:
            carry, ys = body(carry, tuple(x[0] for x in xs))
            return carry, tuple(y.unsqueeze(0) for y in ys)
        return on_whole_tensors(self._scan, body, carry, xs)

    def _scan(self, body: Body, carry: Any, xs: tuple[Tensor, ...]) -> tuple[Any, tuple[Tensor, ...]]:
        leaves, spec = pytree.tree_flatten(carry)
        if self._next == len(self._loops):
            self._loops.append(Loop(xs[0].shape[0], leaves))
        loop = self._loops[self._next]
        self._next += 1

        def step(*given: Tensor) -> list[Tensor]:
            after, ys = body(pytree.tree_unflatten(given[: len(leaves)], spec), given[len(leaves) :])
            return [*pytree.tree_leaves(after), *ys]

        loop.start(leaves)
        self._enter(loop.num_steps)
        first, number = loop.results is None, self._next
        fast = None if first or loop.has_loops else self._compiled(loop, step, xs)  # traced while nothing is recorded
        self._begin()
        loop.step(step if fast is None else fast, xs)
        self._leave()
        loop.has_loops = self._next > number
        assert loop.results is not None
        return pytree.tree_unflatten(loop.carry, spec), tuple(loop.results)

    def _compiled(self, loop: Loop, step: FlatStep, xs: tuple[Tensor, ...]) -> FlatStep | None:
        """The compiled step with the tensors that it closes over this time; None: steps are not compiled."""
        if self._compile_step is None:
            return None
        from fastppo.compile.trace import trace_step

        inputs = [*loop.carry, *(x[0] for x in xs)]
        graph, closed_over = trace_step(step, inputs)
        if loop.compiled is None:
            with below_seeds():
                loop.compiled, loop.code = self._compile_step(graph, [*inputs, *closed_over]), graph.code
        if loop.code != graph.code:
            raise CompileError("a step is not the same each time it is traced")
        compiled = loop.compiled

        def call(*given: Tensor) -> list[Tensor]:
            with below_seeds():
                return list(compiled(*given, *closed_over))

        return call

    def _enter(self, times: int) -> None:
        """End the recording that is open; what follows is repeated."""
        if self._plan:
            self._end()
            inner = Repeated(times)
            self._plan[-1].parts.append(inner)
            self._plan.append(inner)

    def _leave(self) -> None:
        if self._plan:
            self._end()
            self._plan.pop()
            self._begin()

    def _begin(self) -> None:
        if self._plan:
            self._open = self._recording()
            self._open.begin()

    def _end(self) -> None:
        """End the recording that is open and put it into the plan."""
        if self._open is not None:
            open_one, self._open = self._open, None
            open_one.end()
            self._plan[-1].parts.append(open_one)


def _is_alias(x: Tensor, y: Tensor) -> bool:
    """Whether they share memory."""
    return bool(torch._C._is_alias_of(x, y))  # type: ignore[attr-defined]
