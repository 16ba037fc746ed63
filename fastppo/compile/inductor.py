"""Compile with Inductor: a whole program into one library for the CPU, or one step of a loop for a GPU. Knows no algorithm.

compile/trace.py traces the program once, Inductor generates C++ for all of it, and g++ compiles a library. The cache stores the
library. Other processes load it without importing Inductor, tracing or compiling (compile/compiled_program.py).

    try:
        fast = load_program(learn, example, cache_dir)       # milliseconds; None if it is not in the cache
        fast = fast or compile_program(learn, example, cache_dir)   # tens of seconds on one core
        building = BackgroundCompile(learn, example, cache_dir)  # or compile in another process
        fast = building.poll()                             # None until it is ready
    except CompileError as reason:                               # one line; training continues eagerly
        ...

`learn` is functools.partial(ppo.learn, policy=..., config=..., execution=...). A partial of acting.act_from_params works too.
All settings are keyword arguments. `example` is the tuple of positional arguments. The library accepts only tensors of the same
shapes, dtypes and strides.
"""

import contextlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastppo.compile import library_cache, native
from fastppo.compile.compile_errors import CompileError, LoadError, explain, first_line
from fastppo.compile.compiled_program import CompiledProgram, load
from fastppo.compile.key import cache_key, native_key
from fastppo.compile.program import Example, Program, flat_tensors, of_one_call
from fastppo.compile.trace import trace
from fastppo.compile.workers import Exchange
from fastppo.core.seed_axis import Seeds

INDUCTOR_OPTIONS: dict[str, Any] = {
    "cpp_wrapper": True,
    # The pattern matcher spends 2 s tracing its own patterns. Here it would only create addmm, which copies the bias into the
    # output before the product. Adding the bias in the activation's kernel is faster.
    "pattern_matcher": False,
    # Fused multiply-add: 5 % of `learn`.
    "cpp.enable_floating_point_contract_flag": "fast",
    # Precompiled headers cost 16 s once and save 4 s per compilation. Each program is compiled once and cached.
    "aot_inductor.precompile_headers": False,
    # Skips a test program that Inductor would compile and run (2.5 s). /proc/cpuinfo gives the same answer.
    "cpp.vec_isa_ok": True,
}
MOST_OPERATIONS = 1000  # of a step for a GPU; the sequences of a policy with memory have more


def compile_program(
    program: Program,
    example: Example,
    cache_dir: Path,
    seeds: Seeds | None = None,
    exchange: Exchange | None = None,
) -> CompiledProgram:
    """The compiled program, loaded from the cache or built and stored there. Raises CompileError with a reason of one line.

    A cached library that does not load is rebuilt once.
    """
    key = cache_key(program, example, seeds)
    with contextlib.suppress(LoadError):
        loaded = load(program, example, cache_dir, key, seeds, exchange)
        if loaded is not None:
            return loaded
    if any(tensor.device.type != "cpu" for tensor in flat_tensors(example)):
        raise CompileError("this tier compiles for the CPU only")
    if not native.has_compiler():
        raise CompileError(native.NO_COMPILER)
    try:
        with tempfile.TemporaryDirectory(prefix="build-", dir=cache_dir, ignore_cleanup_errors=True) as build_dir:
            if library_cache.find(cache_dir, native_key()) is None:
                helpers = Path(build_dir, "native.so")
                native.build(helpers)
                library_cache.keep(helpers, cache_dir, native_key(), _about("helpers of all programs"))
            library_cache.keep(_build(program, example, build_dir, seeds), cache_dir, key, _about(_title(program, example)))
    except Exception as error:  # the compiler can raise anything; training then continues eagerly
        raise CompileError(explain(error, cache_dir)) from error
    try:
        loaded = load(program, example, cache_dir, key, seeds, exchange)
    except LoadError as error:  # it was just built here, so building it again would not help
        library_cache.refuse(cache_dir, key, str(error))
        raise
    if loaded is None:
        raise CompileError(f"the program vanished from {cache_dir} while it was being built")
    return loaded


def compile_step(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """One step of a loop, compiled in this process for the device of its inputs; without CUDA graphs. Raises CompileError.

    What Inductor writes is kept in the cache's directory as long as the step is in use.
    """
    if len(graph.graph.nodes) > MOST_OPERATIONS:
        raise CompileError(f"a step of {len(graph.graph.nodes)} operations is too large to compile")
    cache_dir = library_cache.cache_dir()
    library_cache.check_cache_dir(cache_dir)
    try:
        from torch._inductor import compile as compile_graph

        directory = tempfile.TemporaryDirectory(prefix="build-", dir=cache_dir, ignore_cleanup_errors=True)
        with _environment("TORCHINDUCTOR_CACHE_DIR", directory.name), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # --tf32 is the user's choice
            compiled = compile_graph(graph, list(inputs), options={"triton.cudagraphs": False})
            compiled(*inputs)
    except Exception as error:  # compilers and drivers raise errors of many types
        raise CompileError(f"a step could not be compiled: {type(error).__name__}: {first_line(error)}") from error

    def step(*given: Tensor, _directory: Any = directory) -> Any:
        return compiled(*given)

    return step


def _about(title: str) -> dict[str, str]:
    """Description for the listing of the cache."""
    return {"program": title, "torch": str(torch.__version__)}


def _title(program: Program, example: Example) -> str:
    """`learn of MLPActorCritic, 9,155 parameters`."""
    name = program.func.__name__.removesuffix("_from_params")
    policy = type(program.keywords["policy"]).__name__
    return f"{name} of {policy}, {example[0].shape[-1]:,} parameters"


def _build(program: Program, example: Example, build_dir: str, seeds: Seeds | None = None) -> Path:
    """Trace the program, generate C++ and compile it. Returns the path of the library in `build_dir`."""
    # Inductor's default directory under /tmp is not protected from other users. LC_ALL: `explain` reads English messages.
    with _environment("TORCHINDUCTOR_CACHE_DIR", build_dir), _environment("LC_ALL", "C"):
        import torch._inductor.config as inductor_config
        from torch._dynamo.utils import get_metrics_context
        from torch._guards import TracingContext, tracing
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.virtualized import V

        mapped = seeds is not None and seeds.per_call > 1
        graph, inputs = trace(program, of_one_call(example, seeds), mapped)
        options = {
            **INDUCTOR_OPTIONS,
            "cpp.cxx": (None, native.single_file(native.compiler(), Path(build_dir))),
            "aot_inductor.output_path": str(Path(build_dir, "program.so")),
            "aot_inductor.custom_ops_to_c_shims": native.declarations(),
        }
        fake_mode = inputs[0].fake_mode
        with (
            inductor_config.patch(options),
            V.set_aot_compilation(True),
            V.set_fake_mode(fake_mode),
            tracing(TracingContext(fake_mode)),
            get_metrics_context(),
        ):
            compiled: Any = compile_fx_inner(graph, inputs, is_inference=True, cpp_wrapper=True)
    files = compiled.filename if isinstance(compiled.filename, list) else [compiled.filename]
    return next(Path(file) for file in files if str(file).endswith(".so"))


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
