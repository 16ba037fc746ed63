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
    monkeypatch.setattr(benchmark_script, "FLOORS", {("Vendor", 1): {"cartpole8": 5.0}})
    return ours, theirs


def test_the_fastest_iteration(benchmark_script):
    """By hand: 100 steps in 0.5 s, 50 in 0.125 s, 100 in 0.5 s."""
    import yardstick  # beside the script

    assert yardstick.fastest_sps([1.0, 1.5, 1.625, 2.125], [100, 200, 250, 350]) == 400.0


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


def test_floors_are_those_of_the_processor(benchmark_script, monkeypatch, tmp_path):
    """By vendor and family; the lowest of all where the processor is not known, or the system does not tell."""
    (tmp_path / "cpuinfo").write_text(
        "processor\t: 0\nvendor_id\t: V\ncpu family\t: 2\nflags\t: a b\n\nprocessor\t: 1\nvendor_id\t: W\n"
    )
    assert benchmark_script.processor(tmp_path / "cpuinfo") == ("V", 2)
    assert benchmark_script.processor(tmp_path / "none") is None
    monkeypatch.setattr(benchmark_script, "FLOORS", {("V", 1): {"cartpole8": 5.0}, ("V", 2): {"cartpole8": 4.0}})
    assert [benchmark_script.floor_of("cartpole8", who) for who in (("V", 1), ("V", 2), ("V", 3), None)] == [5.0, 4.0, 4.0, 4.0]
