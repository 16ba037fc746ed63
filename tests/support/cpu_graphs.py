"""CUDA graphs, pretended on the CPU: operations are recorded with the tensors that they read and wrote, and run again on these.

As with the real ones, Python runs only while recording: a replay sees what the buffers hold then, and nothing else changes.
Unlike the real ones, operations also run while they are recorded.
"""

import contextlib

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastppo.compile import cuda_graph


class Recorder(TorchDispatchMode):
    """Keeps each operation with its arguments and results."""

    def __init__(self, operations):
        super().__init__()
        self.operations = operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, results))
        return results


class RecordedGraph:
    """Stands in for compile.cuda_graph.Graph."""

    made: list["RecordedGraph"] = []  # noqa: RUF012 (emptied by `recorded_graphs`)

    def __init__(self):
        self.operations = []
        self.made.append(self)

    def begin(self):
        self._mode = Recorder(self.operations)
        self._mode.__enter__()

    def end(self):
        self._mode.__exit__(None, None, None)

    def replay(self):
        with torch._C._AutoDispatchBelowAutograd():  # where the operations were recorded
            for func, args, kwargs, results in self.operations:
                again = func(*args, **kwargs)
                for kept, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                    if isinstance(kept, Tensor) and not torch._C._is_alias_of(kept, new):  # not a view nor written in place
                        kept.copy_(new)


@contextlib.contextmanager
def recorded_graphs():
    """Programs are captured on the CPU; yields the list of their graphs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecordedGraph, "made", [])
        patch.setattr(cuda_graph, "Graph", RecordedGraph)
        patch.setattr(cuda_graph, "side_stream", contextlib.nullcontext)
        yield RecordedGraph.made
