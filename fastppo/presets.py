"""Settings to start from, each with where it comes from. Which of them a run starts from: find_preset.py. Costs no torch.

How a source's settings are written here:

- Its batch of M rows is the number of minibatches that it makes of the source's rollout: with another --num-envs the
  minibatches grow and the updates stay as many.
- One environment of 512 or 2048 steps is 8 environments of 64 or 256: as many rows, collected in parallel.
- The weight of the value loss is of the squared error, as in Stable-Baselines3; CleanRL halves the error, so its 0.5 is 0.25.
- Where a source's settings learn more with layer normalisation, they have it.
- Stable-Baselines3's gSDE (`use_sde`), which is `--action-distribution gsde`, and `ortho_init=False`, which is `--init torch`,
  are left out: the results of these presets are without them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastppo.config import TrainConfig


@dataclass(frozen=True)
class Preset:
    """Named settings of learning; settings that are not given have TrainConfig's defaults."""

    name: str
    env_id: str
    """Trained on if --preset is given without --env-id. A preset named like its environment is that environment's own."""
    source: str
    settings: Mapping[str, Any]

    def config(self, env_id: str | None = None) -> TrainConfig:
        """The settings for `env_id`, or for the preset's own environment."""
        return TrainConfig(preset=self.name, env_id=env_id or self.env_id, **self.settings)


OWN = "fastppo's own"
ZOO = "RL Zoo, hyperparams/ppo.yml at 00128b5"  # https://github.com/DLR-RM/rl-baselines3-zoo
ZOO_NORMED = f"{ZOO}, with layer normalisation"
ZOO_SWIMMER = "RL Zoo, hyperparams/ppo.yml at 22e3ff2"  # where Swimmer's alone have changed
TIANSHOU = "tianshou, examples/mujoco/mujoco_ppo.py at 002ffd9"  # https://github.com/thu-ml/tianshou
TIANSHOU_NORMED = f"{TIANSHOU}, with layer normalisation"

SB3 = {"learning_rate": 3e-4, "anneal_lr": False}  # Stable-Baselines3's defaults, where a file of the zoo is silent
NORMALIZED = {"norm_obs": True, "norm_reward": True}
# the zoo's network for most of its tuned MuJoCo
WIDE = {"log_std_init": -2.0, "hidden_sizes": (256, 256), "activation": "relu"}
LAYER_NORM = {"layer_norm": True}  # ours, where it learns more than without (benchmarks/README.md)

# tianshou's, for critics that lag behind: advantages are estimated again before each epoch, in units of the rewards
RECOMPUTED = {"recompute_advantage": True, "norm_adv": False, "log_std_init": -0.5}

# For environments without a preset, chosen on those of benchmarks/untuned.py with seeds from 101 on. Minibatches of 64 rows.
OPEN = {"learning_rate": None, "update_epochs": None, "ent_coef": None}  # by the environment's spaces and the run's length
GENERAL = NORMALIZED | RECOMPUTED | LAYER_NORM | {"num_minibatches": 16} | OPEN

ARTICLE = {  # the settings of the article that fastppo grew from: those of the PPO paper's Atari runs, on CartPole
    "num_envs": 8,
    "num_steps": 128,
    "num_iterations": 100,
    "reset_each_rollout": True,  # each of the article's actors starts anew
    "num_minibatches": 4,
    "update_epochs": 3,
    "learning_rate": 2.5e-4,
    "anneal_lr": True,
    "clip_coef": 0.1,
    "anneal_clip": True,
    "gamma": 0.99,
    "advantage": "monte-carlo",
    "norm_returns": True,
    "norm_adv": False,
    "vf_coef": 1.0,
    "ent_coef": 0.01,
    "max_grad_norm": float("inf"),
    "hidden_sizes": (100, 100),
    "activation": "relu",
    "seed": 0,
    "eval_episodes": 5,
}
PENDULUM = {  # those of `general` for as many steps, with another gamma
    **NORMALIZED,
    **RECOMPUTED,
    **LAYER_NORM,
    "total_timesteps": 200_000,
    "num_envs": 8,
    "num_steps": 128,
    "num_minibatches": 16,  # of 64 rows
    "update_epochs": 10,
    "learning_rate": 7e-4,
    "gamma": 0.95,
}
MOUNTAIN_CAR = {
    **SB3,
    **NORMALIZED,
    "total_timesteps": 1_000_000,
    "num_envs": 16,
    "num_steps": 16,
    "num_minibatches": 4,  # of 64 rows
    "update_epochs": 4,
    "gae_lambda": 0.98,
    **LAYER_NORM,
}
MOUNTAIN_CAR_CONTINUOUS = {  # the zoo's explores by gSDE
    **SB3,
    **NORMALIZED,
    "total_timesteps": 100_000,
    "num_envs": 8,
    "num_steps": 256,
    "num_minibatches": 32,
    "update_epochs": 10,
    "gamma": 0.9999,
    "gae_lambda": 0.9,
    "ent_coef": 0.01,
}
ACROBOT = {
    **SB3,
    **NORMALIZED,
    "total_timesteps": 1_000_000,
    "num_envs": 16,
    "num_steps": 256,
    "num_minibatches": 64,  # of 64 rows
    "update_epochs": 4,
    "gae_lambda": 0.94,
    **LAYER_NORM,
}

LUNAR_LANDER = {
    **SB3,
    "total_timesteps": 1_000_000,
    "num_envs": 16,
    "num_steps": 1024,
    "num_minibatches": 256,  # of 64 rows
    "update_epochs": 4,
    "gamma": 0.999,
    "gae_lambda": 0.98,
    "ent_coef": 0.01,
    **LAYER_NORM,
}
BIPEDAL_WALKER = {
    **SB3,
    **NORMALIZED,
    "total_timesteps": 5_000_000,
    "num_envs": 32,
    "num_steps": 2048,
    "num_minibatches": 1024,  # of 64 rows
    "update_epochs": 10,
    "gamma": 0.999,
    "clip_coef": 0.18,
}
BIPEDAL_WALKER_HARDCORE = {
    **NORMALIZED,
    "total_timesteps": 100_000_000,
    "num_envs": 16,
    "num_steps": 2048,
    "num_minibatches": 512,  # of 64 rows
    "update_epochs": 10,
    "learning_rate": 2.5e-4,
    "anneal_lr": True,
    "anneal_clip": True,
    "ent_coef": 0.001,
}

# HalfCheetah, Hopper and Walker2d too: above the zoo's settings for each of them (benchmarks/README.md).
MUJOCO = {
    **NORMALIZED,
    "total_timesteps": 1_000_000,
    "num_envs": 8,
    "num_steps": 256,
    "num_minibatches": 32,  # of 64 rows
    "update_epochs": 10,
    "learning_rate": 3e-4,
    "anneal_lr": True,
    **RECOMPUTED,
    "vf_coef": 0.25,
}
MUJOCO_ZOO = SB3 | NORMALIZED | {"total_timesteps": 1_000_000, "num_envs": 8}
SWIMMER = {
    **MUJOCO_ZOO,
    "num_envs": 4,
    "num_steps": 1024,
    "num_minibatches": 16,  # of 256 rows
    "update_epochs": 10,
    "learning_rate": 6e-4,
    "gamma": 0.9999,
    "gae_lambda": 0.98,
}
REACHER = {
    **MUJOCO_ZOO,
    "num_steps": 64,
    "num_minibatches": 16,  # of 32 rows
    "update_epochs": 5,
    "learning_rate": 0.000104019,
    "gamma": 0.9,
    "gae_lambda": 1.0,
    "clip_coef": 0.3,
    "ent_coef": 7.52585e-08,
    "vf_coef": 0.950368,
    "max_grad_norm": 0.9,
}
HUMANOID = {
    **MUJOCO_ZOO,
    **WIDE,
    "total_timesteps": 10_000_000,
    "num_steps": 64,
    "num_minibatches": 2,  # of 256 rows
    "update_epochs": 5,
    "learning_rate": 3.56987e-05,
    "gamma": 0.95,
    "gae_lambda": 0.9,
    "clip_coef": 0.3,
    "ent_coef": 0.00238306,
    "vf_coef": 0.431892,
    "max_grad_norm": 2.0,
}
HUMANOID_STANDUP = {
    **MUJOCO_ZOO,
    **WIDE,
    "total_timesteps": 10_000_000,
    "num_steps": 64,
    "num_minibatches": 16,  # of 32 rows
    "update_epochs": 20,
    "learning_rate": 2.55673e-05,
    "gae_lambda": 0.9,
    "clip_coef": 0.3,
    "ent_coef": 3.62109e-06,
    "vf_coef": 0.430793,
    "max_grad_norm": 0.7,
}

ATARI = {
    "clip_reward": True,  # as the zoo's wrapper does
    "total_timesteps": 10_000_000,
    "num_envs": 8,
    "num_steps": 128,
    "num_minibatches": 4,  # of 256 rows
    "update_epochs": 4,
    "learning_rate": 2.5e-4,
    "anneal_lr": True,
    "clip_coef": 0.1,
    "anneal_clip": True,
    "ent_coef": 0.01,
    "vf_coef": 0.5,
}

PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("none", "CartPole-v1", "TrainConfig", {}),
        Preset("default", "CartPole-v1", OWN, {}),
        Preset("general", "CartPole-v1", OWN, GENERAL),
        Preset("article", "CartPole-v1", "the article that fastppo grew from", ARTICLE),
        Preset("continuous", "Pendulum-v1", OWN, PENDULUM),
        # families, for the environments without a preset of their own
        Preset("classic", "CartPole-v1", OWN, {}),
        Preset("box2d", "LunarLander-v3", ZOO_NORMED, LUNAR_LANDER),
        Preset("mujoco", "Ant-v5", TIANSHOU, MUJOCO),
        Preset("atari", "ALE/Pong-v5", ZOO, ATARI),
        # environments
        Preset("Acrobot", "Acrobot-v1", ZOO_NORMED, ACROBOT),
        Preset("MountainCar", "MountainCar-v0", ZOO_NORMED, MOUNTAIN_CAR),
        Preset("MountainCarContinuous", "MountainCarContinuous-v0", "a start, not tuned", MOUNTAIN_CAR_CONTINUOUS),
        Preset("Pendulum", "Pendulum-v1", OWN, PENDULUM),
        Preset("LunarLander", "LunarLander-v3", ZOO_NORMED, LUNAR_LANDER),
        Preset("LunarLanderContinuous", "LunarLanderContinuous-v3", ZOO_NORMED, LUNAR_LANDER),
        Preset("BipedalWalker", "BipedalWalker-v3", ZOO, BIPEDAL_WALKER),
        Preset("BipedalWalkerHardcore", "BipedalWalkerHardcore-v3", ZOO, BIPEDAL_WALKER_HARDCORE),
        Preset("HalfCheetah", "HalfCheetah-v5", TIANSHOU, MUJOCO),
        Preset("Hopper", "Hopper-v5", TIANSHOU, MUJOCO),
        Preset("Walker2d", "Walker2d-v5", TIANSHOU, MUJOCO),
        Preset("InvertedDoublePendulum", "InvertedDoublePendulum-v5", TIANSHOU_NORMED, MUJOCO | LAYER_NORM),
        Preset("Swimmer", "Swimmer-v5", ZOO_SWIMMER, SWIMMER),
        Preset("Reacher", "Reacher-v5", ZOO, REACHER),
        Preset("Humanoid", "Humanoid-v5", ZOO, HUMANOID),
        Preset("HumanoidStandup", "HumanoidStandup-v5", ZOO, HUMANOID_STANDUP),
    )
}
