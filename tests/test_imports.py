"""The direction of imports: data flows one way, and the maths at the bottom knows nothing of what is above it."""

import ast
from pathlib import Path

import pytest

import fastppo

ROOT = Path(fastppo.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# The floors, lowest first. A unit is a folder, a module, or a few modules that belong together. It may import itself and the
# units on lower floors, none on its own floor. Every module is on one floor.
FLOORS = (
    ({"errors"}, {"random_streams"}),
    ({"system"},),
    ({"core"}, {"ranks"}),
    ({"compile"}, {"policy"}, {"envs"}),
    (
        {"fused"},
        {"rollout"},
        {
            "bounds",
            "combinations",
            "config",
            "env_objects",
            "given_settings",
            "presets",
            "find_preset",
            "sb3_settings",
            "callbacks",
        },
        {"run"},
    ),
    ({"analysis"}, {"sb3"}),
    ({"training"},),
    (
        {"", "__main__", "cli", "reference", "verbs"}
        | {"train", "evaluate", "export", "import_sb3", "push", "plot", "report", "sweep", "cache"},
    ),
)

COMPILERS = ("torch.compile", "torch.compiler", "torch._inductor", "torch._dynamo", "torch._export", "torch.jit")
CUDA_GRAPHS = ("torch.cuda.CUDAGraph", "torch.cuda.graph", "torch.cuda.graphs", "torch.cuda.make_graphed_callables")
MAY_NAME = {
    "fastppo.compile.inductor": (
        "torch._inductor.compile_fx.compile_fx_inner",
        "torch._inductor.compile",
        "torch._inductor.config",
        "torch._inductor.virtualized.V",
        "torch._dynamo.utils.get_metrics_context",
    ),
    "fastppo.compile.trace": ("torch._inductor.test_operators",),
    "fastppo.compile.decompositions": ("torch._inductor.decomposition.select_decomp_table",),
    "fastppo.compile.cuda_graph": ("torch.cuda.CUDAGraph", "torch.cuda.graph"),
    "fastppo.system.tensordicts": ("torch.compiler",),
}


def under(name, prefix):
    """Whether a dotted name is the prefix or lies below it: fastppo.run is not above fastppo.runner."""
    return name == prefix or name.startswith(prefix + ".")


def module_name(path):
    """fastppo/core/adam.py -> fastppo.core.adam; a package's __init__ is the package."""
    parts = ("fastppo", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source, package):
    """Every dotted name that the source imports, wherever in it: `from a import b` counts as a.b, relative ones resolved."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*base, node.module] if node.module else base)
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    return names


def named(source):
    """Every dotted name that the source imports or spells out, `torch.compile` for one."""
    attributes = {ast.unparse(node) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    return imported(source, "") | attributes


def place_of(name):
    """(floor, unit) of a dotted name of ours."""
    top = [*name.split("."), ""][1]
    places = [(floor, unit) for floor, units in enumerate(FLOORS) for unit in units if top in unit]
    return places[0] if places else (len(FLOORS) - 1, None)  # a name that the package itself exports


def forbidden_imports(source, module, package):
    """Imports of ours that the module has no business with."""
    floor, unit = place_of(module)
    ours = {name for name in imported(source, package) if under(name, "fastppo")}
    return {name for name in ours if place_of(name)[0] >= floor and place_of(name)[1] != unit}


def package_of(path):
    """The package that relative imports in this file start from."""
    return module_name(path.parent / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_downwards(path):
    """Each module imports its own unit and the floors below. Imports inside functions and under TYPE_CHECKING count."""
    assert forbidden_imports(path.read_text(), module_name(path), package_of(path)) == set()


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_few_modules_name_the_compiler(path):
    """Compilation wraps whole functions from outside: five modules name the compiler, each its own part."""
    used = {name for name in named(path.read_text()) if any(under(name, tool) for tool in (*COMPILERS, *CUDA_GRAPHS))}
    allowed = MAY_NAME.get(module_name(path), ())
    assert {name for name in used if not any(under(name, part) for part in allowed)} == set()
    assert {part for part in allowed if not any(under(name, part) for name in used)} == set()  # none that is not needed


def test_one_module_imports_tensordict():
    """Imported elsewhere, and first, it would load Dynamo. Those who have imported torchrl have loaded that already."""
    users = {module_name(path) for path in FILES if any(under(name, "tensordict") for name in imported(path.read_text(), ""))}
    assert users == {"fastppo.system.tensordicts", "fastppo.envs.torchrl"}


def test_no_two_modules_have_one_name():
    """A file is named by its last part in speech and in tracebacks."""
    names = [path.stem for path in FILES if path.stem != "__init__"]
    assert sorted(names) == sorted(set(names))


def test_every_layer_was_looked_at():
    """The walk finds the package: were it empty, everything above would pass."""
    names = {module_name(path) for path in FILES}
    assert {"fastppo", "fastppo.core.ppo", "fastppo.policy.network"} <= names
    units = [name for floor in FLOORS for unit in floor for name in unit]
    assert sorted(units) == sorted({[*name.split("."), ""][1] for name in names})


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("fastppo.core.adam", "import torch\nfrom fastppo.core import losses", set()),
        ("fastppo.core.adam", "def f():\n    from fastppo.policy import network", {"fastppo.policy.network"}),
        ("fastppo.core.adam", "import fastppo", {"fastppo"}),
        ("fastppo.core.adam", "from .. import config", {"fastppo.config"}),
        ("fastppo.core.adam", "from .losses import weighted_sum", set()),
        ("fastppo.core.adam", "if TYPE_CHECKING:\n    import fastppo.envs.factory", {"fastppo.envs.factory"}),
        ("fastppo.core.adam", "from fastppo.ranks import Ranks", {"fastppo.ranks.Ranks"}),
        ("fastppo.core.adam", "from fastppo.errors import UsageError", set()),
        ("fastppo.policy.network", "from fastppo.rollout.storage import x", {"fastppo.rollout.storage.x"}),
        ("fastppo.policy.network", "from fastppo.envs.factory import make", {"fastppo.envs.factory.make"}),
        ("fastppo.envs.cartpole", "from fastppo.core import scan\nfrom fastppo.system.cpus import available_cores", set()),
        (
            "fastppo.rollout.storage",
            "from fastppo.envs.factory import make\nfrom fastppo.run.log import Log",
            {"fastppo.run.log.Log"},
        ),
        ("fastppo.run.checkpoint_file", "from fastppo.config import TrainConfig", {"fastppo.config.TrainConfig"}),
        ("fastppo.presets", "from fastppo.config import TrainConfig", set()),
        ("fastppo.config", "from fastppo.train import train", {"fastppo.train.train"}),
        ("fastppo.training.loop", "from fastppo.cli import run", {"fastppo.cli.run"}),
        ("fastppo.training.loop", "from fastppo import train", {"fastppo.train"}),
        ("fastppo.train", "from fastppo.core.ppo import learn\nimport fastppo.cli", set()),
    ],
)
def test_the_check_itself(module, source, found):
    """The rules bite where they should and nowhere else, on sources written here."""
    assert forbidden_imports(source, module, module.rpartition(".")[0]) == found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch\nf = torch.compile(g)", True),
        ("from torch import compile", True),
        ("import torch._inductor.config as c", True),
        ("from torch.cuda import CUDAGraph", True),
        ("import torch\nwith torch.cuda.graph(g): pass", True),
        ("import torch\ntorch.compiler.reset()", True),
        ("import re\nre.compile('x')\nconfig.compile", False),
        ("import torch\ntorch.cuda.is_available()", False),
    ],
)
def test_the_compiler_check_itself(source, found):
    """Using, importing or configuring the compiler is seen however it is spelled; re.compile and a flag are not it."""
    assert any(under(name, tool) for name in named(source) for tool in (*COMPILERS, *CUDA_GRAPHS)) is found


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.rglob("*.py")), ids=lambda path: path.stem)
def test_no_test_imports_a_test(path):
    """What several tests need is in tests/support. Its environments have one name, the one that their ids start with."""
    tops = {name.split(".")[0] for name in imported(path.read_text(), "support")}
    assert {name for name in tops if name.startswith("test_") or name == "conftest"} == set()
    assert not any(under(name, "support.environments") for name in imported(path.read_text(), "support"))
