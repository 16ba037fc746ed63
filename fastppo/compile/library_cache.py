"""The directory of compiled programs: its files, its size limit and its cleanup. Loads no library and does not import torch.

    KEY-DIGEST.so     a library. DIGEST is the digest of its bytes, so a truncated or changed file is not loaded. The
                      modification time is the time of the last use.
    KEY-DIGEST.json   a description of the library for people. The modification time is the time of the build.
    KEY.refused       one line: why a child process cannot build this program.
    build-*           a build in progress, or a build that was killed.

Several processes use the directory at once without a lock. A library appears whole, by a rename. A library that is removed
while a process has it loaded stays in that process's memory. A library that is removed just before loading is built again.
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

MAX_BYTES = 512 * 2**20  # total size; one library has 2 MB (8 environments, two hidden layers)
MAX_UNUSED_SECONDS = 90 * 86_400.0
ABANDONED_SECONDS = 6 * 3_600.0  # a build takes minutes
_LIBRARY = re.compile(r"(?P<key>[\w-]+)-(?P<digest>[0-9a-f]{64})\.so")


@dataclass(frozen=True)
class Entry:
    """A library in the cache. Times are seconds since 1970."""

    path: Path
    num_bytes: int
    used: float
    built: float | None  # None if the description is missing; `program` and `torch` are "" then
    program: str
    torch: str


def cache_dir() -> Path:
    """The directory of compiled programs: $XDG_CACHE_HOME/fastppo if that is an absolute path, else ~/.cache/fastppo.

    Without a writable home directory, as in many containers, it is fastppo-UID in the directory for temporary files.
    `check_cache_dir` makes sure that no other user can write there.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):
        return Path(given) / "fastppo"
    return home_cache() or Path(tempfile.gettempdir()) / f"fastppo-{user_number()}"


def home_cache() -> Path | None:
    """~/.cache/fastppo if it exists or can be created, else None."""
    try:
        cache = Path.home() / ".cache" / "fastppo"
        above = next(place for place in (cache, *cache.parents) if place.exists())
    except (RuntimeError, OSError):  # no HOME and no passwd entry; no permission to look
        return None
    return cache if above == cache or os.access(above, os.W_OK) else None


def check_cache_dir(cache_dir: Path) -> None:
    """Create `cache_dir` with mode 0700, or check that it is owned by this user and closed to all others.

    Its libraries are loaded into this process. Raises CompileError if another user could have written them.
    """
    try:
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = cache_dir.lstat()
    except OSError as error:
        raise CompileError(f"no cache directory: {explain(error, cache_dir)}") from error
    if not stat.S_ISDIR(status.st_mode) or not is_private(status):
        raise CompileError(f"cache directory {cache_dir} must be owned by this user, with mode 0700")


def find(cache_dir: Path, key: str) -> Path | None:
    """The library under this key, or None. Removes a library whose digest is wrong."""
    for library in cache_dir.glob(f"{key}-*.so"):
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            if library.stem == f"{key}-{_digest(library)}":
                return library
        remove(library)  # damaged: loading it could kill the process
    return None


def keep(library: Path, cache_dir: Path, key: str, about: Mapping[str, str]) -> None:
    """Move a new library into the cache, then trim the cache. Atomic: a reader sees the whole file or none. Raises OSError.

    about: `program` and `torch`, for people.
    """
    place = cache_dir / f"{key}-{_digest(library)}.so"
    os.replace(library, place)
    with contextlib.suppress(OSError):  # the library works without a description
        place.with_suffix(".json").write_text(json.dumps(dict(about)), encoding="utf-8")
    refusal(cache_dir, key).unlink(missing_ok=True)
    trim(cache_dir)


def touch(library: Path) -> None:
    """Set the time of the last use to now. Does nothing in a read-only directory."""
    with contextlib.suppress(OSError):
        os.utime(library)


def remove(library: Path) -> None:
    """Remove a library and its description. Missing files and missing permissions are no error."""
    for path in (library, library.with_suffix(".json")):
        with contextlib.suppress(OSError):
            path.unlink()


def refusal(cache_dir: Path, key: str) -> Path:
    """The file with the reason why a child process cannot build the program."""
    return cache_dir / f"{key}.refused"


def refuse(cache_dir: Path, key: str, reason: str) -> None:
    """Store `reason`, so that later runs do not try again. In a read-only directory the next run tries again."""
    with contextlib.suppress(OSError):
        refusal(cache_dir, key).write_text(reason, encoding="utf-8")


def entries(cache_dir: Path) -> list[Entry]:
    """All libraries, the most recently used first."""
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
    """Remove libraries unused for more than `max_unused` seconds, and the least recently used ones above `max_bytes` in total.

    The most recently used library always stays. Leftovers of killed builds are removed too. Returns the removed libraries.
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
    """Remove libraries unused for `older_than` seconds and leftovers of killed builds. Returns the removed libraries."""
    now = time.time() if now is None else now
    removed = [entry for entry in entries(cache_dir) if now - entry.used >= older_than]
    for entry in removed:
        remove(entry.path)
    for path in _leftovers(cache_dir, now, older_than):
        _discard(path)
    return removed


def _leftovers(cache_dir: Path, now: float, max_age: float) -> Iterator[Path]:
    """Killed builds, refusals older than `max_age` seconds, and descriptions without a library."""
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
    """(built, program, torch) from a description; (None, "", "") if it cannot be read."""
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        return path.stat().st_mtime, str(about["program"]), str(about["torch"])
    except (OSError, ValueError, KeyError, TypeError):
        return None, "", ""


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()
