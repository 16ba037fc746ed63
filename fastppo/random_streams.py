"""Where the seeds of all random numbers come from: each consumer of a run's --seed has a stream of its own. Costs no torch.

Two generators with one seed draw the same numbers, so no two consumers may be given the same. `seed_of` hashes the run's seed
with what the numbers are for. Spawn keys keep (seed, stream, ...) apart from (seed, stream', ...): without them SeedSequence
fills up with zeros, and SeedSequence(5) is SeedSequence([5, 0]).
"""

from enum import IntEnum

import numpy as np

# Environments take seeds of 31 bits (C's int), and gymnasium gives environment i of N the seed + i: there is room for that.
ENVIRONMENT_SEEDS = 2**31 - 2**20


class Stream(IntEnum):
    """What random numbers are for. The numbers are part of every seed: append, and never change or reuse one."""

    PARAMETERS = 0
    ACTIONS = 1  # of training
    MINIBATCHES = 2
    ENVIRONMENTS = 3  # of training; index: the iteration that they are started at
    EVALUATION_ACTIONS = 4
    EVALUATION_ENVIRONMENTS = 5
    VIDEO_ACTIONS = 6  # of `evaluate --video`
    VIDEO_ENVIRONMENT = 7
    RECORDED_ENVIRONMENT = 8  # of --record-every
    CONTINUED = 9  # a generator that cannot go on where it was; index: the iteration it starts anew at
    CHECK_ACTIONS = 10
    CHECK_MASKS = 11
    PROBE_ACTIONS = 12
    PROBE_ENVIRONMENTS = 13
    SWEEP_SAMPLER = 14
    WORKER = 15  # the global generators of a process that runs environments; the seed is that of its first environment


def seed_of(seed: int, stream: Stream, *indices: int) -> int:
    """The seed of a stream, in [0, 2**63): for a torch.Generator, or numpy's.

    Args:
        seed: of the run, at least 0.
        indices: of one of several streams for the same purpose, each at least 0.
    """
    (number,) = np.random.SeedSequence(seed, spawn_key=(stream, *indices)).generate_state(1, np.uint64)
    return int(number) % 2**63


def environment_seed(seed: int, stream: Stream, *indices: int) -> int:
    """The seed of N environments, in [0, 2**31 - 2**20): environment i has this + i. Arguments as `seed_of`'s.

    Those of two runs are far apart, also where the runs' own seeds are s and s + 1.
    """
    return seed_of(seed, stream, *indices) % ENVIRONMENT_SEEDS
