"""List and remove compiled programs: `fastppo cache list`, `fastppo cache clear`. The files are compile/library_cache.py's."""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from fastppo.cli import parse, run
from fastppo.compile import library_cache
from fastppo.errors import UsageError
from fastppo.system.text import printable

HEAD = ("program", "MiB", "age", "last used", "torch")


@dataclass(frozen=True)
class CacheConfig:
    """List or remove the compiled programs that are kept between runs. A run that has loaded one can still use it."""

    action: Annotated[Literal["list", "clear"], tyro.conf.Positional]
    """list: show a line for each program. clear: remove them."""
    older_than: float | None = None
    """For clear: only programs that were not used for this many days."""


def table(entries: Sequence[library_cache.Entry], now: float) -> list[str]:
    """HEAD and a line for each entry. now: seconds since 1970."""
    rows = [HEAD]
    for entry in entries:
        age = "?" if entry.built is None else _days(now - entry.built)
        used = f"{_days(now - entry.used)} ago"
        rows.append((entry.program or "?", f"{entry.num_bytes / 2**20:.1f}", age, used, entry.torch or "?"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _days(seconds: float) -> str:
    days = max(int(seconds // 86_400), 0)
    return f"{days} day{'s' * (days != 1)}"


def _sum(entries: Sequence[library_cache.Entry]) -> str:
    size = sum(entry.num_bytes for entry in entries) / 2**20
    return f"{len(entries)} librar{'y' if len(entries) == 1 else 'ies'}, {size:.1f} MiB"


def _main(args: Sequence[str]) -> None:
    settings = parse(CacheConfig, args, prog="python -m fastppo.cache")
    days = settings.older_than
    if days is not None and settings.action == "list":
        raise UsageError(f"--older-than {days:g} is for clear: list shows all programs")
    if days is not None and not 0 <= days < math.inf:
        raise UsageError(f"--older-than {days:g} must be a number of days, 0 or more")
    path = library_cache.cache_dir()
    if settings.action == "list":
        entries = library_cache.entries(path)
        lines = [*table(entries, time.time()), f"{_sum(entries)}, in {path}"]
    else:
        lines = [f"{_sum(library_cache.clear(path, 86_400 * (days or 0.0)))}, removed from {path}"]
    print(printable("\n".join(lines)))


def console(args: Sequence[str] | None = None) -> int:
    """Entry point: the exit code."""
    return run(_main, sys.argv[1:] if args is None else args)


if __name__ == "__main__":
    sys.exit(console())
