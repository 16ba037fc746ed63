"""Settings in several processes: equal in all, and the part of each. Knows nothing of environments or networks."""

from dataclasses import fields, replace

from fastppo.bounds import flag
from fastppo.config import PATHS, TrainConfig
from fastppo.errors import UsageError
from fastppo.ranks import Ranks, check_shares


def check_same(config: TrainConfig, rank_zero: TrainConfig, ranks: Ranks) -> None:
    """Check that the settings equal those of rank 0. Raises UsageError."""
    for spec in fields(TrainConfig):
        own, other = getattr(config, spec.name), getattr(rank_zero, spec.name)
        is_path = spec.name in PATHS  # machines may mount it under different paths
        if own != other and not (is_path and own and other):
            raise UsageError(
                f"rank {ranks.rank} was started with {flag(spec.name)} {own}, rank 0 with {other}: "
                "give torchrun the same command on all machines"
            )


def with_shards(config: TrainConfig, ranks: Ranks) -> tuple[TrainConfig, str | None]:
    """`config` with its number of shards (core/minibatches.py), and a line if a resumed run changes that number.

    Raises UsageError if environments or minibatches cannot be split equally.
    """
    if ranks.size > 1 and config.num_seeds > 1:
        raise UsageError(
            f"--num-seeds {config.num_seeds} is for one process, and torchrun has started {ranks.size}: use one of them"
        )
    num_shards, note = config.minibatch_shards or ranks.size, None
    if config.resume and num_shards % ranks.size:
        note = f"minibatches have equal shares of {ranks.size} groups of environments from here on; before: of {num_shards}"
        num_shards = ranks.size
    rows, unit = config.rows_per_minibatch, config.rows_per_unit
    check_shares(config.num_envs, config.num_steps, rows, num_shards, ranks.size, unit)
    if config.env_halves == "on" and config.num_envs % (2 * ranks.size):
        raise UsageError(
            f"--env-halves on halves the {config.num_envs // ranks.size} environments of each of {ranks.size} processes: "
            f"--num-envs must be a multiple of {2 * ranks.size}"
        )
    return config if num_shards == 1 else replace(config, minibatch_shards=num_shards), note


def share_of(config: TrainConfig, ranks: Ranks) -> TrainConfig:
    """The settings of this process: N / K environments, M / K rows of a minibatch."""
    if ranks.size == 1:
        return config
    minibatch_size = None if config.minibatch_size is None else config.minibatch_size // ranks.size
    return replace(config, num_envs=config.num_envs // ranks.size, minibatch_size=minibatch_size)
