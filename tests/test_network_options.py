"""--layer-norm and --cnn impala: equal to torch.nn's own layers with the same weights, and runs with them."""

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete
from torch import nn

from fastppo import TrainConfig, load_policy, train
from fastppo.core.seed_axis import SeedAxis
from fastppo.export import console as export
from fastppo.policy.distributions import CATEGORICAL
from fastppo.policy.encoder import Encoder
from fastppo.policy.make_network import make_network
from fastppo.policy.mlp import MLPActorCritic
from fastppo.policy.network import draw_as_torch
from fastppo.policy.spaces import action_spec, obs_spec
from fastppo.training.state import init_state
from support.resume import differing
from support.runs import checkpoint, tiny, trained


def random_params(network):
    """Weights away from their start, where scales are 1 and shifts 0."""
    generator = torch.Generator().manual_seed(0)
    return network.init(generator) + 0.1 * torch.randn(network.num_params, generator=generator)


# --- layer normalisation


@pytest.mark.parametrize("share_backbone", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_layer_norm_is_torchs(share_backbone, activation):
    """Linear, LayerNorm, activation for each hidden layer, of actor and critic, in one call and in two."""
    network = MLPActorCritic(3, 2, CATEGORICAL, (16, 8), activation, share_backbone, layer_norm=True)
    weights = network.weights(random_params(network))
    obs = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(1))
    expected = []
    for head in ("actor", "critic"):
        x, trunk = obs, "backbone" if share_backbone else head
        for layer, size in enumerate((16, 8)):
            norm = nn.LayerNorm(size)
            norm.load_state_dict({part: weights[f"{trunk}.{layer}.norm.{part}"] for part in ("weight", "bias")})
            x = x @ weights[f"{trunk}.{layer}.weight"] + weights[f"{trunk}.{layer}.bias"]
            x = getattr(torch, activation)(norm(x))
        expected.append(x @ weights[f"{head}.head.weight"] + weights[f"{head}.head.bias"])
    logits, value = network.actor_critic(weights, obs)
    torch.testing.assert_close(logits, expected[0].detach())
    torch.testing.assert_close(value, expected[1].squeeze(-1).detach())
    torch.testing.assert_close(network.actor(weights, obs), logits)
    torch.testing.assert_close(network.critic(weights, obs), value)


def test_it_starts_as_torchs_does():
    """Scales of 1 and shifts of 0; the other weights are those of a network without it."""
    network, plain = (MLPActorCritic(3, 2, CATEGORICAL, (16, 8), layer_norm=norm) for norm in (True, False))
    assert network.num_params == plain.num_params + 2 * 2 * (16 + 8)
    weights = network.weights(network.init(torch.Generator().manual_seed(3)))
    without = plain.weights(plain.init(torch.Generator().manual_seed(3)))
    for name, weight in weights.items():
        if ".norm." in name:
            assert (weight == float(name.endswith("weight"))).all()
        else:
            assert torch.equal(weight, without[name])
    assert torch.equal(network.flatten(weights), network.init(torch.Generator().manual_seed(3)))


def test_several_seeds_map_over_it():
    """As one program, each seed's weights its own."""
    network = MLPActorCritic(3, 2, CATEGORICAL, (8,), layer_norm=True)
    params = torch.stack([random_params(network), network.init(torch.Generator().manual_seed(5))])
    obs = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(1))
    mapped = SeedAxis(2).map(lambda params, obs: network.critic(network.weights(params), obs), True)(params, obs)
    for index in range(2):
        torch.testing.assert_close(mapped[index], network.critic(network.weights(params[index]), obs[index]))


@pytest.mark.parametrize("settings", [{}, {"num_seeds": 2}, {"rnn": "gru", "num_minibatches": 2}, {"share_backbone": True}])
def test_a_run_with_layer_norm(settings, tmp_path, capsys):
    """It trains with the default --compile, moves every scale, and goes on after a resume."""
    result = train(tiny(tmp_path / "run", layer_norm=True, hidden_sizes=(8, 8), **settings, compile="auto", num_iterations=3))
    run_dir = result.seeds[0].run_dir if result.seeds else result.run_dir
    weights = checkpoint(run_dir)["policy"]["weights"]
    scales = [weight for name, weight in weights.items() if name.endswith("norm.weight")]
    assert len(scales) == (2 if settings.get("share_backbone") else 4)
    assert all((scale != 1.0).any() for scale in scales)
    assert load_policy(run_dir).act(np.zeros(4, np.float32)) in (0, 1)
    settings = settings | {"layer_norm": True, "hidden_sizes": (8, 8), "resume": str(tmp_path / "run")}
    assert train(tiny(tmp_path / "run", **settings, num_iterations=4)).summary["iterations"] == 4


# --- IMPALA's network


class Residual(nn.Module):
    """CleanRL's ResidualBlock, ppo_procgen.py."""

    def __init__(self, channels):
        super().__init__()
        self.conv0 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, x):
        inputs = x
        x = self.conv0(nn.functional.relu(x))
        return self.conv1(nn.functional.relu(x)) + inputs


class Sequence(nn.Module):
    """CleanRL's ConvSequence."""

    def __init__(self, channels, filters):
        super().__init__()
        self.conv = nn.Conv2d(channels, filters, kernel_size=3, padding=1)
        self.res_block0, self.res_block1 = Residual(filters), Residual(filters)

    def forward(self, x):
        x = nn.functional.max_pool2d(self.conv(x), kernel_size=3, stride=2, padding=1)
        return self.res_block1(self.res_block0(x))


@pytest.mark.parametrize("shape", [(40, 52, 3), (4, 37, 36)])
def test_impala_is_cleanrls(shape):
    """The same outputs with the same weights; images last or first, of odd sides."""
    spec = obs_spec(Box(0, 255, shape, np.uint8))
    encoder = Encoder(spec.leaves, cnn_size=24, cnn="impala")
    params = random_params(encoder)
    weights = encoder.weights(params)
    first = shape if shape[0] == 4 else (shape[2], *shape[:2])
    theirs = nn.Sequential(Sequence(first[0], 16), Sequence(16, 32), Sequence(32, 32))
    for number, sequence in enumerate(theirs):
        convolutions = {"": sequence.conv}
        for block, residual in enumerate((sequence.res_block0, sequence.res_block1)):
            convolutions |= {f".{block}.0": residual.conv0, f".{block}.1": residual.conv1}
        for name, convolution in convolutions.items():
            convolution.load_state_dict({part: weights[f"cnn.obs.{number}{name}.{part}"] for part in ("weight", "bias")})
    pixels = torch.randint(0, 256, (5, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    x = pixels if shape[0] == 4 else pixels.movedim(-1, 1)
    features = theirs(x.float() / 255.0).permute(0, 2, 3, 1).flatten(1).relu()
    expected = (features @ weights["cnn.obs.features.weight"] + weights["cnn.obs.features.bias"]).relu()
    torch.testing.assert_close(encoder.encode(weights, pixels), expected.detach(), rtol=1e-4, atol=1e-5)
    assert torch.equal(encoder.flatten(weights), params)


def test_impala_starts_as_torchs_layers_do():
    """Uniform between -1 / sqrt(fan_in) and that, weights and biases: 84 x 84 pixels become 11 x 11, and 256 features."""
    spec = obs_spec(Box(0, 255, (84, 84, 3), np.uint8))
    encoder = Encoder(spec.leaves, cnn_size=256, cnn="impala")
    weights = encoder.weights(encoder.init(torch.Generator().manual_seed(0)))
    assert weights["cnn.obs.features.weight"].shape == (32 * 11 * 11, 256)
    for name, fan_in in (("0", 27), ("1.0.1", 288), ("features", 32 * 11 * 11)):
        for part in ("weight", "bias"):
            x = weights[f"cnn.obs.{name}.{part}"]
            assert x.abs().max() <= fan_in**-0.5
            assert x.abs().max() > 0.8 * fan_in**-0.5
    # 448 + 4 * 2320, 4640 + 4 * 9248 and 5 * 9248 of the sequences, and the layer of features
    assert encoder.num_params == 9_728 + 41_632 + 46_240 + (3872 * 256 + 256)


def test_the_settings_choose_them():
    """make_network reads them; images and vectors together."""
    obs, action = obs_spec(Box(0, 255, (40, 40, 3), np.uint8)), action_spec(Discrete(2), False)
    network = make_network(obs, action, TrainConfig(cnn="impala", cnn_size=8, hidden_sizes=(4,), layer_norm=True))
    names = network.weights(network.init(torch.Generator().manual_seed(0))).keys()
    assert {"cnn.obs.2.1.1.weight", "cnn.obs.features.bias", "critic.0.norm.weight"} <= names


@pytest.mark.parametrize("share_backbone", [False, True])
def test_weights_as_torch_draws_them(share_backbone):
    """Oracle: the ranges of torch.nn.Linear's and Conv2d's own weights and biases. Other weights are untouched."""
    obs = obs_spec(Dict(picture=Box(0, 255, (3, 36, 36), np.uint8), x=Box(-1, 1, (5,))))
    settings = {"hidden_sizes": (64, 32), "cnn_size": 16, "share_backbone": share_backbone, "layer_norm": True}
    network = make_network(obs, action_spec(Box(-1, 1, (2,)), False), TrainConfig(log_std_init=-0.5, **settings))
    params = network.init(torch.Generator().manual_seed(0))
    weights = network.weights(params)
    draw_as_torch(weights, torch.Generator().manual_seed(1))
    trunk = "backbone" if share_backbone else "critic"
    layers = {"cnn.obs.picture.0": nn.Conv2d(3, 32, 8, 4), "cnn.obs.picture.1": nn.Conv2d(32, 64, 4, 2)}
    layers |= {f"{trunk}.0": nn.Linear(21, 64), f"{trunk}.1": nn.Linear(64, 32), "actor.head": nn.Linear(32, 2)}
    for name, layer in layers.items():
        for part, theirs in layer.named_parameters():
            ours = weights[f"{name}.{part}"]
            assert ours.shape in (theirs.shape, theirs.shape[::-1])
            assert 0 < ours.abs().max() < 1.1 * layer.weight.abs().max(), (name, part)
            assert ours.numel() < 60 or ours.abs().max() > 0.8 * layer.weight.abs().max(), (name, part)
    assert (weights["actor.log_std"] == -0.5).all()
    assert (weights[f"{trunk}.0.norm.weight"] == 1.0).all()
    assert torch.equal(network.flatten(weights), params)  # the buffer itself was filled


def test_the_flag_draws_them(tmp_path):
    """--init torch: a first layer within +-1 / sqrt(4), its biases not zero; without it they are."""
    for init, drawn in (("torch", True), ("orthogonal", False)):
        state = init_state(
            TrainConfig(init=init), MLPActorCritic(4, 2, CATEGORICAL), obs_spec(Box(-1, 1, (4,))), torch.device("cpu")
        )
        weights = MLPActorCritic(4, 2, CATEGORICAL).weights(state.params)
        assert bool(weights["actor.0.bias"].any()) is drawn
        assert (weights["actor.0.weight"].abs().max().item() <= 0.5) is drawn


@pytest.mark.long
def test_a_run_with_impala(tmp_path):
    """It trains on images, is loaded, goes on, and is exported."""
    result = trained(tmp_path, "image (H, W, C)", "discrete", cnn="impala")
    start = result.summary["iterations"]
    again = TrainConfig.from_json(result.run_dir / "config.json")
    again = TrainConfig(**{**vars(again), "resume": str(result.run_dir), "run_dir": None, "num_iterations": start + 1})
    before = checkpoint(result.run_dir)["policy"]["weights"]
    assert train(again).summary["iterations"] == start + 1
    after = checkpoint(result.run_dir)["policy"]["weights"]
    assert len(differing(before, after)) == len(before)  # every weight learns
    pytest.importorskip("onnxruntime")
    assert export([str(result.run_dir)]) == 0
