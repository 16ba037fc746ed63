"""Write frames to video files or show them in a window.

mp4 files are written with imageio-ffmpeg, a frame at a time. Gymnasium's recorder (1.4, moviepy 1.0.3) keeps every frame in
memory. It selects frames by time: it put 168 of 501 synthetic frames in a neighbour's place and wrote 301 frames for 300. GIF
files are written with Pillow, without ffmpeg. Knows nothing of policies, episodes, or of how an environment is rendered.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastppo.envs.render import has_display
from fastppo.errors import UsageError, brief

if TYPE_CHECKING:
    from fastppo.envs.render import Frame

Show = Callable[["Frame"], None]  # takes a frame (H, W, 3) uint8
GIF_FASTEST = 50.0  # frames a second: viewers play faster GIFs slowly


def choose_suffix(wanted: str) -> tuple[str, str | None]:
    """The suffix for "mp4", "gif" or "auto", and a line for the user if it is .gif because ffmpeg is missing.

    Raises:
        UsageError: `wanted` is "mp4" and ffmpeg is missing.
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
    """A function that adds a frame to a video, mp4 or gif by its suffix. The file appears whole at the end or not at all.

    Raises:
        UsageError: the file cannot be written.
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
        even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")  # the format needs even sizes
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
        written, _ = imageio_ffmpeg.count_frames_and_secs(
            str(path)
        )  # imageio does not report that ffmpeg ended early, for example on a full disk
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
    """Raise UsageError if a `window` cannot be opened."""
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
    """A function that shows frames in a window, `fps` a second. Closing the window raises KeyboardInterrupt.

    Call `check_display` first.
    """
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
