"""The comparison of a fast form with the eager one: rounding passes, a wrong term does not."""

import pytest
import torch

from fastppo.compile.compile_errors import CompileError
from fastppo.compile.verification import (
    FEW_MINIBATCHES,
    FEW_STEPS,
    TOLERANCE,
    Verified,
    deviation_of_act,
    deviation_of_collect,
    deviation_of_learn,
    first_minibatches,
)
from fastppo.core.contracts import CollectResult
from fastppo.core.ppo import MINIBATCH_METRICS
from support.learn_settings import split, with_settings
from support.programs import CATEGORICAL_POLICY, NORMAL_POLICY, job

POLICIES = pytest.mark.parametrize("policy", [CATEGORICAL_POLICY, NORMAL_POLICY], ids=["categorical", "normal"])


@POLICIES
def test_another_order_of_sums_is_rounding(policy):
    """Minibatches in parts of four rows: the same update but for the last bits, and far from the tolerance."""
    learn, arguments = job(policy, normalized=True)
    eager, result = learn(*arguments), with_settings(learn, microbatch_size=4)(*arguments)
    assert not torch.equal(eager.params, result.params)
    assert 0.0 < deviation_of_learn(result, eager, arguments) < TOLERANCE / 50
    assert deviation_of_learn(eager, eager, arguments) == 0.0


@POLICIES
@pytest.mark.parametrize(
    "wrong",
    [{"vf_coef": 0.0}, {"gamma": 0.9}, {"norm_adv": False}, {"max_grad_norm": 0.1}, {"clip_vloss": False, "gae_lambda": 0.5}],
    ids=str,
)
def test_a_wrong_term_is_none(policy, wrong):
    """A coefficient left out, another discount, no normalisation, another bound: above the tolerance each."""
    numbers, settings = split(wrong)
    learn, arguments = job(policy, normalized=True)
    others = job(policy, normalized=True, **numbers)[1]
    result, eager = with_settings(learn, **settings)(*others), learn(*arguments)
    assert deviation_of_learn(result, eager, arguments) > TOLERANCE


def test_nan_is_compared_too():
    """In the same places: equal. In one of the two: never right."""
    learn, arguments = job(NORMAL_POLICY)
    eager = learn(*arguments)
    spoilt = eager._replace(minibatch_metrics=eager.minibatch_metrics.clone())
    spoilt.minibatch_metrics[0, MINIBATCH_METRICS.index("applied")] = torch.nan
    assert deviation_of_learn(spoilt, eager, arguments) == float("inf")
    assert deviation_of_learn(eager, spoilt, arguments) == float("inf")
    assert deviation_of_learn(spoilt, spoilt, arguments) == 0.0


def test_an_update_that_overflows_says_nothing():
    """Its eager result is taken, and the next update is compared; nothing is reported of the fast form."""
    learn, arguments = job(NORMAL_POLICY)
    rollout = {key: x.clone() for key, x in arguments[2].items()}
    rollout["reward"].fill_(1e30)
    reports, calls = [], []

    def fast(*args):
        calls.append(args)
        return learn(*args)

    verified = Verified(fast, learn, deviation_of_learn, reports.append)
    assert verified(*arguments[:2], rollout, *arguments[3:]).params.isnan().any()
    assert (reports, calls) == ([], [])
    verified(*arguments)
    assert (reports, len(calls)) == ([0.0], 1)


def test_the_first_minibatches_are_those_of_the_update():
    """Eight of the first epochs, of two at least, for one seed and for many; all else as it was."""
    permutation = torch.arange(2 * 3 * 40).view(2, 3, 40)
    few = first_minibatches(10, ("params", "adam", "rollout", permutation, "schedule", "normalization"))
    assert (few[:3], few[4:]) == (("params", "adam", "rollout"), ("schedule", "normalization"))
    assert few[3].shape == (2, 2, 40)
    assert few[3][0].flatten().tolist() == list(range(80))
    assert few[3][1].flatten().tolist() == list(range(120, 200))
    (alone,) = first_minibatches(10, ("", "", "", permutation[0]))[3:]
    assert torch.equal(alone, few[3][0])
    (long,) = first_minibatches(10, ("", "", "", torch.arange(3 * 200).view(3, 200)))[3:]
    assert long.tolist() == [list(range(40)), list(range(200, 240))]
    (short,) = first_minibatches(10, ("", "", "", torch.arange(20 * 10).view(20, 10)))[3:]
    assert short.flatten().tolist() == list(range(FEW_MINIBATCHES * 10))
    (single,) = first_minibatches(10, ("", "", "", torch.arange(200).view(1, 200)))[3:]
    assert single.tolist() == [list(range(FEW_MINIBATCHES * 10))]


def test_actions_that_differ_are_counted():
    """A choice at a rounding is one of many; memory that differs counts by itself."""
    action = torch.zeros(50, dtype=torch.int64)
    other = action.clone()
    other[:3] = 1
    assert deviation_of_act(other, action, ()) == pytest.approx(0.06)
    state = torch.linspace(-1, 1, 100)
    assert deviation_of_act((action, state + 1e-6), (action, state), ()) == 0.0
    assert deviation_of_act((action, state + 0.1), (action, state), ()) == 1.0


def test_trajectories_may_part_after_the_first_steps():
    """Later steps follow from a rounding of the first; a difference in those is none."""

    def collected(changed):
        obs = torch.zeros(9, 2, 3)
        obs[changed] = 1.0
        return CollectResult((), obs, *[torch.zeros(8, 2)] * (len(CollectResult._fields) - 2))

    assert deviation_of_collect(collected(FEW_STEPS), collected(8), ()) == 0.0
    assert deviation_of_collect(collected(FEW_STEPS - 1), collected(8), ()) == pytest.approx(1 / FEW_STEPS)


@pytest.mark.parametrize("deviation", [TOLERANCE, 1.01 * TOLERANCE, float("nan")])
@pytest.mark.parametrize("shortened", [False, True])
def test_the_form_that_was_chosen_stays(shortened, deviation):
    """Both are called once, on few minibatches if need be; the result is of all arguments, of the form that was chosen."""
    calls, told = [], []

    def form(name):
        return lambda *args: calls.append((name, args)) or (name, args)

    shorten = (lambda args: args[:1]) if shortened else None
    program = Verified(form("fast"), form("eager"), lambda *_: deviation, told.append, shorten)
    right = "fast" if deviation <= TOLERANCE else "eager"
    compared = (1,) if shortened else (1, 2)
    assert program(1, 2) == (right, (1, 2))
    assert calls == [("eager", compared), ("fast", compared), *[(right, (1, 2))] * shortened]
    assert program(3) == (right, (3,))
    assert len(told) == 1


@pytest.mark.parametrize("error", [ValueError("another shape"), CompileError("other threads")], ids=repr)
def test_a_fast_form_that_refuses_its_arguments_is_dropped(error):
    """The eager result is returned, now and later."""

    def refusing(*_):
        raise error

    told = []
    program = Verified(refusing, lambda *args: args, lambda *_: 0.0, told.append)
    assert (program(1), program(2)) == ((1,), (2,))
    assert told == [float("inf")]
