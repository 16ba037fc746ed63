"""Runs on disk, and which of them say the same thing: those that differ in their seed alone are one group.

Reads config.json and metrics.csv, as data, and knows nothing of pictures.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastppo.analysis.statistics import bootstrap_interval, interquartile_mean
from fastppo.config import RESUMABLE, TrainConfig, read_run_config
from fastppo.errors import UsageError
from fastppo.run.metrics_file import read_rows
from fastppo.system.text import printable

# The seed, how a run is shown, kept and computed, and the name of what its settings were taken from: not what is learned.
_NO_SETTING = (RESUMABLE - {"total_timesteps", "num_iterations", "checkpoint_iterations"}) | {"seed", "preset", "env_id"}
SETTINGS = ("env_id", *(spec.name for spec in fields(TrainConfig) if spec.name not in _NO_SETTING))
LARGEST = 1e100  # a number beyond it is damage, and no axis has room for it
POINTS = 200  # of a group's curve
CURVE_RESAMPLES = 2_000  # of the bootstrap, at each of them: 0.1 s a curve of five seeds
MIN_FOR_IQM = 4  # of fewer seeds nothing is cut off: it is their mean
MIN_FOR_INTERVAL = 3
LABEL_LETTERS = 40  # of a value


@dataclass(frozen=True)
class Run:
    """One run's settings and its columns of metrics.csv, float64 (rows,), NaN where a value is no number."""

    path: Path
    config: TrainConfig
    columns: Mapping[str, NDArray[np.float64]]

    def series(self, x: str, y: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Column y against column x, which rises: rows where either is no number, or x does not rise, are left out."""
        none = np.full(0, np.nan)
        xs, ys = self.columns.get(x, none), self.columns.get(y, none)
        if len(xs) != len(ys):  # a column that is not there
            return none, none
        kept = np.isfinite(xs) & np.isfinite(ys)
        xs, ys = xs[kept], ys[kept]
        rises = np.diff(np.maximum.accumulate(xs), prepend=-np.inf) > 0
        return xs[rises], ys[rises]


@dataclass(frozen=True)
class Curve:
    """What the runs of a group have in common, on a grid of P points where each of them has data."""

    x: NDArray[np.float64]  # (P,)
    center: NDArray[np.float64]  # (P,): the interquartile mean, or the mean
    low: NDArray[np.float64] | None  # (P,): None of too few seeds
    high: NDArray[np.float64] | None


@dataclass(frozen=True)
class Group:
    """Runs of one environment and one setting, a seed each."""

    env_id: str
    label: str  # the settings in which it differs from the environment's other groups; "" where it is the only one
    runs: tuple[Run, ...]

    @property
    def statistic(self) -> str:
        """What the center of `curve` is: "IQM of 5 seeds"."""
        seeds = len(self.runs)
        return "1 seed" if seeds == 1 else f"{'IQM' if seeds >= MIN_FOR_IQM else 'mean'} of {seeds} seeds"

    def curve(self, x: str, y: str) -> Curve | None:
        """Column y against column x over the seeds; None where there is no part in which all have data."""
        series = [run.series(x, y) for run in self.runs]
        if not all(len(xs) for xs, _ in series):
            return None
        start, end = max(xs[0] for xs, _ in series), min(xs[-1] for xs, _ in series)
        if start > end:
            return None
        grid = np.linspace(start, end, POINTS) if start < end else np.array([end])
        values = np.stack([np.interp(grid, xs, ys) for xs, ys in series], axis=-1)  # (P, S)
        low, high = bootstrap_interval(values, CURVE_RESAMPLES) if len(self.runs) >= MIN_FOR_INTERVAL else (None, None)
        return Curve(grid, interquartile_mean(values), low, high)


def find_runs(paths: Iterable[str]) -> list[Path]:
    """Run directories among `paths` and below them, each once. Raises UsageError for a path that holds none."""
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise UsageError(f"{path} is no directory" if path.exists() else f"{path} does not exist")
        runs = []
        for place, directories, files in os.walk(path):
            directories.sort()
            if "config.json" in files:
                seeds = [name for name in directories if re.fullmatch(r"seed-\d+", name)]
                directories[:] = seeds  # what a run keeps is no run, but for those of many seeds
                if not seeds:
                    runs.append(Path(place))
        if not runs:
            raise UsageError(f"{path} holds no run of fastppo: there is no config.json in it or below it")
        for run in runs:
            found.setdefault(os.path.realpath(run), run)
    return list(found.values())


def read_run(path: Path) -> Run:
    """Raises UsageError for settings that cannot be read; metrics that cannot are no rows."""
    config = read_run_config(path)
    metrics = path / "metrics.csv"
    rows = read_rows(metrics) if metrics.is_file() else []
    columns = {name: np.array([_number(row.get(name)) for row in rows]) for name in (rows[0] if rows else ())}
    return Run(path, config, columns)


def _number(text: str | None) -> float:
    try:
        value = float(text or "nan")
    except ValueError:
        return np.nan
    return value if abs(value) < LARGEST else np.nan


def group_runs(runs: Iterable[Run]) -> tuple[list[Group], list[Run]]:
    """Groups, those of an environment together and in the order of their settings, and the runs that are left out.

    Of runs with the same settings and the same seed, which are no second sample, the one with the most rows is kept.
    """
    seeds: dict[tuple[str, ...], dict[int, Run]] = {}  # settings as texts, the environment first -> seed -> run
    left_out = []
    for run in runs:
        of_setting = seeds.setdefault(_texts(run.config), {})
        kept = of_setting.setdefault(run.config.seed, run)
        if kept is not run:
            worse, better = sorted((kept, run), key=lambda one: len(one.columns.get("iteration", ())))
            of_setting[run.config.seed] = better
            left_out.append(worse)
    groups = []
    for env_id in dict.fromkeys(texts[0] for texts in seeds):
        settings = [texts for texts in seeds if texts[0] == env_id]
        differing = [index for index in range(len(SETTINGS)) if len({texts[index] for texts in settings}) > 1]
        labels = {texts: [(SETTINGS[index], texts[index]) for index in differing] for texts in settings}
        for texts in sorted(settings, key=lambda texts: [_order(text) for _, text in labels[texts]]):
            label = ", ".join(f"{name}={text[:LABEL_LETTERS]}" for name, text in labels[texts])
            groups.append(Group(env_id, label, tuple(run for _, run in sorted(seeds[texts].items()))))
    return groups, left_out


def _texts(config: TrainConfig) -> tuple[str, ...]:
    """What is learned from, in the order of SETTINGS."""
    shown = {name: setting_text(getattr(config, name)) for name in SETTINGS}
    if not config.exact_resume:  # checkpoints are then no part of what is learned
        shown["checkpoint_iterations"] = ""
    return tuple(shown.values())


def setting_text(value: Any) -> str:
    """A setting as a label or a table has it; equal values have equal texts, 1 and 1.0 too."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return printable(value if isinstance(value, str) else json.dumps(value, sort_keys=True))


def _order(text: str) -> tuple[float, str]:
    """Numbers by size, then words."""
    try:
        return float(text), text
    except ValueError:
        return np.inf, text
