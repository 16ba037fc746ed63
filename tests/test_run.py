"""The run directory: what is in it, how it gets there, and that the same seed fills it with the same bits."""

import contextlib
import io
import json
import re
import time
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastppo import TrainConfig, load_policy, train
from fastppo.run.checkpoint_file import FORMAT, load_checkpoint
from fastppo.run.directory import RunDirectory
from fastppo.run.loggers import EVENT_SECONDS, Loggers
from support.runs import (
    assert_events_are_rows,
    assert_same,
    checkpoint,
    drawn,
    rows_of,
    short_run,
    without_times,
)

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


def settings(directory):
    """What a run directory holds from its start."""
    directory.write_text(directory.config, "{}")


# --- what a run leaves behind


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished CartPole run, shared by the tests that only look at it."""
    settings = {"num_iterations": None, "total_timesteps": 600, "eval_episodes": 3, "learning_rate": 1e-3}
    config = short_run(tmp_path_factory.mktemp("finished") / "run", **settings)
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
    assert all(0.0 < share <= 1.0 for share in shares)
    seconds = [float(row["seconds"]) for row in rows]
    assert seconds == sorted(seconds)


def test_shares_are_of_the_time_of_an_iteration(tmp_path):
    """Where environments take most of it, `env_share` says so, on a busy machine too: they sleep."""

    class Slow(gym.Wrapper):
        def step(self, action):
            time.sleep(0.02)
            return super().step(action)

    config = short_run(tmp_path / "run", num_envs=2, num_steps=16, num_minibatches=2, num_iterations=2, eval_episodes=0)
    with drawn(), contextlib.closing(SyncVectorEnv([lambda: Slow(gym.make("CartPole-v1"))] * 2)) as envs:
        rows = rows_of(train(config, envs=envs).run_dir)
    assert all(0.5 < float(row["env_share"]) < 1.0 for row in rows)
    assert all(0.0 < float(row[name]) < 0.5 for row in rows for name in ("act_share", "learn_share"))


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
    assert [(event.step, event.value) for event in events.Scalars("losses/loss")] == [(10 * i, i / 2) for i in written]


def test_global_step_counts_transitions_only(tmp_path):
    """Steps that only reset an environment are no steps: one-step episodes make every other row one of those."""
    result = train(short_run(tmp_path / "run", env_id="environments:ProbeConstantReward-v0", autoreset="next-step"))
    assert [int(row["global_step"]) for row in rows_of(result.run_dir)] == [64, 128, 192]
    assert result.summary["global_step"] == 192
    assert [int(row["episodes"]) for row in rows_of(result.run_dir)] == [64, 128, 192]
    assert [int(row["terminations"]) for row in rows_of(result.run_dir)] == [64, 64, 64]
    assert [int(row["truncations"]) for row in rows_of(result.run_dir)] == [0, 0, 0]


def test_total_timesteps_counts_transitions_only(tmp_path):
    """The run goes on until that many transitions were made, and no iteration longer."""
    settings = {"env_id": "environments:ProbeConstantReward-v0", "autoreset": "next-step"}
    result = train(short_run(tmp_path / "run", **settings, num_iterations=None, total_timesteps=129))
    assert [int(row["global_step"]) for row in rows_of(result.run_dir)] == [64, 128, 192]


def test_returns_logged_are_true_returns(tmp_path):
    """Normalisation and discounting stay out of the episode returns: two steps that pay 0 and 1 return 1."""
    result = train(short_run(tmp_path / "run", env_id="environments:ProbeRewardAtTheEnd-v0", norm_reward=True, gamma=0.3))
    assert [float(row["episodic_return_mean"]) for row in rows_of(result.run_dir)] == [1.0, 1.0, 1.0]
    assert [float(row["episodic_length_mean"]) for row in rows_of(result.run_dir)] == [2.0, 2.0, 2.0]


def test_returns_logged_are_true_returns_of_clipped_rewards(tmp_path):
    """A pendulum's 200 steps cost up to 16 each: a sum of signs could not be below -200."""
    result = train(
        short_run(tmp_path / "run", env_id="Pendulum-v1", clip_reward=True, num_steps=210, num_iterations=1, gamma=0.9)
    )
    assert float(rows_of(result.run_dir)[-1]["episodic_return_mean"]) < -400.0


def test_log_interval(tmp_path):
    """Every K-th iteration has a row, and the last one always."""
    result = train(short_run(tmp_path / "run", num_iterations=5, log_interval=2))
    assert [int(row["iteration"]) for row in rows_of(result.run_dir)] == [2, 4, 5]


def test_best_is_the_one_with_the_highest_return(tmp_path):
    """best.pt has the parameters that played the best iteration, here half-way up to the run's end, and train() returns them.

    Of RiseAndFall's 16 episodes an environment the third iteration has the 33rd to the 48th, which cost 7 to 0 and 1 to 8:
    4 on average, with a variance of 5.5.
    """
    settings = {"env_id": "environments:RiseAndFall-v0", "autoreset": "next-step", "num_iterations": 8}
    result = train(short_run(tmp_path / "run", **settings))
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
        result = train(short_run(tmp_path / "run", env_id="Pendulum-v1", num_iterations=2))
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
    assert train(short_run(tmp_path / "run", num_iterations=1)).run_dir == tmp_path / "run"


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
        result = train(short_run(tmp_path / name, seed=seed, **settings))
        runs.append((checkpoint(result.run_dir), without_times(rows_of(result.run_dir)), result.policy.params))
    (state, rows, params), (state_again, rows_again, params_again), (_, other_rows, other_params) = runs
    assert_same(state, state_again)
    assert rows == rows_again
    assert torch.equal(params, params_again)
    assert rows != other_rows
    assert not torch.equal(params, other_params)


def test_training_leaves_the_global_generators_alone(tmp_path):
    """All randomness comes from owned generators: a user's own random numbers are the same with and without training."""
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    train(short_run(tmp_path / "run", eval_episodes=2))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
