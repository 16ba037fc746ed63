"""Settings that are legal alone and not together. Each check raises UsageError with the flags and the nearest legal values."""

import math
from typing import TYPE_CHECKING

from fastppo.bounds import flag
from fastppo.errors import UsageError

if TYPE_CHECKING:
    from fastppo.config import TrainConfig

MAX_BATCH_SIZE = 2**31 - 1
MAX_LOG_STD = 2.0  # of policy.distributions.LOG_STD_RANGE, which would cost torch


def check_combinations(config: "TrainConfig") -> None:
    """All checks of one run's settings."""
    if config.clip_reward and config.norm_reward:
        raise UsageError("--clip-reward and --norm-reward both set the scale of rewards: choose one")
    if config.desired_kl is not None and config.anneal_lr:
        raise UsageError("--desired-kl and --anneal-lr both change the learning rate: choose one (--no-anneal-lr)")
    if config.backend in ("torch", "envpool") and config.vectorization != "auto":
        raise UsageError(
            f"--vectorization {config.vectorization} is for --backend gymnasium; "
            f"{config.backend} steps all at once: leave it off"
        )
    if config.env_halves == "on":
        _check_halves(config)
    config.preprocessing.wrappers  # noqa: B018  # raises UsageError
    for name in config.preprocessing.flags if config.backend in ("torch", "envpool") else ():
        raise UsageError(
            f"{name} wraps environments one by one, and --backend {config.backend} steps all at once: "
            "leave it off, or use --backend gymnasium"
        )
    if config.max_episode_steps is not None and "max_episode_steps" in config.env_kwargs:
        raise UsageError("--max-episode-steps and --env-kwargs max_episode_steps are the same time limit: give one of them")
    if config.eval_every is not None and config.eval_episodes == 0:
        raise UsageError(f"--eval-every {config.eval_every} plays --eval-episodes episodes each time: set that to at least 1")
    if config.policy is not None and config.rnn is not None:
        raise UsageError(f"--rnn {config.rnn} is a part of our networks, and --policy is a whole one of yours: leave it off")
    if config.action_distribution == "beta" and config.squash_actions:
        raise UsageError("--squash-actions: --action-distribution beta is within the bounds already: leave it off")
    if config.action_distribution == "normal-state-std" and config.log_std_init > MAX_LOG_STD:
        raise UsageError(
            f"--log-std-init {config.log_std_init:g}: --action-distribution normal-state-std clamps it; "
            f"nearest: --log-std-init {MAX_LOG_STD:g}"
        )
    if config.action_distribution != "gsde" and config.sde_sample_freq is not None:
        raise UsageError(f"--sde-sample-freq {config.sde_sample_freq} is for --action-distribution gsde: leave it off")
    if config.bf16 and config.action_distribution == "gsde":
        raise UsageError("--bf16 would round the variances of --action-distribution gsde: leave it off (--tf32 works with it)")
    if config.bf16 and config.rnn is not None:
        raise UsageError(
            f"--bf16 is for networks without memory: with --rnn {config.rnn} leave it off (--tf32 works with both)"
        )
    if config.num_seeds > 1:
        _check_seeds(config)
    _check_minibatches(config)
    if config.preset not in ("none", "auto"):
        from fastppo.find_preset import check_applied  # here: presets are made of settings

        check_applied(config)


def _check_halves(config: "TrainConfig") -> None:
    """What is known before the environments are made; the rest: envs/factory.py."""
    if config.num_seeds > 1:
        raise UsageError(f"--env-halves on is for one seed: with --num-seeds {config.num_seeds} leave it off")
    if config.num_envs % 2:
        nearest = f"{config.num_envs - 1} or {config.num_envs + 1}" if config.num_envs > 1 else "2"
        raise UsageError(f"--env-halves on needs an even --num-envs, got {config.num_envs}; nearest: --num-envs {nearest}")
    if config.backend == "torch":
        raise UsageError("--env-halves on is for environments on the host, and --backend torch has none: leave it off")
    if config.vectorization in ("sync", "entry-point"):
        raise UsageError(
            f"--env-halves on: --vectorization {config.vectorization} steps environments while the policy waits; "
            "use --vectorization grouped, or leave it off"
        )


def _check_seeds(config: "TrainConfig") -> None:
    if config.track is not None:
        raise UsageError(f"--track {config.track} follows one run: with --num-seeds {config.num_seeds} leave it off")
    if config.exact_resume:
        raise UsageError(
            f"--exact-resume is for one seed: with --num-seeds {config.num_seeds} leave it off "
            "(environments of --backend torch resume exactly without it)"
        )
    if config.batch_size * (config.update_epochs or 1) * config.num_seeds > MAX_BATCH_SIZE:
        raise UsageError(
            f"--num-seeds {config.num_seeds} times {config.update_epochs} epochs of {config.batch_size} rows must be at most "
            f"{MAX_BATCH_SIZE}"
        )


def _check_minibatches(config: "TrainConfig") -> None:
    batch_size = config.batch_size
    sizes = f"--num-envs {config.num_envs} x --num-steps {config.num_steps}"
    sizes += f" x --num-agents {config.num_agents}" if config.num_agents else ""
    if batch_size > MAX_BATCH_SIZE:
        raise UsageError(f"{sizes} must be at most {MAX_BATCH_SIZE}")
    name = "minibatch_size" if config.minibatch_size else "num_minibatches"
    value = config.minibatch_size or config.num_minibatches
    if config.rnn is not None:
        _check_sequences(config, name, value)
    if batch_size % value:
        raise UsageError(
            f"{flag(name)} {value} does not divide the batch of {batch_size} ({sizes}); "
            f"nearest that do: {_neighbours(value, divisors(batch_size))}"
        )
    if config.norm_adv and batch_size // config.minibatches_per_epoch < 2:
        raise UsageError("--norm-adv needs minibatches of at least 2 rows: lower --num-minibatches or set --no-norm-adv")
    if batch_size * (config.update_epochs or 1) > MAX_BATCH_SIZE:
        raise UsageError(
            f"--update-epochs {config.update_epochs} times the batch of {batch_size} must be at most {MAX_BATCH_SIZE}; "
            f"largest --update-epochs: {MAX_BATCH_SIZE // batch_size}"
        )


def _check_sequences(config: "TrainConfig", name: str, value: int) -> None:
    """With a recurrent network minibatches are of whole sequences."""
    rows = 1 if name == "num_minibatches" else config.num_steps
    legal = [rows * number for number in divisors(config.num_rows)]
    if value not in legal:
        sequences = f"--num-envs {config.num_envs}" + (f" x --num-agents {config.num_agents}" if config.num_agents else "")
        raise UsageError(
            f"{flag(name)} {value}: --rnn {config.rnn} learns from whole sequences, so minibatches must divide {sequences}; "
            f"nearest that do: {flag(name)} {_neighbours(value, legal)}"
        )


def divisors(number: int) -> list[int]:
    """All of them, in order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def _neighbours(value: int, legal: list[int]) -> str:
    """'4 or 8': the legal numbers next to a value, below and above."""
    below = [number for number in legal if number < value][-1:]
    above = [number for number in legal if number > value][:1]
    return " or ".join(map(str, below + above))
