"""The panel and the plain lines: they fit the terminal, and nothing in them is markup."""

import io
import re
import sys

import pytest
from rich.cells import cell_len

from fastppo.run.display import LiveDisplay, PlainDisplay, make_display
from fastppo.run.panel import area, figure, number
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


@pytest.mark.parametrize("columns", [80, 200])
def test_live_display_fits_80_columns(monkeypatch, columns):
    """Nothing is cut off or wrapped on an 80-column terminal, with figures as long as they get."""
    terminal = on_terminal(monkeypatch, columns)
    display = make_display(False, "fastppo · CartPole-v1 · seed 1")
    assert isinstance(display, LiveDisplay)
    for step in range(60):
        display.update({**ROW, "episodic_return_mean": -1234.5678 + step % 7}, 0.42, 4000.0, "gymnasium/sync · cpu · eager")
    display.note("a note that stays")
    display.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue()).replace("\r", "\n")
    panel = [line for line in text.splitlines() if line.startswith(("╭", "│", "╰"))]
    assert panel
    assert max(cell_len(line) for line in panel) == 80
    assert "a note that stays" in text
    assert "…" not in text
    for shown in (
        "fastppo · CartPole-v1 · seed 1",
        "42%",
        "1:06:40 elapsed, 1:06:40 left",
        "123,456,789",
        "12,345",
        "1,234,567",
        "gymnasium/sync · cpu · eager",
        "-1,235",
        "12,346",
        "-0.0001235",
        "0.6931",
        "0.0001235",
        "123,457",
        "50%",
        "20%",
        "100%",
        "▁",
        "█",
    ):
        assert shown in text, shown


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
    screen = screen_of(terminal, 50, 40)
    assert screen[:2] == ["a note that stays", "another one"]
    assert [line[0] for line in screen[2:] if line] == ["╭", *"│" * 6, "╰"]
    assert all(cell_len(line) == 50 for line in screen[2:] if line)
    assert "torch · cpu · eager" in screen[9]


def test_the_curve_is_of_the_whole_run(monkeypatch):
    """Its bars stand for shares of the run, from the first on: more iterations push nothing out at its left."""
    terminal = on_terminal(monkeypatch)
    display = LiveDisplay("title")
    for step in range(3000):
        display.update({**ROW, "episodic_return_mean": float(step >= 1500)}, step / 3000, 1.0, "")
    display.close()
    curve = re.findall("[▁▂▃▄▅▆▇█]+", screen_of(terminal, 80, 24)[2])
    assert curve == ["▁" * 16 + "█" * 17]


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


def test_live_display_before_the_first_episode(monkeypatch):
    """Nothing has ended yet: dashes, no crash."""
    terminal = on_terminal(monkeypatch)
    display = LiveDisplay("title")
    nan = float("nan")
    display.update(
        {**ROW, "episodic_return_mean": nan, "episodic_length_mean": nan, "new_best": False}, 0.0, nan, "torch · cpu · eager"
    )
    display.close()
    assert "none yet" in terminal.getvalue()
    assert "nan" not in terminal.getvalue()


def test_plain_lines(capsys):
    """Without a terminal: one line with the figures that the article's log has, at most one a second, and the last one."""
    display = make_display(False, "title")
    assert isinstance(display, PlainDisplay)
    display.note("run directory x")
    display.update(ROW, 0.42, 65.0, "")
    display.update({**ROW, "iteration": 2, "new_best": False}, 0.43, 64.0, "")
    display.update({**ROW, "iteration": 3, "new_best": False}, 0.44, 63.0, "")
    display.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "run directory x"
    assert len(lines) == 3  # the first update, then the last: those within the second between are dropped
    for shown in ("42%", "return", "-1235", "loss", "policy", "value", "entropy", "0.6931", "1:05", "new best"):
        assert shown in lines[1]
    assert " it 3 " in lines[2]
    assert "new best" not in lines[2]


def test_figures_for_people():
    """Durations, numbers and sparklines read as a person would write them."""
    assert [duration(x) for x in (0, 59.4, 61, 3753, float("inf"))] == ["0 s", "59 s", "1:01", "1:02:33", "?"]
    assert [number(x) for x in (475.0, 0.00012346, float("nan"))] == ["475", "0.0001235", "-"]
    shown = [figure(x) for x in (475, 475.04, -1234.5, 999.96, 1e6, -2.046e-5, 0.0, 0.00012346, float("nan"))]
    assert shown == ["475.0", "475.0", "-1,234", "1,000", "1,000,000", "-2.046e-05", "0", "0.0001235", "-"]
    assert sparkline([0.0, 0.5, 1.0], 10) == "▁▅█"
    nan = float("nan")
    assert sparkline([nan, 0.0, nan, 1.0, nan, nan], 10) == " ▁▁█"
    assert sparkline([nan, nan], 10) == ""
    assert sparkline([3.0, 3.0], 10) == "▁▁"
    assert len(sparkline(list(range(500)), 30)) == 30
    assert sparkline([], 30) == ""


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
