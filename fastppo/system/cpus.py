"""How many cores this process may use, and who is tied to one. Reads what Linux tells of quotas; costs no torch."""

import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")  # where /proc and the control groups are


_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def is_forked() -> bool:
    """Whether this process was forked from one that had imported fastppo.

    OpenMP's threads do not survive a fork: where the parent had used some, the first operation that is shared out among several
    waits for them forever.
    """
    return _forked


def available_cores() -> int:
    """Cores for this process: for its threads together, or for its worker processes together. At least 1.

    The least of the cores that it is bound to (taskset, a batch system), of those that its control groups let it use (docker
    run --cpus, Kubernetes, systemd), and of OMP_NUM_THREADS. A part of a core is none: 1.5 count as 1. Processes that torchrun
    has started on this machine have equal parts; the OMP_NUM_THREADS=1 that it gives them is nobody's wish.
    """
    ranks = _whole_number("LOCAL_WORLD_SIZE") or 1
    share = max(machine_cores() // ranks, 1)
    wanted = _whole_number("OMP_NUM_THREADS")
    return share if wanted is None or (ranks > 1 and wanted == 1) else min(share, wanted)


def machine_cores() -> int:
    """The same for all processes of this machine that are under the same limits, whatever OMP_NUM_THREADS says."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(math.floor(min(bound, cpu_quota(ROOT))), 1)


def cpu_quota(root: Path) -> float:
    """CPU seconds a second that the control groups of this process, and those above them, allow; inf where none limits it.

    root: the directory that /proc and the mounted hierarchies are looked for in.
    """
    return min((_quota_of(directory) for directory in _groups(root)), default=math.inf)


def _groups(root: Path) -> Iterator[Path]:
    """The directories of the process's groups for CPU time, version 1 and 2, each up to where its hierarchy is mounted.

    In a container the mounted part may begin at the container's own group, or leave it out: then only what can be seen counts.
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
    """(controller, group) of /proc/self/cgroup; the controller of version 2 is ""."""
    for line in lines:
        controllers, _, group = line.partition(":")[2].partition(":")
        for controller in controllers.split(","):
            yield controller, group


def _quota_of(directory: Path) -> float:
    """That of one group; inf where it has none, or none that can be read."""
    both = " ".join(_lines(directory / "cpu.max")[:1]).split()  # version 2: "150000 100000", or "max 100000"
    both = both or [" ".join(_lines(directory / f"cpu.cfs_{name}_us")[:1]) for name in ("quota", "period")]
    try:
        quota, period = map(float, both)
    except ValueError:
        return math.inf
    return quota / period if quota > 0 and period > 0 else math.inf  # version 1 says -1 for none


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _unescaped(text: str) -> str:
    """A path of mountinfo, where a space is \\040."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _whole_number(name: str) -> int | None:
    """That variable of the environment, its first number where it is a list; None where it is none, or less than 1."""
    text = os.environ.get(name, "").split(",")[0].strip()
    return int(text) if text.isascii() and text.isdigit() and int(text) > 0 else None


def engine_threads(num_envs: int) -> dict[str, int]:
    """Arguments for the threads of EnvPool or ALE, which by themselves start one for each core of the machine.

    Where this process may use all cores they are tied to them. Left to itself Linux now and then runs two of them on one core
    while another is idle: EnvPool's HalfCheetah on two cores 15,000 steps/s, tied 18,100; beside one busy process 11,900 and
    12,400, beside two no difference (benchmarks/LOG.md). With fewer threads than cores several runs would all be tied to the
    same ones. Where it may use only some cores there are only so many threads, tied to none.
    """
    cores, on_machine = available_cores(), os.cpu_count() or 1
    if cores < on_machine:
        return {"num_threads": min(num_envs, cores)}
    return {"thread_affinity_offset": 0} if sys.platform == "linux" and num_envs >= cores else {}
