"""Draw learning curves of many runs, by environment and setting: `python -m fastppo.plot RUN_DIR ...`."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastppo.analysis.comparison import draw_comparison, improvement_lines
from fastppo.analysis.curves import (
    FORMATS,
    PANEL_COLUMNS,
    PANELS,
    RETURN,
    check_metric,
    check_place,
    draw_page,
    render,
    return_panels,
)
from fastppo.analysis.run_groups import Group, read_groups
from fastppo.cli import chosen_run, parse, run
from fastppo.errors import UsageError
from fastppo.run.files import file_name, replace_file
from fastppo.system.text import printable


@dataclass(frozen=True)
class PlotConfig:
    """Draw learning curves as PNG and SVG: a row for each environment, a colour for each setting. Second page: all metrics."""

    run_dirs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Directories of runs, or directories that hold some. Default: the newest run in runs/."""
    output: str | None = None
    """Name of the files: OUTPUT.png, OUTPUT.svg, OUTPUT-losses.png, OUTPUT-losses.svg. Default: curves-<env>."""
    metric: str = RETURN
    """Column of metrics.csv on the first page."""
    compare: bool = False
    """Also compare settings by the last value of each run: OUTPUT-compare.png and .svg, with performance profiles and the
    probability of improvement."""


def _default_output(groups: Sequence[Group], metric: str) -> str:
    """Name of the files from the metric and the environments."""
    environments = list(dict.fromkeys(group.env_id for group in groups))
    what = "-".join(environments) if len(environments) <= 3 else f"{len(environments)}-environments"
    return file_name(f"{'curves' if metric == RETURN else metric}-{what}")[:150]


def _main(args: Sequence[str]) -> None:
    settings = parse(PlotConfig, args, prog="python -m fastppo.plot")
    notes: list[str] = []
    groups = read_groups(settings.run_dirs or (chosen_run(None),), notes.append)
    check_metric(groups, settings.metric)
    improvements = improvement_lines(groups, settings.metric) if settings.compare else []
    output = re.sub(r"\.(png|svg)$", "", settings.output or _default_output(groups, settings.metric))
    check_place(settings.output or f"{output}.png")
    for line in (*notes, *(group.summary(settings.metric) for group in groups), *improvements):
        print(printable(line), flush=True)
    pages = {
        output: draw_page(groups, return_panels(groups, settings.metric), columns=2),
        f"{output}-losses": draw_page(groups, [("global_step", name) for name in PANELS], PANEL_COLUMNS),
    }
    if settings.compare:
        pages[f"{output}-compare"] = draw_comparison(groups, settings.metric)
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
