"""The cache key of a compiled program: a digest of everything that its library depends on.

The digest covers our source files, the settings, the layouts of tensors, the machine and its software. A user's network or
environment may have no known source files. Its traced graph is used instead.
"""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastppo.compile import native
from fastppo.compile.program import Example, Program, execution_of, flat_tensors, layout_of, of_one_call
from fastppo.core.compilable import compilable, traits_of
from fastppo.core.seed_axis import Seeds, of_seed

# environment variables of Inductor and of the C++ compiler, apart from CXX
_INDUCTOR_VARIABLES = ("TORCHINDUCTOR_", "TORCH_COMPILE_", "AOT_INDUCTOR_", "AOTINDUCTOR_")
_COMPILER_VARIABLES = ("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "OMP_PREFIX")


def native_key() -> str:
    """The cache key of the library built from native.cpp."""
    return library_key("native", native.SOURCES)


def library_key(name: str, sources: Sequence[Path]) -> str:
    """The cache key of a library of ours that is built from these files by `native.command`."""
    facts = ([_digest(path.read_bytes()) for path in (*sources, Path(native.__file__))], _machine())
    return f"{name}-{_digest(repr(facts).encode())[:25]}"


def cache_key(program: Program, example: Example, seeds: Seeds | None = None) -> str:
    """The cache key of a program: sources, machine and software, threads, settings, layouts of tensors."""
    example = of_one_call(example, seeds)
    mapped = seeds is not None and seeds.per_call > 1
    facts = (
        (_sources(program, of_seed(example, 0) if mapped else example), mapped),
        (_machine(), torch.get_num_threads(), _inductor_settings()),
        (program.func.__qualname__, describe(program.keywords)),
        layout_of(flat_tensors(example)),
    )
    return _digest(repr(facts).encode())[:32]


def describe(value: Any) -> Any:
    """A description of a setting that is equal in every process. It contains no memory addresses."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return (type(value).__qualname__, describe(fields))
    if isinstance(value, Tensor):
        return (tuple(value.shape), str(value.dtype), _digest(value.detach().cpu().contiguous().numpy().tobytes()))
    if isinstance(value, np.ndarray):
        return (value.shape, value.dtype.str, _digest(np.ascontiguousarray(value).tobytes()))
    if isinstance(value, Mapping):
        return [(key, describe(value[key])) for key in sorted(value)]
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(repr(describe(item)) for item in value)
    if isinstance(value, functools.partial):
        return [describe(part) for part in (value.func, value.args, value.keywords)]
    if callable(value) and hasattr(value, "__qualname__"):
        return (value.__module__, value.__qualname__)
    if isinstance(value, torch.nn.Module):  # `_sources` covers its graph; its weights are not part of the program
        return type(value).__qualname__
    if "__repr__" not in {name for kind in type(value).__mro__[:-1] for name in vars(kind)}:  # the default one: an address
        return (type(value).__qualname__, describe(vars(value)))
    return repr(value)


def _sources(program: Program, example: Example) -> list[str]:
    """Digests of all source files of the program, and of the traced graph of the parts without known source."""
    files, graph = _folder_of(compilable) + _folder_of(program.func) + sorted(Path(__file__).parent.glob("*.py")), ""
    bind_act = execution_of(program).bind_act
    files += [] if bind_act is None else _folder_of(getattr(bind_act, "func", bind_act))
    for owner, function, args in traits_of(program.func).calls(*example, **program.keywords):
        sources = owner.sources()
        files += _folder_of(type(owner)) if sources is None else sources
        graph += _graph_text(function, args) if sources is None else ""
    return [_digest(path.read_bytes()) for path in sorted(set(files))] + [_digest(graph.encode())]


def _folder_of(code: type | Callable[..., Any]) -> list[Path]:
    """The Python files in the folder of a class or function; empty if it has no file."""
    with contextlib.suppress(OSError, TypeError):  # defined in a notebook
        return sorted(Path(inspect.getfile(code)).parent.glob("*.py"))
    return []


def _graph_text(function: Callable[..., Any], args: tuple[Any, ...]) -> str:
    """Code and constants of the function's graph, traced with these arguments."""
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(function)(*args)
    constants = {node.target: getattr(graph, node.target) for node in graph.graph.find_nodes(op="get_attr")}
    return f"{graph.code}{describe(constants)}"


def _machine() -> tuple[Any, ...]:
    """Dependencies of a library other than its source: torch, Python, the processor, the C and C++ libraries, the compiler."""
    return (
        (torch.__version__, torch.version.git_version, sys.version),
        (platform.machine(), _processor(), torch.backends.cpu.get_cpu_capability()),
        (platform.libc_ver(), platform.mac_ver()[0], _cpp_library()),
        (native.compiler(), _compiler_version(native.compiler())),
        [(name, os.environ.get(name)) for name in _COMPILER_VARIABLES],
    )


def _inductor_settings() -> list[tuple[str, str]]:
    """Inductor's settings in environment variables. Our own settings are in the source files of this folder."""
    names = [name for name in os.environ if name.startswith(_INDUCTOR_VARIABLES) and name != "TORCHINDUCTOR_CACHE_DIR"]
    return [(name, os.environ[name]) for name in sorted(names)]


@functools.cache
def _cpp_library() -> str:
    """Name and version of the C++ library loaded by this process, as in libstdc++.so.6.0.30. "" if unknown."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
        names = {Path(line.split()[-1]).name for line in lines if "/" in line}
        return " ".join(sorted(name for name in names if name.startswith(("libstdc++.so", "libc++.so"))))
    return ""


@functools.cache
def _compiler_version(compiler: str) -> str:
    """The first line of `compiler --version`. "" if the compiler is missing or fails."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = [*native.words_of(compiler), "--version"]
        output = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=10)
        return output.stdout.partition("\n")[0]
    return ""


def _processor() -> str:
    """Name and instruction sets of the processor. The library is compiled for exactly this processor."""
    with contextlib.suppress(OSError):
        wanted = ("model name", "flags", "Features")
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
        return "\n".join(line for line in lines if line.startswith(wanted))
    return f"{platform.processor()} of {platform.node()}"  # the model is unknown, so no other machine may share the key


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
