"""The live panel as lines of styled text, from the last row of metrics and the returns so far. Knows nothing of terminals."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions
from rich.segment import Segment
from rich.style import Style

from fastppo.run.metrics import METRICS, Row
from fastppo.run.usage import Usage
from fastppo.system.text import duration, printable

Line = list[tuple[str, str]]  # text and style
BLOCKS = " ▁▂▃▄▅▆▇█"
DRAWN = BLOCKS + "━─│┤╭╮╰╯·"  # the panel's letters that are not ASCII
FULL = 80  # columns that all cells need
WIDEST, TALLEST = 160, 12  # columns of the panel, lines of the curve
AXIS = 10  # columns left of the curve
CELL_LINES = 6
FRAME = 4  # lines around curve and cells: the border, return and time, progress
NOTES = 6  # lines that are left to what stands above the panel, where the curve can be smaller
_PLACES = {metric.cell: metric for metric in METRICS.values() if metric.cell}


@dataclass(frozen=True)
class View:
    """What the panel shows."""

    title: str
    row: Row
    progress: float  # in [0, 1]
    eta_seconds: float
    engine: str  # what runs the environments and the programs
    best: str
    returns: Sequence[float]  # each for an equal part of the run; nan where there is none
    usage: Usage


class Panel:
    """The view in a terminal of so many columns and lines, for rich to print.

    It makes rich's segments itself: Panel and Text of rich take twice as long, in the thread that trains.
    """

    def __init__(self, view: View, columns: int, lines: int) -> None:
        self.width = min(columns, WIDEST)
        inner = max(self.width - 4, 0)
        number = min(CELL_LINES, max(lines - FRAME - 2, 0))
        curve = min(max(lines - FRAME - CELL_LINES - NOTES, 1), TALLEST)
        body = [_head(view, inner), *_curve(view, inner, curve), *_cells(view, inner)[:number]]
        self.lines = [
            _border("╭─", view.title, "╮", self.width),
            *([("│ ", "dim"), *_fitted(line, inner), (" │", "dim")] for line in body),
            _border("╰─", view.engine, "╯", self.width),
        ]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for line in self.lines:
            yield from (Segment(text, Style.parse(style)) for text, style in line)
            yield Segment.line()


def _border(start: str, text: str, end: str, width: int) -> Line:
    """A line of the frame with a text in it."""
    room = max(width - 6, 0)
    text = printable(text)
    text = set_cell_size(text, room) if cell_len(text) > room else text
    return [(f"{start} ", "dim"), (text, ""), (f" {'─' * (width - 5 - cell_len(text))}{end}", "dim")]


def _fitted(line: Line, width: int) -> Line:
    """The line, cut or filled with spaces to so many columns."""
    fitted = []
    for text, style in line:
        fitted.append((text[:width], style))
        width -= len(fitted[-1][0])
    return [*fitted, (" " * width, "")]


def _head(view: View, width: int) -> Line:
    """Return and best return, and at the right end how far the run is."""
    time = f"{duration(view.row['seconds'])} elapsed, {duration(view.eta_seconds)} left"
    left = f"return {figure(view.row['episodic_return_mean']):>8}"
    right = f"  {view.progress:4.0%}  {time}"
    bests = (f"  best {view.best}", f"  best {view.best.partition(' at ')[0]}", "")
    best = next((text for text in bests if len(left + text + right) <= width), "")
    space = " " * (width - len(left + best + right))
    return [(left[:7], "dim"), (left[7:], "bold green"), (best + space, "dim"), (right[:6], ""), (right[6:], "dim")]


def _curve(view: View, width: int, height: int) -> list[Line]:
    """The returns of the whole run, and below them its progress, on the same axis."""
    room = max(width - AXIS, 0)
    rows = area(view.returns, room, height)
    known = [value for value in view.returns if math.isfinite(value)]
    labels = [""] * height
    if known:
        labels[-1] = figure(min(known))
        labels[0] = figure(max(known))
    done = round(view.progress * room)
    return [
        *([(f"{label:>8} {'┤' if label else '│'}", "dim"), (row, "green")] for label, row in zip(labels, rows, strict=True)),
        [(" " * AXIS, ""), ("━" * done, "green"), ("─" * (room - done), "dim")],
    ]


def area(values: Sequence[float], width: int, height: int) -> list[str]:
    """The area below a curve, as `height` texts of `width` letters, scaled between its minimum and maximum.

    A nan repeats the value before it. Leading and trailing ones are spaces.
    """
    known = [value for value in values if math.isfinite(value)]
    if not known or width < 1:
        return [" " * width] * height
    low, high, steps = min(known), max(known), 8 * height - 1
    scale = steps / (high - low) if high > low else 0.0
    last = max(index for index, value in enumerate(values) if math.isfinite(value))
    columns, level, start = [], 0, 0  # level: eighths of a line
    for column in range(width):
        end = (column + 1) * len(values) // width
        for value in values[start : max(end, start + 1)]:
            if math.isfinite(value):
                level = 1 + round((value - low) * scale)
        columns.append(0 if start > last else level)
        start = end
    bars = [("█" * (level // 8) + BLOCKS[level % 8]).ljust(height)[:height] for level in range(steps + 2)]  # from below
    return ["".join(letters) for letters in zip(*(bars[level] for level in columns), strict=True)][::-1]


def _cells(view: View, width: int) -> list[Line]:
    """Metrics, and what the process uses: three columns, or the outer two where there is no room."""
    usage = {(3, 2): ("CPU", share(view.usage.cpu)), (4, 2): ("memory", view.usage.memory_text)}
    gap = (width + 4 - FULL) // 2
    lines = []
    for index in range(CELL_LINES):
        line: Line = []
        for column, (label_width, value_width) in enumerate(((13, 11), (13, 10), (6, 15))):
            if column == 1 and gap < 0:
                continue
            if (index, column) in usage:
                label, value = usage[index, column]
            else:
                metric = _PLACES[index, column]
                label, value = metric.label, shown(metric.name, view.row)
            style = ("", "", "bold" if label == "SPS" else "cyan")[column]
            line += [(f"{label:{label_width}}", "dim"), (f"{value:>{value_width}}", style), (" " * (3 + max(gap, 0)), "")]
        lines.append(line)
    return lines


def share(value: float) -> str:
    """A bar of 10 columns and a percentage, 15 columns together."""
    return f"{'█' * round(min(value, 1.0) * 10):10} {value:4.0%}" if math.isfinite(value) else "-"


def shown(name: str, row: Row) -> str:
    """A metric's value as text for the panel."""
    value = row[name]
    if name.endswith("_share"):
        return share(value)
    if name == "sps":
        return f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else figure(value)


def number(value: float, digits: int = 4) -> str:
    """A number of significant digits; '-' for a value that is not finite."""
    return "-" if not math.isfinite(value) else f"{value:.{digits}g}"


def figure(value: float) -> str:
    """The same for the panel, with trailing zeros so that the width is steady: '475.0', '12,346', '-1.234e-05'."""
    return number(value) if not 1e-4 <= abs(value) < 1e7 else f"{value:#.4g}" if abs(value) < 999.95 else f"{value:,.0f}"
