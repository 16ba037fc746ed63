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
from concurrent.futures import ThreadPoolExecutor

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
from fastppo.core.seed_axis import Seeds, of_seed, stack
from support.learn_settings import with_settings
from support.programs import APPLIED, CATEGORICAL_POLICY, NORMAL_POLICY, E, M, N, T, assert_same, job

STOPPING = {"target_kl": 0.002, "learning_rate": 0.01}  # the KL stop fires within the update


@pytest.fixture(autouse=True)
def _one_thread():
    """A program is compiled for a number of threads, and a shared machine is slow with more than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def library(tmp_path_factory, needs_compiler):
    """One compiled program, its cache directory, and what it was made from."""
    torch.set_num_threads(1)
    cache_dir = tmp_path_factory.mktemp("cache")
    cache_dir.chmod(0o700)
    learn_eagerly, arguments = job(CATEGORICAL_POLICY, **STOPPING)
    return compile_program(learn_eagerly, arguments, cache_dir), learn_eagerly, arguments, cache_dir


def test_compiled_categorical_learn_equals_eager_with_a_kl_stop(library):
    """Parameters, Adam's state and every metric after all minibatches; the stop comes after the same minibatch."""
    compiled, learn_eagerly, arguments, _ = library
    expected = learn_eagerly(*arguments)
    applied = expected.minibatch_metrics[:, APPLIED]
    assert 0 < applied.sum() < len(applied)  # it fired, and not at once
    before = arguments[0].clone()
    assert_same(compiled(*arguments), expected)
    assert torch.equal(arguments[0], before)  # inputs are not written to


def test_one_program_serves_every_value_of_its_tensors(library):
    """Other data and numbers, no KL stop: nothing is compiled again, the rollout may be a TensorDict."""
    tensordict = pytest.importorskip("tensordict")
    compiled, learn_eagerly, _, _ = library
    numbers = {"learning_rate": 1e-4, "clip_coef": 0.1, "ent_coef": 0.05, "gamma": 0.9, "gae_lambda": 0.8}
    params, adam, rollout, *rest = as_dict = job(CATEGORICAL_POLICY, seed=9, **numbers)[1]
    as_tensordict = (params, adam, tensordict.TensorDict(rollout, [T + 1, N]), *rest)
    expected = learn_eagerly(*as_dict)
    assert expected.minibatch_metrics[:, APPLIED].all()
    assert_same(compiled(*as_dict), expected)
    assert_same(compiled(*as_tensordict), expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.003),
        ("clip_coef", 0.02),
        ("ent_coef", 0.5),
        ("vf_coef", 2.0),
        ("gamma", 0.9),
        ("gae_lambda", 0.5),
        ("max_grad_norm", 0.05),
        ("target_kl", math.inf),
        ("adam_eps", 0.1),
    ],
)
def test_a_sweep_over_a_number_compiles_once(library, name, value):
    """Each of them is an input: of another value it is the same library, which gives what eager gives for that value."""
    _, learn_eagerly, arguments, cache_dir = library
    other = (*arguments[:4], arguments[4]._replace(**{name: torch.tensor(value)}), arguments[5])
    expected, before = learn_eagerly(*other), learn_eagerly(*arguments)
    assert (expected.params - before.params).abs().max() > 1e-4  # the number counts
    assert_same(load_program(learn_eagerly, other, cache_dir)(*other), expected)


def test_seeds_share_the_program_of_one(library):
    """A run of three seeds calls it for one at a time, on two threads: nothing is compiled again, and each learns by itself."""
    _, learn_eagerly, _, cache_dir = library
    examples = [job(CATEGORICAL_POLICY, seed=seed, **STOPPING)[1] for seed in range(3)]
    stacked = stack(examples)
    learned = load_program(learn_eagerly, stacked, cache_dir, Seeds(3, 1, 2))(*stacked)
    for seed, example in enumerate(examples):
        assert_same(of_seed(learned, seed), learn_eagerly(*example))


@pytest.fixture(scope="module")
def team(programs_dir, needs_compiler):
    """A compiled program of two workers: (program, eager, its settings)."""
    torch.set_num_threads(1)
    settings = {"advantage_estimator": "monte-carlo", "norm_returns": True, "clip_vloss": False, "normalized": True}
    learn_eagerly, arguments = job(NORMAL_POLICY, **settings)
    shared_out = with_settings(learn_eagerly, num_workers=2, microbatch_size=4)
    return compile_program(shared_out, arguments, programs_dir), learn_eagerly, settings


def test_two_compiled_workers_equal_eager(team):
    """The other distribution, estimator and loss, with observations, rewards and returns normalised, many times over.

    Worker threads that read each other's sums too early or too late would differ now and then.
    """
    compiled, learn_eagerly, settings = team
    for seed in range(30):
        _, arguments = job(NORMAL_POLICY, seed=seed, **settings)
        expected, result = learn_eagerly(*arguments), compiled(*arguments)
        assert_same(result, expected)
        again = compiled(*arguments)
        assert torch.equal(result.params, again.params)  # the same bits each time


def test_a_failing_worker_is_an_error_not_a_hang(team):
    """The other workers stop waiting for it, and the caller is told."""
    compiled, _, settings = team
    tensors = flat_tensors(job(NORMAL_POLICY, **settings)[1])
    spoilt = WorkerPool(compiled._library, 2)
    inputs = [[*tensors, worker] for worker in spoilt.workers]
    run = spoilt._run
    spoilt._run = lambda given: run([None] if given is inputs[1] else given)  # no tensor: the second one fails at once
    with pytest.raises(RuntimeError, match="worker"):
        spoilt.run(inputs)


class Rendezvous:
    """The exchange of processes that are threads here: `of(rank)` is what each of them is given."""

    def __init__(self, size):
        self.barrier, self.places, self.calls = threading.Barrier(size, timeout=60), [None] * size, 0

    def of(self, rank):
        def all_reduce(x):
            self.places[rank] = x.clone()
            self.barrier.wait()
            total = torch.stack(self.places).sum(0)
            self.calls += rank == 0
            self.barrier.wait()
            return total

        return types.SimpleNamespace(rank=rank, all_reduce=all_reduce)


@pytest.fixture(scope="module")
def ranks(programs_dir, needs_compiler):
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


def test_a_team_that_is_no_longer_needed_leaves_no_threads(team):
    """Ten runs in one process do not end with ten threads that wait for nothing."""
    compiled, _, _ = team
    before = threading.active_count()
    others = [WorkerPool(compiled._library, 3) for _ in range(4)]
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
    _, _, _, cache_dir = library
    script = (
        "import sys, pathlib, torch; torch.set_num_threads(1); sys.path.insert(0, sys.argv[1])\n"
        "from fastppo.compile.compiled_program import load_program; from support.programs import *\n"
        f"l, a = job(CATEGORICAL_POLICY, **{STOPPING})\n"
        "c = load_program(l, a, pathlib.Path(sys.argv[2])); assert_same(c(*a), l(*a))\n"
        "assert 'torch._inductor.compile_fx' not in sys.modules and 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, os.path.dirname(__file__), str(cache_dir)], check=True, timeout=120)


def test_another_setting_or_shape_is_another_program(library):
    """Settings that are baked in, threads and shapes are in the key; values of tensors are not."""
    _, learn_eagerly, arguments, cache_dir = library
    assert load_program(learn_eagerly, job(CATEGORICAL_POLICY, seed=5, learning_rate=1e-4)[1], cache_dir) is not None
    assert load_program(with_settings(learn_eagerly, norm_adv=False), arguments, cache_dir) is None
    wider = dataclasses.replace(CATEGORICAL_POLICY, activation="relu")
    assert load_program(functools.partial(learn_eagerly, policy=wider), arguments, cache_dir) is None
    longer = (*arguments[:3], arguments[3].repeat(2, 1), *arguments[4:])  # twice the epochs
    assert load_program(learn_eagerly, longer, cache_dir) is None
    torch.set_num_threads(2)
    assert load_program(learn_eagerly, arguments, cache_dir) is None


def test_a_program_refuses_what_it_was_not_made_for(library):
    """Other shapes, types or threads are an error, not memory read out of bounds."""
    compiled, _, arguments, _ = library
    with pytest.raises(CompileError, match="shapes"):
        compiled(*arguments[:3], arguments[3][:1], *arguments[4:])
    with pytest.raises(CompileError, match="types"):
        compiled(*arguments[:3], arguments[3].int(), *arguments[4:])
    torch.set_num_threads(2)
    with pytest.raises(CompileError, match="threads"):
        compiled(*arguments)


def test_a_damaged_library_is_thrown_away(library, tmp_path):
    """One wrong byte or a cut, in the program or in the helpers: not loaded, and gone, so that it is built anew."""
    _, learn_eagerly, arguments, cache_dir = library
    tmp_path.chmod(0o700)
    libraries = {path.name: path.read_bytes() for path in cache_dir.glob("*.so")}
    assert len(libraries) == 2
    for name, content in libraries.items():
        for damaged in (content[: len(content) // 2], b"", content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]):
            for other, good in libraries.items():
                (tmp_path / other).write_bytes(damaged if other == name else good)
            assert load_program(learn_eagerly, arguments, tmp_path) is None
            assert {path.name for path in tmp_path.iterdir()} == set(libraries) - {name}
    (tmp_path / name).write_bytes(content)
    assert load_program(learn_eagerly, arguments, tmp_path) is not None


def test_a_directory_that_others_can_reach_is_not_trusted(library, tmp_path):
    """Mode, a symbolic link, a file in its place: CompileError in one line that names the directory."""
    _, learn_eagerly, arguments, _ = library
    open_to_group = tmp_path / "open"
    open_to_group.mkdir(mode=0o750)
    (tmp_path / "private").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "private")
    (tmp_path / "file").write_text("")
    for path in (open_to_group, tmp_path / "link", tmp_path / "file"):
        with pytest.raises(CompileError, match=str(path)) as caught:
            load_program(learn_eagerly, arguments, path)
        assert "\n" not in str(caught.value)
    assert load_program(learn_eagerly, arguments, tmp_path / "new") is None
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
