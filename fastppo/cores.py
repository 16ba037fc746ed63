"""How many cores this process may use. Knows nothing of what for."""

import os


def available_cores() -> int:
    """Those that it is bound to where the system tells (taskset, a batch system), else all of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
