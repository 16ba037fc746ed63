"""Programs captured as CUDA graphs."""

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastppo.compile.compile_errors import CompileError, first_line
from fastppo.compile.program import Example, flat_tensors, plain


class GraphedProgram:
    """A whole program captured once as a CUDA graph. A call copies its arguments into the buffers and replays the kernels.

    One launch replaces thousands. The buffers keep their addresses, so results are copied out of them.
    """

    def __init__(self, program: Callable[..., Any], example: Example) -> None:
        """Warm up on a side stream, as capture requires, then capture the program. Raises CompileError if that fails."""
        try:
            self._arguments = pytree.tree_map_only(Tensor, torch.clone, plain(example))
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    program(*self._arguments)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._results = program(*self._arguments)
        except RuntimeError as error:
            raise CompileError(f"the CUDA graph could not be captured: {first_line(error)}") from error
        self._buffers = flat_tensors(self._arguments)

    def __call__(self, *args: Any) -> Any:
        """Run the program on tensors of the example's shapes."""
        for buffer, given in zip(self._buffers, flat_tensors(args), strict=True):
            buffer.copy_(given, non_blocking=True)
        self._graph.replay()
        return pytree.tree_map_only(Tensor, torch.clone, self._results)

    def bind(self, fixed: Example, rest: Example) -> Callable[..., Any]:
        """Return `program(*fixed, *given)` as a function of `given`. The fixed arguments are copied once."""
        bound = flat_tensors(fixed)
        for buffer, given in zip(self._buffers, bound, strict=False):
            buffer.copy_(given, non_blocking=True)

        def call(*given: Any) -> Any:
            for buffer, tensor in zip(self._buffers[len(bound) :], flat_tensors(given), strict=True):
                buffer.copy_(tensor, non_blocking=True)
            self._graph.replay()
            return pytree.tree_map_only(Tensor, torch.clone, self._results)

        return call
