"""Arguments of `learn` and `act`, updates to compare, and the programs of a run."""

import functools
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastppo.core.adam import init_adam
from fastppo.core.contracts import Normalization
from fastppo.core.ppo import MINIBATCH_METRICS, learn
from fastppo.policy.distributions import CATEGORICAL, DIAGONAL_NORMAL
from fastppo.policy.mlp import MLPActorCritic
from support.learn_settings import coefficients, learn_settings, split

T, N, E, M = 16, 4, 2, 16
APPLIED = MINIBATCH_METRICS.index("applied")


def job(policy, seed=0, normalized=False, **options):
    """(learn, arguments): a rollout with both kinds of ends and the rows after them masked, those full of absurd numbers."""
    generator = torch.Generator().manual_seed(seed)
    params = policy.init(generator)
    obs = torch.randn(T + 1, N, policy.obs_size, generator=generator)
    if policy.distribution is CATEGORICAL:
        action = torch.randint(policy.action_size, (T + 1, N), generator=generator)
    else:
        action = torch.randn(T + 1, N, policy.action_size, generator=generator)
    terminated = torch.rand(T + 1, N, generator=generator) < 0.1
    truncated = torch.rand(T + 1, N, generator=generator) < 0.1
    valid = torch.ones(T + 1, N, dtype=torch.bool)
    valid[1:] = ~(terminated | truncated)[:-1]
    reward = torch.where(valid, torch.rand(T + 1, N, generator=generator), 1e6)
    rollout = {
        "obs": obs, "action": action, "reward": reward, "terminated": terminated, "truncated": truncated, "valid": valid
    }  # fmt: skip
    permutation = torch.stack([torch.randperm(T * N, generator=generator) for _ in range(E)])
    numbers, settings = split(options)
    obs_mean, obs_scale = (
        ({"obs": torch.full((policy.obs_size,), 0.5)}, {"obs": torch.full((policy.obs_size,), 2.0)})
        if normalized
        else (None, None)
    )
    reward_scale = torch.tensor(0.5) if normalized else None
    normalization = Normalization(obs_mean, obs_scale, reward_scale, torch.tensor(0.2), torch.tensor(1.5))
    arguments = (params, init_adam(params), rollout, permutation, coefficients(**numbers), normalization)
    return functools.partial(learn, policy=policy, **learn_settings(**({"minibatch_size": M} | settings))), arguments


def assert_same(result, expected):
    for name, one, other in zip(expected._fields, result, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert torch.equal(result.minibatch_metrics[:, APPLIED], expected.minibatch_metrics[:, APPLIED])


CATEGORICAL_POLICY = MLPActorCritic(4, 3, CATEGORICAL, (16, 16))


NORMAL_POLICY = MLPActorCritic(5, 2, DIAGONAL_NORMAL, (16, 16))


COLUMN = {name: i for i, name in enumerate(MINIBATCH_METRICS)}


OFF = Normalization(None, None, None, torch.zeros(()), torch.ones(()))


DISCRETE = MLPActorCritic(3, 4, CATEGORICAL, (16, 16))


CONTINUOUS = MLPActorCritic(3, 2, DIAGONAL_NORMAL, (16, 16), share_backbone=True)


POLICIES = pytest.mark.parametrize("policy", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])


def make_params(policy, seed=0, dtype=torch.float32):
    """A policy that prefers some actions: (P,), every weight, bias and log_std away from 0."""
    generator = torch.Generator().manual_seed(seed)
    return (policy.init(generator) + 0.1 * torch.randn(policy.num_params, generator=generator)).to(dtype)


def make_rollout(policy, num_steps, num_envs, seed=1, dtype=torch.float32):
    """A rollout as next-step autoreset leaves it: after an end comes a resetting row, invalid, that ends nothing itself."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_steps + 1, num_envs)
    chance = torch.rand(shape, generator=generator)
    terminated, truncated = chance < 0.12, (chance > 0.1) & (chance < 0.25)
    for t in range(1, num_steps + 1):
        resetting = (terminated | truncated)[t - 1]
        terminated[t] &= ~resetting
        truncated[t] &= ~resetting
    valid = torch.cat((torch.arange(num_envs)[None] != 1, ~(terminated | truncated)[:-1]))  # environment 1 begins by resetting
    terminated[0, 1] = truncated[0, 1] = False
    valid[1, 1] = True
    discrete = policy.distribution is CATEGORICAL
    return {
        "obs": torch.randn(*shape, policy.obs_size, generator=generator, dtype=dtype),
        "action": torch.randint(policy.action_size, shape, generator=generator)
        if discrete
        else torch.randn(*shape, policy.action_size, generator=generator, dtype=dtype),
        "reward": torch.where(valid, torch.randn(shape, generator=generator, dtype=dtype), 0.0),
        "terminated": terminated,
        "truncated": truncated,
        "valid": valid,
    }


def make_permutation(epochs, batch_size, seed=2):
    """(E, B) int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(batch_size, generator=generator) for _ in range(epochs)])


def update(
    policy, params, rollout, permutation, normalization=OFF, adam=None, lr=1e-2, clip_coef=0.25, ent_coef=0.02, **options
):
    """`learn` with settings that exercise every term, unless told otherwise; one minibatch an epoch."""
    numbers, settings = split({"gamma": 127 / 128, "gae_lambda": 61 / 64, **options})
    numbers = coefficients(params.dtype, params.device, learning_rate=lr, clip_coef=clip_coef, ent_coef=ent_coef, **numbers)
    settings = learn_settings(**{"minibatch_size": permutation.shape[-1], **settings})
    adam = init_adam(params) if adam is None else adam
    return learn(params, adam, rollout, permutation, numbers, normalization, policy=policy, **settings)


def column(learned, name):
    """One metric over the minibatches, as a list."""
    return learned.minibatch_metrics[:, COLUMN[name]].tolist()


def assert_same_bits(one, other):
    """Parameters and optimiser state equal to the last bit."""
    assert torch.equal(one.params, other.params)
    assert all(torch.equal(x, y) for x, y in zip(one.adam, other.adam, strict=True))


def updates_of(workers, *args, **options):
    """`update` by so many threads at once, each as one of the workers."""
    barrier, places = threading.Barrier(workers, timeout=60), [None] * workers

    def all_reduce(x, worker, over_ranks):
        places[worker[0].item()] = x
        barrier.wait()
        total = sum(places[1:], start=places[0])
        barrier.wait()
        return total

    def work(number):
        shared = {"worker": torch.tensor([number, 0]), "num_workers": workers, "all_reduce": all_reduce}
        return update(*args, **options, **shared)

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(work, range(workers)))


class Rendezvous:
    """The exchange of processes that are threads here: `of(rank)` is what each of them is given."""

    def __init__(self, size):
        self.barrier, self.places, self.calls = threading.Barrier(size, timeout=60), [None] * size, 0

    def of(self, rank):
        def all_reduce(x):
            self.places[rank] = x.clone()
            self.barrier.wait()
            total = torch.stack(self.places).sum(0)
            self.calls += rank == 0
            self.barrier.wait()
            return total

        return types.SimpleNamespace(rank=rank, size=len(self.places), all_reduce=all_reduce)


def assert_together(results, expected, **tolerance):
    """What each of several has computed: the same bits, and but for rounding what one alone computes.

    tolerance: of the statistics, whose default is that of float32.
    """
    for result in results:
        assert_same_bits(result, results[0])
        torch.testing.assert_close(result.params, expected.params, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(result.minibatch_metrics, expected.minibatch_metrics, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result[3:], expected[3:], **tolerance)


class CountingPolicy:
    """A policy that remembers which rows it was shown. An observation is its row's number, and so is its action."""

    rnn_state_size = 0

    def __init__(self):
        self.seen, self.actions = [], []

    def weights(self, params):
        return {"w": params}

    def actor_critic(self, weights, obs):
        self.seen.append(obs.squeeze(-1).long())
        number = obs.squeeze(-1)
        return number * weights["w"], number * weights["w"]

    def log_prob(self, dist, action):
        self.actions.append(action)
        return -0.001 * dist

    def entropy(self, dist):
        return dist


def to_meta(tree):
    """The same tensors without any data."""
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.to("meta"), tree)


class HostSyncs(TorchDispatchMode):
    """Records every operation that would make the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        mask = name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if mask or name in {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def jobs_of(tmp_path, **settings):
    """The programs of a run as `train` hands them to whoever compiles."""
    from fastppo import train  # imports torch._dynamo, which a test process without a compiler does not have
    from support.runs import tiny

    class Captured(Exception):
        pass

    def capture(mode, jobs, *_):
        captured.update(jobs)
        raise Captured

    captured = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastppo.training.job.ProgramSelector", capture)
        with pytest.raises(Captured):
            train(tiny(tmp_path, check_env=False, **{"num_steps": 4, **settings}))
    assert len(captured) == 2
    return captured
