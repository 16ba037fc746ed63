"""The fused update is as exact as the eager one: rounding, clipping, and numbers at the edges of what a float holds."""

import math

import pytest
import torch

from fastppo.core.acting import act_from_params
from fastppo.core.adam import AdamState
from fastppo.core.contracts import Coefficients
from fastppo.core.ppo import MINIBATCH_METRICS, SUMMARY, learn
from fastppo.fused.kernels import Kernels
from fastppo.fused.mlp_programs import FusedAct
from fastppo.policy.distributions import CATEGORICAL, DIAGONAL_NORMAL
from fastppo.policy.mlp import ACTIVATIONS, MLPActorCritic
from support.fused import WIDE, arguments_of, assert_same, both
from support.learn_settings import learn_settings

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.fixture(scope="module")
def kernels(needs_compiler):
    Kernels().ready(wait=True)


def exact_update(arguments, **options):
    """The eager update of WIDE in float64."""

    def double(x):
        return x.double() if x.is_floating_point() else x

    params, adam, rollout, permutation, numbers, normalization = arguments
    exact_arguments = (
        *(params.double(), AdamState(*map(double, adam)), {key: double(x) for key, x in rollout.items()}, permutation),
        *(Coefficients(*map(double, numbers)), normalization._replace(return_mean=torch.tensor(0.2).double())),
    )
    return learn(*exact_arguments, policy=WIDE, config=learn_settings(**options)["config"])


def test_it_is_as_exact_as_the_eager_update():
    """Against the same update in float64: rounding errors of the two are of one size."""
    arguments = arguments_of(WIDE, 32, 8)
    exact = exact_update(arguments, minibatch_size=128)
    errors = [float((result.params - exact.params).abs().max()) for result in both(WIDE, arguments, minibatch_size=128)]
    assert errors[0] < 3.0 * errors[1] + 1e-7


def test_the_kl_of_small_steps_is_exact():
    """(r - 1) - log r of ratios near 1: as a difference it would be wrong by 5e-9."""
    arguments, column = arguments_of(WIDE, 32, 8, learning_rate=3e-4), MINIBATCH_METRICS.index("approx_kl")
    exact = exact_update(arguments, minibatch_size=128).minibatch_metrics[:, column]
    fused, _ = both(WIDE, arguments, minibatch_size=128)
    assert 1e-8 < exact.max() < 1e-6
    torch.testing.assert_close(fused.minibatch_metrics[:, column].double(), exact, rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["obs", "reward", "action"])
def test_numbers_that_are_not_finite_are_seen(key, value):
    """A nan or inf in the data makes the same results not finite as eagerly: no minimum or maximum swallows it."""
    arguments = arguments_of(WIDE, 8, 4)
    arguments[2][key][3, 1] = value
    arguments[2]["valid"][3, 1] = True
    fused, eager = both(WIDE, arguments, minibatch_size=16)
    assert torch.equal(fused.params.isfinite(), eager.params.isfinite())
    assert torch.equal(fused.minibatch_metrics.isfinite(), eager.minibatch_metrics.isfinite())
    assert torch.equal(fused.summary[SUMMARY.index("finite")], eager.summary[SUMMARY.index("finite")])
    assert fused.summary[SUMMARY.index("finite")] == 0.0


def test_parameters_that_are_not_finite_are_seen():
    """As above, for a weight."""
    arguments = arguments_of(WIDE, 8, 4)
    arguments[0][5] = math.nan
    fused, eager = both(WIDE, arguments, minibatch_size=16)
    assert torch.equal(fused.params.isfinite(), eager.params.isfinite())


def test_an_infinite_observation_that_saturates_units_does_no_harm():
    """tanh of inf is 1: values and actions stay finite, as eagerly, where the layer does not fill its registers."""
    network = MLPActorCritic(4, 2, DIAGONAL_NORMAL, (5,))
    arguments = arguments_of(network, 8, 4)
    arguments[2]["obs"][8, 1, 2] = math.inf  # the step after the rollout, which no minibatch learns from
    assert_same(*both(network, arguments, minibatch_size=16))
    obs, noise = arguments[2]["obs"][8], torch.zeros(4, 2)
    action = FusedAct(network, 1)(arguments[0], arguments[5], obs, noise)
    torch.testing.assert_close(action, act_from_params(arguments[0], arguments[5], obs, noise, policy=network))


def test_a_huge_action_of_a_step_that_only_resets_does_no_harm():
    """Its square is inf, and its weight is 0: together they are 0, not NaN."""
    arguments = arguments_of(WIDE, 8, 4)
    arguments[2]["valid"][3, 1] = False
    arguments[2]["action"][3, 1] = 1e30
    fused, eager = both(WIDE, arguments, minibatch_size=16)
    assert eager.params.isfinite().all()
    assert_same(fused, eager)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations_are_exact(activation):
    """A network that computes nothing else: within 3e-7 of float64, from 1e-8 to where they are flat."""
    network = MLPActorCritic(1, 1, DIAGONAL_NORMAL, (1,), activation)
    weights = {name: torch.full(shape, float(name.endswith("weight"))) for name, shape in network.shapes.items()}
    x = torch.cat([torch.linspace(-12, 12, 4801), torch.tensor([1e-8, -1e-8, 1e-4, -1e-4, 100.0, -100.0])])
    normalization = arguments_of(WIDE, 1, 1)[-1]
    action = FusedAct(network, 1)(network.flatten(weights), normalization, x.unsqueeze(1), torch.zeros(len(x), 1))
    torch.testing.assert_close(action.squeeze(1).double(), ACTIVATIONS[activation](x.double()), rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_the_slope_of_a_sum_of_zero_is_torchs(activation):
    """Observations of zeros and new biases, as a run may start: relu has no derivative there."""
    network = MLPActorCritic(4, 3, CATEGORICAL, (8,), activation)
    arguments = arguments_of(network, 8, 4, spread=0.0)
    arguments[2]["obs"][::2] = 0.0
    assert_same(*both(network, arguments, minibatch_size=16))


def test_ratios_and_values_are_clipped_from_above_and_below():
    """Steps so large that many rows leave the clip range on either side."""
    network, clip = MLPActorCritic(4, 3, DIAGONAL_NORMAL, (8,)), 0.02
    arguments = arguments_of(network, 16, 8, epochs=3, learning_rate=0.05, clip_coef=clip, gamma=0.0)
    arguments[2]["reward"].clamp_(-2.0, 2.0)
    fused, eager = both(network, arguments, minibatch_size=64)
    obs, action = arguments[2]["obs"], arguments[2]["action"]
    before, after = (network.actor_critic(network.weights(params), obs) for params in (arguments[0], eager.params))
    log_ratio = DIAGONAL_NORMAL.log_prob(after[0], action) - DIAGONAL_NORMAL.log_prob(before[0], action)
    for change in (log_ratio, after[1] - before[1]):
        assert (change < -clip).float().mean() > 0.15
        assert (change > clip).float().mean() > 0.15
    assert_same(fused, eager)


def test_extreme_logits():
    """Probabilities of 0 and 1, and a ratio that overflows: the same as eagerly."""
    network = MLPActorCritic(4, 3, CATEGORICAL, (8,))
    arguments = arguments_of(network, 8, 4, spread=30.0)
    assert_same(*both(network, arguments, minibatch_size=16))
