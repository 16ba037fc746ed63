"""Runs that are stopped and resumed, and what two runs differ in."""

import csv
import os
import signal

import pytest
import torch

from fastppo import TrainConfig, train
from fastppo.run.loggers import Loggers

TIMES = {"seconds", "sps", "env_share", "act_share", "learn_share"}


NEEDS = {"ALE/": "ale_py", "HalfCheetah": "mujoco", "envpool": "envpool"}


# what is trained; `restart`: gymnasium's environments, which are exact with --exact-resume only. Some are eager, some fused.
CASES = {
    "device": {"backend": "torch"},
    "device, normalised": {"backend": "torch", "env_id": "Pendulum-v1", "norm_obs": True, "norm_reward": True, "num_steps": 60},
    "device, fresh rollouts": {"backend": "torch", "reset_each_rollout": True},
    "entry point": {"restart": True},
    "sync": {"restart": True, "env_id": "environments:Walk-v0", "vectorization": "sync", "norm_obs": True, "norm_reward": True},
    "grouped": {
        "restart": True,
        "env_id": "Acrobot-v1",
        "vectorization": "grouped",
        "num_envs": 2,
        "num_threads": 2,
        "num_steps": 8,
    },
    "async": {"restart": True, "env_id": "environments:Walk-v0", "vectorization": "async", "num_envs": 2},
    "same-step": {
        "restart": True,
        "env_id": "environments:WalkVector-v0",
        "env_kwargs": {"mode": "SameStep"},
        "norm_obs": True,
        "compile": "on",
    },
    "continuous": {
        "restart": True,
        "env_id": "Pendulum-v1",
        "norm_obs": True,
        "norm_reward": True,
        "anneal_lr": False,
        "desired_kl": 1e-4,
        "anneal_clip": True,
        "ent_coef_end": 0.01,
        "recompute_advantage": True,
        "compile": "auto",
    },
    "fresh rollouts": {"restart": True, "env_id": "environments:Walk-v0", "reset_each_rollout": True},
    "monte-carlo": {
        "restart": True,
        "advantage": "monte-carlo",
        "norm_returns": True,
        "share_backbone": True,
        "compile": "on",
    },
    "masks": {
        "restart": True,
        "compile": "on",
        "env_id": "environments:AnySpacesVector-v0",
        "env_kwargs": {"observation": "masked", "action": "multi-discrete"},
    },
    "MuJoCo": {
        "restart": True,
        "env_id": "HalfCheetah-v5",
        "norm_obs": True,
        "norm_reward": True,
        "num_envs": 2,
        "compile": "on",
    },
    "EnvPool": {"restart": True, "env_id": "CartPole-v1", "backend": "envpool", "compile": "on"},
    "Atari": {"restart": True, "env_id": "ALE/Pong-v5", "num_envs": 2, "num_steps": 4, "atari_noop_max": 5, "cnn_size": 32},
}


def settings_of(case, run_dir, **changed):
    settings = {"num_envs": 4, "num_steps": 32, "eval_episodes": 0, "compile": "off", "plain": True, "num_iterations": 5}
    settings |= {"update_epochs": 2}
    settings |= CASES[case] | {"run_dir": str(run_dir)}
    if settings.pop("restart", False):
        settings |= {"exact_resume": True, "checkpoint_iterations": 2}
    for word, module in NEEDS.items():
        if word in settings["env_id"] if "env_id" in settings else word == settings.get("backend"):
            pytest.importorskip(module)
    return TrainConfig(**settings | changed)


def stopped_after(iteration, config, monkeypatch):
    """Train until SIGTERM comes in that iteration; the exit code."""
    log = Loggers.log

    def interrupted(self, row):
        log(self, row)
        if row["iteration"] == iteration:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Loggers, "log", interrupted)
        with pytest.raises(SystemExit) as end:
            train(config)
    return end.value.code


def result_of(run_dir):
    """All that a run leaves behind and no clock has a part in: both checkpoints, and metrics.csv."""
    kept = {name: torch.load(run_dir / "checkpoints" / f"{name}.pt", weights_only=True) for name in ("last", "best")}
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(file)]
    return kept, rows


def differing(a, b, name=""):
    """The names of what differs in two checkpoints, by a single bit even, but for the clock's seconds."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a if key != "seconds" for found in differing(a[key], b[key], f"{name}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [found for at, pair in enumerate(zip(a, b, strict=True)) for found in differing(*pair, f"{name}[{at}]")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and torch.equal(a, b)
    else:
        same = type(a) is type(b) and (a == b or (a != a and b != b))
    return [] if same else [name]
