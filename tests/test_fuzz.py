"""Any command line: a complete run, wrong use named in a line or two with nothing written, or a fault; never a traceback.

Flags and their types are read from TrainConfig; their values are legal ones, those at the bounds, and nonsense. Sixty command
lines, always the same, are tried by `scripts/test.sh -m long`; `scripts/test.sh -m slow tests/test_fuzz.py` tries 2000 of
another seed, another each time, and says how they ended.
"""

import contextlib
import io
import os
import random
import shlex
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from fastppo import TrainConfig
from fastppo.bounds import flag
from fastppo.presets import PRESETS
from fastppo.train import console

KINDS = get_type_hints(TrainConfig)
FLAGS = {flag(name) for name in KINDS}

# what keeps a run short, given wherever the fuzz gives nothing itself
TINY = {
    "preset": "none",
    "num_envs": "2",
    "num_steps": "8",
    "num_minibatches": "2",
    "update_epochs": "1",
    "num_iterations": "1",
}
TINY |= {"eval_episodes": "0", "hidden_sizes": "8", "compile": "off"}
# Legal values of these cost time or memory, those of the others none. None that is merely large is tried.
CHEAP = {
    "preset": ["auto", "none", *PRESETS],
    "env_id": ["CartPole-v1", "Pendulum-v1", "Acrobot-v1", "environments:Walk-v0", "environments:AnySpacesVector-v0"],
    "vectorization": ["auto", "entry-point", "sync"],
    "backend": ["auto", "gymnasium", "torch", "envpool"],
    "num_envs": ["1", "2", "4", "+3"],
    "num_steps": ["1", "8", "12"],
    "total_timesteps": ["1", "20"],
    "num_iterations": ["1", "2"],
    "num_minibatches": ["1", "2", "3", "16"],
    "minibatch_size": ["1", "2", "8", "16"],
    "update_epochs": ["1", "2"],
    "hidden_sizes": ["", "1", "8", "8 4"],
    "cnn_size": ["1", "16"],
    "num_threads": ["1", "2"],
    "device": ["auto", "cpu"],
    "compile": ["off"],
    "eval_episodes": ["0", "1", "2"],
    "run_dir": ["run", "a/b/c", "./run", "r un", "日本", "-run", "*", "$HOME", "a\nb", "x" * 200],
    "resume": ["finished", "./finished/", "finished/checkpoints/.."],
    "env_timeout": ["0", "300", "1e308"],
}
# gymnasium's of every kind, and what is none
ENVIRONMENTS = ["FrozenLake-v1", "Taxi-v3", "Blackjack-v1", "CartPole-v0", "CartPole-v9", "CartPole", "CliffWalking-v1"]
ENVIRONMENTS += ["GymV21Environment-v0", "GymV26Environment-v0", "phys2d/CartPole-v1", "tabular/Blackjack-v0", "ALE/Pong-v5"]
ENVIRONMENTS += ["LunarLander-v3", "HalfCheetah-v2", "HalfCheetah-v5", "PongNoFrameskip-v4", "environments:Spaces-v0"]
ENVIRONMENTS += ["exiting:CartPole-v1", "environments:Fragile-v0", "os:CartPole-v1", "no_such:CartPole-v1", "environments:"]
TEXTS = [
    "",
    " ",
    "-",
    "--",
    "x",
    "nan",
    "ünï€",
    "日本",
    "\udcff",
    "a\nb",
    "\x1b[31m",
    "x" * 1000,
    "None",
    "null",
    "True",
    "[]",
    "{}",
]
TEXTS += ["%s", "{0}", "../..", "'", '"', "/", ":", "a:b:c", ":x", "x:", "--num-envs", "-1"]
NO_WHOLE_NUMBERS = ["one", "1.5", "1e3", "0x10", "nan", "inf", "1,5", "1 2", "²", "½", str(2**63), str(-(2**63)), "9" * 5000]
NO_NUMBERS = ["one", "0x10", "1,5", "--", "1e", "²", "nan", "-inf"]
BOUNDARY_NUMBERS = ["0", "-0.0", "1", "-1", "0.5", "1e-300", "1e39", "1e308", "1e400", "inf", "-1e308", "1_0", "\u0661"]
BOUNDARY_COUNTS = ["0", "1", "-1", str(2**62), str(2**63 - 1)]
DIRECTORIES = [
    "",
    ".",
    "/",
    "nowhere",
    "empty",
    "file",
    "file/below",
    "/dev/null",
    "/proc",
    "/proc/self",
    "x" * 300,
    "\udcff",
    "...",
]
DIRECTORIES += ["loop", "a\nb", "~", "half"]
PAIRS = [
    "g=9.81",
    "g=nan",
    "g=1e999",
    "g={}",
    "g=[1,2",
    "g=" + "[" * 3000,
    "g=" + "9" * 5000,
    "g=",
    "g==",
    "=1",
    "g",
    "",
    " ",
    "-=1",
]
PAIRS += [
    "ключ=1",
    "a b=1",
    "num_envs=3",
    "max_episode_steps=5",
    "max_episode_steps=-1",
    "max_episode_steps=x",
    "render_mode=human",
]
PAIRS += [
    "render_mode=rgb_array",
    "vectorization_mode=sync",
    "id=x",
    "self=1",
    "env=1",
    "mode=SameStep",
    "mode=7",
    "action=box",
]
PAIRS += ["observation=bool", "sutton_barto_reward=true", "sutton_barto_reward=[]", "disable_env_checker=true", "kwargs={}"]
PAIRS += ["where=step", "where=nan", "where=reset", "which=action", "gravity=9.8", "frameskip=2"]
NEAR_FLAGS = [
    "--num-env",
    "--numenvs",
    "--num_envs",
    "--NUM-ENVS",
    "---num-envs",
    "-num-envs",
    "--no-num-envs",
    "--no-no-norm-obs",
]
NEAR_FLAGS += ["--lr", "-n", "-", "--", "--=", "=", "--frobnicate", "--ünï", "--env", "x", "", "--resume-from", "--env-kwarg"]


def value_of(name, rng):
    """One value for a setting, as text: legal, at a bound, or nonsense for its type."""
    kind = next((part for part in get_args(KINDS[name]) if part is not type(None)), KINDS[name])
    if name in ("run_dir", "resume"):
        return rng.choice([*CHEAP[name], rng.choice(DIRECTORIES)])
    if rng.random() < 0.2:
        return rng.choice(TEXTS)
    if name == "env_id":
        return rng.choice([*CHEAP[name], *rng.sample(ENVIRONMENTS, 3)])
    if get_origin(KINDS[name]) is Literal:
        choices = list(CHEAP.get(name, get_args(KINDS[name])))
        return rng.choice([*choices, *choices, rng.choice(choices)[:-1], choices[0].upper()])
    if name in CHEAP:
        refused = ["0", "-1", *NO_WHOLE_NUMBERS] if int in (kind, *get_args(KINDS[name])) or name == "hidden_sizes" else []
        refused = refused or {"device": ["cuda:99", "cuda:²", "cuda:", "tpu"]}.get(name, ["1e-9", "-1", *NO_NUMBERS])
        return rng.choice([*CHEAP[name], *CHEAP[name], rng.choice(refused)])
    if kind is float:
        return rng.choice([str(getattr(TrainConfig(), name) or 0.1), *rng.sample(BOUNDARY_NUMBERS, 2), rng.choice(NO_NUMBERS)])
    if kind is int:
        return rng.choice([*BOUNDARY_COUNTS, *BOUNDARY_COUNTS, rng.choice(NO_WHOLE_NUMBERS)])
    return rng.choice(TEXTS)


def words_of(name, rng):
    """A setting's flag with a value, in one of the ways that people write that."""
    if KINDS[name] is bool:
        word = flag(name) if rng.random() < 0.5 else flag(name).replace("--", "--no-")
        return [word] if rng.random() < 0.85 else [word, rng.choice(["True", "1", ""])] if rng.random() < 0.5 else [word + "=1"]
    if name == "env_kwargs":
        return [flag(name), *rng.choices(PAIRS, k=rng.choice([0, 1, 1, 1, 2]))]
    if rng.random() < 0.03:
        return [flag(name)]  # its value is missing
    values = [value_of(name, rng)]
    if name == "hidden_sizes" and values[0] in CHEAP[name]:
        values = values[0].split()
    if len(values) == 1 and rng.random() < 0.15:
        return [f"{flag(name)}={values[0]}"]
    return [flag(name) if rng.random() < 0.9 else flag(name).replace("-", "_").replace("__", "--", 1), *values]


def command_line(rng):
    """Random flags, and after them those of `TINY` that they leave open."""
    names = rng.sample([name for name in KINDS if name != "resume"], rng.choice([0, 1, 1, 2, 2, 3, 5]))
    if rng.random() < 0.15:
        names.append("resume")
    if names and rng.random() < 0.1:
        names.append(rng.choice(names))  # given twice
    parts = [words_of(name, rng) for name in names]
    if rng.random() < 0.1:
        parts.insert(rng.randrange(len(parts) + 1), [rng.choice(NEAR_FLAGS)])
    rivals = {"total_timesteps": "num_iterations", "minibatch_size": "num_minibatches"}
    given = {*names, *(rivals.get(name) for name in names)}
    if "preset" in names:
        given.discard("preset")
    tiny = [word for name, value in TINY.items() if name not in given for word in (flag(name), value)]
    return [*(word for part in parts for word in part), *tiny, *([] if "plain" in names else ["--plain"])]


# --- what has to hold


@pytest.fixture(autouse=True, scope="module")
def _patched(tmp_path_factory):
    """A module to import."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "dont_write_bytecode", True)
        modules = tmp_path_factory.mktemp("modules")
        (modules / "exiting.py").write_text("raise SystemExit(0)\n")  # as a script does
        patched.syspath_prepend(str(modules))
        yield


@pytest.fixture(scope="module")
def stocked(tmp_path_factory):
    """A working directory with what --run-dir and --resume may find there."""
    directory = tmp_path_factory.mktemp("fuzz") / "stocked"
    directory.mkdir()
    assert console([*words_for(TINY), "--run-dir", str(directory / "finished")]) == 0
    (directory / "empty").mkdir()
    (directory / "file").write_text("mine")
    (directory / "loop").symlink_to("loop")
    shutil.copytree(directory / "finished", directory / "half")
    (directory / "half" / "config.json").unlink()
    return directory


def words_for(settings):
    return [word for name, value in settings.items() for word in (flag(name), value)]


def contents(directory):
    """Every file, link and directory below."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else b"" for path in sorted(directory.rglob("*"))
    }


class Terminal(io.TextIOWrapper):
    """A stream as a process has it: text that UTF-8 cannot hold is an error on stdout, and spelled out on stderr."""

    def __init__(self, errors):
        super().__init__(io.BytesIO(), encoding="utf-8", errors=errors, write_through=True)

    @property
    def text(self):
        return self.buffer.getvalue().decode()


def run(words, place):
    """Exit code, or the exception that came out; stdout and stderr."""
    out, err = Terminal("strict"), Terminal("backslashreplace")
    with contextlib.chdir(place), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = console(words)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            code = error
    return code, out.text, err.text


def faults_of(words, code, out, err, before, after):
    """What of the promises was not kept, a line each."""
    found = []
    if "Traceback" in out + err:
        found.append("a traceback")
    new = {name for name in after if after[name] != before.get(name)}
    lines = err.splitlines()
    if code == 0:
        complete = {"config.json", "metrics.csv", "summary.json", "last.pt", "best.pt"}
        if not any(complete <= names_below(name, after) for name in directories(new)):
            found.append(f"no complete run: {sorted(new)}")
    elif code in (2, 3):
        start, named = {2: ("error: ", FLAGS | given_flags(words)), 3: ("fault: ", {"--resume"})}[code]
        if not (1 <= len(lines) <= 2 and lines[0].startswith(start)):
            found.append(f"stderr has {len(lines)} lines")
        if any(len(line) > 400 for line in lines):
            found.append(f"a line of {max(map(len, lines))} letters")
        if not any(name in err for name in named):
            found.append("no flag is named")
        if code == 2 and (new or before.keys() != after.keys()):
            found.append(f"something was written: {sorted(new)}")
    else:
        found.append(f"exit code {code!r}")
    return found


def given_flags(words):
    """What may be no flag of ours, as it was given."""
    return {"''"} | {word.partition("=")[0] or word for word in words if word.strip()}


def directories(names):
    return {str(Path(name).parent) for name in names if name.endswith(("config.json", "summary.json"))}


def names_below(directory, names):
    return {Path(name).name for name in names if Path(name).is_relative_to(directory)}


def fuzz(rng, count, stocked, tmp_path):
    """Try `count` command lines; (how many ended with each exit code, what went wrong)."""
    codes, failures = Counter(), []
    for number in range(count):
        words = command_line(rng)
        place = tmp_path / str(number)
        shutil.copytree(stocked, place, symlinks=True)
        before = contents(place)
        code, out, err = run(words, place)
        codes[code if isinstance(code, int) else type(code).__name__] += 1
        found = faults_of(words, code, out, err, before, contents(place))
        if found:
            failures.append(f"{number}: {shlex.join(words)[:600]}\n    {'; '.join(found)}\n    {err[-600:]!r}")
        shutil.rmtree(place)
    return codes, failures


@pytest.mark.long
def test_any_command_line(stocked, tmp_path):
    codes, failures = fuzz(random.Random(1), 60, stocked, tmp_path)
    assert not failures, "\n".join(failures)
    assert min(codes[0], codes[2]) >= 10, codes


@pytest.mark.slow
def test_any_command_line_at_random(stocked, tmp_path, capsys):
    seed = int(os.environ.get("FUZZ_SEED", random.SystemRandom().randrange(2**31)))
    codes, failures = fuzz(random.Random(seed), 2000, stocked, tmp_path)
    with capsys.disabled():
        print(f"\n2000 command lines, FUZZ_SEED={seed}; exit codes: {dict(codes)}")
    assert not failures, f"FUZZ_SEED={seed}\n" + "\n".join(failures)
    assert min(codes[0], codes[2]) >= 100, codes
