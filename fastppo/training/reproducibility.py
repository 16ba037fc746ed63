"""Versions, device and threads of a run, and what can be reproduced with them. Printed and recorded in summary.json."""

import platform
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("fastppo", "torch", "gymnasium", "numpy", "tensordict")
# packages of environments, by the module that is imported when they are used
ENGINES = {"mujoco": "mujoco", "ale_py": "ale-py", "envpool": "envpool", "Box2D": "box2d", "torchrl": "torchrl"}


version_of = cache(version)  # 0.8 ms a call, and each checkpoint asks for five or more


def versions() -> dict[str, str]:
    """Versions of Python and of all packages that affect the results."""
    packages = [*PACKAGES, *(package for module, package in ENGINES.items() if module in sys.modules)]
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version_of(package)
        except PackageNotFoundError:  # a module that no installed package provides
            found[package] = "unknown"
    return found


def made_with(device: torch.device, eager_threads: int, compiled_threads: int) -> dict[str, str]:
    """Facts that can change bits of the result, apart from settings, environment and versions."""
    return {
        "device": str(device),
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "eager threads": str(eager_threads),
        "compiled threads": str(compiled_threads),
    }


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """The changed entries as 'torch 2.12 -> 2.13, device cpu -> cuda', or None."""
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return ", ".join(f"{key} {before.get(key, 'none')} -> {now.get(key, 'none')}" for key in changed) or None


def guarantees(device: torch.device, tier_may_change: bool, exact: bool, threads_may_change: bool = False) -> list[str]:
    """Lines on how closely the same settings reproduce the run.

    Args:
        tier_may_change: the run may switch from eager to fused or compiled programs.
        exact: a run that was stopped and resumed equals an uninterrupted run.
        threads_may_change: the run may reduce its threads if the machine becomes busy.
    """
    changes, cures = [], []
    if tier_may_change:
        changes.append("the run changes to faster programs")
        cures.append("--compile on or off")
    if threads_may_change:
        changes.append("the run takes fewer threads because the machine is busy")
        cures.append("--num-threads")
    if device.type != "cpu":
        again = "same seed: statistically the same results, not the same bits, since sums on a GPU have no fixed order"
    elif changes:
        again = f"same seed: the same bits until {', or '.join(changes)} (always with {' and '.join(cures)})"
    else:
        again = "same seed: the same bits"
    needs = (
        "with the versions, processor and thread counts in summary.json, if the environment repeats itself after reset(seed)"
    )
    resumed = (
        "the same as without the stop"
        if exact
        else "new episodes, so other bits than without the stop (the same with --exact-resume)"
    )
    return [f"{again}, {needs}", f"stopped and resumed: {resumed}"]
