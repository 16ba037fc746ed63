"""Every consumer of random numbers has a stream of its own: what the shipped code seeds is recorded, and no two are equal."""

import contextlib
import itertools
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch

from fastppo import load_policy, train
from fastppo.analysis.evaluation import EvaluationPlan, play_episodes
from fastppo.analysis.rendered_episodes import record_episodes
from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.envs.cartpole import SeededCartPole
from fastppo.envs.classic import CartPole
from fastppo.envs.device import TorchVectorEnv
from fastppo.envs.factory import EnvConfig, make_gymnasium_envs
from fastppo.random_streams import Stream, environment_seed, seed_of
from fastppo.training.setup import prepare
from support.device_envs import ON_TENSORS
from support.processes import PretendedRanks
from support.runs import tiny

HOST = {"env_id": "Acrobot-v1", "vectorization": "sync", "check_env": False}
DEVICE = {"env_id": "CartPole-v1", "backend": "torch", "check_env": False}


class OneGenerator(gym.vector.VectorEnv):
    """Draws for all of its environments from one generator."""

    metadata: ClassVar = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
    single_observation_space, single_action_space = gym.spaces.Box(-1.0, 1.0, (2,)), gym.spaces.Discrete(2)

    def __init__(self, num_envs):
        self.num_envs = num_envs

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.random((self.num_envs, 2), np.float32), {}


gym.register("OneGenerator-v0", vector_entry_point=OneGenerator)


@pytest.fixture
def seeded(monkeypatch):
    """Seeds in the order in which generators get them: `torch` for torch.Generator, `numpy` for environments of gymnasium."""
    found = SimpleNamespace(torch=[], numpy=[])
    np_random = gym.utils.seeding.np_random

    class Recorded(torch.Generator):
        def manual_seed(self, seed):
            found.torch.append(seed)
            return super().manual_seed(seed)

    def recorded(seed=None):
        if seed is not None:
            found.numpy.append(seed)
        return np_random(seed)

    monkeypatch.setattr(torch, "Generator", Recorded)
    monkeypatch.setattr(gym.utils.seeding, "np_random", recorded)
    return found


def assert_no_two_equal(seeds):
    twice = {seed: times for seed, times in Counter(seeds).items() if times > 1}
    assert not twice


def test_runs_of_neighbouring_seeds(tmp_path, seeded):
    """Seeds 1, 2, 3 and 4, the last two in one process, with an evaluation each and restarts at every checkpoint.

    A run has generators of parameters, actions, minibatches and of actions in evaluation; eight environments each time they are
    restarted, and those of the evaluation.
    """
    settings = {**HOST, "num_envs": 8, "eval_episodes": 4, "num_iterations": 3}
    exact = {"exact_resume": True, "checkpoint_iterations": 1}
    train(tiny(tmp_path / "1", seed=1, **settings, **exact))
    train(tiny(tmp_path / "2", seed=2, **settings, **exact))
    train(tiny(tmp_path / "3", seed=3, num_seeds=2, **settings))
    assert_no_two_equal(seeded.torch + seeded.numpy)
    assert len(seeded.torch) == 4 * 4
    assert len(seeded.numpy) == 2 * (3 * 8 + 4) + 2 * (8 + 4)
    draws = [torch.rand(4, generator=torch.Generator().manual_seed(seed)) for seed in list(seeded.torch)]
    assert all((one != other).all() for one, other in itertools.combinations(draws, 2))


def test_weights_and_environments_on_the_device(tmp_path, seeded):
    """Their first states, their steps and the evaluation's come from other numbers than the weights and the actions."""
    for seed in (0, 1):
        train(tiny(tmp_path / str(seed), seed=seed, **DEVICE, eval_episodes=2))
    train(tiny(tmp_path / "2", seed=2, num_seeds=2, **DEVICE, eval_episodes=2))
    assert_no_two_equal(seeded.torch)
    assert len(seeded.torch) == 4 * (4 + 2)


def test_evaluation_on_the_device(tmp_path, seeded):
    """Sampled actions and first states, of neighbouring --seed; and videos show episodes that are not the evaluation's."""
    policy = train(tiny(tmp_path / "run", **DEVICE)).policy
    seeded.torch.clear()
    policy.generator = torch.Generator()
    for seed in range(3):
        play_episodes(policy, AutoresetEnvs(TorchVectorEnv(CartPole(), 2)), 2, seed, deterministic=False)
    drawn = AutoresetEnvs(TorchVectorEnv(CartPole(), 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "fastppo.analysis.rendered_episodes.record",
            lambda agent, envs, path, seed, *_: (envs.reset_and_mask(seed), (0.0, 0))[1],
        )
        patch.setattr("fastppo.analysis.rendered_episodes._rendered_envs", lambda config: contextlib.nullcontext(drawn))
        record_episodes(policy, tiny(tmp_path), tmp_path / "video", ".gif", EvaluationPlan(2, 0, deterministic=False))
    assert_no_two_equal(seeded.torch)
    assert len(seeded.torch) == 3 * 2 + 2


def test_a_run_that_goes_on_on_another_device(tmp_path, seeded):
    """Its generators start anew, from numbers that no generator of the run has had."""
    config = tiny(tmp_path / "run", **DEVICE)
    train(config)
    path = tmp_path / "run" / "checkpoints" / "last.pt"
    kept = torch.load(path, weights_only=True)
    kept["made_with"]["device"] = "cuda:0"
    torch.save(kept, path)
    before = set(seeded.torch)
    train(replace(config, resume=config.run_dir, num_iterations=6))
    new = [seed for seed in seeded.torch if seed not in before]
    assert_no_two_equal(new)
    assert len(new) == 3  # of actions, minibatches and environments


def test_recorded_episodes(tmp_path, seeded):
    """--record-every plays from the same start each time, which is neither training's nor the evaluation's."""
    pytest.importorskip("pygame")
    settings = {"env_id": "CartPole-v1", "vectorization": "sync", "check_env": False, "eval_episodes": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "fastppo.analysis.rendered_episodes.record",
            lambda agent, envs, path, seed, *_: (envs.reset_and_mask(seed), (0.0, 0))[1],
        )
        train(tiny(tmp_path / "run", seed=5, record_every=2, **settings))
    (video, times), *others = Counter(seeded.numpy).most_common()
    assert (video, times) == (environment_seed(5, Stream.RECORDED_ENVIRONMENT), 2)
    assert {times for _, times in others} == {1}


def seeds_of_ranks(settings, size, seeded, iteration=0):
    """What the environments of each of `size` processes are seeded with, and their first observations."""
    found, first = [], []
    for rank in range(size):
        with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as cleanup:
            patch.setattr("fastppo.training.setup.start_ranks", lambda *_, rank=rank: PretendedRanks(rank, size, rank, "cpu"))
            task = prepare(tiny("unused", num_envs=8, minibatch_shards=4, **settings), None, None, cleanup)
            seeded.torch.clear()
            seeded.numpy.clear()
            task.states[0].iteration = iteration
            first.append(np.asarray(task.envs.reset(task.environment_seeds())))
        found.append(list(seeded.torch if isinstance(task.made.unwrapped, TorchVectorEnv) else seeded.numpy))
    return found, np.concatenate(first)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {"env_id": "CartPole-v1", "vectorization": "entry-point", "check_env": False},
        HOST,
        {**HOST, "vectorization": "grouped", "num_threads": 1},
        DEVICE,
        {"env_id": ON_TENSORS, "backend": "gymnasium", "check_env": False},
    ],
    ids=["entry-point", "sync", "grouped", "device", "device, stepped from Python"],
)
def test_environments_of_ranks_are_those_of_one_process(settings, size, seeded):
    """All ranks' first observations are one process's, at the start and at a restart, and no two environments are alike."""
    for iteration in (0, 7):
        _, expected = seeds_of_ranks(settings, 1, seeded, iteration)
        _, got = seeds_of_ranks(settings, size, seeded, iteration)
        np.testing.assert_array_equal(got, expected)
        assert len(np.unique(got, axis=0)) == 8


def test_a_vector_class_that_has_one_generator(seeded):
    """Each rank's has a seed of its own, so that no two of them play the same episodes."""
    found, first = seeds_of_ranks({"env_id": "OneGenerator-v0", "check_env": False}, 4, seeded)
    assert len(set(itertools.chain(*found))) == 4
    assert len(np.unique(first, axis=0)) == 8


@pytest.mark.parametrize("engine", ["envpool", "ale"])
@pytest.mark.long
def test_engines_in_c_are_seeded_environment_by_environment(engine, seeded):
    """EnvPool and ALE: four processes start the games of one."""
    pytest.importorskip("envpool" if engine == "envpool" else "ale_py")
    settings = {
        "envpool": {"env_id": "CartPole-v1", "backend": "envpool"},
        "ale": {"env_id": "ALE/Breakout-v5", "num_minibatches": 1},
    }[engine]
    _, expected = seeds_of_ranks({**settings, "check_env": False}, 1, seeded)
    _, got = seeds_of_ranks({**settings, "check_env": False}, 4, seeded)
    np.testing.assert_array_equal(got, expected)


def test_cartpole_starts_episodes_as_gymnasium_does():
    """Its own vector class, over many episodes and a reset without a seed: gymnasium's separate environments, to the bit.

    So do two halves of it, which are two processes'.
    """
    whole = make_gymnasium_envs(EnvConfig("CartPole-v1", 6, "entry-point"))
    halves = [make_gymnasium_envs(EnvConfig("CartPole-v1", 3, "entry-point")) for _ in range(2)]
    separate = gym.make_vec("CartPole-v1", num_envs=6, vectorization_mode="sync")
    assert isinstance(whole, SeededCartPole)
    actions = np.random.default_rng(0).integers(2, size=(600, 6))  # some 27 episodes each: more than are drawn ahead
    for seed in (7, None):
        expected = separate.reset(seed=seed)[0]
        starts = (seed, None if seed is None else seed + 3)
        np.testing.assert_array_equal(whole.reset(seed=seed)[0], expected)
        np.testing.assert_array_equal(
            np.concatenate([half.reset(seed=start)[0] for half, start in zip(halves, starts, strict=True)]), expected
        )
        for action in actions:
            theirs = separate.step(action)[:4]
            parts = zip(*[half.step(part)[:4] for half, part in zip(halves, np.split(action, 2), strict=True)], strict=True)
            for ours, part, expected in zip(whole.step(action)[:4], parts, theirs, strict=True):
                np.testing.assert_array_equal(ours, expected)
                np.testing.assert_array_equal(np.concatenate(part), expected)


def test_no_two_seeds_are_equal():
    """Every stream of many runs, with and without indices; and none is what the run's seed alone, or filled up, would give."""
    indices = [(), (0,), (1,), (0, 0), (50,)]
    seeds = [seed_of(seed, stream, *index) for seed in (*range(100), 2**31, 2**40) for stream in Stream for index in indices]
    assert_no_two_equal(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    for seed in range(100):
        for entropy in (seed, [seed, 3]):
            assert int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]) not in seeds


def test_environments_of_runs_do_not_overlap():
    """gymnasium seeds environment i with seed + i: there is room for that between runs, restarts and evaluations."""
    starts = [environment_seed(seed, Stream.ENVIRONMENTS, iteration) for seed in range(20) for iteration in (0, 50, 100)]
    starts += [environment_seed(seed, Stream.EVALUATION_ENVIRONMENTS) for seed in range(20)]
    assert min(later - earlier for earlier, later in itertools.pairwise(sorted(starts))) >= 8
    assert all(start >= 0 and start + 2**20 <= 2**31 for start in starts)


def test_policies_that_were_not_seeded_sample_differently(tmp_path):
    """Two policies of one run are two players; `seed` makes them alike."""
    run_dir = train(tiny(tmp_path / "run", env_id="CartPole-v1")).run_dir
    one, other = load_policy(run_dir), load_policy(run_dir)
    obs = np.zeros((64, 4), np.float32)
    assert (one.act(obs, deterministic=False) != other.act(obs, deterministic=False)).any()
    one.seed(3)
    other.seed(3)
    assert (one.act(obs, deterministic=False) == other.act(obs, deterministic=False)).all()
