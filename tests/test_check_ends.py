"""The ends of episodes, as vector classes of others tell them: what is not declared, what is overwritten, what is not kept."""

from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import batch_space

from fastppo import TrainingFault, UsageError, train
from fastppo.envs import check
from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.envs.multi_seed_envs import JoinedVectorEnv, many
from fastppo.errors import EnvironmentFailed
from support.runs import tiny


class Drift(VectorEnv):
    """N points that drift where they are pushed, for up to six steps; resets within the step.

    metadata: as somebody writes it. key: of the final observations in the info; None: there is none. shares: what is returned
    is one buffer, written to again. tensors: all is told in tensors.
    """

    def __init__(self, num_envs=4, key="final_obs", metadata=None, shares=False, tensors=False):
        self.num_envs, self.key, self.shares, self.tensors = num_envs, key, shares, tensors
        self.metadata = metadata or {}
        self.single_observation_space, self.single_action_space = Box(-10.0, 10.0, (3,), np.float32), Discrete(2)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.elapsed = self.np_random.integers(0, 3, self.num_envs)
        self.x = self.np_random.uniform(-1, 1, (self.num_envs, 3)).astype(np.float32)
        return self._told(self.x), {}

    def step(self, actions):
        self.elapsed += 1
        self.x[:, 0] += 0.1 * (2 * np.asarray(actions) - 1)
        done, info = self.elapsed >= 6, {}
        reward = np.zeros(self.num_envs)
        if done.any():
            info = {} if self.key is None else {self.key: self._told(self.x)}
            self.x[done] = self.np_random.uniform(-1, 1, (int(done.sum()), 3))
            self.elapsed[done] = 0
        flags = [torch.from_numpy(x) if self.tensors else x for x in (reward, done, np.zeros_like(done))]
        return self._told(self.x), *flags, info

    def _told(self, x):
        x = x if self.shares else x.copy()
        return torch.from_numpy(x) if self.tensors else x


class NextStep(Drift):
    """The same, which resets in the step after the end and declares nothing, as gymnasium's default has it."""

    def reset(self, *, seed=None, options=None):
        self.done = np.zeros(self.num_envs, bool)
        return super().reset(seed=seed)

    def step(self, actions):
        before = self.x.copy()
        _, reward, _, truncated, _ = super().step(actions)
        resetting, self.done = self.done, self.elapsed == 5
        self.x[resetting], self.elapsed[resetting] = -before[resetting], 0
        self.done &= ~resetting
        return self.x.copy(), reward, self.done.copy(), truncated, {}


class Buffered(gym.Env):
    """One environment that returns one buffer, written to again; `resets_it`: by resets too."""

    observation_space, action_space = Box(-10.0, 10.0, (3,), np.float32), Discrete(2)

    def __init__(self, resets_it=True):
        self.buffer = np.zeros(3, np.float32)
        self.resets_it = resets_it

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.elapsed = 0
        self.buffer = self.buffer if self.resets_it else np.zeros(3, np.float32)
        self.buffer[:] = self.np_random.uniform(-1, 1, 3)
        return self.buffer, {}

    def step(self, action):
        self.elapsed += 1
        self.buffer += 0.1
        return self.buffer, 1.0, self.elapsed >= 5, False, {}


SAME_STEP = {"autoreset_mode": AutoresetMode.SAME_STEP}
DECLARE = r'set metadata\["autoreset_mode"\] = AutoresetMode.SAME_STEP in its class'


@pytest.mark.parametrize("key", ["final_obs", "final_observation", "final_info"])
def test_a_reset_within_the_step_has_to_be_declared(key, tmp_path):
    """Refused by the check, and by training without it: by default the first step of every episode would be dropped."""
    with pytest.raises(UsageError, match=f"its info has {key}.*{DECLARE}"):
        train(tiny(tmp_path / "run", num_envs=4), envs=Drift(key=key))
    with pytest.raises(TrainingFault, match=rf"in step \d of the rollout: .*{DECLARE}"):
        train(tiny(tmp_path / "other", num_envs=4, check_env=False), envs=Drift(key=key))


@pytest.mark.parametrize("tensors", [False, True])
def test_a_reset_within_the_step_that_nothing_tells(tensors, tmp_path):
    """The check plays the same steps twice and finds that the action after an end counts."""
    with pytest.raises(
        UsageError, match=r"the action of the step after an end changes .* AutoresetMode.SAME_STEP if step itself"
    ):
        train(tiny(tmp_path / "run", num_envs=4), envs=Drift(key=None, tensors=tensors))


def test_gymnasiums_default_need_not_be_declared(tmp_path):
    """A class that resets in the step after the end is trained on without a word, a key of its own environments included."""
    assert check.find(NextStep(), "given") == []
    declared = Drift(key="final_info", metadata={"autoreset_mode": AutoresetMode.NEXT_STEP})
    assert check.find(declared, "given") == []  # what it declares is believed


def test_what_is_not_declared_and_could_not_be_tried_is_told():
    """Episodes that are longer than the check: the next step is taken to reset, which is a warning."""

    class Long(Drift):
        def reset(self, **kwargs):
            result = super().reset(**kwargs)
            self.elapsed -= 1000
            return result

    (finding,) = check.find(Long(key=None), "given")
    assert "so NEXT_STEP is taken" in finding.line
    assert not finding.is_error


def test_the_class_of_many_seeds_is_checked_as_one_is():
    """What joins the environments of several seeds copies their observations, which hid an overwritten one."""
    (finding,) = check.find(many(lambda n: Drift(n, metadata=SAME_STEP, shares=True), 4, 2), "gymnasium/entry-point")
    assert finding.line.startswith("final_obs is overwritten")


@pytest.mark.parametrize("form", ["array of objects", "list", "one array where all end"])
def test_final_observations_of_many_seeds(form):
    """One seed's environments all end, another's some, another's none: each end has its final observation."""

    class Objects(Drift):
        def step(self, actions):
            obs, reward, terminated, truncated, info = super().step(actions)
            if info:
                rows = [row if over else None for row, over in zip(info["final_obs"], terminated, strict=True)]
                if form == "array of objects":
                    info["final_obs"] = np.full(self.num_envs, None)
                    info["final_obs"][:] = rows
                else:
                    info["final_obs"] = rows if form == "list" else np.array(rows, dtype=object)
            return obs, reward, terminated, truncated, info

    parts = [Objects(2, metadata=SAME_STEP) for _ in range(3)]
    envs = AutoresetEnvs(JoinedVectorEnv(parts))
    first = envs.reset([1, 2, 3])
    for part, elapsed in zip(parts, ([5, 5], [0, 5], [0, 0]), strict=True):
        part.elapsed[:] = elapsed
    step = envs.step(np.ones(6, np.int64))
    np.testing.assert_array_equal(step.terminated, [True, True, False, True, False, False])
    np.testing.assert_allclose(step.final_obs, first + np.array([0.1, 0.0, 0.0], np.float32), rtol=1e-6)


def test_a_reset_within_the_step_is_found_in_many_seeds():
    """final_info alone says it, of one seed."""
    parts = [Drift(2, key="final_info") for _ in range(2)]
    envs = AutoresetEnvs(JoinedVectorEnv(parts))
    envs.reset([1, 2])
    parts[1].elapsed[:] = 5
    with pytest.raises(EnvironmentFailed, match=DECLARE):
        envs.step(np.ones(4, np.int64))


@pytest.mark.parametrize("key", ["final_obs", "final_observation"])
@pytest.mark.parametrize("tensors", [False, True])
def test_a_declared_reset_within_the_step(key, tensors, tmp_path):
    """All rows count; the older key is read as well."""
    envs = Drift(key=key, metadata=SAME_STEP, tensors=tensors)
    assert check.find(envs, "given") == []
    assert train(tiny(tmp_path / "run", num_envs=4), envs=envs).summary["global_step"] == 4 * 16 * 4


@pytest.mark.parametrize("final", [None, [None] * 4, np.full(4, None)], ids=["no key", "list", "array"])
def test_a_missing_final_observation_is_refused(final):
    """None is not written into the rollout as nan."""
    envs = Drift(key=None, metadata=SAME_STEP)
    step = envs.step
    envs.step = lambda actions: (*step(actions)[:4], {} if final is None else {"final_obs": final})
    adapted = AutoresetEnvs(envs)
    adapted.reset(0)
    envs.elapsed[:] = 5
    with pytest.raises(EnvironmentFailed, match="environment 0: an episode ended and its final_obs is not in the info"):
        adapted.step(np.ones(4, np.int64))


@pytest.mark.parametrize(
    "envs",
    [
        pytest.param(lambda: Drift(metadata=SAME_STEP, shares=True), id="one buffer"),
        pytest.param(lambda: Drift(metadata=SAME_STEP, shares=True, tensors=True), id="one buffer of tensors"),
        pytest.param(lambda: SyncVectorEnv([Buffered] * 4, autoreset_mode=AutoresetMode.SAME_STEP), id="environments"),
    ],
)
def test_a_final_observation_that_is_overwritten(envs):
    """It is the next episode's first one: truncated episodes would be bootstrapped from there."""
    (finding,) = [finding for finding in check.find(envs(), "given") if finding.is_error]
    assert finding.line.startswith("final_obs is overwritten")


def test_final_observations_that_are_equal_for_another_reason():
    """Always the same as the next first one, in memory of its own: a warning where observations move, else nothing."""

    class Home(Drift):
        def step(self, actions):
            obs, *rest, info = super().step(actions)
            return obs, *rest, {name: obs.copy() for name in info}

    (finding,) = check.find(Home(metadata=SAME_STEP), "given")
    assert finding.line.startswith("final_obs equals the next episode's first observation in all")
    assert not finding.is_error

    class Constant(Home):
        def _told(self, x):
            return np.ones_like(x)

    assert [f for f in check.find(Constant(metadata=SAME_STEP), "given") if "final" in f.line] == []


@pytest.mark.parametrize("mode", list(AutoresetMode), ids=str)
def test_reused_buffers_are_no_fault(mode):
    """Environments that return one buffer, written to by the next step: training copies what it keeps, in every mode."""
    envs = SyncVectorEnv([lambda: Buffered(resets_it=False)] * 4, copy=False, autoreset_mode=mode)
    assert check.find(envs, "given") == []


# --- statistics that are lost


def normalised(wrapper, **kwargs):
    return lambda: wrapper(gym.make("Pendulum-v1"), **kwargs)


gym.register("NormalisedInside-v0", entry_point=normalised(gym.wrappers.NormalizeObservation))
OBS, REWARD = gym.wrappers.NormalizeObservation, gym.wrappers.NormalizeReward
STATISTICS = {
    "observations": (lambda: SyncVectorEnv([normalised(OBS)] * 2), "NormalizeObservation", "--norm-obs"),
    "rewards": (lambda: SyncVectorEnv([normalised(REWARD)] * 2), "NormalizeReward", "--norm-reward"),
    "of all observations": (
        lambda: gym.wrappers.vector.NormalizeObservation(SyncVectorEnv([lambda: gym.make("Pendulum-v1")] * 2)),
        "NormalizeObservation",
        "--norm-obs",
    ),
    "of all rewards": (
        lambda: gym.wrappers.vector.NormalizeReward(SyncVectorEnv([lambda: gym.make("Pendulum-v1")] * 2)),
        "NormalizeReward",
        "--norm-reward",
    ),
    "in other processes": (lambda: AsyncVectorEnv([normalised(OBS)] * 2), "a wrapper", "--norm-obs"),
}


def lines_on_statistics(findings):
    return [finding.line for finding in findings if "running statistics" in finding.line]


@pytest.mark.parametrize("which", STATISTICS)
def test_running_statistics_of_a_wrapper_are_told(which):
    """They are not kept with the run: the line names the wrapper and the flag that keeps ours."""
    make, wrapper, flag = STATISTICS[which]
    envs = make()
    (line,) = lines_on_statistics(check.find(envs, "given"))
    assert line.startswith(f"the environment is inside {wrapper}, whose running statistics are not kept")
    assert line.endswith(f"use {flag}")
    envs.close()


def test_running_statistics_of_environments_by_their_id():
    """Found on the copies that the check makes; statistics that are frozen are nobody's to keep."""
    envs = gym.make_vec("NormalisedInside-v0", 2, "sync")
    assert len(lines_on_statistics(check.try_copy(partial(gym.make, "NormalisedInside-v0"), 2).findings)) == 1
    for env in envs.envs:
        while not isinstance(env, OBS):
            env = env.env
        env.update_running_mean = False
    assert lines_on_statistics(check.find(envs, "given")) == []
    envs.close()


# --- numbers that float32 cannot hold


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@pytest.mark.parametrize("what", ["observation", "reward"])
def test_numbers_beyond_float32_are_called_that(what, tmp_path):
    """A finite 1e39 is not called infinite: by the check, and by training, which no longer has the number."""

    class Large(gym.Env):
        observation_space, action_space = Box(-np.inf, np.inf, (2,), np.float64), Discrete(2)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return np.zeros(2), {}

        def step(self, action):
            large = {what: 1e39}
            return np.full(2, large.get("observation", 0.0)), large.get("reward", 0.0), False, False, {}

    with pytest.raises(UsageError, match=rf"{what} is too large for float32 \(1e\+39\) after a step"):
        train(tiny(tmp_path / "run"), envs=SyncVectorEnv([Large] * 2))
    with pytest.raises(TrainingFault, match="infinite or too large for float32"):
        train(tiny(tmp_path / "other", check_env=False), envs=SyncVectorEnv([Large] * 2))
