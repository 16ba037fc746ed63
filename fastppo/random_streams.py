"""Seeds of all random generators: each use of random numbers has its own stream of the run's --seed. Costs no torch.

Two generators with the same seed draw the same numbers, so no two uses may share one. `seed_of` hashes the run's seed together
with the use. The use is a spawn key because SeedSequence pads its entropy with zeros: SeedSequence(5) equals
SeedSequence([5, 0]).
"""

from enum import IntEnum

import numpy as np

# Environments take seeds of 31 bits (C's int). gymnasium seeds environment i with seed + i, hence the margin.
ENVIRONMENT_SEEDS = 2**31 - 2**20


class Stream(IntEnum):
    """What random numbers are used for. The values are part of every seed: append new ones, never change or reuse one."""

    PARAMETERS = 0
    ACTIONS = 1  # of training
    MINIBATCHES = 2
    ENVIRONMENTS = 3  # of training; index: the iteration at which they start
    EVALUATION_ACTIONS = 4
    EVALUATION_ENVIRONMENTS = 5
    VIDEO_ACTIONS = 6  # of `evaluate --video`
    VIDEO_ENVIRONMENT = 7
    RECORDED_ENVIRONMENT = 8  # of --record-every
    CONTINUED = 9  # a generator whose state cannot be restored; index: the iteration at which it restarts
    CHECK_ACTIONS = 10
    CHECK_MASKS = 11
    PROBE_ACTIONS = 12
    PROBE_ENVIRONMENTS = 13
    SWEEP_SAMPLER = 14
    WORKER = 15  # global generators of an environment process; the seed is that of its first environment
    TRAINING_EVALUATION = 16  # of --eval-every: the same episodes every time, and others than those of the final evaluation
    NOVELTY = 17  # the weights of --rnd-coef's networks


def seed_of(seed: int, stream: Stream, *indices: int) -> int:
    """The seed of a stream, in [0, 2**63), for a generator of torch or numpy.

    Args:
        seed: of the run, at least 0.
        indices: tell several streams of the same use apart, each at least 0.
    """
    (number,) = np.random.SeedSequence(seed, spawn_key=(stream, *indices)).generate_state(1, np.uint64)
    return int(number) % 2**63


def environment_seed(seed: int, stream: Stream, *indices: int) -> int:
    """The seed of N environments, in [0, 2**31 - 2**20): environment i gets this + i. Arguments as for `seed_of`.

    Seeds of two runs are far apart, even if the runs' own seeds are s and s + 1.
    """
    return seed_of(seed, stream, *indices) % ENVIRONMENT_SEEDS
