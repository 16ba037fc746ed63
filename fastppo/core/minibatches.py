"""The order of a rollout's transitions in minibatches. Knows nothing of what is done with them.

Letters: T num_steps, N num_envs, B = T * N, M minibatch size, L = B / M minibatches an epoch, E update epochs, G shards,
K processes. Rows of a rollout are numbered t * N + n, as its (T, N) is flattened.
"""

import torch
from torch import Tensor


def draw_permutation(
    out: Tensor,
    generator: torch.Generator,
    num_steps: int,
    num_envs: int,
    minibatch_size: int,
    num_shards: int = 1,
    rank: int = 0,
    num_ranks: int = 1,
) -> None:
    """Fill `out` with an order of all rows for each epoch. Parts of M / K rows are the minibatches.

    A shard is a group of N / G environments, in their order. Each minibatch takes M / G rows of each shard at random, so
    that processes with their own environments have equal parts of every minibatch. With one shard this is torch.randperm.

    Every process draws for all shards and uses the rows of its own. The generators of all processes have the same state before
    and after the call. With the same G the minibatches are the same for every K that divides it.

    Args:
        out: (E, B / K) int64. Written: rows of this process's own rollout (T, N / K). First come the M / G rows of its
            first shard in the first minibatch, then those of its second shard, then those of the second minibatch.
        num_envs, minibatch_size: N and M, of all processes together; G divides both, and K divides G.
        rank: of this process, in [0, K). It has the environments from rank * N / K on.
    """
    if num_shards == 1:  # 38 us for four epochs of 1024 rows; the general case takes 82
        for epoch in out.unbind(0):
            torch.randperm(num_steps * num_envs, generator=generator, device=generator.device, out=epoch)
        return
    envs = num_envs // num_shards
    own_envs, own_shards = num_envs // num_ranks, num_shards // num_ranks
    parts = out.view(len(out), -1, own_shards, minibatch_size // num_shards)  # (E, L, G / K, M / G)
    for epoch in parts.unbind(0):
        for shard in range(num_shards):
            row = torch.randperm(num_steps * envs, generator=generator, device=generator.device)  # t * N / G + n
            own = shard - rank * own_shards
            if 0 <= own < own_shards:
                if own_shards > 1:
                    row = row // envs * own_envs + own * envs + row % envs
                epoch[:, own] = row.view_as(epoch[:, own])
