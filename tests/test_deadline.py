"""A limit on somebody else's code: it interrupts what hangs, nothing else, and leaves the process as it was.

Most tests run on a clock and a timer of their own, so that they do not depend on how busy the machine is.
"""

import contextlib
import signal
import sys
import threading
import time

import pytest

from fastppo.envs import deadline as module
from fastppo.envs.deadline import NO_DEADLINE, Deadline
from fastppo.errors import NoAnswer


@pytest.fixture(autouse=True)
def _timer_as_before():
    """SIGALRM and its timer are as they were after every test."""
    before = signal.getsignal(signal.SIGALRM)
    yield
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


class Clock:
    """Stands in for `time` and `signal` in envs/deadline.py: the timer rings when `sleep` has moved the clock on so far."""

    SIGALRM, ITIMER_REAL = signal.SIGALRM, signal.ITIMER_REAL

    def __init__(self):
        self.now, self.handler, self.due, self.interval = 100.0, signal.SIG_DFL, None, 0.0
        self.rung = []  # when the timer rang

    def monotonic(self):
        return self.now

    def getsignal(self, number):
        return self.handler

    def signal(self, number, handler):
        before, self.handler = self.handler, handler
        return before

    def setitimer(self, which, delay, interval=0.0):
        before = (0.0 if self.due is None else self.due - self.now, self.interval)
        self.due, self.interval = (self.now + delay if delay else None), interval
        return before

    def sleep(self, seconds):
        """Move on; the handler is called in between, as often as it is due, and may raise."""
        end = self.now + seconds
        while self.due is not None and self.due <= end:
            self.now, self.due = self.due, self.due + self.interval if self.interval else None
            self.rung.append(self.now)
            self.handler(signal.SIGALRM, sys._getframe())
        self.now = end


@pytest.fixture
def clock(monkeypatch):
    """A clock that only `clock.sleep` moves on."""
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "signal", clock)
    return clock


@contextlib.contextmanager
def limit(seconds):
    """A deadline, closed in the end."""
    with contextlib.closing(Deadline(seconds)) as deadline:
        yield deadline


def test_what_hangs_is_interrupted():
    """By the operating system's timer, in a call that waits; the message names the limit and the flag."""
    started = time.monotonic()
    with limit(0.1) as deadline, pytest.raises(NoAnswer, match=r"^no answer for 0\.1 s \(--env-timeout\)$"), deadline:
        time.sleep(600)
    assert 0.1 <= time.monotonic() - started < 300


def test_counted_from_each_entry(clock):
    """Not from the first one, nor from when the deadline was made."""
    with limit(0.3) as deadline:
        clock.sleep(0.2)
        for _ in range(2):
            with deadline:
                clock.sleep(0.2)
        started = clock.now
        with pytest.raises(NoAnswer), deadline:
            clock.sleep(60)
        assert clock.now - started == pytest.approx(0.3, abs=2e-3)


def test_nothing_else_is_interrupted(clock):
    """Code outside takes as long as it likes, after an error inside too, and after the limit has been lifted."""
    with limit(0.1) as deadline:
        with deadline:
            pass
        with pytest.raises(ValueError, match="inside"), deadline:
            raise ValueError("inside")
        with deadline:
            deadline.lift()
            clock.sleep(0.2)
        clock.sleep(0.35)
    assert len(clock.rung) == 5  # it looked, and found nothing to interrupt


def test_again_after_as_long(clock):
    """Cleaning up may hang as well, and all may be caught."""

    def sleep_and_sleep(deadline):
        with deadline:
            try:
                clock.sleep(60)
            finally:
                clock.sleep(60)

    with limit(0.2) as deadline, pytest.raises(NoAnswer):
        sleep_and_sleep(deadline)
    assert clock.now == pytest.approx(100.4, abs=2e-3)


def test_a_process_that_was_stopped(clock):
    """Ctrl-Z and fg an hour later: the time between them does not count, and what hangs after it is interrupted."""

    def stopped_then_hangs(deadline):
        with deadline:
            clock.sleep(100.0)
            clock.now += 3600.0  # the timer fires when the process goes on
            clock.due = clock.now
            clock.sleep(600.0)

    with limit(300.0) as deadline, pytest.raises(NoAnswer):
        stopped_then_hangs(deadline)
    assert clock.now == pytest.approx(100.0 + 100.0 + 3600.0 + 300.0)


def test_errors_that_are_caught_to_try_again():
    """An environment that catches every Exception does not catch this."""

    def try_again(deadline):
        with deadline:
            while True:
                with contextlib.suppress(Exception):
                    time.sleep(60)

    with limit(0.1) as deadline, pytest.raises(NoAnswer):
        try_again(deadline)


def test_none():
    """0 is for ever, and takes no signal; away from the main thread nothing is taken either."""
    before = signal.getsignal(signal.SIGALRM)
    with NO_DEADLINE:
        assert signal.getsignal(signal.SIGALRM) == before
    made = []
    thread = threading.Thread(target=lambda: made.append(Deadline(5.0)))
    thread.start()
    thread.join()
    with made[0]:
        assert signal.getsignal(signal.SIGALRM) == before
    made[0].close()


@pytest.mark.parametrize(("delay", "wait", "rings"), [(0.6, 0.2, 0.6), (0.1, 0.3, 0.3)])
def test_a_timer_of_the_callers_own(clock, delay, wait, rings):
    """Comes when it was due, or at once if that was meanwhile; deadlines one within another likewise."""
    rung = []
    clock.signal(signal.SIGALRM, lambda number, frame: rung.append(clock.now))
    clock.setitimer(signal.ITIMER_REAL, delay)
    with limit(5.0), limit(5.0):
        clock.sleep(wait)
    assert not rung
    clock.sleep(10.0)
    assert rung == [pytest.approx(100.0 + rings, abs=2e-3)]


def test_taken_over_by_somebody(clock):
    """Who has set another handler meanwhile keeps it, with its timer."""
    rung = []
    with limit(5.0):
        clock.signal(signal.SIGALRM, lambda number, frame: rung.append(clock.now))
        clock.setitimer(signal.ITIMER_REAL, 0.1)
    clock.sleep(0.2)
    assert rung == [100.1]


@pytest.mark.parametrize("seconds", [1e-9, 1e300])
def test_limits_of_any_size(seconds):
    """What the timer itself does not take."""
    with limit(seconds) as deadline, contextlib.suppress(NoAnswer), deadline:
        pass
