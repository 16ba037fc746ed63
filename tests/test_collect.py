"""Rollouts by `collect`: those of stepping by hand, and compiled those of eager."""

import functools

import pytest
import torch
from torch.utils._pytree import tree_leaves

from fastppo.compile.inductor import compile_program
from fastppo.compile.program import flat_tensors
from fastppo.compile.trace import trace
from fastppo.core.acting import act
from fastppo.core.contracts import CollectResult, Execution
from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.envs.classic import CartPole, MountainCarContinuous, Pendulum
from fastppo.fused.mlp_programs import bind_act
from fastppo.rollout.collector import start_collector
from support.device_envs import Faulty, N, Spoilt, T, setup

KEYS = ("obs", "action", "reward", "terminated", "truncated", "valid")


# --- eager


@pytest.mark.parametrize("norm_obs", [False, True], ids=["raw", "norm_obs"])
@pytest.mark.parametrize(
    ("env", "squash"),
    [
        (CartPole(max_episode_steps=7), False),
        (CartPole(max_episode_steps=20), False),
        (Pendulum(max_episode_steps=7), False),
        (Pendulum(max_episode_steps=7), True),
        (MountainCarContinuous(max_episode_steps=4), False),
    ],
    ids=["CartPole 7", "CartPole 20", "Pendulum clipped", "Pendulum squashed", "MountainCarContinuous"],
)
def test_collect_is_stepping_by_hand(env, squash, norm_obs):
    """Every row, the bootstrap's too, and the environments' state after each of six rollouts, from the same random numbers.

    Ends lie inside the rollouts and on their borders; a row is a transition unless the one before it ended an episode.
    """
    ours, twin = setup(env, squash, norm_obs), setup(env, squash, norm_obs)
    rollout = ours.rollout()
    collector = start_collector(AutoresetEnvs(ours.envs), rollout, ours.obs, ours.spec, seed=7)
    obs, _ = twin.envs.reset(seed=7)
    done = torch.zeros(N, dtype=torch.bool)
    (bounds,) = twin.spec.leaves
    ends = dict.fromkeys(("terminated", "truncated", "last row", "clipped"), 0)
    for number in range(6):
        noise = ours.noise(number)
        collector.collect(functools.partial(ours.program(), ours.params, ours.normalization), noise)
        for t in range(T):
            action = act(twin.policy, twin.policy.weights(twin.params), twin.normalization, obs, noise[t])
            expected = {"obs": obs, "action": action, "valid": ~done}
            obs, *result, _ = twin.envs.step(twin.spec.to_env(action))
            expected |= dict(zip(("reward", "terminated", "truncated"), result, strict=True))
            for key in KEYS:
                assert torch.equal(rollout[key][t], expected[key]), (number, t, key)
            done = expected["terminated"] | expected["truncated"]
            for key in ("terminated", "truncated"):
                ends[key] += int(expected[key].sum())
            ends["clipped"] += int(action.abs().gt(bounds.high).sum()) if bounds.low.numel() else 0
        ends["last row"] += int(done.sum())
        assert torch.equal(rollout["obs"][T], obs)
        assert torch.equal(rollout["valid"][T], ~done)
        for one, other in zip(tree_leaves(ours.envs.running), tree_leaves(twin.envs.running), strict=True):
            assert torch.equal(one, other)
    assert ends["truncated"] > 0
    assert ends["last row"] > 0
    assert (ends["terminated"] > 0) == (env == CartPole(max_episode_steps=20))  # 7 steps are too few for a pole to fall
    assert (ends["clipped"] > 0) == (bounds.low.numel() > 0)


def test_cut_episodes_end_and_begin_anew():
    """`cut` tells the last row as truncated, where it is a transition that did not terminate; `reset` starts all anew."""
    ours = setup(CartPole(max_episode_steps=T))  # truncated in the last row anyway, but for those that fell before
    rollout = ours.rollout()
    collector = start_collector(AutoresetEnvs(ours.envs), rollout, ours.obs, ours.spec, seed=7)
    ours.envs.running = ours.envs.running._replace(done=torch.arange(N) == 1)  # one has just ended: one step behind the others
    run = functools.partial(ours.program(), ours.params, ours.normalization)
    collector.collect(run, ours.noise(0), cut=False)
    before = rollout["truncated"][T - 1].clone()
    ours.envs.reset(seed=7)
    ours.envs.running = ours.envs.running._replace(done=torch.arange(N) == 1)
    collector.collect(run, ours.noise(0), cut=True)
    assert before.tolist() == [index != 1 for index in range(N)]
    assert rollout["truncated"][T - 1].all()
    collector.reset(None)
    collector.collect(run, ours.noise(0))
    assert rollout["valid"][0].all()
    assert not rollout["terminated"][0].any()


@pytest.mark.parametrize("where", ["reward", "first obs", "last obs", "nothing"])
def test_finite_is_false_where_a_number_is_not(where):
    """nan and inf in a reward, in an observation acted on, and in the bootstrap's: none of them goes into an update."""
    ours = setup(Faulty("reward" if where == "reward" else "obs"))
    params, normalization, (obs, done, elapsed, count), noise, random = ours.arguments()
    count = count + {"reward": 35, "last obs": 41 - T}.get(where, 0)  # the 41st step comes within the rollout, or ends it
    if where == "first obs":
        obs = obs.index_fill(0, torch.tensor([4]), float("nan"))
    collected = ours.program()(params, normalization, (obs, done, elapsed, count), noise, random)
    assert bool(collected.finite) == (where == "nothing")
    assert collected.reward.isfinite().all() == (where != "reward")  # each is seen by itself
    assert collected.obs.isfinite().all() == (where != "first obs")


# --- compiled


def assert_same(result, expected):
    """Ends and row masks exactly, floats as float32 has them after a rollout."""
    assert torch.equal(result.finite, expected.finite)
    for key in ("terminated", "truncated", "valid"):
        assert torch.equal(getattr(result, key), getattr(expected, key)), key
    for key in ("obs", "action", "reward"):
        torch.testing.assert_close(getattr(result, key), getattr(expected, key), rtol=1e-4, atol=1e-4)
    for one, other in zip(result.running, expected.running, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def over_rollouts(ours, compiled):
    """Five rollouts of both, each from where eager left off: rounding does not add up."""
    for number in range(5):
        arguments = ours.arguments(number)
        expected = ours.program()(*arguments)
        result = compiled(*arguments)
        assert expected.finite
        yield result, expected
        ours.envs.running = ours.program().keywords["env_step"].unpack(expected.running)


@pytest.mark.slow  # a quarter of a minute of compiling: below two workers are compiled, and this one's graph is compared
@pytest.mark.usefixtures("needs_compiler")
@pytest.mark.parametrize("fused", [False, True], ids=["compiled", "fused"])
def test_compiled_collect_equals_eager(programs_dir, fused):
    """One worker, discrete actions, normalised observations: the same actions, ends and transitions, rollout after rollout."""
    ours = setup(CartPole(max_episode_steps=15), norm_obs=True)
    execution = Execution(bind_act=functools.partial(bind_act, ours.policy) if fused else None)
    compiled = compile_program(ours.program(execution=execution), ours.arguments(), programs_dir)
    ended = 0
    for result, expected in over_rollouts(ours, compiled):
        assert_same(result, expected)
        assert torch.equal(result.action, expected.action)
        ended += int((expected.terminated | expected.truncated).sum())
    assert ended > N


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("squash", [False, True], ids=["clipped", "squashed"])
@pytest.mark.parametrize("env", [Pendulum(max_episode_steps=7), MountainCarContinuous(), Spoilt(g=9.0)], ids=repr)
def test_traced_collect_equals_eager(env, squash):
    """Bounds of actions and an environment's own constants are part of the graph that the compiler is given."""
    ours = setup(env, squash)
    arguments = ours.arguments()
    graph, _ = trace(ours.program(), arguments)
    results, expected = graph(*flat_tensors(arguments)), ours.program()(*arguments)
    rows = len(expected.running)
    assert_same(CollectResult(tuple(results[:rows]), *results[rows:]), expected)


def test_traced_collect_of_choices_equals_eager():
    """Discrete actions, normalised observations."""
    ours = setup(CartPole(max_episode_steps=2), norm_obs=True)
    arguments = ours.arguments()
    graph, _ = trace(ours.program(), arguments)
    results, expected = graph(*flat_tensors(arguments)), ours.program()(*arguments)
    rows = len(expected.running)
    assert_same(CollectResult(tuple(results[:rows]), *results[rows:]), expected)
    assert torch.equal(CollectResult(tuple(results[:rows]), *results[rows:]).action, expected.action)
    assert expected.truncated.any()


@pytest.mark.usefixtures("inductor")
def test_two_compiled_workers_equal_eager(programs_dir):
    """Each steps half of the environments and acts by the C++ functions. Bounds and a constant of the environment are tensors
    of the graph.

    A number that is not finite is seen whichever worker it comes to.
    """
    ours = setup(Spoilt(max_episode_steps=7), squash=True)
    execution = Execution(num_workers=2, bind_act=functools.partial(bind_act, ours.policy))
    compiled = compile_program(ours.program(execution=execution), ours.arguments(), programs_dir)
    for result, expected in over_rollouts(ours, compiled):
        assert_same(result, expected)
        assert (expected.truncated.any(0)).all()
    ours.envs.reset(seed=0)  # no episode has just ended
    arguments = ours.arguments()
    for index in (0, N - 1):
        theta = arguments[2][3].index_fill(0, torch.tensor([index]), 2000.0)
        running = (*arguments[2][:3], theta, *arguments[2][4:])
        assert not ours.program()(*arguments[:2], running, *arguments[3:]).finite
        assert not compiled(*arguments[:2], running, *arguments[3:]).finite
