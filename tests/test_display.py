"""The panel and the plain lines: they fit the terminal, and nothing in them is markup."""

import io
import math
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from rich.cells import cell_len

from fastppo.run.display import LiveDisplay, PlainDisplay, make_display
from fastppo.run.panel import Panel, View, area, figure, number
from fastppo.run.usage import Usage, UsageMeter
from fastppo.system.platforms import cpu_seconds
from fastppo.system.text import duration


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self):
        return True


def on_terminal(monkeypatch, columns=80):
    """What is printed goes to a terminal of so many columns from here on."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    for name, value in {"COLUMNS": columns, "LINES": 40, "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, str(value))
    return terminal


@pytest.mark.parametrize(("columns", "lines", "height"), [(80, 24, 18), (120, 40, 22), (300, 12, 11), (80, 8, 7)])
def test_live_display_fits_the_terminal(monkeypatch, columns, lines, height):
    """It is as wide as the terminal, and lower; nothing is cut off or wrapped, with figures as long as they get."""
    terminal = on_terminal(monkeypatch, columns)
    monkeypatch.setenv("LINES", str(lines))
    display = make_display(False, "fastppo · CartPole-v1 · seed 1")
    assert isinstance(display, LiveDisplay)
    for step in range(60):
        display.update({**ROW, "episodic_return_mean": -1234.5678 + step % 7}, 0.42, 4000.0, "gymnasium/sync · cpu · eager")
    display.note("a note that stays")
    display.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).replace("\r", "\n")
    panel = [line for line in text.splitlines() if line.startswith(("╭", "│", "╰"))]
    assert {cell_len(line) for line in panel} == {min(columns, 160)}
    assert panel[-height].startswith("╭")
    assert panel[-1].startswith("╰")
    assert height < lines
    assert "a note that stays" in text
    assert "…" not in text
    for shown in (
        "fastppo · CartPole-v1 · seed 1",
        "42%",
        "1:06:40 elapsed, 1:06:40 left",
        "123,456,789",
        "gymnasium/sync · cpu · eager",
        "-1,235",
        "-0.0001235",
        "50%",
        "▁",
        "█",
    ):
        assert shown in text, shown
    words = ("12,345", "1,234,567", "12,346", "0.6931", "0.0001235", "123,457", "20%", "100%", "CPU", "memory")
    words += ("learning rate", "0.0002500", "clip fraction", "0.1000", "explained var", "-12.35")
    assert all(word in text for word in words) == (height > 7)  # cells have the room that is left


def screen_of(terminal, columns, rows):
    """What stands on a terminal of that size after all that was written: one that obeys what rich sends, and wraps."""
    screen, row, column = [[" "] * columns for _ in range(rows)], 0, 0
    for code, letter in re.findall(r"\x1b\[([0-9;?]*[A-Za-z])|([^\x1b])", terminal.getvalue()):
        if letter == "\n":
            row, column = row + 1, 0
        elif letter == "\r":
            column = 0
        elif letter:
            if column == columns:
                row, column = row + 1, 0
            screen[row][column] = letter
            column += 1
        elif code.endswith("A"):
            row -= int(code[:-1] or 1)
        elif code == "2K":
            screen[row] = [" "] * columns
    return ["".join(line).rstrip() for line in screen]


def test_live_display_on_a_terminal_made_narrower(monkeypatch):
    """The terminal has wrapped each line of the panel into two: none of these is left over, and the notes above stay."""
    terminal = on_terminal(monkeypatch)
    display = LiveDisplay("title")
    display.note("a note that stays")
    display.update(ROW, 0.42, 65.0, "torch · cpu · eager")
    monkeypatch.setattr(display._console, "_width", 50)
    display.note("another one")
    display.close()
    screen = screen_of(terminal, 50, 60)
    assert screen[:2] == ["a note that stays", "another one"]
    panel = [line for line in screen[2:] if line]
    assert [line[0] for line in panel] == ["╭", *"│" * 20 + "╰"]
    assert all(cell_len(line) == 50 for line in panel)
    assert "torch · cpu · eager" in panel[-1]


def test_the_curve_is_of_the_whole_run(monkeypatch):
    """Its bars stand for shares of the run, from the first on: more iterations push nothing out at its left."""
    terminal = on_terminal(monkeypatch)
    display = LiveDisplay("title")
    for step in range(3000):
        display.update({**ROW, "episodic_return_mean": float(step >= 1500)}, step / 3000, 1.0, "")
    display.close()
    curve = [re.search("[┤│]([ ▁▂▃▄▅▆▇█]+)", line[2:])[1].rstrip() for line in screen_of(terminal, 80, 40)[2:14]]
    assert curve == [" " * 33 + "█" * 33] * 11 + ["▁" * 33 + "█" * 33]


def test_a_name_is_no_markup(monkeypatch):
    """rich would take brackets for styles, and fail at one that closes nothing."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    display = LiveDisplay("[/bold] My[red]Env")
    display.update(ROW, 0.42, 65.0, "[/x]")
    display.close()
    assert "[/bold] My[red]Env" in terminal.getvalue()


class Notebook:
    """What a notebook's kernel puts in stdout's place, as far as a library may count on it."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("where", ["notebook", "pipe", "dumb terminal", "--plain"])
def test_no_panel(where, monkeypatch):
    """Log lines, and nothing that only a terminal obeys."""
    file = {"notebook": Notebook, "pipe": io.StringIO}.get(where, Terminal)()
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setenv("TERM", "dumb" if where == "dumb terminal" else "xterm-256color")
    display = make_display(where == "--plain", "title")
    assert isinstance(display, PlainDisplay)
    for index in range(50):
        display.note(f"note {index}")
        display.update(ROW, 0.42, 65.0, "torch · cpu · eager")
    display.close()
    text = file.text if where == "notebook" else file.getvalue()
    assert text.count("note") == 50
    assert text.isprintable() or set(filter(lambda letter: not letter.isprintable(), text)) == {"\n"}


@pytest.mark.parametrize(
    ("width", "head"),
    [
        (76, "return   -1,235  best -1,230 at 123,456,789        42%  1:05 elapsed, 1:05 left"),
        (60, "return   -1,235  best -1,230   42%  1:05 elapsed, 1:05 left"),
        (50, "return   -1,235   42%  1:05 elapsed, 1:05 left"),
    ],
)
def test_the_first_line_says_what_it_has_room_for(width, head):
    """Where the best return was found, then the best return, make room for the time."""
    row, best = {**ROW, "seconds": 65.0}, "-1,230 at 123,456,789"
    view = View("", row, 0.42, 65.0, "", best, [], Usage(0.0, 0.0))
    line = Panel(view, width + 4, 40).lines[1]
    assert "".join(text for text, _ in line).split() == ["│", *head.split(), "│"]


@pytest.mark.parametrize("columns", ["80", "10", "1"])
def test_live_display_before_the_first_episode(columns, monkeypatch):
    """Nothing has ended yet: dashes, no crash, on a tiny terminal neither."""
    terminal = on_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", columns)
    display = LiveDisplay("title")
    nan = float("nan")
    display.update(
        {**ROW, "episodic_return_mean": nan, "episodic_length_mean": nan, "new_best": False}, 0.0, nan, "torch · cpu · eager"
    )
    display.close()
    assert ("none yet" in terminal.getvalue()) == (columns == "80")
    assert "nan" not in terminal.getvalue()


def test_plain_lines(capsys):
    """Without a terminal: a line with the figures that the article's log has, at most one a second, and the last one.

    None is wider than 100 columns. A new best of an iteration without a line is told in the next one.
    """
    display = make_display(False, "title")
    assert isinstance(display, PlainDisplay)
    display.note("run directory x")
    display.update(ROW, 0.42, 65.0, "")
    display.update({**ROW, "iteration": 2}, 0.43, 64.0, "")
    display.update({**ROW, "iteration": 3, "new_best": False}, 0.44, 63.0, "")
    display.note("in between")
    display.update({**ROW, "iteration": 4, "new_best": False}, 0.45, 62.0, "")
    display.close()
    note, head, *lines = capsys.readouterr().out.splitlines()
    assert note == "run directory x"
    assert head.split() == ["it", "step", "return", "loss", "policy", "value", "entropy", "kl", "SPS", "left"]
    assert [line.split()[:2] for line in lines] == [["42%", "12345"], ["44%", "3"], ["in", "between"], ["45%", "4"]]
    figures = "42% 12345 123,456,789 -1235 -0.000123 -0.000123 1.23e+04 0.693 0.000123 123457 1:05 best"
    assert lines[0].split() == figures.split()
    assert [line.endswith(" best") for line in lines] == [True, True, False, False]
    assert max(map(len, lines)) == 100
    assert [head.index(name) + len(name) for name in head.split()] == [match.end() for match in re.finditer(r"\S+", lines[0])][
        1:11
    ]


def test_the_head_is_repeated(monkeypatch, capsys):
    """Above each 20th log line."""
    monkeypatch.setattr("fastppo.run.display.time", SimpleNamespace(monotonic=iter(range(1000)).__next__))
    display = PlainDisplay()
    for _ in range(41):
        display.update(ROW, 0.42, 65.0, "")
    lines = capsys.readouterr().out.splitlines()
    assert [index for index, line in enumerate(lines) if " loss " in line] == [0, 21, 42]


def test_figures_for_people():
    """Durations, numbers and sparklines read as a person would write them."""
    assert [duration(x) for x in (0, 59.4, 61, 3753, float("inf"))] == ["0 s", "59 s", "1:01", "1:02:33", "?"]
    assert [number(x) for x in (475.0, 0.00012346, float("nan"))] == ["475", "0.0001235", "-"]
    shown = [figure(x) for x in (475, 475.04, -1234.5, 999.96, 1e6, -2.046e-5, 0.0, 0.00012346, float("nan"))]
    assert shown == ["475.0", "475.0", "-1,234", "1,000", "1,000,000", "-2.046e-05", "0", "0.0001235", "-"]


def test_the_area_below_a_curve():
    """From the least value, an eighth of a line, to the greatest; gaps are bridged, what has no value yet is blank."""
    nan = float("nan")
    assert area([0.0, 0.5, 1.0], 3, 1) == ["▁▅█"]  # 0.5 of seven eighths: 3.5, rounded to 4, and the first
    assert area([0.0, 0.5, 1.0], 3, 2) == [" ▁█", "▁██"]  # 0.5 of fifteen: 7.5, rounded to 8, and the first
    assert area([nan, 0.0, nan, 1.0, nan, nan], 6, 1) == [" ▁▁█  "]
    assert area([nan, nan], 3, 2) == ["   ", "   "]
    assert area([3.0, 3.0], 2, 1) == ["▁▁"]
    assert area([0.0, nan, 1.0], 6, 1) == ["▁▁▁▁██"]  # fewer values than columns
    assert area(list(range(500)), 5, 1) == ["▂▄▅▇█"]  # more: the last one of each part
    assert area([1.0], 0, 2) == ["", ""]


def test_what_the_process_uses(monkeypatch):
    """A second of one core of two, with a child's: half. Memory is there where the system reports it."""
    now, used = [10.0], [5.0]
    monkeypatch.setattr("fastppo.run.usage.time.monotonic", lambda: now[0])
    monkeypatch.setattr("fastppo.run.usage.cpu_seconds", lambda: used[0])
    monkeypatch.setattr("fastppo.run.usage.available_cores", lambda: 2)
    meter = UsageMeter()
    assert math.isnan(meter.read().cpu)
    now[0], used[0] = 11.0, 6.0
    usage = meter.read()
    assert usage.cpu == 0.5
    assert 2**24 < usage.memory < 2**37
    assert Usage(0.5, 312.4 * 2**20).memory_text == "312M"
    assert Usage(0.5, 12.3 * 2**30, 45.6 * 2**30).memory_text == "12.3G GPU 45.6G"  # the cell has 15 columns
    assert Usage(0.5, math.nan).memory_text == "-"


def test_a_childs_processor_time_counts():
    """Environments may step in processes of their own."""
    if not os.path.exists(f"/proc/self/task/{os.getpid()}/children"):
        pytest.skip("this system does not list a process's children")
    before, own, deadline = cpu_seconds(), time.process_time(), time.monotonic() + 30.0
    with subprocess.Popen([sys.executable, "-S", "-c", "sum(range(10**7)); input()"], stdin=subprocess.PIPE) as child:
        seen = 0.0
        while seen < 0.05 and time.monotonic() < deadline:
            time.sleep(0.02)
            seen = cpu_seconds() - before - (time.process_time() - own)
        child.communicate(b"\n")
    assert seen >= 0.05


ROW = {
    "iteration": 12_345,
    "global_step": 123_456_789,
    "seconds": 4000.0,
    "sps": 123_456.7,
    "episodic_return_mean": -1234.5678,
    "episodic_length_mean": 1000.0,
    "episodes": 1_234_567,
    "loss": -0.00012346,
    "clipfrac": 0.1,
    "explained_variance": -12.3456,
    "learning_rate": 0.00025,
    "policy_loss": -0.00012346,
    "value_loss": 12345.678,
    "entropy": 0.6931,
    "approx_kl": 0.00012346,
    "env_share": 0.5,
    "act_share": 0.2,
    "learn_share": 1.0,
    "new_best": True,
    "best_return": -1230.0,
}


@pytest.mark.parametrize(("has_widgets", "plain", "is_live"), [(True, False, True), (False, False, False), (True, True, False)])
def test_a_notebook_has_the_panel_where_it_can_redraw_it(has_widgets, plain, is_live, monkeypatch):
    """Through ipywidgets; without them, and with --plain, log lines."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("fastppo.run.display.importlib.util.find_spec", lambda name: True if has_widgets else None)
    monkeypatch.setattr("fastppo.run.display.LiveDisplay", lambda title: f"Live {title}")
    made = make_display(plain, "title")
    assert made == "Live title" if is_live else isinstance(made, PlainDisplay)
