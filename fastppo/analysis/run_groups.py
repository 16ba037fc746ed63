"""Read runs from disk and group them: runs that differ only in their seed are one group.

Reads config.json and metrics.csv as data. Knows nothing of pictures.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastppo.analysis.statistics import bootstrap_interval, interquartile_mean
from fastppo.config import RESUMABLE, TrainConfig, read_run_config
from fastppo.errors import UsageError
from fastppo.run.metrics_file import read_rows
from fastppo.system.paths import reading
from fastppo.system.text import printable

# settings that do not change what is learned: the seed, the preset's name, and how a run is shown, stored and computed
_SHAPING = {"total_timesteps", "num_iterations", "checkpoint_iterations", "policy"}  # may change on --resume, and shape the run
_NO_SETTING = (RESUMABLE - _SHAPING) | {"seed", "preset", "env_id"}
SETTINGS = ("env_id", *(spec.name for spec in fields(TrainConfig) if spec.name not in _NO_SETTING))
LARGEST = 1e100  # a larger number is an error, and matplotlib cannot draw it
POINTS = 200  # of a group's curve
CURVE_RESAMPLES = 2_000  # of the bootstrap at each point: 0.1 s for a curve of five seeds
MIN_FOR_IQM = 4  # seeds; the interquartile mean of fewer is their mean
MIN_FOR_INTERVAL = 3  # seeds
LABEL_LETTERS = 40  # of a value in a label
LEGEND_LETTERS = 100  # of a label in a legend


@dataclass(frozen=True)
class Run:
    """Settings of one run, and the columns of its metrics.csv: float64 (rows,), NaN for a value that is not a number."""

    path: Path
    config: TrainConfig
    columns: Mapping[str, NDArray[np.float64]]

    def series(self, x: str, y: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Columns x and y, without rows where one of the two is not a number or x does not increase."""
        none = np.full(0, np.nan)
        xs, ys = self.columns.get(x, none), self.columns.get(y, none)
        if len(xs) != len(ys):  # one column is missing
            return none, none
        finite = np.isfinite(xs) & np.isfinite(ys)
        xs, ys = xs[finite], ys[finite]
        rises = np.diff(np.maximum.accumulate(xs), prepend=-np.inf) > 0
        return xs[rises], ys[rises]


@dataclass(frozen=True)
class Curve:
    """A statistic over the runs of a group, on a grid of P points where all runs have data."""

    x: NDArray[np.float64]  # (P,)
    center: NDArray[np.float64]  # (P,): the interquartile mean, or the mean
    low: NDArray[np.float64] | None  # (P,): None for too few seeds
    high: NDArray[np.float64] | None


@dataclass(frozen=True)
class Group:
    """Runs of one environment with the same settings and different seeds."""

    env_id: str
    label: str  # settings that differ between the environment's groups; "" for the only group
    runs: tuple[Run, ...]

    @property
    def statistic(self) -> str:
        """Name of the statistic in `curve`: "IQM of 5 seeds"."""
        seeds = len(self.runs)
        return "1 seed" if seeds == 1 else f"{'IQM' if seeds >= MIN_FOR_IQM else 'mean'} of {seeds} seeds"

    def curve(self, x: str, y: str) -> Curve | None:
        """Column y against column x over the seeds; None if there is no range of x where all runs have data."""
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

    @property
    def legend(self) -> str:
        """ "gamma=0.9 (IQM of 5 seeds)". Many settings are cut: `summary` has them all."""
        return f"{cut(self.label, LEGEND_LETTERS)} ({self.statistic})" if self.label else self.statistic

    def summary(self, metric: str) -> str:
        """A line for the user: runs, steps, and the metric at the last step that all runs have."""
        head = f"{self.env_id}{', ' if self.label else ''}{self.label}: {self.statistic}"
        curve = self.curve("global_step", metric)
        if curve is None:
            return f"{head}, no step at which all have {metric}"
        interval = "" if curve.low is None or curve.high is None else f" (95 % {curve.low[-1]:.5g} to {curve.high[-1]:.5g})"
        return f"{head}, {curve.x[-1]:,.0f} steps, {metric} {curve.center[-1]:.5g}{interval}"


def cut(text: str, letters: int) -> str:
    """At most so many letters of the text, of which the last one is then an ellipsis."""
    return text if len(text) <= letters else f"{text[: letters - 1]}…"


@reading()
def find_runs(paths: Iterable[str]) -> list[Path]:
    """Run directories at or below `paths`, each once. Raises UsageError for a path without a run."""
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise UsageError(f"{path} is no directory" if path.exists() else f"{path} does not exist")
        os.scandir(path).close()  # raises OSError where os.walk finds nothing
        runs = []
        for place, directories, files in os.walk(path):
            directories.sort()
            if "config.json" in files:
                seeds = [name for name in directories if re.fullmatch(r"seed-\d+", name)]
                directories[:] = seeds  # nothing else inside a run directory is a run
                if not seeds:
                    runs.append(Path(place))
        if not runs:
            raise UsageError(f"{path} holds no run of fastppo: there is no config.json in it or below it")
        for run in runs:
            found.setdefault(os.path.realpath(run), run)
    return list(found.values())


def read_run(path: Path) -> Run:
    """Read a run. Raises UsageError if its settings cannot be read; metrics that cannot be read are omitted."""
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
    """Groups, ordered by environment and settings, and the runs that are left out.

    Runs with the same settings and the same seed are one sample: the run with the most rows is used.
    """
    seeds: dict[tuple[str, ...], dict[int, Run]] = {}  # settings as strings, env_id first -> seed -> run
    left_out = []
    for run in runs:
        of_setting = seeds.setdefault(_texts(run.config), {})
        earlier = of_setting.setdefault(run.config.seed, run)
        if earlier is not run:
            worse, better = sorted((earlier, run), key=lambda one: len(one.columns.get("iteration", ())))
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


def read_groups(paths: Sequence[str], note: Callable[[str], object]) -> list[Group]:
    """The runs at or below `paths`, grouped. Raises UsageError if no run is left.

    note: prints a line on each run that is left out.
    """
    runs, unread = [], []
    for path in find_runs(paths):
        try:
            one = read_run(path)
        except UsageError as error:
            unread.append(str(error))
            continue
        if one.columns:
            runs.append(one)
        else:
            unread.append(f"{path / 'metrics.csv'} has no row that can be read")
    if not runs:
        raise UsageError(unread[0])
    groups, repeated = group_runs(runs)
    for reason in unread:
        note(f"left out: {reason}")
    for one in repeated:
        note(f"left out: {one.path} repeats another run's settings and seed, and is no second sample")
    return groups


def _texts(config: TrainConfig) -> tuple[str, ...]:
    """The values of SETTINGS as strings."""
    shown = {name: setting_text(getattr(config, name)) for name in SETTINGS}
    shown["rescale_action"] = setting_text(bool(config.rescale_action))
    shown["resize"] = setting_text(config.resize or (0,))  # none: no picture was large enough to be resized
    if not config.exact_resume:  # then checkpoints do not change what is learned
        shown["checkpoint_iterations"] = ""
    return tuple(shown.values())


def setting_text(value: Any) -> str:
    """A setting as a string for a label or a table. Equal values have equal strings, also 1 and 1.0."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    if isinstance(value, tuple):
        return " ".join(map(setting_text, value))
    return printable(value if isinstance(value, str) else json.dumps(value, sort_keys=True))


def _order(text: str) -> tuple[float, str]:
    """Key to sort settings: numbers by size, then words."""
    try:
        return float(text), text
    except ValueError:
        return np.inf, text
