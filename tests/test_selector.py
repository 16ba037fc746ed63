"""Which programs a run uses: chosen so that it ends soonest, said so, and the same results whichever it is."""

import csv
import json
import os
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from fastppo.compile import native
from fastppo.compile.compile_errors import CompileError
from fastppo.compile.inductor import compile_program
from fastppo.compile.library_cache import cache_dir
from fastppo.compile.selector import BUILD_SECONDS, TRIAL_ITERATIONS, ProgramSelector, ProgramSpec
from fastppo.compile.verification import deviation_of_act
from fastppo.core import acting
from fastppo.core.contracts import Normalization
from fastppo.policy.distributions import CATEGORICAL
from fastppo.policy.mlp import MLPActorCritic
from fastppo.train import console
from support.kernels import share_helpers, share_kernels
from support.stand_ins import LONG, PARAMS, Compiler, Form, Kernels, in_use, tiers_of

FLAGS = ["--num-envs", "4", "--num-steps", "32", "--num-iterations", "6", "--eval-episodes", "0", "--plain"]
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
    """A run of a second does not wait for a compiler, nor start one; the line says why and how to have it all the same.

    A policy with memory has no fused programs.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", sys.executable)  # a program that exists, and is not started
    out, summary, _ = trained(tmp_path / "run", capsys, "--rnn", "gru", "--rnn-hidden-size", "4", "--hidden-sizes", "4")
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


# Runs with --compile on, by the forms of their programs. The masked one: a Dict observation, several choices, and an
# environment that raises for an illegal action.
RUNS = {
    "fused": MASKED,
    "fused + compiled": ["--backend", "torch", "--env-kwargs", "max_episode_steps=15", "--norm-obs", "--hidden-sizes", "16"],
}
LIBRARIES = {"fused": 1, "fused + compiled": 3}  # the fused programs; `collect`, and the helpers of what Inductor compiles


@pytest.fixture(scope="module", params=["fused", pytest.param("fused + compiled", marks=pytest.mark.compiles)])
def fast_run(request, tmp_path_factory, programs_dir, needs_compiler):
    """(tier, directory of a run with --compile on, XDG_CACHE_HOME with its programs)."""
    run_dir, cache_home = tmp_path_factory.mktemp("runs") / "fast", tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(cache_home))
        share_kernels(programs_dir)
        if "compiled" in request.param:
            share_helpers(programs_dir, cache_dir())
        assert console([*FLAGS, *RUNS[request.param], "--compile", "on", "--run-dir", str(run_dir)]) == 0
    return request.param, run_dir, str(cache_home)


@pytest.mark.long
def test_a_fast_run_is_the_eager_run(fast_run, tmp_path, capsys, monkeypatch):
    """--compile on: the same run as eager but for rounding; the next run loads both programs, and so does --compile auto.

    Each was compared with its eager form. Nothing is compiled again: the cache holds the same libraries afterwards.
    """
    tier, run_dir, cache_home = fast_run
    monkeypatch.setenv("XDG_CACHE_HOME", cache_home)
    _, _, eager = trained(tmp_path / "eager", capsys, *RUNS[tier], "--compile", "off")
    summary, fast = results_of(run_dir)
    assert summary["tier"] == tier
    assert set(summary["deviations"]) == {"learn", "collect" if "compiled" in tier else "act"}
    assert max(summary["deviations"].values()) < 1e-2
    for key in ("policy_loss", "value_loss", "entropy", "approx_kl", "grad_norm", "episodic_return_mean"):
        one, other = ([float(row[key]) for row in rows] for rows in (eager, fast))
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5, nan_ok=True), key
    files = sorted(cache_dir().iterdir())
    assert [path.suffix for path in files].count(".so") == LIBRARIES[tier]
    for mode in ("on", "auto"):
        out, summary, again = trained(tmp_path / mode, capsys, *RUNS[tier], "--compile", mode)
        assert summary["tier"] == tier
        assert summary["compile_seconds"] < 5
        assert f"programs: {tier}, ready" in out
        timed = {"seconds", "sps", "env_share", "act_share", "learn_share"}
        assert [{k: v for k, v in row.items() if k not in timed} for row in again] == [
            {k: v for k, v in row.items() if k not in timed} for row in fast
        ]  # the same bits
    assert sorted(cache_dir().iterdir()) == files


@pytest.fixture
def compiler(monkeypatch):
    """A stand-in; PyTorch has one thread before, whatever other tests have left, and what it had afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Compiler(monkeypatch)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("seconds_left", "builds"), [(2 * BUILD_SECONDS, True), (2 * BUILD_SECONDS - 1, False)])
def test_builds_only_where_they_pay(compiler, seconds_left, builds):
    """Once, after the trial: a run of twice the build's time or more is worth it, and a shorter one stays eager to its end."""
    tiers, notes = tiers_of("auto")
    assert notes == ["programs: eager; the cache has no compiled learn and act yet"]
    for _ in range(3):
        tiers.update(TRIAL_ITERATIONS - 1, LONG)
    assert len(notes) == 1
    assert compiler.started == []
    for seconds in (seconds_left, LONG, 0.0):
        tiers.update(TRIAL_ITERATIONS, seconds)
    assert compiler.started == ["learn", "act"] * builds
    assert len(notes) == 2
    assert ("in the background" if builds else "eager until the end") in notes[1]
    assert in_use(tiers) == ("eager", "eager")
    assert (tiers.name, tiers.compile_seconds > 1) == ("eager", False)


def test_both_are_built_at_once(compiler):
    """Each is taken up as soon as it is there, and sets the threads it was made for."""
    tiers, notes = tiers_of("auto")
    loading_seconds = tiers.compile_seconds
    tiers.update(TRIAL_ITERATIONS, LONG)
    tiers.update(TRIAL_ITERATIONS + 1, LONG)
    assert (compiler.started, tiers.name, torch.get_num_threads()) == (["learn", "act"], "eager", 1)
    compiler.ready |= {"learn"}
    tiers.update(TRIAL_ITERATIONS + 2, 0.0)
    assert in_use(tiers) == ("compiled", "eager")
    assert (tiers.name, tiers.tiers) == ("compiled + eager", {"learn": "compiled", "act": "eager"})
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    compiler.ready |= {"act"}
    tiers.update(TRIAL_ITERATIONS + 3, 0.0)
    assert in_use(tiers) == ("compiled", "compiled")
    assert tiers.act("normalization")("obs", "noise") == ("compiled", "act", (PARAMS, "normalization", "obs", "noise"))
    assert 0 < tiers.compile_seconds < 60
    assert tiers.compile_seconds != loading_seconds
    assert compiler.threads == {2}
    tiers.update(TRIAL_ITERATIONS + 4, LONG)
    tiers.close()
    assert compiler.started == ["learn", "act"]
    assert compiler.stopped == []
    assert [note.split(",")[0] for note in notes[2:]] == [f"programs: {name} is compiled now" for name in ("learn", "act")]


def test_a_build_that_fails_is_the_last(compiler):
    """What was taken up stays in use, the other build is stopped, nothing else is tried."""
    tiers, notes = tiers_of("auto")
    compiler.ready |= {"learn"}
    tiers.update(TRIAL_ITERATIONS, LONG)
    assert in_use(tiers) == ("compiled", "eager")
    compiler.broken = True
    for _ in range(3):
        tiers.update(TRIAL_ITERATIONS, LONG)
    tiers.close()
    assert in_use(tiers) == ("compiled", "eager")
    assert compiler.started == ["learn", "act"]
    assert compiler.stopped == ["act"]
    assert notes[3:] == ["programs: compiled + eager, since compiling failed: it broke"]


def test_closing_stops_the_build_once(compiler):
    """However often it is closed."""
    tiers, _ = tiers_of("auto")
    tiers.update(TRIAL_ITERATIONS, LONG)
    tiers.close()
    tiers.close()
    assert compiler.stopped == ["learn", "act"]


@pytest.mark.parametrize("second", ["act", "collect"])
@pytest.mark.parametrize("mode", ["auto", "on", "inductor"])
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


@pytest.mark.parametrize(("cached", "name"), [(set(), "eager"), ({"learn"}, "compiled + eager")])
def test_nothing_is_offered_that_cannot_be_built(compiler, cached, name):
    """Without a compiler "auto" uses what the cache has, says why there is no more, and starts no build in a long run."""
    compiler.there, compiler.cached = False, cached
    tiers, notes = tiers_of("auto")
    assert not tiers.may_change
    for _ in range(2):
        tiers.update(TRIAL_ITERATIONS, LONG)
    assert (tiers.name, in_use(tiers), compiler.started) == (name, (name.split()[0], "eager"), [])
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
    """By "on" and "inductor" at once, by "auto" in the background: that alone."""
    compiler.cached |= {"learn"}
    for mode in ("on", "inductor"):
        tiers, _ = tiers_of(mode)
        assert compiler.compiled.pop() == "act"
        assert not compiler.compiled
    assert compiler.threads == {2}
    assert in_use(tiers) == ("compiled", "compiled")
    tiers, _ = tiers_of("auto")
    assert in_use(tiers) == ("compiled", "eager")
    for _ in range(2):
        tiers.update(TRIAL_ITERATIONS, LONG)
    assert compiler.started == ["act"]


def test_on_builds_two_at_once(compiler):
    """The first in this process, the second in another."""
    tiers, notes = tiers_of("on")
    assert (compiler.compiled, compiler.started, compiler.stopped) == (["learn"], ["act"], [])
    assert in_use(tiers) == ("compiled", "compiled")
    assert len(notes) == 2
    assert notes[0].startswith("compiling learn and act (once")
    assert (torch.get_num_threads(), compiler.threads, tiers.may_change) == (2, {2}, False)


@pytest.mark.parametrize("reason", ["one core", "a class of the script"])
def test_on_builds_one_after_the_other_where_it_must(compiler, reason):
    """Where there is one core, and where another process cannot have the program."""
    compiler.cores, compiler.alone = (1, False) if reason == "one core" else (2, True)
    tiers, _ = tiers_of("on")
    assert compiler.compiled == ["learn", "act"]
    assert in_use(tiers) == ("compiled", "compiled")


@pytest.mark.parametrize("second", ["act", "collect"])
def test_on_without_success_is_eager(compiler, second):
    """The reason is said, no second attempt is made, and the other process is stopped."""
    compiler.broken = True
    tiers, notes = tiers_of("on", second)
    for _ in range(2):
        tiers.update(TRIAL_ITERATIONS, LONG)
    assert in_use(tiers) == ("eager", "eager")
    assert (compiler.stopped, tiers.name, torch.get_num_threads()) == ([second], "eager", 1)
    assert notes[-1] == "programs: eager, since compiling failed: it broke"


def small_tiers(notes):
    """Programs of which `act` compiles quickly; a fused `learn` is stood in for."""
    policy = MLPActorCritic(3, 2, CATEGORICAL, (8,))
    params = policy.init(torch.Generator().manual_seed(0))
    normalization = Normalization(None, None, None, torch.zeros(()), torch.ones(()))
    example = (params, normalization, torch.zeros(4, 3), torch.zeros(4, 2))
    act = partial(acting.act, policy, policy.weights(params))
    specs = {
        "learn": ProgramSpec(Form("eager", "learn"), None, example, lambda *_: 0.0, fused=partial(Form, "fused", "learn")),
        "act": ProgramSpec(act, partial(acting.act_from_params, policy=policy), example, deviation_of_act),
    }
    return ProgramSelector("auto", specs, 1, notes.append, kernels=Kernels(there=True)), normalization


@pytest.mark.usefixtures("inductor")
def test_auto_builds_in_the_background_where_it_pays(tmp_path, monkeypatch):
    """A long run: decided after the first iterations, built by another process, taken up between two iterations.

    The compiled `act` gives the same actions from the same noise. What is fused is not compiled.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    notes: list[str] = []
    tiers, normalization = small_tiers(notes)
    steps = [(torch.randn(4, 3), torch.randn(4, 2)) for _ in range(20)]
    before = [tiers.act(normalization)(*step) for step in steps]
    tiers.update(TRIAL_ITERATIONS - 1, LONG)
    assert not any("background" in note for note in notes)  # too early to tell
    deadline = time.monotonic() + 600
    while tiers.name == "fused + eager" and time.monotonic() < deadline:
        tiers.update(TRIAL_ITERATIONS, LONG)
        time.sleep(0.1)
    assert tiers.tiers == {"learn": "fused", "act": "compiled"}, notes
    assert all(torch.equal(tiers.act(normalization)(*step), action) for step, action in zip(steps, before, strict=True))
    assert tiers.deviations == {"act": 0.0}
    tiers.close()
    assert any("compiling act in the background" in note for note in notes)
    assert any("act is compiled now" in note for note in notes)


def built_in(cache):
    """Directories in which something is being built."""
    return list((cache / "fastppo").glob("build-*"))


@pytest.mark.usefixtures("inductor")
def test_a_build_under_way_ends_with_the_run(tmp_path, monkeypatch):
    """close() leaves no process and no half-built directory behind."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tiers, _ = small_tiers([])
    for _ in range(2):
        tiers.update(TRIAL_ITERATIONS, LONG)
    process = tiers._building["act"]._process
    deadline = time.monotonic() + 600
    while not any(list(path.iterdir()) for path in built_in(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert built_in(tmp_path)  # it is at work; a directory that is only just being made could be left behind
    tiers.close()
    assert process.poll() is not None
    assert not built_in(tmp_path)


@pytest.mark.usefixtures("inductor")
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


@pytest.mark.long
def test_a_run_with_cached_programs_never_imports_the_compiler(fast_run, tmp_path):
    """Start-up is not paid for a compiler that has nothing to do."""
    tier, _, cache_home = fast_run
    script = (
        "import sys; from fastppo.train import console\n"
        f"assert console({[*FLAGS, *RUNS[tier], '--compile', 'auto', '--run-dir', str(tmp_path / 'run')]!r}) == 0\n"
        "assert 'torch._inductor.compile_fx' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "XDG_CACHE_HOME": cache_home}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    assert results_of(tmp_path / "run")[0]["tier"] == tier


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
