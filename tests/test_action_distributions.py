"""--action-distribution: each family in runs of all kinds, acting, export, --resume and --init-from; what it refuses."""

import json
from dataclasses import replace
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from composites import SPACES
from environments import ACTIONS
from gymnasium.spaces import Box

from fastppo import TrainConfig, UsageError, load_policy, train
from fastppo.compile.inductor import compile_program
from fastppo.compile.program import flat_tensors
from fastppo.compile.trace import trace
from fastppo.export import export_policy
from fastppo.fused.mlp_programs import covers
from fastppo.given_settings import with_settings
from fastppo.policy.make_network import make_network
from fastppo.policy.spaces import action_spec, obs_spec
from fastppo.ranks import ALONE
from fastppo.training.job import draw_noise
from support.networks import Small, structured_job
from support.programs import assert_same
from support.resume import differing
from support.runs import checkpoint, tiny
from support.seeds import SHORT, assert_alike

KINDS = ("normal-state-std", "gsde", "beta")
PENDULUM = {"env_id": "Pendulum-v1", "vectorization": "sync", "max_episode_steps": 10}
PENDULUM |= {"num_minibatches": 4, "update_epochs": 2}
each = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of each kind."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        kind: train(tiny(folder / kind, action_distribution=kind, norm_obs=True, eval_episodes=1, **PENDULUM)) for kind in KINDS
    }


@each
@pytest.mark.long
def test_a_trained_policy_acts_and_is_exported(runs, kind, tmp_path):
    """Samples vary and stay within the bounds; without sampling the mean is taken, and an exported file gives it."""
    policy = load_policy(runs[kind].run_dir)
    policy.seed(1)
    policy.params += 0.3 * torch.randn(policy.params.shape, generator=torch.Generator().manual_seed(0))
    obs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    without = policy.act(obs)
    assert (without == policy.act(obs)).all()
    sampled = np.stack([policy.act(obs, deterministic=False) for _ in range(400)])
    assert np.abs(sampled).max() <= 2.0
    assert (sampled.std(0) > 0.2).all()
    stored = torch.from_numpy(obs)
    mean, scale = policy.normalization.obs_mean["obs"], policy.normalization.obs_scale["obs"]
    dist = policy.network.actor(policy.weights, ((stored - mean) * scale).clamp(-10, 10).float())
    expected = policy.action.to_env(policy.action.distribution.mode(dist))
    np.testing.assert_allclose(without, expected.numpy(), atol=1e-6)
    if kind == "beta":  # the others' files hold the means alone, as those of a normal
        onnxruntime, _ = pytest.importorskip("onnxruntime"), pytest.importorskip("onnxscript")
        export_policy(policy, tmp_path / "policy.onnx", "onnx")  # which begins as a torch one
        (got,) = onnxruntime.InferenceSession(tmp_path / "policy.onnx").run(None, {"obs": obs})
        np.testing.assert_allclose(got, without, atol=1e-5)


@each
def test_a_run_goes_on_and_is_started_from(runs, kind, tmp_path):
    """--resume learns on; --init-from starts with its weights, and refuses those of another distribution by name."""
    run_dir = runs[kind].run_dir
    before = checkpoint(run_dir)["policy"]["weights"]
    assert ("actor.log_std" in before) == (kind != "beta")
    settings = {"action_distribution": kind, "norm_obs": True, "num_iterations": 1, **PENDULUM}
    train(tiny(tmp_path / "from", init_from=str(run_dir), **settings))
    settings["action_distribution"] = "normal"
    with pytest.raises(UsageError, match=f"give --action-distribution {kind}"):
        train(tiny(tmp_path / "other", init_from=str(run_dir), **settings))
    config = replace(TrainConfig.from_json(run_dir / "config.json"), resume=str(run_dir), run_dir=None, num_iterations=5)
    with pytest.raises(UsageError, match="--action-distribution normal cannot change on --resume"):
        train(replace(config, action_distribution="normal"))
    train(replace(config, sde_sample_freq=2) if kind == "gsde" else config)  # which may change
    assert differing(before, checkpoint(run_dir)["policy"]["weights"])
    assert json.loads((run_dir / "config.json").read_text())["action_distribution"] == kind


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("beta", {"env_id": "composites:Parts", "rnn": "gru", "num_minibatches": 1}),
        ("normal-state-std", {"env_id": "composites:Parts", "policy": "support.networks:Small"}),
        ("beta", {"env_id": "environments:AnySpaces", "env_kwargs": {"observation": "tuple", "action": "box matrix"}}),
        ("normal-state-std", {**PENDULUM, "share_backbone": True, "squash_actions": True, "init": "torch"}),
        ("beta", {"env_id": "Pendulum-v1", "backend": "torch", "reset_each_rollout": True}),
        ("gsde", {"env_id": "composites:Parts", "rnn": "lstm", "num_minibatches": 1, "sde_sample_freq": 3}),
        ("gsde", {"env_id": "environments:AnySpaces", "env_kwargs": {"observation": "tuple", "action": "box matrix"}}),
    ],
    ids=["parts and memory", "parts and own network", "images", "squashed", "device", "gsde and memory", "gsde and images"],
)
def test_runs_of_other_kinds(kind, settings, tmp_path):
    """Actions that are choices and numbers, memory, a module of one's own, pictures beside numbers, environments on tensors.

    The environments raise for an action outside of their space. The run learns: its weights move and stay finite.
    """
    run = train(tiny(tmp_path / "run", action_distribution=kind, num_iterations=2, cnn_size=16, **settings))
    weights = checkpoint(run.run_dir)["policy"]["weights"]
    assert all(weight.isfinite().all() for weight in weights.values())
    policy = load_policy(run.run_dir, policy=Small if "policy" in settings else None)
    policy.obs_space.seed(0)
    for deterministic in (True, False):
        assert policy.action.space.contains(policy.act(policy.obs_space.sample(), deterministic=deterministic))


@each
def test_each_seed_is_as_it_would_be_alone(kind, tmp_path):
    """Two seeds together: the noise of each is its own."""
    settings = {**SHORT, "env_id": "Pendulum-v1", "backend": "torch", "norm_obs": True, "action_distribution": kind}
    train(tiny(tmp_path / "all", num_seeds=2, seed=5, **settings))
    train(tiny(tmp_path / "6", seed=6, **settings))
    assert_alike(tmp_path / "all" / "seed-6", tmp_path / "6")


@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        *[pytest.param(kind, None, marks=pytest.mark.slow) for kind in KINDS],  # five seconds each
        ("beta", Small),
    ],
)
@pytest.mark.long
def test_traced_learn_equals_eager(kind, policy):
    """As the compiler is given it, for choices and numbers in one action."""
    learn_eagerly, arguments = structured_job("float32", SPACES["hybrid"], policy, distribution=kind)
    graph, _ = trace(learn_eagerly, arguments)
    params, *rest = graph(*flat_tensors(arguments))
    expected = learn_eagerly(*arguments)
    torch.testing.assert_close(params, expected.params, rtol=2e-4, atol=2e-6)
    torch.testing.assert_close(rest[3], expected.minibatch_metrics, rtol=2e-4, atol=2e-5)


@pytest.mark.usefixtures("needs_compiler")
@pytest.mark.slow  # half a minute of compiling each
@each
def test_compiled_learn_equals_eager(kind, tmp_path):
    """Compiled by Inductor, with the gradients of the logarithms of gamma functions."""
    tmp_path.chmod(0o700)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    learn_eagerly, arguments = structured_job("float32", ACTIONS["box"], distribution=kind)
    compiled = compile_program(learn_eagerly, arguments, tmp_path)
    _, arguments = structured_job("float32", ACTIONS["box"], seed=1, distribution=kind)
    assert_same(compiled(*arguments), learn_eagerly(*arguments))
    torch.set_num_threads(threads)


@each
def test_fused_programs_leave_it_to_others(kind):
    """They compute one standard deviation for all states. Choices alone, and the default, they take."""
    obs, config = obs_spec(Box(-1, 1, (3,))), TrainConfig(action_distribution=kind)
    assert not covers(make_network(obs, action_spec(ACTIONS["box"], False, kind), config))
    assert not covers(make_network(obs, action_spec(SPACES["hybrid"], False, kind), config))
    assert covers(make_network(obs, action_spec(ACTIONS["box"], False), TrainConfig()))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"action_distribution": "beta", "squash_actions": True}, "--squash-actions: --action-distribution beta is within"),
        ({"action_distribution": "normal-state-std", "log_std_init": 3.0}, "nearest: --log-std-init 2"),
        ({"sde_sample_freq": 4}, "--sde-sample-freq 4 is for --action-distribution gsde: leave it off"),
    ],
)
def test_settings_that_exclude_each_other(settings, says):
    """One line with the flags."""
    with pytest.raises(UsageError, match=says):
        TrainConfig(**settings)


def test_sde_sample_freq_goes_with_another_distribution():
    """That of a preset or a resumed run is no reason to refuse the distribution that is asked for; a given one is."""
    before = TrainConfig(action_distribution="gsde", sde_sample_freq=4)
    assert with_settings(before, {"action_distribution": "beta"}).sde_sample_freq is None
    assert with_settings(before, {"action_distribution": "gsde"}).sde_sample_freq == 4
    with pytest.raises(UsageError, match="--sde-sample-freq 8 is for --action-distribution gsde: leave it off"):
        with_settings(before, {"action_distribution": "beta", "sde_sample_freq": 8})


@each
def test_spaces_without_numbers_are_refused(kind):
    """A Discrete, and choices in a structure."""
    for space in (gym.spaces.Discrete(3), SPACES["choices"]):
        with pytest.raises(UsageError, match=f"--action-distribution {kind} is for Box action spaces.*: leave it off"):
            action_spec(space, False, kind)


def test_gsde_is_for_our_networks():
    """A module of one's own does not say which layer is the last hidden one."""
    action = action_spec(ACTIONS["box"], False, "gsde")
    with pytest.raises(
        UsageError, match="--action-distribution gsde is for our networks, whose last hidden layer it takes: set it to normal"
    ):
        make_network(obs_spec(Box(-1, 1, (3,))), action, TrainConfig(action_distribution="gsde"), Small)


@pytest.mark.parametrize(("freq", "held"), [(None, 7), (3, 3), (1, 1)])
def test_noise_of_gsde_is_held(freq, held):
    """An environment keeps its matrix for that many steps, from the rollout's first on; each environment has its own."""
    config = TrainConfig(action_distribution="gsde", sde_sample_freq=freq, num_steps=7, num_envs=3, num_minibatches=1)
    action = action_spec(ACTIONS["box"], False, "gsde")
    network = make_network(obs_spec(Box(-1, 1, (3,))), action, replace(config, hidden_sizes=(5,)))
    action = replace(action, distribution=network.distribution)
    noise = draw_noise(SimpleNamespace(config=config, action=action, ranks=ALONE), torch.Generator().manual_seed(0))
    assert noise.shape == (7, 3, 5 * action.size)
    for step in range(7):
        assert torch.equal(noise[step], noise[step // held * held])
        assert step % held or step == 0 or not torch.isclose(noise[step], noise[step - 1]).any()
    assert not torch.isclose(noise[:, 0], noise[:, 1]).any()


def test_beta_needs_bounds():
    """One line; the other families take any Box."""
    space = Box(np.float32([-1, -np.inf]), np.float32([1, 1]))
    with pytest.raises(UsageError, match="--action-distribution beta needs finite action bounds"):
        action_spec(space, False, "beta")
    action_spec(space, False, "normal-state-std")


@pytest.mark.parametrize("low_high", [(-3.0, 1.0), (-1e30, 1e30), (2.0, 2.0)])
def test_beta_reaches_from_bound_to_bound(low_high):
    """0 is the lower bound, 1 the upper one, 1/2 the middle, for arrays as for tensors."""
    spec = action_spec(Box(*low_high, (1,), np.float32), False, "beta")
    stored = torch.tensor([[0.0], [0.5], [1.0]])
    expected = np.float32([low_high[0], sum(low_high) / 2, low_high[1]])
    np.testing.assert_array_equal(spec.to_env(stored)[:, 0].numpy(), expected)
    np.testing.assert_array_equal(spec.to_env_array(stored)[:, 0], expected)
