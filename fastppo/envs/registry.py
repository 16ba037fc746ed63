"""From --env-id to a spec, or a UsageError that names the nearest known ids. Does not import torch.

`jax:PACKAGE/NAME` is an environment of JAX (envs/jax_packages.py). `module:NAME` imports the module. If an
id NAME is registered then, it is that environment, as in gymnasium. Some packages register their ids in a function
`register_envs()` instead, which is called, and old ones in OpenAI's gym, whose environment is converted. Otherwise NAME is a
function or class of the module (envs/functions.py). `package.module` is a module of PettingZoo's form, with `parallel_env` or
`env`.
"""

import importlib.util
import inspect
import os
import pkgutil
import re
import sys
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import gymnasium as gym

from fastppo.envs.functions import given_spec, has_required, imported_spec, is_nameless, module_spec, old_spec
from fastppo.envs.old_gym import is_old_id
from fastppo.errors import ENVIRONMENT_ERRORS, UsageError, located, nearest
from fastppo.system.named import import_module, is_dotted

INSTALL = "pip install 'fastppo[{}]'"
PETTINGZOO = ("pettingzoo", "mpe2")  # packages of the extra of that name
JAX = "jax:"
JAX_PACKAGES = {  # in ids that start so, with what pip installs
    "gymnax": "'fastppo[jax]'",
    "brax": "'fastppo[jax]'",
    "navix": "navix",
    "craftax": "craftax",
    "jumanji": "jumanji",
}


def find_spec(env_id: str) -> gym.envs.registration.EnvSpec:
    """The spec of an id, of module:Id or of module:function. Raises UsageError with the nearest known names."""
    if is_nameless(env_id):
        return given_spec(env_id)
    if env_id.startswith(":"):
        raise UsageError(f"--env-id {env_id[:100]}: write module:NAME, such as my_module:{env_id[1:100] or 'NAME'}")
    if is_jax(env_id):
        return _jax_spec(env_id)
    name = import_module_of(env_id)
    if name not in gym.registry and (name.startswith("ALE/") or "NoFrameskip-v" in name):
        _register_atari(name)
    try:
        return _registered(env_id, name)
    except gym.error.Error as error:
        if name != env_id and is_old_id(name):
            return old_spec(env_id)
        if name != env_id and is_dotted(name):
            return imported_spec(env_id)
        if "." in env_id and is_dotted(env_id):
            _import(env_id, env_id)
            return module_spec(env_id)
        unknown = isinstance(error, gym.error.UnregisteredEnv) or first_line(error).startswith("No registered env")
        reason = "is not registered" if unknown else first_line(error)
        hint = nearest(name, _newest_first(name)) + (_registered_by(env_id) or _made_by(env_id))
        raise UsageError(f"--env-id {name[:100]!r} {reason[:200]}{hint}") from None


def _registered(env_id: str, name: str) -> gym.envs.registration.EnvSpec:
    """gymnasium's spec of an id, after `register_envs()` of its module where that is needed. Raises gym.error.Error."""
    try:
        return gym.spec(name)
    except gym.error.Error:
        module = sys.modules.get(env_id.rpartition(":")[0])
        register = getattr(module, "register_envs", None)
        if not inspect.isfunction(register) or has_required(register):
            raise
    try:
        register()
    except ENVIRONMENT_ERRORS as error:
        raise UsageError(f"--env-id {env_id}: register_envs() of {env_id.rpartition(':')[0]}: {located(error)}") from None
    return gym.spec(name)


def _registered_by(env_id: str) -> str:
    """The hint at what registers the id of module:Id where importing the module does not; "" if nothing seems to.

    That is a part of the package, as tetris_gymnasium.envs, or OpenAI's gym, without which crafter registers nothing.
    """
    module, _, name = env_id.rpartition(":")
    package = sys.modules.get(module)
    parts = [f"{module}.{part.name}" for part in pkgutil.iter_modules(getattr(package, "__path__", ()))]
    sources = {part: _source(importlib.util.find_spec(part)) for part in parts if part not in sys.modules}
    registering = [part for part, source in sources.items() if re.search(r"\bregister\(", source)]
    if registering:
        found = max(registering, key=lambda part: f'"{name}"' in sources[part] or f"'{name}'" in sources[part])
        return f"; or does {found} register it? --env-id {found}:{name}"
    own = _source(getattr(package, "__spec__", None))
    of_gym = re.search(r"(?m)^\s*(import gym|import gym as \w+|from gym\b.* import .*)$", own)
    if of_gym and importlib.util.find_spec("gym") is None:
        return f"; {module} registers in OpenAI's gym, which is not installed: pip install gym 'fastppo[gym]'"
    return ""


def _source(spec: ModuleSpec | None) -> str:
    """The source text of a module in Python; "" for others."""
    place = Path(spec.origin) if spec and spec.has_location and spec.origin else None
    return place.read_text(encoding="utf-8", errors="replace") if place and place.suffix == ".py" else ""


def _made_by(env_id: str) -> str:
    """The hint that the module of module:Id has a function `make` of its own, as stable_retro has; "" if it has not."""
    module, _, name = env_id.rpartition(":")
    make = getattr(sys.modules.get(module), "make", None)
    if not inspect.isfunction(make) or make.__module__.partition(".")[0] in ("gym", "gymnasium"):
        return ""
    first = next(iter(inspect.signature(make).parameters), None)
    return f"; or does {module}.make know it? --env-id {module}:make" + (f" --env-kwargs {first}={name}" if first else "")


def import_module_of(env_id: str) -> str:
    """Import the module of module:Id, so that it registers its environments, and return the Id; raises UsageError."""
    module, _, name = env_id.rpartition(":")
    if is_jax(env_id):
        return env_id
    if module:
        _import(module, env_id)
    return name


def names_module(env_id: str) -> bool:
    """Whether an id names a module to import: module:NAME, or package.module, which is not registered. Imports nothing."""
    return ":" in env_id or ("." in env_id and is_dotted(env_id) and env_id not in gym.registry)


def is_jax(env_id: str) -> bool:
    """Whether this is the id of an environment of JAX."""
    return env_id.startswith(JAX)


def _jax_spec(env_id: str) -> gym.envs.registration.EnvSpec:
    """The spec of jax:PACKAGE/NAME. Imports neither; raises UsageError for a package that is not known or not installed."""
    package, slash, name = env_id.removeprefix(JAX).partition("/")
    if package not in JAX_PACKAGES or not slash or not name:
        known = ", ".join(JAX_PACKAGES)
        hint = nearest(package, JAX_PACKAGES) if package not in JAX_PACKAGES else ""
        raise UsageError(f"--env-id {env_id[:100]}: write jax:PACKAGE/NAME, as jax:gymnax/CartPole-v1; packages: {known}{hint}")
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"--env-id {env_id} needs a package that is not installed: pip install {JAX_PACKAGES[package]}")
    return gym.envs.registration.EnvSpec(
        re.sub(r"[^\w:./-]", "_", env_id), vector_entry_point=partial(_make_jax, package, name)
    )


def _make_jax(package: str, name: str, /, **kwargs: Any) -> Any:
    from fastppo.envs.jax_packages import make_jax_envs  # here, since it imports jax

    return make_jax_envs(package, name, **kwargs)


def _import(module: str, env_id: str) -> None:
    """Import a module that --env-id names; raises UsageError."""
    try:
        import_module(module, f"--env-id {env_id}")
    except UsageError as error:
        package, missing = module.partition(".")[0], error.__context__
        if package not in PETTINGZOO or not isinstance(missing, ModuleNotFoundError):
            raise
        if str(missing.name).startswith(package + "."):  # the package is there, and has no such part
            raise
        message = f"--env-id {env_id} needs a package that is not installed: {INSTALL.format('pettingzoo')}"
        raise UsageError(message) from None


def is_atari(env_id: str) -> bool:
    """Whether this id, or module:Id, is a game of ALE in gymnasium's registry. False for an id that is not registered.

    Imports the module, and ale_py where the id looks like one of its ids.
    """
    try:
        return find_spec(env_id).entry_point == "ale_py.env:AtariEnv"
    except UsageError:
        return False


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type where it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _register_atari(name: str) -> None:
    """Import ale_py, which registers its games; raises UsageError where it is not installed."""
    try:
        import ale_py
    except ImportError:
        message = f"--env-id {name} needs a package that is not installed: {INSTALL.format('atari')}"
        raise UsageError(message) from None
    gym.register_envs(ale_py)


def _newest_first(name: str) -> list[str]:
    """Registered ids with the same name and another version, the newest first; all registered ids where there are none."""
    family = name.rpartition("-v")[0] or name
    same = [env_id for env_id in gym.registry if env_id.rpartition("-v")[0].lower() == family.lower()]
    return sorted(same, reverse=True) or list(gym.registry)


def shorten_spinning(env_id: str, backend: str) -> None:
    """For environments with threads of their own, let OpenMP's threads sleep sooner. Call it before torch is imported.

    After each operation they would keep a core busy for a millisecond: Breakout 391 steps/s instead of 342 (benchmarks/LOG.md).
    """
    if backend == "envpool" or is_jax(env_id) or is_atari(env_id):
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
