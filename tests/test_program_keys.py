"""The key of a program: the same in the process that trains and in the one that compiles, and another for another program."""

import dataclasses
import functools
import os
import pickle
import platform
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastppo.compile import background, library_cache, native
from fastppo.compile.background import BackgroundCompile, pack, unpack
from fastppo.compile.compile_errors import CompileError
from fastppo.compile.key import _compiler_version, cache_key, describe, native_key
from fastppo.policy.distributions import CATEGORICAL
from fastppo.policy.mlp import MLPActorCritic
from support.programs import CATEGORICAL_POLICY, job, jobs_of

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

ANY_SPACES = {"env_id": "environments:AnySpacesVector-v0", "cnn_size": 8}
CONFIGURATIONS = [
    {},
    {"norm_obs": True, "norm_reward": True},
    {"num_envs": 1, "num_steps": 32},
    {"env_id": "environments:Walk-v0", "vectorization": "sync"},
    {"env_id": "environments:WalkVector-v0", "env_kwargs": {"mode": "SameStep"}},
    {"rnn": "lstm", "num_minibatches": 2},
    {"rnn": "gru", "num_minibatches": 1, "env_id": "environments:WalkVector-v0"},
    {"backend": "torch"},
    {"backend": "torch", "env_id": "Pendulum-v1", "rnn": "gru", "num_minibatches": 2},
    {"env_id": "environments:MaskedIdentity-v0"},
    {**ANY_SPACES, "env_kwargs": {"observation": "masked", "action": "multi-discrete"}},
    {**ANY_SPACES, "env_kwargs": {"observation": "image (C, H, W)"}},
    {**ANY_SPACES, "env_kwargs": {"observation": "nested"}},
    {**ANY_SPACES, "env_kwargs": {"observation": "nested"}, "rnn": "lstm", "num_minibatches": 2},
]


@pytest.mark.parametrize("num_seeds", [1, 3])
@pytest.mark.parametrize("settings", CONFIGURATIONS, ids=lambda settings: "-".join(map(str, settings.values()))[:60])
def test_both_processes_know_a_program_by_one_key(tmp_path, settings, num_seeds):
    """What the compiler's process is told has the key under which the training process looks for the result.

    With several seeds `act` takes observations whose strides are those of a whole rollout; a program that lost them on its way
    was compiled for others, kept under another key, and compiled again in every run.
    """
    settings = settings if num_seeds == 1 else {**settings, "num_seeds": num_seeds}
    for one in jobs_of(tmp_path / "run", **settings).values():
        told = unpack(pack(one.program, one.example, one.seeds))
        assert cache_key(*told) == cache_key(one.program, one.example, one.seeds)


@hypothesis.settings(max_examples=100, derandomize=True, database=None, deadline=None)
@hypothesis.given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    strides=st.lists(st.integers(0, 30), min_size=4, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool, torch.bfloat16]),
)
def test_a_tensor_keeps_its_layout_on_the_way(shape, strides, dtype):
    """Any shape and strides: slices, transposed and expanded tensors, empty ones, and None beside them."""
    tensor = torch.zeros(4 * 4 * 30 + 1, dtype=dtype).as_strided(shape, strides[: len(shape)])
    _, (there, nothing), _ = unpack(pack(functools.partial(len), (tensor, None), None))
    assert nothing is None
    assert (there.shape, there.stride(), there.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)


@dataclasses.dataclass(frozen=True)
class Restless(MLPActorCritic):
    """A policy that is another one whenever it has been pickled."""

    def __reduce__(self):
        return Restless, (self.obs_size, self.action_size, self.distribution, (*self.hidden_sizes, 1))


def test_a_program_that_changes_on_its_way_is_not_built(tmp_path, monkeypatch):
    """The result would be kept where nobody looks for it: said at once, in a line, and no process is started."""
    tmp_path.chmod(0o700)
    monkeypatch.setattr(background, "subprocess", None)
    program, example = job(CATEGORICAL_POLICY)
    policy = Restless(4, 3, CATEGORICAL, (16, 16))
    with pytest.raises(CompileError, match=r"got a different program; --compile on [^\n]*$"):
        BackgroundCompile(functools.partial(program, policy=policy), example, tmp_path)


NUMBERS = {
    "learning_rate": 1e-4,
    "anneal_lr": False,
    "clip_coef": 0.3,
    "anneal_clip": True,
    "ent_coef": 0.2,
    "ent_coef_end": 0.1,
    "desired_kl": 0.01,
    "vf_coef": 0.1,
    "gamma": 0.9,
    "gae_lambda": 0.8,
    "max_grad_norm": 9.0,
    "target_kl": 0.01,
    "adam_eps": 1e-8,
}


@pytest.mark.parametrize("settings", [{}, {"backend": "torch"}, {"num_seeds": 3}], ids=["act", "collect", "seeds"])
def test_a_sweep_over_numbers_has_one_key(tmp_path, settings):
    """PPO's plain numbers: the programs of the second trial are those that the first one left in the cache."""

    def keys(**changed):
        jobs = jobs_of(tmp_path / "-".join(["run", *changed]), **settings, **changed).values()
        return [cache_key(one.program, one.example, one.seeds) for one in jobs]

    first = keys()
    assert keys(**NUMBERS) == first
    switches = {"norm_adv": False, "clip_vloss": True, "clip_reward": True, "recompute_advantage": True}
    for changed in ({"advantage": "monte-carlo"}, *({name: on} for name, on in switches.items())):
        assert keys(**changed) != first  # while what changes the program does


def served(monkeypatch, capsys, tmp_path, key):
    """What the compiler's process answers to a job that should have this key."""
    program, example = job(CATEGORICAL_POLICY)
    sent = pickle.dumps((pack(program, example, None), key, tmp_path, 1))
    monkeypatch.setattr(sys, "stdin", type("", (), {"buffer": type("", (), {"read": staticmethod(lambda: sent)})}))
    monkeypatch.setattr(os, "nice", lambda _: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    built = []
    monkeypatch.setattr(background, "compile_program", lambda *args: built.append(args))
    background.serve()
    return built, capsys.readouterr().out


def test_a_key_that_differs_there_is_an_error_and_remembered(tmp_path, monkeypatch, capsys):
    """The process that compiles builds nothing under a key that is not its own; the next run does not start one for it."""
    tmp_path.chmod(0o700)
    program, example = job(CATEGORICAL_POLICY)
    key = cache_key(program, example)
    built, told = served(monkeypatch, capsys, tmp_path, key)
    assert (len(built), told) == (1, "")
    monkeypatch.setattr("fastppo.compile.key._processor", lambda: "another one")
    built, told = served(monkeypatch, capsys, tmp_path, key)
    assert built == []
    assert "got a different program" in told
    monkeypatch.undo()
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(CompileError, match="got a different program"):
        BackgroundCompile(program, example, tmp_path)
    library_cache.clear(tmp_path)
    with pytest.raises(TypeError):  # it would start one again
        BackgroundCompile(program, example, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(platform, "libc_ver", lambda: ("glibc", "1.0")),
        lambda patch: patch.setattr("fastppo.compile.key._cpp_library", lambda: "libstdc++.so.6.0.1"),
        lambda patch: patch.setenv("CXX", "some-compiler"),
        lambda patch: patch.setattr("fastppo.compile.key._compiler_version", lambda _: "g++ 1.0"),
        lambda patch: patch.setenv("CPATH", "/somewhere"),
        lambda patch: patch.setattr(sys, "version", "3.99"),
        lambda patch: patch.setattr(torch, "__version__", "99.0"),
        lambda patch: patch.setattr("fastppo.compile.key._processor", lambda: "another one"),
        lambda patch: patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "NONE"),
    ],
    ids=["glibc", "libstdc++", "CXX", "compiler", "CPATH", "python", "torch", "processor", "instructions"],
)
def test_what_a_library_depends_on_is_in_both_keys(monkeypatch, change):
    """Of programs and of their helpers: after an upgrade they are built anew, not loaded."""
    program, example = job(CATEGORICAL_POLICY)
    before = cache_key(program, example), native_key()
    change(monkeypatch)
    assert not {*before} & {cache_key(program, example), native_key()}


def test_the_settings_of_inductor_are_in_the_key(monkeypatch):
    """That is, its variables; the directory that it works in is none."""
    program, example = job(CATEGORICAL_POLICY)
    before = cache_key(program, example)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/somewhere")
    assert cache_key(program, example) == before
    monkeypatch.setenv("TORCHINDUCTOR_CPP_ENABLE_UNSAFE_MATH_OPT_FLAG", "1")
    assert cache_key(program, example) != before


def test_a_compiler_that_cannot_be_asked_is_no_fault(monkeypatch):
    """A missing one, and one that fails, have no version."""
    assert _compiler_version("no-such-compiler-anywhere") == ""
    assert _compiler_version(sys.executable).startswith("Python")
    monkeypatch.setenv("CXX", "no-such-compiler-anywhere")
    assert len(native_key()) > len("native-")
    assert native.compiler() == "no-such-compiler-anywhere"


def test_cxx_may_hold_arguments(monkeypatch, tmp_path):
    """Of `wrapper compiler -O1` the library is built with all words; an empty CXX is none; a path may hold a space."""
    called = tmp_path / "called"
    fake = tmp_path / "some compiler"
    fake.write_text(f'#!/bin/sh\necho "$@" > {called}\n')
    fake.chmod(0o700)
    monkeypatch.setenv("CXX", f"'{fake}' g++ -O1")
    assert native.has_compiler()
    native.build(tmp_path / "library.so")
    assert called.read_text().startswith("g++ -O1 -std=c++20")
    script = native.single_file(native.compiler(), tmp_path)
    assert script == str(tmp_path / "g++")
    subprocess.run([script, "a b"], check=True)
    assert called.read_text() == "g++ -O1 a b\n"
    assert native.words_of(str(fake)) == [str(fake)]
    assert native.single_file("clang++", tmp_path) == "clang++"
    for empty in ("", " "):
        monkeypatch.setenv("CXX", empty)
        assert native.compiler() == "g++"
    monkeypatch.setenv("CXX", "g++ 'unclosed")
    assert not native.has_compiler()


class Plain:
    def __init__(self, value):
        self.value = value


def function(x):
    return x


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([torch.zeros(2000)], [torch.cat((torch.zeros(1000), torch.ones(1), torch.zeros(999)))]),
        ((np.zeros(2000), 1), (np.eye(1, 2000, 1000)[0], 1)),
        ([Plain(1)], [Plain(2)]),
        ({"a": (Plain(torch.zeros(3)),)}, {"a": (Plain(torch.ones(3)),)}),
        (functools.partial(function, 1), functools.partial(function, 2)),
        ({"x", "y"}, {"x", "z"}),
    ],
    ids=["tensors", "arrays", "objects", "nested", "partial", "set"],
)
def test_a_setting_is_described_by_what_it_is(one, other):
    """Not by its address, nor by a text that leaves out the middle of an array: equal ones alike, others apart."""
    copied = pickle.loads(pickle.dumps(one))
    assert describe(copied) == describe(one)
    assert describe(other) != describe(one)


def test_a_set_is_described_whatever_its_order():
    """Which depends on how it was made, and for texts on the process's seed of hashes."""
    one, other = frozenset([0, 8]), frozenset([8, 0])
    assert list(one) != list(other)
    assert describe(one) == describe(other)
