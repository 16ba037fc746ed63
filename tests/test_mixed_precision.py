"""--bf16 and --tf32: what is rounded, what is not, and that nothing of it reaches other code. Held against torch.autocast."""

import json
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastppo import UsageError, train
from fastppo.compile.cuda_graph import GraphedProgram
from fastppo.compile.verification import TOLERANCE, deviation_of_act, deviation_of_learn
from fastppo.config import TrainConfig
from fastppo.core.acting import act_from_params
from fastppo.policy.mixed_precision import AutocastPolicy
from fastppo.system.modes import tf32, under
from fastppo.training import loop, programs
from support.cpu_graphs import recorded_graphs
from support.programs import CATEGORICAL_POLICY, NORMAL_POLICY, assert_same, job
from support.runs import tiny

POLICIES = pytest.mark.parametrize("policy", [CATEGORICAL_POLICY, NORMAL_POLICY], ids=["categorical", "normal"])


def modules_of(policy, params):
    """Actor and critic as torch.nn.Sequential with the same weights."""
    weights = policy.weights(params)

    def perceptron(name):
        layers = []
        for layer in (*range(len(policy.hidden_sizes)), "head"):
            weight, bias = (weights[f"{name}.{layer}.{part}"] for part in ("weight", "bias"))
            linear = nn.Linear(*weight.shape)
            linear.weight.data, linear.bias.data = weight.t().clone(), bias.clone()
            layers += [linear, nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    return perceptron("actor"), perceptron("critic")


@POLICIES
def test_networks_compute_as_torch_autocast_does(policy):
    """Outputs and gradients of torch.nn modules under torch.autocast, within the rounding of bfloat16, and far from float32."""
    generator = torch.Generator().manual_seed(0)
    params = policy.init(generator).mul(3.0).requires_grad_()
    obs = torch.randn(64, policy.obs_size, generator=generator)
    actor, critic = modules_of(policy, params.detach())
    with torch.autocast("cpu", torch.bfloat16):
        expected = torch.cat((actor(obs), critic(obs)), 1)
    assert expected.dtype is torch.bfloat16

    def outputs(policy):
        dist, value = policy.actor_critic(policy.weights(params), obs)
        mean = dist if isinstance(dist, torch.Tensor) else dist[0]
        assert (mean.dtype, value.dtype) == (torch.float32, torch.float32)
        return torch.cat((mean, value.unsqueeze(1)), 1)

    rounded, exact = outputs(AutocastPolicy(policy)), outputs(policy)
    error, distance = (rounded - expected.float()).abs().mean(), (exact - expected.float()).abs().mean()
    assert error < distance / 2
    expected.float().square().sum().backward()
    theirs = torch.cat([x.grad.flatten() for x in (actor[0].weight, critic[0].weight)])
    (grad,) = torch.autograd.grad(rounded.square().sum(), params)
    assert grad.dtype is torch.float32
    weights = policy.weights(grad)
    ours = torch.cat([weights[f"{name}.0.weight"].t().flatten() for name in ("actor", "critic")])
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


class Dtypes(TorchDispatchMode):
    """The dtypes of each operation's results, by name."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for x in results if isinstance(results, tuple | list) else [results]:
            if isinstance(x, torch.Tensor):
                self.seen.setdefault(func.overloadpacket.__name__, set()).add(x.dtype)
        return results


@POLICIES
def test_only_networks_are_rounded(policy):
    """Products are in bfloat16; losses, log-probabilities, advantages, the gradient and Adam are float32."""
    learn, arguments = job(policy, normalized=True)
    with Dtypes() as dtypes:
        result = partial(learn, policy=AutocastPolicy(policy))(*arguments)
    for product in ("addmm", "baddbmm", "mv"):
        assert dtypes.seen[product] == {torch.bfloat16}, product
    rounded = {name for name, kinds in dtypes.seen.items() if torch.bfloat16 in kinds}
    of_losses = {"exp", "log", "_log_softmax", "logsumexp", "pow", "sqrt", "mean", "std", "var", "linalg_vector_norm", "clamp"}
    assert not rounded & of_losses
    floats = {x.dtype for x in (*result.adam[:2], *result[2:], result.params) if x.is_floating_point()}
    assert floats == {torch.float32}


@POLICIES
def test_rounding_is_told_from_a_wrong_term(policy):
    """Below the tolerance where an update differs by the rounding of bfloat16, above it where a term is wrong."""
    learn, arguments = job(policy, normalized=True)
    rounded = partial(learn, policy=AutocastPolicy(policy))
    eager = rounded(*arguments)
    assert 0.0 < deviation_of_learn(learn(*arguments), eager, arguments, rounded=True) < TOLERANCE
    for wrong in ({"vf_coef": 0.0}, {"gamma": 0.5}, {"learning_rate": 1e-3}):
        others = job(policy, normalized=True, **wrong)[1]
        assert deviation_of_learn(rounded(*others), eager, arguments, rounded=True) > TOLERANCE, wrong
    spoilt = eager._replace(params=eager.params * torch.nan)
    assert deviation_of_learn(spoilt, eager, arguments, rounded=True) == float("inf")


def test_captured_programs_are_rounded_alike():
    """Recorded loops: the eager numbers to the bit, `learn` and `act`."""
    policy = AutocastPolicy(NORMAL_POLICY)
    learn, arguments = job(NORMAL_POLICY)
    learn = partial(learn, policy=policy)
    act = partial(act_from_params, policy=policy)
    params, _, rollout, *_, normalization = arguments
    given = (params, normalization, rollout["obs"][0], torch.randn(4, NORMAL_POLICY.action_size))
    with recorded_graphs(), torch.no_grad():
        assert_same(GraphedProgram(learn, arguments)(*arguments), learn(*arguments))
        assert torch.equal(GraphedProgram(act, given)(*given), act(*given))


ANY = {"env_id": "environments:AnySpacesVector-v0", "hidden_sizes": (8,)}
RUNS = {
    "vector": {},
    "continuous": {"env_id": "Pendulum-v1", "norm_obs": True},
    "image": {**ANY, "env_kwargs": {"observation": "image (C, H, W)"}, "cnn_size": 8},
    "layer norm, masks": {**ANY, "env_kwargs": {"observation": "masked", "action": "multi-discrete"}, "layer_norm": True},
    "seeds": {"num_seeds": 2},
    "device": {"backend": "torch"},
}


@pytest.mark.parametrize("case", RUNS)
def test_runs(case, tmp_path, capsys):
    """Eager runs of every kind train, resume, and say that the flag is for GPUs; autocast is off for the environments."""
    run = tmp_path / "run"
    settings = {"num_iterations": 2, "check_env": False, "device": "cpu", "bf16": True, **RUNS[case]}
    train(tiny(run, **settings))
    assert "--bf16 is for GPUs" in capsys.readouterr().out
    summary = train(resume=str(run), num_iterations=3, bf16=False).summary
    assert summary["iterations"] == 3
    assert not torch.is_autocast_enabled("cpu")


def test_fused_programs_leave_it_to_others(tmp_path):
    """They are not loaded; a run whose other programs are not in the cache is eager."""
    config = tiny(tmp_path / "run", num_iterations=2, device="cpu", compile="auto", bf16=True)
    assert loop.start_kernels(config, None, None) is None
    assert train(config).summary["tier"] == "eager"


def test_a_recurrent_policy_has_no_bf16():
    """One line with the way out."""
    with pytest.raises(UsageError, match=r"^--bf16 is for networks without memory: with --rnn gru leave it off"):
        TrainConfig(rnn="gru", bf16=True)
    with pytest.raises(UsageError, match=r"^--bf16 would round the variances"):
        TrainConfig(action_distribution="gsde", bf16=True)


def precisions():
    """PyTorch's settings of products, the newer ones and the older ones."""
    return (
        torch.backends.cuda.matmul.fp32_precision,
        torch.backends.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision(),
    )


def test_tf32_is_set_within_and_put_back():
    """Both of PyTorch's settings agree, within and afterwards, after an error too; a caller who has it keeps it."""
    before = precisions()
    assert before == ("none", False, "highest")
    seen = []

    def fails():
        seen.append(precisions())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        under(tf32, fails)()
    assert seen == [("tf32", True, "high")]
    assert precisions() == before
    torch.set_float32_matmul_precision("high")
    try:
        theirs = precisions()
        with tf32():
            assert precisions() == theirs
        assert precisions() == theirs
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = "none"
        torch.backends.mkldnn.matmul.fp32_precision = "none"


def test_tf32_is_around_programs_alone(tmp_path, monkeypatch):
    """On in `learn`, and off again in the environments and callbacks."""
    seen, learn = [], programs.ppo.learn

    def looking(*args, **kwargs):
        seen.append(precisions()[0])
        return learn(*args, **kwargs)

    looking.traits = learn.traits
    monkeypatch.setattr(programs.ppo, "learn", looking)
    outside = []
    run = tmp_path / "run"
    train(tiny(run, device="cpu", tf32=True), callbacks=[lambda view: outside.append(precisions()[0])])
    assert set(seen) == {"tf32"}
    assert set(outside) == {"none"}
    assert json.loads((run / "config.json").read_text())["tf32"] is True


def test_rounded_actions():
    """Numbers that differ by the rounding of bfloat16, and one choice of another action, are let pass; two of eight are not."""
    mean = torch.linspace(-2.0, 2.0, 8)
    assert deviation_of_act(mean.bfloat16().float(), mean, ()) > TOLERANCE
    assert deviation_of_act(mean.bfloat16().float(), mean, (), rounded=True) == 0.0
    choice = torch.arange(8)
    assert deviation_of_act(choice.clamp(min=1), choice, (), rounded=True) == 0.0
    assert deviation_of_act(choice.clamp(min=2), choice, (), rounded=True) > TOLERANCE
