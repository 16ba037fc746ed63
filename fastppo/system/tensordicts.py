"""`TensorDict`, imported without PyTorch's compiler: 2.9 CPU s less of each start (benchmarks/LOG.md).

tensordict imports torch._dynamo, and so Inductor, only to mark a few of its functions for Dynamo. Here these marks are noted,
and made when Dynamo is imported, by whoever needs it first. Knows nothing of rollouts.
"""

import contextlib
import importlib.abc
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch

DYNAMO = "torch._dynamo"
MARKS = ("allow_in_graph", "assume_constant_result")  # torch.compiler's; each marks a function in place and returns it


class _AfterDynamo(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """In sys.meta_path: waits for the import of Dynamo, then makes the noted marks and leaves."""

    def __init__(self) -> None:
        self._noted: list[Callable[[], object]] = []
        self._loader: Any = None  # Dynamo's own

    def note(self, mark: Callable[[Any], Any], function: Any) -> Any:
        """Make the mark once Dynamo has been imported. Returns the function."""
        if DYNAMO in sys.modules:
            return mark(function)
        self._noted.append(partial(mark, function))
        return function

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Dynamo's spec as the other finders have it, with this as its loader; None for every other module."""
        if name != DYNAMO:
            return None
        finders = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)
        if spec is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As Dynamo's loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As Dynamo's loader does, then make the marks."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        sys.meta_path.remove(self)
        for mark in self._noted:
            mark()


@contextlib.contextmanager
def _marks_wait() -> Iterator[None]:
    """Marks made meanwhile wait until Dynamo is imported. Does nothing if it, or tensordict, has been."""
    if DYNAMO in sys.modules or "tensordict" in sys.modules:
        yield
        return
    after_dynamo = _AfterDynamo()
    sys.meta_path.insert(0, after_dynamo)
    marks = {name: getattr(torch.compiler, name) for name in MARKS}
    for name, mark in marks.items():
        setattr(torch.compiler, name, partial(after_dynamo.note, mark))
    try:
        yield
    finally:
        for name, mark in marks.items():
            setattr(torch.compiler, name, mark)


with _marks_wait():
    from tensordict import TensorDict

__all__ = ["TensorDict"]
