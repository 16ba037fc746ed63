"""The three global random generators of a process: Python's `random`, `numpy.random` and torch's, where it is loaded.

An environment should draw from its own `np_random`, but many draw from these. In the user's process they are left as the user
has them: whatever is tried before training puts them back, and they are never seeded. A process that runs environments by
itself has streams of its own, which follow from the seed of its first environment. Costs no torch.
"""

import contextlib
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fastppo.random_streams import Stream


def seed_streams(entropy: int | Sequence[int]) -> None:
    """Seed the three generators of this process, each independently of the others and of whatever else `entropy` seeds."""
    for_random, for_numpy, for_torch = np.random.SeedSequence(entropy, spawn_key=(Stream.WORKER,)).spawn(3)
    random.seed(int.from_bytes(for_random.generate_state(8).tobytes(), "little"))
    np.random.seed(for_numpy.generate_state(8))
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.default_generator.manual_seed(int(for_torch.generate_state(1, np.uint64)[0]) >> 1)


def states_of_streams() -> dict[str, Any]:
    """Where the generators stand, by their name."""
    states: dict[str, Any] = {"random": random.getstate(), "np.random": np.random.get_state()}
    torch = sys.modules.get("torch")
    if torch is not None:
        states["torch"] = torch.default_generator.get_state()
    return states


def draw_from_streams() -> None:
    """A number from each, so that they stand elsewhere."""
    random.random()
    np.random.random_sample()
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.rand(1, generator=torch.default_generator, device="cpu")


def set_streams(states: dict[str, Any]) -> None:
    """Put the generators where `states_of_streams` found them."""
    random.setstate(states["random"])
    np.random.set_state(states["np.random"])
    if "torch" in states:
        sys.modules["torch"].default_generator.set_state(states["torch"])


def moved_streams(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The names of those that were drawn from in between."""
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
    """What is drawn within leaves no trace: the generators are then where they were before."""
    before = states_of_streams()
    try:
        yield
    finally:
        set_streams(before)
