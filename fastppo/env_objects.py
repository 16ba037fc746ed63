"""Keyword arguments of environments that JSON cannot hold, such as a DataFrame: given in Python, recorded by name.

config.json has {"__object__": "module:NAME"} for what can be imported by that name, and for the rest
{"__object__": null, "type": "DataFrame"}. Knows nothing of how environments are made. Costs no torch.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from fastppo.bounds import is_json, plain_number
from fastppo.errors import UsageError
from fastppo.system.named import importable_name, load_named

OBJECT = "__object__"
_given: dict[str, Any] = {}  # by argument, within `giving`


@contextlib.contextmanager
def giving(env_kwargs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Context in which `with_objects` finds the objects among the arguments. Yields the arguments as config.json has them."""
    global _given
    values = {name: plain_number(value) for name, value in env_kwargs.items()}
    objects = {name: value for name, value in values.items() if not is_json(value)}
    before, _given = _given, objects
    try:
        yield values | {name: _recorded(value) for name, value in objects.items()}
    finally:
        _given = before


def with_objects(env_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments for the environment: objects for what stands for them. Raises UsageError for one that is not there."""
    return {name: _found(name, value) if _stands_for_object(value) else value for name, value in env_kwargs.items()}


def objects_in(env_kwargs: Mapping[str, Any]) -> list[str]:
    """What in the arguments names code, at any depth: an object, or a text module:NAME, which an environment may import."""
    text = json.dumps(env_kwargs, ensure_ascii=False)
    return re.findall(rf'(?<="{OBJECT}": ")[^"]*|(?<=")[^\W\d][\w.]*:[\w./-]+(?=")', text)


def _recorded(value: Any) -> dict[str, Any]:
    name = importable_name(value) if hasattr(value, "__qualname__") else None
    return {OBJECT: None, "type": type(value).__name__} if name is None else {OBJECT: name}


def _stands_for_object(value: Any) -> bool:
    return isinstance(value, dict) and OBJECT in value and value.keys() <= {OBJECT, "type"}


def _found(name: str, value: Mapping[str, Any]) -> Any:
    if name in _given:
        return _given[name]
    if isinstance(value[OBJECT], str):
        return load_named(value[OBJECT], f"--env-kwargs {name}")
    raise UsageError(
        f"--env-kwargs {name} was a {value.get('type')} in Python, which config.json cannot hold: make the environment there, "
        "evaluate(run, envs=lambda: MyEnv(...)), or give it again, train(resume=run, env_kwargs={...})"
    )
