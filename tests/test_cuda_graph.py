"""Programs captured as CUDA graphs, on the CPU: recorded once, they give the eager numbers for other data.

tests/support/cpu_graphs.py records operations and runs them again, as a GPU does. What is on which device is seen on meta
tensors, gradients included; tests/test_fake_gpu.py does so for CUDA's, without gradients.
"""

import contextlib
import csv
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_leaves

from fastppo.compile.cuda_graph import GraphedProgram
from fastppo.compile.selector import ProgramSelector
from fastppo.compile.static_loops import Repeated, StaticLoops
from fastppo.config import TrainConfig
from fastppo.core.acting import act_from_params
from fastppo.core.scan import scan
from fastppo.rollout.collector import start_collector
from fastppo.train import console
from fastppo.training.job import allocate_buffers, draw_noise
from fastppo.training.loop import draw_minibatches
from fastppo.training.programs import build_programs
from fastppo.training.setup import prepare
from support.cpu_graphs import RecordedGraph, recorded_graphs
from support.gpu_runs import CASES, OF_A_MINIBATCH, OF_A_STEP_OF_MEMORY, OF_BETA, watched_graphs
from support.processes import TIMES, PretendedRanks
from support.programs import CATEGORICAL_POLICY, NORMAL_POLICY, job, to_meta

META = torch.device("meta")
COMMON = {"num_envs": 4, "num_steps": 8, "num_minibatches": 2, "update_epochs": 2, "num_threads": 1, "check_env": False}


@contextlib.contextmanager
def prepared(monkeypatch, case, **settings):
    """The task of a run of this kind on the CPU, but for its device: programs are those of a GPU."""
    own, policy = CASES[case]
    if case.startswith("ranks"):
        monkeypatch.setattr("fastppo.training.setup.start_ranks", lambda *_: PretendedRanks(1, 2, 1, "cpu"))
    with contextlib.ExitStack() as cleanup:
        config = TrainConfig(**{**COMMON, "device": "cpu", **own, **settings})
        yield replace(prepare(config, policy, None, cleanup), device=META)


def on_cpu(task):
    return replace(task, device=torch.device("cpu"))


def rollouts(task, buffers, specs):
    """Arguments of each program again and again, of rollouts that go on."""
    task = on_cpu(task)
    chosen = ProgramSelector("off", specs, 1, lambda _: None, task.ranks)
    envs = task.envs, buffers.rollout, task.obs, task.action, task.environment_seeds(), buffers.rnn_state
    collector = start_collector(*envs)
    while True:
        generator = torch.Generator().manual_seed(len(buffers.noises) + int(buffers.permutation.sum()))
        buffers.noises = [draw_noise(task, generator) for _ in task.states]
        for permutation in buffers.permutations:
            draw_minibatches(task, permutation, generator)
        params, _, _, _, _, normalization = buffers.learn_arguments()
        collector.collect(chosen.act(normalization), buffers.noise)
        yield build_programs(replace(task, device=META), buffers.learn_arguments(), buffers.noise)
        params += 0.01 * torch.randn(params.shape, generator=generator)


def assert_equal(ours, theirs):
    """The same numbers to the bit."""
    for x, y in zip(tree_leaves(tuple(ours)), tree_leaves(tuple(theirs)), strict=True):
        torch.testing.assert_close(x, y, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("case", CASES)
def test_captured_programs_give_the_eager_numbers(case, monkeypatch):
    """`learn`, and `act` or `collect`, captured before the first rollout and called with two later ones: the eager results to
    the bit. A step of a loop that kept a number of the recording, or a buffer that is not written, would differ.
    """
    with prepared(monkeypatch, case) as task:
        buffers = allocate_buffers(on_cpu(task))
        specs = build_programs(task, buffers.learn_arguments(), buffers.noise)
        with recorded_graphs(), torch.no_grad():
            captured = {name: GraphedProgram(spec.program, spec.example, spec.seeds) for name, spec in specs.items()}
            data = rollouts(task, buffers, specs)
            for _ in range(2):
                for name, spec in next(data).items():
                    given = spec.example[1:] if name == "act" else spec.example
                    assert_equal(captured[name](*spec.example), spec.eager(*given))


@pytest.mark.parametrize("policy", [CATEGORICAL_POLICY, NORMAL_POLICY], ids=["categorical", "normal"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_kl": 0.001},
        {"microbatch_size": 5, "recompute_advantage": True},
        {"microbatch_size": 4, "norm_adv": False, "clip_vloss": False},
        {"advantage_estimator": "monte-carlo", "norm_returns": True, "clip_reward": True},
    ],
    ids=str,
)
def test_captured_learn_of_all_settings(policy, settings):
    """Resetting rows of weight 0, a stop by KL, minibatches in parts, both estimators: the eager numbers to the bit.

    The buffers keep their addresses, and what a call has returned is not overwritten by the next one.
    """
    learn, example = job(policy, normalized=True, **settings)
    with recorded_graphs():
        captured = GraphedProgram(learn, example)
        buffers = [*captured._buffers, *tree_leaves(tuple(captured._results))]
        places, returned = [x.data_ptr() for x in buffers], []
        for seed in (0, 9):
            arguments = job(policy, seed=seed, normalized=True, **settings)[1]
            returned.append((captured(*arguments), learn(*arguments)))
        for ours, theirs in returned:
            assert_equal(ours, theirs)
        assert [x.data_ptr() for x in buffers] == places


def test_bound_arguments_are_copied_once():
    """`act` with parameters that are bound, called with observations."""
    with recorded_graphs(), torch.no_grad():
        _, (params, _, rollout, _, _, normalization) = job(CATEGORICAL_POLICY)
        act, noise = partial(act_from_params, policy=CATEGORICAL_POLICY), torch.randn(4, 3)
        bound = GraphedProgram(act, (params * 2, normalization, rollout["obs"][0], noise)).bind((params, normalization), ())
        for obs in rollout["obs"]:
            assert_equal((bound(obs, noise),), (act(params, normalization, obs, noise),))


def run_of(run_dir, *flags):
    """(summary, rows of metrics.csv without times) of a short run."""
    common = ["--num-envs", "4", "--num-steps", "16", "--num-minibatches", "2", "--num-threads", "1", "--eval-episodes", "0"]
    assert console([*common, "--device", "cpu", "--plain", "--run-dir", str(run_dir), *flags]) == 0
    return json.loads((run_dir / "summary.json").read_text()), rows_of(run_dir)


def rows_of(run_dir):
    """metrics.csv without times."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [{name: x for name, x in row.items() if name not in TIMES} for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    "flags",
    [
        [
            "--env-id",
            "Pendulum-v1",
            "--vectorization",
            "sync",
            "--norm-obs",
            "--norm-reward",
            "--anneal-lr",
            "--target-kl",
            "0.01",
        ],
        ["--env-id", "CartPole-v1", "--backend", "torch", "--rnn", "gru", "--rnn-hidden-size", "8", "--no-anneal-lr"],
    ],
    ids=["environments on the host", "on the device, memory"],
)
def test_runs_with_captured_programs_are_the_eager_ones(flags, tmp_path, monkeypatch):
    """Statistics, annealing and episodes that go on reach the buffers: every metric of five iterations is that of the eager
    run, to the last digit. So it is after a --resume, which captures anew.
    """
    _, eager = run_of(tmp_path / "eager", *flags, "--num-iterations", "5", "--compile", "off")
    monkeypatch.setattr(ProgramSelector, "on_gpu", True)
    with recorded_graphs():
        summary, captured = run_of(tmp_path / "captured", *flags, "--num-iterations", "5")
        assert (summary["tier"], set(summary["deviations"].values())) == ("cuda-graph", {0.0})
        assert captured == eager
        if "torch" in flags:
            run = tmp_path / "resumed"
            run_of(run, *flags, "--num-iterations", "3")
            assert console(["--resume", str(run), "--num-iterations", "5", "--plain"]) == 0
            assert rows_of(run) == eager


def plan_of(part):
    """A plan as nested lists: a number of operations for each graph, (times, [...]) for each loop."""
    if isinstance(part, Repeated):
        return part.times, [plan_of(inner) for inner in part.parts]
    return len(part.names)


def traced(monkeypatch, case, **settings):
    """The plan of `learn`, on meta tensors."""
    with prepared(monkeypatch, case, **settings) as task, watched_graphs(lambda: META):
        if case.startswith("ranks"):
            task = replace(task, ranks=replace(task.ranks, device=META))
        buffers = allocate_buffers(on_cpu(task))
        learn = build_programs(task, *to_meta((buffers.learn_arguments(), buffers.noise)))["learn"]
        return plan_of(GraphedProgram(learn.program, to_meta(learn.example), learn.seeds)._loops._whole)


@pytest.mark.parametrize("case", CASES)
def test_a_minibatch_is_one_small_graph(case, monkeypatch):
    """Gradients included, `learn` waits for nothing, reads nothing of the host, and replays one minibatch's graph."""
    seeds = CASES[case][0].get("num_seeds", 1) if case in ("seeds, images", "seeds, module") else 1  # one after the other
    times, parts = traced(monkeypatch, case)
    assert times == 1
    loops = [part for part in parts if isinstance(part, tuple)]
    assert [loop[0] for loop in loops] == [4] * seeds  # 2 epochs of 2 minibatches
    for _, graphs in loops:
        (operations,) = graphs
        remembers, most = "rnn" in CASES[case][0], OF_A_MINIBATCH + ("beta" in case) * OF_BETA
        assert 100 < operations < most + remembers * OF_A_STEP_OF_MEMORY * COMMON["num_steps"]


@pytest.mark.parametrize("case", ["one", "dict", "seeds", "images"])
def test_graphs_do_not_grow(case, monkeypatch):
    """Twice the epochs, minibatches and environments: the same operations, more replays."""
    larger = {"update_epochs": 4, "num_minibatches": 4, "num_envs": 8}
    (_, few), (_, many) = (traced(monkeypatch, case, **settings) for settings in ({}, larger))
    assert [part if isinstance(part, int) else part[1] for part in few] == [
        part if isinstance(part, int) else part[1] for part in many
    ]
    assert [part[0] for part in few if isinstance(part, tuple)] == [4]
    assert [part[0] for part in many if isinstance(part, tuple)] == [16]


def test_images_in_parts_are_loops_in_a_loop(monkeypatch):
    """A minibatch of more rows than go through a CNN at once: its parts are replayed, and so are the passes of the rollout."""
    monkeypatch.setattr("fastppo.training.programs.ROWS_PER_PASS", 8)
    _, parts = traced(monkeypatch, "images")
    passes, update = (part for part in parts if isinstance(part, tuple))
    assert passes[0] == 6  # of 6 rows: 9 * 4 in all
    assert (update[0], [part[0] for part in update[1] if isinstance(part, tuple)]) == (4, [2])  # 16 rows of a minibatch


def recorded_loop(body, carry, xs):
    """`StaticLoops` with a program that is one loop: (loops, its results)."""
    loops = StaticLoops(RecordedGraph)
    loops.warm_up(lambda: loops.scan(body, carry, xs))
    return loops, loops.capture(lambda: loops.scan(body, carry, xs))


def test_a_loop_keeps_its_addresses():
    """The results of two replays are in the same memory, and so are the buffers of the loop."""
    start, xs = torch.zeros(2), torch.arange(6.0).view(3, 2)
    loops, (last, (sums,)) = recorded_loop(lambda carry, x: (carry + x[0], (carry + x[0],)), start, (xs,))
    places = [x.data_ptr() for x in (last, sums, loops._loops[0].position)]
    for factor in (1.0, 2.0):
        xs.copy_(torch.arange(6.0).view(3, 2) * factor)
        loops.replay()
        assert sums.tolist() == [[0.0, factor], [2 * factor, 4 * factor], [6 * factor, 9 * factor]]
        assert last.tolist() == [6 * factor, 9 * factor]
        assert [x.data_ptr() for x in (last, sums, loops._loops[0].position)] == places


def test_a_carry_may_change_places():
    """Fibonacci's numbers: the new carry holds an old one under another name, which is read before it is written."""

    def body(carry, x):
        older, newer = carry
        return (newer, older + newer), (older,)

    start, xs = (torch.zeros(()), torch.ones(())), (torch.zeros(7),)
    loops, (last, (numbers,)) = recorded_loop(body, start, xs)
    loops.replay()
    assert numbers.tolist() == [0, 1, 1, 2, 3, 5, 8]
    assert [x.item() for x in last] == [13, 21]
    assert [x.item() for x in scan(body, start, xs)[0]] == [13, 21]


def test_a_loop_in_a_loop():
    """Sums of rows, and their sum: the inner loop starts anew in each step of the outer one."""

    def row(loops):
        def outer(total, x):
            of_row, _ = loops.scan(lambda carry, y: (carry + y[0], (y[0],)), torch.zeros(()), (x[0],))
            return total + of_row, (of_row,)

        return outer

    table, loops = torch.arange(12.0).view(3, 4), StaticLoops(RecordedGraph)
    for run in (loops.warm_up, loops.capture):
        total, (sums,) = run(lambda: loops.scan(row(loops), torch.zeros(()), (table,)))
    table += 1.0
    loops.replay()
    assert (total.item(), sums.tolist()) == (78.0, [10.0, 26.0, 42.0])
    _, parts = plan_of_loops(loops)
    assert parts == [(3, [4])]


def plan_of_loops(loops):
    """(1, [(times, [times, ...]), ...]) of loops in loops."""

    def times(part):
        return part.times, [times(inner)[0] for inner in part.parts if isinstance(inner, Repeated)]

    return 1, [times(part) for part in loops._whole.parts if isinstance(part, Repeated)]
