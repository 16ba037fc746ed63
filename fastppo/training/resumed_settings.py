"""The settings of a run that is to be resumed: which it has, which of them may change, and why others may not.

A setting is marked where it is declared, in config.py: MAY_CHANGE for how long a run lasts and how it is shown and kept;
LEARNING for what the next update goes by; ENVIRONMENTS for what is trained on, where new episodes then start. For the command
line and for `train`. Costs no torch.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from fastppo.bounds import flag
from fastppo.config import ENVIRONMENTS, LEARNING, LEFT_OPEN, RESUMABLE, TrainConfig, marked
from fastppo.errors import UsageError
from fastppo.given_settings import with_settings
from fastppo.run.files import is_inside
from fastppo.system.paths import MAX_LETTERS, absolute

MAKING = frozenset({"num_envs", "vectorization", "backend"})  # how many environments and who steps them, not which ones
LEARNED = marked(LEARNING)
TRAINED_ON = marked(ENVIRONMENTS)
FROM_ITS_WEIGHTS = "; for a new run from its weights: --init-from {0}"
REASONS = {  # why a setting may not change
    **dict.fromkeys(("seed", "num_seeds"), "its random generators are in its checkpoints" + FROM_ITS_WEIGHTS),
    **dict.fromkeys(("norm_obs", "norm_reward"), "its statistics begin with the run"),
    **dict.fromkeys(
        ("norm_returns", "clip_reward", "reward_weights"), "its critic has learned values in these units" + FROM_ITS_WEIGHTS
    ),
    **dict.fromkeys(("rescale_action", "squash_actions"), "its policy has learned actions in these units"),
    **dict.fromkeys(("exact_resume", "checkpoint_iterations"), "its environments restart at its checkpoints"),
    "rnd_coef": "the bonus is a part of what its critic has learned",
    "num_agents": "each agent has rows of its own",
    "preset": "give the settings themselves as flags",
    "init_from": "it has weights of its own by now",
    **dict.fromkeys(("init", "log_std_init"), "its weights have started"),
}
OF_THE_NETWORK = "its network was made with it"


def resumed_settings(resume: str, place: Path | None) -> TrainConfig:
    """The settings in a run's config.json, with `resume` and `run_dir` as its absolute path.

    Raises UsageError if there is no run to resume, or it would write outside its directory.
    """
    run_dir = absolute(resume, "--resume", place)
    try:
        is_there = run_dir.exists()
        found = any((run_dir / "checkpoints").glob("*.pt")) or any(run_dir.glob("seed-*/checkpoints/*.pt"))
    except OSError as error:  # a name that is too long, or a loop of links
        raise UsageError(f"--resume {resume[:MAX_LETTERS]} cannot be read: {error.strerror}") from None
    if not found:
        why = "there is no checkpoint in it to resume from" if is_there else "there is no such directory"
        raise UsageError(f"--resume {resume}: {why}")
    _refuse_ways_out(run_dir)
    try:
        return replace(TrainConfig.from_json(run_dir / "config.json"), resume=str(run_dir), run_dir=str(run_dir))
    except UsageError as error:
        raise UsageError(f"--resume: {error}") from None


def resumed_with(resume: str, place: Path | None, settings: Mapping[str, Any]) -> TrainConfig:
    """The settings of a run, with others on top. Raises UsageError for one that cannot change, with the reason."""
    before = resumed_settings(resume, place)
    after = with_settings(before, settings)
    check_resumable(before, after)
    return after


def shaping(config: TrainConfig) -> dict[str, Any]:
    """The settings that shape what is learned, as config.json has them."""
    return {name: value for name, value in json.loads(config.to_json()).items() if name in LEARNED | TRAINED_ON}


def as_trained(config: TrainConfig, checkpoint: Mapping[str, Any]) -> TrainConfig:
    """`config`, of config.json, with the settings that the checkpoint was trained with, if it says so.

    They differ where --resume changed settings, and the process was killed before its first checkpoint.
    Raises UsageError or TypeError if they are no settings.
    """
    return replace(config, **checkpoint.get("settings", {}))


def changes(before: TrainConfig, after: TrainConfig) -> list[str]:
    """The settings that shape what is learned and differ, by name."""
    return [name for name in shaping(before) if getattr(before, name) != getattr(after, name) and not _by_default(name, after)]


def check_resumable(before: TrainConfig, after: TrainConfig) -> None:
    """Raise UsageError naming the first setting that cannot change when a run is resumed, and why."""
    for spec in fields(TrainConfig):
        name = spec.name
        old, new = getattr(before, name), getattr(after, name)
        resumable = name in RESUMABLE | LEARNED | TRAINED_ON and not (name == "checkpoint_iterations" and before.exact_resume)
        if old != new and not resumable and not _by_default(name, after):
            why = REASONS.get(name, OF_THE_NETWORK).format(after.resume)
            raise UsageError(f"{flag(name)} {new} cannot change on --resume: the run in {after.resume} has {old} ({why})")
    if after.run_dir not in (None, before.run_dir, after.resume):
        raise UsageError(f"--run-dir {after.run_dir} cannot change on --resume: the run continues in {after.resume}")


def _by_default(name: str, after: TrainConfig) -> bool:
    """Whether the setting was left open, and config.json has what was chosen."""
    return (name in LEFT_OPEN and getattr(after, name) is None) or (name == "autoreset" and after.autoreset == "auto")


def _refuse_ways_out(run_dir: Path) -> None:
    """Raise UsageError for a link in the directory that leads out of it: the run would write there."""
    for place, directories, files in os.walk(run_dir):
        for path in (Path(place) / name for name in directories + files):
            if path.is_symlink() and not is_inside(path, run_dir):
                raise UsageError(f"--resume {run_dir}: {path} is a link that leads out of it; replace the link by its target")
