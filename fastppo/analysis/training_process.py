"""A training process of a sweep, and the file with its output. Knows nothing of trials or studies."""

import gc
import importlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from fastppo.system.cpus import allow_threads_after_fork
from fastppo.system.platforms import lead_group

GRACE_SECONDS = 30.0  # for a process that was asked to stop; then it is killed
MAX_LETTERS = 300  # of a line that is quoted
PRELOADED = ["fastppo.training.loop", "matplotlib.figure", "matplotlib.backends.backend_agg"]


class TrainingProcess:
    """A training process, whose output goes to a file.

    Where the system can fork, it is a copy of a process that has imported torch already. If the sweep ends, training stops
    after the current iteration. Ctrl-C reaches only the sweep.
    """

    def __init__(self, module: str, args: Sequence[str], output: Path, place: Path) -> None:
        """Start the process, which calls `console(args)` of `module`. output: the file. place: its working directory."""
        self.output = output
        can_fork = "forkserver" in multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if can_fork else "spawn")
        context.set_forkserver_preload(PRELOADED)
        self._process = context.Process(  # type: ignore[attr-defined]  # typeshed lacks it
            target=_train, args=(module, list(args), str(output), str(place))
        )
        self._process.start()

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.exitcode

    def terminate(self) -> None:
        """Send SIGTERM, which ends training after the current iteration."""
        self._process.terminate()

    def wait(self, seconds: float = GRACE_SECONDS) -> None:
        """Wait for its end; kill it after `seconds`."""
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()

    def error_line(self) -> str:
        """The last line of its output that starts with "fault: " or "error: ", or else the last line."""
        lines = self.output.read_text(encoding="utf-8", errors="replace").strip().splitlines() if self.output.exists() else []
        errors = [line for line in lines if line.startswith(("fault: ", "error: "))]
        return (errors or lines or [""])[-1][:MAX_LETTERS]


def _train(module: str, args: Sequence[str], output: str, place: str) -> None:
    """In the new process: call `console(args)` of the module and exit with its code."""
    gc.freeze()  # see system/imports.py
    allow_threads_after_fork()  # the server of forks only imports
    lead_group()  # so that Ctrl-C does not reach it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(os.devnull, "rb") as nothing, open(output, "wb", buffering=0) as file:
        for number, stream in enumerate((nothing, file, file)):
            os.dup2(stream.fileno(), number)
    os.chdir(place)
    sys.exit(importlib.import_module(module).console(args))


def _end_with_parent() -> None:
    """Wait for the end of the process that started this one, then stop training after the current iteration."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
