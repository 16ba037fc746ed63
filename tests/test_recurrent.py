"""Policies that remember: acting step by step, replaying whole sequences, and learning from them are one thing."""

import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from environments import Walk
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from test_compilation import SETTINGS, assert_same
from test_programs import (
    CONTINUOUS,
    DISCRETE,
    OFF,
    HostSyncs,
    assert_together,
    column,
    make_params,
    make_permutation,
    make_rollout,
    to_meta,
    update,
)
from test_tensor_envs import TensorTwin

from fastppo.core.adam import init_adam
from fastppo.core.compilation import compile_program
from fastppo.core.gradient import functional_grad_and_aux
from fastppo.core.programs import (
    Normalization,
    Schedule,
    act_and_remember,
    act_and_remember_from_params,
    collect,
    learn,
)
from fastppo.core.recurrence import STEPS
from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.envs.classic import CartPole
from fastppo.envs.device import TorchVectorEnv
from fastppo.policy.agent import Agent
from fastppo.policy.networks import Encoder, MLPActorCritic
from fastppo.policy.recurrent import RecurrentActorCritic, Rnn
from fastppo.policy.spaces import action_spec, obs_spec
from fastppo.rollout import (
    DeviceCollector,
    HostCollector,
    Memory,
    TensorCollector,
    allocate_rollout,
    env_step_of,
    pack,
    start_collector,
)

CPU = torch.device("cpu")
OBS = obs_spec(Walk.observation_space)


def remembering(like, kind="lstm", users=2, layers=1, width=5, obs=OBS):
    """A network with memory that has the observations, actions and heads of the feed-forward `like`."""
    mlp = MLPActorCritic(width, like.action_size, like.distribution, (8,), share_backbone=users == 1 and like.share_backbone)
    return RecurrentActorCritic(Encoder(obs.leaves), Rnn(kind, obs.leaves[0].size, width, layers, users), mlp)


FORMS = pytest.mark.parametrize(
    ("kind", "users", "layers"), [("lstm", 2, 1), ("lstm", 1, 2), ("gru", 2, 2), ("gru", 1, 1)], ids="{0}".format
)
HEADS = pytest.mark.parametrize("like", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])


class Stepping(RecurrentActorCritic):
    """The same network whose `replay` is a loop of `step` and `judge`: an oracle whose gradient is autograd's."""

    def replay(self, weights, obs, first, memory, cells):
        dists, values, memories = [], [], []
        for t in range(first.shape[0]):
            memory = torch.where(first[t][:, None], 0.0, memory)
            values.append(self.judge(weights, obs[t], memory))
            dist, memory = self.step(weights, obs[t], memory)
            dists.append(dist)
            memories.append(memory)
        if isinstance(dists[0], tuple):
            dist = tuple(torch.stack(parts) for parts in zip(*dists, strict=True))
        else:
            dist = torch.stack(dists)
        return dist, torch.stack(values), torch.stack(memories)


def sequences(like, policy, num_steps=8, num_envs=4, final_obs=False):
    """make_rollout's, with where episodes begin and a memory before the first row."""
    rollout = make_rollout(like, num_steps, num_envs)
    rollout["first"] = torch.cat((torch.arange(num_envs)[None] == 2, ~rollout["valid"][:-1]))
    rollout["memory"] = torch.randn(num_envs, policy.memory_size, generator=torch.Generator().manual_seed(11))
    if final_obs:
        rollout["final_obs"] = torch.randn(rollout["obs"].shape, generator=torch.Generator().manual_seed(3))
    return rollout


# --- the network


@FORMS
def test_initial_weights(kind, users, layers):
    """Each user's matrices orthogonal, biases zero; flattening is the inverse of taking apart."""
    policy = remembering(DISCRETE, kind, users, layers)
    params = policy.init(torch.Generator().manual_seed(0))
    weights = policy.weights(params)
    assert torch.equal(policy.flatten(weights), params)
    matrices = [name for name in policy.rnn.shapes if name.endswith(".weight")]
    assert len(matrices) == 2 * layers
    for name in policy.rnn.shapes:
        for weight in weights[name]:
            if name in matrices:
                small = weight @ weight.mT if weight.shape[0] < weight.shape[1] else weight.mT @ weight
                torch.testing.assert_close(small, torch.eye(len(small)), rtol=0, atol=1e-5)
            else:
                assert not weight.any()
    with pytest.raises(ValueError, match=r"rnn\.0\.hidden\.weight is"):
        policy.flatten(weights | {"rnn.0.hidden.weight": torch.zeros(1)})


@FORMS
@HEADS
def test_replaying_is_stepping(like, kind, users, layers):
    """Distribution, value and memory of each step, over the beginnings of episodes; of the actor's memory alone too."""
    policy = remembering(like, kind, users, layers)
    weights, rollout = policy.weights(make_params(policy)), sequences(like, policy)
    given = (weights, rollout["obs"], rollout["first"], rollout["memory"], STEPS)
    assert rollout["first"][1:].any()
    expected = Stepping(policy.encoder, policy.rnn, policy.mlp).replay(*given)
    torch.testing.assert_close(policy.replay(*given), expected)
    dist, memory = policy.step(weights, rollout["obs"][0], rollout["memory"][:, : policy.actor_size].contiguous())
    whole_dist, whole = policy.step(weights, rollout["obs"][0], rollout["memory"])
    torch.testing.assert_close((dist, memory), (whole_dist, whole[:, : policy.actor_size]))


# --- collecting


def started(vector, num_steps, policy):
    """A collector as the loop starts it, its rollout, its memory, and noise for it."""
    envs, action = AutoresetEnvs(vector), action_spec(vector.single_action_space, False)
    space = obs_spec(vector.single_observation_space)
    rollout = allocate_rollout(num_steps, vector.num_envs, space, action, envs.keeps_final_obs, CPU, remembers=True)
    memory = Memory(torch.zeros(vector.num_envs, policy.memory_size))
    noise = torch.rand(num_steps, *action.noise_shape(vector.num_envs), generator=torch.Generator().manual_seed(5))
    return start_collector(envs, rollout, space, action, 3, memory), rollout, memory, noise


HOSTS = {
    "host": lambda mode: SyncVectorEnv([Walk] * 4, autoreset_mode=mode),
    "tensors": lambda mode: TensorTwin(4, mode.value),
}


@pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("engine", list(HOSTS))
def test_what_is_acted_with_is_what_is_replayed(engine, mode):
    """Step for step over many ends and ten rollouts; and each episode as it is when it is played by itself, from nothing."""
    policy = remembering(MLPActorCritic(3, 3, DISCRETE.distribution, (8,)))
    weights = policy.weights(make_params(policy))
    acted = []

    def act(obs, noise, memory, first):
        action, memory = act_and_remember(policy, weights, OFF, obs, noise, memory, first)
        acted.append(memory)
        return action, memory

    collector, rollout, memory, noise = started(HOSTS[engine](mode), 7, policy)
    assert isinstance(collector, {"host": HostCollector, "tensors": TensorCollector}[engine])
    rollouts, starts = [], []
    with torch.no_grad():
        for _ in range(10):
            del acted[:]
            collector.collect(act, noise)
            _, _, replayed = policy.replay(weights, rollout["obs"][:-1], rollout["first"][:-1], memory.start, STEPS)
            torch.testing.assert_close(replayed, torch.stack(acted))
            assert torch.equal(memory.now, acted[-1])
            rollouts.append({key: value.clone() for key, value in rollout.items()} | {"acted": torch.stack(acted)})
            starts.append(memory.start.clone())
        assert not torch.equal(starts[1], torch.zeros_like(starts[1]))  # episodes go on from rollout to rollout

        alone, ends = None, 0
        for env in range(4):
            over, skip = True, False
            for rows in rollouts:
                for t in range(7):
                    if over:  # the environment's own words, not the collector's: an end, or the row after it
                        alone = torch.zeros(1, policy.memory_size)
                    done = bool(rows["terminated"][t, env] | rows["truncated"][t, env])
                    _, alone = policy.step(weights, rows["obs"][t, env][None], alone)
                    torch.testing.assert_close(rows["acted"][t, env], alone[0])
                    over, skip = (done, False) if mode is not AutoresetMode.NEXT_STEP else (skip, done)
                    ends += done
        assert ends > 40


def test_a_reset_begins_with_nothing():
    """Where the loop resets all environments, rows behind it remember nothing of those before."""
    policy = remembering(MLPActorCritic(3, 3, DISCRETE.distribution, (8,)))
    weights = policy.weights(make_params(policy))
    act = functools.partial(act_and_remember, policy, weights, OFF)
    collector, rollout, memory, noise = started(HOSTS["host"](AutoresetMode.NEXT_STEP), 5, policy)
    with torch.no_grad():
        collector.collect(act, noise, cut=True)
        collector.reset(9)
        collector.collect(act, noise)
    assert rollout["first"][0].all()
    assert memory.start.abs().sum() > 0  # it is there, and masked


def on_device(policy_of):
    envs = TorchVectorEnv(CartPole(max_episode_steps=6), 4)
    policy = policy_of(MLPActorCritic(4, 2, DISCRETE.distribution, (8,)))
    collector, rollout, memory, noise = started(envs, 9, policy)
    assert isinstance(collector, DeviceCollector)
    program = functools.partial(
        collect, policy=policy, env_step=env_step_of(envs, action_spec(envs.single_action_space, False))
    )
    return collector, rollout, memory, noise, program, policy


def test_environments_on_the_device_are_replayed_as_acted():
    """What is left after each of six rollouts is what a replay of it leaves, and of each episode what it leaves by itself."""
    space = obs_spec(CartPole().observation_space)
    collector, rollout, memory, noise, program, policy = on_device(lambda like: remembering(like, obs=space))
    params = make_params(policy)
    weights = policy.weights(params)
    alone = [torch.zeros(1, policy.memory_size) for _ in range(4)]
    before = torch.zeros(4, dtype=torch.bool)  # whether the row before was a resetting one
    with torch.no_grad():
        for number in range(6):
            collector.collect(functools.partial(program, params, OFF), noise)
            _, _, replayed = policy.replay(weights, rollout["obs"][:-1], rollout["first"][:-1], memory.start, STEPS)
            torch.testing.assert_close(memory.now, replayed[-1])
            for t in range(9):
                for env in range(4):
                    if (number == 0 and t == 0) or before[env]:
                        alone[env] = torch.zeros(1, policy.memory_size)
                    alone[env] = policy.step(weights, rollout["obs"][t, env][None], alone[env])[1]
                torch.testing.assert_close(replayed[t], torch.cat(alone))
                before = ~rollout["valid"][t]
    assert not rollout["valid"][:-1].all()


# --- learning


@pytest.mark.parametrize("final_obs", [False, True], ids=["next step", "final_obs"])
@FORMS
@HEADS
def test_learning_is_that_of_stepping_with_autograd(like, kind, users, layers, final_obs):
    """Everything that `learn` returns, with every term of the loss: the written-out gradient, the values, the bootstraps."""
    policy = remembering(like, kind, users, layers)
    params, rollout = make_params(policy), sequences(like, policy, final_obs=final_obs)
    normalization = Normalization(
        {"obs": torch.full((3,), 0.1)}, {"obs": torch.full((3,), 1.5)}, torch.tensor(0.5), torch.zeros(()), torch.ones(())
    )
    results = [
        update(each, params, rollout, make_permutation(3, 4), normalization, minibatch_size=16)
        for each in (policy, Stepping(policy.encoder, policy.rnn, policy.mlp))
    ]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert column(results[0], "ratio_deviation")[0] < 1e-5
    assert column(results[0], "ratio_deviation")[1] > 1e-3
    torch.testing.assert_close(
        update(
            policy,
            params,
            rollout,
            make_permutation(3, 4),
            normalization,
            minibatch_size=16,
            grad_and_aux=functional_grad_and_aux,
        ),
        results[0],
        rtol=1e-4,
        atol=1e-5,
    )


@HEADS
def test_rows_that_are_no_transitions_have_no_influence(like):
    """A resetting row's action and reward may be anything; its observation is the bootstrap's, and stays."""
    policy = remembering(like)
    params, rollout = make_params(policy), sequences(like, policy)
    other = {key: value.clone() for key, value in rollout.items()}
    invalid = ~rollout["valid"]
    invalid[-1] = True
    assert invalid[:-1].any()
    other["action"][invalid] = 0 if like is DISCRETE else 7.0
    other["reward"][invalid] = 1e3
    results = [update(policy, params, rows, make_permutation(2, 4), minibatch_size=16) for rows in (rollout, other)]
    torch.testing.assert_close(results[0].params, results[1].params, rtol=0, atol=0)


def test_the_bootstrap_remembers_the_episode_that_was_cut():
    """A truncated episode's last value is that of its final observation after all of it, not of an empty memory."""
    policy = remembering(DISCRETE)
    params, weights = make_params(policy), policy.weights(make_params(policy))
    rollout = sequences(DISCRETE, policy, num_steps=4, num_envs=2)
    rollout = {key: rows[:1] if key == "memory" else rows[:, :1].clone() for key, rows in rollout.items()}
    for key in ("terminated", "truncated", "first"):
        rollout[key][:] = False
    rollout["valid"][:] = True
    rollout["reward"][:] = 0.0
    rollout["truncated"][1] = True  # rows 0 and 1; row 2 resets, and shows the final observation; row 3 begins anew
    rollout["valid"][2], rollout["first"][3] = False, True
    memory = rollout["memory"]
    with torch.no_grad():
        values = []
        for t in range(3):
            values.append(policy.judge(weights, rollout["obs"][t], memory))
            _, memory = policy.step(weights, rollout["obs"][t], memory)
    one = {"gamma": 0.5, "gae_lambda": 0.0, "norm_adv": False, "clip_vloss": False, "minibatch_size": 4}
    learned = update(policy, params, rollout, torch.zeros(1, 1, dtype=torch.int64), **one)
    begun = policy.judge(weights, rollout["obs"][3], torch.zeros_like(memory))
    _, after = policy.step(weights, rollout["obs"][3], torch.zeros_like(memory))
    last = policy.judge(weights, rollout["obs"][4], after)
    errors = [0.5 * values[1] - values[0], 0.5 * values[2] - values[1], 0.5 * last - begun]  # of the three transitions
    expected = torch.cat(errors).square().mean().item()
    assert column(learned, "value_loss")[0] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_every_mode_gives_the_same_update(seed):
    """The same 24 transitions of one environment, with resetting rows between them or final observations beside them."""
    policy = remembering(MLPActorCritic(3, 3, DISCRETE.distribution, (8,)))
    params = make_params(policy)
    weights = policy.weights(params)

    def act(obs, noise, memory, first):  # by the memory, so that an action of another episode would be another one
        _, memory = policy.step(weights, obs, torch.where(first[:, None], 0.0, memory))
        return (memory.sum(-1) * 1000).long() % 3, memory

    def collected(mode, steps):
        collector, rollout, memory, noise = started(SyncVectorEnv([Walk], autoreset_mode=mode), steps, policy)
        with torch.no_grad():
            collector.reset(seed)
            collector.collect(act, noise)
        return {key: value.clone() for key, value in rollout.items()} | {"memory": memory.start}

    rollouts = [collected(mode, 24) for mode in (AutoresetMode.SAME_STEP, AutoresetMode.DISABLED)]
    resets = int((rollouts[0]["terminated"] | rollouts[0]["truncated"])[:23].sum())
    assert resets > 2
    rollouts.append(collected(AutoresetMode.NEXT_STEP, 24 + resets))
    learned = []
    for rollout in rollouts:
        assert int(rollout["valid"][:-1].sum()) == 24
        permutation = torch.zeros(3, 1, dtype=torch.int64)
        learned.append(update(policy, params, rollout, permutation, minibatch_size=len(rollout["reward"]) - 1))
    for other in learned[1:]:
        torch.testing.assert_close(other.params, learned[0].params, rtol=1e-4, atol=1e-5)
    assert (learned[0].params - params).abs().max() > 1e-3


def test_every_environment_is_gathered_exactly_once_an_epoch():
    """Whole sequences, in the order of time, with their own memory: all four numbers of an environment are together."""
    seen = []

    class Noting(RecurrentActorCritic):
        def replay(self, weights, obs, first, memory, cells):
            if first.shape[0] == 6:  # not the pass over all T + 1 rows
                assert torch.equal(obs[:, :, 1], torch.arange(6.0)[:, None].expand(6, first.shape[1]))
                assert torch.equal(memory[:, 0], obs[0, :, 0])
                seen.append(obs[0, :, 0].tolist())
            return super().replay(weights, obs, first, memory, cells)

    policy = remembering(DISCRETE)
    policy = Noting(policy.encoder, policy.rnn, policy.mlp)
    rollout = sequences(DISCRETE, policy, num_steps=6, num_envs=4)
    rollout["obs"][..., 0] = torch.arange(4.0)
    rollout["obs"][..., 1] = torch.arange(7.0)[:, None]
    rollout["memory"][:, 0] = torch.arange(4.0)
    update(policy, make_params(policy), rollout, make_permutation(3, 4), minibatch_size=12)
    assert len(seen) == 6
    assert [sorted(seen[2 * epoch] + seen[2 * epoch + 1]) for epoch in range(3)] == [[0.0, 1.0, 2.0, 3.0]] * 3


@pytest.mark.parametrize("rows_per_pass", [8, 16, 3])
def test_parts_of_a_minibatch_add_up_to_it(rows_per_pass):
    """Of one environment each where two do not fit, and of one where not even that does."""
    policy = remembering(DISCRETE)
    params, rollout = make_params(policy), sequences(DISCRETE, policy)
    options = {"minibatch_size": 32, "rows_per_pass": rows_per_pass}
    parts = update(policy, params, rollout, make_permutation(2, 4), **options)
    whole = update(policy, params, rollout, make_permutation(2, 4), minibatch_size=32)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("final_obs", [False, True], ids=["next step", "final_obs"])
def test_workers_together_make_the_update_of_one(final_obs):
    """Each replays its own environments, from what is remembered of those."""
    policy = remembering(DISCRETE)
    params, rollout = make_params(policy), sequences(DISCRETE, policy, final_obs=final_obs)
    expected = update(policy, params, rollout, make_permutation(3, 4), minibatch_size=16)
    barrier, places = threading.Barrier(2, timeout=60), [None] * 2

    def all_reduce(x, worker, over_ranks):
        places[worker[0].item()] = x
        barrier.wait()
        total = places[0] + places[1]
        barrier.wait()
        return total

    def work(number):
        shared = {"worker": torch.tensor([number, 0]), "num_workers": 2, "all_reduce": all_reduce}
        return update(policy, params, rollout, make_permutation(3, 4), minibatch_size=16, **shared)

    with ThreadPoolExecutor(2) as pool:
        assert_together(list(pool.map(work, range(2))), expected, rtol=1e-5, atol=1e-5)


@FORMS
def test_programs_with_memory_never_ask_the_host(kind, users, layers):
    """Neither for a value (no sync in eager mode) nor for data: they run whole on the meta device."""
    policy = remembering(DISCRETE, kind, users, layers)
    params, rollout = make_params(policy), sequences(DISCRETE, policy, final_obs=True)
    acting = (OFF, rollout["obs"][0], torch.zeros(4, 4), rollout["memory"], rollout["first"][0])
    with HostSyncs() as syncs:
        update(policy, params, rollout, make_permutation(2, 4), minibatch_size=16, target_kl=0.01)
        act_and_remember_from_params(params, *acting, policy=policy)
    assert syncs.found == []
    params, rollout, permutation, acting, off = to_meta((params, rollout, make_permutation(2, 4), acting, OFF))
    learned = update(policy, params, rollout, permutation, off, minibatch_size=16, target_kl=0.01)
    action, memory = act_and_remember_from_params(params, *acting, policy=policy)
    assert all(x.is_meta for x in (learned.params, learned.minibatch_metrics, action, memory))


# --- compiled


def job(like, policy, num_steps=7, num_envs=6, minibatch=3, **settings):
    """`learn` as it is compiled, and its arguments: minibatches of 3 environments, of 5 numbers each."""
    params, rollout = make_params(policy), sequences(like, policy, num_steps, num_envs)
    schedule = Schedule(torch.tensor(1e-2), torch.tensor(0.2), torch.tensor(0.01))
    arguments = (params, init_adam(params), rollout, make_permutation(2, num_envs), schedule, OFF)
    options = SETTINGS | {"minibatch_size": minibatch * num_steps} | settings
    return functools.partial(learn, policy=policy, **options), arguments


@pytest.fixture
def cache_dir(tmp_path):
    torch.set_num_threads(1)
    tmp_path.chmod(0o700)
    return tmp_path


SLOW = pytest.mark.slow
COMPILED = [
    pytest.param({}, {}, id="lstm"),
    pytest.param({"kind": "gru", "layers": 2}, {}, id="gru", marks=SLOW),
    pytest.param({"users": 1, "width": 16}, {"num_envs": 14, "minibatch": 7}, id="shared", marks=SLOW),
    pytest.param({"kind": "gru", "users": 1, "width": 33}, {"num_envs": 4, "minibatch": 1}, id="one", marks=SLOW),
    pytest.param({"layers": 2}, {"num_envs": 8, "minibatch": 4, "num_workers": 2}, id="workers", marks=SLOW),
    pytest.param({}, {"num_envs": 8, "minibatch": 4, "rows_per_pass": 14}, id="parts", marks=SLOW),
]


@pytest.mark.parametrize(("form", "settings"), COMPILED)
def test_compiled_learn_equals_eager(form, settings, cache_dir):
    """native.cpp's loops against Python's: sizes that fill no vector, numbers of rows that fill no block."""
    policy = remembering(DISCRETE, **form)
    program, arguments = job(DISCRETE, policy, **settings)
    compiled = compile_program(program, arguments, cache_dir)
    eager = functools.partial(program, num_workers=1)
    assert_same(compiled(*arguments), eager(*arguments))


def test_compiled_act_equals_eager(cache_dir):
    """Ten steps, each from what the one before remembered; bound as the loop binds it."""
    policy = remembering(DISCRETE, "gru")
    params, rollout = make_params(policy), sequences(DISCRETE, policy, 9)
    program = functools.partial(act_and_remember_from_params, policy=policy)
    noise = torch.zeros(4, 4)
    example = (params, OFF, rollout["obs"][0], noise, rollout["memory"], rollout["first"][0])
    act = compile_program(program, example, cache_dir).bind(example[:2], example[2:])
    ours = theirs = rollout["memory"]
    for t in range(10):
        action, ours = act(rollout["obs"][t], noise, ours, rollout["first"][t])
        expected, theirs = program(params, OFF, rollout["obs"][t], noise, theirs, rollout["first"][t])
        assert torch.equal(action, expected)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_compiled_collect_equals_eager(workers, cache_dir):
    """Environments on the device: the same rollout, and the same is remembered after it."""
    space = obs_spec(CartPole().observation_space)
    collector, _, memory, noise, program, policy = on_device(lambda like: remembering(like, obs=space))
    running = (*pack(collector.envs.running), memory.now, torch.ones(4, dtype=torch.bool))
    arguments = (make_params(policy), OFF, running, noise, collector.envs.draw(9))
    compiled = compile_program(functools.partial(program, num_workers=workers), arguments, cache_dir)
    torch.testing.assert_close(compiled(*arguments), program(*arguments))


# --- as a user holds it


def agent_of(policy):
    params = make_params(policy)
    return Agent(Walk.observation_space, OBS, action_spec(Walk.action_space, False), policy, params, OFF)


def test_an_agent_remembers_and_forgets():
    """Between calls; `reset(mask)` forgets some, `reset()` all; `value` asks and remembers nothing."""
    policy = remembering(MLPActorCritic(3, 3, DISCRETE.distribution, (8,)))
    agent = agent_of(policy)
    obs = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0))
    memory = torch.zeros(2, policy.memory_size)
    for t in range(6):
        torch.testing.assert_close(agent.value(obs[t]), policy.judge(agent.weights, obs[t], memory))
        dist, memory = policy.step(agent.weights, obs[t], memory)
        assert torch.equal(agent.act(obs[t]), dist.argmax(-1))
        torch.testing.assert_close(agent.memory, memory)
        if t == 2:
            agent.reset([False, True])
            memory = torch.stack((memory[0], torch.zeros_like(memory[1])))
    with pytest.raises(ValueError, match="3 observations; this policy remembers 2 environments"):
        agent.act(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="done_mask of 3"):
        agent.reset([True, False, False])
    agent.reset()
    assert agent.memory is None
    agent.act(obs[0, 0].numpy())  # one by itself
    torch.testing.assert_close(agent.memory, policy.step(agent.weights, obs[0, :1], torch.zeros(1, policy.memory_size))[1])
    agent.reset(True)
    assert not agent.memory.any()
