"""The C++ files of the fused programs and how they are compiled. Imports nothing of ours: setup.py runs this file."""

import hashlib
import platform
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
MAIN = FOLDER / "fused.cpp"
# Without the first, a square root is a call. Without the second, loops with a clamp are not vectorised. Both keep all results.
FLAGS = ("-fno-math-errno", "-fno-trapping-math", "-pthread")


def files() -> list[Path]:
    """All of them, in a fixed order."""
    return [*sorted(FOLDER.glob("*.h")), MAIN]


def digest() -> str:
    """A digest of their text: a library of other files is not loaded."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in files())).hexdigest()[:25]


def processors() -> dict[str, tuple[str, ...]]:
    """The kinds of processors that an installed package has a library for, and the compiler's flags for each."""
    if platform.machine() in ("x86_64", "AMD64"):
        return {"avx2": ("-march=x86-64-v3",), "avx512": ("-march=x86-64-v4", "-mprefer-vector-width=512")}
    return {"generic": ()}
