"""Draw learning curves of many runs, by environment and setting: `python -m fastppo.plot RUN_DIR ...`."""

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from fastppo.analysis.curves import FORMATS, LOSSES, RETURN, draw_page, legend_text, render
from fastppo.analysis.run_groups import Group, find_runs, group_runs, read_run
from fastppo.cli import parse, run
from fastppo.errors import UsageError, nearest
from fastppo.run.files import file_name, replace_file
from fastppo.system.paths import absolute, current_directory
from fastppo.system.text import printable


@dataclass(frozen=True)
class PlotConfig:
    """Draw learning curves: an environment a row, a colour a setting, seeds together. PNG and SVG, losses on a second page."""

    run_dirs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Directories of runs, or directories that hold some."""
    output: str | None = None
    """What the files are called: OUTPUT.png, OUTPUT.svg, OUTPUT-losses.png, OUTPUT-losses.svg; default curves-<env>."""
    metric: str = RETURN
    """Column of metrics.csv on the first page."""

    def __post_init__(self) -> None:
        if not self.run_dirs:
            raise UsageError("which runs? fastppo plot RUN_DIR ..., or a directory that holds some: fastppo plot runs")


def read_groups(paths: Sequence[str], note: Callable[[str], object]) -> list[Group]:
    """The runs in and below `paths`, grouped; what is left out is noted in a line. Raises UsageError where no run is left."""
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


def summary_line(group: Group, metric: str) -> str:
    """Runs, steps and the metric at the last step that all of them have."""
    head = f"{group.env_id}{', ' if group.label else ''}{group.label}: {legend_text(replace(group, label=''))}"
    curve = group.curve("global_step", metric)
    if curve is None:
        return f"{head}, no step at which all have {metric}"
    interval = "" if curve.low is None or curve.high is None else f" (95 % {curve.low[-1]:.5g} to {curve.high[-1]:.5g})"
    return f"{head}, {curve.x[-1]:,.0f} steps, {metric} {curve.center[-1]:.5g}{interval}"


def _default_output(groups: Sequence[Group], metric: str) -> str:
    environments = list(dict.fromkeys(group.env_id for group in groups))
    what = "-".join(environments) if len(environments) <= 3 else f"{len(environments)}-environments"
    return file_name(f"{'curves' if metric == RETURN else metric}-{what}")[:150]


def _main(args: Sequence[str]) -> None:
    settings = parse(PlotConfig, args, prog="python -m fastppo.plot")
    notes: list[str] = []
    groups = read_groups(settings.run_dirs, notes.append)
    known = list(dict.fromkeys(name for group in groups for one in group.runs for name in one.columns))
    if settings.metric not in known:
        raise UsageError(f"--metric {settings.metric} is no column of metrics.csv{nearest(settings.metric, known)}")
    output = re.sub(r"\.(png|svg)$", "", settings.output or _default_output(groups, settings.metric))
    if not absolute(output, "--output", current_directory()).parent.is_dir():
        raise UsageError(f"--output {settings.output}: there is no directory {Path(output).parent}")
    for line in (*notes, *(summary_line(group, settings.metric) for group in groups)):
        print(printable(line), flush=True)
    pages = {
        output: draw_page(groups, [("global_step", settings.metric), ("seconds", settings.metric)], columns=2),
        f"{output}-losses": draw_page(groups, [("global_step", name) for name in LOSSES], columns=3),
    }
    pictures = {Path(f"{name}.{form}"): render(page, form) for name, page in pages.items() for form in FORMATS}
    for path, picture in pictures.items():
        try:
            replace_file(path, picture)
        except OSError as error:
            raise UsageError(f"--output {output}: {path} cannot be written: {error.strerror}") from None
    print(printable(" ".join(map(str, pictures))))


def console(args: Sequence[str] | None = None) -> int:
    """Entry point: the exit code."""
    return run(_main, sys.argv[1:] if args is None else args)


if __name__ == "__main__":
    sys.exit(console())
