"""benchmarks/learning.py: the table, and that a run that fails does not hide."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "learning.py"


@pytest.fixture(scope="module")
def learning(benchmark_script):
    """The script as a module."""
    return benchmark_script


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


def test_a_queue_goes_on_where_it_ended(learning, tmp_path, capsys):
    """Runs that are in the results file are not repeated; one that failed is tried again, and does not stop the others."""
    queue, results, tried = learning.run_queue, tmp_path / "results.jsonl", []

    def run(name, seed):
        tried.append((name, seed))
        if len(tried) == 2:
            raise RuntimeError("no luck")
        return {"evaluation": 10.0 * seed, "seconds": 2}

    wanted = [("a", 1), ("a", 2), ("b", 1)]
    assert queue.run_missing(results, ("name", "seed"), wanted, run) == [["a", 2, "no luck"]]
    assert queue.run_missing(results, ("name", "seed"), [*wanted, ("c", 3)], run) == []
    assert tried == [*wanted, ("a", 2), ("c", 3)]
    lines = queue.finished(results, ("name", "seed"))
    assert {name: line["evaluation"] for name, line in lines.items()} == {(*name,): 10.0 * name[1] for name in {*tried}}
    assert "name a, seed 2 FAILED: no luck" in capsys.readouterr().out


def test_a_row_of_the_table(learning):
    """Three seeds, 1, 2 and 6: mean 3, standard deviation of a sample sqrt(7), beside both published figures."""
    summary = learning.summarize("Hopper-v5", [a_run(1, 2.0), a_run(2, 1.0), a_run(3, 6.0)])
    assert (summary["mean"], summary["iqm"]) == (3.0, 3.0)
    assert summary["std"] == pytest.approx(7**0.5)
    assert summary["interval"] == (pytest.approx(1.0, abs=0.34), pytest.approx(6.0, abs=1.4))
    header, rule, row = learning.table([summary]).splitlines()
    assert row.startswith("| Hopper-v5 | Hopper | 1,000,003 | 2.0, 1.0, 6.0 | 3.0 ± 2.6 | 3.0 (")
    assert row.endswith("| 1.5 | 20 | 2,000 | zoo 2410.4 (1M); tianshou 2609.3 (1M); CleanRL 2382.9 (1M) |")
    assert header.count("|") == rule.count("|") == row.count("|")


def test_the_table_quotes_the_published_figures(learning):
    """Each row of the results has them as the script has them, which says where they are from."""
    rows = re.findall(r"^\| (\S+-v\d) \|.*\| ([^|]*) \|$", (SCRIPT.parent / "README.md").read_text(), re.MULTILINE)
    assert len(rows) == 16
    for env_id, quoted in rows:
        figures = learning.published(env_id).items()
        assert quoted == "; ".join(f"{source} {mean:g} ({steps})" for source, (mean, steps) in figures), env_id


@pytest.mark.parametrize("env_id", ["ALE/Pong-v5", "PongNoFrameskip-v4", "ale_py:ALE/Pong-v5"])
def test_published_figures_by_whatever_id(learning, env_id):
    """Version, namespace and module do not matter; what nobody published is empty."""
    assert learning.published(env_id)["zoo"] == (20.99, "10M")
    assert learning.published("mine:Walk-v0") == {}
    assert learning.published("BipedalWalker-v3") == {"zoo": (287.9, "5M")}  # 287.939 in benchmark.md at 22e3ff2


@pytest.mark.long
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
    assert re.search("env_id CartPol-v1, seed 2, .* FAILED: exit code 2: error: --env-id 'CartPol-v1'", done.stdout)
    result = json.loads(done.stdout.splitlines()[-1])
    assert sorted(failure[:2] for failure in result["failed"]) == [["CartPol-v1", 1], ["CartPol-v1", 2]]
    (summary,) = result["environments"]
    assert (summary["env_id"], summary["preset"], summary["seeds"]) == ("CartPole-v1", "classic", [1, 2])
    on_disk = [json.loads((tmp_path / f"CartPole-v1__{seed}" / "summary.json").read_text()) for seed in (1, 2)]
    assert summary["evaluations"] == [run["eval_return_mean"] for run in on_disk]
    assert {run["eval_episodes"] for run in on_disk} == {2}
