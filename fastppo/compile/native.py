"""Operators and a memory pool that compiled programs use and PyTorch lacks. native.cpp is built once per machine.

- `fastppo::all_reduce`: the sum over worker threads, and over processes (compile/workers.py).
- `CELLS`: LSTM and GRU over whole sequences (core/recurrence.py), in recurrence.h. Scans inside the compiled program take twice
  as long (benchmarks/LOG.md).
- `mlp_pack`, `mlp_act_packed`: acting of perceptrons (fused/actor.h) in acting.h. 128 steps of eight CartPoles take 1.0 ms
  instead of 1.4 (benchmarks/LOG.md).
- A memory pool for CPU tensors, which reuses blocks of equal size. 16 minibatches of 128 rows take 3.3 ms instead of 3.7, and
  128 steps of eight CartPoles 1.5 ms instead of 1.9 (benchmarks/LOG.md).
"""

import ctypes
import functools
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastppo.core.recurrence import Cells

SOURCE = Path(__file__).with_name("native.cpp")
SOURCES = (SOURCE, *sorted(SOURCE.parent.glob("*.h")), *sorted(SOURCE.parents[1].glob("fused/*.h")))
NO_COMPILER = "there is no C++ compiler; install g++ or name one in CXX"


@torch.library.custom_op("fastppo::all_reduce", mutates_args=())
def all_reduce(x: Tensor, worker: Tensor, over_ranks: bool) -> Tensor:
    """core.sharding.AllReduce of float32 `x`. Blocks until all workers have called it. In compiled programs only."""
    raise RuntimeError("fastppo::all_reduce runs in compiled programs only")


@all_reduce.register_fake
def _(x: Tensor, worker: Tensor, over_ranks: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _like(states: Tensor, size: int, steps: bool = True) -> Tensor:
    """A new tensor (T, K, n, size), or (K, n, size)."""
    return states.new_empty((*(states.shape[:-1] if steps else states.shape[1:-1]), size))


@torch.library.custom_op("fastppo::lstm", mutates_args=())
def lstm(gates: Tensor, weight: Tensor, keep: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """core.recurrence.Cells.lstm of contiguous float32 tensors. In compiled programs only."""
    raise RuntimeError("fastppo::lstm runs in compiled programs only")


@lstm.register_fake
def _(gates: Tensor, weight: Tensor, keep: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _like(gates, h.shape[-1]), _like(gates, h.shape[-1]), _like(gates, gates.shape[-1])


@torch.library.custom_op("fastppo::lstm_backward", mutates_args=())
def lstm_backward(
    weight: Tensor, keep: Tensor, into_c: Tensor, slope: Tensor, f: Tensor, grad_h: Tensor, grad_c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """core.recurrence.Cells.lstm_backward of contiguous float32 tensors. In compiled programs only."""
    raise RuntimeError("fastppo::lstm_backward runs in compiled programs only")


@lstm_backward.register_fake
def _(
    weight: Tensor, keep: Tensor, into_c: Tensor, slope: Tensor, f: Tensor, grad_h: Tensor, grad_c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    width = grad_h.shape[-1]
    return _like(grad_h, 4 * width), _like(grad_h, width, steps=False), _like(grad_h, width, steps=False)


@torch.library.custom_op("fastppo::gru", mutates_args=())
def gru(gates: Tensor, weight: Tensor, bias: Tensor, keep: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """core.recurrence.Cells.gru of contiguous float32 tensors. In compiled programs only."""
    raise RuntimeError("fastppo::gru runs in compiled programs only")


@gru.register_fake
def _(gates: Tensor, weight: Tensor, bias: Tensor, keep: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    return _like(gates, h.shape[-1]), _like(gates, 4 * h.shape[-1])


@torch.library.custom_op("fastppo::gru_backward", mutates_args=())
def gru_backward(weight: Tensor, keep: Tensor, slope: Tensor, z: Tensor, grad_h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """core.recurrence.Cells.gru_backward of contiguous float32 tensors. In compiled programs only."""
    raise RuntimeError("fastppo::gru_backward runs in compiled programs only")


@gru_backward.register_fake
def _(weight: Tensor, keep: Tensor, slope: Tensor, z: Tensor, grad_h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    width = grad_h.shape[-1]
    return _like(grad_h, 3 * width), _like(grad_h, width), _like(grad_h, width, steps=False)


@torch.library.custom_op("fastppo::mlp_pack", mutates_args=())
def mlp_pack(params: Tensor, network: Sequence[int], size: int) -> Tensor:
    """The parameters (P,) as `mlp_act_packed` takes them, (size,) float32. In compiled programs only.

    network: as fused.operators.network_shape takes it. size: at least what the actor needs; the call fails if it is less.
    """
    raise RuntimeError("fastppo::mlp_pack runs in compiled programs only")


@mlp_pack.register_fake
def _(params: Tensor, network: Sequence[int], size: int) -> Tensor:
    return params.new_empty(size)


@torch.library.custom_op("fastppo::mlp_act_packed", mutates_args=())
def mlp_act_packed(packed: Tensor, obs: Tensor, noise: Tensor, network: Sequence[int], columns: int, discrete: bool) -> Tensor:
    """fused.operators.mlp_act without a mask, of packed parameters. Contiguous float32 tensors. In compiled programs only.

    columns: of the action. discrete: whether it is int64, else float32.
    """
    raise RuntimeError("fastppo::mlp_act_packed runs in compiled programs only")


@mlp_act_packed.register_fake
def _(packed: Tensor, obs: Tensor, noise: Tensor, network: Sequence[int], columns: int, discrete: bool) -> Tensor:
    return noise.new_empty((*noise.shape[:-1], columns), dtype=torch.int64 if discrete else torch.float32)


def _of_contiguous(operator: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: operator(*(x.contiguous() for x in args))


CELLS = Cells(*map(_of_contiguous, (lstm, lstm_backward, gru, gru_backward)))


def declarations() -> dict[Any, list[str]]:
    """The C declaration of each operator in native.cpp, for Inductor's custom_ops_to_c_shims."""
    numbers = {"all_reduce": (2, 1), "lstm": (5, 3), "lstm_backward": (7, 3), "gru": (5, 2), "gru_backward": (5, 3)}
    network = "const int64_t*, int64_t"
    signatures = {
        torch.ops.fastppo.mlp_pack.default: [
            f"AOTITorchError aoti_torch_cpu_mlp_pack(AtenTensorHandle, {network}, int64_t, AtenTensorHandle*)"
        ],
        torch.ops.fastppo.mlp_act_packed.default: [
            f"AOTITorchError aoti_torch_cpu_mlp_act_packed({', '.join(['AtenTensorHandle'] * 3)}, {network}, "
            "int64_t, int32_t, AtenTensorHandle*)"
        ],
    }
    for name, (inputs, outputs) in numbers.items():
        flags = ["int32_t"] if name == "all_reduce" else []
        arguments = ", ".join(["AtenTensorHandle"] * inputs + flags + ["AtenTensorHandle*"] * outputs)
        signatures[getattr(torch.ops.fastppo, name).default] = [f"AOTITorchError aoti_torch_cpu_{name}({arguments})"]
    return signatures


def compiler() -> str:
    """The C++ compiler: $CXX, or g++ if that is unset or empty."""
    return os.environ.get("CXX", "").strip() or "g++"


def words_of(compiler: str) -> list[str]:
    """The compiler as a list of words. As for make, CXX may contain arguments ("ccache g++", "g++ -O1")."""
    if shutil.which(compiler) is not None:  # the path may contain spaces
        return [compiler]
    try:
        return shlex.split(compiler)
    except ValueError:  # an unclosed quotation mark
        return [compiler]


def has_compiler() -> bool:
    """Whether the C++ compiler exists. Programs in the cache load without it."""
    return shutil.which(words_of(compiler())[0]) is not None


def single_file(compiler: str, directory: Path) -> str:
    """The compiler as one word, as Inductor requires. A compiler of several words becomes a script in `directory`.

    Inductor recognises g++ and clang by the file name, so the script has the compiler's name.
    """
    words = words_of(compiler)
    if words == [compiler] and compiler.split() == [compiler]:
        return compiler
    names = [Path(word).name for word in words]
    script = directory / next((name for name in names if re.search(r"clang|g\+\+|gcc", name)), names[0])
    script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', encoding="utf-8")
    script.chmod(0o700)
    return str(script)


def command(source: Path, library: Path, *flags: str) -> list[str]:
    """The command that compiles one C++ file to a library for this processor."""
    this_processor = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"  # clang's flag on ARM
    optimized = ("-std=c++20", "-O3", this_processor, "-fPIC", "-shared")
    return [*words_of(compiler()), *optimized, str(source), "-o", str(library), *flags]


def build(library: Path) -> None:
    """Compile native.cpp for this processor in 3 s. Raises OSError, or CalledProcessError with the compiler's output."""
    torch_dir = Path(torch.__file__).parent
    flags = [
        f"-I{torch_dir / 'include'}",
        "-fno-math-errno",  # without these two a square root is a call, and loops with a clamp are not vectorised
        "-fno-trapping-math",
        *(f"-L{torch_dir / 'lib'}", f"-Wl,-rpath,{torch_dir / 'lib'}", "-lc10", "-ltorch_cpu"),
    ]
    environment = {**os.environ, "LC_ALL": "C"}  # errors in English
    subprocess.run(
        command(SOURCE, library, *flags), check=True, capture_output=True, encoding="utf-8", errors="replace", env=environment
    )


@functools.cache
def load(library: Path) -> None:
    """Load the operators for programs loaded later, and install the memory pool for CPU tensors. Raises OSError."""
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL).fastppo_pool_memory()
