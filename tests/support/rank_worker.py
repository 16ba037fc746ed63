"""What each of several processes of tests/test_ranks.py does: what it finds lies in a file afterwards.

The last rank dies within an all-reduce at the end, and the others report what they saw.
"""

import functools
import os
import time

import numpy as np
import torch

from fastppo.core.adam import init_adam
from fastppo.core.contracts import Normalization
from fastppo.core.minibatches import draw_permutation
from fastppo.core.ppo import learn
from fastppo.errors import TrainingFault
from fastppo.policy.distributions import CATEGORICAL, DIAGONAL_NORMAL
from fastppo.policy.mlp import MLPActorCritic
from fastppo.policy.normalization import init_moments, update_moments
from fastppo.ranks import Ranks, start_ranks
from support.learn_settings import coefficients, learn_settings, split

T, N, M, E, STRATA = 8, 8, 32, 3, 4
CASES = {
    "gae": (CATEGORICAL, {"target_kl": 0.005}),
    "monte-carlo": (DIAGONAL_NORMAL, {"advantage_estimator": "monte-carlo", "norm_returns": True, "clip_vloss": False}),
    "final_obs": (DIAGONAL_NORMAL, {"norm_adv": False, "microbatch_size": 4}),
}
ALONE = Ranks()
SIZES = (1, 7, 9155, 100_003)


def job(name):
    """A rollout of all environments, of which the last two make no transition: (policy, settings, params, rollout)."""
    distribution, settings = CASES[name]
    generator = torch.Generator().manual_seed(len(name))
    policy = MLPActorCritic(3, 4, distribution, (16, 16))
    shape = (T + 1, N)
    terminated, truncated = torch.rand((2, *shape), generator=generator) < 0.1
    valid = torch.ones(shape, dtype=torch.bool)
    valid[1:] = ~(terminated | truncated)[:-1]
    valid[:, -2:] = False
    rollout = {
        "obs": torch.randn(*shape, 3, generator=generator),
        "action": torch.randint(4, shape, generator=generator)
        if distribution is CATEGORICAL
        else torch.randn(*shape, 4, generator=generator),
        "reward": torch.randn(shape, generator=generator) + torch.arange(N),
        "terminated": terminated,
        "truncated": truncated,
        "valid": valid,
    }
    if name == "final_obs":
        rollout["final_obs"] = torch.randn(*shape, 3, generator=generator)
    return policy, settings, policy.init(generator), rollout


def update(name, ranks=ALONE):
    """`learn` of one rank's part of the job."""
    policy, given, params, rollout = job(name)
    rollout = {key: ranks.share(x, 1) for key, x in rollout.items()}
    permutation = torch.empty(E, T * N // ranks.size, dtype=torch.int64)
    draw_permutation(permutation, torch.Generator().manual_seed(1), T, N, M, STRATA, ranks.rank, ranks.size)
    numbers, given = split(given)
    normalization = Normalization(None, None, None, torch.tensor(0.2), torch.tensor(1.5))
    settings = {"minibatch_size": M // ranks.size, **given, **ranks.learn_settings()}
    program = functools.partial(learn, policy=policy, **learn_settings(**settings))
    return program(params, init_adam(params), rollout, permutation, coefficients(learning_rate=0.02, **numbers), normalization)


def numbers(size, rank):
    """Of very different magnitudes: sums in another order have other bits."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(size, generator=generator) * 10.0 ** torch.randint(-4, 5, (size,), generator=generator)


def rows():
    """(rows, weights) to take moments of: (40, 3) a million sigmas from 0, and weights that leave the last ten out."""
    generator = torch.Generator().manual_seed(3)
    weight = (torch.rand(40, generator=generator) < 0.7).double()
    weight[-10:] = 0.0
    return 1e6 + torch.randn(40, 3, generator=generator, dtype=torch.float64), weight


def work(args):
    """`args`: the path of the file."""
    (path,) = args
    torch.set_num_threads(1)
    ranks = start_ranks(torch.device("cpu"), timeout=60.0)
    found = {"threads": torch.get_num_threads(), "rank": ranks.rank, "is_main": ranks.is_main}
    torch.set_num_threads(1)
    for name in CASES:
        found[name] = tuple(update(name, ranks))
    found["sums"] = [ranks.all_reduce(numbers(size, ranks.rank)) for size in SIZES]
    x, weight = rows()
    moments = init_moments((3,))
    for _ in range(2):  # from nothing, and from something
        moments = update_moments(moments, ranks.share(x), ranks.share(weight), ranks.total)
    found["moments"] = tuple(moments)
    whole = torch.arange(24).reshape(3, 8)
    shares = {"int": whole, "bool": whole % 3 == 0, "float": whole.double(), "numpy": whole.numpy() % 5 == 0}
    found["gathered"] = {name: ranks.gather(ranks.share(x, 1), 1) for name, x in shares.items()}
    assert isinstance(found["gathered"]["numpy"], np.ndarray)
    found["agreed"] = ranks.agree({"run_dir": f"of {ranks.rank}"})
    found["highest"] = ranks.highest(15 if ranks.rank == ranks.size - 1 else 0, -ranks.rank)
    ranks.barrier()
    if ranks.rank == ranks.size - 1:
        torch.save(found, path)
        os._exit(9)
    started = time.monotonic()
    try:
        while True:
            ranks.all_reduce(torch.ones(100_000))
    except TrainingFault as fault:
        found["fault"], found["seconds"] = str(fault), time.monotonic() - started
    torch.save(found, path)
    ranks.close()
