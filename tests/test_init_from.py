"""--init-from: a new run starts with another run's weights and statistics, and what does not fit is named."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from fastppo import TrainConfig, UsageError, load_policy, train
from fastppo.given_settings import with_absolute_paths
from fastppo.policy.codec import agent_from_state
from support.networks import Relu, Small
from support.processes import Started, assert_same_run
from support.resume import differing
from support.runs import checkpoint, rows_of, tiny
from support.seeds import assert_alike

NORMALIZED = {"env_id": "Pendulum-v1", "norm_obs": True, "norm_reward": True, "max_episode_steps": 10}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Finished runs by name."""
    folder = tmp_path_factory.mktemp("sources")
    settings = {
        "pendulum": NORMALIZED,
        "cartpole": {"env_id": "CartPole-v1"},
        "gru": {"env_id": "CartPole-v1", "rnn": "gru", "num_minibatches": 2},
        "shared": {"env_id": "CartPole-v1", "share_backbone": True, "hidden_sizes": (16, 8)},
    }
    return SimpleNamespace(**{name: train(tiny(folder / name, **own)).run_dir for name, own in settings.items()})


def started(source, run_dir, **settings):
    return train(tiny(run_dir, init_from=str(source), keep_checkpoints=9, checkpoint_seconds=0.0, **settings))


@pytest.mark.parametrize("name", ["best", "last"])
def test_weights_and_statistics_are_those_of_the_other_run(source, tmp_path, name):
    """In the checkpoint of iteration 0. Adam, counters and the search for the best policy start anew."""
    given = source.pendulum if name == "best" else source.pendulum / "checkpoints" / "last.pt"
    result = started(given, tmp_path / "run", **NORMALIZED)
    start, theirs = checkpoint(result.run_dir, "iteration-0"), checkpoint(source.pendulum, name)
    assert differing(start["policy"], theirs["policy"]) == []
    assert differing(start["return_moments"], theirs["return_moments"]) == []
    assert start["return_moments"][2] > 0  # the number of rewards behind the statistics
    assert not any(x.any() for x in start["adam"].values())
    assert (start["iteration"], start["global_step"], start["episodes"]["episodes"]) == (0, 0, 0)
    assert torch.equal(
        start["best"]["spans"][0]["policy"]["params"], torch.cat([x.flatten() for x in theirs["policy"]["weights"].values()])
    )
    assert json.loads((result.run_dir / "config.json").read_text())["init_from"] == str(given)


def test_the_first_rollout_is_learned_under_the_statistics_that_acted(source, tmp_path):
    """As in every later iteration: nothing is clipped in the first minibatch, and no ratio moves before the first step."""
    result = started(source.pendulum, tmp_path / "run", **NORMALIZED, update_epochs=1, num_minibatches=1, num_iterations=1)
    (row,) = rows_of(result.run_dir)
    assert float(row["approx_kl"]) == pytest.approx(0.0, abs=1e-6)
    start, end = checkpoint(result.run_dir, "iteration-0"), checkpoint(result.run_dir, "last")
    count = {name: state["policy"]["obs_moments"]["obs"][2].item() for name, state in (("start", start), ("end", end))}
    assert count["end"] == count["start"] + int(row["global_step"])


def test_it_goes_on_where_the_other_one_is(source, tmp_path):
    """A policy that has learned keeps its return, where a fresh one has half of it."""
    config = {"env_id": "environments:ProbeActionDecides-v0", "num_envs": 8, "num_iterations": 30, "learning_rate": 0.05}
    learned = train(tiny(tmp_path / "learned", **config))
    fine = started(learned.run_dir, tmp_path / "fine", **config | {"num_iterations": 1, "learning_rate": 1e-9})
    assert float(rows_of(fine.run_dir)[0]["episodic_return_mean"]) > 0.9


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        (
            "cartpole",
            {"env_id": "Pendulum-v1"},
            r"the observation is numbers of shape \(4,\) there, and numbers of shape \(3,\)",
        ),
        ("cartpole", {"env_id": "environments:IdentityDiscrete-v0"}, r"actions are Discrete\(2\) there, and Discrete\(4\)"),
        ("cartpole", {"hidden_sizes": (32,)}, "its network has hidden_sizes 64 64, this run's 32: give --hidden-sizes 64 64"),
        ("cartpole", {"activation": "relu"}, "has activation tanh, this run's relu: give --activation tanh"),
        ("cartpole", {"rnn": "gru", "num_minibatches": 2}, "has rnn None, this run's gru: give --rnn None"),
        ("gru", {}, "has rnn gru, this run's None: give --rnn gru"),
        ("shared", {"hidden_sizes": (16, 8)}, "has share_backbone True, this run's False: give --share-backbone"),
        ("cartpole", {"share_backbone": True}, "give --no-share-backbone"),
        ("cartpole", {"norm_obs": True}, "that policy was trained without --norm-obs: leave it off"),
        ("pendulum", {"env_id": "Pendulum-v1"}, "that policy was trained with --norm-obs: give it too"),
    ],
)
def test_what_differs_is_named(source, tmp_path, name, settings, says):
    """Before anything is written."""
    with pytest.raises(UsageError, match=rf"--init-from .*best\.pt: .*({says})"):
        started(getattr(source, name), tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_what_is_no_run_is_refused(source, tmp_path):
    """A path without anything, a file of something else, a directory of many seeds, a checkpoint beside no config.json."""
    many = train(tiny(tmp_path / "many", num_seeds=2, num_iterations=1)).run_dir
    for path, says in (
        (tmp_path / "none", "does not exist: name a run directory or a checkpoint in it"),
        (source.cartpole / "metrics.csv", "is damaged or not a checkpoint of fastppo"),
        (many, "holds the runs of 2 seeds: name one of them"),
        (tmp_path, "is this a run directory of fastppo"),
    ):
        with pytest.raises(UsageError, match=rf"--init-from: .*{says}"):
            started(path, tmp_path / "run")
    lone = tmp_path / "lone.pt"
    lone.write_bytes((source.cartpole / "checkpoints" / "last.pt").read_bytes())
    with pytest.raises(UsageError, match=r"--init-from .*lone\.pt: its network is not that of this run"):
        started(lone, tmp_path / "run", hidden_sizes=(32,))
    started(lone, tmp_path / "run")


def test_reward_statistics_that_are_not_there_start_anew(source, tmp_path, capsys):
    """The other run had no --norm-reward."""
    started(source.cartpole, tmp_path / "run", norm_reward=True)
    assert "it has no reward statistics: these start anew" in capsys.readouterr().out


@pytest.mark.parametrize("network", [{}, {"share_backbone": True}, {"rnn": "gru", "num_minibatches": 2}])
def test_the_critic_keeps_its_values(network, tmp_path):
    """In units of the reward, also where the new run normalises neither rewards nor returns."""
    config = {"env_id": "Pendulum-v1", "max_episode_steps": 10, **network}
    theirs = train(tiny(tmp_path / "theirs", **config, norm_reward=True, norm_returns=True)).run_dir
    obs = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)).numpy()
    values = load_policy(theirs).value(obs)
    for rewards, returns in itertools.product((False, True), repeat=2):
        own = {**config, "norm_reward": rewards, "norm_returns": returns, "num_iterations": 1}
        run_dir = started(theirs, tmp_path / f"{rewards} {returns}", **own).run_dir
        start = agent_from_state(checkpoint(run_dir, "iteration-0")["policy"], TrainConfig(**own))
        assert start.value(obs) == pytest.approx(values, rel=1e-3)


def test_a_network_of_ones_own(tmp_path):
    """Its weights and buffers too; another one is refused."""
    theirs = train(tiny(tmp_path / "theirs"), policy=Small)
    config = tiny(tmp_path / "run", init_from=str(theirs.run_dir), keep_checkpoints=9, checkpoint_seconds=0.0)
    ours = train(config, policy=Small)
    assert differing(checkpoint(ours.run_dir, "iteration-0")["policy"], checkpoint(theirs.run_dir, "best")["policy"]) == []
    for policy, says in ((Relu, "policy= makes a Relu"), (None, "give what made it as policy=")):
        with pytest.raises(UsageError, match=rf"--init-from .*: this run's network is a Small of your own.*{says}"):
            train(tiny(tmp_path / "other", init_from=str(theirs.run_dir)), policy=policy)


def test_a_network_of_ones_own_learns_other_units_anew(tmp_path, capsys):
    """Nobody knows which of its layers gives the values, so a line says that these are in other units."""
    theirs = train(tiny(tmp_path / "theirs", norm_returns=True), policy=Small)
    for name, norm_returns in (("same", True), ("other", False)):
        train(tiny(tmp_path / name, init_from=str(theirs.run_dir), norm_returns=norm_returns), policy=Small)
        assert ("values are in other units" in capsys.readouterr().out) == (name == "other")


def test_seeds_start_from_the_same_weights(source, tmp_path):
    """And each is as it would be alone."""
    many = started(source.cartpole, tmp_path / "many", num_seeds=2, vectorization="sync")
    for seed, result in enumerate(many.seeds, start=1):
        alone = started(source.cartpole, tmp_path / str(seed), seed=seed, vectorization="sync")
        assert_alike(result.run_dir, alone.run_dir)


def test_ranks_start_from_the_same_weights(source, tmp_path):
    """Two processes train what one does."""
    flags = [
        "--num-envs",
        "4",
        "--num-steps",
        "16",
        "--num-iterations",
        "3",
        "--compile",
        "off",
        "--plain",
        "--eval-episodes",
        "0",
    ]
    flags += ["--minibatch-shards", "2", "--no-check-env", "--init-from", str(source.cartpole)]
    for size in (1, 2):
        run = Started(tmp_path, size, [*flags, "--run-dir", str(tmp_path / str(size))])
        assert run.wait() == [0] * size, run.said("err")
    assert_same_run(tmp_path / "2", tmp_path / "1")


def test_such_a_run_resumes_without_the_other(source, tmp_path):
    """It is in its checkpoints: the other run may be gone. Another --init-from is refused."""
    settings = {"num_iterations": 2}
    config = tiny(tmp_path / "run", init_from=str(source.cartpole), **settings)
    train(config)
    gone = str(tmp_path / "gone")
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace(str(source.cartpole), gone))
    again = {**vars(config), "init_from": gone, "resume": str(tmp_path / "run"), "num_iterations": 4}
    assert train(TrainConfig(**again)).summary["iterations"] == 4
    with pytest.raises(UsageError, match=r"--init-from .* cannot change on --resume"):
        train(TrainConfig(**again | {"init_from": str(source.cartpole), "num_iterations": 5}))


def test_the_path_is_kept_whole(tmp_path):
    """config.json names it from anywhere."""
    assert with_absolute_paths(TrainConfig(init_from="runs/a"), tmp_path).init_from == str(tmp_path / "runs" / "a")
