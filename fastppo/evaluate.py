"""Play episodes with a trained policy and report their returns: `python -m fastppo.evaluate RUN_DIR --episodes K`."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from fastppo.bounds import is_of_type
from fastppo.cli import open_run, parse, run
from fastppo.errors import UsageError
from fastppo.system.imports import lasting_imports

VideoFormat = Annotated[
    str | None,
    PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar="[mp4|gif]",
        instance_from_str=lambda given: given[0] if given else "auto",
        is_instance=lambda instance: instance is None or isinstance(instance, str),
        str_from_instance=lambda video: ["None" if video is None else video],
    ),
]


@dataclass(frozen=True)
class EvaluateConfig:
    """Play episodes with a run's policy; the last line of the output is one JSON object."""

    run_dir: Annotated[str | None, tyro.conf.Positional] = None
    """Directory of the run, or hf://owner/name of one on the Hugging Face Hub. Default: the newest one in runs/."""
    episodes: int = 20
    """Episodes to play."""
    checkpoint: Literal["best", "last"] = "best"
    """Which policy: best.pt, the one with the highest return in training or --eval-every, or last.pt, the one at the end."""
    deterministic: bool = True
    """Take the likeliest action; otherwise sample."""
    seed: int = 0
    """Seed of the environments and of sampling."""
    render: Literal["human"] | None = None
    """human: play the episodes in a window, one after another, at their natural speed."""
    video: VideoFormat = None
    """Record further episodes as videos in the run directory, of a run on the Hub in videos/ here. Without a value: mp4 if
    ffmpeg is installed, else gif."""
    video_episodes: int = 1
    """Episodes that --video records."""
    max_steps: int | None = None
    """Largest number of steps of all episodes together. Default: as many as were trained, but 1,000 to 100,000 an episode."""

    def __post_init__(self) -> None:
        if self.video not in (None, "auto", "mp4", "gif"):
            raise UsageError(f"--video takes mp4, gif or nothing, got {self.video[:100]!r}")
        if self.video_episodes < 1:
            raise UsageError(f"--video-episodes must be at least 1, got {self.video_episodes}")
        if self.max_steps is not None and self.max_steps < 1:
            raise UsageError(f"--max-steps must be at least 1, got {self.max_steps}")
        if not (is_of_type(int, self.episodes) and is_of_type(int, self.seed)):
            raise UsageError(f"--episodes and --seed must be whole numbers, got {self.episodes!r:.99} and {self.seed!r:.99}")
        if self.episodes < 1 or self.seed < 0:
            raise UsageError(f"--episodes must be at least 1 and --seed at least 0, got {self.episodes} and {self.seed}")


def _main(args: Sequence[str]) -> None:
    settings = parse(EvaluateConfig, args, prog="python -m fastppo.evaluate")
    directory, outputs, config = open_run(settings.run_dir, settings.checkpoint)  # its errors need not wait for torch
    with lasting_imports():  # here, so that --help and wrong flags do not wait for it
        import torch

        from fastppo.analysis.evaluation import EvaluationPlan, evaluate_config
        from fastppo.analysis.loading import load_run
        from fastppo.analysis.rendered_episodes import record_episodes, show_episodes
        from fastppo.analysis.video import choose_suffix

    torch.set_num_threads(1)  # a few rows at a time: a second thread costs more than it gives
    agent, trained_steps = load_run(directory, config, settings.checkpoint)
    plan = EvaluationPlan(settings.episodes, settings.seed, settings.deterministic, trained_steps, settings.max_steps)
    videos: list[Path] = []
    if settings.video is not None:
        suffix, remark = choose_suffix(settings.video)
        if remark is not None:
            print(remark)
        name = outputs / "videos" / f"eval-step-{trained_steps}"
        videos = record_episodes(agent, config, name, suffix, replace(plan, episodes=settings.video_episodes))
    result = (evaluate_config if settings.render is None else show_episodes)(agent, config, plan)
    print(f"{config.env_id}: {_in_words(result)}")
    if not result["episodes"]:
        result = {**result, "return_mean": None, "return_std": None}  # JSON has no nan
    print(json.dumps({**result, "video": str(videos[0])} if videos else result))


def _in_words(result: Mapping[str, Any]) -> str:
    """The mean return and its standard error."""
    mean, std, episodes = result["return_mean"], result["return_std"], result["episodes"]
    if not episodes:
        return "no return; --max-steps allows more steps"
    if episodes == 1:
        return f"return {mean:.2f} in 1 episode"
    parts = "".join(f", part {index}: {value:.2f}" for index, value in enumerate(result.get("return_parts", ())))
    return f"return {mean:.2f} +- {std / math.sqrt(episodes):.2f} (standard error of {episodes} episodes){parts}"


def console(args: Sequence[str] | None = None) -> int:
    """Entry point: the exit code."""
    return run(_main, sys.argv[1:] if args is None else args)


if __name__ == "__main__":
    sys.exit(console())
