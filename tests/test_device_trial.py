"""--device auto tries the GPU and the CPU. The GPU is pretended: its iterations are made up, or those of the CPU made slow."""

import contextlib
import json
import math
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastppo import train
from fastppo.config import TrainConfig
from fastppo.errors import TrainingFault
from fastppo.training import device_trial, loop
from fastppo.training.device_trial import ITERATIONS, TRIAL_SECONDS, DeviceTrial, try_devices
from support.runs import tiny


@pytest.fixture
def gpu(monkeypatch):
    """PyTorch says that there is one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def trainer(**seconds):
    """A `train` whose iterations take so long, by device; an exception is raised. Keeps its configs in `given`."""

    def train(config, callback):
        train.given.append(config)
        taken = seconds[config.device]
        if isinstance(taken, Exception):
            raise taken
        total = 5.0 * taken  # the first iteration takes six times as long
        for iteration in range(1, config.num_iterations + 1):
            total += taken
            for _ in range(config.num_seeds):  # a callback is called for each seed
                ends = callback(SimpleNamespace(iteration=iteration, metrics={"seconds": total}))
            if ends:
                return

    train.given = []
    return train


LONG = TrainConfig(device="auto")


@pytest.mark.parametrize("num_seeds", [1, 3])
@pytest.mark.parametrize(("cuda", "cpu", "faster"), [(0.03, 0.01, "cpu"), (0.01, 0.03, "cuda")])
def test_the_faster_device_is_taken(gpu, cuda, cpu, faster, num_seeds):
    """By its fastest iteration, with both numbers in one line."""
    trial = try_devices(TrainConfig(num_seeds=num_seeds), True, trainer(cuda=cuda, cpu=cpu))
    assert trial.seconds == pytest.approx({"cuda": cuda, "cpu": cpu})
    other = {"cpu": "cuda", "cuda": "cpu"}[faster]
    assert trial.note == (
        f"device {faster}, the faster one in a trial: {faster} 10 ms an iteration, {other} 30 ms an iteration "
        f"(--device {other} takes the other)"
    )


def test_a_trial_is_short(gpu, tmp_path):
    """A few iterations of the run, or one slow one; nothing is evaluated, sent to a tracker or left on disk."""
    config = TrainConfig(device="auto", track="trackio", eval_every=3, record_every=2, compile="on", run_dir=str(tmp_path))
    slow = trainer(cuda=0.01, cpu=TRIAL_SECONDS)
    assert try_devices(config, True, slow).seconds["cpu"] == pytest.approx(6 * TRIAL_SECONDS)
    for given in slow.given:
        assert (given.num_iterations, given.eval_episodes, given.eval_every) == (ITERATIONS, 0, None)
        assert (given.track, given.record_every, given.compile, given.verbose) == (None, None, "auto", 0)
        assert not Path(given.run_dir).parent.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [TrainingFault("cuda is out of memory"), RuntimeError("no kernel image")])
def test_a_device_that_fails_is_not_taken(gpu, error):
    """The other one is, and the line says so; where both fail the run itself says why."""
    trial = try_devices(LONG, True, trainer(cuda=error, cpu=0.01))
    assert trial.note == (
        "device cpu, the faster one in a trial: cpu 10 ms an iteration, cuda failed (--device cuda takes the other)"
    )
    assert trial.summary == {"cuda": None, "cpu": pytest.approx(0.01)}
    assert try_devices(LONG, True, trainer(cuda=TrainingFault("x"), cpu=TrainingFault("y"))) is None


@pytest.mark.parametrize(
    ("settings", "is_alone"),
    [
        ({"device": "cpu"}, True),
        ({"device": "cuda"}, True),
        ({"resume": "runs/other"}, True),
        ({"num_iterations": 10}, True),
        ({"total_timesteps": 5000}, True),
        ({}, False),
    ],
    ids=str,
)
def test_no_trial_where_nothing_is_to_choose(gpu, settings, is_alone):
    """The device is given, the run is resumed or short, or several processes or environments of the user's own are trained."""
    never = trainer()
    assert try_devices(TrainConfig(**settings), is_alone, never) is None
    assert never.given == []


def test_no_trial_without_a_gpu():
    """It costs nothing."""
    assert try_devices(LONG, True, trainer()) is None


@contextlib.contextmanager
def slow_gpu(monkeypatch, delay):
    """Within it PyTorch says that there is a GPU: the CPU, where an update takes longer."""
    tried, learn, train_briefly = [], loop.learn, loop.train_briefly

    def briefly(policy, config, callback):
        tried.append(config.device)
        with pytest.MonkeyPatch.context() as patch:
            if config.device == "cuda":
                patch.setattr(loop, "learn", lambda *given: (time.sleep(delay), learn(*given))[1])
            train_briefly(policy, device_trial.replace(config, device="cpu"), callback)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(loop, "train_briefly", briefly)
    yield tried


@pytest.mark.parametrize("num_seeds", [1, 2])
@pytest.mark.long
def test_a_run_trains_where_the_trial_says(tmp_path, monkeypatch, capsys, num_seeds):
    """Told, in summary.json and config.json, kept on --resume without another trial; the numbers are those of --device cpu."""
    monkeypatch.setattr(device_trial, "WORTH_TRYING", 4)
    run, same = tmp_path / "run", tmp_path / "same"
    with slow_gpu(monkeypatch, 0.5) as tried:
        seconds = train(tiny(run, device="auto", num_seeds=num_seeds)).summary["device_trial"]
        assert 0 < seconds["cpu"] < seconds["cuda"]
        assert tried == ["cuda", "cpu"]
        printed = capsys.readouterr().out
        assert printed.count("device cpu, the faster one in a trial: cpu") == 1
        assert printed.count("run directory") == 1
        train(resume=str(run), num_iterations=6)
        assert tried == ["cuda", "cpu"]
    assert json.loads((run / "config.json").read_text())["device"] == "cpu"
    assert train(tiny(same, device="cpu", num_seeds=num_seeds)).summary["device_trial"] is None
    train(resume=str(same), num_iterations=6)
    found, expected = (json.loads((path / "summary.json").read_text()) for path in (run, same))
    assert found["global_step"] == expected["global_step"]
    seed = "seed-1/" if num_seeds > 1 else ""
    rows, others = ((path / f"{seed}metrics.csv").read_text().splitlines() for path in (run, same))
    loss = rows[0].split(",").index("loss")
    assert [row.split(",")[loss] for row in rows] == [row.split(",")[loss] for row in others]


def test_a_signal_in_a_trial_ends_the_command(tmp_path, monkeypatch):
    """Ctrl-C while the GPU is tried: no run directory."""
    monkeypatch.setattr(device_trial, "WORTH_TRYING", 4)
    learn = loop.learn

    def interrupted(job, collector):
        job.stop.received = 2
        return learn(job, collector)

    with slow_gpu(monkeypatch, 0.0):
        monkeypatch.setattr(loop, "learn", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(tmp_path / "run", device="auto"))
    assert not (tmp_path / "run").exists()


def test_what_failed_is_infinity():
    """And so never the faster one."""
    assert DeviceTrial({"cuda": math.inf, "cpu": 3.0}).chosen == "cpu"
