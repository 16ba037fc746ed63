"""The settings of a run that is to be resumed, for the command line and for `train`. Costs no torch."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastppo.config import TrainConfig
from fastppo.errors import UsageError
from fastppo.given_settings import with_settings
from fastppo.resumable import check_resumable
from fastppo.run.files import is_inside
from fastppo.system.paths import absolute

MAX_LETTERS = 250  # of a name that is quoted in an error


def resumed_settings(resume: str, place: Path | None) -> TrainConfig:
    """The settings in a run's config.json, with `resume` and `run_dir` as its absolute path.

    Raises UsageError if there is no run to resume, or it would write outside its directory.
    """
    run_dir = absolute(resume, "--resume", place)
    try:
        found = any((run_dir / "checkpoints").glob("*.pt")) or any(run_dir.glob("seed-*/checkpoints/*.pt"))
    except OSError as error:  # a name that is too long, or a loop of links
        raise UsageError(f"--resume {resume[:MAX_LETTERS]} cannot be read: {error.strerror}") from None
    if not found:
        why = "there is no checkpoint in it to resume from" if run_dir.exists() else "there is no such directory"
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


def _refuse_ways_out(run_dir: Path) -> None:
    """Raise UsageError for a link in the directory that leads out of it: the run would write there."""
    for place, directories, files in os.walk(run_dir):
        for path in (Path(place) / name for name in directories + files):
            if path.is_symlink() and not is_inside(path, run_dir):
                raise UsageError(f"--resume {run_dir}: {path} is a link that leads out of it; replace the link by its target")
