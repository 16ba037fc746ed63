"""Which parameters are kept as the best: literal returns over iterations, and runs that collapse."""

import numpy as np
import pytest
import torch

from fastppo import train
from fastppo.analysis.evaluation import EvaluationPlan, evaluate_config
from fastppo.run.best import BestPolicy
from fastppo.run.checkpoint_file import load_checkpoint
from fastppo.run.episodes import EpisodeStatistics, Finished
from support.resume import stopped_after
from support.runs import tiny


class Kept:
    """A BestPolicy whose policies are the numbers of the iterations that they act in, from 0 on."""

    def __init__(self, num_envs):
        self.tracker, self.episodes = BestPolicy(num_envs, 0), EpisodeStatistics(num_envs)
        self.iteration, self.policy, self.most = 0, None, 0

    def take(self, found):
        self.policy = self.policy if found is None else found
        self.most = max(self.most, sum(span.policy is not None for span in self.tracker.spans))

    def whole(self, *returns):
        """An iteration of whole episodes, one an environment."""
        finished = Finished(np.arange(len(returns)), np.array(returns, float), np.full(len(returns), 7))
        self.iteration += 1
        self.take(self.tracker.update(finished, np.zeros(len(returns), int), lambda: self.iteration))

    def steps(self, reward, done):
        """An iteration of steps, (T, N) each."""
        self.episodes.update(reward, done, np.ones_like(done))
        self.iteration += 1
        self.take(self.tracker.update(self.episodes.finished, self.episodes.running_length, lambda: self.iteration))

    def end(self):
        self.take(self.tracker.finish())
        return self.policy, self.tracker.score


# --- iterations that have enough episodes of their own


def test_the_iteration_that_earned_it():
    """Ten episodes judge an iteration by itself: one that was far better than those around it is kept."""
    kept = Kept(10)
    for value in (10.0, 20.0, 500.0, 20.0, 30.0):
        kept.whole(*[value] * 10)
    assert kept.end() == (2, 500.0)


def test_scores_by_hand():
    """Ten episodes, half of them 0 and half 2: mean 1, variance 1, standard error sqrt(1 / 9) = 1/3.

    Alone such an iteration is worth 1 - 3/3 = 0; with one like it before, 1 - 1/3.
    """
    kept = Kept(10)
    kept.whole(*[0.0, 2.0] * 5)
    assert kept.tracker.score == pytest.approx(0.0)
    kept.whole(*[0.0, 2.0] * 5)
    assert kept.tracker.score == pytest.approx(2 / 3)
    assert kept.end()[0] == 1


def test_of_equal_ones_the_last_is_kept():
    """It has learned for longer."""
    kept = Kept(10)
    for _ in range(6):
        kept.whole(*[500.0] * 10)
    assert kept.end() == (5, 500.0)


def test_fewer_than_ten_episodes_judge_nobody():
    """Not even several iterations together."""
    kept = Kept(3)
    for _ in range(3):
        kept.whole(1.0, 1.0, 1.0)
    assert kept.end() == (None, -np.inf)
    kept.whole(1.0, 1.0, 1.0)
    assert kept.end() == (2, 1.0)  # six episodes before it and six after it


def test_noise_is_not_recorded_as_skill():
    """Of 200 equal policies the best mean of ten is 2.7 standard errors too high; the score recorded is within one."""
    rng, errors = np.random.default_rng(0), []
    for per_iteration in (1, 5, 10, 50):
        for _ in range(10):
            kept = Kept(per_iteration)
            for _ in range(200):
                kept.whole(*rng.normal(0.0, 1.0, per_iteration))
            errors.append(kept.end()[1] * max(per_iteration, 10) ** 0.5)
    assert -1.0 < np.mean(errors) < 1.0
    assert max(errors) < 2.5


# --- episodes over several iterations


def balance(kept, good, steps=50, limit=200):
    """Iterations of environments that pay 1 a step; `good` policies end episodes at `limit` steps, others after 10 more."""
    num_envs = len(kept.episodes.running_length)
    length, fallen = np.arange(num_envs) * limit // num_envs, np.zeros(num_envs, int)  # out of step
    for is_good in good:
        done = np.zeros((steps, num_envs), bool)
        for t in range(steps):
            length += 1
            fallen = np.where(is_good, 0, fallen + 1)
            done[t] = (length >= limit) | (fallen >= 10)
            length[done[t]], fallen[done[t]] = 0, 0
        kept.steps(np.ones((steps, num_envs)), done)


def test_a_collapse_with_short_episodes():
    """Long episodes that end in the first steps of a collapsed policy were not earned by it."""
    for collapse in range(20, 28):
        kept = Kept(4)
        balance(kept, [True] * collapse + [False] * 20)
        policy, score = kept.end()
        assert 0 < policy < collapse
        assert 180.0 < score <= 200.0


@pytest.mark.parametrize("collapse", range(24, 34))
def test_a_collapse_with_episodes_as_long_as_before(collapse):
    """As Pendulum's: the policy that is kept is one of before, wherever the collapse falls in the span that judges it."""
    kept = Kept(2)
    for iteration in range(50):
        reward = np.full((50, 2), -1.0 if 10 <= iteration < collapse else -10.0)
        done = np.zeros((50, 2), bool)
        done[-1, iteration % 2] = True  # an episode of 100 steps each
        kept.steps(reward, done)
    policy, score = kept.end()
    assert 10 <= policy < collapse
    assert -400.0 < score <= -100.0


def test_a_slow_rise():
    """What is kept is from near the end, and its score no more than it returns."""
    kept = Kept(2)
    for iteration in range(100):
        kept.whole(iteration - 1.0, iteration + 1.0)
    policy, score = kept.end()
    assert 90 <= policy < 100
    assert 85.0 < score < policy


def test_episodes_that_are_given_up_count_for_nothing():
    """Where environments restart, half an episode judges nobody; what comes after it is counted from its start."""
    kept = Kept(1)
    for _ in range(12):
        kept.steps(np.ones((10, 1)), np.zeros((10, 1), bool))
        kept.episodes.forget_running()
        kept.tracker.forget_running()
        done = np.zeros((10, 1), bool)
        done[-1] = True
        kept.steps(np.ones((10, 1)), done)
    assert kept.end()[1] == 10.0
    assert kept.policy is not None


@pytest.mark.parametrize(("num_envs", "limit"), [(1, 1000), (8, 1000), (300, 1000), (300, 20)])
def test_memory_is_bounded(num_envs, limit):
    """Never more than two policies wait for their episodes to end, and none waits for one environment that never ends."""
    kept = Kept(num_envs)
    balance(kept, [True] * 150, steps=20, limit=limit)
    assert kept.most <= 2
    before = kept.policy
    for _ in range(100):  # the first environment goes on and on, the others pay more than before
        done = np.ones((10, num_envs), bool)
        done[:, 0] = False
        kept.steps(np.full((10, num_envs), 1e4), done)
    assert kept.policy != before or num_envs == 1
    assert len(kept.tracker.spans) <= 3


@pytest.mark.parametrize("ended", [False, True])
def test_it_goes_on_from_its_state(ended):
    """From any iteration, of a run that had ended too: the same policy and the same score as without an interruption."""
    rng = np.random.default_rng(1)
    played = [(rng.normal(i, 20.0, (30, 4)), rng.random((30, 4)) < 0.03) for i in range(30)]
    whole = Kept(4)
    for rollout in played:
        whole.steps(*rollout)
    for cut in (1, 7, 20, 29):
        one, two = Kept(4), Kept(4)
        for rollout in played[:cut]:
            one.steps(*rollout)
        if ended:
            one.end()
        two.iteration, two.policy = cut, one.policy
        two.episodes.load_state_dict(one.episodes.state_dict())
        two.tracker.load_state_dict(one.tracker.state_dict(lambda policy: [policy]), lambda data: data[0])
        for rollout in played[cut:]:
            two.steps(*rollout)
        assert two.end() == whole.end()


# --- runs


def best_of(result):
    """best.pt as data."""
    return load_checkpoint(result.run_dir / "checkpoints" / "best.pt")


@pytest.mark.parametrize("seed", [3, 4])
def test_a_run_that_collapses(tmp_path, seed):
    """With this learning rate all do: the policy that is kept still plays as well as is recorded, or better.

    The noise: fifty episodes whose returns spread as widely as their mean have a standard error of 14 % of it.
    """
    settings = {"num_envs": 8, "num_steps": 64, "num_iterations": 25, "learning_rate": 0.1, "anneal_lr": False}
    config = tiny(tmp_path / "run", seed=seed, **settings)
    result = train(config)
    played = evaluate_config(result.policy, config, EvaluationPlan(episodes=50, seed=1, deterministic=False))
    assert played["return_mean"] > 0.7 * result.summary["best_return_mean"]
    assert best_of(result)["best_return"] == result.summary["best_return_mean"]


def test_a_run_that_is_stopped_because_it_solved(tmp_path):
    """best.pt is what solved it."""
    settings = {"env_id": "environments:ProbeConstantReward-v0", "num_iterations": 40, "stop_at_return": 1.0}
    result = train(tiny(tmp_path / "run", **settings))
    assert result.summary["iterations"] == 4  # of 32 episodes each
    assert best_of(result)["iteration"] == 3
    assert best_of(result)["best_return"] == result.summary["best_return_mean"] == 1.0


def test_a_checkpoint_of_an_older_version_goes_on(tmp_path, monkeypatch):
    """It has no record of what is still to be judged; what it took for the best return is what a new best has to reach."""
    for record, iteration in ((0.5, 3), (2.0, None)):
        config = tiny(tmp_path / str(record), env_id="environments:ProbeConstantReward-v0")
        assert stopped_after(2, config, monkeypatch) == 143
        checkpoints = tmp_path / str(record) / "checkpoints"
        for name in ("last", "iteration-2"):
            path = checkpoints / f"{name}.pt"
            kept = {**load_checkpoint(path), "best_return": record}
            kept.pop("best", None)  # one may be a link to the other
            torch.save(kept, path)
        before = load_checkpoint(checkpoints / "best.pt")["iteration"]
        result = train(tiny(tmp_path / str(record), env_id=config.env_id, resume=config.run_dir))
        assert best_of(result)["iteration"] == (before if iteration is None else iteration)
        assert result.summary["best_return_mean"] == max(record, 1.0)
