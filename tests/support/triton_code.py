"""Triton code of a step for a GPU, on a machine without one: Inductor writes it for pretended tensors, Triton compiles it.

The step is traced on the CPU, as it is on a GPU; its graph then gets the device cuda. Nothing of it runs.
"""

import contextlib
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastppo.compile import cuda_graph
from fastppo.compile.cuda_graph import GraphedProgram
from support.cpu_graphs import recorded_graphs
from support.fake_gpu import no_op_guard

CARDS = {80: (108, "A100"), 90: (132, "H100")}  # multiprocessors


# not what is computed or timed on the device, which is not there: constants, the padding of products
OPTIONS = {
    "triton.cudagraphs": False,
    "compile_threads": 1,
    "fx_graph_cache": False,
    "joint_graph_constant_folding": False,
    "shape_padding": False,
}


class Written(Exception):
    """Inductor has written the code."""


def steps_of(program, example, seeds=None):
    """The steps of a program's loops that would be compiled, the largest first: graphs of the CPU, and their inputs."""
    found = []

    def keep(graph, inputs):
        found.append((graph, inputs))
        return graph

    with recorded_graphs(), torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_graph, "compile_step", keep)
        GraphedProgram(program, example, seeds, compiled=True)
    return sorted(found, key=lambda step: -len(step[0].graph.nodes))


@contextlib.contextmanager
def card(capability):
    """PyTorch finds a GPU of this compute capability."""
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime.hints import DeviceProperties
    from triton.backends.compiler import GPUTarget

    number, name = CARDS[capability]
    major, minor = divmod(capability, 10)
    properties = SimpleNamespace(
        major=major,
        minor=minor,
        name=name,
        multi_processor_count=number,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        total_memory=2**36,
        L2_cache_size=40 * 2**20,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=166912,
    )
    with pytest.MonkeyPatch.context() as patch, no_op_guard():
        DeviceProperties.create.__func__.cache_clear()
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
        patch.setattr(CudaInterface, "is_available", staticmethod(lambda: True))
        patch.setattr(CudaInterface, "get_device_properties", staticmethod(lambda device=None: properties))
        patch.setattr(CudaInterface, "get_compute_capability", staticmethod(lambda device=None: capability))
        patch.setattr(CudaInterface.Worker, "get_device_properties", staticmethod(lambda device=None: properties))
        patch.setattr(torch.cuda, "get_rng_state", lambda device=None: torch.zeros(16, dtype=torch.uint8, device="cpu"))
        patch.setattr(torch.cuda, "set_rng_state", lambda state, device=None: None)
        patch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        for name in ("_exchange_device", "_maybe_exchange_device"):
            patch.setattr(torch.cuda, name, lambda index: 0)
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.version, "cuda", "12.8")
        target = GPUTarget("cuda", capability, 32)
        driver = SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0)
        patch.setattr(sys.modules["triton.runtime.driver"].driver, "_active", driver)
        try:
            yield
        finally:
            DeviceProperties.create.__func__.cache_clear()


def triton_code(graph, inputs):
    """What Inductor writes for a step on the GPU `card` pretends: a Python file with the kernels and their calls."""
    from torch._inductor import compile as compile_graph
    from torch._inductor.graph import GraphLowering

    written = []

    def keep(self, code):
        written.append(code.value)
        raise Written("this far and no further")

    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda:0")}
        # without cuDNN the convolutions of pretended tensors are not channels last, and what was a view there is a copy
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    graph.recompile()
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.MonkeyPatch.context() as patch:
        given = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda:0") for x in inputs]
        patch.setattr(GraphLowering, "_compile_to_module_lines", keep)
        with pytest.raises(Exception, match="this far and no further"):  # Inductor wraps it in an error of its own
            compile_graph(graph, given, options=OPTIONS)
    return written[0]


def kernels_of(code):
    """Sources of the Triton kernels, by name."""
    found = re.findall(r"^(\w+) = async_compile\.triton\('\w+', '''(.*?)'''", code, re.DOTALL | re.MULTILINE)
    return dict(found)


def launches_of(code):
    """(calls of Triton kernels, calls of libraries such as cuBLAS and cuDNN) in the step."""
    kernels = re.findall(r"^\s+\w+\.run\(", code, re.MULTILINE)
    libraries = re.findall(r"^\s+(?:\w+ = )?(?:extern_kernels\.|torch\.ops\.aten\.)[\w.]+\(", code, re.MULTILINE)
    return len(kernels), len(libraries)


def compiled(code):
    """Compile each kernel for the pretended card; binaries by name of the kernel."""
    import triton
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.runtime import triton_helpers

    binaries, compile_kernel = {}, triton.compile
    for name, source in kernels_of(code).items():
        made = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton_helpers, "set_driver_to_gpu", lambda: None)
            patch.setattr(triton, "compile", lambda *args, made=made, **kwargs: made.append(compile_kernel(*args, **kwargs)))
            tuner = getattr(PyCodeCache.load(source), name)
            with contextlib.suppress(AttributeError):  # the binary, None here, is then made ready to be launched
                tuner._precompile_config(tuner.configs[0])
        (binaries[name],) = made
    return binaries
