"""Threads of eager learning: fewer where more are slower, told and recorded. Times are made up: no machine has to be busy."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from fastppo import train
from fastppo.training import setup
from fastppo.training.reproducibility import guarantees
from fastppo.training.thread_trial import PATIENCE, ROUNDS, TRIAL_SECONDS, Choice, Watch, choose, minibatch_of
from support.runs import tiny

CPU = torch.device("cpu")


class Machine:
    """A clock, and work that takes so many seconds with so many threads."""

    def __init__(self, **seconds):
        self.seconds = {int(name.removeprefix("t")): taken for name, taken in seconds.items()}
        self.now, self.calls = 0.0, []

    def clock(self):
        return self.now

    def work(self):
        number = torch.get_num_threads()
        self.calls.append(number)
        self.now += self.seconds[number]


@pytest.fixture(autouse=True)
def threads():
    """torch's number, two in these tests, is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("seconds", "number"),
    [
        ({"t2": 0.010, "t1": 0.018}, 2),
        ({"t2": 0.130, "t1": 0.010}, 1),
        ({"t2": 0.011, "t1": 0.010}, 2),  # not clearly
        ({"t8": 0.10, "t4": 0.01, "t2": 0.02, "t1": 0.04}, 4),
        ({"t6": 0.5, "t3": 0.4, "t1": 0.1}, 1),
    ],
)
def test_the_fastest_number_is_chosen(seconds, number):
    """The most there might be, unless fewer are clearly faster; torch's number is left as it was."""
    machine = Machine(**seconds)
    most = max(machine.seconds)
    choice = choose(machine.work, most, machine.clock)
    assert (choice.number, choice.most) == (number, most)
    assert torch.get_num_threads() == 2
    assert (choice.note is None) == (number == most)


def test_a_trial_is_short():
    """A few rounds of quick work, one of slow work, beside the first time of each number."""
    machine = Machine(t2=0.001, t1=0.001)
    choose(machine.work, 2, machine.clock)
    assert len(machine.calls) == 2 * (ROUNDS + 1)
    machine = Machine(t2=2 * TRIAL_SECONDS, t1=2 * TRIAL_SECONDS)
    choose(machine.work, 2, machine.clock)
    assert len(machine.calls) == 4


def test_a_trial_that_fails_leaves_the_threads_as_they_were():
    """The error is whoever's it was."""

    def fails():
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        choose(fails, 4)
    assert torch.get_num_threads() == 2


def test_the_line_says_what_was_measured():
    """And how to have it otherwise."""
    machine = Machine(t2=0.132, t1=0.010)
    assert choose(machine.work, 2, machine.clock).note == (
        "learning with 1 thread: 2 take 13.2 times as long, as they do on a busy machine (--num-threads 2 keeps them)"
    )


def watched(machine, learning):
    """(notes, made_with, threads after each iteration) of a run whose learning takes so long."""
    notes, made_with, numbers = [], {"eager threads": "2"}, []
    watch = Watch(machine.work, notes.append, made_with, machine.clock)
    for iteration, seconds in enumerate(learning):
        watch.update(iteration, seconds)
        numbers.append(torch.get_num_threads())
    return notes, made_with, numbers


def test_a_machine_that_becomes_busy_is_noticed():
    """After some slow iterations in a row; fewer threads to the end, in a line and in what the run says of itself."""
    notes, made_with, numbers = watched(Machine(t2=1.3, t1=0.1), [0.1] * 5 + [1.3] * 10)
    assert numbers == [2] * (4 + PATIENCE) + [1] * (11 - PATIENCE)
    assert len(notes) == 1
    assert "learning with 1 thread" in notes[0]
    assert made_with == {"eager threads": f"2, 1 from iteration {5 + PATIENCE} on"}


def test_slow_iterations_alone_change_nothing():
    """Where one thread is no faster, or only one iteration is slow; and trials become rare where they change nothing."""
    machine = Machine(t2=0.1, t1=0.2)
    notes, made_with, numbers = watched(machine, [0.1] + [1.0] * 50)
    assert (notes, made_with, set(numbers)) == ([], {"eager threads": "2"}, {2})
    assert len(machine.calls) <= 4 * 2 * (ROUNDS + 1)
    machine = Machine()
    watched(machine, [0.1, 1.0, 0.1, 1.0, 1.0] * 10)
    assert machine.calls == []


def test_one_thread_is_not_tried_again():
    """There is nothing to fall back to."""
    torch.set_num_threads(1)
    machine = Machine()
    watched(machine, [0.1] + [9.0] * 20)
    assert machine.calls == []


def summary_of(run_dir, monkeypatch, choice, threads=2, **settings):
    """summary.json of a run that may have two threads, or asks `choose_threads`, and whose trial says `choice`."""
    tried = []

    def chosen(trial, most):
        trial()
        tried.append(most)
        return choice

    monkeypatch.setattr(setup, "choose", chosen)
    if threads is not None:
        monkeypatch.setattr(setup, "choose_threads", lambda *_: threads)
    train(tiny(run_dir, **{"hidden_sizes": (8,), "num_iterations": 2, "check_env": False, **settings}))
    assert torch.get_num_threads() == 2
    return json.loads((run_dir / "summary.json").read_text()), tried


def test_a_run_has_the_threads_of_the_trial(tmp_path, monkeypatch, capsys):
    """Told, recorded, and promised: with one thread there is nothing that may change on the way."""
    summary, tried = summary_of(tmp_path / "one", monkeypatch, Choice(1, 2, 9.0))
    assert tried == [2]
    assert summary["made_with"]["eager threads"] == "1"
    assert "learning with 1 thread: 2 take 9.0 times as long" in capsys.readouterr().out
    assert "busy machine" not in summary["reproducibility"][0]
    summary, _ = summary_of(tmp_path / "two", monkeypatch, Choice(2, 2, 1.0))
    assert summary["made_with"]["eager threads"] == "2"
    assert "learning with" not in capsys.readouterr().out
    assert "until the run takes fewer threads because the machine is busy" in summary["reproducibility"][0]


def test_a_number_that_was_given_is_kept(tmp_path, monkeypatch):
    """--num-threads: no trial, and the same bits throughout."""
    summary, tried = summary_of(tmp_path / "run", monkeypatch, None, threads=None, num_threads=2)
    assert tried == []
    assert summary["made_with"]["eager threads"] == "2"
    assert summary["reproducibility"][0].startswith("same seed: the same bits, with")


def test_small_minibatches_need_no_trial(tmp_path, monkeypatch):
    """They have one thread as it is; others as many as there are."""
    _, tried = summary_of(tmp_path / "run", monkeypatch, None, threads=None)
    assert tried == []
    monkeypatch.setattr(setup, "usable_threads", lambda: 7)
    config, sizes = tiny("run", minibatch_size=16), (2**20, 2**19)
    assert [setup.choose_threads(config, SimpleNamespace(num_params=size)) for size in sizes] == [7, 1]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"env_id": "Pendulum-v1", "share_backbone": True},
        {"rnn": "lstm", "num_minibatches": 2},
        {"env_id": "environments:AnySpacesVector-v0", "env_kwargs": {"observation": "masked", "action": "multi-discrete"}},
        {
            "env_id": "environments:AnySpacesVector-v0",
            "env_kwargs": {"observation": "image (C, H, W)"},
            "cnn_size": 8,
        },
        {"num_seeds": 2},
    ],
    ids=["mlp", "continuous", "memory", "masked", "image", "seeds"],
)
def test_every_kind_of_policy_can_be_tried(tmp_path, monkeypatch, settings):
    """The trial runs, and training is that without one."""
    _, tried = summary_of(tmp_path / "run", monkeypatch, Choice(1, 2, 9.0), **settings)
    assert tried == [2]


def test_what_is_promised():
    """What may change the bits on the way is named with the flag that keeps it; nothing else is."""
    assert guarantees(CPU, False, True)[0].startswith("same seed: the same bits, with the versions")
    assert guarantees(CPU, True, True)[0].startswith(
        "same seed: the same bits until the run changes to faster programs (always with --compile on or off), with"
    )
    both = guarantees(CPU, True, True, True)[0]
    assert "--compile on or off and --num-threads" in both
    assert guarantees(torch.device("cuda"), False, True, True) == guarantees(torch.device("cuda"), False, True)


def test_the_trial_is_work_that_threads_can_share(monkeypatch):
    """It goes through the networks with the rows of a minibatch, forward and backward, and writes nothing."""
    import gymnasium as gym

    from fastppo.policy.distributions import CATEGORICAL
    from fastppo.policy.mlp import MLPActorCritic
    from fastppo.policy.spaces import action_spec, obs_spec

    policy = MLPActorCritic(4, 2, CATEGORICAL, (8,))
    params = policy.init(torch.Generator().manual_seed(0))
    before, rows = params.clone(), []
    env = gym.make("CartPole-v1")
    judge = MLPActorCritic.actor_critic
    monkeypatch.setattr(MLPActorCritic, "actor_critic", lambda self, w, obs: rows.append(obs.shape) or judge(self, w, obs))
    obs, action = obs_spec(env.observation_space), action_spec(env.action_space, False)
    gradient, loss = minibatch_of(policy, params, obs, action, 96, 16)()
    assert [math.prod(shape[:-1]) for shape in rows] == [96]
    assert (gradient != 0).any()
    assert loss.isfinite()
    assert torch.equal(params, before)
    wide = obs_spec(gym.spaces.Box(-1, 1, (4,), "float64"), normalize=True)  # kept in 64 bits until they are normalised
    assert wide.observed[0].dtype == torch.float64
    assert minibatch_of(policy, params, wide, action, 96, 16)()[1].isfinite()
