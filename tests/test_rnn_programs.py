"""`learn` with a memory as a program: minibatches, microbatches, workers, vmap, no data and no host."""

import pytest
import torch

from fastppo.core.acting import act_recurrent, collect
from fastppo.core.contracts import Execution, obs_of
from fastppo.core.gradient import functional_grad_and_aux, grad_and_aux
from fastppo.core.ppo import MINIBATCH_METRICS
from support.programs import OFF, HostSyncs, assert_together, make_permutation, to_meta, update, updates_of
from support.recurrent import KINDS, USERS, Bench, make_params, make_policy, setting


class CountingPolicy:
    """A policy that notes which sequences it was shown. An observation is its row's number, as is its action."""

    rnn_state_size = 1

    def __init__(self):
        self.seen, self.episode_starts, self.memories, self.actions = [], [], [], []

    def weights(self, params):
        return {"w": params}

    def unroll(self, weights, obs, episode_start, rnn_state, cells):
        number = obs.squeeze(-1)
        self.seen.append(number.long())
        self.episode_starts.append(episode_start)
        self.memories.append(rnn_state)
        return number * weights["w"], number * weights["w"], rnn_state.expand(len(obs), *rnn_state.shape)

    def log_prob(self, dist, action):
        self.actions.append(action)
        return -0.001 * dist

    def entropy(self, dist):
        return dist


def test_every_environment_is_gathered_exactly_once_an_epoch():
    """Minibatches are the permutation's environments in order, each with all its rows in theirs, its own actions, episode

    starts and memory; each epoch shows each once, and never the bootstrap row T.
    """
    num_steps, num_envs, epochs = 6, 4, 3
    number = torch.arange((num_steps + 1) * num_envs).reshape(num_steps + 1, num_envs)
    off = torch.zeros_like(number, dtype=torch.bool)
    rollout = {"obs": number[..., None].float(), "action": number, "reward": torch.zeros_like(number, dtype=torch.float32)}
    rollout |= {"terminated": off, "truncated": off, "valid": ~off, "episode_start": number % 5 == 0}
    rollout["rnn_state"] = torch.arange(num_envs)[:, None].float()
    permutation = make_permutation(epochs, num_envs)
    policy = CountingPolicy()
    update(policy, torch.ones(1), rollout, permutation, minibatch_size=2 * num_steps)
    assert torch.equal(policy.seen[0], number)  # one pass over all T+1 rows
    assert torch.equal(policy.episode_starts[0], rollout["episode_start"])
    assert len(policy.seen) == 1 + 2 * epochs
    shown = zip(policy.seen[1:], policy.episode_starts[1:], policy.memories[1:], policy.actions[1:], strict=True)
    for environments, (seen, episode_start, rnn_state, action) in zip(permutation.reshape(-1, 2), shown, strict=True):
        assert torch.equal(seen, number[:num_steps, environments])
        assert torch.equal(action, seen)
        assert torch.equal(episode_start, seen % 5 == 0)
        assert torch.equal(rnn_state.squeeze(1), environments.float())
    for epoch in range(epochs):
        memories = torch.cat(policy.memories[1 + 2 * epoch : 3 + 2 * epoch])
        assert memories.flatten().sort().values.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("spaces", ["continuous", "masked"])
@pytest.mark.parametrize("microbatch_size", [1, 12, 26, 1000])
@KINDS
def test_parts_of_a_minibatch_add_up_to_it(kind, spaces, microbatch_size):
    """Working it off in parts, of environments when learning and of steps when judging, changes neither update nor metrics."""
    policy, params, rollout = setting(spaces, kind, num_steps=11)
    rollout |= {"final_" + key: x.flip(0) for key, x in rollout.items() if key.partition(".")[0] == "obs"}
    for options in ({"target_kl": 0.05}, {"advantage_estimator": "monte-carlo", "norm_adv": False, "clip_vloss": False}):
        options = {"minibatch_size": 22, **options}
        whole = update(policy, params, rollout, make_permutation(2, 4), **options)
        parts = update(policy, params, rollout, make_permutation(2, 4), microbatch_size=microbatch_size, **options)
        torch.testing.assert_close(parts.params, whole.params, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(parts.minibatch_metrics, whole.minibatch_metrics, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(parts.explained_variance, whole.explained_variance, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"target_kl": 0.05},
        {"advantage_estimator": "monte-carlo", "norm_returns": True, "microbatch_size": 6},
        {"norm_adv": False, "final_obs": True},
    ],
    ids=["gae", "monte-carlo", "final_obs"],
)
@KINDS
def test_workers_together_make_the_update_of_one(kind, options):
    """Each has its own environments, the memory at the start of them included."""
    options = dict(options)
    policy, params, rollout = setting(kind=kind, num_steps=6, num_envs=8)
    if options.pop("final_obs", False):
        rollout["final_obs"] = rollout["obs"].flip(0)
    options, permutation = {"minibatch_size": 24, **options}, make_permutation(3, 8)
    expected = update(policy, params, rollout, permutation, **options)
    assert_together(updates_of(2, policy, params, rollout, permutation, **options), expected)


def test_workers_collect_their_own_part():
    """Two calls of `collect`, each with half of the environments, walk as one call does with all; memory included."""
    bench, noise = Bench("device"), torch.randn(7, 4, 3, generator=torch.Generator().manual_seed(0))
    bench.collect()
    running = bench.running()
    arguments = (bench.params, OFF, running, noise, torch.rand(7, 4, 3))
    settings = {"policy": bench.policy.policy, "env_step": bench.collector.env_step}
    whole = collect(*arguments, **settings)
    both = Execution(num_workers=2)
    parts = [collect(*arguments, torch.tensor([number, 0]), execution=both, **settings) for number in range(2)]
    assert len(whole.running) == len(running)
    for index, x in enumerate(whole.running):
        torch.testing.assert_close(torch.cat([part.running[index] for part in parts]), x)
    for name in ("obs", "action", "reward", "valid"):
        torch.testing.assert_close(torch.cat([getattr(part, name) for part in parts], 1), getattr(whole, name))


@KINDS
@USERS
def test_both_gradients_agree(kind, users):
    """The eager gradient and torch.func's, through the cells' own backward, give the same update and metrics."""
    policy, params, rollout = setting(kind=kind, users=users)
    one, two = (
        update(policy, params, rollout, make_permutation(2, 4), minibatch_size=24, grad_and_aux=function)
        for function in (grad_and_aux, functional_grad_and_aux)
    )
    torch.testing.assert_close(one.params, two.params, rtol=0, atol=1e-6)
    torch.testing.assert_close(one.minibatch_metrics, two.minibatch_metrics, rtol=1e-4, atol=1e-6)


@KINDS
def test_learn_writes_nothing_in_place(kind):
    """The rollout, its memory among the rest, and the parameters are as before."""
    policy, params, rollout = setting(kind=kind)
    tensors = [params, *rollout.values()]
    copies = [x.clone() for x in tensors]
    learned = update(policy, params, rollout, make_permutation(2, 4), minibatch_size=24)
    assert all(torch.equal(x, y) for x, y in zip(tensors, copies, strict=True))
    assert not learned.params.requires_grad


@KINDS
def test_learn_works_under_vmap_over_seeds(kind):
    """Two seeds in one call equal two calls."""
    policy, *_ = make_policy(kind)
    seeds = []
    for seed in (0, 1):
        _, _, rollout = setting(kind=kind, seed=seed + 5)
        seeds.append((make_params(policy, seed), rollout, make_permutation(2, 4, seed)))

    def one(params, rollout, permutation):
        options = {"minibatch_size": 24, "grad_and_aux": functional_grad_and_aux}
        learned = update(policy, params, rollout, permutation, **options)
        return learned.params, learned.minibatch_metrics

    params, metrics = torch.func.vmap(one)(*torch.utils._pytree.tree_map(lambda *x: torch.stack(x), *seeds))
    for index, arguments in enumerate(seeds):
        expected_params, expected_metrics = one(*arguments)
        torch.testing.assert_close(params[index], expected_params, rtol=0, atol=1e-5)
        torch.testing.assert_close(metrics[index], expected_metrics, rtol=1e-3, atol=1e-5)


@KINDS
@pytest.mark.parametrize("gradient", [grad_and_aux, functional_grad_and_aux])
@pytest.mark.long
def test_programs_run_without_data(kind, gradient):
    """On the meta device there is no value to ask for: a host sync or a shape that depends on data would raise."""
    policy, params, rollout = setting("masked", kind, layers=2)
    rollout |= {"final_" + key: x for key, x in rollout.items() if key.partition(".")[0] == "obs"}
    params, rollout, permutation, normalization = to_meta((params, rollout, make_permutation(2, 4), OFF))
    options = {"minibatch_size": 24, "target_kl": 0.01, "microbatch_size": 12, "grad_and_aux": gradient}
    learned = update(policy, params, rollout, permutation, normalization, **options)
    assert learned.minibatch_metrics.shape == (4, len(MINIBATCH_METRICS))
    assert all(x.is_meta for x in (learned.params, *learned.adam, *learned[2:]))
    row = {key: x[0] for key, x in obs_of(rollout).items()}
    noise = torch.zeros(4, 5, device="meta")
    episode_start = rollout["episode_start"][0]
    action, rnn_state = act_recurrent(
        policy, policy.weights(params), normalization, row, noise, rollout["rnn_state"], episode_start
    )
    assert action.shape == (4, 2)
    assert rnn_state.shape == rollout["rnn_state"].shape


@KINDS
def test_programs_never_ask_the_host(kind):
    """No `.item()`, no `bool(tensor)`, no masked selection inside `learn`, `act` or `collect`, with every option on."""
    policy, params, rollout = setting(kind=kind)
    rollout["final_obs"] = rollout["obs"]
    bench = Bench("device", kind=kind)
    running = bench.running()
    draws = torch.randn(7, 4, 3), torch.rand(7, 4, 3)
    with HostSyncs() as probe:
        bool(rollout["episode_start"].any())
    assert probe.found == ["_local_scalar_dense"]  # the probe sees it
    with HostSyncs() as syncs:
        update(policy, params, rollout, make_permutation(2, 4), minibatch_size=24, target_kl=0.01, microbatch_size=12)
        weights, episode_start = policy.weights(params), rollout["episode_start"][0]
        act_recurrent(policy, weights, OFF, rollout["obs"][0], torch.zeros(4, 3), rollout["rnn_state"], episode_start)
        bench.act(running, *draws)
    assert syncs.found == []
