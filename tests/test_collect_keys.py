"""The key of a compiled `collect`: all that an environment computes is in it, in this process and in the one that compiles."""

import re
import sys
from pathlib import Path

import pytest
import torch

from fastppo.compile import native
from fastppo.compile.background import BackgroundCompile
from fastppo.compile.compile_errors import CompileError
from fastppo.compile.key import cache_key
from fastppo.envs.classic import CartPole
from support.processes import in_a_process

ROOM = """
import dataclasses, functools, torch
from fastppo.compile.background import BackgroundCompile
from fastppo.compile.compile_errors import CompileError
from fastppo.compile.compiled_program import load_program
from fastppo.compile.key import cache_key
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


@pytest.mark.long
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
from fastppo.compile.selector import ProgramSelector, ProgramSpec, TRIAL_ITERATIONS

def hidden():
    class Hidden(Room):
        pass
    return Hidden()

for env in (Room(), hidden()):
    program, example = job(env)
    assert cache_key(program, example) == cache_key(program, example)
    notes = []
    both = ProgramSpec(program, program, example, lambda *_: 0.0)
    tiers = ProgramSelector("auto", {"learn": both, "collect": both}, 1, notes.append)
    deadline = time.monotonic() + 600
    while not any("failed" in note for note in notes) and time.monotonic() < deadline:
        tiers.update(TRIAL_ITERATIONS, 1e6)
        time.sleep(0.05)
    assert tiers.act(example[1])(*example[2:]).finite  # eager goes on
    tiers.close()
    print(tiers.name, notes[-1])
"""


@pytest.mark.usefixtures("inductor")
def test_an_environment_of_a_script_is_not_compiled_in_the_background(tmp_path):
    """A class of `__main__`, which may have no file, or inside a function: one line says what to do, and eager goes on."""
    lines = in_a_process(ROOM + IN_A_SCRIPT, tmp_path).splitlines()
    assert len(lines) == 2, lines
    for line in lines:
        assert line.startswith(
            "eager programs: eager, since compiling failed: the compiling process cannot load this program ("
        )
        assert line.endswith("put your classes in a module, or --compile on")
        assert "Room" in line or "Hidden" in line


@pytest.mark.long
def test_the_background_process_finds_what_this_one_finds(room, tmp_path, monkeypatch):
    """A module beside a user's script is on this process's path only; the other one gets so far as to miss a compiler."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    building = BackgroundCompile(*room.job(room.Room()), tmp_path / "cache")
    building._process.wait(timeout=600)
    with pytest.raises(CompileError, match=re.escape(native.NO_COMPILER)):
        building.poll()
