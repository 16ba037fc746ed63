"""Learning curves as pictures: a run's own page of panels, and pages that compare groups of runs.

Reads metrics.csv and groups of runs. Knows nothing of command lines or of training.
"""

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastppo.analysis.run_groups import Group
from fastppo.errors import UsageError, nearest
from fastppo.run.files import replace_file
from fastppo.run.metrics import EVALUATION, INFO
from fastppo.run.metrics_file import read_rows
from fastppo.system.paths import absolute, current_directory
from fastppo.system.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

RETURN = "episodic_return_mean"
LABELS = {
    RETURN: "return (last 100 episodes)",
    "episodic_length_mean": "episode length",
    "sps": "steps per second",
    "learning_rate": "learning rate",
    "loss": "total loss",
    "policy_loss": "policy loss",
    "value_loss": "value loss",
    "entropy": "entropy",
    "approx_kl": "approx. KL",
    "clipfrac": "clip fraction",
    "explained_variance": "explained variance",
    "grad_norm": "gradient norm",
    "global_step": "environment steps",
    "seconds": "seconds",
    EVALUATION: "return (evaluation)",
}
PANELS = tuple(LABELS)[:12]  # of curves.png, of the second page and of a report
PANEL_COLUMNS = 4  # of these: the second row is the total loss and its three terms
# Okabe and Ito's colours for colour-blind readers, https://jfly.uni-koeln.de/color, without yellow, which is pale on white
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
DASHES = ("-", "--", ":", "-.")
FORMATS = ("png", "svg")
MAX_INFOS = 6  # on the first page
EPISODIC = (RETURN, "episodic_length_mean", EVALUATION)  # no value until an episode has ended


def inked(colour: str) -> dict[Any, str]:
    """matplotlib's parameters for this colour in everything except the curves."""
    parts = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    return dict.fromkeys(parts, colour)


BLACK = inked("#000000")


def plot_curves(metrics_path: Path, output: Path, title: str) -> None:
    """Draw the PANELS of one run against environment steps, as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # 0.45 s to import, so not before training is over
    from matplotlib.figure import Figure

    rows = read_rows(metrics_path)
    steps = [int(row["global_step"]) for row in rows]
    figure = Figure(figsize=(15, 9))
    FigureCanvasAgg(figure)
    figure.suptitle(title, y=0.985)
    # nine panels took 0.4 s of CPU time, 0.95 with layout="constrained". With fixed margins nothing is drawn twice to be
    # measured, step numbers are drawn once a column, and no label needs mathtext (10^2)
    figure.subplots_adjust(left=0.05, right=0.985, bottom=0.065, top=0.925, hspace=0.2, wspace=0.25)
    for axes, key in zip(figure.subplots(3, PANEL_COLUMNS, sharex=True).flat, PANELS, strict=True):
        values = [float(row[key]) for row in rows]
        axes.plot(steps, values, linewidth=1.5)
        if key == RETURN:
            _add_evaluations(axes, rows)
        axes.set_title(LABELS[key], fontsize=10, y=1.0)  # with a fixed height nothing is measured
        axes.grid(alpha=0.3)
        _set_y_ticks(axes, key, min(values, default=0.0))
    for axes in figure.axes[-PANEL_COLUMNS:]:
        _set_step_ticks(axes)
        axes.set_xlabel("environment steps")
    buffer = BytesIO()
    figure.savefig(buffer, dpi=100)
    replace_file(output, buffer.getbuffer())


def _set_step_ticks(axes: "Axes") -> None:
    """Numbers of environment steps: 20k, 1M."""
    from matplotlib.ticker import EngFormatter

    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def _set_y_ticks(axes: "Axes", name: str, smallest: float) -> None:
    """Scale and numbers of a column's values, of which `smallest` is the least finite one."""
    from matplotlib.ticker import EngFormatter, LogFormatter

    class Minor(LogFormatter):
        """Numbers where LogFormatter has some: it writes 6e-01."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return plain_tick(x) if super().__call__(x, pos) else ""

    if name == "value_loss" and smallest > 0:
        axes.set_yscale("log")  # it falls by orders of magnitude
        axes.yaxis.set_minor_formatter(Minor())  # numbers even if no power of ten is in range
    axes.yaxis.set_major_formatter(EngFormatter(sep="") if name == "sps" else plain_tick)


def plain_tick(value: float, _position: float = 0.0) -> str:
    """A number without an exponent, from a millionth to a million: 0.00025, 100,000, 2.5M."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:,g}M" if abs(value) < 1e12 else f"{value:g}"
    if 0 < abs(value) < 1e-6:
        return f"{value:g}"
    text = f"{value:,.7f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _add_evaluations(axes: "Axes", rows: Sequence[Mapping[str, str]]) -> None:
    """Add the returns of --eval-every, where there are any, to the panel of training returns."""
    evaluated = [(int(row["global_step"]), float(row[EVALUATION])) for row in rows if row.get(EVALUATION)]
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), marker=".", linewidth=1.0, label="evaluation")
        axes.legend(frameon=False, fontsize=8, loc="lower right")


def check_metric(groups: Sequence[Group], metric: str) -> None:
    """Raise UsageError for a column that no run has."""
    known = list(dict.fromkeys(name for group in groups for one in group.runs for name in one.columns))
    if metric not in known:
        raise UsageError(f"--metric {metric} is no column of metrics.csv{nearest(metric, known)}")


def check_place(output: str) -> None:
    """Raise UsageError for the name of a file that is a directory, or whose directory is not there."""
    place = absolute(output, "--output", current_directory())
    if not os.path.isdir(place.parent):  # Path.is_dir raises for a name that is too long
        raise UsageError(f"--output {output}: there is no directory {Path(output).parent}")
    if os.path.isdir(place):
        raise UsageError(f"--output {output} is a directory; nearest: --output {Path(output, 'curves.png')}")


def return_panels(groups: Sequence[Group], metric: str = RETURN) -> list[tuple[str, str]]:
    """(x, y) of the first page: a metric, below it the evaluations of --eval-every, and what the infos of the environments
    say, where a run has any.
    """
    columns = [column for group in groups for run in group.runs for column in run.columns.items()]
    filled = dict.fromkeys(name for name, values in columns if np.isfinite(values).any())
    infos = [name for name in filled if name.startswith(INFO)][:MAX_INFOS]
    names = dict.fromkeys([metric, *([EVALUATION] if EVALUATION in filled else []), *infos])
    return [(x, name) for name in names for x in ("global_step", "seconds")]


def draw_page(
    groups: Sequence[Group], panels: Sequence[tuple[str, str]], columns: int, style: Mapping[Any, str] = BLACK
) -> "Figure":
    """A figure with a block of panels for each environment, with the name above and a legend below.

    Args:
        groups: at least one. An empty env_id shows no name.
        panels: (x, y) columns of metrics.csv, in reading order, `columns` panels side by side.
        style: matplotlib's parameters.
    """
    import matplotlib  # here, so that --help and wrong flags do not wait for it
    from matplotlib.figure import Figure

    environments = {env_id: [one for one in groups if one.env_id == env_id] for env_id in [one.env_id for one in groups]}
    looked = looks(groups)
    legends = {env_id: legend_columns(here) for env_id, here in environments.items()}
    rows = -(-len(panels) // columns)
    heights = [
        rows * (3.2 if columns < 3 else 2.4) + 0.4 + 0.22 * -(-len(here) // legends[env_id])
        for env_id, here in environments.items()
    ]
    several = any(len(group.runs) > 1 for group in groups)
    with matplotlib.rc_context({**style}):
        figure = Figure(figsize=(10 if columns < PANEL_COLUMNS else 13, sum(heights) + 0.3 * several), layout="constrained")
        blocks = figure.subfigures(len(environments), 1, height_ratios=heights, squeeze=False)[:, 0]
        for block, (env_id, here) in zip(blocks, environments.items(), strict=True):
            if env_id:
                block.suptitle(printable(env_id)[:100], fontsize=12, weight="bold", parse_math=False)
            grid = block.subplots(rows, columns, squeeze=False)
            for axes in grid.flat[len(panels) :]:
                axes.remove()
            for index, (axes, (x, y)) in enumerate(zip(grid.flat, panels, strict=False)):
                _draw_panel(axes, here, looked, x, y)
                if index + columns >= len(panels):
                    axes.set_xlabel(LABELS[x])
            if several or len(here) > 1:
                add_legend(block, here, looked, legends[env_id])
        if several:
            figure.supxlabel(
                "thin: single runs   thick: mean over seeds, of the middle half (IQM) from four on   "
                "shaded: its 95 % stratified bootstrap interval",
                fontsize=8,
            )
    return figure


def looks(groups: Sequence[Group]) -> dict[str, tuple[str, Any]]:
    """Colour and dashes by label, the same in every environment."""
    labels = dict.fromkeys(group.label for group in groups)
    count = len(PALETTE)
    return {label: (PALETTE[i % count], DASHES[i // count % len(DASHES)]) for i, label in enumerate(labels)}


def _draw_panel(axes: "Axes", groups: Sequence[Group], looked: Mapping[str, tuple[str, Any]], x: str, y: str) -> None:
    smallest = math.inf
    for group in groups:
        colour, dashes = looked[group.label]
        curve = group.curve(x, y) if len(group.runs) > 1 else None
        for one in group.runs:
            xs, ys = one.series(x, y)
            smallest = min(smallest, ys.min(initial=math.inf))
            width, alpha = (0.7, 0.5) if curve is not None else (1.5, 1.0)
            marker = "." if len(xs) == 1 else ""
            axes.plot(xs, ys, color=colour, linestyle=dashes, marker=marker, linewidth=width, alpha=alpha)
        if curve is not None:
            axes.plot(curve.x, curve.center, color=colour, linestyle=dashes, linewidth=2.2)
            if curve.low is not None and curve.high is not None:
                axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.2, linewidth=0)
    axes.set_title(printable(LABELS.get(y, y)), fontsize=10, parse_math=False)
    axes.grid(alpha=0.13)
    axes.spines[["top", "right"]].set_visible(False)
    if smallest == math.inf:
        axes.text(0.5, 0.5, "no finished episode" if y in EPISODIC else "no data", ha="center", transform=axes.transAxes)
        return
    if x == "global_step":
        _set_step_ticks(axes)
    _set_y_ticks(axes, y, smallest)


def legend_columns(groups: Sequence[Group]) -> int:
    """Number of entries that fit side by side, by the length of the longest."""
    longest = max(len(group.legend) for group in groups)
    return max(1, min(len(groups), 130 // (longest + 8)))


def add_legend(block: "FigureBase", groups: Sequence[Group], looked: Mapping[str, tuple[str, Any]], columns: int) -> None:
    """Add the legend below the panels, where it covers no curve."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, linestyle=dashes, linewidth=2.2)
        for colour, dashes in (looked[group.label] for group in groups)
    ]
    texts = [group.legend for group in groups]
    legend = block.legend(handles, texts, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)


def render(figure: "Figure", format: str, style: Mapping[Any, str] = BLACK) -> bytes:
    """The figure as a png or svg file. The same runs give the same bytes."""
    import matplotlib

    buffer = BytesIO()
    with matplotlib.rc_context({**style, "svg.hashsalt": "fastppo"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # the font lacks a letter of a name
        figure.savefig(buffer, format=format, dpi=150, metadata={"Date": None} if format == "svg" else None)
    figure.set_layout_engine("none")  # keep the layout for the next format: layout is half of the time
    return buffer.getvalue()
