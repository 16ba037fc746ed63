"""native.cpp, built once a machine and loaded: what compiled programs need and PyTorch has not got.

- `fastppo::all_reduce`, the sum over worker threads that run one program each, and over processes of such (core/team.py);
- memory of CPU tensors that is kept for the next of that size instead of going back to the system: with it 16 minibatches of
  128 rows take 3.3 ms instead of 3.7, and 128 steps of eight CartPoles 1.5 instead of 1.9 (benchmarks/LOG.md).
"""

import ctypes
import functools
import os
import subprocess
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("native.cpp")
ALL_REDUCE_DECLARATION = (
    "AOTITorchError aoti_torch_cpu_all_reduce(AtenTensorHandle, AtenTensorHandle, int32_t, AtenTensorHandle*)"
)


@torch.library.custom_op("fastppo::all_reduce", mutates_args=())
def all_reduce(x: Tensor, worker: Tensor, over_ranks: bool) -> Tensor:
    """core.programs.AllReduce of float32 `x`: waits for the others. In compiled programs only."""
    raise RuntimeError("fastppo::all_reduce runs in compiled programs only")


@all_reduce.register_fake
def _(x: Tensor, worker: Tensor, over_ranks: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def compiler() -> str:
    """The C++ compiler: $CXX, or g++."""
    return os.environ.get("CXX", "g++")


def build(library: Path) -> None:
    """Compile native.cpp for this processor, 2 s. Raises OSError or subprocess.CalledProcessError with the compiler's words."""
    torch_dir = Path(torch.__file__).parent
    command = [
        *(compiler(), "-std=c++20", "-O3", "-march=native", "-fPIC", "-shared", f"-I{torch_dir / 'include'}"),
        *(str(SOURCE), "-o", str(library), f"-L{torch_dir / 'lib'}", "-lc10", "-ltorch_cpu"),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)


@functools.cache
def load(library: Path) -> None:
    """Make its operator known to the programs loaded later, and its memory that of CPU tensors. Raises OSError."""
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL).fastppo_pool_memory()
