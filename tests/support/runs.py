"""Runs for tests: of a moment, and directories written by hand, which `fastppo plot` and `report` read without training."""

import contextlib
import csv
import json
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastppo import Callback, View, train
from fastppo.analysis.curves import draw_page, plot_curves, render
from fastppo.config import TrainConfig
from fastppo.run.checkpoint_file import load_checkpoint
from fastppo.training import multi_seed, results

COLUMNS = {
    "seconds": 1.0,
    "sps": 1000.0,
    "episodic_return_mean": 0.0,
    "policy_loss": -0.01,
    "value_loss": 2.0,
    "entropy": 0.5,
    "approx_kl": 0.01,
    "clipfrac": 0.1,
    "explained_variance": 0.9,
    "grad_norm": 1.0,
    "learning_rate": 0.001,
    "env_share": 0.25,
    "act_share": 0.25,
    "learn_share": 0.5,
}


def tiny(run_dir, **settings):
    """The settings of a run of a moment: eager, four iterations, without evaluation."""
    small = {"num_envs": 2, "num_steps": 16, "num_iterations": 4, "eval_episodes": 0, "compile": "off"}
    small["update_epochs"] = 1  # an eager update takes longer than a rollout of so few steps
    if "minibatch_size" not in settings:
        small["num_minibatches"] = 2
    return TrainConfig(run_dir=str(run_dir), plain=True, **small | settings)


def spare_pictures(set_attribute):
    """Runs draw no curves.png, which takes four times as long as all else of a run of a moment; but see `drawn`."""
    set_attribute(results, "plot_curves", lambda *_: None)
    set_attribute(multi_seed, "draw_page", lambda *_, **__: None)
    set_attribute(multi_seed, "render", lambda *_: b"")


@contextlib.contextmanager
def drawn():
    """Runs within it draw their curves.png, which conftest.py spares the others."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("fastppo.training.results.plot_curves", plot_curves)
        patched.setattr("fastppo.training.multi_seed.draw_page", draw_page)
        patched.setattr("fastppo.training.multi_seed.render", render)
        yield


def write_run(path, returns, summary=None, columns=None, **settings):
    """A run with a row for each return, at steps 100, 200, ... and seconds 1, 2, ...; `columns` replace those of each row."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(TrainConfig(**settings).to_json())
    with (path / "metrics.csv").open("w", newline="", errors="surrogatepass") as file:
        writer = csv.writer(file)
        writer.writerow(["iteration", "global_step", *COLUMNS])
        for index, value in enumerate(returns, start=1):
            row = {**COLUMNS, "seconds": float(index), "episodic_return_mean": value, **(columns or {})}
            writer.writerow([index, 100 * index, *row.values()])
    if summary is not None:
        (path / "summary.json").write_text(json.dumps(summary))
    return path


class Recorder(Callback):
    """Notes every call; stops in iteration `stop`, raises in `fail`."""

    def __init__(self, stop=None, fail=None):
        self.calls, self.stop, self.fail = [], stop, fail

    def on_iteration(self, run: View) -> bool | None:
        self.calls.append(("iteration", run.iteration, run.global_step, run.progress))
        self.view = run
        if run.iteration == self.fail:
            raise ValueError("no more\nof this")
        return run.iteration == self.stop

    def on_checkpoint(self, run: View) -> None:
        kept = load_checkpoint(run.run_dir / "checkpoints" / "last.pt")["iteration"]
        self.calls.append(("checkpoint", run.iteration, kept))

    def on_end(self, run: View) -> None:
        assert not (run.run_dir / "summary.json").exists()
        self.calls.append(("end", run.iteration))


def trained(tmp_path, observation, action, policy=None, mode="NextStep", **settings):
    """A tiny run of AnySpaces."""
    settings = {"compile": "off", **settings}
    config = TrainConfig(
        env_id="environments:AnySpacesVector-v0",
        env_kwargs={"observation": observation, "action": action, "mode": mode},
        num_envs=2,
        num_steps=8,
        num_minibatches=2,
        update_epochs=2,
        num_iterations=2,
        hidden_sizes=(8,),
        cnn_size=8,
        eval_episodes=2,
        plain=True,
        run_dir=str(tmp_path / "run"),
        **settings,
    )
    return train(config, policy)


def rows_of(run_dir):
    """metrics.csv as dicts of text."""
    with (Path(run_dir) / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


TIMES = {"seconds", "sps", "env_share", "act_share", "learn_share"}


def short_run(run_dir, **settings):
    """A run of a second or so."""
    settings = {"num_envs": 4, "num_steps": 32, "num_iterations": 3, "eval_episodes": 0, **settings}
    return TrainConfig(run_dir=str(run_dir), **settings)


def without_times(rows):
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def checkpoint(run_dir, name="last"):
    return torch.load(Path(run_dir) / "checkpoints" / f"{name}.pt", weights_only=True)


def assert_same(a, b, path=""):
    """Two checkpoints hold the same bits, but for the clock's seconds."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a.keys() - {"seconds"}:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for index, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_same(one, other, f"{path}[{index}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def next_second():
    """Wait for it: TensorBoard reads a run's files in the order of their names, which begin with the second."""
    time.sleep(1.0 - time.time() % 1.0)


def assert_events_are_rows(run_dir, always):
    """Each event in TensorBoard's own reader is the row of metrics.csv with its step, under CleanRL's tags, and none is twice.

    always: indices of rows that have an event whatever the speed.
    """
    events, rows = EventAccumulator(str(run_dir)), rows_of(run_dir)
    events.Reload()
    row_of = {int(row["global_step"]): row for row in rows}
    for tag, column in {
        "charts/episodic_return": "episodic_return_mean",
        "charts/SPS": "sps",
        "charts/learning_rate": "learning_rate",
        "losses/policy_loss": "policy_loss",
        "losses/value_loss": "value_loss",
        "losses/entropy": "entropy",
        "losses/approx_kl": "approx_kl",
        "losses/explained_variance": "explained_variance",
        "time/seconds": "seconds",
    }.items():
        scalars = events.Scalars(tag)
        steps = [scalar.step for scalar in scalars]
        assert steps == sorted(set(steps))
        assert {int(rows[index]["global_step"]) for index in always} <= set(steps) <= set(row_of)
        for scalar in scalars:
            assert scalar.value == pytest.approx(float(row_of[scalar.step][column]), nan_ok=True), (tag, scalar.step)
    return events
