"""Networks on one flat buffer, held against torch.nn built from the same weights."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from environments import OBSERVATIONS
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete

from fastppo.policy.actor_critic import ActorCritic
from fastppo.policy.distributions import CATEGORICAL, DIAGONAL_NORMAL
from fastppo.policy.encoder import Encoder, encode
from fastppo.policy.mlp import ACTIVATIONS, MLPActorCritic
from fastppo.policy.spaces import obs_spec

NN_ACTIVATION = {
    "tanh": torch.nn.Tanh,
    "relu": torch.nn.ReLU,
    "elu": torch.nn.ELU,
    "silu": torch.nn.SiLU,
    "gelu": torch.nn.GELU,
}


def joined(encoder: Encoder, actions: int, sizes: tuple[int, ...]) -> ActorCritic:
    return ActorCritic(encoder, MLPActorCritic(encoder.size, actions, CATEGORICAL, sizes))


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


# --- observations of any kind


def stored(space, rows=16):
    """Samples as the rollout has them, by leaf: (rows, *shape)."""
    space.seed(0)
    samples = [space.sample() for _ in range(rows)]
    return {
        leaf.key: torch.stack([torch.as_tensor(np.asarray(leaf.find(obs))).to(leaf.dtype) for obs in samples])
        for leaf in obs_spec(space)
    }, samples


FLAT = ["float32", "float64", "int32", "bool", "matrix", "scalar", "discrete", "multi-binary", "multi-binary 2-D"]


@pytest.mark.parametrize("name", [*FLAT, "multi-discrete", "multi-discrete 2-D"])
def test_what_networks_see_equals_gymnasiums_flatten(name):
    """One-hot from the space's first value on, component after component; all else flat."""
    space = OBSERVATIONS[name]
    (leaf,) = obs_spec(space)
    leaves, samples = stored(space)
    x = encode(leaf, leaves["obs"])
    assert x.dtype is torch.float32
    assert x.shape == (16, leaf.size)
    if isinstance(space, MultiDiscrete):
        oracle, samples = MultiDiscrete(space.nvec), [sample - space.start for sample in samples]
    else:
        oracle = space
    expected = np.stack([gym.spaces.utils.flatten(oracle, sample) for sample in samples])
    np.testing.assert_array_equal(x.numpy(), expected.astype(np.float32))
    assert torch.equal(encode(leaf, leaves["obs"].unflatten(0, (4, 4))), x.unflatten(0, (4, 4)))  # (T, N, ...)


@pytest.mark.parametrize("name", ["discrete", "multi-discrete", "multi-binary", "image (C, H, W)", "bytes"])
def test_what_networks_see_equals_stable_baselines(name):
    """Oracle: preprocess_obs, for spaces that start at 0: one-hot, bits, and pixels divided by 255."""
    preprocessing = pytest.importorskip("stable_baselines3.common.preprocessing")
    space = {"discrete": Discrete(5), "multi-discrete": MultiDiscrete([2, 4, 3])}.get(name, OBSERVATIONS[name])
    (leaf,) = obs_spec(space)
    leaves, _ = stored(space)
    expected = preprocessing.preprocess_obs(leaves["obs"].clone(), space)
    if name == "bytes":  # it divides those of images only, and is told whether to
        expected = expected / 255.0
    torch.testing.assert_close(encode(leaf, leaves["obs"]), expected)


def test_channels_last_are_channels_first_moved():
    """Pixel (row, column) of channel c, whichever way the environment has it."""
    last, first = Box(0, 255, (40, 44, 3), np.uint8), Box(0, 255, (3, 40, 44), np.uint8)
    pixels = torch.randint(256, (2, 40, 44, 3), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    (of_last,), (of_first,) = obs_spec(last), obs_spec(first)
    x = encode(of_last, pixels)
    assert x.shape == (2, 3, 40, 44)
    assert x[1, 2, 30, 7].item() == pytest.approx(pixels[1, 30, 7, 2].item() / 255.0)
    assert torch.equal(x, encode(of_first, pixels.movedim(-1, 1)))


def nature_cnn(policy, weights, leaf, space):
    """Stable-Baselines3's NatureCNN with our weights copied into it; our Linear is (in, out) and counts channels fastest."""
    layers = pytest.importorskip("stable_baselines3.common.torch_layers")
    network = layers.NatureCNN(space, features_dim=policy.encoder.cnn_size)
    modules = [module for module in network.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)]
    for index, module in enumerate(modules):
        weight = weights[f"cnn.{leaf.key}.{index}.weight"]
        if weight.ndim == 2:
            weight = weight.unflatten(0, (-1, 64)).transpose(0, 1).flatten(0, 1).mT
        module.weight.data = weight.detach().clone()
        module.bias.data = weights[f"cnn.{leaf.key}.{index}.bias"].detach().clone()
    return network


def test_the_cnn_equals_stable_baselines():
    """84 x 84 x 4 as Atari has it, channels last: policy logits and values through NatureCNN with the same weights."""
    (leaf,) = spec = obs_spec(Box(0, 255, (84, 84, 4), np.uint8))
    policy = ActorCritic(Encoder(spec.leaves, cnn_size=32), MLPActorCritic(32, 3, CATEGORICAL, ()))
    _, params = fresh(policy)
    weights = policy.weights(params)
    network = nature_cnn(policy, weights, leaf, Box(0, 255, (4, 84, 84), np.uint8))
    obs = torch.randint(256, (2, 3, 84, 84, 4), generator=torch.Generator().manual_seed(1)).to(torch.uint8)  # (T, N, H, W, C)
    features = network(obs.flatten(0, 1).movedim(-1, 1).float() / 255.0).unflatten(0, (2, 3))
    logits, value = policy.actor_critic(weights, obs)
    expected = features @ weights["actor.head.weight"] + weights["actor.head.bias"]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    expected = features @ weights["critic.head.weight"] + weights["critic.head.bias"]
    torch.testing.assert_close(value, expected.squeeze(-1), rtol=1e-4, atol=1e-4)
    # Mnih et al., 2015: 20 x 20, 9 x 9, 7 x 7 pixels of 32, 64, 64 filters
    assert policy.encoder.shapes["cnn.obs.3.weight"] == (7 * 7 * 64, 32)


def test_gradients_of_a_structure_equal_modules():
    """An image, categories and numbers at once: the flat gradient is autograd's through torch.nn layers, each in its place."""
    space = Dict(camera=Box(0, 255, (40, 36, 3), np.uint8), gear=Discrete(4, start=1), state=Box(-1.0, 1.0, (2, 2)))
    spec = obs_spec(space)
    leaves, _ = stored(space)
    policy = joined(Encoder(spec.leaves, cnn_size=8), 3, (16,))
    _, params = fresh(policy)
    params = params.requires_grad_()
    dist, value = policy.actor_critic(policy.weights(params), leaves)
    (grad,) = torch.autograd.grad((dist * torch.arange(3.0)).sum() + value.square().sum(), params)
    ours = policy.weights(grad)

    weights = policy.weights(params.detach())
    camera = next(leaf for leaf in spec if leaf.kind == "image")
    cnn = nature_cnn(policy, weights, camera, Box(0, 255, (3, 40, 36), np.uint8))
    actor, critic = (nn_network(weights, trunk, trunk, 1, "tanh") for trunk in ("actor", "critic"))
    pixels = cnn(leaves["obs.camera"].movedim(-1, 1).float() / 255.0)
    gear = torch.nn.functional.one_hot(leaves["obs.gear"] - 1, 4).float()
    features = torch.cat((pixels, gear, leaves["obs.state"].flatten(1)), -1)
    ((actor(features) * torch.arange(3.0)).sum() + critic(features).square().sum()).backward()
    layers = [module for module in cnn.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)]
    expected = {f"cnn.obs.camera.{index}": module for index, module in enumerate(layers)}
    expected |= {"actor.0": actor[0], "actor.head": actor[2], "critic.0": critic[0], "critic.head": critic[2]}
    assert {f"{name}.{part}" for name in expected for part in ("weight", "bias")} == set(ours)
    for name, module in expected.items():
        weight = module.weight.grad if module.weight.ndim == 4 else module.weight.grad.mT  # (1 x 1 pixels are left: one order)
        torch.testing.assert_close(ours[f"{name}.weight"], weight, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(ours[f"{name}.bias"], module.bias.grad, rtol=1e-3, atol=1e-5)


def test_initial_weights_of_a_cnn_are_orthogonal():
    """Filters as rows of a matrix: W W^T = 2 I, or W^T W where that is the smaller; biases 0; the MLP behind it as ever."""
    spec = obs_spec(Dict(image=Box(0, 255, (40, 40, 1), np.uint8), bits=MultiBinary(3)))
    policy = joined(Encoder(spec.leaves, cnn_size=16), 2, (8,))
    weights = policy.weights(fresh(policy)[0])
    for name in policy.encoder.shapes:
        weight = weights[name]
        if name.endswith(".bias"):
            assert not weight.any()
            continue
        matrix = weight.flatten(1)
        product = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
        torch.testing.assert_close(product, 2.0 * torch.eye(len(product)), rtol=0, atol=2e-5)
    torch.testing.assert_close(weights["critic.head.weight"].square().sum(), torch.tensor(1.0))
    assert torch.equal(policy.flatten(weights), fresh(policy)[0])
