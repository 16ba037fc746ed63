"""Whether gymnasium is new enough: many packages of environments ask pip for an old one, and pip then replaces the newer one.

Asks the installed metadata, and imports nothing.
"""

import contextlib
import sys
from importlib import metadata
from pathlib import Path

OLDEST = (1, 1)  # as pyproject.toml has it


def check_gymnasium() -> None:
    """Raise ImportError where gymnasium is too old. A command prints the line alone, and exits with code 2."""
    installed = ""
    with contextlib.suppress(metadata.PackageNotFoundError):
        installed = metadata.version("gymnasium")
    numbers = installed.split(".")[:2]
    if not installed or not all(map(str.isdigit, numbers)) or tuple(map(int, numbers)) >= OLDEST:
        return
    wanted = ".".join(map(str, OLDEST))
    message = (
        f"fastppo needs gymnasium {wanted} or newer, and {installed} is installed: pip install 'gymnasium>={wanted}' "
        "(pip check names the packages that asked for an older one; many of them run with the newer one)"
    )
    if _is_command():
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
    raise ImportError(message, name="gymnasium")


def _is_command() -> bool:
    """Whether this process is `fastppo ...` or `python -m fastppo...`, whose argv[0] is -m while the package is imported."""
    if sys.argv[:1] == ["-m"]:
        after = sys.orig_argv[sys.orig_argv.index("-m") + 1 :] if "-m" in sys.orig_argv else []
        return bool(after) and after[0].partition(".")[0] == "fastppo"
    return bool(sys.argv) and Path(sys.argv[0]).name.removesuffix(".exe") == "fastppo"
