"""Episodes to look at: played one by one, shown in a window or kept as a file.

mp4 through imageio-ffmpeg, a frame at a time: gymnasium's recorder (1.4, moviepy 1.0.3) keeps every frame in memory and, taking
them by time, showed 168 of 501 synthetic frames in a neighbour's place and wrote 301 of 300. GIF through Pillow where there is
no ffmpeg. Knows nothing of how an environment is made or drawn (envs/render.py).
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastppo.callbacks import Callback, View
from fastppo.envs.autoreset import AutoresetEnvs
from fastppo.envs.streams import untouched_streams
from fastppo.errors import ENVIRONMENT_ERRORS, UsageError, brief, environment_fault, located
from fastppo.random_streams import Stream, environment_seed

if TYPE_CHECKING:
    from fastppo.envs.render import Frame
    from fastppo.policy.agent import Agent

Show = Callable[["Frame"], None]  # what is done with a frame (H, W, 3) uint8
RECORD_STEPS = 1000  # of an episode that is recorded during training
GIF_FASTEST = 50.0  # frames a second: viewers slow down what claims more


def play(
    agent: "Agent", envs: AutoresetEnvs, show: Show, seed: int | None, deterministic: bool, limit: int
) -> tuple[float, int]:
    """Play one episode, the whole game where it has lives, and show its first state and that after every step.

    Args:
        envs: one environment that can be drawn.
        seed: for its reset; None: its random numbers go on.
        limit: most steps.

    Returns:
        Its return and how many steps it took; one frame fewer than were shown.

    Raises:
        TrainingFault: the environment failed.
    """
    from fastppo.envs.render import render_frame

    total, counts = 0.0, True
    for steps in range(limit + 1):
        try:
            if steps == 0:
                agent.reset()
                obs, mask = envs.reset_and_mask(seed)
            else:
                step = envs.step(agent.act(obs, deterministic, mask))
                obs, mask = step.obs, step.action_mask
            frame = render_frame(envs)
        except UsageError:
            raise
        except ENVIRONMENT_ERRORS as error:
            raise environment_fault(error, "while it was drawn") from error
        show(frame)
        if steps > 0:
            total += float(step.reward[0]) if counts else 0.0
            done = bool(step.terminated[0] or step.truncated[0]) and counts
            if done and (step.game_over is None or step.game_over[0]):
                break
            if done if envs.keeps_final_obs else not counts:
                agent.reset()  # what comes next is another life's first observation
            counts = envs.keeps_final_obs or not done  # the step after a life's end only resets
    return total, steps


def choose_suffix(wanted: str) -> tuple[str, str | None]:
    """The suffix for "mp4", "gif" or "auto", and a line where the lack of ffmpeg made it .gif.

    Raises:
        UsageError: mp4 without ffmpeg.
    """
    if wanted == "gif":
        return ".gif", None
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        if wanted == "mp4":
            raise UsageError("--video mp4 needs ffmpeg: pip install 'fastppo[video]', or --video gif") from None
        return ".gif", "there is no ffmpeg: videos are GIFs (for mp4: pip install 'fastppo[video]')"
    return ".mp4", None


@contextlib.contextmanager
def video_file(path: Path, fps: float) -> Iterator[Show]:
    """A video, mp4 or gif by its suffix, of the frames shown; it appears whole at the end or not at all.

    Raises:
        UsageError: it cannot be written.
    """
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}").absolute()  # ffmpeg reads "a:b" as a protocol
    try:
        path.parent.mkdir(exist_ok=True)
        with (_gif if path.suffix == ".gif" else _mp4)(temporary, fps) as show:
            yield show
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({brief(error)})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def _mp4(path: Path, fps: float) -> Iterator[Show]:
    import imageio_ffmpeg

    frames, writer = 0, None

    def show(frame: "Frame") -> None:
        nonlocal frames, writer
        height, width, _ = frame.shape
        even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")  # as the format has it
        if writer is None:
            size = (even.shape[1], even.shape[0])
            writer = imageio_ffmpeg.write_frames(str(path), size, fps=fps, macro_block_size=2, ffmpeg_log_level="quiet")
            writer.send(None)
        writer.send(np.ascontiguousarray(even))
        frames += 1

    try:
        yield show
    finally:
        if writer is not None:
            writer.close()
    try:
        written, _ = imageio_ffmpeg.count_frames_and_secs(str(path))  # on a full disk ffmpeg ends, and imageio does not say so
    except RuntimeError:
        written = 0
    if written != frames:
        raise OSError(f"{written} of {frames} frames were written: is the disk full?")


@contextlib.contextmanager
def _gif(path: Path, fps: float) -> Iterator[Show]:
    from PIL import Image

    frames: list[Image.Image] = []
    yield lambda frame: frames.append(Image.fromarray(frame).quantize())
    duration = max(10 * round(100 / fps), int(1000 / GIF_FASTEST))  # ms, in steps of ten
    frames[0].save(path, format="GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0)


def check_display() -> None:
    """Raise UsageError where there is nothing to open a `window` on."""
    from fastppo.envs.render import has_display

    no_window = "--render human can open no window ({}); --video needs none"
    if not has_display():
        raise UsageError(no_window.format("there is no display"))
    try:
        import pygame
    except ImportError:
        raise UsageError('--render human needs pygame: pip install "gymnasium[classic-control]"') from None
    try:
        pygame.display.init()
    except pygame.error as error:
        raise UsageError(no_window.format(error)) from None


@contextlib.contextmanager
def window(title: str, fps: float) -> Iterator[Show]:
    """A window that shows each frame for as long as it lasts, after `check_display`; closing it interrupts."""
    import pygame

    clock, screen = pygame.time.Clock(), None

    def show(frame: "Frame") -> None:
        nonlocal screen
        if screen is None:
            screen = pygame.display.set_mode((frame.shape[1], frame.shape[0]))
            pygame.display.set_caption(title)
        screen.blit(pygame.surfarray.make_surface(frame.swapaxes(0, 1)), (0, 0))
        pygame.display.flip()
        clock.tick(fps)
        if any(event.type == pygame.QUIT for event in pygame.event.get()):
            raise KeyboardInterrupt

    try:
        yield show
    finally:
        pygame.display.quit()


def record(
    agent: "Agent", envs: AutoresetEnvs, path: Path, seed: int | None, deterministic: bool, limit: int
) -> tuple[float, int]:
    """`play` one episode into a video at `path`; raises as `play` and `video_file`."""
    from fastppo.envs.render import frames_per_second

    with video_file(path, frames_per_second(envs)) as show:
        return play(agent, envs, show, seed, deterministic, limit)


class Recorder(Callback):
    """--record-every K: after every K-th iteration the policy plays one episode, which becomes a video in the run directory.

    The environment is another than those trained on, starts each video from the same seed, which is nobody else's, and the
    policy takes its likeliest actions: no generator of the run is touched. What fails costs a line.
    """

    def __init__(self, envs: AutoresetEnvs, every: int, note: Callable[[str], None]) -> None:
        """envs: one that can be drawn; note: gets a line on each video."""
        self.envs = envs
        self.every = every
        self.note = note
        self.suffix, remark = choose_suffix("auto")
        if remark is not None:
            note(remark)

    def on_iteration(self, run: View) -> None:
        if run.iteration % self.every:
            return
        path = run.run_dir / "videos" / f"step-{run.global_step}{self.suffix}"
        try:
            seed = environment_seed(run.config.seed, Stream.RECORDED_ENVIRONMENT)
            with untouched_streams():
                total, steps = record(run.policy(), self.envs, path, seed, True, RECORD_STEPS)
        except UsageError as error:
            self.note(f"no video of this iteration: {error}")
        except ENVIRONMENT_ERRORS as error:
            self.note(f"no video of this iteration: {located(error)}")
        else:
            self.note(f"{path}: return {total:.4g} in {steps} steps")
