"""The compiled tier on the CPU: a whole `learn`, or `act`, as one shared library. Knows no environment, no configuration.

The only module that names Inductor. A program is traced once (make_fx: no Dynamo, so nothing of the algorithm has to be written
for it), its loop becomes PyTorch's scan operator, Inductor writes C++ for all of it and g++ makes a library. That library is
what the cache holds, so a second process loads it without importing Inductor, tracing or compiling anything.

    try:
        fast = load_program(learn, example, cache_dir)       # milliseconds; None where the cache has nothing
        fast = fast or compile_program(learn, example, cache_dir)   # tens of seconds of one core
        building = BackgroundCompile(learn, example, cache_dir)  # or: the same in another process,
        fast = building.poll()                             # None until it is ready
    except CompileError as reason:                               # one line; eager goes on
        ...

`learn` is functools.partial(ppo.learn, policy=..., minibatch_size=..., ...), or of acting.act_from_params with its
policy, all settings by keyword; `example` is the tuple of its positional arguments: the library fits tensors of exactly those
shapes, dtypes and strides.
"""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import os
import pickle
import platform
import signal
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from fastppo.compile import library_cache, native
from fastppo.compile.compile_errors import explain
from fastppo.compile.workers import WORKER_FIELDS, Exchange, WorkerPool
from fastppo.core import acting, contracts, ppo
from fastppo.core.adam import AdamState
from fastppo.core.contracts import CollectResult, LearnResult
from fastppo.core.gradient import functional_grad_and_aux
from fastppo.core.seed_axis import Seeds, of_seed, over_seeds
from fastppo.system.platforms import end_group, is_private, lower_priority, own_group

Program = functools.partial[Any]
Example = tuple[Any, ...]
_NUM_FIXED = len(CollectResult._fields) - 1  # its tensors behind those of `running`
Layout = tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]

INDUCTOR_OPTIONS: dict[str, Any] = {
    "cpp_wrapper": True,
    # The pattern matcher costs 2 s of tracing its own patterns, and what it would find here (addmm, whose bias is copied into
    # the output before the product) is slower than the bias in the kernel of the activation.
    "pattern_matcher": False,
    # Fused multiply-add: 5 % of `learn`.
    "cpp.enable_floating_point_contract_flag": "fast",
    # Precompiled headers cost 16 s once and save 4 s a compilation. A cached program is compiled once.
    "aot_inductor.precompile_headers": False,
    # Inductor would compile and run a test program (2.5 s) to learn what /proc/cpuinfo already told it.
    "cpp.vec_isa_ok": True,
}


# what Inductor and the C++ compiler read from the environment, beside CXX
_INDUCTOR_VARIABLES = ("TORCHINDUCTOR_", "TORCH_COMPILE_", "AOT_INDUCTOR_", "AOTINDUCTOR_")
_COMPILER_VARIABLES = ("CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "OMP_PREFIX")


class CompileError(RuntimeError):
    """This program cannot be compiled or loaded here. The message is one line; training goes on eagerly."""


class LoadError(CompileError):
    """A library in the cache does not load. It has been removed, so that it is built again."""


class CompiledProgram:
    """A loaded library behind the signature of the program it was made from."""

    def __init__(
        self, library: Path, program: Program, layout: Layout, seeds: Seeds | None = None, exchange: Exchange | None = None
    ) -> None:
        """Load it. Raises OSError, RuntimeError or AttributeError (a function is missing) when it does not load.

        Args:
            layout: shapes, strides and dtypes that the library was compiled for.
            seeds: how it takes several seeds.
            exchange: between the processes of a program with `num_ranks` above 1.
        """
        self._layout = layout
        self._library = library
        self._num_threads = torch.get_num_threads()
        self._function = program.func
        self._seeds = seeds
        num_workers = _num_workers(program) if seeds is None else seeds.num_threads
        self._team: WorkerPool | None = None
        self._exchange = exchange
        self._num_ranks = _num_ranks(program)
        if _is_shared(program) or num_workers > 1:
            self._team = WorkerPool(library, num_workers, exchange if self._num_ranks > 1 else None)
        else:
            self._runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(library), 1)

    def __call__(self, *args: Any) -> Any:
        """What the program returns. Raises CompileError for tensors, or a number of threads, it was not compiled for."""
        tensors = _tensors(args)
        if self._seeds is not None:
            results = self._of_all_seeds(tensors, self._seeds)
        elif self._team is None:
            self._check(tensors)
            results = self._runner.run(tensors)
        else:
            self._check(tensors)
            results, *others = self._team.run([[*tensors, worker] for worker in self._team.workers])
            if self._function is acting.collect:  # each worker has its own environments; of learn all return the same
                *parts, finite = zip(results, *others, strict=True)
                rows = len(results) - _NUM_FIXED  # from here on (T, N, ...)
                results = [torch.cat(part, 0 if index < rows else 1) for index, part in enumerate(parts)]
                results.append(torch.stack(finite).all())
        if self._function is acting.collect:
            return CollectResult(tuple(results[:-_NUM_FIXED]), *results[-_NUM_FIXED:])
        if self._function is ppo.learn:
            return LearnResult(results[0], AdamState(*results[1:4]), *results[4:])
        return _one_or_all(results)

    def _of_all_seeds(self, tensors: list[Tensor], seeds: Seeds) -> list[Tensor]:
        """Call the library for C seeds at a time; the last call takes seeds of the one before too where S is no multiple."""
        number, per_call, _ = seeds
        starts = [min(start, number - per_call) for start in range(0, number, per_call)]
        calls = [[x[start] if per_call == 1 else x[start : start + per_call] for x in tensors] for start in starts]
        self._check(calls[0])
        results = [self._runner.run(call) for call in calls] if self._team is None else self._team.run(calls)
        if per_call == 1:
            return [torch.stack(parts) for parts in zip(*results, strict=True)]
        fresh = number - (len(starts) - 1) * per_call  # of the last call
        return [torch.cat((*parts[:-1], parts[-1][per_call - fresh :])) for parts in zip(*results, strict=True)]

    def bind(self, fixed: Example, rest: Example) -> Callable[..., Any]:
        """`program(*fixed, *given)` as a function of `given`, for a program of tensors that is called every step.

        Checked once, with `rest` as an example: what is given later must have the same shapes, strides and types. Between an
        environment's steps this takes 28 us where the checked call takes 42 (8 environments).
        """
        if self._seeds is not None and self._seeds.per_call < self._seeds.number:
            return lambda *given: self(*fixed, *given)
        bound = _tensors(fixed)
        self._check([*bound, *_tensors(rest)])
        run = self._runner.run
        if all(isinstance(part, Tensor) for part in rest):
            return lambda *given: _one_or_all(run([*bound, *given]))
        return lambda *given: _one_or_all(run([*bound, *_tensors(given)]))

    def _check(self, tensors: list[Tensor]) -> None:
        if self._num_ranks > 1 and self._exchange is None:
            raise CompileError(
                f"the compiled program is one of {self._num_ranks} processes, and has no exchange with the others"
            )
        # The library trusts its caller: wrong shapes, or more threads than its partial sums have room for, would be read and
        # written out of bounds.
        if len(tensors) != len(self._layout) or any(
            tensor.shape != shape or tensor.stride() != stride or tensor.dtype != dtype
            for tensor, (shape, stride, dtype) in zip(tensors, self._layout, strict=True)
        ):
            raise CompileError("the compiled program was made for tensors of other shapes, strides or types")
        if torch.get_num_threads() != self._num_threads:
            raise CompileError(f"the compiled program was made for torch.set_num_threads({self._num_threads})")


def load_program(
    program: Program,
    example: Example,
    cache_dir: Path,
    seeds: Seeds | None = None,
    exchange: Exchange | None = None,
) -> CompiledProgram | None:
    """The compiled program from the cache, or None. Imports nothing of the compiler. One that does not load is removed.

    With a setting `num_workers` above 1 a call of it is shared out among so many threads (compile/workers.py); with `num_ranks`
    above 1 among processes, of which each calls its own, and `exchange` is between them. With `seeds` all tensors of `example`,
    and of a call, have a leading axis of S seeds, and so has all that is returned.

    Raises CompileError when the directory is not to be trusted (see `check_cache_dir`).
    """
    with contextlib.suppress(LoadError):
        return _load(program, example, cache_dir, cache_key(program, example, seeds), seeds, exchange)
    return None


def _load(
    program: Program, example: Example, cache_dir: Path, key: str, seeds: Seeds | None, exchange: Exchange | None
) -> CompiledProgram | None:
    """The program under `key`, or None. Raises LoadError, once it has removed what does not load."""
    if sys.platform == "win32":
        raise CompileError("compiled programs are for Linux and macOS")
    check_cache_dir(cache_dir)
    helpers, library = library_cache.find(cache_dir, native_key()), library_cache.find(cache_dir, key)
    if helpers is None or library is None:
        return None
    loading = helpers
    try:
        native.load(helpers)
        loading = library
        loaded = CompiledProgram(library, program, _layout(_tensors(_of_one_call(example, seeds))), seeds, exchange)
    except (OSError, RuntimeError, AttributeError) as error:
        library_cache.remove(loading)
        what = "the compiled helpers do" if loading is helpers else "the compiled program does"
        raise LoadError(f"{what} not load: {_first_line(error)}") from error
    library_cache.touch(helpers)
    library_cache.touch(library)
    return loaded


def compile_program(
    program: Program,
    example: Example,
    cache_dir: Path,
    seeds: Seeds | None = None,
    exchange: Exchange | None = None,
) -> CompiledProgram:
    """The compiled program, from the cache or built now and left there. Raises CompileError with one line of reason.

    One that is in the cache and does not load is built again, once.
    """
    key = cache_key(program, example, seeds)
    with contextlib.suppress(LoadError):
        loaded = _load(program, example, cache_dir, key, seeds, exchange)
        if loaded is not None:
            return loaded
    if any(tensor.device.type != "cpu" for tensor in _tensors(example)):
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
    except Exception as error:  # whatever a compiler of 200 000 lines may raise: there is always the eager tier
        raise CompileError(explain(error, cache_dir)) from error
    try:
        loaded = _load(program, example, cache_dir, key, seeds, exchange)
    except LoadError as error:  # built here and now: another build would not load either
        library_cache.refuse(cache_dir, key, str(error))
        raise
    if loaded is None:
        raise CompileError(f"the program vanished from {cache_dir} while it was being built")
    return loaded


def _one_or_all(results: list[Tensor]) -> Any:
    """What a program of tensors returned: one, or a tuple of several."""
    return results[0] if len(results) == 1 else tuple(results)


class GraphedProgram:
    """A whole program captured once as a CUDA graph: a call copies its arguments into place and replays the kernels.

    Thousands of launches become one. The captured buffers keep their addresses; results are copied out of them.
    """

    def __init__(self, program: Callable[..., Any], example: Example) -> None:
        """Run the program a few times on a side stream, as capturing wants, then capture it. Raises CompileError."""
        try:
            self._arguments = pytree.tree_map_only(Tensor, torch.clone, _plain(example))
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    program(*self._arguments)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._results = program(*self._arguments)
        except RuntimeError as error:
            raise CompileError(f"the CUDA graph could not be captured: {_first_line(error)}") from error
        self._buffers = _tensors(self._arguments)

    def __call__(self, *args: Any) -> Any:
        """What the program returns for tensors of the example's shapes."""
        for buffer, given in zip(self._buffers, _tensors(args), strict=True):
            buffer.copy_(given, non_blocking=True)
        self._graph.replay()
        return pytree.tree_map_only(Tensor, torch.clone, self._results)

    def bind(self, fixed: Example, rest: Example) -> Callable[..., Any]:
        """`program(*fixed, *given)` as a function of `given`: what is fixed is copied into place once."""
        bound = _tensors(fixed)
        for buffer, given in zip(self._buffers, bound, strict=False):
            buffer.copy_(given, non_blocking=True)

        def call(*given: Any) -> Any:
            for buffer, tensor in zip(self._buffers[len(bound) :], _tensors(given), strict=True):
                buffer.copy_(tensor, non_blocking=True)
            self._graph.replay()
            return pytree.tree_map_only(Tensor, torch.clone, self._results)

        return call


class BackgroundCompile:
    """`compile_program` in a process of its own while this one trains eagerly; a thread would fight it for the interpreter."""

    def __init__(
        self,
        program: Program,
        example: Example,
        cache_dir: Path,
        seeds: Seeds | None = None,
    ) -> None:
        """Start it.

        Raises CompileError when the directory is not to be trusted, the program cannot be told to a process, or it is known
        that another process cannot build it.
        """
        check_cache_dir(cache_dir)
        self._program, self._example, self._cache_dir, self._seeds = program, example, cache_dir, seeds
        self._key = cache_key(program, example, seeds)
        with contextlib.suppress(OSError, UnicodeDecodeError):
            raise CompileError(library_cache.refusal(cache_dir, self._key).read_text(encoding="utf-8"))
        try:
            job = pack(program, example, seeds)
            same = cache_key(*unpack(job)) == self._key
        except Exception as error:  # whatever the pickling of somebody's class may raise
            raise CompileError(_unreachable(error)) from error
        if not same:
            raise CompileError(_DIFFERS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import _serve; _serve()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},  # modules are found where this process finds them
                **own_group(),  # Ctrl-C is for the training process, which stops this one and its C++ compiler together
            )
        except OSError as error:
            raise CompileError(f"no process could be started for it: {error.strerror}") from error
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a child that died is reported by poll
            self._process.stdin.write(pickle.dumps((job, self._key, cache_dir, torch.get_num_threads())))
            self._process.stdin.close()

    def poll(self) -> CompiledProgram | None:
        """The program once it is there, None until then. Raises CompileError when the compiler gave up."""
        if self._process.poll() is None:
            return None
        assert self._process.stdout is not None
        with self._process.stdout as stdout:
            reason = "" if stdout.closed else stdout.read().decode(errors="replace").strip()
        loaded = _load(self._program, self._example, self._cache_dir, self._key, self._seeds, None)
        if loaded is None:
            raise CompileError(reason or f"the compiler's process ended with code {self._process.returncode}")
        return loaded

    def stop(self) -> None:
        """Give up. Safe to call at any time, twice too."""
        if self._process.poll() is None:
            end_group(self._process)
        self._process.wait()


def _serve() -> None:
    """What the other process runs: a job on stdin, the reason of a failure on stdout."""
    lower_priority()  # training comes first
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through the exits of `with`, so that no build directory is left
    job, key, cache_dir, num_threads = pickle.loads(sys.stdin.buffer.read())
    torch.set_num_threads(num_threads)
    try:
        program, example, seeds = unpack(job)
    except Exception as error:  # a class of a script, or a module that raises when it is imported again
        _tell(_unreachable(error))
        return
    try:
        if cache_key(program, example, seeds) != key:  # it would be kept where nobody looks for it
            library_cache.refuse(cache_dir, key, _DIFFERS)
            _tell(_DIFFERS)
        else:
            compile_program(program, example, cache_dir, seeds)
    except CompileError as error:
        _tell(str(error))


def _tell(reason: str) -> None:
    """To the other process, whatever the encoding of this one's stdout is."""
    sys.stdout.buffer.write(reason.encode(errors="replace"))
    sys.stdout.flush()


_DIFFERS = "the program looks different in the process that compiles; --compile on compiles it in the process that trains"


def _unreachable(error: Exception) -> str:
    return (
        f"another process cannot have this program ({_first_line(error)}): put what is yours into a module, or use --compile on"
    )


class _Outline(NamedTuple):
    """A tensor but for its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def pack(program: Program, example: Example, seeds: Seeds | None) -> bytes:
    """What another process needs to compile the program: all but the values of `example`. Raises what pickling it raises."""
    outline = pytree.tree_map_only(Tensor, lambda x: _Outline(tuple(x.shape), x.stride(), x.dtype), example)
    return pickle.dumps((program, outline, seeds))


def unpack(job: bytes) -> tuple[Program, Example, Seeds | None]:
    """(program, example, seeds) from `pack`; zeros in the example, laid out as its tensors were."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of pytree's own, when one of its descriptions is unpickled
        program, outline, seeds = pickle.loads(job)
    return program, pytree.tree_map_only(_Outline, _zeros, outline, is_leaf=lambda x: isinstance(x, _Outline)), seeds


def _zeros(outline: _Outline) -> Tensor:
    """A tensor like the one that `outline` is of."""
    last = sum((size - 1) * stride for size, stride in zip(outline.shape, outline.stride, strict=True))
    return torch.zeros(max(last + 1, 0), dtype=outline.dtype).as_strided(outline.shape, outline.stride)


# The cache


def check_cache_dir(cache_dir: Path) -> None:
    """Create `cache_dir` (mode 0700) or see that it is a directory of ours that nobody else can write to or read.

    What lies there is loaded into the process: raises CompileError where another user could have put it.
    """
    try:
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = cache_dir.lstat()
    except OSError as error:
        raise CompileError(f"no cache directory: {explain(error, cache_dir)}") from error
    if not stat.S_ISDIR(status.st_mode) or not is_private(status):
        raise CompileError(f"cache directory {cache_dir} must be owned by this user, with mode 0700")


def native_key() -> str:
    """Digest of all that shapes the helpers' library."""
    texts = [_digest(path.read_bytes()) for path in (native.SOURCE, Path(native.__file__))]  # what is built, and how
    facts = (texts, _machine())
    return f"native-{_digest(repr(facts).encode())[:25]}"


def cache_key(program: Program, example: Example, seeds: Seeds | None = None) -> str:
    """Digest of all that shapes the program: sources, the machine and its software, threads, settings, layouts of tensors."""
    example = _of_one_call(example, seeds)
    mapped = seeds is not None and seeds.per_call > 1
    facts = (
        (_sources(program, of_seed(example, 0) if mapped else example), mapped),
        (_machine(), torch.get_num_threads(), _inductor_settings()),
        (program.func.__qualname__, _describe(program.keywords)),
        _layout(_tensors(example)),
    )
    return _digest(repr(facts).encode())[:32]


def _describe(value: Any) -> Any:
    """A description of a setting that is the same in every process: no addresses."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return (type(value).__qualname__, _describe(fields))
    if isinstance(value, Tensor):
        return (tuple(value.shape), str(value.dtype), _digest(value.detach().cpu().contiguous().numpy().tobytes()))
    if isinstance(value, np.ndarray):
        return (value.shape, value.dtype.str, _digest(np.ascontiguousarray(value).tobytes()))
    if isinstance(value, Mapping):
        return [(key, _describe(value[key])) for key in sorted(value)]
    if isinstance(value, list | tuple):
        return [_describe(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(repr(_describe(item)) for item in value)
    if isinstance(value, functools.partial):
        return [_describe(part) for part in (value.func, value.args, value.keywords)]
    if callable(value) and hasattr(value, "__qualname__"):
        return (value.__module__, value.__qualname__)
    if isinstance(value, torch.nn.Module):  # its graph is told beside it, and its weights are no part of the program
        return type(value).__qualname__
    if "__repr__" not in {name for kind in type(value).__mro__[:-1] for name in vars(kind)}:  # the default one: an address
        return (type(value).__qualname__, _describe(vars(value)))
    return repr(value)


def _sources(program: Program, example: Example) -> list[str]:
    """Digests of the text of everything that computes something in it; of an `env_step` that does not name it, of its graph."""
    policy = program.keywords["policy"]
    folders = {Path(__file__).parent, Path(ppo.__file__).parent, Path(inspect.getfile(type(policy))).parent}
    files = [path for folder in sorted(folders) for path in sorted(folder.glob("*.py"))]
    env_step, graph = program.keywords.get("env_step"), ""
    if hasattr(policy, "module"):
        graph += _policy_graph(program, example)
    if env_step is not None:
        named = env_step.sources()
        files += named or []
        graph += _environment_graph(program, example) if named is None else ""
    return [_digest(path.read_bytes()) for path in files] + [_digest(graph.encode())]


def _policy_graph(program: Program, example: Example) -> str:
    """What somebody's own network computes, constants included, for one observation of each environment."""
    from torch.fx.experimental.proxy_tensor import make_fx

    policy, params = program.keywords["policy"], example[0]
    if program.func is ppo.learn:
        obs: Any = pytree.tree_map(lambda rows: rows[0], contracts.obs_of(example[2]))
    else:
        obs = example[2][0] if program.func is acting.collect else example[2]
    graph = make_fx(lambda params, obs: policy.actor_critic(policy.weights(params), obs))(params, obs)
    return _graph_text(graph)


def _environment_graph(program: Program, example: Example) -> str:
    """What the environments of a `collect` compute, constants included: their code may lie anywhere and call anything."""
    from torch.fx.experimental.proxy_tensor import make_fx

    params, normalization, running, noise, random = example
    policy = program.keywords["policy"]
    if policy.rnn_state_size:
        *others, memory, first = running
        act, running = acting.act_recurrent_from_params, tuple(others)
        action, _ = act(params, normalization, running[0], noise[0], memory, first, policy=policy)
    else:
        action = acting.act_from_params(params, normalization, running[0], noise[0], policy=policy)
    return _graph_text(make_fx(program.keywords["env_step"])(running, action, random[0]))


def _graph_text(graph: torch.fx.GraphModule) -> str:
    constants = {node.target: getattr(graph, node.target) for node in graph.graph.find_nodes(op="get_attr")}
    return f"{graph.code}{_describe(constants)}"


def _machine() -> tuple[Any, ...]:
    """What a library depends on beside its source: torch, Python, the processor, the C and C++ libraries, the compiler."""
    return (
        (torch.__version__, torch.version.git_version, sys.version),
        (platform.machine(), _processor(), torch.backends.cpu.get_cpu_capability()),
        (platform.libc_ver(), platform.mac_ver()[0], _cpp_library()),
        (native.compiler(), _compiler_version(native.compiler())),
        [(name, os.environ.get(name)) for name in _COMPILER_VARIABLES],
    )


def _inductor_settings() -> tuple[Any, ...]:
    """Ours, and those of the environment."""
    names = [name for name in os.environ if name.startswith(_INDUCTOR_VARIABLES) and name != "TORCHINDUCTOR_CACHE_DIR"]
    return sorted(INDUCTOR_OPTIONS.items()), [(name, os.environ[name]) for name in sorted(names)]


@functools.cache
def _cpp_library() -> str:
    """The C++ library that this process has loaded, with its version: libstdc++.so.6.0.30. "" where that is not told."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
        names = {Path(line.split()[-1]).name for line in lines if "/" in line}
        return " ".join(sorted(name for name in names if name.startswith(("libstdc++.so", "libc++.so"))))
    return ""


@functools.cache
def _compiler_version(compiler: str) -> str:
    """The first line of what it says of itself; "" where there is none."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = [*native.words_of(compiler), "--version"]
        told = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=10)
        return told.stdout.partition("\n")[0]
    return ""


def _about(title: str) -> dict[str, str]:
    """For the list of what is in the cache."""
    return {"program": title, "torch": str(torch.__version__)}


def _title(program: Program, example: Example) -> str:
    """`learn of MLPActorCritic, 9,155 parameters`."""
    name = program.func.__name__.removesuffix("_from_params")
    policy = type(program.keywords["policy"]).__name__
    return f"{name} of {policy}, {example[0].shape[-1]:,} parameters"


def _processor() -> str:
    """Name and instruction sets of the processor: the library is compiled for exactly this one."""
    with contextlib.suppress(OSError):
        wanted = ("model name", "flags", "Features")
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
        return "\n".join(line for line in lines if line.startswith(wanted))
    return f"{platform.processor()} of {platform.node()}"  # which of them it is is not told: none of another machine's


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")[:300]


# From a program to a library


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in it, in the order of `pytree.tree_leaves(_plain(args))`, in 3 us where that takes 12."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value if item is not None for tensor in _tensors(item)]
    return [value[key] for key in sorted(value.keys())]


def _plain(args: Example) -> list[Any]:
    """The arguments with the rollout, a mapping or a TensorDict, as a dict in the order of its keys."""
    return [
        {key: arg[key] for key in sorted(arg.keys())} if hasattr(arg, "keys") else arg  # what pytree can walk
        for arg in args
    ]


def _of_one_call(example: Example, seeds: Seeds | None) -> Example:
    """The part of the arguments that one call of the library takes."""
    if seeds is None:
        return example
    if seeds.per_call == 1:
        return of_seed(example, 0)
    return pytree.tree_map_only(Tensor, lambda x: x[: seeds.per_call], example)


def _num_workers(program: Program) -> int:
    return int(program.keywords.get("num_workers", 1))


def _num_ranks(program: Program) -> int:
    return int(program.keywords.get("num_ranks", 1))


def _is_shared(program: Program) -> bool:
    """Whether it takes a `worker`."""
    return _num_workers(program) * _num_ranks(program) > 1


def _layout(tensors: list[Tensor]) -> Layout:
    return tuple((tuple(tensor.shape), tensor.stride(), tensor.dtype) for tensor in tensors)


def _build(program: Program, example: Example, build_dir: str, seeds: Seeds | None = None) -> Path:
    """Trace, generate and compile; the library lies in `build_dir`."""
    # Inductor's default is a directory under /tmp that it trusts blindly; compilers speak the user's language
    with _environment("TORCHINDUCTOR_CACHE_DIR", build_dir), _environment("LC_ALL", "C"):
        import torch._inductor.config as inductor_config
        from torch._dynamo.utils import get_metrics_context
        from torch._guards import TracingContext, tracing
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.virtualized import V

        mapped = seeds is not None and seeds.per_call > 1
        graph, inputs = _trace(program, _of_one_call(example, seeds), mapped)
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


def _trace(program: Program, example: Example, mapped: bool = False) -> tuple[torch.fx.GraphModule, list[Any]]:
    """`program`, or that over seeds, as a graph of ATen operators from flat tensors to flat tensors, and its (fake) inputs."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    if program.func is acting.collect:
        program = functools.partial(program, scan=_traced_scan)
    if program.func is ppo.learn:
        program = functools.partial(
            program,
            scan=_traced_scan,
            grad_and_aux=functional_grad_and_aux,
            cells=native.CELLS,
            all_reduce=native.all_reduce,
        )
    if _is_shared(program):
        example = (*example, torch.zeros(WORKER_FIELDS, dtype=torch.int64))
    function = over_seeds(program) if mapped else program
    leaves, spec = pytree.tree_flatten(_plain(example))
    present = [index for index, leaf in enumerate(leaves) if leaf is not None]

    def flat_program(*tensors: Tensor) -> list[Tensor]:
        filled: list[Tensor | None] = [None] * len(leaves)
        for index, tensor in zip(present, tensors, strict=True):
            filled[index] = tensor
        return _unaliased(pytree.tree_leaves(function(*pytree.tree_unflatten(filled, spec))), tensors)

    fake_mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True, allow_non_fake_inputs=True)
    inputs = [fake_mode.from_tensor(leaves[index]) for index in present]
    with fake_mode:
        return _tidy(make_fx(flat_program, decomposition_table=_decompositions())(*inputs)), inputs


def _traced_scan(body: Callable[..., Any], carry: Any, xs: tuple[Tensor, ...]) -> tuple[Any, tuple[Tensor, ...]]:
    """`core.scan.scan` as PyTorch's scan operator, while tracing.

    The operator wants a flat body that closes over no tensor. The body is therefore traced by itself first: what it closes
    over shows up as constants of its graph, and these become inputs. Under torch.func.vmap, over seeds, the body is one of
    whole tensors, seeds first; PyTorch's own rule would put them last, where products do not want them.
    """
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

    if torch._C._functorch.peek_interpreter_stack() is None:
        return _scan_operator(body, carry, xs, contextlib.nullcontext)
    seeds: Any = retrieve_current_functorch_interpreter()
    leaves, spec = pytree.tree_flatten(carry)

    def whole(x: Tensor) -> Tensor:  # (S, ...), of what the body sees as (...)
        return torch._C._functorch._remove_batch_dim(x, seeds.level(), seeds.batch_size(), 0).contiguous()

    def mapped(x: Tensor, dim: int = 0) -> Tensor:
        return torch._C._functorch._add_batch_dim(x, dim, seeds.level())

    def whole_body(carry: list[Tensor], x: tuple[Tensor, ...]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        after, ys = body(pytree.tree_unflatten(map(mapped, carry), spec), tuple(map(mapped, x)))
        return list(map(whole, pytree.tree_leaves(after))), tuple(map(whole, ys))

    steps_first = tuple(whole(x).movedim(1, 0).contiguous() for x in xs)  # (L, S, ...)
    last, ys = _scan_operator(whole_body, list(map(whole, leaves)), steps_first, seeds.lower)
    return pytree.tree_unflatten(map(mapped, last), spec), tuple(mapped(y, 1) for y in ys)


def _scan_operator(
    body: Callable[..., Any], carry: Any, xs: tuple[Tensor, ...], below: Callable[[], contextlib.AbstractContextManager[Any]]
) -> tuple[Any, tuple[Tensor, ...]]:
    """See `_traced_scan`; the operator is called within `below()`."""
    from torch._higher_order_ops.scan import scan_op
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx

    leaves, spec = pytree.tree_flatten(carry)

    def flat_body(*args: Tensor) -> list[Tensor]:
        carry, ys = body(pytree.tree_unflatten(args[: len(leaves)], spec), args[len(leaves) :])
        return _unaliased([*pytree.tree_leaves(carry), *ys], args)

    with disable_proxy_modes_tracing():
        inputs = [*(leaf.clone() for leaf in leaves), *(x[0].clone() for x in xs)]
        graph = make_fx(flat_body, decomposition_table=_decompositions())(*inputs)
    closed_over: list[Tensor] = []
    placeholder = graph.graph.find_nodes(op="placeholder")[-1]
    for node in graph.graph.find_nodes(op="get_attr"):
        tensor = getattr(graph, node.target)
        if not isinstance(tensor, Tensor):  # the body of a loop inside this one
            continue
        known = [index for index, other in enumerate(closed_over) if other is tensor]
        if not known:
            closed_over.append(tensor)
            with graph.graph.inserting_after(placeholder):
                placeholder = graph.graph.placeholder(f"closed_over_{len(closed_over) - 1}")
                placeholder.meta = node.meta.copy()
        index = known[0] if known else len(closed_over) - 1
        node.replace_all_uses_with(graph.graph.find_nodes(op="placeholder")[len(inputs) + index])
        graph.graph.erase_node(node)
    _compute_scalars_once(_tidy(graph))
    interpret = torch.fx.Interpreter(graph).run
    # a constant of somebody's (the bounds of actions) is real; as the result of an operator it is like all others
    outside = tuple(tensor if isinstance(tensor, FakeTensor) else tensor.clone() for tensor in closed_over)
    with below():
        results = scan_op(lambda *args: interpret(*args), leaves, list(xs), outside)
    return pytree.tree_unflatten(list(results[: len(leaves)]), spec), tuple(results[len(leaves) :])


def _unaliased(results: list[Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """`results` with a copy of each that is an input itself: neither the operator nor a library may return its input."""
    return [result.clone() if any(result is given for given in inputs) else result for result in results]


def _tidy(graph: Any) -> Any:
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _compute_scalars_once(graph: Any) -> None:
    """Give every 0-d intermediate that meets a larger tensor a place in memory.

    Inductor writes 0-d arithmetic into each loop that uses it, and the compiler cannot move it out (pointers may alias): Adam's
    two expm1 and the clipping's sqrt ran for each vector of parameters, 62 us a minibatch instead of 19 (one thread).
    """
    import torch._inductor.test_operators

    realize = torch.ops._inductor_test.realize.default

    def rank(node: Any) -> int:
        value = node.meta.get("val")
        return value.ndim if isinstance(value, Tensor) else -1

    for node in list(graph.graph.nodes):
        users = [user for user in node.users if rank(user) > 0 and "cat" not in str(user.target)]
        if node.op == "call_function" and rank(node) == 0 and users:
            with graph.graph.inserting_after(node):
                kept = graph.graph.call_function(realize, (node,))
                kept.meta = node.meta.copy()
            for user in users:
                user.replace_input_with(node, kept)
    graph.recompile()


@functools.cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Inductor's own, and three of ours."""
    from torch._inductor.decomposition import select_decomp_table

    aten = torch.ops.aten
    return {
        **select_decomp_table(),
        aten.tanh.default: rational_tanh,
        # The bias belongs into the kernel of the activation: ATen's addmm copies it into the output first (8 us).
        aten.addmm.default: lambda bias, x, weight: torch.mm(x, weight) + bias,
        aten.baddbmm.default: lambda bias, x, weight: torch.bmm(x, weight) + bias,
    }


# tanh(x) = x P(x^2) / Q(x^2) on [-7.9, 7.9], beyond which float32 rounds it to 1: the minimax fit of Eigen's generic ptanh
_TANH_BOUND = 7.90531110763549805
_TANH_P = (
    *(-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08),
    *(1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03),
)
_TANH_Q = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)


def rational_tanh(x: Tensor) -> Tensor:
    """tanh of float32 to 4e-7, relative, without a call: 0.7 ns an element where torch.tanh takes 3.2 (one thread, AVX2)."""
    if x.dtype != torch.float32:
        return NotImplemented
    x = x.clamp(-_TANH_BOUND, _TANH_BOUND)
    square = x * x
    return x * _polynomial(_TANH_P, square) / _polynomial(_TANH_Q, square)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """Horner's rule, the coefficient of the highest power first."""
    result = coefficients[0] * x + coefficients[1]
    for coefficient in coefficients[2:]:
        result = result * x + coefficient
    return result


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
