"""What a reader of the article looks for in a run: its figures, why returns stay low, and how to see the pole."""

from dataclasses import replace

import numpy as np
import pytest

from fastppo.analysis.curves import LABELS, PANELS, plain_tick
from fastppo.presets import PRESETS
from fastppo.run.metrics_file import read_rows
from fastppo.training.loop import train
from support.runs import drawn

SMALL = {"num_iterations": 2, "num_envs": 2, "num_steps": 16, "minibatch_size": 16, "compile": "off", "device": "cpu"}


@pytest.fixture(scope="module")
def article(tmp_path_factory):
    """The directory of a tiny run of --preset article, what it printed without a display, and the titles in its curves.png."""
    titles = []
    with pytest.MonkeyPatch.context() as patch, drawn():
        printed = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        patch.setattr("fastppo.training.ends.shows_windows", lambda: False)
        patch.setattr("matplotlib.axes.Axes.set_title", lambda self, label, **_: titles.append(label))
        run_dir = tmp_path_factory.mktemp("article") / "run"
        train(replace(PRESETS["article"].config(), run_dir=str(run_dir), **SMALL))
    return run_dir, printed, titles


def test_its_figures(article):
    """curves.png has the average reward, and in one row the total loss and its three terms, which add up."""
    run_dir, _, titles = article
    assert titles == [LABELS[name] for name in PANELS]
    assert titles[0] == "return (last 100 episodes)"
    assert titles[4:8] == ["total loss", "policy loss", "value loss", "entropy"]
    for row in read_rows(run_dir / "metrics.csv"):
        terms = float(row["policy_loss"]) + 1.0 * float(row["value_loss"]) - 0.01 * float(row["entropy"])  # c1 1, c2 0.01
        assert float(row["loss"]) == pytest.approx(terms)


def test_why_returns_stay_low(article):
    """No return in training is above the steps of a rollout, and the end of the run says so."""
    run_dir, printed, _ = article
    assert max(float(row["episodic_return_mean"]) for row in read_rows(run_dir / "metrics.csv")) <= 16
    (line,) = [line for line in printed if "--reset-each-rollout" in line]
    assert line.startswith("returns in training are of at most 16 steps")


def test_how_to_watch_it(article):
    """The last line; without a display it asks for a video."""
    run_dir, printed, _ = article
    assert printed[-1] == f"to watch it: python -m fastppo.evaluate {run_dir} --video"


def test_plain_ticks():
    """Numbers as people write them, without 1e5; float noise does not show."""
    values = (0.0, -0.0, 0.1 + 0.2, -0.01, 2.5e-4, 5e-6, 1e-9, 475.0, -1200.0, 100_000.0, 2_500_000.0, 1e15)
    texts = "0 0 0.3 -0.01 0.00025 0.000005 1e-09 475 -1,200 100,000 2.5M 1e+15"
    assert [plain_tick(value) for value in np.array(values)] == texts.split()
