"""Play episodes with a policy and report their returns.

Knows nothing of command lines, of run directories, or of rendering.
"""

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray

from fastppo.config import TrainConfig
from fastppo.envs.autoreset import AutoresetEnvs, is_tensor
from fastppo.envs.deadline import Deadline
from fastppo.envs.factory import make_envs
from fastppo.envs.functions import naming
from fastppo.errors import ENVIRONMENT_ERRORS, ForkHangs, UsageError, environment_fault
from fastppo.policy.agent import Agent
from fastppo.random_streams import Stream, environment_seed, seed_of
from fastppo.run.episodes import MAX_SHOWN

Note = Callable[[str], None]  # prints a line for the user

MIN_EPISODE_STEPS = 1_000  # of an evaluation: lower bound of its step limit, for each episode
MAX_EPISODE_STEPS = 100_000  # upper bound
PROGRESS_SECONDS = 5.0  # between two lines on the progress of an evaluation
MAX_ENVS = 8  # in an evaluation


@dataclass(frozen=True)
class EvaluationPlan:
    """The episodes of an evaluation: number, seed, policy, limit of steps."""

    episodes: int
    seed: int = 0  # of the environments and of sampling
    deterministic: bool = True  # take the likeliest action; otherwise sample
    trained_steps: int = 0  # steps of training; they limit the steps of the evaluation
    max_steps: int | None = None  # of all episodes together; None: see `most_steps`


@dataclass(frozen=True)
class EvaluationResult:
    """Returns of the episodes of an evaluation."""

    returns: list[float]  # of the episodes that ended
    wanted: int  # number of episodes that were to be played
    steps: int  # of all environments, without those after an environment's last episode
    reward: float  # sum over these steps
    part_returns: Sequence[NDArray[Any]] = ()  # (K,) of each episode that ended, if rewards are weighted sums

    @property
    def report(self) -> dict[str, Any]:
        """`return_mean return_std episodes`; nan, nan, 0 if no episode ended. `return_parts`, if rewards are weighted sums."""
        mean, std = (float(np.mean(self.returns)), float(np.std(self.returns))) if self.returns else (math.nan, math.nan)
        parts = {"return_parts": np.mean(self.part_returns, 0).tolist()} if self.part_returns else {}
        return {"return_mean": mean, "return_std": std, "episodes": len(self.returns), **parts}

    @property
    def remark(self) -> str | None:
        """A line for the user if some episodes did not end."""
        if len(self.returns) == self.wanted:
            return None
        if not self.returns:
            mean = self.reward / max(self.steps, 1)
            said = f"no episode ended in the {self.steps:,} steps of the evaluation, so there is no return ({mean:.4g} a step)"
        else:
            said = (
                f"only {len(self.returns)} of {self.wanted} episodes ended in the {self.steps:,} steps of the evaluation: "
                "the mean is over these, and leaves out the longest"
            )
        return f"{said}; python -m fastppo.evaluate --max-steps {10 * self.steps} plays up to ten times as many"


def most_steps(trained: int, episodes: int, longest: int | None) -> int:
    """Largest number of steps of an evaluation: the steps of training, within 1,000 to 100,000 an episode.

    Args:
        trained: steps of training.
        longest: the environment's time limit in steps; it replaces the 1,000 if it is larger. None: no time limit.
    """
    least = max(MIN_EPISODE_STEPS, min(longest or 0, MAX_EPISODE_STEPS))
    return min(max(trained, least * episodes), MAX_EPISODE_STEPS * episodes)


def play_episodes(
    agent: Agent,
    envs: AutoresetEnvs,
    episodes: int,
    seed: int,
    deterministic: bool = True,
    max_steps: int | None = None,
    note: Note | None = None,
) -> EvaluationResult:
    """Play `episodes` episodes; rewards are those of the environment, not normalised.

    The number of episodes of each environment is fixed beforehand: counting the first episodes to end would favour short ones.

    Args:
        max_steps: episodes that have not ended after so many steps in all are dropped. Default: MAX_EPISODE_STEPS an episode.
        note: prints a line on the progress every PROGRESS_SECONDS.
    """
    num_envs, num_agents = envs.num_envs // envs.num_agents, envs.num_agents
    quota = np.full(num_envs, episodes // num_envs)
    quota[: episodes % num_envs] += 1
    returns: list[list[float]] = [[] for _ in range(num_envs)]
    running, left = np.zeros(num_envs), quota.copy()
    most = MAX_EPISODE_STEPS * episodes if max_steps is None else max_steps
    steps, reward_sum, noted = 0, 0.0, time.monotonic()
    parts, part_returns = np.zeros((num_envs, 0)), list[NDArray[Any]]()
    agent.seed(seed_of(seed, Stream.EVALUATION_ACTIONS))
    agent.reset()
    obs, mask = envs.reset_and_mask(environment_seed(seed, Stream.EVALUATION_ENVIRONMENTS))
    valid = np.ones(envs.num_envs, bool) if envs.acting is None else envs.acting
    while left.any() and steps < most:
        step = envs.step(agent.act(obs, deterministic, mask))
        obs, mask = step.obs, step.action_mask
        reward, terminated, truncated = map(to_host, (step.reward, step.terminated, step.truncated))
        done = np.logical_or(terminated, truncated) & valid
        over = done if step.game_over is None else done & to_host(step.game_over)
        of_agents = np.where(valid, reward, 0.0).reshape(num_envs, num_agents)
        over, acted = over.reshape(num_envs, num_agents).any(-1), valid.reshape(num_envs, num_agents).any(-1)
        counted, reward = acted & (left > 0), of_agents.mean(-1)
        running += np.where(counted, reward, 0.0)
        own_parts = of_agents if 1 < num_agents <= MAX_SHOWN else step.reward_parts
        if own_parts is not None:
            parts = (parts if parts.size else 0.0) + np.where(counted[:, None], to_host(own_parts), 0.0)
        steps, reward_sum = steps + int(counted.sum()), reward_sum + float(reward[counted].sum())
        for index in np.flatnonzero(over & (left > 0)):
            returns[index].append(float(running[index]))
            if parts.size:
                part_returns.append(parts[index].copy())
            running[index], parts[index], left[index] = 0.0, 0.0, left[index] - 1
        agent.reset(done if envs.keeps_final_obs else ~valid)  # environments whose next observation is the first of an episode
        valid = envs.acting if envs.acting is not None else valid if envs.keeps_final_obs else ~done
        if note is not None and time.monotonic() - noted >= PROGRESS_SECONDS:
            note(f"evaluating: {episodes - left.sum()} of {episodes} episodes, {steps:,} of at most {most:,} steps")
            noted = time.monotonic()
    agent.reset()
    return EvaluationResult([value for played in returns for value in played], episodes, steps, reward_sum, part_returns)


def to_host(batch: Any) -> NDArray[Any]:
    """An array or tensor of one step, on any device, as an array."""
    return np.asarray(batch.detach().cpu() if is_tensor(batch) else batch)


def evaluate_config(
    agent: Agent,
    config: TrainConfig,
    plan: EvaluationPlan,
    envs: VectorEnv[Any, Any, Any] | None = None,
    note: Note = print,
    env_fn: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Play the plan's episodes in a run's environment: `return_mean return_std episodes`; nan, nan, 0 if no episode ended.

    Args:
        envs: environments to play in; they are not closed. None: make them as for training.
        note: prints lines for the user: the number of episodes, the progress, and episodes that did not end.
        env_fn: the `env_fn` argument of `train`, if it could not be imported.

    Raises:
        UsageError: the environment cannot be made.
        TrainingFault: the environment failed.
    """
    most = plan.max_steps
    if most is None:
        most = most_steps(plan.trained_steps, plan.episodes, time_limit(config, envs))
    note(f"evaluating for {plan.episodes} episodes, {most:,} steps at most")

    def played(config: TrainConfig) -> EvaluationResult:
        made = evaluation_envs(config, plan.episodes, deadline) if envs is None else envs
        playing = AutoresetEnvs(made, deadline)
        try:
            return play_episodes(agent, playing, plan.episodes, plan.seed, plan.deterministic, most, note)
        finally:
            if envs is None:
                playing.close()

    named = contextlib.nullcontext(config.env_id) if env_fn is None else naming(env_fn)
    with named as env_id, contextlib.closing(Deadline(config.env_timeout)) as deadline:
        config = replace(config, env_id=env_id)
        try:
            try:
                result = played(config)
            except ForkHangs as error:
                note(f"the evaluation starts again in one process: {error}")
                result = played(replace(config, vectorization="sync"))
        except UsageError:
            raise
        except ENVIRONMENT_ERRORS as error:
            raise environment_fault(error, "during evaluation") from error
    if result.remark is not None:
        note(result.remark)
    return result.report


def time_limit(config: TrainConfig, envs: VectorEnv[Any, Any, Any] | None = None) -> int | None:
    """The environment's time limit in steps; None: the environment declares none."""
    spec = getattr(envs, "spec", None) or gym.registry.get(config.env_id.rpartition(":")[2])
    limit = config.env_config.env_kwargs.get("max_episode_steps") or getattr(spec, "max_episode_steps", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def evaluation_envs(
    config: TrainConfig, episodes: int, deadline: Deadline, device: torch.device | str = "cpu"
) -> VectorEnv[Any, Any, Any]:
    """The run's environments, at most as many as in training, since more may not exist. Raises UsageError."""
    num_envs = min(episodes, MAX_ENVS, config.num_envs)
    return make_envs(replace(config.env_config, num_envs=num_envs), device, deadline)
