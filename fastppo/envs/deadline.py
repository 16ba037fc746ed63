"""A limit on how long somebody else's code may take: a step of the environments that hangs becomes an error.

A timer of the operating system looks in when the limit could have been reached, and only then; what it costs a step is to note
when it began and that it is over. It interrupts Python, and calls that wait in the operating system: a sleep, a lock, a socket,
a pipe. A loop in C goes on until it returns, and where there is no such timer, or away from the main thread, nothing is
interrupted: envs/grouped.py watches its processes from outside. Knows nothing of environments, costs no torch.
"""

import signal
import threading
import time
from types import FrameType
from typing import Any

from fastppo.errors import NoAnswer

LONGEST = 3600.0  # seconds between looks: the timer takes no number without bounds


class Deadline:
    """`with deadline:` raises NoAnswer in code that takes longer than `seconds`; close it to put the timer back."""

    def __init__(self, seconds: float = 0.0) -> None:
        """0: no limit. Takes SIGALRM until it is closed; one that is made meanwhile has to be closed before."""
        self.seconds = seconds
        self._since: float | None = None  # of time.monotonic, while somebody else's code runs
        self._before: tuple[Any, float, float, float] | None = None  # handler, its timer's two numbers, and when
        in_main = threading.current_thread() is threading.main_thread()
        if seconds > 0 and in_main and hasattr(signal, "setitimer") and signal.getsignal(signal.SIGALRM) is not None:
            handler = signal.signal(signal.SIGALRM, self._look)
            self._before = handler, *signal.setitimer(signal.ITIMER_REAL, min(seconds, LONGEST)), time.monotonic()

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self._since = None

    def lift(self) -> None:
        """No limit on the rest of what is in the `with`: it has its own, or must not be interrupted."""
        self._since = None

    @property
    def message(self) -> str:
        """What it says of code that took longer."""
        return f"no answer for {self.seconds:g} s (--env-timeout)"

    def _look(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        left = self.seconds - (0.0 if self._since is None else now - self._since)
        late = left <= 0
        if late:  # and again after as long: cleaning up may hang too, or somebody have caught everything
            self._since, left = now, self.seconds
        signal.setitimer(signal.ITIMER_REAL, min(max(left, 1e-3), LONGEST))
        if late and not (frame is not None and frame.f_code is Deadline.__exit__.__code__):  # which is the end of it
            raise NoAnswer(self.message)

    def close(self) -> None:
        """Put back the handler and timer from before; an alarm that was due meanwhile comes now."""
        if self._before is None:
            return
        (handler, delay, interval, taken), self._before = self._before, None
        if signal.getsignal(signal.SIGALRM) == self._look:  # else somebody has taken it over
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, handler)
            if delay:
                signal.setitimer(signal.ITIMER_REAL, max(delay - (time.monotonic() - taken), 1e-3), interval)


NO_DEADLINE = Deadline()
