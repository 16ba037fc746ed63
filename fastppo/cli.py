"""The command line of all verbs: flags become settings, exceptions become exit codes. Costs no torch."""

import ast
import contextlib
import errno
import inspect
import io
import itertools
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TypeVar

import tyro

from fastppo.bounds import flag
from fastppo.config import OLD_NAMES, TrainConfig, read_run_config
from fastppo.env_objects import objects_in
from fastppo.envs.registry import names_module
from fastppo.errors import RankLost, TrainingFault, UsageError, naming_flags, nearest
from fastppo.find_preset import choose_preset, find_preset
from fastppo.given_settings import HABITS, with_absolute_paths, without_rivals
from fastppo.run.display import print_any_letter, silence_stdout
from fastppo.system.paths import absolute, current_directory, importable, leave_deleted_directory
from fastppo.system.platforms import SIGPIPE, open_standard_streams
from fastppo.system.text import printable, whole_number
from fastppo.training.resumed_settings import check_resumable, resumed_settings

T = TypeVar("T")
SPEAK_SECONDS = 2.0  # for the process that prints the reason: torchrun ends all processes once one has exited
MAX_LETTERS = 250  # of a value that is quoted in an error
OUTPUT_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # a full disk, a quota, a closed terminal


def run(verb: Callable[[Sequence[str]], object], args: Sequence[str], needs_output: bool = True) -> int:
    """Call `verb(args)`; returns the exit code.

    0; 2 for wrong use, 3 for a fault, 130 when interrupted, 141 when stdout is a pipe whose reader has closed it.
    needs_output: whether it is a fault if the last output cannot be written, for example to a full disk.
    """
    try:
        try:
            open_standard_streams()
            print_any_letter()
            leave_deleted_directory()
            logging.getLogger("matplotlib").setLevel(logging.ERROR)  # without a home directory it warns of its font cache
            with importable(current_directory()), naming_flags():
                verb(args)
        finally:  # --help leaves with SystemExit
            _flush_stdout(needs_output)
    except UsageError as error:
        return _ended(f"error: {error}", 2)
    except RankLost as error:
        return _ended(f"fault: {error}", 3, not error.is_told)
    except TrainingFault as error:
        return _ended(f"fault: {error}", 3)
    except KeyboardInterrupt:
        return _ended("interrupted", 130)
    except BrokenPipeError:
        silence_stdout()
        return 128 + SIGPIPE
    except OSError as error:
        if error.errno not in OUTPUT_ERRORS:
            raise
        silence_stdout()
        return _ended(f"fault: the output could not be written: {error.strerror}", 3)
    return 0


def _flush_stdout(needs_output: bool) -> None:
    """Write the rest of the buffer. Raises OSError if that fails; other errors than a broken pipe only if `needs_output`."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError:
        silence_stdout()
        if needs_output:
            raise


def _ended(message: str, code: int, speaks: bool | None = None) -> int:
    """Print the message and return the code. speaks: whether to print; default: only the first process of a machine does."""
    if speaks is None:
        speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    if not speaks:
        time.sleep(SPEAK_SECONDS)
        return code
    with contextlib.suppress(OSError):  # stderr may be on the same full disk
        print(printable(message), file=sys.stderr, flush=True)
    return code


@naming_flags()
def parse_train(args: Sequence[str]) -> TrainConfig:
    """Settings from the flags of `fastppo.train`, which override the preset's or the resumed run's."""
    place = current_directory()  # the choice of a preset imports the environment's module, which may change it
    args = _with_answers([_with_current_name(arg) for arg in args])
    args = _with_newest_run(_joined("--wrapper", args))
    resume = _value_of("--resume", args) or _restarted(args)
    if resume is None:
        start = _preset_config(args)
        default = replace(_without_rivals(start, args), preset="auto")  # what --help shows
        config = parse(TrainConfig, args, prog="python -m fastppo.train", default=default)
        return with_absolute_paths(replace(config, preset=start.preset), place)

    before = resumed_settings(resume, place)
    given = parse(TrainConfig, args, prog="python -m fastppo.train", default=_without_rivals(before, args))
    config = with_absolute_paths(given, place)
    check_resumable(before, config)
    return config


def _with_current_name(arg: str) -> str:
    """The argument, with a flag's old name replaced by its current one."""
    name, equals, text = arg.partition("=")
    old = next((old for old in OLD_NAMES if name.replace("_", "-") == flag(old)), None)
    return arg if old is None else flag(OLD_NAMES[old]) + equals + text


def _with_answers(args: Sequence[str]) -> list[str]:
    """The arguments, with the value of a flag that needs none."""
    answers = {
        "--rescale-action": "--rescale-action=True",
        "--no-rescale-action": "--rescale-action=False",
        "--verbose": "--verbose=2",
        "--quiet": "--verbose=0",
    }
    pairs = itertools.pairwise([*args, "--"])
    return [answers.get(arg.replace("_", "-"), arg) if following.startswith("--") else arg for arg, following in pairs]


def _joined(name: str, args: Sequence[str]) -> list[str]:
    """The arguments, with all values of a flag that may be repeated after its first occurrence."""
    values: list[str] = []
    others: list[str] = []
    first: int | None = None
    inside = False
    for arg in args:
        given, equals, text = arg.partition("=")
        if given.replace("_", "-") == name:
            inside, first = not equals, len(others) if first is None else first
            values += [text] if equals else []
        elif inside and not arg.startswith("-"):
            values.append(arg)
        else:
            inside = False
            others.append(arg)
    return others if first is None else [*others[:first], name, *values, *others[first:]]


def _with_newest_run(args: Sequence[str]) -> list[str]:
    """The arguments, with the newest run after a --resume without a value."""
    for position, arg in enumerate(args, 1):
        if arg == "--resume" and (position == len(args) or args[position].startswith("--")):
            return [*args[:position], chosen_run(None, "--resume"), *args[position:]]
    return list(args)


def chosen_run(given: str | None, name: str = "RUN_DIR") -> str:
    """The run directory that was given, else the newest one in runs/, which is printed. Raises UsageError if there is none."""
    if given is not None:
        return given
    try:
        found = [(path.stat().st_mtime, path.parent) for path in Path("runs").glob("*/config.json")]
    except OSError as error:
        raise UsageError(f"runs cannot be read ({error.strerror}): give {name}") from None
    if not found:
        raise UsageError(f"which run? There is none in runs/ here: give {name}")
    newest = str(max(found)[1])
    print(printable(f"the newest run: {newest}"), flush=True)
    return newest


def open_run(given: str | None, checkpoint: str) -> tuple[Path, Path, TrainConfig]:
    """The run directory that was given, the folder for what is made from it, and its settings.

    A run on the Hub, hf://owner/name, is downloaded, and what is made from it belongs into the working directory. It must not
    name code: nobody reads a directory in a cache first. Raises UsageError.
    """
    name, place = chosen_run(given), current_directory()
    if not name.startswith("hf://"):
        directory = absolute(name, "RUN_DIR", place)
        return directory, directory, read_run_config(directory)
    from fastppo.run.hub import fetch_run  # imports torch

    directory = fetch_run(name, checkpoint)
    config = read_run_config(directory)
    named = [config.env_id] if names_module(config.env_id) else [*config.wrapper, *filter(None, [config.policy])]
    named += objects_in(config.env_kwargs)
    if named:
        download = f"hf download {name.removeprefix('hf://').partition('@')[0]} --local-dir DIR"
        raise UsageError(f"{name} names code to import, {named[0][:100]}: if you trust it, `{download}`, and name DIR")
    return directory, absolute(".", "RUN_DIR", place), config


def _restarted(args: Sequence[str]) -> str | None:
    """The run to resume when torchrun --max-restarts runs the same command again after a failure, else None.

    torchrun's own count of restarts is not enough: a machine that has rejoined counts from 0.
    """
    run_dir = _value_of("--run-dir", args)
    if run_dir is None or os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return None
    return run_dir if os.path.exists(Path(run_dir) / "config.json") else None


def _preset_config(args: Sequence[str]) -> TrainConfig:
    """The settings of --preset, with its own environment. Raises UsageError if there is no such preset."""
    name = _value_of("--preset", args) or "auto"
    if name == "auto":
        return choose_preset(_value_of("--env-id", args) or TrainConfig.env_id).config()
    return find_preset(name, _value_of("--env-id", args)).config()


NAMES_ELSEWHERE = {**HABITS, "--run-dir": "--output-dir"}  # --run-dir is the name of train, for a hint of the other verbs
REGISTRY = tyro.constructors.ConstructorRegistry()


@REGISTRY.primitive_rule
def _whole_numbers(type_info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[int] | None:
    """Read each int by `whole_number`."""
    if type_info.type is not int:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda given: whole_number(given[0]),
        is_instance=lambda instance: isinstance(instance, int) and not isinstance(instance, bool),
        str_from_instance=lambda instance: [str(instance)],
    )


@naming_flags()
def parse(kind: type[T], args: Sequence[str], prog: str, default: T | None = None) -> T:
    """tyro's parser. Its report of a wrong flag becomes one or two lines and is raised as UsageError."""
    console = io.StringIO()
    try:
        with contextlib.redirect_stderr(console):
            if default is None:
                return tyro.cli(kind, args=list(args), prog=prog, registry=REGISTRY)
            return tyro.cli(kind, args=list(args), prog=prog, default=default, registry=REGISTRY)
    except SystemExit as exit_:
        if not exit_.code:  # --help
            raise
        raise UsageError(_fold(console.getvalue(), {flag(spec.name) for spec in fields(kind)})) from None  # type: ignore[arg-type]


def help_texts(kind: type) -> dict[str, str]:
    """The help text of each setting of a dataclass: the string under it in the source."""
    (body,) = (node.body for node in ast.parse(inspect.getsource(kind)).body if isinstance(node, ast.ClassDef))
    return {
        setting.target.id: str(text.value.value)
        for setting, text in itertools.pairwise(body)
        if isinstance(setting, ast.AnnAssign) and isinstance(setting.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def _without_rivals(default: TrainConfig, args: Sequence[str]) -> TrainConfig:
    """`default` without the settings that a given flag replaces. Raises UsageError if both of a pair are given."""
    alone = {arg.replace("_", "-") for arg in args}
    values = {spec.name: _value_of(flag(spec.name), args) for spec in fields(TrainConfig)}
    given = {name: value or "" for name, value in values.items() if value or flag(name) in alone}  # a flag may be the last word
    return without_rivals(default, given)


def _value_of(name: str, args: Sequence[str]) -> str | None:
    """The value of one flag, read before parsing because it decides the parser's defaults."""
    value = None
    for position, arg in enumerate(args):
        given, equals, text = arg.partition("=")
        if given.replace("_", "-") == name:
            value = text if equals else args[position + 1] if position + 1 < len(args) else None
    return value


def _fold(box: str, flags: Collection[str]) -> str:
    """The first paragraph of tyro's framed report, with the flag of ours that others call so, or the nearest of `flags`."""
    lines = (line.strip("│╰╯ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()[1:])  # 0: the frame's title
    paragraphs = itertools.groupby(lines, lambda line: set(line) <= {"─", "-"})
    text = next((" ".join(paragraph) for is_rule, paragraph in paragraphs if not is_rule), box.strip())
    message = re.sub(r"(\S{40})\S{10,}(\s+\S{50,})*", r"\1...", text)  # tyro breaks long words
    message = re.sub(
        r"^Missing from [^:]*: (?:({[^}]*}).*|(?:STR )?(.*?)(?: \(required\).*)?)$", r"missing argument: \1\2", message
    )
    message = re.sub(r"options:[ ,]*$", "options: ''", message)  # an argument of blanks
    message = re.sub(r"no type matching .*\bFLOAT could be instantiated from \[(.*)\]\.?$", r"\1 is not a number", message)
    whole_numbers = r"no type matching .*\bINT \.\.\.\].* could be instantiated from \[(.*)\]\.?$"
    message = re.sub(whole_numbers, r"\1: write whole numbers as 64 64", message)
    if len(message) > MAX_LETTERS:
        message = message[:MAX_LETTERS] + "..."
    if message.startswith("Unrecognized"):
        words = message.replace(",", " ").split()
        given = [word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")]
        habit = next((NAMES_ELSEWHERE[word] for word in given if NAMES_ELSEWHERE.get(word) in flags), None)
        if habit is not None:
            return f"{message}; here it is {habit} (all flags: --help)"
        word = re.match(r"Unrecognized options: ([^-\s,][^\s,]*)(?!\S)", message)
        if word:
            what, name = ("an environment", "--env-id") if re.search(r"-v\d+$", word[1]) else ("a file", "--output")
            if name in flags:
                return f"{message}; {what} is given as {name} {word[1]} (all flags: --help)"
        if given:  # a flag's first words are enough
            message += nearest(given[0][:100], [name for name in flags if name.startswith(given[0])] or sorted(flags), 2)
    return message + " (all flags: --help)"
