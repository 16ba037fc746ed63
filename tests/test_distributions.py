"""Action distributions, held against torch.distributions, and their samples against the probabilities they claim."""

import math

import pytest
import torch
from torch.distributions import Beta, Categorical, Independent, Normal

from fastppo.policy.distributions import (
    BETA,
    CATEGORICAL,
    CONTINUOUS,
    DIAGONAL_NORMAL,
    GSDE,
    STATE_NORMAL,
    Hybrid,
    MultiCategorical,
    choices,
    gumbel_noise,
    mask_logits,
    masked,
    normal_noise,
    parameters,
    with_features,
)


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


NUMBERS = [(2, 5, 3, 1), (4, 4)]  # components of different sizes are padded, those of one size are not


def components(numbers, rows, seed):
    """Logits (rows, A) that need a gradient, their parts, and an action for each row."""
    logits = (2.0 * torch.randn(rows, sum(numbers), generator=generator(seed), dtype=torch.float64)).requires_grad_()
    action = torch.stack([torch.randint(number, (rows,), generator=generator(seed + 1)) for number in numbers], -1)
    return logits, logits.split(numbers, -1), action


def assert_same_gradients(pairs, logits):
    row_weight = torch.arange(1.0, len(logits) + 1.0, dtype=logits.dtype)  # rows must not be mixed up either
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
        (grad,) = torch.autograd.grad((row_weight * ours).sum(), logits, retain_graph=True)
        (expected,) = torch.autograd.grad((row_weight * theirs).sum(), logits, retain_graph=True)
        torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("numbers", NUMBERS)
def test_several_choices_equal_torch_one_by_one(numbers):
    """log_prob and entropy are sums over the components, and so are their gradients; the mode is each component's."""
    logits, parts, action = components(numbers, 9, 3)
    family, oracles = MultiCategorical(numbers), [Categorical(logits=part) for part in parts]
    log_prob = sum(oracle.log_prob(action[:, k]) for k, oracle in enumerate(oracles))
    entropy = sum(oracle.entropy() for oracle in oracles)
    assert_same_gradients([(family.log_prob(logits, action), log_prob), (family.entropy(logits), entropy)], logits)
    assert torch.equal(family.mode(logits), torch.stack([part.argmax(-1) for part in parts], -1))
    lead = logits.detach().expand(4, 9, -1)  # (T, N, A)
    assert family.log_prob(lead, action.expand(4, 9, -1)).shape == (4, 9)
    assert family.sample(lead, family.noise((4, 9, sum(numbers)), generator())).shape == (4, 9, len(numbers))


@pytest.mark.parametrize("numbers", NUMBERS)
def test_several_choices_equal_stable_baselines(numbers):
    """Oracle: MultiCategoricalDistribution, the library's own splitting of the logits."""
    distributions = pytest.importorskip("stable_baselines3.common.distributions")
    logits, _, action = components(numbers, 9, 5)
    family, oracle = MultiCategorical(numbers), distributions.MultiCategoricalDistribution(list(numbers))
    oracle.proba_distribution(logits)
    pairs = [(family.log_prob(logits, action), oracle.log_prob(action)), (family.entropy(logits), oracle.entropy())]
    assert_same_gradients(pairs, logits)
    assert torch.equal(family.mode(logits), oracle.mode())


@pytest.mark.parametrize("masked", [False, True])
def test_samples_of_several_choices_have_their_probabilities(masked):
    """100 000 draws: each component's frequencies within five standard errors, components independent; illegal values never."""
    numbers, draws = (2, 5, 3), 100_000
    logits = torch.randn(10, generator=generator(6))
    legal = torch.tensor([True, True, True, False, True, False, False, False, True, True]) if masked else torch.ones(10).bool()
    family = MultiCategorical(numbers)
    action = family.sample(mask_logits(logits, legal, numbers).expand(draws, 10), family.noise((draws, 10), generator(7)))
    assert action.dtype == torch.int64
    for column, part, allowed in zip(action.T, logits.split(numbers), legal.split(numbers), strict=True):
        probability = part.masked_fill(~allowed, -math.inf).softmax(-1)
        frequency = column.bincount(minlength=len(part)) / draws
        assert ((frequency - probability).abs() <= 5 * (probability * (1 - probability) / draws).sqrt()).all()
    assert abs(torch.corrcoef(action.T.double())[0, 1]) < 5 / draws**0.5


def test_masked_logits_are_a_distribution_over_the_legal_actions_alone():
    """Oracle: Categorical over a shorter vector. log_prob, entropy, gradients; those of illegal logits are exactly 0."""
    logits = (2.0 * torch.randn(64, 6, generator=generator(8), dtype=torch.float64)).requires_grad_()
    legal = torch.rand(64, 6, generator=generator(9)) < 0.4
    legal[torch.arange(64), torch.randint(6, (64,), generator=generator(10))] = True
    masked = mask_logits(logits, legal, (6,))
    for row in range(64):
        rest = legal[row].nonzero().flatten()
        oracle = Categorical(logits=logits[row, rest])
        for k, action in enumerate(rest):
            pairs = [(CATEGORICAL.log_prob(masked[row], action), oracle.log_prob(torch.tensor(k)))]
            pairs += [(CATEGORICAL.entropy(masked[row]), oracle.entropy())]
            for ours, theirs in pairs:
                torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
                (grad,) = torch.autograd.grad(ours, logits, retain_graph=True)
                (expected,) = torch.autograd.grad(theirs, logits, retain_graph=True)
                torch.testing.assert_close(grad[row, rest], expected[row, rest], rtol=1e-8, atol=1e-10)
                assert (grad[row, ~legal[row]] == 0.0).all()
        assert CATEGORICAL.mode(masked)[row] in rest


def test_a_choice_of_which_nothing_is_legal_stays_as_it_is():
    """Of one component, not of the others: an all-zero mask is a resetting row or a fault of the environment, not a nan."""
    numbers = (2, 3)
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]])
    legal = torch.tensor([[False, False, True, False, True]])
    assert mask_logits(logits, legal, numbers).tolist() == [[1.0, 2.0, 3.0, -1e8, 5.0]]
    assert mask_logits(logits, torch.zeros(1, 5).bool(), (5,)).tolist() == logits.tolist()
    assert choices(CATEGORICAL, 5) == (5,)
    assert choices(MultiCategorical(numbers), 5) == numbers


# --- choices and numbers in one action


def oracle_of(kind, out, log_std):
    """The distribution of the numbers by torch.distributions, from a network's outputs."""
    first, second = (out, torch.zeros_like(out)) if kind == "normal" else out.chunk(2, -1)
    if kind == "beta":
        return Beta(1.0 + torch.nn.functional.softplus(first), 1.0 + torch.nn.functional.softplus(second))
    return Normal(first, (log_std + second).clamp(-20.0, 2.0).exp())


def hybrid(kind="normal", numbers=(2, 5), size=3, rows=64):
    """A family, its outputs in float64 with a gradient, log standard deviations, and actions."""
    family = Hybrid(numbers, size, CONTINUOUS[kind])
    outputs = sum(numbers) + size * (1 if kind == "normal" else 2)
    out = torch.randn(rows, outputs, generator=generator(20), dtype=torch.float64).requires_grad_()
    log_std = (0.5 * torch.randn(size, generator=generator(21), dtype=torch.float64)).requires_grad_()
    chosen = torch.stack([torch.randint(n, (rows,), generator=generator(n)) for n in numbers], -1)
    real = torch.randn(rows, size, generator=generator(22), dtype=torch.float64)
    return family, out, log_std, torch.cat([chosen, real.sigmoid() if kind == "beta" else real], -1)


def torchs(kind, numbers, out, log_std, action):
    """Sums of log-probabilities and of entropies, by torch.distributions, of each choice and each number."""
    *logits, rest = out.split([*numbers, out.shape[-1] - sum(numbers)], -1)
    each = [Categorical(logits=part) for part in logits]
    oracle = oracle_of(kind, rest, log_std)
    log_prob = sum(one.log_prob(action[:, k].long()) for k, one in enumerate(each))
    entropy = sum(one.entropy() for one in each)
    return log_prob + oracle.log_prob(action[:, len(numbers) :]).sum(-1), entropy + oracle.entropy().sum(-1)


@pytest.mark.parametrize("kind", ["normal", "normal-state-std", "beta"])
@pytest.mark.parametrize("masked_choices", [False, True])
def test_choices_and_numbers_equal_torch(kind, masked_choices):
    """Log-probability and entropy are sums over all parts, with their gradients in every output and log_std. Masks touch the

    choices alone: torch has the illegal logits at -1e8.
    """
    family, out, log_std, action = hybrid(kind)
    expected_out, dist = out, parameters(out, log_std, family)
    if masked_choices:
        legal = torch.rand(64, 7, generator=generator(23)) < 0.5
        legal[torch.arange(64), action[:, 0].long()] = True
        legal[torch.arange(64), 2 + action[:, 1].long()] = True
        dist = masked(dist, legal, family)
        others = torch.ones(64, out.shape[-1] - 7, dtype=torch.bool)
        expected_out = torch.where(torch.cat([legal, others], -1), out, -1e8)
    expected = torchs(kind, family.numbers, expected_out, log_std, action)
    for ours, theirs in zip((family.log_prob(dist, action), family.entropy(dist)), expected, strict=True):
        assert ours.shape == (64,)
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
        weight = torch.arange(1.0, 65.0, dtype=torch.float64)
        for inputs in (out, log_std):
            got, wanted = (
                torch.autograd.grad((weight * x).sum(), inputs, retain_graph=True, allow_unused=True)[0] for x in (ours, theirs)
            )
            torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


def test_samples_of_choices_and_numbers_have_their_probabilities():
    """100 000 draws: frequencies and moments within five standard errors, parts independent; the mode is the likeliest."""
    draws, logits, mean, log_std = 100_000, torch.tensor([0.0, 1.0, -1.0]), torch.tensor([3.0, -2.0]), torch.tensor([0.0, -1.0])
    family = Hybrid((3,), 2)
    dist = parameters(torch.cat([logits, mean]).expand(draws, 5), log_std, family)
    action = family.sample(dist, family.noise((draws, 5), generator(24)))
    assert action.dtype == torch.float32
    assert action.shape == (draws, 3)
    probability = logits.softmax(-1)
    frequency = action[:, 0].long().bincount(minlength=3) / draws
    assert ((frequency - probability).abs() <= 5 * (probability * (1 - probability) / draws).sqrt()).all()
    std = log_std.exp()
    assert ((action[:, 1:].mean(0) - mean).abs() <= 5 * std / draws**0.5).all()
    assert ((action[:, 1:].std(0) - std).abs() <= 5 * std / (2 * draws) ** 0.5).all()
    correlation = torch.corrcoef(action.T.double()) - torch.eye(3)
    assert correlation.abs().max() < 5 / draws**0.5
    assert family.mode(dist)[0].tolist() == [1.0, 3.0, -2.0]


# --- a standard deviation that depends on the state, and beta


@pytest.mark.parametrize("kind", ["normal-state-std", "beta"])
def test_two_outputs_for_each_number_equal_torch(kind):
    """log_prob and entropy, and their gradients in the outputs and in log_std, over leading axes as a rollout has them."""
    family, row_weight = CONTINUOUS[kind], torch.arange(1.0, 22.0, dtype=torch.float64).view(7, 3)
    out = (1.5 * torch.randn(7, 3, 8, generator=generator(30), dtype=torch.float64)).requires_grad_()
    log_std = torch.tensor([0.3, -0.7, -1.5, 0.0], dtype=torch.float64, requires_grad=True)
    action = torch.rand(7, 3, 4, generator=generator(31), dtype=torch.float64)
    dist, oracle = family.parameters(out, log_std, None), Independent(oracle_of(kind, out, log_std), 1)
    for ours, theirs in ((family.log_prob(dist, action), oracle.log_prob(action)), (family.entropy(dist), oracle.entropy())):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)
        got, wanted = (
            torch.autograd.grad((row_weight * x).sum(), (out, log_std), retain_graph=True, allow_unused=True)
            for x in (ours, theirs)
        )
        torch.testing.assert_close(got[0], wanted[0], rtol=1e-8, atol=1e-10)
        assert kind == "beta" or torch.allclose(got[1], wanted[1], rtol=1e-8, atol=1e-10)


def test_a_standard_deviation_of_the_state_by_hand():
    """The second half of the outputs is added to log_std; the sum stays between -20 and 2."""
    out = torch.tensor([[1.0, 2.0, 0.5, 9.0], [3.0, 4.0, -0.5, -90.0]])
    mean, log_std = STATE_NORMAL.parameters(out, torch.tensor([0.25, 0.0]), None)
    assert mean.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert log_std.tolist() == [[0.75, 2.0], [-0.25, -20.0]]


@pytest.mark.parametrize("hybrid", [False, True])
def test_gsde_equals_stable_baselines(hybrid):
    """Oracle: StateDependentNoiseDistribution. Samples of the same matrices, log_prob, entropy and their gradients in the means

    and log_std; none in the features. Beside choices too.
    """
    distributions = pytest.importorskip("stable_baselines3.common.distributions")
    rows, num_features, size = 9, 6, 3
    mean, features, log_std = (
        (0.7 * torch.randn(*shape, generator=generator(40 + i))).requires_grad_()
        for i, shape in enumerate([(rows, size), (rows, num_features), (num_features, size)])
    )
    oracle = distributions.StateDependentNoiseDistribution(size)
    with torch.random.fork_rng():
        oracle.proba_distribution_net(num_features)
        oracle.sample_weights(log_std, rows)
    oracle.proba_distribution(mean, log_std, features)
    expected = oracle.sample().detach()
    noise = (oracle.exploration_matrices / log_std.exp()).detach().flatten(1)
    family, out, action = GSDE, mean, expected
    if hybrid:  # a choice whose only value is certain adds nothing
        family = Hybrid((1,), size, GSDE)
        out, noise, action = (torch.cat([torch.zeros(rows, 1), x], 1) for x in (mean, noise, expected))
    dist = parameters(out, log_std, family, features)
    torch.testing.assert_close(family.sample(dist, noise), action)
    assert torch.equal(family.mode(dist)[:, -size:], mean)
    pairs = [(family.log_prob(dist, action), oracle.log_prob(expected)), (family.entropy(dist), oracle.entropy())]
    row_weight = torch.arange(1.0, rows + 1.0)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs)
        got, wanted = (
            torch.autograd.grad((row_weight * x).sum(), (mean, log_std, features), retain_graph=True, allow_unused=True)
            for x in (ours, theirs)
        )
        torch.testing.assert_close(got[1], wanted[1], rtol=1e-4, atol=1e-5)
        assert wanted[0] is None or torch.allclose(got[0], wanted[0], atol=1e-5)
        assert (got[2], wanted[2]) == (None, None)


def test_gsde_samples_have_their_moments():
    """200 000 matrices and one state: mean and standard deviation within five standard errors of those of log_prob."""
    draws, features, mean = 200_000, torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1.0, -2.0])
    log_std = torch.tensor([[0.0, -1.0], [-0.5, 0.3], [-2.0, -0.2]])
    family = with_features(GSDE, 3)
    dist = family.parameters(mean.expand(draws, 2), log_std, features.expand(draws, 3))
    sample = family.sample(dist, family.noise((draws, 2 * family.num_noise), generator(41)))
    std = dist[1][0].exp()
    assert ((sample.mean(0) - mean).abs() < 5 * std / draws**0.5).all()
    assert ((sample.std(0) - std).abs() < 5 * std / (2 * draws) ** 0.5).all()
    assert abs(torch.corrcoef(sample.T)[0, 1]) < 5 / draws**0.5


@pytest.mark.parametrize("alpha_beta", [(1.0, 1.0), (1.0, 6.0), (1.7, 1.7), (40.0, 3.0), (2e3, 5e3)])
def test_beta_samples_are_beta(alpha_beta):
    """Kolmogorov-Smirnov against the integral of torch's density: 200 000 draws of each of two components stay within the
    distance that one set of draws in a thousand exceeds. The components are independent, and so are a draw's neighbours.
    """
    draws, (alpha, beta) = 200_000, alpha_beta
    dist = tuple(torch.full((draws, 2), x - 1.0) for x in alpha_beta)
    sample = BETA.sample(dist, BETA.noise((draws, 2 * BETA.num_noise), generator(32)))
    assert sample.shape == (draws, 2)
    assert sample.dtype == torch.float32
    spread = 12 * (alpha * beta / ((alpha + beta) ** 2 * (alpha + beta + 1))) ** 0.5
    mean = alpha / (alpha + beta)
    grid = torch.linspace(max(1e-9, mean - spread), min(1 - 1e-9, mean + spread), 200_001, dtype=torch.float64)
    oracle = Beta(torch.tensor(alpha).double(), torch.tensor(beta).double())
    share = torch.cumulative_trapezoid(oracle.log_prob(grid).exp(), grid)
    assert share[-1].item() == pytest.approx(1.0, abs=1e-6)
    for component in sample.double().T.contiguous():
        cdf = share[torch.searchsorted(grid, component.sort().values).clamp(1, len(grid) - 1) - 1]
        ranks = torch.arange(draws, dtype=torch.float64)
        distance = torch.maximum((cdf - ranks / draws).amax(), ((ranks + 1) / draws - cdf).amax())
        assert distance < 1.95 / draws**0.5
    assert abs(torch.corrcoef(sample.T)[0, 1]) < 5 / draws**0.5
    assert abs(torch.corrcoef(torch.stack([sample[:-1, 0], sample[1:, 0]]))[0, 1]) < 5 / draws**0.5


def test_beta_without_sampling_is_its_mean():
    """Oracle: torch's mean. A density that is almost flat gives the middle, where the mode would be a bound."""
    out = torch.tensor([[0.0, -2.0, 3.0, 1.0, 3.0, -4.0]])
    torch.testing.assert_close(BETA.mode(BETA.parameters(out, None, None)), oracle_of("beta", out, None).mean)
    flat = BETA.mode(BETA.parameters(torch.tensor([-5.0, -9.0]), None, None))
    torch.testing.assert_close(flat, torch.tensor([0.5]), rtol=0, atol=0.01)


def test_extreme_outputs_of_beta_stay_finite():
    """Outputs of a policy that has become certain, or has no opinion left, with samples at the edge: nothing is infinite."""
    out = torch.tensor([[-200.0, -200.0], [200.0, -200.0], [-200.0, 200.0], [2e4, 2e4]], requires_grad=True)
    dist = BETA.parameters(out.expand(1000, 4, 2), None, None)
    action = BETA.sample(dist, BETA.noise((1000, 4, BETA.num_noise), generator(33)))
    assert action.min() > 0.0
    assert action.max() < 1.0
    loss = BETA.log_prob(dist, action.detach()).sum() + BETA.entropy(dist).sum() + BETA.mode(dist).sum()
    (grad,) = torch.autograd.grad(loss, out)
    assert loss.isfinite()
    assert grad.isfinite().all()
