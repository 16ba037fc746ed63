"""A run that is resumed: the rows and bits it goes on from, and the limits that may be raised."""

import json
import shutil

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastppo import train
from fastppo.run.loggers import Loggers
from fastppo.train import console
from support.runs import assert_events_are_rows, assert_same, checkpoint, next_second, rows_of, short_run, without_times

RESUMED = {"env_id": "Pendulum-v1", "norm_obs": True, "norm_reward": True, "num_steps": 210}


def test_resume_goes_on(tmp_path):
    """Iterations, steps, episodes and time continue; metrics.csv has each iteration exactly once, TensorBoard none twice."""
    run_dir = tmp_path / "run"
    train(short_run(run_dir, **RESUMED))
    before, rows_before = checkpoint(run_dir), rows_of(run_dir)
    next_second()
    assert console(["--resume", str(run_dir), "--num-iterations", "5"]) == 0
    after, rows = checkpoint(run_dir), rows_of(run_dir)
    assert [int(row["iteration"]) for row in rows] == [1, 2, 3, 4, 5]
    assert rows[:3] == rows_before
    steps = [int(row["global_step"]) for row in rows]
    assert steps == sorted(set(steps))
    assert after["iteration"] == 5
    assert after["global_step"] == steps[-1]
    assert after["seconds"] > before["seconds"]
    assert after["episodes"]["episodes"] > before["episodes"]["episodes"]
    assert after["adam"]["step"] == before["adam"]["step"] / 3 * 5
    counted = float(after["policy"]["obs_moments"]["obs"][2])
    assert counted == after["global_step"]  # the statistics have seen every transition of both parts once
    assert not torch.equal(after["generators"]["actions"], before["generators"]["actions"])
    assert_events_are_rows(run_dir, always=(0, 2, 3, -1))  # the ends of both parts
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["global_step"] == steps[-1]
    assert summary["iterations"] == 5


def test_what_is_loaded_is_what_was_saved(tmp_path):
    """Resuming a run that is complete writes the state it loaded back: parameters, Adam, statistics, generators, counters and

    episodes are the same bits.
    """
    run_dir = tmp_path / "run"
    train(short_run(run_dir, **RESUMED))
    before, rows_before = checkpoint(run_dir), rows_of(run_dir)
    assert console(["--resume", str(run_dir)]) == 0
    assert_same(checkpoint(run_dir), before)
    assert rows_of(run_dir) == rows_before


def test_two_continuations_are_the_same(tmp_path):
    """Going on twice from copies of one run gives the same bits: nothing of the state is outside of the checkpoint."""
    train(short_run(tmp_path / "one", env_id="environments:IdentityBox-v0", norm_obs=True))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for name in ("one", "two"):
        assert console(["--resume", str(tmp_path / name), "--num-iterations", "5"]) == 0
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    assert_same(one, two)
    assert without_times(rows_of(tmp_path / "one")) == without_times(rows_of(tmp_path / "two"))


def test_rows_after_the_checkpoint_are_made_again(tmp_path):
    """A killed run has logged more than its last checkpoint holds, the last line perhaps in half: no iteration is twice."""
    run_dir = tmp_path / "run"
    train(short_run(run_dir, num_iterations=2))
    shutil.copy(run_dir / "checkpoints" / "last.pt", tmp_path / "older.pt")
    next_second()
    assert console(["--resume", str(run_dir), "--num-iterations", "4"]) == 0
    shutil.copy(tmp_path / "older.pt", run_dir / "checkpoints" / "last.pt")
    with (run_dir / "metrics.csv").open("a") as file:
        file.write("5,4")
    next_second()
    assert console(["--resume", str(run_dir), "--num-iterations", "5"]) == 0
    rows = rows_of(run_dir)
    assert [int(row["iteration"]) for row in rows] == [1, 2, 3, 4, 5]
    assert all(None not in row and None not in row.values() for row in rows)
    assert_events_are_rows(run_dir, always=(0, 1, 4))


def test_every_row_may_be_made_again(tmp_path):
    """The checkpoint is older than the first row: nothing is kept of what was logged after it, in TensorBoard neither."""
    for loss in (1.0, 2.0):
        log = Loggers(tmp_path / "metrics.csv", print, resume_at=1)
        for iteration in (2, 3):
            log.log({"iteration": iteration, "global_step": 10 * iteration, "loss": loss})
        log.close()
        next_second()
    assert [row["loss"] for row in rows_of(tmp_path)] == ["2.0", "2.0"]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("losses/loss")] == [(20, 2.0), (30, 2.0)]


def test_total_timesteps_may_be_raised(tmp_path):
    """The everyday reason to go on: more steps."""
    run_dir = tmp_path / "run"
    train(short_run(run_dir, num_iterations=None, total_timesteps=200))
    before = len(rows_of(run_dir))
    assert console(["--resume", str(run_dir), "--total-timesteps", "500"]) == 0
    rows = rows_of(run_dir)
    assert len(rows) > before
    assert int(rows[-1]["global_step"]) >= 500


def test_steps_may_replace_iterations(tmp_path):
    """A run that was measured in iterations goes on to --total-timesteps when that is what resuming asks for."""
    run_dir = tmp_path / "run"
    train(short_run(run_dir, num_iterations=2))
    assert console(["--resume", str(run_dir), "--total-timesteps", "600"]) == 0
    assert int(rows_of(run_dir)[-1]["global_step"]) >= 600
