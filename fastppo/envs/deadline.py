"""A time limit for code of the user's: a step of the environments that hangs becomes an error.

A timer of the operating system fires when the limit may have been reached, so a step only has to note when it begins and ends.
The timer interrupts Python, and calls that wait in the operating system: a sleep, a lock, a socket, a pipe. It does not
interrupt a loop in C. Without such a timer, or in another thread than the main one, nothing is interrupted; envs/grouped.py
has its own limit for processes. A limit that is reached while this process is stopped (Ctrl-Z, SIGSTOP) starts anew. Knows
nothing of environments. Does not import torch.
"""

import signal
import threading
import time
from types import FrameType
from typing import Any

from fastppo.errors import NoAnswer

LONGEST = 3600.0  # seconds between two checks, since the timer takes no unbounded number
LATE = 1.0  # seconds: a timer that fires so late has found this process stopped, or in a loop in C


class Deadline:
    """`with deadline:` raises NoAnswer in code that takes longer than `seconds`; closing it restores the timer."""

    def __init__(self, seconds: float = 0.0) -> None:
        """0: no limit. Uses SIGALRM until it is closed; a deadline made meanwhile must be closed first."""
        self.seconds = seconds
        self._since: float | None = None  # time.monotonic() when the code in the `with` began; None: outside of it
        self._before: tuple[Any, float, float, float] | None = None  # the handler before, its timer's two numbers, and when
        in_main = threading.current_thread() is threading.main_thread()
        if seconds > 0 and in_main and hasattr(signal, "setitimer") and signal.getsignal(signal.SIGALRM) is not None:
            handler = signal.signal(signal.SIGALRM, self._check)
            self._before = handler, *self._set_timer(seconds), time.monotonic()

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self._since = None

    def lift(self) -> None:
        """End the limit before the end of the `with`, for code with its own limit or that must not be interrupted."""
        self._since = None

    @property
    def message(self) -> str:
        """The error message for code that took longer."""
        return f"no answer for {self.seconds:g} s (--env-timeout)"

    def _check(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        left = self.seconds - (0.0 if self._since is None else now - self._since)
        over, was_stopped = left <= 0, now - self._due > LATE
        if over:  # fire again after as long: cleaning up may hang too, or the user's code may have caught the error
            self._since, left = now, self.seconds
        self._set_timer(left)
        has_finished = frame is not None and frame.f_code is Deadline.__exit__.__code__
        if over and not was_stopped and not has_finished:
            raise NoAnswer(self.message)

    def _set_timer(self, seconds: float) -> tuple[float, float]:
        """Let it fire when the limit may have been reached; returns the two numbers of the timer before."""
        delay = min(max(seconds, 1e-3), LONGEST)
        self._due = time.monotonic() + delay
        return signal.setitimer(signal.ITIMER_REAL, delay)

    def close(self) -> None:
        """Restore the handler and timer from before; an alarm that was due meanwhile fires now."""
        if self._before is None:
            return
        (handler, delay, interval, taken), self._before = self._before, None
        if signal.getsignal(signal.SIGALRM) == self._check:  # else other code has replaced the handler
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, handler)
            if delay:
                signal.setitimer(signal.ITIMER_REAL, max(delay - (time.monotonic() - taken), 1e-3), interval)


NO_DEADLINE = Deadline()
