"""Reset and step an environment before training: seeds, random streams, masks, autoreset. A part of envs/check.py."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Tuple
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from fastppo.core.action_masks import choices_of, leaf_spaces
from fastppo.core.space_rules import NO_BOUND
from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.envs.check_calls import CallChecker, RefusedError
from fastppo.envs.check_ends import ACTION_COUNTS, NOT_DECLARED, FinalObs, NextAction, action_like, arrays_of, leaves, numbers
from fastppo.envs.streams import draw_from_streams, moved_streams, states_of_streams
from fastppo.errors import EnvironmentFailed, brief, located
from fastppo.random_streams import Stream, seed_of

STEPS = 32  # random steps, at most
SECONDS = 0.5  # no more steps or resets after that long; gymnasium's checker is left out where it would take longer
SEED = 123
OTHER_SEEDS = range(1000, 1008)  # several, since two environments that toss a coin start alike in half of the resets


@dataclass(frozen=True)
class TrialResult:
    """What resets and steps have shown."""

    reset: float  # seconds
    step: float  # seconds of the slowest
    masked: bool  # whether actions are masked
    mask_size: int | None  # numbers in the info's action_mask; None: there is none
    varies: bool  # it is known to start in different states
    repeats: bool  # two resets with one seed started alike
    episode_length: float  # transitions for each end of an episode; inf: none ended


def run_trial(envs: VectorEnv, checker: CallChecker, seeded: bool, num_envs: int = 0) -> TrialResult | None:
    """Reset and step `envs`, whose calls `checker` checks; None where an error among the findings ended the trial.

    num_envs: of the run, where `envs` is one copy.
    """
    try:
        return _resets_and_steps(AutoresetEnvs(envs), checker, seeded, num_envs)
    except RefusedError:
        return None
    except EnvironmentFailed as error:  # breaks the rules of envs/autoreset.py
        checker.error("raises", brief(error))
        return None
    except Exception as error:  # raised by the class that steps N environments as one
        checker.error("raises", f"{located(error)} {checker.when}")
        return None


def _resets_and_steps(envs: AutoresetEnvs, checker: CallChecker, seeded: bool, num_envs: int) -> TrialResult:
    streams = states_of_streams()
    started = time.perf_counter()
    space = envs.envs.single_observation_space
    obs, mask = envs.reset_and_mask(SEED if seeded else None)
    mask_size = None if mask is None else math.prod(mask.shape[1:])
    reset_seconds, varies, repeats = time.perf_counter() - started, False, True
    drawn_from, seeded_by_env = set(moved_streams(streams, states_of_streams())), set[str]()
    if seeded and reset_seconds < SECONDS:
        first, streams = arrays_of(obs, space), states_of_streams()
        draw_from_streams()
        again = time.perf_counter()
        obs, mask = envs.reset_and_mask(SEED)
        reset_seconds = time.perf_counter() - again  # without the work of the first reset
        seeded_by_env = set(streams) - set(moved_streams(streams, states_of_streams()))
        repeats = _equal(first, arrays_of(obs, space))
        varies = not repeats
        if varies:
            checker.warn(
                "seed", "reset with the same seed twice gave two different first observations: runs cannot be repeated"
            )
        if envs.num_envs > 1 and _alike(first):
            _check_seeds_differ(envs, checker, first, started)
            obs, mask = envs.reset_and_mask(SEED)
        elif num_envs > 1 and not varies:
            varies = _copy_varies(envs, checker, first, num_envs, started)
            obs, mask = envs.reset_and_mask(SEED)
    streams = states_of_streams()
    step_seconds, masked, episode_length = _steps(envs, checker, seeded, obs, mask)
    drawn_from |= set(moved_streams(streams, states_of_streams()))
    _warn_of_streams(envs, checker, drawn_from - seeded_by_env)
    return TrialResult(reset_seconds, step_seconds, masked, mask_size, varies, repeats, episode_length)


def _steps(envs: AutoresetEnvs, checker: CallChecker, seeded: bool, obs: Any, mask: Any) -> tuple[float, bool, float]:
    """Random steps from `obs` and `mask` on. Returns the slowest's seconds, whether actions are masked, episodes' length."""
    space, single = envs.envs.single_observation_space, envs.envs.single_action_space
    actions = batch_space(sampled_space(single), envs.num_envs)
    actions.seed(seed_of(SEED, Stream.CHECK_ACTIONS))
    rng = np.random.default_rng(seed_of(SEED, Stream.CHECK_MASKS))
    done, masked, step_seconds = np.zeros(envs.num_envs, bool), False, 0.0
    started, transitions, ends = time.perf_counter(), 0, 0
    final, following = FinalObs(space), NextAction(envs)
    for _ in range(STEPS):
        in_obs = obs.get("action_mask") if isinstance(obs, Mapping) else None
        legal = numbers(mask if in_obs is None else in_obs)
        masked |= legal is not None
        action = (
            actions.sample()
            if legal is None
            else _legal(actions.sample(), single, legal.reshape(envs.num_envs, -1) != 0, done, rng, checker)
        )
        began = time.perf_counter()
        step = envs.step(action_like(action, next(leaves(obs, space))))
        step_seconds = max(step_seconds, time.perf_counter() - began)
        following.look(action, step, done)
        obs, mask = step.obs, step.action_mask
        reward, terminated, truncated = (np.asarray(numbers(x)) for x in (step.reward, step.terminated, step.truncated))
        ended = (terminated != 0) | (truncated != 0)
        transitions, ends = transitions + int((~done).sum()), ends + int((ended & ~done).sum())
        if step.final_obs is not None:
            CallChecker(space, (envs.num_envs,), checker.found, "at an end").obs(step.final_obs, space, "final observation")
            checker.refuse()
        if envs.mode is AutoresetMode.SAME_STEP and (line := final.look(checker.last[0], checker.last[-1], ended)) is not None:
            checker.error("final_obs", line)
            checker.refuse()
        if envs.mode is AutoresetMode.NEXT_STEP and (done & (ended | (reward != 0))).any():
            checker.warn(
                "autoreset",
                "the step after an end paid a reward or ended again: with autoreset_mode NEXT_STEP it only resets, and is not "
                "learned from; declare metadata['autoreset_mode'] SAME_STEP or DISABLED if that is what the class does",
            )
        done = ended & (envs.mode is AutoresetMode.NEXT_STEP)
        if time.perf_counter() - started > SECONDS:
            break
    if (line := final.suspicion()) is not None:
        checker.warn("final_obs", line)
    if not envs.is_declared:
        if not following.is_known or masked or not seeded:
            checker.warn("not declared", NOT_DECLARED)
        elif following.counts(SEED, SECONDS):
            checker.found.pop("autoreset", None)  # it has the same cause
            checker.error("autoreset", ACTION_COUNTS)
    return step_seconds, masked, transitions / ends if ends else math.inf


def sampled_space(space: gym.Space[Any]) -> gym.Space[Any]:
    """An action space to sample from: bounds beyond NO_BOUND become infinite, since gymnasium cannot sample up to float64's."""
    if isinstance(space, Dict):
        return Dict([(name, sampled_space(part)) for name, part in space.spaces.items()])
    if isinstance(space, Tuple):
        return Tuple([sampled_space(part) for part in space.spaces])
    if not isinstance(space, Box) or space.dtype.kind != "f":
        return space
    low, high = (
        np.where(np.abs(bound.astype(np.float64)) < NO_BOUND, bound, np.copysign(np.inf, bound))
        for bound in (space.low, space.high)
    )
    return Box(low, high, dtype=space.dtype.type)


def _warn_of_streams(envs: AutoresetEnvs, checker: CallChecker, drawn_from: set[str]) -> None:
    if drawn_from:
        checker.found.pop("seed", None)  # this is the cause
        # functions on tensors get random numbers as an argument (envs/device.py)
        on_device = hasattr(getattr(envs.envs.unwrapped, "env", None), "num_random")
        checker.warn(
            "streams",
            f"it draws from {' and '.join(sorted(drawn_from))}, which --seed does not reach, so a run cannot be repeated: "
            + ("use the argument random" if on_device else "draw from self.np_random"),
        )


def _check_seeds_differ(envs: AutoresetEnvs, checker: CallChecker, first: list[NDArray[Any]], started: float) -> None:
    """All environments started alike: warn if other seeds start otherwise, since each then lacks random numbers of its own."""
    differs = False
    for seed in OTHER_SEEDS:
        if time.perf_counter() - started > SECONDS:
            return
        other = arrays_of(envs.reset_and_mask(seed)[0], envs.envs.single_observation_space)
        if not _alike(other):
            return
        differs |= not _equal(first, other)
    if differs:
        checker.warn(
            "alike", f"all {envs.num_envs} environments start alike whatever the seed: each needs random numbers of its own"
        )


def _copy_varies(envs: AutoresetEnvs, checker: CallChecker, first: list[NDArray[Any]], num_envs: int, started: float) -> bool:
    """Whether one environment starts in different states under the seeds that environments of a run would have."""
    differs, space = False, envs.envs.single_observation_space
    for seed in (SEED, *OTHER_SEEDS):
        if time.perf_counter() - started > SECONDS:
            return differs
        one = first if seed == SEED else arrays_of(envs.reset_and_mask(seed)[0], space)
        if not _equal(one, arrays_of(envs.reset_and_mask(seed + 1)[0], space)):
            return True
        differs |= not _equal(first, one)
    if differs:
        checker.warn(
            "alike", f"all {num_envs} environments start alike whatever the seed: each needs random numbers of its own"
        )
    return differs


def _equal(one: list[NDArray[Any]], other: list[NDArray[Any]]) -> bool:
    return all(map(np.array_equal, one, other))


def _alike(arrays: list[NDArray[Any]]) -> bool:
    """Whether all environments have the same observation; arrays (N, ...)."""
    return all((array == array[:1]).all() for array in arrays)


def _legal(
    actions: Any,
    space: gym.Space[Any],
    mask: NDArray[np.bool_],
    done: NDArray[np.bool_],
    rng: np.random.Generator,
    checker: CallChecker,
) -> Any:
    """`actions`, samples (N, ...), with random choices that `mask`, (N, A), allows; any where it allows none, as at an end."""
    parts = np.split(mask, np.cumsum(choices_of(space))[:-1], axis=-1)
    if any((~part.any(-1) & ~done).any() for part in parts):
        checker.warn("mask", "action_mask allows no action in the middle of an episode")
    chosen = iter([((1.0 + rng.random(part.shape)) * part).argmax(-1) for part in parts])
    for batch, leaf in zip(leaves(actions, space), leaf_spaces(space), strict=True):
        choices = [next(chosen) for _ in choices_of(leaf)]
        if choices:
            batch[...] = np.stack(choices, -1).reshape(batch.shape) + getattr(leaf, "start", 0)
    return actions
