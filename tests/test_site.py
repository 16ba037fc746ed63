"""The documentation site, without building it (scripts/docs.sh does): its pages, the names that it documents, its links."""

import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import fastppo
from support.pages import PAGES, ROOT

SETTINGS = yaml.load((ROOT / "mkdocs.yml").read_text(), yaml.BaseLoader)  # which makes no objects of tags
OUTSIDE = ["README.md", "REFERENCE.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/LOG.md"]
DOCUMENTED = re.findall(r"^::: (\S+)$", "\n".join(PAGES.values()), re.MULTILINE)


@pytest.fixture(scope="module")
def hook():
    """The module of the links; it imports mkdocs only where a page is added."""
    spec = importlib.util.spec_from_file_location("mkdocs_hook", ROOT / SETTINGS["hooks"][0])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_page_is_in_the_navigation(hook):
    """Once: those of docs/, and those of the repository that readers look for."""
    pages = [path.name for path in (ROOT / "docs").glob("*.md")]
    assert sorted(hook.leaves(SETTINGS["nav"])) == sorted([*pages, *OUTSIDE])
    assert all((ROOT / name).exists() for name in OUTSIDE)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_names_exist(name):
    """A module, or what one holds."""
    module, _, last = name.rpartition(".")
    assert hasattr(importlib.import_module(module), last) or importlib.util.find_spec(name)


def test_every_public_name_is_documented():
    """By the place that it is imported from, or its own."""
    written = {name.rpartition(".")[2]: name for name in DOCUMENTED}
    assert [name for name in fastppo.__all__ if name not in written] == []
    for name in fastppo.__all__:
        module, _, _ = written[name].rpartition(".")
        assert getattr(importlib.import_module(module), name) is getattr(fastppo, name)
        assert inspect.getdoc(getattr(fastppo, name))


LINKS = {  # page, link in it -> on the site without a known repository, and with one
    ("python.md", "[Runs](runs.md#fine-tuning)"): ["[Runs](runs.md#fine-tuning)"] * 2,
    ("python.md", "[speed](../benchmarks/README.md#scale)"): ["[speed](benchmarks/README.md#scale)"] * 2,
    ("benchmarks/README.md", "[LOG](LOG.md)"): ["[LOG](LOG.md)"] * 2,
    ("benchmarks/README.md", "[x](../docs/python.md)"): ["[x](../python.md)"] * 2,
    ("README.md", "[guide](docs/python.md)"): ["[guide](python.md)"] * 2,
    ("README.md", "[a](https://arxiv.org/abs/1)"): ["[a](https://arxiv.org/abs/1)"] * 2,
    ("README.md", "![a](docs/python.md)"): ["![a](docs/python.md)"] * 2,
    ("python.md", "[core/ppo.py](../fastppo/core/ppo.py)"): [
        "`fastppo/core/ppo.py`",
        "[core/ppo.py](https://host/us/blob/main/fastppo/core/ppo.py)",
    ],
    ("README.md", r"[\_\_main\_\_.py](fastppo/__main__.py)"): [
        "`fastppo/__main__.py`",
        r"[\_\_main\_\_.py](https://host/us/blob/main/fastppo/__main__.py)",
    ],
    ("python.md", "[a checker](../fastppo/envs/check.py)"): [
        "a checker (`fastppo/envs/check.py`)",
        "[a checker](https://host/us/blob/main/fastppo/envs/check.py)",
    ],
}


@pytest.mark.parametrize("link", LINKS)
def test_links_between_files(link, hook):
    """To pages of the site, else to the repository, else the file's name."""
    name, text = link
    on_site = [*(path.name for path in Path(ROOT / "docs").glob("*.md")), *OUTSIDE]
    files = SimpleNamespace(get_file_from_path=lambda path: path if path in on_site else None)
    page = SimpleNamespace(file=SimpleNamespace(src_uri=name))
    found = [
        hook.on_page_markdown(f"see {text}.", page, SimpleNamespace(repo_url=url), files) for url in (None, "https://host/us/")
    ]
    assert found == [f"see {expected}." for expected in LINKS[link]]
