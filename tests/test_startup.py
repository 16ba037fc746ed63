"""What a process imports before it works, in fresh interpreters: no compiler where none is asked for, and no trace in torch."""

import json
import subprocess
import sys

import pytest

COMPILER = ("torch._dynamo", "torch._inductor")

# What `import tensordict` has marked for Dynamo, as {name: how}, and what it leaves behind.
MARKED = """
import inspect, json, sys
import torch._dynamo
from torch._dynamo import trace_rules

def how(function):
    return [trace_rules.is_callable_allowed(function), getattr(function, "_dynamo_marked_constant", None) is True]

modules = {name: vars(module) for name, module in sys.modules.items() if name.partition(".")[0] == "tensordict"}
functions = {f"{name}.{key}": thing for name, module in modules.items() for key, thing in module.items() if callable(thing)}
marks = {name: how(function) for name, function in functions.items()}
print(json.dumps({
    "marked": {name: marks[name] for name in marks if any(marks[name])},
    "finders": [type(finder).__name__ + getattr(finder, "__name__", "") for finder in sys.meta_path],
    "loader": type(torch._dynamo.__spec__.loader).__name__,
    "loaders agree": torch._dynamo.__loader__ is torch._dynamo.__spec__.loader,
    "source": len(inspect.getsource(torch._dynamo)),
    "torch.compiler": [torch.compiler.allow_in_graph.__module__, torch.compiler.assume_constant_result.__module__],
}))
"""


def in_fresh_interpreter(script, *args):
    """The last line that the script prints, from JSON."""
    done = subprocess.run([sys.executable, "-c", script, *map(str, args)], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


WORK = f"""
import json, sys
import fastppo
from fastppo import load_policy, train, TrainConfig
from fastppo.evaluate import console

loaded = {{}}
def note(name):
    loaded[name] = [name for name in {COMPILER} if name in sys.modules]

note("import")
run_dir, compile = sys.argv[1:]
sizes = dict(num_envs=2, num_steps=16, total_timesteps=64, eval_episodes=1)
result = train(TrainConfig(run_dir=run_dir, compile=compile, plain=True, **sizes))
note("train")
assert console([run_dir, "--episodes", "1"]) == 0
note("evaluate")
policy = load_policy(run_dir)
policy.act([0.0] * 4)
note("load_policy")
loaded["tier"] = result.summary["tier"]
print(json.dumps(loaded))
"""


@pytest.mark.parametrize("tier", ["eager", "fused"])
@pytest.mark.long
def test_what_compiles_nothing_imports_no_compiler(tier, tmp_path, request):
    """Dynamo and Inductor take longer to import than all else together.

    Fails if tensordict, an operator of torch.library, or ours, asks for them again.
    """
    if tier == "fused":
        request.getfixturevalue("needs_compiler")
    loaded = in_fresh_interpreter(WORK, tmp_path / "run", {"eager": "off", "fused": "on"}[tier])
    assert loaded == {"import": [], "train": [], "evaluate": [], "load_policy": [], "tier": tier}


# What is imported, by name; "ordinary" is tensordict without us.
IMPORTS = {
    "ordinary": "import tensordict",
    "alone": "import fastppo.system.tensordicts",
    "after tensordict": "import tensordict, fastppo.system.tensordicts",
    "after dynamo": "import torch._dynamo, fastppo.system.tensordicts",
}
EACH_IN_A_FORK = """
import os, sys, torch
for script in sys.argv[1:]:
    child = os.fork()
    if not child:
        exec(script, {})
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.long
def test_tensordict_is_marked_for_dynamo_as_always():
    """The same functions carry the same marks, whatever was imported before; torch and sys.meta_path are as without us."""
    scripts = [imports + MARKED for imports in IMPORTS.values()]
    done = subprocess.run([sys.executable, "-c", EACH_IN_A_FORK, *scripts], check=True, capture_output=True, text=True)
    ordinary, *ours = map(json.loads, done.stdout.splitlines())
    assert len(ordinary["marked"]) > 3
    assert dict(zip(list(IMPORTS)[1:], ours, strict=True)) == dict.fromkeys(list(IMPORTS)[1:], ordinary)


@pytest.mark.long
def test_torch_compile_sees_the_marks():
    """A program of the user's own is one graph for Dynamo: locking a TensorDict calls a function that must be marked."""
    script = """
import json, sys, torch
from fastppo.system.tensordicts import TensorDict
assert "torch._dynamo" not in sys.modules

@torch.compile(fullgraph=True, backend="eager")
def double(data):
    return TensorDict({"x": 2 * data["x"]}, batch_size=data.batch_size).lock_()

doubled = double(TensorDict({"x": torch.ones(3)}, batch_size=[3]))
print(json.dumps([doubled["x"].tolist(), doubled.is_locked, "torch._dynamo" in sys.modules]))
"""
    assert in_fresh_interpreter(script) == [[2.0, 2.0, 2.0], True, True]


LASTING = """
import gc, json
from fastppo.system.imports import lasting_imports
try:
    with lasting_imports():
        import torch
        inside = gc.isenabled()
        raise ImportError
except ImportError:
    print(json.dumps({"inside": inside, "after": gc.isenabled(), "frozen": gc.get_freeze_count() > 0}))
"""


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ("", {"inside": False, "after": True, "frozen": True}),
        ("import torch", {"inside": True, "after": True, "frozen": False}),
        ("import gc; gc.disable()", {"inside": False, "after": False, "frozen": False}),
    ],
    ids=["a command", "torch imported before", "no collector"],
)
@pytest.mark.long
def test_only_a_process_of_our_own_keeps_what_it_imports(first, expected):
    """A failed import leaves the collector on; a user's process that has torch already, or no collector, is left as it is."""
    assert in_fresh_interpreter(first + LASTING) == expected
