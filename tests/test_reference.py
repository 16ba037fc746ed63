"""REFERENCE.md: as the code has it, and complete."""

import json
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastppo import train
from fastppo.__main__ import VERBS, console
from fastppo.reference import SUMMARY, reference
from fastppo.run.metrics import METRICS
from fastppo.run.metrics_file import read_rows
from support.runs import tiny

FILE = Path(__file__).parent.parent / "REFERENCE.md"


def rows(section):
    """Of the tables in a section of the file, a list of cells a row, heads left out."""
    text = FILE.read_text().split(f"\n## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def test_it_is_as_the_code_has_it():
    """Whoever changes a flag or a text makes it anew."""
    assert FILE.read_text() == reference(), "REFERENCE.md is old: python -m fastppo.reference > REFERENCE.md"


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_that_the_help_has(verb, capsys):
    """Those that tyro's parser takes, no other, each with a text in a whole table row."""
    with pytest.raises(SystemExit):
        console([verb, "--help"])
    listed = [line.strip("│| ").split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    taken = {flag for line in listed if line.startswith("-") for flag in re.findall(r"--[a-z][a-z-]+", line)} - {"--help"}
    table = rows(f"fastppo {verb}")
    assert {flag for row in table for flag in re.findall(r"--[a-z-]+", row[0])} == taken
    assert all(len(row) == 4 and row[3] for row in table)


def test_every_figure_that_a_run_leaves(tmp_path):
    """The columns of metrics.csv, the tags of TensorBoard and the keys of summary.json, in their order, none without a text."""
    result = train(tiny(tmp_path / "run", eval_every=4, eval_episodes=1))
    assert list(read_rows(tmp_path / "run" / "metrics.csv")[0]) == list(METRICS)
    assert list(json.loads((tmp_path / "run" / "summary.json").read_text())) == list(SUMMARY) == list(result.summary)
    assert [row[0] for row in rows("metrics.csv")] == [f"`{key}`" for key in METRICS]
    assert [row[0] for row in rows("summary.json")] == [f"`{key}`" for key in SUMMARY]
    assert all(metric.text for metric in METRICS.values())
    assert all(SUMMARY.values())
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert {row[1] for row in rows("metrics.csv") if row[1]} == {f"`{tag}`" for tag in events.Tags()["scalars"]}
