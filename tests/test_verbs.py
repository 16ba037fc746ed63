"""`fastppo VERB`: every verb is a module that can be run by itself, and is found without torch."""

import subprocess
import sys

import pytest

from fastppo.__main__ import VERBS, console, module_of


def test_help_names_every_verb(capsys):
    """Without a verb, too; and each verb's own help is that of its module."""
    for args in ([], ["--help"], ["-h"]):
        assert console(args) == 0
        shown = capsys.readouterr().out
        assert all(f"  {verb} " in shown for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_is_a_module(verb, capsys):
    """`fastppo VERB` and `python -m fastppo.VERB` are the same; its help says how it is called."""
    with pytest.raises(SystemExit) as end:
        console([verb, "--help"])
    assert not end.value.code
    assert f"python -m fastppo.{module_of(verb)}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "near"),
    [
        (["trian"], "nearest: train"),
        (["evalute", "x"], "nearest: evaluate"),
        (["enjoy"], "here it is evaluate --render human ("),
        (["CartPole-v1"], "; to train: fastppo train --env-id CartPole-v1 ("),
        (["--env-id", "CartPole-v1"], "; to train: fastppo train --env-id CartPole-v1 ("),
        (["--num-envs", "8"], "fastppo --help"),
    ],
)
def test_no_verb(args, near, capsys):
    """Exit code 2, and the nearest one."""
    assert console(args) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {args[0]!r} is not a verb of fastppo")
    assert near in error


def test_a_verb_costs_no_torch():
    """What is wrong with the command line is said at once."""
    script = (
        "import sys; from fastppo.__main__ import console; console(['train', '--num-env']); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--num-envs" in done.stderr
