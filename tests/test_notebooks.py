"""notebooks/: kept without outputs, their imports and links lead somewhere; executed where slow tests run."""

import ast
import importlib
import importlib.util
import json
import re

import pytest

from support.pages import PAGES, ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
ids = [path.stem for path in NOTEBOOKS]


def cells(path, kind):
    """The texts of its cells of a kind, "code" or "markdown"."""
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def test_readme_names_each():
    """And no other."""
    assert sorted(re.findall(r"\(notebooks/(\w+)\.ipynb\)", PAGES["README.md"])) == ids
    assert len(ids) == 6


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_nothing_is_kept_but_text(path):
    """No outputs, counts or metadata of the program that wrote it: a change of a notebook is a change of its text."""
    notebook = json.loads(path.read_text())
    assert set(notebook["metadata"]) == {"kernelspec"}
    for cell in notebook["cells"]:
        assert cell["metadata"] == {}
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
    assert cells(path, "markdown")[0].startswith("# ")
    assert path.read_text() == json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_names_exist(path):
    """Code parses, and what it imports of fastppo is there; other packages can be found."""
    for node in ast.walk(ast.parse("\n".join(cells(path, "code")))):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "fastppo":
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
        elif isinstance(node, ast.ImportFrom | ast.Import):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert all(importlib.util.find_spec(module) for module in modules)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_links_lead_somewhere(path):
    """From one notebook to others and to the pages."""
    links = re.findall(r"\]\(([^)#]+)", "\n".join(cells(path, "markdown")))
    assert links
    assert [link for link in links if not link.startswith("https://") and not (path.parent / link).exists()] == []


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=ids)
def test_runs(path, tmp_path, monkeypatch):
    """From top to bottom, in a new folder, with at least one picture."""
    import nbclient
    import nbformat

    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert (tmp_path / "runs").is_dir()
