"""The CUDA tier: the same numbers as eager programs on the same device. Needs a GPU: scripts/test.sh -m gpu."""

import json
from functools import partial

import pytest
import torch

from fastppo.compile.cuda_graph import GraphedProgram
from fastppo.core.acting import act_from_params
from fastppo.core.gradient import functional_grad_and_aux
from fastppo.core.seed_axis import Seeds, over_seeds, stack
from fastppo.train import console
from support.programs import CATEGORICAL_POLICY, NORMAL_POLICY, assert_same, job
from support.tensor_envs import KINDS, TensorTwin, act, started

pytestmark = pytest.mark.gpu


def on_gpu(tree):
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.cuda(), tree)


@pytest.mark.parametrize(
    ("settings", "compiled"),
    [({}, False), ({"microbatch_size": 5}, False), ({"norm_adv": False}, False), ({}, True)],
    ids=["captured", "in parts", "advantages as they are", "compiled"],
)
@pytest.mark.parametrize("policy", [CATEGORICAL_POLICY, NORMAL_POLICY], ids=["Categorical", "Normal"])
def test_graphed_learn_equals_eager(policy, settings, compiled):
    """Parameters, Adam's state and metrics, KL stop and masked rows included, for other data than it was captured with."""
    settings = {**settings, "target_kl": 0.01}
    learn, example = job(policy, **settings)
    graphed = GraphedProgram(learn, on_gpu(example), compiled=compiled)
    for seed in (0, 9):
        arguments = on_gpu(job(policy, seed=seed, **settings)[1])
        assert_same(graphed(*arguments), learn(*arguments))


@pytest.mark.parametrize("compiled", [False, True], ids=["captured", "compiled"])
def test_graphed_learn_of_seeds_equals_eager(compiled):
    """Two agents by vmap."""
    learn, _ = job(NORMAL_POLICY, grad_and_aux=functional_grad_and_aux)
    first, then = (on_gpu(stack([job(NORMAL_POLICY, seed=seed)[1] for seed in seeds])) for seeds in ((0, 1), (4, 5)))
    graphed = GraphedProgram(learn, first, Seeds(2, 2, 1), compiled=compiled)
    torch.testing.assert_close(graphed(*then).params, over_seeds(learn)(*then).params, rtol=2e-4, atol=2e-6)


def test_replays_wait_for_nothing():
    """CUDA's own check: no operation between the arguments and the results makes the host wait."""
    learn, example = job(CATEGORICAL_POLICY)
    graphed, arguments = GraphedProgram(learn, on_gpu(example)), on_gpu(example)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graphed(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_graphed_act_equals_eager():
    """Bound once, called with other observations and noise."""
    _, (params, _, rollout, _, _, normalization) = on_gpu(job(CATEGORICAL_POLICY))
    act = partial(act_from_params, policy=CATEGORICAL_POLICY)
    noise = torch.randn(4, 3, device="cuda")
    bound = GraphedProgram(act, (params, normalization, rollout["obs"][0], noise)).bind((params, normalization), ())
    for obs in rollout["obs"]:
        assert torch.equal(bound(obs, noise), act(params, normalization, obs, noise))


@pytest.mark.parametrize("backend", ["gymnasium", "torch"])
@pytest.mark.parametrize("more", [[], ["--rnn", "gru"], ["--num-seeds", "2"]], ids=" ".join)
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_training_on_the_gpu(env_id, more, backend, tmp_path):
    """A whole run on --device cuda with captured programs, environments on the host and on the GPU. None differs from eager."""
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
        *more,
    ]
    assert console(flags) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["device"], summary["tier"]) == ("cuda:0", "cuda-graph")
    assert max(summary["deviations"].values()) < 1e-2


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
