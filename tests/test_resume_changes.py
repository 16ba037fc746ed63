"""Settings that change when a run is resumed: of learning, of the environments, and what is refused with its reason."""

import json
import math

import pytest
import torch

from fastppo import TrainConfig, UsageError, train
from fastppo.config import RESUMABLE
from fastppo.config import TrainConfig as Settings
from fastppo.run.checkpoint_file import load_checkpoint
from fastppo.train import console
from fastppo.training.resumed_settings import LEARNED, OF_THE_NETWORK, REASONS, TRAINED_ON, check_resumable
from support.processes import Started
from support.resume import differing
from support.runs import checkpoint, rows_of, tiny, without_times

DEVICE = {"backend": "torch", "anneal_lr": False}  # environments that go on where they were
ONE_STEP = "environments:ProbeConstantReward-v0"


def resumed(run_dir, iterations, **settings):
    return train(tiny(run_dir, resume=str(run_dir), num_iterations=iterations, **settings))


def test_a_new_learning_rate_is_as_if_the_run_had_had_it(tmp_path):
    """From there on, bit for bit: config.json edited by hand and resumed without the flag is the oracle. Old rows stay."""
    for name in ("flag", "edited"):
        train(tiny(tmp_path / name, num_iterations=2, **DEVICE))
    flag = resumed(tmp_path / "flag", 4, **DEVICE, learning_rate=1e-4, gamma=0.9, ent_coef=0.01)
    path = tmp_path / "edited" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "learning_rate": 1e-4, "gamma": 0.9, "ent_coef": 0.01}))
    edited = resumed(tmp_path / "edited", 4, **DEVICE, learning_rate=1e-4, gamma=0.9, ent_coef=0.01)
    assert without_times(rows_of(flag.run_dir)) == without_times(rows_of(edited.run_dir))
    assert differing(checkpoint(flag.run_dir), checkpoint(edited.run_dir)) == []
    rates = [float(row["learning_rate"]) for row in rows_of(flag.run_dir)]
    assert rates == pytest.approx([2.5e-3, 2.5e-3, 1e-4, 1e-4])
    assert TrainConfig.from_json(flag.run_dir / "config.json").learning_rate == 1e-4
    before = TrainConfig.from_json(flag.run_dir / "config-until-2.json")  # what those rows were trained with
    assert (before.learning_rate, before.gamma) == (2.5e-3, 0.99)
    assert (tmp_path / "edited" / "config-until-2.json").exists()  # an edit by hand is noticed


OTHER = {
    "num_steps": 8,
    "reset_each_rollout": True,
    "learning_rate": 1e-3,
    "anneal_lr": False,
    "adam_eps": 1e-8,
    "num_minibatches": 2,
    "minibatch_size": 4,
    "update_epochs": 3,
    "advantage": "monte-carlo",
    "gamma": 0.9,
    "gae_lambda": 0.8,
    "norm_adv": False,
    "clip_coef": 0.1,
    "anneal_clip": True,
    "clip_vloss": True,
    "ent_coef": 0.01,
    "ent_coef_end": 0.005,
    "desired_kl": 0.02,
    "recompute_advantage": True,
    "vf_coef": 1.0,
    "max_grad_norm": math.inf,
    "target_kl": 0.01,
}


def test_every_setting_of_learning_may_change(tmp_path):
    """One after another, each in an iteration of its own; the run has them all in the end."""
    assert OTHER.keys() == LEARNED - {"sde_sample_freq"}  # that is in tests/test_action_distributions.py
    train(tiny(tmp_path / "run", num_iterations=1))
    settings = {}
    for iterations, (name, value) in enumerate(OTHER.items(), start=2):
        settings[name] = value
        resumed(tmp_path / "run", iterations, **settings)
    config = TrainConfig.from_json(tmp_path / "run" / "config.json")
    assert {name: getattr(config, name) for name in OTHER} == OTHER
    assert len(rows_of(tmp_path / "run")) == len(OTHER) + 1
    steps = [int(row["global_step"]) for row in rows_of(tmp_path / "run")]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("backend", ["gymnasium", "torch"])
def test_more_environments(backend, tmp_path, capsys):
    """They start new episodes; counters, episodes and statistics go on."""
    settings = {"env_id": "Pendulum-v1", "max_episode_steps": 10, "norm_obs": True, "norm_reward": True, "backend": backend}
    settings |= {"max_episode_steps": None} if backend == "torch" else {}
    train(tiny(tmp_path / "run", num_iterations=2, **settings))
    before = checkpoint(tmp_path / "run")
    result = resumed(tmp_path / "run", 4, num_envs=6, **settings)
    out = capsys.readouterr().out
    assert "the environments start new episodes" in out
    assert "from here on: num_envs 6" in out
    steps = [int(row["global_step"]) for row in rows_of(result.run_dir)]
    assert steps[3] - steps[2] > 3 * 0.8 * (steps[1] - steps[0])
    after = checkpoint(tmp_path / "run")
    assert after["episodes"]["episodes"] >= before["episodes"]["episodes"]
    count = [state["policy"]["obs_moments"]["obs"][2].item() for state in (before, after)]
    assert count == [steps[1], steps[3]]
    assert len(after["return_carry"]) == 6


def test_another_way_to_run_them(tmp_path):
    """From sync to processes: the record of the best policy goes on."""
    settings = {"env_id": ONE_STEP, "num_envs": 8}
    train(tiny(tmp_path / "run", num_iterations=3, vectorization="sync", **settings))
    before = checkpoint(tmp_path / "run")["best_return"]
    result = resumed(tmp_path / "run", 5, vectorization="async", **settings)
    assert (result.summary["backend"], before) == ("gymnasium/async", 1.0)
    assert result.summary["best_return_mean"] == 1.0


def test_another_environment_of_the_same_spaces(tmp_path, capsys):
    """Returns of the first one, of 1, are no record for the second one, which costs 1 or pays 1: the search starts anew."""
    train(tiny(tmp_path / "run", num_iterations=3, num_envs=8, env_id=ONE_STEP))
    assert checkpoint(tmp_path / "run")["best_return"] == 1.0
    result = resumed(tmp_path / "run", 6, num_envs=8, env_id="environments:ProbeActionDecides-v0", eval_episodes=1)
    assert "another environment: the returns so far do not count" in capsys.readouterr().out
    assert result.summary["best_return_mean"] < 1.0
    assert checkpoint(tmp_path / "run", "best")["iteration"] >= 3
    assert float(rows_of(result.run_dir)[3]["episodic_return_mean"]) < 0.99
    episodes = [int(row["episodes"]) for row in rows_of(result.run_dir)]
    assert episodes == sorted(set(episodes))


def test_killed_before_a_checkpoint_has_the_change(tmp_path, capsys):
    """config.json has the new settings then, and the checkpoint is of the old ones: the change still counts as one."""
    train(tiny(tmp_path / "run", num_iterations=3, num_envs=8, env_id=ONE_STEP))
    changed = {"num_envs": 4, "env_id": "environments:ProbeActionDecides-v0"}
    path = tmp_path / "run" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    result = resumed(tmp_path / "run", 6, **changed, eval_episodes=1)
    assert "another environment: the returns so far do not count" in capsys.readouterr().out
    assert result.summary["best_return_mean"] < 1.0
    assert TrainConfig.from_json(tmp_path / "run" / "config-until-3.json").num_envs == 8


@pytest.mark.parametrize("settings", [5, {"no_such": 1}, {"gamma": "high"}, {"wrapper": [[5]]}], ids=str)
def test_settings_of_a_checkpoint_are_data(settings, tmp_path):
    """What is no setting there is said in a line."""
    train(tiny(tmp_path / "run", num_iterations=1))
    path = tmp_path / "run" / "checkpoints" / "last.pt"
    torch.save({**load_checkpoint(path), "settings": settings}, path)
    with pytest.raises(UsageError, match="does not fit the run's config"):
        resumed(tmp_path / "run", 2)


def test_other_spaces_are_refused(tmp_path):
    """Before anything is written, with what differs."""
    train(tiny(tmp_path / "run", num_iterations=1))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=r"the observation is numbers of shape \(4,\) there, and numbers of shape \(6,\)"):
        resumed(tmp_path / "run", 2, env_id="Acrobot-v1")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"seed": 2}, r"--seed 2 .*has 1 \(its random generators are in its checkpoints; for a new run from .*--init-from"),
        ({"hidden_sizes": (8,)}, r"--hidden-sizes \(8,\) .*has None \(its network was made with it\)"),
        ({"norm_obs": True}, "its statistics begin with the run"),
        ({"clip_reward": True}, "its critic has learned values in these units; for a new run from its weights: --init-from"),
        ({"exact_resume": True}, "its environments restart at its checkpoints"),
    ],
)
def test_what_cannot_change_says_why(settings, says, tmp_path):
    """The setting, both values, the reason."""
    before = TrainConfig()
    with pytest.raises(UsageError, match=says):
        check_resumable(before, TrainConfig(resume=str(tmp_path), **settings))


def test_every_setting_has_its_place():
    """It may change as one of three kinds, or there is a reason; settings of the network have theirs in common."""
    kinds = (RESUMABLE, LEARNED, TRAINED_ON)
    assert not RESUMABLE & LEARNED
    assert not (RESUMABLE | LEARNED) & TRAINED_ON
    rest = set(Settings.__dataclass_fields__).difference(*kinds, REASONS)
    network = {"hidden_sizes", "activation", "layer_norm", "critic_only", "cnn", "cnn_size", "cnn_activation", "share_backbone"}
    network |= {"action_distribution", "rnn", "rnn_hidden_size", "rnn_layers", "rnn_shared"}
    assert rest == network, OF_THE_NETWORK


def test_seeds_change_together(tmp_path):
    """Each seed goes on with the new settings and its own directory."""
    train(tiny(tmp_path / "run", num_iterations=1, num_seeds=2))
    result = resumed(tmp_path / "run", 3, num_seeds=2, learning_rate=1e-4, num_envs=4)
    for seed in result.seeds:
        config = TrainConfig.from_json(seed.run_dir / "config.json")
        assert (config.learning_rate, config.num_envs, config.num_seeds) == (1e-4, 4, 1)
        assert len(rows_of(seed.run_dir)) == 3


def test_ranks_change_together(tmp_path):
    """Two processes go on with four environments instead of two."""
    flags = [
        "--num-steps",
        "16",
        "--compile",
        "off",
        "--plain",
        "--eval-episodes",
        "0",
        "--no-check-env",
        "--env-id",
        "CartPole-v1",
    ]
    run = tmp_path / "run"
    for own in (["--run-dir", str(run), "--num-envs", "2"], ["--resume", str(run), "--num-envs", "4", "--gamma", "0.9"]):
        iterations = "2" if "--run-dir" in own else "4"
        started = Started(tmp_path, 2, [*flags, *own, "--num-iterations", iterations])
        assert started.wait() == [0, 0], started.said("err")
    assert len(rows_of(run)) == 4
    assert len(load_checkpoint(run / "checkpoints" / "last.pt")["return_carry"]) == 4


def test_on_the_command_line(tmp_path, capsys):
    """Only what is given changes."""
    train(tiny(tmp_path / "run", num_iterations=1, minibatch_size=8))
    flags = ["--learning-rate", "1e-4", "--num-minibatches", "2", "--num-iterations", "2"]
    assert console(["--resume", str(tmp_path / "run"), *flags]) == 0
    assert "from here on: learning_rate 0.0001, num_minibatches 2, minibatch_size none" in capsys.readouterr().out
    config = TrainConfig.from_json(tmp_path / "run" / "config.json")
    assert (config.num_minibatches, config.minibatch_size, config.update_epochs) == (2, None, 1)
    assert console(["--resume", str(tmp_path / "run"), "--num-minibatches", "3"]) == 2
    assert "--num-minibatches 3 does not divide the batch" in capsys.readouterr().err
