"""README and docs/: examples run, flags are known, links lead somewhere, file trees are those of the package."""

import ast
import importlib
import inspect
import re
import shlex
from dataclasses import fields
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3 import PPO

import fastppo
from fastppo import TrainConfig
from fastppo.cli import parse, parse_train
from fastppo.reference import settings_of
from fastppo.training import loop
from support.pages import PAGES, ROOT, python_in, section

TEXT = "\n".join(PAGES.values())
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("# ")
]
QUOTED = re.findall(r"`((?:scripts/|\.venv/bin/|fastppo |python -m fastppo)[^`]*)`", TEXT)

# of the section [train] in pufferlib/config/default.ini of PufferLib 3.0
PUFFERLIBS_SETTINGS = """
    name project seed torch_deterministic cpu_offload device optimizer anneal_lr precision total_timesteps learning_rate gamma
    gae_lambda update_epochs clip_coef vf_coef vf_clip_coef max_grad_norm ent_coef adam_beta1 adam_beta2 adam_eps data_dir
    checkpoint_interval batch_size minibatch_size max_minibatch_size bptt_horizon compile compile_mode compile_fullgraph
    vtrace_rho_clip vtrace_c_clip prio_alpha prio_beta0
"""

# page -> the tests that run its blocks of Python, in their order
EXAMPLES = {
    "docs/python.md": [
        "test_docs.test_examples_run",
        "test_python_verbs.test_the_pages_example",
        "test_docs.test_examples_run",
        "test_docs.test_examples_run",
        "test_module_policy.test_the_pages_network_learns",
        "test_export.test_the_pages_file_runs",
    ],
    "docs/environments.md": [
        "test_composite_actions.test_the_example_of_the_docs",
        "test_collect_runs.test_the_pages_environment_learns",
        "test_jax.test_the_pages_function",
    ],
    "docs/from-sb3.md": ["test_import_sb3.test_statistics"],
    "docs/memory.md": ["test_export.test_the_pages_memory"],
}


def test_every_example_is_run_somewhere():
    """A new one belongs into EXAMPLES, with the test that runs it."""
    blocks = {page: text.count("```python\n") for page, text in PAGES.items() if "```python\n" in text}
    assert blocks == {page: len(tests) for page, tests in EXAMPLES.items()}
    for name in {name for names in EXAMPLES.values() for name in names}:
        module, _, test = name.partition(".")
        assert callable(getattr(importlib.import_module(module), test))


@pytest.mark.parametrize(
    ("name", "obs"),
    [
        ("Train and load", np.zeros(6, np.float32)),
        ("Callbacks and your own vector environment", None),
        ("Numbers of your own, and single steps", None),
    ],
)
def test_examples_run(name, obs, tmp_path, monkeypatch):
    """As they stand there, their runs cut to two iterations."""
    monkeypatch.chdir(tmp_path)
    train, lengths = loop.train, []

    def of_a_moment(*args, total_timesteps=None, **settings):
        lengths.append(total_timesteps)
        return train(*args, **settings, num_iterations=2, eval_episodes=2, compile="off", plain=True)

    monkeypatch.setattr("fastppo.training.loop.train", of_a_moment)
    names = {"__name__": "page", "obs": obs}
    exec(python_in(section("docs/python.md", name)), names)
    assert lengths[0] == 100_000
    assert (tmp_path / "runs").is_dir()
    assert names["result"].summary["iterations"] == 2
    if obs is not None:
        assert names["action"] in range(gym.make("Acrobot-v1").action_space.n)


@pytest.fixture
def some_run(tmp_path, monkeypatch):
    """A directory in which runs/NAME and sweeps/Acrobot-v1/best.json are what the pages take them for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "NAME" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "NAME" / "checkpoints" / "last.pt").touch()
    (tmp_path / "runs" / "NAME" / "config.json").write_text(TrainConfig().to_json())
    (tmp_path / "sweeps" / "Acrobot-v1").mkdir(parents=True)
    (tmp_path / "ppo.yml").write_text(re.search(r"```yaml\n(.*?)```", TEXT, re.DOTALL)[1])
    preset = re.search(r'`(\{"settings".*?)`', TEXT)[1]
    (tmp_path / "sweeps" / "Acrobot-v1" / "best.json").write_text(preset)


def taken(words):
    """Whether the flags' own parser takes a command line; raises UsageError where it does not."""
    program, *args = words
    if program == "torchrun":  # its own flags are PyTorch's
        program, *args = ["python", *args[args.index("-m") :]]
    if program.endswith(("/python", "python")) and args[:1] == ["-m"]:
        program, args = "fastppo", [args[1].removeprefix("fastppo."), *args[2:]]
    if program == "scripts/train.sh":
        program, args = "fastppo", ["train", *args]
    if program.endswith("fastppo"):
        verb, *args = args
        if verb == "train":
            return parse_train(args)
        if verb == "sweep":
            args, fixed = (args[: args.index("--")], args[args.index("--") + 1 :]) if "--" in args else (args, [])
            parse_train(fixed)
        return parse(settings_of(verb.replace("_", "-")), args, prog=verb)
    paths = [word for word in words if word.startswith(("benchmarks/", "scripts/", "tests/"))]
    assert paths, f"what is this? {words}"
    assert all((ROOT / path).exists() for path in paths)
    return None


@pytest.mark.usefixtures("some_run")
@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_taken(line):
    """Every line of every bash block: a verb's flags by its own parser, files of the repository that are there."""
    taken(shlex.split(line, comments=True))


@pytest.mark.usefixtures("some_run")
@pytest.mark.parametrize("text", QUOTED)
def test_commands_in_sentences_are_taken(text):
    """Those between backquotes that have flags, too: S stands for a seed, ID for an environment."""
    words = [{"S": "1", "ID": "CartPole-v1"}.get(word, word) for word in shlex.split(text)]
    if any(word.startswith("--") and word != "--help" for word in words):
        taken(words)


def test_flags_in_sentences_are_flags():
    """No --flag is named that nothing takes."""
    flags = set(re.findall(r"`(--[a-z][a-z0-9-]*)", TEXT)) | set(re.findall(r"[(/ ](--[a-z][a-z0-9-]*)[` =]", TEXT))
    reference = (ROOT / "REFERENCE.md").read_text()
    of_torchrun = {"--max-restarts", "--nproc-per-node", "--nnodes", "--rdzv-id", "--rdzv-backend", "--rdzv-endpoint"}
    of_slurm = {"--nodes", "--ntasks-per-node", "--cpus-per-task", "--requeue"}
    of_the_zoo = {"--algo", "--env", "--optimize"}
    of_puffer = {"--vec", "--wandb", "--wandb-project", "--rnn-name", "--policy-name", "--load-model-path", "--render-mode"}
    of_puffer |= {"--save-frames", "--gif-path", "--max-runs"}
    known = {"--help"} | of_torchrun | of_slurm | of_the_zoo | of_puffer
    assert {flag for flag in flags - known if f"`{flag}`" not in reference} == set()


@pytest.mark.parametrize("name", ["docs/from-cleanrl.md", "docs/from-pufferlib.md", "docs/from-sb3.md"])
def test_arguments_of_others_have_flags_of_train(name):
    """What stands beside an argument of another library is a setting of a run. Of PPO's arguments none is left out."""
    heading = "Arguments of PPO" if name.endswith("sb3.md") else "Arguments"
    rows = [line.split("|")[1:4] for line in section(name, heading).splitlines() if line.startswith("| `")]
    assert len(rows) > 15
    for _, ours, _ in rows:
        for flag in re.findall(r"--[a-z0-9-]+", ours):
            assert flag[2:].replace("-", "_") in {spec.name for spec in fields(TrainConfig)}, flag
    named = {argument for theirs, _, _ in rows for argument in re.findall(r"`(\w+)`", theirs)}
    if name.endswith("sb3.md"):
        assert named == set(inspect.signature(PPO.__init__).parameters) - {"self", "_init_setup_model"}
    if name.endswith("pufferlib.md"):
        assert named == set(PUFFERLIBS_SETTINGS.split())


def test_the_tree_is_that_of_the_package():
    """Each file of the package on a line of its own in its folder, and nothing that is not there."""
    tree = section("docs/structure.md", "Files").split("fastppo/\n")[1]
    named, folder = [], ""
    for line in tree.splitlines():
        indent, name = re.match(r"( *)(\S*)", line).groups()
        if name.endswith("/"):
            folder = name
        elif name:
            named.append(name if len(indent) == 6 else folder + name)
    package = Path(fastppo.__file__).parent
    found = [path for ending in ("py", "cpp", "h") for path in package.rglob(f"*.{ending}") if path.name != "__init__.py"]
    files = {str(path.relative_to(package)) for path in found}
    assert sorted(named) == sorted(files)


def test_readmes_tree_is_that_of_the_folders():
    """Each folder and each module of the package's top, and the repository's folders."""
    tree = section("README.md", "Files")
    package, _, beside = tree.split("fastppo/\n")[1].partition("    docs/")
    named = {name.rstrip("/") for line in package.splitlines() for name in line.split("    ")[0:] for name in name.split()}
    tops = {path.name for path in Path(fastppo.__file__).parent.iterdir() if path.name[0] != "_"}
    tops -= {"py.typed"}
    assert {name for name in tops if name not in named} <= {"errors.py", "random_streams.py", "reference.py"}
    assert all((ROOT / name).is_dir() for name in re.findall(r"^    (\w+)/", "    docs/" + beside, re.MULTILINE))


def test_readme_ends_at_limits():
    """It is short: what it is, how to install it, the first command, how it is fast, numbers, limits."""
    headings = re.findall(r"^## (.*)$", PAGES["README.md"], re.MULTILINE)
    assert headings[0] == "Three commands"
    assert headings[-1] == "Limits"
    assert len(PAGES["README.md"].splitlines()) <= 170


def broken_tables(text):
    """Rows of Markdown tables that would not be shown as such: without a header, or with other numbers of cells than theirs."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    broken = []
    for table in re.findall(r"(?:^ *\|.*\n)+", text, re.MULTILINE):
        rows = table.splitlines()
        cells = [len(re.findall(r"(?<!\\)\|", row.strip())) for row in rows]
        is_ruled = len(rows) > 1 and re.fullmatch(r"\|( *:?-+:? *\|)+", rows[1].strip())
        broken += [row for row, count in zip(rows, cells, strict=True) if not is_ruled or count != cells[0]]
    return broken


def test_tables_are_whole():
    """A blank line within a table ends it, and what follows is shown as text."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
    assert len(pages) >= 10
    assert {page.name: rows for page in pages if (rows := broken_tables(page.read_text()))} == {}
    assert broken_tables("| a | b |\n|---|---|\n| 1 | 2 |\n") == []
    assert broken_tables("| a | b |\n|---|---|\n\n| 1 | 2 |\n") == ["| 1 | 2 |"]
    assert broken_tables("| a | b |\n|---|---|\n| 1 |\n") == ["| 1 |"]


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    """Files of the repository, and headings of a page."""
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[name]):
        path, _, heading = target.partition("#")
        if not path.startswith("https://"):
            page = (ROOT / name).parent / path if path else ROOT / name
            assert page.exists(), target
            if heading:
                headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
                assert heading in {re.sub(r"[^a-z0-9 -]", "", text.lower()).replace(" ", "-") for text in headings}, target


def test_docstrings_hold_no_examples_of_their_own():
    """Nothing starts with >>>: an example that no test runs is soon wrong. The package's own is the one above, in short."""
    for path in Path(fastppo.__file__).parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                assert ">>>" not in (ast.get_docstring(node) or ""), path
    first, second, third = (ast.get_docstring(ast.parse(Path(fastppo.__file__).read_text())) or "").splitlines()[2:5]
    assert first.startswith("from fastppo import ")
    assert ast.parse(f"{first}\n{second}\n{third}")
