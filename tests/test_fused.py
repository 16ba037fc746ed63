"""The fused `learn` and `act` in C++ equal the eager ones, for every network, space and setting that they cover."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastppo.core.acting import act_from_params
from fastppo.core.contracts import obs_of
from fastppo.core.minibatches import draw_permutation
from fastppo.core.ppo import MINIBATCH_METRICS, SUMMARY, learn
from fastppo.core.seed_axis import SeedAxis, stack
from fastppo.fused import operators
from fastppo.fused.kernels import Kernels
from fastppo.fused.mlp_programs import FusedAct, FusedLearn, ThreadCount, covers
from fastppo.policy.actor_critic import ActorCritic
from fastppo.policy.distributions import CATEGORICAL, DIAGONAL_NORMAL
from fastppo.policy.encoder import Encoder
from fastppo.policy.mlp import MLPActorCritic
from fastppo.policy.spaces import ObsLeaf
from support.fused import WIDE, arguments_of, assert_same, both, mlps, with_mask
from support.learn_settings import learn_settings, split
from support.programs import Rendezvous

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture(scope="module")
def kernels(needs_compiler):
    Kernels().ready(wait=True)


@st.composite
def networks(draw):
    mlp = draw(mlps())
    return with_mask(mlp) if mlp.distribution is not DIAGONAL_NORMAL and draw(st.booleans()) else mlp


@settings(max_examples=120)
@given(
    network=networks(),
    seed=st.integers(0, 1000),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(1, 3)),
    parts=st.integers(1, 3),
    normalized=st.booleans(),
    final_obs=st.booleans(),
    options=st.fixed_dictionaries(
        {
            "advantage_estimator": st.sampled_from(["gae", "monte-carlo"]),
            "norm_returns": st.booleans(),
            "norm_adv": st.booleans(),
            "clip_reward": st.booleans(),
            "clip_vloss": st.booleans(),
            "recompute_advantage": st.booleans(),
            "target_kl": st.sampled_from([None, 1e-3]),
            "max_grad_norm": st.sampled_from([0.5, 100.0]),
            "gamma": st.sampled_from([0.9, 1.0]),
        }
    ),
)
def test_an_update_equals_the_eager_one(network, seed, shape, parts, normalized, final_obs, options):
    """All results of `learn`, over networks, shapes, spaces, masks, ends and settings."""
    num_steps, num_envs, epochs = shape
    rows = num_steps * num_envs
    divisor = next(d for d in (3, 2, 1) if rows % d == 0)
    numbers, others = split(options)
    arguments = arguments_of(network, num_steps, num_envs, epochs, seed, normalized, final_obs, **numbers)
    assert_same(*both(network, arguments, parts, minibatch_size=rows // divisor, **others))


def test_many_rows_in_parts_equal_the_eager_update():
    """Blocks, tiles and parts that do not divide the rows evenly."""
    arguments = arguments_of(WIDE, 50, 7, spread=0.05)
    for parts in (1, 2, 3, 5):
        assert_same(*both(WIDE, arguments, parts, minibatch_size=175))


def test_the_number_of_threads_changes_no_bit():
    """Bits depend on the parts alone, so threads may come and go with the machine's load."""
    arguments = arguments_of(WIDE, 32, 8)
    learned = FusedLearn(WIDE, learn_settings(minibatch_size=64)["config"], 4)
    results = []
    for number in (1, 2, 3, 4):
        learned.threads.number = number
        results.append(learned.with_threads(number, *arguments))
    for result in results[1:]:
        for name, one, other in zip(result._fields, result, results[0], strict=True):
            same = all(map(torch.equal, one, other)) if isinstance(one, tuple) else torch.equal(one, other)
            assert same, name


@pytest.mark.parametrize("options", [{}, {"norm_returns": True, "recompute_advantage": True}], ids=["", "recomputed"])
def test_a_kl_stop_stops_all_later_minibatches(options):
    """After target_kl is passed nothing moves, the critic's units neither; the two agree on which minibatch that is."""
    arguments = arguments_of(WIDE, 32, 8, epochs=6, spread=0.05, target_kl=1e-4)
    fused, eager = both(WIDE, arguments, minibatch_size=32, **options)
    applied = MINIBATCH_METRICS.index("applied")
    assert torch.equal(fused.minibatch_metrics[:, applied], eager.minibatch_metrics[:, applied])
    assert 0 < fused.minibatch_metrics[:, applied].sum() < len(fused.minibatch_metrics)
    assert_same(fused, eager)


def test_a_minibatch_without_a_transition_moves_nothing():
    """Rows that only reset: no gradient, no step of Adam."""
    arguments = arguments_of(WIDE, 8, 4)
    arguments[2]["valid"][:] = False
    fused, eager = both(WIDE, arguments, minibatch_size=16)
    assert torch.equal(fused.params, arguments[0])
    assert_same(fused, eager)


def test_seeds_learn_as_if_alone():
    """Each of S seeds gets the bits of a call with its own tensors."""
    each = [arguments_of(WIDE, 8, 4, seed=seed, normalized=True) for seed in range(3)]
    config = learn_settings(minibatch_size=16)["config"]
    together = FusedLearn(WIDE, config, 2, SeedAxis(3))(*stack(each))
    for seed, arguments in enumerate(each):
        assert torch.equal(together.params[seed], FusedLearn(WIDE, config, 1)(*arguments).params)


@pytest.mark.parametrize(
    "options",
    [
        {"advantage_estimator": "monte-carlo", "norm_returns": True, "recompute_advantage": True},
        {"target_kl": 3e-3},
        {"recompute_advantage": True},
    ],
    ids=str,
)
def test_ranks_learn_as_one_does(options):
    """Three processes with a third of the environments each, in two parts: one update of all rows, and equal bits in each."""
    ranks, steps, envs, size = 3, 16, 6, 24
    numbers, others = split(options)
    params, adam, rollout, _, *rest = arguments_of(WIDE, steps, envs, spread=0.05, learning_rate=0.03, **numbers)
    meeting = Rendezvous(ranks)

    def permutation(**of_rank):
        out = torch.empty(2, steps * envs // of_rank.get("num_ranks", 1), dtype=torch.int64)
        draw_permutation(out, torch.Generator().manual_seed(3), steps, envs, size, ranks, **of_rank)
        return out

    def work(rank):
        own = {key: x.chunk(ranks, 1)[rank].contiguous() for key, x in rollout.items()}
        config = learn_settings(minibatch_size=size // ranks, **others)["config"]
        learned = FusedLearn(WIDE, config, 2, ranks=meeting.of(rank))
        return learned(params, adam, own, permutation(rank=rank, num_ranks=ranks), *rest)

    config = learn_settings(minibatch_size=size, **others)["config"]
    expected = learn(params, adam, rollout, permutation(), *rest, policy=WIDE, config=config)
    with ThreadPoolExecutor(ranks) as pool:
        results = list(pool.map(work, range(ranks)))
    assert ("target_kl" in options) == (expected.summary[SUMMARY.index("updates")] < len(expected.minibatch_metrics))
    for result in results:
        assert_same(result, expected)
        assert torch.equal(result.params, results[0].params)
        assert torch.equal(result.minibatch_metrics, results[0].minibatch_metrics)


def test_a_process_that_is_gone_is_the_error_that_the_exchange_raised():
    """At whichever exchange: none goes on with the sums of some."""
    arguments = arguments_of(WIDE, 8, 4)
    config = learn_settings(minibatch_size=16)["config"]
    for number in (0, 1, 3, 6, 7):
        calls = iter(range(number))

        def all_reduce(x, calls=calls):
            if next(calls, None) is None:
                raise ConnectionError("rank 1 is gone")
            return x + x

        ranks = SimpleNamespace(rank=0, size=2, all_reduce=all_reduce)
        with pytest.raises(ConnectionError, match="rank 1 is gone"):
            FusedLearn(WIDE, config, 2, ranks=ranks)(*arguments)


@settings(max_examples=60)
@given(networks(), st.integers(0, 1000), st.integers(1, 100), st.booleans(), st.integers(1, 2))
def test_actions_are_the_eager_ones(network, seed, rows, normalized, threads):
    """`act` over networks, spaces, masks and numbers of environments."""
    params, _, rollout, _, _, normalization = arguments_of(network, 1, rows, seed=seed, normalized=normalized)
    obs = obs_of({key: x[0] for key, x in rollout.items()})
    size = (network.mlp if isinstance(network, ActorCritic) else network).action_size
    noise = torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))
    action = FusedAct(network, threads)(params, normalization, obs, noise)
    eager = act_from_params(params, normalization, obs, noise, policy=network)
    torch.testing.assert_close(action, eager, rtol=1e-4, atol=1e-5)


def test_large_calls_of_act_are_shared_by_threads():
    """4,096 environments on two threads: the same actions."""
    params, _, rollout, _, _, normalization = arguments_of(WIDE, 1, 4096)
    obs, noise = rollout["obs"][0], torch.randn(4096, 6)
    torch.testing.assert_close(
        FusedAct(WIDE, 2)(params, normalization, obs, noise),
        act_from_params(params, normalization, obs, noise, policy=WIDE),
        rtol=1e-4,
        atol=1e-5,
    )


def test_seeds_act_as_if_alone():
    """Actions of S seeds in one call, each under its own parameters and statistics."""
    each = [arguments_of(WIDE, 1, 5, seed=seed, normalized=True) for seed in range(3)]
    noise = torch.randn(3, 5, 6)
    params, obs = torch.stack([a[0] for a in each]), torch.stack([a[2]["obs"][0] for a in each])
    normalization = stack([a[5]._replace(obs_mean={"obs": a[5].obs_mean["obs"] + seed}) for seed, a in enumerate(each)])
    together = FusedAct(WIDE, 1, SeedAxis(3))(params, normalization, obs, noise)
    for seed, arguments in enumerate(each):
        own = arguments[5]._replace(obs_mean={"obs": arguments[5].obs_mean["obs"] + seed})
        assert torch.equal(together[seed], FusedAct(WIDE, 1)(arguments[0], own, arguments[2]["obs"][0], noise[seed]))


def operator_arguments():
    params, adam, rollout, permutation, numbers, normalization = arguments_of(MLPActorCritic(3, 2, CATEGORICAL, (8,)), 4, 2)
    return (
        *(params, list(adam), rollout["obs"], None, None, rollout["action"].unsqueeze(-1)),
        [rollout[key] for key in ("reward", "terminated", "truncated", "valid")],
        *(permutation, list(numbers), None, [normalization.return_mean, normalization.return_std]),
        *([3, 2, 0, 0, 0, 1, 8, 2], 4, [0, 0, 1, 0, 1, 0], [1, 1, 0, 1, 0]),
    )


def test_the_operators_are_torchs():
    """Schema, fake tensors and dispatch, as torch itself checks them."""
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.mlp_learn, operator_arguments(), test_utils=checks)
    network = [3, 2, 0, 0, 0, 1, 8, 2]
    act_arguments = (torch.randn(3 * 8 + 8 + 8 * 3 + 3), torch.randn(5, 3), None, torch.randn(5, 2), network, 1)
    torch.library.opcheck(operators.mlp_act, act_arguments, test_utils=checks)


@pytest.mark.parametrize(("place", "tensor"), [(0, torch.zeros(3)), (2, torch.zeros(5, 2, 3).double()), (7, torch.zeros(2, 8))])
def test_tensors_that_do_not_fit_are_refused(place, tensor):
    """C++ checks nothing: a wrong shape or type is an error before it."""
    arguments = list(operator_arguments())
    arguments[place] = tensor
    with pytest.raises(ValueError, match="expected a contiguous"):
        operators.mlp_learn(*arguments)


def test_images_and_modules_are_not_covered():
    """A network with convolutions is left to the other forms."""
    image = ObsLeaf("obs", (), (4, 84, 84), torch.uint8, "image", 1 / 255)
    mlp = MLPActorCritic(512, 2, CATEGORICAL, ())
    assert not covers(ActorCritic(Encoder((image,)), mlp))
    assert covers(with_mask(MLPActorCritic(3, 2, CATEGORICAL)))


def test_the_faster_number_of_threads_is_kept():
    """Two threads on a quiet machine; one where two are slower; and two again once they are faster."""
    threads, slow = ThreadCount(2), {1: 1.0, 2: 0.6}
    numbers = []
    for call in range(400):
        if call == 100:
            slow = {1: 1.0, 2: 5.0}
        elif call == 250:
            slow = {1: 1.0, 2: 0.6}
        numbers.append(threads.number)
        threads.took(slow[threads.number])
    assert numbers[10:49] == [2] * 39
    assert numbers[110:149] == [1] * 39
    assert numbers[390:399] == [2] * 9
