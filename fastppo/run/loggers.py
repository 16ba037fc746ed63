"""Metrics to metrics.csv, TensorBoard and an experiment tracker. Knows nothing of what the metrics mean.

None of them stops a run: the first failure is reported in one line, and training continues.
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from fastppo.errors import brief
from fastppo.run.files import utf8_name
from fastppo.run.metrics import RARE, Row, known, tag_of
from fastppo.run.metrics_file import MetricsFile
from fastppo.run.tracking import Tracker

EVENT_SECONDS = 0.1  # between two events: each costs 350 us, mostly in a thread that holds Python's global lock
TRACK_ROWS = 1000  # of a run for a tracker, which may send each over a network: every iteration of a run that has no more
TRACK_SECONDS = 1.0  # without a row, after which a longer run's next iteration is one of them too


class Loggers:
    """Writes rows of metrics: all to metrics.csv, at most ten a second to TensorBoard, TRACK_ROWS evenly spaced ones to a
    tracker and one in each second without any, and those with an evaluation to all three.

    The columns are those of the first row.
    """

    def __init__(
        self,
        metrics_path: Path,
        note: Callable[[str], None],
        resume_at: int | None = None,
        tracker: Callable[[], Tracker] | None = None,
        iterations: int = 1,
    ) -> None:
        """Open them.

        Args:
            note: takes a line that says what has failed.
            resume_at: the iteration that the run resumes from; later rows are dropped.
            tracker: opens the tracker that the user has chosen.
            iterations: about how many the run has.
        """
        self._note = note
        self._metrics = MetricsFile(metrics_path, resume_at)
        self._metrics_fail = False
        self._closed = False
        purge = None  # TensorBoard drops its old events from this step on
        if resume_at is not None:
            last = self._metrics.last_kept
            purge = 1 if last is None else int(last["global_step"]) + 1
        self._hook = threading.excepthook
        threading.excepthook = self._thread_failed
        self._tensorboard = _Guarded("TensorBoard", lambda: TensorBoard(metrics_path.parent, purge), EVENT_SECONDS, note)
        self._others = [self._tensorboard]
        if tracker is not None:
            every = max(math.ceil(iterations / TRACK_ROWS), 1)
            self._others.append(_Guarded("the tracker", tracker, TRACK_SECONDS, note, every))

    def log(self, row: Row) -> None:
        """Write one row; `row` has iteration and global_step among its keys, in the columns' order."""
        try:
            self._metrics.write(dict.fromkeys(row, "") | known(row))
            if self._metrics_fail:
                self._note("metrics.csv can be written again: no row is missing")
            self._metrics_fail = False
        except OSError as error:
            self._metrics_failed(error, "its rows are kept in memory until it can")
        for other in self._others:
            other.log(row)

    def log_config(self, config_json: str) -> None:
        """The settings as a text panel in TensorBoard."""
        self._tensorboard.do(lambda tensorboard: tensorboard.writer.add_text("config", f"```json\n{config_json}\n```"))

    def close(self) -> None:
        """Write what is left, flush and close them. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        for other in self._others:
            other.close()
        try:
            self._metrics.close()
        except OSError as error:
            self._metrics_failed(error, "its last rows are lost")
        threading.excepthook = self._hook

    def _metrics_failed(self, error: OSError, consequence: str) -> None:
        if not self._metrics_fail:
            self._note(f"metrics.csv cannot be written ({error.strerror}): {consequence}; training continues")
        self._metrics_fail = True

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """Ignore exceptions of TensorBoard's thread: the next call raises them again, and they are reported then."""
        if type(failure.thread).__module__.partition(".")[0] != "tensorboard":
            self._hook(failure)


class NoLoggers:
    """Takes the place of `Loggers` in a process that writes nothing."""

    def log(self, row: Row) -> None:
        """Do nothing."""

    def log_config(self, config_json: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class TensorBoard:
    """TensorBoard's writer with the methods of a `Tracker`."""

    def __init__(self, directory: Path, purge_step: int | None) -> None:
        self._name = contextlib.ExitStack()
        self.writer = SummaryWriter(self._name.enter_context(utf8_name(directory)), purge_step=purge_step, flush_secs=10)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write one event with all figures: this takes 137 us, add_scalar for each of 21 takes 1340."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in metrics.items()]
        events: Any = self.writer.file_writer
        events.add_summary(Summary(value=values), step)

    def close(self) -> None:
        """Flush and close."""
        with self._name:
            self.writer.close()


class _Guarded:
    """A logger of another library. It gets a row every so many seconds and iterations, and none after its first failure."""

    def __init__(
        self, name: str, opening: Callable[[], Any], seconds: float, note: Callable[[str], None], every: int | None = None
    ) -> None:
        self._name, self._seconds, self._note, self._every = name, seconds, note, every
        self._logger: Any = None
        self._last = -math.inf
        self._pending: Row | None = None
        try:
            self._logger = opening()
        except Exception as error:  # the library may raise anything
            self._give_up(error)

    def do(self, job: Callable[[Any], object]) -> None:
        if self._logger is None:
            return
        try:
            job(self._logger)
        except Exception as error:
            self._give_up(error)

    def log(self, row: Row) -> None:
        """Write the row, unless the last one was written too recently.

        One with a rare metric is written in any case, and so is that of each `every`-th iteration.
        """
        self._pending = row
        due = self._every is not None and row["iteration"] % self._every == 0
        if due or time.monotonic() - self._last >= self._seconds or not RARE.isdisjoint(known(row)):
            self._write()

    def close(self) -> None:
        """Write the last row and close the logger."""
        self._write()
        self.do(lambda logger: logger.close())

    def _write(self) -> None:
        row, self._pending, self._last = self._pending, None, time.monotonic()
        if row is not None:
            step = int(row["global_step"])
            tagged = {tag: value for key, value in known(row).items() if (tag := tag_of(key))}
            self.do(lambda logger: logger.log(tagged, step))

    def _give_up(self, error: Exception) -> None:
        self._logger = None
        self._note(f"{self._name} failed and gets no more rows ({brief(error)}); metrics.csv and training continue")
