"""Videos and windows: as many frames as there were states, pictures that move, a run whose bits they do not touch."""

import json
import os
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from PIL import Image

from fastppo import Callback, TrainConfig, UsageError, train
from fastppo.analysis.video import choose_suffix, video_file
from fastppo.envs.atari import AtariSettings, make_ale, make_rgb_ale
from fastppo.envs.factory import EnvConfig
from fastppo.envs.render import make_render_env
from fastppo.evaluate import console

SMALL = {"num_envs": 4, "num_steps": 32, "num_iterations": 4, "eval_episodes": 0, "compile": "off", "device": "cpu"}


@pytest.fixture(scope="module", params=["gymnasium", "torch"])
def cartpole(request, tmp_path_factory):
    """A run of few steps, on either backend, that recorded its second and fourth iteration."""
    run_dir = tmp_path_factory.mktemp("video") / "run"
    return train(TrainConfig(**SMALL, backend=request.param, record_every=2, run_dir=str(run_dir))).run_dir


def read_video(path):
    """Oracle: the frames as imageio or Pillow reads them, and how long each is shown in units of the first."""
    if path.suffix == ".mp4":
        imageio = pytest.importorskip("imageio")
        frames = [frame[::4, ::4].astype(int) for frame in imageio.get_reader(path)]
        return frames, [1] * len(frames)
    image = Image.open(path)
    frames, durations = [], []
    for index in range(image.n_frames):
        image.seek(index)
        frames.append(np.asarray(image.convert("RGB"))[::4, ::4].astype(int))
        durations.append(image.info["duration"])
    return frames, [duration // 20 for duration in durations]  # CartPole: 50 a second


@pytest.mark.parametrize("kind", ["mp4", "gif"])
@pytest.mark.long
def test_a_video_has_a_frame_for_every_state(cartpole, kind, capsys):
    """CartPole pays 1 a step, so the return says how many steps were taken; a GIF joins frames that are alike."""
    if kind == "mp4":
        pytest.importorskip("imageio_ffmpeg")
    assert console([str(cartpole), "--episodes", "2", "--video", kind, "--video-episodes", "2"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    assert set(report) == {"return_mean", "return_std", "episodes", "video"}
    step = torch.load(cartpole / "checkpoints" / "best.pt", weights_only=True)["global_step"]
    paths = [cartpole / "videos" / f"eval-step-{step}-episode-{index}.{kind}" for index in range(2)]
    assert report["video"] == str(paths[0])
    for path, line in zip(paths, lines, strict=False):
        steps = int(line.removeprefix(f"{path}: return ").split()[0])
        frames, durations = read_video(path)
        assert sum(durations) == steps + 1
        assert frames[0].shape == (100, 150, 3)
        assert np.abs(frames[-1] - frames[0]).max() > 100  # the pole has fallen since
        assert frames[0].std() > 10
    assert not list((cartpole / "videos").glob(".*"))


def test_record_every_leaves_a_video_for_each(cartpole):
    """Iterations 2 and 4 of four, at the steps that metrics.csv names."""
    rows = (cartpole / "metrics.csv").read_text().splitlines()[1:]
    steps = {row.split(",")[1] for row in rows if row.split(",")[0] in ("2", "4")}
    assert {path.stem.removeprefix("step-") for path in (cartpole / "videos").glob("step-*")} == steps
    assert len(steps) == 2


@pytest.mark.parametrize("backend", ["gymnasium", "torch"])
@pytest.mark.long
def test_recording_leaves_the_bits_of_a_run_alone(backend, tmp_path):
    """Parameters and returns of a run that records after every iteration are those of one that never does."""
    results = [
        train(TrainConfig(**SMALL, backend=backend, record_every=every, run_dir=str(tmp_path / str(every))))
        for every in (None, 1)
    ]
    assert torch.equal(results[0].policy.params, results[1].policy.params)
    assert results[0].summary["best_return_mean"] == results[1].summary["best_return_mean"]
    assert not (tmp_path / "None" / "videos").exists()
    assert len(list((tmp_path / "1" / "videos").iterdir())) == 4


def test_recording_leaves_the_environment_variables_alone(tmp_path, monkeypatch):
    """A window that the caller opens afterwards is seen, and a variable of the caller's keeps its value."""
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER", "SDL_AUDIODRIVER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    before = dict(os.environ)
    envs = make_render_env(EnvConfig("CartPole-v1"))
    assert os.environ["SDL_AUDIODRIVER"] == "dummy"
    envs.close()
    assert os.environ == before
    with pytest.raises(UsageError):
        make_render_env(EnvConfig("environments:Walk-v0"))
    assert os.environ == before
    train(TrainConfig(**SMALL, record_every=4, run_dir=str(tmp_path / "run")))
    assert not any(name.startswith(("SDL_", "MUJOCO_GL")) for name in os.environ.keys() - before.keys())


def test_a_video_that_fails_costs_a_line(tmp_path, capsys):
    """A file in the place of the directory: every recording fails, the run does not."""

    class Block(Callback):
        def on_iteration(self, run):
            if run.iteration == 1:
                (run.run_dir / "videos").write_text("")

    result = train(TrainConfig(**SMALL, record_every=1, run_dir=str(tmp_path / "run")), callbacks=[Block()])
    assert result.summary["iterations"] == 4
    assert capsys.readouterr().out.count("no video of this iteration: ") == 4


@pytest.mark.parametrize("kind", ["mp4", "gif"])
def test_whole_or_not_at_all(tmp_path, kind):
    """An episode that is interrupted leaves no file, and one from before as it was. Sizes may be odd."""
    if kind == "mp4":
        pytest.importorskip("imageio_ffmpeg")
    path = tmp_path / "videos" / f"a.{kind}"
    frames = np.random.default_rng(0).integers(0, 255, (3, 33, 41, 3), dtype=np.uint8)
    with video_file(path, 50.0) as show:
        for frame in frames:
            show(frame)
    before = path.read_bytes()
    assert len(read_video(path)[0]) == 3

    def interrupted():
        with video_file(path, 50.0) as show:
            show(frames[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_without_ffmpeg_it_is_a_gif(monkeypatch):
    """Said in one line; mp4 by name is refused with the package that brings it."""
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    suffix, line = choose_suffix("auto")
    assert suffix == ".gif"
    assert "pip install 'fastppo[video]'" in line
    with pytest.raises(UsageError, match=r"--video mp4 needs ffmpeg: pip install 'fastppo\[video\]'"):
        choose_suffix("mp4")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--video", "avi"], "--video takes mp4, gif or nothing, got 'avi'"),
        (["--video", "--video-episodes", "0"], "--video-episodes must be at least 1, got 0"),
        (["--video"], "environments:Walk-v0 cannot be rendered: it has no render mode rgb_array; its render modes: none"),
        (["--render", "human"], "--render human can open no window (there is no display)"),
    ],
)
def test_what_cannot_be_shown_is_refused(tmp_path, flags, said, capsys, monkeypatch):
    """Exit code 2, one line, no directory for videos."""
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.delenv(name, raising=False)
    run_dir = train(TrainConfig(**SMALL, env_id="environments:Walk-v0", run_dir=str(tmp_path / "run"))).run_dir
    capsys.readouterr()
    assert console([str(run_dir), *flags]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""
    assert not (run_dir / "videos").exists()


def test_record_every_is_refused_before_anything_is_written(tmp_path):
    """An environment without a render mode, and one that was given."""
    config = TrainConfig(**SMALL, env_id="environments:Walk-v0", record_every=1, run_dir=str(tmp_path / "run"))
    with pytest.raises(UsageError, match="no render mode rgb_array"):
        train(config)
    with pytest.raises(UsageError, match="--record-every makes environments of its own"):
        train(TrainConfig(**SMALL, record_every=1, run_dir=str(tmp_path / "run")), envs=gym.make_vec("CartPole-v1", num_envs=4))
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_window_shows_the_episodes_that_are_counted(cartpole):
    """SDL's dummy display takes what a screen would; pygame greets nobody, and the last line is the report."""
    code = "import sys; from gymnasium.envs.classic_control import CartPoleEnv; from fastppo.evaluate import console\n"
    code += "CartPoleEnv.metadata['render_fps'] = 1000\n"  # the window waits for nobody's eyes
    code += "sys.exit(console(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(cartpole), "--render", "human", "--episodes", "2"]
    environment = {**os.environ, "SDL_VIDEODRIVER": "dummy"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    first, last = done.stdout.splitlines()
    assert first.startswith("CartPole-v1: return ")
    report = json.loads(last)
    assert report["episodes"] == 2
    assert report["return_mean"] >= 8.0


@pytest.mark.parametrize(
    "settings", [AtariSettings(noop_max=0), AtariSettings(noop_max=0, episodic_life=False, grayscale=False)]
)
def test_the_atari_game_that_renders_is_the_one_trained_on(settings):
    """Oracle: ALE's vector environment under the same actions, through lives, a game's end and the next one's start."""
    pytest.importorskip("ale_py")
    pytest.importorskip("cv2")
    trained, renders = make_ale("ALE/Breakout-v5", 1, {}, settings), make_rgb_ale("ALE/Breakout-v5", {}, settings)
    steps = [(trained.reset(seed=0)[0], 0, 0, 0), (renders.reset(seed=0)[0], 0, 0, 0)]
    games, rng = 0, np.random.default_rng(0)
    while games < 2:
        assert np.abs(steps[0][0].astype(int) - steps[1][0]).max() <= 1
        assert steps[0][1:4] == steps[1][1:4]
        action = rng.integers(0, trained.single_action_space.n, 1)
        steps = [envs.step(action) for envs in (trained, renders)]
        games += int(getattr(trained, "game_over", steps[0][2])[0])
    frame = renders.render()[0]
    assert frame.shape == (210, 160, 3)
    assert frame.std() > 10
    assert renders.metadata["render_fps"] == 15
    trained.close()
    renders.close()


@pytest.mark.long
def test_a_video_of_atari(tmp_path, capsys):
    """From a run in ALE's vector environment: a frame a step."""
    for package in ("ale_py", "cv2", "imageio_ffmpeg"):
        pytest.importorskip(package)
    run_dir = tmp_path / "run"
    train(
        TrainConfig(
            **{**SMALL, "num_iterations": 1, "num_steps": 8},
            env_id="ALE/Pong-v5",
            env_kwargs={"max_num_frames_per_episode": 500},  # a game has thousands
            record_every=1,
            run_dir=str(run_dir),
        )
    )
    (path,) = (run_dir / "videos").iterdir()
    steps = int(capsys.readouterr().out.partition(f"{path}: return ")[2].split()[2])
    assert steps > 100
    assert len(read_video(path)[0]) == steps + 1


def test_record_every_says_that_it_is_what_needs_one_more_environment(tmp_path):
    """An environment that exists only once, or that takes no render_mode, cannot be recorded: the flag is named."""
    alive = []

    class Lone(gym.Wrapper):
        def __init__(self, **kwargs):
            if alive:
                raise RuntimeError("one at a time")
            alive.append(self)
            super().__init__(gym.make("CartPole-v1"))

        def close(self):
            alive.clear()
            super().close()

    gym.register("Lone-v0", entry_point=lambda **kwargs: Lone(**kwargs))
    try:
        with pytest.raises(UsageError, match=r"--record-every makes one more environment.*one at a time"):
            train(TrainConfig(**SMALL | {"env_id": "Lone-v0", "num_envs": 1}, record_every=1, run_dir=str(tmp_path / "run")))
    finally:
        del gym.registry["Lone-v0"]
