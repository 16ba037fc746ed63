"""How many cores this process may use, and whether threads are pinned to cores. Reads Linux's CPU quotas; costs no torch."""

import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")  # of /proc and of the mounted control groups
_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def is_forked() -> bool:
    """Whether this process was forked from one that had imported fastppo.

    OpenMP's threads do not survive a fork. If the parent had used them, the first parallel operation here waits forever.
    """
    return _forked


def allow_threads_after_fork() -> None:
    """Make `is_forked` false: the caller knows that this process was forked from one that had run no parallel operation."""
    global _forked
    _forked = False


def available_cores() -> int:
    """Cores for all threads of this process, or for all its worker processes. At least 1.

    The minimum of its CPU affinity (taskset, a batch system), the quota of its control groups (docker run --cpus, Kubernetes,
    systemd), rounded down, and OMP_NUM_THREADS. Processes that torchrun has started on this machine share the cores equally;
    OMP_NUM_THREADS=1 is ignored there, because torchrun sets it by itself.
    """
    ranks = _whole_number("LOCAL_WORLD_SIZE") or 1
    share = max(machine_cores() // ranks, 1)
    wanted = _whole_number("OMP_NUM_THREADS")
    return share if wanted is None or (ranks > 1 and wanted == 1) else min(share, wanted)


def machine_cores() -> int:
    """As `available_cores`, for all processes under the same limits together and without OMP_NUM_THREADS."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(math.floor(min(bound, cpu_quota(ROOT))), 1)


def cpu_quota(root: Path) -> float:
    """CPU seconds per second that this process's control groups and their parents allow; inf without a limit.

    root: the directory that contains /proc and the mounted hierarchies.
    """
    return min((_quota_of(directory) for directory in _groups(root)), default=math.inf)


def _groups(root: Path) -> Iterator[Path]:
    """The directories of the process's CPU control groups, version 1 and 2, and their parents up to the mount point.

    In a container the mount may start at the container's own group, or not contain it. Only visible directories count.
    """
    named = dict(_own_groups(_lines(root / "proc/self/cgroup")))
    for line in _lines(root / "proc/self/mountinfo"):
        # id, parent, device, the group that is mounted, where, ..., "-", kind, source, options
        before, _, after = line.partition(" - ")
        mounted, kind_and_options = before.split()[3:5], after.split()[::2]
        if len(mounted) < 2 or kind_and_options[:1] not in (["cgroup"], ["cgroup2"]):
            continue
        controller = "" if kind_and_options[0] == "cgroup2" else "cpu"
        group = named.get(controller)
        if group is None or controller not in ("", *kind_and_options[-1].split(",")):
            continue
        top, mount = map(_unescaped, mounted)
        place = root / mount.lstrip("/")
        parts = Path(os.path.relpath(group or "/", top)).parts
        below = place if ".." in parts else place.joinpath(*parts)
        yield from (directory for directory in (below, *below.parents) if directory.is_relative_to(place))


def _own_groups(lines: list[str]) -> Iterator[tuple[str, str]]:
    """(controller, group) pairs of /proc/self/cgroup; the controller is "" for version 2."""
    for line in lines:
        controllers, _, group = line.partition(":")[2].partition(":")
        for controller in controllers.split(","):
            yield controller, group


def _quota_of(directory: Path) -> float:
    """The quota of one group; inf if it has none, or it cannot be read."""
    both = " ".join(_lines(directory / "cpu.max")[:1]).split()  # version 2: "150000 100000", or "max 100000"
    both = both or [" ".join(_lines(directory / f"cpu.cfs_{name}_us")[:1]) for name in ("quota", "period")]
    try:
        quota, period = map(float, both)
    except ValueError:
        return math.inf
    return quota / period if quota > 0 and period > 0 else math.inf  # version 1 has -1 for no limit


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _unescaped(text: str) -> str:
    """A path of mountinfo, in which a space is \\040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _whole_number(name: str) -> int | None:
    """The first number in an environment variable, which may be a list; None if it is missing or less than 1."""
    text = os.environ.get(name, "").split(",")[0].strip()
    return int(text) if text.isascii() and text.isdigit() and int(text) > 0 else None


def engine_threads(num_envs: int) -> dict[str, int]:
    """Thread arguments for EnvPool or ALE, which by default start a thread for each core of the machine.

    If this process may use all cores, the threads are pinned to them. Otherwise Linux sometimes runs two of them on one core
    while another is idle: EnvPool's HalfCheetah on two cores 15,000 steps/s, pinned 18,100; beside one busy process 11,900 and
    12,400, beside two no difference (benchmarks/LOG.md). With fewer threads than cores they are not pinned, because several
    runs would be pinned to the same cores. If this process may use only some cores, it gets that many threads, not pinned.
    """
    cores, on_machine = available_cores(), os.cpu_count() or 1
    if cores < on_machine:
        return {"num_threads": min(num_envs, cores)}
    return {"thread_affinity_offset": 0} if sys.platform == "linux" and num_envs >= cores else {}
