"""Environments that need memory, and the returns of recurrent policies in them: `python benchmarks/memory.py --task recall8`.

Importing this file registers them, so `--env-id benchmarks.memory:Recall-v0 --env-kwargs delay=64` works from the repository's
root. The two environments without velocities are those of the RL Zoo, which has published figures of ppo_lstm (sb3-contrib's
RecurrentPPO) for them. The Zoo replaces velocities by 0; here they are left out. As a script this file trains recurrent and
other policies, each seed in a fresh process. The last line of the output is one JSON object.
"""

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.envs.classic_control import PendulumEnv
from gymnasium.envs.classic_control.cartpole import CartPoleEnv, CartPoleVectorEnv
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from fastppo import load_policy
from fastppo.envs.device import TorchVectorEnv


class RecallState(NamedTuple):
    """The state of N environments, (N,) int64 each."""

    cue: Tensor
    left: Tensor  # steps until the agent is asked, 0 when it is asked


@dataclass(frozen=True)
class Recall:
    """The first observation shows one of `num_cues` cues, then `delay` follow without it. At the last the agent must name it.

    An observation is the cue as one-hot, which is zero after the first step, and a 1 if the agent is asked. The reward is 1 if
    the agent is asked and its action is the cue, else 0. So the mean return is the share of episodes solved; without memory it
    is 1 / num_cues. With `min_delay`, the delay of each episode is drawn log-uniformly from `min_delay` to `delay`. Short
    delays help to learn long ones: with long delays alone a new network has no gradient.
    """

    delay: int = 8
    num_cues: int = 4
    min_delay: int | None = None
    max_episode_steps: int | None = None

    num_random: ClassVar[int] = 2

    def __post_init__(self) -> None:
        least = self.delay if self.min_delay is None else self.min_delay
        if not 1 <= least <= self.delay or self.num_cues < 1:
            raise ValueError(f"delay, min_delay and num_cues must be at least 1, and min_delay at most delay: {self}")

    @property
    def observation_space(self) -> gym.Space[Any]:
        return Box(0.0, 1.0, (self.num_cues + 1,), np.float32)

    @property
    def action_space(self) -> gym.Space[Any]:
        return Discrete(self.num_cues)

    def reset(self, random: Tensor) -> tuple[RecallState, Tensor]:
        least = self.delay if self.min_delay is None else self.min_delay
        cue = (random[:, 0] * self.num_cues).long().clamp(max=self.num_cues - 1)  # clamp: the product may round up to num_cues
        left = (least * ((self.delay + 1) / least) ** random[:, 1]).long().clamp(least, self.delay)
        return RecallState(cue, left), (cue[:, None] == self._indices(cue)).float()

    def step(self, state: RecallState, action: Tensor, random: Tensor) -> tuple[RecallState, Tensor, Tensor, Tensor, Tensor]:
        cue, left = state
        asked = left == 0
        left = left - 1
        obs = (left == 0)[:, None] & (self._indices(cue) == self.num_cues)
        right = asked & (action == cue)
        return RecallState(cue, left), obs.float(), right.float(), asked, torch.zeros_like(asked)

    def _indices(self, like: Tensor) -> Tensor:
        """Indices of an observation's numbers: those of the cues, then that of the question."""
        return torch.arange(self.num_cues + 1, device=like.device)


class RecallEnv(gym.Env[np.ndarray, np.int64]):
    """One `Recall` as a plain gymnasium environment, for example for worker processes."""

    def __init__(self, **kwargs: Any) -> None:
        self.one = TorchVectorEnv(Recall(**kwargs), 1)
        self.observation_space, self.action_space = self.one.single_observation_space, self.one.single_action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        obs, _ = self.one.reset(seed=seed)
        return obs[0].numpy(), {}

    def step(self, action: np.int64) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, _ = self.one.step(torch.tensor([int(action)]))
        return obs[0].numpy(), float(reward[0]), bool(terminated[0]), bool(truncated[0]), {}


def only(env: gym.Env, indices: list[int]) -> gym.Env:
    """`env` with only these components of its observations."""
    space = env.observation_space
    return gym.wrappers.TransformObservation(
        env, lambda obs: obs[indices], Box(space.low[indices], space.high[indices], dtype=np.float32)
    )


def cartpole_without_velocity(**kwargs: Any) -> gym.Env:
    """Position and angle of gymnasium's CartPole, (2,)."""
    return only(CartPoleEnv(**kwargs), [0, 2])


def pendulum_without_velocity(**kwargs: Any) -> gym.Env:
    """Cosine and sine of gymnasium's Pendulum, (2,)."""
    return only(PendulumEnv(**kwargs), [0, 1])


class CartPolesWithoutVelocity(gym.vector.VectorObservationWrapper):
    """Positions and angles of gymnasium's vector CartPole, (N, 2)."""

    def __init__(self, num_envs: int, **kwargs: Any) -> None:
        envs = CartPoleVectorEnv(num_envs, **kwargs)
        super().__init__(envs)
        space = envs.single_observation_space
        self.single_observation_space = Box(space.low[[0, 2]], space.high[[0, 2]], dtype=np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)

    def observations(self, observations: np.ndarray) -> np.ndarray:
        return observations[:, [0, 2]]


def recalls(num_envs: int, **kwargs: Any) -> VectorEnv:
    """N copies of `Recall`; on the device with --backend torch."""
    return TorchVectorEnv(Recall(**kwargs), num_envs)


if "Recall-v0" not in gym.registry:
    gym.register("Recall-v0", entry_point=RecallEnv, vector_entry_point=recalls)
    gym.register(
        "CartPoleNoVel-v1",
        entry_point=cartpole_without_velocity,
        vector_entry_point=CartPolesWithoutVelocity,
        max_episode_steps=500,
    )
    gym.register("PendulumNoVel-v1", entry_point=pendulum_without_velocity, max_episode_steps=200)


@dataclass(frozen=True)
class MemoryTask:
    """An environment, and the flags of fastppo.train for it."""

    env_id: str
    flags: str
    delay: int | None = None  # of the Recall environment for the evaluation; training may have other delays


RECALL = "--num-envs 32 --gamma 0.5 --ent-coef 0.01 --env-kwargs"  # a short horizon: only the answer has a reward
TASKS: Mapping[str, MemoryTask] = {
    "recall8": MemoryTask("Recall-v0", f"--total-timesteps 100000 {RECALL} delay=8", 8),
    "recall64": MemoryTask("Recall-v0", f"--total-timesteps 300000 {RECALL} delay=64 min_delay=1", 64),
    # settings of the RL Zoo: hyperparams/ppo_lstm.yml at 22e3ff2
    "cartpole": MemoryTask(
        "CartPoleNoVel-v1",
        "--total-timesteps 500000 --num-steps 32 --num-minibatches 1 --update-epochs 20 --learning-rate 1e-3 --anneal-clip "
        "--gamma 0.98 --gae-lambda 0.8 --norm-obs --norm-reward --hidden-sizes 64 --activation relu",
    ),
    "pendulum": MemoryTask(
        "PendulumNoVel-v1",
        "--total-timesteps 200000 --num-steps 128 --num-minibatches 8 --update-epochs 10 --learning-rate 1e-3 --gamma 0.95 "
        "--norm-obs --norm-reward --recompute-advantage --no-norm-adv --log-std-init -0.5 --layer-norm",
    ),
}


@dataclass(frozen=True)
class MemoryConfig:
    """Train a task with memory and without; flags after `--` go to every run. The last line is one JSON object."""

    task: Literal["recall8", "recall64", "cartpole", "pendulum"] = "recall8"
    """What to learn."""
    memories: tuple[Literal["lstm", "gru", "none"], ...] = ("lstm", "gru", "none")
    """A row of the table each; none: feed-forward."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """One run each."""
    eval_episodes: int = 100
    """Episodes of each run's evaluation, played deterministically."""
    jobs: int = 1
    """Runs at once; with more than one each gets one thread."""


def share_recalled(run_dir: Path, delay: int, episodes: int) -> float:
    """Share of episodes that the policy of a run solves with this delay."""
    policy = load_policy(run_dir)
    envs = TorchVectorEnv(Recall(delay), episodes)
    obs, _ = envs.reset(seed=1_000_000)
    for _ in range(delay + 1):
        obs, reward, *_ = envs.step(torch.as_tensor(policy.act(obs, deterministic=True)))
    return float(reward.mean())


def main(config: MemoryConfig, flags: Sequence[str]) -> int:
    """Train, print, and return the exit code."""
    import learning  # here, as run_queue: neither is found where this file is imported as benchmarks.memory
    import run_queue

    root = str(Path(__file__).parents[1])  # from here the runs import this file as benchmarks.memory
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    task = TASKS[config.task]
    env_id = f"benchmarks.memory:{task.env_id}"
    threads = ("--num-threads", "1") if config.jobs > 1 else ()

    def one(memory: str, seed: int) -> dict[str, Any]:
        run_dir = Path(directory, f"{memory}-{seed}")
        words = ["--preset", "none", *task.flags.split(), *(("--rnn", memory) if memory != "none" else ()), *threads, *flags]
        result = learning.run(env_id, seed, run_dir, config.eval_episodes, words)
        if task.delay is not None:
            result["evaluation"] = share_recalled(run_dir, task.delay, config.eval_episodes)
        return result

    with tempfile.TemporaryDirectory() as directory:
        results, names = Path(directory, "results.jsonl"), ("memory", "seed")
        wanted = [(memory, seed) for memory in config.memories for seed in config.seeds]
        failed = run_queue.run_missing(results, names, wanted, one, config.jobs)
        lines = run_queue.finished(results, names)
    summaries = []
    for memory in config.memories:
        runs = [lines[memory, seed] for seed in config.seeds if (memory, seed) in lines]
        if runs:
            summary = learning.summarize(env_id, runs) | {"env_id": f"{config.task}, {memory}"}
            summaries.append(summary if memory != "none" else summary | {"published": {}})  # published: recurrent ones
    print(f"\n{learning.table(summaries)}\n")
    print(json.dumps({"task": config.task, "memories": summaries, "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    from run_queue import split_flags

    own, flags = split_flags(sys.argv[1:])
    sys.exit(main(tyro.cli(MemoryConfig, args=own), flags))
