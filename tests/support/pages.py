"""README and the pages of docs/, as text."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}


def section(page, name):
    """The text under a heading of a page, with the sections below it."""
    found = re.search(rf"^(#+) {re.escape(name)}\n(.*?)(?=\n#{{1,2}} |\Z)", PAGES[page], re.MULTILINE | re.DOTALL)
    return found[2]


def python_in(text):
    """The one block of Python in it."""
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return block


def command_in(text):
    """Its first block of shell."""
    return re.search(r"```bash\n(.*?)```", text, re.DOTALL)[1]
