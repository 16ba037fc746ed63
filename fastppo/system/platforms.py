"""The differences between Linux, macOS and Windows. Knows nothing of training, costs no torch.

fastppo is developed and run on Linux. tests/test_platforms.py removes what the other systems lack.
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

SIGPIPE: int = getattr(signal, "SIGPIPE", 13)  # 13 on every system that has it
# fork, as in gymnasium: a forked process has this one's imports, which take seconds, and its registered environments.
# macOS's libraries do not survive a fork and Windows has none: there it is Python's default.
START_METHOD = "fork" if sys.platform == "linux" and hasattr(os, "fork") else None
_PIPES_ARE_FILES = hasattr(select, "poll")  # not on Windows


# --- processes


def peak_memory_mib() -> float:
    """Peak resident memory of this process in MiB; nan if the system does not report it."""
    if resource is None:
        return math.nan
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 2**20 if sys.platform == "darwin" else most / 2**10  # bytes on macOS, KiB elsewhere


def memory_bytes() -> float:
    """Resident memory of this process in bytes; nan if the system does not report it."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, AttributeError, ValueError, IndexError):
        return math.nan


def cpu_seconds() -> float:
    """Processor time of this process so far and, where Linux reports it, of the processes that it has started and still has."""
    total = time.process_time()
    try:
        lists = [path.read_text(encoding="utf-8") for path in Path("/proc/self/task").glob("*/children")]  # one of each thread
        ticks = os.sysconf("SC_CLK_TCK")
        for child in " ".join(lists).split():  # user and system time follow the name, which may hold spaces
            fields = Path(f"/proc/{child}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / ticks
    except (OSError, AttributeError, ValueError, IndexError):
        pass
    return total


def process_age() -> float:
    """Seconds since this process was started, imports included; nan if the system does not report it."""
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return math.nan


def lower_priority() -> None:
    """Lower this process's scheduling priority, if the system supports it."""
    if hasattr(os, "nice"):
        os.nice(5)


def own_group() -> dict[str, Any]:
    """Arguments of subprocess.Popen for a process that does not get Ctrl-C; `end_group` ends it and its children."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}


def end_group(process: "subprocess.Popen[Any]") -> None:
    """Send SIGTERM to a process started with `own_group`, and to its children if the system can. It may have ended already."""
    with contextlib.suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.terminate()


def lead_group() -> None:
    """Make this process the leader of a new process group, for `kill_group`, if the system has groups."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)


def kill_group(number: int) -> None:
    """Kill the process group that process `number` leads, 0 for this process's group, if the system has groups."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(OSError):  # usually all have ended already
            os.killpg(number, signal.SIGKILL)


# --- signals


def signal_name(number: int) -> str:
    """'SIGINT', or 'signal 13' for a signal that this system does not have."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Delay Ctrl-C. A process started meanwhile does not get it before `leave_signals_to_parent`."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent() -> None:
    """For a worker process: ignore the signals that a terminal sends to all processes; its parent handles them.

    SIGTERM ends the process, whatever handler it was forked with.
    """
    # a function instead of SIG_IGN, which programs started by an environment would inherit
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, frame: None)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


# --- pipes between processes


def poller(connection: Connection) -> Callable[[float | None], object]:
    """A function that waits so many milliseconds (None: without limit) for something to read, and returns whether there is.

    Connection.poll would create a selector on each call.
    """
    if not _PIPES_ARE_FILES:
        return lambda patience: connection.poll(None if patience is None else patience / 1e3)
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return poll.poll


def send_byte(connection: Connection, byte: bytes) -> None:
    """Write one byte, in half the time of Connection.send. Raises BrokenPipeError if the reader has closed the pipe."""
    if _PIPES_ARE_FILES:
        os.write(connection.fileno(), byte)
    else:
        connection.send_bytes(byte)


def receive_byte(connection: Connection) -> bytes:
    """Wait for a byte of `send_byte`; b"" if the writer has closed the pipe."""
    if _PIPES_ARE_FILES:
        return os.read(connection.fileno(), 1)
    try:
        return connection.recv_bytes(1)
    except EOFError:
        return b""


# --- files


def is_private(status: os.stat_result) -> bool:
    """Whether only this user may access the file; True if the system has no such modes."""
    if not hasattr(os, "geteuid"):
        return True
    return status.st_uid == os.geteuid() and not status.st_mode & 0o077


def user_number() -> int:
    """The user's id, 0 if the system has none."""
    return os.getuid() if hasattr(os, "getuid") else 0


def open_standard_streams() -> None:
    """Open the null device for each of stdin, stdout and stderr that is closed.

    Otherwise the next opened file would get its number, and receive what libraries and other programs print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # a new descriptor gets the lowest free number: this one
