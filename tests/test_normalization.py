"""Running statistics of observations and returns, held against numpy, Stable-Baselines3, gymnasium and arithmetic by hand."""

from dataclasses import replace

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv
from gymnasium.wrappers.vector import NormalizeReward
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.vec_env import VecNormalize
from stable_baselines3.common.vec_env.base_vec_env import VecEnv

from fastppo import TrainingFault, load_policy, train
from fastppo.core.contracts import Normalization, normalize_obs
from fastppo.export import export_policy
from fastppo.policy.normalization import (
    RunningMoments,
    discounted_return,
    init_moments,
    inverse_std,
    make_normalization,
    update_moments,
)
from fastppo.policy.spaces import obs_spec
from fastppo.run.metrics_file import read_rows
from support.resume import differing, result_of
from support.runs import Recorder, tiny


@pytest.mark.parametrize("shape", [(), (3,), (2, 4)])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_moments_equal_numpy_over_uneven_batches(shape, offset):
    """Mean and population variance of every valid row seen, whatever the batches were, and with a mean of a million sigmas.

    Rows of weight 0 hold nan: they are not there.
    """
    generator = torch.Generator().manual_seed(0)
    moments, seen = init_moments(shape), []
    for rows in (1, 7, 128, 2, 300, 1):
        scale = 1.0 + torch.rand((), generator=generator, dtype=torch.float64)
        x = offset + scale * torch.randn(rows, *shape, generator=generator, dtype=torch.float64) + rows / 100
        weight = (torch.rand(rows, generator=generator) < 0.7).double()
        x[weight == 0] = torch.nan
        moments = update_moments(moments, x, weight)
        seen.append(x[weight > 0].numpy())
    everything = np.concatenate(seen)
    assert moments.count.item() == len(everything)
    np.testing.assert_allclose(moments.mean.numpy(), everything.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(moments.var.numpy(), everything.var(0), rtol=1e-8)


def test_moments_of_float32_and_uint8_rows_are_float64():
    """Observations come as the environment gives them; the statistics do not round to their dtype."""
    x = (1e6 + torch.arange(1000.0)).reshape(-1, 1)  # float32 holds these integers exactly
    moments = update_moments(init_moments((1,)), x, torch.ones(1000))
    # mean 10^6 + 499.5, population variance (1000^2 - 1) / 12 = 83333.25
    assert moments.mean.dtype == moments.var.dtype == moments.count.dtype == torch.float64
    assert moments.mean.item() == pytest.approx(1000499.5, rel=1e-14)
    assert moments.var.item() == pytest.approx(83333.25, rel=1e-9)
    image = torch.tensor([[250], [254]], dtype=torch.uint8)  # mean 252, variance 4; 250 + 254 does not fit a byte
    moments = update_moments(init_moments((1,)), image, torch.ones(2))
    assert (moments.mean.item(), moments.var.item()) == (252.0, 4.0)


def test_a_batch_without_a_valid_row_changes_nothing():
    """All environments resetting at once: same bits, from a fresh state and from one that has seen something."""
    garbage = torch.full((5, 2), 1e30)
    fresh = init_moments((2,))
    used = update_moments(fresh, torch.tensor([[1.0, 2.0], [3.0, 7.0], [4.0, 4.0]]), torch.ones(3))
    for moments in (fresh, used):
        after = update_moments(moments, garbage, torch.zeros(5))
        assert all(torch.equal(x, y) for x, y in zip(moments, after, strict=True))


def test_moments_by_hand():
    """Rows 1, 3 then 8: mean 4, variance ((1-4)^2 + (3-4)^2 + (8-4)^2) / 3 = 26/3, count 3."""
    moments = update_moments(init_moments(()), torch.tensor([1.0, 3.0]), torch.ones(2))
    assert [x.item() for x in moments] == [2.0, 1.0, 2.0]
    moments = update_moments(moments, torch.tensor([8.0, 55.0]), torch.tensor([1.0, 0.0]))
    assert moments.mean.item() == pytest.approx(4.0, rel=1e-15)
    assert moments.var.item() == pytest.approx(26 / 3, rel=1e-15)
    assert moments.count.item() == 3.0


def test_inverse_std():
    """1 before anything is seen, 1/std after (variance 4 gives 1/2), finite for a constant; float32, as the networks are."""
    assert torch.equal(inverse_std(init_moments((3,))), torch.ones(3))
    one = torch.ones((), dtype=torch.float64)
    scale = inverse_std(RunningMoments(one, 4 * one, one))
    assert scale.dtype == torch.float32
    assert scale.item() == pytest.approx(0.5, rel=1e-6)
    # a variance of 0 leaves only eps: 1 / sqrt(1e-8) = 1e4
    assert inverse_std(RunningMoments(one, 0 * one, one)).item() == pytest.approx(1e4, rel=1e-6)


def test_normalize_obs_by_hand():
    """(obs - mean) * scale, clamped at 10 on both sides; statistics of None leave the observation as it is."""
    zero, one = torch.zeros(()), torch.ones(())
    normalization = Normalization({"obs": torch.tensor([1.0, 100.0])}, {"obs": torch.tensor([2.0, 0.5])}, None, zero, one)
    obs = torch.tensor([[2.0, 104.0], [6.01, 79.9], [-3.99, 121.0]])
    # (2-1)*2 = 2, (104-100)/2 = 2;  5.01*2 = 10.02 -> 10, -20.1/2 = -10.05 -> -10;  -4.99*2 = -9.98, 21/2 = 10.5 -> 10
    expected = torch.tensor([[2.0, 2.0], [10.0, -10.0], [-9.98, 10.0]])
    torch.testing.assert_close(normalize_obs(obs, normalization), expected)
    off = Normalization(None, None, None, zero, one)
    assert torch.equal(normalize_obs(obs, off), obs)
    pixels = torch.tensor([[255]], dtype=torch.uint8)
    assert normalize_obs(pixels, off) is pixels  # the network turns them into numbers, a minibatch at a time
    leaves = normalize_obs(
        {"obs.x": obs, "obs.image": pixels},
        normalization._replace(
            obs_mean={"obs.x": normalization.obs_mean["obs"]}, obs_scale={"obs.x": normalization.obs_scale["obs"]}
        ),
    )
    torch.testing.assert_close(leaves["obs.x"], expected)
    assert leaves["obs.image"] is pixels


# --- discounted returns ---


def test_discounted_return_by_hand():
    """R runs on within an episode, starts at 0 after its end, and a resetting row counts as no reward (gamma = 1/2)."""
    reward = torch.tensor([[1.0], [2.0], [4.0], [100.0], [8.0], [16.0]])
    done = torch.tensor([[0], [0], [1], [0], [0], [0]], dtype=torch.bool)
    valid = torch.tensor([[1], [1], [1], [0], [1], [1]], dtype=torch.bool)  # row 3 resets
    running, carry = discounted_return(reward, done, valid, torch.tensor([6.0]), 0.5)
    # 1 + 6/2 = 4;  2 + 4/2 = 4;  4 + 4/2 = 6;  cut, no reward: 0;  8 + 0 = 8;  16 + 8/2 = 20
    assert running.squeeze(-1).tolist() == [4.0, 4.0, 6.0, 0.0, 8.0, 20.0]
    assert carry.tolist() == [20.0]


def test_an_end_in_the_last_row_leaves_no_carry():
    """The next rollout begins a new episode where this one ended with it, and goes on where it did not."""
    done = torch.tensor([[False, False], [True, False]])
    _, carry = discounted_return(torch.ones(2, 2), done, torch.ones(2, 2, dtype=torch.bool), torch.zeros(2), 0.5)
    assert carry.tolist() == [0.0, 1.5]  # 1 + 1/2


def stream(num_steps, num_envs, seed):
    """reward, done, valid (T, N) of environments that reset on the step after an end; garbage rewards in those steps."""
    generator = torch.Generator().manual_seed(seed)
    reward = torch.randn(num_steps, num_envs, generator=generator, dtype=torch.float64)
    done = torch.rand(num_steps, num_envs, generator=generator) < 0.2
    for t in range(1, num_steps):
        done[t] &= ~done[t - 1]  # a resetting step ends nothing
    valid = torch.cat((torch.ones(1, num_envs, dtype=torch.bool), ~done[:-1]))
    reward[~valid] = 100.0
    return reward, done, valid


def test_chunks_with_the_carry_equal_one_run():
    """Where a rollout is cut makes no difference to the returns, ends on the cut included."""
    reward, done, valid = stream(60, 16, seed=1)
    assert done[9].any()  # some episode ends in the last row of the first chunk
    assert done[10].any()
    whole, last = discounted_return(reward, done, valid, torch.zeros(16, dtype=torch.float64), 0.9)
    carry, pieces = torch.zeros(16, dtype=torch.float64), []
    for rows in (slice(0, 10), slice(10, 11), slice(11, 43), slice(43, 60)):
        piece, carry = discounted_return(reward[rows], done[rows], valid[rows], carry, 0.9)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(carry, last, rtol=0, atol=1e-12)


class ScriptedVecEnv(VecEnv):
    """A Stable-Baselines3 environment that plays back rewards and ends; it resets within the step, so every row is valid."""

    def __init__(self, reward, done):
        super().__init__(reward.shape[1], gymnasium.spaces.Box(-1, 1, (1,)), gymnasium.spaces.Discrete(2))
        self.rows = iter(zip(reward.numpy(), done.numpy(), strict=True))

    def reset(self):
        return np.zeros((self.num_envs, 1), np.float32)

    def step_async(self, actions):
        pass

    def step_wait(self):
        reward, done = next(self.rows)
        return self.reset(), reward, done, [{} for _ in done]

    def close(self):
        pass

    get_attr = set_attr = env_method = env_is_wrapped = lambda self, *args, **kwargs: [None] * self.num_envs


def test_discounted_return_and_its_variance_equal_stable_baselines():
    """The scale of the rewards is VecNormalize's: same running returns over ends, and the same variance after all of them.

    SB3 has no resetting rows. Ours are compacted away for it, by playing one environment's valid rows.
    """
    reward, done, valid = stream(400, 1, seed=2)
    running, _ = discounted_return(reward, done, valid, torch.zeros(1, dtype=torch.float64), 0.9)
    moments = update_moments(init_moments(()), running.flatten(), valid.flatten())

    kept = valid.squeeze(-1)
    env = VecNormalize(ScriptedVecEnv(reward[kept], done[kept]), norm_obs=False, gamma=0.9)
    env.reset()
    for i, expected in enumerate(running[kept]):
        _, _, ended, _ = env.step(np.zeros(1))
        if not ended[0]:  # VecNormalize zeroes it before it can be read
            assert env.returns[0] == pytest.approx(expected.item(), abs=1e-9), i
    # SB3's statistics start from a count of 1e-4 at mean 0 and variance 1
    assert env.ret_rms.var == pytest.approx(moments.var.item(), rel=1e-4)


class ScriptedVectorEnv(gymnasium.vector.VectorEnv):
    """A gymnasium vector environment that plays back rewards and never ends."""

    def __init__(self, reward):
        self.num_envs = reward.shape[1]
        self.single_observation_space = self.observation_space = gymnasium.spaces.Box(-1, 1, (self.num_envs, 1))
        self.single_action_space = self.action_space = gymnasium.spaces.MultiDiscrete([2] * self.num_envs)
        self.metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.NEXT_STEP}
        self.rows = iter(reward.numpy())

    def reset(self, *, seed=None, options=None):
        return np.zeros((self.num_envs, 1)), {}

    def step(self, actions):
        off = np.zeros(self.num_envs, bool)
        return np.zeros((self.num_envs, 1)), next(self.rows), off, off, {}


def test_discounted_return_equals_gymnasium_within_an_episode():
    """The recurrence inside an episode is gymnasium's NormalizeReward, for several environments at once.

    Only inside: at an end gymnasium 1.4 drops the past one step early (the terminal reward stands alone) and carries it
    over a time limit, which Stable-Baselines3 and fastppo do not.
    """
    reward = torch.randn(50, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    off = torch.zeros(50, 3, dtype=torch.bool)
    running, _ = discounted_return(reward, off, ~off, torch.zeros(3, dtype=torch.float64), 0.9)
    env = NormalizeReward(ScriptedVectorEnv(reward), gamma=0.9)
    env.reset()
    for expected in running:
        env.step(np.zeros(3, int))
        np.testing.assert_allclose(env.accumulated_reward, expected.numpy(), rtol=1e-4, atol=1e-5)  # theirs is float32


# --- digits


OFFSETS = {"float64": 1.7e9, "int64": 1.7e12, "uint64": 1.7e12, "int32": 1.7e9, "uint32": 4.0e9}


@pytest.mark.parametrize("dtype", OFFSETS)
@given(offset=st.integers(-8, 8), scale=st.sampled_from([1, 1000]))
@settings(max_examples=5, deadline=None, derandomize=True)
def test_wide_numbers_keep_their_digits(dtype, offset, scale):
    """A time in seconds or milliseconds, plus 0 to 9: normalised as 0 to 9 are, whatever float32 would leave of it."""
    start = int(OFFSETS[dtype]) - 10_000 + offset
    small = torch.arange(10, dtype=torch.float64).reshape(10, 1) * scale
    x = torch.from_numpy((small.numpy() + start).astype(dtype))
    space = obs_spec(gymnasium.spaces.Box(0, np.iinfo(np.int32).max, (1,), np.dtype(dtype).type), normalize=True)
    (leaf,) = space
    assert leaf.dtype == x.dtype
    assert space.wide == {"obs"}
    moments = update_moments(init_moments((1,)), x, torch.ones(10))
    seen = normalize_obs(x, make_normalization({"obs": moments}, None, torch.zeros(()), torch.ones(()), space.wide))
    assert seen.dtype == torch.float32
    torch.testing.assert_close(seen, ((small - small.mean()) / small.std(correction=0)).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "normalize"), [("float32", True), ("float16", True), ("int16", True), ("float64", False)])
def test_other_numbers_are_normalised_in_float32(dtype, normalize):
    """What float32 holds costs no more than before, and 64 bits are stored only where a mean is subtracted from them."""
    space = obs_spec(gymnasium.spaces.Box(0, 100, (3,), np.dtype(dtype).type), normalize=normalize)
    (leaf,) = space
    assert leaf.dtype == (torch.int16 if dtype == "int16" else torch.float32)
    assert space.wide == set()


class Clock(gymnasium.Env):
    """Twenty steps, each of which pays its number; observed is that number times `scale` plus `offset`."""

    action_space = gymnasium.spaces.Discrete(2)

    def __init__(self, scale=1.0, offset=0.0, dtype=np.float64):
        self.scale, self.offset, self.dtype = scale, offset, dtype
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), dtype)

    def seen(self):
        return (np.array([self.t, self.t % 4]) * self.scale + self.offset).astype(self.dtype)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.seen(), {}

    def step(self, action):
        self.t += 1
        return self.seen(), float(self.t), self.t == 20, False, {}


def clocks(**each):
    return SyncVectorEnv([lambda: Clock(**each)] * 2)


def clock_run(run_dir, each, **changed):
    """A run on two Clocks made with `each`, whose observations are normalised."""
    return train(tiny(run_dir, num_steps=60, norm_obs=True, check_env=False, **changed), envs=clocks(**each))


def losses(result):
    return [float(row["value_loss"]) for row in read_rows(result.run_dir / "metrics.csv")]


def test_a_run_on_large_numbers(tmp_path):
    """float64 observations around 1.7e9 are learned from as those around 0, and acted on by the policy that is kept."""
    far = clock_run(tmp_path / "far", {"offset": 1.7e9})
    near = clock_run(tmp_path / "near", {})
    assert losses(far) == pytest.approx(losses(near), rel=1e-3)
    t = np.arange(20.0)
    obs = np.stack([t, t % 4], -1)
    for kept in (far.policy, load_policy(far.run_dir), load_policy(far.run_dir, "last")):
        values = kept.value(obs + 1.7e9)
        assert len(set(values.tolist())) == 20
        assert kept.value((obs + 1.7e9).tolist()).tolist() == values.tolist()  # lists have digits too
        np.testing.assert_array_equal(kept.value(torch.from_numpy(obs + 1.7e9)).numpy(), values)
        assert kept.act(obs + 1.7e9).shape == (20,)
    np.testing.assert_allclose(far.policy.value(obs + 1.7e9), near.policy.value(obs), rtol=1e-2, atol=1e-2)


def test_they_go_on_and_are_exported(tmp_path):
    """The digits come back from a checkpoint, and stand in an exported file."""
    exact = {"exact_resume": True, "checkpoint_iterations": 1}
    clock_run(tmp_path / "whole", {"offset": 1.7e9}, **exact)
    config = tiny(tmp_path / "parted", num_steps=60, norm_obs=True, check_env=False, **exact)
    with pytest.raises(TrainingFault):
        train(config, envs=clocks(offset=1.7e9), callbacks=[Recorder(fail=2)])
    train(replace(config, resume=config.run_dir), envs=clocks(offset=1.7e9))
    assert differing(result_of(tmp_path / "whole"), result_of(tmp_path / "parted")) == []
    policy = load_policy(tmp_path / "whole")
    export_policy(policy, tmp_path / "policy.pt2", "torch")
    obs = 1.7e9 + torch.arange(40, dtype=torch.float64).reshape(20, 2)
    acted = torch.export.load(tmp_path / "policy.pt2").module()({"obs": obs})
    assert acted.tolist() == policy.act(obs).tolist()


# --- what the first update sees


def test_the_first_update_sees_normalised_observations(tmp_path):
    """Observations a thousand times as large, and far from 0, give the first update the losses that small ones give."""
    large = losses(clock_run(tmp_path / "large", {"scale": 1e3, "offset": 5e3}, num_iterations=1))
    small = losses(clock_run(tmp_path / "small", {}, num_iterations=1))
    assert large == pytest.approx(small, rel=1e-3)


def test_the_first_update_sees_scaled_rewards(tmp_path):
    """Rewards a hundred thousand times as large give every update, the first one included, the losses that small ones give."""
    found = []
    for number in (1.0, 1e5):
        result = train(tiny(tmp_path / f"{number}", env_id="Pendulum-v1", norm_reward=True), envs=Paid(number))
        found.append(losses(result))
    assert found[1] == pytest.approx(found[0], rel=1e-3)


class Paid(gymnasium.vector.VectorWrapper):
    """Two pendulums whose rewards are `number` times as large."""

    def __init__(self, number):
        super().__init__(gymnasium.make_vec("Pendulum-v1", num_envs=2, vectorization_mode="sync"))
        self.number = number

    def step(self, actions):
        obs, reward, *rest = super().step(actions)
        return obs, reward * self.number, *rest
