"""Every engine keeps one contract: shapes, seeds, what follows an end, true scores; which is chosen, and what is refused.

Returned arrays need not outlive the next step (gymnasium's may be views of one buffer): the rollout copies them at once. So
does `played` below.
"""

import subprocess
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from fastppo import TrainConfig, UsageError, train
from fastppo.envs.atari import AtariSettings
from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.envs.envpool import EnvPoolVectorEnv, RawPool, make_envpool, task_of
from fastppo.envs.factory import EnvConfig, choose_vectorization, engine_name, make_envs
from fastppo.envs.registry import is_atari
from fastppo.train import console
from support.backends import ENGINES, N, make, played, some_actions


@pytest.mark.parametrize("engine", ENGINES)
def test_the_contract(engine):
    """Shapes and dtypes are the space's; a seed makes a trajectory, in another copy too; the row after an end pays 0, is no

    end, and does not heed its action; rewards and ends are finite numbers and booleans of every environment.
    """
    envs, copy = make(engine), make(engine)
    assert envs.num_envs == N
    assert AutoresetEnvs(envs).mode is AutoresetMode.NEXT_STEP
    space = envs.single_observation_space
    actions = some_actions(envs, 150 if "breakout" in engine else 60)
    obs, reward, terminated, truncated, _ = first = played(envs, actions)
    assert obs.shape[1:] == (N, *space.shape)
    assert obs.dtype == space.dtype
    assert reward.shape == terminated.shape == truncated.shape == (len(actions), N)
    assert terminated.dtype == truncated.dtype == np.bool_
    assert np.isfinite(reward).all()

    done = terminated | truncated
    assert done.any(axis=0).all()
    after = np.zeros_like(done)
    after[1:] = done[:-1]
    assert (reward[after] == 0).all()
    assert not (done & after).any()

    other = some_actions(envs, len(actions), seed=1)
    mixed = actions.copy()
    mixed[after] = other[after]
    assert (mixed != actions).any()
    for again in (played(copy, mixed), played(copy, mixed)):
        for mine, theirs in zip(first, again, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    alike = np.repeat(actions[:, :1], N, axis=1)
    first, second = (played(copy, alike, seed)[0] for seed in (5, 6))
    assert (first[:, 0] != first[:, 1]).any()  # environments that are all alike would be one
    assert (first != second).any()
    envs.close()
    copy.close()


@pytest.mark.parametrize("engine", ["entry-point", "sync", "grouped", "async", "torch", "envpool-cartpole"])
def test_cartpole_returns_its_lengths(engine):
    """Each step of an episode pays 1, the first and the last too, and an episode begins near the upright."""
    envs = make(engine)
    obs, reward, terminated, truncated, _ = played(envs, some_actions(envs, 80))
    done = terminated | truncated
    resetting = np.zeros_like(done)
    resetting[1:] = done[:-1]
    np.testing.assert_array_equal(reward, ~resetting)
    assert (np.abs(obs[1:][resetting]) <= 0.05).all()
    envs.close()


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "HalfCheetah-v4"])
def test_envpool_tells_a_time_limit_as_truncation(env_id):
    """At the step that gymnasium's TimeLimit cuts, and not as a termination; a fallen pole is told as one."""
    pytest.importorskip("envpool")
    envs = make_envs(EnvConfig(env_id, N, env_kwargs={"max_episode_steps": 6}, backend="envpool"))
    _, _, terminated, truncated, _ = played(envs, some_actions(envs, 20))
    expected = [step % 7 == 5 for step in range(20)]  # 6 steps and a resetting row
    assert truncated.tolist() == [[cut] * N for cut in expected]
    assert not terminated.any()
    envs.close()
    envs = make_envs(EnvConfig("CartPole-v1", N, backend="envpool"))
    obs, _, terminated, truncated, _ = played(envs, np.ones((30, N), np.int64))
    assert terminated.any()
    assert not truncated.any()
    assert (np.abs(obs[1:][terminated][:, 2]) > 0.2).all()
    envs.close()


def test_envpool_is_seeded_by_reset():
    """Oracle: a pool that was made with the seed. Without one the random numbers go on."""
    envpool = pytest.importorskip("envpool")
    envs = make_envs(EnvConfig("Pendulum-v1", N, backend="envpool"))
    unseeded = envs.reset()[0]
    mine = [envs.reset(seed=11)[0], envs.reset()[0]]
    pool = envpool.make("Pendulum-v1", env_type="gymnasium", num_envs=N, seed=11)
    np.testing.assert_array_equal(mine, [pool.reset()[0], pool.reset()[0]])
    assert (mine[0] != mine[1]).all()
    assert (mine[0] != unseeded).all()
    other = make_envs(EnvConfig("Pendulum-v1", N, backend="envpool"))
    assert (other.reset()[0] != unseeded).all()
    envs.close()
    other.close()


@pytest.mark.parametrize("task", ["CartPole-v1", "HalfCheetah-v4", "Breakout-v5", "Pendulum-v1"])
def test_envpools_own_step_is_not_missed(task):
    """Its two functions in C++ give what its step gives, infos included, over ends of episodes; float32 actions too."""
    pytest.importorskip("envpool")
    ours, theirs = (EnvPoolVectorEnv(task, N, max_episode_steps=40) for _ in range(2))
    for envs in (ours, theirs):
        envs.reset(seed=3)
    assert ours._raw is not None
    theirs._raw = None
    ours.action_space.seed(0)
    ends = 0
    for _ in range(100):
        action = ours.action_space.sample()
        action = action.astype(np.float32) if action.dtype == np.float64 else action
        (*got, info), (*expected, other) = ours.step(action), theirs.step(action)
        for one, two in zip(got, expected, strict=True):
            assert one.dtype == two.dtype
            np.testing.assert_array_equal(one, two)
        assert info.pop("players").keys() == other.pop("players").keys()
        assert info.keys() == other.keys()
        for name in info:
            np.testing.assert_array_equal(info[name], other[name])
        ends += int((got[2] | got[3]).sum())
    assert ends >= N
    with pytest.raises(ValueError, match="shape"):
        ours.step(action[:2])
    for envs in (ours, theirs):
        envs.close()


@pytest.mark.parametrize("lacks", ["_recv", "obs", "action", "flat infos"])
def test_an_envpool_of_another_make_is_stepped_as_it_asks(lacks):
    """Nothing inside it is called that is not as expected."""
    keys = ["obs", "reward", "done", "trunc", "elapsed_step", "info:players.env_id", "info:lives"]
    keys += ["info:of.a.tree"] if lacks == "flat infos" else []
    spec = SimpleNamespace(_action_keys=["env_id", "players.env_id", "action.left" if lacks == "action" else "action"])
    pool = SimpleNamespace(_spec=spec, spec=spec, _send=print, _recv=print, _state_keys=keys)
    spec.action_array_spec = {"action": SimpleNamespace(dtype=np.float32, shape=[-1, 2])}
    assert RawPool.of(pool, N) is not None or lacks in ("action", "flat infos")
    if lacks == "_recv":
        del pool._recv
    elif lacks == "obs":
        keys[0] = "obs:left"
    assert RawPool.of(pool, N) is None


@pytest.mark.parametrize(
    ("num_envs", "cores", "allowed", "tied"),
    [(8, 2, {0, 1}, True), (2, 2, {0, 1}, True), (8, 16, set(range(16)), False), (8, 4, {0, 1}, False)],
)
def test_envpools_threads_are_tied_where_each_core_has_one(num_envs, cores, allowed, tied, monkeypatch):
    """Not where other runs would be tied to the same cores; what the user says goes before."""
    pytest.importorskip("envpool")
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: allowed, raising=False)
    monkeypatch.setattr("fastppo.system.cpus.cpu_quota", lambda root: 99.0)
    monkeypatch.delenv("OMP_NUM_THREADS")
    for own, offset in (({}, 0 if tied else -1), ({"thread_affinity_offset": 1}, 1)):
        envs = make_envpool("CartPole-v1", num_envs, own, AtariSettings())
        assert envs.config.thread_affinity_offset == offset
        envs.close()


# --- what is chosen, and what is refused


def test_settings_come_from_the_flags():
    """The flags' defaults are the literature's, and each reaches its setting."""
    assert TrainConfig().env_config.atari == AtariSettings()
    changed = AtariSettings(7, 2, 50, False, 3, 0.25, False, False, True)
    flags = {
        name if name in ("episodic_life", "fire_reset") else f"atari_{name}": value for name, value in vars(changed).items()
    }
    assert TrainConfig(**flags).env_config.atari == changed


def test_who_runs_what():
    """ALE's games run in ALE's own vector environment, without a trial; the names that logs and summaries show."""
    pytest.importorskip("ale_py")
    assert choose_vectorization(EnvConfig("ALE/Pong-v5", 8))[:2] == ("entry-point", "ALE's own vector environment")
    assert choose_vectorization(EnvConfig("PongNoFrameskip-v4", 8))[:2] == ("entry-point", "ALE's own vector environment")
    names = {
        "entry-point": "gymnasium/entry-point",
        "sync": "gymnasium/sync",
        "torch": "torch",
        "ale-pong": "ale",
        "envpool-cartpole": "envpool",
        "envpool-breakout": "envpool",
    }
    for engine, name in names.items():
        env_id, backend, vectorization, _ = ENGINES[engine]
        envs = make(engine)
        assert engine_name(envs, EnvConfig(env_id, backend=backend, vectorization=vectorization)) == name
        envs.close()


@pytest.mark.parametrize(
    ("env_id", "atari"),
    [
        ("ALE/Pong-v5", True),
        ("ale_py:ALE/Pong-v5", True),
        ("MsPacmanNoFrameskip-v4", True),
        ("ale_py:Pong-v4", True),
        ("CartPole-v1", False),
        ("Nonsense-v0", False),
        ("ALE/Nonsense-v5", False),
        ("environments:WalkVector-v0", False),
    ],
)
def test_what_is_atari(env_id, atari):
    """By what the id's registration says, module or not; nothing else is."""
    pytest.importorskip("ale_py")
    assert is_atari(env_id) is atari


def test_choosing_costs_no_torch():
    """A wrong flag answers at once: whether an id is Atari, and what is chosen for it, is known without torch."""
    pytest.importorskip("ale_py")
    code = (
        "import sys; from fastppo.envs.factory import EnvConfig, choose_vectorization; import fastppo.envs.envpool; "
        "choose_vectorization(EnvConfig('ALE/Pong-v5', 8)); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("env_id", "task"),
    [
        ("CartPole-v1", "CartPole-v1"),
        ("Breakout-v5", "Breakout-v5"),
        ("ALE/MsPacman-v5", "MsPacman-v5"),
        ("ale_py:ALE/Breakout-v5", "Breakout-v5"),
        ("BreakoutNoFrameskip-v4", "Breakout-v5"),
        ("ALE/TicTacToe3D-v5", "TicTacToe3d-v5"),
    ],
)
def test_envpools_names(env_id, task):
    """Gymnasium's ids of a game are understood."""
    pytest.importorskip("envpool")
    assert task_of(env_id) == task


@pytest.mark.parametrize(
    ("env_id", "backend", "vectorization", "env_kwargs", "message"),
    [
        ("CartPoel-v1", "envpool", "auto", {}, r"--env-id 'CartPoel-v1': EnvPool has no CartPoel-v1; nearest: .*CartPole-v1"),
        ("ALE/Braekout-v5", "envpool", "auto", {}, r"nearest: .*Breakout-v5"),
        ("ALE/Braekout-v5", "auto", "auto", {}, r"--env-id 'ALE/Braekout-v5'.*nearest: .*ALE/Breakout-v5"),
        ("CartPole-v1", "envpool", "auto", {"gravity": 1}, r"--env-kwargs do not fit CartPole-v1 of EnvPool: .*gravity"),
        ("Pendulum-v1", "auto", "sync", {"gravity": 1}, r"^--env-kwargs do not fit Pendulum-v1: .* argument 'gravity'$"),
        ("CartPole-v1", "envpool", "auto", {"num_threads": "x"}, "--env-kwargs do not fit CartPole-v1 of EnvPool"),
        ("CartPole-v1", "envpool", "auto", {"seed": 3}, "--env-kwargs seed is not for CartPole-v1.*--seed"),
        ("ALE/Pong-v5", "envpool", "auto", {"frame_skip": 3}, "--env-kwargs frame_skip is not for ALE/Pong-v5.*--atari"),
        ("ALE/Pong-v5", "auto", "auto", {"frameskip": 3}, "--env-kwargs frameskip is not for ALE/Pong-v5.*--atari"),
        ("ALE/Pong-v5", "auto", "auto", {"gravity": 3}, "--env-kwargs do not fit ALE/Pong-v5: .*gravity"),
        ("ALE/Pong-v5", "auto", "sync", {}, "--vectorization sync is not for ALE/Pong-v5.*leave it at auto"),
        ("ALE/Pong-v5", "gymnasium", "async", {}, "--vectorization async is not for ALE/Pong-v5.*leave it at auto"),
        ("ALE/Pong-v5", "gymnasium", "grouped", {}, "--vectorization grouped is not for ALE/Pong-v5.*leave it at auto"),
        ("Go9x9-v1", "envpool", "auto", {}, "--env-id Go9x9-v1: EnvPool's Go9x9-v1 is a game of 2 players"),
    ],
)
def test_what_is_refused(env_id, backend, vectorization, env_kwargs, message):
    """One line that names the flag and what would be right."""
    pytest.importorskip("envpool")
    pytest.importorskip("ale_py")
    with pytest.raises(UsageError, match=message):
        make_envs(EnvConfig(env_id, N, vectorization, env_kwargs=env_kwargs, backend=backend))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "envpool", "vectorization": "sync"}, "--vectorization sync is for --backend gymnasium; envpool"),
        ({"backend": "nonsense"}, "--backend must be one of auto, gymnasium, torch, envpool"),
        ({"atari_noop_max": -1}, "--atari-noop-max must be a whole number of at least 0"),
        ({"atari_frame_skip": 0}, "--atari-frame-skip must be a whole number of at least 1"),
        ({"atari_screen_size": 0}, "--atari-screen-size"),
        ({"atari_frame_stack": 0}, "--atari-frame-stack"),
        ({"atari_sticky_actions": 1.1}, "--atari-sticky-actions must be between 0 and 1"),
    ],
)
def test_bounds(settings, message):
    """A setting that cannot be is refused by its flag's name."""
    with pytest.raises(UsageError, match=message):
        TrainConfig(**settings)


@pytest.mark.parametrize(
    ("env_id", "backend", "missing", "extra"),
    [
        ("HalfCheetah-v5", "auto", "gymnasium", "mujoco"),
        ("LunarLander-v3", "auto", "gymnasium", "box2d"),
        ("ALE/Breakout-v5", "auto", "ale_py", "atari"),
        ("BreakoutNoFrameskip-v4", "auto", "ale_py", "atari"),
        ("Breakout-v5", "envpool", "envpool", "envpool"),
    ],
)
def test_what_is_not_installed(monkeypatch, env_id, backend, missing, extra):
    """The message is the command that installs it."""

    def fail(*args, **kwargs):
        raise gym.error.DependencyNotInstalled("something is missing")

    if missing == "gymnasium":
        monkeypatch.setattr(gym, "make", fail)
    else:
        monkeypatch.setitem(sys.modules, missing, None)
        monkeypatch.delitem(gym.registry, env_id, raising=False)
    with pytest.raises(UsageError, match=rf"not installed: pip install 'fastppo\[{extra}\]'"):
        make_envs(EnvConfig(env_id, N, "sync" if missing == "gymnasium" else "auto", backend=backend))


def test_the_command_line_asks_who_runs_it(tmp_path, capsys):
    """A wrong id is looked for in EnvPool's list, not in gymnasium's, before anything is written; a right one trains."""
    pytest.importorskip("envpool")
    common = ["--backend", "envpool", "--run-dir", str(tmp_path / "run"), "--env-id"]
    assert console([*common, "Braekout-v5"]) == 2
    assert "EnvPool has no Braekout-v5; nearest: Breakout-v5" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    few = ["--num-iterations", "1", "--num-steps", "8", "--eval-episodes", "0", "--compile", "off"]
    assert console([*common, "CartPole-v1", *few]) == 0
    assert ": 8 environments, envpool (as --backend envpool asks)" in capsys.readouterr().out


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_training_on_envpool(tmp_path, env_id):
    """The whole trainer, evaluation included, and the same seed gives the same numbers."""
    pytest.importorskip("envpool")
    settings = {"env_id": env_id, "backend": "envpool", "num_envs": 4, "num_steps": 32, "num_iterations": 3, "compile": "off"}
    runs = [train(TrainConfig(**settings, eval_episodes=4, run_dir=str(tmp_path / name))) for name in ("a", "b")]
    summaries = [run.summary for run in runs]
    assert summaries[0]["backend"] == "envpool"
    assert summaries[0]["eval_return_mean"] == summaries[1]["eval_return_mean"]
    assert (runs[0].policy.params == runs[1].policy.params).all()
