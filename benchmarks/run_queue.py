"""Runs that are done once: a file with a line for each finished run, and a queue for those that are missing.

Knows nothing of what a run is: its name is a tuple, one value for each of `names`, and a function does it.
"""

import concurrent.futures
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

Name = tuple[Hashable, ...]


def split_flags(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before `--`, which are a script's own, and those after it, which go to its runs."""
    split = list(words).index("--") if "--" in words else len(words)
    return list(words[:split]), list(words[split + 1 :])


def finished(results: Path, names: Sequence[str]) -> dict[Name, dict[str, Any]]:
    """The lines of a results file by the values that they have for `names`. A file that is not there has none."""
    lines = map(json.loads, results.read_text().splitlines()) if results.exists() else ()
    return {tuple(line[name] for name in names): line for line in lines}


def run_missing(
    results: Path, names: Sequence[str], wanted: Sequence[Name], run: Callable[..., Mapping[str, Any]], jobs: int = 1
) -> list[list[Any]]:
    """Do the wanted runs that the results file does not hold, `jobs` at once, and add a line for each when it ends.

    run(*name) returns what its line holds beside the names; among it a number "evaluation", which is printed. A run that
    raises does not stop the others.

    Returns:
        The failed runs: the values of their names, then the reason.
    """
    done, failed = finished(results, names), []
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run, *name): name for name in dict.fromkeys(wanted) if name not in done}
        for future in concurrent.futures.as_completed(futures):
            name = futures[future]
            label = ", ".join(f"{key} {value}" for key, value in zip(names, name, strict=True) if value != "")
            if (error := future.exception()) is not None:
                failed.append([*name, f"{error} {getattr(error, 'stderr', '')}".strip()[-300:]])
                print(f"{label} FAILED: {failed[-1][-1]}", flush=True)
                continue
            line = {**dict(zip(names, name, strict=True)), **future.result()}
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            seconds = f" in {line['seconds']:.0f} s" if "seconds" in line else ""
            print(f"{label}: {line['evaluation']:.4g}{seconds}", flush=True)
    return failed
