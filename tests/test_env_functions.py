"""--env-id my_module:make_env: functions and classes without registration, from the command line and from Python."""

import contextlib
import importlib.util
import json
import re
import subprocess
import sys
import threading
from functools import partial

import gymnasium as gym
import pytest
from environments import Walk
from gymnasium.vector import VectorEnv

from fastppo import TrainConfig, UsageError, train
from fastppo.__main__ import console
from fastppo.analysis.evaluation import EvaluationPlan, evaluate_config
from fastppo.config import read_run_config
from fastppo.envs import grouped
from fastppo.envs.classic import CartPole
from fastppo.envs.device import TorchVectorEnv
from fastppo.envs.factory import EnvConfig, make_envs
from fastppo.envs.functions import env_id_of, naming
from fastppo.envs.preprocessing import parse_pairs
from fastppo.envs.registry import find_spec
from support.runs import tiny

FLAGS = ["--num-envs", "2", "--num-steps", "16", "--num-iterations", "2", "--eval-episodes", "1", "--compile", "off", "--plain"]
MODULE = """
import gymnasium as gym
import numpy as np
from environments import Walk
from gymnasium.vector import SyncVectorEnv

SIZE = 3
SEEN = []


class Pictured(Walk):
    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def render(self):
        return np.zeros((16, 16, 3), np.uint8)


class Outer:
    class Inner(Walk):
        pass


def make_env(limit=5):
    SEEN.append(limit)
    return gym.wrappers.TimeLimit(Walk(), limit)


def many(num_envs, limit=5):
    return SyncVectorEnv([lambda: make_env(limit)] * num_envs)


def nothing():
    pass


def text():
    return "an environment"


def fails():
    raise ValueError("the map is missing")


class Alone(Walk):
    OPEN = []

    def __init__(self):
        if self.OPEN:
            raise RuntimeError("one emulator in a process")
        self.OPEN.append(self)

    def close(self):
        self.OPEN.clear()


one = Walk()
gym.register("Registered", entry_point=Walk, max_episode_steps=3)


def Registered():
    raise AssertionError("the registered id comes first")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with some_env.py, which no test has on its path."""
    place = tmp_path_factory.mktemp("folder")
    (place / "some_env.py").write_text(MODULE)
    (place / "broken_env.py").write_text("import no_such_package\n")
    yield place
    sys.modules.pop("some_env", None)
    gym.registry.pop("Registered", None)


@pytest.fixture
def inside(folder, monkeypatch):
    """The working directory is that folder."""
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("name", ["make_env", "many", "Pictured", "Outer.Inner", "Registered"])
def test_a_run(name, inside, tmp_path, capsys):
    """It trains, is evaluated by its name and exported; --resume finds it too."""
    run_dir = str(tmp_path / "run")
    kwargs = ["--env-kwargs", "limit=4"] if name in ("make_env", "many") else []
    assert console(["train", "--env-id", f"some_env:{name}", "--run-dir", run_dir, *kwargs, *FLAGS]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["env_id"] == f"some_env:{name}"
    if kwargs:
        assert set(sys.modules["some_env"].SEEN[-2:]) == {4}
    assert console(["evaluate", run_dir, "--episodes", "2"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["episodes"] == 2
    assert console(["train", "--resume", run_dir, "--num-iterations", "3"]) == 0


@pytest.mark.parametrize(
    ("env_id", "message"),
    [
        ("some_env:mak_env", r"some_env \(.*some_env.py\) registers no environment 'mak_env' .*; nearest: make_env"),
        ("some_env:SIZE", "SIZE is of type int, not a function or class"),
        ("some_env:one", "one is one environment; name a function or class that makes one"),
        ("some_env:nothing", "it returned None, not a gymnasium Env"),
        ("some_env:text", "it returned a builtins.str, not a gymnasium Env"),
        ("some_env:fails", r"cannot be made: ValueError: the map is missing \(some_env.py:\d+\)"),
        ("some_env:Alone", r"one emulator in a process \(.*\); if only one can be made in a process: --num-envs 1"),
        ("some_envs:make_env", "neither installed nor in this folder; nearest: some_env, broken_env; start in the folder"),
        ("some_env.py:make_env", "'some_env.py' cannot be imported: write it with dots and without .py, as some_env"),
        ("./a/some_env.py:make_env", "as a.some_env"),
        (
            "stable-baselines3:Env-v0",
            "cannot be imported: the installed package stable-baselines3 is imported as stable_baselines3",
        ),
        ("broken_env:make_env", r"ModuleNotFoundError: No module named 'no_such_package' \(broken_env.py:1\)"),
    ],
)
def test_mistakes(env_id, message, inside, tmp_path, capsys):
    """One line, exit code 2, and nothing is written."""
    assert console(["train", "--env-id", env_id, "--run-dir", str(tmp_path / "run"), *FLAGS]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --env-id {env_id}")
    assert re.search(message, line)
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_the_folder_one_stands_in(folder, tmp_path):
    """The installed command finds its modules, after those that are installed; elsewhere it says what to do."""
    code = "import sys; from fastppo.__main__ import console; sys.exit(console(sys.argv[1:]))"  # as pip writes the command
    support = [path for path in sys.path if path.endswith("support")]
    command = [sys.executable, "-P", "-c", f"import sys; sys.path[:0] = {support}; {code}"]
    run_dir = str(tmp_path / "run")
    done = subprocess.run([*command, "train", "--env-id", "some_env:make_env", "--run-dir", run_dir, *FLAGS], cwd=folder)
    assert done.returncode == 0
    elsewhere = subprocess.run([*command, "evaluate", run_dir], cwd=tmp_path, capture_output=True, text=True)
    assert elsewhere.returncode == 2
    assert "module 'some_env' cannot be imported: it is neither installed nor in this folder" in elsewhere.stderr
    assert "start in the folder of some_env, or add that folder to PYTHONPATH" in elsewhere.stderr
    before = list(sys.path)
    console(["cache", "list"])
    assert sys.path == before


def test_a_function_that_takes_no_render_mode(inside, tmp_path, capsys):
    """It cannot be filmed, and the line says why; a class with a render mode can."""
    assert console(["train", "--env-id", "some_env:make_env", "--run-dir", str(tmp_path / "run"), *FLAGS]) == 0
    assert console(["evaluate", str(tmp_path / "run"), "--episodes", "1", "--video", "gif"]) == 2
    assert "some_env:make_env cannot be rendered: it has no render mode rgb_array" in capsys.readouterr().err
    assert console(["train", "--env-id", "some_env:Pictured", "--run-dir", str(tmp_path / "seen"), *FLAGS]) == 0
    assert console(["evaluate", str(tmp_path / "seen"), "--episodes", "1", "--video", "gif"]) == 0
    assert [path.suffix for path in (tmp_path / "seen" / "videos").iterdir()] == [".gif"]


def on_device(num_envs):
    """Environments on the device, without registration."""
    return TorchVectorEnv(CartPole(), num_envs)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_functions_of_tensors(backend):
    """A function of num_envs may make them; they stay on the device."""
    with contextlib.closing(make_envs(EnvConfig("test_env_functions:on_device", 3, backend=backend))) as envs:
        assert isinstance(envs, TorchVectorEnv)
        assert envs.num_envs == 3
    with pytest.raises(UsageError, match="--backend torch has no limited; it has: Acrobot-v1"):
        make_envs(EnvConfig("test_env_functions:limited", 3, backend="torch"))


# --- from Python


def limited(limit=3):
    """A function that can be imported."""
    return gym.wrappers.TimeLimit(Walk(), limit)


def test_a_function_with_a_name(tmp_path):
    """It is recorded as module:name, gets env_kwargs, and is evaluated without being given again."""
    result = train(tiny(tmp_path / "run", env_kwargs={"limit": 2}), env_fn=limited)
    assert result.summary["env_id"] == "test_env_functions:limited"
    assert find_spec("test_env_functions:limited").entry_point is not None
    config = read_run_config(tmp_path / "run")
    assert evaluate_config(result.policy, config, EvaluationPlan(3))["episodes"] == 3
    train(tiny(tmp_path / "run", env_kwargs={"limit": 2}, num_iterations=5, resume=str(tmp_path / "run")), env_fn=limited)


@pytest.mark.parametrize("function", [lambda: Walk(), partial(limited, 2), partial(limited, limit=4)])
def test_a_function_without_a_name(function, tmp_path):
    """It trains and is evaluated within `train`; later it has to be given again, and the error says so."""
    result = train(tiny(tmp_path / "run", eval_episodes=2), env_fn=function)
    assert result.summary["eval_episodes"] == 2
    config = read_run_config(tmp_path / "run")
    assert "<" in config.env_id
    with pytest.raises(UsageError, match=r"a function that cannot be imported: move it to a module, .* with env_fn"):
        evaluate_config(result.policy, config, EvaluationPlan(2))
    assert evaluate_config(result.policy, config, EvaluationPlan(2), env_fn=function)["episodes"] == 2


def configured(config):
    assert dict(size=1).update(config) is None
    return Walk()


def test_a_dict_that_has_lost_its_quotes():
    """What a shell leaves of config={"size":5} is a text: the error of the environment has the way to write it behind it."""
    env_id, quoted = "test_env_functions:configured", """'config={"name": 5}', with all quotes"""
    make_envs(EnvConfig(env_id, 2, "sync", env_kwargs=parse_pairs(['config={"size":5}'], "--env-kwargs"))).close()
    for text, hint in (("{size:5}", True), ("[size]", True), ("size", False)):
        with pytest.raises(UsageError, match="cannot be made: ValueError: dictionary update sequence") as caught:
            make_envs(EnvConfig(env_id, 2, "sync", env_kwargs=parse_pairs([f"config={text}"], "--env-kwargs")))
        assert str(caught.value).endswith(quoted) == hint


def test_names():
    """What cannot be imported is in angle brackets, and means something only within `naming`."""
    closure = (lambda: lambda: Walk())()
    assert env_id_of(Walk) == "environments:Walk"
    assert env_id_of(closure) == "test_env_functions:test_names.<locals>.<lambda>.<locals>.<lambda>"
    assert env_id_of(partial(limited)) == "functools:<partial>"
    with naming(closure) as outer:
        with naming(partial(closure)) as inner:
            assert inner != outer
        with naming(closure):
            pass
        envs = make_envs(EnvConfig(outer, 2))
        assert isinstance(envs, VectorEnv)
        envs.close()
    with pytest.raises(UsageError):
        find_spec(outer)


def test_one_thing_to_train_on(tmp_path):
    """Two that contradict each other are refused."""
    with pytest.raises(UsageError, match="envs and env_fn both say"):
        train(tiny(tmp_path / "run"), env_fn=limited, envs=gym.make_vec("CartPole-v1", 2))
    with pytest.raises(UsageError, match="env_id Acrobot-v1 and env_fn both say"):
        train(TrainConfig(env_id="Acrobot-v1"), env_fn=limited)


REGISTERS = """
import gymnasium as gym

CALLS = []


def register_envs({arguments}):
    CALLS.append(1)
    {body}
    gym.register("Late-v0", "environments:Walk")
"""


@pytest.mark.parametrize(
    ("arguments", "body", "message"),
    [
        ("", "", None),
        ("prefix=None", "", None),
        ("prefix", "", "'Late-v0' is not registered"),
        ("", "raise ValueError('no data')", r"register_envs\(\) of registers: ValueError: no data \(.*registers\.py:9\)"),
    ],
)
def test_a_module_that_registers_in_a_function(arguments, body, message, tmp_path, monkeypatch):
    """As bluesky-gym does; it is called once, and not for ids that are there already."""
    (tmp_path / "registers.py").write_text(REGISTERS.format(arguments=arguments, body=body))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "registers", raising=False)
    monkeypatch.delitem(gym.registry, "Late-v0", raising=False)
    if message is not None:
        with pytest.raises(UsageError, match=message):
            find_spec("registers:Late-v0")
        return
    try:
        assert find_spec("registers:Walk-v0").id == "Walk-v0"
        assert sys.modules["registers"].CALLS == []
        assert [find_spec("registers:Late-v0").id for _ in range(2)] == ["Late-v0"] * 2
        assert sys.modules["registers"].CALLS == [1]
    finally:
        del gym.registry["Late-v0"]


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        (
            "def make(game, state=None): ...",
            "; or does retro_like.make know it? --env-id retro_like:make --env-kwargs game=Sonic-v0",
        ),
        ("from gymnasium import make", ""),
        ("make = 3", ""),
    ],
)
def test_a_module_with_a_function_make(source, hint, tmp_path, monkeypatch):
    """As stable_retro, whose games are in no registry: the error names the flags that make one."""
    (tmp_path / "retro_like.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "retro_like", raising=False)
    with pytest.raises(UsageError, match=re.escape(hint) + "$") as caught:
        find_spec("retro_like:Sonic-v0")
    assert ("retro_like.make" in str(caught.value)) == bool(hint)


@pytest.mark.parametrize(
    ("init", "parts", "hint"),
    [
        ("", {"envs": "register(id='Other-v0')", "wrap": 'register("Late-v0")'}, "wrap"),
        ("", {"envs": "register(id='Other-v0')"}, "envs"),
        ("", {"envs": "registered = 1"}, None),
        ("import parted.envs", {"envs": "register = print\nregister('Late-v0')"}, None),
    ],
)
def test_an_id_that_a_part_of_the_package_registers(init, parts, hint, tmp_path, monkeypatch):
    """As vizdoom.gymnasium_wrapper: the error has the --env-id that works, and hints at no part that has been imported."""
    (tmp_path / "parted").mkdir()
    for name, source in {"__init__": init, **parts}.items():
        (tmp_path / "parted" / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("parted", "parted.envs", "parted.wrap"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    said = f"; or does parted.{hint} register it? --env-id parted.{hint}:Late-v0" if hint else ""
    with pytest.raises(UsageError) as caught:
        find_spec("parted:Late-v0")
    assert str(caught.value).partition("; or")[1:] == said.partition("; or")[1:]


@pytest.mark.parametrize("source", ["try:\n  import gym\nexcept ImportError:\n  pass", "import gymnasium as gym"])
def test_a_module_that_registers_in_gym_only_if_it_is_there(source, tmp_path, monkeypatch):
    """As crafter does: without gym the error says what to install; not for a module of gymnasium."""
    (tmp_path / "old_one.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "old_one", raising=False)
    monkeypatch.delitem(sys.modules, "gym", raising=False)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gym" else find(name, *rest))
    with pytest.raises(UsageError) as caught:
        find_spec("old_one:Late-v0")
    hint = "old_one registers in OpenAI's gym, which is not installed: pip install gym 'fastppo[gym]'"
    assert (hint in str(caught.value)) == ("try" in source)


def test_what_cannot_be_sent_to_a_process(monkeypatch):
    """Where processes are not forked, a function that holds a lock cannot go there: one line."""
    monkeypatch.setattr(grouped, "START_METHOD", "spawn")
    lock = threading.Lock()

    def locked():
        assert not lock.locked()
        return Walk()

    with naming(locked) as env_id, pytest.raises(UsageError) as raised:
        make_envs(EnvConfig(env_id, 2, "async"))
    (line,) = str(raised.value).splitlines()
    assert "to which its function or --env-kwargs cannot be sent: TypeError: cannot pickle" in line
    assert line.endswith("use --vectorization sync")
