"""The compiled tier is the eager one: same numbers, same signature; and what its cache does with files it should not load."""

import dataclasses
import functools
import math
import os
import re
import subprocess
import sys
import threading
import time
import types
import typing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastppo.compile import native
from fastppo.compile.background import BackgroundCompile
from fastppo.compile.compile_errors import CompileError
from fastppo.compile.compiled_program import load_program
from fastppo.compile.decompositions import rational_tanh
from fastppo.compile.inductor import compile_program
from fastppo.compile.program import flat_tensors
from fastppo.compile.trace import trace
from fastppo.compile.workers import WorkerPool
from fastppo.core.minibatches import draw_permutation
from support.kernels import share_helpers
from support.learn_settings import with_settings
from support.programs import APPLIED, CATEGORICAL_POLICY, NORMAL_POLICY, E, M, N, Rendezvous, T, assert_same, job


@pytest.fixture(autouse=True)
def _one_thread():
    """A program is compiled for a number of threads, and a shared machine is slow with more than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# The estimator and the loss of fewest tests; observations, rewards and returns are normalised; the KL stop fires in most seeds.
SETTINGS = {"advantage_estimator": "monte-carlo", "norm_returns": True, "clip_vloss": False, "normalized": True}
SETTINGS |= {"target_kl": 0.002}


@dataclasses.dataclass
class Library:
    """A compiled program of two workers, what it was made from, and its cache directory."""

    compiled: typing.Any
    program: typing.Any
    eager: typing.Any
    arguments: tuple[typing.Any, ...]
    cache_dir: Path

    def load(self, program=None, arguments=None, cache_dir=None):
        """The program from the cache, or None; with another program, other arguments or from another directory."""
        return load_program(program or self.program, arguments or self.arguments, cache_dir or self.cache_dir)


@pytest.fixture(scope="module")
def library(tmp_path_factory, programs_dir, inductor):
    """One build for all tests of this file."""
    torch.set_num_threads(1)
    cache_dir = tmp_path_factory.mktemp("cache")
    cache_dir.chmod(0o700)
    share_helpers(programs_dir, cache_dir)
    eager, arguments = job(NORMAL_POLICY, **SETTINGS)
    program = with_settings(eager, num_workers=2, microbatch_size=4)
    return Library(compile_program(program, arguments, cache_dir), program, eager, arguments, cache_dir)


def test_two_compiled_workers_equal_eager(library):
    """Parameters, Adam's state and every metric after all minibatches, many times over; the KL stop after the same minibatch.

    Worker threads that read each other's sums too early or too late would differ now and then.
    """
    numbers = set()
    for seed in range(30):
        _, arguments = job(NORMAL_POLICY, seed=seed, **SETTINGS)
        before = arguments[0].clone()
        expected, result = library.eager(*arguments), library.compiled(*arguments)
        assert_same(result, expected)
        assert torch.equal(arguments[0], before)  # inputs are not written to
        again = library.compiled(*arguments)
        assert torch.equal(result.params, again.params)  # the same bits each time
        numbers.add(int(expected.minibatch_metrics[:, APPLIED].sum()))
    assert {4, 8} <= numbers  # it fired, and not at once, and in some not at all


def test_one_program_serves_every_value_of_its_tensors(library):
    """Other data and numbers, no KL stop: nothing is compiled again, the rollout may be a TensorDict."""
    tensordict = pytest.importorskip("tensordict")
    numbers = {"learning_rate": 1e-4, "clip_coef": 0.1, "ent_coef": 0.05, "gamma": 0.9, "target_kl": None}
    params, adam, rollout, *rest = as_dict = job(NORMAL_POLICY, seed=9, **(SETTINGS | numbers))[1]
    as_tensordict = (params, adam, tensordict.TensorDict(rollout, [T + 1, N]), *rest)
    expected = library.eager(*as_dict)
    assert expected.minibatch_metrics[:, APPLIED].all()
    assert_same(library.compiled(*as_dict), expected)
    assert_same(library.compiled(*as_tensordict), expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.01),
        ("clip_coef", 0.02),
        ("ent_coef", 0.5),
        ("vf_coef", 2.0),
        ("gamma", 0.9),
        ("max_grad_norm", 0.05),
        ("target_kl", math.inf),
        ("adam_eps", 0.1),
    ],
)
def test_a_sweep_over_a_number_compiles_once(library, name, value):
    """Each of them is an input: of another value it is the same library, which gives what eager gives for that value."""
    arguments = job(NORMAL_POLICY, seed=3, **SETTINGS)[1]
    other = (*arguments[:4], arguments[4]._replace(**{name: torch.tensor(value)}), arguments[5])
    expected, before = library.eager(*other), library.eager(*arguments)
    assert (expected.params - before.params).abs().max() > 1e-4  # the number counts
    assert_same(library.load(arguments=other)(*other), expected)


def test_a_failing_worker_is_an_error_not_a_hang(library):
    """The other workers stop waiting for it, and the caller is told."""
    tensors = flat_tensors(job(NORMAL_POLICY, **SETTINGS)[1])
    spoilt = WorkerPool(library.compiled._library, 2)
    inputs = [[*tensors, worker] for worker in spoilt.workers]
    run = spoilt._run
    spoilt._run = lambda given: run([None] if given is inputs[1] else given)  # no tensor: the second one fails at once
    with pytest.raises(RuntimeError, match="worker"):
        spoilt.run(inputs)


@pytest.fixture(scope="module")
def ranks(programs_dir, inductor):
    """(program of one of two processes with two workers each, its example, cache directory, settings of the whole)."""
    torch.set_num_threads(1)
    settings = {"advantage_estimator": "monte-carlo", "norm_returns": True, "target_kl": 0.0016, "normalized": True}
    program, example = ranks_job(settings, 0, 0)
    without_others = compile_program(program, example, programs_dir)
    with pytest.raises(CompileError, match="exchange"):  # half a sum would look like a sum
        without_others(*example)
    return program, example, programs_dir, settings


def ranks_job(settings, rank, seed):
    """What one of two processes runs: its environments, and its rows of minibatches that have as many of the other's."""
    learn_eagerly, (params, adam, rollout, _, *rest) = job(CATEGORICAL_POLICY, seed=seed, **settings)
    own = {key: x.chunk(2, 1)[rank].contiguous() for key, x in rollout.items()}
    permutation = torch.empty(E, T * N // 2, dtype=torch.int64)
    draw_permutation(permutation, torch.Generator().manual_seed(seed), T, N, M, 2, rank, 2)
    program = with_settings(learn_eagerly, num_ranks=2, num_workers=2, minibatch_size=M // 2)
    return program, (params, adam, own, permutation, *rest)


@pytest.mark.slow
def test_compiled_ranks_of_compiled_workers_equal_eager(ranks):
    """Two processes of two threads each, together the update of one, statistics and KL stop included; same bits for all."""
    program, example, cache_dir, settings = ranks
    meeting = Rendezvous(2)
    compiled = [load_program(program, example, cache_dir, exchange=meeting.of(rank)) for rank in range(2)]
    stopped = 0
    for seed in range(20):
        learn_eagerly, (params, adam, rollout, permutation, *rest) = job(CATEGORICAL_POLICY, seed=seed, **settings)
        draw_permutation(permutation, torch.Generator().manual_seed(seed), T, N, M, 2)
        expected = learn_eagerly(params, adam, rollout, permutation, *rest)
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(lambda rank: compiled[rank](*ranks_job(settings, rank, seed)[1]), range(2)))  # noqa: B023
        for result in results:
            assert_same(result, expected)
            assert torch.equal(result.params, results[0].params)
            assert torch.equal(result.minibatch_metrics, results[0].minibatch_metrics)
        stopped += int(expected.minibatch_metrics[-1, APPLIED] == 0)
    assert 0 < stopped < 20
    assert meeting.calls == 20 * (len(expected.minibatch_metrics) + 7)  # one a minibatch, and the statistics before them


@pytest.mark.slow
def test_a_process_that_is_gone_is_the_error_that_the_exchange_raised(ranks):
    """At the first sum or in the middle of the loop: what it raised comes out of the program, and its workers end."""
    program, example, cache_dir, _ = ranks

    for answered in (0, 9):
        asked = []

        def all_reduce(x, asked=asked, answered=answered):
            asked.append(len(x))
            if len(asked) > answered:
                raise ConnectionError("the other one has gone")
            return x

        compiled = load_program(program, example, cache_dir, exchange=types.SimpleNamespace(rank=0, all_reduce=all_reduce))
        with pytest.raises(ConnectionError, match="the other one has gone"):
            compiled(*example)
        assert len(asked) == answered + 1  # the program ended there, and did not go on with half a sum


def test_a_team_that_is_no_longer_needed_leaves_no_threads(library):
    """Ten runs in one process do not end with ten threads that wait for nothing."""
    before = threading.active_count()
    others = [WorkerPool(library.compiled._library, 3) for _ in range(4)]
    assert threading.active_count() == before + 8
    del others
    deadline = time.monotonic() + 60
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


@pytest.mark.parametrize(
    ("policy", "share_backbone", "settings"),
    [
        (CATEGORICAL_POLICY, True, {"norm_adv": False, "target_kl": 0.01}),
        (CATEGORICAL_POLICY, False, {"clip_vloss": False, "advantage_estimator": "monte-carlo"}),
        (NORMAL_POLICY, False, {"target_kl": 0.01, "microbatch_size": 8}),
        (NORMAL_POLICY, True, {"advantage_estimator": "monte-carlo", "norm_adv": False}),
    ],
)
@pytest.mark.long
def test_traced_program_equals_eager(policy, share_backbone, settings):
    """The graph that the compiler is given, run operator by operator: every setting, without the wait for a compiler."""
    policy = dataclasses.replace(policy, share_backbone=share_backbone)
    learn_eagerly, arguments = job(policy, **settings)
    graph, _ = trace(learn_eagerly, arguments)
    params, *rest = graph(*flat_tensors(arguments))
    expected = learn_eagerly(*arguments)
    torch.testing.assert_close(params, expected.params, rtol=2e-4, atol=2e-6)
    torch.testing.assert_close(rest[3], expected.minibatch_metrics, rtol=2e-4, atol=2e-6)


def test_second_process_loads_without_the_compiler(library):
    """The cache is enough: no Inductor, no tracing, the same library for the same job."""
    script = (
        "import sys, pathlib, torch; torch.set_num_threads(1); sys.path.insert(0, sys.argv[1])\n"
        "from fastppo.compile.compiled_program import load_program; from support.programs import *\n"
        "from support.learn_settings import with_settings\n"
        f"l, a = job(NORMAL_POLICY, **{SETTINGS})\n"
        "p = with_settings(l, num_workers=2, microbatch_size=4)\n"
        "c = load_program(p, a, pathlib.Path(sys.argv[2])); assert_same(c(*a), l(*a))\n"
        "assert 'torch._inductor.compile_fx' not in sys.modules and 'torch._dynamo' not in sys.modules\n"
    )
    command = [sys.executable, "-c", script, os.path.dirname(__file__), str(library.cache_dir)]
    subprocess.run(command, check=True, timeout=120)


def test_another_setting_or_shape_is_another_program(library):
    """Settings that are baked in, threads and shapes are in the key; values of tensors are not."""
    program, arguments = library.program, library.arguments
    assert library.load(arguments=job(NORMAL_POLICY, **SETTINGS | {"seed": 5, "learning_rate": 1e-4})[1]) is not None
    assert library.load(with_settings(program, norm_adv=False)) is None
    wider = dataclasses.replace(NORMAL_POLICY, activation="relu")
    assert library.load(functools.partial(program, policy=wider)) is None
    longer = (*arguments[:3], arguments[3].repeat(2, 1), *arguments[4:])  # twice the epochs
    assert library.load(arguments=longer) is None
    assert library.load(with_settings(program, num_workers=1)) is None
    torch.set_num_threads(2)
    assert library.load() is None


def test_a_program_refuses_what_it_was_not_made_for(library):
    """Other shapes, types or threads are an error, not memory read out of bounds."""
    compiled, arguments = library.compiled, library.arguments
    with pytest.raises(CompileError, match="shapes"):
        compiled(*arguments[:3], arguments[3][:1], *arguments[4:])
    with pytest.raises(CompileError, match="types"):
        compiled(*arguments[:3], arguments[3].int(), *arguments[4:])
    torch.set_num_threads(2)
    with pytest.raises(CompileError, match="threads"):
        compiled(*arguments)


def test_a_damaged_library_is_thrown_away(library, tmp_path):
    """One wrong byte or a cut, in the program or in the helpers: not loaded, and gone, so that it is built anew."""
    tmp_path.chmod(0o700)
    libraries = {path.name: path.read_bytes() for path in library.cache_dir.glob("*.so")}
    assert len(libraries) == 2
    for name, content in libraries.items():
        for damaged in (content[: len(content) // 2], b"", content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]):
            for other, good in libraries.items():
                (tmp_path / other).write_bytes(damaged if other == name else good)
            assert library.load(cache_dir=tmp_path) is None
            assert {path.name for path in tmp_path.iterdir()} == set(libraries) - {name}
    (tmp_path / name).write_bytes(content)
    assert library.load(cache_dir=tmp_path) is not None


def test_a_directory_that_others_can_reach_is_not_trusted(library, tmp_path):
    """Mode, a symbolic link, a file in its place: CompileError in one line that names the directory."""
    open_to_group = tmp_path / "open"
    open_to_group.mkdir(mode=0o750)
    (tmp_path / "private").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "private")
    (tmp_path / "file").write_text("")
    for path in (open_to_group, tmp_path / "link", tmp_path / "file"):
        with pytest.raises(CompileError, match=str(path)) as caught:
            library.load(cache_dir=path)
        assert "\n" not in str(caught.value)
    assert library.load(cache_dir=tmp_path / "new") is None
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


def test_without_a_compiler_the_reason_is_one_line(tmp_path, monkeypatch):
    """Here and in the other process; nothing is left behind."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv("CXX", "no-such-compiler")
    learn_eagerly, arguments = job(CATEGORICAL_POLICY)
    with pytest.raises(CompileError, match=f"^{re.escape(native.NO_COMPILER)}$"):
        compile_program(learn_eagerly, arguments, tmp_path)
    building = BackgroundCompile(learn_eagerly, arguments, tmp_path)
    deadline = time.monotonic() + 600
    while building._process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(CompileError, match=re.escape(native.NO_COMPILER)):
        building.poll()
    building.stop()
    assert not list(tmp_path.iterdir())


def test_rational_tanh_is_tanh():
    """Against float64: within 4e-7 of tanh relatively, everywhere; exact at 0, odd, and never beyond 1."""
    x = torch.cat((torch.linspace(-12, 12, 200_001), torch.logspace(-30, 1, 20_001)))
    exact = x.double().tanh()
    approximate = rational_tanh(x)
    error = (approximate.double() - exact).abs() / exact.abs().clamp(min=1e-300)
    assert error[x != 0].max() < 4e-7
    assert rational_tanh(torch.zeros(1)).item() == 0.0
    assert torch.equal(rational_tanh(-x), -approximate)
    assert approximate.abs().max() <= 1.0
