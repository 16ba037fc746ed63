"""--env-halves: one half of the environments steps while the policy acts for the other, and what is learned stays the same."""

import contextlib
import json
import multiprocessing
import re

import numpy as np
import pytest
import torch
from environments import Walk
from torch.utils._pytree import tree_map

from fastppo import Callback, train
from fastppo.compile import selector
from fastppo.config import TrainConfig
from fastppo.envs.atari import AtariSettings, make_ale
from fastppo.envs.envpool import make_envpool
from fastppo.envs.factory import EnvConfig, make_training_envs
from fastppo.envs.grouped import GroupedVectorEnv
from fastppo.envs.halves import HalvesVectorEnv
from fastppo.errors import EnvironmentFailed, TrainingFault, UsageError
from fastppo.rollout import step_collector
from fastppo.rollout.collector import start_collector
from fastppo.rollout.halves_collector import HalvesCollector
from fastppo.rollout.step_collector import collect_in_turns
from fastppo.training import device_trial, halves_trial, loop
from fastppo.training.halves_trial import HalvesTrial, try_halves
from fastppo.training.job import allocate_buffers, draw_noise
from fastppo.training.programs import build_programs
from fastppo.training.setup import prepare
from fastppo.training.shares import share_of, with_shards
from support.processes import PretendedRanks
from support.runs import assert_same, checkpoint, rows_of, tiny, without_times

GROUPED = {"vectorization": "grouped", "num_envs": 6, "num_threads": 2}
ANY = {**GROUPED, "env_id": "environments:AnySpaces", "hidden_sizes": (8,), "cnn_size": 8}
WALK = {**GROUPED, "env_id": "environments:Walk-v0"}


class TwoGoals(Walk):
    """A walk with a reward of two parts, and numbers in the info of an episode's last step."""

    reward_space = Walk.observation_space

    def step(self, action):
        obs, reward, terminated, truncated, _ = super().step(action)
        ended = terminated or truncated
        info = {"is_success": self.position > 0, "position": self.position} if ended and self.length > 2 else {}
        return obs, np.array([reward, self.position, 1.0], np.float32), terminated, truncated, info


RUNS = {
    "vector": WALK,
    "a process each": {**WALK, "vectorization": "async"},
    "reset in the same step": {**WALK, "autoreset": "same-step"},
    "memory": {**WALK, "rnn": "gru", "num_minibatches": 2},
    "memory, reset in the same step": {**WALK, "rnn": "lstm", "num_minibatches": 2, "autoreset": "same-step"},
    "masks in infos": {**ANY, "env_kwargs": {"action": "multi-discrete", "mask": "info"}},
    "masks from a method": {**ANY, "env_kwargs": {"action": "multi-discrete", "mask": "method"}},
    "masks in observations": {**ANY, "env_kwargs": {"observation": "masked", "action": "multi-discrete"}},
    "structure": {**ANY, "env_kwargs": {"observation": "nested", "action": "box"}, "norm_obs": True},
    "image": {**ANY, "env_kwargs": {"observation": "image (C, H, W)"}},
    "infos, parts of rewards": {
        **GROUPED,
        "env_id": "test_halves:TwoGoals",
        "reward_weights": (1.0, 0.5, 0.1),
        "log_info": ("position",),
    },
    "gsde": {**GROUPED, "env_id": "Pendulum-v1", "action_distribution": "gsde", "sde_sample_freq": 3, "max_episode_steps": 5},
}


@contextlib.contextmanager
def prepared(**settings):
    """The task of a run, its buffers and its collector."""
    common = {"num_steps": 9, "num_minibatches": 3, "check_env": False, "compile": "off", "device": "cpu"}
    with contextlib.ExitStack() as cleanup:
        task = prepare(TrainConfig(**{**common, **settings}), None, None, cleanup)
        buffers = allocate_buffers(task)
        seed = task.environment_seeds()
        yield task, buffers, start_collector(task.envs, buffers.rollout, task.obs, task.action, seed, buffers.rnn_state)


def row_by_row(act):
    """`act` for one environment at a time: a product of matrices of another size may differ in the last bit."""

    def alone(*given):
        one_by_one = [act(*tree_map(lambda x, row=row: x[row : row + 1], given)) for row in range(len(given[1]))]
        return tree_map(lambda *rows: torch.cat(rows), *one_by_one)

    return alone


def rollouts(**settings):
    """What three rollouts write, a reset before the last: tensors, outcomes, and the snapshot for the report of a fault."""
    found = []
    with prepared(**settings) as (task, buffers, collector), torch.no_grad():
        example = buffers.learn_arguments()
        chosen = selector.ProgramSelector("off", build_programs(task, example, buffers.noise), 1, lambda line: None)
        act, generator = row_by_row(chosen.act(example[-1])), torch.Generator().manual_seed(3)
        for number in range(3):
            collector.collect(act, draw_noise(task, generator), cut=number == 1)
            kept = {**buffers.learn_rollout, **collector.snapshot()}
            outcomes = collector.outcomes()._asdict()
            infos = outcomes.pop("infos")
            kept = {key: x.clone() for key, x in kept.items()}
            found.append((kept, {key: np.copy(x) for key, x in {**outcomes, **infos}.items() if x is not None}))
            if number == 1:
                collector.reset(7)
        assert isinstance(collector, HalvesCollector) == (settings["env_halves"] == "on")
    return found


def assert_equal_rollouts(found, expected):
    """To the bit, as lists of `rollouts`."""
    for (rows, outcomes), (other_rows, other_outcomes) in zip(found, expected, strict=True):
        assert rows.keys() == other_rows.keys()
        for key, x in rows.items():
            assert torch.equal(x, other_rows[key]), key
        assert outcomes.keys() == other_outcomes.keys()
        for key, x in outcomes.items():
            np.testing.assert_array_equal(x, other_outcomes[key], key)


@pytest.mark.parametrize("case", RUNS)
def test_rollouts_are_those_without_halves(case):
    """Rows, masks, final observations, validity, recurrent states, infos, parts of rewards, ends: every bit."""
    found, expected = (rollouts(**RUNS[case], env_halves=halves) for halves in ("on", "off"))
    assert_equal_rollouts(found, expected)
    assert any(outcomes["episode_end"].any() for _, outcomes in found)
    if case == "infos, parts of rewards":
        assert np.isfinite(found[0][1]["position"]).any()
        assert found[0][1]["reward_parts"].shape == (3, 9, 6)


@pytest.mark.parametrize("case", ["vector", "memory", "masks in observations", "reset in the same step", "image"])
def test_rollouts_on_a_gpu(case, monkeypatch):
    """Rows written to pinned memory, of each half by itself; the GPU's memory is the CPU's here. The rows are the same."""
    expected = rollouts(**RUNS[case], env_halves="off")
    monkeypatch.setattr(step_collector, "shares_memory", lambda device: False)
    assert_equal_rollouts(rollouts(**RUNS[case], env_halves="on"), expected)


def test_one_copy_a_step_of_each_half(monkeypatch):
    """T + 1 rows of half the size go up to a GPU, and T actions down: as many bytes as without halves."""
    monkeypatch.setattr(step_collector, "shares_memory", lambda device: False)
    sizes = {}
    for halves in ("on", "off"):
        with prepared(**WALK, env_halves=halves) as (_, _, collector):
            parts = collector.parts if halves == "on" else [collector]
            sizes[halves] = [part.steps._staged.nbytes for part in parts]
            assert [len(part.host_actions[0]) for part in parts] == ([3, 3] if halves == "on" else [6])
    (whole,) = sizes["off"]
    assert len(sizes["on"]) == 2
    assert sum(sizes["on"]) <= whole + 16 * 3  # each key begins at a multiple of 16 bytes


class Ordered:
    """Stands in for a part of the environments: notes what is done to it."""

    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def begin_rollout(self):
        self.calls.append(f"begin {self.name}")

    def act(self, t, act, noise, phases):
        self.calls.append(f"act {self.name}{t}")

    def step(self, t, phases):
        self.calls.append(f"wait {self.name}{t}")

    def end_rollout(self, cut):
        self.calls.append(f"end {self.name}")


def test_the_policy_acts_for_one_half_while_the_other_steps():
    """Between the start of a half's step and the wait for its end, the other half's actions are chosen."""
    calls = []
    collect_in_turns([Ordered("a", calls), Ordered("b", calls)], None, [torch.zeros(3, 1)] * 2, False)
    assert calls[2:8] == ["act a0", "act b0", "wait a0", "act a1", "wait b0", "act b1"]
    assert calls[8:-2] == ["wait a1", "act a2", "wait b1", "act b2", "wait a2", "wait b2"]
    calls.clear()
    collect_in_turns([Ordered("a", calls)], None, [torch.zeros(3, 1)], False)
    assert calls[1:-1] == ["act a0", "wait a0", "act a1", "wait a1", "act a2", "wait a2"]


def test_a_step_begins_before_the_other_half_acts():
    """A half has its actions, and its processes are at work, before `act` is called for the other half."""
    begun = []
    with prepared(**WALK, env_halves="on") as (_, buffers, collector):
        for half in collector.parts:
            envs = half.envs.envs
            envs.step_async = lambda action, envs=envs, first=half.first: (
                begun.append(f"step {first}"),
                GroupedVectorEnv.step_async(envs, action),
            )

        def act(obs, noise):
            assert obs.shape == (3, 3)
            begun.append("act")
            return torch.zeros(3, dtype=torch.int64)

        phases = collector.collect(act, buffers.noise)
    assert begun == ["act", "step 0", "act", "step 3"] * 9
    assert phases.act > 0
    assert phases.env > 0


@pytest.mark.parametrize("settings", [{}, {"backend": "envpool", "env_id": "CartPole-v1"}], ids=["grouped", "envpool"])
def test_a_run_in_halves_learns_the_same(settings, tmp_path, needs_compiler):
    """Fused programs compute each row by itself: the numbers of every iteration and the last parameters, to the bit."""
    if settings:
        pytest.importorskip("envpool")
    else:
        settings = {"env_id": "Pendulum-v1", "max_episode_steps": 7, "vectorization": "grouped", "norm_reward": True}
    for halves in ("on", "off"):
        summary = train(tiny(tmp_path / halves, num_envs=4, compile="on", env_halves=halves, **settings)).summary
        assert (summary["tier"], summary["env_halves"], summary["env_halves_trial"]) == ("fused", halves, None)
    assert without_times(rows_of(tmp_path / "on")) == without_times(rows_of(tmp_path / "off"))
    found, expected = (checkpoint(tmp_path / halves)["policy"] for halves in ("on", "off"))
    assert_same(found, expected)


def test_an_eager_run_in_halves_learns_almost_the_same(tmp_path):
    """A product of matrices of half the rows may differ in its last bits, which two updates leave below 0.1 %."""
    for halves in ("on", "off"):
        settings = {"env_id": "Pendulum-v1", "num_iterations": 2, "num_envs": 4, "env_halves": halves}
        train(tiny(tmp_path / halves, vectorization="grouped", **settings))
    for row, other in zip(rows_of(tmp_path / "on"), rows_of(tmp_path / "off"), strict=True):
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), rel=1e-3)
        assert row["global_step"] == other["global_step"]


def test_a_run_goes_on_without_halves(tmp_path):
    """--env-halves may change on --resume."""
    train(tiny(tmp_path / "run", **WALK, num_minibatches=2, env_halves="on"))
    summary = train(resume=str(tmp_path / "run"), env_halves="off", num_iterations=6).summary
    assert (summary["env_halves"], summary["iterations"]) == ("off", 6)


@pytest.mark.parametrize("kind", ["envpool", "envpool, lives", "ale"])
@pytest.mark.long
def test_halves_are_seeded_as_the_whole(kind):
    """EnvPool and ALE: environment i of both halves starts and steps as environment i of the whole, with all its numbers."""
    if kind != "ale":
        pytest.importorskip("envpool")
    settings = AtariSettings(frame_skip=4, screen_size=36)
    make = {
        "envpool": lambda number: make_envpool("Pendulum-v1", number, {}, settings),
        "envpool, lives": lambda number: make_envpool("Breakout-v5", number, {}, settings),
        "ale": lambda number: make_ale("ALE/Breakout-v5", number, {}, settings),
    }[kind]
    whole, halves = make(4), HalvesVectorEnv([make(2), make(2)])
    with contextlib.closing(whole), contextlib.closing(halves):
        np.testing.assert_array_equal(halves.reset(seed=5)[0], whole.reset(seed=5)[0])
        whole.action_space.seed(1)
        for step in range(60):
            actions = whole.action_space.sample()
            if step % 2:
                parts = halves.step(actions)
            else:
                for rows, half in zip((actions[:2], actions[2:]), halves.envs, strict=True):
                    half.step_async(rows)
                parts = map(np.concatenate, zip(*(half.step_wait()[:4] for half in halves.envs), strict=True))
            for ours, theirs in zip(list(parts)[:4], whole.step(actions)[:4], strict=True):
                np.testing.assert_array_equal(ours, theirs)


def test_all_environments_of_a_half_are_in_processes():
    """This process acts meanwhile. A half has a process for each core but the one that acts; on a GPU for all cores."""
    for device, most in (("cpu", 1), ("meta", 2)):
        config = EnvConfig("environments:Walk-v0", 8, halves=True)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("fastppo.envs.halves.available_cores", lambda: 2)
            made = make_training_envs(config, device)
        assert made.engine == "gymnasium/grouped"
        assert "halves" in made.reason
        with contextlib.closing(made.envs):
            assert len(multiprocessing.active_children()) == 2 * most
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("number", [0, 3])
def test_an_environment_that_fails_is_named(number):
    """By its number among all environments, whichever half it is in; the processes of both halves end."""
    settings = {**WALK, "env_id": "environments:Failing-v0", "env_timeout": 20.0, "num_envs": 4}
    with prepared(**settings, env_kwargs={"seed": 10 + number, "at": 3, "how": "raise"}, env_halves="on") as (
        _,
        buffers,
        collector,
    ):
        collector.reset(10)
        with pytest.raises(TrainingFault, match=rf"^an environment failed in step 3 of the rollout: environment {number}: "):
            collector.collect(lambda obs, noise: torch.zeros(2, dtype=torch.int64), buffers.noise)
        assert collector.snapshot()["obs"].shape[:2] == (10, 4)
    assert not multiprocessing.active_children()


def test_a_number_that_is_not_finite_is_named():
    """By its number among all environments."""
    with prepared(**WALK, env_halves="on") as (_, buffers, collector):
        write = collector.parts[1]._write_step

        def broken(t, step):
            if t == 4:
                step.reward[1] = np.nan
            write(t, step)

        collector.parts[1]._write_step = broken
        with pytest.raises(TrainingFault, match=r"^reward of environment 4 is not finite \(nan\) after step 4 of the rollout"):
            collector.collect(lambda obs, noise: torch.zeros(3, dtype=torch.int64), buffers.noise)


def test_numbers_of_a_group_begin_where_it_says():
    """Environments that all run in other processes: none in this one, and the spaces are those of the first."""
    envs = GroupedVectorEnv([Walk] * 4, 2, first=4)
    with contextlib.closing(envs):
        assert len(multiprocessing.active_children()) == 2
        assert envs.single_observation_space == Walk.observation_space
        envs.reset(seed=1)
        for child in multiprocessing.active_children():
            child.kill()
        with pytest.raises(EnvironmentFailed, match=r"^environments 4 to 5: the process was killed by signal 9$"):
            envs.step(np.zeros(4, np.int64))


REFUSED = {
    "odd": ({"num_envs": 5}, "--env-halves on needs an even --num-envs, got 5; nearest: --num-envs 4 or 6"),
    "one": ({"num_envs": 1}, "--env-halves on needs an even --num-envs, got 1; nearest: --num-envs 2"),
    "seeds": ({"num_seeds": 3}, "--env-halves on is for one seed: with --num-seeds 3 leave it off"),
    "torch": (
        {"backend": "torch"},
        "--env-halves on is for environments on the host, and --backend torch has none: leave it off",
    ),
    "sync": (
        {"vectorization": "sync"},
        "--env-halves on: --vectorization sync steps environments while the policy waits; "
        "use --vectorization grouped, or leave it off",
    ),
    "its own vector class": (
        {},
        "--env-halves on: CartPole-v1 is stepped while the policy waits: use --vectorization grouped, or leave it off",
    ),
    "only a vector class": (
        {"env_id": "environments:WalkVector-v0"},
        "--env-halves on: environments:WalkVector-v0 is stepped while the policy waits: leave it off",
    ),
    "colour": (
        {"env_id": "ALE/Breakout-v5", "atari_grayscale": False},
        "--env-halves on: ALE/Breakout-v5 is stepped while the policy waits: leave it off",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_halves_are_not_for(case, tmp_path):
    """One line that names the flag and what to do; nothing is written, and nothing goes on running."""
    settings, message = REFUSED[case]
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        train(tiny(tmp_path / "run", **{"num_envs": 4, "env_halves": "on", "check_env": False, **settings}))
    assert not (tmp_path / "run").exists()
    assert not multiprocessing.active_children()


def test_halves_of_several_processes():
    """Each halves its own environments, so each needs an even number."""
    ranks = PretendedRanks(0, 2, 0, torch.device("cpu"))
    settings = {"num_steps": 8, "num_minibatches": 2, "env_halves": "on"}
    config, _ = with_shards(TrainConfig(num_envs=8, **settings), ranks)
    assert share_of(config, ranks).num_envs == 4
    message = "--env-halves on halves the 3 environments of each of 2 processes: --num-envs must be a multiple of 4"
    with pytest.raises(UsageError, match=f"^{message}$"):
        with_shards(TrainConfig(num_envs=6, **settings), ranks)


class OnStep(Callback):
    """Watches steps."""

    def on_step(self, step):
        pass


def test_what_halves_have_not(tmp_path):
    """A step of all environments to be watched; environments of the user's own; several agents."""
    with pytest.raises(UsageError, match=r"^OnStep.on_step: --env-halves on has no step of all environments; leave it off$"):
        train(tiny(tmp_path / "run", **WALK, num_minibatches=2, env_halves="on"), callbacks=[OnStep()])
    with pytest.raises(
        UsageError, match=r"^--env-halves on makes environments from --env-id, which yours were not: leave it off"
    ):
        train(tiny(tmp_path / "run", env_halves="on"), envs=[Walk(), Walk()])
    pytest.importorskip("pettingzoo")
    with pytest.raises(
        UsageError, match=r"^--env-halves on is for one agent, and parallel_envs:Team has several: leave it off"
    ):
        train(tiny(tmp_path / "run", env_id="parallel_envs:Team", vectorization="grouped", env_halves="on"))
    assert not multiprocessing.active_children()


# --- the trial of `auto`


@pytest.fixture
def gpu(monkeypatch):
    """PyTorch says that there is one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def trainer(**seconds):
    """A `train` whose iterations take so long, by --env-halves; an exception is raised. Keeps what it was given."""

    def train(config, callback):
        train.given.append(config.env_halves)
        taken = seconds[config.env_halves]
        if isinstance(taken, Exception):
            raise taken
        for iteration in range(1, config.num_iterations + 1):
            view = type("View", (), {"iteration": iteration, "metrics": {"seconds": taken * iteration}})
            callback(view)

    train.given = []
    return train


LONG = TrainConfig(device="cuda")


@pytest.mark.parametrize(("on", "chosen", "other"), [(0.01, "on", "off"), (0.018, "on", "off"), (0.019, "off", "on")])
def test_halves_are_taken_where_they_are_clearly_faster(gpu, on, chosen, other):
    """With both numbers in one line."""
    train = trainer(on=on, off=0.02)
    trial = try_halves(LONG, True, train, None)
    assert train.given == ["on", "off"]
    assert trial.chosen == chosen
    assert trial.note == (
        f"--env-halves {chosen}, after a trial: {1e3 * on:.3g} ms an iteration in halves, 20 ms an iteration without "
        f"(--env-halves {other} takes the other)"
    )
    assert trial.summary == pytest.approx({"on": on, "off": 0.02})


def test_what_is_known_is_not_measured_again(gpu):
    """The trial of --device auto has trained without halves."""
    train = trainer(on=0.01)
    assert try_halves(LONG, True, train, 0.03).off == 0.03
    assert train.given == ["on"]


@pytest.mark.parametrize("error", [TrainingFault("hangs"), RuntimeError("no kernel image")])
def test_halves_that_fail_are_not_taken(gpu, error):
    """The run goes on without them, and says so."""
    trial = try_halves(LONG, True, trainer(on=error, off=0.02), None)
    assert (trial.chosen, trial.summary["on"]) == ("off", None)
    assert "failed in halves, 20 ms an iteration without" in trial.note
    assert HalvesTrial(float("inf"), float("inf")).chosen == "off"


@pytest.mark.parametrize(
    ("settings", "is_alone"),
    [
        ({"device": "cpu"}, True),
        ({"env_halves": "off"}, True),
        ({"env_halves": "on"}, True),
        ({"resume": "runs/other"}, True),
        ({"num_iterations": 10}, True),
        ({"num_envs": 5, "num_minibatches": 5}, True),
        ({"num_seeds": 2}, True),
        ({"backend": "torch"}, True),
        ({}, False),
    ],
    ids=str,
)
def test_no_trial_where_nothing_is_to_choose(gpu, settings, is_alone):
    """On a CPU, with the setting given, for a run that is resumed, short or not to be halved: it costs nothing."""
    never = trainer()
    assert try_halves(TrainConfig(**{"device": "cuda", **settings}), is_alone, never, None) is None
    assert never.given == []


def test_environments_without_halves_end_the_trial(gpu):
    """As in a run that asks for them; no line, since the user has not."""
    train = trainer(on=UsageError("--env-halves on: ..."))
    assert try_halves(LONG, True, train, None) is None
    assert train.given == ["on"]


def test_no_trial_without_a_gpu():
    """A CPU is shared by acting and stepping."""
    assert try_halves(TrainConfig(), True, trainer(), None) is None


@pytest.mark.parametrize("chosen", ["on", "off"])
@pytest.mark.long
def test_a_run_trains_as_the_trial_says(chosen, tmp_path, monkeypatch, capsys):
    """Told once, in summary.json and config.json, and kept on --resume. The GPU is the CPU here."""
    monkeypatch.setattr(device_trial, "WORTH_TRYING", 4)
    monkeypatch.setattr(halves_trial, "BETTER", {"on": 1e6, "off": 0.0}[chosen])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    trained, open_job = [], loop.open_job

    def opened(place, config, *rest):
        trained.append((config.num_iterations, config.env_halves))
        return open_job(place, device_trial.replace(config, device="cpu"), *rest)

    monkeypatch.setattr(loop, "open_job", opened)
    run = tmp_path / "run"
    summary = train(tiny(run, **WALK, num_minibatches=2, device="cuda")).summary
    assert trained == [(device_trial.ITERATIONS, "on"), (device_trial.ITERATIONS, "off"), (4, chosen)]
    assert summary["env_halves"] == chosen
    assert summary["env_halves_trial"]["on"] > 0
    assert capsys.readouterr().out.count(f"--env-halves {chosen}, after a trial: ") == 1
    assert json.loads((run / "config.json").read_text())["env_halves"] == chosen
    train(resume=str(run), num_iterations=5)
    assert trained[3:] == [(5, chosen)]
