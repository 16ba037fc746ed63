"""benchmarks/scaling.py: what it computes from what it measured, by hand."""

from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "scaling.py"


def test_a_ring_by_hand(benchmark_script):
    """16 updates of 1,000,000 bytes over 4 ranks at 1 Gbit/s, 20 us a hop.

    6 hops are 120 us, for 16 updates and 5 statistics 2.52 ms; 2 * 3/4 of 8,000,000 bits at 1e9 a second are 12 ms, 16 times.
    """
    params = 250_000 - benchmark_script.METRICS - 4
    seconds = benchmark_script.exchange_seconds(16, params, 4, 1.0, 20e-6)
    assert seconds == pytest.approx(2.52e-3 + 16 * 12e-3)
    assert benchmark_script.exchange_seconds(16, params, 1, 1.0, 20e-6) == 0.0


def costs(script):
    """4 environments take 2 ms, 16 take 5 ms, 64 take 17 ms: all but 1 ms grows with their number."""
    return {num_envs: script.Cost(0.25e-3 * num_envs, 0.5e-3, 0.5e-3, 1000) for num_envs in (4, 16, 64)}


def test_between_two_measurements_lies_a_straight_line(benchmark_script):
    """Measured ones are themselves; 10 environments lie half way between 4 and 16."""
    known = costs(benchmark_script)
    assert benchmark_script.own_seconds(known, 16) == pytest.approx(5e-3)
    assert benchmark_script.own_seconds(known, 10) == pytest.approx(3.5e-3)


def test_ranks_pay_until_the_network_costs_more_than_they_save(benchmark_script):
    """64 environments: 17 ms alone, 9 with 2 ranks, 5 with 4, 3 with 8, 2 with 16, and 21 exchanges of 2 (K - 1) hops.

    With hops of 20 us they add 0.84, 2.52, 5.88 and 12.6 ms: 9.84, 7.52, 8.88 and 14.6, so 4 ranks; with free ones 16, below
    which nothing was measured.
    """
    script, known = benchmark_script, costs(benchmark_script)
    config = script.ScalingConfig(ranks=(2, 4, 32), gbits=(1e9,))
    assert script.best_ranks(config, known, 64, 1e9) == 4
    assert script.best_ranks(script.ScalingConfig(hop_us=0.0), known, 64, 1e9) == 16
    found = {(one.num_envs, one.ranks): one for one in script.predict(config, "off", 64, known)}
    assert set(found) == {(16, 2), (16, 4), (64, 2), (64, 4)}  # 32 ranks of 64 would have 2 each
    assert found[64, 4].speedup == pytest.approx(17 / 7.52, rel=1e-3)
    assert found[64, 2].interpolated
    assert not found[64, 4].interpolated
