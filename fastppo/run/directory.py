"""The run directory: the paths of its files, and how they are written. Knows nothing of what is in the files.

config.json   config-until-N.json, after a change on --resume   metrics.csv   events.out.tfevents.*   curves.png   summary.json
checkpoints/iteration-N.pt, the last few   checkpoints/last.pt, the newest of them   checkpoints/best.pt
fault.txt and fault.pt after a fault: what happened, and the rollout in which it happened   videos/, with --record-every
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
    """Paths of one run. Each file is written under a temporary name and then renamed, so that it is never half written."""

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
        flag: str = "--run-dir",
    ) -> "RunDirectory":
        """Make the directory of a new run, <place>/<env>__<seed>__<time> unless named, and lock it.

        Args:
            fill: writes what the run can be resumed from, at least one file. A new directory appears only after that. A
                directory that exists, and is empty, is filled in place.
            flag: what `path` was given with.

        Raises:
            UsageError: it is not empty, another run uses it, or it cannot be written.
        """
        if path is not None:
            return cls._make(absolute(path, flag, current_directory()), fill, flag)
        start = place / f"{file_name(env_id)}__{seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        for attempt in itertools.count(1):  # several runs started within a second
            directory = start if attempt == 1 else start.with_name(f"{start.name}-{attempt}")
            if not directory.exists():
                with contextlib.suppress(FileExistsError):
                    return cls._make(directory, fill, flag)
        raise AssertionError

    @classmethod
    def _make(cls, path: Path, fill: Callable[["RunDirectory"], object], flag: str) -> "RunDirectory":
        taken = UsageError(f"{flag} {path} exists and is not empty; choose another, or --resume {path} to continue it")
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
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another run has just made it
                raise FileExistsError(path) if made is not None and made.path != path else taken from None
            raise UsageError(f"{flag} {path} cannot be written: {error.strerror}; choose another") from None
        lock, made._lock = made._lock, None
        made = cls(path)
        made._lock = lock
        return made

    @property
    def is_written(self) -> bool:
        """Whether this process writes to it."""
        return True

    def lock(self) -> None:
        """Lock the directory until `unlock` or the end of this process. Raises UsageError if another run has locked it."""
        self._lock = lock_directory(
            self.path,
            f"--run-dir {self.path}: another run is writing to it; stop that one first, or choose another directory",
        )

    def unlock(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def write_text(self, path: Path, text: str) -> None:
        """Replace `path` by `text` in one step."""
        replace_file(path, text.encode(errors="backslashreplace"))  # a traceback may quote bytes that are not text

    def write_json(self, path: Path, data: Mapping[str, Any]) -> None:
        """Replace `path` by `data` as JSON; numbers that are not finite become null."""
        clean = {key: None if isinstance(value, float) and value - value != 0 else value for key, value in data.items()}
        self.write_text(path, json.dumps(clean, indent=2) + "\n")

    def save(self, path: Path, data: Mapping[str, Any]) -> None:
        """Replace `path` by tensors and plain data, as `load_checkpoint` reads it.

        Raises OSError, for example when the disk is full; the old file is then still there.
        """
        buffer = BytesIO()  # torch.save to a file raises another error than OSError when the disk is full
        torch.save(dict(data), buffer)
        path.parent.mkdir(exist_ok=True)
        replace_file(path, buffer.getbuffer())

    def keep(self, iteration: int, checkpoint: Mapping[str, Any], number: int) -> None:
        """Write a checkpoint, also as last.pt, and remove older ones, so that `number` of them are left.

        Checkpoints of later iterations, from before a resume, are removed too. Raises OSError as `save`.
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
        """The checkpoints that `keep` has written, by iteration, the latest first."""
        found = {}
        for path in self.checkpoints.glob("iteration-*.pt"):
            if match := re.fullmatch(r"iteration-(\d+)\.pt", path.name):
                found[int(match[1])] = path
        return dict(sorted(found.items(), reverse=True))

    def newest(self, kept_only: bool) -> tuple[Path, dict[str, Any], str | None]:
        """The newest checkpoint that can be read, its path, and a line about those that cannot be read.

        Args:
            kept_only: ignore last.pt, which may be the checkpoint of a run's end instead of one that `keep` wrote.

        Raises:
            UsageError: none can be read.
        """
        failed: UsageError | None = None
        for path in (*(() if kept_only else (self.last,)), *self.kept().values()):
            try:
                return path, load_checkpoint(path), None if failed is None else f"{failed}; resuming from {path} instead"
            except UsageError as error:
                failed = failed or error
        raise failed or UsageError(f"{self.path} holds no checkpoint to resume from: is this a run directory of fastppo?")


class OthersDirectory(RunDirectory):
    """The run directory in a process that writes nothing, because another process does."""

    @property
    def is_written(self) -> bool:
        """False: another process writes."""
        return False

    def write_text(self, path: Path, text: str) -> None:
        """Do nothing."""

    def save(self, path: Path, data: Mapping[str, Any]) -> None:
        """Do nothing."""

    def keep(self, iteration: int, checkpoint: Mapping[str, Any], number: int) -> None:
        """Do nothing."""
