"""Environments of several agents with PettingZoo's parallel API, written without it. `support.parallel_envs` is an --env-id."""

import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, Tuple


class Relay:
    """Three agents and six steps of known ends.

    `early` terminates in step 2, `late` joins after step 2 and is truncated in step 5, `long` terminates in step 6. An agent
    observes its number, the step, and a random number of the episode. Every step pays 1 to `early`, 10 to `late` and 100 to
    `long`, and 0.5 more for action 1.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}  # noqa: RUF012
    possible_agents = ("early", "late", "long")
    pay = {"early": 1.0, "late": 10.0, "long": 100.0}  # noqa: RUF012

    def __init__(self, render_mode=None, masks=None):
        """masks: "obs" or "info", where action 1 is illegal for `late`; None: there are none."""
        self.render_mode, self.masks = render_mode, masks

    def observation_space(self, agent):
        space = Box(-10.0, 10.0, (3,))
        return Dict({"observation": space, "action_mask": Box(0, 1, (2,), np.int8)}) if self.masks == "obs" else space

    def action_space(self, agent):
        return Discrete(2)

    def reset(self, seed=None, options=None):
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self.time, self.luck, self.agents = 0, self.rng.random(), ["early", "long"]
        return self._of_all(self._obs), self._of_all(self._info)

    def step(self, actions):
        assert set(actions) == set(self.agents)
        if self.masks is not None:
            assert actions.get("late") != 1
        self.time += 1
        acted = self.agents
        rewards = {agent: self.pay[agent] + 0.5 * int(actions[agent]) for agent in acted}
        terminations = {agent: (agent, self.time) in (("early", 2), ("long", 6)) for agent in acted}
        truncations = {agent: (agent, self.time) == ("late", 5) for agent in acted}
        obs, infos = self._of_all(self._obs), self._of_all(self._info)
        self.agents = [agent for agent in acted if not terminations[agent] and not truncations[agent]]
        if self.time == 2:
            self.agents.append("late")
            obs["late"], infos["late"] = self._obs("late"), self._info("late")
        return obs, rewards, terminations, truncations, infos

    def _of_all(self, function):
        return {agent: function(agent) for agent in self.agents}

    def _obs(self, agent):
        obs = np.array([self.possible_agents.index(agent), self.time, self.luck], np.float32)
        return {"observation": obs, "action_mask": self._mask(agent)} if self.masks == "obs" else obs

    def _info(self, agent):
        return {"action_mask": self._mask(agent)} if self.masks == "info" else {}

    def _mask(self, agent):
        return np.array([1, agent != "late"], np.int8)

    def render(self):
        return np.full((8, 8, 3), self.time, np.uint8)

    def close(self):
        self.closed = True


parallel_env = Relay


class Telling(Relay):
    """Infos have the step, and that of `late` a number of its own."""

    def _info(self, agent):
        return {
            **super()._info(agent),
            "time": self.time,
            "text": "none",
            **({"own": np.float32(7)} if agent == "late" else {}),
        }


class Team(Relay):
    """Two agents who are paid for being unlike: 1 each where their actions differ. One policy needs to know who is who."""

    possible_agents = ("one", "other")

    def reset(self, seed=None, options=None):
        self.time, self.agents = 0, list(self.possible_agents)
        return self._of_all(self._obs), {}

    def step(self, actions):
        self.time += 1
        paid = float(actions["one"] != actions["other"])
        obs, over = self._of_all(self._obs), self._of_all(lambda _: self.time == 8)
        rewards, never = self._of_all(lambda _: paid), self._of_all(lambda _: False)
        self.agents = [] if self.time == 8 else self.agents
        return obs, rewards, over, never, {}

    def _obs(self, agent):
        return np.zeros(2, np.float32)

    def observation_space(self, agent):
        return Box(-1.0, 1.0, (2,))


class Alone(Team):
    """One agent."""

    possible_agents = ("one",)

    def step(self, actions):
        return super().step({**actions, "other": 0})


class Compound(Team):
    """An action has two parts, in a Dict or Tuple, and an agent is paid what they say."""

    def __init__(self, kind="dict"):
        """kind: of the action space, "dict" or "tuple"."""
        self.kind = kind

    def action_space(self, agent):
        parts = {"choice": Discrete(5), "push": Box(-1.0, 1.0, (1,))}
        return Dict(parts) if self.kind == "dict" else Tuple(parts.values())

    def step(self, actions):
        obs, _, *others = super().step({"one": 0, "other": 0})
        parts = {agent: action.values() if self.kind == "dict" else action for agent, action in actions.items()}
        return obs, {agent: float(choice + push[0]) for agent, (choice, push) in parts.items()}, *others


class Unlike(Relay):
    """Spaces that differ."""

    def __init__(self, actions=False, **kwargs):
        super().__init__(**kwargs)
        self.actions = actions

    def observation_space(self, agent):
        return Box(-10.0, 10.0, (4 if agent == "long" else 3,))

    def action_space(self, agent):
        return Discrete(3 if agent == "late" and self.actions else 2)


class Wrong(Relay):
    """Breaks a rule of the API: "leaves" without an end, "stranger" joins, "form" of a result, "mask" that is missing."""

    def __init__(self, how, **kwargs):
        super().__init__(masks="info" if how == "mask" else None, **kwargs)
        self.how = how

    def step(self, actions):
        result = super().step(actions)
        if self.how == "leaves" and self.time == 1:
            self.agents.remove("early")
        if self.how == "stranger":
            self.agents.append("nobody")
        if self.how == "mask" and self.time == 3:
            result[-1]["long"].clear()
        return result[:4] if self.how == "form" else result
