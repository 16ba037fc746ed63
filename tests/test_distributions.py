"""Action distributions, held against torch.distributions, and their samples against the probabilities they claim."""

import math

import pytest
import torch
from torch.distributions import Categorical, Independent, Normal

from fastppo.policy.distributions import CATEGORICAL, DIAGONAL_NORMAL, gumbel_noise, normal_noise


def generator(seed=0):
    """An owned source of random numbers."""
    return torch.Generator().manual_seed(seed)


def test_categorical_equals_torch():
    """log_prob of every action and the entropy, over leading axes as a rollout has them."""
    logits = 3.0 * torch.randn(7, 3, 5, generator=generator())  # (T, N, A)
    oracle = Categorical(logits=logits)
    for a in range(5):
        action = torch.full((7, 3), a)
        log_prob = CATEGORICAL.log_prob(logits, action)
        assert log_prob.shape == (7, 3)
        torch.testing.assert_close(log_prob, oracle.log_prob(action), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(CATEGORICAL.entropy(logits), oracle.entropy(), rtol=1e-5, atol=1e-5)


def test_categorical_gradients_equal_torch():
    """Gradients of log_prob and entropy in the logits: the one-hot sum differentiates as the gather does."""
    logits = (2.0 * torch.randn(9, 4, generator=generator(1), dtype=torch.float64)).requires_grad_()
    action = torch.randint(4, (9,), generator=generator(2))
    pairs = [
        (CATEGORICAL.log_prob(logits, action), Categorical(logits=logits).log_prob(action)),
        (CATEGORICAL.entropy(logits), Categorical(logits=logits).entropy()),
    ]
    row_weight = torch.arange(1.0, 10.0, dtype=torch.float64)  # rows must not be mixed up either
    for ours, theirs in pairs:
        (grad,) = torch.autograd.grad((row_weight * ours).sum(), logits)
        (expected,) = torch.autograd.grad((row_weight * theirs).sum(), logits)
        torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-10)


def test_categorical_by_hand():
    """Equal logits over four actions: log_prob = -log 4 and entropy log 4; ln 3 against 0 is 3/4 against 1/4."""
    logits = torch.full((4,), 7.0)
    assert CATEGORICAL.log_prob(logits, torch.tensor(2)).item() == pytest.approx(-math.log(4), abs=1e-6)
    assert CATEGORICAL.entropy(logits).item() == pytest.approx(math.log(4), abs=1e-6)
    odds = torch.tensor([math.log(3.0), 0.0])
    assert CATEGORICAL.log_prob(odds, torch.tensor(0)).exp().item() == pytest.approx(0.75, abs=1e-6)


@pytest.mark.parametrize("big", [1e4, -1e4])
def test_extreme_logits_stay_finite(big):
    """A policy that has become certain: values and gradients are finite, the entropy is 0, the sure action is certain."""
    logits = torch.tensor([[big, 0.0, -big], [big, big, big]], requires_grad=True)
    sure = torch.tensor([0 if big > 0 else 2, 1])
    log_prob, entropy = CATEGORICAL.log_prob(logits, sure), CATEGORICAL.entropy(logits)
    # row 0 is certain: log 1 = 0 and entropy 0; row 1 is uniform: -log 3 and log 3, to float32's 1e-3 at 1e4
    torch.testing.assert_close(log_prob, torch.tensor([0.0, -math.log(3)]), rtol=0, atol=2e-3)
    torch.testing.assert_close(entropy, torch.tensor([0.0, math.log(3)]), rtol=0, atol=2e-3)
    (grad,) = torch.autograd.grad(log_prob.sum() + entropy.sum(), logits)
    assert grad.isfinite().all()
    assert CATEGORICAL.log_prob(logits, 2 - sure).isfinite().all()  # the impossible action as well
    noise = CATEGORICAL.noise((1000, 2, 3), generator())
    assert (CATEGORICAL.sample(logits.detach(), noise)[:, 0] == sure[0]).all()


def test_categorical_samples_have_their_probabilities():
    """Gumbel-argmax draws each action with its softmax probability: 200 000 draws, within five standard errors."""
    probability = torch.tensor([0.5, 0.3, 0.15, 0.05])
    draws = 200_000
    action = CATEGORICAL.sample((probability.log() + 3.0).expand(draws, 4), CATEGORICAL.noise((draws, 4), generator(3)))
    assert action.dtype == torch.int64
    assert action.shape == (draws,)
    frequency = action.bincount(minlength=4) / draws
    assert ((frequency - probability).abs() < 5 * (probability * (1 - probability) / draws).sqrt()).all()


def test_categorical_sample_and_mode_by_hand():
    """The sample is the argmax of logits plus noise, the mode the argmax of the logits alone."""
    logits = torch.tensor([[1.0, 2.0, 0.0], [5.0, 2.0, 0.0]])
    noise = torch.tensor([[0.0, 0.0, 3.0], [0.0, 2.0, 0.0]])  # sums [1 2 3] and [5 4 0]
    assert CATEGORICAL.sample(logits, noise).tolist() == [2, 0]
    assert CATEGORICAL.mode(logits).tolist() == [1, 0]


def test_normal_equals_torch():
    """log_prob and entropy of a diagonal Gaussian, summed over the action's components."""
    mean, log_std = torch.randn(7, 3, 4, generator=generator(4)), 0.7 * torch.randn(4, generator=generator(5))
    dist = (mean, log_std.expand_as(mean))
    action = mean + torch.randn(7, 3, 4, generator=generator(6))
    oracle = Independent(Normal(mean, log_std.exp().expand_as(mean)), 1)
    torch.testing.assert_close(DIAGONAL_NORMAL.log_prob(dist, action), oracle.log_prob(action), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(DIAGONAL_NORMAL.entropy(dist), oracle.entropy(), rtol=1e-5, atol=1e-5)


def test_normal_gradients_equal_torch():
    """Gradients in the mean and the log standard deviation, of log_prob and entropy."""
    mean = torch.randn(9, 2, generator=generator(7), dtype=torch.float64).requires_grad_()
    log_std = torch.tensor([0.4, -1.3], dtype=torch.float64, requires_grad=True)
    action = torch.randn(9, 2, generator=generator(8), dtype=torch.float64)
    dist = (mean, log_std.expand_as(mean))
    oracle = Independent(Normal(mean, log_std.exp().expand_as(mean)), 1)
    row_weight = torch.arange(1.0, 10.0, dtype=torch.float64)
    ours = (row_weight * (DIAGONAL_NORMAL.log_prob(dist, action) + 0.3 * DIAGONAL_NORMAL.entropy(dist))).sum()
    theirs = (row_weight * (oracle.log_prob(action) + 0.3 * oracle.entropy())).sum()
    for grad, expected in zip(
        torch.autograd.grad(ours, (mean, log_std)), torch.autograd.grad(theirs, (mean, log_std)), strict=True
    ):
        torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-10)


def test_normal_by_hand():
    """Standard deviation 2 around 1, noise 1/2: the action is 2; the density there is 0.1760327, the entropy 2.1120858."""
    dist = (torch.tensor([1.0]), torch.tensor([math.log(2.0)]))
    action = DIAGONAL_NORMAL.sample(dist, torch.tensor([0.5]))
    assert action.item() == pytest.approx(2.0)
    # exp(-(1/2)^2 / 2) / (2 sqrt(2 pi)) = 0.8824969 / 5.0132565 = 0.1760327
    assert DIAGONAL_NORMAL.log_prob(dist, action).exp().item() == pytest.approx(0.1760327, rel=1e-5)
    # 0.5 log(2 pi e) + log 2 = 1.4189385 + 0.6931472
    assert DIAGONAL_NORMAL.entropy(dist).item() == pytest.approx(2.1120858, rel=1e-5)
    assert DIAGONAL_NORMAL.mode(dist).item() == 1.0


def test_normal_samples_have_their_moments():
    """Mean and standard deviation of 200 000 samples, each component its own, within five standard errors."""
    draws = 200_000
    std = torch.tensor([0.1, 3.0])
    dist = (torch.tensor([2.0, -1.0]).expand(draws, 2), std.log().expand(draws, 2))
    sample = DIAGONAL_NORMAL.sample(dist, DIAGONAL_NORMAL.noise((draws, 2), generator(9)))
    assert ((sample.mean(0) - torch.tensor([2.0, -1.0])).abs() < 5 * std / draws**0.5).all()
    assert ((sample.std(0) - std).abs() < 5 * std / (2 * draws) ** 0.5).all()
    assert abs(torch.corrcoef(sample.T)[0, 1]) < 5 / draws**0.5


@pytest.mark.parametrize(
    ("noise", "mean", "variance"),
    [(gumbel_noise, 0.5772157, math.pi**2 / 6), (normal_noise, 0.0, 1.0)],  # Euler's constant
)
def test_noise_is_standard_and_comes_from_its_generator(noise, mean, variance):
    """The noise has the textbook mean and variance, repeats with its generator, and leaves the global one alone."""
    before = torch.get_rng_state()
    x = noise((400, 500), generator(10))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(x, noise((400, 500), generator(10)))
    assert not torch.equal(x, noise((400, 500), generator(11)))
    assert x.isfinite().all()
    assert x.mean().item() == pytest.approx(mean, abs=5 * (variance / 200_000) ** 0.5)
    assert x.var().item() == pytest.approx(variance, rel=0.03)
