"""Atari as in the literature: preprocessing, episodes of one life, and ALE's own vector environment.

Rewards are not clipped here, so scores are those of the game; the learner clips. A lost life is a termination, and the game
goes on, as in OpenAI baselines' EpisodicLifeEnv with FireResetEnv: the next step ignores its action and presses FIRE, or
nothing where the game has no FIRE. Neither ALE nor EnvPool has this: with `episodic_life`, ALE 0.12 resets the whole game at
each lost life, so that nothing after the first life is ever played, and EnvPool 1.2 plays up to 30 no-ops and drops their
rewards. Here both run whole games, and `EpisodicLife` ends episodes for both.

Knows nothing of networks or learning. Does not import torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import SyncVectorEnv, VectorEnv, VectorWrapper
from numpy.typing import NDArray

from fastppo.envs.preprocessing import Preprocessing
from fastppo.envs.registry import find_spec, first_line
from fastppo.envs.wrappers import join_channels
from fastppo.errors import UsageError, brief
from fastppo.system.cpus import engine_threads

# 30 minutes at 60 frames a second (Machado et al. 2018, section 4.2), the limit of every id that ALE registers.
MAX_FRAMES = 108_000
# Games whose minimal action set has no FIRE as its second action; EnvPool does not say what its actions mean.
NO_FIRE = {
    "asterix", "backgammon", "crazy_climber", "freeway", "frogger", "journey_escape", "koolaid", "kung_fu_master",
    "lost_luggage", "ms_pacman", "pacman", "skiing", "surround", "tutankham", "video_checkers",
}  # fmt: skip
NOOP, FIRE = 0, 1
# the flags for games that do what those for other environments do
OWN_FLAGS = {
    "--frame-skip": "--atari-frame-skip",
    "--grayscale": "--atari-grayscale",
    "--resize": "--atari-screen-size",
    "--frame-stack": "--atari-frame-stack",
}


@dataclass(frozen=True)
class AtariSettings:
    """How a game becomes an environment. Sources: DQN, Mnih et al. 2015; ALE, Machado et al. 2018; OpenAI baselines."""

    noop_max: int = 30
    """Up to this many frames without action at the start of a game (DQN; baselines' NoopResetEnv)."""
    frame_skip: int = 4
    """Frames that one action is held for; the last two are joined by their maximum (DQN)."""
    screen_size: int = 84
    """Height and width of an observation, pixels (DQN)."""
    grayscale: bool = True
    """Luminance instead of colour (DQN)."""
    frame_stack: int = 4
    """Screens in one observation (DQN)."""
    sticky_actions: float = 0.0
    """Probability that a frame repeats the action before: 0 in DQN and baselines, 0.25 in Machado et al. 2018."""
    episodic_life: bool = True
    """A lost life ends an episode for the learner (DQN; baselines' EpisodicLifeEnv; Machado et al. 2018 advise against it)."""
    fire_reset: bool = True
    """FIRE starts a game and a life where the game has it (baselines' FireResetEnv)."""
    full_action_space: bool = False
    """All 18 actions instead of those that the game uses (Machado et al. 2018)."""


def make_ale(env_id: str, num_envs: int, env_kwargs: Mapping[str, Any], settings: AtariSettings) -> VectorEnv:
    """N games in ALE's own vector environment, with a thread for each game up to the number of cores.

    Observations are (N, frame_stack, H, W) uint8, in colour (N, 3 * frame_stack, H, W). Every returned array is new. With
    episodic_life the result is an `EpisodicLife`.

    Args:
        env_id: an id for which `is_atari`; `settings` override its own frame skip, sticky actions and action space.
        env_kwargs: further arguments of ale_py.vector_env.AtariVectorEnv.

    Raises:
        UsageError: an argument that is not ALE's, or that a flag sets; names it.
    """
    from ale_py.vector_env import AtariVectorEnv

    own: dict[str, Any] = {
        "frameskip": settings.frame_skip,
        "repeat_action_probability": settings.sticky_actions,
        "full_action_space": settings.full_action_space,
        "noop_max": settings.noop_max,
        "img_height": settings.screen_size,
        "img_width": settings.screen_size,
        "grayscale": settings.grayscale,
        "stack_num": settings.frame_stack,
        "use_fire_reset": settings.fire_reset,
        "episodic_life": False,
        "life_loss_info": False,
        "reward_clipping": False,
        "continuous": False,
    }
    refuse_own(env_id, env_kwargs, (*own, "game", "num_envs", "batch_size", "autoreset_mode"))
    try:
        kwargs = {**find_spec(env_id).kwargs, **engine_threads(num_envs), **own, **env_kwargs}
        ale = AtariVectorEnv(num_envs=num_envs, **kwargs)
    except TypeError as error:
        raise UsageError(f"--env-kwargs do not fit {env_id}: {first_line(error)}") from None
    except Exception as error:
        raise UsageError(f"--env-id {env_id} cannot be made: {brief(error)}") from None
    actions = [action.name for action in ale.ale.get_action_set()]
    envs = AleVectorEnv(ale) if settings.grayscale else _channels_first(ale)
    return with_lives(envs, settings, has_fire=actions[FIRE] == "FIRE")


def make_rgb_ale(env_id: str, env_kwargs: Mapping[str, Any], settings: AtariSettings) -> VectorEnv:
    """One game through gymnasium's wrappers, whose `render` returns the console's screen, (210, 160, 3).

    ALE's vector environment does not render. Observations equal those of `make_ale` but for 1 of 255, which OpenCV may round
    otherwise.

    Args:
        env_kwargs: max_num_frames_per_episode, or nothing.

    Raises:
        UsageError: other arguments, or OpenCV is not installed.
    """
    from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation  # here: 0.2 s

    other = next((name for name in env_kwargs if name != "max_num_frames_per_episode"), None)
    if other is not None:
        raise UsageError(f"--env-kwargs {other}: {env_id} cannot be rendered with it, only ALE's vector environment takes it")
    own = {
        "frameskip": 1,
        "repeat_action_probability": settings.sticky_actions,
        "full_action_space": settings.full_action_space,
        "render_mode": "rgb_array",
    }
    game = gym.make(env_id, disable_env_checker=True, **{**env_kwargs, **own})
    meanings: list[str] = game.unwrapped.get_action_meanings()  # type: ignore[attr-defined]  # of AtariEnv
    has_fire = meanings[FIRE] == "FIRE"
    start = _Start(game, settings.noop_max, fire=settings.fire_reset and has_fire)
    try:
        screens = AtariPreprocessing(
            start,
            noop_max=0,
            frame_skip=settings.frame_skip,
            screen_size=settings.screen_size,
            grayscale_obs=settings.grayscale,
        )
    except gym.error.DependencyNotInstalled:
        game.close()
        raise UsageError(f"drawing {env_id} needs OpenCV: pip install 'fastppo[video]'") from None
    stacked = FrameStackObservation(screens, settings.frame_stack, padding_type="zero")
    stacked.metadata = {**stacked.metadata, "render_fps": 60 / settings.frame_skip}
    envs: VectorEnv = SyncVectorEnv([lambda: stacked])
    return with_lives(envs if settings.grayscale else _channels_first(envs), settings, has_fire)


class AleVectorEnv(VectorWrapper):
    """ALE's vector environment with the names for a step in two parts that other vector environments have."""

    def step_async(self, actions: NDArray[Any]) -> None:
        """Begin a step in ALE's threads; actions (N,) whole numbers."""
        self.env.send(actions)  # type: ignore[attr-defined]

    def step_wait(self) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Wait for its end: what `step` returns."""
        result: tuple[Any, Any, Any, Any, dict[str, Any]] = self.env.recv()  # type: ignore[attr-defined]
        return result


class _Start(gym.Wrapper[Any, Any, Any, Any]):
    """A game starts as ALE's vector environment has it: up to noop_max frames without action, then one of FIRE."""

    def __init__(self, env: gym.Env[Any, Any], noop_max: int, fire: bool) -> None:
        super().__init__(env)
        self.noop_max = noop_max
        self.fire = fire

    def reset(self, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(**kwargs)
        noops = int(self.unwrapped.np_random.integers(self.noop_max + 1))
        for action in [NOOP] * noops + [FIRE] * self.fire:
            obs, _, terminated, truncated, info = self.env.step(action)
            if terminated or truncated:
                obs, info = self.env.reset()
        return obs, info


def refuse_wrappers(env_id: str, env_kwargs: Mapping[str, Any], preprocessing: Preprocessing) -> None:
    """Raise UsageError for a flag that is for other environments than games; names the one for games."""
    for name in preprocessing.flags:
        instead = f"use {OWN_FLAGS[name]} instead" if name in OWN_FLAGS else "leave it off"
        raise UsageError(f"{name} is not for {env_id}, since Atari's games have preprocessing of their own: {instead}")
    if "max_episode_steps" in env_kwargs:
        raise UsageError(f"--max-episode-steps is not for {env_id}: use --env-kwargs max_num_frames_per_episode=108000 instead")


def refuse_own(env_id: str, env_kwargs: Mapping[str, Any], own: tuple[str, ...]) -> None:
    """Raise UsageError for an argument that fastppo sets itself."""
    for name in own:
        if name in env_kwargs:
            raise UsageError(
                f"--env-kwargs {name} is not for {env_id}: use --num-envs, --seed or the --atari-... flags instead"
            )


def with_lives(envs: VectorEnv, settings: AtariSettings, has_fire: bool) -> VectorEnv:
    """`envs`, inside an `EpisodicLife` if settings say so; has_fire: whether action 1 is FIRE."""
    return EpisodicLife(envs, FIRE if settings.fire_reset and has_fire else NOOP) if settings.episodic_life else envs


def _channels_first(envs: VectorEnv) -> VectorEnv:
    """Stacked colour screens (N, stack, H, W, 3) as (N, 3 * stack, H, W)."""
    from gymnasium.wrappers.vector import TransformObservation  # here: 0.2 s

    stack, height, width, channels = envs.single_observation_space.shape or ()
    joined = gym.spaces.Box(0, 255, (stack * channels, height, width), np.uint8)
    return TransformObservation(envs, join_channels, single_observation_space=joined)


class EpisodicLife(VectorWrapper):
    """Makes a lost life a termination, and the game goes on.

    Wraps a NEXT_STEP environment of whole games whose info has "lives", (N,). After every step the attribute `game_over`, (N,)
    bool, says which ends are ends of a game, with a complete score; the others are lost lives. It is not a key of the info,
    where a user's environment may have a key of that name with another meaning.

    The row after a lost life is a resetting row: its action is `resume_action` instead of the agent's, it is not an end, and
    its reward is 0. The reward of the game in that row is added to the next row's, so that rewards add up to the score. If the
    game ends in that row, the next row is a termination.
    """

    def __init__(self, envs: VectorEnv, resume_action: int) -> None:
        super().__init__(envs)
        self.resume_action = resume_action
        self._start(np.zeros(envs.num_envs, np.int32))

    def _start(self, lives: NDArray[Any]) -> None:
        none = np.zeros(self.num_envs, bool)
        self.game_over = none
        self._lives = lives  # (N,) after the last step
        self._ended = none  # (N,) the game ended in the last step: this one starts another
        self._resuming = none  # (N,) the last step was an end, and the game goes on
        self._late = none  # (N,) the game ended in a resetting row, and its end is not yet reported
        self._held = np.zeros(self.num_envs)  # (N,) reward of a resetting row, not yet reported

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start new games in all environments; seed and options as the environment takes them."""
        obs, info = self.env.reset(seed=seed, options=options)
        self._start(info["lives"])
        return obs, info

    def step(self, actions: NDArray[Any]) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """actions (N,) whole numbers -> obs as they come, reward (N,) float64, terminated, truncated (N,) bool, info."""
        return self._with_ends(*self.env.step(self._resumed(actions)))

    def step_async(self, actions: NDArray[Any]) -> None:
        """The first part of `step`, where the environment has one."""
        self.env.step_async(self._resumed(actions))  # type: ignore[attr-defined]

    def step_wait(self) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """The second part of `step`."""
        return self._with_ends(*self.env.step_wait())  # type: ignore[attr-defined]

    def _resumed(self, actions: NDArray[Any]) -> NDArray[Any]:
        return np.where(self._resuming, self.resume_action, actions)

    def _with_ends(
        self, obs: Any, reward: Any, terminated: Any, truncated: Any, info: dict[str, Any]
    ) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """The result of a step, with the ends of lives."""
        resuming, late = self._resuming, self._late
        lives, ended = info["lives"], terminated | truncated
        # some games stand at 0 lives for a few frames before they end: that is no life to go on with (baselines)
        lost = (lives < self._lives) & (lives > 0) & ~ended & ~self._ended & ~resuming
        reward = reward + self._held
        self._held = np.where(resuming, reward, 0.0)
        self._lives, self._ended, self._resuming, self._late = lives, ended, lost | late, ended & resuming
        self.game_over = (ended & ~resuming) | late
        return (
            obs,
            np.where(resuming, 0.0, reward),
            (terminated & ~resuming) | lost | late,
            truncated & ~resuming,
            info,
        )
