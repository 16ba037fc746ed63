"""Measures the packages of packages.toml and writes the table of docs/environments.md: `python tests/packages/measure.py`.

With names of packages it measures these alone. Needs an index of packages for pip, and about two minutes a package.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from package_list import PAGE, RESULTS, Package, cache_dir, make_python, packages, sb3_return, table, try_package, with_table

EPISODES = 20


def measured(package: Package) -> dict[str, Any]:
    """What results.json holds of a package."""
    python = make_python(package, cache_dir())
    with tempfile.TemporaryDirectory() as place:
        result = try_package(package, python, package.steps, Path(place), EPISODES)
        theirs = sb3_return(package, python, package.steps, Path(place), EPISODES) if package.sb3 else None
    numbers = {"sps": result["sps"], "return": result["return"], "sb3": theirs}
    rounded = {key: None if value is None else float(f"{value:.5g}") for key, value in numbers.items()}
    return {"version": package.version, "flags": package.flags, "steps": package.steps, **rounded}


def main(names: list[str]) -> int:
    """Measure, write, and return the exit code."""
    listed, failed = packages(), []
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for package in listed:
        if package.name in names or not names:
            try:
                results[package.name] = measured(package)
                print(package.name, results[package.name], flush=True)
            except Exception as error:
                failed.append(package.name)
                print(f"{package.name} FAILED: {error}", flush=True)
        kept = {other.name: results[other.name] for other in listed if other.name in results}
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    if not failed and len(kept) == len(listed):
        PAGE.write_text(with_table(PAGE.read_text(), table(listed, kept)))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
