"""The list of packages of environments in packages.toml, the venv of each, and the table that docs/environments.md shows.

A package is tried as its user would: pip installs the pinned version, then `fastppo train`, `evaluate` and `export` run as
processes. `measure.py` beside this file keeps what came out in results.json.
"""

import hashlib
import json
import os
import shlex
import subprocess
import sys
import sysconfig
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PAGE = ROOT / "docs" / "environments.md"
RESULTS = HERE / "results.json"
START, END = "<!-- made by tests/packages/measure.py -->\n", "<!-- end -->\n"
COLUMNS = ("package", "`fastppo train` with", "steps", "steps/s", "return", "Stable-Baselines3", "what to know")


@dataclass(frozen=True)
class Package:
    """One entry of packages.toml."""

    name: str
    """In the table, and of the venv."""
    install: tuple[str, ...]
    """What pip installs, the package itself first; all pinned."""
    flags: str
    """Of `fastppo train`: the environment, and what it needs."""
    note: str
    """What a user should know, in a sentence or two."""
    steps: int = 10_000
    """Of the training that is measured."""
    few: int = 3_000
    """Of the training that is tested."""
    afterwards: tuple[str, ...] = ()
    """What pip installs in a second call, against the package's own requirements, such as a newer gymnasium."""
    sb3: bool = True
    """Whether Stable-Baselines3 can train on it through gymnasium alone."""
    exports: bool = True
    """Whether `fastppo export` can write its policy."""

    @property
    def version(self) -> str:
        """name==version of the package itself."""
        return self.install[0]


def packages() -> tuple[Package, ...]:
    """Those of packages.toml, in its order."""
    listed = tomllib.loads((HERE / "packages.toml").read_text())
    return tuple(
        Package(name, **{key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()})
        for name, entry in listed.items()
    )


def cache_dir() -> Path:
    """Where the venvs are: FASTPPO_PACKAGES_DIR, else a folder of the user's cache."""
    given = os.environ.get("FASTPPO_PACKAGES_DIR")
    return Path(given) if given else Path.home() / ".cache" / "fastppo-packages"


def has_index() -> bool:
    """Whether pip reaches an index."""
    asked = [sys.executable, "-m", "pip", "index", "versions", "gymnasium"]
    return subprocess.run(asked, capture_output=True, timeout=300).returncode == 0


def find_python(package: Package, cache: Path) -> Path | None:
    """The Python of the package's venv; None if that has not been made."""
    place = _place(package, cache)
    return place / "bin" / "python" if (place / "ready").exists() else None


def make_python(package: Package, cache: Path) -> Path:
    """The Python of the package's venv, which is made if it is not there. Raises RuntimeError.

    The venv sees this Python's packages behind its own, so it holds only what the package adds to them. torch stays as it is.
    """
    place = _place(package, cache)
    python = place / "bin" / "python"
    if (place / "ready").exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(place)], check=True)
    own = next(place.glob("lib/python*/site-packages"))
    own.joinpath("parent.pth").write_text(f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})\n")
    constraint = place / "constraints.txt"
    constraint.write_text(f"torch=={metadata.version('torch').partition('+')[0]}\n")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--prefer-binary", "--constraint", str(constraint)]
    for wanted in filter(None, (package.install, package.afterwards)):
        run([*pip, *wanted], place, 1200)
    (place / "ready").touch()
    return python


def _place(package: Package, cache: Path) -> Path:
    wanted = hashlib.sha256(repr((package.install + package.afterwards, sys.executable)).encode()).hexdigest()[:8]
    return cache / f"{package.name}-{wanted}"


def run(words: list[str], cwd: Path, timeout: float) -> str:
    """The output of a command. Raises RuntimeError, which ends with what the command said."""
    done = subprocess.run(words, cwd=cwd, timeout=timeout, text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode} of {shlex.join(words)}:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def try_package(package: Package, python: Path, steps: int, place: Path, episodes: int) -> dict[str, Any]:
    """Train, evaluate and export in the folder `place`; what summary.json and the evaluation say. Raises RuntimeError."""
    fastppo, run_dir = [str(python), "-m", "fastppo"], str(place / "run")
    settings = ["--total-timesteps", str(steps), "--seed", "1", "--num-threads", "1", "--eval-episodes", "0"]
    train = [*fastppo, "train", "--plain", "--run-dir", run_dir, *settings, *shlex.split(package.flags)]
    run(train, place, 1200)
    summary = json.loads(Path(run_dir, "summary.json").read_text())
    evaluate = [*fastppo, "evaluate", run_dir, "--checkpoint", "last", "--seed", "7", "--episodes", str(episodes)]
    evaluation = json.loads(run(evaluate, place, 1200).splitlines()[-1])
    if evaluation["return_mean"] is None:
        raise RuntimeError(f"no episode of {package.name}'s evaluation has ended; see --max-episode-steps")
    if package.exports:
        run([*fastppo, "export", run_dir], place, 600)
    return {"steps": summary["global_step"], "sps": summary["sps"], "return": evaluation["return_mean"]}


def sb3_return(package: Package, python: Path, steps: int, place: Path, episodes: int) -> float:
    """The mean return of Stable-Baselines3's PPO after as many steps. Raises RuntimeError."""
    script = [str(python), str(ROOT / "benchmarks" / "sb3_defaults.py"), "--steps", str(steps), "--episodes", str(episodes)]
    output = run([*script, "--", *shlex.split(package.flags)], place, 1200)
    return float(json.loads(output.splitlines()[-1])["return_mean"])


def table(listed: tuple[Package, ...], results: dict[str, dict[str, Any]]) -> str:
    """The table in Markdown."""
    header = f"| {' | '.join(COLUMNS)} |\n" + "|---" * len(COLUMNS) + "|\n"
    return header + "".join(_row(package, results[package.name]) for package in listed)


def _row(package: Package, result: dict[str, Any]) -> str:
    returns = ["" if result[name] is None else f"{_rounded(result[name], 3):,g}" for name in ("return", "sb3")]
    speed = f"{_rounded(result['sps'], 2):,g}"
    wanted = ", ".join(requirement.replace("==", " ") for requirement in package.install)
    cells = [wanted, f"`{package.flags}`", f"{package.steps:,}", speed, *returns, package.note]
    return f"| {' | '.join(cells)} |\n"


def _rounded(number: float, digits: int) -> float:
    """To so many significant digits."""
    return float(f"{number:.{digits}g}")


def with_table(page: str, text: str) -> str:
    """A page with another table between the marks."""
    before, _, rest = page.partition(START)
    return before + START + "\n" + text + "\n" + END + rest.partition(END)[2]
