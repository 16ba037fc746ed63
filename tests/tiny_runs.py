"""Runs for tests: of a moment, and directories written by hand, which `fastppo plot` and `report` read without training."""

import contextlib
import csv
import json

import pytest

from fastppo.analysis.curves import draw_page, plot_curves, render
from fastppo.config import TrainConfig

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
