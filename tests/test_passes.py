"""`learn` in passes of a bounded number of rows: few of them for any size, each row once, and the result of one pass."""

from itertools import pairwise

import pytest
import torch
from environments import ACTIONS, VECTOR

from fastppo.compile.program import flat_tensors
from fastppo.compile.trace import trace
from fastppo.core.microbatches import split_evenly
from support.programs import (
    CATEGORICAL_POLICY,
    CONTINUOUS,
    DISCRETE,
    CountingPolicy,
    assert_together,
    job,
    make_params,
    make_permutation,
    make_rollout,
    update,
    updates_of,
)
from support.recurrent import make_params as make_recurrent_params
from support.recurrent import make_policy as make_recurrent_policy
from support.recurrent import make_rollout as make_recurrent_rollout

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
MANY = hypothesis.settings(max_examples=60, derandomize=True, database=None, deadline=None)
FEW = hypothesis.settings(MANY, max_examples=25)
DOUBLE = {"rtol": 1e-9, "atol": 1e-12}  # rounding of float64: a row that is left out or counted twice is far outside


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny tensors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rollout_of_numbers(num_steps, num_envs):
    """A rollout for CountingPolicy: each row's observation and action are its number."""
    number = torch.arange((num_steps + 1) * num_envs).reshape(num_steps + 1, num_envs)
    off = torch.zeros_like(number, dtype=torch.bool)
    rollout = {"obs": number[..., None].float(), "action": number, "reward": torch.zeros_like(number, dtype=torch.float32)}
    return rollout | {"terminated": off, "truncated": off, "valid": ~off}


def passes_of(num_steps, num_envs, minibatch_size, microbatch_size, epochs=1):
    """(rows that each pass over the rollout saw, rows that each pass over each minibatch saw, permutation)."""
    policy, rollout = CountingPolicy(), rollout_of_numbers(num_steps, num_envs)
    permutation = make_permutation(epochs, num_steps * num_envs)
    update(policy, torch.ones(1), rollout, permutation, minibatch_size=minibatch_size, microbatch_size=microbatch_size)
    shown = torch.tensor([len(seen) for seen in policy.seen]).cumsum(0)
    evaluated = int((shown < (num_steps + 1) * num_envs).sum()) + 1  # passes until every row of the rollout was seen
    return policy.seen[:evaluated], policy.seen[evaluated:], permutation


@MANY
@hypothesis.given(number=st.integers(1, 10_000), most=st.integers(-1, 3_000))
def test_split_evenly(number, most):
    """At most one pass more than needed, none of them empty, too large, or much smaller than another."""
    passes, size = split_evenly(number, most)
    fewest = -(-number // max(most, 1))
    assert fewest <= passes <= fewest + 1
    assert 1 <= size <= max(most, 1)
    assert 0 <= passes * size - number < min(size, passes)


def test_a_prime_number_of_rows_takes_few_passes():
    """T = 256 evaluates 257 steps, and 1021 rows of a minibatch have no divisor: neither goes through in passes of one."""
    evaluated, learned, _ = passes_of(256, 8, 1024, 1024)
    assert len(evaluated) <= 4
    assert len(learned) == 2
    evaluated, learned, _ = passes_of(1021, 1, 1021, 512)
    assert (len(evaluated), len(learned)) == (2, 2)


@MANY
@hypothesis.given(
    num_steps=st.integers(1, 40), num_envs=st.integers(1, 6), parts=st.integers(1, 6), microbatch_size=st.integers(1, 60)
)
def test_every_row_in_passes_of_bounded_size(num_steps, num_envs, parts, microbatch_size):
    """The passes over the rollout show its rows in order; those over a minibatch its rows in order; sizes are all alike.

    What fills up a last pass are copies of the row before.
    """
    batch_size = num_steps * num_envs
    minibatch_size = next(batch_size // k for k in range(parts, 0, -1) if batch_size % k == 0)
    evaluated, learned, permutation = passes_of(num_steps, num_envs, minibatch_size, microbatch_size)
    rows = (num_steps + 1) * num_envs
    per_minibatch = len(learned) * minibatch_size // batch_size
    assert len(evaluated) <= -(-rows // microbatch_size) + 1
    assert per_minibatch <= -(-minibatch_size // microbatch_size) + 1
    minibatches = [learned[start : start + per_minibatch] for start in range(0, len(learned), per_minibatch)]
    wanted = [torch.arange(rows), *permutation.reshape(-1, minibatch_size)]
    for passes, order in zip([evaluated, *minibatches], wanted, strict=True):
        assert all(len(one) == len(other) <= microbatch_size for one, other in pairwise([*passes, passes[0]]))
        shown = torch.cat(passes)
        assert torch.equal(shown[: len(order)], order)
        assert (shown[len(order) :] == order[-1]).all()


@FEW
@hypothesis.given(
    num_steps=st.integers(2, 24),
    num_envs=st.integers(2, 6),
    parts=st.integers(1, 4),
    microbatch_size=st.integers(1, 40),
    options=st.sampled_from(
        [
            {},
            {"target_kl": 0.02},
            {"advantage_estimator": "monte-carlo", "norm_returns": True, "norm_adv": False, "clip_vloss": False},
        ]
    ),
    final=st.booleans(),
)
@pytest.mark.parametrize("policy", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
def test_passes_change_nothing(policy, num_steps, num_envs, parts, microbatch_size, options, final):
    """Parameters, Adam's state and every metric, in float64, rows that are no transitions and the KL stop included."""
    batch_size = num_steps * num_envs
    minibatch_size = next(batch_size // k for k in range(parts, 0, -1) if batch_size % k == 0)
    params = make_params(policy, dtype=torch.float64)
    rollout = make_rollout(policy, num_steps, num_envs, dtype=torch.float64)
    if final:
        rollout["final_obs"] = rollout["obs"].flip(0)
    options = {"minibatch_size": minibatch_size, **options}
    whole = update(policy, params, rollout, make_permutation(2, batch_size), **options)
    parts = update(policy, params, rollout, make_permutation(2, batch_size), microbatch_size=microbatch_size, **options)
    torch.testing.assert_close(parts, whole, **DOUBLE)


@FEW
@hypothesis.given(
    num_steps=st.integers(1, 16),
    num_envs=st.integers(1, 7),
    all_at_once=st.booleans(),
    microbatch_size=st.integers(1, 60),
    kind=st.sampled_from(["lstm", "gru"]),
)
def test_passes_change_nothing_with_a_memory(num_steps, num_envs, all_at_once, microbatch_size, kind):
    """A memory is carried over the passes, whatever fills up the last one, and sequences stay whole."""
    policy, spec, action = make_recurrent_policy(kind, observation=VECTOR, action=ACTIONS["discrete"])
    params = make_recurrent_params(policy)
    rollout = make_recurrent_rollout(policy, spec, action, params, VECTOR, num_steps, num_envs)
    options = {"minibatch_size": num_steps * (num_envs if all_at_once else 1)}
    whole = update(policy, params, rollout, make_permutation(2, num_envs), **options)
    parts = update(policy, params, rollout, make_permutation(2, num_envs), microbatch_size=microbatch_size, **options)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("microbatch_size", [3, 5, 7])
def test_workers_in_passes_that_do_not_divide(microbatch_size):
    """Two workers of 17 rows of a minibatch each, in passes of 3, 5 and 7: together the update of one."""
    params, rollout, permutation = make_params(DISCRETE), make_rollout(DISCRETE, 17, 4), make_permutation(2, 68)
    options = {"minibatch_size": 34}
    expected = update(DISCRETE, params, rollout, permutation, **options)
    results = updates_of(2, DISCRETE, params, rollout, permutation, microbatch_size=microbatch_size, **options)
    assert_together(results, expected, rtol=1e-4, atol=1e-5)


def test_the_traced_form_fills_up_its_last_pass_too():
    """The graph that the compiler is given, where neither the rollout's 68 rows nor a minibatch's 16 fill passes of 3."""
    learn_eagerly, arguments = job(CATEGORICAL_POLICY, microbatch_size=3)
    graph, _ = trace(learn_eagerly, arguments)
    params, *rest = graph(*flat_tensors(arguments))
    expected = job(CATEGORICAL_POLICY)[0](*arguments)
    torch.testing.assert_close(params, expected.params, rtol=2e-4, atol=2e-6)
    torch.testing.assert_close(rest[3], expected.minibatch_metrics, rtol=2e-4, atol=2e-6)
