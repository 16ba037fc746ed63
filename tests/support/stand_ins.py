"""Stand-ins for the compilers and for the programs that they build, for tests of which program is used."""

from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import torch

from fastppo.compile import native
from fastppo.compile.compile_errors import CompileError
from fastppo.compile.selector import BUILD_SECONDS, ProgramSelector, ProgramSpec

LONG = 100 * BUILD_SECONDS
PARAMS = torch.zeros(1)


class Compiler:
    """Stands in for compile/inductor.py: a program is its name, and a build is ready when the test says so."""

    def __init__(self, monkeypatch):
        self.cached, self.ready = set(), set()
        self.compiled, self.started, self.stopped = [], [], []
        self.broken = self.distrusted = False
        self.there = True
        self.alone = False  # another process cannot build the program
        self.cores = 2
        self.threads = set()  # torch's, whenever something was asked for
        monkeypatch.setattr("fastppo.compile.selector.load_program", self.load)
        monkeypatch.setattr("fastppo.compile.selector.compile_program", self.compile)
        monkeypatch.setattr("fastppo.compile.selector.BackgroundCompile", self.start)
        monkeypatch.setattr("fastppo.compile.native.has_compiler", lambda: self.there)
        monkeypatch.setattr("fastppo.compile.selector.available_cores", lambda: self.cores)

    def load(self, program, example, cache_dir, seeds, exchange):
        self.threads.add(torch.get_num_threads())
        if self.distrusted:
            raise CompileError("not yours")
        return Form("compiled", program) if program in self.cached else None

    def compile(self, program, example, cache_dir, seeds, exchange):
        self.threads.add(torch.get_num_threads())
        if self.broken or not self.there:
            raise CompileError("it broke" if self.there else native.NO_COMPILER)
        self.compiled.append(program)
        return Form("compiled", program)

    def start(self, program, example, cache_dir, seeds):
        self.threads.add(torch.get_num_threads())
        self.started.append(program)
        if self.alone:
            raise CompileError("a class of the script")
        stop = partial(self.stopped.append, program)
        return SimpleNamespace(poll=partial(self.poll, program), wait=partial(self.wait, program), stop=stop)

    def wait(self, program):
        self.ready.add(program)
        return self.poll(program)

    def poll(self, program):
        self.threads.add(torch.get_num_threads())
        if self.broken:
            raise CompileError("it broke")
        return Form("compiled", program) if program in self.ready else None


class Kernels:
    """Stands in for fused/kernels.py: there when the test says so, or when somebody waits for them."""

    def __init__(self, there=False, error=None):
        self.there, self.error = there, error
        self.asked = []  # with which `wait`

    def ready(self, wait=False):
        self.asked.append(wait)
        if self.error is not None:
            raise CompileError(self.error)
        self.there |= wait
        return self.there


@dataclass(frozen=True)
class Form:
    """What stands for a program: calling it says of which kind it is, which it is, and of what."""

    kind: str
    name: str
    calls: list[str] = field(default_factory=list, compare=False)  # the names of those that were called

    def __call__(self, *args):
        self.calls.append(self.name)
        return self.kind, self.name, args

    def bind(self, fixed, rest):
        return lambda *args: (self.kind, self.name, (*fixed, *args))


def tiers_of(mode, second="act", kernels=None, fused=("learn", "act"), deviation=0.0, eager_calls=None, **options):
    """(programs of a run for two threads, its notes).

    kernels: those of the programs named in `fused`. deviation: of every fast form from its eager one. eager_calls: a list that
    gets the name of each program that is called eagerly.
    """

    def spec(name):
        form = partial(Form, "fused", name) if kernels is not None and name in fused else None
        example = (PARAMS, "normalization", "obs", "noise")
        return ProgramSpec(Form("eager", name, calls), name, example, lambda *_: deviation, fused=form)

    notes: list[str] = []
    calls = [] if eager_calls is None else eager_calls
    specs = {name: spec(name) for name in ("learn", second)}
    return ProgramSelector(mode, specs, 2, notes.append, kernels=kernels, **options), notes


def in_use(tiers):
    """Which form of `learn` and of `act`."""
    return tiers.learn()[0], tiers.act("normalization")("obs", "noise")[0]
