"""Environments of OpenAI's gym, which gymnasium has replaced, converted by shimmy.

Of gym 0.21: `reset` returns the observation alone, `step` four values. Of gym 0.26: both as in gymnasium. Which one it is, is
seen by its `reset`, which takes a seed since 0.26. Imports shimmy, and with it gym, only for such an environment.
"""

import importlib
import inspect
import sys
from typing import Any

import gymnasium as gym

from fastppo.errors import UsageError

OLD_KEYS = {"render.modes": "render_modes", "video.frames_per_second": "render_fps"}  # of metadata, by their names since


def is_old(env: object) -> bool:
    """Whether an object is an environment of OpenAI's gym; does not import it."""
    return any(kind.__module__.partition(".")[0] == "gym" and kind.__name__ == "Env" for kind in type(env).__mro__)


def is_old_id(name: str) -> bool:
    """Whether gym, which somebody's module has imported, knows an id."""
    registry = getattr(getattr(sys.modules.get("gym"), "envs", None), "registry", {})
    return name in getattr(registry, "env_specs", registry)  # of gym 0.21, of 0.26


def make_old(env_id: str, /, **kwargs: Any) -> Any:
    """gym's environment of an id, or module:Id. gym 0.26 is told which ones were written for gym before that.

    Such a one returns the observation alone from `reset`, which fails in the wrappers that gym 0.26 puts around it.
    """
    gym_make = importlib.import_module("gym").make
    told = "apply_api_compatibility"
    if told not in inspect.signature(gym_make).parameters or told in kwargs:
        return gym_make(env_id, **kwargs)
    tried = {name: value for name, value in kwargs.items() if name != "render_mode"}  # older ones do not take it
    env = gym_make(env_id, **tried)
    first = env.unwrapped.reset()
    is_older = not (isinstance(first, tuple) and len(first) == 2 and isinstance(first[1], dict))
    if not is_older and tried == kwargs:
        return env
    env.close()
    return gym_make(env_id, **({told: True} if is_older else {}), **kwargs)


def takes_seed(env: Any) -> bool:
    """Whether an environment of gym is one of 0.26."""
    return "seed" in inspect.signature(env.unwrapped.reset).parameters


def converted(env: Any, render_mode: str | None = None) -> gym.Env[Any, Any]:
    """The environment of gym as one of gymnasium.

    Args:
        render_mode: for one of gym 0.21; one of 0.26 has been made with its own.

    Raises:
        UsageError: shimmy is not installed, or does not know a space.
    """
    try:
        from shimmy.openai_gym_compatibility import GymV21CompatibilityV0, GymV26CompatibilityV0
    except ImportError:
        raise UsageError(
            "an environment of OpenAI's gym needs a package that is not installed: pip install 'fastppo[gym]', or write it for "
            "gymnasium"
        ) from None
    env = _without_checker(env)
    try:
        is_new = takes_seed(env)
        made: Any = GymV26CompatibilityV0(env=env) if is_new else GymV21CompatibilityV0(env=env, render_mode=render_mode)
    except NotImplementedError as error:
        raise UsageError(f"it is an environment of OpenAI's gym: {error}") from None
    made.metadata = {OLD_KEYS.get(key, key): value for key, value in (made.metadata or {}).items()}
    before = getattr(env.unwrapped, "env", None) if is_new else env  # what gym 0.26 made compatible, if it had to
    return made if before is None or hasattr(before, "seed") else Unseeded(made)


def _without_checker(env: Any) -> Any:
    """The environment without gym's passive checker, which fails with numpy 2; envs/check.py has its task."""
    if type(env).__name__ == "PassiveEnvChecker":
        return _without_checker(env.env)
    if env is not env.unwrapped and hasattr(env, "env"):
        env.env = _without_checker(env.env)
    return env


class Unseeded(gym.Wrapper[Any, Any, Any, Any]):
    """An environment that was written for gym 0.21 and has no `seed`."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        return self.env.reset()
