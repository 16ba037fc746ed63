"""Whole runs of a policy that remembers: stopped and resumed, many seeds, several processes, every space."""

import copy
import csv
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from environments import AnySpaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from fastppo import TrainConfig, UsageError, load_policy, preset_for, train
from fastppo.analysis.evaluation import play_episodes
from fastppo.analysis.search_space import to_settings
from fastppo.cli import parse_train
from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.envs.factory import EnvConfig, make_gymnasium_envs
from fastppo.train import console
from support.processes import Started, assert_same_run, rows_of
from support.recurrent import SMALL
from support.resume import differing, result_of, settings_of, stopped_after
from support.runs import tiny
from support.seeds import SHORT, assert_alike, params_of

LSTM, GRU = ({"rnn": kind, **SMALL} for kind in ("lstm", "gru"))
PENDULUM = {"env_id": "Pendulum-v1", "norm_obs": True, "norm_reward": True}

# --- acting


class Told(AnySpaces):
    """Keeps of each episode the observations it gave and the actions it was given."""

    def __init__(self):
        super().__init__(action="box")
        self.episodes = []

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        self.episodes.append(([obs], []))
        return obs, info

    def step(self, action):
        self.episodes[-1][1].append(action)
        result = super().step(action)
        self.episodes[-1][0].append(result[0])
        return result


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_training_acts_on_what_it_remembers_of_one_episode(mode, restarts, tmp_path):
    """Over ends of episodes, steps that only reset, and rollouts: the actions of an agent that is shown each episode alone.

    With almost no noise and learning rate they can be foretold.
    """
    envs = SyncVectorEnv([Told] * 2, autoreset_mode=AutoresetMode(mode))
    told = list(envs.envs)
    settings = {
        **LSTM,
        "log_std_init": -16.0,
        "check_env": False,
        "learning_rate": 1e-12,
        "num_minibatches": 2,
        "reset_each_rollout": restarts,
    }
    agent = train(tiny(tmp_path / "run", **settings), envs=envs).policy
    for env in told:
        assert len(env.episodes) > 8
        for seen, done in env.episodes:
            agent.reset()
            for obs, action in zip(seen, done, strict=False):  # the last observation is acted on by nobody
                np.testing.assert_allclose(action, agent.act(obs), rtol=0, atol=2e-6)


# --- stopped and resumed

RESUMED = {
    "device, lstm": ("device", LSTM),
    "device, gru of two layers, shared": ("device", {**GRU, "rnn_layers": 2, "rnn_shared": True}),
    "device, normalised": ("device", {**LSTM, **PENDULUM}),
    "device, fresh rollouts": ("device, fresh rollouts", GRU),
    "exact resume": ("sync", LSTM),
    "exact resume, same-step": ("same-step", GRU),
}


@pytest.mark.parametrize("case", RESUMED)
def test_stopped_and_resumed_equals_not_interrupted(case, tmp_path, monkeypatch):
    """The same bits, what is remembered included; with --exact-resume stopped between two checkpoints."""
    base, settings = RESUMED[case]
    settings = {"num_steps": 16, "num_iterations": 4, "compile": "off", **settings}
    train(settings_of(base, tmp_path / "whole", **settings))
    config = settings_of(base, tmp_path / "parted", **settings)
    assert stopped_after(3, config, monkeypatch) == 143
    train(replace(config, resume=config.run_dir))
    whole, rows = result_of(tmp_path / "whole")
    assert differing((whole, rows), result_of(tmp_path / "parted")) == []
    assert [row["iteration"] for row in rows] == ["1", "2", "3", "4"]


@pytest.mark.slow  # half a minute of compiling each
@pytest.mark.parametrize("case", ["device, lstm", "exact resume, same-step"])
def test_a_compiled_run_too(case, tmp_path, monkeypatch):
    """The same for compiled programs, which keep what is remembered elsewhere."""
    base, settings = RESUMED[case]
    settings = {**settings, "compile": "on", "num_envs": 2, "num_steps": 8, "num_minibatches": 2}
    train(settings_of(base, tmp_path / "whole", **settings))
    config = settings_of(base, tmp_path / "parted", **settings)
    stopped_after(3, config, monkeypatch)
    train(replace(config, resume=config.run_dir))
    assert "compiled" in (tmp_path / "parted" / "summary.json").read_text()
    assert differing(result_of(tmp_path / "whole"), result_of(tmp_path / "parted")) == []


@pytest.fixture
def in_the_middle(tmp_path):
    """Two iterations of episodes of 200 steps, all of which are under way: the run's directory and its checkpoint's path."""
    config = settings_of("device", tmp_path / "run", **LSTM, **PENDULUM, num_steps=16, num_iterations=2)
    run_dir = train(config).run_dir
    for kept in (run_dir / "checkpoints").glob("iteration-*.pt"):  # a refused last.pt is then the only one there is
        kept.unlink()
    return run_dir, run_dir / "checkpoints" / "last.pt"


def test_a_checkpoint_holds_what_is_remembered(in_the_middle):
    """Behind the environments, a row of each (h and c of actor and critic); without it the run would not be the same one."""
    run_dir, path = in_the_middle
    kept = path.read_bytes()
    checkpoint = torch.load(path)
    *_, rnn_state, first = checkpoint["environments"]["running"]
    assert rnn_state.shape == (4, 2 * 2 * 8)
    assert rnn_state.abs().min(1).values.gt(0.0).all()
    assert first.tolist() == [False] * 4
    results = []
    for forgets in (False, True):
        if forgets:
            rnn_state.zero_()
            torch.save(checkpoint, path)
        assert console(["--resume", str(run_dir), "--num-iterations", "3"]) == 0
        results.append(torch.load(path))
        for later in (run_dir / "checkpoints").glob("iteration-*.pt"):
            later.unlink()
        path.unlink()
        path.write_bytes(kept)
    assert any(name.startswith(".policy.weights") for name in differing(*results))


@pytest.mark.parametrize(
    "change",
    [
        lambda running: running[:-2],
        lambda running: running[:-1],
        lambda running: [*running[:-2], running[-2][:, :16], running[-1]],
        lambda running: [*running[:-2], running[-2][:3], running[-1]],
        lambda running: [*running[:-2], running[-2].double(), running[-1]],
        lambda running: [*running[:-1], running[-1].float()],
    ],
    ids=["left out", "no episode starts", "of another size", "of other environments", "float64", "starts are numbers"],
)
def test_a_memory_that_is_none_is_refused(change, in_the_middle, capsys):
    """As from a run without --rnn, or of another network: exit code 2 and a line, the run as it was."""
    run_dir, path = in_the_middle
    checkpoint = torch.load(path)
    checkpoint["environments"]["running"] = change(checkpoint["environments"]["running"])
    torch.save(checkpoint, path)
    before, rows = path.read_bytes(), (run_dir / "metrics.csv").read_text()
    capsys.readouterr()
    assert console(["--resume", str(run_dir), "--num-iterations", "3"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "does not fit the run's config.json" in error
    assert "environments.running" in error
    assert (path.read_bytes(), (run_dir / "metrics.csv").read_text()) == (before, rows)


@pytest.mark.parametrize(
    "changed", [{"rnn": None}, {"rnn": "gru"}, {"rnn_hidden_size": 16}, {"rnn_layers": 2}, {"rnn_shared": True}]
)
def test_another_memory_is_another_network(changed, in_the_middle):
    """Loading and resuming by the settings of another one are refused, not taken for it."""
    run_dir, _ = in_the_middle
    config = replace(TrainConfig.from_json(run_dir / "config.json"), **changed)
    (run_dir / "config.json").write_text(config.to_json())
    with pytest.raises(UsageError, match=r"best\.pt"):
        load_policy(run_dir)
    with pytest.raises(UsageError, match=r"last\.pt"):
        train(replace(config, resume=str(run_dir), run_dir=str(run_dir)))


# --- many seeds


@pytest.mark.parametrize(
    "settings",
    [
        {**LSTM, "backend": "torch"},
        {**GRU, **PENDULUM, "backend": "torch", "rnn_shared": True},
        {**LSTM, "env_id": "environments:Walk-v0", "vectorization": "sync", "norm_obs": True},
        {**GRU, "env_id": "environments:WalkVector-v0", "env_kwargs": {"mode": "SameStep"}},
    ],
    ids=["device-lstm", "device-gru", "host-lstm", "same-step-gru"],
)
def test_each_seed_is_as_it_would_be_alone(settings, tmp_path):
    """Two seeds together and each alone: each remembers its own environments only."""
    settings = {**SHORT, "num_iterations": 2, **settings}  # the second starts with what is remembered from the first
    train(tiny(tmp_path / "all", num_seeds=2, seed=5, **settings))
    for seed in (5, 6):
        train(tiny(tmp_path / str(seed), seed=seed, **settings))
        assert_alike(tmp_path / "all" / f"seed-{seed}", tmp_path / str(seed))
    first, second = (params_of(tmp_path / "all" / f"seed-{seed}") for seed in (5, 6))
    assert not torch.allclose(first, second, atol=1e-3)


def test_seeds_go_on_with_what_each_remembers(tmp_path):
    """On the device a run of seeds that was stopped is the one that was not, and one seed of it goes on alone."""
    settings = {**SHORT, **LSTM, "backend": "torch", "num_seeds": 2}
    train(tiny(tmp_path / "whole", **settings | {"num_iterations": 4}))
    train(tiny(tmp_path / "run", **settings | {"num_iterations": 2}))
    alone = tiny(tmp_path / "run" / "seed-2", **settings | {"num_iterations": 4, "num_seeds": 1, "seed": 2})
    before = copy.deepcopy(torch.load(tmp_path / "run" / "seed-2" / "checkpoints" / "last.pt"))
    train(tiny(tmp_path / "run", **settings | {"num_iterations": 4, "resume": str(tmp_path / "run")}))
    for seed in ("seed-1", "seed-2"):
        assert torch.equal(params_of(tmp_path / "run" / seed), params_of(tmp_path / "whole" / seed))
    torch.save(before, tmp_path / "run" / "seed-2" / "checkpoints" / "last.pt")
    train(replace(alone, resume=alone.run_dir))
    torch.testing.assert_close(
        params_of(tmp_path / "run" / "seed-2"), params_of(tmp_path / "whole" / "seed-2"), rtol=2e-4, atol=2e-5
    )


# --- several processes

RANKS = ["--num-envs", "4", "--num-steps", "16", "--num-minibatches", "2", "--minibatch-shards", "2", "--compile", "off"]
RANKS += [
    "--plain",
    "--eval-episodes",
    "0",
    "--no-anneal-lr",
    "--no-check-env",
    "--rnn-hidden-size",
    "8",
    "--hidden-sizes",
    "8",
]
RANK_CASES = {
    "device": ["--rnn", "lstm", "--env-id", "CartPole-v1", "--backend", "torch"],
    "host": ["--rnn", "gru", "--env-id", "environments:Walk-v0", "--vectorization", "sync", "--norm-obs", "--norm-reward"],
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="as test_torchrun")
@pytest.mark.parametrize("case", RANK_CASES)
@pytest.mark.long
def test_two_processes_are_one(case, tmp_path):
    """Environments, what is remembered of them and whole sequences are shared out; on the device one process then goes on."""
    flags = [*RANKS, *RANK_CASES[case]]
    iterations = "2" if case == "device" else "4"
    started = Started(tmp_path, 2, [*flags, "--run-dir", str(tmp_path / "two"), "--num-iterations", iterations])
    assert console([*flags, "--run-dir", str(tmp_path / "one"), "--num-iterations", "4"]) == 0
    assert started.wait() == [0, 0], started.said("err")
    if case == "device":
        *_, rnn_state, _ = torch.load(tmp_path / "two" / "checkpoints" / "last.pt")["environments"]["running"]
        assert rnn_state.shape == (4, 32)
        assert console(["--resume", str(tmp_path / "two"), "--num-iterations", "4"]) == 0
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert [row["iteration"] for row in rows_of(tmp_path / "two")] == [1, 2, 3, 4]


@pytest.mark.slow  # two processes more
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="as test_torchrun")
def test_two_processes_take_up_what_one_remembered(tmp_path):
    """On the device each gets its own environments' rows of a checkpoint that a process alone has left."""
    flags = [*RANKS, *RANK_CASES["device"]]
    for name, iterations in (("two", "2"), ("one", "4")):
        assert console([*flags, "--run-dir", str(tmp_path / name), "--num-iterations", iterations]) == 0
    started = Started(tmp_path, 2, ["--resume", str(tmp_path / "two"), "--num-iterations", "4"])
    assert started.wait() == [0, 0], started.said("err")
    assert_same_run(tmp_path / "two", tmp_path / "one")
    assert [row["iteration"] for row in rows_of(tmp_path / "two")] == [1, 2, 3, 4]


# --- what is refused, and what is chosen


def test_a_network_of_ones_own_has_its_own_memory(tmp_path):
    """--rnn is a part of our networks: with policy= it is refused before anything is written."""
    with pytest.raises(UsageError, match=r"--rnn lstm is a part of our networks, and policy= is a whole one of yours"):
        train(
            tiny(tmp_path / "run", **LSTM, num_minibatches=2), policy=lambda inputs, outputs: torch.nn.Linear(*inputs, outputs)
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--num-envs", "6", "--num-minibatches", "4"], "--num-minibatches 4: --rnn gru learns from whole sequences"),
        (["--num-envs", "6", "--num-minibatches", "4"], "--num-envs 6; nearest that do: --num-minibatches 3 or 6"),
        (["--num-envs", "4", "--num-minibatches", "8"], "nearest that do: --num-minibatches 4"),
        # whole sequences of 16 rows: of 1, 2, 3 or 6 environments
        (["--num-envs", "6", "--num-steps", "16", "--minibatch-size", "40"], "nearest that do: --minibatch-size 32 or 48"),
        (["--num-envs", "6", "--num-steps", "16", "--minibatch-size", "64"], "nearest that do: --minibatch-size 48 or 96"),
        (["--num-envs", "6", "--num-steps", "16", "--minibatch-size", "8"], "nearest that do: --minibatch-size 16"),
        (["--rnn-hidden-size", "0"], "--rnn-hidden-size must be a whole number between 1 and"),
        (["--rnn-layers", "0"], "--rnn-layers must be a whole number between 1 and"),
    ],
)
def test_minibatches_that_break_sequences(flags, says, tmp_path, monkeypatch, capsys):
    """Exit code 2, the nearest that do not, and nothing written."""
    monkeypatch.chdir(tmp_path)
    assert console(["--rnn", "gru", *flags]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "minibatches", "rows"),
    [
        (["--env-id", "Pendulum-v1"], 8, None),  # of 8 environments; the preset has more
        (["--env-id", "Pendulum-v1", "--num-envs", "6"], 6, None),
        (["--env-id", "CartPole-v1", "--num-envs", "6", "--preset", "none"], 3, None),  # 4 are asked for, which 6 are not
        (["--env-id", "CartPole-v1", "--num-envs", "1"], 1, None),
        (["--env-id", "Pendulum-v1", "--num-minibatches", "2"], 2, None),
        (["--env-id", "Pendulum-v1", "--num-steps", "32", "--minibatch-size", "64"], 4, 64),
    ],
)
def test_a_presets_minibatches_become_whole_sequences(flags, minibatches, rows):
    """As many as there can be, up to the preset's own; what a flag says stays."""
    config = parse_train(["--rnn", "lstm", *flags])
    words = {name[2:].replace("-", "_"): value for name, value in zip(flags[::2], flags[1::2], strict=True)}
    settings = {name: int(value) if value.isdigit() else value for name, value in words.items()}
    assert preset_for(rnn="lstm", **settings) == config
    assert config.minibatches_per_epoch == minibatches
    assert config.minibatch_size == rows
    assert config.num_envs % config.minibatches_per_epoch == 0


def test_flags_of_minibatches_are_taken_at_their_word():
    """Not lowered, but refused; and without a memory the preset is as it was, however that is said."""
    with pytest.raises(UsageError, match=r"--num-minibatches 16: --rnn lstm learns from whole sequences"):
        parse_train(["--rnn", "lstm", "--env-id", "Pendulum-v1", "--num-minibatches", "16"])
    assert parse_train(["--env-id", "Pendulum-v1", "--rnn", "None"]) == parse_train(["--env-id", "Pendulum-v1"])


@pytest.mark.parametrize(
    ("settings", "found", "expected"),
    [
        ({"num_envs": 6, "num_minibatches": 3}, {"num_steps": 32, "minibatch_size": 128}, {"minibatch_size": 96}),
        ({"num_envs": 6, "num_minibatches": 3}, {"num_steps": 256, "minibatch_size": 32}, {"minibatch_size": 256}),
        ({"num_envs": 6, "num_minibatches": 3}, {"num_steps": 32, "num_minibatches": 5}, {"num_minibatches": 3}),
        ({"num_envs": 8, "num_steps": 128, "minibatch_size": 256}, {"num_steps": 64}, {"minibatch_size": 256}),
        ({"num_envs": 8, "num_steps": 128, "minibatch_size": 256}, {"num_steps": 512}, {"minibatch_size": 512}),
    ],
)
def test_a_sweep_tries_whole_sequences(settings, found, expected):
    """The next size (or number) below that is of whole environments, or the least; and TrainConfig takes it."""
    made = to_settings(TrainConfig(rnn="lstm", **settings), found)
    assert {name: made[name] for name in expected} == expected
    config = TrainConfig(**made)
    assert config.num_envs % config.minibatches_per_epoch == 0


# --- every space

SPACES = {
    "mask in a Dict": {"observation": "masked", "action": "multi-discrete"},
    "mask in the info": {"action": "discrete from -2", "mask": "info"},
    "mask of a tuple, by component": {"action": "multi-discrete", "mask": "tuple", "mode": "SameStep"},
    "mask of a method": {"action": "multi-discrete", "mask": "method"},
    "nested": {"observation": "nested", "action": "box half-open"},
    "image": {"observation": "image (H, W)", "action": "multi-binary"},
    "image and more": {"observation": "tuple", "action": "multi-discrete 2-D", "mode": "SameStep"},
}
LOSSES = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "grad_norm")


@pytest.mark.parametrize("name", SPACES)
def test_every_space(name, tmp_path):
    """Trained with normalised observations and rewards, and played alone: the environment raises for an illegal action."""
    kwargs = SPACES[name]
    kind = LSTM if len(name) % 2 else GRU
    settings = {**kind, "env_id": "environments:AnySpacesVector-v0", "env_kwargs": kwargs, "cnn_size": 8, "num_steps": 8}
    settings |= {"norm_obs": True, "norm_reward": True, "num_minibatches": 2, "num_iterations": 3}
    run = train(tiny(tmp_path / "run", **settings))
    with (run.run_dir / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    assert all(math.isfinite(float(row[loss])) for row in rows for loss in LOSSES)
    agent = load_policy(run.run_dir)

    envs = make_gymnasium_envs(EnvConfig(settings["env_id"], 3, env_kwargs=kwargs))
    assert len(play_episodes(agent, AutoresetEnvs(envs), 6, seed=0, deterministic=False).returns) == 6
    alone = envs.envs[0]
    obs, info = alone.reset(seed=1)
    for _ in range(20):
        mask = alone.action_masks() if kwargs.get("mask") == "method" else info.get("action_mask")
        obs, _, terminated, truncated, info = alone.step(agent.act(obs, False, mask))
        if terminated or truncated:
            agent.reset([True])
            obs, info = alone.reset()
    envs.close()
