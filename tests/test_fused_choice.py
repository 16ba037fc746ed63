"""When a run uses fused programs: once their kernels are there, if all ranks have them, and if they compute what eager does."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from fastppo.compile import native
from fastppo.compile.selector import TRIAL_ITERATIONS
from fastppo.compile.verification import TOLERANCE
from fastppo.config import TrainConfig
from fastppo.training import loop
from support.stand_ins import LONG, PARAMS, Compiler, Kernels, in_use, tiers_of


@pytest.fixture
def compiler(monkeypatch):
    """A stand-in for Inductor; the number of threads is put back afterwards."""
    threads = torch.get_num_threads()
    yield Compiler(monkeypatch)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_kernels_that_are_there_are_used_at_once(compiler, mode):
    """Before what Inductor has in the cache, without a build, with one line; torch's threads stay as they are."""
    compiler.cached |= {"learn", "act"}
    tiers, notes = tiers_of(mode, kernels=Kernels(there=True))
    assert in_use(tiers) == ("fused", "fused")
    assert tiers.act("now")("obs", "noise") == ("fused", "act", (PARAMS, "now", "obs", "noise"))
    assert (tiers.name, tiers.may_change, torch.get_num_threads()) == ("fused", False, 1)
    for _ in range(2):
        tiers.update(TRIAL_ITERATIONS, LONG)
    assert (compiler.started, compiler.compiled) == ([], [])
    assert len(notes) == 1
    assert notes[0].startswith("programs: fused, ready after")


def test_auto_takes_fused_programs_up_between_iterations(compiler):
    """It starts eagerly and never waits; however short the run, it changes at the first `update` after the build."""
    kernels = Kernels()
    tiers, notes = tiers_of("auto", kernels=kernels)
    for iteration in range(1, TRIAL_ITERATIONS + 3):
        tiers.update(iteration, LONG)
        assert in_use(tiers) == ("eager", "eager")
    assert tiers.may_change
    assert notes == ["programs: eager for some seconds, while the C++ compiler builds the fused ones, once for this machine"]
    kernels.there = True
    tiers.update(TRIAL_ITERATIONS + 3, 0.1)
    assert in_use(tiers) == ("fused", "fused")
    assert not tiers.may_change
    assert notes[1:] == ["programs: fused now, after 0 s"]
    tiers.update(TRIAL_ITERATIONS + 4, LONG)
    assert (compiler.started, compiler.compiled, set(kernels.asked)) == ([], [], {False})
    assert len(notes) == 2


def test_on_waits_for_the_kernels(compiler):
    """All iterations are fused."""
    kernels = Kernels()
    tiers, notes = tiers_of("on", kernels=kernels)
    assert (in_use(tiers), kernels.asked, len(notes)) == (("fused", "fused"), [True], 1)


def test_inductor_does_the_rest(compiler):
    """Environments on the device: `learn` is fused, `collect` is compiled, by "on" at once and by "auto" where it pays."""
    tiers, _ = tiers_of("on", "collect", kernels=Kernels())
    assert (in_use(tiers), compiler.compiled) == (("fused", "compiled"), ["collect"])
    assert tiers.name == "fused + compiled"
    tiers, notes = tiers_of("auto", "collect", kernels=Kernels(there=True))
    assert notes == ["programs: fused + eager; the cache has no compiled collect yet"]
    assert tiers.may_change
    compiler.ready |= {"collect"}
    for _ in range(2):
        tiers.update(TRIAL_ITERATIONS, LONG)
    assert (in_use(tiers), compiler.started) == (("fused", "compiled"), ["collect"])
    assert tiers.tiers == {"learn": "fused", "collect": "compiled"}


def test_a_short_run_does_not_compile_the_rest(compiler):
    """What is fused stays fused, and the line says what stays eager."""
    tiers, notes = tiers_of("auto", "collect", kernels=Kernels(there=True))
    tiers.update(TRIAL_ITERATIONS, 1.0)
    assert (in_use(tiers), compiler.started) == (("fused", "eager"), [])
    assert notes[1].startswith("programs: fused + eager until the end, 1 s left")


def test_on_without_kernels_compiles(compiler):
    """They cannot be built: one line with the reason, and Inductor builds both programs, once."""
    tiers, notes = tiers_of("on", kernels=Kernels(error="no registers left"))
    assert (in_use(tiers), compiler.compiled, compiler.started) == (("compiled", "compiled"), ["learn"], ["act"])
    for _ in range(2):
        tiers.update(TRIAL_ITERATIONS, LONG)
    assert (compiler.started, tiers.may_change) == (["act"], False)
    assert notes[1] == "programs: no fused ones: no registers left"
    assert notes[2].startswith("programs: compiled, ready after")
    assert len(notes) == 3  # the first: what is being compiled


@pytest.mark.parametrize("cached", [set(), {"learn", "act"}], ids=["empty cache", "cached"])
def test_auto_without_kernels_compiles_where_it_pays(compiler, cached):
    """The build of the kernels ends badly during the run: what Inductor has in the cache is used, else it compiles.

    Two cores build two programs at once.
    """
    kernels = Kernels()
    tiers, notes = tiers_of("auto", kernels=kernels)
    compiler.cached |= cached
    kernels.error = "no registers left"
    tiers.update(1, LONG)
    assert notes[1:] == ["programs: no fused ones: no registers left"]
    assert in_use(tiers) == (("compiled", "compiled") if cached else ("eager", "eager"))
    for _ in range(2):
        tiers.update(TRIAL_ITERATIONS, LONG)
    assert compiler.started == ([] if cached else ["learn", "act"])
    assert kernels.asked == [False, False]  # not once more after the failure


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_without_a_compiler_it_is_eager(compiler, mode):
    """One line, however many programs it would have built."""
    compiler.there = False
    tiers, notes = tiers_of(mode, kernels=Kernels(error=native.NO_COMPILER))
    for _ in range(2):
        tiers.update(TRIAL_ITERATIONS, LONG)
    assert (in_use(tiers), tiers.may_change, compiler.started) == (("eager", "eager"), False, [])
    (line,) = [note for note in notes if note.startswith("programs: ")]
    assert line.endswith(native.NO_COMPILER)


@pytest.mark.parametrize("deviation", [1.01 * TOLERANCE, float("inf"), float("nan")])
def test_a_fused_program_that_differs_is_dropped(compiler, deviation):
    """At its first call: that call's result is the eager one, a line says so once, and it stays eager to the end."""
    tiers, notes = tiers_of("auto", kernels=Kernels(there=True), deviation=deviation)
    learn = tiers.learn
    assert learn("x") == ("eager", "learn", ("x",))
    assert (tiers.tiers, tiers.name) == ({"learn": "eager", "act": "fused"}, "fused + eager")
    assert len(notes) == 2
    assert notes[1] == f"programs: learn stays eager: the fused one differs from it by {deviation:.2g}; please report this"
    assert learn("x")[0] == tiers.learn("x")[0] == "eager"
    act = tiers.act("normalization")
    assert act("obs", "noise")[0] == act("obs", "noise")[0] == "eager"
    assert (tiers.name, len(notes)) == ("eager", 3)
    for _ in range(2):
        tiers.update(TRIAL_ITERATIONS, LONG)
    assert (in_use(tiers), compiler.started) == (("eager", "eager"), [])
    torch.testing.assert_close(tiers.deviations, {"learn": deviation, "act": deviation}, equal_nan=True)


def test_a_program_is_compared_once_in_a_run(compiler):
    """Rounding is no deviation, and what is eager is not computed again in later iterations."""
    calls = []
    tiers, notes = tiers_of("auto", kernels=Kernels(there=True), deviation=TOLERANCE, eager_calls=calls)
    assert tiers.deviations == {}
    for _ in range(3):
        assert in_use(tiers) == ("fused", "fused")
    assert calls == ["learn", "act"]
    assert tiers.deviations == {"learn": TOLERANCE, "act": TOLERANCE}
    assert len(notes) == 1


@pytest.mark.parametrize(("mode", "form"), [("off", "eager"), ("inductor", "compiled")])
def test_off_and_inductor_never_touch_the_kernels(compiler, mode, form):
    """Neither at the start nor later."""
    kernels = Kernels(there=True)
    tiers, notes = tiers_of(mode, kernels=kernels)
    for seconds_left in (1.0, LONG):
        tiers.update(TRIAL_ITERATIONS, seconds_left)
    assert (in_use(tiers), kernels.asked) == ((form, form), [])
    assert not tiers.may_change
    assert (notes == ["programs: eager (--compile off)"]) == (mode == "off")


class Meeting:
    """Ranks that are threads here: `of(rank)` is what each of them is given."""

    def __init__(self, size):
        self.barrier, self.places, self.size = threading.Barrier(size, timeout=60), [()] * size, size

    def of(self, rank):
        def highest(*numbers):
            self.places[rank] = numbers
            self.barrier.wait()
            found = [max(column) for column in zip(*self.places, strict=True)]
            self.barrier.wait()
            return found

        return SimpleNamespace(rank=rank, local_rank=rank, size=self.size, barrier=self.barrier.wait, highest=highest)


@pytest.mark.parametrize("mode", ["auto", "on"])
@pytest.mark.parametrize("lacking", [None, 0, 1])
def test_ranks_take_fused_programs_only_together(compiler, mode, lacking):
    """Each waits for its own; if one of them cannot have them, all use the same other form, and say why."""
    meeting = Meeting(2)
    kernels = [Kernels(error="no registers left" if rank == lacking else None) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda rank: tiers_of(mode, kernels=kernels[rank], ranks=meeting.of(rank)), range(2)))
    assert [each.asked for each in kernels] == [[True], [True]]
    form = "fused" if lacking is None else "eager"
    for rank, (tiers, notes) in enumerate(made):
        assert in_use(tiers) == (form, form)
        assert not tiers.may_change
        if lacking is not None:
            assert "not all ranks have the" in notes[-1]
            assert any("no registers left" in note for note in notes) == (rank == lacking)


def test_ranks_keep_what_all_have(compiler):
    """`learn` is fused in both. Neither has a compiled `collect`, which is eager then, and a line says how to build it."""
    meeting = Meeting(2)
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda rank: tiers_of("auto", "collect", Kernels(), ranks=meeting.of(rank)), range(2)))
    for tiers, notes in made:
        assert in_use(tiers) == ("fused", "eager")
        assert not tiers.may_change
        assert notes[-1].startswith("programs: fused + eager, since compiling failed: not all ranks have the compiled programs")
        assert "--compile on builds them first" in notes[-1]


CPU = {"device": "cpu"}


@pytest.mark.parametrize(
    ("settings", "starts"),
    [
        ({}, True),
        ({"compile": "on"}, True),
        ({"compile": "off"}, False),
        ({"compile": "inductor"}, False),
        ({"rnn": "gru"}, False),
        ({"device": "cuda"}, False),
        ({"env_id": "ALE/Pong-v5"}, False),
    ],
    ids=str,
)
def test_which_runs_start_the_compiler(settings, starts, monkeypatch):
    """Those that may use what it builds."""
    started = []
    monkeypatch.setattr(loop, "Kernels", lambda builds: started.append(builds) or SimpleNamespace(close=None))
    cleanup = SimpleNamespace(callback=lambda _: None)
    assert (loop.start_kernels(TrainConfig(**CPU | settings), None, cleanup) is not None) == starts
    assert loop.start_kernels(TrainConfig(**CPU | settings), object(), cleanup) is None  # a module of the user's own
    assert started == [True] * starts


def test_one_process_of_a_machine_starts_the_compiler(monkeypatch):
    """torchrun's local rank 0; the others wait for it."""
    started = []
    monkeypatch.setattr(loop, "Kernels", lambda builds: started.append(builds) or SimpleNamespace(close=None))
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        loop.start_kernels(TrainConfig(**CPU), None, SimpleNamespace(callback=lambda _: None))
    assert started == [True, False]
