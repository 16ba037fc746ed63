"""Share a run's policy on the Hugging Face Hub: `python -m fastppo.push RUN_DIR owner/name`."""

import math
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastppo.cli import parse, run
from fastppo.config import TrainConfig, read_run_config
from fastppo.errors import UsageError
from fastppo.system.imports import lasting_imports
from fastppo.system.json_files import read_json
from fastppo.system.paths import absolute, current_directory

EPISODES = 20  # of the evaluation, where the run has none


@dataclass(frozen=True)
class PushConfig:
    """Upload a run's best policy to the Hugging Face Hub, with its settings, its results and a model card.

    `load_policy("hf://owner/name")` and `fastppo evaluate hf://owner/name` take it from there. Needs a login: `hf auth login`.
    Uploaded are config.json without paths of this machine, checkpoints/best.pt, summary.json, curves.png, the newest video and
    README.md. Files of these names in the repository are replaced.
    """

    run_dir: Annotated[str, tyro.conf.Positional]
    """Directory of the run."""
    repo: Annotated[str, tyro.conf.Positional]
    """The repository, owner/name. It is made if there is none."""
    episodes: int | None = None
    """Play so many episodes for the card. Default: the evaluation in summary.json, or 20 episodes if there is none."""
    private: bool = False
    """Make the repository private, if it is made."""

    def __post_init__(self) -> None:
        if self.episodes is not None and self.episodes < 1:
            raise UsageError(f"--episodes must be at least 1, got {self.episodes}")


def _main(args: Sequence[str]) -> None:
    settings = parse(PushConfig, args, prog="python -m fastppo.push")
    directory = absolute(settings.run_dir, "RUN_DIR", current_directory())
    config = read_run_config(directory)
    with lasting_imports():  # here, so that --help and wrong flags do not wait for it
        from fastppo.analysis.loading import load_policy
        from fastppo.policy.module_policy import named_factory
        from fastppo.run.hub import check_repo, told, upload_run

    check_repo(settings.repo, settings.repo)
    with told(settings.repo):  # before an evaluation that may take long
        pass
    agent = load_policy(directory, policy=named_factory(config.policy))
    summary = _summary(directory)
    if settings.episodes is not None or not summary.get("eval_episodes"):
        summary |= _evaluation(agent, config, settings.episodes or EPISODES, int(summary.get("global_step") or 0))
    with tempfile.TemporaryDirectory() as folder:
        _fill(Path(folder), directory, config, summary, settings.repo)
        message = f"fastppo: {config.env_id} after {summary['global_step']:,} steps"
        print(upload_run(Path(folder), settings.repo, settings.private, message))
    print(f"evaluate: fastppo evaluate hf://{settings.repo}")


def _summary(directory: Path) -> dict[str, Any]:
    """summary.json; raises UsageError if the run has not ended, or a number is none."""
    summary = read_json(directory / "summary.json", "the results of a run", "has this run ended?")
    numbers = [summary.get(name) for name in ("global_step", "eval_return_mean", "eval_return_std", "eval_episodes")]
    if not all(value is None or type(value) in (int, float) for value in numbers) or numbers[0] is None:
        raise UsageError(f"{directory / 'summary.json'} does not hold the results of a run")
    return summary


def _evaluation(agent: Any, config: TrainConfig, episodes: int, trained_steps: int) -> dict[str, Any]:
    """The evaluation in the keys of summary.json. Raises UsageError if no episode ends."""
    from fastppo.analysis.evaluation import EvaluationPlan, evaluate_config

    found = evaluate_config(agent, config, EvaluationPlan(episodes, trained_steps=trained_steps))
    if math.isnan(found["return_mean"]):
        raise UsageError("no episode of the evaluation ended, so there is no result for the card")
    return {f"eval_{name}": found[name] for name in ("return_mean", "return_std", "episodes")}


def _fill(folder: Path, directory: Path, config: TrainConfig, summary: dict[str, Any], repo: str) -> None:
    """Put what is uploaded into a folder."""
    from fastppo.analysis.model_card import model_card
    from fastppo.run.directory import RunDirectory

    source, target = RunDirectory(directory), RunDirectory(folder)
    preset = "none" if "/" in config.preset else config.preset
    shared = replace(config, preset=preset, run_dir=None, resume=None, init_from=None)  # no paths of this machine
    target.checkpoints.mkdir()
    shutil.copyfile(source.best, target.best)
    target.write_text(target.config, shared.to_json())
    target.write_json(target.summary, summary)
    pictures = []
    if source.curves.is_file():
        shutil.copyfile(source.curves, target.curves)
        pictures.append(target.curves.name)
    videos = [path for path in directory.glob("videos/*") if path.suffix in (".mp4", ".gif") and path.is_file()]
    if videos:
        newest = max(videos, key=lambda path: path.stat().st_mtime)
        replay = folder / f"replay{newest.suffix}"  # the Hub plays a replay.mp4
        shutil.copyfile(newest, replay)
        pictures += [replay.name] if replay.suffix == ".gif" else []
    target.write_text(folder / "README.md", model_card(repo, shared, summary, pictures))


def console(args: Sequence[str] | None = None) -> int:
    """Entry point: the exit code."""
    return run(_main, sys.argv[1:] if args is None else args)


if __name__ == "__main__":
    sys.exit(console())
