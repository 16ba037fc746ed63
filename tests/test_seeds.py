"""Many seeds in one process: each is what it would be alone, and none knows of another."""

import json
import signal
import time

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from fastppo import Callback, TrainConfig, TrainingFault, UsageError, load_policy, train
from fastppo.analysis.run_groups import find_runs
from fastppo.compile.inductor import compile_program
from fastppo.compile.program import flat_tensors
from fastppo.compile.trace import trace
from fastppo.core.seed_axis import Seeds, of_seed, one_by_one, over_seeds, stack
from fastppo.envs.classic import CartPole
from fastppo.envs.factory import EnvConfig, make_envs, make_gymnasium_envs
from fastppo.envs.multi_seed_envs import JoinedVectorEnv, SeedsVectorEnv, many
from fastppo.policy.distributions import CATEGORICAL
from fastppo.policy.mlp import MLPActorCritic
from fastppo.reference import SEEDS_SUMMARY, SUMMARY
from fastppo.run.checkpoint_file import load_checkpoint
from fastppo.run.directory import RunDirectory
from support import device_envs
from support.processes import Started
from support.programs import job
from support.runs import drawn, tiny
from support.seeds import SHORT, assert_alike, params_of, rows_of


@pytest.mark.parametrize(
    "settings",
    [
        {"backend": "torch"},
        {"backend": "torch", "env_id": "Pendulum-v1", "norm_obs": True, "norm_reward": True, "target_kl": 0.003},
        {"backend": "torch", "env_id": "Pendulum-v1", "norm_obs": True, "rnd_coef": 0.5},
        {"vectorization": "entry-point"},
        {"vectorization": "sync", "anneal_lr": True, "norm_obs": True, "compile": "on"},
        {"vectorization": "grouped", "num_threads": 2},
        {"env_id": "Pendulum-v1", "advantage": "monte-carlo", "norm_returns": True, "reset_each_rollout": True},
        {"env_id": "Pendulum-v1", "norm_reward": True, "target_kl": 0.003, "compile": "on"},
        {"env_id": "environments:WalkVector-v0", "env_kwargs": {"mode": "SameStep"}},
        {"env_id": "environments:WalkVector-v0", "env_kwargs": {"mode": "Disabled"}},
        {"env_id": "environments:MaskedIdentity-v0", "compile": "on"},
        {"env_id": "support.parallel_envs", "vectorization": "sync"},
    ],
    ids=lambda settings: "-".join(map(str, settings.values()))[:60],
)
def test_each_seed_is_as_it_would_be_alone(tmp_path, settings):
    """Three seeds together and each alone: environments, noise, minibatches, statistics and KL stop are the seed's own.

    Eager, and with "on" fused.
    """
    settings = {**SHORT, **settings}
    together = train(tiny(tmp_path / "all", num_seeds=3, seed=5, **settings))
    assert together.summary["tier"] == ("fused" if settings.get("compile") == "on" else "eager")
    for seed in (5, 6, 7):
        train(tiny(tmp_path / str(seed), seed=seed, **settings))
        assert_alike(tmp_path / "all" / f"seed-{seed}", tmp_path / str(seed))
    first, second = (params_of(tmp_path / "all" / f"seed-{seed}") for seed in (5, 6))
    assert not torch.allclose(first, second, atol=1e-3)


def test_a_network_of_ones_own(tmp_path):
    """Networks that are not mapped, somebody's own among them, are called seed by seed: the same bits as alone."""

    class Shared(nn.Module):
        def __init__(self, inputs, num_outputs):
            super().__init__()
            self.body = nn.Linear(*inputs, 8)
            self.actor, self.critic = nn.Linear(8, num_outputs), nn.Linear(8, 1)

        def forward(self, obs):
            x = torch.tanh(self.body(obs))
            return self.actor(x), self.critic(x)

    settings = {**SHORT, "num_threads": 1}
    train(tiny(tmp_path / "all", num_seeds=2, **settings), policy=Shared)
    train(tiny(tmp_path / "2", seed=2, **settings), policy=Shared)
    assert torch.equal(params_of(tmp_path / "all" / "seed-2"), params_of(tmp_path / "2"))


def test_a_module_whose_frozen_weights_differ_by_seed_is_refused(tmp_path):
    """One module computes for all seeds: a random projection of each seed's own would be the first's."""

    class Projected(nn.Module):
        def __init__(self, inputs, num_outputs):
            super().__init__()
            self.register_buffer("projection", torch.randn(*inputs, 8))
            self.head = nn.Linear(8, num_outputs + 1)

        def forward(self, obs):
            out = self.head(obs @ self.projection)
            return out[:, :-1], out[:, -1]

    with pytest.raises(UsageError, match="differ by seed"):
        train(tiny(tmp_path / "run", num_seeds=2, **SHORT), policy=Projected)
    assert not (tmp_path / "run").exists()


# --- environments


@pytest.mark.parametrize(
    ("env_id", "mode", "kind"),
    [
        ("CartPole-v1", "sync", SeedsVectorEnv),
        ("environments:WalkVector-v0", "vector_entry_point", JoinedVectorEnv),
    ],
)
def test_environments_of_a_seed_are_those_of_its_own_vector_environment(env_id, mode, kind):
    """Three times four in one, over many episode ends and a reset in between: each four as gymnasium has them, to the bit."""
    envs = many(lambda num_envs: make_gymnasium_envs(EnvConfig(env_id, num_envs, "entry-point")), 4, 3)
    assert isinstance(envs, kind)
    alone = [gym.make_vec(env_id, num_envs=4, vectorization_mode=mode) for _ in range(3)]
    actions = np.random.default_rng(0).integers(2, size=(300, 12))
    for seeds in ([7, 100, 3], None):
        obs, _ = envs.reset(seed=seeds)
        expected = [
            one.reset(seed=None if seeds is None else seed)[0] for one, seed in zip(alone, seeds or [None] * 3, strict=True)
        ]
        np.testing.assert_array_equal(obs, np.concatenate(expected))
        for action in actions:
            results = [one.step(part) for one, part in zip(alone, np.split(action, 3), strict=True)]
            for got, *parts in zip(envs.step(action)[:4], *(result[:4] for result in results), strict=True):
                np.testing.assert_array_equal(got, np.concatenate(parts))
    envs.close()


def test_processes_are_seeded_one_by_one():
    """In processes there is one pool for all seeds, and the s-th seed's i-th environment has seed + i, as gymnasium does it."""
    envs = many(lambda num_envs: make_gymnasium_envs(EnvConfig("Acrobot-v1", num_envs, "grouped", num_threads=2)), 3, 2)
    assert isinstance(envs, SeedsVectorEnv)
    obs, _ = envs.reset(seed=[5, 50])
    expected = [gym.make("Acrobot-v1").reset(seed=seed)[0] for seed in (5, 6, 7, 50, 51, 52)]
    np.testing.assert_array_equal(obs, np.stack(expected))
    envs.close()


@pytest.mark.parametrize("backend", ["envpool", "ale"])
@pytest.mark.long
def test_engines_in_c_are_seeded_one_by_one(backend):
    """EnvPool's and ALE's own environments of two seeds start as they would in two runs."""
    pytest.importorskip("envpool" if backend == "envpool" else "ale_py")
    env_id = "CartPole-v1" if backend == "envpool" else "ALE/Pong-v5"

    def make(num_envs):
        return make_envs(EnvConfig(env_id, num_envs, backend="envpool" if backend == "envpool" else "auto", num_threads=1))

    envs = many(make, 2, 2)
    assert isinstance(envs, SeedsVectorEnv)
    got = [envs.reset(seed=[3, 40])[0]]
    alone = [make(2), make(2)]
    expected = [np.concatenate([one.reset(seed=seed)[0] for one, seed in zip(alone, (3, 40), strict=True)])]
    for _ in range(20):
        action = np.ones(4, np.int64)
        got.append(envs.step(action)[0])
        expected.append(np.concatenate([one.step(action[:2])[0] for one in alone]))
    np.testing.assert_array_equal(np.stack(got), np.stack(expected))
    for one in (envs, *alone):
        one.close()


# --- programs


def learn_jobs():
    """(learn, the arguments of three seeds)."""
    policy = MLPActorCritic(3, 2, CATEGORICAL, (8,))
    return job(policy)[0], [job(policy, seed=seed)[1] for seed in range(3)]


def collect_jobs():
    """(collect, the arguments of three seeds)."""
    each = [device_envs.setup(CartPole(max_episode_steps=5), norm_obs=True, seed=seed) for seed in range(3)]
    return each[0].program(), [one.arguments(seed) for seed, one in enumerate(each)]


def assert_same(got, expected):
    for one, other in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("jobs", [learn_jobs, collect_jobs])
@pytest.mark.long
def test_a_program_traced_over_seeds_is_each_alone(jobs):
    """What the compiler is given where several seeds go into one call, run by PyTorch: loops carry all seeds along."""
    program, examples = jobs()
    stacked = stack(examples)
    graph, _ = trace(program, stacked, mapped=True)
    results, expected = graph(*flat_tensors(stacked)), [program(*example) for example in examples]
    for seed, alone in enumerate(expected):
        assert_same([x[seed] for x in results], alone)


@pytest.mark.usefixtures("needs_compiler")
@pytest.mark.slow  # most of a minute of compiling
@pytest.mark.parametrize("jobs", [learn_jobs, collect_jobs])
def test_a_program_compiled_over_seeds_is_each_alone(jobs, tmp_path):
    """Mapped over two at a time, where the last call takes one again."""
    program, examples = jobs()
    stacked = stack(examples)
    results = compile_program(program, stacked, tmp_path, Seeds(3, 2, 1))(*stacked)
    for seed, example in enumerate(examples):
        assert_same(of_seed(results, seed), program(*example))


def test_both_ways_of_mapping_agree():
    """What is None stays None, and every result has the seeds first."""

    def program(x, y, nothing):
        assert nothing is None
        return {"sum": x + y["y"].sum(), "x": (x,)}

    x, y = torch.arange(6.0).reshape(3, 2), {"y": torch.arange(3.0)}
    for mapped in (over_seeds(program), one_by_one(program, 3)):
        result = mapped(x, y, None)
        assert result["sum"].tolist() == [[0.0, 1.0], [3.0, 4.0], [6.0, 7.0]]
        assert torch.equal(result["x"][0], x)


# --- the run


@pytest.mark.long
def test_what_a_run_of_seeds_leaves(tmp_path, capsys):
    """A run directory for each seed, and of all of them the settings, a summary with its interval and a picture with a band."""
    with drawn():
        result = train(tiny(tmp_path / "run", num_seeds=3, **SHORT | {"eval_episodes": 4}))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(summary) == [*SUMMARY, *SEEDS_SUMMARY]
    assert [one["seed"] for one in summary["seeds"]] == [1, 2, 3]
    means = [one["eval_return_mean"] for one in summary["seeds"]]
    assert summary["eval_return_mean"] == pytest.approx(np.mean(means))
    low, high = summary["eval_return_interval"]
    assert min(means) <= low <= summary["eval_return_iqm"] <= high <= max(means)
    assert summary["global_step"] == sum(one["global_step"] for one in summary["seeds"])
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        *("config.json", "curves.png", "seed-1", "seed-2", "seed-3", "summary.json")
    ]
    assert [path.name for path in find_runs([str(tmp_path)])] == ["seed-1", "seed-2", "seed-3"]
    assert [one.summary["seed"] for one in result.seeds] == [1, 2, 3]
    best = max(result.seeds, key=lambda one: one.summary["eval_return_mean"])
    assert result.policy is best.policy
    assert load_policy(tmp_path / "run" / "seed-2").act(np.zeros(4, np.float32)) in (0, 1)
    with pytest.raises(UsageError, match=r"holds the runs of 3 seeds: name one of them, .*seed-1"):
        load_policy(tmp_path / "run")
    assert "interquartile mean" in capsys.readouterr().out


@pytest.mark.parametrize("backend", ["torch", "gymnasium"])
def test_stopped_and_resumed(tmp_path, backend):
    """All seeds go on from where they were; on the device with the bits of a run that was not stopped."""
    settings = {**SHORT, "backend": backend, "num_seeds": 2}
    train(tiny(tmp_path / "whole", **settings | {"num_iterations": 4}))
    train(tiny(tmp_path / "run", **settings | {"num_iterations": 2}))
    config = tiny(tmp_path / "run", **settings | {"num_iterations": 4, "resume": str(tmp_path / "run")})
    train(config)
    for seed in ("seed-1", "seed-2"):
        assert [row["iteration"] for row in rows_of(tmp_path / "run" / seed)] == [1, 2, 3, 4]
        if backend == "torch":
            assert torch.equal(params_of(tmp_path / "run" / seed), params_of(tmp_path / "whole" / seed))


def test_a_seed_resumes_alone(tmp_path):
    """Its folder is a run: one seed can go on without the others."""
    train(tiny(tmp_path / "run", backend="torch", num_seeds=2, **SHORT))
    path = tmp_path / "run" / "seed-2"
    settings = {**SHORT, "num_iterations": 5, "backend": "torch", "seed": 2, "resume": str(path)}
    train(tiny(path, **settings))
    assert rows_of(path)[-1]["iteration"] == 5
    with pytest.raises(UsageError, match="--num-seeds 1 cannot change"):
        train(tiny(tmp_path / "run", **SHORT, backend="torch", resume=str(tmp_path / "run")))


def test_a_seed_that_has_enough_ends_as_it_would_alone(tmp_path):
    """--stop-at-return, a callback, the number of steps: each seed ends by itself, and stays as it was then."""

    class Enough(Callback):
        def on_iteration(self, run):
            return run.config.seed == 2 and run.iteration == 2

    settings = {**SHORT, "num_iterations": 5, "backend": "torch"}
    train(tiny(tmp_path / "all", num_seeds=3, **settings), callbacks=[Enough()])
    train(tiny(tmp_path / "alone", seed=2, **settings | {"num_iterations": 2}))
    assert [len(rows_of(tmp_path / "all" / f"seed-{seed}")) for seed in (1, 2, 3)] == [5, 2, 5]
    assert_alike(tmp_path / "all" / "seed-2", tmp_path / "alone")
    environments = [
        load_checkpoint(path / "checkpoints" / "last.pt")["environments"]
        for path in (tmp_path / "all" / "seed-2", tmp_path / "alone")
    ]
    for one, other in zip(*(tree_leaves(found) for found in environments), strict=True):
        torch.testing.assert_close(one, other)


def test_a_seed_that_fails_leaves_the_others_alone(tmp_path):
    """A number that is not finite ends that seed: what it was is kept, the others train to their end, and the exit says so."""

    class Poisoned(Callback):
        def on_iteration(self, run):
            if run.config.seed == 2 and run.iteration == 2:
                raise ValueError("enough of this")

    settings = {**SHORT, "num_iterations": 4}
    with pytest.raises(TrainingFault, match=r"seed 2: after iteration 2: Poisoned\.on_iteration raised ValueError") as fault:
        train(tiny(tmp_path / "run", num_seeds=3, **settings), callbacks=[Poisoned()])
    assert [len(rows_of(tmp_path / "run" / f"seed-{seed}")) for seed in (1, 2, 3)] == [4, 2, 4]
    assert (tmp_path / "run" / "seed-2" / "fault.txt").exists()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["failed_seeds"] == [2]
    train(tiny(tmp_path / "3", seed=3, **settings))
    assert_alike(tmp_path / "run" / "seed-3", tmp_path / "3")
    assert str(fault.value).endswith(f"--resume {tmp_path / 'run'}")


def test_an_update_that_is_not_finite_is_one_seeds_own(tmp_path, monkeypatch):
    """As from a loss that overflows: its parameters stay those before, and nobody else's are touched."""
    from fastppo.training import training_run

    read, seen = training_run.read_metrics, []

    def failing(learned):
        seen.append(learned)
        if len(seen) == 6:  # the second seed's in the third iteration
            raise TrainingFault("policy_loss is not finite in minibatch 0 of the update, which was not applied")
        return read(learned)

    monkeypatch.setattr(training_run, "read_metrics", failing)
    with pytest.raises(TrainingFault, match="seed 2: iteration 3: policy_loss is not finite"):
        train(tiny(tmp_path / "run", num_seeds=2, **SHORT | {"num_iterations": 4}))
    monkeypatch.setattr(training_run, "read_metrics", read)
    train(tiny(tmp_path / "1", seed=1, **SHORT | {"num_iterations": 4}))
    assert_alike(tmp_path / "run" / "seed-1", tmp_path / "1")
    train(tiny(tmp_path / "2", seed=2, **SHORT | {"num_iterations": 2}))
    torch.testing.assert_close(params_of(tmp_path / "run" / "seed-2"), params_of(tmp_path / "2"), rtol=1e-4, atol=1e-5)


def test_an_environment_that_fails_ends_all_with_their_state_kept(tmp_path):
    """One vector environment is everybody's: the message names seed and environment, and all can go on."""
    marker = tmp_path / "marker"
    marker.touch()
    kwargs = {"kind": "reward", "index": 1, "at": 40, "marker": str(marker)}
    settings = {
        **SHORT,
        "env_id": "environments:FaultyVector-v0",
        "env_kwargs": kwargs,
        "num_seeds": 2,
        "check_env": False,
    }
    with pytest.raises(TrainingFault, match="reward of environment 1 of seed 1 of 2 is not finite") as fault:
        train(tiny(tmp_path / "run", **settings))
    assert f"--resume {tmp_path / 'run'}" in str(fault.value).splitlines()[-1]
    marker.unlink()
    train(tiny(tmp_path / "run", **settings, resume=str(tmp_path / "run")))
    assert [row["iteration"] for row in rows_of(tmp_path / "run" / "seed-2")] == [1, 2, 3]


@pytest.mark.long
def test_a_run_of_seeds_that_is_killed_goes_on(tmp_path):
    """SIGTERM: the iteration is finished and each seed kept, and the line printed resumes; a second run there is refused."""
    run = tmp_path / "run"
    words = ["--num-seeds", "3", "--num-envs", "2", "--num-steps", "16", "--compile", "off", "--plain", "--eval-episodes", "0"]
    started = Started(tmp_path / "said", 1, [*words, "--total-timesteps", "10000000", "--run-dir", str(run)])
    try:
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and not all((run / f"seed-{k}" / "metrics.csv").exists() for k in (1, 2, 3)):
            time.sleep(0.05)
        with pytest.raises(UsageError, match="another run is writing to it"):
            RunDirectory(run / "seed-2").lock()
    finally:
        started.kill(signal.SIGTERM, 0)
    assert started.wait() == [143]
    assert f"--resume {run}" in started.said("out")[0].splitlines()[-1]
    iterations = [load_checkpoint(run / f"seed-{k}" / "checkpoints" / "last.pt")["iteration"] for k in (1, 2, 3)]
    assert len(set(iterations)) == 1
    assert iterations[0] >= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_seeds": 0}, "--num-seeds must be a whole number between 1 and 1024, got 0"),
        ({"num_seeds": 2, "track": "wandb"}, "--track wandb follows one run: with --num-seeds 2 leave it off"),
        ({"num_seeds": 2, "exact_resume": True}, "--exact-resume is for one seed: with --num-seeds 2 leave it off"),
        ({"num_seeds": 1024, "num_envs": 4096, "num_steps": 512}, "--num-seeds 1024 times 4 epochs of 2097152 rows"),
    ],
)
def test_what_many_seeds_cannot_be(settings, message):
    """Refused in a line that names the flag, before anything is made."""
    with pytest.raises(UsageError, match=message):
        TrainConfig(**settings)


def test_environments_given_are_one_seeds(tmp_path):
    """A vector environment handed to train() has N environments, not S times N."""
    with pytest.raises(UsageError, match="--num-seeds 2 makes environments from --env-id"):
        train(tiny(tmp_path / "run", num_seeds=2), envs=gym.make_vec("CartPole-v1", num_envs=2))
