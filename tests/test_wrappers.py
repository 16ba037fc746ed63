"""Preprocessing by flags: each wrapper against gymnasium's or literal numbers, their order, and the verbs that apply them."""

import json
import re
import shlex
import sys

import cv2
import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, Text, Tuple

from fastppo import TrainConfig, UsageError, load_policy, train
from fastppo.__main__ import console
from fastppo.analysis.evaluation import EvaluationPlan, evaluate_config
from fastppo.config import read_run_config
from fastppo.core.space_rules import is_image
from fastppo.envs.atari import _channels_first
from fastppo.envs.factory import EnvConfig, default_vectorization, env_maker, make_envs
from fastppo.envs.preprocessing import Preprocessing
from fastppo.envs.wrappers import FrameSkip, join_channels, wrapped
from fastppo.policy.spaces import obs_spec
from fastppo.training.resumed_settings import check_resumable
from support.runs import tiny


class Film(gym.Env):
    """A film of ten noisy frames; each step pays its number. `form`: how a frame is laid out."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 40}  # noqa: RUF012
    action_space = Discrete(2)

    def __init__(self, height=50, width=60, form="last", end=10, render_mode=None):
        self.render_mode, self.form, self.end = render_mode, form, end
        self.frames = np.random.default_rng(0).integers(0, 256, (11, height, width, 3), np.uint8)
        picture = Box(0, 255, self._laid_out(0).shape, np.uint8)
        self.observation_space = picture
        if form == "dict":
            self.observation_space = Dict({"screen": picture, "place": Box(-1.0, 1.0, (2,))})
        if form == "tuple":
            self.observation_space = Tuple((picture, Discrete(11)))

    def _laid_out(self, number):
        frame = self.frames[number]
        return {"first": np.moveaxis(frame, -1, 0), "grey": frame[..., 0], "one": frame[..., :1]}.get(self.form, frame)

    def _obs(self):
        frame = self._laid_out(self.now)
        if self.form == "dict":
            return {"screen": frame, "place": np.full(2, self.now / 10, np.float32)}
        return (frame, self.now) if self.form == "tuple" else frame

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.now = 0
        return self._obs(), {}

    def step(self, action):
        self.now += 1
        return self._obs(), float(self.now), self.now == self.end, False, {"now": self.now}

    def render(self):
        return self.frames[self.now]


gym.register("Film-v0", entry_point=Film)


def film(settings=None, **kwargs):
    return wrapped(Film(**kwargs), Preprocessing(**settings or {}))


# --- each wrapper


def test_frame_skip_sums_rewards_and_stops_at_the_end():
    """Ten steps are 4, 4 and 2: rewards 1 + 2 + 3 + 4, then 26, then 9 + 10 with the end. The last observation is returned."""
    env = film({"frame_skip": 4})
    env.reset()
    results = [env.step(1) for _ in range(3)]
    assert [reward for _, reward, *_ in results] == [10.0, 26.0, 19.0]
    assert [terminated for _, _, terminated, *_ in results] == [False, False, True]
    assert [info["now"] for *_, info in results] == [4, 8, 10]
    np.testing.assert_array_equal(results[1][0], Film().frames[8])
    assert env.metadata["render_fps"] == 10
    assert Film.metadata["render_fps"] == 40


def test_frame_skip_stops_at_a_truncation():
    """The time limit is inside and counts the environment's steps."""
    env = FrameSkip(gym.wrappers.TimeLimit(Film(), 6), 4)
    env.reset()
    assert env.step(0)[3] is False
    _, reward, terminated, truncated, _ = env.step(0)
    assert (reward, terminated, truncated) == (5.0 + 6.0, False, True)


def test_pictures_are_gymnasiums():
    """Greyscale and resize in gymnasium's wrappers, with the same bits; resize alone is OpenCV's by areas."""
    theirs = gym.wrappers.ResizeObservation(gym.wrappers.GrayscaleObservation(Film()), (40, 44))
    ours = film({"grayscale": True, "resize": (40, 44)})
    assert ours.observation_space == theirs.observation_space == Box(0, 255, (40, 44), np.uint8)
    np.testing.assert_array_equal(ours.reset()[0], theirs.reset()[0])
    np.testing.assert_array_equal(ours.step(0)[0], theirs.step(0)[0])
    alone = film({"resize": (40,)}).reset()[0]
    np.testing.assert_array_equal(alone, cv2.resize(Film().frames[0], (40, 40), interpolation=cv2.INTER_AREA))


@pytest.mark.parametrize("form", ["last", "first", "dict", "tuple"])
def test_where_pictures_are(form):
    """A picture gives the same greys with its channels first or last, alone or in a Dict or Tuple."""
    plain, env = film({"grayscale": True, "resize": (40,)}), film({"grayscale": True, "resize": (40,)}, form=form)
    obs, space = env.reset()[0], env.observation_space
    assert obs in space
    if form == "dict":
        assert space["place"] == Box(-1.0, 1.0, (2,))
        obs = obs["screen"]
    if form == "tuple":
        assert obs[1] == 0
        obs = obs[0]
    np.testing.assert_array_equal(obs, plain.reset()[0])


def test_stacks():
    """The last frames, the oldest first, as channels; the first of an episode fills its stack."""
    env = film({"frame_stack": 3})
    frames = np.moveaxis(Film().frames, -1, 1)  # (11, C, H, W)
    assert env.observation_space == Box(0, 255, (9, 50, 60), np.uint8)
    np.testing.assert_array_equal(env.reset()[0], np.concatenate([frames[0]] * 3))
    env.step(0)
    np.testing.assert_array_equal(env.step(0)[0], np.concatenate(frames[:3]))
    np.testing.assert_array_equal(env.reset()[0], np.concatenate([frames[0]] * 3))
    np.testing.assert_array_equal(film({"frame_stack": 3}, form="first").reset()[0], np.concatenate([frames[0]] * 3))
    assert film({"frame_stack": 2}, form="grey").observation_space.shape == (2, 50, 60)
    assert film({"frame_stack": 2}, form="dict").observation_space["place"].shape == (2, 2)
    vectors = wrapped(gym.make("Pendulum-v1"), Preprocessing(frame_stack=4))
    first, _ = vectors.reset(seed=1)
    assert first.shape == (12,)
    np.testing.assert_array_equal(vectors.step([0.5])[0][:9], first[3:])


def test_channels_are_joined_as_atari_has_it():
    """Of one environment and of many: frame by frame, and within a frame colour by colour."""
    pictures = np.arange(2 * 3 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 3, 4, 5, 3)
    joined = join_channels(pictures)
    assert joined.shape == (2, 9, 4, 5)
    np.testing.assert_array_equal(joined[1], join_channels(pictures[1]))
    np.testing.assert_array_equal(joined[1, 4], pictures[1, 1, :, :, 1])
    envs = gym.vector.SyncVectorEnv([lambda: gym.wrappers.FrameStackObservation(Film(), 3)] * 2)
    np.testing.assert_array_equal(_channels_first(envs).reset()[0][1], film({"frame_stack": 3}).reset()[0])


def test_time():
    """The share of the limit, as one more number of a vector, else as a part of its own; under frame skip in its steps."""
    env = wrapped(gym.make("Pendulum-v1", max_episode_steps=8), Preprocessing(time_aware=True, frame_skip=2))
    assert env.reset()[0][-1] == 0.0
    assert [env.step([0.0])[0][-1] for _ in range(4)] == [0.25, 0.5, 0.75, 1.0]
    limited = gym.wrappers.TimeLimit(Film(), 4)
    obs, _ = wrapped(limited, Preprocessing(time_aware=True, resize=(40,))).reset()
    assert obs["obs"].shape == (40, 40, 3)
    assert obs["time"] == 0.0


def test_actions():
    """-1 and 1 are the environment's bounds."""
    given = []
    env = gym.wrappers.TransformAction(gym.make("Pendulum-v1"), lambda a: given.append(a) or a, Box(-2.0, 2.0, (1,)))
    env = wrapped(env, Preprocessing(rescale_action=True))
    env.reset()
    for action in (-1.0, 0.5, 1.0):
        env.step(np.array([action], np.float32))
    assert env.action_space == Box(-1.0, 1.0, (1,))
    assert np.concatenate(given).tolist() == [-2.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("space", "is_rescaled"),
    [
        (Box(0.0, 512.0, (2,)), True),  # PushT: a Gaussian of deviation 1 stays in the corner
        (Box(-0.1, 0.1, (1,)), True),
        (Box(np.float32([-1, 2]), np.float32([1, 4])), True),  # 0 is outside
        (Box(-2.0, 2.0, (1,)), False),
        (Box(np.float32([-1, 0]), np.float32([1, 1])), False),  # CarRacing
        (Box(-np.inf, np.inf, (1,)), False),
        (Box(0.0, 0.0, (1,)), False),
        (Discrete(3), False),
    ],
)
def test_actions_are_rescaled_by_default_where_their_bounds_are_far(space, is_rescaled):
    """From -1 to 1 then; False keeps the bounds."""
    env = Film()
    env.action_space = space
    assert wrapped(env, Preprocessing(rescale_action=False)).action_space == space
    assert (wrapped(env, Preprocessing()).action_space == Box(-1.0, 1.0, space.shape)) is is_rescaled


@pytest.mark.parametrize("shape", [(36, 36), (35, 36), (3, 40, 50), (40, 50, 3), (40, 50, 60), (50, 40, 36, 3), (400,)])
def test_what_a_picture_is(shape):
    """As the networks have it, so that nothing is resized that is not convolved."""
    space = Box(0, 255, shape, np.uint8)
    assert is_image(space) == obs_spec(space).has_images
    assert not is_image(Box(0, 1, shape, np.uint8))
    assert not is_image(Box(0, 255, shape, np.float32))


def test_nothing_asked():
    """Without a flag the environment is left as it is, and small pictures too."""
    env = Film(96, 96)
    assert wrapped(env, Preprocessing()) is env
    assert wrapped(env, Preprocessing(resize=(0,))) is env
    assert Preprocessing(resize=(0,)).flags == []
    large = Film(96, 97)
    assert wrapped(large, Preprocessing(resize=(0,))) is large
    assert wrapped(large, Preprocessing()).observation_space.shape == (84, 84, 3)


# --- in runs


@pytest.mark.long
def test_every_verb_applies_them(tmp_path, capsys):
    """All at once: recorded, trained, evaluated, filmed, exported with a line, resumed, and not changed on --resume."""
    run_dir = str(tmp_path / "run")
    flags = ["--env-id", "test_wrappers:Film-v0", "--num-envs", "2", "--num-steps", "8", "--num-iterations", "2", "--plain"]
    flags += ["--eval-episodes", "2", "--compile", "off", "--update-epochs", "1", "--cnn-size", "8", "--run-dir", run_dir]
    asked = ["--frame-skip", "3", "--grayscale", "--resize", "40", "44", "--frame-stack", "2"]
    assert console(["train", *flags, *asked, "--record-every", "2"]) == 0
    said = capsys.readouterr().out
    assert "return 55.0 +- 0.0 in 2 episodes" in said  # 1 + 2 + ... + 10
    assert "resized" not in said
    assert read_run_config(tmp_path / "run").preprocessing.words == " ".join(asked)
    assert load_policy(run_dir).act(np.zeros((2, 40, 44), np.uint8)).shape == ()
    assert console(["evaluate", run_dir, "--episodes", "2", "--video", "gif"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["return_mean"] == 55.0
    assert console(["export", run_dir]) == 0
    assert f"the file does not contain {' '.join(asked)}: prepare" in capsys.readouterr().out
    assert console(["train", "--resume", run_dir, "--num-iterations", "3"]) == 0
    assert console(["train", "--resume", run_dir, "--frame-stack", "3"]) == 2
    assert "there, and an image of shape (3, 40, 44), in [0, 255] in this run" in capsys.readouterr().err


@pytest.mark.parametrize("vectorization", ["sync", "grouped"])
def test_large_pictures_are_resized_by_themselves(vectorization, tmp_path, capsys):
    """A line says so; config.json has the size; a Python caller may resume with the default."""
    settings = {"env_id": "Film-v0", "env_kwargs": {"height": 100, "width": 120}, "num_steps": 8, "num_iterations": 1}
    settings |= {"vectorization": vectorization, "num_threads": 2, "cnn_size": 8, "update_epochs": 1}
    result = train(tiny(tmp_path / "run", **settings))
    assert "pictures of 100 x 120 pixels are resized to 84 x 84 (--resize 0 keeps them)" in capsys.readouterr().out
    config = read_run_config(tmp_path / "run")
    assert config.resize == (84, 84)
    assert evaluate_config(result.policy, config, EvaluationPlan(1))["return_mean"] == 55.0
    check_resumable(config, TrainConfig(**{**vars(config), "resize": None}))
    kept = train(tiny(tmp_path / "kept", **{**settings, "resize": (0,)}))
    assert kept.policy.act(np.zeros((100, 120, 3), np.uint8)).shape == ()


def test_an_environment_with_a_vector_class():
    """It is made one by one, if it can be, for wrappers; a time limit needs none."""
    stacked = EnvConfig("CartPole-v1", 2, preprocessing=Preprocessing(frame_stack=2))
    assert default_vectorization(EnvConfig("CartPole-v1")) == "entry-point"
    assert default_vectorization(stacked) == "sync"
    envs = make_envs(stacked)
    assert envs.single_observation_space.shape == (8,)
    envs.close()
    short = TrainConfig(max_episode_steps=7, num_envs=2).env_config
    for backend in ("gymnasium", "torch"):
        assert make_envs(EnvConfig("CartPole-v1", 2, env_kwargs=short.env_kwargs, backend=backend)) is not None
    assert env_maker(short)().spec.max_episode_steps == 7


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--env-id", "CartPole-v1", "--resize", "84"], "--resize: the observation, a Box, has no picture"),
        (["--env-id", "CartPole-v1", "--grayscale"], "--grayscale: the observation, a Box, has no picture"),
        (["--grayscale", "--env-kwargs", "form=grey"], "--grayscale: the picture has no three colours"),
        (["--time-aware"], "--time-aware needs a time limit, and the environment has none: add --max-episode-steps 1000"),
        (["--rescale-action"], "--rescale-action needs a Box action space with finite bounds, and this one is Discrete(2)"),
        (["--backend", "torch", "--frame-stack", "2"], "--frame-stack wraps environments one by one, and --backend torch"),
        (["--backend", "envpool", "--frame-skip", "2"], "--frame-skip wraps environments one by one, and --backend envpool"),
        (["--env-id", "CartPole-v1", "--vectorization", "entry-point", "--frame-stack", "2"], "use --vectorization auto, or"),
        (["--env-id", "environments:WalkVector-v0", "--frame-stack", "2", "--vectorization", "entry-point"], "vector class: "),
        (["--env-id", "ALE/Pong-v5", "--resize", "64"], "use --atari-screen-size instead"),
        (["--env-id", "ALE/Pong-v5", "--time-aware"], "Atari's games have preprocessing of their own: leave it off"),
        (["--env-id", "ALE/Pong-v5", "--max-episode-steps", "9"], "use --env-kwargs max_num_frames_per_episode=108000"),
        (["--resize", "1", "2", "3"], "--resize must be 0, or one or two whole numbers between 1 and 4096, got (1, 2, 3)"),
        (["--resize", "0", "5"], "--resize must be 0, or one or two whole numbers"),
        (["--max-episode-steps", "5", "--env-kwargs", "max_episode_steps=4"], "are the same time limit: give one of them"),
    ],
)
def test_what_does_not_fit(flags, message, tmp_path, capsys):
    """One line that names the flag, exit code 2, and nothing is written."""
    if "ALE/Pong-v5" in flags:
        pytest.importorskip("ale_py")
    if "--env-id" not in flags:
        flags = ["--env-id", "test_wrappers:Film-v0", *flags]
    assert console(["train", *flags, "--run-dir", str(tmp_path / "run"), "--plain"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()


def test_environments_of_your_own(tmp_path):
    """They have been made already."""
    for name in ("frame_stack", "max_episode_steps"):
        with pytest.raises(
            UsageError, match=f"--{name.replace('_', '-')} wraps environments that are made from --env-id, which"
        ):
            train(tiny(tmp_path / "run", **{name: 2}), envs=gym.make_vec("CartPole-v1", 2))


def test_without_opencv(monkeypatch):
    """The line says what to install, and how to go without where nobody has asked."""
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UsageError, match=r"^--resize needs OpenCV: pip install 'fastppo\[video\]'$"):
        film({"resize": (40,)})
    with pytest.raises(UsageError, match="or keep pictures of 100 x 120 with --resize 0"):
        film({}, height=100, width=120)


# --- wrappers of one's own


class Times(gym.RewardWrapper):
    """Rewards times `by`."""

    def __init__(self, env, by=2.0, name="times"):
        super().__init__(env)
        self.by = by

    def reward(self, reward):
        return reward * self.by


class Plus(gym.RewardWrapper):
    """Rewards plus 1."""

    def reward(self, reward):
        return reward + 1.0


def no_environment(env):
    """A function that forgets to return."""


OWN = ("test_wrappers:Plus", "test_wrappers:Times", "by=3", "name=a b")


class Told(gym.ObservationWrapper):
    """CartPole with a text in its observation, as MiniGrid's mission."""

    def __init__(self, env):
        super().__init__(env)
        self.observation_space = Dict({"mission": Text(9), "state": env.observation_space})

    def observation(self, obs):
        return {"mission": "balance", "state": obs}


def test_a_text_is_left_out_by_the_flag_that_the_error_names(tmp_path):
    """The words behind `leave it out:` are taken as they stand there."""
    told = ["train", "--env-id", "CartPole-v1", "--wrapper", "test_wrappers:Told", "--plain", "--eval-episodes", "0"]
    told += ["--num-iterations", "1", "--compile", "off", "--run-dir", str(tmp_path / "run")]
    with pytest.raises(UsageError, match="leave it out: ") as caught:
        obs_spec(Told(gym.make("CartPole-v1")).observation_space)
    words = re.search(r"leave it out: (.*), or pad", str(caught.value))[1]
    assert console([*told, *shlex.split(words)]) == 0
    assert load_policy(tmp_path / "run").act({"state": np.zeros(4, np.float32)}) in (0, 1)


def test_own_wrappers_are_put_on_in_order():
    """(reward + 1) * 3 of the frames 1 to 10, not reward * 3 + 1; those of the settings are outside of them."""
    settings = Preprocessing(wrapper=OWN, frame_skip=10)
    assert settings.wrappers == [("test_wrappers:Plus", {}), ("test_wrappers:Times", {"by": 3, "name": "a b"})]
    assert settings.flags == ["--frame-skip", "--wrapper"]
    env = wrapped(Film(), settings)
    env.reset()
    assert env.step(0)[1] == 3 * (55.0 + 10)


@pytest.mark.parametrize("vectorization", ["sync", "grouped", "auto"])
def test_every_verb_puts_own_wrappers_on(vectorization, tmp_path, capsys):
    """Train, config.json, evaluate, videos, resume and evaluation during training: each sees the changed rewards."""
    run_dir = str(tmp_path / "run")
    flags = ["--env-id", "test_wrappers:Film-v0", "--num-envs", "2", "--num-steps", "8", "--num-iterations", "2", "--plain"]
    flags += ["--eval-episodes", "1", "--compile", "off", "--update-epochs", "1", "--cnn-size", "8", "--run-dir", run_dir]
    flags += ["--vectorization", vectorization, "--num-threads", "2", "--eval-every", "1"]
    asked = ["--wrapper", OWN[0], "--gamma", "0.9", f"--wrapper={OWN[1]}", "--wrapper", *OWN[2:]]
    assert console(["train", *flags, *asked]) == 0
    said = capsys.readouterr().out
    assert said.count("return 195.0 +- 0.0 in 1 episodes") == 3  # 3 * (1 + ... + 10 + 10)
    config = read_run_config(tmp_path / "run")
    assert (config.wrapper, config.gamma) == (OWN, 0.9)
    assert console(["evaluate", run_dir, "--episodes", "2", "--video", "gif"]) == 0
    captured = capsys.readouterr().out
    assert "return 195 in 10 steps" in captured
    assert json.loads(captured.splitlines()[-1])["return_mean"] == 195.0
    assert console(["train", "--resume", run_dir, "--num-iterations", "3"]) == 0
    assert read_run_config(tmp_path / "run").wrapper == OWN


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["test_wrappers:Plu"], "--wrapper test_wrappers:Plu: test_wrappers (.*) has no 'Plu'; nearest: Plus"),
        (
            ["FlattenObservatio"],
            "--wrapper FlattenObservatio: write module:NAME; nearest: gymnasium.wrappers:FlattenObservation",
        ),
        (["by=2"], "--wrapper by=2: name the wrapper first, as --wrapper my_module:MyWrapper by=2"),
        (["no_module:Plus"], "--wrapper no_module:Plus: module 'no_module' cannot be imported: it is neither installed nor in"),
        (["test_wrappers:OWN"], "--wrapper test_wrappers:OWN: OWN is of type tuple, not a function or class"),
        (["test_wrappers:Times", "of=2"], "--wrapper test_wrappers:Times: its arguments do not fit: TypeError: .*'of'"),
        (["test_wrappers:Times", "2b=2"], "--wrapper test_wrappers:Times takes KEY=VALUE pairs, got '2b=2'"),
        (["test_wrappers:no_environment"], "--wrapper test_wrappers:no_environment: it returned None, not a gymnasium Env"),
        (["test_wrappers:Plus", "--backend", "torch"], "--wrapper wraps environments one by one, and --backend torch"),
        (["test_wrappers:Plus", "--vectorization", "entry-point"], "--wrapper wraps environments one by one, and CartPole-v1"),
    ],
)
def test_a_wrong_wrapper_is_one_line(given, says, tmp_path, capsys):
    """With the flag and the nearest name, before anything is written."""
    assert console(["train", "--plain", "--run-dir", str(tmp_path / "run"), "--wrapper", *given]) == 2
    assert re.search(says, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
