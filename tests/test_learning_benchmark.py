"""benchmarks/learning.py: the statistics by hand-worked literals, the table, and that a run that fails does not hide."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "learning.py"


@pytest.fixture(scope="module")
def learning():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("learning", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["learning"] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules["learning"]


@pytest.mark.parametrize(
    ("values", "mean"),
    [
        ([7.0], 7.0),
        ([0.0, 1.0, 5.0], 2.0),  # a quarter of three is none
        ([100.0, 2.0, 4.0, -100.0], 3.0),  # one off each end
        ([5.0, 1.0, 2.0, 3.0, 1000.0], 10.0 / 3.0),  # a quarter of five is one: 2, 3, 5
        ([0, 0, 1, 2, 3, 4, 90, 99], 2.5),  # two off each end: 1, 2, 3, 4
    ],
)
def test_interquartile_mean(learning, values, mean):
    """Worked by hand; outliers do not move it."""
    assert learning.interquartile_mean(values) == pytest.approx(mean)


def test_interquartile_mean_is_scipys_trim_mean(learning):
    """The oracle of Agarwal et al.'s own code, for every number of seeds, row by row."""
    stats = pytest.importorskip("scipy.stats")
    for seeds in range(1, 12):
        values = np.random.default_rng(seeds).normal(size=(3, seeds))
        assert learning.interquartile_mean(values) == pytest.approx(stats.trim_mean(values, 0.25, axis=-1))


def test_bootstrap_interval(learning):
    """Of 0 and 1 a resampled mean is 0, 1/2 or 1 with 1/4, 1/2, 1/4: the interval is all of it. Of equal values it is nothing.

    Of one 1 and nine 0 the interquartile mean (of the middle six, two off each end) is above 0 when at least three of ten draws
    are the 1, binomial with probability 0.0702, and above 1/6 when at least four are, 0.0128: the 97.5th percentile is 1/6.
    Of 0, 0 and 1 all three draws are the 1 with 1/27 = 0.037: in a 95 % interval, in none of 90 %.
    """
    assert learning.bootstrap_interval([0.0, 1.0]) == (0.0, 1.0)
    assert learning.bootstrap_interval([5.0, 5.0, 5.0]) == (5.0, 5.0)
    assert learning.bootstrap_interval([3.0]) == (3.0, 3.0)
    assert learning.bootstrap_interval([0.0, 0.0, 1.0]) == (0.0, 1.0)
    assert learning.bootstrap_interval([0.0] * 9 + [1.0]) == pytest.approx((0.0, 1.0 / 6.0))


def a_run(seed, evaluation):
    return {
        "env_id": "Hopper-v5",
        "seed": seed,
        "preset": "Hopper",
        "evaluation": evaluation,
        "training": evaluation / 2,
        "global_step": 1_000_000 + seed,
        "seconds": 10.0 * seed,
        "sps": 1000.0 * seed,
    }


def test_a_row_of_the_table(learning):
    """Three seeds, 1, 2 and 6: mean 3, standard deviation of a sample sqrt(7), beside both published figures."""
    summary = learning.summarize("Hopper-v5", [a_run(1, 2.0), a_run(2, 1.0), a_run(3, 6.0)])
    assert (summary["mean"], summary["iqm"]) == (3.0, 3.0)
    assert summary["std"] == pytest.approx(7**0.5)
    assert summary["interval"] == (pytest.approx(1.0, abs=0.34), pytest.approx(6.0, abs=1.4))
    header, rule, row = learning.table([summary]).splitlines()
    assert row.startswith("| Hopper-v5 | Hopper | 1,000,003 | 2.0, 1.0, 6.0 | 3.0 ± 2.6 | 3.0 (")
    assert row.endswith("| 1.5 | 20 | 2,000 | zoo 2410.4 (1M); CleanRL 2382.9 (1M) |")
    assert header.count("|") == rule.count("|") == row.count("|")


@pytest.mark.parametrize("env_id", ["ALE/Pong-v5", "PongNoFrameskip-v4", "ale_py:ALE/Pong-v5"])
def test_published_figures_by_whatever_id(learning, env_id):
    """Version, namespace and module do not matter; what nobody published is empty."""
    assert learning.published(env_id)["zoo"] == (20.99, "10M")
    assert learning.published("mine:Walk-v0") == {}


def test_runs_and_failures(tmp_path):
    """The user's command end to end: two seeds at once, an environment that there is not, exit code 1, the last line JSON."""
    words = ["--env-id", "CartPole-v1", "CartPol-v1", "--seeds", "1", "2", "--jobs", "2", "--eval-episodes", "2"]
    flags = ["--num-envs", "2", "--num-steps", "32", "--num-iterations", "2", "--compile", "off"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words, "--run-dir", str(tmp_path), "--", *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1, done.stderr
    assert "CartPol-v1 seed 2 FAILED: exit code 2: error: --env-id 'CartPol-v1'" in done.stdout
    result = json.loads(done.stdout.splitlines()[-1])
    assert sorted(failure[:2] for failure in result["failed"]) == [["CartPol-v1", 1], ["CartPol-v1", 2]]
    (summary,) = result["environments"]
    assert (summary["env_id"], summary["preset"], summary["seeds"]) == ("CartPole-v1", "classic", [1, 2])
    on_disk = [json.loads((tmp_path / f"CartPole-v1__{seed}" / "summary.json").read_text()) for seed in (1, 2)]
    assert summary["evaluations"] == [run["eval_return_mean"] for run in on_disk]
    assert {run["eval_episodes"] for run in on_disk} == {2}
