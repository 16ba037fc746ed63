"""The directory of compiled programs: what is in it, how large it may become, how it is cleared. Loads nothing, costs no torch.

    KEY-DIGEST.so     a library. DIGEST is that of its bytes: a file that was cut or changed is not loaded. Its time of
                      modification is that of its last use.
    KEY-DIGEST.json   what the library is, for people; its time of modification is that of the build.
    KEY.refused       why no other process can build this program, in one line.
    build-*           a build under way, or one that was killed.

Several processes use the directory at once, without a lock: a library appears whole (a rename), and one that is removed while
another process has it loaded stays in that process's memory. One that vanishes just before it is loaded is built again.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fastppo.compile.compile_errors import CompileError, explain
from fastppo.system.platforms import is_private, user_number

MAX_BYTES = 512 * 2**20  # of all libraries; one is 2 MB (8 environments, two hidden layers)
MAX_UNUSED_SECONDS = 90 * 86_400.0
ABANDONED_SECONDS = 6 * 3_600.0  # a build takes minutes
_LIBRARY = re.compile(r"(?P<key>[\w-]+)-(?P<digest>[0-9a-f]{64})\.so")


@dataclass(frozen=True)
class Entry:
    """A library in the cache. Times are seconds since 1970."""

    path: Path
    num_bytes: int
    used: float
    built: float | None  # None where its description is lost, as the next two are ""
    program: str
    torch: str


def cache_dir() -> Path:
    """Where compiled programs are kept: $XDG_CACHE_HOME/fastppo, or ~/.cache/fastppo where that is no absolute path.

    A user without a home directory, or with one that cannot be written, as in many containers, has fastppo-UID among the
    temporary files. What lies there is loaded only if nobody else can have put it there: see `check_cache_dir`.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):
        return Path(given) / "fastppo"
    return home_cache() or Path(tempfile.gettempdir()) / f"fastppo-{user_number()}"


def home_cache() -> Path | None:
    """~/.cache/fastppo, if it is there or can be made."""
    try:
        cache = Path.home() / ".cache" / "fastppo"
        above = next(place for place in (cache, *cache.parents) if place.exists())
    except (RuntimeError, OSError):  # no HOME and no entry for the user; no right to look
        return None
    return cache if above == cache or os.access(above, os.W_OK) else None


def check_cache_dir(cache_dir: Path) -> None:
    """Create `cache_dir` (mode 0700) or see that it is a directory of ours that nobody else can write to or read.

    What lies there is loaded into the process: raises CompileError where another user could have put it.
    """
    try:
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = cache_dir.lstat()
    except OSError as error:
        raise CompileError(f"no cache directory: {explain(error, cache_dir)}") from error
    if not stat.S_ISDIR(status.st_mode) or not is_private(status):
        raise CompileError(f"cache directory {cache_dir} must be owned by this user, with mode 0700")


def find(cache_dir: Path, key: str) -> Path | None:
    """The library under this key, if there is one and it is as it was written."""
    for library in cache_dir.glob(f"{key}-*.so"):
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            if library.stem == f"{key}-{_digest(library)}":
                return library
        remove(library)  # damaged: loading it could kill the process
    return None


def keep(library: Path, cache_dir: Path, key: str, about: Mapping[str, str]) -> None:
    """Move a new library to its place, and make room. Atomic: a reader sees the whole file or none. Raises OSError.

    about: `program` and `torch`, for people.
    """
    place = cache_dir / f"{key}-{_digest(library)}.so"
    os.replace(library, place)
    with contextlib.suppress(OSError):  # the library is there
        place.with_suffix(".json").write_text(json.dumps(dict(about)), encoding="utf-8")
    refusal(cache_dir, key).unlink(missing_ok=True)
    trim(cache_dir)


def touch(library: Path) -> None:
    """Note that it was used just now; on a directory that cannot be written to nothing is noted."""
    with contextlib.suppress(OSError):
        os.utime(library)


def remove(library: Path) -> None:
    """The library and its description. One that is gone already, or cannot be removed, is no error."""
    for path in (library, library.with_suffix(".json")):
        with contextlib.suppress(OSError):
            path.unlink()


def refusal(cache_dir: Path, key: str) -> Path:
    """The file that says why no other process can build the program."""
    return cache_dir / f"{key}.refused"


def refuse(cache_dir: Path, key: str, reason: str) -> None:
    """Remember `reason`, so that not every run tries again. Where it cannot be written, the next run tries."""
    with contextlib.suppress(OSError):
        refusal(cache_dir, key).write_text(reason, encoding="utf-8")


def entries(cache_dir: Path) -> list[Entry]:
    """All libraries, the one used last first."""
    found = []
    for path in cache_dir.glob("*.so"):
        if _LIBRARY.fullmatch(path.name) is None:
            continue
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            found.append(Entry(path, status.st_size, status.st_mtime, *_description(path.with_suffix(".json"))))
    return sorted(found, key=lambda entry: (-entry.used, entry.path))


def trim(
    cache_dir: Path, max_bytes: int = MAX_BYTES, max_unused: float = MAX_UNUSED_SECONDS, now: float | None = None
) -> list[Entry]:
    """Remove libraries that were not used for `max_unused` seconds, then those used longest ago until max_bytes are enough.

    The one used last stays whatever its size. What killed builds have left goes too. Returns the libraries removed.
    """
    now = time.time() if now is None else now
    removed, total = [], 0
    for index, entry in enumerate(entries(cache_dir)):
        total += entry.num_bytes
        if index > 0 and (total > max_bytes or now - entry.used > max_unused):
            remove(entry.path)
            removed.append(entry)
    for path in _leftovers(cache_dir, now, max_unused):
        _discard(path)
    return removed


def clear(cache_dir: Path, older_than: float = 0.0, now: float | None = None) -> list[Entry]:
    """Remove libraries that were not used for `older_than` seconds, and what killed builds have left. Returns the libraries."""
    now = time.time() if now is None else now
    removed = [entry for entry in entries(cache_dir) if now - entry.used >= older_than]
    for entry in removed:
        remove(entry.path)
    for path in _leftovers(cache_dir, now, older_than):
        _discard(path)
    return removed


def _leftovers(cache_dir: Path, now: float, max_age: float) -> Iterator[Path]:
    """Builds that were killed, refusals of that age, and descriptions without their library."""
    for path in [*cache_dir.glob("build-*"), *cache_dir.glob("*.refused")]:
        with contextlib.suppress(FileNotFoundError):
            if now - path.stat().st_mtime >= (ABANDONED_SECONDS if path.name.startswith("build-") else max_age):
                yield path
    for path in cache_dir.glob("*.json"):
        library = path.with_suffix(".so")
        if _LIBRARY.fullmatch(library.name) and not library.exists():
            yield path


def _discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _description(path: Path) -> tuple[float | None, str, str]:
    """(built, program, torch)."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        return path.stat().st_mtime, str(about["program"]), str(about["torch"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, "", ""


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()
