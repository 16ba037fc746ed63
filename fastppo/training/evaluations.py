"""Evaluations during training (--eval-every): the policy plays in environments of their own, with its likeliest actions.

Training is the same with and without them: these environments have seeds of their own, and no generator of the run is used.
Every evaluation plays the same episodes, so that policies are compared by what they do. Knows nothing of what follows from one.
"""

import contextlib
from collections.abc import Callable

import torch
from gymnasium.vector import VectorEnv

from fastppo.analysis.evaluation import EvaluationResult, evaluation_envs, most_steps, play_episodes, time_limit
from fastppo.bounds import flag
from fastppo.config import TrainConfig
from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.envs.deadline import Deadline
from fastppo.envs.render import make_render_env
from fastppo.envs.streams import untouched_streams
from fastppo.errors import ENVIRONMENT_ERRORS, RankLost, UsageError, located
from fastppo.policy.agent import Agent
from fastppo.random_streams import Stream, seed_of
from fastppo.ranks import Ranks

STEPS_OF_TRAINING = 10_000  # of an episode: an evaluation may take as many steps as training so far, but no more than this


class _Stopped(Exception):
    """A signal has asked the run to stop."""


class Evaluator:
    """Evaluates the policies of a run, or of many seeds, in the same environments. Only the main process has these."""

    def __init__(self, config: TrainConfig, device: torch.device, deadline: Deadline, ranks: Ranks) -> None:
        """Make the environments. Raises UsageError."""
        self._config, self._ranks = config, ranks
        self._limit = time_limit(config)
        self._envs: AutoresetEnvs | None = None
        if ranks.is_main:
            try:
                self._envs = AutoresetEnvs(evaluation_envs(config, config.eval_episodes, deadline, device), deadline)
            except UsageError as error:
                raise UsageError(f"--eval-every makes environments of its own: {error}") from None

    def evaluate(
        self, agent: Agent, seed: int, trained_steps: int, note: Callable[[str], None], stopped: Callable[[], bool]
    ) -> EvaluationResult | None:
        """Play the episodes. None where there is no result: a fault, a signal, or a process that is not the main one.

        Args:
            seed: of the run.
            trained_steps: steps of training so far.
            note: prints a line on a fault, or on the progress of a long evaluation.
            stopped: whether a signal has asked the run to stop.
        """
        if self._envs is None:
            self._wait()
            return None

        def pulse(line: str) -> None:
            note(line)
            _, stops = self._ranks.highest(1, stopped())
            if stops:
                raise _Stopped

        episodes = self._config.eval_episodes
        most = most_steps(min(trained_steps, STEPS_OF_TRAINING * episodes), episodes, self._limit)
        result: EvaluationResult | None = None
        try:
            with untouched_streams():
                own_seed = seed_of(seed, Stream.TRAINING_EVALUATION)
                result = play_episodes(agent, self._envs, episodes, own_seed, max_steps=most, note=pulse)
        except _Stopped:
            note("the evaluation was stopped")
        except RankLost:
            raise
        except UsageError as error:
            note(f"no evaluation of this iteration: {error}")
        except ENVIRONMENT_ERRORS as error:
            note(f"no evaluation of this iteration: {located(error)}")
        self._ranks.highest(0, 0)
        return result

    def _wait(self) -> None:
        """Wait until the main process has evaluated, which tells the others every few seconds that it is still alive."""
        while self._ranks.highest(0, 0)[0]:
            pass

    def close(self) -> None:
        """Close the environments."""
        if self._envs is not None:
            self._envs.close()


def make_watchers(
    config: TrainConfig,
    given: VectorEnv | None,
    device: torch.device,
    deadline: Deadline,
    ranks: Ranks,
    cleanup: contextlib.ExitStack,
) -> tuple[AutoresetEnvs | None, Evaluator | None]:
    """The environments of --record-every and of --eval-every, where these are on. Raises UsageError if they cannot be made."""
    for name in ("record_every", "eval_every"):
        if given is not None and getattr(config, name) is not None:
            raise UsageError(f"{flag(name)} makes environments of its own from --env-id, which yours were not: leave it off")
    render_env = make_recorded(config, deadline) if config.record_every is not None and ranks.is_main else None
    if render_env is not None:
        cleanup.callback(render_env.close)
    evaluator = None if config.eval_every is None else Evaluator(config, device, deadline, ranks)
    if evaluator is not None:
        cleanup.callback(evaluator.close)
    return render_env, evaluator


def make_recorded(config: TrainConfig, deadline: Deadline) -> AutoresetEnvs:
    """The environment for the videos of --record-every. Raises UsageError if it cannot be made."""
    try:
        return make_render_env(config.env_config, deadline)
    except UsageError as error:
        raise UsageError(f"--record-every makes one more environment, with render_mode=rgb_array: {error}") from None
