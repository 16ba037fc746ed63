"""Experiment trackers get the settings and the rows of a run; what fails in them is told once and costs nothing else."""

import importlib.util
import sqlite3
from types import SimpleNamespace

import pytest

from fastppo import UsageError, train
from fastppo.run import loggers, tracking
from fastppo.run.metrics import METRICS
from fastppo.run.metrics_file import read_rows
from support.runs import tiny


class Fake:
    """A tracker that keeps what it gets, and fails in `fails`."""

    fails: str | None = None

    def __init__(self, *opened):
        self.opened, self.rows, self.closed = opened, [], 0
        Fake.last = self
        self._may_fail("opening")

    def log(self, metrics, step):
        self._may_fail("logging")
        self.rows.append((step, metrics))

    def close(self):
        self._may_fail("closing")
        self.closed += 1

    def _may_fail(self, doing):
        if self.fails == doing:
            raise ConnectionError(f"nobody answers while {doing}")


@pytest.fixture
def fake(monkeypatch):
    """In the place of W&B, installed or not."""
    monkeypatch.setattr("fastppo.training.training_run.Tracker", Fake)
    monkeypatch.setattr("fastppo.training.setup.check_installed", lambda tracker: None)
    monkeypatch.setattr(Fake, "fails", None)
    return Fake


def test_fewer_steps_than_a_rollout(fake, tmp_path):
    """Such a run has one iteration, though its steps are none."""
    train(tiny(tmp_path / "run", track="wandb", num_iterations=None, total_timesteps=5))
    assert len(fake.last.rows) == 1


def test_what_it_gets(fake, tmp_path):
    """Its name and project, all settings, every row under TensorBoard's tags with the step; closed once."""
    result = train(tiny(tmp_path / "run", track="wandb", track_project="mine", num_iterations=6))
    tracker, project, run_dir, settings = fake.last.opened
    assert (tracker, project, run_dir) == ("wandb", "mine", result.run_dir)
    assert settings["env_id"] == "CartPole-v1"
    rows = read_rows(result.run_dir / "metrics.csv")
    assert len(rows) == 6
    assert [str(step) for step, _ in fake.last.rows] == [row["global_step"] for row in rows]
    for (_, metrics), row in zip(fake.last.rows, rows, strict=True):
        assert str(metrics["losses/loss"]) == row["loss"]
        assert str(metrics["losses/policy_loss"]) == row["policy_loss"]
        assert str(metrics["charts/episodic_return"]) == row["episodic_return_mean"]
        assert set(metrics) == {METRICS[key].tag for key in row} - {None}
    assert fake.last.closed == 1


@pytest.mark.parametrize(
    ("iterations", "seconds", "written"),
    [
        (1000, 1e-6, range(1, 1001)),  # every iteration of a run that is not long
        (3500, 1e-6, [1, *range(4, 3501, 4)]),  # of a longer one every fourth, and the first
        (3500, 0.6, [1, 3, *range(4, 3501, 2)]),  # and one after each second without any
    ],
    ids=["short", "long", "long and slow"],
)
def test_the_rows_of_a_run(iterations, seconds, written, tmp_path, monkeypatch):
    """About 1000 evenly spaced rows, or one a second, whichever is more; the last one always."""
    clock = SimpleNamespace(monotonic=lambda: iteration * seconds)
    monkeypatch.setattr("fastppo.run.loggers.time", clock)
    monkeypatch.setattr("fastppo.run.loggers.TensorBoard", Fake)
    kept = Fake()
    log = loggers.Loggers(tmp_path / "metrics.csv", print, tracker=lambda: kept, iterations=iterations)
    for iteration in range(1, iterations + 1):
        log.log({"iteration": iteration, "global_step": iteration, "loss": 0.5})
    log.close()
    assert [step for step, _ in kept.rows] == sorted(written)


@pytest.mark.parametrize("doing", ["opening", "logging", "closing"])
def test_a_tracker_that_fails(doing, fake, tmp_path, monkeypatch, capsys):
    """One line; training, metrics.csv and TensorBoard go on."""
    monkeypatch.setattr(Fake, "fails", doing)
    result = train(tiny(tmp_path / "run", track="wandb", num_iterations=3))
    captured = capsys.readouterr()
    reason = f"(ConnectionError: nobody answers while {doing})"
    told = f"the tracker failed and gets no more rows {reason}; metrics.csv and training continue"
    assert captured.out.count(told) == 1
    assert captured.err == ""
    assert len(read_rows(result.run_dir / "metrics.csv")) == 3


@pytest.mark.parametrize("tracker", tracking.TRACKERS)
def test_a_tracker_that_is_not_installed(tracker, tmp_path, monkeypatch):
    """Refused before anything is written, with what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=rf"--track {tracker} needs .*pip install 'fastppo\[{tracker}\]'"):
        train(tiny(tmp_path / "run", track=tracker))
    assert not (tmp_path / "run").exists()


# --- the real ones, offline: half a minute each, most of it their own start and end


@pytest.mark.slow
def test_wandb_offline(tmp_path, monkeypatch):
    """A run file in the run directory that `wandb sync` would take, with our tags in it."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    result = train(tiny(tmp_path / "run", track="wandb"))
    (kept,) = result.run_dir.glob("wandb/offline-run-*/*.wandb")
    assert b"losses/policy_loss" in kept.read_bytes()
    assert b"CartPole-v1" in kept.read_bytes()


@pytest.mark.slow
def test_mlflow_offline(tmp_path, monkeypatch):
    """mlflow.db in the run directory: its own client reads settings and metrics back."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    result = train(tiny(tmp_path / "run", track="mlflow"))
    client = mlflow.MlflowClient(f"sqlite:///{result.run_dir / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("fastppo").experiment_id])
    assert run.data.params["env_id"] == "CartPole-v1"
    assert run.info.run_name == "run"
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "losses/value_loss")
    rows = read_rows(result.run_dir / "metrics.csv")
    assert [(one.step, one.value) for one in history] == [(int(row["global_step"]), float(row["value_loss"])) for row in rows]


@pytest.mark.slow
def test_trackio_offline(tmp_path, monkeypatch):
    """Its database has the rows."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    train(tiny(tmp_path / "run", track="trackio"))
    with sqlite3.connect(tmp_path / "trackio" / "fastppo.db") as database:
        tables = [name for (name,) in database.execute("select name from sqlite_master where type = 'table'")]
        kept = " ".join(str(row) for table in tables for row in database.execute(f'select * from "{table}"'))
    assert "losses/value_loss" in kept
    assert "CartPole-v1" in kept
