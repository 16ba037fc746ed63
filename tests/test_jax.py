"""Environments of JAX: gymnax's own steps are the oracle, ends are told apart, and a seed gives one run."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete

import fastppo
from fastppo import UsageError, train
from fastppo.__main__ import console
from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.envs.factory import EnvConfig, make_envs
from fastppo.envs.registry import JAX_PACKAGES, find_spec
from fastppo.envs.render import make_render_env, render_frame
from fastppo.run.metrics_file import read_rows
from support.pages import python_in, section
from support.runs import rows_of, tiny

CARTPOLE = "jax:gymnax/CartPole-v1"
LIMIT = 20  # short, so that truncations come too


@pytest.fixture
def gymnax():
    """The package, where it is installed."""
    pytest.importorskip("jax")
    return pytest.importorskip("gymnax")


# --- without JAX


@pytest.mark.parametrize("env_id", ["jax:", "jax:gymnax", "jax:gymnax/", "jax:gymnacks/CartPole-v1", "jax:gymnax:CartPole-v1"])
def test_ids_that_name_nothing(env_id):
    """One line with the form and the packages."""
    with pytest.raises(UsageError, match=r"write jax:PACKAGE/NAME, as jax:gymnax/CartPole-v1; packages: gymnax, brax, "):
        find_spec(env_id)


@pytest.mark.parametrize("package", JAX_PACKAGES)
def test_a_missing_package(package, monkeypatch, capsys):
    """One line with the command that installs it, exit code 2."""
    monkeypatch.setattr("fastppo.envs.registry.importlib.util.find_spec", lambda name: None)
    assert console(["train", "--env-id", f"jax:{package}/Anything-v0", "--plain"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"needs a package that is not installed: pip install {JAX_PACKAGES[package]}")


def test_who_imports_jax():
    """The two adapter files alone, and nobody imports these at the top, so that other runs do not load JAX."""
    folder = Path(fastppo.__file__).parent
    texts = {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in folder.rglob("*.py")}
    adapters = ["envs/jax.py", "envs/jax_packages.py"]
    assert sorted(name for name, text in texts.items() if re.search(r"^\s*(import|from) jax\b", text, re.M)) == adapters
    importing = sorted(name for name, text in texts.items() if re.search(r"^(import|from) fastppo\.envs\.jax", text, re.M))
    assert importing == ["envs/jax_packages.py"]


# --- steps


def test_steps_equal_gymnax(gymnax):
    """200 steps of 3 CartPoles beside gymnax's step_env: observations, rewards, ends and final observations."""
    import jax

    env, params = gymnax.make("CartPole-v1")
    params = params.replace(max_steps_in_episode=LIMIT)
    reset, step = jax.jit(env.reset_env), jax.jit(env.step_env)
    envs = AutoresetEnvs(make_envs(EnvConfig(CARTPOLE, 3, env_kwargs={"max_steps_in_episode": LIMIT})))
    obs = envs.reset(11)
    pairs = [jax.random.split(jax.random.PRNGKey(11 + i), 2) for i in range(3)]
    keys = [pair[0] for pair in pairs]
    starts = [reset(pair[1], params) for pair in pairs]
    states, elapsed, ends = [state for _, state in starts], [0] * 3, {"terminated": 0, "truncated": 0}
    np.testing.assert_allclose(obs, np.stack([first for first, _ in starts]), rtol=1e-6)
    generator = np.random.default_rng(0)
    for _ in range(200):
        action = generator.integers(0, 2, 3)
        got = envs.step(torch.as_tensor(action))
        for i in range(3):
            keys[i], for_step, for_reset = jax.random.split(keys[i], 3)
            final, states[i], reward, done, _ = step(for_step, states[i], int(action[i]), params)
            if hasattr(env, "is_truncated"):  # since gymnax 1.0
                done = done | env.is_truncated(states[i], params)
            elapsed[i] += 1
            fell = abs(float(final[0])) > 2.4 or abs(float(final[2])) > 12 * 2 * np.pi / 360
            assert (bool(got.terminated[i]), bool(got.truncated[i])) == (fell, elapsed[i] == LIMIT and not fell)
            assert bool(done) == (fell or elapsed[i] == LIMIT)
            np.testing.assert_allclose(got.final_obs[i], final, rtol=1e-4, atol=1e-5)
            assert float(got.reward[i]) == float(reward) == 1.0
            after = final
            if done:
                after, states[i] = reset(for_reset, params)
                elapsed[i], ends["terminated" if fell else "truncated"] = 0, ends["terminated" if fell else "truncated"] + 1
            np.testing.assert_allclose(got.obs[i], after, rtol=1e-4, atol=1e-5)
    assert min(ends.values()) > 3


def test_an_environment_goes_its_own_way(gymnax):
    """Environment i is that of seed + i, whatever the others are; a reset without a seed goes on."""
    two, five = (make_envs(EnvConfig(CARTPOLE, number)) for number in (2, 5))
    starts = [two.reset(seed=[8, 9])[0], five.reset(seed=7)[0][1:3]]
    assert torch.equal(*starts)
    for _ in range(40):
        few, many = two.step(np.ones(2, int)), five.step(torch.ones(5, dtype=torch.int64))
        assert all(torch.allclose(one, other[1:3], atol=1e-6) for one, other in zip(few[:4], many[:4], strict=True))
    again = two.reset()[0]
    assert not torch.equal(again, starts[0])
    two.reset(seed=[8, 9])
    assert not torch.equal(two.reset()[0], starts[0])


def test_the_pages_function(gymnax):
    """That of docs/environments.md makes environments of one's own class."""
    names = {"MyEnv": type(gymnax.make("Pendulum-v1")[0])}
    exec(python_in(section("docs/environments.md", "Environments of JAX")), names)
    obs, _ = names["make"](3).reset(seed=0)
    assert (obs.dtype, tuple(obs.shape)) == (torch.float32, (3, 3))


@pytest.fixture
def stub():
    """An environment of several types: counts its steps up to 3, then terminates if the first action is 1."""
    jax = pytest.importorskip("jax")
    from fastppo.envs.jax import JaxEnv, JaxVectorEnv

    def look(state):
        return {"place": state * 0.5, "kind": state % 3, "odd": state % 2 == 1}

    def step(key, state, action):
        state = state + 1
        return state, look(state), action[1], (state >= 3) & (action[0] == 1), False

    space = Dict({"place": Box(0, 9, (1,)), "kind": Discrete(3), "odd": Box(0, 1, (), np.int8)})
    env = JaxEnv(space, MultiDiscrete([2, 3]), lambda key: (0, look(jax.numpy.zeros((), int))), step, max_episode_steps=4)
    return lambda **changes: JaxVectorEnv(env._replace(**changes), 2)


def test_types_structures_and_the_time_limit(stub):
    """Dict observations, MultiDiscrete actions, Python's numbers as a state; the limit truncates, an end in it terminates."""
    envs = stub()
    obs, _ = envs.reset(seed=0)
    assert {name: (part.dtype, tuple(part.shape)) for name, part in obs.items()} == {
        "place": (torch.float32, (2, 1)),
        "kind": (torch.int64, (2,)),
        "odd": (torch.int8, (2,)),
    }
    seen = []
    for _ in range(4):
        obs, reward, terminated, truncated, info = envs.step(torch.tensor([[1, 2], [0, 1]]))
        assert reward.tolist() == [2.0, 1.0]
        assert all(part.is_contiguous() for part in obs.values())
        places = [parts["place"].flatten().tolist() for parts in (obs, info["final_obs"])]
        seen.append((*places, terminated.tolist(), truncated.tolist()))
    assert seen[1] == ([1.0, 1.0], [1.0, 1.0], [False, False], [False, False])
    assert seen[2] == ([0.0, 1.5], [1.5, 1.5], [True, False], [False, False])
    assert seen[3] == ([0.5, 0.0], [0.5, 2.0], [False, False], [False, True])
    short = stub(max_episode_steps=3)
    short.reset(seed=0)
    for _ in range(3):
        _, _, terminated, truncated, _ = short.step(torch.tensor([[1, 2], [0, 1]]))
    assert (terminated.tolist(), truncated.tolist()) == ([True, False], [False, True])
    with pytest.raises(ValueError, match=r"actions must have shape \(2, 2\), not \(2,\)"):
        envs.step(torch.zeros(2))


def test_several_agents_are_refused(stub):
    """A reward of each agent is no number."""
    import jax

    envs = stub(step=lambda key, state, action: (state, {}, jax.numpy.zeros(3), False, False))
    with pytest.raises(UsageError, match=r"its reward has the shape \(3,\)"):
        envs.reset(seed=0)


# --- runs


def test_it_trains_and_repeats(gymnax, tmp_path):
    """With normalisation and evaluation; the same numbers from the same seed, alone and among two seeds."""
    settings = {"env_id": CARTPOLE, "norm_obs": True, "num_iterations": 3, "seed": 5}
    result = train(tiny(tmp_path / "one", eval_episodes=2, **settings))
    assert result.summary["eval_episodes"] == 2
    alone = rows_of(tmp_path / "one")
    assert int(alone[-1]["global_step"]) == 3 * 2 * 16  # no row only resets
    train(tiny(tmp_path / "both", num_seeds=2, **settings))
    of_both = read_rows(tmp_path / "both" / "seed-5" / "metrics.csv")
    returns = [[row["episodic_return_mean"] for row in rows] for rows in (alone, of_both)]
    assert returns[0] == returns[1]
    assert any(returns[0])


def test_classic_control_is_drawn(gymnax):
    """By gymnasium, from gymnax's state."""
    envs = make_render_env(EnvConfig(CARTPOLE))
    before = render_frame(envs)
    for _ in range(8):
        envs.step(torch.ones(1, dtype=torch.int64))
    assert before.std() > 0
    assert (render_frame(envs) != before).any()


def test_other_environments_are_not_drawn(gymnax):
    """One line."""
    with pytest.raises(UsageError, match="cannot be rendered: it has no render mode rgb_array; its render modes: none"):
        make_render_env(EnvConfig("jax:gymnax/Catch-bsuite"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("CartPole-v2", "gymnax has no 'CartPole-v2'; nearest: CartPole-v1"),
        ("CartPole-v1 --env-kwargs size=3", "--env-kwargs do not fit"),
        ("CartPole-v1 --backend torch", "--backend torch has no jax:gymnax/CartPole-v1"),
        ("CartPole-v1 --frame-stack 4", "--frame-stack wraps environments one by one"),
    ],
)
def test_mistakes(gymnax, flags, message, tmp_path, capsys):
    """One line, exit code 2, nothing written."""
    name, *rest = flags.split()
    flags = ["--env-id", f"jax:gymnax/{name}", *rest, "--run-dir", str(tmp_path / "run"), "--plain"]
    assert console(["train", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()


def test_the_table_of_packages():
    """Each package that an id may name is made by a function, and the other way round."""
    pytest.importorskip("jax")
    from fastppo.envs.jax_packages import PACKAGES

    assert list(PACKAGES) == list(JAX_PACKAGES)
