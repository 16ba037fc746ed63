"""Compiled programs of policies that remember equal the eager ones."""

import functools

import pytest
import torch
from environments import VECTOR

from fastppo.compile.compiled_program import load_program
from fastppo.compile.inductor import compile_program
from fastppo.compile.program import flat_tensors
from fastppo.compile.trace import trace
from fastppo.core.acting import act_recurrent_from_params, collect
from fastppo.core.adam import init_adam
from fastppo.core.contracts import Normalization
from fastppo.core.ppo import learn
from fastppo.core.seed_axis import Seeds, of_seed, stack
from support.learn_settings import coefficients, learn_settings, split, with_settings
from support.programs import OFF, assert_same, make_permutation
from support.recurrent import KINDS, USERS, Bench, make_params, make_policy, setting


def learn_job(kind, spaces="discrete", seed=0, users=2, layers=1, hidden=5, num_envs=6, per_minibatch=3, epochs=2, **given):
    """(learn, arguments): 12 steps, minibatches of whole environments."""
    options = {"users": users, "layers": layers, "hidden": hidden}
    policy, _, rollout = setting(spaces, kind, num_envs=num_envs, seed=seed + 1, **options)
    params = make_params(policy, seed)
    if given.pop("final_obs", False):
        rollout |= {"final_" + key: x.flip(0) for key, x in rollout.items() if key.partition(".")[0] == "obs"}
    numbers, settings = split({"learning_rate": 1e-3, **given})
    settings = learn_settings(**({"minibatch_size": 12 * per_minibatch} | settings))
    arguments = (params, init_adam(params), rollout, make_permutation(epochs, num_envs, seed), coefficients(**numbers), OFF)
    return functools.partial(learn, policy=policy, **settings), arguments


def assert_compiled(job, programs_dir, **shared):
    """Compiled for one seed's arguments, equal to eager for those of three."""
    program, arguments = job(seed=0)
    compiled = compile_program(with_settings(program, **shared), arguments, programs_dir)
    for seed in range(3):
        _, arguments = job(seed=seed)
        assert_same(compiled(*arguments), program(*arguments))


@pytest.mark.usefixtures("inductor")
def test_compiled_learn_equals_eager(programs_dir):
    """Parameters, Adam's state and every metric, of two users of an LSTM whose sizes fill no vector of the processor.

    Advantages are recomputed: a loop of minibatches in one of epochs.

    A run of three seeds calls the same program for one at a time, on two threads: nothing is compiled again.
    """
    job = functools.partial(learn_job, "lstm", target_kl=0.5, recompute_advantage=True)
    assert_compiled(job, programs_dir)
    examples = [job(seed=seed) for seed in range(3)]
    stacked = stack([arguments for _, arguments in examples])
    learned = load_program(examples[0][0], stacked, programs_dir, Seeds(3, 1, 2))(*stacked)
    for seed, (program, arguments) in enumerate(examples):
        assert_same(of_seed(learned, seed), program(*arguments))


@pytest.mark.usefixtures("needs_compiler")
@pytest.mark.slow  # most of a minute of compiling each
@pytest.mark.parametrize(
    ("kind", "options", "shared"),
    [
        ("gru", {"num_envs": 7, "per_minibatch": 1}, {}),
        ("gru", {"users": 1, "layers": 2, "hidden": 16, "num_envs": 8, "per_minibatch": 4}, {}),
        ("gru", {"spaces": "continuous", "num_envs": 14, "per_minibatch": 14, "final_obs": True}, {"num_workers": 2}),
        ("lstm", {"users": 1, "num_envs": 7, "per_minibatch": 7, "final_obs": True}, {}),
        ("lstm", {"spaces": "continuous", "layers": 2, "hidden": 17, "num_envs": 4, "per_minibatch": 1}, {}),
        ("lstm", {"num_envs": 12, "per_minibatch": 6}, {"num_workers": 2, "microbatch_size": 12}),
        ("lstm", {"spaces": "masked", "num_envs": 4, "per_minibatch": 4}, {"microbatch_size": 24}),
        ("lstm", {"advantage_estimator": "monte-carlo", "norm_returns": True, "num_envs": 2, "per_minibatch": 2}, {}),
        # of 73,000 gradients some are as small as their rounding, which Adam divides by itself: not so with this eps
        ("gru", {"spaces": "image", "num_envs": 3, "per_minibatch": 3, "adam_eps": 1e-3}, {"microbatch_size": 24}),
    ],
    ids=lambda value: " ".join(f"{key}={x}" for key, x in value.items()) if isinstance(value, dict) else value,
)
def test_compiled_learn_equals_eager_for(kind, options, shared, programs_dir):
    """Cells side by side and in layers, 1 to 14 environments at once, workers, parts, final observations, structures."""
    assert_compiled(functools.partial(learn_job, kind, **options), programs_dir, **shared)


@KINDS
@USERS
@pytest.mark.long
def test_traced_learn_has_the_cells_of_the_library(kind, users):
    """What the compiler is given goes through the library's loops, forward and backward, and not through a step at a time."""
    program, arguments = learn_job(kind, users=users, layers=2)
    graph, _ = trace(program, arguments)
    graphs = [module.graph for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
    called = {str(node.target) for one in graphs for node in one.nodes}
    assert {f"fastppo.{kind}.default", f"fastppo.{kind}_backward.default"} <= called


@pytest.mark.long
def test_recomputed_advantages_are_traced_once():
    """With --recompute-advantage ten epochs are no more to compile than two: they are a loop of the program."""
    sizes = []
    for epochs in (2, 10):
        graph, _ = trace(*learn_job("gru", epochs=epochs, recompute_advantage=True))
        graphs = [module.graph for module in graph.modules() if isinstance(module, torch.fx.GraphModule)]
        sizes.append(sum(len(one.nodes) for one in graphs))
    assert sizes[0] == sizes[1]


def act_job(kind, number, seed=0, num_seeds=None, **options):
    """(act, arguments) of `number` environments, some of which begin an episode; of many seeds with those first."""
    policy, *_ = make_policy(kind, observation=VECTOR, **options)
    generator = torch.Generator().manual_seed(seed)
    lead = () if num_seeds is None else (num_seeds,)
    params = [make_params(policy, seed + index) for index in range(num_seeds or 1)]
    shape = (*lead, number)
    noise = torch.randn(*shape, 3, generator=generator)
    obs = torch.randn(*shape, 3, generator=generator)
    rnn_state = torch.randn(*shape, policy.rnn_state_size, generator=generator)
    episode_start = torch.rand(shape, generator=generator) < 0.3
    normalization = OFF if num_seeds is None else Normalization(None, None, None, torch.zeros(lead), torch.ones(lead))
    arguments = (torch.stack(params) if lead else params[0], normalization, obs, noise, rnn_state, episode_start)
    return functools.partial(act_recurrent_from_params, policy=policy), arguments


def assert_acts_alike(result, expected):
    torch.testing.assert_close(result[1], expected[1], rtol=1e-4, atol=1e-5)
    assert torch.equal(result[0], expected[0])


@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["traced", "compiled"])
def test_compiled_act_equals_eager(compiles, programs_dir, request):
    """Action and memory of 7 environments, step after step; what was remembered at an episode's start is dropped."""
    act, arguments = act_job("lstm", 7, hidden=5)
    if compiles:
        request.getfixturevalue("needs_compiler")
        compiled = compile_program(act, arguments, programs_dir)
    else:
        graph, _ = trace(act, arguments)
        compiled = lambda *given: graph(*flat_tensors(given))  # noqa: E731
    rnn_state = arguments[4]
    for seed in range(6):
        params, normalization, obs, noise, _, episode_start = act_job("lstm", 7, seed, hidden=5)[1]
        expected = act(params, normalization, obs, noise, rnn_state, episode_start)
        result = compiled(params, normalization, obs, noise, rnn_state, episode_start)
        assert_acts_alike(result, expected)
        rnn_state = result[1]


@pytest.mark.usefixtures("needs_compiler")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "number", "options"),
    [("gru", 1, {}), ("gru", 3, {"users": 1, "layers": 2}), ("lstm", 4, {"layers": 2}), ("lstm", 1, {"users": 1, "hidden": 5})],
)
def test_compiled_act_equals_eager_for(kind, number, options, programs_dir):
    """Shared, in layers, one environment."""
    compiled = compile_program(*act_job(kind, number, **options), programs_dir)
    for seed in range(4):
        act, arguments = act_job(kind, number, seed, **options)
        assert_acts_alike(compiled(*arguments), act(*arguments))


@pytest.mark.usefixtures("needs_compiler")
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "per_call"), [("lstm", 1), ("lstm", 2), ("gru", 3)])
def test_compiled_act_of_seeds_equals_each_alone(kind, per_call, programs_dir):
    """Mapped over all seeds, two at a time and one by one."""
    act, arguments = act_job(kind, 3, num_seeds=3)
    compiled = compile_program(act, arguments, programs_dir, Seeds(3, per_call, 1))
    action, rnn_state = compiled(*arguments)
    for seed in range(3):
        assert_acts_alike((action[seed], rnn_state[seed]), act(*of_seed(arguments, seed)))


def collect_job(kind, num_seeds=None, num_envs=4, **options):
    """(collect, arguments) of walks under way."""
    each = []
    for seed in range(num_seeds or 1):
        bench = Bench("device", kind=kind, num_envs=num_envs, seed=seed, **options)
        bench.collect()
        draws = torch.Generator().manual_seed(seed)
        noise, random = torch.randn(7, num_envs, 3, generator=draws), torch.rand(7, num_envs, 3, generator=draws)
        each.append((make_params(bench.policy.policy, seed), OFF, bench.running(), noise, random))
    settings = {"policy": bench.policy.policy, "env_step": bench.collector.env_step}
    return functools.partial(collect, **settings), each[0] if num_seeds is None else stack(each)


def assert_collected_alike(result, expected):
    for key in ("action", "terminated", "truncated", "valid", "finite"):
        assert torch.equal(getattr(result, key), getattr(expected, key)), key
    for key in ("obs", "reward", "running"):
        torch.testing.assert_close(getattr(result, key), getattr(expected, key), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("needs_compiler")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "workers"), [("lstm", {}, 2), ("gru", {"users": 1, "layers": 2}, 1)], ids=["lstm", "gru"]
)
def test_compiled_collect_equals_eager(kind, options, workers, programs_dir):
    """Every row, and what is carried on: the environments, what is remembered of them, and which begin an episode."""
    program, arguments = collect_job(kind, num_envs=6, **options)
    compiled = compile_program(with_settings(program, num_workers=workers), arguments, programs_dir)
    ended = 0
    for _ in range(4):
        expected = program(*arguments)
        assert_collected_alike(compiled(*arguments), expected)
        ended += int((expected.terminated | expected.truncated).sum())
        arguments = (*arguments[:2], expected.running, *arguments[3:])
    assert ended > 12


@pytest.mark.usefixtures("needs_compiler")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "seeds"), [("gru", Seeds(3, 1, 2)), ("lstm", Seeds(3, 2, 1)), ("gru", Seeds(3, 3, 1))], ids=str
)
def test_compiled_collect_of_seeds_equals_each_alone(kind, seeds, programs_dir):
    """One by one on two threads, two at a time, and all at once."""
    program, arguments = collect_job(kind, 3)
    collected = compile_program(program, arguments, programs_dir, seeds)(*arguments)
    for seed in range(3):
        assert_collected_alike(of_seed(collected, seed), program(*of_seed(arguments, seed)))


@pytest.mark.usefixtures("needs_compiler")
@pytest.mark.slow
@pytest.mark.parametrize("seeds", [Seeds(3, 1, 2), Seeds(3, 2, 1)], ids=str)
def test_compiled_learn_of_seeds_equals_each_alone(seeds, programs_dir):
    """Seed by seed on two threads, as runs of many seeds do it, and mapped."""
    examples = [learn_job("lstm", seed=seed) for seed in range(3)]
    stacked = stack([arguments for _, arguments in examples])
    learned = compile_program(examples[0][0], stacked, programs_dir, seeds)(*stacked)
    for seed, (program, arguments) in enumerate(examples):
        assert_same(of_seed(learned, seed), program(*arguments))
