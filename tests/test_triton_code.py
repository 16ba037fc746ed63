"""The compiled minibatch step of a GPU: Inductor writes Triton code, which is compiled for two generations of cards, not run.

Needs the package triton, which brings NVIDIA's assembler, and no GPU: tests/support/triton_code.py. Minutes: marked slow.
"""

import contextlib
from dataclasses import replace

import pytest
import torch

from fastppo.config import TrainConfig
from fastppo.training.job import allocate_buffers
from fastppo.training.programs import build_programs
from fastppo.training.setup import prepare

pytest.importorskip("triton")
from support.triton_code import card, compiled, kernels_of, launches_of, steps_of, triton_code

pytestmark = pytest.mark.slow
SMALL = {"num_envs": 8, "num_steps": 16, "num_minibatches": 2, "num_threads": 1, "check_env": False, "device": "cpu"}
PICTURES = {"env_id": "environments:AnySpacesVector-v0", "env_kwargs": {"observation": "image (C, H, W)"}}
CONTINUOUS = {"env_id": "Pendulum-v1", "norm_obs": True, "norm_reward": True}
# settings, and most launches of Triton kernels and of libraries in a minibatch; eager there are about 171
RUNS = {
    "discrete": ({}, 50, 12),
    "continuous": (CONTINUOUS, 50, 12),
    "nature": (PICTURES, 80, 40),
    "nature, bf16": ({**PICTURES, "bf16": True}, 100, 40),
}


@pytest.mark.parametrize("case", RUNS)
def test_a_minibatch_is_few_kernels(case, monkeypatch, tmp_path):
    """Each kernel is assembled for sm_80 and sm_90. A bound on their number notices a change that takes fusion away."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    settings, most_kernels, most_calls = RUNS[case]
    with contextlib.ExitStack() as cleanup:
        task = prepare(TrainConfig(**{**SMALL, **settings}), None, None, cleanup)
        buffers = allocate_buffers(task)
        on_gpu = replace(task, device=torch.device("meta"))  # programs as on a GPU
        spec = build_programs(on_gpu, buffers.learn_arguments(), buffers.noise)["learn"]
        graph, inputs = steps_of(spec.program, spec.example)[0]
    for capability in (80, 90):
        with card(capability):
            code = triton_code(graph, inputs)
            binaries = compiled(code)
        kernels, calls = launches_of(code)
        print(f"{case}, sm_{capability}: {kernels} launches of {len(binaries)} Triton kernels, {calls} calls of libraries")
        assert set(binaries) == set(kernels_of(code))
        assert all(binary.asm["cubin"] for binary in binaries.values())
        assert {binary.metadata.target.arch for binary in binaries.values()} == {capability}
        assert 0 < kernels <= most_kernels
        assert 0 < calls <= most_calls
