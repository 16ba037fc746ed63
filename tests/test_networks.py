"""Networks on one flat buffer, held against torch.nn built from the same weights."""

import math

import pytest
import torch

from fastppo.policy.distributions import CATEGORICAL, DIAGONAL_NORMAL
from fastppo.policy.networks import ACTIVATIONS, MLPActorCritic

NN_ACTIVATION = {
    "tanh": torch.nn.Tanh,
    "relu": torch.nn.ReLU,
    "elu": torch.nn.ELU,
    "silu": torch.nn.SiLU,
    "gelu": torch.nn.GELU,
}


def fresh(policy, seed=0):
    """An initialised flat buffer, and one with no zero in it: biases and log_std random as well."""
    params = policy.init(torch.Generator().manual_seed(seed))
    return params, params + 0.1 * torch.randn(params.shape, generator=torch.Generator().manual_seed(seed + 1))


def nn_network(weights, trunk, head, num_layers, activation):
    """torch.nn modules that hold copies of our weights; torch's matrices are (out, in), ours (in, out)."""
    modules = []
    for name in [f"{trunk}.{layer}" for layer in range(num_layers)] + [f"{head}.head"]:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        module = torch.nn.Linear(*weight.shape)
        module.load_state_dict({"weight": weight.T.clone(), "bias": bias.clone()})
        modules += [module, NN_ACTIVATION[activation]()]
    return torch.nn.Sequential(*modules[:-1])  # no activation after the head


@pytest.mark.parametrize("share_backbone", [False, True])
@pytest.mark.parametrize("distribution", [CATEGORICAL, DIAGONAL_NORMAL])
def test_weights_are_views_that_tile_the_flat_buffer(distribution, share_backbone):
    """Writing a weight writes the buffer and the other way round, and every element belongs to exactly one weight."""
    policy = MLPActorCritic(3, 2, distribution, (8, 5), share_backbone=share_backbone)
    params = torch.zeros(policy.num_params)
    weights = policy.weights(params)
    assert sum(weight.numel() for weight in weights.values()) == policy.num_params
    for weight in weights.values():
        weight += 1.0
    assert torch.equal(params, torch.ones(policy.num_params))
    params.fill_(7.0)
    assert all((weight == 7.0).all() for weight in weights.values())
    assert {weight.untyped_storage().data_ptr() for weight in weights.values()} == {params.untyped_storage().data_ptr()}


@pytest.mark.parametrize(
    ("policy", "count"),
    [
        # 4*64+64 + 64*64+64 = 320 + 4160 = 4480 a trunk; heads 64*2+2 = 130 and 65
        (MLPActorCritic(4, 2, CATEGORICAL), 2 * 4480 + 130 + 65),
        (MLPActorCritic(4, 2, CATEGORICAL, share_backbone=True), 4480 + 130 + 65),
        # 17*64+64 + 4160 = 5312 a trunk; heads 64*6+6 = 390 and 65; 6 log standard deviations
        (MLPActorCritic(17, 6, DIAGONAL_NORMAL), 2 * 5312 + 390 + 65 + 6),
        # no hidden layer: 4*2+2 and 4+1
        (MLPActorCritic(4, 2, CATEGORICAL, ()), 15),
    ],
)
def test_number_of_parameters_by_hand(policy, count):
    """A shared backbone is counted once, a Gaussian has a log standard deviation for each component."""
    assert policy.num_params == count
    assert policy.init(torch.Generator()).shape == (count,)


@pytest.mark.parametrize("share_backbone", [False, True])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_outputs_equal_torch_nn(activation, share_backbone):
    """Actor and critic are the torch.nn networks of the same weights, each from its own trunk or both from the shared one."""
    policy = MLPActorCritic(3, 4, CATEGORICAL, (16, 8), activation, share_backbone)
    _, params = fresh(policy)
    weights = policy.weights(params)
    obs = 2.0 * torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(5))  # (T, N, D)
    trunks = ("backbone", "backbone") if share_backbone else ("actor", "critic")
    actor = nn_network(weights, trunks[0], "actor", 2, activation)
    critic = nn_network(weights, trunks[1], "critic", 2, activation)
    torch.testing.assert_close(policy.actor(weights, obs), actor(obs).detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(policy.critic(weights, obs), critic(obs).detach().squeeze(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("share_backbone", [False, True])
@pytest.mark.parametrize("distribution", [CATEGORICAL, DIAGONAL_NORMAL])
def test_actor_critic_equals_both_apart(distribution, share_backbone):
    """One call for both gives the same as two but for rounding, in any batch shape, a single observation included."""
    policy = MLPActorCritic(3, 2, distribution, (16, 16), share_backbone=share_backbone)
    weights = policy.weights(fresh(policy)[1])
    for batch in ((), (5,), (4, 5), (2, 3, 4)):
        obs = torch.randn(*batch, 3, generator=torch.Generator().manual_seed(6))
        dist, value = policy.actor_critic(weights, obs)
        apart = policy.actor(weights, obs)
        assert value.shape == batch
        torch.testing.assert_close(value, policy.critic(weights, obs), rtol=1e-5, atol=1e-6)
        parts = zip(dist, apart, strict=True) if distribution is DIAGONAL_NORMAL else [(dist, apart)]
        for together, alone in parts:
            assert together.shape == (*batch, 2)
            torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_a_gaussian_actor_has_one_log_std_for_all_states():
    """log_std is a parameter of its own: log_std_init at the start, the same in every state, and moved by its own gradient."""
    policy = MLPActorCritic(3, 2, DIAGONAL_NORMAL, (8,), log_std_init=-0.5)
    params, _ = fresh(policy)
    params.requires_grad_()
    _, log_std = policy.actor(policy.weights(params), torch.randn(7, 3))
    assert torch.equal(log_std, torch.full((7, 2), -0.5))
    (grad,) = torch.autograd.grad(log_std.sum(), params)
    assert policy.weights(grad)["actor.log_std"].tolist() == [7.0, 7.0]
    assert grad.sum().item() == 14.0  # and nothing else


@pytest.mark.parametrize("share_backbone", [False, True])
def test_initial_weights_are_orthogonal_with_the_stated_gains(share_backbone):
    """W^T W, or W W^T where it is the smaller, is gain^2 I: sqrt(2) in trunks, 0.01 in the actor's head, 1 in the critic's."""
    policy = MLPActorCritic(4, 3, CATEGORICAL, (64, 32), share_backbone=share_backbone)
    trunks = ("backbone",) if share_backbone else ("actor", "critic")
    square_gain = {"actor.head.weight": 1e-4, "critic.head.weight": 1.0}
    square_gain |= {f"{trunk}.{layer}.weight": 2.0 for trunk in trunks for layer in (0, 1)}
    weights = policy.weights(fresh(policy)[0])
    for name, gain in square_gain.items():
        weight = weights.pop(name)
        product = weight.T @ weight if weight.shape[0] >= weight.shape[1] else weight @ weight.T
        torch.testing.assert_close(product, gain * torch.eye(len(product)), rtol=0, atol=1e-5 * gain)
    assert all(name.endswith(".bias") and not weight.any() for name, weight in weights.items())


def test_initialisation_belongs_to_its_generator():
    """The same generator seed gives the same buffer, another another; the global generator is not touched."""
    policy = MLPActorCritic(4, 2, CATEGORICAL)
    before = torch.get_rng_state()
    params, _ = fresh(policy, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(params, fresh(policy, seed=3)[0])
    assert not torch.equal(params, fresh(policy, seed=4)[0])


def test_fresh_policy_is_nearly_uniform():
    """The small gain of the actor's head: exploration starts unprejudiced, entropy within 1e-3 of log A."""
    policy = MLPActorCritic(4, 3, CATEGORICAL)
    logits = policy.actor(policy.weights(fresh(policy)[0]), torch.randn(100, 4, generator=torch.Generator().manual_seed(7)))
    assert (policy.entropy(logits) - math.log(3)).abs().max() < 1e-3
