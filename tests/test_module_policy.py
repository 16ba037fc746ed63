"""A network of somebody's own: it trains, is kept and restored, follows from the seed, and is refused where it is wrong."""

import re

import numpy as np
import pytest
import torch
from environments import OBSERVATIONS
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary
from torch import nn

from fastppo import TrainConfig, UsageError, load_policy, train
from fastppo.evaluate import console as evaluate_console
from fastppo.policy.module_policy import ModulePolicy
from fastppo.policy.spaces import action_spec, obs_spec
from fastppo.random_streams import Stream, seed_of
from fastppo.train import console
from support.pages import python_in, section
from support.runs import rows_of, trained


class Small(nn.Module):
    """One hidden layer for both heads; takes a vector, or a dict of vectors and of images, whose pixels are averaged."""

    def __init__(self, inputs, num_outputs, width=32):
        super().__init__()
        shapes = inputs if isinstance(inputs, dict) else {"obs": inputs}
        self.body = nn.Sequential(nn.Linear(sum(shape[0] for shape in shapes.values()), width), nn.Tanh())
        self.actor, self.critic = nn.Linear(width, num_outputs), nn.Linear(width, 1)

    def forward(self, obs):
        parts = obs.values() if isinstance(obs, dict) else [obs]
        x = self.body(torch.cat([part.flatten(2).mean(-1) if part.ndim > 2 else part for part in parts], -1))
        return self.actor(x), self.critic(x)


class Fixed(Small):
    """With random numbers that are no parameters to train: a buffer, one that is not in its state_dict, a frozen layer."""

    def __init__(self, inputs, num_outputs):
        super().__init__(inputs, num_outputs)
        self.register_buffer("shift", torch.randn(num_outputs))
        self.register_buffer("hidden", torch.randn(num_outputs), persistent=False)
        self.frozen = nn.Linear(num_outputs, num_outputs).requires_grad_(False)

    def forward(self, obs):
        out, value = super().forward(obs)
        return self.frozen(out + self.shift) + self.hidden, value


def probe(tmp_path, env_id, policy=Small, **settings):
    settings = {"num_iterations": 30, "num_steps": 16, "learning_rate": 1e-2, "compile": "off", **settings}
    config = TrainConfig(
        env_id=f"environments:{env_id}", num_envs=8, seed=1, eval_episodes=0, run_dir=str(tmp_path / "run"), **settings
    )
    return train(config, policy=policy)


def test_a_probe_of_discrete_actions(tmp_path):
    """Action 1 is right at obs 1 and action 0 at obs -1, worth 1: learned by somebody's module, and loaded again."""
    result = probe(tmp_path, "ProbeActionMeetsObservation-v0")
    obs = np.array([[-1.0], [1.0]], np.float32)
    for policy in (result.policy, load_policy(result.run_dir, policy=Small)):
        assert policy.act(obs).tolist() == [0, 1]
        assert policy.value(obs) == pytest.approx([1.0, 1.0], abs=0.2)


@pytest.mark.long
def test_a_probe_of_continuous_actions(tmp_path):
    """Two numbers shown are said: log standard deviations are one more weight, and are learned."""
    settings = {"gamma": 0.0, "num_steps": 64, "num_iterations": 40, "num_minibatches": 8, "learning_rate": 3e-3}
    policy = probe(tmp_path, "IdentityBox-v0", norm_obs=True, **settings).policy
    obs = np.random.default_rng(0).uniform(-0.7, 0.7, (200, 2)).astype(np.float32)
    assert np.abs(policy.act(obs) - obs).mean() < 0.15
    assert (policy.weights["fastppo.log_std"] < -0.5).all()


def test_a_probe_of_a_structure_with_a_mask(tmp_path):
    """Of four actions in a Dict observation, the lit one pays and a mask rules half of the wrong ones out."""
    policy = probe(tmp_path, "MaskedIdentity-v0", gamma=0.5, num_iterations=30).policy
    obs = {"lit": np.arange(4) - 1, "action_mask": np.ones((4, 4), np.int8)}
    assert policy.act(obs).tolist() == [0, 1, 2, 3]
    obs["action_mask"] = 1 - np.eye(4, dtype=np.int8)
    assert (policy.act(obs) != np.arange(4)).all()


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
@pytest.mark.parametrize(("observation", "action"), [("masked", "multi-discrete"), ("tuple", "box scalar")])
def test_structures_in_every_autoreset_mode(tmp_path, observation, action, mode):
    """Final observations have no mask: their value is asked for without one."""
    result = trained(tmp_path, observation, action, policy=Small, mode=mode)
    assert all(np.isfinite(float(row["value_loss"])) for row in rows_of(result.run_dir))


def test_first_weights_follow_from_the_seed_alone(tmp_path):
    """Whatever the global generator stands at, and it stands there afterwards."""
    obs, action = obs_spec(Box(-1, 1, (3,))), action_spec(Discrete(2), False)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = ModulePolicy(Small, obs, action, 0.0, seed=7).init(torch.Generator())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(ModulePolicy(Small, obs, action, 0.0, seed=7).init(torch.Generator()), first)
    assert not torch.equal(ModulePolicy(Small, obs, action, 0.0, seed=8).init(torch.Generator()), first)


def test_a_run_is_the_same_twice_and_goes_on(tmp_path):
    """Same seed, same bits; --resume goes on from where the run was, with what it keeps beside its weights."""
    results = [probe(tmp_path / name, "Walk-v0", Fixed, num_iterations=2) for name in ("a", "b")]
    assert torch.equal(results[0].policy.params, results[1].policy.params)
    run_dir = results[0].run_dir
    config = TrainConfig.from_json(run_dir / "config.json")
    assert config.policy == "test_module_policy:Fixed"
    config = TrainConfig(**{**vars(config), "resume": str(run_dir), "run_dir": None, "num_iterations": 3, "policy": None})
    again = train(config, policy=Fixed)
    assert again.summary["iterations"] == 3
    obs = np.zeros((5, 3), np.float32)
    np.testing.assert_array_equal(load_policy(run_dir, policy=Fixed).value(obs), again.policy.value(obs))
    for given, message in (
        (None, r"a Fixed of your own: give what made it as policy=\.\.\. in Python"),
        (Small, "a Fixed of your own.* and policy= makes a Small"),
    ):
        with pytest.raises(UsageError, match=message):
            train(config, policy=given)


def test_what_is_no_parameter_is_kept_and_left_alone(tmp_path):
    """Buffers and frozen weights are those that trained, not those that loading happened to draw; training moves none."""
    result = probe(tmp_path, "Walk-v0", Fixed, num_iterations=3)
    state = torch.load(result.run_dir / "checkpoints" / "last.pt", weights_only=True)["policy"]
    assert set(state["fixed"]) == {"shift", "hidden", "frozen.weight", "frozen.bias"}
    assert set(state["weights"]) == {
        f"{layer}.{part}" for layer in ("body.0", "actor", "critic") for part in ("weight", "bias")
    }
    torch.manual_seed(99)
    agents = [load_policy(result.run_dir, "last", policy=Fixed) for _ in range(2)]
    module, obs = Fixed((3,), 3), torch.randn(6, 3)
    module.load_state_dict({**state["weights"], **state["fixed"]}, strict=False)
    module.hidden.copy_(state["fixed"]["hidden"])
    for agent in agents:
        assert torch.equal(agent.act(obs), module(obs)[0].argmax(-1))
        torch.testing.assert_close(agent.value(obs), module(obs)[1].squeeze(-1).detach())
    # the first weights of a run without training: what training left alone is what the seed drew
    network = ModulePolicy(Fixed, agents[0].obs, agents[0].action, 0.0, seed=seed_of(1, Stream.PARAMETERS))
    assert all(torch.equal(network.fixed[name], tensor) for name, tensor in state["fixed"].items())


def test_a_run_of_ones_own_network_without_it(tmp_path, capsys):
    """load_policy and both command lines say what is missing; exit code 2. And one of ours is not taken for somebody's."""
    run_dir = probe(tmp_path, "Walk-v0", lambda *args: Small(*args), num_iterations=1).run_dir  # which cannot be imported
    assert TrainConfig.from_json(run_dir / "config.json").policy is None
    missing = r"this run's network is a Small of your own: give what made it as policy=\.\.\. in Python"
    with pytest.raises(UsageError, match=missing):
        load_policy(run_dir)
    for command, args in ((evaluate_console, [str(run_dir)]), (console, ["--resume", str(run_dir), "--num-iterations", "2"])):
        assert command(args) == 2
        error = capsys.readouterr().err
        assert re.search(missing, error)
        assert len(error.splitlines()) == 1
    with pytest.raises(UsageError, match=r"this run's network is ours: leave policy= out"):
        load_policy(trained(tmp_path / "ours", "float32", "discrete").run_dir, policy=Small)


class Returns(nn.Module):
    """Returns what it is told to, whatever it is given."""

    def __init__(self, result, dtype=torch.float32):
        super().__init__()
        self.result, self.weight = result, nn.Parameter(torch.zeros(1, dtype=dtype))

    def forward(self, obs):
        return self.result(obs)


def fails(*args):
    raise RuntimeError("the wheel came off\nand another line")


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda inputs: None, r"policy\(\(3,\), 3\) failed: TypeError: .*takes 1 positional argument"),
        (fails, r"policy\(\(3,\), 3\) failed: RuntimeError: the wheel came off$"),
        (lambda inputs, n: torch.tanh, r"must return a torch.nn.Module, not builtin_function_or_method"),
        (lambda inputs, n: nn.LazyLinear(n), "its weight weight has no shape yet: give the layer its sizes"),
        (lambda inputs, n: nn.Tanh(), "it has no weights to train"),
        (lambda inputs, n: Small(inputs, n).double(), r"its weight body.0.weight is torch.float64; all must be float32"),
        (lambda inputs, n: Small((4,), n), r"failed on float32 inputs \(3,\), two at once: RuntimeError: mat1 and mat2"),
        (lambda inputs, n: Returns(fails), r"failed on float32 inputs \(3,\), two at once: RuntimeError: the wheel came off$"),
        (
            lambda inputs, n: nn.Linear(3, n),
            r"must return a tuple of outputs \(R, 3\) and value.* returned \(2, 3\) torch.float32$",
        ),
        (
            lambda inputs, n: Small(inputs, n + 1),
            r"outputs \(R, 3\) and value \(R,\).* returned \(2, 4\) torch.float32, \(2, 1\)",
        ),
        (lambda inputs, n: Returns(lambda x: (x, x)), r"returned \(2, 3\) torch.float32, \(2, 3\) torch.float32$"),
        (lambda inputs, n: Returns(lambda x: (x.double(), x[:, 0])), r"returned \(2, 3\) torch.float64"),
        (lambda inputs, n: Returns(lambda x: (x, None)), r"returned \(2, 3\) torch.float32, NoneType$"),
        (lambda inputs, n: Returns(lambda x: (x, x[:, 0], x)), r"returned \(2, 3\)"),
    ],
)
def test_a_network_that_breaks_the_contract_is_refused(tmp_path, factory, message):
    """One line that says what was wrong with it; nothing has been written."""
    with pytest.raises(UsageError, match=message) as caught:
        probe(tmp_path, "Walk-v0", factory)
    assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_what_a_network_is_given():
    """Shapes and values: vectors flat, categories one-hot, images (C, H, W) in [0, 1], masks not at all; one row or many."""
    space = Dict(
        image=OBSERVATIONS["image (H, W, C)"], gear=Discrete(3, start=1), matrix=Box(-1, 1, (2, 2)), action_mask=MultiBinary(2)
    )
    told, seen = [], []

    class Watching(Small):
        def forward(self, obs):
            seen.append({key: x.clone() for key, x in obs.items()})
            return super().forward(obs)

    def factory(inputs, num_outputs):
        told.append((inputs, num_outputs))
        return Watching(inputs, num_outputs)

    action = action_spec(Discrete(2), False)
    spec = obs_spec(space, None, action)
    network = ModulePolicy(factory, spec, action, 0.0)
    assert told == [({"obs.gear": (3,), "obs.image": (3, 40, 44), "obs.matrix": (4,)}, 2)]
    weights = network.weights(network.init(torch.Generator()))
    obs = {leaf.key: torch.ones(4, 5, *leaf.shape, dtype=leaf.dtype) for leaf in spec}
    dist, value = network.actor_critic(weights, obs)
    assert (dist.shape, value.shape) == ((4, 5, 2), (4, 5))
    assert {key: tuple(x.shape) for key, x in seen[-1].items()} == {
        "obs.gear": (20, 3), "obs.image": (20, 3, 40, 44), "obs.matrix": (20, 4)
    }  # fmt: skip
    assert all(x.dtype is torch.float32 for x in seen[-1].values())
    assert seen[-1]["obs.gear"][7].tolist() == [1.0, 0.0, 0.0]
    assert seen[-1]["obs.image"].unique().tolist() == pytest.approx([1 / 255])
    one = {key: x[0, 0] for key, x in obs.items()}
    assert network.critic(weights, {key: x for key, x in one.items() if key != "action_mask"}).shape == ()


def test_the_pages_network_learns(tmp_path, monkeypatch):
    """The example of docs/python.md as it stands there, in 12 lines: it trains, and its policy loads again."""
    example = python_in(section("docs/python.md", "Your own network"))
    assert len([line for line in example.splitlines() if line]) <= 16
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    exec(example.replace("total_timesteps=100_000", "total_timesteps=4_000, eval_episodes=2, compile='off', plain=True"), names)
    assert names["result"].summary["global_step"] >= 4_000
    assert names["policy"].act(np.zeros(4, np.float32)) in (0, 1)
