"""Environments of several agents that act at once, PettingZoo's parallel API, as a vector environment with a row an agent.

`AgentsEnv` is one environment of A agents as a gymnasium environment, so that everything that makes, checks and steps
environments one by one, in one process or several, works with it. `AgentRows` makes the vector environment of N of them one of
N * A rows: row n * A + a is agent a of environment n, in the order of `possible_agents`. All agents have one policy, so their
spaces must be equal.

A row is a transition while its agent acts (`AgentRows.acting`). An agent that has ended, or has not joined yet, has rows that
are no transitions, with its last observation. The environment is reset when no agent is left, in the step after that
(NEXT_STEP). An AEC environment is converted by PettingZoo: `aec_to_parallel` where its agents move at once; else
`turn_based_aec_to_parallel`, where an agent that waits for its turn has transitions whose action changes nothing.

An agent's action mask may be `action_mask` in its Dict observation or in its info. A number to be logged is the mean over the
agents whose infos have it, each in its last step. Does not import torch or, for the parallel API, PettingZoo.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, MultiBinary, Space
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space, concatenate, create_empty_array, iterate
from numpy.typing import NDArray

from fastppo.envs.masks import has_mask
from fastppo.errors import UsageError

AGENTS = "fastppo_agents"  # key of the metadata of an `AgentsEnv`: its Agents
AGENT_INFOS = "fastppo_agent_infos"  # key of the info of a step: by agent, the info of its last step in this episode
FLAGS = ("terminated", "truncated", "acting")  # of each agent; acting: whether its next action counts


class Agents(NamedTuple):
    """The agents of an environment."""

    names: tuple[Any, ...]
    observation_space: Space[Any]  # of one agent
    action_space: Space[Any]  # of one agent


def has_agents(env: object) -> bool:
    """Whether an object is an environment of PettingZoo: parallel, or AEC."""
    return hasattr(env, "possible_agents") and not isinstance(env, gym.Env | VectorEnv)


def agents_of(env: gym.Env[Any, Any] | VectorEnv) -> Agents | None:
    """The agents of an `AgentsEnv`, inside wrappers or in a vector environment; None: it is another environment."""
    return (env.metadata or {}).get(AGENTS)


class AgentsEnv(gym.Env[Any, Any]):
    """One environment of A agents. Its observation is a Dict:

    agents: the agents' observations, (A, ...).
    reward: (A,) float64; terminated, truncated, acting: (A,) of 0 and 1.
    action_mask: (A * n,), the agents' masks in a row, where their observations contain one; for those who act at random.

    Its action is the batch of the agents' actions; that of an agent that does not act is not used. It terminates when no agent
    acts any more, and its own reward is the sum of the agents'.
    """

    def __init__(self, env: Any) -> None:
        """env: a ParallelEnv or AECEnv. Raises UsageError for one whose agents cannot have one policy."""
        self.parallel, self._takes_turns = _parallel(env)
        names = tuple(self.parallel.possible_agents)
        if not names:
            raise UsageError("its possible_agents is empty")
        spaces = [(self.parallel.observation_space(name), self.parallel.action_space(name)) for name in names]
        _refuse_unequal(names, spaces)
        self._agents = Agents(names, *spaces[0])
        self.metadata = {**(getattr(self.parallel, "metadata", None) or {}), AGENTS: self._agents}
        self.render_mode = getattr(self.parallel, "render_mode", None)
        self._has_mask = has_mask(self._agents.observation_space)
        self._mask_size: int | None = None  # of masks in the infos; None: there are none
        self.observation_space = _observed(self._agents)
        self.action_space = batch_space(self._agents.action_space, len(names))
        self._acting = np.zeros(len(names), bool)
        self._obs: list[Any] = []  # last observation of each agent
        self._infos: dict[Any, dict[str, Any]] = {}  # last info of each agent, where there is something in it

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """A new episode, of the agents that are there from its start."""
        super().reset(seed=seed)
        result = self.parallel.reset(seed=seed, options=options)
        obs, infos = _several(result, "reset", "observations, infos")
        if not obs:
            raise ValueError("reset returned no agent's observation")
        absent = next(iter(obs.values()))  # for agents that join later
        self._obs = [obs.get(name, absent) for name in self._agents.names]
        none = np.zeros(len(self._agents.names))
        self._acting, self._infos = self._present(), {}
        return self._observation(none, none > 0, none > 0), self._info(infos)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """action: (A, ...)."""
        names, acting = self._agents.names, self._acting
        actions = zip(names, iterate(self.action_space, action), acting, strict=True)
        result = self.parallel.step({name: own for name, own, acts in actions if acts})
        obs, rewards, ends, cuts, infos = _several(result, "step", "observations, rewards, terminations, truncations, infos")
        self._obs = [obs.get(name, last) for name, last in zip(names, self._obs, strict=True)]
        reward = np.array([rewards.get(name, 0.0) if acts else 0.0 for name, acts in zip(names, acting, strict=True)], float)
        terminated, truncated = (np.array([bool(flags.get(name, False)) for name in names]) & acting for flags in (ends, cuts))
        ended = terminated | truncated
        present = self._present()
        gone = acting & ~ended & ~present
        if gone.any():
            raise ValueError(
                f"agent {names[gone.argmax()]} has left `agents`, and neither its termination nor its truncation is True"
            )
        self._acting = present & ~ended
        obs = self._observation(reward, terminated, truncated)
        self._infos |= {name: dict(infos[name]) for name, acts in zip(names, acting, strict=True) if acts and infos.get(name)}
        info = self._info(infos) | ({AGENT_INFOS: self._infos} if self._infos else {})
        return obs, float(reward.sum()), not self._acting.any(), False, info

    def _present(self) -> NDArray[np.bool_]:
        """(A,), which agents are in the environment."""
        present = set(self.parallel.agents)
        unknown = present.difference(self._agents.names)
        if unknown:
            raise ValueError(f"agent {min(unknown, key=str)} is not in possible_agents")
        return np.array([name in present for name in self._agents.names])

    def _observation(self, reward: NDArray[Any], terminated: NDArray[np.bool_], truncated: NDArray[np.bool_]) -> dict[str, Any]:
        number, space = len(self._agents.names), self._agents.observation_space
        empty: Any = create_empty_array(space, number)
        agents: Any = concatenate(space, self._obs, empty)
        flags = zip(FLAGS, (terminated, truncated, self._acting), strict=True)
        observation = {"agents": agents, "reward": reward, **{name: flag.astype(np.int8) for name, flag in flags}}
        if self._has_mask:
            mask = self._legal(agents["action_mask"].reshape(number, -1))
            agents["action_mask"][...] = mask.reshape(agents["action_mask"].shape)
            observation["action_mask"] = mask.ravel().astype(np.int8)
        return observation

    def _info(self, infos: Mapping[Any, Mapping[str, Any]]) -> dict[str, Any]:
        """{}, or {"action_mask": (A * n,)} where the agents' infos have masks."""
        masks = [infos.get(name, {}).get("action_mask") for name in self._agents.names]
        if self._has_mask or (self._mask_size is None and all(mask is None for mask in masks)):
            return {}
        missing = self._acting & np.array([mask is None for mask in masks])
        if missing.any():
            raise ValueError(f"the info of agent {self._agents.names[missing.argmax()]} has no action_mask, and others had one")
        self._mask_size = self._mask_size or next(np.size(mask) for mask in masks if mask is not None)
        every = np.ones(self._mask_size, bool)
        flat = np.stack([every if mask is None else np.ravel(mask) != 0 for mask in masks])
        return {"action_mask": self._legal(flat).ravel()}

    def _legal(self, mask: NDArray[Any]) -> NDArray[np.bool_]:
        """Masks (A, n) in which an agent that does not act may do anything, and one that waits for its turn only one thing."""
        mask = (mask != 0) | ~self._acting[:, None]
        if self._takes_turns and self._acting.any():
            selected = self.parallel.aec_env.agent_selection
            waits = self._acting & np.array([name != selected for name in self._agents.names])
            mask[waits] = np.arange(mask.shape[1]) == 0
        return mask

    def render(self) -> Any:
        """As the environment renders."""
        return self.parallel.render()

    def close(self) -> None:
        """Close the environment."""
        self.parallel.close()


class AgentId(gym.Wrapper[Any, Any, Any, Any]):
    """Appends a one-hot vector of the agent to its observation: to a vector of floats itself, else as a part `agent`."""

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        agents = agents_of(env)
        assert agents is not None
        space, number = agents.observation_space, len(agents.names)
        self._one_hot = np.eye(number, dtype=np.float32)
        self._is_vector = isinstance(space, Box) and space.dtype.kind == "f" and len(space.shape) == 1
        one_hot: Any = Box(0.0, 1.0, (number,), np.float32)
        if isinstance(space, Box) and self._is_vector:
            ends: list[Any] = [
                np.concatenate((bound, one)) for bound, one in ((space.low, one_hot.low), (space.high, one_hot.high))
            ]
            space = Box(ends[0], ends[1], dtype=space.dtype.type)
        elif isinstance(space, Dict):
            if "agent" in space.spaces:
                raise UsageError("--agent-id: the observation has a part 'agent' already; leave it off")
            space = Dict({**space.spaces, "agent": one_hot})
        else:
            space = Dict({"observation": space, "agent": one_hot})
        agents = agents._replace(observation_space=space)
        self.metadata = {**env.metadata, AGENTS: agents}
        self.observation_space = _observed(agents)

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(**kwargs)
        return self._with_id(obs), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        return self._with_id(obs), reward, terminated, truncated, info

    def _with_id(self, obs: dict[str, Any]) -> dict[str, Any]:
        agents = obs["agents"]
        if self._is_vector:
            agents = np.concatenate((agents, self._one_hot.astype(agents.dtype)), -1)
        else:
            parts = agents if isinstance(agents, Mapping) else {"observation": agents}
            agents = {**parts, "agent": self._one_hot.copy()}
        return {**obs, "agents": agents}


class AgentRows(VectorEnv[Any, Any, Any]):
    """N environments of A agents as N * A rows. Returned observations are reused in the next step, so copy what you keep.

    After every reset and step the attributes say what the rows' terminated and truncated cannot: `acting`, (N * A,) bool, whose
    next action counts, and `over`, (N * A,) bool, whose environment's episode has ended, with all agents.
    """

    def __init__(self, envs: VectorEnv, agents: Agents) -> None:
        """envs: of N `AgentsEnv`. Closes them and raises UsageError unless they are reset in the next step."""
        if AutoresetMode(envs.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)) is not AutoresetMode.NEXT_STEP:
            envs.close()
            raise UsageError("--autoreset same-step is for environments of one agent: leave it off")
        self.envs_of_agents = envs
        self.num_agents = len(agents.names)
        self.num_envs = envs.num_envs * self.num_agents
        self.metadata = {**envs.metadata, "autoreset_mode": AutoresetMode.NEXT_STEP}
        self.render_mode = envs.render_mode
        self.spec = envs.spec
        self.single_observation_space, self.single_action_space = agents.observation_space, agents.action_space
        self.observation_space = batch_space(agents.observation_space, self.num_envs)
        self.action_space = batch_space(agents.action_space, self.num_envs)
        self.acting = self.over = np.zeros(self.num_envs, bool)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """seed: as the vector environment of N takes it."""
        batch, info = self.envs_of_agents.reset(seed=seed, options=options)  # type: ignore[arg-type]
        self.acting, self.over = self._rows(batch["acting"]) != 0, np.zeros(self.num_envs, bool)
        return self._rows(batch["agents"]), self._masks(info)

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """actions: (N * A, ...), or a dict or tuple of such."""
        whole = _mapped(lambda part: part.reshape(-1, self.num_agents, *part.shape[1:]), actions)
        batch, _, over, limit, info = self.envs_of_agents.step(whole)
        acting, terminated, truncated = (self._rows(batch[name]) != 0 for name in ("acting", "terminated", "truncated"))
        cut = np.repeat(limit, self.num_agents)  # by a time limit around the environment
        self.acting, self.over = acting & ~cut, np.repeat(over | limit, self.num_agents)
        truncated |= acting & cut
        infos = self._masks(info) | self._numbers(info, (terminated | truncated) & self.over)
        return self._rows(batch["agents"]), self._rows(batch["reward"]), terminated, truncated, infos

    def _rows(self, batch: Any) -> Any:
        """(N, A, ...) -> (N * A, ...)."""
        return _mapped(lambda part: part.reshape(-1, *part.shape[2:]), batch)

    def _masks(self, info: Mapping[str, Any]) -> dict[str, Any]:
        """The masks of the infos, (N * A, n)."""
        mask = info.get("action_mask")
        if mask is None:
            return {}
        given = np.repeat(info.get("_action_mask", np.ones(len(mask), bool)), self.num_agents)
        return {"action_mask": mask.reshape(self.num_envs, -1), "_action_mask": given}

    def _numbers(self, info: Mapping[str, Any], ended: NDArray[np.bool_]) -> dict[str, Any]:
        """The numbers of the infos of ended episodes, (N * A,): each in one of the rows that ended with its environment's."""
        numbers: dict[str, Any] = {}
        rows = np.arange(0, self.num_envs, self.num_agents) + ended.reshape(-1, self.num_agents).argmax(-1)
        for name in info if ended.any() else ():
            if not name.startswith("_") and name != "action_mask":
                numbers[name], numbers[f"_{name}"] = np.zeros(self.num_envs), np.zeros(self.num_envs, bool)
                numbers[name][rows] = info[name]
                numbers[f"_{name}"][rows] = info.get(f"_{name}", True)
        return numbers

    def render(self) -> Any:
        """What the environments render."""
        return self.envs_of_agents.render()

    def close_extras(self, **kwargs: Any) -> None:
        """Close the environments."""
        self.envs_of_agents.close(**kwargs)


def with_agent_rows(envs: VectorEnv) -> VectorEnv:
    """`AgentRows` of a vector environment of `AgentsEnv`; others as they are."""
    agents = agents_of(envs)
    return envs if agents is None or isinstance(envs, AgentRows) else AgentRows(envs, agents)


def _mapped(function: Callable[[NDArray[Any]], NDArray[Any]], batch: Any) -> Any:
    """A batch of any space with `function` of each of its arrays."""
    if isinstance(batch, Mapping):
        return {name: _mapped(function, part) for name, part in batch.items()}
    if isinstance(batch, tuple):
        return tuple(_mapped(function, part) for part in batch)
    return function(batch)


def _observed(agents: Agents) -> Dict:
    """The observation space of an `AgentsEnv`."""
    number, space = len(agents.names), agents.observation_space
    parts: dict[str, Space[Any]] = {
        "agents": batch_space(space, number),
        "reward": Box(-np.inf, np.inf, (number,), np.float64),
        **{name: MultiBinary(number) for name in FLAGS},
    }
    if isinstance(space, Dict) and has_mask(space):
        parts["action_mask"] = MultiBinary(number * int(np.prod(space["action_mask"].shape or ())))
    return Dict(parts)


def _parallel(env: Any) -> tuple[Any, bool]:
    """An environment with the parallel API, and whether its agents take turns; raises UsageError."""
    if not hasattr(env, "agent_iter"):
        return env, False
    try:
        from pettingzoo.utils.conversions import aec_to_parallel, turn_based_aec_to_parallel
    except ImportError:
        raise UsageError(
            "an AEC environment needs a package that is not installed: pip install 'fastppo[pettingzoo]'"
        ) from None
    at_once = bool((env.metadata or {}).get("is_parallelizable", False))
    return (aec_to_parallel(env), False) if at_once else (turn_based_aec_to_parallel(env), True)


def _refuse_unequal(names: Sequence[Any], spaces: Sequence[tuple[Space[Any], Space[Any]]]) -> None:
    """Raise UsageError where agents have different spaces; names the first two that differ, and the remedies."""
    differ, remedies = list[str](), list[str]()
    for index, remedy in enumerate(("pad_observations_v0", "pad_action_space_v0")):
        other = next((own for own in zip(names, spaces, strict=True) if own[1][index] != spaces[0][index]), None)
        if other is not None:
            differ.append(f"{names[0]} {_short(spaces[0][index])}, {other[0]} {_short(other[1][index])}")
            remedies.append(remedy)
    if differ:
        raise UsageError(
            f"its agents have different spaces ({'; '.join(differ)}), and one policy is for all: make them equal with "
            f"SuperSuit's {' and '.join(remedies)} in a function of yours, and name that as module:NAME (docs/environments.md)"
        )


def _short(space: Space[Any]) -> str:
    text = str(space)
    return text if len(text) < 60 else f"{type(space).__name__} of shape {space.shape}"


def _several(result: Any, what: str, names: str) -> Any:
    """The values that a call of the parallel API returned; raises ValueError for another number of them."""
    number = names.count(",") + 1
    if not isinstance(result, tuple) or len(result) != number or not all(isinstance(part, Mapping) for part in result):
        raise ValueError(f"{what} of the parallel API has to return {number} dicts: {names}")
    return result
