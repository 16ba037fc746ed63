"""The programs `act` and `learn`, eagerly: held against torch.nn, torchrl and torch.optim, and to a rollout's invariants."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from stable_baselines3.common.utils import explained_variance as sb3_explained_variance
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch.distributions import Categorical, Independent, Normal
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value.functional import generalized_advantage_estimate

from fastppo.core.acting import act
from fastppo.core.adam import AdamState, init_adam
from fastppo.core.contracts import Normalization
from fastppo.core.forward import Evaluation
from fastppo.core.gradient import functional_grad_and_aux, grad_and_aux
from fastppo.core.minibatches import draw_permutation
from fastppo.core.ppo import MINIBATCH_METRICS, estimate_advantages
from fastppo.core.sharding import Shard
from fastppo.policy.distributions import CATEGORICAL, DIAGONAL_NORMAL
from fastppo.policy.mlp import MLPActorCritic
from support.learn_settings import coefficients, learn_settings
from support.programs import (
    COLUMN,
    DISCRETE,
    OFF,
    POLICIES,
    CountingPolicy,
    HostSyncs,
    assert_same_bits,
    assert_together,
    column,
    make_params,
    make_permutation,
    make_rollout,
    to_meta,
    update,
    updates_of,
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These tensors are tiny: a second thread only waits at barriers, for whole scheduler slices on a busy machine (3x)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- against an update made of other people's parts ---


class Reference(torch.nn.Module):
    """The policy as torch.nn modules that hold copies of the flat buffer's weights, under the same names."""

    def __init__(self, policy, params):
        super().__init__()
        self.shared = policy.share_backbone
        self.gaussian = policy.distribution is DIAGONAL_NORMAL
        self.parts = torch.nn.ModuleDict()
        self.log_std = torch.nn.Parameter(torch.zeros(policy.action_size, dtype=params.dtype)) if self.gaussian else None
        for name, weight in policy.weights(params).items():
            part, _, kind = name.rpartition(".")
            if kind == "weight":
                self.parts[part.replace(".", "_")] = torch.nn.Linear(*weight.shape, dtype=params.dtype)
                self.parts[part.replace(".", "_")].weight.data = weight.T.clone()
            elif kind == "bias":
                self.parts[part.replace(".", "_")].bias.data = weight.clone()
            else:
                self.log_std.data = weight.clone()

    def trunk(self, name, x):
        name = "backbone" if self.shared else name
        for layer in (0, 1):
            x = torch.tanh(self.parts[f"{name}_{layer}"](x))
        return x

    def actor(self, obs):
        out = self.parts["actor_head"](self.trunk("actor", obs))
        return (out, self.log_std.exp().expand_as(out)) if self.gaussian else out

    def critic(self, obs):
        return self.parts["critic_head"](self.trunk("critic", obs))

    def dist(self, obs):
        return Independent(Normal(*self.actor(obs)), 1) if self.gaussian else Categorical(logits=self.actor(obs))

    def weight(self, name):
        part, _, kind = name.rpartition(".")
        if kind == "log_std":
            return self.log_std.detach()
        parameter = getattr(self.parts[part.replace(".", "_")], kind).detach()
        return parameter.T if kind == "weight" else parameter


def reference_update(
    policy, params, rollout, permutation, minibatch_size, norm_adv, clip_vloss, max_grad_norm, recompute_advantage
):
    """The same update from torch.nn, torchrl's GAE and ClipPPOLoss, clip_grad_norm_ and torch.optim.Adam.

    Rows that are no transitions are thrown away instead of weighed. Returns the modules, the optimiser, the losses by
    minibatch, and SB3's explained variance.
    """
    model = Reference(policy, params)
    num_steps = rollout["reward"].shape[0] - 1
    obs, action, valid = rollout["obs"], rollout["action"][:num_steps], rollout["valid"][:num_steps]
    terminated, truncated = rollout["terminated"][:num_steps], rollout["truncated"][:num_steps]

    @torch.no_grad()
    def estimate():
        value = model.critic(obs).squeeze(-1)
        done, reward = terminated | truncated, rollout["reward"][:num_steps]
        return value, *generalized_advantage_estimate(127 / 128, 61 / 64, value[:-1], value[1:], reward, done, terminated)

    value_all, advantage, value_target = estimate()
    explained = sb3_explained_variance(value_all[:-1][valid].numpy(), value_target[valid].numpy())
    with torch.no_grad():
        log_prob = model.dist(obs[:num_steps]).log_prob(action)
    probabilistic = (
        ProbabilisticTensorDictModule(
            ["loc", "scale"], ["action"], distribution_class=lambda loc, scale: Independent(Normal(loc, scale), 1)
        )
        if model.gaussian
        else ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=Categorical)
    )
    loss = ClipPPOLoss(
        ProbabilisticTensorDictSequential(
            TensorDictModule(model.actor, ["obs"], ["loc", "scale"] if model.gaussian else ["logits"]), probabilistic
        ),
        TensorDictModule(model.critic, ["obs"], ["state_value"]),
        clip_epsilon=0.25,
        entropy_coeff=0.02,
        critic_coeff=0.5,
        loss_critic_type="l2",
        normalize_advantage=norm_adv,
        clip_value=clip_vloss,
        functional=False,
        device=torch.device("cpu"),
    )
    data = TensorDict(
        {
            "obs": obs[:num_steps].flatten(0, 1),
            "action": action.flatten(0, 1),
            loss.tensor_keys.sample_log_prob: log_prob.flatten(),
            "advantage": advantage.reshape(-1, 1),
            "value_target": value_target.reshape(-1, 1),
            "state_value": value_all[:-1].reshape(-1, 1),
        },
        [valid.numel()],
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, eps=1e-5)
    losses = []
    for number, index in enumerate(permutation.reshape(-1, minibatch_size)):
        if recompute_advantage and number * minibatch_size % valid.numel() == 0:
            value_all, advantage, value_target = estimate()
            data["advantage"], data["value_target"] = advantage.reshape(-1, 1), value_target.reshape(-1, 1)
            data["state_value"] = value_all[:-1].reshape(-1, 1)
        out = loss(data[index[valid.flatten()[index]]])
        optimizer.zero_grad()
        (out["loss_objective"] + out["loss_critic"] + out["loss_entropy"]).backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        losses.append(
            [
                x.item()
                for x in (out["loss_objective"], out["loss_critic"] / 0.5, out["entropy"], out["clip_fraction"], grad_norm)
            ]
        )
    return model, optimizer, torch.tensor(losses, dtype=torch.float64), explained


@POLICIES
@pytest.mark.parametrize(
    ("epochs", "minibatches", "norm_adv", "clip_vloss", "max_grad_norm", "recompute_advantage"),
    [
        (1, 1, False, False, 1e9, False),
        (1, 1, True, True, 0.05, True),
        (3, 4, True, True, 0.5, False),
        (3, 4, False, False, 0.5, False),
        (3, 4, True, True, 0.5, True),
        (3, 4, False, False, 0.5, True),
    ],
)
def test_learn_equals_an_update_of_other_peoples_parts(
    policy, epochs, minibatches, norm_adv, clip_vloss, max_grad_norm, recompute_advantage
):
    """The whole of `learn`: values, log-probabilities, advantages, gather, loss, gradient, clipping, Adam and the metrics,

    over a rollout with both kinds of end and with resetting rows, which the reference never sees.
    """
    params = make_params(policy, dtype=torch.float64)
    rollout = make_rollout(policy, 32, 4, dtype=torch.float64)
    assert 5 < (~rollout["valid"][:32]).sum() < 40
    permutation = make_permutation(epochs, 128)
    minibatch_size = 128 // minibatches
    options = {"norm_adv": norm_adv, "clip_vloss": clip_vloss, "max_grad_norm": max_grad_norm}
    options["recompute_advantage"] = recompute_advantage
    model, optimizer, losses, explained = reference_update(policy, params, rollout, permutation, minibatch_size, **options)
    learned = update(policy, params, rollout, permutation, minibatch_size=minibatch_size, **options)

    for name, weight in policy.weights(learned.params).items():
        torch.testing.assert_close(weight, model.weight(name), rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert (learned.params - params).abs().max() > 5e-3  # it did move
    assert learned.adam.step.item() == epochs * minibatches
    if policy is DISCRETE:
        head = optimizer.state[model.parts["critic_head"].bias]
        torch.testing.assert_close(
            policy.weights(learned.adam.exp_avg)["critic.head.bias"], head["exp_avg"], rtol=1e-4, atol=1e-8
        )
    ours = learned.minibatch_metrics[
        :, [COLUMN[name] for name in ("policy_loss", "value_loss", "entropy", "clipfrac", "grad_norm")]
    ]
    torch.testing.assert_close(ours, losses, rtol=1e-4, atol=1e-5)
    assert learned.explained_variance.item() == pytest.approx(float(explained), abs=1e-6)


# --- the rollout ---


@POLICIES
def test_first_minibatch_has_ratio_one(policy):
    """Learning sees what acting saw: before anything has moved every ratio is 1, and afterwards it is not."""
    learned = update(policy, make_params(policy), make_rollout(policy, 16, 4), make_permutation(2, 64), minibatch_size=16)
    deviation, approx_kl, clipfrac = (column(learned, name) for name in ("ratio_deviation", "approx_kl", "clipfrac"))
    assert deviation[0] < 1e-5
    assert abs(approx_kl[0]) < 1e-6
    assert clipfrac[0] == 0.0
    assert min(deviation[1:]) > 1e-3
    assert min(approx_kl[1:]) > 1e-6


def test_every_transition_is_gathered_exactly_once_an_epoch():
    """The minibatches are the permutation's rows in order; each epoch shows each transition once, with its own action,

    and never the bootstrap row T.
    """
    num_steps, num_envs, epochs, minibatch_size = 6, 4, 3, 8
    number = torch.arange((num_steps + 1) * num_envs).reshape(num_steps + 1, num_envs)  # row t*N + n of the flat batch
    off = torch.zeros_like(number, dtype=torch.bool)
    rollout = {"obs": number[..., None].float(), "action": number, "reward": torch.zeros_like(number, dtype=torch.float32)}
    rollout |= {"terminated": off, "truncated": off, "valid": ~off}
    permutation = make_permutation(epochs, num_steps * num_envs)
    policy = CountingPolicy()
    update(policy, torch.ones(1), rollout, permutation, minibatch_size=minibatch_size)
    everything, *minibatches = policy.seen
    assert torch.equal(everything, number.flatten())  # one forward pass over all T+1 rows
    assert torch.equal(policy.actions[0], number.flatten())  # row T's log-probability is computed and dropped
    assert [len(seen) for seen in minibatches] == [minibatch_size] * 9
    for epoch in range(epochs):
        shown = torch.cat(minibatches[3 * epoch : 3 * epoch + 3])
        assert torch.equal(shown, permutation[epoch])
        assert shown.sort().values.tolist() == list(range(num_steps * num_envs))
    for seen, action in zip(minibatches, policy.actions[1:], strict=True):
        assert torch.equal(seen, action)


@POLICIES
@pytest.mark.parametrize("microbatch_size", [1, 6, 16, 1000])
def test_parts_of_a_minibatch_add_up_to_it(policy, microbatch_size):
    """Working a minibatch off in parts changes neither the update nor a metric; invalid rows and the KL stop included."""
    params, rollout, permutation = make_params(policy), make_rollout(policy, 16, 4), make_permutation(3, 64)
    for options in ({}, {"target_kl": 0.01}, {"advantage_estimator": "monte-carlo", "norm_adv": False, "clip_vloss": False}):
        whole = update(policy, params, rollout, permutation, minibatch_size=32, **options)
        parts = update(policy, params, rollout, permutation, minibatch_size=32, microbatch_size=microbatch_size, **options)
        torch.testing.assert_close(parts.params, whole.params, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(parts.minibatch_metrics, whole.minibatch_metrics, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(parts.explained_variance, whole.explained_variance, rtol=1e-4, atol=1e-5)


@POLICIES
@pytest.mark.parametrize("estimator", ["gae", "monte-carlo"])
def test_rows_that_are_no_transitions_have_no_influence(policy, estimator):
    """Any reward and any action in a resetting row, and anything but the observation in row T: not one bit changes."""
    params, rollout, permutation = make_params(policy), make_rollout(policy, 16, 4), make_permutation(2, 64)
    options = {"minibatch_size": 16, "advantage_estimator": estimator, "norm_returns": estimator == "monte-carlo"}
    before = update(policy, params, rollout, permutation, **options)
    other = {name: x.clone() for name, x in rollout.items()}
    resetting = ~rollout["valid"]
    resetting[-1] = True
    other["reward"][resetting] = 100.0
    other["action"][resetting] = 3 if policy is DISCRETE else 1e6
    other["terminated"][-1] = other["truncated"][-1] = True
    other["valid"][-1] = ~other["valid"][-1]
    after = update(policy, params, other, permutation, **options)
    assert_same_bits(before, after)
    assert torch.equal(before.minibatch_metrics, after.minibatch_metrics)
    assert torch.equal(before.explained_variance, after.explained_variance)
    assert torch.equal(before.return_mean, after.return_mean)
    assert torch.equal(before.return_std, after.return_std)
    # while a reward that belongs to a transition does change them
    other["reward"][3, 3] += 1.0
    assert rollout["valid"][3, 3]
    assert not torch.equal(update(policy, params, other, permutation, **options).params, before.params)


def test_an_impossible_action_in_a_resetting_row_is_harmless():
    """The action of a resetting row may lie outside the action space: no error, no influence."""
    params, rollout, permutation = make_params(DISCRETE), make_rollout(DISCRETE, 16, 4), make_permutation(1, 64)
    before = update(DISCRETE, params, rollout, permutation)
    rollout["action"] = torch.where(rollout["valid"], rollout["action"], -7)
    assert_same_bits(before, update(DISCRETE, params, rollout, permutation))


def test_the_observation_of_a_resetting_row_is_the_bootstrap_of_a_truncated_one():
    """It decides the advantage of the truncated step above it, and counts for nothing where that step terminated."""
    off = torch.zeros(4, 1, dtype=torch.bool)
    end = off.clone()
    end[0] = True  # row 1 resets, row 2 is a transition, row 3 the bootstrap
    rollout = make_rollout(DISCRETE, 3, 2) | {"valid": torch.cat((end[:1], ~end[:-1])).expand(4, 2)}
    rollout = {name: x[:, :1].clone() for name, x in rollout.items()}
    other = rollout | {"obs": rollout["obs"].clone()}
    other["obs"][1] += 1.0
    params, permutation = make_params(DISCRETE), make_permutation(1, 3)
    for ends, same in (({"terminated": end, "truncated": off}, True), ({"terminated": off, "truncated": end}, False)):
        one, two = (update(DISCRETE, params, x | ends, permutation, norm_adv=False) for x in (rollout, other))
        assert torch.equal(one.params, two.params) is same


@POLICIES
@pytest.mark.parametrize("end", ["terminated", "truncated"])
@pytest.mark.parametrize("estimator", ["gae", "monte-carlo"])
def test_same_step_and_next_step_autoreset_learn_the_same(policy, end, estimator):
    """One trajectory recorded under both of gymnasium's modes gives the same losses and the same new parameters.

    Next-step: s0, s1 (ends), s2 final and resetting, r0, r1, r2 bootstrap. Same-step: s0, s1 (ends, final_obs s2), r0, r1, r2.
    """
    whole = make_rollout(policy, 5, 2)
    off = torch.zeros(6, 2, dtype=torch.bool)
    ended, valid = off.clone(), ~off
    ended[1], valid[2] = True, False
    next_step = whole | {"terminated": off, "truncated": off, "valid": valid} | {end: ended}
    keep = [0, 1, 3, 4, 5]
    same_step = {name: x[keep] for name, x in next_step.items()}
    same_step["final_obs"] = torch.full_like(same_step["obs"], 1e3)  # nothing, where no episode ends
    same_step["final_obs"][1] = whole["obs"][2]
    params = make_params(policy)
    options = {"advantage_estimator": estimator}
    one = update(policy, params, next_step, make_permutation(1, 10), **options)
    two = update(policy, params, same_step, make_permutation(1, 8), **options)
    torch.testing.assert_close(one.params, two.params, rtol=0, atol=1e-5)
    torch.testing.assert_close(one.minibatch_metrics, two.minibatch_metrics, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.explained_variance, two.explained_variance, rtol=1e-4, atol=1e-5)


@POLICIES
def test_frozen_statistics_normalise_observations_and_rewards(policy):
    """Learning under statistics is learning without them on a rollout that was normalised beforehand, clamped at 10."""
    params, rollout, permutation = make_params(policy), make_rollout(policy, 16, 4), make_permutation(1, 64)
    rollout["reward"][2, 2], rollout["obs"][4, 0, 1] = 44.0, 1000.0  # 44 / 4 = 11 and 2 * (1000 - 1): both clamped to 10
    offset = torch.tensor([-1.0, 1.0, 0.0])
    normalization = OFF._replace(
        obs_mean={"obs": offset}, obs_scale={"obs": torch.tensor([0.5, 2.0, 1.0])}, reward_scale=torch.tensor(0.25)
    )
    by_hand = {name: x.clone() for name, x in rollout.items()}
    by_hand["obs"] = (rollout["obs"] - offset) * torch.tensor([0.5, 2.0, 1.0])
    by_hand["reward"] = rollout["reward"] / 4
    by_hand["reward"][2, 2], by_hand["obs"][4, 0, 1] = 10.0, 10.0
    assert by_hand["obs"].abs().max() == by_hand["reward"].abs().max() == 10.0
    assert_same_bits(update(policy, params, rollout, permutation, normalization), update(policy, params, by_hand, permutation))


def test_final_observations_are_normalised_too():
    """The bootstrap observation of same-step autoreset passes through the same statistics as every other."""
    params, rollout, permutation = make_params(DISCRETE), make_rollout(DISCRETE, 8, 2), make_permutation(1, 16)
    rollout["truncated"][:] = True
    rollout["terminated"][:] = False
    rollout["valid"][:] = True
    rollout["final_obs"] = rollout["obs"].flip(0) + 1.0
    normalization = OFF._replace(obs_mean={"obs": torch.full((3,), 2.0)}, obs_scale={"obs": torch.full((3,), 0.5)})
    by_hand = rollout | {name: (rollout[name] - 2.0) / 2.0 for name in ("obs", "final_obs")}
    assert_same_bits(
        update(DISCRETE, params, rollout, permutation, normalization), update(DISCRETE, params, by_hand, permutation)
    )


def test_monte_carlo_returns_are_standardised_and_translated_by_hand():
    """`norm_returns`: targets are standardised over the valid rows, and the bootstrap is translated back into rewards.

    A network of zeros has value 0 everywhere, which under return_mean 10 and return_std 3 means 0 * 3 + 10 = 10.
    """
    off = torch.zeros(5, 1, dtype=torch.bool)
    truncated, valid = off.clone(), ~off
    truncated[2], valid[3] = True, False
    rollout = make_rollout(DISCRETE, 4, 2)
    rollout = {name: x[:, :1] for name, x in rollout.items()} | {"terminated": off, "truncated": truncated, "valid": valid}
    rollout["reward"] = torch.tensor([1.0, 1.0, 1.0, 100.0, 0.0]).reshape(5, 1)
    normalization = OFF._replace(return_mean=torch.tensor(10.0), return_std=torch.tensor(3.0))
    options = {"gamma": 1.0, "advantage_estimator": "monte-carlo", "clip_vloss": False}
    params = torch.zeros(DISCRETE.num_params)
    learned = update(DISCRETE, params, rollout, make_permutation(1, 4), normalization, norm_returns=True, **options)
    # returns 1 + 1 + 1 + 10 = 13, 12, 11: mean 12, sample standard deviation 1; row 3 is no transition
    assert learned.return_mean.item() == 12.0
    assert learned.return_std.item() == 1.0
    # targets 1, 0, -1 against values of 0: (1 + 0 + 1) / 3
    assert column(learned, "value_loss")[0] == pytest.approx(2 / 3, abs=1e-6)
    assert learned.explained_variance.item() == 0.0
    # in units of rewards (return_mean 0, return_std 1) the bootstrap is 0: returns 3, 2, 1 and squares 9 + 4 + 1 over 3
    learned = update(DISCRETE, params, rollout, make_permutation(1, 4), **options)
    assert column(learned, "value_loss")[0] == pytest.approx(14 / 3, abs=1e-5)
    assert (learned.return_mean.item(), learned.return_std.item()) == (0.0, 1.0)


@pytest.mark.parametrize("estimator", ["gae", "monte-carlo"])
def test_the_explained_variance_has_one_unit(estimator):
    """A critic in units of the reward explains as much where its next targets are standardised as where they are not."""
    params, rollout, permutation = make_params(DISCRETE), make_rollout(DISCRETE, 16, 4), make_permutation(1, 64)
    options = {"advantage_estimator": estimator}
    plain, standardised = (update(DISCRETE, params, rollout, permutation, norm_returns=on, **options) for on in (False, True))
    torch.testing.assert_close(standardised.explained_variance, plain.explained_variance, rtol=1e-4, atol=1e-5)


def test_a_critic_that_learns_no_more_keeps_its_units():
    """After a KL stop, recomputed advantages standardise nothing that it would learn: one epoch's units are those of five."""
    params, rollout = make_params(DISCRETE), make_rollout(DISCRETE, 16, 4)
    options = {"norm_returns": True, "recompute_advantage": True, "target_kl": 1e-9, "minibatch_size": 16}
    one, five = (update(DISCRETE, params, rollout, make_permutation(epochs, 64), **options) for epochs in (1, 5))
    assert sum(column(five, "applied")) <= 1
    assert torch.equal(one.return_mean, five.return_mean)
    assert torch.equal(one.return_std, five.return_std)


@POLICIES
def test_a_standardised_critic_gives_the_advantages_of_a_plain_one(policy):
    """`norm_returns` with GAE: values are translated back before the deltas, and targets standardised after them.

    Oracle: `estimate_advantages` of a critic that says the translated values itself, standardised by torch.
    """
    rollout = make_rollout(policy, 16, 4)
    generator = torch.Generator().manual_seed(5)
    value, next_value = (torch.randn(16, 4, generator=generator) for _ in range(2))
    evaluation = Evaluation(torch.zeros(16, 4), value, next_value)
    translated = Evaluation(torch.zeros(16, 4), value * 3.0 + 10.0, next_value * 3.0 + 10.0)
    normalization = OFF._replace(return_mean=torch.tensor(10.0), return_std=torch.tensor(3.0))
    settings = {"minibatch_size": 16, "clip_vloss": False}
    plain, standardised = (learn_settings(norm_returns=on, **settings)["config"] for on in (False, True))
    expected = estimate_advantages(translated, rollout, coefficients(), OFF, plain, Shard())
    found = estimate_advantages(evaluation, rollout, coefficients(), normalization, standardised, Shard())
    torch.testing.assert_close(found.advantage, expected.advantage)
    targets = expected.value_target[rollout["valid"][:-1]]
    torch.testing.assert_close(found.value_target[rollout["valid"][:-1]], (targets - targets.mean()) / targets.std())
    torch.testing.assert_close((found.return_mean, found.return_std), (targets.mean(), targets.std()))


# --- stopping, skipping, schedules ---


@POLICIES
def test_kl_stop_keeps_everything_after_it_as_it_was(policy):
    """The first minibatch whose KL passes the target is not applied, and no later one either, low as its own KL may be."""
    params, rollout = make_params(policy), make_rollout(policy, 16, 4)
    permutation = make_permutation(2, 64)
    frozen = update(policy, params, rollout, permutation, minibatch_size=8, target_kl=1e-7)
    assert column(frozen, "applied") == [1.0] + [0.0] * 15
    kl = column(frozen, "approx_kl")  # all but the first under the same parameters
    assert kl[0] <= 1e-7 < min(kl[1:])
    only_first = update(policy, params, rollout, permutation[:1, :8], minibatch_size=8)
    assert_same_bits(frozen, only_first)
    assert not torch.equal(frozen.params, params)

    # second comes the minibatch with the largest KL, and the target lies between it and the smallest of the later ones
    worst = max(range(1, 16), key=kl.__getitem__)
    rows = permutation.reshape(16, 8)
    order = [0, worst, *(i for i in range(1, 16) if i != worst)]
    stopped = update(policy, params, rollout, rows[order], minibatch_size=8, target_kl=(kl[worst] + min(kl[1:])) / 2)
    assert column(stopped, "applied") == [1.0] + [0.0] * 15
    assert_same_bits(stopped, only_first)


def test_a_kl_target_that_is_never_reached_changes_nothing():
    """Below the target the stop is not there: the same bits as without one, every minibatch applied."""
    params, rollout, permutation = make_params(DISCRETE), make_rollout(DISCRETE, 16, 4), make_permutation(2, 64)
    one = update(DISCRETE, params, rollout, permutation, minibatch_size=16, target_kl=1e3)
    assert_same_bits(one, update(DISCRETE, params, rollout, permutation, minibatch_size=16))
    assert column(one, "applied") == [1.0] * 8


def test_a_minibatch_without_a_transition_is_skipped():
    """All of its environments were resetting: parameters and Adam, its step count included, stay; the next one goes on."""
    params, rollout = make_params(DISCRETE), make_rollout(DISCRETE, 8, 2)
    rollout["valid"][:, 1] = False
    rollout["valid"][:, 0] = True
    env0, env1 = torch.arange(0, 16, 2), torch.arange(1, 16, 2)
    with_gap = update(DISCRETE, params, rollout, torch.stack((env0, env1, env0.flip(0))), minibatch_size=8, target_kl=1e3)
    assert column(with_gap, "applied") == [1.0, 0.0, 1.0]
    assert with_gap.minibatch_metrics.isfinite().all()
    assert_same_bits(with_gap, update(DISCRETE, params, rollout, torch.stack((env0, env0.flip(0))), minibatch_size=8))
    nothing = update(DISCRETE, params, rollout, env1[None], minibatch_size=8)
    assert torch.equal(nothing.params, params)
    assert not any(x.any() for x in nothing.adam)


def test_the_optimiser_goes_on_from_the_state_it_is_given():
    """A used Adam state moves the parameters otherwise than a fresh one, and its step count goes on."""
    params, rollout, permutation = make_params(DISCRETE), make_rollout(DISCRETE, 8, 2), make_permutation(1, 16)
    first = update(DISCRETE, params, rollout, permutation)
    second = update(DISCRETE, params, rollout, permutation, adam=first.adam)
    assert second.adam.step.item() == 2.0
    assert not torch.equal(first.params, second.params)


def test_learning_rate_zero_moves_nothing():
    """The end of an annealed schedule: the parameters keep their bits."""
    params = make_params(DISCRETE)
    assert torch.equal(update(DISCRETE, params, make_rollout(DISCRETE, 8, 2), make_permutation(2, 16), lr=0.0).params, params)


# --- purity ---


@POLICIES
def test_learn_writes_nothing_in_place(policy):
    """Rollout, parameters, optimiser state and permutation are as before: the caller may keep and reuse them."""
    params, rollout, permutation = make_params(policy), make_rollout(policy, 16, 4), make_permutation(2, 64)
    adam = init_adam(params)
    tensors = [params, *adam, permutation, *rollout.values()]
    copies = [x.clone() for x in tensors]
    learned = update(policy, params, rollout, permutation, adam=adam, minibatch_size=16)
    assert all(torch.equal(x, y) for x, y in zip(tensors, copies, strict=True))
    assert not any(x.requires_grad for x in (learned.params, *learned.adam, learned.minibatch_metrics))


@POLICIES
def test_both_gradients_agree(policy):
    """The eager gradient and torch.func's give the same update and the same metrics."""
    params, rollout, permutation = make_params(policy), make_rollout(policy, 16, 4), make_permutation(2, 64)
    one, two = (
        update(policy, params, rollout, permutation, minibatch_size=16, grad_and_aux=function)
        for function in (grad_and_aux, functional_grad_and_aux)
    )
    torch.testing.assert_close(one.params, two.params, rtol=0, atol=1e-6)
    torch.testing.assert_close(one.minibatch_metrics, two.minibatch_metrics, rtol=1e-4, atol=1e-6)


def test_gradient_by_hand():
    """d/dp of sum(c p^2) is 2 c p, the auxiliary output comes along, and the caller's tensor is left without a gradient."""

    def loss(params, scale):
        return (scale * params.square()).sum(), params.sum()

    params = torch.tensor([1.0, -2.0])
    for function in (grad_and_aux, functional_grad_and_aux):
        grad, aux = function(loss, params, torch.tensor(3.0))
        assert grad.tolist() == [6.0, -12.0]
        assert aux.item() == -1.0
        assert not params.requires_grad


@pytest.mark.parametrize("estimator", ["gae", "monte-carlo"])
def test_clipped_rewards_are_learned_as_their_signs(estimator):
    """Rewards of 12, -0.3 and 0 give the update that 1, -1 and 0 give; what is in the rollout stays as it is."""
    params, rollout, permutation = make_params(DISCRETE), make_rollout(DISCRETE, 8, 2), make_permutation(2, 16)
    rollout["reward"] = torch.tensor([12.0, -0.3, 0.0]).repeat(6).reshape(9, 2)
    signs = {**rollout, "reward": torch.tensor([1.0, -1.0, 0.0]).repeat(6).reshape(9, 2)}
    before = rollout["reward"].clone()
    clipped, expected, raw = (
        update(DISCRETE, params, rows, permutation, advantage_estimator=estimator, clip_reward=clip)
        for rows, clip in ((rollout, True), (signs, False), (rollout, False))
    )
    assert torch.equal(clipped.params, expected.params)
    assert not torch.equal(clipped.params, raw.params)
    assert torch.equal(rollout["reward"], before)


@POLICIES
@pytest.mark.parametrize("gradient", [grad_and_aux, functional_grad_and_aux])
@pytest.mark.parametrize("estimator", ["gae", "monte-carlo"])
def test_programs_run_without_data(policy, gradient, estimator):
    """On the meta device there is no value to ask for: a host sync or a shape that depends on data would raise."""
    rollout = make_rollout(policy, 4, 2)
    rollout["final_obs"] = rollout["obs"]
    normalization = Normalization(
        {"obs": torch.zeros(3)}, {"obs": torch.ones(3)}, torch.ones(()), torch.zeros(()), torch.ones(())
    )
    params, rollout, permutation, normalization = to_meta((make_params(policy), rollout, make_permutation(2, 8), normalization))
    learned = update(
        policy,
        params,
        rollout,
        permutation,
        normalization,
        minibatch_size=4,
        target_kl=0.01,
        advantage_estimator=estimator,
        norm_returns=True,
        clip_reward=False,
        grad_and_aux=gradient,
    )
    assert learned.minibatch_metrics.shape == (4, len(MINIBATCH_METRICS))
    assert learned.params.shape == params.shape
    assert all(x.is_meta for x in (*learned[:1], *learned.adam, *learned[2:]))
    noise = torch.zeros(2, policy.action_size, device="meta")
    assert act(policy, policy.weights(params), normalization, rollout["obs"][0], noise).shape[0] == 2


@POLICIES
def test_programs_never_ask_the_host(policy):
    """No `.item()`, no `bool(tensor)`, no masked selection inside `learn` or `act`, with every option on."""
    params, rollout, permutation = make_params(policy), make_rollout(policy, 8, 2), make_permutation(2, 16)
    with HostSyncs() as probe:
        bool(params.sum() > 0)
        rollout["reward"][rollout["valid"]]
    assert probe.found == ["_local_scalar_dense", "index"]  # the probe sees them
    with HostSyncs() as syncs:
        update(policy, params, rollout, permutation, minibatch_size=8, target_kl=0.01)
        act(policy, policy.weights(params), OFF, rollout["obs"][0], torch.zeros(2, policy.action_size))
    assert syncs.found == []


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"target_kl": 0.05},
        {"advantage_estimator": "monte-carlo", "norm_returns": True, "microbatch_size": 2},
        {"norm_adv": False, "final_obs": True},
        {"advantage_estimator": "monte-carlo", "norm_returns": True, "recompute_advantage": True},
    ],
    ids=["gae", "monte-carlo", "final_obs", "recomputed"],
)
@POLICIES
def test_workers_together_make_the_update_of_one(policy, options, workers):
    """Each has its own environments and rows; sums of gradients and metrics, and the maximum of one, are those of the whole."""
    options = dict(options)
    rollout = make_rollout(policy, 8, 4)
    if options.pop("final_obs", False):
        rollout["final_obs"] = torch.randn(rollout["obs"].shape, generator=torch.Generator().manual_seed(3))
    params, permutation = make_params(policy), make_permutation(3, 32)
    options = {"minibatch_size": 8, **options}
    expected = update(policy, params, rollout, permutation, **options)

    assert_together(updates_of(workers, policy, params, rollout, permutation, **options), expected)


@pytest.mark.parametrize(("ranks", "workers"), [(2, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize(
    "options",
    [
        {"target_kl": 0.003},
        {"advantage_estimator": "monte-carlo", "norm_returns": True, "microbatch_size": 2},
        {"norm_adv": False, "clip_vloss": False, "final_obs": True},
        {"recompute_advantage": True},
    ],
    ids=["gae", "monte-carlo", "final_obs", "recomputed"],
)
@POLICIES
def test_ranks_together_make_the_update_of_one(policy, options, ranks, workers):
    """Each is given its own environments and rows alone, the last one's without a single transition in them.

    Means and deviations of returns and advantages, counts, gradients, metrics and the KL stop are those of the whole.
    """
    options = dict(options)
    num_steps, num_envs, minibatch_size, epochs = 8, 8, 16, 3
    rollout = make_rollout(policy, num_steps, num_envs)
    rollout["valid"][:, -num_envs // ranks :] = False
    rollout["reward"] += torch.arange(num_envs)  # no two ranks have the same means
    if options.pop("final_obs", False):
        rollout["final_obs"] = torch.randn(rollout["obs"].shape, generator=torch.Generator().manual_seed(3))
    params = make_params(policy)

    def permutation(**of_rank):
        out = torch.empty(epochs, num_steps * num_envs // of_rank.get("num_ranks", 1), dtype=torch.int64)
        draw_permutation(out, torch.Generator().manual_seed(3), num_steps, num_envs, minibatch_size, ranks, **of_rank)
        return out

    expected = update(policy, params, rollout, permutation(), minibatch_size=minibatch_size, **options)
    applied = sum(column(expected, "applied"))
    assert applied < len(expected.minibatch_metrics) if "target_kl" in options else applied == len(expected.minibatch_metrics)

    both = ranks * workers
    barrier, places = threading.Barrier(both, timeout=60), [None] * both
    local = [threading.Barrier(workers, timeout=60) for _ in range(ranks)]

    def all_reduce(x, worker, over_ranks):
        number, rank = worker.tolist()
        gate = barrier if over_ranks else local[rank]
        places[rank * workers + number] = x
        gate.wait()
        first, *others = places if over_ranks else places[rank * workers : (rank + 1) * workers]
        total = sum(others, start=first)
        gate.wait()
        return total

    def work(index):
        rank, number = divmod(index, workers)
        own = {key: x.chunk(ranks, 1)[rank] for key, x in rollout.items()}
        shared = {"worker": torch.tensor([number, rank]), "num_workers": workers, "num_ranks": ranks, "all_reduce": all_reduce}
        rows = permutation(rank=rank, num_ranks=ranks)
        return update(policy, params, own, rows, minibatch_size=minibatch_size // ranks, **options, **shared)

    with ThreadPoolExecutor(both) as pool:
        results = list(pool.map(work, range(both)))
    assert_together(results, expected, rtol=1e-5, atol=1e-5)


@POLICIES
def test_learn_works_under_vmap_over_seeds(policy):
    """Two seeds in one call equal two calls: nothing in the program stands in the way of training many at once."""
    seeds = [
        (
            params := make_params(policy, seed),
            init_adam(params),
            make_rollout(policy, 16, 4, seed + 5),
            make_permutation(2, 64, seed),
        )
        for seed in (0, 1)
    ]
    options = {"minibatch_size": 16, "target_kl": 0.02, "grad_and_aux": functional_grad_and_aux}

    def one(params, adam, rollout, permutation):
        learned = update(policy, params, rollout, permutation, adam=adam, **options)
        return learned.params, learned.adam, learned.minibatch_metrics, learned.explained_variance

    stacked = torch.utils._pytree.tree_map(lambda *x: torch.stack(x), *seeds)
    params, adam, metrics, explained = torch.func.vmap(one)(*stacked)
    applied = metrics[..., COLUMN["applied"]]
    for i, arguments in enumerate(seeds):
        expected_params, expected_adam, expected_metrics, expected_explained = one(*arguments)
        torch.testing.assert_close(params[i], expected_params, rtol=0, atol=1e-5)
        torch.testing.assert_close(metrics[i], expected_metrics, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(explained[i], expected_explained, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(AdamState(*(x[i] for x in adam)).step, expected_adam.step)
    assert not torch.equal(applied[0], applied[1])  # each seed stopped where its own KL told it to


# --- acting ---


def test_act_by_hand():
    """The policy head's logits on normalised observations, plus the noise, largest wins: no value, no log-probability."""
    policy = MLPActorCritic(2, 2, CATEGORICAL, ())
    params = torch.zeros(policy.num_params)
    weights = policy.weights(params)
    weights["actor.head.weight"].copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))  # logits are the observation
    weights["actor.head.bias"].copy_(torch.tensor([0.0, 0.5]))
    obs = torch.tensor([[3.0, 2.0], [3.0, 2.0], [1.0, 2.0]])
    noise = torch.tensor([[0.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    # logits + noise: [3, 2.5] -> 0;  [3, 3.5] -> 1;  [3, 2.5] -> 0
    assert act(policy, weights, OFF, obs, noise).tolist() == [0, 1, 0]
    # (obs - (3, 0)) * (1, 0.1) = (0, 0.2), (0, 0.2), (-2, 0.2): logits + noise [0, 0.7] -> 1; [0, 1.7] -> 1; [0, 0.7] -> 1
    normalization = OFF._replace(obs_mean={"obs": torch.tensor([3.0, 0.0])}, obs_scale={"obs": torch.tensor([1.0, 0.1])})
    assert act(policy, weights, normalization, obs, noise).tolist() == [1, 1, 1]
