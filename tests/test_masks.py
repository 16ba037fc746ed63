"""Action masks: each row's mask is that of the observation acted on, and no illegal action is ever chosen, anywhere."""

import csv
import functools
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from environments import TAXI, AnySpaces
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from fastppo import TrainConfig, UsageError, train
from fastppo.analysis.evaluation import play_episodes
from fastppo.analysis.rendered_episodes import play
from fastppo.core.acting import act
from fastppo.core.adam import init_adam
from fastppo.core.contracts import Normalization
from fastppo.core.ppo import MINIBATCH_METRICS, learn
from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.envs.factory import EnvConfig
from fastppo.envs.render import make_render_env
from fastppo.errors import EnvironmentFailed, TrainingFault
from fastppo.policy.agent import Agent
from fastppo.policy.make_network import make_network
from fastppo.policy.spaces import action_spec, obs_spec
from fastppo.rollout.collector import start_collector
from fastppo.rollout.storage import allocate_rollout
from fastppo.training.opening import info_mask_size
from support.learn_settings import coefficients, learn_settings
from support.runs import tiny

T, N = 150, 4
OFF = Normalization(None, None, None, torch.zeros(()), torch.ones(()))
MODES = list(AutoresetMode)
TOLD = {
    "info": {"mask": "info", "action": "multi-discrete"},
    "tuple": {"mask": "tuple", "action": "multi-discrete 2-D"},
    "until the end": {"mask": "until the end", "action": "discrete from -2"},
    "method": {"mask": "method", "action": "multi-discrete"},
    "observation": {"observation": "masked", "action": "multi-discrete"},
    "structure and info": {"observation": "nested", "mask": "info", "action": "three bits"},
}


class Started:
    """Environments, a policy with strong opinions, and a rollout of it."""

    def __init__(self, vector):
        self.envs = AutoresetEnvs(vector)
        self.action = action_spec(vector.single_action_space, False)
        self.obs = obs_spec(vector.single_observation_space, info_mask_size(self.envs), self.action)
        config = TrainConfig(hidden_sizes=(8,))
        self.network = make_network(self.obs, self.action, config)
        self.params = self.network.init(torch.Generator().manual_seed(0))
        self.params += 0.5 * torch.randn(self.params.shape, generator=torch.Generator().manual_seed(1))
        self.generator = torch.Generator().manual_seed(2)
        self.rollout = allocate_rollout(T, N, self.obs, self.action, self.envs.keeps_final_obs, torch.device("cpu"))
        self.collector = start_collector(self.envs, self.rollout, self.obs, self.action, 5)
        self.act = functools.partial(act, self.network, self.network.weights(self.params), OFF)

    def collect(self):
        noise = self.action.distribution.noise(self.action.noise_shape(T, N), self.generator)
        self.collector.collect(self.act, noise)
        return dict(self.rollout.items())

    def chosen(self, rollout):
        """One-hot, (T, N, A): which of the mask's places each action took."""
        action = rollout["action"][:-1].reshape(T, N, -1)
        numbers = getattr(self.action.distribution, "numbers", (self.action.size,))
        parts = [torch.nn.functional.one_hot(action[..., k], number) for k, number in enumerate(numbers)]
        return torch.cat(parts, -1).bool()

    def agent(self, vector):
        return Agent(vector.single_observation_space, self.obs, self.action, self.network, self.params, OFF)


def made(mode=AutoresetMode.NEXT_STEP, **told):
    return SyncVectorEnv([lambda: AnySpaces(**told)] * N, autoreset_mode=mode)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("told", TOLD)
def test_the_mask_of_a_row_is_that_of_its_observation(told, mode):
    """Through many episode ends: the mask stored beside an observation is the one that the environment told with it.

    The environment raises for an illegal action; half of its masks leave one value of each choice.
    """
    vector = made(mode, **TOLD[told])
    started = Started(vector)
    leaf = next(leaf for leaf in started.obs.observed if leaf.shape == (3,))  # random floats: no two are alike
    for env in vector.envs:
        del env.observed[:-1], env.masks[:-1]  # those of the reset that looked for a mask
    one_legal = 0
    for _ in range(2):
        rollout = started.collect()
        assert (rollout["terminated"] | rollout["truncated"]).sum() > 100
        for index, env in enumerate(vector.envs):
            told_with = {leaf.find(obs).tobytes(): mask for obs, mask in zip(env.observed, env.masks, strict=True)}
            for row in range(T + 1):
                expected = told_with[rollout[leaf.key][row, index].numpy().tobytes()]
                found = rollout["action_mask"][row, index]
                assert torch.equal(found, torch.ones_like(found) if expected is None else torch.from_numpy(expected))
        assert rollout["action_mask"][:-1][started.chosen(rollout)].all()
        one_legal += int((rollout["action_mask"].sum(-1) == started.chosen(rollout).sum(-1)[0, 0]).sum())
    assert one_legal > 100  # the masks did rule something out


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_the_first_minibatch_has_ratio_one(mode):
    """Acting and learning see the same masks: an off-by-one would make some chosen action impossible in hindsight."""
    started = Started(made(mode, **TOLD["info"]))
    rollout = started.collect()
    permutation = torch.arange(T * N).unsqueeze(0)
    arguments = (started.params, init_adam(started.params), rollout, permutation, coefficients(learning_rate=1e-3), OFF)
    learned = learn(*arguments, policy=started.network, **learn_settings(minibatch_size=T * N))
    metrics = dict(zip(MINIBATCH_METRICS, learned.minibatch_metrics[0].tolist(), strict=True))
    assert metrics["ratio_deviation"] < 1e-4
    assert metrics["applied"] == 1.0
    assert 0.0 < metrics["entropy"] < float(np.log(6))
    assert learned.params.isfinite().all()


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("told", ["info", "until the end", "method", "observation"])
def test_evaluation_chooses_legal_actions(told, mode, deterministic):
    """150 episodes of an environment that raises for an illegal action, in each autoreset mode."""
    vector = made(mode, **TOLD[told])
    agent = Started(vector).agent(vector)
    assert len(play_episodes(agent, AutoresetEnvs(vector), 150, seed=1, deterministic=deterministic).returns) == 150


def test_taxi():
    """A real environment: 500 states one-hot, masks in the info. Oracle: its own action_mask of the state in the row."""
    vector = gym.make_vec(TAXI, num_envs=N, vectorization_mode="sync", max_episode_steps=30)
    started = Started(vector)
    taxi = gym.make(TAXI).unwrapped
    for _ in range(2):
        rollout = started.collect()
        states = rollout["obs"].flatten().tolist()
        expected = np.stack([taxi.action_mask(state) for state in states]).reshape(T + 1, N, 6)
        assert torch.equal(rollout["action_mask"], torch.from_numpy(expected).bool())
        assert rollout["action_mask"][:-1][started.chosen(rollout)].all()
        assert rollout["truncated"].any()


def test_a_run_on_taxi(tmp_path):
    """The whole trainer, its checkpoint and the loaded policy: greedy and sampled actions are legal in all 500 states."""
    result = train(
        TrainConfig(
            env_id=TAXI,
            num_envs=4,
            num_steps=64,
            num_iterations=3,
            hidden_sizes=(16,),
            eval_episodes=2,
            compile="off",
            run_dir=str(tmp_path / "run"),
        )
    )
    taxi = gym.make(TAXI).unwrapped
    states = np.arange(500)
    masks = np.stack([taxi.action_mask(state) for state in states])
    for deterministic in (True, False):
        actions = result.policy.act(states, deterministic, masks)
        assert masks[states, actions].all()
        assert not masks[states, result.policy.act(states, deterministic)].all()  # without masks it would choose otherwise
    assert result.policy.act(7, action_mask=masks[7]) in np.flatnonzero(masks[7])
    assert result.policy.value(states).shape == (500,)


def test_masks_that_a_policy_takes():
    """Flat, a tuple of arrays as gymnasium's MultiDiscrete has it, tensors; of another size they are refused."""
    vector = made(**TOLD["info"])
    agent = Started(vector).agent(vector)
    obs = np.zeros(3, np.float32)
    only = [np.array([0, 1]), np.array([0, 0, 1])]
    for mask in (
        tuple(only),
        np.concatenate(only),
        torch.from_numpy(np.concatenate(only)).bool(),
        np.concatenate(only).tolist(),
    ):
        assert agent.act(obs, action_mask=mask).tolist() == [1, 2]
        assert agent.act(obs, deterministic=False, action_mask=mask).tolist() == [1, 2]
    two = np.stack([np.concatenate(only), np.concatenate(only[::-1])])
    two[1] = [1, 0, 0, 1, 0]
    assert agent.act(np.stack([obs, obs]), action_mask=two).tolist() == [[1, 2], [0, 1]]
    for wrong, given in ((two, obs), (two[0], np.stack([obs, obs])), (np.ones(4), obs)):
        with pytest.raises(ValueError, match=r"action_mask of shape .* takes \(5,\) an observation"):
            agent.act(given, action_mask=wrong)


@pytest.mark.parametrize(
    ("observation", "action", "size", "message"),
    [
        (Box(-1, 1, (2,)), Discrete(3), 4, "an action_mask of 4 numbers does not fit .* 3 choices"),
        (Box(-1, 1, (2,)), Box(-1, 1, (3,)), 3, "an action_mask of 3 numbers does not fit the action space Box"),
        (Dict(a=Discrete(2), action_mask=MultiBinary(3)), Discrete(3), 3, "twice"),
    ],
)
def test_masks_that_do_not_fit_are_refused(observation, action, size, message):
    """Of another size, for continuous actions, or told twice: one line."""
    with pytest.raises(UsageError, match=message):
        obs_spec(observation, size, action_spec(action, False))


def test_a_matrix_of_masks_is_its_components_in_a_row():
    """A Dict's mask of shape (2, 3), or of MultiDiscrete bits, has as many numbers as the action has choices."""
    action = action_spec(gym.spaces.MultiDiscrete([3, 3]), False)
    for mask in (Box(0, 1, (2, 3), np.int8), MultiBinary((2, 3)), gym.spaces.MultiDiscrete([[2] * 3] * 2)):
        found = next(leaf for leaf in obs_spec(Dict(a=Discrete(2), action_mask=mask), None, action) if leaf.kind == "mask")
        assert found.shape == (6,)


class Game(gym.Env):
    """Ten right actions win 10, a wrong one ends the episode; its own `game_over` says whether it was lost."""

    observation_space, action_space = Box(-1.0, 1.0, (2,), np.float32), Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.elapsed = 0
        return np.zeros(2, np.float32), {"game_over": False}

    def step(self, action):
        self.elapsed += 1
        won = action == 1 and self.elapsed == 10
        return np.full(2, self.elapsed / 10, np.float32), 10.0 * won, bool(action != 1 or won), False, {"game_over": not won}


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_key_of_the_environments_own_ends_no_game(mode, tmp_path):
    """`game_over` in an info is not Atari's: each end ends an episode, in training, in evaluation and in a video."""
    vector = SyncVectorEnv([Game] * 2, autoreset_mode=mode)
    result = train(tiny(tmp_path / "run", num_steps=64, check_env=False), envs=vector)
    with (result.run_dir / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["episodes"]) for row in rows) > 100
    assert all(0.0 <= float(row["episodic_return_mean"]) <= 10.0 for row in rows)
    envs = AutoresetEnvs(SyncVectorEnv([Game] * 2, autoreset_mode=mode))
    returns = play_episodes(result.policy, envs, 20, 0, deterministic=False).returns
    assert set(returns) <= {0.0, 10.0}
    alone = AutoresetEnvs(SyncVectorEnv([Drawn], autoreset_mode=mode))
    total, steps = play(result.policy, alone, lambda frame: None, 0, True, 1000)
    assert total in (0.0, 10.0)
    assert steps <= 10


class Drawn(Game):
    """A game with a picture."""

    render_mode = "rgb_array"

    def render(self):
        return np.zeros((8, 8, 3), np.uint8)


# --- masks that are half there


@pytest.mark.parametrize("told", ["sometimes", "reset", "step"])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_mask_that_is_half_there_is_refused(told, mode, tmp_path):
    """By the check before training, and without it in training and evaluation, each time with what to do."""
    what = "has to give one in the info of every reset and of every step"
    half = {"mask": told, "action": "discrete"}
    with pytest.raises(UsageError, match=what):
        train(tiny(tmp_path / "run", num_envs=N), envs=made(mode, **half))
    with pytest.raises(TrainingFault, match=rf"(step \d+ of the rollout|to reset): .*{what}"):
        train(tiny(tmp_path / "other", num_envs=N, check_env=False), envs=made(mode, **half))
    vector = made(mode, action="discrete", mask="info")
    agent = Started(vector).agent(vector)
    with pytest.raises(EnvironmentFailed, match=what):
        play_episodes(agent, AutoresetEnvs(made(mode, **half)), 50, seed=1)


class Method(gym.Env):
    """Action 0 is never legal, as sb3-contrib's users say it. Right: it is never chosen. `how` it is said."""

    observation_space, action_space = Box(-1.0, 1.0, (2,), np.float32), Discrete(4)
    metadata: ClassVar[dict] = {"render_modes": ["rgb_array"]}
    render_mode = None

    def __init__(self, how="method", render_mode=None):
        self.render_mode = render_mode
        if how == "attribute":
            self.action_masks = [False, True, True, True]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.elapsed = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        assert action != 0, "an illegal action"
        self.elapsed += 1
        return np.full(2, self.elapsed / 10, np.float32), 1.0, self.elapsed == 10, False, {}

    def render(self):
        return np.zeros((8, 8, 3), np.uint8)


class Says(Method):
    """The same by a method; there is nothing to say where an episode has ended."""

    def action_masks(self):
        assert self.elapsed < 10
        return np.arange(4) > 0


class HasProperty(Method):
    """The same by a property, which has no value before the first reset."""

    @property
    def action_masks(self):
        return [self.elapsed < 0, True, True, True]


class Wrapped(gym.Wrapper):
    """As sb3-contrib's ActionMasker."""

    def action_masks(self):
        return np.arange(4) > 0


METHODS = {
    "method": Says,
    "under wrappers": lambda **kwargs: gym.wrappers.TimeLimit(Says(**kwargs), 50),
    "of a wrapper": lambda **kwargs: gym.wrappers.TimeLimit(Wrapped(Method(**kwargs)), 50),
    "property": HasProperty,
    "attribute": lambda **kwargs: Method("attribute", **kwargs),
}
for name, entry in METHODS.items():
    gym.register(f"Masks-{name.replace(' ', '-')}-v0", entry_point=entry)


@pytest.mark.parametrize("how", METHODS)
def test_action_masks_of_a_method(how, tmp_path):
    """Training, the check, evaluation and a video choose no illegal action: the environment asserts it."""
    settings = {"env_id": f"Masks-{how.replace(' ', '-')}-v0", "vectorization": "sync", "num_iterations": 2}
    result = train(tiny(tmp_path / "run", **settings, eval_episodes=2))
    assert result.policy.obs.info_mask.size == 4
    assert result.summary["eval_return_mean"] == 10.0
    render_env = make_render_env(EnvConfig(settings["env_id"]))
    assert play(result.policy, render_env, lambda frame: None, 0, False, 1000) == (10.0, 10)
    render_env.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"num_seeds": 2},
        {"rnn": "gru", "rnn_hidden_size": 8, "num_minibatches": 2},
        {"vectorization": "grouped", "num_threads": 2},
    ],
    ids=["seeds", "memory", "processes"],
)
def test_a_method_everywhere(settings, tmp_path):
    """Many seeds, a memory, and environments in other processes."""
    config = tiny(tmp_path / "run", env_id="Masks-method-v0", num_iterations=2, **{"vectorization": "sync", **settings})
    assert train(config).policy.obs.info_mask.size == 4


class Whole(SyncVectorEnv):
    """A vector class of one's own whose method speaks for all, and whose environments do not."""

    def __init__(self, num_envs):
        super().__init__([Method] * num_envs)

    def action_masks(self):
        return np.tile(np.arange(4) > 0, (self.num_envs, 1))


gym.register("MasksOfAll-v0", vector_entry_point=Whole)
GIVEN = {
    **{f"sync {mode}": functools.partial(SyncVectorEnv, [Says] * 2, autoreset_mode=mode) for mode in MODES},
    "async": functools.partial(AsyncVectorEnv, [HasProperty] * 2, context="fork"),  # a process started afresh imports torch
    "in wrappers": lambda: gym.wrappers.vector.TransformReward(SyncVectorEnv([Says] * 2), lambda reward: reward),
    "of all": lambda: Whole(2),
}


@pytest.mark.parametrize("given", GIVEN)
def test_action_masks_of_given_vector_environments(given, tmp_path):
    """Each environment is asked, in whatever processes and wrappers; where it has ended it need not answer."""
    envs = GIVEN[given]()
    result = train(tiny(tmp_path / "run", num_iterations=2, eval_episodes=2), envs=envs)
    assert result.summary["eval_return_mean"] == 10.0
    envs.close()


def test_many_seeds_of_a_vector_class_with_a_method(tmp_path):
    """Several vector environments are asked one after another."""
    assert train(tiny(tmp_path / "run", env_id="MasksOfAll-v0", num_seeds=2, num_iterations=2)).policy.obs.info_mask.size == 4


def test_a_method_of_some_environments_is_refused(tmp_path):
    """One that has masks beside one that has none."""
    with pytest.raises(UsageError, match="no action_mask of environment 1 after a reset"):
        train(tiny(tmp_path / "run"), envs=SyncVectorEnv([Says, lambda: Method()]))


def test_a_policy_without_masks_takes_one():
    """A mask that is given is never ignored: here by a policy that was trained without; for a Box it is refused."""
    agent, continuous = (
        Agent(vector.single_observation_space, started.obs, started.action, started.network, started.params, OFF)
        for vector in (made(action="multi-discrete"), made(action="box"))
        for started in [Started(vector)]
    )
    obs = np.zeros((2, 3), np.float32)
    mask = np.array([[1, 0, 0, 0, 1], [0, 1, 1, 0, 0]])
    for deterministic in (True, False):
        assert agent.act(obs, deterministic, mask).tolist() == [[0, 2], [1, 0]]
    with pytest.raises(ValueError, match=r"action_mask of shape \(2, 4\)"):
        agent.act(obs, action_mask=mask[:, :4])
    with pytest.raises(ValueError, match="action_mask for a policy of continuous actions"):
        continuous.act(obs, action_mask=mask)
