"""Environments of tensors: the same numbers as their twins of arrays, and nothing on the way becomes an array."""

import contextlib
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
import torch
from environments import WalkVector
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import AutoresetMode, VectorEnv
from tensordict import TensorDict
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.data import Binary, Bounded, Categorical, Composite, MultiCategorical, OneHot, Unbounded
from torchrl.envs import CatTensors, Compose, EnvBase, PendulumEnv, StepCounter, TransformedEnv, UnsqueezeTransform

from fastppo import TrainConfig, TrainingFault, UsageError, train
from fastppo.envs.deadline import Deadline
from fastppo.envs.factory import EnvConfig, default_vectorization, make_gymnasium_envs
from fastppo.envs.torchrl import TorchRLVectorEnv
from fastppo.policy.spaces import action_spec
from fastppo.rollout.step_collector import HostCollector, TensorCollector
from support.runs import rows_of
from support.tensor_envs import KINDS, TensorTwin, act, started


class Still(VectorEnv):
    """Nothing ever happens, in tensors only; with `final`, SAME_STEP with dense final observations."""

    single_observation_space, single_action_space, num_envs = Box(-1.0, 1.0, (2,)), Discrete(2), 3

    def __init__(self, final):
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP if final else AutoresetMode.NEXT_STEP}
        self.info = {"final_obs": torch.zeros(3, 2)} if final else {}

    def reset(self, *, seed=None, options=None):
        return torch.zeros(3, 2), {}

    def step(self, actions):
        ends = torch.zeros(2, 3, dtype=torch.bool)
        return torch.zeros(3, 2), torch.ones(3), ends[0], ends[1], self.info


class Counter(EnvBase):
    """A TorchRL environment of any batch size: observes (elapsed, length, number) and ends after 2 to 6 steps.

    It terminates where the length is even, else it is truncated. An action equal to `number` pays 1, any other a quarter of
    itself. `played` holds its finished episodes as (index, return), in the order of time.
    """

    def __init__(self, batch_size, action="categorical"):
        super().__init__(batch_size=batch_size, device="cpu")
        batch = self.batch_size
        self.observation_spec = Composite(state=Bounded(0.0, 6.0, (*batch, 3)), shape=batch)
        self.action_spec = {
            "categorical": Categorical(3, shape=batch),
            "one-hot": OneHot(3, shape=(*batch, 3)),
            "box": Bounded(0.0, 2.0, (*batch, 1), dtype=torch.float64),
        }[action]
        self.reward_spec = Unbounded((*batch, 1))
        self.full_done_spec = Composite(
            {key: Binary(1, shape=(*batch, 1), dtype=torch.bool) for key in ("done", "terminated", "truncated")}, shape=batch
        )
        self.generator = torch.Generator()
        self.state, self.running, self.played, self.received = torch.zeros(*batch, 3), torch.zeros(batch), [], []

    def _set_seed(self, seed):
        self.generator.manual_seed(seed)

    def _reset(self, tensordict, **kwargs):
        mask = torch.ones(self.batch_size, dtype=torch.bool)
        if tensordict is not None and "_reset" in tensordict:
            mask = tensordict["_reset"].reshape(self.batch_size)
        fresh = torch.zeros_like(self.state)
        fresh[..., 1] = torch.randint(2, 7, self.batch_size, generator=self.generator)
        fresh[..., 2] = torch.randint(3, self.batch_size, generator=self.generator)
        self.state = torch.where(mask[..., None], fresh, self.state)
        self.running = torch.where(mask, 0.0, self.running)
        return TensorDict({"state": self.state}, self.batch_size)

    def _step(self, tensordict):
        action = tensordict["action"]
        self.received.append(action)
        if isinstance(self.action_spec, OneHot):
            action = action.long().argmax(-1)
        action = action.reshape(self.batch_size)
        reward = torch.where(action == self.state[..., 2], 1.0, 0.25 * action).float()
        self.state = self.state + torch.tensor([1.0, 0.0, 0.0])
        done = self.state[..., 0] == self.state[..., 1]
        even = self.state[..., 1] % 2 == 0
        self.running = self.running + reward
        index = done.flatten().nonzero().flatten()
        self.played += zip(index.tolist(), self.running.flatten()[index].tolist(), strict=True)
        outcome = {"state": self.state, "reward": reward, "done": done, "terminated": done & even, "truncated": done & ~even}
        shaped = {key: value if key == "state" else value[..., None] for key, value in outcome.items()}
        return TensorDict(shaped, self.batch_size)


MADE = []  # the Counters that the id below has made


def make_counter(num_envs, **kwargs):
    MADE.append(Counter([num_envs], **kwargs))
    return TorchRLVectorEnv(MADE[-1])


def make_pendulum(num_envs):
    """TorchRL's own, as its tutorial makes it: stateless, of any batch size, cut by a StepCounter."""
    angles = ["th", "thdot"]
    joined = (
        UnsqueezeTransform(in_keys=angles, dim=-1, in_keys_inv=angles),
        CatTensors(in_keys=angles, out_key="observation", del_keys=False),
    )
    env = TransformedEnv(PendulumEnv(), Compose(*joined, StepCounter(max_steps=10)))
    return TorchRLVectorEnv(env, obs_key="observation", num_envs=num_envs)


gym.register("TensorTwin-v0", vector_entry_point=TensorTwin)
gym.register("Counter-v0", vector_entry_point=make_counter)
gym.register("TorchRLPendulum-v0", vector_entry_point=make_pendulum)
gym.register("ThreeOfThem-v0", vector_entry_point=lambda num_envs: TensorTwin(3))
gym.register("Refused-v0", vector_entry_point=lambda num_envs: TorchRLVectorEnv(Counter([num_envs]), obs_key="nothing"))


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize(("mode", "final"), KINDS)
def test_the_same_rollout_as_its_twin_of_arrays(mode, final, cut):
    """Every row of every key, bit for bit, and the account of it, in each autoreset mode, over the ends of rollouts."""
    tensors, tensor_rollout, noise = started(TensorTwin(4, mode, final), 7)
    arrays, array_rollout, _ = started(WalkVector(4, mode), 7)
    assert isinstance(tensors, TensorCollector)
    assert isinstance(arrays, HostCollector)
    ended = 0
    for _ in range(10):
        for collector in (tensors, arrays):
            if cut:
                collector.reset(None)
            collector.collect(act, noise, cut)
        assert set(tensor_rollout.keys()) == set(array_rollout.keys())
        for key, rows in array_rollout.items():
            assert torch.equal(rows, tensor_rollout[key]), key
        for ours, theirs in zip(tensors.outcomes(), arrays.outcomes(), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        ended += int((array_rollout["terminated"] | array_rollout["truncated"]).sum())
    assert ended > 20  # or no reset was compared


@pytest.mark.parametrize(("mode", "final"), KINDS)
def test_no_tensor_becomes_an_array(mode, final, monkeypatch):
    """From the action to the end of the rollout; on a GPU each conversion would wait for the device, or fail."""

    def refuse(*args, **kwargs):
        raise AssertionError("a tensor became an array")

    collector, _, noise = started(TensorTwin(4, mode, final), 30)
    monkeypatch.setattr(torch.Tensor, "numpy", refuse)
    monkeypatch.setattr(torch.Tensor, "__array__", refuse)
    collector.collect(act, noise)


@pytest.mark.parametrize("final", [False, True])
def test_one_wait_for_the_device_in_a_rollout(final):
    """The check that all numbers are finite reads one flag; no step reads any."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    collector, _, noise = started(Still(final), 30)
    with Reads() as reads:
        collector.collect(act, noise)
    assert reads.count == 1


@pytest.mark.parametrize(("mode", "final"), KINDS)
def test_a_run_on_its_twin_of_arrays(tmp_path, mode, final):
    """The whole trainer, statistics, metrics, episode returns and evaluation included, ends with the same bits."""
    kept = []
    for env_id, env_kwargs in (("environments:WalkVector-v0", {}), ("TensorTwin-v0", {"final": final})):
        config = TrainConfig(
            env_id=env_id,
            env_kwargs={"mode": mode, **env_kwargs},
            num_envs=4,
            num_steps=16,
            num_iterations=3,
            norm_obs=True,
            norm_reward=True,
            eval_episodes=9,
            run_dir=str(tmp_path / env_id.replace(":", "-")),
        )
        result = train(config)
        times = {"seconds", "sps", "env_share", "act_share", "learn_share"}
        rows = [{key: row[key] for key in row if key not in times} for row in rows_of(result.run_dir)]
        summary = {key: result.summary[key] for key in ("global_step", "eval_return_mean", "eval_return_std", "eval_episodes")}
        kept.append((result.policy.params, rows, summary))
    assert torch.equal(kept[0][0], kept[1][0])
    assert kept[0][1:] == kept[1][1:]
    assert len(kept[0][1]) == 3


@pytest.mark.parametrize("action", ["categorical", "one-hot", "box"])
def test_a_torchrl_environment_trains(tmp_path, action):
    """Two iterations and an evaluation; the episodes logged are those that the environment itself has counted."""
    MADE.clear()
    result = train(
        TrainConfig(
            env_id="Counter-v0",
            env_kwargs={"action": action},
            check_env=False,  # its episodes would be counted too
            num_envs=5,
            num_steps=16,
            num_minibatches=4,
            num_iterations=2,
            eval_episodes=5,
            run_dir=str(tmp_path / "run"),
        )
    )
    trained, evaluated = MADE
    assert result.summary["global_step"] == 2 * 5 * 16  # no row goes to a reset
    last = rows_of(result.run_dir)[-1]
    returns = [value for _, value in trained.played]
    assert int(last["episodes"]) == len(returns) > 20
    assert float(last["episodic_return_mean"]) == pytest.approx(np.mean(returns[-100:]), rel=1e-5)
    first = dict(reversed(evaluated.played))  # one episode of each
    assert result.summary["eval_episodes"] == len(first) == 5
    assert result.summary["eval_return_mean"] == pytest.approx(np.mean(list(first.values())), rel=1e-5)
    dtype, shape = {"categorical": (torch.int64, (5,)), "one-hot": (torch.bool, (5, 3)), "box": (torch.float64, (5, 1))}[action]
    assert {(received.dtype, tuple(received.shape)) for received in trained.received} == {(dtype, shape)}


def test_torchrls_own_pendulum_trains(tmp_path):
    """A stateless environment of torchrl, under transforms: cut after 10 steps, never terminated."""
    result = train(
        TrainConfig(
            env_id="TorchRLPendulum-v0",
            num_envs=4,
            num_steps=25,
            num_minibatches=4,
            num_iterations=2,
            eval_episodes=4,
            run_dir=str(tmp_path / "run"),
        )
    )
    last = rows_of(result.run_dir)[-1]
    assert [int(row["truncations"]) + int(row["terminations"]) for row in rows_of(result.run_dir)] == [8, 12]
    assert float(last["episodic_length_mean"]) == 10.0
    assert float(last["terminations"]) == 0.0
    assert -170.0 < result.summary["eval_return_mean"] < 0.0


@pytest.mark.parametrize("batch_size", [(6,), (2, 3), ()])
def test_final_observations_of_a_torchrl_environment(batch_size):
    """Where an episode ends, final_obs is its last observation (elapsed = length) and the next row a first one; elsewhere what

    an action led to is the row below. Terminated and truncated are told apart.
    """
    vector = TorchRLVectorEnv(Counter(batch_size))
    collector, rollout, noise = started(vector, 40)
    collector.collect(act, noise)
    obs, final, following = rollout["obs"][:-1], rollout["final_obs"][:-1], rollout["obs"][1:]
    done = (rollout["terminated"] | rollout["truncated"])[:-1]
    assert rollout["valid"].all()
    assert torch.equal(done, obs[..., 0] + 1 == obs[..., 1])
    assert torch.equal(rollout["terminated"][:-1], done & (obs[..., 1] % 2 == 0))
    assert torch.equal(rollout["truncated"][:-1], done & (obs[..., 1] % 2 == 1))
    assert torch.equal(final, obs + torch.tensor([1.0, 0.0, 0.0]))  # in every row
    assert torch.equal(following[~done], final[~done])
    assert (following[done][:, 0] == 0).all()
    assert done.any(0).all()
    expected = torch.where(rollout["action"] == rollout["obs"][..., 2], 1.0, 0.25 * rollout["action"])[:-1]
    assert torch.equal(rollout["reward"][:-1], expected)


def test_torchrl_environments_are_seeded():
    """The same seed gives the same episodes, another one others; None goes on."""
    vector = TorchRLVectorEnv(Counter([50]))
    first, second = vector.reset(seed=1)[0], vector.reset(seed=2)[0]
    assert not torch.equal(first, second)
    assert torch.equal(vector.reset(seed=1)[0], first)
    assert not torch.equal(vector.reset()[0], first)
    vector.close()
    assert vector._env.is_closed


def test_what_is_not_finite_is_named():
    """Key, environment and step, in the very words that environments of arrays get."""
    collector, _, noise = started(TensorTwin(4, spoil=(5, 2)), 7)
    with pytest.raises(TrainingFault, match=r"^reward of environment 2 is not finite \(nan\) after step 5 of the rollout, "):
        collector.collect(act, noise)


def test_a_step_that_returns_arrays_after_tensors_is_a_fault():
    """Half-converted environments are told which step returned what, not trained on."""
    vector = TensorTwin(4)
    collector, _, noise = started(vector, 7)
    vector.reward = np.zeros(4)
    vector.step = lambda actions: (vector.obs, np.zeros(4), vector.terminated, vector.truncated, {})
    with pytest.raises(TrainingFault, match="step 0 of the rollout: TypeError"):
        collector.collect(act, noise)


def test_a_step_that_hangs_is_a_fault():
    """As with environments of arrays: the step is named."""
    vector = TensorTwin(4)
    collector, _, noise = started(vector, 7)
    step = vector.step
    vector.step = lambda actions: time.sleep(600) if vector.steps == 3 else step(actions)
    with contextlib.closing(Deadline(1.0)) as deadline:
        collector.envs.deadline = deadline
        with pytest.raises(TrainingFault, match=r"^the environments failed in step 3 of the rollout: no answer for 1 s"):
            collector.collect(act, noise)


def test_final_observations_that_are_missing_are_a_fault():
    """SAME_STEP without final_obs where an episode ended: the bootstrap would be wrong, so there is none."""
    vector = TensorTwin(4, "SameStep")
    step = vector.step
    vector.step = lambda actions: (*step(actions)[:4], {})
    collector, _, noise = started(vector, 7)
    with pytest.raises(TrainingFault, match="final_obs"):
        collector.collect(act, noise)


@pytest.mark.parametrize("squash", [False, True])
def test_actions_stay_on_their_device(squash):
    """Bounds moved once, with `to`, are where the actions are: the meta device would raise on a mix."""
    spec = action_spec(Box(-1.0, 1.0, (2, 2), np.float64), squash).to(torch.device("meta"))
    action = spec.to_env(torch.zeros(3, 4, device="meta"))
    assert action.device.type == "meta"
    assert (action.dtype, action.shape) == (torch.float64, (3, 2, 2))


def broken(**specs):
    """A Counter that claims other specs."""
    env = Counter([2])
    for name, spec in specs.items():
        setattr(env, name, spec)
    return env


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: broken(observation_spec=Composite(a=Unbounded((2, 1)), b=Unbounded((2, 1)), shape=(2,))), ["a, b", "obs_key"]),
        (lambda: broken(observation_spec=Composite(a=Categorical(3, shape=(2,)), shape=(2,))), ["Categorical", "Bounded"]),
        (lambda: broken(action_spec=MultiCategorical([2, 3], shape=(2, 2))), ["MultiCategorical", "OneHot"]),
        (lambda: broken(action_spec=Binary(3, shape=(2, 3))), ["Binary", "OneHot"]),
        (lambda: broken(action_spec=Bounded(0, 5, (2, 1), dtype=torch.int64)), ["int64", "floats"]),
        (lambda: broken(action_spec=Categorical(3, shape=(2, 4))), ["Categorical", "one action"]),
        (lambda: broken(action_spec=Categorical(2, shape=(2,), mask=torch.tensor([True, False]))), ["mask"]),
        (lambda: broken(action_spec=Bounded(torch.tensor([[-1.0], [-2.0]]), 1.0, (2, 1))), ["different bounds"]),
        (lambda: broken(action_spec=Composite(a=Unbounded((2, 1)), b=Unbounded((2, 1)), shape=(2,))), ["2 action keys"]),
        (
            lambda: broken(action_spec=Composite(agents=Composite(action=Unbounded((2, 1)), shape=(2,)), shape=(2,))),
            ["nested", "agents"],
        ),
        (lambda: broken(reward_spec=Unbounded((2, 3))), ["reward", "one number"]),
    ],
)
def test_unsupported_torchrl_environments(make, named):
    """Refused before anything runs, by a line that says what was found and what is supported."""
    with pytest.raises(UsageError) as error:
        TorchRLVectorEnv(make())
    for word in named:
        assert word in str(error.value)


def test_wrong_use(tmp_path):
    """Each names its flag or argument: nothing has been written."""
    config = {"run_dir": str(tmp_path / "run"), "num_envs": 2, "num_steps": 8, "num_minibatches": 1}
    for vectorization in ("sync", "async"):
        with pytest.raises(UsageError, match=f"--vectorization {vectorization}: TensorTwin-v0 .*entry-point or auto"):
            train(TrainConfig(env_id="TensorTwin-v0", vectorization=vectorization, **config))
    with pytest.raises(UsageError, match=r"--num-envs 2: ThreeOfThem-v0 .* 3"):
        train(TrainConfig(env_id="ThreeOfThem-v0", **config))
    with pytest.raises(UsageError, match=r"--env-id Refused-v0: obs_key='nothing'.*state"):
        train(TrainConfig(env_id="Refused-v0", **config))
    with pytest.raises(UsageError, match="num_envs=3"):
        TorchRLVectorEnv(Counter([2]), num_envs=3)
    assert not (tmp_path / "run").exists()


def test_the_entry_point_is_chosen_by_itself():
    """An id with nothing but a vector entry point works with --vectorization auto and entry-point."""
    assert default_vectorization(EnvConfig("TensorTwin-v0")) == "entry-point"
    for wanted in ("auto", "entry-point"):
        envs = make_gymnasium_envs(EnvConfig("TensorTwin-v0", 2, wanted, env_kwargs={"mode": "Disabled"}))
        assert isinstance(envs, TensorTwin)
        assert envs.num_envs == 2
        envs.close()


@pytest.mark.long
def test_torchrl_is_imported_for_its_environments_only():
    """It takes a second: neither training nor evaluating anything else pays for it."""
    script = "import sys, fastppo.train, fastppo.training.loop, fastppo.evaluate; assert 'torchrl' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
