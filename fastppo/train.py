"""The command line of training: `python -m fastppo.train --num-envs 8`. The loop itself is in training/loop.py."""

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from fastppo.cli import parse_train, run
from fastppo.envs.envpool import task_of
from fastppo.envs.registry import find_spec, shorten_spinning
from fastppo.envs.wrappers import find_wrapper
from fastppo.given_settings import default_runs
from fastppo.system.imports import lasting_imports
from fastppo.system.paths import current_directory


def _main(args: Sequence[str]) -> None:
    place = current_directory()  # before the environment's module is imported, which may change it
    config = parse_train(args)
    runs = default_runs(config, place)
    for name, _ in config.preprocessing.wrappers:
        find_wrapper(name)
    task_of(config.env_id) if config.backend == "envpool" else find_spec(config.env_id)
    shorten_spinning(config.env_id, config.backend)
    with lasting_imports():
        from fastppo.training.loop import train_in  # imports torch: --help and wrong flags do not wait for it

    train_in(runs, config)


def console(args: Sequence[str] | None = None) -> int:
    """Entry point: the exit code."""
    return run(_main, sys.argv[1:] if args is None else args, needs_output=False)  # the results are in the run directory


class _CallableModule(ModuleType):
    """`from fastppo import train` gives the function, or this module once it is imported; so the module can be called too."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from fastppo.training.loop import train

        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(console())
