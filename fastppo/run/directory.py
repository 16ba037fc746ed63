"""The run directory: where everything a run writes lies, and how it is written. Knows nothing of what is in the files.

config.json   metrics.csv   events.out.tfevents.*   curves.png   summary.json   checkpoints/last.pt   checkpoints/best.pt
"""

import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastppo.errors import UsageError


class RunDirectory:
    """Paths of one run. Files appear whole or not at all: each is written under a temporary name, then renamed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.metrics = path / "metrics.csv"
        self.curves = path / "curves.png"
        self.summary = path / "summary.json"
        self.fault = path / "fault.txt"
        self.last = path / "checkpoints" / "last.pt"
        self.best = path / "checkpoints" / "best.pt"

    @classmethod
    def create(cls, path: str | None, env_id: str, seed: int) -> "RunDirectory":
        """Make the directory of a new run, runs/<env>__<seed>__<time> unless named.

        Raises UsageError when it holds anything already or cannot be written.
        """
        if path is None:
            name = re.sub(r"[^\w.-]+", "-", env_id)
            stamp = time.strftime("%Y%m%d-%H%M%S")
            directory = Path("runs") / f"{name}__{seed}__{stamp}"
            attempt = 1
            while directory.exists():  # two runs started within a second
                attempt += 1
                directory = Path("runs") / f"{name}__{seed}__{stamp}-{attempt}"
        else:
            directory = Path(path)
        run_directory = cls(directory)
        try:
            if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
                raise UsageError(
                    f"--run-dir {directory} exists and is not empty; choose another, or --resume {directory} to go on with it"
                )
            run_directory.last.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--run-dir {directory} cannot be written: {error.strerror}; choose another") from None
        return run_directory

    def write_text(self, path: Path, text: str) -> None:
        """Replace `path` by `text` in one step."""
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    def write_json(self, path: Path, data: Mapping[str, Any]) -> None:
        """Replace `path` by `data` as JSON; numbers that are not finite become null, which JSON has."""
        clean = {key: None if isinstance(value, float) and value - value != 0 else value for key, value in data.items()}
        self.write_text(path, json.dumps(clean, indent=2) + "\n")

    def save_checkpoint(self, path: Path, state: Mapping[str, Any]) -> None:
        """Replace the checkpoint `path`: a crash or a full disk while writing leaves the previous one."""
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint as data: nothing in it is executed. Raises UsageError when it is missing or damaged."""
    if not path.exists():
        raise UsageError(f"{path} does not exist: is this a run directory of fastppo, and has it reached a checkpoint?")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UsageError(f"{path} is damaged or no checkpoint ({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise UsageError(f"{path} is no checkpoint of fastppo")
    return state
