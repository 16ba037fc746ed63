"""`module:NAME`, a function or class of the user's or of a package, imported by its name. Costs no torch and no gymnasium."""

import contextlib
import importlib
import operator
import pkgutil
from collections.abc import Collection
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from fastppo.errors import ENVIRONMENT_ERRORS, UsageError, located, nearest


def load_named(text: str, flag: str) -> Any:
    """The function or class that module:NAME names. Raises UsageError that starts with the flag and names the nearest ones."""
    module_name, _, name = text.rpartition(":")
    if not module_name or not name:
        raise UsageError(f"{flag} {text[:100]}: write module:NAME, such as my_module:{name or 'NAME'}")
    module = import_module(module_name, f"{flag} {text}")
    found = find_named(module, name, f"{flag} {text}: {place_of(module)} has no {name!r}")
    if not callable(found):
        raise UsageError(f"{flag} {text}: {name} is of type {type(found).__name__}, not a function or class")
    return found


def importable_name(thing: Any) -> str | None:
    """module:NAME of a function or class, or of the class of another object; None where that does not import it again."""
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    module, name = str(named.__module__), str(named.__qualname__)
    with contextlib.suppress(Exception):
        if module != "__main__" and operator.attrgetter(name)(importlib.import_module(module)) is thing:
            return f"{module}:{name}"
    return None


def import_module(name: str, said: str) -> ModuleType:
    """The module of that name. Raises UsageError that starts with `said` where it cannot be imported."""
    try:
        return importlib.import_module(name)
    except ENVIRONMENT_ERRORS as error:  # a user's module may raise anything; a script exits
        is_missing = isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")
        reason = _where_to_find(name) if is_missing or not is_dotted(name) else located(error)
        raise UsageError(f"{said}: module {name!r} cannot be imported: {reason}") from None


def find_named(module: ModuleType, name: str, said: str, known: Collection[str] = ()) -> Any:
    """What a module has under a name, with dots or not. Raises UsageError: `said` and the nearest names, `known` ones too."""
    try:
        return operator.attrgetter(name)(module)
    except AttributeError:
        names = [key for key in dir(module) if not key.startswith("_") and callable(getattr(module, key, None))]
        raise UsageError(f"{said}{nearest(name, [*known, *names])}") from None


def place_of(module: ModuleType) -> str:
    """The name of a module and its file."""
    file = getattr(module, "__file__", None)
    return module.__name__ if file is None else f"{module.__name__} ({file})"


def is_dotted(name: str) -> bool:
    """Whether it is identifiers with dots between them."""
    return all(map(str.isidentifier, name.split(".")))


def _where_to_find(module: str) -> str:
    """What to do about a module that Python does not find."""
    dotted = module.removesuffix(".py").strip("./").replace("/", ".")
    if dotted != module:
        return f"write it with dots and without .py, as {dotted}"
    top = module.partition(".")[0]
    parent, _, name = module.rpartition(".")
    with contextlib.suppress(*ENVIRONMENT_ERRORS):
        if parent and (package := importlib.import_module(parent)):
            known = [found.name for found in pkgutil.iter_modules(package.__path__)]
            return f"{parent} has no module {name}{nearest(name, known)}"
    if names := _modules_of(top):
        return f"the installed package {top} is imported as {' or '.join(names)}"
    here = [path.stem for path in Path().glob("*.py")]
    return (
        f"it is neither installed nor in this folder{nearest(module, here)}; start in the folder of {top}, "
        "or add that folder to PYTHONPATH"
    )


def _modules_of(package: str) -> list[str]:
    """The modules of a package that is installed under this name, which is not always theirs: flappy-bird-gymnasium."""

    def plain(name: str) -> str:
        return name.lower().replace("-", "_").replace(".", "_")

    found = metadata.packages_distributions().items()  # reads all installed packages: 0.1 s
    return sorted(name for name, packages in found if plain(package) in map(plain, packages) and name[0] not in "_.")[:3]
