"""The run directory: where everything a run writes lies, and how it is written. Knows nothing of what is in the files.

config.json   metrics.csv   events.out.tfevents.*   curves.png   summary.json
checkpoints/iteration-N.pt, the last few   checkpoints/last.pt, the newest of them   checkpoints/best.pt
fault.txt and fault.pt, after one: what happened, and the rollout in which it did   videos/, where some were asked for
"""

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from fastppo.errors import UsageError
from fastppo.run.checkpoint_file import load_checkpoint
from fastppo.run.files import file_name, lock_directory, replace_file
from fastppo.system.paths import absolute, current_directory


class RunDirectory:
    """Paths of one run. Files appear whole or not at all: each is written under a temporary name, then renamed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.metrics = path / "metrics.csv"
        self.curves = path / "curves.png"
        self.summary = path / "summary.json"
        self.fault = path / "fault.txt"
        self.fault_data = path / "fault.pt"
        self.checkpoints = path / "checkpoints"
        self.last = self.checkpoints / "last.pt"
        self.best = self.checkpoints / "best.pt"
        self._lock: int | None = None

    @classmethod
    def create(
        cls,
        path: str | None,
        env_id: str,
        seed: int | str,
        fill: Callable[["RunDirectory"], object],
        place: Path = Path("runs"),
    ) -> "RunDirectory":
        """Make the directory of a new run, <place>/<env>__<seed>__<time> unless named, and lock it.

        Args:
            fill: writes what the run can be resumed from, one file at least. The directory appears with that in it, or not at
                all; one that is there already, and empty, is seen being filled.

        Raises:
            UsageError: it holds anything already, is another run's, or cannot be written.
        """
        if path is not None:
            return cls._make(absolute(path, "--run-dir", current_directory()), fill)
        start = place / f"{file_name(env_id)}__{seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        for attempt in itertools.count(1):  # several runs started within a second
            directory = start if attempt == 1 else start.with_name(f"{start.name}-{attempt}")
            if not directory.exists():
                with contextlib.suppress(FileExistsError):
                    return cls._make(directory, fill)
        raise AssertionError

    @classmethod
    def _make(cls, path: Path, fill: Callable[["RunDirectory"], object]) -> "RunDirectory":
        taken = UsageError(f"--run-dir {path} exists and is not empty; choose another, or --resume {path} to go on with it")
        made: RunDirectory | None = None
        try:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise taken
            made = cls(path if path.exists() else path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}"))
            made.path.mkdir(parents=True, exist_ok=True)
            made.lock()
            if any(made.path.iterdir()):
                raise taken
            fill(made)
            if made.path != path:
                made.path.rename(path)
        except OSError as error:
            if made is not None:
                made.unlock()
                with contextlib.suppress(OSError):
                    for entry in list(made.path.iterdir()) if made.path == path else [made.path]:
                        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # somebody was faster
                raise FileExistsError(path) if made is not None and made.path != path else taken from None
            raise UsageError(f"--run-dir {path} cannot be written: {error.strerror}; choose another") from None
        lock, made._lock = made._lock, None
        made = cls(path)
        made._lock = lock
        return made

    @property
    def is_written(self) -> bool:
        """Whether this process is the one that writes to it."""
        return True

    def lock(self) -> None:
        """Keep other runs out as long as this process lives, or until `unlock`. Raises UsageError where one keeps us out."""
        self._lock = lock_directory(
            self.path,
            f"--run-dir {self.path}: another run is writing to it; stop that one first, or choose another directory",
        )

    def unlock(self) -> None:
        """Let other runs in."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def write_text(self, path: Path, text: str) -> None:
        """Replace `path` by `text` in one step."""
        replace_file(path, text.encode(errors="backslashreplace"))  # a traceback may quote what is no text

    def write_json(self, path: Path, data: Mapping[str, Any]) -> None:
        """Replace `path` by `data` as JSON; numbers that are not finite become null, which JSON has."""
        clean = {key: None if isinstance(value, float) and value - value != 0 else value for key, value in data.items()}
        self.write_text(path, json.dumps(clean, indent=2) + "\n")

    def save(self, path: Path, data: Mapping[str, Any]) -> None:
        """Replace `path` by tensors and plain data, as `load_checkpoint` reads it.

        Raises OSError where the disk is full, for instance; what was there before then still is.
        """
        buffer = BytesIO()  # torch.save to a file tells of a full disk in words of its own
        torch.save(dict(data), buffer)
        path.parent.mkdir(exist_ok=True)
        replace_file(path, buffer.getbuffer())

    def keep(self, iteration: int, checkpoint: Mapping[str, Any], number: int) -> None:
        """Write a checkpoint, which is also last.pt from then on, and drop all but `number` of those up to it.

        Those of later iterations are dropped too: they are of a future that the run did not take. Raises OSError as `save`.
        """
        path = self.checkpoints / f"iteration-{iteration}.pt"
        self.save(path, checkpoint)
        temporary = self.last.with_name("last.pt.tmp")
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:  # a file system without links
            shutil.copyfile(path, temporary)
        temporary.replace(self.last)
        kept = self.kept()
        old = [before for before in kept if before <= iteration][number:]
        for dropped in (*old, *(after for after in kept if after > iteration)):
            kept[dropped].unlink(missing_ok=True)

    def kept(self) -> dict[int, Path]:
        """What `keep` has left, by iteration, the latest first."""
        found = {}
        for path in self.checkpoints.glob("iteration-*.pt"):
            if match := re.fullmatch(r"iteration-(\d+)\.pt", path.name):
                found[int(match[1])] = path
        return dict(sorted(found.items(), reverse=True))

    def newest(self, kept_only: bool) -> tuple[Path, dict[str, Any], str | None]:
        """The newest checkpoint that can be read, and a line on those that cannot.

        Args:
            kept_only: of those that `keep` wrote; last.pt may be another, of a run's end.

        Raises:
            UsageError: none can be read.
        """
        failed: UsageError | None = None
        for path in (*(() if kept_only else (self.last,)), *self.kept().values()):
            try:
                return path, load_checkpoint(path), None if failed is None else f"{failed}; going on from {path} instead"
            except UsageError as error:
                failed = failed or error
        raise failed or UsageError(f"{self.path} holds no checkpoint to go on from: is this a run directory of fastppo?")


class OthersDirectory(RunDirectory):
    """A run's directory that another process writes: here nothing is."""

    @property
    def is_written(self) -> bool:
        """See RunDirectory."""
        return False

    def write_text(self, path: Path, text: str) -> None:
        """Nothing."""

    def save(self, path: Path, data: Mapping[str, Any]) -> None:
        """Nothing."""

    def keep(self, iteration: int, checkpoint: Mapping[str, Any], number: int) -> None:
        """Nothing."""
