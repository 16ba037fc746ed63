"""Programs captured as CUDA graphs: what is outside a program's loops once, and one step of each loop once.

A step is replayed as often as its loop has steps. So `learn` is three graphs: evaluation and advantages, one minibatch, the
summary; and their size does not depend on epochs, minibatches, environments or steps. Nothing asks the device for a value.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastppo.compile.compile_errors import CompileError, first_line
from fastppo.compile.inductor import compile_step
from fastppo.compile.program import Example, Program, execution_of, flat_tensors, of_all_seeds, plain
from fastppo.compile.static_loops import StaticLoops
from fastppo.core.gradient import functional_grad_and_aux
from fastppo.core.seed_axis import Seeds

WARM_UPS = 3  # before a capture, as PyTorch advises: libraries allocate and choose their kernels in the first calls


class Graph:
    """Operations between `begin` and `end`, captured as one CUDA graph."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._capture = contextlib.ExitStack()

    def begin(self) -> None:
        """From here on the operations of the current stream are recorded and not run. They have memory of their own."""
        # thread_local, as in Inductor's own graphs: NCCL's watchdog asks the device from a thread of its own at any time
        mode, stream = "thread_local", torch.cuda.current_stream()
        self._capture.enter_context(torch.cuda.graph(self._graph, stream=stream, capture_error_mode=mode))

    def end(self) -> None:
        """Up to here."""
        self._capture.close()

    def replay(self) -> None:
        """Run the operations."""
        self._graph.replay()


@contextlib.contextmanager
def side_stream() -> Iterator[None]:
    """A stream that is not the default one, on which captures have to be."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def has_loops(program: Program) -> bool:
    """Whether a program may have loops: it then has a setting that says how they run."""
    return "execution" in inspect.signature(program.func).parameters


class GraphedProgram:
    """A program captured once. A call copies its arguments into buffers and replays the graphs.

    The buffers keep their addresses, so results are copied out of them.
    """

    def __init__(self, program: Program, example: Example, seeds: Seeds | None = None, compiled: bool = False) -> None:
        """Run the program a few times, with one step of each loop, then capture it. Raises CompileError if that fails.

        Args:
            example: arguments that the program can work with, an index within its range for example.
            compiled: compile the steps of its loops first.
        """
        self._loops = StaticLoops(Graph, compile_step if compiled else None)
        if has_loops(program):
            execution = dataclasses.replace(execution_of(program), scan=self._loops.scan)
            if compiled:
                execution = dataclasses.replace(execution, grad_and_aux=functional_grad_and_aux)
            program = partial(program, execution=execution)
        elif compiled:
            raise CompileError("it has no loop whose step could be compiled")
        call = of_all_seeds(program, seeds)
        self._arguments = pytree.tree_map_only(Tensor, torch.clone, plain(example))
        try:
            with side_stream():
                for _ in range(WARM_UPS):
                    self._loops.warm_up(partial(call, *self._arguments))
                self._results = self._loops.capture(partial(call, *self._arguments))
        except CompileError:
            raise
        except RuntimeError as error:
            raise CompileError(f"the CUDA graph could not be captured: {first_line(error)}") from error
        self._buffers = flat_tensors(self._arguments)

    def __call__(self, *args: Any) -> Any:
        """Run the program on tensors of the example's shapes."""
        return self._call(self._buffers, args)

    def bind(self, fixed: Example, rest: Example) -> Callable[..., Any]:
        """Return `program(*fixed, *given)` as a function of `given`. The fixed arguments are copied once."""
        bound = flat_tensors(fixed)
        for buffer, given in zip(self._buffers, bound, strict=False):
            buffer.copy_(given, non_blocking=True)
        return lambda *given: self._call(self._buffers[len(bound) :], given)

    def _call(self, buffers: list[Tensor], args: Any) -> Any:
        for buffer, given in zip(buffers, flat_tensors(args), strict=True):
            buffer.copy_(given, non_blocking=True)
        self._loops.replay()
        return pytree.tree_map_only(Tensor, torch.clone, self._results)
