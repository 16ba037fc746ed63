"""A training process of a sweep, and the file with its output. Knows nothing of trials or studies."""

import contextlib
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from fastppo.system.platforms import own_group

GRACE_SECONDS = 30.0  # for a process that was asked to stop; then it is killed
MAX_LETTERS = 300  # of a line that is quoted


class TrainingProcess:
    """A training process, and a thread that writes its output to a file.

    The output goes through a pipe to the sweep. If the sweep is killed, the pipe closes and training stops by itself. The
    training process has its own session, so that Ctrl-C reaches only the sweep.
    """

    def __init__(self, command: Sequence[str], output: Path, place: Path) -> None:
        """Start the process. output: the file. place: the working directory."""
        self.output = output
        pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self._process = subprocess.Popen(command, cwd=place, **own_group(), **pipes)
        assert self._process.stdout is not None
        self._reader = threading.Thread(target=_copy, args=(self._process.stdout, output), daemon=True)
        self._reader.start()

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        code = self._process.poll()
        if code is not None:
            self._reader.join(timeout=5.0)
        return code

    def terminate(self) -> None:
        """Send SIGTERM, which ends training after the current iteration."""
        self._process.terminate()

    def wait(self) -> None:
        """Wait for its end; kill it after GRACE_SECONDS."""
        try:
            self._process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def error_line(self) -> str:
        """The last line of its output that starts with "fault: " or "error: ", or else the last line."""
        lines = self.output.read_text(encoding="utf-8", errors="replace").strip().splitlines() if self.output.exists() else []
        errors = [line for line in lines if line.startswith(("fault: ", "error: "))]
        return (errors or lines or [""])[-1][:MAX_LETTERS]


def _copy(source: IO[bytes], path: Path) -> None:
    with source:
        with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
            while line := source.readline():
                file.write(line)
        while source.read(2**16):  # the disk is full: read on, so that the process does not block
            pass
