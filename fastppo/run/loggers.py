"""Metrics to metrics.csv and TensorBoard. Knows nothing of what the metrics mean."""

import csv
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

EVENT_SECONDS = 0.1  # between two events: one costs 350 us, most of them in a thread that holds Python's lock


class Loggers:
    """Rows of metrics: all to metrics.csv, at most ten a second to TensorBoard. The columns are those of the first row."""

    def __init__(self, metrics_path: Path, resume_at: int | None = None) -> None:
        """resume_at: the iteration the run goes on from; later rows, which will be made again, are dropped."""
        kept: list[dict[str, str]] = []
        if resume_at is not None and metrics_path.exists():
            with metrics_path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if (row["iteration"] or "x").isdigit()]
            kept = [row for row in kept if int(row["iteration"]) <= resume_at]
        self._file = metrics_path.open("w", newline="", buffering=1)
        self._csv: csv.DictWriter[Any] | None = None
        for row in kept:
            self._write_csv(row)
        purge = None  # the step from which on events of before are dropped
        if resume_at is not None:
            purge = int(kept[-1]["global_step"]) + 1 if kept else 1
        self._tensorboard = SummaryWriter(str(metrics_path.parent), purge_step=purge, flush_secs=10)
        self._events: Any = self._tensorboard.file_writer
        self._last_event = -math.inf
        self._pending: Mapping[str, int | float] | None = None

    def log(self, row: Mapping[str, int | float]) -> None:
        """Write one row; `row` has iteration and global_step among its keys, in the columns' order."""
        self._write_csv(row)
        self._pending = row
        if time.monotonic() - self._last_event >= EVENT_SECONDS:
            self._write_event()

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
        self._events.add_summary(Summary(value=values), int(row["global_step"]))

    def log_config(self, config_json: str) -> None:
        """The settings as a text panel in TensorBoard."""
        self._tensorboard.add_text("config", f"```json\n{config_json}\n```")

    def close(self) -> None:
        """Write what is left, flush and close both."""
        self._write_event()
        self._file.close()
        self._tensorboard.close()

    def _write_csv(self, row: Mapping[str, Any]) -> None:
        if self._csv is None:
            self._csv = csv.DictWriter(self._file, list(row))
            self._csv.writeheader()
        self._csv.writerow(row)


# CleanRL's tags
_TAGS = {
    **{key: f"losses/{key}" for key in ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "explained_variance")},
    "grad_norm": "losses/grad_norm",
    "sps": "charts/SPS",
    "episodic_return_mean": "charts/episodic_return",
    "episodic_length_mean": "charts/episodic_length",
    **{key: f"time/{key}" for key in ("seconds", "env_share", "act_share", "learn_share")},
}
