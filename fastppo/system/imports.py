"""Imports of a command, kept from Python's garbage collector. Knows nothing of what is imported."""

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def lasting_imports() -> Iterator[None]:
    """For importing torch in a process of our own: what is imported is not collected, nor freed at the process's end.

    torch makes hundreds of thousands of objects that live as long as the process. A full collection visits them all, and at the
    end Python frees them one by one: 0.7 CPU s of a command (benchmarks/LOG.md). Does nothing where torch has been imported
    before: the process may be somebody else's, and `gc.freeze` keeps all objects that there are.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
