"""Rollouts by `collect`: those of stepping by hand, compiled those of eager; what is compiled for whom; runs with it."""

import csv
import dataclasses
import functools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from environments import TAXI
from gymnasium.spaces import Box
from torch.utils._pytree import tree_leaves

from fastppo import TrainConfig, train
from fastppo.compile import inductor, native
from fastppo.compile.inductor import BackgroundCompile, CompileError, cache_key, compile_program
from fastppo.core.acting import act
from fastppo.core.contracts import CollectResult
from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.envs.classic import CartPole, MountainCarContinuous, Pendulum
from fastppo.envs.device import TorchVectorEnv
from fastppo.envs.factory import EnvConfig, make_envs
from fastppo.evaluate import console as evaluate_console
from fastppo.rollout.collector import start_collector
from fastppo.rollout.step_collector import TensorCollector
from fastppo.train import console
from support.device_envs import CPU, N, T, setup
from support.pages import command_in, python_in, section

KEYS = ("obs", "action", "reward", "terminated", "truncated", "valid")


@dataclasses.dataclass(frozen=True)
class Spoilt(Pendulum):
    """A pendulum with a constant tensor in its step, whose reward is not finite beyond 1000 rad, where only tests put it."""

    WIND: ClassVar[torch.Tensor] = torch.tensor([0.25, 0.5])
    worst: float = float("-inf")

    def step(self, state, action, random):
        state, obs, reward, terminated, truncated = super().step(state, action + self.WIND[1] * random[:, :1], random)
        return state, obs, torch.where(state.theta > 1000.0, self.worst, reward - self.WIND[0]), terminated, truncated


gym.register("Pushed-v0", vector_entry_point=lambda num_envs, **kwargs: TorchVectorEnv(Spoilt(**kwargs), num_envs))


@dataclasses.dataclass(frozen=True)
class Faulty:
    """Counts its steps and never ends; in the 41st, `what` of environment 2 is not finite."""

    what: str = "reward"
    max_episode_steps: ClassVar[None] = None
    num_random: ClassVar[int] = 1
    observation_space: ClassVar[gym.Space] = Box(-np.inf, np.inf, (1,), np.float32)
    action_space: ClassVar[gym.Space] = Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, random):
        return torch.zeros_like(random[:, 0]), torch.zeros_like(random)

    def step(self, state, action, random):
        state = state + 1.0
        bad = (state == 41.0) & (torch.arange(len(state), device=state.device) == 2)
        reward = state.masked_fill(bad, float("nan")) if self.what == "reward" else state
        obs = state.masked_fill(bad, float("inf")) if self.what == "obs" else state
        going_on = torch.zeros_like(bad)
        return state, obs.unsqueeze(-1), reward, going_on, going_on


gym.register("Faulty-v0", vector_entry_point=lambda num_envs, **kwargs: TorchVectorEnv(Faulty(**kwargs), num_envs))


# --- eager


@pytest.mark.parametrize("norm_obs", [False, True], ids=["raw", "norm_obs"])
@pytest.mark.parametrize(
    ("env", "squash"),
    [
        (CartPole(max_episode_steps=7), False),
        (CartPole(max_episode_steps=20), False),
        (Pendulum(max_episode_steps=7), False),
        (Pendulum(max_episode_steps=7), True),
        (MountainCarContinuous(max_episode_steps=4), False),
    ],
    ids=["CartPole 7", "CartPole 20", "Pendulum clipped", "Pendulum squashed", "MountainCarContinuous"],
)
def test_collect_is_stepping_by_hand(env, squash, norm_obs):
    """Every row, the bootstrap's too, and the environments' state after each of six rollouts, from the same random numbers.

    Ends lie inside the rollouts and on their borders; a row is a transition unless the one before it ended an episode.
    """
    ours, twin = setup(env, squash, norm_obs), setup(env, squash, norm_obs)
    rollout = ours.rollout()
    collector = start_collector(AutoresetEnvs(ours.envs), rollout, ours.obs, ours.spec, seed=7)
    obs, _ = twin.envs.reset(seed=7)
    done = torch.zeros(N, dtype=torch.bool)
    ends = dict.fromkeys(("terminated", "truncated", "last row", "clipped"), 0)
    for number in range(6):
        noise = ours.noise(number)
        collector.collect(functools.partial(ours.program(), ours.params, ours.normalization), noise)
        for t in range(T):
            action = act(twin.policy, twin.policy.weights(twin.params), twin.normalization, obs, noise[t])
            expected = {"obs": obs, "action": action, "valid": ~done}
            obs, *result, _ = twin.envs.step(twin.spec.to_env(action))
            expected |= dict(zip(("reward", "terminated", "truncated"), result, strict=True))
            for key in KEYS:
                assert torch.equal(rollout[key][t], expected[key]), (number, t, key)
            done = expected["terminated"] | expected["truncated"]
            for key in ("terminated", "truncated"):
                ends[key] += int(expected[key].sum())
            ends["clipped"] += int(action.abs().gt(twin.spec.high).sum()) if twin.spec.low.numel() else 0
        ends["last row"] += int(done.sum())
        assert torch.equal(rollout["obs"][T], obs)
        assert torch.equal(rollout["valid"][T], ~done)
        for one, other in zip(tree_leaves(ours.envs.running), tree_leaves(twin.envs.running), strict=True):
            assert torch.equal(one, other)
    assert ends["truncated"] > 0
    assert ends["last row"] > 0
    assert (ends["terminated"] > 0) == (env == CartPole(max_episode_steps=20))  # 7 steps are too few for a pole to fall
    assert (ends["clipped"] > 0) == (twin.spec.low.numel() > 0)


def test_cut_episodes_end_and_begin_anew():
    """`cut` tells the last row as truncated, where it is a transition that did not terminate; `reset` starts all anew."""
    ours = setup(CartPole(max_episode_steps=T))  # truncated in the last row anyway, but for those that fell before
    rollout = ours.rollout()
    collector = start_collector(AutoresetEnvs(ours.envs), rollout, ours.obs, ours.spec, seed=7)
    ours.envs.running = ours.envs.running._replace(done=torch.arange(N) == 1)  # one has just ended: one step behind the others
    run = functools.partial(ours.program(), ours.params, ours.normalization)
    collector.collect(run, ours.noise(0), cut=False)
    before = rollout["truncated"][T - 1].clone()
    ours.envs.reset(seed=7)
    ours.envs.running = ours.envs.running._replace(done=torch.arange(N) == 1)
    collector.collect(run, ours.noise(0), cut=True)
    assert before.tolist() == [index != 1 for index in range(N)]
    assert rollout["truncated"][T - 1].all()
    collector.reset(None)
    collector.collect(run, ours.noise(0))
    assert rollout["valid"][0].all()
    assert not rollout["terminated"][0].any()


@pytest.mark.parametrize("where", ["reward", "first obs", "last obs", "nothing"])
def test_finite_is_false_where_a_number_is_not(where):
    """nan and inf in a reward, in an observation acted on, and in the bootstrap's: none of them goes into an update."""
    ours = setup(Faulty("reward" if where == "reward" else "obs"))
    params, normalization, (obs, done, elapsed, count), noise, random = ours.arguments()
    count = count + {"reward": 35, "last obs": 41 - T}.get(where, 0)  # the 41st step comes within the rollout, or ends it
    if where == "first obs":
        obs = obs.index_fill(0, torch.tensor([4]), float("nan"))
    collected = ours.program()(params, normalization, (obs, done, elapsed, count), noise, random)
    assert bool(collected.finite) == (where == "nothing")
    assert collected.reward.isfinite().all() == (where != "reward")  # each is seen by itself
    assert collected.obs.isfinite().all() == (where != "first obs")


# --- compiled


def assert_same(result, expected):
    """Ends and row masks exactly, floats as float32 has them after a rollout."""
    assert torch.equal(result.finite, expected.finite)
    for key in ("terminated", "truncated", "valid"):
        assert torch.equal(getattr(result, key), getattr(expected, key)), key
    for key in ("obs", "action", "reward"):
        torch.testing.assert_close(getattr(result, key), getattr(expected, key), rtol=1e-4, atol=1e-4)
    for one, other in zip(result.running, expected.running, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def over_rollouts(ours, compiled):
    """Five rollouts of both, each from where eager left off: rounding does not add up."""
    for number in range(5):
        arguments = ours.arguments(number)
        expected = ours.program()(*arguments)
        result = compiled(*arguments)
        assert expected.finite
        yield result, expected
        ours.envs.running = ours.program().keywords["env_step"].unpack(expected.running)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    torch.set_num_threads(1)
    cache_dir = tmp_path_factory.mktemp("cache")
    cache_dir.chmod(0o700)
    return cache_dir


@pytest.mark.slow  # a quarter of a minute of compiling: below two workers are compiled, and this one's graph is compared
@pytest.mark.usefixtures("needs_compiler")
def test_compiled_collect_equals_eager(cache_dir):
    """One worker, discrete actions, normalised observations: the same actions, ends and transitions, rollout after rollout."""
    ours = setup(CartPole(max_episode_steps=15), norm_obs=True)
    compiled = compile_program(ours.program(), ours.arguments(), cache_dir)
    ended = 0
    for result, expected in over_rollouts(ours, compiled):
        assert_same(result, expected)
        assert torch.equal(result.action, expected.action)
        ended += int((expected.terminated | expected.truncated).sum())
    assert ended > N


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("squash", [False, True], ids=["clipped", "squashed"])
@pytest.mark.parametrize("env", [Pendulum(max_episode_steps=7), MountainCarContinuous(), Spoilt(g=9.0)], ids=repr)
def test_traced_collect_equals_eager(env, squash):
    """Bounds of actions and an environment's own constants are part of the graph that the compiler is given."""
    ours = setup(env, squash)
    arguments = ours.arguments()
    graph, _ = inductor._trace(ours.program(), arguments)
    results, expected = graph(*inductor._tensors(arguments)), ours.program()(*arguments)
    rows = len(expected.running)
    assert_same(CollectResult(tuple(results[:rows]), *results[rows:]), expected)


def test_traced_collect_of_choices_equals_eager():
    """Discrete actions, normalised observations."""
    ours = setup(CartPole(max_episode_steps=2), norm_obs=True)
    arguments = ours.arguments()
    graph, _ = inductor._trace(ours.program(), arguments)
    results, expected = graph(*inductor._tensors(arguments)), ours.program()(*arguments)
    rows = len(expected.running)
    assert_same(CollectResult(tuple(results[:rows]), *results[rows:]), expected)
    assert torch.equal(CollectResult(tuple(results[:rows]), *results[rows:]).action, expected.action)
    assert expected.truncated.any()


@pytest.mark.usefixtures("needs_compiler")
def test_two_compiled_workers_equal_eager(cache_dir):
    """Each steps half of the environments: bounds and a constant of the environment are tensors of the graph.

    A number that is not finite is seen whichever worker it comes to.
    """
    ours = setup(Spoilt(max_episode_steps=7), squash=True)
    compiled = compile_program(ours.program(num_workers=2), ours.arguments(), cache_dir)
    for result, expected in over_rollouts(ours, compiled):
        assert_same(result, expected)
        assert (expected.truncated.any(0)).all()
    ours.envs.reset(seed=0)  # no episode has just ended
    arguments = ours.arguments()
    for index in (0, N - 1):
        theta = arguments[2][3].index_fill(0, torch.tensor([index]), 2000.0)
        running = (*arguments[2][:3], theta, *arguments[2][4:])
        assert not ours.program()(*arguments[:2], running, *arguments[3:]).finite
        assert not compiled(*arguments[:2], running, *arguments[3:]).finite


# --- the key under which a program is kept


ROOM = """
import dataclasses, functools, torch
from fastppo.compile.inductor import BackgroundCompile, CompileError, cache_key, load_program
from fastppo.core.acting import collect
from fastppo.core.contracts import Normalization
from fastppo.envs.classic import CartPole
from fastppo.envs.device import TorchVectorEnv
from fastppo.policy.mlp import MLPActorCritic
from fastppo.policy.spaces import action_spec, obs_spec
from fastppo.rollout.env_step import env_step_of, pack

OFFSET = 1.0

@dataclasses.dataclass(frozen=True)
class Room(CartPole):
    slope = 2.0

    def reset(self, random):
        state, obs = super().reset(random)
        return state, obs * table

    def step(self, state, action, random):
        state, obs, reward, terminated, truncated = super().step(state, action, random)
        return state, obs * table, self.slope * reward + OFFSET, terminated, truncated

table = torch.linspace(1.0, 2.0, 4)

def job(env):
    torch.set_num_threads(1)
    envs = TorchVectorEnv(env, 4)
    envs.reset(seed=1)
    spec = action_spec(env.action_space, False)
    policy = MLPActorCritic(4, 2, spec.distribution, (8,))
    params = policy.init(torch.Generator().manual_seed(1))
    normalization = Normalization(None, None, None, torch.zeros(()), torch.ones(()))
    example = (params, normalization, pack(envs.running), torch.zeros(3, 4, 2), envs.draw(3))
    return functools.partial(collect, policy=policy, env_step=env_step_of(envs, spec)), example
"""


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A module of somebody's own with an environment, and what makes a program of it."""
    (tmp_path / "room.py").write_text(ROOM)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "room", raising=False)
    import room

    yield room
    del sys.modules["room"]


def in_a_process(script, folder, *args):
    """stdout of a Python process that starts in `folder`."""
    command = [sys.executable, "-c", script, *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_an_environment_computes_is_in_the_key(room, monkeypatch):
    """A class attribute, a global of its module, a tensor it closes over, a field: another program each; else the same.

    A stale program from the cache would train on an environment that is not there any more.
    """
    key = cache_key(*room.job(room.Room()))
    assert cache_key(*room.job(room.Room())) == key
    others = [cache_key(*room.job(room.Room(max_episode_steps=9)))]
    for owner, name, value in (
        (room.Room, "slope", 2.5),
        (room, "OFFSET", 1.5),
        (room, "table", torch.linspace(1.0, 2.5, 4)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            others.append(cache_key(*room.job(room.Room())))
    assert len({key, *others}) == 5
    assert cache_key(*room.job(room.Room())) == key
    script = "import room; print(room.cache_key(*room.job(room.Room())))"
    assert in_a_process(script, Path(room.__file__).parent).strip() == key


def test_ours_are_known_by_their_files(room):
    """Environments of fastppo are not traced for their key (that takes a second): the files of their folder are in it."""
    ours = room.job(CartPole())[0].keywords["env_step"].sources()
    assert {path.name for path in ours} >= {"env_step.py", "classic.py", "device.py"}
    assert room.job(room.Room())[0].keywords["env_step"].sources() is None
    assert cache_key(*room.job(CartPole())) != cache_key(*room.job(CartPole(sutton_barto_reward=True)))


IN_A_SCRIPT = """
import sys, time, pathlib
from fastppo.compile.selector import TRIAL_ITERATIONS, ProgramSelector, ProgramSpec

def hidden():
    class Hidden(Room):
        pass
    return Hidden()

for env in (Room(), hidden()):
    program, example = job(env)
    assert cache_key(program, example) == cache_key(program, example)
    notes = []
    both = ProgramSpec(program, program, example)
    tiers = ProgramSelector("auto", {"learn": both, "collect": both}, 1, notes.append)
    deadline = time.monotonic() + 600
    while not any("failed" in note for note in notes) and time.monotonic() < deadline:
        tiers.update(TRIAL_ITERATIONS, 1e6)
        time.sleep(0.05)
    assert tiers.act(example[1])(*example[2:]).finite  # eager goes on
    tiers.close()
    print(tiers.name, notes[-1])
"""


@pytest.mark.usefixtures("needs_compiler")
def test_an_environment_of_a_script_is_not_compiled_in_the_background(tmp_path):
    """A class of `__main__`, which may have no file, or inside a function: one line says what to do, and eager goes on."""
    lines = in_a_process(ROOM + IN_A_SCRIPT, tmp_path).splitlines()
    assert len(lines) == 2, lines
    for line in lines:
        assert line.startswith("eager programs: eager, since compiling failed: another process cannot have this program (")
        assert line.endswith("put what is yours into a module, or use --compile on")
        assert "Room" in line or "Hidden" in line


def test_the_background_process_finds_what_this_one_finds(room, tmp_path, monkeypatch):
    """A module beside a user's script is on this process's path only; the other one gets so far as to miss a compiler."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    building = BackgroundCompile(*room.job(room.Room()), tmp_path / "cache")
    building._process.wait(timeout=600)
    with pytest.raises(CompileError, match=r"^there is no C\+\+ compiler"):
        building.poll()


# --- runs

TINY = ["--num-envs", "4", "--num-steps", "32", "--num-iterations", "3", "--eval-episodes", "4", "--plain"]
ON_DEVICE = [*TINY, "--backend", "torch", "--compile", "off"]
TIMES = {"seconds", "sps", "env_share", "act_share", "learn_share"}


def rows_of(run_dir):
    with (Path(run_dir) / "metrics.csv").open(newline="") as file:
        return [{key: value for key, value in row.items() if key not in TIMES} for row in csv.DictReader(file)]


def summary_of(run_dir):
    return json.loads((Path(run_dir) / "summary.json").read_text())


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_a_run_resumed_and_evaluated(env_id, tmp_path, capsys):
    """From the command line: what the run says of itself, two equal runs, its continuation, its evaluation."""
    runs = [tmp_path / "one", tmp_path / "two"]
    for run_dir in runs:
        assert console([*ON_DEVICE, "--env-id", env_id, "--run-dir", str(run_dir)]) == 0
        assert f"{env_id}: 4 environments, torch (as --backend torch asks)" in capsys.readouterr().out
    assert rows_of(runs[0]) == rows_of(runs[1])
    summary = summary_of(runs[0])
    assert (summary["backend"], summary["tier"]) == ("torch", "eager")
    assert summary["eval_episodes"] == 4
    assert summary["global_step"] == int(rows_of(runs[0])[-1]["global_step"])

    assert console(["--resume", str(runs[0]), "--num-iterations", "5"]) == 0
    assert "the environments go on where they were" in capsys.readouterr().out
    rows = rows_of(runs[0])
    assert [row["iteration"] for row in rows] == ["1", "2", "3", "4", "5"]
    assert rows[:3] == rows_of(runs[1])
    assert evaluate_console([str(runs[0]), "--episodes", "3"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["episodes"] == 3


def test_both_engines_make_the_same_run(tmp_path):
    """An environment registered as a TorchVectorEnv: --backend auto collects on the device, gymnasium steps it from Python.

    Equal metrics, episode statistics included: the collectors differ in speed only.
    """
    settings = {"env_id": "Pushed-v0", "env_kwargs": {"max_episode_steps": 20}, "num_envs": 4, "num_steps": 32}
    settings |= {
        "num_iterations": 3,
        "eval_episodes": 2,
        "compile": "off",
        "plain": True,
        "norm_obs": True,
        "norm_reward": True,
    }
    runs = {}
    for backend in ("auto", "torch", "gymnasium"):
        result = train(TrainConfig(backend=backend, run_dir=str(tmp_path / backend), **settings))
        runs[backend] = (rows_of(result.run_dir), result.summary["eval_return_mean"])
        assert result.summary["backend"] == ("gymnasium/entry-point" if backend == "gymnasium" else "torch")
    assert runs["auto"] == runs["torch"] == runs["gymnasium"]


def test_gymnasiums_engine_steps_from_python():
    """--backend gymnasium gives a TensorCollector even for a class that could be collected on the device."""
    envs = AutoresetEnvs(make_envs(EnvConfig("Pushed-v0", N, backend="gymnasium"), CPU))
    ours = setup(Spoilt())
    assert isinstance(start_collector(envs, ours.rollout(), ours.obs, ours.spec, seed=0), TensorCollector)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--backend", "torch", "--env-id", "CartPole-v9"], ["--env-id 'CartPole-v9'", "CartPole-v1"]),
        (["--backend", "torch", "--env-id", "Taxi-v9"], ["--env-id 'Taxi-v9'", TAXI]),
        (["--backend", "torch", "--env-id", TAXI], [f"--backend torch has no {TAXI}", "CartPole-v1", "environments.md"]),
        (
            ["--backend", "torch", "--env-id", "LunarLander-v3"],
            ["--backend torch has no LunarLander-v3", "CartPole-v1", "environments.md"],
        ),
        (["--backend", "nonsense"], ["--backend", "nonsense", "auto", "gymnasium", "torch"]),
        (["--backend", "torch", "--vectorization", "sync"], ["--vectorization sync", "--backend gymnasium"]),
        (["--backend", "torch", "--env-kwargs", "gravity=3"], ["--env-kwargs", "gravity"]),
        (["--backend", "torch", "--env-kwargs", "max_episode_steps=0"], ["max_episode_steps", "from 1 on"]),
    ],
    ids=lambda value: " ".join(value[1:]) if value[0].startswith("--") else "",
)
def test_wrong_use(flags, named, tmp_path, monkeypatch, capsys):
    """Exit code 2, one or two lines with the flag and the right values, nothing written."""
    monkeypatch.chdir(tmp_path)
    assert console(flags) == 2
    error = capsys.readouterr().err
    assert 1 <= len(error.splitlines()) <= 2, error
    for word in named:
        assert word in error, error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["reward", "obs"])
def test_a_number_that_is_not_finite_ends_the_run(what, tmp_path, capsys):
    """Exit code 3; key, environment and step (the 41st is step 8 of the second rollout of 32), and the checkpoint before it."""
    run_dir = tmp_path / "run"
    flags = ["--env-id", "Faulty-v0", "--env-kwargs", f"what={what}", "--run-dir", str(run_dir)]
    assert console([*ON_DEVICE, *flags]) == 3
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 2, error
    how = {"reward": "not finite (nan)", "obs": "infinite or too large for float32 (inf)"}[what]
    assert error.startswith(f"fault: iteration 2: {what} of environment 2 is {how} after step 8 of the rollout"), error
    assert "after step 8 of the rollout, action " in error
    assert f"--resume {run_dir}" in error
    assert torch.load(run_dir / "checkpoints" / "last.pt", weights_only=True)["iteration"] == 1


def test_the_pages_environment_learns(tmp_path):
    """The example of docs/environments.md: under 40 lines, run by the command given, better within a few seconds."""
    text = section("docs/environments.md", "Your own environment on the device")
    module, command = python_in(text), shlex.split(command_in(text))
    assert len(module.splitlines()) < 40
    assert command[1:3] == ["-m", "fastppo.train"]
    (tmp_path / "reach.py").write_text(module)
    command = [sys.executable, *command[1:], "--total-timesteps", "100000", "--compile", "off", "--eval-episodes", "0"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, "--run-dir", "run"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert summary_of(tmp_path / "run")["backend"] == "torch"
    returns = [float(row["episodic_return_mean"]) for row in rows_of(tmp_path / "run")]
    assert returns[-1] > 0.5 * returns[1]  # both negative; the first rollout has seen the end of short episodes only


# --- the helpers' library

POOL = """
import pathlib, queue, sys, threading
import numpy as np
import torch
from fastppo.compile import native

torch.set_num_threads(1)
before = torch.arange(1000.0)  # of the allocator from before: freed later, by its own means
native.load(pathlib.Path(sys.argv[1]))
SIZES = [0, 1, 63, 64, 65, 4096, 2**20 - 1, 2**20, 2**20 + 1, 10 * 2**20]
failures = []

def check(condition, *what):
    if not condition:
        failures.append(what)

def filled(size, value):
    tensor = torch.empty(size, dtype=torch.uint8)
    check(tensor.data_ptr() % 64 == 0, "alignment", size)
    return tensor.fill_(value), value

def worker(number, given, taken, rounds):
    generator = np.random.default_rng(number)
    held = []
    for index in range(rounds):
        held.append(filled(SIZES[generator.integers(len(SIZES))], (number * 37 + index) % 251))
        if len(held) > 12:
            given.put(held.pop(int(generator.integers(len(held)))))
        try:
            tensor, value = taken.get_nowait()
            check(bool((tensor == value).all()), "another thread's tensor")
        except queue.Empty:
            pass
    for tensor, value in held:
        check(bool((tensor == value).all()), "overwritten")

# freed by another thread than made them; threads end with blocks in their lists, and others begin
for _ in range(3):
    queues = [queue.SimpleQueue() for _ in range(3)]
    threads = [threading.Thread(target=worker, args=(n, queues[n], queues[n - 1], 150)) for n in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]

live = [filled(size, index) for index in range(40) for size in SIZES[:8]]
check(len({t.data_ptr() for t, _ in live if t.numel()}) == sum(t.numel() > 0 for t, _ in live), "one block twice")
check(all(bool((t == value).all()) for t, value in live), "overwritten")
address = torch.empty(1000, dtype=torch.uint8).data_ptr()
check(torch.empty(1024, dtype=torch.uint8).data_ptr() == address, "a block that was freed is used again")

tensor = torch.arange(500.0)
array = tensor.numpy()
del tensor
check(array.sum() == 500 * 499 / 2, "an array keeps its tensor")
check(torch.from_numpy(array + 1).sum().item() == 500 * 501 / 2, "from numpy")
del array
grown = torch.arange(100, dtype=torch.uint8)
for size in (0, 50, 65, 5000, 2**20 + 1, 10, 0, 200):
    kept = grown[:min(size, len(grown))].clone()
    grown.resize_(size)
    check(grown.data_ptr() % 64 == 0, "alignment after resize_")
    check(torch.equal(grown[:len(kept)], kept), "resize_", size)
    grown[len(kept):] = 7
storage = torch.arange(10.0).untyped_storage()
storage.resize_(100000)
check(torch.tensor([], dtype=torch.float32).set_(storage)[:10].tolist() == list(range(10)), "resize_ of a storage")
check(before.sum().item() == 999 * 500, "from before")
del before
check(torch.randn(64, 64).matmul(torch.randn(64, 64)).isfinite().all(), "arithmetic")
print("failures", failures)
"""


@pytest.fixture(scope="module")
def helpers(tmp_path_factory, needs_compiler):
    library = tmp_path_factory.mktemp("native") / "native.so"
    native.build(library)
    return library


def test_memory_of_tensors_under_the_pool(helpers, tmp_path):
    """Sizes around every border, tensors freed by other threads, threads that end, numpy, resize_: aligned and never shared.

    In a process of its own: what it changes is for good.
    """
    assert in_a_process(POOL, tmp_path, helpers) == "failures []\n"


@pytest.mark.parametrize(
    ("compiler", "told"),
    [
        (None, r"^there is no C\+\+ compiler; install g\+\+ or name one in CXX$"),
        ("#!/bin/sh\nexit 1\n", r"^native\.cpp does not compile: "),
        (
            "#!/bin/sh\nprintf '\\nno such header\\nand much more\\n' >&2\nexit 1\n",
            r"^native\.cpp does not compile: no such header$",
        ),
        ("not a program", r"^OSError: .*Exec format error"),
    ],
    ids=["missing", "silent", "talkative", "no program"],
)
def test_a_compiler_that_does_not_work_is_told_in_one_line(compiler, told, tmp_path, monkeypatch):
    """For the helpers, which are compiled first: CompileError, one line, nothing left behind."""
    cache = tmp_path / "cache"
    if compiler is not None:
        (tmp_path / "c++").write_text(compiler)
        (tmp_path / "c++").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "c++"))
    ours = setup(CartPole())
    with pytest.raises(CompileError, match=told) as caught:
        compile_program(ours.program(), ours.arguments(), cache)
    assert "\n" not in str(caught.value)
    assert not list(cache.iterdir())
