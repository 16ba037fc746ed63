"""Runs of several seeds: each held against the run of that seed alone."""

import csv

import pytest
import torch

from fastppo.run.checkpoint_file import load_checkpoint

SHORT = {"num_envs": 2, "num_steps": 16, "num_iterations": 3, "num_minibatches": 2, "update_epochs": 2, "anneal_lr": False}


def rows_of(run_dir):
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def params_of(run_dir):
    weights = load_checkpoint(run_dir / "checkpoints" / "last.pt")["policy"]["weights"]
    return torch.cat([weights[name].flatten() for name in sorted(weights)])


def assert_alike(seed_dir, alone_dir, rtol=2e-4):
    """The same episodes, counts and decisions; what is computed in another order equal but for float32's rounding."""
    exact = ("iteration", "global_step", "episodes", "episodic_return_mean", "terminations", "truncations", "updates")
    for row, expected in zip(rows_of(seed_dir), rows_of(alone_dir), strict=True):
        assert {key: row[key] for key in exact} == pytest.approx({key: expected[key] for key in exact}, rel=1e-5, nan_ok=True)
        for key in ("value_loss", "entropy", "approx_kl", "explained_variance", "grad_norm", "learning_rate"):
            assert row[key] == pytest.approx(expected[key], rel=5e-3, abs=1e-4), key
    torch.testing.assert_close(params_of(seed_dir), params_of(alone_dir), rtol=rtol, atol=2e-5)
