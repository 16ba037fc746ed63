"""`learn` with a memory: held against stepping and against torch.nn, and which rows have an influence."""

import itertools

import pytest
import torch
from torchrl.objectives.value.functional import generalized_advantage_estimate

from fastppo.core.contracts import Normalization, normalize_obs
from fastppo.policy.rnn import RecurrentActorCritic
from support.programs import OFF, assert_same_bits, column, make_permutation, update
from support.recurrent import KINDS, LAYERS, SPACES, USERS, make_params, make_policy, make_rollout, setting


@KINDS
@pytest.mark.parametrize("spaces", list(SPACES))
@pytest.mark.parametrize("normalized", [False, True], ids=["raw", "normalised"])
def test_first_minibatch_has_ratio_one(kind, spaces, normalized):
    """Learning sees what acting saw, whatever is observed and done: before anything has moved every ratio is 1, then not."""
    space, act_space = SPACES[spaces]
    policy, spec, action = make_policy(kind, observation=space, action=act_space)
    params, normalization = make_params(policy), OFF
    if normalized:
        leaves = {leaf.key: leaf.shape for leaf in spec.normalized}
        mean, scale = ({key: torch.full(shape, x) for key, shape in leaves.items()} for x in (0.3, 0.7))
        normalization = Normalization(mean, scale, torch.tensor(0.25), torch.zeros(()), torch.ones(()))
    rollout = make_rollout(policy, spec, action, params, space, normalization=normalization)
    permutation = torch.tensor([[3, 1, 0, 2], [2, 3, 1, 0]])  # none in a place of its own
    learned = update(policy, params, rollout, permutation, normalization, minibatch_size=24)
    deviation, clipfrac = column(learned, "ratio_deviation"), column(learned, "clipfrac")
    assert deviation[0] <= 1e-5
    assert clipfrac[0] == 0.0
    assert abs(column(learned, "approx_kl")[0]) < 1e-6
    assert min(deviation[1:]) > 1e-3
    assert learned.minibatch_metrics.isfinite().all()


@KINDS
def test_statistics_are_those_of_the_rollout_normalised_beforehand(kind):
    """Observations, the final ones among them, and rewards under frozen statistics: to the bit what normalising first gives."""
    policy, params, rollout = setting(kind=kind)
    rollout["reward"] = rollout["reward"].clamp(-30.0, 30.0)
    rollout["final_obs"] = rollout["obs"].flip(0)
    offset, scale = torch.tensor([-1.0, 1.0, 0.0]), torch.tensor([0.5, 0.25, 1.0])
    normalization = Normalization({"obs": offset}, {"obs": scale}, torch.tensor(0.25), torch.zeros(()), torch.ones(()))
    by_hand = rollout | {key: normalize_obs(rollout[key], normalization) for key in ("obs", "final_obs")}
    by_hand["reward"] = rollout["reward"] / 4
    one, two, raw = (
        update(policy, params, rows, make_permutation(2, 4), under, minibatch_size=24)
        for rows, under in ((rollout, normalization), (by_hand, OFF), (rollout, OFF))
    )
    assert_same_bits(one, two)
    assert not torch.equal(one.params, raw.params)


@pytest.mark.parametrize("spaces", ["discrete", "continuous", "masked"])
@pytest.mark.parametrize("estimator", ["gae", "monte-carlo"])
@KINDS
def test_rows_that_are_no_transitions_have_no_influence(kind, spaces, estimator):
    """Any reward and any action in a row that resets, and anything but the observation in row T: not one bit changes."""
    policy, params, rollout = setting(spaces, kind)
    permutation = make_permutation(2, 4)
    options = {"minibatch_size": 24, "advantage_estimator": estimator, "norm_returns": estimator == "monte-carlo"}
    before = update(policy, params, rollout, permutation, **options)
    other = {name: x.clone() for name, x in rollout.items()}
    resetting = ~rollout["valid"]
    assert resetting[:-1].sum() > 3
    resetting[-1] = True
    other["reward"][resetting] = -1e5
    other["action"][resetting] = 1e6 if spaces == "continuous" else 0
    other["terminated"][-1] = other["truncated"][-1] = True
    other["valid"][-1] = ~other["valid"][-1]
    after = update(policy, params, other, permutation, **options)
    assert_same_bits(before, after)
    for name in ("minibatch_metrics", "explained_variance", "return_mean", "return_std"):
        assert torch.equal(getattr(before, name), getattr(after, name)), name
    step, env = (int(x) for x in torch.nonzero(rollout["valid"][:-1])[-1])  # while that of a transition does
    other["reward"][step, env] += 1.0
    assert not torch.equal(update(policy, params, other, permutation, **options).params, before.params)


@pytest.mark.parametrize("estimator", ["gae", "monte-carlo"])
@pytest.mark.parametrize("spaces", ["discrete", "continuous"])
@KINDS
def test_what_a_terminated_episode_led_to_has_no_influence(kind, spaces, estimator):
    """The observation of a row that only resets is the one that the episode ended with. After a terminal state not one bit

    hangs on it, neither through what is remembered nor through a value; after a truncation it is the bootstrap's.
    """
    policy, params, rollout = setting(spaces, kind)
    options = {"minibatch_size": 24, "advantage_estimator": estimator, "norm_returns": estimator == "monte-carlo"}
    before = update(policy, params, rollout, make_permutation(2, 4), **options)
    truncated_only = (rollout["truncated"] & ~rollout["terminated"])[:-1]
    led_to = ~rollout["valid"]
    bootstraps = led_to & torch.cat((torch.zeros_like(led_to[:1]), truncated_only))
    assert (led_to & ~bootstraps)[:-1].sum() > 1
    other = 3.0 * torch.randn(rollout["obs"].shape, generator=torch.Generator().manual_seed(9))
    for rows, same in ((led_to & ~bootstraps, True), (bootstraps, False)):
        changed = rollout | {"obs": torch.where(rows.unsqueeze(-1), other, rollout["obs"])}
        after = update(policy, params, changed, make_permutation(2, 4), **options)
        assert torch.equal(before.params, after.params) == same
        assert torch.equal(before.minibatch_metrics, after.minibatch_metrics) == same
        assert torch.equal(before.explained_variance, after.explained_variance) == same


@KINDS
def test_what_happened_before_an_episode_has_no_influence(kind):
    """Where rows begin an episode, neither the memory at the rollout's start nor an earlier row's observation reaches them."""
    policy, params, rollout = setting(kind=kind)
    rollout["terminated"][:], rollout["truncated"][:], rollout["valid"][:] = False, False, True
    rollout["episode_start"][:] = False
    rollout["episode_start"][5] = rollout["terminated"][4] = True
    rollout["valid"][:5] = False  # what remains are the episodes from row 5 on
    other = rollout | {"rnn_state": torch.randn(rollout["rnn_state"].shape), "obs": rollout["obs"].clone()}
    other["obs"][:5] = torch.randn(5, 4, 3)
    one, two = (update(policy, params, rows, make_permutation(2, 4), minibatch_size=24) for rows in (rollout, other))
    torch.testing.assert_close(one.params, two.params, rtol=0, atol=1e-6)
    rollout["episode_start"][5] = False  # and without the start they do
    assert (update(policy, params, rollout, make_permutation(2, 4), minibatch_size=24).params - one.params).abs().max() > 1e-3


class Stepping(RecurrentActorCritic):
    """The same network whose `replay` is a loop of `step` and `judge`: an oracle whose gradient is autograd's."""

    def unroll(self, weights, obs, episode_start, rnn_state, cells):
        dists, values, memories = [], [], []
        for t in range(episode_start.shape[0]):
            rnn_state = torch.where(episode_start[t][:, None], 0.0, rnn_state)
            values.append(self.value_from_state(weights, obs[t], rnn_state))
            dist, rnn_state = self.step(weights, obs[t], rnn_state)
            dists.append(dist)
            memories.append(rnn_state)
        several = isinstance(dists[0], tuple)
        dist = tuple(torch.stack(parts) for parts in zip(*dists, strict=True)) if several else torch.stack(dists)
        return dist, torch.stack(values), torch.stack(memories)


@KINDS
@USERS
@LAYERS
@pytest.mark.parametrize("spaces", ["discrete", "continuous"])
@pytest.mark.parametrize("final_obs", [False, True], ids=["next step", "final_obs"])
def test_learning_is_that_of_stepping_with_autograd(kind, users, layers, spaces, final_obs):
    """All that `learn` returns, with every term of the loss: the written-out gradient, the values, the bootstraps."""
    policy, params, rollout = setting(spaces, kind, users, num_steps=6, layers=layers)
    if final_obs:
        rollout["final_obs"] = rollout["obs"].flip(0)
    alike = Stepping(policy.encoder, policy.rnn, policy.mlp)
    one, two = (update(each, params, rollout, make_permutation(2, 4), minibatch_size=12) for each in (policy, alike))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert (one.params - params).abs().max() > 1e-3


def by_torch(policy, params, obs, episode_start, rnn_state):
    """Actor's and critic's output (T, N, ...) from torch.nn.LSTM or GRU, which goes through each episode by itself.

    A gradient to the flat buffer params goes through torch's own backward.
    """
    weights, rnn, (steps, number) = policy.weights(params), policy.rnn, episode_start.shape
    module = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[rnn.kind](rnn.input_size, rnn.hidden_size, rnn.num_layers).double()
    parts, outs = {"lstm": 2, "gru": 1}[rnn.kind], []
    states = rnn_state.view(number, rnn.num_users, rnn.num_layers, parts, rnn.hidden_size)
    for user in range(rnn.num_users):
        named = {}
        for layer in range(rnn.num_layers):
            own = {name: weights[f"rnn.{layer}.{name}"][user] for name in ("input.weight", "input.bias", "hidden.weight")}
            hidden_bias = torch.zeros_like(own["input.bias"])  # torch has two, which an LSTM adds up
            if rnn.kind == "gru":
                of_n = weights[f"rnn.{layer}.hidden.bias"][user]
                hidden_bias = torch.cat((hidden_bias[: -rnn.hidden_size], of_n))
            named |= {f"weight_ih_l{layer}": own["input.weight"].mT, f"weight_hh_l{layer}": own["hidden.weight"].mT}
            named |= {f"bias_ih_l{layer}": own["input.bias"], f"bias_hh_l{layer}": hidden_bias}
        sequences = []
        for n in range(number):
            starts = [0, *(t for t in range(1, steps) if episode_start[t, n]), steps]
            pieces = []
            for begin, end in itertools.pairwise(starts):
                before = tuple(states[n, user].transpose(0, 1).contiguous())  # h and c, (L, H) each
                if begin > 0 or episode_start[0, n]:
                    before = tuple(torch.zeros_like(part) for part in before)
                state = before if rnn.kind == "lstm" else before[0]
                pieces.append(torch.func.functional_call(module, named, (obs[begin:end, n], state))[0])
            sequences.append(torch.cat(pieces))
        outs.append(torch.stack(sequences, 1))  # (T, N, H)
    heads = []
    for name, x in (("actor", outs[0]), ("critic", outs[-1])):
        for layer in ("0", "head"):
            x = torch.nn.functional.linear(x, weights[f"{name}.{layer}.weight"].mT, weights[f"{name}.{layer}.bias"])
            x = x.tanh() if layer == "0" else x
        heads.append(x)
    return heads[0], heads[1].squeeze(-1)


@KINDS
@USERS
@LAYERS
@pytest.mark.parametrize("spaces", ["discrete", "continuous"])
def test_the_first_gradient_is_that_of_torch_on_split_sequences(kind, users, layers, spaces):
    """torch.nn run on each episode alone, torchrl's advantages, torch's distributions and autograd down to the flat buffer.

    Where no parameter has moved the ratio is 1: the policy's gradient is that of -A log pi. The first moment of a fresh Adam is
    a tenth of the gradient. Over ends of both kinds and rows that only reset; theirs in double.
    """
    policy, own_params, own_rollout = setting(spaces, kind, users, layers=layers, hidden=5)
    rollout = {key: x.double() if x.is_floating_point() else x for key, x in own_rollout.items()}
    params = own_params.double().requires_grad_()
    action, valid = rollout["action"][:12], rollout["valid"][:12]
    terminated, truncated = rollout["terminated"][:12], rollout["truncated"][:12]
    assert (terminated & ~truncated & valid).any()
    assert (truncated & ~terminated & valid).any()
    out, value = by_torch(policy, params, rollout["obs"], rollout["episode_start"], rollout["rnn_state"])
    judged = value.detach().unsqueeze(-1)
    ends = ((terminated | truncated).unsqueeze(-1), terminated.unsqueeze(-1))
    advantage, target = generalized_advantage_estimate(
        127 / 128, 61 / 64, judged[:-1], judged[1:], rollout["reward"][:12].unsqueeze(-1), *ends, time_dim=0
    )
    if spaces == "discrete":
        dist = torch.distributions.Categorical(logits=out[:12])
    else:
        normal = torch.distributions.Normal(out[:12], policy.weights(params)["actor.log_std"].exp())
        dist = torch.distributions.Independent(normal, 1)
    advantage = advantage.squeeze(-1)[valid]
    advantage = (advantage - advantage.mean()) / advantage.std()
    policy_loss = -(advantage * dist.log_prob(action)[valid]).mean()
    value_loss = torch.nn.functional.mse_loss(value[:12][valid], target.squeeze(-1)[valid])
    (expected,) = torch.autograd.grad(policy_loss + 0.5 * value_loss - 0.02 * dist.entropy()[valid].mean(), params)

    permutation = torch.tensor([[2, 0, 3, 1]])
    learned = update(policy, own_params, own_rollout, permutation, minibatch_size=48, max_grad_norm=1e9)
    assert column(learned, "ratio_deviation")[0] < 1e-5
    for name, gradient in policy.weights(10.0 * learned.adam.exp_avg).items():
        theirs = policy.weights(expected)[name].float()
        scale = theirs.abs().max().item()
        assert scale > 1e-4, name  # every weight has one
        torch.testing.assert_close(gradient, theirs, rtol=0, atol=1e-4 * scale, msg=lambda text, name=name: f"{name}: {text}")
    assert column(learned, "value_loss")[0] == pytest.approx(value_loss.item(), rel=1e-5)


@KINDS
@USERS
@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_an_episode_that_begins_in_the_middle_equals_the_halves_apart(kind, users, end):
    """10 rows of 3 environments, all of whose episodes end at row 4, give the losses and the gradient of 5 rows of 6.

    The first moment of a fresh Adam is a tenth of the gradient.
    """
    policy, params, rollout = setting(kind=kind, users=users, num_steps=10, num_envs=3)
    off = torch.zeros(11, 3, dtype=torch.bool)
    episode_start, ended = off.clone(), off.clone()
    episode_start[5] = ended[4] = True
    rollout |= {"terminated": off, "truncated": off, "valid": ~off, "episode_start": episode_start} | {end: ended}
    rollout["final_obs"] = torch.randn(rollout["obs"].shape, generator=torch.Generator().manual_seed(4))
    halves = {key: torch.cat((x[:6], x[5:]), 1) for key, x in rollout.items() if key != "rnn_state"}
    halves["rnn_state"] = torch.cat((rollout["rnn_state"], torch.zeros_like(rollout["rnn_state"])))
    options = {"minibatch_size": 30, "max_grad_norm": 1e9}
    whole = update(policy, params, rollout, torch.arange(3)[None], **options)
    apart = update(policy, params, halves, torch.arange(6)[None], **options)
    torch.testing.assert_close(whole.adam.exp_avg, apart.adam.exp_avg, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(whole.minibatch_metrics, apart.minibatch_metrics, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.explained_variance, apart.explained_variance, rtol=1e-4, atol=1e-5)
    for name, gradient in policy.weights(whole.adam.exp_avg).items():
        assert gradient.abs().max() > 1e-6, name  # every weight was compared, the recurrent ones too
    # without the start in the middle it is another gradient
    through = update(policy, params, rollout | {"episode_start": off}, torch.arange(3)[None], **options)
    assert (through.adam.exp_avg - whole.adam.exp_avg).abs().max() > 1e-4
