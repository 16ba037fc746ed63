"""Signals that ask a run to stop. Knows nothing of what is stopped."""

import signal
import threading
from types import FrameType
from typing import Any

from fastppo.system.platforms import signal_name


class StopSignals:
    """SIGINT, SIGTERM and SIGHUP ask the loop to stop after this iteration. A second signal stops at once.

    SIGHUP is left alone if it is ignored, as under nohup.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
                numbers.append(signal.SIGHUP)
            self._before = {number: signal.signal(number, self._handle) for number in numbers}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.restore()
        self.received = number

    def restore(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def name(self) -> str | None:
        """Name of the signal received, None before one."""
        return None if self.received is None else signal_name(self.received)

    def exception(self) -> BaseException:
        """An exception that ends the process with 128 + the signal's number."""
        return KeyboardInterrupt() if self.received == signal.SIGINT else SystemExit(128 + (self.received or 0))
