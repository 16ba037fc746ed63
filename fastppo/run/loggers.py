"""Metrics to metrics.csv and TensorBoard. Knows nothing of what the metrics mean.

Neither stops a run: what fails is told once, and training goes on.
"""

import math
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from fastppo.errors import brief
from fastppo.run.metrics import MetricsFile

EVENT_SECONDS = 0.1  # between two events: one costs 350 us, most of them in a thread that holds Python's lock


class Loggers:
    """Rows of metrics: all to metrics.csv, at most ten a second to TensorBoard. The columns are those of the first row."""

    def __init__(self, metrics_path: Path, note: Callable[[str], None], resume_at: int | None = None) -> None:
        """Open both.

        Args:
            note: where a line goes that says what has failed.
            resume_at: the iteration the run goes on from; later rows, which will be made again, are dropped.
        """
        self._note = note
        self._metrics = MetricsFile(metrics_path, resume_at)
        self._metrics_fail = False
        self._closed = False
        purge = None  # the step from which on events of before are dropped
        if resume_at is not None:
            last = self._metrics.last_kept
            purge = 1 if last is None else int(last["global_step"]) + 1
        self._tensorboard: Any = None
        self._last_event = -math.inf
        self._pending: Mapping[str, int | float] | None = None
        self._hook = threading.excepthook
        threading.excepthook = self._thread_failed
        self._guarded(self._open, str(metrics_path.parent), purge)

    def log(self, row: Mapping[str, int | float]) -> None:
        """Write one row; `row` has iteration and global_step among its keys, in the columns' order."""
        try:
            self._metrics.write(row)
            if self._metrics_fail:
                self._note("metrics.csv can be written again: no row is missing")
            self._metrics_fail = False
        except OSError as error:
            self._metrics_failed(error, "its rows wait until it can")
        self._pending = row
        if time.monotonic() - self._last_event >= EVENT_SECONDS:
            self._guarded(self._write_event)

    def log_config(self, config_json: str) -> None:
        """The settings as a text panel in TensorBoard."""
        self._guarded(lambda: self._tensorboard.add_text("config", f"```json\n{config_json}\n```"))

    def close(self) -> None:
        """Write what is left, flush and close both. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._guarded(self._write_event)
        self._guarded(lambda: self._tensorboard.close())
        try:
            self._metrics.close()
        except OSError as error:
            self._metrics_failed(error, "its last rows are lost")
        threading.excepthook = self._hook

    def _open(self, directory: str, purge: int | None) -> None:
        self._tensorboard = SummaryWriter(directory, purge_step=purge, flush_secs=10)

    def _write_event(self) -> None:
        row, self._pending, self._last_event = self._pending, None, time.monotonic()
        if row is None:
            return
        # one event for the row: add_scalar for each of 21 figures takes 1340 us, this takes 137
        values = [
            Summary.Value(tag=_TAGS.get(key, f"charts/{key}"), simple_value=value)
            for key, value in row.items()
            if key not in ("iteration", "global_step")
        ]
        self._tensorboard.file_writer.add_summary(Summary(value=values), int(row["global_step"]))

    def _guarded(self, job: Callable[..., None], *args: Any) -> None:
        """Do something with TensorBoard; the first time that it fails is the last."""
        if self._tensorboard is None and job != self._open:
            return
        try:
            job(*args)
        except Exception as error:  # whatever somebody's library may raise
            self._tensorboard = None
            self._note(f"TensorBoard gets nothing from here on ({brief(error)}); metrics.csv and training go on")

    def _metrics_failed(self, error: OSError, consequence: str) -> None:
        if not self._metrics_fail:
            self._note(f"metrics.csv cannot be written ({error.strerror}): {consequence}; training goes on")
        self._metrics_fail = True

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """TensorBoard's thread hands its exception over to the next call, which tells of it: no traceback beside that."""
        if type(failure.thread).__module__.partition(".")[0] != "tensorboard":
            self._hook(failure)


# CleanRL's tags
_TAGS = {
    **{key: f"losses/{key}" for key in ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "explained_variance")},
    "grad_norm": "losses/grad_norm",
    "sps": "charts/SPS",
    "episodic_return_mean": "charts/episodic_return",
    "episodic_length_mean": "charts/episodic_length",
    **{key: f"time/{key}" for key in ("seconds", "env_share", "act_share", "learn_share")},
}
