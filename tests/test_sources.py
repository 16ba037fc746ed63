"""The files that a compiled program is computed from are in its key: after an edit of one, nothing stale is loaded.

The files are found by following imports, so a module that moves to another folder is still asked for.
"""

import ast
import importlib
import inspect
import sys
from pathlib import Path

import pytest

import fastppo
from fastppo.compile.background import BackgroundCompile
from fastppo.compile.inductor import compile_program
from fastppo.compile.key import cache_key, native_key
from fastppo.core.contracts import EAGER
from support.programs import jobs_of

ROOT = Path(fastppo.__file__).parent
# Modules of ours that compute nothing inside a program: messages, processes, what the machine has, seeds of generators.
COMPUTES_NOTHING = ("fastppo.errors", "fastppo.random_streams", "fastppo.ranks", "fastppo.system")

RUNS = {
    "mlp": {},
    "memory": {"rnn": "lstm", "num_minibatches": 2},
    "device": {"backend": "torch"},
    "images": {"env_id": "environments:AnySpacesVector-v0", "cnn_size": 8, "env_kwargs": {"observation": "image (C, H, W)"}},
}


def imported_from(path):
    """The modules of ours that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastppo"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
    return found


MODULES = {
    ".".join(("fastppo", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


def files_behind(*objects):
    """The files of ours that these classes and functions are written in, and all that those import, directly or not."""
    waiting = {inspect.getmodule(one).__name__ for one in objects}
    seen = set()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in MODULES or name.startswith(COMPUTES_NOTHING):
            continue
        seen.add(name)
        waiting |= imported_from(MODULES[name])
    return {MODULES[name] for name in seen}


def computed_from(program):
    """The classes and functions of ours that a program is made of, and what traces and compiles it."""
    made_of = [program.func, type(program.keywords["policy"]), compile_program]
    env_step, execution = program.keywords.get("env_step"), program.keywords.get("execution", EAGER)
    made_of += [] if execution.bind_act is None else [execution.bind_act.func]
    return [*made_of, *([] if env_step is None else [type(env_step), type(env_step.env)])]


def after_an_edit(monkeypatch, path, function):
    """What the function returns when the file has one more line."""
    read = Path.read_bytes
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda self: read(self) + (b"\n#" if self.resolve() == path else b""))
        return function()


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_every_file_that_a_program_is_computed_from_is_in_its_key(tmp_path, monkeypatch, settings):
    """An edit of any of them gives another key; that of a file which computes nothing of it does not."""
    for name, job in jobs_of(tmp_path / "run", **settings).items():
        key = cache_key(job.program, job.example, job.seeds)
        files = files_behind(*computed_from(job.program))
        names = {path.name for path in files}
        maths = {"ppo.py", "losses.py", "adam.py", "advantages.py"} if name == "learn" else {"acting.py"}
        assert maths | {"contracts.py", "scan.py"} <= names  # the walk has found the maths

        def key_of(job=job):
            return cache_key(job.program, job.example, job.seeds)

        assert {path for path in files if after_an_edit(monkeypatch, path, key_of) == key} == set()
        assert after_an_edit(monkeypatch, MODULES["fastppo.config"], key_of) == key


def test_the_sources_of_the_helpers_are_in_their_key(monkeypatch):
    """The C++ text, and the module that builds it."""
    source = next(ROOT.rglob("native.cpp"))
    included = [*map(source.with_name, ("acting.h", "recurrence.h")), *sorted(ROOT.glob("fused/*.h"))]
    assert len(included) == 10
    for path in (source, *included, source.with_suffix(".py")):
        assert after_an_edit(monkeypatch, path, native_key) != native_key()


def test_the_process_that_compiles_starts_where_the_code_is(tmp_path, monkeypatch):
    """The module that it is told to import has the function that it is told to call."""

    class Started(Exception):
        pass

    def started(command, **_):
        raise Started(command)

    (job, *_) = jobs_of(tmp_path / "run").values()
    cache = tmp_path / "cache"
    monkeypatch.setattr("subprocess.Popen", started)
    with pytest.raises(Started) as command:
        BackgroundCompile(job.program, job.example, cache, job.seeds)
    python, flag, code = command.value.args[0]
    assert (python, flag) == (sys.executable, "-c")
    words, _, call = code.partition(";")
    _, module, _, function = words.split()
    assert call.strip() == f"{function}()"
    assert inspect.getfile(getattr(importlib.import_module(module), function)) == inspect.getfile(BackgroundCompile)
