"""Environments of any engine, played with given actions."""

import numpy as np
import pytest

from fastppo.envs.atari import AtariSettings
from fastppo.envs.autoreset import is_tensor
from fastppo.envs.factory import EnvConfig, make_envs

N = 3
WHOLE_GAMES = AtariSettings(noop_max=0, episodic_life=False, fire_reset=False)
ENGINES = {
    "entry-point": ("CartPole-v1", "auto", "entry-point", {}),
    "sync": ("CartPole-v1", "auto", "sync", {"max_episode_steps": 12}),
    "grouped": ("CartPole-v1", "auto", "grouped", {"max_episode_steps": 12}),
    "async": ("CartPole-v1", "auto", "async", {}),
    "torch": ("CartPole-v1", "torch", "auto", {"max_episode_steps": 12}),
    "sync-pendulum": ("Pendulum-v1", "auto", "sync", {"max_episode_steps": 7}),
    "envpool-cartpole": ("CartPole-v1", "envpool", "auto", {}),
    "envpool-pendulum": ("Pendulum-v1", "envpool", "auto", {"max_episode_steps": 7}),
    "envpool-halfcheetah": ("HalfCheetah-v4", "envpool", "auto", {"max_episode_steps": 7}),
    "ale-breakout": ("ALE/Breakout-v5", "auto", "auto", {}),
    "ale-pong": ("PongNoFrameskip-v4", "auto", "auto", {"max_num_frames_per_episode": 80}),
    "envpool-breakout": ("ALE/Breakout-v5", "envpool", "auto", {}),
}


def make(engine, **settings):
    """N environments of one of ENGINES; skips where its package is missing."""
    env_id, backend, vectorization, env_kwargs = ENGINES[engine]
    for package in ("envpool", "ale"):
        if engine.startswith(package):
            pytest.importorskip({"ale": "ale_py"}.get(package, package))
    return make_envs(
        EnvConfig(
            env_id, N, vectorization, env_kwargs=env_kwargs, backend=backend, num_threads=2, atari=AtariSettings(**settings)
        )
    )


def numpy_of(batch):
    """A copy, whatever it was."""
    return np.array(batch.numpy() if is_tensor(batch) else batch)


def played(envs, actions, seed=5):
    """What N environments tell over len(actions) steps: obs (T+1, N, ...), reward, terminated, truncated, game_over (T, N)."""
    obs, rows = [numpy_of(envs.reset(seed=seed)[0])], []
    for action in actions:
        step = envs.step(action)
        obs.append(numpy_of(step[0]))
        rows.append([numpy_of(column) for column in step[1:4]] + [getattr(envs, "game_over", np.zeros(N, bool))])
    return np.stack(obs), *(np.stack(column) for column in zip(*rows, strict=True))


def some_actions(envs, steps, seed=0):
    """(T, N, ...) uniform random actions."""
    envs.action_space.seed(seed)
    return np.stack([envs.action_space.sample() for _ in range(steps)])


# id, --backend, --vectorization, --env-kwargs: episodes short enough to end
