"""A hook of mkdocs: pages of the site that lie outside docs/, and links between files of the repository.

Pages are written for people who read them in the repository. There a link such as ../fastppo/core/ppo.py leads to the file. On
the site it leads to the page, if the file is one. Any other file is linked in the repository where mkdocs.yml has a `repo_url`,
and is named where it has none.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PICTURES = "benchmarks/*.png"
LINK = re.compile(r"(?<!!)\[([^]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
WALK = "ppo.md"  # the page that shows sources and no docstrings
DOCSTRING = ("description", "parameters", "returns", "raises")
WITHOUT = ("root_heading", "root_toc_entry", "signature", *(f"docstring_{part}" for part in DOCSTRING))
SOURCE_ONLY = "{" + ", ".join(f"show_{part}: false" for part in WITHOUT) + ", skip_local_inventory: true}"


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Adds what nav names and docs/ does not have, and the pictures of these pages."""
    from mkdocs.structure.files import File

    pictures = [path.relative_to(ROOT).as_posix() for path in ROOT.glob(PICTURES)]
    for name in [*leaves(config.nav), *pictures]:
        if files.get_file_from_path(name) is None and (ROOT / name).exists():
            files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def leaves(nav: Any) -> Iterator[str]:
    """The paths in a nav of mkdocs.yml."""
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from leaves(part)


def on_page_markdown(markdown: str, page: "Page", config: "MkDocsConfig", files: "Files") -> str:
    """Links to files of the repository as the site needs them."""
    name = page.file.src_uri
    folder = (ROOT / "docs" / name if (ROOT / "docs" / name).exists() else ROOT / name).parent

    def site_link(link: re.Match[str]) -> str:
        text, target, heading = link.groups(default="")
        path = Path(os.path.normpath(folder / target))
        if ":" in target or not path.exists():
            return link[0]
        inside = path.relative_to(ROOT).as_posix()
        other = inside.removeprefix("docs/")
        if files.get_file_from_path(other) is not None:
            return f"[{text}]({os.path.relpath(other, Path(name).parent)}{heading})"
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{inside}{heading})"
        return f"`{inside}`" if inside.endswith(text.replace("\\", "").rstrip("/")) else f"{text} (`{inside}`)"

    if name == WALK:
        markdown = re.sub(r"^(::: \S+)$", rf"\1\n    options: {SOURCE_ONLY}", markdown, flags=re.MULTILINE)
    return LINK.sub(site_link, markdown)


def on_page_content(html: str, page: "Page", **_: Any) -> str:
    """Unfolds what is best read as source: all of the walk, and short classes, whose fields have their shapes as comments."""

    def unfold(source: re.Match[str]) -> str:
        is_short_class = '<span class="k">class</span>' in source[0] and source[0].count("\n") < 40
        return source[0].replace("<details", "<details open", 1) if page.file.src_uri == WALK or is_short_class else source[0]

    return re.sub(r'<details class="mkdocstrings-source">.*?</details>', unfold, html, flags=re.DOTALL)
