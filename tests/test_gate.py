"""benchmarks/gate.py: what it compares and when it fails, with speeds made up here."""

from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gate.py"


@pytest.fixture
def speeds(benchmark_script, monkeypatch):
    """Made-up fastest speeds of ours and of the yardstick, run after run."""
    ours, theirs = [], []
    monkeypatch.setattr(benchmark_script, "run_fastppo", lambda *_, **__: {"fastest_sps": ours.pop(0)})
    monkeypatch.setattr(benchmark_script, "run_yardstick", lambda *_: {"fastest_sps": theirs.pop(0)})
    monkeypatch.setattr(benchmark_script, "FLOORS", {"cartpole8": 5.0})
    return ours, theirs


@pytest.fixture
def fastest_sps(benchmark_script):
    """What both sides of the ratio are made of."""
    import yardstick  # beside the script

    return yardstick.fastest_sps


def test_the_fastest_window(fastest_sps):
    """Iterations that take 0.5 s, or 0.25 s for a while: windows are whole iterations, no shorter than asked for."""
    clock, steps = [0.0, 0.5, 1.0, 1.25, 1.5, 1.75, 2.25], [0, 100, 200, 300, 400, 500, 600]
    assert fastest_sps(clock, steps, window=0.75) == pytest.approx(300 / 0.75)
    assert fastest_sps(clock, steps, window=0.8) == pytest.approx(400 / 1.25)
    assert fastest_sps(clock, steps, window=9) == pytest.approx(600 / 2.25)  # a shorter run is one window


def test_what_happens_twice_a_second_is_in_every_window(fastest_sps):
    """One slow iteration in five is not hidden behind the four fast ones."""
    clock, steps = [0.0], [0]
    for iteration in range(40):
        clock.append(clock[-1] + (0.25 if iteration % 5 == 0 else 0.0625))
        steps.append(steps[-1] + 100)
    assert fastest_sps(clock, steps) == pytest.approx(500 / 0.5)


def test_passes_at_once(benchmark_script, speeds):
    """Each side's fastest of three rounds: 60 to 12."""
    ours, theirs = speeds
    ours += [50.0, 60.0, 40.0]
    theirs += [12.0, 8.0, 9.0]
    assert benchmark_script.passes("cartpole8", benchmark_script.GateConfig())
    assert speeds == ([], [])  # all taken


def test_a_further_attempt_adds_to_both_sides(benchmark_script, speeds, capsys):
    """A slow yardstick later on does not make up for slow runs of ours: its fastest stays."""
    ours, theirs = speeds
    ours += [40.0] * 6
    theirs += [10.0] * 3 + [2.0] * 3
    assert not benchmark_script.passes("cartpole8", benchmark_script.GateConfig(attempts=2))
    out = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[-1] for line in out] == ["measured again", "FAILED"]
    assert all("4.00 times the yardstick, floor 5.0" in line for line in out)
