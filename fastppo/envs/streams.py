"""The three global random generators of a process: Python's `random`, `numpy.random` and torch's, where it is loaded.

An environment should draw from its own `np_random`, but many draw from these. In the user's process they are never seeded, and
the checks before training restore them. Another process that runs environments has streams of its own, seeded from the seed of
its first environment. Does not import torch.
"""

import contextlib
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fastppo.random_streams import Stream


def seed_streams(entropy: int | Sequence[int]) -> None:
    """Seed the three generators of this process, independently of each other and of other generators seeded with `entropy`."""
    for_random, for_numpy, for_torch = np.random.SeedSequence(entropy, spawn_key=(Stream.WORKER,)).spawn(3)
    random.seed(int.from_bytes(for_random.generate_state(8).tobytes(), "little"))
    np.random.seed(for_numpy.generate_state(8))
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.default_generator.manual_seed(int(for_torch.generate_state(1, np.uint64)[0]) >> 1)


def states_of_streams() -> dict[str, Any]:
    """The states of the generators by name."""
    states: dict[str, Any] = {"random": random.getstate(), "np.random": np.random.get_state()}
    torch = sys.modules.get("torch")
    if torch is not None:
        states["torch"] = torch.default_generator.get_state()
    return states


def draw_from_streams() -> None:
    """Draw a number from each generator, so that their states change."""
    random.random()
    np.random.random_sample()
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.rand(1, generator=torch.default_generator, device="cpu")


def set_streams(states: dict[str, Any]) -> None:
    """Restore the states that `states_of_streams` returned."""
    random.setstate(states["random"])
    np.random.set_state(states["np.random"])
    if "torch" in states:
        sys.modules["torch"].default_generator.set_state(states["torch"])


def moved_streams(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of the generators that were drawn from between two calls of `states_of_streams`."""
    moved = []
    for name, state in before.items():
        if name == "torch":
            same = bool((state == after[name]).all())
        elif name == "np.random":
            same = state[2:] == after[name][2:] and bool((state[1] == after[name][1]).all())
        else:
            same = state == after[name]
        if not same:
            moved.append(name)
    return moved


@contextlib.contextmanager
def untouched_streams() -> Iterator[None]:
    """Restore the states of the generators at the end."""
    before = states_of_streams()
    try:
        yield
    finally:
        set_streams(before)
