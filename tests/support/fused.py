"""Networks, arguments and results of the fused programs, to compare with the eager ones."""

import functools

import torch
from hypothesis import strategies as st

from fastppo.core.adam import AdamState
from fastppo.core.contracts import EAGER, Normalization
from fastppo.core.ppo import MINIBATCH_METRICS, learn
from fastppo.fused.mlp_programs import FusedLearn
from fastppo.policy.actor_critic import ActorCritic
from fastppo.policy.distributions import CATEGORICAL, DIAGONAL_NORMAL, Hybrid, MultiCategorical, choices
from fastppo.policy.encoder import Encoder
from fastppo.policy.mlp import ACTIVATIONS, MLPActorCritic
from fastppo.policy.spaces import ObsLeaf
from support.learn_settings import coefficients, learn_settings

WIDE = MLPActorCritic(17, 6, DIAGONAL_NORMAL, (64, 64))


@st.composite
def mlps(draw):
    """Every kind of actions, shape and setting that the fused programs cover."""
    kind = draw(st.sampled_from(["categorical", "multi", "normal", "hybrid"]))
    numbers = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    size = draw(st.integers(1, 20))
    single = {"categorical": CATEGORICAL, "normal": DIAGONAL_NORMAL, "multi": MultiCategorical(numbers)}
    family = Hybrid(numbers, size) if kind == "hybrid" else single[kind]
    return MLPActorCritic(
        draw(st.integers(1, 40)),
        {"multi": sum(numbers), "hybrid": sum(numbers) + size}.get(kind, size),
        family,
        tuple(draw(st.lists(st.integers(1, 70), max_size=3))),
        draw(st.sampled_from(sorted(ACTIVATIONS))),
        draw(st.booleans()),
        layer_norm=draw(st.booleans()),
    )


def with_mask(mlp):
    """The network that reads a vector and an action mask."""
    leaves = (
        ObsLeaf("action_mask", ("action_mask",), (sum(choices(mlp.distribution, mlp.action_size)),), torch.bool, "mask"),
        ObsLeaf("obs.x", ("x",), (mlp.obs_size,), torch.float32, "vector"),
    )
    return ActorCritic(Encoder(leaves), mlp)


def make_rollout(network, num_steps, num_envs, generator, final_obs=False):
    """Random transitions with ends of both kinds, rows that only reset, and whatever numbers those hold."""
    mlp = network.mlp if isinstance(network, ActorCritic) else network
    batch = (num_steps + 1, num_envs)
    bools = functools.partial(torch.rand, *batch, generator=generator)
    normal = functools.partial(torch.randn, *batch, generator=generator)
    rollout = {"terminated": bools() < 0.1, "truncated": bools() < 0.1, "valid": bools() < 0.85}
    rollout["reward"] = torch.where(rollout["valid"], normal(), 50.0)
    if mlp is network:
        rollout["obs"] = normal(mlp.obs_size)
        if final_obs:
            rollout["final_obs"] = normal(mlp.obs_size)
    else:
        rollout["obs.x"] = normal(mlp.obs_size)
        size = sum(choices(mlp.distribution, mlp.action_size))
        rollout["action_mask"] = torch.rand(*batch, size, generator=generator) < 0.6
        if final_obs:
            rollout["final_obs.x"] = normal(mlp.obs_size)
    if mlp.distribution is DIAGONAL_NORMAL:
        rollout["action"] = normal(mlp.action_size)
    elif mlp.distribution is CATEGORICAL:
        rollout["action"] = torch.randint(mlp.action_size, batch, generator=generator)
    else:
        numbers = mlp.distribution.numbers
        rollout["action"] = torch.stack([torch.randint(n, batch, generator=generator) for n in numbers], -1)
        if isinstance(mlp.distribution, Hybrid):
            rollout["action"] = torch.cat([rollout["action"].float(), normal(mlp.distribution.num_components)], -1)
    return rollout


def arguments_of(network, num_steps=8, num_envs=4, epochs=2, seed=0, normalized=False, final_obs=False, spread=0.1, **numbers):
    """Arguments of `learn`: Adam has taken some steps, and no weight is zero."""
    generator = torch.Generator().manual_seed(seed)
    params = network.init(generator) + spread * torch.randn(network.num_params, generator=generator)
    mean, square = 0.01 * torch.randn(params.shape, generator=generator), 0.01 * torch.rand(params.shape, generator=generator)
    adam = AdamState(mean, square, torch.tensor(7.0))
    rollout = make_rollout(network, num_steps, num_envs, generator, final_obs)
    permutation = torch.stack([torch.randperm(num_steps * num_envs, generator=generator) for _ in range(epochs)])
    mean = scale = reward_scale = None
    if normalized:
        key = "obs" if "obs" in rollout else "obs.x"
        size = rollout[key].shape[-1]
        mean, scale = {key: torch.linspace(-1, 1, size)}, {key: torch.linspace(0.5, 2, size)}
        reward_scale = torch.tensor(0.5)
    normalization = Normalization(mean, scale, reward_scale, torch.tensor(0.2), torch.tensor(1.5))
    return params, adam, rollout, permutation, coefficients(**numbers), normalization


def both(network, arguments, num_parts=1, **options):
    """(fused, eager) results of one update."""
    keywords = learn_settings(**options)
    fused = FusedLearn(network, keywords["config"], num_parts)
    return fused(*arguments), learn(*arguments, policy=network, execution=EAGER, config=keywords["config"])


def assert_same(fused, eager):
    """Equal but for rounding, in every result. A log-probability of -500 leaves 3e-5 of rounding in the ratio's deviation."""
    column = MINIBATCH_METRICS.index("ratio_deviation")
    for name, one, other in zip(eager._fields, fused, eager, strict=True):
        if name in ("minibatch_metrics", "summary"):
            torch.testing.assert_close(one[..., column], other[..., column], rtol=1e-3, atol=1e-3, equal_nan=True)
            one, other = (torch.cat((x[..., :column], x[..., column + 1 :]), -1) for x in (one, other))
        said = functools.partial("{}: {}".format, name)
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5, equal_nan=True, msg=said)
