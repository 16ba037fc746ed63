"""Progress of training for people: a live panel on a terminal, log lines elsewhere."""

import codecs
import contextlib
import importlib.util
import io
import math
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol

from rich.console import Console
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType

from fastppo.run.metrics import Row, infos_said
from fastppo.run.panel import DRAWN, Panel, View, figure, number
from fastppo.run.usage import UsageMeter
from fastppo.system.text import duration

PARTS = 320  # of the run, each with a return of its own in the curve
HEAD = "{:>10} {:>11} {:>9} {:>9} {:>9} {:>9} {:>7} {:>8} {:>7} {:>7}".format(  # above the log lines
    "it", "step", "return", "loss", "policy", "value", "entropy", "kl", "SPS", "left"
)
HEAD_EVERY = 20  # log lines


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
    """Log lines of at most 100 columns, at most one a second, as a table whose head is repeated."""

    def __init__(self) -> None:
        self.reader_gone = False
        self._last = -math.inf
        self._pending: str | None = None
        self._new_best = False  # since the last line
        self._lines = 0

    def note(self, line: str) -> None:
        self._flush()
        self._print(line)

    def update(self, row: Row, progress: float, eta_seconds: float, engine: str) -> None:
        self._new_best = self._new_best or bool(row["new_best"])
        loss, policy, value, entropy, kl = (
            number(row[name], 3) for name in ("loss", "policy_loss", "value_loss", "entropy", "approx_kl")
        )
        self._pending = (
            f"{progress:4.0%} {row['iteration']:>5} {row['global_step']:>11,} {number(row['episodic_return_mean']):>9} "
            f"{loss:>9} {policy:>9} {value:>9} {entropy:>7} {kl:>8} {row['sps']:>7.0f} {duration(eta_seconds):>7}"
            + "".join(f" {said}" for said in infos_said(row))
        )
        if time.monotonic() - self._last >= 1.0:
            self._flush()

    def close(self) -> None:
        self._flush()

    def _flush(self) -> None:
        if self._pending is not None:
            if self._lines % HEAD_EVERY == 0:
                self._print(HEAD)
            self._lines += 1
            self._print(self._pending + (" best" if self._new_best else ""))
            self._pending, self._new_best, self._last = None, False, time.monotonic()

    def _print(self, line: str) -> None:
        try:
            print(encodable(line, sys.stdout), flush=True)
        except BrokenPipeError:
            self.reader_gone = True
            silence_stdout()
        except OSError:  # a full disk: the line stays in Python's buffer until the next one
            return


class LiveDisplay:
    """A panel as wide as the terminal, redrawn at most five times a second. Values have fixed places."""

    def __init__(self, title: str) -> None:
        self.reader_gone = False  # a terminal that is closed sends SIGHUP instead
        self._title = title
        self._console = Console()
        self._live = Live(console=self._console, auto_refresh=False, transient=False)
        self._live.start()
        self._last = -math.inf
        self._drawn = (0, 0)  # columns and lines of the panel on the screen
        self._returns = [math.nan] * PARTS  # by progress
        self._update: tuple[Row, float, float, str] | None = None
        self._best = "none yet"
        self._usage = UsageMeter()

    def note(self, line: str) -> None:
        with self._outliving_the_terminal():
            self._erase_wrapped()
            self._console.print(encodable(line, sys.stdout), markup=False, highlight=False)

    def update(self, row: Row, progress: float, eta_seconds: float, engine: str) -> None:
        if math.isfinite(row["episodic_return_mean"]):
            self._returns[min(int(progress * PARTS), PARTS - 1)] = row["episodic_return_mean"]
        if row["new_best"]:
            self._best = f"{figure(row['best_return'])} at {row['global_step']:,}"
        self._update = (row, progress, eta_seconds, engine)
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
        if self._update is not None:
            self._erase_wrapped()
            view = View(self._title, *self._update, self._best, self._returns, self._usage.read())
            panel = Panel(view, self._console.width, self._console.height)
            self._live.update(panel, refresh=True)
            self._drawn = (panel.width, len(panel.lines))

    def _erase_wrapped(self) -> None:
        """Erase the lines that a terminal added by wrapping the panel when it was made narrower; rich does not know of them."""
        columns, lines = self._drawn
        extra = lines * (math.ceil(columns / self._console.width) - 1)
        if extra > 0 and self._live.is_started:
            self._console.control(Control(*[(ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)] * extra))
            self._drawn = (0, 0)


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
