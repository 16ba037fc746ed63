"""PPO's loss terms, held against torchrl's ClipPPOLoss, Stable-Baselines3 and arithmetic done by hand."""

import math

import numpy as np
import pytest
import torch
from stable_baselines3.common.utils import explained_variance as sb3_explained_variance
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch.distributions import Categorical, kl_divergence
from torchrl.objectives import ClipPPOLoss

from fastppo.core.losses import (
    approximate_kl,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    mean_and_std,
    means_and_stds,
    squared_value_loss,
    standardize,
    weighted_sum,
)
from fastppo.core.ppo import Rows, ppo_loss
from support.learn_settings import coefficients, learn_settings

CLIP = torch.tensor(0.2)


def one(number):
    """One row, (1,) float64."""
    return torch.tensor([number], dtype=torch.float64)


def shares(rows, dtype=torch.float32):
    """The weights of a mean over so many rows, (rows,)."""
    return torch.full((rows,), 1 / rows, dtype=dtype)


# --- by hand ---


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        # the clip is 0.2; loss = -min(r A, clip(r) A); gradient is d loss / d r
        (1.5, 2.0, -2.4, 0.0),  # min(3, 1.2 * 2 = 2.4): a good action is already likelier enough: no more push
        (1.5, -2.0, 3.0, 2.0),  # min(-3, -2.4) = -3: a bad action became likelier: pushed back, gradient -A
        (0.5, 2.0, -1.0, -2.0),  # min(1, 1.6) = 1: a good action became less likely: pushed back
        (0.5, -2.0, 1.6, 0.0),  # min(-1, 0.8 * -2 = -1.6): a bad action is already rare enough
        (1.1, 2.0, -2.2, -2.0),  # inside the range the clip does nothing
        (0.9, -2.0, 1.8, 2.0),
    ],
)
def test_clipped_policy_loss_by_hand(ratio, advantage, loss, gradient):
    """The clip takes away the incentive, not the penalty, for both signs of the advantage."""
    leaf = one(ratio).requires_grad_()
    value = clipped_policy_loss(leaf, one(advantage), one(1.0), CLIP)
    value.backward()
    assert value.item() == pytest.approx(loss, abs=1e-7)
    assert leaf.grad.item() == pytest.approx(gradient, abs=1e-7)


@pytest.mark.parametrize(
    ("value", "old_value", "target", "loss", "gradient"),
    [
        (2.0, 1.0, 3.0, 3.24, 0.0),  # unclipped 1; clipped 1.2 - 3 = -1.8, squared 3.24: the larger, with no gradient
        (2.0, 1.0, 0.0, 4.0, 4.0),  # unclipped 4 beats 1.2^2 = 1.44: gradient 2 (2 - 0)
        (0.0, 1.0, -2.0, 7.84, 0.0),  # unclipped 4; clipped 0.8 + 2 = 2.8, squared 7.84
        (1.1, 1.0, 2.0, 0.81, -1.8),  # inside the range: (1.1 - 2)^2, gradient 2 (1.1 - 2)
    ],
)
def test_clipped_value_loss_by_hand(value, old_value, target, loss, gradient):
    """The value loss is the worse of the clipped and the plain error, clipped around the old value on both sides."""
    leaf = one(value).requires_grad_()
    result = clipped_value_loss(leaf, one(old_value), one(target), one(1.0), CLIP)
    result.backward()
    assert result.item() == pytest.approx(loss, abs=1e-6)
    assert leaf.grad.item() == pytest.approx(gradient, abs=1e-6)


def test_squared_value_loss_by_hand():
    """The plain mean of squares, without a factor of one half: ((1-3)^2 + (5-4)^2) / 2 = 2.5."""
    assert squared_value_loss(torch.tensor([1.0, 5.0]), torch.tensor([3.0, 4.0]), shares(2)).item() == 2.5


def test_approximate_kl_by_hand():
    """Ratios 2 and 1/2: (2-1) - ln 2 = 0.3068528 and (1/2-1) + ln 2 = 0.1931472, together 1/4 on average; equal policies 0."""
    log_two = math.log(2.0)
    weight = torch.ones(1)
    assert approximate_kl(torch.tensor([log_two]), weight).item() == pytest.approx(0.3068528, abs=1e-6)
    assert approximate_kl(torch.tensor([-log_two]), weight).item() == pytest.approx(0.1931472, abs=1e-6)
    assert approximate_kl(torch.tensor([log_two, -log_two]), shares(2)).item() == pytest.approx(0.25, abs=1e-6)
    assert approximate_kl(torch.zeros(5), shares(5)).item() == 0.0


def test_approximate_kl_is_unbiased():
    """Averaged over actions as often as the acting policy takes them, it is KL(acting || new), torch.distributions' own."""
    acting = Categorical(probs=torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64))
    new = Categorical(logits=torch.tensor([0.3, -0.2, 0.4], dtype=torch.float64))
    action = torch.tensor([0, 1, 2, 2])
    estimate = approximate_kl(new.log_prob(action) - acting.log_prob(action), shares(4, torch.float64))
    torch.testing.assert_close(estimate, kl_divergence(acting, new), rtol=1e-10, atol=0)


def test_approximate_kl_is_accurate_for_small_changes():
    """A KL of 5e-13 (log-ratio 1e-6, half its square) is measured, not lost in rounding, and is never negative."""
    log_ratio = torch.tensor([1e-6, -1e-6], dtype=torch.float64)
    assert approximate_kl(log_ratio, shares(2, torch.float64)).item() == pytest.approx(5e-13, rel=1e-3)
    spread = torch.linspace(-1.0, 1.0, 401)
    assert all(approximate_kl(x.reshape(1), torch.ones(1)) >= 0 for x in spread)


def test_explained_variance_by_hand():
    """1 for a perfect critic (and one off by a constant), 0 for a constant, below 0 for worse, nan without variance."""
    target, weight = torch.tensor([0.0, 2.0, 4.0]), torch.ones(3)
    assert explained_variance(target, target, weight).item() == 1.0
    assert explained_variance(target + 5.0, target, weight).item() == 1.0
    assert explained_variance(torch.full((3,), 7.0), target, weight).item() == 0.0
    # errors 0, 0, 3 have sample variance (1 + 1 + 4) / 2 = 3, the targets (4 + 0 + 4) / 2 = 4: 1 - 3/4
    assert explained_variance(torch.tensor([0.0, 2.0, 1.0]), target, weight).item() == pytest.approx(0.25, abs=1e-6)
    # errors 0, 4, 8 have variance 16: 1 - 16/4
    assert explained_variance(-target, target, weight).item() == pytest.approx(-3.0, abs=1e-5)
    assert math.isnan(explained_variance(target, torch.full((3,), 2.0), weight).item())


def test_statistics_of_rows_in_several_places_are_those_of_all():
    """Three places with their rows, one of which has none that counts; `total` answers each question of one with all sums.

    Held against torch.std over the rows that count, whose means differ by place.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 40, generator=generator, dtype=torch.float64) + torch.tensor([[[0.0], [100.0], [-7.0]]])
    weight = (torch.rand(3, 40, generator=generator) < 0.6).double()
    weight[2] = 0.0

    def sums_of_all(*own):
        asked.append(len(own))
        if len(own) == 3:  # rows, and a sum of each variable
            return (weight.sum(), *((row * weight).sum() for row in x))
        return tuple(((row - mean) ** 2 * weight).sum() for row, mean in zip(x, means, strict=True))

    counted = [row[weight > 0] for row in x]
    means, stds = [rows.mean() for rows in counted], [rows.std() for rows in counted]
    for place in range(3):
        asked = []
        found = means_and_stds(x[:, place].unbind(), weight[place], total=sums_of_all)
        torch.testing.assert_close(found, list(zip(means, stds, strict=True)))
        assert asked == [3, 2]  # two exchanges, whatever the number of variables


def test_weighted_sum_by_hand():
    """Weights 1/2, 0, 1/2 give the mean of the first and the third: (1 + 5) / 2 = 3. No row at all gives 0, not nan.

    Parts of a batch of four rows, each with weights of 1/4, add up to its mean: (1 + 2 + 5 + 8) / 4 = 4.
    """
    x = torch.tensor([1.0, 100.0, 5.0])
    assert weighted_sum(x, torch.tensor([0.5, 0.0, 0.5])).item() == 3.0
    assert weighted_sum(x, torch.zeros(3)).item() == 0.0
    batch, quarter = torch.tensor([1.0, 2.0, 5.0, 8.0]), shares(4)
    parts = [weighted_sum(batch[part], quarter[part]).item() for part in (slice(0, 1), slice(1, 4))]
    assert parts == [0.25, 3.75]


@pytest.mark.parametrize(
    ("clip_vloss", "value_loss", "loss", "value_gradient"),
    [(False, 4.0, 1.24, [-1.0, 0.0, 1.0]), (True, 5.92, 2.2, [0.0, 0.0, 1.0])],
)
def test_ppo_loss_by_hand(clip_vloss, value_loss, loss, value_gradient):
    """The shipped loss of two transitions, and a resetting step between them full of absurd numbers; the clip is 0.2.

    Policy: r = 1.5 and A = 2 give -min(3, 1.2 * 2) = -2.4, r = 1 and A = -1 give 1: (-2.4 + 1) / 2 = -0.7.
    Value: (1 - 3)^2 = 4 and (4 - 2)^2 = 4, mean 4. Clipped around 0 the first is (0.2 - 3)^2 = 7.84: (7.84 + 4) / 2 = 5.92.
    Entropy: (0.5 + 0.7) / 2 = 0.6. Loss: -0.7 + 0.5 * 4 - 0.1 * 0.6 = 1.24, or -0.7 + 0.5 * 5.92 - 0.06 = 2.2.
    KL: ((0.5 - ln 1.5) + 0) / 2 = 0.0472674. One of two ratios lies outside the clip, and 0.5 from 1.
    """
    log_prob = torch.tensor([math.log(1.5), 50.0, -1.0], requires_grad=True)
    value = torch.tensor([1.0, 9e3, 4.0], requires_grad=True)
    entropy = torch.tensor([0.5, 77.0, 0.7], requires_grad=True)
    rows = Rows(
        old_log_prob=torch.tensor([0.0, -50.0, -1.0]),
        advantage=torch.tensor([2.0, 1e3, -1.0]),
        value_target=torch.tensor([3.0, 0.0, 2.0]),
        old_value=torch.tensor([0.0, 0.0, 4.0]),
        weight=torch.tensor([0.5, 0.0, 0.5]),
    )
    config = learn_settings(minibatch_size=3, clip_vloss=clip_vloss)["config"]
    numbers = coefficients(clip_coef=0.2, ent_coef=0.1, vf_coef=0.5)
    total, (means, deviation) = ppo_loss(log_prob, value, entropy, rows, numbers, config)
    assert total.item() == pytest.approx(loss, abs=1e-6)
    assert means.tolist() == pytest.approx([-0.7, value_loss, 0.6, 0.0472674, 0.5], abs=1e-6)
    assert deviation.item() == pytest.approx(0.5, abs=1e-6)
    gradients = [x.tolist() for x in torch.autograd.grad(total, (log_prob, value, entropy))]
    # the first row's ratio is clipped: no gradient; the third's is -A r / 2; the value's is vf_coef (V - V_target)
    assert gradients[0] == pytest.approx([0.0, 0.0, 0.5], abs=1e-6)
    assert gradients[1] == pytest.approx(value_gradient, abs=1e-6)
    assert gradients[2] == pytest.approx([-0.05, 0.0, -0.05], abs=1e-6)


# --- against others ---


def test_explained_variance_equals_stable_baselines():
    """The same number as SB3 logs."""
    generator = torch.Generator().manual_seed(0)
    value, target = torch.randn(500, generator=generator).double(), torch.randn(500, generator=generator).double()
    value = target + 0.5 * value
    ours = explained_variance(value, target, torch.ones(500, dtype=torch.float64)).item()
    assert ours == pytest.approx(float(sb3_explained_variance(value.numpy(), target.numpy())), rel=1e-9)


def test_standardize_equals_torch_on_the_selected_rows():
    """Mean and sample standard deviation are torch.mean and torch.std of the valid rows alone."""
    generator = torch.Generator().manual_seed(1)
    x = 5.0 + 3.0 * torch.randn(300, generator=generator, dtype=torch.float64)
    weight = (torch.rand(300, generator=generator) < 0.6).double()
    chosen = x[weight > 0]
    mean, std = mean_and_std(x, weight)
    torch.testing.assert_close(mean, chosen.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(std, torch.std(chosen), rtol=1e-12, atol=0)
    expected = torch.nn.functional.batch_norm(chosen[:, None], torch.mean(chosen)[None], torch.var(chosen)[None], eps=0.0)
    torch.testing.assert_close(standardize(x, weight)[weight > 0], expected.squeeze(-1), rtol=1e-7, atol=1e-9)


def test_standardize_of_rows_without_spread_is_zero():
    """One valid row, or equal ones, give 0 and no nan; so does no row at all."""
    x = torch.tensor([3.0, 9.0, 3.0])
    assert standardize(x, torch.tensor([1.0, 0.0, 0.0]))[0].item() == 0.0
    assert standardize(x, torch.tensor([1.0, 0.0, 1.0]))[[0, 2]].tolist() == [0.0, 0.0]
    assert standardize(x, torch.zeros(3)).isfinite().all()


@pytest.mark.parametrize("clip_vloss", [False, True])
@pytest.mark.parametrize("norm_adv", [False, True])
def test_whole_loss_and_its_gradient_equal_torchrl(clip_vloss, norm_adv):
    """Policy loss, value loss and entropy add up to torchrl's ClipPPOLoss, with the same gradient in every parameter.

    The policy has moved so far that clipping bites on both sides.
    """
    generator = torch.Generator().manual_seed(2)
    rows, ent_coef, vf_coef = 400, 0.03, 0.7
    obs = torch.randn(rows, 5, generator=generator, dtype=torch.float64)
    action = torch.randint(3, (rows,), generator=generator)
    advantage, value_target, old_value = torch.randn(3, rows, generator=generator, dtype=torch.float64)
    actor, critic = torch.nn.Linear(5, 3, dtype=torch.float64), torch.nn.Linear(5, 1, dtype=torch.float64)
    with torch.no_grad():
        for parameter in (*actor.parameters(), *critic.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3)
        drift = 0.3 * torch.randn(rows, generator=generator, dtype=torch.float64)
        old_log_prob = Categorical(logits=actor(obs)).log_prob(action) + drift

    oracle = ClipPPOLoss(
        ProbabilisticTensorDictSequential(
            TensorDictModule(actor, ["obs"], ["logits"]),
            ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=Categorical),
        ),
        TensorDictModule(critic, ["obs"], ["state_value"]),
        clip_epsilon=0.2,
        entropy_coeff=ent_coef,
        critic_coeff=vf_coef,
        loss_critic_type="l2",
        normalize_advantage=norm_adv,
        clip_value=clip_vloss,
        functional=False,
    )
    batch = TensorDict(
        {
            "obs": obs,
            "action": action,
            oracle.tensor_keys.sample_log_prob: old_log_prob,
            "advantage": advantage[:, None],
            "value_target": value_target[:, None],
            "state_value": old_value[:, None],
        },
        [rows],
    )
    expected = oracle(batch)
    parameters = [*actor.parameters(), *critic.parameters()]
    expected_grad = torch.autograd.grad(
        expected["loss_objective"] + expected["loss_critic"] + expected["loss_entropy"], parameters
    )

    weight = shares(rows, torch.float64)
    dist, value = Categorical(logits=actor(obs)), critic(obs).squeeze(-1)
    log_ratio = dist.log_prob(action) - old_log_prob
    advantage = standardize(advantage, torch.ones_like(weight)) if norm_adv else advantage
    policy_loss = clipped_policy_loss(log_ratio.exp(), advantage, weight, CLIP)
    if clip_vloss:
        value_loss = clipped_value_loss(value, old_value, value_target, weight, CLIP)
    else:
        value_loss = squared_value_loss(value, value_target, weight)
    entropy = weighted_sum(dist.entropy(), weight)
    grad = torch.autograd.grad(policy_loss + vf_coef * value_loss - ent_coef * entropy, parameters)

    assert 0.1 < expected["clip_fraction"] < 0.9  # the case is a telling one
    tolerance = {"rtol": 1e-6, "atol": 1e-8}  # 0.2 is rounded to float32 on both sides, differently
    torch.testing.assert_close(policy_loss, expected["loss_objective"], **tolerance)
    torch.testing.assert_close(vf_coef * value_loss, expected["loss_critic"], **tolerance)
    torch.testing.assert_close(-ent_coef * entropy, expected["loss_entropy"], **tolerance)
    for ours, theirs in zip(grad, expected_grad, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


# --- masked rows ---


def loss_terms(rows, valid):
    """Every loss term and statistic of seven columns of rows, by name; valid: 1 or 0."""
    weight = valid / valid.sum()
    ratio, advantage, value, old_value, target, log_ratio, x = rows
    return {
        "policy": clipped_policy_loss(ratio, advantage, weight, CLIP),
        "value": squared_value_loss(value, target, weight),
        "clipped value": clipped_value_loss(value, old_value, target, weight, CLIP),
        "kl": approximate_kl(log_ratio, weight),
        "explained": explained_variance(value, target, valid),
        "mean": weighted_sum(x, weight),
        "std": mean_and_std(x, valid)[1],
        "standardized": standardize(x, valid)[valid > 0],
    }


def test_masked_rows_have_no_influence():
    """Rows of weight 0 may hold any finite number: every term keeps its bits, and the others' gradient too."""
    generator = torch.Generator().manual_seed(3)
    weight = (torch.rand(64, generator=generator) < 0.7).float()
    rows = torch.rand(7, 64, generator=generator) + 0.5
    other = torch.where(weight > 0, rows, 1e3 * torch.randn(7, 64, generator=generator))
    other[5] = other[5].clamp(-20, 20)  # a log-ratio is exponentiated
    leaf, other_leaf = rows.clone().requires_grad_(), other.clone().requires_grad_()
    before, after = loss_terms(leaf, weight), loss_terms(other_leaf, weight)
    for name in before:
        assert torch.equal(before[name], after[name]), name
    (grad,) = torch.autograd.grad(sum(x.sum() for x in before.values()), leaf)
    (other_grad,) = torch.autograd.grad(sum(x.sum() for x in after.values()), other_leaf)
    assert torch.equal(grad[:, weight > 0], other_grad[:, weight > 0])
    assert not grad[:, weight == 0].any()
    assert not other_grad[:, weight == 0].any()


def test_masked_terms_equal_the_terms_of_the_valid_rows_alone():
    """Masking is compaction without the compaction: the same numbers as dropping the rows."""
    generator = torch.Generator().manual_seed(4)
    weight = (torch.rand(64, generator=generator) < 0.7).double()
    rows = torch.rand(7, 64, generator=generator, dtype=torch.float64) + 0.5
    kept = rows[:, weight > 0]
    masked, compacted = loss_terms(rows, weight), loss_terms(kept, torch.ones(kept.shape[1], dtype=torch.float64))
    for name in masked:
        np.testing.assert_allclose(masked[name], compacted[name], rtol=1e-10, err_msg=name)
