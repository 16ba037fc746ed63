"""What `train` may be given: settings, environments and callbacks in every form that people try."""

import re

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete

from fastppo import Callback, TrainConfig, UsageError, View, evaluate, preset_for, train
from fastppo.callbacks import checked_callbacks
from fastppo.env_objects import with_objects
from fastppo.training.arguments import arguments, vector_of, with_number

SHORT = {"num_iterations": 1, "num_steps": 16, "num_envs": 2, "eval_episodes": 0, "compile": "off", "check_env": False}


def settings_of(config=None, envs=None, env_fn=None, **settings):
    with arguments(config, envs, env_fn, settings) as (chosen, _):
        return chosen


class Count(gym.Env):
    """Five steps, then the end."""

    observation_space = Box(0, 5, (1,), np.float32)
    action_space = Discrete(2)
    steps = 0
    closed = False

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.steps += 1
        return np.array([self.steps], np.float32), float(action), self.steps == 5, False, {}

    def close(self):
        self.closed = True


def test_settings_start_from_the_preset_of_an_env_id():
    """An env_id, positional or by name, is trained as the command line would; a TrainConfig is taken as it is."""
    lander = preset_for("LunarLander-v3")
    assert lander.num_envs == 16
    assert settings_of("LunarLander-v3") == lander
    assert settings_of(env_id="LunarLander-v3", seed=3) == preset_for("LunarLander-v3", seed=3)
    assert settings_of(preset="LunarLander", gamma=0.9) == preset_for("LunarLander-v3", gamma=0.9)
    assert settings_of() == preset_for("CartPole-v1")
    config = TrainConfig(env_id="LunarLander-v3", num_envs=4)
    assert settings_of(config) is not None
    assert settings_of(config) == config
    assert settings_of(config, gamma=0.9, num_iterations=3) == TrainConfig(
        env_id="LunarLander-v3", num_envs=4, gamma=0.9, num_iterations=3
    )
    assert preset_for("Acrobot-v1", minibatch_size=64).minibatch_size == 64  # in the place of the preset's num_minibatches


def test_a_presets_name_without_its_settings():
    """TrainConfig takes the environment first. It does not look a preset up, and says what does."""
    assert TrainConfig("LunarLander-v3") == TrainConfig(env_id="LunarLander-v3")
    for config, says in (
        (lambda: TrainConfig(preset="LunarLander", seed=3), r'use preset_for\(preset="LunarLander"\)'),
        (lambda: TrainConfig("Ant-v5", "mujoco"), r'use preset_for\("Ant-v5", preset="mujoco"\)'),
        (lambda: settings_of(TrainConfig("LunarLander-v3"), preset="box2d"), 'preset="box2d"'),
    ):
        with pytest.raises(UsageError, match=says):
            config()
    assert preset_for("Ant-v5", preset="mujoco").norm_obs
    assert TrainConfig(preset="classic") == preset_for(preset="classic")  # has no settings of its own
    assert TrainConfig(preset="LunarLander", learning_rate=3e-4).num_envs == 8  # one of them is enough: flags override the rest


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"total_timestep": 1}, "there is no setting 'total_timestep'.*total_timesteps"),
        ({"gamma": 2.0}, "gamma must be"),
        ({"preset": "LunarLandr"}, "nearest: LunarLander"),
        ({"config": "CartPole-v1", "env_id": "Acrobot-v1"}, "both say what to train on"),
        ({"config": 3}, "config must be a TrainConfig or an env_id, got a int"),
        ({"config": Count()}, "environments go to envs"),
        ({"envs": [Count(), 3]}, "got a list with something else in it"),
        ({"envs": []}, "envs must be a gymnasium Env"),
        ({"envs": Count(), "env_fn": Count}, "both say what to train on"),
        ({"config": "CartPole-v1", "env_fn": Count}, "both say what to train on"),
        ({"num_envs": 2, "total_timesteps": 3, "num_iterations": 4}, "set the same thing"),
    ],
)
def test_wrong_arguments(given, says):
    """One line that names the argument, before anything is written."""
    with pytest.raises(UsageError, match=says):
        settings_of(**given)


def test_one_environment_and_lists():
    """One Env, a list, a vector environment; the number of environments is theirs, and a rollout keeps its size."""
    one = vector_of(Count())
    assert one.num_envs == 1
    three = vector_of([Count() for _ in range(3)])
    assert three.num_envs == 3
    made = gym.make_vec("CartPole-v1", num_envs=2)
    assert vector_of(made) is made
    with pytest.raises(UsageError, match="twice"):
        vector_of([Count()] * 2)
    with pytest.raises(UsageError, match="do not fit together"):
        vector_of([Count(), gym.make("CartPole-v1")])
    config = settings_of(envs=one)
    assert (config.num_envs, config.batch_size) == (1, TrainConfig().batch_size)
    config = settings_of(envs=three, num_steps=20)
    assert (config.num_envs, config.num_steps, config.env_id) == (3, 20, "Count")
    acrobot = settings_of(envs=gym.make("Acrobot-v1"))
    assert (acrobot.preset, acrobot.num_envs, acrobot.batch_size) == ("Acrobot", 1, preset_for("Acrobot-v1").batch_size)


@pytest.mark.parametrize("num_envs", [1, 3, 5, 7, 48])
def test_rollouts_of_another_number_of_environments(num_envs):
    """They have about as many rows, and the minibatches divide them."""
    start = preset_for("LunarLander-v3")  # 16 x 1024 rows in 256 minibatches
    config = with_number(start, num_envs)
    assert config.batch_size % config.minibatches_per_epoch == 0
    assert config.batch_size == pytest.approx(start.batch_size, rel=0.15)


def test_training_on_what_was_given(tmp_path):
    """An Env, a list of them, a class and a function train; given ones are left open; a function is a callback."""
    env, seen = Count(), []

    def watch(run: View) -> bool:
        seen.append(repr(run))
        return True

    result = train(envs=env, run_dir=str(tmp_path / "one"), callbacks=[watch], **SHORT | {"num_envs": 1, "num_iterations": 9})
    assert not env.closed
    assert re.fullmatch(
        rf"\[<one: iteration 1, step {result.summary['global_step']}, 11%, return [0-5.]+>\]", str(seen).replace("'", "")
    )
    train(envs=[Count(), Count()], run_dir=str(tmp_path / "two"), **SHORT)
    train(envs=Count, run_dir=str(tmp_path / "class"), **SHORT)
    train(envs=lambda: Count(), run_dir=str(tmp_path / "function"), **SHORT)
    names = {path.name: TrainConfig.from_json(path / "config.json").env_id for path in tmp_path.iterdir()}
    assert names["one"] == names["two"] == "Count"
    assert names["class"].endswith("test_arguments:Count")
    assert "<" in names["function"]


class Table:
    """Stands for a DataFrame: JSON cannot hold it."""

    def __init__(self, length):
        self.length = length


def three() -> int:
    return 3


class Rows(Count):
    """An environment that takes a table and a function."""

    def __init__(self, table, function, size=1):
        assert isinstance(table, Table)
        assert callable(function)
        self.number = table.length + function() + size


def test_objects_as_arguments_of_the_environment(tmp_path):
    """env_kwargs take any object. A function is recorded by its name, and found again; a table has to be given again."""
    run = str(tmp_path / "run")
    settings = SHORT | {"run_dir": run, "env_fn": Rows}
    train(env_kwargs={"table": Table(2), "function": three, "size": np.int64(4)}, **settings | {"eval_episodes": 1})
    config = TrainConfig.from_json(tmp_path / "run" / "config.json")
    assert with_objects({"task": {"object": "cube"}, "list": [1]}) == {"task": {"object": "cube"}, "list": [1]}
    assert config.env_kwargs == {
        "table": {"__object__": None, "type": "Table"},
        "function": {"__object__": "test_arguments:three"},
        "size": 4,
    }
    with pytest.raises(UsageError, match=r"--env-kwargs table was a Table in Python.*evaluate\(run, envs=lambda: MyEnv"):
        evaluate(run, 1, verbose=False)
    assert evaluate(run, 1, envs=lambda: Rows(Table(1), three), verbose=False)["episodes"] == 1
    again = train(resume=run, num_iterations=2, env_kwargs={"table": Table(3), "function": three, "size": 4}, eval_episodes=0)
    assert again.summary["iterations"] == 2
    with pytest.raises(UsageError, match="table was a Table"):
        train(resume=run, num_iterations=3)
    with pytest.raises(UsageError, match="env-kwargs must be names with values"):
        settings_of(env_kwargs={1: three})


def test_functions_as_arguments_are_imported_again(tmp_path):
    """Where all objects have names, evaluation needs nothing."""

    run = str(tmp_path / "run")
    train(env_fn=Named, env_kwargs={"function": three}, run_dir=run, **SHORT)
    assert evaluate(run, 1, verbose=False)["episodes"] == 1
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace("test_arguments:three", "test_arguments:thre"))
    with pytest.raises(UsageError, match=r"--env-kwargs function test_arguments:thre: .*nearest: three"):
        evaluate(run, 1, verbose=False)


class Named(Count):
    def __init__(self, function):
        assert function is three


def test_wrong_callbacks():
    """Told before the first iteration, with what to give instead."""

    class Mine(Callback):
        pass

    for given, says in (
        ([Mine], r"give an object, Mine\(\)"),
        ([3], "holds a int"),
        (Mine(), "must be a list"),
        (print, "must be a list"),
    ):
        with pytest.raises(UsageError, match=says):
            checked_callbacks(given)
    one = Mine()
    assert checked_callbacks([one]) == (one,)
