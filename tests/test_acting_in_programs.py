"""Acting of a perceptron as compiled programs call it: the C functions of compile/acting.h, called here without a program."""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastppo.compile import native
from fastppo.compile.workers import _get_pointer, _new_capsule
from fastppo.fused import operators
from fastppo.fused.kernels import Kernels
from fastppo.fused.mlp_programs import description
from fastppo.policy.distributions import CATEGORICAL
from fastppo.policy.mlp import MLPActorCritic
from support.fused import mlps
from support.kernels import share_helpers


@pytest.fixture(scope="module")
def library(inductor, programs_dir, tmp_path_factory):
    Kernels().ready(wait=True)
    helpers = share_helpers(programs_dir, tmp_path_factory.mktemp("helpers"))
    native.load(helpers)
    return ctypes.CDLL(str(helpers))


def call(function, tensors, *numbers):
    """The tensor that a C function of the helpers makes, or None if it fails."""
    handles = [_get_pointer(capsule, None) for capsule in torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors(tensors)]
    result = ctypes.c_void_p()
    code = function(*map(ctypes.c_void_p, handles), *numbers, ctypes.byref(result))
    for handle in handles:
        delete(ctypes.c_void_p(handle))
    if code != 0:
        return None
    return torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs([_new_capsule(result, None, None)])[0]


delete = ctypes.CDLL(f"{torch.__path__[0]}/lib/libtorch_cpu.so").aoti_torch_delete_tensor_object


def pack(library, network, params, size):
    numbers = (ctypes.c_int64 * len(network))(*network)
    return call(library.aoti_torch_cpu_mlp_pack, [params], numbers, ctypes.c_int64(len(network)), ctypes.c_int64(size))


def act(library, network, packed, obs, noise):
    numbers = (ctypes.c_int64 * len(network))(*network)
    dtype, columns = operators.action_type(network)
    of_action = ctypes.c_int64(columns), ctypes.c_int32(dtype is torch.int64)
    return call(library.aoti_torch_cpu_mlp_act_packed, [packed, obs, noise], numbers, ctypes.c_int64(len(network)), *of_action)


@settings(max_examples=100)
@given(mlp=mlps(), num_rows=st.integers(1, 100), seed=st.integers(0, 1000))
def test_it_acts_as_the_fused_program(library, mlp, num_rows, seed):
    """The same actions for every network, of parameters packed into as much memory as Python says that they need."""
    generator = torch.Generator().manual_seed(seed)
    params = mlp.init(generator) + 0.1 * torch.randn(mlp.num_params, generator=generator)
    obs, noise = (torch.randn(num_rows, size, generator=generator) for size in (mlp.obs_size, mlp.action_size))
    network = description(mlp)
    packed = pack(library, network, params, operators.packed_size(network))
    assert packed is not None
    action = act(library, network, packed, obs, noise)
    expected = operators.mlp_act(params, obs, None, noise, network, 1)
    assert action.dtype is expected.dtype
    torch.testing.assert_close(action, expected, rtol=1e-5, atol=1e-5)


def test_too_little_memory_is_a_failure(library):
    """Nothing is written beyond a tensor that is too small for the parameters."""
    mlp = MLPActorCritic(4, 2, CATEGORICAL, (64, 64))
    assert pack(library, description(mlp), torch.zeros(mlp.num_params), mlp.num_params // 2) is None
