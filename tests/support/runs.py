"""Runs for tests: of a moment, and directories written by hand, which `fastppo plot` and `report` read without training."""

import contextlib
import csv
import json
from pathlib import Path

import pytest

from fastppo import Callback, View, train
from fastppo.analysis.curves import draw_page, plot_curves, render
from fastppo.config import TrainConfig
from fastppo.run.checkpoint_file import load_checkpoint

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
    settings = {"num_envs": 2, "num_steps": 16, "num_iterations": 4, "eval_episodes": 0} | settings
    return TrainConfig(run_dir=str(run_dir), compile="off", plain=True, **settings)


@contextlib.contextmanager
def drawn():
    """Runs within it draw their curves.png, which conftest.py spares the others."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("fastppo.training.training_run.plot_curves", plot_curves)
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
