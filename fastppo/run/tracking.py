"""Experiment trackers through torchrl's loggers: `--track wandb`, `mlflow`, `trackio`. Knows nothing of what the metrics mean.

Each is configured by its own environment variables: WANDB_MODE=offline, MLFLOW_TRACKING_URI, TRACKIO_DIR.
By default MLflow writes to mlflow.db in the run directory. W&B keeps its files there.
"""

import importlib.util
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastppo.errors import UsageError

TRACKERS = ("wandb", "mlflow", "trackio")
MLFLOW_SECONDS = 1.0  # between two transactions, or requests to a server: each takes some 20 ms, with one row or many
MLFLOW_VALUES = 1000  # that MLflow takes at once


def check_installed(tracker: str) -> None:
    """Raises UsageError if the tracker's package is not installed."""
    if importlib.util.find_spec(tracker) is None:
        raise UsageError(f"--track {tracker} needs a package that is not installed: pip install 'fastppo[{tracker}]'")


class Tracker:
    """One run in one tracker. Any call may raise whatever the tracker raises."""

    def __init__(self, tracker: str, project: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        """Open the tracker and send the settings. tracker: one of TRACKERS."""
        self._tracker = tracker
        settings = {key: value if isinstance(value, int | float) else str(value) for key, value in config.items()}
        if tracker == "wandb":
            from torchrl.record.loggers.wandb import WandbLogger

            self._logger: Any = WandbLogger(exp_name=run_dir.name, project=project, save_dir=str(run_dir))
        elif tracker == "mlflow":
            import mlflow
            from torchrl.record.loggers.mlflow import MLFlowLogger

            uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{(run_dir / 'mlflow.db').absolute()}")
            self._logger = MLFlowLogger(exp_name=project, tracking_uri=uri)
            mlflow.set_tag("mlflow.runName", run_dir.name)
            mlflow.log_params(settings)  # torchrl's log_hparams needs omegaconf
            self._waiting: list[Any] = []
            self._sent = -math.inf
            return
        else:
            from torchrl.record.loggers.trackio import TrackioLogger

            self._logger = TrackioLogger(exp_name=run_dir.name, project=project)
        self._logger.log_hparams(settings)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log values by tag, after `step` transitions."""
        if self._tracker != "mlflow":
            self._logger.log_metrics(dict(metrics), step=step)
            return
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._waiting += [Metric(tag, float(value), now, step) for tag, value in metrics.items()]
        if time.monotonic() - self._sent >= MLFLOW_SECONDS:
            self._send()

    def _send(self) -> None:
        """Send MLflow the rows that wait."""
        import mlflow

        waiting, self._waiting, self._sent = self._waiting, [], time.monotonic()
        for start in range(0, len(waiting), MLFLOW_VALUES):
            run = mlflow.active_run().info.run_id
            mlflow.MlflowClient().log_batch(run, metrics=waiting[start : start + MLFLOW_VALUES])

    def close(self) -> None:
        """Send the remaining data and end the tracker's run."""
        if self._tracker == "wandb":
            self._logger.experiment.finish()
        elif self._tracker == "mlflow":
            import mlflow

            self._send()
            mlflow.end_run()
        else:
            import trackio

            trackio.finish()
