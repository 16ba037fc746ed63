"""--eval-every: training is the same with and without it, and best.pt, --stop-at-return and the curves go by it."""

import contextlib
import json
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from environments import ActionDecides, Lengths
from gymnasium.vector import SyncVectorEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastppo import Callback, TrainConfig, UsageError, train
from fastppo.analysis import sweep_trial
from fastppo.analysis.curves import EVALUATION, RETURN, plot_curves, return_panels
from fastppo.analysis.run_groups import group_runs, read_run
from fastppo.config import RESUMABLE
from fastppo.plot import console as plot
from fastppo.random_streams import Stream, environment_seed, seed_of
from fastppo.report import console as report
from fastppo.run.checkpoint_file import load_checkpoint
from fastppo.run.loggers import Loggers
from fastppo.run.metrics_file import read_rows
from support.processes import Started
from support.resume import differing, stopped_after
from support.runs import checkpoint, rows_of, tiny, without_times

NUMBERS = ("eval_return_mean", "eval_return_std")


class Drawing(Lengths):
    """Each reset and step draws from NumPy's and torch's global generators."""

    def reset(self, *, seed=None, options=None):
        np.random.random()
        return super().reset(seed=seed, options=options)

    def step(self, action):
        obs, _, terminated, truncated, info = super().step(action)
        return obs, float(torch.rand(())), terminated, truncated, info


class ActionDecidesForEver(ActionDecides):
    """No episode ends."""

    def step(self, action):
        obs, reward, _, _, info = super().step(action)
        return obs, reward, False, False, info


gym.register("Drawing-v0", Drawing)
gym.register("DecidesForEver-v0", ActionDecidesForEver)


def evaluated(tmp_path, name="run", **settings):
    """A run of a moment that evaluates every second iteration."""
    return train(tiny(tmp_path / name, **{"eval_every": 2, "eval_episodes": 3, **settings}))


def trained(rows):
    """Rows without times and evaluations."""
    return [{key: value for key, value in row.items() if key not in NUMBERS} for row in without_times(rows)]


def evaluations(run_dir):
    """(iteration, mean) of each row with an evaluation."""
    return [(int(row["iteration"]), float(row[EVALUATION])) for row in rows_of(run_dir) if row[EVALUATION]]


# --- training is the same


@pytest.mark.parametrize(
    "settings",
    [
        {"env_id": "Pendulum-v1", "norm_obs": True, "norm_reward": True, "max_episode_steps": 20},
        {"env_id": "CartPole-v1", "backend": "torch"},
        {"env_id": "environments:Cue-v0", "rnn": "gru", "num_minibatches": 2},
        {"env_id": "Drawing-v0", "num_seeds": 2},
    ],
    ids=["statistics", "device", "memory", "seeds"],
)
def test_training_is_the_same_with_and_without(tmp_path, settings):
    """Bit for bit: parameters, optimiser, statistics, generators, episodes, every other column."""
    runs = []
    for every in (1, None):
        torch.manual_seed(3)
        np.random.seed(3)
        runs.append(train(tiny(tmp_path / str(every), eval_every=every, eval_episodes=1, **settings)))
    with_it, without = ([one.run_dir for one in run.seeds or [run]] for run in runs)
    for one, other in zip(with_it, without, strict=True):
        assert trained(rows_of(one)) == trained(rows_of(other))
        assert all(math.isfinite(float(row[EVALUATION])) for row in rows_of(one))
        assert EVALUATION not in rows_of(other)[0]
        states = [checkpoint(run_dir) for run_dir in (one, other)]
        for state in states:
            for name in ("best_return", "best_evaluation"):
                del state[name]
        assert differing(*states) == []


def test_every_evaluation_plays_the_same_episodes(tmp_path):
    """With a policy that hardly changes the returns are equal, and those of the final evaluation are others."""
    settings = {"env_id": "Pendulum-v1", "max_episode_steps": 20, "learning_rate": 1e-12, "eval_every": 1}
    result = evaluated(tmp_path, **settings)
    (first, *others) = [mean for _, mean in evaluations(result.run_dir)]
    assert others == pytest.approx([first] * 3, rel=1e-4)
    assert result.summary["eval_return_mean"] != pytest.approx(first, rel=1e-2)


# --- what is written


def test_rows_of_other_iterations_are_empty(tmp_path):
    """Every second of five iterations and the last one; the action that pays is chosen in all three episodes or in none."""
    result = evaluated(tmp_path, env_id="environments:ProbeActionDecides-v0", num_iterations=5)
    rows = rows_of(result.run_dir)
    assert [row["iteration"] for row in rows if row[EVALUATION]] == ["2", "4", "5"]
    assert {row[EVALUATION] for row in rows} <= {"", "1.0", "-1.0"}
    assert {row["eval_return_std"] for row in rows} == {"", "0.0"}
    assert len(read_rows(result.run_dir / "metrics.csv")) == 5  # empty cells are no half-written rows
    events = EventAccumulator(str(result.run_dir))
    events.Reload()
    steps = {int(row["global_step"]): float(row[EVALUATION]) for row in rows if row[EVALUATION]}
    assert {event.step: event.value for event in events.Scalars("eval/episodic_return")} == steps


def test_an_evaluation_is_logged_whatever_the_interval(tmp_path):
    """--log-interval 3 and an evaluation each second iteration: rows 2, 3 and 4."""
    result = evaluated(tmp_path, log_interval=3)
    assert [row["iteration"] for row in rows_of(result.run_dir)] == ["2", "3", "4"]


def test_no_throttle_drops_an_evaluation(tmp_path):
    """TensorBoard and trackers get it though a row was written just before, and no nan from the other rows."""
    got = []

    class Tracker:
        def log(self, metrics, step):
            got.append((step, dict(metrics)))

        def close(self):
            pass

    log = Loggers(tmp_path / "metrics.csv", print, tracker=Tracker, iterations=10**6)
    for step, value in ((1, math.nan), (2, 7.0), (3, math.nan), (4, math.nan)):
        log.log({"iteration": step, "global_step": step, "loss": 0.5, EVALUATION: value})
    log.close()
    assert got == [
        (1, {"losses/loss": 0.5}),
        (2, {"losses/loss": 0.5, "eval/episodic_return": 7.0}),
        (4, {"losses/loss": 0.5}),
    ]
    assert (tmp_path / "metrics.csv").read_text().splitlines()[1:] == ["1,1,0.5,", "2,2,0.5,7.0", "3,3,0.5,", "4,4,0.5,"]


def test_a_half_written_row_with_an_evaluation_is_ignored(tmp_path):
    """A row that was cut off lacks a field; an empty field of another column is damage."""
    path = tmp_path / "metrics.csv"
    head = "iteration,global_step,loss,eval_return_mean,eval_return_std\n"
    path.write_text(head + "1,10,0.5,,\n2,20,0.5,1.0,0.0\n3,30,,1.0,0.0\n4,40,0.5,\n")
    assert [row["iteration"] for row in read_rows(path)] == ["1", "2"]


def test_a_callback_sees_it(tmp_path):
    """nan where there was none, so that a comparison is false."""
    seen = []

    class See(Callback):
        def on_iteration(self, run):
            seen.append(run.metrics[EVALUATION] >= -1.0)

    train(tiny(tmp_path / "run", env_id="environments:ProbeActionDecides-v0", eval_every=2, eval_episodes=1), callbacks=[See()])
    assert seen == [False, True, False, True]


@pytest.mark.long
def test_curves_show_it(tmp_path, monkeypatch, capsys):
    """In curves.png, `plot` and `report`; a run without evaluations has no panel for them."""
    monkeypatch.chdir(tmp_path)
    result = evaluated(tmp_path, env_id="environments:ProbeActionDecides-v0")
    lines = []
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda self, **_: lines.extend(self.lines))
    plot_curves(result.run_dir / "metrics.csv", tmp_path / "curves.png", "a run")
    assert [line.get_label() for line in lines][1:] == ["evaluation"]
    assert [list(axis) for axis in lines[1].get_data()] == [
        [int(row["global_step"]) for row in rows_of(result.run_dir) if row[EVALUATION]],
        [mean for _, mean in evaluations(result.run_dir)],
    ]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert plot(["run", "--output", "page"]) == 0
    assert "return (evaluation)" in (tmp_path / "page.svg").read_text()
    assert report(["run"]) == 0
    assert "evaluation in training" in (tmp_path / "run" / "report.html").read_text()
    plain = train(tiny(tmp_path / "plain"))
    groups, _ = group_runs([read_run(plain.run_dir)])
    assert return_panels(groups) == [("global_step", RETURN), ("seconds", RETURN)]


# --- what goes by it


def test_best_is_the_best_evaluated(tmp_path, capsys):
    """The latest of the highest evaluations, whatever training episodes say; the summary and the words say so."""
    config = tiny(tmp_path / "run", env_id="CartPole-v1", num_iterations=8, num_envs=8, num_steps=64, learning_rate=0.01)
    result = train(TrainConfig(**{**vars(config), "eval_every": 2, "eval_episodes": 10}))
    means = dict(evaluations(result.run_dir))
    highest = max(means.values())
    best = checkpoint(result.run_dir, "best")
    assert best["iteration"] == max(iteration for iteration, mean in means.items() if mean == highest)
    assert best["best_return"] == result.summary["best_return_mean"] == highest
    assert result.summary["best_by"] == "evaluation"
    out = capsys.readouterr().out
    assert "best evaluated model: return" in out
    assert f"return {highest:.1f} +- " in out


def test_stop_at_return_asks_the_evaluation(tmp_path):
    """Episodes of training pay 1 from the start, which is enough by itself; the evaluation comes in the third iteration."""
    settings = {"env_id": "environments:ProbeConstantReward-v0", "num_iterations": 40, "stop_at_return": 1.0}
    result = evaluated(tmp_path, eval_every=3, **settings)
    assert result.summary["iterations"] == 3
    assert result.summary["stopped_by"] == "the evaluation's episodes return 1, as --stop-at-return asks"
    assert (
        evaluated(tmp_path, "more", eval_every=3, **settings | {"stop_at_return": 1.5, "num_iterations": 8}).summary[
            "iterations"
        ]
        == 8
    )


def test_episodes_that_do_not_end_choose_nothing(tmp_path, capsys):
    """No episode of training or evaluation ends: a line, an empty cell, and training judges."""
    result = evaluated(tmp_path, env_id="DecidesForEver-v0", eval_episodes=1)
    assert evaluations(result.run_dir) == []
    assert (result.summary["best_by"], result.summary["best_return_mean"]) == ("training", -math.inf)
    assert "no episode ended in the 1,000 steps of the evaluation" in capsys.readouterr().out


def test_a_sweep_goes_by_it(tmp_path):
    """The curve of a trial is that of its evaluations."""
    result = evaluated(tmp_path, env_id="environments:ProbeActionDecides-v0")
    expected = [(int(row["global_step"]), float(row[EVALUATION])) for row in rows_of(result.run_dir) if row[EVALUATION]]
    assert sweep_trial.read_curve(result.run_dir, EVALUATION) == expected


# --- resume, seeds, ranks


def test_a_resumed_run_goes_on_with_its_best(tmp_path, monkeypatch):
    """Interrupted after iteration 2 of 4, on the device: the same evaluations, rows and best policy as without."""
    settings = {"backend": "torch", "eval_every": 1, "eval_episodes": 3, "learning_rate": 0.01}
    whole = train(tiny(tmp_path / "whole", **settings))
    assert stopped_after(2, tiny(tmp_path / "cut", **settings), monkeypatch) == 143
    resumed = train(tiny(tmp_path / "cut", resume=str(tmp_path / "cut"), **settings))
    assert without_times(rows_of(resumed.run_dir)) == without_times(rows_of(whole.run_dir))
    for name in ("last", "best"):
        assert differing(checkpoint(whole.run_dir, name), checkpoint(resumed.run_dir, name)) == []


def test_it_may_be_turned_on_and_off_on_resume(tmp_path):
    """Rows from before keep their cells; what training had found judges again once it is off."""
    settings = {"env_id": "environments:ProbeConstantReward-v0", "num_envs": 8}
    assert "eval_every" in RESUMABLE
    runs = [tmp_path / "run"] * 3
    results = [
        train(tiny(run, num_iterations=n, eval_every=every, eval_episodes=2, resume=str(run) if n > 2 else None, **settings))
        for run, n, every in zip(runs, (2, 4, 6), (None, 1, None), strict=True)
    ]
    assert [result.summary["best_by"] for result in results] == ["training", "evaluation", "training"]
    assert [row[EVALUATION] for row in rows_of(runs[0])] == ["", "", "1.0", "1.0", "", ""]


def test_a_checkpoint_from_before_evaluations_goes_on(tmp_path):
    """It lacks the entry."""
    config = tiny(tmp_path / "run", num_iterations=2)
    train(config)
    for name in ("last", "iteration-2"):
        path = tmp_path / "run" / "checkpoints" / f"{name}.pt"
        state = load_checkpoint(path)
        state.pop("best_evaluation", None)  # one may be a link to the other
        torch.save(state, path)
    resumed = train(tiny(tmp_path / "run", num_iterations=4, resume=str(tmp_path / "run"), eval_every=2, eval_episodes=1))
    assert resumed.summary["best_by"] == "evaluation"


def test_each_seed_is_evaluated_as_if_alone(tmp_path):
    """Evaluations, best.pt and the end by --stop-at-return of seeds 1 and 2 are those of runs of their own."""
    settings = {"eval_every": 2, "eval_episodes": 3, "learning_rate": 0.01, "env_id": "CartPole-v1", "vectorization": "sync"}
    both = train(tiny(tmp_path / "both", num_seeds=2, **settings))
    for seed, result in enumerate(both.seeds, start=1):
        alone = train(tiny(tmp_path / f"alone-{seed}", seed=seed, **settings))
        assert evaluations(result.run_dir) == evaluations(alone.run_dir)
        assert checkpoint(result.run_dir, "best")["iteration"] == checkpoint(alone.run_dir, "best")["iteration"]
        assert result.summary["best_return_mean"] == alone.summary["best_return_mean"]


@pytest.mark.long
def test_ranks_evaluate_as_one_process_does(tmp_path):
    """Rank 0 plays, and both end by what it has found."""
    flags = ["--num-envs", "4", "--num-steps", "16", "--compile", "off", "--plain", "--eval-episodes", "2", "--eval-every", "2"]
    flags += ["--env-id", "environments:ProbeConstantReward-v0", "--stop-at-return", "1", "--num-iterations", "9"]
    for size in (1, 2):
        started = Started(tmp_path, size, [*flags, "--minibatch-shards", "2", "--run-dir", str(tmp_path / str(size))])
        assert started.wait() == [0] * size, started.said("err")
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in "12")
    assert one["iterations"] == two["iterations"] == 2
    assert evaluations(tmp_path / "1") == evaluations(tmp_path / "2") == [(2, 1.0)]
    assert two["best_by"] == "evaluation"


# --- what is wrong


def test_an_evaluation_that_fails_costs_a_line(tmp_path, capsys):
    """The environment fails with the seed of evaluations, which is not one of training: the run goes on to its end."""
    seed = environment_seed(seed_of(1, Stream.TRAINING_EVALUATION), Stream.EVALUATION_ENVIRONMENTS)
    failing = {"env_id": "environments:Failing-v0", "env_kwargs": {"seed": seed, "at": 1, "how": "raise"}}
    result = evaluated(tmp_path, **failing, max_episode_steps=5, eval_episodes=1)
    assert result.summary["iterations"] == 4
    assert result.summary["best_by"] == "training"
    assert capsys.readouterr().out.count("no evaluation of this iteration: environment 0: ValueError: the wheel came off") == 2


def test_wrong_use_is_refused(tmp_path):
    """Nothing is written."""
    with pytest.raises(UsageError, match="--eval-every 2 plays --eval-episodes episodes each time: set that to at least 1"):
        tiny(tmp_path / "run", eval_every=2)
    with pytest.raises(UsageError, match="--eval-every must be a whole number of at least 1, got 0"):
        tiny(tmp_path / "run", eval_every=0)
    config = tiny(tmp_path / "run", eval_every=1, eval_episodes=1)
    with (
        contextlib.closing(SyncVectorEnv([lambda: gym.make("CartPole-v1")] * 2)) as envs,
        pytest.raises(UsageError, match="--eval-every makes environments of its own from --env-id, which yours were not"),
    ):
        train(config, envs=envs)
    assert not (tmp_path / "run").exists()
