"""Which programs a run uses: chosen so that it ends soonest, said so, and the same results whichever it is."""

import csv
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from fastppo.compile import native
from fastppo.compile.compile_errors import CompileError
from fastppo.compile.inductor import compile_program
from fastppo.compile.library_cache import cache_dir
from fastppo.compile.selector import BUILD_SECONDS, TRIAL_ITERATIONS, ProgramSelector, ProgramSpec
from fastppo.core import acting
from fastppo.core.contracts import Normalization
from fastppo.policy.distributions import CATEGORICAL
from fastppo.policy.mlp import MLPActorCritic
from fastppo.train import console

FLAGS = ["--num-envs", "4", "--num-steps", "32", "--num-iterations", "6", "--eval-episodes", "0", "--plain"]
# a Dict observation with a mask, several choices, and an environment that raises for an illegal action
MASKED = ["--env-id", "environments:AnySpacesVector-v0", "--env-kwargs", "observation=masked", "action=multi-discrete"]
MASKED += ["--norm-obs", "--hidden-sizes", "16"]


def trained(run_dir, capsys, *flags):
    """(what was printed, summary, rows) of a run."""
    assert console([*FLAGS, "--run-dir", str(run_dir), *flags]) == 0
    return capsys.readouterr().out, *results_of(run_dir)


def results_of(run_dir):
    """(summary, rows) of a run directory."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return json.loads((run_dir / "summary.json").read_text()), list(csv.DictReader(file))


def test_auto_stays_eager_where_compiling_would_not_pay(tmp_path, capsys, monkeypatch):
    """A run of a second does not wait for a compiler, nor start one; the line says why and how to have it all the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", sys.executable)  # a program that exists, and is not started
    out, summary, _ = trained(tmp_path / "run", capsys)
    assert summary["tier"] == "eager"
    assert "eager until the end" in out
    assert "--compile on" in out
    assert not list((tmp_path / "cache" / "fastppo").iterdir())


def test_off_is_eager(tmp_path, capsys, monkeypatch):
    """--compile off does not even look at the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _, summary, _ = trained(tmp_path / "run", capsys, "--compile", "off")
    assert summary["tier"] == "eager"
    assert summary["compile_seconds"] == 0
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("mode", ["on", "auto"])
def test_a_cache_that_others_can_write_to_is_not_used(mode, tmp_path, capsys, monkeypatch):
    """Loading a program runs it: a directory open to others is refused, with the reason, and training goes on eagerly."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "fastppo").mkdir()
    (tmp_path / "fastppo").chmod(0o777)
    out, summary, _ = trained(tmp_path / "run", capsys, "--compile", mode)
    assert summary["tier"] == "eager"
    assert "0700" in out


@pytest.mark.parametrize("mode", ["on", "auto"])
def test_without_a_compiler_training_goes_on(mode, tmp_path, capsys, monkeypatch):
    """Without g++: one line with the reason and the cure, then eager programs; compiling is not offered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    out, summary, _ = trained(tmp_path / "run", capsys, "--compile", mode)
    assert summary["tier"] == "eager"
    (line,) = [line for line in out.splitlines() if line.startswith("programs: ")]
    assert line.endswith(native.NO_COMPILER)
    assert "always with --compile" not in out  # nothing changes on the way: the bits are those of --compile off


@pytest.fixture(scope="module")
def compiled_run(tmp_path_factory, needs_compiler):
    """(directory of a run with --compile on, XDG_CACHE_HOME with its programs)."""
    run_dir, cache_home = tmp_path_factory.mktemp("runs") / "compiled", tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(cache_home))
        assert console([*FLAGS, *MASKED, "--compile", "on", "--run-dir", str(run_dir)]) == 0
    return run_dir, str(cache_home)


def test_a_compiled_run_is_the_eager_run(compiled_run, tmp_path, capsys, monkeypatch):
    """--compile on: the same run as eager but for rounding; the next run loads both programs, and so does --compile auto.

    Nothing is compiled again: the cache holds the same three libraries afterwards, one a program and the helpers'.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", compiled_run[1])
    _, _, eager = trained(tmp_path / "eager", capsys, *MASKED, "--compile", "off")
    summary, compiled = results_of(compiled_run[0])
    assert summary["tier"] == "compiled"
    for key in ("policy_loss", "value_loss", "entropy", "approx_kl", "grad_norm", "episodic_return_mean"):
        one, other = ([float(row[key]) for row in rows] for rows in (eager, compiled))
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5, nan_ok=True), key
    files = sorted(cache_dir().iterdir())
    assert [path.suffix for path in files].count(".so") == 3
    for mode in ("on", "auto"):
        out, summary, again = trained(tmp_path / mode, capsys, *MASKED, "--compile", mode)
        assert summary["tier"] == "compiled"
        assert summary["compile_seconds"] < 5
        assert "programs: compiled" in out
        timed = {"seconds", "sps", "env_share", "act_share", "learn_share"}
        assert [{k: v for k, v in row.items() if k not in timed} for row in again] == [
            {k: v for k, v in row.items() if k not in timed} for row in compiled
        ]  # the same bits
    assert sorted(cache_dir().iterdir()) == files


class Compiler:
    """Stands in for compile/inductor.py: a program is its name, and a build is ready when the test says so."""

    def __init__(self, monkeypatch):
        self.cached, self.ready = set(), set()
        self.compiled, self.started, self.stopped = [], [], []
        self.broken = self.distrusted = False
        self.there = True
        self.threads = set()  # torch's, whenever something was asked for
        monkeypatch.setattr("fastppo.compile.selector.load_program", self.load)
        monkeypatch.setattr("fastppo.compile.selector.compile_program", self.compile)
        monkeypatch.setattr("fastppo.compile.selector.BackgroundCompile", self.start)
        monkeypatch.setattr("fastppo.compile.native.has_compiler", lambda: self.there)

    def load(self, program, example, cache_dir, seeds, exchange):
        self.threads.add(torch.get_num_threads())
        if self.distrusted:
            raise CompileError("not yours")
        return Compiled(program) if program in self.cached else None

    def compile(self, program, example, cache_dir, seeds, exchange):
        self.threads.add(torch.get_num_threads())
        if self.broken:
            raise CompileError("it broke")
        self.compiled.append(program)
        return Compiled(program)

    def start(self, program, example, cache_dir, seeds):
        self.threads.add(torch.get_num_threads())
        self.started.append(program)
        return SimpleNamespace(poll=partial(self.poll, program), stop=partial(self.stopped.append, program))

    def poll(self, program):
        self.threads.add(torch.get_num_threads())
        if self.broken:
            raise CompileError("it broke")
        return Compiled(program) if program in self.ready else None


@dataclass(frozen=True)
class Compiled:
    """What stands for a compiled program: calling it says which it is, and of what."""

    name: str

    def __call__(self, *args):
        return "compiled", self.name, args

    def bind(self, fixed, rest):
        return lambda *args: ("compiled", self.name, (*fixed, *args))


@pytest.fixture
def compiler(monkeypatch):
    """A stand-in; the number of threads is put back afterwards."""
    threads = torch.get_num_threads()
    yield Compiler(monkeypatch)
    torch.set_num_threads(threads)


PARAMS = torch.zeros(1)


def tiers_of(mode, second="act"):
    """(Tiers of two programs for two threads, its notes)."""

    def eager(name):
        return lambda *args: ("eager", name, args)

    names = ("learn", second)
    jobs = {name: ProgramSpec(eager(name), name, (PARAMS, "normalization", "obs", "noise")) for name in names}
    notes: list[str] = []
    return ProgramSelector(mode, jobs, 2, notes.append), notes


def in_use(tiers):
    """Which form of `learn` and of `act`."""
    return tiers.learn()[0], tiers.act("normalization")("obs", "noise")[0]


LONG = 100 * BUILD_SECONDS


@pytest.mark.parametrize(("seconds_left", "builds"), [(2 * BUILD_SECONDS, True), (2 * BUILD_SECONDS - 1, False)])
def test_builds_only_where_they_pay(compiler, seconds_left, builds):
    """Once, after the trial: a run of twice the build's time or more is worth it, and a shorter one stays eager to its end."""
    tiers, notes = tiers_of("auto")
    assert notes == ["programs: eager; the cache has no compiled ones yet"]
    for _ in range(3):
        tiers.update(TRIAL_ITERATIONS - 1, LONG)
    assert len(notes) == 1
    assert compiler.started == []
    for seconds in (seconds_left, LONG, 0.0):
        tiers.update(TRIAL_ITERATIONS, seconds)
    assert compiler.started == ["learn"] * builds
    assert len(notes) == 2
    assert ("in the background" if builds else "eager until the end") in notes[1]
    assert in_use(tiers) == ("eager", "eager")
    assert (tiers.name, tiers.compile_seconds > 1) == ("eager", False)


def test_one_build_after_another(compiler):
    """`learn`, the longer one, comes first; each is taken up as soon as it is there, and sets the threads it was made for."""
    tiers, notes = tiers_of("auto")
    loading_seconds = tiers.compile_seconds
    tiers.update(TRIAL_ITERATIONS, LONG)
    compiler.ready |= {"act"}
    tiers.update(TRIAL_ITERATIONS + 1, LONG)
    assert (compiler.started, tiers.name, torch.get_num_threads()) == (["learn"], "eager", 1)
    compiler.ready |= {"learn"}
    tiers.update(TRIAL_ITERATIONS + 2, 0.0)
    assert in_use(tiers) == ("compiled", "eager")
    assert (compiler.started, tiers.name, torch.get_num_threads()) == (["learn"], "compiled", 2)
    torch.set_num_threads(1)
    tiers.update(TRIAL_ITERATIONS + 3, 0.0)
    tiers.update(TRIAL_ITERATIONS + 4, 0.0)
    assert in_use(tiers) == ("compiled", "compiled")
    assert tiers.act("normalization")("obs", "noise") == ("compiled", "act", (PARAMS, "normalization", "obs", "noise"))
    assert 0 < tiers.compile_seconds < 60
    assert tiers.compile_seconds != loading_seconds
    assert compiler.threads == {2}
    tiers.update(TRIAL_ITERATIONS + 5, LONG)
    tiers.close()
    assert compiler.started == ["learn", "act"]
    assert compiler.stopped == []
    assert [note.split(",")[0] for note in notes[2:]] == [f"programs: {name} is compiled now" for name in ("learn", "act")]


def test_a_build_that_fails_is_the_last(compiler):
    """What was taken up stays in use, nothing else is tried, and there is nothing left to stop."""
    tiers, notes = tiers_of("auto")
    tiers.update(TRIAL_ITERATIONS, LONG)
    compiler.broken = True
    for _ in range(3):
        tiers.update(TRIAL_ITERATIONS, LONG)
    tiers.close()
    assert in_use(tiers) == ("eager", "eager")
    assert compiler.started == ["learn"]
    assert compiler.stopped == []
    assert notes[2:] == ["programs: eager, since compiling failed: it broke"]


def test_closing_stops_the_build_once(compiler):
    """However often it is closed."""
    tiers, _ = tiers_of("auto")
    tiers.update(TRIAL_ITERATIONS, LONG)
    tiers.close()
    tiers.close()
    assert compiler.stopped == ["learn"]


@pytest.mark.parametrize("second", ["act", "collect"])
@pytest.mark.parametrize("mode", ["auto", "on"])
def test_cached_programs_are_used_at_once(compiler, mode, second):
    """Without a build, then or later, and without another word."""
    compiler.cached |= {"learn", second}
    tiers, notes = tiers_of(mode, second)
    assert in_use(tiers) == ("compiled", "compiled")
    assert tiers.act("now")("obs")[1:] == (second, (PARAMS, "now", "obs"))
    assert (tiers.name, torch.get_num_threads(), compiler.threads) == ("compiled", 2, {2})
    for _ in range(2):
        tiers.update(TRIAL_ITERATIONS, 1.0)
    assert (compiler.started, compiler.compiled) == ([], [])
    assert len(notes) == 1
    assert "programs: compiled, ready" in notes[0]
    assert 0 < tiers.compile_seconds < 60


@pytest.mark.parametrize(("cached", "name"), [(set(), "eager"), ({"learn"}, "compiled")])
def test_nothing_is_offered_that_cannot_be_built(compiler, cached, name):
    """Without a compiler "auto" uses what the cache has, says why there is no more, and starts no build in a long run."""
    compiler.there, compiler.cached = False, cached
    tiers, notes = tiers_of("auto")
    assert not tiers.may_change
    for _ in range(2):
        tiers.update(TRIAL_ITERATIONS, LONG)
    assert (tiers.name, in_use(tiers), compiler.started) == (name, (name, "eager"), [])
    assert notes == [f"programs: {name}; {native.NO_COMPILER}"]


@pytest.mark.parametrize("mode", ["on", "auto"])
def test_without_a_cache_nothing_is_tried(compiler, mode):
    """The reason once, and eager until the end, however long the run."""
    compiler.distrusted = True
    tiers, notes = tiers_of(mode)
    for seconds_left in (1.0, LONG):
        tiers.update(TRIAL_ITERATIONS, seconds_left)
    assert in_use(tiers) == ("eager", "eager")
    assert (compiler.compiled, compiler.started) == ([], [])
    assert notes == ["programs: eager, since compiling failed: not yours"]


def test_off_says_so_once(compiler):
    """And asks for nothing, at the start or later."""
    compiler.cached |= {"learn", "act"}
    tiers, notes = tiers_of("off")
    for seconds_left in (1.0, LONG):
        tiers.update(TRIAL_ITERATIONS, seconds_left)
    assert in_use(tiers) == ("eager", "eager")
    assert notes == ["programs: eager (--compile off)"]
    assert (compiler.started, compiler.threads) == ([], set())


def test_what_the_cache_lacks_is_built(compiler):
    """By "on" at once, by "auto" in the background: that alone."""
    compiler.cached |= {"learn"}
    tiers, _ = tiers_of("on")
    assert compiler.compiled == ["act"]
    assert compiler.threads == {2}
    assert in_use(tiers) == ("compiled", "compiled")
    tiers, _ = tiers_of("auto")
    assert in_use(tiers) == ("compiled", "eager")
    for _ in range(2):
        tiers.update(TRIAL_ITERATIONS, LONG)
    assert compiler.started == ["act"]


@pytest.mark.parametrize("second", ["act", "collect"])
def test_on_without_success_is_eager(compiler, second):
    """The reason is said, and no second attempt is made."""
    compiler.broken = True
    tiers, notes = tiers_of("on", second)
    for _ in range(2):
        tiers.update(TRIAL_ITERATIONS, LONG)
    assert in_use(tiers) == ("eager", "eager")
    assert (compiler.started, tiers.name, torch.get_num_threads()) == ([], "eager", 1)
    assert notes[-1] == "programs: eager, since compiling failed: it broke"


def small_tiers(mode, notes):
    """Tiers around two programs that compile quickly: `learn` is stood in for by another act."""
    policy = MLPActorCritic(3, 2, CATEGORICAL, (8,))
    params = policy.init(torch.Generator().manual_seed(0))
    normalization = Normalization(None, None, None, torch.zeros(()), torch.ones(()))
    example = (params, normalization, torch.zeros(4, 3), torch.zeros(4, 2))
    stand_in = partial(acting.act_from_params, policy=policy)
    act = partial(acting.act, policy, policy.weights(params))
    jobs = {"learn": ProgramSpec(stand_in, stand_in, example), "act": ProgramSpec(act, stand_in, example)}
    return ProgramSelector(mode, jobs, 1, notes.append), normalization


@pytest.mark.usefixtures("needs_compiler")
def test_auto_builds_in_the_background_where_it_pays(tmp_path, monkeypatch):
    """A long run: decided after the first iterations, built by another process, taken up between two iterations.

    The compiled `act` gives the same actions from the same noise.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    notes: list[str] = []
    tiers, normalization = small_tiers("auto", notes)
    steps = [(torch.randn(4, 3), torch.randn(4, 2)) for _ in range(20)]
    before = [tiers.act(normalization)(*step) for step in steps]
    tiers.update(TRIAL_ITERATIONS - 1, 100 * BUILD_SECONDS)
    assert not any("background" in note for note in notes)  # too early to tell
    deadline = time.monotonic() + 600
    while tiers.name == "eager" and time.monotonic() < deadline:
        tiers.update(TRIAL_ITERATIONS, 100 * BUILD_SECONDS)
        time.sleep(0.1)
    assert tiers.name == "compiled", notes
    assert all(torch.equal(tiers.act(normalization)(*step), action) for step, action in zip(steps, before, strict=True))
    tiers.close()
    assert any("background" in note for note in notes)
    assert any("is compiled now" in note for note in notes)


def built_in(cache):
    """Directories in which something is being built."""
    return list((cache / "fastppo").glob("build-*"))


@pytest.mark.usefixtures("needs_compiler")
def test_a_build_under_way_ends_with_the_run(tmp_path, monkeypatch):
    """close() leaves no process and no half-built directory behind."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tiers, _ = small_tiers("auto", [])
    for _ in range(2):
        tiers.update(TRIAL_ITERATIONS, 100 * BUILD_SECONDS)
    assert tiers._building is not None
    process = tiers._building[1]._process
    deadline = time.monotonic() + 600
    while not built_in(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert built_in(tmp_path)  # it is at work
    tiers.close()
    assert process.poll() is not None
    assert not built_in(tmp_path)


@pytest.mark.usefixtures("needs_compiler")
def test_a_program_that_asks_the_host_does_not_compile(tmp_path):
    """A hidden sync cannot slip into a compiled program: there are no graph breaks to hide it in."""
    tmp_path.chmod(0o700)

    class Syncing(MLPActorCritic):
        def actor(self, weights, obs):
            logits = super().actor(weights, obs)
            return logits if bool(logits.sum() > 0) else -logits

    policy = Syncing(3, 2, CATEGORICAL, (8,))
    params = policy.init(torch.Generator().manual_seed(0))
    normalization = Normalization(None, None, None, torch.zeros(()), torch.ones(()))
    example = (params, normalization, torch.zeros(4, 3), torch.zeros(4, 2))
    with pytest.raises(CompileError):
        compile_program(partial(acting.act_from_params, policy=policy), example, tmp_path)


def test_a_run_with_cached_programs_never_imports_the_compiler(compiled_run, tmp_path):
    """Start-up is not paid for a compiler that has nothing to do."""
    script = (
        "import sys; from fastppo.train import console\n"
        f"assert console({[*FLAGS, *MASKED, '--compile', 'auto', '--run-dir', str(tmp_path / 'run')]!r}) == 0\n"
        "assert 'torch._inductor.compile_fx' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "XDG_CACHE_HOME": compiled_run[1]}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    assert results_of(tmp_path / "run")[0]["tier"] == "compiled"


def test_calls_per_iteration(tmp_path):
    """T calls of the environment's step an iteration, each after one `act`: nothing is done twice."""
    from environments import Walk  # noqa: F401 (registers the environments)

    from fastppo.envs.autoreset import AutoresetEnvs
    from fastppo.envs.factory import EnvConfig, make_gymnasium_envs
    from fastppo.policy.spaces import action_spec, obs_spec
    from fastppo.rollout.step_collector import HostCollector
    from fastppo.rollout.storage import allocate_rollout

    calls = []

    class Counting(AutoresetEnvs):
        def step(self, action):
            calls.append("step")
            return super().step(action)

    made = make_gymnasium_envs(EnvConfig("CartPole-v1", 4))
    spec = action_spec(made.single_action_space, False)
    obs_space = obs_spec(made.single_observation_space)
    rollout = allocate_rollout(16, 4, obs_space, spec, False, torch.device("cpu"))
    collector = HostCollector(Counting(made), rollout, obs_space, spec)
    collector.reset(0)

    def act(obs, noise):
        calls.append("act")
        return torch.zeros(4, dtype=torch.int64)

    collector.collect(act, torch.zeros(16, 4, 2))
    assert calls == ["act", "step"] * 16
