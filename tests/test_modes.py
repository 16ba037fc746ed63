"""The torch settings of others: their code sees its own, and a run's numbers do not depend on them.

"World" is what torch goes by where a call does not say it: inference mode, gradients, default dtype and device, autocast.
"""

import contextlib
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import nn
from torch.utils._pytree import tree_leaves

from fastppo import Callback, UsageError, load_policy, train
from fastppo.analysis.evaluation import EvaluationPlan, evaluate_config
from fastppo.analysis.rendered_episodes import play
from fastppo.envs.device import TorchVectorEnv
from fastppo.envs.factory import EnvConfig
from fastppo.envs.render import make_render_env
from fastppo.system import modes
from support.runs import tiny

PLAIN = SimpleNamespace(inference=False, grad=True, dtype=torch.float32, device="cpu", autocast=False)
expected, seen = PLAIN, set()


def world():
    device = torch.empty(0).device.type
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    return SimpleNamespace(
        inference=inference,
        grad=grad,
        dtype=torch.get_default_dtype(),
        device=device,
        autocast=torch.is_autocast_enabled("cpu"),
    )


def look(where):
    """Foreign code calls it: is the world here that of whoever called us?"""
    assert world() == expected, f"{where} sees {world()}"
    seen.add(where)


@contextlib.contextmanager
def setting(get, put, value):
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def dtype(value):
    return lambda: setting(torch.get_default_dtype, torch.set_default_dtype, value)


def device(name):
    return lambda: setting(lambda: None, torch.set_default_device, name)


@contextlib.contextmanager
def everything_at_once():
    with dtype(torch.bfloat16)(), torch.device("meta"), torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        yield


WORLDS = {
    "float64": (dtype(torch.float64), {"dtype": torch.float64}),
    "bfloat16": (dtype(torch.bfloat16), {"dtype": torch.bfloat16}),
    "the CPU by name": (device("cpu"), {}),
    "meta": (device("meta"), {"device": "meta"}),
    "with meta": (lambda: torch.device("meta"), {"device": "meta"}),
    "autocast": (lambda: torch.autocast("cpu", torch.bfloat16), {"autocast": True}),
    "no_grad": (torch.no_grad, {"grad": False}),
    # inference mode is left for good: what a run keeps has to be ordinary tensors
    "inference mode": (torch.inference_mode, {}),
    "everything": (everything_at_once, {"dtype": torch.bfloat16, "device": "meta", "autocast": True}),
    "deterministic": (
        lambda: setting(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True),
        {},
    ),
}
if not torch.cuda.is_available():
    WORLDS["cuda, which is not there"] = (device("cuda"), None)


# --- environments that look


class Looks(gym.Env):
    """Six steps; asks for its world wherever it is called."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012 (gymnasium's own form)
    observation_space, action_space = Box(-1.0, 1.0, (2,), np.float32), Discrete(2)

    def __init__(self, render_mode=None):
        look("init")
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        look("reset")
        self.elapsed = 0
        return self.obs(), {}

    def step(self, action):
        look("step")
        self.elapsed += 1
        return self.obs(), 1.0, self.elapsed == 6, False, {}

    def obs(self):
        return np.full(2, self.elapsed / 6, np.float32)

    def render(self):
        look("render")
        return np.zeros((16, 16, 3), np.uint8)

    def close(self):
        look("close")


class LooksInTensors(VectorEnv):
    """Looks as a vector environment of tensors, with a state of its own that every call writes to in place."""

    single_observation_space, single_action_space = Looks.observation_space, Looks.action_space

    def __init__(self, num_envs, mode="NextStep"):
        self.num_envs, self.metadata = num_envs, {"autoreset_mode": AutoresetMode(mode)}
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.state = torch.zeros(num_envs, 2, device="cpu", dtype=torch.float32)
        self.elapsed, self.action = 0, torch.zeros(num_envs, dtype=torch.int64, device="cpu")

    def reset(self, *, seed=None, options=None):
        look("reset")
        self.state[:] = 0.0
        self.elapsed = 0
        return self.state, {}

    def step(self, actions):
        look("step")
        assert not actions.is_inference()
        self.action = actions  # kept, and written to in the next step
        self.action += 0
        self.elapsed += 1
        self.state += 0.1 * actions.unsqueeze(1)
        self.state.clamp_(-1.0, 1.0)
        ended = torch.full((self.num_envs,), self.elapsed % 6 == 0, device="cpu")
        final_obs = self.state.clone()
        if self.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP and self.elapsed % 6 == 0:
            self.state[:] = -0.5
        return self.state, ended.float(), ended, ended & False, {"final_obs": final_obs}


class LooksOnTheDevice:
    """Looks as functions on tensors."""

    observation_space, action_space = Looks.observation_space, Looks.action_space
    max_episode_steps, num_random = 6, 2

    def reset(self, random):
        look("reset")
        return random, random

    def step(self, state, action, random):
        look("step")
        state = (state + 0.1 * action.unsqueeze(1).to(state.dtype)).clamp(-1.0, 1.0)
        over = state[:, 0] > 0.9
        return state, state, state.sum(1), over, over & False


gym.register("Looks-v0", entry_point=Looks)
gym.register("LooksOnTheDevice-v0", vector_entry_point=lambda num_envs: TorchVectorEnv(LooksOnTheDevice(), num_envs))


class Looking(Callback):
    def on_iteration(self, run):
        look("on_iteration")
        policy = run.policy()
        value = policy.value(torch.zeros(2, dtype=torch.float32, device="cpu"))
        assert not any(x.is_inference() for x in (policy.params, value))

    def on_checkpoint(self, run):
        look("on_checkpoint")

    def on_end(self, run):
        look("on_end")


KINDS = {
    "sync": ({"env_id": "Looks-v0", "vectorization": "sync", "record_every": 2}, None),
    "processes": ({"env_id": "Looks-v0", "vectorization": "async"}, None),
    "given": ({}, lambda: gym.vector.SyncVectorEnv([Looks] * 2)),
    "tensors": ({}, lambda: LooksInTensors(2)),
    "tensors, reset within the step": ({}, lambda: LooksInTensors(2, "SameStep")),
    "functions": ({"env_id": "LooksOnTheDevice-v0"}, None),
    "functions of two seeds": ({"env_id": "LooksOnTheDevice-v0", "num_seeds": 2}, None),
}


def looked(tmp_path, surroundings, what, kind):
    """A run of that kind, with its evaluation, in a world where foreign code is to see `what`."""
    global expected
    settings, make = KINDS[kind]
    seen.clear()
    envs = None if make is None else make()
    with surroundings():
        expected = SimpleNamespace(**{**vars(PLAIN), **what})
        try:
            config = tiny(tmp_path / "run", **{"num_iterations": 2, "eval_episodes": 2, "checkpoint_iterations": 1, **settings})
            return train(config, callbacks=[Looking()], envs=envs), envs
        finally:
            expected = PLAIN


@pytest.mark.parametrize("kind", KINDS)
def test_foreign_code_sees_its_own_world(tmp_path, kind):
    """The check, training, callbacks, videos and evaluation: gradients are on and nobody is in inference mode."""
    result, envs = looked(tmp_path, contextlib.nullcontext, {}, kind)
    assert {"reset", "step", "on_iteration", "on_end"} <= seen
    assert kind != "sync" or {"init", "render", "close", "on_checkpoint"} <= seen
    assert not result.policy.params.is_inference()
    state = torch.load(next(result.run_dir.rglob("last.pt")), weights_only=True)
    assert not any(x.is_inference() for x in tree_leaves(state) if isinstance(x, torch.Tensor))
    if envs is not None:  # what they hold can still be written to
        assert isinstance(envs.reset(seed=3)[1], dict)
        train(tiny(tmp_path / "again", num_iterations=1), envs=envs)
    train(tiny(tmp_path / "more", env_id="Looks-v0", num_iterations=1))


@pytest.mark.parametrize("name", ["float64", "meta", "autocast", "no_grad", "everything"])
@pytest.mark.parametrize("kind", ["sync", "tensors", "functions"])
def test_foreign_code_sees_the_world_around_train(tmp_path, kind, name):
    """What the caller has set is what environments and callbacks see, and what is there afterwards."""
    surroundings, what = WORLDS[name]
    with surroundings():
        before = world()
    looked(tmp_path, surroundings, what, kind)
    with surroundings():
        assert world() == before
    assert world() == PLAIN


def test_evaluation_and_videos(tmp_path):
    """Those of the command line too, which make environments of their own."""
    settings = {"env_id": "Looks-v0", "num_iterations": 1}
    result = train(tiny(tmp_path / "run", **settings))
    seen.clear()
    evaluate_config(result.policy, tiny(tmp_path / "run", **settings), EvaluationPlan(episodes=2, seed=0))
    with contextlib.closing(make_render_env(EnvConfig("Looks-v0"))) as envs:
        play(result.policy, envs, lambda frame: None, 0, True, 10)
    assert {"init", "reset", "step", "render", "close"} <= seen


# --- networks of others


class LearnsInStep(Looks):
    """Has a network of its own, which it trains in each step, and pays what that says."""

    def __init__(self, render_mode=None):
        super().__init__(render_mode)
        self.network = nn.Linear(2, 1)
        self.optimizer = torch.optim.SGD(self.network.parameters(), 0.1)

    def step(self, action):
        obs, _, *rest = super().step(action)
        loss = (self.network(torch.from_numpy(obs)) - float(action)).square().sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return obs, loss.item(), *rest


class LearnsInTensors(LooksInTensors):
    """Likewise; and what it returns are results of its network, gradients and all."""

    def __init__(self, num_envs, mode="NextStep"):
        super().__init__(num_envs, mode)
        self.network = nn.Linear(2, 2)
        self.optimizer = torch.optim.SGD(self.network.parameters(), 0.1)

    def step(self, actions):
        obs, _, terminated, truncated, _ = super().step(actions)
        out = self.network(obs.clone())
        self.optimizer.zero_grad()
        out.square().sum().backward()
        self.optimizer.step()
        obs = self.network(obs.clone()).tanh()
        return obs, obs.sum(1), terminated, truncated, {"final_obs": obs.clone()}


class WorldModel(LooksOnTheDevice):
    """A network of its own says what comes next."""

    network = nn.Linear(2, 2)

    def step(self, state, action, random):
        state, *_, over, truncated = super().step(state, action, random)
        state = self.network(state).tanh()
        return state, state, state.sum(1), over, truncated


class SlopedWorldModel(WorldModel):
    def step(self, state, action, random):
        state, obs, reward, *ends = super().step(state, action, random)
        (slope,) = torch.autograd.grad(state.square().sum(), self.network.bias, retain_graph=True)
        return state, obs, reward + slope.sum(), *ends


gym.register("LearnsInStep-v0", entry_point=LearnsInStep)
gym.register("WorldModel-v0", vector_entry_point=lambda num_envs: TorchVectorEnv(WorldModel(), num_envs))
gym.register("SlopedWorldModel-v0", vector_entry_point=lambda num_envs: TorchVectorEnv(SlopedWorldModel(), num_envs))


@pytest.mark.parametrize(
    ("settings", "make"),
    [
        ({"env_id": "LearnsInStep-v0"}, None),
        ({"env_id": "LearnsInStep-v0", "vectorization": "async"}, None),
        ({}, lambda: LearnsInTensors(2)),
        ({}, lambda: LearnsInTensors(2, "SameStep")),
        ({}, lambda: LearnsInTensors(2, "Disabled")),
        ({"env_id": "SlopedWorldModel-v0"}, None),
        ({"env_id": "WorldModel-v0", "num_seeds": 2}, None),
    ],
)
def test_environments_with_networks_of_their_own(tmp_path, settings, make):
    """They train in step, and what they return may carry gradients: training, evaluation, a second run and --resume work."""
    envs = None if make is None else make()
    settings = {"num_iterations": 1, "eval_episodes": 1, **settings}
    result = train(tiny(tmp_path / "run", **settings), envs=envs)
    assert not result.policy.params.requires_grad
    train(tiny(tmp_path / "again", **settings), envs=envs)
    more = tiny(None, **settings | {"num_iterations": 2})
    train(type(more)(**vars(more) | {"run_dir": str(tmp_path / "run"), "resume": str(tmp_path / "run")}), envs=envs)


class Remembers(nn.Module):
    """Looks at the world, and keeps what it computed for the next call, as modules with a cache do."""

    def __init__(self, inputs, num_outputs):
        super().__init__()
        assert world().dtype == torch.float32
        self.actor, self.critic = nn.Linear(inputs[0], num_outputs), nn.Linear(inputs[0], 1)
        self.scale = torch.tensor([1.0])
        self.before = torch.zeros(1)

    def forward(self, obs):
        now = world()
        assert (now.inference, now.dtype, now.device, now.autocast) == (False, torch.float32, "cpu", False)
        value = self.critic(obs) + 0.0 * self.before * self.scale
        self.before = self.before + 0.0
        return self.actor(obs), value


@pytest.mark.parametrize("surroundings", [contextlib.nullcontext, everything_at_once])
def test_a_network_of_ones_own_is_a_part_of_ours(tmp_path, surroundings):
    """It is made and called where float32 on the CPU is the default, without autocast and never in inference mode."""
    with surroundings():
        train(tiny(tmp_path / "run", num_iterations=2), Remembers)


# --- what leaves us


@pytest.mark.parametrize("surroundings", [contextlib.nullcontext, torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("settings", [{}, {"rnn": "gru", "num_minibatches": 2}, {"env_id": "Pendulum-v1", "norm_obs": True}])
def test_answers_can_be_used_in_a_loss(tmp_path, settings, surroundings):
    """`act` and `value` give ordinary tensors, and take observations that carry gradients."""
    with surroundings():
        result = train(tiny(tmp_path / "run", num_iterations=1, **settings))
        policy = load_policy(tmp_path / "run", "last")
        plain = torch.zeros(3, *policy.obs_space.shape, dtype=torch.float32)
        answers = [policy.act(plain), policy.value(plain)]
    obs = torch.zeros(3, *policy.obs_space.shape, requires_grad=True)
    answers += [policy.act(obs), policy.value(obs), result.policy.act(obs), result.policy.value(obs)]
    weight = torch.ones((), requires_grad=True)
    for answer in answers:
        assert not answer.is_inference()
        assert not answer.requires_grad
        (weight * answer).sum().backward()


CONFIGS = {
    "sync": {"env_id": "Pendulum-v1", "norm_obs": True, "norm_reward": True},
    "functions": {"env_id": "CartPole-v1", "backend": "torch", "rnn": "gru", "num_minibatches": 2},
    "seeds": {"num_seeds": 2, "rnn": "lstm", "num_minibatches": 2},
    "images": {
        "env_id": "environments:AnySpacesVector-v0",
        "env_kwargs": {"observation": "tuple", "action": "multi-discrete", "mask": "info"},
    },
}
references = {}


def learned(path, config):
    """Parameters after two iterations, and what the policy says of one observation."""
    result = train(tiny(path, num_iterations=2, num_steps=8, **CONFIGS[config]))
    policy = load_policy(next(path.rglob("last.pt")).parent.parent, "last")
    sampled = policy.obs_space.sample() if config != "images" else None
    obs = tree_zero(sampled)
    return [result.policy.params, *([] if obs is None else [policy.act(obs), policy.value(obs)])]


def tree_zero(obs):
    return None if obs is None else np.zeros_like(obs)


@pytest.mark.parametrize(
    ("config", "name"),
    [*[("sync", name) for name in WORLDS], *[(config, name) for config in CONFIGS for name in ("everything", "no_grad")]],
)
def test_a_run_does_not_depend_on_the_world_around_it(tmp_path, config, name):
    """The same bits: dtypes and devices are said, and what is multiplied is float32."""
    if config not in references:
        references[config] = learned(tmp_path / "plain", config)
    with WORLDS[name][0]():
        found = learned(tmp_path / "run", config)
    for ours, theirs in zip(found, references[config], strict=True):
        assert not isinstance(ours, torch.Tensor) or not ours.is_inference()
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("name", WORLDS)
def test_plain_and_back(name):
    """`plain` undoes every world, `theirs` is that world again within it, and nothing is left behind."""
    with WORLDS[name][0]():
        dtype, autocast = torch.get_default_dtype(), torch.is_autocast_enabled("cpu")
        with modes.plain():
            assert modes.is_plain()
            assert not torch.zeros(1).is_inference()
            with modes.plain(), modes.theirs():
                assert (torch.get_default_dtype(), torch.is_autocast_enabled("cpu")) == (dtype, autocast)
            assert modes.is_plain()
        assert (torch.get_default_dtype(), torch.is_autocast_enabled("cpu")) == (dtype, autocast)
    assert world() == PLAIN


# --- environments that change the world


class Unruly(Looks):
    """Changes everything that is global when it is made, and again in every step."""

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        self.spoil()

    def spoil(self):
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        torch.manual_seed(0)
        np.random.seed(0)
        np.seterr(all="raise")

    def reset(self, *, seed=None, options=None):
        gym.Env.reset(self, seed=seed)
        self.spoil()
        self.elapsed = 0
        return self.obs(), {}

    def step(self, action):
        self.spoil()
        self.elapsed += 1
        return self.obs(), 1.0 + 0.1 * float(action), self.elapsed == 6, False, {}


class Ruly(Unruly):
    def spoil(self):
        pass


def test_an_environment_that_changes_the_world(tmp_path):
    """Another default dtype, no gradients, NumPy's errors raised: the same bits as without."""
    with np.errstate(), setting(torch.get_default_dtype, torch.set_default_dtype, torch.float32):
        grad = torch.is_grad_enabled()
        try:
            runs = []
            for kind in (Ruly, Unruly):
                gym.register("Unruly-v0", entry_point=kind)
                settings = {"env_id": "Unruly-v0", "eval_episodes": 2, "norm_reward": True, "norm_obs": True}
                runs.append(train(tiny(tmp_path / kind.__name__, **settings)))
                del gym.registry["Unruly-v0"]
        finally:
            torch.set_grad_enabled(grad)
    ruly, unruly = runs
    assert torch.equal(ruly.policy.params, unruly.policy.params)
    assert ruly.summary["eval_return_mean"] == unruly.summary["eval_return_mean"]


def test_a_contract_that_another_default_breaks_is_told(tmp_path):
    """Functions on tensors run under their author's default dtype: what is then float64 is refused in one line."""

    class Defaults(LooksOnTheDevice):
        def reset(self, random):
            state = torch.zeros(len(random), 2)
            return state, state

    gym.register("Defaults-v0", vector_entry_point=lambda num_envs: TorchVectorEnv(Defaults(), num_envs))
    try:
        train(tiny(tmp_path / "run", env_id="Defaults-v0", num_iterations=1))
        globals()["expected"] = SimpleNamespace(**{**vars(PLAIN), "dtype": torch.float64})
        with dtype(torch.float64)(), pytest.raises(UsageError, match=r"reset: obs must be .*float32, not .*float64"):
            train(tiny(tmp_path / "other", env_id="Defaults-v0"))
    finally:
        globals()["expected"] = PLAIN
        del gym.registry["Defaults-v0"]
