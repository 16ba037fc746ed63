"""`fastppo VERB ...`, or `python -m fastppo VERB ...`: each verb is a module of its own. Costs no torch."""

import importlib
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version

from fastppo.cli import run
from fastppo.errors import UsageError, nearest

VERBS = {
    "train": "train an agent on a Gymnasium environment",
    "evaluate": "play episodes with a run's policy",
    "cache": "list or remove the compiled programs that are kept between runs",
    "import-sb3": "turn a PPO model of Stable-Baselines3 into a run directory",
    "export": "write a run's policy to one file, for onnxruntime or torch.export",
    "push": "share a run's policy on the Hugging Face Hub",
    "plot": "draw learning curves of many runs, by environment and setting",
    "report": "write a run as one HTML page",
    "sweep": "search for the settings that learn an environment best",
}

HABITS = {  # what others call our verbs, for the hint in an error
    "enjoy": "evaluate --render human",
    "watch": "evaluate --render human",
    "play": "evaluate --render human",
    "optimize": "sweep",
    "tune": "sweep",
    "resume": "train --resume",
}


def console(args: Sequence[str] | None = None) -> int:
    """Entry point: the exit code."""
    verb, *rest = (sys.argv[1:] if args is None else args) or ["--help"]
    if verb in ("-V", "--version"):
        print(f"fastppo {version('fastppo')}")
        return 0
    if verb in VERBS:
        return importlib.import_module(f"fastppo.{module_of(verb)}").console(rest)
    return run(_no_verb, [verb])


def module_of(verb: str) -> str:
    """The verb's module in the package."""
    return verb.replace("-", "_")


def _no_verb(args: Sequence[str]) -> None:
    if args[0] not in ("-h", "--help"):
        hint = f"; here it is {HABITS[args[0]]}" if args[0] in HABITS else nearest(args[0], VERBS)
        if args[0].startswith("--") or re.search(r"-v\d+$", args[0]):
            hint = "; to train: fastppo train --env-id CartPole-v1"
        raise UsageError(f"{args[0]!r} is not a verb of fastppo{hint} (all verbs: fastppo --help)")
    width = max(map(len, VERBS))
    print("usage: fastppo VERB ..., and fastppo VERB --help for its flags\n")
    print("\n".join(f"  {verb:{width}}  {what}" for verb, what in VERBS.items()))


if __name__ == "__main__":
    sys.exit(console())
