"""A limit on somebody else's code: it interrupts what hangs, nothing else, and leaves the process as it was."""

import contextlib
import signal
import threading
import time

import pytest

from fastppo.envs.deadline import NO_DEADLINE, Deadline
from fastppo.errors import NoAnswer


@pytest.fixture(autouse=True)
def _timer_as_before():
    """SIGALRM and its timer are as they were after every test."""
    before = signal.getsignal(signal.SIGALRM)
    yield
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@contextlib.contextmanager
def limit(seconds):
    """A deadline, closed in the end."""
    with contextlib.closing(Deadline(seconds)) as deadline:
        yield deadline


def test_what_hangs_is_interrupted():
    """After the limit, counted from the entry: not from the first one, nor from when the deadline was made."""
    with limit(0.3) as deadline:
        time.sleep(0.2)
        for _ in range(2):
            with deadline:
                time.sleep(0.2)
        started = time.monotonic()
        with pytest.raises(NoAnswer, match=r"^no answer for 0\.3 s \(--env-timeout\)$"), deadline:
            time.sleep(60)
        assert 0.3 <= time.monotonic() - started < 0.6


def test_nothing_else_is():
    """Code outside takes as long as it likes, after an error inside too, and after the limit has been lifted."""
    with limit(0.1) as deadline:
        with deadline:
            pass
        with pytest.raises(ValueError, match="inside"), deadline:
            raise ValueError("inside")
        with deadline:
            deadline.lift()
            time.sleep(0.2)
        time.sleep(0.35)


def test_again_after_as_long():
    """Cleaning up may hang as well, and all may be caught."""

    def sleep_and_sleep(deadline):
        with deadline:
            try:
                time.sleep(60)
            finally:
                time.sleep(60)

    started = time.monotonic()
    with limit(0.2) as deadline, pytest.raises(NoAnswer):
        sleep_and_sleep(deadline)
    assert 0.4 <= time.monotonic() - started < 0.9


def test_errors_that_are_caught_to_try_again():
    """An environment that catches every Exception does not catch this."""

    def try_again(deadline):
        with deadline:
            while True:
                with contextlib.suppress(Exception):
                    time.sleep(60)

    with limit(0.2) as deadline, pytest.raises(NoAnswer):
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


def test_a_timer_of_the_callers_own():
    """Comes when it was due, or at once if that was meanwhile; deadlines one within another likewise."""
    rung = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(time.monotonic()))
    try:
        for delay, wait in ((0.6, 0.2), (0.1, 0.3)):
            started = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, delay)
            with limit(5.0), limit(5.0):
                time.sleep(wait)
            assert not rung
            time.sleep(0.6)
            assert max(delay, wait) <= rung.pop() - started < max(delay, wait) + 0.2
    finally:
        signal.signal(signal.SIGALRM, before)


def test_taken_over_by_somebody():
    """Who has set another handler meanwhile keeps it, with its timer."""
    before = signal.getsignal(signal.SIGALRM)
    rung = []
    with limit(5.0):
        signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
        signal.setitimer(signal.ITIMER_REAL, 0.1)
    time.sleep(0.2)
    assert rung
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("seconds", [1e-9, 1e300])
def test_limits_of_any_size(seconds):
    """What the timer itself does not take."""
    with limit(seconds) as deadline, deadline:
        pass
