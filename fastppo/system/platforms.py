"""What differs between Linux, macOS and Windows, in one place. Knows nothing of training, costs no torch.

fastppo is developed and run on Linux. What the other systems lack is taken away in tests/test_platforms.py.
"""

import contextlib
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

SIGPIPE: int = getattr(signal, "SIGPIPE", 13)  # 13 everywhere where there is one
# gymnasium's choice too: a forked process shares the imports of this one, which take seconds, and knows every environment that
# was registered here. On macOS system libraries do not survive a fork, and Windows has none: Python's own default is taken.
START_METHOD = "fork" if sys.platform == "linux" and hasattr(os, "fork") else None
_PIPES_ARE_FILES = hasattr(select, "poll")  # not on Windows


# --- processes


def peak_memory_mib() -> float:
    """The most memory that this process has had, in MiB; nan where the system does not tell."""
    if resource is None:
        return math.nan
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 2**20 if sys.platform == "darwin" else most / 2**10  # bytes there, KiB elsewhere


def process_age() -> float:
    """Seconds since this process was started, imports included; nan where the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return math.nan


def lower_priority() -> None:
    """Let other processes go first, where the system has a way to say so."""
    if hasattr(os, "nice"):
        os.nice(5)


def own_group() -> dict[str, Any]:
    """Arguments of subprocess.Popen for a process that Ctrl-C does not reach; `end_group` ends it and its children."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}


def end_group(process: "subprocess.Popen[Any]") -> None:
    """Ask a process started with `own_group` to end, and its children where the system can; it may be gone already."""
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.terminate()


def lead_group() -> None:
    """Make this process the leader of a group of its own, which `kill_group` ends, where the system has groups."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


def kill_group(number: int) -> None:
    """Kill what is left of the group that process `number` leads, 0 for the group of this process, where there are groups."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(OSError):  # nobody is left, as a rule
            os.killpg(number, signal.SIGKILL)


# --- signals


def signal_name(number: int) -> str:
    """'SIGINT'; for a signal that this system does not have, 'signal 13'."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C waits. A process that is started meanwhile does not get it before `leave_signals_to_parent`."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent() -> None:
    """For a process that works for another one: what a terminal sends to all of its processes, the parent answers.

    SIGTERM ends it, whatever handler it was forked with.
    """
    # a function and not SIG_IGN, which programs that an environment starts would inherit
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, frame: None)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


# --- pipes between processes


def poller(connection: Connection) -> Callable[[float | None], object]:
    """A function of milliseconds, None for ever: waits until there is something to read, and says whether there is.

    Connection.poll would make a selector for each call.
    """
    if not _PIPES_ARE_FILES:
        return lambda patience: connection.poll(None if patience is None else patience / 1e3)
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return poll.poll


def send_byte(connection: Connection, byte: bytes) -> None:
    """Write one byte; half of what Connection.send costs. Raises BrokenPipeError where nobody reads any more."""
    if _PIPES_ARE_FILES:
        os.write(connection.fileno(), byte)
    else:
        connection.send_bytes(byte)


def receive_byte(connection: Connection) -> bytes:
    """Wait for what `send_byte` wrote; b"" where nobody writes any more."""
    if _PIPES_ARE_FILES:
        return os.read(connection.fileno(), 1)
    try:
        return connection.recv_bytes(1)
    except EOFError:
        return b""


# --- files


def is_private(status: os.stat_result) -> bool:
    """Whether a file is this user's and closed to all others; where the system has no such modes, True."""
    if not hasattr(os, "geteuid"):
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & 0o077


def user_number() -> int:
    """The user's number, 0 where the system has none."""
    return os.getuid() if hasattr(os, "getuid") else 0


def open_standard_streams() -> None:
    """Open the null device where stdin, stdout or stderr is closed.

    The next file that is opened would take the place, and get what libraries and other programs print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free: this one
