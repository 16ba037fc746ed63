"""The C++ functions of the fused programs: built once, kept in the cache, and every failure one line that ends nothing."""

import os
import re
import shutil
import time
from pathlib import Path

import pytest

from fastppo.compile import library_cache
from fastppo.compile.compile_errors import CompileError
from fastppo.fused import kernels, operators, sources
from fastppo.fused.kernels import Kernels
from support.kernels import shared_library
from support.processes import is_running

TO_OUTPUT = 'while [ "$1" != -o ]; do shift; done\n'  # of the shell: the library's path is $2 then
ABOUT = {"program": "", "torch": ""}


@pytest.fixture
def cache(library, tmp_path, monkeypatch):
    """The empty cache of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "fastppo"


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A function that makes these lines of a shell the C++ compiler. It notes the number of its process when it compiles."""

    def use(lines):
        script = tmp_path / "c++"
        script.write_text(f"#!/bin/sh\n[ $# = 1 ] && exit\necho $$ >> {tmp_path / 'started'}\n{lines}\n")  # 1: --version
        script.chmod(0o755)
        monkeypatch.setenv("CXX", str(script))

    return use


def starts(tmp_path):
    """The numbers of the processes that the compiler was."""
    path = tmp_path / "started"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


@pytest.fixture
def library(needs_compiler, programs_dir, tmp_path):
    """A file with the functions that all tests share, outside the cache."""
    return Path(shutil.copy(shared_library(programs_dir), tmp_path / "good.so"))


def put(cache, content):
    """A library of these bytes in the cache, as a build by the present compiler leaves it."""
    library_cache.check_cache_dir(cache)
    (cache / "new").write_bytes(content)
    library_cache.keep(cache / "new", cache, kernels.key(), ABOUT)
    (path,) = cache.glob("*.so")
    return path


def test_a_library_in_the_cache_is_loaded_at_once(library, compiler, cache, tmp_path):
    """No compiler is started, and the time of the last use is noted."""
    compiler("exit 1")
    kept = put(cache, library.read_bytes())
    os.utime(kept, (0, 0))
    assert Kernels().ready()
    assert starts(tmp_path) == []
    assert time.time() - kept.stat().st_mtime < 600


def test_a_library_that_was_built_is_kept_for_the_next_run(library, compiler, tmp_path, cache):
    """In the background: the constructor returns while the compiler works, `ready` says when it is over; nothing is left."""
    compiler(f'{TO_OUTPUT}while [ ! -e {tmp_path / "go"} ]; do sleep 0.05; done\ncp {library} "$2"')
    built = Kernels()
    assert not built.ready()
    (tmp_path / "go").touch()
    assert built.ready(wait=True)
    assert built.ready()
    assert {path.suffix for path in cache.iterdir()} == {".so", ".json"}
    (entry,) = library_cache.entries(cache)
    assert entry.program == "learn and act of multi-layer perceptrons, of any size"
    assert Kernels().ready()
    assert len(starts(tmp_path)) == 1


def test_a_broken_library_is_removed_and_built_anew_next_time(library, compiler, tmp_path, cache):
    """It has the right digest and does not load: one line in this run, no compiler, and the next run builds it."""
    compiler(f'{TO_OUTPUT}cp {library} "$2"')
    put(cache, b"no library")
    before = operators._Library.functions
    broken = Kernels()
    for _ in range(2):
        with pytest.raises(CompileError, match=r"^the fused programs do not load: [^\n]+$"):
            broken.ready()
    assert operators._Library.functions is before
    assert (list(cache.iterdir()), starts(tmp_path)) == ([], [])
    assert Kernels().ready(wait=True)


def test_a_damaged_library_is_built_anew_at_once(library, compiler, cache):
    """Its digest is wrong, so it is never loaded."""
    compiler(f'{TO_OUTPUT}cp {library} "$2"')
    damaged = put(cache, library.read_bytes())
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert Kernels().ready(wait=True)
    assert damaged.read_bytes() == library.read_bytes()


def test_a_library_of_other_sources_does_not_load(library, monkeypatch):
    """Its structures may have other sizes: reading them would read other memory."""
    before = operators._Library.functions
    assert not operators.load(library, "the digest of other files")
    assert operators._Library.functions is before
    assert operators.load(library, sources.digest())


def test_the_packages_library_comes_first(library, compiler, cache, tmp_path, monkeypatch):
    """Where installation has built one for this processor, nothing is compiled and nothing is cached. An older one is left."""
    compiler("exit 1")
    monkeypatch.setattr(kernels, "packaged", lambda: library)
    assert Kernels().ready()
    assert (starts(tmp_path), cache.exists()) == ([], False)
    monkeypatch.setattr(sources, "digest", lambda: "that of changed files")
    with pytest.raises(CompileError):
        Kernels().ready(wait=True)
    assert len(starts(tmp_path)) == 1


def test_closing_stops_the_compiler(compiler, tmp_path, cache):
    """And what it had started. No file is left; afterwards `ready` is an error, and closing again does nothing."""
    compiler("sleep 600 &\nwait")
    building = Kernels()
    deadline = time.monotonic() + 60
    while not starts(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    (pid,) = starts(tmp_path)
    assert not building.ready()
    building.close()
    assert not is_running(pid)
    assert list(cache.iterdir()) == []
    building.close()
    with pytest.raises(CompileError, match=r"^the compiler was stopped$"):
        building.ready(wait=True)


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("exit 1", r"^fused\.cpp does not compile: "),
        (
            'echo "fused.cpp: In function x" >&2\necho "vector.h:7: error: no registers" >&2\nexit 1',
            r"^fused\.cpp does not compile: vector\.h:7: error: no registers$",
        ),
        (f'{TO_OUTPUT}echo no library > "$2"', "the fused programs do not load: "),
        ("exit 0", "No such file"),  # and no library
    ],
    ids=["silent", "talkative", "no library", "nothing"],
)
def test_a_compiler_that_fails_is_one_line(lines, told, compiler, cache):
    """Each time it is asked; it leaves nothing in the cache."""
    compiler(lines)
    failing = Kernels()
    for _ in range(2):
        with pytest.raises(CompileError, match=told) as caught:
            failing.ready(wait=True)
        assert "\n" not in str(caught.value)
    if "does not load" not in told:
        assert "fused" in str(caught.value)
    failing.close()
    assert {path.suffix for path in cache.iterdir()} == ({".refused"} if "do not load" in told else set())


def test_a_library_that_never_loads_is_built_once(compiler, cache, tmp_path):
    """The reason is kept, so that the next run says it without a compiler; another compiler is another key."""
    compiler(f'{TO_OUTPUT}echo no library > "$2"')
    reasons = []
    for _ in range(2):
        with pytest.raises(CompileError, match="do not load") as caught:
            Kernels().ready(wait=True)
        reasons.append(str(caught.value))
    assert reasons[0] == reasons[1]
    assert len(starts(tmp_path)) == 1


def test_a_process_that_does_not_build_waits_for_one_that_does(library, compiler, cache, tmp_path):
    """It looks into the cache again each time it is asked, and starts nothing."""
    compiler("exit 1")
    waiting = Kernels(builds=False)
    assert not waiting.ready()
    put(cache, library.read_bytes())
    assert waiting.ready(wait=True)
    assert starts(tmp_path) == []


@pytest.mark.parametrize("compiler_is", ["missing", "no program"])
def test_a_compiler_that_does_not_start(compiler_is, cache, tmp_path, monkeypatch):
    """One line too, and no error before it is asked for."""
    script = tmp_path / "c++"
    if compiler_is == "no program":
        script.write_text("no program")
        script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    failing = Kernels()
    with pytest.raises(CompileError, match=r"Exec format error|there is no C\+\+ compiler"):
        failing.ready()
    assert list(cache.iterdir()) == []


def test_a_cache_that_others_can_write_to(cache):
    """A library would be loaded from it: refused, and nothing is built there."""
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    with pytest.raises(CompileError, match="0700"):
        Kernels().ready(wait=True)
    assert list(cache.iterdir()) == []


def test_every_file_is_in_the_key(tmp_path, monkeypatch):
    """A change of any source or of the build command is another library; an unknown header cannot be missed."""
    files = [*sources.files(), Path(sources.__file__)]
    included = {name for path in files for name in re.findall(r'#include "(.*)"', path.read_text())}
    assert included <= {path.name for path in files}
    for path in files:
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(sources, "FOLDER", tmp_path)
    monkeypatch.setattr(sources, "MAIN", tmp_path / "fused.cpp")
    monkeypatch.setattr(sources, "__file__", str(tmp_path / "sources.py"))
    keys, digests = {kernels.key()}, {sources.digest()}
    assert len(keys | {kernels.key()}) == 1
    for path in files:
        with (tmp_path / path.name).open("a") as file:
            file.write("\n")
        keys.add(kernels.key())
        digests.add(sources.digest())
    assert len(keys) == len(files) + 1
    assert len(digests) == len(files)  # sources.py is no part of what is compiled
    monkeypatch.setenv("CXX", "another-compiler")
    assert kernels.key() not in keys
