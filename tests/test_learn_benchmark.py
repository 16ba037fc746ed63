"""benchmarks/learn.py: the forms of one update are timed on the same arguments."""

import json
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "learn.py"


def test_each_form_is_timed(benchmark_script, capsys, needs_compiler):
    """A line for each form, and the JSON object with least and median of each."""
    benchmark_script.main(benchmark_script.LearnBenchmarkConfig(hidden_sizes=(8,), rounds=1, calls=2))
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result.pop("workload") == "cartpole8"
    assert set(result) == {"fused, 1 thread", "fused, 2 threads", "eager"}
    assert len(lines) == 3
    assert all(0 < least <= median for least, median in result.values())


def test_the_forms_learn_the_same(benchmark_script, needs_compiler):
    """What is timed is one update of a workload's sizes, of the same parameters."""
    config = benchmark_script.LearnBenchmarkConfig(workload="pendulum8", hidden_sizes=(8,))
    benchmark_script.Kernels().ready(wait=True)
    results = [form() for form in benchmark_script.forms(config).values()]
    assert len(results[0].minibatch_metrics) == 10 * 32
    for result in results:
        torch.testing.assert_close(result.minibatch_metrics[:8], results[-1].minibatch_metrics[:8], rtol=1e-3, atol=1e-4)


def test_images_are_refused(benchmark_script):
    """One line."""
    with pytest.raises(SystemExit, match="images and memory have no fused update"):
        benchmark_script.main(benchmark_script.LearnBenchmarkConfig(workload="breakout8"))
