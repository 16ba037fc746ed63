"""Progress of training for people: a live panel on a terminal, log lines elsewhere."""

import codecs
import contextlib
import importlib.util
import io
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from rich.console import Console, Group
from rich.control import Control
from rich.live import Live
from rich.panel import Panel
from rich.segment import ControlType
from rich.text import Text

from fastppo.run.metrics import METRICS, Row, infos_said
from fastppo.system.text import duration

Line = list[str | tuple[str, str]]  # text, or text and style
SPARKS = "▁▂▃▄▅▆▇█"
DRAWN = SPARKS + "━─│╭╮╰╯·"  # the panel's letters that are not ASCII
BARS = 33  # of the curve, each for an equal part of the run
COLUMNS, LINES = 80, 8  # of the panel
_PLACES = {metric.cell: metric for metric in METRICS.values() if metric.cell}
CELLS = [[_PLACES[line, column] for column in range(3)] for line in range(4)]  # of the panel's lower half


class Display(Protocol):
    """Where a run's progress goes."""

    reader_gone: bool
    """Whether the pipe that the output goes to was closed."""

    def note(self, line: str) -> None:
        """Print a line that stays on the screen."""
        ...

    def update(self, row: Row, progress: float, eta_seconds: float, engine: str) -> None:
        """Show one iteration's metrics. progress: in [0, 1]. engine: what runs the environments and the programs."""
        ...

    def close(self) -> None:
        """Leave the last state on the screen. Notes may follow; a second call does nothing."""
        ...


def make_display(plain: bool, title: str) -> Display:
    """A live panel if the output is a terminal or a notebook that can show it, unless `plain`; else log lines."""
    is_terminal = getattr(sys.stdout, "isatty", lambda: False)()  # a notebook's stdout may have no such method
    # rich redraws a panel in a notebook by a widget
    is_notebook = Console().is_jupyter and importlib.util.find_spec("ipywidgets") is not None
    if plain or not (is_terminal or is_notebook) or Console().is_dumb_terminal:
        return PlainDisplay()
    try:
        DRAWN.encode(Console().encoding)
    except UnicodeError:
        return PlainDisplay()
    return LiveDisplay(title)


class NoDisplay:
    """Shows nothing, with --verbose 0 or because another process does."""

    reader_gone = False

    def note(self, line: str) -> None:
        """Do nothing."""

    def update(self, row: Row, progress: float, eta_seconds: float, engine: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class PlainDisplay:
    """Log lines, at most one a second."""

    def __init__(self) -> None:
        self.reader_gone = False
        self._last = -math.inf
        self._pending: str | None = None

    def note(self, line: str) -> None:
        self._flush()
        self._print(line)

    def update(self, row: Row, progress: float, eta_seconds: float, engine: str) -> None:
        self._pending = (
            f"{progress:4.0%} it {row['iteration']:<5} step {row['global_step']:<9} "
            f"return {number(row['episodic_return_mean']):>8} "
            f"loss {number(row['loss']):>8} policy {number(row['policy_loss']):>8} value {number(row['value_loss']):>8} "
            f"entropy {number(row['entropy']):>7} kl {number(row['approx_kl']):>8} sps {row['sps']:<7.0f} "
            + "".join(f"{said} " for said in infos_said(row))
            + f"eta {duration(eta_seconds)}"
            + ("  new best" if row["new_best"] else "")
        )
        if time.monotonic() - self._last >= 1.0:
            self._flush()

    def close(self) -> None:
        self._flush()

    def _flush(self) -> None:
        if self._pending is not None:
            self._print(self._pending)
            self._pending, self._last = None, time.monotonic()

    def _print(self, line: str) -> None:
        try:
            print(encodable(line, sys.stdout), flush=True)
        except BrokenPipeError:
            self.reader_gone = True
            silence_stdout()
        except OSError:  # a full disk: the line stays in Python's buffer until the next one
            return


class LiveDisplay:
    """A panel of at most 80 columns, redrawn at most five times a second. Values have fixed places."""

    def __init__(self, title: str) -> None:
        self.reader_gone = False  # a terminal that is closed sends SIGHUP instead
        self._title = title
        self._console = Console()
        self._live = Live(console=self._console, auto_refresh=False, transient=False)
        self._live.start()
        self._last = -math.inf
        self._drawn = (0, 0)  # columns and lines of the panel on the screen
        self._returns = [math.nan] * BARS  # by progress
        self._view: tuple[Row, float, float, str] | None = None
        self._best = "none yet"

    def note(self, line: str) -> None:
        with self._outliving_the_terminal():
            self._erase_wrapped()
            self._console.print(encodable(line, sys.stdout), markup=False, highlight=False)

    def update(self, row: Row, progress: float, eta_seconds: float, engine: str) -> None:
        if math.isfinite(row["episodic_return_mean"]):
            self._returns[min(int(progress * BARS), BARS - 1)] = row["episodic_return_mean"]
        if row["new_best"]:
            self._best = f"{figure(row['best_return'])} at {row['global_step']:,}"
        self._view = (row, progress, eta_seconds, engine)
        if time.monotonic() - self._last >= 0.2:
            with self._outliving_the_terminal():
                self._draw()

    def close(self) -> None:
        with self._outliving_the_terminal():
            if self._live.is_started:
                self._draw()
                self._live.stop()

    @contextlib.contextmanager
    def _outliving_the_terminal(self) -> Iterator[None]:
        """For writing to the terminal: if it was closed, nothing is shown any more, and training continues (under nohup)."""
        try:
            yield
        except OSError:
            self._console.quiet = True

    def _draw(self) -> None:
        self._last = time.monotonic()
        if self._view is not None:
            self._erase_wrapped()
            panel = self._panel(*self._view)
            self._live.update(panel, refresh=True)
            self._drawn = (panel.width or 0, LINES)

    def _erase_wrapped(self) -> None:
        """Erase the lines that a terminal added by wrapping the panel when it was made narrower; rich does not know of them."""
        columns, lines = self._drawn
        extra = lines * (math.ceil(columns / self._console.width) - 1)
        if extra > 0 and self._live.is_started:
            self._console.control(Control(*[(ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)] * extra))
            self._drawn = (0, 0)

    def _panel(self, row: Row, progress: float, eta_seconds: float, engine: str) -> Panel:
        width = min(self._console.width, COLUMNS)
        room = max(width - 47, 0)  # of the curve
        done = round(progress * (room + 7))
        lines: list[Line] = [
            [
                ("━" * done, "green"),
                ("─" * (room + 7 - done), "dim"),
                f" {progress:4.0%}  ",
                (f"{duration(row['seconds'])} elapsed, {duration(eta_seconds)} left", "dim"),
            ],
            [
                ("return ", "dim"),
                (f"{figure(row['episodic_return_mean']):>9}  ", "bold green"),
                (f"{sparkline(self._returns, room):{room}}  ", "green"),
                (f"best {self._best}", "dim"),
            ],
        ]
        for left, middle, right in CELLS:
            line: Line = [(f"{left.label:9}", "dim"), f" {shown(left.name, row):>13}"]
            if width == COLUMNS:
                line += [(f"   {middle.label:11}", "dim"), f" {shown(middle.name, row):>10}"]
            style = "bold" if right.name == "sps" else "cyan"
            lines.append([*line, (f"     {right.label:6}", "dim"), (shown(right.name, row), style)])
        return Panel(
            Group(*(Text.assemble(*line, no_wrap=True, overflow="crop") for line in lines)),
            title=Text(self._title),
            title_align="left",
            subtitle=Text(engine),
            subtitle_align="left",
            width=width,
            height=LINES,
            border_style="dim",
        )


ASCII = {"·": "-", "±": "+-", "…": "...", "→": "->", "█": "#", "━": "=", "─": "-"}


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    """Error handler for codecs: ASCII for letters that the encoding lacks; undecodable bytes of file names are kept."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letter = error.object[error.start]
    escaped = "\udc80" <= letter <= "\udcff"  # Python's form of a byte that it could not decode
    return bytes([ord(letter) - 0xDC00]) if escaped else ASCII.get(letter, "?"), error.start + 1


codecs.register_error("fastppo", _replace)


def print_any_letter() -> None:
    """Let this process's own stdout and stderr replace letters that they cannot encode instead of raising an error."""
    for stream, own in ((sys.stdout, sys.__stdout__), (sys.stderr, sys.__stderr__)):
        if stream is own and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="fastppo")


def encodable(text: str, stream: Any) -> str:
    """The text with letters that the stream cannot encode replaced."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text.encode(encoding, getattr(stream, "errors", None) or "strict")
        return text
    except UnicodeError:
        return text.encode(encoding, "fastppo").decode(encoding, "replace").replace("\ufffd", "?")


def silence_stdout() -> None:
    """After a BrokenPipeError: send stdout's buffer and all later output to the null device, so that nothing fails again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as at most `width` bars, scaled between their minimum and maximum.

    A nan repeats the value before it. Leading nans are spaces, trailing ones are left out.
    """
    known = [value for value in values if math.isfinite(value)]
    if not known or width < 1:
        return ""
    points = list(values)
    while not math.isfinite(points[-1]):
        points.pop()
    for index in range(1, len(points)):
        if not math.isfinite(points[index]):
            points[index] = points[index - 1]
    if len(points) > width:
        points = [points[index * len(points) // width] for index in range(width)]
    low, high = min(known), max(known)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((point - low) * scale)] if math.isfinite(point) else " " for point in points)


def share(value: float) -> str:
    """A bar of 10 columns and a percentage, 15 columns together."""
    return f"{'█' * round(value * 10):10} {value:4.0%}"


def shown(name: str, row: Row) -> str:
    """A metric's value as text for the panel."""
    value = row[name]
    if name.endswith("_share"):
        return share(value)
    if name == "sps":
        return f"{value:15,.0f}"
    return f"{value:,}" if isinstance(value, int) else figure(value)


def number(value: float) -> str:
    """Four significant digits; '-' for a value that is not finite."""
    return "-" if not math.isfinite(value) else f"{value:.4g}"


def figure(value: float) -> str:
    """The same for the panel, with trailing zeros so that the width is steady: '475.0', '12,346', '-1.234e-05'."""
    return number(value) if not 1e-4 <= abs(value) < 1e7 else f"{value:#.4g}" if abs(value) < 999.95 else f"{value:,.0f}"
