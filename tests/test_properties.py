"""Any settings: two iterations of training and a directory that is complete, or a UsageError that names a flag.

Which of the two is decided here, by `is_legal`, as the documentation has it. Some settings, always the same, are tried by
`scripts/test.sh -m long`; `scripts/test.sh -m slow tests/test_properties.py` tries hundreds, others each time, and prints what
reproduces a failure.
"""

import contextlib
import csv
import io
import json
import math
import os
import re
import signal
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from environments import ACTIONS, OBSERVATIONS
from gymnasium.spaces import Box, Discrete, MultiDiscrete

from fastppo import TrainConfig, UsageError, load_policy, train
from fastppo.bounds import flag
from fastppo.training.training_run import TrainingRun
from support.resume import differing, result_of

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

FEW = hypothesis.settings(
    max_examples=70,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.filter_too_much],
)
MANY = hypothesis.settings(FEW, max_examples=400, derandomize=False, print_blob=True)
FEW_RESUMED, MANY_RESUMED = hypothesis.settings(FEW, max_examples=15), hypothesis.settings(MANY, max_examples=100)

FLAGS = {flag(name) for name in TrainConfig.__dataclass_fields__}
# finite in every row, whatever was trained; explained_variance and the means over episodes need something to be of
ALWAYS_FINITE = [
    *("seconds", "sps", "loss", "policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "grad_norm", "learning_rate")
]


# --- the settings


@st.composite
def environments(draw):
    """An environment with settings that belong to it; of the tests', gymnasium's and the device's."""
    kind = draw(st.sampled_from(["any spaces", "any spaces", "modes", "one by one", "device"]))
    mode = draw(st.sampled_from(["NextStep", "SameStep", "Disabled"]))
    if kind == "any spaces":
        observation = draw(st.sampled_from(list(OBSERVATIONS)))
        fitting = ["multi-discrete"] if observation == "masked" and not draw(st.integers(0, 1)) else list(ACTIONS)
        action = draw(st.sampled_from(fitting))
        kwargs = {"mode": mode, "observation": observation, "action": action}
        told = {Discrete: ["info"], MultiDiscrete: ["info", "tuple"]}.get(type(ACTIONS[action]), [])
        if told and observation != "masked":  # which has one of its own
            kwargs["mask"] = draw(st.sampled_from([None, *told]))
        return {"env_id": "environments:AnySpacesVector-v0", "env_kwargs": kwargs, "cnn_size": 8}
    if kind == "modes":
        return {"env_id": "environments:WalkVector-v0", "env_kwargs": {"mode": mode}}
    if kind == "one by one":
        vectorization = draw(st.sampled_from(["auto", "sync", "grouped"]))
        return {"env_id": "environments:Walk-v0", "vectorization": vectorization, "num_threads": draw(st.integers(1, 2))}
    names = ["CartPole-v1", "Acrobot-v1", "MountainCar-v0", "MountainCarContinuous-v0", "Pendulum-v1"]
    kwargs = {"max_episode_steps": draw(st.integers(1, 9))}  # MountainCar's episodes are as long as it lets them
    return {"env_id": draw(st.sampled_from(names)), "backend": "torch", "env_kwargs": kwargs}


@st.composite
def any_settings(draw):
    """Keyword arguments of TrainConfig: mostly of a run that can be."""
    settings = draw(environments())
    num_envs, num_steps = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    batch_size = num_envs * num_steps
    divisors = [number for number in range(1, batch_size + 1) if batch_size % number == 0]
    rare = st.integers(0, 9).map(lambda number: number == 9)  # what rules out much else
    parts = draw(st.integers(1, batch_size + 2)) if draw(rare) else draw(st.sampled_from(divisors))
    by_size = draw(st.booleans())
    settings |= {"num_envs": num_envs, "num_steps": num_steps}
    settings |= {"minibatch_size": parts} if by_size else {"num_minibatches": parts}
    advantage = draw(st.sampled_from(["gae", "monte-carlo"]))
    switches = ["anneal_lr", "anneal_clip", "norm_obs", "norm_reward", "clip_vloss", "share_backbone", "reset_each_rollout"]
    switches += ["recompute_advantage", "norm_returns"]
    settings |= {name: draw(st.booleans()) for name in (*switches, "exact_resume", "check_env")}
    rows = parts if by_size else batch_size // parts
    settings["norm_adv"] = draw(rare) or (rows > 1 and draw(st.booleans()))
    settings["clip_reward"] = draw(rare) or (not settings["norm_reward"] and draw(st.booleans()))
    action = ACTIONS[settings["env_kwargs"]["action"]] if "action" in settings.get("env_kwargs", {}) else None
    settings["squash_actions"] = draw(rare) or (is_bounded(action) and draw(st.booleans()))
    wants_kl = draw(rare) or (not settings["anneal_lr"] and draw(st.booleans()))
    values = {
        "update_epochs": st.integers(1, 3),
        "learning_rate": st.sampled_from([1e-4, 2.5e-3, 0.1]),
        "gamma": st.sampled_from([0.0, 0.9, 0.99, 1.0]),
        "gae_lambda": st.sampled_from([0.0, 0.95, 1.0]),
        "clip_coef": st.sampled_from([1e-3, 0.2, 5.0]),
        "ent_coef": st.sampled_from([0.0, 0.01]),
        "ent_coef_end": st.none() | st.sampled_from([0.0, 0.1]),
        "desired_kl": st.sampled_from([1e-4, 0.1]) if wants_kl else st.none(),
        "vf_coef": st.sampled_from([0.0, 0.5]),
        "max_grad_norm": st.sampled_from([0.5, math.inf]),
        "target_kl": st.none() | st.sampled_from([1e-9, 0.01, 10.0]),
        "hidden_sizes": st.none() | st.lists(st.sampled_from([1, 3, 16]), max_size=3).map(tuple),
        "activation": st.sampled_from(["tanh", "relu", "elu", "silu", "gelu"]),
        "log_std_init": st.sampled_from([-2.0, 0.0, 0.5]),
        "seed": st.integers(0, 1000),
        "eval_episodes": st.integers(0, 2),
        "log_interval": st.integers(1, 3),
        "checkpoint_iterations": st.none() | st.integers(1, 3),
        "checkpoint_seconds": st.sampled_from([0.0, 30.0]),
        "keep_checkpoints": st.integers(1, 3),
    }
    settings |= {name: draw(value) for name, value in values.items()}
    return settings | {"advantage": advantage, "num_iterations": 2, "compile": "off", "device": "cpu", "plain": True}


def is_bounded(space):
    return isinstance(space, Box) and space.is_bounded("both")


def is_legal(settings):
    """Whether such a run can be, as the help texts and README have it."""
    batch_size = settings["num_envs"] * settings["num_steps"]
    parts = settings.get("minibatch_size") or settings["num_minibatches"]
    rows = settings.get("minibatch_size") or batch_size // parts
    kwargs = settings.get("env_kwargs", {})
    action = ACTIONS.get(kwargs.get("action"))
    bounded = is_bounded(action) or settings["env_id"] in ("MountainCarContinuous-v0", "Pendulum-v1")
    return (
        batch_size % parts == 0
        and (rows > 1 or not settings["norm_adv"])
        and not (settings["clip_reward"] and settings["norm_reward"])
        and not (settings["anneal_lr"] and settings["desired_kl"])
        and (bounded or not settings["squash_actions"])
        and (kwargs.get("observation") != "masked" or kwargs.get("action") == "multi-discrete")  # the mask is of five choices
    )


# --- what has to hold of a run


def check_run(settings):
    """Train; everything that is promised of the directory, or of the refusal."""
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
        run_dir = Path(place, "run")
        if not is_legal(settings):
            with pytest.raises(UsageError) as refused:
                train(TrainConfig(run_dir=str(run_dir), **settings))
            lines = str(refused.value).splitlines()
            assert 1 <= len(lines) <= 2, lines
            assert FLAGS & set(re.findall(r"--[a-z-]+[a-z]", lines[0].replace("--no-", "--"))), lines
            assert os.listdir(place) == []
            hypothesis.event("refused")
            return
        config = TrainConfig(run_dir=str(run_dir), **settings)
        result = train(config)
        assert result.run_dir == run_dir
        kept = TrainConfig.from_json(run_dir / "config.json")
        assert kept.autoreset in (config.autoreset, "same-step")  # what short episodes have chosen
        assert replace(kept, autoreset=config.autoreset) == config
        rows = check_metrics(run_dir, kept)
        check_summary(run_dir, config, rows[-1])
        check_checkpoints(run_dir, config)


def check_metrics(run_dir, config):
    """metrics.csv: its rows, as numbers."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    logged = [1, 2] if config.log_interval == 1 else [2]  # the last one always is
    assert [row["iteration"] for row in rows] == logged
    full = config.batch_size
    next_step = config.env_kwargs.get("mode", "NextStep") == "NextStep" and config.autoreset != "same-step"
    keeps_its_rows = not next_step  # else a row goes to each reset
    before = 0.0
    for row in rows:
        assert [key for key in ALWAYS_FINITE if not math.isfinite(row[key])] == []
        assert math.isfinite(row["episodic_return_mean"]) == math.isfinite(row["episodic_length_mean"]) == (row["episodes"] > 0)
        assert math.isnan(row["explained_variance"]) or -math.inf < row["explained_variance"] <= 1.0
        new, before = row["global_step"] - before, row["global_step"]
        assert 0 <= new <= full * (1 if len(rows) == 2 else 2)
        share = (row["iteration"] - 1) / 2 if config.anneal_lr else 0.0
        possible = (1.0, 1.5, 1.0 / 1.5) if config.desired_kl and row["iteration"] > 1 else (1.0 - share,)
        assert any(row["learning_rate"] == pytest.approx(config.learning_rate * factor) for factor in possible)
        most = config.update_epochs * config.minibatches_per_epoch
        assert row["updates"] <= most
        if config.target_kl is None:  # a minibatch of resets only teaches nothing
            assert row["updates"] == most if keeps_its_rows else row["updates"] >= (len(rows) == 2 and new > 0)
        assert 0.0 <= row["clipfrac"] <= 1.0
    steps = rows[-1]["global_step"]
    if keeps_its_rows:
        assert steps == 2 * full
    elif len(rows) == 2:
        ends = sum(row["terminations"] + row["truncations"] for row in rows)
        assert ends - 2 * config.num_envs <= 2 * full - steps <= ends  # a reset may come after its rollout
    return rows


def check_summary(run_dir, config, row):
    """summary.json is JSON, and agrees with the last row."""
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["global_step"], summary["iterations"]) == (row["global_step"], 2)
    assert summary["eval_episodes"] == config.eval_episodes
    evaluated = summary["eval_return_mean"], summary["eval_return_std"]
    assert all(number is not None for number in evaluated) == (config.eval_episodes > 0)
    assert summary["stopped_by"] is None


def check_checkpoints(run_dir, config):
    """Both load, and act within the action space on what the observation space holds; no more are kept than asked for."""
    for name in ("last", "best"):
        agent = load_policy(run_dir, name)
        agent.obs_space.seed(config.seed)
        for deterministic in (True, False):
            action = agent.act(agent.obs_space.sample(), deterministic)
            space = agent.action.space
            assert space.contains(action[()] if isinstance(space, Discrete) else np.asarray(action)), (action, space)
    assert 1 <= len(list((run_dir / "checkpoints").glob("iteration-*.pt"))) <= config.keep_checkpoints
    assert [path.name for path in run_dir.rglob("*.tmp")] == []


def check_resumed(settings):
    """Stopped in iteration 1 and resumed equals not interrupted: the same bits, whatever checkpoints there were."""
    checkpoint_if_due = TrainingRun.checkpoint_if_due

    def interrupted(self, environments):
        checkpoint_if_due(self, environments)
        os.kill(os.getpid(), signal.SIGTERM)

    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
        whole, parted = Path(place, "whole"), Path(place, "parted")
        train(TrainConfig(run_dir=str(whole), **settings))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(TrainingRun, "checkpoint_if_due", interrupted)
            with pytest.raises(SystemExit):
                train(TrainConfig(run_dir=str(parted), **settings))
        assert json.loads((parted / "summary.json").read_text())["iterations"] == 1
        train(TrainConfig(run_dir=str(parted), resume=str(parted), **settings))
        assert differing(result_of(whole), result_of(parted)) == []


def exactly_resumable(settings):
    """Legal settings of a run that is to go on exactly: the device's, or with --exact-resume."""
    return is_legal(settings) and (settings.get("backend") == "torch" or settings["exact_resume"])


# --- the tests


@FEW
@hypothesis.given(settings=any_settings())
@pytest.mark.long
def test_any_settings_train_or_are_refused(settings):
    check_run(settings)


@FEW_RESUMED
@hypothesis.given(settings=any_settings().filter(exactly_resumable))
@pytest.mark.long
def test_any_run_that_promises_it_goes_on_exactly(settings):
    check_resumed(settings | {"eval_episodes": 0})


@pytest.mark.slow
@MANY
@hypothesis.given(settings=any_settings())
def test_any_settings_train_or_are_refused_at_random(settings):
    check_run(settings)


@pytest.mark.slow
@MANY_RESUMED
@hypothesis.given(settings=any_settings().filter(exactly_resumable))
def test_any_run_that_promises_it_goes_on_exactly_at_random(settings):
    check_resumed(settings | {"eval_episodes": 0})


def test_the_settings_are_worth_trying():
    """Most can be, some cannot, and none of what tells them apart is rare."""
    seen = Counter()

    @hypothesis.settings(FEW, max_examples=200)
    @hypothesis.given(settings=any_settings())
    def count(settings):
        kwargs = settings.get("env_kwargs", {})
        seen.update(["legal" if is_legal(settings) else "refused", "exact" if exactly_resumable(settings) else "inexact"])
        seen.update([settings.get("backend"), kwargs.get("mode"), kwargs.get("mask"), settings["advantage"]])
        seen.update(name for name, value in settings.items() if value is True)

    count()
    assert seen["legal"] >= 100
    assert seen["refused"] >= 20
    assert seen["exact"] >= 30
    for word in ("torch", "NextStep", "SameStep", "Disabled", "monte-carlo", "norm_adv", "norm_returns", "squash_actions"):
        assert seen[word] >= 5, word
    assert seen["info"] + seen["tuple"] >= 5
