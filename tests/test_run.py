"""The run directory: what is in it, how it gets there, that the same seed fills it with the same bits, and going on from it."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.cells import cell_len
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastppo import TrainConfig, TrainingFault, load_policy, train
from fastppo.run.checkpoint_file import FORMAT, load_checkpoint
from fastppo.run.directory import RunDirectory
from fastppo.run.display import LiveDisplay, PlainDisplay, figure, make_display, number, sparkline
from fastppo.run.loggers import EVENT_SECONDS, Loggers
from fastppo.system.text import duration
from fastppo.train import console
from support.runs import drawn, rows_of

TIMES = {"seconds", "sps", "env_share", "act_share", "learn_share"}
CONTRACT_COLUMNS = [
    "iteration",
    "global_step",
    "seconds",
    "sps",
    "episodic_return_mean",
    "episodic_length_mean",
    "episodes",
    "policy_loss",
    "value_loss",
    "entropy",
    "approx_kl",
    "clipfrac",
    "explained_variance",
    "learning_rate",
    "grad_norm",
    "env_share",
    "act_share",
    "learn_share",
]
CONTRACT_SUMMARY = [
    "env_id",
    "seed",
    "global_step",
    "seconds",
    "sps",
    "compile_seconds",
    "tier",
    "backend",
    "device",
    "eval_return_mean",
    "eval_return_std",
    "eval_episodes",
]
ROW = {
    "iteration": 12_345,
    "global_step": 123_456_789,
    "seconds": 4000.0,
    "sps": 123_456.7,
    "episodic_return_mean": -1234.5678,
    "episodic_length_mean": 1000.0,
    "episodes": 1_234_567,
    "loss": -0.00012346,
    "policy_loss": -0.00012346,
    "value_loss": 12345.678,
    "entropy": 0.6931,
    "approx_kl": 0.00012346,
    "env_share": 0.5,
    "act_share": 0.2,
    "learn_share": 1.0,
    "new_best": True,
    "best_return": -1230.0,
}


def tiny(run_dir, **settings):
    """A run of a second or so."""
    settings = {"num_envs": 4, "num_steps": 32, "num_iterations": 3, "eval_episodes": 0, **settings}
    return TrainConfig(run_dir=str(run_dir), **settings)


def without_times(rows):
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def checkpoint(run_dir, name="last"):
    return torch.load(Path(run_dir) / "checkpoints" / f"{name}.pt", weights_only=True)


def assert_same(a, b, path=""):
    """Two checkpoints hold the same bits."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for index, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_same(one, other, f"{path}[{index}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, path
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def settings(directory):
    """What a run directory holds from its start."""
    directory.write_text(directory.config, "{}")


def next_second():
    """Wait for it: TensorBoard reads a run's files in the order of their names, which begin with the second."""
    time.sleep(1.0 - time.time() % 1.0)


# --- what a run leaves behind


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished CartPole run, shared by the tests that only look at it."""
    settings = {"num_iterations": None, "total_timesteps": 600, "eval_episodes": 3, "learning_rate": 1e-3}
    config = tiny(tmp_path_factory.mktemp("finished") / "run", **settings)
    with drawn():
        return train(config), config


def test_every_file_of_the_contract(finished):
    """Others read these names; nothing temporary stays behind; a newcomer finds nothing unexplained."""
    result, _ = finished
    names = {path.relative_to(result.run_dir).as_posix() for path in result.run_dir.rglob("*") if path.is_file()}
    events = {name for name in names if name.startswith("events.out.tfevents")}
    assert len(events) == 1
    assert names - events == {
        "config.json",
        "metrics.csv",
        "curves.png",
        "summary.json",
        "checkpoints/last.pt",
        "checkpoints/best.pt",
        "checkpoints/iteration-0.pt",  # what a run that is killed early goes on from
        f"checkpoints/iteration-{result.summary['iterations']}.pt",
    }


def test_metrics_have_every_column(finished):
    """Every column of the contract, a finite number in each once episodes have ended, one row an iteration."""
    result, _ = finished
    rows = rows_of(result.run_dir)
    assert set(CONTRACT_COLUMNS) <= set(rows[0])
    assert [int(row["iteration"]) for row in rows] == list(range(1, len(rows) + 1))
    assert all(np.isfinite(float(rows[-1][name])) for name in CONTRACT_COLUMNS)
    assert float(rows[-1]["entropy"]) == pytest.approx(np.log(2), abs=0.05)  # a policy that has hardly learned
    assert float(rows[-1]["learning_rate"]) < float(rows[0]["learning_rate"])  # annealed
    shares = [float(row["env_share"]) + float(row["act_share"]) + float(row["learn_share"]) for row in rows]
    assert all(0.5 < share <= 1.0 for share in shares)
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)


def test_summary_has_every_key(finished):
    """summary.json is what scripts read; it agrees with what train() returns and with the last row."""
    result, config = finished
    summary = json.loads((result.run_dir / "summary.json").read_text())
    assert set(CONTRACT_SUMMARY) <= set(summary)
    assert summary == {key: summary[key] for key in result.summary}
    assert summary["env_id"] == "CartPole-v1"
    assert summary["seed"] == config.seed
    assert summary["eval_episodes"] == 3
    assert summary["eval_return_mean"] > 5
    assert summary["global_step"] == int(rows_of(result.run_dir)[-1]["global_step"]) >= 600
    assert summary["device"] == "cpu"
    assert summary["tier"]
    assert summary["sps"] > 0


def test_config_json_is_the_config(finished):
    """The settings that made the run can be read back and are equal."""
    result, config = finished
    assert TrainConfig.from_json(result.run_dir / "config.json") == config


def test_curves_are_a_picture(finished):
    """curves.png is a PNG of a size that can be looked at."""
    result, _ = finished
    data = (result.run_dir / "curves.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    width, height = (int.from_bytes(data[at : at + 4]) for at in (16, 20))
    assert width >= 800
    assert height >= 500


def assert_events_are_rows(run_dir, always):
    """Each event in TensorBoard's own reader is the row of metrics.csv with its step, under CleanRL's tags, and none is twice.

    always: indices of rows that have an event whatever the speed.
    """
    events, rows = EventAccumulator(str(run_dir)), rows_of(run_dir)
    events.Reload()
    row_of = {int(row["global_step"]): row for row in rows}
    for tag, column in {
        "charts/episodic_return": "episodic_return_mean",
        "charts/SPS": "sps",
        "charts/learning_rate": "learning_rate",
        "losses/policy_loss": "policy_loss",
        "losses/value_loss": "value_loss",
        "losses/entropy": "entropy",
        "losses/approx_kl": "approx_kl",
        "losses/explained_variance": "explained_variance",
        "time/seconds": "seconds",
    }.items():
        scalars = events.Scalars(tag)
        steps = [scalar.step for scalar in scalars]
        assert steps == sorted(set(steps))
        assert {int(rows[index]["global_step"]) for index in always} <= set(steps) <= set(row_of)
        for scalar in scalars:
            assert scalar.value == pytest.approx(float(row_of[scalar.step][column]), nan_ok=True), (tag, scalar.step)
    return events


def test_tensorboard_reads_the_events(finished):
    """The first row, the last one and those between that were not too soon after another."""
    result, _ = finished
    events = assert_events_are_rows(result.run_dir, always=(0, -1))
    assert "config/text_summary" in events.Tags()["tensors"]


@pytest.mark.parametrize(
    ("interval", "written"),
    [
        (EVENT_SECONDS, [0, 1, 2]),  # slow iterations: every row, and the last one not twice
        (EVENT_SECONDS / 4, [0, 4, 8, 9]),  # fast ones: an event each EVENT_SECONDS, and the last row
        (EVENT_SECONDS / 1000, [0, 99]),
    ],
    ids=["slow", "fast", "very fast"],
)
def test_ten_events_a_second(tmp_path, monkeypatch, interval, written):
    """metrics.csv has every row; TensorBoard the first, the last, and between them at most one per EVENT_SECONDS."""
    clock = SimpleNamespace(monotonic=lambda: iteration * interval)
    monkeypatch.setattr("fastppo.run.loggers.time", clock)
    log = Loggers(tmp_path / "metrics.csv", print)
    for iteration in range(written[-1] + 1):
        log.log({"iteration": iteration + 1, "global_step": 10 * iteration, "loss": iteration / 2})
    log.close()
    assert [int(row["global_step"]) for row in rows_of(tmp_path)] == [10 * index for index in range(written[-1] + 1)]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("charts/loss")] == [(10 * i, i / 2) for i in written]


def test_global_step_counts_transitions_only(tmp_path):
    """Steps that only reset an environment are no steps: one-step episodes make every other row one of those."""
    result = train(tiny(tmp_path / "run", env_id="environments:ProbeConstantReward-v0"))
    assert [int(row["global_step"]) for row in rows_of(result.run_dir)] == [64, 128, 192]
    assert result.summary["global_step"] == 192
    assert [int(row["episodes"]) for row in rows_of(result.run_dir)] == [64, 128, 192]
    assert [int(row["terminations"]) for row in rows_of(result.run_dir)] == [64, 64, 64]
    assert [int(row["truncations"]) for row in rows_of(result.run_dir)] == [0, 0, 0]


def test_total_timesteps_counts_transitions_only(tmp_path):
    """The run goes on until that many transitions were made, and no iteration longer."""
    result = train(
        tiny(tmp_path / "run", env_id="environments:ProbeConstantReward-v0", num_iterations=None, total_timesteps=129)
    )
    assert [int(row["global_step"]) for row in rows_of(result.run_dir)] == [64, 128, 192]


def test_returns_logged_are_true_returns(tmp_path):
    """Normalisation and discounting stay out of the episode returns: two steps that pay 0 and 1 return 1."""
    result = train(tiny(tmp_path / "run", env_id="environments:ProbeRewardAtTheEnd-v0", norm_reward=True, gamma=0.3))
    assert [float(row["episodic_return_mean"]) for row in rows_of(result.run_dir)] == [1.0, 1.0, 1.0]
    assert [float(row["episodic_length_mean"]) for row in rows_of(result.run_dir)] == [2.0, 2.0, 2.0]


def test_returns_logged_are_true_returns_of_clipped_rewards(tmp_path):
    """A pendulum's 200 steps cost up to 16 each: a sum of signs could not be below -200."""
    result = train(tiny(tmp_path / "run", env_id="Pendulum-v1", clip_reward=True, num_steps=210, num_iterations=1, gamma=0.9))
    assert float(rows_of(result.run_dir)[-1]["episodic_return_mean"]) < -400.0


def test_log_interval(tmp_path):
    """Every K-th iteration has a row, and the last one always."""
    result = train(tiny(tmp_path / "run", num_iterations=5, log_interval=2))
    assert [int(row["iteration"]) for row in rows_of(result.run_dir)] == [2, 4, 5]


def test_best_is_the_one_with_the_highest_return(tmp_path):
    """best.pt has the parameters that played the best iteration, here half-way up to the run's end, and train() returns them.

    Of RiseAndFall's 16 episodes an environment the third iteration has the 33rd to the 48th, which cost 7 to 0 and 1 to 8:
    4 on average, with a variance of 5.5.
    """
    result = train(tiny(tmp_path / "run", env_id="environments:RiseAndFall-v0", num_iterations=8))
    best, last = checkpoint(result.run_dir, "best"), checkpoint(result.run_dir)
    assert best["iteration"] == 2  # after two updates: before the third
    assert best["best_return"] == pytest.approx(-4.0 - 3.0 * (5.5 / 63) ** 0.5)
    assert last["best_return"] == best["best_return"] == result.summary["best_return_mean"]
    assert last["iteration"] == 8
    assert torch.equal(result.policy.params, load_policy(result.run_dir).params)
    assert not torch.equal(result.policy.params, load_policy(result.run_dir, "last").params)


def test_a_run_without_one_finished_episode(tmp_path):
    """best.pt is then the last policy, and curves and summary are there all the same."""
    with drawn():
        result = train(tiny(tmp_path / "run", env_id="Pendulum-v1", num_iterations=2))
    assert not any(np.isfinite(float(row["episodic_return_mean"])) for row in rows_of(result.run_dir))
    assert_same(checkpoint(result.run_dir, "best"), checkpoint(result.run_dir))
    summary = json.loads((result.run_dir / "summary.json").read_text())
    assert summary["best_return_mean"] is None
    assert (result.run_dir / "curves.png").exists()


def test_default_directory_name(tmp_path, monkeypatch):
    """runs/<env>__<seed>__<time>, and a second run within the second gets another."""
    monkeypatch.chdir(tmp_path)
    first, second = (RunDirectory.create(None, "module:Some/Env-v0", 7, settings) for _ in range(2))
    assert re.fullmatch(r"runs/module-Some-Env-v0__7__\d{8}-\d{6}", first.path.as_posix())
    assert first.path != second.path
    assert second.config.read_text() == "{}"


def test_an_empty_directory_may_be_named(tmp_path):
    """mktemp -d makes one; it is no run that could be overwritten."""
    (tmp_path / "run").mkdir()
    assert train(tiny(tmp_path / "run", num_iterations=1)).run_dir == tmp_path / "run"


class _Unpicklable:
    def __reduce__(self):
        raise OSError("disk full")


def test_a_failed_write_leaves_the_checkpoint_before(tmp_path):
    """A checkpoint is written under another name and renamed: when writing fails, the previous one is still whole."""
    directory = RunDirectory.create(str(tmp_path / "run"), "CartPole-v1", 1, settings)
    directory.save(directory.last, {"format": FORMAT, "iteration": 1, "weights": torch.ones(3)})
    with pytest.raises(OSError, match="disk full"):
        directory.save(directory.last, {"weights": torch.ones(1000), "bad": _Unpicklable()})
    assert load_checkpoint(directory.last)["iteration"] == 1


def test_a_checkpoint_is_never_seen_half_written(tmp_path):
    """Someone who reads the directory all the while finds a whole checkpoint at every moment, old or new."""
    directory = RunDirectory.create(str(tmp_path / "run"), "CartPole-v1", 1, settings)
    inodes = set()
    for iteration in range(3):
        directory.save(directory.last, {"iteration": iteration})
        inodes.add(directory.last.stat().st_ino)
        with directory.last.open("rb") as held:  # a reader that opened it before the next write still reads this one
            directory.save(directory.last, {"iteration": iteration + 100})
            assert torch.load(io.BytesIO(held.read()), weights_only=True)["iteration"] == iteration
        assert not list(directory.path.rglob("*.tmp"))


# --- the same seed


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"env_id": "Pendulum-v1", "norm_obs": True, "norm_reward": True, "num_steps": 220},
        {"env_id": "environments:IdentityBox-v0", "share_backbone": True, "norm_obs": True, "target_kl": 0.01},
    ],
    ids=["Discrete", "Box", "Box, shared"],
)
def test_same_seed_same_bits(tmp_path, settings):
    """Parameters, optimiser, statistics, generators and every metric but times: equal bits, whatever was drawn from the

    global generators before. Another seed gives another run.
    """
    runs = []
    for name, seed in (("first", 1), ("second", 1), ("other", 2)):
        torch.rand(3)  # the global generators stand elsewhere each time
        np.random.rand(3)
        result = train(tiny(tmp_path / name, seed=seed, **settings))
        state = {key: value for key, value in checkpoint(result.run_dir).items() if key != "seconds"}
        runs.append((state, without_times(rows_of(result.run_dir)), result.policy.params))
    (state, rows, params), (state_again, rows_again, params_again), (_, other_rows, other_params) = runs
    assert_same(state, state_again)
    assert rows == rows_again
    assert torch.equal(params, params_again)
    assert rows != other_rows
    assert not torch.equal(params, other_params)


def test_training_leaves_the_global_generators_alone(tmp_path):
    """All randomness comes from owned generators: a user's own random numbers are the same with and without training."""
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    train(tiny(tmp_path / "run", eval_episodes=2))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


# --- going on

RESUMED = {"env_id": "Pendulum-v1", "norm_obs": True, "norm_reward": True, "num_steps": 210}


def test_resume_goes_on(tmp_path):
    """Iterations, steps, episodes and time continue; metrics.csv has each iteration exactly once, TensorBoard none twice."""
    run_dir = tmp_path / "run"
    train(tiny(run_dir, **RESUMED))
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
    train(tiny(run_dir, **RESUMED))
    before, rows_before = checkpoint(run_dir), rows_of(run_dir)
    assert console(["--resume", str(run_dir)]) == 0
    assert_same(checkpoint(run_dir), before)
    assert rows_of(run_dir) == rows_before


def test_two_continuations_are_the_same(tmp_path):
    """Going on twice from copies of one run gives the same bits: nothing of the state is outside of the checkpoint."""
    train(tiny(tmp_path / "one", env_id="environments:IdentityBox-v0", norm_obs=True))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for name in ("one", "two"):
        assert console(["--resume", str(tmp_path / name), "--num-iterations", "5"]) == 0
    one, two = checkpoint(tmp_path / "one"), checkpoint(tmp_path / "two")
    del one["seconds"], two["seconds"]
    assert_same(one, two)
    assert without_times(rows_of(tmp_path / "one")) == without_times(rows_of(tmp_path / "two"))


def test_rows_after_the_checkpoint_are_made_again(tmp_path):
    """A killed run has logged more than its last checkpoint holds, the last line perhaps in half: no iteration is twice."""
    run_dir = tmp_path / "run"
    train(tiny(run_dir, num_iterations=2))
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
    assert [(event.step, event.value) for event in events.Scalars("charts/loss")] == [(20, 2.0), (30, 2.0)]


def test_total_timesteps_may_be_raised(tmp_path):
    """The everyday reason to go on: more steps."""
    run_dir = tmp_path / "run"
    train(tiny(run_dir, num_iterations=None, total_timesteps=200))
    before = len(rows_of(run_dir))
    assert console(["--resume", str(run_dir), "--total-timesteps", "500"]) == 0
    rows = rows_of(run_dir)
    assert len(rows) > before
    assert int(rows[-1]["global_step"]) >= 500


def test_steps_may_replace_iterations(tmp_path):
    """A run that was measured in iterations goes on to --total-timesteps when that is what resuming asks for."""
    run_dir = tmp_path / "run"
    train(tiny(run_dir, num_iterations=2))
    assert console(["--resume", str(run_dir), "--total-timesteps", "600"]) == 0
    assert int(rows_of(run_dir)[-1]["global_step"]) >= 600


# --- signals


def start_endless_run(run_dir):
    """`python -m fastppo.train` with both streams in pipes."""
    flags = ["--num-envs", "4", "--num-steps", "32", "--total-timesteps", "100000000", "--run-dir", str(run_dir), "--plain"]
    return subprocess.Popen(
        [sys.executable, "-m", "fastppo.train", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=run_dir.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def assert_ended_in_order(run_dir):
    """The last iteration logged is the one in the checkpoint and the summary, and everything is whole."""
    last = checkpoint(run_dir)
    assert last["iteration"] == int(rows_of(run_dir)[-1]["iteration"])
    assert json.loads((run_dir / "summary.json").read_text())["iterations"] == last["iteration"]
    assert load_policy(run_dir, "last").act(np.zeros(4, np.float32)) in (0, 1)
    assert not list(run_dir.rglob("*.tmp"))


def test_a_signal_ends_the_run_in_order(tmp_path):
    """The iteration is finished, a checkpoint and the summary are written, the way to go on is said; 128 + the signal.

    SIGTERM and SIGHUP do the same in tests/test_resume.py and tests/test_faults.py, within this process.
    """
    run_dir = tmp_path / "run"
    process = start_endless_run(run_dir)
    try:
        deadline = time.monotonic() + 600
        while not (run_dir / "metrics.csv").exists() or len(rows_of(run_dir)) < 2:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGINT, errors
    assert f"--resume {run_dir}" in output
    assert "Traceback" not in output + errors
    assert_ended_in_order(run_dir)


def test_a_reader_that_leaves_ends_the_run_in_order(tmp_path):
    """`| head -3`: as after SIGTERM, with the code of SIGPIPE and not a word on stderr."""
    process = start_endless_run(tmp_path / "run")
    try:
        assert process.stdout.readline() == f"run directory {tmp_path / 'run'}\n"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=600) == 128 + signal.SIGPIPE
    finally:
        process.kill()
    assert_ended_in_order(tmp_path / "run")


@pytest.mark.parametrize("module", ["train", "evaluate"])
def test_help_for_a_reader_that_leaves(module):
    """`--help | head -1`: nothing on stderr either."""
    here, there = os.pipe()
    os.close(here)
    command = [sys.executable, "-m", f"fastppo.{module}", "--help"]
    done = subprocess.run(command, stdout=there, stderr=subprocess.PIPE, text=True, timeout=600)
    os.close(there)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


# --- a fault


@pytest.mark.parametrize("kind", ["obs", "reward", "raise"])
def test_a_fault_keeps_what_was_reached(tmp_path, kind):
    """Iterations before the fault are in a whole checkpoint; the update with the bad number was not made."""
    marker = tmp_path / "marker"
    marker.touch()
    settings = {"env_kwargs": {"kind": kind, "index": 2, "at": 70, "marker": str(marker)}, "norm_obs": True}
    with pytest.raises(TrainingFault):
        train(tiny(tmp_path / "run", env_id="environments:FaultyVector-v0", check_env=False, **settings))
    last = checkpoint(tmp_path / "run")
    assert last["iteration"] == 2
    assert len(rows_of(tmp_path / "run")) == 2
    assert all(weight.isfinite().all() for weight in last["policy"]["weights"].values())
    assert all(moment.isfinite().all() for moment in last["policy"]["obs_moments"]["obs"])
    assert "Traceback" in (tmp_path / "run" / "fault.txt").read_text()
    assert load_policy(tmp_path / "run", "last").act(np.zeros(3, np.float32)) in (0, 1, 2)

    marker.unlink()  # the environment is mended
    assert console(["--resume", str(tmp_path / "run")]) == 0
    assert [int(row["iteration"]) for row in rows_of(tmp_path / "run")] == [1, 2, 3]


# --- the display


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self):
        return True


def on_terminal(monkeypatch, columns=80):
    """What is printed goes to a terminal of so many columns from here on."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    for name, value in {"COLUMNS": columns, "LINES": 40, "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, str(value))
    return terminal


@pytest.mark.parametrize("columns", [80, 200])
def test_live_display_fits_80_columns(monkeypatch, columns):
    """Nothing is cut off or wrapped on an 80-column terminal, with figures as long as they get."""
    terminal = on_terminal(monkeypatch, columns)
    display = make_display(False, "fastppo · CartPole-v1 · seed 1")
    assert isinstance(display, LiveDisplay)
    for step in range(60):
        display.update({**ROW, "episodic_return_mean": -1234.5678 + step % 7}, 0.42, 4000.0, "gymnasium/sync · cpu · eager")
    display.note("a note that stays")
    display.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).replace("\r", "\n")
    panel = [line for line in text.splitlines() if line.startswith(("╭", "│", "╰"))]
    assert panel
    assert max(cell_len(line) for line in panel) == 80
    assert "a note that stays" in text
    assert "…" not in text
    for shown in (
        "fastppo · CartPole-v1 · seed 1",
        "42%",
        "1:06:40 elapsed, 1:06:40 left",
        "123,456,789",
        "12,345",
        "1,234,567",
        "gymnasium/sync · cpu · eager",
        "-1,235",
        "12,346",
        "-0.0001235",
        "0.6931",
        "0.0001235",
        "123,457",
        "50%",
        "20%",
        "100%",
        "▁",
        "█",
    ):
        assert shown in text, shown


def screen_of(terminal, columns, rows):
    """What stands on a terminal of that size after all that was written: one that obeys what rich sends, and wraps."""
    screen, row, column = [[" "] * columns for _ in range(rows)], 0, 0
    for code, letter in re.findall(r"\x1b\[([0-9;?]*[A-Za-z])|([^\x1b])", terminal.getvalue()):
        if letter == "\n":
            row, column = row + 1, 0
        elif letter == "\r":
            column = 0
        elif letter:
            if column == columns:
                row, column = row + 1, 0
            screen[row][column] = letter
            column += 1
        elif code.endswith("A"):
            row -= int(code[:-1] or 1)
        elif code == "2K":
            screen[row] = [" "] * columns
    return ["".join(line).rstrip() for line in screen]


def test_live_display_on_a_terminal_made_narrower(monkeypatch):
    """The terminal has wrapped each line of the panel into two: none of these is left over, and the notes above stay."""
    terminal = on_terminal(monkeypatch)
    display = LiveDisplay("title")
    display.note("a note that stays")
    display.update(ROW, 0.42, 65.0, "torch · cpu · eager")
    monkeypatch.setattr(display._console, "_width", 50)
    display.note("another one")
    display.close()
    screen = screen_of(terminal, 50, 40)
    assert screen[:2] == ["a note that stays", "another one"]
    assert [line[0] for line in screen[2:] if line] == ["╭", *"│" * 6, "╰"]
    assert all(cell_len(line) == 50 for line in screen[2:] if line)
    assert "torch · cpu · eager" in screen[9]


def test_the_curve_is_of_the_whole_run(monkeypatch):
    """Its bars stand for shares of the run, from the first on: more iterations push nothing out at its left."""
    terminal = on_terminal(monkeypatch)
    display = LiveDisplay("title")
    for step in range(3000):
        display.update({**ROW, "episodic_return_mean": float(step >= 1500)}, step / 3000, 1.0, "")
    display.close()
    curve = re.findall("[▁▂▃▄▅▆▇█]+", screen_of(terminal, 80, 24)[2])
    assert curve == ["▁" * 16 + "█" * 17]


def test_a_name_is_no_markup(monkeypatch):
    """rich would take brackets for styles, and fail at one that closes nothing."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    display = LiveDisplay("[/bold] My[red]Env")
    display.update(ROW, 0.42, 65.0, "[/x]")
    display.close()
    assert "[/bold] My[red]Env" in terminal.getvalue()


class Notebook:
    """What a notebook's kernel puts in stdout's place, as far as a library may count on it."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("where", ["notebook", "pipe", "dumb terminal", "--plain"])
def test_no_panel(where, monkeypatch):
    """Log lines, and nothing that only a terminal obeys."""
    file = {"notebook": Notebook, "pipe": io.StringIO}.get(where, Terminal)()
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setenv("TERM", "dumb" if where == "dumb terminal" else "xterm-256color")
    display = make_display(where == "--plain", "title")
    assert isinstance(display, PlainDisplay)
    for index in range(50):
        display.note(f"note {index}")
        display.update(ROW, 0.42, 65.0, "torch · cpu · eager")
    display.close()
    text = file.text if where == "notebook" else file.getvalue()
    assert text.count("note") == 50
    assert text.isprintable() or set(filter(lambda letter: not letter.isprintable(), text)) == {"\n"}


def test_live_display_before_the_first_episode(monkeypatch):
    """Nothing has ended yet: dashes, no crash."""
    terminal = on_terminal(monkeypatch)
    display = LiveDisplay("title")
    nan = float("nan")
    display.update(
        {**ROW, "episodic_return_mean": nan, "episodic_length_mean": nan, "new_best": False}, 0.0, nan, "torch · cpu · eager"
    )
    display.close()
    assert "none yet" in terminal.getvalue()
    assert "nan" not in terminal.getvalue()


def test_plain_lines(capsys):
    """Without a terminal: one line with the figures that the article's log has, at most one a second, and the last one."""
    display = make_display(False, "title")
    assert isinstance(display, PlainDisplay)
    display.note("run directory x")
    display.update(ROW, 0.42, 65.0, "")
    display.update({**ROW, "iteration": 2, "new_best": False}, 0.43, 64.0, "")
    display.update({**ROW, "iteration": 3, "new_best": False}, 0.44, 63.0, "")
    display.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "run directory x"
    assert len(lines) == 3  # the first update, then the last: those within the second between are dropped
    for shown in ("42%", "return", "-1235", "loss", "policy", "value", "entropy", "0.6931", "1:05", "new best"):
        assert shown in lines[1]
    assert " it 3 " in lines[2]
    assert "new best" not in lines[2]


def test_figures_for_people():
    """Durations, numbers and sparklines read as a person would write them."""
    assert [duration(x) for x in (0, 59.4, 61, 3753, float("inf"))] == ["0 s", "59 s", "1:01", "1:02:33", "?"]
    assert [number(x) for x in (475.0, 0.00012346, float("nan"))] == ["475", "0.0001235", "-"]
    shown = [figure(x) for x in (475, 475.04, -1234.5, 999.96, 1e6, -2.046e-5, 0.0, 0.00012346, float("nan"))]
    assert shown == ["475.0", "475.0", "-1,234", "1,000", "1,000,000", "-2.046e-05", "0", "0.0001235", "-"]
    assert sparkline([0.0, 0.5, 1.0], 10) == "▁▅█"
    nan = float("nan")
    assert sparkline([nan, 0.0, nan, 1.0, nan, nan], 10) == " ▁▁█"
    assert sparkline([nan, nan], 10) == ""
    assert sparkline([3.0, 3.0], 10) == "▁▁"
    assert len(sparkline(list(range(500)), 30)) == 30
    assert sparkline([], 30) == ""
