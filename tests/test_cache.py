"""The cache of compiled programs: bounded, listed, cleared, and never a reason not to train. No compiler is needed here."""

import os
import shutil
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from fastppo.__main__ import console
from fastppo.compile import compiled_program, inductor, library_cache, native
from fastppo.compile.background import BackgroundCompile
from fastppo.compile.compile_errors import CompileError, LoadError
from fastppo.compile.compiled_program import load_program
from fastppo.compile.inductor import compile_program
from fastppo.compile.key import cache_key, native_key
from support.programs import CATEGORICAL_POLICY, job

DAY = 86_400.0
NOW = 2_000_000_000.0
ABOUT = {"program": "learn of SomePolicy, 9 parameters", "torch": "2.0"}


def put(cache_dir, key, size=10, days=0.0, now=NOW):
    """A library of `size` bytes that was used so many days ago."""
    new = cache_dir / "new"
    new.write_bytes(key.encode().ljust(size, b"."))
    library_cache.keep(new, cache_dir, key, ABOUT)
    library = library_cache.find(cache_dir, key)
    os.utime(library, (now - days * DAY,) * 2)
    return library


def kept(cache_dir):
    """The keys in the cache, the one used last first."""
    return [entry.path.name.split("-")[0] for entry in library_cache.entries(cache_dir)]


# --- bounds


def test_what_is_kept_is_found_with_what_it_is(tmp_path):
    """Under its key alone, and with its description."""
    library = put(tmp_path, "one", days=3)
    assert library_cache.find(tmp_path, "one") == library
    assert library_cache.find(tmp_path, "on") is None
    (entry,) = library_cache.entries(tmp_path)
    assert (entry.path, entry.num_bytes, entry.used) == (library, 10, NOW - 3 * DAY)
    assert (entry.program, entry.torch) == (ABOUT["program"], ABOUT["torch"])
    assert entry.built == pytest.approx(time.time(), abs=600)


def test_the_least_recently_used_go_first(tmp_path):
    """Until the rest fits; the one used last stays even where it is too large alone."""
    for age, key in enumerate("abcde"):
        put(tmp_path, key, days=age)
    removed = library_cache.trim(tmp_path, max_bytes=30, max_unused=100 * DAY, now=NOW)
    assert [entry.path.name[0] for entry in removed] == ["d", "e"]
    assert kept(tmp_path) == ["a", "b", "c"]
    assert len(list(tmp_path.iterdir())) == 6  # their descriptions have gone too
    library_cache.touch(next(tmp_path.glob("c-*.so")))
    library_cache.trim(tmp_path, max_bytes=5, now=NOW)
    assert kept(tmp_path) in (["a"], ["c"])


def test_what_nobody_uses_goes(tmp_path):
    """After so long, however much room there is."""
    for age, key in ((0, "new"), (80, "old"), (91, "older")):
        put(tmp_path, key, days=age)
    library_cache.trim(tmp_path, now=NOW)
    assert kept(tmp_path) == ["new", "old"]


def test_the_cache_does_not_grow_for_ever(tmp_path, monkeypatch):
    """Every build makes room; what a load has used is used last."""
    monkeypatch.setattr(library_cache, "trim", partial(library_cache.trim, max_bytes=30))
    for key in ("a", "b", "c"):
        put(tmp_path, key, now=time.time() - 1000, days=1)
    library_cache.touch(library_cache.find(tmp_path, "a"))
    put(tmp_path, "d", now=time.time())
    assert {"a", "d"} < set(kept(tmp_path))
    assert len(kept(tmp_path)) == 3


def test_what_a_killed_build_leaves_is_removed(tmp_path):
    """Once it is old; a build under way stays, and so does what is not ours. Nothing half-written is ever found."""
    old, fresh = tmp_path / "build-1", tmp_path / "build-2"
    for path in (old, fresh):
        path.mkdir()
        (path / "one-1234.so").write_bytes(b"half")
    os.utime(old, (NOW - DAY,) * 2)
    os.utime(fresh, (NOW,) * 2)
    (tmp_path / f"one-{'0' * 64}.json").write_text("{}")  # of a library that has gone
    (tmp_path / "notes.json").write_text("{}")
    (tmp_path / "mine.so").write_bytes(b"")
    assert library_cache.find(tmp_path, "one") is None
    assert library_cache.entries(tmp_path) == []
    library_cache.trim(tmp_path, now=NOW)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build-2", "mine.so", "notes.json"]


@pytest.mark.parametrize("damage", [b"", b"cut", None], ids=["empty", "cut", "one byte"])
def test_a_damaged_library_is_not_found(tmp_path, damage):
    """It is removed, with its description, so that it is built again."""
    library = put(tmp_path, "one", size=100)
    content = library.read_bytes()
    library.write_bytes(content[:50] + b"!" + content[51:] if damage is None else damage)
    assert library_cache.find(tmp_path, "one") is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"program": 1}', "\xff"])
def test_a_lost_description_costs_nothing(tmp_path, text):
    """The library is still found, and listed without it."""
    library = put(tmp_path, "one")
    library.with_suffix(".json").write_text(text, encoding="latin-1")
    assert library_cache.find(tmp_path, "one") == library
    (entry,) = library_cache.entries(tmp_path)
    assert (entry.built, entry.program, entry.torch) == (None, "", "")


def test_another_process_may_remove_what_is_read(tmp_path, monkeypatch):
    """Between listing and reading: as if it had not been there."""
    put(tmp_path, "one")

    def vanish(path):
        shutil.rmtree(tmp_path)
        raise FileNotFoundError

    monkeypatch.setattr(library_cache, "_digest", vanish)
    assert library_cache.find(tmp_path, "one") is None
    assert library_cache.entries(tmp_path) == []
    assert library_cache.trim(tmp_path) == []


# --- libraries that do not load


def foreign_library():
    """A library of this machine that loads, and has none of the functions that a program needs."""
    return Path(torch._C.__file__).read_bytes()


def wrong_machine():
    content = bytearray(foreign_library())
    content[18] ^= 0x55  # e_machine of the ELF header
    return bytes(content)


KINDS = {"text": lambda: b"no library", "empty": lambda: b"", "missing function": foreign_library, "machine": wrong_machine}


class Shop:
    """Stands in for the compilers: builds of the program and of its helpers, counted."""

    def __init__(self, monkeypatch, cache_dir):
        self.built, self.cache_dir = [], cache_dir
        self.content = b"good"
        self.program, self.example = job(CATEGORICAL_POLICY)
        self.keys = {"program": cache_key(self.program, self.example), "helpers": native_key()}
        self.check = True
        monkeypatch.setattr(inductor, "_build", self.build)
        monkeypatch.setattr(native, "build", lambda path: self.make(path, "helpers"))
        monkeypatch.setattr(native, "has_compiler", lambda: True)
        native_load, program_load = native.load.__wrapped__, compiled_program.CompiledProgram
        monkeypatch.setattr(native, "load", lambda path: path.read_bytes() == b"good" or native_load(path))
        monkeypatch.setattr(
            compiled_program, "CompiledProgram", lambda path, *args: path.read_bytes() == b"good" or program_load(path, *args)
        )

    def make(self, path, name):
        path.write_bytes(self.content)
        self.built.append(name)
        return path

    def build(self, program, example, build_dir, seeds):
        return self.make(Path(build_dir, "program.so"), "program")

    def put(self, name, content):
        (self.cache_dir / "new").write_bytes(content)
        library_cache.keep(self.cache_dir / "new", self.cache_dir, self.keys[name], ABOUT)

    def load(self, how):
        return how(self.program, self.example, self.cache_dir)


@pytest.fixture
def shop(monkeypatch, tmp_path):
    """A cache, and compilers that take no time."""
    tmp_path.chmod(0o700)
    return Shop(monkeypatch, tmp_path)


@pytest.mark.parametrize("which", ["program", "helpers"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_load_is_built_again_once(shop, which, kind):
    """A library of another machine, or without a function, is replaced, and the next run loads what replaced it."""
    for name in ("program", "helpers"):
        shop.put(name, KINDS[kind]() if name == which else b"good")
    assert shop.load(compile_program) is True
    assert shop.built == ["program"] if which == "program" else {"helpers"} <= set(shop.built)
    built = list(shop.built)
    assert shop.load(compile_program) is True
    assert shop.load(load_program) is True
    assert shop.built == built


@pytest.mark.parametrize("which", ["program", "helpers"])
def test_auto_takes_what_does_not_load_for_missing(shop, which):
    """load_program finds nothing, and leaves the place free for a build in the background."""
    for name in ("program", "helpers"):
        shop.put(name, b"no library" if name == which else b"good")
    assert shop.load(load_program) is None
    assert library_cache.find(shop.cache_dir, shop.keys[which]) is None


def test_what_never_loads_is_one_line_and_no_loop(shop, monkeypatch):
    """A directory that libraries cannot be loaded from: one build, one line, and no build in the background in later runs."""
    shop.content = b"no library"
    shop.put("helpers", b"good")
    with pytest.raises(LoadError, match=r"^the compiled program does not load: [^\n]+$"):
        shop.load(compile_program)
    assert shop.built == ["program"]
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(CompileError, match="does not load"):
        BackgroundCompile(shop.program, shop.example, shop.cache_dir)
    shop.content = b"good"
    assert shop.load(compile_program) is True  # --compile on tries again, and then there is nothing to remember
    assert not list(shop.cache_dir.glob("*.refused"))


# --- fastppo cache


@pytest.fixture
def cache_dir(tmp_path, monkeypatch):
    """The user's cache, with two libraries."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tmp_path / "fastppo"
    path.mkdir(mode=0o700)
    put(path, "new", size=3 * 2**20, now=time.time())
    put(path, "old", size=2**19, days=40, now=time.time())
    return path


def test_the_list_is_a_table(cache_dir, capsys):
    """A line a library: what it is, its size, when it was built and used last, of which torch; then how much there is."""
    assert console(["cache", "list"]) == 0
    head, new, old, total = capsys.readouterr().out.splitlines()
    assert head.split() == ["program", "MiB", "age", "last", "used", "torch"]
    assert new.split("  ")[0] == ABOUT["program"]
    assert [line.split("  ")[0] for line in (new, old)] == [ABOUT["program"]] * 2
    assert new.split()[-7:] == ["3.0", "0", "days", "0", "days", "ago", "2.0"]
    assert old.split()[-7:] == ["0.5", "0", "days", "40", "days", "ago", "2.0"]
    assert total == f"2 libraries, 3.5 MiB, in {cache_dir}"


def test_clearing(cache_dir, capsys):
    """All, or what was not used for some days; what was removed is said, and an empty cache is no error."""
    assert console(["cache", "clear", "--older-than", "30"]) == 0
    assert capsys.readouterr().out == f"1 library, 0.5 MiB, removed from {cache_dir}\n"
    assert kept(cache_dir) == ["new"]
    assert console(["cache", "clear"]) == 0
    assert capsys.readouterr().out == f"1 library, 3.0 MiB, removed from {cache_dir}\n"
    assert not list(cache_dir.iterdir())
    assert console(["cache", "clear"]) == 0
    assert console(["cache", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"0 libraries, 0.0 MiB, in {cache_dir}"


def test_a_cache_that_is_not_there_is_not_made(tmp_path, monkeypatch, capsys):
    """Before the first compiled run."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for action in ("list", "clear"):
        assert console(["cache", action]) == 0
    assert "0 libraries" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["clear", "--older-than", "-1"], "--older-than -1"),
        (["clear", "--older-than", "nan"], "--older-than nan"),
        (["list", "--older-than", "3"], "--older-than 3"),
        (["claer"], "claer"),
    ],
)
def test_wrong_use(cache_dir, capsys, args, named):
    """Exit code 2, the flag is named, and nothing is removed."""
    assert console(["cache", *args]) == 2
    assert named in capsys.readouterr().err
    assert kept(cache_dir) == ["new", "old"]
