"""The CUDA tier: the same numbers as eager programs on the same device. Needs a GPU: scripts/test.sh -m gpu."""

import json
from functools import partial

import pytest
import torch

from fastppo.compile.cuda_graph import GraphedProgram
from fastppo.core.acting import act_from_params
from fastppo.train import console
from support.programs import CATEGORICAL_POLICY, NORMAL_POLICY, assert_same, job
from support.tensor_envs import KINDS, TensorTwin, act, started

pytestmark = pytest.mark.gpu


def on_gpu(tree):
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.cuda(), tree)


@pytest.mark.parametrize("policy", [CATEGORICAL_POLICY, NORMAL_POLICY], ids=["Categorical", "Normal"])
def test_graphed_learn_equals_eager(policy):
    """Parameters, Adam's state and metrics, KL stop and masked rows included, for other data than it was captured with."""
    learn, example = job(policy, target_kl=0.01)
    graphed = GraphedProgram(learn, on_gpu(example))
    for seed in (0, 9):
        arguments = on_gpu(job(policy, seed=seed, target_kl=0.01)[1])
        assert_same(graphed(*arguments), learn(*arguments))


def test_graphed_act_equals_eager():
    """Bound once, called with other observations and noise."""
    _, (params, _, rollout, _, _, normalization) = on_gpu(job(CATEGORICAL_POLICY))
    act = partial(act_from_params, policy=CATEGORICAL_POLICY)
    noise = torch.randn(4, 3, device="cuda")
    bound = GraphedProgram(act, (params, normalization, rollout["obs"][0], noise)).bind((params, normalization), ())
    for obs in rollout["obs"]:
        assert torch.equal(bound(obs, noise), act(params, normalization, obs, noise))


@pytest.mark.parametrize("backend", ["gymnasium", "torch"])
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_training_on_the_gpu(env_id, backend, tmp_path):
    """A whole run on --device cuda with captured programs, environments on the host and on the GPU."""
    flags = [
        "--env-id",
        env_id,
        "--backend",
        backend,
        "--device",
        "cuda",
        "--num-iterations",
        "4",
        "--plain",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    assert console(flags) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["device"], summary["tier"]) == ("cuda:0", "cuda-graph")


@pytest.mark.parametrize(("mode", "final"), KINDS)
def test_environments_of_tensors_on_another_device(mode, final):
    """Tensors on the CPU fill a rollout on the GPU with the same rows, and get their actions back on the CPU."""
    here, rollout, noise = started(TensorTwin(4, mode, final), 20)
    there, on_gpu_rollout, gpu_noise = started(TensorTwin(4, mode, final), 20, device=torch.device("cuda"))
    here.collect(act, noise)
    there.collect(act, gpu_noise)
    for key, rows in rollout.items():
        assert torch.equal(rows, on_gpu_rollout[key].cpu()), key
    for ours, theirs in zip(here.outcomes(), there.outcomes(), strict=True):
        assert (ours == theirs).all()
