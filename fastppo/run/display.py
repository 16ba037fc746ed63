"""What a person sees while training: a live panel on a terminal, log lines elsewhere. Knows nothing of what it shows."""

import math
import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Row = Mapping[str, int | float]
SPARKS = "▁▂▃▄▅▆▇█"


class Display(Protocol):
    """Where a run's progress goes."""

    reader_gone: bool
    """Nobody sees it any more: the pipe that it went to was closed."""

    def note(self, line: str) -> None:
        """A line that stays: what was chosen and why, a new best model, where the results are."""
        ...

    def update(self, row: Row, progress: float, eta_seconds: float) -> None:
        """One iteration's metrics; progress in [0, 1]."""
        ...

    def close(self) -> None:
        """The last state stays on the screen. Notes may follow; a second call does nothing."""
        ...


def make_display(plain: bool, title: str) -> Display:
    """A live panel where the output is a terminal, unless `plain`."""
    return PlainDisplay() if plain or not sys.stdout.isatty() else LiveDisplay(title)


class NoDisplay:
    """Shows nothing: another process does."""

    reader_gone = False

    def note(self, line: str) -> None:
        """Nothing."""

    def update(self, row: Row, progress: float, eta_seconds: float) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class PlainDisplay:
    """Log lines, at most one a second."""

    def __init__(self) -> None:
        self.reader_gone = False
        self._last = -math.inf
        self._pending: str | None = None

    def note(self, line: str) -> None:
        self._flush()
        self._print(line)

    def update(self, row: Row, progress: float, eta_seconds: float) -> None:
        self._pending = (
            f"{progress:4.0%} it {row['iteration']:<5} step {row['global_step']:<9} "
            f"return {number(row['episodic_return_mean']):>8} "
            f"loss {number(row['loss']):>8} policy {number(row['policy_loss']):>8} value {number(row['value_loss']):>8} "
            f"entropy {number(row['entropy']):>7} kl {number(row['approx_kl']):>8} sps {row['sps']:<7.0f} "
            f"eta {duration(eta_seconds)}" + ("  new best" if row["new_best"] else "")
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
            print(line, flush=True)
        except BrokenPipeError:
            self.reader_gone = True
            silence_stdout()
        except OSError:  # a full disk behind it: the line waits in Python's buffer for the next one
            return


class LiveDisplay:
    """A panel of 80 columns at most, redrawn at most five times a second."""

    def __init__(self, title: str) -> None:
        self.reader_gone = False  # a terminal that goes sends SIGHUP
        self._title = title
        self._console = Console()
        self._live = Live(console=self._console, auto_refresh=False, transient=False)
        self._live.start()
        self._last = -math.inf
        self._returns: deque[float] = deque(maxlen=512)
        self._view: tuple[Row, float, float] | None = None
        self._best = "none yet"

    def note(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False)

    def update(self, row: Row, progress: float, eta_seconds: float) -> None:
        if math.isfinite(row["episodic_return_mean"]):
            self._returns.append(row["episodic_return_mean"])
        if row["new_best"]:
            self._best = f"{number(row['episodic_return_mean'])} at step {row['global_step']:,}"
        self._view = (row, progress, eta_seconds)
        if time.monotonic() - self._last >= 0.2:
            self._draw()

    def close(self) -> None:
        if self._live.is_started:
            self._draw()
            self._live.stop()

    def _draw(self) -> None:
        self._last = time.monotonic()
        if self._view is not None:
            self._live.update(self._panel(*self._view), refresh=True)

    def _panel(self, row: Row, progress: float, eta_seconds: float) -> Panel:
        width = min(self._console.width, 80)
        head = Table.grid(padding=(0, 1))
        head.add_row(
            ProgressBar(total=1.0, completed=progress, width=width - 38),
            Text(f"{progress:4.0%}"),
            Text(f"{duration(row['seconds'])} gone, {duration(eta_seconds)} to go", style="dim"),
        )
        curve = Table.grid(padding=(0, 1))
        curve.add_row(
            Text("return", style="dim"),
            Text(f"{number(row['episodic_return_mean']):>8}", style="bold green"),
            Text(sparkline(self._returns, width - 26 - len(self._best)), style="green"),
            Text(f"best {self._best}", style="dim"),
        )
        grid = Table.grid(padding=(0, 2))
        cells = (
            (("step", f"{row['global_step']:,}"), ("policy loss", number(row["policy_loss"])), ("env", row["env_share"])),
            (("iteration", f"{row['iteration']:,}"), ("value loss", number(row["value_loss"])), ("act", row["act_share"])),
            (("episodes", f"{row['episodes']:,}"), ("entropy", number(row["entropy"])), ("learn", row["learn_share"])),
            (
                ("length", number(row["episodic_length_mean"])),
                ("approx kl", number(row["approx_kl"])),
                ("SPS", f"{row['sps']:,.0f}"),
            ),
        )
        for line in cells:
            texts: list[Text] = []
            for name, value in line:
                texts.append(Text(name, style="dim"))
                if isinstance(value, str):
                    texts.append(Text(f"{value:>10}", style="bold" if name == "SPS" else ""))
                else:
                    texts.append(Text(f"{'█' * round(value * 10):<10} {value:4.0%}", style="cyan"))
            grid.add_row(*texts)
        return Panel(Group(head, curve, grid), title=self._title, title_align="left", width=width, border_style="dim")


def silence_stdout() -> None:
    """After a BrokenPipeError: what is still in stdout's buffer, and all that comes, goes nowhere instead of failing again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def sparkline(values: "deque[float]", width: int) -> str:
    """The values as `width` bars at most, scaled between their least and greatest."""
    if not values or width < 1:
        return ""
    points = list(values)
    if len(points) > width:
        points = [points[index * len(points) // width] for index in range(width)]
    low, high = min(points), max(points)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((point - low) * scale)] for point in points)


def number(value: float) -> str:
    """Four significant digits; '-' for what is not there yet."""
    return "-" if not math.isfinite(value) else f"{value:.4g}"


def duration(seconds: float) -> str:
    """'42 s', '3:07' or '1:02:33'."""
    if not math.isfinite(seconds):
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
