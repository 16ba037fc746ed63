"""Simulators that step N environments of tensors, as gymnasium vector environments. No tensor leaves its device.

Recognised by what the object is:

- Isaac Lab: a gymnasium.Env with `num_envs` and `device`, whose observations are a dict of groups. The policy gets "policy".
- The VecEnv of rsl_rl, which Genesis' examples follow: `num_envs`, `num_actions`, `device`, `get_observations()`, and a `step`
  that returns observations, rewards, dones and extras; `time_outs` in the extras says which ends are truncations.
- ManiSkill 3: its ManiSkillVectorEnv, or the environment that it is made of.

The first two reset within the step and do not return the final observation. As in rsl_rl, a truncated episode is bootstrapped
from the value of the observation before it. Does not import torch, which these environments have imported.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from gymnasium.spaces import Box, Dict, Space
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from fastppo.errors import UsageError

GROUPS = ("policy", "actor")  # of observations, by the names that Isaac Lab and rsl_rl have for those of the policy


class Contract(NamedTuple):
    """How one kind of simulator is called."""

    observation_space: Space[Any]  # of one environment
    action_space: Space[Any]
    reset: Callable[[int | None], Any]  # seed -> obs (N, ...)
    step: Callable[[Any], tuple[Any, Any, Any, Any]]  # actions -> obs, reward, terminated, truncated


class SimulatorEnvs(VectorEnv[Any, Any, Any]):
    """N environments of a simulator that resets within the step and keeps the final observation to itself."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012 (gymnasium's own form)

    def __init__(self, env: Any, contract: Contract) -> None:
        self.simulator, self._contract = env, contract
        self.num_envs = int(_attribute(env, "num_envs"))
        self.metadata = {**(getattr(env, "metadata", None) or {}), **SimulatorEnvs.metadata}
        self.render_mode = getattr(env, "render_mode", None)
        self.single_observation_space, self.single_action_space = contract.observation_space, contract.action_space
        self.observation_space = batch_space(contract.observation_space, self.num_envs)
        self.action_space = batch_space(contract.action_space, self.num_envs)
        self._last: Any = None  # copy of the last observation

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """New episodes in all environments; options are ignored."""
        obs = self._contract.reset(seed)
        self._last = _copy(obs)
        return obs, {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """actions: (N, ...), a tensor. The info's final_obs is the observation before the step, in all rows."""
        obs, reward, terminated, truncated = self._contract.step(actions)
        before, self._last = self._last, _copy(obs)
        terminated, truncated = (flag.reshape(self.num_envs) != 0 for flag in (terminated, truncated))
        truncated = truncated & ~terminated
        info = {"final_obs": before, "_final_obs": terminated | truncated}
        return obs, reward.reshape(self.num_envs), terminated, truncated, info

    def render(self) -> Any:
        """As the simulator renders."""
        return self.simulator.render()

    def close_extras(self, **kwargs: Any) -> None:
        """Close the simulator, if it can be closed."""
        if hasattr(self.simulator, "close"):
            self.simulator.close()


def as_vector_env(made: Any) -> Any:
    """A simulator as a vector environment; any other object as it is.

    Raises:
        UsageError: a simulator that cannot be trained on as it was made.
    """
    if isinstance(made, VectorEnv):
        return _declared(made) if _is_maniskill(made) else made
    if not steps_many(made):
        return made
    if _is_maniskill(made):
        wrapper = importlib.import_module("mani_skill.vector.wrappers.gymnasium").ManiSkillVectorEnv
        return _declared(wrapper(made))
    return SimulatorEnvs(made, _rsl_rl(made) if hasattr(made, "get_observations") else _isaac_lab(made))


def steps_many(env: Any) -> bool:
    """Whether an object that is no vector environment of gymnasium steps several environments of tensors at once."""
    if isinstance(env, VectorEnv) or _attribute(env, "num_envs") is None or _attribute(env, "device") is None:
        return False
    has_spaces = isinstance(_attribute(env, "single_action_space"), Space)
    return has_spaces or (hasattr(env, "get_observations") and hasattr(env, "num_actions"))


def _attribute(env: Any, name: str) -> Any:
    """An attribute of an environment, inside its wrappers too; None: it has none."""
    found = getattr(env, name, None)
    return found if found is not None else getattr(getattr(env, "unwrapped", None), name, None)


def _is_maniskill(env: Any) -> bool:
    inner = env.base_env if hasattr(env, "base_env") else getattr(env, "unwrapped", env)
    return any(kind.__module__.partition(".")[0] == "mani_skill" for kind in type(inner).__mro__)


def _declared(envs: Any) -> VectorEnv:
    """ManiSkill's vector environment with its autoreset mode in the metadata, which it resets by and does not name."""
    if not envs.auto_reset:
        raise UsageError("ManiSkillVectorEnv was made with auto_reset=False, and is not reset then: leave that off")
    envs.metadata = {**(envs.metadata or {}), "autoreset_mode": AutoresetMode.SAME_STEP}
    return envs


def _isaac_lab(env: Any) -> Contract:
    space, actions = _attribute(env, "single_observation_space"), _attribute(env, "single_action_space")
    group = _group(space.spaces) if isinstance(space, Dict) else None

    def chosen(obs: Any) -> Any:
        return _plain(obs if group is None else obs[group])

    def reset(seed: int | None) -> Any:
        return chosen(env.reset(seed=seed)[0])

    def step(action: Any) -> tuple[Any, Any, Any, Any]:
        obs, reward, terminated, truncated, _ = env.step(action)
        return chosen(obs), reward, terminated, truncated

    return Contract(space if group is None else space[group], actions, reset, step)


def _rsl_rl(env: Any) -> Contract:
    def chosen(result: Any) -> Any:
        obs = result[0] if isinstance(result, tuple) else result  # (obs, extras) before rsl_rl 3
        return _plain(obs[_group(obs)]) if _is_mapping(obs) else obs

    def reset(seed: int | None) -> Any:
        if seed is not None and callable(getattr(env, "seed", None)):
            env.seed(seed)
        return chosen(env.reset() if hasattr(env, "reset") else env.get_observations())

    def step(action: Any) -> tuple[Any, Any, Any, Any]:
        obs, reward, done, extras = env.step(action)
        done, time_outs = done != 0, extras.get("time_outs")
        truncated = done ^ done if time_outs is None else done & (time_outs != 0)
        return chosen(obs), reward, done & ~truncated, truncated

    space = _space_of(chosen(env.get_observations()))
    return Contract(space, Box(-np.inf, np.inf, (int(env.num_actions),)), reset, step)


def _group(groups: Any) -> str:
    """The group of observations that the policy gets; raises UsageError."""
    names = list(groups.keys())
    for name in GROUPS:
        if name in names:
            return name
    if len(names) == 1:
        return names[0]
    raise UsageError(f"its observations are groups ({', '.join(map(str, names))}): the one to train on has to be called policy")


def _space_of(obs: Any) -> Space[Any]:
    """The unbounded space of an observation (N, ...) of floats, or of a dict of these."""
    if isinstance(obs, Mapping):
        return Dict({name: _space_of(part) for name, part in obs.items()})
    return Box(-np.inf, np.inf, tuple(obs.shape[1:]))


def _is_mapping(obs: Any) -> bool:
    """Whether it is a dict or a TensorDict."""
    return isinstance(obs, Mapping) or (hasattr(obs, "keys") and hasattr(obs, "batch_size"))


def _plain(obs: Any) -> Any:
    """Dicts and TensorDicts as dicts, with their tensors."""
    return {name: _plain(obs[name]) for name in obs.keys()} if _is_mapping(obs) else obs  # noqa: SIM118 (a TensorDict iterates over rows)


def _copy(obs: Any) -> Any:
    return {name: _copy(part) for name, part in obs.items()} if isinstance(obs, Mapping) else obs.clone()


def refuse_many(env: object) -> None:
    """Raise UsageError for a simulator where one environment is expected."""
    if steps_many(env):
        number = _attribute(env, "num_envs")
        raise UsageError(f"it returned {number} environments at once: give the function an argument num_envs, to be made from")
