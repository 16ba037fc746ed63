"""What a Python caller may bring: callbacks, environments of their own, an end before the end."""

import json
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from environments import WalkVector
from gymnasium.vector import SyncVectorEnv

from fastppo import Callback, TrainConfig, TrainingFault, UsageError, load_policy, train
from fastppo.envs.factory import EnvConfig, make_device_envs
from fastppo.run.checkpoint_file import load_checkpoint
from fastppo.run.metrics_file import read_rows
from support.resume import differing, result_of
from support.runs import Recorder, tiny

# --- callbacks


def test_callbacks_are_told_everything_in_order(tmp_path):
    """Each iteration with its row of metrics.csv, each checkpoint once it is on disk, the end before evaluation."""
    one, two = Recorder(), Recorder()
    result = train(tiny(tmp_path / "run", checkpoint_iterations=2), callbacks=[one, two])
    rows = read_rows(result.run_dir / "metrics.csv")
    steps = [int(row["global_step"]) for row in rows]
    assert one.calls == two.calls
    assert one.calls == [
        ("iteration", 1, steps[0], 0.25),
        ("iteration", 2, steps[1], 0.5),
        ("checkpoint", 2, 2),
        ("iteration", 3, steps[2], 0.75),
        ("iteration", 4, steps[3], 1.0),
        ("checkpoint", 4, 4),
        ("end", 4),
    ]
    assert {key: str(value) for key, value in one.view.metrics.items()} == rows[-1]
    assert one.view.run_dir == result.run_dir
    assert one.view.config == tiny(tmp_path / "run", checkpoint_iterations=2)


def test_a_view_is_to_read(tmp_path):
    """Nobody changes a run by it: fields and metrics refuse, and the policy is a copy as it stood."""
    policies = []

    class Keep(Callback):
        def on_iteration(self, run):
            policies.append(run.policy())
            with pytest.raises(AttributeError):
                run.iteration = 0
            with pytest.raises(TypeError):
                run.metrics["loss"] = 0.0

    result = train(tiny(tmp_path / "kept", norm_obs=True), callbacks=[Keep()])
    train(tiny(tmp_path / "plain", norm_obs=True))
    assert differing(result_of(tmp_path / "plain"), result_of(tmp_path / "kept")) == []
    assert len({policy.params.sum().item() for policy in policies}) == 4
    assert torch.equal(policies[-1].params, load_policy(result.run_dir, "last").params)
    obs = [0.1, 0.2, 0.3, 0.4]
    assert policies[-1].value(torch.tensor(obs)) == load_policy(result.run_dir, "last").value(torch.tensor(obs))


def test_a_callback_that_has_seen_enough(tmp_path, capsys):
    """True ends training in order: the row, the checkpoint, the summary, evaluation."""
    recorder = Recorder(stop=2)
    result = train(tiny(tmp_path / "run", eval_episodes=2, log_interval=5), callbacks=[recorder])
    assert [call[0] for call in recorder.calls] == ["iteration", "iteration", "end"]
    assert [row["iteration"] for row in read_rows(result.run_dir / "metrics.csv")] == ["2"]
    assert result.summary["iterations"] == 2
    assert result.summary["stopped_by"] == "Recorder has seen enough"
    assert result.summary["eval_episodes"] == 2
    assert "training ends here: Recorder has seen enough" in capsys.readouterr().out


class Says(Callback):
    """Returns the same in every iteration."""

    def __init__(self, answer):
        self.answer = answer

    def on_iteration(self, run):
        return self.answer


@pytest.mark.parametrize("answer", [np.True_, 1, 1.0, np.float32(1.0), torch.tensor(True), torch.tensor([True])], ids=repr)
def test_every_true_ends_training(tmp_path, answer):
    """What a comparison of NumPy or torch returns is as good as Python's True."""
    assert train(tiny(tmp_path / "run"), callbacks=[Says(answer)]).summary["iterations"] == 1


@pytest.mark.parametrize("answer", ["fine", np.False_, 0, 2.5, math.nan, torch.tensor(False), [True]], ids=repr)
def test_only_true_ends_training(tmp_path, answer):
    """A callback that returns something else by accident does not."""
    assert train(tiny(tmp_path / "run", num_iterations=2), callbacks=[Says(answer)]).summary["iterations"] == 2


def test_an_answer_of_several_values_is_a_fault(tmp_path):
    """It is neither yes nor no."""
    with pytest.raises(TrainingFault, match=r"^after iteration 1: Says\.on_iteration raised ValueError"):
        train(tiny(tmp_path / "run"), callbacks=[Says(np.array([True, False]))])


def test_a_callback_that_raises(tmp_path):
    """A fault that names it; the iteration it was told of is kept whole, and what goes on from there is as without one."""
    train(tiny(tmp_path / "whole", backend="torch"))
    with pytest.raises(TrainingFault, match=r"^after iteration 2: Recorder\.on_iteration raised ValueError: no more\n"):
        train(tiny(tmp_path / "run", backend="torch"), callbacks=[Recorder(fail=2)])
    assert "of this" in (tmp_path / "run" / "fault.txt").read_text()
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["iteration"] == 2
    train(tiny(tmp_path / "run", backend="torch", resume=str(tmp_path / "run")))
    assert differing(result_of(tmp_path / "whole"), result_of(tmp_path / "run")) == []


# --- an end before the end


def test_stop_at_return(tmp_path, capsys):
    """As soon as the last 100 episodes return that much, not before there have been 100; kept as why in summary.json."""
    config = tiny(tmp_path / "run", env_id="environments:ProbeConstantReward-v0", num_iterations=40, stop_at_return=1.0)
    result = train(config)
    rows = read_rows(result.run_dir / "metrics.csv")
    assert [int(row["episodes"]) for row in rows] == [32, 64, 96, 128]  # of one step: every row is one
    summary = json.loads((result.run_dir / "summary.json").read_text())
    assert summary["stopped_by"] == "the last 100 episodes return 1, as --stop-at-return asks"
    assert "training ends here: the last 100 episodes return 1" in capsys.readouterr().out


def test_a_return_that_is_not_reached(tmp_path):
    """The run goes on to its end."""
    config = tiny(tmp_path / "run", env_id="environments:ProbeConstantReward-v0", num_iterations=8, stop_at_return=1.01)
    result = train(config)
    assert result.summary["iterations"] == 8
    assert result.summary["stopped_by"] is None


@pytest.mark.parametrize("value", [math.nan, math.inf, "much", True])
def test_a_return_that_is_none(value):
    """A number, or nothing."""
    with pytest.raises(UsageError, match="--stop-at-return"):
        TrainConfig(stop_at_return=value)


# --- environments of one's own


class Closing(WalkVector):
    """Walks that tell whether they were closed."""

    was_closed = False

    def close_extras(self, **kwargs):
        self.was_closed = True
        super().close_extras(**kwargs)


def trained_alike(run_dir):
    """The result of a run, without the settings by which its environments were made."""
    kept, rows = result_of(run_dir)
    return {name: {**checkpoint, "settings": None} for name, checkpoint in kept.items()}, rows


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_environments_of_ones_own(mode, tmp_path):
    """Trained and evaluated on as those of the same class made from an id, and left open."""
    envs = Closing(2, mode)
    settings = {"eval_episodes": 3}
    given = train(tiny(tmp_path / "given", **settings), envs=envs)
    assert not envs.was_closed
    envs.reset(seed=0)
    made = train(tiny(tmp_path / "made", env_id="environments:WalkVector-v0", env_kwargs={"mode": mode}, **settings))
    assert differing(trained_alike(tmp_path / "made"), trained_alike(tmp_path / "given")) == []
    assert given.summary["env_id"] == "Closing"
    assert given.summary["backend"] == "given"
    assert given.summary["eval_episodes"] == 3
    assert made.summary["backend"] == "gymnasium/entry-point"


def test_their_name(tmp_path):
    """The id they were registered with, unless the caller has another."""
    registered = gym.make_vec("CartPole-v1", num_envs=2)
    assert train(tiny(tmp_path / "spec"), envs=registered).summary["env_id"] == "CartPole-v1"
    mountain = gym.make_vec("MountainCar-v0", num_envs=2, vectorization_mode="sync")
    assert train(tiny(tmp_path / "other"), envs=mountain).summary["env_id"] == "MountainCar-v0"
    named = train(tiny(tmp_path / "named", env_id="Walks"), envs=WalkVector(2))
    assert named.summary["env_id"] == "Walks"


def test_on_the_device(tmp_path):
    """A TorchVectorEnv is collected from by the program, as with --backend torch: the same bits."""
    train(tiny(tmp_path / "given"), envs=make_device_envs(EnvConfig("CartPole-v1", 2), "cpu"))
    train(tiny(tmp_path / "made", backend="torch"))
    assert differing(trained_alike(tmp_path / "made"), trained_alike(tmp_path / "given")) == []


def test_they_go_on(tmp_path):
    """A run on environments of one's own is resumed with such."""
    config = tiny(tmp_path / "run", checkpoint_iterations=1, exact_resume=True)
    train(tiny(tmp_path / "whole", checkpoint_iterations=1, exact_resume=True), envs=WalkVector(2))
    with pytest.raises(TrainingFault):
        train(config, envs=WalkVector(2), callbacks=[Recorder(fail=2)])
    train(tiny(tmp_path / "run", checkpoint_iterations=1, exact_resume=True, resume=config.run_dir), envs=WalkVector(2))
    assert differing(result_of(tmp_path / "whole"), result_of(tmp_path / "run")) == []


def test_what_does_not_fit(tmp_path):
    """Another number of environments, or something wrong with them: refused before anything is written."""
    with pytest.raises(UsageError, match="--num-envs 2: WalkVector comes with 3 environments"):
        train(tiny(tmp_path / "run"), envs=WalkVector(3))

    class Wrong(SyncVectorEnv):
        def step(self, actions):
            return super().step(actions)[:4]

    with pytest.raises(UsageError, match="step returned 4 values"):
        train(tiny(tmp_path / "run"), envs=Wrong([lambda: gym.make("CartPole-v1")] * 2))
    assert not (tmp_path / "run").exists()
