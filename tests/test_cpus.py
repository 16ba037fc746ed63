"""How many cores there are to use: affinity, CPU quotas of both versions of control groups, OMP_NUM_THREADS, torchrun."""

import math
import os

import pytest
import torch

from fastppo.envs.factory import EnvConfig, choose_vectorization, num_processes
from fastppo.ranks import threads_per_rank
from fastppo.system import cpus
from fastppo.system.cpus import available_cores, cpu_quota, engine_threads, machine_cores
from fastppo.training import setup

V1 = "32 31 0:29 {top} {mount} rw,relatime - cgroup cgroup rw,cpu,cpuacct"
V2 = "30 23 0:26 {top} {mount} rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"
OTHERS = [
    "23 1 259:1 / / rw,relatime - ext4 /dev/root rw",
    "31 23 0:28 / /sys/fs/cgroup ro - tmpfs tmpfs ro,mode=755",
    "33 31 0:30 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset",
    "a line that nobody knows",
]


def machine(tmp_path, mounts, groups, quotas):
    """A directory like /, with these mounts, the process's groups, and files under the mounted hierarchies."""
    proc = tmp_path / "proc/self"
    proc.mkdir(parents=True)
    (proc / "mountinfo").write_text("\n".join([*OTHERS, *mounts]) + "\n")
    (proc / "cgroup").write_text("\n".join(groups) + "\n")
    for path, text in quotas.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def v2(tmp_path, quotas, group="/", top="/", mount="/sys/fs/cgroup"):
    """A machine with version 2 alone. quotas: cpu.max by group below the mount."""
    files = {f"{mount.lstrip('/')}/{name}/cpu.max": text for name, text in quotas.items()}
    return machine(tmp_path, [V2.format(top=top, mount=mount.replace(" ", r"\040"))], [f"0::{group}"], files)


def v1(tmp_path, quotas, group="/", top="/", mount="/sys/fs/cgroup/cpu,cpuacct"):
    """A machine with version 1, and version 2 beside it without a controller."""
    files = {}
    for name, (quota, period) in quotas.items():
        files[f"{mount[1:]}/{name}/cpu.cfs_quota_us"] = f"{quota}\n"
        files[f"{mount[1:]}/{name}/cpu.cfs_period_us"] = f"{period}\n"
    mounts = [V1.format(top=top, mount=mount), V2.format(top="/", mount="/sys/fs/cgroup/unified")]
    return machine(tmp_path, mounts, ["9:name=systemd:/x", "3:cpuset:/y", f"2:cpu,cpuacct:{group}", "0::/x"], files)


@pytest.mark.parametrize(
    ("make", "quota"),
    [
        (lambda at: v2(at, {"": "max 100000\n"}), math.inf),
        (lambda at: v2(at, {"": "150000 100000\n"}), 1.5),  # a container sees its own group as the root
        (lambda at: v2(at, {"a": "400000 100000", "a/b": "max 100000"}, "/a/b"), 4.0),
        (lambda at: v2(at, {"a": "300000 100000", "a/b": "800000 100000"}, "/a/b"), 3.0),
        (lambda at: v2(at, {"a": "800000 100000", "a/b": "25000 50000"}, "/a/b"), 0.5),
        (lambda at: v2(at, {"a/c": "100000 100000"}, "/a/b"), math.inf),  # somebody else's
        (lambda at: v2(at, {"": "200000 100000"}, "/docker/1", "/docker/1"), 2.0),
        (lambda at: v2(at, {"": "200000 100000", "in": "100000 100000"}, "/docker/1/in", "/docker/1"), 1.0),
        (lambda at: v2(at, {"": "200000 100000"}, "/", "/kubepods/pod1"), 2.0),  # mounted from above what we are told of
        (lambda at: v2(at, {"a": "200000 100000"}, "/a", mount="/mnt/a place"), 2.0),
        (lambda at: v2(at, {"": "nonsense"}), math.inf),
        (lambda at: v2(at, {"": ""}), math.inf),
        (lambda at: v2(at, {"": "0 0"}), math.inf),
        (lambda at: v1(at, {"": (-1, 100000)}), math.inf),
        (lambda at: v1(at, {"": (250000, 100000)}), 2.5),
        (lambda at: v1(at, {"a": (200000, 100000), "a/b": (-1, 100000)}, "/a/b"), 2.0),
        (lambda at: v1(at, {"a": (-1, 100000), "a/b": (50000, 100000)}, "/a/b"), 0.5),
        (lambda at: v1(at, {"": (300000, 100000)}, "/docker/1", "/docker/1"), 3.0),
        (lambda at: v1(at, {"": (0, 0)}), math.inf),
        (lambda at: machine(at, [], ["0::/"], {}), math.inf),
        (lambda at: machine(at, ["", "30 - cgroup2"], ["", "0", "0::"], {}), math.inf),
        (lambda at: at / "no such place", math.inf),  # macOS
    ],
)
def test_quotas(tmp_path, make, quota):
    """The least of the group's and of those above it, up to where the hierarchy is mounted; what cannot be read is none."""
    assert cpu_quota(make(tmp_path)) == quota


def test_both_versions_count(tmp_path):
    """A hybrid machine: the smaller one."""
    root = v1(tmp_path, {"": (300000, 100000)})
    unified = root / "sys/fs/cgroup/unified/x"
    unified.mkdir(parents=True)
    (unified / "cpu.max").write_text("200000 100000")
    assert cpu_quota(root) == 2.0


@pytest.fixture
def of(monkeypatch):
    """Sets what the machine has: cores(affinity, quota, **environment)."""

    def set_up(affinity=8, quota=math.inf, **environment):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(affinity)), raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: 8)
        monkeypatch.setattr(cpus, "cpu_quota", lambda root: quota)
        for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return set_up


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, 8),
        ({"affinity": 3}, 3),
        ({"quota": 1.5}, 1),
        ({"quota": 0.2}, 1),
        ({"quota": 2.0}, 2),
        ({"quota": 5.9, "affinity": 4}, 4),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "3,2"}, 3),
        ({"OMP_NUM_THREADS": "64"}, 8),
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "many"}, 8),
        ({"OMP_NUM_THREADS": "0"}, 8),
        ({"OMP_NUM_THREADS": ""}, 8),
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}, 4),  # torchrun's own
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "3"}, 3),
        ({"LOCAL_WORLD_SIZE": "16"}, 1),
        ({"LOCAL_WORLD_SIZE": "2", "quota": 3.0}, 1),
        ({"LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}, 1),
    ],
)
def test_the_least_counts(of, given, expected):
    """Whole cores, at least one."""
    of(**given)
    assert available_cores() == expected


def test_where_affinity_is_not_told(of, monkeypatch):
    """macOS and Windows: all cores of the machine."""
    of(quota=math.inf)
    monkeypatch.delattr(os, "sched_getaffinity")
    assert available_cores() == machine_cores() == 8
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cores() == 1


def test_everybody_asks_the_same(of, monkeypatch):
    """Processes of environments, the trial that chooses them, threads of eager and compiled programs, of ranks, of engines."""
    of(affinity=6, quota=3.5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    assert num_processes(8, None) == 3
    assert num_processes(8, 5) == 5
    assert setup.usable_threads() == 3
    assert threads_per_rank(1) == 3
    assert engine_threads(8) == {"num_threads": 3}
    assert engine_threads(2) == {"num_threads": 2}
    of(quota=1.9)
    assert choose_vectorization(EnvConfig("environments:Walk-v0", 8))[:2] == ("sync", "one core")
    of()
    assert engine_threads(8) == {"thread_affinity_offset": 0}
    assert engine_threads(7) == {}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # torch.set_num_threads(2) before training
    assert setup.usable_threads() == 2
