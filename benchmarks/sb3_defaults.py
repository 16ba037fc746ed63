"""Stable-Baselines3's PPO with its defaults on one environment: `python benchmarks/sb3_defaults.py -- --env-id ID`.

What follows `--` are flags of `fastppo train` that choose the environment and its wrappers. Prints one JSON object.

Needs: pip install stable-baselines3
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import gymnasium as gym
import tyro
from run_queue import split_flags

from fastppo.cli import parse_train
from fastppo.core.space_rules import is_image
from fastppo.envs.factory import env_maker


@dataclass(frozen=True)
class DefaultsConfig:
    """Train and evaluate once; the last line is one JSON object with return_mean."""

    steps: int = 20_000
    """Of training."""
    episodes: int = 20
    """Of the evaluation, with the likeliest actions."""
    seed: int = 1
    """Of training."""


def policy_for(space: gym.Space[Any]) -> str:
    """The policy that its documentation names for observations of this kind."""
    if isinstance(space, gym.spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if is_image(space) else "MlpPolicy"


def sb3_return(make: Callable[[], gym.Env[Any, Any]], seed: int, steps: int, episodes: int) -> float:
    """The mean return of the last policy after `steps` steps of one environment, as its documentation begins. One thread."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.monitor import Monitor

    torch.set_num_threads(1)
    env = Monitor(make())
    model = PPO(policy_for(env.observation_space), env, seed=seed, device="cpu").learn(steps)
    env = Monitor(make())
    env.reset(seed=7)
    return float(evaluate_policy(model, env, episodes, deterministic=True)[0])  # type: ignore[arg-type]


def main(config: DefaultsConfig, flags: list[str]) -> None:
    """Train on the environment that the flags name; its actions are as they are, since rescaling them is a setting of ours."""
    env_config = parse_train(flags).env_config
    preprocessing = replace(env_config.preprocessing, rescale_action=False)
    make = env_maker(replace(env_config, preprocessing=preprocessing))
    print(json.dumps({"return_mean": sb3_return(make, config.seed, config.steps, config.episodes)}))


if __name__ == "__main__":
    own, words = split_flags(sys.argv[1:])
    main(tyro.cli(DefaultsConfig, args=own), words)
