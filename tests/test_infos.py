"""What environments say in their infos, and what callbacks record and watch: in metrics.csv, TensorBoard and messages."""

import csv

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastppo import Callback, StepView, TrainConfig, TrainingFault, UsageError, View, train
from fastppo.envs.autoreset import AutoresetEnvs, numbers_in
from fastppo.envs.multi_seed_envs import JoinedVectorEnv
from fastppo.envs.numbered import NumberedVectorEnv
from fastppo.rollout.storage import Outcomes
from fastppo.run.metrics import joint_row, tag_of
from fastppo.run.metrics_file import MetricsFile, read_rows
from fastppo.training.loop import global_outcomes
from fastppo.training.training_run import TrainingRun

SHORT = {"num_iterations": 2, "num_steps": 16, "eval_episodes": 0, "compile": "off", "checkpoint_seconds": 1e6}
LENGTH = 4


class Counts(gym.Env):
    """Episodes of LENGTH steps; the info of the last one has the number of the episode, all others something else."""

    observation_space = Box(-1, 1, (1,), np.float32)
    action_space = Discrete(2)
    ended = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {"count": -1, "is_success": True}

    def step(self, action):
        self.t += 1
        info = {"count": 99, "is_success": True, "other": 1.0, "text": "none"}
        if self.t == LENGTH:
            info |= {"count": np.int64(self.ended), "is_success": np.bool_(self.ended % 2 == 0)}
            self.ended += 1
        return np.zeros(1, np.float32), 1.0, False, self.t == LENGTH, info


class CountsOfAll(VectorEnv):
    """Two of them in a class that steps both, and resets within the step if `mode` says so."""

    def __init__(self, mode=AutoresetMode.NEXT_STEP):
        self.num_envs, self.mode, self.metadata = 2, mode, {"autoreset_mode": mode}
        self.single_observation_space, self.single_action_space = Counts.observation_space, Counts.action_space
        self.observation_space = batch_space(self.single_observation_space, 2)
        self.action_space = batch_space(self.single_action_space, 2)
        self.inner = gym.vector.SyncVectorEnv([Counts, Counts], autoreset_mode=mode)

    def reset(self, *, seed=None, options=None):
        return self.inner.reset(seed=seed, options=options)

    def step(self, actions):
        return self.inner.step(actions)


class CountsOfTensors(CountsOfAll):
    """The same with tensors."""

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed, options=options)
        return torch.from_numpy(obs.copy()), info

    def step(self, actions):
        obs, reward, terminated, truncated, info = super().step(actions.numpy())
        obs, reward, terminated, truncated = (torch.from_numpy(x.copy()) for x in (obs, reward, terminated, truncated))
        numbers = {name: torch.from_numpy(info[name].astype(np.float32)) for name in ("count", "is_success") if name in info}
        return obs, reward, terminated, truncated, numbers


def rows_of(path):
    with (path / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "settings",
    [
        {"env_fn": Counts, "vectorization": "sync", "autoreset": "next-step"},
        {"env_fn": Counts, "vectorization": "sync", "autoreset": "same-step"},
        {"env_fn": Counts, "vectorization": "grouped", "num_threads": 2, "autoreset": "next-step"},
        {"envs": [Counts(), Counts()]},
        {"envs": CountsOfAll()},
        {"envs": CountsOfAll(AutoresetMode.SAME_STEP)},
        {"envs": CountsOfTensors()},
    ],
    ids=["sync", "same-step", "grouped", "list", "vector", "vector same-step", "tensors"],
)
def test_means_over_the_episodes_that_ended(settings, tmp_path, capsys):
    """The value of an episode's last step; of 16 steps 3 episodes end, with resets within the step 4.

    is_success is there without being asked for, the rest only where asked for, and what is no number is told.
    """
    is_same = settings.get("autoreset", getattr(settings.get("envs"), "mode", None)) in ("same-step", AutoresetMode.SAME_STEP)
    asked = {"log_info": ("count", "text"), "check_env": False, "run_dir": str(tmp_path / "run")}
    train(TrainConfig(num_envs=2), **SHORT, **asked, **settings)
    first, second = rows_of(tmp_path / "run")
    counts = (1.5, 5.5) if is_same else (1.0, 4.0)  # episodes 0 to 3 and 4 to 7, or 0 to 2 and 3 to 5
    successes = (0.5, 0.5) if is_same else (2 / 3, 1 / 3)
    assert [float(row["info_count"]) for row in (first, second)] == pytest.approx(counts)
    assert [float(row["info_is_success"]) for row in (first, second)] == pytest.approx(successes)
    assert "info_other" not in first
    assert "info_text" not in first
    out = capsys.readouterr().out
    assert out.count("--log-info text: no such number in the info of the first episodes' last steps") == 1
    assert "is_success 0." in out


def test_infos_are_read_only_at_ends():
    """Nothing is gathered in other steps, nor names that were not asked for."""
    envs = NumberedVectorEnv([Counts, Counts], info_names=("count",))
    envs.reset(seed=0)
    infos = [envs.step(np.zeros(2, np.int64))[4] for _ in range(LENGTH + 2)]
    assert [sorted(info) for info in infos] == [[]] * (LENGTH - 1) + [["_count", "count"]] + [[], []]


@pytest.mark.parametrize(
    ("info", "numbers"),
    [
        ({"a": np.array([1, 2])}, [1.0, 2.0]),
        ({"a": np.array([True, False]), "_a": np.array([True, False])}, [1.0, np.nan]),
        ({"a": np.array([np.bool_(True), None], object)}, [1.0, np.nan]),
        ({"a": np.array(["x", 2.5], object)}, [np.nan, 2.5]),
        ({"a": np.array([[1.0], [2.0]])}, [1.0, 2.0]),
        ({"a": torch.tensor([1, 2])}, [1.0, 2.0]),
        ({"a": torch.tensor([1.0, 2.0]), "_a": np.array([False, True])}, [np.nan, 2.0]),
        ({"a": [1, 2.5]}, [1.0, 2.5]),
        ({"a": [[1], [1, 2]]}, None),
        ({"a": np.zeros(3)}, None),
        ({"a": np.zeros((2, 2))}, None),
        ({"a": 3.0}, None),
        ({"a": "ab"}, None),
        ({"b": np.zeros(2)}, None),
        ([{"a": 1}], None),
    ],
)
def test_numbers_in_an_info(info, numbers):
    """Arrays, tensors and objects of one number for each environment; anything else is left out."""
    found = numbers_in(info, ("a",), 2)
    assert (found == {}) == (numbers is None)
    if numbers is not None:
        np.testing.assert_array_equal(np.asarray(found["a"], float), numbers)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_vector_classes_of_several_seeds(mode):
    """Each seed has an instance of its own; their numbers are joined in the seeds' order."""
    envs = AutoresetEnvs(JoinedVectorEnv([CountsOfAll(mode), CountsOfAll(mode)], ("count",)), info_names=("count",))
    envs.reset([1, 2])
    for _ in range(LENGTH):
        step = envs.step(np.zeros(4, np.int64))
    np.testing.assert_array_equal(step.infos["count"], [0.0] * 4)


class TwoRanks:
    """Of two processes the first; the other one has ones where this one has zeros."""

    size = 2

    def gather(self, x, dim=0):
        return np.concatenate([x, np.ones_like(x)], dim)


def test_infos_of_several_processes():
    """Where one process has infos, all take part in the exchange, of every name that there may be."""
    none = np.zeros((3, 2), bool)
    outcomes = Outcomes(np.zeros((3, 2), np.float32), none, none, none, none, none[0])
    joined = global_outcomes(outcomes, TwoRanks(), ("a", "b"))
    assert sorted(joined.infos) == ["a", "b"]
    np.testing.assert_array_equal(joined.infos["a"], np.repeat([[np.nan, 1.0]], 3, 0).repeat(2, 1))
    assert joined.valid.shape == (3, 4)


def test_columns_that_come_later(tmp_path):
    """A new name gets a column, empty before; rows that a kill has cut are ignored; a resumed run has the columns too."""
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path)
    start = {"iteration": 1, "global_step": 8, "loss": 0.5}
    file.write(start)
    file.write(start | {"iteration": 2, "mine, too": 7.0})
    file.write(start | {"iteration": 3, "info_a": 1.0})
    file.close()
    rows = read_rows(path)
    assert [row["iteration"] for row in rows] == ["1", "2", "3"]
    assert [(row["mine, too"], row["info_a"]) for row in rows] == [("", ""), ("7.0", ""), ("", "1.0")]
    path.write_bytes(path.read_bytes()[:-1] + b"\r\n4,8,0.5,,2")  # would be 2.5
    assert len(read_rows(path)) == 3
    resumed = MetricsFile(path, resume_at=2)
    resumed.write(start | {"iteration": 3, "other": 3.0})
    resumed.close()
    last = [[row[name] for name in ("iteration", "mine, too", "info_a", "other")] for row in read_rows(path)]
    assert last == [["1", "", "", ""], ["2", "7.0", "", ""], ["3", "", "", "3.0"]]


def test_names_of_tags_and_of_several_seeds():
    """Tags are sorted by where a number comes from; a number of one seed is not lost in the joint row."""
    names = ("info_is_success", "mine", "rollout/mine", "episodic_return_0", "loss")
    assert [tag_of(name) for name in names] == [
        "info/is_success",
        "custom/mine",
        "rollout/mine",
        "charts/episodic_return_0",
        "losses/loss",
    ]
    assert joint_row([{"episodes": 1}, {"episodes": 2, "mine": 3.0}]) == {"episodes": 3, "mine": 3.0}


class Watch(Callback):
    """Records what it sees."""

    def __init__(self):
        self.steps, self.metrics, self.envs = [], [], []

    def on_step(self, run: View, step: StepView):
        self.steps.append((run.iteration, step.t, step.action.shape, float(step.reward.sum()), sorted(step.infos)))
        run.record("steps", len(self.steps))

    def on_iteration(self, run: View):
        self.envs.append(run.envs)
        if run.iteration == 2:
            run.record("rollout/second", np.float32(0.5))
            run.record("of_torch", torch.tensor(2.0))
        self.metrics.append(dict(run.metrics))

    def on_checkpoint(self, run: View):
        run.record("late", 1)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A run of three iterations with a checkpoint after each, the callback, and its directory."""
    watch, path = Watch(), tmp_path_factory.mktemp("watched") / "run"
    settings = SHORT | {"num_iterations": 3, "checkpoint_seconds": 0.0, "run_dir": str(path), "check_env": False}
    train(TrainConfig(num_envs=2), env_fn=Counts, callbacks=[watch], vectorization="sync", autoreset="next-step", **settings)
    return watch, path


def test_what_callbacks_record(watched):
    """In the row of the iteration, or of the next one after a checkpoint; elsewhere the column is empty. TensorBoard too."""
    watch, path = watched
    rows = rows_of(path)
    assert [row["steps"] for row in rows] == ["16.0", "32.0", "48.0"]
    assert [row["rollout/second"] for row in rows] == ["", "0.5", ""]
    assert [row["of_torch"] for row in rows] == ["", "2.0", ""]
    assert [row["late"] for row in rows] == ["", "1.0", "1.0"]
    assert watch.metrics[0]["steps"] == 16
    tags = EventAccumulator(str(path)).Reload().Tags()["scalars"]
    assert {"custom/steps", "info/is_success"} <= set(tags)
    assert all(isinstance(envs, NumberedVectorEnv) for envs in watch.envs)


def test_steps_are_watched(watched):
    """Every step, after it was made and before the update, with what the environments returned."""
    steps = watched[0].steps
    assert [step[:2] for step in steps] == [(iteration, t) for iteration in range(3) for t in range(16)]
    assert steps[0][2:] == ((2,), 2.0, [])
    assert steps[LENGTH - 1][2:] == ((2,), 2.0, ["is_success"])
    assert steps[LENGTH][3] == 0.0  # only resets


def test_without_on_step_nothing_is_called(monkeypatch, tmp_path):
    """Callbacks without `on_step` do not have a run call it."""

    def fail(*args):
        raise AssertionError

    monkeypatch.setattr(TrainingRun, "on_step", fail)
    settings = SHORT | {"num_iterations": 1, "run_dir": str(tmp_path / "run"), "check_env": False}
    train(TrainConfig(num_envs=2), envs=[Counts(), Counts()], callbacks=[Callback(), lambda run: None], **settings)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("loss", 1.0, "choose another name"),
        ("info_x", 1.0, "choose another name"),
        ("", 1.0, "choose another name"),
        ("a\nb", 1.0, "choose another name"),
        ("mine", "much", "takes a number, got a str"),
        ("mine", None, "takes a number, got a NoneType"),
    ],
)
def test_what_cannot_be_recorded(name, value, says):
    """Names of fastppo's own and values that are no numbers, with the name in the message."""
    from fastppo.training.callback_list import Recorded

    with pytest.raises(ValueError, match=says):
        Recorded().record(name, value)


def test_steps_that_cannot_be_watched(tmp_path):
    """On the device and with several seeds: told before anything is written. An error in on_step is a fault."""
    for settings, says in (
        ({"backend": "torch"}, "Watch.on_step: --backend torch steps environments in a program; use on_iteration"),
        ({"num_seeds": 2}, "Watch.on_step is for one seed: with --num-seeds 2 use on_iteration"),
    ):
        with pytest.raises(UsageError, match=says):
            train(TrainConfig(num_envs=2), callbacks=[Watch()], run_dir=str(tmp_path / "run"), **SHORT, **settings)
    assert not (tmp_path / "run").exists()

    class Fails(Callback):
        def on_step(self, run, step):
            if step.t == 3:
                raise KeyError("lost")

    with pytest.raises(TrainingFault, match=r"Fails.on_step raised KeyError"):
        train(TrainConfig(num_envs=2), envs=[Counts(), Counts()], callbacks=[Fails()], run_dir=str(tmp_path / "run"), **SHORT)
