"""What runs on a GPU, on a machine without one: tests/support/fake_gpu.py. Needs no CUDA; tests/test_cuda.py needs a GPU."""

import contextlib

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastppo.compile import selector
from fastppo.config import TrainConfig
from fastppo.envs.classic import CartPole
from fastppo.envs.device import TorchVectorEnv
from fastppo.errors import UsageError
from fastppo.rollout.collector import start_collector
from fastppo.system.devices import resolved
from fastppo.training.job import allocate_buffers
from fastppo.training.programs import build_programs
from fastppo.training.setup import prepare
from support.device_envs import ON_TENSORS
from support.fake_gpu import fake_gpus
from support.gpu_runs import CASES, DEVICE, two_processes, watched_graphs


@contextlib.contextmanager
def prepared(settings, policy, device="cuda:0", current=0):
    """The task of a run on a pretended GPU, and the list of GPUs that were the current one."""
    common = {"num_envs": 4, "num_steps": 4, "num_minibatches": 2, "update_epochs": 2, "num_threads": 2, "check_env": False}
    with fake_gpus(current) as chosen, contextlib.ExitStack() as cleanup:
        yield prepare(TrainConfig(**{**common, "device": device, **settings}), policy, None, cleanup), chosen


@pytest.mark.parametrize("case", CASES)
@pytest.mark.long
def test_what_is_captured_is_the_eager_program(case, monkeypatch):
    """`learn`, and `act` or `collect`, of each kind of run: nothing mixes devices, reads the host's memory or waits for the
    device; results are on the run's GPU, as the eager program's are; the graphs are captured on that GPU. Minibatches are large
    enough for workers, which are threads of a CPU.
    """
    settings, policy = CASES[case]
    ranks = case.startswith("ranks")
    if ranks:
        monkeypatch.setattr("fastppo.training.setup.start_ranks", two_processes)
    monkeypatch.setattr("fastppo.training.setup.MIN_WORKER_ROWS", 1)
    monkeypatch.setattr("fastppo.compile.cuda_graph.WARM_UPS", 1)  # the next two do the same
    expected = torch.device("cuda", 1 if ranks else 0)
    with prepared(settings, policy) as (task, _):
        buffers = allocate_buffers(task)
        jobs = build_programs(task, buffers.learn_arguments(), buffers.noise)
        with watched_graphs(lambda: torch.device("cuda", torch.cuda.current_device())) as graphs:
            chosen = selector.ProgramSelector("auto", jobs, 1, print, task.ranks)
        assert chosen.name == "cuda-graph"
        assert {graph.device for graph in graphs} == {expected}
        for name, job in jobs.items():
            given = job.example[1:] if name == "act" else job.example  # an eager `act` has its parameters already
            with torch.no_grad():
                results = job.eager(*given)
            captured = chosen._forms[name]._results
            for ours, theirs in zip(tree_leaves(tuple(captured)), tree_leaves(tuple(results)), strict=True):
                assert isinstance(ours, Tensor)
                assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, expected)


PYTHON = {"env_id": ON_TENSORS, "backend": "gymnasium"}
COLLECTED = {name: case for name, (case, _) in CASES.items() if case.get("backend") == "torch"}
COLLECTED |= {"tensors of the CPU": PYTHON, "tensors of the CPU, memory": {**PYTHON, "rnn": "gru"}}


@pytest.mark.parametrize("case", COLLECTED)
def test_rollouts_are_filled_on_the_gpu(case, monkeypatch):
    """By one program, or step by step from tensors of the CPU: no step mixes devices, and a second rollout goes on from it."""
    if case.startswith("ranks"):
        monkeypatch.setattr("fastppo.training.setup.start_ranks", two_processes)
    with prepared(COLLECTED[case], None) as (task, _), torch.no_grad():
        buffers = allocate_buffers(task)
        example, noise = buffers.learn_arguments(), buffers.noise
        chosen = selector.ProgramSelector("off", build_programs(task, example, noise), 1, print, task.ranks)
        collector = start_collector(
            task.envs, buffers.rollout, task.obs, task.action, task.environment_seeds(), buffers.rnn_state
        )
        for cut in (False, True):
            collector.collect(chosen.act(example[-1]), noise, cut)
        assert {x.device for x in buffers.rollout.values()} == {task.device}
        states = collector.state_dicts()
        if task.on_device:
            collector.load_state_dicts(states)
            assert {x.device for x in tree_leaves(task.made.running)} == {task.device}


@pytest.mark.parametrize(
    ("device", "current", "expected"), [("cuda", 0, 0), ("cuda", 1, 1), ("cuda:1", 0, 1), ("cuda:0", 1, 0)]
)
def test_a_run_is_on_one_gpu_and_leaves_the_caller_another(device, current, expected):
    """--device cuda is the current GPU, cuda:1 the second; it is current during the run, and the caller's afterwards."""
    with prepared(DEVICE, None, device, current) as (task, chosen):
        on_it = torch.device("cuda", expected)
        assert task.device == task.made.device == on_it
        assert chosen[-1] == expected
        tensors = [task.states[0].params, task.states[0].return_carry, *tree_leaves(task.made.running)]
        assert {x.device for x in tensors} == {on_it}
        assert task.states[0].generators["actions"].device == task.made.generator.device == on_it
    assert chosen[-1] == current


def test_ranks_leave_the_caller_its_gpu(monkeypatch):
    """torchrun's second process trains on the second GPU."""
    monkeypatch.setattr("fastppo.training.setup.start_ranks", two_processes)
    with prepared(DEVICE, None, "cuda") as (task, chosen):
        assert (task.device, chosen[-1]) == (torch.device("cuda:1"), 1)
    assert chosen[-1] == 0


@pytest.mark.parametrize("wanted", ["cuda", "cuda:0", "cuda:1"])
@pytest.mark.parametrize("theirs", ["cuda", "cuda:0", "cuda:1"])
def test_environments_given_on_a_gpu(wanted, theirs):
    """`cuda` is `cuda:0` where that is the current GPU; environments on another one are refused."""
    config = TrainConfig(device=wanted, num_envs=8, num_steps=8, check_env=False)
    with fake_gpus(), contextlib.ExitStack() as cleanup:
        envs = TorchVectorEnv(CartPole(), 8, theirs)
        if resolved(wanted) == resolved(theirs):
            assert prepare(config, None, envs, cleanup).device == envs.device
        else:
            with pytest.raises(UsageError, match=f"--device {resolved(wanted)}: the environments given are on {envs.device}"):
                prepare(config, None, envs, cleanup)


def test_auto_is_the_current_gpu(monkeypatch):
    """--device auto, with environments on cuda:0."""
    config = TrainConfig(device="auto", num_envs=8, num_steps=8, check_env=False)
    with fake_gpus(), contextlib.ExitStack() as cleanup:
        envs = TorchVectorEnv(CartPole(), 8, "cuda:0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr("torch._subclasses.fake_tensor.init_gpu_context", lambda device: None)
        assert prepare(config, None, envs, cleanup).device == torch.device("cuda:0")
