"""Environments that a function or class makes, without an id in gymnasium's registry: `my_module:make_env`.

Such a function becomes an EnvSpec, so everything that works with a registered id works with it. A function with an argument
`num_envs`, or a VectorEnv class, makes all environments at once. Does not import torch.
"""

import contextlib
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import VectorEnv

from fastppo.envs.agents import AgentsEnv, has_agents
from fastppo.envs.old_gym import converted, is_old, make_old, takes_seed
from fastppo.envs.simulators import as_vector_env, refuse_many
from fastppo.errors import UsageError
from fastppo.system.named import find_named, importable_name, place_of

Function = Callable[..., Any]

_given: dict[str, Function] = {}  # functions that cannot be imported, by their env_id, while `naming` is open


@contextlib.contextmanager
def naming(function: Function) -> Iterator[str]:
    """Context in which the returned env_id means `function`.

    It is module:name where that imports the function. Else the name is in angle brackets, and means nothing afterwards.
    """
    env_id = env_id_of(function)
    if not is_nameless(env_id):
        yield env_id
        return
    before = _given.get(env_id)
    _given[env_id] = function
    try:
        yield env_id
    finally:
        del _given[env_id]
        if before is not None:
            _given[env_id] = before


def env_id_of(function: Function) -> str:
    """The env_id that is recorded for a function: 'my_module:make_env', or 'my_module:<make_env>' if it cannot be imported."""
    name = importable_name(function)
    if name is not None and name.rpartition(":")[2] not in gym.registry:
        return name
    named = function if hasattr(function, "__qualname__") else type(function)
    module, own = str(named.__module__), str(named.__qualname__)
    return f"{module}:{own}" if "<" in own else f"{module}:<{own}>"


def is_nameless(env_id: str) -> bool:
    """Whether the env_id is that of a function that cannot be imported."""
    return "<" in env_id


def given_spec(env_id: str) -> EnvSpec:
    """The spec of a function that cannot be imported. Raises UsageError outside of `naming`."""
    if env_id not in _given:
        raise UsageError(
            f"--env-id {env_id}: the environment was made by a function that cannot be imported: move it to a module, "
            "or evaluate and resume from Python, with env_fn (docs/environments.md)"
        )
    return _spec(env_id, _given[env_id])


def imported_spec(env_id: str) -> EnvSpec:
    """The spec of module:name, whose module has been imported. Raises UsageError unless `name` is a function or class in it."""
    module_name, _, name = env_id.rpartition(":")
    module = importlib.import_module(module_name)
    said = f"{place_of(module)} registers no environment {name!r} and has no such function or class"
    found = find_named(module, name, f"--env-id {env_id}: {said}", gym.registry)
    if isinstance(found, gym.Env | VectorEnv):
        raise UsageError(f"--env-id {env_id}: {name} is one environment; name a function or class that makes one")
    if not callable(found):
        raise UsageError(f"--env-id {env_id}: {name} is of type {type(found).__name__}, not a function or class")
    return _spec(env_id, found)


def module_spec(env_id: str) -> EnvSpec:
    """The spec of an imported module in the form of PettingZoo's: its `parallel_env`, or `env`. Raises UsageError."""
    module = importlib.import_module(env_id)
    for name in ("parallel_env", "env"):
        if callable(function := getattr(module, name, None)):
            return _spec(env_id, function)
    raise UsageError(
        f"--env-id {env_id}: {place_of(module)} has no function parallel_env or env, as PettingZoo's modules have; name a "
        f"function or class of it, as {env_id}:NAME"
    )


def old_spec(env_id: str) -> EnvSpec:
    """The spec of module:Id, where the module has registered the id in OpenAI's gym."""
    return _spec(env_id, partial(make_old, env_id))


def has_required(function: Function) -> bool:
    """Whether a function has an argument without a default."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(each.default is each.empty and each.kind not in kinds for each in _arguments(function).values())


def _spec(env_id: str, function: Function) -> EnvSpec:
    """A function or class as gymnasium takes it."""
    name = re.sub(r"[^\w:.-]", "_", env_id)  # as the letters of a registered id
    makes_many = "num_envs" in _arguments(function)
    if isinstance(function, type) and issubclass(function, VectorEnv | gym.Env):
        makes_many = issubclass(function, VectorEnv)
    entry_point: Any = partial(_make, function, VectorEnv if makes_many else gym.Env)
    entry_point.__module__ = getattr(function, "__module__", "")  # presets are by package
    if isinstance(metadata := getattr(function, "metadata", None), dict):
        entry_point.metadata = metadata
    return EnvSpec(name, None if makes_many else entry_point, vector_entry_point=entry_point if makes_many else None)


def _make(function: Function, kind: type, /, **kwargs: Any) -> Any:
    """Call a function with --env-kwargs. Raises UsageError if it returns something else than an environment."""
    arguments = _arguments(function)
    takes_mode = "render_mode" in arguments or any(map(_takes_all, arguments.values()))
    made = function(**(kwargs if takes_mode else {name: value for name, value in kwargs.items() if name != "render_mode"}))
    if kind is gym.Env and is_old(made) and not isinstance(made, kind):
        is_told = takes_mode or not takes_seed(made)  # gym 0.21 has the mode as an argument of `render`
        made = converted(made, kwargs.get("render_mode"))
    else:
        is_told = takes_mode
    if "render_mode" in kwargs and not is_told:
        raise UsageError("it cannot be rendered, since it has no argument render_mode")
    if kind is gym.Env and has_agents(made):
        return AgentsEnv(made)
    if kind is VectorEnv:
        made = as_vector_env(made)
    elif isinstance(made, kind):
        refuse_many(made)
    if not isinstance(made, kind):
        what = "None" if made is None else f"a {type(made).__module__}.{type(made).__qualname__}"
        stands_alone = kind is gym.Env and hasattr(made, "reset") and hasattr(made, "step")  # crafter's, without gym
        hint = "; one of OpenAI's gym needs gym itself too: pip install gym" if stands_alone else ""
        raise UsageError(f"it returned {what}, not a gymnasium {kind.__name__}{hint}")
    return made


def _arguments(function: Function) -> dict[str, inspect.Parameter]:
    """The arguments of a function; {} if Python does not know them."""
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return {}


def _takes_all(argument: inspect.Parameter) -> bool:
    return argument.kind is inspect.Parameter.VAR_KEYWORD
