"""Several agents: a row for each, rows of absent agents count nowhere, an episode's return is the mean over agents."""

import json
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict
from pettingzoo.classic import rps_v2
from pettingzoo.utils.conversions import parallel_to_aec_wrapper

from fastppo import TrainConfig, load_policy, train
from fastppo.__main__ import console
from fastppo.analysis.evaluation import play_episodes
from fastppo.analysis.rendered_episodes import play
from fastppo.core.adam import init_adam
from fastppo.core.ppo import learn
from fastppo.envs import registry
from fastppo.envs.agents import AgentRows, AgentsEnv
from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.envs.factory import EnvConfig, make_envs
from fastppo.envs.grouped import GroupedVectorEnv
from fastppo.envs.preprocessing import Preprocessing
from fastppo.policy.distributions import CATEGORICAL
from fastppo.policy.mlp import MLPActorCritic
from fastppo.policy.normalization import discounted_return, init_moments, update_moments
from fastppo.policy.spaces import action_spec, obs_spec
from fastppo.rollout.step_collector import HostCollector
from fastppo.rollout.storage import RnnState, allocate_rollout
from fastppo.run.episodes import EpisodeStatistics
from fastppo.run.metrics_file import read_rows
from support.learn_settings import coefficients, learn_settings, split
from support.parallel_envs import Relay
from support.programs import OFF
from support.runs import tiny

RELAY = "support.parallel_envs"
T, F = True, False


def rows(env_id=RELAY, num_envs=1, vectorization="sync", **settings):
    return make_envs(EnvConfig(env_id, num_envs, vectorization, **settings))


def collected(envs, action, steps=9, remembers=False):
    """The rollout of `steps` steps with the actions that `action` chooses, from a reset with seed 3."""
    wrapped = AutoresetEnvs(envs)
    spec = action_spec(envs.single_action_space, False)
    obs = obs_spec(envs.single_observation_space, None, spec)
    rollout = allocate_rollout(steps, envs.num_envs, obs, spec, False, torch.device("cpu"), remembers=remembers)
    state = RnnState(torch.zeros(envs.num_envs, 1)) if remembers else None
    collector = HostCollector(wrapped, rollout, obs, spec, state)
    collector.begin(*wrapped.reset_and_mask(3))

    def act(obs, noise, state=None, start=None):
        chosen = torch.full((envs.num_envs,), action)
        return chosen if state is None else (chosen, state)

    collector.collect(act, torch.zeros(steps, envs.num_envs, 2))
    return rollout, collector


def test_rows_by_hand():
    """`early` acts in steps 1 and 2, `late` in 3 to 5, `long` in 1 to 6; step 7 only resets; then the same again."""
    rollout, collector = collected(rows(), action=0)
    assert rollout["valid"].tolist() == [
        [T, F, T],
        [T, F, T],
        [F, T, T],
        [F, T, T],
        [F, T, T],
        [F, F, T],
        [F, F, F],  # the environment is reset
        [T, F, T],
        [T, F, T],
        [F, T, T],
    ]
    reward = rollout["reward"][:-1]
    assert reward[:, 0].tolist() == [1, 1, 0, 0, 0, 0, 0, 1, 1]
    assert reward[:, 1].tolist() == [0, 0, 10, 10, 10, 0, 0, 0, 0]
    assert reward[:, 2].tolist() == [100, 100, 100, 100, 100, 100, 0, 100, 100]
    assert rollout["terminated"][:-1].nonzero().tolist() == [[1, 0], [5, 2], [8, 0]]
    assert rollout["truncated"][:-1].nonzero().tolist() == [[4, 1]]
    assert rollout["obs"][5, 1].tolist()[:2] == [1, 5]  # what truncation is bootstrapped from
    assert rollout["obs"][2:6, 0, 1].tolist() == [2, 2, 2, 2]  # the last one of an agent that has ended
    assert rollout["obs"][:, 2, 1].tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]
    assert collector.outcomes().episode_end.nonzero()[0].tolist() == [5]  # of the last agent


def test_memory_starts_with_the_agent():
    """The recurrent state is zero where an agent joins, and in the value of its final observation it is not."""
    rollout, _ = collected(rows(), action=0, remembers=True)
    start = rollout["episode_start"]
    assert start[:, 1].tolist()[:6] == [T, T, T, F, F, F]  # joins in row 2, is truncated in row 4, whose final value is row 5's
    assert start[:, 2].tolist()[:8] == [T, F, F, F, F, F, F, T]


def test_other_rows_count_nowhere():
    """Rewards, actions and observations of absent agents change no bit of the update or of the statistics."""
    policy = MLPActorCritic(3, 2, CATEGORICAL, (8,))
    params = policy.init(torch.Generator().manual_seed(0))
    numbers, settings = split({"minibatch_size": 12})
    permutation = torch.randperm(8 * 6, generator=torch.Generator().manual_seed(0))[None]
    results = []
    for junk in (False, True):
        rollout, _ = collected(rows(num_envs=2), action=1, steps=8)
        rollout = dict(rollout.items())
        if junk:
            gone, ended = ~rollout["valid"][:-1], (rollout["terminated"] | rollout["truncated"])[:-1]
            rollout["reward"][:-1][gone] = 1e4
            rollout["action"][:-1][gone] = 0
            rollout["obs"][1:-1][gone[1:] & ~ended[:-1]] = 7.0  # final values are read from the others
        updated = learn_settings(**settings)
        result = learn(params, init_adam(params), rollout, permutation, coefficients(**numbers), OFF, policy=policy, **updated)
        done = rollout["terminated"] | rollout["truncated"]
        returns, _ = discounted_return(rollout["reward"], done, rollout["valid"], torch.zeros(6), 0.9)
        moments = update_moments(init_moments((), torch.device("cpu")), returns.flatten(), rollout["valid"].flatten())
        results.append([result.params, result.minibatch_metrics, result.explained_variance, *moments])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_fused_equals_eager(tmp_path):
    """Rows that do not count, several in a row, in both forms of the update."""
    settings = {"env_id": RELAY, "num_envs": 4, "num_steps": 32, "num_iterations": 2, "anneal_lr": False}
    results = [train(tiny(tmp_path / form, **settings, compile=form)) for form in ("off", "on")]
    assert [result.summary["tier"] for result in results] == ["eager", "fused"]
    eager, fused = (read_rows(result.run_dir / "metrics.csv")[-1] for result in results)
    for name in ("episodic_return_mean", "value_loss", "entropy", "approx_kl", "explained_variance"):
        assert float(fused[name]) == pytest.approx(float(eager[name]), rel=2e-3, abs=1e-5), name


def test_returns_are_means_over_agents():
    """(2 + 30 + 600) / 3 in 6 steps; its parts are the agents' returns. Through a checkpoint in the middle of an episode."""
    _, collector = collected(rows(), action=0, steps=8)
    whole, halves = EpisodeStatistics(1, num_agents=3), EpisodeStatistics(1, num_agents=3)
    outcomes = collector.outcomes()
    assert whole.update(outcomes.reward, outcomes.episode_end, outcomes.valid) == 1
    assert (whole.return_mean, whole.length_mean) == (pytest.approx(632 / 3), 6)
    assert whole.part_means == [2, 30, 600]
    for part in (slice(0, 3), slice(3, 8)):
        again = EpisodeStatistics(1, num_agents=3)
        again.load_state_dict(halves.state_dict())
        halves = again
        halves.update(outcomes.reward[part], outcomes.episode_end[part], outcomes.valid[part])
    assert halves.state_dict() == whole.state_dict()
    assert math.isclose(whole.state_dict()["running_return"][0], 101 / 3)


def test_evaluation_and_video():
    """The same definition when a policy is played and shown; all choose action 1, which is half a point a step."""

    class One:
        def act(self, obs, deterministic=True, mask=None):
            return np.ones(len(obs), np.int64)

        def seed(self, seed): ...
        def reset(self, done=None): ...

    result = play_episodes(One(), AutoresetEnvs(rows(num_envs=2)), 3, seed=0)
    assert result.returns == pytest.approx([(3 + 31.5 + 603) / 3] * 3)
    assert result.report["return_parts"] == [3, 31.5, 603]
    frames = []
    total, steps = play(One(), AutoresetEnvs(rows()), frames.append, 0, True, 100)
    assert (total, steps) == (pytest.approx(637.5 / 3), 6)
    assert [int(frame.max()) for frame in frames] == [0, 1, 2, 3, 4, 5, 6]


def test_a_time_limit_truncates_who_is_there():
    """--max-episode-steps 4: `late` and `long` are truncated, `early` has ended before."""
    rollout, collector = collected(rows(env_kwargs={"max_episode_steps": 4}), action=0, steps=6)
    assert rollout["truncated"].nonzero().tolist() == [[3, 1], [3, 2]]
    assert rollout["terminated"].nonzero().tolist() == [[1, 0]]
    assert rollout["valid"][4].tolist() == [F, F, F]
    assert rollout["valid"][5].tolist() == [T, F, T]
    assert collector.outcomes().episode_end.nonzero()[0].tolist() == [3, 3]


@pytest.mark.parametrize("vectorization", ["sync", "grouped"])
@pytest.mark.parametrize(("limit", "steps", "mean", "row"), [(None, 6, 13 / 3, 2), (4, 4, 10 / 3, 1)])
def test_numbers_in_the_agents_infos(limit, steps, mean, row, vectorization):
    """Mean over the agents of those of each one's last step, in one row of each environment, at the episode's end alone."""
    kwargs = {"masks": "info"} | ({} if limit is None else {"max_episode_steps": limit})
    made = rows(f"{RELAY}:Telling", 2, vectorization, env_kwargs=kwargs, log_info=("time", "own", "text"), num_threads=2)
    envs = AutoresetEnvs(made, info_names=("time", "own", "text"))
    envs.reset_and_mask(3)
    try:
        for _ in range(2):
            infos = [envs.step(np.zeros(6, np.int64)).infos for _ in range(steps + 1)]
            assert [bool(each) for each in infos] == [F] * (steps - 1) + [T, F]
            numbers = infos[steps - 1]
            assert sorted(numbers) == ["own", "time"]
            for name, expected in (("time", mean), ("own", 7.0)):
                wanted = np.full((2, 3), math.nan)
                wanted[:, row] = expected
                np.testing.assert_allclose(numbers[name].reshape(2, 3), wanted)
    finally:
        envs.close()


def test_numbers_of_agents_are_logged(tmp_path):
    """In metrics.csv, as those of one agent are."""
    result = train(tiny(tmp_path / "run", env_id=f"{RELAY}:Telling", num_steps=16, log_info=("time",)))
    assert float(read_rows(result.run_dir / "metrics.csv")[-1]["info_time"]) == pytest.approx(13 / 3)


def test_processes_step_as_one_does():
    """Same seeds, same bits; a row is agent a of environment n at n * A + a, whatever the number of processes."""
    sync, grouped = rows(num_envs=3), rows(num_envs=3, vectorization="grouped", num_threads=2)
    try:
        assert isinstance(grouped.envs_of_agents, GroupedVectorEnv)
        np.testing.assert_array_equal(sync.reset(seed=5)[0], grouped.reset(seed=5)[0])
        for step in range(10):
            action = np.arange(9) % 2
            for one, other in zip(sync.step(action), grouped.step(action), strict=True):
                np.testing.assert_array_equal(one, other)
            np.testing.assert_array_equal(sync.acting, grouped.acting)
            np.testing.assert_array_equal(sync.over, grouped.over)
            assert sync.over.any() == (step == 5)
    finally:
        grouped.close()
    np.testing.assert_array_equal(sync.reset(seed=5)[0][3:6], rows().reset(seed=6)[0])


def test_the_agents_number():
    """--agent-id appends to a vector of floats, and is a part beside others."""
    wrapped = rows(preprocessing=Preprocessing(agent_id=True))
    assert wrapped.single_observation_space == Box(np.float32([-10] * 3 + [0] * 3), np.float32([10] * 3 + [1] * 3))
    obs, _ = wrapped.reset(seed=1)
    np.testing.assert_array_equal(obs[:, 3:], np.eye(3))
    wrapped = rows(f"{RELAY}:Relay", env_kwargs={"masks": "obs"}, preprocessing=Preprocessing(agent_id=True))
    assert set(wrapped.single_observation_space) == {"observation", "action_mask", "agent"}
    np.testing.assert_array_equal(wrapped.reset(seed=1)[0]["agent"], np.eye(3))


def test_the_agents_number_is_learned_from(tmp_path):
    """Agents who are paid for different actions: half of the 8 points at best by chance, all with --agent-id."""
    settings = {"env_id": f"{RELAY}:Team", "num_envs": 8, "num_steps": 32, "num_iterations": 25, "learning_rate": 0.01}
    result = train(tiny(tmp_path / "run", **settings, agent_id=True, eval_episodes=4))
    assert result.summary["eval_return_mean"] == 8.0


@pytest.mark.parametrize("masks", ["obs", "info"])
@pytest.mark.parametrize("vectorization", ["sync", "grouped"])
def test_masks(masks, vectorization, tmp_path):
    """Relay fails if `late` takes action 1; the check before training tries legal actions too."""
    settings = {"env_id": f"{RELAY}:Relay", "env_kwargs": {"masks": masks}, "vectorization": vectorization, "num_threads": 2}
    result = train(tiny(tmp_path / "run", **settings, eval_episodes=2, num_steps=32))
    assert result.summary["episodes" if "episodes" in result.summary else "eval_episodes"] > 0
    mask = np.array([0, 1])
    obs = np.zeros(3, np.float32)
    if masks == "obs":
        assert result.policy.act({"observation": obs, "action_mask": mask}) == 1
    else:
        assert result.policy.act(obs, action_mask=mask) == 1


def test_aec_environments():
    """PettingZoo's converters: of agents that move at once to what the parallel form is, of turns to legal games."""
    at_once, parallel = AgentsEnv(parallel_to_aec_wrapper(rps_v2.parallel_env())), AgentsEnv(rps_v2.parallel_env())
    for env in (at_once, parallel):
        env.reset(seed=0)
    for _ in range(20):
        action = parallel.action_space.sample()
        (one, paid, over, *_), (other, *rest) = at_once.step(action), parallel.step(action)
        assert [paid, over] == rest[:2]
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    envs = rows("pettingzoo.classic.tictactoe_v3", num_envs=2)
    obs, _ = envs.reset(seed=1)
    assert obs["action_mask"].sum(-1).tolist() == [9, 1, 9, 1]  # who waits for a turn has one choice, which changes nothing
    boards, moves = [], [0, 3, 1, 4, 2]
    for move in moves:
        who = obs["action_mask"].sum(-1) > 1
        obs, reward, terminated, _, _ = envs.step(np.where(who, move, 0))
        boards.append(int(obs["observation"][0].sum()))
    assert boards == [1, 2, 3, 4, 5]
    assert reward.tolist() == [1, -1, 1, -1]  # the first player has a row; both learn from the last step
    assert terminated.all()
    assert not envs.acting.any()
    assert envs.over.all()


@pytest.mark.long
def test_whole_runs(tmp_path, capsys):
    """Train by module, log each agent's return, resume, evaluate, load; config.json has the number of agents."""
    flags = ["--env-id", RELAY, "--num-envs", "2", "--num-steps", "16", "--plain", "--compile", "off", "--eval-episodes", "2"]
    assert console(["train", *flags, "--num-iterations", "2", "--run-dir", str(tmp_path / "run")]) == 0
    assert "2 environments of 3 agents" in capsys.readouterr().out
    assert console(["train", "--resume", str(tmp_path / "run"), "--num-iterations", "4", "--minibatch-shards", "2"]) == 0
    assert console(["evaluate", str(tmp_path / "run"), "--episodes", "3"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["episodes"] == 3
    assert report["return_mean"] == pytest.approx(np.mean(report["return_parts"]))
    row = read_rows(tmp_path / "run" / "metrics.csv")[-1]
    parts = [float(row[f"episodic_return_{agent}"]) for agent in range(3)]
    assert float(row["episodic_return_mean"]) == pytest.approx(np.mean(parts))
    assert float(row["episodic_length_mean"]) == 6
    # twice 32 steps of two environments: four whole episodes of 11 transitions in 7 steps, and four steps of two agents
    assert int(row["global_step"]) == 2 * 2 * (4 * 11 + 4 * 2)
    assert TrainConfig.from_json(tmp_path / "run" / "config.json").num_agents == 3
    policy = load_policy(tmp_path / "run")
    assert policy.act(np.zeros(3, np.float32)).shape == ()


def test_an_agent_alone(tmp_path):
    """One agent is one row; its episodes are those of any environment."""

    result = train(tiny(tmp_path / "run", num_steps=32, env_id=f"{RELAY}:Alone"))
    row = read_rows(result.run_dir / "metrics.csv")[-1]
    assert float(row["episodic_length_mean"]) == 8
    assert list(row)[-1] == "learn_share"  # no columns of agents


@pytest.mark.parametrize("kind", ["dict", "tuple"])
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_actions_of_several_parts(kind, vectorization):
    """Each agent gets its own parts of a Dict or Tuple action."""
    envs = rows(f"{RELAY}:Compound", num_envs=2, vectorization=vectorization, env_kwargs={"kind": kind})
    envs.reset(seed=1)
    action = {"choice": np.arange(4), "push": np.array([[0.1], [0.2], [0.3], [0.4]], np.float32)}
    _, reward, *_ = envs.step(action if kind == "dict" else tuple(action.values()))
    envs.close()
    assert reward.tolist() == pytest.approx([0.1, 1.2, 2.3, 3.4])


def test_a_run_with_actions_of_several_parts(tmp_path):
    """A run trains and is evaluated with Dict actions of several agents."""
    result = train(tiny(tmp_path / "run", num_steps=32, env_id=f"{RELAY}:Compound"))
    assert console(["evaluate", str(result.run_dir), "--episodes", "2"]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--env-id", f"{RELAY}:Unlike"],
            "different spaces (early Box(-10.0, 10.0, (3,), float32), long Box(-10.0, 10.0, (4,)",
        ),
        (["--env-id", f"{RELAY}:Unlike"], "make them equal with SuperSuit's pad_observations_v0 in a function of yours"),
        (
            ["--env-id", f"{RELAY}:Unlike", "--env-kwargs", "actions=true"],
            "SuperSuit's pad_observations_v0 and pad_action_space_v0",
        ),
        (
            ["--env-id", RELAY, "--frame-stack", "2"],
            "--frame-stack is for environments of one agent: wrap these with SuperSuit",
        ),
        (["--env-id", RELAY, "--num-agents", "2"], f"--num-agents 2: {RELAY} has 3"),
        (["--env-id", "CartPole-v1", "--num-agents", "2"], "--num-agents is for environments of PettingZoo, and CartPole-v1"),
        (
            ["--env-id", "CartPole-v1", "--agent-id", "--vectorization", "sync"],
            "--agent-id is for environments of several agents",
        ),
        (["--env-id", "support.parallel_env"], "support has no module parallel_env; nearest: parallel_envs"),
        (["--env-id", "support.runs"], "has no function parallel_env or env, as PettingZoo's modules have"),
        (["--env-id", f"{RELAY}:Wrong", "--env-kwargs", "how=leaves"], "agent early has left `agents`, and neither its term"),
        (["--env-id", f"{RELAY}:Wrong", "--env-kwargs", "how=stranger"], "agent nobody is not in possible_agents"),
        (["--env-id", f"{RELAY}:Wrong", "--env-kwargs", "how=form"], "step of the parallel API has to return 5 dicts: observ"),
        (
            ["--env-id", f"{RELAY}:Wrong", "--env-kwargs", "how=mask"],
            "the info of agent long has no action_mask, and others had",
        ),
        (["--env-id", RELAY, "--minibatch-size", "24", "--num-steps", "4"], "(--num-envs 8 x --num-steps 4); nearest"),
    ],
)
def test_mistakes(flags, message, tmp_path, capsys):
    """One line, exit code 2, nothing written."""
    assert console(["train", *flags, "--plain", "--run-dir", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()


def test_a_minibatch_of_agents(tmp_path):
    """With --num-agents the rows of agents count before the environment is known: 24 divides 8 x 4 x 3."""
    settings = {"env_id": RELAY, "num_envs": 8, "num_steps": 4, "num_minibatches": 1, "num_iterations": 1}
    result = train(tiny(tmp_path / "run", **settings, minibatch_size=24, num_agents=3))
    assert int(read_rows(result.run_dir / "metrics.csv")[-1]["updates"]) == 4


def test_what_is_not_installed(monkeypatch, capsys):
    """The extra that brings it; not for a wrong name in a package that is there."""
    monkeypatch.setattr(registry, "PETTINGZOO", ("nowhere", "support"))
    for env_id, extra in (("nowhere.some_v0", True), ("support.nothing", False)):
        assert console(["train", "--env-id", env_id]) == 2
        told = f"--env-id {env_id} needs a package that is not installed: pip install 'fastppo[pettingzoo]'"
        assert (told in capsys.readouterr().err) == extra


def test_gymnasium_wrappers_see_one_environment():
    """An `AgentsEnv` is a legal gymnasium environment, so that everything for one environment works with it."""
    env = AgentsEnv(Relay())
    env.reset(seed=0)
    assert isinstance(env.observation_space, Dict)
    gym.utils.env_checker.check_env(env, skip_render_check=True)
    assert isinstance(rows(), AgentRows)
