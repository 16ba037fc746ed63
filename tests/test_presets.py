"""Presets: the right one for each environment, nothing lost to it, and a line that says what was chosen."""

import json
import os
import subprocess
import sys
from dataclasses import fields, replace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete

import fastppo
from fastppo import TrainConfig, UsageError, preset_for, train
from fastppo.bounds import flag
from fastppo.cli import parse_train
from fastppo.envs.registry import find_spec
from fastppo.find_preset import choose_preset, describe, load_preset
from fastppo.policy.spaces import action_spec, obs_spec
from fastppo.presets import PRESETS
from fastppo.train import console
from fastppo.training.by_spaces import by_spaces
from fastppo.training.results import TrainResult

TINY = [
    "--num-envs",
    "2",
    "--num-steps",
    "8",
    "--num-minibatches",
    "2",
    "--num-iterations",
    "1",
    "--eval-episodes",
    "0",
    "--plain",
]
# what a preset may not say: where and how a run is computed, shown and kept
NOT_A_PRESETS = {"preset", "env_id", "env_kwargs", "vectorization", "backend", "device", "num_threads", "compile", "plain"} | {
    "run_dir", "resume", "checkpoint_seconds", "log_interval"
}  # fmt: skip


@pytest.mark.parametrize(
    ("env_id", "name"),
    [
        ("CartPole-v1", "classic"),
        ("CartPole-v0", "classic"),
        ("MountainCar-v0", "MountainCar"),
        ("MountainCarContinuous-v0", "MountainCarContinuous"),
        ("Acrobot-v1", "Acrobot"),
        ("Pendulum-v1", "Pendulum"),
        ("LunarLander-v3", "LunarLander"),
        ("LunarLanderContinuous-v3", "LunarLanderContinuous"),
        ("BipedalWalker-v3", "BipedalWalker"),
        ("BipedalWalkerHardcore-v3", "BipedalWalkerHardcore"),
        ("CarRacing-v3", "box2d"),
        ("HalfCheetah-v5", "HalfCheetah"),
        ("HalfCheetah-v4", "HalfCheetah"),
        ("environments:HalfCheetah-v5", "HalfCheetah"),
        ("Hopper-v5", "Hopper"),
        ("Ant-v5", "mujoco"),
        ("Pusher-v4", "mujoco"),
        ("InvertedDoublePendulum-v5", "InvertedDoublePendulum"),
        ("InvertedPendulum-v5", "mujoco"),
        ("ALE/Pong-v5", "atari"),
        ("ale_py:ALE/Pong-v5", "atari"),
        ("PongNoFrameskip-v4", "atari"),
        ("environments:Walk-v0", "general"),
        ("environments:Hopper", "Hopper"),
        ("Hoppers-v5", "general"),
        ("article-v0", "general"),  # a preset's name is no environment's
        ("no_such_module:Walk-v0", "general"),
        ("", "general"),
    ],
)
def test_choice_by_id(env_id, name):
    """An environment's own preset in every version, else its family's, else general; nothing is raised for an unknown id."""
    assert choose_preset(env_id).name == name


@pytest.mark.parametrize(
    ("entry_point", "name"),
    [
        ("gymnasium.envs.mujoco.ant_v5:AntEnv", "mujoco"),
        ("gymnasium.envs.box2d.lunar_lander:LunarLander", "box2d"),
        ("gymnasium.envs.box2data:Other", "general"),
        ("ale_py.env:AtariEnv", "atari"),
        (gym.envs.registration.load_env_creator("gymnasium.envs.classic_control.pendulum:PendulumEnv"), "classic"),
        (lambda: None, "general"),
    ],
)
def test_choice_by_class(entry_point, name):
    """Somebody's registration of a class of a family, as text or as the class itself, gets the family's preset."""
    gym.register("Mine-v0", entry_point=entry_point)
    try:
        assert choose_preset("Mine-v0").name == name
    finally:
        del gym.registry["Mine-v0"]


@pytest.mark.parametrize(("package", "registers"), [("ale_py", "PongNoFrameskip-v4"), ("mujoco", None), ("Box2D", None)])
def test_choice_with_the_package_there(package, registers):
    """The registry says the same as the id where the package that registers more ids is installed."""
    module = pytest.importorskip(package)
    if registers:
        gym.register_envs(module)
        assert find_spec(registers).entry_point.startswith("ale_py")
    ids = {
        "ale_py": ["Pong-v4", "Breakout-v0", "ALE/Breakout-v5"],
        "mujoco": ["Ant-v4", "Pusher-v5"],
        "Box2D": ["CarRacing-v3"],
    }
    families = {"ale_py": "atari", "mujoco": "mujoco", "Box2D": "box2d"}
    assert {choose_preset(env_id).name for env_id in ids[package]} == {families[package]}


def test_choosing_costs_neither_torch_nor_the_environment():
    """`--help` for an environment shows its preset's values, and neither torch nor an environment's package is imported."""
    code = (
        "import sys\n"
        "from fastppo import preset_for\n"
        "from fastppo.cli import parse_train\n"
        "assert preset_for('Ant-v5').preset == 'mujoco' and preset_for('LunarLander-v3').num_envs == 16\n"
        "assert parse_train(['--env-id', 'ALE/Pong-v5']).preset == 'atari'\n"
        "heavy = {'torch', 'mujoco', 'Box2D', 'ale_py', 'pygame'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_cartpole_keeps_its_settings():
    """`--num-envs 8` alone: the README's figures and the throughput gate were made with these."""
    config = parse_train(["--num-envs", "8"])
    assert replace(config, preset="none") == TrainConfig()
    assert config.preset == "classic"
    assert (config.num_envs, config.num_steps, config.num_minibatches, config.update_epochs) == (8, 128, 4, 4)
    assert config.learning_rate == 2.5e-3


@pytest.mark.parametrize("name", list(PRESETS))
def test_by_name(name):
    """--preset sets its values and, alone, its environment; flags given with it win wherever they stand; its name is kept."""
    config = PRESETS[name].config()
    assert config.preset == name
    assert parse_train(["--preset", name]) == parse_train([f"--preset={name}"]) == config
    assert parse_train(["--gamma", "0.5", "--preset", name, "--seed", "9"]) == replace(config, gamma=0.5, seed=9)
    assert parse_train(["--env-id", "X-v0", "--preset", name]) == replace(config, env_id="X-v0")
    if name not in ("article", "general"):  # its example is what the preset is chosen for
        assert choose_preset(config.env_id).settings == PRESETS[name].settings


@pytest.mark.parametrize("flags", [[], ["--preset", "auto"], ["--preset=auto"]], ids=" ".join)
def test_auto(flags):
    """The command line's default: by the id, the flags over it, recorded under the name of what it chose."""
    config = parse_train(["--learning-rate", "1e-4", "--env-id", "Hopper-v5", *flags])
    assert config == replace(PRESETS["Hopper"].config("Hopper-v5"), learning_rate=1e-4)
    assert parse_train(["--env-id", "module:Hopper-v4", *flags]).env_id == "module:Hopper-v4"
    config = parse_train(["--env-id", "Hopper-v5", "--minibatch-size", "64", "--num-iterations", "3", *flags])
    assert (config.rows_per_minibatch, config.num_iterations) == (64, 3)


def test_none():
    """--preset none: TrainConfig's own settings on any environment."""
    assert parse_train(["--preset", "none", "--env-id", "Hopper-v5"]) == TrainConfig(env_id="Hopper-v5")


def test_from_python():
    """TrainConfig is what was written; preset_for is what the command line would start from."""
    assert TrainConfig(env_id="Hopper-v5").num_steps == TrainConfig().num_steps
    assert replace(preset_for("Hopper-v5"), seed=3) == parse_train(["--env-id", "Hopper-v5", "--seed", "3"])
    assert fastppo.preset_for is preset_for
    assert "preset_for" in fastppo.__all__


@pytest.mark.parametrize(
    "settings",
    [
        {"desired_kl": None},
        {"total_timesteps": 1000, "num_iterations": None},
        {"num_minibatches": 8, "minibatch_size": None},
        {"clip_reward": True},
    ],
)
def test_none_replaces_nothing(settings):
    """A setting given as None leaves its rivals as they are, from Python and as a flag; one that is the last word counts."""
    flags = [word for name, value in settings.items() for word in (flag(name), str(value)) if word != "True"]
    config = preset_for("Pendulum-v1", **settings)
    assert parse_train(["--env-id", "Pendulum-v1", *flags]) == config
    assert config == replace(preset_for("Pendulum-v1"), **settings, norm_reward="clip_reward" not in settings)


def test_help_shows_the_presets_values(capsys):
    """--help answers with the values that a run with the other flags would have."""
    with pytest.raises(SystemExit):
        console(["--env-id", "Humanoid-v5", "--help"])
    assert "3.56987e-05" in capsys.readouterr().out


@pytest.mark.parametrize("num_envs", [None, 1, 4, 16, 100])
@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_with_other_numbers_of_environments(name, num_envs):
    """Minibatches divide the batch whatever --num-envs alone is set to."""
    flags = [] if num_envs is None else ["--num-envs", str(num_envs)]
    config = parse_train(["--preset", name, *flags])
    assert config.num_envs == (num_envs or PRESETS[name].settings.get("num_envs", 8))
    assert config.rows_per_minibatch * config.minibatches_per_epoch == config.batch_size


def test_the_usual_error_where_a_flag_does_not_fit():
    """A preset's minibatches and a user's steps that do not go together: the flags and the nearest right value."""
    with pytest.raises(UsageError, match=r"--num-minibatches 256 does not divide the batch of 160 .*160"):
        parse_train(["--env-id", "LunarLander-v3", "--num-steps", "10"])


def test_the_sources_batches():
    """Rows of a minibatch and of a rollout as the sources have them: `batch_size`, `n_envs * n_steps` of the zoo's ppo.yml."""
    rows = {name: (preset.config().rows_per_minibatch, preset.config().batch_size) for name, preset in PRESETS.items()}
    assert rows == {
        "none": (256, 1024),
        "default": (256, 1024),
        "classic": (256, 1024),
        "general": (64, 1024),
        "article": (256, 1024),
        "continuous": (64, 1024),
        "Pendulum": (64, 1024),
        "box2d": (64, 16 * 1024),
        "mujoco": (64, 2048),
        "atari": (256, 8 * 128),
        "Acrobot": (64, 16 * 256),
        "MountainCar": (64, 16 * 16),
        "MountainCarContinuous": (64, 2048),
        "LunarLander": (64, 16 * 1024),
        "LunarLanderContinuous": (64, 16 * 1024),
        "BipedalWalker": (64, 32 * 2048),
        "BipedalWalkerHardcore": (64, 16 * 2048),
        "HalfCheetah": (64, 2048),
        "Hopper": (64, 2048),
        "Walker2d": (64, 2048),
        "InvertedDoublePendulum": (64, 2048),
        "Swimmer": (256, 4 * 1024),
        "Reacher": (32, 512),
        "Humanoid": (256, 512),
        "HumanoidStandup": (32, 512),
    }


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "article"])
def test_presets_are_about_learning(name):
    """No preset says where, how or with which seed a run is computed or kept; each setting is one of TrainConfig's."""
    settings = set(PRESETS[name].settings)
    assert settings <= {spec.name for spec in fields(TrainConfig)}
    assert not settings & (NOT_A_PRESETS | {"seed", "eval_episodes"})


def test_the_printed_line():
    """Name, environment, source, and the values in effect: a flag's over the preset's, none that is the default anyway."""
    config = parse_train(["--env-id", "LunarLander-v3", "--num-envs", "4", "--gamma", "0.99"])
    assert describe(config) == (
        "preset LunarLander (LunarLander-v3; RL Zoo, hyperparams/ppo.yml at 00128b5, with layer normalisation): "
        "learning_rate 0.0003, no anneal_lr, total_timesteps 1000000, num_envs 4, num_steps 1024, num_minibatches 256, "
        "gae_lambda 0.98, ent_coef 0.01, layer_norm"
    )
    assert describe(parse_train([])) == "preset classic (CartPole-v1; fastppo's own): the defaults of every flag"
    assert "norm_obs, norm_reward" in describe(preset_for("Hopper-v5"))
    assert "hidden_sizes 256 256" in describe(preset_for("Humanoid-v5"))
    assert describe(TrainConfig(env_id="Hopper-v5")) is None
    assert describe(TrainConfig(preset="of another version")) is None


def test_a_run_and_its_continuation(tmp_path, capsys):
    """The line is printed once, config.json has the name, and --resume takes the run's own settings."""
    run_dir = tmp_path / "run"
    assert console([*TINY, "--env-id", "Pendulum-v1", "--gamma", "0.8", "--run-dir", str(run_dir)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("preset ")]
    assert len(lines) == 1
    assert lines[0].startswith("preset Pendulum (Pendulum-v1; fastppo's own): norm_obs, norm_reward")
    assert "gamma 0.8" in lines[0]
    before = TrainConfig.from_json(run_dir / "config.json")
    assert (before.preset, before.gamma, before.learning_rate) == ("Pendulum", 0.8, 7e-4)

    assert console(["--resume", str(run_dir), "--num-iterations", "2"]) == 0
    assert "preset" not in capsys.readouterr().out
    after = TrainConfig.from_json(run_dir / "config.json")
    assert after == replace(before, num_iterations=2, resume=str(run_dir))
    assert console(["--resume", str(run_dir), "--preset", "none"]) == 2
    assert "--preset none cannot change on --resume" in capsys.readouterr().err


def test_train_from_python_takes_no_preset(tmp_path, capsys):
    """train(TrainConfig(env_id=...)) is exactly what was written, and no line claims otherwise."""
    config = TrainConfig(
        env_id="Pendulum-v1",
        num_envs=2,
        num_steps=8,
        num_minibatches=2,
        num_iterations=1,
        eval_episodes=0,
        run_dir=str(tmp_path),
    )
    assert isinstance(train(config), TrainResult)
    assert TrainConfig.from_json(tmp_path / "config.json") == config
    assert not config.norm_obs
    assert "preset" not in capsys.readouterr().out


def test_help_and_errors_name_the_presets(capsys):
    """A name that there is not: every name, and the nearest."""
    assert console(["--preset", "hoper"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) <= 2
    for name in ("auto", *PRESETS):
        assert f" {name}" in error
    assert "nearest: Hopper" in error


# --- settings that an environment's spaces choose


@pytest.mark.parametrize(
    ("obs", "action", "words", "chosen"),
    [
        (Discrete(5), Discrete(2), "discrete observations, discrete actions", (1e-3, 10, 0.01)),
        (Box(-1, 1, (3,)), Box(-1, 1, (2,)), "vector observations, continuous actions", (1e-3, 10, 0.0)),
        (Box(0, 255, (7, 7, 3), np.uint8), MultiDiscrete([2, 3]), "vector observations, discrete actions", (1e-3, 10, 0.01)),
        (
            Dict(a=Box(0, 255, (84, 84), np.uint8)),
            Box(-1, 1, (1,)),
            "picture observations, continuous actions",
            (2.5e-4, 4, 0.0),
        ),
    ],
)
def test_settings_by_spaces(obs, action, words, chosen):
    """What --preset general leaves open, by observations and actions; what a user has set stays."""
    names, config = ("learning_rate", "update_epochs", "ent_coef"), PRESETS["general"].config()
    spec = action_spec(action, False)
    assert by_spaces(config, obs_spec(obs), spec) == (
        dict(zip(names, chosen, strict=True)),
        [f"settings for: {words}, 100,000 steps"],
    )
    mine = dict(zip(names, (0.5, 7, 0.25), strict=True))
    assert by_spaces(replace(config, **mine), obs_spec(obs), spec) == ({}, [])
    assert by_spaces(TrainConfig(), obs_spec(obs), spec) == ({}, [])


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({"total_timesteps": 5_000}, 1e-3),
        ({"total_timesteps": 316_228}, 5.48e-4),
        ({"total_timesteps": 1_000_000}, 3e-4),
        ({"total_timesteps": 50_000_000}, 3e-4),
        ({"num_iterations": 625, "num_envs": 10, "num_steps": 160}, 3e-4),
    ],
    ids=str,
)
def test_a_long_run_starts_from_a_lower_learning_rate(settings, rate):
    """1e-3 for 100,000 steps, 3e-4 for a million, their geometric mean between; iterations count as their steps."""
    config = replace(PRESETS["general"].config(), **settings)
    chosen, (line,) = by_spaces(config, obs_spec(Box(-1, 1, (3,))), action_spec(Box(-1, 1, (2,)), False))
    assert chosen["learning_rate"] == rate
    assert line.endswith(f" {config.total_timesteps if config.num_iterations is None else 1_000_000:,} steps")


@pytest.mark.parametrize(
    ("settings", "minibatches"),
    [
        ({}, 16),
        ({"num_envs": 3, "num_steps": 20}, 15),
        ({"num_steps": 10}, 16),
        ({"num_envs": 1, "num_steps": 7}, 7),
        ({"num_envs": 3, "num_steps": 20, "num_minibatches": 4}, 4),
        ({"num_envs": 3, "num_steps": 20, "minibatch_size": 6}, 10),
    ],
)
def test_any_size_of_a_batch_will_do(settings, minibatches):
    """--preset general has at most 16 minibatches, and as many as divide the batch, unless they are given; as flags too."""
    flags = [word for name, value in settings.items() for word in (flag(name), str(value))]
    config = parse_train(["--env-id", "environments:Walk-v0", *flags])
    assert config == preset_for("environments:Walk-v0", **settings)
    assert config.minibatches_per_epoch == minibatches
    with pytest.raises(UsageError, match="--num-minibatches 16 does not divide the batch of 60"):
        preset_for("environments:Walk-v0", num_envs=3, num_steps=20, num_minibatches=16)


def test_an_environment_without_a_preset(tmp_path, capsys):
    """Its spaces choose; config.json has every value; a flag wins; --clip-reward replaces the scaling of rewards."""
    args = [*TINY, "--env-id", "environments:Walk-v0", "--run-dir", str(tmp_path / "run"), "--ent-coef", "0.5"]
    assert console(args) == 0
    out = capsys.readouterr().out
    assert "preset general (environments:Walk-v0; fastppo's own): norm_obs, norm_reward, recompute_advantage, no norm_" in out
    assert "layer_norm, " in out
    assert "learning_rate 0.001, update_" in out
    assert "settings for: " in out
    config = TrainConfig.from_json(tmp_path / "run" / "config.json")
    assert (config.preset, config.learning_rate, config.update_epochs, config.ent_coef) == ("general", 1e-3, 10, 0.5)
    clipped = parse_train(["--env-id", "environments:Walk-v0", "--clip-reward"])
    assert (clipped.clip_reward, clipped.norm_reward) == (True, False)
    with pytest.raises(UsageError, match="--clip-reward and --norm-reward"):
        parse_train(["--env-id", "environments:Walk-v0", "--clip-reward", "--norm-reward"])


# --- preset files


def preset_file(path, text=None, **data):
    """A preset file of this text, or of these keys."""
    path.write_text(json.dumps(data) if text is None else text)
    return path


def test_a_preset_file(tmp_path):
    """Its settings and its environment, under its path as the name; flags win wherever they stand; Python reads the same."""
    settings = {"gamma": 0.9, "hidden_sizes": [8, 4], "norm_obs": True, "max_grad_norm": float("inf"), "env_kwargs": {"g": 9}}
    path = preset_file(tmp_path / "mine.json", settings=settings, source="a friend", env_id="Pendulum-v1")
    config = parse_train(["--preset", str(path)])
    assert config == load_preset(path) == fastppo.load_preset(str(path))
    assert config == TrainConfig(
        preset=str(path), env_id="Pendulum-v1", gamma=0.9, hidden_sizes=(8, 4), norm_obs=True, max_grad_norm=float("inf"),
        env_kwargs={"g": 9},
    )  # fmt: skip
    flags = ["--gamma", "0.5", f"--preset={path}", "--env-id", "X-v0", "--no-norm-obs"]
    assert parse_train(flags) == replace(config, gamma=0.5, env_id="X-v0", norm_obs=False)
    assert describe(replace(config, gamma=0.5)) == (
        f"preset {path} (Pendulum-v1; a friend): "
        "gamma 0.5, hidden_sizes 8 4, norm_obs, max_grad_norm inf, env_kwargs {'g': 9}"
    )
    bare = load_preset(preset_file(tmp_path / "bare.json", settings={}))
    assert bare == TrainConfig(preset=str(tmp_path / "bare.json"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"settings": {"gama": 0.9}}', "'gama' is not a setting of a preset; nearest: gamma"),
        ('{"settings": {"gamma": "0.9"}}', "--gamma must be between 0 and 1, got '0.9'"),
        ('{"settings": {"gamma": 2}}', "--gamma must be between 0 and 1, got 2"),
        ('{"settings": {"num_envs": 8.0}}', "--num-envs must be a whole number of at least 1, got 8.0"),
        ('{"settings": {"norm_obs": 1}}', "--norm-obs must be true or false, got 1"),
        ('{"settings": {"num_minibatches": 3}}', "--num-minibatches 3 does not divide"),
        ('{"settings": {"run_dir": "/"}}', "'run_dir' is not a setting of a preset"),
        ('{"settings": {"resume": "/"}}', "'resume' is not a setting of a preset"),
        ('{"settings": {"env_id": "X-v0"}}', "'env_id' is not a setting of a preset"),
        ('{"settings": {"gamma": 0.9, "gamma": 0.8}}', "a name appears twice"),
        ('{"settings": [1]}', "settings must be names with values"),
        ('{"gamma": 0.9}', "'gamma' is not a key of a preset file"),
        ('{"setting": {}}', "'setting' is not a key of a preset file; nearest: settings"),
        ("{}", "settings must be names with values"),
        ('{"settings": {}, "source": "two\\nlines"}', "source must be a line of text"),
        ('{"settings": {}, "source": 1}', "source must be a line of text"),
        ('{"settings": {}, "env_id": 1}', "--env-id must be a text, got 1"),
        ("[]", "does not hold a preset"),
        ("gamma = 0.9", "is damaged"),
        ("[" * 100_000, "is damaged"),
        (" " * (2**20 + 1), "is larger than any"),
    ],
    ids=lambda text: text[:40],
)
def test_a_wrong_preset_file(text, says, tmp_path, capsys):
    """As strict as config.json: one line that names the file and what is wrong in it; exit code 2, nothing written."""
    path = preset_file(tmp_path / "mine.json", text)
    assert console(["--preset", str(path), "--run-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}")
    assert says in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_preset_file_that_is_not_there(tmp_path, capsys):
    """Named as a file where it looks like one: it ends in .json or has a directory in it."""
    for name in (str(tmp_path / "mine.json"), "none_such.json", str(tmp_path / "mine"), str(tmp_path)):
        assert console(["--preset", name]) == 2
        error = capsys.readouterr().err
        assert name in error
        assert "cannot be read" in error or "is not a regular file" in error
    assert console(["--preset", 300 * "x"]) == 2  # no name of a file
    assert "got 'xxx" in capsys.readouterr().err


def test_a_run_from_a_file_goes_on_without_it(tmp_path, capsys):
    """config.json has the path and every setting: the file is told of once, and is not needed afterwards."""
    path = preset_file(tmp_path / "mine.json", settings={"gamma": 0.9}, source="a friend")
    run_dir = tmp_path / "run"
    assert console([*TINY, "--preset", str(path), "--learning-rate", "0.001", "--run-dir", str(run_dir)]) == 0
    assert f"preset {path} (CartPole-v1; a friend): gamma 0.9\n" in capsys.readouterr().out
    before = TrainConfig.from_json(run_dir / "config.json")
    assert (before.preset, before.gamma, before.learning_rate) == (str(path), 0.9, 0.001)

    path.unlink()
    assert console(["--resume", str(run_dir), "--num-iterations", "2"]) == 0
    after = TrainConfig.from_json(run_dir / "config.json")
    assert after == replace(before, num_iterations=2, resume=str(run_dir))
    assert describe(after) is None
